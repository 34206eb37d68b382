"""Batches that are out of the ordinary: empty ones, and answers of ``__getitems__``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from safeloader import CollateError, SafeDataLoader, SampleError
from safeloader.failures import failure
from safeloader.worker import hints


class Numbers:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(float(index))


class AtOnce(Numbers):
    """Answers in one call, as ``answer`` has it."""

    def __init__(self, answer: Callable[[list[int]], Any]) -> None:
        self.answer = answer

    def __getitems__(self, indices: list[int]) -> Any:
        return self.answer(indices)


PLAIN: Any = Numbers()


def subset(dataset: Any, indices: Any = (3, 1, 2, 0)) -> Any:
    return Subset(dataset, list(indices))


class Changes(Subset[Any]):
    def __getitems__(self, indices: list[int]) -> Any:
        return [-sample for sample in super().__getitems__(indices)]


def with_its_own(dataset: Any) -> Any:
    """A Subset that was given its own way to make batches."""
    split = subset(dataset)
    split.__getitems__ = lambda indices: [torch.tensor(-1.0) for _ in indices]
    return split


SUBSETS: dict[str, tuple[Callable[[], Any], bool]] = {
    "of a plain dataset": (lambda: subset(Numbers()), False),
    "of one of it": (lambda: subset(subset(Numbers(), range(8))), False),
    "of what makes batches": (lambda: subset(AtOnce(doubled)), True),
    "of a Subset of what makes them": (lambda: subset(subset(AtOnce(doubled), range(8))), True),
    "of another class": (lambda: Changes(PLAIN, [3, 1, 2, 0]), True),
    "with its own": (lambda: with_its_own(Numbers()), True),
    "of tensors": (lambda: subset([torch.zeros(1)] * 3 + [torch.ones(1)]), False),
}


def doubled(indices: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(2.0 * index) for index in indices]


@pytest.mark.parametrize("name", SUBSETS)
def test_a_subset_is_asked_for_each_sample_unless_one_call_makes_the_batch(name: str) -> None:
    make, at_once = SUBSETS[name]
    loader = SafeDataLoader(make(), batch_size=2, trace=True, collate_fn=as_floats)
    came = list(loader)
    assert came == list(DataLoader(make(), batch_size=2, collate_fn=as_floats))
    assert loader.recorder is not None
    assert [each.manifest.fetched_at_once for each in loader.recorder.deliveries()] == [at_once] * 2


def test_a_batch_by_lists_is_asked_of_a_subset_as_torch_asks_it() -> None:
    sampler: Any = [[[0], [1]], [[2], [0]]]
    for cls in (DataLoader, SafeDataLoader):
        loader = cls(subset(PLAIN), batch_sampler=sampler)
        with pytest.raises(TypeError, match="list indices must be integers"):
            list(loader)


def as_floats(samples: list[Any]) -> Any:
    return [float(sample) for sample in samples]


def stack(samples: Any) -> torch.Tensor:
    return torch.stack(list(samples))


def none_empty(samples: list[Any]) -> Any:
    if not samples:
        raise ValueError("the batch sampler gave an empty batch")
    return stack(samples)


def count(samples: list[Any]) -> int:
    return len(samples)


@pytest.mark.parametrize("retries", [0, 1])
@pytest.mark.parametrize("on_error", ["raise", "skip", "replace"])
@pytest.mark.parametrize("collate", [None, none_empty])
def test_an_empty_batch_that_cannot_be_collated_is_told(
    collate: Any, on_error: Any, retries: int
) -> None:
    empty = [[0, 1], [], [2]]
    with pytest.raises((IndexError, ValueError)) as stock:
        list(DataLoader(Numbers(), batch_sampler=empty, collate_fn=collate))  # type: ignore[arg-type]  # no Dataset
    loader = SafeDataLoader(
        Numbers(), batch_sampler=empty, collate_fn=collate, on_error=on_error, retries=retries
    )
    batches = iter(loader)
    assert next(batches).tolist() == [0, 1]
    with pytest.raises(CollateError) as ours:
        next(batches)
    assert isinstance(ours.value, stock.type)
    assert next(batches).tolist() == [2]
    assert loader.audit.delivered == 3


@pytest.mark.parametrize("retries", [0, 1])
def test_an_empty_batch_that_can_be_is_handed_over(retries: int) -> None:
    loader = SafeDataLoader(
        Numbers(), batch_sampler=[[0, 1], [], [2]], collate_fn=count, retries=retries
    )
    assert list(loader) == [2, 0, 1]


def one_by_one(indices: list[int]) -> Iterator[Any]:
    for index in indices:
        if index == 5:
            raise ValueError("record 5 is broken")
        yield torch.tensor(float(index))


def test_a_generator_that_fails_as_it_is_asked_for_keys_is_skipped_over() -> None:
    loader = SafeDataLoader(
        AtOnce(one_by_one), batch_size=4, collate_fn=stack, key=float, on_error="skip"
    )
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 6, 7]]
    assert loader.audit.skipped.tolist() == [5]


@pytest.mark.parametrize("answer", [None, 3])
def test_no_samples_at_all_are_told_of_their_indices(answer: Any) -> None:
    loader = SafeDataLoader(AtOnce(lambda _: answer), batch_size=4, collate_fn=stack, key=float)
    with pytest.raises(SampleError) as raised:
        next(iter(loader))
    assert isinstance(raised.value, TypeError)
    assert raised.value.failure is not None
    assert raised.value.failure.indices == (0, 1, 2, 3)


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("odd", [torch.zeros(7), None])
def test_the_odd_sample_of_an_answer_is_named(odd: Any, kind: Any) -> None:
    def answer(indices: list[int]) -> Any:
        return kind(odd if index == 5 else torch.zeros(3) for index in indices)

    batches = iter(SafeDataLoader(AtOnce(answer), batch_size=4, collate_fn=stack))
    next(batches)
    with pytest.raises(CollateError) as raised:
        next(batches)
    assert raised.value.index == 5


@pytest.mark.parametrize("module", [failure, hints])
def test_a_fault_in_taking_an_exception_apart_does_not_take_its_place(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(failure, "exception_parts_of", faulty)
    monkeypatch.setattr(module, "exception_parts_of", faulty)
    with pytest.raises(SampleError) as raised:
        next(iter(SafeDataLoader(AtOnce(one_by_one), batch_size=8, collate_fn=stack, key=float)))
    assert not isinstance(raised.value, ZeroDivisionError)
