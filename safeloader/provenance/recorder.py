"""The notebook of what was handed over, and of the epochs. Runs in: main.

Written per batch, decoded only when somebody asks. It belongs to no loader: a framework may rebuild
the loader, the notebook goes along and the user's own loader still answers.
"""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from safeloader.delivery.audit import EpochAudit
from safeloader.delivery.indices import Packed, count
from safeloader.delivery.manifest import BatchContents, BatchManifest, SampleIncident
from safeloader.introspect.texts import bounded_text
from safeloader.introspect.values import weight
from safeloader.provenance.audits import AuditHistory
from safeloader.provenance.epoch_facts import FactsOfEpochs
from safeloader.transport.parking import ParkedSlots
from safeloader.transport.stats import TransportCounts

DEFAULT_MAX_BYTES = 64 * 1024 * 1024
_RECORD_BYTES = 600  # a record without its samples, measured with sys.getsizeof; rounded up

logger = logging.getLogger("safeloader")

# Stamps are readings of a clock that counts from no date; this turns them into time since 1970.
UNIX_OFFSET_NS = time.time_ns() - time.perf_counter_ns()


Record = tuple[Any, ...]
"""A batch as a recorder keeps it: its bytes, the fields of :class:`Delivery`, the manifest's."""


class Delivery(NamedTuple):
    """A batch as it was handed over, ``wait_ns`` after it was asked for at ``began_ns``."""

    epoch: int
    batch: int
    wait_ns: int
    began_ns: int
    manifest: BatchManifest


@dataclasses.dataclass
class Totals:
    """What is counted of a recorder's whole life, forgotten batches included.

    Attributes:
        epochs: begun.
        forgotten: batches that are forgotten.
        samples: in these.
        incidents: samples skipped, replaced and late.
        memory_bytes: what the workers held when they last said so; None before that.
    """

    epochs: int = 0
    forgotten: int = 0
    samples: int = 0
    incidents: Counter[str] = dataclasses.field(default_factory=Counter)
    memory_bytes: int | None = None


