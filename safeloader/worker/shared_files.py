"""Whether this worker, and others, move read positions that all inherited. Runs in: worker."""

from __future__ import annotations

import io
import os
import weakref
from collections.abc import Callable
from typing import Any

from safeloader.introspect.copy_state import attributes
from safeloader.introspect.file_positions import Position, bytes_read, offset_of
from safeloader.supervision.self_report import SharedFile

FILES_MAX = 32  # watched: each takes a descriptor meanwhile
POSITIONS_FOR = 64  # batches in which read positions are looked at


class InheritedFiles:
    """Inherited read positions: whether this process moves them, and whether others do."""

    def __init__(self, inherited: dict[int, Position], dataset: Any) -> None:
        # By copies of the descriptors: the worker may close one, and open another file there.
        copies = {self._copy_of(fd): fd for fd in list(inherited)[:FILES_MAX]}
        self._fds = {copy: fd for copy, fd in copies.items() if copy is not None}
        self.open = {copy: inherited[fd] for copy, fd in self._fds.items()}
        self._dataset = dataset
        self._at = {copy: each.offset for copy, each in self.open.items()}
        self._mine = dict.fromkeys(self.open, 0)
        self._others = dict.fromkeys(self.open, 0)
        self._paths = {copy: each.path for copy, each in self.open.items()}
        self._batches = 0
        self._read: int | None = None

    @staticmethod
    def _copy_of(fd: int) -> int | None:
        try:
            return os.dup(fd)
        except OSError:  # closed since, or no descriptor is free
            return None

    def _let_go(self, fd: int) -> None:
        del self.open[fd]
        os.close(fd)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        for fd in self.__dict__.get("open", ()):
            close(fd)

    def watch(self, fetcher: Any) -> None:
        """Look at the positions before and after each batch of ``fetcher``, for some batches."""
        # Weakly, and by the function: the fetcher holds this.
        fetch, its = type(fetcher).fetch, weakref.ref(fetcher)

        def watched(task: Any) -> Any:
            if not self.open:
                return fetch(its(), task)
            for fd in self.open:
                offset = offset_of(fd)
                if offset != self._at[fd]:
                    self._others[fd] += 1
                    self._at[fd] = offset or 0
            self._read = bytes_read()
            try:
                return fetch(its(), task)
            finally:
                self._look_after()

        fetcher.fetch = watched

    def _look_after(self) -> None:
        self._batches += 1
        reads = self._read is None or bytes_read() != self._read
        for fd in list(self.open):
            offset = offset_of(fd)
            if offset != self._at[fd] and reads:
                self._mine[fd] += 1
                self._at[fd] = offset or 0
            elif offset != self._at[fd]:  # while this process read nothing at all: main reads on
                self._at[fd] = offset or 0
            elif self._batches >= 4 and not self._mine[fd]:
                self._let_go(fd)  # this process does not read it
        if self._batches >= POSITIONS_FOR:
            for fd in list(self.open):
                self._let_go(fd)

    def moved(self) -> tuple[SharedFile, ...]:
        """Those that this process moved more than once: to close a file may move it as well."""
        moved = [fd for fd, count in self._mine.items() if count > 1]
        return tuple(
            SharedFile(
                self._paths[fd],
                _holder(self._dataset, self._fds[fd]),
                self._mine[fd],
                self._others[fd],
            )
            for fd in moved[:8]
        )


_READERS = (io.FileIO, io.BufferedReader, io.TextIOWrapper)


def _holder(dataset: Any, fd: int) -> str:
    """The path of the attribute that holds an open file; empty if none does."""
    for each in attributes(dataset):
        for cls in _READERS:
            try:
                if type(each.value) is cls and cls.fileno(each.value) == fd:
                    return each.path
            except (ValueError, OSError):  # closed
                continue
    return ""
