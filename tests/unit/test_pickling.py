"""What cannot be pickled is found where it is, whatever it is; the search changes nothing.

Oracle: multiprocessing's own pickler, which is what the queues and the start of a process use.
"""

from __future__ import annotations

import array
import collections
import contextlib
import ctypes
import dataclasses
import functools
import io
import itertools
import logging
import multiprocessing
import os
import queue
import socket
import sqlite3
import sys
import tempfile
import threading
import time
import tracemalloc
import types
import weakref
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import context, shared_memory
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.datapipes.iter import IterableWrapper

from safeloader.introspect import pickling
from safeloader.introspect.pickling import UnpicklablePart, find_unpicklable
from tests import faults

SECRET = "hunter2-do-not-print"


class Point(ctypes.Structure):
    """Of no other test: ctypes names a pointer's class after the module that first asked for it."""


class Holding(Dataset[Any]):
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index


class Pair(NamedTuple):
    left: Any
    right: Any


class MyTuple(tuple[Any, ...]):
    pass


class MyDict(dict[str, Any]):
    pass


class MyList(list[Any]):
    pass


class MySet(set[Any]):
    pass


class Slotted:
    __slots__ = ("__dict__", "first", "second")

    def __init__(self, first: Any, second: Any) -> None:
        self.first = first
        self.second = second


@dataclasses.dataclass
class Record:
    name: str
    payload: Any


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenRecord:
    name: str
    payload: Any


class Hashable:
    """Can be an item of a set and a key of a dict; holds what it is given."""

    def __init__(self, held: Any) -> None:
        self.held = held


class ByArguments:
    """Pickled by `__reduce__`, through its constructor."""

    def __init__(self, one: Any, two: Any) -> None:
        self.one = one
        self.two = two

    def __reduce__(self) -> Any:
        return ByArguments, (self.one, self.two)


class MyException(Exception):
    pass


class MyThread(threading.Thread):
    pass


class LogFilter(logging.Filter):
    pass


def module_level(value: Any) -> Any:
    return value


def shadowed() -> int:
    return 1


original = shadowed


def shadowed() -> int:  # type: ignore[no-redef]
    return 2


def a_local_function() -> Callable[[], int]:
    def fn() -> int:
        return 1

    return fn


def a_local_class() -> type:
    class Local:
        pass

    return Local


def a_generator() -> Iterator[int]:
    yield 1


async def a_coroutine() -> None: ...


def located(thing: object, name: str = "dataset", **keywords: Any) -> str:
    """The path; the outcome is checked against what multiprocessing says of the whole."""
    found = find_unpicklable(thing, name, **keywords)
    assert found is not None
    with pytest.raises(BaseException):  # noqa: B017, PT011
        ForkingPickler.dumps(thing)
    return checked(found).path


def checked(found: UnpicklablePart) -> UnpicklablePart:
    for text in found[:4]:
        assert type(text) is str
        assert text
        assert SECRET not in text
        text.encode()
    assert len(found.reason) <= 200
    assert len(found.path) < 420
    assert len(found.advice) < 250
    assert len(found.kind) < 250
    assert found.advice.endswith(".")
    assert str(found) == f"{found.path}: {found.kind}"
    return found


def culprit_of(thing: object, name: str = "dataset", **keywords: Any) -> UnpicklablePart:
    found = find_unpicklable(thing, name, **keywords)
    assert found is not None
    return checked(found)


LOCK = threading.Lock()

# ── where it is ──────────────────────────────────────────────────────────────────────────────────

