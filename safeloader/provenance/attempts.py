"""Which run a folder holds, and which attempt of it a process belongs to. Runs in: main.

::

    DIR/run.json                  the run: its id and how it began; made exclusively, by the first
    DIR/attempt=K/attempt.json    one start of the program, on however many ranks

There is no process that could be asked: 64 ranks open a folder at once, and elastic ranks come and
go. So each decides alone, by what is there. A process joins the newest attempt if it is known to
belong to it: its parent said so in the environment, or it is a rank of the same *start* (a
launcher's id, address and count of restarts) and no earlier process of its rank has ended. Else it
begins the next one, if the run is its own, or shows no life any more. An attempt appears together
with its ``attempt.json``, by a rename; whoever comes second sees it and looks again.

No library is imported here: the launcher does not wait for torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safeloader._version import __version__
from safeloader.introspect.identity import boot_id, has_ended, host_name, namespace, start_ticks
from safeloader.introspect.private_files import make_folder, write_new
from safeloader.introspect.redaction import scrub_command

ALIVE_S = 60.0
"""A run that wrote within this time is taken to go on."""

ATTEMPT_VARIABLE = "SAFELOADER_ATTEMPT"
"""The environment variable by which a process tells its children the attempt it belongs to."""

_HALF_WRITTEN_S = 2.0  # another process has made a file, and not written it yet


class NotARun(ValueError):
    """There is a ``run.json`` that is none of ours."""


class AnotherRun(Exception):
    """The folder is that of another run, which is alive.

    Attributes:
        known: that run's id.
        ago_s: how long ago it wrote.
    """

    def __init__(self, folder: Path, known: str, ago_s: float) -> None:
        super().__init__(
            f"another run may still write into {folder}: it did {ago_s:.0f} s ago. Give another "
            "folder; or, if that run has ended, wait until a minute has passed, or set "
            f"SAFELOADER_RUN_ID={known} to begin its next attempt now"
        )
        self.known, self.ago_s = known, ago_s


class Attempt(NamedTuple):
    """One start of a run's program.

    Attributes:
        run: the run's folder.
        id: the run's id.
        number: of the attempt, from 0.
    """

    run: Path
    id: str
    number: int

    @property
    def path(self) -> Path:
        """The attempt's folder."""
        return self.run / f"attempt={self.number}"


# ── which start ──────────────────────────────────────────────────────────────────────────────────


def start_of(group: bool = False) -> str:
    """What all ranks of one start of a program have in common; empty where nothing tells.

    Args:
        group: whether there is a process group of several ranks.
    """
    env = os.environ
    address = f"{env.get('MASTER_ADDR', '')}:{env.get('MASTER_PORT', '')}"
    if "TORCHELASTIC_RUN_ID" in env:
        return f"elastic {env['TORCHELASTIC_RUN_ID']} {address} {_restarts()}"
    if env.get("SLURM_PROCID") and env.get("SLURM_STEP_ID"):
        step = f"{env.get('SLURM_JOB_ID')}.{env['SLURM_STEP_ID']}"
        return f"slurm {step} {env.get('SLURM_RESTART_COUNT', '0')}"
    if (group or env.get("RANK")) and address != ":":
        return f"group {address}"
    if "multiprocessing" in sys.modules:
        parent = sys.modules["multiprocessing"].parent_process()
        if parent is not None:
            here = f"{host_name()} {boot_id()} {namespace()}"
            return f"children of {here} {parent.pid} {start_ticks(parent.pid or 0)}"
    return ""


def _restarts() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _asked_for() -> str | None:
    """The run's id, where the environment has one."""
    elastic = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return os.environ.get("SAFELOADER_RUN_ID") or (elastic if elastic != "none" else "") or None


# ── which attempt ────────────────────────────────────────────────────────────────────────────────


def open_run(
    folder: Path, command: Sequence[str], rank: int | None = None, *, group: bool = False
) -> Attempt:
    """The attempt that this process belongs to; begun, with the run, where there is none.

    Its number stands in the environment from then on: a process that this one starts belongs to
    the same attempt.

    Args:
        folder: the run's; made where it is missing.
        command: what was started, for ``run.json``, where no secret of it stands.
        rank: of this process; None for a launcher, which is none.
        group: whether there is a process group of several ranks.

    Raises:
        OSError: if it cannot be written to.
        NotARun: if there is a ``run.json`` that is none of ours.
        AnotherRun: if it is that of another run, which is alive.
    """
    run = Path(os.path.abspath(folder))
    make_folder(run)
    asked, start = _asked_for(), start_of(group)
    while True:
        known = _begin_run(run, asked or uuid.uuid4().hex, command)
        if known is None:
            continue
        newest = max(attempts_in(run), default=None)
        told = None if rank is None else _told_by_parent(run)  # a launcher's is a start
        if told is not None and told in attempts_in(run):
            newest = told
        elif newest is not None and not _belongs(run, newest, start, rank):
            _refuse_another(run, newest, known, asked)
            newest = _begin_attempt(run, newest + 1, start)
        elif newest is None:
            newest = _begin_attempt(run, 0, start)
        if newest is not None:
            tell_children(run, newest)
            return Attempt(run, known, newest)


