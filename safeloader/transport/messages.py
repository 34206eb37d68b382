"""What crosses between main process and worker with every batch. Runs in: both.

::

    main ── Task ──► index queue ──► worker ── DeliveredBatch or FailedBatch ──► result queue ──► main

These are tuples because they lie on the hot path: each microsecond here is paid per batch
(``benchmarks/``, rows "small"). Times are ``time.perf_counter_ns`` of the process that took them,
one clock for all processes of a machine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from safeloader import _torch
from safeloader.delivery.indices import Packed, unpack
from safeloader.failures.failure import Failure, failure_of
from safeloader.introspect.fingerprint import Leaf


class SamplerFault(NamedTuple):
    """Stands for the index that a sampler failed to draw.

    It takes the batch's place in the queue, so that the batches drawn before it arrive first. The
    exception itself stays in the main process.
    """


class Task(NamedTuple):
    """One draw of the index sampler: main to worker.

    ``index`` is what the sampler drew, untouched: a list of indices, or one index where automatic
    batching is off. ``excluded`` are the positions of samples that killed their workers, and are to
    be left out; ``one_by_one`` says that a worker died at this batch, so that the samples are asked
    for one at a time. ``packed`` are its identities where they need not cross to another process.
    ``donors`` are what was drawn before it in this epoch, the newest first: one of them stands in
    where the whole batch fails (``on_error="replace"``). They are snapshots
    (:func:`~safeloader.delivery.indices.snapshots`); their positions follow the batch's own.
    """

    seq: int
    index: Any
    excluded: tuple[int, ...] = ()
    one_by_one: bool = False
    packed: Packed | None = None
    donors: tuple[int | bytes, ...] = ()


class SampleIncident(NamedTuple):
    """A sample that did not come as it was asked for, and did not end the batch.

    ``what`` is ``"skipped"``, ``"replaced"`` (by the sample at position ``donor``, or by one that
    the user's ``on_error`` gave: None) or ``"late"`` (it came when asked for again). Where no
    sample of the batch came, ``lent`` are the identities of what was drawn earlier and stands in
    for it; their positions follow the batch's own.
    """

    what: str
    position: int
    reason: str
    donor: int | None = None
    lent: tuple[Any, ...] = ()


class BatchManifest(NamedTuple):
    """What a worker says about the batch it made; it travels with the batch.

    ``stamps`` are int64 bytes: the start of the first fetch, the end of each fetch (one for the
    whole batch if ``fetched_at_once``), then the end of collation. ``samples`` is the number of
    samples that the dataset gave, None where that cannot be counted. In a stream the samples are
    numbers ``ordinal`` to ``ordinal + samples - 1`` of this worker's stream, and ``indices`` is
    empty. ``incidents`` are those of samples left out, replaced or late; None, as a rule, for none.
    ``fingerprints`` are the fingerprints of its leaves, with ``checksum=True``; ``failures`` are those of
    samples left out or replaced, with ``on_failure_dump``.
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
    incidents: tuple[SampleIncident, ...] | None = None
    fingerprints: tuple[Leaf, ...] | None = None
    failures: tuple[Failure, ...] | None = None


def expected_indices(manifest: BatchManifest) -> tuple[Any, ...]:
    """The identities of the samples that the batch was to hold."""
    if manifest.ordinal is None:
        return unpack(manifest.indices)
    row = manifest.worker_id or 0
    return tuple((row, manifest.ordinal + k) for k in range(manifest.samples or 0))


def sources(manifest: BatchManifest) -> tuple[Any, ...]:
    """The identities that :func:`source_positions` counts: those asked for, then what stands in for all."""
    return expected_indices(manifest) + (manifest.incidents[0].lent if manifest.incidents else ())


def source_positions(manifest: BatchManifest) -> tuple[int, ...]:
    """For each sample in the batch the position, among its :func:`sources`, it came from."""
    places = list(range(len(expected_indices(manifest))))
    gone = set()
    for incident in manifest.incidents or ():
        if incident.what == "skipped":
            gone.add(incident.position)
        elif incident.what == "replaced" and incident.donor is not None:
            places[incident.position] = incident.donor
    return tuple(place for position, place in enumerate(places) if position not in gone)


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


class DeliveredBatch(NamedTuple):
    """A batch with its manifest: worker to main."""

    manifest: BatchManifest
    payload: Any

    def pin_memory(self) -> DeliveredBatch | FailedBatch:
        """The same with the payload in pinned memory; called by torch's pinning thread.

        An exception of a batch's own ``pin_memory`` becomes a failure of this batch, so that the
        manifest are not lost on the way.
        """
        try:
            return DeliveredBatch(self.manifest, _torch.pin_memory(self.payload))
        except Exception as exc:
            failure = failure_of(
                exc,
                phase="transport",
                where="in pin memory thread",
                indices=expected_indices(self.manifest),
                worker_id=self.manifest.worker_id,
                pid=self.manifest.pid,
                hint=(
                    "the batch came, and could not be put into pinned memory\n"
                    "look at what it holds (a pin_memory() of its own?), or pin_memory=False"
                ),
            )
            return FailedBatch(self.manifest, failure)
