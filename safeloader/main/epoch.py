"""One epoch's accounts, and what follows from them. Runs in: main.

The recording sampler reports draws to it, the iterator what arrives. It holds neither the loader
nor the recorder, both of which may hold it.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from typing import Any

from safeloader.delivery.audit import EpochAudit
from safeloader.delivery.indices import Packed
from safeloader.delivery.ledger import Discrepancy, Ledger, PendingBatch
from safeloader.delivery.manifest import BatchManifest, expected_indices
from safeloader.delivery.skip_budget import SkipBudget
from safeloader.errors import SafeLoaderError, error_from
from safeloader.failures.failure import Failure
from safeloader.failures.loader_log import LoaderLog
from safeloader.introspect.dataset_state import describe, differences
from safeloader.introspect.files import rank
from safeloader.introspect.texts import index_text
from safeloader.provenance.recorder import Delivery, failure_was_told
from safeloader.provenance.trace import OFF, Trace
from safeloader.transport.messages import FailedBatch

SHOWN_SKIPPED = 12
DUMPS_MAX = 100  # of an epoch's failures that end no batch
_SEE_AUDIT = 'print(loader.audit) sums up the epoch; verify="warn" hands over all the same'


class Epoch:
    """The accounts of one pass over the loader, and what follows from them."""

    ledger: Ledger

    def __init__(
        self,
        trace: Trace,
        verify: str,
        dataset: Any,
        skip_budget: SkipBudget | None = None,
        dump: Callable[[Failure], Any] | None = None,
        log: LoaderLog | None = None,
    ) -> None:
        self.log = LoaderLog(dataset) if log is None else log
        self.number = 0
        self.batches = 0  # handed over or raised: the number of the next one
        self._trace = trace
        self._verify = verify
        self._skip_budget = skip_budget or SkipBudget(None, runs=False)
        self._dump = dump
        self._survived = 0
        self._dataset: Any = dataset
        self._sampler_errors: dict[int, tuple[Failure, Exception]] = {}
        self._ended = False
        self._closed = False
        self._pid = os.getpid()

    # draws ──────────────────────────────────────────────────────────────────────────────────────

    def open(self, ledger: Ledger) -> None:
        """Begin the accounts. Untraced draws go to the ledger without a detour: hot path."""
        self.ledger = ledger
        if self._trace is OFF:
            self.drawn = ledger.drawn  # type: ignore[method-assign]

    def drawn(self, seq: int, indices: Packed) -> None:
        """Batch ``seq`` was drawn."""
        self.ledger.drawn(seq, indices)
        self._tell(self._trace.drawn, self.number, seq, indices)

    def draw_failed(self, seq: int, failure: Failure, exc: Exception) -> None:
        """The sampler raised; the error is raised when its place in the order comes."""
        self._sampler_errors[seq] = failure, exc
        self.ledger.draw_failed(seq)

    def draw_interrupted(self, lost: Packed) -> None:
        """An interrupt went through the sampler; ``lost`` it had drawn meanwhile."""
        self.ledger.draw_interrupted(lost)

    def draws_ended(self, dropped: Packed) -> None:
        """The sampler is at its end."""
        self.ledger.draws_ended(dropped)

    # arrivals ───────────────────────────────────────────────────────────────────────────────────

    def arrived(self, manifest: BatchManifest, began_ns: int, wait_ns: int) -> int:
        """Check a batch that is about to be handed over; gives its number. Hot path.

        Raises:
            DeliveryError: if it is not what was drawn, under ``verify="raise"``.
        """
        if manifest.incidents is not None:
            self._count_incidents(manifest)
        ledger = self.ledger
        with ledger.lock:
            discrepancy = ledger.check(manifest)
            if discrepancy is not None:
                ledger.settle(discrepancy, manifest, handed_over=self._verify != "raise")
        if discrepancy is not None:
            self._told(discrepancy, manifest)
        number = self.batches
        self.batches = number + 1
        if self._trace is not OFF:
            delivery = Delivery(self.number, number, wait_ns, manifest)
            self._tell(self._trace.delivered, delivery, began_ns)
        if ledger.settled:  # not every training loop asks for one more than the last
            self.close()
        return number

    def _told(self, discrepancy: Discrepancy, manifest: BatchManifest | None) -> None:
        if self._verify == "off":
            return
        culprits = discrepancy.culprits
        failure = Failure(
            phase="delivery",
            exception_type="DeliveryError",
            message=discrepancy.reason,
            index=next((each for each in culprits if each != -1), None),
            indices=culprits + discrepancy.sound,
            batch=self.batches if manifest is not None else None,
            epoch=self.number,
            rank=rank(),
            worker_id=None if manifest is None else manifest.worker_id,
            pid=os.getpid() if manifest is None else manifest.pid,
            hint=discrepancy.hint or _SEE_AUDIT,
        )
        if self._verify == "warn":
            warnings.warn(f"safeloader: {discrepancy.reason}", RuntimeWarning, stacklevel=4)
            return
        if manifest is not None:
            self.batches += 1
        raise self._error(failure)

    def came_empty(self, manifest: BatchManifest) -> None:
        """Every sample of a batch was left out: the loop does not get it.

        Raises:
            SampleError: if too many were.
        """
        self._count_incidents(manifest)
        with self.ledger.lock:
            discrepancy = self.ledger.check(manifest)
            if discrepancy is not None:
                self.ledger.settle(discrepancy, manifest, handed_over=False)
        if discrepancy is not None:
            self._told(discrepancy, manifest)
        self.log.warning(
            "epoch %d: every sample of what would be batch %d failed: it is left out whole",
            self.number,
            self.batches,
        )
        if self.ledger.settled:
            self.close()

    def survived(self, failure: Failure) -> None:
        """Write down a failure that ends no batch, if that is wished; a bounded number of them."""
        if self._dump is None or self._survived > DUMPS_MAX:
            return
        self._survived += 1
        if self._survived > DUMPS_MAX:
            self.log.warning(
                "epoch %d: %d failures of samples left out or replaced are written; no more of "
                "them in this epoch",
                self.number,
                DUMPS_MAX,
            )
            return
        self._dump(dataclasses.replace(failure, epoch=self.number, rank=rank()))

    def _count_incidents(self, manifest: BatchManifest) -> None:
        """Tell of samples left out, replaced or late, before the batch is booked.

        Raises:
            SampleError: if there were too many: the batch is lost with it.
        """
        asked = expected_indices(manifest)
        for incident in manifest.incidents or ():
            self.log.warning(
                "epoch %d, batch %d: index %s %s: %s",
                self.number,
                self.batches,
                index_text(asked[incident.position]),
                incident.what,
                incident.reason,
            )
        for failure in manifest.failures or ():
            self.survived(dataclasses.replace(failure, batch=self.batches))
        ledger = self.ledger
        gone = ledger.by_class["skipped"].count + ledger.by_class["replaced"].count
        reason = self._skip_budget.exceeded(manifest, ledger.delivered_count + gone + len(asked))
        if reason is None:
            return
        with ledger.lock:
            ledger.failed(manifest, asked)
            ledger.note_reasons(manifest)
        reasons = list(ledger.reasons.items())
        listed = [f"index {index_text(index)}: {why}" for index, why in reasons[:SHOWN_SKIPPED]]
        if len(reasons) > SHOWN_SKIPPED:
            listed.append(f"and {len(reasons) - SHOWN_SKIPPED} more in loader.audit.reasons")
        last = next((m for m in reversed(manifest.incidents or ()) if m.what != "late"), None)
        failure = Failure(
            phase="sample",
            exception_type="SampleError",
            message=f"too many samples failed: {reason}",
            index=None if last is None else asked[last.position],
            position=None if last is None else last.position,
            indices=asked,
            batch=self.batches,
            epoch=self.number,
            rank=rank(),
            worker_id=manifest.worker_id,
            pid=manifest.pid,
            hint="\n".join(
                [
                    *listed,
                    "look at what these samples have in common (a disk, a shard, a file format); "
                    "max_skipped= allows more: a count, or a fraction of the samples",
                ]
            ),
        )
        self.batches += 1
        raise self._error(failure)

    def came_failed(self, came: FailedBatch, raised: list[BaseException]) -> SafeLoaderError:
        """The error for a batch that could not be made.

        ``raised`` holds the exception where it was raised in this process; it is taken out.
        """
        manifest, failure = came
        exception = raised.pop() if raised else None
        if failure is None:
            failure, exception = self._sampler_errors.pop(manifest.seq)
            with self.ledger.lock:
                self.ledger.lost(manifest.seq)  # drawn in part, or not to be sent to a worker
        else:
            with self.ledger.lock:
                self.ledger.failed(manifest, failure.indices)
        failure = dataclasses.replace(
            failure,
            batch=None if failure.phase == "init" else self.batches,  # which is not to blame
            epoch=self.number,
            rank=rank(),
            dataset_state=self._with_differences(failure),
        )
        self.batches += 1
        return self._error(failure, exception)

    def interrupted(self, manifest: BatchManifest | None) -> None:
        """The user got an exception that is not ours; on the way was the batch of ``manifest``."""
        failed = self.ledger.by_class["failed"]
        with self.ledger.lock:
            before = failed.count
            self.ledger.interrupted(manifest)
        if manifest is None and failed.count > before:  # it was raised in the place of a batch
            self.batches += 1

    def broke(self, failure: Failure, lost: tuple[int, ...] = ()) -> SafeLoaderError:
        """The error for workers that died or hang; the batches ``lost`` with them will not come."""
        with self.ledger.lock:
            for seq in lost:
                self.ledger.lost(seq)
        dataset, length = self._dataset, self.log.length
        state = None if dataset is None else describe(dataset, length=length)
        if state is not None:
            mine = "the main process's copy: the worker's own cannot be read from here"
            state["notes"] = [*(state.get("notes") or []), mine]
        failure = dataclasses.replace(failure, epoch=self.number, rank=rank(), dataset_state=state)
        return self._error(failure)

    def opened(self, seq: int) -> PendingBatch | None:
        """What is known of a batch that was drawn and has not come."""
        return self.ledger.opened(seq)

    def _error(self, failure: Failure, exception: BaseException | None = None) -> SafeLoaderError:
        """The error to raise for ``failure``, which is told wherever it is to be told."""
        self._tell(self._trace.failed, failure)
        if self._dump is not None:
            self._dump(failure)
        failure_was_told()
        return error_from(failure, exception)

    def _with_differences(self, failure: Failure) -> dict[str, Any] | None:
        state = failure.dataset_state
        if state is None or failure.worker_id is None or self._dataset is None:
            return state
        return state | {"differs_from_main": differences(state, describe(self._dataset))}

    # the end ────────────────────────────────────────────────────────────────────────────────────

    def ended(self, *, broken: bool) -> None:
        """The stock iterator is at its end; ``broken``: its workers died, which was told.

        Raises:
            DeliveryError: if samples are missing, under ``verify="raise"``; the first time only.
        """
        if self._ended:
            return
        self._ended = True
        with self.ledger.lock:
            discrepancy = None if broken else self.ledger.finish()
            if broken:
                self.ledger.abandon()
        self.close()
        if discrepancy is not None:
            self._told(discrepancy, None)

    def close(self) -> None:
        """No more will come; said once. Nothing is raised: an early ``break`` is no error."""
        if self._closed or os.getpid() != self._pid:  # a child's copy has nothing to say
            return
        self._closed = True
        with self.ledger.lock:
            notes = self.ledger.notes(self.log.length)
        for note in notes:
            self.log.warning("epoch %d: %s", self.number, note)
        if self._trace is not OFF:  # an audit takes some hundred µs: made when somebody reads it
            self._tell(lambda: self._trace.audited(self.audit(self.number)))

    def release(self) -> None:
        """Let go of the dataset: the notebook outlives the iterator, the data need not."""
        self._dataset = None

    def _tell(self, said: Callable[..., None], *about: Any) -> None:
        """A fault in tracing ends the tracing and not the training."""
        try:
            said(*about)
        except Exception:
            self.log.exception("tracing failed and is off for the rest of this epoch")
            self._trace = OFF

    def audit(self, number: int) -> EpochAudit:
        """The accounts as they stand."""
        return self.ledger.audit(number, self.log.length)