PLACES: dict[str, tuple[Callable[[], object], str]] = {
    "itself": (lambda: LOCK, "dataset"),
    "attribute": (lambda: Holding(rate=1, lock=LOCK), "dataset.lock"),
    "value of a dict": (lambda: Holding(settings={"a": 1, "db": LOCK}), "dataset.settings['db']"),
    "integer key": (lambda: {3: {(1, "a"): LOCK}}, "dataset[3][(1, 'a')]"),
    "item of a list": (lambda: [1, [2, LOCK]], "dataset[1][1]"),
    "item of a tuple": (lambda: (1, "a", (LOCK,)), "dataset[2][0]"),
    "item of a set": (lambda: {1, Hashable(LOCK)}, "dataset<item of a set>.held"),
    "item of a frozenset": (lambda: frozenset([LOCK]), "dataset<item of a set>"),
    "key of a dict": (lambda: {Hashable(LOCK): 1}, "dataset<key of a dict>.held"),
    "value under an object": (
        lambda: {Hashable(SECRET): LOCK},
        "dataset[<tests.unit.test_pickling.Hashable>]",
    ),
    "named tuple": (lambda: Pair(1, LOCK), "dataset[1]"),
    "subclass of tuple": (lambda: MyTuple((1, LOCK)), "dataset[1]"),
    "subclass of list": (lambda: MyList([1, LOCK]), "dataset[1]"),
    "subclass of dict": (lambda: MyDict(a=1, b=LOCK), "dataset['b']"),
    "subclass of set": (lambda: MySet([1, LOCK]), "dataset<item of a set>"),
    "ordered dict": (lambda: collections.OrderedDict(a=LOCK), "dataset['a']"),
    "counter": (lambda: collections.Counter({"a": LOCK}), "dataset['a']"),
    "default dict": (lambda: collections.defaultdict(list, a=[LOCK]), "dataset['a'][0]"),
    "default factory": (lambda: collections.defaultdict(lambda: 0), "dataset.default_factory"),
    "deque": (lambda: collections.deque([1, LOCK]), "dataset[1]"),
    "simple namespace": (lambda: types.SimpleNamespace(a=1, b=LOCK), "dataset.b"),
    "dataclass": (lambda: Record("a", {"x": LOCK}), "dataset.payload['x']"),
    "frozen dataclass with slots": (lambda: FrozenRecord("a", LOCK), "dataset.payload"),
    "slots": (lambda: Slotted(1, LOCK), "dataset.second"),
    "arguments of __reduce__": (lambda: ByArguments(1, [LOCK]), "dataset.two[0]"),
    "partial function": (lambda: functools.partial(lambda x: x, 1), "dataset.func"),
    "argument of a partial": (lambda: functools.partial(module_level, LOCK), "dataset.args[0]"),
    "keyword of a partial": (
        lambda: functools.partial(module_level, lock=LOCK),
        "dataset.keywords['lock']",
    ),
    "bound method": (lambda: Holding(lock=LOCK).__len__, "dataset.__self__.lock"),
    "bound method in C": (lambda: [LOCK].append, "dataset.__self__[0]"),
    "map": (lambda: map(a_local_function(), [1]), "dataset.__reduce__()[1][0]"),
    "array of objects": (
        lambda: Holding(table=np.array([[1, 2], [3, LOCK]], dtype=object)),
        "dataset.table[1, 1]",
    ),
    "exception": (lambda: MyException("a", LOCK), "dataset.args[1]"),
    "attribute of an exception": (lambda: faults.HoldsALock("a"), "dataset.lock"),
    "odd attribute name": (lambda: Holding(**{"a b": LOCK}), "dataset.a b"),
    "hook of a module": (
        lambda: hooked(torch.nn.Linear(2, 2)),
        "dataset.model._modules['0']._forward_hooks[",
    ),
    "nested transforms": (
        lambda: Holding(transform=Holding(transforms=[len, len, Holding(lambd=lambda x: x)])),
        "dataset.transform.transforms[2].lambd",
    ),
    "sample": (lambda: {"x": 1, "meta": [1, {"payload": a_generator()}]}, "dataset['meta'][1]"),
    "dataframe-like": (lambda: Holding(columns={"a": Holding(values=[LOCK])}), "dataset.columns"),
}


def hooked(module: torch.nn.Module) -> Holding:
    module.register_forward_hook(lambda *_: None)
    return Holding(model=torch.nn.Sequential(module))


@pytest.mark.parametrize("name", PLACES)
def test_the_path_leads_to_the_culprit(name: str) -> None:
    make, path = PLACES[name]
    found = located(make())
    if name in ("hook of a module", "sample", "dataframe-like"):
        assert found.startswith(path)
    else:
        assert found == path


@pytest.mark.parametrize("name", PLACES)
def test_paths_are_expressions(name: str) -> None:
    """Evaluated, the path gives what cannot be pickled."""
    dataset = PLACES[name][0]()
    path = located(dataset)
    if "<" in path or " b" in path or "__reduce__" in path:
        pytest.skip("says in words what has no expression")
    culprit = eval(path, {"dataset": dataset})
    with pytest.raises(Exception, match=r"."):
        ForkingPickler.dumps(culprit)


def test_the_first_of_several_is_told_and_then_the_next() -> None:
    dataset = Holding(one=[LOCK], two=lambda: 0)
    assert located(dataset) == "dataset.one[0]"
    dataset.one = []  # type: ignore[attr-defined]
    assert located(dataset) == "dataset.two"


def test_long_keys_are_bounded() -> None:
    path = located({"k" * 5000: {b"b" * 5000: LOCK}})
    assert len(path) < 100


def test_long_paths_are_bounded() -> None:
    inner: Any = LOCK
    for _ in range(40):
        inner = {"a key of some length": inner}
    assert len(located(inner)) < 420


# ── what it is ───────────────────────────────────────────────────────────────────────────────────


def open_file(tmp_path: Path, mode: str = "w") -> Any:
    return (tmp_path / "x").open(mode)


