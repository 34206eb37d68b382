"""Thousands of short epochs with faults at random; nothing may leak, nothing may be lost.

    python -m tests.soak --epochs 2000 --seed 0

Each epoch draws a loader (workers, persistence, order, policy) and a fault (an exception, an odd
sample, one that cannot be pickled, an exit, a signal from inside or from outside, an early break,
an exception of the training loop), and checks what came against what was drawn. At the end the
processes, descriptors, threads and shared memory are counted again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import logging
import os
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from safeloader import SafeDataLoader, SafeLoaderError, SampleError, WorkerCrashError
from tests import family

FAULTS = (
    "none",
    "none",
    "raise",
    "odd",
    "unpicklable",
    "exit",
    "sys.exit",
    "kill",
    "kill from outside",
    "break",
    "loop raises",
)
NEEDS_WORKERS = ("unpicklable", "exit", "sys.exit", "kill", "kill from outside")


class Faulty(torch.utils.data.Dataset[Any]):
    """Gives its index as a tensor, but for one, which does something else."""

    def __init__(self, size: int, bad: int, fault: str) -> None:
        self.size, self.bad, self.fault = size, bad, fault

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        if index == self.bad:
            if self.fault == "raise":
                raise KeyError(index)
            if self.fault == "odd":
                return None
            if self.fault == "unpicklable":
                return threading.Lock()
            if self.fault == "exit":
                os._exit(3)
            if self.fault == "sys.exit":
                sys.exit(1)
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor([index])


def as_list(samples: list[Any]) -> list[Any]:
    """A collate function that takes anything."""
    return samples


@dataclasses.dataclass
class Tally:
    """What the machine holds for this process; ``family.watch`` has to run before."""

    children: int
    descriptors: int
    threads: int
    shared: frozenset[str]

    @classmethod
    def now(cls) -> Tally:
        gc.collect()
        me = psutil.Process()
        give_up = time.monotonic() + 10
        while me.children(recursive=True) and time.monotonic() < give_up:
            time.sleep(0.01)
        return cls(
            len(me.children(recursive=True)),
            me.num_fds(),
            me.num_threads(),
            family.shared_memory(),
        )


hurt: weakref.WeakSet[SafeDataLoader[Any]] = weakref.WeakSet()  # with a worker killed from outside


class _LoopError(Exception):
    pass


@contextlib.contextmanager
def muffled() -> Iterator[None]:
    """No log lines: every fault is told in one."""
    logger = logging.getLogger("safeloader")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def epoch(rng: random.Random, kept: dict[int, SafeDataLoader[Any]]) -> str:
    """One epoch, checked; what it was."""
    fault = rng.choice(FAULTS)
    size = rng.randrange(1, 40)
    bad = rng.randrange(size)
    on_error = rng.choice(("raise", "skip", "replace"))
    on_crash = rng.choice(("raise", "restart"))
    workers = rng.choice((0, 1, 2, 2))
    if fault in NEEDS_WORKERS and workers == 0:
        workers = 2
    plain = fault == "unpicklable"
    loader: SafeDataLoader[Any]
    persistent = workers > 0 and rng.random() < 0.3
    repeats = persistent and fault in ("none", "break", "kill from outside")
    if repeats and kept and rng.random() < 0.7:
        loader = rng.choice(list(kept.values()))
        size, on_crash = len(loader.dataset), loader.on_crash  # type: ignore[arg-type]
        on_error = str(loader.on_error)
    else:
        loader = SafeDataLoader(
            Faulty(size, bad, fault),
            batch_size=rng.randrange(1, 8),
            shuffle=rng.random() < 0.5,
            num_workers=workers,
            persistent_workers=persistent,
            in_order=workers == 0 or rng.random() < 0.7,
            prefetch_factor=rng.randrange(1, 4) if workers else None,
            collate_fn=as_list if plain else None,
            on_error=on_error,
            on_crash=on_crash,
            max_skipped=1,
        )
        if repeats:
            kept[len(kept) % 3] = loader
    came: list[int] = []
    stop_after = rng.randrange(0, 6)
    error: BaseException | None = None
    try:
        iterator = iter(loader)
        for n, batch in enumerate(iterator):
            came += [int(value) for value in batch]
            if n == stop_after:
                if fault == "break":
                    break
                if fault == "loop raises":
                    raise _LoopError
                if fault == "kill from outside":
                    rng.choice(iterator._workers).kill()  # type: ignore[attr-defined]
                    hurt.add(loader)
    except (SafeLoaderError, _LoopError) as exc:
        error = exc.with_traceback(None)
    if isinstance(error, WorkerCrashError) and loader in hurt:
        hurt.discard(loader)  # told, perhaps in the epoch after
        fault = "kill from outside"
    _check(loader, fault, size, came, error, on_error, on_crash)
    return fault


def _check(
    loader: SafeDataLoader[Any],
    fault: str,
    size: int,
    came: list[int],
    error: BaseException | None,
    on_error: str,
    on_crash: str,
) -> None:
    audit = loader.audit
    assert audit is not None
    said = f"{fault}, {on_error}, {on_crash}: {error!r}\n{audit}"
    once = len(set(came)) == len(came)
    assert once or on_error == "replace", f"came twice: {sorted(came)}\n{said}"
    assert not audit.counts["missing"], said
    assert not audit.counts["duplicated"], said
    assert not audit.counts["unexpected"], said
    other = audit.counts["skipped"] + audit.counts["replaced"]
    assert audit.delivered + other >= len(set(came)), said
    if error is None and fault not in ("break",):
        assert audit.complete, said
        gone = set(audit.skipped.tolist() + audit.replaced.tolist())
        assert set(came) | gone == set(range(size)), said
        assert audit.delivered + len(gone) == size, said
    if fault in ("exit", "sys.exit", "kill") and on_crash == "raise":
        assert isinstance(error, WorkerCrashError), said
        assert error.index == loader.dataset.bad, said  # type: ignore[attr-defined]
    if fault in ("exit", "sys.exit", "kill") and on_crash == "restart":
        if error is None:
            gone = set(audit.skipped.tolist() + audit.replaced.tolist())
            assert gone == {loader.dataset.bad}, said  # type: ignore[attr-defined]
        else:  # alone in the batch drawn first: nothing was drawn before it to stand in for it
            assert on_error == "replace", said
            assert isinstance(error, SampleError), said
            assert error.failure.indices == (loader.dataset.bad,), said  # type: ignore[attr-defined]
            assert not came or not loader.in_order, said
    if fault in ("raise", "odd") and on_error == "raise" and error is not None:
        assert getattr(error, "index", None) in (loader.dataset.bad, None), said  # type: ignore[attr-defined]
    if fault == "unpicklable" and error is not None:
        assert error.index == loader.dataset.bad, said  # type: ignore[attr-defined]
    if fault == "none":
        assert error is None, said


def soak(epochs: int, seed: int, *, say: bool = False) -> tuple[Tally, Tally]:
    """Run ``epochs`` of them; what was held before and after."""
    rng = random.Random(seed)
    kept: dict[int, SafeDataLoader[Any]] = {}
    with muffled():
        for _ in range(20):  # what is loaded and started once, is
            epoch(rng, kept)
        kept.clear()
        before = Tally.now()
        for n in range(epochs):
            fault = epoch(rng, kept)
            if say and n % 100 == 0:
                print(n, fault, psutil.Process().num_fds(), flush=True)
        kept.clear()
        after = Tally.now()
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    family.watch()
    began = time.monotonic()
    held_before, held_after = soak(given.epochs, given.seed, say=True)
    print(f"{given.epochs} epochs in {time.monotonic() - began:.0f} s")
    print("before:", held_before)
    print("after: ", held_after)
    sys.exit(held_before != held_after)
