"""Where main waits: a death, a batch and the clock at once. Real processes, no loader."""

from __future__ import annotations

import multiprocessing
import os
import queue
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any

import pytest

from safeloader.supervision import receiver as module
from safeloader.supervision.receiver import (
    PinnedResultReceiver,
    ResultReceiver,
    TimedOut,
    WorkersDied,
)
from safeloader.transport.channel import ResultQueue
from safeloader.transport.slot_reader import Unpacker

BOUND_S = 30
SOON_S = 4.5  # a look a second tells; a busy machine takes longer
context = multiprocessing.get_context("fork")


def works(results: ResultQueue, worker: int, go: Any, then: Callable[[ResultQueue], None]) -> None:
    results.speak_as(worker, lambda: None)
    go.wait(BOUND_S)
    then(results)


class Pool:
    """Workers that do one thing each, once ``go`` is set."""

    def __init__(self, *deeds: Callable[[ResultQueue], None]) -> None:
        self.results = ResultQueue(len(deeds), Unpacker().opened)
        self.go = context.Event()
        self.told_to_end: set[int] = set()
        self.stalls: list[float] = []
        self.workers = [
            context.Process(target=works, args=(self.results, number, self.go, deed))
            for number, deed in enumerate(deeds)
        ]
        for worker in self.workers:
            worker.start()
        self.results.all_started()

    def inbox(
        self, *, pinned: bool = False, timeout_s: float = 0, stall_after_s: float = 0
    ) -> ResultReceiver:
        common = (
            self.results,
            self.workers,
            lambda worker: worker in self.told_to_end,
            timeout_s,
            stall_after_s,
            self.stalls.append,
        )
        if not pinned:
            return ResultReceiver(*common)
        self.over = threading.Event()
        out: queue.Queue[Any] = queue.Queue()
        self.thread = threading.Thread(target=self._carry, args=(out,))
        self.thread.start()
        return PinnedResultReceiver(out, self.thread, *common)

    def _carry(self, out: queue.Queue[Any]) -> None:
        while not self.over.is_set():
            try:
                out.put(self.results.get(timeout=0.05))
            except queue.Empty:
                continue

    def end(self) -> None:
        if hasattr(self, "over"):
            self.over.set()
            self.thread.join(BOUND_S)
        for worker in self.workers:
            worker.kill()
            worker.join(BOUND_S)
        self.results.close()


@pytest.fixture
def pools() -> Iterator[Callable[..., Pool]]:
    made: list[Pool] = []

    def make(*deeds: Callable[[ResultQueue], None]) -> Pool:
        made.append(Pool(*deeds))
        return made[-1]

    yield make
    for pool in made:
        pool.end()


def waits(results: ResultQueue) -> None:
    while True:
        signal.pause()


def dies(results: ResultQueue) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exits(results: ResultQueue) -> None:
    os._exit(3)


def speaks(results: ResultQueue) -> None:
    results.put((0, "word"))
    waits(results)


def speaks_and_dies(results: ResultQueue) -> None:
    results.put((0, "last word"))
    dies(results)


def leaves_a_child(results: ResultQueue) -> None:
    """The child keeps all descriptors of the worker, its sentinel among them."""
    parent = os.getpid()
    if os.fork():
        waits(results)
    os.kill(parent, signal.SIGKILL)
    until_closed = select.poll()
    until_closed.register(results._writers[0], 0)
    until_closed.poll(BOUND_S * 1000)
    os._exit(0)


both = pytest.mark.parametrize("pinned", [False, True])


def got(inbox: ResultReceiver) -> tuple[Any, float]:
    began = time.monotonic()
    try:
        return inbox.get(), time.monotonic() - began
    except (WorkersDied, TimedOut) as sign:
        return sign, time.monotonic() - began


