"""What all fetchers have in common. Runs in: worker.

The manifest of a batch, its failure, its time stamps, and the form in which it leaves the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from time import perf_counter_ns as clock
from typing import Any

from safeloader.delivery.indices import Packed, identity, pack_unbatched, restored, same, unpack
from safeloader.delivery.manifest import BatchManifest, expected_indices
from safeloader.failures.failure import Failure, failure_of
from safeloader.introspect.dataset_state import changes, describe
from safeloader.introspect.fingerprint import fingerprint
from safeloader.introspect.random_state import Marks, RandomState, preserved
from safeloader.introspect.resource_exhaustion import met_in_sharing, never_skipped
from safeloader.introspect.texts import bounded_text
from safeloader.introspect.values import Opaque
from safeloader.supervision.flight_recorder import (
    COLLATE,
    COUNTED,
    FETCH,
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
from safeloader.worker.collating import explain
from safeloader.worker.context import FetchContext
from safeloader.worker.hints import KEY_FAULT, hint_for
from safeloader.worker.repair import BatchRepair, Donors, Unrepairable
from safeloader.worker.stacking import may_stack
from safeloader.worker.unsendable import FaultySample, why_not_sent

Made = DeliveredBatch | BatchMessage | EmptyBatch | FailedBatch

EXCLUDED = "its worker died at it twice"


class RefusingFetcher:
    """Answers every task with the failure that kept the worker from starting."""

    def __init__(self, failure: Failure, context: FetchContext) -> None:
        self._failure = failure
        self._context = context
        self._told = False

    def fetch(self, task: Task) -> FailedBatch:
        """The failure; for a stream once, then its end, as there are no batches to lose."""
        progress = self._context.progress
        if progress is not None:
            progress.write(self._context.worker_id or 0, 0, 0, True)
            if self._told:
                raise StopIteration
        self._told = True
        manifest = BatchManifest(
            task.seq, self._context.worker_id, self._context.pid, b"", None, None, b"", False, None
        )
        return FailedBatch(manifest, self._failure)


class RecordingFetcher:
    """Torch's fetcher with a notebook: same calls on the same objects in the same order."""

    def __init__(self, stock: Any, context: FetchContext) -> None:
        self._context = context
        self._dataset = stock.dataset
        self._collate_fn = stock.collate_fn
        self._pid = context.pid
        self._worker_id = context.worker_id
        self._key = context.key
        self._policy = context.policy
        self._cells = context.cells
        self._shared_stamps = context.cells[STAMPS:]
        self._stacks = may_stack(stock.collate_fn) and context.worker_id is None
        self._packer = context.packer
        self._seals = context.worker_id is not None
        self._mark = Marks().mark
        self._random: tuple[Any, Any, Any] | None = None  # at the start of the running batch

    def fetch(self, task: Task) -> Made:
        """The batch for ``task`` with its manifest."""
        if type(task.index) is SamplerFault:
            return FailedBatch(self._manifest(task.seq, b"", 0, b""), None)
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

    def _manifest(
        self,
        seq: int,
        indices: Packed,
        samples: int | None,
        stamps: bytes,
        *,
        ordinal: int | None = None,
        at_once: bool = False,
        keys: tuple[Any, ...] | None = None,
        repair: BatchRepair | None = None,
    ) -> BatchManifest:
        manifest = BatchManifest(
            seq, self._worker_id, self._pid, indices, samples, ordinal, stamps, at_once, keys
        )
        if repair is None:
            return manifest
        return manifest._replace(incidents=repair.incidents, failures=repair.failures)

    def _handed_over(self, manifest: BatchManifest, batch: Any, samples: Any) -> Made:
        """The batch in the form in which it leaves this process; hot path."""
        if not self._seals:
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
            known = expected_indices(manifest)
            found = why_not_sent(exc, batch, samples, known)
            return self._failed(
                exc, manifest._replace(keys=None, fingerprints=None), "transport", known, found
            )

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
        self, seq: int, indices: tuple[Any, ...], donors: Donors = (), spread: int = 1
    ) -> BatchRepair:
        """Help for a batch in which samples fail."""

        def explained(exc: Exception, position: int) -> Failure:
            return self._failure(exc, seq, "sample", indices, FaultySample(position))

        return BatchRepair(self._policy, explained, donors, spread)

    def _donors(
        self, task: Task, known: tuple[Any, ...], get: Callable[[Any], Any], *, batched: bool = True
    ) -> Donors:
        """What was drawn earlier and comes, the nearest first; the generators stay where they are.

        Not ``batched``, an index may ask for many samples: as many are taken as are to be replaced.
        """
        tried = [(each,) for each in known] if batched else [known]
        cells = self._cells
        for position, index in enumerate(map(restored, task.donors), len(known)):
            names = (identity(index),) if batched else unpack(pack_unbatched(index))
            if not batched and len(names) > len(known):
                index, names = index[: len(known)], names[: len(known)]
            if position in task.excluded or any(same(names, each) for each in tried):
                continue
            if not batched and len(names) < len(known):
                continue
            tried.append(names)
            cells[PHASE], cells[COUNTED], cells[SINCE] = FETCH, position, clock()
            try:
                with preserved():
                    sample = get(index)
            except Exception as exc:
                if never_skipped(exc):
                    shown = bounded_text(names[0])
                    raise Unrepairable(
                        None, exc, f"at index {shown}, to stand in for them"
                    ) from None
                continue
            yield names, sample

    def _repaired(
        self,
        repair: BatchRepair,
        ask: Callable[[], None],
        papers_for: Callable[..., BatchManifest],
        stamps: Any,
        *,
        batched: bool = True,
        bulk: bool = False,
    ) -> Made:
        """The batch in spite of samples that fail: the slow way, one by one.

        ``ask`` has ``repair`` fetch the samples, and ``papers_for`` makes the manifest for as many
        as were asked for. Neither knows what becomes of them.

        Raises:
            StopIteration: as ``ask()`` does: the end of a stream.
        """
        phase = "sample"
        try:
            ask()
            repair.batch()  # a donor is fetched now, unless it is collation that gives all up
            phase = "collate"
            known = expected_indices(papers_for(repair.asked))
            batch, samples = self._collate_repaired(repair, known, stamps, batched)
            keys = None if bulk else self._keys(samples)
            end = repair.asked + bool(repair.lent) + 1
            stamps[end] = clock()
        except Exception as exc:
            if phase == "sample" and isinstance(exc, StopIteration):
                raise
            lost = repair.asked
            if isinstance(exc, Unrepairable) and exc.position is not None:
                lost = max(lost, exc.position + 1)
            elif isinstance(exc, KeyFault):
                phase, at = "sample", repair.places[exc.position or 0]
                exc.position = at if at < lost else None
            manifest = papers_for(lost)
            return self._failed(
                exc, manifest, phase, expected_indices(manifest), FaultySample(None)
            )
        times = bytes(stamps[: end + 1])
        manifest = papers_for(repair.asked, stamps=times, keys=keys, repair=repair)
        if not samples:
            return EmptyBatch(manifest)
        return self._handed_over(manifest, batch, () if bulk else samples)

    def _collate_repaired(
        self, repair: BatchRepair, known: Sequence[Any], stamps: Any, batched: bool
    ) -> tuple[Any, list[Any]]:
        """Collate what there is, leaving out samples that are clearly not like the others.

        Raises:
            Unmendable: with what the collate function raised, where no sample is clearly to blame.
        """
        given_up: set[int] = set()
        while samples := repair.batch():
            if repair.lent:
                stamps[repair.asked + 1] = clock()
            self._cells[PHASE] = COLLATE
            self._packer.collates()
            try:
                return self._collate_fn(list(samples) if batched else samples[0]), samples
            except Exception as exc:
                if repair.lent and not never_skipped(exc):
                    repair.lend()
                    continue
                places = [] if repair.lent or not batched else repair.places
                found = explain(samples, [known[k] for k in places]) if places else None
                at = None if found is None or found.position is None else places[found.position]
                odd = [k for k in range(len(places)) if samples[k] is None]
                positions = sorted({places[k] for k in odd or (found.odd if found else ())})
                # A replacement that is no better is given up once.
                if self._policy.raises or not positions or given_up & set(positions):
                    single = 0 if len(known) == 1 and not repair.lent else None
                    text = found.text if found else ""
                    raise Unrepairable(single if at is None else at, exc, text) from None
                given_up |= set(positions)
                for position in positions:
                    repair.give_up(position, exc, found.text if found else "it is None")
        return None, []

    def _failed(
        self,
        exc: BaseException,
        manifest: BatchManifest,
        phase: str,
        indices: tuple[Any, ...],
        culprit: FaultySample,
    ) -> FailedBatch:
        """The failure of a batch."""
        if isinstance(exc, KeyFault):
            culprit, exc = FaultySample(exc.position, KEY_FAULT), exc.cause
        elif isinstance(exc, Unrepairable):
            culprit, exc = FaultySample(exc.position, exc.text or culprit.text), exc.cause
        if phase == "collate" and met_in_sharing(exc):
            phase, culprit = "transport", FaultySample(None)  # no sample is to blame
        failure = self._failure(exc, manifest.seq, phase, indices, culprit)
        if self._context.raised is not None and exc.__traceback__ is not None:
            exc.__traceback__ = exc.__traceback__.tb_next or exc.__traceback__
            self._context.raised.append(exc)
        return FailedBatch(manifest, failure)

    def _failure(
        self,
        exc: BaseException,
        seq: int,
        phase: str,
        indices: tuple[Any, ...],
        culprit: FaultySample,
    ) -> Failure:
        state = describe(self._dataset, length=self._context.length)
        if self._context.start_state is not None:
            state["changed_since_worker_start"] = changes(self._context.start_state, state)
        position = culprit.position
        index = None if position is None else indices[position]
        return failure_of(
            exc,
            phase=phase,
            where=self._context.where,
            skip_frames=1,
            index=index,
            position=position,
            indices=indices,
            worker_id=self._worker_id,
            pid=self._pid,
            dataset_state=state,
            hint=hint_for(exc, phase, index, culprit.text, self._dataset, self._context.length),
            _random=None if self._random is None else RandomState(*self._random),
        )


class KeyFault(Exception):
    """The user's ``key`` raised on the sample at ``position``."""

    def __init__(self, position: int, cause: Exception) -> None:
        super().__init__(position)
        self.position: int | None = position
        self.cause = cause


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
