"""Files of dead workers are removed from shared memory; those of others are not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.multiprocessing

from safeloader.supervision import leftovers

SHARED = Path("/dev/shm")
PID = 2**30 + os.getpid()  # of no process, and of these tests alone

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="there is no /dev/shm")


@pytest.fixture
def files() -> Iterator[list[Path]]:
    made = [SHARED / f"torch_{PID}_12_0", SHARED / f"torch_{PID}_12_1", SHARED / f"torch_{PID}5_1"]
    for path in made:
        path.touch()
    yield made
    for path in made:
        path.unlink(missing_ok=True)


def test_the_files_of_these_processes_go_and_no_others(files: list[Path]) -> None:
    leftovers.remove([PID, None])
    assert [path.exists() for path in files] == [False, False, True]


def test_names_in_use_are_kept(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.multiprocessing, "get_sharing_strategy", lambda: "file_system")
    leftovers.remove([PID])
    assert all(path.exists() for path in files)


def test_a_file_that_went_by_itself_is_no_error(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "unlink", gone)
    leftovers.remove([PID])
