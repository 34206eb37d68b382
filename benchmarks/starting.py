"""What it takes until the first batch is there: `python -m benchmarks.starting`.

The dataset is a list of strings, as paths of files are. For fork, forkserver and spawn, and for 1,
2, 4 and 8 workers, the stock loader and `SafeDataLoader` take turns, each time in a process of its
own: from `iter(loader)` to its return and to the first batch, the CPU time of main until then, and
what main and workers hold in memory together (PSS; its peak until the first batch, and after it).
Under forkserver the server runs already, as it does from a program's second epoch on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks import environment
from benchmarks.intervals import spread
from benchmarks.report import RESULTS, markdown, span, write_texts

METHODS, WORKERS = ("fork", "forkserver", "spawn"), (1, 2, 4, 8)
STRINGS, QUICK_STRINGS = 2_000_000, 20_000
REPEATS, QUICK_REPEATS = 6, 1
LOADERS = ("stock", "safe")
EVERY_S = 0.05


class Strings(torch.utils.data.Dataset[int]):
    """A list of strings; a sample is the length of one."""

    def __init__(self, count: int) -> None:
        self.strings = [f"some/folder/of/images/number/{k:09d}.jpg" for k in range(count)]

    def __len__(self) -> int:
        return len(self.strings)

    def __getitem__(self, index: int) -> int:
        return len(self.strings[index])


@dataclass(frozen=True)
class Start:
    """One start of one loader."""

    iter_s: float
    """From `iter(loader)` to its return."""
    first_s: float
    """From `iter(loader)` to the first batch."""
    main_cpu_s: float
    """User and system time of the main process, from `iter(loader)` to the first batch."""
    peak_bytes: int
    """PSS of main and workers together: the highest seen until the first batch."""
    held_bytes: int
    """The same, after the first batch."""


# ------------------------------------------------------------------------- the process measured


def _pss() -> int:
    """Of this process and its descendants; a process that has just ended counts nothing."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    total = 0
    main = psutil.Process()
    for process in (main, *main.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def _loader(name: str, *args: Any, **kwargs: Any) -> DataLoader[Any]:
    if name == "stock":
        return DataLoader(*args, **kwargs)
    from safeloader import SafeDataLoader

    return SafeDataLoader(*args, **kwargs)


def start(name: str, method: str, workers: int, strings: int, memory: bool) -> Start:
    """Start a loader in this process. Reading the memory slows it: not in the run that is timed."""
    torch.set_num_threads(1)
    dataset = Strings(strings)
    loader = _loader(
        name, dataset, batch_size=32, num_workers=workers, multiprocessing_context=method
    )
    if method == "forkserver":
        context: Any = multiprocessing.get_context(method)
        process = context.Process()
        process.start()
        process.join()
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(EVERY_S):
            peak[0] = max(peak[0], _pss())

    watching = threading.Thread(target=watch)
    if memory:
        watching.start()
    began, cpu = time.perf_counter(), time.process_time()
    batches = iter(loader)
    made = time.perf_counter()
    next(batches)
    first, cpu = time.perf_counter(), time.process_time() - cpu
    done.set()
    held = 0
    if memory:
        watching.join()
        held = _pss()
    return Start(made - began, first - began, cpu, max(peak[0], held), held)


def _run(name: str, method: str, workers: int, strings: int) -> Start:
    """In fresh processes: one timed, one whose memory is read."""
    found = []
    for memory in (0, 1):
        given = [name, method, *map(str, (workers, strings, memory))]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.starting", "--child", *given],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        found.append(Start(**json.loads(done.stdout.splitlines()[-1])))
    timed, read = found
    return Start(timed.iter_s, timed.first_s, timed.main_cpu_s, read.peak_bytes, read.held_bytes)


# --------------------------------------------------------------------------------- the parent


@dataclass(frozen=True)
class Result:
    """The starts of both loaders under one start method, pair by pair."""

    method: str
    workers: int
    stock: list[Start]
    safe: list[Start]


def compare(method: str, workers: int, strings: int, repeats: int) -> Result:
    """Both loaders in turn: A B, B A, ..."""
    starts: dict[str, list[Start]] = {name: [] for name in LOADERS}
    for turn in range(repeats):
        for name in LOADERS if turn % 2 == 0 else reversed(LOADERS):
            starts[name].append(_run(name, method, workers, strings))
    return Result(method, workers, **starts)


_HEAD = (
    "start method",
    "workers",
    "speed ratio",
    "95 % interval",
    "quartiles",
    "first batch s",
    "iter() s",
    "main CPU s",
    "peak MB",
    "held MB",
)


def table(results: Sequence[Result]) -> str:
    return markdown(_HEAD, [_cells(each) for each in results])


def _cells(result: Result) -> list[str]:
    ratio = spread([a.first_s / b.first_s for a, b in zip(result.stock, result.safe, strict=True)])

    def both(field: str, form: str, unit: float = 1) -> str:
        ours, stocks = (
            spread([getattr(each, field) / unit for each in starts]).median
            for starts in (result.safe, result.stock)
        )
        return f"{ours:{form}} ({stocks:{form}})"

    return [
        result.method,
        str(result.workers),
        f"{ratio.median:.2f}",
        span(ratio.interval),
        span(ratio.quartiles),
        both("first_s", ".2f"),
        both("iter_s", ".2f"),
        both("main_cpu_s", ".2f"),
        both("peak_bytes", ".0f", 1e6),
        both("held_bytes", ".0f", 1e6),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.child:
        name, method, *numbers = options.child
        workers, strings, memory = map(int, numbers)
        print(json.dumps(asdict(start(name, method, workers, strings, bool(memory)))))
        return 0
    results = []
    for method in options.methods:
        for workers in options.workers:
            results.append(compare(method, workers, options.strings, options.repeats))
            print(f"{method}, {workers} workers: done", file=sys.stderr, flush=True)
    print(table(results))
    if not options.quick:
        facts = environment.describe()
        settings = {"strings": options.strings, "repeats": options.repeats}
        whole = {
            "environment": facts,
            "settings": settings,
            "results": [asdict(each) for each in results],
        }
        stem = f"{facts['date']}-{environment.label()}-starting"
        for path in write_texts(options.out, stem, whole, table(results)):
            print(f"wrote {path}", file=sys.stderr)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.starting",
        description="Time, CPU and memory from iter() to the first batch, by start method.",
    )
    add: Any = parser.add_argument
    add("--methods", default=",".join(METHODS), help="a,b,... (default: all)")
    add("--workers", default=",".join(map(str, WORKERS)), help="a,b,... (default: %(default)s)")
    add("--strings", type=int, help=f"in the list ({STRINGS}; with --quick {QUICK_STRINGS})")
    add("--repeats", type=int, help=f"pairs ({REPEATS}; with --quick {QUICK_REPEATS})")
    add("--quick", action="store_true", help="a first look; writes no files")
    add("--out", type=Path, default=RESULTS, help="folder for results")
    add("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.methods = options.methods.split(",")
    if unknown := set(options.methods) - set(METHODS):
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    try:
        options.workers = [int(each) for each in options.workers.split(",")]
    except ValueError:
        parser.error("--workers must be numbers: 1,2,4")
    if options.strings is None:
        options.strings = QUICK_STRINGS if options.quick else STRINGS
    if options.repeats is None:
        options.repeats = QUICK_REPEATS if options.quick else REPEATS
    if min(options.repeats, options.strings, *options.workers) < 1:
        parser.error("--repeats, --strings and --workers must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
