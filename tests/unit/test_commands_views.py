"""The commands over a run: their words, their JSON, their exit status, and what they refuse."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch.utils.data import IterableDataset, get_worker_info

pytest.importorskip("typer")
pytest.importorskip("rich")

from rich.console import Console

from safeloader import __main__
from safeloader.commands import terminal
from safeloader.commands.step import _why_unknown
from safeloader.commands.watch import _besides, _stuck, _table
from safeloader.provenance.run_format import SOURCES_STREAM
from safeloader.report.figures import figures_of, slowest
from safeloader.report.run import RunFolder
from tests.run_folders import Numbers, by_ranks, loader_of, new_process, share

Said = Callable[..., tuple[int, str, str]]
OVER_A_RUN = ("show", "watch", "step", "index", "audit", "trace")


pytestmark = pytest.mark.usefixtures("of_new_processes")


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    def run(*words: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        status = __main__.main([*map(str, words)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture
def of_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two ranks, two epochs; steps are marked from 100 on, and index 7 is skipped."""
    run = tmp_path / "run"

    def train(rank: int) -> None:
        data = Numbers(24, bad=(7,))
        sampler = share(data, rank, 2, shuffle=False)
        loader = loader_of(data, run, 4, sampler=sampler, on_error="skip")
        step = 100
        for _ in range(2):
            for _ in loader:
                loader.mark(step)
                step += 1

    by_ranks(monkeypatch, 2, train)
    return run


# ── help, bad input ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", [*OVER_A_RUN, "replay"])
def test_help_has_an_example(command: str, said: Said) -> None:
    status, out, _ = said(command, "--help")
    assert f"python -m safeloader {command}" in " ".join(out.split())
    assert "Example:" in out
    assert status == 0


@pytest.mark.parametrize("command", OVER_A_RUN)
def test_what_is_no_run_is_refused_in_a_sentence(command: str, tmp_path: Path, said: Said) -> None:
    more = {"step": ["1"], "index": ["1"]}.get(command, [])
    status, out, err = said(command, tmp_path / "none", *more)
    assert (status, out) == (2, "")
    assert err.startswith(
        f"python -m safeloader {command}: {tmp_path / 'none'} is no folder of a run"
    )
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["show"], "Missing argument 'RUN'"),
        (["step", "RUN", "x"], "Invalid value for 'N'"),
        (["audit", "RUN", "--no-such"], "--no-such"),
        (["audit", "RUN", "--attempt", "7"], "there is no attempt 7 in"),
        (["shwo", "RUN"], "there is no command 'shwo' (did you mean show?)"),
    ],
)
def test_words_that_are_wrong(words: list[str], told: str, of_two_ranks: Path, said: Said) -> None:
    status, out, err = said(*(str(of_two_ranks) if each == "RUN" else each for each in words))
    assert (status, out) == (2, "")
    assert told in err.splitlines()[0]
    assert "Traceback" not in err


def test_a_folder_of_runs_names_them(of_two_ranks: Path, said: Said) -> None:
    status, _, err = said("show", of_two_ranks.parent)
    assert status == 2
    assert f"there are runs in it: {of_two_ranks}" in err


@pytest.mark.parametrize("missing", ["typer", "rich", "pyarrow"])
def test_what_is_missing_is_named(
    missing: str, of_two_ranks: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    status, out, err = said("audit", of_two_ranks)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert missing in err
    assert "pip install 'safeloader[" in err


def test_the_words_of_a_shell_are_completed(
    said: Said, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_SAFELOADER_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "safeloader st")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit):
        sys.exit(__main__.main([], "safeloader"))
    assert capsys.readouterr().out.split() == ["step"]


# ── show ─────────────────────────────────────────────────────────────────────────────────────────


