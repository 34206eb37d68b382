"""A worker's own slots: taken for a batch, lent with it, taken again. Runs in: worker."""

from __future__ import annotations

import ctypes
import os
from bisect import insort
from collections.abc import Iterable
from functools import partial
from operator import attrgetter, setitem
from typing import Any

import numpy as np

from safeloader._python import at_fork
from safeloader._torch import forget, is_gone
from safeloader.transport.forks import forks_noticed
from safeloader.transport.shared_memory import anonymous_file, mapped, populated, punched
from safeloader.transport.slot_table import (
    FORKED,
    FREE,
    GONE,
    HOLDS,
    LENT,
    MAY_HOLD,
    UNUSED,
    Parked,
    SlotTable,
)

_ALIGNED = 64  # a cache line
SMALLEST = 1 << 16
_IDLE_BATCHES = 256  # a slot that so many batches did without is given up
_LOOK_EVERY = 8
_POPULATED = 1 << 20  # bytes from which on pages are mapped at once
_SPARE = 1 << 25  # bytes of slots for temporaries alone that are kept for the next batch

Piece = tuple[int, int, int]  # first byte, the one behind, a weak reference to whose; 0: a copy


class NoRoom(Exception):
    """No slot can take any more; its text says why."""


class Slot:
    """A slot, seen by the worker that writes it.

    A tensor in it is in use for as long as its storage exists. That is longer than its memory is
    referred to: torch can give a storage other memory, and arrays over the former keep the storage.

    Attributes:
        number: its cell in the table.
        size: in bytes.
        memory: where it is mapped here; given where it served a worker that ended.
        address: of that.
        is_new: whether nothing was written to it here.
        served: whether a worker that ended wrote to it.
        fd: for main to map it by; -1 once that was sent.
        place: in the batch that is being pickled; None while the slot is not sent with it.
        free_since: number of the batch at which it was found free; None while it is in use.
    """

    def __init__(self, number: int, size: int, memory: Any = None) -> None:
        self.number = number
        self.size = size
        self.fd = -1
        self.is_new = True
        self.served = memory is not None
        self.memory = memory
        if memory is None:
            self.fd = anonymous_file(size)
            try:
                self.memory = mapped(self.fd, size)
            except BaseException:
                os.close(self.fd)
                raise
        self.address = ctypes.addressof(self.memory)
        self.place: int | None = None
        self.free_since: int | None = None
        self._forks: int | None = None  # noticed before the first tensor of these was there
        self._pieces: list[Piece] = []  # in order; those that are not last may be gone already

    def add(self, at: int, size: int, storage: int = 0) -> None:
        """These bytes are in use: by a tensor, or until :meth:`drop_copies` by a copy."""
        if storage and self._forks is None:  # nobody but main is told where a copy lies
            self._forks = forks_noticed()
        insort(self._pieces, (at, at + size, storage))  # no two begin with the same byte

    def drop_copies(self) -> None:
        """The batch was sent, or will not be: its copies are not in use any more."""
        self._pieces = [piece for piece in self._pieces if piece[2]]

    def filled(self) -> int:
        """Up to which byte it is in use; 0 if nothing here refers to it. Hot path."""
        pieces = self._pieces
        while pieces:
            _, end, storage = pieces[-1]
            if not (storage and is_gone(storage)):
                return end
            pieces.pop()
            forget(storage)
        return 0

    def used(self) -> int:
        """How many bytes are in use."""
        gone = {storage for _, _, storage in self._pieces if storage and is_gone(storage)}
        # First out of the list: an interrupt may leave one unfreed, and have none freed twice.
        self._pieces = [piece for piece in self._pieces if piece[2] not in gone]
        for storage in gone:
            forget(storage)
        return sum(end - at for at, end, _ in self._pieces)

    def room(self, size: int) -> int | None:
        """Where ``size`` bytes fit: at the end, else between others; None if nowhere. Hot path."""
        if self._forks is not None and self._forks != forks_noticed():
            return None  # a child may still have what is gone here
        at = _aligned(self.filled())
        if at + size <= self.size:
            return at
        self.used()
        at = 0
        for start, end, _ in self._pieces:
            if at + size <= start:
                return at
            at = _aligned(end)
        return None

    def was_forked(self) -> bool:
        """Whether a process was forked while something here referred to it, or just after.

        Asked once nothing does: further forks do not concern it.
        """
        forks, self._forks = self._forks, None
        return forks is not None and forks != forks_noticed(look=True)


