"""What a copy of the dataset is at, small enough to be compared between processes. Runs in: both.

Each worker has a copy of the dataset, and copies drift apart: an epoch number that one side alone
sets, an order that each shuffles for itself, a cache that each fills. :func:`copy_state` reads in a
millisecond or two what can be compared: plain numbers and words, the order of long lists, and how
much each container holds. It runs no code of the user's.
"""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Iterator
from time import monotonic
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from safeloader._torch import without_overrides
from safeloader.introspect.byte_code import LEFT_ALONE
from safeloader.introspect.digests import Unknown, leaf_digest
from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.texts import is_secret
from safeloader.introspect.values import (
    array_facts,
    container_base,
    fields,
    held_by,
    inherits,
    is_one_of,
    type_name,
)

OBJECTS_MAX = 200
ATTRIBUTES_MAX = 1000  # in all
DEPTH_MAX = 3
WITHIN_MAX = 8  # elements looked into of one container: transforms, parts of a ConcatDataset
ORDERS_MAX = 32
SAMPLED = 64  # elements of an order that are compared
SORTED_MAX = 20_000  # elements of an order that are compared in no order
SORTED_IN_ALL = 30_000  # of all orders of one dataset
WORD_MAX = 80  # characters of a text that is compared
ELEMENT_BYTES = 1 << 12  # of an element of an order that are compared

_PLAIN = (bool, int, float, str, type(None))


class Order(NamedTuple):
    """What a list or an array with an element for each sample holds, in its order.

    Attributes:
        length: how many elements.
        sampled: digests of at most 64 of them, evenly spread; 0 for None and for what is unknown.
        contents: a digest of all elements in no order; None where that was not looked at.
        held_as: tells this object from another in the same place, in one process.
        which: tells the same elements from others, whatever they are, in one process and in its
            forks; empty for an array.
        all_of_them: of all elements in no order, in the same way; None of too many.
    """

    length: int
    sampled: tuple[int, ...]
    contents: int | None
    held_as: int
    which: tuple[int, ...] = ()
    all_of_them: int | None = None


class CopyState(NamedTuple):
    """What one copy of a dataset is at; picklable, and equal where nothing changed.

    Attributes:
        scalars: numbers, words, truth values by their path, as ``dataset.epoch``.
        orders: by their path, lists and arrays that have an element for each sample.
        lengths: how much each list, dict or set holds.
    """

    scalars: dict[str, Any]
    orders: dict[str, Order]
    lengths: dict[str, int]


class Attribute(NamedTuple):
    """An attribute that was found by a walk: who has it, under which name, and where."""

    path: str
    owner: Any
    name: str
    value: Any


def attributes(root: Any, name: str = "dataset", bound_s: float = 0.05) -> Iterator[Attribute]:
    """The attributes of an object and of the objects in it, breadth first and bounded.

    Objects of torch, NumPy and the interpreter are not looked into, but for datasets and samplers.

    >>> class Inner: ...
    >>> inner = Inner(); inner.epoch = 3
    >>> class Outer: ...
    >>> outer = Outer(); outer.inner = inner
    >>> [each.path for each in attributes(outer)]
    ['dataset.inner', 'dataset.inner.epoch']
    """
    seen = {id(root)}
    queue: deque[tuple[str, Any, int]] = deque([(name, root, 0)])
    end = monotonic() + bound_s
    left = ATTRIBUTES_MAX
    for _ in range(OBJECTS_MAX):
        if not queue or monotonic() > end:
            return
        path, owner, depth = queue.popleft()
        for key, value in fields(owner, OBJECTS_MAX):
            left -= 1
            if left < 0:
                return
            if type(key) is not str:
                continue
            at = f"{path}.{key}"
            yield Attribute(at, owner, key, value)
            if depth < DEPTH_MAX:
                for step, each in _within(value):
                    if id(each) not in seen and _looked_into(type(each)):
                        seen.add(id(each))
                        queue.append((at + step, each, depth + 1))


def _within(value: Any) -> Iterator[tuple[str, Any]]:
    base = container_base(type(value))
    if base in (list, tuple):
        for place, each in held_by(value, WITHIN_MAX):
            yield f"[{place}]", each
    elif base is None:
        yield "", value


