"""What crosses between main process and worker with every batch. Runs in: both.

::

    main ── Task ──► worker ── DeliveredBatch, EmptyBatch or FailedBatch ──► main

These are tuples because they lie on the hot path: each microsecond here is paid per batch
(``benchmarks/``, rows "small"). Times are ``time.perf_counter_ns`` of the process that took them,
one clock for all processes of a machine.

A batch is pickled in the worker and loaded in main, where errors can be told. Torch leaves the
pickling to a thread of its queue: what cannot be pickled is printed there and dropped, and main
waits for ever (pytorch#142884). Manifest and payload are pickled apart, so a batch that cannot be
loaded still says which one it was.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from safeloader import _torch
from safeloader.delivery.indices import Packed
from safeloader.delivery.manifest import BatchManifest, expected_indices
from safeloader.failures.failure import Failure, failure_of

_NOT_PINNED = (
    "the batch came, and could not be put into pinned memory\n"
    "look at what it holds (a pin_memory() of its own?), or pin_memory=False"
)


class SamplerFault(NamedTuple):
    """Stands for the index that a sampler failed to draw.

    It takes the batch's place in the queue, so that the batches drawn before it arrive first. The
    exception itself stays in the main process.
    """


class StateRequest(NamedTuple):
    """Stands for an index where a worker is asked for the state of its dataset."""


Again = tuple[int, float, bool]


class StateMessage(NamedTuple):
    """The state of a worker's dataset, pickled: worker to main, in the place of a batch.

    ``at_end``: its stream is at its end, else it was asked. ``again`` are the samples that it read
    again to come to its place, the seconds of it, and whether their keys are those of then.
    """

    worker_id: int
    state: bytes
    at_end: bool = False
    again: Again | None = None

    def pin_memory(self) -> StateMessage:
        """Nothing to pin."""
        return self


class Task(NamedTuple):
    """One draw of the index sampler: main to worker.

    ``index`` is what the sampler drew, untouched: a list of indices, or one index where automatic
    batching is off. ``excluded`` are the positions of samples that killed their workers, and are to
    be left out; ``one_by_one`` says that a worker died at this batch, so that the samples are asked
    for one at a time. ``packed`` are its identities where they need not cross to another process.
    ``donors`` are what was drawn before it in this epoch, the newest first: one of them stands in
    where the whole batch fails (``on_error="replace"``). They are snapshots
    (:func:`~safeloader.delivery.indices.snapshots`); their positions follow the batch's own.
    ``seed``, the last one, are with ``seed=`` the fields of its
    :class:`~safeloader.introspect.seeds.BatchSeed`.
    """

    seq: int
    index: Any
    excluded: tuple[int, ...] = ()
    one_by_one: bool = False
    packed: Packed | None = None
    donors: tuple[int | bytes, ...] = ()
    seed: tuple[int, int, int, int] | None = None


class EmptyBatch(NamedTuple):
    """A batch of which every sample was left out: worker to main, which goes on to the next."""

    manifest: BatchManifest

    def pin_memory(self) -> EmptyBatch:
        """Nothing to pin."""
        return self


class FailedBatch(NamedTuple):
    """A batch that could not be made: worker to main, in the batch's own place.

    ``failure`` is None for the echo of a :class:`SamplerFault`.
    """

    manifest: BatchManifest
    failure: Failure | None

    def pin_memory(self) -> FailedBatch:
        """Nothing to pin; torch's pinning thread would rebuild the tuple otherwise."""
        return self


def failed_on_the_way(
    manifest: BatchManifest, exc: Exception, where: str, hint: str
) -> FailedBatch:
    """What stands for a batch that was made, and that ``exc`` kept from arriving."""
    known = expected_indices(manifest)
    sample = {"index": known[0], "position": 0} if len(known) == 1 else {}
    failure = failure_of(
        exc,
        phase="transport",
        where=where,
        indices=known,
        worker_id=manifest.worker_id,
        pid=manifest.pid,
        hint=hint,
        **sample,
    )
    return FailedBatch(manifest, failure)


class DeliveredBatch(NamedTuple):
    """A batch with its manifest: worker to main."""

    manifest: BatchManifest
    payload: Any

    def pin_memory(self) -> DeliveredBatch | FailedBatch:
        """The same with the payload in pinned memory; called by torch's pinning thread.

        An exception of a batch's own ``pin_memory`` becomes a failure of this batch, so that the
        manifest is not lost on the way.
        """
        try:
            return DeliveredBatch(self.manifest, _torch.pin_memory(self.payload))
        except Exception as exc:
            return failed_on_the_way(self.manifest, exc, "in pin memory thread", _NOT_PINNED)


class BatchMessage(NamedTuple):
    """A batch, pickled.

    Attributes:
        manifest: the fields of its manifest, and those of its :class:`SlotLayout`.
        payload: the batch; empty where it lies in a slot.
        fds: descriptors of shared memory, which cross beside it.
    """

    manifest: bytes
    payload: bytes
    fds: tuple[int, ...] = ()
