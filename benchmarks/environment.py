"""What a result depends on besides the code. No host name: results are published."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def core_count() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe() -> dict[str, Any]:
    try:
        safeloader = metadata.version("safeloader")
    except metadata.PackageNotFoundError:
        safeloader = None
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "safeloader": safeloader,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "cpu": cpu_model(),
        "cores": core_count(),
        # How busy the machine was already: an explanation at hand for wide intervals.
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def label() -> str:
    """A short name of the kind of machine, for file names."""
    words = re.sub(r"\(.*?\)|processor|cpu|@.*", " ", cpu_model().lower())
    return "-".join([*re.findall(r"[a-z0-9]+", words)[:4], f"{core_count()}core"])
