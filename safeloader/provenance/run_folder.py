"""One process's folder in the folder of a run. Runs in: main.

::

    DIR/run.json                                       the launcher's
    DIR/attempt=0/rank=0/host-pid-boot-n/epochs.jsonl  an audit an epoch
                                         failures/     each failure

Nothing here ends a training: what cannot be written is said once.
"""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path
from typing import Any

from safeloader.failures import dump
from safeloader.failures.failure import Failure
from safeloader.failures.loader_log import LoaderLog, say
from safeloader.introspect.files import host_name, make_folder
from safeloader.introspect.ranks import rank

_BOOT = "/proc/sys/kernel/random/boot_id"


class RunFolder:
    """Where this process writes.

    Args:
        run: the folder of the run.
        attempt: its number: a run that is started again goes on in the same folder.
    """

    def __init__(self, run: str, attempt: int) -> None:
        self._fd = -1
        parent = Path(run) / f"attempt={attempt}" / f"rank={rank() or 0}"
        try:
            boot = Path(_BOOT).read_text()[:8]
        except OSError:
            boot = "boot"
        try:
            make_folder(parent)
            self.path = _new_folder(parent, f"{host_name()}-{os.getpid()}-{boot}")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._fd = _not_stderr(os.open(self.path / "epochs.jsonl", flags, 0o600))
            weakref.finalize(self, os.close, self._fd).atexit = False
        except OSError as exc:
            self._broken(exc)

    def epoch(self, what: dict[str, Any]) -> None:
        """Append a line: an epoch begins (its audit is null), or its audit."""
        if self._fd < 0:
            return
        try:
            os.write(self._fd, (json.dumps(what) + "\n").encode())
        except (OSError, ValueError) as exc:
            self._broken(exc)

    def failed(self, failure: Failure, log: LoaderLog) -> None:
        """Write a failure as a file of its own, which a line in the loader's log names."""
        if self._fd >= 0:
            dump.write(failure, self.path / "failures", log)

    def _broken(self, exc: BaseException) -> None:
        self._fd = -1
        say(f"safeloader: nothing more is written for this run: {exc}")


def _not_stderr(fd: int) -> int:
    """The file under a number above 2: in a program that has closed these, lines for stderr would
    go into it."""
    low = []
    while fd <= 2:
        low.append(fd)
        fd = os.dup(fd)
    for each in low:
        os.close(each)
    return fd


def _new_folder(parent: Path, stem: str) -> Path:
    number = 0
    while True:
        path = parent / f"{stem}-{number}"
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            number += 1
        else:
            return path
