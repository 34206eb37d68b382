"""Finds, before workers start, what they had better not inherit. Runs in: main.

A forked worker goes on with its parent's sockets, read positions and locks, but without its
threads; and under every start method all workers get the same copy of a random generator. None of
it raises: rows get mixed up, samples repeat, a worker hangs. So the survey walks the dataset and
tells what, by its class, does not survive. It runs no code of the user's (:mod:`values`).

False alarms teach people to ignore alarms: what is not in use (closed, not connected yet, not
held) is not told. The survey cannot know what the user's code makes anew in the worker: each
warning can be silenced by the path that it begins with.
"""

from __future__ import annotations

import dis
import io
import pathlib
import random
import re
import socket
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
import torch

from safeloader.introspect.texts import key_text
from safeloader.introspect.values import (
    array_facts,
    container_base,
    cut,
    definitions,
    fields,
    held_by,
    mro_of,
    type_name,
)
from safeloader.introspect.warned import warn

SAMPLED = 10  # elements looked at of one container
ATTRIBUTES_MAX = 256
TOLD_MAX = 8  # findings spelled out in one warning


class Inherited(NamedTuple):
    """Something that a worker had better not inherit: where it is, and what to do about it."""

    path: str
    kind: str
    why: str
    advice: str


def survey(
    thing: object,
    name: str,
    *,
    start_method: str,
    num_workers: int,
    beside: Mapping[str, object] = types.MappingProxyType({}),
    bound_s: float = 0.05,
    bound_items: int = 2000,
) -> list[Inherited]:
    """Return what workers had better not inherit with ``thing``; never raises.

    Args:
        thing: the loader's dataset.
        name: what it is called in the paths: ``"dataset"``.
        start_method: ``"fork"``, ``"spawn"`` or ``"forkserver"``.
        num_workers: how many inherit it, one at least.
        beside: by name what else goes to the workers, ``collate_fn`` and ``worker_init_fn``. What
            two of them hold is told once.
        bound_s, bound_items: seconds and objects after which the rest is left out.

    >>> class Noisy:
    ...     def __init__(self):
    ...         self.rng = np.random.default_rng(0)
    >>> [found] = survey(Noisy(), "dataset", start_method="spawn", num_workers=2)
    >>> found.path, found.kind
    ('dataset.rng', 'numpy.random.Generator')
    """
    walk = _Walk(start_method == "fork", num_workers)
    end = monotonic() + bound_s
    with suppress(Exception):  # a fault of ours must not keep the workers from starting
        for path, each in {name: thing, **beside}.items():
            walk.add(_Item(each, path))
        for method in ("__getitem__", "__getitems__", "__iter__", "__next__", "__call__"):
            for function in definitions(type(thing), method)[:1]:  # for its closure and globals
                walk.add(_Item(function, f"{name}.{method}"))
        for _ in range(bound_items):
            if not walk.queue or monotonic() > end:
                break
            with suppress(Exception):  # another thread may change what is read here
                walk.look(walk.queue.popleft())
    return walk.found


_said: set[tuple[str, str]] = set()


def warn_once(findings: list[Inherited], dataset: object) -> None:
    """Warn of each finding, once a process for each class of dataset and path.

    It does not guess whether the worker makes it anew: each warning begins with the path, and says
    how to silence it by that.

    Args:
        findings: what ``survey`` returned.
        dataset: the loader's; only its class is looked at.
    """
    new = [each for each in findings if (type_name(type(dataset)), each.path) not in _said]
    for number, (path, kind, why, advice) in enumerate(new[:TOLD_MAX], 1):
        begins = f"safeloader: {path} "
        text = f"{begins}({kind}) goes to the workers: {why}. {advice[0].upper()}{advice[1:]}."
        if number == TOLD_MAX < len(new):
            text += f" ... and {len(new) - TOLD_MAX} more like it."
        silence = f"warnings.filterwarnings('ignore', {re.escape(begins)!r})"
        text += f" If the worker does so already: {silence}"
        warn(text)
        _said.add((type_name(type(dataset)), path))  # where warnings are errors, each time fails


def was_told(dataset: object, path: str) -> bool:
    """Whether :func:`warn_once` has told of what lies at ``path`` in this dataset."""
    return (type_name(type(dataset)), path) in _said


# ---- what is known

_Hazard = tuple[str, str]  # why it is one, and what to do

_LAZILY = "set it up in the worker at first use, and keep None here until then"
_CONNECTION = ("after a fork all use this one connection: replies get mixed up or lost", _LAZILY)
_HANDLE = ("its library rules out use after a fork: reads can fail, hang or be wrong", _LAZILY)
_FILE = (
    "forked processes share one read position: what one reads, the others skip",
    f"{_LAZILY}; or use os.pread or np.memmap, which share no position",
)
_CUDA = ("CUDA cannot be re-initialized in a forked process", "keep what is here on the CPU")
_LOCK = ("held now: the copy in the worker will never be released", _LAZILY)
_THREAD = ("threads do not exist in a forked process: what waits for one waits for ever", _LAZILY)
_GENERATOR = ("all workers get a copy in the same state", "seed it per worker")  # in full below


