"""The folder of a run, by real processes: killed at any moment, ranks at once, forks, restarts."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import safeloader
from safeloader.delivery.manifest import BatchManifest
from safeloader.provenance import batch_log
from safeloader.provenance.batch_log import BatchLog
from safeloader.provenance.open_folder import OpenFolder
from safeloader.report.folder import LoaderRecords
from safeloader.report.run import RunFolder

ROOT = Path(safeloader.__file__).parents[1]
PATIENCE_S = 300

HEAD = """\
import os, signal, sys
import torch
from safeloader import SafeDataLoader
class Numbers(torch.utils.data.Dataset):
    def __init__(self, size): self.size = size
    def __len__(self): return self.size
    def __getitem__(self, index): return torch.tensor(index)
"""


def surroundings(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if "SAFELOADER" not in name}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return clean | {"PYTHONPATH": path} | more


def started(body: str, *words: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + body, *words],
        env=surroundings(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said[1]
    return said


# ── kill -9 ──────────────────────────────────────────────────────────────────────────────────────

HANDS_OVER = """
loader = SafeDataLoader(Numbers(100_000), 8, shuffle=True, num_workers=int(sys.argv[2]),
                        persistent_workers=sys.argv[2] != "0", run_dir=sys.argv[1])
while True:
    for batch in loader:
        os.write(1, (" ".join(map(str, batch.tolist())) + "\\n").encode())
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_was_handed_over_before_everything_was_killed_is_read(
    workers: str, tmp_path: Path
) -> None:
    with started(HANDS_OVER, str(tmp_path), workers) as process:
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline() for _ in range(random.randint(50, 500))]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
        rest = process.stdout.read().splitlines(keepends=True)
    lines += [line for line in rest if line.endswith("\n")]
    handed_over = [[*map(int, line.split())] for line in lines]
    run = RunFolder(tmp_path)
    (its,) = run.loaders
    assert its.state == "killed"
    found = run.batches(["indices"])["indices"].to_pylist()
    assert found[: len(handed_over)] == handed_over
    assert len(found) <= len(handed_over) + 1
    assert run.notes == []
    assert run.epochs()[-1].audit is None


def dies_while_it_writes(folder: Path, told: Any, segment_bytes: int) -> None:
    stamps = np.arange(10, dtype=np.int64).tobytes()
    log = BatchLog(OpenFolder(folder, [], "it"), 0, segment_bytes=segment_bytes)
    for batch in range(1 << 30):
        indices = np.arange(batch, batch + 8, dtype=np.int64).tobytes()
        manifest = BatchManifest(batch, 0, 1, indices, 8, None, stamps)
        log.delivered(0, batch, 1, manifest, 1)
        told[0] = batch + 1


def test_no_moment_at_which_a_kill_loses_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many kills, in a log that gives its tail to the stream all the time."""
    import mmap

    monkeypatch.setattr(batch_log, "TAIL_BYTES", 1 << 13)
    for turn in range(40):
        folder = tmp_path / str(turn)
        folder.mkdir()
        told = memoryview(mmap.mmap(-1, 8)).cast("q")
        pid = os.fork()
        if pid == 0:
            try:
                dies_while_it_writes(folder, told, 1 << 15)
            finally:
                os._exit(1)
        while told[0] < 20:
            time.sleep(0.001)
        time.sleep(random.random() * 0.01)
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        (folder / "it-0" / "loader.json").write_text("{}")
        its = LoaderRecords(folder / "it-0", 0, 0, 0)
        found = [row for table in its.pieces(["step", "indices"]) for row in table.to_pylist()]
        steps = [row["step"] for row in found]
        assert steps == [*range(len(steps))]
        assert told[0] <= len(steps) <= told[0] + 1
        assert found[-1]["indices"] == [*range(steps[-1], steps[-1] + 8)]
        its.convert()
        assert [s for table in its.pieces(["step"]) for s in table["step"].to_pylist()] == steps


# ── ranks, restarts, forks ───────────────────────────────────────────────────────────────────────

ONE_EPOCH = """
loader = SafeDataLoader(Numbers(int(sys.argv[1])), 4, num_workers=1)
print(sum(len(batch) for batch in loader))
"""


def test_64_that_open_a_run_at_once(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from safeloader.provenance.attempts import open_run
from safeloader.provenance.open_folder import OpenFolder
sys.stdin.readline()
for k in range(8):
    rank = int(sys.argv[2]) * 8 + k
    os.environ.pop("SAFELOADER_ATTEMPT", None)
    attempt = open_run(Path(sys.argv[1]), [], rank)
    folder = OpenFolder(attempt.run, [attempt.path.name, f"rank={rank}"], "it")
    folder.append("loader.json", b"{}")
    print(attempt.number, attempt.id)
"""
    start = {"TORCHELASTIC_RUN_ID": "job", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "run"), str(number)],
            env=surroundings(**start),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = {line for each in processes for line in ended(each)[0].splitlines()}
    assert said == {"0 job"}
    run = RunFolder(tmp_path / "run")
    assert (run.attempts, run.ranks) == ([0], [*range(64)])
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


