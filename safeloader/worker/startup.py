"""The injected ``worker_init_fn``. Runs in: worker.

Takes the worker's number, connects this process to its channels, calls the user's own function and
puts our fetcher in the place of torch's, in this process alone. All of it dies with the worker.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter_ns
from typing import Any, NamedTuple

from torch.utils.data import get_worker_info

from safeloader import _torch
from safeloader.delivery.manifest import BatchManifest
from safeloader.failures.failure import Failure
from safeloader.introspect.copy_state import CopyState, copy_state
from safeloader.introspect.dataset_state import describe
from safeloader.introspect.file_positions import Position, read_positions
from safeloader.introspect.seeds import BatchSeed
from safeloader.supervision.flight_recorder import IDLE, INIT, OPEN, PID, READY, FlightRecorder
from safeloader.supervision.monitor import WorkerMonitor
from safeloader.transport.channel import ResultQueue, TaskQueue
from safeloader.transport.messages import FailedBatch, Task
from safeloader.transport.packing import Packer
from safeloader.transport.slot_table import MAY_HOLD, Parked, SlotTable
from safeloader.transport.slot_writer import SlotPool
from safeloader.worker.context import FetchContext, private_row
from safeloader.worker.heap import KeptHeap
from safeloader.worker.hints import ITER_RAISED, failure_in
from safeloader.worker.mapping import MapFetcher
from safeloader.worker.observing import Observer, into_flight_recorder
from safeloader.worker.recording import RecordingFetcher, key_of
from safeloader.worker.seeding import SeededFetcher
from safeloader.worker.shared_files import InheritedFiles
from safeloader.worker.streaming import StreamFetcher


def fetcher_for(stock: Any, context: FetchContext) -> RecordingFetcher:
    """Our fetcher around torch's ``stock``; for a loader without workers in the main process."""
    return (StreamFetcher if hasattr(stock, "dataset_iter") else MapFetcher)(stock, context)


class LookedAhead(NamedTuple):
    """What main looked at for its forked workers, just before.

    In each of them it would take longer: what is read there is copied first.
    """

    observer: Observer
    positions: dict[int, Position]


