"""A process before, during and after its death, and what it leaves behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.multiprocessing

from safeloader.supervision.processes import Signals, is_dying, is_gone, remove_files_of


def test_a_process_is_alive_then_dying_then_gone() -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    assert (is_dying(pid), is_gone(pid)) == (False, False)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert (is_dying(pid), is_gone(pid)) == (True, False)
    os.waitpid(pid, 0)
    assert (is_dying(pid), is_gone(pid)) == (False, True)


def test_another_users_process_is_there() -> None:
    assert not is_gone(1)


def test_the_descriptor_of_a_worker_goes_with_its_signals() -> None:
    before = os.listdir("/proc/self/fd")
    held = Signals(SimpleNamespace(pid=os.getpid()))
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    del held
    assert os.listdir("/proc/self/fd") == before


# ── files that the dead left in shared memory ────────────────────────────────────────────────────

SHARED = Path("/dev/shm")
PID = 2**30 + os.getpid()  # of no process, and of these tests alone

in_shared_memory = pytest.mark.skipif(not SHARED.is_dir(), reason="there is no /dev/shm")


@pytest.fixture
def files() -> Iterator[list[Path]]:
    made = [SHARED / f"torch_{PID}_12_0", SHARED / f"torch_{PID}_12_1", SHARED / f"torch_{PID}5_1"]
    for path in made:
        path.touch()
    yield made
    for path in made:
        path.unlink(missing_ok=True)


@in_shared_memory
def test_the_files_of_these_processes_go_and_no_others(files: list[Path]) -> None:
    remove_files_of([PID, None])
    assert [path.exists() for path in files] == [False, False, True]


@in_shared_memory
def test_names_in_use_are_kept(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.multiprocessing, "get_sharing_strategy", lambda: "file_system")
    remove_files_of([PID])
    assert all(path.exists() for path in files)


@in_shared_memory
def test_a_file_that_went_by_itself_is_no_error(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "unlink", gone)
    remove_files_of([PID])
