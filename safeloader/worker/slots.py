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

from safeloader._python import at_fork
from safeloader.wire.anonymous import anonymous_file, mapped
from safeloader.wire.slots import FREE, GONE, LENT, SLOTS_A_BATCH, UNUSED, SlotTable

_ALIGNED = 64  # a cache line
_SMALLEST = 1 << 16
_LARGE = 1 << 20  # bytes from which on a tensor or array has a slot of its own
_OWN_MAX = 8  # of these in a batch: each costs a descriptor when it is new
_RECENT = 32  # batches that a shared slot is made to fit
_IDLE_BATCHES = 256  # a slot that so many batches did without is given up
_LOOK_EVERY = 8


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
        free_since: number of the batch at which it was found free; None while it is in use.
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
        self.free_since: int | None = None
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

    What is large gets a slot of its own, so that whoever keeps the labels of each batch does not
    keep the images as well. The rest of a batch shares a slot.

    Args:
        table: the states of all slots.
        worker: whose slots these are.
    """

    def __init__(self, table: SlotTable, worker: int) -> None:
        self._states = np.frombuffer(table.row(worker), np.int64)
        self._most_bytes = table.most_bytes
        self._slots: dict[int, Slot] = {}
        self._top = 0  # above the highest number in use
        self._held_bytes = 0
        self._shared_sizes: deque[int] = deque([0], maxlen=_RECENT)  # of the newest batches
        self._number = 0
        self._given_up: list[int] = []
        self.batch: list[Slot] = []  # those that the running batch lies in
        self._leases: list[Any] = []
        self._shared: int | None = None  # which of these is shared
        self._shared_filled = 0
        _pools.add(self)

    def begin(self) -> None:
        """A batch begins; what an earlier one left unsent is written over. Hot path."""
        self._number += 1
        self._clear()
        if self._number % _LOOK_EVERY == 0:
            self._give_up_idle()

    def _clear(self) -> None:
        self.batch = []
        self._leases = []
        self._shared = None
        self._shared_filled = 0

    def room(self, size: int) -> tuple[int, int]:
        """Room for ``size`` bytes of the running batch: the slot's place in ``batch``, an offset.

        Raises:
            NoRoom: if there is none, and none can be made.
        """
        if size >= _LARGE and len(self.batch) < _OWN_MAX:
            return self._add(size, size), 0
        self._shared_filled += size + _ALIGNED
        if self._shared is not None:
            slot = self.batch[self._shared]
            at = -(-slot.used // _ALIGNED) * _ALIGNED
            if at + size <= slot.size:
                slot.used = at + size
                return self._shared, at
            wanted = 2 * self._shared_filled
        else:
            wanted = max(size, *self._shared_sizes)
        try:
            self._shared = self._add(size, wanted)
        except NoRoom:
            if wanted == size:
                raise
            self._shared = self._add(size, size)
        return self._shared, 0

    def _add(self, used: int, size: int) -> int:
        if len(self.batch) == SLOTS_A_BATCH:
            raise NoRoom(f"a batch may lie in {SLOTS_A_BATCH} slots at most")
        slot = self._take(size)
        slot.used = used
        slot.free_since = None
        self.batch.append(slot)
        self._leases.append(slot.lease())
        return len(self.batch) - 1

    def mark(self) -> tuple[int, int, int | None, int]:
        """How far the running batch is filled, for :meth:`back_to`."""
        shared = self._shared
        used = 0 if shared is None else self.batch[shared].used
        return len(self.batch), self._shared_filled, shared, used

    def back_to(self, mark: tuple[int, int, int | None, int]) -> None:
        """Forget what was put into the running batch since then."""
        count, self._shared_filled, self._shared, used = mark
        del self.batch[count:]
        del self._leases[count:]
        if self._shared is not None:
            self.batch[self._shared].used = used

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
            self._states[slot.number] = LENT
        self._shared_sizes.append(self._shared_filled)
        self._clear()
        self._states[self._given_up] = UNUSED
        self._given_up = []

    def _take(self, size: int) -> Slot:
        fitting = [slot for slot in self._free() if slot.size >= size]
        best = min(fitting, key=attrgetter("size"), default=None)
        # A small batch does not keep a large slot in use.
        if best is not None and best.size <= 2 * size + _SMALLEST:
            return best
        try:
            return self._make(_rounded(size))
        except NoRoom:
            if best is None or best.number not in self._slots:
                raise
            return best

    def _free(self) -> list[Slot]:
        """The slots that can be written to: nothing refers to what is in them, here or anywhere."""
        found = []
        for number in np.flatnonzero(self._states[: self._top] & 1).tolist():
            slot = self._slots[number]
            if slot.referred_to or slot in self.batch:
                continue
            if slot.forked or self._states[number] == GONE:
                self._give_up(slot)
            else:
                found.append(slot)
        return found

    def _make(self, size: int) -> Slot:
        most = self._most_bytes
        if size > most:
            raise NoRoom(f"a batch needs more than the {most} bytes that a worker's slots may hold")
        if self._held_bytes + size > most:
            free = self._free()  # which are too small, or too large
            if self._held_bytes - sum(slot.size for slot in free) + size > most:
                raise NoRoom(f"{most} bytes of slots hold batches that are in use")
            for slot in free:
                self._give_up(slot)
        unused = np.flatnonzero(self._states == UNUSED)
        if not unused.size:
            raise NoRoom(f"all {len(self._states)} slots of a worker hold batches that are in use")
        number = int(unused[0])
        try:
            slot = Slot(number, size)
        except (OSError, RuntimeError) as exc:
            raise NoRoom(f"no further slot could be made: {str(exc).splitlines()[0]}") from None
        self._slots[number] = slot
        self._top = max(self._top, number + 1)
        self._held_bytes += size
        self._states[number] = FREE
        return slot

    def _give_up_idle(self) -> None:
        # Counted from when it was found free: one that was kept for long is as good as any.
        for slot in self._free():
            if slot.free_since is None:
                slot.free_since = self._number
            elif slot.free_since + _IDLE_BATCHES < self._number:
                self._give_up(slot)

    def _give_up(self, slot: Slot) -> None:
        del self._slots[slot.number]
        self._held_bytes -= slot.size
        if slot.fd < 0:  # main has mapped it, and is told with the next batch: not to be used yet
            self._states[slot.number] = LENT
            self._given_up.append(slot.number)
        else:
            self._states[slot.number] = UNUSED
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


at_fork(before=_before_fork, after_in_parent=_before_fork)


def _rounded(size: int) -> int:
    """Up to an eighth more, so that batches of about one size fit into one another's slots."""
    step = max(_SMALLEST, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step
