"""Writes to a pipe without ever waiting for its reader; in both processes.

A message that fits is written at once, in the calling thread. What does not is handed to a thread,
with all that follows it, until the pipe has taken everything.
"""

from __future__ import annotations

import os
import queue
import select
import threading
from multiprocessing import util
from multiprocessing.connection import Connection
from typing import Any


class Sender:
    """The only writer of ``connection``, which it keeps open.

    At the end of the process what is not written yet is waited for, as ``multiprocessing``'s
    queues do, unless :meth:`abandon` was called.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection  # closes the pipe when it goes
        self._fd = connection.fileno()
        os.set_blocking(self._fd, False)
        self._backlog: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._waiting = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._join: Any = None
        self._abandoned = False

    def send(self, parts: list[bytes | memoryview]) -> None:
        """Send these bytes as they follow each other."""
        with self._lock:
            if not self._waiting:
                try:
                    sent = os.writev(self._fd, parts)
                except BlockingIOError:
                    sent = 0
                except BrokenPipeError:  # main let go: it will say so, or is gone itself
                    return
                whole = sum(map(len, parts))
                if sent == whole:
                    return
                parts = [b"".join(parts)[sent:]]
            self._waiting += 1
        self._backlog.put(b"".join(parts))
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._drain, name="safeloader sender", daemon=True
            )
            self._thread.start()
            if not self._abandoned:
                self._join = util.Finalize(None, self._thread_ended, exitpriority=-5)

    def _drain(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        while (message := self._backlog.get()) is not None:
            rest = memoryview(message)
            try:
                while rest:
                    poll.poll()
                    try:
                        rest = rest[os.write(self._fd, rest) :]
                    except BlockingIOError:
                        continue
            except OSError:  # nobody reads any more
                return
            with self._lock:
                self._waiting -= 1

    def _thread_ended(self) -> None:
        assert self._thread is not None
        self._backlog.put(None)
        self._thread.join()

    def close(self) -> None:
        """Let go of the pipe."""
        self._connection.close()

    def abandon(self) -> None:
        """Do not wait, at the end of the process, for what is not written yet."""
        self._abandoned = True
        if self._join is not None:
            self._join.cancel()
