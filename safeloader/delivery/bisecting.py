"""Which indices it is, where the ranks' sums differ: asked for in rounds. Runs in: main.

Pure: how the ranks tell each other is the caller's. A round asks all ranks for the same ranges, by
what all of them know: a wide range in some thousand parts, of which each gives count and sum;
narrow ones index by index. What a rank says in a round is 64 kB at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from safeloader.delivery.ladder import Delivered, cut
from safeloader.delivery.merging import IndexRange, Merging
from safeloader.delivery.rank_stores import VALUE_BYTES

HEAD_BYTES = 8  # that the caller may put before what is said
ROUNDS_MAX = 400
_PARTS = (VALUE_BYTES - HEAD_BYTES) // 16  # of which a round tells count and sum
_SINGLE = VALUE_BYTES - HEAD_BYTES  # indices of which a round tells how often each came
_OFTEN = 255


class Asks(Protocol):
    """How all ranks are asked."""

    def exchange(self, say: Callable[[Delivered], bytes], size: int) -> dict[int, bytes] | None:
        """What each rank says, by rank; ``size`` bytes of each. None where that has to end."""


def resolve(asks: Asks, merging: Merging) -> None:
    """Ask until each index is known, or for 400 rounds; what is left stays in ``merging.todo``.

    Where it would take more rounds, it ends once as many indices are named as an audit lists.
    """
    left, merging.todo = sorted(merging.todo), []
    for number in range(ROUNDS_MAX):
        if not left:
            break
        wide = sum(each.stop - each.start for each in left) > _SINGLE * (ROUNDS_MAX - number)
        if wide and merging.lists_are_full:
            merging.remarks.append("these are too many to ask for each; the first are named")
            break
        some, rest = _next(left)
        narrow = sum(each.stop - each.start for each in some) <= _SINGLE
        if not (_single if narrow else _in_parts)(asks, merging, some):
            break
        left, merging.todo = sorted(rest + merging.todo), []
    merging.todo = left


def _next(left: list[IndexRange]) -> tuple[list[IndexRange], list[IndexRange]]:
    """The ranges to ask for now: as many as a round tells index by index, or a wide one."""
    width = number = 0
    for each in left:
        width += each.stop - each.start
        if width > _SINGLE:
            break
        number += 1
    return left[: max(1, number)], left[max(1, number) :]


def _single(asks: Asks, merging: Merging, ranges: list[IndexRange]) -> bool:
    """Ask how often each index came, up to 255 times; whether all ranks said so."""

    def say(mine: Delivered) -> bytes:
        each = [mine.multiplicities(part.start, part.stop) for part in ranges]
        return np.concatenate(each).clip(0, _OFTEN).astype(np.uint8).tobytes()

    told = asks.exchange(say, sum(each.stop - each.start for each in ranges))
    if told is None:
        return False
    at = 0
    for start, stop, *_ in ranges:
        size = stop - start
        times = {rank: np.frombuffer(raw, np.uint8, size, at) for rank, raw in told.items()}
        merging.add_times(start, {rank: each.astype(np.int64) for rank, each in times.items()})
        at += size
    return True


def _in_parts(asks: Asks, merging: Merging, ranges: list[IndexRange]) -> bool:
    """Ask for counts and sums of the parts of a wide range; whether all ranks said so."""
    ((start, stop, *_),) = ranges
    number = min(_PARTS, stop - start)

    def say(mine: Delivered) -> bytes:
        counts, sums = mine.sums(start, stop, number)
        return counts.astype("<i8").tobytes() + sums.astype("<u8").tobytes()

    told = asks.exchange(say, 16 * number)
    if told is None:
        return False
    edges = cut(start, stop, number).tolist()
    of_rank = {
        rank: (
            np.frombuffer(raw, "<i8", number).tolist(),
            np.frombuffer(raw, "<u8", number, 8 * number).tolist(),
        )
        for rank, raw in told.items()
    }
    for k in range(number):
        said = {rank: (counts[k], sums[k]) for rank, (counts, sums) in of_rank.items()}
        if merging.differs(edges[k], edges[k + 1], said):
            merging.add_range(edges[k], edges[k + 1], said)
    return True
