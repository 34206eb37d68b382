"""Slots: lent, given back, given up; never overwritten while anything refers to what is in them."""

from __future__ import annotations

import _thread
import copy
import ctypes
import errno
import gc
import io
import mmap
import operator
import os
import pickle
import platform
import re
import resource
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch

from safeloader import _torch
from safeloader.transport import forks, leaves, slot_reader
from safeloader.transport import slot_writer as worker_slots
from safeloader.transport.channel import Arrived
from safeloader.transport.leaves import opening
from safeloader.transport.parking import ParkedSlots
from safeloader.transport.shared_memory import anonymous_file, mapped, populated
from safeloader.transport.slot_table import FREE, GONE, LENT, SLOTS_A_BATCH, SlotTable
from tests.interrupts import at_every_moment
from tests.wired import (
    KB,
    MB,
    SLOTS,
    Child,
    NotOpened,
    Wired,
    child,
    descriptors,
    filled,
    fork_in_c,
    print_of,
)


@pytest.fixture
def wired() -> Wired:
    return Wired()


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# ── the last view ────────────────────────────────────────────────────────────────────────────────


class Node:
    pass


def exported(tensor: torch.Tensor) -> Any:
    return np.from_dlpack(tensor)  # type: ignore[arg-type]


def in_arrow(tensor: torch.Tensor) -> Any:
    """A buffer of Arrow over the same bytes."""
    return pytest.importorskip("pyarrow").py_buffer(tensor.numpy())


def column(tensor: torch.Tensor) -> Any:
    """What a table of Arrow has of the same bytes, without a copy."""
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.table({"x": pyarrow.array(tensor.numpy())}).column("x").chunk(0).buffers()[1]


VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda x: x,
    "slice": lambda x: x[5:9],
    "slice of a slice": lambda x: x[5:9][1:][:1],
    "other shape": lambda x: x.view(2, -1).t(),
    "other type": lambda x: x.view(torch.int32)[3],
    "detached": lambda x: x.detach(),
    "array": lambda x: x.numpy(),
    "slice of an array": lambda x: x.numpy()[::-3],
    "array of an array": lambda x: np.asarray(x.numpy().view(np.int16)),
    "memoryview": lambda x: memoryview(x.numpy())[1:],
    "storage": lambda x: x.untyped_storage(),
    "dlpack": exported,
    "buffer of Arrow": in_arrow,
    "table of Arrow": column,
    "tensor of an array": lambda x: torch.from_numpy(x.numpy()[2:]),
    "in a list": lambda x: [{"a": (x[:1],)}],
    "graph of autograd": lambda x: x.float() * torch.ones(1, requires_grad=True),
    "saved by autograd": lambda x: (
        (x.view(torch.float32) * torch.ones(1, requires_grad=True)).grad_fn
    ),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_slot_is_free_when_the_last_view_is_gone(
    name: str, wired: Wired, no_garbage_collector: None
) -> None:
    batch = wired.collated([filled(40 * KB, k) for k in range(4)])
    assert wired.states == [LENT]
    held = VIEWS[name](batch.view(-1))
    copied = name == "graph of autograd"  # which holds the float copy alone
    del batch
    assert wired.states == [FREE if copied else LENT]
    del held
    assert wired.states == [FREE]


@pytest.mark.parametrize("cut", [lambda x: x, lambda x: x[3:, ::2], memoryview, torch.from_numpy])
def test_so_it_is_with_arrays(
    cut: Callable[[Any], Any], wired: Wired, no_garbage_collector: None
) -> None:
    batch = wired.send({"x": np.arange(80.0 * KB).reshape(80, KB), "y": "z"})
    held = cut(batch["x"])
    del batch
    assert wired.states == [LENT]
    del held
    assert wired.states == [FREE]


def test_all_leaves_of_a_batch_share_its_slot(wired: Wired) -> None:
    wired.batch._recent.append(500 * KB)  # of an earlier batch
    batch = wired.send([torch.full((10 * KB,), k) for k in range(5)])
    assert wired.states == [LENT]
    last = batch.pop(2)
    batch.clear()
    assert wired.states == [LENT]
    del last
    assert wired.states == [FREE]


def test_a_cycle_waits_for_the_collector_and_no_longer(
    wired: Wired, no_garbage_collector: None
) -> None:
    node: Any = Node()
    node.me, node.batch = node, wired.send(filled(MB, 1))
    del node
    assert wired.states == [LENT]
    gc.collect()
    assert wired.states == [FREE]


def test_a_batch_dropped_in_another_thread(wired: Wired) -> None:
    held = [wired.send(filled(MB, 1))]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert wired.states == [FREE]


# ── storages that are given other memory ─────────────────────────────────────────────────────────


def queued(tensor: torch.Tensor) -> None:
    queue = torch.multiprocessing.get_context("fork").SimpleQueue()
    queue.put(tensor)
    queue.get()


