"""The commands over runs that were killed, and as a shell starts them."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import safeloader
from safeloader import __main__
from tests.run_folders import (
    PATIENCE_S,
    Numbers,
    by_ranks,
    killed,
    loader_of,
    new_process,
    of_job,
    share,
    stateful,
)

pytest.importorskip("typer")
pytest.importorskip("rich")
ROOT = Path(safeloader.__file__).parents[1]


pytestmark = pytest.mark.usefixtures("of_new_processes")


def shell(*words: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": path},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE_S,
    )


def test_a_killed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train() -> None:
        loader = loader_of(Numbers(40), tmp_path)
        list(loader)
        for number, _ in enumerate(loader):
            if number == 2:
                return os.kill(os.getpid(), signal.SIGKILL)

    killed(monkeypatch, train)
    assert __main__.main(["audit", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("exactly once: cannot be told of 1 of 2 epochs")
    assert "epoch 0 of 1 rank: ok, each of 40 indices came once" in said
    assert "it was cut off after 3 batches, and nothing went on with it" in said
    assert "SafeStatefulDataLoader.state_dict()" in said.splitlines()[-1]
    assert __main__.main(["watch", str(tmp_path), "--once"]) == 1
    assert "killed" in capsys.readouterr().out
    assert __main__.main(["step", str(tmp_path), "12"]) == 0
    assert "epoch 1, batch 2" in capsys.readouterr().out
    assert __main__.main(["index", str(tmp_path), "11"]) == 0
    assert capsys.readouterr().out.startswith("index 11: delivered 2 times")
    assert __main__.main(["show", str(tmp_path)]) == 0
    assert __main__.main(["trace", str(tmp_path), "-o", str(tmp_path / "t.json")]) == 0


def test_two_ranks_are_killed_twice_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", Numbers(80)

    def begin(rank: int, attempt: int, saves: int, ends: int) -> None:
        loader = stateful_share(data, run, rank)
        state = tmp_path / f"state-{rank}"
        if attempt:
            loader.load_state_dict(pickle.loads(state.read_bytes()))
        for number, _ in enumerate(loader):
            if number == saves:
                state.write_bytes(pickle.dumps(loader.state_dict()))
            if number == ends:
                return

    for attempt in range(2):
        for rank in range(2):
            killed(
                monkeypatch,
                lambda rank=rank, attempt=attempt: begin(rank, attempt, 2, 4),  # type: ignore[misc]
                **of_job(attempt, rank, 2),
            )

    def goes_on(rank: int) -> None:
        loader = stateful_share(data, run, rank)
        loader.load_state_dict(pickle.loads((tmp_path / f"state-{rank}").read_bytes()))
        list(loader)

    by_ranks(monkeypatch, 2, goes_on, attempt=2)
    status = __main__.main(["audit", str(run)])
    said = capsys.readouterr().out
    assert "(attempts 0 to 2) of 2 ranks: ok, each of 80 indices came once" in said
    assert "8 batches handed over after the state was saved came again" in said
    assert status == 0


def stateful_share(data: Numbers, run: Path, rank: int) -> safeloader.SafeStatefulDataLoader[int]:
    sampler = share(data, rank, 2, shuffle=False)
    return safeloader.SafeStatefulDataLoader(data, 4, sampler=sampler, run_dir=run)


def test_as_a_shell_starts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list(loader_of(Numbers(), tmp_path))
    new_process(monkeypatch)
    done = shell("-m", "safeloader", "audit", str(tmp_path), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["ok"] is True
    done = shell("-m", "safeloader", "audit", str(tmp_path / "none"))
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_the_exit_status_is_the_answer_though_nobody_reads_to_the_end(
    more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(loader_of(Numbers(), tmp_path))
    new_process(monkeypatch)
    for words, status in ((("audit", str(tmp_path)), 0), (("index", str(tmp_path), "99"), 1)):
        nobody, end = os.pipe()
        os.close(nobody)
        done = shell("-m", "safeloader", *words, *more, stdout=end)
        os.close(end)
        assert (done.returncode, done.stderr) == (status, "")


def test_the_launcher_and_the_reading_commands_import_no_more_than_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(loader_of(Numbers(), tmp_path))
    new_process(monkeypatch)
    program = """
import sys
from safeloader.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(sorted({"typer", "rich", "pyarrow", "torch"} & set(sys.modules)))
"""
    assert shell("-c", program, "run", "--help").stdout.splitlines()[-1] == "[]"
    for command in (("step", "1"), ("index", "3"), ("audit",), ("show",)):
        done = shell("-c", program, command[0], str(tmp_path), *command[1:])
        assert done.stdout.splitlines()[-1] == "['pyarrow', 'rich', 'typer']"


def test_a_run_that_is_resumed_elsewhere_in_the_program_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Numbers(40)

    def begins() -> None:
        loader = stateful(data, tmp_path / "run")
        for number, _ in enumerate(loader):
            if number == 3:
                (tmp_path / "state").write_bytes(pickle.dumps(loader.state_dict()))
                return

    killed(monkeypatch, begins, **of_job(0))
    new_process(monkeypatch, **of_job(1))
    loader = stateful(data, tmp_path / "run")
    loader.load_state_dict(pickle.loads((tmp_path / "state").read_bytes()))
    list(loader)  # another line
    new_process(monkeypatch)
    assert __main__.main(["audit", str(tmp_path / "run")]) == 0
    assert "each of 40 indices came once" in capsys.readouterr().out
