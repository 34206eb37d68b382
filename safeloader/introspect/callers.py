"""Which line of the user's code asks. Runs in: main."""

from __future__ import annotations

import functools
import os
import site
import sys
from types import FrameType

_NOT_THE_CALLER = frozenset(
    {"safeloader", "sitecustomize", "lightning", "lightning_fabric", "pytorch_lightning"}
)


@functools.cache
def _libraries() -> tuple[str, ...]:
    # Not by sysconfig, which loads all that Python was built with.
    return os.path.dirname(os.__file__), *site.getsitepackages()


def calling_line() -> str:
    """File and line of the user's code that made a loader, or iterates it.

    Where there is none among the callers, as in a process that a framework started, the program's
    file; of a program that is a library's, the library's line.
    """
    frame: FrameType | None = sys._getframe(1)
    first = "?"
    while frame:
        file, name = frame.f_code.co_filename, frame.f_globals.get("__name__", "")
        if name.split(".")[0] not in _NOT_THE_CALLER:
            here = f"{file}:{frame.f_lineno}"
            if not file.startswith(("<", *_libraries())):
                return here
            first = here if first == "?" else first
        frame = frame.f_back
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    return first if program is None or program.startswith(_libraries()) else program
