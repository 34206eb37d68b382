"""Every kind of leaf that a batch may hold, for the transport to carry.

A kind makes its batch for a size ``n``: small, it crosses within the message; large, in a slot.
"""

from __future__ import annotations

import collections
import dataclasses
import decimal
import enum
import fractions
import pathlib
import types
import uuid
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence


class Pair(NamedTuple):
    image: Any
    label: Any


@dataclasses.dataclass
class Record:
    x: Any
    y: Any = None


@dataclasses.dataclass(slots=True, frozen=True)
class Slotted:
    x: Any


class Fancy(torch.Tensor):
    """A subclass with an attribute of its own."""


class Box:
    """Pickles in a way of its own: what arrives is not what is in its dictionary."""

    def __init__(self, x: Any) -> None:
        self.x = x
        self.made_here = True

    def __reduce__(self) -> Any:
        return _box, (self.x,)


def _box(x: Any) -> Box:
    made = Box(x)
    made.made_here = False
    return made


class Cached:
    """Leaves a cache behind."""

    def __init__(self, x: Any) -> None:
        self.x = x
        self.cache = {"sum": 1}

    def __getstate__(self) -> dict[str, Any]:
        return {"x": self.x}


class Colour(enum.IntEnum):
    RED = 1


class Sub(np.ndarray[Any, Any]):
    pass


def fancy(tensor: torch.Tensor) -> Any:
    made: Any = tensor.as_subclass(Fancy)
    made.note = "kept"
    return made


def f32(n: int) -> torch.Tensor:
    return torch.arange(4 * n, dtype=torch.float32).view(4, n) / 7


def whole_and(*cuts: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[int], Any]:
    def made(n: int) -> Any:
        base = f32(n)
        return [cut(base) for cut in cuts]

    return made


