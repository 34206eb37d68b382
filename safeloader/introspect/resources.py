"""What this process and this machine have left. Runs in: both.

Every function answers None for what cannot be known here, and none raises: callers mostly ask when
something has gone wrong already. psutil answers what it can. Read here are cgroups, which it does
not know, what a worker asks while all is well, and what is asked when no file can be opened any
more. ``str()`` of a fact is a line for a person.
"""

from __future__ import annotations

import errno
import functools
import math
import mmap
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple, ParamSpec, TypeVar

with suppress(ImportError):  # on Windows
    import resource  # not where it is used: with too many open files nothing can be imported

_ROOT = Path("/")  # what holds ``proc`` and ``sys``; another folder in tests
_NO_LIMIT = 2**62  # where there is no limit, cgroup v1 writes the largest number of whole pages

_P = ParamSpec("_P")
_T = TypeVar("_T")


class ProcessMemory(NamedTuple):
    """Memory of one process in bytes.

    ``rss`` counts shared pages in full, ``pss`` by the process's share of them, and ``uss`` not at
    all: that much would be free if the process ended. Forked workers share most of their ``rss``
    with main.
    """

    rss: int
    pss: int | None
    uss: int | None


class MachineMemory(NamedTuple):
    """Memory of the machine in bytes; ``available`` is what can be had without swapping."""

    total: int
    available: int

    def __str__(self) -> str:
        return f"{human_share(self.available, self.total)} available"


class CgroupMemory(NamedTuple):
    """Memory of this process's cgroup (its container) in bytes, and the processes killed for it.

    ``used`` leaves out the file cache that the kernel can drop at once: reading a dataset fills any
    limit with it.
    """

    limit: int | None
    used: int | None
    oom_kills: int | None

    def __str__(self) -> str:
        parts = [] if self.limit is None else [f"cgroup limit {human_bytes(self.limit)}"]
        if parts and self.used is not None:
            parts.append(f"{human_bytes(self.used)} used")
        if self.oom_kills:
            parts.append(f"{self.oom_kills} process(es) killed for memory")
        return ", ".join(parts)


class Space(NamedTuple):
    """Space of a file system in bytes; ``free_inodes``: files it has room for, if limited."""

    path: str
    total: int
    free: int
    free_inodes: int | None = None

    def __str__(self) -> str:
        no_more = "" if self.free_inodes != 0 else ", but not one more file can be made (inodes)"
        return f"{self.path} {human_share(self.free, self.total)} free{no_more}"


class Use(NamedTuple):
    """How many of something are in use; a limit that is None is none.

    ``hard_limit`` is what a process may raise its own limit to, where that is known.
    """

    used: int
    limit: int | None
    hard_limit: int | None = None

    def __str__(self) -> str:
        hard = "" if self.hard_limit is None else f" (hard limit {self.hard_limit})"
        return f"{self.used} of {'any number' if self.limit is None else self.limit}{hard}"


def or_none(fact: Callable[_P, _T | None]) -> Callable[_P, _T | None]:
    """Make a function answer None where it would raise: to read a fact must break nothing.

    It is asked beside an error that is to be told, and the files of a system hold what they like.
    """

    @functools.wraps(fact)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        try:
            return fact(*args, **kwargs)
        except Exception:
            return None

    return guarded


# ---- memory


@or_none
def process_memory() -> ProcessMemory | None:
    """Return the memory of this process.

    The kernel walks all its pages: 5 ms with torch imported, and 10 to 30 ms for each GiB more.
    """
    try:
        held = _fields(Path("/proc/self/smaps_rollup"))
    except OSError:  # not Linux
        import psutil  # here: heavy for a worker, which asks once a second

        found = psutil.Process().memory_full_info()
        return ProcessMemory(found.rss, getattr(found, "pss", None), found.uss)
    uss = held["Private_Clean"] + held["Private_Dirty"]
    return ProcessMemory(held["Rss"] * 1024, held["Pss"] * 1024, uss * 1024)


