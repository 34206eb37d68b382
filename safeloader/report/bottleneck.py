"""Whether data is the bottleneck of a run, and what would help. Runs in: main.

Nothing is guessed: each piece of advice names the figure it follows from, and what it can bring at
most. Whether it does, ``python -m safeloader doctor`` measures.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from safeloader.report.fetch_times import SLOW, FetchTimes
from safeloader.report.waiting import LoaderWaiting, Work

LITTLE, MUCH = 0.05, 0.20  # of the time of the steps
_STARTS = 0.3  # of the waiting, for the first batches of epochs
_COLLATING = 0.4  # of the workers' work
_BUSY = 0.8  # of a worker's time
_FEW, _THEIR_TIME = 0.02, 0.25  # of the samples, and of the time to fetch all
_UNEVEN = 0.10  # of the time of the steps, between the ranks


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """What one loader's waiting comes to, over all ranks and attempts.

    Attributes:
        name: the loader's.
        share: of the time of all steps, what the loops waited.
        waited_s, computed_s: the mean over ranks.
        level: 0: data keeps up, 1: it costs a little, 2: data is the bottleneck.
        workers: of each process; 0 where main does the work.
        busy: the share of the workers' time in which they fetched or collated.
        advice: what to change and what it would bring, in a sentence or two each.
    """

    name: str
    share: float
    waited_s: float
    computed_s: float
    level: int
    workers: int
    busy: float
    advice: tuple[str, ...]


def bottleneck_of(name: str, loaders: list[LoaderWaiting], times: FetchTimes) -> Bottleneck:
    """Judge the loaders of one name."""
    waited = sum(each.waited_ns for each in loaders)
    computed = sum(each.computed_ns for each in loaders)
    share = waited / (waited + computed) if waited + computed else 0.0
    level = 0 if share < LITTLE else 1 if share < MUCH else 2
    works = [work for each in loaders for work in each.work.values()]
    active = sum(work.fetching + work.collating for work in works)
    idle = sum(work.idle for work in works)
    busy = active / (active + idle) if active + idle else 0.0
    ranks = max(1, len({each.records.rank for each in loaders}))
    workers = max((each.workers for each in loaders), default=0)
    advice: list[str] = []
    if level:
        advice += _starts(loaders, waited, share)
        advice += _more_workers(loaders, workers, active, computed, busy)
        advice += _few_samples(times)
        advice += _collating(works, active)
        advice.append(
            "To measure what other settings bring, before you train: "
            "python -m safeloader doctor train.py:make_loader."
        )
    advice += _uneven(loaders)
    return Bottleneck(
        name, share, waited / ranks / 1e9, computed / ranks / 1e9, level, workers, busy, (*advice,)
    )


def _starts(loaders: list[LoaderWaiting], waited: int, share: float) -> list[str]:
    firsts = sum(each.first_waits_ns for each in loaders)
    epochs = max(each.first_waits for each in loaders)
    if not waited or firsts / waited < _STARTS or epochs < 2:
        return []
    part = f"{firsts / waited:.0%} of the waiting is for the first batch of an epoch"
    renewed = any(_renewed(each) for each in loaders)
    if not renewed:
        return [f"{part}, before the workers have any ready: few, longer epochs wait less."]
    return [
        f"persistent_workers=True: {part}, and the workers are started anew for each. Without that "
        f"part, waiting falls from {share:.0%} to {_without(share, firsts / waited):.0%} at best."
    ]


def _without(share: float, part: float) -> float:
    """The share of waiting if this part of it were gone."""
    left = share * (1 - part)
    return left / (1 - share + left) if share < 1 else 1.0


def _renewed(told: LoaderWaiting) -> bool:
    """Whether each epoch had workers of its own."""
    pids = [work.pids for (worker, _), work in told.work.items() if worker == 0]
    return len(pids) > 1 and len(set().union(*pids)) >= len(pids)


def _more_workers(
    loaders: list[LoaderWaiting], workers: int, active: float, computed: int, busy: float
) -> list[str]:
    if not computed:
        return []
    needed = max(1, math.ceil(active / computed * 1.1))
    cores = _cores_of_a_rank(loaders)
    number = needed if cores is None else min(needed, cores)
    waited = sum(each.waited_ns for each in loaders)
    now = computed + (waited if workers else active)  # with workers, what the loop took
    gain = now / max(computed, active / number)
    few = ""
    if number < needed:
        few = (
            f" For the model not to wait at all it would take {needed}, and there are {number} "
            "cores: make a sample cheaper to fetch."
        )
    free = "as many free cores" if cores is None else "as many of the cores free"
    if workers == 0:
        return [
            f"num_workers={number}: the main process makes the batches itself, and the model waits "
            f"meanwhile. With that many workers and {free}, steps are up to {gain:.1f} times as "
            f"fast.{few}"
        ]
    if busy >= _BUSY and number > workers:
        return [
            f"num_workers={number} instead of {workers}: the workers are busy {busy:.0%} of their "
            f"time, and make less than the model takes. With {free}, steps are up to {gain:.1f} "
            f"times as fast.{few or ' If they are not, make a sample cheaper to fetch.'}"
        ]
    if busy >= _BUSY and needed > workers:
        return [
            f"Make a sample cheaper to fetch: the workers are busy {busy:.0%} of their time and "
            f"make less than the model takes, and there is no core for more than {cores} of them."
        ]
    if busy < _BUSY:
        return [
            f"The workers are idle {1 - busy:.0%} of their time, and still the loop waits: single "
            "slow batches hold up those behind them, or workers start. Look at the longest waits "
            "below; a higher prefetch_factor evens them out, in_order=False does where order does "
            "not matter."
        ]
    return []


def _cores_of_a_rank(loaders: list[LoaderWaiting]) -> int | None:
    """How many of its machine's cores a rank has, if they share them alike; None: not known."""
    by_host: dict[Any, set[int]] = {}
    cores: list[int] = []
    for each in loaders:
        info = each.records.info
        by_host.setdefault(info.get("process", {}).get("host"), set()).add(each.records.rank)
        cores += [info["cores"]] if info.get("cores") else []
    if not cores:
        return None
    return max(1, min(cores) // max(map(len, by_host.values())))


def _few_samples(times: FetchTimes) -> list[str]:
    samples = times.slow / max(1, times.distinct)
    time = times.slow_ns / max(1.0, times.total_ns)
    if not 0 < samples <= _FEW or time < _THEIR_TIME:
        return []
    part = (
        f"{time:.0%} of the time to fetch goes into {times.slow:,} of {times.distinct:,} samples, "
        f"each over {SLOW} times as slow as the middle one"
    )
    if not times.again:
        return [
            f"{part}. Each was fetched once: a second epoch tells whether that is the samples' "
            "doing or the machine's."
        ]
    return [
        f"{part}, each time: they are listed under Which samples. Without them fetching takes "
        f"{time:.0%} less."
    ]


def _collating(works: list[Work], active: float) -> list[str]:
    collating = sum(work.collating for work in works)
    if not active or collating / active < _COLLATING:
        return []
    return [
        f"{collating / active:.0%} of the workers' work is collating: look at collate_fn, or "
        "return samples of one shape and dtype, which are stacked at once."
    ]


def _uneven(loaders: list[LoaderWaiting]) -> list[str]:
    """A rank that waits for its data makes the others wait for it."""
    shares: dict[int, list[LoaderWaiting]] = {}
    for each in loaders:
        shares.setdefault(each.records.rank, []).append(each)
    if len(shares) < 2:
        return []
    of_rank = {
        rank: sum(each.waited_ns for each in its)
        / max(1, sum(each.waited_ns + each.computed_ns for each in its))
        for rank, its in shares.items()
    }
    worst, best = max(of_rank, key=lambda k: of_rank[k]), min(of_rank, key=lambda k: of_rank[k])
    if of_rank[worst] - of_rank[best] < _UNEVEN:
        return []
    return [
        f"Rank {worst} waits {of_rank[worst]:.0%} of its time for data, rank {best} "
        f"{of_rank[best]:.0%}: where ranks step together, the others wait for rank {worst}."
    ]