def attempts_in(run: Path) -> list[int]:
    """The numbers of the attempts of a run."""
    numbers = (each.name.partition("=")[2] for each in run.glob("attempt=*"))
    return sorted(int(each) for each in numbers if each.isdecimal())


def tell_children(run: Path, attempt: int) -> None:
    """Have what this process starts belong to its attempt, but for what is restarted later."""
    os.environ[ATTEMPT_VARIABLE] = f"{attempt} {_restarts()} {run}"


def _told_by_parent(run: Path) -> int | None:
    number, _, more = os.environ.get(ATTEMPT_VARIABLE, "").partition(" ")
    return int(number) if number.isdecimal() and more == f"{_restarts()} {run}" else None


def _begin_run(run: Path, identity: str, command: Sequence[str]) -> str | None:
    """Write ``run.json``, unless it is there; the id in it, or None if it is gone just now."""
    content = {
        "id": identity,
        "command": scrub_command(command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"safeloader": __version__, "python": sys.version.split()[0]},
    }
    path = run / "run.json"
    try:
        write_new(path, json.dumps(content, indent=1))
    except FileExistsError:
        found = _read_when_written(path)
        if isinstance(found.get("id"), str):
            return str(found["id"])
        if not os.path.lexists(path):
            return None
        raise NotARun(f"{path} was not written by safeloader; give another folder") from None
    return identity


def _begin_attempt(run: Path, number: int, start: str) -> int | None:
    """Make the folder of an attempt, whole; None if somebody else has just done so."""
    new = run / f".attempt-{uuid.uuid4().hex}"
    new.mkdir(mode=0o700)
    try:
        content = {"start": start, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_new(new / "attempt.json", json.dumps(content))
        new.rename(run / f"attempt={number}")  # which fails on a folder that holds a file
    except OSError:
        with contextlib.suppress(OSError):
            (new / "attempt.json").unlink()
        with contextlib.suppress(OSError):
            new.rmdir()
        if number in attempts_in(run):
            return None
        raise
    return number


def _belongs(run: Path, attempt: int, start: str, rank: int | None) -> bool:
    """Whether this process is a rank of the start that an attempt is."""
    path = run / f"attempt={attempt}"
    if not start or _read_when_written(path / "attempt.json").get("start") != start:
        return False
    if rank is None:
        return _silent_s(path) < ALIVE_S
    for folder in _folders_in(path / f"rank={rank}"):
        ended = has_ended(identity_of(folder))
        if ended or (ended is None and _silent_s(folder) > ALIVE_S):
            return False
    return _silent_s(path / "attempt.json") < ALIVE_S or _silent_s(path) < ALIVE_S


def _refuse_another(run: Path, attempt: int, known: str, asked: str | None) -> None:
    """See that a run is this process's to go on with, or is over.

    Raises:
        AnotherRun: if it is not.
    """
    if asked == known:
        return
    path = run / f"attempt={attempt}"
    processes = [has_ended(identity_of(each)) for each in path.glob("rank=*/*/")]
    if asked is None and processes and all(processes):  # seen to have ended, on this machine
        return
    ago_s = min(_silent_s(path), _silent_s(run / "run.json"))
    if False in processes:
        ago_s = min(ago_s, 0.0)
    if ago_s < ALIVE_S:
        raise AnotherRun(run, known, max(0.0, ago_s))


def identity_of(folder: Path) -> dict[str, Any]:
    """The process that writes, or wrote, a folder; empty where it does not say so."""
    try:
        found = json.loads((folder / "loader.json").read_text("utf-8"))["process"]
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _folders_in(path: Path) -> list[Path]:
    return [each for each in path.glob("*/") if not each.is_symlink()]


def _silent_s(path: Path) -> float:
    """How long ago a file, or anything below a folder, was last written."""
    newest = 0.0
    for each in (path, *(path.rglob("*") if path.is_dir() else ())):
        with contextlib.suppress(OSError):
            newest = max(newest, each.stat().st_mtime)
    return time.time() - newest


def _read_when_written(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file holds none, and nobody is about to write it."""
    give_up = time.monotonic() + _HALF_WRITTEN_S
    while True:
        try:
            found = json.loads(path.read_text("utf-8"))
            return found if isinstance(found, dict) else {}
        except FileNotFoundError:
            return {}
        except ValueError:
            if time.monotonic() > give_up or _silent_s(path) > ALIVE_S:
                return {}
        time.sleep(0.01)