def test_show_answers_first(of_two_ranks: Path, said: Said) -> None:
    status, out, _ = said("show", of_two_ranks)
    first = out.splitlines()[0]
    assert first.startswith(
        "exactly once: yes, in all 2 epochs that are over; 2 left out as was asked for; 2 skipped"
    )
    assert "dataset.files[7] = '7.png'" in out
    assert "bad file 7.png" in out
    assert "Slowest samples" in out
    assert out.rstrip().splitlines()[-1].startswith("next: python -m safeloader replay ")
    assert status == 0


def test_what_is_cured_in_the_newest_attempt(
    tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: int) -> None:
        with pytest.raises(ValueError, match="bad file"):
            list(loader_of(Numbers(bad=(9,)), tmp_path))

    by_ranks(monkeypatch, 1, fails)
    assert (
        said("show", tmp_path)[1].splitlines()[-1].startswith("next: python -m safeloader replay")
    )
    by_ranks(monkeypatch, 1, lambda _: list(loader_of(Numbers(), tmp_path)), 1)
    out = said("show", tmp_path)[1].splitlines()
    assert out[0].startswith("exactly once: NO")
    assert out[-1].startswith(f"next: python -m safeloader show {tmp_path} --attempt 1 looks at")
    wrong = next(at for at, line in enumerate(out) if "NOT OK" in line)
    assert out[wrong + 1 : wrong + 3] == ["      8 samples delivered", "      rank 0: 4 failed"]
    alone = said("show", tmp_path, "--attempt", 1)[1].splitlines()
    assert alone[0].startswith("exactly once: yes")
    assert "--attempt" not in alone[-1]


def test_show_as_json(of_two_ranks: Path, said: Said) -> None:
    _, out, _ = said("show", of_two_ranks, "--json", "--slowest", 3)
    told = json.loads(out)
    assert [each["samples"] for each in told["loaders"]] == [24, 22]
    assert [each["index"] for each in told["incidents"]] == [7, 7]
    assert (len(told["failures"]), len(told["survived"])) == (0, 2)
    assert told["audit"]["ok"] is True
    assert len(told["slowest"]) == 3
    assert told["ranks"] == [0, 1]


def test_show_leaves_out_what_lies_between_epochs(tmp_path: Path, said: Said) -> None:
    """Validation, say: no loader of the run is asked for anything then, or another is."""
    loader = loader_of(Numbers(40), tmp_path, 10)
    list(loader)
    time.sleep(0.2)
    list(loader)
    (its,) = json.loads(said("show", tmp_path, "--json")[1])["loaders"]
    batches = RunFolder(tmp_path).batches()
    times = [(each["asked_ns"], each["wait_ns"]) for each in batches.to_pylist()]
    whole_s = (times[-1][0] + times[-1][1] - times[0][0]) / 1e9
    assert (its["batches"], its["samples"], its["epoch"]) == (8, 80, 1)
    assert its["wait_s"] == pytest.approx(sum(wait for _, wait in times) / 1e9)
    assert its["span_s"] <= whole_s - 0.2
    assert its["wait_share"] == pytest.approx(its["wait_s"] / its["span_s"])


def test_a_sample_that_failed_is_fetched_again_in_the_program_of_the_run() -> None:
    def told(*command: str) -> str:
        run: Any = SimpleNamespace(info={"command": command})
        return terminal.replaying(run, "runs/a b/1.json").split(" fetches ")[0]

    first = "python -m safeloader replay 'runs/a b/1.json' "
    assert told("python", "mine/train.py", "--x", "a.py") == f"{first}mine/train.py:make_dataset"
    assert told("python", "-m", "mine") == told() == f"{first}train.py:make_dataset"


def test_figures_are_those_of_the_records(tmp_path: Path) -> None:
    loader = loader_of(Numbers(100), tmp_path, 10)
    list(loader)
    found = figures_of(RunFolder(tmp_path).loaders[0])
    records = [loader.provenance.batch(k) for k in range(10)]
    assert (found.batches, found.samples, found.epoch, found.state) == (10, 100, 0, "running")
    assert found.wait_s == pytest.approx(sum(each.wait_ns for each in records) / 1e9)
    assert found.span_s >= found.wait_s
    assert found.wait_share == pytest.approx(found.wait_s / found.span_s)