def _attributes(value: Any) -> dict[str, Any]:
    return {name: each for name, each in fields(value)[:ATTRIBUTES_MAX] if type(name) is str}


def _connected(value: Any) -> bool:
    flags = {k: x for k, x in _attributes(value).items() if type(x) is bool or type(x) is int}
    return not (flags.get("closed") or flags.get("_closed") or flags.get("_opened") is False)


def _sqlite_connected(value: Any) -> bool:
    changes = definitions(type(value), "total_changes")[-1]
    return bool(changes.__get__(value) >= 0)  # raises if it is closed, which is a no as well


def _owned_by_another(value: Any) -> bool:
    text: str = type(threading.RLock()).__repr__(value)  # before 3.14 it has no ``locked``
    return text.startswith("<locked") and f" owner={threading.get_ident()} " not in text


def _on_cuda(value: Any) -> bool:
    return str((array_facts(value) or {}).get("device")).startswith("cuda")


def _runs(value: Any) -> bool:
    live = any(value is each for each in threading.enumerate())
    return live and value is not threading.current_thread()


# What it is, whether it is in use, and its classes: by top package and own name, as what lies
# between moves with releases. (``Environment`` is lmdb's compiled one, which tells no module.)
_CATALOGUE: list[tuple[_Hazard, Callable[[Any], bool], str]] = [
    (_GENERATOR, lambda value: True, "numpy.Generator numpy.RandomState numpy.BitGenerator"),
    (_GENERATOR, lambda value: True, "random.Random torch.Generator"),
    (_CONNECTION, _connected, "asyncpg.Connection pymongo.MongoClient botocore.BaseClient"),
    (_CONNECTION, _connected, "boto3.ServiceResource grpc.Channel fsspec.AsyncFileSystem"),
    (_CONNECTION, _connected, "psycopg2.connection psycopg.BaseConnection pymysql.Connection"),
    (_CONNECTION, _connected, "MySQLdb.connection mysql.MySQLConnectionAbstract"),
    (_CONNECTION, _sqlite_connected, "sqlite3.Connection"),
    (_CONNECTION, lambda value: socket.socket.fileno(value) != -1, "_socket.socket"),
    (_HANDLE, lambda value: True, "lmdb.Environment Environment _duckdb.DuckDBPyConnection"),
    (_HANDLE, lambda value: bool(_attributes(value)["_id"].id), "h5py.HLObject"),
    (_FILE, lambda value: io.FileIO.readable(value), "_io.FileIO"),  # raises if it is closed
    (_CUDA, _on_cuda, "torch.Tensor"),
    (_LOCK, lambda value: bool(value.locked()), "_thread.lock"),
    (_LOCK, _owned_by_another, "_thread.RLock"),
    (_THREAD, lambda value: len(_attributes(value)["_waiters"]) > 0, "threading.Condition"),
    (_THREAD, _runs, "threading.Thread multiprocessing.DummyProcess"),
]
_KNOWN = {name: row[:2] for row in _CATALOGUE for name in row[2].split()}

_ROLES = {
    # What lives in one of these is told in its name; with nothing live inside, it is harmless.
    "wrapper": "_io.TextIOWrapper _io.BufferedReader _io.BufferedRandom gzip.GzipFile bz2.BZ2File "
    "lzma.LZMAFile tempfile._TemporaryFileWrapper zipfile.ZipFile zipfile.ZipExtFile "
    "tarfile.TarFile numpy.NpzFile PIL.Image threading.Condition threading.Semaphore queue.Queue "
    "concurrent.Executor multiprocessing.Pool multiprocessing.ThreadPool sqlalchemy.Engine "
    "sqlalchemy.Connection sqlalchemy.Session requests.Session urllib3.PoolManager httpx.Client "
    "aiohttp.ClientSession redis.Redis redis.PubSub redis.AbstractConnection sqlite3.Cursor "
    "psycopg2.cursor psycopg.BaseCursor pymysql.Cursor MySQLdb.BaseCursor",
    # Made to be inherited, as all of multiprocessing, seeded by torch, or nothing to look into.
    "left alone": "redis.ConnectionPool random.SystemRandom torch.Sampler torch.DataLoader "
    "torch.ShufflerIterDataPipe threading.Event logging.Logger logging.Handler numpy.ndarray type "
    "module",
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names.split()}
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, np.ndarray)
_PLAIN_IDS = frozenset(map(id, (*_PLAIN, np.float64, torch.dtype, type(pathlib.Path()))))


