"""States of a dataset that keeps its own place, taken and given back. Runs in: worker.

As torchdata has it: an object with ``state_dict()`` and ``load_state_dict()``. It is the iterator
that the dataset gives, or else the dataset itself. A dataset without is read again as far as it was
read, and what comes is dropped.
"""

from __future__ import annotations

import os
import pickle
import weakref
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Any, NamedTuple

from torch.utils.data import get_worker_info

from safeloader.delivery.key_chain import BEGIN, chained
from safeloader.delivery.manifest import BatchManifest
from safeloader.errors import ResumeError
from safeloader.introspect.seeds import Seeder, sample_is, sample_now
from safeloader.introspect.signals import raised_by_signal
from safeloader.transport.messages import (
    Again,
    EmptyBatch,
    FailedBatch,
    StateMessage,
    StateRequest,
    Task,
)
from safeloader.worker.repair import Unrepairable

KeyOf = Callable[[Any], Any]


class Snapshot(NamedTuple):
    """The state of one worker's dataset.

    Attributes:
        dataset: its state; None if it has none, or is its own iterator.
        iterator: the state of its iterator; None if that has none.
        ended: whether the stream is at its end.
        batches: how many batches the worker had made of it in this epoch.
        samples: how many samples it had read.
    """

    dataset: Any = None
    iterator: Any = None
    ended: bool = False
    batches: int = 0
    samples: int = 0

    @property
    def is_kept(self) -> bool:
        """Whether there is a state at all, or only a count."""
        return self.dataset is not None or self.iterator is not None


class Start(NamedTuple):
    """Where a worker is to begin.

    Attributes:
        snapshot: the state to go on from.
        batches: how many batches of this worker were handed over.
        samples: how many samples it read for them.
        over: whether the epoch was over, so that the next one begins.
        keys: the digest of the keys of these samples; None if it is not known.
    """

    snapshot: Snapshot
    batches: int = 0
    samples: int = 0
    over: bool = False
    keys: bytes | None = None


class StatesPlan(NamedTuple):
    """What all workers are to do about states.

    Attributes:
        every: after how many batches of a worker its state is taken.
        starts: by worker, where it is to begin; in the main process worker 0.
    """

    every: int = 1
    starts: dict[int, Start] = {}  # noqa: RUF012  # never changed

    def of_worker(self, worker_id: int | None) -> DatasetStates:
        """What one process does."""
        return DatasetStates(self.every, self.starts.get(worker_id or 0))


