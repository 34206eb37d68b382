"""A sealed batch opened, and its slots given back when nobody has it any more; runs in main.

::

    message ──► which slots ──► a lease of each ──► tensors and arrays over them ──► the loop
                                   │
                                   └── the last one of a batch goes ──► FREE: written to again

A lease is the memory of a slot for the time of one batch. Everything that is made over it holds it:
tensors, arrays, slices and views of them, in whatever order they are let go of. It frees the slot
in the process that opened the batch alone. A child that is forked meanwhile keeps its views, so a
slot that is lent at that moment is never written to again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from safeloader._python import at_fork
from safeloader.main.transport import TransportTally
from safeloader.wire.anonymous import mapped
from safeloader.wire.failure import Failure, failure_of
from safeloader.wire.leaves import opening
from safeloader.wire.records import FailedBatch, Papers, Parcel, asked_for
from safeloader.wire.sealing import Sealed
from safeloader.wire.shortage import shortage
from safeloader.wire.slots import FREE, GONE, Cargo, SlotTable

WORKER_GONE = (ConnectionError, EOFError, FileNotFoundError)  # the tensors' memory went with it


class Unpacker:
    """Opens the batches of one pool of workers.

    Args:
        table: the states of the workers' slots; None without slots.
        tally: where it is counted what came which way.
    """

    def __init__(self, table: SlotTable | None = None, tally: TransportTally | None = None) -> None:
        self._table = table
        self._tally = TransportTally() if tally is None else tally
        self._slots: dict[tuple[int, int], _Slot] = {}
        _unpackers.add(self)

    def opened(self, sealed: Sealed) -> Parcel | FailedBatch:
        """The batch; a failure in its place if it cannot be loaded here. Hot path."""
        fields, about = pickle.loads(sealed.papers)
        papers = Papers(*fields)
        cargo = Cargo(*about)
        before = opening.begin(sealed.fds)
        try:
            if cargo.slots or cargo.given_up:
                self._lease(papers.worker_id or 0, cargo)
            stream = cargo.stream
            if stream is None:
                payload = pickle.loads(sealed.payload)
            else:
                slot, at, size = stream
                payload = pickle.loads(memoryview(opening.leases[slot])[at : at + size])
        except Exception as exc:
            return FailedBatch(papers, _not_opened(exc, papers))
        finally:
            opening.end(before)
        self._tally.came(cargo)
        return Parcel(papers, payload)

    def _lease(self, worker: int, cargo: Cargo) -> None:
        """Lease the slots that a batch lies in; those that come for the first time are mapped.

        Raises:
            OSError: if a descriptor was lost on the way: there were too many open files here.
            RuntimeError: if a slot cannot be mapped.
        """
        slots = self._slots
        for number in cargo.given_up:
            slots.pop((worker, number), None)
        try:
            if cargo.fresh:
                self._map_fresh(worker, cargo)
            opening.leases += [slots[worker, number].leased() for number, _ in cargo.slots]
        except BaseException:  # the worker must not think that they are known here
            assert self._table is not None
            for number, _ in cargo.slots:
                slots.pop((worker, number), None)
                self._table.row(worker)[number] = GONE
            raise

    def _map_fresh(self, worker: int, cargo: Cargo) -> None:
        assert self._table is not None
        row = self._table.row(worker)
        fds = opening.fds
        if len(fds) < cargo.fds:
            raise OSError(errno.EMFILE, "a slot's file descriptor was lost on the way")
        for place in reversed(cargo.fresh):
            number, size = cargo.slots[place]
            memory = mapped(fds[-1], size)
            os.close(fds.pop())
            self._slots[worker, number] = _Slot(row, number, memory, self._tally)

    def forking(self) -> None:
        """What is lent now will be seen by a child for as long as it lives."""
        for slot in list(self._slots.values()):
            slot.forked = slot.forked or slot.is_lent


class _Slot:
    """A slot, seen from main.

    Attributes:
        is_lent: whether a batch in it is referred to.
        forked: a process was forked while it was lent: it must not be written to again.
    """

    def __init__(self, row: memoryview, number: int, memory: Any, tally: TransportTally) -> None:
        self._row = row
        self._number = number
        self._memory = memory
        self._tally = tally
        self._pid = os.getpid()
        self.is_lent = False
        self.forked = False
        tally.slot_made(len(memory))

    def leased(self) -> _Lease:
        """The memory for the time of one batch."""
        lease = _Lease(len(self._memory), np.uint8, self._memory)
        lease.slot = self
        self.is_lent = True
        return lease

    def given_back(self, getpid: Callable[[], int] = os.getpid) -> None:
        """Nothing refers to the batch any more."""
        # By an argument: at the interpreter's end the module's names are gone.
        if getpid() == self._pid:
            self.is_lent = False
            self._row[self._number] = GONE if self.forked else FREE

    def __del__(self, getpid: Callable[[], int] = os.getpid) -> None:
        if getpid() == self._pid:
            self._tally.slot_gone(len(self._memory))


class _Lease(np.ndarray[Any, Any]):
    """The memory of a slot for one batch; gives it back when it is freed."""

    slot: _Slot | None = None  # of the lease itself; arrays cut from it have none

    def __del__(self) -> None:
        if self.slot is not None:
            self.slot.given_back()


_unpackers: weakref.WeakSet[Unpacker] = weakref.WeakSet()


def _at_fork() -> None:
    with contextlib.suppress(Exception):  # a fork is not ours to fail
        for unpacker in list(_unpackers):
            unpacker.forking()


# Before, for what is lent then; and once more for what another thread was given meanwhile.
at_fork(before=_at_fork, after_in_parent=_at_fork)


def _not_opened(exc: Exception, papers: Papers) -> Failure:
    known = asked_for(papers)
    found = shortage(exc)
    if found is None:
        found = (
            "the batch was pickled in the worker and could not be loaded in the main process\n"
            "pickle.loads(pickle.dumps(batch)) repeats it: make what the dataset or collate_fn "
            "gives picklable both ways, or plain tensors, numbers, strings and containers of them"
        )
    return failure_of(
        exc,
        phase="transport",
        where="while loading a batch in the main process",
        index=known[0] if len(known) == 1 else None,
        position=0 if len(known) == 1 else None,
        indices=known,
        worker_id=papers.worker_id,
        pid=papers.pid,
        hint=found,
    )
