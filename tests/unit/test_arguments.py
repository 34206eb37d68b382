"""Arguments are pickled once where each process then has what it would have had, else for each.

Oracle: multiprocessing's pickler with the arguments as they are.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import resource
import socket
from collections.abc import Callable, Iterator
from multiprocessing import resource_sharer
from multiprocessing.reduction import DupFd, ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safeloader._python import as_if_spawning, extra_reducers
from safeloader.worker.arguments import Arguments, are_pickled

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="descriptors are counted as Linux has them"
)

SHARING: Any = torch.multiprocessing
SPAWN = multiprocessing.get_context("spawn")


class Given:
    """A descriptor as the process has it that is being started."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def detach(self) -> int:
        return self.fd


class Started:
    """Takes descriptors as a process does that is being started; here it is this one."""

    DupFd = Given

    def duplicate_for_child(self, fd: int) -> int:
        return os.dup(fd)


def sent(args: tuple[Any, ...]) -> tuple[Any, ...]:
    with as_if_spawning(Started()):
        pickled = ForkingPickler.dumps(args)
    received: tuple[Any, ...] = ForkingPickler.loads(pickled)
    return received


def memories() -> int:
    """How many anonymous files of ours are open here."""
    gc.collect()
    links = [each for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    return sum("safeloader" in os.readlink(each) for each in links)


@pytest.fixture(autouse=True)
def _no_memory_left() -> Iterator[None]:
    before = memories()
    yield
    assert memories() == before


class Counted:
    """Counts how often it is pickled."""

    def __init__(self, **attributes: Any) -> None:
        self.times = 0
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def __getstate__(self) -> dict[str, Any]:
        self.times += 1
        return vars(self).copy()

    def collate(self, batch: list[Any]) -> Any:
        return batch


def once(held: Counted, *others: Any, workers: int = 3) -> list[tuple[Any, ...]]:
    """What each worker receives; and it was pickled once."""
    arguments = Arguments(())
    got = []
    for worker in range(workers):
        got.append(sent(arguments((held, *others, worker))))
    arguments.close()
    assert held.times == 1
    assert [each[-1] for each in got] == list(range(workers))
    return got


def for_each(held: Counted, workers: int = 2) -> list[Any]:
    """What each worker receives; and it was pickled for each."""
    arguments = Arguments(())
    got = []
    for worker in range(workers):
        args = (held, worker)
        assert arguments(args) is args
        before = held.times
        got.append(sent(args)[0])
        assert held.times == before + 1
    arguments.close()
    return got


def test_what_is_one_object_stays_one() -> None:
    held = Counted(rows=[["a"], {"b": (1, 2.5, None)}])
    for there, collate, init, _ in once(held, held.collate, functools.partial(len, held.rows)):
        assert type(there) is Counted
        assert there.rows == held.rows
        assert collate.__self__ is there
        assert init.args[0] is there.rows


def test_arrays_are_each_workers_own_to_write_to() -> None:
    array = np.arange(100_000)
    (one, *_), (two, *_) = once(Counted(array=array, raw=bytearray(b"abc")), workers=2)
    assert one.array.flags.writeable
    one.array[0] = one.raw[0] = 7
    assert two.array[0] == array[0] == 0
    assert two.raw == b"abc"


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.parametrize("strategy", sorted(SHARING.get_all_sharing_strategies()))
def test_tensors_are_shared_by_all(strategy: str) -> None:
    tensor = torch.zeros(1000)
    held = Counted(
        tensor=tensor,
        view=tensor[10:20],
        parameter=torch.nn.Parameter(torch.ones(3)),
        storage=torch.ones(4).untyped_storage(),
        module=torch.nn.Linear(2, 2),
        empty=torch.empty(0),
        sparse=torch.eye(3).to_sparse(),
    )
    default = SHARING.get_sharing_strategy()
    SHARING.set_sharing_strategy(strategy)
    try:
        got = [each[0] for each in once(held)]
    finally:
        SHARING.set_sharing_strategy(default)
    for at, there in enumerate(got):
        there.tensor[at] = there.view[at] = 1
    for there in (held, *got):
        assert there.tensor.nonzero().flatten().tolist() == [0, 1, 2, 10, 11, 12]
        assert torch.equal(there.parameter, torch.ones(3))
        assert type(there.parameter) is torch.nn.Parameter
        assert bytes(there.storage) == bytes(held.storage)
        assert torch.equal(there.module.weight, held.module.weight)
        assert there.empty.shape == (0,)
        assert torch.equal(there.sparse.to_dense(), torch.eye(3))


class Subclass(torch.Tensor):
    owner: Any


def test_tensors_of_a_subclass_are_shared_with_what_they_hold() -> None:
    tensor = torch.zeros(10).as_subclass(Subclass)
    held = Counted(tensor=tensor)
    tensor.owner = held
    for there, _ in once(held):
        assert type(there.tensor) is Subclass
        assert there.tensor.owner is there
        there.tensor.add_(1)
    assert torch.equal(tensor.as_subclass(torch.Tensor), torch.full((10,), 3.0))


def test_locks_queues_and_connections_reach_each_worker() -> None:
    reader, writer = SPAWN.Pipe(duplex=False)
    ends = socket.socketpair()
    held = Counted(
        lock=SPAWN.Lock(),
        queue=SPAWN.SimpleQueue(),
        value=SPAWN.Value("i", 0),
        array=SPAWN.RawArray("q", 4),
        event=SPAWN.Event(),
        writer=writer,
        socket=ends[0],
    )
    held.event.set()
    for there, worker in once(held):
        assert there.event.is_set()
        with there.lock:
            assert not held.lock.acquire(block=False)
        there.queue.put(worker)
        assert held.queue.get() == worker
        there.writer.send(worker)
        assert reader.recv() == worker
        there.socket.send(b"x")
        assert ends[1].recv(1) == b"x"
        there.socket.close()
        with there.value.get_lock():
            there.value.value += 1
        there.array[worker] = 1
    assert held.value.value == 3
    assert list(held.array) == [1, 1, 1, 0]
    for each in (reader, writer, *ends):
        each.close()
    held.queue.close()


# ── what is pickled for each worker ──────────────────────────────────────────────────────────────


class OwnHandle:
    """Gives a descriptor to the process that is being started, as classes of a library may."""

    def __init__(self, quietly: bool = False) -> None:
        self.fd = 0
        self.quietly = quietly

    def __getstate__(self) -> dict[str, Any]:
        try:
            return vars(self) | {"fd": DupFd(self.fd)}
        except TypeError:
            if not self.quietly:
                raise
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fd = state["fd"].detach()
        os.close(self.fd)


class Registered:
    """Has a reducer for multiprocessing alone."""


def reduce_registered(_: Registered) -> Any:
    return Registered, ()


@pytest.fixture
def _registered() -> Iterator[None]:
    ForkingPickler.register(Registered, reduce_registered)
    yield
    del extra_reducers[Registered]


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize(
    "make", [OwnHandle, functools.partial(OwnHandle, quietly=True), Registered]
)
def test_what_is_of_one_process_has_all_pickled_for_each(make: Callable[[], Any]) -> None:
    for there in for_each(Counted(held=make())):
        assert isinstance(there.held, (OwnHandle, Registered))


def test_a_handle_that_can_be_received_once_has_all_pickled_for_each() -> None:
    handle = resource_sharer.DupFd(0)  # type: ignore[attr-defined, unused-ignore]
    try:
        for_each(Counted(held=handle))
    finally:
        resource_sharer.stop()


def limited(kind: int, most: int) -> Callable[[], None]:
    limits = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, limits[1]))
    return lambda: resource.setrlimit(kind, limits)


