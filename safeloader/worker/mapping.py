"""Batches of a map-style dataset; runs in a worker, or in main with ``num_workers=0``.

Hot path. What it adds per sample is a clock reading and a cell in shared memory; the rows "small"
and "TensorDataset" of ``benchmarks/`` guard it.
"""

from __future__ import annotations

import functools
from time import perf_counter_ns as clock
from typing import Any

from torch.utils.data import default_collate

from safeloader.wire.flight import COLLATE, FETCH, FETCH_AT_ONCE, PHASE, SINCE
from safeloader.wire.indices import Packed, count, pack, pack_unbatched, unpack
from safeloader.wire.records import EmptyBatch, FailedBatch, Papers, Task
from safeloader.worker.collating import explain
from safeloader.worker.finding import find_single
from safeloader.worker.mending import Unmendable
from safeloader.worker.recording import DEADLY, KeyFault, Made, RecordingFetcher
from safeloader.worker.stacking import stacked
from safeloader.worker.unsendable import Culprit


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
        if self._policy.retries or task.careful:
            return self._fetch_mended(task, packed, asked, at_once, [], None)
        stamps = self._stamps_for(count(packed))
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
            if self._mends(exc, seen):
                return self._fetch_mended(task, packed, asked, at_once, seen, exc)
            return self._explain(exc, task.seq, phase, packed, asked, seen, at_once)
        times = stamps[: k + 2].tobytes()
        worker_id, pid = self._worker_id, self._pid
        papers = Papers(task.seq, worker_id, pid, packed, got, None, times, at_once, keys)
        return self._handed_over(papers, batch, fetched)

    def _fetch_mended(
        self,
        task: Task,
        packed: Packed,
        asked: Any,
        at_once: bool,
        samples: Any,
        failed: Exception | None,
    ) -> Made:
        """The batch in spite of samples that fail: the slow way, one by one.

        ``samples`` are those that came before ``failed`` was raised, by a sample or by collation.
        """
        known = unpack(packed)
        asked = list(asked)
        mending = self._mending(task.seq, known)
        stamps = self._stamps_for(len(known))
        phase = "sample"
        whole = isinstance(samples, list) and len(samples) == len(asked)
        if failed is None or at_once:  # else those of the samples that came are there already
            stamps[0] = clock()
        try:
            if whole or not at_once:
                mending.have(samples)
            else:
                failed = None  # asked for one at a time, each fails for itself or comes
            if at_once:
                for k in range(len(samples) if whole else 0):
                    stamps[k + 1] = stamps[0]
            for k in range(len(samples) if whole or not at_once else 0, len(asked)):
                self._cells[PHASE] = FETCH
                if k in task.deadly:
                    mending.leave_out(DEADLY)
                else:
                    mending.fetch(functools.partial(self._one, asked[k], at_once), failed)
                failed = None
                stamps[k + 1] = clock()
            phase = "collate"
            self._cells[PHASE] = COLLATE
            batch, samples = self._collate_mended(mending, known)
            keys = self._keys(samples)
            stamps[len(asked) + 1] = clock()
        except Exception as exc:
            return self._explain(exc, task.seq, phase, packed, asked, mending.batch(), False)
        times = bytes(stamps[: len(asked) + 2])
        papers = self._papers(task.seq, packed, None, times, keys=keys, mishaps=mending.mishaps)
        return self._handed_over(papers, batch, samples) if samples else EmptyBatch(papers)

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
        papers = self._papers(seq, packed, None, b"", at_once=at_once)
        culprit = Culprit(None)
        if isinstance(exc, KeyFault | Unmendable):
            pass
        elif phase == "collate":
            found = explain(samples, known) if isinstance(samples, list | tuple) else None
            if found is not None:
                culprit = Culprit(found.position, found.text)
        elif at_once:
            culprit = Culprit(*find_single(self._dataset, asked, exc))
        else:
            culprit = Culprit(len(samples))
        return self._failed(exc, papers, phase, known, culprit)


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
        phase = "sample"
        mishaps = None
        try:
            if self._policy.raises and not (self._policy.retries or task.deadly):
                sample = self._dataset[task.index]
            else:
                mending = self._mending(task.seq, unpack(indices))
                if task.deadly:
                    mending.leave_out(DEADLY)
                else:
                    mending.fetch(lambda: self._dataset[task.index])
                there, mishaps = mending.batch(), mending.mishaps
                if bulk and mishaps:  # the dataset made the batch: all of it is gone
                    mishaps = tuple(
                        mishaps[0]._replace(position=position) for position in range(count(indices))
                    )
                if not there:
                    return EmptyBatch(self._papers(task.seq, indices, None, b"", mishaps=mishaps))
                sample = there[0]
            stamps[1] = clock()
            keys = None if bulk else self._keys((sample,))
            phase = "collate"
            cells[PHASE] = COLLATE
            self._packer.collates()
            batch = self._collate_fn(sample)
            stamps[2] = clock()
        except Exception as exc:
            known = unpack(indices)
            papers = self._papers(task.seq, indices, None, b"", at_once=True)
            return self._failed(exc, papers, phase, known, Culprit(0 if len(known) == 1 else None))
        papers = self._papers(
            task.seq,
            indices,
            None if mishaps else count(indices),
            stamps[:3].tobytes(),
            at_once=True,
            keys=keys,
            mishaps=mishaps,
        )
        return self._handed_over(papers, batch, (sample,) if not bulk else ())
