"""Opens a batch, and gives its slots back when nobody has it any more. Runs in: main.

::

    message ──► which slots ──► a lease of each ──► tensors and arrays over them ──► the loop
                                   │
                                   └── the last one of a batch goes ──► FREE: written to again

A lease is the memory of a slot for the time of one batch. Everything that is made over it holds it:
tensors, arrays, slices and views of them, in whatever order they are let go of. The slot is freed
in the process that opened the batch alone. A child that is forked meanwhile keeps its views, so a
slot that is lent at that moment is never written to again.

No finalizer of ours is written in Python. A signal handler that raises may run in each, as it does
at every call of a function: what it raises is swallowed there, and the rest is not done. C code
notes that a lease is gone, and the workers are told before the next batch is waited for or opened.
"""

from __future__ import annotations

import errno
import os
import pickle
import weakref
from collections import deque
from typing import Any

import numpy as np

from safeloader._torch import forget_what_was_sent
from safeloader.delivery.manifest import BatchContents, BatchManifest
from safeloader.failures.failure import Failure
from safeloader.introspect.fingerprint import difference
from safeloader.introspect.resource_exhaustion import shortage
from safeloader.transport.channel import Arrived
from safeloader.transport.forks import forks_noticed, notice_forks
from safeloader.transport.leaves import opening
from safeloader.transport.messages import DeliveredBatch, FailedBatch, failed_on_the_way
from safeloader.transport.shared_memory import mapped
from safeloader.transport.slot_table import FORKED, FREE, GONE, HOLDS, Parked, SlotLayout, SlotTable
from safeloader.transport.stats import TransportCounts

_LARGE = 1 << 20  # bytes of a slot that the workers are told of at once
_ENOUGH = 2  # smaller ones are told of together: to look for forks takes some 3 µs
_ALL_IN_MESSAGE = SlotLayout()
WORKER_GONE = (ConnectionError, EOFError, FileNotFoundError)  # the tensors' memory went with it
_NOT_OPENED = (
    "the batch was pickled in the worker and could not be loaded in the main process\n"
    "pickle.loads(pickle.dumps(batch)) repeats it: make what the dataset or collate_fn "
    "gives picklable both ways, or plain tensors, numbers, strings and containers of them"
)
_CHANGED = (
    "something wrote to the batch after the worker made it\n"
    "a dataset or collate_fn that goes on writing to a tensor it gave away (a buffer used again) "
    "does that: give away a copy; so does a pin_memory() that changes what it pins. Torch itself "
    "drops the mark of a conjugate or negative view: give away x.resolve_conj(). Otherwise "
    "suspect the machine's memory, or the way across: transport= gives the choice of two"
)