def test_the_slowest_are_by_the_median_of_all_fetches(tmp_path: Path) -> None:
    loader = loader_of(Numbers(200), tmp_path, 10, shuffle=True)
    for _ in range(3):
        list(loader)
    table = loader.provenance.to_numpy()
    times: dict[int, list[int]] = {}
    for index, fetch_ns in zip(table["index"].tolist(), table["fetch_ns"].tolist(), strict=True):
        times.setdefault(index, []).append(fetch_ns)
    expected = max(float(np.median(its)) for its in times.values())
    found = slowest(RunFolder(tmp_path).loaders, 5)
    assert found[0].median_ns == pytest.approx(expected, rel=0.01)
    assert [each.fetches for each in found] == [3] * 5
    assert found[0].source == f"dataset.files[{found[0].index}] = '{found[0].index}.png'"


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        assert info is not None
        for k in range(8):
            if (info.id, k) == (1, 5):
                time.sleep(0.05)
            yield k


def test_the_slowest_of_a_stream_are_of_a_worker_each(tmp_path: Path) -> None:
    loader = loader_of(Stream(), tmp_path, 4, num_workers=2)
    for number, _ in enumerate(loader):
        if number == 3:
            break  # before it is known by an audit
    found = slowest(RunFolder(tmp_path).loaders, 20)
    assert found[0].index == "5 of worker 1, rank 0"
    assert {each.fetches for each in found} == {1}
    assert len(found) == 16


# ── step, index ──────────────────────────────────────────────────────────────────────────────────


def test_a_step_on_all_ranks(of_two_ranks: Path, said: Said) -> None:
    status, out, _ = said("step", of_two_ranks, 100)
    assert out.startswith("step 100: 7 samples in 2 batches on 2 ranks")
    assert "sources are kept" not in out  # all are known
    assert "attempt 0, rank 1, epoch 0, batch 0, by main" in out
    assert status == 0
    _, out, _ = said("step", of_two_ranks, 104, "--json")
    assert [(each["rank"], each["epoch"], each["indices"]) for each in json.loads(out)] == [
        (0, 1, [8, 10, 12, 14]),
        (1, 1, [9, 11, 13, 15]),
    ]


def test_a_step_that_is_not_there(of_two_ranks: Path, said: Said) -> None:
    status, out, _ = said("step", of_two_ranks, 5)
    assert out.startswith("step 5: no batch of it is in")
    assert out.count("marked steps 100 to 105") == 2
    assert status == 1


def test_without_marks_a_step_is_a_batch(tmp_path: Path, said: Said) -> None:
    list(loader_of(Numbers(), tmp_path))
    _, out, _ = said("step", tmp_path, 2)
    assert "8" in out
    assert "no steps were marked" in out
    assert "sources are kept" not in out
    assert said("step", tmp_path, 5)[1].splitlines()[1].endswith("batches 0 to 4")


def test_a_step_says_why_sources_are_not_known(tmp_path: Path, said: Said) -> None:
    list(loader_of(Numbers(8000), tmp_path, 1000))
    assert "run_sources=True (--run-sources) keeps all" in said("step", tmp_path, 7)[1]
    ours: Any = SimpleNamespace(loaders=[SimpleNamespace(path=tmp_path)])
    (tmp_path / SOURCES_STREAM).touch()
    assert "has not come to some of these" in _why_unknown(ours)


def test_a_step_of_two_attempts(tmp_path: Path, said: Said, monkeypatch: Any) -> None:
    for attempt in range(2):
        by_ranks(monkeypatch, 1, lambda _: list(loader_of(Numbers(), tmp_path)), attempt)
    out = said("step", tmp_path, 2)[1]
    assert out.startswith("step 2: 8 samples in 2 batches on 1 rank, in attempts 0, 1")
    assert "--attempt 1 shows the newest attempt alone" in out
    assert "newest attempt" not in said("step", tmp_path, 2, "--attempt", 0)[1]


