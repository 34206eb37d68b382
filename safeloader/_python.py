"""Every private name of the standard library that safeloader touches. Runs in: both.

Looking for them never fails, so that without workers any system will do. What workers need and this
Python or this system lacks is named by :func:`missing`; its stand-in here is None.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler as ForkingPickler
from typing import Any

_missing: list[str] = []


def find(module: str, path: str, missing: list[str]) -> Any:
    """What stands at ``path`` in ``module``; None where nothing does, which ``missing`` is told."""
    try:
        return operator.attrgetter(path)(importlib.import_module(module))
    except (ImportError, AttributeError):
        missing.append(f"{module}.{path}")


def missing() -> tuple[str, ...]:
    """The names that loaders with workers need and that are not there."""
    return tuple(_missing)


def runs_threads_at_once() -> bool:
    """Whether this Python was built without the global lock, and runs without it."""
    has_lock: Callable[[], bool] = getattr(sys, "_is_gil_enabled", lambda: True)
    if has_lock():
        return False
    import sysconfig  # here: where it may be so alone

    return bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


_find = functools.partial(find, missing=_missing)
assert_spawning: Any = _find("multiprocessing.context", "assert_spawning")
DupFd: Any = _find("multiprocessing.reduction", "DupFd")
extra_reducers: Any = _find("multiprocessing.reduction", "ForkingPickler._extra_reducers")
HandleReceivedOnce: Any = _find("multiprocessing.resource_sharer", "DupFd")
Finalize: Any = _find("multiprocessing.util", "Finalize")
_get_popen: Any = _find("multiprocessing.context", "get_spawning_popen")
_set_popen: Any = _find("multiprocessing.context", "set_spawning_popen")
_launch: Any = _find("multiprocessing.popen_fork", "Popen._launch.__code__")
_connect: Any = _find("multiprocessing.forkserver", "ForkServer.connect_to_new_process.__code__")
_PIPES = ("parent_r", "child_w", "child_r", "parent_w")  # local variables of both
_missing += [
    f"{code.co_qualname}.<locals>.{name}"
    for code in (_launch, _connect)
    for name in _PIPES
    if code is not None and name not in code.co_varnames
]
for _path in (  # public, and not everywhere
    "os.register_at_fork",
    "os.set_blocking",
    "select.poll",
    "signal.SIGCHLD",
    "signal.SIGKILL",
    "socket.CMSG_SPACE",
    "socket.SCM_RIGHTS",
):
    _find(*_path.split("."))


def has_own_pickler() -> bool:
    """Whether processes are started with Python's own pickler; a program may put in another."""
    return find("multiprocessing.reduction", "ForkingPickler", []) is ForkingPickler


def environment(name: str) -> str:
    """What a variable of the environment holds; empty where it is not set.

    As ``os.environ.get`` tells, which raises and catches twice where there is none: each epoch
    begins with some, and 2 µs each.
    """
    held = getattr(os.environ, "_data", None)
    if type(held) is dict and _encoded(name) not in held:
        return ""
    return os.environ.get(name, "")


_encoded = functools.cache(getattr(os.environ, "encodekey", str))


def at_fork(**hooks: Callable[[], None]) -> None:
    """``os.register_at_fork``, where processes fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(**hooks)


@contextlib.contextmanager
def as_if_spawning(popen: Any) -> Iterator[None]:
    """Have ``multiprocessing`` believe that this thread starts a process by ``popen``.

    What is pickled then gives descriptors to ``popen.duplicate_for_child`` and ``popen.DupFd``.
    """
    before = _get_popen()
    _set_popen(popen)
    try:
        yield
    finally:
        _set_popen(before)


def close_pipes(raised: BaseException) -> None:
    """Close the pipes made for a process that could then not be started.

    ``multiprocessing`` leaves them open, and a program that tries again has fewer each time.
    """
    for frame, _ in traceback.walk_tb(raised.__traceback__):
        names = frame.f_locals
        if frame.f_code is _launch:
            open_still = not hasattr(names["self"], "pid")  # else they are the worker's
        elif frame.f_code is _connect:
            open_still = "child_r" not in names  # else it closes them itself
        else:
            continue
        for name in _PIPES:
            if open_still and name in names:
                os.close(names[name])


def spawn_preparation() -> dict[str, Any]:
    """What a process started by spawn is told of this one: its paths, and where ``__main__`` is."""
    from multiprocessing import spawn

    told: dict[str, Any] = spawn.get_preparation_data("safeloader")
    return told


def prepare_spawned(told: dict[str, Any]) -> None:
    """Make this process like the one that :func:`spawn_preparation` told of."""
    from multiprocessing import process, spawn

    current: Any = process.current_process()
    current._inheriting = True
    try:
        spawn.prepare(told)
    finally:
        del current._inheriting


def is_being_prepared() -> bool:
    """Whether this is a process started by spawn, in which the program is imported once more."""
    from multiprocessing import process

    return bool(getattr(process.current_process(), "_inheriting", False))
