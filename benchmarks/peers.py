"""Other loaders, as a table like that of the contenders; an optional part of the benchmarks.

Each is used as its documentation recommends, in the fastest of its forms that we found, with
buffers of the stock loader's size. It gets the order that the stock loader draws from the same
seed, so all of them give the same batches, which :mod:`benchmarks.timing` checks in every run.
None of them is needed for anything else: they are imported on demand.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from benchmarks.cases import PoolDataset, Unavailable
from benchmarks.contenders import CONTENDERS, Factory

AHEAD = 2
"""Batches that a worker makes ahead: the stock loader's `prefetch_factor`."""


def _module(name: str, distribution: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        reason = f"{distribution} is not installed (pip install -e '.[peers]')"
        if not isinstance(exc, ModuleNotFoundError):
            reason = f"{distribution} cannot be imported: {exc}"
        raise Unavailable(reason) from None


def _pool(dataset: Dataset[Any], kwargs: Mapping[str, Any]) -> PoolDataset:
    if not isinstance(dataset, PoolDataset) or not kwargs.get("num_workers"):
        raise Unavailable("it is compared on single tensors with workers only")
    return dataset


def _order(dataset: PoolDataset, kwargs: Mapping[str, Any]) -> list[int]:
    """The indices of the stock loader's first epoch."""
    shuffle, generator = kwargs.get("shuffle", False), kwargs["generator"]
    return list(DataLoader(range(len(dataset)), None, shuffle, generator=generator))


# ---------------------------------------------------------------------------------- torchdata


def _stateful(dataset: Dataset[Any], kwargs: Mapping[str, Any], folder: Path) -> Iterable[Any]:
    module = _module("torchdata.stateful_dataloader", "torchdata")
    pool = _pool(dataset, kwargs)
    # A sampler of its own would draw other numbers from the same seed.
    ordered = {"shuffle": False, "sampler": _order(pool, kwargs)}
    return module.StatefulDataLoader(pool, **{**kwargs, **ordered})


# --------------------------------------------------------------------------------------- SPDL


class _Collated:
    """Batches of tensors, made where they are asked for: in SPDL's process."""

    def __init__(self, dataset: PoolDataset, batches: list[list[int]]) -> None:
        self.dataset = dataset
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            yield default_collate([self.dataset[index] for index in batch])


def _spdl(dataset: Dataset[Any], kwargs: Mapping[str, Any], folder: Path) -> Iterable[Any]:
    """Its iteration in a subprocess, over a pool of shared-memory segments.

    A `Pipeline` in that subprocess does the same by threads, and was slower on every row.
    """
    pipeline = _module("spdl.pipeline", "spdl-core")
    pool = _pool(dataset, kwargs)
    if kwargs["num_workers"] != 1:
        raise Unavailable("its shared-memory segments belong to one process; this case has more")
    size, order = kwargs["batch_size"], _order(pool, kwargs)
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    # One being written, those on their way, and two that the consumer refers to at a time.
    segments = pipeline.SharedMemorySegmentPool(pool.pool[0].nbytes * size, 1 + AHEAD + 2)
    return pipeline.iterate_in_subprocess(
        functools.partial(_Collated, pool, batches),
        buffer_size=AHEAD,
        # As in the stock loader's workers: more threads hang in a forked process.
        initializer=functools.partial(torch.set_num_threads, 1),
        arena=segments,
    )


# -------------------------------------------------------------------------------------- Grain


class _Arrays:
    """The dataset as Grain wants it: NumPy arrays by their place in the order, epoch after epoch.

    Grain's workers end with their iterator and take seconds to start, so one iterator serves all
    epochs. Left alone it would work on while others are measured, to their loss and its own gain:
    nothing is read of an epoch before `gate`, a file with the number of samples asked for, says so.
    """

    EPOCHS = 1_000_000

    def __init__(self, dataset: PoolDataset, order: list[int], gate: Path) -> None:
        self.pool = dataset.pool.numpy()
        self.order = order
        self.gate = gate
        self.expected_indices = 0

    def __len__(self) -> int:
        return len(self.order) * self.EPOCHS

    def __getitem__(self, place: int) -> np.ndarray[Any, Any]:
        if place >= self.expected_indices:
            self._wait(place)
        return self.pool[self.order[place % len(self.order)] % len(self.pool)]

    def _wait(self, place: int) -> None:
        expected_indices = np.memmap(self.gate, np.int64, "r")
        while place >= expected_indices[0]:
            time.sleep(0.0005)
        self.expected_indices = int(expected_indices[0])


class _Epochs:
    """Epochs out of one stream; `make` gets the gate that opens them."""

    def __init__(
        self, make: Callable[[Path], Iterator[Any]], gate: Path, batches: int, size: int
    ) -> None:
        self._asked_for = np.memmap(gate, np.int64, "w+", shape=(1,))
        self._stream = make(gate)
        self._batches = batches
        self._size = size

    def __iter__(self) -> Iterator[Any]:
        self._asked_for[0] += self._batches * self._size
        yield from itertools.islice(self._stream, self._batches)

    def __del__(self) -> None:
        self._asked_for[0] = np.iinfo(np.int64).max  # a worker that waits could not be ended


def _grain(dataset: Dataset[Any], kwargs: Mapping[str, Any], folder: Path) -> Iterable[Any]:
    """Its `MapDataset` with worker processes, which hand batches over in shared memory.

    Its `DataLoader` is built on this, and is slower: it makes a random generator for each sample.
    """
    grain = _module("grain", "grain")
    pool = _pool(dataset, kwargs)
    workers, size = kwargs["num_workers"], kwargs["batch_size"]
    if len(pool) % (workers * size):
        raise Unavailable("its workers' shares would not make the same batches")
    # Worker w of n reads samples w, w + n, ...: dealt out so that it makes batches w, w + n, ...
    dealt = np.reshape(_order(pool, kwargs), (-1, workers, size)).transpose(0, 2, 1)

    def stream(gate: Path) -> Iterator[Any]:
        source = grain.MapDataset.source(_Arrays(pool, dealt.ravel().tolist(), gate))
        # No threads for reading in a worker: it costs nothing here.
        samples = source.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=AHEAD)
        return iter(samples.batch(size).mp_prefetch(options))

    return _Epochs(stream, folder / "gate", len(pool) // size, size)


PEERS: dict[str, Factory] = {
    "stateful": _stateful,
    "spdl": _spdl,
    "grain": _grain,  # last: it has threads in the main process, and others fork
}


def maker(name: str) -> Factory:
    """What makes the loader of this name."""
    return CONTENDERS[name] if name in CONTENDERS else PEERS[name]
