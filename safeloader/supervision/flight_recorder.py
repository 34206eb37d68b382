"""Where each worker is, in shared memory that outlives it. Runs in: both.

::

    worker: one cell for each change of phase, one for each sample ──► memory ──► main: read(worker)

A worker that was killed, or hangs, can say nothing any more. What it was doing stands here: the
batch, the phase, and the time stamps of the samples it had fetched. The worker takes the stamps
that travel with a batch in this memory to begin with, so noting the position costs nothing beyond
them. Main reads only when something went wrong; the draws turn (batch, position) into an index.

The memory is one anonymous file (``memfd``; elsewhere an unlinked temporary one) that goes to
workers under every start method. Behind the numbers lies room for the Python stacks that
``faulthandler`` writes when a worker crashes, or when main asks a stuck one for it, and for what
the worker reports of itself (:mod:`~safeloader.supervision.self_report`).
"""

from __future__ import annotations

import os
from typing import NamedTuple

from safeloader.introspect.resources import or_none
from safeloader.transport.shared_memory import SharedCells

STAMPS_MAX = 4094  # stamps of a batch that have room in shared memory; larger ones are counted
STACK_BYTES = 1 << 20  # room for a worker's stacks: sparse, so it costs nothing until it is written
REPORT_BYTES = 1 << 16  # room for what it reports of itself

# A worker's row, in cells of int64; the stamps follow.
PHASE, SEQ, SINCE, PID, SIGNAL, COUNTED, ORDINAL = range(7)
REPORTED = 7  # how often it has written its report, times two; odd while it is writing
MEMORY = 8  # six cells: rss, pss, uss at the start, then as last sampled; bytes
READY = 14  # when its set-up was done
STAMPS = 16
ROW = STAMPS + STAMPS_MAX + 2  # a stamp before the first sample, and one after collation
_SHARED = 16  # cells at the head that belong to no worker; the first: the workers are to end

PHASES = ("starting", "init", "open", "idle", "fetch", "fetch at once", "collate", "send")
STARTING, INIT, OPEN, IDLE, FETCH, FETCH_AT_ONCE, COLLATE, SEND = range(len(PHASES))


class FlightRow(NamedTuple):
    """Where a worker is, or was when it died.

    Attributes:
        phase: one of ``PHASES``; "starting" until our set-up ran in the worker; "unknown" where
            there is no flight recorder.
        seq: number of the draw it is at; None before the first.
        position: how many samples of the batch were fetched: the position of the one it is at.
            None where the dataset fetches a whole batch at once.
        ordinal: number in its stream of the batch's first sample.
        since_ns: when it came there, by ``time.perf_counter_ns``; 0 if it never said so.
        began_ns: when it began to fetch its batch; 0 where it fetches none by single samples.
        pid: 0 if it never said so.
        signal: the signal that makes it write its stack; 0 while it cannot.
        memory_first: resident, proportional and unique set size after its start, bytes; -1 unknown.
        memory_last: the same as last sampled.
    """

    phase: str = "unknown"
    seq: int | None = None
    position: int | None = None
    ordinal: int = 0
    since_ns: int = 0
    began_ns: int = 0
    pid: int = 0
    signal: int = 0
    memory_first: tuple[int, int, int] = (-1, -1, -1)
    memory_last: tuple[int, int, int] = (-1, -1, -1)

    @property
    def grown_bytes(self) -> int:
        """How much its resident memory grew since its start."""
        before, after = self.memory_first[0], self.memory_last[0]
        return max(0, after - before) if min(before, after) > 0 else 0


