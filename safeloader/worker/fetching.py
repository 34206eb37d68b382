"""Makes batches and their papers; runs in a worker, or in main with ``num_workers=0``.

Takes a :class:`Task`, gives a :class:`Parcel`, or a :class:`FailedBatch` in the batch's place: no
exception of the user's code leaves here, so the stock iterator carries failures like data and each
arrives where its batch would have. Only the end of a stream is a ``StopIteration``.

Hot path. What it adds per sample is a clock reading and an append; the rows "small" and
"TensorDataset" of ``benchmarks/`` guard it.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable
from time import perf_counter_ns as clock
from typing import Any, NamedTuple

from torch.utils.data import default_collate

from safeloader.wire.dataset_state import changes, describe
from safeloader.wire.failure import Failure, failure_of
from safeloader.wire.indices import Opaque, Packed, count, identity, pack, pack_unbatched, unpack
from safeloader.wire.records import FailedBatch, Papers, Parcel, SamplerFault, Task
from safeloader.wire.streams import StreamBoard
from safeloader.worker.collating import explain
from safeloader.worker.finding import find_single
from safeloader.worker.hints import KEY_FAULT, hint_for


class Post(NamedTuple):
    """Who fetches and what for: fixed for the life of a fetcher."""

    worker_id: int | None
    board: StreamBoard | None
    key: Callable[[Any], Any] | None
    start_state: dict[str, Any] | None
    # In the main process, where the exception of a failed batch is left for the iterator. The batch
    # must not carry it: frames that the exception's traceback leads back to hold the batch.
    raised: list[BaseException] | None = None

    @property
    def where(self) -> str:
        """The place in torch's words; empty in the main process."""
        return "" if self.worker_id is None else f"in DataLoader worker process {self.worker_id}"


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
            task.seq, self._post.worker_id, os.getpid(), b"", None, None, b"", False, None
        )
        return FailedBatch(papers, self._failure)


class RecordingFetcher:
    """Torch's fetcher with a notebook: same calls on the same objects in the same order."""

    def __init__(self, stock: Any, post: Post) -> None:
        self._post = post
        self._dataset = stock.dataset
        self._collate_fn = stock.collate_fn
        self._pid = os.getpid()
        self._worker_id = post.worker_id
        self._key = post.key

    def fetch(self, task: Task) -> Parcel | FailedBatch:
        """The batch for ``task`` with its papers."""
        if type(task.index) is SamplerFault:
            return FailedBatch(self._papers(task.seq, b"", 0, []), None)
        return self._fetch(task.seq, task.index)

    def _fetch(self, seq: int, index: Any) -> Parcel | FailedBatch:
        raise NotImplementedError

    def _papers(
        self,
        seq: int,
        indices: Packed,
        samples: int | None,
        stamps: list[int],
        *,
        ordinal: int | None = None,
        at_once: bool = False,
        keys: tuple[Any, ...] | None = None,
    ) -> Papers:
        return Papers(
            seq,
            self._worker_id,
            self._pid,
            indices,
            samples,
            ordinal,
            array("q", stamps).tobytes(),
            at_once,
            keys,
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
                raise _KeyFault(len(keys), exc) from exc
            keys.append(known_as)
        return tuple(keys)

    def _failed(
        self,
        exc: BaseException,
        papers: Papers,
        phase: str,
        indices: tuple[Any, ...],
        position: int | None = None,
        text: str = "",
    ) -> FailedBatch:
        """The failure of a batch; ``text`` is what was found out beyond the exception."""
        if isinstance(exc, _KeyFault):
            position, exc, text = exc.position, exc.cause, KEY_FAULT
        state = describe(self._dataset)
        if self._post.start_state is not None:
            state["changed_since_worker_start"] = changes(self._post.start_state, state)
        index = None if position is None else indices[position]
        failure = failure_of(
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
            hint=hint_for(exc, phase, index, text, self._dataset),
        )
        if self._post.raised is not None and exc.__traceback__ is not None:
            exc.__traceback__ = exc.__traceback__.tb_next or exc.__traceback__
            self._post.raised.append(exc)
        return FailedBatch(papers, failure)


class _KeyFault(Exception):
    def __init__(self, position: int, cause: Exception) -> None:
        super().__init__(position)
        self.position = position
        self.cause = cause


class MapFetcher(RecordingFetcher):
    """Samples of a map-style dataset, collated into batches."""

    def _fetch(self, seq: int, indices: Any) -> Parcel | FailedBatch:
        dataset = self._dataset
        now = clock
        stamps = [now()]
        samples: Any = []
        phase = "sample"
        keys = None
        at_once = hasattr(dataset, "__getitems__") and bool(dataset.__getitems__)
        # Noted before the user's code sees the lists: it may sort or empty them.
        packed = pack(indices)
        asked = list(indices) if at_once else indices
        got: int | None = 0
        fetched: list[Any] = []
        try:
            if at_once:
                samples = dataset.__getitems__(indices)
                stamps.append(now())
            else:
                for index in indices:
                    samples.append(dataset[index])
                    stamps.append(now())
            if self._key is not None:
                keys = self._keys(samples)
            got = self._count(samples) if at_once else len(samples)
            fetched = list(samples) if type(samples) is list else samples
            phase = "collate"
            batch = self._collate_fn(samples)
            stamps.append(now())
        except Exception as exc:
            seen = samples if phase == "sample" else fetched
            return self._explain(exc, seq, phase, packed, asked, seen, stamps, at_once)
        times = array("q", stamps).tobytes()
        worker_id, pid = self._worker_id, self._pid
        papers = Papers(seq, worker_id, pid, packed, got, None, times, at_once, keys)
        return Parcel(papers, batch)

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
        stamps: list[int],
        at_once: bool,
    ) -> FailedBatch:
        known = unpack(packed)
        papers = self._papers(seq, packed, None, stamps, at_once=at_once)
        position: int | None = None
        text = ""
        if phase == "collate":
            found = explain(samples, known) if isinstance(samples, list | tuple) else None
            if found is not None:
                position, text = found.position, found.text
        elif isinstance(exc, _KeyFault):
            pass
        elif at_once:
            position, text = find_single(self._dataset, asked, exc)
        else:
            position = len(samples)
        return self._failed(exc, papers, phase, known, position, text)


