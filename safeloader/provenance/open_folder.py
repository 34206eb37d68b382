"""A folder that is written to by its descriptor, whatever becomes of its path. Runs in: main."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

# A system without these has no links to follow, or says so itself; Python's own descriptors are not
# inherited by programs that are started.
_NOFOLLOW, _DIRECTORY = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_DIRECTORY", 0)
_NEW = os.O_CREAT | os.O_EXCL | _NOFOLLOW
_FOLDER = os.O_RDONLY | _DIRECTORY
_ON = os.O_WRONLY | os.O_APPEND | _NOFOLLOW


class OpenFolder:
    """A folder of this process's own. Its files are made exclusively, and for their owner alone.

    No link is followed, and no descriptor is held but the folder's own. What is written to a folder
    that was removed raises.

    Args:
        above: a folder that is there.
        below: names of folders in it, each in the one before; made where they are missing.
        stem: what the name of the new one begins with; the first number that is free follows.

    Attributes:
        path: the folder.

    Raises:
        OSError: if it cannot be made, or there is a link in its way.
    """

    def __init__(self, above: Path, below: Sequence[str], stem: str) -> None:
        fd = os.open(above, _FOLDER)
        try:
            for name in below:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=fd)
                fd = _close_for(fd, os.open(name, _FOLDER | _NOFOLLOW, dir_fd=fd))
            name = _first_free(fd, stem)
            fd = _close_for(fd, os.open(name, _FOLDER | _NOFOLLOW, dir_fd=fd))
        except OSError:
            os.close(fd)
            raise
        self._fd = not_a_standard_one(fd)
        self.path = above.joinpath(*below, name)
        weakref.finalize(self, _close, self._fd).atexit = False
        self._made: set[str] = set()

    def new(self, name: str, access: int = os.O_WRONLY) -> int:
        """A descriptor of a file that was not there.

        Raises:
            OSError: if it cannot be made.
        """
        fd = os.open(name, access | _NEW, 0o600, dir_fd=self._fd)
        self._made.add(name)
        return not_a_standard_one(fd)

    def has_made(self, name: str) -> bool:
        """Whether a file was made by this object."""
        return name in self._made

    def append(self, name: str, *pieces: bytes | memoryview) -> int:
        """Write behind what a file holds, all or nothing; how many bytes it has now.

        Raises:
            OSError: if that fails: the disk is full, say, or the folder is gone.
        """
        if name in self._made:
            fd = not_a_standard_one(os.open(name, _ON, dir_fd=self._fd))
        else:
            fd = self.new(name, os.O_WRONLY | os.O_APPEND)
        try:
            before = os.fstat(fd).st_size
            try:
                for piece in pieces:
                    write_all(fd, piece)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, before)
                raise
            return before + sum(map(len, pieces))
        finally:
            os.close(fd)

    def remove(self, name: str) -> None:
        """Remove a file; nothing if it is gone.

        Raises:
            OSError: if it cannot be removed.
        """
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of it: a file on a disk that gets full takes a part."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _first_free(parent: int, stem: str) -> str:
    """Make the folder ``stem-n`` with the first number that is free."""
    number = 0
    while True:
        name = f"{stem}-{number}"
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            number += 1
        else:
            return name


def _close_for(old: int, new: int) -> int:
    os.close(old)
    return new


def not_a_standard_one(fd: int) -> int:
    """The file under a number above 2: in a program that has closed these, lines for stderr would
    go into it."""
    low = []
    while fd <= 2:
        low.append(fd)
        fd = os.dup(fd)
    for each in low:
        os.close(each)
    return fd


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):  # a program that closes all it finds
        os.close(fd)
