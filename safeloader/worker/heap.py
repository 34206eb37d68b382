"""The memory that samples were in is kept for the next batch. Runs in: worker.

Samples that are decoded or augmented are freed with each batch. By glibc's defaults their pages go
back to the system as soon, and the next batch has them zeroed and mapped again, one fault each:
more than a tenth of the time that photographs take. A worker that waits for a task has time to
spare, and gives back what is free.
"""

from __future__ import annotations

import ctypes
import os
from time import perf_counter

_KEPT = 256 << 20  # bytes at the end of the heap, at most
_SHARE = 0.01  # of the time, at most: the heap of a large program is long to walk
_OWN_MAPPING = 32 << 20  # bytes from which on a block is mapped by itself: glibc takes no more
# The names that `mallopt` has for these, in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


class KeptHeap:
    """A worker's heap, as glibc has it; with another C library nothing is done.

    Nor where the environment says what glibc shall do.

    Args:
        most: bytes that may be kept free at the end of the heap; 0 for none.
    """

    def __init__(self, most: int = _KEPT) -> None:
        self._most = min(most, _KEPT)
        self._libc: ctypes.CDLL | None = None  # once there was a large batch
        self._looked = self._most <= 0
        self._used = False
        self._due = 0.0
        self._free_before = 0  # bytes of the heap that were free before it was kept, or given back

    def keep(self) -> None:
        """A large batch was made; its samples' memory is to serve the next."""
        if not self._looked:
            self._looked = True
            self._libc = _glibc()
            if self._libc is not None:
                self._libc.mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING)
                self._libc.mallopt(_M_TRIM_THRESHOLD, self._most)
                self._free_before = self._free()
        self._used = True

    def give_back(self) -> None:
        """The worker waits: what is free goes back to the system, unless that is soon again."""
        began = perf_counter()
        if not self._used or began < self._due:
            return
        self._used = False
        if self._libc is not None:
            self._libc.malloc_trim(0)
            ended = perf_counter()
            self._due = ended + (ended - began) / _SHARE
            self._free_before = self._free()

    def kept_bytes(self) -> int:
        """How much of this process's memory is only kept free for the next batch."""
        free = self._free()
        self._free_before = min(self._free_before, free)
        return free - self._free_before

    def _free(self) -> int:
        if self._libc is None or not hasattr(self._libc, "mallinfo2"):
            return 0
        return int(self._libc.mallinfo2().fordblks)


class _Mallinfo2(ctypes.Structure):
    """As in glibc's malloc.h, from 2.33 on; ``fordblks`` are the bytes that are free."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _glibc() -> ctypes.CDLL | None:
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    if any(name in os.environ for name in _SETTINGS):
        return None
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # a system without
        return None
    needed = "gnu_get_libc_version", "mallopt", "malloc_trim"
    if not all(hasattr(libc, name) for name in needed):
        return None
    if hasattr(libc, "mallinfo2"):
        libc.mallinfo2.restype = _Mallinfo2
    return libc
