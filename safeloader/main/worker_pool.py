"""A pool of workers, and torch's iterator over it. Runs in: main.

::

    Session ── builds ──► torch's iterator ◄── waits through ── Inbox ◄── ResultQueue ◄── workers
       │                                                          │
       └── Diagnosis ◄── FlightRecorder                           └── WorkersDied, TimedOut

With persistent workers it serves one epoch after the other, and the loader holds it beside torch's
iterator; otherwise it belongs to its :class:`SafeIterator`. It must not hold the loader: see there.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

from safeloader import _torch
from safeloader.delivery.ledger import MapLedger, PendingBatch
from safeloader.delivery.stream_ledger import StreamLedger
from safeloader.errors import error_from
from safeloader.failures import dump
from safeloader.failures.failure import Failure, failure_of
from safeloader.failures.loader_log import LoaderLog
from safeloader.introspect.files import rank
from safeloader.introspect.fork_hazards import survey, warn_once
from safeloader.introspect.pickling import find_unpicklable
from safeloader.introspect.random_state import preserved
from safeloader.introspect.resource_exhaustion import shortage
from safeloader.main.drawing import RecordingSampler, proven_length
from safeloader.main.epoch import Epoch
from safeloader.provenance.recorder import failure_was_told
from safeloader.supervision import leftovers
from safeloader.supervision.diagnosis import Diagnosis, Stalls
from safeloader.supervision.flight_recorder import EndSignal, FlightRecorder
from safeloader.supervision.receiver import PinnedResultReceiver, ResultReceiver
from safeloader.transport.result_queue import ResultQueue
from safeloader.transport.slot_budget import PoolTally, budget
from safeloader.transport.slot_reader import Unpacker
from safeloader.transport.slot_table import SlotTable
from safeloader.transport.stream_progress import StreamProgress
from safeloader.transport.task_queue import TaskQueue
from safeloader.worker.context import FetchContext
from safeloader.worker.policy import Policy
from safeloader.worker.startup import WorkerStartup, fetcher_for

if TYPE_CHECKING:
    from safeloader.loader import SafeDataLoader
    from safeloader.main.iterator import SafeIterator

logger = logging.getLogger("safeloader")


class WorkerPool:
    """Torch's iterator, with the parts of ours that are built into it.

    Attributes:
        stock: torch's iterator.
        kept: the one that the loader holds, with persistent workers; an earlier one than ``stock``
            after a restart.
        live: the checked iterator over it.
        broken: what ended the workers, once something did.
        timeout_s: the loader's ``timeout``.
        persistent: whether the loader goes on with these workers in its next epoch.
        timed_out: whether it ran out: a worker hangs, perhaps.
        raised: exceptions of failed batches, with ``num_workers=0``.
    """

    def __init__(self, loader: SafeDataLoader[Any], epoch: Epoch) -> None:
        self.raised: list[BaseException] = []
        self._log = epoch.log
        self.live: weakref.ref[SafeIterator] | None = None
        self.broken: Failure | None = None
        self.timeout_s = float(loader.timeout)
        self.timed_out = False
        self.persistent = loader.persistent_workers
        self.sampler = RecordingSampler(
            _torch.index_sampler(loader),
            batched=_torch.batches_itself(loader),
            stream=_torch.is_stream(loader),
            keep_open=loader.on_crash == "restart" and loader.num_workers > 0,
            in_main=loader.num_workers == 0,
            lends=loader.on_error == "replace",
        )
        _warn_of_ranks(loader, self._log)
        self._progress = _progress_for(loader, self._log)
        self._policy = Policy(
            loader.on_error, loader.retries, tells=loader.on_failure_dump is not None
        )
        self.open_ledger(loader, epoch)
        if loader.num_workers:
            self.stock = self._pool(loader, self.sampler)
        else:
            self.stock = self._build_in_main(loader, epoch)
        self.kept = self.stock

    # building ───────────────────────────────────────────────────────────────────────────────────

    def _build_in_main(self, loader: SafeDataLoader[Any], epoch: Epoch) -> Any:
        view = _torch.LoaderView(loader, self.sampler, loader.worker_init_fn, None)
        try:
            stock = _torch.build_iterator(view)
        except Exception as exc:
            failure_was_told()
            if not _torch.raised_by_dataset_iter(exc):
                raise
            hint = "iter(dataset) raised, before any sample\niter(loader.dataset) repeats it"
            failure = failure_of(exc, phase="sample", where="", epoch=epoch.number, hint=hint)
            raise error_from(failure, exc) from None
        context = FetchContext(
            None,
            progress=self._progress,
            key=loader.key,
            policy=self._policy,
            raised=self.raised,
            length=self._log.length,
        )
        _torch.replace_fetcher(stock, lambda fetcher: fetcher_for(fetcher, context))
        return stock

    def _pool(self, loader: SafeDataLoader[Any], sampler: Any) -> Any:
        """Start the workers, with torch's iterator over them.

        Raises:
            TransportError: if something cannot be pickled for them, or the machine has no room.
        """
        _warn_of_inherited(loader)
        results: ResultQueue | None = None
        try:
            table, no_slots = _slot_table(loader)
            index_set = loader._recorder_on_demand().transport
            if table is not None:
                index_set = PoolTally(index_set, table)
            unpacker = Unpacker(table, index_set)
            results = ResultQueue(loader.num_workers, unpacker.opened, unpacker.settle)
            flight = _flight_recorder(loader.num_workers, self._log)
            startup = WorkerStartup(
                loader.worker_init_fn,
                key=loader.key,
                policy=self._policy,
                progress=self._progress,
                results=results,
                flight=flight,
                slots=table,
                no_slots=no_slots,
                checksum=loader.checksum,
                length=self._log.length,
            )
            tasks = functools.partial(TaskQueue, self.sampler.refused)
            ending = None if flight is None else EndSignal(flight)
            channels = _torch.Channels(results, tasks, ending)
            self._view = functools.partial(
                _torch.LoaderView, worker_init_fn=startup, channels=channels
            )
            stock = _torch.build_iterator(self._view(loader, sampler))
        except Exception as exc:
            failure_was_told()
            failure = _why_not_started(loader, exc)
            leftovers.close_pipes(exc)
            if results is not None:  # whoever keeps the error may keep the frames as well
                results.close()
            if failure is None:
                raise
            if loader.on_failure_dump is not None:
                dump.write(failure, loader.on_failure_dump, self._log)
            # Without its frames, which lead into torch's half made iterator.
            raise error_from(failure, exc.with_traceback(None)) from None
        results.all_started()
        if isinstance(index_set, PoolTally):
            index_set.workers = weakref.WeakSet(_torch.workers_of(stock))
        log = self.sampler

        def opened(seq: int) -> PendingBatch | None:
            return log.log.opened(seq) if isinstance(log.log, Epoch) else None

        self.diagnosis = Diagnosis(
            flight, _torch.workers_of(stock), _torch.start_method(loader), opened
        )
        self._listen(loader, stock, results)
        return stock

    def _listen(self, loader: SafeDataLoader[Any], stock: Any, results: ResultQueue) -> None:
        workers = _torch.workers_of(stock)
        ended = _torch.expects_end_of(weakref.ref(stock))
        stalled = Stalls(self.diagnosis, self._log)

        def inbox(
            pinned: queue.Queue[Any] | None, thread: threading.Thread | None
        ) -> ResultReceiver:
            common: tuple[Any, ...] = (
                results,
                workers,
                ended,
                loader.timeout,
                loader.stall_after,
                stalled,
            )
            if pinned is None or thread is None:
                return ResultReceiver(*common)
            return PinnedResultReceiver(pinned, thread, *common)

        _torch.listen_through(stock, inbox)

    # epochs ─────────────────────────────────────────────────────────────────────────────────────

    def open_ledger(self, loader: SafeDataLoader[Any], epoch: Epoch) -> None:
        """Have the draws reported to ``epoch``, in a ledger of the dataset's kind."""
        with_keys = loader.key is not None
        if _torch.is_stream(loader):
            workers = loader.num_workers
            epoch.open(StreamLedger(with_keys=with_keys, progress=self._progress, workers=workers))
        else:
            # Workers draw ahead, so the sampler's end is known when the last batch comes. Without
            # workers only its length tells: asking the sampler would move its generator.
            drawn_from = _torch.index_sampler(loader)
            length = None if loader.num_workers else functools.partial(proven_length, drawn_from)
            epoch.open(MapLedger(with_keys=with_keys, expected_batches=length))
        self.sampler.log = epoch

    def restart(self, loader: SafeDataLoader[Any], epoch: Epoch) -> None:
        """The next epoch on the same workers."""
        budget.divide()
        self.open_ledger(loader, epoch)
        _torch.reset_iterator(self.stock, self._view(loader, self.sampler))

    # workers that died ──────────────────────────────────────────────────────────────────────────

    def end(self) -> None:
        """End the workers that are left, whatever they are at."""
        _torch.shut_down(self.stock)
        leftovers.remove(worker.pid for worker in _torch.workers_of(self.stock))

    def let_go(self) -> None:
        """Nobody waits for these workers any more: one that hangs is not waited for either."""
        if self.timed_out and not self.persistent and self.broken is None:
            self.end()

    def revive(self, blueprint: SafeDataLoader[Any]) -> None:
        """A new pool on the batches still open; ``blueprint`` is the loader, or a copy of it.

        The generators of the main process stay where they are, as if nothing had happened.
        """
        self.end()
        generator = blueprint.generator
        state = None if generator is None else generator.get_state()
        with preserved():
            self.stock = self._pool(blueprint, self.sampler.again())
        if generator is not None and state is not None:
            generator.set_state(state)


