"""Which run a folder holds, and which attempt of it a process joins, begins or leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from safeloader.introspect.identity import has_ended, process_identity
from safeloader.provenance.attempts import (
    ATTEMPT_VARIABLE,
    AnotherRun,
    NotARun,
    open_run,
    start_of,
)

ENVIRONMENT = (
    *("SAFELOADER_RUN_ID", ATTEMPT_VARIABLE, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_JOB_ID"),
)
ENDED = {"pid": 4, "ticks": -1}  # no process ever began then
ELSEWHERE = {"host": "elsewhere", "boot": "b", "namespace": "n", "pid": 4, "ticks": 1}


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def joined(run: Path, rank: int | None = 0, **environment: str) -> int:
    """The attempt that a process joins which has this environment, and no recorded parent."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        return open_run(run, ["train.py"], rank).number
    finally:
        os.environ.pop(ATTEMPT_VARIABLE, None)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def writes(run: Path, attempt: int, rank: int, **who: Any) -> Path:
    """A process of a rank has written its folder."""
    path = run / f"attempt={attempt}" / f"rank={rank}" / f"host-{len(list(run.rglob('host*')))}-0"
    path.mkdir(parents=True)
    (path / "loader.json").write_text(json.dumps({"process": process_identity() | who}))
    return path


def grows_old(run: Path) -> None:
    long_ago = time.time() - 3600
    for path in [run, *run.rglob("*")]:
        os.utime(path, (long_ago, long_ago))


ELASTIC = {"TORCHELASTIC_RUN_ID": "job", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SLURM = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}
GROUP = {"RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def test_a_new_folder_gets_a_run_and_its_first_attempt(tmp_path: Path) -> None:
    attempt = open_run(tmp_path / "a" / "run", ["train.py", "--fast"], 0)
    told = json.loads((attempt.run / "run.json").read_text())
    assert (told["id"], told["command"]) == (attempt.id, ["train.py", "--fast"])
    assert (attempt.number, attempt.path.name) == (0, "attempt=0")
    assert (attempt.path / "attempt.json").exists()


def test_no_secret_of_the_command_line_is_written(tmp_path: Path) -> None:
    words = ["python", "train.py", "--wandb-api-key", "hunter2", "--db=postgres://me:hunter2@host"]
    open_run(tmp_path, [*words, "--password=hunter2 hunter2", "--epochs", "3"], 0)
    written = (tmp_path / "run.json").read_text()
    command = json.loads(written)["command"]
    assert "hunter2" not in written
    assert [len(command), *command[:3], *command[-2:]] == [8, *words[:3], "--epochs", "3"]


def test_what_a_process_starts_belongs_to_its_attempt(tmp_path: Path) -> None:
    first = open_run(tmp_path, ["train.py"], 0)
    program = "import sys; from pathlib import Path; from safeloader.provenance.attempts import *; "
    program += "print(open_run(Path(sys.argv[1]), [], 0).number)"
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == first.number
    other = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "other"], capture_output=True, text=True
    )
    assert int(other.stdout) == 0


@pytest.mark.parametrize("start", [ELASTIC, SLURM, GROUP], ids=["torchrun", "srun", "by hand"])
def test_ranks_of_one_start_join_one_attempt(start: dict[str, str], tmp_path: Path) -> None:
    for rank in range(4):
        assert joined(tmp_path, rank, **start) == 0
        writes(tmp_path, 0, rank)


@pytest.mark.parametrize("start", [ELASTIC, SLURM, GROUP], ids=["torchrun", "srun", "by hand"])
def test_the_same_start_again_is_the_next_attempt(start: dict[str, str], tmp_path: Path) -> None:
    for rank in range(4):
        joined(tmp_path, rank, **start)
        writes(tmp_path, 0, rank, **ENDED)
    for rank in (2, 0, 1, 3):
        assert joined(tmp_path, rank, **start) == 1
        writes(tmp_path, 1, rank)


def test_a_restart_of_torchruns_is_the_next_attempt(tmp_path: Path) -> None:
    for rank in range(2):
        joined(tmp_path, rank, **ELASTIC)
    again = ELASTIC | {"TORCHELASTIC_RESTART_COUNT": "1"}
    assert [joined(tmp_path, rank, **again) for rank in range(2)] == [1, 1]


def test_under_the_launcher_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_run(tmp_path, ["torchrun"])
    monkeypatch.setenv("SAFELOADER_RUN_ID", first.id)
    told = os.environ[ATTEMPT_VARIABLE]
    for count, attempts in (("0", [0, 0]), ("1", [1, 1])):
        found = []
        for rank in range(2):
            monkeypatch.setenv(ATTEMPT_VARIABLE, told)
            elastic = ELASTIC | {"TORCHELASTIC_RESTART_COUNT": count}
            found.append(joined(tmp_path, rank, **elastic))
        assert found == attempts


