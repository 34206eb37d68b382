"""What `python -m safeloader run` costs: in the hot path beside the swap, and at the start.

`python -m benchmarks.launcher --help`. Epochs of a stock loader, of `SafeDataLoader` and of a stock
loader recorded from beside run in turn, with workers that persist and with fresh ones. The start is
the time from the command to a program's first line, with the launcher and without, in turn.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.cases import CASES
from benchmarks.contenders import REFERENCE
from benchmarks.intervals import Spread, spread
from benchmarks.report import RESULTS, markdown, span, write_texts
from benchmarks.timing import EpochTime, childrens_cpu_seconds, time_case

ROOT = Path(__file__).resolve().parents[1]
SWAP, LAUNCHER = "safe", "launcher"
DEFAULT_CASES = ("small-2w", "medium-2w", "text-2w", "small-2w-fresh", "medium-2w-fresh")
REPEATS, STARTS = 20, 15
START_BAR_MS = 100.0
_FIRST_LINE = "print('here', flush=True)\n"


@dataclass(frozen=True)
class Cost:
    """The launcher's speed over another's in one case, a ratio each pair of neighbouring epochs."""

    case: str
    against: str
    ratios: list[float]
    bar: float | None
    """None: told, and held to nothing."""

    @property
    def speed(self) -> Spread:
        """1.00 is as fast; below it, the launcher costs something."""
        return spread(self.ratios)

    @property
    def verdict(self) -> str:
        """ "BELOW" only where the whole interval is."""
        if self.bar is None:
            return "–"  # noqa: RUF001
        interval = self.speed.interval
        if interval is not None and interval[1] < self.bar:
            return "BELOW"
        return "ok" if self.speed.median >= self.bar else "unclear"


@dataclass(frozen=True)
class Start:
    """Starts without and with the launcher, in neighbouring pairs; milliseconds."""

    plain_ms: list[float]
    """From the command to the program's first line."""
    launched_ms: list[float]
    plain_cpu_ms: list[float]
    """CPU time of the whole process: what the clock says on a machine that does nothing else."""
    launched_cpu_ms: list[float]

    @property
    def added(self) -> Spread:
        """What the launcher adds to the time until the first line."""
        return _differences(self.plain_ms, self.launched_ms)

    @property
    def added_cpu(self) -> Spread:
        """What it adds in CPU time."""
        return _differences(self.plain_cpu_ms, self.launched_cpu_ms)

    @property
    def verdict(self) -> str:
        """Whether the median is under the bar."""
        return "ok" if self.added.median < START_BAR_MS else "ABOVE"


def _differences(plain: Sequence[float], launched: Sequence[float]) -> Spread:
    return spread([ours - one for one, ours in zip(plain, launched, strict=True)])


def costs(case: str, bar: float, times: Mapping[str, Sequence[EpochTime]]) -> list[Cost]:
    """The launcher against the swap, and against the stock loader, which has the case's bar."""
    found = []
    for against, held_to in ((SWAP, None), (REFERENCE, bar)):
        pairs = zip(times[against], times[LAUNCHER], strict=True)
        ratios = [other.per_batch_ns / ours.per_batch_ns for other, ours in pairs]
        found.append(Cost(case, against, ratios, held_to))
    return found


