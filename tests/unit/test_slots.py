"""Slots: lent, given back, given up; never overwritten while anything refers to what is in them."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import resource
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from safeloader.main import unpacking
from safeloader.wire.slots import FREE, GONE, LENT, SLOTS_A_BATCH, SlotTable
from safeloader.worker import slots as worker_slots
from safeloader.worker.slots import NoRoom
from tests.wired import KB, MB, SLOTS, Child, NotOpened, Wired, child, descriptors, filled, print_of


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
    wired.pool._shared_sizes.append(500 * KB)  # of an earlier batch
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


def test_a_batch_that_is_moved_to_shared_memory_leaves_its_slot(wired: Wired) -> None:
    batch = wired.send(filled(MB, 3)).share_memory_()
    assert wired.states == [FREE]
    assert batch.eq(3).all()


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
    with pytest.raises(NoRoom):
        wired.pool.room(3 * MB)
    assert set(wired.pool._slots) == before
    assert kept.eq(0).all()


def test_a_batch_lies_in_so_many_slots_at_most(wired: Wired) -> None:
    wired.pool._take = lambda size, take=wired.pool._take: take(64 * KB)  # type: ignore[method-assign,misc]
    wired.begin()
    for _ in range(SLOTS_A_BATCH):
        wired.pool.room(64 * KB)
    with pytest.raises(NoRoom, match=str(SLOTS_A_BATCH)):
        wired.pool.room(64 * KB)


# ── growing, shrinking ───────────────────────────────────────────────────────────────────────────


def test_a_loop_that_drops_its_batches_uses_few_slots(wired: Wired) -> None:
    for k in range(200):
        wired.collated([filled(40 * KB, k)])
    assert wired.stats.slots == 1
    assert wired.stats.bytes < 128 * KB


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
    before = descriptors()
    wired = Wired()
    tally, kept = wired.tally, wired.send(filled(MB, 1))
    wired.send(filled(MB, 2))
    gone = weakref.ref(wired.pool), weakref.ref(wired.unpacker)
    del wired
    assert [each() for each in gone] == [None, None]
    assert tally.stats().slots == 1  # the one that is kept
    assert kept.eq(1).all()
    del kept
    assert tally.stats().slots == tally.stats().bytes == 0
    assert descriptors() == before
    with open("/proc/self/maps") as maps:
        assert "memfd:safeloader" not in maps.read()


# ── what the worker keeps ────────────────────────────────────────────────────────────────────────


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


def test_a_fork_that_fails_to_be_prepared_is_a_fork_all_the_same(
    wired: Wired, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise OSError

    monkeypatch.setattr(wired.unpacker, "forking", fails)
    monkeypatch.setattr(wired.pool, "forking", fails)
    assert Child(lambda: True).agrees()


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
        patch.setattr(unpacking, "mapped", refused)
        with pytest.raises(NotOpened):
            wired.send(filled(MB, 1))
    assert wired.states == [GONE]
    assert wired.send(filled(MB, 2)).eq(2).all()
    assert wired.stats.slots == 1
    assert descriptors() == before


# ── the table ────────────────────────────────────────────────────────────────────────────────────


def test_each_worker_has_cells_of_its_own() -> None:
    table = SlotTable(3, MB)
    for worker in range(3):
        table.row(worker)[0] = table.row(worker)[-1] = worker
    assert [table.row(worker)[0] for worker in range(3)] == [0, 1, 2]
    assert len(table.row(2)) == table.slots


def test_the_table_is_not_pickled_but_to_workers() -> None:
    with pytest.raises(RuntimeError, match="should only be shared"):
        pickle.dumps(SlotTable(1, MB))


def test_cells_outlive_their_table() -> None:
    row = SlotTable(1, MB).row(0)
    row[3] = 7
    assert row[3] == 7


def test_content_is_as_it_was_sent(wired: Wired) -> None:
    sent = torch.arange(MB, dtype=torch.int64)
    assert print_of(wired.send(sent)) == print_of(sent)


def test_what_is_pickled_twice_counts_once(wired: Wired) -> None:
    """Tensors that overlap are found out in a first try, which is taken back."""
    base = torch.arange(40.0 * KB)
    for _ in range(3):
        windows = [base[k * KB : (k + 2) * KB] for k in range(8)]
        came = wired.send(windows)
        assert all(torch.equal(a, b) for a, b in zip(came, windows, strict=True))
        del came
    assert wired.pool._shared_sizes[-1] < 2 * 9 * 4 * KB