def test_without_room_they_are_pickled_for_each() -> None:
    arguments, args = Arguments(()), (["text"] * 1000 + [bytes(1 << 20)], 0)
    undo = limited(resource.RLIMIT_FSIZE, 1 << 16)
    try:
        assert arguments(args) is args
    finally:
        undo()


def test_without_descriptors_they_are_pickled_for_each() -> None:
    arguments, args = Arguments(()), (["text"], 0)
    undo = limited(resource.RLIMIT_NOFILE, 0)
    try:
        assert arguments(args) is args
    finally:
        undo()


def test_an_interrupt_is_no_reason_to_go_on() -> None:
    class Interrupted:
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Arguments(())((Interrupted(), 0))


def test_other_arguments_than_the_first_are_sent_as_they_are() -> None:
    arguments = Arguments(())
    first, other = ["first"], ["other"]
    assert sent(arguments((first, 0))) == (["first"], 0)
    assert sent(arguments((other, 1))) == (["other"], 1)
    assert sent(arguments((first, other, 2))) == (["first"], ["other"], 2)
    arguments.close()


def test_a_forked_process_lets_go_of_the_memory() -> None:
    arguments = Arguments(())
    arguments((["text"], 0))
    here = memories()
    pid = os.fork()
    if not pid:
        os._exit(memories() != here - 1)
    arguments.close()
    assert os.waitpid(pid, 0)[1] == 0


def test_processes_of_others_are_left_alone() -> None:
    class Other(SPAWN.Process):  # type: ignore[misc, name-defined, unused-ignore]
        pass

    assert not are_pickled(Other)
    assert are_pickled(SPAWN.Process)
    assert are_pickled(torch.multiprocessing.get_context("forkserver").Process)
    assert are_pickled(torch.multiprocessing.Process)
