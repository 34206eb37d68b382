"""What the search of the report page looks in: columns for its script. Runs in: main."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from safeloader.report.datasets import SLOWEST, Dataset, bare, plain_index, sample_name
from safeloader.report.folder import LoaderRecords
from safeloader.report.run import RunFolder
from safeloader.report.waiting import LoaderWaiting, Waiting

_INCIDENTS_MAX, _FAILURES_MAX = 20_000, 5_000  # the newest
_TEXT_MAX = 160  # of a source or a reason

_Sources = dict[str, dict[Any, str]]  # by the name of the loader, and the index


def searched(
    run: RunFolder,
    waiting: Waiting,
    datasets: list[Dataset],
    failures: list[dict[str, Any]],
    incidents: list[dict[str, Any]],
) -> dict[str, Any]:
    """What failed, was left out, or is slow, and when each step was.

    Names of loaders, reasons and sources stand in ``texts`` once each, and elsewhere by number.
    """
    texts = _Texts()
    kept, broken = incidents[-_INCIDENTS_MAX:], failures[-_FAILURES_MAX:]
    gone = {plain_index(each.get("index")) for each in kept}
    gone |= {plain_index(each["failure"].get("index")) for each in broken}
    sources = run.sources_by_loader(gone - {None})
    return {
        "failed": [_failed(each, sources, texts) for each in broken],
        "left_out": [_left_out(each, sources, texts) for each in kept],
        "slow": _slow(datasets, texts),
        "loaders": [_steps(each, texts) for each in waiting.loaders],
        "offset_s": time.localtime().tm_gmtoff,
        "more": {
            "left_out": len(incidents) - len(kept),
            "failed": len(failures) - len(broken),
        },
        "texts": texts.all,
    }


class _Texts:
    """Texts by number."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._known: dict[str, int] = {}

    def __call__(self, text: Any) -> int:
        cut = str(text or "")[:_TEXT_MAX]
        if cut not in self._known:
            self._known[cut] = len(self.all)
            self.all.append(cut)
        return self._known[cut]


def _of(sources: _Sources, loader: str, index: Any) -> str:
    return bare(sources[loader].get(index, "")) if isinstance(index, int | str) else ""


def _failed(found: dict[str, Any], sources: _Sources, texts: _Texts) -> list[Any]:
    failure = found["failure"]
    said = f"{failure.get('exception_type')}: {failure.get('message')}"
    where = [failure.get(name) for name in ("epoch", "batch", "position")]
    index = plain_index(failure.get("index"))
    numbers = (
        texts(said),
        texts(_of(sources, found["loader"], failure.get("index"))),
        texts(found["loader"]),
    )
    return [index, found["attempt"], found["rank"], *where, *numbers]


def _left_out(found: dict[str, Any], sources: _Sources, texts: _Texts) -> list[Any]:
    where = [found.get(name) for name in ("epoch", "batch", "position")]
    index = found.get("index")
    numbers = (
        texts(found.get("reason")),
        texts(_of(sources, found["loader"], index)),
        texts(found["loader"]),
    )
    return [
        plain_index(index),
        found["attempt"],
        found["rank"],
        *where,
        *numbers,
        found.get("what"),
    ]


def _slow(datasets: list[Dataset], texts: _Texts) -> list[list[Any]]:
    whole = [(each.median_ns, each, its) for its in datasets for each in its.times.slowest]
    whole.sort(key=lambda row: -row[0])
    return [
        [
            found.index if found.worker is None else sample_name(found),
            round(found.median_ns / 1e3, 1),
            round(found.longest_ns / 1e3, 1),
            found.times,
            texts(bare(its.sources.get(found.index, ""))),
            texts(its.name),
        ]
        for _, found, its in whole[:SLOWEST]
    ]


def _steps(told: LoaderWaiting, texts: _Texts) -> dict[str, Any]:
    """The moments of a loader's steps, as columns; by the program's own numbers where it has them.

    Moments are in seconds from the first, waits in ms.
    """
    rows = told.steps
    steps = _marked(told.records, rows) if told.records.has_marks else rows[:, 0]
    rows, steps = rows[steps >= 0], steps[steps >= 0]
    return {
        "loader": texts(told.records.name),
        "attempt": told.records.attempt,
        "rank": told.records.rank,
        "first_s": told.first_ns / 1e9,
        "step": steps.tolist(),
        "epoch": rows[:, 1].tolist(),
        "batch": rows[:, 2].tolist(),
        "at": np.round((rows[:, 3] - told.first_ns) / 1e9, 2).tolist(),
        "wait": np.round(rows[:, 4] / 1e6, 1).tolist(),
    }


def _marked(records: LoaderRecords, rows: Any) -> Any:
    """The optimizer's steps that batches belong to; -1 where no mark tells."""
    marks = records.marks()
    columns = [marks[name].to_numpy().astype(np.int64) for name in ("epoch", "batch", "step")]
    keys, steps = (columns[0] << 32) | columns[1], columns[2]
    order = np.argsort(keys, kind="stable")
    keys, steps = keys[order], steps[order]
    wanted = (rows[:, 1] << 32) | rows[:, 2]
    at = np.minimum(np.searchsorted(keys, wanted), max(0, len(keys) - 1))
    if not len(keys):
        return np.full(len(rows), -1)
    return np.where(keys[at] == wanted, steps[at], -1)
