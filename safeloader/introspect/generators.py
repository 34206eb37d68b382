"""The random generators that an object holds, themselves. Runs in: both.

Found by what is held, without running code of the user's. To ask a generator for its state, or to
put it back, is the caller's.
"""

from __future__ import annotations

import types
from collections import deque
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import torch

from safeloader.introspect.copy_state import attributes
from safeloader.introspect.generator_kinds import is_generator, kind_of, process_generators
from safeloader.introspect.parts import (
    FUNCTIONS_MAX,
    GLOBAL,
    all_held_by,
    beyond,
    makers_of,
    of_class,
)
from safeloader.introspect.values import container_base, inherits

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
            queue += [(each, path + step) for step, each in makers_of(cls)]
            queue += [(each, path + step) for step, each in of_class(value) if is_generator(each)]
    return found


def own_generators(dataset: Any) -> dict[str, Any]:
    """The generators that a dataset holds under names, or draws from in a module's globals.

    Fewer than :func:`generators_of`, sooner.

    >>> import random
    >>> class Noisy:
    ...     def __init__(self):
    ...         self.rng = random.Random(0)
    >>> list(own_generators(Noisy()))
    ['dataset.rng']
    """
    known = {id(each) for each in process_generators().values()}
    found: dict[str, Any] = {}
    functions: deque[Any] = deque(each for _, each in makers_of(type(dataset)))
    for step, each in of_class(dataset):
        found |= _if_own(f"dataset{step}", each, known)
    classes: dict[int, type] = {}
    for each in attributes(dataset):
        found |= _if_own(each.path, each.value, known)
        functions += [each.value] if type(each.value) is types.FunctionType else ()
        cls = type(each.value)
        if id(cls) not in classes:
            classes[id(cls)] = cls
            functions += [function for _, function in makers_of(cls)]
    seen: set[int] = set()
    while functions and len(seen) < FUNCTIONS_MAX:
        function = functions.popleft()
        if id(function) in seen:
            continue
        seen.add(id(function))
        for step, each in all_held_by(function, None, is_generator):
            if step.startswith(GLOBAL):
                found |= _if_own(step, each, known)
                functions += [each] if type(each) is types.FunctionType else ()
    return dict(islice(found.items(), OWN_MAX))


def _if_own(path: str, value: Any, known: set[int]) -> dict[str, Any]:
    """A generator by its path, if it can be read here, and is none of the process's own."""
    if kind_of(value) is None or id(value) in known:
        return {}
    on_cpu = not inherits(type(value), torch.Generator) or value.device.type == "cpu"
    return {path: value} if on_cpu else {}
