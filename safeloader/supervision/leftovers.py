"""Removes what a killed worker left behind. Runs in: main."""

from __future__ import annotations

import contextlib
import glob
import os
import time
from collections.abc import Iterable
from typing import Any

import torch.multiprocessing

from safeloader._python import pipes_left

_OLD_S = 0.02  # in a folder shared with other containers, a process of the same number may be alive


def remove(pids: Iterable[int | None]) -> None:
    """Remove the files in ``/dev/shm`` of these processes, which must have ended.

    Torch makes a file there for each tensor it shares and takes its name away at once. A worker
    killed between the two leaves the file, and its memory, until the machine is started again.
    """
    strategy: Any = torch.multiprocessing.get_sharing_strategy
    if strategy() != "file_descriptor":
        return  # its files keep their names, and may be in use
    for pid in pids:
        for path in glob.glob(f"/dev/shm/torch_{pid}_*"):
            with contextlib.suppress(OSError):
                if time.time() - os.stat(path).st_ctime < _OLD_S:
                    time.sleep(_OLD_S)  # one that is alive has taken the name away by then
                os.unlink(path)


def close_pipes(raised: BaseException) -> None:
    """Close the pipes made for a worker that could then not be started."""
    for fd in pipes_left(raised):
        os.close(fd)
