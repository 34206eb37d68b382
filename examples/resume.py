"""A training that is killed and goes on, on other workers and other ranks: bit for bit the same.

::

    pip install -e '.[examples]'       # scikit-learn, which brings the digits, and tqdm
    python examples/resume.py          # both parts, in about a minute

Part one trains a network without an interruption, and once more with ``kill -9`` at random steps,
each time going on with another number of workers. The weights are the same, bit for bit. Part two
draws global batches on four ranks, is killed, and goes on with two: the samples of every global
batch are those of one process that was not interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from train_digits import load_split

from safeloader import GlobalBatchSampler, SafeStatefulDataLoader

EPOCHS, BATCH = 2, 64
GLOBAL_BATCH, GLOBAL_BATCHES = 96, 14  # of 1437 digits


def digest(tensors: Sequence[Tensor]) -> str:
    """Of all bits of some tensors."""
    told = hashlib.sha256()
    for each in tensors:
        told.update(each.detach().contiguous().numpy().tobytes())
    return told.hexdigest()[:16]


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Whole or not at all, whenever the process is killed."""
    torch.save(checkpoint, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


# ── part one: one process ────────────────────────────────────────────────────────────────────────


def train(folder: Path, workers: int, die_at: int | None) -> None:
    """Train from the checkpoint in ``folder``, if there is one; step ``die_at`` is the last."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    digits, _ = load_split(seed=0)
    loader = SafeStatefulDataLoader(
        digits, batch_size=BATCH, shuffle=True, num_workers=workers, seed=11
    )
    path, step = folder / "checkpoint.pt", 0
    if path.exists():
        checkpoint = torch.load(path, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])  # of the dropout
        loader.load_state_dict(checkpoint["loader"])
        step = checkpoint["step"]
    while loader.state_dict()["epoch"] < EPOCHS:
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            step += 1
            checkpoint = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "loader": loader.state_dict(),
                "step": step,
            }
            save(checkpoint, path)
            if step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        print(f"    {str(loader.audit).splitlines()[0]}")
        for line in str(loader.audit).splitlines()[1:]:
            print(f"    {line}")
    print("weights", digest(list(model.state_dict().values())))


def part_one(folder: Path) -> bool:
    print("One run without an interruption, 0 workers:")
    output = run("train", folder / "whole", "--workers", 0)
    whole = last_word(output)
    steps = sorted(random.SystemRandom().sample(range(3, 42), 2))
    for step, workers in zip([*steps, None], (2, 1, 2), strict=True):
        until = "to its end" if step is None else f"killed with -9 at step {step}"
        print(f"The same run, {workers} workers, {until}:")
        die = [] if step is None else ["--die-at", step]
        output = run("train", folder / "killed", "--workers", workers, *die, dies=step is not None)
    same = last_word(output) == whole
    print(f"Weights: {whole} and {last_word(output)}: {'the same' if same else 'NOT THE SAME'}\n")
    return same


# ── part two: ranks ──────────────────────────────────────────────────────────────────────────────


def draw(folder: Path, rank: int, world: int, die_at: int | None) -> None:
    """One rank: write a digest of the samples of each global batch."""
    store = folder / f"store-of-{world}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    digits, _ = load_split(seed=0)
    sampler = GlobalBatchSampler(len(digits), GLOBAL_BATCH, seed=5)
    loader = SafeStatefulDataLoader(digits, batch_sampler=sampler, num_workers=1, seed=11)
    path = folder / "state.pt"
    if path.exists():
        loader.load_state_dict(torch.load(path, weights_only=True))  # that of rank 0, on all
    for images, _ in loader:
        shares = [torch.empty_like(images) for _ in range(world)]
        dist.all_gather(shares, images)
        number = loader.last_batch.batch
        if rank == 0:
            with (folder / "batches.txt").open("a") as out:
                out.write(f"{number} {digest([torch.cat(shares)])}\n")
            save(loader.state_dict(), path)
        dist.barrier()
        if number == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
    dist.destroy_process_group()


def ranks(folder: Path, world: int, die_at: int | None = None) -> None:
    """Start all ranks, and wait for them."""
    folder.mkdir(exist_ok=True)
    die = [] if die_at is None else ["--die-at", str(die_at)]
    started = []
    for rank in range(world):
        which = ["--rank", str(rank), "--world", str(world), *die]
        started.append(subprocess.Popen([sys.executable, __file__, "draw", folder, *which]))
    ended = [each.wait() for each in started]
    if die_at is None and any(ended):
        raise SystemExit(f"the ranks ended with {ended}")


def part_two(folder: Path) -> bool:
    print("Global batches on one rank, without an interruption")
    ranks(folder / "one", 1)
    die_at = random.SystemRandom().randrange(2, 11)
    print(f"The same on 4 ranks, killed with -9 at batch {die_at}, and then on 2")
    ranks(folder / "many", 4, die_at)
    ranks(folder / "many", 2)
    one, many = ((folder / name / "batches.txt").read_text() for name in ("one", "many"))
    same = one == many
    said = "the same samples, bit for bit" if same else "NOT THE SAME"
    print(f"{len(one.splitlines())} global batches and {len(many.splitlines())}: {said}")
    return same


# ── running ──────────────────────────────────────────────────────────────────────────────────────


def run(part: str, folder: Path, *arguments: object, dies: bool = False) -> str:
    """A part of this program in a process of its own; what it printed."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, __file__, part, folder, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    print("\n".join(lines + ["    killed"] * (done.returncode == -signal.SIGKILL)))
    if done.returncode != (-signal.SIGKILL if dies else 0):
        raise SystemExit(f"{part} ended with {done.returncode}")
    return done.stdout


def last_word(output: str) -> str:
    return output.split()[-1]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="examples/resume.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="?", choices=["all", "train", "draw"], default="all")
    parser.add_argument("folder", nargs="?", type=Path, help="where its checkpoint lies")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--die-at", type=int)
    given = parser.parse_args(arguments)
    if given.part == "train":
        train(given.folder, given.workers, given.die_at)
        return 0
    if given.part == "draw":
        draw(given.folder, given.rank, given.world, given.die_at)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        same = [part_one(Path(folder)), part_two(Path(folder))]
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
