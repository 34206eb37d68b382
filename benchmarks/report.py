"""From epoch times to rows, and from rows to a table, a JSON file and a plot."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.cases import Case
from benchmarks.contenders import AS_IT_COMES, REFERENCE
from benchmarks.intervals import Spread, spread
from benchmarks.memory import Memory
from benchmarks.peers import PEERS, start_method, workers
from benchmarks.timing import EpochTime

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Figures:
    """One contender's medians over all epochs; only good for comparing within one row."""

    per_batch_us: float
    main_cpu_per_batch_us: float
    first_batch_ms: float
    memory: Memory | None


@dataclass(frozen=True)
class Row:
    """One contender against the reference in one case."""

    case: str
    contender: str
    start_method: str
    """Of the workers; a dash where there are none."""
    workers: str
    """How many, and whether they persist or start with each epoch."""
    bar: float | None
    """None for a peer: it is there to be compared with, not to be held to anything."""
    ratios: list[float]
    """Speed of the contender over the reference's, one for each pair of neighbouring epochs."""
    speed: Spread
    figures: Figures
    reference: Figures

    @property
    def verdict(self) -> str:
        """ "BELOW" only where the whole interval is: noise alone must not fail a check."""
        if self.bar is None:
            return "peer"
        if self.speed.interval is not None and self.speed.interval[1] < self.bar:
            return "BELOW"
        return "ok" if self.speed.median >= self.bar else "unclear"


def make_rows(
    case: Case, times: dict[str, list[EpochTime]], memory: dict[str, Memory]
) -> list[Row]:
    reference = times[REFERENCE]
    rows = []
    for name, epochs in times.items():
        if name == REFERENCE:
            continue
        pairs = zip(reference, epochs, strict=True)
        ratios = [stock.per_batch_ns / epoch.per_batch_ns for stock, epoch in pairs]
        rows.append(
            Row(
                case=case.name,
                contender=name,
                start_method=start_method(name, case),
                workers=workers(name, case),
                bar=_bar(name, case),
                ratios=ratios,
                speed=spread(ratios),
                figures=_figures(epochs, memory.get(name)),
                reference=_figures(reference, memory.get(REFERENCE)),
            )
        )
    return rows


def _bar(name: str, case: Case) -> float | None:
    if name in PEERS:
        return None
    return case.bar if name == AS_IT_COMES else case.floor


def _figures(epochs: Sequence[EpochTime], memory: Memory | None) -> Figures:
    return Figures(
        per_batch_us=statistics.median(each.per_batch_ns for each in epochs) / 1e3,
        main_cpu_per_batch_us=statistics.median(each.main_cpu_per_batch_ns for each in epochs)
        / 1e3,
        first_batch_ms=statistics.median(each.first_batch_ns for each in epochs) / 1e6,
        memory=memory,
    )


# -------------------------------------------------------------------------------------- table

_HEAD = (
    "case",
    "contender",
    "start method",
    "workers",
    "speed ratio",
    "95 % interval",
    "quartiles",
    "bar",
    "verdict",
    "µs/batch",
    "main CPU µs/batch",
    "first batch ms",
    "peak MB",
    "steady MB",
    "growth MB",
)


def table(rows: Sequence[Row]) -> str:
    """One line for each row. In brackets: the stock loader's figure."""
    return markdown(_HEAD, [_cells(row) for row in rows])


def text(rows: Sequence[Row]) -> str:
    """The table; where there are peers, what each contender takes follows, side by side."""
    if any(row.bar is None for row in rows):
        return f"{table(rows)}\n\n{side_by_side(rows)}"
    return table(rows)


def side_by_side(rows: Sequence[Row]) -> str:
    """A line for each case and figure, a column for each contender, the reference among them."""
    names = list(dict.fromkeys(row.contender for row in rows))
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        found = {row.contender: row for row in rows if row.case == case}
        figures = {name: row.figures for name, row in found.items()}
        figures[REFERENCE] = next(iter(found.values())).reference
        speeds = {name: f"{row.speed.median:.2f}" for name, row in found.items()}
        kinds = {
            "times as fast": speeds | {REFERENCE: "1"},
            "first batch, ms": {n: f"{each.first_batch_ms:.1f}" for n, each in figures.items()},
            "peak memory, MB": {n: _peak(each.memory) for n, each in figures.items()},
            "main CPU, s per 1000 batches": {
                n: f"{each.main_cpu_per_batch_us / 1e3:.3f}" for n, each in figures.items()
            },
        }
        for kind, values in kinds.items():
            cells = [values.get(name, "–") for name in (REFERENCE, *names)]  # noqa: RUF001
            lines.append([case, kind, *cells])
    return markdown(("case", "figure", REFERENCE, *names), lines)


