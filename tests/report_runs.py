"""Three runs for the report page, made as a user makes them: by real programs.

    python -m tests.report_runs FOLDER    # digits/, faults/ and ranks/ in it, a page of each

``faults``: six kinds of fault, samples skipped, replaced and late, one that is slow each time.
``ranks``: four ranks that are killed in the first attempt and go through in the second; rank 2
reads slowly.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import safeloader

ROOT = Path(safeloader.__file__).parents[1]
PATIENCE_S = 300
SLOW_INDEX, BAD_INDEX = 41, 13

FAULTS = """
import os, signal, sys, threading, time, torch
from safeloader import SafeDataLoader, checks

class Scans(torch.utils.data.Dataset):
    def __init__(self, fault, bad=(13,)):
        self.fault, self.bad = fault, bad
        self.asked = {}
        self.once = sys.argv[1] + "/killed-" + fault
    def __len__(self): return 96
    def __safeloader_source__(self, index): return f"scans/<b>patient {index}</b>/T1.nii"
    def __getitem__(self, index):
        if index == 41: time.sleep(0.03)
        self.asked[index] = self.asked.get(index, 0) + 1
        if index in self.bad:
            if self.fault == "key": return {}[f"<script>alert({index})</script>"]
            if self.fault == "once" and self.asked[index] % 2: raise OSError("no answer")
            if self.fault == "nan": return torch.full((8,), float("nan"))
            if self.fault == "shape": return torch.zeros(9)
            if self.fault == "unsendable": return threading.Lock()
            if self.fault == "hangs": time.sleep(3600)
            if self.fault == "killed" and not os.path.exists(self.once):
                open(self.once, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((8,), float(index))

def several(loader, epochs=3):
    for _ in range(epochs):
        for batch in loader: time.sleep(0.002)

def as_list(samples): return samples
def gentle(samples): return torch.stack(samples)

run = dict(batch_size=8, num_workers=2, run_dir=sys.argv[1] + "/faults")
several(SafeDataLoader(Scans("key", (13, 50)), on_error="skip", persistent_workers=True, **run))
several(SafeDataLoader(Scans("nan"), on_error="replace", validate=checks.finite(), **run), 1)
several(SafeDataLoader(Scans("once"), retries=1, **run), 1)
several(SafeDataLoader(Scans("killed"), on_crash="restart", **run), 1)
for fault, more in (("shape", dict(collate_fn=gentle)), ("unsendable", dict(collate_fn=as_list)),
                    ("hangs", dict(timeout=2))):
    try:
        several(SafeDataLoader(Scans(fault), **run, **more), 1)
    except Exception as error:
        print(type(error).__name__)
"""

RANKS = """
import os, sys, time, torch
from safeloader import SafeDataLoader
rank = int(os.environ["RANK"])

class Numbers(torch.utils.data.Dataset):
    def __len__(self): return 512
    def __getitem__(self, index):
        time.sleep(0.002 if rank == 2 else 0.0002)
        return torch.tensor(index)

data = Numbers()
sampler = torch.utils.data.DistributedSampler(data, num_replicas=4, rank=rank)
loader = SafeDataLoader(data, 8, sampler=sampler, num_workers=1, persistent_workers=True)
step = 0
for epoch in range(2):
    sampler.set_epoch(epoch)
    for batch in loader:
        time.sleep(0.005)
        loader.mark(step)
        step += 1
        if sys.argv[1] == "dies" and step == 20:
            print("here", flush=True)
            sys.stdin.read()
"""


def surroundings(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if "SAFELOADER" not in name}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return clean | {"PYTHONPATH": path} | more


def done(*words: str, **more: str) -> str:
    """Run a Python program; what it printed."""
    return subprocess.run(
        [sys.executable, *words],
        env=surroundings(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    ).stdout


def digits(folder: Path) -> Path:
    """The example."""
    run = folder / "digits"
    done(str(ROOT / "examples" / "train_digits.py"), "--epochs", "3", SAFELOADER_RUN=str(run))
    return run


def faults(folder: Path) -> Path:
    """Faults of six kinds, in seven loaders."""
    said = done("-c", FAULTS, str(folder))
    assert len(said.split()) == 3, said
    return folder / "faults"


def ranks(folder: Path) -> Path:
    """Four ranks, killed with all that belongs to them, and started again."""
    run = folder / "ranks"
    start = {"TORCHELASTIC_RUN_ID": "job", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    start |= {"SAFELOADER_RUN": str(run), "WORLD_SIZE": "4"}
    for what in ("dies", "lives"):
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", RANKS, what],
                env=surroundings(**start, RANK=str(rank)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            for rank in range(4)
        ]
        try:
            for each in processes:
                assert each.stdout is not None
                if what == "dies":
                    assert each.stdout.readline() == b"here\n"
                else:
                    each.communicate(timeout=PATIENCE_S)
                    assert each.returncode == 0
        finally:
            for each in processes:
                if each.returncode is None:
                    os.killpg(each.pid, signal.SIGKILL)
                    each.communicate()
    return run


MADE = {"digits": digits, "faults": faults, "ranks": ranks}

if __name__ == "__main__":
    from safeloader.commands.report import write_page

    where = Path(sys.argv[1])
    where.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or MADE:
        print(name, write_page(MADE[name](where), where / f"{name}.html"), flush=True)
