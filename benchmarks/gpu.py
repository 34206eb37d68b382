"""All that needs a card, in one command: `python -m benchmarks.gpu`.

From a bare checkout on a machine with CUDA, torch, NumPy, psutil and pytest, within eight minutes.
Each part runs in a process of its own, so that one which is killed, or which leaves CUDA broken,
takes nothing from the others; what it had measured by then is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import environment, gpu_copies, gpu_loading, gpu_tests, gpu_training
from benchmarks.gpu_budget import Budget, NoTime, Row
from benchmarks.gpu_card import Card, Cuda, Rehearsal, slug
from benchmarks.report import markdown, write_texts

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
MINUTES = 8.0
WRITING_S = 10
"""Of the time, what is kept for the start and for writing."""
LAST_CELL = 0.15
"""Of a part's time, what is left to a cell that began in time and takes longer than was thought."""
LEAST_S = 5


@dataclass(frozen=True)
class Part:
    """One thing that is measured."""

    title: str
    weight: float
    """Its share of the time; what it does not use goes to those that follow."""
    rows: Callable[[Card, Budget], Iterator[Row]]


PARTS = {
    "copies": Part("copies to the device, and registered slots", 45, gpu_copies.rows),
    "tests": Part("the tests that need CUDA", 90, lambda card, budget: gpu_tests.rows(budget)),
    "pinned": Part("training from pinned memory", 70, gpu_training.pinned_rows),
    "idle": Part("idle time of the card", 70, gpu_training.idle_rows),
    "workers": Part("1 to 16 workers", 100, gpu_loading.worker_rows),
    "sizes": Part("batches of 38 MB to 5 GB", 95, gpu_loading.size_rows),
}
"""In this order: last what is the likeliest to take the machine's memory."""


# ------------------------------------------------------------------------------- in the child


def measure(name: str, card: Card, budget: Budget, file: Path) -> None:
    """Write the rows of a part, each as it is found."""
    with file.open("w", encoding="utf-8") as out:
        try:
            for row in PARTS[name].rows(card, budget):
                out.write(json.dumps(row) + "\n")
                out.flush()
        except NoTime:
            out.write(json.dumps({"error": "no time was left to begin it"}) + "\n")


# ------------------------------------------------------------------------------ in the parent


def run(name: str, seconds: float, rehearse: bool, folder: Path) -> list[Row]:
    """The rows of a part, whatever becomes of its process, which ends within the time."""
    if seconds < LEAST_S:
        return [{"error": f"not run: {max(0.0, seconds):.0f} s were left"}]
    file, log = folder / f"{name}.jsonl", folder / f"{name}.log"
    soft_s = time.time() + seconds * (1 - LAST_CELL)
    command = [sys.executable, "-m", "benchmarks.gpu", "--child", name, str(soft_s), str(file)]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command + ["--rehearse"] * rehearse,
            cwd=ROOT,
            stdout=stderr,
            stderr=stderr,
            start_new_session=True,  # so that its workers can be ended with it
        )
        try:
            status: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [*_whole(lines), *_ended(status, seconds, log)]


def _whole(lines: Sequence[str]) -> Iterator[Row]:
    """What was written, but for a last line that was cut off."""
    for line in lines:
        with suppress(ValueError):
            yield json.loads(line)


def _ended(status: int | None, seconds: float, log: Path) -> list[Row]:
    """What there is to say about the end of a part."""
    if status == 0:
        return []
    said = log.read_text(encoding="utf-8", errors="replace")[-4000:]
    if status is None:
        return [{"error": f"ended at its limit of {seconds:.0f} s", "output": said}]
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
    last = [line.strip() for line in said.splitlines() if line.strip()][-1:]
    return [{"error": f"ended with {how}: {' '.join(last)}", "output": said}]


def run_all(
    names: Sequence[str], until_s: float, rehearse: bool, show: Callable[[str], None]
) -> dict[str, list[Row]]:
    """All parts, each shown as it ends."""
    found: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(prefix="safeloader-benchmark-") as folder:
        for number, name in enumerate(names):
            weights = [PARTS[each].weight for each in names[number:]]
            seconds = (until_s - time.time()) * weights[0] / sum(weights)
            began = time.monotonic()
            found[name] = run(name, seconds, rehearse, Path(folder))
            took = time.monotonic() - began
            found[name].append({"note": f"{PARTS[name].title}: {took:.0f} of {seconds:.0f} s"})
            show(text_of(name, found[name]))
    return found


# -------------------------------------------------------------------------------------- words


