"""No message and no descriptor is lost whenever a handler raises, and none is closed twice."""

from __future__ import annotations

import array
import os
import queue
import socket
from typing import Any

import numpy as np
import pytest
import torch

from safeloader.supervision import receiver as inbox_module
from safeloader.supervision.receiver import ResultReceiver, WorkersDied
from safeloader.transport.channel import _HEADER, _WITH_FDS, ResultQueue, TaskQueue, close_all
from safeloader.transport.messages import Task
from safeloader.transport.slot_table import FREE
from tests.interrupts import at_every_moment
from tests.unit.test_receiver import BOUND_S, Pool, dies, waits
from tests.wired import KB, Wired, descriptors, filled

RECEIVING = (
    "transport/channel.py",
    "transport/leaves.py",
    "transport/slot_reader.py",
    "supervision/receiver.py",
)


BATCHES: list[Any] = [  # of every way to cross
    torch.arange(6),  # within the message
    filled(10 * KB, 1).share_memory_(),  # in torch's own way
    [filled(20 * KB, 2), np.full(20 * KB, 4, np.uint8)],  # in a slot
    bytes(300_000),  # in parts
    [filled(10 * KB, 5).share_memory_(), np.full(20 * KB, 6, np.uint8)],
]


def put_batches(wired: Wired, results: ResultQueue) -> list[Any]:
    """Send them; what is to come."""
    for number, batch in enumerate(BATCHES):
        wired.begin()
        results.put((number, wired.seal(batch)))
    results.put((len(BATCHES), "plain"))
    return [*BATCHES, "plain"]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor | np.ndarray):
        return bool((np.asarray(one) == np.asarray(other)).all())
    return bool(one == other)


@pytest.mark.slow
def test_every_message_comes_once_and_no_descriptor_stays() -> None:
    inbox: Any = None
    came: list[Any] = []
    sent: list[Any] = []

    def receive() -> None:
        while len(came) < len(sent):
            came.append(inbox.get())

    before = moments = 0
    for run in at_every_moment(receive, *RECEIVING):
        moments += 1
        came.clear()
        wired = Wired()
        results = ResultQueue(0, wired.unpacker.opened)
        sent[:] = put_batches(wired, results)
        inbox = ResultReceiver(results, [], lambda worker: False, 5, 0, print)
        run()
        assert [number for number, _ in came] == list(range(len(sent)))
        for (_, made), batch in zip(came, sent, strict=True):
            assert equal(getattr(made, "payload", made), batch)
        del made, batch
        came.clear()
        sent.clear()
        assert set(wired.states) == {FREE}  # nothing keeps a slot
        results.close()
        inbox = results = wired = None  # they hold descriptors
        before = before or descriptors()  # torch opens one of its own, once
        assert descriptors() == before
    assert moments > 300


def torn_message(results: ResultQueue, fds: tuple[int, int]) -> None:
    """The beginning of one, with these beside it, which are closed here."""
    writer = results._writers[0]
    beginning = _HEADER.pack(7, 1000, 1000 | _WITH_FDS) + b"x" * 900
    writer.sendmsg([beginning], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("interrupted", ["reading", "closing"])
def test_descriptors_of_a_torn_message_are_closed(interrupted: str) -> None:
    results: ResultQueue

    def read() -> None:
        results.wait(0)

    def close() -> None:
        results.close()

    before = descriptors()
    moments = 0
    for run in at_every_moment(read if interrupted == "reading" else close, *RECEIVING):
        moments += 1
        results = ResultQueue(0, print)
        torn_message(results, os.pipe())
        if interrupted == "closing":
            read()
        assert descriptors() == before + (4 if interrupted == "closing" else 2)
        run()
        close()
        assert descriptors() == before
    assert moments > 10


def test_descriptors_of_a_torn_message_go_with_its_worker() -> None:
    before = descriptors()
    results = ResultQueue(1, print)
    torn_message(results, os.pipe())
    results.wait(0)
    assert descriptors() == before + 4 + 2  # they came
    results.all_started()  # lets go of the worker's end, as its death does
    results.wait(0)
    assert descriptors() == before + 4 - 2
    results.close()
    assert descriptors() == before


@pytest.mark.uncovered
@pytest.mark.slow
def test_a_death_is_told_whenever_an_interrupt_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "_TOGETHER_S", 0)
    monkeypatch.setattr(inbox_module, "_LOOK_S", 0.05)
    inbox: ResultReceiver

    def told() -> tuple[int, ...]:
        try:
            inbox.get()
        except WorkersDied as sign:
            return sign.workers
        raise AssertionError

    for run in at_every_moment(told, "supervision/receiver.py"):
        pool = Pool(waits, dies)
        try:
            inbox = pool.inbox(timeout_s=BOUND_S)
            pool.go.set()
            pool.workers[1].join(BOUND_S)
            assert run() == (1,)
        finally:
            pool.end()


@pytest.mark.parametrize("size", [10, 300_000], ids=["at once", "in parts"])
def test_a_task_that_an_interrupt_stopped_comes_whole_or_not_at_all(size: int) -> None:
    """Torn, it would be the beginning of the next one."""
    tasks = TaskQueue(lambda task, exc: task)
    called = False

    def put() -> None:
        nonlocal called
        if not called:
            called = True  # once: who was interrupted does not put it again
            tasks.put((0, Task(0, bytes(size))))

    moments = 0
    for run in at_every_moment(put, "transport/channel.py"):
        moments += 1
        called = False
        run()
        tasks.put((1, Task(1, "next")))
        came = [tasks.get(timeout=300)]
        if came[0][0] == 0:
            came.append(tasks.get(timeout=300))
        assert came[-1] == (1, Task(1, "next"))
        assert came[:-1] in ([], [(0, Task(0, bytes(size)))])
        with pytest.raises(queue.Empty):
            tasks.get(timeout=0)
    assert moments > 10
    tasks.close()


def test_descriptors_are_closed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fds: list[int] = []
    closed: list[int] = []
    monkeypatch.setattr(os, "close", closed.append)
    for run in at_every_moment(lambda: close_all(fds), "transport/channel.py"):
        fds[:] = range(1000, 1010)
        closed.clear()
        run()
        assert sorted(closed) == list(range(1000, 1010))
