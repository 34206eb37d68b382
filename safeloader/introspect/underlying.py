"""The datasets under a Subset or a ConcatDataset, and which index is whose. Runs in: both.

::

    Subset ──► ConcatDataset ──► datasets[0]              index 3 of the Subset
                            └──► Subset ──► dataset       = index 812 of part 1

Only torch's own classes exactly, over lists, tuples, ranges, arrays and tensors: no code of the
user's runs. What is held are their tables of indices, not the datasets, and only until they are let
go of.
"""

from __future__ import annotations

import bisect
import dataclasses
import marshal
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import ConcatDataset, Subset

from safeloader.introspect.memories import memory_of
from safeloader.introspect.texts import indices_text
from safeloader.introspect.values import fields, is_one_of

_TABLES = (list, tuple, range, np.ndarray, torch.Tensor)
_DEPTH = 16
_OF_SUBSET, _OF_CONCAT = "indices", "cumulative_sizes"  # the names of their tables
_LOOKED_AT = 32  # entries of a table, to see whether it is what it was
_COMPARED_MAX = 1 << 20  # bytes of two tables: half a millisecond


class Beneath(NamedTuple):
    """Where a sample lies: the index in the dataset at the bottom, and which of these it is."""

    at: int
    part: int


@dataclasses.dataclass(eq=False)
class Underlying:
    """The way down from the indices of a dataset.

    Attributes:
        name: of its class.
        parts: how many datasets are at the bottom.

    Example:
        >>> data = list("abcdef")
        >>> both = ConcatDataset([Subset(data, [5, 4]), data])
        >>> under = underlying(Subset(both, [0, 1, 2, 3]))
        >>> under.of(1), under.of(2), under.text(3)
        (Beneath(at=4, part=0), Beneath(at=0, part=1), 'index 1 of part 1 under the Subset')
    """

    name: str
    parts: int
    _table: Any  # of a Subset its indices; of a ConcatDataset where each part ends
    _within: tuple[Underlying | None, ...]  # None: a dataset at the bottom
    _concatenates: bool
    _seen: tuple[Any, ...]
    _bytes: int  # of the table
    _dataset: weakref.ref[Any]  # that holds the table, as long as it is there

    def of(self, index: Any) -> Beneath | None:
        """Where the sample of an index lies; None where that is not known."""
        if type(index) is not int:
            return None
        with suppress(Exception):  # outside; or the table is another one by now
            return None if self._changed() else self._of(index)
        return None

    def _of(self, index: int) -> Beneath:
        first = 0
        if self._concatenates:
            ends = self._table
            index = range(ends[-1])[index]  # a negative one counts from the end
            number = bisect.bisect_right(ends, index)
            index -= ends[number - 1] if number else 0
            first = sum(_parts(each) for each in self._within[:number])
            within = self._within[number]
        else:
            index, within = _number(self._table[index]), self._within[0]
        if within is None:
            return Beneath(index, first)
        place = within._of(index)
        return Beneath(place.at, first + place.part)

    def of_all(self, indices: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """For an array of indices the index at the bottom and the part of each; -1: not known."""
        if indices.dtype == np.int64:
            with suppress(Exception):
                if not self._changed():
                    return self._of_all(indices)
        places = [self.of(index) or Beneath(-1, -1) for index in indices.tolist()]
        both = np.array(places, dtype=np.int64).reshape(-1, 2)
        return both[:, 0], both[:, 1]

    def _of_all(self, indices: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        if not self._concatenates:
            indices = _taken(self._table, indices)
            within = self._within[0]
            return (indices, np.zeros_like(indices)) if within is None else within._of_all(indices)
        ends = np.array(self._table, dtype=np.int64)
        at = np.where(indices < 0, indices + ends[-1], indices)
        if at.size and not 0 <= at.min() <= at.max() < ends[-1]:
            raise IndexError("one of them is outside")
        numbers = np.searchsorted(ends, at, side="right")
        at = at - np.concatenate([[0], ends])[numbers]
        found, parts, first = at.copy(), np.zeros_like(at), 0
        for number, within in enumerate(self._within):
            here = numbers == number
            if within is None:
                parts[here] = first
            elif here.any():
                found[here], parts[here] = within._of_all(at[here])
                parts[here] += first
            first += _parts(within)
        return found, parts

    def text(self, index: Any) -> str:
        """``index 812 of the dataset under the Subset``; empty where it is not known."""
        place = self.of(index)
        if place is None:
            return ""
        whose = "the dataset" if self.parts == 1 else f"part {place.part}"
        return f"index {place.at} of {whose} under the {self.name}"

    def text_of_all(self, indices: Sequence[Any]) -> str:
        """``indices [812, 7] of the dataset under the Subset``; empty where that is not known."""
        places = [self.of(index) for index in indices]
        if self.parts != 1 or not places or None in places:
            return ""
        under = indices_text([place.at for place in places if place], most=16, counted=True)
        return f"indices {under} of the dataset under the {self.name}"

    def takes_over(self, other: Underlying) -> bool:
        """Have the tables of ``other``, which are equal, in the place of these; False where they
        are not, or it would take long to tell."""
        same = self._is_like(other)
        if same:
            vars(self).update(vars(other))  # whose dataset is there, and holds its table anyway
        return same

    def _is_like(self, other: Underlying) -> bool:
        return (
            self.name == other.name
            and self._seen == other._seen
            and len(self._within) == len(other._within)
            and _equal(self._table, other._table)
            and all(
                one is None is two or (one is not None and two is not None and one._is_like(two))
                for one, two in zip(self._within, other._within, strict=True)
            )
        )

    def held_here(self) -> Iterator[tuple[int, int]]:
        """Of each table that its dataset does not hold any more, the identity and the bytes."""
        dataset = self._dataset()
        name = _OF_CONCAT if self._concatenates else _OF_SUBSET
        if dataset is None or dict(fields(dataset)).get(name) is not self._table:
            yield id(self._table), self._bytes
        for within in self._within:
            if within is not None:
                yield from within.held_here()

    def let_go(self) -> None:
        """Keep no table: nothing is known from now on."""
        self._table, self._within, self._seen = (), (None,), (None,)

    def _changed(self) -> bool:
        """Whether a table on the way is not what it was, as far as some of its entries tell."""
        within = any(each is not None and each._changed() for each in self._within)
        return within or _glance(self._table) != self._seen


def underlying(dataset: Any, depth: int = _DEPTH) -> Underlying | None:
    """The way down from a dataset's indices; None where it is at the bottom itself."""
    cls = type(dataset)
    if (cls is not Subset and cls is not ConcatDataset) or depth == 0:
        return None
    held: dict[Any, Any] = dict(fields(dataset))
    if cls is Subset:
        table: Any = held.get(_OF_SUBSET)
        inner: Any = [held.get("dataset")]
    else:
        table, inner = held.get(_OF_CONCAT), held.get("datasets")
    if (
        not is_one_of(type(table), *_TABLES)
        or type(inner) is not list
        or not (len(inner) and len(table))
    ):
        return None
    try:
        seen = _glance(table)
    except TypeError:  # keys, slices or lists of numbers: they are the indices there
        return None
    within = tuple(underlying(each, depth - 1) for each in inner)
    parts = sum(map(_parts, within))
    return Underlying(
        cls.__name__,
        parts,
        table,
        within,
        cls is ConcatDataset,
        seen,
        _bytes_of(table),
        weakref.ref(dataset),
    )


def _parts(within: Underlying | None) -> int:
    return 1 if within is None else within.parts


def _taken(table: Any, indices: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if is_one_of(type(table), list, tuple, range):  # as a whole it would be converted each time
        return np.array([table[index] for index in indices.tolist()], dtype=np.int64)
    taken: npt.NDArray[Any] = np.asarray(table)[indices].astype(np.int64)
    return taken


def _equal(one: Any, other: Any) -> bool:
    """Whether two tables of one length are equal, if that is soon told."""
    cls = type(one)
    if one is other:
        return True
    if cls is not type(other) or _bytes_of(one) > _COMPARED_MAX:
        return False
    if cls is range:
        return bool(one == other)
    if cls is torch.Tensor:
        return one.dtype == other.dtype and torch.equal(one, other)
    if cls is np.ndarray:
        return one.dtype == other.dtype and one.dtype != object and np.array_equal(one, other)
    try:  # of numbers that are Python's own: others would be asked for ``==``
        return marshal.dumps(one, _PLAIN) == marshal.dumps(other, _PLAIN)
    except ValueError:
        return False


_PLAIN = 2  # the last version that does not depend on who else refers to a number


def _bytes_of(table: Any) -> int:
    if memory := memory_of(table):
        return memory.size_bytes
    return sys.getsizeof(table) + (0 if type(table) is range else 32 * len(table))


def _glance(table: Any) -> tuple[Any, ...]:
    """Its length, and entries at even distances."""
    size = len(table)
    step = max(size // _LOOKED_AT, 1)
    shown = [*range(0, size, step)][: _LOOKED_AT + 1]
    return size, *(_number(table[k]) for k in shown)


def _number(entry: Any) -> int:
    """An entry of a table as an int.

    Raises:
        TypeError: if it is none.
    """
    if type(entry) is torch.Tensor:
        entry = entry.tolist()
    if type(entry) is int or isinstance(entry, np.integer):
        return int(entry)
    raise TypeError(f"no number: {type(entry).__name__}")
