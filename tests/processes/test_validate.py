"""``validate=``: a sample that a check refuses is a sample that failed, whoever fetched it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info

from safeloader import SKIP, DeliveryError, SafeDataLoader, SampleError, ValidationError, checks
from safeloader.checks import values

WAYS: dict[str, dict[str, Any]] = {
    "main": {},
    "fork": {"num_workers": 2, "multiprocessing_context": "fork"},
    "spawn": {"num_workers": 2, "multiprocessing_context": "spawn"},
    "forkserver": {"num_workers": 2, "multiprocessing_context": "forkserver"},
    "persistent": {"num_workers": 2, "persistent_workers": True},
}
every_way = pytest.mark.parametrize("way", WAYS)  # spawn takes seconds a loader
each_way = pytest.mark.parametrize("way", ["main", "fork"])
BAD = (5, 6)


class Numbers:
    """Gives ``{"x": tensor, "index": index}``, with NaN at the indices of ``BAD``."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.full((3,), math.nan if index in BAD else 1.0), "index": index}


class AtOnce(Numbers):
    """The same, a batch at once."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Six numbers a worker, the third of them NaN."""

    def __iter__(self) -> Iterator[float]:
        for number in range(6):
            yield math.nan if number == 2 else float(number)


class Sized(Numbers):
    """Samples of the second worker are larger."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        info = get_worker_info()
        return {"x": torch.zeros(3 if info is None else 3 + info.id), "index": index}


def loader_of(way: str, dataset: Any = None, **options: Any) -> SafeDataLoader[Any]:
    options = {"batch_size": 3, "validate": [checks.finite()]} | options
    return SafeDataLoader(Numbers() if dataset is None else dataset, **options, **WAYS[way])


def indices(loader: Any) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


def no_six(sample: Any, index: Any) -> None:
    assert sample["index"] != 6, f"no {index}"


def give_zero(failure: Any) -> Any:
    assert failure.exception_type.endswith("ValidationError")
    return SKIP if failure.index == 5 else {"x": torch.zeros(3), "index": -failure.index}


@pytest.mark.parametrize(
    ("way", "dataset"),
    [
        *((way, Numbers()) for way in WAYS),
        *((way, AtOnce()) for way in ("main", "fork", "persistent")),
    ],
)
def test_the_sample_that_is_refused_is_named(way: str, dataset: Any) -> None:
    loader = loader_of(way, dataset)
    for _ in range(1 if way in ("spawn", "forkserver") else 2):
        batches = iter(loader)
        assert next(batches)["index"].tolist() == [0, 1, 2]
        with pytest.raises(ValidationError) as caught:
            next(batches)
        error, failure = caught.value, caught.value.failure
        assert failure is not None
        assert (error.index, failure.position, failure.phase) == (5, 2, "sample")
        assert "sample['x']: 3 of 3 values are not finite: nan at [0]" in failure.message
        assert "dataset index 5 (position 2, batch 1" in str(error)
        assert "refused by validate=finite()" in str(error)
        assert "sample = safeloader.replay(error, loader.dataset)" in failure.hint
        assert loader.replay(error)["index"] == 5
        assert loader.audit.failed.tolist() == [3, 4, 5]


@pytest.mark.parametrize("way", ["main", "fork", "persistent"])
@pytest.mark.parametrize("dataset", [Numbers(), AtOnce()], ids=["one by one", "at once"])
def test_a_refused_sample_is_skipped_or_replaced(way: str, dataset: Any) -> None:
    loader = loader_of(way, dataset, on_error="skip")
    assert indices(loader) == [[0, 1, 2], [3, 4], [7, 8], [9, 10, 11]]
    assert loader.audit.skipped.tolist() == [5, 6]
    assert "not finite" in loader.audit.reasons[5]
    assert loader.audit.ok
    loader = loader_of(way, dataset, on_error="replace")
    assert indices(loader) == [[0, 1, 2], [3, 4, 3], [7, 7, 8], [9, 10, 11]]
    assert loader.audit.donors == {5: 3, 6: 7}
    loader = loader_of(way, dataset, on_error=give_zero)
    assert indices(loader) == [[0, 1, 2], [3, 4], [-6, 7, 8], [9, 10, 11]]


@each_way
def test_what_a_check_of_the_users_raises_keeps_its_type(way: str) -> None:
    loader = loader_of(way, validate=no_six)
    with pytest.raises(AssertionError, match="no 6") as caught:
        list(loader)
    assert isinstance(caught.value, ValidationError)
    assert caught.value.index == 6
    assert "refused by validate=no_six" in str(caught.value)
    assert not hasattr(caught.value, "_refused_by")


class Recovers(Numbers):
    """Each bad sample is good from the second time on."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def __getitem__(self, index: int) -> dict[str, Any]:
        first = index not in self.seen
        self.seen.add(index)
        return super().__getitem__(index if first else 0) | {"index": index}