@or_none
def resident_bytes() -> int | None:
    """Resident memory of this process by the kernel's cheapest account; None if unknown."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


@or_none
def anonymous_bytes() -> int | None:
    """Memory of this process that no file stands behind, in bytes; None if unknown.

    In a forked process it begins with all that was inherited, whoever writes to it, so what it
    grows by is what the process itself has allocated.
    """
    with open("/proc/self/statm", "rb") as file:
        resident, shared = map(int, file.read().split()[1:3])
    return (resident - shared) * mmap.PAGESIZE


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@or_none
def machine_memory() -> MachineMemory | None:
    """Return the memory of the machine, whatever share of it a cgroup grants."""
    import psutil  # here: too heavy for a worker's start

    memory = psutil.virtual_memory()
    return MachineMemory(memory.total, memory.available)


@or_none
def cgroup_memory(root: Path = _ROOT) -> CgroupMemory | None:
    """Return limit and use of the cgroup, own or above it, that has the least room left."""
    version, groups = _groups(root, "memory")
    limit, use, cache, _ = _MEMORY[version]
    least = _least_room(groups, f"memory.{limit}", f"memory.{use}", cache)
    found = CgroupMemory(*least, _kills(root))
    return None if found == (None, None, None) else found


def least_memory() -> int | None:
    """The memory of the machine, or of the container where that is less, in bytes.

    Without psutil where the system itself tells: every program with workers asks.
    """
    group = cgroup_memory()
    machine = _memory_size() or getattr(machine_memory(), "total", None)
    return min(filter(None, (machine, group and group.limit)), default=None)


@or_none
def _memory_size() -> int | None:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@or_none
def oom_kills(root: Path = _ROOT) -> int | None:
    """Count the processes of this cgroup that were killed for memory; else the machine's.

    Takes less than 0.1 ms. A count that grew says that one was killed, not which.
    """
    kills = _kills(root)
    return _fields(root / "proc/vmstat").get("oom_kill") if kills is None else kills


# ---- space


@or_none
def space_of(path: str) -> Space | None:
    """Return the space of the file system that a file or folder is in, or would be in."""
    folder = os.path.abspath(path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    found = os.statvfs(folder)
    if not found.f_blocks:  # /proc and its like
        return None
    free_inodes = found.f_favail if found.f_files else None
    unit = found.f_frsize
    return Space(folder, found.f_blocks * unit, found.f_bavail * unit, free_inodes)


def shared_memory() -> Space | None:
    """Return the space of ``/dev/shm``, where torch puts the tensors that processes share."""
    return space_of("/dev/shm") if os.path.isdir("/dev/shm") else None


@or_none
def temporary_folder() -> Space | None:
    """Return the space of the folder that :mod:`tempfile` uses."""
    return space_of(tempfile.gettempdir())


# ---- files, processes and threads


@or_none
def descriptors() -> Use | None:
    """Return the open files, sockets and pipes of this process and the limits on them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/dev/fd")) - 1  # less the one that lists them
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        used = soft  # not one more can be opened to count them, nor to import psutil
    return Use(used, _limited(soft), _limited(hard))


@or_none
def cgroup_tasks(root: Path = _ROOT) -> Use | None:
    """Return the processes and threads of the cgroup, own or above it, with the least room left."""
    _, groups = _groups(root, "pids")
    limit, used = _least_room(groups, "pids.max", "pids.current")
    return None if used is None else Use(used, limit)


@or_none
def soft_limit(kind: str) -> int | None:
    """Return a limit of this process by its name in :mod:`resource`; None where there is none."""
    return _limited(resource.getrlimit(getattr(resource, kind))[0])


