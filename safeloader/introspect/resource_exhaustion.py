"""Recognises the exceptions of a machine that ran out of something. Runs in: both.

What ran out is seldom what the message speaks of. Too many open files are "received 0 items of
ancdata" or "No usable temporary directory", too many shared tensors are "Cannot allocate memory", a
full ``/dev/shm`` is "No space left on device" with gigabytes free on every disk. Here stands what
ran out, with figures, and what to do. The figures are those of the process that asks.
"""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from safeloader.introspect import resources
from safeloader.introspect.resources import Space, human_bytes, human_share, or_none

_LITTLE_SHARED = 8 << 20
_CHAIN_MAX = 16  # exceptions looked at behind one


@or_none
def shortage(exc: BaseException) -> str | None:
    """Say in a few sentences what ran out, how much there is of it, and the way out.

    Call it where ``exc`` was raised, while what it held is still held. It looks at the causes and
    contexts of ``exc`` as well.

    Returns:
        None where ``exc`` comes of something else. Never raises.

    >>> shortage(OSError(errno.EMFILE, "Too many open files")).split(":")[0]
    'too many open files'
    >>> shortage(FileNotFoundError(errno.ENOENT, "No such file or directory"))
    """
    for each in _behind(exc, contexts=True):
        if tell := _teller(each):
            return tell(each)
    return None


@or_none
def met_in_sharing(exc: BaseException) -> bool | None:
    """Say whether a shortage was met in making the memory that torch sends a tensor in.

    ``default_collate`` in a worker makes it, so what it raises need not be about a sample.

    >>> met_in_sharing(RuntimeError("write to file </torch_7_2>: No space left on device"))
    True
    """
    chain = _behind(exc, contexts=True)
    return any(_teller(e) and any(n.startswith("/torch_") for n in _names(e)) for e in chain)


def never_skipped(exc: BaseException) -> bool:
    """Say whether ``exc`` means a broken program or machine: leaving the sample out does not help.

    These are every shortage, what is no ``Exception`` (``KeyboardInterrupt``), an import that
    fails, an unknown name, and a source file that does not parse. A bad sample may by itself bring
    about the others: ``RecursionError`` (deeply nested JSON), ``SystemError`` (a broken tile in
    Pillow), ``UnboundLocalError`` (a loop over an empty sample), and a ``SyntaxError`` that is
    about no ``.py`` file (``ElementTree.ParseError`` is one, and ``ast.literal_eval`` raises it).

    A shortage counts wherever it stands in the chain: ``raise ValueError("bad sample")`` within
    ``except OSError`` leaves it in the context. A fault of the program counts by itself or as an
    explicit cause (``from``): in a context it may be an optional import that was not needed.

    >>> [never_skipped(error) for error in (MemoryError(), ImportError(), KeyError(7))]
    [True, True, False]
    """
    short = any(_teller(each) for each in _behind(exc, contexts=True))
    return short or any(map(_is_fault, _behind(exc, contexts=False)))


def _is_fault(exc: BaseException) -> bool:
    if isinstance(exc, SyntaxError):
        return type(exc.filename) is str and exc.filename.endswith(".py")
    if isinstance(exc, UnboundLocalError):
        return False
    return isinstance(exc, ImportError | NameError) or not isinstance(exc, Exception)


def _behind(exc: BaseException, *, contexts: bool) -> Iterator[BaseException]:
    """Yield an exception, the members of a group, and what they were raised from."""
    waiting, seen = [exc], set[int]()
    while waiting and len(seen) < _CHAIN_MAX:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        members = each.exceptions[:_CHAIN_MAX] if isinstance(each, BaseExceptionGroup) else ()
        shown = contexts and not each.__suppress_context__  # a cause suppresses it, and "from None"
        behind = (*members, each.__cause__, each.__context__ if shown else None)
        waiting += [other for other in behind if other is not None]


# ---- which shortage it is

_Teller = Callable[[BaseException], str]


