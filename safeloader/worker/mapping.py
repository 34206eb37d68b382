"""Batches of a map-style dataset. Runs in: worker.

Hot path. What it adds per sample is a clock reading and a cell in shared memory; the rows "small"
and "TensorDataset" of ``benchmarks/`` guard it.
"""

from __future__ import annotations

import functools
import struct
from array import array
from contextlib import suppress
from time import monotonic
from time import perf_counter_ns as clock
from typing import Any

from torch.utils.data import Subset, default_collate

from safeloader import _torch
from safeloader.delivery.indices import (
    Packed,
    count,
    identity,
    pack,
    pack_unbatched,
    restored,
    same,
    unpack,
)
from safeloader.delivery.manifest import BatchManifest
from safeloader.introspect.random_state import RandomState, preserved
from safeloader.introspect.seeds import BatchSeed
from safeloader.introspect.texts import bounded_text, index_text
from safeloader.supervision.flight_recorder import (
    COUNTED,
    FETCH,
    FETCH_AT_ONCE,
    PHASE,
    SEQ,
    SINCE,
)
from safeloader.transport.messages import DeliveredBatch, Task
from safeloader.worker.context import FetchContext
from safeloader.worker.first_samples import FirstSamples
from safeloader.worker.recording import Made, RecordingFetcher
from safeloader.worker.repair import BatchRepair, Donors, Unrepairable, no_fault_of_a_sample, struck
from safeloader.worker.seeding import seeded_items
from safeloader.worker.tensor_columns import Gather, columns_of
from safeloader.worker.validating import ValidatedItems, refused_by

_CHEAP_NS = 2_000  # a sample
_HIDES_A_SLOW_ONE_NS = 10_000_000  # a batch of cheap ones, timed as one
_STAMPS = struct.Struct("3q").pack
_EXCLUDED = "its worker died at it twice"
_ASKED_AGAIN_S = 10.0  # for finding the index that __getitems__ cannot fetch