@both
@pytest.mark.parametrize("how", [dies, exits])
def test_a_death_while_waiting_is_told_at_once(
    pools: Any,
    pinned: bool,
    how: Callable[[ResultQueue], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_LOOK_S", BOUND_S)  # its sentinel has to tell
    pool = pools(waits, how, waits)
    inbox = pool.inbox(pinned=pinned)
    ended: list[float] = []  # when; under coverage an exit takes its time

    def watch() -> None:
        connection.wait([pool.workers[1].sentinel], BOUND_S)
        ended.append(time.monotonic())

    watching = threading.Thread(target=watch)
    watching.start()
    pool.go.set()
    sign, _ = got(inbox)
    told = time.monotonic()
    watching.join()
    assert isinstance(sign, WorkersDied)
    assert sign.workers == (1,)
    assert told - ended[0] < 1
    assert pool.workers[1].exitcode in (3, -9)


@both
def test_those_that_die_together_are_told_together(pools: Any, pinned: bool) -> None:
    pool = pools(dies, waits, exits)
    pool.go.set()
    for worker in (0, 2):
        pool.workers[worker].join(BOUND_S)
    sign, _ = got(pool.inbox(pinned=pinned))
    assert isinstance(sign, WorkersDied)
    assert sign.workers == (0, 2)


@both
def test_one_that_takes_long_to_die_is_waited_for(
    pools: Any, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pools(waits, waits, waits)
    asked: list[int] = []

    def dying(pid: int) -> bool:
        """Worker 2 dies after it was asked about for the tenth time."""
        asked.append(pid)
        if asked.count(pool.workers[2].pid) == 10:
            pool.workers[2].kill()
            pool.workers[2].join(BOUND_S)
        return pid == pool.workers[2].pid

    monkeypatch.setattr(module, "is_dying", dying)
    pool.workers[1].kill()
    sign, seconds = got(pool.inbox(pinned=pinned))
    assert isinstance(sign, WorkersDied)
    assert sign.workers == (1, 2)
    assert seconds < SOON_S


@both
def test_one_that_never_comes_to_its_end_is_not(
    pools: Any, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pools(waits, waits)
    monkeypatch.setattr(module, "is_dying", lambda pid: True)
    pool.workers[1].kill()
    sign, seconds = got(pool.inbox(pinned=pinned))
    assert isinstance(sign, WorkersDied)
    assert sign.workers == (1,)
    assert seconds < SOON_S


@both
def test_what_has_come_is_handed_over_first(pools: Any, pinned: bool) -> None:
    pool = pools(speaks_and_dies)
    pool.go.set()
    pool.workers[0].join(BOUND_S)
    inbox = pool.inbox(pinned=pinned)
    assert got(inbox)[0] == (0, "last word")
    sign, seconds = got(inbox)
    assert isinstance(sign, WorkersDied)
    assert seconds < SOON_S


@both
def test_told_also_where_main_ignores_its_children(pools: Any, pinned: bool) -> None:
    """Then the kernel reaps them, and a process object says for ever that it is alive."""
    pool = pools(waits, dies)
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        pool.go.set()
        sign, seconds = got(pool.inbox(pinned=pinned))
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert isinstance(sign, WorkersDied)
    assert sign.workers == (1,)
    assert seconds < SOON_S
    pool.workers[1]._popen.returncode = -9  # nobody can wait for it any more


@both
def test_told_also_where_children_are_ignored_and_one_of_the_dead_lives_on(
    pools: Any, pinned: bool
) -> None:
    pool = pools(waits, leaves_a_child)
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        pool.go.set()
        sign, seconds = got(pool.inbox(pinned=pinned, timeout_s=5))
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert isinstance(sign, WorkersDied)
    assert sign.workers == (1,)
    assert seconds < SOON_S
    pool.workers[1]._popen.returncode = -9


@both
def test_told_also_where_a_child_of_the_dead_lives_on(pools: Any, pinned: bool) -> None:
    pool = pools(waits, leaves_a_child)
    pool.go.set()
    sign, seconds = got(pool.inbox(pinned=pinned))
    assert isinstance(sign, WorkersDied)
    assert sign.workers == (1,)
    assert seconds < SOON_S


@both
def test_an_end_that_was_ordered_is_no_death(pools: Any, pinned: bool) -> None:
    pool = pools(exits, speaks)
    pool.told_to_end.add(0)
    pool.go.set()
    pool.workers[0].join(BOUND_S)
    inbox = pool.inbox(pinned=pinned, timeout_s=1.5)
    assert got(inbox)[0] == (0, "word")
    assert isinstance(got(inbox)[0], TimedOut)


@both
def test_timeout(pools: Any, pinned: bool) -> None:
    pool = pools(waits)
    inbox = pool.inbox(pinned=pinned, timeout_s=0.3)
    for _ in range(2):  # one may go on waiting
        sign, seconds = got(inbox)
        assert isinstance(sign, TimedOut)
        assert 0.3 <= seconds < 1.5
    pool.workers[0].kill()
    pool.workers[0].join(BOUND_S)
    assert isinstance(got(inbox)[0], WorkersDied)  # before the timeout is looked at


@both
def test_a_stall_is_told_at_doubling_intervals(pools: Any, pinned: bool) -> None:
    pool = pools(waits)
    got(pool.inbox(pinned=pinned, timeout_s=2.6, stall_after_s=0.2))
    assert len(pool.stalls) == 4
    for said, due in zip(pool.stalls, [0.2, 0.4, 0.8, 1.6], strict=True):
        assert due <= said < 2 * due


class Clock:
    """Stands in for the clock; each stall report takes as long as it is told to."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


@both
def test_a_wait_in_which_the_clock_jumped(
    pools: Any, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program was stopped (Ctrl-Z) for some minutes while it waited, and goes on."""
    pool = pools(speaks)
    inbox = pool.inbox(pinned=pinned, stall_after_s=0.2)
    clock = Clock()
    monkeypatch.setattr(module, "monotonic", clock)

    def stalled(waited: float) -> None:
        pool.stalls.append(waited)
        if len(pool.stalls) == 1:
            clock.ahead = 300
        if waited > 300:
            pool.go.set()

    inbox._stalled = stalled  # type: ignore[method-assign]
    assert got(inbox)[0] == (0, "word")


def speaks_often(results: ResultQueue) -> None:
    for number in range(BOUND_S * 50):
        time.sleep(0.02)
        results.put((number, "word"))


@both
def test_a_death_is_told_also_while_others_are_busy(pools: Any, pinned: bool) -> None:
    """With ``in_order=False`` the living go on for the rest of the epoch."""
    pool = pools(speaks_often, dies)
    inbox = pool.inbox(pinned=pinned)
    pool.go.set()
    pool.workers[1].join(BOUND_S)
    while not (inbox._pinned.qsize() if pinned else inbox._results.poll.poll(1000)):  # type: ignore[attr-defined]
        time.sleep(0.01)  # main is busy until there is a message
    gave_up = time.monotonic() + 2
    sign = None
    while not isinstance(sign, WorkersDied) and time.monotonic() < gave_up:
        sign, _ = got(inbox)
    assert isinstance(sign, WorkersDied)


@both
def test_a_death_that_turns_out_to_be_an_end(pools: Any, pinned: bool) -> None:
    """A stream's worker said that it is at its end, and was killed before main had read it."""
    marked = context.Event()

    def speaks_later(results: ResultQueue) -> None:
        marked.wait(BOUND_S)
        results.put((1, "other word"))
        waits(results)

    pool = pools(speaks_and_dies, speaks_later)
    inbox = pool.inbox(pinned=pinned, timeout_s=3)
    pool.go.set()
    pool.workers[0].join(BOUND_S)
    assert got(inbox)[0] == (0, "last word")
    pool.told_to_end.add(0)  # as torch marks it then
    marked.set()
    assert got(inbox)[0] == (1, "other word")


def test_nobody_dies_twice(pools: Any) -> None:
    pool = pools(dies, waits)
    inbox = pool.inbox()
    pool.go.set()
    assert got(inbox)[0].workers == (0,)
    assert got(inbox)[0].workers == (0,)  # but is told again to who asks again
    pool.workers[1].kill()
    pool.workers[1].join(BOUND_S)
    assert got(inbox)[0].workers == (0, 1)


def test_a_pinning_thread_that_ended_is_left_to_torch_to_tell(pools: Any) -> None:
    pool = pools(waits)
    inbox = pool.inbox(pinned=True)
    pool.over.set()
    inbox._thread.join(BOUND_S)  # type: ignore[attr-defined]
    with pytest.raises(queue.Empty):
        inbox.get()


def test_mains_own_words_come_through(pools: Any) -> None:
    pool = pools(waits)
    inbox = pool.inbox()
    pool.results.put((None, None))
    assert inbox.get() == (None, None)
