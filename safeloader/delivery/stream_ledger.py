"""Drawn against delivered, for iterable datasets. Runs in: main.

A stream has no index to draw: a sample is known as (worker, its number in that worker's stream),
and exactly once means no gap in any worker's stream and none at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safeloader.delivery.audit import EpochAudit
from safeloader.delivery.indices import Packed
from safeloader.delivery.ledger import Accounts, Discrepancy, PendingBatch
from safeloader.delivery.manifest import BatchManifest, source_positions
from safeloader.transport.stream_progress import StreamProgress

_SHARE = (
    "two workers read the same part of the stream: have __iter__ share it out by "
    'get_worker_info(); verify="warn" hands over all the same'
)


class StreamLedger(Accounts):
    """The ledger of an iterable dataset: each worker's stream must come without a gap."""

    def __init__(self, *, with_keys: bool, progress: StreamProgress | None, workers: int) -> None:
        super().__init__(with_keys=with_keys)
        self._progress = progress
        self._in_main = workers == 0
        self._next = [0] * max(workers, 1)
        self._finished = False
        self._sampler_failed = False
        self._drawn_count = 0

    def drawn(self, seq: int, indices: Packed) -> None:
        pass  # a stream's draws say only how many samples are wanted

    def draw_failed(self, seq: int) -> None:
        self._sampler_failed = True

    def draw_interrupted(self, lost: Packed) -> None:
        self._sampler_failed = True

    def draws_ended(self, dropped: Packed) -> None:
        pass  # torch draws for a stream without end

    def check(self, manifest: BatchManifest) -> Discrepancy | None:
        row = manifest.worker_id or 0
        first, samples = manifest.ordinal or 0, manifest.samples or 0
        expected = self._next[row]
        told = first == expected or self._told_of(row, first)
        self._next[row] = max(expected, first + samples)
        if not told:
            return self._compare(row, expected, first, samples)
        if manifest.keys is not None and self._index_of_key is not None:
            discrepancy = self.same_key(
                manifest.keys, [(row, first + k) for k in source_positions(manifest)]
            )
            if discrepancy is not None:
                known = self._index_of_key
                others = any(known.get(key, (row,))[0] != row for key in manifest.keys)
                return discrepancy._replace(hint=_SHARE if others else "")
        if manifest.incidents is not None:
            samples -= self.book_incidents(manifest)
        self._handed = manifest.seq
        self.delivered_count += samples
        return None

    def _compare(self, row: int, expected: int, first: int, samples: int) -> Discrepancy:
        end = first + samples
        return Discrepancy(
            f"worker {row} sent samples {first} to {end - 1} of its stream where number {expected} "
            "was due",
            missing=tuple((row, k) for k in range(expected, first)),
            duplicated=tuple((row, k) for k in range(first, min(expected, end))),
            sound=tuple((row, k) for k in range(max(expected, first), end)),
        )

    def failed(self, manifest: BatchManifest, indices: Sequence[Any]) -> None:
        if manifest.ordinal is not None:
            row, first, due = (
                manifest.worker_id or 0,
                manifest.ordinal,
                self._next[manifest.worker_id or 0],
            )
            if not self._told_of(row, first):
                self.by_class["missing"].add((row, k) for k in range(due, first))
            self._next[row] = max(due, first + (manifest.samples or 0))
            self.by_class["failed"].add(indices)

    def interrupted(self, manifest: BatchManifest | None) -> None:
        super().interrupted(manifest)
        if self._in_main and self._progress is not None:
            self._told_of(0, self._progress.read(0).read)

    def _told_of(self, row: int, came: int) -> bool:
        """Whether the samples due before ``came`` went with an interrupt, which the user got."""
        due = self._next[row]
        if not self._interrupts or came <= due:
            return False
        self.by_class["failed"].add((row, k) for k in range(due, came))
        self._interrupts -= 1
        self._next[row] = came
        return True

    def lost(self, seq: int) -> None:
        pass  # a stream's batches are not known by their draws

    def opened(self, seq: int) -> PendingBatch | None:
        return PendingBatch(None, ())

    def finish(self) -> Discrepancy | None:
        if self._finished or self._progress is None or self._sampler_failed:
            self._finished = not self._sampler_failed
            return None
        self._finished = True
        missing: list[Any] = []
        said = []
        for row, reached in enumerate(self._next):
            state = self._progress.read(row)
            self._drawn_count += max(state.read, reached)
            if not state.ended:
                said.append(f"worker {row} never came to the end of its stream")
                continue
            kept = state.read - state.dropped
            self.by_class["dropped"].add((row, k) for k in range(kept, state.read))
            if reached < kept and not self._told_of(row, kept):
                said.append(
                    f"worker {row} read {kept} samples and the last {kept - reached} never came"
                )
                missing += [(row, k) for k in range(reached, kept)]
        if not said:
            return None
        discrepancy = Discrepancy("; ".join(said), missing=tuple(missing))
        self.book(discrepancy)
        return discrepancy

    @property
    def complete(self) -> bool:
        return self._finished or self._at_end()

    def _at_end(self) -> bool:
        """Whether the workers, who read ahead, are at their ends, and all that they read came."""
        progress = None if self._in_main else self._progress
        if progress is None:
            return False
        states = map(progress.read, range(len(self._next)))
        return all(
            each.ended and each.read == n for each, n in zip(states, self._next, strict=True)
        )

    @property
    def settled(self) -> bool:
        return False  # the end of a stream is known when it is asked for

    def notes(self, length: int | None) -> list[str]:
        notes = super().notes(length)
        if not self._finished:
            return notes
        workers = len(self._next)
        if workers > 1:
            notes += [
                f"worker {row} delivered nothing: its share of the data is empty"
                for row, reached in enumerate(self._next)
                if not reached and not (self._progress and self._progress.read(row).read)
            ]
        read = self._read()
        if length is not None and length != read:
            note = f"len(dataset) says {length}, the workers read {read} samples"
            if length and workers > 1 and read == length * workers:
                note += ": each worker read the whole stream (share it by get_worker_info())"
            notes.append(note)
        return notes

    def _read(self) -> int:
        return (
            self._drawn_count if self._finished and self._progress is not None else sum(self._next)
        )

    def audit(self, epoch: int, length: int | None) -> EpochAudit:
        with self.lock:
            complete = self.complete
            notes = self.notes(length)
            if not complete and self._in_main and not self._sampler_failed:
                notes.append("the stream was not asked whether it has more")
            return self.as_audit(epoch, complete=complete, drawn=self._read(), notes=notes)
