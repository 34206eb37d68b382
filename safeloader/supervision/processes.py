"""Processes of workers: have they ended, signals to them, what they leave. Runs in: main."""

from __future__ import annotations

import glob
import os
import select
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.multiprocessing

_OLD_S = 0.02  # in a folder shared with other containers, a process of the same number may be alive
_EXITING = 0x4  # PF_EXITING of Linux, in the ninth field of /proc/<pid>/stat


def is_gone(pid: int) -> bool:
    """Whether there is no such process.

    Where the program ignores SIGCHLD the kernel forgets a child at once. ``is_alive()`` then has
    nobody to wait for, and says that it lives.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is there, and another's
        return False
    return False


def is_dying(pid: int) -> bool:
    """Whether a process was killed, or is exiting, and still there; False where nothing tells.

    The kernel may need a while to free its memory, or to let it run into its SIGKILL.
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
        self._pidfd: Any = None
        with suppress(AttributeError, OSError):  # not on this system, or too many open files
            # An epoll object closes its descriptor in C, where no signal handler can raise.
            self._pidfd = select.epoll.fromfd(os.pidfd_open(worker.pid))

    def send(self, number: int) -> bool:
        """Send a real-time signal, if the worker lives and handles it; return whether it was sent.

        Without a handler the signal would end the worker, and ``number`` comes from the worker.
        """
        pid = self._worker.pid
        try:
            status = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2]
            handled = int(status.split()[0], 16) >> (number - 1) & 1
            if not (signal.SIGRTMIN <= number <= signal.SIGRTMAX and handled):
                return False
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd.fileno(), number)
            elif self._worker.is_alive():  # a child that nobody waited for keeps its number
                os.kill(pid, number)
            else:
                return False
        except (OSError, ValueError, IndexError):  # it ended just now
            return False
        return True


def remove_files_of(pids: Iterable[int | None]) -> None:
    """Remove the files in ``/dev/shm`` of these processes, which must have ended.

    Torch makes a file there for each tensor it shares and takes its name away at once. A worker
    killed between the two leaves the file, and its memory, until the machine is started again.
    """
    strategy: Any = torch.multiprocessing.get_sharing_strategy
    if strategy() != "file_descriptor":
        return  # its files keep their names, and may be in use
    for path in [path for pid in pids for path in glob.glob(f"/dev/shm/torch_{pid}_*")]:
        with suppress(OSError):
            if time.time() - os.stat(path).st_ctime < _OLD_S:
                time.sleep(_OLD_S)  # a living process has taken the name away by then
            os.unlink(path)
