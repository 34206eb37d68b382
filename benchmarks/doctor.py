"""Whether the setting that `safeloader.doctor` recommends is as fast as the best there is.

`python -m benchmarks.doctor --help`. The doctor examines a loader as a user's program would have it
do; then every setting of a grid, and the doctor's choice, is measured in turn, each in epochs of
workers that were started before the clock. Nothing of the doctor's own measuring is used for that.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks import environment
from benchmarks.cases import CASES
from benchmarks.intervals import median_interval, spread
from benchmarks.report import RESULTS, markdown, write_texts
from safeloader.examining.doctor import doctor

BAR = 0.9
CASE = "jpeg-main"
REPEATS = 5
PREFETCH = (1, 2, 4, 8)

Setting = tuple[int, int | None, str | None]


@dataclass(frozen=True)
class Judged:
    """The doctor's choice against the best of the sweep, in batches per second."""

    chosen: Setting
    best: Setting
    chosen_rate: float
    best_rate: float
    best_interval: tuple[float, float]
    """95 % of the median; with too few values for one, all of them."""

    @property
    def share(self) -> float:
        return self.chosen_rate / self.best_rate

    @property
    def verdict(self) -> str:
        """ "ok" where the choice has the share, or cannot be told from the best."""
        inside = self.chosen_rate >= self.best_interval[0]
        return "ok" if self.share >= BAR or inside else "BELOW"


def grid(workers: Sequence[int], prefetch: Sequence[int], methods: Sequence[str]) -> list[Setting]:
    """Every setting: without workers there is one."""
    found: list[Setting] = [(0, None, None)] if 0 in workers else []
    with_workers = [each for each in workers if each]
    return found + [*itertools.product(with_workers, prefetch, methods)]


def judged(rates: Mapping[Setting, Sequence[float]], chosen: Setting) -> Judged:
    """The choice against the setting with the largest median."""
    best = max(rates, key=lambda setting: spread(rates[setting]).median)
    held = rates[best]
    interval = median_interval(held) or (min(held), max(held))
    medians = (spread(rates[setting]).median for setting in (chosen, best))
    return Judged(chosen, best, *medians, interval)


def one_turn(dataset: Any, kwargs: dict[str, Any], setting: Setting, epochs: int) -> list[float]:
    """Batches per second of some epochs of one setting, its workers started before."""
    workers, prefetch, method = setting
    options: dict[str, Any] = {"num_workers": workers}
    if workers:
        options |= {"prefetch_factor": prefetch, "multiprocessing_context": method}
        options["persistent_workers"] = True
    loader: Any = DataLoader(dataset, **kwargs, **options)
    for _ in loader:  # starts the workers, fills caches
        pass
    rates = []
    for _ in range(epochs):
        began = time.perf_counter()
        count = sum(1 for _ in loader)
        rates.append(count / (time.perf_counter() - began))
    return rates


def swept(
    dataset: Any, kwargs: dict[str, Any], settings: Sequence[Setting], repeats: int
) -> dict[Setting, list[float]]:
    """Each setting in turn, in an order that turns round: one epoch of each, so often."""
    rates: dict[Setting, list[float]] = {setting: [] for setting in settings}
    for turn in range(repeats):
        for setting in settings if turn % 2 == 0 else reversed(settings):
            rates[setting] += one_turn(dataset, kwargs, setting, 1)
        print(f"turn {turn + 1} of {repeats}", file=sys.stderr, flush=True)
    return rates


def table(rates: Mapping[Setting, Sequence[float]], found: Judged) -> str:
    """A line for each setting, the fastest first; then the verdict."""
    heads = ("workers", "prefetch", "start method", "batches/s", "quartiles", "")
    rows = []
    for setting in sorted(rates, key=lambda each: -spread(rates[each]).median):
        each = spread(rates[setting])
        marks = [
            *["best"] * (setting == found.best),
            *["the doctor's choice"] * (setting == found.chosen),
        ]
        told = ["-" if part is None else str(part) for part in setting]
        low, high = each.quartiles
        rows.append((*told, f"{each.median:.2f}", f"{low:.2f} to {high:.2f}", ", ".join(marks)))
    low, high = found.best_interval
    return (
        f"{markdown(heads, rows)}\n\nThe doctor's choice gives {found.share:.2f} of the best "
        f"(bar {BAR}; the best's interval {low:.2f} to {high:.2f}): {found.verdict}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine, sweep, judge and write; with `--check`, the status is 1 below the bar."""
    options = _options(arguments)
    torch.set_num_threads(1)
    dataset, kwargs = CASES[options.case].build(options.batches)
    plain = {
        name: kwargs[name] for name in ("batch_size", "shuffle", "collate_fn") if name in kwargs
    }
    report = doctor(DataLoader(dataset, **plain), seconds=options.seconds)
    print(report)
    if report.recommended is None:
        print("the doctor recommends nothing", file=sys.stderr)
        return 1
    row = report.recommended
    chosen: Setting = (row.workers, row.prefetch, row.method)
    settings = grid(options.workers, PREFETCH, options.methods)
    if chosen not in settings:
        settings.append(chosen)
    rates = swept(dataset, plain, settings, options.repeats)
    found = judged(rates, chosen)
    print(table(rates, found))
    if options.out is not None:
        facts = environment.describe()
        whole = {
            "environment": facts,
            "settings": {"repeats": options.repeats, "case": options.case},
            "doctor": [each.to_dict() for each in report.settings],
            "sweep": [
                {"setting": list(setting), "batches_per_s": each} for setting, each in rates.items()
            ],
            "judged": asdict(found) | {"share": found.share, "verdict": found.verdict},
        }
        stem = f"{facts['date']}-{environment.label()}-doctor"
        for path in write_texts(options.out, stem, whole, table(rates, found)):
            print(f"wrote {path}", file=sys.stderr)
    return 1 if options.check and found.verdict != "ok" else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    cores = environment.core_count()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.doctor",
        description="Whether the doctor's choice is as fast as the best of an exhaustive sweep.",
    )

    def numbers(text: str) -> list[int]:
        return [int(each) for each in text.split(",")]

    add: Any = parser.add_argument
    add("--case", choices=[*CASES], default=CASE, metavar="CASE", help=f"({CASE})")
    add("--batches", type=int, default=32, help="batches of an epoch (32)")
    add("--seconds", type=float, default=30.0, help="time of the doctor (30)")
    add("--repeats", type=int, default=REPEATS, help=f"epochs of each setting ({REPEATS})")
    add("--workers", type=numbers, default=list(range(2 * cores + 1)), help="up to two a core")
    add("--methods", type=lambda text: text.split(","), default=["fork"], help="(fork)")
    add("--out", type=Path, default=RESULTS, help=f"folder for results ({RESULTS.name}/ here)")
    add("--no-files", dest="out", action="store_const", const=None, help="print only")
    add("--check", action="store_true", help="exit 1 below the bar")
    options = parser.parse_args(arguments)
    if min(options.repeats, options.batches) < 1:
        parser.error("--repeats and --batches must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
