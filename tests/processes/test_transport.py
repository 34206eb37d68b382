"""Batches that cross in slots, with real workers: kept, forked over, short of memory and files."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, default_collate

from safeloader import SafeDataLoader, TransportError, WorkerCrashError
from safeloader.transport import slot_budget
from safeloader.transport import slot_writer as worker_slots
from tests import family
from tests.oracle import seed_all
from tests.telling import told
from tests.wired import KB, MB, Child, child, descriptors, print_of

WIDE = 20 * KB  # numbers in a row: a batch of four is too large to cross within a message


class Rows:
    """Row ``i`` is full of ``i``; as a tensor, an array, or something else."""

    def __init__(self, length: int, wide: int = WIDE, make: Callable[[int], Any] | None = None):
        self.length = length
        self.wide = wide
        self.make = make

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if self.make is not None:
            return self.make(index)
        return torch.full((self.wide,), float(index))


def arrays(samples: list[torch.Tensor]) -> Any:
    return {"x": torch.stack(samples).numpy(), "first": samples[0]}


def same(samples: Any) -> Any:
    return samples


def loader_of(length: int, workers: int = 2, **extra: Any) -> SafeDataLoader[Any]:
    wide = extra.pop("wide", WIDE)
    make = extra.pop("make", None)
    return SafeDataLoader(
        Rows(length, wide, make), **{"batch_size": 4, "num_workers": workers} | extra
    )


def right(batches: list[Any]) -> bool:
    numbers = torch.cat([batch[:, 0] for batch in batches])
    return bool(numbers.eq(torch.arange(len(numbers))).all()) and all(
        bool(batch.eq(batch[:, :1]).all()) for batch in batches
    )


def eventually(true: Callable[[], bool], bound_s: float = 20.0) -> bool:
    give_up = time.monotonic() + bound_s
    while not true() and time.monotonic() < give_up:
        time.sleep(0.005)
    return true()


def all_mapped() -> int:
    with open("/proc/self/maps") as maps:
        return sum("memfd:safeloader" in line for line in maps)


left_over: list[int] = [0]


@pytest.fixture(autouse=True)
def mapped_before() -> None:
    """Other tests may keep some."""
    gc.collect()
    left_over[0] = all_mapped()


def slots_mapped() -> int:
    return all_mapped() - left_over[0]


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# ── batches that are kept ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("batches", [50, 300])
def test_a_loop_that_keeps_every_batch(batches: int, no_garbage_collector: None) -> None:
    loader = loader_of(4 * batches, wide=2 * KB)
    kept = list(loader)
    assert right(kept)
    assert loader.transport_stats.batches == {"slots": batches}
    assert loader.transport_stats.slots == batches
    del kept
    assert loader.transport_stats.slots == 0
    assert slots_mapped() == 0


def test_beyond_the_bound_batches_go_torchs_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_budget, "process_bytes", lambda: 8 * MB)
    loader = loader_of(4 * 60)
    kept = list(loader)
    assert right(kept)
    stats = loader.transport_stats
    assert stats.bytes <= 8 * MB
    assert stats.batches["slots"] >= 10
    assert stats.batches["message"] >= 10  # they are small
    assert sum(stats.fallbacks.values()) == stats.batches["message"]
    # Less for a moment, if main divides while the other worker asks for a slot.
    most = [
        int(why.removesuffix(" bytes of slots hold batches that are in use"))
        for why in stats.fallbacks
    ]
    assert max(most) == 4 * MB
    assert min(most) >= 4 * MB - 512 * KB
    assert "not in a slot" in str(stats)


@pytest.mark.parametrize(("wide", "way"), [(None, "message"), (MB, "torch")])
def test_batches_larger_than_the_bound_go_torchs_way(
    wide: int | None, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot_budget, "process_bytes", lambda: 200 * KB)
    loader = loader_of(12) if wide is None else loader_of(12, wide=wide)
    assert right(list(loader))
    why = f"a batch needs more than the {100 * KB} bytes that a worker's slots may hold"
    assert loader.transport_stats.fallbacks == {why: 3}
    assert loader.transport_stats.batches == {way: 3}


def test_all_loaders_of_the_process_keep_to_one_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    monkeypatch.setattr(slot_budget, "process_bytes", lambda: 16 * MB)
    loaders = [loader_of(4 * 30, persistent_workers=True) for _ in range(4)]
    kept: list[list[Any]] = [[] for _ in loaders]
    for batches in zip(*loaders, strict=True):
        for mine, batch in zip(kept, batches, strict=True):
            mine.append(batch)
        assert sum(loader.transport_stats.bytes for loader in loaders) <= 16 * MB
    assert all(map(right, kept))
    for loader in loaders:
        assert loader.transport_stats.batches["slots"] >= 4
        assert any("bytes" in why for why in loader.transport_stats.fallbacks)


def test_one_that_comes_later_gets_what_is_left_and_more_when_that_is_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gc.collect()
    monkeypatch.setattr(slot_budget, "process_bytes", lambda: 8 * MB)
    first = loader_of(4 * 40)
    kept = list(first)  # past its workers' end
    held = first.transport_stats.bytes
    assert held > 4 * MB
    later = loader_of(4 * 40, persistent_workers=True)
    batches = list(later)
    assert right(batches)
    assert held + later.transport_stats.bytes <= 8 * MB
    before = later.transport_stats.batches.get("slots", 0)
    del kept, batches
    assert right(list(later))
    assert later.transport_stats.batches["slots"] >= before + 10


@pytest.mark.parametrize(
    ("said", "ranks"), [("4", 4), ("", 1), ("0", 1), ("-2", 1), ("four", 1), ("²", 1), ("1e3", 1)]
)
def test_the_ranks_of_a_machine_divide_it(
    said: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = slot_budget.process_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
    assert slot_budget.process_bytes() == whole // ranks


def test_a_loop_that_drops_its_batches_uses_few_slots(no_garbage_collector: None) -> None:
    loader = loader_of(400)
    seen = 0
    for batch in loader:
        seen += len(batch)
        assert loader.transport_stats.slots <= 10
    assert seen == 400
    del batch
    assert loader.transport_stats.slots == 0
    assert slots_mapped() == 0


def test_persistent_workers_over_many_epochs(no_garbage_collector: None) -> None:
    loader = loader_of(24, persistent_workers=True)
    slots = []
    for _ in range(30):
        assert right(list(loader))
        slots.append(loader.transport_stats.slots)
    assert max(slots) <= 12
    assert slots[-1] <= slots[9]
    del loader
    assert slots_mapped() == 0


def test_slots_of_a_rush_are_given_back(
    no_garbage_collector: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_slots, "_IDLE_BATCHES", 32)
    loader = loader_of(200, persistent_workers=True)
    assert right(list(loader))  # fifty at once
    for _ in range(4):
        for batch in loader:
            del batch
    assert loader.transport_stats.slots <= 12


@pytest.mark.parametrize("persistent", [False, True])
def test_an_iterator_made_again_while_batches_of_the_last_are_held(persistent: bool) -> None:
    loader = loader_of(40, persistent_workers=persistent)
    kept = []
    for _ in range(4):
        for number, batch in enumerate(loader):
            kept.append(batch)
            if number == 4:
                break
    assert all(right(kept[k : k + 5]) for k in range(0, 20, 5))
    assert right(list(loader))


def test_a_loader_dropped_while_its_batches_are_held() -> None:
    loader = loader_of(24)
    kept = list(loader)
    del loader
    gc.collect()
    assert right(kept)
    assert slots_mapped() == 6
    del kept
    assert slots_mapped() == 0


def test_batches_in_any_order_and_two_loaders_at_once() -> None:
    one = loader_of(80, in_order=False)
    other = loader_of(80, collate_fn=arrays)
    kept = []
    for batch, pair in zip(one, other, strict=True):
        kept.append((batch, pair["x"]))
    assert right(sorted((batch for batch, _ in kept), key=lambda x: float(x[0, 0])))
    assert right([torch.from_numpy(array) for _, array in kept])


@pytest.mark.parametrize("loader_class", [DataLoader, SafeDataLoader])
def test_changes_in_place_reach_what_shares_memory_and_no_other(loader_class: type) -> None:
    def both(samples: list[Any]) -> Any:
        batch = default_collate(samples)
        return batch, batch[1:], [batch.view(-1)]

    loader = loader_class(Rows(80), batch_size=4, num_workers=1, collate_fn=both)
    for number, (batch, part, (flat,)) in enumerate(loader):
        assert batch[:, 7].tolist() == [4 * number + k for k in range(4)]
        part.fill_(-1)
        assert flat[WIDE:].eq(-1).all()
        batch.mul_(0)
        assert flat.eq(0).all()


# ── forks ────────────────────────────────────────────────────────────────────────────────────────


def test_a_child_that_lives_on_keeps_what_it_saw() -> None:
    loader = loader_of(400)
    batches = iter(loader)
    kept: Any = [next(batches) for _ in range(5)]
    expected = [print_of(batch) for batch in kept]
    with child(lambda: [print_of(batch) for batch in kept] == expected):
        kept = None
        rest = [float(batch[0, 0]) for batch in batches]
    assert rest == [4.0 * k for k in range(5, 100)]
    assert loader.transport_stats.batches == {"slots": 100}


@pytest.mark.parametrize("end", [os._exit, sys.exit])
def test_a_child_that_ends_leaves_the_parents_slots(end: Callable[[int], Any]) -> None:
    loader = loader_of(120)
    batches = iter(loader)
    kept = [next(batches) for _ in range(5)]

    def let_go() -> bool:
        kept.clear()
        gc.collect()
        return True

    assert Child(let_go, end).agrees()
    kept += batches
    assert right(kept)


def with_a_fork(samples: list[Any]) -> Any:
    """Forks in the worker: a child that looks at the batch when the worker is some batches on."""
    batch = default_collate(samples)
    expected = print_of(batch)
    children.append(Child(lambda: print_of(batch) == expected))
    agreed = len(children) <= 3 or children.pop(0).agrees()
    return batch, agreed


children: list[Child] = []


def test_forks_within_a_worker() -> None:
    kept = list(loader_of(48, workers=1, collate_fn=with_a_fork))
    assert right([batch for batch, _ in kept])
    assert all(agreed for _, agreed in kept)


@pytest.mark.parametrize("export", [torch.Tensor.numpy, np.from_dlpack])
@pytest.mark.parametrize("share", [torch.Tensor.share_memory_, ForkingPickler.dumps])
def test_what_was_exported_stays_when_its_batch_is_shared(
    export: Callable[[Any], Any], share: Callable[[Any], Any]
) -> None:
    def seen(loader: Any) -> list[int]:
        batches = iter(loader)
        batch = next(batches)
        array = export(batch)
        share(batch)
        told = [print_of(array)]
        for later in batches:
            del later
            told.append(print_of(array))
        return told

    assert seen(loader_of(64)) == seen(DataLoader(Rows(64), batch_size=4, num_workers=2))


COMPILED = """
import torch
from tests.processes.test_transport import loader_of
from tests.wired import print_of

