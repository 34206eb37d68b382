"""How often each index of an epoch came, and on which ranks. Runs in: main."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from safeloader.report.chains import Cohort, Piece

Ints = npt.NDArray[np.int64]
_RANKS_OF = 1000  # indices whose ranks are looked for
_COUNTED = 1 << 28  # indices above, and the length of the dataset, are counted one by one


class Counted:
    """What was counted.

    Attributes:
        total: samples handed over.
        distinct: different indices among them.
        within: deliveries of what had come on the same rank.
        across: indices that came on a further rank, once for each such rank.
        twice: indices that came more than once, sorted.
        ranks_of: for the first 1000 of these, the ranks; one that gave it twice is there twice.
        incomplete: why the folder does not hold all indices; empty where it does.
    """

    def __init__(self, length: int | None) -> None:
        self._length = length or 0
        self._seen = np.zeros(self._length, np.uint8)
        self._more: Counter[Any] = Counter()
        self.total = self.within = self.across = 0
        self.twice: list[Any] = []
        self.ranks_of: dict[Any, list[int]] = {}
        self.incomplete = ""

    @property
    def repeats(self) -> int:
        """How many indices came more than once."""
        return len(self.twice)

    @property
    def distinct(self) -> int:
        """How many different indices came."""
        return int(np.count_nonzero(self._seen)) + len(self._more)

    @property
    def never_count(self) -> int:
        """How many indices of the dataset never came; 0 where its indices are no ints."""
        if self._more or self._seen[self._length :].any():
            return 0
        return self._length - int(np.count_nonzero(self._of_dataset))

    @property
    def _of_dataset(self) -> npt.NDArray[np.uint8]:
        return self._seen[: self._length]

    def is_never(self, index: Any) -> bool:
        """Whether an index of the dataset never came."""
        return type(index) is int and 0 <= index < self._length and not self._seen[index]

    def never(self, most: int) -> list[int]:
        """The first indices that never came."""
        found: list[int] = []
        for at in range(0, 0 if self._more else self._length, 1 << 22):
            found += (np.flatnonzero(self._of_dataset[at : at + (1 << 22)] == 0) + at).tolist()
            if len(found) >= most:
                break
        return found[:most]

    def add_rank(self, arrays: Iterator[Ints | list[str]]) -> None:
        """Count what a rank handed over."""
        own = np.zeros(len(self._seen), np.uint8)
        its, count = Counter[Any](), 0
        for array in arrays:
            count += len(array)
            if isinstance(array, list):
                its.update(array)
                continue
            inside = (array >= 0) & (array < max(_COUNTED, self._length))
            if not inside.all():
                its.update(array[~inside].tolist())
                array = array[inside]
            if array.size:
                own = _with_room(own, int(array.max()) + 1)
                values, times = np.unique(array, return_counts=True)
                own[values] = np.minimum(own[values] + times, 255).astype(np.uint8)
        self.total += count
        self._seen = _with_room(self._seen, len(own))
        came = own > 0
        here = len(its) + int(np.count_nonzero(came))
        self.across += int(np.count_nonzero(came & (self._seen > 0)))
        self._seen = np.where(own > 255 - self._seen, np.uint8(255), self._seen + own)
        self.across += sum(1 for index in its if index in self._more)
        self._more.update(its)
        self.within += count - here

    def close(self) -> None:
        """All ranks are counted."""
        self.twice = np.flatnonzero(self._seen > 1).tolist()
        self.twice += sorted((index for index, n in self._more.items() if n > 1), key=str)


def _with_room(counts: npt.NDArray[np.uint8], length: int) -> npt.NDArray[np.uint8]:
    """The same with room for more indices, twice as many as before at least."""
    if length <= len(counts):
        return counts
    more = np.zeros(max(length, 2 * len(counts)), np.uint8)
    more[: len(counts)] = counts
    return more


def counted(cohort: Cohort) -> Counted:
    """Count an epoch, piece by piece: a byte or two for each index of the dataset."""
    found = Counted(None if cohort.stream else cohort.length)
    by_rank: dict[int, list[Piece]] = {}
    for rank, piece in cohort.pieces():
        by_rank.setdefault(rank, []).append(piece)
    shares: dict[Any, int] = {}
    for rank, pieces in by_rank.items():
        if shares.setdefault(_share_of(cohort, rank), rank) == rank:
            found.add_rank(each for piece in pieces for each in _indices(piece))
    found.close()
    found.incomplete = _incomplete(cohort)
    if found.repeats and not cohort.stream and len(by_rank) > 1:
        _name_ranks(found, by_rank)
    return found


def _share_of(cohort: Cohort, rank: int) -> Any:
    """What tells a rank's share: those of one share hand over the same, and count once."""
    part = cohort.parts.get(rank)
    shard = (part.audit or {}).get("shard") if part is not None else None
    if shard is None or shard[1] >= cohort.world or len(cohort.parts) <= shard[1]:
        return "rank", rank
    return "share", shard[0]


def _indices(piece: Piece) -> Iterator[Ints | list[str]]:
    import pyarrow.compute as pc

    where = pc.field("epoch") == piece.epoch
    if piece.end is not None:
        where = where & (pc.field("batch") < piece.end)
    for table in piece.loader.pieces(["epoch", "batch", "indices", "index_text"], where):
        texts = table["index_text"]
        if texts.null_count == table.num_rows:
            for chunk in table["indices"].chunks:
                yield chunk.flatten().to_numpy()
            continue
        for row in table.select(["indices", "index_text"]).to_pylist():
            if row["index_text"] is None:
                yield np.array(row["indices"], np.int64)
            else:
                yield row["index_text"]


def _incomplete(cohort: Cohort) -> str:
    """Why indices of it are not there; its audits say how many were handed over."""
    each: Cohort | None = cohort
    while each is not None:
        for rank, part in each.parts.items():
            if part.loader.damaged:
                return f"rank {rank}: {part.loader.damaged}"
            if (part.loader.path / "dropped.jsonl").exists() and _was_dropped(part):
                return f"rank {rank}: indices of this epoch went for run_max_bytes="
            told = (part.audit or {}).get("batches")
            if told is not None and not (part.audit or {}).get("stream") and part.batches < told:
                return f"rank {rank}: of {told} batches {part.batches} are in the folder"
        each = each.before
    return ""


def _was_dropped(part: Any) -> bool:
    for line in part.loader.lines("dropped.jsonl"):
        epochs = line.get("epochs") or [0, -1]
        if epochs[0] <= part.epoch.epoch <= epochs[1]:
            return True
    return False


def _name_ranks(found: Counted, by_rank: dict[int, list[Piece]]) -> None:
    """Which ranks gave the first of what came more than once."""
    wanted = [index for index in found.twice[:_RANKS_OF] if type(index) is int]
    if not wanted:
        return
    sought = np.array(wanted, np.int64)
    for rank, pieces in by_rank.items():
        for piece in pieces:
            for array in _indices(piece):
                if isinstance(array, list):
                    continue
                for index in array[np.isin(array, sought)].tolist():
                    found.ranks_of.setdefault(index, []).append(rank)
