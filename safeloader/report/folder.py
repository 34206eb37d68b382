"""One loader of a run: what it wrote into its folder. Runs in: main.

Everything is read at the moment it is asked for, and may be written to meanwhile. The tail is read
before the segments, so that what the writer moves in between is seen twice and not never; a row's
``step`` tells which it is.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from safeloader.introspect.identity import has_ended
from safeloader.provenance import run_format
from safeloader.provenance.index_texts import fits
from safeloader.provenance.run_format import (
    ALL_SOURCES,
    SOME_SOURCES,
    SOURCES_STREAM,
    Batches,
    damage,
    one_line,
    read_stream,
    read_tail,
    record_batch,
    segment_name,
    segments_in,
    source_schema,
)
from safeloader.report.stored import DUMP, LOADER, Lines, object_in, parsed

Ints = npt.NDArray[np.int64]

_ALIVE_S = 60.0  # a process on another machine that wrote within this time


class EpochTotals(NamedTuple):
    """What an epoch handed over.

    Attributes:
        epoch: its number.
        batches, samples: how many.
        wait_ns: how long the loop waited for them.
        began_ns: when the first was asked for, in ns since 1970.
        ended_ns: when the last was handed over.
    """

    epoch: int
    batches: int
    samples: int
    wait_ns: int
    began_ns: int
    ended_ns: int

    def and_then(self, more: EpochTotals) -> EpochTotals:
        """With a later part of the same epoch."""
        return EpochTotals(
            self.epoch,
            self.batches + more.batches,
            self.samples + more.samples,
            self.wait_ns + more.wait_ns,
            min(self.began_ns, more.began_ns),
            max(self.ended_ns, more.ended_ns),
        )


def _totals(epochs: Ints, asked_ns: Ints, wait_ns: Ints, sizes: Ints) -> Iterator[EpochTotals]:
    for epoch in np.unique(epochs).tolist():
        its = epochs == epoch
        ended_ns = asked_ns[its] + wait_ns[its]
        yield EpochTotals(
            epoch,
            int(its.sum()),
            int(sizes[its].sum()),
            int(wait_ns[its].sum()),
            int(asked_ns[its].min()),
            int(ended_ns.max()),
        )


class LoaderRecords:
    """What one loader of one process wrote.

    Attributes:
        path: its folder.
        attempt: number of the attempt.
        rank: of the process.
        number: of this one among the loaders of the run.
        info: what ``loader.json`` says: ``loader`` (name and line), ``began``, ``process``, ...
        notes: what is torn, dropped or lost, in a sentence each, as far as it was met so far.
        damaged: why batches that were written cannot be read, as far as that was met; else empty.
    """

    def __init__(self, path: Path, attempt: int, rank: int, number: int) -> None:
        self.path, self.attempt, self.rank, self.number = path, attempt, rank, number
        self.damaged = ""
        self.notes: list[str] = []
        self.info: dict[str, Any] = {}
        try:
            self.info = object_in(path / "loader.json", LOADER)
        except (OSError, ValueError) as exc:
            self._note(f"{path / 'loader.json'} cannot be read: {one_line(exc)}")

    def __repr__(self) -> str:
        return f"LoaderRecords({self.name!r}, attempt {self.attempt}, rank {self.rank})"

    @property
    def name(self) -> str:
        """The loader's name and the line that first iterated it."""
        return str(self.info.get("loader", self.path.name))

    @property
    def state(self) -> str:
        """What became of it.

        ``"ended"``: it closed its books; ``"running"``; ``"killed"``, or it ended in another way
        without closing them; ``"cut off"``: it could not be written further, and training went on
        (:attr:`notes` say why); ``"silent"``: its process is on another machine, and nothing was
        written for a minute.
        """
        errno = self._cut_off_by()
        if errno is None and self.info.get("batches", True) and self._has_begun:
            return "ended"
        if errno:
            why = os.strerror(errno) if 0 < errno < 1 << 16 else "an error without a number"
            self._note(f"{self.path} could not be written further: {why}")
            return "cut off"
        ended = has_ended(self.info.get("process") or {})
        if ended is not None and errno is None:  # no batches are written, or none yet
            return "ended" if ended else "running"
        if ended is not None:
            return "killed" if ended else "running"
        return "running" if time.time() - self.last_sign < _ALIVE_S else "silent"

    @property
    def _has_begun(self) -> bool:
        """Whether an epoch was begun: what has no tail before that is only being made."""
        return (self.path / "epochs.jsonl").exists()

    def _cut_off_by(self) -> int | None:
        """The error that ended the writing, 0 for none; None where there is no tail any more."""
        try:
            with (self.path / "tail").open("rb") as file:
                file.seek(run_format.ERRNO_AT)
                cell = file.read(8)
        except FileNotFoundError:
            return None
        except OSError:  # it is there, and may be written to
            return 0
        return int(run_format.CELL.unpack(cell)[0]) if len(cell) == 8 else 0

    @property
    def last_sign(self) -> float:
        """When something was last written here, in seconds since 1970."""
        newest = 0.0
        with contextlib.suppress(OSError), os.scandir(self.path) as entries:
            newest = self.path.stat().st_mtime
            for each in entries:
                with contextlib.suppress(OSError):
                    newest = max(newest, each.stat().st_mtime)
        return newest

    def _note(self, said: str) -> None:
        if said and said not in self.notes:
            self.notes.append(said)

    def _lost(self, said: str) -> None:
        self._note(said)
        self.damaged = self.damaged or said

    # rows ───────────────────────────────────────────────────────────────────────────────────────

    def pieces(
        self, columns: Sequence[str] | None = None, where: Any = None, *, newest: bool = False
    ) -> Iterator[Any]:
        """The batches, as ``pyarrow.Table`` of several thousand rows each, in their order.

        Args:
            columns: which, of :func:`~safeloader.provenance.run_format.schema`; by default all.
            where: an expression (``pyarrow.compute.field("step") == 5``) that the rows have to
                meet; what is in Parquet is then not read where its statistics tell.
            newest: only what the last segment and the tail hold.
        """
        import pyarrow as pa

        tail = self._tail()
        next_step = 0
        names = segments_in(os.listdir(self.path)) if self.path.is_dir() else {}
        for number in list(names)[-1:] if newest else names:
            for table, steps in self._segment(number, columns, where):
                if not newest:
                    self._expect(next_step, steps[0])
                next_step = max(next_step, steps[1])
                if table.num_rows:
                    yield table
        rest = tail.since(next_step)
        if len(rest.sizes):
            if not newest or next_step:
                self._expect(next_step, int(rest.fixed[0, 0]))
            table = pa.Table.from_batches([record_batch(rest)])
            table = table if where is None else table.filter(where)
            if table.num_rows:
                yield table if columns is None else table.select(list(columns))

    def _expect(self, step: int, found: int) -> None:
        """Each batch is there, from the first on, but for what went for ``run_max_bytes``."""
        if found > step and not (self.path / "dropped.jsonl").exists():
            self._lost(f"{self.path}: of its batches, {step} to {found - 1} are gone")

    def _tail(self) -> Batches:
        tail = read_tail(self.path / "tail")
        if tail is None:
            return run_format.EMPTY
        self._note(tail.torn)
        return tail.batches

    def _segment(
        self, number: int, columns: Sequence[str] | None, where: Any
    ) -> Iterator[tuple[Any, tuple[int, int]]]:
        """The rows of a segment that are asked for; of it all, the first step and that behind."""
        parquet, arrows = (self.path / segment_name(number, end) for end in ("parquet", "arrows"))
        if not parquet.exists():
            try:
                yield from self._of_stream(arrows, columns, where)
                return
            except FileNotFoundError:  # somebody turned it into the other just now, or it went
                pass
            except OSError as exc:
                self._lost(f"{arrows} cannot be read: {exc.strerror or exc}")
                return
        try:
            yield from self._of_parquet(parquet, columns, where)
        except FileNotFoundError:
            self._note(f"{arrows} was dropped, for run_max_bytes=")
        except damage() as exc:
            self._lost(f"{parquet} is damaged, and left out: {one_line(exc)}")

    def _of_stream(
        self, path: Path, columns: Sequence[str] | None, where: Any
    ) -> Iterator[tuple[Any, tuple[int, int]]]:
        import pyarrow as pa

        stream = read_stream(path)
        self._note(stream.torn)
        if stream.batches:
            steps = [int(stream.batches[k]["step"][k].as_py()) for k in (0, -1)]
            table = pa.Table.from_batches(stream.batches)
            table = table if where is None else table.filter(where)
            table = table if columns is None else table.select(list(columns))
            yield table, (steps[0], steps[1] + 1)

    def _of_parquet(
        self, path: Path, columns: Sequence[str] | None, where: Any
    ) -> Iterator[tuple[Any, tuple[int, int]]]:
        import pyarrow.parquet as pq

        how: Any = {"page_checksum_verification": True}
        with pq.ParquetFile(path, **how) as file:
            if not file.schema_arrow.equals(run_format.schema()):
                raise ValueError("it has other columns")
            steps = _steps_of(file)
            wanted = None if columns is None else list(columns)
            if where is not None:
                yield _sound(pq.read_table(path, columns=wanted, filters=where, **how)), steps
                return
            for group in range(file.num_row_groups):
                yield _sound(file.read_row_group(group, columns=wanted)), steps

    def recent(self, rows: int = 1000, columns: Sequence[str] | None = None) -> Any:
        """The newest batches, oldest first: a ``pyarrow.Table`` of at most so many rows."""
        import pyarrow as pa

        tables = list(self.pieces(columns, newest=True))
        if not tables:
            return run_format.schema().empty_table().select(columns or run_format.schema().names)
        return pa.concat_tables(tables)[-rows:]

    def totals(self) -> dict[int, EpochTotals]:
        """What was handed over in each epoch, by its number; of one that was cut off too."""
        found: dict[int, EpochTotals] = {}
        for table in self.pieces(["epoch", "asked_ns", "wait_ns", "indices"]):
            for batch in table.to_batches():
                offsets = batch.column("indices").offsets.to_numpy()
                epochs, asked, waited = (batch.column(k).to_numpy() for k in range(3))
                for totals in _totals(epochs, asked, waited, np.diff(offsets)):
                    known = found.get(totals.epoch)
                    found[totals.epoch] = totals if known is None else known.and_then(totals)
        return found

    def positions(self, index: int | str) -> Iterator[tuple[Any, Ints, Ints]]:
        """Where an index is: tables with all columns, and in each the rows and positions."""
        import pyarrow as pa
        import pyarrow.compute as pc

        name = "index_text" if isinstance(index, str) else "indices"
        if not isinstance(index, str) and not fits(index):
            return
        steps: list[int] = []
        for table in self.pieces(["step", name]):
            for batch in table.to_batches():
                rows, _ = _found_in(batch.column(name), index)
                steps += batch.column("step").take(pa.array(rows)).to_pylist()
        if not steps:
            return
        for table in self.pieces(None, pc.field("step").isin(steps)):
            for batch in table.to_batches():
                rows, positions = _found_in(batch.column(name), index)
                if name == "indices":  # where the indices of a row are texts, its ints say nothing
                    its = batch.column("index_text").is_null().to_numpy(zero_copy_only=False)[rows]
                    rows, positions = rows[its], positions[its]
                if rows.size:
                    yield pa.Table.from_batches([batch]), rows, positions

    def indices(self, epoch: int) -> Ints:
        """The indices that an epoch handed over, in their order; of a stream the ordinals."""
        import pyarrow.compute as pc

        found = [
            chunk.flatten().to_numpy()
            for table in self.pieces(["indices", "epoch"], pc.field("epoch") == epoch)
            for chunk in table["indices"].chunks
        ]
        return np.concatenate([np.empty(0, np.int64), *found])

    # lines ──────────────────────────────────────────────────────────────────────────────────────

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The objects of ``epochs.jsonl``, ``incidents.jsonl``, ``dropped.jsonl``, ..."""
        its = Lines(self.path / name)
        found = list(its)
        self._note(its.left_out)
        return found

    def failures(self) -> list[dict[str, Any]]:
        """What is in ``failures/``, oldest first: ``failure``, ``report``, ``time``, ``path``."""
        found = []
        for path in sorted((self.path / "failures").glob("*.json")):
            try:
                content = object_in(path, DUMP)
                content["failure"] = {"index": None} | content["failure"]
                found.append(content | {"path": str(path)})
            except (OSError, ValueError) as exc:
                self._note(f"{path} cannot be read: {one_line(exc)}")
            except KeyError:
                self._note(f"{path} holds no failure")
        return found

    def workers(self) -> Any:
        """The rows of ``workers.arrows``, a ``pyarrow.Table``."""
        import pyarrow as pa

        from safeloader.provenance.worker_log import NAME, worker_schema

        try:
            stream = read_stream(self.path / NAME, worker_schema())
        except FileNotFoundError:
            return worker_schema().empty_table()
        except OSError as exc:
            self._note(f"{self.path / NAME} cannot be read: {exc.strerror or exc}")
            return worker_schema().empty_table()
        self._note(stream.torn)
        return pa.Table.from_batches(stream.batches, worker_schema())

    def sources(self) -> Iterator[tuple[Any, str]]:
        """Indices, and where their samples come from; of all with ``run_sources=True``."""
        pieces = self._all_sources().to_batches()
        if not pieces:
            with contextlib.suppress(OSError):
                pieces = read_stream(self.path / SOURCES_STREAM, source_schema()).batches
        for piece in pieces:
            both = zip(piece["index"].to_pylist(), piece["source"].to_pylist(), strict=True)
            yield from ((index, source) for index, source in both if source)
        for found in self.lines(SOME_SOURCES):
            if "index" in found and "source" in found:
                yield found["index"], str(found["source"])

    def _all_sources(self, where: Any = None) -> Any:
        """Those of all samples, or of those that meet an expression, where all are there."""
        import pyarrow.parquet as pq

        path, how = self.path / ALL_SOURCES, {"filters": where, "page_checksum_verification": True}
        try:
            table = pq.read_table(path, **how)
            if not table.schema.equals(source_schema()):
                raise ValueError("it has other columns")
            return _sound(table)
        except FileNotFoundError:
            pass
        except damage() as exc:
            self._note(f"{path} is damaged, and left out: {one_line(exc)}")
        return source_schema().empty_table()

    def sources_of(self, wanted: set[Any]) -> dict[Any, str]:
        """The same of some indices alone, without reading all of them into Python."""
        import pyarrow as pa
        import pyarrow.compute as pc

        found: dict[Any, str] = {}
        if (self.path / ALL_SOURCES).exists():  # of a thousand ranks one has it, as a rule
            ints = [each for each in wanted if fits(each)]
            table = self._all_sources(
                pc.field("index").isin(pa.array(ints, pa.int64()))
            ).to_pydict()
            found |= dict(zip(table["index"], table["source"], strict=True))
            lines = self.lines(SOME_SOURCES)
            its = [(line.get("index"), str(line.get("source", ""))) for line in lines]
        else:
            its = list(self.sources())
        found |= {index: source for index, source in its if index in wanted}
        return {index: source for index, source in found.items() if source}

    @property
    def has_marks(self) -> bool:
        """Whether the program said which batches its steps are made of."""
        return (self.path / "marks.jsonl").exists()

    def marked(self, step: int) -> list[tuple[int, int]]:
        """Epoch and batch of each batch that a step was made of."""
        found = []
        whole = self._whole_marks()
        at = whole.find(b'{"step":%d,' % step)
        while at >= 0:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                mark = parsed(whole[at : whole.find(b"\n", at) + 1])
                found.append((int(mark["epoch"]), int(mark["batch"])))
            at = whole.find(b'{"step":%d,' % step, at + 1)
        return found

    def marks(self) -> Any:
        """All marks: a ``pyarrow.Table`` of ``step``, ``epoch``, ``batch``."""
        import pyarrow as pa
        import pyarrow.json

        schema = pa.schema([(name, pa.int64()) for name in ("step", "epoch", "batch")])
        whole = self._whole_marks()
        whole = whole[: whole.rfind(b"\n") + 1]
        if not whole:
            return schema.empty_table()
        options = pa.json.ParseOptions(explicit_schema=schema)
        try:
            found = pa.json.read_json(pa.BufferReader(whole), parse_options=options)
            if found.schema.equals(schema) and not any(each.null_count for each in found.columns):
                return found
        except pa.ArrowException:
            pass
        whole_ones = [mark for mark in self.lines("marks.jsonl") if {*schema.names} <= {*mark}]
        return pa.Table.from_pylist(whole_ones, schema)

    def _whole_marks(self) -> bytes:
        try:
            return (self.path / "marks.jsonl").read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as exc:
            self._note(f"{self.path / 'marks.jsonl'} cannot be read: {exc.strerror or exc}")
            return b""

    # upkeep ─────────────────────────────────────────────────────────────────────────────────────

    def convert(self) -> int:
        """Turn closed segments into Parquet, which is smaller and faster; how many were.

        The newest is left alone while its process may write to it. What cannot be written is left
        as it is.
        """
        names = segments_in(os.listdir(self.path))
        closed = list(names)[: None if self.state in ("ended", "killed") else -1]
        done = 0
        for number in closed:
            if names[number] == {"arrows"}:
                with contextlib.suppress(OSError):
                    done += run_format.to_parquet(self.path, number) is not None
        return done


def _found_in(lists: Any, wanted: int | str) -> tuple[Ints, Ints]:
    """The rows of a list column that hold a value, and the positions in them."""
    values = lists.flatten().to_numpy(zero_copy_only=False)
    at = np.flatnonzero(values == wanted)
    if not at.size:
        return at, at
    offsets = lists.offsets.to_numpy() - lists.offsets[0].as_py()
    rows = np.searchsorted(offsets, at, side="right") - 1
    return rows, at - offsets[rows]


def _steps_of(file: Any) -> tuple[int, int]:
    """The first step of a Parquet file, and that behind the last one."""
    groups, at = file.metadata.num_row_groups, file.schema_arrow.get_field_index("step")
    if not file.metadata.num_rows:
        return 0, 0
    first, last = (file.metadata.row_group(k).column(at).statistics for k in (0, groups - 1))
    return int(first.min), int(last.max) + 1


def _sound(table: Any) -> Any:
    """A table of a Parquet file, whose texts are texts: the rest is sound as it is decoded."""
    for name in ("index_text", "source"):
        if name in table.column_names:
            table[name].validate(full=True)
    return table
