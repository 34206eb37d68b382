"""How far a batch is from one copy: `python -m benchmarks.copies`.

The floor of any transport is one copy of the batch into memory that is already mapped. Beside it:
what a batch costs step by step, in one process, and what the loaders take for it with one worker.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from benchmarks import environment
from benchmarks.cases import CASES
from benchmarks.contenders import CONTENDERS, REFERENCE
from benchmarks.report import RESULTS, markdown, write_texts
from benchmarks.timing import seeded, time_epoch

SINGLE = ("small-1w", "medium-1w", "large-1w")
"""The cases of single tensors with one worker."""
DEFAULT_CASES = "medium-1w,large-1w"
BATCHES, REPEATS = 60, 12
SHOWN = (REFERENCE, "torch-way", "safe")


@dataclass(frozen=True)
class Steps:
    """Medians, in microseconds per batch."""

    megabytes: float
    copy_us: float
    """One plain copy of the batch, by one thread, into memory that was written to before."""
    dataset_us: float
    stack_us: float
    """`default_collate` into a slot: the one copy that cannot be saved."""
    seal_us: float
    """Pickling, and writing to the socket."""
    open_us: float
    """Reading from the socket, and making the tensors over the slot."""


class _Stepwise(IterableDataset[Steps]):
    """Takes the steps in the worker process of a loader: `default_collate` is changed there only.

    Sender and receiver are in this one process, so nobody is woken up and nobody waits.
    """

    def __init__(self, case: str, batches: int) -> None:
        self.dataset, kwargs = CASES[case].build(batches)
        self.size: int = kwargs["batch_size"]
        self.batches = batches

    def __iter__(self) -> Iterator[Steps]:
        from safeloader.delivery.manifest import BatchManifest
        from safeloader.transport.channel import ResultQueue
        from safeloader.transport.packing import Packer
        from safeloader.transport.shared_memory import anonymous_file, mapped
        from safeloader.transport.slot_reader import Unpacker
        from safeloader.transport.slot_table import SlotTable
        from safeloader.transport.slot_writer import SlotPool

        table = SlotTable(1, 1 << 32)
        packer = Packer(SlotPool(table, 0))
        packer.install()
        results = ResultQueue(1, Unpacker(table).opened)
        samples: Any = self.dataset
        batch = default_collate([samples[index] for index in range(self.size)]).clone()
        fd = anonymous_file(batch.nbytes)
        target = np.frombuffer(mapped(fd, batch.nbytes), np.uint8)
        os.close(fd)
        source = batch.numpy().reshape(-1).view(np.uint8)
        times = []
        for number in range(self.batches):
            first = number * self.size
            clocks = [time.perf_counter_ns()]
            np.copyto(target, source)
            clocks.append(time.perf_counter_ns())
            packer.begin()
            chosen = [samples[index] for index in range(first, first + self.size)]
            clocks.append(time.perf_counter_ns())
            packer.collates()
            stacked = default_collate(chosen)
            clocks.append(time.perf_counter_ns())
            manifest = BatchManifest(number, 0, os.getpid(), b"", self.size, None, b"", False, None)
            results.put((number, packer.seal(manifest, stacked)))
            del stacked
            clocks.append(time.perf_counter_ns())
            arrived = results.get(timeout=60)
            clocks.append(time.perf_counter_ns())
            del arrived
            times.append(np.diff(clocks) / 1e3)
        middle = np.median(times[len(times) // 4 :], axis=0)  # the first ones map the slots
        yield Steps(batch.nbytes / 1e6, *map(float, middle))


def steps(case: str, batches: int) -> Steps:
    (found,) = DataLoader(_Stepwise(case, batches), batch_size=None, num_workers=1)
    return found


def per_batch_us(case: str, batches: int, repeats: int) -> dict[str, float]:
    """What the loaders take with the case's worker, in turn; medians."""
    dataset, kwargs = CASES[case].build(batches)
    with tempfile.TemporaryDirectory(prefix="safeloader-benchmark-") as folder:
        loaders = {n: CONTENDERS[n](dataset, seeded(kwargs), Path(folder)) for n in SHOWN}
        for loader in loaders.values():
            time_epoch(loader)
        times: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(repeats):
            for name, loader in loaders.items():
                times[name].append(time_epoch(loader).per_batch_ns / 1e3)
        return {name: statistics.median(each) for name, each in times.items()}


_HEAD = (
    "case",
    "MB",
    "one copy µs",
    "dataset",
    "stack",
    "pickle, send",
    "receive, open",
    *(f"{name} µs/batch (copies)" for name in SHOWN),
)


def line(case: str, found: Steps, loaders: dict[str, float]) -> list[str]:
    """Times in microseconds; of the loaders, also as a multiple of the one copy."""
    one = found.copy_us
    parts = (one, found.dataset_us, found.stack_us, found.seal_us, found.open_us)
    whole = (f"{loaders[name]:.0f} ({loaders[name] / one:.1f})" for name in SHOWN)
    return [case, f"{found.megabytes:.1f}", *(f"{each:.0f}" for each in parts), *whole]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.copies", description=__doc__)
    add: Any = parser.add_argument
    add("--cases", default=DEFAULT_CASES, help=f"of {','.join(SINGLE)} (default: {DEFAULT_CASES})")
    add("--batches", type=int, default=BATCHES, help=f"of the step by step part ({BATCHES})")
    add("--repeats", type=int, default=REPEATS, help=f"epochs of each loader ({REPEATS})")
    add("--quick", action="store_true", help="few batches, two epochs, no files")
    add("--out", type=Path, help=f"folder for results (default: {RESULTS.name}/ beside this file)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.batches, options.repeats = 12, 2
    elif options.out is None:
        options.out = RESULTS
    torch.set_num_threads(1)
    results, lines = [], []
    for case in options.cases.split(","):
        if case not in SINGLE:
            parser.error(f"no {case!r}; there are {', '.join(SINGLE)}")
        found = steps(case, options.batches)
        batches = 12 if options.quick else CASES[case].batches
        loaders = per_batch_us(case, batches, options.repeats)
        results.append({"case": case, "steps": asdict(found), "per_batch_us": loaders})
        lines.append(line(case, found, loaders))
    text = markdown(_HEAD, lines)
    print(text)
    if options.out is not None:
        facts = environment.describe()
        settings = {"batches": options.batches, "repeats": options.repeats}
        whole = {"environment": facts, "settings": settings, "results": results}
        stem = f"{facts['date']}-{environment.label()}-copies"
        for path in write_texts(options.out, stem, whole, text):
            print(f"wrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
