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
_HEADS = (
    *(">rank", "state", ">epoch", ">samples/s", ">waiting"),
    *(">memory\nof main", ">of the\nworkers", ">last\nbatch"),
)
_COUNTS = ("skipped", "replaced", "failed")
_RANKS = 8  # named
_IF_STUCK = (
    "if the loop waits for data, its log says at which index each worker is, after stall_after= "
    "seconds (60), and timeout= ends the wait; if it computes, nothing is wrong"
)
_DAY_S = 86_400.0


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
        out.print(_shown(folder, look, window))
        return _status(look)
    with Live(_shown(folder, look, window), console=terminal.console(), auto_refresh=False) as live:
        while not _is_over(look):
            time.sleep(every)
            folder.refresh()
            look = _look(folder, window)
            live.update(_shown(folder, look, window), refresh=True)
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
        **_newest(loader),
    }


def _newest(loader: LoaderRecords) -> dict[str, Any]:
    """How many batches it handed over in all, and how long ago the last; None where none was."""
    newest = loader.recent(1, ["step", "asked_ns", "wait_ns"]).to_pylist()
    if not newest:
        return {"handed_over": 0, "quiet_s": None}
    came_ns = int(newest[0]["asked_ns"] + newest[0]["wait_ns"])
    quiet_s = max(0.0, time.time() - came_ns / 1e9)
    return {"handed_over": int(newest[0]["step"]) + 1, "quiet_s": quiet_s}


def _stuck(alive: list[dict[str, Any]], window_s: float) -> str:
    """On which ranks no loader gave a batch for the whole window, in words; empty if on none.

    Where ranks wait for each other, all stop: the one that has fewer batches keeps the others.
    """
    quiet: dict[int, float] = {}
    for each in alive:
        if each["quiet_s"] is not None:
            rank = each["rank"]
            quiet[rank] = min(each["quiet_s"], quiet.get(rank, each["quiet_s"]))
    ranks = sorted(rank for rank, for_s in quiet.items() if for_s >= window_s)
    if not ranks:
        return ""
    said = f"no batch on {_named(ranks)} for {_for(min(quiet[rank] for rank in ranks))}"
    for name in dict.fromkeys(each["loader"] for each in alive):
        had = {each["rank"]: each["handed_over"] for each in alive if each["loader"] == name}
        fewest, most = min(had.values()), max(had.values())
        behind = sorted(rank for rank in ranks if had.get(rank) == fewest)
        if fewest < most and behind:
            return f"{said}; {_named(behind)} had {fewest:,} batches, others {most:,}"
    return said


def _for(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_RANKS]))
    more = f" and {len(ranks) - _RANKS} more" if len(ranks) > _RANKS else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}{more}"


def _is_over(look: list[dict[str, Any]]) -> bool:
    return bool(look) and not any(each["state"] in ("running", "silent") for each in look)


def _status(look: list[dict[str, Any]]) -> int:
    return NO if any(each["state"] in ("killed", "cut off") for each in look) else FINE


def _shown(run: RunFolder, look: list[dict[str, Any]], window_s: float) -> Group:
    alive = [each for each in look if each["state"] in ("running", "silent")]
    waits = [each["wait_share"] for each in alive if each["wait_share"] is not None]
    speed = sum(each["samples_per_s"] or 0.0 for each in alive)
    stuck = _stuck(alive, window_s)
    said = f"{run.path}, attempt {max(run.attempts, default=0)}: "
    if stuck:
        said += f"{terminal.some(len(alive), 'loader')} running, {stuck}"
    elif alive:
        said += f"{terminal.some(len(alive), 'loader')} running, {terminal.rate(speed)} samples/s"
        said += f", waiting {terminal.share(max(waits))} of the time at most" if waits else ""
    else:
        states = Counter(each["state"] for each in look)
        told = ", ".join(f"{count} {state}" for state, count in states.items())
        said += f"nothing runs, {told}" if look else "nothing was written yet"
    names = {each["loader"] for each in look}
    said += f": {terminal.short(*names)}" if len(names) == 1 else ""
    style = "green" if alive and not stuck else "yellow"
    parts: list[Any] = [Text(terminal.printable(said), style=f"bold {style}")]
    for name in sorted(names):
        parts += [Text(terminal.printable(terminal.short(name)))] if len(names) > 1 else []
        its = [each for each in look if each["loader"] == name]
        parts += [_table(its), *map(Text, _besides(its))]
    if stuck:
        parts.append(Text(f"next: {_IF_STUCK}", style="bold"))
    elif not alive:
        parts.append(
            Text(terminal.printable(f"next: python -m safeloader show {run.path}"), style="bold")
        )
    return Group(*parts)


def _table(its: list[dict[str, Any]]) -> Table:
    """The ranks of one loader: in 80 columns, the usual width of a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for head in _HEADS:
        right = head.startswith(">")
        table.add_column(head.lstrip(">"), justify="right" if right else "left", no_wrap=True)
    for each in sorted(its, key=lambda each: int(each["rank"])):
        cells = (Text(terminal.printable(str(cell))) for cell in _row(each))
        table.add_row(*cells, style="red" if each["state"] == "killed" else "")
    return table


def _besides(its: list[dict[str, Any]]) -> list[str]:
    """What was left out or failed, a line for each rank that has any."""
    told = []
    for each in sorted(its, key=lambda each: int(each["rank"])):
        counts = ", ".join(f"{each[count]:,} {count}" for count in _COUNTS if each[count])
        told += [f"rank {each['rank']}: {counts}"] if counts else []
    more = [f"and so on, {len(told) - _RANKS} more ranks"] if len(told) > _RANKS else []
    return told[:_RANKS] + more


def _row(each: dict[str, Any]) -> list[Any]:
    runs = each["state"] in ("running", "silent")
    memory = each["memory_bytes"]
    return [
        each["rank"],
        each["state"],
        "-" if each["epoch"] is None else each["epoch"],
        terminal.rate(each["samples_per_s"]) if runs else "-",
        terminal.share(each["wait_share"]) if runs else "-",
        terminal.size(memory["main"]),
        terminal.size(memory["workers"]),
        "-" if each["quiet_s"] is None else f"{_for(each['quiet_s'])} ago",
    ]