def test_an_index(of_two_ranks: Path, said: Said) -> None:
    status, out, _ = said("index", of_two_ranks, 7)
    assert out.startswith("index 7: skipped 2 times\n  source: dataset.files[7] = '7.png'")
    assert "next: python -m safeloader replay" in out
    assert status == 0
    _, out, _ = said("index", of_two_ranks, 9, "--json")
    seen = json.loads(out)["seen"]
    assert [(each["what"], each["rank"], each["epoch"], each["batch"]) for each in seen] == [
        ("delivered", 1, 0, 1),
        ("delivered", 1, 1, 1),
    ]


def test_training_and_validation_have_samples_of_their_own(tmp_path: Path, said: Said) -> None:
    class Validation(Numbers):
        def __init__(self) -> None:
            super().__init__(12, bad=(7,))
            self.files = [f"val/{each}" for each in self.files]

    for data in (Numbers(bad=(7,)), Validation()):
        list(loader_of(data, tmp_path, on_error="skip"))
    lines = said("show", tmp_path)[1].splitlines()
    rows = [line.split() for line in lines if line.startswith("skipped ")]
    assert [(row[1], row[8]) for row in rows] == [("7", "'7.png'"), ("7", "'val/7.png'")]
    out = said("index", tmp_path, 7)[1]
    assert out.splitlines()[1].endswith(": dataset.files[7] = '7.png'")
    assert out.splitlines()[2].endswith(": dataset.files[7] = 'val/7.png'")
    assert "ValueError: bad file val/7.png (SafeDataLoader over " in out
    told = json.loads(said("index", tmp_path, 7, "--json")[1])
    assert sorted(told["sources"].values()) == [
        "dataset.files[7] = '7.png'",
        "dataset.files[7] = 'val/7.png'",
    ]


def test_next_is_not_to_replay_what_has_no_index(tmp_path: Path, said: Said) -> None:
    class Ragged(Numbers):
        def __getitem__(self, index: int) -> Any:
            return np.zeros(index)

    with pytest.raises(RuntimeError, match="equal size"):
        list(loader_of(Ragged(), tmp_path))
    out = said("show", tmp_path)[1]
    assert "(4 samples of a batch, attempt 0, rank 0, epoch 0, batch 0)" in out
    assert out.splitlines()[-1] == "next: mend the sample, or have collate_fn= take it"


def test_an_index_that_never_came(of_two_ranks: Path, said: Said) -> None:
    status, out, _ = said("index", of_two_ranks, "abc")
    assert out.startswith("index abc: nowhere in")
    assert "looked for in what SafeDataLoader over Numbers (24)" in out
    assert status == 1


def test_an_index_whose_error_was_raised_names_its_file(tmp_path: Path, said: Said) -> None:
    with pytest.raises(ValueError, match="bad file"):
        list(loader_of(Numbers(bad=(9,)), tmp_path))
    _, out, _ = said("index", tmp_path, 9)
    (path,) = tmp_path.rglob("failures/*.json")
    assert out.startswith("index 9: failed once")
    assert out.splitlines()[-1].startswith(f"next: python -m safeloader replay {path}")
    out = said("show", tmp_path)[1]
    told = out.splitlines().index(f"    {path}")
    assert out.splitlines()[told + 1] == "    dataset.files[9] = '9.png'"
    assert "safeloader.replay(" not in out


# ── watch ────────────────────────────────────────────────────────────────────────────────────────


def test_watch_of_a_run_that_goes_on(tmp_path: Path, said: Said) -> None:
    loader = loader_of(Numbers(bad=(3,)), tmp_path, on_error="skip")
    iterator = iter(loader)
    next(iterator)
    next(iterator)
    status, out, _ = said("watch", tmp_path, "--once", "--json")
    (its,) = json.loads(out)["loaders"]
    assert (its["state"], its["samples"], its["skipped"], its["epoch"]) == ("running", 7, 1, 0)
    assert its["samples_per_s"] > 0
    assert status == 0
    status, out, _ = said("watch", tmp_path)  # no terminal: one look
    assert "1 loader running" in out.splitlines()[0]
    assert status == 0


