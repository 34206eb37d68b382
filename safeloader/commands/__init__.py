"""What ``python -m safeloader`` can do, a file for each command. Runs in: main.

The exit status of every command but ``run``, which ends as its program does:

=====  ==========================================================================================
0      it is so, or was done: the run is read, each index came once, the sample came
1      the answer is no, or cannot be told: not exactly once, no such step or index, the sample
       fails again
2      the words of the command line, a folder or a file are not what they should be, or a library
       is missing; one sentence on stderr says which
130    Ctrl-C
=====  ==========================================================================================
"""

from __future__ import annotations

import os
import traceback

FINE, NO, BAD_INPUT = 0, 1, 2


class BadInput(Exception):
    """What was given cannot be used: one sentence says why, and what to give."""


def fault_of_ours(exc: BaseException) -> str:
    """What is said in the place of a traceback: the fault, and where it was met."""
    place = traceback.extract_tb(exc.__traceback__)[-1:]
    where = "".join(f" ({os.path.basename(k.filename)}, line {k.lineno})" for k in place)
    return (
        "this is a fault of safeloader's own, or a file is damaged in a way that it does not know; "
        f"please report it: {type(exc).__name__}: {' '.join(str(exc).split())[:200]}{where}"
    )
