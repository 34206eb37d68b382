"""The random generators that an object holds, themselves. Runs in: both.

Found by what is held, without running code of the user's. To ask a generator for its state, or to
put it back, is the caller's.
"""

from __future__ import annotations

import types
from collections import deque
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from safeloader.introspect.byte_code import ENTRIES
from safeloader.introspect.copy_state import attributes
from safeloader.introspect.generator_kinds import is_generator, kind_of, process_generators
from safeloader.introspect.parts import all_held_by, beyond
from safeloader.introspect.values import container_base, definitions, inherits

_OBJECTS = 2000
OWN_MAX = 8  # of a dataset's own
_LEAVES = (str, bytes, int, float, complex, type(None), np.ndarray, torch.Tensor, type)


def generators_of(thing: object, name: str = "dataset") -> dict[str, Any]:
    """Return the random generators that a dataset holds, by path; the process's own are none.

    >>> import random
    >>> [*generators_of({"rng": random.Random(0)})]
    ["dataset['rng']"]
    """
    found: dict[str, Any] = {}
    seen: dict[int, Any] = {id(each): each for each in process_generators().values()}
    queue: deque[tuple[Any, str]] = deque([(thing, name)])
    for method in ENTRIES:  # what they close over, and the globals that they use
        queue += [(each, f"{name}.{method}") for each in definitions(type(thing), method)[:1]]
    while queue and len(seen) < _OBJECTS:
        value, path = queue.popleft()
        cls = type(value)
        if id(value) in seen or inherits(cls, *_LEAVES) or cls is types.ModuleType:
            continue
        seen[id(value)] = value  # held, so that its id is not given again
        if is_generator(value):
            if kind_of(value) is not None:
                found[path] = value
            continue
        with suppress(Exception):  # another thread may change what is read here
            parts = all_held_by(value, container_base(cls), is_generator)
            queue += [(each, beyond(path, step)) for step, each in parts]
    return found


def own_generators(dataset: Any) -> dict[str, Any]:
    """The generators that a dataset holds under names: fewer than :func:`generators_of`, sooner.

    >>> import random
    >>> class Noisy:
    ...     def __init__(self):
    ...         self.rng = random.Random(0)
    >>> list(own_generators(Noisy()))
    ['dataset.rng']
    """
    known = {id(each) for each in process_generators().values()}
    found: dict[str, Any] = {}
    for each in attributes(dataset):
        if kind_of(each.value) is None or id(each.value) in known or len(found) >= OWN_MAX:
            continue
        if not inherits(type(each.value), torch.Generator) or each.value.device.type == "cpu":
            found[each.path] = each.value
    return found
