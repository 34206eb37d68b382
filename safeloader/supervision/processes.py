"""Whether a process has ended, beyond what ``multiprocessing`` says. Runs in: main."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

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


class Signals:
    """Sends signals to one worker, and never to whoever got its number after it.

    Args:
        worker: a ``multiprocessing.Process`` that was started just now.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._pidfd = -1
        with suppress(AttributeError, OSError):  # not on this system, or too many open files
            self._pidfd = os.pidfd_open(worker.pid)

    def send(self, number: int) -> bool:
        """Send a real-time signal, if the worker lives and has a handler for it; whether it went.

        Without a handler the signal would end the worker, and ``number`` comes from the worker.
        """
        pid = self._worker.pid
        try:
            status = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2]
            handled = int(status.split()[0], 16) >> (number - 1) & 1
            if not (signal.SIGRTMIN <= number <= signal.SIGRTMAX and handled):
                return False
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, number)
            elif self._worker.is_alive():  # a child that nobody waited for keeps its number
                os.kill(pid, number)
            else:
                return False
        except (OSError, ValueError, IndexError):  # it ended just now
            return False
        return True

    def __del__(self, close: Any = os.close) -> None:
        # By an argument: at the interpreter's end the module's names are gone.
        if self._pidfd >= 0:
            close(self._pidfd)
