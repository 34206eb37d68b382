"""Public training programs, as they are and recorded: do they print the same, and how fast?

`python -m benchmarks.programs --help`. Each program is run with the stock loader; with its import
of DataLoader swapped, where it has one; and under `python -m safeloader run`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import safeloader
from benchmarks import environment
from benchmarks.cases import Unavailable
from benchmarks.intervals import spread
from benchmarks.printed import (
    Recorded,
    comparable,
    first_difference,
    numbers,
    parted,
    recorded,
    shortened,
)
from benchmarks.report import RESULTS, markdown, span, write_texts
from benchmarks.timing import childrens_cpu_seconds
from benchmarks.training_programs import PROGRAMS, Program

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3
STOCK, SWAP, LAUNCHER = "stock", "swap", "launcher"
LIMIT_S = 1800.0


@dataclass(frozen=True)
class Ran:
    """One run of a program."""

    status: int
    seconds: float
    cpu_seconds: float
    """Of all its processes: on a busy machine it says more than the clock."""
    lines: list[str]
    """What it printed, comparable."""
    report: list[str]
    """What the launcher said."""


@dataclass(frozen=True)
class Row:
    """A program in one of its ways, against the stock loader."""

    program: str
    way: str
    seconds: list[float]
    cpu_seconds: list[float]
    stock_seconds: list[float]
    stock_cpu_seconds: list[float]
    status: int
    numbers: int
    """Numbers that it printed and that were compared in every run."""
    difference: str | None
    """The first line that a run printed otherwise than the first stock run; None: the same."""
    report: list[str]
    recorded: Recorded | None
    """Of the last run; None without the launcher."""

    @property
    def ratios(self) -> list[float]:
        """Speed over the stock loader's, a round each: 2.0 is twice as fast."""
        return _quotients(self.stock_seconds, self.seconds)

    @property
    def cpu_ratios(self) -> list[float]:
        """The same of CPU time: 2.0 is half of it."""
        return _quotients(self.stock_cpu_seconds, self.cpu_seconds)

    @property
    def verdict(self) -> str:
        """ "ok", or what does not hold."""
        if self.difference is not None:
            return "DIFFERENT"
        if not self.numbers:
            return "NOTHING COMPARED"
        if self.recorded is not None and (self.recorded.troubles or not self.recorded.loaders):
            return "NOT RECORDED"
        return "ok"


def _quotients(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(ones, others, strict=True)]


class Bench:
    """A program, ready to be run in each of its ways.

    Args:
        program: which one.
        checkouts: the folder of checkouts; None without.
        folder: an empty folder for data, copies and what the program writes.
    """

    def __init__(self, program: Program, checkouts: Path | None, folder: Path) -> None:
        self.program = program
        self.checkout = program.found_in(checkouts)
        self.data = folder / "data"
        self.work = folder / "work"
        self.copy = folder / "swapped"
        self.data.mkdir(parents=True)
        program.make_data(self.data)
        self.ways = [STOCK, LAUNCHER]
        if program.imports:
            program.swapped(self.checkout, self.copy)
            self.ways.insert(1, SWAP)
        packages = sysconfig.get_paths()["purelib"]
        named = {str(self.checkout): program.checkout or "", str(folder): "", packages: ""}
        self.roots = {f"{root}{os.sep}": f"{name}/" if name else "" for root, name in named.items()}

    def run(self, way: str) -> Ran:
        """Run it once, in an empty folder."""
        source = self.copy if way == SWAP else self.checkout
        words = self.program.command(source, self.data)
        if way == LAUNCHER:
            words = [sys.executable, "-m", "safeloader", "run", *words]
        elif words[0].endswith(".py"):
            words = [sys.executable, *words]
        self.work.mkdir()
        began, cpu_began = time.perf_counter(), childrens_cpu_seconds()
        try:
            done = subprocess.run(
                words,
                cwd=self.work,
                env=self._environment(source),
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
            )
            seconds = time.perf_counter() - began
        finally:
            shutil.rmtree(self.work)
        errors, report = parted(done.stderr)
        printed = f"{done.stdout}\n{errors}".replace(str(self.copy), str(self.checkout))
        return Ran(
            status=done.returncode,
            seconds=seconds,
            cpu_seconds=childrens_cpu_seconds() - cpu_began,
            lines=comparable(printed, self.program.varies),
            report=[shortened(line, self.roots) for line in report],
        )

    def _environment(self, source: Path) -> dict[str, str]:
        theirs = {name: each for name, each in os.environ.items() if "SAFELOADER" not in name}
        path = [str(ROOT), str(source) if self.program.on_path else "", theirs.get("PYTHONPATH")]
        ours = {
            # Sums of several threads are as long as the machine is busy; one each is steady.
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        }
        own = self.program.environment.items()
        return theirs | ours | {name: each.replace("DATA", str(self.data)) for name, each in own}


