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
from safeloader.introspect.resources import human_bytes, machine_lines, oom_kills
from safeloader.introspect.texts import index_text, indices_text
from safeloader.supervision import causes, stacks
from safeloader.supervision.causes import WorkerEnd, of_death, of_silence
from safeloader.supervision.flight_recorder import FlightRecorder, FlightRow
from safeloader.supervision.processes import Signals

_WORKERS_SHOWN = 32


class WorkerLocation(NamedTuple):
    """Where a worker is, in the dataset's terms."""

    worker: int
    position: FlightRow
    batch: int | None
    indices: tuple[Any, ...]
    index: Any

    @property
    def busy(self) -> bool:
        """Whether it is at work, or was when it died."""
        return self.position.phase != "idle"

    @property
    def seconds(self) -> float | None:
        """Since when it is there; None if unknown."""
        since = self.position.since_ns
        return max(0.0, (clock() - since) / 1e9) if since else None

    def __str__(self) -> str:
        place = "" if self.batch is None else f" of batch {self.batch}"
        batch = "a batch" if self.batch is None else f"batch {self.batch}"
        at = self.position.position
        of_batch = f" (indices {indices_text(self.indices)})" if self.indices else ""
        words = {
            "starting": "starting, before its set-up was done",
            "init": "in worker_init_fn",
            "open": "opening the dataset",
            "idle": "idle",
            "fetch": f"fetching index {index_text(self.index)} (position {at}{place})",
            "fetch at once": f"in __getitems__{place}{of_batch}",
            "collate": f"collating {batch}{of_batch}",
            "send": f"sending {batch}{of_batch}",
        }
        if self.position.phase == "fetch" and self.index is None:
            return f"fetching position {at}{place}"
        return words[self.position.phase]


