"""A trace for Perfetto and chrome://tracing out of a run. Runs in: main.

A process for each loader of each rank, named by attempt and rank; in it a lane for main (waiting,
training) and one for each worker (fetches, collation); moments where samples were skipped or
failed; counters of waiting and of memory. Times are µs since the trace begins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from safeloader.report.folder import LoaderRecords
from safeloader.report.run import RunFolder

_MESSAGE = 300  # characters


class Choice(NamedTuple):
    """What of a run is wanted; None: all.

    Attributes:
        attempt, rank, epoch: of which alone.
        samples: whether each sample has its slice.
        most: batches at most of each loader, the newest.
    """

    attempt: int | None = None
    rank: int | None = None
    epoch: int | None = None
    samples: bool = True
    most: int | None = None


ALL = Choice()


def trace_events(run: RunFolder, choice: Choice = ALL) -> Iterator[dict[str, Any]]:
    """The events, a dict each, as the Trace Event Format has them.

    Args:
        run: which.
        choice: what of it.
    """
    loaders = [
        each
        for each in run.loaders
        if choice.attempt in (None, each.attempt) and choice.rank in (None, each.rank)
    ]
    chosen = [(each, _rows(each, choice)) for each in loaders]
    starts = [rows["asked_ns"][0].as_py() for _, rows in chosen if rows is not None]
    for loader, rows in chosen:
        if rows is not None:
            yield from _OneLoader(loader, min(starts), choice).events(rows)


def _rows(loader: LoaderRecords, choice: Choice) -> Any:
    """The batches that are wanted, as one table; None where there are none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    where = None if choice.epoch is None else pc.field("epoch") == choice.epoch
    kept: list[Any] = []
    for table in loader.pieces(None, where):
        kept.append(table)
        if choice.most is not None:  # of a long run no more is held
            while sum(map(len, kept[1:])) >= choice.most:
                kept.pop(0)
    if not kept:
        return None
    whole = pa.concat_tables(kept)
    return whole if choice.most is None else whole.slice(max(0, len(whole) - choice.most))


