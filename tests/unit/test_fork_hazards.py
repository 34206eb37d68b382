"""What does not survive the way to a worker is found before, and nothing else is."""
# ruff: noqa: SIM115  (files that stay open are what this is about)

from __future__ import annotations

import bz2
import collections
import concurrent.futures
import dataclasses
import functools
import gzip
import io
import logging
import lzma
import mmap
import multiprocessing
import multiprocessing.pool
import queue
import random
import socket
import sqlite3
import ssl
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import types
import warnings
import weakref
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    default_collate,
    get_worker_info,
)
from torch.utils.data.datapipes.iter import IterableWrapper

from safeloader.introspect import fork_hazards, parts
from safeloader.introspect.advice import CUDA, LOCK
from safeloader.introspect.fork_hazards import natives, survey, warn_once
from safeloader.introspect.generators import generators_of
from safeloader.introspect.suspects import Inherited
from tests import datasets


class Holding(Dataset[Any]):
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __getitem__(self, index: int) -> int:
        return index

    def __len__(self) -> int:
        return 8


def found_in(dataset: object, start_method: str = "fork", **beside: Any) -> list[Inherited]:
    return survey(dataset, "dataset", start_method=start_method, num_workers=2, beside=beside)


def told(value: Any, start_method: str = "fork") -> dict[str, str]:
    """Path and kind of what is found in a dataset with this attribute."""
    found = found_in(Holding(x=value), start_method)
    assert all(each.why and each.advice for each in found)
    return {each.path: each.kind for each in found}


def only(value: Any) -> Inherited:
    [found] = found_in(Holding(x=value))
    assert told(value, "spawn") == told(value, "forkserver") == {}
    assert found.path == "dataset.x"
    return found


