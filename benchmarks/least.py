"""The least that an epoch of fresh workers takes on this machine: `python -m benchmarks.least`.

As many bare processes as the loader has workers are forked. Each makes its share of the batches,
in memory that it fills again and again where samples are stacked, hands nothing over to anybody,
and ends. No queue, no seed, no record: whatever a loader takes beyond that is its own. How many
times as fast as the stock loader that is bounds what any loader with forked workers can reach on
this machine, and a bar above it cannot be reached here.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from benchmarks.cases import CASES, START_METHOD, Case, Unavailable
from benchmarks.intervals import FEWEST_FOR_INTERVAL, Spread, spread
from benchmarks.report import RESULTS, keep, markdown
from safeloader import SafeDataLoader

REPEATS, QUICK_REPEATS = 12, 1
FRESH = {name: case for name, case in CASES.items() if case.fresh}


class BareProcesses:
    """An epoch of a loader, but for all that is the loader's."""

    def __init__(self, dataset: Any, kwargs: dict[str, Any]) -> None:
        self.dataset = dataset
        self.collate = kwargs.get("collate_fn") or default_collate
        order = {name: kwargs[name] for name in ("batch_size", "shuffle") if name in kwargs}
        positions: Any = range(len(dataset))
        self.batches: list[list[int]] = list(DataLoader(positions, collate_fn=list, **order))
        # Of more processes than batches some would have nothing to do.
        self.processes = min(kwargs["num_workers"], len(self.batches))

    def run(self) -> None:
        """One epoch.

        Raises:
            RuntimeError: if a process failed, so that less was done.
        """
        started = [self._fork(number) for number in range(self.processes)]
        if any(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started):
            raise RuntimeError("a process that makes batches failed")

    def _fork(self, number: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            torch.set_num_threads(1)  # as in a loader's worker
            self.make(self.batches[number :: self.processes])
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def make(self, batches: Sequence[Sequence[int]]) -> None:
        """Make these batches, each over the one before where they are stacked."""
        rooms: dict[int, torch.Tensor] = {}
        for batch in batches:
            samples = [self.dataset[index] for index in batch]
            if self.collate is not default_collate:
                self.collate(samples)
                continue
            columns = list(zip(*samples, strict=True)) if type(samples[0]) is tuple else [samples]
            for number, column in enumerate(columns):
                if isinstance(column[0], torch.Tensor):
                    shape = len(column), *column[0].shape
                    room = rooms.get(number)
                    if room is None or room.shape != shape:
                        room = rooms[number] = torch.empty(shape, dtype=column[0].dtype)
                    torch.stack(column, out=room)
                else:
                    default_collate(list(column))


def measured(case: Case, repeats: int, batches: int) -> dict[str, list[float]]:
    """Seconds of an epoch of the stock loader, of ours and of bare processes, in turns."""
    dataset, kwargs = case.build(batches)
    consumed = functools.partial(deque[Any], maxlen=0)
    epochs: dict[str, Callable[[], object]] = {
        "stock": functools.partial(consumed, DataLoader(dataset, **kwargs)),
        "safe": functools.partial(consumed, SafeDataLoader(dataset, **kwargs, trace=False)),
        "least": BareProcesses(dataset, kwargs).run,
    }
    times: dict[str, list[float]] = {name: [] for name in epochs}
    for turn in range(repeats + 1):
        for name in epochs if turn % 2 else reversed(epochs):
            began = time.perf_counter()
            epochs[name]()
            if turn:  # the first fills caches
                times[name].append(time.perf_counter() - began)
    return times


def ratios(times: dict[str, list[float]], name: str) -> Spread:
    """How many times as fast as the stock loader, in each turn."""
    return spread([a / b for a, b in zip(times["stock"], times[name], strict=True)])


def verdict(bar: float, safe: Spread, least: Spread) -> str:
    """Whether the bar is reached, and if not, whether anything could reach it here."""
    if safe.median >= bar:
        return "reached"
    if least.interval is not None and least.interval[1] < bar:
        return "out of reach here"
    return "not excluded" if least.median > bar else "unclear"


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
        safe, least = ratios(times, "safe"), ratios(times, "least")
        shown = [f"{statistics.median(times[each]) * 1e3:.0f}" for each in ("stock", "safe")]
        shown.append(f"{statistics.median(times['least']) * 1e3:.0f}")
        said = verdict(case.bar, safe, least)
        rows.append((name, _told(safe), _told(least), f"{case.bar:g}", said, *shown))
        print(f"{name}: {_told(safe)}, at most {_told(least)}", file=sys.stderr)
    spread_is = "95 % interval" if repeats >= FEWEST_FOR_INTERVAL else "quartiles"
    head = ("case", f"safe, times stock ({spread_is})", "bare processes, times stock", "bar", "")
    text = markdown((*head, "stock ms", "safe ms", "bare ms"), rows)
    print(text)
    settings = {"repeats": repeats, "start_method": START_METHOD}
    speeds = [
        {"case": name, "contender": each, "speed": dataclasses.asdict(ratios(times, each))}
        for name, times in found.items()
        for each in ("safe", "least")
    ]
    whole = {"settings": settings, "seconds_per_epoch": found, "rows": speeds}
    keep("least", options, whole, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