LAZILY = "on first use in __getitem__"
KINDS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "lambda": (lambda: lambda: 0, "a lambda", "at module level"),
    "local function": (
        a_local_function,
        "a local function a_local_function.<locals>.fn",
        "at module level",
    ),
    "shadowed function": (
        lambda: original,
        "a function shadowed",
        "at module level",
    ),
    "local class": (
        a_local_class,
        "a class defined inside a function, tests.unit.test_pickling.a_local_class.<locals>.Local",
        "at module level.",
    ),
    "instance of a local class": (
        lambda: a_local_class()(),
        "a class defined inside a function, tests.unit.test_pickling.a_local_class.<locals>.Local",
        "at module level.",
    ),
    "generator": (a_generator, "generator", "list("),
    "module": (lambda: os, "module", "Import it"),
    "lock": (threading.Lock, "_thread.lock", LAZILY),
    "reentrant lock": (threading.RLock, "_thread.RLock", LAZILY),
    "condition": (threading.Condition, "threading.Condition", LAZILY),
    "event": (threading.Event, "threading.Event", LAZILY),
    "thread": (lambda: threading.Thread(target=print), "threading.Thread", LAZILY),
    "subclass of thread": (
        MyThread,
        "tests.unit.test_pickling.MyThread (a threading.Thread)",
        LAZILY,
    ),
    "thread local": (threading.local, "_thread._local", LAZILY),
    "queue": (queue.Queue, "queue.Queue", LAZILY),
    "handler": (
        lambda: logging.StreamHandler(io.StringIO()),
        "logging.StreamHandler",
        LAZILY,
    ),
    "weak reference": (lambda: weakref.ref(Holding), "weakref.ReferenceType", LAZILY),
    "subclass of filter": (
        lambda: holding(LogFilter(), lock=LOCK),
        "tests.unit.test_pickling.LogFilter (a logging.Filter)",
        LAZILY,
    ),
    "database": (lambda: database_and_cursor()[0], "sqlite3.Connection", LAZILY),
    "cursor": (lambda: database_and_cursor()[1], "sqlite3.Cursor", LAZILY),
    "executor": (
        ThreadPoolExecutor,
        "concurrent.futures.thread.ThreadPoolExecutor",
        LAZILY,
    ),
    "temporary file": (
        tempfile.NamedTemporaryFile,
        "tempfile._TemporaryFileWrapper",
        LAZILY,
    ),
    "archive": (lambda: zipfile.ZipFile(io.BytesIO(), "w"), "zipfile.ZipFile", LAZILY),
    "memory view": (lambda: memoryview(b"a"), "memoryview", LAZILY),
    "frame": (sys._getframe, "frame", LAZILY),
    "pointer": (
        lambda: ctypes.pointer(Point()),
        "tests.unit.test_pickling.LP_Point",
        LAZILY,
    ),
    "iterator of a loader": (
        lambda: iter(DataLoader(Holding())),
        "torch.utils.data.dataloader._SingleProcessDataLoaderIter",
        "Mend its __getstate__",
    ),
    "tensor of a graph": (
        lambda: torch.ones(1, requires_grad=True) * 2,
        "torch.Tensor",
        ".detach()",
    ),
    "storage on the meta device": (
        lambda: torch.empty(2, device="meta").untyped_storage(),
        "torch.storage.UntypedStorage",
        ".cpu()",
    ),
}


def holding(thing: Any, **attributes: Any) -> Any:
    vars(thing).update(attributes)
    return thing