# Any backend of torch.compile is given the tensors, and hands on what it makes, as this one.
cut = torch.compile(lambda batch: batch[1:].flatten()[::3], backend="eager")
batches = iter(loader_of(64))
views = [cut(next(batches)) for _ in range(3)]
told = [print_of(view) for view in views]
for batch in batches:
    del batch
assert told == [print_of(view) for view in views], "a view was written over"
assert len(set(told)) == 3
"""


def test_what_a_compiled_function_gives_stays() -> None:
    """In a process of its own: what torch.compile imports stays, and slows the collector down."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=300)


# ── workers that die, errors ─────────────────────────────────────────────────────────────────────


class Dies(Rows):
    """Its worker is killed from within while it is stacked: as its third row is read."""

    def __getitem__(self, index: int) -> Any:
        return Deadly(index) if index == 30 else super().__getitem__(index)


class Deadly:
    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("not reached")


def test_a_worker_killed_while_it_writes(no_garbage_collector: None) -> None:
    before = descriptors(), family.shared_memory()
    kept = []
    loader = SafeDataLoader(Dies(80), batch_size=4, num_workers=2, collate_fn=same)
    batches = iter(loader)
    for _ in range(7):
        batch = next(batches)
        kept.append(batch[0][None])
    with pytest.raises(WorkerCrashError):  # the slot is half full when the pickler comes to it
        next(batches)
    assert [int(batch[0, 0]) for batch in kept] == [0, 4, 8, 12, 16, 20, 24]
    assert all(batch.eq(batch[:, :1]).all() for batch in kept)
    del kept, batch, batches, loader
    gc.collect()
    assert slots_mapped() == 0
    assert eventually(lambda: descriptors() == before[0])
    assert family.shared_memory() == before[1]


