"""What the checks of ``safeloader.checks`` take of a sample: `python -m benchmarks.checks`.

Each is called as a worker calls it, with one sample after the other, by one thread. Beside it,
`torch.isfinite(x).all()`, and the sum of the sample, which reads it once. All take turns; whole
batches are measured, since one call on a small sample is shorter than a clock can tell.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.intervals import spread
from benchmarks.report import RESULTS, keep, markdown
from safeloader import checks

REPEATS, QUICK_REPEATS = 40, 3
BATCH = 64
BAR_GB_S = 5.0
"""Of `finite` on the large batch."""
READ_NOTHING = ("schema()",)
SHAPES = {"small": (8,), "medium": (3, 64, 64), "large": (3, 224, 224)}

Check = Callable[[Any, Any], object]


def the_checks() -> dict[str, Check]:
    """By the name that stands in the table, what is called with a sample and its index."""
    return {
        "read once": lambda sample, _: sample.sum(),
        "isfinite().all()": lambda sample, _: bool(torch.isfinite(sample).all()),
        "finite()": checks.finite(),
        "schema()": checks.schema(),
        "in_range(-9, 9)": checks.in_range(-9, 9),
    }


def measured(shape: tuple[int, ...], repeats: int) -> dict[str, list[float]]:
    """Seconds that each check takes for a batch of samples of this shape, in turns."""
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randn(shape, generator=generator).clamp_(-8, 8) for _ in range(BATCH)]
    found = the_checks()
    times: dict[str, list[float]] = {name: [] for name in found}
    for number in range(repeats + 1):
        for name in found if number % 2 else reversed(found):
            check = found[name]
            began = time.perf_counter()
            for index, sample in enumerate(samples):
                check(sample, index)
            took = time.perf_counter() - began
            if number:  # the first fills caches
                times[name].append(took)
    return times


def gigabytes_per_s(shape: tuple[int, ...], seconds: float) -> float:
    """How fast a batch of samples of this shape was looked at."""
    return BATCH * torch.Size(shape).numel() * 4 / seconds / 1e9


def lines(case: str, times: dict[str, list[float]]) -> list[tuple[str, ...]]:
    """A line of the table for each check."""
    shape = SHAPES[case]
    told = []
    for name, seconds in times.items():
        each = spread(seconds)
        low, high = each.quartiles
        told.append(
            (
                f"{'x'.join(map(str, shape))} float32",
                name,
                f"{each.median / BATCH * 1e6:.2f}",
                f"{low / BATCH * 1e6:.2f} to {high / BATCH * 1e6:.2f}",
                "-" if name in READ_NOTHING else f"{gigabytes_per_s(shape, each.median):.1f}",
            )
        )
    return told


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; with `--check`, the status is 1 if `finite` is below its bar."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checks",
        description="What the checks of safeloader.checks take of a sample.",
    )
    add: Any = parser.add_argument
    add("--repeats", type=int, help=f"batches of each ({REPEATS}; with --quick {QUICK_REPEATS})")
    add("--quick", action="store_true", help="few batches, no files")
    add("--out", type=Path, help=f"folder for results (default: {RESULTS.name}/ beside this file)")
    add("--check", action="store_true", help=f"exit 1 if finite is below {BAR_GB_S:g} GB/s")
    options = parser.parse_args(arguments)
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    torch.set_num_threads(1)
    times = {case: measured(shape, repeats) for case, shape in SHAPES.items()}
    rows = [line for case in SHAPES for line in lines(case, times[case])]
    fast = gigabytes_per_s(SHAPES["large"], statistics.median(times["large"]["finite()"]))
    verdict = "ok" if fast >= BAR_GB_S else "BELOW"
    text = (
        f"{markdown(('sample', 'check', 'µs/sample', 'quartiles', 'GB/s'), rows)}\n\n"
        f"finite() on a batch of 38 MB: {fast:.1f} GB/s (bar {BAR_GB_S:g}): {verdict}"
    )
    print(text)
    keep(
        "checks",
        options,
        {
            "settings": {"repeats": repeats, "batch": BATCH},
            "seconds_per_batch": times,
            "finite_gb_s": fast,
        },
        text,
    )
    return 1 if options.check and verdict != "ok" else 0


if __name__ == "__main__":
    sys.exit(main())
