"""What the folder of a run of 1,024 ranks costs to read: `python -m benchmarks.many_ranks`.

An epoch of ImageNet's size is shared among the ranks as a DistributedSampler shares it, three
times, and each rank has written its folder. Then the commands are asked, each in a process of its
own: for the verdict on all ranks, for one step, for one index, for all there is to show. Told are
files and bytes, seconds and CPU time, and how often a file is opened, looked up or a folder listed.

A shared file system answers each of these over the network. Its seconds are simulated: every such
call waits a millisecond first, which is what a busy NFS or Lustre server takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler

from benchmarks.report import RESULTS, keep, markdown
from benchmarks.run_folder import fed
from safeloader.delivery.audit import EpochAudit
from safeloader.delivery.audit_part import AuditPart
from safeloader.delivery.ladder import Delivered
from safeloader.delivery.manifest import BatchManifest
from safeloader.failures.loader_log import LoaderLog
from safeloader.introspect.sharding import shard_of
from safeloader.provenance import run_format
from safeloader.provenance.attempts import open_run
from safeloader.provenance.recorder import Recorder
from safeloader.provenance.run_folder import About, LoaderFolder

RANKS, QUICK_RANKS = 1024, 16
SAMPLES, QUICK_SAMPLES, EPOCHS, BATCH = 1_281_167, 20_000, 3, 64
NETWORK_S = 0.001


def made_run(run: Path, ranks: int, samples: int) -> float:
    """Write the folders of all ranks; the seconds that a rank takes, all of its epochs included."""
    orders = [np.random.default_rng(epoch).permutation(samples) for epoch in range(EPOCHS)]
    share = -(-samples // ranks)
    padded = [np.concatenate([order, order[: share * ranks - samples]]) for order in orders]
    began = time.perf_counter()
    for rank in range(ranks):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
        log, recorder = LoaderLog(range(samples), samples, "benchmark"), Recorder()
        folder = LoaderFolder(open_run(run, ["benchmark"], rank), rank, "here", log)
        for epoch, order in enumerate(padded):
            its = order[rank::ranks].astype(np.int64)
            about = about_share(its, rank, ranks, samples)
            folder.taken_by(recorder, log, lambda index: "", about=about)
            folder.begun(epoch, lambda: EpochAudit(0))
            fed(folder, manifests(its), epoch)
            folder.audited(EpochAudit(epoch, complete=True, drawn=share, delivered=share))
        for number in folder.close():
            run_format.to_parquet(folder.path, number)
    return (time.perf_counter() - began) / ranks


def about_share(indices: Any, rank: int, ranks: int, samples: int) -> About:
    """What an epoch tells of its sampler, and to other ranks: the last index may be padding."""
    shard = shard_of(DistributedSampler(range(samples), ranks, rank))  # type: ignore[arg-type]
    if shard is None:
        raise SystemExit("a DistributedSampler does not say its share any more")
    ladder = Delivered([], indices, np.empty(0, np.int64)).ladder(samples)
    padded = tuple(indices[len(indices) - (shard.pads_last or 0) :].tolist())

    def part(audit: EpochAudit) -> AuditPart:
        known = {"shard": shard, "padded": padded, "ladder": ladder, "length": samples}
        return AuditPart.of(audit, rank, ranks, **known)

    return About(lambda: {"purpose": "", "shard": dataclasses.asdict(shard)}, part)


def manifests(indices: Any) -> list[BatchManifest]:
    """What a worker says of these samples: each took 20 µs."""
    now, made = time.perf_counter_ns(), []
    for number, first in enumerate(range(0, len(indices), BATCH)):
        its = indices[first : first + BATCH].astype(np.int64)
        stamps = now + 20_000 * np.arange(len(its) + 2, dtype=np.int64)
        made.append(
            BatchManifest(number, 0, os.getpid(), its.tobytes(), len(its), None, stamps.tobytes())
        )
    return made


def asked(*command: str, wait_s: float = 0.0) -> dict[str, float]:
    """A command's seconds, CPU seconds and calls to the file system, in a process of its own."""
    line = [sys.executable, "-m", "benchmarks.slow_files", str(wait_s), *command]
    began = time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"s": time.perf_counter() - began} | told


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the run, ask, print and write; `--check`: the status is 1 if a command fails."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.many_ranks",
        description="What a run of many ranks costs to read.",
    )
    add: Any = parser.add_argument
    add("--quick", action="store_true", help="16 ranks, no files")
    add("--out", type=Path, help=f"folder for results (default: {RESULTS.name}/ beside this file)")
    add("--check", action="store_true", help="exit 1 if the verdict on the run is not ok")
    options = parser.parse_args(arguments)
    ranks = QUICK_RANKS if options.quick else RANKS
    samples = QUICK_SAMPLES if options.quick else SAMPLES
    commands = {
        "audit": ("audit",),
        "step": ("step", "10"),
        "index": ("index", "12345"),
        "show": ("show",),
    }
    rows, found = [], dict[str, Any]()
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        of_rank_s = made_run(run, ranks, samples)
        files = [path for path in run.rglob("*") if path.is_file()]
        nbytes = sum(path.stat().st_size for path in files)
        for name, (command, *more) in commands.items():
            here = asked(command, str(run), *more)
            far = asked(command, str(run), *more, wait_s=NETWORK_S)
            found[name] = {"here": here, "shared": far}
            rows.append(
                (
                    name,
                    f"{here['s']:.1f}",
                    f"{here['cpu_s']:.1f}",
                    f"{here['calls']:,}",
                    f"{far['s']:.1f}",
                )
            )
    heads = (
        f"{ranks:,} ranks, {EPOCHS} epochs of {samples:,} samples",
        "s",
        "of CPU",
        "calls to the file system",
        f"s with {NETWORK_S * 1e3:g} ms a call",
    )
    text = markdown(heads, rows)
    text += f"\n\n{len(files):,} files, {nbytes / 1e6:.0f} MB: {nbytes / ranks / 1e3:.0f} kB and "
    text += f"{len(files) / ranks:.1f} files a rank, which took it {of_rank_s * 1e3:.0f} ms"
    print(text)
    whole = {"ranks": ranks, "samples": samples, "epochs": EPOCHS}
    whole |= {"files": len(files), "bytes": nbytes, "commands": found}
    keep("many-ranks", options, whole, text)
    return int(options.check and any(each["here"]["status"] for each in found.values()))


if __name__ == "__main__":
    sys.exit(main())
