"""Drawn against delivered, for map-style datasets; runs in main, pure: no process, no torch.

Each batch is checked at the moment it is handed over, by the papers that its worker wrote. Memory
grows with the batches in flight; over the epoch only counts, the coverage bitmap and, with ``key``,
the first two million keys are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from safeloader.main.audit import EpochAudit
from safeloader.main.tally import Coverage, Tally
from safeloader.wire.indices import Packed, count, same, unpack
from safeloader.wire.records import Papers, asked_for, contents
from safeloader.wire.texts import index_text, indices_text
from safeloader.wire.values import weight

KEYS_LIMIT = 2_000_000
REASONS_LIMIT = 1000
REASONS_BYTES = 1 << 20  # of indices and reasons together


class Trouble(NamedTuple):
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


class Open(NamedTuple):
    """A batch that was drawn and has not come: its number in the epoch, and its indices."""

    batch: int | None
    indices: tuple[Any, ...]


class Ledger(Protocol):
    """One epoch's accounts."""

    delivered_count: int
    tallies: dict[str, Tally]
    reasons: dict[Any, str]  # why an index was skipped or late
    measures_length: bool  # whether len(dataset) is compared at the end of the epoch

    def drawn(self, seq: int, indices: Packed) -> None:
        """Batch ``seq`` was drawn."""

    def draw_failed(self, seq: int) -> None:
        """The sampler raised in place of batch ``seq``."""

    def draws_ended(self, dropped: Packed) -> None:
        """The sampler is at its end."""

    def check(self, papers: Papers) -> Trouble | None:
        """Compare a batch that is about to be handed over; without trouble it counts as such."""

    def settle(self, trouble: Trouble, papers: Papers, *, handed_over: bool) -> None:
        """Book a batch in trouble: handed over all the same, or lost with the error raised."""

    def failed(self, papers: Papers, indices: Sequence[Any]) -> None:
        """A batch was lost with an error that is raised to the user."""

    def take_back(self, papers: Papers) -> None:
        """A batch that was checked is lost after all, with an error that is raised."""

    def lost(self, seq: int) -> None:
        """Batch ``seq`` was lost with its worker, and the error is raised."""

    def opened(self, seq: int) -> Open | None:
        """What is known of a batch that was drawn and has not come."""

    def finish(self) -> Trouble | None:
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
        self.delivered_count = 0
        self.tallies = {
            name: Tally()
            for name in (
                "missing",
                "duplicated",
                "unexpected",
                "failed",
                "dropped",
                "skipped",
                "late",
            )
        }
        self.reasons: dict[Any, str] = {}
        self._reasons_bytes = 0
        self.replaced_count = 0
        self._index_of_key: dict[Any, Any] | None = {} if with_keys else None
        self._keys_past_limit = 0

    def book(self, trouble: Trouble) -> None:
        self.tallies["missing"].add(trouble.missing)
        self.tallies["duplicated"].add(trouble.duplicated)
        self.tallies["unexpected"].add(trouble.unexpected)

    def settle(self, trouble: Trouble, papers: Papers, *, handed_over: bool) -> None:
        self.book(trouble)
        if handed_over:
            extra = len(trouble.unexpected) + len(trouble.duplicated)
            self.delivered_count += len(trouble.sound) + extra
        else:
            self.tallies["failed"].add(trouble.sound)

    def book_mishaps(self, papers: Papers) -> int:
        """Note the samples left out, replaced or late; how many of the batch are not there."""
        asked = asked_for(papers)
        gone = 0
        for mishap in papers.mishaps or ():
            index = asked[mishap.position]
            if mishap.what == "late":
                self.tallies["late"].add((index,))
            else:
                self.tallies["skipped"].add((index,))
                self.replaced_count += mishap.what == "replaced"
                gone += 1
            self._reasons_bytes += weight(index) + weight(mishap.reason)
            if len(self.reasons) < REASONS_LIMIT and self._reasons_bytes <= REASONS_BYTES:
                self.reasons[index] = mishap.reason
        return gone

    def take_back(self, papers: Papers) -> None:
        """A batch that counts as delivered was lost after all, with an error that is raised."""
        gone = {mishap.position for mishap in papers.mishaps or () if mishap.what != "late"}
        left = [index for k, index in enumerate(asked_for(papers)) if k not in gone]
        self.delivered_count -= len(left)
        self.tallies["failed"].add(left)

    def same_key(self, keys: Iterable[Any], identities: Sequence[Any]) -> Trouble | None:
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
        return Trouble("; ".join(said[:3]) + more, duplicated=tuple(again), sound=tuple(sound))

    def notes(self, length: int | None) -> list[str]:
        notes = []
        if self.replaced_count:
            skipped = self.tallies["skipped"].count
            notes.append(f"skipped samples with a replacement: {self.replaced_count} of {skipped}")
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
        counts |= {name: tally.count for name, tally in self.tallies.items()}
        counts |= more.pop("counts", {})
        return EpochAudit(
            epoch=epoch,
            complete=complete,
            drawn=drawn,
            delivered=self.delivered_count,
            counts=counts,
            notes=tuple(notes),
            reasons=dict(self.reasons),
            **{name: tally.array() for name, tally in self.tallies.items()},
            **more,
        )