def _peak(memory: Memory | None) -> str:
    return "–" if memory is None else f"{memory.peak_bytes / 1e6:.0f}"  # noqa: RUF001


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, padded to be read as plain text too."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    padded = ((f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _cells(row: Row) -> tuple[str, ...]:
    ours, stock = row.figures, row.reference
    cells = [
        row.case,
        row.contender,
        row.start_method,
        row.workers,
        f"{row.speed.median:.2f}",
        span(row.speed.interval),
        span(row.speed.quartiles),
        "–" if row.bar is None else f"{row.bar:.2f}",  # noqa: RUF001
        row.verdict,
        f"{ours.per_batch_us:.0f} ({stock.per_batch_us:.0f})",
        f"{ours.main_cpu_per_batch_us:.0f} ({stock.main_cpu_per_batch_us:.0f})",
        f"{ours.first_batch_ms:.1f} ({stock.first_batch_ms:.1f})",
    ]
    if ours.memory is None or stock.memory is None:
        return (*cells, "–", "–", "–")  # noqa: RUF001
    for name in ("peak_bytes", "steady_bytes", "rss_growth_bytes"):
        megabytes = [getattr(memory, name) / 1e6 for memory in (ours.memory, stock.memory)]
        cells.append("{:.0f} ({:.0f})".format(*megabytes))
    return tuple(cells)


def span(ends: tuple[float, float] | None) -> str:
    """An interval; a dash where there is none."""
    # A word rather than a dash between the ends: it cannot be taken for a sign.
    return "–" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}"  # noqa: RUF001


# -------------------------------------------------------------------------------------- files


def unused(folder: Path, stem: str) -> str:
    """The stem, numbered where an earlier result has it: results are never overwritten."""
    number, name = 1, stem
    while (folder / f"{name}.json").exists():
        number += 1
        name = f"{stem}-{number}"
    return name


def write_texts(folder: Path, stem: str, whole: dict[str, Any], text: str) -> list[Path]:
    """Write `stem.json` and, under the facts of the environment, `stem.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = unused(folder, stem)
    written = [folder / f"{stem}.json", folder / f"{stem}.md"]
    written[0].write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    facts = "\n".join(f"- {name}: {value}" for name, value in whole["environment"].items())
    written[1].write_text(f"{facts}\n\n{text}\n", encoding="utf-8")
    return written


def keep(kind: str, options: Any, found: dict[str, Any], text: str) -> None:
    """Write what a benchmark of its own found, with the environment, and say where.

    Nothing is written of a quick run (``options.quick``), unless ``options.out`` names a folder.
    """
    if options.quick and options.out is None:
        return
    facts = environment.describe()
    stem = f"{facts['date']}-{environment.label()}-{kind}"
    for path in write_texts(options.out or RESULTS, stem, {"environment": facts} | found, text):
        print(f"wrote {path}", file=sys.stderr)


def write(folder: Path, stem: str, head: dict[str, Any], rows: Sequence[Row]) -> list[Path]:
    """Write `stem.json`, `stem.md` and, where matplotlib is installed, `stem.png`."""
    whole = head | {"rows": [asdict(row) | {"verdict": row.verdict} for row in rows]}
    written = write_texts(folder, stem, whole, text(rows))
    if importlib.util.find_spec("matplotlib") is not None:
        written.append(written[0].with_suffix(".png"))
        plot(
            written[-1], rows, f"{head['environment']['cpu']}, torch {head['environment']['torch']}"
        )
    return written


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """A point and its interval for every row, and the bar it is held against."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    cases = list(dict.fromkeys(row.case for row in rows))
    contenders = list(dict.fromkeys(row.contender for row in rows))
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, contender in enumerate(contenders):
        chosen = [row for row in rows if row.contender == contender]
        offset = (number - (len(contenders) - 1) / 2) * min(0.28, 0.8 / len(contenders))
        middles = [row.speed.median for row in chosen]
        # Too few repeats for an interval: the quartiles are what there is.
        spreads = [row.speed.interval or row.speed.quartiles for row in chosen]
        axes.errorbar(
            middles,
            [cases.index(row.case) + offset for row in chosen],
            xerr=[
                [middle - low for middle, (low, _) in zip(middles, spreads, strict=True)],
                [high - middle for middle, (_, high) in zip(middles, spreads, strict=True)],
            ],
            fmt="o",
            markersize=4,
            capsize=3,
            label=contender,
        )
    bars = {row.case: row.bar for row in rows if row.bar is not None}
    for case, bar in bars.items():
        ends = [cases.index(case) + end for end in (-0.4, 0.4)]
        axes.plot([bar] * 2, ends, color="crimson", linewidth=1)
    axes.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    spans = [end for row in rows for end in (row.speed.interval or row.speed.quartiles)]
    narrow = max(spans) / min(spans) < 5
    axes.xaxis.set_major_locator(LogLocator(subs=range(1, 10) if narrow else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(cases)), cases)
    axes.set_ylim(len(cases) - 0.5, -0.5)  # the first case on top
    axes.set_xlabel("speed relative to the stock loader (median, 95 % interval; red: the bar)")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
