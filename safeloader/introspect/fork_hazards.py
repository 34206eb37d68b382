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

import io
import pathlib
import re
import socket
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from time import thread_time
from typing import Any, Generic, NamedTuple

import numpy as np
import torch
import torch.utils.data

from safeloader.introspect.advice import (
    CONNECTION,
    GENERATOR,
    HAZARDS,
    NATIVE,
    Hazard,
    class_key,
    is_read_from,
    suited,
)
from safeloader.introspect.byte_code import LEFT_ALONE, asks_where_it_runs, codes, uses
from safeloader.introspect.copy_state import attributes
from safeloader.introspect.frames import is_third_party, is_users_class
from safeloader.introspect.generator_kinds import how_to_seed, process_generators
from safeloader.introspect.parts import (
    GLOBAL,
    all_held_by,
    beyond,
    makers_of,
    named_fields,
    of_class,
)
from safeloader.introspect.suspects import Inherited
from safeloader.introspect.values import (
    array_facts,
    container_base,
    cut,
    definitions,
    inherits,
    is_written_in_python,
    mro_of,
    once_for_class,
    type_name,
)
from safeloader.introspect.warned import warn

TOLD_MAX = 8  # findings spelled out in one warning


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
        bound_s, bound_items: seconds of CPU time of this thread (a busy machine sees no less) and
            objects, after which the rest is left out.

    >>> class Noisy:
    ...     def __init__(self):
    ...         self.rng = np.random.default_rng(0)
    >>> [found] = survey(Noisy(), "dataset", start_method="spawn", num_workers=2)
    >>> found.path, found.kind
    ('dataset.rng', 'numpy.random.Generator')
    """
    stream = inherits(type(thing), torch.utils.data.IterableDataset)
    walk = _Walk(start_method == "fork", num_workers, stream)
    if stream:
        walk.alike = _orders_shares(type(thing))
    end = thread_time() + bound_s
    with suppress(Exception):  # a fault of ours must not keep the workers from starting
        for path, each in {name: thing, **beside}.items():
            walk.add(_Item(each, path))
        for _ in range(bound_items):
            if not walk.queue or thread_time() > end:
                break
            with suppress(Exception):  # another thread may change what is read here
                walk.look(walk.queue.popleft())
        return walk.end()
    return walk.found


def natives(dataset: object) -> list[Inherited]:
    """Return what a dataset holds of classes that a library wrote in another language than Python.

    Nothing is known of what such an object keeps outside Python, so nothing is said of it unless a
    worker hangs in it.
    """
    stream = inherits(type(dataset), torch.utils.data.IterableDataset)
    cure = suited(NATIVE.cure, stream=stream)
    return [
        Inherited(each.path, _kind(cls), NATIVE.why, cure, id(each.value))
        for each in attributes(dataset)
        if is_third_party(cls := type(each.value))
        and not type_name(cls).startswith(LEFT_ALONE)
        and not is_written_in_python(cls)
    ]


_said: set[tuple[str, str]] = set()


def warn_once(findings: list[Inherited], dataset: object) -> None:
    """Warn of each finding, once a process for each class of dataset and path.

    It does not guess whether the worker makes it anew: each warning begins with the path, and says
    how to silence it by that.

    Args:
        findings: what ``survey`` returned.
        dataset: the loader's; only its class is looked at.
    """
    cls = type_name(type(dataset))
    alike: dict[tuple[str, str, str], list[Inherited]] = {}
    for each in findings:
        if (cls, each.path) not in _said:
            alike.setdefault((_within(each.path), each.kind, each.why), []).append(each)
    new = list(alike.items())
    for number, ((within, _, _), several) in enumerate(new[:TOLD_MAX], 1):
        path, kind, why, advice, _ = several[0]
        begins = f"safeloader: {path} "
        also = f", and others in {within}" if several[1:] else ""
        text = f"{begins}({kind}{also}) goes to the workers: {why}. "
        text += f"{advice[0].upper()}{advice[1:]}."
        if number == TOLD_MAX < len(new):
            text += f" ... and {len(new) - TOLD_MAX} more like it."
        pattern = re.escape(begins).replace("\\ ", " ").replace("\\.", ".")  # to be read
        silence = f"warnings.filterwarnings('ignore', {pattern!r})"
        text += f" If the worker does so already: {silence}"
        warn(text)
        # Where warnings are errors, each time fails.
        _said.update((cls, each.path) for each in several)


def _within(path: str) -> str:
    """What holds many of a kind: ``dataset.images`` of ``dataset.images[7]``."""
    return re.sub(r"\[(?:\d+|'[^']*')\]$", "", path)


def was_told(dataset: object, path: str) -> bool:
    """Whether :func:`warn_once` has told of what lies at ``path``, around it or in it."""
    cls = type_name(type(dataset))
    return any(of == cls and bool(_order_of(told, path)) for of, told in list(_said))


def cure_of(dataset: object, path: str) -> str:
    """What a warning says, or would say, to do about the generators at a path; "" if nothing.

    Else what it says of the nearest that holds them, or of the first that is held there.
    """
    found = survey(dataset, "dataset", start_method="fork", num_workers=2)  # globals too
    told = [each for each in found if not each.by_fork and _order_of(each.path, path)]
    return max(told, key=lambda each: _order_of(each.path, path)).advice if told else ""


def _order_of(told: str, path: str) -> int:
    """How well what is told of one path suits another: itself, around it, in it; 0 if not at all.

    >>> [_order_of(told, "dataset.t[0]") for told in ("dataset.t", "dataset.t[0].rng", "dataset.s")]
    [9, 1, 0]
    """
    if path == told or path.startswith((f"{told}.", f"{told}[")):
        return len(told)
    return int(told.startswith((f"{path}.", f"{path}[")))


# ---- what is known


def _connected(value: Any) -> bool:
    flags = {k: x for k, x in named_fields(value).items() if type(x) is bool or type(x) is int}
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


# Whether what is of a class that the table of advice knows is in use; where none is given, it is.
_IN_USE: dict[str, Callable[[Any], bool]] = {
    **{name: _connected for name, hazard in HAZARDS.items() if hazard is CONNECTION},
    "sqlite3.Connection": _sqlite_connected,
    "_socket.socket": lambda value: socket.socket.fileno(value) != -1,
    "h5py.HLObject": lambda value: bool(named_fields(value)["_id"].id),
    "cv2.VideoCapture": lambda value: bool(definitions(type(value), "isOpened")[-1](value)),
    "_io.FileIO": io.FileIO.readable,  # raises if it is closed
    "torch.Tensor": _on_cuda,
    "_thread.lock": lambda value: bool(value.locked()),
    "_thread.RLock": _owned_by_another,
    "threading.Condition": lambda value: len(named_fields(value)["_waiters"]) > 0,
    "threading.Thread": _runs,
    "multiprocessing.DummyProcess": _runs,
}
_KNOWN = {name: (hazard, _IN_USE.get(name, lambda _: True)) for name, hazard in HAZARDS.items()}

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
_Verdict = tuple[Any, tuple[Hazard, Callable[[Any], bool]] | None, str]


@once_for_class
def _verdict_on(cls: type) -> _Verdict:
    for key in map(class_key, mro_of(cls)):
        if key in _KNOWN or key in _ROLE_OF or key.startswith("multiprocessing."):
            return None, _KNOWN.get(key), _ROLE_OF.get(key, "left alone")
    return container_base(cls), None, ""


# ---- the walk


class _Owner(NamedTuple):
    """Something that is told in the place of what it holds."""

    path: str
    kind: str
    token: int
    cls: Any = None

    @classmethod
    def of(cls, value: Any, path: str) -> _Owner:
        return cls(path, _kind(type(value)), id(value), type(value))


class _Item(NamedTuple):
    value: Any
    path: str
    part_of: _Owner | None = None  # the wrapper around it
    library: _Owner | None = None  # that of a library's objects around it which the user holds
    private: bool = False  # whether it is in the private state of a library's object


class _Walk:
    """Breadth first, so that everything is told by the shortest way to it."""

    def __init__(self, forks: bool, workers: int, stream: bool) -> None:
        self.found: list[Inherited] = []
        self.queue: deque[_Item] = deque()
        self._forks, self._workers, self._stream = forks, workers, stream
        self.alike: set[str] = set()  # names of generators that are to be alike in all workers
        self._generators: dict[_Owner, list[str]] = {}
        self._users: dict[int, bool] = {}  # by id: a metaclass may define ``__hash__``
        # The process-wide generators, which torch seeds in each worker, are no finding.
        self._seen = {id(each) for each in process_generators().values()}

    def add(self, item: _Item) -> None:
        if id(type(item.value)) not in _PLAIN_IDS and id(item.value) not in self._seen:
            self._seen.add(id(item.value))
            self.queue.append(item)

    def look(self, item: _Item) -> None:
        value, path, part_of, library, private = item
        base, known, role = _verdict_on(cls := type(value))
        if known is not None and (self._forks or known[0] is GENERATOR) and known[1](value):
            return self._tell(item, known[0])
        if role == "wrapper" and part_of is None:
            part_of = _Owner.of(value, path)
        if base is None and self._is_users(cls):
            library = None
        elif base is None and is_third_party(cls) and _is_better_owner(cls, library):
            library = _Owner.of(value, path)
        for step, child in _held(value, base, self._forks) if role != "left alone" else ():
            hidden = private or (step.startswith("._") and self._is_private(cls, step[1:]))
            self.add(_Item(child, beyond(path, step), part_of, library, hidden))
        if base is None and not role:
            for step, child in of_class(value):
                if _is_known(child):
                    self.add(_Item(child, path + step, part_of, library, private))
            for step, function in makers_of(cls):
                self.add(_Item(function, path + step, part_of, library, private))

    def end(self) -> list[Inherited]:
        """All that was found: of a library's object with several generators, the object."""
        for owner, paths in self._generators.items():
            if len(paths) > 1:
                first = next(k for k, each in enumerate(self.found) if each.path in paths)
                told = Inherited(
                    owner.path, owner.kind, *_for_owner(owner, self._workers), owner.token
                )
                self.found = [each for each in self.found if each.path not in paths]
                self.found.insert(first, told)
        return self.found

    def _tell(self, item: _Item, hazard: Hazard) -> None:
        whole = item.part_of or _Owner.of(item.value, item.path)
        path, kind, token, _ = whole
        if hazard is GENERATOR:
            if re.split(r"\W", path)[-1] in self.alike:
                return
            if item.private:
                return  # the library's business: what it draws, it draws as it means to
            hazard = _for_generator(path, whole.cls, self._workers)
            if item.library is not None:
                self._generators.setdefault(item.library, []).append(path)
        shared = self._workers > 1 and is_read_from(type(item.value))
        cure = suited(hazard.cure, stream=self._stream, shared=shared)
        found = Inherited(path, kind, hazard.why, cure, token)
        if found not in self.found:  # a wrapper may have several live parts
            self.found.append(found)

    def _is_users(self, cls: type) -> bool:
        known = self._users.get(id(cls))
        if known is None:
            known = self._users[id(cls)] = is_users_class(cls)
        return known

    def _is_private(self, cls: Any, name: str) -> bool:
        """Whether an attribute of this name is what a library keeps for itself.

        So is one of the user's own class that derives from a library's, unless its code names it.
        """
        if inherits(cls, *_CALLED):
            return False
        if not self._is_users(cls):
            return True
        lineage = [each for each in mro_of(cls)[:-1] if id(each) not in _NO_STATE]
        users = [each for each in lineage if self._is_users(each)]
        return len(users) < len(lineage) and not any(_names(each, name) for each in users)


