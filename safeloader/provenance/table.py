"""The table of the samples delivered: a reading of the recorder. Runs in: main.

Everything is decoded from the manifest that the workers wrote; nothing is filled in here.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from safeloader.delivery.indices import as_array, count, identity, same
from safeloader.delivery.manifest import BatchContents, BatchManifest
from safeloader.introspect.texts import index_text
from safeloader.provenance.recorder import UNIX_OFFSET_NS, Delivery, Recorder

Numbers: TypeAlias = npt.NDArray[np.int64]

_PLAIN = (int, float, complex, str, bytes, bool, type(None))
_COLUMNS = ("epoch", "batch", "position", "index", "worker_id", "pid", "start_ns", "fetch_ns")
_RANK, _UNDER_INDEX, _UNDER_PART = "rank", "under_index", "under_part"


@dataclasses.dataclass(frozen=True)
class BatchRecord:
    """One batch as it was handed over.

    Attributes:
        epoch: number of the epoch, from 0.
        batch: number of the batch in its epoch, in the order handed over, from 0.
        indices: dataset indices in the order of the batch; ``(worker, ordinal)`` in a stream.
        worker_id: number of the worker that made it; None with ``num_workers=0``.
        pid: process id of that worker.
        fetch_ns: time each sample took to fetch, in ns. Samples fetched in one call
            (``__getitems__``) carry equal shares of it.
        collate_ns: time the collate function took, in ns.
        wait_ns: time the training loop waited for the batch, in ns.
        start_ns: when the first fetch began, in ns since 1970.

    Example:
        >>> from safeloader import SafeDataLoader
        >>> loader = SafeDataLoader("abcd", batch_size=2, shuffle=False)
        >>> for batch in loader:
        ...     print(batch, loader.last_batch.indices, loader.last_batch.worker_id)
        ['a', 'b'] (0, 1) None
        ['c', 'd'] (2, 3) None
    """

    epoch: int
    batch: int
    indices: tuple[Any, ...]
    worker_id: int | None
    pid: int
    fetch_ns: tuple[int, ...]
    collate_ns: int
    wait_ns: int
    start_ns: int


def record_of(delivery: Delivery) -> BatchRecord:
    """The delivery, decoded."""
    manifest = delivery.manifest
    starts, fetches, collate_ns = times_of(manifest, places_of(manifest))
    return BatchRecord(
        epoch=delivery.epoch,
        batch=delivery.batch,
        indices=BatchContents.of(manifest).indices,
        worker_id=manifest.worker_id,
        pid=manifest.pid,
        fetch_ns=tuple(fetches.tolist()),
        collate_ns=collate_ns,
        wait_ns=delivery.wait_ns,
        start_ns=int(starts[0]) if starts.size else 0,
    )


def places_of(manifest: BatchManifest) -> Sequence[int]:
    """For each sample in the batch the position it came from."""
    if manifest.incidents is not None:
        return BatchContents.of(manifest).positions
    return range(count(manifest.indices) if manifest.ordinal is None else manifest.samples or 0)


def times_of(manifest: BatchManifest, places: Sequence[int]) -> tuple[Numbers, Numbers, int]:
    """Start (ns since 1970) and duration (ns) of each fetch, and of the collation."""
    stamps = np.frombuffer(manifest.stamps, dtype=np.int64)
    size, collate_ns = len(places), int(stamps[-1] - stamps[-2])
    if manifest.fetched_at_once or (manifest.incidents is None and stamps.size != size + 2):
        share = (stamps[1] - stamps[0]) // max(size, 1)
        return np.full(size, stamps[0] + UNIX_OFFSET_NS), np.full(size, share), collate_ns
    at = np.array(places, dtype=np.int64)
    return stamps[at] + UNIX_OFFSET_NS, np.diff(stamps)[at], collate_ns


class Provenance:
    """Which samples were delivered: where, when and by whom.

    It reads the recorder at each call; the newest batches within the recorder's bound are there.

    Example:
        >>> from safeloader import SafeDataLoader
        >>> loader = SafeDataLoader("abcd", batch_size=2, sampler=[3, 0, 1, 2])
        >>> batches = list(loader)
        >>> loader.provenance.to_numpy()["index"].tolist()
        [3, 0, 1, 2]
        >>> row = loader.provenance.lookup(1)[0]
        >>> int(row["batch"]), int(row["position"])
        (1, 0)
        >>> loader.provenance.batch(1).indices
        (1, 2)
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __len__(self) -> int:
        return sum(len(places_of(delivery.manifest)) for delivery in self._recorder.deliveries())

    def __repr__(self) -> str:
        return f"Provenance({len(self)} samples, {self._recorder!r})"

    def to_numpy(self) -> npt.NDArray[Any]:
        """The table as a structured array, one row a sample, oldest first.

        Columns: ``epoch``, ``batch``, ``position`` (in the batch), ``index`` (int64, or object
        where indices are not ints; in a stream the ordinal within the stream of ``worker_id``),
        ``worker_id`` (-1 in the main process), ``pid``, ``start_ns`` (ns since 1970), ``fetch_ns``.

        Behind these, where there is something to say:

        ``rank``
            in distributed training, that of the process.
        ``under_index``
            where the dataset is a torch ``Subset`` (what ``random_split`` gives) or
            ``ConcatDataset``, the index in the dataset under it, at whatever depth; -1 where that
            is not known, as after somebody changed ``subset.indices``, or where a ``Subset`` is
            gone and too much was noted since to keep its indices.
        ``under_part``
            of a ``ConcatDataset``, which of the datasets at the bottom that is, from 0.

        Example:
            >>> from torch.utils.data import Subset
            >>> from safeloader import SafeDataLoader
            >>> loader = SafeDataLoader(Subset("abcdef", [5, 4, 3]))
            >>> batches = list(loader)
            >>> loader.provenance.to_numpy()[["index", "under_index"]].tolist()
            [(0, 5), (1, 4), (2, 3)]
        """
        return self._with_facts(_table(map(_rows, self._recorder.deliveries())))

    def _with_facts(self, table: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The table with the columns of what holds for whole epochs, if there is any such."""
        facts = self._recorder.facts
        columns = {_RANK: facts.ranked, _UNDER_INDEX: facts.parts, _UNDER_PART: facts.parts > 1}
        added = [name for name, there in columns.items() if there]
        if not added:
            return table
        kinds: list[Any] = [(name, table.dtype[name]) for name in _COLUMNS]
        wider = np.full(table.size, -1, dtype=[*kinds, *((name, np.int64) for name in added)])
        for name in _COLUMNS:
            wider[name] = table[name]
        for epoch in np.unique(table["epoch"]).tolist():
            known = facts.of(epoch)
            if known is None:  # so many epochs ago
                continue
            rank, under = known.rank, known.under
            rows = table["epoch"] == epoch
            if _RANK in added and rank is not None:
                wider[_RANK][rows] = rank
            if under is not None:
                index, part = under.of_all(table["index"][rows])
                wider[_UNDER_INDEX][rows] = index
                if _UNDER_PART in added:
                    wider[_UNDER_PART][rows] = part
            elif _UNDER_INDEX in added and table.dtype["index"] == np.int64:  # it is at the bottom
                wider[_UNDER_INDEX][rows] = table["index"][rows]
                if _UNDER_PART in added:
                    wider[_UNDER_PART][rows] = 0
        return wider

    def lookup(
        self, index: Any, *, under: bool = False, part: int | None = None
    ) -> npt.NDArray[Any]:
        """The rows of one dataset index, or of a stream's ``(worker, ordinal)``; may be none.

        Args:
            index: as the sampler draws it.
            under: whether ``index`` is that of the dataset under a ``Subset`` or ``ConcatDataset``,
                ``under_index`` of the table.
            part: with ``under``, of which of the datasets at the bottom; by default of any.

        Example:
            >>> from torch.utils.data import Subset
            >>> from safeloader import SafeDataLoader
            >>> loader = SafeDataLoader(Subset("abcdef", [5, 4, 3]))
            >>> batches = list(loader)
            >>> loader.provenance.lookup(4, under=True)["index"].tolist()
            [1]
        """
        if under:
            table = self.to_numpy()
            names = table.dtype.names or ()
            rows = table[_UNDER_INDEX if _UNDER_INDEX in names else "index"] == index
            if part is not None:
                rows &= (table[_UNDER_PART] if _UNDER_PART in names else 0) == part
            found_rows: npt.NDArray[Any] = table[rows]
            return found_rows
        wanted = identity(index)
        found = []
        for delivery in self._recorder.deliveries():
            indices = BatchContents.of(delivery.manifest).indices
            rows = [k for k, item in enumerate(indices) if same(item, wanted)]
            if rows:
                found.append(_rows(delivery)[rows])
        return self._with_facts(_table(found))

    def batch(self, n: int, epoch: int | None = None) -> BatchRecord:
        """The ``n``-th batch of an epoch (from 0), by default of the newest epoch.

        Frameworks often fetch a batch ahead; this is how to ask for the one being trained on.

        Raises:
            LookupError: if that batch was not delivered, or is forgotten already.
        """
        delivery = self._recorder.find(n, epoch)
        if delivery is None:
            at = "the newest epoch" if epoch is None else f"epoch {epoch}"
            raise LookupError(
                f"there is no record of batch {n} of {at}; the recorder holds {self._recorder!r}. "
                "Batches and epochs count from 0; to keep more, pass "
                "recorder=Recorder(max_bytes=...)"
            )
        return record_of(delivery)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to ``path``; its suffix says how.

        ``.npy`` (numpy), ``.csv``, ``.jsonl`` (one JSON object a line), ``.parquet`` (needs
        pyarrow). In ``.npy`` and ``.parquet`` a column has one type: indices that are not ints are
        written as text, so no file needs unpickling.

        Raises:
            ValueError: for another suffix.
            ImportError: for ``.parquet`` without pyarrow.
            OSError: if the file cannot be written.
        """
        target = Path(path)
        suffix = target.suffix.lower()
        if suffix == ".npy":
            with target.open("wb") as file:  # given a path, numpy would add a suffix of its own
                np.save(file, _without_objects(self.to_numpy()), allow_pickle=False)
        elif suffix == ".parquet":
            try:
                import pyarrow
                import pyarrow.parquet
            except ImportError as exc:
                raise ImportError(
                    "saving provenance as .parquet needs pyarrow: pip install "
                    "'safeloader[parquet]', or save as .npy, .csv or .jsonl"
                ) from exc
            table = _without_objects(self.to_numpy())
            columns = {name: pyarrow.array(table[name]) for name in table.dtype.names or ()}
            pyarrow.parquet.write_table(pyarrow.table(columns), target)
        elif suffix == ".csv":
            with target.open("w", newline="", encoding="utf-8") as text:
                table = _without_objects(self.to_numpy())
                csv.writer(text).writerows([table.dtype.names or (), *table.tolist()])
        elif suffix == ".jsonl":
            with target.open("w", encoding="utf-8") as text:
                table = self.to_numpy()
                for row in table:
                    named = dict(zip(table.dtype.names or (), row.tolist(), strict=True))
                    text.write(json.dumps(named, default=text_of_index) + "\n")
        else:
            raise ValueError(
                "provenance is saved as .npy, .csv, .jsonl or .parquet, by the suffix of the "
                f"path; got {str(path)!r}"
            )


def _rows(delivery: Delivery) -> npt.NDArray[Any]:
    """The part of the table that one batch is."""
    manifest = delivery.manifest
    places = places_of(manifest)
    indices = _index_column(manifest, places)
    rows = np.empty(indices.size, dtype=_INTS if indices.dtype == np.int64 else _OBJECTS)
    rows["epoch"], rows["batch"] = delivery.epoch, delivery.batch
    rows["position"], rows["index"] = np.arange(indices.size), indices
    rows["worker_id"] = -1 if manifest.worker_id is None else manifest.worker_id
    rows["pid"] = manifest.pid
    rows["start_ns"], rows["fetch_ns"], _ = times_of(manifest, places)
    return rows


def _table(parts: Iterable[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype=_INTS), *parts])  # objects, if any part has them


def _with_index(kind: Any) -> np.dtype[Any]:
    return np.dtype([(name, kind if name == "index" else np.int64) for name in _COLUMNS])


_INTS, _OBJECTS = _with_index(np.int64), _with_index(object)


def _without_objects(table: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The table, with indices that are not ints as text."""
    if not table.dtype.hasobject:
        return table
    texts = np.array([text_of_index(index) for index in table["index"]])
    table["index"] = texts
    names = table.dtype.names or ()
    kinds = [(name, texts.dtype if name == "index" else np.int64) for name in names]
    return table.astype(kinds)


def text_of_index(index: Any) -> str:
    """An index as it is written: whole where it is built of plain values, else told by its type."""
    if type(index) is str:
        return index
    return repr(index) if _is_plain(index) else index_text(index)


def _is_plain(value: Any) -> bool:
    """Whether no foreign code has to say what this is."""
    return all(map(_is_plain, value)) if type(value) is tuple else type(value) in _PLAIN


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
