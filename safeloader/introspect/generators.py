"""The random generators that an object holds, themselves. Runs in: both.

Found by what is held, without running code of the user's. To ask a generator for its state, or to
put it back, is the caller's.
"""

from __future__ import annotations

import random
import types
from collections import deque
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from safeloader.introspect.byte_code import ENTRIES
from safeloader.introspect.parts import all_held_by
from safeloader.introspect.values import container_base, definitions, inherits

_OBJECTS = 2000
_GENERATORS = (
    np.random.Generator,
    np.random.RandomState,
    np.random.BitGenerator,
    random.Random,
    torch.Generator,
)
_LEAVES = (str, bytes, int, float, complex, type(None), np.ndarray, torch.Tensor, type)


def generators_of(thing: object, name: str = "dataset") -> dict[str, Any]:
    """Return the random generators that a dataset holds, by path; the process's own are none.

    >>> [*generators_of({"rng": random.Random(0)})]
    ["dataset['rng']"]
    """
    found: dict[str, Any] = {}
    own = (getattr(draw, "__self__", None) for draw in (random.random, np.random.rand))
    seen: dict[int, Any] = {id(each): each for each in (torch.default_generator, *own)}
    queue: deque[tuple[Any, str]] = deque([(thing, name)])
    for method in ENTRIES:  # what they close over, and the globals that they use
        queue += [(each, f"{name}.{method}") for each in definitions(type(thing), method)[:1]]
    while queue and len(seen) < _OBJECTS:
        value, path = queue.popleft()
        cls = type(value)
        if id(value) in seen or inherits(cls, *_LEAVES) or cls is types.ModuleType:
            continue
        seen[id(value)] = value  # held, so that its id is not given again
        if _is_generator(value):
            if not inherits(cls, random.SystemRandom):  # has no state
                found[path] = value
            continue
        with suppress(Exception):  # another thread may change what is read here
            parts = all_held_by(value, container_base(cls), _is_generator)
            queue += [(each, path + step) for step, each in parts]
    return found


def _is_generator(value: Any) -> bool:
    return inherits(type(value), *_GENERATORS)
