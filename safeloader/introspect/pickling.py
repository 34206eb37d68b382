"""Finds the part of an object that cannot be pickled. Runs in: both.

"cannot pickle '_thread.lock' object" does not say where the lock is. Here the object is pickled
again, part by part, into nothing; what fails is looked into until none of its parts does. The
object is left as it is (no tensor moves to shared memory, no file descriptor is duplicated), but
its ``__getstate__`` and ``__reduce__`` run, as they do whenever it is pickled. No value is shown.
"""

from __future__ import annotations

import array
import io
import pickle
import socket
import traceback
import types
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing import connection
from time import monotonic
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.utils.data import IterableDataset

from safeloader._python import ForkingPickler, as_if_spawning
from safeloader.introspect import advice
from safeloader.introspect.advice import is_handle, is_read_from
from safeloader.introspect.texts import key_text, name_of, plain_text
from safeloader.introspect.values import (
    bounded,
    container_base,
    cut,
    exception_text,
    fields,
    inherits,
    mro_of,
    type_name,
)

REASON_MAX = 200  # characters
PATH_MAX = 350  # characters
DEEP = 50  # levels, one in the other, that all fail for their depth

_Parts: TypeAlias = Iterable[tuple[str, Any]]  # each with its path, or the step to it

_ATOMS = frozenset({int, float, complex, bool, str, bytes, type(None)})
_BUILT_IN = frozenset({dict, list, tuple, set, frozenset})
# Sent for certain; trying would copy them as a whole, or duplicate a descriptor.
_SENT = frozenset({bytearray, array.array, socket.socket, connection.Connection, torch.cuda.Event})
# Has multiprocessing believe that this thread starts a process; duplicates no descriptor for it.
_POPEN: Any = types.SimpleNamespace(duplicate_for_child=int, DupFd=int)
# What these modules make is told as it is: the lock inside a thread is not the user's.
_OPAQUE = {"asyncio", "concurrent", "gzip", "io", "logging", "multiprocessing", "queue", "socket"}
_OPAQUE |= {"subprocess", "tarfile", "tempfile", "threading", "weakref", "zipfile"}
_FILES = {"gzip", "io", "socket", "tarfile", "tempfile", "zipfile"}


class UnpicklablePart(NamedTuple):
    """The part of an object that cannot be pickled."""

    path: str  # a Python expression, but for what none reaches (an item of a set)
    kind: str  # its type, mostly
    reason: str  # what the pickler said
    advice: str
    forks: bool = False  # whether a fork, which pickles nothing, would carry it over soundly

    def __str__(self) -> str:
        return f"{self.path}: {self.kind}"


def find_unpicklable(
    thing: object, name: str, *, spawning: bool = True, bound_s: float = 20.0
) -> UnpicklablePart | None:
    """Find the part of an object that keeps it from being pickled. Never raises.

    Args:
        thing: a dataset, a function, a batch.
        name: what the path begins with.
        spawning: whether it is for a process being started, which alone can be given mp.Locks.
        bound_s: seconds to search. A call of the user's code, or into C, is waited for.

    Returns:
        The deepest part found to fail in that time; None where ``thing`` can be pickled.

    >>> print(find_unpicklable({"rate": 1, "scale": [len, lambda x: 2 * x]}, "dataset.settings"))
    dataset.settings['scale'][1]: a lambda
    """
    return next(_found(thing, name, spawning, bound_s), None)


def all_unpicklable(
    thing: object, name: str, *, spawning: bool = True, most: int = 10, bound_s: float = 20.0
) -> list[UnpicklablePart]:
    """Find every part of an object that keeps it from being pickled, as :func:`find_unpicklable`.

    >>> print(*all_unpicklable([lambda x: x, 1, (i for i in "ab")], "dataset.parts"), sep="; ")
    dataset.parts[0]: a lambda; dataset.parts[2]: generator
    """
    found: list[UnpicklablePart] = []
    for part in _found(thing, name, spawning, bound_s):
        if part.path in {each.path for each in found}:
            break  # made anew whenever it is asked for
        found.append(part)
        if len(found) >= most:
            break
    return found