class MapFetcher(RecordingFetcher):
    """Samples of a map-style dataset: collated into batches, or one a batch (``batch_size=None``).

    Without batching the sampler may draw a list of indices (a batch sampler given as ``sampler``),
    and the dataset answers with a whole batch: each index in it is then accounted for.
    """

    def __init__(self, stock: Any, context: FetchContext) -> None:
        super().__init__(stock, context)
        checked = self._validation
        self._asked_of: Any = self._dataset
        if context.seeder is not None:
            self._asked_of = seeded_items(self._dataset, context.seeder)
        if checked is not None:
            self._asked_of = ValidatedItems(self._asked_of, checked)
        self._items: Any = self._asked_of
        # Samples that are seeded apart are asked for one by one.
        self._may_be_at_once = self._batched and (
            context.seeder is None or context.seeder.per == "batch"
        )
        self._by_default = stock.collate_fn is default_collate
        self._columns = self._may_have_columns(stock)
        # Without workers, where no other process reads where this one is.
        here = context.worker_id is None and self._batched
        self._plainly = here and context.key is None and not self._retries
        self._may_be_cheap = here and not context.apart
        self._cheap = False  # whether samples come faster than a clock reading each is worth
        self._timed_whole = False  # whether the running batch is timed as one
        self._at_once = False  # whether the dataset makes the running batch in one call
        self._asked: Any = ()  # the indices it is asked for

    def _may_have_columns(self, stock: Any) -> Gather | None:
        """What makes whole batches, where nothing asks for each sample for itself."""
        context, plain = self._context, self._asked_of is self._dataset
        if not plain or not self._batched or context.worker_id is not None:
            return None
        if context.key is not None or context.apart or context.checksum:
            return None
        return columns_of(self._dataset, stock.collate_fn)

    def fetch(self, task: Task) -> Made:
        """As :class:`RecordingFetcher` has it; hot path."""
        gather, packed = self._columns, task.packed
        if gather is not None and type(packed) is bytes and self._items is self._dataset:
            cells = self._cells
            cells[SEQ], cells[COUNTED], cells[PHASE] = task.seq, 0, FETCH_AT_ONCE
            cells[SINCE] = began = clock()
            batch = gather(task.index, packed)
            if batch is not None:
                ended = clock()
                stamps, number = _STAMPS(began, ended, ended), len(packed) >> 3
                return DeliveredBatch(
                    BatchManifest(task.seq, None, self._pid, packed, number, None, stamps, True),
                    batch,
                )
        if self._plainly and type(packed) is bytes:
            return self._fetched_plainly(task, packed)
        return super().fetch(task)

    def _makes_batches(self, packed: Packed) -> bool:
        """Whether the dataset is to make the batch in one call.

        A Subset over one that does not is asked for each sample, as it asks itself: so it is known
        which one fails, hangs or is slow. By what is no number it asks otherwise.
        """
        if not self._may_be_at_once:
            return False
        if type(packed) is not bytes:
            return bool(getattr(self._dataset, "__getitems__", None))
        return _torch.makes_batches(self._dataset) is not None

    def _fetched_plainly(self, task: Task, packed: bytes) -> Made:
        """A batch in this process, with as little beside it as can be; hot path.

        Once a sample has failed, all is as if the batch had been begun as it is elsewhere.
        """
        self._task = task
        self._random = self._mark()
        items: Any = self._items
        asked, phase = task.index, "sample"
        at_once = self._makes_batches(packed)
        whole = at_once or self._cheap
        before = list(asked) if at_once else asked  # the user's code may change the list
        self._looked = looking = self._looking
        if looking is not None:
            looking.begin()
        came: Any = []
        times = [clock()]
        try:
            if at_once:
                came = items.__getitems__(asked)
                times.append(clock())
                number = self._count(came)
            else:
                while type(items) is Subset and type(items.indices) is list:  # as it asks itself
                    items, asked = items.dataset, map(items.indices.__getitem__, asked)
                if whole:
                    for index in asked:  # no map(): a StopIteration of the dataset's would end it
                        came.append(items[index])
                    times.append(clock())
                else:
                    for index in asked:
                        came.append(items[index])
                        times.append(clock())
                number = len(came)
            phase = "collate"
            batch = self._collate(came)
        except Exception as exc:
            blank = self._blank(*self._begin())
            if at_once:
                self._asked = before
            for place, stamp in enumerate(times):
                self._stamps[place] = stamp
            return self._raised(exc, blank, came, 0 if at_once else len(came), phase)
        times.append(clock())
        if looking is not None:
            looking.leave_out(times, len(times) - 1)
        if self._may_be_cheap and not at_once:
            self._look_at_time(times[-2] - times[0], len(came), whole)
        stamps = _STAMPS(*times) if whole else array("q", times).tobytes()
        return DeliveredBatch(
            BatchManifest(task.seq, None, self._pid, packed, number, None, stamps, whole), batch
        )

    def serves(self, stock: Any, context: FetchContext) -> bool:
        """As :class:`RecordingFetcher` has it."""
        # Whether there are columns is seen anew: it hangs on more than these.
        return self._columns is None and super().serves(stock, context)

    def by_way_of(self, first: FirstSamples | None) -> None:
        """As :class:`RecordingFetcher` has it."""
        super().by_way_of(first)
        self._items = self._asked_of if first is None else first.around(self._asked_of)

    def seeded_by(self, seed: BatchSeed) -> bytes:
        """As :class:`RecordingFetcher` has it."""
        return seed.bytes

    def _begin(self) -> tuple[Packed, int | None, bool]:
        task, batched = self._task, self._batched
        indices = task.index
        # Noted before the user's code sees the lists: it may sort or empty them.
        packed = task.packed
        if packed is None:
            packed = pack(indices) if batched else pack_unbatched(indices)
        number = count(packed)
        self._at_once = at_once = self._makes_batches(packed)
        if batched:
            self._asked, self._wanted = indices, number
        else:
            self._asked, self._wanted, self._spread = (indices,), 1, number
        self._carefully = (self._retries or task.one_by_one) and number > 0
        self._stamps = stamps = self._stamps_for(self._wanted)
        cells = self._cells
        cells[PHASE] = FETCH_AT_ONCE if at_once or self._spread != 1 else FETCH
        cells[SINCE] = stamps[0] = clock()
        self._timed_whole = whole = at_once or self._cheap
        return packed, None, whole or not batched

    def _gather(self, came: list[Any]) -> tuple[Any, int | None]:
        dataset, stamps, asked, now = self._items, self._stamps, self._asked, clock
        if self._at_once:
            self._asked = list(asked)
            samples = dataset.__getitems__(asked)
            stamps[1] = now()
            return samples, self._count(samples)
        if self._timed_whole:
            for index in asked:  # no map(): a StopIteration of the dataset's would end it
                came.append(dataset[index])
            ended = stamps[1] = now()
        else:
            for k, index in enumerate(asked, 1):
                came.append(dataset[index])
                stamps[k] = now()
            ended = stamps[len(came)]
        if self._may_be_cheap:
            ours = 0 if self._looked is None else self._looked.took_ns
            self._look_at_time(ended - stamps[0] - ours, len(came), self._timed_whole)
        return came, len(came) if self._batched else self._spread

    def _look_at_time(self, took_ns: int, number: int, whole: bool) -> None:
        """Whether the next batch is to be timed as one: a slow one brings the readings back.

        For good, where it hid a sample that is slow by far: indices come in the same order again,
        or the sample does, and then it has to be found.
        """
        self._cheap = took_ns < _CHEAP_NS * number
        if whole and took_ns > _HIDES_A_SLOW_ONE_NS:
            self._may_be_cheap = False

    def _count(self, samples: Any) -> int | None:
        """How many samples ``__getitems__`` gave; None where that cannot be told.

        Its contract is a list with one entry an index. A tuple, tensor or mapping in front of a
        collate function of the user's may well be a finished batch, whose length means nothing.
        """
        if type(samples) is list or self._by_default:
            with suppress(TypeError):
                return len(samples)
        return None

    def _repaired(
        self, blank: BatchManifest, samples: Any, failed: Exception | None, phase: str
    ) -> Made:
        raises = self._policy.on_error == "raise"
        came = isinstance(samples, list | tuple) and len(samples) == self._wanted
        came = came and (raises or self._count(samples) is not None)
        if self._at_once and not came and failed is not None:
            if raises:
                if phase == "sample" and type(self._asked) is list:
                    at = refused_by(failed)[1]
                    found = at is None and _find(self._items, self._asked, failed)
                    failed = found or Unrepairable(at, failed)
                return self._failed(failed, blank, phase)
            samples, failed, phase = [], None, "sample"  # each fails for itself, or comes
            self._random = RandomState.now()  # not what the batch began with, which are used up
        if self._timed_whole:  # no time is known of each that came
            self._stamps[0] = clock()
            for k in range(len(samples)):
                self._stamps[k + 1] = self._stamps[0]
        return super()._repaired(blank, samples, failed, phase)

    def _ask(self, repair: BatchRepair, failed: Exception | None) -> None:
        for k, index in enumerate(list(self._asked)[repair.asked :], repair.asked):
            self._cells[PHASE] = FETCH if self._spread == 1 else FETCH_AT_ONCE
            if {*range(k, k + self._spread)} & {*self._task.excluded}:
                repair.leave_out(_EXCLUDED)
            else:
                repair.fetch(functools.partial(self._one, index), failed)
            failed = None
            self._stamps[k + 1] = clock()

    def _one(self, index: Any) -> Any:
        if not self._at_once:
            return self._items[index]
        (sample,) = self._items.__getitems__([index])
        return sample

    def _donors(self, indices: tuple[Any, ...]) -> Donors:
        """What was drawn earlier and comes, the nearest first; the generators stay where they are.

        Without batching an index may ask for many samples: as many are taken as are to be replaced.
        """
        batched, task, cells = self._batched, self._task, self._cells
        needed = 1 if batched else len(indices)
        tried = [(each,) for each in indices] if batched else [indices]
        for position, index in enumerate(map(restored, task.donors), len(indices)):
            names = (identity(index),) if batched else unpack(pack_unbatched(index))
            if len(names) > needed:
                index, names = index[:needed], names[:needed]
            known = position in task.excluded or any(same(names, each) for each in tried)
            if known or len(names) < needed:
                continue
            tried.append(names)
            cells[PHASE], cells[COUNTED], cells[SINCE] = FETCH, position, clock()
            try:
                with preserved():
                    sample = self._one(index)
            except Exception as exc:
                if struck(exc, "sample"):
                    raise
                if no_fault_of_a_sample(exc):
                    text = f"at index {bounded_text(names[0])}, to stand in for them"
                    raise Unrepairable(None, exc, text) from None
                continue
            yield names, sample


