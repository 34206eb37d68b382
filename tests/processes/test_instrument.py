"""Loaders that others made, recorded from then on; what cannot be is refused and left as it was."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import safeloader
from safeloader import Recorder, SafeDataLoader, SampleError, instrument, loaders_of
from safeloader.introspect.callers import calling_line
from tests.frameworks.library_loaders import (
    CopiesAttributes,
    Endless,
    MakesItsOwn,
    NeverAsks,
    Numbers,
    Transforms,
    Wraps,
    with_thread_workers,
)
from tests.frameworks.stand_ins import Pids, recreated, still_alive, workers_of
from tests.oracle import rng_state, seed_all

KINDS: dict[str, dict[str, Any]] = {
    "main": {},
    "workers": {"num_workers": 2},
    "persistent": {"num_workers": 2, "persistent_workers": True},
    "spawn": {"num_workers": 1, "multiprocessing_context": "spawn"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
CLASSES = [DataLoader, Transforms, Endless]
every_class = pytest.mark.parametrize("cls", CLASSES)
WRAPPERS = ["base_dataloader", "_dataloader", "loader", "_loader", "dataloader"]


def epochs(loader: Any, number: int = 2) -> list[list[Any]]:
    return [[batch.tolist() for batch in loader] for _ in range(number)]


def seeded(make: Callable[[], Any]) -> Any:
    seed_all(3)
    return make()


@every_kind
@pytest.mark.parametrize("cls", [DataLoader, Transforms])
def test_batches_and_random_numbers_are_those_of_the_loader_left_alone(cls: Any, kind: str) -> None:
    def make() -> Any:
        return cls(Numbers(), batch_size=4, shuffle=True, **KINDS[kind])

    expected, state = seeded(lambda: (epochs(make()), rng_state()))
    loader = make()
    found, after = seeded(lambda: (epochs(instrument(loader)), rng_state()))
    assert found == expected
    assert after == state
    assert (loader.audit.epoch, loader.audit.delivered, loader.audit.ok) == (1, 10, True)
    assert isinstance(loader, SafeDataLoader)
    assert isinstance(loader, cls)


@pytest.mark.parametrize("kind", ["main", "workers"])
def test_a_loader_with_one_iterator_for_all_epochs_ends_each_of_them(kind: str) -> None:
    expected = epochs(Endless(Numbers(), batch_size=4, **KINDS[kind]))
    loader = instrument(Endless(Numbers(), batch_size=4, **KINDS[kind]))
    indices = [[[row[0] for row in batch] for batch in epoch] for epoch in epochs(loader)]
    assert indices == [[[row[0] for row in batch] for batch in epoch] for epoch in expected]
    assert loader.audit.delivered == 20


def test_an_iterator_for_all_epochs_is_recorded_from_between_two_of_them() -> None:
    loader = Endless(Numbers(), batch_size=4)
    epochs(loader, 1)
    epochs(instrument(loader), 1)
    assert loader.audit.delivered == 10  # type: ignore[attr-defined]


def test_in_the_middle_of_one_it_is_refused() -> None:
    loader = Endless(Numbers(), batch_size=4)
    next(iter(loader))
    before = dict(vars(loader))
    with pytest.raises(ValueError, match=r"iterator\), which is 1 batches into one of 3"):
        instrument(loader)
    assert vars(loader) == before
    assert type(loader) is Endless


@every_class
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_loader_in_a_wrapper(cls: Any, name: str) -> None:
    wrapper = Wraps(Wraps(cls(Numbers(), batch_size=4), name), name)
    assert instrument(wrapper, verify="warn") is wrapper
    list(wrapper)
    (loader,) = loaders_of(wrapper)
    assert isinstance(loader, cls)
    assert (loader.audit.delivered, loader.verify) == (10, "warn")


def test_a_wrapper_that_is_a_loader_by_its_attributes() -> None:
    wrapper = CopiesAttributes(DataLoader(Numbers(), batch_size=4))  # type: ignore[arg-type]
    instrument(wrapper)
    list(wrapper)
    assert type(wrapper) is CopiesAttributes
    assert [loader.audit.delivered for loader in loaders_of([wrapper])] == [10]
    assert [loader.audit.delivered for loader in loaders_of({"train": wrapper})] == [10]


def test_the_loader_in_a_wrapper_with_slots() -> None:
    class Slots:
        __slots__ = ("loader",)

    wrapper = Slots()
    wrapper.loader = DataLoader(Numbers(), batch_size=4)  # type: ignore[attr-defined,arg-type]
    instrument(wrapper)
    list(wrapper.loader)  # type: ignore[attr-defined]
    assert [loader.audit.delivered for loader in loaders_of(wrapper)] == [10]


class HasKey(DataLoader[Any]):
    def __init__(self, *args: Any, key: str = "image", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.key = key


class HasRetries(DataLoader[Any]):
    @property
    def retries(self) -> int:
        raise AssertionError("nobody asks")


class HasPool(DataLoader[Any]):
    _pool = "theirs"


class HasMetrics(DataLoader[Any]):
    metrics = ("theirs",)


class HasAudit(DataLoader[Any]):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.audit = "theirs"


class SetsNothing(DataLoader[Any]):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "on_error":
            raise RuntimeError("not here")
        super().__setattr__(name, value)


class FailsToBegin(Endless):
    def _get_iterator(self) -> Any:
        if isinstance(self, SafeDataLoader):
            raise RuntimeError("not here")
        return super()._get_iterator()


@pytest.mark.parametrize(
    ("cls", "error", "why"),
    [
        (HasKey, TypeError, "it has key of its own, which would be lost"),
        (HasRetries, TypeError, "it has retries of its own"),
        (HasPool, TypeError, "it has _pool of its own"),
        (HasMetrics, TypeError, "it has metrics of its own, which would hide ours"),
        (HasAudit, TypeError, "it has audit of its own, which would hide ours"),
        (SetsNothing, RuntimeError, "not here"),
        (FailsToBegin, RuntimeError, "not here"),
    ],
)
def test_what_cannot_become_ours_stays_as_it_was(cls: Any, error: type, why: str) -> None:
    loader = cls(Numbers(), batch_size=4)
    before = dict(vars(loader))
    with pytest.raises(error, match=why):
        instrument(loader)
    assert type(loader) is cls
    assert vars(loader) == before
    assert [len(batch) for batch in loader] == [4, 4, 2]


def test_a_loader_with_the_attributes_of_one_of_ours_may_become_ours() -> None:
    ours = instrument(DataLoader(Numbers(), batch_size=4))  # type: ignore[arg-type]
    copied: Any = DataLoader.__new__(DataLoader)
    vars(copied).update(vars(ours) | {"recorder": None})
    list(instrument(copied))
    assert copied.audit.delivered == 10


def test_loaders_that_are_not_recorded_are_left_out() -> None:
    plain: Any = DataLoader(Numbers(), batch_size=4)  # type: ignore[arg-type]
    assert loaders_of([plain, object(), None]) == []


def circular() -> Any:
    outer = Wraps(None, "loader")
    outer.loader = outer  # type: ignore[attr-defined]
    return outer


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no loader": (lambda: object(), "is no DataLoader, and holds none as"),
    "wraps none": (lambda: Wraps([1, 2], "loader"), "is no DataLoader, and holds none as"),
    "a list": (
        lambda: [DataLoader(Numbers())],  # type: ignore[arg-type]
        "Give each loader in it by itself",
    ),
    "wraps itself": (circular, "is no DataLoader, and holds none as"),
    "iterators of its own": (
        lambda: MakesItsOwn(Numbers(), batch_size=4),  # type: ignore[arg-type]
        "MakesItsOwn._get_iterator makes its batches itself",
    ),
    "never asks": (lambda: NeverAsks(Numbers()), "NeverAsks.__iter__ makes its batches itself"),  # type: ignore[arg-type]
    "threads": (with_thread_workers, "its workers are threads"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_refused_and_left_as_it_was(name: str) -> None:
    make, why = REFUSED[name]
    found = make()
    kind, before = type(found), dict(getattr(found, "__dict__", {}))
    with pytest.raises(TypeError, match=why):
        instrument(found)
    assert type(found) is kind
    assert getattr(found, "__dict__", {}) == before


@every_class
@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ({"verfy": "warn"}, TypeError, "takes no option 'verfy'"),
        ({"verify": "wran"}, ValueError, "verify must be"),
        ({"key": 3}, TypeError, "key must be"),
        ({"recorder": []}, TypeError, "recorder must be"),
        ({"on_failure_dump": "/proc/none/here"}, ValueError, "cannot be written"),
    ],
)
def test_a_bad_option_changes_nothing(cls: Any, options: Any, error: Any, why: str) -> None:
    loader = cls(Numbers(), batch_size=4)
    before = dict(vars(loader))
    with pytest.raises(error, match=why):
        instrument(loader, **options)
    assert type(loader) is cls
    assert vars(loader) == before
    ours = instrument(cls(Numbers(), batch_size=4), verify="warn")
    with pytest.raises(error, match=why):
        instrument(ours, **options)
    assert ours.verify == "warn"


def test_a_loader_that_is_ours_changes_the_options_given() -> None:
    loader = instrument(Transforms(Numbers(), batch_size=4), verify="warn", retries=2)
    kind, recorder = type(loader), loader.recorder
    instrument(loader, retries=3)
    assert (type(loader), loader.verify, loader.retries) == (kind, "warn", 3)
    assert loader.recorder is recorder
    assert type(instrument(SafeDataLoader(Numbers(), batch_size=4))) is SafeDataLoader


def through_pickle(loader: Any) -> Any:
    return pickle.loads(pickle.dumps(loader))


def through_old_pickle(loader: Any) -> Any:
    return pickle.loads(pickle.dumps(loader, protocol=0))


@pytest.mark.parametrize("cls", [DataLoader, Transforms])
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, through_pickle, through_old_pickle])
def test_copies_are_recorded_too(cls: Any, way: Any) -> None:
    loader = instrument(cls(Numbers(), batch_size=4), verify="warn")
    list(loader)
    made = way(loader)
    assert type(made) is type(loader)
    assert made.verify == "warn"
    assert epochs(made, 1)[0][0][0][0] == 0.0
    assert made.audit.complete


class ReducesItself(DataLoader[Any]):
    def __reduce__(self) -> Any:
        return type(self), (self.dataset, 4)


def test_a_class_that_pickles_in_its_own_way() -> None:
    loader = instrument(ReducesItself(Numbers(), 4))  # type: ignore[arg-type]
    made = through_pickle(loader)
    assert type(made) is type(loader)
    list(made)
    assert made.audit.delivered == 10


@every_kind
def test_made_again_by_its_class_it_keeps_the_librarys_options_and_ours(kind: str) -> None:
    loader = instrument(
        Transforms(Numbers(), scale=5.0, batch_size=4, **KINDS[kind]), verify="warn"
    )
    names = inspect.signature(type(loader).__init__).parameters
    assert {"scale", "verify", "recorder", "checksum"} <= set(names)
    made = recreated(loader)
    assert type(made) is type(loader)
    assert (made.scale, made.verify, made.recorder) == (5.0, "warn", loader.recorder)
    assert epochs(made, 1)[0][1][0][0] == 20.0
    assert loader.audit.delivered == 10


def test_two_loaders_of_one_class_have_one_class_of_ours() -> None:
    first, second = (instrument(Transforms(Numbers())) for _ in range(2))
    assert type(first) is type(second)
    assert type(first).__mro__[:3] == (type(first), Transforms, SafeDataLoader)


def test_records_begin_with_the_next_epoch_of_persistent_workers() -> None:
    loader: Any = DataLoader(Pids(), 2, num_workers=2, persistent_workers=True)  # type: ignore[arg-type]
    running = iter(loader)
    next(running)
    workers = workers_of(running)
    with pytest.warns(UserWarning, match="finished unrecorded"):
        instrument(loader)
    assert len(list(running)) == 5
    assert loader.audit is None
    del running
    list(loader)
    assert loader.audit.delivered == 12
    assert still_alive(workers) == []


def test_between_two_epochs_nothing_is_said() -> None:
    loader: Any = DataLoader(Pids(), 2, num_workers=2, persistent_workers=True)  # type: ignore[arg-type]
    list(loader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        instrument(loader)
    list(loader)
    assert (loader.audit.epoch, loader.audit.delivered) == (0, 12)


class Bad(Numbers):
    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 6:
            raise KeyError("six")
        return super().__getitem__(index)


def test_options_do_what_they_do_for_ours() -> None:
    recorder = Recorder()
    loader = instrument(Transforms(Bad(), batch_size=4), on_error="skip", recorder=recorder)
    list(loader)
    assert recorder.audit().skipped.tolist() == [6]  # type: ignore[union-attr]
    with pytest.raises(SampleError, match="dataset index 6"):
        list(instrument(Transforms(Bad(), batch_size=4)))


def test_a_framework_that_lets_go_of_the_iterator_ends_the_workers() -> None:
    loader: Any = SafeDataLoader(Pids(), 2, num_workers=2, persistent_workers=True)
    list(loader)
    workers = workers_of(loader._iterator)
    loader._iterator = None
    assert still_alive(workers) == []
    list(loader)
    assert loader.audit.epoch == 1


def test_the_function_is_not_hidden_by_a_module() -> None:
    program = (
        "import safeloader.instrumenting, safeloader.beside, safeloader\n"
        "assert callable(safeloader.instrument) and callable(safeloader.loaders_of)"
    )
    root = Path(safeloader.__file__).parents[1]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)


def in_a_library(called: Callable[[], Any]) -> Any:
    """``called()``, asked for by code of the standard library's folder."""
    names: dict[str, Any] = {"__name__": "library"}
    path = f"{sysconfig.get_path('stdlib')}/library.py"
    exec(compile("def asks(called): return called()", path, "exec"), names)
    return names["asks"](called)


def test_the_line_that_is_named_is_the_users_and_not_the_librarys_between() -> None:
    here = calling_line()
    assert here.startswith(f"{__file__}:")
    asked = in_a_library(calling_line)
    assert asked.startswith(f"{__file__}:")
    assert asked != here
