"""What a dataset stores for its samples, before and after they were fetched. Runs in: both.

A transform that works in place on what ``__getitem__`` gives it changes what the dataset holds, and
the next epoch gets the sample changed. What a dataset changes on purpose is not told: a cache that
it fills (None or zeros before), marks and counts that it assigns (``self.seen[i] += 1``), keys that
it adds to a dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from safeloader._torch import without_overrides
from safeloader.introspect.byte_code import is_read, loads, stores_elements
from safeloader.introspect.copy_state import attributes
from safeloader.introspect.digests import known_leaves, parts_of
from safeloader.introspect.values import (
    array_facts,
    container_base,
    fields,
    inherits,
    is_one_of,
    plain_length,
)

STORES_MAX = 8  # lists and arrays of one dataset
BLANK_MAX = 1 << 15  # numbers of an element that have to be zeros, or NaN


class Store(NamedTuple):
    """A list or an array that has an element for each sample: how to find that of an index."""

    path: str
    get: Callable[[int], Any]
    place_of: Callable[[Any], int | None]
    of_array: bool


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
        self.held = store.get(at)
        self.before = looked_at(self.held)
        self._last = self.before or {}
        self._changed_in: dict[str, list[int]] = {}
        self._by_fetching: set[str] | None = None
        self._fetched_in = epoch
        self._shared = any(_is_shared(leaf) for _, leaf in parts_of(self.held))

    @property
    def was_empty(self) -> bool:
        """Whether it was None or zeros before."""
        return self.before is None

    def look(self, epoch: int, *, fetched: bool = False) -> Any:
        """Look at it now; ``fetched``: it was fetched a moment ago, for the first time."""
        now = self.store.get(self.at)
        if self.before is None or (not self.store.of_array and now is not self.held):
            return now  # put there, and not written into
        found = known_leaves(now)
        for path, (digest, _) in self._last.items():
            if found.get(path, (digest,))[0] != digest:
                epochs = self._changed_in.setdefault(path, [])
                if epoch not in epochs:
                    epochs.append(epoch)
        if fetched:
            self._by_fetching = set(self._changed_in)
        self._last = found
        return now

    def change(self, only_fetching: bool) -> Change | None:
        """How it was changed in each of two epochs; None if it was not.

        What is made ready in its place once, counted up, or put in another order is no harm.

        Args:
            only_fetching: whether the program may have written there too, as it may into shared
                memory: what fetching it first left alone is not told then.
        """
        if self.before is None or _digests(self.before) == _digests(self._last):
            return None
        for path, epochs in self._changed_in.items():
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
        if is_one_of(type(chosen), list, tuple, range, torch.Tensor, np.ndarray):
            place = _composed(inner or _plain_place(length), _chosen(chosen))
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
        parts = [(path, value)]
        if type(owner) is TensorDataset and key == "tensors" and type(value) is tuple:
            parts = [(f"{path}[{k}]", each) for k, each in enumerate(value)]
        elif not _may_store(value, length) or not is_read(dataset, owner, key):
            continue
        for at, each in parts:
            get = _getter(owner, key, each, length)
            if get is not None:
                found += 1
                yield Store(at, get, place_of, container_base(type(each)) is None)


def _may_store(value: Any, length: int) -> bool:
    base: Any = container_base(type(value))
    if base in (list, tuple):
        return bool(base.__len__(value) == length)
    shape = (array_facts(value) or {}).get("shape")
    return is_one_of(type(value), np.ndarray, torch.Tensor) and bool(shape and shape[0] == length)


def _longest(dataset: Any) -> int | None:
    """How many samples a dataset under a Subset has, by what it holds: its longest list."""
    lengths = [plain_length(each) or 0 for _, each in fields(dataset, 64)]
    return max(lengths, default=0) or None


Place = Callable[[Any], "int | None"]


def _plain_place(length: int | None) -> Place:
    most = float("inf") if length is None else length
    return lambda index: index if type(index) is int and 0 <= index < most else None


def _composed(outer: Place, inner: Place) -> Place:
    return lambda index: None if (at := outer(index)) is None else inner(at)


def _shifted(begin: int, end: int) -> Place:
    return lambda at: at - begin if begin <= at < end else None


def _chosen(indices: Any) -> Place:
    def place_of(at: Any) -> int | None:
        if not 0 <= at < len(indices):
            return None
        with without_overrides():
            under = indices[at]
            under = under if type(under) is int else getattr(under, "item", lambda: None)()
        return under if type(under) is int and under >= 0 else None

    return place_of


def _getter(dataset: Any, key: str, value: Any, length: int) -> Callable[[int], Any] | None:
    base: Any = container_base(type(value))
    if base in (list, tuple):
        return _of_list(base, value) if base.__len__(value) == length else None
    if not is_one_of(type(value), np.ndarray, torch.Tensor):
        return None
    facts = array_facts(value) or {}
    shape = facts.get("shape") or []
    if not shape or shape[0] != length or facts.get("device", "cpu") != "cpu":
        return None
    if len(shape) == 1 and stores_elements(dataset, key):
        return None  # counts and marks for each sample are written there on purpose
    return _of_array(value)


def _of_list(base: Any, value: Any) -> Callable[[int], Any]:
    return lambda at: base.__getitem__(value, at) if at < base.__len__(value) else None


def _of_array(value: Any) -> Callable[[int], Any]:
    def get(at: int) -> Any:
        with without_overrides():
            return value[at] if at < len(value) else None

    return get


def looked_at(element: Any) -> dict[str, tuple[int, str]] | None:
    """Of each known leaf of an element its digest and a word; None of an element that is empty."""
    return None if element is None or _is_blank(element) else known_leaves(element)


def _is_blank(element: Any) -> bool:
    """Whether it is what a table is made of before anything is put there: zeros, or NaN."""
    if type(element) is torch.Tensor:
        with without_overrides():
            dense = element.layout is torch.strided and element.is_cpu and not element.is_nested
            if not dense or element.numel() > BLANK_MAX:
                return False
            return bool((element == 0).all()) or bool((element != element).all())
    if type(element) is np.ndarray and element.dtype.kind in "biufc":
        some = element.flat[:BLANK_MAX]
        return not some.any() or bool((some != some).all())
    return False