@dataclasses.dataclass(frozen=True)
class WorkerStartup:
    """A callable that pickles with the process arguments under every start method."""

    user_init_fn: Callable[[int], None] | None
    _: dataclasses.KW_ONLY
    context: FetchContext
    results: ResultQueue
    flight: FlightRecorder | None
    slots: SlotTable | None = None
    no_slots: str = ""
    forks: bool = False
    stays: bool = False
    observed: bool = True
    ahead: list[LookedAhead] = dataclasses.field(default_factory=list)  # one, or none
    freezes: bool = True
    keeps_heap: bool = True
    parked: Parked = dataclasses.field(default_factory=dict)
    not_mine: Callable[[], object] | None = None

    def __call__(self, worker_id: int) -> None:
        """Set this worker up; what the user's function raises is told with the first batch."""
        _torch.lists_stacks()
        if self.freezes:
            # Before anything is made here: a collection would walk all that this process inherited,
            # half a second in a large program, and touch each page of it, which copies the page.
            gc.freeze()
        info = get_worker_info()
        dataset = None if info is None else info.dataset
        files = self._inherited_files(dataset)
        cells = private_row() if self.flight is None else self.flight.row(worker_id)
        cells[PID] = os.getpid()
        monitor = WorkerMonitor(self.flight, worker_id, cells)
        monitor.begins(INIT)
        self.results.speak_as(worker_id, monitor.sent)
        context = dataclasses.replace(self.context, worker_id=worker_id, cells=cells)

        def refusing(exc: Exception, phase: str, found: str = "") -> RefusingFetcher:
            return RefusingFetcher(failure_in(context, exc, phase, dataset, found), context)

        came = None if self.user_init_fn is None else self._as_it_came(dataset)
        refused: RefusingFetcher | None = None
        if self.user_init_fn is not None:
            try:
                with monitor:  # sys.exit(), an interrupt: the process ends
                    self.user_init_fn(worker_id)
            except Exception as exc:
                refused = refusing(exc, "init")
        # Taken after the user's function: what it opened is the state that the work starts from.
        slots = None
        if self.slots is not None:
            slots = SlotPool(self.slots, worker_id, self.parked)
            slots.tell_of_forks()
        if self.not_mine is not None:
            self.parked.clear()
            self.not_mine()
        # As its slots hold a few batches, a quarter of them is what samples of one take.
        may_hold = 0 if self.slots is None else self.slots.share(worker_id)[MAY_HOLD]
        heap = KeptHeap(may_hold // 4 if self.keeps_heap else 0)
        packer = Packer(slots, self.no_slots, heap.keep)
        packer.install()
        TaskQueue.waits = staticmethod(heap.give_back)
        start_state = context.start_state
        if start_state is None:
            start_state = describe(dataset, ask=False, length=context.length)
        context = dataclasses.replace(context, packer=packer, start_state=start_state)
        observer = self._observer(worker_id, dataset, files, monitor, came, heap.kept_bytes)
        if observer is not None:
            monitor.notes = observer.sent
            TaskQueue.pauses = staticmethod(observer.paused)

        plan = context.states
        states = None if plan is None else plan.of_worker(worker_id)

        def open_dataset(create: Callable[[], Any]) -> RecordingFetcher:
            if states is not None:
                states.before_iter(dataset)
            stock = create()
            if states is not None:
                states.after_iter(stock, key_of(context.key), context.seeder)
            fetcher = fetcher_for(stock, context)
            if observer is not None:
                observer.over(fetcher)
            if states is not None:
                states.over(fetcher, worker_id)
            return fetcher

        def make(create: Callable[[], Any]) -> Any:
            if refused is not None:
                return refused
            if context.seeder is not None:
                return SeededFetcher(functools.partial(opened, create), context)
            return opened(create)

        def opened(create: Callable[[], Any]) -> Any:
            monitor.begins(OPEN)
            try:
                with monitor:
                    return monitor.over(open_dataset(create))
            except Exception as exc:
                of_state = "" if states is None else states.refusal
                in_worker = ", where get_worker_info() is None"
                return refusing(exc, "sample", of_state or ITER_RAISED + in_worker)
            finally:
                monitor.begins(IDLE)

        _torch.install_fetcher(make)
        cells[READY] = perf_counter_ns()

    def _inherited_files(self, dataset: Any) -> InheritedFiles | None:
        """The files that were open at the fork, before any code of the user's runs here."""
        if self.forks and self.observed and self.flight is not None:
            with suppress(Exception):  # of ours: the worker does without
                if positions := self.ahead[0].positions if self.ahead else read_positions():
                    return InheritedFiles(positions, dataset)
        return None

    def _as_it_came(self, dataset: Any) -> CopyState | None:
        """This worker's copy before the user's function, which may make another of it."""
        with suppress(Exception):  # of ours: the worker does without
            return copy_state(dataset, None if self._is_stream else self.context.length)
        return None

    @property
    def _is_stream(self) -> bool:
        return self.context.progress is not None

    def _observer(
        self,
        worker_id: int,
        dataset: Any,
        files: InheritedFiles | None,
        monitor: WorkerMonitor,
        came: CopyState | None,
        kept: Callable[[], int],
    ) -> Observer | None:
        """What notices what becomes of this worker's copy; None where it cannot be told to main."""
        if self.flight is None or not self.observed:
            return None
        publish = into_flight_recorder(functools.partial(self.flight.write_report, worker_id))
        private = monitor.private_bytes
        if self.ahead:
            return self.ahead[0].observer.goes_on(files, publish, private, kept)
        with suppress(Exception):  # of ours: the worker does without
            return Observer(
                dataset,
                length=self.context.length,
                stream=self._is_stream,
                files=files,
                came=came,
                stays=self.stays,
                private=private,
                kept=kept,
                publish=publish,
            )
        return None


@dataclasses.dataclass
class RefusingFetcher:
    """Answers every task with the failure that kept the worker from starting."""

    failure: Failure
    context: FetchContext
    told: bool = False

    def seeded_by(self, seed: BatchSeed) -> bytes:
        """As :class:`~safeloader.worker.recording.RecordingFetcher` has it."""
        return b""

    def fetch(self, task: Task) -> FailedBatch:
        """The failure; for a stream once, then its end, as there are no batches to lose."""
        worker_id, progress = self.context.worker_id, self.context.progress
        if progress is not None:
            progress.write(worker_id or 0, 0, 0, True)
            if self.told:
                raise StopIteration
        self.told = True
        manifest = BatchManifest(task.seq, worker_id, os.getpid(), b"", None)
        return FailedBatch(manifest, self.failure)