def test_watch_says_where_no_batch_comes(
    tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterator = iter(loader_of(Numbers(), tmp_path))
    next(iterator)
    later = SimpleNamespace(
        time=lambda: time.time() + 100, time_ns=lambda: time.time_ns() + 100_000_000_000
    )
    monkeypatch.setattr("safeloader.commands.watch.time", later)
    status, out, _ = said("watch", tmp_path)
    assert "1 loader running, no batch on rank 0 for 100 s: Safe" in out.splitlines()[0]
    assert "stall_after=" in out.splitlines()[-1]
    assert status == 0
    assert "no batch on rank" not in said("watch", tmp_path, "--window", 1000)[1]


def test_a_rank_waits_only_if_none_of_its_loaders_gives_batches() -> None:
    def its(rank: int, quiet_s: float | None, loader: str = "a") -> dict[str, Any]:
        return {"rank": rank, "quiet_s": quiet_s, "loader": loader, "handed_over": 9}

    trains, validates = its(0, 2.0), its(0, 500.0, "b")
    assert _stuck([trains, validates, its(1, None)], 30) == ""
    assert _stuck([trains, validates, its(1, 40.0)], 30) == "no batch on rank 1 for 40 s"
    assert _stuck([trains, its(1, 90.0), its(2, 40.0)], 30) == "no batch on ranks 1, 2 for 40 s"
    assert _stuck([], 30) == ""


def test_a_line_a_rank_fits_a_terminal_of_80_columns() -> None:
    row = {
        "rank": 1023,
        "state": "running",
        "epoch": 999,
        "samples_per_s": 1_234_567.0,
        "wait_share": 1.0,
        "memory_bytes": {"main": 12_340_000_000, "workers": 99_990_000_000},
        "quiet_s": 7100.0,
        "loader": "a",
        **dict.fromkeys(("skipped", "replaced", "failed"), 0),
    }
    written = io.StringIO()
    Console(file=written, width=80).print(_table([row]))
    told = written.getvalue().splitlines()[-1]
    assert " ".join(told.split()) == (
        "1023 running 999 1,234,567 100% 12.34 GB 99.99 GB 118 min ago"
    )


def test_what_was_left_out_is_told_below() -> None:
    none = dict.fromkeys(("skipped", "replaced", "failed"), 0)
    look = [{"rank": rank} | none | {"skipped": rank} for rank in range(12)]
    look[2]["failed"] = 1
    told = _besides(look)
    assert told[:2] == ["rank 1: 1 skipped", "rank 2: 2 skipped, 1 failed"]
    assert told[-1] == "and so on, 3 more ranks"
    assert _besides(look[:1]) == []


def test_what_is_to_be_copied_is_not_broken() -> None:
    written = io.StringIO()
    out = Console(file=written, width=30)
    path = "runs/exp1/attempt=0/" + 5 * "a-long-folder/" + "failure.json"
    terminal.lines(out, [path])
    terminal.next_step(out, path)
    terminal.answer(out, True, path)
    assert written.getvalue().splitlines() == [f"  {path}", f"next: {path}", path]


def test_of_ranks_that_wait_for_each_other_the_one_behind_is_named() -> None:
    look = [
        {"rank": rank, "quiet_s": 60.0, "loader": "a", "handed_over": 27 if rank == 7 else 28}
        for rank in range(10)
    ]
    assert _stuck(look, 30) == (
        "no batch on ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more for 60 s; "
        "rank 7 had 27 batches, others 28"
    )


def test_watch_ends_with_the_run(of_two_ranks: Path, said: Said) -> None:
    status, out, _ = said("watch", of_two_ranks, "--json")
    assert [each["state"] for each in json.loads(out)["loaders"]] == ["ended", "ended"]
    assert status == 0
    out = said("watch", of_two_ranks)[1]
    assert "nothing runs, 2 ended: SafeDataLoader over Numbers (24)" in out
    assert [line.split()[0] for line in out.splitlines() if " ended " in line] == ["0", "1"]
    assert "next: python -m safeloader show" in out


# ── trace ────────────────────────────────────────────────────────────────────────────────────────


def test_a_trace(of_two_ranks: Path, tmp_path: Path, said: Said) -> None:
    target = tmp_path / "t.json.gz"
    status, out, _ = said("trace", of_two_ranks, "-o", target)
    events = json.loads(gzip.decompress(target.read_bytes()))
    assert status == 0
    assert out.startswith(f"{len(events)} events in {target}")
    kinds = Counter(each.get("cat", each["ph"]) for each in events)
    assert (kinds["sample"], kinds["wait"], kinds["collate"], kinds["batch"]) == (46, 12, 12, 24)
    assert kinds["step"] == 10
    assert kinds["incident"] == 2
    names = {each["args"]["name"] for each in events if each["name"] == "process_name"}
    assert {name.split(":")[0] for name in names} == {"attempt 0, rank 0", "attempt 0, rank 1"}
    (skipped,) = {each["name"] for each in events if each.get("cat") == "incident"}
    assert skipped == "skipped 7"
    sample = next(each for each in events if each.get("cat") == "sample")
    assert set(sample["args"]) == {"epoch", "batch", "position", "index"}
    assert target.stat().st_mode & 0o777 == 0o600
    assert " kB)" in out.splitlines()[0]
    assert "shows more" not in out


def test_a_trace_of_a_part(of_two_ranks: Path, tmp_path: Path, said: Said) -> None:
    target = tmp_path / "t.json"
    words = ("trace", of_two_ranks, "-o", target, "--rank", 1, "--last", 2, "--no-samples")
    status, out, _ = said(*words)
    assert (status, "--last 20 shows more" in out) == (0, True)
    waits = [each for each in json.loads(target.read_text()) if each.get("cat") == "wait"]
    assert [each["args"]["batch"] for each in waits] == [1, 2]
    status, _, err = said(*words)
    assert (status, "is there already" in err) == (2, True)
    assert said(*words, "--force")[0] == 0
    assert said("trace", of_two_ranks, "-o", tmp_path / "n", "--epoch", 9)[0] == 1
    assert not (tmp_path / "n").exists()
    status, _, err = said("trace", of_two_ranks, "-o", tmp_path / "no" / "t.json")
    assert (status, "cannot be written: No such file" in err) == (2, True)
    assert [*tmp_path.glob(".*.part")] == []


# ── replay ───────────────────────────────────────────────────────────────────────────────────────

PROGRAM = """
import sys
class Numbers:
    bad = {bad}
    def __len__(self): return 20
    def __getitem__(self, index):
        if index == self.bad: raise {error}(f"bad file {{index}}.png")
        return index
def make_dataset(): return Numbers()
def wants(path): return path
number = 7
"""


@pytest.fixture
def failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A failure at index 9; programs are imported from the folder it is in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    for name in ("__main__", "__mp_main__"):
        monkeypatch.setitem(sys.modules, name, sys.modules["__main__"])
    with pytest.raises(ValueError, match="bad file"):
        list(loader_of(Numbers(bad=(9,)), tmp_path / "run"))
    (path,) = tmp_path.rglob("failures/*.json")
    return path


def test_the_failing_sample_once_more(failed: Path, said: Said) -> None:
    Path("again.py").write_text(PROGRAM.format(bad=9, error="ValueError"))
    status, out, err = said("replay", failed, "again.py:make_dataset")
    assert out.startswith("index 9 fails again: ValueError: bad file 9.png\n")
    assert 'again.py", line 7, in __getitem__' in out
    assert "safeloader" not in out.split("Traceback")[1].split("next:")[0].split("index 9:")[0]
    assert (status, err) == (1, "")


def test_a_sample_that_comes_now(failed: Path, said: Said) -> None:
    Path("sound.py").write_text(PROGRAM.format(bad=None, error="ValueError"))
    status, out, _ = said("replay", failed, "sound.py:make_dataset")
    assert out.startswith("index 9 comes here: 9\n  there (sample): ValueError: bad file 9.png")
    assert status == 0
    told = json.loads(said("replay", failed, "sound.py:Numbers", "--json")[1])
    assert (told["came"], told["now"], told["index"]) == (True, None, "9")
    assert logging.getLogger("safeloader").propagate


def test_a_sample_that_fails_in_another_way(failed: Path, said: Said) -> None:
    Path("other.py").write_text(PROGRAM.format(bad=9, error="OSError"))
    status, out, _ = said("replay", failed, "other.py:make_dataset")
    assert out.startswith("index 9 fails here in another way: OSError: bad file 9.png\n")
    assert "there (sample): ValueError" in out
    assert status == 1


DRAWS = """
import random
import numpy as np
class Draws:
    def __len__(self): return 20
    def __getitem__(self, index):
        drawn = random.random(), np.random.rand()
        if index == 9: raise ValueError(f"drew {drawn}")
        return index
class Own(Draws):
    def __init__(self): self.rng = random.Random(3)
"""


@pytest.mark.parametrize(
    ("options", "made_from"),
    [
        ({}, "where the generators stood as its batch was begun"),
        ({"seed": 11}, "seed=11, epoch 0, index 9"),
        ({"seed": 11, "seed_per": "batch"}, "seed=11, epoch 0, batch 2"),
    ],
)
def test_the_random_numbers_are_those_it_had(
    options: dict[str, Any], made_from: str, failed: Path, said: Said, tmp_path: Path
) -> None:
    Path("draws.py").write_text(DRAWS)
    made: dict[str, Any] = {}
    exec(DRAWS, made)
    with pytest.raises(ValueError, match="drew") as info:
        list(loader_of(made["Draws"](), tmp_path / "drawn", num_workers=2, **options))
    (path,) = (tmp_path / "drawn").rglob("failures/*.json")
    drawn = str(info.value.args[0])
    out = said("replay", path, "draws.py:Draws")[1]
    assert out.startswith(f"index 9 fails again: ValueError: {drawn}\n")
    assert f"\n  random numbers: those it had there ({made_from})\n" in out
    told = json.loads(said("replay", path, "draws.py:Own", "--json")[1])
    assert told["now"]["message"] == drawn
    assert told["random_numbers"]["same"] is False
    assert told["random_numbers"]["own_generators"] == ["dataset.rng"]
    assert "but for those of dataset.rng, which nobody keeps" in told["random_numbers"]["said"]


def test_random_numbers_that_nobody_knows(failed: Path, said: Said) -> None:
    Path("sound.py").write_text(PROGRAM.format(bad=None, error="ValueError"))
    content = json.loads(failed.read_text())
    content["failure"] |= {"phase": "crash", "worker_id": 1}
    failed.write_text(json.dumps(content | {"random": None}))
    status, out, err = said("replay", failed, "sound.py:make_dataset")
    assert (status, err) == (0, "index 9 killed its worker: it may do the same to this process\n")
    assert "random numbers: others than it had there: a worker that died or hangs does not" in out
    assert "with seed= they are made again" in out


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("nothing", "does not say what gives the dataset"),
        ("gone.py:make_dataset", "there is no file 'gone.py'"),
        ("bad.py:make_data", "bad.py has no 'make_data'"),
        ("bad.py:wants", "needs arguments (path)"),
        ("bad.py:number", "gives a value of type int, which has no index"),
        ("raises.py:make_dataset", "raises.py cannot be imported: RuntimeError: no data here"),
    ],
)
def test_what_gives_no_dataset(place: str, told: str, failed: Path, said: Said) -> None:
    Path("bad.py").write_text(PROGRAM.format(bad=9, error="ValueError"))
    Path("raises.py").write_text("raise RuntimeError('no data here')")
    status, out, err = said("replay", failed, place)
    assert (status, out) == (2, "")
    assert told in err
    assert len(err.splitlines()) == 1


