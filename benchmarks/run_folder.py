"""What a run's folder takes of main and of the disk: `python -m benchmarks.run_folder`.

The folder of a loader is given what workers send: one permutation of indices an epoch, and times as
real fetches have them (log-normal, around 22 µs). Told are the CPU time of main for a batch, all
that is written included, and the bytes a sample while it is written (the Arrow stream) and when it
is closed (Parquet). Then a run of eight ranks is made, and asked for a step and for an index: by
the reader, and by the commands, which start Python too. Last, loaders of the cases of
`benchmarks.run` are compared, with a run's folder and without.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import CASES, Unavailable
from benchmarks.intervals import Spread, spread
from benchmarks.report import RESULTS, keep, markdown
from benchmarks.timing import time_case
from safeloader.delivery.audit import EpochAudit
from safeloader.delivery.manifest import BatchManifest
from safeloader.failures.loader_log import LoaderLog
from safeloader.provenance import run_format
from safeloader.provenance.attempts import open_run
from safeloader.provenance.recorder import Recorder
from safeloader.provenance.run_folder import LoaderFolder
from safeloader.report.run import RunFolder

SIZES = (64, 8, 1)
SAMPLES, QUICK_SAMPLES = 1 << 20, 1 << 15
REPEATS, QUICK_REPEATS = 5, 2
RANKS, RANK_SAMPLES, QUICK_RANK_SAMPLES = 8, 3_200_000, 64_000
BAR_US, BAR_STREAM, BAR_CLOSED = 5.0, 14.0, 8.0
BAR_STEP_S, BAR_INDEX_S = 1.0, 2.0
BAR_RATIO, BAR_RATIO_TRIVIAL = 0.97, 0.90
"""Of the speed without a folder: where samples are worked for, and where they cost nothing."""
LOADER_REPEATS, QUICK_LOADER_REPEATS, QUICK_BATCHES = 20, 6, 8


def manifests(samples: int, size: int, seed: int = 0) -> list[BatchManifest]:
    """What workers say of an epoch."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(samples)
    fetches = rng.lognormal(10, 0.5, samples).astype(np.int64)
    now, made = time.perf_counter_ns(), []
    for k, first in enumerate(range(0, samples, size)):
        times = np.concatenate([[now], fetches[first : first + size], [40_000]])
        stamps = np.cumsum(times)
        now = int(stamps[-1])
        indices = order[first : first + size].astype(np.int64).tobytes()
        made.append(BatchManifest(k, k % 4, 1000 + k % 4, indices, size, None, stamps.tobytes()))
    return made


def folder_in(run: Path, rank: int = 0) -> LoaderFolder:
    """The folder of a loader in a run."""
    log = LoaderLog(range(1), kind="benchmark")
    folder = LoaderFolder(open_run(run, ["benchmark"], rank), rank, "here", log)
    folder.taken_by(Recorder(), log, lambda index: "")
    folder.begun(0, lambda: EpochAudit(0))
    return folder


def fed(folder: LoaderFolder, made: Sequence[BatchManifest], epoch: int = 0) -> float:
    """Hand over these batches; the seconds of CPU time that took."""
    log = folder.batches
    if log is None:
        raise SystemExit("this needs pyarrow: pip install 'safeloader[run]'")
    asked = time.perf_counter_ns()
    began = time.process_time()
    for batch, manifest in enumerate(made):
        log.delivered(epoch, batch, 20_000, manifest, asked + batch * 1_000_000)
    return time.process_time() - began


def of_size(samples: int, size: int, repeats: int) -> dict[str, Any]:
    """Microseconds a batch in each repeat, and bytes a sample while it is written and closed."""
    made, took = manifests(samples, size), []
    with tempfile.TemporaryDirectory() as temporary:
        for k in range(repeats + 1):
            folder = folder_in(Path(temporary) / str(k))
            took.append(fed(folder, made) / len(made) * 1e6)
        numbers = folder.close()
        written = sum(path.stat().st_size for path in folder.path.glob("batches-*"))
        for number in numbers:
            run_format.to_parquet(folder.path, number)
        closed = sum(path.stat().st_size for path in folder.path.glob("batches-*"))
    return {
        "us": took[1:],  # the first loads pyarrow
        "stream_bytes": written / samples,
        "closed_bytes": closed / samples,
    }


def made_run(folder: Path, samples: int, *, close: bool = True) -> None:
    """A run of eight ranks, an epoch of so many samples on each, its steps marked."""
    for rank in range(RANKS):
        its = folder_in(folder, rank)
        made = manifests(samples, 64, rank)
        fed(its, made)
        marks = (f'{{"step":{k},"epoch":0,"batch":{k}}}\n' for k in range(len(made)))
        (its.path / "marks.jsonl").write_text("".join(marks))
        if close:
            for number in its.close():
                run_format.to_parquet(its.path, number)


