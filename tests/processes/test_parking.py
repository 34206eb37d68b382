"""Slots that outlive an epoch's workers: what they hold is never written over, and they go."""

from __future__ import annotations

import gc
import multiprocessing.popen_fork
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, default_collate

from safeloader import SafeDataLoader, WorkerCrashError
from safeloader.transport import parking, slot_budget
from safeloader.transport.slot_table import MAY_HOLD
from tests.wired import fork_in_c

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/maps").exists() or not hasattr(os, "memfd_create"),
    reason="slots are counted as Linux has them",
)

SIZE = 200_000  # floats of a sample: two of them are a batch of 1.6 MB


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "_WORTH_BYTES", 1)


class Numbered(Dataset[torch.Tensor]):
    """Each sample is full of numbers that no other sample, epoch or worker has."""

    def __init__(self, length: int = 16) -> None:
        self.length, self.epoch = length, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((SIZE,), float(self.epoch * 1000 + index))


def slots_mapped() -> int:
    """How many slots this process has mapped; the small files are cells."""
    found = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:safeloader" in line:
            first, last = (int(each, 16) for each in line.split()[0].split("-"))
            found += last - first > 1 << 20
    return found


def until(done: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not done():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def numbers(batch: torch.Tensor) -> list[float | None]:
    """Of each sample the number that fills it; by NumPy, whose loops a forked child can run."""
    return [float(each[0]) if (each == each[0]).all() else None for each in batch.numpy()]


def passed(loader: SafeDataLoader[Any], data: Numbered, keep: Callable[[int], bool]) -> list[Any]:
    """An epoch: those of its batches that are kept, each with what is in it."""
    kept = []
    for number, batch in enumerate(loader):
        wanted = [float(data.epoch * 1000 + 2 * number + k) for k in range(2)]
        assert numbers(batch) == wanted
        if keep(number):
            kept.append((batch, wanted))
    data.epoch += 1
    return kept


def whole(kept: list[Any]) -> bool:
    return all(numbers(batch) == wanted for batch, wanted in kept)


def loader_of(data: Numbered, **kwargs: Any) -> SafeDataLoader[Any]:
    return SafeDataLoader(data, 2, num_workers=2, multiprocessing_context="fork", **kwargs)


def test_the_next_workers_write_into_the_same_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = parking.ParkedSlots.take

    def told(self: Any, table: Any) -> Any:
        found = real(self, table)
        taken.append(len(found))
        return found

    monkeypatch.setattr(parking.ParkedSlots, "take", told)
    data = Numbered()
    loader = loader_of(data)
    for _ in range(4):
        passed(loader, data, lambda number: False)
    assert taken[0] == 0
    assert all(taken[1:])
    stats = loader.transport_stats
    assert stats.slots == slots_mapped() <= max(taken) + 2  # a batch was kept by the loop


@pytest.mark.parametrize("seed", range(6))
def test_what_is_kept_is_never_written_over(seed: int) -> None:
    draw = random.Random(seed)
    data = Numbered()
    loader = loader_of(data, prefetch_factor=draw.choice([1, 3]))
    kept: list[Any] = []
    for _ in range(6):
        kept += passed(loader, data, lambda number: draw.random() < 0.3)
        draw.shuffle(kept)
        del kept[draw.randint(2, 5) :]
        assert whole(kept)
    assert loader.audit.ok


def test_what_a_forked_child_sees_is_never_written_over() -> None:
    data = Numbered()
    loader = loader_of(data)
    kept = passed(loader, data, lambda number: number % 2 == 0)
    ask, answer = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.read(ask[0], 1)
            status = 0 if whole(kept) else 2
        finally:
            os._exit(status)
    kept.clear()  # free here, and not there
    for _ in range(4):
        passed(loader, data, lambda number: False)
    os.write(ask[1], b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for end in (*ask, *answer):
        os.close(end)


class ReadOn:
    """A collate function: after four batches its worker forks a child, which reads on for long."""

    def __init__(self, fork: Callable[[], int], folder: Path) -> None:
        self.fork, self.folder, self.batches = fork, folder, 0

    def __call__(self, samples: list[torch.Tensor]) -> torch.Tensor:
        batch: torch.Tensor = default_collate(samples)
        self.batches += 1
        if self.batches == 4:
            wanted = [float(sample[0]) for sample in samples]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
                pid = self.fork()
            if not pid:
                try:
                    os.closerange(3, 1000)  # or they who wait for the worker would wait for this
                    until((self.folder / "over").exists)
                    told = self.folder / f"{os.getpid()}.part"
                    told.write_text(f"{numbers(batch) == wanted}")
                    told.rename(told.with_suffix(".told"))
                finally:
                    os._exit(0)
        return batch


@pytest.mark.parametrize("fork", [os.fork, fork_in_c])
def test_what_a_child_of_a_worker_reads_is_never_written_over(
    fork: Callable[[], int], tmp_path: Path
) -> None:
    data = Numbered()
    read_on = ReadOn(fork, tmp_path)
    loader = loader_of(data, collate_fn=read_on)
    passed(loader, data, lambda number: False)
    read_on.batches = 9  # the next workers do not
    for _ in range(3):
        passed(loader, data, lambda number: False)
    (tmp_path / "over").touch()
    until(lambda: len(list(tmp_path.glob("*.told"))) == 2)
    assert [each.read_text() for each in tmp_path.glob("*.told")] == ["True"] * 2


def test_a_forked_child_has_slots_of_its_own() -> None:
    data = Numbered()
    loader = loader_of(data)
    passed(loader, data, lambda number: False)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for _ in range(2):
                passed(loader, data, lambda number: False)
            status = 0
        finally:
            os._exit(status)
    for _ in range(3):
        passed(loader, data, lambda number: False)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_what_is_given_back_is_given_to_the_system_too() -> None:
    """Another process that has a slot mapped does not keep its pages."""
    gc.collect()  # loaders of other tests
    data = Numbered()
    loader = loader_of(data)
    passed(loader, data, lambda number: False)
    (unpacker,) = [each._last[0] for each in parking._all() if each._last is not None]
    memory = [each.memory for each in unpacker._slots.values()]
    assert any(bytes(each[:8]) != bytes(8) for each in memory)
    parking.drop_parked()
    assert not loader.transport_stats.slots
    assert not any(bytes(each[:8]) != bytes(8) for each in memory)


def test_a_forked_child_keeps_none_that_are_parked() -> None:
    loader = loader_of(Numbered())
    for batch in loader:
        del batch
    assert slots_mapped() >= 2
    held = next(iter(loader))
    pid = os.fork()
    if pid == 0:
        os._exit(slots_mapped())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) <= 1  # the batch that it sees
    assert numbers(held) == [0.0, 1.0]


def test_two_iterators_at_once_share_none() -> None:
    data = Numbered()
    loader = loader_of(data)
    for _ in range(3):
        for one, other in zip(loader, loader, strict=True):
            assert torch.equal(one, other)
            assert one.data_ptr() != other.data_ptr()


def test_an_epoch_that_is_left_and_one_whose_worker_is_killed() -> None:
    class Kills(Numbered):
        kill = False

        def __getitem__(self, index: int) -> torch.Tensor:
            sample = super().__getitem__(index)
            if self.kill and index == 9:
                sample += 0.5  # half written
                os.kill(os.getpid(), signal.SIGKILL)
            return sample

    data = Kills()
    loader = loader_of(data)
    kept = passed(loader, data, lambda number: number == 3)
    for number, _ in enumerate(loader):
        if number == 2:
            break
    data.epoch += 1
    kept += passed(loader, data, lambda number: number == 5)
    data.kill = True
    with pytest.raises(WorkerCrashError):
        list(loader)
    data.kill = False
    data.epoch += 1
    kept += passed(loader, data, lambda number: number == 1)
    assert whole(kept)


@pytest.mark.parametrize("how", ["to its end", "left"])
def test_an_iterator_that_ends_takes_no_slots_of_one_that_goes_on(how: str) -> None:
    data = Numbered(40)
    loader = loader_of(data)
    ends, goes_on = iter(loader), iter(loader)
    kept = [next(goes_on) for _ in range(12)]  # more slots than are parked
    if how == "left":
        next(ends)
        del ends
    else:
        assert len(list(ends)) == 20
    kept += goes_on
    assert [numbers(each) for each in kept] == [[2.0 * k, 2.0 * k + 1] for k in range(20)]


def test_without_a_thread_to_wait_they_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Numbered()
    loader = loader_of(data)
    taken = threading.stack_size(1 << 50)  # no thread can be started
    try:
        passed(loader, data, lambda number: False)
        assert not loader.transport_stats.slots
    finally:
        threading.stack_size(taken)
    passed(loader, data, lambda number: False)
    assert loader.transport_stats.slots


class Maps(Numbered):
    """The first number of a sample is how many slots its worker has mapped."""

    def __getitem__(self, index: int) -> torch.Tensor:
        sample = super().__getitem__(index)
        sample[0] = slots_mapped()
        return sample


def test_a_worker_maps_its_own_alone() -> None:
    loader = loader_of(Maps())
    for _ in range(3):
        most = max(float(batch[:, 0].max()) for batch in loader)
    gc.collect()
    assert most <= slots_mapped() / 2 + 3


def test_a_worker_maps_no_slots_of_other_loaders() -> None:
    data = Numbered()
    training = loader_of(data)
    passed(training, data, lambda number: False)
    assert training.transport_stats.slots >= 2
    other = loader_of(Maps(2))
    (batch,) = other
    assert float(batch[:, 0].max()) <= 1


def test_they_go_where_another_loader_lacks_room(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Numbered()
    training = loader_of(data)
    passed(training, data, lambda number: False)
    held = training.transport_stats.bytes
    assert held
    monkeypatch.setattr(slot_budget, "process_bytes", lambda: held)
    other = loader_of(Numbered(64))
    list(other)
    assert not training.transport_stats.slots
    assert other.transport_stats.batches["slots"]


def test_they_take_no_room_from_the_workers_that_they_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = 1 << 26
    monkeypatch.setattr(slot_budget, "process_bytes", lambda: room)
    data = Numbered()
    loader = loader_of(data)
    passed(loader, data, lambda number: False)
    assert loader.transport_stats.bytes
    batches = iter(loader)
    next(batches)
    (table,) = [pool.table for pool in slot_budget.budget._pools if pool.table is not None]
    assert [table.share(worker)[MAY_HOLD] for worker in range(2)] == [room // 2] * 2


def test_no_thread_of_theirs_runs_beside_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    data = Numbered()
    training, other = loader_of(data), loader_of(Numbered(4))
    passed(training, data, lambda number: False)

    def threads() -> list[str]:
        return [each.name for each in threading.enumerate() if "parked" in each.name]

    assert len(threads()) == 1
    forks = multiprocessing.popen_fork.Popen._launch  # type: ignore[attr-defined]

    def launch(self: Any, process: Any) -> Any:
        seen.append(threads())
        return forks(self, process)

    monkeypatch.setattr("multiprocessing.popen_fork.Popen._launch", launch)
    list(other)
    assert seen == [[], []]
    assert threads()


def test_they_go_with_the_loader() -> None:
    before = slots_mapped()
    data = Numbered()
    loader = loader_of(data)
    passed(loader, data, lambda number: False)
    assert slots_mapped() > before
    del loader
    gc.collect()
    assert slots_mapped() == before


def test_they_go_if_nobody_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "REST_S", 0.01)
    data = Numbered()
    loader = loader_of(data)
    for _ in range(2):
        passed(loader, data, lambda number: False)
        until(lambda: not loader.transport_stats.slots)


def test_they_go_later_if_their_workers_end_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "REST_S", 0.01)
    loader = loader_of(Numbered())
    iterator = iter(loader)
    next(iterator)
    stock = iterator._stock  # type: ignore[attr-defined]  # which keeps the workers
    tried = threading.Event()
    real = parking.ParkedSlots.expire

    def told(self: Any) -> None:
        real(self)
        tried.set()

    monkeypatch.setattr(parking.ParkedSlots, "expire", told)
    del iterator
    assert tried.wait(60)
    assert loader.transport_stats.slots
    del stock
    until(lambda: not loader.transport_stats.slots)


def test_loaders_in_two_threads_leave_no_thread_behind() -> None:
    def epochs() -> None:
        data = Numbered(4)
        loader = loader_of(data)
        for _ in range(8):
            passed(loader, data, lambda number: False)

    beside = [threading.Thread(target=epochs) for _ in range(2)]
    for each in beside:
        each.start()
    for each in beside:
        each.join()
    gc.collect()
    assert not [each.name for each in threading.enumerate() if "parked" in each.name]


def test_a_loop_that_keeps_every_batch_leaves_no_more_than_the_workers_need() -> None:
    loader = loader_of(Numbered(64))
    kept = list(loader)
    assert loader.transport_stats.slots == 32
    kept.clear()
    gc.collect()
    assert loader.transport_stats.slots <= 8


def none_asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("SAFELOADER_KEEP_SLOTS", "0")
    return {}


def spawned(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"multiprocessing_context": "spawn"}


def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(parking, "_WORTH_BYTES", 1 << 24)
    return {}


@pytest.mark.parametrize("how", [none_asked, spawned, small])
def test_where_none_are_kept(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"multiprocessing_context": "fork"} | how(monkeypatch)
    loader: SafeDataLoader[Any] = SafeDataLoader(Numbered(6), 2, num_workers=1, **more)
    for _ in range(2):
        list(loader)
        gc.collect()
        assert not loader.transport_stats.slots
