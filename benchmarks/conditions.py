"""Loaders under conditions that loaders fail in: `python -m benchmarks.conditions`.

A consumer that keeps the batches, few file descriptors, a small /dev/shm. Every contender runs in
a process of its own, whose end may be anything: it is told, and where all finish, their speeds are
compared, in pairs of neighbouring processes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment
from benchmarks.cases import PoolDataset
from benchmarks.contenders import CONTENDERS, REFERENCE
from benchmarks.intervals import spread
from benchmarks.report import RESULTS, markdown, span, write_texts

REPEATS, QUICK_REPEATS = 6, 1
EPOCHS = 4
LIMIT_S = 180


@dataclass(frozen=True)
class Condition:
    name: str
    description: str
    shape: tuple[int, ...]
    batches: int
    keep: int
    """The newest batches that the consumer refers to."""
    open_files: int | None = None
    shm_megabytes: int | None = None
    batch_size: int = 64
    workers: int = 2


CONDITIONS = {
    condition.name: condition
    for condition in (
        Condition("keep-medium", "64 x 3x64x64 (3 MB), a list of 50 kept", (3, 64, 64), 50, 50),
        Condition("keep-large", "64 x 3x224x224 (38 MB), a list of 50 kept", (3, 224, 224), 50, 50),
        Condition(
            "few-files",
            "64 x 3x32x32 (0.8 MB), a list of 300 kept, ulimit -n 256",
            (3, 32, 32),
            batches=300,
            keep=300,
            open_files=256,
        ),
        Condition(
            "small-shm",
            "64 x 3x224x224 (38 MB), /dev/shm of 64 MB",
            (3, 224, 224),
            batches=30,
            keep=1,
            shm_megabytes=64,
        ),
    )
}


@dataclass(frozen=True)
class Outcome:
    """What became of one process."""

    error: str = ""
    """Empty if it finished and the batches kept were right."""
    first_us: float = 0.0
    """Per batch, in the first epoch: memory for the batches kept has to be had first."""
    later_us: float = 0.0
    """Per batch, median of the later epochs."""
    transport: dict[str, Any] = field(default_factory=dict)
    """`transport_stats` of a loader that has them."""


# ------------------------------------------------------------------------- the process measured


def endure(condition: Condition, contender: str, folder: Path) -> Outcome:
    """Run some epochs in this process; raises what the loader raises."""
    if condition.open_files is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (condition.open_files,) * 2)
    torch.set_num_threads(1)
    size = condition.batch_size
    dataset = PoolDataset(size * condition.batches, condition.shape, pool=17)
    kwargs = {"batch_size": size, "num_workers": condition.workers, "persistent_workers": True}
    loader = CONTENDERS[contender](dataset, kwargs, folder)
    times_us = []
    for _ in range(EPOCHS):
        kept: deque[Tensor] = deque(maxlen=condition.keep)
        gc.collect()
        batches = iter(loader)
        kept.append(next(batches))
        started_ns = time.perf_counter_ns()
        # No loop variable, which would refer to one batch more.
        kept.extend(batches)
        times_us.append((time.perf_counter_ns() - started_ns) / 1e3 / (condition.batches - 1))
        wrong = _wrong(dataset, condition, kept)
        if wrong:
            raise AssertionError(f"batches {wrong} do not hold what the dataset gave")
    stats = getattr(loader, "transport_stats", None)
    transport = {} if stats is None else stats.to_dict()
    return Outcome("", times_us[0], statistics.median(times_us[1:]), transport)


def _wrong(dataset: PoolDataset, condition: Condition, kept: deque[Tensor]) -> list[int]:
    """The batches kept that are not what they were sent as, by number."""
    size, first = condition.batch_size, condition.batches - len(kept)
    return [
        number
        for number, batch in enumerate(kept, first)
        if not torch.equal(
            batch, torch.stack([dataset[number * size + place] for place in range(size)])
        )
    ]


def _told(exc: BaseException) -> str:
    """An exception in one line; what the stock loader hands on from a worker says it at the end."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()] or [""]
    if type(exc) is RuntimeError and lines[0].startswith("Caught "):
        return f"in a worker: {lines[-1]}"
    return f"{type(exc).__name__}: {lines[0]}"


def _child(name: str, contender: str) -> None:
    with tempfile.TemporaryDirectory(prefix="safeloader-benchmark-") as folder:
        try:
            outcome = endure(CONDITIONS[name], contender, Path(folder))
        except Exception as exc:
            sys.excepthook(type(exc), exc, exc.__traceback__)
            outcome = Outcome(_told(exc))
    print(json.dumps(asdict(outcome)), flush=True)


# --------------------------------------------------------------------------------- the parent


def small_shm(megabytes: int) -> list[str]:
    """The start of a command that sees a /dev/shm of its own, of this size."""
    mount = f'mount -t tmpfs -o size={megabytes}m tmpfs /dev/shm && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", mount, "sh"]


def cannot(condition: Condition) -> str:
    """Why the condition cannot be had here; empty if it can."""
    if condition.open_files is not None and os.name != "posix":
        return "no limit on open files on this system"
    if condition.shm_megabytes is None:
        return ""
    try:
        command = [*small_shm(condition.shm_megabytes), "true"]
        tried = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "a /dev/shm of one's own needs `unshare` (Linux)"
    return "" if tried.returncode == 0 else f"no /dev/shm of one's own: {tried.stderr.strip()}"


