"""The states of all slots: shared memory that batches are written into. Runs in: both.

::

    worker                     both                       main
    ──────                     ────                       ────
    SlotPool ── writes ──► slot: anonymous file ──► lease ──► the batch's tensors and arrays
       ▲                                              │
       └──── FREE ◄── SlotTable: a cell a slot ◄──────┘ the last view of the batch is gone

A batch lies in slots of its worker, and its message says where. The worker writes LENT as it sends
the batch; main writes FREE when nothing refers to the batch any more, or GONE if the slot must not
be written to again. Neither ever waits for the other.

Torch gives each tensor a new shared-memory file: page faults on both sides, a descriptor, and the
memory of /dev/shm. A slot is mapped once, and costs one copy of a batch each time it is used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from safeloader.transport.shared_memory import SharedCells

_SLOTS = 4096  # of one worker, at most
SLOTS_A_BATCH = 24  # at most: the descriptors of fresh ones cross in one message
_MAPPED = 32768  # of all workers: half of what Linux lets a process map

# The worker looks at those with odd numbers: to take the slot, or to give it up.
UNUSED, FREE, LENT, GONE = range(4)
# Of a worker: bytes that its slots may hold, which is main's word, and that they hold; whether it
# forked, so that a process may read on in them when it has ended.
MAY_HOLD, HOLDS, FORKED = range(3)
_OF_A_WORKER = 3

Parked = dict[tuple[int, int], Any]  # by worker and number: the memory of a slot


class SlotLayout(NamedTuple):
    """Where a batch lies; travels with its manifest.

    Attributes:
        slots: number and size in bytes of each slot it lies in.
        fresh: which of these main has not seen: their descriptors come beside the message, behind
            the others.
        fds: how many descriptors come with the message.
        given_up: slots that will not be used again.
        stream: where the pickle itself lies, if it is large: slot of the batch, offset, bytes.
        torchs: whether some or all of it crosses in torch's own way.
        why: why some or all of it is not in a slot, where it should be.
    """

    slots: tuple[tuple[int, int], ...] = ()
    fresh: tuple[int, ...] = ()
    fds: int = 0
    given_up: tuple[int, ...] = ()
    stream: tuple[int, int, int] | None = None
    torchs: bool = False
    why: str = ""


class SlotTable(SharedCells):
    """The state of every slot of every worker, and its share. Pickles to workers only.

    Args:
        workers: how many there are. Their slots may hold nothing to begin with.
        most_slots: how many one worker may have.

    Raises:
        OSError: where no anonymous file can be had, or it cannot be mapped.
    """

    def __init__(self, workers: int, most_slots: int = _SLOTS) -> None:
        self.workers = workers
        self.slots = max(1, min(most_slots, _MAPPED // workers))  # of one worker
        super().__init__((self.slots + _OF_A_WORKER) * workers)

    def row(self, worker: int) -> memoryview:
        """The cells of ``worker``'s slots."""
        return self._cells[worker * self.slots : (worker + 1) * self.slots]

    def share(self, worker: int) -> memoryview:
        """The cells of ``worker`` itself: ``MAY_HOLD``, ``HOLDS`` and ``FORKED``."""
        at = self.workers * self.slots + _OF_A_WORKER * worker
        return self._cells[at : at + _OF_A_WORKER]
