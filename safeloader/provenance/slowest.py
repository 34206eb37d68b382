"""Which samples take long to fetch, again and again. Runs in: main.

A lone slow fetch is the machine's doing (a start, a busy core); the median over the epochs is the
sample's own. No step is taken for a sample, but for indices that are no ints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from safeloader.introspect.texts import bounded_text, index_text
from safeloader.provenance.columns import UNDER_INDEX, UNDER_PART, in_chunks
from safeloader.provenance.epoch_facts import FactsOfEpochs
from safeloader.provenance.recorder import Delivery


class SlowSample(NamedTuple):
    """How long a sample takes to fetch.

    Attributes:
        index: as the sampler draws it; ``(worker, ordinal)`` in a stream.
        median_ns: of all its fetches that are known, in ns.
        longest_ns: the longest of them, in ns.
        times: how many are known.
        under_index: under a ``Subset`` or ``ConcatDataset``, the index in the dataset under it;
            None elsewhere, and where that is not known.
        under_part: of a ``ConcatDataset``, which of the datasets at the bottom that is, from 0.

    Example:
        >>> print(SlowSample(137, 41_200_000, 52_000_000, 3))
        index 137: 41.200 ms (median of 3, longest 52.000 ms)
    """

    index: Any
    median_ns: int
    longest_ns: int
    times: int
    under_index: int | None = None
    under_part: int | None = None

    def __str__(self) -> str:
        under = "" if self.under_index is None else f" ({self.under_index} under the Subset)"
        if self.under_part is not None:
            under = f" ({self.under_index} of part {self.under_part})"
        times = f" (median of {self.times}, longest {self.longest_ns / 1e6:.3f} ms)"
        more = times if self.times > 1 else ""
        return f"index {index_text(self.index)}{under}: {self.median_ns / 1e6:.3f} ms{more}"


def slowest_of(deliveries: Sequence[Delivery], facts: FactsOfEpochs, most: int) -> list[SlowSample]:
    """The samples whose fetches take longest by their median, longest first.

    Raises:
        ValueError: if ``most`` is not a positive int.
    """
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise ValueError(f"n must be a positive int, how many to list; got {bounded_text(most)}")
    in_stream = [each for each in deliveries if each.manifest.ordinal is not None]
    found = _slowest(in_stream, facts, most, stream=True)
    if len(in_stream) < len(deliveries):
        by_index = [each for each in deliveries if each.manifest.ordinal is None]
        found += _slowest(by_index, facts, most, stream=False)
    return sorted(found, key=lambda each: -each.median_ns)[:most]


def _slowest(
    deliveries: list[Delivery], facts: FactsOfEpochs, most: int, *, stream: bool
) -> list[SlowSample]:
    wanted = ["index", UNDER_INDEX, UNDER_PART, *["worker_id"] * stream]
    chunks = [
        {name: chunk[name] for name in [*wanted, "fetch_ns"] if name in chunk}
        for chunk in in_chunks(deliveries, facts)
    ]
    if not chunks:
        return []
    columns = {name: np.concatenate([each[name] for each in chunks]) for name in chunks[0]}
    del chunks
    fetches = columns.pop("fetch_ns")
    known: list[Any] | None = None
    if columns["index"].dtype.hasobject:
        codes: dict[Any, int] = {}
        numbers = (codes.setdefault(index, len(codes)) for index in columns["index"])
        columns["index"] = np.fromiter(numbers, np.int64, fetches.size)
        known = list(codes)
    order, first, times = _groups(list(columns.values()), fetches)
    fetches = fetches[order]
    medians = (fetches[first + (times - 1) // 2] + fetches[first + times // 2]) // 2
    told = []
    for at in np.argsort(-medians, kind="stable")[:most].tolist():
        row = {name: int(column[order[first[at]]]) for name, column in columns.items()}
        index = row["index"] if known is None else known[row["index"]]
        under, part = (
            None if place is None or place < 0 else place
            for place in (row.get(UNDER_INDEX), row.get(UNDER_PART))
        )
        told.append(
            SlowSample(
                index=(max(row["worker_id"], 0), index) if stream else index,
                median_ns=int(medians[at]),
                longest_ns=int(fetches[first[at] + times[at] - 1]),
                times=int(times[at]),
                under_index=under,
                under_part=part,
            )
        )
    return told


def _groups(
    keys: list[npt.NDArray[Any]], fetches: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """An order in which equal keys stand together, by fetch time; where each group begins in it,
    and how many are in it."""
    order = np.lexsort((fetches, *keys))
    new = np.zeros(order.size, dtype=bool)
    new[:1] = True
    for key in keys:
        ordered = key[order]
        new[1:] |= ordered[1:] != ordered[:-1]
    first = np.flatnonzero(new)
    return order, first, np.diff(np.append(first, order.size))
