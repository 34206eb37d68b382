"""The two ways between main process and workers. Runs in: both.

::

    main ─── TaskQueue.put ───► pipe ───► TaskQueue.get: worker 0
    main ─── TaskQueue.put ───► pipe ───► TaskQueue.get: worker 1

    worker 0 ── put ──► socket ──┐
    worker 1 ── put ──► socket ──┼──► poll ──► ResultQueue.get: main, or torch's pinning thread
    main ────── put ──► socket ──┘

They stand where torch's iterator expects queues of ``multiprocessing``. Its queue of tasks wakes a
thread for each task, which then competes with the training loop. Its queue of results is shared by
all workers under a lock, so a worker killed while it writes stops the others for good, and leaves a
torn message on which the reader waits for ever (pytorch#21554). Here a worker's death can tear its
own message only, and main never waits for the rest of one: it reads what is there.

A message that fits is written at once, in the calling thread. A thread of the :class:`Sender`
writes the others, so nobody who sends waits for the reader. Batches arrive pickled already, and
with the descriptors of their tensors' memory beside them: what was sent whole can be opened,
whatever became of the worker.
"""

from __future__ import annotations

import array
import copyreg
import errno
import io
import math
import operator
import os
import pickle
import queue
import select
import socket
import struct
import sys
import threading
import time
from collections import ChainMap, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

from safeloader._python import DupFd, Finalize, assert_spawning, extra_reducers
from safeloader.transport.messages import BatchMessage, Task

MOST_FDS = 224  # in one message; Linux takes 253
PAUSE = "pause"  # to a worker in the place of a task: say how things are, and go on waiting
_LONGEST_S = 1e6  # of one ``poll``, which takes milliseconds as a C int
_WHILE_MS = 20  # a worker that has no task for longer has time to spare
_FULL = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS)  # later, perhaps
_BYTES = operator.itemgetter(0)  # of what one call of recvmsg gave
_HEADER = struct.Struct("<qqq")  # task number, bytes of manifest, bytes of payload
_PLAIN = -1  # in place of the first: a pickled (number, data) of torch's own
_WITH_FDS = 1 << 62  # set in the last where descriptors come with it
_CHUNK = 1 << 18  # about what a socket holds
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_FDS_BYTES = socket.CMSG_SPACE(4 * MOST_FDS) if hasattr(socket, "CMSG_SPACE") else 0


def close_all(fds: list[int]) -> None:
    """Close descriptors that nobody wants any more, and forget them.

    In C from taking one to closing it: a signal handler that raises can make it stop between two
    of them, but not have one leak, or closed twice.
    """
    deque(map(os.close, map(fds.pop, repeat(-1, len(fds)))), 0)