@each_way
def test_a_refused_sample_is_asked_for_again(way: str) -> None:
    loader = loader_of(way, Recovers(), retries=1)
    assert [*chain(*indices(loader))] == list(range(12))
    assert loader.audit.late.tolist() == [5, 6]
    with pytest.raises(ValidationError, match="it failed in each of 3 tries"):
        list(loader_of(way, retries=2))


@each_way
def test_a_sample_of_a_stream_is_named_and_left_out_and_the_stream_goes_on(way: str) -> None:
    loader = loader_of(way, Stream(), batch_size=2)
    with pytest.raises(ValidationError, match="nan is not finite") as caught:
        list(loader)
    assert caught.value.index in ((0, 2), (1, 2))
    assert "on_error='skip'" in str(caught.value)
    for retries in (0, 2):  # the next sample is another: it is not taken for a second try
        loader = loader_of(way, Stream(), batch_size=2, on_error="skip", retries=retries)
        shares = max(1, loader.num_workers)
        came = sorted(chain(*(batch.tolist() for batch in loader)))
        assert came == sorted([0.0, 1, 3, 4, 5] * shares)
        assert loader.audit.skipped.tolist() == [[row, 2] for row in range(shares)]
        assert loader.audit.ok


@each_way
def test_the_index_that_a_check_gets_is_that_of_the_sample(way: str) -> None:
    def right(sample: Any, index: Any) -> None:
        assert sample["index"] == index

    def in_order(sample: Any, index: Any) -> None:
        info = get_worker_info()
        assert index[0] == (0 if info is None else info.id)
        assert sample == index[1] or (math.isnan(sample) and index[1] == 2)

    assert len(indices(loader_of(way, validate=[right]))) == 4
    assert len(indices(loader_of(way, AtOnce(), validate=[right], shuffle=True))) == 4
    assert list(loader_of(way, Stream(), validate=[in_order], batch_size=None))
    assert list(loader_of(way, Stream(), validate=[in_order], batch_size=4))


@each_way
def test_checks_are_called_in_their_order_until_one_refuses(way: str) -> None:
    loader = loader_of(way, validate=[no_six, checks.finite()], on_error="skip")
    assert len(indices(loader)) == 4
    assert "AssertionError: no 6" in loader.audit.reasons[6]
    assert "not finite" in loader.audit.reasons[5]


@each_way
@pytest.mark.parametrize("kind", [Numbers, AtOnce])
def test_without_batching_each_sample_is_checked(way: str, kind: Any) -> None:
    loader = loader_of(way, kind(), batch_size=None, on_error="skip")
    assert [sample["index"] for sample in loader] == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]


# ── schema and unique: what samples say of each other ────────────────────────────────────────────


@pytest.mark.parametrize("way", ["fork", "spawn", "persistent"])
def test_workers_whose_first_samples_differ_are_both_named(way: str) -> None:
    loader = loader_of(way, Sized(), validate=[checks.schema()])
    with pytest.raises(DeliveryError) as caught:
        list(loader)
    said = str(caught.value)
    assert "the first samples of two workers are not alike: index 3 of worker 1 and index 0" in said
    assert "sample['x'] tensor float32 (4,), and sample['x'] tensor float32 (3,)" in said
    assert "checks.schema(like=...)" in said
    loader = loader_of(way, Sized(), validate=[checks.schema()], verify="warn")
    with pytest.warns(RuntimeWarning, match="the first samples of two workers are not alike"):
        assert [*chain(*indices(loader))] == list(range(12))


