"""One epoch's accounts, and what follows from them. Runs in: main.

The recording sampler reports draws to it, the iterator what arrives. A fault in the accounts
themselves ends them and not the training: it is logged, batches go on as torch's own loader gives
them, and the audit says since when nothing was checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from safeloader.delivery.audit import EpochAudit, first_reasons, of_batches
from safeloader.delivery.audit_part import AuditPart, RankAccounts
from safeloader.delivery.indices import Packed, pack, unpack
from safeloader.delivery.ledger import Discrepancy, Ledger, PendingBatch
from safeloader.delivery.manifest import BatchManifest, expected_indices
from safeloader.delivery.skip_budget import SkipBudget
from safeloader.errors import SafeLoaderError, error_from
from safeloader.failures.failure import Failure
from safeloader.failures.loader_log import LoaderLog, guarded
from safeloader.introspect.dataset_state import describe, differences
from safeloader.introspect.ranks import place
from safeloader.introspect.seeds import EpochSeed, SeededAs
from safeloader.introspect.shard import Shard
from safeloader.introspect.sharding import (
    purpose_of,
    shard_of,
    shared_out_twice,
    shares_out_nothing,
)
from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.texts import indices_text
from safeloader.introspect.underlying import Underlying, underlying
from safeloader.introspect.warned import warn
from safeloader.provenance.epoch_facts import EpochFacts
from safeloader.provenance.events import UNHEARD, Dumps, Events, LogLines
from safeloader.provenance.recorder import Recorder, failure_was_told
from safeloader.provenance.summary import tell_at_end
from safeloader.settings import Settings
from safeloader.supervision.wrong_data import SAME_STREAM
from safeloader.transport.messages import FailedBatch
from safeloader.worker.hints import LOOK_AT_SAMPLER
from safeloader.worker.sources import source_of

SHOWN_SKIPPED = 12
_ORDERS_MAX = 64
_SUMMED_MAX = 1 << 28  # samples that are summed up for a run's folder as their epoch ends: 0.3 s
_DIGESTED_MAX = 1 << 18  # keys of a stream: as long
_POSITION = "read position of "  # in what is known beside a failure
_READ_ALONE = (
    "open the file in the worker, and see whether it fails still; replay() in the main process "
    "reads it alone, and may pass"
)
_IN_COMMON = (
    "look at what these samples have in common (a disk, a shard, a file format); "
    "max_skipped= allows more: a count, or a fraction of the samples"
)
_SEE_AUDIT = 'print(loader.audit) sums up the epoch; verify="warn" hands over all the same'

_T = TypeVar("_T")


class Announced(NamedTuple):
    """How many batches ``len(loader)`` says.

    Attributes:
        batches: their number; None where that is not known.
        proven: whether it is what the sampler gives, because both are torch's.
    """

    batches: int | None = None
    proven: bool = False


NOT_ANNOUNCED = Announced()
_PUT_AWAY: Callable[[Ledger], int | None] = operator.methodcaller("put_away")


class Epoch:
    """The accounts of one pass over the loader, and what follows from them.

    Args:
        dataset: what the loader reads.
        settings: our keywords.
        log: the loader's.
        ledger: the accounts.
        also: further sinks of its events.
        announced: what ``len(loader)`` says.
        sampler: what the indices come from; of a stream the dataset.
        seed: what its random numbers are made from, with ``seed=``.
        seq_of_first: the number that its first draw has.

    Attributes:
        number: as the recorder counts.
        batches: handed over or raised: the number of the next one.
        noticed: what was seen of wrong data while it runs, in a sentence each.
        unchecked: what nobody looked at, in a phrase each.
        unchecked_since: the batch at which a part of the accounts failed.
        origin: which epoch of which run it is, where it is written into a folder; else empty.
    """

    # With what it begins.
    number = batches = 0
    unchecked_since: int | None = None
    _lost = _left_out_before = 0
    _uncounted = 0  # samples that came since the ledger failed
    _shard: Shard | None = None
    _under: Underlying | None = None
    _ended = _closed = False
    _off: tuple[str, ...] = ()  # parts that failed
    _notes: tuple[str, ...] = ()
    _warned_of: tuple[str, ...] = ()  # what was told beside a discrepancy

    def __init__(
        self,
        dataset: Any,
        settings: Settings,
        log: LoaderLog,
        ledger: Ledger,
        also: Sequence[object] = (),
        announced: Announced = NOT_ANNOUNCED,
        sampler: Any = None,
        seed: EpochSeed | None = None,
        seq_of_first: int = 0,
    ) -> None:
        self.log = log
        self.ledger = ledger
        self.lock = ledger.lock
        self.verify = settings.verify
        self._announced, self._length_is_true = announced
        self._sampler = sampler
        try:
            if not shares_out_nothing(sampler):
                self._note(shared_out_twice(sampler))
                self._shard = shard_of(sampler, dataset, log.length)
                log.at = place(self._shard)
            self._under = underlying(dataset)
        except Exception as exc:
            log.caught("the look at the sampler", exc)
        self.seed = seed and seed._replace(rank=log.at.rank or 0)
        self.seq_of_first = seq_of_first
        self._skip_budget = SkipBudget(settings.max_skipped, runs=not callable(settings.on_error))
        self._dataset: Any = dataset
        self._sampler_errors: dict[int, tuple[Failure, Exception]] = {}
        self._pid = os.getpid()
        self.noticed: list[str] = []
        self.unchecked: list[str] = []
        self.origin: dict[str, Any] = {}
        recorder: Recorder = settings.recorder
        self._orders = recorder.orders  # not the recorder: it holds the way to this
        sinks: list[object] = [LogLines(log, self._beneath, recorder.told), *also]
        if settings.may_write:
            with guarded("the trace", lambda: log):
                sinks += self._traces(recorder, settings)
            with guarded("the run's folder", lambda: log):
                sinks += self._folders(recorder, settings)
        if settings.on_failure_dump is not None:
            sinks.append(Dumps(settings.on_failure_dump, log))
        try:
            self.number = recorder.begin_epoch(self.audit)
            sinks.insert(0, recorder)
        except Exception as exc:  # what it was told would stand among the records of another epoch
            self.at_fault("the recorder", exc)
            self.number = recorder.epochs
            recorder.newest_audit = functools.partial(self.audit, self.number)
        try:
            recorder.history.begins(self.number, self)
            facts = EpochFacts(log.at.rank, self._under, self.seed, seq_of_first)
            self._under = recorder.facts.note(self.number, facts).under
        except Exception as exc:
            log.caught("the earlier audits", exc)
        if not recorder.loader_name:
            with guarded("the summary", lambda: log):
                tell_at_end(recorder, log.full_name)
        if recorder.run is not None and any(each is recorder.run for each in sinks):
            self.origin = recorder.run.origin(self.number)
        self.events = Events(log, sinks)
        ledger.compares_keys = settings.identity is not None
        ledger.expect(log.length)
        self.check = ledger.check  # type: ignore[method-assign]  # hot path
        if not self.events.drawn:
            self.drawn = ledger.drawn  # type: ignore[method-assign]  # hot path
        if self.events.begun:
            self._tell("begun", self.number, functools.partial(self.audit, self.number))

    def _traces(self, recorder: Recorder, settings: Settings) -> Sequence[object]:
        target = settings.trace_target
        if target is False:
            return ()
        from safeloader.provenance.trace import trace_for  # here: few programs write one

        return (trace_for(recorder, target, self.log),)

    def _folders(self, recorder: Recorder, settings: Settings) -> Sequence[object]:
        target = settings.run_target
        if target is None:
            return ()
        # Here: few programs do, and the code is in the memory of all.
        from safeloader.provenance.run_folder import About
        from safeloader.provenance.run_folders import sinks_for

        bound, every = settings.run_max_bytes, settings.run_sources
        about = About(self._sampler_facts, self._part_of)
        return sinks_for(recorder, target, bound, self.log, self._source, every, about)

    def resumed(
        self, batches: int, left_out: int, note: str = "", origin: dict[str, Any] | None = None
    ) -> None:
        """This epoch goes on where an earlier run had handed over so many batches.

        So many samples were skipped or replaced in them: the bound is one of the epoch. ``origin``
        says which epoch of which run that was.
        """
        self.batches = self.ledger.batches_before = batches
        self._skip_budget.skipped = self._left_out_before = left_out
        self._note(note)
        self._tell("resumed", self.number, batches, left_out, origin or {})

    def _note(self, said: str) -> None:
        """Have the audit say so, if anything is said."""
        if said:
            self._notes += (said,)

    # faults of our own ──────────────────────────────────────────────────────────────────────────

    def at_fault(self, part: str, exc: Exception) -> None:
        """A part of the accounts failed: it goes off, and the log says so once."""
        if raised_by_signal(exc):  # the user's, which only struck here
            raise exc
        if part in self._off:
            return
        self._off += (part,)
        if self.unchecked_since is None:
            self.unchecked_since = self.batches
        if part == "the ledger":  # its methods give way to those of this class
            for name in ("check", "drawn"):
                self.__dict__.pop(name, None)
        self.log.own_fault(part, exc)

    @contextlib.contextmanager
    def _guarded(self, part: str) -> Iterator[None]:
        """What is done within is part of the accounts, and its faults end that part alone."""
        try:
            yield
        except Exception as exc:
            self.at_fault(part, exc)

    def sink_failed(self, told: Callable[..., None], exc: Exception) -> None:
        """A sink raised as it was told of the batch handed over."""
        self.events.take_off(told, exc)
        if isinstance(getattr(told, "__self__", None), Recorder):
            self._off += ("the recorder",)
            if self.unchecked_since is None:
                self.unchecked_since = self.batches - 1

    def _tell(self, event: str, *about: Any) -> None:
        try:
            self.events.tell(event, *about)
        except Exception as exc:
            self.log.caught("the telling of events", exc)

    def _book(self, change: Callable[[Ledger], _T]) -> _T | None:
        """Read or change the ledger; None once it has failed."""
        if "the ledger" not in self._off:
            try:
                with self.lock:
                    return change(self.ledger)
            except Exception as exc:
                self.at_fault("the ledger", exc)
        return None

    def check(self, manifest: BatchManifest) -> Discrepancy | None:
        """The ledger's check stands here; without it ``max_skipped`` has to know how many came."""
        self._uncounted += len(expected_indices(manifest))
        return None

    # draws ──────────────────────────────────────────────────────────────────────────────────────

    def drawn(self, seq: int, indices: Packed) -> None:
        """Batch ``seq`` was drawn. Where no sink wants to know, the ledger's method stands here."""
        self._book(lambda ledger: ledger.drawn(seq, indices))
        self.events.tell("drawn", self.number, seq, indices)

    def draw_failed(
        self, seq: int, failure: Failure, exc: Exception, lost: Sequence[Any] = ()
    ) -> None:
        """The sampler raised; the error is raised when its place in the order comes."""
        self._sampler_errors[seq] = failure, exc
        if lost:
            self._book(lambda ledger: self.drawn(seq, pack(lost)))
        self._book(lambda ledger: ledger.draw_failed())

    def draw_interrupted(self, lost: Sequence[Any]) -> None:
        """An interrupt went through the sampler; ``lost`` it had drawn meanwhile."""
        self._book(lambda ledger: ledger.draw_failed(pack(lost)))

    def draws_ended(self, dropped: Sequence[Any]) -> None:
        """The sampler is at its end; ``dropped`` it drew but left out of every batch."""
        self._book(lambda ledger: ledger.draws_ended(pack(dropped) if dropped else b""))

    def opened(self, seq: int) -> PendingBatch | None:
        """What is known of a batch that was drawn and has not come."""
        return self._book(lambda ledger: ledger.opened(seq))

    # arrivals ───────────────────────────────────────────────────────────────────────────────────

    def tell_discrepancy(
        self,
        discrepancy: Discrepancy,
        manifest: BatchManifest | None,
        beside: Sequence[str] = (),
    ) -> None:
        """Raise or warn, as the user asked for: what came is not what was drawn.

        ``beside`` is what else is known that may be the cause.

        Raises:
            DeliveryError: under ``verify="raise"``.
        """
        if self.verify == "off":
            return
        if self.verify == "warn":
            # By what it is about: its numbers grow from batch to batch.
            new = [each for each in beside if each.partition(":")[0] not in self._warned_of]
            self._warned_of += tuple(each.partition(":")[0] for each in new)
            warn("\n".join([f"safeloader: {discrepancy.reason}", *new]))
            return
        step = discrepancy.hint or _SEE_AUDIT
        if any(SAME_STREAM in each for each in beside):  # with what to do about it
            step = _SEE_AUDIT
        culprits = discrepancy.culprits
        raise self._error_in_place(
            manifest,
            phase="delivery",
            exception_type="DeliveryError",
            message=discrepancy.reason,
            index=next((each for each in culprits if each != -1), None),
            indices=culprits + discrepancy.sound,
            hint="\n".join([*beside, step]),
        )

    def came_empty(self, manifest: BatchManifest) -> None:
        """Every sample of a batch was left out: the loop does not get it.

        Raises:
            SampleError: if too many were.
        """
        self.count_incidents(manifest)

        def check(ledger: Ledger) -> Discrepancy | None:
            if discrepancy := self.check(manifest):
                ledger.settle(discrepancy, handed_over=False)
            return discrepancy

        if discrepancy := self._book(check):
            self.tell_discrepancy(discrepancy, manifest)
        said = "epoch %d: every sample of what would be batch %d failed: it is left out whole"
        if self.log.at.rank is not None:
            said += ", and other ranks may wait for it; on_error='replace' keeps them in step"
        self.log.warning(said, self.number, self.batches)
        if self.ledger.settled:
            self.close()

    def count_incidents(self, manifest: BatchManifest) -> None:
        """Tell of samples left out, replaced or late, before the batch is booked.

        Raises:
            SampleError: if there were too many: the batch is lost with it.
        """
        reason = None
        with self._guarded("the count of skipped samples"):
            reason = self._too_many(manifest)
        if reason is None:
            return
        asked = expected_indices(manifest)
        self._book(lambda ledger: ledger.failed(manifest))
        self._book(lambda ledger: ledger.note_reasons(manifest))
        gone = (each.position for each in manifest.incidents or () if each.what != "late")
        at = max(gone, default=None)
        raise self._error_in_place(
            manifest,
            phase="sample",
            exception_type="SampleError",
            message=f"too many samples failed: {reason}",
            index=None if at is None else asked[at],
            position=at,
            indices=asked,
            hint="\n".join(
                [*first_reasons(self.ledger.reasons, SHOWN_SKIPPED, self._beneath), _IN_COMMON]
            ),
        )

    def _too_many(self, manifest: BatchManifest) -> str | None:
        """Tell of the incidents of a batch, and count them; a sentence if they are too many."""
        asked = expected_indices(manifest)
        incidents = [(asked[each.position], each) for each in manifest.incidents or ()]
        failures = [self._placed(each, batch=self.batches) for each in manifest.failures or ()]
        self._tell("skipped", self.number, self.batches, incidents, failures)
        if "the count of skipped samples" in self._off:
            return None
        ledger = self.ledger
        so_far = ledger.samples_before + ledger.delivered_count + self._uncounted + len(asked)
        so_far += ledger.by_class["skipped"].count + ledger.by_class["replaced"].count
        return self._skip_budget.exceeded(manifest, so_far)

    def came_failed(
        self, came: FailedBatch, raised: list[BaseException], beside: Sequence[str] = ()
    ) -> SafeLoaderError:
        """The error for a batch that could not be made; ``beside`` is what may be the cause.

        ``raised`` holds the exception where it was raised in this process; it is taken out.
        """
        manifest, failure = came
        exception = raised.pop() if raised else None
        if failure is None:  # drawn in part, or not to be sent to a worker
            failure, exception = self._sampler_errors.pop(manifest.seq)
        self._book(lambda ledger: ledger.failed(manifest))
        state = failure.dataset_state
        if state is not None and failure.worker_id is not None and self._dataset is not None:
            with contextlib.suppress(Exception):  # the error is told all the same
                state = state | {"differs_from_main": differences(state, describe(self._dataset))}
        failure = self._behind(failure)
        if beside:
            *found, step = failure.hint.split("\n")
            if step.startswith("safeloader.replay(") and any(_POSITION in each for each in beside):
                step = _READ_ALONE
            failure = dataclasses.replace(failure, hint="\n".join([*beside, *found, step]))
        batch = None if failure.phase == "init" else self.batches  # which is not to blame
        self.batches += 1
        self._lost += 1
        return self.error(failure, exception, batch=batch, dataset_state=state)

    def _behind(self, failure: Failure) -> Failure:
        """The failure of a worker, with what main knows: its copy of the dataset is an old one."""
        index, mine = failure.index, self.log.length
        known = (failure.dataset_state or {}).get("length")
        if (
            failure.worker_id is None
            or failure.phase != "sample"
            or not (type(index) is int and type(known) is int and type(mine) is int)
            or not known <= index < mine
        ):
            return failure
        *found, _ = failure.hint.split("\n")
        found = [line for line in found if not line.endswith(LOOK_AT_SAMPLER)]
        found.insert(
            0,
            f"index {index} is beyond the worker's copy of the dataset: the workers' copy has "
            f"{known} samples, yours {mine}, since it grew after they started",
        )
        step = "make the loader anew once the dataset has grown, or leave persistent_workers off"
        return dataclasses.replace(failure, hint="\n".join([*found, step]))

    def interrupted(self, manifest: BatchManifest | None) -> None:
        """The user got an exception that is not ours; on the way was the batch of ``manifest``."""
        failed = self.ledger.by_class["failed"]
        before = failed.count
        self._book(lambda ledger: ledger.interrupted(manifest))
        if manifest is None and failed.count > before:  # it was raised in the place of a batch
            self.batches += 1
            self._lost += 1

    def restarted(self, failure: Failure, said: Sequence[str]) -> None:
        """New workers are about to take over from those that died."""
        self._tell("restarted", self._placed(failure), said)

    def broke(self, failure: Failure, at: Sequence[Any] | None = None) -> SafeLoaderError:
        """The error for workers that hang, or died ``at`` these locations: then nothing follows."""
        for where in at or ():
            if (seq := where.position.seq) is not None:
                self._book(operator.methodcaller("lost", seq))
        state = None
        if self._dataset is not None:
            state = describe(self._dataset, length=self.log.length)
            mine = "the main process's copy: the worker's own cannot be read from here"
            state["notes"] = [*(state.get("notes") or []), mine]
            failure = self._with_source(failure)
        error = self.error(failure, dataset_state=state)
        if at is not None:
            self.close()
        return error

    def _source(self, index: Any) -> str:
        """Where a sample comes from, as the copy of the dataset here tells."""
        dataset = self._dataset
        return "" if dataset is None else source_of(dataset, index, None, self.log.length)

    def _with_source(self, failure: Failure) -> Failure:
        """A worker that died or hangs cannot say which file it was at: the copy here can."""
        source = ""
        if failure.index is not None:
            source = source_of(self._dataset, failure.index, None, self.log.length)
        if not source:
            return failure
        *found, cause = failure.hint.split("\n")
        return dataclasses.replace(failure, hint="\n".join([*found, source, cause]))

    def _placed(self, failure: Failure, **more: Any) -> Failure:
        index, under = failure.index, self._under
        if under is not None and index is None and failure.phase in ("crash", "timeout"):
            text = under.text_of_all(failure.indices)  # of one call: which it was at is not known
            more = {"hint": f"these are {text}\n{failure.hint}"} | more if text else more
        elif under is not None and index is not None and (text := under.text(index)):
            said = f"index {index} of the {under.name} is "
            if said not in failure.hint:
                more = {"hint": f"{said}{text}\n{more.pop('hint', failure.hint)}"} | more
        if self.seed is not None and failure._seeded is None:  # of a worker that died or hangs
            seq, per = failure._seq, self.seed.per
            if seq is not None:
                more["_seeded"] = SeededAs(self.seed.of_batch(seq - self.seq_of_first), per)
            elif per == "sample":  # for a sample it does not matter what its batch was
                more["_seeded"] = SeededAs(self.seed.of_batch(0), per)
        return dataclasses.replace(failure, epoch=self.number, rank=self.log.at.rank, **more)

    def _beneath(self, index: Any) -> str:
        """What an index is in the dataset under a Subset, in brackets; empty elsewhere."""
        text = "" if self._under is None else self._under.text(index)
        return f" ({text})" if text else ""

    def _error_in_place(self, manifest: BatchManifest | None, **fields: Any) -> SafeLoaderError:
        """An error that is ours to tell, and ends the batch of ``manifest``."""
        if manifest is not None:
            fields |= {"batch": self.batches, "worker_id": manifest.worker_id, "pid": manifest.pid}
            self.batches += 1
            self._lost += 1
        return self.error(Failure(**fields))

    def error(
        self, failure: Failure, exception: BaseException | None = None, **more: Any
    ) -> SafeLoaderError:
        """The error to raise for ``failure``, which is told wherever it is to be told."""
        failure = self._placed(failure, **more)
        self._tell("failed", failure)
        failure_was_told()
        return error_from(failure, exception)

    # the end ────────────────────────────────────────────────────────────────────────────────────

    def ended(self, *, broken: bool) -> None:
        """The stock iterator is at its end; ``broken``: its workers died, which was told.

        Raises:
            DeliveryError: if samples are missing, under ``verify="raise"``; the first time only.
        """
        if self._ended:
            return
        self._ended = True
        discrepancy = self._book(lambda ledger: ledger.finish(broken=broken))
        self.close()
        if discrepancy is not None:
            self.tell_discrepancy(discrepancy, None)

    def close(self) -> None:
        """No more will come; said once. Nothing is raised: an early ``break`` is no error."""
        if self._closed or os.getpid() != self._pid:  # a child's copy has nothing to say
            return
        self._closed = True
        if self._shard is not None:
            with guarded("the look at the sampler", lambda: self.log):
                self._note(self._same_order())
        notes = self._book(lambda ledger: ledger.notes(self.log.length)) or []
        self._tell("closed", self.number, [*notes, *self._notes, *self._lengths()])
        if self.events.audited:  # an audit takes some hundred µs: made when somebody reads it
            self._tell("audited", self.audit(self.number))
        self._sampler = None

    def _lengths(self) -> list[str]:
        """What the sampler says of its length, where it gave another number of batches."""
        ledger = self.ledger
        if self._announced is None or not ledger.all_drawn or ledger.by_class["failed"].count:
            return []
        said = of_batches(self._announced, ledger.batches_drawn, None)
        return [said] if said else []

    def _same_order(self) -> str:
        """A sentence, once for a sampler, where nobody told it the number of the epoch."""
        shard, sampler, first = self._shard, self._sampler, self.ledger.first_drawn
        if shard is None or shard.epoch is None or not self.ledger.all_drawn:
            return ""
        if type(first) is not bytes:  # no ints: code of the user's would have to compare them
            return ""
        now = shard_of(sampler)
        if now is None or now.epoch != shard.epoch:  # told meanwhile
            return ""
        orders = self._orders
        if len(orders) > _ORDERS_MAX:  # of datasets long gone
            orders.clear()
        before = orders.get(id(self._dataset))
        orders[id(self._dataset)] = now.epoch, first, before is not None and before[2]
        if before is None or before[2] or before[:2] != (now.epoch, first):
            return ""
        orders[id(self._dataset)] = now.epoch, first, True
        return (
            f"this epoch had the order of the one before: the epoch of {now.kind}(shuffle=True) is "
            f"{now.epoch} still, and both began with {indices_text(unpack(first))}. Call its "
            "set_epoch(epoch) before each epoch"
        )

    @property
    def closed(self) -> bool:
        """Whether no more will come."""
        return self._closed

    def put_away(self) -> int | None:
        """Let go of what the audit does not need; how many samples were drawn, if that may wait."""
        return self._book(_PUT_AWAY)

    def release(self) -> None:
        """Close, and let go of the dataset and of the sinks: the recorder, which holds the way to
        the audit, outlives the iterator, and they would keep each other alive."""
        self.close()
        self._dataset = self._sampler = None
        self.events = UNHEARD

    def to_other_ranks(self, number: int, dataset: Any, sampler: Any) -> RankAccounts:
        """What other ranks are told of this epoch; ``sampler`` is what the loader draws from."""
        return self._to_other_ranks(self.audit(number), dataset, sampler)

    def _to_other_ranks(
        self, audit: EpochAudit, dataset: Any, sampler: Any, *, alone: bool = False
    ) -> RankAccounts:
        from safeloader.main.rank_accounts import rank_accounts  # here: for several ranks alone

        accounts = rank_accounts(
            audit,
            self.ledger,
            self.log.at,
            self._shard,
            (dataset, self.log.length),
            sampler,
            alone=alone,
        )
        part = dataclasses.replace(accounts.part, left_out_before=self._left_out_before)
        return accounts._replace(part=part)

    def _sampler_facts(self) -> dict[str, Any]:
        """What its sampler draws on purpose, and which share: for a run's folder."""
        purpose = "" if self._sampler is self._dataset else purpose_of(self._sampler)
        shard = None if self._shard is None else dataclasses.asdict(self._shard)
        return {"purpose": purpose, "shard": shard}

    def _part_of(self, audit: EpochAudit) -> AuditPart | None:
        """What an epoch tells to other ranks, for a run's folder; None if that takes long."""
        most = _SUMMED_MAX if self.log.length is not None else _DIGESTED_MAX
        if audit.drawn > most or self._dataset is None:
            return None
        alone = self.log.at.rank is None and self._shard is None
        return self._to_other_ranks(audit, self._dataset, self._sampler, alone=alone).part

    def audit(self, number: int) -> EpochAudit:
        """The accounts as they stand; may be asked for from another thread."""
        audit = EpochAudit(number)
        with self._guarded("the ledger" if "the ledger" in self._off else "the audit"):
            audit = self.ledger.audit(number, self.log.length)
            batches = self.batches - self._lost - self.ledger.batches_before
            said = self._announced
            if said is None and self._length_is_true and audit.complete:
                said = audit.batches_drawn
            notes = (*audit.notes, *self._notes)
            audit = dataclasses.replace(audit, batches=batches, announced=said, notes=notes)
            if self.noticed:
                audit = dataclasses.replace(audit, noticed=tuple(self.noticed))
            if self.unchecked:
                unchecked = (*audit.unchecked, *self.unchecked)
                audit = dataclasses.replace(audit, unchecked=unchecked)
            if self._under is not None:
                audit = audit.naming(self._under)
            if self.log.at.rank is not None or self._shard is not None:
                audit = audit.of_rank(self.log.at, self._shard)
        since = self.unchecked_since
        return audit if since is None else audit.not_checked(since, *self._off)
