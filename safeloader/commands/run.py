"""``python -m safeloader run``: a program with all of its loaders recorded. Runs in: main.

It sets the environment, puts the hook on the path, and then becomes the program: exit status,
signals, ``__main__`` and ``argv`` are the program's own. No library is imported here, torch least
of all.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from safeloader.provenance.attempts import AnotherRun, NotARun, attempts_in, open_run

_HOOK = Path(__file__).parent.parent / "hook"
_CANNOT_WORK = "ISE"  # of python: no environment, or no module `site` to run the hook
_INSTEAD = ("-m", "-c", "-")  # of a script, for python
_ALONE = ("--checksum", "--run-sources", "-h", "--help")  # options without a value
_NOT_RECORDED = 3
_BYTES_LEAST = 1 << 20
_EXAMPLES = """\
CMD is what stands behind `python` or at the prompt:

  python -m safeloader run train.py --epochs 3
  python -m safeloader run -m package.train
  python -m safeloader run --run runs/exp1 torchrun --nproc-per-node 2 train.py
  python -m safeloader run --on-error skip accelerate launch train.py

A SafeDataLoader that the program makes itself keeps its own options: only --run counts for it.
At the end of each process lines on stderr say of each loader what was recorded and what was not,
how much of the time was waited for data, and which samples were the slowest.
"""


class _Refused(Exception):
    """It cannot work; the text says why."""


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong before anything else, and names the option that was meant."""

    def error(self, message: str) -> NoReturn:
        known = [*self._option_string_actions]
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        meant = difflib.get_close_matches(unknown[1], known, 1) if unknown else []
        hint = f" (did you mean {meant[0]}?)" if meant else ""
        self.exit(2, f"{self.prog}: {message}{hint}. See {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m safeloader run",
        usage="%(prog)s [--run DIR] [options] CMD...",
        description="Run a training program with every DataLoader of it recorded.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add: Any = parser.add_argument
    add(
        "--run",
        metavar="DIR",
        help="write into this folder which samples each batch had, audits, failures and what the "
        "workers used; `pip install 'safeloader[run]'` for the batches",
    )
    add(
        "--run-max-bytes",
        type=_bytes,
        metavar="N",
        help="bound on the batches that each process keeps there, 1048576 or more (default: none)",
    )
    add(
        "--run-sources",
        action="store_true",
        default=None,
        help="store there where every sample comes from",
    )
    add(
        "--expect-ranks",
        type=_count,
        metavar="N",
        help="stay beside the program; exit 3 if it ended well and fewer ranks were recorded",
    )
    add(
        "--verify",
        choices=("raise", "warn", "off"),
        default="warn",
        help="what a failed check does (default: warn)",
    )
    add("--trace", metavar="DIR", help="write a trace file for each loader into this folder")
    add(
        "--on-error",
        choices=("raise", "skip", "replace"),
        help="what a sample that fails does (default: raise)",
    )
    add("--retries", type=_natural, metavar="N", help="ask for it again first (default: 0)")
    add(
        "--max-skipped",
        type=_bound,
        metavar="N",
        help="bound on skipped and replaced samples of an epoch: a count, or a fraction such as "
        "0.01 (default: 0.01, and ten at least)",
    )
    add(
        "--on-crash",
        choices=("raise", "restart"),
        help="what the death of a worker does; of a stream's it is raised (default: raise)",
    )
    add(
        "--stall-after",
        type=_seconds,
        metavar="SECONDS",
        help="log where the workers are after that long without a batch (default: 60; 0: never)",
    )
    add("--on-failure-dump", metavar="DIR", help="write each failure into this folder")
    add(
        "--transport",
        choices=("auto", "torch"),
        help="how batches cross from the workers; torch: in torch's own way (default: auto)",
    )
    add(
        "--checksum",
        action="store_true",
        default=None,
        help="compare what is handed over with what the workers made",
    )
    add(
        "--seed",
        type=_natural,
        metavar="N",
        help="make all random numbers of the loaders from this, the epoch and the sample",
    )
    add(
        "--seed-per",
        choices=("sample", "batch"),
        help="seed the generators for each sample or for each batch (default: sample)",
    )
    add("command", nargs=argparse.REMAINDER, metavar="CMD...")
    return parser


def _parsed(words: list[str]) -> dict[str, Any]:
    """Our options, and under ``command`` all from the first word on that is none of them."""
    at = 0
    while at < len(words) and words[at].startswith("-") and words[at] not in ("--", *_INSTEAD):
        alone = "=" in words[at] or words[at] in _ALONE
        at += 1 if alone else 2
    return vars(_parser().parse_args(words[:at])) | {"command": words[at:]}


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number from 1 on")
    return int(word)


def _bytes(word: str) -> int:
    if not word.isdecimal() or int(word) < _BYTES_LEAST:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number from {_BYTES_LEAST} (1 MiB) on")
    return int(word)


def _natural(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r} is not a number from 0 on")
    return int(word)


def _bound(word: str) -> int | float:
    number = int(word) if word.isdecimal() else _real(word)
    if isinstance(number, float) and not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{word!r} is neither a count nor a fraction up to 1")
    return number


def _seconds(word: str) -> float:
    number = _real(word)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{word!r} is not a number of seconds from 0 on")
    return number


def _real(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return float("nan")  # out of every range


def main(words: list[str]) -> int:
    """Become the program; returns an exit status only where that cannot be."""
    told = _parsed(words)
    command, folder, ranks = told.pop("command"), told.pop("run"), told.pop("expect_ranks")
    options = {name: value for name, value in told.items() if value is not None}
    try:
        program = _program(command)
        for name in ("trace", "on_failure_dump"):
            if name in options:
                options[name] = os.path.abspath(options[name])
        watched = folder
        if ranks is not None and folder is None:
            watched = tempfile.mkdtemp(prefix="safeloader-run-")
        environment = _environment(options, watched, program)
        if ranks is None:
            _become(program, environment)
        return _beside(program, environment, ranks)
    except _Refused as exc:
        print(f"python -m safeloader run: {exc}", file=sys.stderr)
        return 2


def _program(command: list[str]) -> list[str]:
    """What is executed: the command, behind a Python where it is a script or a module."""
    if command[:1] == ["--"]:
        command = command[1:]
    if not command:
        raise _Refused("no program was given. Try: python -m safeloader run train.py")
    if sys.flags.isolated or sys.flags.ignore_environment or sys.flags.no_site:
        raise _Refused(
            "this Python was started with -I, -E or -S, which keep the program from reading what "
            "records its loaders. Leave them out"
        )
    switch = os.environ.get("SAFELOADER", "")
    if switch.strip().lower() not in ("", "on", "off"):
        raise _Refused(f"the environment variable SAFELOADER is {switch!r}, and not 'on' or 'off'")
    first = command[0]
    if first.endswith(".py") or first in _INSTEAD or os.path.isdir(first):
        command = [sys.executable, *_own_flags(), *command]
    if re.fullmatch(r"python[0-9.]*(\.exe)?", os.path.basename(command[0])):
        words = iter(command[1:])
        for word in words:
            if not word.startswith("-") or word.startswith("--") or word in _INSTEAD:
                break
            if word in ("-W", "-X"):
                next(words, None)
            elif word[1] not in "WX" and set(word) & set(_CANNOT_WORK):
                raise _Refused(
                    f"{word} keeps Python from reading what records the program's loaders. "
                    "Leave it out"
                )
    found = shutil.which(command[0])
    if found is None:
        raise _Refused(f"there is no program {command[0]!r}")
    return [found, *command[1:]]


def _own_flags() -> list[str]:
    """The options that this Python was started with, for the program's."""
    words = sys.orig_argv[1:]
    if "safeloader" not in words:
        return []
    *first, last = words[: words.index("safeloader")]
    last = last.removesuffix("m")  # of -um, say
    return [*first, last] if last.strip("-") else first


def _environment(options: dict[str, Any], folder: str | None, program: list[str]) -> dict[str, str]:
    launched: dict[str, Any] = {"options": options}
    added: dict[str, str] = {}
    if folder is not None:
        try:
            attempt = open_run(Path(folder), program)
        except OSError as exc:
            raise _Refused(f"the folder of the run cannot be written to: {exc}") from None
        except (NotARun, AnotherRun) as exc:
            raise _Refused(str(exc)) from None
        launched |= {"run": str(attempt.run), "attempt": attempt.number}
        added["SAFELOADER_RUN"] = str(attempt.run)
        added["SAFELOADER_RUN_ID"] = attempt.id
    path = [str(_HOOK), *filter(None, [os.environ.get("PYTHONPATH")])]
    added["PYTHONPATH"] = os.pathsep.join(path)
    return os.environ | added | {"SAFELOADER_LAUNCHED": json.dumps(launched)}


def _become(program: list[str], environment: dict[str, str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(program[0], program, environment)  # noqa: S606  # the user's own words
    except OSError as exc:
        raise _Refused(f"{program[0]} cannot be run: {exc}") from None


def _beside(program: list[str], environment: dict[str, str], ranks: int) -> int:
    """Run the program as a child, pass signals on, and look whether each rank was recorded."""
    child = subprocess.Popen(program, env=environment)  # noqa: S603  # the user's own words

    def pass_on(number: int, frame: object) -> None:
        if number != signal.SIGINT or not _in_foreground():
            child.send_signal(number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):  # Windows has the first two
            signal.signal(getattr(signal, name), pass_on)
    status = child.wait()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    if status:
        return status
    launched = json.loads(environment["SAFELOADER_LAUNCHED"])
    run = Path(launched["run"])
    seen = {
        each.parent.parent.name
        for number in attempts_in(run)
        if number >= launched["attempt"]  # elastic ranks that were restarted are the next one
        for each in run.glob(f"attempt={number}/rank=*/*/epochs.jsonl")
        if _has_audit(each)
    }
    if len(seen) >= ranks:
        return 0
    known = f": {', '.join(sorted(seen))}" if seen else ""
    print(
        f"python -m safeloader run: {len(seen)} of {ranks} ranks were recorded{known}. A rank is "
        "recorded once it iterates a loader; the lines above say of each process what was not, "
        "and why",
        file=sys.stderr,
    )
    return _NOT_RECORDED


def _in_foreground() -> bool:
    """Whether what the terminal's Ctrl-C sends comes to this process and its children alike.

    A second one would strike while the program ends because of the first.
    """
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY)
    except OSError:  # there is none
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    finally:
        os.close(terminal)


def _has_audit(path: Path) -> bool:
    for line in path.read_text("utf-8").splitlines():
        with contextlib.suppress(ValueError):  # half a line, where the disk was full
            if json.loads(line)["audit"]:
                return True
    return False
