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

import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from time import perf_counter_ns as clock
from typing import Any

from safeloader.delivery.indices import identity
from safeloader.delivery.manifest import BatchManifest, expected_indices
from safeloader.failures.failure import Failure, bare_failure, failure_of
from safeloader.introspect.dataset_state import changes, describe
from safeloader.introspect.fingerprint import fingerprint
from safeloader.introspect.pickling import find_unpicklable
from safeloader.introspect.random_state import Marks, RandomState
from safeloader.introspect.resource_exhaustion import met_in_sharing, never_skipped, shortage
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
from safeloader.worker.collating import FaultySample, explain
from safeloader.worker.context import FetchContext
from safeloader.worker.hints import KEY_FAULT, hint_for
from safeloader.worker.repair import BatchRepair, Donors, Unrepairable

Made = DeliveredBatch | BatchMessage | EmptyBatch | FailedBatch

_UNKNOWN = FaultySample()
_PICKLED_AGAIN_S = 5.0  # for finding what cannot be pickled


class RecordingFetcher:
    """Torch's fetcher with a notebook: same calls on the same objects in the same order."""

    def __init__(self, stock: Any, context: FetchContext) -> None:
        self._context = context
        self._dataset = stock.dataset
        self._collate_fn = stock.collate_fn
        self._batched = stock.auto_collation  # whether that function is given a list of samples
        self._pid = os.getpid()
        self._worker_id = context.worker_id
        self._key = context.key
        self._policy = context.policy
        self._cells = context.cells
        self._shared_stamps = context.cells[STAMPS:]
        self._packer = context.packer
        self._manifest = functools.partial(BatchManifest, worker_id=self._worker_id, pid=self._pid)
        self._mark = Marks().mark
        self._random: tuple[Any, Any, Any] | None = None  # at the start of the running batch

    def fetch(self, task: Task) -> Made:
        """The batch for ``task`` with its manifest."""
        if type(task.index) is SamplerFault:
            return FailedBatch(self._manifest(seq=task.seq, indices=b"", samples=0), None)
        self._cells[SEQ] = task.seq
        self._random = self._mark()
        self._packer.begin()
        return self._fetch(task)

    def _fetch(self, task: Task) -> Made:
        raise NotImplementedError

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
            if self._context.checksum:
                manifest = manifest._replace(
                    fingerprints=fingerprint(batch, len(expected_indices(manifest)))
                )
            return self._packer.seal(manifest, batch)
        except Exception as exc:
            manifest = manifest._replace(keys=None, fingerprints=None)
            faulty = why_not_sent(exc, batch, samples, expected_indices(manifest))
            return self._failed(exc, manifest, "transport", faulty)

    def _keys(self, samples: Iterable[Any]) -> tuple[Any, ...] | None:
        """The identities that the user's ``key`` gives the samples; before collation."""
        key = self._key
        if key is None:
            return None
        keys: list[Any] = []
        for sample in samples:
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
                raise KeyFault(len(keys), exc) from exc
            keys.append(known_as)
        return tuple(keys)

    def _repairs(self, exc: Exception, samples: Sequence[Any]) -> bool:
        """Whether to go on in spite of ``exc``; a ``key`` that raises is no fault of the sample."""
        if isinstance(exc, KeyFault):
            return not self._policy.raises and samples[exc.position or 0] is None
        return not self._policy.raises

    def _repair(
        self, indices: tuple[Any, ...], donors: Donors = (), spread: int = 1
    ) -> BatchRepair:
        """Help for a batch in which samples fail."""

        def explained(exc: Exception, position: int) -> Failure:
            return self._failure(exc, "sample", indices, FaultySample(position))

        return BatchRepair(self._policy, explained, donors, spread)

    def _repaired(
        self, repair: BatchRepair, ask: Callable[[], None], blank: BatchManifest, stamps: Any
    ) -> Made:
        """The batch in spite of samples that fail: the slow way, one by one.

        ``ask`` has ``repair`` fetch the samples, and does not know what becomes of them. ``blank``
        is the manifest, without what became of them.

        Raises:
            StopIteration: as ``ask()`` does: the end of a stream.
        """

        def manifest_for(asked: int) -> BatchManifest:
            return blank if blank.ordinal is None else blank._replace(samples=asked)

        phase = "sample"
        together = repair.spread != 1  # one sample stands for many indices
        try:
            ask()
            repair.batch()  # a donor is fetched now, unless it is collation that gives all up
            phase = "collate"
            known = expected_indices(manifest_for(repair.asked))
            batch, samples = self._collate_repaired(repair, known, stamps)
            keys = None if together else self._keys(samples)
            end = repair.asked + bool(repair.lent) + 1
            stamps[end] = clock()
        except Exception as exc:
            if phase == "sample" and isinstance(exc, StopIteration):
                raise
            lost = repair.asked
            if isinstance(exc, KeyFault):
                phase, at = "sample", repair.places[exc.position or 0]
                exc.position = at if at < lost else None
            elif isinstance(exc, Unrepairable) and exc.position is not None:
                lost = max(lost, exc.position + 1)
            return self._failed(exc, manifest_for(lost), phase)
        manifest = manifest_for(repair.asked)._replace(
            stamps=bytes(stamps[: end + 1]),
            keys=keys,
            incidents=repair.incidents,
            failures=repair.failures,
        )
        if not samples:
            return EmptyBatch(manifest)
        return self._handed_over(manifest, batch, () if together else samples)

    def _collate_repaired(
        self, repair: BatchRepair, known: Sequence[Any], stamps: Any
    ) -> tuple[Any, list[Any]]:
        """Collate what there is, leaving out samples that are clearly not like the others.

        Raises:
            Unrepairable: with what the collate function raised, where no sample is clearly to
                blame.
        """
        given_up: set[int] = set()
        while samples := repair.batch():
            if repair.lent:
                stamps[repair.asked + 1] = clock()
            self._cells[PHASE] = COLLATE
            self._packer.collates()
            try:
                return self._collate_fn(list(samples) if self._batched else samples[0]), samples
            except Exception as exc:
                if repair.lent and not never_skipped(exc):
                    repair.lend()
                    continue
                places = [] if repair.lent or not self._batched else repair.places
                found = explain(samples, [known[k] for k in places]) if places else None
                found = found or _UNKNOWN
                at = None if found.position is None else places[found.position]
                odd = [k for k in range(len(places)) if samples[k] is None] or found.odd
                positions = sorted({places[k] for k in odd})
                # A replacement that is no better is given up once.
                if self._policy.raises or not positions or given_up & set(positions):
                    single = 0 if len(known) == 1 and not repair.lent else None
                    raise Unrepairable(single if at is None else at, exc, found.text) from None
                given_up |= set(positions)
                for position in positions:
                    repair.give_up(position, exc, found.text or "it is None")
        return None, []

    def _failed(
        self,
        exc: Exception,
        manifest: BatchManifest,
        phase: str,
        faulty: FaultySample = _UNKNOWN,
        samples: Any = None,
    ) -> FailedBatch:
        """The failure of a batch; ``samples`` are those that could not be collated, if many."""
        indices = expected_indices(manifest)
        if isinstance(exc, Unrepairable):
            faulty, exc = FaultySample(exc.position, exc.text or faulty.text), exc.cause
        elif phase == "collate" and isinstance(samples, list | tuple):
            faulty = explain(samples, indices) or faulty
        if phase == "collate" and met_in_sharing(exc):
            phase, faulty = "transport", FaultySample()  # no sample is to blame
        try:
            failure = self._failure(exc, phase, indices, faulty)
        except Exception:  # a fault of ours must not take the place of the user's error
            context = self._context
            failure = bare_failure(
                exc,
                phase=phase,
                where=context.where,
                worker_id=context.worker_id,
                indices=indices,
                position=faulty.position,
            )
        if self._context.raised is not None and exc.__traceback__ is not None:
            exc.__traceback__ = exc.__traceback__.tb_next or exc.__traceback__
            self._context.raised.append(exc)
        return FailedBatch(manifest, failure)

    def _failure(
        self, exc: Exception, phase: str, indices: tuple[Any, ...], faulty: FaultySample
    ) -> Failure:
        context, position = self._context, faulty.position
        if position is not None and position >= len(indices):
            position = None  # raised between the last sample and collation: by a time limit, say
        index = None if position is None else indices[position]
        return failure_in(
            context,
            exc,
            phase,
            self._dataset,
            index=index,
            position=position,
            indices=indices,
            hint=hint_for(exc, phase, index, faulty.text, self._dataset, context.length),
            _random=None if self._random is None else RandomState(*self._random),
        )


