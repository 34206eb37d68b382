"""Slots that outlive their workers, and serve the next ones. Runs in: both.

::

    epoch k:   worker ── writes ──► slot ──► main          the workers end, and nothing refers to it
                                      │
                                    parked, mapped in main, for half a minute at most
                                      │  fork: the next workers inherit the mapping
    epoch k+1: worker ── writes ──► slot ──► main

The pages of a fresh slot are made, zeroed and mapped on both sides: for short epochs of large
batches that takes longer than all else. Only what nothing refers to is parked, only where no
process was forked while something did, and only under fork: by no other way does a mapping reach a
worker. Each worker lets go of what is not its own as it starts.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable
from typing import Any

from safeloader.transport.shared_memory import punched
from safeloader.transport.slot_reader import Unpacker
from safeloader.transport.slot_table import SlotTable

REST_S = 30.0  # without use
_WORTH_BYTES = 1 << 24  # less than that may stay until the loader goes

Parked = dict[tuple[int, int], Any]  # by worker and number: the memory of a slot


class ParkedSlots:
    """The slots of one loader, between the workers of one epoch and those of the next."""

    _timer: threading.Timer | None = None

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a signal handler may iterate the loader
        self._last: tuple[Unpacker, list[Any]] | None = None

    def started(self, unpacker: Unpacker, processes: Iterable[Any]) -> None:
        """Workers started whose slots may serve others when they have ended.

        Held, and not weakly: torch lets go of a worker that it asked to terminate, which may yet
        write to its slots.
        """
        self._last = unpacker, list(processes)

    def rest(self) -> None:
        """The workers end: what is not used within half a minute goes."""
        self._stop()
        last = self._last
        if last is None or last[0].mapped_bytes() < _WORTH_BYTES or self._pid != os.getpid():
            return
        self._timer = threading.Timer(REST_S, _expired, [weakref.ref(self)])
        self._timer.name = "safeloader's parked slots"
        self._timer.daemon = True
        self._timer.start()

    def take(self, table: SlotTable) -> Parked:
        """Give what is parked to the workers of ``table``, which have yet to be forked."""
        self._stop()
        taken: Parked = {}
        numbers = [0] * table.workers
        for (worker, _), memory in sorted(self._parted().items(), key=lambda each: each[0]):
            worker %= table.workers
            if numbers[worker] < table.slots:
                taken[worker, numbers[worker]] = memory
                numbers[worker] += 1
        return taken

    def drop(self) -> None:
        """Let go of what is parked."""
        for memory in self._parted().values():
            punched(memory)

    def _parted(self) -> Parked:
        """What is parked, and is so no longer; nothing where its workers have not ended."""
        if (
            self._pid != os.getpid()
        ):  # forked: these are the parent's, and its thread may be in here
            self._begin()
        with self._lock:
            last, self._last = self._last, None
        if last is None or any(each.is_alive() for each in last[1]):
            return {}
        return last[0].parted()

    def _stop(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def __del__(self) -> None:
        self._stop()


def _expired(parked: weakref.ref[ParkedSlots]) -> None:
    known = parked()
    if known is not None:
        known.drop()
