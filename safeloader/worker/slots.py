"""A worker's own slots: taken for a batch, lent with it, taken again; runs in a worker."""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from collections import deque
from operator import attrgetter
from typing import Any

import numpy as np

from safeloader.wire.anonymous import anonymous_file, mapped
from safeloader.wire.slots import FREE, GONE, LENT, SLOTS, SLOTS_A_BATCH, SlotTable

_ALIGNED = 64  # a cache line
_SMALLEST = 1 << 16
_IDLE_BATCHES = 32  # a slot that so many batches did without is given up
_LOOK_EVERY = 8
_ROOMY = 4  # times as large as what is put into it: a slot that would better be given up
_size_of = attrgetter("size")


class NoRoom(Exception):
    """No slot can take any more; says why."""


class Slot:
    """A slot, seen by the worker that writes it.

    Attributes:
        number: its cell in the table.
        size: in bytes.
        address: where it is mapped here.
        fd: for main to map it by; -1 once that was sent.
        used: bytes of the running batch in it.
        batch: number of the last batch that was written to it.
        forked: a process was forked while something here referred to it.
    """

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.size = size
        self.fd = anonymous_file(size)
        try:
            self._memory = mapped(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise
        self.address = ctypes.addressof(self._memory)
        self.used = 0
        self.batch = 0
        self.forked = False
        self._lease: weakref.ref[Any] | None = None

    def lease(self) -> np.ndarray[Any, Any]:
        """The memory, for a batch: the slot is in use here for as long as it is referred to."""
        leased = np.ndarray(self.size, np.uint8, self._memory)
        self._lease = weakref.ref(leased)
        return leased

    @property
    def referred_to(self) -> bool:
        """Whether something here still refers to a batch in it."""
        return self._lease is not None and self._lease() is not None

    def close(self) -> None:
        """Let go of the descriptor; the memory goes when nothing refers to it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class SlotPool:
    """The slots of one worker.

    Args:
        table: the states of all slots.
        worker: whose slots these are.
    """

    def __init__(self, table: SlotTable, worker: int) -> None:
        self._cells = table.row(worker)
        self._most_bytes = table.most_bytes
        self._slots: dict[int, Slot] = {}
        self._held_bytes = 0
        self._sizes: deque[int] = deque([0], maxlen=_IDLE_BATCHES)  # of the newest batches
        self._expected = 0
        self._number = 0
        self._given_up: list[int] = []
        self.batch: list[Slot] = []  # those that the running batch lies in
        self._leases: list[Any] = []
        _pools.add(self)

    def begin(self) -> None:
        """A batch begins; what an earlier one left unsent is written over. Hot path."""
        self._number += 1
        self.batch = []
        self._leases = []
        if self._number % _LOOK_EVERY == 0:
            self._give_up_idle()

    def room(self, size: int) -> tuple[int, int]:
        """Room for ``size`` bytes of the running batch: the slot's place in ``batch``, an offset.

        Raises:
            NoRoom: if there is none, and none can be made.
        """
        if self.batch:
            slot = self.batch[-1]
            at = -(-slot.used // _ALIGNED) * _ALIGNED
            if at + size <= slot.size:
                slot.used = at + size
                return len(self.batch) - 1, at
        slot = self._next(size)
        slot.used = size
        slot.batch = self._number
        self.batch.append(slot)
        self._leases.append(slot.lease())
        return len(self.batch) - 1, 0

    def back_to(self, used: list[int]) -> None:
        """Forget what was put into the running batch since its slots held ``used`` bytes."""
        del self.batch[len(used) :]
        del self._leases[len(used) :]
        for slot, size in zip(self.batch, used, strict=True):
            slot.used = size

    def lease(self, place: int) -> Any:
        """The memory of a slot of the running batch."""
        return self._leases[place]

    @property
    def given_up(self) -> tuple[int, ...]:
        """Slots that main has mapped and is to let go of; told with the next batch."""
        return tuple(self._given_up)

    def lent(self) -> None:
        """The running batch is sent: its slots are main's now, and it knows those given up."""
        for slot in self.batch:
            self._cells[slot.number] = LENT
        # In one slot the next batch like this one would have gaps where this has its slots' ends.
        filled = sum(-(-slot.used // _ALIGNED) * _ALIGNED for slot in self.batch[:-1])
        self._sizes.append(filled + self.batch[-1].used if self.batch else 0)
        self._expected = max(self._sizes)
        self.batch = []
        self._leases = []
        self._given_up = []

    def _next(self, size: int) -> Slot:
        """A slot for ``size`` bytes and, where there is room for it, for what may follow them."""
        if len(self.batch) == SLOTS_A_BATCH:
            raise NoRoom(f"a batch may lie in {SLOTS_A_BATCH} slots at most")
        filled = sum(each.used for each in self.batch)
        wanted = max(size, 2 * filled if filled else self._expected)
        try:
            return self._take(wanted)
        except NoRoom:
            if wanted == size:
                raise
        return self._take(size)

    def _take(self, size: int) -> Slot:
        slots = list(self._slots.values())
        fitting = [slot for slot in slots if slot.size >= size and self._is_free(slot)]
        best = min(fitting, key=_size_of, default=None)
        if best is not None and best.size <= _ROOMY * max(size, _SMALLEST):
            return best
        try:
            return self._made(_rounded(size))
        except NoRoom:
            if best is None:
                raise
            return best

    def _made(self, size: int) -> Slot:
        self._make_room_for(size)
        number = next((n for n in range(SLOTS) if self._is_unused(n)), None)
        if number is None:
            raise NoRoom(f"all {SLOTS} slots of the worker hold batches that are in use")
        try:
            slot = Slot(number, size)
        except (OSError, RuntimeError) as exc:
            raise NoRoom(f"no further slot could be made: {str(exc).splitlines()[0]}") from None
        self._slots[number] = slot
        self._held_bytes += size
        self._cells[number] = FREE
        return slot

    def _is_unused(self, number: int) -> bool:
        return number not in self._slots and number not in self._given_up

    def _is_free(self, slot: Slot) -> bool:
        """Whether it can be written to: nothing refers to what is in it, here or anywhere."""
        state = self._cells[slot.number]
        if state == LENT or slot in self.batch or slot.referred_to:
            return False
        if state == GONE or slot.forked:
            self._give_up(slot)
            return False
        return True

    def _make_room_for(self, size: int) -> None:
        """Give up slots that are free, as they are too small, until ``size`` more bytes fit."""
        most = self._most_bytes
        if size > most:
            raise NoRoom(f"a batch needs more than the {most} bytes that a worker's slots may hold")
        free = [slot for slot in list(self._slots.values()) if self._is_free(slot)]
        if self._held_bytes - sum(slot.size for slot in free) + size > most:
            raise NoRoom(f"{most} bytes of slots hold batches that are in use")
        for slot in free:
            if self._held_bytes + size <= most:
                return
            self._give_up(slot)

    def _give_up_idle(self) -> None:
        for slot in list(self._slots.values()):
            if self._is_free(slot) and slot.batch + _IDLE_BATCHES < self._number:
                self._give_up(slot)

    def _give_up(self, slot: Slot) -> None:
        del self._slots[slot.number]
        self._held_bytes -= slot.size
        if slot.fd < 0:  # main has mapped it, and is to be told
            self._given_up.append(slot.number)
        slot.close()

    def forking(self) -> None:
        """A child gets all memory: what it may look at is never written to again."""
        for slot in self._slots.values():
            slot.forked = slot.forked or slot.referred_to


_pools: weakref.WeakSet[SlotPool] = weakref.WeakSet()


def _before_fork() -> None:
    with contextlib.suppress(Exception):  # a fork is not ours to fail
        for pool in list(_pools):
            pool.forking()


os.register_at_fork(before=_before_fork, after_in_parent=_before_fork)


def _rounded(size: int) -> int:
    """Up to an eighth more, so that batches of about one size fit into one another's slots."""
    step = max(_SMALLEST, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step