class UnbatchedMapFetcher(RecordingFetcher):
    """Samples of a map-style dataset, one a batch (``batch_size=None``).

    Where the sampler draws a list of indices (a batch sampler given as ``sampler``), the dataset
    answers with a whole batch: each index is then accounted for.
    """

    def _fetch(self, seq: int, index: Any) -> Parcel | FailedBatch:
        indices = pack_unbatched(index)
        bulk = count(indices) != 1
        stamps = [clock()]
        phase = "sample"
        try:
            sample = self._dataset[index]
            stamps.append(clock())
            keys = None if bulk else self._keys((sample,))
            phase = "collate"
            batch = self._collate_fn(sample)
            stamps.append(clock())
        except Exception as exc:
            known = unpack(indices)
            papers = self._papers(seq, indices, None, stamps, at_once=True)
            return self._failed(exc, papers, phase, known, 0 if len(known) == 1 else None)
        papers = self._papers(seq, indices, count(indices), stamps, at_once=True, keys=keys)
        return Parcel(papers, batch)


class StreamFetcher(RecordingFetcher):
    """Samples of an iterable dataset; the index of a sample is its number in this stream."""

    def __init__(self, stock: Any, post: Post) -> None:
        super().__init__(stock, post)
        self._iterator = stock.dataset_iter
        self._batched = stock.auto_collation
        self._drop_last = stock.drop_last
        self._row = post.worker_id or 0
        self._read = 0
        self._ended = False
        self._note(0, ended=False)

    def _note(self, dropped: int, *, ended: bool) -> None:
        if self._post.board is not None:
            self._post.board.write(self._row, self._read, dropped, ended)

    def _fetch(self, seq: int, index: Any) -> Parcel | FailedBatch:
        if self._ended:
            raise StopIteration
        wanted = len(index) if self._batched else 1
        first = self._read
        stamps = [clock()]
        samples: list[Any] = []
        phase = "sample"
        try:
            for _ in range(wanted):
                try:
                    sample = next(self._iterator)
                except StopIteration:
                    # Unbatched streams are asked again, as torch does: they may go on.
                    self._ended = self._batched
                    break
                samples.append(sample)
                stamps.append(clock())
            self._read += len(samples)
            dropped = len(samples) if self._drop_last and len(samples) < wanted else 0
            if len(samples) < wanted:
                self._note(dropped, ended=True)
            if not samples or dropped:
                raise StopIteration
            keys = self._keys(samples)
            phase = "collate"
            batch = self._collate_fn(samples if self._batched else samples[0])
            stamps.append(clock())
        except Exception as exc:
            if phase == "sample" and isinstance(exc, StopIteration):
                raise
            return self._explain(exc, seq, phase, first, samples, stamps)
        except BaseException:  # an interrupt: what was read so far is gone, and counts as read
            self._read = first + len(samples)
            raise
        papers = self._papers(seq, b"", len(samples), stamps, ordinal=first, keys=keys)
        return Parcel(papers, batch)

    def _explain(
        self,
        exc: Exception,
        seq: int,
        phase: str,
        first: int,
        samples: list[Any],
        stamps: list[int],
    ) -> FailedBatch:
        lost = len(samples)
        position: int | None = None
        text = ""
        if phase == "collate":
            indices = tuple((self._row, first + k) for k in range(lost))
            found = explain(samples, indices) if self._batched else None
            if found is not None:
                position, text = found.position, found.text
            elif lost == 1:
                position = 0
        elif not isinstance(exc, _KeyFault):
            position = lost
            lost += 1  # the sample that could not be read has its number too
        indices = tuple((self._row, first + k) for k in range(lost))
        self._read = first + lost
        papers = self._papers(seq, b"", lost, stamps, ordinal=first)
        return self._failed(exc, papers, phase, indices, position, text)


def fetcher_for(stock: Any, post: Post) -> RecordingFetcher:
    """Our fetcher around torch's ``stock``."""
    if hasattr(stock, "dataset_iter"):
        return StreamFetcher(stock, post)
    return (MapFetcher if stock.auto_collation else UnbatchedMapFetcher)(stock, post)