def test_ranks_share_a_run_and_a_restart_is_its_next_attempt(tmp_path: Path) -> None:
    start = {"TORCHELASTIC_RUN_ID": "job", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    start |= {"SAFELOADER_RUN": str(tmp_path / "run"), "WORLD_SIZE": "2"}
    for _ in range(2):
        ranks = [started(ONE_EPOCH, "20", RANK=str(rank), **start) for rank in range(2)]
        assert [ended(each)[0] for each in ranks] == ["20\n"] * 2
    run = RunFolder(tmp_path / "run")
    assert [(each.attempt, each.rank, each.state) for each in run.loaders] == [
        *((attempt, rank, "ended") for attempt in range(2) for rank in range(2)),
    ]
    assert [epoch.audit["rank"] for epoch in run.epochs()] == [0, 1, 0, 1]  # type: ignore[index]
    assert len(run.step(3)) == 4
    assert [each.attempt for each in run.index(7)] == [0, 0, 1, 1]


def test_a_run_that_is_anothers_is_left_alone_and_training_goes_on(tmp_path: Path) -> None:
    body = "sys.stdin.readline() if sys.argv[2:] else None\n" + ONE_EPOCH
    waits = """
loader = SafeDataLoader(Numbers(8), 4)
iterator = iter(loader)
next(iterator)
print("begun", flush=True)
signal.pause()
"""
    first = started(waits, SAFELOADER_RUN=str(tmp_path))
    assert first.stdout is not None
    assert first.stdout.readline() == "begun\n"
    try:
        second = started(body, "20", SAFELOADER_RUN=str(tmp_path))
        said, told = ended(second)
    finally:
        first.kill()
        first.communicate()
    assert said == "20\n"
    assert told.count("another run may still write into") == 1
    assert len(RunFolder(tmp_path).loaders) == 1
    third = started(body, "20", SAFELOADER_RUN=str(tmp_path))  # the first is gone, as is seen here
    assert ended(third) == ("20\n", "")
    assert RunFolder(tmp_path).attempts == [0, 1]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_have_folders_of_their_own_and_workers_have_none(
    method: str, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(
        f"""{HEAD}
import multiprocessing
class Nested(Numbers):
    def __getitem__(self, index):
        return sum(len(batch) for batch in SafeDataLoader(Numbers(6), 2))
def child():
    assert len(list(SafeDataLoader(Numbers(12), 4))) == 3
if __name__ == "__main__":
    iterator = iter(SafeDataLoader(Nested(8), 4, num_workers=2))
    next(iterator)
    process = multiprocessing.get_context({method!r}).Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    list(iterator)
"""
    )
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env=surroundings(SAFELOADER_RUN=str(tmp_path / "run")),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    run = RunFolder(tmp_path / "run")
    assert run.attempts == [0]
    assert [epoch.audit["delivered"] for epoch in run.epochs()] == [8, 12]  # type: ignore[index]
    assert [each.state for each in run.loaders] == ["ended"] * 2


def test_workers_memory_and_time_are_written(tmp_path: Path) -> None:
    body = """
import time
from safeloader.report.run import RunFolder
loader = SafeDataLoader(
    Numbers(2_000), 4, num_workers=2, persistent_workers=True, run_dir=sys.argv[1]
)

def told():  # a busy machine's workers look at their memory later
    rows = RunFolder(sys.argv[1]).workers().to_pylist()
    return any(row["worker"] >= 0 and row["pss_bytes"] > 0 for row in rows)

list(loader)
while not told():
    list(loader)
"""
    ended(started(body, str(tmp_path)))
    table = RunFolder(tmp_path).workers().to_pylist()
    main = [row for row in table if row["worker"] == -1]
    workers = [row for row in table if row["worker"] in (0, 1) and row["pss_bytes"] > 0]
    assert main
    assert main[-1]["rss_bytes"] > 1 << 20
    assert main[-1]["cpu_ns"] > 0
    assert workers
    assert workers[-1]["uss_bytes"] > 1 << 16
    assert workers[-1]["batches"] > 0
    assert workers[-1]["busy_ns"] > 0


def test_a_run_is_told_of_by_the_launcher_and_by_the_loader_alike(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(HEAD + "list(SafeDataLoader(Numbers(20), 4))\n")
    command = [sys.executable, "-m", "safeloader", "run", "--run", "runs", "train.py"]
    for _ in range(2):
        subprocess.run(
            command, cwd=tmp_path, env=surroundings(), check=True, capture_output=True, timeout=300
        )
    run = RunFolder(tmp_path / "runs")
    assert run.attempts == [0, 1]
    assert run.batches(["indices"]).num_rows == 10
    assert json.loads((run.path / "run.json").read_text())["command"][-1] == "train.py"


def test_no_secret_of_the_command_line_is_in_the_folder(tmp_path: Path) -> None:
    """Of the program, and of one that the launcher started."""
    secrets = ["hunter2secret", "abcdefgh1234", "pw12345", "hf_abcdefghijklmnopqrstuvwx", "w4ndb"]
    words = [
        *(f"--token={secrets[0]}", "--api-key", secrets[1], f"https://me:{secrets[2]}@host/x"),
        *(secrets[3], f"logger.wandb_api_key={secrets[4]}", "--max-tokens", "512", "--lr=0.1"),
    ]
    body = HEAD + "list(SafeDataLoader(Numbers(4), 2))"
    for name, launcher in (("itself", []), ("launched", ["-m", "safeloader", "run", "--run"])):
        run = tmp_path / name
        (tmp_path / "train.py").write_text(body)
        first = [*launcher, str(run), sys.executable] if launcher else []
        done = subprocess.run(
            [sys.executable, *first, str(tmp_path / "train.py"), *words],
            env=surroundings(SAFELOADER_RUN=str(run)),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stderr
        assert RunFolder(run).info["command"][-3:] == ["--max-tokens", "512", "--lr=0.1"]
        for path in run.rglob("*"):
            if path.is_file():
                whole = path.read_bytes()
                assert not [each for each in secrets if each.encode() in whole], path
