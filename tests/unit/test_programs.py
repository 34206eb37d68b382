"""Public programs: their outputs are compared digit for digit, and nothing else is let pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import launcher, programs
from benchmarks.cases import Unavailable
from benchmarks.printed import (
    comparable,
    first_difference,
    numbers,
    parted,
    recorded,
    shortened,
)
from benchmarks.timing import EpochTime
from benchmarks.training_programs import PROGRAMS, Program

REPORT = """\
a warning of the program's
  its second line
safeloader: loaders of process 7
  DataLoader at /home/me/train.py:31: 3 epochs, 90 of 96 delivered
  Endless at /home/me/train.py:40: 1 epoch, 4 of 4 delivered
and the program again
"""

# ── what was printed ─────────────────────────────────────────────────────────────────────────────


def test_times_are_left_out_and_every_other_digit_stays() -> None:
    printed = "\x1b[1mloss 0.5\x1b[0m in 3.1 s\n\nloss 0.25 in 2.9 s  \n"
    assert comparable(printed, r"[\d.]+ s") == ["loss 0.5 in …", "loss 0.25 in …"]


def test_a_bar_that_is_drawn_over_itself_is_left_out_however_often_it_is_drawn() -> None:
    once, often = ("".join(f"{each}%|##\r" for each in at) for at in ([100], [0, 30, 100]))
    varies = r"^.*\d+%\|.*$"
    assert comparable(once + "loss 1\n", varies) == comparable(often + "loss 1\n", varies)
    assert comparable(once + "loss 1\n", varies) == ["loss 1"]


def test_numbers_are_counted_and_names_are_none() -> None:
    assert numbers(["loss: -0.5 (1e-05)", "yolo11n, 3 of 4", "v1.2"]) == 4
    assert numbers(["the same, and nothing in it"]) == 0


@pytest.mark.parametrize(
    ("expected", "got", "said"),
    [
        (["a", "b"], ["a", "b"], None),
        (["a", "0.5"], ["a", "0.50000001"], "line 2: '0.5', then '0.50000001'"),
        (["a", "b"], ["a"], "line 2 is missing: 'b'"),
        (["a"], ["a", "b"], "line 2 is new: 'b'"),
    ],
)
def test_the_first_difference_is_named(expected: Any, got: Any, said: str | None) -> None:
    assert first_difference(expected, got) == said


def test_what_the_launcher_says_is_told_apart_from_what_the_program_says() -> None:
    theirs, ours = parted(REPORT)
    assert theirs == "a warning of the program's\n  its second line\nand the program again\n"
    assert ours == [line.strip() for line in REPORT.splitlines()[2:5]]


def test_what_was_recorded_is_summed_up_over_all_processes() -> None:
    told = recorded(parted(REPORT + REPORT)[1])
    assert (told.loaders, told.epochs, told.delivered, told.drawn) == (4, 8, 188, 200)
    assert told.troubles == []


@pytest.mark.parametrize(
    "line",
    [
        "NOT recorded: MakesItsOwn at train.py:8: it makes its own iterators (Its)",
        "DataLoader at train.py:8: 1 epoch, 3 of 4 delivered; 1 missing",
        "safeloader: nothing is recorded in process 7: it does not know this torch",
    ],
)
def test_whatever_is_not_as_it_has_to_be_is_a_trouble(line: str) -> None:
    assert recorded(["safeloader: loaders of process 7", line]).troubles == [line]


def test_no_path_of_the_machine_is_left() -> None:
    roots = {"/home/me/": "", "/home/me/code/": "code/"}
    assert shortened("Loader at /home/me/code/train.py:3", roots) == "Loader at code/train.py:3"


# ── the programs ─────────────────────────────────────────────────────────────────────────────────

SOURCE = """\
import sys, time
import torch
from torch.utils.data import DataLoader
torch.manual_seed(int(sys.argv[1]))
for batch in DataLoader(torch.arange(12.0), batch_size=4, shuffle=True):
    print("sum", batch.sum().item(), "at", time.time_ns())
