"""Failures as JSON files, for those who look later; runs in main."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safeloader._version import __version__
from safeloader.main.folders import see_writable
from safeloader.wire.failure import Failure
from safeloader.wire.resources import machine_facts

_LOG = logging.getLogger("safeloader")
Log = logging.Logger | logging.LoggerAdapter[logging.Logger]

_numbers = itertools.count()


def check_folder(folder: object) -> None:
    """Refuse a folder that cannot be written to.

    Raises:
        TypeError: if it is no path.
        ValueError: if nothing can be written there.
    """
    if folder is None:
        return
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(
            f"on_failure_dump must be a folder to write failures into, or None; got {folder!r}"
        )
    try:
        see_writable(Path(folder))
    except OSError as exc:
        raise ValueError(
            f"failures cannot be written to {str(folder)!r}: {exc}. Give on_failure_dump= a "
            "folder that can be written to, or None"
        ) from exc


def write(failure: Failure, folder: str | os.PathLike[str], log: Log = _LOG) -> Path | None:
    """Write ``failure`` as a file of its own, which a line in the log names; None if that fails."""
    name = f"failure-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{next(_numbers)}.json"
    path = Path(folder) / name
    content: dict[str, Any] = {
        "failure": failure.to_dict(),
        "report": str(failure),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {
            "safeloader": __version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        "machine": machine_facts(),
    }
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")
        part.replace(path)
    except (OSError, ValueError, TypeError) as exc:
        log.warning("the failure could not be written to %s: %s", path, str(exc))
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        return None
    log.warning("the failure is written to %s", path)
    return path
