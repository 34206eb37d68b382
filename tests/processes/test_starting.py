"""Workers that cannot be started: whatever step it fails at, nothing is left of the attempt."""

from __future__ import annotations

import gc
import multiprocessing.resource_tracker
import os
import resource
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from safeloader import SafeDataLoader, TransportError

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="descriptors are counted as Linux has them"
)

MOST = 40  # descriptors, with which two workers start for certain


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed is freed because nothing holds it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


PATIENCE_S = 300


def start(spare: int, method: str) -> bool:
    """Whether two workers started in a process that may open ``spare`` files more."""
    loader = SafeDataLoader(
        torch.arange(8), batch_size=4, num_workers=2, multiprocessing_context=method
    )
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = psutil.Process().num_fds() + spare
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
        iter(loader)
    except TransportError:
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    return True


def wait_for_workers() -> None:
    """Torch terminates workers that take long to end, and does not wait for them then."""
    for child in multiprocessing.active_children():
        child.join(PATIENCE_S)


def held() -> tuple[set[str], set[int]]:
    """Pipes, sockets and children of this process."""
    wait_for_workers()
    named = {os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()}
    children = {each.pid for each in psutil.Process().children()}
    return {name for name in named if name.startswith(("pipe:", "socket:"))}, children


# Under forkserver, a request that is cut short ends multiprocessing's server.
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
# Of sockets that are freed without a close.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.usefixtures("no_collector", "caplog")  # caplog keeps what is logged, as others do
def test_nothing_is_left_of_workers_that_could_not_be_started(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiprocessing.resource_tracker.ensure_running()
    assert start(MOST, method)
    said: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    before = held()
    for spare in range(MOST):
        started = start(spare, method)
        assert [str(each.exc_value) for each in said] == [], spare
        assert held() == before, spare
        if started:
            return
    pytest.fail("two workers never started")


# ── garbage collection ───────────────────────────────────────────────────────────────────────────


class Collected(torch.utils.data.Dataset[tuple[int, int]]):
    """Tells what a worker's collector has to walk, as a sample."""

    def __init__(self) -> None:
        self.entries = [[k] for k in range(50_000)]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[int, int]:
        mine = {id(each) for each in self.entries}
        walked = sum(id(each) in mine for each in gc.get_objects())
        return walked, gc.get_freeze_count()


class InitSees:
    """A worker_init_fn that wants the collector to have been told before it is called."""

    def __call__(self, worker: int) -> None:
        here = [0]
        if not gc.get_freeze_count() or not any(each is here for each in gc.get_objects()):
            raise RuntimeError("called before the collector was told")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_collects_nothing_of_what_it_came_with(method: str) -> None:
    before = gc.get_freeze_count()
    loader = SafeDataLoader(
        Collected(), num_workers=1, multiprocessing_context=method, worker_init_fn=InitSees()
    )
    for walked, frozen in loader:
        assert not walked
        assert frozen > 1000
    assert gc.get_freeze_count() <= before


def test_the_collector_can_be_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELOADER_GC_FREEZE", "0")
    before = gc.get_freeze_count()
    for walked, frozen in SafeDataLoader(Collected(), num_workers=1):
        assert walked == 50_000
        assert frozen <= before


class Lists(torch.utils.data.Dataset[tuple[int, int]]):
    """A sample is how many frames a stack has here, and the limit that the program has set."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[int, int]:
        return len(traceback.format_stack()), getattr(sys, "tracebacklimit", -1)


class ListsAtStart(Lists):
    def __call__(self, worker: int) -> None:
        self.found = self[0]
        assert self.found[0] > 5 or self.found[1] == 3


@pytest.mark.parametrize("limit", [None, 3])
def test_a_worker_lists_stacks_as_the_program_does(
    limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit is not None:
        monkeypatch.setattr(sys, "tracebacklimit", limit, raising=False)
    loader: SafeDataLoader[Any] = SafeDataLoader(
        Lists(),
        num_workers=2,
        multiprocessing_context="fork",
        worker_init_fn=ListsAtStart(),
    )
    for frames, known in loader:
        assert int(known) == (-1 if limit is None else limit)
        assert int(frames) > 5 if limit is None else int(frames) == limit
    assert getattr(sys, "tracebacklimit", None) == limit


def test_workers_are_of_the_class_that_the_context_has() -> None:
    context = multiprocessing.get_context("fork")
    loader = SafeDataLoader(Lists(), num_workers=1, multiprocessing_context=context)
    batches = iter(loader)
    (worker,) = multiprocessing.active_children()
    assert isinstance(worker, context.Process)
    assert repr(worker).startswith("<ForkProcess name='ForkProcess-")
    assert len(list(batches)) == 2


def test_what_the_variable_cannot_mean_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELOADER_GC_FREEZE", "maybe")
    with pytest.raises(ValueError, match="SAFELOADER_GC_FREEZE must be 1"):
        SafeDataLoader(Collected(), num_workers=1)
