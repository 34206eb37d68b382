"""How the batches of a run lie on disk: the tail, segments, and what is in a row. Runs in: main.

::

    hot path ──► tail (a small shared mapping, a record a batch, as it came from the worker)
                   │  when it is full, and every few seconds
                   ▼
                 batches-NNN.arrows (an Arrow stream, a row a batch)
                   │  when it has grown, off the training loop
                   ▼
                 batches-NNN.parquet (zstd)

A record is in the tail before its batch is handed over, and stays there until the stream has it: so
``kill -9`` at any moment loses no batch that the training loop had. ``step`` counts a folder's
batches, and tells those that are in both. What reads it needs no torch, and what only parses the
tail no pyarrow.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from safeloader.introspect.private_files import written_whole

Ints = npt.NDArray[np.int64]

INSTALL = "pip install 'safeloader[run]'"
MAGIC = 0x31676F6C66617301  # of this machine's byte order; its last byte is the layout's number
TAIL_BYTES = 1 << 19
SEGMENT_BYTES = 64 << 20
SOME_SOURCES, SOURCES_STREAM, ALL_SOURCES = "sources.jsonl", "sources.arrows", "sources.parquet"

# The head of the tail, cells of int64.
MAGIC_AT, OFFSET_AT, BASE_AT, USED_AT, ERRNO_AT = (8 * k for k in range(5))
FIRST = 64  # where records begin

HEAD = struct.Struct("11q")
"""A record's bytes, step, epoch, batch, worker, pid, asked, waited, samples, kind, ordinal."""
CELL = struct.Struct("q")
_HEAD_CELLS = 11
_BYTES, _STEP, _EPOCH, _BATCH, _WORKER, _PID, _ASKED, _WAITED, _SAMPLES, _KIND, _ORDINAL = range(11)

# What stands behind the head: indices and stamps as they came from the worker; the stamps alone,
# of a stream; start, time of collation, indices and times of the fetches (of a batch with samples
# left out); the same with the indices as JSON, the number of its bytes before it.
RAW, STREAM, DECODED, TEXT = range(4)
_SAMPLES_MAX = 1 << 24  # of a batch with one stamp for all
_CHANGES_MAX = 16  # of the shape of records that follow each other
_LEAST = {RAW: 2, STREAM: 2, DECODED: 2, TEXT: 3}


class Batches(NamedTuple):
    """Decoded batches, a column each; those of ``indices`` and ``fetch_ns`` are flat.

    Attributes:
        fixed: a row a batch: step, epoch, batch, worker (-1: main), pid, when it was asked for (ns
            since 1970), how long the loop waited (ns), when the first fetch began (ns since 1970),
            how long collation took (ns).
        sizes: samples of each batch.
        indices: of the samples; in a stream the ordinals within the worker's stream.
        fetch_ns: how long each took to fetch.
        texts: for each batch its indices as text, where they are no ints; None where none are.
    """

    fixed: Ints
    sizes: Ints
    indices: Ints
    fetch_ns: npt.NDArray[np.float32]
    texts: list[list[str] | None] | None

    @property
    def end_step(self) -> int:
        """The step behind the last one."""
        return int(self.fixed[-1, 0]) + 1 if len(self.fixed) else 0

    def since(self, step: int) -> Batches:
        """Those from ``step`` on."""
        first = int(np.searchsorted(self.fixed[:, 0], step))
        samples = int(self.sizes[:first].sum())
        texts = None if self.texts is None else self.texts[first:]
        return Batches(
            self.fixed[first:],
            self.sizes[first:],
            self.indices[samples:],
            self.fetch_ns[samples:],
            texts,
        )


FIXED = ("step", "epoch", "batch", "worker", "pid", "asked_ns", "wait_ns", "start_ns", "collate_ns")


# ── the tail ─────────────────────────────────────────────────────────────────────────────────────


