"""Verbose tracing: log lines, or a Chrome trace-event file. Runs in: main.

Both are sinks of :mod:`~safeloader.provenance.events` and write at once, so a long run fills no
memory. Workers write nothing: their times come with the manifest of each batch.

The file follows the Trace Event Format that Perfetto and chrome://tracing open: a JSON array of
events, ``ts`` and ``dur`` in µs. Lane (``tid``) 0 is the main process with its waits, lane
``w + 1`` is worker ``w``; an arrow (flow) leads from a batch's collation to its delivery.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from safeloader.delivery.audit import EpochAudit
from safeloader.delivery.indices import Packed, unpack
from safeloader.delivery.manifest import BatchManifest
from safeloader.failures.failure import Failure
from safeloader.failures.loader_log import LoaderLog
from safeloader.introspect.files import create
from safeloader.introspect.ranks import Place
from safeloader.introspect.redaction import scrub
from safeloader.introspect.texts import INDEX_MAX, index_text, indices_text
from safeloader.provenance.recorder import UNIX_OFFSET_NS, Delivery, Recorder
from safeloader.provenance.table import record_of

logger = logging.getLogger("safeloader")


class LogTrace:
    """A line per event through ``logging.getLogger("safeloader")``, at level INFO."""

    def __init__(self, log: LoaderLog) -> None:
        # A user who sets an environment variable wants to see lines, configured logging or not.
        if not logger.isEnabledFor(logging.INFO):
            logger.setLevel(logging.INFO)
        if not logger.hasHandlers():
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
            logger.addHandler(handler)
        self._log = log

    def drawn(self, epoch: int, seq: int, indices: Packed) -> None:
        """What the sampler drew."""
        if indices:  # of a stream nothing is drawn: it is asked for its next samples
            self._log.info("epoch %d: drew batch %d: %s", epoch, seq, _drawn(indices))

    def delivered(
        self, epoch: int, batch: int, wait_ns: int, manifest: BatchManifest, began_ns: int
    ) -> None:
        """A line for each sample and one for the batch."""
        record = record_of(Delivery(epoch, batch, wait_ns, began_ns, manifest))
        who = "main process" if record.worker_id is None else f"worker {record.worker_id}"
        said = f"epoch {epoch}: {who} (pid {record.pid}) fetched index"
        fetches = zip(record.indices, record.fetch_ns, strict=True)
        for position, (index, took_ns) in enumerate(fetches):
            at = f"for batch {batch}, position {position}, in {took_ns / 1e6:.3f} ms"
            self._log.info("%s %s %s", said, index_text(index), at)
        self._log.info(
            "%s",
            f"epoch {epoch}: handed over batch {batch} from {who}: {len(record.indices)} samples, "
            f"collated in {record.collate_ns / 1e6:.3f} ms, the loop waited {wait_ns / 1e6:.3f} ms",
        )

    def failed(self, failure: Failure) -> None:
        """What failed, and at which index."""
        where = f"at index {index_text(failure.index)}, batch {failure.batch} ({failure.phase})"
        self._log.info("epoch %s: %s %s", failure.epoch, failure.exception_type, where)

    def audited(self, audit: EpochAudit) -> None:
        """The epoch's audit."""
        self._log.info("%s", audit)


class _EventFile:
    """A JSON array that grows; written in large pieces, by the process that opened it alone.

    The pieces are held here and not in a buffer of Python's, which a forked child would write a
    second time on its way out.
    """

    def __init__(self, first: str, fd: int, path: Path) -> None:
        self.path = path
        self._pid = os.getpid()
        self._file = io.FileIO(fd, "w")  # closed once it could not be written
        self._held = io.StringIO()
        self._held.write(f"[\n{first}")
        self._flush_at_s = time.monotonic() + _FLUSH_S

    def write(self, *events: str) -> None:
        for event in events:
            self._held.write(f",\n{event}")
        if self._held.tell() > _PIECE_CHARS or time.monotonic() > self._flush_at_s:
            self.flush()

    def flush(self, end: str = "") -> None:
        piece = memoryview((self._held.getvalue() + end).encode())
        self._held = io.StringIO()
        self._flush_at_s = time.monotonic() + _FLUSH_S
        if self._file.closed or os.getpid() != self._pid:
            return
        try:
            while piece:
                piece = piece[self._file.write(piece) :]
        except OSError as exc:
            logger.warning(
                "the trace %s could not be written (%s) and ends here; training goes on",
                self.path,
                exc,
            )
            self._file.close()

    def finish(self) -> None:
        """Close the array. (Viewers take a file without the bracket too, after a crash.)"""
        self.flush(end="\n]\n")
        self._file.close()


_PIECE_CHARS = 1 << 16
_FLUSH_S = 1.0  # what a killed program leaves is at most this much behind


