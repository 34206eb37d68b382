"""What a worker notes about itself: its stack, its memory. Runs in: worker.

A crash in C code ends the process at once; ``faulthandler`` writes the Python
stack from within the signal handler, into memory that main can still read. Main can
also ask a worker that hangs for its stack, by a signal that nobody else uses.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from time import perf_counter_ns as clock
from typing import Any

from safeloader.failures.failure import without_ours
from safeloader.introspect.resources import process_memory, resident_bytes
from safeloader.supervision.flight_recorder import (
    IDLE,
    MEMORY,
    PHASE,
    SIGNAL,
    SINCE,
    FlightRecorder,
)

_RESIDENT_EVERY_S = 0.1
_SHARED_EVERY_S = 1.0
_MEMORY_SHARE = 0.001  # of the time at most: the kernel takes 10 to 30 ms for each GiB


class WorkerMonitor:
    """Writes to the flight recorder what is not the fetcher's business."""

    def __init__(self, flight: FlightRecorder | None, worker: int, cells: memoryview) -> None:
        self._cells = cells
        self._stacks = None if flight is None else flight.open_stacks(worker)
        self.notes: Callable[[], None] = lambda: None  # is called after each message
        self._sampled_at = float("-inf")
        self._sample_shared_at = perf_counter() + _SHARED_EVERY_S
        for k in range(6):
            cells[MEMORY + k] = -1
        if self._stacks is not None:
            with suppress(Exception):  # no usable signal, or a program with a handler of its own
                cells[SIGNAL] = _write_stacks_to(self._stacks)

    def over(self, fetcher: Any) -> Any:
        """``fetcher``, with a note of what ends the process from inside a fetch."""
        fetch = fetcher.fetch

        def noted(task: Any) -> Any:
            with self:
                return fetch(task)

        fetcher.fetch = noted
        return fetcher

    def begins(self, phase: int) -> None:
        """Note what the worker does from now on, outside of its batches."""
        self._cells[SINCE] = clock()
        self._cells[PHASE] = phase

    def sent(self) -> None:
        """Something was sent, and the worker has nothing to do for now; hot path."""
        cells = self._cells
        cells[SINCE] = clock()
        cells[PHASE] = IDLE
        self.notes()
        now = perf_counter()
        if now - self._sampled_at > _RESIDENT_EVERY_S:
            try:
                self._sample_memory(now)
            except Exception:  # a figure less, and no dead worker
                self._sampled_at = float("inf")

    def _sample_memory(self, now: float) -> None:
        """The resident size, often; what is shared, which the kernel has to add up, less often."""
        cells = self._cells
        known: tuple[int | None, ...] = ()
        if now >= self._sample_shared_at:
            known = process_memory() or ()
            took = perf_counter() - now
            self._sample_shared_at = now + max(_SHARED_EVERY_S, took / _MEMORY_SHARE)
        for k, value in enumerate(known or (resident_bytes(),)):
            if value is not None:
                cells[MEMORY + 3 + k] = value
                if cells[MEMORY + k] < 0:
                    cells[MEMORY + k] = value
        self._sampled_at = now

    def private_bytes(self) -> int | None:
        """Private memory as last sampled; None if it was not yet."""
        private = self._cells[MEMORY + 5]
        return private if private > 0 else None

    def __enter__(self) -> None:
        """Watch what is done here: it may end this process."""

    def __exit__(self, _: object, raised: BaseException | None, frames: Any) -> None:
        """Leave the stack of what ends this process and is no error: an exit, an interrupt."""
        if self._stacks is None or raised is None or isinstance(raised, Exception):
            return
        users = without_ours(frames)
        text = "".join(traceback.format_exception(type(raised), raised, users))
        os.write(self._stacks, text.encode("utf-8", "replace"))


def _write_stacks_to(fd: int) -> int:
    """Have faults, and one signal, write the stacks of this process; that signal."""
    faulthandler.disable()  # one inherited from main has its handlers below torch's
    faulthandler.enable(file=fd, all_threads=True)
    for number in range(signal.SIGRTMAX - 1, signal.SIGRTMIN, -1):
        if signal.getsignal(number) is signal.SIG_DFL:
            faulthandler.register(number, file=fd, all_threads=True)
            return number
    return 0
