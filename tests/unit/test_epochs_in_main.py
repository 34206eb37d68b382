"""Without workers an epoch begins on what the one before left, and nobody can tell."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import random
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, SequentialSampler, default_collate

from safeloader import SafeDataLoader, SampleError
from safeloader.main.iterator import SafeIterator
from safeloader.main.worker_pool import WorkerPool
from safeloader.settings import KEPT
from tests.datasets import Noisy
from tests.oracle import plain, rng_state, seed_all


class Rows(Dataset[torch.Tensor]):
    """Samples that come faster than a reading of the clock."""

    def __init__(self, length: int = 8) -> None:
        self.rows = [torch.tensor([float(k)]) for k in range(length)]
        self.broken: dict[int, Exception] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        if index in self.broken:
            raise self.broken[index]
        return self.rows[index]


def pool_of(loader: Any) -> Any:
    return vars(loader).get(KEPT)


def indices(loader: Any) -> list[int]:
    return [index for _ in loader for index in loader.last_batch.indices]


@pytest.fixture
def loader() -> Any:
    loader = SafeDataLoader(Rows(), batch_size=4)
    for _ in range(3):
        assert indices(loader) == [*range(8)]
    return loader


def fetcher_of(loader: Any) -> Any:
    return pool_of(loader)._in_main[1]


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_epoch_is_the_stock_loaders_to_the_bit(shuffle: bool) -> None:
    def epochs(cls: Any) -> Iterator[Any]:
        seed_all(3)
        loader = cls(Noisy(), batch_size=4, shuffle=shuffle)
        for number in range(20):
            for batch in loader:
                yield plain(batch)
                if number % 3 == 1:  # one that ends early
                    break
            yield rng_state()

    assert list(epochs(SafeDataLoader)) == list(epochs(DataLoader))


def test_parts_of_an_epoch_serve_the_next(loader: Any) -> None:
    pool, fetcher = pool_of(loader), fetcher_of(loader)
    assert indices(loader) == [*range(8)]
    assert pool_of(loader) is pool
    assert fetcher_of(loader) is fetcher
    assert [audit.ok for audit in loader.audits] == [True] * 4


def test_attribute_that_changed_between_epochs_is_seen(loader: Any) -> None:
    loader.collate_fn = lambda samples: [float(each) for each in samples]
    assert list(loader) == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]
    loader.collate_fn = default_collate
    loader.on_error = "skip"
    loader.dataset.broken[2] = ValueError("mouldy")
    assert [len(batch) for batch in loader] == [3, 4]
    loader.on_error = "raise"
    with pytest.raises(SampleError, match="mouldy") as caught:
        list(loader)
    assert caught.value.failure is not None
    assert caught.value.failure.index == 2
    loader.key = float
    loader.dataset.broken.clear()
    loader.dataset.rows[1] = loader.dataset.rows[0]
    loader.verify = "warn"
    with pytest.warns(RuntimeWarning, match=r"key 0\.0"):
        list(loader)


def test_dataset_that_grew_is_seen(loader: Any) -> None:
    loader.dataset.rows += [torch.tensor([8.0]), torch.tensor([9.0])]
    assert indices(loader) == [*range(10)]
    assert loader.audit.ok
    assert (loader.audit.drawn, loader.audit.unvisited.size) == (10, 0)
    assert fetcher_of(loader)._context.length == 10


def test_other_sampler_or_dataset_is_seen(loader: Any) -> None:
    before = pool_of(loader)
    other = torch.utils.data.BatchSampler(SequentialSampler(range(4)), 2, drop_last=False)
    vars(loader)["batch_sampler"] = other  # past torch, as frameworks do
    assert indices(loader) == [0, 1, 2, 3]
    assert pool_of(loader) is not before
    vars(loader)["dataset"] = Rows(5)
    loader.dataset.rows[0] = torch.tensor([50.0])
    assert next(iter(loader)).ravel().tolist() == [50.0, 1.0]


def test_log_names_the_dataset_of_its_epoch(loader: Any) -> None:
    for dataset in (Noisy(8), Rows(8)):
        vars(loader)["dataset"] = dataset  # past torch, as frameworks do
        list(loader)
        assert f" over {type(dataset).__name__} " in pool_of(loader)._log.loader_name


def test_environment_that_changed_is_seen(loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    list(loader)
    assert (loader.audit.rank, loader.audit.world_size) == (3, 4)
    assert loader.audits[0].rank is None  # of an epoch before nothing has changed
    monkeypatch.setenv("SAFELOADER", "off")
    list(loader)
    assert loader.recorder.epochs == 4


def test_trace_that_is_asked_for_between_epochs_has_each_sample(
    loader: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("SAFELOADER_TRACE", str(tmp_path))
    list(loader)
    assert len(list(tmp_path.iterdir())) == 1
    assert len(loader.last_batch.fetch_ns) == 4
    assert fetcher_of(loader)._context.apart


@pytest.mark.workers
def test_loader_with_workers_meanwhile(loader: Any) -> None:
    loader.num_workers, loader.prefetch_factor = 1, 2
    assert indices(loader) == [*range(8)]
    loader.num_workers = 0
    assert indices(loader) == [*range(8)]
    assert loader.last_batch.worker_id is None


def test_two_iterators_at_once_are_apart(loader: Any) -> None:
    first, second = iter(loader), iter(loader)
    assert isinstance(first, SafeIterator)
    assert isinstance(second, SafeIterator)
    assert first.pool is not second.pool
    mixed = [next(each).ravel().tolist() for each in (first, second, second, first)]
    assert mixed == [[0.0, 1.0, 2.0, 3.0], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]]
    for each in (first, second):
        with pytest.raises(StopIteration):
            next(each)
    assert [audit.ok for audit in loader.audits] == [True] * 5


def test_threads_that_begin_epochs_at_once_are_apart(loader: Any) -> None:
    seen: list[list[float]] = []
    barrier = threading.Barrier(4)

    def epochs() -> None:
        for _ in range(25):
            barrier.wait(60)
            seen.append([value for batch in loader for value in batch.ravel().tolist()])

    threads = [threading.Thread(target=epochs) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [[float(k) for k in range(8)]] * 100
    assert all(audit.ok for audit in loader.audits)


def test_nothing_outlives_its_loader() -> None:
    class Named(Rows):
        pass

    gc.collect()
    gc.disable()
    try:
        loader = SafeDataLoader(Named(), batch_size=4)
        for _ in range(2):
            list(loader)
        recorder = loader.recorder
        gone = [weakref.ref(each) for each in (loader, loader.dataset, pool_of(loader))]
        del loader
        assert [each() for each in gone] == [None] * 3
        assert recorder is not None
        assert recorder.epochs == 2
    finally:
        gc.enable()


def test_torchs_iterator_goes_with_its_epoch(loader: Any) -> None:
    iterator: Any = iter(loader)
    next(iterator)
    stock = weakref.ref(iterator._stock)
    del iterator
    assert stock() is None
    assert pool_of(loader) is not None


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))],
    ids=["shallow", "deep", "pickled"],
)
def test_copies_have_nothing_of_it(loader: Any, copied: Any) -> None:
    made = copied(loader)
    assert pool_of(made) is None
    assert indices(made) == [*range(8)]
    assert pool_of(made) is not pool_of(loader)


def test_attributes_that_somebody_copies_have_none() -> None:
    loader = SafeDataLoader(Rows(), batch_size=4)
    list(loader)
    assert isinstance(pool_of(loader), WorkerPool)
    assert copy.deepcopy(vars(loader))[KEPT] is None
    assert pickle.loads(pickle.dumps(pool_of(loader))) is None


def test_epoch_that_ended_within_its_first_samples() -> None:
    loader = SafeDataLoader(Noisy(8), batch_size=1)
    for _ in range(3):
        next(iter(loader))
        assert indices(loader) == [*range(8)]
    assert [audit.delivered for audit in loader.audits] == [1, 8] * 3


def _pid_of_batch(loader: Any, results: Any) -> None:
    list(loader)
    results.put((os.getpid(), loader.last_batch.pid))


@pytest.mark.workers
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_child_that_inherits_it_is_known_by_its_own_pid(loader: Any) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_pid_of_batch, args=(loader, results))
    child.start()
    own, told = results.get()
    child.join()
    assert told == own != os.getpid()


# samples that come fast ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def cheap(loader: Any) -> Any:
    fetcher_of(loader)._cheap = True  # as on any machine that is not busy
    return loader


def test_cheap_batches_are_timed_as_a_whole(cheap: Any) -> None:
    list(cheap)
    assert len(cheap.last_batch.fetch_ns) == 4
    table = cheap.provenance.to_numpy()
    assert (table["fetch_ns"] >= 0).all()
    assert cheap.audit.ok


@pytest.mark.parametrize("raised", [ValueError("mouldy"), StopIteration("mouldy")], ids=str)
def test_cheap_sample_that_fails_is_told_at_its_index(cheap: Any, raised: Exception) -> None:
    cheap.dataset.broken[5] = raised
    iterator = iter(cheap)
    next(iterator)
    with pytest.raises(SampleError, match="mouldy") as caught:
        next(iterator)
    failure = caught.value.failure
    assert failure is not None
    assert (failure.phase, failure.index, failure.position) == ("sample", 5, 1)
    assert (failure.batch, failure.indices) == (1, (4, 5, 6, 7))
    assert cheap.audit.failed.tolist() == [4, 5, 6, 7]


def test_cheap_batch_that_cannot_be_collated_is_told_as_such(cheap: Any) -> None:
    cheap.dataset.rows[6] = torch.zeros(2)
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size") as caught:
        list(cheap)
    failure = vars(caught.value)["failure"]  # of ours, which is a RuntimeError too
    assert (failure.phase, failure.indices) == ("collate", (4, 5, 6, 7))


@pytest.mark.parametrize(("on_error", "left"), [("skip", [3, 4]), ("replace", [4, 4])])
def test_cheap_sample_that_fails_is_left_out_or_replaced(on_error: Any, left: list[int]) -> None:
    rows = Rows()
    loader = SafeDataLoader(rows, batch_size=4, on_error=on_error)
    list(loader)
    fetcher_of(loader)._cheap = True
    rows.broken[1] = ValueError("mouldy")
    assert [len(batch) for batch in loader] == left
    audit = loader.audit
    assert audit is not None
    assert (audit.skipped if on_error == "skip" else audit.replaced).tolist() == [1]


def test_failing_cheap_sample_is_run_again_under_its_random_numbers() -> None:
    class Drawing(Rows):
        def __getitem__(self, index: int) -> torch.Tensor:
            drawn = random.random()
            if index in self.broken:
                raise ValueError(str(drawn))
            return super().__getitem__(index)

    loader = SafeDataLoader(Drawing(), batch_size=4)
    list(loader)
    fetcher_of(loader)._cheap = True
    loader.dataset.broken[0] = ValueError()
    random.seed(7)
    with pytest.raises(SampleError, match=str(random.Random(7).random())) as caught:
        list(loader)
    random.seed(8)
    assert caught.value.failure is not None
    with pytest.raises(ValueError, match=str(random.Random(7).random())):
        loader.replay(caught.value.failure)


def test_dataset_that_begins_to_make_batches_is_asked_for_them(cheap: Any) -> None:
    asked: list[list[int]] = []

    def together(wanted: list[int]) -> list[torch.Tensor]:
        asked.append(wanted)
        return [cheap.dataset.rows[index] for index in wanted]

    cheap.dataset.__getitems__ = together
    list(cheap)
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7]]