class FlightRecorder(SharedCells):
    """One row a worker, each written by that worker alone. Pickles to workers only.

    Raises:
        OSError: where no anonymous file can be had, or it cannot be mapped.
    """

    def __init__(self, workers: int) -> None:
        super().__init__(_SHARED + workers * ROW, workers * (STACK_BYTES + REPORT_BYTES))
        self._workers = workers

    @property
    def workers(self) -> int:
        """How many rows there are."""
        return self._workers

    # in a worker ────────────────────────────────────────────────────────────────────────────────

    def row(self, worker: int) -> memoryview:
        """The cells that ``worker`` writes."""
        at = _SHARED + worker * ROW
        return self._cells[at : at + ROW]

    @or_none
    def open_stacks(self, worker: int) -> int | None:
        """A file descriptor that writes to this worker's room for stacks; None without /proc."""
        fd = os.open(f"/proc/self/fd/{self._fd}", os.O_WRONLY | os.O_CLOEXEC)
        os.lseek(fd, self._stacks_at(worker), os.SEEK_SET)
        return fd

    def write_report(self, worker: int, report: bytes) -> bool:
        """Put a worker's report in the place of its last one; False if there is no room for it."""
        if len(report) > REPORT_BYTES - 8:
            return False
        row = self.row(worker)
        row[REPORTED] += 1
        whole = len(report).to_bytes(8, "little") + report
        written = os.pwrite(self._fd, whole, self._report_at(worker)) == len(whole)
        row[REPORTED] += 1
        return written

    def is_set(self) -> bool:
        """Whether main wants the workers to end: torch takes this for its ``Event``."""
        return bool(self._cells[0])

    # in main ────────────────────────────────────────────────────────────────────────────────────

    def set(self) -> None:
        """Have the workers end, as by torch's ``Event``.

        An event takes a lock to be read, and a worker killed just then would keep it: main could
        never set the event again.
        """
        self._cells[0] = 1

    def read(self, worker: int) -> FlightRow:
        """Where ``worker`` is."""
        row = self.row(worker)
        at = row[PHASE]
        phase = PHASES[at if STARTING <= at <= SEND else STARTING]  # a library may have run wild
        position: int | None = None
        since = row[SINCE]
        if at in (FETCH, COLLATE):
            position = max(0, row[COUNTED]) or _stamps_since(row)
            if row[STAMPS]:
                since = max(since, row[STAMPS + min(position, STAMPS_MAX)])
        return FlightRow(
            phase=phase,
            seq=row[SEQ] if IDLE < at <= SEND else None,
            position=position if phase == "fetch" else None,
            ordinal=row[ORDINAL],
            since_ns=since,
            began_ns=row[STAMPS] if phase == "fetch" else 0,
            pid=row[PID],
            signal=row[SIGNAL],
            memory_first=(row[MEMORY], row[MEMORY + 1], row[MEMORY + 2]),
            memory_last=(row[MEMORY + 3], row[MEMORY + 4], row[MEMORY + 5]),
        )

    def memory(self) -> int | None:
        """What the workers hold together in bytes, of pages shared with others their share.

        None until each has said so, which it does a second after its start.
        """
        sizes = [self.row(worker)[MEMORY + 4] for worker in range(self._workers)]
        return sum(sizes) if min(sizes) > 0 else None

    def reported(self, worker: int) -> int:
        """How often ``worker`` has written a report, times two."""
        return int(self.row(worker)[REPORTED])

    def report(self, worker: int) -> bytes | None:
        """What ``worker`` wrote last; None before that, and while it is writing."""
        before = self.reported(worker)
        if before == 0 or before % 2:
            return None
        raw = os.pread(self._fd, REPORT_BYTES, self._report_at(worker))
        size = int.from_bytes(raw[:8], "little")
        return raw[8 : 8 + size] if self.reported(worker) == before else None

    def ready_ns(self, worker: int) -> int:
        """When ``worker`` was ready for its first task; 0 while it is not."""
        return int(self.row(worker)[READY])

    def stacks(self, worker: int, *, after: int = 0) -> str:
        """What ``faulthandler`` wrote for ``worker``, from byte ``after`` on."""
        raw = os.pread(self._fd, STACK_BYTES - after, self._stacks_at(worker) + after)
        return raw.split(b"\0", 1)[0].decode("utf-8", "replace")

    def _stacks_at(self, worker: int) -> int:
        return self._mapped_bytes + worker * STACK_BYTES

    def _report_at(self, worker: int) -> int:
        return self._mapped_bytes + self._workers * STACK_BYTES + worker * REPORT_BYTES


def _stamps_since(row: memoryview) -> int:
    """How many samples of the running batch are stamped: older stamps are an earlier batch's."""
    began = row[STAMPS]
    count = 0
    while count < STAMPS_MAX and row[STAMPS + 1 + count] >= began > 0:
        count += 1
    return count