class Sender:
    """The only writer of ``end``, which it keeps open. It never waits for the reader.

    At the end of the process what is not written yet is waited for, as ``multiprocessing``'s
    queues do, unless :meth:`abandon` was called.
    """

    def __init__(self, end: Connection | socket.socket) -> None:
        self._end: Any = end
        self._fd = end.fileno()
        os.set_blocking(self._fd, False)
        # Messages that are not written whole: their parts, descriptors, and how many bytes went.
        self._backlog: deque[tuple[list[Any], list[int], list[int]]] = deque()
        self._lock = threading.Lock()  # held by whoever writes
        self._calls: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._join: Any = None
        self._abandoned = False

    def send(self, parts: list[Any], fds: Sequence[int] = ()) -> None:
        """Send these bytes as they follow each other, and the descriptors; hot path.

        A signal handler may raise between any two steps. A message that is in the backlog is sent
        whole: what an interrupt left of it goes before the next message.
        """
        with self._lock:
            self._backlog.append((parts, list(fds), []))
            if len(self._backlog) == 1 and self._written():
                return
        self._calls.put(True)
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._drain, name="safeloader sender", daemon=True
            )
            self._thread.start()
            if not self._abandoned:
                self._join = Finalize(None, self._thread_ended, exitpriority=-5)

    def _written(self) -> bool:
        """Write what goes now of the next message; whether it is done with. Hot path."""
        parts, fds, sent = self._backlog[0]
        try:
            # In C from the system call to the list.
            if fds:  # they cross beside the first byte
                beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                sent.extend(map(self._end.sendmsg, (parts,), (beside,)))
            else:
                sent.extend(map(os.writev, (self._fd,), (parts,)))
        except OSError as exc:
            if exc.errno in _FULL:
                return False
        else:
            if sum(sent) < sum(map(len, parts)):
                return False
        # It is sent, or main let go: main will say so, or is gone itself.
        if fds:
            close_all(fds)
        del self._backlog[0]
        return True

    def _drain(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        while self._calls.get():
            while self._backlog:
                poll.poll()
                with self._lock:
                    if not self._backlog:
                        break
                    parts, fds, sent = self._backlog[0]
                    if sent:
                        close_all(fds)
                        whole = parts[0] if len(parts) == 1 else b"".join(parts)
                        parts[:] = [memoryview(whole)[sum(sent) :]]
                        sent[:] = []
                    done = self._written()
                if not done and not sent:  # too many descriptors are under way
                    time.sleep(0.001)

    def _thread_ended(self) -> None:
        assert self._thread is not None
        self._calls.put(False)
        self._thread.join()

    def close(self) -> None:
        """Let go of the pipe, and of what is not written yet; what is sent from now on is lost."""
        with self._lock:  # the thread must not write to what has this number next
            while self._backlog:
                close_all(self._backlog.pop()[1])
            self._fd = -1
            self._end.close()
        self._calls.put(False)

    def abandon(self) -> None:
        """Do not wait, at the end of the process, for what is not written yet."""
        self._abandoned = True
        if self._join is not None:
            self._join.cancel()


class _PipeEnd(Connection):
    """An end of a pipe that is closed once.

    The collector finalises what a cycle holds in any order. A ``Connection`` closes its descriptor
    then and keeps the number; torch's iterator, finalised later, has it closed again, whosever file
    has that number by then.
    """

    def __del__(self) -> None:
        self.close()


class TaskQueue:
    """The way to one worker, and no thread: what torch's iterator and the worker use of a queue.

    Args:
        refused: is given a task that cannot be pickled and the exception; gives the task to send
            in its place.
    """

    _poll: select.poll | None = None  # of the class: a worker makes its own
    pauses: Callable[[bool], None] = staticmethod(lambda asked: None)
    """Of a worker, set there: is called where something else than a task comes, at the end of an
    epoch and where main asks."""
    waits: Callable[[], None] = staticmethod(lambda: None)
    """Of a worker, set there: is called where no task came for a while, before it waits on."""

    def __init__(self, refused: Callable[[Task, Exception], Task]) -> None:
        reader, writer = os.pipe()
        self._reader = _PipeEnd(reader, writable=False)
        self._sender = Sender(_PipeEnd(writer, readable=False))
        self._refused = refused

    def __getstate__(self) -> dict[str, Any]:
        assert_spawning(self)
        return {"_reader": DupFd(self._reader.fileno())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reader = _PipeEnd(state["_reader"].detach(), writable=False)

    def put(self, item: Any) -> None:
        """Send what torch's iterator has for the worker; hot path."""
        try:
            pickled = _pickled(item)
        except Exception as exc:
            number, task = item
            pickled = _pickled((number, self._refused(task, exc)))
        size = len(pickled)  # as `Connection.recv_bytes` has it
        head = size.to_bytes(4, "big") if size < 1 << 31 else b"\xff" * 4 + size.to_bytes(8, "big")
        self._sender.send([head, pickled])

    def get(self, timeout: float | None = None) -> Any:
        """The next task; in the worker.

        Raises:
            queue.Empty: if none came within ``timeout`` seconds.
        """
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self._reader, select.POLLIN)
        left = None if timeout is None else timeout * 1000
        if not self._poll.poll(_WHILE_MS if left is None else min(left, _WHILE_MS)):
            self.waits()
            if not self._poll.poll(left):
                raise queue.Empty
        item = pickle.loads(self._reader.recv_bytes())
        if type(item) is tuple:
            return item[0], Task(*item[1:])
        asked = item == PAUSE
        self.pauses(asked)
        if asked:
            raise queue.Empty  # torch asks again
        return item

    def cancel_join_thread(self) -> None:
        """Do not wait at this process's end for what is not sent yet."""
        self._sender.abandon()

    def close(self) -> None:
        """Let go of both ends."""
        self._reader.close()
        self._sender.close()


class _TaskPickler(pickle.Pickler):
    """That of ``multiprocessing``, which copies its tables for each message: that takes 2 µs."""

    # Live, and only read.
    dispatch_table: Any = ChainMap[Any, Any](extra_reducers, copyreg.dispatch_table)  # noqa: RUF012


def _pickled(item: Any) -> memoryview:
    buffer = io.BytesIO()
    # The fields of a task: its class takes as long to pickle as all of them.
    _TaskPickler(buffer).dump((item[0], *item[1]) if type(item) is tuple else item)
    return buffer.getbuffer()


class Arrived:
    """A message that came whole, until its batch is handed over; in main.

    A signal handler may raise between any two steps of opening it. So what a step takes belongs to
    the message until all are done, and each of them can be done again.

    Attributes:
        number: of the task.
        manifest, payload: as in :class:`~safeloader.transport.messages.BatchMessage`.
        fds: descriptors that came beside it.
        leases: the memory of each slot it lies in.
        brought: memory of its leaves so far, in the order of the pickle.
        made: what was made of it; None before.
    """

    fds: Any = ()  # of the class, not of each: most messages have none of these
    leases: Any = ()
    brought: Any = ()
    made: Any = None

    def __init__(self, number: int, manifest: Any, payload: Any) -> None:
        self.number = number
        self.manifest = manifest
        self.payload = payload

    def let_go(self) -> None:
        """Only what was made of it is wanted from now on; hot path."""
        if self.fds:
            close_all(self.fds)
        # An exception on its way may hold frames, and they this message.
        self.leases = self.brought = ()


class ResultQueue:
    """The way back: what torch's iterator, its workers and its pinning thread use of a queue.

    Args:
        workers: how many there are; each has a socket of its own.
        opened: makes of a message with a pickled batch what :meth:`get` gives. It is called again
            where an interrupt ended it.
        waits: is called before a message is waited for.

    Attributes:
        arrived: messages that came whole; always the same object.
        poll: what :meth:`wait` waits for; further file descriptors may be registered.
    """

    def __init__(
        self,
        workers: int,
        opened: Callable[[Arrived], Any],
        waits: Callable[[], None] = lambda: None,
    ) -> None:
        self._opened = opened
        self._waits = waits
        self._sent: Callable[[], None] = lambda: None
        self.arrived: deque[Arrived] = deque()
        self._rows: dict[int, _Incoming] = {}
        self._reading: _Incoming | None = None  # an interrupt may have come in the middle of it
        self._writers: list[socket.socket] = []
        self.poll = select.poll()
        for _ in range(workers + 1):  # the last is main's own
            reader, writer = socket.socketpair()
            self._rows[reader.fileno()] = _Incoming(reader)
            self._writers.append(writer)
            self.poll.register(reader, select.POLLIN)
        self._sender = Sender(writer)

    def __getstate__(self) -> dict[str, Any]:
        assert_spawning(self)
        return {"_writers": self._writers, "_rows": {}, "arrived": deque()}

    # in a worker ────────────────────────────────────────────────────────────────────────────────

    def speak_as(self, worker: int, sent: Callable[[], None]) -> None:
        """In a worker, before anything else: let go of every end but its own.

        ``sent`` is called after each message.
        """
        mine = self._writers.pop(worker)
        self.close()
        self._writers = [mine]
        self._sender = Sender(mine)
        self._sent = sent

    def put(self, item: Any) -> None:
        """Send what torch's worker loop, or its iterator in main, has to say; hot path."""
        number, data = item
        if type(data) is not BatchMessage:
            number, data = _PLAIN, BatchMessage(pickle.dumps(item), b"")
        manifest, payload, fds = data
        size = len(payload) | _WITH_FDS if fds else len(payload)
        head = _HEADER.pack(number, len(manifest), size)
        self._sender.send([head, manifest, payload], fds)
        self._sent()

    def cancel_join_thread(self) -> None:
        """Do not wait at this process's end for what is not sent yet."""
        self._sender.abandon()

    def close(self) -> None:
        """Let go of all ends, and of what came and nobody took."""
        for incoming in self._rows.values():
            incoming.close(self.arrived)
        for message in self.arrived:
            message.let_go()
        self.arrived.clear()
        for writer in self._writers:
            writer.close()
        self._writers, self._rows = [], {}
        self.poll = select.poll()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Also where there were descriptors for some alone. At exit names may be gone already, and
        # the system closes what is open.
        if "_writers" in self.__dict__ and not is_finalizing():
            self.close()

    # in main ────────────────────────────────────────────────────────────────────────────────────

    def all_started(self) -> None:
        """In main, once the workers have their ends: let go of these."""
        for writer in self._writers[:-1]:
            writer.close()

    def get(self, timeout: float | None = None) -> Any:
        """The next message: ``(number, data)``, a batch opened.

        Raises:
            queue.Empty: if none came within ``timeout`` seconds.
        """
        left = math.inf if timeout is None else timeout
        give_up = monotonic() + left
        while not self.arrived and left >= 0:
            self.wait(left)
            left = give_up - monotonic()
        return self.take()

    def take(self) -> Any:
        """The next message that has come; ``queue.Empty`` is raised if there is none. Hot path.

        It is the next one until the caller has it: an interrupt loses none.
        """
        if not self.arrived:
            raise queue.Empty
        message = self.arrived[0]
        made = message.made
        if made is None:
            if message.number == _PLAIN:
                made = pickle.loads(message.manifest)
            else:
                made = message.number, self._opened(message)
            message.made = made
        message.let_go()
        del self.arrived[0]  # without a call from here on no signal handler runs
        return made

    def wait(self, timeout: float) -> list[int]:
        """Read what has come; waits for it, for ``timeout`` seconds at most.

        Returns:
            The further file descriptors of :attr:`poll` that are ready.
        """
        self._waits()
        others: list[int] = []
        if self._reading is not None:
            self._reading.take_apart(self.arrived)
            self._reading = None
            if self.arrived:
                return others
        for fd, _ in self.poll.poll(1000 * min(timeout, _LONGEST_S)):
            incoming = self._rows.get(fd)
            if incoming is None:
                others.append(fd)
                continue
            self._reading = incoming
            if not incoming.read_into(self.arrived):  # the worker's end is closed
                self.poll.unregister(fd)
                incoming.close(self.arrived)
                del self._rows[fd]
            self._reading = None
        return others


class _Incoming:
    """One worker's bytes and descriptors, put together to messages.

    A signal handler may raise between any two steps. So what was received is kept from within the
    call that receives it, and kept until the messages in it have been passed on; each step can be
    done again.
    """

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self._pieces: list[Any] = []  # as ``recvmsg`` gave them, from the first open message on
        self._wanted = _HEADER.size  # bytes in all, before a message can be whole
        self._apart: tuple[Iterator[Arrived], list[Any], int] | None = None
        self._torn: list[int] = []  # descriptors of a message that will not be whole

    def read_into(self, arrived: deque[Arrived]) -> bool:
        """Read what is there; False at its end. Never waits: it is readable."""
        try:
            # In C from the system call to the list; for one piece.
            self._pieces.extend(map(self.end.recvmsg, (_CHUNK,), (_FDS_BYTES,), (_CLOSE_ON_EXEC,)))
        except ConnectionResetError:
            return False
        return self.take_apart(arrived)

    def take_apart(self, arrived: deque[Arrived]) -> bool:
        """Pass on the messages that are whole; False if nothing comes after them."""
        pieces = self._pieces
        if self._apart is None and sum(map(len, map(_BYTES, pieces))) >= self._wanted:
            self._apart = _taken_apart(pieces)
        if self._apart is not None:
            messages, rest, wanted = self._apart
            arrived.extend(messages)  # an iterator: what it gave it does not give again
            self._pieces, self._wanted, self._apart = rest, wanted, None
        return not self._pieces or len(self._pieces[-1][0]) > 0

    def close(self, arrived: deque[Arrived]) -> None:
        """Pass on what is whole; let go of the end, and of the descriptors of what is not."""
        self.take_apart(arrived)
        torn = self._torn + [fd for piece in self._pieces for fd in _descriptors(piece)]
        self._torn, self._pieces = torn, []
        close_all(self._torn)
        self.end.close()


def _taken_apart(pieces: list[Any]) -> tuple[Iterator[Arrived], list[Any], int]:
    """The whole messages, the pieces that are left, and how many bytes these have to become."""
    data = b"".join(map(_BYTES, pieces))
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
        messages.append(Arrived(number, data[at + _HEADER.size : middle], data[middle:end]))
        if has_fds:
            messages[-1].fds = _descriptors(with_fds[taken])
            taken += 1
        at = end
    rest: list[Any] = [(b"", *piece[1:]) for piece in with_fds[taken:]]
    if at < size:
        rest.append((data[at:], (), 0, None))
    return iter(messages), rest, wanted


def _descriptors(piece: Any) -> list[int]:
    return array.array("i", b"".join(data[: len(data) & ~3] for _, _, data in piece[1])).tolist()
