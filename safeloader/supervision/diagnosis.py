"""Workers that died or hang: what happened, where, what to do. Runs in: main.

Reads what workers left in the flight recorder and what the machine says, and puts it in words. It
is called when something has gone wrong already: it may take its time, and must not fail.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from time import perf_counter_ns as clock
from typing import Any, NamedTuple

from safeloader.delivery.ledger import PendingBatch
from safeloader.failures.failure import Failure
from safeloader.failures.loader_log import LoaderLog, text_of
from safeloader.introspect.resources import human_bytes, machine_lines, oom_kills, or_none
from safeloader.introspect.texts import index_text, indices_text
from safeloader.supervision import stacks
from safeloader.supervision.causes import Forked, Pace, WorkerEnd, ended, of_death, of_silence
from safeloader.supervision.flight_recorder import FlightRecorder, FlightRow
from safeloader.supervision.processes import Signals

_WORKERS_SHOWN = 32


class WorkerLocation(NamedTuple):
    """Where a worker is, in the dataset's terms."""

    worker: int
    position: FlightRow
    batch: int | None = None
    indices: tuple[Any, ...] = ()
    index: Any = None

    @property
    def busy(self) -> bool:
        """Whether it is known to be at work, or was when it died."""
        return self.position.phase not in ("idle", "unknown")

    @property
    def place(self) -> dict[str, Any]:
        """The fields of a :class:`Failure` that say where it happened."""
        return {
            "index": self.index,
            "position": None if self.index is None else self.position.position,
            "indices": self.indices,
            "batch": self.batch,
            "worker_id": self.worker,
            "_seq": self.position.seq,
        }

    def __str__(self) -> str:
        place = "" if self.batch is None else f" of batch {self.batch}"
        batch = "a batch" if self.batch is None else f"batch {self.batch}"
        item = f"position {self.position.position}{place}"
        if self.index is not None:
            item = f"index {index_text(self.index)} ({item})"
        of_batch = f" (indices {indices_text(self.indices)})" if self.indices else ""
        words = {
            "starting": "starting, before its set-up was done",
            "init": "in worker_init_fn",
            "open": "opening the dataset",
            "fetch": f"fetching {item}",
            "fetch at once": f"in __getitems__{place}{of_batch}",
            "collate": f"collating {batch}{of_batch}",
            "send": f"sending {batch}{of_batch}",
        }
        return words.get(self.position.phase, self.position.phase)


def _pace(where: WorkerLocation) -> Pace | None:
    """That of the batch a worker is at; None where no sample of it came, or that is not known."""
    row = where.position
    if not row.position or not row.began_ns or not where.indices:
        return None
    took, since = row.since_ns - row.began_ns, clock() - row.since_ns
    return Pace(row.position, len(where.indices), took / 1e9, since / 1e9) if took > 0 else None