def database_and_cursor() -> tuple[sqlite3.Connection, sqlite3.Cursor]:
    """Closed: from Python 3.13 on one that is not is warned of when it is freed."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        return database, database.cursor()


@pytest.mark.parametrize("name", KINDS)
def test_kinds_and_advice(name: str) -> None:
    make, kind, advice = KINDS[name]
    found = culprit_of({"it": make()})
    assert found.path == "dataset['it']"
    assert found.kind == kind
    assert advice in found.advice


def test_an_open_file_is_told_with_its_path(tmp_path: Path) -> None:
    for mode, cls in (("w", "TextIOWrapper"), ("wb", "BufferedWriter"), ("rb", "BufferedReader")):
        with open_file(tmp_path, mode) as file:
            found = culprit_of(Holding(log=file))
        assert found.kind == f"an open file '{tmp_path}/x' (_io.{cls})"
        assert LAZILY in found.advice


def test_files_that_have_no_path() -> None:
    read, write = os.pipe()
    with open(read, "rb") as file, open(write, "wb", buffering=0) as raw:
        assert culprit_of(file).kind == "_io.BufferedReader"
        assert culprit_of(raw).kind == "_io.FileIO"
    text = io.TextIOWrapper(io.BytesIO())
    assert culprit_of(text).kind == "_io.TextIOWrapper"
    text.detach()
    assert culprit_of(text).kind == "_io.TextIOWrapper"


def test_a_coroutine() -> None:
    coroutine = a_coroutine()
    assert culprit_of([coroutine]).kind == "coroutine"
    coroutine.close()


def test_for_a_batch_the_advice_is_another() -> None:
    found = culprit_of({"db": database_and_cursor()[0]}, "sample", spawning=False)
    assert str(found) == "sample['db']: sqlite3.Connection"
    assert found.reason == "TypeError: cannot pickle 'sqlite3.Connection' object"
    assert found.advice.startswith("Leave it out, or give what was read from it")


def test_reasons_are_the_picklers_words() -> None:
    assert culprit_of(LOCK).reason == "TypeError: cannot pickle '_thread.lock' object"
    assert "attribute lookup" in culprit_of(lambda: 0).reason or "local object" in (
        culprit_of(lambda: 0).reason
    )
    graph = torch.ones(1, requires_grad=True) * 2
    assert culprit_of([graph]).reason.startswith("RuntimeError: Cowardly refusing")


def test_reasons_hide_secrets_and_an_endless_text_is_bounded() -> None:
    found = culprit_of(RaisesInReduce(ConnectionError(f"postgresql://bob:{SECRET}@host/db")))
    assert "its __reduce__ raised ConnectionError" in found.reason
    assert SECRET not in found.reason
    found = culprit_of(RaisesInReduce(ExitsWhenToldError()))
    assert "raised SystemExit" in found.reason


def test_keys_are_shown_and_values_are_not() -> None:
    thing = {"password": {"hunter": (SECRET, {"token": [SECRET, LOCK]})}}
    found = culprit_of(thing)
    assert found.path == "dataset['password']['hunter'][1]['token'][1]"


# ── what can be pickled has no culprit ───────────────────────────────────────────────────────────


class Tensor2(torch.Tensor):
    pass


FINE: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "plain values": lambda: {
        "a": [1, 2.5, "x", b"y", None, True, 3j, {1, 2}, (1,), frozenset("a")]
    },
    "function": lambda: module_level,
    "builtin": lambda: len,
    "class": lambda: Holding,
    "bound method": lambda: Holding().__len__,
    "method of a class in C": lambda: str.upper,
    "slot wrapper": lambda: int.__add__,
    "class method": lambda: dict.fromkeys,
    "partial": lambda: functools.partial(module_level, 1, a=2),
    "tensor": lambda: torch.ones(3),
    "leaf that requires grad": lambda: torch.ones(3, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.ones(3)),
    "subclass of tensor": lambda: torch.ones(3).as_subclass(Tensor2),
    "tensor with a lock": lambda: with_attribute(torch.ones(3)),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse csr": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "meta": lambda: torch.empty(3, device="meta"),
    "bfloat16": lambda: torch.ones(3, dtype=torch.bfloat16),
    "storage": lambda: torch.ones(3).untyped_storage(),
    "module": lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)),
    "state dict": lambda: torch.nn.Linear(2, 2).state_dict(),
    "generator": torch.Generator,
    "device and dtype": lambda: [
        torch.device("cpu"),
        torch.float32,
        torch.strided,
        torch.Size([1]),
    ],
    "array": lambda: np.ones((3, 4)),
    "array of strings": lambda: np.array(["a", "bc"]),
    "array of objects": lambda: np.array([1, "a", {}], dtype=object),
    "structured array": lambda: np.zeros(3, dtype=[("a", "i4"), ("b", "f8")]),
    "numpy generator": np.random.default_rng,
    "numpy scalar": lambda: np.float32(1.5),
    "bytes": lambda: [bytearray(b"abc"), array.array("i", [1, 2])],
    "named tuple": lambda: Pair(1, 2),
    "exception": lambda: MyException("a", 1),
    "dataclasses": lambda: [Record("a", 1), FrozenRecord("b", 2)],
    "deque": lambda: collections.deque([1, 2], maxlen=3),
    "path": lambda: Path("a/b"),
    "string file": lambda: io.StringIO("a"),
    "iterator": lambda: iter([1, 2]),
    "map": lambda: map(module_level, [1]),
    "logger": lambda: logging.getLogger("a"),
    "loader": lambda: DataLoader(Holding(), batch_size=2),
    "messages of ours": lambda: ByArguments(1, [2]),
}


def with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.lock = threading.Lock()  # type: ignore[attr-defined]  # which does not go along
    return tensor


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("name", FINE)
@pytest.mark.parametrize("spawning", [True, False])
def test_what_can_be_pickled_has_no_culprit(name: str, spawning: bool) -> None:
    thing = FINE[name]()
    assert find_unpicklable(thing, "it", spawning=spawning) is None
    assert find_unpicklable(Holding(it=[thing, thing]), "it", spawning=spawning) is None
    ForkingPickler.dumps(thing)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
        | st.tuples(inner, inner)
        | st.builds(Holding, a=inner, b=inner)
        | st.builds(Pair, inner, inner)
        | st.builds(ByArguments, inner, inner)
        | st.builds(MyList, st.lists(inner, max_size=3))
    ),
    max_leaves=20,
)


@pytest.mark.filterwarnings("ignore:Local function is not supported by pickle")  # without dill
def test_data_pipes() -> None:
    pipe = IterableWrapper([1, 2]).map(module_level).batch(2)
    assert find_unpicklable(pipe, "dataset") is None
    assert located(IterableWrapper([1, 2]).map(lambda x: x).batch(2)) == "dataset.datapipe.fn"


def test_a_loader_inside_a_dataset() -> None:
    loader = DataLoader(Holding(), num_workers=1, persistent_workers=True)
    assert find_unpicklable(Holding(loader=loader), "dataset") is None
    iterator = iter(loader)
    found = culprit_of(Holding(loader=loader))
    assert found.path == "dataset.loader._iterator"
    assert "NotImplementedError" in found.reason
    del loader, iterator


@given(values)
def test_any_plain_structure_has_no_culprit(thing: Any) -> None:
    assert find_unpicklable(thing, "it") is None


@given(values, st.data())
def test_one_lock_anywhere_is_found(thing: Any, data: st.DataObject) -> None:
    path, holder = "it", [thing]
    chain = [(thing, path)]
    while True:  # walk down to a place that can be written to
        inner: list[tuple[Any, str]] = []
        if type(thing) in (list, MyList):
            inner = [(each, f"{path}[{at}]") for at, each in enumerate(thing)]
        elif type(thing) is Holding:
            inner = [(each, f"{path}.{name}") for name, each in vars(thing).items()]
        inner = [(each, at) for each, at in inner if type(each) in (list, MyList, Holding)]
        if not inner or data.draw(st.booleans()):
            break
        thing, path = data.draw(st.sampled_from(inner))
        chain.append((thing, path))
    if type(thing) in (list, MyList):
        thing.append(LOCK)
        path += f"[{len(thing) - 1}]"
    elif type(thing) is Holding:
        thing.lock = LOCK
        path += ".lock"
    else:
        holder.append(LOCK)
        assert located(holder, "it") == "it[1]"
        return
    assert located(chain[0][0], "it") == path


# ── nothing is changed ───────────────────────────────────────────────────────────────────────────


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_tensors_stay_where_they_are() -> None:
    tensors = [torch.ones(1000), torch.nn.Parameter(torch.ones(10)), torch.eye(3).to_sparse()]
    sub = torch.ones(5).as_subclass(Tensor2)
    thing = Holding(tensors=tensors, sub=sub, lock=LOCK)
    for spawning in (True, False):
        assert culprit_of(thing, spawning=spawning).path == "dataset.lock"
    assert not any(each.untyped_storage().is_shared() for each in (*tensors[:2], sub))


def test_no_descriptor_and_no_thread_is_left(tmp_path: Path) -> None:
    one, other = multiprocessing.Pipe()
    ends = socket.socketpair()
    thing = {"ends": [one, other], "sockets": ends, "tensor": torch.ones(3), "graph": LOCK}
    before = descriptors(), threading.active_count()
    for spawning in (True, False):
        assert culprit_of(thing, spawning=spawning).path == "dataset['graph']"
    assert (descriptors(), threading.active_count()) == before
    for end in (one, other, *ends):
        end.close()


def test_iterators_are_not_used_up() -> None:
    numbers = iter([1, 2, 3])
    generator = a_generator()
    assert culprit_of([numbers, generator]).path == "dataset[1]"
    assert [*numbers] == [1, 2, 3]
    assert [*generator] == [1]


def test_the_thread_is_left_as_it_was() -> None:
    seen = []

    class Looks:
        def __getstate__(self) -> Any:
            seen.append(context.get_spawning_popen())
            raise ValueError

    assert find_unpicklable(Looks(), "it") is not None
    assert seen[0] is not None
    assert context.get_spawning_popen() is None
    marker: Any = object()
    context.set_spawning_popen(marker)
    try:
        seen.clear()
        assert find_unpicklable(Looks(), "it", spawning=False) is not None
        assert {*seen} == {None}
        assert context.get_spawning_popen() is marker
    finally:
        context.set_spawning_popen(None)


def test_large_data_is_not_copied(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "x", dtype=np.uint8, mode="w+", shape=(2**26,))
    tensor = torch.zeros(2**24)
    data = [mapped, np.zeros(2**26, np.uint8), tensor, tensor.untyped_storage(), bytes(2**26)]
    tracemalloc.start()
    try:
        for spawning in (True, False):
            assert culprit_of([*data, LOCK], spawning=spawning).path == "dataset[5]"
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


# ── multiprocessing ──────────────────────────────────────────────────────────────────────────────

SPAWN = multiprocessing.get_context("spawn")
FORK = multiprocessing.get_context("fork")
SHARED: dict[str, Callable[[Any], Any]] = {
    "lock": lambda ctx: ctx.Lock(),
    "reentrant lock": lambda ctx: ctx.RLock(),
    "semaphore": lambda ctx: ctx.Semaphore(2),
    "condition": lambda ctx: ctx.Condition(),
    "event": lambda ctx: ctx.Event(),
    "queue": lambda ctx: ctx.Queue(),
    "simple queue": lambda ctx: ctx.SimpleQueue(),
    "value": lambda ctx: ctx.Value("i", 1),
    "array": lambda ctx: ctx.Array("i", 3),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_multiprocessing_shares_is_fine_where_a_process_is_started(name: str) -> None:
    shared = SHARED[name](SPAWN)
    assert find_unpicklable(Holding(shared=shared), "dataset") is None
    found = culprit_of({"shared": shared}, "sample", spawning=False)
    assert found.path == "sample['shared']"
    assert "through inheritance" in found.reason
    assert found.kind.startswith("multiprocessing.")
    assert "make it part of the dataset" in found.advice


@pytest.mark.parametrize("name", SHARED)
def test_what_was_made_for_fork_cannot_be_given_to_a_spawned_process(name: str) -> None:
    found = culprit_of(Holding(shared=SHARED[name](FORK)))
    assert found.path == "dataset.shared"
    assert "SemLock created in a fork context" in found.reason
    assert "get_context" in found.advice


def test_raw_shared_memory() -> None:
    raw = multiprocessing.RawArray("i", 3)
    assert find_unpicklable([raw, multiprocessing.RawValue("d")], "dataset") is None
    assert culprit_of([1, raw], "sample", spawning=False).path == "sample[1]"


def test_what_can_go_through_a_queue_too() -> None:
    memory = shared_memory.SharedMemory(create=True, size=10)
    try:
        assert find_unpicklable([memory, multiprocessing.Pipe()], "it") is None
        assert find_unpicklable([memory, multiprocessing.Pipe()], "it", spawning=False) is None
    finally:
        memory.close()
        memory.unlink()


def test_a_pool_is_opened_in_the_worker() -> None:
    with SPAWN.Pool(1) as pool:
        found = culprit_of(Holding(pool=pool))
    assert str(found) == "dataset.pool: multiprocessing.pool.Pool"
    assert LAZILY in found.advice


def test_a_subclass_of_socket_is_not_a_socket() -> None:
    class Mine(socket.socket):
        pass

    with Mine() as mine:
        assert culprit_of([mine]).path == "dataset[0]"


def test_reducers_that_the_user_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert located([LOCK]) == "dataset[0]"
    monkeypatch.setitem(
        ForkingPickler._extra_reducers,  # type: ignore[attr-defined]
        type(LOCK),
        lambda _: (threading.Lock, ()),
    )
    assert find_unpicklable([LOCK], "it") is None
    assert find_unpicklable(Holding(it=LOCK, other=a_generator()), "it").path == "it.other"  # type: ignore[union-attr]


# ── cycles, depth, and objects that do harm ──────────────────────────────────────────────────────


def test_what_refers_back_to_its_owner_is_not_blamed_for_it() -> None:
    dataset = Holding()
    dataset.cache = Holding(owner=dataset, items=[dataset])  # type: ignore[attr-defined]
    assert find_unpicklable(dataset, "dataset") is None
    dataset.lock = LOCK  # type: ignore[attr-defined]
    assert located(dataset) == "dataset.lock"
    endless: list[Any] = []
    endless += [endless, (endless,), {"self": endless}]
    assert find_unpicklable(endless, "it") is None
    endless.append(LOCK)
    assert located(endless) == "dataset[3]"


def test_an_object_pickled_through_itself() -> None:
    one, other = ByArguments(1, None), ByArguments(2, None)
    one.two, other.two = other, one
    found = culprit_of(Holding(it=one))
    assert found.path.startswith("dataset.it")
    assert "nested too deeply" in found.kind
    assert "RecursionError" in found.reason


class Node:
    def __init__(self, inner: Any) -> None:
        self.inner = inner


class Stateful(Node):
    def __getstate__(self) -> Any:
        return vars(self).copy()


def chain_of(make: Callable[[Any], Any], length: int, end: Any = None) -> Any:
    for _ in range(length):
        end = make(end)
    return end


def pickles(thing: object) -> bool:
    try:
        ForkingPickler.dumps(thing)
    except RecursionError:
        return False
    return True


@pytest.mark.parametrize("make", [Node, Stateful, lambda x: [x], lambda x: {"a": (x,)}, Hashable])
@pytest.mark.parametrize("length", [2_000, 20_000])
def test_what_is_nested_too_deeply_is_told_where_it_begins(make: Any, length: int) -> None:
    tree = Holding(rate=1, tree=Holding(root=chain_of(make, length)))
    if length == 2_000 and pickles(
        tree
    ):  # from Python 3.12 on calls in C have a bound of their own
        assert find_unpicklable(tree, "dataset") is None
        return
    found = culprit_of(tree)
    assert found.path == "dataset.tree.root"
    assert found.kind.endswith(", nested too deeply to pickle")
    assert "RecursionError" in found.reason
    assert "flat list" in found.advice


@pytest.mark.parametrize("length", range(150, 1_050, 45))
def test_at_the_edge_of_too_deep(length: int) -> None:
    """As with the pickler itself, which has a few calls fewer on its stack."""
    for make in (Node, lambda x: [x]):
        found = find_unpicklable(Holding(root=chain_of(make, length)), "dataset")
        assert found is None or str(checked(found)).startswith("dataset.root: ")


def test_a_culprit_deep_inside_is_found() -> None:
    found = culprit_of(chain_of(lambda x: [x], 200, end=LOCK))
    assert found.kind == "_thread.lock"
    assert found.path.startswith("dataset[0][0]")
    assert "characters left out" in found.path
    assert culprit_of(chain_of(Node, 150, end=LOCK)).kind == "_thread.lock"


class Harmful:
    """Everything raises that can be asked but by the pickler."""

    def __init__(self, held: Any = LOCK) -> None:
        self.held = held

    def _harm(self, *args: Any) -> Any:
        raise RuntimeError(SECRET)

    __repr__ = __str__ = __eq__ = __len__ = __iter__ = __bool__ = __getitem__ = _harm
    __hash__ = __dir__ = __sizeof__ = __format__ = __index__ = _harm  # type: ignore[assignment]
    __getattr__ = shape = nbytes = _harm
    size = property(_harm)


class Raises:
    """Raises in one method of the protocol."""

    def __init__(self, exception: BaseException | None = None) -> None:
        self.exception = exception or ValueError("no state")


class RaisesInGetstate(Raises):
    def __getstate__(self) -> Any:
        raise self.exception


class RaisesInReduce(Raises):
    def __reduce__(self) -> Any:
        raise self.exception


class RaisesInReduceEx(Raises):
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self.exception


class RaisesInNewArgs(Raises):
    def __getnewargs__(self) -> Any:
        raise self.exception


class RaisesWhileIterated(Raises):
    def __reduce__(self) -> Any:
        def items() -> Iterator[Any]:
            yield 1
            raise self.exception

        return list, (), None, items()


class Recurses:
    def __getattr__(self, name: str) -> Any:
        return getattr(self, name + "_")

    def __getstate__(self) -> Any:
        return self.missing


class WrongReduce:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __reduce__(self) -> Any:
        return self.answer


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError

    __repr__ = __str__


class ExitsWhenToldError(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class Endless:
    """Is pickled by ever another of its kind."""

    def __reduce__(self) -> Any:
        return module_level, (Endless(),)


class RaisingMeta(type):
    def __repr__(cls) -> str:
        raise ZeroDivisionError

    def __hash__(cls) -> int:
        raise ZeroDivisionError

    __eq__ = None  # type: ignore[assignment]


class OfRaisingMeta(metaclass=RaisingMeta):
    pass


@pytest.mark.parametrize(
    ("cls", "method"),
    [
        (RaisesInGetstate, "__getstate__"),
        (RaisesInReduce, "__reduce__"),
        (RaisesInReduceEx, "__reduce_ex__"),
        (RaisesInNewArgs, "__getnewargs__"),
    ],
)
@pytest.mark.parametrize("exception", [ValueError("no state"), KeyError(1), UnprintableError()])
def test_methods_that_raise(cls: Any, method: str, exception: Exception) -> None:
    found = culprit_of({"a": [1, cls(exception)]})
    assert found.path == "dataset['a'][1]"
    assert found.kind == f"tests.unit.test_pickling.{cls.__name__}"
    assert found.reason.startswith(f"its {method} raised {type(exception).__name__}")
    assert found.advice.startswith(f"Mend its {method}")


HARMFUL: dict[str, tuple[Callable[[], Any], str]] = {
    "all but pickling raises": (Harmful, ".held"),
    "exits": (lambda: RaisesInGetstate(SystemExit(1)), ""),
    "generator exit": (lambda: RaisesInGetstate(GeneratorExit()), ""),
    "stop iteration": (lambda: RaisesInReduce(StopIteration()), ""),
    "out of memory": (lambda: RaisesInReduce(MemoryError()), ""),
    "raises while it is iterated": (RaisesWhileIterated, ""),
    "recurses in __getattr__": (Recurses, ""),
    "ever another": (Endless, ""),
    "wrong type": (lambda: WrongReduce(17), ""),
    "no such global": (lambda: WrongReduce("no_such_name"), ""),
    "empty": (lambda: WrongReduce(()), ""),
    "too long": (lambda: WrongReduce((list, (), None, None, None, None, 1, 2)), ""),
    "not callable": (lambda: WrongReduce((1, ())), ""),
    "arguments no tuple": (lambda: WrongReduce((list, 5)), ""),
    "items no iterator": (lambda: WrongReduce((list, (), None, 5)), ""),
    "endless items": (lambda: WrongReduce((list, (LOCK,), None, itertools.count())), ""),
    "instance of it": (OfRaisingMeta, ""),
    "reason of many characters": (lambda: RaisesInReduce(ValueError("x" * 100_000)), ""),
    "reason with surrogates": (lambda: RaisesInReduce(ValueError("\udcff")), ""),
    "cell": (lambda: types.CellType(1), ""),
    "frame": (sys._getframe, ""),
    "traceback": (lambda: sys._getframe().f_trace or types.MappingProxyType({}), ""),
}


@pytest.mark.parametrize("name", HARMFUL)
@pytest.mark.parametrize("spawning", [True, False])
def test_nothing_breaks_the_search(name: str, spawning: bool) -> None:
    make, where = HARMFUL[name]
    thing = Holding(first=1, it=make())
    found = culprit_of(thing, spawning=spawning, bound_s=1 if "endless" in name else 60)
    assert found.path.startswith(f"dataset.it{where}")


def test_only_the_keyboard_interrupts() -> None:
    with pytest.raises(KeyboardInterrupt):
        find_unpicklable([RaisesInGetstate(KeyboardInterrupt())], "it")


def test_a_fault_of_the_search_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickling, "_children", None)
    assert culprit_of([LOCK]).path == "dataset"
    monkeypatch.setattr(pickling, "_told", None)
    assert find_unpicklable([LOCK], "dataset") is None


def test_it_lets_go_of_what_it_looked_at() -> None:
    class Local:
        pass

    local = Local()
    gone = weakref.ref(local)
    assert find_unpicklable([local, LOCK], "it") is not None
    del local
    assert gone() is None


# ── time ─────────────────────────────────────────────────────────────────────────────────────────


class Clock:
    """Time passes only where something takes it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pickling, "monotonic", clock)
    Slow.clock = clock
    return clock


