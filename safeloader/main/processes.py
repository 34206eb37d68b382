"""Whether a process is at its end, beyond what ``multiprocessing`` can say; runs in main."""

from __future__ import annotations

import os
import signal
from pathlib import Path

_EXITING = 0x4  # PF_EXITING of Linux, in the ninth field of /proc/<pid>/stat


def is_gone(pid: int) -> bool:
    """Whether there is no such process.

    Where the program ignores SIGCHLD the kernel forgets a child at once, and ``is_alive()``, which
    then has nobody to wait for, says that it lives.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is there, and another's
        return False
    return False


def is_dying(pid: int) -> bool:
    """Whether it was killed, or is exiting, and not done with it; False where nothing tells.

    The kernel may take a while to free the memory of one, or to let another run into its SIGKILL.
    """
    try:
        # The second field, the name, may hold anything; what follows its bracket does not.
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    if int(after_name[6]) & _EXITING:
        return True
    pending = [line for line in status.splitlines() if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(int(line.split()[1], 16) & 1 << (signal.SIGKILL - 1) for line in pending)
