"""Forked processes that make a loader's batches with as little beside it as can be.

They bound what a loader with forked workers can reach. Neither records, checks or watches anything,
and an epoch that is left early leaves its processes behind.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import os
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

_ALIGNED = 64
_AHEAD = 2
"""Batches that a worker is asked for before the first of them came; torch's `prefetch_factor`."""
_ROOMS = 2
"""Of a worker: one holds the batch that is used, the other the one that is made."""

_LIBC = ctypes.CDLL(None)
_HEAP = (-3, 32 << 20), (-1, 256 << 20)
"""glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, as `safeloader.worker.heap` sets them.

Not taken from there: what is imported here the processes would inherit.
"""

Room = Callable[[tuple[int, ...], torch.dtype], Tensor | None]
"""Gives a tensor of this shape and type to write to; None where there is no room."""


class BareProcesses:
    """An epoch of a loader, but for all that is the loader's.

    As many processes as it has workers make the batches in memory of their own, which they fill
    again and again where samples are stacked. They hand nothing over to anybody, and end.
    """

    def __init__(self, dataset: Any, kwargs: dict[str, Any]) -> None:
        self.dataset = dataset
        self.collate = kwargs.get("collate_fn") or default_collate
        given = "batch_size", "shuffle", "generator"
        order = {name: kwargs[name] for name in given if name in kwargs}
        positions: Any = range(len(dataset))
        self.batches: list[list[int]] = list(DataLoader(positions, collate_fn=list, **order))
        # Of more processes than batches some would have nothing to do.
        self.processes = min(kwargs["num_workers"], len(self.batches))

    def run(self) -> None:
        """One epoch.

        Raises:
            RuntimeError: if a process failed, so that less was done.
        """
        self._join([self._fork(self._make_share, number) for number in range(self.processes)])

    def __iter__(self) -> Iterator[Any]:
        """One epoch, of which nothing comes."""
        self.run()
        return iter(())

    def _make_share(self, number: int) -> None:
        room = functools.cache(_fresh)
        for batch in self.batches[number :: self.processes]:
            self._make(batch, room)

    def _make(self, batch: Sequence[int], room: Room) -> Any:
        """Make this batch, what is stacked in what ``room`` gives."""
        samples = [self.dataset[index] for index in batch]
        if self.collate is not default_collate:
            return self.collate(samples)
        if type(samples[0]) is not tuple:
            return _column(samples, room)
        return [_column(column, room) for column in zip(*samples, strict=True)]

    def _fork(self, work: Callable[..., None], *arguments: Any) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            torch.set_num_threads(1)  # as in a loader's worker
            if hasattr(_LIBC, "mallopt"):
                for parameter, value in _HEAP:
                    _LIBC.mallopt(parameter, value)
            work(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def _join(self, pids: Sequence[int]) -> None:
        if any(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids):
            raise RuntimeError("a process that makes batches failed")


class LeanLoader(BareProcesses):
    """The same, with what a worker cannot do without: it is seeded, asked, and hands over.

    It is asked by a pipe, answers by another, and writes tensors to memory that it shares with
    main. That is taken once for all epochs, and a batch is whole until the next one is asked for.
    """

    def __init__(self, dataset: Any, kwargs: dict[str, Any]) -> None:
        super().__init__(dataset, kwargs)
        np.random.get_state()  # loads NumPy's random numbers, once for all processes
        first = self._make(self.batches[0], _fresh)
        bytes_of = sum(each.nbytes + _ALIGNED for each in _leaves(first) if _is_tensor(each))
        # A last batch may be smaller, one of padded texts larger.
        self._rooms = [
            [mmap.mmap(-1, 2 * bytes_of + _ALIGNED) for _ in range(_ROOMS)]
            for _ in range(self.processes)
        ]
        for memory in itertools.chain(*self._rooms):
            memory.write(bytes(len(memory)))

    def __iter__(self) -> Iterator[Any]:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        pids, ends = [], []
        for number in range(self.processes):
            here, there = Pipe()
            pids.append(self._fork(self._serve, number, seed, there, [here, *ends]))
            there.close()
            ends.append(here)
        asked = 0
        for seq in range(len(self.batches)):
            while asked < min(len(self.batches), seq + _AHEAD * self.processes):
                ends[asked % self.processes].send(self.batches[asked])
                asked += 1
            number = seq % self.processes
            try:
                room, is_list, parts = ends[number].recv()
            except EOFError:
                break
            memory = self._rooms[number][room]
            leaves = [part if at is None else _over(memory, at, *part) for at, part in parts]
            yield leaves if is_list else leaves[0]
        for end in ends:
            end.close()
        self._join(pids)

    def _serve(self, number: int, seed: int, end: Connection, not_mine: list[Connection]) -> None:
        for each in not_mine:
            each.close()
        random.seed(seed + number)
        torch.default_generator.manual_seed(seed + number)
        np.random.seed((seed + number) % 2**32)
        turn = 0
        while True:
            try:
                batch = end.recv()
            except EOFError:
                return
            end.send(self._written(batch, number, turn % _ROOMS))
            turn += 1

    def _written(self, batch: Sequence[int], number: int, turn: int) -> tuple[int, bool, Any]:
        memory = self._rooms[number][turn]
        places: dict[int, int] = {}
        free = 0

        def room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
            nonlocal free
            at, size = free, torch.Size(shape).numel() * dtype.itemsize
            if at + size > len(memory):
                return None
            free = -(-(at + size) // _ALIGNED) * _ALIGNED
            made = _over(memory, at, shape, dtype)
            places[made.data_ptr()] = at
            return made

        made = self._make(batch, room)
        parts: list[tuple[int | None, Any]] = []
        for leaf in _leaves(made):
            if _is_tensor(leaf) and leaf.data_ptr() not in places:
                copy = room(tuple(leaf.shape), leaf.dtype)
                leaf = leaf if copy is None else copy.copy_(leaf)
            at = places.get(leaf.data_ptr()) if _is_tensor(leaf) else None
            parts.append((at, leaf if at is None else (tuple(leaf.shape), leaf.dtype)))
        return turn, isinstance(made, list | tuple), parts


def _fresh(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _column(column: Sequence[Any], room: Room) -> Any:
    if not isinstance(column[0], Tensor):
        return default_collate(list(column))
    out = room((len(column), *column[0].shape), column[0].dtype)
    return torch.stack(list(column), out=out)


def _leaves(batch: Any) -> Sequence[Any]:
    return batch if isinstance(batch, list | tuple) else [batch]


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.numel() > 0


def _over(memory: mmap.mmap, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=at).view(shape)