class SizedStream(IterableDataset):  # type: ignore[type-arg]
    """Samples of the second worker are larger."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        for _ in range(4):
            yield torch.zeros(3 if info is None else 3 + info.id)


def test_workers_whose_streams_differ_are_both_named() -> None:
    said = "the first samples of two workers are not alike: index .1, 0. of worker 1"
    with pytest.raises(DeliveryError, match=said):
        list(loader_of("fork", SizedStream(), batch_size=2, validate=[checks.schema()]))


@pytest.mark.parametrize("way", ["main", "fork", "persistent"])
def test_workers_whose_samples_are_alike_are_silent(way: str) -> None:
    loader = loader_of(way, validate=[checks.schema()])
    for _ in range(2):
        assert [*chain(*indices(loader))] == list(range(12))
        assert loader.audit.ok


@each_way
def test_one_check_of_two_loaders_has_a_measure_for_each(way: str) -> None:
    check = [checks.schema()]
    assert indices(loader_of(way, validate=check))
    assert list(SafeDataLoader([1, 2], validate=check, **WAYS[way]))


def modulo(sample: Any) -> int:
    return int(sample["index"]) % 9


@pytest.mark.parametrize("way", ["main", "fork", "spawn"])
def test_samples_with_one_key_are_found(way: str) -> None:
    loader = loader_of(way, validate=[checks.unique(modulo)])
    with pytest.raises(DeliveryError, match=r"index 9 and index 0 are one sample \(key 0\)"):
        list(loader)


def test_an_identity_is_given_once() -> None:
    with pytest.raises(ValueError, match="samples have one identity: give key=, or one checks"):
        SafeDataLoader([1], key=repr, validate=[checks.unique(repr)])
    with pytest.raises(ValueError, match="samples have one identity"):
        SafeDataLoader([1], validate=[checks.unique(repr), checks.unique(str)])


@pytest.mark.parametrize("bad", [1, "finite", [checks.finite(), 1], {"a": repr}])
def test_what_is_no_check_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match="validate must be None, a check or a list of checks"):
        SafeDataLoader([1], validate=bad)


def one_argument(sample: Any) -> None:
    """Forgets the index."""


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (checks.finite, r"a class: make a check of it, Finite\(\)"),
        (one_argument, r"cannot be called with \(sample, index\): too many positional"),
        ([checks.finite(), lambda: None], "cannot be called with"),
    ],
)
def test_a_check_that_cannot_be_called_is_refused_at_once(bad: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        SafeDataLoader([1], validate=bad)


def says_no(sample: Any, index: Any) -> Any:
    answers = {5: False, 6: np.bool_(False), 7: torch.tensor(False), 8: np.bool_(True), 9: 0}
    return answers.get(index)


@each_way
def test_a_check_that_answers_false_refuses(way: str) -> None:
    loader = loader_of(way, validate=says_no, on_error="skip")
    assert indices(loader) == [[0, 1, 2], [3, 4], [8], [9, 10, 11]]
    assert "returned False" in loader.audit.reasons[5]


def give_nan(failure: Any) -> Any:
    return {"x": torch.full((3,), math.nan), "index": failure.index}


@each_way
def test_what_on_error_gives_is_checked_too(way: str) -> None:
    with pytest.raises(ValidationError, match="raised on what on_error= gave") as caught:
        list(loader_of(way, on_error=give_nan))
    assert caught.value.index == 5
    *_, step = str(caught.value).splitlines()
    assert "have the callable given as on_error= give a sample that passes" in step


# ── a check of ours that breaks, and samples of every dtype ──────────────────────────────────────


class Property:
    """A sample that raises when it is looked at."""

    def __init__(self, index: int) -> None:
        self.index = index

    @property
    def x(self) -> float:
        return 1.0 / (self.index - 5)


class Properties(Numbers):
    def __getitem__(self, index: int) -> Any:
        return Property(index)


@each_way
@pytest.mark.parametrize("options", [{}, {"on_error": "skip"}, {"retries": 2}], ids=repr)
@pytest.mark.parametrize("kind", [Numbers, AtOnce])
def test_a_fault_of_a_check_of_ours_is_no_samples(
    way: str, options: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "_all_finite", torch.stack)  # which takes no tensor
    loader = loader_of(way, kind(), **options)
    with pytest.raises(SampleError, match=r"argument .tensors.") as caught:
        list(loader)
    told = str(caught.value)
    assert not isinstance(caught.value, ValidationError)
    assert "checks.finite() could not look at the sample, by a fault of safeloader's own" in told
    assert "leave this check out of validate=" in told
    assert "refused by validate" not in told
    assert loader.audit.skipped.tolist() == []


@each_way
def test_what_a_sample_raises_when_it_is_looked_at_is_the_samples(way: str) -> None:
    check = checks.in_range(-9, 9, at="x")
    loader = loader_of(way, Properties(), validate=[check], on_error="skip", collate_fn=len)
    assert list(loader) == [3, 2, 3, 3]
    assert loader.audit.skipped.tolist() == [5]
    assert "ZeroDivisionError" in loader.audit.reasons[5]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float8_e5m2, torch.bool], ids=repr)
def test_sound_samples_of_any_dtype_all_come(dtype: torch.dtype) -> None:
    samples = [torch.zeros(2, dtype=dtype)] * 4
    check = [checks.in_range(0, 9), checks.finite()]
    loader = SafeDataLoader(samples, validate=check, on_error="skip", collate_fn=len)
    assert sum(loader) == 4
    assert loader.audit.skipped.tolist() == []
