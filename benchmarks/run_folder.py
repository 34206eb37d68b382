"""What a run's folder takes of main and of the disk: `python -m benchmarks.run_folder`.

The folder of a loader is given what workers send: one permutation of indices an epoch, and times as
real fetches have them (log-normal, around 22 µs). Told are the CPU time of main for a batch, all
that is written included, and the bytes a sample while it is written (the Arrow stream) and when it
is closed (Parquet). Then a run of eight ranks is made, and asked for a step and for an index.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment
from benchmarks.intervals import spread
from benchmarks.report import markdown, write_texts
from safeloader.delivery.audit import EpochAudit
from safeloader.delivery.manifest import BatchManifest
from safeloader.failures.loader_log import LoaderLog
from safeloader.provenance import run_format
from safeloader.provenance.attempts import open_run
from safeloader.provenance.recorder import Recorder
from safeloader.provenance.run_folder import LoaderFolder
from safeloader.report.run import RunFolder

RESULTS = Path(__file__).parent / "results"
SIZES = (64, 8, 1)
SAMPLES, QUICK_SAMPLES = 1 << 20, 1 << 15
REPEATS, QUICK_REPEATS = 5, 2
RANKS, RANK_SAMPLES, QUICK_RANK_SAMPLES = 8, 3_200_000, 64_000
BAR_US, BAR_STREAM, BAR_CLOSED = 5.0, 14.0, 8.0
BAR_STEP_S, BAR_INDEX_S = 1.0, 2.0


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
    """Seconds from opening a run to the answer: a step on all ranks, and an index."""
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
        if not len(found) == len(seen) == RANKS:
            raise SystemExit(f"of {RANKS} ranks {len(found)} had the step, {len(seen)} the index")
    return took


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; with `--check`, the status is 1 if one is above its bar."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run_folder", description="What a run's folder takes."
    )
    add: Any = parser.add_argument
    add("--repeats", type=int, help=f"of each size ({REPEATS}; with --quick {QUICK_REPEATS})")
    add("--quick", action="store_true", help="few samples, no files")
    add("--out", type=Path, help=f"folder for results (default: {RESULTS.name}/ beside this file)")
    add("--check", action="store_true", help="exit 1 if one is above its bar")
    options = parser.parse_args(arguments)
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    samples, of_rank = SAMPLES, RANK_SAMPLES
    if options.quick:
        samples, of_rank = QUICK_SAMPLES, QUICK_RANK_SAMPLES
    sizes = {size: of_size(samples, size, repeats) for size in SIZES}
    rows, above = [], False
    for size, found in sizes.items():
        low, high = spread(found["us"]).quartiles
        median = statistics.median(found["us"])
        above |= median > BAR_US
        if size == SIZES[0]:
            above |= found["stream_bytes"] > BAR_STREAM or found["closed_bytes"] > BAR_CLOSED
        us = f"{median:.2f} ({low:.2f} to {high:.2f})"
        rows.append((str(size), us, f"{found['stream_bytes']:.1f}", f"{found['closed_bytes']:.1f}"))
    text = markdown(
        ("batch of", f"µs/batch in main (bar {BAR_US:g})", "bytes/sample written", "closed"), rows
    )
    asked = {"closed": queries(of_rank, close=True), "written still": queries(of_rank, close=False)}
    rows = [(name, f"{took['step']:.2f}", f"{took['index']:.2f}") for name, took in asked.items()]
    above |= asked["closed"]["step"] > BAR_STEP_S or asked["closed"]["index"] > BAR_INDEX_S
    ranks = f"{RANKS} ranks, {RANKS * of_rank / 1e6:.1f} M samples"
    bars = f"step, s (bar {BAR_STEP_S:g})", f"index, s (bar {BAR_INDEX_S:g})"
    text += "\n" + markdown((ranks, *bars), rows)
    print(text)
    if not options.quick or options.out is not None:
        facts = environment.describe()
        settings = {"repeats": repeats, "samples": samples, "ranks": RANKS, "of_rank": of_rank}
        whole = {"environment": facts, "settings": settings, "sizes": sizes, "queries_s": asked}
        stem = f"{facts['date']}-{environment.label()}-run-folder"
        for path in write_texts(options.out or RESULTS, stem, whole, text):
            print(f"wrote {path}", file=sys.stderr)
    return int(options.check and above)


if __name__ == "__main__":
    sys.exit(main())
