"""The pictures of the report page, as Plotly's script takes them. Runs in: main."""

from __future__ import annotations

import datetime
import html
from typing import Any

import numpy as np

from safeloader.report.datasets import Dataset
from safeloader.report.fetch_times import PER_DECADE
from safeloader.report.run import RunFolder
from safeloader.report.waiting import SPANS, Waiting

_LINES_MAX = 8  # above, the middle rank and the worst are shown
_BARS_MAX = 32
_MEMORY_LINES_MAX = 12
_POINTS_MAX = 400  # of a line
_GAP = 8  # spans without a step
_MIB = 1 << 20
_COLOURS = (
    *("#3b82d6", "#e08a2c", "#3fa66a", "#b65fc2"),
    *("#d4504e", "#3aa9b5", "#8d7b4b", "#9aa3ad"),
)

Chart = dict[str, Any]


def all_of(waiting: Waiting, datasets: list[Dataset], run: RunFolder) -> list[Chart]:
    """Those for which there is anything to show: ``id``, ``traces``, ``layout``."""
    found = [
        _waiting(waiting, datasets),
        _workers(datasets),
        _fetches(datasets),
        _memory(run.workers(), run),
        _slots(run.transport(), run),
    ]
    return [each for each in found if each["traces"]]


def _text(said: str) -> str:
    """A text from the run, as Plotly shows it, which takes some HTML."""
    return html.escape(said, quote=False)


def short(name: str) -> str:
    """A loader's name without the folders of its file."""
    head, at, line = name.rpartition(" at ")
    return f"{head}{at}{line.rsplit('/', 1)[-1]}"


def _moments(first_ns: int, last_ns: int) -> list[str]:
    width = (last_ns - first_ns) / SPANS
    return [_moment(first_ns + (k + 0.5) * width) for k in range(SPANS)]


def _moment(ns: float) -> str:
    return datetime.datetime.fromtimestamp(ns / 1e9).isoformat(" ", "milliseconds")


def _waiting(waiting: Waiting, datasets: list[Dataset]) -> Chart:
    """The share of the steps' time that was spent waiting, over time."""
    traces: list[Any] = []
    colours: dict[str, int] = {}
    for number, dataset in enumerate(datasets):
        for attempt, span in waiting.spans.items():
            its = [each for each in dataset.loaders if each.records.attempt == attempt]
            by_rank: dict[int, list[Any]] = {}
            for each in its:
                by_rank.setdefault(each.records.rank, []).append(each)
            lines = {
                rank: _shares(sum(each.waited for each in those), sum(e.computed for e in those))
                for rank, those in by_rank.items()
            }
            if len(lines) > _LINES_MAX:
                whole = np.array(list(lines.values()))
                seen = ~np.isnan(whole).all(axis=0)
                middle, worst = np.full((2, SPANS), np.nan)
                middle[seen] = np.nanmedian(whole[:, seen], axis=0)
                worst[seen] = np.nanmax(whole[:, seen], axis=0)
                named = {"middle rank": middle, "worst rank": worst}
            else:
                several = len(lines) > 1
                named = {f"rank {rank}" if several else "": each for rank, each in lines.items()}
            moments = _moments(*span)
            for name, shares in named.items():
                loader = short(dataset.name) if len(datasets) > 1 or not name else ""
                line = _line(loader, name, moments, shares, number)
                line["line"]["color"] = _COLOURS[
                    colours.setdefault(line["name"], len(colours)) % len(_COLOURS)
                ]
                line["showlegend"] = all(line["name"] != each["name"] for each in traces)
                traces.append(line)
    layout = {
        "yaxis": {"title": {"text": "waiting for data, %"}, "range": [0, 101], "ticksuffix": "%"},
        "xaxis": {"type": "date"},
        "showlegend": sum(each["showlegend"] for each in traces) > 1,
    }
    return {"id": "waiting", "traces": traces, "layout": layout}


def _shares(waited: Any, computed: Any) -> Any:
    whole = waited + computed
    return np.where(whole > 0, 100 * waited / np.maximum(whole, 1), np.nan)


