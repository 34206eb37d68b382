"""What a dataset stores for its samples, before and after they were fetched. Runs in: both.

A transform that works in place on what ``__getitem__`` gives it changes what the dataset holds, and
the next epoch gets the sample changed. What a dataset changes on purpose is not told: a cache that
it fills (None or zeros before), marks and counts that it assigns (``self.seen[i] += 1``), keys that
it adds to a dict.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from safeloader._torch import without_overrides
from safeloader.introspect.byte_code import is_read, loads, overwrites, stores_elements
from safeloader.introspect.copy_state import attributes
from safeloader.introspect.digests import known_leaves, parts_of
from safeloader.introspect.moved import moved, order_of_rows, orders_of
from safeloader.introspect.values import (
    array_facts,
    container_base,
    fields,
    held_by,
    inherits,
    is_one_of,
    module_of,
    plain_length,
    weakly,
)

STORES_MAX = 8  # lists and arrays of one dataset
COLUMNS_MAX = 8  # of a dict
ORDER_BYTES = 1 << 19  # of an array whose rows may be shuffled
FEW = 4  # numbers that most elements need not be looked at beyond
BLANK_MAX = 1 << 15  # numbers of an element that have to be zeros, or NaN


Place = Callable[[Any], "int | None"]


class Store:
    """A list, dict or array that has an element for each sample: how to find that of an index.

    It holds nothing of the dataset: each time it asks for what stands under the name.

    Args:
        path: of it.
        owner: the object that has it, or has what it is a column of.
        name: of the owner's attribute.
        step: under which it is a column of that; None where it is none.
        value: it itself.
        place_of: gives the place of an index in it.
    """

    def __init__(
        self, path: str, owner: Any, name: str, step: Any, value: Any, place_of: Place
    ) -> None:
        self.path, self.place_of = path, place_of
        self._owner, self._name, self._step = weakly(owner), name, step
        self._is = _identity(value)
        self._base: Any = container_base(type(value))
        self.of_array = self._base is None
        self._order = order_of_rows(value, ORDER_BYTES) if self.of_array else None

    def _value(self) -> Any:
        """What stands there; GONE if that is another object by now."""
        value = _field(self._owner(), self._name)
        if self._step is not None:
            base: Any = container_base(type(value))
            if base is dict:
                value = dict.get(value, self._step, GONE)
            elif base is tuple and self._step < tuple.__len__(value):
                value = tuple.__getitem__(value, self._step)
            else:
                return GONE
        return value if self._is(value) else GONE

    @property
    def gone(self) -> bool:
        """Whether another object stands in its place."""
        return self._value() is GONE

    def get(self, at: int) -> Any:
        """The element at a place; None where there is none, GONE where this is no more."""
        value, base = self._value(), self._base
        if value is GONE:
            return GONE
        if base is dict:
            return dict.get(value, at)
        if base is not None:
            return base.__getitem__(value, at) if at < base.__len__(value) else None
        with without_overrides():
            return value[at] if at < len(value) else None

    @property
    def may_have_moved(self) -> bool:
        """Whether it is an array of so many rows that nobody can tell if they were shuffled."""
        return self.of_array and self._order is None

    def only_moved(self) -> bool:
        """Whether an array has the rows that it had at first, in another order."""
        if self._order is None:
            return False
        now = order_of_rows(self._value(), ORDER_BYTES)
        return now is not None and now[1] == self._order[1] and now[0] != self._order[0]


GONE = object()
"""Stands for what is there no more."""


def _identity(thing: Any) -> Callable[[Any], bool]:
    """What tells an object from others without holding it.

    A list, a dict or a number is told by its address: another may get that when it is gone.
    """
    address = id(thing)
    try:
        held: Any = weakref.ref(thing)
    except TypeError:
        return lambda other: id(other) == address
    return lambda other: id(other) == address and held() is other


def _field(owner: Any, name: str) -> Any:
    found = (value for key, value in fields(owner, 256) if type(key) is str and key == name)
    return next(found, GONE)


class Element:
    """An element that is looked at again and again, from before it was fetched first.

    Args:
        store: what it is an element of.
        asked_as: the index of the sample, as text.
        at: its place in the store.
        epoch: in which it is about to be fetched first.
    """

    def __init__(self, store: Store, asked_as: str, at: int, epoch: int) -> None:
        self.store, self.asked_as, self.at = store, asked_as, at
        held = store.get(at)
        self._is = _identity(held)
        self.before = looked_at(held)
        self._orders = {} if self.before is None else orders_of(held)
        self._last, self._last_orders = self.before or {}, self._orders
        self._changed_in: dict[str, list[int]] = {}
        self._by_fetching: set[str] | None = None
        self._fetched_in = epoch
        self._shared = any(_is_shared(leaf) for _, leaf in parts_of(held))
        self._replaced = False

    @property
    def was_empty(self) -> bool:
        """Whether it was None or zeros before."""
        return self.before is None

    def look(self, epoch: int, *, fetched: bool = False) -> Any:
        """Look at it now; ``fetched``: it was fetched a moment ago, for the first time."""
        now = self.store.get(self.at)
        if now is GONE or not (self.store.of_array or self._is(now)):
            self._replaced = True  # put there, and not written into
        if now is GONE or self.before is None or self._replaced:
            return None if now is GONE else now
        found = known_leaves(now)
        for path, (digest, _) in self._last.items():
            if found.get(path, (digest,))[0] != digest:
                epochs = self._changed_in.setdefault(path, [])
                if epoch not in epochs:
                    epochs.append(epoch)
        if fetched:
            self._by_fetching = set(self._changed_in)
        if self._orders and _digests(found) != _digests(self._last):
            self._last_orders = orders_of(now)
        self._last = found
        return now

    def change(self, only_fetching: bool) -> Change | None:
        """How it was changed in each of two epochs; None if it was not.

        What is made ready in its place once, or counted up, is no harm. Nor is another order of the
        members of a list, or of the rows of an array; of a list of thousands that is not known, so
        nothing is said of it.

        Args:
            only_fetching: whether the program may have written there too, as it may into shared
                memory: what fetching it first left alone is not told then.
        """
        if self.before is None or _digests(self.before) == _digests(self._last):
            return None
        shuffled = tuple(moved(self._orders, self._last_orders))
        only_fetching = only_fetching or self.store.may_have_moved
        for path, epochs in self._changed_in.items():
            if path.startswith(shuffled):
                continue
            if len(epochs) < 2 or path not in self.before or path not in self._last:
                continue
            if (only_fetching or self._shared) and path not in (self._by_fetching or ()):
                continue
            was, now = self.before[path][1], self._last[path][1]
            if was != "None" and not _counted(was, now, epochs[-1] - self._fetched_in + 1):
                return Change(f"{self.store.path}[{self.at}]{path}", was, now)
        return None


def _is_shared(leaf: Any) -> bool:
    """Whether others may write into an array: another process, or whoever owns its memory."""
    if inherits(type(leaf), np.ndarray):
        owner: Any = leaf
        while inherits(type(owner), np.ndarray) and not inherits(type(owner), np.memmap):
            if np.ndarray.flags.__get__(owner).owndata:
                return False
            owner = np.ndarray.base.__get__(owner)
        return owner is not None
    if not inherits(type(leaf), torch.Tensor) or "size_bytes" not in (array_facts(leaf) or {}):
        return False
    with without_overrides():
        if not leaf.is_cpu:
            return False
        storage = leaf.untyped_storage()
        return bool(storage.is_shared() or not storage.resizable())  # not: over foreign memory


def _digests(leaves: dict[str, tuple[int, str]]) -> list[int]:
    return sorted(digest for digest, _ in leaves.values())


COUNTED_MAX = 8  # times an epoch that a sample is fetched, at most, where it is counted


def _counted(was: str, now: str, epochs: int) -> bool:
    """Whether a number is one that was counted up, or a mark."""
    if {was, now} <= {"True", "False"}:
        return True
    if not (was.lstrip("-").isdecimal() and now.lstrip("-").isdecimal()):
        return False
    return 0 < int(now) - int(was) <= COUNTED_MAX * epochs


class Change(NamedTuple):
    """What changed in an element: where, and its first number (or a word for it) was and is."""

    path: str
    was: str
    now: str


def stores_of(
    dataset: Any,
    length: int | None,
    name: str = "dataset",
    inner: Callable[[Any], int | None] | None = None,
) -> Iterator[Store]:
    """The lists and arrays from which a dataset's code takes its samples.

    Args:
        dataset: any object; one under a ``Subset`` is looked into.
        length: how many samples it has.
        name: what it is called in the paths.
        inner: gives the place of a sample in it; by default its index.

    >>> class Items:
    ...     def __init__(self):
    ...         self.items, self.names = [[1], [2]], ["a", "b", "c"]
    ...     def __getitem__(self, i):
    ...         return self.items[i], self.names
    >>> [store.path for store in stores_of(Items(), 2)]
    ['dataset.items']
    """
    own = dict(fields(dataset, 256))
    if type(dataset) is Subset:
        under, chosen = own.get("dataset"), own.get("indices")
        if is_one_of(type(chosen), *_CHOSEN):
            place = _composed(inner or _plain_place(length), _chosen(weakly(dataset)))
            size = plain_length(under) or _longest(under)
            yield from stores_of(under, size, f"{name}.dataset", place)
        return
    if type(dataset) is ConcatDataset:
        parts, ends = own.get("datasets"), own.get("cumulative_sizes")
        if type(parts) is list and type(ends) is list:
            for k, (part, end) in enumerate(list(zip(parts, ends, strict=False))[:STORES_MAX]):
                begin = ends[k - 1] if k else 0
                place = _composed(inner or _plain_place(length), _shifted(begin, end))
                yield from stores_of(part, end - begin, f"{name}.datasets[{k}]", place)
        return
    if length is None:
        return
    place_of = inner or _plain_place(length)
    found = 0
    within: list[str] = []
    for path, owner, key, value in attributes(dataset, name):
        if found >= STORES_MAX:
            return
        if path.startswith(tuple(within)):
            continue  # of a dataset that was looked into
        if is_one_of(type(value), Subset, ConcatDataset) and plain_length(value) == length:
            within.append(f"{path}.")
            if loads(owner, key):
                yield from stores_of(value, length, path, place_of)
            continue
        for at, step, each in _parts(path, owner, key, value, length):
            if found < STORES_MAX and _may_store(dataset, key, step, each, length):
                if step is None and not is_read(dataset, owner, key):
                    continue
                if owner is dataset and overwrites(dataset, key):
                    continue  # scratch: no sample is made of what was there before
                found += 1
                yield Store(at, owner, key, step, each, place_of)


def _parts(
    path: str, owner: Any, key: str, value: Any, length: int
) -> Iterator[tuple[str, Any, Any]]:
    """What may be a store: a value, or the columns in it, each with its path and its step."""
    base = container_base(type(value))
    if base is tuple and key == "tensors" and inherits(type(owner), TensorDataset):
        for k, each in enumerate(tuple.__iter__(value)):
            yield f"{path}[{k}]", k, each
    elif base is dict and dict.__len__(value) <= COLUMNS_MAX and dict.__len__(value) != length:
        for name, each in held_by(value):
            if is_one_of(type(name), str, int):
                yield f"{path}[{name!r}]", name, each
    else:
        yield path, None, value


def _may_store(dataset: Any, key: str, step: Any, value: Any, length: int) -> bool:
    base: Any = container_base(type(value))
    if base in (list, tuple, dict):
        if base.__len__(value) != length:
            return False
        return base is not dict or all(is_one_of(type(each), int) for each, _ in held_by(value, 64))
    if not is_one_of(type(value), np.ndarray, torch.Tensor):
        return False
    facts = array_facts(value) or {}
    shape = facts.get("shape")
    if not shape or shape[0] != length or facts.get("device", "cpu") != "cpu":
        return False
    # Counts and marks for each sample are written there on purpose.
    return len(shape) > 1 or not (step is not None or stores_elements(dataset, key))


def _longest(dataset: Any) -> int | None:
    """How many samples a dataset under a Subset has, by what it holds: its longest list."""
    lengths = [plain_length(each) or 0 for _, each in fields(dataset, 64)]
    return max(lengths, default=0) or None


def _plain_place(length: int | None) -> Place:
    most = float("inf") if length is None else length

    def place_of(index: Any) -> int | None:
        at = whole_number(index)
        return at if at is not None and 0 <= at < most else None

    return place_of


def whole_number(index: Any) -> int | None:
    """An index as a number, also one that NumPy or torch holds; None of what is no index.

    >>> whole_number(np.int64(3)), whole_number(torch.tensor(3)), whole_number(3.0)
    (3, 3, None)
    """
    if type(index) is int:
        return index
    if inherits(type(index), np.integer) and module_of(type(index)) == "numpy":
        return int(index)
    if type(index) is torch.Tensor:
        with without_overrides():
            whole = not (index.dim() or index.is_floating_point() or index.is_complex())
            if whole and index.is_cpu and index.dtype is not torch.bool and not index.is_quantized:
                return int(index.item())
    return None


def _composed(outer: Place, inner: Place) -> Place:
    return lambda index: None if (at := outer(index)) is None else inner(at)


def _shifted(begin: int, end: int) -> Place:
    return lambda at: at - begin if begin <= at < end else None


_CHOSEN = (list, tuple, range, torch.Tensor, np.ndarray)


def _chosen(subset: Callable[[], Any]) -> Place:
    def place_of(at: Any) -> int | None:
        indices = _field(subset(), "indices")
        if not is_one_of(type(indices), *_CHOSEN) or not 0 <= at < len(indices):
            return None
        with without_overrides():
            under = whole_number(indices[at])
        return under if under is not None and under >= 0 else None

    return place_of


def looked_at(element: Any) -> dict[str, tuple[int, str]] | None:
    """Of each known leaf of an element its digest and a word; None of an element that is empty."""
    return None if is_empty(element) else known_leaves(element)


def is_empty(element: Any) -> bool:
    """Whether it is what a table is made of before anything is put there: None, zeros, or NaN."""
    if element is None:
        return True
    if type(element) is torch.Tensor:
        with without_overrides():
            dense = element.layout is torch.strided and element.is_cpu and not element.is_nested
            if not dense or element.numel() > BLANK_MAX:
                return False
            if _has_numbers(element.detach().reshape(-1)[:FEW] if element.is_contiguous() else ()):
                return False
            return bool((element == 0).all()) or bool((element != element).all())
    if type(element) is np.ndarray and element.dtype.kind in "biufc":
        if _has_numbers(element.flat[:FEW]):
            return False
        some = element.flat[:BLANK_MAX]
        return not some.any() or bool((some != some).all())
    return False


def _has_numbers(first: Any) -> bool:
    """Whether there is one among the first numbers that is neither zero nor NaN."""
    return any(each == each and each != 0 for each in (first.tolist() if len(first) else ()))
