"""What crosses between main process and worker with every batch; no behaviour, made to pickle.

::

    main ── Task ──► index queue ──► worker ── Parcel or FailedBatch ──► result queue ──► main

These are tuples because they lie on the hot path: each microsecond here is paid per batch
(``benchmarks/``, rows "small"). Times are ``time.perf_counter_ns`` of the process that took them,
one clock for all processes of a machine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from safeloader import torch_private
from safeloader.wire.failure import Failure, failure_of
from safeloader.wire.indices import Packed


class SamplerFault(NamedTuple):
    """Stands for the index that a sampler failed to draw.

    It takes the batch's place in the queue, so that the batches drawn before it arrive first. The
    exception itself stays in the main process.
    """


class Task(NamedTuple):
    """One draw of the index sampler: main to worker.

    ``index`` is what the sampler drew, untouched: a list of indices, or one index where automatic
    batching is off.
    """

    seq: int
    index: Any


class Papers(NamedTuple):
    """What a worker says about the batch it made; it travels with the batch.

    ``stamps`` are int64 bytes: the start of the first fetch, the end of each fetch (one for the
    whole batch if ``fetched_at_once``), then the end of collation. ``samples`` is the number of
    samples that the dataset gave, None where that cannot be counted. In a stream the samples are
    numbers ``ordinal`` to ``ordinal + samples - 1`` of this worker's stream, and ``indices`` is
    empty.
    """

    seq: int
    worker_id: int | None
    pid: int
    indices: Packed
    samples: int | None
    ordinal: int | None
    stamps: bytes
    fetched_at_once: bool
    keys: tuple[Any, ...] | None


class FailedBatch(NamedTuple):
    """A batch that could not be made: worker to main, in the batch's own place.

    ``failure`` is None for the echo of a :class:`SamplerFault`.
    """

    papers: Papers
    failure: Failure | None

    def pin_memory(self) -> FailedBatch:
        """Nothing to pin; torch's pinning thread would rebuild the tuple otherwise."""
        return self


class Parcel(NamedTuple):
    """A batch with its papers: worker to main."""

    papers: Papers
    payload: Any

    def pin_memory(self) -> Parcel | FailedBatch:
        """The same with the payload in pinned memory; called by torch's pinning thread.

        An exception of a batch's own ``pin_memory`` becomes a failure of this batch, so that the
        papers are not lost on the way.
        """
        try:
            return Parcel(self.papers, torch_private.pin_memory(self.payload))
        except Exception as exc:
            where = "in pin memory thread"
            return FailedBatch(self.papers, failure_of(exc, phase="transport", where=where))