def first_line_ms(words: Sequence[str]) -> tuple[float, float]:
    """The time from the start of a process to its first line, and its CPU time to its end."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    cpu_before, began = childrens_cpu_seconds(), time.perf_counter_ns()
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as process:
        line = next(process.stdout or iter(()), "")
        taken = time.perf_counter_ns() - began
    if line.strip() != "here":
        raise RuntimeError(f"{words} said {line!r} at first")
    return taken / 1e6, 1e3 * (childrens_cpu_seconds() - cpu_before)


def time_start(folder: Path, times: int) -> Start:
    """Start a program with and without the launcher, in turn, once before without a clock."""
    program = folder / "program.py"
    program.write_text(_FIRST_LINE)
    commands = {
        "plain": [sys.executable, str(program)],
        "launched": [sys.executable, "-m", "safeloader", "run", str(program)],
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for turn in range(times + 1):
        for name in commands if turn % 2 == 0 else reversed(commands):
            both = first_line_ms(commands[name])
            if turn:
                taken[name].append(both)
    (plain_ms, plain_cpu_ms), (ms, cpu_ms) = (
        map(list, zip(*each, strict=True)) for each in taken.values()
    )
    return Start(plain_ms, ms, plain_cpu_ms, cpu_ms)


def table(found: Sequence[Cost], start: Start) -> str:
    """The hot path, a line for each case and what it is compared with; and the start."""
    head = ("case", "launcher against", "speed ratio", "95 % interval", "quartiles", "verdict")
    rows = [
        (
            each.case,
            each.against,
            f"{each.speed.median:.3f}",
            span(each.speed.interval),
            span(each.speed.quartiles),
            each.verdict,
        )
        for each in found
    ]
    plain, launched = spread(start.plain_ms), spread(start.launched_ms)
    said = (
        f"First line of a program: {plain.median:.0f} ms plain, {launched.median:.0f} ms launched; "
        f"added {start.added.median:.0f} ms (95 % interval {span(start.added.interval)}, bar "
        f"{START_BAR_MS:.0f}): {start.verdict}. CPU time, start and end: added "
        f"{start.added_cpu.median:.0f} ms (95 % interval {span(start.added_cpu.interval)})"
    )
    return f"{markdown(head, rows)}\n\n{said}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; with `--check`, the status is 1 where a bar is not met."""
    options = _options(arguments)
    torch.set_num_threads(1)
    found: list[Cost] = []
    with tempfile.TemporaryDirectory(prefix="safeloader-benchmark-") as folder:
        start = time_start(Path(folder), options.starts)
        for name in options.cases:
            case = CASES[name]
            names = [REFERENCE, SWAP, LAUNCHER]
            times, _ = time_case(case, names, case.batches, options.repeats, Path(folder) / name)
            found += costs(name, case.floor, times)
            print(f"{name}: {found[-2].speed.median:.3f}", file=sys.stderr, flush=True)
    print(table(found, start))
    if options.out is not None:
        facts = environment.describe()
        whole = {
            "environment": facts,
            "settings": {"repeats": options.repeats, "starts": options.starts},
            "rows": [asdict(each) | asdict(each.speed) for each in found],
            "start": asdict(start)
            | {"added": asdict(start.added), "added_cpu": asdict(start.added_cpu)},
        }
        stem = f"{facts['date']}-{environment.label()}-launcher"
        for path in write_texts(options.out, stem, whole, table(found, start)):
            print(f"wrote {path}", file=sys.stderr)
    bad = start.verdict != "ok" or any(each.verdict == "BELOW" for each in found)
    return 1 if options.check and bad else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launcher",
        description="What the launcher costs: in the hot path beside the swap, and at the start.",
    )
    add: Any = parser.add_argument
    add("--cases", type=lambda text: text.split(","), default=list(DEFAULT_CASES))
    add("--repeats", type=int, default=REPEATS, help=f"epochs each ({REPEATS})")
    add("--starts", type=int, default=STARTS, help=f"starts of each kind ({STARTS})")
    add("--out", type=Path, default=RESULTS, help=f"folder for results ({RESULTS.name}/ here)")
    add("--no-files", dest="out", action="store_const", const=None, help="print only")
    add("--check", action="store_true", help="exit 1 where a bar is not met")
    options = parser.parse_args(arguments)
    for name in options.cases:
        if name not in CASES:
            parser.error(f"no case {name!r}; there are {', '.join(CASES)}")
    if min(options.repeats, options.starts) < 1:
        parser.error("--repeats and --starts must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