def measure(bench: Bench, rounds: int) -> list[Row]:
    """Run each way in turn (A B C, C B A, ...), after a round that only fills caches and settings.

    Raises:
        Unavailable: if the program itself fails.
    """
    runs: dict[str, list[Ran]] = {way: [] for way in bench.ways}
    for turn in range(rounds + 1):
        for way in bench.ways if turn % 2 == 0 else reversed(bench.ways):
            runs[way].append(bench.run(way))
            _say(f"{bench.program.name}, {way}: {runs[way][-1].seconds:.1f} s")
        if turn == 0 and runs[STOCK][0].status != 0:
            last = "\n".join(runs[STOCK][0].lines[-5:])
            raise Unavailable(f"it ended with status {runs[STOCK][0].status}: {last}")
    return [_row(bench.program.name, way, runs) for way in bench.ways]


def _row(program: str, way: str, runs: dict[str, list[Ran]]) -> Row:
    stock, ours = runs[STOCK][1:], runs[way][1:]
    expected, last = stock[0], ours[-1]
    differences = [_difference(expected, each) for each in ours]
    return Row(
        program=program,
        way=way,
        seconds=[each.seconds for each in ours],
        cpu_seconds=[each.cpu_seconds for each in ours],
        stock_seconds=[each.seconds for each in stock],
        stock_cpu_seconds=[each.cpu_seconds for each in stock],
        status=last.status,
        numbers=numbers(expected.lines),
        difference=next(filter(None, differences), None),
        report=last.report,
        recorded=recorded(last.report) if way == LAUNCHER else None,
    )


def _difference(expected: Ran, got: Ran) -> str | None:
    if got.status != expected.status:
        return f"exit status {got.status}, not {expected.status}: {' / '.join(got.lines[-3:])}"
    return first_difference(expected.lines, got.lines)


# table and files ──────────────────────────────────────────────────────────────────────────────


def table(rows: Sequence[Row]) -> str:
    """One line for each program and way, and below what the launcher said."""
    head = (
        *("program", "way", "seconds", "speed ratio", "range", "CPU s", "CPU ratio", "range"),
        *("numbers", "recorded", "verdict"),
    )
    said = [
        f"{row.program}:\n\n```\n" + "\n".join(row.report) + "\n```"
        for row in rows
        if row.way == LAUNCHER
    ]
    different = [f"{row.program}, {row.way}: {row.difference}" for row in rows if row.difference]
    return "\n\n".join([markdown(head, [_cells(row) for row in rows]), *different, *said])


