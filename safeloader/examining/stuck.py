"""Whether processes that say nothing hang, or only take long. Runs in: main.

What uses a processor works. What uses none may wait for a disk, a network, a clock; but where it
waits for a lock, with no end to that, and so do all of its threads, nobody is left to open it.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), -1)  # its number as a system call
_TIMEOUT = 4  # the place of that argument in /proc/<pid>/syscall, behind the number


def processor_s(pids: Iterable[int]) -> float:
    """Seconds that these processes, and children of theirs that have ended, used of a processor."""
    import psutil

    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            total += sum(psutil.Process(pid).cpu_times()[:4])  # the children's are the last two
    return total


def is_deadlocked(pid: int) -> bool:
    """Whether all threads of a process wait for locks, and the first without an end to it.

    False where the system does not tell: that needs Linux.

    >>> import os
    >>> is_deadlocked(os.getpid())
    False
    """
    threads = list(_waits(pid))
    return bool(threads) and threads[0] == "for ever" and "" not in threads


def _waits(pid: int) -> Iterator[str]:
    """Of each thread, the first one first: ``"for ever"`` or ``"a while"`` for a lock, else ""."""
    try:
        tasks = sorted(int(each.name) for each in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return
    for task in tasks:
        try:
            called = Path(f"/proc/{pid}/task/{task}/syscall").read_text().split()
        except OSError:
            yield ""
            continue
        if called[0] != str(_FUTEX):
            yield ""
        else:
            yield "for ever" if int(called[_TIMEOUT], 16) == 0 else "a while"
