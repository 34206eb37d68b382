"""Drawn against delivered, for map-style datasets. Runs in: main.

Each batch is checked at the moment it is handed over, by the manifest that its worker wrote. Memory
grows with the batches in flight; over the epoch only counts, the coverage bitmap and, with ``key``,
the keys of the first samples are kept: two million of them, or 256 MiB.
"""

from __future__ import annotations

import dataclasses
import threading
from array import array
from collections import defaultdict
from collections.abc import Callable
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from safeloader.delivery.audit import CLASSES, EpochAudit, SameKey
from safeloader.delivery.audit_part import LEFT_OUT, Digests
from safeloader.delivery.coverage import Coverage, IndexSet, Listed
from safeloader.delivery.indices import Packed, count, same, unpack
from safeloader.delivery.ladder import Delivered
from safeloader.delivery.manifest import BatchContents, BatchManifest, expected_indices
from safeloader.introspect.texts import index_text, indices_text
from safeloader.introspect.values import weight

KEYS_LIMIT = 2_000_000
KEYS_BYTES = 1 << 28  # of keys and their indices together
REASONS_LIMIT = 1000
REASONS_BYTES = 1 << 20  # of indices and reasons together
SAME_KEYS_LIMIT = 1000  # pairs of indices that are one sample, listed in the audit
_KEYS_SHOWN = 3
_IN_MAIN = -1  # of the worker that gave a sample
_ONE_EACH = (
    "have __getitems__ give one sample for each index, in their order: "
    "len(loader.dataset.__getitems__(indices)) has to be len(indices)"
)


class Discrepancy(NamedTuple):
    """What the check of one batch, or of the epoch's end, found."""

    reason: str
    missing: tuple[Any, ...] = ()
    duplicated: tuple[Any, ...] = ()
    unexpected: tuple[Any, ...] = ()
    sound: tuple[Any, ...] = ()
    hint: str = ""
    of_keys: bool = False  # what is duplicated was drawn, under another index of the same key

    @property
    def culprits(self) -> tuple[Any, ...]:
        """The indices that are not as they should be."""
        return self.missing + self.duplicated + self.unexpected


class PendingBatch(NamedTuple):
    """A batch that was drawn and has not come: its number in the epoch, and its indices."""

    batch: int | None
    indices: tuple[Any, ...]


class _Keyed:
    """The keys of samples."""

    def __init__(self) -> None:
        self.places: dict[Any, int] = {}  # of each its place among these two:
        self.indices: list[Any] = []  # that it was first given for
        self.workers = array("i")  # by which
        self.bytes = 0  # of keys and indices