def _limited(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit


# ---- cgroups of both versions


# By version: the files of limit and use, the cache in ``memory.stat`` that the kernel can drop, and
# the file of kills.
_MEMORY = {
    1: ("limit_in_bytes", "usage_in_bytes", "total_inactive_file", "oom_control"),
    2: ("max", "current", "inactive_file", "events"),
}


def _groups(root: Path, controller: str) -> tuple[int, list[Path]]:
    """Return the version in use and the folders of this process's cgroup and of those above it.

    In a container the path may be the host's, while what is mounted is the container's own cgroup.
    """
    return _groups_told(root, (root / "proc/self/cgroup").read_text(), controller)


@functools.lru_cache(8)  # asked for several times as a pool of workers starts
def _groups_told(root: Path, told: str, controller: str) -> tuple[int, list[Path]]:
    lines = (line.split(":", 2) for line in told.splitlines())
    paths = {name: path for _, names, path in lines for name in names.split(",")}
    version = 1 if controller in paths else 2
    mount = root / "sys/fs/cgroup" / (controller if version == 1 else "")
    inner = PurePosixPath(paths.get(controller) or paths.get("", "/")).parts[1:]
    if ".." in inner or not mount.joinpath(*inner).is_dir():
        inner = ()
    return version, [mount.joinpath(*inner[:depth]) for depth in range(len(inner), -1, -1)]


def _least_room(
    groups: list[Path], limit_name: str, use_name: str, cache: str = ""
) -> tuple[int | None, int | None]:
    """Return limit and use where the least is left; without a limit, the use of the own cgroup."""
    held = []
    for group in groups:
        limit, used = _number(group / limit_name), _number(group / use_name)
        if used is not None and cache:
            with suppress(OSError):
                used = max(0, used - _fields(group / "memory.stat").get(cache, 0))
        held.append((limit, used))
    return min(held, key=lambda each: math.inf if each[0] is None else each[0] - (each[1] or 0))


@or_none
def _kills(root: Path) -> int | None:
    version, groups = _groups(root, "memory")
    for group in groups:  # the nearest count is that of the processes in this cgroup
        with suppress(OSError, KeyError):  # the root of v2 has none, Linux before 4.13 neither
            return _fields(group / f"memory.{_MEMORY[version][-1]}")["oom_kill"]
    return None


def _number(path: Path) -> int | None:
    """Read a file of one number; None where there is no such file, or where it says no limit."""
    with suppress(OSError, ValueError):  # "max" is no number
        if (number := int(path.read_text())) < _NO_LIMIT:
            return number
    return None


def _fields(path: Path) -> dict[str, int]:
    """Read lines such as ``MemFree:  12 kB``: by name, the first number."""
    found = re.findall(r"(?m)^(\S+?):?[ \t]+(\d+)(?!\S)", path.read_text(errors="replace"))
    return {name: int(number) for name, number in found}


# ---- all of it


def machine_lines() -> list[str]:
    """Return what matters most as a few lines for a person; what is not known is left out."""
    memory = map(str, filter(None, (machine_memory(), cgroup_memory())))
    told = {
        "memory": "; ".join(filter(None, memory)),
        "shared memory": shared_memory(),
        "temporary files": temporary_folder(),
        "open files": descriptors(),
    }
    return [f"{name}: {fact}" for name, fact in told.items() if fact]


def human_bytes(count: float) -> str:
    """Write a number of bytes with its unit.

    >>> human_bytes(1.5 * 2**30), human_bytes(64 * 2**20), human_bytes(12)
    ('1.5 GiB', '64 MiB', '12 B')
    """
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(count) >= 1023.95 and len(units) > 1:  # it would be rounded to 1024
        del units[0]
        count /= 1024
    return f"{count:.1f}".removesuffix(".0") + f" {units[0]}"


def human_share(part: float, whole: float) -> str:
    """Write bytes out of so many bytes.

    >>> human_share(12 * 2**20, 64 * 2**20), human_share(24 * 2**10, 2**30)
    ('12 of 64 MiB', '24 KiB of 1 GiB')
    """
    few, all_of_it = human_bytes(part), human_bytes(whole)
    number, unit = few.split()
    return f"{number if unit in all_of_it.split() or not part else few} of {all_of_it}"
