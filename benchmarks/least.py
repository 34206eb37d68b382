"""The least that an epoch of fresh workers takes on this machine: `python -m benchmarks.least`.

Of each case four things are timed, each in a process of its own, in turns: the stock loader, ours,
bare processes, which do the work and hand nothing over, and a lean loader (`benchmarks.bare`).
How many times as fast as the stock loader the bare processes are bounds what any loader with
forked workers can reach on this machine: a bar above it cannot be reached here. The lean loader
seeds its workers and hands batches over in the plainest way (what it makes of own `collate_fn`s is
copied), and records, checks and watches nothing. Both keep the heap of a process as ours does.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.apart import Apart
from benchmarks.bare import BareProcesses, LeanLoader
from benchmarks.cases import CASES, START_METHOD, Case, Unavailable
from benchmarks.contenders import CONTENDERS
from benchmarks.intervals import FEWEST_FOR_INTERVAL, Spread, spread
from benchmarks.report import RESULTS, keep, markdown

REPEATS, QUICK_REPEATS = 12, 1
FRESH = {name: case for name, case in CASES.items() if case.fresh}
PROCESSES = {"bare": BareProcesses, "lean": LeanLoader}
TIMED = ("stock", "safe", *PROCESSES)


class Epochs:
    """Epochs of one case, by one of those that are timed, in whose process this is."""

    def __init__(self, case: str, by: str, batches: int) -> None:
        dataset, kwargs = CASES[case].build(batches)
        self._loader: Iterable[Any]
        if by in PROCESSES:
            self._loader = PROCESSES[by](dataset, kwargs)
        else:
            self._loader = CONTENDERS[by](dataset, kwargs, Path())

    def has_loaded(self, module: str) -> bool:
        """Whether this process has; its workers inherit that."""
        return module in sys.modules

    def seconds(self) -> float:
        """What the next one takes."""
        began = time.perf_counter()
        deque[Any](self._loader, maxlen=0)
        return time.perf_counter() - began


def measured(case: Case, repeats: int, batches: int) -> dict[str, list[float]]:
    """Seconds of an epoch by each, in turns."""
    with ExitStack() as ends:
        epochs = {by: ends.enter_context(Apart(Epochs, case.name, by, batches)) for by in TIMED}
        times: dict[str, list[float]] = {by: [] for by in epochs}
        for turn in range(repeats + 1):
            for by in epochs if turn % 2 else reversed(epochs):
                seconds = epochs[by].ask("seconds")
                if turn:  # the first fills caches
                    times[by].append(seconds)
    return times


def ratios(times: dict[str, list[float]], name: str) -> Spread:
    """How many times as fast as the stock loader, in each turn."""
    return spread([a / b for a, b in zip(times["stock"], times[name], strict=True)])


def verdict(bar: float, safe: Spread, bare: Spread, lean: Spread) -> str:
    """Whether the bar is reached, and if not, whether anything could reach it here."""
    if safe.median >= bar:
        return "reached"
    if bare.interval is not None and bare.interval[1] < bar:
        return "out of reach here"
    if lean.interval is not None and lean.interval[1] < bar:
        return "above the lean loader"
    return "not excluded" if bare.median > bar else "unclear"


def _told(found: Spread) -> str:
    low, high = found.interval or found.quartiles
    return f"{found.median:.2f} ({low:.2f} to {high:.2f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.least",
        description="The least that an epoch of fresh workers takes on this machine.",
    )
    add: Any = parser.add_argument
    add("--cases", nargs="+", choices=list(FRESH), default=list(FRESH), metavar="CASE")
    add("--repeats", type=int, help=f"epochs of each ({REPEATS}; with --quick {QUICK_REPEATS})")
    add("--quick", action="store_true", help="one short epoch of each, no files")
    add("--out", type=Path, help=f"folder for results (default: {RESULTS.name}/ beside this file)")
    options = parser.parse_args(arguments)
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    torch.set_num_threads(1)
    rows, found = [], {}
    for name in options.cases:
        case = FRESH[name]
        try:
            times = measured(case, repeats, 4 if options.quick else case.batches)
        except Unavailable as reason:
            print(f"{name}: left out: {reason}", file=sys.stderr)
            continue
        found[name] = times
        speeds = [ratios(times, by) for by in TIMED[1:]]
        told = [_told(speed) for speed in speeds]
        shown = [f"{statistics.median(times[by]) * 1e3:.0f}" for by in TIMED]
        rows.append((name, *told, f"{case.bar:g}", verdict(case.bar, *speeds), *shown))
        print(f"{name}: {told[0]}, at most {told[1]}, lean {told[2]}", file=sys.stderr)
    spread_is = "95 % interval" if repeats >= FEWEST_FOR_INTERVAL else "quartiles"
    heads = (f"safe, times stock ({spread_is})", "bare processes", "lean loader", "bar", "")
    text = markdown(("case", *heads, *(f"{by} ms" for by in TIMED)), rows)
    print(text)
    settings = {"repeats": repeats, "start_method": START_METHOD}
    compared = [
        {"case": name, "contender": by, "speed": dataclasses.asdict(ratios(times, by))}
        for name, times in found.items()
        for by in TIMED[1:]
    ]
    whole = {"settings": settings, "seconds_per_epoch": found, "rows": compared}
    keep("least", options, whole, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
