"""Other loaders, as a table like that of the contenders; an optional part of the benchmarks.

Each is used as its documentation recommends, in the fastest of its forms that we found, with
buffers of the stock loader's size. It gets the order that the stock loader draws from the same
seed, so all of them give the same batches, which :mod:`benchmarks.timing` checks in every run.
Where workers are fresh, everything of a peer starts with each epoch and ends with it.
None of them is needed for anything else: they are imported on demand.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from benchmarks.cases import (
    START_METHOD,
    Case,
    FolderDataset,
    PoolDataset,
    StringDataset,
    Unavailable,
)
from benchmarks.contenders import AS_IT_COMES, CONTENDERS, REFERENCE, Factory

AHEAD = 2
"""Batches that a worker makes ahead: the stock loader's `prefetch_factor`."""

ONLY_THESE = (
    "it is compared on tensors, strings and a folder of files; samples with random numbers or of "
    "another structure come out of it as other batches"
)

Indices = list[int]


def _module(name: str, distribution: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        reason = f"{distribution} is not installed (pip install -e '.[peers]')"
        if not isinstance(exc, ModuleNotFoundError):
            reason = f"{distribution} cannot be imported: {exc}"
        raise Unavailable(reason) from None


def _need_workers(kwargs: Mapping[str, Any]) -> int:
    workers: int = kwargs.get("num_workers", 0)
    if not workers:
        raise Unavailable("it is compared with workers only")
    return workers


def _need_no_random_numbers(dataset: Dataset[Any]) -> None:
    if not isinstance(dataset, PoolDataset | StringDataset | FolderDataset):
        raise Unavailable(ONLY_THESE)


def _is_fresh(kwargs: Mapping[str, Any]) -> bool:
    return not kwargs["persistent_workers"]


def _order(dataset: Any, kwargs: Mapping[str, Any]) -> Indices:
    """The indices of the stock loader's first epoch; its generator stays as it is."""
    generator = torch.Generator()
    generator.set_state(kwargs["generator"].get_state())
    return list(DataLoader(range(len(dataset)), None, kwargs.get("shuffle"), generator=generator))


def _batches(dataset: Any, kwargs: Mapping[str, Any]) -> list[Indices]:
    size, order = kwargs["batch_size"], _order(dataset, kwargs)
    return [order[first : first + size] for first in range(0, len(order), size)]


class _Anew:
    """Makes the loader again for each epoch.

    The last one goes when the next epoch starts, which counts it: at the end of its own the
    consumer still has a batch, in memory that goes with the loader.
    """

    def __init__(self, make: Callable[[], Iterable[Any]]) -> None:
        self.make = make
        self._last: Iterable[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        self._last = None
        self._last = self.make()
        yield from self._last


# -------------------------------------------------------------------------- torch, forkserver


def _of_a_server(name: str, *modules: str) -> Factory:
    """A contender whose workers are forked by a server, Python's default from 3.14 on.

    The server has the modules, and that of the datasets, imported before it forks.
    """

    def make(dataset: Dataset[Any], kwargs: Mapping[str, Any], folder: Path) -> Iterable[Any]:
        _need_workers(kwargs)
        if "forkserver" not in multiprocessing.get_all_start_methods():
            raise Unavailable("this system has no forkserver")
        # As Python's documentation recommends: without it each worker imports torch, for seconds.
        # It comes too late, and changes nothing, where the server runs already.
        preloaded = [Case.__module__, *modules]
        multiprocessing.get_context("forkserver").set_forkserver_preload(preloaded)
        method = {"multiprocessing_context": "forkserver"}
        return CONTENDERS[name](dataset, {**kwargs, **method}, folder)

    return make


# ---------------------------------------------------------------------------------- torchdata


def _stateful(dataset: Dataset[Any], kwargs: Mapping[str, Any], folder: Path) -> Iterable[Any]:
    module = _module("torchdata.stateful_dataloader", "torchdata")
    _need_workers(kwargs)
    if isinstance(dataset, IterableDataset):
        raise Unavailable("it is compared on datasets with a length")
    # A sampler of its own would draw other numbers from the same seed.
    ordered = {"shuffle": False, "sampler": _order(dataset, kwargs)}
    return module.StatefulDataLoader(dataset, **{**kwargs, **ordered})


# --------------------------------------------------------------------------------------- SPDL


class _Fetch:
    """Indices of a batch in, the batch out: what the stock loader's worker does."""

    def __init__(self, dataset: Any, kwargs: Mapping[str, Any]) -> None:
        self.dataset = dataset
        self.collate = kwargs.get("collate_fn") or default_collate

    def __call__(self, indices: Indices) -> Any:
        return self.collate([self.dataset[index] for index in indices])


class _Fetched:
    """Batches, made where they are asked for: in SPDL's process."""

    def __init__(self, fetch: _Fetch, batches: list[Indices]) -> None:
        self.fetch = fetch
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return map(self.fetch, self.batches)


def _largest_bytes(fetch: _Fetch, batches: list[Indices]) -> int:
    """Of a batch: all are looked at where they differ in size."""
    looked_at = batches if isinstance(fetch.dataset, StringDataset) else batches[:1]
    return max(_bytes(fetch(indices)) for indices in looked_at)


def _bytes(batch: Any) -> int:
    if isinstance(batch, dict):
        return sum(map(_bytes, batch.values()))
    return sum(map(_bytes, batch)) if isinstance(batch, list | tuple) else int(batch.nbytes)


SPDL_SLACK = 4096
"""Bytes of a segment beyond its batch: for what SPDL aligns."""


def _spdl(dataset: Dataset[Any], kwargs: Mapping[str, Any], folder: Path) -> Iterable[Any]:
    """A subprocess over a pool of shared-memory segments, which belongs to that one process.

    A plain iteration, or where images are decoded a `Pipeline` of as many threads as the case has
    workers. On every other row the threads made it slower, by a factor of three to four on most.
    """
    spdl = _module("spdl.pipeline", "spdl-core")
    workers = _need_workers(kwargs)
    _need_no_random_numbers(dataset)
    batches, fetch = _batches(dataset, kwargs), _Fetch(dataset, kwargs)
    room = _largest_bytes(fetch, batches) + SPDL_SLACK
    ahead = AHEAD * workers

    def make() -> Iterable[Any]:
        options = {
            "buffer_size": ahead,
            # As in the stock loader's workers: more threads hang in a forked process.
            "initializer": functools.partial(torch.set_num_threads, 1),
            "mp_context": START_METHOD,
            # Those being written, those on their way, and two that the consumer refers to.
            "arena": spdl.SharedMemorySegmentPool(room, workers + ahead + 2),
        }
        if not isinstance(dataset, FolderDataset):
            iterated: Iterable[Any] = spdl.iterate_in_subprocess(
                functools.partial(_Fetched, fetch, batches), **options
            )
            return iterated
        config = _pipeline(spdl, fetch, batches, workers).get_config()
        run: Iterable[Any] = spdl.run_pipeline_in_subprocess(config, num_threads=workers, **options)
        return run

    return _Anew(make) if _is_fresh(kwargs) else make()


def _pipeline(spdl: Any, fetch: _Fetch, batches: list[Indices], workers: int) -> Any:
    source = spdl.PipelineBuilder().add_source(batches)
    # Without an order of its own a pipeline gives what is ready first.
    made = source.pipe(fetch, concurrency=workers, output_order="input")
    return made.add_sink(AHEAD * workers)


def _spdl_threads(dataset: Dataset[Any], kwargs: Mapping[str, Any], folder: Path) -> Iterable[Any]:
    """A `Pipeline` in the main process, with as many threads as the case has workers.

    It is built for each epoch, as its documentation shows: threads have no long start.
    """
    spdl = _module("spdl.pipeline", "spdl-core")
    workers = _need_workers(kwargs)
    _need_no_random_numbers(dataset)
    batches, fetch = _batches(dataset, kwargs), _Fetch(dataset, kwargs)

    def epoch() -> Iterator[Any]:
        pipeline = _pipeline(spdl, fetch, batches, workers).build(num_threads=workers)
        with pipeline.auto_stop():
            yield from pipeline

    return _Anew(epoch)


# -------------------------------------------------------------------------------------- Grain


class _Rows:
    """Samples of a pool without torch."""

    def __init__(self, dataset: PoolDataset) -> None:
        self.pool = dataset.pool.numpy()

    def __call__(self, index: int) -> np.ndarray[Any, Any]:
        return self.pool[index % len(self.pool)]


def _token_array(dataset: StringDataset, index: int) -> np.ndarray[Any, Any]:
    return np.array(dataset.tokens(index))


def _pad_arrays(samples: Sequence[np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """What `cases.collate_tokens` does, without torch."""
    lengths = np.array([len(each) for each in samples])
    padded = np.zeros((len(samples), lengths.max()), samples[0].dtype)
    for row, each in zip(padded, samples, strict=True):
        row[: len(each)] = each
    mask = np.arange(padded.shape[1]) < lengths[:, None]
    return {"input_ids": padded, "attention_mask": mask}


def _in_arrays(dataset: Dataset[Any]) -> tuple[Callable[[int], Any], Any]:
    """What makes a sample, and what makes a batch where it is not stacked."""
    if isinstance(dataset, PoolDataset):
        return _Rows(dataset), None
    if isinstance(dataset, FolderDataset):
        return dataset.pixels, None
    if isinstance(dataset, StringDataset):
        return functools.partial(_token_array, dataset), _pad_arrays
    raise Unavailable(ONLY_THESE)


class _Source:
    """The dataset as Grain wants it: NumPy arrays by their place in the order."""

    def __init__(self, sample: Callable[[int], Any], order: Indices) -> None:
        self.sample = sample
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Any:
        return self.sample(self.order[place])


class _Gated:
    """A source of many epochs.

    Grain's workers end with their iterator and take seconds to start, so one iterator serves all
    epochs. Left alone it would work on while others are measured, to their loss and its own gain:
    nothing is read of an epoch before `gate`, a file with the number of samples asked for, says so.
    """

    EPOCHS = 1_000_000

    def __init__(self, source: _Source, gate: Path) -> None:
        self.source = source
        self.gate = gate
        self.expected_indices = 0

    def __len__(self) -> int:
        return len(self.source) * self.EPOCHS

    def __getitem__(self, place: int) -> Any:
        if place >= self.expected_indices:
            self._wait(place)
        return self.source[place % len(self.source)]

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


def _closed(stream: Any) -> Iterator[Any]:
    """An epoch of a Grain dataset, its threads and processes ended with it."""
    batches = iter(stream)
    try:
        yield from batches
    finally:
        batches.close()


def _grain(dataset: Dataset[Any], kwargs: Mapping[str, Any], folder: Path) -> Iterable[Any]:
    """Its `MapDataset` with worker processes, which hand batches over in shared memory.

    Its `DataLoader` is built on this, and is slower: it makes a random generator for each sample.
    """
    grain = _module("grain", "grain")
    workers, size = _need_workers(kwargs), kwargs["batch_size"]
    sample, collate = _in_arrays(dataset)
    source = _Source(sample, _order(dataset, kwargs))
    if len(source) % size:
        raise Unavailable("its one stream of all epochs would make no short batch")
    count = len(source) // size
    if workers > count:
        raise Unavailable("it has no workers without a batch")

    def stream(read: Any) -> Any:
        batches = grain.MapDataset.source(read).batch(size, batch_fn=collate)
        # No threads for reading in a worker: as Grain recommends for what is in memory.
        made = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        return made.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=AHEAD))

    if _is_fresh(kwargs):
        return _Anew(lambda: _closed(stream(source)))
    gate = folder / "gate"
    return _Epochs(lambda gate: iter(stream(_Gated(source, gate))), gate, count, size)


def _grain_threads(dataset: Dataset[Any], kwargs: Mapping[str, Any], folder: Path) -> Iterable[Any]:
    """Its `MapDataset` with threads that read ahead in the main process."""
    grain = _module("grain", "grain")
    workers = _need_workers(kwargs)
    sample, collate = _in_arrays(dataset)
    source = grain.MapDataset.source(_Source(sample, _order(dataset, kwargs)))
    batches = source.batch(kwargs["batch_size"], batch_fn=collate)
    read = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=AHEAD * workers)
    return _Anew(lambda: _closed(batches.to_iter_dataset(read)))


# -------------------------------------------------------------------------------------- table

PEERS: dict[str, Factory] = {
    # First the one with more to import: a process has one server, started for the first of them.
    "safe-forkserver": _of_a_server(AS_IT_COMES, "safeloader.loader"),
    "forkserver": _of_a_server(REFERENCE),
    "stateful": _stateful,
    "spdl": _spdl,
    "spdl-threads": _spdl_threads,
    "grain-threads": _grain_threads,
    "grain": _grain,  # last: it has threads in the main process, and others fork
}

STARTED_OTHERWISE = {
    "forkserver": "forkserver",
    "safe-forkserver": "forkserver",
    "spdl-threads": "threads",
    "grain-threads": "threads",
    "grain": "spawn",
}
"""How workers start where it is not by the start method of the case."""


def maker(name: str) -> Factory:
    """What makes the loader of this name."""
    return CONTENDERS[name] if name in CONTENDERS else PEERS[name]


def start_method(name: str, case: Case) -> str:
    """How this loader's workers start in this case."""
    return STARTED_OTHERWISE.get(name, case.start_method) if case.workers else case.start_method


def workers(name: str, case: Case) -> str:
    """How many workers this loader has in this case, and how long they live."""
    if name != "spdl" or case.workers < 2:
        return case.lives
    return f"1 {case.lasting}" + (f", {case.workers} threads" if case.real_work else "")
