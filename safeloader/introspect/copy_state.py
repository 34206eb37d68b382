"""What a copy of the dataset is at, small enough to be compared between processes. Runs in: both.

Each worker has a copy of the dataset, and copies drift apart: an epoch number that one side alone
sets, an order that each shuffles for itself, a cache that each fills. :func:`copy_state` reads in a
millisecond or two, of a dataset of a thousand attributes in some tens, what can be compared: plain
numbers and words, the order of long lists, and how much each container holds. It runs no code of
the user's.
"""

from __future__ import annotations

import os
import pathlib
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from safeloader._torch import without_overrides
from safeloader.introspect.byte_code import LEFT_ALONE
from safeloader.introspect.digests import (
    Unknown,
    in_no_order,
    is_backed,
    leaf_digest,
    raw_bytes,
    starts_of_rows,
)
from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.texts import is_secret
from safeloader.introspect.values import (
    array_facts,
    container_base,
    definitions,
    fields,
    held_by,
    inherits,
    is_one_of,
    module_of,
    once_for_class,
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
HELD_MAX = 32  # containers of which a few elements are compared
HELD_SAMPLED = 16  # of each
GLANCE_CHARS = 128
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
        is_data: whether it is a column, rows or fractions: all that counts is whether the same
            elements are in other places.
    """

    length: int
    sampled: tuple[int, ...]
    contents: int | None
    held_as: int
    which: tuple[int, ...] = ()
    all_of_them: int | None = None
    is_data: bool = False

    @property
    def places(self) -> tuple[int, ...]:
        """What lies where, of the elements that are looked at each time."""
        return self.which or self.sampled


class Held(NamedTuple):
    """What a list, a dict, an array or a tensor holds, by a few of its elements.

    Attributes:
        length: how many elements.
        sampled: digests of some, evenly spread; 0 for None and for what is unknown.
        held_as: tells this object from another in the same place, in one process.
        which: tells the same elements from others, in one process; empty but for lists.
        shared: whether another process may write to it, or its memory is not its own.
        changes: whether it may change in place as a cache does, and not as what is read.
    """

    length: int
    sampled: tuple[int, ...]
    held_as: int
    which: tuple[int, ...] = ()
    shared: bool = False
    changes: bool = False

    def became(self, now: Held) -> str:
        """What became of it in one process: "" (nothing, or not known), "changed", "set anew"."""
        anew = self.held_as != now.held_as
        if now.shared or (now.changes and not anew):
            return ""
        pairs = zip(self.sampled, now.sampled, strict=False)
        others = any(a != b for a, b in pairs if a and b) and (
            not (self.which and now.which) or self.which != now.which
        )
        if not others and self.length == now.length:
            return ""
        return "set anew" if anew else "changed"

    def is_as(self, other: Held) -> bool:
        """Whether it holds the same as before, in one process, as far as that is looked at."""
        places, others = self.which or self.sampled, other.which or other.sampled
        return self.length == other.length and places == others


class CopyState(NamedTuple):
    """What one copy of a dataset is at; picklable, and equal where nothing changed.

    Attributes:
        scalars: numbers, words, truth values by their path, as ``dataset.epoch``.
        orders: by their path, lists and arrays that have an element for each sample.
        lengths: how much each list, dict or set holds.
        counts: paths of dicts whose values are whole numbers or marks, by the newest of them.
        defaults: of the scalars, what the class has under their name: a copy on which it was never
            set has that.
        held: what each container holds, by a few of its elements.
    """

    scalars: dict[str, Any]
    orders: dict[str, Order]
    lengths: dict[str, int]
    counts: list[str] = []  # noqa: RUF012  # each state is given its own
    defaults: dict[str, Any] = {}  # noqa: RUF012
    held: dict[str, Held] = {}  # noqa: RUF012


class Attribute(NamedTuple):
    """An attribute that was found by a walk: who has it, under which name, and where."""

    path: str
    owner: Any
    name: str
    value: Any


def attributes(root: Any, name: str = "dataset") -> Iterator[Attribute]:
    """The attributes of an object and of the objects in it, breadth first and bounded.

    The bounds are numbers, not seconds: on a busy machine a process sees no less than another, with
    whose copy its own is compared.

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
    left = ATTRIBUTES_MAX
    for _ in range(OBJECTS_MAX):
        if not queue:
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


@once_for_class
def _looked_into(cls: type) -> bool:
    if id(cls) in _NEVER or inherits(cls, DataLoader, torch.nn.Module, torch.Tensor, np.ndarray):
        return False
    name = type_name(cls)
    if name.startswith(("torch.utils.data.", "torch.utils.data")):
        return True
    return "." in name and not name.startswith((*LEFT_ALONE, "pathlib."))


_NEVER = frozenset(map(id, (type, types.ModuleType, types.FunctionType, types.MethodType)))


def copy_state(
    dataset: Any,
    length: int | None = None,
    name: str = "dataset",
    last: CopyState | None = None,
) -> CopyState:
    """What this copy of ``dataset`` is at; never raises.

    Args:
        dataset: any object.
        length: how many samples it has, as far as known: what has as many elements is an order.
        name: what it is called in the paths.
        last: what it was at before, in this process: what is as it was is not read to its end.

    >>> class Numbers:
    ...     def __init__(self):
    ...         self.epoch, self.order, self.cache = 2, [3, 1, 2], {}
    >>> state = copy_state(Numbers(), 3)
    >>> state.scalars, list(state.orders), state.lengths
    ({'dataset.epoch': 2}, ['dataset.order'], {'dataset.order': 3, 'dataset.cache': 0})
    """
    state = CopyState({}, {}, {}, [], {}, {})
    walk, left = attributes(dataset, name), SORTED_IN_ALL
    orders = {} if last is None else last.orders
    while True:
        try:
            for each in walk:
                left -= _note(state, each, dataset, length, left, orders)
            return state
        except Exception as exc:  # a value that nobody foresaw: the others are compared
            if raised_by_signal(exc):
                raise


def _note(
    state: CopyState,
    found: Attribute,
    dataset: Any,
    length: int | None,
    left: int,
    last: dict[str, Order],
) -> int:
    """Put an attribute into ``state``; what reading it to the end took of ``left``."""
    path, owner, key, value = found
    if (plain := _plain(value)) is not _NO_SCALAR:
        if not is_secret(key, value):
            state.scalars[path] = plain
            for default in definitions(type(owner), key)[:1]:
                if (usual := _plain(default)) is not _NO_SCALAR:
                    state.defaults[path] = usual
        return 0
    base = container_base(type(value))
    if base is not None:
        state.lengths[path] = base.__len__(value)
    columns: list[tuple[str, Any]] = []
    if base is dict and _are_counts(value):
        state.counts.append(path)
    is_table = base is dict and state.lengths[path] <= WITHIN_MAX  # settings, columns
    if is_table:
        for name_of, each in held_by(value):
            if not is_one_of(type(name_of), str, int):
                continue
            plain, at = _plain(each), f"{path}[{name_of!r}]"
            if plain is _NO_SCALAR:
                columns.append((at, each))
            elif type(name_of) is str and not is_secret(name_of, each):
                state.scalars[at] = plain
    whole = [(path, value)]
    if base in (list, tuple) and state.lengths[path] <= WITHIN_MAX:
        parts = ((f"{path}[{at}]", each) for at, each in held_by(value) if _is_array(each))
        whole += parts
    for at, each in columns if is_table else whole:
        if len(state.held) < HELD_MAX and (held_now := held(each)) is not None:
            state.held[at] = held_now
    if length is None:
        return 0
    spent = 0
    for at, each in columns or [(path, value)]:
        if len(state.orders) >= ORDERS_MAX:
            break
        of_kind = container_base(type(each))
        look = _Look(min(SORTED_MAX, left - spent), last.get(at))
        order = look.order(each, of_kind, length)
        if order is None and owner is not dataset and inherits(type(owner), Dataset):
            order = look.order(each, of_kind, _own_length(each, of_kind))  # under a Subset
        if columns and of_kind is not None:
            state.lengths[at] = of_kind.__len__(each)
        if order is not None:
            state.orders[at] = order._replace(is_data=True) if columns else order
            spent += look.spent
    return spent


def _are_counts(values: Any) -> bool:
    """Whether the newest values of a dict are whole numbers: visits and marks, no saved work."""
    newest = list(islice(reversed(dict.values(values)), WITHIN_MAX))
    return bool(newest) and all(
        is_one_of(type(each), int, bool)
        or (inherits(type(each), np.integer) and module_of(type(each)) == "numpy")
        for each in newest
    )


_NO_SCALAR = object()


def _plain(value: Any) -> Any:
    """A number, a word, a truth value, also one that NumPy or torch holds."""
    cls = type(value)
    if is_one_of(cls, *_PLAIN):
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


class _Look:
    """Looks at what may be an order.

    Args:
        most: elements that may be read, where all are; 64 bytes of an array are as many as one.
        last: what was there before.

    Attributes:
        spent: how many it took.
    """

    def __init__(self, most: int, last: Order | None) -> None:
        self._most, self._last = most, last
        self.spent = 0

    def order(self, value: Any, base: Any, length: int) -> Order | None:
        """The order that a value is, if it has an element for each of ``length`` samples."""
        if length < 2:
            return None
        if base in (list, tuple):
            if base.__len__(value) != length or type(value) is torch.Size:
                return None
            return self._of_list(value, base, length)
        if type(value) is np.ndarray:
            if not value.ndim or len(value) != length or not value.size:
                return None
            if value.dtype.kind == "O":
                few = value.ndim == 1 and length <= SORTED_MAX
                return self._of_list(value.tolist(), list, length, id(value)) if few else None
            if value.dtype.kind not in "iufcSUMm":
                return None
            is_data = value.ndim > 1 or value.dtype.kind in "fcm"
            sampled = _rows(value[:: _step(length, SAMPLED)])
            return self._of_rows(sampled, value, value.nbytes, id(value), length, is_data)
        if type(value) is torch.Tensor and value.is_cpu and value.layout is torch.strided:
            return self._of_tensor(value, length)
        return _of_table(value, length, self._most)

    def _of_list(self, value: Any, base: Any, length: int, held_as: int = 0) -> Order:
        step = _step(length, SAMPLED)
        some = [base.__getitem__(value, at) for at in range(0, length, step)]
        order = Order(
            length, tuple(map(_element, some)), None, held_as or id(value), tuple(map(id, some))
        )
        last = self._last
        if last is not None and _same_places(last, order):
            return last
        if length > self._most:
            return order
        self.spent = length
        return order._replace(
            contents=_contents(value, base, length),
            all_of_them=sum(map(id, base.__iter__(value))),
        )

    def _of_tensor(self, value: torch.Tensor, length: int) -> Order | None:
        with without_overrides():
            if not value.dim() or len(value) != length or not value.numel():
                return None
            if value.dtype is torch.bool or value.is_quantized or value.is_nested:
                return None
            if not is_backed(value):
                return None
            held_as, value = id(value), value.detach()
            is_data = value.dim() > 1 or value.is_floating_point() or value.is_complex()
            sampled = _rows_of_tensor(value, _step(length, SAMPLED))
            if sampled is None:
                return None
            nbytes = value.numel() * value.element_size()
            return self._of_rows(sampled, value, nbytes, held_as, length, is_data)

    def _of_rows(
        self,
        sampled: tuple[int, ...],
        value: Any,
        nbytes: int,
        held_as: int,
        length: int,
        is_data: bool,
    ) -> Order:
        order = Order(length, sampled, None, held_as, is_data=is_data)
        last = self._last
        if last is not None and _same_places(last, order):
            return last
        taken = max(1, nbytes >> 6)
        if taken > self._most:
            return order
        self.spent = taken
        rows = value if type(value) is np.ndarray else raw_bytes(value).reshape(length, -1)
        return order._replace(contents=in_no_order(rows))


def _same_places(last: Order, now: Order) -> bool:
    """Whether it is the order that it was, by the elements that are looked at each time."""
    return (last.length, last.sampled, last.held_as, last.which) == (
        now.length,
        now.sampled,
        now.held_as,
        now.which,
    )


def _of_table(value: Any, length: int, most: int) -> Order | None:
    """The order of the rows of a table of pandas, by its first column of numbers or words."""
    pandas = sys.modules.get("pandas")
    if pandas is None or type(value) is not getattr(pandas, "DataFrame", None):
        return None
    if len(value) != length or length > most:
        return None
    for k in range(min(value.shape[1], WITHIN_MAX)):
        column = value.iloc[:, k]
        look = _Look(most, None)
        if column.dtype.kind in "iuf":
            found = look.order(column.to_numpy(), None, length)
            return found and found._replace(held_as=id(value), is_data=False)
        if column.dtype.kind == "O" and all(type(each) is str for each in column[:SAMPLED]):
            found = look.order(column.tolist(), list, length)
            return found and found._replace(which=(), all_of_them=None, held_as=id(value))
    return None


def held(value: Any) -> Held | None:
    """What a container holds, by a few of its elements; None of what is no container.

    >>> numbers = list(range(300, 400))
    >>> before = held(numbers)
    >>> numbers.reverse()
    >>> before.became(held(numbers)), before.became(held([300, 400]))
    ('changed', 'set anew')
    """
    base: Any = container_base(type(value))
    if base is dict:
        pairs = held_by(value, HELD_SAMPLED)
        digests = tuple(_glance(each) and _glance((key, each)) for key, each in pairs)
        return Held(dict.__len__(value), digests, id(value), changes=True)
    if base in (list, tuple):
        return _of_objects(value, base, base.__len__(value), id(value))
    if type(value) is np.ndarray:
        if not value.ndim or not value.size or value.dtype.kind not in "biufcSUMmO":
            return None
        rows = value[:: _step(len(value), HELD_SAMPLED)]
        if value.dtype.kind == "O":
            return _of_objects(rows.tolist(), list, len(value), id(value))
        return Held(len(value), _rows(rows), id(value), shared=_is_of_others(value))
    if type(value) is torch.Tensor and value.is_cpu and value.layout is torch.strided:
        with without_overrides():
            if not value.dim() or not value.numel() or value.is_quantized or value.is_nested:
                return None
            if not is_backed(value):
                return None
            length, storage = value.shape[0], value.untyped_storage()
            if value.nbytes // length > ELEMENT_BYTES:
                return None  # to copy a part of each takes long
            sampled = _rows_of_tensor(value, _step(length, HELD_SAMPLED))
            assert sampled is not None  # of so few bytes
            return Held(length, sampled, id(value), shared=storage.is_shared())
    return None


def _of_objects(value: Any, base: Any, length: int, held_as: int) -> Held:
    """Of a list, or of some objects of as many."""
    there = base.__len__(value)
    few = 2 if there and _is_array(base.__getitem__(value, 0)) else HELD_SAMPLED
    some = [base.__getitem__(value, at) for at in range(0, there, _step(there, few))]
    return Held(length, tuple(map(_glance, some)), held_as, tuple(map(id, some)))


def _glance(value: Any) -> int:
    """As :func:`_element`, of the last characters of a text, and the first few parts of a row."""
    cls = type(value)
    if is_one_of(cls, str, bytes):
        return crc32(repr(value[-GLANCE_CHARS:]).encode("utf-8", "replace")) or 1
    if is_one_of(cls, tuple, list):
        parts = [_glance(each) for each in value[:4] if not is_one_of(type(each), tuple, list)]
        return crc32(repr(parts).encode()) if all(parts) else 0
    return _element(value)


def _step(length: int, few: int) -> int:
    return max(1, -(-length // few))


def _is_array(value: Any) -> bool:
    return is_one_of(type(value), np.ndarray, torch.Tensor)


def _is_of_others(array: Any) -> bool:
    """Whether the memory of an array is no array's own: mapped, shared, or a buffer's."""
    while type(array.base) is np.ndarray:
        array = array.base
    return array.base is not None


def _rows(some: Any) -> tuple[int, ...]:
    width = max(1, ELEMENT_BYTES // max(1, some.itemsize))
    return _digests(np.asarray(each).flat[:width].tobytes() for each in some)


def _rows_of_tensor(value: torch.Tensor, step: int) -> tuple[int, ...] | None:
    """The same of each ``step``-th row; None where a part of one takes a copy of all of it."""
    starts = starts_of_rows(value, step, ELEMENT_BYTES)
    if starts is not None:
        return _digests(starts)
    row, size = value.numel() // len(value), value.element_size()
    if row * size > ELEMENT_BYTES and not value[0].is_contiguous():
        return None
    some = value.detach()[::step].reshape(-1, row)[:, : max(1, ELEMENT_BYTES // size)]
    # Of copies: what NumPy has seen once cannot be resized any more.
    return _rows(raw_bytes(some).reshape(len(some), -1))


def _digests(some: Iterable[bytes]) -> tuple[int, ...]:
    return tuple(crc32(each) or 1 for each in some)


_IN_AN_ORDER = (bool, int, float, str, bytes)
_PATHS = (pathlib.PosixPath, pathlib.PurePosixPath, pathlib.WindowsPath, pathlib.PureWindowsPath)


def _element(value: Any, width: int = 16) -> int:
    """The digest of an element; 0 for None and for what is not known.

    Of a dict and of an object it is that of the first plain values in it: what is added comes last.
    """
    cls = type(value)
    if is_one_of(cls, str, bytes):
        value = value[:ELEMENT_BYTES]
    if is_one_of(cls, *_PATHS):  # it may keep its text once that was asked for
        value = os.fspath(value)[:ELEMENT_BYTES]
        cls = str
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


def _contents(value: Any, base: Any, length: int) -> int | None:
    """A digest of the elements in no order; None where they are no numbers or words."""
    kinds = set(map(id, map(type, base.__iter__(value))))  # by id: a metaclass may define a hash
    if kinds == {id(int)}:
        try:
            numbers = np.fromiter(base.__iter__(value), np.int64, length)
        except OverflowError:
            return None
        return in_no_order(numbers)
    if kinds == {id(str)} and length <= SORTED_MAX // 10:
        words = sorted(each[:WORD_MAX] for each in base.__iter__(value))
        return crc32("\0".join(words).encode("utf-8", "replace"))
    return None