def blueprint_of(loader: SafeDataLoader[Any]) -> SafeDataLoader[Any]:
    """A copy of ``loader`` that a new pool can be built from, and that holds no pool itself."""
    copy: SafeDataLoader[Any] = object.__new__(type(loader))
    kept = {k: v for k, v in vars(loader).items() if k not in ("_iterator", "_pool")}
    copy.__dict__.update(kept)
    return copy


def _progress_for(loader: SafeDataLoader[Any], log: LoaderLog) -> StreamProgress | None:
    """Shared memory for the streams' lengths; without it (none to be had) they go unchecked."""
    if not _torch.is_stream(loader):
        return None
    try:
        return StreamProgress(max(loader.num_workers, 1), shared=loader.num_workers > 0)
    except OSError as exc:
        log.warning("the ends of the streams cannot be checked: no shared memory (%s)", str(exc))
        return None


def _flight_recorder(workers: int, log: LoaderLog) -> FlightRecorder | None:
    try:
        return FlightRecorder(workers)
    except OSError as exc:
        # Its text: a handler that keeps records would keep its frames too, and what they hold.
        log.warning("no flight recorder, so a crash will name no index: %s", str(exc))
        return None


def _slot_table(loader: SafeDataLoader[Any]) -> tuple[SlotTable | None, str]:
    """Where the states of the workers' slots are kept; None, and why, for torch's own transport."""
    if loader.transport == "torch":
        return None, ""
    if not hasattr(os, "memfd_create"):
        return None, f"{sys.platform} has no anonymous shared memory (memfd)"
    try:
        return SlotTable(loader.num_workers), ""
    except (OSError, RuntimeError) as exc:
        return None, f"no shared memory for slots: {exc}"


