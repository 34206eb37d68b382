"""The sums of all ranks, held against each index once. Runs in: main.

Pure. Where the sums of a range differ, a narrow one is worked out index by index; one index alone
is found in a wide one too. Of the others it is known how many at least, until somebody asks the
ranks (``rank_groups.py``).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from safeloader.delivery.audit_part import LEFT_OUT, NOT_KNOWN, AuditPart
from safeloader.delivery.ladder import (
    MASK,
    RUNGS,
    Ladder,
    Numbers,
    numbers_of,
    sum_of,
    sum_of_range,
    width_for,
)
from safeloader.delivery.likely_causes import named

LISTED_MAX = 100_000  # indices of a class
SHOWN = 8
_SINGLE_MAX = 1 << 16  # indices of a range that are looked at one by one
_COMBINED_MAX = 1 << 12  # ways to fill a range that are tried
_ENDLESS = 1 << 40  # a dataset of more samples has no length, whatever it says: some have 2**63
_LISTED_AT_ONCE = 1 << 24  # indices of a range that are held one by one
_TRIED_MAX = 1 << 26  # indices in all that are tried one by one

Times = dict[int, Numbers]  # by rank, how often it handed over each index of a range


class IndexRange(NamedTuple):
    """Indices from ``start`` to below ``stop`` of which it is known how many at least.

    Attributes:
        start: the first index.
        stop: one beyond the last.
        never: how many at least came on no rank.
        again: how many deliveries at least there were of indices that had come already.
        ranks: those that handed over any of them.
        twice: how many indices at least came more than once, if no rank has one of its own twice.
        over: how many more came than there are indices; below 0, how many fewer.
    """

    start: int
    stop: int
    never: int
    again: int
    ranks: tuple[int, ...]
    twice: int
    over: int

    def __str__(self) -> str:
        known = ((self.never, "never"), (self.again, "once more than due"))
        said = " and ".join(f"{n} {what}" for n, what in known if n)
        whose = f", and the others by {named(self.ranks)}" if self.ranks else ""
        least = f"at least {said}" if said else "some came in the place of others"
        return f"{self.start} to {self.stop - 1}: {least}{whose}"


class Course(NamedTuple):
    """How an epoch went, where more is known of it than its parts say: by the folder of a run.

    Attributes:
        which: the epoch and its ranks, in words.
        batches: how many each rank handed over, at least.
        open: the ranks that have not closed its books: it goes on there, or was cut off.
        closed: whether each rank has closed them.
        cut_off: whether it was cut off, and nothing went on with it.
        lost: why what came before it is not known; empty as a rule.
        evidence: further lines.
        steps: what to do where it cannot be told; empty where the verdict knows that.
    """

    which: str = ""
    batches: int = 0
    open: tuple[int, ...] = ()
    closed: bool = False
    cut_off: bool = False
    lost: str = ""
    evidence: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()


class Merging:
    """Parts that are put together, and what is known of single indices.

    Args:
        parts: of each rank that is there.
        ranks: those that should be there.
        notes: what is known of why a rank is not, in a sentence each.
        can_ask: whether the ranks can be asked for what their parts do not tell.
        course: how the epoch went, where that is known.

    Attributes:
        parts: of each rank that is there, in their order.
        notes: why a rank is not there, or what it says cannot be read.
        remarks: why indices are not known one by one.
        todo: ranges in which the sums differ, and nobody knows by which indices.
    """

    def __init__(
        self,
        parts: Iterable[AuditPart],
        ranks: Iterable[int],
        notes: Sequence[str] = (),
        *,
        can_ask: bool = False,
        course: Course | None = None,
    ) -> None:
        self._can_ask = can_ask
        self.course = course
        self.parts = sorted(parts, key=lambda each: each.rank)
        self._ranks = sorted({*ranks, *(each.rank for each in self.parts)})
        self.absent = tuple(r for r in self._ranks if r not in {each.rank for each in self.parts})
        self.notes = list(notes)
        self.remarks: list[str] = []
        self.never: list[int] = []
        self.by: dict[int, tuple[int, ...]] = {}  # of each index that came more than once
        self.twice: list[int] = []
        self._never = self._twice = self._again = 0
        self.todo: list[IndexRange] = []
        self._tried = 0
        self.length, self.ladders, self.unknown = self._compared()
        self.once = self._one_of_each_share()
        self.padded = Counter(x for part in self.counted for x in part.padded)
        self.missing = {  # what a rank says it left out, by index
            index: (name, part.rank)
            for part in self.counted
            for name, indices in part.left_out.items()
            for index in indices
        }
        self._missing_times = Counter(
            x for part in self.counted for indices in part.left_out.values() for x in indices
        )
        if self.ladders and self.length is not None:
            self._hold_against_once()

    # what is compared ───────────────────────────────────────────────────────────────────────────

    def _compared(self) -> tuple[int | None, dict[int, Ladder], str]:
        """The length of what is compared, the ladder of each rank, and why there is none."""
        parts = self.parts
        if not parts:
            return None, {}, ""
        for part in parts:
            if part.unknown:
                return part.length, {}, f"{named([part.rank])}: {part.unknown}"
        under = {each.beneath.table for each in parts if each.beneath is not None}
        if len(under) > 1 and all(each.beneath is not None for each in parts):
            lengths = {each.beneath.length for each in parts if each.beneath}
            if len(lengths) == 1 and max(lengths) <= _ENDLESS:
                ladders = {each.rank: each.beneath.ladder for each in parts if each.beneath}
                return lengths.pop(), ladders, ""
        lengths = {each.length for each in parts if each.length is not None}
        if len(lengths) > 1:
            told = ", ".join(f"rank {each.rank}: {each.length}" for each in parts[:SHOWN])
            return (
                None,
                {},
                (
                    f"the ranks' datasets have other lengths ({told}), so one index may be "
                    "another sample on each"
                ),
            )
        some = [each.rank for each in parts if each.beneath is not None]
        if len(under) > 1 or 0 < len(some) < len(parts):
            return None, {}, "the ranks' datasets are other Subsets, so one index is another sample"
        if not lengths or any(each.length is None for each in parts):
            known = all(each.digests is not None for each in parts)
            why = "" if known else "the dataset has no length, so that nobody knows what is due"
            return None, self._local(), why
        length = lengths.pop()
        if length > _ENDLESS:
            why = f"the dataset says that it has {length} samples, which nobody counts"
            return None, {}, why
        return length, self._local(), ""

    def _local(self) -> dict[int, Ladder]:
        return {each.rank: each.ladder for each in self.parts if each.ladder is not None}

    @property
    def beneath(self) -> bool:
        """Whether what is compared are the indices in the dataset under the ranks' Subsets."""
        return any(
            each.beneath is not None and self.ladders.get(each.rank) is each.beneath.ladder
            for each in self.parts
        )

    def _one_of_each_share(self) -> int:
        """How many ranks have each share, where all of them have the same indices; else 1."""
        shards = [each.shard for each in self.parts]
        if self.absent or not all(shards) or len(self.ladders) < len(self.parts):
            return 1
        by_share: dict[int, list[Ladder]] = {}
        for part, shard in zip(self.parts, shards, strict=True):
            assert shard is not None
            by_share.setdefault(shard.rank, []).append(self.ladders[part.rank])
        replicas = {shard.replicas for shard in shards if shard is not None}
        sizes = {len(each) for each in by_share.values()}
        alike = all(each[0].same(other) for each in by_share.values() for other in each[1:])
        if len(replicas) == len(sizes) == 1 and replicas == {len(by_share)} and alike:
            return max(1, sizes.pop())
        return 1

    @property
    def counted(self) -> list[AuditPart]:
        """The parts that are summed up: one of each share."""
        if self.once == 1:
            return self.parts
        first: dict[int, AuditPart] = {}
        for each in self.parts:
            assert each.shard is not None
            first.setdefault(each.shard.rank, each)
        return list(first.values())

    # against each index once ────────────────────────────────────────────────────────────────────

    def _hold_against_once(self) -> None:
        assert self.length is not None
        length = self.length
        ladders = {each.rank: self.ladders[each.rank].copy() for each in self.counted}
        reach = max([width_for(length), *(each.width for each in ladders.values())]) * RUNGS
        for ladder in ladders.values():
            ladder.reach(reach)
        width = reach // RUNGS
        once = Ladder.of_range(length, width)
        counts = np.stack([each.counts for each in ladders.values()])
        sums = np.stack([each.sums for each in ladders.values()])
        unlike = (counts.sum(0) != once.counts) | (sums.sum(0, dtype=np.uint64) != once.sums)
        for rung in np.flatnonzero(unlike).tolist():
            start, stop = once.range(rung)
            told = {
                rank: (int(counts[k, rung]), int(sums[k, rung])) for k, rank in enumerate(ladders)
            }
            self.add_range(start, min(stop, max(length, start + 1)), told)
        if self.todo and not self._can_ask and self._adds_up(once, ladders):
            self._take_their_word()

    def _adds_up(self, once: Ladder, ladders: dict[int, Ladder]) -> bool:
        """Whether all that ranks say they left out, and what is padding, is all that differs."""
        if self.beneath or any(each.left_out_sum is None for each in self.counted):
            return False
        number = sum(each.count for each in ladders.values()) - once.count
        total = sum(int(each.sums.sum(dtype=np.uint64)) for each in ladders.values())
        total -= int(once.sums.sum(dtype=np.uint64))
        for part in self.counted:
            number += sum(part.counts.get(name, 0) for name in LEFT_OUT) - len(part.padded)
            total += (part.left_out_sum or 0) - sum_of(np.array(part.padded, np.int64))
        return number == 0 and total & MASK == 0

    def _take_their_word(self) -> None:
        """What is left are indices that were left out, which are counted and not all named."""
        for start, stop, *_, over in self.todo:
            times = self._told_times(start, stop)
            over -= sum(number - 1 for number in times.values())
            self._note_told(times)
            self._never -= over
        self.todo = []

    def add_range(self, start: int, stop: int, told: dict[int, tuple[int, int]]) -> None:
        """Take in a range by the count and sum of each rank: at once, or to be asked for."""
        times: Times | None = {}
        for rank, (count, total) in told.items():
            found = _filled(start, stop, count, total)
            if found is None:
                times = None
                break
            assert times is not None
            times[rank] = found
        if times is not None:
            self.add_times(start, times)
        elif self._can_ask or not self._alone(start, stop, told):
            self.todo.append(_bounded(start, stop, told))

    def _alone(self, start: int, stop: int, told: dict[int, tuple[int, int]]) -> bool:
        """Whether what the ranks say themselves explains a range, or that and one index more.

        They say what is padding, and what they left out. The one index is found by trying each.
        """
        times = self._told_times(start, stop)
        size = stop - start
        due = sum_of_range(start, stop)
        for index, number in times.items():
            due += (number - 1) * sum_of(np.array([index]))
        over = sum(count for count, _ in told.values()) - size
        over -= sum(number - 1 for number in times.values())
        wanted = sum(total for _, total in told.values()) - due & MASK
        if abs(over) == 1:
            if self._tried + size > _TRIED_MAX:
                return False
            self._tried += size
            numbers = numbers_of(np.arange(start, stop, dtype=np.int64))
            at = np.flatnonzero(numbers == np.uint64(wanted * over & MASK))
            if at.size != 1:
                return False
            index = int(at[0]) + start
            times[index] = times.get(index, 1) + over
        elif over or wanted:
            return False
        if min(times.values(), default=0) < 0:
            return False
        self._note_told(times)
        return True

    def _told_times(self, start: int, stop: int) -> dict[int, int]:
        """How often each index of a range came that ranks name, by what they say of it."""
        return {
            index: 1 + self.padded[index] - self._missing_times[index]
            for index in {*self.padded, *self._missing_times}
            if start <= index < stop
        }

    def _note_told(self, times: dict[int, int]) -> None:
        never = sorted(index for index, number in times.items() if number <= 0)
        self._note_never(np.array(never, np.int64))
        for index in sorted(index for index, number in times.items() if number > 1):
            self._note_twice(index, times[index], ())

    @staticmethod
    def differs(start: int, stop: int, told: dict[int, tuple[int, int]]) -> bool:
        """Whether the counts and sums of a range are not those of each index once."""
        count = sum(count for count, _ in told.values())
        total = sum(total for _, total in told.values()) & MASK
        return count != stop - start or total != sum_of_range(start, stop)

    def add_times(self, start: int, times: Times) -> None:
        """Take in how often each rank handed over each index of a range."""
        assert self.length is not None
        all_of_them = np.stack([*times.values()])
        ranks = [*times]

        def ranks_of(at: int) -> tuple[int, ...]:
            each = all_of_them[:, at].tolist()
            return tuple(r for r, n in zip(ranks, each, strict=True) for _ in range(n))

        self.add_totals(start, all_of_them.sum(0), ranks_of)

    def add_totals(
        self,
        start: int,
        total: Numbers,
        ranks_of: Callable[[int], tuple[int, ...]] = lambda at: (),
    ) -> None:
        """Take in how often all ranks together handed over each index of a range."""
        assert self.length is not None
        total = total[: max(0, self.length - start)]
        self._note_never(np.flatnonzero(total == 0) + start)
        again = np.flatnonzero(total > 1)
        self._twice += again.size
        self._again += int(total[again].sum()) - again.size
        for at in again[: LISTED_MAX - len(self.twice)].tolist():
            self.twice.append(start + at)
            if by := ranks_of(at):
                self.by[start + at] = by

    def add_beyond(self, index: int, times: int) -> None:
        """Take in how often an index came that is not below the length of the dataset."""
        if times > 1:
            self._note_twice(index, times, ())

    def _note_never(self, indices: Numbers) -> None:
        self._never += indices.size
        self.never += indices[: LISTED_MAX - len(self.never)].tolist()

    def _note_twice(self, index: int, times: int, by: tuple[int, ...]) -> None:
        self._twice += 1
        self._again += times - 1
        if len(self.twice) < LISTED_MAX:
            self.twice.append(index)
            if by:
                self.by[index] = by

    # what that comes to ─────────────────────────────────────────────────────────────────────────

    @property
    def world(self) -> int:
        """How many ranks there should be."""
        return len(self._ranks)

    @property
    def purposes(self) -> set[str]:
        """The classes of samplers that nobody knows."""
        known = ("", "replacement", "subset", NOT_KNOWN)
        return {each.purpose for each in self.parts if each.purpose not in known}

    @property
    def differing(self) -> str:
        """A sentence, where the ranks' copies of the dataset hold other samples."""
        if self.beneath:
            return ""
        for path, told in (self.parts[0].contents if self.parts else {}).items():
            for each in self.parts[1:]:
                if each.contents.get(path, told) != told:
                    return (
                        f"{path} is not the same on ranks {self.parts[0].rank} and {each.rank}, so "
                        "one index may be another sample on each"
                    )
        return ""

    @property
    def by_digests(self) -> tuple[int, int, str] | None:
        """Of the samples without a number that were compared: how many are on more than one rank,
        how many there were, and what was compared."""
        told = [each.digests for each in self.parts if each.digests is not None]
        if not told or len(told) < len(self.parts):
            return None
        ends = [int(each.smallest[-1]) for each in told if not each.whole]
        end = np.uint64(min(ends, default=MASK))
        below = np.concatenate([each.smallest[each.smallest <= end] for each in told])
        _, times = np.unique(below, return_counts=True)
        return int((times > 1).sum()), len(times), told[0].kind

    @property
    def lists_are_full(self) -> bool:
        """Whether no more indices are listed than are: of those never, or of those twice."""
        return LISTED_MAX in (len(self.never), len(self.twice))

    def totals(self) -> tuple[int, int]:
        """How many indices came on no rank, and how many deliveries were of one that had come."""
        never = self._never + sum(each.never for each in self.todo)
        return never, self._again + sum(each.again for each in self.todo)

    def numbers_twice(self) -> int:
        """How many indices came more than once, at least."""
        own = ("repeated", "duplicated", "unexpected")
        if any(each.counts.get(name) for each in self.parts for name in own):
            return self._twice + sum(each.again > 0 for each in self.todo)
        return self._twice + sum(each.twice for each in self.todo)


