"""The words of ``python -m safeloader run``, and the program that they become."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from safeloader import __main__
from safeloader.commands import run


class Became(BaseException):
    """What this process would have become."""


@pytest.fixture(autouse=True)
def becomes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def execve(path: str, words: list[str], environment: dict[str, str]) -> None:
        raise Became(path, words, environment)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-m", "safeloader", "run"])
    monkeypatch.delenv("SAFELOADER_RUN_ID", raising=False)


def became(*words: str) -> tuple[list[str], dict[str, Any], dict[str, str]]:
    """The program, what its loaders are told, and its environment."""
    with pytest.raises(Became) as raised:
        __main__.main(["run", *words])
    path, program, environment = raised.value.args
    assert program[0] == path
    return program[1:], json.loads(environment["SAFELOADER_LAUNCHED"]), environment


@pytest.mark.parametrize(
    "words",
    [
        ["train.py", "--verify", "off", "-x"],
        ["-m", "package.train", "--run", "elsewhere"],
        ["-c", "print(1)"],
        [sys.executable, "-u", "train.py"],
        ["--", "train.py"],
        [sys.executable, "-u", "-", "x"],
        ["-", "x"],
    ],
)
def test_what_follows_our_options_is_the_programs(words: list[str]) -> None:
    program, told, environment = became("--on-error=skip", "--retries", "2", "--checksum", *words)
    mine = [word for word in words if word not in ("--", sys.executable)]
    assert program == mine
    expected = {"verify": "warn", "on_error": "skip", "retries": 2, "checksum": True}
    assert told == {"options": expected}
    assert environment["PYTHONPATH"].split(os.pathsep)[0].endswith("hook")


@pytest.mark.parametrize(
    ("flags", "given"),
    [
        (["-m", "safeloader"], []),
        (["-u", "-X", "dev", "-m", "safeloader"], ["-u", "-X", "dev"]),
        (["-um", "safeloader"], ["-u"]),
        (["/usr/bin/safeloader"], []),
    ],
)
def test_the_options_of_python_are_the_programs_too(
    flags: list[str], given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, *flags, "run", "train.py"])
    assert became("train.py")[0] == [*given, "train.py"]


def test_folders_are_where_the_command_was_given(tmp_path: Path) -> None:
    _, told, environment = became("--run", "runs", "--trace", "t", "train.py")
    assert told["run"] == str(tmp_path / "runs")
    assert told["options"]["trace"] == str(tmp_path / "t")
    known = json.loads((tmp_path / "runs" / "run.json").read_text())
    assert environment["SAFELOADER_RUN_ID"] == known["id"]
    assert (known["command"][-1], told["attempt"]) == ("train.py", 0)


@pytest.mark.parametrize(("value", "number"), [("3", 3), ("0.5", 0.5), ("1e-3", 0.001)])
def test_a_bound_is_a_count_or_a_fraction(value: str, number: float) -> None:
    told = became("--max-skipped", value, "train.py")[1]["options"]["max_skipped"]
    assert (told, type(told)) == (number, type(number))


def test_a_run_has_its_bound_and_its_sources() -> None:
    told = became("--run-sources", "--run-max-bytes", "2000000", "train.py")[1]["options"]
    assert told == {"verify": "warn", "run_sources": True, "run_max_bytes": 2_000_000}


def test_a_bound_that_is_too_small_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        became("--run-max-bytes", "1000", "train.py")
    assert "'1000' is not a number from 1048576 (1 MiB) on" in capsys.readouterr().err


def test_a_second_attempt_and_a_third(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELOADER_RUN_ID", "mine")
    assert [became("--run", "runs", "x.py")[1]["attempt"] for _ in range(3)] == [0, 1, 2]


def test_a_folder_of_another_run_that_lives(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    became("--run", "runs", "x.py")
    monkeypatch.setenv("SAFELOADER_RUN_ID", "mine")
    assert __main__.main(["run", "--run", "runs", "x.py"]) == 2
    assert "another run may still write into" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "no program was given"),
        (["no-such-program"], "there is no program 'no-such-program'"),
        (["python", "-I", "x.py"], "-I keeps Python"),
        (["python3", "-W", "error", "-E", "x.py"], "-E keeps Python"),
        (["--run", "/proc/none", "x.py"], "cannot be written to"),
    ],
)
def test_what_cannot_work(words: list[str], why: str, capsys: Any) -> None:
    assert __main__.main(["run", *words]) == 2
    assert why in capsys.readouterr().err


def test_a_switch_that_is_none(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("SAFELOADER", "of")
    assert __main__.main(["run", "x.py"]) == 2
    assert "SAFELOADER is 'of', and not 'on' or 'off'" in capsys.readouterr().err


def test_half_a_line_is_no_audit_and_no_end_of_the_launcher(tmp_path: Path) -> None:
    path = tmp_path / "epochs.jsonl"
    path.write_text('{"epoch": 0, "audit": null}\n{"epoch": 0, "aud')
    assert not run._has_audit(path)
    path.write_text('{"epoch": 0, "aud\n{"epoch": 1, "audit": {"drawn": 3}}\n')
    assert run._has_audit(path)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--retries", "many"], "--retries: 'many' is not a number from 0 on"),
        (["--retries", "-1"], "--retries: '-1' is not a number from 0 on"),
        (["--expect-ranks", "0"], "--expect-ranks: '0' is not a number from 1 on"),
        (["--max-skipped", "1.5"], "--max-skipped: '1.5' is neither a count nor a fraction"),
        (["--max-skipped", "-1"], "--max-skipped: '-1' is neither a count nor a fraction"),
        (["--stall-after", "nan"], "--stall-after: 'nan' is not a number of seconds"),
        (["--on-error", "skp"], "--on-error: invalid choice: 'skp'"),
        (["--on-eror", "skip"], "--on-eror (did you mean --on-error?)"),
        (["--quite-another", "x"], "unrecognized arguments: --quite-another. See"),
    ],
)
def test_a_bad_option_is_told_in_one_line(words: list[str], why: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        __main__.main(["run", *words, "x.py"])
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert why in said
    assert said.startswith("python -m safeloader run: ")
    assert said.endswith("See python -m safeloader run --help")


def test_the_command_line_says_what_there_is(capsys: Any) -> None:
    assert __main__.main([]) == 2
    assert "usage: python -m safeloader run" in capsys.readouterr().err
    assert __main__.main(["rn", "train.py"]) == 2
    assert "there is no command 'rn'" in capsys.readouterr().err
    assert __main__.main(["--help"]) == 0
    assert "usage: python -m safeloader run" in capsys.readouterr().out