def run(condition: Condition, contender: str, log: Any = None) -> Outcome:
    """Run it in a fresh process, whatever becomes of that."""
    command = [sys.executable, "-m", "benchmarks.conditions", "--child", condition.name, contender]
    if condition.shm_megabytes is not None:
        command = small_shm(condition.shm_megabytes) + command
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,  # so that its workers can be ended with it
    )
    try:
        said, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Outcome(f"no end within {LIMIT_S} s")
    if process.returncode == 0 and said:
        return Outcome(**json.loads(said.splitlines()[-1]))
    status = process.returncode
    ended = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
    return Outcome(f"the process ended with {ended}")


@dataclass(frozen=True)
class Result:
    """One contender under one condition."""

    condition: str
    contender: str
    outcomes: list[Outcome]
    ratios: list[float]
    """Speed over the reference's in the later epochs, a pair of processes each."""
    first_ratios: list[float]

    @property
    def error(self) -> str:
        return next((each.error for each in self.outcomes if each.error), "")


def compare(condition: Condition, names: Sequence[str], repeats: int, log: Any) -> list[Result]:
    """Take turns as long as all finish; one failure is answer enough."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            outcomes[name].append(run(condition, name, log))
        if any(runs[-1].error for runs in outcomes.values()):
            break
    reference = outcomes[REFERENCE]
    finished = not any(each.error for runs in outcomes.values() for each in runs)
    results = []
    for name, runs in outcomes.items():
        pairs = list(zip(reference, runs, strict=True)) if finished and name != REFERENCE else []
        ratios = [stock.later_us / ours.later_us for stock, ours in pairs]
        first_ratios = [stock.first_us / ours.first_us for stock, ours in pairs]
        results.append(Result(condition.name, name, runs, ratios, first_ratios))
    return results


_HEAD = (
    "condition",
    "contender",
    "outcome",
    "µs/batch",
    "speed ratio",
    "95 % interval",
    "quartiles",
    "first epoch",
)


def table(results: Sequence[Result]) -> str:
    return markdown(_HEAD, [_cells(result) for result in results])


def _cells(result: Result) -> list[str]:
    cells = [CONDITIONS[result.condition].description, result.contender]
    if result.error:
        error = textwrap.shorten(result.error, 120).replace("|", "/")  # a bar would end the cell
        return [*cells, error, *["–"] * 5]  # noqa: RUF001
    later_us = statistics.median(each.later_us for each in result.outcomes)
    cells += ["finished", f"{later_us:.0f}"]
    if not result.ratios:
        return [*cells, *["–"] * 4]  # noqa: RUF001
    speed, first = spread(result.ratios), spread(result.first_ratios)
    ratio = [f"{speed.median:.2f}", span(speed.interval), span(speed.quartiles)]
    return [*cells, *ratio, f"{first.median:.2f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.child:
        _child(*options.child)
        return 0
    results: list[Result] = []
    skipped: dict[str, str] = {}
    log = None if options.verbose else subprocess.DEVNULL
    for name in options.conditions:
        condition = CONDITIONS[name]
        reason = cannot(condition)
        if reason:
            skipped[name] = reason
            _say(f"{name}: left out: {reason}")
            continue
        found = compare(condition, options.contenders, options.repeats, log)
        for result in found:
            _say(f"{name}: {result.contender}: {result.error or 'finished'}")
        results += found
    print(table(results))
    if options.out is not None:
        facts = environment.describe()
        whole = {
            "environment": facts,
            "settings": {"repeats": options.repeats, "epochs": EPOCHS},
            "skipped": skipped,
            "results": [asdict(result) for result in results],
        }
        stem = f"{facts['date']}-{environment.label()}-conditions"
        for path in write_texts(options.out, stem, whole, table(results)):
            _say(f"wrote {path}")
    ours = [result for result in results if result.contender != REFERENCE]
    return 1 if any(result.error for result in ours) else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conditions",
        description="Loaders where loaders fail. Exits with 1 if one besides stock does.",
        epilog="; ".join(f"{each.name}: {each.description}" for each in CONDITIONS.values()),
    )
    add: Any = parser.add_argument
    add("--conditions", default=",".join(CONDITIONS), help="a,b,... (default: all)")
    add("--contenders", default="stock,safe", help="as in benchmarks.run, without the peers")
    add("--repeats", type=int, help=f"processes each ({REPEATS}; with --quick {QUICK_REPEATS})")
    add("--quick", action="store_true", help="one process each, no files")
    add("--out", type=Path, help=f"folder for results (default: {RESULTS.name}/ beside this file)")
    add("--verbose", action="store_true", help="show what the processes print, tracebacks too")
    add("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.conditions = options.conditions.split(",")
    chosen = [name for name in options.contenders.split(",") if name != REFERENCE]
    options.contenders = [REFERENCE, *dict.fromkeys(chosen)]
    for name, known in [
        *((name, CONDITIONS) for name in options.conditions),
        *((name, CONTENDERS) for name in options.contenders),
    ]:
        if name not in known:
            parser.error(f"no {name!r}; there are {', '.join(known)}")
    if options.repeats is None:
        options.repeats = QUICK_REPEATS if options.quick else REPEATS
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if options.out is None and not options.quick:
        options.out = RESULTS
    return options


if __name__ == "__main__":
    sys.exit(main())
