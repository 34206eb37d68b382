"""An index that is no plain int, from the loader into the folder of a run and back by a command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Dataset

from safeloader.__main__ import main
from safeloader.report.exactly_once import exactly_once
from safeloader.report.run import RunFolder
from tests.run_folders import loader_of, new_process

SIGNED = "https://host/a.png?sig=abcdefghijklmnop"


class Anything(Dataset[int]):
    """Takes any index; one fails."""

    def __init__(self, bad: Any = "none is") -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: Any) -> int:
        if index == self.bad:
            raise ValueError("it is bad")
        return 1


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    new_process(monkeypatch)


def seen(run: Path, asked: str, capsys: pytest.CaptureFixture[str], *more: str) -> list[str]:
    """What `index` says became of what somebody asks for."""
    capsys.readouterr()
    status = main(["index", str(run), *more, asked, "--json"])
    found = [each["what"] for each in json.loads(capsys.readouterr().out)["seen"]]
    assert status == (0 if found else 1)
    return found


@pytest.mark.parametrize(
    ("indices", "asked", "others"),
    [
        ([np.int64(3), np.int32(4)], ["3", "4", "+3"], ["5"]),
        ([-5, -1], ["-5", "-1"], ["5"]),
        ([1 << 63, 1 << 70, -1], [str(1 << 63), str(1 << 70), "-1"], ["0"]),
        ([True, False], ["True", "1", "0"], ["2"]),
        ([1, "a", "-1"], ["1", "a", "-1", "'a'"], ["b", "0"]),
        (["7", "007"], ["7", "007"], ["8"]),
        ([(0, 1), (0, "b")], ["(0, 1)", "(0,1)", "[0, 1]", "(0, 'b')"], ["0", "-1"]),
        (["a\udcff", "b\nc", "d\x1b[31m", ""], ["b\nc", "d\x1b[31m", "a\udcff", ""], ["a"]),
        ([SIGNED, SIGNED + "q"], [SIGNED, SIGNED + "q"], [SIGNED + "r"]),
        (["x" * 300 + "1", "x" * 300 + "2"], ["x" * 300 + "1"], ["x" * 300]),
        ([b"\xff", 0.5, None], ["b'\\xff'", "0.5", "None"], ["1"]),
    ],
)
def test_an_index_of_any_kind_is_found_as_a_user_writes_it(
    indices: list[Any],
    asked: list[str],
    others: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    list(loader_of(Anything(), tmp_path, sampler=indices))
    for each in asked:
        assert seen(tmp_path, each, capsys) == ["delivered"], each
    for each in others:
        assert seen(tmp_path, each, capsys) == [], each
    assert exactly_once(RunFolder(tmp_path)).ok is True


@pytest.mark.parametrize(
    ("bad", "asked"), [("b", "b"), ((0, 1), "(0, 1)"), (SIGNED, SIGNED), (1 << 70, str(1 << 70))]
)
@pytest.mark.parametrize("on_error", ["raise", "skip", "replace"])
def test_what_became_of_it_is_one_thing(
    bad: Any, asked: str, on_error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loader = loader_of(Anything(bad), tmp_path, sampler=["x", bad, "y"], on_error=on_error)
    what = {"raise": "failed", "skip": "skipped", "replace": "replaced"}[on_error]
    if on_error == "raise":
        with pytest.raises(ValueError, match="it is bad"):
            list(loader)
    else:
        list(loader)
    assert seen(tmp_path, asked, capsys) == [what]
    main(["show", str(tmp_path), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["failures"]) == (on_error == "raise")


def test_no_secret_of_an_index_is_in_the_folder(tmp_path: Path) -> None:
    list(loader_of(Anything(), tmp_path, sampler=[SIGNED, "https://me:pw12345@host/a.png"]))
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"abcdefghijklmnop" not in path.read_bytes()
            assert b"pw12345" not in path.read_bytes()


def test_an_option_that_is_misspelled_is_no_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    list(loader_of(Anything(), tmp_path, sampler=["--al", "b"]))
    assert main(["index", str(tmp_path), "--al"]) == 2
    assert "No such option" in capsys.readouterr().err
    assert seen(tmp_path, "--al", capsys, "--text") == ["delivered"]
