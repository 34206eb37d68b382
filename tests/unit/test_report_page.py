"""What the report page is made of: fetch times, waiting, advice, words; and its command."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import safeloader
from safeloader.__main__ import main
from safeloader.commands import report
from safeloader.delivery.audit import EpochAudit
from safeloader.delivery.manifest import BatchManifest
from safeloader.failures.loader_log import LoaderLog
from safeloader.provenance.attempts import open_run
from safeloader.provenance.recorder import Recorder
from safeloader.provenance.run_folder import LoaderFolder
from safeloader.report import fetch_times as fetching
from safeloader.report.bottleneck import bottleneck_of
from safeloader.report.fetch_times import FetchTimes, fetch_times
from safeloader.report.page import moment, page_of
from safeloader.report.run import RunFolder
from safeloader.report.waiting import waiting_of

pytest.importorskip("pyarrow", reason="the run's batches are kept with pyarrow")
needs_page = pytest.mark.skipif(
    importlib.util.find_spec("plotly") is None or importlib.util.find_spec("jinja2") is None,
    reason="the page needs the extra `report`",
)

MS = 1_000_000
Fetch = tuple[int, int]  # index, ns


def run_of(
    path: Path,
    epochs: list[list[list[Fetch]]],
    *,
    wait_ms: int = 0,
    step_ms: int = 10,
    workers: int = 1,
    collate_ms: int = 0,
    rank: int = 0,
    pid_of_epoch: bool = False,
    cores: int = 64,
) -> RunFolder:
    """A run whose batches took what is said: the loop computes, then waits, for each."""
    log = LoaderLog(range(100), kind="SafeDataLoader")
    folder = LoaderFolder(open_run(path, ["made"], rank), rank, "train.py:3", log)
    about = folder.path / "loader.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"cores": cores}))
    folder.taken_by(Recorder(), log, lambda index: f"<i>{index}</i>.jpg")
    assert folder.batches is not None
    now = 10**9
    for epoch, batches in enumerate(epochs):
        folder.begun(epoch, lambda: EpochAudit(0))
        for batch, fetches in enumerate(batches):
            indices = np.array([index for index, _ in fetches], np.int64).tobytes()
            spans = [now, *(took for _, took in fetches), collate_ms * MS]
            stamps = np.cumsum(np.array(spans, np.int64)).tobytes()
            worker = batch % workers if workers else None
            pid = 100 + (worker or 0) + 10 * epoch * pid_of_epoch
            made = BatchManifest(batch, worker, pid, indices, len(fetches), None, stamps)
            now += step_ms * MS
            folder.batches.delivered(epoch, batch, wait_ms * MS, made, now)
            now += wait_ms * MS
        folder.audited(EpochAudit(epoch, complete=True, drawn=sum(map(len, batches))))
    folder.close()
    return RunFolder(path)


def times_of(run: RunFolder, most: int = 10, *, stream: bool = False) -> FetchTimes:
    return fetch_times(run.loaders, 10, most, stream=stream)


# ── which samples ────────────────────────────────────────────────────────────────────────────────


def epoch_of(times_ns: dict[int, int], size: int = 4) -> list[list[Fetch]]:
    rows = list(times_ns.items())
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def test_samples_go_by_their_median_and_the_culprit_was_slow_each_time(tmp_path: Path) -> None:
    usual = dict.fromkeys(range(40), MS)
    epochs = [epoch_of(usual | {7: 50 * MS, 9: 900 * MS * (k == 1)}) for k in range(3)]
    found = times_of(run_of(tmp_path, epochs))
    assert found.slowest[0].index == 7
    assert found.slowest[0].median_ns == pytest.approx(50 * MS, rel=0.01)
    assert found.slowest[0].times == 3
    assert found.culprit is not None
    assert found.culprit.index == 7
    assert found.longest_ns == pytest.approx(900 * MS, rel=0.01)
    assert (found.samples, found.distinct, found.again, found.slow) == (120, 40, 40, 1)
    assert found.quantile_ns(0.5) == pytest.approx(MS, rel=0.07)


def test_one_that_was_slow_once_is_no_culprit(tmp_path: Path) -> None:
    usual = dict.fromkeys(range(40), MS)
    found = times_of(run_of(tmp_path, [epoch_of(usual | {5: 80 * MS}), epoch_of(usual)]))
    assert found.slowest[0].index == 5  # by median
    assert found.culprit is None


def test_several_passes_find_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    epochs = [
        epoch_of({int(k): int(rng.integers(1, 10**7)) for k in rng.permutation(97)})
        for _ in range(4)
    ]
    run = run_of(tmp_path, epochs)
    whole = fetch_times(run.loaders, 4 * 97, 15)
    monkeypatch.setattr(fetching, "_HELD_MAX", 50)
    parts = fetch_times(run.loaders, 4 * 97, 15)
    assert parts.slowest == whole.slowest
    assert (parts.samples, parts.distinct) == (whole.samples, whole.distinct) == (388, 97)
    exact: dict[int, list[int]] = {}
    for index, took in (pair for epoch in epochs for batch in epoch for pair in batch):
        exact.setdefault(index, []).append(took)
    medians = sorted((float(np.median(took)) for took in exact.values()), reverse=True)
    assert [each.median_ns for each in whole.slowest] == pytest.approx(medians[:15], rel=0.01)


def test_indices_that_are_texts_keep_their_names(tmp_path: Path) -> None:
    from safeloader import SafeDataLoader

    data = {"a": 1, "b": 2, "c": 3}

    class Named:
        def __getitem__(self, index: str) -> int:
            return data[index]

        def __len__(self) -> int:
            return 3

    loader: Any = SafeDataLoader(Named(), sampler=list(data), run_dir=tmp_path)  # type: ignore[arg-type]
    assert len([*loader, *loader]) == 6
    found = times_of(RunFolder(tmp_path))
    assert {(each.index, each.times) for each in found.slowest} == {("a", 2), ("b", 2), ("c", 2)}


def test_of_a_stream_worker_and_ordinal_are_told(tmp_path: Path) -> None:
    found = times_of(
        run_of(tmp_path, [[[(0, MS), (1, 9 * MS)], [(0, 7 * MS), (1, 2 * MS)]]], workers=2),
        stream=True,
    )
    assert [(each.worker, each.index) for each in found.slowest] == [(0, 1), (1, 0), (1, 1), (0, 0)]


# ── is data the bottleneck ───────────────────────────────────────────────────────────────────────


def advice(run: RunFolder) -> tuple[float, int, str]:
    found = bottleneck_of("x", waiting_of(run).loaders, times_of(run))
    return found.share, found.level, "\n".join(found.advice)


def steady(batches: int, fetch_ms: int, epochs: int = 1) -> list[list[list[Fetch]]]:
    return [[[(k, fetch_ms * MS)] for k in range(batches)] for _ in range(epochs)]


def test_the_share_of_waiting_is_of_steps_within_epochs(tmp_path: Path) -> None:
    run = run_of(tmp_path, steady(101, 1, epochs=2), wait_ms=10, step_ms=30)
    (found,) = waiting_of(run).loaders
    assert (found.batches, found.samples, found.workers) == (202, 202, 1)
    assert found.waited_ns == 202 * 10 * MS
    assert found.computed_ns == 200 * 30 * MS  # what lies before an epoch is no step of it
    assert found.first_waits_ns == 2 * 10 * MS
    assert found.waited.sum() == found.waited_ns
    assert found.computed.sum() == found.computed_ns
    assert found.by_epoch == {0: 101, 1: 101}


def test_where_nothing_waits_there_is_nothing_to_change(tmp_path: Path) -> None:
    assert advice(run_of(tmp_path, steady(100, 5))) == (0.0, 0, "")


def test_without_workers_it_is_said_how_many_would_keep_up(tmp_path: Path) -> None:
    share, level, said = advice(
        run_of(tmp_path, steady(100, 20), wait_ms=20, step_ms=10, workers=0)
    )
    assert share == pytest.approx(2 / 3, rel=0.02)
    assert level == 2
    assert said.startswith("num_workers=3: the main process makes the batches itself")
    assert "up to 3.0 times as fast" in said


def test_busy_workers_are_too_few(tmp_path: Path) -> None:
    _, level, said = advice(run_of(tmp_path, steady(200, 30), wait_ms=20, step_ms=10))
    assert level == 2
    assert "num_workers=4 instead of 1: the workers are busy 100% of their time" in said
    assert "up to 3.0 times as fast" in said


def test_no_more_workers_are_advised_than_there_are_cores(tmp_path: Path) -> None:
    slow = steady(100, 20)
    _, _, said = advice(run_of(tmp_path / "main", slow, wait_ms=20, step_ms=1, workers=0, cores=4))
    assert said.startswith("num_workers=4: ")
    assert "up to 4.2 times as fast" in said
    assert "it would take 23, and there are 4 cores: make a sample cheaper" in said
    _, _, said = advice(run_of(tmp_path / "full", slow, wait_ms=20, step_ms=1, cores=1))
    assert said.startswith("Make a sample cheaper to fetch: the workers are busy")
    assert "num_workers" not in said
    for rank in range(2):
        run = run_of(tmp_path / "two", slow, wait_ms=20, step_ms=1, workers=0, cores=4, rank=rank)
    assert advice(run)[2].startswith("num_workers=2: ")


def test_workers_that_are_started_for_each_epoch_should_stay(tmp_path: Path) -> None:
    epochs = steady(1, 1, epochs=6)
    _, _, said = advice(run_of(tmp_path / "a", epochs, wait_ms=50, pid_of_epoch=True))
    assert "persistent_workers=True: 100% of the waiting is for the first batch" in said
    _, _, said = advice(run_of(tmp_path / "b", epochs, wait_ms=50))
    assert "persistent_workers" not in said


def test_few_samples_that_take_the_time_are_named_as_the_cause(tmp_path: Path) -> None:
    epoch = [[(k, 400 * MS if k == 17 else MS)] for k in range(100)]
    _, _, said = advice(run_of(tmp_path, [epoch, epoch], wait_ms=20))
    assert "80% of the time to fetch goes into 1 of 100 samples" in said
    assert "Without them fetching takes 80% less" in said


def test_collating_that_takes_the_time_is_named(tmp_path: Path) -> None:
    _, _, said = advice(run_of(tmp_path, steady(50, 5), wait_ms=20, collate_ms=15))
    assert "75% of the workers' work is collating" in said


# ── the page and its command ─────────────────────────────────────────────────────────────────────


@needs_page
def test_what_comes_from_the_run_is_escaped(tmp_path: Path) -> None:
    run_of(tmp_path / "<b>run", steady(4, 1))
    folder = RunFolder(tmp_path / "<b>run").loaders[0].path
    evil = {"epoch": 0, "batch": 0, "position": 0, "index": "</script><script>x()</script>"}
    evil |= {"what": "skipped", "reason": "<img src=x>"}
    (folder / "incidents.jsonl").write_text(json.dumps(evil) + "\n")
    page = tmp_path / "page.html"
    assert report.main([str(tmp_path / "<b>run"), "-o", str(page)]) == 0
    whole = page.read_text("utf-8")
    for word in ("<b>run", "</script><script>", "<img src", "<i>0</i>"):
        assert word not in whole
    assert "&lt;img src=x&gt;" in whole
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["<b>run", "page.html"]


@needs_page
def test_indices_of_any_kind_and_lines_that_lack_something_are_shown(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", steady(4, 1))
    folder = run.loaders[0].path
    odd: list[Any] = [[3, 17], "name", None, 1.5, {"a": 1}]
    lines = [
        {"what": "skipped", "reason": f"reason {k}", "index": each} for k, each in enumerate(odd)
    ]
    torn = '{"what": "skip'
    (folder / "incidents.jsonl").write_text("".join(json.dumps(k) + "\n" for k in lines) + torn)
    (folder / "failures").mkdir()
    for k, each in enumerate(odd):
        failure = {"exception_type": "KeyError", "message": f"failed {k}", "index": each}
        whole = json.dumps({"failure": failure, "time": None})
        (folder / "failures" / f"failure-{k}.json").write_text(whole)
    (folder / "failures" / "torn.json").write_text('{"failure": {"index"')
    page = tmp_path / "page.html"
    assert report.main([str(tmp_path / "run"), "-o", str(page)]) == 0
    whole = page.read_text("utf-8")
    assert all(f"reason {k}" in whole and f"failed {k}" in whole for k in range(len(odd)))
    assert "[3, 17]" in whole
    assert "torn.json cannot be read" in whole


@needs_page
def test_it_says_when_the_run_began_and_when_what_failed(tmp_path: Path) -> None:
    earlier, later = "2026-03-01T12:00:00+0100", "2026-03-01T11:30:00+0000"
    for rank, time in ((0, later), (1, earlier)):
        run = run_of(tmp_path / "run", steady(4, 1), rank=rank)
        folder = run.loaders[-1].path / "failures"
        folder.mkdir()
        failure = {"exception_type": "KeyError", "message": f"failed on {rank}", "index": 3}
        (folder / "failure-0.json").write_text(json.dumps({"failure": failure, "time": time}))
    whole = page_of(RunFolder(tmp_path / "run"))
    shown = [moment(each) for each in (run.info["started"], later, earlier)]
    assert all(len(each) == 19 and each in whole for each in shown)
    assert f"began {shown[0]}" in whole
    newest, oldest = (whole.index(f"failed on {rank}") for rank in (0, 1))
    assert newest < oldest


@needs_page
def test_an_empty_run_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_run(tmp_path / "run", ["made"], 0)
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'a.html'} (")
    assert "nothing written yet" in (tmp_path / "a.html").read_text("utf-8")


def test_what_is_no_run_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    if importlib.util.find_spec("plotly") is not None:
        assert "is no folder of a run" in said


@needs_page
def test_a_page_that_cannot_be_written_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of(tmp_path / "run", steady(2, 1))
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "no" / "a.html")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m safeloader report: ")
    assert said.count("\n") == 1


def test_the_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--help"]) == 0
    assert "python -m safeloader report runs/exp1 -o exp1.html" in capsys.readouterr().out


@pytest.mark.parametrize("lacking", ["plotly", "jinja2"])
def test_a_library_that_is_missing_is_named_with_what_to_install(
    lacking: str, tmp_path: Path
) -> None:
    program = f"""
import importlib.util, sys
there = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {lacking!r} else there(name, *rest)
from safeloader.__main__ import main
sys.exit(main(["report", sys.argv[1]]))
"""
    path = os.pathsep.join([str(Path(safeloader.__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 2
    assert lacking in done.stderr
    assert "pip install 'safeloader[report]'" in done.stderr
    assert done.stderr.count("\n") == 1