class Unpacker:
    """Opens the batches of one pool of workers.

    Args:
        table: the states of the workers' slots; None without slots.
        counts: where it is counted what came which way.
    """

    def __init__(
        self, table: SlotTable | None = None, counts: TransportCounts | None = None
    ) -> None:
        self._table: Any = table  # None without slots: then nothing comes in one
        self._counts = TransportCounts() if counts is None else counts
        self._slots: dict[tuple[int, int], _Slot] = {}
        self._gone: deque[_Lease] = deque()  # leases that nothing refers to any more
        self._enough = 1  # of them to tell the workers
        self._pid = os.getpid()
        notice_forks()

    def opened(self, came: Arrived) -> DeliveredBatch | FailedBatch:
        """The batch; a failure in its place if it cannot be loaded here. Hot path.

        After an interrupt it may be called again, and goes on where it was.
        """
        if len(self._gone) >= self._enough:
            self.settle()
        fields, about = pickle.loads(came.manifest)
        manifest = tuple.__new__(BatchManifest, fields)  # a third of what its own takes
        slot_layout = _ALL_IN_MESSAGE if about is None else SlotLayout(*about)
        before = opening.now
        try:
            opening.now = came
            came.brought = []
            if slot_layout.slots or slot_layout.given_up:
                forget_what_was_sent()
                self._lease(manifest.worker_id or 0, slot_layout, came)
            if slot_layout.stream is None:
                payload = pickle.loads(came.payload)
            else:
                slot, at, size = slot_layout.stream
                payload = pickle.loads(memoryview(came.leases[slot])[at : at + size])
        except Exception as exc:
            where = "while loading a batch in the main process"
            return failed_on_the_way(manifest, exc, where, shortage(exc) or _NOT_OPENED)
        finally:
            opening.now = before
        way = "torch" if slot_layout.torchs else "slots" if slot_layout.slots else "message"
        self._counts.batches[way] += 1
        if slot_layout.why:
            self._counts.fell_back(slot_layout.why)
        return DeliveredBatch(manifest, payload)

    def _lease(self, worker: int, slot_layout: SlotLayout, came: Arrived) -> None:
        """Lease the slots that a batch lies in; those that come for the first time are mapped.

        Raises:
            OSError: if a descriptor was lost on the way: there were too many open files here.
            RuntimeError: if a slot cannot be mapped.
        """
        slots = self._slots
        leases = came.leases = came.leases or []
        try:
            if not leases:
                for number in slot_layout.given_up:
                    slots.pop((worker, number), None)
                if slot_layout.fresh:
                    self._map_fresh(worker, slot_layout, came.fds)
            forks = forks_noticed()
            self._enough = _ENOUGH
            for place, (number, size) in enumerate(slot_layout.slots):
                slot = slots[worker, number]
                if place == len(leases):  # else an interrupt came after it
                    leases.append(np.ndarray(size, np.uint8, slot.memory))
                if slot.lease is None:
                    lease = _Lease(leases[place], self._gone.append)
                    lease.of = worker, number
                    lease.forks = forks
                    slot.lease = lease
                if size >= _LARGE:
                    self._enough = 1
        except Exception:  # the worker must not think that they are known here
            for number, _ in slot_layout.slots:
                slots.pop((worker, number), None)
                self._table.row(worker)[number] = GONE
            raise

    def _map_fresh(self, worker: int, slot_layout: SlotLayout, fds: list[int]) -> None:
        row = self._table.row(worker)
        if len(fds) < slot_layout.fds:
            raise OSError(errno.EMFILE, "a slot's file descriptor was lost on the way")
        for place, fd in zip(slot_layout.fresh, fds[-len(slot_layout.fresh) :], strict=True):
            number, size = slot_layout.slots[place]
            self._slots[worker, number] = slot = _Slot(row, mapped(fd, size))
            self._counts.slot_made(slot.memory)

    def adopt(self, parked: Parked) -> None:
        """Have these slots, by worker and number, which nothing refers to, for the pool's own."""
        for (worker, number), memory in parked.items():
            row, share = self._table.row(worker), self._table.share(worker)
            share[HOLDS] += len(memory)
            self._slots[worker, number] = _Slot(row, memory)
            self._counts.slot_made(memory)
            row[number] = FREE

    def parted(self) -> Parked:
        """Part with the slots that nothing refers to; the workers have ended.

        Not with those of a worker that forked: its child may have outlived it, and still read.
        """
        self.settle(all_of_them=True)
        found = {}
        for key, slot in list(self._slots.items()):
            if self._table.share(key[0])[FORKED]:
                continue
            if slot.lease is None and slot.row[key[1]] == FREE:
                found[key] = slot.memory
                del self._slots[key]
                self._counts.slot_left(slot.memory)
        return found

    def keep(self, most: int) -> None:
        """Hold on to ``most`` slots; the others go with the batches in them. The workers end."""
        self.settle(all_of_them=True)
        slots = sorted(self._slots.items(), key=lambda each: each[1].lease is not None)
        for key, _ in slots[most:]:
            self._slots.pop(key, None)  # a signal handler may have iterated the loader meanwhile

    def forget(self) -> None:
        """In a worker: unmap what was inherited."""
        self._slots.clear()

    def mapped_bytes(self) -> int:
        """The size of all its slots."""
        return sum(len(slot.memory) for slot in list(self._slots.values()))

    def settle(self, all_of_them: bool = False) -> None:
        """Tell the workers which slots nothing refers to any more. Hot path.

        May be broken off by an exception anywhere, and goes on the next time.
        """
        gone = self._gone
        if len(gone) < (1 if all_of_them else self._enough) or os.getpid() != self._pid:
            return
        forks = forks_noticed(look=True)
        while gone:
            lease = gone[0]
            slot = self._slots.get(lease.of)
            if slot is not None and slot.lease is lease:
                state = FREE if lease.forks == forks else GONE
                # At once, or the worker might be told again when it has lent the slot anew: signals
                # are looked at after a call or a jump backwards, and there is none in here.
                slot.lease, slot.row[lease.of[1]] = None, state
            gone.popleft()


class _Lease(weakref.ref[Any]):
    """The memory of a slot for one batch, referred to weakly.

    Attributes:
        of: worker and number of the slot.
        forks: how many were noticed when it was given.
    """

    __slots__ = ("forks", "of")
    of: tuple[int, int]
    forks: int


class _Slot:
    """A slot, seen from main.

    Attributes:
        row: the states of its worker's slots.
        memory: where it is mapped here.
        lease: of the batch in it; None if it was given back.
    """

    def __init__(self, row: memoryview, memory: Any) -> None:
        self.row = row
        self.memory = memory
        self.lease: _Lease | None = None


def changed(manifest: BatchManifest, batch: Any) -> Failure | None:
    """The failure, if ``batch`` does not match the fingerprints that its worker took."""
    assert manifest.fingerprints is not None
    asked, known, places, _ = BatchContents.of(manifest)
    found = difference(manifest.fingerprints, batch, len(asked))
    if found is None:
        return None
    positions = [places[row] for row in found.rows or () if row < len(places)]
    position = positions[0] if positions else (0 if len(asked) == 1 else None)
    where = ""
    if positions:
        more = f" and {len(positions) - 8} more" if len(positions) > 8 else ""
        samples = "sample of dataset index" if len(positions) == 1 else "samples of dataset indices"
        where = f", in the {samples} {', '.join(str(known[at]) for at in positions[:8])}{more}"
    return Failure(
        phase="transport",
        exception_type="TransportError",
        message=f"{found.path} is not what the worker sent{where}",
        index=None if position is None else known[position],
        position=position,
        indices=asked,
        worker_id=manifest.worker_id,
        pid=manifest.pid,
        hint=_CHANGED,
    )
