"""What the stock loader lets pass in silence, injected for real; with and without workers."""

from __future__ import annotations

import os
import signal
import warnings
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, WeightedRandomSampler

from safeloader import DeliveryError, SafeDataLoader, SampleError
from safeloader.transport.messages import Task
from safeloader.worker.mapping import MapFetcher
from safeloader.worker.streaming import StreamFetcher
from tests import datasets, faults
from tests.processes.test_failures import caught

WORKERS = [0, 2]


@pytest.mark.parametrize("workers", WORKERS)
def test_stop_iteration_in_getitem_does_not_end_the_epoch(workers: int) -> None:
    dataset = faults.Raises("StopIteration", at=13)
    silently = sum(len(batch) for batch in DataLoader(dataset, 4, num_workers=workers))
    if workers == 0:
        assert silently == 12  # what torch makes of it: no error
    error = caught(SafeDataLoader(dataset, 4, num_workers=workers))
    assert type(error) is SampleError
    assert error.index == 13
    assert "StopIteration left the dataset" in str(error)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("by", [-1, -3, 1, 3])
def test_getitems_that_miscounts(by: int, workers: int) -> None:
    loader = SafeDataLoader(faults.Miscounts(by), 4, num_workers=workers)
    iterator = iter(loader)
    got = []
    error = caught(got.append(batch) for batch in iterator)
    assert type(error) is DeliveryError
    assert len(got) == 3
    assert (
        f"was asked for 4 samples{'' if by < 0 else ', [12, 13, 14, 15],'} and gave {4 + by}"
        in (str(error))
    )
    assert error.failure.phase == "delivery"
    rest = list(iterator)
    assert len(rest) == 6  # the user may go on; it was told, so the end is no second error
    audit = loader.audit
    assert audit is not None
    assert audit.complete
    assert not audit.ok
    if by < 0:
        assert audit.missing.tolist() == [12, 13, 14, 15][by:]
        assert audit.failed.tolist() == [12, 13, 14, 15][:by]
    else:
        assert audit.unexpected.tolist() == [-1] * by


def other_indices(worker_id: int) -> None:
    """A worker that fetches other samples than it was asked for."""
    fetch = MapFetcher.fetch

    def wrong(self: Any, task: Task) -> Any:
        if 13 in task.index:
            task = Task(task.seq, [99 if index == 13 else index for index in task.index])
        return fetch(self, task)

    MapFetcher.fetch = wrong  # type: ignore[method-assign,assignment]


def swapped(worker_id: int) -> None:
    fetch = MapFetcher.fetch

    def wrong(self: Any, task: Task) -> Any:
        return fetch(self, Task(task.seq, task.index[::-1]))

    MapFetcher.fetch = wrong  # type: ignore[method-assign,assignment]


def another_batch(worker_id: int) -> None:
    fetch = MapFetcher.fetch

    def wrong(self: Any, task: Task) -> Any:
        return fetch(self, Task(0 if task.seq == 2 else task.seq, task.index))

    MapFetcher.fetch = wrong  # type: ignore[method-assign,assignment]


def skips_in_stream(worker_id: int) -> None:
    fetch = StreamFetcher.fetch

    def wrong(self: Any, task: Task) -> Any:
        if task.seq == 1:
            fetch(self, task)  # read, and lost
        return fetch(self, task)

    StreamFetcher.fetch = wrong  # type: ignore[method-assign,assignment]


class Numbers:
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_that_answers_for_other_indices(start: str) -> None:
    loader = SafeDataLoader(
        Numbers(), 4, num_workers=2, worker_init_fn=other_indices, multiprocessing_context=start
    )
    error = caught(loader)
    assert type(error) is DeliveryError
    assert "was asked for [12, 13, 14, 15] and answered for [12, 99, 14, 15]" in str(error)
    audit = loader.audit
    assert audit is not None
    assert audit.missing.tolist() == [13]
    assert audit.unexpected.tolist() == [99]
    assert audit.failed.tolist() == [12, 14, 15]


