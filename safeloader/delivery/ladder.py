"""Sums by which multisets of indices are compared without being sent. Runs in: main.

A multiset of indices is known by how many there are and by the sum, modulo 2**64, of a number for
each. The number of index ``x`` is ``row[x // 4096] * column[x % 4096]`` of two tables of random
numbers. So that of all indices of a range has a closed form: a thousand million are summed up in
milliseconds. Two multisets that differ have one sum by a chance of about 2**-58.

A :class:`Ladder` is 256 such sums, of ranges of one width, a power of two: those of several ranks
are added up, whatever their widths. :class:`Delivered` is what one rank handed over, of which any
range can be summed up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

RUNGS = 256
SHIFT = 12
_PLACES = 1 << SHIFT
MASK = (1 << 64) - 1
_CHUNK = 1 << 16  # numbers, or bytes of a bitmap, that are looked at at once
_MOST_PAGES = 1 << 20  # of which the sum of a range is taken at once: 8 MB

Numbers = npt.NDArray[np.int64]
Sums = npt.NDArray[np.uint64]


def _random(numbers: npt.NDArray[np.uint64]) -> Sums:
    """Of each number another one, the same in every process (splitmix64)."""
    mixed = numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


_COLUMN = _random(np.arange(_PLACES, dtype=np.uint64) + np.uint64(1 << 63))
_BEFORE = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_COLUMN, dtype=np.uint64)])
_WHOLE = _BEFORE[-1:]  # of a page


def _row(pages: Numbers) -> Sums:
    """Odd, so that nothing is lost of what it is multiplied with."""
    return _random(pages.astype(np.uint64)) | np.uint64(1)


def numbers_of(indices: Numbers) -> Sums:
    """The number of each index, of which sums are made."""
    numbers: Sums = _row(indices >> SHIFT) * _COLUMN[indices & (_PLACES - 1)]
    return numbers


def sum_of(indices: Numbers) -> int:
    """The sum of a multiset.

    >>> sum_of(np.arange(5000)) == sum_of_range(0, 5000)
    True
    """
    return int(numbers_of(indices).sum(dtype=np.uint64))


def sum_of_range(start: int, stop: int) -> int:
    """The sum of each index from ``start`` to below ``stop``, once."""
    return int(sums_of_ranges(np.array([start]), np.array([stop]))[0])


def sums_of_ranges(starts: Numbers, stops: Numbers) -> Sums:
    """The same of many ranges, none of them negative.

    >>> int(sums_of_ranges(np.array([0, 7]), np.array([7, 9])).sum()) == sum_of_range(0, 9)
    True
    """
    first, last = starts >> SHIFT, stops >> SHIFT
    within = _row(last) * _BEFORE[stops & (_PLACES - 1)]
    within -= _row(first) * _BEFORE[starts & (_PLACES - 1)]
    rows = np.array([*map(_rows_between, first.tolist(), last.tolist())], dtype=np.uint64)
    sums: Sums = rows * _WHOLE + within
    return sums


def _rows_between(first: int, last: int) -> int:
    parts = range(first, last, _MOST_PAGES)
    rows = (_row(np.arange(at, min(at + _MOST_PAGES, last))) for at in parts)
    return sum(int(each.sum(dtype=np.uint64)) for each in rows) & MASK


def _byte_sums() -> Sums:
    """For each byte of a page and each value of it the sum of its bits: a MB."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return _COLUMN.reshape(-1, 8) @ bits.T.astype(np.uint64)  # (bytes of a page, 256)


_tables: list[Sums] = []


