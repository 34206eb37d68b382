"""What workers have in memory, beside torch's: `python -m benchmarks.worker_memory`.

Each figure comes from a process of its own, stock and safe in turn: a loader over two million
Python strings (each reading of one writes its reference count, and so copies its page), one
over an array of that many rows, and one over images that are made for each sample, forked, with
workers that stay. They are asked when they have nothing to do: after the first batch, and after an
epoch. PSS counts a page that n processes share as 1/n, USS what a process has for itself. Slots are
in both, and told apart beside; but for the images, where they are left out: they hold batches that
wait for main, which of the stock loader no worker has.

Workers that start anew with each epoch leave nothing but slots that are parked in main: its memory
after an epoch of large images, with these in a column of their own. And what a full garbage
collection costs in a worker whose program holds five million objects.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from benchmarks.contenders import CONTENDERS, REFERENCE
from benchmarks.report import RESULTS, keep, markdown
from safeloader.introspect.resources import process_memory

MIB = 1 << 20
ROWS, QUICK_ROWS = 2_000_000, 50_000
OBJECTS, QUICK_OBJECTS = 5_000_000, 200_000
BATCH, WORKERS, REPEATS = 2000, 4, 5
IMAGES, QUICK_IMAGES, EDGE, IMAGE_BATCH = 1024, 64, 224, 32
COLLECTIONS = 3
COUNTS = 1, 2, 8, 16
MORE, MORE_BYTES = 1.02, MIB
"""What a worker of ours may have more than torch's: the larger of both."""
AT_REST_S = 0.05  # between two readings that are to be the same
FIGURES = "pss", "uss", "slots"
Sizes = dict[str, float]


class Strings(Dataset[int]):
    """A list of Python strings."""

    def __init__(self, length: int) -> None:
        self.data = [f"sample number {index:08d} of a list" for index in range(length)]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> int:
        return len(self.data[index])


class Array(Dataset[Any]):
    """One array, with a row for each sample."""

    def __init__(self, length: int) -> None:
        self.data = np.zeros((length, 8))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class Images(Dataset[Any]):
    """Images from a small pool."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.pool = torch.zeros(7, 3, EDGE, EDGE)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.pool[index % len(self.pool)]


class Made(Dataset[Any]):
    """Images that are made for each sample, as decoding and augmenting make them."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return torch.full((3, EDGE, EDGE), float(index))


class Collects(Dataset[Any]):
    """Its sample is what a full garbage collection took: seconds, and bytes of its own."""

    def __init__(self, objects: int) -> None:
        self.held: list[list[int]] = [[] for _ in range(objects)]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        before, began = _uss(), time.perf_counter()
        gc.collect()
        took, after = time.perf_counter() - began, _uss()
        return torch.tensor([took, after - before], dtype=torch.float64)


def _uss() -> int:
    found = process_memory()
    if found is None or found.uss is None:
        raise SystemExit("this system does not tell what memory a process has for itself")
    return found.uss


KINDS: dict[str, Callable[[int], Dataset[Any]]] = {
    "strings": Strings,
    "array": Array,
    "images": Made,
}