def which(programs: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each program: how it uses DataLoader, its revision, the versions it stands on."""
    lines = []
    for name, told in programs.items():
        parts = [told["loader"]]
        if "revision" in told:
            parts.append(f"revision {told['revision']}")
        parts += [f"{module} {version}" for module, version in told["versions"].items()]
        lines.append(f"- {name}: {'; '.join(parts)}")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    what = row.recorded
    return (
        row.program,
        row.way,
        *_pair(row.seconds, row.ratios),
        *_pair(row.cpu_seconds, row.cpu_ratios),
        str(row.numbers),
        "–"  # noqa: RUF001
        if what is None
        else f"{what.epochs} epochs, {what.delivered} of {what.drawn}",
        row.verdict,
    )


def _pair(seconds: Sequence[float], ratios: Sequence[float]) -> tuple[str, str, str]:
    """Medians, and the range of the ratios: rounds are too few for an interval."""
    ends = (min(ratios), max(ratios))
    return f"{spread(seconds).median:.1f}", f"{spread(ratios).median:.2f}", span(ends)


def about(bench: Bench) -> dict[str, Any]:
    """Which program it was: its revision, and the versions of what it stands on."""
    program = bench.program
    versions = {name: _version(name) for name in program.modules}
    words = program.command(bench.checkout, bench.data)
    told = {
        "loader": program.loader,
        "command": [shortened(f"{word}", bench.roots) for word in words],
        "versions": versions,
    }
    if program.checkout is not None:
        git = ["git", "-C", str(bench.checkout), "rev-parse", "HEAD"]
        found = subprocess.run(git, capture_output=True, text=True)
        told["revision"] = found.stdout.strip() or None
    return told


def _version(module: str) -> str | None:
    names = metadata.packages_distributions().get(module)
    return metadata.version(names[0]) if names else None


# command line ─────────────────────────────────────────────────────────────────────────────────


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them; the status is 1 if one printed otherwise, was not recorded, or could not run."""
    options = _options(arguments)
    rows: list[Row] = []
    programs: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in options.only or PROGRAMS:
        with tempfile.TemporaryDirectory(prefix="safeloader-programs-") as folder:
            try:
                bench = Bench(PROGRAMS[name], options.programs, Path(folder).resolve())
                rows += measure(bench, options.rounds)
                programs[name] = about(bench)
            except Unavailable as reason:
                left_out[name] = str(reason)
                _say(f"{name}: left out: {reason}")
    if not rows:
        return 1
    print(table(rows))
    whole = {
        # The checkout's own: it need not be installed where the programs are.
        "environment": environment.describe() | {"safeloader": safeloader.__version__},
        "settings": {"rounds": options.rounds},
        "programs": programs,
        "left_out": left_out,
        "rows": [
            asdict(row)
            | {"ratios": row.ratios, "cpu_ratios": row.cpu_ratios, "verdict": row.verdict}
            for row in rows
        ],
    }
    if options.out is not None:
        stem = f"{whole['environment']['date']}-{environment.label()}-programs"
        text = f"{which(programs)}\n\n{table(rows)}"
        for path in write_texts(options.out, stem, whole, text):
            _say(f"wrote {path}")
    bad = [row for row in rows if row.verdict != "ok"]
    return 1 if bad or (options.only and left_out) else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.programs",
        description="Run public training programs as they are and recorded, in turn.",
        epilog="programs: "
        + "; ".join(f"{each.name} ({each.loader})" for each in PROGRAMS.values()),
    )
    add: Any = parser.add_argument
    add(
        "--programs",
        type=Path,
        metavar="DIR",
        default=os.environ.get("PROGRAMS") or None,
        help="the folder with checkouts (default: $PROGRAMS): "
        + ", ".join(each.checkout for each in PROGRAMS.values() if each.checkout),
    )
    add("--only", action="append", choices=PROGRAMS, help="this one; may be given repeatedly")
    add("--rounds", type=int, default=ROUNDS, help=f"timed runs of each way ({ROUNDS})")
    add("--out", type=Path, default=RESULTS, help=f"folder for results ({RESULTS.name}/ here)")
    add("--no-files", dest="out", action="store_const", const=None, help="print only")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.programs is not None:
        options.programs = Path(options.programs)
    return options


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