def sums_of_bits(pages: Numbers, bits: npt.NDArray[np.uint8]) -> Sums:
    """Of each page of a bitmap the sum of the indices whose bit is set."""
    if not _tables:
        _tables.append(_byte_sums().reshape(-1))
    table, width = _tables[0], bits.shape[1]
    at = np.arange(width) << 8
    out = np.empty(len(bits), np.uint64)
    for first in range(0, len(bits), max(1, _CHUNK // width)):
        some = bits[first : first + max(1, _CHUNK // width)]
        out[first : first + len(some)] = table[at + some].sum(1, dtype=np.uint64)
    return out * _row(pages)


def width_for(length: int) -> int:
    """How many indices a range has of a ladder that reaches up to ``length``.

    >>> width_for(0), width_for(256), width_for(257), width_for(10**9)
    (1, 1, 2, 4194304)
    """
    return 1 << max(0, (max(length, 1) - 1) // RUNGS).bit_length()


@dataclasses.dataclass(eq=False)
class Ladder:
    """Counts and sums of a multiset of indices, 0 or more, by 256 ranges.

    Attributes:
        width: how many indices a range has; a power of two.
        counts: how many indices of the multiset are in each range.
        sums: their sums.
    """

    width: int = 1
    counts: Numbers = dataclasses.field(default_factory=lambda: np.zeros(RUNGS, np.int64))
    sums: Sums = dataclasses.field(default_factory=lambda: np.zeros(RUNGS, np.uint64))

    @classmethod
    def of_range(cls, length: int, width: int) -> Ladder:
        """Each index below ``length`` once, up to where the ladder ends."""
        edges = np.minimum(np.arange(RUNGS + 1, dtype=np.int64) * width, length)
        return cls(width, np.diff(edges), sums_of_ranges(edges[:-1], edges[1:]))

    @property
    def _shift(self) -> int:
        return self.width.bit_length() - 1

    @property
    def count(self) -> int:
        """How many indices there are in all."""
        return int(self.counts.sum())

    def copy(self) -> Ladder:
        """The same, to be changed."""
        return Ladder(self.width, self.counts.copy(), self.sums.copy())

    def add(self, indices: Numbers, sign: int = 1) -> None:
        """Put these in, or with ``sign=-1`` take them out. The ranges grow where need be."""
        if not indices.size:
            return
        self.reach(int(indices.max()) + 1)
        for first in range(0, indices.size, _CHUNK):
            some = indices[first : first + _CHUNK]
            self._put(some >> self._shift, np.ones(some.size, np.int64), numbers_of(some), sign)

    def add_pages(self, pages: Numbers, counts: Numbers, sums: Sums) -> None:
        """Put in whole pages of 4096 indices. The ranges have to be as wide already."""
        self._put((pages << SHIFT) >> self._shift, counts, sums, 1)

    def _put(self, rungs: Numbers, counts: Numbers, sums: Sums, sign: int) -> None:
        np.add.at(self.counts, rungs, counts * sign)
        np.add.at(self.sums, rungs, sums if sign > 0 else np.uint64(0) - sums)

    def merge(self, other: Ladder) -> None:
        """Put in what another one has."""
        self.reach(other.width * RUNGS)
        if other.width < self.width:
            other = other.copy()
            other.reach(self.width * RUNGS)
        self.counts += other.counts
        self.sums += other.sums

    def reach(self, length: int) -> None:
        """Widen the ranges until the last one ends at ``length`` or beyond."""
        width = width_for(length)
        if width <= self.width:
            return
        at = np.arange(RUNGS) * self.width // width
        counts, sums = self.counts, self.sums
        self.width = width
        self.counts, self.sums = np.zeros(RUNGS, np.int64), np.zeros(RUNGS, np.uint64)
        self._put(at, counts, sums, 1)

    def range(self, rung: int) -> tuple[int, int]:
        """Where a range begins and ends."""
        return rung * self.width, (rung + 1) * self.width

    def same(self, other: Ladder) -> bool:
        """Whether both are of one multiset."""
        one, two = Ladder(), Ladder()
        one.merge(self)
        two.merge(other)
        for each in (one, two):
            each.reach(max(one.width, two.width) * RUNGS)
        return bool((one.counts == two.counts).all() and (one.sums == two.sums).all())


class Pages(Protocol):
    """A set of indices as a bitmap in pages of 4096 bits."""

    def whole(self) -> Iterator[tuple[Numbers, npt.NDArray[np.uint8], Numbers]]:
        """Its pages that are not negative, the bytes of each, and how many bits are set."""

    def page(self, number: int) -> npt.NDArray[np.bool_]:
        """The bits of page ``number``."""


class Delivered:
    """What one rank handed over of an epoch: a multiset of indices, 0 or more.

    Args:
        sets: bitmaps, each of which counts once.
        more: further indices.
        less: indices that are among those and were not handed over.
        beyond: further indices that are known by their ladder alone.
    """

    def __init__(
        self,
        sets: Sequence[Pages],
        more: Numbers,
        less: Numbers,
        beyond: Ladder | None = None,
    ) -> None:
        self._sets = sets
        self._more, self._less = np.sort(more), np.sort(less)
        self._beyond = beyond

    def mapped(self, to: Callable[[Numbers], Numbers]) -> Delivered:
        """The same under other indices; ``to`` gives them for an array."""
        assert self.can_be_asked
        held = [self._more]
        for pages, bits, _ in (part for each in self._sets for part in each.whole()):
            for page, row in zip(pages.tolist(), bits, strict=True):
                held.append(np.flatnonzero(np.unpackbits(row, bitorder="little")) + (page << SHIFT))
        return Delivered([], to(np.concatenate(held)), to(self._less))

    @property
    def can_be_asked(self) -> bool:
        """Whether it is known which indices there are in a range: else the ladder alone is."""
        return self._beyond is None or not self._beyond.count

    def ladder(self, length: int = 0) -> Ladder:
        """Its sums, by ranges that reach up to ``length``."""
        out = Ladder(width_for(length))
        for pages, bits, counts in (part for each in self._sets for part in each.whole()):
            self._put(out, pages, bits, counts)
        out.add(self._more)
        if self._beyond is not None:
            out.merge(self._beyond)
        out.add(self._less, -1)
        return out

    @staticmethod
    def _put(out: Ladder, pages: Numbers, bits: npt.NDArray[np.uint8], counts: Numbers) -> None:
        if pages.size and out.width >= _PLACES:
            out.reach((int(pages.max()) + 1) << SHIFT)
            out.add_pages(pages, counts, sums_of_bits(pages, bits))
            return
        for page, row in zip(pages.tolist(), bits, strict=True):
            out.add(np.flatnonzero(np.unpackbits(row, bitorder="little")) + (page << SHIFT))

    def multiplicities(self, start: int, stop: int) -> Numbers:
        """How often each index from ``start`` to below ``stop`` was handed over."""
        out = np.zeros(stop - start, np.int64)
        for each in self._sets:
            for page in range(start >> SHIFT, (stop - 1 >> SHIFT) + 1):
                first = page << SHIFT
                begin, end = max(first, start), min(first + _PLACES, stop)
                out[begin - start : end - start] += each.page(page)[begin - first : end - first]
        for numbers, sign in ((self._more, 1), (self._less, -1)):
            low, high = np.searchsorted(numbers, [start, stop])
            np.add.at(out, numbers[low:high] - start, sign)
        return out

    def sums(self, start: int, stop: int, parts: int) -> tuple[Numbers, Sums]:
        """Counts and sums of a range in so many parts, as :func:`cut` makes them."""
        edges = cut(start, stop, parts)
        counts, sums = np.zeros(parts, np.int64), np.zeros(parts, np.uint64)
        for begin in range(start, stop, _CHUNK):
            times = self.multiplicities(begin, min(begin + _CHUNK, stop))
            at = np.flatnonzero(times)
            part = np.searchsorted(edges, at + begin, side="right") - 1
            np.add.at(counts, part, times[at])
            np.add.at(sums, part, numbers_of(at + begin) * times[at].astype(np.uint64))
        return counts, sums


def cut(start: int, stop: int, parts: int) -> Numbers:
    """The edges of so many parts of a range, as even as can be.

    >>> cut(0, 10, 4).tolist()
    [0, 2, 5, 7, 10]
    """
    return np.array([start + (stop - start) * k // parts for k in range(parts + 1)], np.int64)