class Ledger:
    """One epoch's accounts, and what is common to both kinds of dataset.

    Attributes:
        lock: held while the accounts change, and while another thread reads them.
        delivered_count: samples drawn and handed over.
        delivered_by: the same for the main process, and then for each worker.
        same_keys: the first pairs of indices that one key was given for.
        by_class: the indices of each class of the audit; of what is repeated or unvisited none.
        reasons: why an index was skipped, replaced or late.
        donors: what stands in for an index that was replaced.
        compares_keys: whether keys are compared. Without ``key=`` workers of an earlier epoch may
            go on to send some.
        first_drawn: the indices of the first batch; None before, and of a stream.
        all_drawn: whether the sampler came to its end.
        batches_before, samples_before: what an earlier run had handed over of this epoch.
        settled: whether everything the sampler had is accounted for and nothing more can come. A
            plain attribute, because it is read with every batch. In a stream it stays False: the
            end of a stream is known when it is asked for.
    """

    # With what an epoch begins.
    delivered_count = 0
    settled = all_drawn = False
    compares_keys = True
    first_drawn: Packed | None = None
    batches_before = samples_before = 0
    _reasons_bytes = 0
    _handed: int | None = None  # the batch counted last as delivered
    _interrupts = 0  # may have lost batches that are not known to be lost
    _sampler_failed = False
    _keys_kept = _keys_past_limit = 0
    _keyed: _Keyed | None = None  # once there are keys
    _first_samples: tuple[int | None, tuple[tuple[Any, int, str], ...]] | None = None

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a signal handler may ask for the audit
        self.delivered_by = array("q", [0])
        self.same_keys: list[SameKey] = []
        self.by_class: dict[str, IndexSet] = defaultdict(IndexSet)
        self.reasons: dict[Any, str] = {}
        self.donors: dict[Any, Any] = {}
        # Beyond the classes: drawn and lost, and handed over beside what was drawn.
        self._not_given, self._given_beside = IndexSet(), IndexSet()

    @property
    def batches_drawn(self) -> int | None:
        """How many batches the sampler gave; None for a stream."""
        return None

    def expect(self, length: int | None) -> None:
        """The dataset has so many samples, as far as known: said before the first draw."""

    def handed_over(self, length: int | None) -> Delivered | None:
        """The indices handed over, those before a resume too; None where they are not known."""
        return None

    def last_drawn(self, most: int) -> list[Any]:
        """The last indices drawn, in their order: of the last batch, and what was left out then."""
        return []

    def digests(self) -> Digests | None:
        """Of the identities of samples that are no numbers; None where they have none."""
        return None

    def drawn(self, seq: int, indices: Packed) -> None:
        """Batch ``seq`` was drawn. In a stream a draw only says how many samples are wanted."""

    def drawn_before(self, packed: Packed) -> None:
        """These were handed over, or accounted for, before a resume."""

    def read_before(self, samples: list[int]) -> None:
        """So many of each worker's stream were handed over before a resume."""

    def draw_failed(self, lost: Packed = b"") -> None:
        """The sampler raised, or an interrupt through it; ``lost`` it had drawn for no batch."""
        self._sampler_failed = True

    def draws_ended(self, dropped: Packed) -> None:
        """The sampler is at its end. Over a stream torch's sampler has none."""

    def check(self, manifest: BatchManifest) -> Discrepancy | None:
        """Compare a batch that is about to be handed over with the draws.

        A batch without a discrepancy counts as delivered.
        """

    def settle(
        self, discrepancy: Discrepancy, *, handed_over: bool, worker: int | None = None
    ) -> None:
        """Book a batch with a discrepancy: handed over all the same, or lost with the error."""
        for name in ("missing", "duplicated", "unexpected"):
            self.by_class[name].add(getattr(discrepancy, name))
        if handed_over:
            came = len(discrepancy.sound + discrepancy.unexpected + discrepancy.duplicated)
            # What belongs to no index has -1.
            self._given_beside.add(index for index in discrepancy.unexpected if index != -1)
            if not discrepancy.of_keys:
                self._given_beside.add(discrepancy.duplicated)
            self.delivered_count += came
            self.delivered_by[self._row_of(worker)] += came
        else:
            self.by_class["failed"].add(discrepancy.sound)
            if discrepancy.of_keys:
                self._not_given.add(discrepancy.duplicated)

    def _row_of(self, worker: int | None) -> int:
        row = 0 if worker is None else worker + 1
        if row >= len(self.delivered_by):
            self.delivered_by.extend([0] * (row + 1 - len(self.delivered_by)))
        return row

    def failed(self, manifest: BatchManifest) -> None:
        """A batch was lost with an error that is raised to the user."""
        self.lost(manifest.seq)

    def lost(self, seq: int) -> None:
        """Batch ``seq`` was lost with its worker, and the error is raised.

        The batches of a stream are not known by their draws.
        """

    def interrupted(self, manifest: BatchManifest | None) -> None:
        """The user got an exception that is not ours; on the way was the batch of ``manifest``."""
        if manifest is None:
            self._interrupts += 1
        elif manifest.seq == self._handed:  # it counts as delivered, and was lost after all
            kept = BatchContents.of(manifest).kept
            self.delivered_count -= len(kept)
            self.delivered_by[self._row_of(manifest.worker_id)] -= len(kept)
            self.by_class["failed"].add(kept)
        else:
            self.failed(manifest)

    def note_reasons(self, manifest: BatchManifest) -> None:
        """Keep why samples of a batch are not there."""
        expected = expected_indices(manifest)
        for incident in manifest.incidents or ():
            index = expected[incident.position]
            self._reasons_bytes += weight(index) + weight(incident.reason)
            if len(self.reasons) < REASONS_LIMIT and self._reasons_bytes <= REASONS_BYTES:
                self.reasons[index] = incident.reason

    def book_incidents(self, manifest: BatchManifest) -> int:
        """Note the samples left out, replaced or late; how many of the batch are not there."""
        self.note_reasons(manifest)
        contents = BatchContents.of(manifest)
        for incident in manifest.incidents or ():
            index = contents.expected[incident.position]
            self.by_class[incident.what].add((index,))
            if incident.donor is not None and len(self.donors) < REASONS_LIMIT:
                self.donors[index] = contents.sources[incident.donor]
        return len(contents.gone)

    def unlike(self, manifest: BatchManifest) -> Discrepancy | None:
        """What samples say of each other that came in different batches."""
        if manifest.first_samples is not None and (found := self._other_schema(manifest)):
            return found
        return None if manifest.keys is None else self.same_key(manifest)

    def _other_schema(self, manifest: BatchManifest) -> Discrepancy | None:
        """A worker's first sample that is not like the first one of another worker."""
        told = manifest.first_samples or ()
        if self._first_samples is None:
            self._first_samples = manifest.worker_id, told
            return None
        other, before = self._first_samples
        for mine, theirs in zip(told, before, strict=False):
            if mine[1] != theirs[1]:
                said = _first_difference(mine[2], theirs[2])
                return Discrepancy(
                    f"the first samples of two workers are not alike: index {index_text(mine[0])} "
                    f"of worker {manifest.worker_id} and index {index_text(theirs[0])} of worker "
                    f"{other}: {said}",
                    sound=BatchContents.of(manifest).indices,
                    hint="checks.schema(like=...) says which of the two is as it should be",
                )
        return None

    def same_key(self, manifest: BatchManifest) -> Discrepancy | None:
        """Samples whose key came before under another index."""
        if not self.compares_keys:
            return None
        self._keyed = keyed = self._keyed or _Keyed()
        places, worker = keyed.places, manifest.worker_id
        pairs: list[SameKey] = []
        sound: list[Any] = []
        indices = BatchContents.of(manifest).indices
        for key, index in zip(manifest.keys or (), indices, strict=False):
            place = places.get(key)
            if place is not None and (first := keyed.indices[place]) != index:
                workers = keyed.workers[place], _IN_MAIN if worker is None else worker
                pairs.append(SameKey(index_text(key, 60), first, index, *workers))
                continue
            sound.append(index)
            if place is not None:
                continue
            if len(places) < KEYS_LIMIT and keyed.bytes < KEYS_BYTES:
                places[key] = self._keys_kept
                self._keys_kept += 1
                keyed.indices.append(index)
                keyed.workers.append(_IN_MAIN if worker is None else worker)
                keyed.bytes += weight(key) + weight(index)
            else:
                self._keys_past_limit += 1
        if not pairs:
            return None
        self.same_keys += pairs[: SAME_KEYS_LIMIT - len(self.same_keys)]
        said = [*map(str, pairs[:_KEYS_SHOWN])]
        if len(pairs) > _KEYS_SHOWN:
            said.append(f"and {len(pairs) - _KEYS_SHOWN} more")
        found, hint = self.why_again(pairs)
        again = tuple(pair.again for pair in pairs)
        reason = "; ".join(said) + found
        return Discrepancy(reason, duplicated=again, sound=tuple(sound), hint=hint, of_keys=True)

    def why_again(self, pairs: list[SameKey]) -> tuple[str, str]:
        """Why one key came under two indices, as far as the indices tell, and what to do."""
        return "", ""

    def opened(self, seq: int) -> PendingBatch | None:
        """What is known of a batch that was drawn and has not come: of a stream's nothing."""
        return PendingBatch(None, ())

    def finish(self, *, broken: bool = False) -> Discrepancy | None:
        """The stock iterator says that the epoch is over: is it?

        ``broken``: the workers died, and the error was raised. What they had read of a stream and
        not sent is not known.
        """

    def notes(self, length: int | None) -> list[str]:
        """What is worth saying beyond the classes of the audit, as it stands."""
        if not self._keys_past_limit:
            return []
        return [
            f"the keys of the first {self._keys_kept} samples were compared; "
            f"{self._keys_past_limit} later ones only against these"
        ]

    def put_away(self) -> int | None:
        """Nothing more comes: let go of what the audit does not need.

        Returns:
            How many samples were drawn; None where the accounts rest on what does not stay, or
            hold more than an audit.
        """
        self._keyed = None
        return None

    def audit(self, epoch: int, length: int | None) -> EpochAudit:
        """The accounts as they stand; ``length`` is that of the dataset."""
        raise NotImplementedError

    def as_audit(
        self, epoch: int, complete: bool, drawn: int, notes: list[str], **of_draws: Listed
    ) -> EpochAudit:
        """The audit: of what is kept here, and of the classes that the draws alone tell."""
        sets = {name: self.by_class[name] for name, _ in CLASSES}
        kept = {name: (each.array(), each.count) for name, each in sets.items()}
        classes = kept | of_draws
        arrays: dict[str, Any] = {name: first for name, (first, _) in classes.items()}
        return EpochAudit(
            epoch,
            complete,
            drawn,
            self.delivered_count,
            **arrays,
            counts={name: number for name, (_, number) in classes.items()},
            notes=tuple(notes),
            reasons=dict(self.reasons),
            donors=dict(self.donors),
            delivered_by=dict(enumerate(self.delivered_by[1:])),
            resumed_at=self.batches_before if self.samples_before else None,
            delivered_before=self.samples_before,
            same_keys=tuple(self.same_keys),
        )


