"""What a run's batches tell in figures: waiting, speed, slowest samples. Runs in: main."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from safeloader.report.datasets import is_stream, sample_name
from safeloader.report.fetch_times import fetch_times
from safeloader.report.folder import LoaderRecords

_PAUSE_NS = 60_000_000_000  # a gap between batches that is no part of the training


@dataclasses.dataclass(frozen=True)
class LoaderFigures:
    """What one loader of one process did.

    Attributes:
        attempt, rank, loader: which.
        state: as :attr:`LoaderRecords.state <safeloader.report.folder.LoaderRecords.state>`.
        batches, samples: how many it handed over, without what went for ``run_max_bytes``.
        span_s: from the first batch to the last, in seconds, without pauses of a minute or more.
        wait_s: how long the loop waited for them.
        epoch: the newest.
    """

    attempt: int
    rank: int
    loader: str
    state: str
    batches: int
    samples: int
    span_s: float
    wait_s: float
    epoch: int | None

    @property
    def wait_share(self) -> float | None:
        """The share of the time that the loop waited; None where nothing tells."""
        return min(1.0, self.wait_s / self.span_s) if self.span_s > 0 else None

    @property
    def samples_per_s(self) -> float | None:
        """Samples handed over a second; None where nothing tells."""
        return self.samples / self.span_s if self.span_s > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, that ``json.dumps`` takes."""
        more = {"wait_share": self.wait_share, "samples_per_s": self.samples_per_s}
        return dataclasses.asdict(self) | more


_TIMES = ["asked_ns", "wait_ns", "epoch", "indices"]


def figures_of(loader: LoaderRecords, since_ns: int | None = None) -> LoaderFigures:
    """The figures of a loader; of the newest batches alone, where ``since_ns`` says from when on.

    Args:
        loader: which.
        since_ns: in ns since 1970. The span then goes on until now, while the loader runs.
    """
    import pyarrow.compute as pc

    where = None if since_ns is None else pc.field("asked_ns") >= since_ns
    batches = samples = wait_ns = span_ns = 0
    first_ns = last_ns = 0
    epoch: int | None = None
    for table in loader.pieces(_TIMES, where, newest=since_ns is not None):
        asked = table["asked_ns"].to_numpy()
        waits = table["wait_ns"].to_numpy()
        ends = asked + waits
        edges = np.concatenate([[last_ns or asked[0]], ends])
        gaps = np.diff(edges)
        span_ns += int(gaps[(gaps > 0) & (gaps < np.maximum(_PAUSE_NS, 2 * waits))].sum())
        first_ns = first_ns or int(asked[0])
        last_ns = int(ends[-1])
        batches += table.num_rows
        samples += int(pc.sum(pc.list_value_length(table["indices"])).as_py() or 0)
        wait_ns += int(waits.sum())
        epoch = int(table["epoch"][-1].as_py())
    state = loader.state
    if since_ns is not None and state == "running" and last_ns:
        span_ns = max(span_ns, time.time_ns() - max(first_ns, since_ns))
    return LoaderFigures(
        *(loader.attempt, loader.rank, loader.name, state, batches, samples),
        span_ns / 1e9,
        wait_ns / 1e9,
        epoch,
    )


@dataclasses.dataclass(frozen=True)
class SlowSample:
    """A sample that took long to fetch.

    Attributes:
        loader: its name and line.
        index: of the dataset; of a stream the ordinal, and whose, as a text.
        median_ns: of its fetches, over epochs and ranks.
        fetches: how many there were.
        source: where it comes from, as far as that was kept.
    """

    loader: str
    index: Any
    median_ns: float
    fetches: int
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, that ``json.dumps`` takes."""
        return dataclasses.asdict(self)


def slowest(loaders: Iterable[LoaderRecords], most: int = 10) -> list[SlowSample]:
    """The samples that are slowest by the median of all their fetches, slowest first."""
    by_name: dict[str, list[LoaderRecords]] = {}
    for each in loaders:
        by_name.setdefault(each.name, []).append(each)
    found: list[SlowSample] = []
    for name, its in by_name.items():
        samples = sum(epoch.samples for each in its for epoch in each.totals().values())
        stream = is_stream(its)
        slow = fetch_times(its, samples, most, stream=stream).slowest
        sources: dict[Any, str] = {}
        for loader in its if not stream else ():
            sources |= loader.sources_of({each.index for each in slow})
        found += [
            SlowSample(
                name,
                each.index if each.worker is None else sample_name(each),
                each.median_ns,
                each.times,
                sources.get(each.index, ""),
            )
            for each in slow
        ]
    return sorted(found, key=lambda each: -each.median_ns)[:most]


def memory_of(loader: LoaderRecords) -> dict[str, int | None]:
    """The newest memory in bytes: ``main`` (resident), ``workers`` (proportional, of all)."""
    table = loader.workers()
    if not table.num_rows:
        return {"main": None, "workers": None}
    rows = table.select(["time_ns", "worker", "rss_bytes", "pss_bytes"]).to_pylist()
    newest = [row for row in rows if row["time_ns"] == rows[-1]["time_ns"]]
    mains = [row["rss_bytes"] for row in newest if row["worker"] < 0 and row["rss_bytes"] > 0]
    workers = [
        row["pss_bytes"] if row["pss_bytes"] > 0 else row["rss_bytes"]
        for row in newest
        if row["worker"] >= 0 and max(row["pss_bytes"], row["rss_bytes"]) > 0
    ]
    return {"main": mains[0] if mains else None, "workers": sum(workers) if workers else None}
