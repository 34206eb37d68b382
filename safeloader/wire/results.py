"""The way back: one socket a worker, from each worker's ``put`` to main's ``get``. No lock.

::

    worker 0 ── put ──► socket ──┐
    worker 1 ── put ──► socket ──┼──► poll ──► get: main, or torch's pinning thread
    main ─────── put ──► socket ─┘

It stands where torch's iterator expects a ``multiprocessing.Queue``. That one is shared by all
workers under a lock, so one killed while it writes stops the others for good, and leaves a torn
message on which the reader waits for ever (pytorch#21554). Here a worker's death can tear its own
message only, and main never waits for the rest of one: it reads what is there.

A message that fits is written at once, in the worker's main thread. What does not is handed to a
thread, so the worker goes on while main is busy; with torch's queue every message is. Batches
arrive sealed, pickled already, and with the descriptors of their tensors' memory beside them: what
was sent whole can be opened, whatever became of the worker.
"""

from __future__ import annotations

import array
import pickle
import queue
import select
import socket
import struct
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

from safeloader._python import assert_spawning
from safeloader.wire.leaves import close_all
from safeloader.wire.sealing import Sealed
from safeloader.wire.sending import MOST_FDS, Sender

_HEADER = struct.Struct("<qqq")  # task number, bytes of papers, bytes of payload
_PLAIN = -1  # in place of the first: a pickled (number, data) of torch's own
_WITH_FDS = 1 << 62  # set in the last where descriptors come with it
_CHUNK = 1 << 18  # about what a socket holds
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_FDS_BYTES = socket.CMSG_SPACE(4 * MOST_FDS) if hasattr(socket, "CMSG_SPACE") else 0


class ResultQueue:
    """What torch's iterator, its workers and its pinning thread use of a queue, and no more.

    Args:
        workers: how many there are; each has a socket of its own.
        opened: makes of a sealed batch what :meth:`get` gives.
    """

    def __init__(self, workers: int, opened: Callable[[Sealed], Any]) -> None:
        self._opened: Callable[[Sealed], Any] | None = opened
        self._readers: list[socket.socket] = []
        self._writers: list[socket.socket | None] = []
        for _ in range(workers + 1):  # the last is main's own
            reader, writer = socket.socketpair()
            self._readers.append(reader)
            self._writers.append(writer)
        self._main_side()

    def _main_side(self) -> None:
        self._sender: Sender | None = None
        self._sent: Callable[[], None] | None = None
        self._arrived: deque[Any] = deque()
        self._rows: dict[int, _Incoming] = {}
        self._poll = select.poll()
        for reader in self._readers:
            self._rows[reader.fileno()] = _Incoming(reader)
            self._poll.register(reader, select.POLLIN)

    def __getstate__(self) -> dict[str, Any]:
        assert_spawning(self)
        return {"writers": self._writers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._readers = []
        self._opened = None
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
            flag = _WITH_FDS if data.fds else 0
            head = _HEADER.pack(number, len(data.papers), len(data.payload) | flag)
            self._sender.send([head, data.papers, data.payload], data.fds)
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
        """Let go of all ends, and of what came and nobody took."""
        for *_, fds in self._arrived:
            close_all(fds)
        self._arrived.clear()
        for incoming in self._rows.values():
            incoming.drop()
        for end in (*self._readers, *self._writers):
            if end is not None:
                end.close()
        self._readers, self._writers, self._rows = [], [], {}
        self._poll = select.poll()

    def __del__(self) -> None:
        if "_arrived" in self.__dict__:
            self.close()

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
        give_up = None if timeout is None else monotonic() + timeout
        while not self._arrived:
            left = None if give_up is None else give_up - monotonic()
            self.wait(left if block else 0)
            if not block or (left is not None and left <= 0):
                break
        return self.take()

    def take(self) -> Any:
        """The next message that has come; ``queue.Empty`` is raised if there is none."""
        if not self._arrived:
            raise queue.Empty
        number, papers, payload, fds = self._arrived.popleft()
        if number == _PLAIN:
            return pickle.loads(papers)
        assert self._opened is not None
        return number, self._opened(Sealed(papers, payload, fds))

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
                self._rows.pop(fd).drop()
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
    """One worker's bytes and descriptors, put together to messages."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._held = bytearray()
        self._fds: deque[tuple[int, ...]] = deque()  # of a message each, as they came

    def read_into(self, arrived: deque[Any]) -> bool:
        """Read what is there; False at its end. Never waits: it is readable."""
        try:
            chunk, beside, flags, _ = self._end.recvmsg(_CHUNK, _FDS_BYTES, _CLOSE_ON_EXEC)
        except ConnectionResetError:
            return False
        if not chunk:
            return False
        if beside or flags & socket.MSG_CTRUNC:  # truncated: no descriptor is free here
            came = array.array("i", b"".join(data[: len(data) & ~3] for _, _, data in beside))
            self._fds.append(tuple(came))
        held = self._held
        data: bytes | bytearray = chunk
        if held:
            held += chunk
            data = held
        size = len(data)
        at = 0
        while size - at >= _HEADER.size:
            number, papers, payload = _HEADER.unpack_from(data, at)
            with_fds, payload = payload & _WITH_FDS, payload & ~_WITH_FDS
            end = at + _HEADER.size + papers + payload
            if end > size:
                break
            middle = at + _HEADER.size + papers
            fds = self._fds.popleft() if with_fds else ()
            arrived.append((number, data[at + _HEADER.size : middle], data[middle:end], fds))
            at = end
        if data is held:
            del held[:at]
        elif at < size:
            held += memoryview(chunk)[at:]
        return True

    def drop(self) -> None:
        """Let go of descriptors whose message never came whole."""
        for fds in self._fds:
            close_all(fds)
        self._fds.clear()
