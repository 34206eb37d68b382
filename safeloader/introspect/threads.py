"""The threads of this process, by whose they are: none of them survives a fork. Runs in: main."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

from safeloader.introspect.advice import library_of_thread
from safeloader.introspect.resources import or_none
from safeloader.introspect.texts import plain_text
from safeloader.introspect.values import type_name

_THREADS_MAX = 256  # looked at
_NAMES_MAX = 3  # told of one library


def threads_here() -> dict[str, tuple[str, ...]]:
    """Return the names of threads by the library that they are of; "Python" of Python's own.

    A native thread has the name of its process, as most of OpenMP's and BLAS's do, unless its
    library gave it one; of these nothing is said.

    >>> "polars" in threads_here()
    False
    """
    found: dict[str, list[str]] = {}
    for thread in threading.enumerate()[:_THREADS_MAX]:
        if thread is not threading.main_thread() and thread is not threading.current_thread():
            name = str(vars(thread).get("_name"))
            if name.startswith("safeloader"):  # ours, which take no lock of anybody's
                continue
            library = library_of_thread(name[:15])
            if not library:
                library, kind = "Python", type_name(type(thread))
                name += "" if kind == "threading.Thread" else f" ({kind})"
            found.setdefault(library, []).append(name)
    for name in _native_names() or ():
        if library := library_of_thread(name):
            found.setdefault(library, []).append(name)
    return {library: _few(names) for library, names in found.items()}


def _few(names: list[str]) -> tuple[str, ...]:
    names = sorted(set(names))
    left = len(names) - _NAMES_MAX
    shown = names if left < 2 else names[:_NAMES_MAX]
    return tuple([plain_text(name, 60) for name in shown] + [f"{left} more"] * (left > 1))


@or_none  # no such folder but on Linux, or it is not to be read
def _native_names() -> list[str]:
    names = []
    for thread in os.listdir("/proc/self/task")[:_THREADS_MAX]:
        with suppress(OSError):  # it has ended
            fd = os.open(
                f"/proc/self/task/{thread}/comm", os.O_RDONLY
            )  # 3 us; a text file takes 20
            try:
                names.append(os.read(fd, 32).decode("utf-8", "replace").strip())
            finally:
                os.close(fd)
    return names