def test_a_rank_that_comes_late_joins(tmp_path: Path) -> None:
    joined(tmp_path, 0, **ELASTIC)
    grows_old(tmp_path)
    writes(tmp_path, 0, 0)
    assert joined(tmp_path, 5, **ELASTIC) == 0


def test_what_is_silent_for_a_minute_is_over(tmp_path: Path) -> None:
    joined(tmp_path, 0, **ELASTIC)
    writes(tmp_path, 0, 0, **ELASTIC | ELSEWHERE)
    grows_old(tmp_path)
    assert joined(tmp_path, 1, **ELASTIC) == 1


def test_torchruns_default_id_names_no_run(tmp_path: Path) -> None:
    joined(tmp_path, **ELASTIC | {"TORCHELASTIC_RUN_ID": "none"})
    assert json.loads((tmp_path / "run.json").read_text())["id"] != "none"
    assert joined(tmp_path, 1, **ELASTIC | {"TORCHELASTIC_RUN_ID": "none"}) == 0


def test_the_same_id_is_the_next_attempt_at_once(tmp_path: Path) -> None:
    assert [joined(tmp_path, SAFELOADER_RUN_ID="one") for _ in range(3)] == [0, 1, 2]


def test_another_run_that_lives_is_left_alone(tmp_path: Path) -> None:
    joined(tmp_path, SAFELOADER_RUN_ID="one")
    with pytest.raises(AnotherRun, match="SAFELOADER_RUN_ID=one"):
        joined(tmp_path, SAFELOADER_RUN_ID="two")
    grows_old(tmp_path)
    assert joined(tmp_path, SAFELOADER_RUN_ID="two") == 1
    assert json.loads((tmp_path / "run.json").read_text())["id"] == "one"


def test_without_an_id_a_process_that_is_there_keeps_the_folder(tmp_path: Path) -> None:
    joined(tmp_path)
    writes(tmp_path, 0, 0)
    grows_old(tmp_path)  # it may validate for an hour
    with pytest.raises(AnotherRun):
        joined(tmp_path)


def test_without_an_id_what_has_ended_is_gone_on_with_at_once(tmp_path: Path) -> None:
    joined(tmp_path)
    writes(tmp_path, 0, 0, **ENDED)
    assert joined(tmp_path) == 1
    writes(tmp_path, 1, 0, **ELSEWHERE)
    with pytest.raises(AnotherRun):
        joined(tmp_path)


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(NotARun):
        joined(tmp_path)


def test_half_a_file_is_waited_for(tmp_path: Path) -> None:
    """Another process has made ``run.json`` and is about to write it."""
    fd = os.open(tmp_path / "run.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    pid = os.fork()
    if pid == 0:
        time.sleep(0.2)
        os.write(fd, b'{"id": "theirs"}')
        os._exit(0)
    os.close(fd)
    assert open_run(tmp_path, [], 0).id == "theirs"
    os.waitpid(pid, 0)


def test_nothing_is_left_of_who_came_second(tmp_path: Path) -> None:
    joined(tmp_path, SAFELOADER_RUN_ID="one")
    joined(tmp_path, SAFELOADER_RUN_ID="one")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("attempt=0", "attempt=1", "run.json"),
    ]


def test_children_of_one_parent_belong_together(tmp_path: Path) -> None:
    program = """
import multiprocessing, os, sys
from pathlib import Path
from safeloader.provenance.attempts import open_run
def rank(number):
    os.write(1, b"%d\\n" % open_run(Path(sys.argv[1]), [], number).number)
fork = multiprocessing.get_context("fork")
for _ in range(2):
    children = [fork.Process(target=rank, args=(k,)) for k in range(3)]
    [child.start() for child in children], [child.join() for child in children]
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    )
    assert sorted(done.stdout.split()) == ["0"] * 6  # none of the first wrote anything


def test_whether_a_process_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        identity = process_identity() | {"pid": child.pid}
        identity["ticks"] = int(Path(f"/proc/{child.pid}/stat").read_text().split()[21])
        assert has_ended(identity) is False
        child.kill()
        while "Z" not in Path(f"/proc/{child.pid}/stat").read_text().split()[2]:
            time.sleep(0.001)
        assert has_ended(identity) is True  # nobody has waited for it yet
    assert has_ended(identity) is True
    assert has_ended({**process_identity(), "namespace": "pid:[1]"}) is None
    assert has_ended({}) is None


def test_one_process_has_no_start_in_common_with_others() -> None:
    assert start_of() == ""


def test_the_launcher_waits_for_no_library() -> None:
    program = "import safeloader.provenance.attempts, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n"
