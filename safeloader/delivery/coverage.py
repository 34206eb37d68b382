"""Which indices came, and how many: bounded sets for the ledger. Runs in: main.

An :class:`IndexSet` lists the few indices of a kind that should be empty. A :class:`Coverage` knows
which indices were drawn, and which more than once, in at most 64 MiB and a million objects; in up
to 160 MiB where a dataset is said to have more samples than that has room for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt

from safeloader.delivery.indices import Packed, as_array, count
from safeloader.delivery.ladder import Delivered, Ladder
from safeloader.introspect.values import Opaque

TALLY_LIMIT = 1_000_000
_FLUSH = 32_768  # indices gathered before the pages are touched: 20 to 50 ns each, not 200 µs
_FEW = 8  # batches: to put these together takes longer than their bytes are worth
_SHIFT = 12
_PAGE_BITS = 1 << _SHIFT
_PAGE_BYTES = _PAGE_BITS >> 3
_PAGES_LIMIT = 1 << 16  # of 512 bytes: 268 million indices without a gap; half as many drawn twice
_PAGES_MOST = 1 << 18  # of a dataset of a thousand million samples
_NEAR = 1 << 15
_INT64 = range(-(1 << 63), 1 << 63)
_NEGATIVE, _POSITIVE = range(-(1 << 51), 0), range(1 << 51)
_NO_PAGE = -(1 << 63)
_BIT = (1 << np.arange(8)).astype(np.uint8)

Numbers = npt.NDArray[np.int64]
Listed = tuple[npt.NDArray[Any], int]  # the first million of a class, and how many there are


class IndexSet:
    """Identities of one kind: the first million, and the exact count."""

    # Of the eleven that an epoch begins with, most stay empty.
    count = 0
    _first: Sequence[Any] = ()

    def add(self, identities: Iterable[Any]) -> None:
        """Note these."""
        items = list(identities)
        self.count += len(items)
        room = TALLY_LIMIT - len(self._first)
        if isinstance(self._first, list):
            self._first += items[:room]
        elif items:
            self._first = items[:room]

    def first(self, most: int) -> list[Any]:
        """The first of them."""
        return list(self._first[:most])

    def array(self) -> npt.NDArray[Any]:
        """The identities noted, see :func:`as_array`."""
        return as_array(self._first)


class _Further:
    """What two bitmaps do not tell: visits from the third on, and those that found no page.

    The first million are held. Of the others the sums are, if they are not negative.
    """

    def __init__(self) -> None:
        self.held: list[Numbers] = []
        self._room = TALLY_LIMIT
        self.beyond: Ladder | None = None  # 4 kB, which hardly an epoch needs
        self.unknown = 0

    def add(self, numbers: Numbers) -> None:
        """Take in these."""
        if not numbers.size:
            return
        rest = numbers
        if self._room:
            self.held.append(numbers[: self._room])
            rest = numbers[self._room :]
            self._room -= self.held[-1].size
        if rest.size:
            self.beyond = self.beyond or Ladder()
            self.beyond.add(rest[rest >= 0])
        self.unknown += int((rest < 0).sum())


class _Pages:
    """A set of int64 as a bitmap, of which only the pages with a bit in them are held."""

    def __init__(self, limit: int, further: _Further | None = None) -> None:
        self.limit = limit
        self._further = further
        self.left_out = 0  # draws that were not noted, for want of a page
        self.row: dict[int, int] = {}  # of each page that is held
        self._bits = np.zeros((0, _PAGE_BYTES), dtype=np.uint8)
        # Of each page the row, where its last bits say: what numpy finds without asking the dict.
        # Made for the first number: most of an empty set's bytes, and of the time to make one.
        self._near: Numbers | None = None
        self._near_row: npt.NDArray[np.int32]

    def add(self, numbers: Numbers) -> Numbers:
        """Take in ``numbers``; gives those that were there before, or come again among them.

        One for each visit after the first.
        """
        if not numbers.size:  # as of what was drawn twice, as a rule
            return numbers
        at, bit = self._bytes_of(numbers, grow=True), _BIT[numbers & 7]
        there = at >= 0
        if not there.all():
            self.left_out += int(numbers.size - there.sum())
            if self._further is not None:
                self._further.add(numbers[~there])
            numbers, at, bit = numbers[there], at[there], bit[there]
        flat = self._bits.reshape(-1)
        again = (flat[at] & bit) != 0
        # Of numbers in one byte the last one wins here; neighbours in their order are kept apart.
        for k in range(8):
            flat[at[k::8]] |= bit[k::8]
        lost = np.flatnonzero((flat[at] & bit) == 0)
        np.bitwise_or.at(flat, at[lost], bit[lost])
        if not again.any():
            return np.concatenate([numbers[:0], *_twice(numbers)])
        return np.concatenate([numbers[again], *_twice(numbers[~again])])

    def has_room_for(self, number: int) -> bool:
        """Whether so many numbers find a page each, whatever they are."""
        return len(self.row) + number <= self.limit

    def has(self, numbers: Numbers) -> npt.NDArray[np.bool_]:
        """Which of ``numbers`` are in the set."""
        at = self._bytes_of(numbers)
        found = at >= 0
        found[found] = (self._bits.reshape(-1)[at[found]] & _BIT[numbers[found] & 7]) != 0
        return found

    def _bytes_of(self, numbers: Numbers, *, grow: bool = False) -> Numbers:
        """In which byte the bit of each number is; negative where its page is not held."""
        if self._near is None:
            if not grow:
                return np.full(numbers.size, -1)
            self._near_row = np.zeros(_NEAR, dtype=np.int32)
            self._near = np.full(_NEAR, _NO_PAGE)
        pages = numbers >> _SHIFT
        slot = pages & (_NEAR - 1)
        rows = self._near_row[slot]
        far = np.flatnonzero(self._near[slot] != pages)
        if far.size:
            rows[far] = self._rows(pages[far], self._near, grow=grow)
        at: Numbers = rows * _PAGE_BYTES + ((numbers >> 3) & (_PAGE_BYTES - 1))
        return at

    def _rows(self, pages: Numbers, near: Numbers, *, grow: bool) -> npt.NDArray[np.int32]:
        """The row of each page, -1 where it is not held."""
        runs = np.append(np.flatnonzero(pages[1:] != pages[:-1]), pages.size - 1)
        wanted, row = np.unique(pages[runs]), self.row
        if grow:
            new = [page for page in wanted.tolist() if page not in row][: self.limit - len(row)]
            number = len(row) + len(new)
            if number > len(self._bits):
                size = max(number, min(2 * len(self._bits), self.limit))
                # In place where the allocator can: then no second copy is there while it grows.
                self._bits.resize((size, _PAGE_BYTES), refcheck=False)
            row.update(zip(new, range(len(row), number), strict=True))
        rows = np.array([row.get(page, -1) for page in wanted.tolist()], dtype=np.int32)
        held = rows >= 0
        slot = wanted[held] & (_NEAR - 1)
        near[slot], self._near_row[slot] = wanted[held], rows[held]
        return rows[np.searchsorted(wanted, pages)]

    def page(self, number: int) -> npt.NDArray[np.bool_]:
        """The bits of page ``number``."""
        if number not in self.row:
            return np.zeros(_PAGE_BITS, dtype=bool)
        return np.unpackbits(self._bits[self.row[number]], bitorder="little").view(bool)

    def counted(self) -> tuple[Numbers, Numbers]:
        """The pages held, and how many numbers each has."""
        pages = np.fromiter(self.row, dtype=np.int64, count=len(self.row))
        return pages, _ones(self._bits[: pages.size])  # rows are given out in their order

    def whole(self) -> Iterator[tuple[Numbers, npt.NDArray[np.uint8], Numbers]]:
        """The pages that are not negative, the bytes of each and how many of their bits are set."""
        pages, ones = self.counted()
        wanted = np.flatnonzero(pages >= 0)
        for first in range(0, wanted.size, 1024):
            rows = wanted[first : first + 1024]
            yield pages[rows], self._bits[rows], ones[rows]

    def held(self, numbers: range) -> list[int]:
        """The pages held, of ``numbers``, in their order."""
        return sorted(page for page in self.row if page in numbers)

    def pieces(self, numbers: range) -> Iterator[Numbers]:
        """What is in the set, in its order, a page at a time."""
        for page in self.held(numbers):
            yield np.flatnonzero(self.page(page)) + (page << _SHIFT)


_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)


def _ones(bits: npt.NDArray[np.uint8]) -> Numbers:
    """How many bits are set in each row."""
    count_bits = getattr(np, "bitwise_count", None)  # from NumPy 2 on
    pieces = [bits[at : at + 1024] for at in range(0, len(bits), 1024)]  # half a MB each
    each = [_ONES[p] if count_bits is None else count_bits(p.view(np.uint64)) for p in pieces]
    ones = [piece.sum(1, dtype=np.int64) for piece in each]
    return np.concatenate([np.empty(0, dtype=np.int64), *ones])


def _twice(numbers: Numbers) -> tuple[Numbers, ...]:
    """Values that occur more than once; sorts only the few that a small hash cannot clear.

    Each value has a slot, in which every occurrence writes where it stands; the last one stays. All
    earlier ones of the same value are repeats. What is left shared its slot with another value.
    """
    if (numbers[1:] > numbers[:-1]).all():
        return ()
    order = np.arange(numbers.size, dtype=np.int32)
    slots = 2 << numbers.size.bit_length()
    slot = numbers & (slots - 1)
    last = np.empty(slots, dtype=np.int32)
    last[slot] = order
    stayed = last[slot]
    others = np.flatnonzero(stayed != order)
    values = numbers[others]
    repeats = numbers[stayed[others]] == values
    rest = np.sort(values[~repeats])
    return values[repeats], rest[1:][rest[1:] == rest[:-1]]


class Coverage:
    """Which indices were drawn, and which of them more than once.

    Where the length of the dataset is known, a negative index counts as a visit of the one that it
    stands for, and is shown as it was drawn.

    Attributes:
        waiting: batches drawn that are not in the pages yet.
        room: how many indices may still wait.
        interrupted: whether an interrupt struck as some were taken in: they are not known then.

    Example:
        >>> from safeloader.delivery.indices import pack
        >>> coverage = Coverage()
        >>> coverage.add(pack([0, 2, 2, -1]))
        >>> coverage.repeated(5), coverage.unvisited(5)
        ((array([2]), 1), (array([1, 3]), 2))
    """

    # With what an epoch begins.
    room = _FLUSH
    interrupted = _taken_in = False
    _others_left_out = 0

    def __init__(self) -> None:
        self.waiting: list[Packed] = []
        self._limit = _PAGES_LIMIT

    # Made as the first are taken in: in an epoch of a few batches, when somebody reads the audit.

    @functools.cached_property
    def _further(self) -> _Further:
        return _Further()

    @functools.cached_property
    def _seen(self) -> _Pages:
        return _Pages(self._limit, self._further)

    @functools.cached_property
    def _twice(self) -> _Pages:
        return _Pages(_PAGES_LIMIT >> 1, self._further)

    @functools.cached_property
    def _other_seen(self) -> set[Any]:
        return set()

    @functools.cached_property
    def _other_twice(self) -> dict[Any, None]:
        return {}

    @property
    def _all_waits(self) -> bool:
        """Whether nothing was taken in, and all that waits are numbers."""
        return not self._taken_in and {*map(type, self.waiting)} <= {bytes}

    def add(self, indices: Packed) -> None:
        """Note drawn indices. (On the hot path the ledger does this itself.)"""
        self.room -= count(indices)
        self.waiting.append(indices)
        if self.room < 0:
            self.flush()

    def flush(self) -> None:
        """Take in what is waiting."""
        waiting = self.waiting
        self._taken_in |= bool(waiting)
        self.waiting, self.room = [], _FLUSH
        try:
            numbers = b"".join(item for item in waiting if type(item) is bytes)
            mixed = [each for item in waiting if type(item) is not bytes for each in item]
            fits = [type(each) is int and each in _INT64 for each in mixed]
            numbers += np.array([*compress(mixed, fits)], dtype=np.int64).tobytes()
            self._note_others(each for each, fit in zip(mixed, fits, strict=True) if not fit)
            if numbers:
                again = self._seen.add(np.frombuffer(numbers, dtype=np.int64))
                self._further.add(self._twice.add(again))
        except BaseException:  # an interrupt: how far it came is not known
            self.interrupted = True
            self._seen.left_out += sum(map(count, waiting))
            raise

    def _note_others(self, identities: Iterable[Any]) -> None:
        for item in identities:
            if type(item) is Opaque:  # two of them need not be one
                continue
            try:
                if item in self._other_seen:
                    self._other_twice[item] = None
                elif len(self._other_seen) < TALLY_LIMIT:
                    self._other_seen.add(item)
                else:
                    self._others_left_out += 1
            except Exception:  # an __eq__ of the user's that raises
                self._others_left_out += 1

    def expect(self, length: int) -> None:
        """A dataset of this length is drawn from: the map has room for it, within a bound."""
        self._limit = max(_PAGES_LIMIT, min(-(-length >> _SHIFT), _PAGES_MOST))
        if self._taken_in:
            self._seen.limit = self._limit

    def names(self) -> Iterable[Any] | None:
        """The indices drawn that are no int64; None where some are not known."""
        self.flush()
        return None if self._others_left_out else self._other_seen

    def multiset(self, length: int | None, less: Numbers, more: Numbers) -> Delivered | None:
        """What was drawn, without ``less`` and with ``more``; None where that is not known.

        An index that is no int64 is left out. A negative one is the one that it stands for.
        """
        self.flush()
        negative = [*self._seen.pieces(_NEGATIVE), *self._twice.pieces(_NEGATIVE)]
        held = [*self._further.held, more]
        numbers = np.concatenate([*negative, *held])
        if length is not None:
            numbers = np.where(numbers < 0, numbers + length, numbers)
            less = np.where(less < 0, less + length, less)
        below = bool(numbers.size and numbers.min() < 0) or bool(less.size and less.min() < 0)
        if below or self.interrupted or self._further.unknown:
            return None
        return Delivered([self._seen, self._twice], numbers, less, self._further.beyond)

    def compact(self) -> bool:
        """Hold what waits as one piece; False where there is more than that."""
        if not self._all_waits:
            return False
        if len(self.waiting) <= _FEW:
            return True
        pieces = [item for item in self.waiting if type(item) is bytes]
        self.waiting = [b"".join(pieces)]  # a batch of one would take 50 bytes, and not 8
        return True

    @property
    def unmapped(self) -> int:
        """How many draws were not noted: too many, too far apart, or ``interrupted``."""
        waiting = _FLUSH - self.room
        if self._all_waits and waiting <= _PAGES_LIMIT >> 1:
            return 0
        if not (
            all(type(item) is bytes for item in self.waiting)
            and self._seen.has_room_for(waiting)
            and self._twice.has_room_for(waiting)
        ):
            self.flush()  # else that can wait: an epoch of a few batches ends here
        return self._others_left_out + self._seen.left_out + self._twice.left_out

    def repeated(self, length: int | None) -> Listed:
        """Indices drawn more than once: the first million in their order, and how many."""
        self.flush()
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

    def unvisited(self, length: int | None) -> Listed:
        """Indices in ``range(length)`` never drawn: the first million in their order, and how many.

        None where that is not known: without a length, where indices are names rather than numbers,
        and where some were not noted.
        """
        self.flush()
        names_only = self._other_seen and not self._seen.row
        if length is None or names_only or self._seen.left_out:
            return np.empty(0, dtype=np.int64), 0
        within = range(-(-length >> _SHIFT))
        if not self._seen.held(_NEGATIVE):
            return self._gaps(length, within)
        negative = _Pages(_PAGES_LIMIT)
        for piece in self._seen.pieces(_NEGATIVE):
            negative.add(piece[piece >= -length] + length)

        def visited(page: int) -> npt.NDArray[np.bool_]:
            drawn = self._seen.page(page) | negative.page(page)
            return drawn[: length - (page << _SHIFT)]

        held = {*self._seen.held(within), *negative.held(within)}
        number = length - sum(int(np.count_nonzero(visited(page))) for page in held)
        gaps = (np.flatnonzero(~visited(page)) + (page << _SHIFT) for page in within)
        return _listed(gaps, number)[0], number

    def _gaps(self, length: int, within: range) -> Listed:
        """What was never drawn, where no index is negative: all pages are counted at once."""
        last = within[-1] if within else 0
        pages, ones = self._seen.counted()
        of_last = length - (last << _SHIFT)
        number = length - int(ones[(pages >= 0) & (pages < last)].sum())
        number -= int(np.count_nonzero(self._seen.page(last)[:of_last]))
        full = set(pages[ones == _PAGE_BITS].tolist())

        def gaps(page: int) -> Numbers:
            bits = self._seen.page(page)[: length - (page << _SHIFT)]
            return np.flatnonzero(~bits) + (page << _SHIFT)

        return _listed((gaps(page) for page in within if page not in full), number)[0], number


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
