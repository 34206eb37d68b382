"""The report page of a run: one HTML file that needs no network. Runs in: main.

What a person asks, in this order: is the data right, is it the bottleneck, which samples, what does
it cost. This module gathers the answers; ``page/`` has the template, the style and the script.
Everything that comes from the run is escaped: by Jinja2 in the page, as JSON for the script, which
sets text and no HTML, and by hand in what Plotly shows.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import Any

from safeloader.report import charts
from safeloader.report.cost import WAYS, cost_of
from safeloader.report.datasets import Dataset, bare, datasets_of, plain_index, sample_name, weight
from safeloader.report.exactly_once import EpochVerdict, RunVerdict, exactly_once
from safeloader.report.fetch_times import SLOW
from safeloader.report.records import RunEpoch
from safeloader.report.run import RunFolder
from safeloader.report.searched import searched
from safeloader.report.waiting import Waiting, waiting_of

INSTALL = "pip install 'safeloader[report]'"

_HERE = Path(__file__).parent / "page"
_SLOW_SHOWN, _FAILURES_SHOWN, _EPOCHS_SHOWN, _LEFT_OUT_SHOWN = 15, 60, 120, 12
_TEXT_MAX = 12_000


def why_no_page() -> str:
    """What to install where a library is missing, in a sentence; empty if nothing is."""
    needed = ("pyarrow", "jinja2", "plotly")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"the report page needs {' and '.join(missing)}: {INSTALL}" if missing else ""


def page_of(run: RunFolder) -> str:
    """The report page of a run, as HTML.

    Args:
        run: it may go on meanwhile.

    Returns:
        A whole page of some 5 MB, nearly all of it Plotly's script.

    Raises:
        ImportError: if Jinja2 or Plotly is missing.

    Example:
        >>> import tempfile
        >>> from safeloader import SafeDataLoader
        >>> from safeloader.report.run import RunFolder
        >>> run_dir = tempfile.TemporaryDirectory()
        >>> loader = SafeDataLoader(list(range(6)), batch_size=2, run_dir=run_dir.name)
        >>> batches = list(loader)
        >>> from safeloader.report.page import page_of, why_no_page
        >>> page = "Is the data right?" if why_no_page() else page_of(RunFolder(run_dir.name))
        >>> "Is the data right?" in page
        True
        >>> run_dir.cleanup()
    """
    missing = why_no_page()
    if missing:
        raise ImportError(missing)
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    loading = jinja2.FileSystemLoader(_HERE)
    environment = jinja2.Environment(
        loader=loading, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": duration, "size": size, "number": number, "share": share}
    told, data = _told(run)
    return environment.get_template("report.html").render(
        **told,
        data=data,
        style=Markup((_HERE / "report.css").read_text("utf-8")),  # noqa: S704  # ours
        script=Markup((_HERE / "report.js").read_text("utf-8")),  # noqa: S704  # ours
        plotly=Markup(get_plotlyjs()),  # noqa: S704  # Plotly's
    )


def _told(run: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the template shows, and what the script is given."""
    epochs = run.epochs()
    waiting = waiting_of(run)
    datasets = datasets_of(run, waiting)
    failures = sorted(run.failures(), key=lambda each: _seconds(each.get("time")))
    incidents = run.incidents()
    right = _right(run, epochs, exactly_once(run), failures, incidents)
    states = Counter(each.state for each in run.loaders)
    newest = Counter(
        each.state for each in run.loaders if each.attempt == max(run.attempts, default=0)
    )
    data: dict[str, Any] = {
        "charts": charts.all_of(waiting, datasets, run),
        "search": searched(run, waiting, datasets, failures, incidents),
        "command": f"python -m safeloader index {shlex.quote(str(run.path))} ",
        "step_command": f"python -m safeloader step {shlex.quote(str(run.path))} ",
    }
    told = {
        "run": run,
        "title": run.path.resolve().name,
        "command": _joined(run.info.get("command")),
        "started": moment(run.info.get("started")),
        "made": moment(time.time()),
        "zone": time.strftime("%Z"),
        "states": states,
        "state": _state(newest),
        "interrupted": sorted({each.attempt for each in run.loaders if each.state == "killed"}),
        "samples": sum(each.samples for each in waiting.loaders),
        "batches": sum(each.batches for each in waiting.loaders),
        "seconds": sum(last - first for first, last in waiting.spans.values()) / 1e9,
        "right": right,
        "audit_command": f"python -m safeloader audit {shlex.quote(str(run.path))}",
        "datasets": datasets,
        "worst": max(datasets, key=weight, default=None),
        "slow": _slow(datasets),
        "longest": _longest(waiting),
        "failures": [_failure(each) for each in failures[-_FAILURES_SHOWN:]][::-1],
        "failure_count": len(failures),
        "cost": cost_of(run),
        "ways": WAYS,
        "notes": list(dict.fromkeys(run.notes)),  # complete now: all was read
        "dropped": run.dropped(),
        "chart_names": {each["id"] for each in data["charts"]},
    }
    return told, data


# ── is the data right ────────────────────────────────────────────────────────────────────────────


