"""What stands in a batch's pickle for the memory of its tensors and arrays; called in main.

The worker writes calls of these functions into the pickle, loading it makes them. The memory is
named by a *place*: a slot of the batch and an offset in it; bytes, for what is so small that it
crosses within the message; or a number, for memory that an earlier leaf of the batch brought.
Tensors that share memory in the worker therefore share it in main.
"""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

Place = tuple[int, int, int] | bytes | int  # (slot of the batch, offset, bytes); bytes; number


def _dtypes() -> tuple[torch.dtype, ...]:
    known = {each for each in vars(torch).values() if isinstance(each, torch.dtype)}
    usable = []
    for dtype in sorted(known, key=str):
        try:
            made = torch.frombuffer(bytearray(16), dtype=dtype, count=1)
        except (RuntimeError, ValueError, TypeError, AssertionError):  # packed bits
            continue
        if not made.is_quantized:  # these need more than their memory: torch crashes without it
            usable.append(dtype)
    return tuple(usable)


DTYPES = _dtypes()
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}  # shorter in a pickle than their names


class _Opening(threading.local):
    """The batch that this thread is opening.

    Attributes:
        leases: the memory of each slot it lies in.
        fds: descriptors that came beside it; -1 for one that was taken.
        brought: memory of its leaves so far, in the order of the pickle.
    """

    def __init__(self) -> None:
        self.leases: list[Any] = []
        self.fds: list[int] = []
        self.brought: list[Any] = []

    def begin(self, fds: Iterable[int]) -> tuple[Any, ...]:
        """A batch is to be loaded. Gives what :meth:`end` wants: loading one may load others."""
        before = self.leases, self.fds, self.brought
        self.leases, self.fds, self.brought = [], list(fds), []
        return before

    def end(self, before: tuple[Any, ...]) -> None:
        """It was, or could not be; let go of everything."""
        close_all(fd for fd in self.fds if fd >= 0)
        # An exception on its way may hold this frame's callers, and they these lists.
        self.leases.clear()
        self.brought.clear()
        self.leases, self.fds, self.brought = before


opening = _Opening()


def _over(buffer: Any, dtype: torch.dtype, count: int = -1, offset: int = 0) -> torch.Tensor:
    """A tensor over a buffer, which is kept for as long as the tensor's storage lives; hot path.

    Torch holds the buffer for as long as the storage points at it. That is not enough: to share
    memory (``share_memory_``, a queue of its multiprocessing) it swaps what a storage points at in
    place, while arrays that hold the storage go on pointing at the buffer.
    """
    made = torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset)
    vars(made.untyped_storage())["buffer"] = buffer
    return made


def tensor_in_slot(slot: int, at: int, count: int, code: int, shape: tuple[int, ...]) -> Any:
    """A contiguous tensor of ``count`` elements with memory of its own in a slot; hot path."""
    made = _over(opening.leases[slot], DTYPES[code], count, at)
    opening.brought.append(made)
    return made.resize_(shape)  # not a view, which could not be detached in place


def tensor_inline(data: bytes, code: int, shape: tuple[int, ...]) -> Any:
    """A contiguous tensor that came within the message; hot path."""
    made = _over(bytearray(data), DTYPES[code])
    opening.brought.append(made)
    return made.resize_(shape)


def tensor_over(
    place: Place, code: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> Any:
    """A tensor of any strides over the memory at ``place``."""
    empty = torch.empty(0, dtype=DTYPES[code], device="cpu")  # whatever the default device is
    return empty.set_(storage_at(place), offset, shape, stride)


def storage_at(place: Place) -> torch.UntypedStorage:
    """The memory at ``place`` as a storage."""
    if isinstance(place, int):
        brought = opening.brought[place]
        return brought if isinstance(brought, torch.UntypedStorage) else brought.untyped_storage()
    if isinstance(place, bytes):
        made = _over(bytearray(place), torch.uint8)
    else:
        slot, at, count = place
        made = _over(opening.leases[slot], torch.uint8, count, at)
    storage = made.untyped_storage()
    opening.brought.append(storage)
    return storage


def array_in_slot(
    slot: int, at: int, dtype: np.dtype[Any], shape: tuple[int, ...], order: Any
) -> np.ndarray[Any, Any]:
    """An array in a slot; writable, as every array is that crosses in a pickle."""
    # By way of a tensor, which holds the lease: numpy shortens chains of arrays.
    count = math.prod(shape) * dtype.itemsize
    memory = _over(opening.leases[slot], torch.uint8, count, at)
    return np.ndarray(shape, dtype, memory.numpy(), order=order)


class Beside:
    """Stands for a descriptor that crosses beside the message; what torch wants of a ``DupFd``."""

    def __init__(self, number: int) -> None:
        self._number = number

    def detach(self) -> int:
        """The descriptor, which is the caller's from now on."""
        if self._number >= len(opening.fds):
            raise OSError(errno.EMFILE, "a tensor's file descriptor was lost on the way")
        fd, opening.fds[self._number] = opening.fds[self._number], -1
        return fd


def close_all(fds: Iterable[int]) -> None:
    """Let go of descriptors that nobody wants any more."""
    for fd in fds:
        os.close(fd)
