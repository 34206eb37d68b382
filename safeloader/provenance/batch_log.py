"""The batches of one loader, written as they are handed over. Runs in: main.

See :mod:`~safeloader.provenance.run_format` for the tail and the segments. The hot path copies the
worker's own bytes into a shared mapping; a system call is made every few hundred batches, and never
one that waits for the disk.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from safeloader.delivery.manifest import BatchContents, BatchManifest
from safeloader.introspect.signals import raised_by_signal
from safeloader.provenance import run_format
from safeloader.provenance.columns import places_of, times_of
from safeloader.provenance.index_texts import fits
from safeloader.provenance.open_folder import OpenFolder, write_all
from safeloader.provenance.run_format import (
    BASE_AT,
    CELL,
    DECODED,
    ERRNO_AT,
    FIRST,
    HEAD,
    MAGIC,
    OFFSET_AT,
    RAW,
    SEGMENT_BYTES,
    STREAM,
    TAIL_BYTES,
    TEXT,
    USED_AT,
    Batches,
    decode,
    parse_tail,
    record_batch,
    segment_name,
)
from safeloader.provenance.source_log import plain as plain_index
from safeloader.provenance.worker_log import FIRST_NS

FLUSH_NS = 10_000_000_000  # what other machines see, and a power cut loses, is so much behind
_PIECE_NS = 1_000_000_000
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_AGAIN = 4  # segments that went, which a reader may have brought back: removed once more
_STAMPS_LEAST = 24  # bytes: of a batch that was fetched at once


class Segment(NamedTuple):
    """A segment that is closed: its number, bytes, the steps and epochs in it, and when it was."""

    number: int
    nbytes: int
    steps: tuple[int, int]
    epochs: tuple[int, int]
    closed_ns: int


class BatchLog:
    """Tail and segments in a folder.

    Args:
        folder: where they lie.
        offset_ns: from the clock of the stamps to the time since 1970.
        flushed: is told of the batches that the stream got, of the time, and if an epoch ends.
        broken: is told why nothing more can be written, and calls :meth:`broke`.
        segment_bytes: at which a segment is closed.

    Attributes:
        base: what is added to the numbers of epochs.
        segments: those closed, oldest first.
        current_bytes: of the one that is open.
        lock: held while the tail is written to, or read.

    Raises:
        OSError: if the tail cannot be made.
    """

    def __init__(
        self,
        folder: OpenFolder,
        offset_ns: int,
        flushed: Callable[[Batches, int, bool], object] = lambda *about: None,
        broken: Callable[[OSError], object] | None = None,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self._folder, self._offset_ns = folder, offset_ns
        self._flushed, self._broken = flushed, broken or self.broke
        self._segment_bytes = segment_bytes
        self.lock = threading.RLock()  # a signal handler may iterate a loader of its own
        self.base = 0
        self._place = FIRST, 0  # where the next record begins, and its step
        self._starts: list[int] = []  # of the records in the tail
        self._base = self._streamed = 0  # steps: of its first record, and behind the stream's last
        self.segments: list[Segment] = []
        self._dropped: list[int] = []  # numbers of the newest that went
        self.current_bytes = 0
        self._number = 0
        self._began: tuple[int, int] = (0, 0)  # first step and epoch of the segment
        self._last_epoch = 0
        self._due_ns = self._flushed_ns = 0
        self._tail: Any = _tail_in(folder, offset_ns)
        self._end = TAIL_BYTES

    def delivered(
        self, epoch: int, batch: int, wait_ns: int, manifest: BatchManifest, began_ns: int
    ) -> None:
        """Note a batch as it is handed over; hot path (``benchmarks/run_folder.py``)."""
        _, worker, pid, indices, _, ordinal, stamps, _, _, incidents = manifest[:10]
        with self.lock:
            at, step = self._place
            if incidents is not None or ordinal is not None or type(indices) is not bytes:
                return self._other(epoch, batch, wait_ns, manifest, began_ns)
            middle = at + 88 + len(indices)
            last = middle + len(stamps)
            if last >= self._end or began_ns > self._due_ns or len(stamps) < _STAMPS_LEAST:
                return self._other(epoch, batch, wait_ns, manifest, began_ns)
            tail = self._tail
            _put_head(
                tail,
                at,
                last + 8 - at,
                step,
                epoch + self.base,
                batch,
                -1 if worker is None else worker,
                pid,
                began_ns,
                wait_ns,
                len(indices) >> 3,
                RAW,
                0,
            )
            tail[at + 88 : middle] = indices
            tail[middle:last] = stamps
            _put_cell(tail, last, step)
            _put_cell(tail, USED_AT, last + 8)
            self._place = last + 8, step + 1  # at once: an interrupt may strike anywhere
            self._starts.append(at)
        return None

    def _other(
        self, epoch: int, batch: int, wait_ns: int, manifest: BatchManifest, began_ns: int
    ) -> None:
        """The same with room made first, or for a batch that is no plain one."""
        if self._tail is None:
            return
        now_ns = began_ns + wait_ns
        samples, kind, body = _body_of(manifest)
        worker = -1 if manifest.worker_id is None else manifest.worker_id
        size = HEAD.size + len(body) + 8
        try:
            if self._place[0] + size > self._end or now_ns > self._due_ns:
                self.flush(now_ns)
            at, step = self._place
            head: Any = size, step, epoch + self.base, batch, worker, manifest.pid
            record = HEAD.pack(*head, began_ns, wait_ns, samples, kind, manifest.ordinal or 0)
            record += body + CELL.pack(step)
            if at + size > self._end:  # larger than the tail
                self._write(decode(bytes(FIRST) + record, [FIRST], self._offset_ns))
                self._base = step + 1
                self._place = at, step + 1
                _put_cell(self._tail, BASE_AT, step + 1)
                return
        except OSError as exc:
            if raised_by_signal(exc):  # the user's, which only struck here
                raise
            self._broken(exc)
            return
        self._tail[at : at + size] = record
        _put_cell(self._tail, USED_AT, at + size)
        self._place = at + size, step + 1
        self._starts.append(at)

    def held(self) -> Batches:
        """What the tail holds: views of it, good until a record follows."""
        with self.lock:
            if self._tail is None:
                return run_format.EMPTY
            at, step = self._place
            if len(self._starts) == step - self._base:
                return decode(memoryview(self._tail)[:at], self._starts, self._offset_ns)
            return parse_tail(self._tail[:at]).batches  # an interrupt struck

    def epoch_ends(self, now_ns: int, is_first: bool = False) -> None:
        """Flush, if that was not done a moment ago: small epochs share a piece of the stream.

        Args:
            now_ns: by the clock of the stamps.
            is_first: flush in any case: no other epoch may come.

        Raises:
            OSError: if that fails.
        """
        if is_first or now_ns > self._flushed_ns + _PIECE_NS:
            self.flush(now_ns, epoch_ends=True)

    def flush(self, now_ns: int, *, epoch_ends: bool = False) -> None:
        """Give to the stream what the tail holds; ``now_ns`` by the clock of the stamps.

        Raises:
            OSError: if that fails; the tail has it then.
        """
        with self.lock:
            if self._tail is None:
                return
            self._due_ns = now_ns + (FLUSH_NS if self._flushed_ns else FIRST_NS)
            self._flushed_ns = now_ns
            batches = self.held().since(self._streamed)
            if len(batches.sizes):
                self._write(batches)
            self._empty_tail()
            self._flushed(batches, now_ns, epoch_ends)

    def _empty_tail(self) -> None:
        step = self._place[1]
        _put_cell(self._tail, USED_AT, FIRST)
        _put_cell(self._tail, BASE_AT, step)
        self._starts, self._base = [], step
        self._place = FIRST, step

    def _write(self, batches: Batches) -> None:
        first, last = batches.fixed[0], batches.fixed[-1]
        if not self.current_bytes:
            self._began = int(first[0]), int(first[1])
        name, piece = segment_name(self._number, "arrows"), record_batch(batches).serialize()
        head = () if self.current_bytes else (run_format.schema().serialize(),)
        self.current_bytes = self._folder.append(
            name, *(memoryview(each) for each in (*head, piece))
        )
        self._streamed = int(last[0]) + 1
        self._last_epoch = int(last[1])
        if self.current_bytes >= self._segment_bytes:
            self._close_segment(int(last[0]))

    def _close_segment(self, last_step: int) -> None:
        name = segment_name(self._number, "arrows")
        nbytes = self._folder.append(name, _END_OF_STREAM)
        (step, epoch), last_epoch = self._began, self._last_epoch
        self.segments.append(
            Segment(
                self._number, nbytes, (step, last_step), (epoch, last_epoch), time.monotonic_ns()
            )
        )
        self._number += 1
        self.current_bytes = 0

    def drop_oldest(self) -> Segment:
        """Remove the oldest closed segment.

        Raises:
            OSError: if it cannot be removed.
        """
        gone = self.segments.pop(0)
        self._dropped = [*self._dropped, gone.number][-_AGAIN:]
        for number in self._dropped:  # whoever reads may have turned it into the other just then
            for suffix in ("arrows", "parquet"):
                self._folder.remove(segment_name(number, suffix))
        return gone

    def close(self, now_ns: int) -> list[int]:
        """Nothing more comes: the numbers of the segments there are.

        Raises:
            OSError: if what the tail holds cannot be written; it stays then.
        """
        with self.lock:
            if self._tail is None:
                return []
            self.flush(now_ns)
            if self.current_bytes:
                self._close_segment(self._place[1] - 1)
            self.leave()
            self._folder.remove("tail")
            return [each.number for each in self.segments]

    def broke(self, exc: OSError) -> None:
        """Nothing more can be written: what reads the tail is told why."""
        if self._tail is not None:
            _put_cell(self._tail, ERRNO_AT, exc.errno or -1)
        self.leave()

    def leave(self) -> None:
        """Write nothing any more: it cannot be written."""
        self._tail, self._end = None, -1

    def leave_to_parent(self) -> None:
        """This is a forked child, and another thread of the parent may have held the lock."""
        self.lock = threading.RLock()
        self.leave()


def _tail_in(folder: OpenFolder, offset_ns: int) -> mmap.mmap:
    """A new tail, mapped. Its blocks are there already: a mapping that meets a full disk kills."""
    fd = folder.new("tail", os.O_RDWR)
    try:
        write_all(fd, bytes(TAIL_BYTES))
        tail = mmap.mmap(fd, TAIL_BYTES)
    except OSError:
        folder.remove("tail")
        raise
    finally:
        os.close(fd)
    _put_cell(tail, OFFSET_AT, offset_ns)
    _put_cell(tail, USED_AT, FIRST)
    _put_cell(tail, run_format.MAGIC_AT, MAGIC)
    return tail


_put_head, _put_cell = HEAD.pack_into, CELL.pack_into


def _body_of(manifest: BatchManifest) -> tuple[int, int, bytes]:
    """Samples, kind and body of a record."""
    stamps = manifest.stamps if len(manifest.stamps) >= _STAMPS_LEAST else bytes(_STAMPS_LEAST)
    plain = manifest.incidents is None
    if plain and manifest.ordinal is not None:
        return manifest.samples or 0, STREAM, stamps
    if plain and type(manifest.indices) is bytes:
        return len(manifest.indices) // 8, RAW, manifest.indices + stamps
    places = places_of(manifest)
    _, fetches, collate_ns = times_of(manifest._replace(stamps=stamps), places)
    begins = CELL.unpack_from(stamps)[0]
    indices = BatchContents.of(manifest).indices
    if manifest.ordinal is not None:  # of a stream: (worker, ordinal)
        indices = tuple(each[1] for each in indices)
    start = np.array([begins, collate_ns], dtype=np.int64).tobytes()
    times = np.asarray(fetches, dtype=np.int64).tobytes()
    if _are_ints(indices):
        whole = start + np.array(indices, dtype=np.int64).tobytes() + times
        return len(indices), DECODED, whole
    texts = json.dumps([str(plain_index(each)) for each in indices]).encode()
    return len(indices), TEXT, start + CELL.pack(len(texts)) + _padded(texts) + times


def _are_ints(indices: Sequence[Any]) -> bool:
    return all(map(fits, indices))


def _padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % 8)


def convert(folder: Path, numbers: Sequence[int], until: Callable[[], bool]) -> None:
    """Turn closed segments into Parquet, as long as ``until`` does not say that it is enough.

    Raises:
        OSError: if one cannot be written.
    """
    for number in numbers:
        if until():
            return
        run_format.to_parquet(folder, number)