OTHER_MEMORY: dict[str, Callable[[torch.Tensor], Any]] = {
    "share_memory_": torch.Tensor.share_memory_,
    "share_memory_ of the storage": lambda x: x.untyped_storage().share_memory_(),
    "share_memory_ of a view": lambda x: x[1:].share_memory_(),
    "by descriptor": lambda x: x.untyped_storage()._share_fd_cpu_(),
    "by file name": lambda x: x.untyped_storage()._share_filename_cpu_(),
    "pickled for a process": ForkingPickler.dumps,
    "put into a queue": queued,
    "as a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False).share_memory_(),
    "in a module": lambda x: Holds(x).share_memory(),
    "set_": lambda x: x.set_(torch.ones(3, dtype=x.dtype)),
    "data": lambda x: setattr(x, "data", torch.ones(3, dtype=x.dtype)),
    "swapped": lambda x: torch.utils.swap_tensors(x, torch.ones(3, dtype=x.dtype)),
    "resized": lambda x: x.resize_(1),
    "copied deeply": copy.deepcopy,
    "saved": lambda x: torch.save([x, x[1:]], io.BytesIO()),
}


class Holds(torch.nn.Module):
    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("x", x)


EXPORTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "numpy": lambda x: x.numpy(),
    "slice": lambda x: x[2:].numpy(),
    "dlpack": exported,
    "memoryview": lambda x: memoryview(x.numpy()),
    "buffer of a pickle": lambda x: memoryview(pickle.PickleBuffer(x.numpy())),
    "buffer of Arrow": lambda x: in_arrow(x if x.is_contiguous() else x.clone()),
    "table of Arrow": lambda x: column(x if x.is_contiguous() else x.clone()),
}


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("name", OTHER_MEMORY)
def test_what_was_exported_stays_when_a_storage_is_given_other_memory(
    name: str, export: str, wired: Wired, no_garbage_collector: None
) -> None:
    sizes = {"in the message": 2 * KB, "in a slot": 80 * KB, "in its own": 2 * MB}
    sent = [filled(size, 3) for size in sizes.values()]
    batch = wired.send([*sent, filled(8 * MB, 3)[: 3 * MB], filled(MB, 3)[1::2]])
    held = [EXPORTS[export](each) for each in batch]
    fingerprints = [print_of(each) for each in held]
    if export == "dlpack" and name in {"set_", "data", "swapped"}:
        return  # torch frees what it has exported so, and stock unmaps it
    for each in batch:
        OTHER_MEMORY[name](each)
    for k in range(10, 20):
        wired.send([filled(each.nbytes, k) for each in sent] + [filled(3 * MB, k)])
        bytearray(2 * KB)
    assert [print_of(each) for each in held] == fingerprints
    del each, batch
    assert [print_of(each) for each in held] == fingerprints
    table, unpacker = wired.cells, wired.unpacker
    del held
    # Up to 2.9, torch leaves a storage that it saved in a cycle, and a few that it sent in a list.
    gc.collect()
    torch.multiprocessing.reductions.shared_cache.free_dead_references()
    unpacker.settle(all_of_them=True)
    assert LENT not in list(table)


