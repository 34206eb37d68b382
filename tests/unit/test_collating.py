"""What a person is told after a collate function raised."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import default_collate

from safeloader.worker.collating import FaultySample, explain

INDICES = [100 + position for position in range(64)]


def batch(usual: Callable[[], Any], odd: Any, at: int = 9) -> list[Any]:
    samples = [usual() for _ in range(16)]
    samples[at] = odd
    return samples


def told(samples: list[Any], indices: list[Any] = INDICES) -> FaultySample:
    explanation = explain(samples, indices)
    assert explanation is not None
    return explanation


class Image:
    """A stand-in for a decoded image: nothing that default_collate takes."""


class Named(NamedTuple):
    x: Any
    y: Any


@pytest.mark.parametrize(
    ("usual", "odd", "text"),
    [
        (lambda: {"a": 1}, None, "is None; the other 15 are dict"),
        (lambda: {"a": 1}, {"a": None}, "is None at ['a']; the other 15 are int"),
        (lambda: {"a": 1}, [1], "is list; the other 15 are dict"),
        (
            lambda: (1, torch.ones(2)),
            (1, [1.0, 2.0]),
            "is list at [1]; the other 15 are torch.Tensor",
        ),
        (lambda: torch.ones(2), np.ones(2), "is numpy.ndarray; the other 15 are torch.Tensor"),
        (lambda: {"a": 1, "f": 2}, {"a": 1}, "has no key 'f'; the other 15 have it"),
        (
            lambda: {"m": {"a": 1, "f": 2, "g": 3}},
            {"m": {"a": 1}},
            "has no keys 'f', 'g' at ['m']; the other 15 have them",
        ),
        (lambda: {"a": 1}, {"a": 1, "x": 2}, "has the extra key 'x'; the other 15 do not"),
        (
            lambda: {"a": 1, "f": 2},
            {"a": 1, "g": 2},
            "has the extra key 'g' and no key 'f'; the other 15 have it",
        ),
        (lambda: (0, [1, 2]), (0, [1, 2, 3]), "has 3 elements at [1], the other 15 have 2"),
        (lambda: (0, [1, 2]), (0, [1]), "has 1 element at [1], the other 15 have 2"),
        (
            lambda: {"image": [torch.ones(3)]},
            {"image": [torch.ones(4)]},
            "has shape [4] at ['image'][0], the other 15 have [3]",
        ),
        (
            lambda: torch.ones(2),
            torch.ones(2, dtype=torch.float64),
            "has dtype float64, the other 15 have float32",
        ),
        (lambda: np.ones(2), np.ones((2, 1)), "has shape [2, 1], the other 15 have [2]"),
        (
            lambda: torch.ones(2),
            torch.ones(2, device="meta"),
            "is on meta, the other 15 are on cpu",
        ),
        (lambda: {"y": 1}, {"y": "1"}, "is str at ['y']; the other 15 are int"),
        (lambda: Named(1, 2), Named(1, None), "is None at [1]; the other 15 are int"),
    ],
)
def test_one_odd_sample_is_named(usual: Callable[[], Any], odd: Any, text: str) -> None:
    explanation = told(batch(usual, odd))
    assert explanation.text == f"dataset index 109 (position 9) {text}"
    assert explanation.position == 9


def test_the_first_sample_can_be_the_odd_one() -> None:
    assert told(batch(lambda: torch.ones(3), torch.ones(4), at=0)).position == 0


def test_several_odd_samples_are_named_and_none_is_blamed() -> None:
    samples: list[Any] = [{"f": 1} for _ in range(16)]
    samples[3], samples[7] = {}, {}
    explanation = told(samples)
    assert explanation.position is None
    assert explanation.text == "dataset indices 103, 107 have no key 'f'; the other 14 have it"


def test_odd_samples_of_two_sorts_are_both_named() -> None:
    samples = [torch.ones(3) for _ in range(16)]
    samples[3], samples[7] = torch.ones(4), torch.ones(5)
    explanation = told(samples)
    assert explanation.position is None
    assert explanation.text == (
        "dataset index 103 (position 3) has shape [4], "
        "dataset index 107 (position 7) has shape [5], the other 14 have [3]"
    )


def test_odd_samples_in_two_places_are_both_named() -> None:
    samples = [{"a": torch.ones(3), "b": torch.ones(3)} for _ in range(16)]
    samples[3]["b"] = samples[7]["a"] = torch.ones(4)
    explanation = told(samples)
    assert explanation.position is None
    assert "index 103 (position 3) has shape [4] at ['b']" in explanation.text
    assert "index 107 (position 7) has shape [4] at ['a']" in explanation.text


def test_two_samples_that_lack_different_keys_are_both_named() -> None:
    samples: list[Any] = [{"a": 1, "b": 2} for _ in range(16)]
    del samples[3]["a"], samples[5]["b"]
    explanation = told(samples)
    assert explanation.position is None
    assert "index 103 (position 3) has no key 'a'" in explanation.text
    assert "index 105 (position 5) has no key 'b'; the other 14 have them" in explanation.text


def test_one_sample_wrong_in_two_places_is_to_blame() -> None:
    samples = [{"a": torch.ones(3), "b": torch.ones(3)} for _ in range(16)]
    samples[9] = {"a": torch.ones(4), "b": torch.ones(4)}
    explanation = told(samples)
    assert explanation.position == 9
    assert explanation.text.count("dataset index") == 1


def test_of_two_that_differ_none_is_the_odd_one() -> None:
    explanation = told([{"x": torch.ones(3)}, {"x": torch.ones(4)}], [7, 9])
    assert explanation.position is None
    assert explanation.text == (
        "dataset index 7 (position 0) has shape [3], "
        "dataset index 9 (position 1) has shape [4] at ['x']"
    )
    keys = told([{"a": 1, "b": 2}, {"a": 1, "c": 2}], [7, 9])
    assert keys == FaultySample(
        None, "dataset index 7 (position 0) has key 'b', dataset index 9 (position 1) has key 'c'"
    )
    fewer = told([{"a": 1, "b": 2}, {"a": 1}], [7, 9])
    assert fewer.text.endswith("dataset index 9 (position 1) has no key 'b'")


def test_without_a_majority_the_groups_are_listed_within_bounds() -> None:
    samples = [torch.ones(length // 2 + 1) for length in range(40)]
    explanation = told(samples, list(range(40)))
    assert explanation.position is None
    assert explanation.text.startswith(
        "the samples differ in shape: dataset indices 0, 1 have shape [1], "
    )
    assert explanation.text.endswith(", 15 more differ again")
    halves = told([[0] * (1 + position % 2) for position in range(16)])
    assert halves.text == (
        "the samples differ in length: dataset indices 100, 102, 104, 106, 108 and 3 more have "
        "1 element, dataset indices 101, 103, 105, 107, 109 and 3 more have 2 elements"
    )


def test_among_lengths_that_vary_another_number_of_dimensions_is_odd() -> None:
    samples = [torch.ones(position + 1, 80) for position in range(16)]
    samples[9] = torch.ones(80)
    explanation = told(samples)
    assert explanation.position == 9
    assert "has shape [*], the other 15 have [*, *]" in explanation.text


def test_the_graver_difference_is_told() -> None:
    samples: list[Any] = [{"x": torch.ones(3), "y": 1.0} for _ in range(16)]
    samples[2]["y"] = 1
    assert told(samples).position == 2
    samples[4]["x"] = torch.ones(3, dtype=torch.float64)
    assert told(samples).position == 4
    samples[6]["x"] = torch.ones(4)
    assert told(samples).position == 6
    del samples[8]["y"]
    assert told(samples).position == 8
    samples[10] = [1]
    assert told(samples).position == 10
    samples[10], samples[12] = samples[0], None
    assert told(samples).position == 12


def test_a_harmless_difference_is_called_harmless() -> None:
    samples = batch(lambda: 1.0, 1)
    assert "which default_collate takes" in told(samples).text
    default_collate(samples)


def test_samples_that_are_alike_need_no_explanation() -> None:
    for sample in (torch.ones(2), {"a": [1, (2.0, "x")]}, np.float32(1), [], {}, np.ones(3), b"x"):
        assert explain([sample, sample], [0, 1]) is None
    assert explain([], []) is None


@pytest.mark.parametrize(
    ("leaf", "named"),
    [
        (Image(), f"a {__name__}.Image"),
        (None, "None"),
        ({1}, "a set"),
        (1j, "a complex"),
        (np.array(["a"]), "a numpy.ndarray of dtype <U1"),
        (np.array([None]), "a numpy.ndarray of dtype object"),
        (torch.eye(2).to_sparse(), "a torch.Tensor that is sparse, nested or wraps another"),
    ],
)
def test_what_default_collate_cannot_take_is_named(leaf: Any, named: str) -> None:
    with pytest.raises((TypeError, RuntimeError)):
        default_collate([{"image": leaf}] * 4)
    explanation = told([{"image": leaf} for _ in range(4)])
    assert explanation == FaultySample(
        None,
        f"every sample holds {named} at ['image']: "
        "default_collate takes tensors, numpy arrays, numbers, strings, dicts and lists",
    )
    assert told([leaf]).text.startswith(f"the sample is {named}: ")


def test_what_cannot_be_taken_is_told_along_with_a_dtype() -> None:
    samples = [{"x": torch.ones(1), "image": Image()} for _ in range(16)]
    samples[9]["x"] = torch.ones(1, dtype=torch.int64)
    explanation = told(samples)
    assert explanation.position == 9
    assert "every sample holds a" in explanation.text


def test_indices_may_be_of_any_sort() -> None:
    samples = batch(lambda: 1, None)
    assert told(samples, [None] * 16).text.startswith("dataset index None (position 9) is None")
    assert told(samples, [("a", n) for n in range(16)]).text.startswith("dataset index ('a', 9) (")
    assert told(samples, [Image()] * 16).text.startswith(f"dataset index <{__name__}.Image> (")
    assert len(told(samples, ["x" * 10**6] * 16).text) < 300


class HostileMeta(type):
    def __eq__(cls, other: object) -> bool:
        raise RuntimeError("not to be called")

    __hash__ = None  # type: ignore[assignment]

    def __instancecheck__(cls, instance: object) -> bool:
        raise RuntimeError("not to be called")


class Hostile(metaclass=HostileMeta):
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("not to be called")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not to be called")

    __hash__ = None  # type: ignore[assignment]


class HostileList(list[Any]):
    def __len__(self) -> int:
        raise RuntimeError("not to be called")

    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("not to be called")


class HostileDict(dict[Any, Any]):
    def __len__(self) -> int:
        raise RuntimeError("not to be called")

    __iter__ = keys = items = __getitem__ = __len__  # type: ignore[assignment]


class HostileKey:
    def __init__(self, armed: list[bool]) -> None:
        self.armed = armed

    def __hash__(self) -> int:
        assert not self.armed
        return 1

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not to be called")


class HostileTensor(torch.Tensor):
    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("not to be called")


def test_no_code_of_the_samples_is_run() -> None:
    assert "Hostile" in told(batch(lambda: 1, Hostile())).text
    assert "Hostile" in told([Hostile(), Hostile()]).text
    lists = [HostileList([1, 2]) for _ in range(3)]
    assert told([*lists, HostileList([1])]).position == 3
    dicts = [HostileDict(a=1, b=2) for _ in range(3)]
    assert told([*dicts, HostileDict(a=1)]).position == 3
    armed: list[bool] = []
    keyed = [{HostileKey(armed): 1, "a": 2} for _ in range(3)]
    armed.append(True)
    assert told([*keyed, {"b": 1}]).position == 3
    tensors = [torch.ones(3).as_subclass(HostileTensor) for _ in range(3)]
    assert told([*tensors, torch.ones(4).as_subclass(HostileTensor)]).position == 3


class Record(Mapping[str, Any]):
    def __init__(self, values: dict[str, Any]) -> None:
        self.values_by_name = values

    def __getitem__(self, key: str) -> Any:
        return self.values_by_name[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)


class BrokenRecord(Record):
    def __getitem__(self, key: str) -> Any:
        raise OSError("gone")


def test_mappings_that_are_no_dict_are_walked_too() -> None:
    samples = [Record({"a": 1, "b": 2}) for _ in range(4)]
    samples[2] = Record({"a": 1})
    assert told(samples).position == 2
    others = [collections.UserDict(a=torch.ones(2)) for _ in range(3)]
    assert told([*others, collections.UserDict(a=torch.ones(3))]).position == 3
    assert explain([BrokenRecord({"a": 1})] * 3, [0, 1, 2]) is None


@pytest.mark.slow
@pytest.mark.uncovered
def test_large_samples_are_looked_at_within_bounds() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    cycle: list[Any] = []
    cycle.append(cycle)
    wide = {f"key{number}": torch.ones(2) for number in range(3_000)}
    million = [0] * 10_000_000
    start = time.process_time()
    assert explain([deep] * 4, range(4)) is None
    assert explain([cycle] * 4, range(4)) is None
    assert told([million, million, [*million, 0]]).position == 2
    assert (
        told([wide] * 31 + [{k: v for k, v in wide.items() if k != "key2999"}]).position is not None
    )
    assert told([{"x": 1}] * 99_999 + [{"y": 1}], list(range(100_000))).position == 99_999
    assert explain([dict.fromkeys(range(100_000))] * 4, range(4)) is not None  # all values None
    crowded = dict.fromkeys(range(5_000), 1)
    assert told([crowded] * 63 + [{}]).position == 63
    assert time.process_time() - start < 8
    while deep:  # dismantled by hand: the interpreter would recurse
        deep = deep.pop()


leaves = st.one_of(
    st.none(), st.integers(-9, 9), st.floats(), st.text(), st.binary(), st.builds(Image),
    st.builds(lambda n: torch.ones(n), st.integers(0, 3)), st.builds(np.ones, st.integers(0, 3)),
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.lists(trees, max_size=6))
def test_any_samples_can_be_explained(samples: list[Any]) -> None:
    explanation = explain(samples, list(range(len(samples))))
    try:
        default_collate(samples)
    except Exception:
        assert explanation is not None or not samples


@settings(deadline=None)
@given(trees, trees, st.integers(3, 9), st.data())
def test_who_is_blamed_is_in_the_batch_and_named(
    usual: Any, odd: Any, count: int, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, count - 1))
    samples = [usual] * count
    samples[at] = odd
    explanation = explain(samples, list(range(count)))
    if explanation is not None and explanation.position is not None:
        assert explanation.position == at
        assert f"(position {at})" in explanation.text


def test_an_odd_sample_is_told_before_lengths_that_all_differ() -> None:
    """Sentences that a collate function pads: that they differ in length is no news."""
    samples: list[Any] = [{"ids": torch.ones(3 + k), "label": k % 2} for k in range(16)]
    samples[9]["label"] = "pos"
    explanation = told(samples)
    odd, length = explanation.text.split(". ")
    assert odd == "dataset index 109 (position 9) is str at ['label']; the other 15 are int"
    assert length.startswith("the samples differ in shape at ['ids']: ")
    assert explanation.odd == (9,)  # left out, where that was asked for, and collated again
    assert explanation.position is None  # default_collate falls over the lengths
