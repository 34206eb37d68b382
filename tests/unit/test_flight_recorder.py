"""Where a worker was, read by main after the worker is gone; for every start method."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from array import array
from time import perf_counter_ns as clock
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeloader.supervision import flight_recorder
from safeloader.supervision.flight_recorder import (
    COLLATE,
    COUNTED,
    FETCH,
    MEMORY,
    ORDINAL,
    PHASE,
    PHASES,
    PID,
    SEQ,
    SINCE,
    STACK_BYTES,
    STAMPS,
    STAMPS_MAX,
    FlightRecorder,
)
from safeloader.transport.messages import Task
from safeloader.worker.context import FetchContext
from safeloader.worker.mapping import MapFetcher
from safeloader.worker.startup import fetcher_for

METHODS = ["fork", pytest.param("spawn", marks=pytest.mark.slow), "forkserver"]


def flies_and_dies(recorder: FlightRecorder, worker: int) -> None:
    row = recorder.row(worker)
    row[PID] = os.getpid()
    row[SEQ] = 70 + worker
    row[ORDINAL] = 5
    row[MEMORY] = 1 << 40
    row[PHASE] = FETCH
    row[SINCE] = row[STAMPS] = clock()
    for position in range(worker + 2):
        row[STAMPS + 1 + position] = clock()
    fd = recorder.open_stacks(worker)
    assert fd is not None
    os.write(fd, f"stack of {worker}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_worker_wrote_outlives_it(method: str) -> None:
    recorder = FlightRecorder(3)
    context = multiprocessing.get_context(method)
    processes = [context.Process(target=flies_and_dies, args=(recorder, n)) for n in (0, 2)]
    before = clock()
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    for worker, process in zip((0, 2), processes, strict=True):
        found = recorder.read(worker)
        assert (found.phase, found.seq, found.position) == ("fetch", 70 + worker, worker + 2)
        assert (found.pid, found.ordinal, found.memory_first[0]) == (process.pid, 5, 1 << 40)
        assert before < found.since_ns < clock()
        assert recorder.stacks(worker) == f"stack of {worker}\n"
    untouched = recorder.read(1)
    assert (untouched.phase, untouched.seq, untouched.pid) == ("starting", None, 0)
    assert recorder.stacks(1) == ""


def waits_for_the_end(recorder: FlightRecorder, ready: Any) -> None:
    assert not recorder.is_set()
    ready.set()
    while not recorder.is_set():
        pass


@pytest.mark.parametrize("method", METHODS)
def test_the_word_to_end_needs_no_lock(method: str) -> None:
    recorder = FlightRecorder(1)
    context = multiprocessing.get_context(method)
    ready = context.Event()
    process = context.Process(target=waits_for_the_end, args=(recorder, ready))
    process.start()
    assert ready.wait(60)
    assert not recorder.is_set()
    recorder.set()
    process.join(60)
    assert process.exitcode == 0
    assert recorder.is_set()


def test_phases_as_they_are_read() -> None:
    recorder = FlightRecorder(1)
    row = recorder.row(0)
    row[SEQ] = 4
    for number, phase in enumerate(PHASES):
        row[PHASE] = number
        found = recorder.read(0)
        assert found.phase == phase
        at_a_batch = phase in ("fetch", "fetch at once", "collate", "send")
        assert found.seq == (4 if at_a_batch else None)
        assert (found.position is not None) == (phase == "fetch")


@pytest.mark.parametrize("fetched", [0, 1, 7, STAMPS_MAX])
@pytest.mark.parametrize("older", [0, 3, 7, STAMPS_MAX + 1])
def test_older_stamps_do_not_count(fetched: int, older: int) -> None:
    """A batch of ``older`` samples lay there before."""
    recorder = FlightRecorder(1)
    row = recorder.row(0)
    stamp = 1000
    for cell in range(older + 1 if older else 0):
        row[STAMPS + cell] = (stamp := stamp + 1)
    row[PHASE] = FETCH
    row[SINCE] = row[STAMPS] = stamp = stamp + 1
    for cell in range(fetched):
        row[STAMPS + 1 + cell] = stamp  # a clock that stands still is enough
    assert recorder.read(0).position == fetched


def test_since_when_is_that_of_the_sample_not_of_the_batch() -> None:
    recorder = FlightRecorder(1)
    row = recorder.row(0)
    row[PHASE] = FETCH
    row[SINCE] = row[STAMPS] = 100
    row[STAMPS + 1] = 250
    assert recorder.read(0).since_ns == 250
    row[PHASE] = COLLATE
    row[STAMPS + 2] = 300
    assert recorder.read(0).since_ns == 300


class Peeks:
    """Looks, at one index, at what main would see of its worker."""

    def __init__(self, at: int, length: int, fails_at: int = -1) -> None:
        self.at, self.length, self.fails_at = at, length, fails_at
        self.recorder: FlightRecorder | None = None
        self.seen: Any = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if index == self.at and self.recorder is not None:
            self.seen = self.recorder.read(0)
        if index == self.fails_at:
            raise ValueError(index)
        return index


class _Stock:
    """What our fetcher takes over from torch's."""

    auto_collation = True

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def collate_fn(self, samples: list[Any]) -> list[Any]:
        return samples


