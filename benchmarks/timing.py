"""Speed: whole epochs of every contender, in turn, over one dataset."""

from __future__ import annotations

import gc
import resource
import time
import zlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.apart import Apart
from benchmarks.cases import CASES, Case, Unavailable
from benchmarks.peers import maker


@dataclass(frozen=True)
class EpochTime:
    """One epoch, from its first batch to its end: what a loader does at the end counts as well.

    With fresh workers from ``iter(loader)`` to the end, so that their start counts too.
    """

    first_batch_ns: int
    """From `iter(loader)` to the first batch; told apart, so that nothing hides there either."""
    per_batch_ns: float
    main_cpu_per_batch_ns: float
    """CPU time of the main process, all of its threads."""


class DifferentBatches(Exception):
    """Two contenders did not do the same work: their speeds cannot be compared."""


def time_epoch(loader: Iterable[Any], *, whole: bool = False, epochs: int = 1) -> EpochTime:
    """Run through one epoch with a consumer that does nothing: the hardest case for a loader.

    Args:
        loader: makes the epoch.
        whole: a batch's share is of the whole epoch, and not of what follows the first batch.
        epochs: how many of the loader's are timed as one; the first batch is that of the first.
    """
    gc.collect()
    started_ns, from_cpu_ns = time.perf_counter_ns(), time.process_time_ns()
    batches = iter(loader)
    next(batches)
    first_ns = time.perf_counter_ns()
    from_ns, count = started_ns, 1
    if not whole:
        from_ns, from_cpu_ns, count = first_ns, time.process_time_ns(), 0
    for _ in batches:
        count += 1
    for _ in range(epochs - 1):
        for _ in loader:
            count += 1
    ended_ns, ended_cpu_ns = time.perf_counter_ns(), time.process_time_ns()
    return EpochTime(
        first_batch_ns=first_ns - started_ns,
        per_batch_ns=(ended_ns - from_ns) / count,
        main_cpu_per_batch_ns=(ended_cpu_ns - from_cpu_ns) / count,
    )


def seeded(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a generator of their own: every contender draws the same order."""
    return kwargs | {"generator": torch.Generator().manual_seed(1)}


def digest(batch: Any) -> Any:
    """What a batch holds, whether in tensors or in arrays."""
    if isinstance(batch, dict):
        return {key: digest(value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [digest(each) for each in batch]
    if isinstance(batch, torch.Tensor | np.ndarray):
        array = np.asarray(batch)
        return array.dtype.str, array.shape, zlib.crc32(np.ascontiguousarray(array))
    return batch


def first_epoch(loader: Iterable[Any]) -> list[Any]:
    """The digests of an epoch; augmentation in the main process draws from the global generator."""
    torch.manual_seed(1)
    return [digest(batch) for batch in loader]


class Contending:
    """One contender in one case, in whose process this is."""

    def __init__(self, case: str, contender: str, batches: int, scratch: Path) -> None:
        self._case = CASES[case]
        dataset, kwargs = self._case.build(batches)
        self._loader = maker(contender)(dataset, seeded(kwargs), scratch)

    def first_epoch(self) -> list[Any]:
        """What it gives, and then a whole epoch at full speed, which fills every cache."""
        seen = first_epoch(self._loader)
        self.time_epoch()
        return seen

    def time_epoch(self) -> EpochTime:
        """Its next epoch."""
        return time_epoch(self._loader, whole=self._case.whole, epochs=self._case.epochs)


ROUNDS = 3
"""How often each contender has another process: one and the same program is some percent faster or
slower each time it is started."""


def time_case(
    case: Case, names: Sequence[str], batches: int, repeats: int, folder: Path
) -> tuple[dict[str, list[EpochTime]], dict[str, str]]:
    """Time `repeats` epochs of each contender; also gives why some were left out.

    Raises:
        DifferentBatches: if they do not all give what the first of them gives.
    """
    times: dict[str, list[EpochTime]] = {}
    left_out: dict[str, str] = {}
    rounds = min(ROUNDS, repeats)
    for number in range(rounds):
        share = len(range(number, repeats, rounds))
        scratch = folder / str(number)
        for name, epochs in _one_round(case, names, batches, share, scratch, left_out).items():
            times.setdefault(name, []).extend(epochs)
    return times, left_out


def _one_round(
    case: Case,
    names: Sequence[str],
    batches: int,
    repeats: int,
    folder: Path,
    left_out: dict[str, str],
) -> dict[str, list[EpochTime]]:
    """The same, each contender in a process of its own; one of them runs at a time.

    The order turns round every time (A B C, C B A, ...), so that a machine that grows slower or
    faster favours none of them, and what is compared was measured within a second or so.
    """
    with ExitStack() as ends:
        contenders: dict[str, Apart] = {}
        for name in names:
            if name not in left_out:
                scratch = folder / name
                scratch.mkdir(parents=True)
                contender = Apart(Contending, case.name, name, batches, scratch)
                contenders[name] = ends.enter_context(contender)
        expected: list[Any] = []
        for name, contender in list(contenders.items()):
            try:
                seen = contender.ask("first_epoch")
            except Unavailable as reason:
                left_out[name] = str(reason)
                del contenders[name]
                continue
            expected = expected or seen
            if seen != expected:
                raise DifferentBatches(f"{case.name}: {name} gives other batches than {names[0]}")
        times: dict[str, list[EpochTime]] = {name: [] for name in contenders}
        if len(contenders) > 1:
            for turn in range(repeats):
                for name in contenders if turn % 2 == 0 else reversed(contenders):
                    times[name].append(contenders[name].ask("time_epoch"))
    return times


def childrens_cpu_seconds() -> float:
    """CPU time of the processes that this one started and that ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