def _find(dataset: Any, indices: list[Any], raised: Exception) -> Unrepairable:
    """The first index of a batch that ``__getitems__`` cannot fetch alone, and how it was found.

    The samples are asked for one at a time, for ten seconds at most. That runs the user's code
    again, so the random-number generators are put back afterwards: the batches that follow are what
    they would have been.
    """
    give_up = monotonic() + _ASKED_AGAIN_S
    number, found = len(indices), None
    text = f", but for none of the {number} indices asked for one at a time\nlook at what they "
    text += "have in common"
    with preserved():
        for position, index in enumerate(indices):
            if monotonic() > give_up:
                text = f"; asking for the {number} samples one at a time, the first {position} "
                text += f"came without error in {_ASKED_AGAIN_S:.0f} s"
                break
            try:
                dataset.__getitems__([index])
            except type(raised):
                if _comes_alone(dataset, index):
                    shown = index_text(index)
                    text = f"; __getitems__([{shown}]) raises too, and dataset[{shown}] does not: "
                    text += "__getitems__ is at fault, and no index\nmend __getitems__, or take it "
                    text += "away: each sample is then asked for by itself"
                    break
                found, text = position, f"; index {index_text(index)} was found by asking for "
                text += f"the {number} samples one at a time"
                break
            except Exception:  # another fault of the same call: not the one to explain
                continue
    if number == 1 and found == 0:
        return Unrepairable(0, raised)
    return Unrepairable(found, raised, f"__getitems__ raised for the whole batch{text}")


def _comes_alone(dataset: Any, index: Any) -> bool:
    """Whether ``dataset[index]`` comes where ``__getitems__`` raises for it."""
    try:
        dataset[index]
    except Exception:
        return False
    return True
