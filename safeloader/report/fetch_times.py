"""Which samples of a run are slow to fetch, and how all of them spread. Runs in: main.

A sample that was slow once says little: a start, a busy core. So samples go by the median over all
their deliveries. What would not fit into memory is read in several passes, each of a part of the
indices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from safeloader.report.folder import LoaderRecords

SLOW = 10  # times as slow as the middle one: worth a look
PER_DECADE = 40  # classes of the distribution, whose bounds are 10 ** (k / PER_DECADE) ns
_CLASSES = 14 * PER_DECADE  # up to 28 hours
_HELD_MAX = 40_000_000  # samples at once: 12 bytes each, and as much to sort them
_TEXTS = -(1 << 40)  # keys below are of indices that are no ints
_ORDINAL_BITS = 40  # of a stream: worker and rank are above

Ints = npt.NDArray[np.int64]
Times = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class SlowSample:
    """A sample by its fetch times.

    Attributes:
        index: an int; a text where the dataset's indices are no ints; of a stream the ordinal.
        median_ns, longest_ns, shortest_ns: of all its deliveries.
        times: how often it was delivered.
        worker, rank: of a stream, whose ordinal it is; else None.
    """

    index: int | str
    median_ns: float
    longest_ns: float
    shortest_ns: float
    times: int
    worker: int | None = None
    rank: int | None = None


@dataclasses.dataclass
class FetchTimes:
    """The fetch times of one dataset.

    Attributes:
        counts: how many samples took from ``10 ** (k / PER_DECADE)`` ns on, by k.
        longest_ns: the longest of all.
        total_ns: of all together.
        slowest: by median, slowest first.
        distinct: how many indices there were.
        again: how many of them were fetched more than once.
        slow: samples that were over :data:`SLOW` times as slow as the middle one each time, of
            those fetched more than once; where none was, of all.
        slow_ns: what fetching these took.
    """

    counts: Ints
    longest_ns: float = 0.0
    total_ns: float = 0.0
    slowest: list[SlowSample] = dataclasses.field(default_factory=list)
    distinct: int = 0
    again: int = 0
    slow: int = 0
    slow_ns: float = 0.0

    @property
    def samples(self) -> int:
        """How many were delivered."""
        return int(self.counts.sum())

    def quantile_ns(self, share: float) -> float:
        """What this share of the samples took at most, to some 6 parts in 100."""
        ends = np.cumsum(self.counts)
        place = int(np.searchsorted(ends, share * ends[-1])) if self.samples else 0
        return min(float(10 ** ((place + 0.5) / PER_DECADE)), self.longest_ns)

    @property
    def culprit(self) -> SlowSample | None:
        """The slowest of those that were slow each time; None where there is none.

        One that was fetched once, and slow, may be slow or have met a busy machine.
        """
        bound = SLOW * self.quantile_ns(0.5)
        found = [each for each in self.slowest if each.times > 1 and each.shortest_ns > bound]
        return max(found, key=lambda each: each.shortest_ns, default=None)


def fetch_times(
    loaders: list[LoaderRecords], samples: int, most: int, *, stream: bool = False
) -> FetchTimes:
    """Read the fetch times of one dataset.

    Args:
        loaders: all that read it, on all ranks.
        samples: about how many they delivered.
        most: how many of the slowest are wanted.
        stream: whether indices are ordinals within a worker's stream.
    """
    told = FetchTimes(np.zeros(_CLASSES, np.int64))
    parts = max(1, -(-samples // _HELD_MAX))
    texts: dict[str, int] = {}
    names: list[str] = []
    for part in range(parts):
        keys, times = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        for key, time in _pieces(loaders, texts, names, stream):
            if part == 0:
                _count(told, time)
            mine = slice(None) if parts == 1 else key % parts == part
            keys.append(key[mine])
            times.append(time[mine])
        _slowest(told, np.concatenate(keys), np.concatenate(times), most)
    told.slowest = [_named(each, names, stream) for each in told.slowest]
    return told


def _pieces(
    loaders: list[LoaderRecords], texts: dict[str, int], names: list[str], stream: bool
) -> Iterator[tuple[Ints, Times]]:
    """A key for each sample, and how long it took."""
    for loader in loaders:
        for table in loader.pieces(["worker", "indices", "fetch_ns", "index_text"]):
            for batch in table.to_batches():
                times = batch["fetch_ns"].flatten().to_numpy(zero_copy_only=False)
                keys = batch["indices"].flatten().to_numpy(zero_copy_only=False)
                if batch["index_text"].null_count < batch.num_rows:
                    keys = _text_keys(batch, keys, texts, names)
                elif stream:
                    sizes = np.diff(batch["indices"].offsets.to_numpy())
                    workers = np.repeat(batch["worker"].to_numpy().astype(np.int64) + 1, sizes)
                    keys = keys + ((workers + (loader.rank << 10)) << _ORDINAL_BITS)
                yield keys, times


def _text_keys(batch: Any, keys: Ints, texts: dict[str, int], names: list[str]) -> Ints:
    """Numbers for the texts, in place of the -1 that stands for each."""
    found = [text for row in batch["index_text"].to_pylist() for text in row or ()]
    sizes = np.diff(batch["indices"].offsets.to_numpy())
    are_texts = np.repeat(np.asarray(batch["index_text"].is_valid()), sizes)
    numbers = []
    for text in found:
        if text not in texts:
            texts[text] = len(names)
            names.append(text)
        numbers.append(_TEXTS - texts[text])
    keys = keys.copy()
    keys[are_texts] = numbers
    return keys


def _count(told: FetchTimes, times: Times) -> None:
    if not times.size:
        return
    place = np.log10(np.maximum(times, 1.0)) * PER_DECADE
    place = np.minimum(place.astype(np.int64), _CLASSES - 1)
    told.counts += np.bincount(place, minlength=_CLASSES)
    told.longest_ns = max(told.longest_ns, float(times.max()))
    told.total_ns += float(times.sum(dtype=np.float64))


def _slowest(told: FetchTimes, keys: Ints, times: Times, most: int) -> None:
    """Take in what these add to the slowest; each key is among them with all its times."""
    if not keys.size:
        return
    keys, times = _in_order(keys, times)
    firsts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    sizes = np.diff(np.concatenate([firsts, [len(keys)]]))
    medians = (times[firsts + (sizes - 1) // 2] + times[firsts + sizes // 2]) / 2
    told.distinct += len(firsts)
    told.again += int((sizes > 1).sum())
    _count_slow(told, times, firsts, sizes)
    rows = np.argsort(-medians, kind="stable")[:most]
    for row in rows.tolist():
        first, size = int(firsts[row]), int(sizes[row])
        longest = float(times[first + size - 1])
        told.slowest.append(
            SlowSample(int(keys[first]), float(medians[row]), longest, float(times[first]), size)
        )
    told.slowest.sort(key=lambda each: -each.median_ns)
    del told.slowest[most:]


def _in_order(keys: Ints, times: Times) -> tuple[Ints, Times]:
    """Both by the keys, and those of one key by the times."""
    if keys.min() >= 0 and keys.max() < 1 << 31 and times.min() >= 0:
        # As a rule: in one number each, which sorts several times as fast.
        both = keys << 32
        both |= times.view(np.uint32)  # whose bits are in the order of what they stand for
        both.sort()
        return both >> 32, (both & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
    order = np.lexsort((times, keys))
    return keys[order], times[order]


def _count_slow(told: FetchTimes, times: Times, firsts: Ints, sizes: Ints) -> None:
    """Add what is slow each time."""
    slow = times[firsts] > SLOW * told.quantile_ns(0.5)
    if told.again:
        slow &= sizes > 1
    told.slow += int(slow.sum())
    told.slow_ns += float(np.add.reduceat(times, firsts, dtype=np.float64)[slow].sum())


def _named(each: SlowSample, names: list[str], stream: bool) -> SlowSample:
    """The sample of a key."""
    assert isinstance(each.index, int)
    if each.index <= _TEXTS:
        return dataclasses.replace(each, index=names[_TEXTS - each.index])
    if not stream:
        return each
    place, ordinal = each.index >> _ORDINAL_BITS, each.index & ((1 << _ORDINAL_BITS) - 1)
    rank, worker = place >> 10, (place & 1023) - 1
    return dataclasses.replace(each, index=ordinal, worker=worker, rank=rank)
