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
from torch.utils.data import Subset, TensorDataset

from safeloader._torch import without_overrides
from safeloader.introspect.copy_state import loads, stores_elements
from safeloader.introspect.digests import known_leaves
from safeloader.introspect.values import array_facts, container_base, fields, plain_length

STORES_MAX = 8  # lists and arrays of one dataset


class Store(NamedTuple):
    """A list or an array that has an element for each sample: how to find that of an index."""

    path: str
    get: Callable[[int], Any]
    place_of: Callable[[Any], int | None]
    of_array: bool


class Element(NamedTuple):
    """An element as it was before it was fetched; ``before`` is None for one that was empty."""

    store: Store
    asked_as: str  # the index
    at: int
    held: Any
    before: dict[str, tuple[int, str]] | None


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
    own = dict(fields(dataset)[:256])
    if type(dataset) is Subset and inner is None:
        under, chosen = own.get("dataset"), own.get("indices")
        if type(chosen) in (list, tuple, range):
            yield from stores_of(
                under, plain_length(under) or _longest(under), f"{name}.dataset", _chosen(chosen)
            )
        return
    if length is None:
        return
    place_of = inner or _plain_place(length)
    found = 0
    for key, value in own.items():
        if type(key) is not str or found >= STORES_MAX:
            continue
        parts = [(f"{name}.{key}", value)]
        if type(dataset) is TensorDataset and key == "tensors" and type(value) is tuple:
            parts = [(f"{name}.tensors[{k}]", each) for k, each in enumerate(value)]
        elif not loads(dataset, key):
            continue
        for path, each in parts:
            get = _getter(dataset, key, each, length)
            if get is not None:
                found += 1
                yield Store(path, get, place_of, container_base(type(each)) is None)


def _longest(dataset: Any) -> int | None:
    """How many samples a dataset under a Subset has, by what it holds: its longest list."""
    lengths = [plain_length(each) or 0 for _, each in fields(dataset)[:64]]
    return max(lengths, default=0) or None


def _plain_place(length: int) -> Callable[[Any], int | None]:
    return lambda index: index if type(index) is int and 0 <= index < length else None


def _chosen(indices: Any) -> Callable[[Any], int | None]:
    def place_of(index: Any) -> int | None:
        if type(index) is not int or not 0 <= index < len(indices):
            return None
        under = indices[index]
        return under if type(under) is int and under >= 0 else None

    return place_of


def _getter(dataset: Any, key: str, value: Any, length: int) -> Callable[[int], Any] | None:
    base: Any = container_base(type(value))
    if base in (list, tuple):
        return _of_list(base, value) if base.__len__(value) == length else None
    if type(value) not in (np.ndarray, torch.Tensor):
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
            if element.layout is not torch.strided or element.numel() > 1 << 16:
                return False
            return bool((element == 0).all()) or bool((element != element).all())
    if type(element) is np.ndarray and element.dtype.kind in "biufc":
        return not element.any() or bool((element != element).all())
    return False


def changed(element: Element, now: Any) -> Change | None:
    """How an element differs from what it was; what was added to it is no difference.

    Another object in its place is none either: that was put there, and not written into.
    """
    if not element.store.of_array and now is not element.held:
        return None
    found = known_leaves(now)
    for path, (digest, word) in (element.before or {}).items():
        is_now = found.get(path, (0, "gone"))
        if is_now[0] != digest:
            return Change(f"{element.store.path}[{element.at}]{path}", word, is_now[1])
    return None
