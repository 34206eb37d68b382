"""Which indices came, and how many: bounded sets for the ledger. Runs in: main.

A :class:`IndexSet` lists the few indices of a kind that should be empty. A :class:`Coverage` knows
which indices were drawn, and which more than once, in at most 64 MiB and a million objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt

from safeloader.delivery.indices import Packed, as_array, unpack
from safeloader.introspect.values import Opaque

TALLY_LIMIT = 1_000_000
_FLUSH = 32_768  # indices gathered before the pages are touched: 25 to 150 ns each, not 20 µs
_SHIFT = 12
_PAGE_BITS = 1 << _SHIFT
_PAGES_LIMIT = 1 << 16  # of 512 bytes: 268 million indices without a gap; half as many drawn twice
_INT64 = range(-(1 << 63), 1 << 63)
_NEGATIVE, _POSITIVE, _EVERY = range(-(1 << 51), 0), range(1 << 51), range(-(1 << 51), 1 << 51)
_BIT = (1 << np.arange(8)).astype(np.uint8)

Numbers = npt.NDArray[np.int64]


class IndexSet:
    """Identities of one kind: the first million, and the exact count."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[Any] = []

    def add(self, identities: Iterable[Any]) -> None:
        """Note these."""
        for item in identities:
            self.count += 1
            if len(self._first) < TALLY_LIMIT:
                self._first.append(item)

    def array(self) -> npt.NDArray[Any]:
        """The identities noted, see :func:`as_array`."""
        return as_array(self._first)