def _warn_of_inherited(loader: SafeDataLoader[Any]) -> None:
    try:
        found = survey(
            loader.dataset,
            "dataset",
            start_method=_torch.start_method(loader),
            num_workers=loader.num_workers,
            beside={"collate_fn": loader.collate_fn, "worker_init_fn": loader.worker_init_fn},
        )
    except Exception:  # a survey that fails must not keep the loader from starting
        logger.debug("the dataset could not be looked through", exc_info=True)
        return
    warn_once(found, loader.dataset, stacklevel=8)


_told_of_ranks: list[bool] = []


def _warn_of_ranks(loader: SafeDataLoader[Any], log: LoaderLog) -> None:
    """A rank that leaves a batch out makes the others wait for it in the next all-reduce."""
    if loader.on_error != "skip" or _told_of_ranks or rank() is None:
        return
    _told_of_ranks.append(True)
    log.warning(
        "on_error='skip' in distributed training: batches of this rank may get smaller, and a "
        "batch that is left out whole stalls the other ranks. on_error='replace' keeps shapes, "
        "counts and ranks in step"
    )


_OPEN_IT_THERE = "multiprocessing_context='fork' does without pickling, where forking is safe"


def _why_not_started(loader: SafeDataLoader[Any], exc: Exception) -> Failure | None:
    """The failure that kept the workers from starting; None if it is not ours to explain."""
    short = shortage(exc)
    if short is not None:
        hint = f"no worker could be started\n{short}"
        return failure_of(exc, phase="transport", where="", hint=hint)
    if _torch.start_method(loader) == "fork":
        return None
    sent = {
        "dataset": loader.dataset,
        "collate_fn": loader.collate_fn,
        "worker_init_fn": loader.worker_init_fn,
        "key": loader.key,
        "on_error": loader.on_error,
    }
    for name, thing in sent.items():
        culprit = find_unpicklable(thing, name)
        if culprit is not None:
            method = _torch.start_method(loader)
            hint = (
                f"{culprit} cannot be pickled, and {method} sends it to every worker "
                f"({culprit.reason})\n{culprit.advice.rstrip('.')}; {_OPEN_IT_THERE}"
            )
            return failure_of(exc, phase="transport", where="", hint=hint)
    return None
