"""Failures as JSON files, for those who look later. Runs in: main."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safeloader._version import __version__
from safeloader.failures.failure import Failure
from safeloader.introspect.files import create, folder_of
from safeloader.introspect.resources import machine_lines

_LOG = logging.getLogger("safeloader")
Log = logging.Logger | logging.LoggerAdapter[logging.Logger]


def write(
    failure: Failure, folder: str | os.PathLike[str], log: Log = _LOG, *, tell: bool = True
) -> Path | None:
    """Write ``failure`` as a file of its own, which a line in the log names; None if that fails.

    ``tell``: whether the line is written.

    That nothing can be written is said once for a folder.
    """
    content: dict[str, Any] = {
        "failure": failure.to_dict(),
        "report": str(failure),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {
            "safeloader": __version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        "machine": machine_lines(),
    }
    part: Path | None = None
    target = folder_of(folder)
    try:
        stem = time.strftime("failure-%Y%m%dT%H%M%S")
        fd, part = create(target, stem, ".part", also=".json")
        with open(fd, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        path = part.replace(part.with_suffix(".json"))
    except (OSError, ValueError, TypeError) as exc:
        if target not in _told:
            _told.add(target)
            log.warning("the failure could not be written to %s: %s", target, str(exc))
        with contextlib.suppress(OSError):
            if part is not None:
                part.unlink(missing_ok=True)
        return None
    _told.discard(target)
    if tell:
        log.warning("the failure is written to %s", path)
    return path


_told: set[Path] = set()  # folders that could not be written to
