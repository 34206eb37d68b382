"""The way back: every message whole and in its worker's order, whatever becomes of the others."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import queue
import resource
import select
import signal
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safeloader.delivery.manifest import BatchManifest
from safeloader.transport.channel import _HEADER, ResultQueue
from safeloader.transport.messages import DeliveredBatch, FailedBatch
from safeloader.transport.packing import Packer
from safeloader.transport.slot_reader import Unpacker
from tests.wired import descriptors

METHODS = ["fork", pytest.param("spawn", marks=pytest.mark.slow), "forkserver"]
BOUND_S = 60

seal = Packer().seal


def manifest(seq: int, worker: int = 0) -> BatchManifest:
    return BatchManifest(seq, worker, os.getpid(), b"", 1, None, b"", False, None)


def message(worker: int, number: int, size: int) -> bytes:
    return bytes([(worker * 31 + number) % 251]) * size


def says(results: ResultQueue, worker: int, sizes: list[int]) -> None:
    results.speak_as(worker, lambda: None)
    for number, size in enumerate(sizes):
        what = message(worker, number, size)
        results.put((number, seal(manifest(number, worker), what) if number % 3 else what))


def received(results: ResultQueue, count: int) -> Iterator[tuple[int, Any]]:
    give_up = time.monotonic() + BOUND_S
    while count:
        assert time.monotonic() < give_up, f"{count} messages did not come"
        try:
            yield results.get(timeout=1)
        except queue.Empty:
            continue
        count -= 1


def start(method: str, target: Any, results: ResultQueue, arguments: list[tuple[Any, ...]]) -> Any:
    context = multiprocessing.get_context(method)
    processes = [context.Process(target=target, args=(results, *each)) for each in arguments]
    for process in processes:
        process.start()
    results.all_started()
    return processes


@pytest.mark.parametrize("method", METHODS)
def test_several_workers_each_in_order(method: str) -> None:
    sizes = [0, 1, 100, 65_536 - _HEADER.size, 65_536, 200_000, 3, 5_000_000, 0]
    workers = 3 if method == "fork" else 2
    results = ResultQueue(workers, Unpacker().opened)
    processes = start(method, says, results, [(w, sizes) for w in range(workers)])
    came: dict[int, list[int]] = defaultdict(list)
    for number, data in received(results, workers * len(sizes)):
        what = data.payload if type(data) is DeliveredBatch else data
        worker = data.manifest.worker_id if type(data) is DeliveredBatch else None
        owners = [w for w in range(workers) if what == message(w, number, sizes[number])]
        assert owners if worker is None else worker in owners
        if worker is not None:
            came[worker].append(number)
    for process in processes:
        process.join(BOUND_S)
        assert process.exitcode == 0
    assert set(map(tuple, came.values())) == {(1, 2, 4, 5, 7, 8)}
    results.close()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.lists(
            st.integers(0, 200) | st.integers(65_000, 66_000) | st.sampled_from([0, 20_000_000]),
            max_size=8,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_messages_of_all_sizes(sizes: list[list[int]]) -> None:
    """In threads, each with a queue of its own over the same pipes, as a process would have it."""
    results = ResultQueue(len(sizes), Unpacker().opened)
    voices = []
    for _ in sizes:
        voice = ResultQueue.__new__(ResultQueue)
        writers = [writer.dup() for writer in results._writers]
        voice.__dict__.update(_writers=writers, _rows={}, arrived=deque())
        voices.append(voice)
    results.all_started()

    def say(worker: int) -> None:
        voices[worker].speak_as(worker, lambda: None)
        for number, size in enumerate(sizes[worker]):
            what = message(worker, number, size)
            voices[worker].put((number, seal(manifest(number, worker), what)))

    threads = [threading.Thread(target=say, args=(w,)) for w in range(len(sizes))]
    for thread in threads:
        thread.start()
    came: list[list[int]] = [[] for _ in sizes]
    for number, data in received(results, sum(map(len, sizes))):
        worker = data.manifest.worker_id
        assert data.payload == message(worker, number, sizes[worker][number])
        came[worker].append(number)
    for thread in threads:
        thread.join(BOUND_S)
    assert came == [list(range(len(each))) for each in sizes]
    assert not results.arrived
    for each in (*voices, results):
        each.close()


def dies_in_the_middle(results: ResultQueue, worker: int, whole: int, part: int) -> None:
    results.speak_as(worker, lambda: None)
    if worker == 1:
        for number in range(whole):
            results.put((number, seal(manifest(number, 1), "whole")))
        torn = _HEADER.pack(99, 1000, 1000) + b"x" * 900
        fd = results._writers[0].fileno()
        os.write(fd, torn[:part])
        os.kill(os.getpid(), signal.SIGKILL)
    for number in range(200):
        results.put((number, seal(manifest(number, worker), b"y" * 1000)))


@pytest.mark.parametrize("part", [1, _HEADER.size - 1, _HEADER.size, 900])
def test_a_torn_message_disturbs_nobody(part: int) -> None:
    results = ResultQueue(3, Unpacker().opened)
    processes = start("fork", dies_in_the_middle, results, [(w, 2, part) for w in range(3)])
    came: dict[int, list[int]] = defaultdict(list)
    for number, data in received(results, 402):
        came[data.manifest.worker_id].append(number)
    assert came == {0: list(range(200)), 1: [0, 1], 2: list(range(200))}
    for process in processes:
        process.join(BOUND_S)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL, 0]
    with pytest.raises(queue.Empty):
        results.get(timeout=0)
    results.close()


def sends_tensors(results: ResultQueue, sizes: list[int]) -> None:
    results.speak_as(0, lambda: None)
    for number, size in enumerate(sizes):
        batch = [torch.full((3,), float(number + k)) for k in range(size)]
        results.put((number, seal(manifest(number), batch)))


def test_tensors_outlive_the_worker_and_leave_no_descriptor() -> None:
    sizes = [1, 0, 7, 150, 2]
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    results = ResultQueue(1, Unpacker().opened)
    (process,) = start("fork", sends_tensors, results, [(sizes,)])
    came = []
    for number, data in received(results, len(sizes)):
        assert len(data.payload) == sizes[number]
        came += [float(tensor[0]) - number for tensor in data.payload]
        del data
    process.join(BOUND_S)
    assert process.exitcode == 0
    assert came == [float(k) for size in sizes for k in range(size)]
    results.close()
    process.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_came_and_was_not_taken_leaves_no_descriptor() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    results = ResultQueue(1, Unpacker().opened)
    (process,) = start("fork", sends_tensors, results, [([40, 40],)])
    give_up = time.monotonic() + BOUND_S
    while not results.arrived and time.monotonic() < give_up:
        results.wait(1)
    assert results.arrived
    results.close()
    process.join(BOUND_S)
    process.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_half_a_message_is_not_waited_for() -> None:
    results = ResultQueue(1, Unpacker().opened)
    writer = results._writers[0]
    whole = _HEADER.pack(-1, 10, 0) + pickle.dumps((7, None)).ljust(10, b".")[:10]
    for at in range(len(whole) - 1):
        os.write(writer.fileno(), whole[at : at + 1])
        began = time.monotonic()
        assert results.wait(5) == []
        assert time.monotonic() - began < 1
        assert not results.arrived
        with pytest.raises(queue.Empty):
            results.take()
    os.write(writer.fileno(), whole[-1:])
    results.wait(5)
    assert results.arrived
    results.close()


def does_not_wait(results: ResultQueue, told: Any) -> None:
    results.speak_as(0, lambda: None)
    for number in range(30):
        results.put((number, seal(manifest(number), b"z" * 300_000)))
    told.set()  # and ends: what is not sent yet is sent first


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_does_not_wait_for_main_and_its_exit_flushes(method: str) -> None:
    results = ResultQueue(1, Unpacker().opened)
    told = multiprocessing.get_context(method).Event()
    (process,) = start(method, does_not_wait, results, [(told,)])
    assert told.wait(BOUND_S)  # nobody has read a byte
    assert process.is_alive()
    came = [(number, len(data.payload)) for number, data in received(results, 30)]
    assert came == [(number, 300_000) for number in range(30)]
    process.join(BOUND_S)
    assert process.exitcode == 0


def does_not_flush(results: ResultQueue, told: Any, before: bool) -> None:
    results.speak_as(0, lambda: None)
    if before:
        results.put((0, b"small"))
        results.cancel_join_thread()
    results.put((1, b"z" * 10_000_000))
    results.cancel_join_thread()
    told.set()


@pytest.mark.parametrize("before", [True, False])
def test_a_worker_told_not_to_wait_ends_with_its_pipe_full(before: bool) -> None:
    results = ResultQueue(1, Unpacker().opened)
    told = multiprocessing.Event()
    (process,) = start("fork", does_not_flush, results, [(told, before)])
    process.join(BOUND_S)
    assert process.exitcode == 0
    assert told.is_set()
    if before:
        assert results.get(timeout=300) == (0, b"small")
    results.wait(0.05)  # the rest is half a message at most
    assert not results.arrived
    results.close()


def fills_and_is_killed(results: ResultQueue, told: Any) -> None:
    results.speak_as(0, lambda: None)
    for number in range(5):
        results.put((number, b"z" * 100_000))
    told.set()
    signal.pause()


def test_a_worker_killed_while_its_pipe_is_full() -> None:
    results = ResultQueue(1, Unpacker().opened)
    told = multiprocessing.Event()
    (process,) = start("fork", fills_and_is_killed, results, [(told,)])
    assert told.wait(BOUND_S)
    process.kill()
    process.join(BOUND_S)
    came = []
    give_up = time.monotonic() + BOUND_S
    while len(results._rows) > 1 and time.monotonic() < give_up:
        results.wait(1)
    while results.arrived:
        came.append(results.take()[0])
    assert came == list(range(len(came)))
    assert len(came) < 5


def test_mains_own_message() -> None:
    results = ResultQueue(2, Unpacker().opened)
    results.all_started()
    results.put((None, None))
    results.put((5, "x" * 1_000_000))
    assert results.get(timeout=300) == (None, None)
    assert list(received(results, 1)) == [(5, "x" * 1_000_000)]


def goes_on_though_nobody_reads(results: ResultQueue, go: Any) -> None:
    results.speak_as(0, lambda: None)
    go.wait(BOUND_S)
    for number in range(3):
        results.put((number, b"small"))
        results.put((number, b"z" * 1_000_000))


def test_a_broken_pipe_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    results = ResultQueue(1, Unpacker().opened)
    go = multiprocessing.Event()
    (process,) = start("fork", goes_on_though_nobody_reads, results, [(go,)])
    results.close()
    go.set()
    process.join(BOUND_S)
    assert process.exitcode == 0
    assert capfd.readouterr().err == ""


def counts_what_it_sent(results: ResultQueue) -> None:
    calls: list[int] = []
    results.speak_as(0, lambda: calls.append(len(calls)))
    results.put((0, seal(manifest(0), 1)))
    results.put((1, 2))
    results.put((2, calls))


def test_sent_is_called_after_each_message() -> None:
    results = ResultQueue(1, Unpacker().opened)
    (process,) = start("fork", counts_what_it_sent, results, [()])
    assert [data for _, data in received(results, 3)][1:] == [2, [0, 1]]
    process.join(BOUND_S)
    results.close()


def test_nothing_there_is_told_as_by_any_queue() -> None:
    results = ResultQueue(1, Unpacker().opened)
    for timeout in (0, 0.01):
        with pytest.raises(queue.Empty):
            results.get(timeout)


def test_closed_twice_and_without_a_descriptor_left() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    results = ResultQueue(4, Unpacker().opened)
    assert len(os.listdir("/proc/self/fd")) == before + 10
    results.close()
    results.close()
    results.cancel_join_thread()
    assert len(os.listdir("/proc/self/fd")) == before


def test_other_descriptors_wake_it_up() -> None:
    results = ResultQueue(1, Unpacker().opened)
    reader, writer = os.pipe()
    results.poll.register(reader, select.POLLIN)
    assert results.wait(0) == []
    os.write(writer, b"x")
    assert results.wait(5) == [reader]
    results.poll.unregister(reader)
    assert results.wait(0) == []
    os.close(reader)
    os.close(writer)


class Unloadable:
    def __reduce__(self) -> Any:
        return int, ("not a number",)


def test_what_cannot_be_loaded_still_says_which_batch_it_was() -> None:
    results = ResultQueue(1, Unpacker().opened)
    results.put((3, seal(manifest(8), Unloadable())))
    number, came = results.get(timeout=300)
    assert (number, type(came), came.manifest.seq) == (3, FailedBatch, 8)
    assert came.failure.exception_type == "ValueError"


@pytest.mark.parametrize("spare", range(9))
def test_a_queue_for_which_descriptors_run_out_leaves_none_open(spare: int) -> None:
    gc.collect()
    before = descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before - 1 + spare, hard))
    try:
        with pytest.raises(OSError, match="Too many open files") as raised:
            ResultQueue(9, lambda message: message)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    del raised
    gc.collect()  # sockets that nobody closed would warn, which is an error here
    assert descriptors() == before
