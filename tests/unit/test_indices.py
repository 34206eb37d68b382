"""The identity of an index: hashable, the same however it is spelled, equal after pickling."""

from __future__ import annotations

import dataclasses
import enum
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safeloader.delivery.indices import (
    as_array,
    count,
    identity,
    pack,
    pack_unbatched,
    restored,
    same,
    snapshots,
    unpack,
)

INT64 = st.integers(-(2**63), 2**63 - 1)
INDICES = st.recursive(
    st.one_of(
        st.integers(),
        st.text(),
        st.binary(),
        st.booleans(),
        st.none(),
        st.floats(allow_nan=False),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


class Colour(enum.IntEnum):
    RED = 3


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    y: Any


@dataclasses.dataclass
class Mutable:
    x: int


class Split(enum.Enum):
    TRAIN = "train"
    TEST = "test"


class Plain:
    """No equality of its own."""


class Derived(Point):
    """Equal as its base is."""


class RefusesToHash:
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        raise RuntimeError("not today")


@given(st.lists(INT64))
def test_a_batch_of_ints_is_eight_bytes_a_sample(indices: list[int]) -> None:
    packed = pack(indices)
    assert type(packed) is bytes
    assert len(packed) == 8 * len(indices)
    assert unpack(packed) == tuple(indices)
    assert all(type(index) is int for index in unpack(packed))
    assert count(packed) == len(indices)


@given(st.lists(INDICES))
def test_any_batch_keeps_its_size_and_order_and_survives_pickling(indices: list[Any]) -> None:
    packed = pack(indices)
    assert count(packed) == len(indices) == len(unpack(packed))
    assert pickle.loads(pickle.dumps(packed)) == packed
    assert pack(pickle.loads(pickle.dumps(indices))) == packed
    hash(packed)
    assert pack(unpack(packed)) == packed


@given(st.lists(INT64.filter(lambda n: abs(n) < 2**31), max_size=20))
def test_one_batch_however_spelled(indices: list[int]) -> None:
    packed = pack(indices)
    for spelled in (
        tuple(indices),
        iter(indices),
        np.array(indices, dtype=np.int64),
        np.array(indices, dtype=np.int32),
        torch.tensor(indices, dtype=torch.int64),
        [np.int64(index) for index in indices],
        [torch.tensor(index) for index in indices],
    ):
        kept = list(spelled) if not isinstance(spelled, np.ndarray | torch.Tensor) else spelled
        assert pack(kept) == packed


def test_ranges_bools_and_enums_are_ints() -> None:
    assert pack(range(2, 5)) == pack([2, 3, 4])
    assert pack([True, False]) == pack([1, 0])
    assert pack([Colour.RED]) == pack([3])
    assert identity(Colour.RED) == 3
    assert type(identity(Colour.RED)) is int
    assert type(identity(True)) is int


@pytest.mark.parametrize("too_large", [2**63, -(2**63) - 1, 10**30])
def test_ints_beyond_64_bits_are_kept_exactly(too_large: int) -> None:
    assert unpack(pack([1, too_large])) == (1, too_large)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ("name", "name"),
        (b"raw", b"raw"),
        (None, None),
        (1.5, 1.5),
        (2j, 2j),
        ([1, [2, 3]], (1, (2, 3))),
        (("a", np.int16(4)), ("a", 4)),
        (np.str_("name"), "name"),
        (np.float64(0.5), 0.5),
        (torch.tensor(7), 7),
        (torch.tensor([[1, 2], [3, 4]]), ((1, 2), (3, 4))),
        (np.array(["a", "b"]), ("a", "b")),
        ({"a": [1]}, ("dict", ("a", (1,)))),
        (slice(0, 10, 2), ("slice", 0, 10, 2)),
    ],
)
def test_identity_of_each_kind(index: Any, expected: Any) -> None:
    assert identity(index) == expected
    assert identity(pickle.loads(pickle.dumps(index))) == expected
    hash(identity(index))


def test_floats_are_not_mistaken_for_ints() -> None:
    assert unpack(pack([1.0, 2.5])) == (1.0, 2.5)


def test_objects_with_an_equality_of_their_own_stand_for_themselves() -> None:
    for point in (Point(1, "a"), Derived(1, "a")):
        assert identity(point) is point
        assert identity(pickle.loads(pickle.dumps(point))) == identity(point)


@pytest.mark.parametrize("index", [Plain(), Mutable(3), Point(1, [2]), RefusesToHash()])
def test_objects_that_cannot_be_compared_are_known_by_their_type(index: Any) -> None:
    assert identity(index) == f"<{type(index).__name__}>"
    assert identity(pickle.loads(pickle.dumps(index))) == identity(index)


def test_objects_in_containers_are_reduced_too() -> None:
    assert identity([Plain(), 1]) == ("<Plain>", 1)
    hash(identity({"key": Mutable(1)}))


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (5, (5,)),
        ("abc", ("abc",)),
        ([5, 6], (5, 6)),
        ([], ()),
        ((5, 6), ((5, 6),)),
        (torch.tensor(5), (5,)),
        (torch.tensor([5, 6]), (5, 6)),
        (np.array([5, 6]), (5, 6)),
        (np.int64(5), (5,)),
        (np.array(5), (5,)),
        (None, (None,)),
    ],
)
def test_without_batching_a_list_or_array_asks_for_many_and_all_else_for_one(
    index: Any, expected: tuple[Any, ...]
) -> None:
    packed = pack_unbatched(index)
    assert unpack(packed) == expected
    assert count(packed) == len(expected)


