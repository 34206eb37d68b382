"""What the tests count of the machine is theirs, whatever else runs on it."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from tests import family

pytestmark = pytest.mark.skipif(not family.SHARED.is_dir(), reason="there is no /dev/shm")

ANOTHER_PROGRAM = """
import multiprocessing, os, sys
from multiprocessing.shared_memory import SharedMemory
import torch
torch.multiprocessing.set_sharing_strategy("file_system")
lock = multiprocessing.get_context("spawn").Lock()
memory = SharedMemory(create=True, size=100)
tensor = torch.zeros(100).share_memory_()
if os.fork() == 0:  # a name with the pid of a process that has ended
    open(f"/dev/shm/torch_{os.getpid()}_1_0", "w").close()
    os._exit(0)
gone, _ = os.wait()
print("ready", flush=True)
sys.stdin.readline()
os.unlink(f"/dev/shm/torch_{gone}_1_0")
memory.unlink()
"""


def test_what_another_program_holds_is_not_ours() -> None:
    before, all_before = family.shared_memory(), set(family.SHARED.iterdir())
    with subprocess.Popen(
        [sys.executable, "-c", ANOTHER_PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        theirs = {path.name.split("_")[0] for path in set(family.SHARED.iterdir()) - all_before}
        ours = family.shared_memory()
        other.communicate("\n")
    assert len(theirs & {"torch", "psm"}) == 2
    assert ours == before


def leave(name: str) -> None:
    """As a worker does that is killed while it shares a tensor."""
    multiprocessing.get_context("spawn").Lock()
    Path(name.format(multiprocessing.current_process().pid)).touch()


def test_what_a_process_of_ours_leaves_is_ours() -> None:
    before = family.shared_memory()
    worker = multiprocessing.get_context("fork").Process(
        target=leave, args=(f"{family.SHARED}/torch_{{}}_1_0",)
    )
    worker.start()
    worker.join(60)
    (left,) = family.shared_memory() - before
    (family.SHARED / left).unlink()
    assert left == f"torch_{worker.pid}_1_0"


def test_what_this_process_holds_is_ours() -> None:
    before = family.shared_memory()
    lock = multiprocessing.get_context("spawn").Lock()  # whose name stays, for others to open
    held = set(os.listdir(family.SHARED))
    assert len(family.shared_memory() - before) == 1, (os.getpid(), held, lock)
    strategy = torch.multiprocessing.get_sharing_strategy()
    try:
        torch.multiprocessing.set_sharing_strategy("file_system")
        shared = torch.zeros(100).share_memory_()
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)
    assert len(family.shared_memory() - before) == 2
    del lock, shared
    assert family.shared_memory() == before
