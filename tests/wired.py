"""Both ends of the transport in one process: a worker's packer, the training process's unpacker."""

from __future__ import annotations

import ctypes
import os
import signal
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data._utils.collate import collate_tensor_fn

from safeloader.delivery.indices import pack
from safeloader.delivery.manifest import BatchManifest
from safeloader.transport.channel import Arrived
from safeloader.transport.messages import BatchMessage, DeliveredBatch, FailedBatch
from safeloader.transport.packing import Packer
from safeloader.transport.slot_reader import Unpacker
from safeloader.transport.slot_table import MAY_HOLD, SlotTable
from safeloader.transport.slot_writer import SlotPool
from safeloader.transport.stats import TransportCounts, TransportStats

SLOTS = 128
KB = 1 << 10
MB = 1 << 20


def manifest(seq: int = 0) -> BatchManifest:
    return BatchManifest(seq, 0, os.getpid(), pack([seq]), 1, None, b"\0" * 24, False, None)


def opened_from(unpacker: Unpacker, sealed: BatchMessage) -> DeliveredBatch | FailedBatch:
    """As the queue in main has it opened."""
    message = Arrived(0, *sealed[:2])
    message.fds = list(sealed.fds)
    opened = unpacker.opened(message)
    message.let_go()
    return opened


class Wired:
    """A worker's end and main's."""

    def __init__(self, most_bytes: int = 64 * MB) -> None:
        self.table = SlotTable(1, SLOTS)
        self.table.share(0)[MAY_HOLD] = most_bytes
        self.cells = self.table.row(0)
        self.pool = SlotPool(self.table, 0)
        self.packer = Packer(self.pool)
        assert self.packer._slots is not None
        self.batch = self.packer._slots
        self.counts = TransportCounts()
        self.unpacker = Unpacker(self.table, self.counts)
        self.sent = 0

    def begin(self) -> None:
        """A batch begins in the worker; main waits for it."""
        self.unpacker.settle(all_of_them=True)
        self.packer.begin()
        self.packer.collates()

    def stack(self, samples: list[torch.Tensor]) -> torch.Tensor:
        """As ``default_collate`` does it in a worker."""
        made: torch.Tensor = self.packer._stack(collate_tensor_fn, samples)
        return made

    def seal(self, batch: Any) -> BatchMessage:
        self.sent += 1
        return self.packer.seal(manifest(self.sent), batch)

    def open(self, sealed: BatchMessage) -> Any:
        """The batch; what went wrong is raised."""
        came = opened_from(self.unpacker, sealed)
        if isinstance(came, FailedBatch):
            assert came.failure is not None
            raise NotOpened(came.failure.exception_type, came.failure.message, came.failure.hint)
        assert type(came) is DeliveredBatch
        return came.payload

    def send(self, batch: Any) -> Any:
        """A batch from the one end to the other."""
        self.begin()
        return self.open(self.seal(batch))

    def collated(self, samples: list[torch.Tensor]) -> Any:
        self.begin()
        return self.open(self.seal(self.stack(samples)))

    @property
    def states(self) -> list[int]:
        """Of the slots that the worker has, in order, as it finds them when main waits."""
        self.unpacker.settle(all_of_them=True)
        return [self.cells[number] for number in sorted(self.pool._slots)]

    @property
    def stats(self) -> TransportStats:
        return self.counts.stats()


class NotOpened(Exception):
    pass


def filled(size: int, value: int) -> torch.Tensor:
    return torch.full((size,), value % 251, dtype=torch.uint8)


def print_of(held: Any) -> int:
    if isinstance(held, torch.Tensor):
        held = held.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return zlib.crc32(np.ascontiguousarray(held))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def fork_in_c() -> int:
    """As a library may do it: none of Python's hooks runs."""
    return int(ctypes.PyDLL(None).fork())


class Child:
    """A process forked now, which runs ``look`` when it is asked, and ends."""

    def __init__(
        self,
        look: Callable[[], bool],
        end: Callable[[int], Any] = os._exit,
        fork: Callable[[], int] = os.fork,
    ) -> None:
        reader, self._writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            self.pid = fork()
        if self.pid:
            os.close(reader)
            return
        status = 9
        try:
            signal.alarm(60)  # its default action is to end the process
            torch.set_num_threads(1)  # OpenMP does not outlive a fork
            os.close(self._writer)
            os.read(reader, 1)
            status = 0 if look() else 1
        finally:
            try:
                end(status)
            finally:
                os._exit(status)

    def agrees(self) -> bool:
        """Let it look; whether all was as it should be."""
        os.write(
            self._writer, b"?"
        )  # children forked since have this end too: closing says nothing
        os.close(self._writer)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status) == 0


@contextmanager
def child(look: Callable[[], bool], fork: Callable[[], int] = os.fork) -> Iterator[None]:
    """A process that lives beside what is done meanwhile, and then looks."""
    forked = Child(look, fork=fork)
    try:
        yield
    finally:
        agreed = forked.agrees()
    assert agreed


__all__ = [
    "KB",
    "MB",
    "SLOTS",
    "Child",
    "NotOpened",
    "Wired",
    "child",
    "descriptors",
    "filled",
    "fork_in_c",
    "manifest",
    "print_of",
]
