"""A sampler that says another number of batches than it gives is told; asking harms nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from safeloader import SafeDataLoader
from safeloader.introspect.asking import asking_changes_nothing, only_reads
from tests import datasets, faults

DATA = list(range(64))


class Announces(Sampler[Any]):
    """Gives ``gives`` pairs of indices, and says ``says``."""

    def __init__(self, gives: int, says: Any) -> None:
        self.gives, self.says = gives, says

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[2 * k, 2 * k + 1] for k in range(self.gives)])

    def __len__(self) -> int:
        return int(self.says)


class Counting(Announces):
    """Notes that it was asked: so asking changes something."""

    asked = 0

    def __len__(self) -> int:
        self.asked += 1
        return int(self.says)


class Singles(Announces):
    def __iter__(self) -> Iterator[Any]:
        return iter(range(self.gives))


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if "len(loader)" in each.getMessage()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("says", "follows"), [(20, "waits for ever"), (5, "stops before the end")])
def test_a_batch_sampler_that_says_another_number_is_told(
    workers: int, says: int, follows: str, caplog: pytest.LogCaptureFixture
) -> None:
    loader = SafeDataLoader(DATA, batch_sampler=Announces(12, says), num_workers=workers)
    for _ in loader:
        pass
    said = f"the sampler says {says} batches and gave 12: whoever counts on len(loader) {follows}"
    assert f"\n  batches: {said}" in str(loader.audit)
    (line,) = warned(caplog)
    assert said in line
    audit = loader.audit
    assert (audit.announced, audit.batches_drawn, audit.batches) == (says, 12, 12)
    assert audit.ok


def test_a_sampler_below_torchs_batch_sampler_is_told() -> None:
    loader = SafeDataLoader(DATA, batch_size=4, sampler=Singles(48, 80))
    for _ in loader:
        pass
    assert "the sampler says 20 batches and gave 12" in str(loader.audit)


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_sampler": Announces(12, 12)},
        {"batch_sampler": Announces(12, "unknown")},
        {"batch_sampler": Counting(12, 20)},
        {"batch_sampler": [[0, 1], [2]]},
        {"sampler": Singles(7, 7), "batch_size": 4},
        {"sampler": Singles(7, 7), "batch_size": 4, "drop_last": True},
        {"sampler": Singles(7, 7), "batch_size": None},
        {"shuffle": True, "batch_size": 7},
    ],
)
def test_what_is_true_or_not_known_is_not_told(
    arguments: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    loader = SafeDataLoader(DATA, **arguments)
    for _ in range(2):
        for _ in loader:
            pass
        assert "batches:" not in str(loader.audit)
    assert warned(caplog) == []


def test_an_epoch_that_did_not_end_by_itself_shows_nothing() -> None:
    loader = SafeDataLoader(DATA, batch_sampler=Announces(12, 20))
    for _ in loader:
        break
    assert "batches:" not in str(loader.audit)
    failing = SafeDataLoader(faults.Raises(at=5, length=12), batch_sampler=Announces(6, 7))
    batches = iter(failing)
    with pytest.raises(KeyError):
        list(batches)
    list(batches)
    assert "batches:" not in str(failing.audit)


class Draws(Announces):
    """Each question moves a generator of its own, from which its batches are."""

    def __init__(self, own: bool) -> None:
        super().__init__(3, 3)
        self.rng: Any = random.Random(5) if own else None

    def _order(self) -> list[int]:
        draw = self.rng or random
        return [draw.randrange(64) for _ in range(3)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[index] for index in self._order()])

    def __len__(self) -> int:
        return len(self._order())


class Within(Announces):
    def __init__(self, inner: Announces) -> None:
        super().__init__(3, 3)
        self.sampler = inner

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


@pytest.mark.parametrize(
    "make", [lambda: Draws(True), lambda: Draws(False), lambda: Within(Draws(True))]
)
def test_batches_are_the_stock_loaders_whatever_a_length_draws(make: Any) -> None:
    def batches(cls: Any) -> list[Any]:
        random.seed(3)
        loader = cls(DATA, batch_sampler=make())
        return [batch.tolist() for _ in range(2) for batch in loader] + [random.random()]

    assert batches(SafeDataLoader) == batches(DataLoader)


class Reorders(Announces):
    """Its own count of epochs seeds its order, and each count of its batches is an epoch."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.epoch = 0

    def __iter__(self) -> Iterator[list[int]]:
        order = random.Random(self.epoch).sample(DATA, 9)
        self.epoch += 1
        return iter([order[:3], order[3:6], order[6:]])

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Prepares(Announces):
    """Draws its batches as it is asked for them, or for their number, whichever comes first."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.batches: Any = None

    def _prepared(self) -> Any:
        if self.batches is None:
            self.batches = torch.randperm(9).split(3)
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        batches, self.batches = self._prepared(), None
        return iter([each.tolist() for each in batches])

    def __len__(self) -> int:
        return len(self._prepared())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [Reorders, Prepares])
def test_what_a_length_changes_stays_as_under_the_stock_loader(make: Any, workers: int) -> None:
    def batches(cls: Any) -> list[Any]:
        torch.manual_seed(3)
        loader = cls(DATA, batch_sampler=make(), num_workers=workers)
        return [batch.tolist() for _ in range(2) for batch in loader] + [torch.rand(1).item()]

    assert batches(SafeDataLoader) == batches(DataLoader)


def test_what_the_program_was_told_is_compared_with_what_comes() -> None:
    sampler = Counting(12, 20)
    loader = SafeDataLoader(DATA, batch_sampler=sampler)
    assert len(loader) == 20
    for _ in range(2):
        for _ in loader:
            pass
    assert sampler.asked == 1
    assert "the sampler says 20 batches and gave 12" in str(loader.audits[0])
    assert loader.audits[1].announced is None  # nobody asked again


def test_a_loader_with_a_length_of_its_own_is_left_alone() -> None:
    class Endless(SafeDataLoader[Any]):
        def __len__(self) -> int:
            return 1000

    loader = Endless(DATA, batch_sampler=Announces(3, 7))
    for _ in loader:
        pass
    assert loader.audit.announced is None


# ── batches handed over ──────────────────────────────────────────────────────────────────────────


class Shared(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[int]:
        info = torch.utils.data.get_worker_info()
        return iter(range(info.id, 20, info.num_workers) if info else range(20))

    def __len__(self) -> int:
        return 20


def test_a_stream_of_two_workers_ends_with_a_batch_of_each() -> None:
    loader = SafeDataLoader(Shared(), batch_size=3, num_workers=2)
    list(loader)
    assert "\n  batches: len(loader) says 7, and 8 were handed over" in str(loader.audit)
    alone = SafeDataLoader(Shared(), batch_size=3)
    list(alone)
    assert "batches:" not in str(alone.audit)


def test_a_stream_without_a_length_announces_nothing() -> None:
    loader = SafeDataLoader(datasets.Resampled(), batch_size=3)
    list(loader)
    assert (loader.audit.announced, loader.audit.batches) == (None, 1)


def test_a_batch_left_out_whole_is_missing_from_the_count() -> None:
    loader = SafeDataLoader(faults.Raises(at=5, length=12), batch_size=1, on_error="skip")
    for _ in loader:
        pass
    assert "\n  batches: len(loader) says 12, and 11 were handed over" in str(loader.audit)


# ── what may be asked ────────────────────────────────────────────────────────────────────────────


class Held:
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


class OfAttribute(Held):
    def __len__(self) -> int:
        return int(self.total) // self.size  # type: ignore[attr-defined]


class OfList(Held):
    def __len__(self) -> int:
        return max(0, len(self.rows) - 1)  # type: ignore[attr-defined]


class Rounded(Held):
    def __len__(self) -> int:
        return math.ceil(self._whole / self.size)  # type: ignore[attr-defined]

    @property
    def _whole(self) -> int:
        return len(self.rows)  # type: ignore[attr-defined]


class OfInner(Held):
    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[attr-defined]


class Assigns(Held):
    def __len__(self) -> int:
        self.asked = True
        return 3


class Calls(Held):
    def __len__(self) -> int:
        return self.count()  # type: ignore[attr-defined, no-any-return]


class Answers(Held):
    def __len__(self) -> int:
        return self.unknown  # type: ignore[attr-defined, no-any-return]

    def __getattr__(self, name: str) -> int:
        return 3


@pytest.mark.parametrize(
    ("thing", "harmless"),
    [
        ([1, 2], True),
        (OfAttribute(total=9, size=2), True),
        (OfList(rows=[1]), True),
        (Rounded(rows=[1, 2, 3], size=2), True),
        (OfInner(inner=[1]), True),
        (OfInner(inner=Rounded(rows=[1], size=2)), True),
        (OfInner(inner=Assigns()), False),
        (OfInner(inner=Calls(count=list)), False),
        (OfAttribute(total=Assigns(), size=1), False),
        (Assigns(), False),
        (Calls(count=list), False),
        (Answers(), False),
        (Reorders(), False),
        (Prepares(), False),
        (object(), False),
    ],
)
def test_only_what_changes_nothing_is_asked(thing: Any, harmless: bool) -> None:
    assert asking_changes_nothing(thing) == harmless


class LengthOf(Held):
    rows: Any

    def __len__(self) -> int:
        return len(self.rows)


class Told(Held):
    total: int

    def __len__(self) -> int:
        return self.total


class Fixed:
    def __len__(self) -> int:
        return 7


class OfFirst(Held):
    rows: Any

    def __len__(self) -> int:
        return len(self.rows[0])


class Emptied(Held):
    rows: Any

    def __len__(self) -> Any:
        return self.rows.clear()


class Watched(LengthOf):
    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name)


class Counted(LengthOf):
    rows = property(lambda self: vars(self).setdefault("asked", []) or [1])


class OfOwnKind(list[int]):
    pass


class HidesItsDict(LengthOf):
    # As no sound class does.
    __dict__ = property(lambda self: {"rows": []})  # type: ignore[assignment]


class Metaclass(type):
    def __eq__(cls, other: object) -> bool:
        raise TypeError("not to be asked")

    def __hash__(cls) -> int:
        raise TypeError("not to be asked")


class OfOddKind(metaclass=Metaclass):
    pass


@pytest.mark.parametrize(
    ("thing", "reads"),
    [
        (Fixed(), True),
        (Told(total=9), True),
        (LengthOf(rows=[1]), True),
        (LengthOf(rows=np.arange(3)), True),
        (LengthOf(rows=OfOwnKind([1])), False),
        (LengthOf(rows=LengthOf(rows=[1])), False),
        (LengthOf(rows=OfOddKind()), False),
        (LengthOf(), False),
        (Told(total=OfOddKind()), False),
        (OfFirst(rows=[[1]]), False),
        (Emptied(rows=[1]), False),
        (Watched(rows=[1]), False),
        (Counted(), False),
        (HidesItsDict(rows=[1]), False),
        (Assigns(), False),
        (Calls(count=list), False),
        (Prepares(), False),
        (object(), False),
        (OfOddKind(), False),
    ],
)
def test_what_only_reads_is_told_at_once(thing: Any, reads: bool) -> None:
    assert only_reads(thing) == reads


def test_a_len_of_the_users_is_not_taken_for_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only_reads(LengthOf(rows=[1]))
    with monkeypatch.context() as patched:
        patched.setitem(LengthOf.__len__.__globals__, "len", lambda rows: rows.pop())
        assert not only_reads(LengthOf(rows=[1]))
    with monkeypatch.context() as patched:
        patched.setattr("builtins.len", lambda rows: 0)
        said = only_reads(LengthOf(rows=[1]))
    assert not said


def test_a_length_that_draws_leaves_the_generators_where_they_are() -> None:
    class Drawing(Dataset[float]):
        def __len__(self) -> int:
            return 8 + int(torch.rand(()) * 0)

        def __getitem__(self, index: int) -> float:
            return float(torch.rand(()))

    def epochs(cls: Any) -> list[Any]:
        torch.manual_seed(1)
        loader = cls(Drawing(), batch_size=4, shuffle=True)
        return [[batch.tolist() for batch in loader] for _ in range(3)]

    assert epochs(SafeDataLoader) == epochs(DataLoader)