def test_no_batch_waits_for_the_garbage_collector(no_garbage_collector: None) -> None:
    def make(index: int) -> Any:
        row = torch.full((WIDE,), float(index))
        return {"row": row, "bad": (lambda: 0) if index % 16 == 3 else 0}

    loader = loader_of(64, make=make, collate_fn=same, batch_size=4)
    batches, failed = iter(loader), 0
    while True:
        try:
            batch = next(batches)
            del batch
        except StopIteration:
            break
        except TransportError:
            failed += 1
        assert loader.transport_stats.slots <= 12
    assert failed == 4
    del batches, loader
    assert slots_mapped() == 0


# ── pinned memory ────────────────────────────────────────────────────────────────────────────────


def test_a_pinned_batch_leaves_its_slot_at_once(accelerator: None) -> None:
    loader = loader_of(200, pin_memory=True, checksum=True)
    kept = list(loader)
    assert right(kept)
    assert loader.transport_stats.batches == {"slots": 50}
    del loader
    gc.collect()
    assert slots_mapped() == 0
    assert right(kept)


# ── no memory, no files ──────────────────────────────────────────────────────────────────────────


def test_without_anonymous_memory_all_goes_torchs_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> int:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refused)
    loader = loader_of(24)
    assert right(list(loader))
    (why,) = loader.transport_stats.fallbacks
    assert "Operation not permitted" in why
    assert loader.transport_stats.batches == {"torch": 6}


