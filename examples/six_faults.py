"""Six faults that people meet, with PyTorch's loader and with ours: what does each say?

    python examples/six_faults.py              # all six, side by side
    python examples/six_faults.py killed       # one of them

Each runs in a process of its own, for ten seconds at most; the documentation shows what came out.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import torch
from torch.utils.data import DataLoader

from safeloader import SafeDataLoader

BAD = 137
LIMIT_S = 10


class Scans(torch.utils.data.Dataset[Any]):
    """A thousand samples, one of which does what a fault does."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.names = {index: f"scan {index}" for index in range(1000) if index != BAD}
        self.lock = threading.Lock() if fault == "hangs" else None
        self.scale = (lambda x: x / 2) if fault == "lambda" else None

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> Any:
        if index == BAD:
            if self.fault == "key":
                return self.names[index]
            if self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
            if self.fault == "segfault":
                ctypes.string_at(0)  # as a bug in a native library
            if self.fault == "unsendable":
                return {"image": torch.zeros(3), "meta": [threading.Lock()]}
            if self.fault == "hangs" and self.lock is not None:
                self.lock.acquire()
                self.lock.acquire()
        return {"image": torch.zeros(3), "meta": [index]}


def as_list(samples: list[Any]) -> list[Any]:
    """A collate function that takes anything."""
    return samples


FAULTS: dict[str, dict[str, Any]] = {
    "key": {},
    "killed": {},
    "segfault": {},
    "hangs": {"timeout": 3},
    "unsendable": {"collate_fn": as_list},
    "lambda": {"multiprocessing_context": "spawn"},
}


def run(fault: str, loader_class: type[DataLoader[Any]]) -> None:
    """One epoch, and what it raised."""
    loader = loader_class(Scans(fault), batch_size=16, num_workers=2, **FAULTS[fault])
    try:
        for _ in loader:
            pass
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)


def side_by_side(fault: str) -> None:
    """Both loaders, each in a process of its own."""
    for whose in ("torch", "safeloader"):
        print(f"\n──── {fault}, {whose} " + "─" * 40, flush=True)
        command = [sys.executable, __file__, fault, "--with", whose]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            print(f"(nothing after {LIMIT_S} seconds)", flush=True)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("fault", nargs="?", choices=sorted(FAULTS))
    parser.add_argument("--with", dest="whose", choices=("torch", "safeloader"))
    given = parser.parse_args()
    if given.whose:
        run(given.fault, DataLoader if given.whose == "torch" else SafeDataLoader)
    else:
        for name in [given.fault] if given.fault else FAULTS:
            side_by_side(name)
