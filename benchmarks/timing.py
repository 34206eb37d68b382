"""Speed: whole epochs of every contender, in turn, over one dataset."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.cases import Case
from benchmarks.contenders import CONTENDERS


@dataclass(frozen=True)
class EpochTime:
    """One epoch, from its first batch to its end: what a loader does at the end counts as well."""

    first_batch_ns: int
    """From `iter(loader)` to the first batch; told apart, so that nothing hides there either."""
    per_batch_ns: float
    main_cpu_per_batch_ns: float
    """CPU time of the main process, all of its threads."""


def time_epoch(loader: DataLoader[Any]) -> EpochTime:
    """Run through one epoch with a consumer that does nothing: the hardest case for a loader."""
    gc.collect()
    started_ns = time.perf_counter_ns()
    batches = iter(loader)
    next(batches)
    first_ns, first_cpu_ns = time.perf_counter_ns(), time.process_time_ns()
    count = 0
    for _ in batches:
        count += 1
    ended_ns, ended_cpu_ns = time.perf_counter_ns(), time.process_time_ns()
    return EpochTime(
        first_batch_ns=first_ns - started_ns,
        per_batch_ns=(ended_ns - first_ns) / count,
        main_cpu_per_batch_ns=(ended_cpu_ns - first_cpu_ns) / count,
    )


def seeded(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a generator of their own: every contender draws the same order."""
    return kwargs | {"generator": torch.Generator().manual_seed(1)}


def time_case(
    case: Case, names: Sequence[str], batches: int, repeats: int, folder: Path
) -> dict[str, list[EpochTime]]:
    """Time `repeats` epochs of each contender.

    The order turns round every time (A B C, C B A, ...), so that a machine that grows slower or
    faster favours none of them, and what is compared was measured within a second or so.
    """
    dataset, kwargs = case.build(batches)
    loaders: dict[str, DataLoader[Any]] = {}
    for name in names:
        scratch = folder / name
        scratch.mkdir(parents=True)
        loaders[name] = CONTENDERS[name](dataset, seeded(kwargs), scratch)
        time_epoch(loaders[name])  # starts the workers and fills every cache
    times: dict[str, list[EpochTime]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            times[name].append(time_epoch(loaders[name]))
    return times
