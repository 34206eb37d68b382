"""``loader.metrics()``: each number against what was done to get it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Dataset

from safeloader import Recorder, SafeDataLoader
from safeloader.delivery.audit import EpochAudit
from safeloader.delivery.indices import pack
from safeloader.delivery.manifest import BatchManifest
from safeloader.provenance.metrics import metrics_of
from safeloader.supervision.flight_recorder import MEMORY, FlightRecorder

MS = 1_000_000
ALWAYS = {"epoch", "batches", "samples", "skipped", "replaced"}
OF_BATCHES = {"wait_share", "samples_per_s", "fetch_p50_ms", "fetch_p95_ms"}


def written(*batches: tuple[int, int, list[int]]) -> Recorder:
    """A notebook with batches: when asked for, how long waited for, each fetch; in ms."""
    recorder = Recorder()
    epoch = recorder.begin_epoch(EpochAudit)
    for number, (began, wait, fetches) in enumerate(batches):
        stamps = np.cumsum([0, *fetches, 0]) * MS
        manifest = BatchManifest(
            number, None, 1, pack(list(range(len(fetches)))), len(fetches), stamps=stamps.tobytes()
        )
        recorder.delivered(epoch, number, wait * MS, manifest, began * MS)
    return recorder


def test_the_numbers_are_those_of_the_batches() -> None:
    recorder = written((0, 30, [1] * 10), (50, 10, [2] * 9 + [40]), (80, 20, [3] * 17 + [40] * 3))
    assert metrics_of(recorder) == {
        "epoch": 0,
        "batches": 3,
        "samples": 40,
        "skipped": 0,
        "replaced": 0,
        "wait_share": 0.6,  # 60 of the 100 ms from the first ask to the last hand-over
        "samples_per_s": 400,
        "fetch_p50_ms": 3,
        "fetch_p95_ms": 40,
    }


def test_the_newest_batches_are_looked_at_from_the_hand_over_before_them() -> None:
    recorder = written((0, 30, [1] * 10), (50, 10, [2] * 10), (80, 20, [3] * 20))
    newest = metrics_of(recorder, 2)
    assert newest["batches"] == 2
    assert newest["wait_share"] == pytest.approx(30 / 70)
    assert newest["samples_per_s"] == pytest.approx(30 / 0.070)
    assert metrics_of(recorder, 3) == metrics_of(recorder, 4) == metrics_of(recorder)


def test_the_first_batch_alone_was_waited_for_all_the_time() -> None:
    assert metrics_of(written((5, 30, [1])))["wait_share"] == 1


def test_what_is_not_known_is_left_out() -> None:
    loader = SafeDataLoader([1, 2])
    assert loader.metrics() == {}
    running = iter(loader)
    assert set(loader.metrics()) == ALWAYS
    next(running)
    assert set(loader.metrics()) == ALWAYS | OF_BATCHES


@pytest.mark.parametrize("last", [0, -1])
def test_a_number_of_batches_that_is_none_is_refused(last: int) -> None:
    with pytest.raises(ValueError, match=f"positive number of batches.*got {last}"):
        SafeDataLoader([1]).metrics(last)


def test_every_value_is_a_float_and_of_the_newest_epoch() -> None:
    loader = SafeDataLoader(list(range(10)), batch_size=4)
    list(loader)
    next(iter(loader))
    metrics = loader.metrics()
    assert (metrics["epoch"], metrics["batches"], metrics["samples"]) == (1, 1, 4)
    assert {type(value) for value in metrics.values()} == {float}


class Failing(Dataset[int]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        if index in (1, 2, 5):
            raise ValueError(f"no sample {index}")
        return index


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("way", "left"), [("skip", 17), ("replace", 20)])
def test_skips_are_counted_for_the_epoch_with_batches_left_out_whole(
    workers: int, way: Any, left: int
) -> None:
    loader = SafeDataLoader(
        Failing(), batch_size=1 if way == "skip" else 4, on_error=way, num_workers=workers
    )
    name = "skipped" if way == "skip" else "replaced"
    for _ in range(2):
        for _ in loader:
            pass
        metrics = loader.metrics()
        assert metrics[name] == 3 == loader.audit.counts[name]
        assert metrics["samples"] == left
    assert loader.metrics(1)[name] == 3


class Slow(Dataset[int]):
    """Each sample takes two milliseconds."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        until_ns = time.perf_counter_ns() + 2 * MS
        while time.perf_counter_ns() < until_ns:
            pass
        return index


def test_the_time_of_a_fetch_is_at_least_what_it_took() -> None:
    loader = SafeDataLoader(Slow(6), batch_size=3)
    list(loader)
    metrics = loader.metrics()
    assert metrics["fetch_p95_ms"] >= metrics["fetch_p50_ms"] >= 2
    assert metrics["samples_per_s"] <= 500


def test_memory_of_the_workers_is_known_once_each_has_told_it() -> None:
    loader = SafeDataLoader(list(range(10**6)), num_workers=2, batch_size=10)
    running = iter(loader)
    while "worker_memory_mib" not in loader.metrics(1):  # the test's time limit ends it
        next(running)
    told = loader.metrics(1)["worker_memory_mib"]
    assert 1 < told < 10_000
    del running
    assert loader.metrics(1)["worker_memory_mib"] > 1


def test_memory_is_remembered_when_the_workers_are_gone() -> None:
    recorder, flight = written((0, 30, [1])), FlightRecorder(2)
    recorder.memory_of_workers = lambda: flight.memory
    assert "worker_memory_mib" not in metrics_of(recorder)
    for worker, pss in enumerate((3 << 20, 5 << 20)):
        assert flight.memory() is None
        flight.row(worker)[MEMORY + 4] = pss
    recorder.closed(0, ())
    recorder.memory_of_workers = lambda: None
    assert metrics_of(recorder)["worker_memory_mib"] == 8
