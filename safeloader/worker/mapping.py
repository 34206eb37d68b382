"""Batches of a map-style dataset. Runs in: worker.

Hot path. What it adds per sample is a clock reading and a cell in shared memory; the rows "small"
and "TensorDataset" of ``benchmarks/`` guard it.
"""

from __future__ import annotations

import functools
from time import perf_counter_ns as clock
from typing import Any

from torch.utils.data import default_collate

from safeloader.delivery.indices import Packed, count, pack, pack_unbatched, unpack
from safeloader.delivery.manifest import BatchManifest
from safeloader.supervision.flight_recorder import COLLATE, FETCH, FETCH_AT_ONCE, PHASE, SINCE
from safeloader.transport.messages import FailedBatch, Task
from safeloader.worker.collating import explain
from safeloader.worker.finding import find_single
from safeloader.worker.recording import EXCLUDED, KeyFault, Made, RecordingFetcher
from safeloader.worker.stacking import stacked
from safeloader.worker.unsendable import FaultySample


class MapFetcher(RecordingFetcher):
    """Samples of a map-style dataset, collated into batches."""

    def _fetch(self, task: Task) -> Made:
        indices = task.index
        dataset = self._dataset
        cells = self._cells
        now = clock
        at_once = hasattr(dataset, "__getitems__") and bool(dataset.__getitems__)
        # Noted before the user's code sees the lists: it may sort or empty them.
        packed = task.packed if task.packed is not None else pack(indices)
        asked = list(indices) if at_once else indices
        stamps = self._stamps_for(count(packed))
        if self._policy.retries or task.one_by_one:
            return self._fetch_repaired(task, packed, asked, at_once, [], None, stamps)
        samples: Any = []
        fetched: list[Any] = []
        keys = None
        got: int | None = 0
        k = 0
        phase = "sample"
        cells[PHASE] = FETCH_AT_ONCE if at_once else FETCH
        cells[SINCE] = stamps[0] = now()
        try:
            if at_once:
                samples = dataset.__getitems__(indices)
                k = 1
                stamps[1] = now()
            else:
                for k, index in enumerate(indices, 1):
                    samples.append(dataset[index])
                    stamps[k] = now()
            if self._key is not None:
                keys = self._keys(samples)
            got = self._count(samples) if at_once else k
            phase = "collate"
            cells[PHASE] = COLLATE
            fetched = samples
            batch = stacked(samples) if self._stacks else None
            if batch is None:
                if type(samples) is list:  # the collate function may take it apart
                    fetched = list(samples)
                self._packer.collates()
                batch = self._collate_fn(samples)
            stamps[k + 1] = now()
        except Exception as exc:
            seen = samples if phase == "sample" else fetched
            if self._repairs(exc, seen):
                return self._fetch_repaired(task, packed, asked, at_once, seen, exc, stamps)
            return self._explain(exc, task.seq, phase, packed, asked, seen, at_once)
        times = stamps[: k + 2].tobytes()
        worker_id, pid = self._worker_id, self._pid
        manifest = BatchManifest(task.seq, worker_id, pid, packed, got, None, times, at_once, keys)
        return self._handed_over(manifest, batch, fetched)

    def _fetch_repaired(
        self,
        task: Task,
        packed: Packed,
        asked: Any,
        at_once: bool,
        samples: Any,
        failed: Exception | None,
        stamps: Any,
    ) -> Made:
        """The batch in spite of samples that fail.

        ``samples`` are those that came before ``failed`` was raised, by a sample or by collation.
        """
        known = unpack(packed)
        asked = list(asked)
        get = functools.partial(self._one, at_once=at_once)
        repair = self._repair(task.seq, known, self._donors(task, known, get))
        whole = isinstance(samples, list) and len(samples) == len(asked)
        came = samples if whole or not at_once else []  # else each fails for itself, or comes

        def ask() -> None:
            if failed is None or at_once:  # else the stamps of those that came are there already
                stamps[0] = clock()
                for k in range(len(came)):
                    stamps[k + 1] = stamps[0]
            repair.have(came)
            first = None if at_once else failed
            for k in range(len(came), len(asked)):
                self._cells[PHASE] = FETCH
                if k in task.excluded:
                    repair.leave_out(EXCLUDED)
                else:
                    repair.fetch(functools.partial(get, asked[k]), first)
                first = None
                stamps[k + 1] = clock()

        def papers_for(number: int, stamps: bytes = b"", **more: Any) -> BatchManifest:
            return self._manifest(task.seq, packed, None, stamps, **more)

        return self._repaired(repair, ask, papers_for, stamps)

    def _one(self, index: Any, at_once: bool) -> Any:
        if not at_once:
            return self._dataset[index]
        (sample,) = self._dataset.__getitems__([index])
        return sample

    def _count(self, samples: Any) -> int | None:
        """How many samples ``__getitems__`` gave; None where that cannot be told.

        Its contract is a list with one entry an index. A tuple, tensor or mapping in front of a
        collate function of the user's may well be a finished batch, whose length means nothing.
        """
        if type(samples) is list or self._collate_fn is default_collate:
            try:
                return len(samples)
            except TypeError:
                return None
        return None

    def _explain(
        self,
        exc: Exception,
        seq: int,
        phase: str,
        packed: Packed,
        asked: Any,
        samples: Any,
        at_once: bool,
    ) -> FailedBatch:
        known = unpack(packed)
        manifest = self._manifest(seq, packed, None, b"", at_once=at_once)
        culprit = FaultySample(None)
        if isinstance(exc, KeyFault):
            pass
        elif phase == "collate":
            found = explain(samples, known) if isinstance(samples, list | tuple) else None
            if found is not None:
                culprit = FaultySample(found.position, found.text)
        elif at_once:
            culprit = FaultySample(*find_single(self._dataset, asked, exc))
        else:
            culprit = FaultySample(len(samples))
        return self._failed(exc, manifest, phase, known, culprit)


