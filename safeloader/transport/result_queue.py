"""The way back: one socket a worker, and no lock. Runs in: both.

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
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

from safeloader._python import assert_spawning
from safeloader.transport.leaves import Arrived, close_all
from safeloader.transport.messages import BatchMessage
from safeloader.transport.sender import MOST_FDS, Sender

_HEADER = struct.Struct("<qqq")  # task number, bytes of manifest, bytes of payload
_PLAIN = -1  # in place of the first: a pickled (number, data) of torch's own
_WITH_FDS = 1 << 62  # set in the last where descriptors come with it
_CHUNK = 1 << 18  # about what a socket holds
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_FDS_BYTES = socket.CMSG_SPACE(4 * MOST_FDS) if hasattr(socket, "CMSG_SPACE") else 0


class ResultQueue:
    """What torch's iterator, its workers and its pinning thread use of a queue, and no more.

    Args:
        workers: how many there are; each has a socket of its own.
        opened: makes of a message with a sealed batch what :meth:`get` gives. It is called again
            where an interrupt ended it.
        waits: is called before a message is waited for.
    """

    def __init__(
        self,
        workers: int,
        opened: Callable[[Arrived], Any],
        waits: Callable[[], None] = lambda: None,
    ) -> None:
        self._opened: Callable[[Arrived], Any] | None = opened
        self._waits = waits
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
        self._arrived: deque[Arrived] = deque()
        self._rows: dict[int, _Incoming] = {}
        self._reading: _Incoming | None = None  # an interrupt may have come in the middle of it
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
        if type(data) is BatchMessage:
            flag = _WITH_FDS if data.fds else 0
            head = _HEADER.pack(number, len(data.manifest), len(data.payload) | flag)
            self._sender.send([head, data.manifest, data.payload], data.fds)
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
        for incoming in self._rows.values():
            incoming.drop(self._arrived)
        for message in self._arrived:
            message.let_go()
        self._arrived.clear()
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
        """The next message that has come; ``queue.Empty`` is raised if there is none.

        It is the next one until the caller has it: an interrupt loses none.
        """
        if not self._arrived:
            raise queue.Empty
        message = self._arrived[0]
        if message.made is None:
            if message.number == _PLAIN:
                message.made = pickle.loads(message.manifest)
            else:
                assert self._opened is not None
                message.made = message.number, self._opened(message)
        message.let_go()
        made = message.made
        del self._arrived[0]  # without a call from here on no signal handler runs
        return made

    def wait(self, timeout: float | None) -> list[int]:
        """Read what has come; waits for it, for ``timeout`` seconds at most (None: for ever).

        Returns:
            The file descriptors registered by :meth:`also` that are ready.
        """
        self._waits()
        others: list[int] = []
        if self._reading is not None:
            self._reading.take_apart(self._arrived)
            self._reading = None
            if self._arrived:
                return others
        for fd, _ in self._poll.poll(None if timeout is None else max(0.0, timeout * 1000)):
            incoming = self._rows.get(fd)
            if incoming is None:
                others.append(fd)
                continue
            self._reading = incoming
            more = incoming.read_into(self._arrived)
            self._reading = None
            if not more:  # the worker's end is closed
                incoming.drop(self._arrived)
                self._poll.unregister(fd)
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
    """One worker's bytes and descriptors, put together to messages.

    A signal handler may raise between any two steps. So what was received is kept from within the
    call that receives it, and kept until the messages in it have been passed on; each step can be
    done again.
    """

    def __init__(self, end: socket.socket) -> None:
        self._receive = end.recvmsg
        self._pieces: list[Any] = []  # as ``recvmsg`` gave them, from the first open message on
        self._wanted = _HEADER.size  # bytes in all, before a message can be whole
        self._apart: tuple[Iterator[Arrived], list[Any], int] | None = None
        self._torn: list[int] = []  # descriptors of a message that will not be whole

    def read_into(self, arrived: deque[Arrived]) -> bool:
        """Read what is there; False at its end. Never waits: it is readable."""
        try:
            # In C from the system call to the list; for one piece.
            self._pieces.extend(map(self._receive, (_CHUNK,), (_FDS_BYTES,), (_CLOSE_ON_EXEC,)))
        except ConnectionResetError:
            return False
        return self.take_apart(arrived)

    def take_apart(self, arrived: deque[Arrived]) -> bool:
        """Pass on the messages that are whole; False if nothing comes after them."""
        if self._apart is None:
            pieces = self._pieces
            if sum([len(piece[0]) for piece in pieces]) >= self._wanted:
                self._apart = _taken_apart(pieces)
        if self._apart is not None:
            messages, rest, wanted = self._apart
            arrived.extend(messages)  # an iterator: what it gave it does not give again
            self._pieces, self._wanted, self._apart = rest, wanted, None
        return not self._pieces or len(self._pieces[-1][0]) > 0

    def drop(self, arrived: deque[Arrived]) -> None:
        """Pass on what is whole, and close the descriptors of a message that is not."""
        self.take_apart(arrived)
        torn = self._torn + [fd for piece in self._pieces for fd in _descriptors(piece)]
        self._torn, self._pieces = torn, []
        close_all(self._torn)


def _taken_apart(pieces: list[Any]) -> tuple[Iterator[Arrived], list[Any], int]:
    """The whole messages, the pieces that are left, and how many bytes these have to become."""
    data = pieces[0][0] if len(pieces) == 1 else b"".join([piece[0] for piece in pieces])
    # Truncated: no descriptor is free here.
    with_fds = [piece for piece in pieces if piece[1] or piece[2] & socket.MSG_CTRUNC]
    messages = []
    size, at, taken, wanted = len(data), 0, 0, _HEADER.size
    while size - at >= _HEADER.size:
        number, manifest, payload = _HEADER.unpack_from(data, at)
        has_fds, payload = payload & _WITH_FDS, payload & ~_WITH_FDS
        middle = at + _HEADER.size + manifest
        end = middle + payload
        if end > size:
            wanted = end - at
            break
        message = Arrived(number, data[at + _HEADER.size : middle], data[middle:end])
        if has_fds:
            message.fds = _descriptors(with_fds[taken])
            taken += 1
        messages.append(message)
        at = end
    rest = [(b"", *piece[1:]) for piece in with_fds[taken:]]
    if at < size:
        rest.append((data[at:], (), 0, None))
    return iter(messages), rest, wanted


def _descriptors(piece: Any) -> list[int]:
    return array.array("i", b"".join(data[: len(data) & ~3] for _, _, data in piece[1])).tolist()
