"""Drawn against delivered, for map-style datasets. Runs in: main.

Each batch is checked at the moment it is handed over, by the manifest that its worker wrote. Memory
grows with the batches in flight; over the epoch only counts, the coverage bitmap and, with ``key``,
the first two million keys are kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from safeloader.delivery.audit import EpochAudit
from safeloader.delivery.coverage import Coverage, IndexSet
from safeloader.delivery.indices import Packed, count, same, unpack
from safeloader.delivery.manifest import BatchManifest, expected_indices, source_positions, sources
from safeloader.introspect.texts import index_text, indices_text
from safeloader.introspect.values import weight

KEYS_LIMIT = 2_000_000
REASONS_LIMIT = 1000
REASONS_BYTES = 1 << 20  # of indices and reasons together


class Discrepancy(NamedTuple):
    """What the check of one batch, or of the epoch's end, found."""

    reason: str
    missing: tuple[Any, ...] = ()
    duplicated: tuple[Any, ...] = ()
    unexpected: tuple[Any, ...] = ()
    sound: tuple[Any, ...] = ()
    hint: str = ""

    @property
    def culprits(self) -> tuple[Any, ...]:
        """The indices the trouble is about."""
        return self.missing + self.duplicated + self.unexpected


class PendingBatch(NamedTuple):
    """A batch that was drawn and has not come: its number in the epoch, and its indices."""

    batch: int | None
    indices: tuple[Any, ...]


class Ledger(Protocol):
    """One epoch's accounts."""

    lock: threading.RLock  # held while the accounts change, and while another thread reads them
    delivered_count: int
    by_class: dict[str, IndexSet]
    reasons: dict[Any, str]  # why an index was skipped, replaced or late

    def drawn(self, seq: int, indices: Packed) -> None:
        """Batch ``seq`` was drawn."""

    def draw_failed(self, seq: int) -> None:
        """The sampler raised in place of batch ``seq``."""

    def draw_interrupted(self, lost: Packed) -> None:
        """An interrupt was raised through the sampler; ``lost`` it had drawn meanwhile."""

    def draws_ended(self, dropped: Packed) -> None:
        """The sampler is at its end."""

    def interrupted(self, manifest: BatchManifest | None) -> None:
        """The user got an exception that is not ours; on the way was the batch of ``manifest``."""

    def check(self, manifest: BatchManifest) -> Discrepancy | None:
        """Compare a batch that is about to be handed over; without trouble it counts as such."""

    def settle(
        self, discrepancy: Discrepancy, manifest: BatchManifest, *, handed_over: bool
    ) -> None:
        """Book a batch in trouble: handed over all the same, or lost with the error raised."""

    def failed(self, manifest: BatchManifest, indices: Sequence[Any]) -> None:
        """A batch was lost with an error that is raised to the user."""

    def note_reasons(self, manifest: BatchManifest) -> None:
        """Keep why samples of a batch are not there."""

    def lost(self, seq: int) -> None:
        """Batch ``seq`` was lost with its worker, and the error is raised."""

    def abandon(self) -> None:
        """Nothing more will come: the workers died, and the error was raised."""

    def opened(self, seq: int) -> PendingBatch | None:
        """What is known of a batch that was drawn and has not come."""

    def finish(self) -> Discrepancy | None:
        """The stock iterator says that the epoch is over: is it?"""

    @property
    def complete(self) -> bool:
        """Whether everything the sampler had is accounted for."""

    @property
    def settled(self) -> bool:
        """Whether it is, and nothing more can come; hot path."""

    def notes(self, length: int | None) -> list[str]:
        """What is worth saying beyond the classes of the audit, as it stands."""

    def audit(self, epoch: int, length: int | None) -> EpochAudit:
        """The accounts as they stand; ``length`` is that of the dataset."""


