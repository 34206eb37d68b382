"""Stacks of workers: asked for while they are stuck, and left behind when they died."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from traceback import FrameSummary as Frame
from typing import Any

import pytest

from safeloader.supervision import stacks
from safeloader.supervision.flight_recorder import PID, SIGNAL, STACK_BYTES, FlightRecorder
from safeloader.supervision.monitor import WorkerMonitor
from safeloader.supervision.processes import Signals

BOUND_S = 30
HERE = __file__
context = multiprocessing.get_context("fork")


def test_reading_one_thread() -> None:
    text = (
        "Fatal Python error: Segmentation fault\n\n"
        "Current thread 0x00007f0000000001 (most recent call first):\n"
        '  File "/a b/data.py", line 12 in __getitem__\n'
        '  File "/x/safeloader/worker/mapping.py", line 60 in _fetch\n'
        '  File "/x/torch/worker.py", line 300 in _worker_loop\n\n'
        "Extension modules: numpy (total: 1)\n"
    )
    found = stacks.read(text)
    assert found.frames == (Frame("/a b/data.py", 12, "__getitem__"),)
    assert found.text == '  File "/a b/data.py", line 12, in __getitem__'


def test_reading_several_threads_takes_the_current_one() -> None:
    text = (
        "Thread 0x00007f0000000002 (most recent call first):\n"
        '  File "/lib/threading.py", line 1 in wait\n\n'
        "Current thread 0x00007f0000000001 (most recent call first):\n"
        '  File "/data.py", line 2 in inner\n'
        '  File "/data.py", line 3 in <lambda>\n\n'
        "Thread 0x00007f0000000003 (most recent call first):\n"
        '  File "/lib/threading.py", line 4 in wait\n'
    )
    assert [frame.name for frame in stacks.read(text).frames] == ["inner", "<lambda>"]


def test_reading_without_a_thread_id() -> None:
    text = 'Stack (most recent call first):\n  File "/data.py", line 2 in inner\n'
    assert stacks.read(text).frames == (Frame("/data.py", 2, "inner"),)


def test_names_of_threads_are_no_obstacle() -> None:
    text = (
        "Current thread 0x00007f0000000001 [MainThread] (most recent call first):\n"
        '  File "/data.py", line 2 in inner\n'
    )
    assert stacks.read(text).frames == (Frame("/data.py", 2, "inner"),)


def test_with_our_frames_only_these_are_shown() -> None:
    text = (
        "Current thread 0x1 (most recent call first):\n"
        '  File "/x/safeloader/worker/startup.py", line 60 in __call__\n'
        '  File "/x/torch/worker.py", line 300 in _worker_loop\n'
    )
    assert [frame.name for frame in stacks.read(text).frames] == ["__call__", "_worker_loop"]


def test_other_text_is_kept_as_it_is() -> None:
    text = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\nSystemExit: 3\n'
    assert stacks.read(text) == ((), text.strip())
    assert stacks.read("") == ((), "")


def test_a_deep_stack_is_bounded() -> None:
    lines = "".join(f'  File "/data.py", line {n} in recurse\n' for n in range(1, 101))
    assert len(stacks.read(f"Stack (most recent call first):\n{lines}  ...\n").frames) == 40


def test_what_faulthandler_writes_here(tmp_path: Any) -> None:
    with open(tmp_path / "dump", "w+") as file:
        faulthandler.dump_traceback(file, all_threads=False)
        file.seek(0)
        found = stacks.read(file.read())
    assert found.frames[0].name == "test_what_faulthandler_writes_here"
    assert found.frames[0].line == "faulthandler.dump_traceback(file, all_threads=False)"


# with workers ───────────────────────────────────────────────────────────────────────────────────


def works(recorder: FlightRecorder, number: int, ready: Any, deed: Callable[[Any], None]) -> None:
    row = recorder.row(number)
    row[3] = os.getpid()
    WorkerMonitor(recorder, number, row)
    deed(ready)


class Pool:
    def __init__(self, *deeds: Callable[[Any], None]) -> None:
        self.recorder = FlightRecorder(len(deeds))
        self.ready = context.Semaphore(0)
        self.workers = [
            context.Process(target=works, args=(self.recorder, number, self.ready, deed))
            for number, deed in enumerate(deeds)
        ]
        for worker in self.workers:
            worker.start()
        self.signals = [Signals(worker) for worker in self.workers]
        for _ in deeds:
            assert self.ready.acquire(timeout=BOUND_S)

    def asked(self, workers: list[int]) -> dict[int, stacks.Stack]:
        return stacks.asked(self.recorder, self.signals, workers)


@pytest.fixture
def pools() -> Iterator[Callable[..., Pool]]:
    made: list[Pool] = []

    def make(*deeds: Callable[[Any], None]) -> Pool:
        made.append(Pool(*deeds))
        return made[-1]

    yield make
    for pool in made:
        for worker in pool.workers:
            worker.kill()
            worker.join(BOUND_S)


def stuck_in_python(ready: Any) -> None:
    ready.release()
    while True:
        time.sleep(0.01)


def stuck_in_c(ready: Any) -> None:
    """In C, with the interpreter's lock: no Python signal handler would ever run."""
    libc = ctypes.PyDLL(None)
    ready.release()
    while True:
        libc.usleep(900_000)


def stuck_on_a_lock(ready: Any) -> None:
    lock = threading.Lock()
    lock.acquire()
    ready.release()
    lock.acquire()


def stuck_beside_threads(ready: Any) -> None:
    for _ in range(3):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    stuck_on_a_lock(ready)