_CALLED = (types.FunctionType, types.MethodType, types.BuiltinMethodType)  # steps of their own
_NO_STATE = {*map(id, (torch.utils.data.Dataset, torch.utils.data.IterableDataset, Generic))}


def _names(cls: type, name: str) -> bool:
    """Whether a method that the class defines has the name in its code."""
    return any(
        name in code.co_names
        for each in vars(cls).values()
        if type(each) is types.FunctionType
        for code in codes(each.__code__)
    )


def _held(value: Any, base: Any, forks: bool) -> Iterator[tuple[str, Any]]:
    """What an object holds; of globals those of a known class, as most are not the dataset's.

    A spawned worker imports them anew; a function that asks where it runs knows what it may use.
    """
    if type(value) is types.FunctionType and asks_where_it_runs(value.__code__):
        forks = False
    return all_held_by(value, base, _is_known if forks else None)


def _is_known(value: Any) -> bool:
    _, known, role = _verdict_on(type(value))
    return known is not None or role == "wrapper"


_ORDERING = ("shuffle", "permutation", "permuted", "sample")


def _orders_shares(cls: type) -> set[str]:
    """The generators by which a stream does nothing but order what its workers share out."""
    functions = [function for _, function in makers_of(cls)]
    within = [code for each in functions for code in codes(each.__code__)]
    if not any("num_workers" in code.co_names for code in within):
        return set()
    chains = [chain for each in functions for chain in uses(each.__code__).chains]
    ordering = {each[-2] for each in chains if len(each) > 1 and each[-1] in _ORDERING}
    others = {each[-2] for each in chains if len(each) > 1 and each[-1] not in _ORDERING}
    return ordering - others - {each[-1] for each in chains}


