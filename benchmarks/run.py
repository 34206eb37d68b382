"""Compare loaders, case by case: `python -m benchmarks.run --help`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, memory
from benchmarks.cases import CASES, Unavailable
from benchmarks.contenders import CONTENDERS, REFERENCE
from benchmarks.intervals import FEWEST_FOR_INTERVAL
from benchmarks.peers import PEERS
from benchmarks.report import RESULTS, Row, make_rows, text, write
from benchmarks.timing import time_case

FULL_REPEATS, QUICK_REPEATS = 20, 6
QUICK_SHARE, QUICK_FEWEST = 5, 4
"""A quick run has a fifth of the batches, but no fewer than four."""
OURS = [REFERENCE, "safe", "safe+trace"]
PEER_CASES = [
    *("small-1w", "small-2w", "medium-1w", "medium-2w", "large-1w", "large-2w"),
    *("tiny-2w", "jpeg-2w", "folder-2w", "strings-2w"),
    *("medium-2w-fresh", "large-2w-fresh", "tiny-2w-fresh"),
    *("jpeg-2w-fresh", "folder-2w-fresh", "strings-2w-fresh"),
]
"""Persistent workers, then fresh ones, torch's default."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    # The consumer does nothing, so threads of the main process could only get in the workers' way.
    torch.set_num_threads(1)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="safeloader-benchmark-") as folder:
        for name in options.cases:
            try:
                rows += _run_case(name, options, Path(folder) / name, skipped)
            except Unavailable as reason:
                _leave_out(name, str(reason), skipped)
    head = {
        "environment": environment.describe(),
        "settings": {"repeats": options.repeats, "quick": options.quick},
        "skipped": skipped,
    }
    print(text(rows))
    if rows and options.out is not None:
        kind = "-peers" if options.peers else ""
        stem = f"{head['environment']['date']}-{environment.label()}{kind}"
        for path in write(options.out, stem, head, rows):
            _say(f"wrote {path}")
        if find_spec("matplotlib") is None:
            _say("no plot: matplotlib is not installed")
    below = [row for row in rows if row.verdict == "BELOW"]
    for row in below:
        _say(f"{row.case}: {row.contender} is below the bar of {row.bar}, whole interval included")
    return 1 if options.check and below else 0


def _run_case(
    name: str, options: argparse.Namespace, folder: Path, skipped: dict[str, str]
) -> list[Row]:
    case = CASES[name]
    batches = max(QUICK_FEWEST, case.batches // QUICK_SHARE) if options.quick else case.batches
    times, left_out = time_case(case, options.contenders, batches, options.repeats, folder)
    for contender, reason in left_out.items():
        _leave_out(f"{name}, {contender}", reason, skipped)
    if len(times) < 2:
        return []
    sizes = {}
    if options.memory:
        sizes = {each: memory.measure(name, each, batches) for each in times}
    if case.fresh and batches < case.batches:
        # The bar of a case with fresh workers is that of so many batches: starts weigh less then.
        case = dataclasses.replace(case, goal=None)
    rows = make_rows(case, times, sizes)
    for row in rows:
        _say(f"{name}: {row.contender} {row.speed.median:.2f} ({row.verdict})")
    return rows


def _leave_out(what: str, reason: str, skipped: dict[str, str]) -> None:
    skipped[what] = reason
    _say(f"{what}: left out: {reason}")


def _say(line: str) -> None:
    # Progress goes to stderr: stdout holds the table and nothing else.
    print(line, file=sys.stderr, flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Compare loaders with the stock DataLoader, in turn, over the same data.",
        epilog="cases: "
        + "; ".join(f"{case.name} ({case.description})" for case in CASES.values()).replace(
            "%", "%%"
        ),
    )
    add: Any = parser.add_argument
    known = CONTENDERS | PEERS
    add("--cases", type=_names(CASES), help="a,b,... (default: all)")
    add(
        "--contenders",
        type=_names(known),
        help=f"of {', '.join(known)} (default: {','.join(OURS)}; stock,null: the noise)",
    )
    add(
        "--peers",
        action="store_true",
        help=f"stock, safe and the peers ({', '.join(PEERS)}), with workers that persist and with "
        f"fresh ones, on {', '.join(PEER_CASES)}",
    )
    add("--repeats", type=int, help=f"epochs each ({FULL_REPEATS}; with --quick {QUICK_REPEATS})")
    add("--quick", action="store_true", help="short epochs, few repeats, no memory, no files")
    add("--no-memory", dest="memory", action="store_false", help="measure speed only")
    add("--out", type=Path, help=f"folder for results (default: {RESULTS.name}/ beside this file)")
    add("--check", action="store_true", help="exit 1 if a row's whole interval is below its bar")
    options = parser.parse_args(arguments)

    if options.contenders is None:
        options.contenders = [REFERENCE, "safe", *PEERS] if options.peers else list(OURS)
    if options.cases is None:
        options.cases = PEER_CASES if options.peers else list(CASES)
    if REFERENCE not in options.contenders:
        options.contenders.insert(0, REFERENCE)
    if len(options.contenders) < 2:
        parser.error("nothing to compare: name a contender besides stock")
    if options.repeats is None:
        options.repeats = QUICK_REPEATS if options.quick else FULL_REPEATS
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if options.check and options.repeats < FEWEST_FOR_INTERVAL:
        parser.error(f"--check needs an interval, hence --repeats of {FEWEST_FOR_INTERVAL} or more")
    if any(name not in (REFERENCE, "null", *PEERS) for name in options.contenders):
        if find_spec("safeloader") is None:
            parser.error(
                "safeloader cannot be imported: install it, or use --contenders stock,null"
            )
        if os.environ.get("SAFELOADER", "").lower() == "off":
            parser.error("SAFELOADER=off makes every contender the stock loader: unset it")
    if options.quick:
        options.memory = False
    elif options.out is None:
        options.out = RESULTS
    if options.memory and not memory.available():
        _say("no memory figures: psutil is not installed")
        options.memory = False
    return options


def _names(known: dict[str, Any]) -> Any:
    """A parser of comma-separated names, each of them known."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"no {name!r}; there are {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