def test_worker_that_changes_the_order() -> None:
    error = caught(SafeDataLoader(Numbers(), 4, num_workers=2, worker_init_fn=swapped))
    assert type(error) is DeliveryError
    assert "in another order" in str(error)


def test_batch_that_comes_twice() -> None:
    loader = SafeDataLoader(Numbers(), 4, num_workers=2, worker_init_fn=another_batch)
    error = caught(loader)
    assert type(error) is DeliveryError
    assert "sent batch 0 a second time" in str(error)
    assert loader.audit is not None
    assert loader.audit.duplicated.tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize("batch_size", [4, None])
def test_gap_in_a_stream(batch_size: int | None) -> None:
    loader = SafeDataLoader(
        datasets.Stream(), batch_size, num_workers=1, worker_init_fn=skips_in_stream
    )
    error = caught(loader)
    assert type(error) is DeliveryError
    assert "where number" in str(error)
    lost = batch_size or 1
    assert loader.audit is not None
    assert loader.audit.missing.tolist() == [[0, lost + k] for k in range(lost)]


def test_warn_hands_over_and_off_says_nothing() -> None:
    def run(verify: str) -> tuple[list[int], Any, int]:
        loader = SafeDataLoader(
            Numbers(), 4, num_workers=1, worker_init_fn=other_indices, verify=verify
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            got = [int(value) for batch in loader for value in batch]
        told = [warning for warning in said if "answered for" in str(warning.message)]
        return got, loader.audit, len(told)

    for verify, warned in (("warn", 1), ("off", 0)):
        got, audit, told = run(verify)
        assert told == warned
        assert len(got) == 100
        assert 99 in got[12:16]
        assert not audit.ok
        assert audit.missing.tolist() == [13]


def test_batches_of_a_killed_worker_have_failed() -> None:
    """The error tells of the dead worker; a user who goes on comes to the end, as under torch."""
    loader = SafeDataLoader(Numbers(), 4, num_workers=2, collate_fn=list)
    iterator = iter(loader)
    next(iterator)
    victim = iterator._workers[1]  # type: ignore[attr-defined]
    os.kill(victim.pid, signal.SIGKILL)
    errors: list[str] = []  # not the errors, which would hold the iterator in a cycle
    while True:
        try:  # torch's signal handler raises wherever the main process is
            victim.join(10)
            next(iterator)
        except StopIteration:
            break
        except (RuntimeError, DeliveryError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    (error,) = errors
    assert error.startswith("WorkerCrashError")
    audit = loader.audit
    assert audit is not None
    assert audit.counts["failed"] == audit.drawn - audit.delivered > 0
    assert audit.counts["missing"] == 0
    assert not audit.complete
    assert not audit.ok


@pytest.mark.parametrize("workers", WORKERS)
def test_early_break_is_no_error(workers: int) -> None:
    loader = SafeDataLoader(Numbers(), 4, num_workers=workers)
    for _ in loader:
        break
    audit = loader.audit
    assert audit is not None
    assert audit.ok
    assert not audit.complete
    assert audit.delivered == 4


@pytest.mark.parametrize("workers", WORKERS)
def test_dropped_repeated_and_unvisited_are_reported_and_no_errors(workers: int) -> None:
    loader = SafeDataLoader(Numbers(), 8, drop_last=True, num_workers=workers)
    list(loader)
    audit = loader.audit
    assert audit is not None
    assert audit.ok
    assert audit.complete
    assert audit.dropped.tolist() == [96, 97, 98, 99]
    assert (audit.drawn, audit.delivered) == (100, 96)
    assert "dropped: 4, left out by drop_last: 96, 97, 98, 99" in str(audit)

    batches = BatchSampler(SequentialSampler(range(30)), 8, drop_last=True)
    loader = SafeDataLoader(Numbers(), batch_sampler=batches, num_workers=workers)
    list(loader)
    assert loader.audit is not None
    assert loader.audit.dropped.tolist() == list(range(24, 30))
    assert loader.audit.unvisited.tolist() == list(range(30, 100))

    sampler = WeightedRandomSampler([1.0] * 5 + [0.0] * 95, 20)
    loader = SafeDataLoader(Numbers(), 8, sampler=sampler, num_workers=workers)
    list(loader)
    assert loader.audit is not None
    assert loader.audit.ok
    assert set(loader.audit.repeated.tolist()) <= set(range(5))
    assert loader.audit.counts["repeated"] > 0
    assert loader.audit.counts["unvisited"] >= 95


@pytest.mark.parametrize("workers", WORKERS)
def test_key_finds_two_indices_with_one_sample(workers: int) -> None:
    loader = SafeDataLoader(Numbers(), 4, num_workers=workers, key=faults.key_thirds)
    error = caught(loader)
    assert type(error) is DeliveryError
    assert "index 1 and index 0 are one sample (key 0)" in str(error)
    assert loader.audit is not None
    assert loader.audit.duplicated.tolist() == [1, 2]


def test_key_finds_workers_that_read_one_stream() -> None:
    loader = SafeDataLoader(datasets.UnsharedStream(), 4, num_workers=2, key=faults.key_value)
    error = caught(loader)
    assert type(error) is DeliveryError
    assert "index (1, 0) and index (0, 0) are one sample" in str(error)
    clean = SafeDataLoader(datasets.Stream(), 4, num_workers=2, key=first_key)
    list(clean)
    assert clean.audit is not None
    assert clean.audit.ok


def first_key(sample: Any) -> int:
    return int(sample[0])


def test_the_same_index_twice_is_repeated_and_no_duplicate() -> None:
    loader = SafeDataLoader(Numbers(), 2, sampler=[1, 1, 2, 1], key=faults.key_value)
    list(loader)
    assert loader.audit is not None
    assert loader.audit.ok
    assert loader.audit.repeated.tolist() == [1]


def test_stream_that_every_worker_reads_whole_is_told(caplog: pytest.LogCaptureFixture) -> None:
    loader = SafeDataLoader(datasets.UnsharedStream(), 4, num_workers=2)
    list(loader)
    assert loader.audit is not None
    told = "len(dataset) says 10, the workers read 20 samples: each worker read the whole stream"
    assert told in str(loader.audit)
    assert told in caplog.text


def test_worker_that_delivers_nothing_is_named(caplog: pytest.LogCaptureFixture) -> None:
    loader = SafeDataLoader(faults.IdleWorkerStream(), 2, num_workers=2)
    list(loader)
    assert "worker 1 delivered nothing" in str(loader.audit)
    assert "worker 1 delivered nothing" in caplog.text


@pytest.mark.parametrize("workers", WORKERS)
def test_stream_drops_are_listed_by_worker_and_ordinal(workers: int) -> None:
    loader = SafeDataLoader(datasets.Stream(23), 4, drop_last=True, num_workers=workers)
    list(loader)
    audit = loader.audit
    assert audit is not None
    assert audit.complete
    assert audit.drawn == 23
    # With two workers, worker 0 reads 12 samples, three whole batches, and worker 1 reads 11.
    worker, ordinals = (1, (8, 9, 10)) if workers else (0, (20, 21, 22))
    assert audit.dropped.tolist() == [[worker, ordinal] for ordinal in ordinals]


def test_provenance_is_what_the_worker_did() -> None:
    loader = SafeDataLoader(datasets.TellsWhere(), 2, num_workers=2, collate_fn=list, shuffle=True)
    for number, batch in enumerate(loader):
        record = loader.last_batch
        assert record is not None
        assert (record.epoch, record.batch) == (0, number)
        assert record.indices == tuple(sample[0] for sample in batch)
        assert {sample[1] for sample in batch} == {record.worker_id}
        assert record.pid != os.getpid()
        assert len(record.fetch_ns) == len(batch)
        assert min(record.fetch_ns) > 0
        assert record.wait_ns > 0
        assert loader.provenance.batch(number) == record
    assert torch.tensor(loader.provenance.to_numpy()["index"]).sort().values.tolist() == list(
        range(9)
    )


def sorts_in_place(samples: list[Any]) -> Any:
    samples.sort(reverse=True)
    return torch.tensor(samples)


def empties(samples: list[Any]) -> Any:
    return torch.tensor([samples.pop() for _ in range(len(samples))])


class SortsIndices(Numbers):
    """What a dataset over HDF5 has to do."""

    def __getitems__(self, indices: list[int]) -> list[int]:
        indices.sort()
        return list(indices)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("collate", [sorts_in_place, empties])
def test_collate_functions_that_change_their_list_are_no_trouble(
    collate: Any, workers: int
) -> None:
    loader = SafeDataLoader(Numbers(), 4, num_workers=workers, collate_fn=collate)
    assert sum(len(batch) for batch in loader) == 100
    assert loader.audit is not None
    assert loader.audit.ok


@pytest.mark.parametrize("workers", WORKERS)
def test_getitems_that_sorts_its_list_is_no_trouble(workers: int) -> None:
    loader = SafeDataLoader(SortsIndices(), 4, shuffle=True, num_workers=workers)
    assert sum(len(batch) for batch in loader) == 100
    assert loader.audit is not None
    assert loader.audit.ok


def collate_sorted(samples: list[Any]) -> Any:
    samples.sort(key=lambda sample: -int(sample["label"]))
    return torch.stack([sample["feature"] for sample in samples])


@pytest.mark.parametrize("workers", WORKERS)
def test_odd_sample_is_named_though_the_collate_function_sorted(workers: int) -> None:
    loader = SafeDataLoader(
        faults.Ragged("shape"), 4, num_workers=workers, collate_fn=collate_sorted
    )
    error = caught(loader)
    assert error.index == 13


class Timed(SafeDataLoader[Any]):
    """A subclass that wraps torch's hook."""

    def _get_iterator(self) -> Any:
        return (batch * 100 for batch in super()._get_iterator())


@pytest.mark.parametrize("workers", WORKERS)
def test_hook_of_a_subclass_is_used(workers: int) -> None:
    assert [batch.tolist() for batch in Timed(list(range(4)), 2, num_workers=workers)] == [
        [0, 100],
        [200, 300],
    ]


class RandomLength:
    """Its length is found by drawing, as bucketing samplers do."""

    def __iter__(self) -> Any:
        order = torch.randperm(12).tolist()
        return iter([order[:4], order[4:8], order[8:]])

    def __len__(self) -> int:
        return sum(1 for _ in self)


def test_length_that_draws_random_numbers_is_not_asked_for() -> None:
    def run(loader_class: Any) -> Any:
        torch.manual_seed(3)
        batches = [b.tolist() for b in loader_class(Numbers(), batch_sampler=RandomLength())]
        return batches, torch.rand(1).item()

    assert run(SafeDataLoader) == run(DataLoader)


class Endless(Numbers):
    def __len__(self) -> int:
        return 10**15


def test_virtual_dataset_has_an_audit() -> None:
    loader = SafeDataLoader(Endless(), 2, sampler=[0, 10**14, 5, 7])
    list(loader)
    assert loader.audit is not None
    assert loader.audit.ok
    assert loader.audit.counts["unvisited"] >= 10**15 - 4
    assert loader.audit.unvisited[:4].tolist() == [1, 2, 3, 4]


class StumblingBatches:
    """An iterator that raises once and goes on."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> list[int]:
        self.at += 1
        if self.at == 2:
            raise ValueError("a bad shard")
        if self.at > 4:
            raise StopIteration
        return [self.at]


@pytest.mark.parametrize("workers", WORKERS)
def test_batches_after_a_sampler_error_still_come(workers: int) -> None:
    loader = SafeDataLoader(Numbers(), batch_sampler=StumblingBatches(), num_workers=workers)
    iterator = iter(loader)
    got = [int(next(iterator))]
    assert caught(iterator).failure.phase == "sampler"
    got += [int(batch) for batch in iterator]
    assert got == [1, 3, 4]


def test_without_a_key_workers_that_stay_have_theirs_compared_no_more() -> None:
    loader = SafeDataLoader(
        torch.arange(4), num_workers=1, persistent_workers=True, key=lambda sample: 1, verify="warn"
    )
    with pytest.warns(RuntimeWarning, match="are one sample"):
        list(loader)
    loader.key = None
    list(loader)
    assert loader.audit.ok
