"""The random generators that an object holds, themselves. Runs in: both.

Found by what is held, without running code of the user's. To ask a generator for its state, or to
put it back, is the caller's.
"""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from safeloader.introspect.texts import key_text
from safeloader.introspect.values import (
    container_base,
    cut,
    definitions,
    fields,
    held_by,
    inherits,
)

_OBJECTS = 2000
_SAMPLED = 10  # elements looked at of one container
_GENERATORS = (
    np.random.Generator,
    np.random.RandomState,
    np.random.BitGenerator,
    random.Random,
    torch.Generator,
)
_LEAVES = (str, bytes, int, float, complex, type(None), np.ndarray, torch.Tensor, type)
_ENTRIES = ("__getitem__", "__getitems__", "__iter__", "__next__", "__call__")


def generators_of(thing: object, name: str = "dataset") -> dict[str, Any]:
    """Return the random generators that a dataset holds, by path; the process's own are none.

    >>> [*generators_of({"rng": random.Random(0)})]
    ["dataset['rng']"]
    """
    found: dict[str, Any] = {}
    own = (getattr(draw, "__self__", None) for draw in (random.random, np.random.rand))
    seen: dict[int, Any] = {id(each): each for each in (torch.default_generator, *own)}
    queue: deque[tuple[Any, str]] = deque([(thing, name)])
    for method in _ENTRIES:  # what they close over, and the globals that they use
        queue += [(each, f"{name}.{method}") for each in definitions(type(thing), method)[:1]]
    while queue and len(seen) < _OBJECTS:
        value, path = queue.popleft()
        cls = type(value)
        if id(value) in seen or inherits(cls, *_LEAVES) or cls is types.ModuleType:
            continue
        seen[id(value)] = value  # held, so that its id is not given again
        if inherits(cls, *_GENERATORS):
            if not inherits(cls, random.SystemRandom):  # has no state
                found[path] = value
            continue
        with suppress(Exception):  # another thread may change what is read here
            queue += [(each, path + step) for step, each in _parts(value, cls)]
    return found


def _parts(value: Any, cls: type) -> Iterator[tuple[str, Any]]:
    base = container_base(cls)
    if base is not None:
        for key, each in held_by(value, _SAMPLED):
            yield f"[{key_text(key)}]", each
    if cls is types.MethodType or cls is types.BuiltinMethodType:
        yield ".__self__", value.__self__
        yield ".__func__", getattr(value, "__func__", None)
    if cls is types.FunctionType:
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=False):
            with suppress(ValueError):  # an empty cell
                yield f".__closure__[{name!r}]", cell.cell_contents
        for name in value.__code__.co_names:
            each = dict.get(value.__globals__, name)
            if inherits(type(each), *_GENERATORS):
                yield f".__globals__[{name!r}]", each
        yield ".__defaults__", value.__defaults__
        yield ".__kwdefaults__", value.__kwdefaults__
    for name, each in fields(value, 256) if cls is not base else ():
        yield f".{cut(str(name))}", each
