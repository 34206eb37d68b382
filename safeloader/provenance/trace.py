"""Verbose tracing: log lines, or a Chrome trace-event file. Runs in: main.

Both are sinks of :mod:`~safeloader.provenance.events` and write at once, so a long run fills no
memory. Workers write nothing: their times come with the manifest of each batch.

The file follows the Trace Event Format, which Perfetto opens as it is (chrome://tracing once it is
unpacked): a JSON array of events, ``ts`` and ``dur`` in whole us. Lane (``tid``) 0 is the main
process: its waits, and between them what the training loop did. Lane ``w + 1`` is worker ``w``; an
arrow (flow) leads from a batch's collation to its delivery. Two counters: waiting, as a share of
each step, and the memory of the workers.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safeloader.delivery.audit import EpochAudit
from safeloader.delivery.indices import Packed, unpack
from safeloader.delivery.manifest import BatchContents, BatchManifest
from safeloader.failures.failure import Failure
from safeloader.failures.loader_log import LoaderLog
from safeloader.introspect.files import create
from safeloader.introspect.ranks import Place
from safeloader.introspect.redaction import scrub
from safeloader.introspect.texts import INDEX_MAX, index_text, indices_text
from safeloader.provenance.columns import fetched_together, places_of, times_of
from safeloader.provenance.event_file import SUFFIX, EventFile
from safeloader.provenance.events import Incidents
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
        together = len(record.indices) > 1 and fetched_together(manifest, len(record.indices))
        share = f", an equal share of {len(record.indices)} timed together" if together else ""
        fetches = zip(record.indices, record.fetch_ns, strict=True)
        for position, (index, took_ns) in enumerate(fetches):
            at = f"for batch {batch}, position {position}, in {took_ns / 1e6:.3f} ms{share}"
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


class FileTrace:
    """One Chrome trace file for this loader in this process.

    A fault while writing (a full disk) is logged once and ends the trace, not the training.

    Args:
        folder: where it is made.
        at: where this process stands among the ranks.
        memory: tells what the workers hold in bytes; None where that is not known.
    """

    def __init__(
        self,
        folder: Path,
        at: Place | None = None,
        memory: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._pid = os.getpid()
        rank = f"{at}, " if at is not None and str(at) else ""
        name = f"{rank}safeloader, training process {self._pid}"
        first = self._event(ph="M", name="process_name", tid=0, args={"name": name})
        self._file = EventFile(first, *create(folder, "safeloader", SUFFIX))
        self.path = self._file.path
        self._memory = memory
        self._memory_due_ns = 0
        self._before: tuple[int, int, int] | None = None  # epoch, batch and its hand-over in us
        self._lanes: set[int] = set()
        if at is not None and at.rank is not None:
            order = {"sort_index": at.rank}
            self._file.write(self._event(ph="M", name="process_sort_index", tid=0, args=order))
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
        now_us = (time.perf_counter_ns() + UNIX_OFFSET_NS) // 1000
        event = self._event(ph="i", s=s, name=name, cat=cat, tid=tid, ts=now_us, args=args)
        self._file.write(event)

    def drawn(self, epoch: int, seq: int, indices: Packed) -> None:
        """What the sampler drew."""
        self._instant("draw", "draw", 0, "t", {"epoch": epoch, "indices": _drawn(indices)})

    def delivered(
        self, epoch: int, batch: int, wait_ns: int, manifest: BatchManifest, began_ns: int
    ) -> None:
        """Hot path when tracing: events are formatted by hand, which takes 0.7 us a sample where
        json.dumps takes 4, and compressed, which takes as much (column "safe+trace" of
        benchmarks/)."""
        tid = self._lane(manifest.worker_id)
        begins, lasts, collate_us, end_us = _times_us(manifest)
        began_us = (began_ns + UNIX_OFFSET_NS) // 1000
        here_us = (began_ns + wait_ns + UNIX_OFFSET_NS) // 1000
        pid, wait_us, name = self._pid, here_us - began_us, f"batch {batch}"
        in_batch = f'"args":{{"epoch":{epoch},"batch":{batch},'
        head = f'{{"ph":"X","cat":"sample","pid":{pid},"tid":{tid},"ts":'
        flow = f'"cat":"batch","name":"{name}","id":"{epoch}.{batch}","pid":{pid},"tid":'
        events = [
            f'{head}{begin},"dur":{last},"name":"sample {shown}",{in_batch}"position":{position},'
            f'"index":{index}}}}}'
            for position, (shown, index, begin, last) in enumerate(
                zip(*_names(manifest), begins, lasts, strict=True)
            )
        ]
        events += (
            f'{{"ph":"X","cat":"collate","pid":{pid},"tid":{tid},"ts":{collate_us},'
            f'"dur":{end_us - collate_us},"name":"collate",{in_batch}"pid":{manifest.pid}}}}}',
            f'{{"ph":"X","cat":"wait","pid":{pid},"tid":0,"ts":{began_us},"dur":{wait_us},'
            f'"name":"wait for {name}",{in_batch}"pid":{manifest.pid},"samples":{len(begins)}}}}}',
            # A flow's ends are tied to the slices around their times: each lies inside its slice.
            f'{{"ph":"s",{flow}{tid},"ts":{(collate_us + end_us) // 2}}}',
            f'{{"ph":"f","bp":"e",{flow}0,"ts":{max(began_us, here_us - 1)}}}',
        )
        waiting, since_us = 100.0, began_us
        before, self._before = self._before, (epoch, batch, here_us)
        if before is not None and before[0] == epoch:  # between two epochs is no step
            since_us = before[2]
            waiting = 100 * wait_us / max(1, here_us - since_us)
            events.append(
                f'{{"ph":"X","cat":"train","pid":{pid},"tid":0,"ts":{since_us},'
                f'"dur":{began_us - since_us},"name":"training step","args":{{"epoch":{epoch},'
                f'"after_batch":{before[1]}}}}}'
            )
        events.append(self._counter(_WAITING, since_us, f"{waiting:.1f}"))
        if began_ns > self._memory_due_ns:
            self._memory_due_ns = began_ns + _MEMORY_EACH_NS
            memory = self._memory()
            if memory is not None:
                events.append(self._counter(_MEMORY, here_us, f"{memory / (1 << 20):.1f}"))
        self._file.write(*events)

    def _counter(self, name: str, at_us: int, value: str) -> str:
        said = f'"ts":{at_us},"name":"{name}","args":{{"value":{value}}}}}'
        return f'{{"ph":"C","pid":{self._pid},"tid":0,{said}'

    def skipped(
        self, epoch: int, batch: int, incidents: Incidents, failures: Sequence[Failure]
    ) -> None:
        """A mark for each sample left out, replaced or late."""
        for index, incident in incidents:
            args: dict[str, Any] = {"epoch": epoch, "batch": batch, "position": incident.position}
            args |= {"index": _plain(index), "reason": incident.reason[:_SAID_CHARS]}
            if incident.donor is not None:
                args["donor_position"] = incident.donor
            self._instant("incident", f"{incident.what} {_shown(index)}", 0, "p", args)

    def restarted(self, failure: Failure, said: Sequence[str]) -> None:
        """New workers take over from those that died."""
        told = {"epoch": failure.epoch, "said": "\n".join(said)[:_SAID_CHARS]}
        self._instant("failure", "workers restarted", 0, "p", told)
        self._file.flush()

    def failed(self, failure: Failure) -> None:
        """An error, in the lane of its worker."""
        tid = self._lane(failure.worker_id)
        name = f"{failure.exception_type} at {index_text(failure.index)}"
        args: dict[str, Any] = {"phase": failure.phase, "message": failure.message[:_SAID_CHARS]}
        args |= {"epoch": failure.epoch, "batch": failure.batch, "position": failure.position}
        self._instant("failure", name, tid, "g", args | {"index": _plain(failure.index)})
        self._file.flush()  # the program may end of it

    def audited(self, audit: EpochAudit) -> None:
        """The epoch's audit, as text."""
        self._instant("audit", f"audit of epoch {audit.epoch}", 0, "p", {"audit": str(audit)})
        self._file.flush()


