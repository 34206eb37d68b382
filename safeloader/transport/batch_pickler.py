"""Pickles a batch, with the memory of its tensors put into slots. Runs in: worker.

Where the pickler comes to the memory of a tensor or of an array, that is copied
into a slot, once however many tensors share it, and a call that finds it there is written to the
pickle. What is small crosses within the message. Everything else about a tensor (its kind,
``requires_grad``, what its class adds) is torch's own way of pickling it.

Torch's way of handing over memory remains for what is in its shared memory already, and for what
finds no room: a descriptor for each tensor, sent beside the message.
"""

from __future__ import annotations

import copyreg
import ctypes
import io
import os
import pickle
import sys
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import reduce_tensor

from safeloader import _torch
from safeloader._python import as_if_spawning, extra_reducers
from safeloader.transport import leaves
from safeloader.transport.channel import MOST_FDS
from safeloader.transport.leaves import CODES, NewPlace, Place, Placeholder
from safeloader.transport.slot_batch import SlotBatch
from safeloader.transport.slot_table import SLOTS_A_BATCH

INLINE = 4096  # bytes of a tensor or array up to which it crosses within the message
IN_MESSAGE = 1 << 20  # the same where no slot is to be had
_WHOLE = 1 << 20  # bytes of memory up to which all of it crosses, however little is looked at
_PROTOCOL = 4  # of torch's queue: 5 would hand on read-only arrays
_ALIGNED = 16  # every element size divides it
_named = getattr(torch.Tensor, "has_names", lambda tensor: False)  # torch refuses to send these

Part = tuple[int, int]  # of a storage: first byte, and the one behind the last
Parts = dict[int, list[Part]]  # storage: in order, apart from each other


class Overlap(Exception):
    """Tensors look at the same bytes of a large memory; its argument: parts that cross whole."""


def _merged(parts: Iterable[Part]) -> list[Part]:
    """The same bytes in parts that are apart from each other, in order."""
    merged: list[Part] = []
    for low, high in sorted(parts):
        if merged and low < merged[-1][1]:
            low, high = merged[-1][0], max(merged.pop()[1], high)
        merged.append((low, high))
    return merged