def _looked_into(cls: type) -> bool:
    if id(cls) in _NEVER or inherits(cls, DataLoader, torch.nn.Module, torch.Tensor, np.ndarray):
        return False
    name = type_name(cls)
    if name.startswith(("torch.utils.data.", "torch.utils.data")):
        return True
    return "." in name and not name.startswith(LEFT_ALONE)


_NEVER = frozenset(map(id, (type, types.ModuleType, types.FunctionType, types.MethodType)))


def copy_state(dataset: Any, length: int | None = None, name: str = "dataset") -> CopyState:
    """What this copy of ``dataset`` is at; never raises.

    Args:
        dataset: any object.
        length: how many samples it has, as far as known: what has as many elements is an order.
        name: what it is called in the paths.

    >>> class Numbers:
    ...     def __init__(self):
    ...         self.epoch, self.order, self.cache = 2, [3, 1, 2], {}
    >>> state = copy_state(Numbers(), 3)
    >>> state.scalars, list(state.orders), state.lengths
    ({'dataset.epoch': 2}, ['dataset.order'], {'dataset.order': 3, 'dataset.cache': 0})
    """
    state = CopyState({}, {}, {})
    walk, left = attributes(dataset, name), SORTED_IN_ALL
    while True:
        try:
            for each in walk:
                left -= _note(state, each, dataset, length, left)
            return state
        except Exception as exc:  # a value that nobody foresaw: the others are compared
            if raised_by_signal(exc):
                raise


def _note(state: CopyState, found: Attribute, dataset: Any, length: int | None, left: int) -> int:
    """Put an attribute into ``state``; how many elements were sorted for it, of ``left``."""
    path, owner, key, value = found
    if (plain := _plain(value)) is not _NO_SCALAR:
        if not is_secret(key, value):
            state.scalars[path] = plain
        return 0
    base = container_base(type(value))
    if base is not None:
        state.lengths[path] = base.__len__(value)
    if base is dict and state.lengths[path] <= WITHIN_MAX:  # settings
        for name_of, each in held_by(value):
            plain = _plain(each)
            known = type(name_of) is str and plain is not _NO_SCALAR
            if known and not is_secret(name_of, each):
                state.scalars[f"{path}[{name_of!r}]"] = plain
    if length is None or len(state.orders) >= ORDERS_MAX:
        return 0
    most = min(SORTED_MAX, left)
    order = _order(value, base, length, most)
    if order is None and owner is not dataset and inherits(type(owner), Dataset):
        order = _order(value, base, _own_length(value, base), most)  # under a Subset
    if order is None:
        return 0
    state.orders[path] = order
    return order.length if order.length <= most else 0


_NO_SCALAR = object()


def _plain(value: Any) -> Any:
    """A number, a word, a truth value, also one that NumPy or torch holds."""
    cls = type(value)
    if any(cls is each for each in _PLAIN):
        return value[:WORD_MAX] if cls is str else value
    if inherits(cls, np.generic) and cls.__module__ == "numpy" and value.dtype.kind in "biuf":
        return value.item()
    if cls is torch.Tensor:
        with without_overrides():
            # What is shared is the same for all.
            dense = value.is_cpu and value.layout is torch.strided and not value.is_quantized
            if dense and not (value.dim() or value.is_shared() or value.is_complex()):
                return value.item()
    return _NO_SCALAR


def _own_length(value: Any, base: Any) -> int:
    if base in (list, tuple):
        return int(base.__len__(value))
    return int(((array_facts(value) or {}).get("shape") or [0])[0])


