"""The processes that the tests start, and what these hold of the machine.

Other programs run beside the tests, and other runs of the same tests. What is counted here is of
this process and of those that it has started: shared memory by the process in its name.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import pytest

SHARED = Path("/dev/shm")
# Of tensors and arrays, by the process that made them; joblib, once imported, names semaphores so.
_NAMES = re.compile(r"(?:torch_|pym-|sem\.loky-)(\d+)[-_]")

_head = os.getpid()
_started: set[int] = {_head}
_start = BaseProcess.start


def watch() -> None:
    """Note the processes that are started from now on, and name their semaphores.

    ``multiprocessing`` numbers semaphores at random. A process hands the beginning of their names
    down to those that it starts, so all of one family begin alike.
    """

    def start(process: BaseProcess) -> None:
        _start(process)
        assert process.pid is not None
        _started.add(process.pid)

    _put(BaseProcess, "start", start)
    config: dict[str, Any] = vars(multiprocessing.current_process())["_config"]
    config["semprefix"] = f"/mp-{os.getpid()}"


def start_none() -> None:
    """End each test at the first process that it starts, as skipped."""

    def refuse(*_: object, **__: object) -> NoReturn:
        pytest.skip("starts a process")

    _put(BaseProcess, "start", refuse)
    _put(subprocess.Popen, "__init__", refuse)


def _put(owner: type, name: str, function: Any) -> None:
    setattr(owner, name, function)  # of the process that runs the tests, for as long as it lives


def shared_memory() -> frozenset[str]:
    """The files in ``/dev/shm`` of this process and of those that it has started."""
    if not SHARED.is_dir():
        return frozenset()
    # Semaphores begin with the head's number alone: another run of the tests may have the number of
    # one of the thousands of processes that this one has started.
    semaphores = f"sem.mp-{_head}-"
    found = ((_NAMES.match(name), name) for name in os.listdir(SHARED))
    return frozenset(
        name
        for match, name in found
        if name.startswith(semaphores) or (match and int(match[1]) in _started)
    )