def test_without_it_in_the_workers_alone() -> None:
    def init(worker: int) -> None:
        def refused(*args: Any) -> int:
            raise OSError(24, "Too many open files")

        os.memfd_create = refused

    loader = loader_of(24, worker_init_fn=init)
    assert right(list(loader))
    (why,) = loader.transport_stats.fallbacks
    assert "Too many open files" in why


def limit_file_size(worker: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * KB, resource.RLIM_INFINITY))


def test_files_of_bounded_size_in_the_workers() -> None:
    """The stock loader fails with the first of these."""
    loader = loader_of(24, worker_init_fn=limit_file_size)
    assert right(list(loader))
    (why,) = loader.transport_stats.fallbacks
    assert "File too large" in why
    assert loader.transport_stats.batches == {"message": 6}
    loader = loader_of(24, worker_init_fn=limit_file_size, wide=4 * KB - 8)
    assert right(list(loader))


@pytest.fixture
def few_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_kept_batches_need_no_open_files(few_files: None) -> None:
    loader = loader_of(1600, wide=2 * KB)
    kept = list(loader)
    assert right(kept)
    assert loader.transport_stats.batches == {"slots": 400}


def test_no_descriptor_is_free_when_a_slot_arrives(no_garbage_collector: None) -> None:
    loader = loader_of(80, workers=1, prefetch_factor=1)
    batches = iter(loader)
    first = next(batches)
    held = []
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    kept = [first]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 8, limit[1]))
        while True:
            try:
                held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        failures = []
        for _ in range(3):  # each batch needs a fresh slot, as all are kept
            try:
                kept.append(next(batches))
            except TransportError as exc:
                failures.append(exc.with_traceback(None))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        for fd in held:
            os.close(fd)
    assert failures
    for error in failures:
        assert "open files" in str(error)
        assert error.failure is not None
        assert error.failure.phase == "transport"
    kept += batches
    assert len(kept) + len(failures) == 20
    assert all(batch.eq(batch[:, :1]).all() for batch in kept)
    failed = {index for error in failures for index in error.failure.indices}  # type: ignore[union-attr]
    assert sorted([*failed, *(int(x) for batch in kept for x in batch[:, 0])]) == list(range(80))
    assert set(loader.audit.failed.tolist()) == failed


