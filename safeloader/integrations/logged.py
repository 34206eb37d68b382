"""What is logged of the loaders of a training, and when. Runs in: main."""

from __future__ import annotations

import warnings
from typing import Any

from safeloader.instrumenting import loaders_of


def metrics_of_all(obj: Any, prefix: str, last: int | None = None) -> dict[str, float]:
    """The metrics of the loaders in ``obj``, named ``prefix/wait_share`` and so on.

    Where there are several, the number of each comes in between: ``prefix/0/wait_share``. The
    number of the epoch is left out, which every framework logs itself.
    """
    return _named(prefix, [loader.metrics(last) for loader in loaders_of(obj)])


def _named(prefix: str, each: list[dict[str, float]]) -> dict[str, float]:
    return {
        f"{prefix}/{name}" if len(each) == 1 else f"{prefix}/{number}/{name}": value
        for number, metrics in enumerate(each)
        for name, value in metrics.items()
        if name != "epoch"
    }


class LoggedLoaders:
    """The loaders of one training: what they did since it was logged last.

    Args:
        prefix: before the name of each metric.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._at: dict[int, tuple[int, int]] = {}  # epoch and batch of each when logged last
        self._told = False

    def since_last(self, obj: Any) -> dict[str, float]:
        """Of the batches since the last call, within the epoch that runs; none: nothing."""
        loaders = loaders_of(obj)
        if not loaders and not self._told:
            self._told = True
            warnings.warn(unrecorded(obj), stacklevel=3)
        each = []
        for number, loader in enumerate(loaders):
            newest = loader.last_batch
            if newest is None:
                continue
            epoch, batch = self._at.get(number, (-1, -1))
            new = newest.batch - batch if newest.epoch == epoch else newest.batch + 1
            self._at[number] = newest.epoch, newest.batch
            if new > 0:
                each.append(loader.metrics(new))
        return _named(self._prefix, each)

    def of_epoch(self, obj: Any) -> dict[str, float]:
        """Of the whole epoch, under ``<prefix>_epoch``."""
        return metrics_of_all(obj, f"{self._prefix}_epoch")


def unrecorded(obj: Any) -> str:
    """What to do where there is nothing to log: no loader is recorded, or none was read from."""
    if loaders_of(obj):
        return (
            f"this {type(obj).__name__} has handed no batch over, so nothing is logged of it. If "
            "the training has begun, it reads from what the framework made of it: give that to "
            "safeloader.instrument and here"
        )
    return (
        f"this {type(obj).__name__} is not recorded, so nothing is logged of it. Make it a "
        "SafeDataLoader; or, where the framework makes it or makes yours again, give what it made "
        "to safeloader.instrument and here; or start the program with python -m safeloader run"
    )
