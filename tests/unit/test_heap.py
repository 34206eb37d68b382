"""What samples were in serves the next batch, and goes back where a worker waits."""

from __future__ import annotations

import os
import platform
import queue
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from safeloader import SafeDataLoader
from safeloader.transport.channel import TaskQueue
from safeloader.worker import heap
from safeloader.worker.heap import KeptHeap

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's heap")

FAULTS = """
import mmap, resource, torch
from safeloader.worker.heap import KeptHeap

def batch():
    "Page faults of a batch: 64 samples of 0.5 MiB are made, and freed."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    samples = [torch.ones(1 << 17) for _ in range(64)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = KeptHeap()
batch()
kept.keep()
batch()  # at the end of the heap now
faults = [batch()]
kept.give_back()
faults.append(batch())
kept.give_back()  # nothing was made that is kept
faults.append(batch())
print(*faults, 64 * (1 << 19) // mmap.PAGESIZE)
"""


def faults(**environ: str) -> list[int]:
    """Of a batch that follows one, of one that follows a wait, and of another; pages of each."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env={**os.environ, **environ},
        check=True,
        capture_output=True,
        text=True,
    )
    return list(map(int, done.stdout.split()))


@glibc
def test_a_batch_finds_the_memory_of_the_one_before() -> None:
    following, after_a_wait, further, pages = faults()
    assert following < pages / 8
    assert after_a_wait > pages / 2
    assert further < pages / 8


@glibc
@pytest.mark.parametrize(
    "environ",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ],
)
def test_who_sets_the_heap_has_it_so(environ: dict[str, str]) -> None:
    following, after_a_wait, further, pages = faults(**environ)
    assert min(following, after_a_wait, further) > pages / 2


def test_it_is_left_alone_with_another_c_library_or_where_it_is_not_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def libc_of(kept: KeptHeap) -> Any:
        kept.keep()
        kept.give_back()
        return kept._libc

    assert libc_of(KeptHeap(0)) is None
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    assert libc_of(KeptHeap()) is None


def test_what_is_kept_and_the_time_to_give_it_back_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The heap of a large program takes long to walk."""
    now = 0.0
    trimmed: list[float] = []
    told: dict[int, int] = {}

    class Slow:
        gnu_get_libc_version = None

        def mallopt(self, parameter: int, value: int) -> None:
            told[parameter] = value

        def malloc_trim(self, pad: int) -> None:
            nonlocal now
            trimmed.append(now)
            now += 0.5

    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: Slow())
    monkeypatch.setattr(heap, "perf_counter", lambda: now)
    kept = KeptHeap(5 << 20)
    for _ in range(200):
        kept.keep()
        kept.give_back()
        now += 1.0
    assert len(trimmed) == 4
    assert min(after - before for before, after in pairwise(trimmed)) >= 50
    assert told == {heap._M_MMAP_THRESHOLD: 32 << 20, heap._M_TRIM_THRESHOLD: 5 << 20}


KEPT = """
import torch
from safeloader.introspect.resources import anonymous_bytes
from safeloader.worker.heap import KeptHeap

kept = KeptHeap()
print(kept.kept_bytes())
kept.keep()
held = []  # what is in use counts as it is, and lies above what is free
for _ in range(4):
    samples = [torch.ones(1 << 17) for _ in range(64)]
    held.append(torch.ones(1 << 20))
    in_use = anonymous_bytes() - kept.kept_bytes()
    del samples
    print(in_use, anonymous_bytes() - kept.kept_bytes(), kept.kept_bytes())
    if len(held) == 2:
        kept.give_back()
"""


@glibc
def test_what_is_only_kept_is_known() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], check=True, capture_output=True, text=True)
    before, *batches = done.stdout.splitlines()
    assert before == "0"
    samples, held = 64 << 19, 4 << 20
    told = [tuple(map(int, line.split())) for line in batches]
    for (in_use, after, kept), (_, following, _) in pairwise(told):
        assert abs(in_use - samples - after) < held / 2
        assert abs(following - after - held) < held / 2
        assert kept > samples / 2


class Kept(Dataset[tuple[Any, Any]]):
    """Samples of some bytes, and whether this worker's heap is kept."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        told: Any = TaskQueue.waits
        return torch.ones(self.size, dtype=torch.uint8), told.__self__._libc is not None


@glibc
@pytest.mark.parametrize(
    ("size", "environ", "kept"),
    [
        (1 << 20, {}, [False, True, True]),
        (1 << 10, {}, [False, False, False]),
        (1 << 20, {"SAFELOADER_KEEP_HEAP": "0"}, [False, False, False]),
    ],
)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_keeps_its_heap_from_a_large_batch_on(
    size: int,
    environ: dict[str, str],
    kept: list[bool],
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    loader = SafeDataLoader(Kept(size), batch_size=2, num_workers=1, multiprocessing_context=method)
    assert [bool(told.all()) for _, told in loader] == kept


def test_a_value_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELOADER_KEEP_HEAP", "yes")
    with pytest.raises(ValueError, match="SAFELOADER_KEEP_HEAP must be 1"):
        SafeDataLoader([1], num_workers=1)


def test_it_is_told_that_a_worker_waits_where_there_is_no_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[None] = []
    monkeypatch.setattr(TaskQueue, "waits", staticmethod(lambda: waited.append(None)))
    tasks = TaskQueue(lambda task, exc: task)
    tasks.put(None)
    assert tasks.get() is None
    assert waited == []
    with pytest.raises(queue.Empty):
        tasks.get(timeout=0.01)
    assert len(waited) == 1
    tasks.close()
