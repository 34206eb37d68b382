"""Which indices, and how many: bounded notebooks for the ledger; runs in main, pure.

A :class:`Tally` lists the few indices of a kind that should be empty. A :class:`Coverage` is a
bitmap over the dataset: which indices were drawn, and which more than once, at two bits an index
(250 MB for a billion), so that nothing here grows faster than that.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt

from safeloader.wire.indices import Opaque, Packed, as_array, unpack

TALLY_LIMIT = 1_000_000
_COVERAGE_LIMIT = 1 << 31  # indices at or above are counted, not mapped: 256 MiB of bits at most
_FLUSH = 16_384  # indices gathered before the bitmap is touched: 5 to 20 ns each instead of 5 µs
_SLOTS = 1 << 17
_BITS = (1 << np.arange(8)).astype(np.uint8)


class Tally:
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


class Coverage:
    """Which indices were drawn, and which of them more than once.

    Example:
        >>> from safeloader.wire.indices import pack
        >>> coverage = Coverage()
        >>> coverage.add(pack([0, 2, 2]))
        >>> coverage.repeated().tolist(), coverage.unvisited(4).tolist()
        ([2], [1, 3])
    """

    def __init__(self) -> None:
        self.drawn = 0
        self._pending: list[Packed] = []
        self._pending_count = 0
        self._seen = np.zeros(0, dtype=np.uint8)
        self._twice = np.zeros(0, dtype=np.uint8)
        self._other_seen: set[Any] = set()
        self._other_twice: dict[Any, None] = {}
        self.unmapped = 0

    def add(self, indices: Packed) -> None:
        """Note a drawn batch; hot path, so it only gathers."""
        number = len(indices) >> 3 if type(indices) is bytes else len(indices)
        self.drawn += number
        self._pending.append(indices)
        self._pending_count += number
        if self._pending_count > _FLUSH:
            self._flush()

    def _flush(self) -> None:
        pending, self._pending, self._pending_count = self._pending, [], 0
        numbers = b"".join(item for item in pending if type(item) is bytes)
        mixed = [each for item in pending if type(item) is not bytes for each in unpack(item)]
        if mixed:
            fits = [type(each) is int and 0 <= each < _COVERAGE_LIMIT for each in mixed]
            numbers += np.array(list(compress(mixed, fits)), dtype=np.int64).tobytes()
            self._note_others(each for each, fit in zip(mixed, fits, strict=True) if not fit)
        if numbers:
            self._map(np.frombuffer(numbers, dtype=np.int64))

    def _map(self, indices: npt.NDArray[np.int64]) -> None:
        fits = (indices >= 0) & (indices < _COVERAGE_LIMIT)
        if not fits.all():
            self._note_others(indices[~fits].tolist())
            indices = indices[fits]
            if not indices.size:
                return
        needed = (int(indices.max()) >> 3) + 1
        if needed > self._seen.size:
            size = max(needed, 2 * self._seen.size)
            self._seen = _grown(self._seen, size)
            self._twice = _grown(self._twice, size)
        if needed <= indices.size:
            self._map_densely(indices, needed)
            return
        byte, bit = indices >> 3, _BITS[indices & 7]
        again = indices[(self._seen[byte] & bit) != 0]
        np.bitwise_or.at(self._seen, byte, bit)
        again = np.concatenate([again, _duplicates(indices)])
        if again.size:
            np.bitwise_or.at(self._twice, again >> 3, _BITS[again & 7])

    def _map_densely(self, indices: npt.NDArray[np.int64], needed: int) -> None:
        """The same by whole bytes: three times as fast where many indices fall into few bytes."""
        times = np.bincount(indices, minlength=needed << 3)
        drawn = np.packbits(times > 0, bitorder="little")[:needed]
        again = self._seen[:needed] & drawn
        if times.max() > 1:
            again |= np.packbits(times > 1, bitorder="little")[:needed]
        self._seen[:needed] |= drawn
        self._twice[:needed] |= again

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
                    self.unmapped += 1
            except Exception:  # an __eq__ of the user's that raises
                self.unmapped += 1

    def repeated(self) -> npt.NDArray[Any]:
        """Indices drawn more than once; the first million."""
        self._flush()
        numbers = _set_bits(self._twice, TALLY_LIMIT)
        if not self._other_twice:
            return numbers
        return as_array([*numbers.tolist(), *self._other_twice])

    def repeated_count(self) -> int:
        """How many indices were drawn more than once."""
        self._flush()
        return _popcount(self._twice) + len(self._other_twice)

    def unvisited(self, length: int | None) -> npt.NDArray[Any]:
        """Indices in ``range(length)`` never drawn; the first million. Empty for other indices."""
        self._flush()
        if length is None or self._only_others():
            return np.empty(0, dtype=np.int64)
        return _unset_bits(self._seen, TALLY_LIMIT, length)

    def unvisited_count(self, length: int | None) -> int:
        """How many indices in ``range(length)`` were never drawn."""
        self._flush()
        if length is None or self._only_others():
            return 0
        return length - _popcount(self._seen, length)

    def _only_others(self) -> bool:
        """Whether indices are names rather than numbers: their range is then unknown."""
        return not self._seen.size and bool(self._other_seen)


def _duplicates(indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Values that occur more than once; a sort, but of the few that a small hash cannot clear.

    Every position is written to its value's slot. Who finds himself there last shared the slot with
    none behind him; the values of all others are sorted.
    """
    positions = np.arange(indices.size, dtype=np.int32)
    slot = indices & (_SLOTS - 1)
    last = np.empty(_SLOTS, dtype=np.int32)
    last[slot] = positions
    overwritten = last[slot] != positions
    if not overwritten.any():
        return indices[:0]
    shared = np.zeros(_SLOTS, dtype=bool)
    shared[slot[overwritten]] = True
    values, times = np.unique(indices[shared[slot]], return_counts=True)
    return values[times > 1]


