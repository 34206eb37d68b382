"""The injected ``worker_init_fn``. Runs in: worker.

Takes the worker's number, joins this process to the wiring, calls the user's own function and puts
our fetcher in the place of torch's, in this process alone. All of it dies with the worker.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import perf_counter_ns as clock
from typing import Any

from torch.utils.data import get_worker_info

from safeloader import _torch
from safeloader.failures.failure import Failure, failure_of
from safeloader.introspect.dataset_state import describe
from safeloader.supervision.flight_recorder import (
    IDLE,
    INIT,
    OPEN,
    PHASE,
    PID,
    SINCE,
    FlightRecorder,
)
from safeloader.supervision.monitor import WorkerMonitor
from safeloader.transport.channel import ResultQueue
from safeloader.transport.packing import Packer
from safeloader.transport.slot_table import SlotTable
from safeloader.transport.slot_writer import SlotPool
from safeloader.transport.stream_progress import StreamProgress
from safeloader.worker.context import FetchContext, private_row
from safeloader.worker.fetching import fetcher_for
from safeloader.worker.hints import hint_for
from safeloader.worker.policy import Policy
from safeloader.worker.recording import RefusingFetcher


class WorkerStartup:
    """A callable that pickles with the process arguments under every start method."""

    def __init__(
        self,
        user_init_fn: Callable[[int], None] | None,
        *,
        key: Callable[[Any], Any] | None,
        policy: Policy,
        progress: StreamProgress | None,
        results: ResultQueue | None,
        flight: FlightRecorder | None,
        slots: SlotTable | None = None,
        no_slots: str = "",
        checksum: bool = False,
        length: int | None = None,
    ) -> None:
        self._user_init_fn = user_init_fn
        self._key = key
        self._policy = policy
        self._progress = progress
        self._results = results
        self._flight = flight
        self._slots = slots
        self._no_slots = no_slots
        self._checksum = checksum
        self._length = length

    def __call__(self, worker_id: int) -> None:
        """Set this worker up; what the user's function raises is told with the first batch."""
        assert self._results is not None
        cells = private_row() if self._flight is None else self._flight.row(worker_id)
        cells[PID] = os.getpid()
        cells[SINCE] = clock()
        cells[PHASE] = INIT
        monitor = WorkerMonitor(self._flight, worker_id, cells)
        self._results.speak_as(worker_id, monitor.sent)
        refused: Failure | None = None
        info = get_worker_info()
        dataset = None if info is None else info.dataset
        if self._user_init_fn is not None:
            try:
                self._user_init_fn(worker_id)
            except Exception as exc:
                refused = _startup_failure(exc, "init", worker_id, dataset, self._length)
            except BaseException:  # sys.exit(), an interrupt: the process ends
                monitor.ends()
                raise
        # Taken after the user's function: what it opened is the state that the work starts from.
        slots = None if self._slots is None else SlotPool(self._slots, worker_id)
        packer = Packer(slots, self._no_slots)
        packer.install()
        context = FetchContext(
            worker_id,
            progress=self._progress,
            key=self._key,
            start_state=describe(dataset, ask=False, length=self._length),
            policy=self._policy,
            cells=cells,
            checksum=self._checksum,
            packer=packer,
            length=self._length,
        )

        def make(create: Callable[[], Any]) -> Any:
            if refused is not None:
                return RefusingFetcher(refused, context)
            cells[SINCE] = clock()
            cells[PHASE] = OPEN
            try:
                return monitor.over(fetcher_for(create(), context))
            except Exception as exc:  # iter(dataset) raised
                failure = _startup_failure(exc, "sample", worker_id, dataset, self._length)
                return RefusingFetcher(failure, context)
            except BaseException:
                monitor.ends()
                raise
            finally:
                cells[SINCE] = clock()
                cells[PHASE] = IDLE

        _torch.install_fetcher(make)


def _startup_failure(
    exc: Exception, phase: str, worker_id: int, dataset: Any, length: int | None
) -> Failure:
    found = "iter(dataset) raised, before any sample" if phase == "sample" else ""
    return failure_of(
        exc,
        phase=phase,
        where=f"in DataLoader worker process {worker_id}",
        worker_id=worker_id,
        pid=os.getpid(),
        dataset_state=describe(dataset, length=length),
        hint=hint_for(exc, phase, None, found),
    )