def _line(loader: str, name: str, moments: list[str], shares: Any, number: int) -> Chart:
    seen = np.flatnonzero(~np.isnan(shares)).tolist()
    x: list[str] = []
    y: list[float | None] = []
    for before, k in zip([None, *seen], seen, strict=False):
        if before is not None and k - before > _GAP:  # nothing ran: no line over it
            x.append(moments[before + 1])
            y.append(None)
        x.append(moments[k])
        y.append(round(float(shares[k]), 1))
    said = _text(", ".join(filter(None, [loader, name])))
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "marker": {"size": 4},
        "name": said,
        "legendgroup": said,
        "x": x,
        "y": y,
        "line": {"width": 1.5},
        "visible": True if number == 0 else "legendonly",
    }


def _workers(datasets: list[Dataset]) -> Chart:
    """What each worker did: fetching, collating, idle."""
    labels: list[str] = []
    parts: dict[str, list[float]] = {"fetching": [], "collating": [], "idle": []}
    rows = []
    for dataset in datasets:
        several = len({each.records.rank for each in dataset.loaders}) > 1
        by_worker: dict[tuple[int, int], list[Any]] = {}
        for each in dataset.loaders:
            for (worker, _), work in each.work.items():
                by_worker.setdefault((each.records.rank, worker), []).append(work)
        for (rank, worker), works in sorted(by_worker.items()):
            name = "main" if worker < 0 else f"worker {worker}"
            label = f"rank {rank}, {name}" if several else name
            if len(datasets) > 1:
                label = f"{short(dataset.name).rpartition(' at ')[2]}: {label}"
            sums = [
                sum(getattr(work, part) for work in works)
                for part in ("fetching", "collating", "idle")
            ]
            rows.append((label, sums))
    if len(rows) > _BARS_MAX:  # the busiest and the idlest tell the most
        rows.sort(key=lambda row: -(row[1][0] + row[1][1]) / max(1.0, sum(row[1])))
        rows = rows[: _BARS_MAX // 2] + rows[-_BARS_MAX // 2 :]
    for label, sums in rows[::-1]:
        whole = max(1.0, sum(sums))
        labels.append(_text(label))
        for part, value in zip(parts, sums, strict=True):
            parts[part].append(round(100 * value / whole, 1))
    traces = [
        {"type": "bar", "orientation": "h", "name": part, "x": values, "y": labels}
        for part, values in parts.items()
        if labels
    ]
    layout = {
        "barmode": "stack",
        "xaxis": {"range": [0, 100], "ticksuffix": "%"},
        "yaxis": {"automargin": True, "type": "category"},
        "height": 110 + 26 * len(labels),
    }
    return {"id": "workers", "traces": traces, "layout": layout}


def _fetches(datasets: list[Dataset]) -> Chart:
    """How the fetch times spread."""
    traces = []
    for dataset in datasets:
        counts = dataset.times.counts
        some = np.flatnonzero(counts)
        if not some.size:
            continue
        places = np.arange(some[0], some[-1] + 1)
        traces.append(
            {
                "type": "bar",
                "name": _text(short(dataset.name)),
                "x": [round(float(10 ** ((k + 0.5) / PER_DECADE - 6)), 7) for k in places],
                "y": counts[places].tolist(),
                "width": [float(f"{10 ** (k / PER_DECADE - 6) * 0.0593:.4g}") for k in places],
                "opacity": 0.8,
            }
        )
    layout = {
        "xaxis": {"type": "log", "dtick": 1, "title": {"text": "time to fetch a sample, ms"}},
        "yaxis": {"type": "log", "title": {"text": "samples"}, "dtick": 1},
        "barmode": "overlay",
        "bargap": 0,
        "showlegend": len(traces) > 1,
    }
    return {"id": "fetches", "traces": traces, "layout": layout}


def _memory_lines(workers: Any) -> dict[tuple[int, int, int], list[tuple[int, int]]]:
    """By attempt, loader and worker when it used how much: of the processes that used most."""
    names = ("attempt", "loader", "worker")
    keys = np.stack([workers[name].to_numpy().astype(np.int64) for name in names], 1)
    rss, pss, uss = (workers[f"{name}_bytes"].to_numpy() for name in ("rss", "pss", "uss"))
    used = np.where((keys[:, 2] >= 0) & (pss >= 0), pss, np.where(rss >= 0, rss, uss))
    known, times = used >= 0, workers["time_ns"].to_numpy()
    found, of_row = np.unique(keys[known], axis=0, return_inverse=True)
    of_row, used, times = of_row.ravel(), used[known], times[known]
    peaks = np.zeros(len(found), np.int64)
    np.maximum.at(peaks, of_row, used)
    lines = {}
    for k in np.argsort(-peaks, kind="stable")[:_MEMORY_LINES_MAX].tolist():
        rows = of_row == k
        attempt, loader, worker = found[k].tolist()
        pairs = zip(times[rows].tolist(), used[rows].tolist(), strict=True)
        lines[attempt, loader, worker] = sorted(pairs)
    return lines


def _memory(workers: Any, run: RunFolder) -> Chart:
    """Memory of main and workers over time."""
    traces: list[Any] = []
    if workers.num_rows:
        lines = _memory_lines(workers)
        several = len(run.ranks) > 1
        loaders = len({each.name for each in run.loaders})
        for key in sorted(lines):
            attempt, loader, worker = key
            its = run.loaders[loader]
            words = [
                "main (RSS)" if worker < 0 else f"worker {worker}",
                f"rank {its.rank}" if several else "",
                f"attempt {attempt}" if attempt else "",
                short(its.name).rpartition(" at ")[2] if loaders > 1 else "",
            ]
            traces.append(_bytes_line(", ".join(filter(None, words)), lines[key]))
    layout = {
        "xaxis": {"type": "date"},
        "yaxis": {"title": {"text": "memory, MiB"}, "rangemode": "tozero"},
        "showlegend": True,
    }
    return {"id": "memory", "traces": traces, "layout": layout}


def _bytes_line(name: str, rows: list[tuple[int, int]]) -> Chart:
    """A line of sizes over time."""
    rows = rows[:: -(-len(rows) // _POINTS_MAX)] + rows[-1:]
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(rows) < 20 else "lines",
        "name": _text(name),
        "x": [_moment(ns) for ns, _ in rows],
        "y": [round(value / _MIB, 1) for _, value in rows],
    }


def _slots(lines: list[dict[str, Any]], run: RunFolder) -> Chart:
    """The memory of slots over time, of the loaders that used most, and ``/dev/shm``."""
    by_loader: dict[int, list[tuple[int, int]]] = {}
    shared: list[tuple[int, int]] = []
    for each in lines:
        moment = int(float(each.get("time", 0)) * 1e9)
        by_loader.setdefault(each["loader"], []).append((moment, int(each.get("slot_bytes", 0))))
        if int(each.get("shm_used", -1)) >= 0:
            shared.append((moment, int(each["shm_used"])))
    peaks = {number: max(value for _, value in rows) for number, rows in by_loader.items()}
    shown = sorted(peaks, key=lambda number: -peaks[number])[: _MEMORY_LINES_MAX - 1]
    several, loaders = len(run.ranks) > 1, len({each.name for each in run.loaders})
    traces = []
    for number in sorted(each for each in shown if peaks[each]):
        its = run.loaders[number]
        words = [
            "slots",
            f"rank {its.rank}" if several else "",
            f"attempt {its.attempt}" if its.attempt else "",
            short(its.name).rpartition(" at ")[2] if loaders > 1 else "",
        ]
        traces.append(_bytes_line(", ".join(filter(None, words)), by_loader[number]))
    if any(value for _, value in shared):
        traces.append(_bytes_line("used of /dev/shm, all processes", sorted(shared)))
    layout = {
        "xaxis": {"type": "date"},
        "yaxis": {"title": {"text": "shared memory, MiB"}, "rangemode": "tozero"},
        "showlegend": True,
    }
    return {"id": "slots", "traces": traces, "layout": layout}
