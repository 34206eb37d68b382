"""A new pool in the place of one that died (``on_crash="restart"``). Runs in: main."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader

from safeloader.failures.failure import Failure
from safeloader.introspect.texts import index_text
from safeloader.introspect.values import bounded
from safeloader.main.drawing import RecordingSampler
from safeloader.main.epoch import Epoch
from safeloader.supervision.diagnosis import WorkerLocation

MOST_RESTARTS = 10  # in an epoch


class WorkerRestarts:
    """Decides, in one epoch, whether new workers take over from those that died.

    A sample at which a worker dies twice in a row is left out of its batch. The pool that died is
    replaced whole: batches that were finished and not handed over are made again.

    Attributes:
        blueprint: a copy of the loader that a new pool can be built from, and that holds no pool.
    """

    def __init__(self, loader: DataLoader[Any], epoch: Epoch) -> None:
        self.blueprint: DataLoader[Any] = object.__new__(type(loader))
        kept = {k: v for k, v in vars(loader).items() if k not in ("_iterator", "_pool")}
        self.blueprint.__dict__.update(kept)
        self._epoch = epoch
        self._restarts = 0
        self._last: set[tuple[int, int | None]] = set()

    def should_restart(
        self, failure: Failure, at: Sequence[WorkerLocation], sampler: RecordingSampler
    ) -> bool:
        """Whether to try again; then the tasks at which workers died are marked, and it is told."""
        if self._restarts >= MOST_RESTARTS:
            times = self._restarts + 1
            self._epoch.log.error("the workers died %d times in this epoch: giving up", times)
            return False
        died_at: set[tuple[int, int | None]] = set()
        left_out: list[tuple[Any, ...]] = []
        for where in at:
            if where.position.seq is None:
                continue
            at_once = where.position.phase == "fetch at once" and not sampler.batched
            place = (where.position.seq, 0 if at_once else where.position.position)
            died_at.add(place)
            again = place in self._last and place[1] is not None
            left_out.append(sampler.change(place[0], excluded=place[1] if again else None))
        self._last = died_at
        self._restarts += 1
        hint = bounded(failure.hint.partition("\n")[0], 300)
        said = [
            f"{failure.message} Restarting the workers ({self._restarts} of at most "
            f"{MOST_RESTARTS} times in an epoch). {hint}"
        ]
        for names in filter(None, left_out):
            index = index_text(names if len(names) > 1 else names[0])
            said.append(f"index {index} killed its worker twice and is left out")
        self._epoch.restarted(failure, said)
        return True