class Tail(NamedTuple):
    """What stood in the tail at one moment.

    Attributes:
        batches: decoded.
        torn: what is wrong with it, in a sentence; empty if nothing is.
        errno: why nothing more could be written; 0 where that did not happen.
    """

    batches: Batches
    torn: str = ""
    errno: int = 0


def read_tail(path: Path) -> Tail | None:
    """What stands in a tail, which may be written to meanwhile; None if there is none.

    To be read before the segments: what the stream takes over in between is then in both.
    """
    for _ in range(20):
        try:
            with path.open("rb") as file:
                raw = file.read()
                file.seek(BASE_AT)
                base_after = file.read(8)
        except FileNotFoundError:
            return None
        if len(raw) < FIRST or CELL.unpack_from(raw, MAGIC_AT)[0] != MAGIC:
            return Tail(EMPTY, f"{path} holds no rows: it was not written whole, or elsewhere")
        if raw[BASE_AT : BASE_AT + 8] == base_after:
            break
    return parse_tail(raw, str(path))


def parse_tail(raw: bytes, name: str = "tail") -> Tail:
    """Decode the records of a tail, as far as they are whole."""
    _, offset_ns, step, used, errno = struct.unpack_from("5q", raw)
    at, end, starts = FIRST, min(used, len(raw)), list[int]()
    torn = "" if used <= len(raw) else f"{name} is cut short"
    while at + HEAD.size <= end:
        size, its_step = _SIZE_AND_STEP(raw, at)
        whole = size > HEAD.size and size % 8 == 0 and at + size <= end
        if not whole or its_step != step or _CELL(raw, at + size - 8)[0] != step:
            torn = f"{name} is torn at step {step}: what stands behind it is left out"
            break
        starts.append(at)
        at += size
        step += 1
    try:
        return Tail(decode(raw, starts, offset_ns), torn, errno)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError):
        return Tail(EMPTY, f"{name} holds what no safeloader wrote: its rows are left out")


_CELL = CELL.unpack_from
_SIZE_AND_STEP = struct.Struct("2q").unpack_from