def _grown(bits: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    out = np.zeros(size, dtype=np.uint8)
    out[: bits.size] = bits
    return out


_PIECE_BYTES = 1 << 17  # bits are unpacked a piece at a time, so that no array is huge


def _set_bits(bits: npt.NDArray[np.uint8], limit: int) -> npt.NDArray[np.int64]:
    """Numbers of the set bits, the first ``limit``."""
    found: list[npt.NDArray[np.int64]] = []
    total = 0
    for start in range(0, bits.size, _PIECE_BYTES):
        piece = np.unpackbits(bits[start : start + _PIECE_BYTES], bitorder="little")
        found.append(np.flatnonzero(piece) + (start << 3))
        total += found[-1].size
        if total >= limit:
            break
    return np.concatenate(found)[:limit] if found else np.empty(0, dtype=np.int64)


def _unset_bits(bits: npt.NDArray[np.uint8], limit: int, length: int) -> npt.NDArray[np.int64]:
    """Numbers below ``length`` whose bit is not set, the first ``limit``."""
    found: list[npt.NDArray[np.int64]] = []
    total = 0
    for start in range(0, length, _PIECE_BYTES << 3):
        stop = min(start + (_PIECE_BYTES << 3), length)
        piece = np.zeros(stop - start, dtype=np.uint8)
        held = np.unpackbits(bits[start >> 3 : (stop + 7) >> 3], bitorder="little")
        held = held[: stop - start]
        piece[: held.size] = held
        found.append(np.flatnonzero(piece == 0) + start)
        total += found[-1].size
        if total >= limit:
            break
    return np.concatenate(found)[:limit] if found else np.empty(0, dtype=np.int64)


def _popcount(bits: npt.NDArray[np.uint8], length: int | None = None) -> int:
    """How many bits are set, of the first ``length``."""
    if length is not None and length < bits.size << 3:
        last = int(bits[length >> 3]) & ((1 << (length & 7)) - 1)
        return _popcount(bits[: length >> 3]) + last.bit_count()
    pieces = range(0, bits.size, _PIECE_BYTES)
    return sum(int(_ONES[bits[at : at + _PIECE_BYTES]].sum(dtype=np.int64)) for at in pieces)


_ONES = np.array([number.bit_count() for number in range(256)], dtype=np.uint8)
