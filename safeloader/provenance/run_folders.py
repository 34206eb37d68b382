"""Which folder of which run each loader of this process writes to. Runs in: main.

::

    iter(loader) ──► Epoch ──► sinks_for ──► the attempt of this process   attempts.py, asked once
                                   │
                                   └───────► a LoaderFolder               run_folder.py

A forked child forgets what it inherited, and begins anew at its first ``iter``; workers of a loader
write nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import torch.distributed
from torch.utils.data import get_worker_info

from safeloader import _python
from safeloader.failures.loader_log import LoaderLog, guarded
from safeloader.introspect.callers import calling_line
from safeloader.introspect.ranks import place
from safeloader.introspect.signals import raised_by_signal
from safeloader.provenance.attempts import AnotherRun, Attempt, NotARun, open_run
from safeloader.provenance.batch_log import convert
from safeloader.provenance.recorder import Recorder
from safeloader.provenance.run_folder import About, LoaderFolder
from safeloader.provenance.run_format import SEGMENT_BYTES
from safeloader.provenance.source_log import SourceOf

FOLDERS_MAX = 64
"""Of one process: loaders beyond these are not written."""

_CONVERT_S = 10.0  # at the end of a process; what is left is for those who read
_LEAST_SEGMENT = 1 << 16


class _Process:
    """What this process knows; a forked child has one of its own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.attempts: dict[Path, Attempt | None] = {}
        self.folders: list[LoaderFolder] = []
        self.free: dict[Any, list[LoaderFolder]] = {}
        self._bounds: dict[LoaderFolder, int] = {}
        self._told_of_many = False
        self._given_up: set[Path] = set()
        self._ends = False

    def folder_for(
        self, recorder: Recorder, target: Path, max_bytes: int | None, log: LoaderLog
    ) -> LoaderFolder | None:
        """The folder of a loader that begins an epoch; None where none can be had."""
        with self.lock:
            attempt = self._attempt(target, log)
            if attempt is None:
                return None
            rank = place().rank or 0
            held: LoaderFolder | None = recorder.run
            its = held in self.folders and (held.attempt, held.rank) == (attempt, rank)
            if held is not None and its:
                self._is_bounded(held, max_bytes)
                return held
            key = (attempt, rank, log.loader_name, line := calling_line())
            if waiting := self.free.get(key):
                folder = waiting.pop()
            elif attempt.run in self._given_up:
                return None
            elif len(self.folders) >= FOLDERS_MAX:
                self._tell_of_many(log)
                return None
            else:
                segment = SEGMENT_BYTES
                if max_bytes is not None:
                    segment = min(segment, max(_LEAST_SEGMENT, max_bytes // 8))
                try:
                    folder = LoaderFolder(attempt, rank, line, log, segment, self.bound)
                except OSError:
                    self._given_up.add(attempt.run)
                    raise
                self.folders.append(folder)
                self._close_at_end()
            weakref.finalize(recorder, self._let_go, key, folder).atexit = False
            self._is_bounded(folder, max_bytes)
            return folder

    def _is_bounded(self, folder: LoaderFolder, max_bytes: int | None) -> None:
        """Take what the loader says now that writes into a folder."""
        self._bounds.pop(folder, None)
        if max_bytes is not None:
            self._bounds[folder] = max_bytes

    @property
    def max_bytes(self) -> int | None:
        """The bound of the process: the smallest that a loader gave; None where none has one."""
        return min(self._bounds.values(), default=None)

    def _let_go(self, key: Any, folder: LoaderFolder) -> None:
        self.free.setdefault(key, []).append(folder)

    def _attempt(self, target: Path, log: LoaderLog) -> Attempt | None:
        path = Path(os.path.abspath(target))
        if path not in self.attempts:
            self.attempts[path] = None
            at = place()
            group = torch.distributed.is_available() and torch.distributed.is_initialized()
            try:
                self.attempts[path] = open_run(
                    path, sys.orig_argv, at.rank or 0, group=group and (at.world_size or 1) > 1
                )
            except (AnotherRun, NotARun, OSError) as exc:
                if raised_by_signal(exc):
                    raise
                log.warning("nothing of this run is written: %s. Training goes on", exc)
        return self.attempts[path]

    def _tell_of_many(self, log: LoaderLog) -> None:
        if not self._told_of_many:
            self._told_of_many = True
            log.warning(
                "this loader is not written into the run's folder, nor are further ones: this "
                "process has %d loaders there already",
                FOLDERS_MAX,
            )

    def bound(self) -> None:
        """See that the segments of this process stay within the bound.

        Raises:
            OSError: if one cannot be removed.
        """
        with self.lock:
            bound = self.max_bytes
            if bound is None:
                return
            logs = [each.batches for each in self.folders if each.batches is not None]
            held = sum(each.current_bytes for each in logs)
            held += sum(segment.nbytes for each in logs for segment in each.segments)
            while held > bound:
                closed = [
                    (folder.batches.segments[0].closed_ns, k)
                    for k, folder in enumerate(self.folders)
                    if folder.batches is not None and folder.batches.segments
                ]
                if not closed:
                    return
                held -= self.folders[min(closed)[1]].tell_dropped()

    # the end ────────────────────────────────────────────────────────────────────────────────────

    def _close_at_end(self) -> None:
        if self._ends:
            return
        self._ends = True
        if multiprocessing.parent_process() is not None:  # these skip `atexit`
            _python.Finalize(None, _close, exitpriority=-90)
        else:
            atexit.register(_close)

    def close(self) -> None:
        """The process ends: what is open is booked, and the batches become Parquet."""
        give_up = time.monotonic() + _CONVERT_S
        with self.lock:  # no longer: a thread that flushes has the lock of its log, and wants this
            folders, self.folders = self.folders, []
            self.free.clear()
        closed: list[tuple[LoaderFolder, list[int]]] = []
        for folder in folders:
            with guarded("the run's folder", lambda log=folder.log: log):  # type: ignore[misc]
                closed.append((folder, folder.close()))
        for folder, numbers in closed:
            with contextlib.suppress(OSError):  # whoever reads does it then
                convert(folder.path, numbers, lambda: time.monotonic() > give_up)


_process = _Process()


def _close() -> None:
    _process.close()


def _in_child() -> None:
    global _process
    for folder in _process.folders:
        folder.leave_to_parent()
    _process = _Process()


_python.at_fork(after_in_child=_in_child)


_lies_at: dict[Path, Path] = {}


def sinks_for(
    recorder: Recorder,
    target: Path | None,
    max_bytes: int | None,
    log: LoaderLog,
    source_of: SourceOf,
    all_sources: bool = False,
    about: About | None = None,
) -> list[object]:
    """The sinks that write an epoch which begins into the folder of a run; none where none is to.

    Args:
        recorder: of the loader.
        target: the run's folder.
        max_bytes: bound on what this process keeps of its batches.
        log: the loader's.
        source_of: says where the sample of an index comes from.
        all_sources: whether that is stored of every sample.
        about: what else the epoch tells.
    """
    if target is None or get_worker_info() is not None:
        return []
    try:
        # A program that changes its directory goes on in the folder that it began.
        target = _lies_at.setdefault(target, target.absolute())
        folder = _process.folder_for(recorder, target, max_bytes, log)
    except OSError as exc:
        if raised_by_signal(exc):
            raise
        log.warning("nothing of this loader is written for this run: %s. Training goes on", exc)
        return []
    if folder is None:
        return []
    return folder.taken_by(recorder, log, source_of, all_sources, about)
