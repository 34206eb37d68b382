"""The workers of one pool, as far as their reports go. Runs in: main."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from time import monotonic, sleep
from typing import Any

from safeloader import _torch
from safeloader.introspect.advice import OPEN_THERE, suited
from safeloader.introspect.copy_state import CopyState
from safeloader.introspect.file_positions import read_positions
from safeloader.introspect.heaviest import heaviest
from safeloader.main.waited_positions import WaitedPositions
from safeloader.supervision.flight_recorder import FlightRecorder
from safeloader.supervision.growth import slow_start
from safeloader.supervision.self_report import SelfReport
from safeloader.supervision.wrong_data import Finding
from safeloader.transport.channel import PAUSE

ANSWER_S = 0.2  # workers that have nothing to do answer within a millisecond


class ReportingWorkers:
    """A handle that holds neither the pool nor what it reads.

    Attributes:
        number: how many.
        stay: whether they stay for the next epoch.
        forked: whether they began as copies of main.
        began: main's copy of the dataset as they were about to begin.
        since: how many epochs the loader had begun before them.
    """

    def __init__(
        self,
        flight: FlightRecorder,
        stock: Any,
        *,
        stay: bool,
        start_method: str,
        sets_up: bool,
        began: float,
        started: float,
        began_with: CopyState,
        since: int,
    ) -> None:
        self.began, self.since = began_with, since
        # Weakly: what it looks at goes with the workers.
        self._flight: Callable[[], FlightRecorder | None] = weakref.ref(flight)
        self._stock: weakref.ref[Any] = weakref.ref(stock)
        self.number = len(_torch.workers_of(stock))
        self.stay = stay
        self.forked = start_method == "fork"
        self._start_method, self._sets_up = start_method, sets_up
        self._began, self._started = began, started
        self._start_told = False
        several = self.forked and self.number > 1
        self.waited = WaitedPositions(read_positions() if several else {})

    def ask(self) -> None:
        """Have the workers report, and wait for those that do so at once."""
        stock, flight = self._stock(), self._flight()
        if stock is None or flight is None:
            return
        ended, queues = _torch.expects_end_of(self._stock), _torch.task_queues(stock)
        asked = {w: flight.reported(w) for w in range(self.number) if not ended(w)}
        for worker in asked:
            queues[worker].put(PAUSE)
        give_up = monotonic() + ANSWER_S
        while asked and monotonic() < give_up:
            now = {worker: flight.reported(worker) for worker in asked}
            asked = {w: was for w, was in asked.items() if now[w] == was or now[w] % 2}
            sleep(0.0002)

    def reports(self) -> dict[int, SelfReport]:
        """The newest report of each worker that has made one."""
        flight = self._flight()
        if flight is None:
            return {}
        raw = {worker: flight.report(worker) for worker in range(self.number)}
        told = {worker: pickle.loads(each) for worker, each in raw.items() if each}
        return {worker: self._of_workers(each) for worker, each in told.items()}

    def _of_workers(self, report: SelfReport) -> SelfReport:
        """The report without files that main may have read itself."""
        if not report.files:
            return report
        paths = self.waited.paths
        return report._replace(files=tuple(each for each in report.files if each.path in paths))

    def moved_positions(
        self, said: list[str], reports: Mapping[int, SelfReport], stream: bool
    ) -> list[str]:
        """Read positions that a worker moves since the workers were forked, unless told already."""
        now, then = read_positions(), self.waited.inherited
        cure = suited(OPEN_THERE, stream=stream, shared=self.number > 1)
        by_workers = {each.path for report in reports.values() for each in report.files}
        return [
            f"the read position of {before.path} moved from {before.offset} to {now[fd].offset} "
            f"since the workers were forked: the {self.number} workers share it, and what one "
            f"reads, the others skip. {cure[0].upper()}{cure[1:]}"
            for fd, before in then.items()
            if fd in now
            and before.path in by_workers
            and now[fd].path == before.path
            and now[fd].offset != before.offset
            and not any(before.path in each for each in said)
        ]

    def slow_start(self, dataset: Any) -> Iterator[Finding]:
        """What took long as the workers began, once they have."""
        flight = self._flight()
        if flight is None or self._start_told:
            return
        ready = [flight.ready_ns(worker) / 1e9 for worker in range(self.number)]
        if not all(ready):
            return
        self._start_told = True
        seconds = max(ready) - self._began
        heavy = list if self.forked else partial(heaviest, dataset)
        took = self._started - self._began
        yield from slow_start(seconds, took, self._start_method, self._sets_up, heavy)