class Accounts:
    """What this ledger and that of streams (``stream_ledger.py``) both keep."""

    def __init__(self, *, with_keys: bool) -> None:
        self.lock = threading.RLock()  # a signal handler may ask for the audit
        self.delivered_count = 0
        self._handed: int | None = None  # the batch counted last as delivered
        self._interrupts = 0  # may have lost batches that are not known to be lost
        self.by_class = {
            name: IndexSet()
            for name in (
                "missing",
                "duplicated",
                "unexpected",
                "failed",
                "dropped",
                "skipped",
                "replaced",
                "late",
            )
        }
        self.reasons: dict[Any, str] = {}
        self._reasons_bytes = 0
        self.donors: dict[Any, Any] = {}
        self._index_of_key: dict[Any, Any] | None = {} if with_keys else None
        self._keys_past_limit = 0

    def book(self, discrepancy: Discrepancy) -> None:
        self.by_class["missing"].add(discrepancy.missing)
        self.by_class["duplicated"].add(discrepancy.duplicated)
        self.by_class["unexpected"].add(discrepancy.unexpected)

    def settle(
        self, discrepancy: Discrepancy, manifest: BatchManifest, *, handed_over: bool
    ) -> None:
        self.book(discrepancy)
        if handed_over:
            extra = len(discrepancy.unexpected) + len(discrepancy.duplicated)
            self.delivered_count += len(discrepancy.sound) + extra
        else:
            self.by_class["failed"].add(discrepancy.sound)

    def note_reasons(self, manifest: BatchManifest) -> None:
        asked = expected_indices(manifest)
        for incident in manifest.incidents or ():
            index = asked[incident.position]
            self._reasons_bytes += weight(index) + weight(incident.reason)
            if len(self.reasons) < REASONS_LIMIT and self._reasons_bytes <= REASONS_BYTES:
                self.reasons[index] = incident.reason

    def book_incidents(self, manifest: BatchManifest) -> int:
        """Note the samples left out, replaced or late; how many of the batch are not there."""
        self.note_reasons(manifest)
        known = sources(manifest)
        gone = 0
        for incident in manifest.incidents or ():
            index = known[incident.position]
            self.by_class[incident.what].add((index,))
            gone += incident.what != "late"
            if incident.donor is not None and len(self.donors) < REASONS_LIMIT:
                self.donors[index] = known[incident.donor]
        return gone

    def take_back(self, manifest: BatchManifest) -> None:
        """A batch that counts as delivered was lost after all, with an error that is raised."""
        gone = {
            incident.position for incident in manifest.incidents or () if incident.what != "late"
        }
        left = [index for k, index in enumerate(expected_indices(manifest)) if k not in gone]
        self.delivered_count -= len(left)
        self.by_class["failed"].add(left)

    def interrupted(self, manifest: BatchManifest | None) -> None:
        """The user got an exception that is not ours: what it took with it is told."""
        if manifest is None:
            self._interrupts += 1
        elif manifest.seq == self._handed:
            self.take_back(manifest)
        else:
            self.failed(manifest, expected_indices(manifest))

    def failed(self, manifest: BatchManifest, indices: Sequence[Any]) -> None:
        raise NotImplementedError

    def abandon(self) -> None:
        pass  # what was read of a stream and not sent is not known

    def same_key(self, keys: Iterable[Any], identities: Sequence[Any]) -> Discrepancy | None:
        """Samples whose key came before under another index."""
        known = self._index_of_key
        assert known is not None
        again: list[Any] = []
        sound: list[Any] = []
        said: list[str] = []
        for key, index in zip(keys, identities, strict=False):
            first = known.get(key, index)
            if first != index:
                again.append(index)
                said.append(
                    f"index {index_text(index)} and index {index_text(first)} are one sample "
                    f"(key {index_text(key, 60)})"
                )
                continue
            sound.append(index)
            if len(known) < KEYS_LIMIT:
                known[key] = index
            elif key not in known:
                self._keys_past_limit += 1
        if not again:
            return None
        more = f"; and {len(said) - 3} more" if len(said) > 3 else ""
        return Discrepancy("; ".join(said[:3]) + more, duplicated=tuple(again), sound=tuple(sound))

    def notes(self, length: int | None) -> list[str]:
        notes = []
        if self._keys_past_limit:
            notes.append(
                f"the keys of the first {KEYS_LIMIT} samples were compared; "
                f"{self._keys_past_limit} later ones only against these"
            )
        return notes

    def as_audit(
        self, epoch: int, *, complete: bool, drawn: int, notes: list[str], **more: Any
    ) -> EpochAudit:
        counts = {"repeated": 0, "unvisited": 0}
        counts |= {name: index_set.count for name, index_set in self.by_class.items()}
        counts |= more.pop("counts", {})
        more |= {name: index_set.array() for name, index_set in self.by_class.items()}
        return EpochAudit(
            epoch=epoch,
            complete=complete,
            drawn=drawn,
            delivered=self.delivered_count,
            counts=counts,
            notes=tuple(notes),
            reasons=dict(self.reasons),
            donors=dict(self.donors),
            **more,
        )


