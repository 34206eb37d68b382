"""Waits for batches, and notices that a worker died or that none comes. Runs in: main.

Stands where torch's iterator expects the queue it reads from. It waits for a batch, a worker's
death and the clock at once, so none is found by polling, and no thread or signal takes part.
"""

from __future__ import annotations

import queue
import select
import threading
import time
from collections.abc import Callable, Collection, Sequence
from multiprocessing import Process
from time import monotonic
from typing import Any

from safeloader.supervision.processes import is_dying, is_gone
from safeloader.transport.channel import ResultQueue

_LOOK_S = 1.0  # between two looks at the workers, for a death that no sentinel tells
_PINNED_LOOK_S = 0.1  # between two looks at the sentinels: a queue of threads cannot be polled
_PINNED_GRACE_S = 0.5  # the pinning thread has this long to pass on what a dead worker sent
_TOGETHER_S = 0.15  # workers that die this close to each other are told in one error
_DYING_S = 1.0  # a worker that is dying, and not dead yet, is waited for so long


class WorkersDied(BaseException):
    """Workers ended that should not have; passes through torch's ``except Exception``."""

    def __init__(self, workers: tuple[int, ...]) -> None:
        super().__init__(workers)
        self.workers = workers


class TimedOut(BaseException):
    """No batch came within the loader's ``timeout``."""


class ResultReceiver:
    """Waits for messages of workers.

    Args:
        results: what the workers write to.
        workers: their processes, in order.
        ended: whether worker ``w`` was told to end.
        timeout_s: seconds without a message after which :class:`TimedOut` is raised; 0: never.
        stall_after_s: seconds without a message after which ``stalled`` is called, and again at
            doubling intervals; 0: never.
        stalled: is given the seconds waited.
        poll: what the workers' sentinels are registered with; by default that of ``results``.
    """

    def __init__(
        self,
        results: ResultQueue,
        workers: Sequence[Process],
        ended: Callable[[int], bool],
        timeout_s: float,
        stall_after_s: float,
        stalled: Callable[[float], None],
        *,
        poll: select.poll | None = None,
    ) -> None:
        self._results = results
        self._workers = workers
        self._ended = ended
        self._timeout_s = timeout_s or float("inf")
        self._stall_after_s = stall_after_s or float("inf")
        self._stalled = stalled
        self._poll = results.poll if poll is None else poll
        self._watched = {worker.sentinel: number for number, worker in enumerate(workers)}
        self._gone: set[int] = set()
        self._gone_since = 0.0
        self._at_hand: Collection[Any] = results.arrived
        for sentinel in self._watched:
            self._poll.register(sentinel, select.POLLIN)

    def get(self, timeout: float | None = None) -> Any:
        """The next message; torch's ``timeout`` is not used, the loader's is. Hot path.

        Raises:
            WorkersDied: if none is at hand, and a worker ended that was not told to.
            TimedOut: if none came in time.
        """
        if self._at_hand:
            return self._results.take()
        began = monotonic()
        warn_s = self._stall_after_s
        waited = looked_s = 0.0
        while True:
            due = max(0.0, min(_LOOK_S, warn_s - waited, self._timeout_s - waited))
            try:
                return self._receive(due)
            except queue.Empty:
                waited = monotonic() - began
                if self._gone or waited - looked_s >= _LOOK_S:  # not for each part of a message
                    looked_s = waited
                    self._look_after_workers()
            if waited >= self._timeout_s:
                raise TimedOut
            if waited >= warn_s:
                self._stalled(waited)
                warn_s *= 2

    def _receive(self, seconds: float) -> Any:
        """The next message, if it comes within ``seconds``; else ``queue.Empty`` is raised."""
        if self._left_behind():  # found dead together with a message
            raise queue.Empty
        for sentinel in self._results.wait(seconds):
            self._ended_now(sentinel)
        return self._results.take()

    def _ended_now(self, sentinel: int) -> None:
        self._poll.unregister(sentinel)
        number = self._watched[sentinel]
        if not self._ended(number):
            self._workers[number].join(1.0)  # its pipes close just before it can be waited for
            if not self._gone:
                self._gone_since = monotonic()
            self._gone.add(number)
        del self._watched[sentinel]  # last: after an interrupt each of these is looked at again

    def _left_behind(self) -> bool:
        """Whether a worker that is gone was not told to end; it may have been since."""
        if self._gone:
            self._gone = {number for number in self._gone if not self._ended(number)}
        return bool(self._gone)

    def _look_after_workers(self) -> None:
        """Raise if a worker is dead. Seldom a child of the dead one keeps its sentinel open."""
        if self._dead():
            give_up = monotonic() + _DYING_S
            time.sleep(_TOGETHER_S)
            while self._dying() and monotonic() < give_up:
                time.sleep(0.01)
            raise WorkersDied(self._dead())

    def _dying(self) -> bool:
        """Whether further workers are about to be dead, as two are that were killed at once."""
        left = (self._workers[n] for n in self._watched.values() if not self._ended(n))
        return any(w.is_alive() and w.pid is not None and is_dying(w.pid) for w in left)

    def _dead(self) -> tuple[int, ...]:
        watched = [(n, self._workers[n]) for n in self._watched.values()]
        silent = {n for n, w in watched if not w.is_alive() or (w.pid and is_gone(w.pid))}
        return tuple(sorted(n for n in self._gone | silent if not self._ended(n)))


class PinnedResultReceiver(ResultReceiver):
    """The same behind torch's pinning thread, which reads the workers' pipes and fills a queue."""

    def __init__(self, pinned: queue.Queue[Any], thread: threading.Thread, *args: Any) -> None:
        self._pinned = pinned
        self._thread = thread
        super().__init__(*args, poll=select.poll())
        self._at_hand = ()  # the thread takes them

    def _receive(self, seconds: float) -> Any:
        for sentinel, _ in self._poll.poll(0):
            self._ended_now(sentinel)
        if self._left_behind() and monotonic() - self._gone_since > _PINNED_GRACE_S:
            raise queue.Empty  # although others go on speaking
        return self._pinned.get(timeout=min(seconds, _PINNED_LOOK_S))

    def _look_after_workers(self) -> None:
        super()._look_after_workers()
        if not self._thread.is_alive():
            raise queue.Empty  # torch finds it gone, and says so
