"""What stands in a batch's pickle for the memory of its tensors. Runs in: both.

The worker writes calls of these functions into the pickle, and main makes them as it loads it. A
*place* names the memory: a slot of the batch and an offset in it; bytes, for what is so small that
it crosses within the message; or a number, for memory that an earlier leaf of the batch brought.
Tensors that share memory in the worker therefore share it in main.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import Any

import numpy as np
import torch

NewPlace = tuple[int, int, int] | bytes  # (slot of the batch, offset, bytes); the bytes
Place = NewPlace | int  # the number


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
    """The message that this thread is opening, if any; loading one may load others."""

    now: Any = None


opening = _Opening()


def _over(message: Any, place: NewPlace, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor over new memory, which is kept as long as the tensor's storage; hot path.

    Torch holds the buffer for as long as the storage points at it. That is not enough: to share
    memory (``share_memory_``, a queue of its multiprocessing) it swaps what a storage points at in
    place, while arrays that hold the storage go on pointing at the buffer.
    """
    if type(place) is tuple:
        slot, at, size = place
        buffer = message.leases[slot]
        made = torch.frombuffer(buffer, dtype=dtype, count=size // dtype.itemsize, offset=at)
    else:
        buffer = bytearray(place)
        made = torch.frombuffer(buffer, dtype=dtype)
    made.untyped_storage().buffer = buffer  # type: ignore[attr-defined]  # new: see above
    return made


def tensor_at(place: NewPlace, code: int, shape: tuple[int, ...]) -> Any:
    """A contiguous tensor with memory of its own at ``place``; hot path."""
    message = opening.now
    made = _over(message, place, DTYPES[code])
    message.brought.append(made)
    # Not a view, which could not be detached in place.
    return made if len(shape) == 1 else made.resize_(shape)


def tensor_over(
    place: Place, code: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> Any:
    """A tensor of any strides over the memory at ``place``."""
    empty = torch.empty(0, dtype=DTYPES[code], device="cpu")  # whatever the default device is
    return empty.set_(storage_at(place), offset, shape, stride)


def storage_at(place: Place) -> torch.UntypedStorage:
    """The memory at ``place`` as a storage."""
    message = opening.now
    if isinstance(place, int):
        brought = message.brought[place]
        return brought if isinstance(brought, torch.UntypedStorage) else brought.untyped_storage()
    storage = _over(message, place, torch.uint8).untyped_storage()
    message.brought.append(storage)
    return storage


def array_in_slot(
    place: tuple[int, int, int], dtype: np.dtype[Any], shape: tuple[int, ...], order: Any
) -> np.ndarray[Any, Any]:
    """An array in a slot; writable, as every array is that crosses in a pickle."""
    # By way of a tensor, which holds the lease: numpy shortens chains of arrays.
    return np.ndarray(shape, dtype, _over(opening.now, place, torch.uint8).numpy(), order=order)


class Placeholder:
    """Stands for a descriptor that crosses beside the message; what torch wants of a ``DupFd``."""

    def __init__(self, number: int) -> None:
        self._number = number

    def detach(self) -> int:
        """A descriptor of the same memory, which is the caller's from now on."""
        fds = opening.now.fds
        if self._number >= len(fds):
            raise OSError(errno.EMFILE, "a tensor's file descriptor was lost on the way")
        fds.extend(map(os.dup, fds[self._number : self._number + 1]))  # the message's until then
        fd: int = fds[-1]
        del fds[-1]
        return fd