# ── many, and large ──────────────────────────────────────────────────────────────────────────────


def shared_tensors(index: int) -> Any:
    return [torch.full((3,), index + k).share_memory_() for k in range(260)]


MANY: dict[str, Callable[[int], Any]] = {
    "that go torch's way": shared_tensors,
    "small": lambda index: [torch.full((3,), index + k) for k in range(5000)],
    "small arrays": lambda index: [np.full(3, index + k) for k in range(5000)],
    "rows of one": lambda index: list(torch.arange(400.0 * KB).view(-1, 2 * KB)),
    "text": lambda index: {"text": [f"line {k}" for k in range(20_000)], "b": bytes(300 * KB)},
    "large": lambda index: [torch.full((4 * MB,), index, dtype=torch.uint8), np.zeros(MB)],
}


@pytest.mark.parametrize("name", MANY)
def test_many_leaves_and_large_ones(name: str) -> None:
    def of(loader_class: type, **extra: Any) -> Any:
        dataset = Rows(2, make=MANY[name])
        loader = loader_class(dataset, batch_size=None, collate_fn=same, num_workers=1, **extra)
        batches = [told(batch) for batch in loader]
        return batches, loader

    expected, _ = of(DataLoader)
    came, loader = of(SafeDataLoader, checksum=True)
    assert came == expected
    way = "torch" if name == "that go torch's way" else "slots"
    assert loader.transport_stats.batches == {way: 2}
    assert bool(loader.transport_stats.fallbacks) == (way == "torch")


# ── switches, start methods ──────────────────────────────────────────────────────────────────────


