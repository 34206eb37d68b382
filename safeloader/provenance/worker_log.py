"""What main and the workers use, every few seconds: ``workers.arrows``. Runs in: main.

Workers tell of their memory in the flight recorder; of CPU time the kernel is asked, of the work
done the batches. Rows become rarer as a run grows old: a day of it is a few MB.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from safeloader.introspect.resources import resident_bytes
from safeloader.provenance.open_folder import OpenFolder
from safeloader.provenance.run_format import FIXED, Batches

NAME = "workers.arrows"
FIRST_NS = 1_500_000_000  # workers tell of their memory after a second
_EVERY_NS = 5_000_000_000
_OF_ELAPSED = 0.01  # the pause grows with the run
_MOST_NS = 60_000_000_000
_WORKER, _WAIT, _START, _COLLATE = (
    FIXED.index(name) for name in ("worker", "wait_ns", "start_ns", "collate_ns")
)


@functools.cache
def worker_schema() -> Any:
    """The columns: a row for each process each time.

    ``worker`` is -1 in main; sizes are -1 where they are not known. ``cpu_ns``, ``busy_ns``,
    ``wait_ns``, ``batches`` and ``samples`` count from the beginning: a worker is busy while it
    fetches and collates, and waits else; main waits for batches.
    """
    import pyarrow as pa

    wide = ("rss_bytes", "pss_bytes", "uss_bytes", "cpu_ns", "busy_ns", "wait_ns")
    return pa.schema(
        [
            ("time_ns", pa.int64()),
            ("worker", pa.int16()),
            ("pid", pa.int32()),
            *((name, pa.int64()) for name in wide),
            ("batches", pa.int64()),
            ("samples", pa.int64()),
        ]
    )


class WorkerLog:
    """The rows of one loader.

    Attributes:
        flight: gives the flight recorder of the workers there are now; None where there is none.
    """

    def __init__(self, folder: OpenFolder) -> None:
        self._folder = folder
        self.flight: Callable[[], Any] = lambda: None
        self._done: dict[int, list[int]] = {}  # of a worker: busy ns, batches, samples
        self._since: dict[int, int] = {}
        self._waited = 0
        self._began_ns = self._due_ns = 0

    def note(self, batches: Batches, now_ns: int, at_once: bool = False) -> bool:
        """Count what was made, and write rows if it is time, or ``at_once``; whether it did.

        Raises:
            OSError: if they cannot be written.
        """
        if len(batches.sizes):
            self._count(batches)
        if not self._began_ns:
            self._began_ns = now_ns
            self._due_ns = now_ns + FIRST_NS
        if now_ns < self._due_ns and not at_once:
            return False
        pause = max(_EVERY_NS, min(_MOST_NS, int((now_ns - self._began_ns) * _OF_ELAPSED)))
        self._due_ns = now_ns + pause
        self._write(now_ns)
        return True

    def _count(self, batches: Batches) -> None:
        self._waited += int(batches.fixed[:, _WAIT].sum())
        some = np.flatnonzero(batches.sizes)
        busy = batches.fixed[:, _COLLATE].astype(np.float64)
        if some.size:
            firsts = np.cumsum(batches.sizes)[some] - batches.sizes[some]
            busy[some] += np.add.reduceat(batches.fetch_ns, firsts)
        rows = batches.fixed[:, _WORKER] + 1  # -1: main
        sums = [
            np.bincount(rows, weights=each).astype(np.int64)
            for each in (busy, np.ones(len(rows)), batches.sizes)
        ]
        for row in np.flatnonzero(sums[1]).tolist():
            done = self._done.setdefault(row - 1, [0, 0, 0])
            if row - 1 not in self._since:
                self._since[row - 1] = int(batches.fixed[rows == row, _START].min())
            for k in range(3):
                done[k] += int(sums[k][row])

    def _write(self, now_ns: int) -> None:
        import pyarrow as pa

        rows = [(-1, os.getpid(), resident_bytes() or -1, -1, -1)]
        flight = self.flight()
        for worker in range(0 if flight is None else flight.workers):
            row = flight.read(worker)
            if row.pid:
                rows.append((worker, row.pid, *row.memory_last))
        schema, moment = worker_schema(), time.time_ns()
        columns: list[list[int]] = [[] for _ in schema]
        for worker, pid, *memory in rows:
            busy, count, samples = self._done.get(worker, (0, 0, 0))
            if worker < 0:
                waited = self._waited
                count = sum(each[1] for each in self._done.values())
                samples = sum(each[2] for each in self._done.values())
            else:
                waited = max(0, moment - self._since.get(worker, moment) - busy)
            whole = (moment, worker, pid, *memory, _cpu_ns(pid), busy, waited, count, samples)
            for column, value in zip(columns, whole, strict=True):
                column.append(value)
        arrays = [pa.array(each, field.type) for each, field in zip(columns, schema, strict=True)]
        piece = pa.RecordBatch.from_arrays(arrays, schema=schema).serialize()
        head = [] if self._folder.has_made(NAME) else [memoryview(schema.serialize())]
        self._folder.append(NAME, *head, memoryview(piece))


def _cpu_ns(pid: int) -> int:
    """CPU time that a process has used; -1 where that is not known."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        used = psutil.Process(pid).cpu_times()
        return int((used.user + used.system) * 1e9)
    return -1
