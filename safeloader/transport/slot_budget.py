"""What the slots of all loaders of this process may hold together. Runs in: main.

A quarter of the smaller of machine and container, divided among the ranks that share the machine.
Each worker reads in its row of the slot table what its slots may hold, and writes there what they
do hold. Main divides anew as a pool starts, as an epoch does, and as a batch found no room. A
worker that holds more than its share keeps it until its batches are gone: the others get less.
"""

from __future__ import annotations

import functools
import os
import re
import threading
import weakref
from time import monotonic
from typing import Any

from safeloader.introspect.resources import least_memory
from safeloader.transport.parking import drop_parked
from safeloader.transport.slot_table import HOLDS, MAY_HOLD, SlotTable
from safeloader.transport.stats import TransportCounts

_SHARE = 0.25
_UNKNOWN_MEMORY = 1 << 32


def process_bytes() -> int:
    """What the slots of this process may hold."""
    smallest = _smallest_memory(int(monotonic()))
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    ranks = int(said) if re.fullmatch("[1-9][0-9]{0,4}", said) else 1
    return int(_SHARE * smallest) // ranks


@functools.lru_cache(maxsize=1)
def _smallest_memory(second: int) -> int:
    """That of machine or container, as it was in this second: many pools may start in one."""
    return least_memory() or _UNKNOWN_MEMORY


class PoolCounts(TransportCounts):
    """What came from one pool of workers, counted for its loader and for the budget.

    Args:
        whole: the counts of the loader.
        table: the states of the workers' slots.
    """

    def __init__(self, whole: TransportCounts, table: SlotTable) -> None:
        super().__init__()
        self._whole = whole
        self.batches = whole.batches
        self._table = weakref.ref(table)
        self.workers: weakref.WeakSet[Any] | None = None
        budget.add(self)

    @property
    def table(self) -> SlotTable | None:
        """The table while there are workers, or while they are being started."""
        workers = self.workers
        ended = workers is not None and not any(worker.is_alive() for worker in workers)
        return None if ended else self._table()

    def fell_back(self, why: str) -> None:
        """Some or all of a batch was not in a slot: one of the others may have room to spare."""
        self._whole.fell_back(why)
        drop_parked()
        budget.divide()

    def slot_made(self, memory: Any) -> None:
        """A slot was mapped."""
        super().slot_made(memory)
        self._whole.slot_made(memory)

    def slot_left(self, memory: Any) -> None:
        """A slot serves another pool, or goes."""
        super().slot_left(memory)
        self._whole.slot_left(memory)


class SlotBudget:
    """Divides what this process may use among the workers of all its loaders."""

    def __init__(self) -> None:
        self._total = 0
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._pools: list[PoolCounts] = []
        self._lock = threading.Lock()

    def add(self, pool: PoolCounts) -> None:
        """A pool starts."""
        if self._pid != os.getpid():  # forked: a process of its own
            self._begin()
        self._total = process_bytes()
        self._pools.append(pool)
        self.divide()

    def divide(self) -> None:
        """Tell each worker what its slots may hold. Does not wait for another thread that does."""
        if self._pid != os.getpid() or not self._lock.acquire(blocking=False):
            return
        try:
            left, cells = self._total, []
            self._pools = [pool for pool in self._pools if pool.table or pool.stats().slots]
            for pool in self._pools:
                table = pool.table
                if table is None:
                    left -= pool.stats().bytes  # batches that are kept past their workers' end
                else:
                    cells += [table.share(worker) for worker in range(table.workers)]
            cells.sort(key=lambda cell: cell[HOLDS], reverse=True)
            for count, cell in zip(range(len(cells), 0, -1), cells, strict=True):
                share = max(0, left // count)
                cell[MAY_HOLD] = share
                left -= max(share, cell[HOLDS])
        finally:
            self._lock.release()


budget = SlotBudget()
