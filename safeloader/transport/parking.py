"""Slots that outlive their workers, and serve the next ones. Runs in: main.

::

    epoch k:   worker ── writes ──► slot ──► main          the workers end, and nothing refers to it
                                      │
                                    parked, mapped in main, for half a minute at most
                                      │  fork: the next workers inherit the mapping
    epoch k+1: worker ── writes ──► slot ──► main

The pages of a fresh slot are made, zeroed and mapped on both sides: for short epochs of large
batches that takes longer than all else. Only what nothing refers to is parked, only where no
process was forked while something did, and only under fork: by no other way does a mapping reach a
worker. A worker lets go of what is not its own as it starts, of other loaders' slots too,
as does any other child.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

from safeloader._python import at_fork
from safeloader.transport.shared_memory import punched
from safeloader.transport.slot_reader import Unpacker
from safeloader.transport.slot_table import Parked, SlotTable

REST_S = 30.0  # without use
_WORTH_BYTES = 1 << 24  # less than that is not parked: it is made anew as fast
_SLOTS_OF_A_WORKER = 4  # the others of a loop that keeps its batches go with these


class ParkedSlots:
    """The slots of one loader, between the workers of one epoch and those of the next."""

    def __init__(self) -> None:
        self._begin()
        _known.add(weakref.ref(self, _known.discard))

    def _begin(self) -> None:
        self._until: float | None = None  # when what is parked goes
        self._timer: threading.Timer | None = None
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a signal handler may iterate the loader
        self._last: tuple[Unpacker, list[Any]] | None = None

    def started(self, unpacker: Unpacker, processes: Iterable[Any]) -> None:
        """Workers started whose slots may serve others when they have ended.

        Held, and not weakly: torch lets go of a worker that it asked to terminate, which may yet
        write to its slots.
        """
        self._last = unpacker, list(processes)

    def rest(self, unpacker: Unpacker) -> None:
        """The workers of ``unpacker`` end: what is not used within half a minute goes.

        Of the workers that started last alone: others, of an iterator at once with theirs, may end
        while those are at work.
        """
        if self._pid != os.getpid():
            return
        with self._lock:
            last = self._last
            if last is None or last[0] is not unpacker:
                return
            unpacker.keep(_SLOTS_OF_A_WORKER * len(last[1]))
            if unpacker.mapped_bytes() < _WORTH_BYTES:
                self._last = None
                return
        self._until = monotonic() + REST_S
        self.pause()
        self.resume()

    def pause(self) -> None:
        """End the thread that waits for the half minute: Python warns of a fork beside one."""
        if self._pid != os.getpid():
            return
        with self._lock:
            timer = self._timer
            if timer is not None:
                timer.cancel()
            self._timer = None
        if timer not in (None, threading.current_thread()) and timer.is_alive():
            timer.join(1.0)

    def resume(self) -> None:
        """Wait on for the end of the half minute."""
        if self._pid != os.getpid():
            return
        with self._lock:  # as others fork, their thread resumes this too: one thread is enough
            if self._until is None or self._timer is not None:
                return
            left = max(0.0, self._until - monotonic())
            timer = threading.Timer(left, _expired, [weakref.ref(self)])
            timer.name = "safeloader's parked slots"
            timer.daemon = True
            self._timer = timer
            try:
                timer.start()
                return
            except BaseException as exc:  # an interrupt too: none is left behind that nobody knows
                timer.cancel()
                self._timer = self._until = None
                if not isinstance(exc, RuntimeError):
                    raise
            # There are too many threads: nobody would see to it that they go.
        self.drop()

    def take(self, table: SlotTable) -> Parked:
        """Give what is parked to the workers of ``table``, which have yet to be forked."""
        self._until = None
        self.pause()
        taken: Parked = {}
        numbers = [0] * table.workers
        for (worker, _), memory in sorted(self._parted().items(), key=lambda each: each[0]):
            worker %= table.workers
            if numbers[worker] < table.slots:
                taken[worker, numbers[worker]] = memory
                numbers[worker] += 1
        return taken

    def drop(self) -> None:
        """Let go of what is parked; of slots whose workers are at work, never."""
        if self._pid == os.getpid():
            for memory in self._parted().values():
                punched(memory)

    def expire(self) -> None:
        """The half minute is over; where workers have not ended yet, another one begins."""
        with self._lock:
            if self._timer is not threading.current_thread():  # it was to end, and is late
                return
        self.drop()
        with self._lock:
            self._timer = None
            if self._until is not None:
                self._until = None if self._last is None else monotonic() + REST_S
        self.resume()

    def forget(self) -> None:
        """In a process that was forked: they are the parent's, whose thread may be in here."""
        self._begin()

    def _parted(self) -> Parked:
        """What is parked, and is so no longer; nothing where its workers have not ended."""
        if self._pid != os.getpid():  # forked in C
            self.forget()
        with self._lock:
            last = self._last
            if last is None or any(each.is_alive() for each in last[1]):
                return {}
            self._last = None
            return last[0].parted()

    def __del__(self) -> None:
        with suppress(Exception):  # at interpreter exit anything may be gone already
            self.pause()
            self.drop()


_known: set[weakref.ref[ParkedSlots]] = set()


def _all() -> list[ParkedSlots]:
    # By a copy made in C: a WeakSet raises where another thread makes a loader meanwhile.
    return [each for known in list(_known) if (each := known()) is not None]


def drop_parked() -> None:
    """Let go of what any loader of this process has parked: the memory is wanted."""
    for each in _all():
        each.drop()


@contextmanager
def forking() -> Iterator[None]:
    """While workers are forked: no thread of these runs beside."""
    paused = _all()
    try:
        for each in paused:
            each.pause()
        yield
    finally:
        for each in paused:
            each.resume()


def _in_child() -> None:
    """Unmap what was inherited: a child that lives for long would keep the pages of all that goes.

    The slots of a pool at work, and those that the next workers are forked for, are held elsewhere.
    """
    for each in _all():
        each.forget()


at_fork(after_in_child=_in_child)


def _expired(parked: weakref.ref[ParkedSlots]) -> None:
    known = parked()
    if known is not None:
        known.expire()
