"""Files without a name, for memory that processes share. Runs in: both.

The kernel keeps such a file for as long as a process has it open or mapped. Nothing is left of it
when they end, however they end, and ``/dev/shm`` (64 MB in many containers) does not count it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import tempfile
from collections.abc import Callable
from mmap import mmap
from typing import Any

import torch

from safeloader._python import DupFd, assert_spawning


def anonymous_file(size: int) -> int:
    """A file descriptor of ``size`` bytes of zeros: ``memfd``, elsewhere an unlinked file.

    Raises:
        OSError: where none can be had.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("safeloader", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd


def mapped(fd: int, size: int) -> Any:
    """The first ``size`` bytes of a file as memory, a ctypes array; unmapped when it is freed.

    Holds no descriptor, which ``mmap.mmap`` would: loaders that keep many batches run out of them.

    Raises:
        RuntimeError: where it cannot be mapped.
    """
    file = f"/proc/self/fd/{fd}"
    whole: Any = torch.from_file(file, shared=True, size=size, dtype=torch.uint8)
    return (ctypes.c_ubyte * size).from_buffer(whole.numpy())


def punched(memory: Any) -> None:
    """Give the pages of such memory back at once, whoever has it mapped still: it reads as zeros.

    A process that was forked while it was mapped would keep them for as long as it lives.
    """
    _advise(memory, len(memory), _REMOVE)


def populated(memory: Any, size: int, *, filled: bool = False) -> None:
    """Map the first pages of such memory in one call, where the kernel can; else when touched.

    Where another process ``filled`` them, they are mapped as if they were read: the kernel maps
    those around each with it then, to be written to as well, and takes less than half as long.
    """
    _advise(memory, size, _POPULATE_READ if filled else _POPULATE_WRITE)


_REMOVE, _POPULATE_READ, _POPULATE_WRITE = 9, 22, 23  # of Linux, the latter two from 5.14 on


def _advise(memory: Any, size: int, advice: int) -> None:
    if sys.platform == "linux":
        at, length = ctypes.c_void_p(ctypes.addressof(memory)), ctypes.c_size_t(size)
        _libc().madvise(at, length, advice)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


class SharedCells:
    """Cells of int64 at the head of an anonymous file. Pickles to workers only.

    Args:
        cells: how many.
        more: bytes behind them, which are not mapped.

    Raises:
        OSError: where no anonymous file can be had, or it cannot be mapped.
    """

    def __init__(self, cells: int, more: int = 0) -> None:
        self._mapped_bytes = 8 * cells
        self._fd = anonymous_file(self._mapped_bytes + more)
        self._map()

    def _map(self) -> None:
        # The view keeps the mapping alive: nothing is unmapped under a reader.
        self._cells = memoryview(mmap(self._fd, self._mapped_bytes)).cast("q")

    def __getstate__(self) -> dict[str, Any]:
        assert_spawning(self)
        return vars(self) | {"_cells": None, "_fd": DupFd(self._fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _fd=state["_fd"].detach())
        self._map()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # By an argument: at the interpreter's end the module's names are gone.
        if "_fd" in self.__dict__:
            close(self._fd)