def sizes_of_workers() -> Sizes:
    """The mean of the workers in bytes, once they have nothing to do: two readings are the same."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    before: list[tuple[int, int]] = []
    while True:
        workers = [
            psutil.Process(each.pid) for each in multiprocessing.active_children() if each.pid
        ]
        infos = [worker.memory_full_info() for worker in workers]
        now = [(info.rss, info.uss) for info in infos]
        if now == before:
            break
        before = now
        time.sleep(AT_REST_S)
    return {
        "pss": statistics.mean(info.pss for info in infos),
        "uss": statistics.mean(info.uss for info in infos),
        "slots": statistics.mean(map(_of_slots, (worker.pid for worker in workers))),
    }


def _of_slots(pid: int) -> int:
    """The PSS of the shared memory in which this library hands batches over."""
    total, ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            ours = "memfd:safeloader" in line
        elif ours and line.startswith("Pss:"):
            total += int(line.split()[1]) * 1024
    return total


def measured(kind: str, contender: str, workers: int, rows: int) -> dict[str, Sizes]:
    """In this process: the sizes of its workers after a batch and after an epoch."""
    torch.set_num_threads(1)
    dataset = KINDS[kind](rows)
    most = IMAGE_BATCH if kind == "images" else BATCH
    kwargs: dict[str, Any] = {"batch_size": min(most, rows // 10), "shuffle": True}
    kwargs |= {"generator": torch.Generator().manual_seed(0), "persistent_workers": True}
    kwargs |= {"num_workers": workers, "multiprocessing_context": "fork"}
    loader = CONTENDERS[contender](dataset, kwargs, Path())
    batches = iter(loader)
    next(batches)
    first = sizes_of_workers()
    for _ in batches:
        pass
    return {"after a batch": first, "after an epoch": sizes_of_workers()}


def parked(contender: str, images: int) -> Sizes:
    """In this process: its memory after an epoch with workers of its own, and what is parked."""
    torch.set_num_threads(1)
    kwargs: dict[str, Any] = {"batch_size": IMAGE_BATCH, "num_workers": 2}
    loader = CONTENDERS[contender](
        Images(images), kwargs | {"multiprocessing_context": "fork"}, Path()
    )
    for _ in range(2):
        for _ in loader:
            pass
    gc.collect()
    stats = getattr(loader, "transport_stats", None)
    return {"uss": _uss(), "parked": 0 if stats is None else stats.bytes}


def collected(contender: str, objects: int) -> Sizes:
    """In this process: what a full collection takes in its worker."""
    gc.disable()  # while they are made
    dataset = Collects(objects)
    gc.enable()
    kwargs = {"num_workers": 1, "batch_size": None, "multiprocessing_context": "fork"}
    (told,) = CONTENDERS[contender](dataset, kwargs, Path())
    seconds, grown = told.tolist()
    return {"s": seconds, "grown": grown}


def in_a_process(*what: object, environ: dict[str, str] | None = None) -> Any:
    """What one measurement says, made in a process of its own."""
    line = [sys.executable, "-W", "ignore", "-m", "benchmarks.worker_memory", "--one"]
    done = subprocess.run(
        [*line, *map(str, what)],
        cwd=Path(__file__).parents[1],
        env=os.environ | (environ or {}),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(kind: str, workers: int, rows: int, repeats: int) -> dict[str, list[Any]]:
    """The measurements of both contenders, in pairs."""
    found: dict[str, list[Any]] = {REFERENCE: [], "safe": []}
    for turn in range(repeats):
        for name in found if turn % 2 == 0 else reversed(found):
            found[name].append(in_a_process(kind, name, workers, rows))
    return found


def within(ours: float, stock: float) -> bool:
    """Whether a worker of ours has no more than is allowed."""
    return ours <= max(stock * MORE, stock + MORE_BYTES)


def lines_of(kind: str, workers: int, found: dict[str, list[Any]]) -> list[tuple[str, ...]]:
    """Rows of the table; the last cell says whether a bar is missed."""
    lines = []
    for when in found[REFERENCE][0]:
        median = {
            name: {f: statistics.median(one[when][f] for one in runs) for f in FIGURES}
            for name, runs in found.items()
        }
        for figure in ("pss", "uss"):
            apart = kind == "images"
            stock, ours = median[REFERENCE][figure], median["safe"][figure]
            ours -= apart * median["safe"]["slots"]
            more = [
                one[when][figure] - apart * one[when]["slots"] - other[when][figure]
                for one, other in zip(found["safe"], found[REFERENCE], strict=True)
            ]
            what = f"{figure.upper()} without slots" if apart else figure.upper()
            lines.append(
                (
                    f"{kind}, fork, {workers} workers, {when}: {what}",
                    f"{ours / MIB:.1f}",
                    f"{stock / MIB:.1f}",
                    f"{ours / stock:.3f}",
                    f"{min(more) / MIB:+.1f} to {max(more) / MIB:+.1f}",
                    f"{median['safe']['slots'] / MIB:.2f}",
                    "ok" if within(ours, stock) else "MORE",
                )
            )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; `--check`: the status is 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.worker_memory",
        description="What workers have in memory, beside torch's.",
    )
    add: Any = parser.add_argument
    add("--quick", action="store_true", help="small, two of each, no files")
    add("--repeats", type=int, default=REPEATS, help=f"pairs of each (default: {REPEATS})")
    add("--out", type=Path, help=f"folder for results (default: {RESULTS.name}/ beside this file)")
    add("--check", action="store_true", help="exit 1 if a worker of ours has more than is allowed")
    add("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(_one(*options.one)))
        return 0
    rows = QUICK_ROWS if options.quick else ROWS
    objects = QUICK_OBJECTS if options.quick else OBJECTS
    repeats = 2 if options.quick else options.repeats
    found: dict[str, Any] = {}
    lines: list[tuple[str, ...]] = []
    images = QUICK_IMAGES if options.quick else IMAGES
    cases = [(kind, WORKERS, repeats) for kind in KINDS]
    cases += [("array", count, 2) for count in COUNTS]
    for kind, workers, times in cases:
        samples = images if kind == "images" else rows
        one = found[f"{kind}-{workers}w"] = in_turn(kind, workers, samples, times)
        lines += lines_of(kind, workers, one)
        print(*lines[-4:], sep="\n", file=sys.stderr, flush=True)
    found["collections"] = collections = {
        name: [
            in_a_process("collect", name.split(",")[0], objects, environ=environ)
            for _ in range(1 if options.quick else COLLECTIONS)
        ]
        for name, environ in {
            "stock": {},
            "safe": {},
            "safe, SAFELOADER_GC_FREEZE=0": {"SAFELOADER_GC_FREEZE": "0"},
        }.items()
    }
    mains = found["main"] = {
        name: [in_a_process("parked", name, images) for _ in range(repeats)]
        for name in (REFERENCE, "safe")
    }
    text = markdown(
        ("MiB a worker", "safe", "stock", "ratio", "more, in pairs", "of it slots", ""), lines
    )
    text += "\n\n" + markdown(
        (f"a full collection in a worker, {objects:,} objects inherited", "ms", "MiB copied"),
        [
            (name, f"{1e3 * _median(runs, 's'):.1f}", f"{_median(runs, 'grown') / MIB:.1f}")
            for name, runs in collections.items()
        ],
    )
    text += "\n\n" + markdown(
        ("main after an epoch of large images, 2 fresh workers", "USS, MiB", "parked, MiB"),
        [
            (name, f"{_median(runs, 'uss') / MIB:.0f}", f"{_median(runs, 'parked') / MIB:.0f}")
            for name, runs in mains.items()
        ],
    )
    print(text)
    frozen, walked = collections["safe"], collections["stock"]
    walks = any(_median(frozen, each) > _median(walked, each) / 10 for each in ("s", "grown"))
    whole = {"samples": rows, "objects": objects, "found": found}
    keep("worker-memory", options, whole, text)
    return int(options.check and (walks or any(line[-1] == "MORE" for line in lines)))


def _median(runs: Sequence[Sizes], figure: str) -> float:
    return statistics.median(each[figure] for each in runs)


def _one(kind: str, contender: str, *numbers: str) -> Any:
    if kind == "collect":
        return collected(contender, int(numbers[0]))
    if kind == "parked":
        return parked(contender, int(numbers[0]))
    workers, rows = map(int, numbers)
    return measured(kind, contender, workers, rows)


if __name__ == "__main__":
    sys.exit(main())
