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

    def keep(self) -> None:
        """A large batch was made; its samples' memory is to serve the next."""
        if not self._looked:
            self._looked = True
            self._libc = _glibc()
            if self._libc is not None:
                self._libc.mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING)
                self._libc.mallopt(_M_TRIM_THRESHOLD, self._most)
        self._used = True

    def give_back(self) -> None:
        """The worker waits: what is free goes back to the system, unless that is soon again."""
        if self._used and perf_counter() >= self._due:
            self.trim()

    def trim(self) -> None:
        """What is free goes back to the system."""
        if self._used and self._libc is not None:
            began = perf_counter()
            self._libc.malloc_trim(0)
            ended = perf_counter()
            self._due = ended + (ended - began) / _SHARE
        self._used = False


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
    return libc if all(hasattr(libc, name) for name in needed) else None