def decode(raw: bytes | memoryview, starts: Sequence[int], offset_ns: int) -> Batches:
    """Decode whole records: those that follow each other at once, where they are plain ones.

    Args:
        raw: what they lie in.
        starts: where each begins.
        offset_ns: from the clock that stamped them to the time since 1970.
    """
    if not starts:
        return EMPTY
    cells = np.frombuffer(raw, dtype=np.int64, count=len(raw) // 8)
    at = np.array(starts) // 8
    heads = cells[at[:, None] + np.arange(_HEAD_CELLS)]
    sizes = heads[:, _SAMPLES]
    # Of these each sample has a stamp of its own.
    plain = (heads[:, _KIND] == RAW) & (heads[:, _BYTES] // 8 == _HEAD_CELLS + 2 * sizes + 3)
    shapes = heads[:, [_BYTES, _SAMPLES, _KIND]]
    alike = (shapes[1:] == shapes[:-1]).all(axis=1) & (shapes[1:, 2] <= STREAM)
    if alike.size - np.count_nonzero(alike) > _CHANGES_MAX:
        alike |= plain[1:] & plain[:-1]
    parts = []
    for first, last in itertools.pairwise([0, *(np.flatnonzero(~alike) + 1).tolist(), len(at)]):
        size, its = int(sizes[first]), slice(first, last)
        if plain[first] and (sizes[its] != size).any():
            parts.append(_of_any_sizes(cells, at[its], heads[its], offset_ns))
        else:
            width = int(heads[first, _BYTES]) // 8
            rows = cells[at[first] : at[first] + width * (last - first)]
            parts.append(_of_one_shape(rows.reshape(last - first, width), offset_ns))
    return joined(parts)


def _fixed(heads: Ints, offset_ns: int) -> Ints:
    """The columns of a row that are numbers, those that the head has filled in."""
    fixed = np.empty((len(heads), len(FIXED)), dtype=np.int64)
    fixed[:, :7] = heads[:, _STEP : _WAITED + 1]
    fixed[:, 5] += offset_ns
    return fixed


def _of_any_sizes(cells: Ints, at: Ints, heads: Ints, offset_ns: int) -> Batches:
    """Records with a stamp for each sample: this takes more a sample, and nothing for a change."""
    fixed, sizes = _fixed(heads, offset_ns), heads[:, _SAMPLES]
    if (sizes < 0).any():
        raise ValueError("a record of no size")
    ends = np.cumsum(sizes)
    firsts, numbers = ends - sizes, np.arange(ends[-1])
    stamps = at + _HEAD_CELLS + sizes
    where = np.repeat(at + _HEAD_CELLS - firsts, sizes) + numbers
    stamped = np.repeat(stamps - firsts, sizes) + numbers
    fixed[:, 7] = cells[stamps] + offset_ns
    fixed[:, 8] = cells[stamps + sizes + 1] - cells[stamps + sizes]
    fetches = cells[stamped + 1] - cells[stamped]
    return Batches(fixed, sizes, cells[where], rounded(fetches), None)


def _of_one_shape(rows: Ints, offset_ns: int) -> Batches:
    """Records of one shape."""
    kind, size = int(rows[0, _KIND]), int(rows[0, _SAMPLES])
    body, texts = rows[:, _HEAD_CELLS:-1], None
    if not 0 <= size <= _SAMPLES_MAX or body.shape[1] < _LEAST[kind]:
        raise ValueError("a record that is too short, or says that it has too many samples")
    fixed = _fixed(rows, offset_ns)
    if kind in (RAW, STREAM):
        count = size if kind == RAW else 0
        stamps = body[:, count:]
        if kind == RAW:
            indices = body[:, :count].ravel()
        else:
            indices = (rows[:, _ORDINAL, None] + np.arange(size)).ravel()
        fixed[:, 7] = stamps[:, 0] + offset_ns
        fixed[:, 8] = stamps[:, -1] - stamps[:, -2]
        if stamps.shape[1] == size + 2:
            fetches = np.diff(stamps[:, :-1], axis=1).ravel()
        else:  # fetched at once: equal shares
            share = (stamps[:, 1] - stamps[:, 0]) // max(size, 1)
            fetches = np.repeat(share, size)
    else:
        fixed[:, 7], fixed[:, 8] = body[:, 0] + offset_ns, body[:, 1]
        rest = body[0, 2:]
        if kind == TEXT:
            nbytes = int(rest[0])
            texts = [json.loads(rest[1:].tobytes()[:nbytes])]
            indices, fetches = np.full(size, -1), rest[1 + (nbytes + 7) // 8 :]
        else:
            indices, fetches = rest[:size], rest[size:]
        if len(indices) != size or len(fetches) != size:
            raise ValueError("a record that is too short")
    sizes = np.full(len(rows), size)
    return Batches(fixed, sizes, indices, rounded(fetches), texts)


def rounded(times_ns: Ints) -> npt.NDArray[np.float32]:
    """Times in 4 bytes, to a part in 500: that compresses to a half, and has no bound."""
    bits = times_ns.astype(np.float32).view(np.uint32)
    bits += np.uint32(1 << 14)
    bits &= np.uint32(0xFFFF8000)
    return bits.view(np.float32)


def by_epoch(batches: Batches) -> Iterator[tuple[int, Batches]]:
    """The runs of batches of one epoch, in their order."""
    epochs = batches.fixed[:, 1]
    if not len(epochs):
        return
    if epochs[0] == epochs[-1] and (epochs == epochs[0]).all():  # as a rule
        yield int(epochs[0]), batches
        return
    cuts = [0, *(np.flatnonzero(np.diff(epochs)) + 1).tolist(), len(epochs)]
    ends = np.concatenate([[0], np.cumsum(batches.sizes)])
    for first, last in itertools.pairwise(cuts):
        samples = slice(ends[first], ends[last])
        texts = None if batches.texts is None else batches.texts[first:last]
        rows = batches.fixed[first:last], batches.sizes[first:last]
        its = Batches(*rows, batches.indices[samples], batches.fetch_ns[samples], texts)
        yield int(epochs[first]), its


def joined(parts: Sequence[Batches]) -> Batches:
    """Several as one, in their order."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return EMPTY
    texts: list[list[str] | None] | None = None
    if any(each.texts is not None for each in parts):
        texts = []
        for each in parts:
            texts += [None] * len(each.sizes) if each.texts is None else each.texts
    columns = zip(*(each[:4] for each in parts), strict=True)
    fixed, sizes, indices, fetches = (np.concatenate(column) for column in columns)
    return Batches(fixed, sizes, indices, fetches, texts)


EMPTY = Batches(
    np.empty((0, len(FIXED)), np.int64),
    np.empty(0, np.int64),
    np.empty(0, np.int64),
    np.empty(0, np.float32),
    None,
)


# ── Arrow ────────────────────────────────────────────────────────────────────────────────────────


def why_no_arrow() -> str:
    """What to install where pyarrow is missing, in a sentence; empty if it is there."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as exc:
        return f"keeping the batches of a run needs pyarrow ({exc}): {INSTALL}"
    return ""


@functools.cache
def schema() -> Any:
    """The columns of a row, which is a batch."""
    import pyarrow as pa

    kinds = {
        "step": pa.int32(),
        "epoch": pa.int32(),
        "batch": pa.int32(),
        "worker": pa.int16(),
        "pid": pa.int32(),
        "asked_ns": pa.int64(),
        "wait_ns": pa.int64(),
        "start_ns": pa.int64(),
        "collate_ns": pa.int64(),
    }
    fields = [pa.field(name, kind, nullable=False) for name, kind in kinds.items()]

    def flat(kind: Any) -> Any:
        return pa.list_(pa.field("item", kind, nullable=False))

    return pa.schema(
        [
            *fields,
            pa.field("indices", flat(pa.int64()), nullable=False),
            pa.field("fetch_ns", flat(pa.float32()), nullable=False),
            pa.field("index_text", flat(pa.string())),  # null where the indices are ints
        ]
    )


@functools.cache
def source_schema() -> Any:
    """The columns: ``index``, and its ``source``, which is empty where nothing tells."""
    import pyarrow as pa

    return pa.schema([("index", pa.int64()), ("source", pa.string())])


@functools.cache
def _kinds() -> list[Any]:
    """Of the columns of :attr:`Batches.fixed`, as NumPy names them."""
    return [schema().field(k).type.to_pandas_dtype() for k in range(len(FIXED))]


def record_batch(batches: Batches) -> Any:
    """Batches as a ``pyarrow.RecordBatch``."""
    import pyarrow as pa

    columns, kinds = schema(), _kinds()
    arrays = [pa.array(batches.fixed[:, k].astype(kind)) for k, kind in enumerate(kinds)]
    offsets = np.zeros(len(batches.sizes) + 1, dtype=np.int32)
    np.cumsum(batches.sizes, out=offsets[1:])
    for k, values in ((len(FIXED), batches.indices), (len(FIXED) + 1, batches.fetch_ns)):
        kind = columns.field(k).type
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=kind))
    kind = columns.field("index_text").type
    if batches.texts is None:
        arrays.append(pa.nulls(len(batches.sizes), kind))
    else:
        arrays.append(pa.array(batches.texts, kind))
    return pa.RecordBatch.from_arrays(arrays, schema=columns)


def segment_name(number: int, suffix: str) -> str:
    """``batches-007.arrows``."""
    return f"batches-{number:03}.{suffix}"


def segments_in(names: Sequence[str]) -> dict[int, set[str]]:
    """The segments among the names of files: by number, the suffixes of each."""
    found: dict[int, set[str]] = {}
    for name in names:
        stem, _, suffix = name.partition(".")
        word, _, number = stem.partition("-")
        if word == "batches" and number.isdecimal() and suffix in ("arrows", "parquet"):
            found.setdefault(int(number), set()).add(suffix)
    return dict(sorted(found.items()))


class Stream(NamedTuple):
    """What could be read of an Arrow stream.

    Attributes:
        batches: its record batches, of a mapping of the file.
        torn: what is wrong with its end, in a sentence; empty if nothing is.
    """

    batches: list[Any]
    torn: str = ""


def read_stream(path: Path, columns: Any = None) -> Stream:
    """The whole record batches of a stream; its end may be missing, half written, or damaged.

    Args:
        path: of the file.
        columns: the ``pyarrow.Schema`` that it should have; by default that of the batches.

    Raises:
        OSError: if it cannot be read.
    """
    import pyarrow as pa

    if not path.stat().st_size:
        return Stream([])
    found: list[Any] = []
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            if not reader.schema.equals(columns or schema()):
                return Stream([], f"{path} is damaged: it has other columns")
            while True:
                piece = reader.read_next_batch()
                piece.validate(full=True)  # Arrow believes any offset, and looks there
                found.append(piece)
    except StopIteration:
        return Stream(found)
    except damage() as exc:
        if isinstance(exc, OSError) and exc.errno is not None:
            raise
        return Stream(found, f"{path} is torn after {len(found)} pieces: {one_line(exc)}")


def damage() -> tuple[type[BaseException], ...]:
    """What pyarrow raises for a file that is damaged; an error of the system has its number."""
    import pyarrow as pa

    return (pa.ArrowException, OSError, MemoryError, ValueError, KeyError, IndexError)


def one_line(exc: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(exc).split())[:300] or type(exc).__name__


def to_parquet(folder: Path, number: int) -> Path | None:
    """Turn a closed segment into Parquet; None if somebody else has done so meanwhile.

    Raises:
        OSError: if it cannot be written.
    """
    arrows, parquet = (segment_name(number, end) for end in ("arrows", "parquet"))
    return to_parquet_file(folder, arrows, parquet, **_PARQUET)


def to_parquet_file(
    folder: Path, source: str, target: str, columns: Any = None, **how: Any
) -> Path | None:
    """Turn an Arrow stream into a Parquet file; None if it is gone by then, torn, or empty.

    What stands behind a damage cannot be read today, and is not thrown away.

    Raises:
        OSError: if it cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = columns or schema()
    try:
        stream = read_stream(folder / source, columns)
    except FileNotFoundError:
        return None
    if stream.torn or not stream.batches:  # the latter: of a process that was killed just then
        return None
    table = pa.Table.from_batches(stream.batches, columns)
    how |= {"row_group_size": _rows_in_group(table), "write_page_checksum": True}
    try:
        with written_whole(folder / target) as file:
            pq.write_table(table, file, **how)
            (folder / source).stat()
    except FileNotFoundError:  # it was dropped, or somebody else was faster
        return None
    with contextlib.suppress(FileNotFoundError):
        (folder / source).unlink()
    return folder / target


def _rows_in_group(table: Any) -> int:
    """A group is what is read for one step, and has a kilobyte or two of its own."""
    if "indices" not in table.column_names:
        return 1 << 16
    samples = sum(len(chunk.flatten()) for chunk in table["indices"].chunks)
    rows = _GROUP_SAMPLES * table.num_rows // max(samples, 1)
    return int(min(max(rows, 1 << 10), 1 << 16))


_GROUP_SAMPLES = 1 << 17
_ITEM = "list.element"
_PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": ["worker", "pid", f"fetch_ns.{_ITEM}", f"index_text.{_ITEM}"],
    "column_encoding": {
        name: "DELTA_BINARY_PACKED"
        for name in (*FIXED, f"indices.{_ITEM}")
        if name not in ("worker", "pid")
    },
    "write_statistics": ["step", "epoch", "batch", f"indices.{_ITEM}"],
}
