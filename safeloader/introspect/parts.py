"""What an object holds, part by part, for whoever walks through a dataset. Runs in: both.

Elements of containers, attributes, and of functions what they close over, their defaults and, where
that is wanted, the globals that they use. Nothing of the user's is run.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from safeloader.introspect.byte_code import globals_of
from safeloader.introspect.texts import key_text
from safeloader.introspect.values import cut, fields, held_by

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
        wanted: which globals of a function count; None for none of them.

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
        for name in globals_of(value.__code__) if wanted else ():
            child = dict.get(value.__globals__, name)
            if wanted is not None and wanted(child):
                yield _global(value.__globals__, name), child
        yield ".__defaults__", value.__defaults__
        yield ".__kwdefaults__", value.__kwdefaults__
    for name, child in named_fields(value).items() if cls is not base else ():
        yield f".{cut(name)}", child


def _global(module: dict[str, Any], name: str) -> str:
    where = dict.get(module, "__name__")
    in_script = type(where) is not str or where in ("__main__", "__mp_main__")
    return f"{GLOBAL}{name}" if in_script else f"{GLOBAL}{where}.{name}"


def beyond(path: str, step: str) -> str:
    """The path to what lies one step beyond another; a global's begins anew, with its module.

    >>> beyond("dataset.items", "[0]"), beyond("dataset.__getitem__", "global augment.RNG")
    ('dataset.items[0]', 'global augment.RNG')
    """
    return step if step.startswith(GLOBAL) else path + step
