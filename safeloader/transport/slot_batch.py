"""The running batch of a worker, and where its bytes lie. Runs in: worker.

::

    SlotPool ── take ──► SlotBatch ── stacked tensors, then copies of the rest ──► commit ── lend
       ▲                     │
       └── nothing refers to what was stacked any more: taken again, within the same batch
"""

from __future__ import annotations

import ctypes
from collections import deque

import torch

from safeloader import _torch
from safeloader.transport.slot_table import SLOTS_A_BATCH
from safeloader.transport.slot_writer import SMALLEST, NoRoom, Slot, SlotPool

_LARGE = 1 << 20  # bytes from which on a tensor or array has a slot of its own
_OWN_MAX = 8  # of these in a batch: each costs a descriptor when it is new
_RECENT = 32  # batches that a shared slot is made to fit


class SlotBatch:
    """The batch that a worker makes, in slots of its pool.

    What is large gets a slot of its own, so that whoever keeps the labels of each batch does not
    keep the images as well. The rest of a batch shares a slot. A tensor that is stacked into a slot
    keeps it in use only for as long as it exists. Sealing the batch finds what is left, and only
    slots that hold something of the batch are sent.

    Args:
        pool: the slots of this worker.

    Attributes:
        sent: the slots that it is sent in, so far.
        why: why a part of it is in no slot; empty if all is.
    """

    def __init__(self, pool: SlotPool) -> None:
        self.pool = pool
        self.sent: list[Slot] = []
        self._recent: deque[int] = deque([0], maxlen=_RECENT)  # bytes of batches in shared slots
        self._clear()

    def _clear(self) -> None:
        self.why = ""
        self._own: list[Slot] = []
        self._shared: list[Slot] = []  # the last is being filled
        self._roomy: list[Slot] = []
        self._taken: set[Slot] = set()
        # By its storage, whose identity is given again when it is gone: see `stacked`.
        self._stacked: dict[int, tuple[Slot, int]] = {}

    def begin(self) -> None:
        """A batch begins; hot path."""
        if self._taken or self.why:  # it failed
            self._clear()
        self.pool.begin()

    # while it is made ───────────────────────────────────────────────────────────────────────────

    def tensor(self, dtype: torch.dtype, count: int, size: int) -> torch.Tensor | None:
        """A flat tensor of ``size`` bytes in a slot, to stack into; None if there is no room."""
        found = self._room(size)
        if found is None:
            return None
        slot, at = found
        made = torch.frombuffer(slot.memory, dtype=dtype, count=count, offset=at)
        storage = made.untyped_storage()
        slot.add(at, size, _torch.refer_weakly(storage))
        self._stacked[_torch.identity_of(storage)] = slot, at
        return made

    def _room(self, size: int) -> tuple[Slot, int] | None:
        try:
            if size >= _LARGE:
                self._own = [slot for slot in self._own if slot.filled()]
                if len(self._own) < _OWN_MAX:
                    slot = self._take(size)
                    if slot in self._shared:  # of which all was temporary
                        self._shared.remove(slot)
                    self._own.append(slot)
                    return slot, 0
            if self._shared:
                slot = self._shared[-1]
                at = slot.room(size)
                if at is not None:
                    return slot, at
                wanted = 2 * (size + sum(slot.filled() for slot in self._shared))
            else:
                wanted = max(size, *self._recent)
            try:
                slot = self._take(wanted)
            except NoRoom:
                slot = self._take(size)
        except NoRoom as exc:
            self.why = str(exc)
            return None
        self._shared.append(slot)
        return slot, 0

    def _take(self, size: int) -> Slot:
        if len(self._own) + len(self._shared) >= SLOTS_A_BATCH:
            raise NoRoom(f"a batch may lie in {SLOTS_A_BATCH} slots at most")
        slot = self.pool.take(size)
        self._taken.add(slot)
        return slot

    # when it is sealed ──────────────────────────────────────────────────────────────────────────

    def seal(self) -> None:
        """Nothing is stacked from now on. A slot that temporaries made large is not sent."""
        if self._shared:
            most = max(self._recent)
            if any(_roomy(slot, most) for slot in self._shared):
                most = max(most, sum(slot.used() for slot in self._shared))
                self._roomy = [slot for slot in self._shared if _roomy(slot, most)]
                self._shared = [slot for slot in self._shared if slot not in self._roomy]

    def stacked(self, storage: torch.UntypedStorage, same: int) -> tuple[Slot, int] | None:
        """The slot, and the offset in it, that the storage of this identity was stacked into."""
        found = self._stacked.get(same)
        here = found is not None and storage.data_ptr() == found[0].address + found[1]
        return found if here else None

    def place_of(
        self, storage: torch.UntypedStorage, same: int, size: int
    ) -> tuple[int, int, int] | None:
        """Where a storage lies in the slots of the batch, copied there if need be; hot path.

        None if there is no room.
        """
        found = self.stacked(storage, same)
        if found is not None and found[0] not in self._roomy:
            slot, at = found
            return self._place(slot), at, size
        return self.copy(storage.data_ptr(), size)

    def copy(self, source: int | bytes, size: int) -> tuple[int, int, int] | None:
        """Copy from an address, or bytes, into a slot of the batch; None if there is no room."""
        found = self.put(size)
        if found is None:
            return None
        slot, place, at = found
        ctypes.memmove(slot.address + at, source, size)
        return place, at, size

    def put(self, size: int) -> tuple[Slot, int, int] | None:
        """Room for a copy: the slot, its place in the batch, an offset. None if there is none."""
        found = self._room(size)
        if found is None:
            return None
        slot, at = found
        slot.add(at, size)
        return slot, self._place(slot), at

    def _place(self, slot: Slot) -> int:
        if slot.place is None:
            slot.place = len(self.sent)
            self.sent.append(slot)
        return slot.place

    def commit(self) -> list[int]:
        """The batch is sent: its slots are main's. Gives the descriptors of those new to main."""
        self._recent.append(sum([slot.filled() for slot in self.sent if slot in self._shared]))
        fresh = self.pool.lend(self.sent)
        self.abort()
        if self._taken:
            self.pool.give_up_spare(self._taken)
            self._clear()
        return fresh

    def abort(self) -> None:
        """The batch is not sent, or not this way: forget what was copied."""
        for slot in self.sent:
            slot.place = None
            slot.drop_copies()
        self.sent = []
        self.why = ""


def _roomy(slot: Slot, size: int) -> bool:
    return slot.size > 3 * size + SMALLEST
