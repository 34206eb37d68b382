"""``python -m safeloader watch RUN``: a run as it goes on, a line a rank. Runs in: main."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from safeloader.commands import FINE, NO, terminal
from safeloader.commands.terminal import JsonOption, RunArgument
from safeloader.report.figures import figures_of, memory_of
from safeloader.report.folder import LoaderRecords
from safeloader.report.outcomes import failures_of
from safeloader.report.run import RunFolder

EXAMPLE = "python -m safeloader watch runs/exp1"
_HEADS = ("rank", "loader", "state", "epoch", "samples/s", "waiting", "main", "workers")
_DAY_S = 86_400.0
_COUNTS = ("skipped", "replaced", "failed", "last sign")


def watch(
    run: RunArgument,
    every: Annotated[
        float,
        typer.Option("--every", metavar="SECONDS", min=0.1, max=_DAY_S, help="Between two looks."),
    ] = 2.0,
    window: Annotated[
        float,
        typer.Option(
            "--window", metavar="SECONDS", min=1.0, max=_DAY_S, help="What rates are over."
        ),
    ] = 30.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    as_json: JsonOption = False,
) -> int:
    """A line a rank, live: samples/s, share of time waiting, memory, skips, failures.

    It shows the newest attempt, and ends when no process of it is alive: with 0 if all of them
    ended, and 1 if one was killed. With --json it prints a line of JSON for each look; where the
    output is no terminal it looks once.
    """
    folder = terminal.opened(run)
    look = _look(folder, window)
    if as_json:
        return _as_json(folder, look, every, window, once)
    if once or not sys.stdout.isatty():
        out = terminal.console()
        out.print(_shown(folder, look))
        return _status(look)
    with Live(_shown(folder, look), console=terminal.console(), auto_refresh=False) as live:
        while not _is_over(look):
            time.sleep(every)
            folder.refresh()
            look = _look(folder, window)
            live.update(_shown(folder, look), refresh=True)
    return _status(look)


def _as_json(
    run: RunFolder, look: list[dict[str, Any]], every: float, window: float, once: bool
) -> int:
    while True:
        print(json.dumps({"time": time.time(), "loaders": look}, allow_nan=False), flush=True)
        if once or _is_over(look):
            return _status(look)
        time.sleep(every)
        run.refresh()
        look = _look(run, window)


def _look(run: RunFolder, window_s: float) -> list[dict[str, Any]]:
    """What each loader of the newest attempt does now."""
    newest = max(run.attempts, default=0)
    return [_of(each, window_s) for each in run.loaders if each.attempt == newest]


def _of(loader: LoaderRecords, window_s: float) -> dict[str, Any]:
    figures = figures_of(loader, time.time_ns() - int(window_s * 1e9))
    counts = {"skipped": 0, "replaced": 0, "late": 0}
    for line in loader.lines("incidents.jsonl"):
        if line.get("what") in counts:
            counts[str(line["what"])] += 1
    failed = sum(not each["survived"] for each in failures_of(loader))
    epoch = figures.epoch
    if epoch is None:  # nothing came within the window
        lines = loader.lines("epochs.jsonl")
        epoch = lines[-1].get("epoch") if lines else None
    return {
        **figures.to_dict(),
        **counts,
        "epoch": epoch,
        "failed": failed,
        "memory_bytes": memory_of(loader),
        "last_sign_s": max(0.0, time.time() - loader.last_sign),
    }


def _is_over(look: list[dict[str, Any]]) -> bool:
    return bool(look) and not any(each["state"] in ("running", "silent") for each in look)


def _status(look: list[dict[str, Any]]) -> int:
    return NO if any(each["state"] in ("killed", "cut off") for each in look) else FINE


def _shown(run: RunFolder, look: list[dict[str, Any]]) -> Group:
    alive = [each for each in look if each["state"] in ("running", "silent")]
    waits = [each["wait_share"] for each in alive if each["wait_share"] is not None]
    speed = sum(each["samples_per_s"] or 0.0 for each in alive)
    said = f"{run.path}, attempt {max(run.attempts, default=0)}: "
    if alive:
        said += f"{terminal.some(len(alive), 'loader')} running, {terminal.rate(speed)} samples/s"
        said += f", waiting {terminal.share(max(waits))} of the time at most" if waits else ""
    else:
        states = Counter(each["state"] for each in look)
        told = ", ".join(f"{count} {state}" for state, count in states.items())
        said += f"nothing runs, {told}" if look else "nothing was written yet"
    names = {each["loader"] for each in look}
    left_out = {1} if len(names) == 1 else set()  # the loader, which then stands above
    said += f": {terminal.short(*names)}" if left_out else ""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for at, head in enumerate((*_HEADS, *_COUNTS)):
        if at not in left_out:
            justify: Any = "left" if head in ("loader", "state") else "right"
            table.add_column(head, justify=justify, no_wrap=True, overflow="ellipsis")
    for each in sorted(look, key=lambda each: (each["rank"], each["loader"])):
        cells = [str(cell) for at, cell in enumerate(_row(each)) if at not in left_out]
        table.add_row(
            *map(Text, map(terminal.printable, cells)),
            style="red" if each["state"] == "killed" else "",
        )
    style = "green" if alive else "yellow"
    last = Text(terminal.printable(f"next: python -m safeloader show {run.path}"), style="bold")
    parts: list[Any] = [Text(terminal.printable(said), style=f"bold {style}"), table]
    return Group(*parts, *([] if alive else [last]))


def _row(each: dict[str, Any]) -> list[Any]:
    runs = each["state"] in ("running", "silent")
    memory = each["memory_bytes"]
    return [
        each["rank"],
        terminal.short(each["loader"]),
        each["state"],
        "-" if each["epoch"] is None else each["epoch"],
        terminal.rate(each["samples_per_s"]) if runs else "-",
        terminal.share(each["wait_share"]) if runs else "-",
        terminal.size(memory["main"]),
        terminal.size(memory["workers"]),
        each["skipped"],
        each["replaced"],
        each["failed"],
        f"{each['last_sign_s']:.0f} s ago",
    ]