class MapLedger(Ledger):
    """The ledger of a map-style dataset: every batch drawn is in ``pending`` until it comes."""

    _first_seq: int | None = None
    _last_seq = -1
    _drawn = 0
    _newest: Packed = b""  # the batch drawn last
    _dropped: Packed = b""  # what was drawn after it

    def __init__(self, *, expected_batches: Callable[[], int | None] | None) -> None:
        super().__init__()
        self._expected_batches = expected_batches
        self._pending: dict[int, Packed] = {}
        self._coverage = Coverage()

    @property
    def batches_drawn(self) -> int:
        here = 0 if self._first_seq is None else self._last_seq + 1 - self._first_seq
        return here + self.batches_before

    def drawn(self, seq: int, indices: Packed) -> None:
        # Hot path: of ours nothing is called here, nor in `check` where all is as it should be.
        number = len(indices) >> 3 if type(indices) is bytes else len(indices)
        coverage = self._coverage
        with self.lock:
            if self._first_seq is None:
                self._first_seq = seq
                self.first_drawn = indices
            # Interrupts come with calls: none between these, or the accounts would not add up.
            self._pending[seq] = self._newest = indices
            self._last_seq = seq
            self._drawn += number
            coverage.room -= number
            coverage.waiting.append(indices)
            if coverage.room < 0:
                coverage.flush()

    def drawn_before(self, packed: Packed) -> None:
        number = count(packed)
        self._drawn += number
        self.samples_before += number
        self._newest = packed
        self._coverage.add(packed)

    def draw_failed(self, lost: Packed = b"") -> None:
        super().draw_failed()
        self._out_of_batches(lost, "failed")

    def draws_ended(self, dropped: Packed) -> None:
        if not self.all_drawn:
            self.all_drawn = True
            if self._expected_batches is not None:  # of no interest now, and it holds the dataset
                self._expected_batches = lambda: None
            if dropped:
                self._out_of_batches(dropped, "dropped")
                self._dropped = dropped
            self.settled = not self._pending

    def _out_of_batches(self, indices: Packed, name: str) -> None:
        self._drawn += count(indices)
        self._coverage.add(indices)
        self.by_class[name].add(unpack(indices))

    def check(self, manifest: BatchManifest) -> Discrepancy | None:
        seq, indices, samples = manifest.seq, manifest.indices, manifest.samples
        expected = self._pending.get(seq)
        if type(expected) is bytes:
            number, as_drawn = len(expected) >> 3, expected == indices
        else:
            number, as_drawn = len(expected or ()), same(expected, indices)
        if not as_drawn:
            return self._compare(self._taken(seq), manifest)
        if manifest.incidents is not None:
            number -= self.book_incidents(manifest)
        elif samples != number and samples is not None:
            return _miscounted(unpack(self._taken(seq) or ()), samples)
        unlike = manifest.keys is not None or manifest.first_samples is not None
        if unlike and (discrepancy := self.unlike(manifest)):
            self._taken(seq)
            return discrepancy
        row = 0 if manifest.worker_id is None else manifest.worker_id + 1
        if row >= len(self.delivered_by):
            self._row_of(manifest.worker_id)
        self._handed = seq  # and no call from here on, see above
        self.delivered_count += number
        self.delivered_by[row] += number
        del self._pending[seq]
        if self.all_drawn and not self._pending:
            self.settled = True
        return None

    def _taken(self, seq: int) -> Packed | None:
        """The indices of batch ``seq``, which is no longer waited for; None if it was not."""
        indices = self._pending.pop(seq, None)
        self.settled = self.all_drawn and not self._pending
        return indices

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
        sound: list[Any] = []
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
        return Discrepancy(reason, tuple(left), (), tuple(unexpected), tuple(sound))

    def lost(self, seq: int) -> None:
        self.by_class["failed"].add(unpack(self._taken(seq) or ()))

    def opened(self, seq: int) -> PendingBatch | None:
        packed = self._pending.get(seq)
        first = self._first_seq or 0
        if packed is None:
            return None
        return PendingBatch(seq - first + self.batches_before, unpack(packed))

    def interrupted(self, manifest: BatchManifest | None) -> None:
        super().interrupted(manifest)
        if manifest is None and self._expected_batches is not None:
            self._abandon()

    def _abandon(self) -> None:
        for seq in list(self._pending):
            self.lost(seq)

    def finish(self, *, broken: bool = False) -> Discrepancy | None:
        # An interrupt takes the batch on its way, and one drawn ahead.
        if self._pending and (broken or len(self._pending) <= 2 * self._interrupts):
            self._abandon()
        missing: list[Any] = []
        for seq in list(self._pending):
            missing += unpack(self._taken(seq) or ())
        if missing:
            reason = (
                f"the epoch ended with {len(missing)} samples drawn and never handed over: "
                f"{indices_text(missing)}"
            )
            self.by_class["missing"].add(missing)
            return Discrepancy(reason, tuple(missing))
        if not (broken or self.all_drawn or self._sampler_failed or self._interrupts):
            return Discrepancy(
                f"the epoch ended after {self.delivered_count} samples although the sampler has "
                "more to draw"
            )
        return None

    def put_away(self) -> int | None:
        self._keyed = None
        if self._expected_batches is not None and not self.all_drawn:
            said = self._expected_batches()
            self._expected_batches = lambda: said  # without the sampler, which holds the dataset
        # With the pages that somebody's look at the audit has made it would hold 400 KB and more.
        return self._drawn if self._coverage.compact() else None

    def expect(self, length: int | None) -> None:
        if length is not None:
            self._coverage.expect(length)

    def handed_over(self, length: int | None) -> Delivered | None:
        with self.lock:
            absent = [self.by_class[name] for name in LEFT_OUT] + [self._not_given]
            less = [index for packed in self._pending.values() for index in unpack(packed)]
            if any(each.count > len(each.first(each.count)) for each in absent):
                return None  # they were too many to be listed
            less += [index for each in absent for index in each.first(each.count)]
            beside = self._given_beside
            more = beside.first(beside.count)
            return self._coverage.multiset(length, _numbers(less), _numbers(more))

    def last_drawn(self, most: int) -> list[Any]:
        last = [*unpack(self._newest), *unpack(self._dropped)]
        return last[-most:] if most else []

    def digests(self) -> Digests | None:
        with self.lock:
            names = self._coverage.names()
            return Digests.of("index", names) if names else None

    def notes(self, length: int | None) -> list[str]:
        notes = super().notes(length)
        if unmapped := self._coverage.unmapped:
            why = "were too many or too far apart to be mapped"
            if self._coverage.interrupted:
                why = "were not mapped, because of an interrupt or because there were too many"
            notes.append(
                f"{unmapped} indices {why}: others may be repeated too, and what is unvisited is "
                "not known"
            )
        return notes

    def audit(self, epoch: int, length: int | None) -> EpochAudit:
        # Code of the user's, perhaps: not under the lock.
        expected = None if self._expected_batches is None else self._expected_batches()
        with self.lock:
            batches = self.batches_drawn
            ended = self.all_drawn or batches == expected
            notes = self.notes(length)
            if ahead := sum(map(count, self._pending.values())):
                notes.append(f"not handed over: {ahead}, in batches drawn ahead for the workers")
            if self._expected_batches and expected is None and not self.all_drawn:
                notes.append("the sampler was not asked whether it has more")
            audit = self.as_audit(
                epoch,
                ended and not (self._pending or self._sampler_failed),
                self._drawn,
                notes,
                repeated=self._coverage.repeated(length),
                unvisited=self._coverage.unvisited(length),
            )
            return dataclasses.replace(audit, batches_drawn=batches)


