"""What an object holds, part by part, for whoever walks through a dataset. Runs in: both.

Elements of containers, attributes, and of functions what they close over, their defaults and, where
that is wanted, the globals that they use; of the user's classes, the functions by which they make
samples. Nothing of the user's is run.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from safeloader.introspect.byte_code import CODE_MAX, ENTRIES, METHODS_MAX, function_in, uses
from safeloader.introspect.frames import is_users, is_users_class
from safeloader.introspect.texts import key_text
from safeloader.introspect.values import (
    cut,
    definitions,
    fields,
    held_by,
    inherits,
    is_one_of,
    mro_of,
    once_for_class,
    type_name,
)

SAMPLED = 10  # elements looked at of one container
ATTRIBUTES_MAX = 256
FUNCTIONS_MAX = 100
GLOBAL = "global "  # begins the path of a module's global


def named_fields(value: Any) -> dict[str, Any]:
    """The first attributes of an object that have a text for a name."""
    return {name: each for name, each in fields(value, ATTRIBUTES_MAX) if type(name) is str}


def all_held_by(
    value: Any, base: Any, wanted: Callable[[Any], bool] | None = None
) -> Iterator[tuple[str, Any]]:
    """What an object holds: the step to it, for :func:`beyond`, and itself.

    Args:
        value: any object.
        base: the container that it is, or None.
        wanted: which globals of a function count, beside other functions of the user's; None for
            none of them.

    >>> [*all_held_by({"a": 1}, dict)], [*all_held_by((lambda x=2: x), None)][0]
    ([("['a']", 1)], ('.__defaults__', (2,)))
    """
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
        if wanted is not None:
            for step, child in _globals(value):
                if wanted(child) or _is_users_function(child):
                    yield step, child
        yield ".__defaults__", value.__defaults__
        yield ".__kwdefaults__", value.__kwdefaults__
    for name, child in named_fields(value).items() if cls is not base else ():
        yield f".{cut(name)}", child


def _globals(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals that a function uses, and those of modules of the user's by ``module.name``."""
    for name, *names in uses(function.__code__).chains:
        space = function.__globals__
        child = dict.get(space, name)
        yield _global(space, name), child
        for each in names:
            if type(child) is not types.ModuleType or not _is_users_module(child):
                break
            space = vars(child)
            child = dict.get(space, each)
            yield _global(space, each), child


def _is_users_module(module: types.ModuleType) -> bool:
    name, file = (vars(module).get(each) for each in ("__name__", "__file__"))
    if type(file) is str:
        return is_users(file)
    return str(name) not in sys.builtin_module_names  # one that a program made, or a namespace


def _global(module: dict[str, Any], name: str) -> str:
    where = dict.get(module, "__name__")
    in_script = type(where) is not str or where in ("__main__", "__mp_main__")
    return f"{GLOBAL}{name}" if in_script else f"{GLOBAL}{where}.{name}"


def _is_users_function(value: Any) -> bool:
    return type(value) is types.FunctionType and is_users(value.__code__.co_filename)


def makers_of(cls: type) -> Iterator[tuple[str, types.FunctionType]]:
    """The functions by which a class of the user's makes samples: the step to each, and itself.

    They are the methods by which samples are asked for, and those that these name.

    >>> class Noisy:
    ...     __module__ = "scans"
    ...     def __getitem__(self, i):
    ...         return self._noise() + i
    ...     def _noise(self):
    ...         return 0.5
    ...     def close(self): ...
    >>> [step for step, _ in makers_of(Noisy)]
    ['.__getitem__', '._noise']
    """
    for name, place in _makers(cls):
        yield f".{name}", function_in(definitions(cls, name)[place])


@once_for_class
def _makers(cls: type) -> tuple[tuple[str, int], ...]:
    """Of each its name, and its place among the definitions of the class and its ancestors."""
    found: list[tuple[str, int]] = []
    names = dict.fromkeys(ENTRIES) if is_users_class(cls) else {}
    done = {"__init__"}
    left = 2 * CODE_MAX
    while names and len(found) < METHODS_MAX and left > 0:
        done.add(name := next(iter(names)))
        del names[name]
        for place, each in enumerate(definitions(cls, name)):
            function = function_in(each)
            if not _is_users_function(function):
                break
            found.append((name, place))
            left -= len(function.__code__.co_code)
            chains = uses(function.__code__).chains
            names |= dict.fromkeys(each for each in _asked_of(cls, chains) if each not in done)
            if "super" not in function.__code__.co_names:
                break
    return tuple(found)


def of_class(value: Any) -> Iterator[tuple[str, Any]]:
    """What samples are made by of an object's class, and the object has not itself.

    >>> class Noisy:
    ...     __module__, rng, unused = "scans", [1], [2]
    ...     def __getitem__(self, i):
    ...         return self.rng
    >>> [*of_class(Noisy())]
    [('.rng', [1])]
    """
    cls = type(value)
    if names := _asked_by_makers(cls):
        own = named_fields(value)
        for name in names:
            if name not in own:
                yield from ((f".{name}", each) for each in definitions(cls, name)[:1])


@once_for_class
def _asked_by_makers(cls: type) -> tuple[str, ...]:
    chains = [chain for _, function in makers_of(cls) for chain in uses(function.__code__).chains]
    asked = dict.fromkeys(_asked_of(cls, chains))
    return tuple(
        name
        for name in asked
        for each in definitions(cls, name)[:1]
        if not is_one_of(type(function_in(each)), types.FunctionType)
    )


def _asked_of(cls: type, chains: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """The attributes that a method asks of its object, or of its class by name."""
    own = {"", *(type_name(each).rpartition(".")[2] for each in mro_of(cls))}
    for first, *names in chains:
        if first in own and (asked := [each for each in names if each != "__class__"]):
            yield asked[0]


def functions_of(thing: Any) -> list[types.FunctionType]:
    """The functions of the user's that a callable runs, as far as they can be seen.

    >>> def seed(): ...
    >>> functions_of(functools.partial(seed)) == [seed]
    True
    """
    found: list[types.FunctionType] = []
    seen: dict[int, Any] = {}
    queue: deque[Any] = deque([thing])
    while queue and len(seen) < FUNCTIONS_MAX:
        value = queue.popleft()
        cls = type(value)
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if cls is types.FunctionType:
            found.append(value)
            parts = (each for _, each in all_held_by(value, None, _is_users_function))
            queue += (each for each in parts if is_one_of(type(each), *_CALLABLES))
        elif cls is types.MethodType:
            queue.append(value.__func__)
        elif inherits(cls, functools.partial):
            queue.append(named_fields(value).get("func"))
        else:
            queue += (each for _, each in makers_of(cls))
    return found


_CALLABLES = (types.FunctionType, types.MethodType, functools.partial)


def beyond(path: str, step: str) -> str:
    """The path to what lies one step beyond another; a global's begins anew, with its module.

    >>> beyond("dataset.items", "[0]"), beyond("dataset.__getitem__", "global augment.RNG")
    ('dataset.items[0]', 'global augment.RNG')
    """
    return step if step.startswith(GLOBAL) else path + step
