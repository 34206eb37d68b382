"""Workers under spawn and forkserver that read one pickle have what stock's have.

What is one object, shared or private there is in ``tests/unit/test_arguments.py``. Here processes
are started.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from safeloader import SafeDataLoader, TransportError, WorkerCrashError

every_method = pytest.mark.parametrize("method", ["spawn", "forkserver"])


class Shared:
    """Has one of each kind; a sample is what a worker sees, and it leaves its mark."""

    def __init__(self, method: str) -> None:
        context: Any = multiprocessing.get_context(method)
        self.times = 0
        self.tensor = torch.zeros(4, dtype=torch.int64)
        self.lock = context.Lock()
        self.queue = context.Queue()
        self.total = context.Value("i", 0)
        self.texts = [f"text {k}" for k in range(20_000)]

    def __getstate__(self) -> dict[str, Any]:
        self.times += 1
        return vars(self).copy()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[int, str, bool]:
        with self.lock, self.total.get_lock():
            self.total.value += 1
            self.tensor[index] += 1
        self.queue.put(index)
        info: Any = get_worker_info()
        return index, self.texts[-index - 1], info.dataset is self

    def collate(self, batch: list[Any]) -> Any:
        info: Any = get_worker_info()
        return batch, info.dataset is self


def seen(loader: type[DataLoader[Any]], method: str, **kwargs: Any) -> tuple[Any, int]:
    """All that one epoch gives and leaves behind, and how often the dataset was pickled."""
    dataset: Any = Shared(method)
    batches = list(
        loader(
            dataset,
            num_workers=2,
            multiprocessing_context=method,
            collate_fn=dataset.collate,
            **kwargs,
        )
    )
    put = sorted(dataset.queue.get(timeout=300) for _ in range(4))
    dataset.queue.close()
    return (batches, put, dataset.total.value, dataset.tensor.tolist()), dataset.times


@every_method
def test_workers_have_what_stocks_have(method: str) -> None:
    stocks, for_each = seen(DataLoader, method)
    ours, once = seen(SafeDataLoader, method)
    assert ours == stocks
    assert (for_each, once) == (2, 1)


def test_a_timeout_does_not_count_the_reading_of_it() -> None:
    assert seen(SafeDataLoader, "forkserver", timeout=300)[1] == 2


def test_it_can_be_pickled_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELOADER_PICKLE_ONCE", "0")
    assert seen(SafeDataLoader, "forkserver")[1] == 2
    monkeypatch.setenv("SAFELOADER_PICKLE_ONCE", "never")
    with pytest.raises(ValueError, match="SAFELOADER_PICKLE_ONCE must be 1"):
        SafeDataLoader([1])  # type: ignore[arg-type]


# ── what fails ───────────────────────────────────────────────────────────────────────────────────


class Held(torch.utils.data.Dataset[int]):
    def __init__(self, held: Any, at: int = -1) -> None:
        self.held = held
        self.at = at

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if index == self.at and self.held == "to die":
            os.kill(os.getpid(), signal.SIGKILL)
        return 1 if self.held == "anew" else 0


class Raises:
    def __reduce__(self) -> Any:
        raise LookupError("not this one")


def grad() -> Any:
    return torch.ones(2, requires_grad=True) * 2


@pytest.mark.parametrize("make", [lambda: lambda: 0, threading.Lock, Raises, grad])
@every_method
def test_what_cannot_be_pickled_is_told_as_ever(
    method: str, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> Any:
        loader = SafeDataLoader(Held([make()]), num_workers=2, multiprocessing_context=method)
        with pytest.raises(TransportError) as raised:
            iter(loader)
        exc: Any = raised.value
        said = re.sub(r"_identity=\(\d+,\)", "", str(exc))  # of a process: which number it has
        return type(exc).__mro__[1:], said, exc.failure.hint, exc.failure.exception_type

    once = told()
    monkeypatch.setenv("SAFELOADER_PICKLE_ONCE", "0")
    assert told() == once


class Interrupted:
    def __reduce__(self) -> Any:
        raise KeyboardInterrupt


def memories() -> int:
    """How many anonymous files of ours are open here."""
    gc.collect()
    links = [each for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    return sum("safeloader" in os.readlink(each) for each in links)


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="descriptors are counted as Linux has them"
)


@needs_proc
@every_method
def test_an_interrupt_leaves_nothing(method: str) -> None:
    before = memories()
    loader = SafeDataLoader(Held(Interrupted()), num_workers=2, multiprocessing_context=method)
    with pytest.raises(KeyboardInterrupt):
        iter(loader)
    del loader
    assert memories() == before
    assert multiprocessing.active_children() == []


def end_at_once() -> None:
    """Under coverage ``os._exit`` itself is a local function, which cannot be pickled."""
    os._exit(3)


class Dies:
    """Ends the process in which it is unpickled."""

    def __reduce__(self) -> Any:
        return end_at_once, ()


@needs_proc
@every_method
def test_a_worker_that_dies_as_it_reads_is_told(method: str) -> None:
    before = memories()
    loader = SafeDataLoader(Held(Dies()), num_workers=2, multiprocessing_context=method)
    with pytest.raises(WorkerCrashError, match="exit"):
        next(iter(loader))
    del loader
    assert memories() == before


def test_restarted_workers_read_the_dataset_as_it_is_then() -> None:
    dataset = Held("to die", at=4)
    loader = SafeDataLoader(
        dataset,
        batch_size=2,
        num_workers=1,
        prefetch_factor=1,
        multiprocessing_context="forkserver",
        on_crash="restart",
    )
    batches = iter(loader)
    got = [int(next(batches).sum())]
    dataset.held = "anew"
    got += [int(each.sum()) for each in batches]
    assert got[0] == 0
    assert got[2:] == [2, 2]
