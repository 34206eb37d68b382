"""What the manifests of many batches come to, in columns. Runs in: main.

Ordinary batches (ints, each sample timed, none left out) are decoded many at a time: no step is
taken for a sample, and ten million take seconds. What is not ordinary is decoded batch by batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from safeloader.delivery.indices import as_array, count
from safeloader.delivery.manifest import BatchContents, BatchManifest
from safeloader.introspect.texts import index_text
from safeloader.provenance.epoch_facts import FactsOfEpochs
from safeloader.provenance.index_texts import encodable, is_plain
from safeloader.provenance.recorder import UNIX_OFFSET_NS, Delivery

Numbers: TypeAlias = npt.NDArray[np.int64]
Columns: TypeAlias = dict[str, npt.NDArray[Any]]

NAMES = ("epoch", "batch", "position", "index", "worker_id", "pid", "start_ns", "fetch_ns")
RANK, UNDER_INDEX, UNDER_PART = "rank", "under_index", "under_part"
CHUNK_ROWS = 1 << 17  # decoded at a time, where not all are wanted at once


def places_of(manifest: BatchManifest) -> Sequence[int]:
    """For each sample in the batch the position it came from."""
    if manifest.incidents is not None:
        return BatchContents.of(manifest).positions
    return range(count(manifest.indices) if manifest.ordinal is None else manifest.samples or 0)


def times_of(manifest: BatchManifest, places: Sequence[int]) -> tuple[Numbers, Numbers, int]:
    """Start (ns since 1970) and duration (ns) of each fetch, and of the collation."""
    stamps = np.frombuffer(manifest.stamps, dtype=np.int64)
    size, collate_ns = len(places), int(stamps[-1] - stamps[-2])
    if fetched_together(manifest, size):
        share = (stamps[1] - stamps[0]) // max(size, 1)
        return np.full(size, stamps[0] + UNIX_OFFSET_NS), np.full(size, share), collate_ns
    at = np.array(places, dtype=np.int64)
    return stamps[at] + UNIX_OFFSET_NS, np.diff(stamps)[at], collate_ns


def fetched_together(manifest: BatchManifest, size: int) -> bool:
    """Whether one call fetched all ``size`` samples, so that each has a share of its time."""
    return manifest.fetched_at_once or (
        manifest.incidents is None and len(manifest.stamps) != 8 * (size + 2)
    )


def columns_of(deliveries: Iterable[Delivery], facts: FactsOfEpochs) -> Columns:
    """The columns of all samples of these batches, oldest first."""
    parts = [
        _ordinary(list(run)) if ordinary else _joined(map(_of_one, run))
        for ordinary, run in itertools.groupby(deliveries, _is_ordinary)
    ]
    return _with_facts(_joined(parts), facts)


def in_chunks(deliveries: Iterable[Delivery], facts: FactsOfEpochs) -> Iterator[Columns]:
    """The same in parts of about ``CHUNK_ROWS``."""
    held: list[Delivery] = []
    rows = 0
    for delivery in deliveries:
        held.append(delivery)
        rows += len(places_of(delivery.manifest))
        if rows >= CHUNK_ROWS:
            yield columns_of(held, facts)
            held, rows = [], 0
    if held:
        yield columns_of(held, facts)


def fetches_of(deliveries: Iterable[Delivery]) -> Numbers:
    """The fetch times of all samples of these batches, in ns: the one column, for less work."""
    parts = [np.empty(0, dtype=np.int64)]
    for ordinary, run in itertools.groupby(deliveries, _is_ordinary):
        manifests = [delivery.manifest for delivery in run]
        if ordinary:
            stamps = np.frombuffer(b"".join([each.stamps for each in manifests]), dtype=np.int64)
            ends = np.cumsum([len(each.stamps) // 8 for each in manifests])
            at = np.ones(stamps.size, dtype=bool)  # whether a fetch ends there
            at[ends - 1] = at[0] = False
            at[ends[:-1]] = False
            parts.append(np.diff(stamps, prepend=0)[at])
        else:
            parts += [times_of(each, places_of(each))[1] for each in manifests]
    return np.concatenate(parts)


def as_table(columns: Columns) -> npt.NDArray[Any]:
    """The columns as one structured array."""
    kinds = [(name, column.dtype) for name, column in columns.items()]
    table = np.empty(columns["epoch"].size, dtype=kinds)
    for name, column in columns.items():
        table[name] = column
    return table


def has_objects(delivery: Delivery) -> bool:
    """Whether an index of the batch is no int."""
    manifest = delivery.manifest
    if manifest.ordinal is not None:
        return False
    if manifest.incidents is None and type(manifest.indices) is bytes:
        return False
    return bool(_index_column(manifest, places_of(manifest)).dtype.hasobject)


def text_of_index(index: Any) -> str:
    """An index as it is written: whole where it is built of plain values, else told by its type."""
    if type(index) is str:
        return encodable(index)
    return encodable(repr(index) if is_plain(index) else index_text(index))


def _is_ordinary(delivery: Delivery) -> bool:
    manifest = delivery.manifest
    return (
        type(manifest.indices) is bytes
        and manifest.incidents is None
        and manifest.ordinal is None
        and not manifest.fetched_at_once
        and len(manifest.stamps) == len(manifest.indices) + 16
    )


def _ordinary(deliveries: list[Delivery]) -> Columns:
    """Many batches at once. A batch of n samples has n + 2 stamps, one behind the other."""
    manifests = [delivery.manifest for delivery in deliveries]
    sizes = np.array([len(manifest.stamps) // 8 - 2 for manifest in manifests], dtype=np.int64)
    of_batch = np.repeat(np.arange(len(deliveries)), sizes)
    rows = np.arange(of_batch.size)
    stamps = np.frombuffer(b"".join([each.stamps for each in manifests]), dtype=np.int64)
    at = rows + 2 * of_batch
    workers = [-1 if each.worker_id is None else each.worker_id for each in manifests]

    def spread(of_each: list[int]) -> Numbers:
        return np.array(of_each, dtype=np.int64)[of_batch]

    indices: Any = b"".join([each.indices for each in manifests])  # type: ignore[misc]  # all bytes
    return {
        "epoch": spread([each.epoch for each in deliveries]),
        "batch": spread([each.batch for each in deliveries]),
        "position": rows - (np.cumsum(sizes) - sizes)[of_batch],
        "index": np.frombuffer(indices, dtype=np.int64),
        "worker_id": spread(workers),
        "pid": spread([each.pid for each in manifests]),
        "start_ns": stamps[at] + UNIX_OFFSET_NS,
        "fetch_ns": stamps[at + 1] - stamps[at],
    }


def _of_one(delivery: Delivery) -> Columns:
    manifest = delivery.manifest
    places = places_of(manifest)
    indices = _index_column(manifest, places)
    starts, fetches, _ = times_of(manifest, places)
    worker = -1 if manifest.worker_id is None else manifest.worker_id
    constant = {
        "epoch": delivery.epoch,
        "batch": delivery.batch,
        "worker_id": worker,
        "pid": manifest.pid,
    }
    columns = {name: np.full(indices.size, value) for name, value in constant.items()}
    columns |= {"position": np.arange(indices.size), "index": indices}
    columns |= {"start_ns": starts, "fetch_ns": fetches}
    return {name: columns[name] for name in NAMES}


def _joined(parts: Iterable[Columns]) -> Columns:
    found = list(parts)
    if len(found) == 1:
        return found[0]
    empty = np.empty(0, dtype=np.int64)
    return {  # objects, if any part has them
        name: np.concatenate([empty, *(part[name] for part in found)]) for name in NAMES
    }


def _index_column(manifest: BatchManifest, places: Sequence[int]) -> npt.NDArray[Any]:
    if manifest.ordinal is not None:
        return manifest.ordinal + np.array(places, dtype=np.int64)
    if manifest.incidents is None and type(manifest.indices) is bytes:  # as a rule, and faster
        return np.frombuffer(manifest.indices, dtype=np.int64)
    identities = BatchContents.of(manifest).indices
    column = as_array(identities)
    if column.ndim > 1:  # indices that are pairs stay pairs
        return np.fromiter(identities, dtype=object)
    return column


def _with_facts(columns: Columns, facts: FactsOfEpochs) -> Columns:
    """The columns with those of what holds for whole epochs, if there is any such."""
    epochs, indices = columns["epoch"], columns["index"]
    asked = {RANK: facts.ranked, UNDER_INDEX: facts.parts, UNDER_PART: facts.parts > 1}
    added = {name: np.full(epochs.size, -1) for name, there in asked.items() if there}
    if not added:
        return columns
    for epoch in np.unique(epochs).tolist():
        known = facts.of(epoch)
        if known is None:  # so many epochs ago
            continue
        rows = epochs == epoch
        if RANK in added and known.rank is not None:
            added[RANK][rows] = known.rank
        if known.under is not None:
            index, part = known.under.of_all(indices[rows])
            added[UNDER_INDEX][rows] = index
            if UNDER_PART in added:
                added[UNDER_PART][rows] = part
        elif UNDER_INDEX in added and indices.dtype == np.int64:  # it is at the bottom
            added[UNDER_INDEX][rows] = indices[rows]
            if UNDER_PART in added:
                added[UNDER_PART][rows] = 0
    return columns | added