class Diagnosis:
    """Of one pool of workers.

    Args:
        flight: None where there is no shared memory to be had.
        workers: their processes.
        start_method: how they were started.
        opened: gives what is known of a draw, by its number.
    """

    def __init__(
        self,
        flight: FlightRecorder | None,
        workers: Sequence[Any],
        start_method: str,
        opened: Callable[[int], PendingBatch | None],
    ) -> None:
        self._flight = flight
        self._workers = workers
        self._signals = [Signals(worker) for worker in workers]
        self._start_method = start_method
        self._opened = opened
        self._oom_kills = oom_kills()

    def location(self, worker: int) -> WorkerLocation | None:
        """Where ``worker`` is, or was when it died; None without a flight recorder."""
        if self._flight is None:
            return None
        position = self._flight.read(worker)
        opened = None if position.seq is None else self._opened(position.seq)
        batch = None if opened is None else opened.batch
        indices = () if opened is None else opened.indices
        index = None
        at = position.position
        if opened is not None and not indices and at is not None:  # a stream
            index = (worker, position.ordinal + at)
        elif at is not None and at < len(indices):
            index = indices[at]
        return WorkerLocation(worker, position, batch, indices, index)

    def crash(self, dead: Sequence[int]) -> Failure:
        """The failure that the death of these workers is."""
        first = min(dead, key=self._order)
        where = self.location(first)
        process = self._workers[first]
        stack = stacks.left_behind(self._flight, first) if self._flight else stacks.Stack((), "")
        end = WorkerEnd(
            exit_code=process.exitcode,
            phase="starting" if where is None else where.position.phase,
            index=None if where is None else where.index,
            stack=stack,
            oom_killed=(oom_kills() or 0) - (self._oom_kills or 0),
            grown_bytes=_grown(where),
        )
        found = []
        if where is not None and where.position.pid:
            found.append(f"worker {first} was {where}")
        for other in sorted(set(dead) - {first})[:_WORKERS_SHOWN]:
            also = self.location(other)
            at = "" if also is None else f" while {also}"
            died = self._workers[other]
            how = causes.ended(died.exitcode)
            found.append(f"worker {other} (pid {died.pid}) {how} too{at}")
        return Failure(
            phase="crash",
            exception_type="WorkerCrashError",
            message=_torch_words(process),
            traceback=stack.text,
            hint="\n".join([*found, *_memory_lines(where), *machine_lines(), of_death(end)]),
            pid=process.pid,
            **{"worker_id": first, **_place_of(where)},
        )

    def _order(self, worker: int) -> tuple[bool, bool, int]:
        """Whose death to tell first: one at work before an idle one, signals before exits."""
        where = self.location(worker)
        code = self._workers[worker].exitcode
        return (where is None or not where.busy, code is None or code >= 0, worker)

    def silence(self, waited_s: float, *, timeout: bool) -> Failure:
        """The failure, or warning, that no batch came for ``waited_s`` seconds."""
        at = [self.location(worker) for worker in range(len(self._workers))]
        known = [where for where in at if where is not None]
        busy = [where for where in known if where.busy]
        busy.sort(key=lambda where: -(where.seconds or 0.0))
        asked = [where.worker for where in busy]
        told = stacks.asked(self._flight, self._signals, asked) if self._flight else {}
        found = [self._silent_line(where) for where in busy[:_WORKERS_SHOWN]]
        if len(busy) > _WORKERS_SHOWN:
            found.append(f"and {len(busy) - _WORKERS_SHOWN} more workers at work")
        if idle := len(known) - len(busy):
            found.append(f"{idle} more idle" if busy else f"all {idle} workers are idle")
        blocks = [
            f"worker {where.worker}, most recent call last:\n{told[where.worker].text}"
            for where in busy[:_WORKERS_SHOWN]
            if where.worker in told
        ]
        first: WorkerLocation | None = None
        stuck: tuple[stacks.Stack | None, str | None, str | None, Any] = (None, None, None, None)
        if busy:
            first = busy[0]
            of_first = told.get(first.worker), self._status(first.worker)
            stuck = (*of_first, first.position.phase, first.index)
        message = f"DataLoader timed out after {waited_s:g} seconds"
        if not timeout:
            message = f"no batch came for {waited_s:.0f} seconds; the loader goes on waiting"
        return Failure(
            phase="timeout",
            exception_type="WorkerTimeoutError",
            message=message,
            traceback="\n".join(blocks),
            hint="\n".join([*found, of_silence(*stuck, self._start_method, timeout=timeout)]),
            pid=self._workers[first.worker if first else 0].pid,
            **_place_of(first),
        )

    def _silent_line(self, where: WorkerLocation) -> str:
        seconds = where.seconds
        since = "" if seconds is None else f" for {seconds:.1f} s"
        pid = self._workers[where.worker].pid
        status = self._status(where.worker)
        state = f", process state: {status}" if status in _TELLING else ""
        return f"worker {where.worker} (pid {pid}) is {where}{since}{state}"

    def _status(self, worker: int) -> str | None:
        try:
            import psutil  # heavy, and needed here alone

            return str(psutil.Process(self._workers[worker].pid).status())
        except Exception:  # it has gone, or /proc is not to be read
            return None


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


def _place_of(where: WorkerLocation | None) -> dict[str, Any]:
    """The fields of a :class:`Failure` that say where it happened."""
    if where is None:
        return {}
    return {
        "index": where.index,
        "position": None if where.index is None else where.position.position,
        "indices": where.indices,
        "batch": where.batch,
        "worker_id": where.worker,
    }


def _torch_words(process: Any) -> str:
    """How torch's own loader tells a worker's end."""
    code, pid = process.exitcode, process.pid
    if code is not None and code < 0:
        words = signal.strsignal(-code) or f"signal {-code}"
        return f"DataLoader worker (pid {pid}) is killed by signal: {words}."
    status = "an unknown exit status" if code is None else f"exit code {code}"
    return f"DataLoader worker (pid(s) {pid}) exited unexpectedly with {status}."


def _grown(where: WorkerLocation | None) -> int:
    if where is None:
        return 0
    before, after = where.position.memory_first, where.position.memory_last
    return max(0, after[0] - before[0]) if min(before[0], after[0]) > 0 else 0


def _memory_lines(where: WorkerLocation | None) -> list[str]:
    """The worker's memory as last sampled, and how it grew."""
    if where is None or where.position.memory_last[0] <= 0:
        return []
    names = ("resident", "proportional (PSS)", "unique (USS)")
    last = zip(names, where.position.memory_last, strict=True)
    parts = [f"{human_bytes(value)} {name}" for name, value in last if value >= 0]
    grown = _grown(where)
    how = f"grew by {human_bytes(grown)}" if grown > 0 else "did not grow"
    return [f"its memory as last sampled: {', '.join(parts)}; {how} since its first batch"]