class SlotPool:
    """The slots of one worker.

    Args:
        table: the states of all slots.
        worker: whose slots these are.
        parked: slots that served workers which ended, this worker's own among them.

    Attributes:
        given_up: slots that main has mapped and is to let go of; told with the next batch.
    """

    def __init__(self, table: SlotTable, worker: int, parked: Parked | None = None) -> None:
        self._states = np.frombuffer(table.row(worker), np.int64)
        self._share = table.share(worker)
        self._slots: dict[int, Slot] = {}
        self._top = 0  # above the highest number in use
        self._number = 0
        self._forks = forks_noticed()
        self.given_up: list[int] = []
        for (whose, number), memory in (parked or {}).items():
            if whose == worker:
                self._slots[number] = Slot(number, len(memory), memory)
                self._top = max(self._top, number + 1)

    def tell_of_forks(self) -> None:
        """From now on main knows when this process forks."""
        # In C, as the hooks in `forks` are. Of a fork made in C it is told by the next batch.
        at_fork(before=partial(setitem, self._share, FORKED, 1))

    def begin(self) -> None:
        """A batch begins; hot path."""
        self._number += 1
        if self._number % _LOOK_EVERY:
            return
        # Idle is counted from when it was found free: one that was kept for long is as good as any.
        for slot in self._free():
            if slot.free_since is None:
                slot.free_since = self._number
            idle = slot.free_since + _IDLE_BATCHES < self._number
            if idle or self._share[HOLDS] > self._share[MAY_HOLD]:
                self._give_up(slot)

    def lend(self, slots: Iterable[Slot]) -> list[int]:
        """A batch is sent: its slots are main's now, and it knows those given up.

        Gives the descriptors of the slots that are new to main.
        """
        fresh = []
        if self._slots and self._forks != forks_noticed(look=True):
            self._share[FORKED] = 1
        for slot in slots:
            self._states[slot.number] = LENT
            if slot.fd >= 0:
                fresh.append(slot.fd)
                slot.fd = -1
        if self.given_up:
            self._states[self.given_up] = UNUSED
            self.given_up = []
        return fresh

    def take(self, size: int) -> Slot:
        """A slot that nothing refers to, of ``size`` bytes at least.

        Raises:
            NoRoom: if there is none, and none can be made.
        """
        fitting = [slot for slot in self._free() if slot.size >= size]
        best = min(fitting, key=attrgetter("size"), default=None)
        # A small batch does not keep a large slot in use.
        if best is None or best.size > 2 * size + SMALLEST:
            try:
                best = self._make(_rounded(size))
            except NoRoom:
                if best is None or best.number not in self._slots:
                    raise
        best.free_since = None
        if best.is_new:
            best.is_new = False
            if size >= _POPULATED:
                populated(best.memory, size, filled=best.served)
        return best

    def _free(self) -> list[Slot]:
        """The slots that can be written to: nothing refers to what is in them, here or anywhere."""
        found = []
        for number in np.flatnonzero(self._states[: self._top] & 1).tolist():
            slot = self._slots[number]
            if slot.filled():
                continue
            if slot.was_forked() or self._states[number] == GONE:
                self._give_up(slot, is_read=True)
            else:
                found.append(slot)
        return found

    def _make(self, size: int) -> Slot:
        most = self._share[MAY_HOLD]
        if size > most:
            raise NoRoom(f"a batch needs more than the {most} bytes that a worker's slots may hold")
        # Before it is looked how many there may be: main lowers that, then looks.
        self._share[HOLDS] += size
        try:
            most = self._share[MAY_HOLD]
            if self._share[HOLDS] > most:
                free = self._free()  # which are too small, or too large
                if self._share[HOLDS] - sum(slot.size for slot in free) > most:
                    raise NoRoom(f"{most} bytes of slots hold batches that are in use")
                for slot in free:
                    self._give_up(slot)
            unused = np.flatnonzero(self._states == UNUSED)
            if not unused.size:
                slots = len(self._states)
                raise NoRoom(f"all {slots} slots of a worker hold batches that are in use")
            number = int(unused[0])
            try:
                slot = Slot(number, size)
            except (OSError, RuntimeError) as exc:
                why = str(exc).splitlines()[0]
                raise NoRoom(f"no further slot could be made: {why}") from None
        except BaseException:
            self._share[HOLDS] -= size
            raise
        self._slots[number] = slot
        self._top = max(self._top, number + 1)
        self._states[number] = FREE
        return slot

    def give_up_spare(self, slots: Iterable[Slot]) -> None:
        """Of slots that temporaries alone were in, give up what is too much to keep."""
        spare = 0
        for slot in sorted(slots, key=attrgetter("size")):
            if slot.fd >= 0 and self._slots.get(slot.number) is slot and not slot.filled():
                spare += slot.size
                if spare > _SPARE:
                    self._give_up(slot)

    def _give_up(self, slot: Slot, is_read: bool = False) -> None:
        del self._slots[slot.number]
        self._share[HOLDS] -= slot.size
        # A forked process may read on (`is_read`). Else nobody does, and whoever inherited the slot
        # from main would keep its pages; what main has not mapped yet goes by itself.
        if slot.fd < 0 and not is_read:
            punched(slot.memory)
        if slot.fd < 0:  # main has mapped it, and is told with the next batch: not to be used yet
            self._states[slot.number] = LENT
            self.given_up.append(slot.number)
        else:
            self._states[slot.number] = UNUSED
            os.close(slot.fd)
            slot.fd = -1


def _aligned(at: int) -> int:
    return -(-at // _ALIGNED) * _ALIGNED


def _rounded(size: int) -> int:
    """Up to an eighth more, so that batches of about one size fit into one another's slots."""
    step = max(SMALLEST, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step
