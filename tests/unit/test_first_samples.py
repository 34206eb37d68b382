"""What looks at the first samples of an epoch takes time, which is nobody's fetch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, default_collate

from safeloader.delivery.indices import pack
from safeloader.transport.messages import DeliveredBatch, Task
from safeloader.worker import first_samples, mapping, recording, streaming
from safeloader.worker.context import FetchContext
from safeloader.worker.first_samples import WATCHED_MAX, FirstSamples
from safeloader.worker.policy import Policy
from safeloader.worker.startup import fetcher_for


class Clock:
    """Stands still, but for what somebody takes."""

    now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (first_samples, mapping, recording, streaming):
        monkeypatch.setattr(module, "clock", clock)
    return clock


class Slow:
    """Whatever it is asked takes a second."""

    wants_elements = True

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seconds = 0.0

    def stores(self) -> list[Any]:
        self.clock.now += 1_000_000_000
        return []

    def generators(self, anew: bool = False) -> dict[str, Any]:
        self.clock.now += 1_000_000_000
        return {}

    def orders(self) -> dict[str, Any]:
        self.clock.now += 1_000_000_000
        return {}

    def notes(self, *args: Any, **kwargs: Any) -> None:
        self.clock.now += 1_000_000_000

    note_orders = note_stream = opened = fetched = notes

    def took(self, seconds: float) -> None:
        self.seconds += seconds


class Timed:
    """Sample ``k`` takes ``k`` + 1 ns, but for the one that is slow."""

    slow: int | None = None

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        self.clock.now += 9_999_999 if index == self.slow else index + 1
        return index


class Fails(Timed):
    """Sample 1 fails each time, and takes its time."""

    def __getitem__(self, index: int) -> int:
        sample = super().__getitem__(index)
        if index == 1:
            raise ValueError(index)
        return sample


class AtOnce(Timed):
    def __getitems__(self, indices: list[int]) -> list[int]:
        return [self[index] for index in indices]


class Stream(IterableDataset[int]):
    def __init__(self, clock: Clock) -> None:
        self.timed = Timed(clock)

    def __iter__(self) -> Iterator[int]:
        return map(self.timed.__getitem__, range(100))


class Collates:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self, samples: Any) -> torch.Tensor:
        self.clock.now += 7
        batch: torch.Tensor = default_collate(samples)
        return batch


def key(sample: int) -> int:
    return sample


def stock_of(dataset: Any, clock: Clock) -> Any:
    stock = SimpleNamespace(
        dataset=dataset, auto_collation=True, collate_fn=Collates(clock), drop_last=False
    )
    if isinstance(dataset, Stream):
        stock.dataset_iter = iter(dataset)
    return stock


def parts_of(made: DeliveredBatch) -> list[int]:
    """How long each part of a batch took, as its manifest has it."""
    stamps = memoryview(made.manifest.stamps or b"").cast("q").tolist()
    return [b - a for a, b in itertools.pairwise(stamps)]


def fetched(dataset: Any, clock: Clock, batches: int, **context: Any) -> list[list[int]]:
    """The parts of so many batches of three."""
    fetcher = fetcher_for(stock_of(dataset, clock), FetchContext(None, **context))
    observer = Slow(clock)
    fetcher.by_way_of(FirstSamples(observer, fetcher))
    parts = []
    for seq in range(batches):
        indices = list(range(3 * seq, 3 * seq + 3))
        packed = None if isinstance(dataset, Stream) else pack(indices)
        made = fetcher.fetch(Task(seq, indices, (), False, packed))
        assert type(made) is DeliveredBatch
        assert made.payload.tolist() == indices
        parts.append(parts_of(made))
    assert observer.seconds >= 5
    return parts


@pytest.mark.parametrize("given", [{"apart": True}, {"key": key, "apart": True}])
def test_of_single_samples(clock: Clock, given: dict[str, Any]) -> None:
    assert fetched(Timed(clock), clock, 3, **given) == [[1, 2, 3, 7], [4, 5, 6, 7], [7, 8, 9, 7]]


@pytest.mark.parametrize("given", [{}, {"key": key}])
def test_of_samples_timed_together(clock: Clock, given: dict[str, Any]) -> None:
    assert fetched(Timed(clock), clock, 3, **given) == [[1, 2, 3, 7], [15, 7], [24, 7]]


@pytest.mark.parametrize("given", [{}, {"key": key}])
def test_so_that_cheap_samples_are_cheap_still(clock: Clock, given: dict[str, Any]) -> None:
    dataset = Timed(clock)
    dataset.slow = 4
    parts = fetched(dataset, clock, 3, **given)
    assert parts == [[1, 2, 3, 7], [4 + 9_999_999 + 6, 7], [7, 8, 9, 7]]


def test_of_a_batch_in_one_call(clock: Clock) -> None:
    assert fetched(AtOnce(clock), clock, 2) == [[6, 7], [15, 7]]


def test_of_a_stream(clock: Clock) -> None:
    assert fetched(Stream(clock), clock, 3) == [[1, 2, 3, 7], [4, 5, 6, 7], [7, 8, 9, 7]]


def test_of_the_batch_in_which_it_ends(clock: Clock) -> None:
    batches = WATCHED_MAX // 3 + 2
    parts = fetched(Timed(clock), clock, batches, apart=True)
    assert parts == [[3 * k + 1, 3 * k + 2, 3 * k + 3, 7] for k in range(batches)]


@pytest.mark.parametrize("retries", [0, 1])
def test_of_batches_in_which_samples_fail(clock: Clock, retries: int) -> None:
    policy = Policy("skip", retries)
    dataset = Fails(clock)
    stock = stock_of(dataset, clock)
    fetcher = fetcher_for(stock, FetchContext(None, policy=policy, apart=True))
    fetcher.by_way_of(FirstSamples(Slow(clock), fetcher))
    made = fetcher.fetch(Task(0, [0, 1, 2], (), False, None))
    assert type(made) is DeliveredBatch
    assert made.payload.tolist() == [0, 2]
    assert parts_of(made) == [1, 2 * (1 + retries), 3, 7]


class Breaks(Slow):
    """Its first look takes a second, and fails."""

    def stores(self) -> list[Any]:
        super().stores()
        raise OSError


@pytest.mark.parametrize("given", [{}, {"key": key}])
def test_of_a_look_that_failed(clock: Clock, given: dict[str, Any]) -> None:
    fetcher = fetcher_for(stock_of(Timed(clock), clock), FetchContext(None, **given))
    fetcher.by_way_of(FirstSamples(Breaks(clock), fetcher))
    made = fetcher.fetch(Task(0, [0, 1, 2], (), False, None))
    assert type(made) is DeliveredBatch
    assert parts_of(made) == [1, 2, 3, 7]
