"""The identity of an index, compact enough to cross with every batch. Runs in: both.

What a sampler draws may be anything: ints, strings, tuples, tensors. Drawn and delivered indices
are compared after a trip through pickle, so an identity must survive one. A batch of ints, by far
the most common, becomes the bytes of an int64 array: one comparison checks the whole batch.
"""

from __future__ import annotations

import copy
import enum
import functools
import pickle
import struct
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.values import Opaque

# int64 bytes, or one identity per sample.
Packed: TypeAlias = bytes | tuple[Hashable, ...]

_ITEM_BYTES = 8
_PLAIN = frozenset({int, str, bytes, float, complex, type(None)})


@functools.lru_cache(maxsize=64)
def _packer(number: int) -> Callable[..., bytes]:
    """Of int64s; twice as fast as an array, which has to guess its size."""
    return struct.Struct(f"{number}q").pack


def pack(indices: Iterable[Any]) -> Packed:
    """The identities of the indices of one batch, in their order.

    Example:
        >>> pack([3, 1]) == pack((torch.tensor(3), np.int64(1)))
        True
        >>> pack(["a", ("b", 2)])
        ('a', ('b', 2))
    """
    try:
        return _packer(len(indices))(*indices)  # type: ignore[arg-type]  # no length: see below
    except (struct.error, TypeError):  # not ints, or no length
        pass
    except Exception as exc:  # objects of the user's that object to being asked
        if raised_by_signal(exc):
            raise
    try:
        return tuple(map(identity, indices))
    except Exception as exc:  # not iterable: the dataset's fetch will say so, torch's own way
        if raised_by_signal(exc):
            raise
        return (identity(indices),)


def pack_unbatched(index: Any) -> Packed:
    """The identities behind one index drawn with ``batch_size=None``.

    A list, or an array of indices, asks the dataset for a whole batch at once: each index in it
    counts. Anything else, a tuple too, is one index.

    Example:
        >>> [unpack(pack_unbatched(index)) for index in (5, [5, 6], (5, 6))]
        [(5,), (5, 6), ((5, 6),)]
    """
    if type(index) is list or (isinstance(index, torch.Tensor | np.ndarray) and index.ndim):
        return pack(index)
    return pack((index,))


def snapshots(indices: Any, most: int = 20) -> Iterator[int | bytes]:
    """The last of some indices, as they are now: a sampler may refill its lists.

    Those that cannot be pickled are left out.
    """
    try:
        last = list(indices)[-most:]
    except Exception:  # no batch of indices: the dataset will say so
        return
    for index in last:
        try:
            if type(index) is torch.Tensor:  # all of the memory that it is a view of would go along
                index = index.clone()
            yield index if type(index) is int else pickle.dumps(index)
        except Exception as exc:
            if raised_by_signal(exc):
                raise


def copied(index: Any) -> Any:
    """What was drawn, kept for later: a sampler may fill one list again and again.

    Not by pickle: it would take along, for each tensor, all of the memory that it is a view of.
    """
    if type(index) is list and {int, str}.issuperset(map(type, index)):
        return index[:]
    try:
        return copy.deepcopy(index)
    except Exception as exc:  # it cannot be sent either, which is told there
        if raised_by_signal(exc):
            raise
        return index


def restored(snapshot: int | bytes) -> Any:
    """The index again; None where it cannot be had."""
    try:
        return pickle.loads(snapshot) if isinstance(snapshot, bytes) else snapshot
    except Exception:  # a class that cannot be imported here
        return None


def unpack(packed: Packed) -> tuple[Any, ...]:
    """The identities again, one per sample; ints for a batch of ints."""
    return tuple(memoryview(packed).cast("q")) if isinstance(packed, bytes) else packed


def same(one: Any, other: Any) -> bool:
    """Whether two identities, or packed batches of them, are equal; False where ``==`` raises."""
    try:
        return bool(one == other)
    except Exception:  # an index with an __eq__ of its own
        return False


def count(packed: Packed) -> int:
    """How many samples ``packed`` stands for."""
    return len(packed) // _ITEM_BYTES if type(packed) is bytes else len(packed)


def identity(index: Any) -> Hashable:
    """A hashable stand-in for ``index`` that is equal before and after pickling.

    An object without an equality of its own is known by its type alone: two of them in one batch
    are then told apart by their positions only.
    """
    try:
        known: Hashable = _identity(index)
        return known
    except Exception as exc:  # sparse tensors, endless lists, objects that raise: known by place
        if raised_by_signal(exc):
            raise
        return Opaque(f"<{type(index).__qualname__}>")


def _identity(index: Any) -> Any:
    kind = type(index)
    if kind in _PLAIN:
        return index if index == index else ("nan",)  # which is not equal to itself
    if issubclass(kind, tuple | list):  # named tuples too: they may hold tensors
        return tuple(identity(item) for item in index)
    if issubclass(kind, (int, np.integer)):
        return int(index)
    if issubclass(kind, np.generic):
        item = index.item()
        return repr(item) if isinstance(item, np.generic) else identity(item)  # long doubles
    if issubclass(kind, enum.Enum):
        return (kind.__qualname__, index.name)
    if issubclass(kind, (torch.Tensor, np.ndarray)):
        return identity(index.tolist())
    if kind is dict:
        return ("dict", *((identity(key), identity(value)) for key, value in index.items()))
    if kind is slice:
        return ("slice", index.start, index.stop, index.step)
    if any("__eq__" in vars(cls) for cls in kind.__mro__[:-1]):
        hash(index)  # what has none, or a frozen dataclass that holds a list: known by place
        return index
    return Opaque(f"<{kind.__qualname__}>")


def as_array(identities: Sequence[Any]) -> np.ndarray[Any, Any]:
    """Identities as an array: int64; int64 of shape (n, 2) for streams; object for the rest.

    Example:
        >>> as_array([4, 2]).tolist(), as_array([(0, 7)]).shape, as_array(["a"]).dtype
        ([4, 2], (1, 2), dtype('O'))
    """
    kinds = {type(item) for item in identities}
    if kinds <= {int} or (
        kinds == {tuple}
        and all(len(item) == 2 and type(item[0]) is type(item[1]) is int for item in identities)
    ):
        try:
            return np.array(identities, dtype=np.int64)
        except OverflowError:
            pass
    out = np.empty(len(identities), dtype=object)
    out[:] = list(identities)
    return out
