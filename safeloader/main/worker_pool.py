"""A pool of workers, and torch's iterator over it. Runs in: main.

::

    WorkerPool ── builds ──► torch's iterator ◄── waits through ── ResultReceiver ◄── ResultQueue
       │                                                             │                    ▲
       └── Diagnosis ◄── FlightRecorder                              └── WorkersDied    workers

With persistent workers it serves one epoch after the other; otherwise it belongs to its
:class:`~safeloader.main.iterator.SafeIterator`. It must not hold the loader: see there.
"""

from __future__ import annotations

import functools
import os
import queue
import sys
import threading
import weakref
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from safeloader import _python, _torch
from safeloader.delivery.ledger import MapLedger
from safeloader.delivery.stream_ledger import StreamLedger
from safeloader.errors import error_from
from safeloader.failures import dump
from safeloader.failures.failure import Failure, failure_of
from safeloader.introspect.files import rank
from safeloader.introspect.fork_hazards import survey, warn_once
from safeloader.introspect.pickling import find_unpicklable
from safeloader.introspect.random_state import preserved
from safeloader.introspect.resource_exhaustion import shortage
from safeloader.main.drawing import RecordingSampler, ResumedDraws, proven_length
from safeloader.main.epoch import Epoch
from safeloader.provenance.recorder import failure_was_told
from safeloader.settings import Settings
from safeloader.supervision.diagnosis import Diagnosis, Stalls
from safeloader.supervision.flight_recorder import EndSignal, FlightRecorder
from safeloader.supervision.processes import remove_files_of
from safeloader.supervision.receiver import PinnedResultReceiver, ResultReceiver
from safeloader.transport.channel import ResultQueue, TaskQueue
from safeloader.transport.slot_budget import PoolCounts, budget
from safeloader.transport.slot_reader import Unpacker
from safeloader.transport.slot_table import SlotTable
from safeloader.transport.stats import TransportCounts
from safeloader.transport.stream_progress import StreamProgress
from safeloader.worker.context import FetchContext
from safeloader.worker.policy import Policy
from safeloader.worker.startup import WorkerStartup, fetcher_for

_told_of_ranks: list[bool] = []