print(__file__, file=sys.stderr)
"""


def tiny(**more: Any) -> Program:
    def command(checkout: Path, data: Path) -> list[str]:
        return [str(checkout / "train.py"), (data / "seed").read_text()]

    told: dict[str, Any] = {
        "name": "tiny",
        "loader": "plain",
        "modules": (),
        "make_data": lambda folder: (folder / "seed").write_text("3"),
        "command": command,
        "varies": r"at \d+",
        "checkout": "tiny",
        "imports": ("train.py",),
    }
    return Program(**(told | more))


def checkout_of(folder: Path, source: str = SOURCE) -> Path:
    (folder / "tiny").mkdir()
    (folder / "tiny" / "train.py").write_text(source)
    return folder


def test_a_copy_has_the_import_swapped_and_nothing_else(tmp_path: Path) -> None:
    checkout = checkout_of(tmp_path) / "tiny"
    tiny().swapped(checkout, tmp_path / "copy")
    ours = "from safeloader import SafeDataLoader as DataLoader"
    theirs = "from torch.utils.data import DataLoader"
    assert (tmp_path / "copy" / "train.py").read_text() == SOURCE.replace(theirs, ours)
    assert (checkout / "train.py").read_text() == SOURCE


def test_an_import_that_is_not_there_once_is_not_guessed_at(tmp_path: Path) -> None:
    checkout = checkout_of(tmp_path, "from torch.utils.data import DataLoader, Dataset\n") / "tiny"
    with pytest.raises(ValueError, match=r"train\.py has 0 lines that import DataLoader"):
        tiny().swapped(checkout, tmp_path / "copy")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"modules": ("no_such_library",)}, "no_such_library is not installed"),
        ({"checkout": "elsewhere"}, "there is no checkout elsewhere"),
    ],
)
def test_a_program_that_cannot_be_run_says_what_is_missing(
    more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(Unavailable, match=said):
        tiny(**more).found_in(tmp_path)


def test_checkouts_are_never_looked_for_where_none_were_named() -> None:
    with pytest.raises(Unavailable, match="--programs DIR"):
        PROGRAMS["mingpt"].found_in(None)


@pytest.mark.slow
def test_a_program_runs_in_each_way_and_prints_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(programs, "PROGRAMS", {"tiny": tiny()})
    out = tmp_path / "results"
    words = ["--programs", str(checkout_of(tmp_path)), "--rounds", "1", "--out", str(out)]
    assert programs.main(words) == 0
    (path,) = out.glob("*.json")
    whole = json.loads(path.read_text())
    assert [row["way"] for row in whole["rows"]] == ["stock", "swap", "launcher"]
    assert all(row["numbers"] >= 3 for row in whole["rows"])
    assert whole["rows"][-1]["recorded"]["delivered"] == 12
    assert whole["rows"][-1]["report"][-2].startswith(
        "DataLoader over Tensor (12) at tiny/train.py:5: 1 epoch"
    )
    assert str(tmp_path) not in path.read_text()
    assert "12 of 12" in capsys.readouterr().out


@pytest.mark.slow
def test_a_program_that_prints_otherwise_when_it_is_recorded_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = SOURCE + "print('patched', hasattr(DataLoader.__iter__, '__wrapped__'))\n"
    monkeypatch.setattr(programs, "PROGRAMS", {"tiny": tiny(imports=())})
    words = ["--programs", str(checkout_of(tmp_path, source)), "--rounds", "1", "--no-files"]
    assert programs.main(words) == 1
    assert "line 4: 'patched False', then 'patched True'" in capsys.readouterr().out


def test_a_row_in_which_nothing_was_compared_or_recorded_is_not_ok() -> None:
    def row(**more: Any) -> programs.Row:
        nothing = recorded([])
        told: dict[str, Any] = {name: [1.0] for name in ("seconds", "stock_seconds")}
        told |= {name: [2.0] for name in ("cpu_seconds", "stock_cpu_seconds")}
        told |= {"program": "tiny", "way": "launcher", "status": 0, "numbers": 3}
        told |= {"difference": None, "report": [], "recorded": nothing}
        return programs.Row(**(told | more))

    assert row().verdict == "NOT RECORDED"
    assert row(recorded=recorded(parted(REPORT)[1])).verdict == "ok"
    assert row(recorded=None).verdict == "ok"
    assert row(recorded=None, numbers=0).verdict == "NOTHING COMPARED"
    assert row(difference="line 1").verdict == "DIFFERENT"
    assert row(seconds=[0.5]).ratios == [2.0]
    assert row(cpu_seconds=[4.0]).cpu_ratios == [0.5]


def test_each_program_is_told_by_its_revision_or_its_versions() -> None:
    told = {
        "one": {"loader": "plain", "versions": {}, "revision": "abc"},
        "two": {"loader": "its own", "versions": {"trl": "1.0", "datasets": "5.0"}},
    }
    one, two = programs.which(told).splitlines()
    assert one == "- one: plain; revision abc"
    assert two == "- two: its own; trl 1.0; datasets 5.0"


# ── what the launcher costs ──────────────────────────────────────────────────────────────────────


def test_the_launcher_is_compared_with_the_swap_pair_by_pair() -> None:
    times = {
        name: [EpochTime(1, each, 1.0) for each in nanoseconds]
        for name, nanoseconds in (
            ("stock", [400.0] * 6),
            ("safe", [100.0, 300.0] * 3),
            ("launcher", [200.0, 300.0] * 3),
        )
    }
    swap, stock = launcher.costs("small-2w", 0.95, times)
    assert (swap.ratios, swap.verdict) == ([0.5, 1.0] * 3, "–")  # noqa: RUF001
    assert (stock.ratios, stock.verdict) == ([2.0, 400 / 300] * 3, "ok")
    assert launcher.costs("small-2w", 2.5, times)[1].verdict == "BELOW"


def test_the_start_is_judged_by_the_median_of_what_is_added() -> None:
    cpu = [10.0] * 3
    start = launcher.Start([20.0, 30.0, 40.0], [80.0, 500.0, 100.0], cpu, [60.0] * 3)
    assert (start.added.median, start.added_cpu.median, start.verdict) == (60, 50, "ok")
    assert launcher.Start([20.0], [120.0], [1.0], [2.0]).verdict == "ABOVE"


@pytest.mark.slow
def test_a_start_ends_with_the_programs_first_line(tmp_path: Path) -> None:
    start = launcher.time_start(tmp_path, 1)
    assert start.plain_ms[0] > 0
    assert start.launched_cpu_ms[0] > start.plain_cpu_ms[0] > 0