class Diagnosis:
    """Of one pool of workers.

    Args:
        flight: None where there is no shared memory to be had.
        workers: their processes.
        start_method: how they were started.
        opened: gives what is known of a draw, by its number.
        forked: what this process had when they were forked from it; None if they were not.
    """

    def __init__(
        self,
        flight: FlightRecorder | None,
        workers: Sequence[Any],
        start_method: str,
        opened: Callable[[int], PendingBatch | None],
        forked: Forked | None = None,
    ) -> None:
        self._flight = flight
        self._workers = workers
        self._signals = [Signals(worker) for worker in workers]
        self._start_method = start_method
        self._opened = opened
        self._forked = forked
        self._oom_kills = oom_kills()

    def location(self, worker: int) -> WorkerLocation:
        """Where ``worker`` is, or was when it died; unknown without a flight recorder."""
        position = FlightRow() if self._flight is None else self._flight.read(worker)
        opened = None if position.seq is None else self._opened(position.seq)
        if opened is None:
            return WorkerLocation(worker, position)
        at, indices, index = position.position, opened.indices, None
        if at is not None and not indices:  # a stream
            index = (worker, position.ordinal + at)
        elif at is not None and at < len(indices):
            index = indices[at]
        return WorkerLocation(worker, position, opened.batch, indices, index)

    def crash(self, dead: Sequence[int]) -> Failure:
        """The failure that the death of these workers is."""
        first = min(dead, key=self._order)
        where, process = self.location(first), self._workers[first]
        stack = stacks.left_behind(self._flight, first) if self._flight else stacks.Stack((), "")
        row = where.position
        killed = (oom_kills() or 0) - (self._oom_kills or 0)
        of_stream = where.index is not None and not where.indices
        end = WorkerEnd(
            process.exitcode, row.phase, where.index, stack, killed, row.grown_bytes, of_stream
        )
        found = [f"worker {first} was {where}"] if row.pid else []
        for other in sorted(set(dead) - {first})[:_WORKERS_SHOWN]:
            died, also = self._workers[other], self.location(other)
            too = f"too while {also}" if also.position.pid else "too"
            found.append(f"worker {other} (pid {died.pid}) {ended(died.exitcode)} {too}")
        found += [*_memory_lines(row), *machine_lines(), of_death(end)]
        return Failure(
            phase="crash",
            exception_type="WorkerCrashError",
            message=_torch_words(process),
            traceback=stack.text,
            hint="\n".join(found),
            pid=process.pid,
            **where.place,
        )

    def _order(self, worker: int) -> tuple[bool, bool, int]:
        """Whose death to tell first: one at work before an idle one, signals before exits."""
        code = self._workers[worker].exitcode
        return (not self.location(worker).busy, code is None or code >= 0, worker)

    def silence(self, waited_s: float, *, timeout: bool) -> Failure:
        """The failure, or warning, that no batch came for ``waited_s`` seconds."""
        at = [self.location(worker) for worker in range(len(self._workers))]
        busy = [where for where in at if where.busy]
        busy.sort(key=lambda where: where.position.since_ns or clock())  # the longest first
        shown = busy[:_WORKERS_SHOWN]
        asked = [where.worker for where in shown]
        told = stacks.asked(self._flight, self._signals, asked) if self._flight else {}
        found = [self._silent_line(where) for where in shown]
        if len(busy) > _WORKERS_SHOWN:
            found.append(f"and {len(busy) - _WORKERS_SHOWN} more workers at work")
        if idle := sum(where.position.phase == "idle" for where in at):
            found.append(f"{idle} more idle" if busy else f"all {idle} workers are idle")
        blocks = [
            f"worker {worker}, most recent call last:\n{its_stack.text}"
            for worker, its_stack in told.items()
        ]
        first = busy[0] if busy else WorkerLocation(0, FlightRow())
        stack, status = told.get(first.worker), self._status(first.worker)
        phase = first.position.phase
        method, forked = self._start_method, self._forked
        cause = of_silence(
            stack,
            status,
            phase,
            first.index,
            method,
            timeout=timeout,
            forked=forked,
            pace=_pace(first),
        )
        message = f"DataLoader timed out after {waited_s:g} seconds"
        if not timeout:
            message = f"no batch came for {waited_s:.0f} seconds; the loader goes on waiting"
        return Failure(
            phase="timeout",
            exception_type="WorkerTimeoutError",
            message=message,
            traceback="\n".join(blocks),
            hint="\n".join([*found, cause]),
            pid=self._workers[first.worker].pid,
            **(first.place if busy else {}),
        )

    def _silent_line(self, where: WorkerLocation) -> str:
        since_ns = where.position.since_ns
        since = f" for {max(0, clock() - since_ns) / 1e9:.1f} s" if since_ns else ""
        pid = self._workers[where.worker].pid
        status = self._status(where.worker)
        state = f", process state: {status}" if status in _TELLING else ""
        return f"worker {where.worker} (pid {pid}) is {where}{since}{state}"

    @or_none  # it has gone, or /proc is not to be read
    def _status(self, worker: int) -> str | None:
        import psutil  # heavy, and needed here alone

        return str(psutil.Process(self._workers[worker].pid).status())


class Stalls:
    """Logs that no batch comes: first all that is known, then a line while nothing changes."""

    def __init__(self, diagnosis: Diagnosis, log: LoaderLog) -> None:
        self._diagnosis = diagnosis
        self._log = log
        self._told: tuple[Any, ...] = ()
        self._waited_s = 0.0

    def __call__(self, waited_s: float) -> None:
        """No batch came for ``waited_s`` seconds."""
        try:
            failure = self._diagnosis.silence(waited_s, timeout=False)
        except Exception as exc:  # a fault of ours, beside a loader that may yet go on
            self._log.error(
                "no batch came for %.0f s, and looking into it failed\n%s", waited_s, text_of(exc)
            )
            return
        at = (failure.worker_id, failure.batch, failure.index, failure.traceback)
        nothing_new = at == self._told and waited_s > self._waited_s
        self._told, self._waited_s = at, waited_s
        if nothing_new:
            where = failure.hint.partition("\n")[0]
            self._log.warning("still no batch after %.0f seconds: %s, as before", waited_s, where)
        else:
            self._log.warning("%s", failure)


_TELLING = ("stopped", "disk-sleep", "tracing-stop")


def _torch_words(process: Any) -> str:
    """How torch's own loader tells a worker's end."""
    code, pid = process.exitcode, process.pid
    if code is not None and code < 0:
        words = signal.strsignal(-code) or f"signal {-code}"
        return f"DataLoader worker (pid {pid}) is killed by signal: {words}."
    status = "an unknown exit status" if code is None else f"exit code {code}"
    return f"DataLoader worker (pid(s) {pid}) exited unexpectedly with {status}."


def _memory_lines(row: FlightRow) -> list[str]:
    """The worker's memory as last sampled, and how it grew."""
    if row.memory_last[0] <= 0:
        return []
    names = ("resident", "proportional (PSS)", "unique (USS)")
    last = zip(names, row.memory_last, strict=True)
    parts = [f"{human_bytes(value)} {name}" for name, value in last if value >= 0]
    how = f"grew by {human_bytes(row.grown_bytes)}" if row.grown_bytes else "did not grow"
    return [f"its memory as last sampled: {', '.join(parts)}; {how} since its first batch"]