class WorkerPool:
    """Torch's iterator, with the parts of ours that are built into it.

    Attributes:
        workers: how many; 0: torch's iterator fetches in this process.
        stream: whether the dataset is iterable-style.
        stock: torch's iterator.
        kept: the one that the loader holds, with persistent workers; an earlier one than ``stock``
            after a restart.
        live: the checked iterator over it.
        broken: what ended the workers, once something did.
        timeout_s: the loader's ``timeout``.
        timed_out: whether it ran out: a worker hangs, perhaps.
        raised: exceptions of failed batches, without workers.
    """

    def __init__(
        self, loader: DataLoader[Any], settings: Settings, epoch: Epoch, transport: TransportCounts
    ) -> None:
        self.workers = loader.num_workers
        self.stream = isinstance(loader.dataset, IterableDataset)
        self.raised: list[BaseException] = []
        self.live: weakref.ref[Any] | None = None
        self.broken: Failure | None = None
        self.timeout_s = float(loader.timeout)
        self.timed_out = False
        self._persistent = loader.persistent_workers
        self._transport = transport
        self._log = epoch.log
        self.sampler = RecordingSampler(
            _torch.index_sampler(loader),
            batched=_torch.batches_itself(loader),
            stream=self.stream,
            keep_open=settings.on_crash == "restart" and self.workers > 0,
            in_main=self.workers == 0,
            lends=settings.on_error == "replace",
        )
        # A rank that leaves a batch out makes the others wait for it in the next all-reduce.
        if settings.on_error == "skip" and not _told_of_ranks and rank() is not None:
            _told_of_ranks.append(True)
            self._log.warning(
                "on_error='skip' in distributed training: batches of this rank may get smaller, "
                "and a batch that is left out whole stalls the other ranks. on_error='replace' "
                "keeps shapes, counts and ranks in step"
            )
        self._progress: StreamProgress | None = None
        if self.stream:
            try:  # shared memory for the streams' lengths
                self._progress = StreamProgress(max(self.workers, 1), shared=self.workers > 0)
            except OSError as exc:
                self._log.warning(
                    "the ends of the streams cannot be checked: no shared memory (%s)", str(exc)
                )
        self._policy = Policy(
            settings.on_error, settings.retries, tells=settings.on_failure_dump is not None
        )
        self._open_ledger(loader, settings, epoch)
        if self.workers:
            self.stock = self._start(loader, self.sampler)
        else:
            self.stock = self._build_in_main(loader, epoch)
        self.kept = self.stock

    # building ───────────────────────────────────────────────────────────────────────────────────

    def _build_in_main(self, loader: DataLoader[Any], epoch: Epoch) -> Any:
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
            key=self._settings.key,
            policy=self._policy,
            raised=self.raised,
            length=self._log.length,
        )
        _torch.replace_fetcher(stock, lambda fetcher: fetcher_for(fetcher, context))
        return stock

    def _start(self, loader: DataLoader[Any], sampler: RecordingSampler | ResumedDraws) -> Any:
        """Start the workers, with torch's iterator over them.

        Raises:
            TransportError: if something cannot be pickled for them, or the machine has no room.
        """
        settings, workers = self._settings, self.workers
        self._warn_of_hazards(loader)
        results: ResultQueue | None = None
        try:
            table, no_slots = self._slot_table()
            counts = self._transport if table is None else PoolCounts(self._transport, table)
            unpacker = Unpacker(table, counts)
            results = ResultQueue(workers, unpacker.opened, unpacker.settle)
            flight = self._flight_recorder()
            startup = WorkerStartup(
                loader.worker_init_fn,
                key=settings.key,
                policy=self._policy,
                progress=self._progress,
                results=results,
                flight=flight,
                slots=table,
                no_slots=no_slots,
                checksum=settings.checksum,
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
            failure = self._why_not_started(loader, exc)
            _python.close_pipes(exc)
            if results is not None:  # whoever keeps the error may keep the frames as well
                results.close()
            if failure is None:
                raise
            if settings.on_failure_dump is not None:
                dump.write(failure, settings.on_failure_dump, self._log)
            # Without its frames, which lead into torch's half made iterator.
            raise error_from(failure, exc.with_traceback(None)) from None
        results.all_started()
        if isinstance(counts, PoolCounts):
            counts.workers = weakref.WeakSet(_torch.workers_of(stock))
        draws = self.sampler
        self.diagnosis = Diagnosis(
            flight,
            _torch.workers_of(stock),
            _torch.start_method(loader),
            lambda seq: (
                draws.log.opened(seq) if draws.log else None
            ),  # not by way of the pool: a cycle
        )
        self._listen(stock, results)
        return stock

    def _listen(self, stock: Any, results: ResultQueue) -> None:
        common: tuple[Any, ...] = (
            results,
            _torch.workers_of(stock),
            _torch.expects_end_of(weakref.ref(stock)),
            self.timeout_s,
            self._settings.stall_after,
            Stalls(self.diagnosis, self._log),
        )

        def receiver(
            pinned: queue.Queue[Any] | None, thread: threading.Thread | None
        ) -> ResultReceiver:
            if pinned is None or thread is None:
                return ResultReceiver(*common)
            return PinnedResultReceiver(pinned, thread, *common)

        _torch.listen_through(stock, receiver)

    def _slot_table(self) -> tuple[SlotTable | None, str]:
        """The states of the workers' slots; None, and why, for torch's own transport."""
        if self._settings.transport == "torch":
            return None, ""
        if not hasattr(os, "memfd_create"):
            return None, f"{sys.platform} has no anonymous shared memory (memfd)"
        try:
            return SlotTable(self.workers), ""
        except (OSError, RuntimeError) as exc:
            return None, f"no shared memory for slots: {exc}"

    def _flight_recorder(self) -> FlightRecorder | None:
        try:
            return FlightRecorder(self.workers)
        except OSError as exc:
            # Its text: a handler that keeps records would keep its frames too, and what they hold.
            self._log.warning("no flight recorder, so a crash will name no index: %s", str(exc))
            return None

    def _warn_of_hazards(self, loader: DataLoader[Any]) -> None:
        """Warn of what the workers inherit from this process and had better not."""
        try:
            found = survey(
                loader.dataset,
                "dataset",
                start_method=_torch.start_method(loader),
                num_workers=self.workers,
                beside={"collate_fn": loader.collate_fn, "worker_init_fn": loader.worker_init_fn},
            )
        except Exception:  # a survey that fails must not keep the loader from starting
            self._log.debug("the dataset could not be looked through", exc_info=True)
            return
        warn_once(found, loader.dataset, stacklevel=8)

    def _why_not_started(self, loader: DataLoader[Any], exc: Exception) -> Failure | None:
        """The failure that kept the workers from starting; None if it is not ours to explain."""
        short = shortage(exc)
        if short is not None:
            hint = f"no worker could be started\n{short}"
            return failure_of(exc, phase="transport", where="", hint=hint)
        method = _torch.start_method(loader)
        if method == "fork":
            return None
        sent = {
            "dataset": loader.dataset,
            "collate_fn": loader.collate_fn,
            "worker_init_fn": loader.worker_init_fn,
            "key": self._settings.key,
            "on_error": self._settings.on_error,
        }
        for name, thing in sent.items():
            culprit = find_unpicklable(thing, name)
            if culprit is not None:
                hint = (
                    f"{culprit} cannot be pickled, and {method} sends it to every worker "
                    f"({culprit.reason})\n{culprit.advice.rstrip('.')}; "
                    "multiprocessing_context='fork' does without pickling, where forking is safe"
                )
                return failure_of(exc, phase="transport", where="", hint=hint)
        return None

    # epochs ─────────────────────────────────────────────────────────────────────────────────────

    def _open_ledger(self, loader: DataLoader[Any], settings: Settings, epoch: Epoch) -> None:
        """Have the draws reported to ``epoch``, in a ledger of the dataset's kind."""
        self._settings = settings
        with_keys = settings.key is not None
        if self.stream:
            epoch.open(
                StreamLedger(with_keys=with_keys, progress=self._progress, workers=self.workers)
            )
        else:
            # Workers draw ahead, so the sampler's end is known when the last batch comes. Without
            # workers only its length tells: asking the sampler would move its generator.
            drawn_from = _torch.index_sampler(loader)
            length = None if self.workers else functools.partial(proven_length, drawn_from)
            epoch.open(MapLedger(with_keys=with_keys, expected_batches=length))
        self.sampler.log = epoch

    def next_epoch(self, loader: DataLoader[Any], settings: Settings, epoch: Epoch) -> None:
        """The next epoch on the same workers."""
        budget.divide()
        self._open_ledger(loader, settings, epoch)
        _torch.reset_iterator(self.stock, self._view(loader, self.sampler))

    # workers that died ──────────────────────────────────────────────────────────────────────────

    def end(self) -> None:
        """End the workers that are left, whatever they are at."""
        _torch.shut_down(self.stock)
        remove_files_of(worker.pid for worker in _torch.workers_of(self.stock))

    def let_go(self) -> None:
        """Called when nobody waits for a batch any more.

        A worker that hangs would be waited for: torch gives each five seconds to end.
        """
        if self.timed_out and not self._persistent and self.broken is None:
            self.end()

    def replace_workers(self, blueprint: DataLoader[Any]) -> None:
        """Start new workers on the batches still open; ``blueprint`` is a copy of the loader.

        The generators of the main process stay where they are, as if nothing had happened.
        """
        self.end()
        generator = blueprint.generator
        state = None if generator is None else generator.get_state()
        with preserved():
            self.stock = self._start(blueprint, self.sampler.again())
        if generator is not None and state is not None:
            generator.set_state(state)