class DatasetStates:
    """Takes the states of one process's dataset, and puts it where it is to begin.

    Args:
        every: after how many batches a state is taken.
        start: where it is to begin; None: at the beginning.
    """

    def __init__(self, every: int, start: Start | None) -> None:
        self._every = max(every, 1)
        self._start = start
        self._loading = ""  # the call of the user's that is given a state, or raised over it
        self._is_another = False  # the stream, by its keys or its length
        self._dataset: Any = None
        self._iterator: Any = None
        self._batches = 0
        self._fetcher: Callable[[], Any] = lambda: None  # of a stream; it holds this
        self._ended = False
        self._begins_at = 0
        self._is_kept = False  # whether there is a state to send
        self._again: Again | None = None  # as :class:`StateMessage` has it

    def before_iter(self, dataset: Any) -> None:
        """``iter(dataset)`` is about to be called, if it is a stream."""
        self._dataset = dataset
        self._ended, self._batches, self._begins_at = False, 0, 0
        if self._start is not None and self._start.snapshot.dataset is not None:
            self._load("dataset", dataset, self._start.snapshot.dataset)

    def after_iter(self, stock: Any, key: KeyOf | None = None, seeder: Seeder | None = None) -> Any:
        """Torch's fetcher over it was made, and is given back with the stream where it is to be.

        Args:
            stock: torch's fetcher.
            key: gives the key of a sample, with ``key=``.
            seeder: seeds the generators before what is read again, as then, with ``seed=``.

        Raises:
            ResumeError: if what is read again has other keys, by the user's ``key``, than then.
        """
        start, self._start = self._start, None
        iterator: Any = getattr(stock, "dataset_iter", None)
        self._iterator = iterator
        if start is None:
            return stock
        snapshot = start.snapshot
        kept = snapshot.iterator is not None and has_state(iterator)
        if kept:
            self._load("iter(dataset)", iterator, snapshot.iterator)
        elif snapshot.iterator is not None and not start.over:
            raise ResumeError(_HAD_STATE)
        if start.over:
            if kept:  # of that epoch only what it did to the process is left
                self._iterator = stock.dataset_iter = iter(self._dataset)
            return stock
        self._ended, self._batches, self._begins_at = snapshot.ended, start.batches, start.samples
        if iterator is not None and not snapshot.ended:
            self._drop(start, key, seeder)
        return stock

    def _load(self, name: str, thing: Any, state: Any) -> None:
        self._loading = f"{name}.load_state_dict()"
        thing.load_state_dict(state)
        self._loading = ""

    @property
    def refusal(self) -> str:
        """What is found, and what to do, where a state was not taken or the stream is another; ""
        if neither is so."""
        if self._is_another:
            return f"seen as the stream was read again up to its place\n{_ONE_ORDER}"
        return self._loading and f"{self._loading} raised: {_NOT_TAKEN}"

    def _drop(self, start: Start, key: KeyOf | None, seeder: Seeder | None) -> None:
        """Read up to the place, and see that it is what was read then."""
        began, samples = perf_counter(), start.samples - start.snapshot.samples
        if samples <= 0:
            return
        before = sample_now()
        try:
            digest = self._read_again(start, key, seeder)
        finally:
            sample_is(before)
        # From a state on it is not known which keys came behind it.
        known = digest is not None and start.keys is not None and not start.snapshot.is_kept
        if known and digest != start.keys:
            raise self._other_stream(
                f"its first {samples} samples, which were read again, have other keys (by key=) "
                "than when the state was saved"
            )
        self._again = samples, perf_counter() - began, known

    def _read_again(self, start: Start, key: KeyOf | None, seeder: Seeder | None) -> bytes | None:
        """The digest of the keys of what was read; None without ``key``, or if a sample failed."""
        digest = None if key is None else BEGIN
        worker = get_worker_info()
        row = 0 if worker is None else worker.id
        size = -(-start.samples // max(start.batches, 1))  # of its batches, but for the last
        for number in range(start.snapshot.samples, start.samples):
            if seeder is not None:
                seeder.of_stream(row, number, size)
            try:
                sample = next(self._iterator)
            except StopIteration:
                raise self._other_stream(
                    f"read again, it ended after {number} samples, and {start.samples} were read "
                    "when the state was saved"
                ) from None
            except Exception as exc:  # as it did then: it was left out, and the stream went on
                if raised_by_signal(exc):
                    raise
                digest = None
                continue
            if key is not None:
                digest = chained(digest, [key(sample)])
        return digest

    def _other_stream(self, how: str) -> ResumeError:
        self._is_another = True
        worker = get_worker_info()
        of = "" if worker is None else f" of worker {worker.id}"
        cure = f"{_ONE_ORDER[:1].upper()}{_ONE_ORDER[1:]}"
        return ResumeError(f"the stream{of} is another than it was: {how}. {cure}")

    def take_again(self) -> Again | None:
        """What was read again, once."""
        again, self._again = self._again, None
        return again

    def over(self, fetcher: Any, worker_id: int | None) -> Any:
        """Have ``fetcher`` send states with its batches, and answer what asks for one."""
        if self._iterator is not None:
            fetcher.begin_at(self._begins_at, ended=self._ended)
            self._fetcher = weakref.ref(fetcher)
        if worker_id is None:  # main asks itself
            return fetcher
        fetch = fetcher.fetch
        fetcher.snapshot = self._with_batch
        self._is_kept = has_state(self._iterator) or has_state(self._dataset)

        def answering(task: Task) -> Any:
            blank = BatchManifest(task.seq, worker_id, os.getpid(), b"", None)
            try:
                if type(task.index) is StateRequest:
                    return StateMessage(worker_id, self._pickled(), again=self.take_again())
                try:
                    made = fetch(task)
                except StopIteration:
                    if self._ended:
                        raise
                    self._ended = True
                    return StateMessage(worker_id, self._pickled(), at_end=True)
                if type(made) is EmptyBatch:
                    blank = made.manifest
                    return EmptyBatch(blank._replace(snapshot=self._with_batch()))
            except NoState as fault:
                return fetcher.failed_by(fault, blank)
            if type(made) is FailedBatch:
                with suppress(NoState):  # perhaps what it failed by
                    return made._replace(
                        manifest=made.manifest._replace(snapshot=self._with_batch())
                    )
            return made

        fetcher.fetch = answering
        return fetcher

    def _with_batch(self) -> bytes | None:
        """The state to send with a batch that was made; None where there is none, or not yet."""
        self._batches += 1
        if not self._is_kept or (self._iterator is not None and self._batches % self._every):
            return None  # one of a map-style dataset goes with each batch: none is fetched twice
        return self._pickled()

    def end(self) -> None:
        """In the main process: the epoch is over, and its iterator is let go of."""
        self._ended = True
        if self._iterator is not self._dataset:
            self._iterator = None

    def _pickled(self) -> bytes:
        """The state now: a copy, as what it is made of goes on to change.

        Raises:
            NoState: if it cannot be had, or not be pickled.
        """
        try:
            return pickle.dumps(self.now())
        except Exception as exc:
            raise NoState(None, exc, _NO_STATE) from None

    def now(self) -> Snapshot:
        """The state now."""
        dataset, iterator = self._dataset, self._iterator
        of_iterator = iterator.state_dict() if has_state(iterator) else None
        own = iterator is dataset and iterator is not None
        of_dataset = dataset.state_dict() if has_state(dataset) and not own else None
        fetcher, ended, read = self._fetcher(), self._ended, 0
        if fetcher is not None:
            # A dataset that is at its end often stands at its beginning again.
            ended, read = ended or fetcher.ended, fetcher.read
        return Snapshot(of_dataset, of_iterator, ended, self._batches, read)


class NoState(Unrepairable):
    """The dataset's ``state_dict()`` raised, or gave what cannot be pickled."""


_NO_STATE = (
    "raised as the state of the dataset was asked for, by state_dict() or by pickling what that "
    "gave\nmend state_dict(), or take it away"
)
_HAD_STATE = (
    "the state holds the place of iter(dataset), which had state_dict() and load_state_dict() then "
    "and has not now: it cannot be put there. Give it the two again, or begin anew by "
    "loader.load_state_dict({})"
)
_ONE_ORDER = (
    "read its files in one order, by a seed of the dataset's own and the epoch of then, or give it "
    "state_dict() and load_state_dict()"
)
_NOT_TAKEN = (
    "it does not take the state that was saved of it\nmend it, or begin anew by "
    "loader.load_state_dict({})"
)


def has_state(thing: Any) -> bool:
    """Whether an object keeps its place, as torchdata has it."""
    return all(callable(getattr(thing, name, None)) for name in ("state_dict", "load_state_dict"))