def _filled(start: int, stop: int, count: int, total: int) -> Numbers | None:
    """How often each index of a range is in a multiset; None where that would take long to tell.

    A multiset of none and of all are known at once; of narrow ranges each way to fill is tried.
    """
    size = stop - start
    if size > _LISTED_AT_ONCE:  # some bytes for each index and rank
        return None
    if count == 0:
        return np.zeros(size, np.int64)
    if size == 1:
        return np.array([count], np.int64)
    if size > _SINGLE_MAX:
        return None
    if count == size and total == sum_of_range(start, stop):
        return np.ones(size, np.int64)
    most = min(count, 3)
    if (most + 1) ** size > _COMBINED_MAX:
        most = 1
    if (most + 1) ** size > _COMBINED_MAX:
        return None
    ways = np.array([*itertools.product(range(most + 1), repeat=size)], np.int64)
    ways = ways[ways.sum(1) == count]
    numbers = numbers_of(np.arange(start, stop, dtype=np.int64))
    fits = (ways.astype(np.uint64) * numbers).sum(1, dtype=np.uint64) == np.uint64(total)
    found = ways[fits]
    return found[0] if len(found) == 1 else None


def _bounded(start: int, stop: int, told: dict[int, tuple[int, int]]) -> IndexRange:
    """What is known of a range by counts and sums: ranks of one sum have the same indices."""
    size, count = stop - start, sum(count for count, _ in told.values())
    distinct = min(size, sum(count for count, _ in set(told.values())))
    ranks = tuple(rank for rank, (number, _) in told.items() if number)
    if count == size:  # but others: one is missing, and one came in its place
        distinct = min(distinct, size - 1)
    again = max(0, count - distinct)
    # Of an index there are as many as there are ranks, if none has one of its own twice.
    twice = -(-again // max(1, len(ranks) - 1))
    of_each = Counter(told.values())
    alike = max((count for (count, _), number in of_each.items() if number > 1), default=0)
    return IndexRange(start, stop, size - distinct, again, ranks, max(twice, alike), count - size)