def failure_in(
    context: FetchContext, exc: Exception, phase: str, dataset: Any, **known: Any
) -> Failure:
    """The failure that ``exc`` is, in this process, with the dataset as it is now."""
    state = describe(dataset, length=context.length)
    if context.start_state is not None:
        state["changed_since_worker_start"] = changes(context.start_state, state)
    return failure_of(
        exc,
        phase=phase,
        where=context.where,
        worker_id=context.worker_id,
        dataset_state=state,
        **known,
    )


def why_not_sent(
    exc: Exception, batch: Any, samples: Sequence[Any], indices: Sequence[Any]
) -> FaultySample:
    """What of ``batch`` cannot be pickled, looked for in its samples first.

    Args:
        exc: what pickling raised.
        batch: what the collate function made.
        samples: what it was made of, where that is known one by one.
        indices: the dataset index of each.
    """
    short = shortage(exc)
    if short is not None:
        return FaultySample(text=short)
    folder = tempfile.tempdir
    if isinstance(exc, FileNotFoundError) and folder and not os.path.isdir(folder):
        return FaultySample(
            text=f"the temporary folder {folder} is gone, and torch needs it to hand tensors over\n"
            "make it again, or set TMPDIR to a folder that stays"
        )
    give_up = monotonic() + _PICKLED_AGAIN_S
    parts: list[tuple[int | None, str, Any]] = [(None, "batch", batch)]
    if isinstance(samples, list | tuple) and len(samples) == len(indices):
        parts = [(k, "sample", sample) for k, sample in enumerate(samples)] + parts
    for position, name, part in parts:
        left = give_up - monotonic()
        if position is not None and left <= 0:
            continue  # to the batch, which is always looked at
        found = find_unpicklable(part, name, spawning=False, bound_s=max(left, 1.0))
        if found is not None:
            return FaultySample(position, f"it cannot be pickled: {found}\n{found.advice}")
    return FaultySample()


class KeyFault(Unrepairable):
    """The user's ``key`` raised on the sample at ``position``."""

    def __init__(self, position: int, cause: Exception) -> None:
        super().__init__(position, cause, KEY_FAULT)


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
