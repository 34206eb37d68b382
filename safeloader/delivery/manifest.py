"""What a worker says about the batch it made. Runs in: both.

It travels with the batch, and is what the ledger believes. A tuple, because it lies on the hot
path; times are ``time.perf_counter_ns`` of the process that took them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from safeloader.delivery.indices import Packed, unpack
from safeloader.failures.failure import Failure
from safeloader.introspect.fingerprint import Leaf


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
    ``fingerprints`` are those of its leaves, with ``checksum=True``; ``failures`` those of samples
    left out or replaced, with ``on_failure_dump``.
    """

    seq: int
    worker_id: int | None
    pid: int
    indices: Packed
    samples: int | None
    ordinal: int | None = None
    stamps: bytes = b""
    fetched_at_once: bool = False
    keys: tuple[Any, ...] | None = None
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
    """The identities that :func:`source_positions` counts: those expected, then what stands in."""
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
