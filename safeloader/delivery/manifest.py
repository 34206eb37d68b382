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
    left out or replaced, with ``on_failure_dump``. ``first_samples``, in a worker's first batch
    under ``checks.schema()``: of its first sample the index, and the structure as number and text.
    ``snapshot`` is the state of the worker's dataset after the batch, pickled, where that is kept.
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
    first_samples: tuple[tuple[Any, int, str], ...] | None = None
    snapshot: bytes | None = None


def expected_indices(manifest: BatchManifest) -> tuple[Any, ...]:
    """The identities of the samples that the batch was to hold."""
    if manifest.ordinal is None:
        return unpack(manifest.indices)
    row = manifest.worker_id or 0
    return tuple((row, manifest.ordinal + k) for k in range(manifest.samples or 0))


class BatchContents(NamedTuple):
    """What is in a batch, by its manifest. Decoded where somebody asks: off the hot path.

    Attributes:
        expected: the identities of the samples that the batch was to hold.
        sources: these, then the identities of what was drawn earlier and stands in for them.
        positions: for each sample in the batch the position, among ``sources``, it came from.
        gone: the incident of each expected position whose own sample is not in the batch.

    Example:
        >>> skipped, late = SampleIncident("skipped", 0, "why"), SampleIncident("late", 1, "why")
        >>> manifest = BatchManifest(
        ...     0, 0, 1, ("a", "b", "c"), 3, None, b"", False, None, incidents=(skipped, late)
        ... )
        >>> BatchContents.of(manifest).indices
        ('b', 'c')
    """

    expected: tuple[Any, ...]
    sources: tuple[Any, ...]
    positions: tuple[int, ...]
    gone: dict[int, SampleIncident]

    @classmethod
    def of(cls, manifest: BatchManifest) -> BatchContents:
        """Decode a manifest."""
        expected, incidents = expected_indices(manifest), manifest.incidents or ()
        gone = {each.position: each for each in incidents if each.what != "late"}
        donors = {k: k if each.donor is None else each.donor for k, each in gone.items()}
        return cls(
            expected,
            expected + (incidents[0].lent if incidents else ()),
            tuple(
                donors.get(k, k)
                for k in range(len(expected))
                if k not in gone or gone[k].what == "replaced"
            ),
            gone,
        )

    @property
    def indices(self) -> tuple[Any, ...]:
        """The identity of each sample in the batch; of a donor its own."""
        return tuple(self.sources[k] for k in self.positions) if self.gone else self.expected

    @property
    def kept(self) -> list[Any]:
        """The identities of the expected samples that are in the batch as themselves."""
        return [index for k, index in enumerate(self.expected) if k not in self.gone]