def quietly(make: Callable[[int], Any]) -> Callable[[int], Any]:
    """For kinds that torch calls experimental or deprecated."""

    def made(n: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(n)

    return made


def of_dtype(dtype: torch.dtype) -> Callable[[int], Any]:
    def made(n: int) -> Any:
        data = torch.arange(16 * n, dtype=torch.int64).to(torch.uint8)
        if dtype is torch.bool:
            return data % 2 == 0
        return data.view(dtype)

    return made


def conjugate(n: int) -> torch.Tensor:
    return torch.complex(f32(n), f32(n)).conj()


def shares_array(n: int) -> Any:
    array = np.arange(4.0 * n)
    return [torch.from_numpy(array), torch.from_numpy(array)]


def inference(n: int) -> torch.Tensor:
    with torch.inference_mode():
        return f32(n) + 1


def cycle(n: int) -> Any:
    made: list[Any] = [f32(n)]
    made.append({"self": made, "again": made[0]})
    return made


def graph(n: int) -> Any:
    nodes = [types.SimpleNamespace(x=torch.tensor(k)) for k in range(20)]
    for node in nodes:
        node.others = nodes
    return nodes


def structured(n: int) -> np.ndarray[Any, Any]:
    made = np.zeros(2 * n, np.dtype([("a", "i1"), ("b", "f8"), ("c", "f4", (2,))], align=True))
    made.view(np.uint8)[:] = np.arange(made.nbytes, dtype=np.int64).astype(np.uint8)  # padding too
    return made


def numbers(n: int) -> np.ndarray[Any, Any]:
    return np.arange(6.0 * n).reshape(6, n)


def read_only(n: int) -> np.ndarray[Any, Any]:
    made = numbers(n)
    made.flags.writeable = False
    return made


def objects(n: int) -> np.ndarray[Any, Any]:
    made = np.empty(3, object)
    made[:] = ["text", numbers(n), None]
    return made


_DTYPES = sorted({str(x) for x in vars(torch).values() if isinstance(x, torch.dtype)})
_TRICKY = ("quint4x2", "quint2x4", "bits", "qint", "quint", "float4", "int1", "int2", "int3")

KINDS: dict[str, Callable[[int], Any]] = {
    # tensors
    "plain": f32,
    "scalar": lambda n: torch.tensor(3.5),
    "one": lambda n: torch.ones(1, 1, 1),
    "empty": lambda n: torch.empty(0),
    "no rows": lambda n: torch.empty(0, n, 3),
    "no columns": lambda n: torch.empty(n, 0),
    "no columns, odd strides": lambda n: torch.empty(5, 0, 3).permute(2, 0, 1),
    "transposed": lambda n: f32(n).t(),
    "every second": lambda n: f32(n)[:, ::2],
    "channels last": lambda n: f32(n).view(1, 4, -1, 1).to(memory_format=torch.channels_last),
    "grey channels last": lambda n: f32(n).view(4, 1, n, 1).to(memory_format=torch.channels_last),
    "odd stride of one row": lambda n: f32(n).as_strided((1, n), (7, 1)),
    "expanded": lambda n: torch.arange(float(n)).expand(3, n),
    "expanded scalar": lambda n: torch.tensor(2.0).expand(n, 3),
    "strides that overlap": lambda n: torch.arange(3.0 * n).as_strided((n, 3), (1, 1)),
    "offset": lambda n: f32(n)[1:],
    "few of many": lambda n: f32(8 * n)[2, :n],
    "a column of many": lambda n: f32(8 * n).view(n, 32)[:, 3],
    "bit view": lambda n: f32(n).view(torch.int32),
    "bytes of it, odd offset": lambda n: f32(n).view(torch.uint8).view(-1)[3:],
    "complex": lambda n: torch.complex(f32(n), f32(n)),
    "conjugate": conjugate,
    "negative": lambda n: conjugate(n).imag,
    "real part": lambda n: torch.complex(f32(n), f32(n)).real,
    "requires grad": lambda n: f32(n).requires_grad_(),
    "parameter": lambda n: torch.nn.Parameter(f32(n)),
    "frozen parameter": lambda n: torch.nn.Parameter(f32(n), requires_grad=False),
    "whole parameter": lambda n: torch.nn.Parameter(torch.arange(n), requires_grad=False),
    "buffer": lambda n: torch.nn.Buffer(f32(n)),
    "subclass": lambda n: fancy(f32(n)),
    "view of a subclass": lambda n: fancy(f32(n))[1:3],
    "with an attribute": lambda n: setattr(x := f32(n), "note", 1) or x,
    "inference": inference,
    "detached": lambda n: f32(n).requires_grad_().detach(),
    "sparse coo": lambda n: torch.eye(n).to_sparse(),
    "sparse coo uncoalesced": quietly(
        lambda n: torch.sparse_coo_tensor([[0, 0]], torch.ones(2, n), (3, n))
    ),
    "sparse csr": quietly(lambda n: f32(n).to_sparse_csr()),
    "sparse csc": quietly(lambda n: f32(n).to_sparse_csc()),
    "sparse bsr": quietly(lambda n: f32(2 * n).to_sparse_bsr((2, 2))),
    "nested": quietly(lambda n: torch.nested.nested_tensor([torch.ones(n), torch.ones(2)])),
    "jagged": quietly(
        lambda n: torch.nested.nested_tensor(
            [torch.ones(n, 2), torch.ones(2, 2)], layout=torch.jagged
        )
    ),
    "quantized": quietly(lambda n: torch.quantize_per_tensor(f32(n), 0.1, 10, torch.qint8)),
    "meta": lambda n: torch.empty(n, device="meta"),
    "shared": lambda n: f32(n).share_memory_(),
    "storage": lambda n: f32(n).untyped_storage(),
    "from bytes": lambda n: torch.frombuffer(bytearray(8 * n), dtype=torch.float64),
    "packed sequence": lambda n: pack_sequence([torch.ones(n), torch.ones(2)]),
    "packed sequence, padded": lambda n: pack_padded_sequence(
        f32(n), torch.tensor([n] * 4), batch_first=True
    ),
    # several that share memory
    "twice": whole_and(lambda x: x, lambda x: x),
    "two of one memory": whole_and(lambda x: x, lambda x: x.view(-1)),
    "from one array twice": shares_array,
    "halves": whole_and(lambda x: x[:2], lambda x: x[2:]),
    "whole, then part": whole_and(lambda x: x, lambda x: x[1]),
    "part, then whole": whole_and(lambda x: x[1], lambda x: x),
    "part, then whole with grad": whole_and(lambda x: x[1], lambda x: x.requires_grad_()),
    "part, then subclass": whole_and(lambda x: x[1], fancy, lambda x: x[2]),
    "parameter, then part": whole_and(torch.nn.Parameter, lambda x: x[3].detach()),
    "part, then storage": whole_and(lambda x: x[1], lambda x: x.untyped_storage(), lambda x: x),
    "storage, then part": whole_and(lambda x: x.untyped_storage(), lambda x: x[1]),
    "disjoint": whole_and(lambda x: x[0], lambda x: x[3]),
    "neighbours": whole_and(lambda x: x[0], lambda x: x[1]),
    "overlapping": whole_and(lambda x: x[0, 1:], lambda x: x[0, :-1]),
    "overlapping, others between": whole_and(
        lambda x: x[2], lambda x: x[0, 1:], lambda x: x[3], lambda x: x[0, :-1]
    ),
    "two pairs that overlap": whole_and(
        lambda x: x.view(-1)[0:2],
        lambda x: x.view(-1)[1:3],
        lambda x: x.view(-1)[-2:],
        lambda x: x.view(-1)[-3:-1],
    ),
    "nested parts": whole_and(lambda x: x[0, 1:2], lambda x: x[0]),
    "nested parts, outer first": whole_and(lambda x: x[0], lambda x: x[0, 1:2]),
    "sliding windows": lambda n: list(torch.arange(16.0 * n).unfold(0, n, n // 2)),
    "of two types": whole_and(lambda x: x[1], lambda x: x.view(torch.float64)[1]),
    "of two types, overlapping": whole_and(
        lambda x: x.view(-1)[1:3], lambda x: x.view(-1).view(torch.float64)[1:2]
    ),
    "expanded and part": whole_and(lambda x: x[0, :1].expand(5), lambda x: x[0, :2]),
    "real and imaginary": lambda n: [(z := torch.complex(f32(n), f32(n))).real, z.imag],
    "list and dict of one": lambda n: [x := f32(n), {"x": x, "part": x[1:]}],
    # arrays
    "array": numbers,
    "array 0-d": lambda n: np.array(2.5),
    "array empty": lambda n: np.zeros((0, n)),
    "array reversed": lambda n: numbers(n)[::-1, ::-1],
    "array Fortran": lambda n: np.asfortranarray(numbers(n)),
    "array transposed": lambda n: numbers(n).reshape(2, 3, n).transpose(1, 2, 0),
    "array broadcast": lambda n: np.broadcast_to(np.arange(3.0), (n, 3)),
    "array read-only": read_only,
    "array twice": lambda n: [x := numbers(n), x, x[1:]],
    "array structured": structured,
    "array of a record": lambda n: structured(n)[1],
    "array structured, every second": lambda n: structured(n)[::2],
    "array field": lambda n: structured(n)["b"],
    "array objects": objects,
    "array objects 0-d": lambda n: np.array(None),
    "array dates": lambda n: np.arange(n).astype("datetime64[s]"),
    "array durations": lambda n: np.arange(n).astype("timedelta64[ms]"),
    "array text": lambda n: np.array([f"é{k}" for k in range(n)]),
    "array bytes": lambda n: np.array([b"abc"] * n),
    "array strings": lambda n: np.array(
        ["s" * (k % 40) for k in range(n)], np.dtypes.StringDType()
    ),
    "array void": lambda n: np.zeros(n, "V7"),
    "array bool": lambda n: numbers(n) > 3,
    "array half": lambda n: numbers(n).astype(np.float16),
    "array long double": lambda n: numbers(n).astype(np.longdouble)[:, ::2],
    "array big-endian": lambda n: numbers(n).astype(">f8"),
    "array complex": lambda n: numbers(n) * 1j,
    "array subclass": lambda n: numbers(n).view(Sub),
    "masked": lambda n: np.ma.masked_less(numbers(n), 3),
    "recarray": lambda n: structured(n).view(np.recarray),
    "numpy scalars": lambda n: [np.float32(1), np.int8(2), np.bool_(True), np.datetime64(5, "s")],
    # everything else
    "none": lambda n: None,
    "numbers": lambda n: [1, 2.5, True, 3j, 10**30, float("nan"), -0.0],
    "text": lambda n: "é" * n,
    "lone surrogate": lambda n: "\ud800",
    "bytes": lambda n: bytes(range(256)) * n,
    "bytearray": lambda n: bytearray(16 * n),
    "named tuple": lambda n: Pair(f32(n), "cat"),
    "dataclass": lambda n: Record(f32(n), numbers(n)),
    "dataclass with slots": lambda n: Slotted(f32(n)),
    "namespace": lambda n: types.SimpleNamespace(x=f32(n)),
    "reduces its own way": lambda n: Box(f32(n)),
    "leaves its cache behind": lambda n: Cached(f32(n)),
    "ordered dict": lambda n: collections.OrderedDict(b=f32(n), a=1),
    "default dict": lambda n: collections.defaultdict(list, a=[f32(n)]),
    "counter, deque": lambda n: [collections.Counter("abca"), collections.deque([f32(n), 1])],
    "user dict and list": lambda n: [collections.UserDict(x=f32(n)), collections.UserList([1])],
    "tuples and sets": lambda n: ((), (1, (2,)), {3}, frozenset({4})),
    "odd objects": lambda n: [range(5), slice(1, 2), Colour.RED, decimal.Decimal("1.5"), ...],
    "more objects": lambda n: [fractions.Fraction(1, 3), pathlib.PurePath("a"), uuid.UUID(int=1)],
    "an exception": lambda n: ValueError("in a batch", 3),
    "a module": lambda n: torch.nn.Linear(n, 2),
    "a generator": lambda n: torch.Generator().manual_seed(5).get_state(),
    "a dtype, device, size": lambda n: [torch.float16, torch.device("cpu"), torch.Size([1, 2])],
    "cycle": cycle,
    "graph": graph,
    "deep": lambda n: Record([{"a": (Pair(f32(n), [numbers(n)]), None)}]),
    **{
        name: of_dtype(getattr(torch, name))
        for name in (each.removeprefix("torch.") for each in _DTYPES)
        if not name.startswith(_TRICKY)
    },
}