def _found(thing: object, name: str, spawning: bool, bound_s: float) -> Iterator[UnpicklablePart]:
    """The parts one by one: what was found is taken for sent in the next search."""
    end = monotonic() + bound_s
    left_out: dict[int, Any] = {}
    while True:
        search, note = _Search(end), ""
        search.known |= left_out
        try:
            with as_if_spawning(_POPEN if spawning else None):
                search.look_for([(name, thing)])
        except KeyboardInterrupt:
            raise
        except _OutOfTime:
            note = " (the search ran out of time: it is this or a part of it)"
        except BaseException:  # a fault of ours must not hide the error that is to be explained
            pass
        if (found := search.deepest) is None:
            return
        cure, forks = _advice(found, spawning)
        stream = inherits(type(thing), IterableDataset)
        cure = advice.suited(cure, stream=stream, shared=_is_read_from(type(found.value)))
        kind = _kind(found.value) + ", nested too deeply to pickle" * found.too_deep
        reason = cut(found.reason, REASON_MAX - len(note)) + note
        cure = f"{cure[0].upper()}{cure[1:]}."
        yield UnpicklablePart(bounded(found.path, PATH_MAX), kind, reason, cure, forks)
        if note or id(found.value) in left_out:
            return
        left_out[id(found.value)] = found.value


# ---- one trial


class _OutOfTime(Exception):
    """The search has to end."""


class _Pickler(ForkingPickler):
    """Pickles as multiprocessing does, but for what the search knows and what is sent anyway."""

    def __init__(self, search: Any) -> None:
        super().__init__(search)
        self._check, self._known = search.check, search.known

    def persistent_id(self, value: Any) -> int | None:  # hot: runs for every object
        cls = type(value)
        if cls in _ATOMS:
            return None
        self._check()
        return id(value) if id(value) in self._known or _is_sent(cls, value) else None


def _is_sent(cls: type, value: Any) -> bool:
    if cls in (np.ndarray, np.memmap, np.recarray):
        return not value.dtype.hasobject
    # What torch refuses is left to torch, to be refused in its own words.
    if cls is torch.Tensor or cls is torch.nn.Parameter:
        return value.is_leaf or not value.requires_grad
    if cls is torch.UntypedStorage:
        return value.device.type not in ("cuda", "meta")
    return cls in _SENT


# ---- the search


class _Failed(NamedTuple):
    path: str
    value: Any
    hook: str  # the method of its class that raised, if one did
    reason: str
    too_deep: bool