class Numbers(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        return ({"x": torch.rand(WIDE), "n": k} for k in range(10))


def test_torchs_transport_gives_the_same_batches() -> None:
    def of(**extra: Any) -> Any:
        seed_all(5)
        loader: Any = SafeDataLoader(Numbers(), batch_size=3, num_workers=2, **extra)
        return [told(batch) for batch in loader], loader.transport_stats.batches

    auto, by_slots = of()
    torchs, by_torch = of(transport="torch")
    assert auto == torchs
    assert by_slots == {"slots": 8}
    assert by_torch == {"torch": 8}


def test_switched_off_nothing_of_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELOADER", "off")
    loader = loader_of(24, checksum=True)
    kept = list(loader)
    assert right(kept)
    assert all(batch.is_shared() for batch in kept)
    assert slots_mapped() == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_start_methods(method: str) -> None:
    loader = loader_of(48, multiprocessing_context=method, checksum=True)
    kept = list(loader)
    assert right(kept)
    assert loader.transport_stats.batches == {"slots": 12}


ENDINGS = {
    "kept": "batches = list(loader)",
    "running": "batches = iter(loader); kept = next(batches)",
    "in builtins": "import builtins; builtins.kept = [iter(loader), next(iter(loader))]",
    "in a cycle": "kept = list(loader); kept.append(kept)",
    "in a thread": (
        "import threading, time; kept = list(loader)\n"
        "def look(kept):\n    while True: time.sleep(0.001)\n"
        "threading.Thread(target=look, args=[kept], daemon=True).start()"
    ),
    "in a graph": (
        "w = torch.ones(1, requires_grad=True); kept = sum((w * b).sum() for b in loader)"
    ),
    "exit": "kept = list(loader); import sys; sys.exit(0)",
    "persistent": "kept = next(iter(loader)); kept = list(loader)",
}


@pytest.mark.parametrize("name", ENDINGS)
def test_the_interpreter_ends_without_a_word(name: str) -> None:
    persistent = name == "persistent"
    script = f"""
import torch
from safeloader import SafeDataLoader
loader = SafeDataLoader(torch.zeros(32, 9000), batch_size=4, num_workers=1,
                        persistent_workers={persistent})
{ENDINGS[name]}
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert (ran.returncode, ran.stderr) == (0, "")


# ── checksums ────────────────────────────────────────────────────────────────────────────────────


class Rewrites:
    """Goes on writing to tensors that it gave away already: those of torch's own transport."""

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []
        self.calls = torch.zeros(1).share_memory_()

    def __call__(self, samples: list[torch.Tensor]) -> Any:
        for earlier in self.given:
            earlier[2] += 100
        self.given = [torch.stack(samples)]
        self.calls += 1
        return {"image": self.given[0], "n": len(samples)}


@pytest.mark.parametrize("on_error", ["raise", "skip", "replace"])
def test_a_batch_that_changes_on_the_way_is_told_by_leaf_and_index(on_error: str) -> None:
    rewrites = Rewrites()
    loader = loader_of(
        32,
        workers=1,
        transport="torch",
        checksum=True,
        collate_fn=rewrites,
        on_error=on_error,
        prefetch_factor=4,
    )
    batches = iter(loader)
    errors: list[Any] = []
    for number in range(7):
        assert eventually(lambda: int(rewrites.calls) >= number + 2)  # noqa: B023
        try:
            next(batches)
        except TransportError as error:
            errors.append(error.with_traceback(None))
    assert next(batches)["image"][2, 0] == 30  # the last one, which nobody wrote to again
    assert next(batches, None) is None
    assert len(errors) == 7
    for error in errors:
        failure = error.failure
        assert failure.phase == "transport"
        assert failure.position == 2
        assert failure.index == failure.indices[2]
        assert "batch['image']" in str(error)
        assert "give away a copy" in failure.hint
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert (again.index, str(again)) == (error.index, str(error))
    failed = sorted(index for error in errors for index in error.failure.indices)
    assert sorted(loader.audit.failed.tolist()) == failed == list(range(28))


# ── all of it at random ──────────────────────────────────────────────────────────────────────────


class Printed:
    """Samples of any size with the print that the worker took of them."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Any:
        size = (17, 2000, 30_000, 90_000)[index * 7 % 4]
        row = torch.full((size,), index, dtype=torch.int16)
        return (row.numpy() if index % 5 == 0 else row), zlib.crc32(row.numpy())


def one(samples: list[Any]) -> Any:
    return samples


ACTIONS = st.lists(
    st.sampled_from(["hold", "hold", "drop", "slice", "convert", "fork", "ask", "forget"]),
    min_size=30,
    max_size=30,
)


@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(actions=ACTIONS, persistent=st.booleans(), bound=st.sampled_from([MB, 64 * MB]))
def test_whatever_a_loop_holds_stays_as_its_worker_made_it(
    actions: list[str], persistent: bool, bound: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_budget, "process_bytes", lambda: bound)
        loader: Any = SafeDataLoader(
            Printed(), batch_size=2, num_workers=2, collate_fn=one, persistent_workers=persistent
        )
        held: list[tuple[Any, int]] = []
        forked: list[Child] = []
        for batch, action in zip(loader, actions, strict=True):
            pairs = list(batch)
            assert all(print_of(row) == at for row, at in pairs)
            if action == "hold":
                held += pairs
            elif action == "slice":
                held += [(row[1::2], print_of(row[1::2])) for row, _ in pairs]
            elif action == "convert":
                held += [(np.asarray(row), at) for row, at in pairs]
            elif action == "fork" and len(forked) < 3:
                look = held + pairs
                forked.append(Child(lambda: all(print_of(x) == at for x, at in look)))  # noqa: B023
                del look
            elif action == "ask" and forked:
                assert forked.pop().agrees()
            elif action == "drop":
                del held[::2]
            elif action == "forget":
                held.clear()
            del batch, pairs
            assert all(print_of(row) == at for row, at in held)
        agreed = [each.agrees() for each in forked]
        assert all(agreed)