@pytest.mark.parametrize(
    "deed", [stuck_in_python, stuck_in_c, stuck_on_a_lock, stuck_beside_threads]
)
def test_asked_while_stuck(pools: Any, deed: Callable[[Any], None]) -> None:
    pool = pools(deed)
    for _ in range(2):  # each answer is that of its moment, and not of those before
        ((worker, found),) = pool.asked([0]).items()
        assert worker == 0
        names = [frame.name for frame in found.frames]
        inner = "stuck_on_a_lock" if deed is stuck_beside_threads else deed.__name__
        assert inner in names
        assert names.count("works") == 1
        assert HERE in found.text
        assert "wait" not in names
    assert pool.workers[0].is_alive()


def test_only_those_named_are_asked(pools: Any) -> None:
    pool = pools(stuck_in_python, stuck_in_python, stuck_in_python)
    assert sorted(pool.asked([0, 2])) == [0, 2]
    assert pool.recorder.stacks(1) == ""
    assert pool.asked([]) == {}


def test_one_that_cannot_answer_is_left_out(pools: Any) -> None:
    pool = pools(stuck_in_python, stuck_in_python, stuck_in_python)
    os.kill(pool.workers[0].pid, signal.SIGSTOP)
    pool.workers[1].kill()
    pool.workers[1].join(BOUND_S)
    assert list(pool.asked([0, 1, 2])) == [2]


def test_no_more_is_asked_where_the_room_is_used_up(pools: Any) -> None:
    pool = pools(stuck_in_python)
    fd = pool.recorder.open_stacks(0)
    assert fd is not None
    os.write(fd, b"x" * (STACK_BYTES - (1 << 16)))
    os.close(fd)
    assert pool.asked([0]) == {}


def counts_signals(ready: Any) -> None:
    """Somebody else's process, with handlers for what might go astray."""
    for number in range(signal.SIGRTMIN, signal.SIGRTMAX + 1):
        signal.signal(number, lambda number, frame: os._exit(66))
    ready.release()
    while True:
        signal.pause()


def test_the_process_named_in_shared_memory_gets_no_signal(pools: Any) -> None:
    """A broken native library wrote there, or the worker ended and another has its number."""
    pool = pools(stuck_in_python)
    ready = context.Semaphore(0)
    bystander = context.Process(target=counts_signals, args=(ready,))
    bystander.start()
    assert ready.acquire(timeout=BOUND_S)
    pool.recorder.row(0)[PID] = bystander.pid
    assert list(pool.asked([0])) == [0]
    bystander.kill()
    bystander.join(BOUND_S)
    assert bystander.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    "number",
    [-1, 0, signal.SIGSEGV, signal.SIGKILL, signal.SIGRTMIN, signal.SIGRTMAX, 65, 1 << 40],
)
def test_no_signal_goes_that_the_worker_would_not_survive(pools: Any, number: int) -> None:
    """Whatever stands in shared memory: the first real-time signals have no handler there."""
    pool = pools(stuck_in_python)
    pool.recorder.row(0)[SIGNAL] = number
    assert pool.asked([0]) == {}
    pool.workers[0].join(0.2)
    assert pool.workers[0].is_alive()


@pytest.mark.parametrize("lacking", ["nothing", "pidfd"])
def test_whoever_has_the_number_of_a_dead_worker_gets_no_signal(
    pools: Any, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    if lacking == "pidfd":
        monkeypatch.delattr(os, "pidfd_open")
    pool = pools(stuck_in_python)
    number = pool.recorder.read(0).signal
    assert pool.signals[0].send(number)
    pool.workers[0].kill()
    pool.workers[0].join(BOUND_S)
    ready = context.Semaphore(0)
    heir = context.Process(target=counts_signals, args=(ready,))
    heir.start()
    assert ready.acquire(timeout=BOUND_S)
    pool.workers[0]._popen.pid = heir.pid  # as the kernel might have numbered it
    assert not pool.signals[0].send(number)
    heir.kill()
    heir.join(BOUND_S)
    assert heir.exitcode == -signal.SIGKILL


def crashes(number: int) -> Callable[[Any], None]:
    def deed(ready: Any) -> None:
        ready.release()
        signal.pthread_kill(threading.get_ident(), number)

    return deed


FATAL = [signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT, signal.SIGILL]


@pytest.mark.parametrize("number", FATAL)
def test_left_behind_by_a_crash(pools: Any, number: int) -> None:
    pool = pools(crashes(number))
    pool.workers[0].join(BOUND_S)
    assert pool.workers[0].exitcode == -number
    found = stacks.left_behind(pool.recorder, 0)
    assert [frame.name for frame in found.frames][:2] == ["deed", "works"]


def test_left_behind_after_it_was_asked(pools: Any) -> None:
    pool = pools(stuck_in_python)
    assert 0 in pool.asked([0])
    assert stacks.left_behind(pool.recorder, 0) == ((), "")  # an answer is no last word
    os.kill(pool.workers[0].pid, signal.SIGSEGV)
    pool.workers[0].join(BOUND_S)
    found = stacks.left_behind(pool.recorder, 0)
    assert "stuck_in_python" in [frame.name for frame in found.frames]
    assert found.text.count("in works") == 1


def test_nothing_is_left_behind_by_a_kill(pools: Any) -> None:
    pool = pools(stuck_in_python)
    pool.workers[0].kill()
    pool.workers[0].join(BOUND_S)
    assert stacks.left_behind(pool.recorder, 0) == ((), "")