class Slow:
    """Takes a second to be pickled."""

    clock: Clock

    def __init__(self, held: Any = None) -> None:
        self.held = held

    def __getstate__(self) -> Any:
        self.clock.now += 1
        return vars(self)


def test_out_of_time_before_anything_is_known(clock: Clock) -> None:
    assert find_unpicklable([Slow(), Slow(), LOCK], "it", bound_s=1) is None
    assert find_unpicklable([LOCK], "it", bound_s=0) is None
    assert find_unpicklable([LOCK], "it", bound_s=-1) is None


def test_it_is_found_behind_what_takes_long(clock: Clock) -> None:
    dataset = Holding(samples=[Slow() for _ in range(3)], lock=LOCK)
    assert culprit_of(dataset).path == "dataset.lock"


def test_out_of_time_the_deepest_so_far_is_told(clock: Clock) -> None:
    found = culprit_of(Holding(inner=[Late(clock), LOCK]), bound_s=5)
    assert found.path == "dataset.inner"
    assert found.reason.endswith("(the search ran out of time: it is this or a part of it)")
    assert found.reason.startswith("TypeError: cannot pickle")


class Late:
    """Takes all the time there is when it is pickled for the third time."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.count = 0

    def __reduce__(self) -> Any:
        self.count += 1
        if self.count == 3:
            self.clock.now += 100
        return int, ()


def test_a_large_list_that_can_be_pickled_ends_in_time(clock: Clock) -> None:
    assert find_unpicklable([Slow() for _ in range(10_000)], "it", bound_s=5) is None
    assert clock.now < 7


def test_time_is_looked_at_in_what_has_no_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and texts run through C alone; what is written is noticed."""
    ticks = itertools.count()
    monkeypatch.setattr(pickling, "monotonic", lambda: next(ticks) * 0.1)
    assert find_unpicklable([list(range(2_000_000))], "it", bound_s=5) is None
    assert next(ticks) < 200


def test_a_real_sample_in_real_time() -> None:
    """Not a benchmark: a search that walks where it should not takes minutes."""
    sample = {f"key{n}": [torch.ones(3), {"a": list(range(100))}] for n in range(1000)}
    sample["last"] = [LOCK]
    start = time.monotonic()
    assert culprit_of(sample, bound_s=60).path == "dataset['last'][0]"
    assert time.monotonic() - start < 20