class _Search:
    """Is the file to pickle into: keeps nothing, and minds the time."""

    def __init__(self, end: float) -> None:
        self.deepest: _Failed | None = None
        self.known: dict[int, Any] = {}  # by id: what was looked into, which is kept alive here
        self._end = end

    def check(self) -> None:
        if monotonic() >= self._end:
            raise _OutOfTime

    def write(self, data: Any) -> int:
        self.check()
        return len(data)

    def look_for(self, parts: _Parts) -> None:
        """Find the first of ``parts`` that fails, and go on inside it."""
        chain: list[_Failed] = []  # the last ones, where all of them fail for their depth
        while len(chain) < DEEP and (failed := self._first_failing(parts)):
            self.deepest = failed._replace(too_deep=False)
            chain = [*chain, failed] if failed.too_deep else []
            parts = _parts(failed.path, failed.value)
        if chain and (len(chain) == DEEP or not chain[-1].hook):
            # It begins with the first of the kinds that follow each other at its end.
            kinds = [type(each.value) for each in chain[len(chain) // 2 :]]
            self.deepest = next(each for each in chain if type(each.value) in kinds)

    def _first_failing(self, parts: _Parts) -> _Failed | None:
        pickler = _Pickler(self)  # one for all parts: what it has pickled it knows
        for path, part in parts:
            try:
                self.check()
                if type(part) not in _ATOMS and id(part) not in self.known:
                    pickler.dump(part)
            except (KeyboardInterrupt, _OutOfTime):
                raise
            except BaseException as exc:  # whatever the user's code raises, SystemExit too
                self.known[id(part)] = part
                return _Failed(path, part, *_told(exc))
        return None


def _told(exc: BaseException) -> tuple[str, str, bool]:
    """The hook, the reason and the depth of a :class:`_Failed`."""
    names = (frame.f_code.co_name for frame, _ in traceback.walk_tb(exc.__traceback__))
    hook = next((name for name in names if name.startswith("__")), "")
    text = plain_text(exception_text(exc))
    reason = f"its {hook} raised " * bool(hook) + type(exc).__name__
    return hook, reason + f": {text}" * bool(text), isinstance(exc, RecursionError)


# ---- the parts of an object


def _parts(path: str, value: Any) -> _Parts:
    """What the pickler goes on to from ``value``, in its order."""
    with suppress(Exception):  # a reducer that raises: then ``value`` itself is at fault
        for step, part in _children(value, type(value)):
            yield path + step, part


def _children(value: Any, cls: type) -> _Parts:
    if cls in _BUILT_IN:
        yield from _contents(value, cls)
    elif cls is np.ndarray:
        for at, each in np.ndenumerate(value):
            yield str([*at] or [()]), each
    elif cls is not types.FunctionType and not inherits(cls, type) and not _opaque_base(cls):
        reducer = ForkingPickler(io.BytesIO()).dispatch_table.get(cls)
        reduced = reducer(value) if reducer else value.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
        if type(reduced) is not tuple:
            return  # the name of a global
        function, args, state, items, pairs = (*reduced, None, None, None)[:5]
        names = _names(value, cls)
        yield from _spread(names, ".__reduce__()", (function, args))
        yield from _spread(names, ".__getstate__()", state)
        yield from ((f"[{at}]", each) for at, each in enumerate(items or ()))
        for key, each in pairs or ():
            yield from _contents({key: each}, dict)


def _contents(value: Any, base: Any) -> _Parts:
    if base is dict:
        for key, each in list(dict.items(value)):
            yield "<key of a dict>", key
            yield f"[{key_text(key)}]", each
    else:
        for at, each in enumerate(base.__iter__(value)):
            yield "<item of a set>" if base in (set, frozenset) else f"[{at}]", each


def _spread(names: dict[int, str], step: str, part: Any, levels: int = 3) -> _Parts:
    """``part`` under the name that its owner has for it; without one, what is in it."""
    if id(part) in names or type(part) not in _BUILT_IN or not levels:
        yield names.get(id(part), step), part
    else:
        for inner, each in _contents(part, type(part)):
            yield from _spread(names, step + inner, each, levels - 1)


def _names(value: Any, cls: type) -> dict[int, str]:
    """How what ``value`` holds is reached from it, by id."""
    names = {id(cls): ""}
    if base := container_base(cls):
        names |= {id(each): step for step, each in _contents(value, base)}
    if inherits(cls, BaseException):
        names |= {id(each): f".args{step}" for step, each in _contents(value.args, tuple)}
    if cls in (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType):
        names[id(value.__self__)] = ".__self__"
    return names | {id(each): f".{name_of(name)}" for name, each in fields(value, 10_000)}


# ---- in words

# What a fork would carry over soundly, by its base classes.
_ADVICE: tuple[tuple[Any, str], ...] = (
    ((type,), advice.MODULE_LEVEL),
    ((types.FunctionType,), advice.FUNCTION),
    ((types.GeneratorType,), advice.LIST_FIRST),
    ((types.ModuleType,), advice.IMPORT_THERE),
    ((torch.Tensor,), advice.DETACH),
    ((torch.UntypedStorage,), advice.TO_CPU),
)


def _advice(failed: _Failed, spawning: bool) -> tuple[str, bool]:
    """What to do, and whether a fork, which pickles nothing, would do instead."""
    cls = type(failed.value)
    if failed.too_deep:
        return advice.FLAT, True
    if known := [each for bases, each in _ADVICE if inherits(cls, *bases)]:
        return known[0], True
    if "fork context" in failed.reason:
        return advice.MP_CONTEXT, False
    if "through inheritance" in failed.reason:
        return advice.PART_OF_DATASET, False
    handle = bool(_opaque_base(cls)) or is_handle(cls)
    if failed.hook and not handle:
        return advice.MEND_HOOK.format(hook=failed.hook), not handle
    return (advice.LAZILY if spawning else advice.NOT_IN_BATCH), False


def _kind(value: Any) -> str:
    cls, name = type(value), type_name(type(value))
    if cls is types.FunctionType:
        local = "local " * ("<locals>" in value.__qualname__)
        anonymous = value.__name__ == "<lambda>"
        return "a lambda" if anonymous else cut(f"a {local}function {value.__qualname__}")
    if inherits(cls, type):
        name = type_name(value)
        return cut(f"a class{' defined inside a function' * ('<locals>' in name)}, {name}")
    if name.startswith("_io."):
        with suppress(Exception):  # some have a number for a path, or none
            return f"an open file {cut(value.name)!r} ({name})"
    base = _opaque_base(cls)
    return cut(name if base in ("", name) else f"{name} (a {base})")


def _is_read_from(cls: type) -> bool:
    modules = (type_name(each).lstrip("_").partition(".")[0] for each in mro_of(cls))
    return is_read_from(cls) or not _FILES.isdisjoint(modules)


def _opaque_base(cls: type) -> str:
    """The class by which instances of ``cls`` are not looked into; "" where they are."""
    bases = map(type_name, mro_of(cls))
    return next((base for base in bases if base.partition(".")[0] in _OPAQUE), "")