@given(st.lists(INT64, min_size=1))
def test_ints_become_an_int64_array(identities: list[int]) -> None:
    array = as_array(identities)
    assert array.dtype == np.int64
    assert array.tolist() == identities


@given(st.lists(st.tuples(INT64, INT64), min_size=1))
def test_pairs_of_a_stream_become_two_columns(identities: list[tuple[int, int]]) -> None:
    array = as_array(identities)
    assert (array.dtype, array.shape) == (np.int64, (len(identities), 2))
    assert [tuple(row) for row in array.tolist()] == identities


@pytest.mark.parametrize(
    "identities",
    [
        ["a", "b"],
        [1, "b"],
        [2**70, 1],
        [(1, 2), (3,)],
        [(1, 2), (3, "x")],
        [(1, 2), 3],
        [(1, 2, 3), (4, 5, 6)],
        [("a", "b"), ("c", "d")],
        [None],
    ],
)
def test_everything_else_is_an_object_array_of_one_dimension(identities: list[Any]) -> None:
    array = as_array(identities)
    assert (array.dtype, array.shape) == (object, (len(identities),))
    assert list(array) == identities


def test_no_identities_are_an_empty_int64_array() -> None:
    assert (as_array([]).dtype, as_array(()).shape) == (np.int64, (0,))


def test_pairs_beyond_64_bits_are_objects() -> None:
    assert list(as_array([(1, 2**70)])) == [(1, 2**70)]


def test_bytes_drawn_as_a_batch_are_small_ints() -> None:
    for size in (3, 8, 16):
        assert unpack(pack(bytes(range(size)))) == tuple(range(size))
        assert unpack(pack(bytearray(range(size)))) == tuple(range(size))


def test_nan_is_equal_before_and_after_pickling() -> None:
    index = ("crop", float("nan"))
    assert identity(pickle.loads(pickle.dumps(index))) == identity(index)


def test_members_of_an_enum_are_told_apart() -> None:
    assert identity(Split.TRAIN) != identity(Split.TEST)
    assert identity(pickle.loads(pickle.dumps(Split.TRAIN))) == identity(Split.TRAIN)


def test_numbers_that_numpy_cannot_turn_into_pythons_have_an_identity() -> None:
    index = np.longdouble(1.5)
    assert identity(index) == identity(pickle.loads(pickle.dumps(index)))
    assert identity(index) != identity(np.longdouble(2.5))


class RefusesLength(list[Any]):
    def __len__(self) -> int:
        raise OSError("not today")


def test_a_batch_that_does_not_tell_its_length_is_read_through() -> None:
    assert unpack(pack(RefusesLength(["a", 2]))) == ("a", 2)


class RefusesIteration:
    def __iter__(self) -> Any:
        raise OSError("not today")


def test_what_cannot_be_iterated_is_one_index_with_its_own_identity() -> None:
    assert [unpack(pack(index)) for index in (5, 2.5)] == [(5,), (2.5,)]  # type: ignore[arg-type]
    assert unpack(pack(RefusesIteration())) == ("<RefusesIteration>",)


def test_identities_that_refuse_to_be_compared_are_not_the_same() -> None:
    class RefusesToCompare:
        def __eq__(self, other: object) -> bool:
            raise OSError("not today")

        __hash__ = None  # type: ignore[assignment]

    assert same(RefusesToCompare(), RefusesToCompare()) is False
    assert same(("a", 1), ("a", 1)) is True


# ── snapshots ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("index", [5, "a", ("b", 2), None, 2.5, True, [1, 2]])
def test_a_snapshot_gives_the_index_again(index: Any) -> None:
    (snapshot,) = snapshots([index])
    assert type(snapshot) in (int, bytes)
    assert restored(snapshot) == index
    assert type(restored(snapshot)) is type(index)


def test_a_snapshot_holds_the_index_as_it_was() -> None:
    index = [1, 2]
    (snapshot,) = snapshots([index])
    index[:] = [3, 4]
    assert restored(snapshot) == [1, 2]


def test_the_last_twenty_are_kept() -> None:
    assert list(snapshots(range(30))) == list(range(10, 30))


def test_what_cannot_be_pickled_and_what_is_no_batch_have_no_snapshot() -> None:
    assert [restored(each) for each in snapshots([1, lambda: 2, "c"])] == [1, "c"]
    assert list(snapshots(5)) == []


def test_a_snapshot_of_a_small_view_is_small() -> None:
    view = torch.arange(100_000)[7]
    (snapshot,) = snapshots([view])
    assert isinstance(snapshot, bytes)
    assert len(snapshot) < 10_000
    assert torch.equal(restored(snapshot), view)


def test_a_snapshot_that_cannot_be_read_gives_none() -> None:
    assert restored(b"no pickle") is None