_PUBLIC = {"_thread.lock": "threading.Lock", "Environment": "lmdb.Environment"}


@once_for_class
def _kind(cls: type) -> str:
    """The name that people know a class by, without the private modules it may be from."""
    name = type_name(cls)
    return cut(_PUBLIC.get(name) or re.sub(r"^_(?!_)|\._[^.]*(?=\.)", "", name))


def _for_generator(path: str, cls: Any, workers: int) -> Hazard:
    why = f"the worker starts each epoch from {GENERATOR.why}: unless something seeds it there, "
    why += "the same numbers again"
    if workers > 1:
        why = f"each of the {workers} workers gets {GENERATOR.why}: unless something seeds it "
        why += "there, all draw the same numbers"
    seed = "get_worker_info().seed"
    there = _in_worker_init_fn(path)
    if not there:
        return Hazard(why, f"make it in the worker from {seed}")
    again = how_to_seed(cls, there, seed) or f"seed {there} by {seed}"
    if again.startswith(f"{there} =") and there.isidentifier():
        again = f"{GLOBAL}{there}; {again}"
    return Hazard(why, f"{GENERATOR.cure}: in worker_init_fn, {again}")


def _in_worker_init_fn(path: str) -> str:
    """The expression for what lies at a path, in the user's ``worker_init_fn``; "" without one."""
    if path.startswith(GLOBAL):
        return path.removeprefix(GLOBAL)
    reachable = path.startswith("dataset.") and "__" not in path and "{" not in path
    return f"get_worker_info().{path}" if reachable else ""


