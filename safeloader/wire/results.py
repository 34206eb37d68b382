"""The way back: one pipe a worker, from each worker's ``put`` to main's ``get``. No lock.

::

    worker 0 ── put ──► pipe 0 ──┐
    worker 1 ── put ──► pipe 1 ──┼──► poll ──► get: main, or torch's pinning thread
    main ─────── put ──► pipe 2 ─┘

It stands where torch's iterator expects a ``multiprocessing.Queue``. That one is shared by all
workers under a lock, so one killed while it writes stops the others for good, and leaves a torn
message on which the reader waits for ever (pytorch#21554). Here a worker's death can tear its own
pipe only, and main never waits for the rest of a message: it reads what is there.

A message that fits into its pipe is written at once, in the worker's main thread. What does not is
handed to a thread, so the worker goes on while main is busy; with torch's queue every message
is. Batches arrive sealed, pickled already: what cannot be pickled is known before it is sent.
"""

from __future__ import annotations

import os
import pickle
import queue
import select
import struct
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from multiprocessing.context import assert_spawning
from typing import Any

from safeloader.wire.sealing import Sealed
from safeloader.wire.sending import Sender

_HEADER = struct.Struct("<qqq")  # task number, bytes of papers, bytes of payload
_PLAIN = -1  # in place of the first: a pickled (number, data) of torch's own
_CHUNK = 1 << 16  # what a pipe holds


class ResultQueue:
    """What torch's iterator, its workers and its pinning thread use of a queue, and no more.

    Args:
        workers: how many there are; each has a pipe of its own.
    """

    def __init__(self, workers: int) -> None:
        pipes = [Pipe(duplex=False) for _ in range(workers + 1)]  # the last is main's own
        self._readers: list[Connection] = [reader for reader, _ in pipes]
        self._writers: list[Connection | None] = [writer for _, writer in pipes]
        self._main_side()

    def _main_side(self) -> None:
        self._sender: Sender | None = None
        self._sent: Callable[[], None] | None = None
        self._arrived: deque[Any] = deque()
        self._rows: dict[int, _Incoming] = {}
        self._poll = select.poll()
        for reader in self._readers:
            self._rows[reader.fileno()] = _Incoming(reader.fileno())
            self._poll.register(reader, select.POLLIN)

    def __getstate__(self) -> dict[str, Any]:
        assert_spawning(self)
        return {"writers": self._writers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._readers = []
        self._writers = state["writers"]
        self._main_side()

    # in a worker ────────────────────────────────────────────────────────────────────────────────

    def speak_as(self, worker: int, sent: Callable[[], None]) -> None:
        """In a worker, before anything else: let go of every end but its own.

        ``sent`` is called after each message.
        """
        for reader in self._readers:
            reader.close()
        for row, writer in enumerate(self._writers):
            if row != worker and writer is not None:
                writer.close()
        mine = self._writers[worker]
        assert mine is not None
        self._readers, self._writers = [], [mine]
        self._sender = Sender(mine)
        self._sent = sent

    def put(self, item: Any) -> None:
        """Send what torch's worker loop, or its iterator in main, has to say."""
        if self._sender is None:
            mine = self._writers[-1]
            assert mine is not None
            self._sender = Sender(mine)
        number, data = item
        if type(data) is Sealed:
            head = _HEADER.pack(number, len(data.papers), len(data.payload))
            self._sender.send([head, data.papers, data.payload])
        else:
            pickled = pickle.dumps(item)
            self._sender.send([_HEADER.pack(_PLAIN, len(pickled), 0), pickled])
        if self._sent is not None:
            self._sent()

    def cancel_join_thread(self) -> None:
        """Do not wait at this process's end for what is not sent yet."""
        if self._sender is not None:
            self._sender.abandon()

    def close(self) -> None:
        """Let go of all ends."""
        for end in (*self._readers, *self._writers):
            if end is not None:
                end.close()
        self._readers, self._writers, self._rows = [], [], {}
        self._poll = select.poll()

    # in main ────────────────────────────────────────────────────────────────────────────────────

    def all_started(self) -> None:
        """In main, once the workers have their ends: let go of these."""
        for row, writer in enumerate(self._writers[:-1]):
            if writer is not None:
                writer.close()
                self._writers[row] = None

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next message: ``(number, data)``, a batch opened.

        Raises:
            queue.Empty: if none came within ``timeout`` seconds.
        """
        if not self._arrived:
            self.wait(timeout if block else 0)
        return self.take()

    def take(self) -> Any:
        """The next message that has come; ``queue.Empty`` is raised if there is none."""
        if not self._arrived:
            raise queue.Empty
        number, papers, payload = self._arrived.popleft()
        if number == _PLAIN:
            return pickle.loads(papers)
        return number, Sealed(papers, payload).opened()

    def wait(self, timeout: float | None) -> list[int]:
        """Read what has come; waits for it, for ``timeout`` seconds at most (None: for ever).

        Returns:
            The file descriptors registered by :meth:`also` that are ready.
        """
        others = []
        for fd, _ in self._poll.poll(None if timeout is None else max(0.0, timeout * 1000)):
            incoming = self._rows.get(fd)
            if incoming is None:
                others.append(fd)
            elif not incoming.read_into(self._arrived):
                self._poll.unregister(fd)  # the worker's end is closed
                del self._rows[fd]
        return others

    @property
    def has_arrived(self) -> bool:
        """Whether a whole message is at hand."""
        return bool(self._arrived)

    def also(self, fd: int) -> None:
        """Have :meth:`wait` wake up for ``fd`` too."""
        self._poll.register(fd, select.POLLIN)

    def no_longer(self, fd: int) -> None:
        """Undo :meth:`also`."""
        self._poll.unregister(fd)


class _Incoming:
    """One pipe's bytes, put together to messages."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._held = bytearray()

    def read_into(self, arrived: deque[Any]) -> bool:
        """Read what is there; False at the pipe's end. Never waits: the pipe is readable."""
        chunk = os.read(self._fd, _CHUNK)
        if not chunk:
            return False
        held = self._held
        data: bytes | bytearray = chunk
        if held:
            held += chunk
            data = held
        size = len(data)
        at = 0
        while size - at >= _HEADER.size:
            number, papers, payload = _HEADER.unpack_from(data, at)
            end = at + _HEADER.size + papers + payload
            if end > size:
                break
            middle = at + _HEADER.size + papers
            arrived.append((number, data[at + _HEADER.size : middle], data[middle:end]))
            at = end
        if data is held:
            del held[:at]
        elif at < size:
            held += memoryview(chunk)[at:]
        return True
