"""What ``seed=`` takes of a sample: `python -m benchmarks.seeding`.

One loader without workers over samples that cost nothing, batch 64: without ``seed=``, with
``seed_per="batch"`` and with ``seed_per="sample"``. All take turns, an epoch each, and CPU time is
measured; what is told is how much longer a sample takes than without. In a worker it is less:
there no generators have to be put back after each batch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.intervals import spread
from benchmarks.report import RESULTS, keep, markdown
from safeloader import SafeDataLoader

REPEATS, QUICK_REPEATS = 40, 3
SAMPLES, BATCH = 64 * 64, 64
BARS_US = {"batch": 0.5, "sample": 8.0}
"""A sample, by ``seed_per``."""


def _first(samples: list[int]) -> int:
    return samples[0]


def measured(repeats: int) -> dict[str, list[float]]:
    """Seconds of CPU time for an epoch, without a seed ("none") and by ``seed_per``, in turns."""
    loaders: dict[str, Any] = {
        name: SafeDataLoader(range(SAMPLES), BATCH, collate_fn=_first, **keywords)  # type: ignore[arg-type]  # indexable
        for name, keywords in (
            ("none", {}),
            ("batch", {"seed": 1, "seed_per": "batch"}),
            ("sample", {"seed": 1}),
        )
    }
    times: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(repeats + 1):
        for name in loaders if number % 2 else reversed(loaders):
            began = time.process_time()
            for _ in loaders[name]:
                pass
            took = time.process_time() - began
            if number:  # the first fills caches
                times[name].append(took)
    return times


def added_us(times: dict[str, list[float]], per: str) -> list[float]:
    """How many µs more than without a seed a sample took, in each turn."""
    pairs = zip(times[per], times["none"], strict=True)
    return [(seeded - without) / SAMPLES * 1e6 for seeded, without in pairs]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; with `--check`, the status is 1 if one is above its bar."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.seeding", description="What seed= takes of a sample."
    )
    add: Any = parser.add_argument
    add("--repeats", type=int, help=f"epochs of each ({REPEATS}; with --quick {QUICK_REPEATS})")
    add("--quick", action="store_true", help="few epochs, no files")
    add("--out", type=Path, help=f"folder for results (default: {RESULTS.name}/ beside this file)")
    add("--check", action="store_true", help="exit 1 if one is above its bar")
    options = parser.parse_args(arguments)
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    torch.set_num_threads(1)
    times = measured(repeats)
    rows, above = [], False
    for per, bar in BARS_US.items():
        each = added_us(times, per)
        low, high = spread(each).quartiles
        median = statistics.median(each)
        above |= median > bar
        verdict = "ok" if median <= bar else "ABOVE"
        told = f"{low:.2f} to {high:.2f}"
        rows.append((f'seed_per="{per}"', f"{median:.2f}", told, f"{bar:g}", verdict))
    text = markdown(("", "µs/sample added", "quartiles", "bar", ""), rows)
    print(text)
    settings = {"repeats": repeats, "batch": BATCH, "samples": SAMPLES}
    keep("seeding", options, {"settings": settings, "cpu_seconds_per_epoch": times}, text)
    return 1 if options.check and above else 0


if __name__ == "__main__":
    sys.exit(main())