class Recorder:
    """What was delivered, newest kept: the notebook behind ``loader.provenance`` and ``.audit``.

    At 64 MiB, the default, it holds the newest 2.5 million samples in batches of 64 (25 bytes a
    sample), or the newest 100,000 in batches of one. Past the bound the oldest batches are
    forgotten, never an error and never a slow-down; the audit does not need them. Beside the
    records, the indices of a ``Subset`` that is gone are kept, the newest in half as many bytes.
    Pickles and deep copies are blank notebooks of the same bound.

    Args:
        max_bytes: bound on the memory of the records, in bytes.

    Attributes:
        epochs: how many epochs were begun; each ``iter(loader)`` begins one.
        forgotten: how many batches were forgotten to stay within ``max_bytes``.

    Raises:
        ValueError: if ``max_bytes`` is not a positive number.

    Example:
        >>> from safeloader import Recorder, SafeDataLoader
        >>> recorder = Recorder(max_bytes=2**20)
        >>> loader = SafeDataLoader([5, 6, 7], batch_size=2, recorder=recorder)
        >>> for batch in loader:
        ...     print(batch, loader.last_batch.indices)
        tensor([5, 6]) (0, 1)
        tensor([7]) (2,)
    """

    epochs: int = 0
    forgotten: int = 0
    loader_name: str = ""  # of the first loader that wrote into it
    _mark: object = None  # under which it is watched for use

    def __init__(self, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes <= 0:
            raise ValueError(
                f"max_bytes must be a positive int, the bytes to keep records in; got "
                f"{bounded_text(max_bytes)}"
            )
        self.max_bytes = max_bytes
        # A plain tuple a batch: its bytes and the fields of Delivery and BatchManifest. The garbage
        # collector leaves tuples of numbers and bytes alone, and would walk a million named ones
        # again and again.
        self.held: dict[int, tuple[Any, ...]] = {}
        self._held_bytes = 0
        self.newest_audit: Callable[[], EpochAudit] | None = None
        self.history = AuditHistory()
        self.facts = FactsOfEpochs(max_bytes // 2)
        self.transport = TransportCounts()
        self.parked = ParkedSlots()
        self.incidents: Counter[str] = Counter()
        self.told: set[str] = set()  # notes on earlier epochs
        self.looks: list[Any] = []  # at the workers of the loaders that write into it
        # Of a dataset, by id: number and first indices of its sampler's last epoch, and if told.
        self.orders: dict[int, tuple[int, Packed, bool]] = {}
        self.memory_of_workers: Callable[[], Callable[[], int | None] | None] = lambda: None
        self.totals = Totals()
        self.flight: Callable[[], Any] = lambda: None  # the flight recorder of the workers
        self.run: Any = None  # the folder in a run's that its epochs are written to

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.max_bytes,)

    def __repr__(self) -> str:
        return (
            f"Recorder({len(self.held)} batches of {self.epochs} epochs, "
            f"{self._held_bytes} of {self.max_bytes} bytes)"
        )

    def begin_epoch(self, audit: Callable[[int], EpochAudit]) -> int:
        """Number the next epoch and take the way to its audit."""
        epoch = self.epochs
        self.epochs += 1
        self.totals.epochs = self.epochs
        _blank.pop(self._mark, None)
        self.newest_audit = lambda: audit(epoch)
        if self.incidents:
            self.incidents = Counter()
        return epoch

    def delivered(
        self, epoch: int, batch: int, wait_ns: int, manifest: BatchManifest, began_ns: int = 0
    ) -> None:
        """Note a batch as it is handed over; hot path."""
        if manifest.keys or manifest.fingerprints is not None or manifest.failures:
            # They were used already, and may be of any size.
            manifest = manifest._replace(keys=None, fingerprints=None, failures=None)
        indices, stamps, incidents = manifest.indices, manifest.stamps, manifest.incidents
        nbytes = _RECORD_BYTES + len(stamps)
        nbytes += len(indices) if type(indices) is bytes else weight(indices)
        if incidents is not None:
            nbytes += weight(incidents)
        record = (nbytes, epoch, batch, wait_ns, began_ns, *manifest)
        self.held[epoch << _BATCH_BITS | batch] = record
        self._held_bytes += nbytes
        if self._held_bytes > self.max_bytes:
            self._forget()

    def skipped(
        self, epoch: int, batch: int, incidents: Sequence[tuple[Any, SampleIncident]], _: Any
    ) -> None:
        """Count the samples left out, replaced or late: in all, and in the epoch begun last."""
        self.totals.incidents.update(incident.what for _, incident in incidents)
        if epoch == self.epochs - 1:
            self.incidents.update(incident.what for _, incident in incidents)

    def closed(self, epoch: int, notes: Sequence[str]) -> None:
        """Nothing more comes in an epoch, and its workers may be about to go."""
        self.worker_memory()

    def worker_memory(self) -> int | None:
        """What the workers hold, or held last, in bytes; None if that is not known."""
        read = self.memory_of_workers()
        now = None if read is None else read()
        if now is not None:
            self.totals.memory_bytes = now
        return self.totals.memory_bytes

    def _forget(self) -> None:
        """Drop the oldest batches until a sixteenth of the bound is free.

        Many at once: a dict that lost its first items has to look for the next one from its front.
        """
        target = self.max_bytes - self.max_bytes // 16
        epochs = set()
        for key in list(itertools.islice(self.held, len(self.held) - 1)):
            record = self.held.pop(key)
            self._held_bytes -= record[0]
            self.totals.samples += samples_in(record)
            self.forgotten += 1
            epochs.add(key >> _BATCH_BITS)
            if self._held_bytes <= target:
                break
        self.totals.forgotten = self.forgotten
        oldest = next(iter(self.held)) >> _BATCH_BITS
        self.facts.forget(epoch for epoch in epochs if epoch < oldest)

    def deliveries(self) -> Iterator[Delivery]:
        """The batches still held, oldest first."""
        return map(as_delivery, list(self.held.values()))

    def last_delivery(self) -> Delivery | None:
        """The batch handed over last."""
        last = next(reversed(self.held.values()), None)
        return None if last is None else as_delivery(last)

    def newest(self, most: int | None = None) -> list[Delivery]:
        """The newest batches of the epoch begun last, oldest first; those still held."""
        found = []
        for record in list(itertools.islice(reversed(self.held.values()), most)):
            if record[1] != self.epochs - 1:
                break
            found.append(as_delivery(record))
        return found[::-1]

    def find(self, batch: int, epoch: int | None) -> Delivery | None:
        """Batch number ``batch`` of ``epoch``, by default of the newest epoch."""
        at = self.epochs - 1 if epoch is None else epoch
        found = self.held.get(at << _BATCH_BITS | batch) if min(at, batch) >= 0 else None
        return None if found is None else as_delivery(found)

    def audit(self) -> EpochAudit | None:
        """The audit of the epoch begun last, as it stands; None before the first."""
        return None if self.newest_audit is None else self.newest_audit()

    def audits(self) -> list[EpochAudit]:
        """The audits of the newest epochs, oldest first."""
        return self.history.audits()


_BATCH_BITS = 48  # an epoch of 280 million million batches


def samples_in(record: Record) -> int:
    """How many samples a batch holds; on the hot path, once the bound is reached."""
    if type(record[_INDICES]) is bytes and record[_ORDINAL] is record[_INCIDENTS] is None:
        return count(record[_INDICES])
    manifest = BatchManifest(*record[_MANIFEST:])
    if manifest.incidents is not None:
        return len(BatchContents.of(manifest).positions)
    return count(manifest.indices) if manifest.ordinal is None else manifest.samples or 0


EPOCH, WAIT_NS, BEGAN_NS = (
    1 + Delivery._fields.index(it) for it in ("epoch", "wait_ns", "began_ns")
)
_MANIFEST = 5  # where its fields begin in a record
_INDICES, _ORDINAL, _INCIDENTS = (
    _MANIFEST + BatchManifest._fields.index(name) for name in ("indices", "ordinal", "incidents")
)


def as_delivery(record: Record) -> Delivery:
    """A batch, as the recorder keeps it."""
    _, epoch, batch, wait_ns, began_ns, *manifest = record
    return Delivery(epoch, batch, wait_ns, began_ns, BatchManifest(*manifest))


# ── a notebook that nobody wrote in ──────────────────────────────────────────────────────────────

# By a mark of each; not by the recorders themselves, which have to be able to go.
_blank: dict[object, tuple[str, int]] = {}
_told: deque[bool] = deque(maxlen=1)


def watch_for_use(recorder: Recorder, made_at: str) -> None:
    """At the end of the program, say once that a loader never began an epoch.

    Frameworks that rebuild a loader as torch's own class do so in silence; the user would take the
    empty notebook for a clean run.
    """
    recorder._mark = object()
    _blank[recorder._mark] = made_at, os.getpid()


def watch_no_more(recorder: Recorder) -> None:
    """What was asked of its loader needed no epoch: nothing is said of that at the end."""
    _blank.pop(recorder._mark, None)


def failure_was_told() -> None:
    """A failure was raised to the user: what came after it need not have run."""
    _told.append(True)


@atexit.register
def _say_blank() -> None:
    loaders = [made_at for made_at, pid in _blank.values() if pid == os.getpid()]
    ended_in_error = bool(_told) or hasattr(sys, "last_value")
    if not loaders or ended_in_error or os.environ.get("SAFELOADER", "").lower() == "off":
        return
    logger.warning(
        "%d SafeDataLoader(s) never delivered a batch in this process, so nothing was recorded or "
        "checked for them here: made at %s. That is as it should be where the program did not use "
        "them, or another process did. Else a framework made them again as torch's own DataLoader: "
        "give what it hands back to safeloader.instrument, or start the program with "
        "python -m safeloader run",
        len(loaders),
        ", ".join(sorted(set(loaders))[:3]),
    )
