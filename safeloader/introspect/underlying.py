"""The datasets under a Subset or a ConcatDataset, and which index is whose. Runs in: both.

::

    Subset ──► ConcatDataset ──► datasets[0]              index 3 of the Subset
                            └──► Subset ──► dataset       = index 812 of part 1

Only torch's own classes exactly, over lists, tuples, ranges, arrays and tensors: no code of the
user's runs. What is held are their tables of indices, not the datasets.
"""

from __future__ import annotations

import bisect
import dataclasses
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import ConcatDataset, Subset

from safeloader.introspect.values import fields, is_one_of

_TABLES = (list, tuple, range, np.ndarray, torch.Tensor)
_DEPTH = 16
_LOOKED_AT = 32  # entries of a table, to see whether it is what it was


class Beneath(NamedTuple):
    """Where a sample lies: the index in the dataset at the bottom, and which of these it is."""

    at: int
    part: int


@dataclasses.dataclass(frozen=True, eq=False)
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
            index, within = int(self._table[index]), self._within[0]
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

    def _changed(self) -> bool:
        """Whether a table on the way is not what it was, as far as some of its entries tell."""
        within = any(each is not None and each._changed() for each in self._within)
        return within or _glance(self._table) != self._seen


def underlying(dataset: Any, depth: int = _DEPTH) -> Underlying | None:
    """The way down from a dataset's indices; None where it is at the bottom itself."""
    cls = type(dataset)
    if depth == 0 or not is_one_of(cls, Subset, ConcatDataset):
        return None
    held: dict[Any, Any] = dict(fields(dataset))
    if cls is Subset:
        table: Any = held.get("indices")
        inner: Any = [held.get("dataset")]
    else:
        table, inner = held.get("cumulative_sizes"), held.get("datasets")
    if (
        not is_one_of(type(table), *_TABLES)
        or type(inner) is not list
        or not (len(inner) and len(table))
    ):
        return None
    within = tuple(underlying(each, depth - 1) for each in inner)
    parts = sum(map(_parts, within))
    return Underlying(cls.__name__, parts, table, within, cls is ConcatDataset, _glance(table))


def _parts(within: Underlying | None) -> int:
    return 1 if within is None else within.parts


def _taken(table: Any, indices: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if is_one_of(type(table), list, tuple, range):  # as a whole it would be converted each time
        return np.array([table[index] for index in indices.tolist()], dtype=np.int64)
    taken: npt.NDArray[Any] = np.asarray(table)[indices].astype(np.int64)
    return taken


def _glance(table: Any) -> tuple[Any, ...]:
    """Its length, and entries at even distances."""
    size = len(table)
    step = max(size // _LOOKED_AT, 1)
    shown = [*range(0, size, step)][: _LOOKED_AT + 1]
    return size, *(int(table[k]) for k in shown)