class _Pages:
    """A set of int64 as a bitmap, of which only the pages with a bit in them are held."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.left_out = 0  # draws that were not noted, for want of a page
        self._row: dict[int, int] = {}
        self._bits = np.zeros((0, _PAGE_BITS >> 3), dtype=np.uint8)

    def add(self, numbers: Numbers) -> Numbers:
        """Take in ``numbers``, which are sorted; gives those that were there, or come twice."""
        at, bit = self._places(numbers, grow=True)
        there = at >= 0
        if not there.all():
            self.left_out += int(numbers.size - there.sum())
            numbers, at, bit = numbers[there], at[there], bit[there]
        flat = self._bits.reshape(-1)
        again = (flat[at] & bit) != 0
        again[1:] |= numbers[1:] == numbers[:-1]
        np.bitwise_or.at(flat, at, bit)
        repeated: Numbers = numbers[again]
        return repeated

    def has(self, numbers: Numbers) -> npt.NDArray[np.bool_]:
        """Which of ``numbers``, which are sorted, are in the set."""
        at, bit = self._places(numbers)
        found = at >= 0
        found[found] = (self._bits.reshape(-1)[at[found]] & bit[found]) != 0
        return found

    def _places(
        self, numbers: Numbers, *, grow: bool = False
    ) -> tuple[Numbers, npt.NDArray[np.uint8]]:
        """Byte (negative where the page is not held) and bit of each number."""
        pages = numbers >> _SHIFT
        ends = np.append(np.flatnonzero(pages[1:] != pages[:-1]) + 1, pages.size)
        row, wanted = self._row, pages[ends - 1].tolist() if pages.size else []
        if grow:
            for page in wanted:
                if page not in row and len(row) < self._limit:
                    row[page] = len(row)
            if len(row) > len(self._bits):
                size = max(len(row), min(2 * len(self._bits), self._limit))
                # In place where the allocator can: then no second copy is there while it grows.
                self._bits.resize((size, _PAGE_BITS >> 3), refcheck=False)
        rows = np.array([row.get(page, -1) for page in wanted], dtype=np.int64)
        rows = np.repeat(rows << (_SHIFT - 3), np.diff(ends, prepend=0))
        return rows + ((numbers >> 3) & (_PAGE_BITS >> 3) - 1), _BIT[numbers & 7]

    def page(self, number: int) -> npt.NDArray[np.bool_]:
        """The bits of page ``number``."""
        if number not in self._row:
            return np.zeros(_PAGE_BITS, dtype=bool)
        return np.unpackbits(self._bits[self._row[number]], bitorder="little").view(bool)

    def held(self, numbers: range) -> list[int]:
        """The pages held, of ``numbers``, in their order."""
        return sorted(page for page in self._row if page in numbers)

    def pieces(self, numbers: range) -> Iterator[Numbers]:
        """What is in the set, in its order, a page at a time."""
        for page in self.held(numbers):
            yield np.flatnonzero(self.page(page)) + (page << _SHIFT)


class Coverage:
    """Which indices were drawn, and which of them more than once.

    Where the length of the dataset is known, a negative index counts as a visit of the one that it
    stands for, and is shown as it was drawn.

    Example:
        >>> from safeloader.delivery.indices import pack
        >>> coverage = Coverage()
        >>> coverage.add(pack([0, 2, 2, -1]), 4)
        >>> coverage.repeated(5), coverage.unvisited(5)
        ((array([2]), 1), (array([1, 3]), 2))
    """

    def __init__(self) -> None:
        self._pending: list[Packed] = []
        self._pending_count = 0
        self._seen = _Pages(_PAGES_LIMIT)
        self._twice = _Pages(_PAGES_LIMIT >> 1)
        self._other_seen: set[Any] = set()
        self._other_twice: dict[Any, None] = {}
        self._others_left_out = 0

    def add(self, indices: Packed, number: int) -> None:
        """Note a drawn batch of ``number`` indices; hot path, so it only gathers."""
        self._pending.append(indices)
        self._pending_count += number
        if self._pending_count > _FLUSH:
            self._flush()

    def _flush(self) -> None:
        pending, number = self._pending, self._pending_count
        self._pending, self._pending_count = [], 0
        try:
            self._map(pending)
        except BaseException:  # an interrupt: how far it came is not known
            self._seen.left_out += number
            raise

    def _map(self, pending: list[Packed]) -> None:
        numbers = b"".join(item for item in pending if type(item) is bytes)
        mixed = [each for item in pending if type(item) is not bytes for each in unpack(item)]
        if mixed:
            fits = [type(each) is int and each in _INT64 for each in mixed]
            numbers += np.array(list(compress(mixed, fits)), dtype=np.int64).tobytes()
            self._note_others(each for each, fit in zip(mixed, fits, strict=True) if not fit)
        if numbers:
            in_order = np.frombuffer(numbers, dtype=np.int64)
            if (in_order[1:] < in_order[:-1]).any():
                in_order = np.sort(in_order)
            self._twice.add(self._seen.add(in_order))

    def _note_others(self, identities: Iterable[Any]) -> None:
        for item in identities:
            if type(item) is Opaque:  # two of them need not be one
                continue
            try:
                if item in self._other_seen:
                    if len(self._other_twice) < TALLY_LIMIT:
                        self._other_twice[item] = None
                elif len(self._other_seen) < TALLY_LIMIT:
                    self._other_seen.add(item)
                else:
                    self._others_left_out += 1
            except Exception:  # an __eq__ of the user's that raises
                self._others_left_out += 1

    @property
    def unmapped(self) -> int:
        """How many draws were not noted: the indices were too many, or too far apart."""
        self._flush()
        return self._others_left_out + self._seen.left_out + self._twice.left_out

    def repeated(self, length: int | None) -> tuple[npt.NDArray[Any], int]:
        """Indices drawn more than once: the first million in their order, and how many."""
        self._flush()
        numbers, number = _listed(self._repeated(length))
        if self._other_twice:
            numbers = as_array([*numbers.tolist(), *self._other_twice])
        return numbers, number + len(self._other_twice)

    def _repeated(self, length: int | None) -> Iterator[Numbers]:
        for piece in self._seen.pieces(_NEGATIVE):
            again = self._twice.has(piece)
            if length is not None:
                again |= (piece >= -length) & self._seen.has(piece + length)
            yield piece[again]
        yield from self._twice.pieces(_POSITIVE)

    def unvisited(self, length: int | None) -> tuple[Numbers, int]:
        """Indices in ``range(length)`` never drawn: the first million in their order, and how many.

        None where that is not known: without a length, where indices are names rather than numbers,
        and where some were not noted.
        """
        self._flush()
        names_only = self._other_seen and not self._seen.held(_EVERY)
        if length is None or names_only or self._seen.left_out:
            return np.empty(0, dtype=np.int64), 0
        negative = _Pages(_PAGES_LIMIT)
        for piece in self._seen.pieces(_NEGATIVE):
            negative.add(piece[piece >= -length] + length)
        within = range(-(-length >> _SHIFT))

        def visited(page: int) -> npt.NDArray[np.bool_]:
            drawn = self._seen.page(page) | negative.page(page)
            return drawn[: length - (page << _SHIFT)]

        held = {*self._seen.held(within), *negative.held(within)}
        number = length - sum(int(np.count_nonzero(visited(page))) for page in held)
        gaps = (np.flatnonzero(~visited(page)) + (page << _SHIFT) for page in within)
        return _listed(gaps, number)[0], number


def _listed(pieces: Iterator[Numbers], known: int | None = None) -> tuple[Numbers, int]:
    """The first million of the numbers in ``pieces``, and how many, unless that is known."""
    found, total = [np.empty(0, dtype=np.int64)], 0
    for piece in pieces:
        if total < TALLY_LIMIT:
            found.append(piece)
        total += piece.size
        if known is not None and total >= min(known, TALLY_LIMIT):
            break
    return np.concatenate(found)[:TALLY_LIMIT], total
