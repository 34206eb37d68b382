"""What an object holds, part by part, for whoever walks through a dataset. Runs in: both.

Elements of containers, attributes, and of functions what they close over, their defaults and, where
that is wanted, the globals that they use; of the user's classes, the functions by which they make
samples. Nothing of the user's is run.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from safeloader.introspect.byte_code import ENTRIES, METHODS_MAX, codes, globals_of
from safeloader.introspect.frames import is_users, is_users_class
from safeloader.introspect.texts import key_text
from safeloader.introspect.values import (
    cut,
    definitions,
    fields,
    held_by,
    is_one_of,
    once_for_class,
)

SAMPLED = 10  # elements looked at of one container
ATTRIBUTES_MAX = 256
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
    code = function.__code__
    for name in globals_of(code):
        child = dict.get(function.__globals__, name)
        yield _global(function.__globals__, name), child
        if type(child) is types.ModuleType and is_users(str(vars(child).get("__file__"))):
            for each in {each: None for inner in codes(code) for each in inner.co_names}:
                if each in vars(child):
                    yield _global(vars(child), each), vars(child)[each]


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
        yield f".{name}", _function_in(definitions(cls, name)[place])


@once_for_class
def _makers(cls: type) -> tuple[tuple[str, int], ...]:
    """Of each its name, and its place among the definitions of the class and its ancestors."""
    found: list[tuple[str, int]] = []
    names = dict.fromkeys(ENTRIES) if is_users_class(cls) else {}
    done = {"__init__"}
    while names and len(found) < METHODS_MAX:
        done.add(name := next(iter(names)))
        del names[name]
        for place, each in enumerate(definitions(cls, name)):
            function = _function_in(each)
            if not _is_users_function(function):
                break
            found.append((name, place))
            used = [name for code in codes(function.__code__) for name in code.co_names]
            names |= dict.fromkeys(each for each in used if each not in done)
            if "super" not in used:
                break
    return tuple(found)


def _function_in(method: Any) -> Any:
    if is_one_of(type(method), classmethod, staticmethod):
        return method.__func__
    return method.fget if type(method) is property else method


def beyond(path: str, step: str) -> str:
    """The path to what lies one step beyond another; a global's begins anew, with its module.

    >>> beyond("dataset.items", "[0]"), beyond("dataset.__getitem__", "global augment.RNG")
    ('dataset.items[0]', 'global augment.RNG')
    """
    return step if step.startswith(GLOBAL) else path + step
