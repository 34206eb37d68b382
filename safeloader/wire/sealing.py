"""A batch is sealed in the worker and opened in main: pickled and loaded where errors can be told.

::

    Parcel ── seal ──► Sealed(papers, payload: bytes) ── the queue ──► opened ──► Parcel

Torch leaves the pickling to a thread of its queue. What cannot be pickled is printed there and
dropped, and main waits for ever (pytorch#142884). Papers and payload are pickled apart, so a batch
that cannot be loaded still says which one it was.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import threading
from collections.abc import Callable, Iterable
from multiprocessing import context
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import torch

from safeloader.wire.failure import Failure, failure_of
from safeloader.wire.records import FailedBatch, Papers, Parcel, asked_for
from safeloader.wire.sending import MOST_FDS
from safeloader.wire.shortage import shortage


class Sealed(NamedTuple):
    """A batch, pickled; ``fds`` are descriptors of its tensors' memory, and cross beside it."""

    papers: bytes
    payload: bytes
    fds: tuple[int, ...] = ()

    def opened(self) -> Parcel | FailedBatch:
        """The batch; a failure in its place if it cannot be loaded here."""
        papers = Papers(*pickle.loads(self.papers))
        passed.fds = list(self.fds)
        try:
            payload = pickle.loads(self.payload)
        except Exception as exc:
            return FailedBatch(papers, _not_opened(exc, papers))
        finally:
            close_all(fd for fd in passed.fds if fd >= 0)
        return Parcel(papers, payload)


def seal(papers: Papers, payload: Any) -> Sealed:
    """Pickle a batch as torch's queue would: tensors move into shared memory.

    Torch keeps a descriptor of each tensor's memory in the worker and has main fetch it from there,
    which a thread of the worker has to answer: it cannot while the worker is stopped, or stuck in C
    code that holds the interpreter, and it takes some 300 µs. Here they are sent along.

    Raises:
        Exception: whatever pickling raises.
    """
    packed = pickle.dumps(tuple(papers), pickle.HIGHEST_PROTOCOL)
    buffer = io.BytesIO()
    # The queue's pickler and its protocol: 5 would hand on read-only arrays.
    pickler: Any = ForkingPickler(buffer)
    taken = _Taken(pickler.dispatch_table[torch.UntypedStorage])
    pickler.dispatch_table[torch.UntypedStorage] = taken.reduce
    try:
        pickler.dump(payload)
    except _TooMany:  # torch's way, then
        close_all(taken.fds)
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(payload)
        return Sealed(packed, buffer.getvalue())
    except BaseException:
        close_all(taken.fds)
        raise
    return Sealed(packed, buffer.getvalue(), tuple(taken.fds))


class _TooMany(Exception):
    """More tensors than a message may have descriptors."""


class _Taken:
    """Descriptors of tensors' memory, taken along with a batch.

    Torch's own reducer is asked; it passes a descriptor the way that suits the moment, and while a
    process is being started that is by number. The moment is made to look like that, for one call
    and this thread alone.

    It must not hold the pickler, which holds it, and every tensor of the batch: their memory would
    wait for the garbage collector.
    """

    def __init__(self, reduce: Callable[[Any], Any]) -> None:
        self._reduce = reduce
        self.fds: list[int] = []

    def reduce(self, storage: torch.UntypedStorage) -> Any:
        """What ``copyreg`` wants to know of a storage."""
        before = context.get_spawning_popen()
        context.set_spawning_popen(self)  # type: ignore[arg-type]
        try:
            return self._reduce(storage)
        finally:
            context.set_spawning_popen(before)

    def duplicate_for_child(self, fd: int) -> int:
        """Take a descriptor along; its number in the message."""
        if len(self.fds) == MOST_FDS:
            raise _TooMany
        self.fds.append(os.dup(fd))
        return len(self.fds) - 1

    def DupFd(self, number: int) -> _Passed:
        """What stands for the descriptor in the pickle."""
        return _Passed(number)


class _Passed:
    """A descriptor that crossed beside the message."""

    def __init__(self, number: int) -> None:
        self._number = number

    def detach(self) -> int:
        """The descriptor, which is the caller's from now on."""
        if self._number >= len(passed.fds):
            raise OSError(errno.EMFILE, "a tensor's file descriptor was lost on the way")
        fd, passed.fds[self._number] = passed.fds[self._number], -1
        return fd


class _PassedFds(threading.local):
    """Descriptors of the batch that this thread is opening."""

    fds: list[int]


passed = _PassedFds()


def close_all(fds: Iterable[int]) -> None:
    """Let go of descriptors that nobody wants any more."""
    for fd in fds:
        os.close(fd)


WORKER_GONE = (ConnectionError, EOFError, FileNotFoundError)  # the tensors' memory went with it


def _not_opened(exc: Exception, papers: Papers) -> Failure:
    known = asked_for(papers)
    found = shortage(exc)
    if found is None:
        found = (
            "the batch was pickled in the worker and could not be loaded in the main process\n"
            "pickle.loads(pickle.dumps(batch)) repeats it: make what the dataset or collate_fn "
            "gives picklable both ways, or plain tensors, numbers, strings and containers of them"
        )
    return failure_of(
        exc,
        phase="transport",
        where="while loading a batch in the main process",
        index=known[0] if len(known) == 1 else None,
        position=0 if len(known) == 1 else None,
        indices=known,
        worker_id=papers.worker_id,
        pid=papers.pid,
        hint=found,
    )