def _order(value: Any, base: Any, length: int, most: int) -> Order | None:
    """The order that a value is, if it has an element for each of ``length`` samples.

    Of more than ``most`` elements not all are looked at.
    """
    if length < 2:
        return None
    if base in (list, tuple):
        if base.__len__(value) != length or type(value) is torch.Size:
            return None
        step = max(1, -(-length // SAMPLED))
        some = [base.__getitem__(value, at) for at in range(0, length, step)]
        return Order(
            length,
            tuple(map(_element, some)),
            _contents(value, base, length, most),
            id(value),
            tuple(map(id, some)),
            sum(map(id, base.__iter__(value))) if length <= most else None,
        )
    if type(value) is np.ndarray and value.ndim == 1 and value.dtype.kind == "O":
        return _order(value.tolist(), list, length, most) if len(value) <= most else None
    step = max(1, -(-length // SAMPLED))
    if type(value) is np.ndarray and value.ndim == 1 and value.dtype.kind in "iuSUM":
        if len(value) != length:
            return None
        spread, all_of_them = value[::step], value if length <= most else None
    elif type(value) is torch.Tensor and value.is_cpu and value.layout is torch.strided:
        with without_overrides():
            if value.dim() != 1 or value.is_floating_point() or value.is_complex():
                return None
            if len(value) != length:
                return None
            # Of copies: what NumPy has seen once cannot be resized any more.
            spread = value.detach()[::step].clone().numpy()
            all_of_them = value.detach().clone().numpy() if length <= most else None
    else:
        return _of_table(value, length, most)
    sampled = tuple(crc32(each.tobytes()) or 1 for each in spread)
    contents = None if all_of_them is None else crc32(np.sort(all_of_them).tobytes())
    return Order(length, sampled, contents, id(value))


def _of_table(value: Any, length: int, most: int) -> Order | None:
    """The order of the rows of a table of pandas, by its first column of numbers or words."""
    pandas = sys.modules.get("pandas")
    if pandas is None or type(value) is not getattr(pandas, "DataFrame", None):
        return None
    if len(value) != length or length > most:
        return None
    for k in range(min(value.shape[1], WITHIN_MAX)):
        column = value.iloc[:, k]
        if column.dtype.kind in "iuf":
            numbers = column.to_numpy()
            step = max(1, -(-length // SAMPLED))
            sampled = tuple(crc32(each.tobytes()) or 1 for each in numbers[::step])
            return Order(length, sampled, crc32(np.sort(numbers).tobytes()), id(value))
        if column.dtype.kind == "O" and all(type(each) is str for each in column[:SAMPLED]):
            found = _order(column.tolist(), list, length, most)
            return found and found._replace(which=(), all_of_them=None, held_as=id(value))
    return None


_IN_AN_ORDER = (bool, int, float, str, bytes)


def _element(value: Any, width: int = 16) -> int:
    """The digest of an element; 0 for None and for what is not known.

    Of a dict and of an object it is that of the first plain values in it: what is added comes last.
    """
    cls = type(value)
    if is_one_of(cls, str, bytes):
        value = value[:ELEMENT_BYTES]
    if is_one_of(cls, *_IN_AN_ORDER):
        return crc32(repr(value).encode("utf-8", "replace")) or 1
    if is_one_of(cls, tuple, list) and len(value) <= width:
        parts = [_element(each, width // 4) for each in value]  # lists within are shorter
        return crc32(repr(tuple(parts)).encode()) or 1 if all(parts) else 0
    if is_one_of(cls, np.ndarray, torch.Tensor):
        try:
            return leaf_digest(value, most=ELEMENT_BYTES) or 1
        except (Unknown, RuntimeError, TypeError, ValueError):
            return 0
    base = container_base(cls)
    if base is dict or base is None:
        plain = [each for _, each in held_by(value, WITHIN_MAX)]
        known = [_element(each) for each in plain if is_one_of(type(each), *_IN_AN_ORDER)]
        if known:
            return crc32(repr(known[:2]).encode()) or 1
        arrays = [each for each in plain if is_one_of(type(each), np.ndarray, torch.Tensor)]
        return _element(arrays[0]) if arrays else 0
    return 0


def _contents(value: Any, base: Any, length: int, most: int) -> int | None:
    """A digest of the elements in no order; None of too many, or of no numbers or words."""
    if length > most:
        return None
    kinds = set(map(id, map(type, base.__iter__(value))))  # by id: a metaclass may define a hash
    if kinds == {id(int)}:
        try:
            numbers = np.fromiter(base.__iter__(value), np.int64, length)
        except OverflowError:
            return None
        return crc32(np.sort(numbers).tobytes())
    if kinds == {id(str)} and length <= SORTED_MAX // 10:
        words = sorted(each[:WORD_MAX] for each in base.__iter__(value))
        return crc32("\0".join(words).encode("utf-8", "replace"))
    return None
