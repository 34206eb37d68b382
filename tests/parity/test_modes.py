"""Every mode against the stock loader: same batches bit for bit, same random numbers after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    StackDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from safeloader import SafeDataLoader
from tests import datasets as d
from tests.oracle import observe

Make = Callable[[type], Any]


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors() -> TensorDataset:
    return TensorDataset(torch.arange(46.0).reshape(23, 2), torch.arange(23))


def evens_and_odds() -> BatchSampler:
    return BatchSampler(RandomSampler(range(23)), batch_size=5, drop_last=True)


# name -> how to make the loader, given its class and the number of workers
MODES: dict[str, Callable[[type, int], Any]] = {
    "map": lambda c, n: c(d.Noisy(), 4, num_workers=n),
    "map, positional": lambda c, n: c(d.Noisy(), 4, True, None, None, n),
    "shuffle": lambda c, n: c(d.Noisy(), batch_size=4, shuffle=True, num_workers=n),
    "generator": lambda c, n: c(d.Noisy(), 4, shuffle=True, generator=generator(), num_workers=n),
    "drop_last": lambda c, n: c(d.Noisy(), 4, shuffle=True, drop_last=True, num_workers=n),
    "empty": lambda c, n: c(d.Noisy(0), 4, num_workers=n),
    "fewer samples than a batch, dropped": lambda c, n: c(
        d.Noisy(3), 4, drop_last=True, num_workers=n
    ),
    "__getitems__": lambda c, n: c(d.Together(), 4, shuffle=True, num_workers=n),
    "subset": lambda c, n: c(Subset(d.Noisy(), [5, 3, 8, 1, 9]), 2, num_workers=n),
    "stack": lambda c, n: c(StackDataset(a=tensors(), b=d.Noisy()), 4, num_workers=n),
    "tensors": lambda c, n: c(tensors(), 4, shuffle=True, num_workers=n),
    "tensors, bulk": lambda c, n: c(
        tensors(), batch_size=None, sampler=evens_and_odds(), num_workers=n
    ),
    "a list": lambda c, n: c(list(range(10)), 3, num_workers=n),
    "a string": lambda c, n: c("abcdefg", 3, num_workers=n),
    "batch_size None": lambda c, n: c(d.Noisy(), batch_size=None, num_workers=n),
    "batch_size None, shuffle": lambda c, n: c(
        d.Noisy(), batch_size=None, shuffle=True, num_workers=n
    ),
    "bulk": lambda c, n: c(d.Bulk(), batch_size=None, sampler=evens_and_odds(), num_workers=n),
    "greedy sampler": lambda c, n: c(d.Noisy(), 4, sampler=d.GreedySampler(23), num_workers=n),
    "sampler without length": lambda c, n: c(
        d.Noisy(), 3, sampler=d.LengthlessSampler(), num_workers=n
    ),
    "weighted sampler": lambda c, n: c(
        d.Noisy(), 4, sampler=WeightedRandomSampler(list(range(1, 24)), 30), num_workers=n
    ),
    "distributed sampler": lambda c, n: c(
        d.Noisy(), 4, sampler=DistributedSampler(d.Noisy(), 3, 1, shuffle=True), num_workers=n
    ),
    "named samples": lambda c, n: c(d.Named(), 3, sampler=list(d.Named.names), num_workers=n),
    "batch sampler": lambda c, n: c(d.Noisy(), batch_sampler=evens_and_odds(), num_workers=n),
    "own batch sampler": lambda c, n: c(
        d.Noisy(), batch_sampler=d.OwnBatchSampler(), num_workers=n
    ),
    "list of batches": lambda c, n: c(
        d.Noisy(), batch_sampler=[[1, 2], [3], [], [4, 4]], collate_fn=list, num_workers=n
    ),
    "collate_fn": lambda c, n: c(d.Noisy(), 4, collate_fn=d.collate_with_info, num_workers=n),
    "worker info": lambda c, n: c(d.TellsWhere(), 2, num_workers=n),
    "stream": lambda c, n: c(d.Stream(), 4, num_workers=n),
    "stream, drop_last": lambda c, n: c(d.Stream(), 4, drop_last=True, num_workers=n),
    "stream, uneven": lambda c, n: c(d.Stream(uneven=True), 2, num_workers=n),
    "stream, batch_size None": lambda c, n: c(d.Stream(), batch_size=None, num_workers=n),
    "stream, random in iter": lambda c, n: c(d.OneShotStream(), 3, num_workers=n),
    "datapipe": lambda c, n: c(d.datapipe(), 4, shuffle=True, num_workers=n),
    "datapipe, unbatched": lambda c, n: c(d.datapipe(), batch_size=None, num_workers=n),
    "a loader in the dataset": lambda c, n: c(d.HoldsALoader(c), 2, num_workers=n),
    "a stock loader in the dataset": lambda c, n: c(d.HoldsALoader(DataLoader), 2, num_workers=n),
    "a loader over itself": lambda c, n: c(d.HoldsALoader(c, True), 2, num_workers=n),
    "pin_memory": lambda c, n: c(d.Noisy(), 4, pin_memory=True, num_workers=n),
}

WORKER_MODES: dict[str, Make] = {
    "worker_init_fn": lambda c: c(d.Noisy(), 4, num_workers=2, worker_init_fn=d.worker_init),
    "prefetch_factor": lambda c: c(d.Noisy(), 2, num_workers=2, prefetch_factor=5, shuffle=True),
    "timeout": lambda c: c(d.Noisy(), 4, num_workers=2, timeout=60),
    "more workers than batches": lambda c: c(d.Noisy(3), 2, num_workers=3),
    "persistent": lambda c: c(d.Noisy(), 4, num_workers=2, persistent_workers=True, shuffle=True),
    "persistent stream": lambda c: c(d.Stream(), 4, num_workers=2, persistent_workers=True),
    "persistent datapipe": lambda c: c(
        d.datapipe(), 4, num_workers=2, persistent_workers=True, shuffle=True
    ),
    "persistent, pinned": lambda c: c(
        d.Noisy(), 4, num_workers=2, persistent_workers=True, pin_memory=True
    ),
}


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_same_as_stock(mode: str, workers: int) -> None:
    make = MODES[mode]
    assert observe(SafeDataLoader, lambda c: make(c, workers)) == observe(
        DataLoader, lambda c: make(c, workers)
    )


@pytest.mark.parametrize("mode", WORKER_MODES)
def test_same_as_stock_with_workers(mode: str) -> None:
    make = WORKER_MODES[mode]
    assert observe(SafeDataLoader, make) == observe(DataLoader, make)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["spawn", pytest.param("forkserver", marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    "mode", ["shuffle", "__getitems__", "stream, drop_last", "datapipe", "batch_size None"]
)
def test_same_as_stock_under_other_start_methods(mode: str, start: str) -> None:
    def make(loader_class: type) -> Any:
        loader = MODES[mode](loader_class, 2)
        loader.multiprocessing_context = start
        loader.worker_init_fn = d.worker_init
        return loader

    assert observe(SafeDataLoader, make, 1) == observe(DataLoader, make, 1)


def test_out_of_order_delivers_the_same_multiset() -> None:
    def make(loader_class: type) -> Any:
        return loader_class(
            d.TellsWhere(), batch_size=2, num_workers=2, in_order=False, collate_fn=list
        )

    def indices(loader: Any) -> list[int]:
        return sorted(sample[0] for batch in loader for sample in batch)

    safe = make(SafeDataLoader)
    assert indices(safe) == indices(make(DataLoader)) == list(range(9))
    assert safe.audit.ok
    assert safe.audit.complete


@pytest.mark.parametrize("workers", [0, 2])
def test_off_is_the_stock_loader(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setenv("SAFELOADER", "off")

    def make(loader_class: type) -> Any:
        return loader_class(d.Noisy(), 4, shuffle=True, num_workers=workers)

    assert observe(SafeDataLoader, make) == observe(DataLoader, make)
    loader = make(SafeDataLoader)
    assert type(iter(loader)) is type(iter(make(DataLoader)))
    assert loader.last_batch is None
    assert loader.audit is None
    assert len(loader.provenance) == 0
