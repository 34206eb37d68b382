"""What a report tells of each dataset of a run: its loaders by their name. Runs in: main."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from safeloader.report.bottleneck import Bottleneck, bottleneck_of
from safeloader.report.fetch_times import FetchTimes, SlowSample, fetch_times
from safeloader.report.folder import LoaderRecords
from safeloader.report.records import epochs_of
from safeloader.report.run import RunFolder
from safeloader.report.waiting import LoaderWaiting, Waiting

SLOWEST = 10_000  # samples of each dataset


@dataclasses.dataclass
class Dataset:
    """What is told of the loaders of one name.

    Attributes:
        name: of the loaders: their class and the line that first iterated them.
        loaders: these, on all ranks and attempts.
        times: of the fetches.
        bottleneck: what their waiting comes to.
        sources: where the slowest samples come from.
        stream: whether indices are ordinals of a stream.
    """

    name: str
    loaders: list[LoaderWaiting]
    times: FetchTimes
    bottleneck: Bottleneck
    sources: dict[Any, str]
    stream: bool


def is_stream(loaders: Iterable[LoaderRecords]) -> bool:
    """Whether the indices of loaders of one name are ordinals, each worker's its own."""
    its = list(loaders)
    audits = [each.audit for loader in its for each in epochs_of(loader) if each.audit]
    if audits:
        return any(audit.get("stream") for audit in audits)
    return all(each.info.get("length") is None for each in its)


def datasets_of(run: RunFolder, waiting: Waiting) -> list[Dataset]:
    """The datasets of a run, first the one whose steps took longest."""
    by_name: dict[str, list[LoaderWaiting]] = {}
    for each in waiting.loaders:
        by_name.setdefault(each.records.name, []).append(each)
    found = []
    for name, loaders in by_name.items():
        records = [each.records for each in loaders]
        samples, stream = sum(each.samples for each in loaders), is_stream(records)
        times = fetch_times(records, samples, SLOWEST, stream=stream)
        wanted = {each.index for each in times.slowest}
        sources: dict[Any, str] = {}
        for known in run.loaders:
            if known.name == name and not stream:
                sources |= known.sources_of(wanted)
        judged = bottleneck_of(name, loaders, times)
        found.append(Dataset(name, loaders, times, judged, sources, stream))
    return sorted(found, key=weight, reverse=True)


def weight(dataset: Dataset) -> float:
    """How much of the program's time a loader's steps took."""
    return dataset.bottleneck.waited_s + dataset.bottleneck.computed_s


def sample_name(found: SlowSample) -> str:
    """A sample as the page names it."""
    if found.worker is None:
        return str(found.index)
    where = "main" if found.worker < 0 else f"worker {found.worker}"
    return f"{found.index} of {where}, rank {found.rank}"


def bare(source: str) -> str:
    """A source without the words that stand before it in a message."""
    return source.removeprefix("source of the sample: ")


def plain_index(index: Any) -> int | str | None:
    """An index as it can be counted and looked up: of a stream it is a pair, a list in JSON."""
    return index if index is None or isinstance(index, int | str) else str(index)
