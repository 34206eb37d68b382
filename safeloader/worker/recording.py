"""What all fetchers have in common; runs in a worker, or in main with ``num_workers=0``.

The papers of a batch, its failure, its time stamps, and the form in which it leaves the process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from time import perf_counter_ns as clock
from typing import Any

from safeloader.wire.dataset_state import changes, describe
from safeloader.wire.failure import Failure, failure_of
from safeloader.wire.fingerprint import fingerprint
from safeloader.wire.flight import COUNTED, PHASE, SEND, SEQ, SINCE, STAMPS, STAMPS_MAX
from safeloader.wire.indices import Opaque, Packed, identity
from safeloader.wire.random_state import Marks, RandomState
from safeloader.wire.records import (
    EmptyBatch,
    FailedBatch,
    Mishap,
    Papers,
    Parcel,
    SamplerFault,
    Task,
    asked_for,
)
from safeloader.wire.sealing import Sealed
from safeloader.wire.shortage import met_in_sharing
from safeloader.worker.collating import explain
from safeloader.worker.hints import KEY_FAULT, hint_for
from safeloader.worker.mending import Mending, Unmendable
from safeloader.worker.post import Post
from safeloader.worker.stacking import may_stack
from safeloader.worker.unsendable import Culprit, why_not_sent

Made = Parcel | Sealed | EmptyBatch | FailedBatch

DEADLY = "its worker died at it twice"


class RefusingFetcher:
    """Answers every task with the failure that kept the worker from starting."""

    def __init__(self, failure: Failure, post: Post) -> None:
        self._failure = failure
        self._post = post
        self._told = False

    def fetch(self, task: Task) -> FailedBatch:
        """The failure; for a stream once, then its end, as there are no batches to lose."""
        board = self._post.board
        if board is not None:
            board.write(self._post.worker_id or 0, 0, 0, True)
            if self._told:
                raise StopIteration
        self._told = True
        papers = Papers(
            task.seq, self._post.worker_id, self._post.pid, b"", None, None, b"", False, None
        )
        return FailedBatch(papers, self._failure)


class RecordingFetcher:
    """Torch's fetcher with a notebook: same calls on the same objects in the same order."""

    def __init__(self, stock: Any, post: Post) -> None:
        self._post = post
        self._dataset = stock.dataset
        self._collate_fn = stock.collate_fn
        self._pid = post.pid
        self._worker_id = post.worker_id
        self._key = post.key
        self._policy = post.policy
        self._cells = post.cells
        self._shared_stamps = post.cells[STAMPS:]
        self._stacks = may_stack(stock.collate_fn) and post.worker_id is None
        self._packer = post.packer
        self._seals = post.worker_id is not None
        self._mark = Marks().mark
        self._random: tuple[Any, Any, Any] | None = None  # at the start of the running batch

    def fetch(self, task: Task) -> Made:
        """The batch for ``task`` with its papers."""
        if type(task.index) is SamplerFault:
            return FailedBatch(self._papers(task.seq, b"", 0, b""), None)
        self._cells[SEQ] = task.seq
        self._random = self._mark()
        self._packer.begin()
        return self._fetch(task)

    def _fetch(self, task: Task) -> Made:
        raise NotImplementedError

    def _stamps_for(self, samples: int) -> Any:
        """Where the time stamps of a batch go: shared memory, in which main sees the position."""
        self._cells[COUNTED] = 0
        if samples <= STAMPS_MAX:
            return self._shared_stamps
        return _CountedStamps(samples, self._cells)

    def _papers(
        self,
        seq: int,
        indices: Packed,
        samples: int | None,
        stamps: bytes,
        *,
        ordinal: int | None = None,
        at_once: bool = False,
        keys: tuple[Any, ...] | None = None,
        mishaps: tuple[Mishap, ...] | None = None,
    ) -> Papers:
        return Papers(
            seq,
            self._worker_id,
            self._pid,
            indices,
            samples,
            ordinal,
            stamps,
            at_once,
            keys,
            mishaps,
        )

    def _handed_over(self, papers: Papers, batch: Any, samples: Any) -> Made:
        """The batch in the form in which it leaves this process; hot path."""
        if not self._seals:
            return Parcel(papers, batch)
        cells = self._cells
        cells[SINCE] = clock()
        cells[PHASE] = SEND
        try:
            if self._post.checksum:
                papers = papers._replace(prints=fingerprint(batch, len(asked_for(papers))))
            return self._packer.seal(papers, batch)
        except Exception as exc:
            known = asked_for(papers)
            found = why_not_sent(exc, batch, samples, known)
            return self._failed(
                exc, papers._replace(keys=None, prints=None), "transport", known, found
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

    def _mends(self, exc: Exception, samples: Sequence[Any]) -> bool:
        """Whether to go on in spite of ``exc``; a ``key`` that raises is no fault of the sample."""
        if isinstance(exc, KeyFault):
            return not self._policy.raises and samples[exc.position] is None
        return not self._policy.raises

    def _mending(self, seq: int, indices: tuple[Any, ...]) -> Mending:
        """Help for a batch in which samples fail."""

        def explained(exc: Exception, position: int) -> Failure:
            return self._failure(exc, seq, "sample", indices, Culprit(position))

        return Mending(self._policy, explained)

    def _collate_mended(self, mending: Mending, known: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Collate what there is, leaving out samples that are clearly not like the others.

        Raises:
            Exception: what the collate function raised, where no sample is clearly to blame.
        """
        given_up: set[int] = set()
        while samples := mending.batch():
            self._packer.collates()
            try:
                return self._collate_fn(list(samples)), samples
            except Exception as exc:
                if self._policy.raises:
                    raise
                found = explain(samples, known)
                odd = [k for k, sample in enumerate(samples) if sample is None]
                odd = odd or list(found.odd if found else ())
                positions = mending.positions_of(odd)
                if not odd or given_up & set(positions):  # a replacement that is no better
                    raise
                given_up |= set(positions)
                for position in positions:
                    mending.give_up(position, exc, found.text if found else "it is None")
        return None, []

    def _failed(
        self,
        exc: BaseException,
        papers: Papers,
        phase: str,
        indices: tuple[Any, ...],
        culprit: Culprit,
    ) -> FailedBatch:
        """The failure of a batch."""
        if isinstance(exc, KeyFault):
            culprit, exc = Culprit(exc.position, KEY_FAULT), exc.cause
        elif isinstance(exc, Unmendable):
            culprit, exc = Culprit(exc.position, exc.text or culprit.text), exc.cause
        if phase == "collate" and met_in_sharing(exc):
            phase, culprit = "transport", Culprit(None)  # no sample is to blame
        failure = self._failure(exc, papers.seq, phase, indices, culprit)
        if self._post.raised is not None and exc.__traceback__ is not None:
            exc.__traceback__ = exc.__traceback__.tb_next or exc.__traceback__
            self._post.raised.append(exc)
        return FailedBatch(papers, failure)

    def _failure(
        self,
        exc: BaseException,
        seq: int,
        phase: str,
        indices: tuple[Any, ...],
        culprit: Culprit,
    ) -> Failure:
        state = describe(self._dataset, length=self._post.length)
        if self._post.start_state is not None:
            state["changed_since_worker_start"] = changes(self._post.start_state, state)
        position = culprit.position
        index = None if position is None else indices[position]
        return failure_of(
            exc,
            phase=phase,
            where=self._post.where,
            skip_frames=1,
            index=index,
            position=position,
            indices=indices,
            worker_id=self._worker_id,
            pid=self._pid,
            dataset_state=state,
            hint=hint_for(exc, phase, index, culprit.text, self._dataset, self._post.length),
            _random=None if self._random is None else RandomState(*self._random),
        )


class KeyFault(Exception):
    """The user's ``key`` raised on the sample at ``position``."""

    def __init__(self, position: int, cause: Exception) -> None:
        super().__init__(position)
        self.position = position
        self.cause = cause


class _CountedStamps:
    """Stamps of a batch too large for shared memory, where they are only counted."""

    def __init__(self, samples: int, cells: memoryview) -> None:
        self._stamps = memoryview(bytearray(8 * (samples + 2))).cast("q")
        self._cells = cells

    def __setitem__(self, place: int, stamp: int) -> None:
        self._stamps[place] = stamp
        self._cells[COUNTED] = place
        self._cells[SINCE] = stamp

    def __getitem__(self, place: slice) -> memoryview:
        return self._stamps[place]