@pytest.mark.parametrize("size", [80 * KB, 2 * MB])
def test_batches_that_were_sent_on_do_not_use_up_the_slots(
    size: int, wired: Wired, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.multiprocessing.reductions.shared_cache.free_dead_references()
    monkeypatch.setattr(_torch, "_sent_enough", 8)  # other tests had more, and they were alive
    for k in range(40):
        ForkingPickler.dumps(wired.send(filled(size, k)))
    assert wired.stats.slots <= 11  # torch keeps 8
    assert wired.stats.fallbacks == {}


@pytest.mark.parametrize("kept", [True, False])
def test_it_stays_when_the_workers_are_gone(kept: bool) -> None:
    """The slot is mapped for as long as a storage that was made over it exists."""
    wired = Wired()
    batch = wired.send([filled(MB, 3), filled(MB, 4).numpy()])
    counts = wired.counts
    held = [batch[0].numpy(), batch[1]]
    del wired
    batch[0].share_memory_()
    torch.from_numpy(batch[1]).share_memory_()
    if not kept:
        del batch
    assert counts.stats().slots == 2
    assert [int(each[5]) for each in held] == [3, 4]
    held.clear()
    batch = None
    assert counts.stats().slots == 0


def test_offsets_beyond_four_gibibytes(wired: Wired) -> None:
    size, at = 6 << 30, (5 << 30) + 64
    memory = mapped(fd := anonymous_file(size), size)  # sparse: a page or two are there
    os.close(fd)
    before, opening.now = opening.now, Arrived(0, b"", b"")
    opening.now.leases = [np.ndarray(size, np.uint8, memory)]
    opening.now.brought = []
    code = leaves.CODES[torch.uint8]
    tensor = leaves.tensor_at((0, at, 100), code, (10, 10))
    array = leaves.array_in_slot((0, at, 100), np.dtype(np.int16), (5, 10), "C")
    whole = leaves.tensor_over((0, 0, size), code, (size,), (1,), 0)
    opening.now = before
    tensor.fill_(1)
    assert (array == 257).all()
    assert whole[at : at + 100].eq(1).all()
    assert whole.nbytes == size


# ── batches that are kept ────────────────────────────────────────────────────────────────────────


def test_kept_batches_are_not_written_over(wired: Wired) -> None:
    kept = [wired.collated([filled(40 * KB, k), filled(40 * KB, k)]) for k in range(100)]
    assert all(batch.eq(k).all() for k, batch in enumerate(kept))
    assert wired.stats.slots == 100
    assert wired.stats.batches == {"slots": 100}
    del kept
    assert set(wired.states) == {FREE}


@pytest.mark.parametrize("how", ["stacked", "pickled", "array"])
def test_beyond_the_bound_torchs_way_is_taken_and_told(how: str) -> None:
    wired = Wired(4 * MB)

    def batch(k: int) -> Any:
        if how == "stacked":
            return wired.collated([filled(MB // 2, k), filled(MB // 2, k)])
        sent = filled(MB, k)
        return wired.send(sent.numpy() if how == "array" else sent)

    kept = [batch(k) for k in range(8)]
    assert all((each == k).all() for k, each in enumerate(kept))
    why = f"{4 * MB} bytes of slots hold batches that are in use"
    assert wired.stats.fallbacks == {why: 4}
    assert wired.stats.bytes <= 4 * MB
    del kept[0]
    kept.append(batch(8))
    assert wired.stats.fallbacks == {why: 4}


def test_a_batch_larger_than_all_slots_may_be() -> None:
    wired = Wired(MB)
    assert wired.send(filled(2 * MB, 7)).eq(7).all()
    assert wired.send([filled(MB // 2, 5), filled(2 * MB, 7)])[1].eq(7).all()
    why = f"a batch needs more than the {MB} bytes that a worker's slots may hold"
    assert wired.stats.fallbacks == {why: 2}
    assert wired.stats.batches == {"torch": 2}
    assert wired.send(filled(MB // 2, 5)).eq(5).all()
    assert wired.stats.batches == {"torch": 2, "slots": 1}


def test_more_batches_than_there_are_slots(wired: Wired) -> None:
    kept = [wired.send(filled(5 * KB, k)) for k in range(SLOTS + 3)]
    assert all(each.eq(k % 251).all() for k, each in enumerate(kept))
    assert wired.stats.slots == SLOTS
    why = f"all {SLOTS} slots of a worker hold batches that are in use"
    assert wired.stats.fallbacks == {why: 3}
    assert wired.stats.batches == {"slots": SLOTS, "message": 3}


def test_small_batches_after_a_large_one_use_the_room_there_is() -> None:
    wired = Wired(5 * MB)
    kept = [wired.send(filled(2 * MB, 0))]
    kept += [wired.send(filled(100 * KB, k)) for k in range(1, 8)]
    assert all(each.eq(k).all() for k, each in enumerate(kept))
    assert wired.stats.fallbacks == {}


def test_free_slots_are_not_given_up_where_that_does_not_help() -> None:
    wired = Wired(4 * MB)
    kept = wired.send(filled(2 * MB, 0))
    wired.send(filled(MB, 1))
    before = set(wired.pool._slots)
    wired.begin()
    assert wired.batch.put(3 * MB) is None
    assert set(wired.pool._slots) == before
    assert kept.eq(0).all()


def test_a_batch_lies_in_so_many_slots_at_most(wired: Wired) -> None:
    wired.pool.take = lambda size, take=wired.pool.take: take(64 * KB)  # type: ignore[method-assign,misc]
    wired.begin()
    for place in range(SLOTS_A_BATCH):
        found = wired.batch.put(64 * KB)
        assert found is not None
        assert found[1:] == (place, 0)
    assert wired.batch.put(64 * KB) is None
    assert str(SLOTS_A_BATCH) in wired.batch.why


# ── growing, shrinking ───────────────────────────────────────────────────────────────────────────


def test_a_loop_that_drops_its_batches_uses_few_slots(wired: Wired) -> None:
    for k in range(200):
        wired.collated([filled(40 * KB, k)])
    assert wired.stats.slots == 1
    assert wired.stats.bytes < 128 * KB


@pytest.mark.slow
def test_slots_grow_with_the_batches_and_shrink_again(wired: Wired) -> None:
    for size in (100 * KB, MB, 8 * MB):
        for k in range(3):
            assert wired.send(filled(size, k)).eq(k).all()
    assert 8 * MB <= wired.stats.bytes <= 12 * MB
    for k in range(worker_slots._IDLE_BATCHES + 40):
        assert wired.send(filled(100 * KB, k)).eq(k % 251).all()
    assert wired.stats.bytes < MB


def test_a_slot_that_is_too_small_makes_room() -> None:
    wired = Wired(4 * MB)
    for size in (MB, 2 * MB, 3 * MB, 4 * MB):
        wired.send(filled(size, 1))
    assert wired.stats.fallbacks == {}
    assert wired.stats.bytes <= 4 * MB


def test_nothing_is_left_when_both_ends_are_gone(no_garbage_collector: None) -> None:
    Wired().send(filled(MB, 1))  # what is imported once, is
    torch.multiprocessing.reductions.shared_cache.free_dead_references()  # of other tests
    before = descriptors()
    wired = Wired()
    counts, kept = wired.counts, wired.send(filled(MB, 1))
    wired.send(filled(MB, 2))
    gone = weakref.ref(wired.pool), weakref.ref(wired.unpacker)
    del wired
    assert [each() for each in gone] == [None, None]
    assert counts.stats().slots == 1  # the one that is kept
    assert kept.eq(1).all()
    del kept
    assert counts.stats().slots == counts.stats().bytes == 0
    assert descriptors() == before
    with open("/proc/self/maps") as maps:
        assert "memfd:safeloader" not in maps.read()


def test_pages_of_a_parked_slot_that_is_not_used_again_are_given_back() -> None:
    table = SlotTable(1)
    fd = anonymous_file(MB)
    parked, held_elsewhere = mapped(fd, MB), mapped(fd, MB)  # by a process that was forked
    os.close(fd)
    held_elsewhere[0] = 1
    table.share(0)[worker_slots.HOLDS] = MB  # and it may hold nothing
    table.row(0)[0] = FREE
    pool = worker_slots.SlotPool(table, 0, {(0, 0): parked})
    for _ in range(worker_slots._LOOK_EVERY):
        pool.begin()
    assert pool.given_up == [0]
    assert held_elsewhere[0] == 0


# ── what the worker keeps ────────────────────────────────────────────────────────────────────────


KERNEL = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))


@pytest.mark.skipif(KERNEL < (5, 14), reason="this kernel maps no memory in one call")
def test_memory_that_was_mapped_at_once_is_written_to_without_a_fault() -> None:
    size = 4 * MB
    fd = anonymous_file(size)
    memory = mapped(fd, size)
    os.close(fd)

    def faults(write: Callable[[], Any]) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        write()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def write() -> None:
        ctypes.memset(memory, 7, size)

    pages = size // mmap.PAGESIZE
    populated(memory, size)
    assert faults(write) < pages / 10

    def inherits() -> bool:  # the mapping, and no page of it
        at_once = faults(lambda: populated(memory, size, filled=True))
        same = bytes(memory) == b"\7" * size
        # Those around each page are mapped with it.
        return same and at_once < pages / 2 and faults(write) < pages / 10

    with child(inherits):
        pass


def test_what_a_collate_function_keeps_is_not_written_over(wired: Wired) -> None:
    wired.begin()
    result = wired.stack([filled(40 * KB, 1), filled(40 * KB, 1)])
    wired.open(wired.seal(result))  # and dropped in main
    assert wired.states == [FREE]
    for k in range(2, 6):
        wired.collated([filled(40 * KB, k), filled(40 * KB, k)])
    assert result.eq(1).all()
    assert wired.send(result).eq(1).all()
    assert len(wired.states) == 2
    del result
    for k in range(worker_slots._IDLE_BATCHES + 40):
        wired.collated([filled(40 * KB, k), filled(40 * KB, k)])
    assert len(wired.states) == 1


def test_what_was_stacked_and_not_sent_is_written_over_once_it_is_gone(wired: Wired) -> None:
    wired.begin()
    unsent = wired.stack([filled(40 * KB, 1)])
    assert wired.collated([filled(40 * KB, 2)]).eq(2).all()
    assert unsent.eq(1).all()
    del unsent
    for k in range(3, 6):
        assert wired.collated([filled(40 * KB, k)]).eq(k).all()
    assert len(wired.states) == 2


def test_a_slot_that_was_not_sent_comes_before_one_that_main_knows() -> None:
    """The second one was freed while the batch was made."""
    wired = Wired(9 * MB // 4)
    held = [wired.send(filled(MB, 1))]
    wired.begin()
    first = wired.stack([filled(MB, 2)])
    held.clear()
    second = wired.stack([filled(900 * KB, 3)])
    sealed = wired.seal([first, second])
    assert len(sealed.fds) == 1
    came = wired.open(sealed)
    assert came[0].eq(2).all()
    assert came[1].eq(3).all()
    assert wired.stats.slots == 2


class Refuses:
    def __reduce__(self) -> Any:
        raise TypeError("not this one")


@pytest.mark.parametrize("stacked", [True, False])
def test_what_cannot_be_pickled_leaves_nothing(
    stacked: bool, wired: Wired, no_garbage_collector: None
) -> None:
    wired.send(filled(MB, 1))
    before = descriptors()
    for _ in range(5):
        wired.begin()
        first = wired.stack([filled(MB, 2)]) if stacked else filled(MB, 2)
        gone = weakref.ref(first)
        shared = torch.zeros(3).share_memory_()
        with pytest.raises(TypeError, match="not this one"):
            wired.seal([first, shared, Refuses()])
        del first
        assert gone() is None
    assert wired.send(filled(MB, 3)).eq(3).all()
    assert len(wired.states) == 1
    del shared
    gc.collect()  # torch's own cache of what it shared
    assert descriptors() == before


def test_papers_that_cannot_be_pickled_leave_the_slots_as_they_were(wired: Wired) -> None:
    wired.begin()
    batch = wired.stack([filled(MB, 2)])
    with pytest.raises(TypeError, match="not this one"):
        wired.packer.seal((Refuses(),), batch)  # type: ignore[arg-type]
    del batch
    assert wired.states == [FREE]
    assert wired.collated([filled(MB, 3)]).eq(3).all()


def test_a_batch_that_cannot_be_opened_gives_its_slot_back(
    wired: Wired, no_garbage_collector: None
) -> None:
    for _ in range(3):
        with pytest.raises(NotOpened, match="zero"):
            wired.send([filled(MB, 1), Divides()])
    assert wired.states == [FREE]


class Divides:
    def __reduce__(self) -> Any:
        return divmod, (1, 0)


class Loads:
    """Opens another batch while it is opened."""

    def __init__(self, send: Callable[[Any], Any]) -> None:
        self.send = send

    def __reduce__(self) -> Any:
        return _load, (_register(self.send),)


_registered: list[Callable[[Any], Any]] = []


def _register(send: Callable[[Any], Any]) -> int:
    _registered[:] = [send]
    return 0


def _load(number: int) -> Any:
    return _registered[number](filled(MB, 9))


def test_a_batch_opened_while_another_is(wired: Wired) -> None:
    inner = Wired()
    came = wired.send([filled(MB, 1), Loads(inner.send), filled(MB, 2)])
    assert [int(each[0]) for each in came] == [1, 9, 2]


# ── forks ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["stacked", "array"])
def test_a_child_keeps_what_it_saw_while_its_parent_goes_on(how: str, wired: Wired) -> None:
    batch: Any = wired.send(filled(MB, 1).numpy() if how == "array" else filled(MB, 1))
    with child(lambda: bool((batch == 1).all())):
        assert wired.states == [LENT]
        batch = None
        assert wired.states == [GONE]
        for k in range(2, 20):
            assert wired.send(filled(MB, k)).eq(k).all()
        assert len(wired.states) == 1
        assert wired.stats.slots == 1


def test_a_slot_that_was_free_at_the_fork_stays_in_use(wired: Wired) -> None:
    wired.send(filled(MB, 1))
    with child(lambda: True):
        wired.send(filled(MB, 2))
        assert wired.states == [FREE]
        assert wired.stats.slots == 1


@pytest.mark.parametrize("end", [os._exit, sys.exit])
def test_a_child_that_ends_frees_nothing_here(end: Callable[[int], Any], wired: Wired) -> None:
    held = [wired.send(filled(MB, 1))]

    def let_go() -> bool:
        held.clear()
        gc.collect()
        return True

    assert Child(let_go, end).agrees()
    assert wired.states == [LENT]
    assert wired.stats.slots == 1
    wired.send(filled(MB, 2))
    assert held[0].eq(1).all()


def test_a_fork_of_the_worker_while_it_makes_a_batch(wired: Wired) -> None:
    wired.begin()
    kept = wired.stack([filled(MB, 1)])
    with child(lambda: bool(kept.eq(1).all())):
        assert wired.open(wired.seal(kept)).eq(1).all()
        kept = torch.empty(0)
        for k in range(2, 9):
            assert wired.collated([filled(MB, k)]).eq(k).all()
    assert len(wired.states) == 1


@pytest.mark.parametrize("size", [100 * KB, 2 * MB])
def test_a_temporary_that_a_child_has_is_not_written_over(size: int, wired: Wired) -> None:
    """Not within its batch, nor when nothing but copies is left in its slot."""
    wired.begin()
    temporary: Any = wired.stack([filled(size, 1)])
    with child(lambda: bool(temporary.eq(1).all())):
        temporary = None
        batch = wired.open(wired.seal([filled(size - KB, 2), wired.stack([filled(size, 3)])]))
        assert batch[0].eq(2).all()
        del batch
        for k in range(4):
            wired.collated([filled(size - 2 * KB, 4 + k)])
            wired.send(filled(size - 2 * KB, 9 + k))


def test_a_fork_in_c_is_noticed(wired: Wired) -> None:
    """Python's hooks do not see it, the kernel does."""
    wired.send(filled(MB, 0))
    batch: Any = wired.send(filled(MB, 1))
    with child(lambda: bool((batch == 1).all()), fork_in_c):
        batch = None
        assert wired.states == [GONE]
        for k in range(2, 20):
            batch = wired.send(filled(MB, k))
            assert batch.eq(k).all()
        assert len(wired.states) == 2  # of those made since, none was given up


def test_a_fork_in_c_of_the_worker(wired: Wired) -> None:
    wired.begin()
    kept = wired.stack([filled(MB, 1)])
    with child(lambda: bool(kept.eq(1).all()), fork_in_c):
        assert wired.open(wired.seal(kept)).eq(1).all()
        kept = torch.empty(0)
        for k in range(2, 9):
            assert wired.collated([filled(MB, k)]).eq(k).all()
    assert len(wired.states) == 1


@pytest.mark.parametrize("fork", [os.fork, fork_in_c])
def test_a_child_that_ended_or_runs_another_program_sees_nothing(
    fork: Callable[[], int], wired: Wired
) -> None:
    """A slot is not given up for it if Python was not told of the fork."""
    batch: Any = wired.send(filled(MB, 1))
    if not (pid := fork()):
        os.execv("/bin/true", ["true"])
    os.waitpid(pid, 0)
    batch = None
    assert wired.states == [GONE if fork is os.fork else FREE]
    assert batch is None


@pytest.mark.parametrize("fault", ["no file", "nothing read", "no memory"])
def test_where_the_kernel_does_not_say_of_forks_all_else_is_the_same(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any) -> Any:
        raise OSError(errno.EACCES, "not for you")

    monkeypatch.setattr(forks, "_watch", None)
    if fault == "no file":
        monkeypatch.setattr(os, "open", refused)
    elif fault == "nothing read":
        monkeypatch.setattr(os, "pread", lambda *args: b"")
    else:
        monkeypatch.setattr(mmap, "mmap", refused)
    wired = Wired()
    wired.send(filled(MB, 0))
    batch: Any = wired.send(filled(MB, 1))
    assert wired.states == [LENT]
    with child(lambda: bool((batch == 1).all())):
        batch = None
        assert wired.states == [GONE]
        assert wired.send(filled(MB, 2)).eq(2).all()
    assert batch is None


# ── signals ──────────────────────────────────────────────────────────────────────────────────────


def without_a_line_between(*calls: Callable[[], Any]) -> list[Any]:
    """Call these from C: a signal handler that is due runs at the first line of Python within."""
    return list(map(operator.call, calls))


@pytest.fixture
def nothing_ignored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ignored: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    yield
    assert ignored == []


@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_an_interrupt_while_a_batch_is_freed(
    kind: str, wired: Wired, nothing_ignored: None
) -> None:
    for k in range(36):
        sent = filled(MB, k)
        held = [wired.send(sent.numpy() if kind == "array" else sent)]
        with pytest.raises(KeyboardInterrupt):
            without_a_line_between(_thread.interrupt_main, held.clear)
        assert held == []
        assert wired.states == [FREE]
    assert wired.stats.slots == 1


def test_an_interrupt_while_a_slot_is_unmapped(nothing_ignored: None) -> None:
    wired = Wired()
    held, counts = [wired.send(filled(MB, 1))], wired.counts
    del wired
    assert counts.stats().slots == 1
    with pytest.raises(KeyboardInterrupt):
        without_a_line_between(_thread.interrupt_main, held.clear)
    assert counts.stats().slots == 0


def test_an_interrupt_while_a_fork_is_prepared(
    wired: Wired, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At ``os.fork`` Python runs hooks, and what a hook raises is swallowed: not by one of ours."""
    ignored: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    batch: Any = wired.send(filled(MB, 1))
    waiting = [ParkedSlots() for _ in range(100)]  # to look at these is no work for a hook

    def interrupted() -> int:
        return int(without_a_line_between(_thread.interrupt_main, os.fork)[1])

    with child(lambda: bool(batch.eq(1).all()), interrupted):
        batch = None
        assert wired.states == [GONE]
        for k in range(2, 9):
            assert wired.send(filled(MB, k)).eq(k).all()
    del waiting
    swallowed_by = [getattr(each.object, "__module__", "") or "" for each in ignored]
    assert not any(name.startswith("safeloader") for name in swallowed_by)


def test_interrupts_in_any_line_lose_no_slot(wired: Wired) -> None:
    """Main raises in each line of what tells the workers, one after the other."""
    code = slot_reader.Unpacker.settle.__code__

    for line in range(30):
        left = line

        def at(frame: Any, event: str, arg: Any) -> Any:
            nonlocal left
            if frame.f_code is not code:
                return None
            if event == "line":
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
            return at

        held = [wired.send([filled(MB, line), filled(2 * MB, line)])]
        held.clear()
        before = sys.gettrace()  # coverage has one
        sys.settrace(at)
        try:
            wired.unpacker.settle()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        # A slot that the worker has lent again meanwhile is not told to be free.
        batch = wired.send(filled(MB, 7))
        assert wired.states.count(LENT) == 1
        del batch
        assert set(wired.states) == {FREE}
    assert wired.stats.slots <= 4


def test_what_is_gone_is_freed_once_whenever_an_interrupt_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A weak reference that is freed twice is somebody else's the second time."""
    freed: list[int] = []
    monkeypatch.setattr(worker_slots, "is_gone", lambda storage: True)
    monkeypatch.setattr(worker_slots, "forget", freed.append)
    slot = worker_slots.Slot(0, 10 * KB)
    moments = 0
    for run in at_every_moment(slot.used, "transport/slot_writer.py"):
        moments += 1
        slot.drop_copies()
        freed.clear()
        for storage in range(3):  # 0 is a copy
            slot.add(storage * KB, 100, storage)
        assert run() == 100
        assert len(freed) == len(set(freed))
    assert sorted(freed) == [1, 2]
    assert moments > 5
    os.close(slot.fd)


def test_small_slots_are_told_of_together(wired: Wired) -> None:
    """To look for forks costs a call of the kernel."""
    for k in range(slot_reader._ENOUGH - 1):
        wired.unpacker.settle()
        wired.packer.begin()
        wired.open(wired.seal(filled(80 * KB, k)))
        assert list(wired.cells)[: k + 1] == [LENT] * (k + 1)
    wired.unpacker.settle()
    wired.packer.begin()
    wired.open(wired.seal(filled(80 * KB, 9)))
    wired.unpacker.settle()
    assert set(list(wired.cells)[: slot_reader._ENOUGH]) == {FREE}


# ── no room, no descriptors ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSYS, errno.EPERM, errno.ENOMEM])
def test_without_anonymous_memory_torchs_way_is_taken(
    number: int, wired: Wired, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", refused)
        assert wired.collated([filled(MB, 1)]).eq(1).all()
        assert wired.send(np.ones(MB))[7] == 1
    (why,) = wired.stats.fallbacks
    assert os.strerror(number) in why
    assert wired.stats.fallbacks[why] == 2
    assert wired.send(filled(MB, 2)).eq(2).all()
    assert wired.stats.batches == {"torch": 1, "message": 1, "slots": 1}


def test_files_of_bounded_size(wired: Wired) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    open_files = descriptors()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 * KB, before[1]))
        came = wired.send(filled(90 * KB, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert came.eq(1).all()
    (why,) = wired.stats.fallbacks
    assert "File too large" in why
    del came
    assert descriptors() == open_files


def test_memory_that_cannot_be_mapped_in_the_worker(
    wired: Wired, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any) -> int:
        raise RuntimeError("unable to mmap 9 bytes\nand more")

    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(worker_slots, "mapped", refused)
        batch = wired.send(filled(MB, 1))
    assert batch.eq(1).all()
    assert list(wired.stats.fallbacks) == ["no further slot could be made: unable to mmap 9 bytes"]
    del batch
    assert descriptors() == before


@pytest.mark.parametrize("came", [0, 1, 2])
def test_descriptors_that_were_lost_on_the_way(came: int, wired: Wired) -> None:
    """The kernel hands over as many as main has room for, and says so by a flag alone."""
    before = descriptors()
    shared = filled(MB, 8).share_memory_()
    wired.begin()
    # One of torch's, and a slot for each of the two.
    sealed = wired.seal([wired.stack([filled(MB, 1)]), shared, np.zeros(2 * MB, np.uint8)])
    assert len(sealed.fds) == 3
    for fd in sealed.fds[came:]:
        os.close(fd)

    def opened() -> str:
        with pytest.raises(NotOpened) as caught:
            wired.open(sealed._replace(fds=sealed.fds[:came]))
        return str(caught.value.args[2])

    with ThreadPoolExecutor(1) as pool:  # it may be the first batch that a thread opens
        assert "open files" in pool.submit(opened).result()
    for k in range(2, 5):
        again = wired.send([filled(MB, k), shared])
        assert again[0].eq(k).all()
        assert again[1].eq(8).all()
        del again
    del shared
    gc.collect()
    assert descriptors() == before


def test_a_slot_that_main_cannot_map_is_not_used_again(
    wired: Wired, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any) -> int:
        raise RuntimeError("unable to mmap")

    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(slot_reader, "mapped", refused)
        with pytest.raises(NotOpened):
            wired.send(filled(MB, 1))
    assert wired.states == [GONE]
    assert wired.send(filled(MB, 2)).eq(2).all()
    assert wired.stats.slots == 1
    assert descriptors() == before


# ── the table ────────────────────────────────────────────────────────────────────────────────────


def test_each_worker_has_cells_of_its_own() -> None:
    table = SlotTable(3)
    for worker in range(3):
        table.row(worker)[0] = table.row(worker)[-1] = worker
    assert [table.row(worker)[0] for worker in range(3)] == [0, 1, 2]
    assert len(table.row(2)) == table.slots


def test_the_table_is_not_pickled_but_to_workers() -> None:
    with pytest.raises(RuntimeError, match="should only be shared"):
        pickle.dumps(SlotTable(1))


def test_cells_outlive_their_table() -> None:
    row = SlotTable(1).row(0)
    row[3] = 7
    assert row[3] == 7


def test_content_is_as_it_was_sent(wired: Wired) -> None:
    sent = torch.arange(MB, dtype=torch.int64)
    assert print_of(wired.send(sent)) == print_of(sent)


def test_what_is_pickled_twice_counts_once(wired: Wired) -> None:
    """Tensors that overlap are found out in a first try, which is taken back."""
    base = torch.arange(400.0 * KB)
    for _ in range(3):
        windows = [base[k * KB : (k + 2) * KB] for k in range(8)]
        came = wired.send(windows)
        assert all(torch.equal(a, b) for a, b in zip(came, windows, strict=True))
        del came
    assert wired.batch._recent[-1] < 2 * 9 * 4 * KB


# ── what is stacked and not sent ─────────────────────────────────────────────────────────────────


def held_in_worker(wired: Wired) -> int:
    """Bytes of the slots that the worker has."""
    return sum(slot.size for slot in wired.pool._slots.values())


@pytest.mark.parametrize("size", [40 * KB, MB])
def test_the_room_of_a_temporary_is_used_again_in_the_same_batch(size: int, wired: Wired) -> None:
    wired.begin()
    total = 0.0
    for k in range(40):
        each = wired.stack([filled(size, k), filled(size, k)])
        total += float(each[0, 0])
    del each
    assert held_in_worker(wired) <= 6 * size + 256 * KB
    assert wired.open(wired.seal(total)) == total
    assert wired.stats.slots == 0
    assert wired.stats.batches == {"message": 1}


def test_what_is_between_temporaries_stays_as_it_is(wired: Wired) -> None:
    wired.begin()
    kept, gone = [], []
    for k in range(30):
        gone.append(wired.stack([filled(100 * KB, 90 + k)]))
        kept.append(wired.stack([filled(10 * KB, k)]))
        if k % 3 == 2:
            gone.clear()
    gone.clear()
    assert held_in_worker(wired) < 2 * MB  # 3.3 MB were stacked
    came = wired.open(wired.seal(kept))
    assert all(each.eq(k).all() for k, each in enumerate(came))


def test_many_temporaries_at_once_are_given_back_when_the_batch_is_sent(wired: Wired) -> None:
    wired.begin()
    temporaries = [wired.stack([filled(3 * MB, k)]) for k in range(12)]
    assert all(each.eq(k).all() for k, each in enumerate(temporaries))
    temporaries.clear()
    wired.open(wired.seal(1))
    assert held_in_worker(wired) <= worker_slots._SPARE


def test_a_slot_in_which_nothing_of_the_batch_lies_is_not_sent(wired: Wired) -> None:
    wired.begin()
    large, small = wired.stack([filled(MB, 1)]), wired.stack([filled(5 * KB, 2)])
    assert wired.open(wired.seal(small)).eq(2).all()
    assert wired.stats.bytes < MB
    assert large.eq(1).all()


def test_what_temporaries_made_large_is_not_sent_with_what_is_small(wired: Wired) -> None:
    for _ in range(3):
        wired.begin()
        temporaries = [wired.stack([filled(800 * KB, k)]) for k in range(8)]
        label = wired.stack([filled(5 * KB, 7)])
        temporaries.clear()
        assert wired.open(wired.seal({"a": label, "b": label}))["b"].eq(7).all()
        assert wired.stats.bytes <= 256 * KB


def test_an_array_over_a_tensor_that_was_moved_keeps_its_slot(wired: Wired) -> None:
    """Torch gives the storage other memory; the array goes on looking at the slot."""
    wired.begin()
    stacked = wired.stack([filled(MB, 1)])
    array = stacked.numpy()
    stacked.share_memory_()
    for k in range(2, 9):
        again = wired.stack([filled(MB, k)])
        del again
        assert wired.collated([filled(MB, k)]).eq(k).all()
    assert (array == 1).all()
    del stacked


def test_a_storage_made_where_a_temporary_was_is_not_taken_for_it(wired: Wired) -> None:
    wired.begin()
    for k in range(200):
        each = wired.stack([filled(5 * KB, k)])
        del each
        torch.full((5 * KB,), 3, dtype=torch.uint8)
    made = [torch.full((5 * KB,), 100 + k, dtype=torch.uint8) for k in range(50)]
    came = wired.open(wired.seal(made))
    assert all(each.eq(100 + k).all() for k, each in enumerate(came))


# ── views ────────────────────────────────────────────────────────────────────────────────────────


def test_a_view_of_little_of_a_memory_up_to_1_mb_brings_all_of_it(wired: Wired) -> None:
    base = torch.arange(200.0 * KB)
    came = wired.send([base[50_000:50_100], base[:3]])
    assert came[0].storage_offset() == 50_000
    assert came[0].untyped_storage().nbytes() == base.nbytes
    assert came[0].as_strided((1,), (1,), 0) == 0
    came[1][0] = -1
    assert came[0].as_strided((1,), (1,), 0) == -1


def test_a_view_of_little_of_a_larger_one_brings_what_it_looks_at(wired: Wired) -> None:
    base = torch.arange(300.0 * KB)
    came = wired.send(base[50_000:60_000])
    assert torch.equal(came, base[50_000:60_000])
    assert came.untyped_storage().nbytes() < 41_000
    assert wired.send(base[KB:])[0] == KB
    assert wired.send(base[KB:]).storage_offset() == KB


# ── more than 4 GiB ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_batch_of_more_than_4_gib_arrives_without_a_slot_and_with_one() -> None:
    """What is not written to takes no memory; a copy of it does."""
    size = (1 << 32) + 5 * KB
    base = torch.empty(size, dtype=torch.uint8)
    base[-5:] = 7
    for most in (MB, 2 * size):
        came = Wired(most).send(base)
        assert came.numel() == size
        assert came[-6:].tolist()[1:] == [7] * 5
        del came


def test_a_part_of_a_large_memory_crosses_within_the_message_where_there_is_no_room() -> None:
    base = torch.arange(4.0 * MB)
    wired = Wired(KB)
    came = wired.send(base[5:MB])
    assert torch.equal(came, base[5:MB])
    assert wired.stats.batches["message"] == 1
