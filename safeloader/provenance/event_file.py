"""A trace on disk: a JSON array that grows, compressed as it is written. Runs in: main.

::

    member | member | member ...      each a whole gzip stream; together they are the array

Perfetto, ``gzip`` and Python read such a file as one text. What a killed program leaves ends with a
whole member: it lacks the last bracket at most, and viewers take it without.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
import zlib
from pathlib import Path

logger = logging.getLogger("safeloader")

SUFFIX = ".json.gz"
_PIECE_CHARS = 1 << 17
_FLUSH_S = 1.0  # what a killed program leaves is at most this much behind
_GZIP = 31  # for zlib: with the head and tail of a gzip stream
_LEVEL = 1  # 0.7 us a sample; level 2 takes as long, and saves 1 %


class EventFile:
    """A JSON array that grows; written in large pieces, by the process that opened it alone.

    The pieces are held here and not in a buffer of Python's, which a forked child would write a
    second time on its way out.

    Args:
        first: the first event, as JSON.
        fd: the file; taken over.
        path: its name, to be told where it cannot be written.
    """

    def __init__(self, first: str, fd: int, path: Path) -> None:
        self.path = path
        self._pid = os.getpid()
        self._file = io.FileIO(fd, "w")  # closed once it could not be written
        self._held = [f"[\n{first}"]
        self._chars = 0
        self._whole_bytes = 0  # of what was written, all whole members
        self._flush_at_s = time.monotonic() + _FLUSH_S

    def write(self, *events: str) -> None:
        """Take events, each as JSON, or several joined by ``",\\n"``; hot path."""
        self._held += events
        self._chars += sum(map(len, events))
        if self._chars > _PIECE_CHARS or time.monotonic() > self._flush_at_s:
            self.flush()

    def flush(self, end: str = "") -> None:
        """Write what is held. A disk that is full is told once, and ends the file."""
        held, self._held, self._chars = self._held, [""], 0  # the next begins with a comma
        self._flush_at_s = time.monotonic() + _FLUSH_S
        if self._file.closed or os.getpid() != self._pid or (held == [""] and not end):
            return
        text = ",\n".join(held) + end
        piece = memoryview(zlib.compress(text.encode(), _LEVEL, _GZIP))
        try:
            while piece:
                piece = piece[self._file.write(piece) :]
        except OSError as exc:
            with contextlib.suppress(OSError):  # half a member would end every reader
                os.ftruncate(self._file.fileno(), self._whole_bytes)
            logger.warning(
                "the trace %s could not be written (%s) and ends here; training goes on",
                self.path,
                exc,
            )
            self._file.close()
        else:
            self._whole_bytes = self._file.tell()

    def finish(self) -> None:
        """Close the array. (Viewers take a file without the bracket too, after a crash.)"""
        self.flush(end="\n]\n")
        self._file.close()
