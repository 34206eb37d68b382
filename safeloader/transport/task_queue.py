"""The way there: a pipe for each worker, and no thread. Runs in: both.

It stands where torch's iterator expects the ``multiprocessing.Queue`` by which it gives a worker
its tasks. That one wakes a thread for each task, which then competes with the training loop.
"""

from __future__ import annotations

import queue
import select
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any

from safeloader._python import ForkingPickler, assert_spawning
from safeloader.transport.messages import Task
from safeloader.transport.sender import Sender


class TaskQueue:
    """What torch's iterator and one worker use of a queue, and no more.

    Args:
        refused: is given a task that cannot be pickled and the exception; gives the task to send
            in its place.
    """

    def __init__(self, refused: Callable[[Task, Exception], Task]) -> None:
        reader, writer = Pipe(duplex=False)
        self._reader: Connection | None = reader
        self._sender: Sender | None = Sender(writer)
        self._refused = refused
        self._poll: select.poll | None = None

    def __getstate__(self) -> dict[str, Any]:
        assert_spawning(self)
        return {"_reader": self._reader, "_sender": None, "_poll": None}

    def put(self, item: Any) -> None:
        """Send what torch's iterator has for the worker."""
        if self._sender is None:
            return  # closed
        try:
            pickled = ForkingPickler.dumps(item)
        except Exception as exc:
            number, task = item
            pickled = ForkingPickler.dumps((number, self._refused(task, exc)))
        size = len(pickled)
        head = size.to_bytes(4, "big") if size < 1 << 31 else b"\xff\xff\xff\xff"
        more = b"" if size < 1 << 31 else size.to_bytes(8, "big")
        self._sender.send([head + more, pickled])  # as ``Connection.recv_bytes`` reads it

    def get(self, timeout: float | None = None) -> Any:
        """The next task; in the worker.

        Raises:
            queue.Empty: if none came within ``timeout`` seconds.
        """
        assert self._reader is not None
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self._reader, select.POLLIN)
        if not self._poll.poll(None if timeout is None else timeout * 1000):
            raise queue.Empty
        return ForkingPickler.loads(self._reader.recv_bytes())

    def cancel_join_thread(self) -> None:
        """Do not wait at this process's end for what is not sent yet."""
        if self._sender is not None:
            self._sender.abandon()

    def close(self) -> None:
        """Let go of both ends."""
        if self._reader is not None:
            self._reader.close()
        if self._sender is not None:
            self._sender.close()
        self._reader = self._sender = None