# Of a class: the built-in container that it is, what is known of it, and its role.
_Verdict = tuple[Any, tuple[_Hazard, Callable[[Any], bool]] | None, str]


def _verdict_on(cls: type) -> _Verdict:
    for name in map(type_name, mro_of(cls)):
        key = re.sub(r"\..*\.", ".", name)
        if key in _KNOWN or key in _ROLE_OF or key.startswith("multiprocessing."):
            return None, _KNOWN.get(key), _ROLE_OF.get(key, "left alone")
    return container_base(cls), None, ""


# ---- the walk


class _Item(NamedTuple):
    value: Any
    path: str
    part_of: tuple[str, str] | None = None  # path and kind of the wrapper around it


class _Walk:
    """Breadth first, so that everything is told by the shortest way to it."""

    def __init__(self, forks: bool, workers: int) -> None:
        self.found: list[Inherited] = []
        self.queue: deque[_Item] = deque()
        self._forks, self._workers = forks, workers
        # The process-wide generators, which torch seeds in each worker, are no finding.
        own = (getattr(draw, "__self__", None) for draw in (random.random, np.random.rand))
        self._seen = {id(each) for each in (torch.default_generator, *own)}

    def add(self, item: _Item) -> None:
        if id(type(item.value)) not in _PLAIN_IDS and id(item.value) not in self._seen:
            self._seen.add(id(item.value))
            self.queue.append(item)

    def look(self, item: _Item) -> None:
        value, path, part_of = item
        base, known, role = _verdict_on(cls := type(value))
        if known is not None and (self._forks or known[0] is _GENERATOR) and known[1](value):
            return self._tell(item, known[0])
        if role == "wrapper" and part_of is None:
            part_of = path, _kind(cls)
        for step, child in _parts(value, base, self._forks) if role != "left alone" else ():
            self.add(_Item(child, path + step, part_of))

    def _tell(self, item: _Item, hazard: _Hazard) -> None:
        path, kind = item.part_of or (item.path, _kind(type(item.value)))
        if hazard is _GENERATOR:
            hazard = _for_generator(path, kind, self._workers)
        found = Inherited(path, kind, *hazard)
        if found not in self.found:  # a wrapper may have several live parts
            self.found.append(found)


def _parts(value: Any, base: Any, forks: bool) -> Iterator[tuple[str, Any]]:
    """What an object holds: the step in the path, and itself."""
    cls = type(value)
    if base is not None:
        for key, child in held_by(value, SAMPLED):
            yield ("{...}" if base in (set, frozenset) else f"[{key_text(key)}]"), child
    if cls is types.MethodType or cls is types.BuiltinMethodType:
        yield ".__self__", value.__self__
        yield ".__func__", getattr(value, "__func__", None)
    if cls is types.FunctionType:
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=False):
            with suppress(ValueError):  # an empty cell
                yield f".__closure__[{name!r}]", cell.cell_contents
        for name in _globals_of(value.__code__) if forks else ():  # a spawned worker imports anew
            child = dict.get(value.__globals__, name)
            _, known, role = _verdict_on(type(child))
            if known or role == "wrapper":  # no other: most are not the dataset's
                yield f".__globals__[{name!r}]", child
        yield ".__defaults__", value.__defaults__
        yield ".__kwdefaults__", value.__kwdefaults__
    for name, child in _attributes(value).items() if cls is not base else ():
        yield f".{cut(name)}", child


def _globals_of(code: types.CodeType) -> dict[str, None]:
    """The globals that a function uses, and those defined in it."""
    steps = dis.get_instructions(code)
    names = dict.fromkeys(step.argval for step in steps if step.opname == "LOAD_GLOBAL")
    for inner in code.co_consts:
        names |= _globals_of(inner) if type(inner) is types.CodeType else {}
    return names


_PUBLIC = {"_thread.lock": "threading.Lock", "Environment": "lmdb.Environment"}


def _kind(cls: type) -> str:
    """The name that people know a class by, without the private modules it may be from."""
    name = type_name(cls)
    return cut(_PUBLIC.get(name) or re.sub(r"^_(?!_)|\._[^.]*(?=\.)", "", name))


def _for_generator(path: str, kind: str, workers: int) -> _Hazard:
    why = "the worker starts each epoch from a copy in the same state: the same numbers again"
    if workers > 1:
        why = f"the {workers} workers get copies in the same state: all draw the same numbers"
    seed = "get_worker_info().seed"
    if not path.startswith("dataset.") or "__" in path or "{" in path:
        return why, f"make it in the worker from {seed}"
    again = f".{'manual_seed' if kind == 'torch.Generator' else 'seed'}({seed} % 2**32)"
    if kind.startswith("numpy.random.") and not kind.endswith("RandomState"):
        again = f" = np.random.default_rng({seed})"
    return why, f"seed it per worker: in worker_init_fn, get_worker_info().{path}{again}"