def _right(
    run: RunFolder,
    epochs: list[RunEpoch],
    verdict: RunVerdict,
    failures: list[dict[str, Any]],
    incidents: list[dict[str, Any]],
) -> dict[str, Any]:
    """The audit over epochs, ranks and attempts, and what was left out."""
    audits: dict[tuple[int, str, int], list[dict[str, Any]]] = {}
    for each in epochs:
        if each.audit is not None:
            key = each.loader.attempt, each.loader.name, each.epoch
            audits.setdefault(key, []).append(each.audit)
    table = [_epoch_row(each, audits) for each in verdict.epochs]
    wrong = [row for row in table if row["state"] == "wrong"]
    states = Counter(row["state"] for row in table)
    unknown = states["cut off"] + states["not known"]
    what = Counter(str(each.get("what")) for each in incidents)
    noticed = Counter(
        str(said)
        for each in epochs
        for said in [*(each.audit or {}).get("noticed", ()), *(each.audit or {}).get("notes", ())]
    )
    unchecked = Counter(
        str(said) for each in epochs for said in (each.audit or {}).get("unchecked", ())
    )
    worst_first = {"wrong": 0, "cut off": 1, "not known": 1, "running": 2, "left early": 3}
    table.sort(key=lambda row: worst_first.get(row["state"], 9))
    left_out = what["skipped"] + what["replaced"]
    level = 2 if wrong else 1 if left_out or failures or unknown or noticed else 0
    return {
        "level": level,
        "rows": table[:_EPOCHS_SHOWN],
        "more": max(0, len(table) - _EPOCHS_SHOWN),
        "epochs": len(table),
        "states": states,
        "wrong": wrong,
        "unknown": unknown,
        "delivered": sum(row["delivered"] for row in table),
        "what": what,
        "left_out": left_out,
        "groups": _left_out(run, incidents),
        "noticed": noticed.most_common(20),
        "unchecked": unchecked.most_common(20),
        "nothing": not epochs,
        "next_step": verdict.next_step,
        "culprit": _most_often(failures, incidents),
    }


def _most_often(
    failures: list[dict[str, Any]], incidents: list[dict[str, Any]]
) -> tuple[Any, int] | None:
    """The index that failed or was left out most often, and how often; None if none ever was."""
    places = {
        (
            each["attempt"],
            each["rank"],
            each["loader"],
            its.get("epoch"),
            plain_index(its.get("index")),
        )
        for each in [*failures, *incidents]
        for its in [each.get("failure", each)]
        if its.get("index") is not None and its.get("what") != "late"
    }
    counted = Counter(str(index) for *_, index in places).most_common(1)
    return counted[0] if counted else None


def _epoch_row(
    of: EpochVerdict, audits: dict[tuple[int, str, int], list[dict[str, Any]]]
) -> dict[str, Any]:
    """An epoch of one loader over its ranks, and the attempts that went on with it."""
    its = audits.get((of.attempts[-1], of.loader, of.epoch), [])
    counts: Counter[str] = Counter()
    for audit in its:
        counts.update({k: int(v) for k, v in dict(audit.get("counts", {})).items()})
    shown = ("late", "repeated")  # what was left out is in the evidence
    return {
        "attempts": of.attempts,
        "name": of.loader,
        "epoch": of.epoch,
        "ranks": len(of.ranks),
        "drawn": sum(int(audit.get("drawn", 0)) for audit in its),
        "delivered": of.delivered,
        "said": of.answer.partition(": ")[2],
        "evidence": of.evidence[1:],
        "counts": [(each, counts[each]) for each in shown if counts[each]],
        "state": _state_of(of),
    }


def _state_of(of: EpochVerdict) -> str:
    if of.ok is False:
        return "wrong"
    if of.state == "running":
        return "running"
    if of.ok is None:
        return "cut off" if of.state == "cut off" else "not known"
    return "left early" if of.state == "left early" else "ok"


