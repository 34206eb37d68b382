"""Forks of this process, noticed and counted. Runs in: both.

A child that is forked keeps what it sees, so whatever it may see must not be written to again. Who
lends memory notes the count then, and compares when it comes back.

Python's hooks tell of ``os.fork``. Of a ``fork`` called in C the kernel tells: whether one process
alone maps a page of memory. A page that was written once and is never touched again is shared with
every child forked since, for as long as that lives and has not started another program.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from functools import partial

from safeloader._python import at_fork

_ALONE = 1 << 7 | 1  # in the last byte that /proc/self/pagemap has of a page: there; not shared
_FLAGS = 7 if sys.byteorder == "little" else 0
_seen = bytearray()  # a byte for each

# In C from end to end: a signal handler that raises cannot run in there, and be swallowed.
# Before, for what is lent then; once more for what another thread was given meanwhile.
at_fork(before=partial(_seen.append, 0), after_in_parent=partial(_seen.append, 0))


class _Watch:
    """A page that tells of forks from now on; of none where the kernel does not say."""

    def __init__(self, before: _Watch | None) -> None:
        self.pid = os.getpid()
        self.forks = len(_seen)
        self._fd = -1
        try:
            self._page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._page[0] = 1
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
            self._at = address // mmap.PAGESIZE * 8
            if before is not None and before.pid == self.pid:
                self._fd = before._fd
            else:  # one that was inherited tells of the parent
                self._fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            pass
        self.tells = self._fd >= 0 and self.is_alone()

    def is_alone(self) -> bool:
        """Whether there is no child; False in doubt. Hot path."""
        try:
            told = os.pread(self._fd, 8, self._at)
        except OSError:
            return False
        return len(told) == 8 and told[_FLAGS] & _ALONE == _ALONE


_watch: _Watch | None = None


def forks_noticed(look: bool = False) -> int:
    """How many forks so far; with ``look`` those made in C are looked for too. Hot path."""
    global _watch
    watch = _watch
    if watch is None or watch.forks != len(_seen):
        _watch = _Watch(watch)
    elif look and watch.tells and not watch.is_alone():
        _seen.append(0)
        _watch = _Watch(watch)
    return len(_seen)


def notice_forks() -> None:
    """Begin to notice forks of this process: it may be a child that no hook told of its own."""
    global _watch
    if _watch is None or _watch.pid != os.getpid():
        _watch = _Watch(_watch)
