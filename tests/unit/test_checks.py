"""The checks of ``safeloader.checks``, each alone, on samples of every kind."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections import OrderedDict, deque, namedtuple
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safeloader import ValidationError, checks
from safeloader.checks.leaves import leaves_of, path_text
from safeloader.checks.schema import FirstSample, structure_of

NAN, INF = math.nan, math.inf
Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass
class Boxes:
    corners: Any
    names: list[str]


class Holder:
    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)


def refused(check: Any, sample: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        check(sample, 0)
    return str(caught.value)


# ── leaves ───────────────────────────────────────────────────────────────────────────────────────


def test_every_leaf_has_the_path_that_one_would_write() -> None:
    sample = {
        "image": torch.zeros(2),
        "target": Boxes([1.0, 2.0], ["a"]),
        3: Pair(Holder(depth=np.zeros(1)), None),
    }
    assert [path_text(path) for path, _ in leaves_of(sample)] == [
        "sample['image']",
        "sample['target'].corners[0]",
        "sample['target'].corners[1]",
        "sample['target'].names[0]",
        "sample[3].left.depth",
        "sample[3].right",
    ]


def test_a_circle_has_an_end() -> None:
    circle: list[Any] = [1.0]
    circle.append(circle)
    assert [leaf for _, leaf in leaves_of(circle)] == [1.0]
    checks.finite()(circle, 0)


# ── finite ───────────────────────────────────────────────────────────────────────────────────────

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_number_that_is_not_finite_is_found_in_a_tensor(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.ones(3, 4, dtype=dtype)
    checks.finite()(tensor, 0)
    tensor[1, 2] = bad
    said = refused(checks.finite(), {"x": [tensor]})
    assert said.startswith("sample['x'][0]: 1 of 12 values is not finite: ")
    assert said.endswith(" at [1, 2]")


@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_whose_sum_is_not_finite_are_finite(dtype: torch.dtype) -> None:
    checks.finite()(torch.full((64,), torch.finfo(dtype).max, dtype=dtype), 0)
    checks.finite()([torch.full((64,), torch.finfo(dtype).max, dtype=dtype)], 0)


@pytest.mark.parametrize(
    "sample",
    [
        1,
        "nan",
        None,
        b"x",
        [1.5, 2],
        torch.zeros(0),
        torch.arange(3),
        torch.tensor([True]),
        torch.ones(2, device="meta") * NAN,  # has no numbers
        np.array(["nan"]),
        np.array([object()]),
        np.array(["NaT"], dtype="datetime64[s]"),
        np.float32(1),
        Holder(x=torch.ones(1, requires_grad=True)),
        [float],
    ],
    ids=repr,
)
def test_what_is_finite_passes(sample: Any) -> None:
    checks.finite()(sample, 0)


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (NAN, "sample: nan is not finite"),
        ((1, -INF), "sample[1]: -inf is not finite"),
        (complex(1, NAN), "sample: (1+nanj) is not finite"),
        (np.float64(INF), "sample: inf is not finite"),
        (torch.tensor(NAN), "sample: nan is not finite"),
        (
            np.array([[1, NAN], [INF, INF], [-INF, 1]]),
            "sample: 4 of 6 values are not finite: nan at [0, 1], inf at [1, 0], inf at [1, 1], "
            "...",
        ),
        (
            np.array([(1, NAN)], dtype=[("a", "i4"), ("b", "f4")]),
            "sample['b']: 1 of 1 values is not finite: nan at [0]",
        ),
        (Holder(x=np.float32("nan")), "sample.x: nan is not finite"),
        (OrderedDict(a=Pair(1, NAN)), "sample['a'].right: nan is not finite"),
        (
            torch.tensor([[0, NAN]]).to_sparse(),
            "sample: 1 of 1 values is not finite: nan at [0]",
        ),
    ],
    ids=repr,
)
def test_what_is_not_finite_is_told_with_its_place(sample: Any, said: str) -> None:
    assert refused(checks.finite(), sample) == said


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_number_that_is_not_finite_is_found_in_a_nested_tensor() -> None:
    nested = torch.nested.nested_tensor([torch.ones(1), torch.tensor([1, NAN])])
    said = refused(checks.finite(), nested)
    assert said == "sample: 1 of 2 values is not finite: nan at [1]"


@given(st.lists(st.floats(width=32), max_size=20), st.sampled_from(["torch", "numpy", "list"]))
def test_finite_is_what_the_numbers_are(numbers: list[float], kind: str) -> None:
    made = {"torch": torch.tensor, "numpy": np.array, "list": list}[kind](numbers)
    if all(map(math.isfinite, numbers)):
        checks.finite()(made, 0)
    else:
        refused(checks.finite(), made)


# ── in_range ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "sample",
    [3, 0, 9.0, True, "x", None, [1, 2], torch.tensor([0, 9]), np.array([1.5]), torch.zeros(0)],
    ids=repr,
)
def test_what_is_in_range_passes(sample: Any) -> None:
    checks.in_range(0, 9)(sample, 0)
    checks.in_range(0, 9, at=1)(("anything", sample), 0)


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (-1, "sample: -1 is outside 0 to 9"),
        (NAN, "sample: nan is outside 0 to 9"),
        ([1, 9.5], "sample[1]: 9.5 is outside 0 to 9"),
        (torch.tensor([1, 12, 10]), "sample: 2 of 3 values are outside 0 to 9: 12 at [1], 10 at "),
        (torch.tensor([1.0, NAN]), "sample: 1 of 2 values is outside 0 to 9: nan at [1]"),
        (np.array([[-2]]), "sample: 1 of 1 values is outside 0 to 9: -2 at [0, 0]"),
        (torch.tensor(10, dtype=torch.bfloat16), "sample: 10.0 is outside 0 to 9"),
    ],
    ids=repr,
)
def test_what_is_outside_is_told_with_its_place(sample: Any, said: str) -> None:
    assert refused(checks.in_range(0, 9), sample).startswith(said)


def test_a_part_is_looked_at_by_keys_numbers_and_attributes() -> None:
    sample = {"target": Boxes([[5, 11]], ["a"]), "id": 10**6}
    check = checks.in_range(0, 9, at=("target", "corners", 0))
    assert refused(check, sample) == "sample['target'].corners[0][1]: 11 is outside 0 to 9"
    assert "sample has no part 'image'" in refused(checks.in_range(0, 9, at="image"), sample)
    assert "sample has no part 4" in refused(checks.in_range(0, 9, at=4), (1, 2))


def test_bounds_that_are_none_are_refused() -> None:
    with pytest.raises(TypeError, match=r"bounds of in_range must be numbers; got '0'"):
        checks.in_range("0", 1)  # type: ignore[arg-type]
    for low, high in ((2, 1), (NAN, 1)):
        with pytest.raises(ValueError, match="the lower bound first"):
            checks.in_range(low, high)


# ── every kind of number ─────────────────────────────────────────────────────────────────────────

DTYPES = [
    *(torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32),
    *(torch.uint64, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float32),
    *(torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.complex32, torch.complex64, torch.complex128),
]


def numbers(dtype: torch.dtype, *values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sound_numbers_of_every_dtype_pass_and_others_do_not(dtype: torch.dtype) -> None:
    sound = numbers(dtype, 0, 1, 1)
    checks.finite()(sound, 0)
    checks.in_range(0, 1)({"x": sound}, 0)
    checks.in_range(-(2**2000), 2**70)([sound, np.array([True])], 0)
    assert "1 of 3 values is outside 0 to 0" in refused(
        checks.in_range(0, 0), numbers(dtype, 0, 1, 0)
    )
    if dtype.is_floating_point or dtype.is_complex:
        assert "1 of 3 values is not finite" in refused(checks.finite(), numbers(dtype, 0, NAN, 0))
        refused(checks.in_range(-9, 9), numbers(dtype, 0, NAN, 0))


def test_bounds_are_exact_for_large_integers() -> None:
    checks.in_range(0, 2**64 - 1)(torch.tensor([2**64 - 1], dtype=torch.uint64), 0)
    refused(checks.in_range(0, 2**53), torch.tensor([2**53 + 1]))
    refused(checks.in_range(0, 2**64 - 2), torch.tensor([2**64 - 1], dtype=torch.uint64))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda x: np.array([1.0, x], dtype=object), "[1]"),
        (lambda x: np.array([[0, [x]]], dtype=object), "[(0, 1)][0]"),
        (lambda x: {x}, " (an element)"),
        (lambda x: deque([0.0, x]), "[1]"),
        (lambda x: np.array([(1, x)], dtype=[("a", "i4"), ("b", "f8")]), "['b']"),
        (lambda x: np.array([(1, x)], dtype=[("a", "i4"), ("b", "f8")])[0], "['b']"),
        (lambda x: np.array([(x,)], dtype=[("a", object)]), "['a'][0]"),
        (lambda x: torch.tensor([[0, x]]).to_sparse(), ""),
        (lambda x: torch.tensor([[0, x]]).to_sparse_csr(), ""),
        (lambda x: torch.nested.nested_tensor([torch.zeros(1), torch.tensor([x])]), ""),
        (lambda x: torch.tensor([complex(0, x)]), ""),
        (lambda x: np.array([complex(x, 0)]), ""),
        (lambda x: complex(x, x), ""),
        (lambda x: Decimal(x), ""),
        (lambda x: np.ma.masked_invalid([x, 1e9 if x == 300 else 0.0]), ""),
        (lambda x: torch.ones(1, requires_grad=True) * x, ""),
    ],
)
def test_numbers_are_looked_at_wherever_they_are(make: Any, place: str) -> None:
    within = checks.in_range(0, 255)
    checks.finite()(make(3.0), 0)
    within(make(3.0), 0)
    assert refused(within, make(300.0)).startswith(f"sample{place}")
    if not isinstance(make(3.0), np.ma.MaskedArray):
        assert refused(checks.finite(), make(NAN)).startswith(f"sample{place}")


def test_what_a_masked_array_hides_is_not_looked_at() -> None:
    checks.finite()(np.ma.masked_invalid([NAN, 1.0]), 0)
    checks.finite()(np.ma.masked_invalid([NAN]), 0)
    checks.in_range(0, 9)(np.ma.masked_greater([1, 12], 9), 0)


# ── schema ───────────────────────────────────────────────────────────────────────────────────────


def test_the_structure_of_a_sample_in_words() -> None:
    sample = {"x": torch.zeros(2, 3), "y": [np.zeros(4, dtype="i2"), 1, "a"], "z": Pair(None, 1.0)}
    assert structure_of(sample) == {
        "sample": "dict of 3",
        "sample['x']": "tensor float32 (2, 3)",
        "sample['y']": "list of 3",
        "sample['y'][0]": "array int16 (4,)",
        "sample['y'][1]": "int",
        "sample['y'][2]": "str",
        "sample['z']": "Pair of 2",
        "sample['z'].left": "NoneType",
        "sample['z'].right": "float",
    }


LIKE = {
    "image": (torch.float32, (3, None, None)),
    "label": int,
    "mask": np.uint8,
    "more": ...,
    "box": [torch.zeros(4), (np.dtype("f4"), (None,))],
}


def fitting(**other: Any) -> dict[str, Any]:
    sample: dict[str, Any] = {
        "image": torch.zeros(3, 5, 7),
        "label": 1,
        "mask": np.zeros((2, 2), dtype=np.uint8),
        "more": {"deep": [1]},
        "box": [torch.ones(4), np.zeros(9, dtype="f4")],
    }
    return sample | other


def test_a_sample_that_is_as_asked_for_passes() -> None:
    check = checks.schema(like=LIKE)
    check(fitting(), 0)
    check(fitting(more=None, image=torch.zeros(3, 1, 1)), 0)
    checks.schema(like=fitting())(fitting(), 0)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"image": torch.zeros(1, 5, 7)},
            "sample['image'] is tensor float32 (1, 5, 7), not tensor float32 (3, any, any) as",
        ),
        ({"image": torch.zeros(3, 5)}, "sample['image'] is tensor float32 (3, 5), not tensor fl"),
        ({"image": torch.zeros(3, 5, 7).half()}, "sample['image'] is tensor float16 (3, 5, 7), n"),
        ({"label": 1.0}, "sample['label'] is float, not int as asked for"),
        ({"mask": np.zeros(1)}, "sample['mask'] is array float64 (1,), not array uint8 anything"),
        (
            {"box": [torch.ones(4)]},
            "sample['box'] is list of 1, not list of 2 as asked for; sample['box'][1] is not there",
        ),
        ({"odd": 1}, "sample is dict of 6, not dict of 5 as asked for; sample['odd'], int, is too"),
    ],
)
def test_a_sample_that_is_not_as_asked_for_is_told_with_its_place(other: Any, said: str) -> None:
    assert refused(checks.schema(like=LIKE), fitting(**other)).startswith(said)


@pytest.mark.parametrize(
    ("pattern", "fit", "other", "said"),
    [
        (torch.Tensor, torch.zeros(2), np.zeros(2), "array float64 (2,), not Tensor"),
        (np.ndarray, np.zeros(2), torch.zeros(2), "tensor float32 (2,), not ndarray"),
        (dict, {"k": 1}, [1], "list of 1, not dict"),
        (dict, {}, None, "NoneType, not dict"),
        (list, [1, [2]], (1,), "tuple of 1, not list"),
        (tuple, Pair(1, 2), [1], "list of 1, not tuple"),
        (Mapping, OrderedDict(a=1), 1, "int, not Mapping"),
        (Boxes, Boxes([1.0], []), 1, "int, not Boxes"),
        (float, np.float64(1), 1, "int, not float"),
        (float, 1.0, np.float32(1), "float32, not float"),
        (int, True, 1.0, "float, not int"),
        (str, "x", b"x", "bytes, not str"),
        (int | None, None, "x", "str, not int | None"),
        (type(None), None, 0, "int, not NoneType"),
        (np.float32, np.float32(1), np.float64(1), "float64, not array float32 anything"),
        (np.float32, np.zeros((2, 3), "f4"), np.zeros(2), "array float64 (2,), not array float32"),
        (np.floating, np.zeros(3), np.zeros(3, "i4"), "array int32 (3,), not array floating any"),
        ((np.float32, (2,)), np.zeros(2, "f4"), np.zeros(3, "f4"), "array float32 (3,), not array"),
        ((torch.float32, ()), torch.tensor(1.0), torch.zeros(1), "tensor float32 (1,), not tensor"),
    ],
)
def test_a_leaf_is_compared_as_isinstance_does(
    pattern: Any, fit: Any, other: Any, said: str
) -> None:
    check = pickle.loads(pickle.dumps(checks.schema(like={"a": pattern, "ab": 1})))
    check({"a": fit, "ab": 2}, 0)
    assert refused(check, {"a": other, "ab": 2}).startswith(f"sample['a'] is {said}")
    assert "sample['ab'] is not there" in refused(check, {"a": fit})
    checks.schema(like=pattern)(fit, 0)


def test_what_stands_beside_a_type_is_still_compared() -> None:
    check = checks.schema(like=Holder(a=dict, ab=1))
    check(Holder(a={"x": 1}, ab=2), 0)
    said = refused(check, Holder(a={"x": 1}, ab=2, abc=3))
    assert "sample.abc, int, is too many" in said


def test_what_nothing_is_an_instance_of_is_refused() -> None:
    with pytest.raises(TypeError, match=r"cannot tell whether sample\['a'\] is list\[int\]"):
        checks.schema(like={"a": list[int]})


def test_without_a_structure_the_first_sample_is_the_measure() -> None:
    check = checks.schema().for_one_worker()
    assert isinstance(check, FirstSample)
    check(torch.zeros(2), 7)
    assert check.untold is not None
    assert check.untold[0] == 7
    check(torch.ones(2), 8)
    assert refused(check, torch.zeros(3)) == (
        "sample is tensor float32 (3,), not tensor float32 (2,) as in index 7"
    )
    another = checks.schema().for_one_worker()
    another(torch.zeros(3), 1)  # each worker, and each loader, has one of its own


# ── all ──────────────────────────────────────────────────────────────────────────────────────────

ALL = [
    checks.finite(),
    checks.in_range(0, 9, at="x"),
    checks.schema(),
    checks.schema(like=LIKE),
    checks.unique(repr),
]


@pytest.mark.parametrize("check", ALL, ids=repr)
def test_each_check_crosses_to_a_worker_and_names_itself(check: Any) -> None:
    again = pickle.loads(pickle.dumps(check))
    assert repr(again) == repr(check)


def test_their_names() -> None:
    assert [repr(each) for each in ALL] == [
        "finite()",
        "in_range(0, 9, at='x')",
        "schema()",
        "schema(like=...)",
        "unique(repr)",
    ]


def test_what_cannot_be_called_gives_no_key() -> None:
    with pytest.raises(TypeError, match="unique takes a callable"):
        checks.unique("id")  # type: ignore[arg-type]
