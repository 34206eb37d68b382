"""What commands over a run have in common: opening it, printing words and tables. Runs in: main.

Answers go to stdout, complaints to stderr. In a pipe tables are not cut to the width of a terminal.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from safeloader.commands import BadInput
from safeloader.report.run import NotARunFolder, RunFolder

RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        show_default=False,
        help="The folder of a run: what run_dir=, SAFELOADER_RUN or --run were given.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for a program.")]
AttemptOption = Annotated[
    int | None, typer.Option("--attempt", metavar="N", min=0, help="Of this attempt alone.")
]

_WIDE = 10_000


def replaying(run: RunFolder, failure: str) -> str:
    """The command that fetches a failing sample once more, for the program of the run."""
    words = [str(each) for each in run.info.get("command", ())]
    program = next((each for each in words[1:] if each.endswith(".py")), "train.py")
    place = shlex.quote(f"{program}:make_dataset")
    return (
        f"python -m safeloader replay {shlex.quote(failure)} {place} fetches it once more; write "
        "for make_dataset the name of your class or function there that gives the dataset"
    )


def opened(path: Path, *, convert: bool = False) -> RunFolder:
    """The run in a folder.

    Args:
        path: its folder.
        convert: turn closed segments into Parquet first, for what reads the whole run.

    Raises:
        BadInput: if there is none, or pyarrow is missing.
    """
    try:
        run = RunFolder(path)
    except NotARunFolder as exc:
        known = _runs_in(path)
        more = f"; there are runs in it: {', '.join(known)}" if known else ""
        raise BadInput(f"{exc}{more}") from None
    except ImportError as exc:
        raise BadInput(str(exc)) from None
    for loader in run.loaders if convert else ():
        loader.convert()
    return run


def _runs_in(path: Path) -> list[str]:
    try:
        return sorted(str(each.parent) for each in path.glob("*/run.json"))[:5]
    except OSError:
        return []


def check_attempt(run: RunFolder, attempt: int | None) -> None:
    """See that there is such an attempt.

    Raises:
        BadInput: if there is none.
    """
    if attempt is not None and attempt not in run.attempts:
        known = ", ".join(map(str, run.attempts)) or "none"
        raise BadInput(f"there is no attempt {attempt} in {run.path}: it has {known}")


def console() -> Console:
    """Where answers are printed.

    When `| head` has seen enough, the rest goes nowhere, and the exit status is the answer's.
    """
    if sys.stdout.isatty():
        out = Console(highlight=False, soft_wrap=False)
    else:
        out = Console(highlight=False, width=_WIDE, no_color=True)
    out.on_broken_pipe = no_more_output
    return out


def no_more_output() -> None:
    """What is printed from here on goes nowhere."""
    fd = os.open(os.devnull, os.O_WRONLY)
    os.dup2(fd, sys.stdout.fileno())
    os.close(fd)


def print_json(value: Any) -> None:
    """Print what a program reads."""
    try:
        print(json.dumps(value, indent=1, default=str, allow_nan=False), flush=True)
    except BrokenPipeError:
        no_more_output()


def printable(said: str) -> str:
    """A text on one line that tells a terminal nothing: file names and messages may hold anything.

    Example:
        >>> print(printable(f"a{chr(27)}[31m.png"))
        a\\x1b[31m.png
    """
    if said.isprintable():
        return said
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in said)


def answer(out: Console, ok: bool | None, said: str) -> None:
    """The answer, first of all: green, red, or yellow where it cannot be told."""
    style = "bold " + {True: "green", False: "red", None: "yellow"}[ok]
    out.print(Text(printable(said), style=style), soft_wrap=True)


def lines(out: Console, said: Iterable[str], indent: str = "  ") -> None:
    """Evidence, a line each. The terminal breaks it, so that a path can be copied whole."""
    for each in said:
        out.print(Text(f"{indent}{printable(each)}"), soft_wrap=True)


def next_step(out: Console, said: str) -> None:
    """What to do now, if there is anything."""
    if said:
        out.print(Text(f"next: {printable(said)}", style="bold"), soft_wrap=True)


def table(out: Console, heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table; heads that begin with ``>`` stand over numbers, at the right."""
    its = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for head in heads:
        right = head.startswith(">")
        its.add_column(
            head.lstrip(">"),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="ellipsis" if right else "fold",
        )
    for row in rows:
        its.add_row(*(Text(printable(str(each))) for each in row))
    if out.width >= _WIDE:
        its.expand = False
    out.print(its)


# ── words ────────────────────────────────────────────────────────────────────────────────────────


def share(value: float | None) -> str:
    """A share as a percentage."""
    return "-" if value is None else f"{100 * value:.0f}%"


def rate(value: float | None) -> str:
    """Samples a second."""
    return "-" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def took(ns: float | None) -> str:
    """A time that was needed.

    Example:
        >>> took(1.2e9), took(3.4e6), took(900)
        ('1.20 s', '3.40 ms', '0.9 us')
    """
    if ns is None:
        return "-"
    for unit, size in (("s", 1e9), ("ms", 1e6)):
        if ns >= size:
            return f"{ns / size:.2f} {unit}"
    return f"{ns / 1e3:.1f} us"


def size(value: int | None) -> str:
    """Bytes, as kB, MB or GB.

    Example:
        >>> size(2_500_000_000), size(186_000_000), size(70_400)
        ('2.50 GB', '186 MB', '70 kB')
    """
    if value is None:
        return "-"
    if value < 1e6:
        return f"{value / 1e3:.0f} kB"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def moment(ns: int | None) -> str:
    """A time of day, with its date."""
    return "-" if ns is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ns / 1e9))


def some(count: int, noun: str) -> str:
    """A number and what it counts.

    Example:
        >>> some(2, "epoch"), some(2000, "batch")
        ('2 epochs', '2,000 batches')
    """
    many = {"batch": "batches"}.get(noun, f"{noun}s")
    return f"{count:,} {noun if count == 1 else many}"


def without_source(reason: str, source: str) -> str:
    """Why a sample was left out, where its source stands beside it.

    Example:
        >>> without_source("KeyError: 'x'; files[3] = '3.png'", "files[3] = '3.png'")
        "KeyError: 'x'"
    """
    return reason.removesuffix(f"; {source}") if source else reason


def short(loader: str) -> str:
    """A loader's name, with the file of its line without the folders."""
    name, at, line = loader.rpartition(" at ")
    return f"{name} at {os.path.basename(line)}" if at else loader
