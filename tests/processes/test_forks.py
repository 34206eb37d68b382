"""Processes forked while an iterator is in use: freed there, it says nothing and stops nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, default_collate

from safeloader import SafeDataLoader

ROOT = Path(__file__).parents[2]
PROGRAM = """
import gc, multiprocessing, os, sys, warnings
from torch.utils.data import DataLoader
from safeloader import SafeDataLoader

class Samples:
    def __len__(self):
        return 40
    def __getitem__(self, i):
        return i

class Frees(Samples):
    def __getitem__(self, i):
        free()
        return i

def free():
    kept.clear()
    gc.collect()

how, kind = sys.argv[1:3]
options = dict(batch_size=2, num_workers=2, multiprocessing_context="fork")
options["persistent_workers"] = kind == "persistent"
loader = SafeDataLoader(Samples(), **options)
iterator = iter(loader)
got = len(next(iterator))
pids = [worker.pid for worker in iterator._workers]
kept = [iterator, loader]
if kind == "error":
    try:
        raise ValueError(iterator)
    except ValueError as error:
        error.iterator = iterator
        kept.append(error)
del loader
del iterator
warnings.simplefilter("ignore")
if how == "os.fork":
    if (pid := os.fork()) == 0:
        free()
        sys.stderr.flush()
        os._exit(0)
    os.waitpid(pid, 0)
elif how == "Process":
    process = multiprocessing.get_context("fork").Process(target=free)
    process.start()
    process.join()
else:
    cls = DataLoader if how == "stock" else SafeDataLoader
    list(cls(Frees(), batch_size=20, num_workers=1, multiprocessing_context="fork"))
for pid in pids:
    os.kill(pid, 0)  # they live
got += sum(map(len, kept[0]))
assert got == 40, got
print("done", flush=True)
os._exit(0)
"""


@pytest.mark.uncovered
@pytest.mark.parametrize("how", ["os.fork", "Process", "stock", "ours"])
@pytest.mark.parametrize("kind", ["plain", "persistent", "error"])
def test_an_iterator_that_a_forked_process_frees(how: str, kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how, kind],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
    assert "can only test" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_child_of_a_worker_keeps_the_batch_that_it_sees() -> None:
    asked, told = os.pipe(), os.pipe()

    class Rows(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 60

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.full((200_000,), float(index))

    def collate(samples: list[torch.Tensor]) -> Any:
        batch = default_collate(samples)
        if samples[0][0] == 2 and not os.fork():
            os.read(asked[0], 1)
            os.write(told[1], b"same" if (batch.numpy()[0] == 2).all() else b"changed")
            os._exit(0)
        return batch

    loader: SafeDataLoader[Any] = SafeDataLoader(
        Rows(), 2, num_workers=1, multiprocessing_context="fork", collate_fn=collate
    )
    for _ in loader:
        pass
    os.write(asked[1], b"x")
    assert os.read(told[0], 9) == b"same"
    for end in (*asked, *told):
        os.close(end)