@pytest.fixture(autouse=True)
def standing_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time passes for the walk: what it finds does not go by how busy the machine is."""
    monkeypatch.setattr(fork_hazards, "thread_time", lambda: 0.0)


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


# ---- random generators


GENERATORS: dict[str, Callable[[], Any]] = {
    "numpy.random.Generator": lambda: np.random.default_rng(3),
    "numpy.random.mtrand.RandomState": lambda: np.random.RandomState(3),
    "random.Random": lambda: random.Random(3),
    "torch.Generator": lambda: torch.Generator().manual_seed(3),
}


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_generators_are_told_under_every_start_method(kind: str, start_method: str) -> None:
    assert told(GENERATORS[kind](), start_method) == {"dataset.x": kind}


def test_a_bit_generator_and_subclasses_are_told() -> None:
    class Mine(random.Random):
        pass

    assert told(np.random.PCG64()) == {"dataset.x": "numpy.random.PCG64"}
    assert list(told(Mine())) == ["dataset.x"]


def test_a_generator_is_told_through_its_methods() -> None:
    assert list(told(random.Random(1).random)) == ["dataset.x.__self__"]
    assert list(told(np.random.default_rng(1).integers)) == ["dataset.x.__self__"]


@pytest.mark.parametrize(
    "value",
    [
        random.random,
        np.random.rand,
        getattr(random, "_inst"),  # noqa: B009
        np.random.mtrand._rand,
        torch.default_generator,
        random.SystemRandom(),
        random,
        np.random,
    ],
    ids=repr,
)
def test_what_torch_seeds_in_each_worker_is_not_told(value: Any) -> None:
    assert told([value]) == {}


def test_the_wording_goes_by_the_number_of_workers() -> None:
    dataset = Holding(rng=np.random.default_rng())
    [several] = survey(dataset, "dataset", start_method="spawn", num_workers=4)
    [single] = survey(dataset, "dataset", start_method="spawn", num_workers=1)
    assert "each of the 4 workers" in several.why
    assert "the worker starts each epoch" in single.why


def test_generators_of_torchs_samplers_loaders_and_pipes_are_torchs_business() -> None:
    generator = torch.Generator()
    assert told(RandomSampler(range(4), generator=generator)) == {}
    assert told(DataLoader(Holding(), shuffle=True, generator=generator)) == {}
    pipe = IterableWrapper(range(8)).shuffle()
    assert isinstance(vars(pipe)["_rng"], random.Random)
    assert found_in(pipe) == []
    assert told(pipe) == {}


def draw(generator: Any) -> int:
    if isinstance(generator, torch.Generator):
        return int(torch.randint(1 << 30, (), generator=generator))
    if isinstance(generator, random.Random):
        return generator.randrange(1 << 30)
    return int(getattr(generator, "integers", getattr(generator, "randint", None))(1 << 30))


class Drawing(Dataset[Any]):
    def __init__(self, rng: Any) -> None:
        self.rng = rng

    def __getitem__(self, index: int) -> tuple[int, int]:
        info = get_worker_info()
        assert info is not None
        return info.id, draw(self.rng)

    def __len__(self) -> int:
        return 8


def streams(dataset: Any, **options: Any) -> list[list[int]]:
    """What each of two workers of the stock loader drew in an epoch."""
    drawn: list[list[int]] = [[], []]
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", **options
    )
    for worker, number in loader:
        drawn[worker].append(number)
    assert [len(each) for each in drawn] == [4, 4]
    return drawn


@pytest.mark.parametrize("kind", GENERATORS)
def test_workers_do_draw_the_same_numbers_and_the_advice_mends_it(kind: str) -> None:
    dataset = Drawing(GENERATORS[kind]())
    first, second = streams(dataset)
    assert first == second
    assert streams(dataset) == [first, first]  # the next epoch too

    [found] = found_in(dataset)
    promise, line = found.advice.split("in worker_init_fn, ")
    assert promise == "seed it per worker: "
    names: dict[str, Any] = {"np": np, "get_worker_info": get_worker_info}
    exec(f"def initialise(worker_id): {line}", names)
    torch.manual_seed(1)
    first, second = streams(dataset, worker_init_fn=names["initialise"])
    assert first != second
    assert streams(dataset, worker_init_fn=names["initialise"])[0] != first


class DrawingOfProcess(Dataset[Any]):
    def __getitem__(self, index: int) -> tuple[int, int, float, int]:
        info = get_worker_info()
        assert info is not None
        return (
            info.id,
            random.getrandbits(40),
            float(np.random.rand()),
            int(torch.randint(9**9, ())),
        )

    def __len__(self) -> int:
        return 2


def test_the_process_wide_generators_do_differ_between_workers() -> None:
    loader = DataLoader(
        DrawingOfProcess(), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    (_, *first), (_, *second) = loader
    assert all(a != b for a, b in zip(first, second, strict=True))


# ---- what the user's code sees to in the worker


# ---- connections


def test_sqlite_connections_are_told_while_open(cleanup: ExitStack) -> None:
    connection = cleanup.enter_context(closing(sqlite3.connect(":memory:")))
    found = only(connection)
    assert found.kind == "sqlite3.Connection"
    assert "replies get mixed up" in found.why
    assert "on first use" in found.advice
    cursor = connection.cursor()
    assert only(cursor).kind == "sqlite3.Cursor"
    assert told([connection, cursor]) == {"dataset.x[0]": "sqlite3.Connection"}
    connection.close()
    assert told([connection, cursor]) == {}
    assert told(sqlite3.Row) == {}


def test_a_subclass_with_properties_is_told_and_none_is_run(cleanup: ExitStack) -> None:
    class Mine(sqlite3.Connection):
        @property
        def total_changes(self) -> int:  # type: ignore[override]
            raise AssertionError("not to be run")

    mine = cleanup.enter_context(closing(sqlite3.connect(":memory:", factory=Mine)))
    assert only(mine).path == "dataset.x"


def stand_in(name: str, *bases: type, **attributes: Any) -> Any:
    """An object of a class of that full name, as if from a package that is not installed."""
    module, _, own = name.rpartition(".")
    made = type(own, bases, {"__module__": module})()
    vars(made).update(attributes)
    return made


@pytest.mark.parametrize(
    "name",
    [
        "asyncpg.connection.Connection",
        "pymongo.synchronous.mongo_client.MongoClient",
        "botocore.client.BaseClient",
        "boto3.resources.base.ServiceResource",
        "grpc.Channel",
        "fsspec.asyn.AsyncFileSystem",
        "psycopg2.extensions.connection",
        "psycopg._connection_base.BaseConnection",
        "pymysql.connections.Connection",
        "MySQLdb._mysql.connection",
        "mysql.connector.abstracts.MySQLConnectionAbstract",
        "lmdb.cffi.Environment",
        "_duckdb.DuckDBPyConnection",
    ],
)
def test_clients_of_other_packages_go_by_name(name: str) -> None:
    loaded = {*sys.modules}
    client = stand_in(name)
    assert only(client).kind.endswith(name.rpartition(".")[2])
    mine = stand_in("tests.Mine", type(client))
    assert only(mine).kind == "tests.Mine"
    assert name.partition(".")[0] not in sys.modules.keys() - loaded


def test_clients_that_are_closed_or_not_connected_yet_are_not_told() -> None:
    name = "pymongo.synchronous.mongo_client.MongoClient"
    assert told(stand_in(name, _opened=False, _closed=False)) == {}
    assert told(stand_in(name, _opened=True, _closed=True)) == {}
    assert told(stand_in(name, _opened=True, _closed=False)) != {}
    assert told(stand_in("pymysql.connections.Connection", _closed=True)) == {}


def test_an_hdf5_handle_is_told_while_open() -> None:
    def handle(identity: int) -> Any:
        low_level = stand_in("h5py.h5f.FileID", id=identity)
        base = stand_in("h5py._hl.base.HLObject")
        return stand_in("h5py._hl.files.File", type(base), _id=low_level)

    assert only(handle(7)).kind == "h5py.files.File"
    assert told(handle(0)) == {}


def test_names_alone_are_not_enough() -> None:
    assert told(stand_in("mine.database.Connection")) == {}
    assert told(stand_in("h5py_tools.HLObject", _id=3)) == {}


def test_sockets_are_told_while_open(cleanup: ExitStack) -> None:
    left, right = socket.socketpair()
    cleanup.enter_context(left)
    cleanup.enter_context(right)
    assert only(left).kind == "socket.socket"
    secure = ssl.create_default_context()
    assert told(secure) == {}
    wrapped = cleanup.enter_context(
        secure.wrap_socket(right, server_hostname="x", do_handshake_on_connect=False)
    )
    assert only(wrapped).kind == "ssl.SSLSocket"
    left.close()
    assert told(left) == {}


def test_a_client_is_told_in_one_piece_and_only_with_a_live_part(cleanup: ExitStack) -> None:
    left, right = socket.socketpair()
    cleanup.enter_context(left)
    cleanup.enter_context(right)
    idle = stand_in("requests.sessions.Session", adapters={"https://": stand_in("urllib3.Pool")})
    assert told(idle) == {}
    pool = stand_in("urllib3.Pool", pool=[left, right])
    used = stand_in("requests.sessions.Session", adapters={"https://": pool})
    assert only(used).kind == "requests.sessions.Session"
    engine = stand_in("sqlalchemy.engine.base.Engine", pool=pool)
    assert only(engine).kind == "sqlalchemy.engine.base.Engine"
    redis_pool = stand_in("redis.connection.ConnectionPool", available=[left])
    assert told(stand_in("redis.client.Redis", connection_pool=redis_pool)) == {}
    assert told(stand_in("redis.client.Redis", connection=stand_in("x.y", _sock=left))) != {}


# ---- files


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "numbers.txt"
    path.write_text("".join(f"{number:04}" for number in range(100)))
    return path


def test_files_open_for_reading_are_told(text_file: Path, cleanup: ExitStack) -> None:
    opened = [
        open(text_file),
        open(text_file, "rb"),
        open(text_file, "rb", buffering=0),
        open(text_file, "r+b"),
        tempfile.NamedTemporaryFile(),
    ]
    kinds = [only(cleanup.enter_context(file)).kind for file in opened]
    assert kinds[:3] == ["io.TextIOWrapper", "io.BufferedReader", "io.FileIO"]
    assert kinds[3:] == ["io.BufferedRandom", "tempfile._TemporaryFileWrapper"]
    assert "share one read position" in only(opened[0]).why
    for file in opened:
        file.close()
    assert told(opened) == {}


def test_archives_are_told_while_they_hold_a_file(tmp_path: Path, cleanup: ExitStack) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("inner", b"abc")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.zip", "inner")
    for module in (gzip, bz2, lzma):
        with module.open(tmp_path / f"a.{module.__name__}", "wb") as compressed:
            compressed.write(b"abc")
    np.savez(tmp_path / "a.npz", a=np.arange(3))
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    archive = zipfile.ZipFile(tmp_path / "a.zip")
    opened: list[Any] = [
        archive,
        archive.open("inner"),
        tarfile.open(tmp_path / "a.tar"),
        gzip.open(tmp_path / "a.gzip"),
        bz2.open(tmp_path / "a.bz2"),
        lzma.open(tmp_path / "a.lzma"),
        np.load(tmp_path / "a.npz"),
        Image.open(tmp_path / "a.png"),
    ]
    for each in opened:
        assert only(cleanup.enter_context(each)).path == "dataset.x"
    opened[-1].load()  # closes the file
    assert told(opened[-1]) == {}
    for each in opened:
        each.close()
    assert told(opened) == {}


def test_memory_and_files_to_write_are_not_told(text_file: Path, cleanup: ExitStack) -> None:
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("inner", b"abc")
    file = cleanup.enter_context(open(text_file, "r+b"))
    mapped = cleanup.enter_context(mmap.mmap(file.fileno(), 0))
    harmless = [
        io.BytesIO(),
        io.StringIO(),
        io.TextIOWrapper(io.BytesIO()),
        zipfile.ZipFile(zipped),
        mapped,
        np.memmap(text_file, mode="r"),
        torch.from_file(str(text_file), size=8, dtype=torch.uint8),
        cleanup.enter_context(open(text_file.with_name("log"), "w")),
        sys.__stderr__,
        logging.getLogger("x"),
        logging.FileHandler(text_file.with_name("log2"), delay=True),
        text_file,
    ]
    assert told(harmless) == {}


class Reading(Dataset[bytes]):
    def __init__(self, file: Any) -> None:
        self.file = file

    def __getitem__(self, index: int) -> bytes:
        return self.file.read(4)  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return 10


def test_a_shared_file_is_read_at_a_common_position(text_file: Path) -> None:
    with open(text_file, "rb", buffering=0) as file:
        loader = DataLoader(
            Reading(file), batch_size=None, num_workers=2, multiprocessing_context="fork"
        )
        pieces = sorted(bytes(piece) for piece in loader)
        assert pieces == [b"%04d" % number for number in range(10)]  # none twice, both workers
        assert file.tell() == 40  # moved in this process as well


# ---- CUDA


def test_tensors_on_cuda_are_told() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    assert only(torch.zeros(2, device="cuda")).kind == "torch.Tensor"


def test_tensors_are_asked_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told([torch.zeros(2), torch.nn.Linear(2, 2), torch.zeros(2, device="meta")]) == {}
    known = (CUDA, lambda tensor: tensor.shape == (3,))
    monkeypatch.setitem(fork_hazards._KNOWN, "torch.Tensor", known)
    # What was said of a class is remembered.
    monkeypatch.setattr(fork_hazards, "_verdict_on", fork_hazards._verdict_on.__wrapped__)
    module = torch.nn.Linear(1, 3)
    assert told([torch.zeros(2), module]) == {
        "dataset.x[1]._parameters['bias']": "torch.nn.parameter.Parameter"
    }


# ---- locks and threads


def test_locks_are_told_while_held() -> None:
    lock, condition = threading.Lock(), threading.Condition(threading.Lock())
    semaphore = threading.Semaphore(0)  # born without a permit, as those of executors are
    assert told([lock, condition, semaphore, threading.BoundedSemaphore(), threading.Event()]) == {}
    with lock, condition:
        assert only(lock) == Inherited("dataset.x", "threading.Lock", *LOCK, id(lock))
        assert "held now" in only(lock).why
        assert only(condition).kind == "threading.Condition"
    assert told([lock, condition]) == {}


def test_a_reentrant_lock_is_told_while_another_thread_holds_it() -> None:
    lock, taken, done = threading.RLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            done.wait(60)

    with lock:
        assert told(lock) == {}  # this very thread goes on in the worker, as its owner
    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert taken.wait(60)
        assert only(lock).why == LOCK.why
    finally:
        done.set()
        thread.join()
    assert told(lock) == {}


def test_threads_are_told_while_they_run() -> None:
    items: queue.Queue[Any] = queue.Queue()
    thread = threading.Thread(target=items.get)
    assert told([thread, items]) == {}
    thread.start()
    try:
        assert only(thread).kind == "threading.Thread"
        while not vars(items.not_empty)["_waiters"]:  # until the consumer waits
            time.sleep(0)
        assert only(items).kind == "queue.Queue"
        assert "threads do not exist in a forked process" in only(items).why
    finally:
        items.put(None)
        thread.join()
    assert told([thread, items, threading.current_thread()]) == {}


def test_pools_of_threads_are_told_once_they_have_threads() -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert told(pool) == {}
        pool.submit(int).result()
        assert only(pool).kind == "concurrent.futures.thread.ThreadPoolExecutor"
    assert told(pool) == {}
    with multiprocessing.pool.ThreadPool(1) as other:
        assert only(other).kind == "multiprocessing.pool.ThreadPool"
        other.close()
        other.join()


def test_what_multiprocessing_makes_to_be_inherited_is_not_told() -> None:
    context = multiprocessing.get_context("fork")
    lock = context.Lock()
    channel = context.Queue()
    try:
        channel.put(1)  # starts its thread
        with lock:
            assert told([lock, channel, context.Event(), context.Value("i"), context.Pipe()]) == {}
    finally:
        channel.get()
        channel.close()
        channel.join_thread()


def test_a_worker_has_neither_the_thread_nor_the_key_to_the_lock() -> None:
    context = multiprocessing.get_context("fork")
    lock, done = threading.Lock(), threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    ours, theirs = context.Pipe()

    def look(connection: Any) -> None:
        connection.recv()  # the parent has released the lock
        connection.send((lock.locked(), thread.is_alive()))

    try:
        with lock:
            assert len(found_in(Holding(lock=lock, thread=thread))) == 2
            process = context.Process(target=look, args=(theirs,))
            process.start()
        ours.send("released")
        assert ours.poll(60)
        assert ours.recv() == (True, False)
        process.join()
    finally:
        done.set()
        thread.join()
        ours.close()
        theirs.close()


# ---- where it looks


class Slotted:
    __slots__ = ("filled", "unset")

    def __init__(self, value: Any) -> None:
        self.filled = value


@dataclasses.dataclass
class Config:
    rng: Any


class Pair(NamedTuple):
    rng: Any
    name: str


class Listed(list[Any]):
    pass


RNG = np.random.default_rng(1)
LISTED = Listed([1])
vars(LISTED)["rng"] = RNG


def with_closure(rng: Any) -> Callable[[], Any]:
    def augment() -> Any:
        return rng.integers(3)

    return augment


def with_default(batch: Any, rng: Any = RNG, *, other: Any = None) -> Any:
    return rng, batch, other


def with_global(batch: Any) -> Any:
    return RNG.permutation(batch)


def with_attribute_of_that_name(batch: Any) -> Any:
    return batch.RNG


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ([1, RNG], "[1]"),
        ((1, RNG), "[1]"),
        ({"a": RNG}, "['a']"),
        ({7: RNG}, "[7]"),
        ({(1, 2): RNG}, "[(1, 2)]"),
        ({RNG}, "{...}"),
        (frozenset([RNG]), "{...}"),
        (collections.deque([RNG]), "[0]"),
        (collections.OrderedDict(a=RNG), "['a']"),
        (Slotted(RNG), ".filled"),
        (Config(RNG), ".rng"),
        (Pair(RNG, "x"), "[0]"),
        (LISTED, ".rng"),
        (functools.partial(int, RNG), ".args[0]"),
        (functools.partial(with_default, other=RNG), ".keywords['other']"),
        (Config(RNG).__init__, ".__self__.rng"),  # type: ignore[misc]
        (with_closure(RNG), ".__closure__['rng']"),
        (with_default, ".__defaults__[0]"),
        (torch.nn.Sequential(torch.nn.Identity()), None),
        ([[[{"deep": [Config([RNG])]}]]], "[0][0][0]['deep'][0].rng[0]"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_it_is_found_wherever_it_is(value: Any, path: str | None) -> None:
    expected = {} if path is None else {f"dataset.x{path}": "numpy.random.Generator"}
    assert told(value, "spawn") == expected


def test_wrapped_datasets_are_followed() -> None:
    inner = Holding(rng=np.random.default_rng(1))
    other = Holding(rng=random.Random())
    [found] = found_in(Subset(inner, [0, 1]))
    assert found.path == "dataset.dataset.rng"
    assert "get_worker_info().dataset.dataset.rng = " in found.advice
    paths = [each.path for each in found_in(ConcatDataset([inner, other]))]
    assert paths == ["dataset.datasets[0].rng", "dataset.datasets[1].rng"]


def test_module_globals_that_functions_use_are_found_under_fork() -> None:
    def paths(function: Any, start_method: str = "fork") -> list[str]:
        return [each.path for each in found_in(Holding(), start_method, collate_fn=function)]

    assert paths(with_global) == [f"global {__name__}.RNG"]
    assert paths(with_global, "spawn") == []  # the module is imported anew
    assert paths(with_attribute_of_that_name) == []
    assert paths(default_collate) == []


def adds_noise(x: Any) -> Any:
    return x + RNG.random()


class AddsNoise:
    def __call__(self, x: Any) -> Any:
        return self._noise(x)

    def _noise(self, x: Any) -> Any:
        return adds_noise(x)


class CallsModule(Holding):
    def __getitem__(self, index: int) -> Any:
        return datasets.adds_noise(index)


def test_globals_are_found_through_what_makes_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions and methods of the user's are followed, also those of an imported module."""

    def paths(dataset: Any) -> list[str]:
        return [each.path for each in found_in(dataset)]

    here = [f"global {__name__}.RNG"]
    assert paths(Holding(transform=adds_noise)) == here
    assert paths(Holding(transforms=[AddsNoise()])) == here
    monkeypatch.setattr(datasets, "adds_noise", adds_noise, raising=False)
    assert paths(CallsModule()) == here
    monkeypatch.setattr(datasets, "adds_noise", RNG)
    assert paths(CallsModule()) == ["global tests.datasets.adds_noise"]