def _left_out(run: RunFolder, incidents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples that were left out, by what became of them and why."""
    groups: dict[tuple[str, str, str], Counter[Any]] = {}
    for each in incidents:
        key = str(each.get("what")), str(each.get("reason")), str(each["loader"])
        groups.setdefault(key, Counter())[plain_index(each.get("index"))] += 1
    most = sorted(groups.items(), key=lambda pair: -sum(pair[1].values()))
    shown = {index for _, indices in most[:_LEFT_OUT_SHOWN] for index, _ in indices.most_common(5)}
    sources = run.sources_by_loader(shown)
    return [
        {
            "what": what,
            "reason": reason[:500],
            "times": sum(indices.values()),
            "distinct": len(indices),
            "samples": [
                (index, times, bare(sources[loader].get(index, "")))
                for index, times in indices.most_common(5)
            ],
        }
        for (what, reason, loader), indices in most[:_LEFT_OUT_SHOWN]
    ]


def _failure(found: dict[str, Any]) -> dict[str, Any]:
    failure = found["failure"]
    text = str(failure.get("traceback") or "").strip()
    hint = str(failure.get("hint") or "")
    return {
        "type": str(failure.get("exception_type")),
        "message": str(failure.get("message"))[:2000],
        "phase": failure.get("phase"),
        "index": failure.get("index"),
        "place": place(found["attempt"], found["rank"], failure.get("epoch"), failure.get("batch")),
        "worker": failure.get("worker_id"),
        "loader": found["loader"],
        "time": moment(found.get("time")),
        "report": str(found.get("report") or "")[:_TEXT_MAX],
        "traceback": text[-_TEXT_MAX:],
        "hint": hint,
        "path": found["path"],
        "replay": f"python -m safeloader replay {shlex.quote(str(found['path']))} "
        "module:make_dataset",
    }


def place(attempt: int, rank: int, epoch: Any, batch: Any) -> str:
    """Where something was, in words."""
    words = [f"attempt {attempt}", f"rank {rank}"]
    words += [f"{name} {n}" for name, n in (("epoch", epoch), ("batch", batch)) if n is not None]
    return ", ".join(words)


# ── which samples, what does it cost ─────────────────────────────────────────────────────────────


def _slow(datasets: list[Dataset]) -> dict[str, Any]:
    """The slowest samples of each dataset, and the one to blame, if there is one."""
    tables = []
    for each in datasets:
        middle = each.times.quantile_ns(0.5)
        rows = [
            {
                "index": sample_name(found),
                "median_ns": found.median_ns,
                "times": found.times,
                "longest_ns": found.longest_ns,
                "factor": found.median_ns / middle if middle else 0.0,
                "source": bare(each.sources.get(found.index, "")),
            }
            for found in each.times.slowest[:_SLOW_SHOWN]
        ]
        tables.append({"dataset": each, "rows": rows, "middle_ns": middle})
    main = datasets[0] if datasets else None
    return {
        "tables": tables,
        "slow_times": SLOW,
        "blamed": None if main is None else _blamed(main),
    }


def _blamed(dataset: Dataset) -> dict[str, Any] | None:
    """The sample to look at first: one that was slow each time; else the slowest, if it stands out
    though it was fetched once."""
    middle, times = dataset.times.quantile_ns(0.5), dataset.times
    found = times.culprit
    if found is None and not times.again:
        found = next(iter(times.slowest), None)
    if found is None or not middle or found.median_ns < SLOW * middle:
        return None
    return {
        "index": sample_name(found),
        "median_ns": found.median_ns,
        "factor": found.median_ns / middle,
        "times": found.times,
        "source": bare(dataset.sources.get(found.index, "")),
    }


def _longest(waiting: Waiting) -> list[dict[str, Any]]:
    """The steps that waited longest."""
    rows = [
        (int(row[4]), int(row[3]), int(row[0]), int(row[1]), int(row[2]), each)
        for each in waiting.loaders
        for row in each.longest[:6]
    ]
    rows.sort(key=lambda row: -row[0])
    return [
        {
            "waited_ns": waited,
            "time": moment(asked / 1e9),
            "step": step,
            "place": place(each.records.attempt, each.records.rank, epoch, batch),
            "loader": each.records.name,
            "first": batch == 0,
        }
        for waited, asked, step, epoch, batch, each in rows[:6]
    ]


# ── words ────────────────────────────────────────────────────────────────────────────────────────


def _state(states: Counter[str]) -> str:
    for each in ("running", "silent", "cut off", "killed"):
        if states[each]:
            return each
    return "ended" if states else "empty"


def _joined(command: Any) -> str:
    return shlex.join(map(str, command)) if isinstance(command, list) else str(command or "")


def moment(told: Any) -> str:
    """When something was, as the clock of this machine shows it.

    Args:
        told: seconds since 1970, or the text that ``run.json`` and failures have, with its zone.

    Example:
        >>> moment(0), moment("soon"), len(moment("2026-11-28T00:45:54+0000"))
        ('', '', 19)
    """
    seconds = _seconds(told)
    if not 0 < seconds < 1e11:
        return ""
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _seconds(told: Any) -> float:
    """The same in seconds since 1970; 0 where nothing tells."""
    if isinstance(told, str):
        with contextlib.suppress(ValueError, OverflowError):
            return datetime.datetime.strptime(told, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return float(told) if isinstance(told, int | float) else 0.0


def duration(ns: float) -> str:
    """``"3.2 ms"``, ``"2 min 5 s"``."""
    if ns < 0:
        return "unknown"
    for unit, factor in (("ns", 1), ("µs", 1e3), ("ms", 1e6), ("s", 1e9)):
        value = ns / factor
        if value < 999.5 and (unit != "s" or value < 120):
            return f"{value:.3g} {unit}"
    seconds = round(ns / 1e9)
    if seconds < 7200:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def size(nbytes: float) -> str:
    """``"12.3 MiB"``."""
    if nbytes < 0:
        return "unknown"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} TiB"


def number(value: int) -> str:
    """``"1,437"``."""
    return f"{value:,}"


def share(value: float) -> str:
    """``"12%"``, and ``"0.4%"`` where that is little."""
    return f"{value:.1%}" if 0 < value < 0.0095 else f"{value:.0%}"
