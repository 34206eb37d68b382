"""A loader's folder in the folder of a run: the sink of its epochs. Runs in: main.

::

    DIR/run.json, attempt=K/attempt.json        safeloader/provenance/attempts.py
    DIR/attempt=K/rank=R/host-pid-boot-n/       a folder for each process and loader
        loader.json                             which loader, and which process
        tail, batches-NNN.arrows, .parquet      safeloader/provenance/run_format.py
        epochs.jsonl                            a line as an epoch begins, with its sampler; one
                                                where it goes on from a state; one with its audit
                                                and its part for other ranks
        incidents.jsonl                         samples skipped, replaced or late
        marks.jsonl                             which batch an optimizer's step was made of
        sources.jsonl                           where samples come from that somebody may ask for
        sources.parquet                         the same of all samples, with run_sources=True
        failures/                               each failure
        workers.arrows                          memory, CPU time and work of main and workers
        transport.jsonl                         slots, and by which way batches came
        dropped.jsonl                           segments that went for run_max_bytes

Nothing here ends a training: what cannot be written is said once, and then no more is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from safeloader._version import __version__
from safeloader.delivery.audit import CLASSES, EpochAudit
from safeloader.delivery.audit_part import AuditPart, to_text
from safeloader.failures import dump
from safeloader.failures.failure import Failure
from safeloader.failures.loader_log import LoaderLog, guarded
from safeloader.introspect.identity import boot_id, host_name, process_identity
from safeloader.introspect.redaction import scrub_command
from safeloader.introspect.resources import cores
from safeloader.introspect.signals import raised_by_signal
from safeloader.provenance.attempts import Attempt
from safeloader.provenance.batch_log import BatchLog
from safeloader.provenance.events import DUMPS_MAX, Incidents
from safeloader.provenance.open_folder import OpenFolder, not_a_standard_one
from safeloader.provenance.recorder import UNIX_OFFSET_NS, Recorder
from safeloader.provenance.run_format import (
    ALL_SOURCES,
    SEGMENT_BYTES,
    Batches,
    why_no_arrow,
)
from safeloader.provenance.source_log import SomeSources, SourceLog, SourceOf, plain
from safeloader.provenance.transport_log import TransportLog
from safeloader.provenance.worker_log import WorkerLog

LISTED_MAX = 1000  # indices of a class in a line of `epochs.jsonl`
_INCIDENTS_MAX = 100_000  # lines


Audit = Callable[[], EpochAudit]


class About(NamedTuple):
    """What an epoch tells beside its events.

    Attributes:
        sampler: gives what its sampler draws on purpose, and which share.
        part: gives what it tells to other ranks, of its audit; None where that takes too long.
    """

    sampler: Callable[[], dict[str, Any]]
    part: Callable[[EpochAudit], AuditPart | None]


class LoaderFolder:
    """Where the epochs of one loader in this process are written.

    A loader of the same name and line that comes after it, when it is gone, goes on in the same
    folder: the numbers of its epochs go on too.

    Args:
        attempt: of which run.
        rank: of this process.
        line: the line that first iterated the loader.
        log: the loader's.
        segment_bytes: at which a segment of batches is closed.
        bounded: is told that a segment was closed: it may be too much for the process.

    Attributes:
        path: the folder.
        batches: the log of its batches; None where pyarrow is missing.
        epochs: how many were begun.

    Raises:
        OSError: if the folder cannot be written to.
    """

    batches: BatchLog | None = None

    def __init__(
        self,
        attempt: Attempt,
        rank: int,
        line: str,
        log: LoaderLog,
        segment_bytes: int = SEGMENT_BYTES,
        bounded: Callable[[], object] = lambda: None,
    ) -> None:
        self.attempt, self.rank = attempt, rank
        self.log, self._bounded = log, bounded
        self.epochs = 0
        self._base = 0  # of the recorder's numbers of epochs
        self._open: dict[int, tuple[Audit, About | None]] = {}
        self._about: About | None = None  # of the epoch that is about to begin
        self._dumped: dict[int, int] = {}
        self._incidents = 0
        self._all_sources: SourceLog | None = None
        self._marks = -1
        self.is_off = False
        self.loader = f"{log.loader_name} at {line}"
        stem = f"{host_name()}-{os.getpid()}-{boot_id()}"
        self._folder = OpenFolder(attempt.run, [attempt.path.name, f"rank={rank}"], stem)
        self.path = self._folder.path
        self._sources = SomeSources(self._folder)
        missing = why_no_arrow()
        facts = self._facts(line) | {"batches": not missing}
        self._folder.append("loader.json", json.dumps(facts, indent=1).encode())
        if missing:
            log.warning("%s. Epochs and failures are written without them", missing)
        else:
            self.batches = BatchLog(
                self._folder, UNIX_OFFSET_NS, self._flushed, self._broken, segment_bytes
            )
            self._workers = WorkerLog(self._folder)
            self._transport = TransportLog(self._folder)

    def _facts(self, line: str) -> dict[str, Any]:
        return {
            "loader": self.loader,
            "name": self.log.loader_name,
            "line": line,
            "length": self.log.length,
            "rank": self.rank,
            "world_size": self.log.at.world_size,
            "began": time.time(),
            "process": process_identity(),
            "cores": cores(),
            "command": scrub_command(sys.orig_argv),
            "versions": {
                "safeloader": __version__,
                "python": sys.version.split()[0],
                "torch": str(torch.__version__),
                "numpy": np.__version__,
            },
        }

    # a loader takes it, and lets go ─────────────────────────────────────────────────────────────

    def taken_by(
        self,
        recorder: Recorder,
        log: LoaderLog,
        source_of: SourceOf,
        all_sources: bool = False,
        about: About | None = None,
    ) -> list[object]:
        """A loader begins an epoch: its sinks."""
        self._about = about
        if self.epochs and recorder.run is not self:
            self._base = self.epochs - recorder.epochs
        recorder.run = self
        self.log = log
        self._sources.source_of = source_of
        if all_sources and self._all_sources is None and self._is_first_with_sources():
            self._all_sources = SourceLog(self._folder, log.length or 0)
        if self.batches is not None:
            notebook = weakref.ref(recorder)  # its workers come later, and anew each epoch
            self._workers.flight = lambda: (known := notebook()) and known.flight()
            self._transport.goes_on(
                notebook, lambda: None if (known := notebook()) is None else known.transport.stats()
            )
            self.batches.base = self._base
        return [self, self.batches] if self.batches is not None else [self]

    # events ─────────────────────────────────────────────────────────────────────────────────────

    def begun(self, epoch: int, audit: Audit) -> None:
        """An epoch begins."""
        number = epoch + self._base
        self.epochs = max(self.epochs, number + 1)
        about, self._about = self._about, None
        self._open[number] = audit, about
        told = {}
        with guarded("the look at the sampler", lambda: self.log):
            told = {} if about is None else {"sampler": about.sampler()}
        self._epoch_line(number, None, **told)

    def origin(self, epoch: int) -> dict[str, Any]:
        """Which epoch of which run one of the recorder's is, for the states of its loader."""
        folder = self.path.relative_to(self.attempt.run).as_posix()
        return {"run": self.attempt.id, "folder": folder, "epoch": epoch + self._base}

    def resumed(self, epoch: int, batches: int, left_out: int, origin: dict[str, Any]) -> None:
        """An epoch goes on where an earlier run was."""
        told = {"batches": batches, "left_out": left_out, "from": origin}
        self._epoch_line(epoch + self._base, None, resumed=told)

    def audited(self, audit: EpochAudit) -> None:
        """An epoch is closed."""
        self._ends(audit.epoch + self._base, audit)

    def _ends(self, number: int, audit: EpochAudit) -> None:
        _, about = self._open.pop(number, (None, None))
        if self.is_off:
            return
        with self._guarded():
            if self.batches is not None:
                self._transport.look()
                self.batches.epoch_ends(time.perf_counter_ns(), self.epochs == 1)
        if not self._open:
            self._sources.source_of = None
        self._dumped.pop(number, None)
        told = {}
        with guarded("the sums of the epoch", lambda: self.log):
            part = None if about is None else about.part(audit)
            if part is not None:
                told["part"] = to_text(part)
        self._epoch_line(number, audit, **told)

    def failed(self, failure: Failure) -> None:
        """An error is about to be raised."""
        if self.is_off:
            return
        number = (failure.epoch or 0) + self._base
        self._dump(dataclasses.replace(failure, epoch=number), self.log)
        with self._guarded():
            self._sources.note([failure.index])

    def skipped(
        self, epoch: int, batch: int, incidents: Incidents, failures: Sequence[Failure]
    ) -> None:
        """Samples were left out, replaced, or late."""
        if self.is_off:
            return
        number = epoch + self._base
        with self._guarded():
            lines = []
            for index, incident in incidents:
                self._incidents += 1
                if self._incidents > _INCIDENTS_MAX:
                    break
                what = {
                    "epoch": number,
                    "batch": batch,
                    "position": incident.position,
                    "index": plain(index),
                    "what": incident.what,
                    "reason": incident.reason,
                }
                lines.append(json.dumps(what) + "\n")
            if lines:
                self._folder.append("incidents.jsonl", "".join(lines).encode())
            gone = [index for index, incident in incidents if incident.what != "late"]
            self._sources.note(gone)
        for failure in failures:
            self._survived(dataclasses.replace(failure, epoch=number))

    def restarted(self, failure: Failure, said: Sequence[str]) -> None:
        """New workers take over from dead ones."""
        number = (failure.epoch or 0) + self._base
        self._survived(dataclasses.replace(failure, epoch=number))

    def _survived(self, failure: Failure) -> None:
        """A failure that ends no batch: of these a bounded number in an epoch."""
        number = failure.epoch or 0
        self._dumped[number] = self._dumped.get(number, 0) + 1
        if self._dumped[number] <= DUMPS_MAX and not self.is_off:
            self._dump(failure, None)

    def _dump(self, failure: Failure, log: LoaderLog | None) -> None:
        dump.write(failure, self.path / "failures", log or self.log, tell=log is not None)

    def mark(self, step: int, epoch: int, batch: int) -> None:
        """An optimizer's step was made of a batch."""
        if self.is_off:
            return
        line = b'{"step":%d,"epoch":%d,"batch":%d}\n' % (step, epoch + self._base, batch)
        with self._guarded():
            if self._marks < 0:
                fd = self._folder.new("marks.jsonl", os.O_WRONLY | os.O_APPEND)
                self._marks = not_a_standard_one(fd)
            os.write(self._marks, line)

    # sources ────────────────────────────────────────────────────────────────────────────────────

    def _is_first_with_sources(self) -> bool:
        """Whether no attempt before has them: all ranks read the same dataset, and rank 0 tells."""
        if self.rank or self.batches is None:
            return False
        for path in self.attempt.run.glob(f"attempt=*/rank=0/*/{ALL_SOURCES}"):
            with contextlib.suppress(OSError, ValueError):
                known = json.loads((path.parent / "loader.json").read_text("utf-8"))
                if isinstance(known, dict) and known.get("name") == self.log.loader_name:
                    return False
        return True

    def _go_on_with_sources(self) -> None:
        log = self._all_sources
        if log is not None and not log.is_whole and self._sources.source_of is not None:
            log.go_on(self._sources.source_of)

    # writing ────────────────────────────────────────────────────────────────────────────────────

    def _epoch_line(self, number: int, audit: EpochAudit | None, **more: Any) -> None:
        if self.is_off:
            return
        told = None
        if audit is not None:  # a class may list a million; the counts are whole
            first = {name: getattr(audit, name)[:LISTED_MAX] for name, _ in CLASSES}
            told = dataclasses.replace(audit, epoch=number, **first).to_dict()
        loader = self.log.loader_name + self.loader[self.loader.rindex(" at ") :]
        what = {"loader": loader, "epoch": number, "time": time.time(), "audit": told} | more
        with self._guarded():
            self._folder.append("epochs.jsonl", (json.dumps(what) + "\n").encode())

    def _flushed(self, batches: Batches, now_ns: int, epoch_ends: bool) -> None:
        self._sources.note_slowest(batches)
        if self._workers.note(batches, now_ns, at_once=epoch_ends):
            self._transport.note()
        self._go_on_with_sources()
        self._bounded()

    def tell_dropped(self) -> int:
        """Remove the oldest closed segment, and say so; how many bytes it had.

        Raises:
            OSError: if it cannot be removed.
        """
        assert self.batches is not None
        gone = self.batches.drop_oldest()
        what = {
            "segment": gone.number,
            "steps": gone.steps,
            "epochs": gone.epochs,
            "bytes": gone.nbytes,
            "time": time.time(),
        }
        self._folder.append("dropped.jsonl", (json.dumps(what) + "\n").encode())
        return gone.nbytes

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """What is done within needs the disk, or is ours: its faults end the folder alone."""
        try:
            yield
        except OSError as exc:
            if raised_by_signal(exc):
                raise
            self._broken(exc)

    def _broken(self, exc: OSError) -> None:
        if self.is_off:
            return
        if self.batches is not None:
            self.batches.broke(exc)
        self.leave()
        self.log.warning(
            "nothing more is written for this run into %s: %s. Training goes on", self.path, exc
        )

    def leave(self) -> None:
        """Write nothing any more."""
        self.is_off = True
        if self.batches is not None:
            self.batches.leave()

    def leave_to_parent(self) -> None:
        """This is a forked child: the folder is the parent's."""
        if self.batches is not None:
            self.batches.leave_to_parent()
        self.leave()

    def close(self) -> list[int]:
        """The process ends: epochs that run still are booked as they stand.

        Returns:
            The segments of batches that may be turned into Parquet.
        """
        if not self.path.is_dir():  # a temporary folder, that was removed before the end
            self.leave()
        for number, (audit, _) in list(self._open.items()):
            self._ends(number, audit())
        segments: list[int] = []
        if self.batches is not None and not self.is_off:
            with self._guarded():
                segments = self.batches.close(time.perf_counter_ns())
                self._transport.note()
        self.leave()
        if self._marks >= 0:
            os.close(self._marks)
            self._marks = -1
        return segments