class DrawsOfItsClass(Dataset[Any]):
    rng, unused = random.Random(0), random.Random(0)

    def __getitem__(self, index: int) -> Any:
        return self.rng.random()


def test_what_the_class_holds_is_told_where_samples_are_made_by_it() -> None:
    for start_method in ("fork", "spawn"):
        [found] = found_in(DrawsOfItsClass(), start_method)
        assert found.path == "dataset.rng"
        assert list(generators_of(DrawsOfItsClass())) == ["dataset.rng"]
        assert "get_worker_info().dataset.rng.seed(" in found.advice
    mended = DrawsOfItsClass()
    vars(mended)["rng"] = None
    assert found_in(mended) == []


def a_module(name: str, code: str, **names: Any) -> Any:
    """A module of the user's, without a file."""
    module = types.ModuleType(name)
    vars(module).update(names)
    exec(code, vars(module))
    return module


def test_a_name_that_is_like_a_global_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what code asks of a module itself, or of its own object, leads on."""
    helpers = a_module("helpers", "def load(i): return i", rng=RNG, split=RNG)
    script = {"__name__": "script", "RNG": RNG, "helpers": helpers, "sys": sys, "Base": Dataset}
    exec(
        "class AsksItsOwn(Base):\n"
        "    def __getitem__(self, i): return helpers.load(self.rng.random()), i.split()\n"
        "class Splits(Base):\n"
        "    def __getitem__(self, i): return self.names[i].split('/')\n"
        "    def split(self): return RNG.permutation(3)\n"
        "class AsksTheTerminal(Base):\n"
        "    def __getitem__(self, i): return sys.stdin.isatty()\n"
        "class Draws(Base):\n"
        "    def __getitem__(self, i): return helpers.rng.random()\n"
        "class Child(Splits):\n"
        "    def __getitem__(self, i): return [self.split() for _ in super().__getitem__(i)]\n",
        script,
    )
    with open(__file__) as file:
        monkeypatch.setattr(sys, "stdin", file)
        for name in ("AsksItsOwn", "Splits", "AsksTheTerminal"):
            assert found_in(script[name]()) == []
    assert [each.path for each in found_in(script["Draws"]())] == ["global helpers.rng"]
    assert [each.path for each in found_in(script["Child"]())] == ["global script.RNG"]


def test_a_module_in_a_package_is_followed() -> None:
    inner = a_module("scans.helpers", "def draw(): return RNG.random()", RNG=RNG)
    script = {"scans": a_module("scans", "", helpers=inner)}
    exec("def collate_fn(batch): return scans.helpers.draw()", script)
    [found] = found_in(Holding(), collate_fn=script["collate_fn"])
    assert found.path == "global scans.helpers.RNG"


def test_a_function_that_asks_where_it_runs_knows_what_it_may_use(cleanup: ExitStack) -> None:
    names = {"CONNECTION": cleanup.enter_context(closing(sqlite3.connect(":memory:")))}
    exec(
        "def in_main(batch): return CONNECTION if get_worker_info() is None else batch\n"
        "def by_process(batch):\n"
        "    global CONNECTION, PID\n"
        "    if PID != os.getpid(): CONNECTION, PID = connect(), os.getpid()\n"
        "    return CONNECTION\n"
        "def takes_its_share(batch): return CONNECTION, get_worker_info().num_workers\n",
        names,
    )
    told = [
        len(found_in(Holding(), collate_fn=names[each]))
        for each in ("in_main", "by_process", "takes_its_share")
    ]
    assert told == [0, 0, 1]


class SharesOut(IterableDataset[Any]):
    """All workers have to shuffle alike what they share out."""

    def __init__(self) -> None:
        self.order, self.noise = random.Random(0), random.Random(0)

    def __iter__(self) -> Iterator[Any]:
        shards = [*range(8)]
        self.order.shuffle(shards)
        info = get_worker_info()
        assert info is not None
        for each in shards[info.id :: info.num_workers]:
            yield each + self.noise.random()


def test_a_generator_that_orders_what_is_shared_out_is_not_told() -> None:
    assert [each.path for each in found_in(SharesOut())] == ["dataset.noise"]


def test_a_scripts_global_is_named_without_a_module() -> None:
    script: dict[str, Any] = {"__name__": "__main__", "OLD": random.Random(0), "NEW": RNG}
    exec("def collate_fn(batch): return OLD, NEW", script)
    found = found_in(Holding(), collate_fn=script["collate_fn"])
    cures = {each.path: each.advice.partition("worker_init_fn, ")[2] for each in found}
    seed = "get_worker_info().seed"
    assert cures == {
        "global OLD": f"OLD.seed({seed} % 2**32)",
        "global NEW": f"global NEW; NEW = np.random.default_rng({seed})",
    }


class UsesGlobal(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return RNG.integers(index)


def test_the_datasets_own_methods_are_looked_at() -> None:
    rng = random.Random()

    class Local(Dataset[Any]):
        def __getitem__(self, index: int) -> Any:
            return rng.random()

    [found] = found_in(UsesGlobal())
    assert found.path == f"global {__name__}.RNG"
    assert found.advice == (
        f"seed it per worker: in worker_init_fn, {__name__}.RNG = "
        "np.random.default_rng(get_worker_info().seed)"
    )
    assert [x.path for x in found_in(Local())] == ["dataset.__getitem__.__closure__['rng']"]


def test_what_is_beside_the_dataset_is_told_once_and_by_the_shortest_way() -> None:
    class Collating(Holding):
        def collate(self, batch: Any) -> Any:
            return batch

    rng = np.random.default_rng()
    dataset = Collating(transform=Config([rng]), rng=rng)
    found = found_in(dataset, collate_fn=dataset.collate, worker_init_fn=None)
    assert [each.path for each in found] == ["dataset.rng"]
    found = found_in(Holding(), collate_fn=functools.partial(with_default, other=rng))
    assert found[0].path == "collate_fn.keywords['other']"


# ---- bounds, and hostile objects


def test_keys_are_bounded_and_passwords_in_addresses_left_out() -> None:
    long, address = "k" * 1000, "postgres://user:sesame@host/x"
    [first, second] = told({long: random.Random(), address: random.Random()})
    assert len(first) < 60
    assert "sesame" not in second
    assert "host/x" in second


def test_big_containers_cost_nothing() -> None:
    """A few looks are enough to come past them."""
    big = {"a": [0] * 10_000_000, "b": [(i, "x") for i in range(100_000)], "c": set(range(10**6))}
    look = functools.partial(survey, name="dataset", start_method="spawn", num_workers=1)
    assert len(look(Holding(**big, z=random.Random()), bound_items=500)) == 1
    assert look(Holding(**big, z=random.Random()), bound_items=2) == []


def chain(length: int) -> Config:
    link = Config(random.Random())
    for _ in range(length):
        link = Config(link)
    return link


def test_the_walk_is_bounded_in_objects() -> None:
    assert len(found_in(Holding(x=chain(1000)))) == 1
    assert found_in(Holding(x=chain(5000))) == []
    wide = functools.partial(survey, name="dataset", start_method="spawn", num_workers=1)
    assert len(wide(Holding(x=chain(5000)), bound_items=10_000)) == 1
    assert wide(Holding(x=chain(10)), bound_items=5) == []


def test_the_walk_is_bounded_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = functools.partial(survey, name="dataset", start_method="spawn", num_workers=1)
    ticks = iter(range(1000))
    monkeypatch.setattr(fork_hazards, "thread_time", lambda: next(ticks))
    assert wide(Holding(x=chain(10)), bound_s=5) == []
    assert wide(Holding(x=chain(10)), bound_s=500) != []


def test_a_busy_machine_sees_no_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_hazards, "thread_time", time.thread_time)
    look = fork_hazards._Walk.look

    def slowly(*about: Any) -> None:
        time.sleep(0.06)  # it is not this thread's turn
        look(*about)

    monkeypatch.setattr(fork_hazards._Walk, "look", slowly)
    assert len(found_in(Holding(x=chain(3)))) == 1


def test_functions_of_any_size_take_no_longer() -> None:
    names: dict[str, Any] = {"RNG": RNG}
    exec("def collate_fn(i):\n" + "    i = i + f(i)\n" * 50_000 + "    return RNG", names)
    began = time.perf_counter()
    assert found_in(Holding(), collate_fn=names["collate_fn"]) == []
    assert time.perf_counter() - began < 0.2


def test_cycles_end() -> None:
    dataset = Holding()
    around: list[Any] = [dataset]
    around.append(around)
    vars(dataset).update(me=dataset, around=around, rng=random.Random())
    assert [each.path for each in found_in(dataset)] == ["dataset.rng"]


harm: list[str] = []


class Hostile:
    """Does harm whatever it is asked."""

    def _harm(self, *args: Any) -> Any:
        harm.append("called")
        raise RuntimeError("not to be called")

    __getattribute__ = __getattr__ = __repr__ = __str__ = __eq__ = __len__ = __iter__ = _harm
    __bool__ = __index__ = __call__ = __reduce_ex__ = __dir__ = __get__ = _harm
    __hash__ = _harm  # type: ignore[assignment]
    __class__ = property(_harm)  # type: ignore[assignment]
    named = property(_harm)


class HostileMeta(type):
    __module__ = __name__ = __mro__ = __dict__ = property(Hostile._harm)  # type: ignore[assignment]
    __eq__ = __instancecheck__ = __subclasscheck__ = __repr__ = Hostile._harm  # type: ignore[assignment]
    __hash__ = __getattribute__ = Hostile._harm  # type: ignore[assignment]


class HostileList(list[Any]):
    __len__ = __iter__ = __getitem__ = __repr__ = __eq__ = __bool__ = Hostile._harm  # type: ignore[assignment]


class HostileDict(dict[Any, Any]):
    __len__ = __iter__ = __getitem__ = __repr__ = items = get = Hostile._harm  # type: ignore[assignment]


class HostileTensor(torch.Tensor):
    __torch_function__ = classmethod(Hostile._harm)  # type: ignore[assignment]


def test_no_code_of_the_users_is_run() -> None:
    harm.clear()
    meta = HostileMeta("HostileClass", (), {"__module__": __name__})
    instance = object.__new__(meta)
    hostile = {
        "object": Hostile(),
        "of a class": instance,
        "class": meta,
        "list": HostileList([random.Random()]),
        "dict": HostileDict(a=random.Random()),
        "tensor": torch.zeros(2).as_subclass(HostileTensor),
        "proxy": weakref.proxy(torch.nn.Identity()),
    }
    paths = [each.path for each in found_in(Holding(x=hostile))]
    assert paths == ["dataset.x['list'][0]", "dataset.x['dict']['a']"]
    for value in hostile.values():
        assert found_in(value, collate_fn=value, worker_init_fn=value) is not None
    assert harm == []


def test_nothing_that_goes_wrong_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("broken")

    dataset = Holding(rng=random.Random())
    monkeypatch.setattr(parts, "fields", broken)
    assert found_in(dataset) == []
    monkeypatch.setattr(fork_hazards, "definitions", broken)
    assert found_in(dataset) == []


def test_containers_that_change_meanwhile_are_survived() -> None:
    changing: dict[int, int] = {}
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            changing.update(dict.fromkeys(range(100)))  # type: ignore[arg-type]
            changing.clear()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(200):
            assert len(found_in(Holding(x=changing, y=changing, rng=random.Random()))) == 1
    finally:
        stop.set()
        thread.join()


def test_a_keyboard_interrupt_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "fields", interrupt)
    with pytest.raises(KeyboardInterrupt):
        found_in(Holding())


def test_a_pipe_of_a_subprocess_is_told(cleanup: ExitStack) -> None:
    process = cleanup.enter_context(
        subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE)
    )
    assert told(process) == {"dataset.x.stdout": "io.BufferedReader"}


# ---- the warning


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_hazards, "_said", set())


def said(findings: list[Inherited], dataset: object) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_once(findings, dataset)
    assert all(each.category is RuntimeWarning for each in caught)
    assert all(each.filename == __file__ for each in caught)
    return [str(each.message) for each in caught]


def test_it_warns_of_each_and_only_once() -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        dataset = Holding(connection=connection, rng=random.Random("a secret seed"))
        one, two = sorted(said(found_in(dataset), dataset))
        assert one.startswith("safeloader: dataset.connection (sqlite3.Connection) goes to")
        assert two.startswith(
            "safeloader: dataset.rng (random.Random) goes to the workers: each of the 2"
        )
        assert "Seed it per worker: in worker_init_fn, get_worker_info().dataset.rng.seed(" in two
        assert "secret" not in one + two
        again = Holding(connection=connection, rng=random.Random())
        assert said(found_in(again), again) == []  # another epoch, or another loader over its like
        more = Holding(connection=connection, other=random.Random())
        assert len(said(found_in(more), more)) == 1
        assert said([], dataset) == []


def test_each_is_silenced_by_its_name_as_the_warning_says() -> None:
    dataset = Holding(rng=random.Random(), rng2=random.Random(), many=[random.Random()])
    texts = said(found_in(dataset), dataset)
    assert len(texts) == 3
    for text in texts:
        fork_hazards._said.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            eval(text.partition("does so already: ")[2])
            warn_once(found_in(dataset), dataset)
        assert {str(each.message) for each in caught} == {*texts} - {text}


def test_a_long_list_is_cut() -> None:
    dataset = Holding(**{f"rng{number}": random.Random() for number in range(20)})
    texts = said(found_in(dataset), dataset)
    assert len(texts) == fork_hazards.TOLD_MAX
    assert [" ... and 12 more like it." in text for text in texts] == [False] * 7 + [True]


def test_many_of_a_kind_in_one_container_are_one_line() -> None:
    dataset = Holding(many=[random.Random() for _ in range(16)], other=random.Random())
    for _ in range(2):
        texts = said(found_in(dataset), dataset)
        if texts:
            [many, other] = sorted(texts)
            assert "dataset.many[0] (random.Random, and others in dataset.many) goes" in many
            assert "dataset.other (random.Random) goes" in other
    assert texts == []


def test_where_warnings_are_errors_each_time_fails() -> None:
    dataset = Holding(rng=random.Random())
    for _ in range(2):
        with pytest.raises(RuntimeWarning, match=r"dataset\.rng"):
            warn_once(found_in(dataset), dataset)


def test_what_a_library_wrote_in_another_language_is_known_by_its_class() -> None:
    pyarrow = pytest.importorskip("pyarrow")

    class Tables:
        def __init__(self) -> None:
            self.table, self.rows = pyarrow.table({"x": [1, 2]}), [1, 2]
            self.weights, self.tensor, self.inner = np.zeros(2), torch.zeros(2), Inner()

    class Inner:
        def __init__(self) -> None:
            self.column = pyarrow.array([1, 2])

    found = {each.path: each.kind for each in natives(Tables())}
    assert set(found) == {"dataset.table", "dataset.inner.column"}
    assert found["dataset.table"] == "pyarrow.lib.Table"
