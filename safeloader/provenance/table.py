"""The table of the samples delivered: a reading of the recorder. Runs in: main.

Everything is decoded from the manifest that the workers wrote; nothing is filled in here.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safeloader.delivery.indices import identity, pack, same
from safeloader.delivery.manifest import BatchContents
from safeloader.introspect.texts import index_text, indices_text
from safeloader.introspect.values import cut
from safeloader.provenance.columns import (
    UNDER_INDEX,
    UNDER_PART,
    as_table,
    columns_of,
    in_chunks,
    places_of,
    times_of,
)
from safeloader.provenance.exports import Exports
from safeloader.provenance.recorder import Delivery, Recorder
from safeloader.provenance.slowest import SlowSample, slowest_of


@dataclasses.dataclass(frozen=True, repr=False)
class BatchRecord:
    """One batch as it was handed over.

    Attributes:
        epoch: number of the epoch, from 0.
        batch: number of the batch in its epoch, in the order handed over, from 0.
        indices: dataset indices in the order of the batch; ``(worker, ordinal)`` in a stream.
        worker_id: number of the worker that made it; None with ``num_workers=0``.
        pid: process id of that worker.
        fetch_ns: time each sample took to fetch, in ns. Samples fetched in one call
            (``__getitems__``, or the rows of a ``TensorDataset``) carry equal shares of it, and
            without workers those of a batch behind one whose samples took less than 2 µs each: a
            slow one among them is not told apart, but with ``trace=``. Once such a batch took over
            10 ms, each sample is timed from then on.
        collate_ns: time the collate function took, in ns; 0 where the rows of a ``TensorDataset``
            are gathered without workers, which makes the batch at once.
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

    def __repr__(self) -> str:
        """On one line: a loop prints this, and a batch may hold a thousand indices."""
        fetched = f"fetched in {sum(self.fetch_ns) / 1e6:.3f} ms"
        longest = max(self.fetch_ns, default=0)
        if longest > min(self.fetch_ns, default=0):  # each was timed by itself
            at = index_text(self.indices[self.fetch_ns.index(longest)], 40)
            fetched += f" (index {at}: {longest / 1e6:.3f} ms)"
        return (
            f"BatchRecord(epoch={self.epoch}, batch={self.batch}, worker_id={self.worker_id}, "
            f"pid={self.pid}, indices={cut(indices_text(self.indices, counted=True))}; {fetched}, "
            f"collated in {self.collate_ns / 1e6:.3f} ms, waited {self.wait_ns / 1e6:.3f} ms)"
        )


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

    def __iter__(self) -> Iterator[np.void]:
        """Each sample's row, oldest first."""
        for chunk in in_chunks(self._recorder.deliveries(), self._recorder.facts):
            yield from as_table(chunk)

    def __repr__(self) -> str:
        return f"Provenance({len(self)} samples, {self._recorder!r})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """What NumPy makes of it: :meth:`to_numpy`, which is made anew each time."""
        if copy is False:
            raise ValueError("the table is made when it is asked for: it cannot be had uncopied")
        table = self.to_numpy()
        return table if dtype is None else table.astype(dtype)

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """The table for whoever reads Arrow: polars, DuckDB, pandas and pyarrow take it as it is.

        Parts are made as they are read. Indices that are not ints are text. Needs pyarrow.

        Raises:
            ImportError: without pyarrow.
        """
        return self._exports().arrow().__arrow_c_stream__(requested_schema)

    def to_pandas(self) -> Any:
        """The table as a ``pandas.DataFrame``, with the columns of :meth:`to_numpy`.

        Raises:
            ImportError: without pandas.
        """
        return self._exports().pandas()

    def _exports(self) -> Exports:
        return Exports(list(self._recorder.deliveries()), self._recorder.facts)

    def slowest(self, n: int = 10) -> list[SlowSample]:
        """The samples that take longest to fetch, by the median over the epochs; longest first.

        Samples fetched in one call (``__getitems__``) have equal shares of its time, so of these it
        tells slow batches. Of ten million samples it takes some seconds.

        Args:
            n: how many at most.

        Returns:
            For each its ``index``, ``median_ns``, ``longest_ns`` and ``times``: how often it was
            fetched, as far as known. Under a ``Subset`` or ``ConcatDataset`` also ``under_index``,
            and ``under_part``.

        Raises:
            ValueError: if ``n`` is not a positive int.

        Example:
            >>> import time
            >>> from safeloader import SafeDataLoader
            >>> class Digits(list):
            ...     def __getitem__(self, index):
            ...         time.sleep(0.02 * (index == 3))
            ...         return super().__getitem__(index)
            >>> loader = SafeDataLoader(Digits(range(10)), batch_size=4)
            >>> for epoch in range(3):
            ...     for batch in loader:
            ...         pass
            >>> [(sample.index, sample.times) for sample in loader.provenance.slowest(1)]
            [(3, 3)]
        """
        return slowest_of(list(self._recorder.deliveries()), self._recorder.facts, n)

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
        return as_table(columns_of(self._recorder.deliveries(), self._recorder.facts))

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
            rows = table[UNDER_INDEX if UNDER_INDEX in names else "index"] == index
            if part is not None:
                rows &= (table[UNDER_PART] if UNDER_PART in names else 0) == part
            found_rows: npt.NDArray[Any] = table[rows]
            return found_rows
        wanted = identity(index)
        packed = pack((wanted,))
        found: list[Delivery] = []
        at: list[int] = []
        before = 0  # rows of the batches found
        for delivery in self._recorder.deliveries():
            manifest = delivery.manifest
            if (
                type(packed) is bytes is type(manifest.indices)
                and manifest.incidents is None
                and manifest.ordinal is None
                and packed not in manifest.indices
            ):
                continue  # as a rule, and told by C
            indices = BatchContents.of(manifest).indices
            here = [before + k for k, item in enumerate(indices) if same(item, wanted)]
            if here:
                found.append(delivery)
                at += here
                before += len(indices)
        rows_found: npt.NDArray[Any] = as_table(columns_of(found, self._recorder.facts))[at]
        return rows_found

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
        self._exports().save(Path(path))
