"""Where every sample comes from, for ``run_sources=True``: ``sources.parquet``. Runs in: main.

It is written once a run, by rank 0: an Arrow stream that grows in small slices of time while the
first epochs run, a twentieth of it at most, and becomes Parquet when all samples are in it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from safeloader.provenance.open_folder import OpenFolder
from safeloader.provenance.run_format import to_parquet_file

STREAM, WHOLE = "sources.arrows", "sources.parquet"
_SHARE = 0.05
_SLICE_NS = 500_000_000  # at most at once
_PIECE = 10_000


@functools.cache
def source_schema() -> Any:
    """The columns: ``index``, and its ``source``, which is empty where nothing tells."""
    import pyarrow as pa

    return pa.schema([("index", pa.int64()), ("source", pa.string())])


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

    def go_on(self, source_of: Callable[[Any], str]) -> None:
        """Write those for which there is time by now.

        Raises:
            OSError: if they cannot be written.
        """
        now_ns = time.perf_counter_ns()
        give_up = now_ns + min(_SLICE_NS, int((now_ns - self._since_ns) * _SHARE))
        while not self.is_whole and time.perf_counter_ns() < give_up:
            self._piece(source_of, give_up)
        self._since_ns = time.perf_counter_ns()

    def _piece(self, source_of: Callable[[Any], str], give_up: int) -> None:
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
        self._folder.append(STREAM, *head, memoryview(piece))
        if self.is_whole:
            to_parquet_file(self._folder.path, STREAM, WHOLE, compression="zstd")