class _OneLoader:
    """The events of one loader."""

    def __init__(self, loader: LoaderRecords, zero_ns: int, choice: Choice) -> None:
        self._loader, self._zero_ns, self._samples = loader, zero_ns, choice.samples
        self._pid = loader.number + 1
        self._lanes: set[int] = set()
        self._moments: dict[tuple[Any, Any], tuple[float, int]] = {}

    def events(self, rows: Any) -> Iterator[dict[str, Any]]:
        loader = self._loader
        name = f"attempt {loader.attempt}, rank {loader.rank}: {loader.name}"
        yield self._event("M", "process_name", 0, args={"name": name})
        yield self._event("M", "process_sort_index", 0, args={"sort_index": self._pid})
        yield from self._lane(0)
        before_us = None
        for table in (rows.slice(at, 1000) for at in range(0, len(rows), 1000)):
            for row in table.to_pylist():
                yield from self._batch(row, before_us)
                before_us = self._us(row["asked_ns"] + row["wait_ns"])
        yield from self._incidents()
        yield from self._memory(rows)

    def _us(self, at_ns: float) -> float:
        return round((at_ns - self._zero_ns) / 1000, 3)

    def _event(self, ph: str, name: str, tid: int, **more: Any) -> dict[str, Any]:
        return {"ph": ph, "pid": self._pid, "tid": tid, "name": name} | more

    def _lane(self, tid: int) -> Iterator[dict[str, Any]]:
        if tid not in self._lanes:
            self._lanes.add(tid)
            name = f"worker {tid - 1}" if tid else "main process"
            yield self._event("M", "thread_name", tid, args={"name": name})
            yield self._event("M", "thread_sort_index", tid, args={"sort_index": tid})

    def _batch(self, row: dict[str, Any], before_us: float | None) -> Iterator[dict[str, Any]]:
        tid = row["worker"] + 1
        yield from self._lane(tid)
        place = {"epoch": row["epoch"], "batch": row["batch"]}
        asked_us, wait_us = self._us(row["asked_ns"]), round(row["wait_ns"] / 1000, 3)
        if before_us is not None and asked_us > before_us:
            step = {"ts": before_us, "dur": round(asked_us - before_us, 3)}
            yield self._event("X", "training step", 0, cat="step", **step)
        name = f"wait for batch {row['batch']}"
        yield self._event("X", name, 0, cat="wait", ts=asked_us, dur=wait_us, args=place)
        yield self._event("C", "waiting (ms)", 0, ts=asked_us, args={"ms": round(wait_us / 1e3, 3)})
        indices = row["indices"] if row["index_text"] is None else row["index_text"]
        at_ns = float(row["start_ns"])
        for position, (index, took) in enumerate(zip(indices, row["fetch_ns"], strict=True)):
            if self._samples:
                args = place | {"position": position, "index": index}
                span = {"ts": self._us(at_ns), "dur": round(took / 1000, 3)}
                yield self._event("X", f"sample {index}", tid, cat="sample", **span, args=args)
            at_ns += took
        collate = {"ts": self._us(at_ns), "dur": round(row["collate_ns"] / 1000, 3)}
        yield self._event("X", "collate", tid, cat="collate", **collate, args=place)
        flow = {"cat": "batch", "id": f"{self._pid}.{row['epoch']}.{row['batch']}"}
        made_us = collate["ts"] + collate["dur"] / 2
        yield self._event("s", f"batch {row['batch']}", tid, ts=round(made_us, 3), **flow)
        got_us = round(asked_us + max(0.0, wait_us - min(wait_us, 1.0) / 2), 3)
        yield self._event("f", f"batch {row['batch']}", 0, ts=got_us, bp="e", **flow)
        self._moments[row["epoch"], row["batch"]] = collate["ts"], tid

    def _incidents(self) -> Iterator[dict[str, Any]]:
        """Where samples were skipped, replaced or late, and failures, at their batches."""
        for line in self._loader.lines("incidents.jsonl"):
            at = self._moments.get((line.get("epoch"), line.get("batch")))
            if at is not None:
                args = {k: line.get(k) for k in ("index", "position", "epoch", "batch")}
                args["reason"] = str(line.get("reason"))[:_MESSAGE]
                name = f"{line.get('what')} {line.get('index')}"
                yield self._event("i", name, at[1], cat="incident", s="t", ts=at[0], args=args)
        newest = max((at for at, _ in self._moments.values()), default=0.0)
        for found in self._loader.failures():
            failure = found["failure"]
            place = failure.get("epoch"), failure.get("batch")
            at_us, tid = self._moments.get(place, (newest, 0))
            args = {k: failure.get(k) for k in ("phase", "index", "epoch", "batch")}
            args["message"] = str(failure.get("message"))[:_MESSAGE]
            name = f"{failure.get('exception_type')} at index {failure.get('index')}"
            yield self._event("i", name, tid, cat="failure", s="p", ts=at_us, args=args)

    def _memory(self, rows: Any) -> Iterator[dict[str, Any]]:
        first, last = rows["asked_ns"][0].as_py(), rows["asked_ns"][-1].as_py()
        for row in self._loader.workers().to_pylist():
            size = max(row["pss_bytes"], row["rss_bytes"] if row["worker"] < 0 else -1)
            if size < 0 or not first <= row["time_ns"] <= last + 60_000_000_000:
                continue
            who = "main" if row["worker"] < 0 else f"worker {row['worker']}"
            at = self._us(row["time_ns"])
            args = {"MB": round(size / 1e6, 2)}
            yield self._event("C", f"memory of {who}", 0, ts=at, args=args)


def written(events: Iterator[dict[str, Any]], file: Any) -> int:
    """Write events as a JSON array, one a line; how many there were.

    Args:
        events: of :func:`trace_events`.
        file: open for text.
    """
    count = 0
    file.write("[")
    for event in events:
        file.write(",\n" if count else "\n")
        file.write(json.dumps(event, separators=(",", ":")))
        count += 1
    file.write("\n]\n")
    return count
