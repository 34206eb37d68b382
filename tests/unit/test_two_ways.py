"""A ``__getitem__`` that never runs, since ``__getitems__`` passes it by, is told at the start."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset

from safeloader import SafeDataLoader, SampleError
from safeloader.introspect.two_ways import passed_by
from safeloader.main import worker_pool


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is told anew of the classes at module level."""
    monkeypatch.setattr(worker_pool, "_looked_at", set())
    monkeypatch.setattr(worker_pool, "_passed_by", set())


class Table(Dataset[int]):
    """A library's: many rows in one call, without ``__getitem__``."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        return index

    def __getitems__(self, indices: list[int]) -> list[int]:
        return list(indices)


class Negated(Table):
    def __getitem__(self, index: int) -> int:
        return -super().__getitem__(index)


class Wrapper(Dataset[int]):
    def __init__(self, inner: Dataset[int]) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        return -int(self.inner[index])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


class Guarded(Wrapper):
    """As wrappers that are pickled have it."""

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "_inner", "__setstate__"):
            raise AttributeError(name)
        return getattr(self.inner, name)


class CallsItself(Table):
    def __getitems__(self, indices: list[int]) -> list[int]:
        return [self[index] for index in indices]


class CallsByName(Table):
    def __getitems__(self, indices: list[int]) -> list[int]:
        return [self.__getitem__(index) for index in indices]


class CallsByMap(Table):
    def __getitems__(self, indices: list[int]) -> list[int]:
        return [*map(functools.partial(type(self).__getitem__, self), indices)]


class OfItself(CallsItself):
    def __getitem__(self, index: int) -> int:
        return -super().__getitem__(index)


class OfName(CallsByName):
    def __getitem__(self, index: int) -> int:
        return -super().__getitem__(index)


class OfMap(CallsByMap):
    def __getitem__(self, index: int) -> int:
        return -super().__getitem__(index)


class Both(Negated):
    def __getitems__(self, indices: list[int]) -> list[int]:
        return [-index for index in super().__getitems__(indices)]


class HandsOn(Wrapper):
    def __getitem__(self, index: int) -> int:
        return self.inner[index]


class Refuses(Wrapper):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["inner"], name)


class HasNone(Dataset[int]):
    """Its samples come in batches alone."""

    def __init__(self, inner: Dataset[int]) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return 20

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


class Forbidden(Table):
    def __getattribute__(self, name: str) -> Any:
        pytest.fail("the user's code was called")


LOST = {
    "a child class": lambda: (Negated(), "dataset"),
    "a wrapper": lambda: (Wrapper(Table()), "dataset"),
    "a wrapper of a wrapper": lambda: (Wrapper(HandsOn(Table())), "dataset"),
    "one that guards itself": lambda: (Guarded(Table()), "dataset"),
    "under a Subset": lambda: (Subset(Negated(), range(20)), "dataset.dataset"),
    "in a StackDataset": lambda: (StackDataset(Table(), Negated()), "dataset.datasets[1]"),
    "named there": lambda: (StackDataset(x=Wrapper(Table())), "dataset.datasets['x']"),
}
SOUND = {
    "one class": Table,
    "self[index]": OfItself,
    "its name": OfName,
    "self as an argument": OfMap,
    "both": lambda: Both(),
    "nothing but handing on": lambda: HandsOn(Table()),
    "no __getitem__ of its own": lambda: HasNone(Table()),
    "refuses such names": lambda: Refuses(Table()),
    "nothing to be found": lambda: Wrapper(ConcatDataset([Table()])),
    "one by one": lambda: ConcatDataset([Negated()]),
    "torch's own": lambda: Subset(StackDataset(Table(), Table()), range(5)),
    "a list": lambda: [1, 2, 3],
}


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_told_once_with_cause_and_cure(
    name: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, path = LOST[name]()
    loader = SafeDataLoader(dataset, batch_size=5, num_workers=workers, collate_fn=list)
    flat = [sample for batch in loader for sample in batch]
    list(loader)
    assert "-1" not in str(flat)  # it did not run indeed
    (said,) = (each for each in caplog.messages if "__getitems__" in each)
    assert f": {path} (" in said
    assert "never calls the __getitem__ of" in said
    assert "Define beside it: def __getitems__(self, indices): return [self[index]" in said


@pytest.mark.parametrize("name", LOST)
def test_the_cure_cures(name: str) -> None:
    dataset, _ = LOST[name]()
    (found,) = passed_by(dataset)
    cure = found.says.partition("Define beside it: ")[2]
    space: dict[str, Any] = {}
    exec(cure, space)
    found.cls.__getitems__, before = space["__getitems__"], vars(found.cls).get("__getitems__")
    try:
        assert passed_by(dataset) == []
        assert "-1" in str([*SafeDataLoader(dataset, batch_size=5, collate_fn=list)])
    finally:
        if before is None:
            del found.cls.__getitems__


@pytest.mark.parametrize("name", SOUND)
def test_of_a_sound_one_nothing_is_told(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make: Any = SOUND[name]
    list(SafeDataLoader(make(), batch_size=5, collate_fn=list))
    assert caplog.messages == []


def test_without_batches_nobody_asks_for_many(caplog: pytest.LogCaptureFixture) -> None:
    assert [*SafeDataLoader(Negated(), batch_size=None)][1] == -1
    assert caplog.messages == []


def test_no_code_of_the_users_runs() -> None:
    assert passed_by(Forbidden()) == []


# ── whose fault it is ────────────────────────────────────────────────────────────────────────────


class FailsTogether(Table):
    """Its ``__getitems__`` cannot do what its ``__getitem__`` can."""

    def __getitems__(self, indices: list[int]) -> list[int]:
        return [[0, 1][index] for index in indices]


class FailsAtOne(Table):
    def __getitem__(self, index: int) -> int:
        return 1 // (index - 7)

    def __getitems__(self, indices: list[int]) -> list[int]:
        return [self[index] for index in indices]


def failed(dataset: Dataset[int], **options: Any) -> SampleError:
    with pytest.raises(SampleError) as caught:
        list(SafeDataLoader(dataset, **options))
    return caught.value


@pytest.mark.parametrize("size", [5, 1])
def test_where_the_sample_comes_alone_no_index_is_to_blame(size: int) -> None:
    error = failed(FailsTogether(), batch_size=size)
    assert error.index is None
    assert "([2]) raises too, and dataset[2] does not: __getitems__ is at fault" in str(error)
    assert "next: mend __getitems__" in str(error)


@pytest.mark.parametrize("size", [5, 1])
def test_where_it_does_not_it_is(size: int) -> None:
    error = failed(FailsAtOne(), batch_size=size)
    assert error.index == 7
    assert "at fault" not in str(error)