class UnbatchedMapFetcher(RecordingFetcher):
    """Samples of a map-style dataset, one a batch (``batch_size=None``).

    Where the sampler draws a list of indices (a batch sampler given as ``sampler``), the dataset
    answers with a whole batch: each index in it is then accounted for.
    """

    def _fetch(self, task: Task) -> Made:
        indices = pack_unbatched(task.index)
        bulk = count(indices) != 1
        cells, stamps = self._cells, self._stamps_for(1)
        cells[PHASE] = FETCH_AT_ONCE if bulk else FETCH
        cells[SINCE] = stamps[0] = clock()
        if self._policy.retries or task.one_by_one:
            return self._fetch_repaired(task, indices, bulk, None, stamps)
        phase = "sample"
        try:
            sample = self._dataset[task.index]
            stamps[1] = clock()
            keys = None if bulk else self._keys((sample,))
            phase = "collate"
            cells[PHASE] = COLLATE
            self._packer.collates()
            batch = self._collate_fn(sample)
            stamps[2] = clock()
        except Exception as exc:
            if phase == "sample" and not self._policy.raises and not isinstance(exc, KeyFault):
                return self._fetch_repaired(task, indices, bulk, exc, stamps)
            manifest = self._manifest(task.seq, indices, None, b"", at_once=True)
            return self._failed(
                exc, manifest, phase, unpack(indices), FaultySample(None if bulk else 0)
            )
        times = stamps[:3].tobytes()
        manifest = self._manifest(task.seq, indices, count(indices), times, at_once=True, keys=keys)
        return self._handed_over(manifest, batch, () if bulk else (sample,))

    def _fetch_repaired(
        self, task: Task, indices: Packed, bulk: bool, failed: Exception | None, stamps: Any
    ) -> Made:
        known = unpack(indices)

        def get(index: Any) -> Any:
            return self._dataset[index]

        donors = self._donors(task, known, get, batched=False)
        repair = self._repair(task.seq, known, donors, len(known))

        def ask() -> None:
            if any(k < len(known) for k in task.excluded):
                repair.leave_out(EXCLUDED)
            else:
                repair.fetch(functools.partial(get, task.index), failed)
            stamps[1] = clock()

        def papers_for(number: int, stamps: bytes = b"", **more: Any) -> BatchManifest:
            return self._manifest(task.seq, indices, None, stamps, at_once=bulk, **more)

        return self._repaired(repair, ask, papers_for, stamps, batched=False, bulk=bulk)
