"""Who a process is, and whether it has ended: told by files. Runs in: main.

No library is imported here: the launcher does not wait for torch.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from pathlib import Path
from typing import Any

_BOOT = "/proc/sys/kernel/random/boot_id"


def host_name() -> str:
    """The name of this machine, as a part of a file's name."""
    return re.sub(r"[^\w.-]", "_", platform.node())[:64] or "host"


def boot_id() -> str:
    """The first letters of what tells one start of a machine from another."""
    try:
        return Path(_BOOT).read_text()[:8]
    except OSError:
        return "boot"


def process_identity() -> dict[str, Any]:
    """What tells this process from every other, in other containers too."""
    return {
        "host": host_name(),
        "boot": boot_id(),
        "namespace": namespace(),
        "pid": os.getpid(),
        "ticks": start_ticks(os.getpid()),
    }


def has_ended(identity: dict[str, Any]) -> bool | None:
    """Whether a process has ended; None where that cannot be seen from here.

    Example:
        >>> has_ended(process_identity()), has_ended({"host": "elsewhere"})
        (False, None)
    """
    here = (host_name(), boot_id(), namespace())
    if here != tuple(identity.get(name) for name in ("host", "boot", "namespace")) or not here[2]:
        return None
    try:
        return bool(start_ticks(int(identity["pid"])) != identity["ticks"])
    except (KeyError, TypeError, ValueError):
        return None


def namespace() -> str:
    """Of process numbers: two containers may have one host name, and the same numbers."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def start_ticks(pid: int) -> int | None:
    """When a process began, by the kernel's clock; None where there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # The second field, the name, may hold anything; what follows its bracket does not.
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if after_name[0] in "ZX" else int(after_name[19])
    return None
