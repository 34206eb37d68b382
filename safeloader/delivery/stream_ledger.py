"""Drawn against delivered, for iterable datasets. Runs in: main.

A stream has no index to draw: a sample is known as (worker, its number in that worker's stream),
and exactly once means no gap in any worker's stream and none at its end.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from safeloader.delivery.audit import ONE_WORKER_GAVE_BOTH, EpochAudit, SameKey
from safeloader.delivery.audit_part import Digests
from safeloader.delivery.ledger import Discrepancy, Ledger
from safeloader.delivery.manifest import BatchManifest, expected_indices

_SHARE = (
    "two workers read the same part of the stream: have __iter__ share it out by "
    'get_worker_info(); verify="warn" hands over all the same'
)
_SHARE_OR_RESAMPLES = (
    "two workers gave the same samples: have __iter__ share the stream out by get_worker_info(); "
    "one that samples with replacement (webdataset's resampled=True) repeats on purpose, and key= "
    'does not go with it; verify="warn" hands over all the same'
)
_NO_IDENTITY = "samples have no identity; key= gives them one"


class Progress(Protocol):
    """Where the workers note how far they have read their streams."""

    def read(self, worker: int) -> tuple[int, int, bool]:
        """Samples read, how many of them were dropped at the end, and whether it has ended."""


class StreamLedger(Ledger):
    """The ledger of an iterable dataset: each worker's stream must come without a gap."""

    def __init__(self, *, progress: Progress | None, workers: int) -> None:
        super().__init__()
        self._progress = progress
        self._in_main = workers == 0
        self._next = [0] * max(workers, 1)
        self.delivered_by.extend([0] * workers)
        self._finished = False
        self._read = 0  # by all workers, once they are at their ends

    def digests(self) -> Digests | None:
        with self.lock:
            keys = () if self._keyed is None else self._keyed.places
            return Digests.of("key", keys) if self.compares_keys else None

    def read_before(self, samples: list[int]) -> None:
        self._next = list(samples)
        self.samples_before = sum(samples)

    def check(self, manifest: BatchManifest) -> Discrepancy | None:
        row = manifest.worker_id or 0
        first, samples = manifest.ordinal or 0, manifest.samples or 0
        end, due = first + samples, self._next[row]
        missing = () if first == due else self._passed_over(row, first)
        self._next[row] = max(due, end)
        if missing or first < due:
            return Discrepancy(
                f"worker {row} sent samples {first} to {end - 1} of its stream where number "
                f"{due} was due",
                missing=missing,
                duplicated=tuple((row, k) for k in range(first, min(due, end))),
                sound=tuple((row, k) for k in range(max(due, first), end)),
            )
        unlike = manifest.keys is not None or manifest.first_samples is not None
        if unlike and (discrepancy := self.unlike(manifest)):
            return discrepancy
        if manifest.incidents is not None:
            samples -= self.book_incidents(manifest)
        place = self._row_of(manifest.worker_id)
        self._handed = manifest.seq  # and no call from here on: an interrupt takes all of it back
        self.delivered_count += samples
        self.delivered_by[place] += samples
        return None

    def why_again(self, pairs: list[SameKey]) -> tuple[str, str]:
        apart = [pair for pair in pairs if pair.first[0] != pair.again[0]]
        found = f"; {ONE_WORKER_GAVE_BOTH}" if len(apart) < len(pairs) else ""
        # Read whole by both, a sample is at the same place in the streams of both.
        same_place = any(pair.first[1] == pair.again[1] for pair in apart)
        return found, (_SHARE if same_place else _SHARE_OR_RESAMPLES) if apart else ""

    def failed(self, manifest: BatchManifest) -> None:
        if manifest.ordinal is not None:
            row, first = manifest.worker_id or 0, manifest.ordinal
            self.by_class["missing"].add(self._passed_over(row, first))
            self._next[row] = max(self._next[row], first + (manifest.samples or 0))
            self.by_class["failed"].add(expected_indices(manifest))

    def interrupted(self, manifest: BatchManifest | None) -> None:
        super().interrupted(manifest)
        if self._in_main and self._progress is not None:
            self._passed_over(0, self._progress.read(0)[0])

    def _passed_over(self, row: int, came: int) -> tuple[tuple[int, int], ...]:
        """The samples due before ``came``; none if an interrupt, which the user got, took them."""
        gap = tuple((row, k) for k in range(self._next[row], came))
        if not (gap and self._interrupts):
            return gap
        self.by_class["failed"].add(gap)
        self._interrupts -= 1
        self._next[row] = came
        return ()

    def finish(self, *, broken: bool = False) -> Discrepancy | None:
        if broken or self._finished or self._sampler_failed:
            return None
        self._finished = True
        if self._progress is None:
            return None
        missing: list[Any] = []
        said = []
        for row, reached in enumerate(self._next):
            read, dropped, ended = self._progress.read(row)
            self._read += max(read, reached)
            if not ended:
                said.append(f"worker {row} never came to the end of its stream")
                continue
            kept = read - dropped
            self.by_class["dropped"].add((row, k) for k in range(kept, read))
            if never := self._passed_over(row, kept):
                said.append(
                    f"worker {row} read {kept} samples and the last {len(never)} never came"
                )
                missing += never
        if not said:
            return None
        self.by_class["missing"].add(missing)
        return Discrepancy("; ".join(said), tuple(missing))

    def _at_ends(self) -> bool:
        """Whether the workers, who read ahead, are at their ends, and all that they read came."""
        if self._progress is None or self._in_main:
            return False
        states = [self._progress.read(row) for row in range(len(self._next))]
        return all(ended for *_, ended in states) and [read for read, *_ in states] == self._next

    def _drawn(self) -> int:
        return max(self._read, sum(self._next))

    def notes(self, length: int | None) -> list[str]:
        notes = super().notes(length)
        if not self._finished:
            return notes
        workers, drawn = len(self._next), self._drawn()
        if workers > 1:
            notes += [
                f"worker {row} delivered nothing: its share of the data is empty (more shards, or "
                "fewer workers)"
                for row, reached in enumerate(self._next)
                if not reached and not (self._progress and self._progress.read(row)[0])
            ]
        if length is not None and length != drawn:
            note = f"len(dataset) says {length}, the workers read {drawn} samples"
            if length and workers > 1 and drawn == length * workers:
                note += ": each worker read the whole stream (share it by get_worker_info())"
            notes.append(note)
        return notes

    def audit(self, epoch: int, length: int | None) -> EpochAudit:
        with self.lock:
            complete = self._finished or self._at_ends()
            notes = self.notes(length)
            if not complete and self._in_main and not self._sampler_failed:
                notes.append("the stream was not asked whether it has more")
            audit = self.as_audit(epoch, complete, self._drawn(), notes)
            unchecked = () if self.compares_keys else (_NO_IDENTITY,)
            return dataclasses.replace(audit, stream=True, unchecked=unchecked)
