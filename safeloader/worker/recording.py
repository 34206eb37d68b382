"""Makes a batch and its manifest: what all fetchers have in common. Runs in: worker.

A fetcher takes a :class:`Task` and gives a batch in one of these forms:

=======================  =======================================================
:class:`DeliveredBatch`  the batch, in the main process
:class:`BatchMessage`    the batch, in a worker: pickled, ready to be sent
:class:`EmptyBatch`      every sample of it was left out
:class:`FailedBatch`     it could not be made
=======================  =======================================================

No exception of the user's code leaves here, so the stock iterator carries failures like data and
each arrives where its batch would have. Only the end of a stream is a ``StopIteration``.

Each kind of dataset has a module (:mod:`mapping`, :mod:`streaming`); :mod:`repair` takes the
samples that fail and are not to end their batch.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter_ns as clock
from typing import Any

import torch

from safeloader.delivery.indices import Packed, identity
from safeloader.delivery.manifest import BatchManifest, expected_indices
from safeloader.failures.failure import Failure, without_ours
from safeloader.introspect.fingerprint import fingerprint
from safeloader.introspect.random_state import RandomState, mark_here
from safeloader.introspect.resource_exhaustion import met_in_sharing
from safeloader.introspect.seeds import BatchSeed, SeededAs
from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.values import Opaque
from safeloader.supervision.flight_recorder import (
    COLLATE,
    COUNTED,
    PHASE,
    SEND,
    SEQ,
    SINCE,
    STAMPS,
    STAMPS_MAX,
)
from safeloader.transport.messages import (
    BatchMessage,
    DeliveredBatch,
    EmptyBatch,
    FailedBatch,
    SamplerFault,
    Task,
)
from safeloader.worker.context import FetchContext, private_row
from safeloader.worker.first_samples import FirstSamples
from safeloader.worker.hints import KEY_FAULT, failure_in, why_not_sent
from safeloader.worker.repair import STRUCK, BatchRepair, Donors, Unrepairable, struck
from safeloader.worker.sources import source_of
from safeloader.worker.stacking import collation_by
from safeloader.worker.validating import Validation, refused_by

_DRAWN_MAX = 1 << 16  # bytes
Made = DeliveredBatch | BatchMessage | EmptyBatch | FailedBatch


class RecordingFetcher:
    """Torch's fetcher with a notebook: same calls on the same objects in the same order.

    A kind of dataset says how a batch is begun (:meth:`_begin`), how its samples are gathered
    (:meth:`_gather`), and how they are asked for one at a time (:meth:`_ask`).
    """

    # Of the running batch; each begins with new ones.
    _task: Task
    _random: tuple[Any, Any, Any] | None  # the generators, at its start; with a seed it tells
    _stamps: Any  # where its times go
    _wanted: int  # its samples
    _carefully: bool  # whether it is to be made the slow way
    _spread = 1  # indices that one sample of it stands for
    snapshot: Callable[[], bytes | None] | None = None  # the state of the dataset, after a batch
    _looking: FirstSamples | None = None  # at the first samples of the epoch
    _looked: FirstSamples | None = None  # the same, as the running batch was begun

    def __init__(self, stock: Any, context: FetchContext) -> None:
        self._context = context
        self._around = stock
        self._dataset = stock.dataset
        self._collate = collation_by(stock)
        self._batched = stock.auto_collation  # whether it is given a list of samples
        self._pid = os.getpid()
        self._task, self._random = Task(-1, None), None  # before the first batch
        self._worker_id = context.worker_id
        self._key = context.key
        self._validation = Validation(context.checks) if context.checks else None
        self._policy = context.policy
        self._retries = context.policy.retries > 0
        self._cells = private_row() if context.cells is None else context.cells
        self._shared_stamps = self._cells[STAMPS:]
        self._packer = context.packer
        self._mark: Callable[[], Any] = mark_here
        if context.seeder is not None:  # its numbers are known without where they begin
            self._mark = lambda: None
            self._collate = context.seeder.before_collation(self._collate)

    def serves(self, stock: Any, context: FetchContext) -> bool:
        """Whether the next epoch's fetcher, around torch's ``stock``, would be the same as this."""
        mine = self._around
        return (
            context is self._context
            and stock.dataset is mine.dataset
            and stock.collate_fn is mine.collate_fn
            and stock.auto_collation == mine.auto_collation
            and os.getpid() == self._pid
        )

    def fetch(self, task: Task) -> Made:
        """The batch for ``task`` with its manifest; hot path."""
        if type(task.index) is SamplerFault:
            return FailedBatch(BatchManifest(task.seq, self._worker_id, self._pid, b"", 0), None)
        cells = self._cells
        cells[SEQ] = task.seq
        self._task = task
        self._random = self._mark()
        self._looked = looking = self._looking
        if looking is not None:
            looking.begin()
        if self._worker_id is not None:
            self._packer.begin()
        begun = indices, first, at_once = self._begin()
        came: list[Any] = []
        if self._carefully:
            return self._repaired(self._blank(*begun), came, None, "sample")
        stamps = self._stamps
        samples: Any = came
        keys = None
        phase = "sample"
        try:
            samples, number = self._gather(came)
            if self._key is not None and self._spread == 1:
                keys = keys_of(self._key, enumerate(samples))
            phase = "collate"
            cells[PHASE] = COLLATE
            if self._worker_id is not None:
                self._packer.collates()
            batch = self._collate(samples)
            end = 2 if at_once else 1 + len(came)  # one stamp for all fetched at once
            stamps[end] = clock()
        except Exception as exc:
            return self._raised(exc, self._blank(*begun), samples, len(came), phase)
        if looking is not None:
            looking.leave_out(stamps, end)
        worker_id, pid, times = self._worker_id, self._pid, stamps[: end + 1].tobytes()
        manifest = BatchManifest(
            task.seq, worker_id, pid, indices, number, first, times, at_once, keys
        )
        return self._handed_over(manifest, batch, samples)

    def _raised(
        self, exc: Exception, blank: BatchManifest, samples: Any, came: int, phase: str
    ) -> Made:
        """What becomes of the running batch, in whose ``phase`` something was raised."""
        if not self._repairs(exc, samples, came, phase):
            return self._failed(exc, blank._replace(samples=came), phase)
        if isinstance(exc, KeyFault):  # on a sample that is None: collation may tell
            return self._repaired(blank, samples, None, "collate")
        return self._repaired(blank, samples, exc, phase)

    def _seeded(self) -> SeededAs | None:
        """What the numbers of the running batch are made from, with ``seed=`` alone."""
        seed, seeder = self._task.seed, self._context.seeder
        if seed is None or seeder is None or self._random is not None:
            return None
        return SeededAs(BatchSeed(*seed), seeder.per)

    def seeded_by(self, seed: BatchSeed) -> bytes:
        """What stands for the batch that is about to be made, in the making of its seed."""
        raise NotImplementedError

    def by_way_of(self, first: FirstSamples | None) -> None:
        """Fetch by way of what looks at the first samples; None: the dataset itself again."""
        self._looking = first

    def _blank(self, indices: Packed, first: int | None, at_once: bool) -> BatchManifest:
        """The manifest of the running batch, without what became of it."""
        seq, worker_id, pid = self._task.seq, self._worker_id, self._pid
        return BatchManifest(seq, worker_id, pid, indices, self._wanted, first, b"", at_once)

    def _begin(self) -> tuple[Packed, int | None, bool]:
        """Begin the batch of ``self._task``.

        Returns:
            For its manifest: ``indices``, ``ordinal`` and ``fetched_at_once``.
        """
        raise NotImplementedError

    def _gather(self, came: list[Any]) -> tuple[Any, int | None]:
        """The samples and their number, None where that cannot be told; hot path.

        ``came`` is filled with them, unless the dataset makes them all at once.
        """
        raise NotImplementedError

    def _ask(self, repair: BatchRepair, failed: Exception | None) -> None:
        """Have ``repair`` fetch the samples that are left; ``failed`` is what the first raised."""
        raise NotImplementedError

    def _donors(self, indices: tuple[Any, ...]) -> Donors:
        """What may stand in where all samples of a batch with these indices fail."""
        return ()

    def _stamps_for(self, samples: int) -> Any:
        """Where the time stamps of a batch go: shared memory, in which main sees the position."""
        self._cells[COUNTED] = 0
        if samples < STAMPS_MAX:  # a donor's has room too
            return self._shared_stamps
        return _CountedStamps(samples, self._cells)

    def _handed_over(self, manifest: BatchManifest, batch: Any, samples: Any) -> Made:
        """The batch in the form in which it leaves this process; hot path."""
        if self._worker_id is None:
            return DeliveredBatch(manifest, batch)
        cells = self._cells
        cells[SINCE] = clock()
        cells[PHASE] = SEND
        try:
            if self._validation is not None and (news := self._validation.news()):
                manifest = manifest._replace(first_samples=news)
            if self.snapshot is not None:
                manifest = manifest._replace(snapshot=self.snapshot())
            if self._context.checksum:
                manifest = manifest._replace(
                    fingerprints=fingerprint(batch, len(expected_indices(manifest)))
                )
            return self._packer.seal(manifest, batch)
        except Exception as exc:
            manifest = manifest._replace(
                keys=None, fingerprints=None, first_samples=None, snapshot=None
            )
            if isinstance(exc, Unrepairable):  # the state of the dataset cannot be had
                return self.failed_by(exc, manifest)
            parts = samples if self._spread == 1 and isinstance(samples, list | tuple) else ()
            whole = len(parts) == len(expected_indices(manifest))
            why = why_not_sent(exc, batch, parts if whole else ())
            return self._failed(why, manifest, "transport")

    def _repairs(self, exc: Exception, samples: Sequence[Any], came: int, phase: str) -> bool:
        """Whether ``exc`` may be a fault of a sample; a ``key`` that raises is none."""
        lenient = self._policy.on_error != "raise"
        if isinstance(exc, KeyFault):
            return lenient and samples[exc.position or 0] is None
        if not self._wanted:  # of no samples none is to blame
            return lenient and phase == "sample"
        return not (phase == "sample" and came == self._wanted) and not struck(exc, phase)

    def _repaired(
        self, blank: BatchManifest, samples: Any, failed: Exception | None, phase: str
    ) -> Made:
        """The batch in spite of samples that fail: the slow way, one by one.

        Args:
            blank: its manifest, without what became of the samples.
            samples: those that came before ``failed`` was raised.
            failed: what a sample raised, or in the phase ``"collate"`` all of them together.
            phase: where that was.
        """
        indices = expected_indices(blank)

        def explained(exc: Exception, position: int) -> Failure:
            return self._failure(Unrepairable(position, exc), "sample", indices)

        def sourced(exc: Exception | None, position: int) -> str:
            known = position < len(indices) and not together
            length = self._context.length
            return source_of(self._dataset, indices[position], exc, length) if known else ""

        def collate(samples: Any) -> Any:
            if repair.lent:
                stamps[repair.asked + 1] = clock()
            self._cells[PHASE] = COLLATE
            self._packer.collates()
            return self._collate(samples)

        stamps = self._stamps
        together = self._spread != 1  # one sample stands for many indices
        donors = self._donors(indices)

        def accept(sample: Any, position: int) -> None:
            if self._validation is not None and not together:
                self._validation(sample, indices[position])

        repair = BatchRepair(self._policy, explained, donors, self._spread, sourced, accept)
        repair.have(samples)
        try:
            if phase == "sample":
                self._ask(repair, failed)
                failed = None
            repair.batch()  # a donor is fetched now, unless it is collation that gives all up
            phase = "collate"
            compared = indices if self._batched else ()
            batch, samples = repair.collated(collate, compared, failed)
            keys = None
            if self._key is not None and not together:
                keys = keys_of(self._key, zip(repair.places, samples, strict=True))
            end = repair.asked + bool(repair.lent) + 1
            stamps[end] = clock()
            if self._looked is not None:
                self._looked.leave_out(stamps, end)
        except Exception as exc:
            lost = repair.asked
            phase = "sample" if isinstance(exc, KeyFault) else phase
            if isinstance(exc, Unrepairable) and exc.position is not None:
                lost = max(lost, exc.position + 1)
                exc.position = None if together else exc.position
            return self._failed(exc, blank._replace(samples=lost), phase)
        manifest = blank._replace(
            samples=repair.asked * self._spread,
            stamps=bytes(stamps[: end + 1]),
            fetched_at_once=together,
            keys=keys,
            incidents=repair.incidents,
            failures=repair.failures,
        )
        return self._handed_over(manifest, batch, samples) if samples else EmptyBatch(manifest)

    def failed_by(self, fault: Unrepairable, manifest: BatchManifest) -> FailedBatch:
        """A batch was lost with what is no fault of one of its samples."""
        return self._failed(fault, manifest, "sample")

    def _failed(self, exc: Exception, manifest: BatchManifest, phase: str) -> FailedBatch:
        """The failure of a batch."""
        fault = exc if isinstance(exc, Unrepairable) else Unrepairable(None, exc)
        exc = fault.cause
        if struck(exc, phase):
            fault = Unrepairable(None, exc, STRUCK)
        if phase == "collate" and met_in_sharing(exc):
            phase, fault = "transport", Unrepairable(None, exc)  # no sample is to blame
        failure = self._failure(fault, phase, expected_indices(manifest))
        if self._context.raised is not None:
            exc.__traceback__ = without_ours(exc.__traceback__)
            self._context.raised.append(exc)
        return FailedBatch(manifest, failure)

    def _failure(self, fault: Unrepairable, phase: str, indices: tuple[Any, ...]) -> Failure:
        position = fault.position
        if position is not None and position >= len(indices):
            position = None  # of a donor, or more than the dataset was asked for
        return failure_in(
            self._context,
            fault.cause,
            phase,
            self._dataset,
            fault.text,
            index=None if position is None else indices[position],
            position=position,
            indices=indices,
            _refused_by=refused_by(fault.cause)[0],
            _random=None if self._random is None else RandomState(*self._random),
            _seeded=self._seeded(),
            _drawn=None if position is None else self._drawn_up_to(indices[: position + 1]),
        )

    def _drawn_up_to(self, indices: tuple[Any, ...]) -> bytes | None:
        """These indices as they were drawn, for :func:`~safeloader.replay`; None of plain ones."""
        try:
            drawn = list(self._task.index) if self._batched else [self._task.index]
            drawn = drawn[: len(indices)]
            if {int, str}.issuperset(map(type, drawn)) or tuple(map(identity, drawn)) != indices:
                return None  # of a stream they are its places
            # A view of a tensor would take along all that it is a view of.
            own = [each.clone() if type(each) is torch.Tensor else each for each in drawn]
            pickled = pickle.dumps(own)
        except Exception as exc:  # objects of the user's: replay does with their identities
            if raised_by_signal(exc):
                raise
            return None
        return pickled if len(pickled) <= _DRAWN_MAX else None


def keys_of(key: Callable[[Any], Any], samples: Iterable[tuple[int, Any]]) -> tuple[Any, ...]:
    """The identities that the user's ``key`` gives the samples, each with its position."""
    keys: list[Any] = []
    for position, sample in samples:
        try:
            found = key(sample)
            hash(found)
            known_as = identity(found)
            if type(known_as) is Opaque:
                raise TypeError(
                    f"key gave a {type(found).__qualname__}, which is equal to itself alone; "
                    "give an int, a str or a tuple of these"
                )
        except Exception as exc:
            raise KeyFault(position, exc, KEY_FAULT) from exc
        keys.append(known_as)
    return tuple(keys)


def key_of(key: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    """What gives one sample's key, as it travels; None without ``key``."""
    return None if key is None else lambda sample: keys_of(key, [(0, sample)])[0]


class KeyFault(Unrepairable):
    """The user's ``key`` raised on the sample at ``position``."""


class _CountedStamps:
    """Stamps of a batch too large for shared memory, where they are only counted."""

    def __init__(self, samples: int, cells: memoryview) -> None:
        self._stamps = memoryview(bytearray(8 * (samples + 3))).cast("q")
        self._cells = cells

    def __setitem__(self, place: int, stamp: int) -> None:
        self._stamps[place] = stamp
        self._cells[COUNTED] = place
        self._cells[SINCE] = stamp

    def __getitem__(self, place: slice) -> memoryview:
        return self._stamps[place]
