"""How long a run's training loops waited, and what its workers did meanwhile. Runs in: main.

One pass over the batches, without their indices; memory is bounded by epochs and workers. The time
from one hand-over to the next, within an epoch, is a step: the loop computes, asks for the next
batch, and waits. What lies between two epochs (validation, say) belongs to no step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from safeloader.report.folder import LoaderRecords
from safeloader.report.run import RunFolder

SPANS = 160  # of time, in each attempt
_STEPS_MAX = 40_000  # of all loaders together, that are kept with their moment
_LONGEST = 1000  # waits
_COLUMNS = (
    *("step", "epoch", "batch", "worker", "pid", "asked_ns", "wait_ns", "start_ns", "collate_ns"),
    "fetch_ns",
)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclasses.dataclass
class Work:
    """What a worker did in an epoch, in ns; ``first`` and ``last`` bound it."""

    first: int = 1 << 62
    last: int = 0
    fetching: float = 0.0
    collating: float = 0.0
    pids: set[int] = dataclasses.field(default_factory=set)

    @property
    def idle(self) -> float:
        """How long it waited to be asked, or for room to hand over."""
        return max(0.0, self.last - self.first - self.fetching - self.collating)


@dataclasses.dataclass
class LoaderWaiting:
    """The steps of one loader of one process.

    Attributes:
        records: what it wrote.
        batches, samples: how many were handed over.
        waited_ns, computed_ns: of all steps.
        first_waits_ns: the part of ``waited_ns`` that was for the first batch of an epoch.
        waited, computed: the same by spans of time of the attempt.
        by_epoch: samples handed over, by epoch.
        work: by worker (-1: main) and epoch.
        steps: a row for every so-many-th batch: step, epoch, batch, asked (ns), waited (ns).
        longest: the same of those that were waited for longest.
    """

    records: LoaderRecords
    first_ns: int
    last_ns: int
    batches: int
    samples: int = 0
    waited_ns: int = 0
    computed_ns: int = 0
    first_waits_ns: int = 0
    first_waits: int = 0
    waited: Floats = dataclasses.field(default_factory=lambda: np.zeros(SPANS))
    computed: Floats = dataclasses.field(default_factory=lambda: np.zeros(SPANS))
    by_epoch: dict[int, int] = dataclasses.field(default_factory=dict)
    work: dict[tuple[int, int], Work] = dataclasses.field(default_factory=dict)
    steps: Ints = dataclasses.field(default_factory=lambda: np.empty((0, 5), np.int64))
    longest: Ints = dataclasses.field(default_factory=lambda: np.empty((0, 5), np.int64))

    @property
    def share(self) -> float:
        """Of the time of all steps, what was spent waiting; 0 where there were none."""
        whole = self.waited_ns + self.computed_ns
        return self.waited_ns / whole if whole else 0.0

    @property
    def workers(self) -> int:
        """How many workers it had at most; 0: main did the work."""
        return max((worker for worker, _ in self.work), default=-1) + 1


@dataclasses.dataclass
class Waiting:
    """The steps of a run.

    Attributes:
        loaders: those that handed over anything.
        spans: of each attempt, when it began and ended, in ns since 1970.
    """

    loaders: list[LoaderWaiting]
    spans: dict[int, tuple[int, int]]


def waiting_of(run: RunFolder) -> Waiting:
    """Read how long a run's loops waited."""
    loaders = [found for each in run.loaders if (found := _extent(each)) is not None]
    spans: dict[int, tuple[int, int]] = {}
    for each in loaders:
        first, last = spans.get(each.records.attempt, (each.first_ns, each.last_ns))
        spans[each.records.attempt] = min(first, each.first_ns), max(last, each.last_ns)
    every = -(-sum(each.batches for each in loaders) // _STEPS_MAX)
    for each in loaders:
        _read(each, spans[each.records.attempt], every)
    return Waiting(loaders, spans)


def _extent(records: LoaderRecords) -> LoaderWaiting | None:
    """When the first batch was asked for, and the last came; None where there is none."""
    first, last, rows = 0, 0, 0
    for table in records.pieces(["asked_ns", "wait_ns"]):
        asked, wait = table["asked_ns"].to_numpy(), table["wait_ns"].to_numpy()
        first = min(first, int(asked.min())) if rows else int(asked.min())
        last = max(last, int((asked + wait).max()))
        rows += len(asked)
    return LoaderWaiting(records, first, last, rows) if rows else None


def _read(told: LoaderWaiting, span: tuple[int, int], every: int) -> None:
    """Fill in the rest, from what is there now: a run that goes on may have more than before."""
    before: tuple[int, int] | None = None  # epoch, and when its newest batch was handed over
    kept = []
    told.batches = 0
    for table in told.records.pieces(list(_COLUMNS)):
        columns = {name: table[name].to_numpy().astype(np.int64) for name in _COLUMNS[:-1]}
        before = _steps(told, columns, before, span)
        _work(told, columns, *_sums(table["fetch_ns"]))
        rows = np.stack([columns[k] for k in ("step", "epoch", "batch", "asked_ns", "wait_ns")], 1)
        kept.append(rows[rows[:, 0] % every == 0])
        longest = np.concatenate([told.longest, rows])
        told.longest = longest[np.argsort(-longest[:, 4], kind="stable")[:_LONGEST]]
        told.batches += len(rows)
    told.steps = np.concatenate([told.steps, *kept])


def _steps(
    told: LoaderWaiting,
    columns: dict[str, Ints],
    before: tuple[int, int] | None,
    span: tuple[int, int],
) -> tuple[int, int]:
    epochs, asked, wait = columns["epoch"], columns["asked_ns"], columns["wait_ns"]
    done = asked + wait
    last_epochs = np.concatenate([[-1 if before is None else before[0]], epochs[:-1]])
    last_done = np.concatenate([[0 if before is None else before[1]], done[:-1]])
    within = epochs == last_epochs
    computed = np.where(within, np.maximum(0, asked - last_done), 0)
    told.waited_ns += int(wait.sum())
    told.computed_ns += int(computed.sum())
    told.first_waits_ns += int(wait[~within].sum())
    told.first_waits += int((~within).sum())
    first, last = span
    place = np.clip((done - first) * SPANS // max(1, last - first + 1), 0, SPANS - 1)
    told.waited += np.bincount(place, wait, SPANS)
    told.computed += np.bincount(place, computed, SPANS)
    return int(epochs[-1]), int(done[-1])


def _sums(lists: Any) -> tuple[Floats, Ints]:
    """The sum and the length of each list of a column."""
    sums, sizes = [], []
    for chunk in lists.chunks:
        values = chunk.flatten().to_numpy(zero_copy_only=False)
        offsets = chunk.offsets.to_numpy().astype(np.int64)
        ends = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
        at = offsets - offsets[0]
        sums.append(ends[at[1:]] - ends[at[:-1]])
        sizes.append(np.diff(offsets))
    return np.concatenate(sums), np.concatenate(sizes)


def _work(told: LoaderWaiting, columns: dict[str, Ints], fetching: Floats, sizes: Ints) -> None:
    told.samples += int(sizes.sum())
    start, collating = columns["start_ns"], columns["collate_ns"]
    end = start + fetching.astype(np.int64) + collating
    pairs = np.stack([columns["worker"], columns["epoch"]], 1)
    kinds, of_row = np.unique(pairs, axis=0, return_inverse=True)
    of_row = of_row.ravel()
    for k, (worker, epoch) in enumerate(kinds.tolist()):
        rows = of_row == k
        its = told.work.setdefault((worker, epoch), Work())
        told.by_epoch[epoch] = told.by_epoch.get(epoch, 0) + int(sizes[rows].sum())
        its.first = min(its.first, int(start[rows].min()))
        its.last = max(its.last, int(end[rows].max()))
        its.fetching += float(fetching[rows].sum())
        its.collating += float(collating[rows].sum())
        its.pids |= set(columns["pid"][rows].tolist())
