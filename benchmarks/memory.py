"""Memory of one case under one contender, measured in a process of its own.

Called by `measure`, it runs as `python -m benchmarks.memory CASE CONTENDER BATCHES` and prints
JSON. A fresh process, because what an earlier case allocated would stay in the figures, and not
while speed is timed, because the measurement reads every mapping of every process.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES
from benchmarks.peers import maker
from benchmarks.timing import seeded

SAMPLES_PER_EPOCH = 12


@dataclass(frozen=True)
class Memory:
    """Main process and workers together, in bytes."""

    measure: str
    """"pss": a page shared by n processes counts 1/n in each. "uss" where the system has no PSS."""
    peak_bytes: int
    steady_bytes: int
    rss_growth_bytes: int
    """From the end of one epoch to the end of the next: what a leak would show."""


def available() -> bool:
    return importlib.util.find_spec("psutil") is not None


def measure(case: str, contender: str, batches: int) -> Memory:
    """Measure in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", case, contender, str(batches)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def _read() -> tuple[str, int, int]:
    """Name and sum of the proportional (or unique) size, and sum of the resident size."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    main = psutil.Process()
    infos = []
    for process in (main, *main.children(recursive=True)):
        try:
            infos.append(process.memory_full_info())
        except psutil.NoSuchProcess:  # a worker that ended meanwhile
            continue
    name = "pss" if hasattr(infos[0], "pss") else "uss"
    return name, sum(getattr(info, name) for info in infos), sum(info.rss for info in infos)


def _watch_epoch(loader: Iterable[Any], every: int) -> list[int]:
    """Sizes at every `every`-th batch, while the consumer holds it."""
    return [_read()[1] for number, _ in enumerate(loader) if number % every == 0]


def _main(case: str, contender: str, batches: int) -> Memory:
    dataset, kwargs = CASES[case].build(batches)
    with tempfile.TemporaryDirectory(prefix="safeloader-benchmark-") as folder:
        loader = maker(contender)(dataset, seeded(kwargs), Path(folder))
        every = max(1, batches // SAMPLES_PER_EPOCH)
        # Two epochs, so that what is filled once (caches, pools, the lazily imported) is no growth.
        for _ in range(2):
            _watch_epoch(loader, batches)
        gc.collect()
        before_rss = _read()[2]
        sizes = _watch_epoch(loader, every)
        gc.collect()
        name, _, after_rss = _read()
        del loader  # the workers end before the folder goes
        gc.collect()
    return Memory(name, max(sizes), int(statistics.median(sizes)), after_rss - before_rss)


if __name__ == "__main__":
    print(json.dumps(asdict(_main(sys.argv[1], sys.argv[2], int(sys.argv[3])))))