# How an object of a library seeds all generators in it: one of albumentations, one of MONAI.
_SEEDING = {"set_random_seed": "", "set_random_state": "seed="}


def _seeding(cls: Any) -> list[str]:
    return [each for each in _SEEDING if definitions(cls, each)]


def _is_better_owner(cls: type, owner: _Owner | None) -> bool:
    """Whether the generators in an object are told as this one's: the first that seeds them all."""
    return owner is None or bool(_seeding(cls) and not _seeding(owner.cls))


def _for_owner(owner: _Owner, workers: int) -> Hazard:
    """Of a library's object that holds several generators."""
    each = f"each of the {workers} workers gets" if workers > 1 else "the worker starts from"
    why = f"of the random generators in it, {each} {GENERATOR.why}: unless something seeds them "
    why += "there, " + ("all draw the same numbers" if workers > 1 else "each epoch is the same")
    seed, there = "get_worker_info().seed", _in_worker_init_fn(owner.path)
    seeds = _seeding(owner.cls)
    if there and seeds:
        again = f"{there}.{seeds[0]}({_SEEDING[seeds[0]]}{seed} % 2**32)"
        return Hazard(why, f"{GENERATOR.cure}: in worker_init_fn, {again}")
    return Hazard(why, f"make it in the worker, or seed it there from {seed}")
