"""Runs made by real loaders: ranks and attempts by the environment, kills of forked children."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DistributedSampler

from safeloader import SafeDataLoader, SafeStatefulDataLoader
from safeloader.provenance import run_folders

OF_A_RUN = (
    *("SAFELOADER_ATTEMPT", "SAFELOADER_RUN", "SAFELOADER_RUN_ID", "RANK", "WORLD_SIZE"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"),
)
PATIENCE_S = 300


class Numbers:
    """Samples that have a file each; some fail."""

    def __init__(self, size: int = 20, bad: tuple[int, ...] = ()) -> None:
        self.files = [f"{k}.png" for k in range(size)]
        self.bad = bad

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> int:
        if index in self.bad:
            raise ValueError(f"bad file {self.files[index]}")
        return index


def new_process(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    """From here on as in a process that has written no run; the one before has ended."""
    gc.collect()
    run_folders._close()
    monkeypatch.setattr(run_folders, "_process", run_folders._Process())
    monkeypatch.setattr(run_folders.atexit, "register", lambda function: None)
    for name in OF_A_RUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def of_job(attempt: int = 0, rank: int = 0, world: int = 1) -> dict[str, str]:
    """The environment of a rank of a job that torchrun started."""
    return {
        "TORCHELASTIC_RUN_ID": "job",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
    }


def by_ranks(
    monkeypatch: pytest.MonkeyPatch, world: int, train: Callable[[int], object], attempt: int = 0
) -> None:
    """Run ``train(rank)`` as on so many ranks, one after the other."""
    for rank in range(world):
        new_process(monkeypatch, **of_job(attempt, rank, world))
        train(rank)
    new_process(monkeypatch)


def share(data: Any, rank: int, world: int, **more: Any) -> Any:
    return DistributedSampler(data, num_replicas=world, rank=rank, **more)


def loader_of(data: Any, run: Path, size: int = 4, **more: Any) -> Any:
    return SafeDataLoader(data, size, run_dir=run, **more)


def stateful(data: Any, run: Path, size: int = 4, **more: Any) -> Any:
    return SafeStatefulDataLoader(data, size, run_dir=run, shuffle=True, **more)


def killed(
    monkeypatch: pytest.MonkeyPatch, train: Callable[[], object], **environment: str
) -> None:
    """Run ``train`` in a process of its own, which is killed by SIGKILL at its end."""
    new_process(monkeypatch, **environment)
    pid = os.fork()
    if pid == 0:
        try:
            train()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    new_process(monkeypatch)
