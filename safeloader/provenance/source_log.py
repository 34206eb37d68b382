"""Where samples come from, as their dataset tells. Runs in: main.

``sources.jsonl`` has those that somebody may ask for: failed, skipped or replaced, and the slowest.
``sources.parquet`` has all, for ``run_sources=True``, and is written once a run, by rank 0: an
Arrow stream that grows in small slices of time while the first epochs run, a twentieth of it at
most, and becomes Parquet when all samples are in it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from safeloader.introspect.texts import index_text
from safeloader.provenance.index_texts import fits, is_plain, stored_text, text_of_plain
from safeloader.provenance.open_folder import OpenFolder
from safeloader.provenance.run_format import (
    ALL_SOURCES,
    SOME_SOURCES,
    SOURCES_STREAM,
    Batches,
    source_schema,
    to_parquet_file,
)

SourceOf = Callable[[Any], str]

_SHARE = 0.05
_SLICE_NS = 500_000_000  # at most at once
_PIECE = 10_000

_AT_ONCE_NS = 50_000_000  # at most, for samples that failed or were left out
_MOST = 100_000  # lines
_SLOWEST, _SLOWEST_MOST = 100, 5_000  # at once, and in all: they are others each time
_OF_TIME, _WORTH_NS = 0.002, 1_000_000  # of what passed since the last time, for these


def plain(index: Any) -> int | str:
    """An index as the folder of a run has it: an int, or a text."""
    if isinstance(index, bool | np.integer):
        index = int(index)
    if fits(index):
        return int(index)
    return text_of_plain(index) if is_plain(index) else stored_text(index_text(index))


class SomeSources:
    """Those of one loader that somebody may ask for.

    Args:
        folder: where they are written.

    Attributes:
        source_of: says where a sample comes from; None while no epoch runs, since it leads to the
            epoch's accounts.
    """

    source_of: SourceOf | None = None

    def __init__(self, folder: OpenFolder) -> None:
        self._folder = folder
        self._known: set[Any] = set()
        self._times = np.empty(0, np.float32)  # of the slowest whose turn has not come
        self._indices = np.empty(0, np.int64)
        self._least = -1.0  # of a hundred of them
        self._since_ns = 0
        self._slow = 0  # how many of the slowest were looked up

    def note(self, indices: Sequence[Any], within_ns: int = _AT_ONCE_NS) -> None:
        """Write the sources of these, those for which there is time.

        Raises:
            OSError: if they cannot be written.
        """
        source_of = self.source_of
        if source_of is None or len(self._known) > _MOST:
            return
        give_up, lines = time.perf_counter_ns() + within_ns, []
        for each in indices:
            if each is None or (index := plain(each)) in self._known:
                continue
            self._known.add(index)
            if source := source_of(each):
                lines.append(json.dumps({"index": index, "source": source}) + "\n")
            if time.perf_counter_ns() > give_up:
                break
        if lines:
            self._folder.append(SOME_SOURCES, "".join(lines).encode())

    def note_slowest(self, batches: Batches) -> None:
        """Write the sources of the slowest samples, as far as there is time.

        Args:
            batches: what was flushed now.

        Raises:
            OSError: if they cannot be written.
        """
        if self.source_of is None or not len(batches.sizes) or self._slow >= _SLOWEST_MOST:
            return
        slow = np.flatnonzero(batches.fetch_ns > self._least)
        times = np.concatenate([self._times, batches.fetch_ns[slow]])
        indices = np.concatenate([self._indices, batches.indices[slow]])
        if len(times) > _SLOWEST:
            most = np.argpartition(times, -_SLOWEST)[-_SLOWEST:]
            times, indices = times[most], indices[most]
            self._least = float(times.min())
        now_ns = time.perf_counter_ns()
        within = int((now_ns - self._since_ns) * _OF_TIME)
        if self._since_ns and within < _WORTH_NS:
            self._times, self._indices = times, indices
            return
        self._since_ns, self._least = now_ns, -1.0
        self._times, self._indices = times[:0], indices[:0]
        slowest = indices[np.argsort(-times)]
        self._slow += len(slowest)
        self.note(slowest[slowest >= 0].tolist(), min(within, _AT_ONCE_NS))  # -1: it is no int


class SourceLog:
    """The sources of one loader's dataset.

    Args:
        folder: where they are written.
        length: of the dataset.
    """

    def __init__(self, folder: OpenFolder, length: int) -> None:
        self._folder, self._length = folder, length
        self._next = 0
        self._since_ns = time.perf_counter_ns()

    @property
    def is_whole(self) -> bool:
        """Whether all are written."""
        return self._next >= self._length

    def go_on(self, source_of: SourceOf) -> None:
        """Write those for which there is time by now.

        Raises:
            OSError: if they cannot be written.
        """
        now_ns = time.perf_counter_ns()
        give_up = now_ns + min(_SLICE_NS, int((now_ns - self._since_ns) * _SHARE))
        while not self.is_whole and time.perf_counter_ns() < give_up:
            self._piece(source_of, give_up)
        self._since_ns = time.perf_counter_ns()

    def _piece(self, source_of: SourceOf, give_up: int) -> None:
        import pyarrow as pa

        first, found = self._next, list[str]()
        for index in range(first, min(first + _PIECE, self._length)):
            found.append(source_of(index))
            if time.perf_counter_ns() > give_up:
                break
        self._next = first + len(found)
        indices = pa.array(range(first, self._next), pa.int64())
        arrays = [indices, pa.array(found, pa.string())]
        piece = pa.RecordBatch.from_arrays(arrays, schema=source_schema()).serialize()
        head = [] if first else [memoryview(source_schema().serialize())]
        self._folder.append(SOURCES_STREAM, *head, memoryview(piece))
        if self.is_whole:
            names = SOURCES_STREAM, ALL_SOURCES
            to_parquet_file(self._folder.path, *names, source_schema(), compression="zstd")