class BatchPickler:
    """One batch on its way through the pickler, reduced to places of its memory.

    It must not hold the pickler, which holds it, and every tensor of the batch: their memory would
    wait for the garbage collector.

    Args:
        slots: the batch, as far as it lies in slots; None for torch's own way.
        parts: what is to cross of storages of which several tensors look at the same bytes.
        why: why torch's own way is taken.

    Attributes:
        fds: descriptors of tensors that went torch's way.
        torchs: whether some did.
        why: why, but for what found no room; empty where none had to.
    """

    def __init__(self, slots: SlotBatch | None, parts: Parts, why: str = "") -> None:
        self._slots = slots
        self._parts = parts
        self._brought: dict[int, int] = {}  # identity of a whole storage: its number in the pickle
        # Of storages of which not all crosses: the parts that do, with their numbers.
        self._views: dict[int, dict[Part, int]] = {}
        self._spare_bytes = 0  # of these storages; parts that are larger together overlap
        # By number in the pickle: what was brought. Held, so that no identity is given twice.
        self._held: list[torch.UntypedStorage] = []
        self.fds: list[int] = []
        self.torchs = False
        self.why = why

    def pickled(self, payload: Any) -> bytes:
        """The pickle of a batch."""
        buffer = io.BytesIO()
        pickler: Any = pickle.Pickler(buffer, _PROTOCOL)
        table = {**copyreg.dispatch_table, **extra_reducers}
        self._reduce_tensor = table[torch.Tensor]
        self._reduce_storage = table[torch.UntypedStorage]
        table[torch.UntypedStorage] = self._storage
        if self._slots is not None:
            if self._reduce_tensor is reduce_tensor:  # not where the user registered another
                table[torch.Tensor] = self._tensor
            table.setdefault(np.ndarray, self._array)
        pickler.dispatch_table = table
        pickler.dump(payload)
        merged = {same: _merged(views) for same, views in self._views.items()}
        if any(len(merged[same]) < len(views) for same, views in self._views.items()):
            raise Overlap(merged)
        return buffer.getvalue()

    # leaves ─────────────────────────────────────────────────────────────────────────────────────

    def _tensor(self, tensor: torch.Tensor) -> Any:
        """What ``copyreg`` wants to know of a tensor; hot path."""
        code = CODES.get(tensor.dtype)
        if (
            code is None
            or tensor.layout is not torch.strided
            or not tensor.is_cpu
            or tensor.requires_grad
            or tensor.is_nested
            or tensor.is_conj()
            or tensor.is_neg()
            or _named(tensor)
        ):
            return self._reduce_tensor(tensor)
        storage = tensor.untyped_storage()
        size = tensor.nbytes
        if not size or storage.is_shared():
            return self._reduce_tensor(tensor)
        same = _torch.identity_of(storage)
        shape = tuple(tensor.shape)
        # The stride along a dimension of one element is free, and is to stay as it is.
        if (
            size == storage.nbytes()
            and same not in self._brought
            and same not in self._views
            and 1 not in shape
            and tensor.is_contiguous()
        ):
            place = self._bring(storage, same, size)
            if place is None:
                return self._reduce_tensor(tensor)
            return leaves.tensor_at, (place, code, shape)
        item, stride = tensor.itemsize, tensor.stride()
        first = int(tensor.storage_offset())
        last = first + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        start, there = self._place_of(storage, same, (first * item, (last + 1) * item))
        if there is None:
            return self._reduce_tensor(tensor)
        return leaves.tensor_over, (there, code, shape, stride, first - start // item)

    def _place_of(
        self, storage: torch.UntypedStorage, same: int, part: Part
    ) -> tuple[int, Place | None]:
        """Where a part of a storage is, and the byte of the storage that this begins with.

        None if there is no room.
        """
        if same in self._brought:
            return 0, self._brought[same]
        assert self._slots is not None
        held = storage.nbytes()
        few = held > _WHOLE and part[1] - part[0] < held // 2
        few = few and self._slots.stacked(storage, same) is None
        if few or same in self._views or same in self._parts:
            return self._view(storage, same, part)
        return 0, self._bring(storage, same, held)

    def _view(self, storage: torch.UntypedStorage, same: int, part: Part) -> tuple[int, Place]:
        """The same for a storage of which not all crosses."""
        views = self._views.get(same)
        if views is None:
            views = self._views[same] = {}
            self._spare_bytes += storage.nbytes()
        known = self._parts.get(same, [])
        at = bisect_right(known, (part[0], sys.maxsize)) - 1
        if at >= 0 and part[1] <= known[at][1]:
            part = known[at]
        start = part[0] // _ALIGNED * _ALIGNED
        if part in views:
            return start, views[part]
        views[part] = len(self._held)
        self._held.append(storage)
        self._spare_bytes -= part[1] - part[0]
        if self._spare_bytes < 0:  # they overlap: this pickle will not be sent
            return start, b""
        assert self._slots is not None
        address, size = storage.data_ptr() + start, part[1] - start
        copied = self._slots.copy(address, size) if size > INLINE else None
        # Without room it goes within the message: torch's way would take the storage as a whole.
        # Not by ``ctypes.string_at``, which takes a C int for a size.
        return start, copied or bytes((ctypes.c_char * size).from_address(address))

    def _storage(self, storage: torch.UntypedStorage) -> Any:
        """The same for the storage of what is no plain tensor."""
        held = storage.nbytes()
        place: Place | None = None
        if self._slots is not None and held and storage.device.type == "cpu":
            if storage.is_shared():
                self.why = self.why or "a tensor is in torch's shared memory already"
            else:
                _, place = self._place_of(storage, _torch.identity_of(storage), (0, held))
        return self._torchs(storage) if place is None else (leaves.storage_at, (place,))

    def _bring(self, storage: torch.UntypedStorage, same: int, size: int) -> NewPlace | None:
        """The place of a whole storage that comes for the first time; None if there is no room."""
        assert self._slots is not None
        place: NewPlace | None = None
        if size > INLINE:
            place = self._slots.place_of(storage, same, size)
        if place is None:
            # Torch's way costs a descriptor for as long as the batch is kept: for what is large.
            if size >= IN_MESSAGE:
                return None
            place = ctypes.string_at(storage.data_ptr(), size)
        self._brought[same] = len(self._held)
        self._held.append(storage)
        return place

    def _array(self, array: np.ndarray[Any, Any]) -> Any:
        """The same for an array; a copy each, as in any pickle."""
        dtype = array.dtype
        if array.nbytes <= INLINE or dtype.hasobject or not dtype.isnative:  # numpy swaps its bytes
            return array.__reduce__()
        assert self._slots is not None
        found = self._slots.put(array.nbytes)
        if found is None:
            return array.__reduce__()
        slot, place, at = found
        flags, shape = array.flags, array.shape
        order: Any = "F" if flags.f_contiguous and not flags.c_contiguous else "C"
        if flags.forc:  # with the bytes between the fields of a record, which `copyto` leaves out
            ctypes.memmove(slot.address + at, array.ctypes.data, array.nbytes)
        else:
            np.copyto(np.ndarray(shape, dtype, slot.memory, at, order=order), array)
        return leaves.array_in_slot, ((place, at, array.nbytes), dtype, shape, order)

    # torch's way ────────────────────────────────────────────────────────────────────────────────

    def _torchs(self, storage: torch.UntypedStorage) -> Any:
        """Torch's own word for a storage, its descriptor taken along.

        Torch keeps the descriptor in the worker and has main fetch it from there, which a thread of
        the worker has to answer: it cannot while the worker is stopped, or stuck in C code that
        holds the interpreter, and it takes some 300 µs. Its reducer passes a descriptor the way
        that suits the moment, and while a process is being started that is by number. The moment is
        made to look like that, for one call and this thread alone, until the message has as many
        descriptors as it may.
        """
        self.torchs = True
        # The slots of the batch may be new, and need descriptors as well.
        if len(self.fds) >= MOST_FDS - SLOTS_A_BATCH:
            self.why = self.why or "more tensors than a message may have descriptors"
            return self._reduce_storage(storage)
        with as_if_spawning(self):
            return self._reduce_storage(storage)

    def duplicate_for_child(self, fd: int) -> int:
        """Take a descriptor along; its number in the message."""
        self.fds.append(os.dup(fd))
        return len(self.fds) - 1

    def DupFd(self, number: int) -> Placeholder:
        """What stands for the descriptor in the pickle."""
        return Placeholder(number)
