"""How batches crossed from the workers, every few seconds: ``transport.jsonl``. Runs in: main.

A line says how many slots are mapped and how large they are, how many batches came by each way,
why some were not put into a slot, and how full ``/dev/shm`` is, by which torch's own way goes. It
is written as often as the rows of ``worker_log.py``, and only where something changed.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from safeloader.introspect.resources import shared_memory
from safeloader.provenance.open_folder import OpenFolder
from safeloader.transport.stats import TransportStats

NAME = "transport.jsonl"


class TransportLog:
    """The lines of one loader.

    Args:
        folder: the loader's.
    """

    def __init__(self, folder: OpenFolder) -> None:
        self._folder = folder
        self._stats: Callable[[], TransportStats | None] = lambda: None
        self._whose: object = None
        self._batches, self._fallbacks = Counter[str](), Counter[str]()  # of recorders before
        self._newest = TransportStats()
        self._written: dict[str, Any] = {}

    def goes_on(self, whose: object, stats: Callable[[], TransportStats | None]) -> None:
        """An epoch begins: ``stats`` gives its recorder's counts, ``whose`` tells that from others.

        Another recorder begins at 0: what was counted by then counts on.
        """
        if whose != self._whose:
            self._batches.update(self._newest.batches)
            self._fallbacks.update(self._newest.fallbacks)
            self._newest = TransportStats()
        self._whose, self._stats = whose, stats

    def look(self) -> None:
        """Read the counts: later the recorder may be gone."""
        with contextlib.suppress(RuntimeError):  # the thread that counts did so just now
            self._newest = self._stats() or self._newest

    def note(self) -> None:
        """Write a line, if a batch came from a worker and anything changed.

        Raises:
            OSError: if it cannot be written.
        """
        self.look()
        stats = self._newest
        batches = self._batches + Counter(stats.batches)
        if not batches:
            return
        told: dict[str, Any] = {
            "slots": stats.slots,
            "slot_bytes": stats.bytes,
            "batches": dict(batches),
            "fallbacks": dict(self._fallbacks + Counter(stats.fallbacks)),
        }
        if told == self._written:
            return
        self._written = told
        line = {"time": time.time()} | told | _shared_memory()
        self._folder.append(NAME, (json.dumps(line) + "\n").encode())


def _shared_memory() -> dict[str, int]:
    """How much of ``/dev/shm`` is in use, by all processes, and how large it is."""
    space = shared_memory()
    if space is None:
        return {}
    return {"shm_used": space.total - space.free, "shm_bytes": space.total}
