"""Beside torchdata's StatefulDataLoader, in one run: `python -m benchmarks.stateful`.

A step with a state after each batch, the size of a state, and what a resume gives: the same loaders
over the same shuffled samples with two workers, which draw random numbers, in turns. It needs
torchdata.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.intervals import spread
from benchmarks.report import RESULTS, keep, markdown
from safeloader import SafeStatefulDataLoader

REPEATS, QUICK_REPEATS = 12, 2
SAMPLES, BATCH, CUT = 64 * 50, 64, 20
LONG = 10_000_000  # samples, into which a state is loaded

Make = Callable[[], Any]


class Noisy:
    """A sample of 64 floats: its index, and noise."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        sample = torch.rand(64)
        sample[0] = index
        return sample


def makers() -> dict[str, Make]:
    """The loaders, by name."""
    from torchdata.stateful_dataloader import (  # type: ignore[import-not-found, unused-ignore]
        StatefulDataLoader,
    )

    known: dict[str, Any] = {"batch_size": BATCH, "shuffle": True, "num_workers": 2}
    return {
        "torchdata": lambda: StatefulDataLoader(Noisy(), **known),
        "ours": lambda: SafeStatefulDataLoader(Noisy(), **known),
        "ours, seed=": lambda: SafeStatefulDataLoader(Noisy(), seed=11, **known),
    }


def step_us(make: Make) -> float:
    """Microseconds for a step with a state, past the start of the workers."""
    batches = iter(loader := make())
    next(batches)
    began, steps = time.perf_counter(), 0
    for _ in batches:
        loader.state_dict()
        steps += 1
    return (time.perf_counter() - began) / steps * 1e6


def size_bytes(make: Make) -> int:
    """Of a state in the middle of an epoch, pickled."""
    batches = iter(loader := make())
    for _ in islice(batches, CUT):
        pass
    return len(pickle.dumps(loader.state_dict()))


def alike(make: Make) -> tuple[int, int, int]:
    """After a resume: batches with the same indices, with the same bits, and all."""
    batches = iter(loader := make())
    for _ in islice(batches, CUT):
        pass
    state = loader.state_dict()
    rest = list(batches)
    resumed = make()
    resumed.load_state_dict(state)
    pairs = list(zip(rest, resumed, strict=True))
    indices = sum(torch.equal(one[:, 0], other[:, 0]) for one, other in pairs)
    return indices, sum(torch.equal(*pair) for pair in pairs), len(pairs)


def loading_s(samples: int) -> float:
    """Seconds until the first batch after a state at the end of so many shuffled samples."""

    def make() -> SafeStatefulDataLoader[Any]:
        return SafeStatefulDataLoader(range(samples), BATCH, shuffle=True, collate_fn=len)  # type: ignore[arg-type]  # indexable

    batches = iter(loader := make())
    for _ in islice(batches, samples // BATCH - 1):
        pass
    state, loader = loader.state_dict(), make()
    began = time.perf_counter()
    loader.load_state_dict(state)
    next(iter(loader))
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stateful",
        description="Saving and resuming, beside torchdata's StatefulDataLoader.",
    )
    add: Any = parser.add_argument
    add("--repeats", type=int, help=f"epochs of each ({REPEATS}; with --quick {QUICK_REPEATS})")
    add("--quick", action="store_true", help="few epochs and samples, no files")
    add("--out", type=Path, help=f"folder for results (default: {RESULTS.name}/ beside this file)")
    options = parser.parse_args(arguments)
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    torch.set_num_threads(1)
    loaders = makers()
    times: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(repeats):
        for name in loaders if number % 2 else reversed(loaders):
            times[name].append(step_us(loaders[name]))
    rows = []
    theirs = statistics.median(times["torchdata"])
    for name, make in loaders.items():
        low, high = spread(times[name]).quartiles
        median = statistics.median(times[name])
        indices, bits, whole = alike(make)
        rows.append(
            (
                name,
                f"{median:.0f}",
                f"{low:.0f} to {high:.0f}",
                f"{theirs / median:.2f}",
                f"{size_bytes(make)}",
                f"{indices} of {whole}",
                f"{bits} of {whole}",
            )
        )
    samples = LONG // 100 if options.quick else LONG
    seconds = loading_s(samples)
    head = ("", "µs a step", "quartiles", "times theirs", "bytes", "same indices", "same bits")
    text = markdown(head, rows)
    text += f"\nLoading a state {samples} shuffled samples into an epoch: {seconds:.1f} s\n"
    print(text)
    settings = {"repeats": repeats, "batch": BATCH, "samples": SAMPLES, "cut": CUT}
    loading = {str(samples): seconds}
    found = {"settings": settings, "us_per_step": times, "rows": rows, "loading_s": loading}
    keep("stateful", options, found, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