@or_none
def _teller(exc: BaseException) -> _Teller | None:
    """Return what puts the shortage that ``exc`` is into words; None where it is none."""
    if isinstance(exc, MemoryError):
        return _memory
    if isinstance(exc, torch.OutOfMemoryError):
        return _gpu_memory
    if not isinstance(exc, OSError | RuntimeError):
        return None
    code = exc.errno if isinstance(exc, OSError) else None
    if code == errno.EAGAIN:  # else a socket or pipe that has nothing to read yet
        return _tasks if _was_forking(exc) else None
    if code in _BY_CODE:
        return _BY_CODE[code]
    # Torch and the libraries under h5py put the system's words into a text of their own.
    system = {re.escape(os.strerror(code)): tell for code, tell in _BY_CODE.items()}
    told = (tell for said, tell in (_BY_PHRASE | system).items() if re.search(said, _text(exc)))
    return next(told, None)


def _text(exc: BaseException) -> str:
    return " ".join(part for part in exc.args if type(part) is str)


def _was_forking(exc: BaseException) -> bool:
    """Say whether the innermost frame is one that starts a process."""
    frames = [frame for frame, _ in traceback.walk_tb(exc.__traceback__)]
    starts = {"fork", "forkpty", "fork_exec", "_fork_exec", "posix_spawn"}
    return bool(frames) and not starts.isdisjoint(frames[-1].f_code.co_names)


# ---- files


def _open_files(exc: BaseException) -> str:
    found = resources.descriptors()
    where = f": this process has {found} open now" if found else ": this process is at its limit"
    higher = "`ulimit -n`; in Docker, --ulimit nofile=65536"
    if found and found.hard_limit not in (None, found.limit):
        higher = f"`ulimit -n {found.hard_limit}`"
    if getattr(exc, "errno", None) == errno.ENFILE:
        where, higher = " on the whole machine (fs.file-max)", "`sysctl -w fs.file-max=...`"
    return (
        f"too many open files{where}. Raise the limit before the program starts "
        f"({higher}), share tensors by name "
        "(torch.multiprocessing.set_sharing_strategy('file_system')), or hold fewer batches and "
        "files at once: close what the dataset opens."
    )


# ---- space


def _space(exc: BaseException) -> str:
    spaces = _spaces(exc)
    way_out = "Free some, or let it be written elsewhere (TMPDIR for temporary files)"
    if any(space.path.startswith("/dev/shm") for space in spaces):
        way_out = (
            "Give /dev/shm more (docker run --shm-size=8g; in Kubernetes, mount an emptyDir of "
            "medium Memory there), or use fewer workers, a smaller prefetch_factor or smaller "
            "batches"
        )
    figures = "; ".join(map(str, spaces)) or "on which file system is not known"
    if getattr(exc, "errno", None) == errno.EDQUOT:
        figures += ", and this user's share of it is used up (`quota -s`)"
    return f"no space left: {figures}. {way_out}."


