"""Where the read positions of open files stand. Runs in: both.

Processes that inherited a descriptor over a fork share its position: what one reads, the others
skip. The kernel tells positions of every descriptor, whoever opened it (PyAV, decord, rasterio).
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

FILES_MAX = 256  # looked at in one process

_ACCESS = os.O_RDONLY | os.O_WRONLY | os.O_RDWR


class Position(NamedTuple):
    """A regular file that is open for reading only: its path, and where its position stands."""

    path: str
    offset: int


def read_positions() -> dict[int, Position]:
    """By descriptor, the regular files that this process has open for reading only.

    Empty where the system has no ``/proc``. Nothing is moved.

    >>> with open(__file__, "rb", buffering=0) as file:
    ...     _ = file.read(3)
    ...     file.fileno() not in read_positions() or read_positions()[file.fileno()].offset
    3
    """
    found: dict[int, Position] = {}
    try:
        import fcntl

        numbers = [int(each) for each in os.listdir("/proc/self/fd")]
    except (OSError, ImportError):
        return found
    for fd in numbers[:FILES_MAX]:
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                continue
            if fcntl.fcntl(fd, fcntl.F_GETFL) & _ACCESS != os.O_RDONLY:
                continue
            path = os.readlink(f"/proc/self/fd/{fd}")
            if path.startswith("/memfd:"):
                continue
            found[fd] = Position(path, os.lseek(fd, 0, os.SEEK_CUR))
        except OSError:
            continue
    return found


def offset_of(fd: int) -> int | None:
    """Where the position of a descriptor stands; None where it has none."""
    try:
        return os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        return None


def bytes_read() -> int | None:
    """How many bytes this process has read, of whatever, from one look to the next.

    Only differences mean something; None where the system does not tell. What the looks themselves
    read is left out.

    >>> before = bytes_read()
    >>> bytes_read() == before
    True
    >>> with open(__file__, "rb") as file:
    ...     _ = file.read(3)
    >>> before is None or bytes_read() > before
    True
    """
    global _read_here
    try:
        file = os.open("/proc/self/io", os.O_RDONLY)
    except OSError:
        return None
    try:
        told = os.read(file, 64)  # rchar: 3012
    finally:
        os.close(file)
    _read_here += len(told)
    return int(told.split(None, 2)[1]) + len(told) - _read_here


_read_here = 0  # bytes, by the looks
