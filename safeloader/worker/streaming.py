"""Batches of an iterable dataset. Runs in: worker.

The index of a sample is its number in this worker's stream.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from time import perf_counter_ns as clock
from typing import Any

from safeloader.delivery.indices import Packed
from safeloader.introspect.seeds import BatchSeed, batch_of_stream
from safeloader.supervision.flight_recorder import FETCH, ORDINAL, PHASE, SINCE
from safeloader.transport.messages import Task
from safeloader.worker.context import FetchContext
from safeloader.worker.first_samples import FirstSamples
from safeloader.worker.recording import Made, RecordingFetcher
from safeloader.worker.repair import BatchRepair, Unrepairable
from safeloader.worker.seeding import SeededStream
from safeloader.worker.validating import ValidatedStream

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


class _EndOfStream(BaseException):
    """There is no further batch; no ``Exception``, so that nobody takes it for a sample's fault."""


class StreamFetcher(RecordingFetcher):
    """Samples of an iterable dataset."""

    def __init__(self, stock: Any, context: FetchContext) -> None:
        super().__init__(stock, context)
        self._iterator = stock.dataset_iter
        self._drop_last = stock.drop_last
        self._row = context.worker_id or 0
        self._first = self._read = 0  # number of the running batch's first sample, and of the next
        self._ended = False
        self._last_failed: Exception | None = None  # of the newest sample, if it was left out
        self._decides = _decides_itself(self._iterator)
        self._so_far: Callable[[], int] = lambda: 0  # samples of the running batch
        index = self._index
        if context.seeder is not None:
            self._iterator = SeededStream(self._iterator, context.seeder, index)
        if self._validation is not None:
            self._iterator = ValidatedStream(self._iterator, self._validation, index)
        self._asked_of = self._iterator
        self._note(0, ended=False)

    def _index(self) -> tuple[int, int]:
        """Of the sample that is asked for."""
        return self._row, self._first + self._so_far()

    def seeded_by(self, seed: BatchSeed) -> bytes:
        """By its place in this worker's stream."""
        return batch_of_stream(self._row, self._read)

    def by_way_of(self, first: FirstSamples | None) -> None:
        """As :class:`RecordingFetcher` has it."""
        super().by_way_of(first)
        self._iterator = self._asked_of if first is None else first.around(self._asked_of)

    def begin_at(self, samples: int, *, ended: bool) -> None:
        """So many samples were read before, perhaps up to the end."""
        self._first = self._read = samples
        self._ended = ended
        self._note(0, ended=ended)

    @property
    def read(self) -> int:
        """How many samples were read."""
        return self._read

    @property
    def ended(self) -> bool:
        """Whether the stream said that it has no more; with a short last batch, if there is one."""
        return self._ended

    def fetch(self, task: Task) -> Made:
        """The next batch with its manifest; ``StopIteration`` at the end of the stream."""
        try:
            return super().fetch(task)
        except _EndOfStream:
            raise StopIteration from None
        except BaseException:  # what was read so far is gone, and counts as read
            self._note(0, ended=self._ended)
            raise

    def _note(self, dropped: int, *, ended: bool) -> None:
        if self._context.progress is not None:
            self._context.progress.write(self._row, self._read, dropped, ended)

    def _begin(self) -> tuple[Packed, int | None, bool]:
        if self._ended:
            raise _EndOfStream
        self._wanted = wanted = len(self._task.index) if self._batched else 1
        self._first = first = self._read
        self._carefully = self._retries or self._last_failed is not None
        self._stamps = stamps = self._stamps_for(wanted)
        cells = self._cells
        cells[ORDINAL] = first
        cells[PHASE] = FETCH
        cells[SINCE] = stamps[0] = clock()
        return b"", first, False

    def _gather(self, came: list[Any]) -> tuple[Any, int | None]:
        stamps, now = self._stamps, clock
        self._so_far = came.__len__
        try:
            for k in range(1, self._wanted + 1):
                try:
                    sample = next(self._iterator)
                except StopIteration:
                    # Unbatched streams are asked again, as torch does: they may go on.
                    self._ended = self._batched
                    break
                came.append(sample)
                stamps[k] = now()
        finally:
            self._read = self._first + len(came)
        number = len(came)
        if number < self._wanted:
            self._book(number)
        return came, number

    def _book(self, came: int) -> None:
        """Note the end of the stream; ``_EndOfStream`` if there is no batch before it."""
        dropped = came if self._drop_last else 0
        self._note(dropped, ended=True)
        if dropped or not came:
            raise _EndOfStream

    def _ask(self, repair: BatchRepair, failed: Exception | None) -> None:
        self._so_far = lambda: repair.asked
        try:
            for k in range(repair.asked, self._wanted):
                try:
                    repair.fetch(lambda: next(self._iterator), failed, may_end=True)
                except StopIteration:
                    again = repair.last_failure is not None  # else it is the one before
                    cause = repair.last_failure if again else self._last_failed
                    if cause is not None and not self._decides:
                        self._ended = True
                        self._note(0, ended=True)
                        at = k if again else max(k - 1, 0)
                        raise Unrepairable(at, cause, _CUT_SHORT) from None
                    self._ended = self._batched
                    break
                failed, self._last_failed = None, repair.last_failure
                self._stamps[k + 1] = clock()
        finally:
            self._read = self._first + repair.asked
        if repair.asked < self._wanted:
            self._book(repair.asked)