def text_of(name: str, rows: Sequence[Row]) -> str:
    """A part in markdown: its tables, then what there is to say."""
    tables: dict[str, list[Row]] = {}
    for row in rows:
        if "table" in row:
            tables.setdefault(row["table"], []).append(row)
    blocks = [f"## {PARTS[name].title[0].upper()}{PARTS[name].title[1:]}"]
    for title, of_table in tables.items():
        head = [
            key
            for key in dict.fromkeys(key for row in of_table for key in row)
            if key != "table" and not any(isinstance(row.get(key), list) for row in of_table)
        ]
        cells = [[shown(row.get(key)) for key in head] for row in of_table]
        blocks += [f"**{title}**", markdown(head, cells)]
    remarks = [f"- FAILED: {row['error']}" for row in rows if "error" in row]
    remarks += [f"- {row['note']}" for row in rows if "note" in row]
    return "\n\n".join([*blocks, "\n".join(remarks)]).replace("\x1b", "?")


def shown(value: Any) -> str:
    """A value in a cell; of a spread its median, with the interval or else the quartiles."""
    if value is None:
        return "–"  # noqa: RUF001
    if isinstance(value, dict):
        low, high = value["interval"] or value["quartiles"]
        kind = "" if value["interval"] else "q "
        return f"{value['median']:.2f} ({kind}{low:.2f} to {high:.2f})"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "/")  # a bar would end the cell


def facts_of(card: Card) -> dict[str, Any]:
    """The machine, for the file of results."""
    facts = environment.describe() | card.facts()
    facts["memory_bytes"] = psutil.virtual_memory().total
    if gpu_loading.SHM.is_dir():
        facts["dev_shm_bytes"] = shutil.disk_usage(gpu_loading.SHM).total
    return facts


def headline(facts: dict[str, Any], rehearse: bool) -> str:
    """One line on what was measured with what."""
    told_of = (
        ("", "date"),
        ("", "gpu"),
        ("driver ", "driver_version"),
        ("PCIe ", "pcie_link_gen_max"),
        ("CUDA ", "cuda"),
        ("torch ", "torch"),
        ("Python ", "python"),
        ("", "cpu"),
        ("cores: ", "cores"),
    )
    words = [f"{word}{facts[key]}" for word, key in told_of if facts.get(key)]
    mark = "REHEARSAL without a card, no figure means anything. " if rehearse else ""
    return f"# {mark}{', '.join(words)}\n\nIntervals are of 95 %; q stands for quartiles."


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; the status is 1 if anything failed."""
    until_s = time.time()
    options = _options(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print("CUDA is not available here: nothing was measured, nothing was written.")
        return 0
    card: Card = Rehearsal() if options.rehearse else Cuda()
    if options.child:
        name, soft_s, file = options.child
        torch.set_num_threads(1)  # as in the pinning thread; the other cores are the workers'
        measure(name, card, Budget(float(soft_s)), Path(file))
        os._exit(0)  # to give back gigabytes of pinned memory one by one takes seconds
    until_s += 60 * options.minutes - WRITING_S
    facts = facts_of(card)

    def show(text: str) -> None:
        print(text, end="\n\n", flush=True)

    show(headline(facts, options.rehearse))
    found = run_all(options.parts, until_s, options.rehearse, show)
    if options.out is not None:
        kind = "-rehearsal" if options.rehearse else ""
        stem = f"{facts['date']}-{slug(facts['gpu'])[:40]}-{facts['cores']}core-gpu{kind}"
        whole = {
            "rehearsal": options.rehearse,
            "environment": facts,
            "settings": {"minutes": options.minutes},
            "parts": found,
        }
        text = "\n\n".join(
            [headline(facts, options.rehearse), *(text_of(*part) for part in found.items())]
        )
        for path in write_texts(options.out, stem, whole, text):
            print(f"wrote {path}", file=sys.stderr)
    return 1 if any("error" in row for rows in found.values() for row in rows) else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="All that needs CUDA, within some minutes. Exits with 1 if anything failed.",
        epilog="; ".join(f"{name}: {part.title}" for name, part in PARTS.items()),
    )
    add: Any = parser.add_argument
    add("--minutes", type=float, default=MINUTES, help=f"for everything (default: {MINUTES:g})")
    add("--parts", default=",".join(PARTS), help="a,b,... (default: all)")
    add("--rehearse", action="store_true", help="tiny, on the CPU: a test of this command")
    add("--out", type=Path, help=f"folder for results (default: {RESULTS.name}/ beside this file)")
    add("--no-files", action="store_true", help="print only")
    add("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"no part {name!r}; there are {', '.join(PARTS)}")
    if options.minutes <= 0:
        parser.error("--minutes must be above 0")
    if options.rehearse and options.out is not None and options.out.resolve() == RESULTS.resolve():
        parser.error("a rehearsal is no result: give another folder")
    if options.out is None and not options.rehearse:
        options.out = RESULTS
    if options.no_files:
        options.out = None
    return options


if __name__ == "__main__":
    sys.exit(main())
