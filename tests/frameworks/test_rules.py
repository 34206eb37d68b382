"""The rules that let a loader live inside frameworks, each against a stand-in on torch alone.

Frameworks iterate a loader as it is, or re-create it with its own class; what they do on the way
is in ``stand_ins.py``. The sections are the rules; ``test_lightning.py`` has the real thing.
"""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from safeloader import Recorder, SafeDataLoader, SampleError
from tests import datasets, faults
from tests.frameworks.stand_ins import (
    PATIENCE_S,
    KeepsAudits,
    Pids,
    RemembersWrites,
    accepted_keywords,
    constructor_arguments,
    exactly_as_many_as_it_has,
    one_ahead,
    recreated,
    still_alive,
    with_the_state_of,
    workers_of,
)
from tests.oracle import plain, rng_state, seed_all

ROOT = Path(__file__).parents[2]
WORKERS = [0, 2]
# name -> arguments: a loader without workers, with workers, and with workers that stay
KINDS: dict[str, dict[str, Any]] = {
    "main": {},
    "workers": {"num_workers": 2},
    "persistent": {"num_workers": 2, "persistent_workers": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def our_keywords() -> list[str]:
    parameters = inspect.signature(SafeDataLoader.__init__).parameters.values()
    return [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]


def indices(loader: Any, epoch: int) -> list[int]:
    table = loader.provenance.to_numpy()
    return table["index"][table["epoch"] == epoch].tolist()


def batches(loader: Any, seed: int = 7) -> list[Any]:
    seed_all(seed)
    return [plain(batch) for batch in loader]


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def identity(sample: Any) -> Any:
    return sample["index"]


class Passing(SafeDataLoader):  # type: ignore[type-arg]
    """A user's subclass that hands everything on."""

    def __init__(self, dataset: Any, extra: int = 1, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.extra = extra


class PassingOn(Passing):
    """A subclass of that."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class WithoutInit(Passing):
    pass


class Ints(SafeDataLoader[int]):
    pass


SUBCLASSES = [SafeDataLoader, Passing, PassingOn, WithoutInit, datasets.Extra, Ints]


# 1 ── keywords are public instance attributes, all else of ours is private ───────────────────────


@pytest.mark.parametrize("cls", SUBCLASSES)
def test_each_keyword_is_an_instance_attribute_of_its_name(cls: Any, tmp_path: Path) -> None:
    recorder = Recorder()
    given = {"verify": "warn", "trace": str(tmp_path), "recorder": recorder, "key": identity}
    loader = cls(datasets.Noisy(), **given)
    assert set(given) <= set(our_keywords()) <= set(vars(loader))
    assert {name: vars(loader)[name] for name in given} == given
    for name in our_keywords():
        assert not isinstance(inspect.getattr_static(cls, name, None), property)


@every_kind
def test_every_other_attribute_of_ours_is_private(kind: str) -> None:
    stock = DataLoader(datasets.Noisy(), 4, **KINDS[kind])
    loader = SafeDataLoader(datasets.Noisy(), 4, **KINDS[kind])
    list(stock)
    list(loader)
    ours = vars(loader).keys() - vars(stock).keys() - set(our_keywords())
    assert all(name.startswith("_") for name in ours), ours
    assert vars(stock).keys() <= vars(loader).keys()


def test_keywords_are_set_after_those_of_torch() -> None:
    names = list(vars(SafeDataLoader(datasets.Noisy())))
    last_of_torch = max(names.index(name) for name in vars(DataLoader(datasets.Noisy())))
    assert min(names.index(name) for name in our_keywords()) > last_of_torch


# 2 ── the signature ──────────────────────────────────────────────────────────────────────────────


def test_signature_spells_our_keywords_out_and_forwards_the_rest() -> None:
    kinds = [
        (each.name, each.kind)
        for each in inspect.signature(SafeDataLoader.__init__).parameters.values()
        if each.kind is not each.KEYWORD_ONLY
    ]
    assert kinds == [
        ("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        ("dataset", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        ("args", inspect.Parameter.VAR_POSITIONAL),
        ("kwargs", inspect.Parameter.VAR_KEYWORD),
    ]


@pytest.mark.parametrize("cls", SUBCLASSES)
def test_subclass_with_kwargs_shows_our_keywords(cls: Any) -> None:
    for signature in (inspect.signature(cls.__init__), inspect.signature(cls)):
        parameters = list(signature.parameters.values())
        assert set(our_keywords()) <= set(signature.parameters)
        assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    assert set(our_keywords()) <= accepted_keywords(cls(datasets.Noisy())).keys()


def test_subclass_that_names_its_arguments_keeps_its_signature() -> None:
    class Narrow(SafeDataLoader):  # type: ignore[type-arg]
        def __init__(self, dataset: Any, verify: str = "warn") -> None:
            super().__init__(dataset, verify=verify)

    assert list(inspect.signature(Narrow.__init__).parameters) == ["self", "dataset", "verify"]

    class Named(SafeDataLoader):  # type: ignore[type-arg]
        def __init__(self, dataset: Any, verify: str = "warn", **kwargs: Any) -> None:
            super().__init__(dataset, verify=verify, **kwargs)

    parameters = inspect.signature(Named.__init__).parameters
    assert parameters["verify"].default == "warn"
    assert set(our_keywords()) <= parameters.keys()


# 1, 2 ── re-creation ─────────────────────────────────────────────────────────────────────────────


@every_kind
@pytest.mark.parametrize("cls", SUBCLASSES)
def test_recreated_with_a_distributed_sampler(cls: Any, kind: str) -> None:
    """The user's own object answers for the batches of the one made from it."""
    dataset = datasets.Noisy(23)
    original = cls(dataset, batch_size=4, shuffle=True, verify="warn", key=identity, **KINDS[kind])
    sampler = DistributedSampler(dataset, num_replicas=2, rank=1, shuffle=True)
    made = recreated(original, sampler=sampler)
    assert type(made) is cls
    assert (made.verify, made.key, made.recorder) == ("warn", identity, original.recorder)
    assert (made.sampler, made.batch_size, made.num_workers) == (sampler, 4, original.num_workers)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        seen = [batch["index"].tolist() for batch in made]
        assert flat(seen) == list(sampler) == indices(original, epoch)
        assert original.last_batch is not None
        assert list(original.last_batch.indices) == seen[-1]
        assert original.audit is not None
        assert (original.audit.complete, original.audit.ok) == (True, True)
        assert (original.audit.epoch, original.audit.drawn) == (epoch, 12)


@pytest.mark.parametrize("cls", [Passing, WithoutInit, datasets.Extra])
def test_recreated_subclass_keeps_its_own_argument(cls: Any) -> None:
    assert recreated(cls(datasets.Noisy(), extra=5)).extra == 5


@every_kind
def test_recreated_twice_wraps_nothing_twice(kind: str) -> None:
    arguments = dict(collate_fn=datasets.collate_with_info, shuffle=True, **KINDS[kind])
    if kind != "main":
        arguments["worker_init_fn"] = datasets.worker_init
    original = SafeDataLoader(datasets.Noisy(), 4, **arguments)
    expected = batches(DataLoader(datasets.Noisy(), 4, **arguments))
    assert batches(original) == expected
    for made in (once := recreated(original), recreated(once)):
        assert batches(made) == expected
        for name in ("dataset", "sampler", "collate_fn", "worker_init_fn"):
            assert getattr(made, name) is getattr(original, name)
    assert original.recorder is not None
    assert original.recorder.epochs == 3


@every_kind
def test_recreated_from_the_keywords_that_the_user_gave(kind: str) -> None:
    kwargs = {"dataset": datasets.Noisy(), "batch_size": 4, "recorder": Recorder(), **KINDS[kind]}
    loader = SafeDataLoader(**kwargs)
    made = type(loader)(**kwargs)
    assert batches(made) == batches(DataLoader(datasets.Noisy(), 4, **KINDS[kind]))
    assert loader.audit is not None
    assert loader.audit.complete
    assert indices(loader, 0) == list(range(23))


def test_recreated_stream() -> None:
    original = SafeDataLoader(datasets.Stream(), 4, num_workers=2)
    made = recreated(original)
    assert batches(made) == batches(DataLoader(datasets.Stream(), 4, num_workers=2))
    assert original.audit is not None
    assert original.audit.complete
    assert original.audit.delivered == 23


def test_recreated_with_a_batch_sampler() -> None:
    original = SafeDataLoader(datasets.Noisy(), batch_sampler=datasets.OwnBatchSampler())
    made = recreated(
        original, sampler=None, batch_sampler=original.batch_sampler, batch_size=1, drop_last=False
    )
    assert batches(made) == batches(original)
    assert made.recorder is original.recorder


def test_arguments_of_a_loader_do_not_change_by_use() -> None:
    loader = SafeDataLoader(datasets.Noisy(), 4, num_workers=2, persistent_workers=True)
    before = constructor_arguments(loader)
    list(loader)
    assert constructor_arguments(loader) == before


# 3 ── __init__ does nothing but remember ─────────────────────────────────────────────────────────


@every_kind
def test_init_has_no_side_effects(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, caplog: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def surroundings() -> Any:
        children = multiprocessing.active_children()
        files = sorted(tmp_path.rglob("*"))
        return threading.enumerate(), children, files, psutil.Process().num_fds(), rng_state()

    SafeDataLoader(datasets.Noisy())  # the first may import
    before = surroundings()
    loader = SafeDataLoader(
        datasets.Noisy(), 4, shuffle=True, trace=tmp_path / "trace", key=identity, **KINDS[kind]
    )
    assert surroundings() == before
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert loader.recorder is not None
    assert loader.recorder.epochs == 0
    assert (loader.last_batch, loader.audit, len(loader.provenance)) == (None, None, 0)


@every_kind
def test_what_the_user_gave_is_there_unwrapped_before_and_after_use(kind: str) -> None:
    dataset, sampler = datasets.Noisy(), SequentialSampler(range(23))
    given: dict[str, Any] = {"sampler": sampler, "collate_fn": datasets.collate_with_info}
    if kind != "main":
        given["worker_init_fn"] = datasets.worker_init
    loader = SafeDataLoader(dataset, 4, **given, **KINDS[kind])
    batch_sampler = loader.batch_sampler
    for _ in range(2):
        assert loader.dataset is dataset
        assert loader.batch_sampler is batch_sampler
        assert type(batch_sampler) is torch.utils.data.BatchSampler
        assert batch_sampler.sampler is sampler
        assert {name: getattr(loader, name) for name in given} == given
        list(loader)
    defaults = SafeDataLoader(dataset, **KINDS[kind])
    stock = DataLoader(dataset, **KINDS[kind])
    assert defaults.collate_fn is stock.collate_fn
    assert defaults.worker_init_fn is stock.worker_init_fn is None


# 4 ── the iterator, and what frameworks look at ──────────────────────────────────────────────────


@every_kind
def test_iterator_is_of_a_class_and_goes_on_after_an_exception(kind: str) -> None:
    loader = SafeDataLoader(faults.Raises(at=5), batch_size=4, **KINDS[kind])
    iterator = iter(loader)
    assert not inspect.isgenerator(iterator)
    assert iter(iterator) is iterator
    got: list[Any] = []
    for _ in range(4):
        try:
            got.append(next(iterator).tolist())
        except SampleError as error:
            got.append(error.index)
    assert got == [[0, 1, 2, 3], 5, [8, 9, 10, 11], [12, 13, 14, 15]]


def test_persistent_iterator_is_torchs_own() -> None:
    loader = SafeDataLoader(datasets.Noisy(), 4, num_workers=2, persistent_workers=True)
    assert loader._iterator is None
    for _ in range(2):
        next(iter(loader))
        assert type(loader._iterator) is _MultiProcessingDataLoaderIter


@pytest.mark.parametrize("workers", WORKERS)
def test_loader_without_persistent_workers_holds_no_iterator(workers: int) -> None:
    loader = SafeDataLoader(datasets.Noisy(), 4, num_workers=workers)
    iterator = iter(loader)
    next(iterator)
    assert loader._iterator is None


def test_framework_that_stops_the_workers_and_lets_go_of_the_iterator() -> None:
    """Lightning does so between the stages of a run; the loader is used again afterwards."""
    loader = SafeDataLoader(Pids(), 2, num_workers=2, persistent_workers=True)
    first = {pid for batch in loader for pid in batch.tolist()}
    workers = workers_of(loader._iterator)
    loader._iterator._shutdown_workers()  # type: ignore[union-attr]
    loader._iterator = None
    assert still_alive(workers) == []
    second = {pid for batch in loader for pid in batch.tolist()}
    assert len(first) == len(second) == 2
    assert not first & second
    assert loader.audit is not None
    assert (loader.audit.epoch, loader.audit.complete, loader.audit.ok) == (1, True, True)


@every_kind
def test_names_that_frameworks_probe_for_are_there_as_on_the_stock_loader(kind: str) -> None:
    names = "nonsense state_dict load_state_dict device prepare __pl_saved_args _workers"
    loader = SafeDataLoader(datasets.Noisy(), 4, **KINDS[kind])
    stock = DataLoader(datasets.Noisy(), 4, **KINDS[kind])
    for _ in range(2):
        for name in names.split():
            assert not hasattr(loader, name)
            assert not hasattr(stock, name)
        list(loader)
    assert not hasattr(SafeDataLoader, "__getattr__")


@every_kind
def test_set_epoch_is_the_samplers_affair_without_a_seed(kind: str) -> None:
    def batches(cls: Any, says: bool) -> list[Any]:
        seed_all(3)
        sampler: Any = DistributedSampler(datasets.Noisy(), num_replicas=2, rank=0)
        loader = cls(datasets.Noisy(), 4, sampler=sampler, **KINDS[kind])
        came = []
        for epoch in (0, 3):
            (loader if says else sampler).set_epoch(epoch)
            came.append([plain(batch) for batch in loader])
        return came

    assert batches(SafeDataLoader, says=True) == batches(DataLoader, says=False)


@pytest.mark.parametrize("kind", ["workers", "persistent"])
def test_iterator_answers_for_torchs(kind: str) -> None:
    loader = SafeDataLoader(datasets.Noisy(), 4, **KINDS[kind])
    iterator: Any = iter(loader)
    assert len(iterator) == len(loader) == 6
    assert len(iterator._workers) == len(iterator._index_queues) == 2
    assert all(worker.is_alive() for worker in iterator._workers)
    workers = workers_of(iterator)
    iterator._shutdown_workers()
    assert still_alive(workers) == []
    assert not hasattr(iterator, "nonsense")


def test_iterator_without_workers_answers_too() -> None:
    iterator: Any = iter(SafeDataLoader(datasets.Noisy(), 4))
    assert len(iterator) == 6
    assert iterator._num_workers == 0
    assert not hasattr(iterator, "_workers")


# 5 ── nothing is written on the loader per batch ─────────────────────────────────────────────────


@every_kind
def test_no_attribute_is_written_per_batch(kind: str) -> None:
    loader = RemembersWrites(datasets.Noisy(), 4, **KINDS[kind])
    for _ in range(2):
        iterator = iter(loader)  # with persistent workers it is noted here, as torch does, once
        loader._writes.clear()
        held = {name: id(value) for name, value in vars(loader).items()}
        for _ in iterator:
            assert {name: id(value) for name, value in vars(loader).items()} == held
        del iterator
        assert loader._writes == []


def test_persistent_iterator_is_written_once() -> None:
    loader = RemembersWrites(datasets.Noisy(), 4, **KINDS["persistent"])
    loader._writes.clear()
    list(loader)
    assert set(loader._writes) <= {"_iterator", "_pool"}
    loader._writes.clear()
    list(loader)
    assert loader._writes == []


@pytest.mark.parametrize("workers", WORKERS)
def test_iter_writes_nothing_either(workers: int) -> None:
    loader = RemembersWrites(datasets.Noisy(), 4, num_workers=workers)
    loader._writes.clear()
    for _ in loader:
        assert loader.last_batch is not None
        assert loader.audit is not None
    assert loader._writes == []


# 6 ── the end of an epoch is not always asked for ────────────────────────────────────────────────


@every_kind
@pytest.mark.parametrize("drop_last", [False, True])
def test_consumer_that_never_asks_for_the_end(drop_last: bool, kind: str) -> None:
    arguments = dict(batch_size=4, shuffle=True, drop_last=drop_last, **KINDS[kind])
    loader = SafeDataLoader(datasets.Noisy(), **arguments)
    stock = DataLoader(datasets.Noisy(), **arguments)
    for epoch in range(3):
        seed_all(epoch)
        expected = [plain(batch) for batch in exactly_as_many_as_it_has(stock)]
        seed_all(epoch)
        assert [plain(batch) for batch in exactly_as_many_as_it_has(loader)] == expected
        assert loader.audit is not None
        assert (loader.audit.epoch, loader.audit.complete, loader.audit.ok) == (epoch, True, True)
        assert loader.audit.delivered == len(indices(loader, epoch)) == (20 if drop_last else 23)
        if drop_last and loader.num_workers:
            missed = set(range(23)) - set(indices(loader, epoch))
            assert set(loader.audit.dropped.tolist()) == missed


@every_kind
def test_audit_is_complete_with_the_last_batch_and_not_before(kind: str) -> None:
    loader = SafeDataLoader(datasets.Noisy(), 4, **KINDS[kind])
    iterator = iter(loader)
    for n in range(6):
        next(iterator)
        assert loader.audit is not None
        assert loader.audit.complete == (n == 5)


@pytest.mark.parametrize("workers", WORKERS)
def test_sampler_without_length_is_complete_at_the_end(workers: int) -> None:
    sampler: Any = datasets.LengthlessSampler()
    loader = SafeDataLoader(datasets.Noisy(), 4, sampler=sampler, num_workers=workers)
    list(loader)
    assert loader.audit is not None
    assert (loader.audit.complete, loader.audit.ok) == (True, True)
    assert loader.audit.repeated.tolist() == [1]


def closings(caplog: pytest.LogCaptureFixture, epoch: int) -> list[str]:
    """What the trace says at the close of an epoch."""
    said = [message.splitlines()[0].partition(": ")[2] for message in caplog.messages]
    starts = (f"epoch {epoch}: complete", f"epoch {epoch}: not complete")
    return [line for line in said if line.startswith(starts)]


@pytest.fixture
def traced(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="safeloader"):
        yield caplog


@every_kind
def test_epoch_is_closed_once_by_the_end(kind: str, traced: pytest.LogCaptureFixture) -> None:
    loader = SafeDataLoader(datasets.Noisy(), 4, trace=True, **KINDS[kind])
    iterator = iter(loader)
    list(iterator)
    assert closings(traced, 0) == ["epoch 0: complete, ok; 23 drawn, 23 delivered"]
    assert next(iterator, None) is None
    del iterator
    list(loader)
    assert len(closings(traced, 0)) == len(closings(traced, 1)) == 1


@every_kind
def test_epoch_is_closed_once_by_its_last_batch(
    kind: str, traced: pytest.LogCaptureFixture
) -> None:
    loader = SafeDataLoader(datasets.Noisy(), 4, trace=True, **KINDS[kind])
    iterator = iter(loader)
    for _ in range(len(loader)):
        assert closings(traced, 0) == []
        next(iterator)
    assert loader.audit is not None
    assert loader.audit.complete
    expected = ["epoch 0: complete, ok; 23 drawn, 23 delivered"]
    if kind != "main":  # there the sampler's end is known only when it is asked for
        assert closings(traced, 0) == expected
    del iterator
    assert closings(traced, 0) == expected


@every_kind
def test_epoch_is_closed_once_by_freeing_its_iterator(
    kind: str, traced: pytest.LogCaptureFixture
) -> None:
    loader = SafeDataLoader(datasets.Noisy(), 4, trace=True, **KINDS[kind])
    iterator = iter(loader)
    next(iterator)
    del iterator
    (line,) = closings(traced, 0)
    assert line.startswith("epoch 0: not complete, ok;")
    assert line.endswith(", 4 delivered")


def test_epoch_is_closed_once_by_the_next_on_the_same_workers(
    traced: pytest.LogCaptureFixture,
) -> None:
    loader = SafeDataLoader(datasets.Noisy(), 4, trace=True, **KINDS["persistent"])
    first = iter(loader)
    next(first)
    second = iter(loader)
    (line,) = closings(traced, 0)
    assert line.endswith(", 4 delivered")
    list(second)
    del first, second
    assert len(closings(traced, 0)) == len(closings(traced, 1)) == 1


@every_kind
def test_next_iterator_is_made_before_the_last_is_freed(kind: str) -> None:
    def run(loader_class: type) -> Any:
        seed_all(5)
        loader = loader_class(datasets.Noisy(), 4, shuffle=True, **KINDS[kind])
        seen = []
        iterator = iter(loader)
        for _ in range(3):
            seen.append([plain(next(iterator)) for _ in range(len(loader))])
            iterator = iter(loader)
        return seen, rng_state(), loader

    *expected, _ = run(DataLoader)
    *seen, loader = run(SafeDataLoader)
    assert seen == expected
    for epoch in range(3):
        assert sorted(indices(loader, epoch)) == list(range(23))
    assert loader.audit.epoch == 3
    assert not loader.audit.complete


INTERLEAVING = (0, 1, 1, 0, 1, 0, 0)  # whose turn it is; then the second to its end, then the first


@pytest.mark.parametrize("workers", WORKERS)
def test_two_iterators_alive_on_one_loader(workers: int) -> None:
    def run(loader_class: type, **ours: Any) -> Any:
        seed_all(5)
        loader = loader_class(datasets.Noisy(), 3, shuffle=True, num_workers=workers, **ours)
        both = [iter(loader)]
        seen = [plain(next(both[0]))]
        both.append(iter(loader))
        assert both[0] is not both[1]
        seen += [plain(next(both[turn])) for turn in INTERLEAVING]
        seen += [plain(batch) for batch in both[1]]
        seen += [plain(batch) for batch in both[0]]
        return seen, rng_state()

    recorder = KeepsAudits()
    assert run(SafeDataLoader, recorder=recorder) == run(DataLoader)
    first, second = recorder.audits()
    for number, audit in enumerate((first, second)):
        assert (audit.epoch, audit.complete, audit.ok) == (number, True, True)
        assert (audit.drawn, audit.delivered) == (23, 23)
    loader = SafeDataLoader(datasets.Noisy(), recorder=recorder)
    for epoch in range(2):
        assert sorted(indices(loader, epoch)) == list(range(23))


def test_two_iterators_on_persistent_workers_are_one_as_under_torch() -> None:
    def run(loader_class: type) -> Any:
        seed_all(5)
        loader = loader_class(datasets.Noisy(), 3, shuffle=True, **KINDS["persistent"])
        first = iter(loader)
        seen = [plain(next(first)), plain(next(first))]
        second = iter(loader)
        assert second is first
        seen += [plain(batch) for batch in second]
        return seen, rng_state(), loader

    *expected, _ = run(DataLoader)
    *seen, loader = run(SafeDataLoader)
    assert seen == expected
    assert (loader.audit.epoch, loader.audit.complete, loader.audit.ok) == (1, True, True)
    assert sorted(indices(loader, 1)) == list(range(23))
    assert len(indices(loader, 0)) == 6


@every_kind
def test_consumer_one_batch_ahead_asks_for_the_one_it_trains_on(kind: str) -> None:
    loader = SafeDataLoader(datasets.Noisy(), 4, shuffle=True, **KINDS[kind])
    for epoch in range(2):
        for n, batch, coming in one_ahead(loader):
            for record in (loader.provenance.batch(n), loader.provenance.batch(n, epoch=epoch)):
                assert (record.epoch, record.batch) == (epoch, n)
                assert list(record.indices) == batch["index"].tolist()
            ahead = batch if coming is None else coming
            assert loader.last_batch is not None
            assert list(loader.last_batch.indices) == ahead["index"].tolist()
            assert loader.last_batch.batch == (n if coming is None else n + 1)


@every_kind
def test_early_break_then_a_new_epoch(kind: str) -> None:
    def run(loader_class: type) -> Any:
        seed_all(5)
        loader = loader_class(datasets.Noisy(), 4, shuffle=True, **KINDS[kind])
        seen = []
        for batch in loader:
            seen.append(plain(batch))
            if len(seen) == 2:
                break
        return seen + [plain(batch) for batch in loader], rng_state(), loader

    *expected, _ = run(DataLoader)
    *seen, loader = run(SafeDataLoader)
    assert seen == expected
    assert (loader.audit.epoch, loader.audit.complete, loader.audit.ok) == (1, True, True)
    assert len(indices(loader, 0)) == 8
    assert sorted(indices(loader, 1)) == list(range(23))


@every_kind
def test_time_between_two_calls_is_not_waiting(kind: str) -> None:
    loader = SafeDataLoader(datasets.Noisy(), 4, **KINDS[kind])
    iterator = iter(loader)
    for _ in range(len(loader)):
        began_ns = time.perf_counter_ns()
        next(iterator)
        took_ns = time.perf_counter_ns() - began_ns
        assert loader.last_batch is not None
        assert 0 < loader.last_batch.wait_ns <= took_ns


# 7 ── objects on which __init__ never ran ────────────────────────────────────────────────────────


@every_kind
def test_object_whose_init_never_ran(kind: str) -> None:
    arguments = dict(batch_size=4, shuffle=True, **KINDS[kind])
    loader = with_the_state_of(DataLoader(datasets.Noisy(), **arguments), SafeDataLoader)
    assert (loader.last_batch, loader.audit) == (None, None)
    assert batches(loader) == batches(DataLoader(datasets.Noisy(), **arguments))
    assert loader.audit.complete
    assert loader.audit.ok
    assert sorted(indices(loader, 0)) == list(range(23))
    made = recreated(loader, sampler=loader.sampler)
    assert type(made) is SafeDataLoader
    assert batches(made) == batches(DataLoader(datasets.Noisy(), **arguments))
    assert loader.recorder.epochs == 2


def test_object_whose_init_never_ran_is_asked_for_provenance_first() -> None:
    loader = with_the_state_of(DataLoader(datasets.Noisy(), 4), SafeDataLoader)
    provenance = loader.provenance
    list(loader)
    assert len(provenance) == 23


def test_object_whose_init_never_ran_can_be_copied() -> None:
    loader = with_the_state_of(DataLoader(datasets.Noisy(), 4), SafeDataLoader)
    for made in (copy.copy(loader), copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        assert batches(made) == batches(DataLoader(datasets.Noisy(), 4))
        assert made.audit.complete


@every_kind
def test_copy_of_the_attributes_into_a_new_object(kind: str) -> None:
    arguments = dict(batch_size=4, shuffle=True, **KINDS[kind])
    loader = SafeDataLoader(datasets.Noisy(), verify="warn", key=identity, **arguments)
    made = with_the_state_of(loader, Passing)
    assert (made.verify, made.key, made.recorder) == ("warn", identity, loader.recorder)
    assert batches(made) == batches(DataLoader(datasets.Noisy(), **arguments))
    assert loader.audit is not None
    assert (loader.audit.complete, loader.audit.ok) == (True, True)
    assert sorted(indices(loader, 0)) == list(range(23))


# 8 ── checkpoints ────────────────────────────────────────────────────────────────────────────────


@every_kind
def test_nothing_that_a_checkpoint_would_store(kind: str) -> None:
    loader = SafeDataLoader(datasets.Noisy(), 4, **KINDS[kind])
    for holder in (loader, iter(loader)):
        assert not hasattr(holder, "state_dict")
        assert not hasattr(holder, "load_state_dict")


# 9 ── as many batches as the stock loader, none of them None ─────────────────────────────────────


AS_MANY: dict[str, Callable[[type, int], Any]] = {
    "rest": lambda c, n: c(datasets.Noisy(), 4, num_workers=n),
    "drop_last": lambda c, n: c(datasets.Noisy(), 4, drop_last=True, num_workers=n),
    "even": lambda c, n: c(datasets.Noisy(24), 4, num_workers=n),
    "empty": lambda c, n: c(datasets.Noisy(0), 4, num_workers=n),
    "unbatched": lambda c, n: c(datasets.Noisy(5), None, num_workers=n),
    "fewer than workers": lambda c, n: c(datasets.Noisy(1), 4, num_workers=n),
    "stream": lambda c, n: c(datasets.Stream(), 4, num_workers=n),
    "stream, drop_last": lambda c, n: c(datasets.Stream(), 4, drop_last=True, num_workers=n),
    "stream with a length": lambda c, n: c(datasets.UnsharedStream(12), 4, num_workers=min(n, 1)),
    "batch sampler": lambda c, n: c(
        datasets.Noisy(), batch_sampler=datasets.OwnBatchSampler(), num_workers=n
    ),
}


def length_of(sized: Any) -> int | type[Exception]:
    try:
        return len(sized)
    except TypeError as exc:
        return type(exc)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("mode", AS_MANY)
def test_as_many_batches_as_the_stock_loader(mode: str, workers: int) -> None:
    loader, stock = (AS_MANY[mode](each, workers) for each in (SafeDataLoader, DataLoader))
    assert length_of(loader) == length_of(stock)
    assert length_of(iter(loader)) == length_of(iter(stock))
    seen = list(loader)
    assert len(seen) == len(list(stock))
    assert all(batch is not None for batch in seen)


# 10 ── copies ────────────────────────────────────────────────────────────────────────────────────


def through_pickle(loader: Any) -> Any:
    return pickle.loads(pickle.dumps(loader))


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": through_pickle}
every_copy = pytest.mark.parametrize("way", COPIES)


@every_kind
@every_copy
@pytest.mark.parametrize("used", [False, True])
def test_copy_works_like_the_original(way: str, kind: str, used: bool) -> None:
    arguments = dict(batch_size=4, shuffle=True, **KINDS[kind])
    loader = SafeDataLoader(datasets.Noisy(), verify="warn", key=identity, **arguments)
    if used:
        list(loader)
    made = COPIES[way](loader)
    assert type(made) is SafeDataLoader
    assert (made.verify, made.key) == ("warn", identity)
    assert made._iterator is None
    assert batches(made) == batches(DataLoader(datasets.Noisy(), **arguments))
    assert (made.audit.complete, made.audit.ok) == (True, True)
    list(loader)
    assert loader.audit is not None
    assert (loader.audit.complete, loader.audit.ok) == (True, True)


@every_copy
def test_copy_has_workers_of_its_own(way: str) -> None:
    loader = SafeDataLoader(Pids(), 2, num_workers=2, persistent_workers=True)
    original = {pid for batch in loader for pid in batch.tolist()}
    made = COPIES[way](loader)
    copied = {pid for batch in made for pid in batch.tolist()}
    assert len(original) == len(copied) == 2
    assert not original & copied
    assert {pid for batch in loader for pid in batch.tolist()} == original
    del made
    assert still_alive([psutil.Process(pid) for pid in copied if psutil.pid_exists(pid)]) == []
    assert {pid for batch in loader for pid in batch.tolist()} == original


@every_copy
def test_copy_in_the_middle_of_an_epoch(way: str) -> None:
    loader = SafeDataLoader(datasets.Noisy(), 4, num_workers=2, persistent_workers=True)
    iterator = iter(loader)
    before = [next(iterator)["index"].tolist()]
    made = COPIES[way](loader)
    assert [batch["index"].tolist() for batch in made] == [
        batch["index"].tolist() for batch in DataLoader(datasets.Noisy(), 4)
    ]
    seen = before + [batch["index"].tolist() for batch in iterator]
    assert flat(seen) == list(range(23))


def test_shallow_copy_writes_in_the_same_notebook_and_the_others_in_a_blank_one() -> None:
    loader = SafeDataLoader(datasets.Noisy(), 4, recorder=Recorder(max_bytes=2**20))
    list(loader)
    assert copy.copy(loader).recorder is loader.recorder
    for made in (copy.deepcopy(loader), through_pickle(loader)):
        assert made.recorder is not loader.recorder
        assert made.recorder.max_bytes == 2**20
        assert (made.recorder.epochs, made.audit, made.last_batch) == (0, None, None)
        list(made)
    assert loader.recorder is not None
    assert loader.recorder.epochs == 1


@pytest.mark.parametrize("cls", SUBCLASSES)
def test_subclass_goes_through_pickle(cls: Any) -> None:
    made = through_pickle(cls(datasets.Noisy(), batch_size=4, verify="off"))
    assert type(made) is cls
    assert made.verify == "off"
    assert len(list(made)) == 6


# 11 ── a notebook that nobody wrote in ───────────────────────────────────────────────────────────

SAYS_SO = "never delivered a batch"
IMPORTS = """\
import copy, torch
from torch.utils.data import DataLoader
from safeloader import Recorder, SafeDataLoader
if __name__ == "__main__":
    loader = SafeDataLoader(torch.arange(8), batch_size=4)
"""


def said_at_the_end(code: str, tmp_path: Path, **environment: str) -> str:
    """What a program of its own writes to stderr."""
    script = tmp_path / "training.py"
    script.write_text(IMPORTS + "".join(f"    {line}\n" for line in code.splitlines()))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    cleared = {k: v for k, v in os.environ.items() if not k.startswith("SAFELOADER")}
    ran = subprocess.run(
        [sys.executable, str(script)],
        env=cleared | {"PYTHONPATH": path, "COVERAGE_PROCESS_START": ""} | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert ran.stdout == ""
    return ran.stderr


@pytest.mark.parametrize(
    "code",
    [
        "list(DataLoader(loader.dataset, batch_size=4))",  # rebuilt as torch's own class
        "del loader",
    ],
)
def test_loader_never_used_says_so_once_at_the_end_of_the_program(
    code: str, tmp_path: Path
) -> None:
    said = said_at_the_end(code, tmp_path)
    assert said.count(SAYS_SO) == 1
    assert said.startswith("1 SafeDataLoader(s)")
    assert "training.py:5" in said
    assert "a framework made them again" in said


def test_loaders_never_used_say_so_in_one_line(tmp_path: Path) -> None:
    code = "others = [SafeDataLoader([1, 2]) for _ in range(4)]\nlist(others[0])"
    said = said_at_the_end(code, tmp_path)
    assert said.count(SAYS_SO) == len(said.splitlines()) == 1
    assert said.startswith("4 SafeDataLoader(s)")


def test_loaders_that_were_used_say_nothing(tmp_path: Path) -> None:
    code = """\
list(loader)
left = SafeDataLoader([1, 2])
next(iter(left))
original = SafeDataLoader([1, 2])
list(SafeDataLoader(original.dataset, recorder=original.recorder))
copied = SafeDataLoader([1, 2])
list(copy.copy(copied))
with_workers = SafeDataLoader([1, 2], num_workers=2)
list(with_workers)
blank_copy = copy.deepcopy(loader)
unused_but_shared = SafeDataLoader([1, 2], recorder=loader.recorder)
del left, original"""
    assert said_at_the_end(code, tmp_path) == ""


def test_switched_off_says_nothing(tmp_path: Path) -> None:
    assert said_at_the_end("pass", tmp_path, SAFELOADER="off") == ""


# ── lives of worker processes ────────────────────────────────────────────────────────────────────


@pytest.fixture
def without_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_persistent_workers_serve_all_epochs() -> None:
    loader = SafeDataLoader(Pids(), 2, num_workers=2, persistent_workers=True)
    epochs = [{pid for batch in loader for pid in batch.tolist()} for _ in range(3)]
    assert epochs[0] == epochs[1] == epochs[2]
    assert len(epochs[0]) == 2
    assert epochs[0] == {worker.pid for worker in loader._iterator._workers}  # type: ignore[union-attr]
    assert set(loader.provenance.to_numpy()["pid"].tolist()) == epochs[0]


@pytest.mark.usefixtures("without_gc")
@pytest.mark.parametrize("to_the_end", [True, False])
def test_persistent_workers_end_with_their_loader(to_the_end: bool) -> None:
    loader = SafeDataLoader(Pids(), 2, num_workers=2, persistent_workers=True)
    for _ in range(2):
        for _ in loader:
            if not to_the_end:
                break
    workers = workers_of(loader._iterator)
    assert len(workers) == 2
    assert all(worker.is_running() for worker in workers)
    del loader
    assert still_alive(workers) == []


@pytest.mark.usefixtures("without_gc")
def test_workers_end_with_an_iterator_dropped_midway() -> None:
    loader = SafeDataLoader(Pids(), 2, num_workers=2)
    iterator = iter(loader)
    next(iterator)
    workers = workers_of(iterator)
    assert len(workers) == 2
    del iterator
    assert still_alive(workers) == []
    assert len(list(loader)) == 6


@pytest.mark.usefixtures("without_gc")
def test_workers_end_with_the_epoch() -> None:
    loader = SafeDataLoader(Pids(), 2, num_workers=2)
    workers: list[psutil.Process] = []
    iterator = iter(loader)
    workers = workers_of(iterator)
    for _ in iterator:
        pass
    assert still_alive(workers) == []


@pytest.mark.usefixtures("without_gc")
def test_recorder_keeps_neither_loader_nor_dataset_nor_workers() -> None:
    loader = SafeDataLoader(Pids(), 2, num_workers=2, persistent_workers=True)
    list(loader)
    recorder, workers = loader.recorder, workers_of(loader._iterator)
    assert sys.getrefcount(loader) == 2  # the name here and the argument of the call
    dataset = loader.dataset
    del loader
    assert still_alive(workers) == []
    assert sys.getrefcount(dataset) == 2
    assert recorder is not None
    audit = recorder.audit()
    assert audit is not None
    assert audit.complete


def fail_with_a_loader(held: list[Any]) -> None:
    loader = SafeDataLoader(Pids(), 2, num_workers=1, persistent_workers=True)
    list(loader)
    held += workers_of(loader._iterator)
    raise KeyError("in the training loop")


@pytest.mark.usefixtures("without_gc")
@pytest.mark.parametrize("collections", [0, 1])
def test_workers_end_at_once_with_a_loader_that_the_garbage_collector_frees(
    collections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training loop that raised, its traceback in a cycle, as in a notebook or under pytest."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", PATIENCE_S)
    workers: list[psutil.Process] = []

    def leaves_a_cycle() -> None:
        try:
            fail_with_a_loader(workers)
        except KeyError as exc:
            error = exc  # noqa: F841  (frame and error hold each other from here)
            for _ in range(collections):
                gc.collect()  # one that the loader lives through

    leaves_a_cycle()
    assert workers[0].is_running()
    began = time.monotonic()
    gc.collect()
    assert still_alive(workers) == []
    assert time.monotonic() - began < PATIENCE_S / 2


# ── what else user code and frameworks rely on ───────────────────────────────────────────────────


def test_class_is_generic_and_a_dataloader() -> None:
    loader = SafeDataLoader[int](range(4))  # type: ignore[arg-type]
    for made in (loader, Ints(range(4))):  # type: ignore[arg-type]
        assert isinstance(made, SafeDataLoader)
        assert isinstance(made, DataLoader)
        assert [batch.item() for batch in made] == [0, 1, 2, 3]  # type: ignore[attr-defined]
    assert type(loader) is SafeDataLoader
    assert issubclass(Ints, DataLoader)


@every_kind
def test_two_loaders_share_one_notebook(kind: str) -> None:
    recorder = Recorder()
    train = SafeDataLoader(datasets.Noisy(11), 4, recorder=recorder, **KINDS[kind])
    val = SafeDataLoader(datasets.Noisy(5), 4, recorder=recorder, **KINDS[kind])
    for epoch in range(0, 4, 2):
        list(train)
        assert train.audit is not None
        assert (train.audit.epoch, train.audit.delivered, train.audit.ok) == (epoch, 11, True)
        list(val)
        assert val.audit is not None
        assert (val.audit.epoch, val.audit.delivered, val.audit.ok) == (epoch + 1, 5, True)
        assert train.audit.to_dict() == val.audit.to_dict()
        assert train.last_batch == val.last_batch
    assert recorder.epochs == 4
    assert len(train.provenance) == len(val.provenance) == 32
    for epoch in range(4):
        assert indices(train, epoch) == list(range(5 if epoch % 2 else 11))
        assert train.provenance.batch(0, epoch=epoch).indices == (0, 1, 2, 3)


@pytest.mark.parametrize("workers", WORKERS)
def test_two_loaders_with_one_notebook_take_turns(workers: int) -> None:
    """Batches of train and validation drawn in turn, as for a contrastive loss."""
    recorder = KeepsAudits()
    train = SafeDataLoader(datasets.Noisy(12), 4, recorder=recorder, num_workers=workers)
    val = SafeDataLoader(datasets.Noisy(9), 3, recorder=recorder, num_workers=workers)
    for batch, other in zip(train, val, strict=True):
        assert train.last_batch is not None
        assert list(train.last_batch.indices) == other["index"].tolist()
        n = train.last_batch.batch
        assert list(train.provenance.batch(n, epoch=0).indices) == batch["index"].tolist()
    assert [audit.delivered for audit in recorder.audits()] == [12, 9]
    assert all(audit.complete and audit.ok for audit in recorder.audits())