def fetcher(dataset: Peeks) -> MapFetcher:
    recorder = dataset.recorder = FlightRecorder(1)
    return MapFetcher(_Stock(dataset), FetchContext(0, cells=recorder.row(0)))


@pytest.mark.parametrize("size", [1, 30, STAMPS_MAX - 1, STAMPS_MAX, STAMPS_MAX + 1, 9000])
def test_position_in_batches_of_any_size(size: int) -> None:
    for at in {0, size // 2, size - 1}:
        dataset = Peeks(at, size)
        made = fetcher(dataset).fetch(Task(3, list(range(size))))
        assert dataset.seen[:3] == ("fetch", 3, at)
        assert type(made).__name__ == "BatchMessage"


def test_position_after_batches_of_other_sizes() -> None:
    dataset = Peeks(-1, 20_000)
    fetches = fetcher(dataset)
    for seq, size in enumerate([9000, 3, 500, STAMPS_MAX, 2, 7000, 64]):
        dataset.at = size // 2
        fetches.fetch(Task(seq, list(range(size))))
        assert dataset.seen[:3] == ("fetch", seq, size // 2)


def test_position_after_a_large_batch_that_failed() -> None:
    dataset = Peeks(2, 9000, fails_at=8000)
    fetches = fetcher(dataset)
    fetches.fetch(Task(0, list(range(9000))))
    fetches.fetch(Task(1, list(range(8))))
    assert dataset.seen[:3] == ("fetch", 1, 2)


def test_a_fetcher_without_a_recorder_writes_to_cells_of_its_own() -> None:
    dataset = Peeks(0, 4)
    made = fetcher_for(_Stock(dataset), FetchContext(None)).fetch(Task(0, [0, 1]))
    assert made[1] == [0, 1]  # type: ignore[index]


def test_stacks_are_bounded_and_read_from_where_one_likes() -> None:
    recorder = FlightRecorder(2)
    fd = recorder.open_stacks(1)
    assert fd is not None
    os.write(fd, b"first\n")
    os.write(fd, b"second \xff\n")
    assert recorder.stacks(1) == "first\nsecond \N{REPLACEMENT CHARACTER}\n"
    assert recorder.stacks(1, after=6).startswith("second")
    assert recorder.stacks(0) == ""
    os.write(fd, b"x" * (STACK_BYTES - 15))
    assert len(recorder.stacks(1)) == STACK_BYTES
    os.close(fd)


def test_no_descriptor_is_left() -> None:
    def held() -> int:
        return len(os.listdir("/proc/self/fd"))

    recorder = FlightRecorder(2)
    before = held()
    for _ in range(20):
        FlightRecorder(4)
    assert held() == before
    row = recorder.row(1)
    del recorder
    row[PHASE] = FETCH  # the memory stays for who still looks at it
    assert row[PHASE] == FETCH
    assert held() == before - 1


def test_without_memfd_a_file_without_a_name_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    recorder = FlightRecorder(1)
    recorder.row(0)[COUNTED] = 9
    assert recorder.row(0)[COUNTED] == 9
    fd = recorder.open_stacks(0)
    assert fd is not None
    os.write(fd, b"there")
    os.close(fd)
    assert recorder.stacks(0) == "there"


def test_no_room_is_an_oserror_and_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(flight_recorder.os, "ftruncate", full)
    with pytest.raises(OSError, match="No space left"):
        FlightRecorder(1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_it_pickles_to_processes_being_started_only() -> None:
    with pytest.raises((RuntimeError, TypeError)):
        pickle.dumps(FlightRecorder(1))


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=STAMPS + 4, max_size=STAMPS + 4))
def test_whatever_stands_there_can_be_read(cells: list[int]) -> None:
    """A native library that ran wild may have written to any of it, before it killed the worker."""
    recorder = FlightRecorder(1)
    for phase in (cells[PHASE], FETCH, COLLATE):
        recorder.row(0)[: len(cells)] = memoryview(array("q", [phase, *cells[1:]]))
        found = recorder.read(0)
        assert found.phase in PHASES
        assert found.position is None or found.position >= 0
