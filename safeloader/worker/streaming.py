"""Batches of an iterable dataset. Runs in: worker.

The index of a sample is its number in this worker's stream.
"""

from __future__ import annotations

import inspect
from time import perf_counter_ns as clock
from typing import Any

from safeloader.delivery.manifest import BatchManifest
from safeloader.supervision.flight_recorder import COLLATE, FETCH, ORDINAL, PHASE, SINCE
from safeloader.transport.messages import Task
from safeloader.worker.collating import FaultySample
from safeloader.worker.context import FetchContext
from safeloader.worker.recording import KeyFault, Made, RecordingFetcher
from safeloader.worker.repair import Unrepairable

_CUT_SHORT = (
    "the stream ended right after a sample that failed. A generator is at its end once it raised, "
    "also behind islice, map or a data pipe, so the rest of this worker's stream was not read: "
    "catch the error inside the generator, or iterate by a class with __next__"
)


def _decides_itself(iterator: Any) -> bool:
    """Whether its end is what its author wrote, and not that of a generator that raised."""
    cls = type(iterator)
    written = inspect.isfunction(inspect.getattr_static(cls, "__next__", None))
    return written and not cls.__module__.startswith("torch.")


class StreamFetcher(RecordingFetcher):
    """Samples of an iterable dataset."""

    def __init__(self, stock: Any, context: FetchContext) -> None:
        super().__init__(stock, context)
        self._iterator = stock.dataset_iter
        self._drop_last = stock.drop_last
        self._row = context.worker_id or 0
        self._read = 0
        self._ended = False
        self._last_failed: Exception | None = None  # of the newest sample, if it was left out
        self._decides = _decides_itself(self._iterator)
        self._note(0, ended=False)

    def _note(self, dropped: int, *, ended: bool) -> None:
        if self._context.progress is not None:
            self._context.progress.write(self._row, self._read, dropped, ended)

    def _fetch(self, task: Task) -> Made:
        if self._ended:
            raise StopIteration
        wanted = len(task.index) if self._batched else 1
        first = self._read
        cells = self._cells
        stamps = self._stamps_for(wanted)
        cells[ORDINAL] = first
        cells[PHASE] = FETCH
        cells[SINCE] = stamps[0] = clock()
        samples: list[Any] = []
        if self._policy.retries:
            return self._fetch_repaired(task, first, wanted, samples, None, stamps)
        phase = "sample"
        k = 0
        try:
            for k in range(1, wanted + 1):
                try:
                    sample = next(self._iterator)
                except StopIteration:
                    if k == 1 and self._last_failed is not None and not self._decides:
                        raise self._cut_short(0, self._last_failed) from None
                    # Unbatched streams are asked again, as torch does: they may go on.
                    self._ended = self._batched
                    break
                samples.append(sample)
                stamps[k] = clock()
            self._last_failed = None
            self._book(len(samples), wanted, ended=len(samples) < wanted)
            keys = self._keys(samples)
            phase = "collate"
            cells[PHASE] = COLLATE
            self._packer.collates()
            batch = self._collate_fn(list(samples) if self._batched else samples[0])
            stamps[len(samples) + 1] = clock()
        except Exception as exc:
            if phase == "sample" and isinstance(exc, StopIteration):
                raise
            if phase == "sample" and not isinstance(exc, Unrepairable):
                return self._fetch_repaired(task, first, wanted, samples, exc, stamps)
            all_came = phase == "collate" or isinstance(exc, KeyFault)
            if all_came and self._repairs(exc, samples):
                return self._fetch_repaired(task, first, wanted, samples, None, stamps)
            lost = max(len(samples), 1)  # the sample before a stream that was cut short is told
            faulty = FaultySample(0 if lost == 1 else None)
            self._read = first + lost
            manifest = self._manifest(seq=task.seq, indices=b"", samples=lost, ordinal=first)
            return self._failed(exc, manifest, phase, faulty, samples if self._batched else None)
        except BaseException:
            self._interrupted(first + len(samples))
            raise
        came, times = len(samples), stamps[: len(samples) + 2].tobytes()
        manifest = BatchManifest(
            task.seq, self._worker_id, self._pid, b"", came, first, times, False, keys
        )
        return self._handed_over(manifest, batch, samples)

    def _interrupted(self, read: int) -> None:
        """What was read so far is gone, and counts as read."""
        self._read = max(self._read, read)
        self._note(0, ended=self._ended)

    def _book(self, came: int, wanted: int, *, ended: bool) -> None:
        """Note how far the stream was read; ``StopIteration`` if there is no batch in it."""
        self._read += came
        dropped = came if self._drop_last and ended and came < wanted else 0
        if ended:
            self._note(dropped, ended=True)
        if not came or dropped:
            raise StopIteration

    def _fetch_repaired(
        self,
        task: Task,
        first: int,
        wanted: int,
        samples: list[Any],
        failed: Exception | None,
        stamps: Any,
    ) -> Made:
        """The batch in spite of samples that fail, and of a collate function that objects.

        ``samples`` came before ``failed`` was raised; without it they are the whole batch.
        """
        repair = self._repair(tuple((self._row, first + k) for k in range(wanted)))
        repair.have(samples)
        whole = failed is None and bool(samples)

        def ask() -> None:
            begun = failed
            for k in range(wanted if whole else len(samples), wanted):
                before = self._last_failed
                try:
                    repair.fetch(lambda: next(self._iterator), begun, may_end=True)
                except StopIteration:
                    here = begun or repair.last_failure
                    cause = here or before
                    if cause is not None and not self._decides:
                        at = k if here is not None else max(k - 1, 0)  # else the one before
                        raise self._cut_short(at, cause) from None
                    self._ended = self._batched
                    break
                begun, self._last_failed = None, repair.last_failure
                stamps[k + 1] = clock()
            if not whole:
                self._book(repair.asked, wanted, ended=repair.asked < wanted)

        blank = self._manifest(seq=task.seq, indices=b"", samples=0, ordinal=first)
        try:
            return self._repaired(repair, ask, blank, stamps)
        except StopIteration:
            raise
        except BaseException:
            self._interrupted(first + repair.asked)
            raise
        finally:
            self._read = max(self._read, first + repair.asked)

    def _cut_short(self, position: int, cause: Exception) -> Unrepairable:
        """The stream ended right after a sample that failed: what was behind it is lost."""
        self._ended = True
        self._note(0, ended=True)
        return Unrepairable(position, cause, _CUT_SHORT)
