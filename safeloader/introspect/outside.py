"""What a dataset's code keeps outside of it: caches of modules and classes. Runs in: both.

``CACHE[index] = sample`` at module level, ``functools.lru_cache`` on a function or a method, a dict
that a class holds for all its objects. Which these are is read from byte code; nothing is run.
"""

from __future__ import annotations

import functools
import gc
import types
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

from safeloader.introspect.byte_code import LEFT_ALONE, globals_of
from safeloader.introspect.copy_state import attributes
from safeloader.introspect.values import (
    fields,
    is_one_of,
    mro_of,
    namespace_of,
    own_length,
    type_name,
)

NEWEST_MAX = 4096  # of a dict
FUNCTIONS_MAX = 100  # whose code is read
CLASSES_MAX = 20
LruCache = type(functools.lru_cache(abs))
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, types.ModuleType)


def kept_outside(root: Any) -> list[Any]:
    """The containers and caches that the classes of an object, and what it holds, make use of.

    Args:
        root: a dataset, or a function.

    >>> class Cached:
    ...     cache = {}
    ...     def __getitem__(self, i):
    ...         return self.cache.setdefault(i, i)
    >>> Cached.cache.update({1: "a", 2: "b"})
    >>> kept_outside(Cached())
    [['b', 'a']]
    """
    found: dict[int, Any] = {}
    functions: deque[Any] = deque([root])
    for cls in _classes(root):
        for value in list(namespace_of(cls).values()):
            functions.append(value)
            if type(value) is LruCache or own_length(value) is not None:
                found[id(value)] = value
    seen: set[int] = set()
    while functions and len(seen) < FUNCTIONS_MAX:
        function = _function_in(functions.popleft())
        if function is None or id(function) in seen or _is_left_alone(function):
            continue
        seen.add(id(function))
        for name in globals_of(function.__code__):
            value = dict.get(function.__globals__, name)
            functions.append(value)
            if not is_one_of(type(value), *_PLAIN, types.FunctionType, types.BuiltinFunctionType):
                found[id(value)] = value
    caches = [value for value in found.values() if not is_one_of(type(value), str, bytes)]
    return [each for value in caches for each in _newest_first(value)]


def _newest_first(value: Any) -> list[Any]:
    """A cache from its end: what it got last stands there, whoever filled it before."""
    if type(value) is LruCache:
        return [each for part in gc.get_referents(value)[::-1] for each in _newest_first(part)]
    if type(value) is dict:
        return [list(islice(reversed(value.values()), NEWEST_MAX))]
    return [value]


def _classes(root: Any) -> Iterator[type]:
    """The user's classes of an object and of what it holds."""
    owners = [root, *(each.owner for each in attributes(root))]
    known: dict[int, type] = {}
    for owner in owners:
        for cls in mro_of(type(owner)):
            if "." in type_name(cls) and not type_name(cls).startswith(LEFT_ALONE):
                known.setdefault(id(cls), cls)
    yield from list(known.values())[:CLASSES_MAX]


def _function_in(value: Any) -> Any:
    """The function that a method, a property or a cache is made of; None where there is none."""
    for _ in range(4):
        cls = type(value)
        if cls is types.FunctionType:
            return value
        if cls is property:
            value = value.fget
        elif is_one_of(cls, classmethod, staticmethod, types.MethodType):
            value = value.__func__
        elif cls is LruCache:
            value = dict(fields(value, 16)).get("__wrapped__")
        else:
            return None
    return None


def _is_left_alone(function: Any) -> bool:
    module = function.__module__
    return type(module) is str and f"{module}.".startswith(LEFT_ALONE)
