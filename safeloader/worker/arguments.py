"""What workers are started with, pickled once for all of them. Runs in: both.

Under spawn and forkserver ``multiprocessing`` pickles dataset, ``collate_fn`` and
``worker_init_fn`` anew for each worker, and waits until that worker has read them. Here they are
pickled once, into an anonymous file, and all workers read it at the same time, from a mapping::

    main                                             each worker
    Arguments(args) ── pickled once ──► file ──────► mapped, unpickled, unmapped
        └─ what is of one process alone: handles ──► pickled with the process, as ever

A handle (the descriptor of a shared tensor, of a connection) is given to one process, so what holds
one is left *aside*: the pickle names its place in a list, which goes with each process as
``multiprocessing`` has it. Only types that are known to hold nothing else are put aside. Whatever
else asks for the process that is being started, or has a reducer that nobody here knows, has the
arguments pickled for each worker. So has any error: then the words are Python's own.
"""

from __future__ import annotations

import mmap
import multiprocessing
import multiprocessing.heap
import operator
import os
import socket
import weakref
from collections.abc import Callable, Iterable
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess, SpawnProcess
from typing import Any, NoReturn

import torch

from safeloader._python import (
    DupFd,
    ForkingPickler,
    HandleReceivedOnce,
    as_if_spawning,
    at_fork,
    extra_reducers,
    has_own_pickler,
)
from safeloader.transport.shared_memory import anonymous_file

_ATOMS = (int, bool, type(None))  # what each process may have another of; no more than a few bytes
_KNOWN = ("multiprocessing.", "torch.multiprocessing.")  # whose reducers we have read
# Of those, what stands for a handle and refers to no object of the user's.
_HANDLES: tuple[type, ...] = (
    torch.Tensor,
    torch.UntypedStorage,
    torch.cuda.Event,
    socket.socket,
    connection.Connection,
    multiprocessing.heap.Arena,
)
_STARTED = (multiprocessing.Process, SpawnProcess, ForkServerProcess)

_alive: weakref.WeakSet[_Pickled] = weakref.WeakSet()


def are_pickled(process: Any) -> bool:
    """Whether this class of processes pickles its arguments with Python's own pickler."""
    return process in _STARTED and has_own_pickler()


class Arguments:
    """The arguments of a pool's processes; the first ones are those of all.

    Args:
        apart: the types of ours that belong to one process each.
    """

    def __init__(self, apart: Iterable[type]) -> None:
        self._apart = set(apart)
        self._first: tuple[Any, ...] | None = None
        self._parts: dict[int, _Part] = {}
        self._pickled: _Pickled | None = None

    def __call__(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a process is given instead of ``args``: the same, where they are not pickled once.

        Raises:
            BaseException: what is no ``Exception``, as an interrupt, out of the pickling.
        """
        if self._first is None:
            self._first = args
            self._pickle(args)
        parts = self._parts
        if (
            not parts
            or len(args) != len(self._first)
            or any(args[k] is not self._first[k] for k in parts)
        ):
            return args
        return tuple(parts.get(k, each) for k, each in enumerate(args))

    def _pickle(self, args: tuple[Any, ...]) -> None:
        shared = [k for k, each in enumerate(args) if type(each) not in {*_ATOMS, *self._apart}]
        self._pickled = _pickled([args[k] for k in shared], self._apart)
        if self._pickled is not None:
            self._parts = {k: _Part(self._pickled, at) for at, k in enumerate(shared)}

    def close(self) -> None:
        """Let go of the memory: all processes have been started, or none will be."""
        if self._pickled is not None:
            self._pickled.close()
        self._first, self._parts, self._pickled = (), {}, None


class _Part:
    """Stands for one of the arguments; is that argument where it is unpickled."""

    def __init__(self, whole: _Pickled, at: int) -> None:
        self._whole, self._at = whole, at

    def __reduce__(self) -> Any:
        return operator.getitem, (self._whole, self._at)


class _Pickled:
    """A pickle in an anonymous file; is what was pickled where it is unpickled."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.aside: list[Any] = []
        _alive.add(self)

    def __reduce__(self) -> Any:
        return _unpickled, (DupFd(self._fd), os.fstat(self._fd).st_size, self.aside)

    def close(self, close: Callable[[int], None] = os.close) -> None:
        # By an argument: at the interpreter's end the module's names are gone.
        fd, self._fd = self._fd, -1
        self.aside = []
        if fd >= 0:
            close(fd)

    __del__ = close


def _let_go() -> None:
    """In a forked process: another one may have been started in the middle of this."""
    for each in list(_alive):
        each.close()


at_fork(after_in_child=_let_go)


# ---- in main


def _pickled(values: list[Any], apart: set[type]) -> _Pickled | None:
    """The values in one pickle; None if that cannot be, whatever the reason.

    Each process then pickles them for itself, and raises what there is to raise.
    """
    whole = None
    spawning = _NoProcess()
    try:
        whole = _Pickled(anonymous_file(0))
        # The file's own place is for the writer alone: readers have a mapping.
        with open(whole._fd, "wb", closefd=False) as file, as_if_spawning(spawning):
            pickler = ForkingPickler(file)
            pickler.dispatch_table = _dispatch_table(pickler, whole.aside, apart, spawning)
            pickler.dump(values)
    except Exception:
        spawning.asked = True
    except BaseException:
        if whole is not None:
            whole.close()
        raise
    if spawning.asked and whole is not None:
        whole.close()
    return None if spawning.asked else whole


class _NoProcess:
    """Is taken for the process that is being started, and notes whether anybody asks it.

    It is noted because code of the user's may catch what is raised.
    """

    asked = False

    def __getattr__(self, name: str) -> NoReturn:
        self.refuse(name)

    def refuse(self, asking: object) -> NoReturn:
        self.asked = True
        raise TypeError(f"belongs to one process: {asking}")


def _dispatch_table(
    pickler: Any, aside: list[Any], apart: set[type], spawning: _NoProcess
) -> dict[type, Any]:
    """The pickler's own reducers, but for those of handles and those that nobody here knows."""

    def leave(value: Any) -> Any:
        aside.append(value)
        return _taken, (len(aside) - 1,)

    table: dict[type, Any] = dict(pickler.dispatch_table)
    for cls, reducer in extra_reducers.items():
        if not str(getattr(reducer, "__module__", "")).startswith(_KNOWN):
            table[cls] = spawning.refuse
        elif isinstance(cls, type) and issubclass(cls, _HANDLES):
            table[cls] = leave
    # One that is met was made by code of the user's, and can be received once.
    table[HandleReceivedOnce] = spawning.refuse
    return table | dict.fromkeys(apart, leave)


# ---- in a worker

_at_hand: list[list[Any]] = []  # what was left aside, while the rest is unpickled


def _taken(at: int) -> Any:
    return _at_hand[-1][at]


def _unpickled(file: Any, size: int, aside: list[Any]) -> list[Any]:
    fd = file.detach()
    try:
        mapping = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
    finally:
        os.close(fd)
    _at_hand.append(aside)
    try:
        # What is unpickled is this process's own: arrays and bytes are copied out of the mapping.
        with mapping, memoryview(mapping) as memory:
            values: list[Any] = ForkingPickler.loads(memory)
    finally:
        _at_hand.pop()
    return values