def test_what_holds_no_failure(failed: Path, said: Said) -> None:
    Path("some.json").write_text("[1]")
    status, _, err = said("replay", "some.json", "x.py:make_dataset")
    assert (status, "holds no failure" in err) == (2, True)
    status, _, err = said("replay", "none.json", "x.py:make_dataset")
    assert (status, "cannot be read: No such file" in err) == (2, True)
    content = json.loads(failed.read_text())
    content["failure"] |= {"index": None, "phase": "collate"}
    Path("batch.json").write_text(json.dumps(content))
    status, _, err = said("replay", "batch.json", "x.py:make_dataset")
    assert "(collate) names no single sample; the indices of its batch: 8, 9, 10, 11" in err
    assert os.path.isfile("batch.json")


def test_a_number_that_has_no_room_is_not_shown_as_another() -> None:
    from rich.console import Console

    out = Console(width=24, file=io.StringIO())
    terminal.table(out, ("a", ">batches", ">samples"), [("name" * 4, "1,000", "4,000")])
    said = out.file.getvalue()
    for cut in ("1,0 ", "1, ", "4,00 ", "4,0 ", "4, "):
        assert cut not in said.replace("\n", " "), said


class Late(Numbers):
    """One sample comes when it is asked for again."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.asked = 0

    def __getitem__(self, index: int) -> int:
        self.asked += index == 5
        if self.asked == 1:
            raise ValueError("not now")
        return index


class Dies(Numbers):
    """Its first worker is killed."""

    def __init__(self, size: int, once: Path) -> None:
        super().__init__(size)
        self.once = once

    def __getitem__(self, index: int) -> int:
        if index == 5 and not self.once.exists():
            self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return index


@pytest.mark.workers
@pytest.mark.parametrize("which", ["skipped", "late", "restarted", "raised"])
def test_what_training_went_on_over_is_told_as_no_failure(
    which: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    new_process(monkeypatch)
    run = tmp_path / "run"
    if which == "skipped":
        list(loader_of(Numbers(20, bad=(5,)), run, on_error="skip"))
    elif which == "late":
        list(loader_of(Late(20), run, retries=1))
    elif which == "restarted":
        dies = Dies(20, tmp_path / "once")
        list(loader_of(dies, run, num_workers=1, on_crash="restart"))
    else:
        with pytest.raises(ValueError, match="bad file"):
            list(loader_of(Numbers(20, bad=(5,)), run))
    new_process(monkeypatch)
    capsys.readouterr()
    __main__.main(["show", str(run), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["failures"]) == (which == "raised")
    assert shown["audit"]["ok"] is (which != "raised")
    __main__.main(["watch", str(run), "--once", "--json"])
    (its,) = json.loads(capsys.readouterr().out)["loaders"]
    assert its["failed"] == (which == "raised")
    __main__.main(["show", str(run)])
    assert ("survived" in capsys.readouterr().out) is (which == "restarted")


def test_ranks_that_marked_no_step_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(rank: int) -> None:
        data = Numbers(40)
        loader = loader_of(data, tmp_path, sampler=share(data, rank, 3))
        for step, _ in enumerate(loader):
            if rank == 0:
                loader.mark(step)

    by_ranks(monkeypatch, 3, train)
    capsys.readouterr()
    assert __main__.main(["step", str(tmp_path), "1"]) == 0
    said = capsys.readouterr().out
    assert "on 1 rank" in said
    assert "without ranks 1, 2" in said


def test_an_index_of_a_stream_is_said_to_be_no_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(10))

    new_process(monkeypatch)
    list(loader_of(Stream(), tmp_path))
    capsys.readouterr()
    assert __main__.main(["index", str(tmp_path), "3"]) == 0
    assert "no identity" in capsys.readouterr().out