class MapLedger(Accounts):
    """The ledger of a map-style dataset: every batch drawn is in ``pending`` until it comes."""

    measures_length = False

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
        self._coverage = Coverage()

    def drawn(self, seq: int, indices: Packed) -> None:
        self._pending[seq] = indices
        self._last_seq = seq
        self._coverage.add(indices)
        if self._first_seq is None:
            self._first_seq = seq

    def draw_failed(self, seq: int) -> None:
        self._sampler_failed = True

    def draws_ended(self, dropped: Packed) -> None:
        if not self._draws_ended:
            self._draws_ended = True
            self._coverage.add(dropped)
            self.tallies["dropped"].add(unpack(dropped))

    def check(self, papers: Papers) -> Trouble | None:
        expected = self._pending.pop(papers.seq, None)
        indices, samples = papers.indices, papers.samples
        if expected is None or not same(expected, indices):
            return self._compare(expected, papers)
        number = count(expected)
        if papers.mishaps is not None:
            number -= self.book_mishaps(papers)
        elif samples != number and samples is not None:
            return _miscounted(unpack(expected), samples)
        if self._index_of_key is not None and papers.keys is not None:
            drawn = unpack(expected)
            trouble = self.same_key(papers.keys, [drawn[place] for place in contents(papers)])
            if trouble is not None:
                return trouble
        self.delivered_count += number
        return None

    def _compare(self, expected: Packed | None, papers: Papers) -> Trouble:
        came = unpack(papers.indices)
        who = "the main process" if papers.worker_id is None else f"worker {papers.worker_id}"
        if expected is None:
            first = self._first_seq
            if first is not None and first <= papers.seq <= self._last_seq:
                reason = f"{who} sent batch {papers.seq - first} a second time"
                return Trouble(reason, duplicated=came)
            return Trouble(f"{who} sent a batch that this epoch never drew", unexpected=came)
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
            return Trouble(reason, sound=tuple(sound))
        return Trouble(
            reason, missing=tuple(left), unexpected=tuple(unexpected), sound=tuple(sound)
        )

    def failed(self, papers: Papers, indices: Sequence[Any]) -> None:
        expected = self._pending.pop(papers.seq, None)
        if expected is not None:
            self.tallies["failed"].add(unpack(expected))

    def lost(self, seq: int) -> None:
        expected = self._pending.pop(seq, None)
        if expected is not None:
            self.tallies["failed"].add(unpack(expected))

    def opened(self, seq: int) -> Open | None:
        packed = self._pending.get(seq)
        if packed is None:
            return None
        return Open(seq - (self._first_seq or 0), unpack(packed))

    def finish(self) -> Trouble | None:
        missing = tuple(index for packed in self._pending.values() for index in unpack(packed))
        self._pending.clear()
        if missing:
            trouble = Trouble(
                f"the epoch ended with {len(missing)} samples drawn and never handed over: "
                f"{indices_text(missing)}",
                missing=missing,
            )
            self.book(trouble)
            return trouble
        if not self._draws_ended and not self._sampler_failed:
            return Trouble(
                f"the epoch ended after {self.delivered_count} samples although the sampler has "
                "more to draw"
            )
        return None

    @property
    def complete(self) -> bool:
        if self._pending or self._sampler_failed:
            return False
        if self._draws_ended or self._expected_batches is None:
            return self._draws_ended
        first = self._first_seq
        batches = 0 if first is None else self._last_seq + 1 - first
        return batches == self._expected_batches()  # asked for when somebody reads the audit

    @property
    def settled(self) -> bool:
        return self._draws_ended and not self._pending

    def notes(self, length: int | None) -> list[str]:
        notes = super().notes(length)
        if unmapped := self._coverage.unmapped:
            notes.append(f"{unmapped} indices were too many or too large to be mapped")
        return notes

    def audit(self, epoch: int, length: int | None) -> EpochAudit:
        coverage = self._coverage
        repeated = coverage.repeated()  # before the notes: it brings the coverage up to date
        notes = self.notes(length)
        if ahead := sum(map(count, self._pending.values())):
            notes.append(f"not handed over: {ahead}, in batches drawn ahead for the workers")
        return self.as_audit(
            epoch,
            complete=self.complete,
            drawn=coverage.drawn,
            notes=notes,
            repeated=repeated,
            unvisited=coverage.unvisited(length),
            counts={
                "repeated": coverage.repeated_count(),
                "unvisited": coverage.unvisited_count(length),
            },
        )


def _miscounted(drawn: tuple[Any, ...], samples: int) -> Trouble:
    """``__getitems__`` broke its contract: which sample belongs to which index is unknown, and the
    first ones are taken to be in order."""
    asked = len(drawn)
    if samples < asked:
        return Trouble(
            f"__getitems__ was asked for {asked} samples and gave {samples}; the last "
            f"{asked - samples} of {indices_text(drawn)} count as missing, though it may have left "
            "out others",
            missing=drawn[samples:],
            sound=drawn[:samples],
            hint=_ONE_EACH,
        )
    return Trouble(
        f"__getitems__ was asked for {asked} samples, {indices_text(drawn)}, and gave {samples}",
        unexpected=(-1,) * (samples - asked),
        sound=drawn,
        hint=_ONE_EACH,
    )


_ONE_EACH = (
    "have __getitems__ give one sample for each index, in their order: "
    "len(loader.dataset.__getitems__(indices)) has to be len(indices)"
)