def _numbers(identities: list[Any]) -> Any:
    """Those of the identities that are int64."""
    fits = [each for each in identities if type(each) is int and -(1 << 63) <= each < 1 << 63]
    return np.array(fits, np.int64)


def _first_difference(mine: str, theirs: str) -> str:
    """Where two structures differ first, and how."""
    pairs = zip_longest(mine.split("; "), theirs.split("; "), fillvalue="nothing")
    unequal = next((pair for pair in pairs if pair[0] != pair[1]), (mine, theirs))
    return f"{unequal[0]}, and {unequal[1]}"


def _miscounted(drawn: tuple[Any, ...], samples: int) -> Discrepancy:
    """``__getitems__`` broke its contract.

    Which sample belongs to which index is unknown; the first ones are taken to be in order.
    """
    asked, shown = len(drawn), indices_text(drawn)
    if samples < asked:
        reason = (
            f"__getitems__ was asked for {asked} samples and gave {samples}; the last "
            f"{asked - samples} of {shown} count as missing, though it may have left out others"
        )
    else:
        reason = f"__getitems__ was asked for {asked} samples, {shown}, and gave {samples}"
    return Discrepancy(
        reason,
        missing=drawn[samples:],
        unexpected=(-1,) * (samples - asked),
        sound=drawn[:samples],
        hint=_ONE_EACH,
    )
