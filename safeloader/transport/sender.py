"""Writes to a pipe or socket and never waits for its reader. Runs in: both.

A message that fits is written at once, in the calling thread. What does not is handed to a thread,
with all that follows it, until everything is written. File descriptors cross beside the first byte
of their message.
"""

from __future__ import annotations

import array
import errno
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from safeloader._python import Finalize

MOST_FDS = 200  # in one message; Linux takes 253
_FULL = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS)  # later, perhaps


class Sender:
    """The only writer of ``end``, which it keeps open.

    At the end of the process what is not written yet is waited for, as ``multiprocessing``'s
    queues do, unless :meth:`abandon` was called.
    """

    def __init__(self, end: Connection | socket.socket) -> None:
        self._end = end
        self._fd = end.fileno()
        os.set_blocking(self._fd, False)
        self._backlog: queue.SimpleQueue[tuple[bytes, Sequence[int]] | None] = queue.SimpleQueue()
        self._waiting = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._join: Any = None
        self._abandoned = False

    def send(self, parts: Sequence[bytes | memoryview], fds: Sequence[int] = ()) -> None:
        """Send these bytes as they follow each other; ``fds`` are closed once they are sent."""
        with self._lock:
            if not self._waiting:
                try:
                    sent = self._write(parts, fds)
                except OSError:  # main let go: it will say so, or is gone itself
                    _close(fds)
                    return
                if sent:
                    _close(fds)
                    fds = ()
                if sent == sum(map(len, parts)):
                    return
                parts = [b"".join(parts)[sent:]]
            self._waiting += 1
        self._backlog.put((b"".join(parts), fds))
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._drain, name="safeloader sender", daemon=True
            )
            self._thread.start()
            if not self._abandoned:
                self._join = Finalize(None, self._thread_ended, exitpriority=-5)

    def _write(self, parts: Sequence[bytes | memoryview], fds: Sequence[int]) -> int:
        """Write what goes now; how many bytes that were."""
        try:
            if not fds:
                return os.writev(self._fd, parts)
            assert isinstance(self._end, socket.socket)
            beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            return self._end.sendmsg(parts, beside)
        except OSError as exc:
            if exc.errno in _FULL:
                return 0
            raise

    def _drain(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        while (item := self._backlog.get()) is not None:
            message, fds = item
            rest = memoryview(message)
            try:
                while rest:
                    poll.poll()
                    sent = self._write([rest], fds)
                    if sent:
                        _close(fds)
                        fds = ()
                        rest = rest[sent:]
                    else:  # too many descriptors are under way
                        time.sleep(0.001)
            except OSError:  # nobody reads any more
                _close(fds)
                return
            with self._lock:
                self._waiting -= 1

    def _thread_ended(self) -> None:
        assert self._thread is not None
        self._backlog.put(None)
        self._thread.join()

    def close(self) -> None:
        """Let go of the pipe."""
        self._end.close()

    def abandon(self) -> None:
        """Do not wait, at the end of the process, for what is not written yet."""
        self._abandoned = True
        if self._join is not None:
            self._join.cancel()


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