class FileTrace:
    """One Chrome trace file for this loader in this process.

    A fault while writing (a full disk) is logged once and ends the trace, not the training.
    """

    def __init__(self, folder: Path, at: Place | None = None) -> None:
        self._pid = os.getpid()
        rank = f", {at}" if at is not None and str(at) else ""
        name = f"safeloader, training process {self._pid}{rank}"
        first = self._event(ph="M", name="process_name", tid=0, args={"name": name})
        self._file = _EventFile(first, *create(folder, "safeloader", ".json"))
        self.path = self._file.path
        self._lanes: set[int] = set()
        self._lane(None)
        self._finish = weakref.finalize(self, self._file.finish)

    def _event(self, **fields: Any) -> str:
        return json.dumps({"pid": self._pid, **fields}, separators=(",", ":"))

    def _lane(self, worker_id: int | None) -> int:
        """The lane of a worker or of main, which gets its name when it is first used."""
        tid = 0 if worker_id is None else worker_id + 1
        if tid not in self._lanes:
            self._lanes.add(tid)
            name = f"worker {worker_id}" if tid else "main process"
            self._file.write(
                self._event(ph="M", name="thread_name", tid=tid, args={"name": name}),
                self._event(ph="M", name="thread_sort_index", tid=tid, args={"sort_index": tid}),
            )
        return tid

    def _instant(self, cat: str, name: str, tid: int, s: str, args: dict[str, Any]) -> None:
        """A moment, marked in its lane (``s="t"``), process (``"p"``) or everywhere (``"g"``)."""
        now_us = (time.perf_counter_ns() + UNIX_OFFSET_NS) / 1000
        event = self._event(ph="i", s=s, name=name, cat=cat, tid=tid, ts=now_us, args=args)
        self._file.write(event)
        if s != "t":  # what is rare is on disk at once
            self._file.flush()

    def drawn(self, epoch: int, seq: int, indices: Packed) -> None:
        """What the sampler drew."""
        self._instant("draw", "draw", 0, "t", {"epoch": epoch, "indices": _drawn(indices)})

    def delivered(
        self, epoch: int, batch: int, wait_ns: int, manifest: BatchManifest, began_ns: int
    ) -> None:
        """Hot path when tracing: the events of a batch's samples are formatted by hand, which
        takes 0.7 µs each where json.dumps takes 4 (column "safe+trace" of benchmarks/)."""
        record = record_of(Delivery(epoch, batch, wait_ns, began_ns, manifest))
        tid = self._lane(manifest.worker_id)
        in_stream = manifest.ordinal is not None  # each index is a pair of ints
        head = f'{{"ph":"X","cat":"sample","pid":{self._pid},"tid":{tid},"ts":'
        events = []
        begin_ns = record.start_ns
        for index, fetch_ns in zip(record.indices, record.fetch_ns, strict=True):
            shown = str(index) if in_stream or type(index) is int else _name_in_json(index)
            events.append(
                f'{head}{begin_ns / 1000:.3f},"dur":{fetch_ns / 1000:.3f},"name":"sample {shown}"}}'
            )
            begin_ns += fetch_ns
        stamps = np.frombuffer(manifest.stamps, dtype=np.int64)
        collate_us, end_us = ((stamps[-2:] + UNIX_OFFSET_NS) / 1000).tolist()
        began_us = (began_ns + UNIX_OFFSET_NS) / 1000
        wait_us = wait_ns / 1000
        name = f"batch {batch}"
        args = {"epoch": epoch, "batch": batch, "pid": manifest.pid}
        counted = args | {"samples": len(record.indices)}
        flow = {"cat": "batch", "name": name, "id": f"{epoch}.{batch}"}
        collated = {"cat": "collate", "name": "collate", "ts": collate_us, "args": args}
        waited = {"cat": "wait", "name": f"wait for {name}", "ts": began_us}
        # A flow's ends are tied to the slices around their times: each lies inside its slice.
        at_us = began_us + wait_us - min(wait_us, 1.0) / 2
        self._file.write(
            *events,
            self._event(ph="X", tid=tid, dur=end_us - collate_us, **collated),
            self._event(ph="s", tid=tid, ts=(collate_us + end_us) / 2, **flow),
            self._event(ph="X", tid=0, dur=wait_us, args=counted, **waited),
            self._event(ph="f", bp="e", tid=0, ts=at_us, **flow),
        )

    def failed(self, failure: Failure) -> None:
        """An error, in the lane of its worker."""
        tid = self._lane(failure.worker_id)
        name = f"{failure.exception_type} at {index_text(failure.index)}"
        args = {"phase": failure.phase, "message": failure.message[:1000]}
        self._instant("failure", name, tid, "g", args)

    def audited(self, audit: EpochAudit) -> None:
        """The epoch's audit, as text."""
        self._instant("audit", f"audit of epoch {audit.epoch}", 0, "p", {"audit": str(audit)})


def _name_in_json(index: Any) -> str:
    return json.dumps(scrub(index[:INDEX_MAX]) if type(index) is str else index_text(index))[1:-1]


def _drawn(indices: Packed) -> str:
    listed = list(unpack(indices))
    return str(listed) if type(indices) is bytes else indices_text(listed, most=_DRAWN_SHOWN)


_DRAWN_SHOWN = 1000  # indices that are not numbers


# ── which trace ──────────────────────────────────────────────────────────────────────────────────

Trace = LogTrace | FileTrace

# A rebuilt loader shares the recorder of the one it was built from, and so its trace file.
_traces: weakref.WeakKeyDictionary[Recorder, tuple[int, Path, Trace | None]] = (
    weakref.WeakKeyDictionary()
)


def trace_for(recorder: Recorder, target: bool | Path, log: LoaderLog) -> Trace | None:
    """The trace of a loader for the epoch that begins; None if none is wanted, or can be made."""
    if isinstance(target, bool):
        return LogTrace(log) if target else None
    known = _traces.get(recorder)
    if known is not None and known[:2] == (os.getpid(), target):
        return known[2]
    made: Trace | None = None
    try:
        made = FileTrace(target, log.at)
    except Exception as exc:  # a full disk, or a fault of ours: training needs no trace
        log.warning("no trace is written: %s", str(exc))
    _traces[recorder] = (os.getpid(), target, made)
    return made
