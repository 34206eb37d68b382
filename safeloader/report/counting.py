"""What the rows of an epoch come to: sums of each rank, how often each index came. Runs in: main.

A sample that stands in for another is no delivery of its own index: it is left out here, as it is
in the accounts of the rank that handed it over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from safeloader.delivery.audit_part import Digests
from safeloader.delivery.ladder import Ladder, width_for
from safeloader.delivery.merging import Merging
from safeloader.report.chains import Cohort, Piece

Ints = npt.NDArray[np.int64]
RANKS_OF = 1000  # indices whose ranks are looked for
_AT_ONCE = 1 << 22  # indices
_BEYOND_MAX = 1 << 20  # different indices above the length of the dataset that are counted


class RankSums(NamedTuple):
    """What the rows of a rank come to.

    Attributes:
        delivered: how many samples it handed over as themselves.
        ladder: their sums; None where indices are no ints.
        digests: of indices that are no ints; None elsewhere.
        beyond: whether an index is not below the length of the dataset.
    """

    delivered: int
    ladder: Ladder | None
    digests: Digests | None
    beyond: bool


class Rows:
    """The rows of an epoch, by rank, with those of the epochs that it went on with.

    Attributes:
        gone: why they are not all in the folder; empty where they are.
    """

    def __init__(self, cohort: Cohort) -> None:
        self._length = cohort.length or 0
        self._by_rank: dict[int, list[Piece]] = {}
        self.gone = why_gone(cohort)
        for rank, piece in cohort.pieces():
            self._by_rank.setdefault(rank, []).append(piece)

    @property
    def ranks(self) -> list[int]:
        """Those that have any."""
        return sorted(self._by_rank)

    def sums(self, rank: int) -> RankSums:
        """Go once over the rows of a rank."""
        ladder, names, count, beyond = Ladder(width_for(self._length)), list[str](), 0, False
        for array in self._indices(rank):
            count += len(array)
            if isinstance(array, list):
                names += array
            elif array.size:
                ladder.add(array[array >= 0])
                beyond |= bool(array.max() >= self._length)
        if names:
            return RankSums(count, None, Digests.of("index", names), False)
        return RankSums(count, ladder, None, beyond)

    def resolve(self, merging: Merging, *, beyond: bool = False) -> None:
        """Name the indices of the ranges in which the sums differ: another time over the rows.

        Args:
            merging: of the sums of these rows. A byte is needed for each index of the dataset.
            beyond: whether any index is not below the length of the dataset.
        """
        if not (merging.todo or beyond) or merging.beneath or merging.length is None:
            return
        ranges, merging.todo = merging.todo, []
        came, more = self._times([each.rank for each in merging.counted], merging.length)
        for start, stop, *_ in ranges:
            for at in range(start, min(stop, merging.length), _AT_ONCE):
                end = min(stop, merging.length, at + _AT_ONCE)
                merging.add_totals(at, came[at:end].astype(np.int64))
        for index, times in sorted(more.items()):
            merging.add_beyond(index, times)
        if len(more) >= _BEYOND_MAX:
            merging.remarks.append(
                f"of the indices that are not below {merging.length} only some were counted"
            )
        unknown = [index for index in merging.twice if index not in merging.by]
        merging.by |= self._ranks_of(sorted(unknown)[:RANKS_OF])

    def _times(
        self, ranks: Sequence[int], length: int
    ) -> tuple[npt.NDArray[np.uint8], Counter[int]]:
        """How often each index of the dataset came, to 255, and each beyond it."""
        came, more = np.zeros(length, np.uint8), Counter[int]()
        for rank in ranks:
            for array in self._indices(rank):
                if isinstance(array, list):
                    continue
                above = array[array >= length]
                if above.size and len(more) < _BEYOND_MAX:
                    more.update(above.tolist())
                values, times = np.unique(array[array < length], return_counts=True)
                came[values] = np.minimum(came[values] + times, 255).astype(np.uint8)
        return came, more

    def _ranks_of(self, indices: list[int]) -> dict[int, tuple[int, ...]]:
        """The ranks that gave these; one that gave it twice is there twice."""
        found: dict[int, list[int]] = {}
        sought = np.array(indices, np.int64)
        for rank in self.ranks if indices else ():
            for array in self._indices(rank):
                if not isinstance(array, list):
                    for index in array[np.isin(array, sought)].tolist():
                        found.setdefault(index, []).append(rank)
        return {index: tuple(ranks) for index, ranks in found.items()}

    def _indices(self, rank: int) -> Iterator[Ints | list[str]]:
        for piece in self._by_rank.get(rank, ()):
            for array in _handed_over(piece):
                if isinstance(array, list) or not array.size or array.min() >= 0:
                    yield array
                else:  # counted from the end, as Python does
                    yield np.where(array < 0, array + self._length, array)


def _handed_over(piece: Piece) -> Iterator[Ints | list[str]]:
    """The indices of the samples that came as themselves, in pieces."""
    import pyarrow.compute as pc

    where = pc.field("epoch") == piece.epoch
    if piece.end is not None:
        where = where & (pc.field("batch") < piece.end)
    stand_ins = _stand_ins(piece)
    for table in piece.loader.pieces(["epoch", "batch", "indices", "index_text"], where):
        for rows in table.to_batches():
            lists, texts = rows.column("indices"), rows.column("index_text")
            gone = _rows_with(rows.column("batch").to_numpy(), stand_ins)
            if texts.null_count == rows.num_rows:
                offsets = lists.offsets.to_numpy() - lists.offsets[0].as_py()
                yield np.delete(
                    lists.flatten().to_numpy(),
                    [offsets[row] + at for row, batch in gone for at in stand_ins[batch]],
                )
                continue
            of_row = dict(gone)
            for row, names in enumerate(texts.to_pylist()):
                values = lists[row].as_py() if names is None else names
                left = stand_ins.get(of_row.get(row, -1), ())
                kept = [each for at, each in enumerate(values) if at not in left]
                yield np.array(kept, np.int64) if names is None else kept


def _rows_with(batches: Ints, wanted: dict[int, set[int]]) -> list[tuple[int, int]]:
    if not wanted:
        return []
    rows = np.flatnonzero(np.isin(batches, list(wanted)))
    return [(row, int(batches[row])) for row in rows.tolist()]


def _stand_ins(piece: Piece) -> dict[int, set[int]]:
    """By batch, the places in it of samples that stand in for others."""
    what: dict[int, dict[int, str]] = {}
    for line in piece.lines.incidents.get(piece.epoch, ()):
        batch, position = line.get("batch"), line.get("position")
        if type(batch) is type(position) is int:
            what.setdefault(batch, {})[position] = str(line.get("what"))
    found: dict[int, set[int]] = {}
    for batch, its in what.items():
        before = 0  # left out, and in no row
        for position in sorted(its):
            if its[position] == "replaced":
                found.setdefault(batch, set()).add(position - before)
            before += its[position] == "skipped"
    return found


def why_gone(cohort: Cohort) -> str:
    """Why rows of it, or of what it went on with, are not in the folder; empty where all are."""
    each: Cohort | None = cohort
    due: dict[int, int] | None = None  # how many batches a later epoch had before its own
    while each is not None:
        for rank, part in each.parts.items():
            if part.loader.damaged:
                return f"rank {rank}: {part.loader.damaged}"
            if not part.loader.info.get("batches", True):
                return f"rank {rank} wrote no batches, as it had no pyarrow"
            if part.epoch.epoch in part.lines.dropped:
                return f"of rank {rank} batches of this epoch went for run_max_bytes="
            told = (part.audit or {}).get("batches")
            if told is not None and part.batches < told:
                return (
                    f"rank {rank} handed over {told} batches, and {part.batches} are in the folder"
                )
            wanted = 0 if due is None else due.get(rank, max(due.values()))
            if part.end < wanted:
                return (
                    f"rank {rank} handed over {wanted} batches before the epoch went on, and "
                    f"{part.end} are in the folder"
                )
        if due is not None and (absent := each.world - len(each.parts)) > 0:
            ranks = f"{absent} of {each.world} ranks"
            return f"of attempt {each.attempt} {ranks} are not in the folder"
        due = {rank: part.first for rank, part in each.parts.items()}
        each = each.before
    return ""