_WAITING = "waiting for data, % of the step"
_MEMORY = "memory of the workers, MiB"
_MEMORY_EACH_NS = 1_000_000_000
_SAID_CHARS = 1000


def _times_us(manifest: BatchManifest) -> tuple[list[int], list[int], int, int]:
    """When each fetch began and how long it took, when collation began and ended; in us.

    Whole ones: viewers read times as floats, in which a quarter of one is what is left of the time
    since 1970, and drop slices that overlap by less.
    """
    edges = (np.frombuffer(manifest.stamps, dtype=np.int64) + UNIX_OFFSET_NS) // 1000
    collate_us, end_us = edges[-2:].tolist()
    if manifest.incidents is None and not fetched_together(manifest, edges.size - 2):
        edges = edges[:-1]
    else:
        places = places_of(manifest)
        begins, lasts, _ = times_of(manifest, places)
        if fetched_together(manifest, len(places)):
            begins = begins + np.arange(len(places)) * lasts
        first = begins // 1000
        return first.tolist(), ((begins + lasts) // 1000 - first).tolist(), collate_us, end_us
    return edges[:-1].tolist(), np.diff(edges).tolist(), collate_us, end_us


def _names(manifest: BatchManifest) -> tuple[Sequence[Any], Sequence[Any]]:
    """How each sample is called in a name, and its index as JSON."""
    if type(manifest.indices) is bytes and manifest.incidents is None and manifest.ordinal is None:
        ints = unpack(manifest.indices)
        return ints, ints
    indices = BatchContents.of(manifest).indices
    return [*map(_name_in_json, indices)], [json.dumps(_plain(index)) for index in indices]


def _plain(index: Any) -> Any:
    """An index as JSON has it: an int, a stream's pair, or text."""
    if type(index) is tuple and all(type(part) is int for part in index):
        return list(index)
    return index if index is None or type(index) is int else _shown(index)


def _shown(index: Any) -> str:
    return scrub(index[:INDEX_MAX]) if type(index) is str else index_text(index)


def _name_in_json(index: Any) -> str:
    return json.dumps(_shown(index))[1:-1]


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


def _memory_of(book: weakref.ref[Recorder]) -> Callable[[], int | None]:
    """What its workers hold. The recorder has the trace, so that is not to hold the recorder."""

    def told() -> int | None:
        recorder = book()
        return None if recorder is None else recorder.worker_memory()

    return told


def trace_for(recorder: Recorder, target: bool | Path, log: LoaderLog) -> Trace | None:
    """The trace of a loader for the epoch that begins; None if none is wanted, or can be made."""
    if isinstance(target, bool):
        return LogTrace(log) if target else None
    known = _traces.get(recorder)
    if known is not None and known[:2] == (os.getpid(), target):
        return known[2]
    made: Trace | None = None
    try:
        made = FileTrace(target, log.at, _memory_of(weakref.ref(recorder)))
    except Exception as exc:  # a full disk, or a fault of ours: training needs no trace
        log.warning("no trace is written: %s", str(exc))
    _traces[recorder] = (os.getpid(), target, made)
    return made