class MapLedger(Accounts):
    """The ledger of a map-style dataset: every batch drawn is in ``pending`` until it comes."""

    def __init__(
        self, *, with_keys: bool, expected_batches: Callable[[], int | None] | None
    ) -> None:
        super().__init__(with_keys=with_keys)
        self._expected_batches = expected_batches
        self._pending: dict[int, Packed] = {}
        self._first_seq: int | None = None
        self._last_seq = -1
        self._draws_ended = False
        self._sampler_failed = False
        self._drawn = 0
        self._coverage = Coverage()

    def drawn(self, seq: int, indices: Packed) -> None:
        number = count(indices)
        with self.lock:
            if self._first_seq is None:
                self._first_seq = seq
            # Interrupts come with calls: none between these, or the accounts would not add up.
            self._pending[seq] = indices
            self._last_seq = seq
            self._drawn += number
            self._coverage.add(indices, number)

    def draw_failed(self, seq: int) -> None:
        self._sampler_failed = True

    def draw_interrupted(self, lost: Packed) -> None:
        with self.lock:
            self._sampler_failed = True
            self._out_of_batches(lost)
            self.by_class["failed"].add(unpack(lost))

    def draws_ended(self, dropped: Packed) -> None:
        with self.lock:
            if not self._draws_ended:
                self._draws_ended = True
                self._out_of_batches(dropped)
                self.by_class["dropped"].add(unpack(dropped))

    def _out_of_batches(self, indices: Packed) -> None:
        self._drawn += count(indices)
        self._coverage.add(indices, count(indices))

    def check(self, manifest: BatchManifest) -> Discrepancy | None:
        expected = self._pending.get(manifest.seq)
        indices, samples = manifest.indices, manifest.samples
        if expected is None or not same(expected, indices):
            self._pending.pop(manifest.seq, None)
            return self._compare(expected, manifest)
        number = count(expected)
        if manifest.incidents is not None:
            number -= self.book_incidents(manifest)
        elif samples != number and samples is not None:
            del self._pending[manifest.seq]
            return _miscounted(unpack(expected), samples)
        if self._index_of_key is not None and manifest.keys is not None:
            known = sources(manifest)
            discrepancy = self.same_key(
                manifest.keys, [known[place] for place in source_positions(manifest)]
            )
            if discrepancy is not None:
                del self._pending[manifest.seq]
                return discrepancy
        self._handed = manifest.seq  # and no call from here on, see above
        self.delivered_count += number
        del self._pending[manifest.seq]
        return None

    def _compare(self, expected: Packed | None, manifest: BatchManifest) -> Discrepancy:
        came = unpack(manifest.indices)
        who = "the main process" if manifest.worker_id is None else f"worker {manifest.worker_id}"
        if expected is None:
            first = self._first_seq
            if first is not None and first <= manifest.seq <= self._last_seq:
                reason = f"{who} sent batch {manifest.seq - first} a second time"
                return Discrepancy(reason, duplicated=came)
            return Discrepancy(f"{who} sent a batch that this epoch never drew", unexpected=came)
        drawn = unpack(expected)
        left = list(drawn)
        sound = []
        unexpected = []
        for index in came:
            place = next((k for k, item in enumerate(left) if same(item, index)), None)
            if place is None:
                unexpected.append(index)
            else:
                sound.append(left.pop(place))
        reason = f"{who} was asked for {indices_text(drawn)} and answered for {indices_text(came)}"
        if not left and not unexpected:
            reason += ": the same indices in another order"
            return Discrepancy(reason, sound=tuple(sound))
        return Discrepancy(
            reason, missing=tuple(left), unexpected=tuple(unexpected), sound=tuple(sound)
        )

    def failed(self, manifest: BatchManifest, indices: Sequence[Any]) -> None:
        expected = self._pending.pop(manifest.seq, None)
        if expected is not None:
            self.by_class["failed"].add(unpack(expected))

    def lost(self, seq: int) -> None:
        expected = self._pending.pop(seq, None)
        if expected is not None:
            self.by_class["failed"].add(unpack(expected))

    def opened(self, seq: int) -> PendingBatch | None:
        packed = self._pending.get(seq)
        if packed is None:
            return None
        return PendingBatch(seq - (self._first_seq or 0), unpack(packed))

    def interrupted(self, manifest: BatchManifest | None) -> None:
        super().interrupted(manifest)
        if manifest is None and self._expected_batches is not None:
            self.abandon()

    def abandon(self) -> None:
        for seq in list(self._pending):
            self.lost(seq)

    def finish(self) -> Discrepancy | None:
        if len(self._pending) <= 2 * self._interrupts:  # the batch on its way, and one drawn ahead
            self.abandon()
        missing = tuple(index for packed in self._pending.values() for index in unpack(packed))
        self._pending.clear()
        if missing:
            discrepancy = Discrepancy(
                f"the epoch ended with {len(missing)} samples drawn and never handed over: "
                f"{indices_text(missing)}",
                missing=missing,
            )
            self.book(discrepancy)
            return discrepancy
        if not (self._draws_ended or self._sampler_failed or self._interrupts):
            return Discrepancy(
                f"the epoch ended after {self.delivered_count} samples although the sampler has "
                "more to draw"
            )
        return None

    @property
    def complete(self) -> bool:
        return self._complete(None if self._draws_ended else self._expected())

    def _expected(self) -> int | None:
        return None if self._expected_batches is None else self._expected_batches()

    def _complete(self, expected: int | None) -> bool:
        if self._pending or self._sampler_failed:
            return False
        batches = 0 if self._first_seq is None else self._last_seq + 1 - self._first_seq
        return self._draws_ended or batches == expected

    @property
    def settled(self) -> bool:
        return self._draws_ended and not self._pending

    def notes(self, length: int | None) -> list[str]:
        notes = super().notes(length)
        if unmapped := self._coverage.unmapped:
            notes.append(
                f"{unmapped} indices were too many or too far apart to be mapped: others may be "
                "repeated too, and what is unvisited is not known"
            )
        return notes

    def audit(self, epoch: int, length: int | None) -> EpochAudit:
        expected = self._expected()  # code of the user's, perhaps: not under the lock
        with self.lock:
            complete = self._complete(expected)
            repeated, repeated_count = self._coverage.repeated(length)
            unvisited, unvisited_count = self._coverage.unvisited(length)
            notes = self.notes(length)
            if ahead := sum(map(count, self._pending.values())):
                notes.append(f"not handed over: {ahead}, in batches drawn ahead for the workers")
            if self._expected_batches and expected is None and not self._draws_ended:
                notes.append("the sampler was not asked whether it has more")
            return self.as_audit(
                epoch,
                complete=complete,
                drawn=self._drawn,
                notes=notes,
                repeated=repeated,
                unvisited=unvisited,
                counts={"repeated": repeated_count, "unvisited": unvisited_count},
            )


def _miscounted(drawn: tuple[Any, ...], samples: int) -> Discrepancy:
    """``__getitems__`` broke its contract: which sample belongs to which index is unknown, and the
    first ones are taken to be in order."""
    asked = len(drawn)
    if samples < asked:
        return Discrepancy(
            f"__getitems__ was asked for {asked} samples and gave {samples}; the last "
            f"{asked - samples} of {indices_text(drawn)} count as missing, though it may have left "
            "out others",
            missing=drawn[samples:],
            sound=drawn[:samples],
            hint=_ONE_EACH,
        )
    return Discrepancy(
        f"__getitems__ was asked for {asked} samples, {indices_text(drawn)}, and gave {samples}",
        unexpected=(-1,) * (samples - asked),
        sound=drawn,
        hint=_ONE_EACH,
    )


_ONE_EACH = (
    "have __getitems__ give one sample for each index, in their order: "
    "len(loader.dataset.__getitems__(indices)) has to be len(indices)"
)