def _spaces(exc: BaseException) -> list[Space]:
    """Return the file system that ``exc`` names; else those that may be meant: the full ones."""
    for name in _names(exc):
        shared = name.startswith("/torch_")
        if space := resources.shared_memory() if shared else resources.space_of(name):
            return [space]
    asked = resources.shared_memory(), resources.temporary_folder(), resources.space_of(os.curdir)
    # By its figures: two folders of one file system are told once.
    spaces = {space[1:]: space for space in asked if space}.values()
    full = [e for e in spaces if e.free_inodes == 0 or e.free < max(2**20, e.total // 100)]
    return full or [*spaces]


def _names(exc: BaseException) -> Iterator[str]:
    """Yield the files that an exception names; the second of a copy is the one being written."""
    for name in (getattr(exc, "filename2", None), getattr(exc, "filename", None)):
        if isinstance(name, str | bytes):
            yield os.fsdecode(name)
    yield from re.findall(r"(?:file|object) <([^>]+)>", _text(exc))  # as torch words it


def _no_temporary_folder(exc: BaseException) -> str:
    found = resources.descriptors()
    if found and found.limit is not None and found.used >= found.limit:
        return _open_files(exc)  # ``tempfile`` does not say why it could not write
    reasons = []
    for folder in dict.fromkeys(re.findall(r"'([^']+)'", _text(exc))):  # those that it tried
        space = resources.space_of(folder) if os.access(folder, os.W_OK | os.X_OK) else None
        reasons.append(str(space or f"{folder} cannot be written to"))
    tried = "; ".join(reasons)
    return f"no folder for temporary files: {tried}. Set TMPDIR to a folder with space."


def bus_error(at: str = "", again: str = "") -> str:
    """Say what touched memory that is not there means: a full /dev/shm, or a file that was cut.

    ``at`` says where it was touched, ``again`` what more there is to do.
    """
    shared = resources.shared_memory()
    if shared is not None and shared.free < max(_LITTLE_SHARED, shared.total // 20):
        return (
            f"{shared.path} is full ({human_bytes(shared.free)} of {human_bytes(shared.total)} "
            "free), and batches cross through it: give it more (docker run --shm-size=8g, or "
            "--ipc=host), use fewer workers or a smaller prefetch_factor, or "
            "torch.multiprocessing.set_sharing_strategy('file_system')"
        )
    return (
        f"memory behind a mapped file went away{at}: a file that was truncated or replaced while "
        "it is mapped (np.memmap, LMDB, Arrow), a failing or full disk or network share, or "
        f"{shared.path if shared else 'shared memory'} running full. Write such files under "
        "another name and rename them when they are whole; see whether this one has its full "
        f"size, and df -h for the disk{again}"
    )


# ---- memory, processes and threads


def _memory(exc: BaseException) -> str:
    machine, group = resources.machine_memory(), resources.cgroup_memory()
    figures = [str(machine or "how much there is, is not known")]
    way_out = "Use fewer workers, a smaller prefetch_factor or smaller batches"
    if group and group.limit is not None:
        figures.append(str(group))
    if space := _address_space():
        figures.append(f"address space {human_share(*space)} taken")
        way_out += ", or raise `ulimit -v`"
    return (
        f"out of memory: {'; '.join(figures)}. {way_out}. Where there was room, look at the "
        "sample: a corrupt one may have asked for more than there is."
    )


def _gpu_memory(exc: BaseException) -> str:
    return (
        "out of memory on the GPU, by the figures in the error itself. Each worker that touches "
        "the GPU takes hundreds of MiB of it for itself: in the dataset, make tensors on the CPU."
    )


def _tasks(exc: BaseException) -> str:
    user, group = resources.soft_limit("RLIMIT_NPROC"), resources.cgroup_tasks()
    figures = [] if user is None else [f"this user may run {user} (`ulimit -u`)"]
    if group and group.limit is not None:
        figures.append(f"the cgroup runs {group} (pids.max)")
    return (
        f"no more processes or threads can be started: {'; '.join(figures) or 'at a limit'}. "
        "Use fewer workers or fewer threads in each (torch.set_num_threads(1), OMP_NUM_THREADS=1), "
        "or raise the limit."
    )


@or_none
def _address_space() -> tuple[int, int] | None:
    """Return the bytes of address space taken, and the limit; None where there is none."""
    limit = resources.soft_limit("RLIMIT_AS")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return None if limit is None else (pages * os.sysconf("SC_PAGE_SIZE"), limit)


_BY_CODE: dict[int, _Teller] = {
    errno.EMFILE: _open_files,
    errno.ENFILE: _open_files,
    errno.ENOSPC: _space,
    errno.EDQUOT: _space,
    errno.ENOMEM: _memory,
}
_BY_PHRASE: dict[str, _Teller] = {  # regular expressions
    r"^\d+ requested and \d+ written": _space,  # numpy's tofile and save
    "could not duplicate a shared memory file descriptor": _open_files,
    "items of ancdata": _open_files,  # the kernel drops descriptors that it has no room for
    "No usable temporary directory": _no_temporary_folder,
    "DefaultCPUAllocator: ": _memory,
    "CUDA error: out of memory": _gpu_memory,  # pinning memory says so
    "can't start new thread": _tasks,
    "killed by signal: Bus error": lambda exc: f"{bus_error()}.",
}