def queries(samples: int, *, close: bool) -> dict[str, float]:
    """Seconds from opening a run to the answer: a step on all ranks, and an index.

    By the reader in a process that runs, and by the commands from the start of Python on.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        made_run(folder, samples, close=close)
        took = {}
        began = time.perf_counter()
        found = RunFolder(folder).step(samples // 64 // 2)
        took["step"] = time.perf_counter() - began
        began = time.perf_counter()
        seen = RunFolder(folder).index(samples // 3)
        took["index"] = time.perf_counter() - began
        for command, number in (("step", samples // 64 // 2), ("index", samples // 3)):
            line = [sys.executable, "-m", "safeloader", command, str(folder), str(number)]
            began = time.perf_counter()
            subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
            took[f"{command}, command"] = time.perf_counter() - began
        if not len(found) == len(seen) == RANKS:
            raise SystemExit(f"of {RANKS} ranks {len(found)} had the step, {len(seen)} the index")
    return took


def compared(name: str, repeats: int, batches: int | None) -> Spread:
    """The speed of a case's loader with a run's folder, times that without, epoch by epoch."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as temporary:
        names = ["safe", "safe+run"]
        times, _ = time_case(case, names, batches or case.batches, repeats, Path(temporary))
    pairs = zip(times["safe"], times["safe+run"], strict=True)
    return spread([without.per_batch_ns / its.per_batch_ns for without, its in pairs])


def sizes_told(sizes: dict[int, dict[str, Any]]) -> tuple[str, bool]:
    """The table of what a batch takes, and whether something is above its bar."""
    rows, above = [], False
    for size, found in sizes.items():
        low, high = spread(found["us"]).quartiles
        median = statistics.median(found["us"])
        above |= median > BAR_US
        if size == SIZES[0]:
            above |= found["stream_bytes"] > BAR_STREAM or found["closed_bytes"] > BAR_CLOSED
        us = f"{median:.2f} ({low:.2f} to {high:.2f})"
        rows.append((str(size), us, f"{found['stream_bytes']:.1f}", f"{found['closed_bytes']:.1f}"))
    heads = (
        "batch of",
        f"µs/batch in main (bar {BAR_US:g})",
        f"bytes/sample written ({BAR_STREAM:g} at 64)",
        f"closed ({BAR_CLOSED:g} at 64)",
    )
    return markdown(heads, rows), above


def queries_told(asked: dict[str, dict[str, float]], samples: int) -> tuple[str, bool]:
    """The table of what a question takes, and whether something is above its bar."""
    rows, above = [], False
    for name, took in asked.items():
        rows.append((name, *(f"{took[each]:.2f}" for each in took)))
        above |= took["step"] > BAR_STEP_S or took["index"] > BAR_INDEX_S
    heads = (
        f"{RANKS} ranks, {samples / 1e6:.1f} M samples",
        f"step, s (bar {BAR_STEP_S:g})",
        f"index, s (bar {BAR_INDEX_S:g})",
        "step, command",
        "index, command",
    )
    return markdown(heads, rows), above


def compared_told(found: dict[str, Spread]) -> tuple[str, bool]:
    """The table of loaders with a folder, and whether a whole interval is below the bar."""
    rows, below = [], False
    for name, ratio in found.items():
        low, high = ratio.interval or ratio.quartiles
        bar = BAR_RATIO if CASES[name].real_work else BAR_RATIO_TRIVIAL
        below |= ratio.interval is not None and high < bar
        rows.append((name, f"{ratio.median:.2f}", f"{low:.2f} to {high:.2f}", f"{bar:g}"))
    return markdown(("case", "with, times without", "95 % interval", "bar"), rows), below


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; with `--check`, the status is 1 if one misses its bar."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run_folder", description="What a run's folder takes."
    )
    add: Any = parser.add_argument
    add("--repeats", type=int, help=f"of each size ({REPEATS}; with --quick {QUICK_REPEATS})")
    add("--cases", help="a,b,... of benchmarks.run (default: all; with --quick small-2w)")
    add("--quick", action="store_true", help="few samples, no files")
    add("--out", type=Path, help=f"folder for results (default: {RESULTS.name}/ beside this file)")
    add("--check", action="store_true", help="exit 1 if one misses its bar")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as in benchmarks.run
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    samples, of_rank, turns, batches = SAMPLES, RANK_SAMPLES, LOADER_REPEATS, None
    cases = list(CASES)
    if options.quick:
        samples, of_rank, turns = QUICK_SAMPLES, QUICK_RANK_SAMPLES, QUICK_LOADER_REPEATS
        batches, cases = QUICK_BATCHES, ["small-2w"]
    if options.cases is not None:
        cases = options.cases.split(",")
    sizes = {size: of_size(samples, size, repeats) for size in SIZES}
    text, above = sizes_told(sizes)
    print(text, flush=True)
    asked = {"closed": queries(of_rank, close=True), "written still": queries(of_rank, close=False)}
    more, slow = queries_told(asked, RANKS * of_rank)
    text += "\n\n" + more
    print(more, flush=True)
    found: dict[str, Spread] = {}
    for name in cases:
        try:
            found[name] = compared(name, turns, batches)
        except Unavailable as reason:
            print(f"{name}: left out: {reason}", file=sys.stderr)
    more, below = compared_told(found)
    text += "\n\n" + more
    print(more)
    settings = {"repeats": repeats, "samples": samples, "ranks": RANKS, "of_rank": of_rank}
    whole = {
        "settings": settings | {"turns": turns},
        "sizes": sizes,
        "queries_s": asked,
        "loaders": {name: asdict(each) for name, each in found.items()},
    }
    keep("run-folder", options, whole, text)
    return int(options.check and (above or slow or below))


if __name__ == "__main__":
    sys.exit(main())
