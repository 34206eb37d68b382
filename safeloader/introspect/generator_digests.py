"""Digests of where random generators stand. Runs in: both.

Two processes that draw the same numbers are told by the states that their generators were in before
and after. Nothing is drawn here: a state is read, which takes some 10 µs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch

from safeloader.introspect.copy_state import attributes

GENERATORS_MAX = 8  # of a dataset's own


class Standing(NamedTuple):
    """Where a generator stands, as digests.

    Attributes:
        seed: of what seeding sets and a few draws leave as it is. Equal in two processes that began
            at one place, it says that neither was seeded on the way, or both by one number.
        at: of all of its state.
    """

    seed: int
    at: int


def _python_state(generator: Any) -> Standing:
    _, numbers, gauss = generator.getstate()
    # Not of None: up to Python 3.11 its hash is its address.
    return Standing(hash(numbers[:-1]), hash((numbers, gauss or 0.0)))


def _numpy_state(generator: Any) -> Standing:
    return _of_bits(generator.get_state(legacy=False))


def _bit_generator_state(generator: Any) -> Standing:
    return _of_bits(generator.bit_generator.state)


def _of_bits(state: dict[str, Any]) -> Standing:
    inner = state["state"]
    seed = inner.get("key", inner.get("inc"))  # SFC64 has nothing that stays
    return Standing(_crc(inner if seed is None else seed), _crc(state))


def _crc(value: Any, last: int = 0) -> int:
    if type(value) is dict:
        for each in value.values():  # in the order in which NumPy makes it
            last = _crc(each, last)
        return last
    return crc32(value.tobytes() if type(value) is np.ndarray else repr(value).encode(), last)


def _torch_state(generator: Any) -> Standing:
    state = generator.get_state().numpy().tobytes()
    return Standing(crc32(state[:8]), crc32(state))  # it begins with the seed


def global_generators() -> dict[str, Callable[[], Standing]]:
    """The process-wide generators, by the names that people know, with what reads their states.

    >>> read = global_generators()["random"]
    >>> read() == read()
    True
    """
    return {
        "random": lambda: _python_state(random),
        "numpy.random": lambda: _numpy_state(np.random),
        "torch": lambda: _torch_state(torch.default_generator),
    }


def own_generators(dataset: Any) -> dict[str, Callable[[], Standing]]:
    """The generators that a dataset holds under names, with what reads their states.

    >>> class Noisy:
    ...     def __init__(self):
    ...         self.rng = random.Random(0)
    >>> noisy = Noisy()
    >>> read = own_generators(noisy)["dataset.rng"]
    >>> before = read()
    >>> _ = noisy.rng.random()
    >>> before == read()
    False
    """
    kinds: list[tuple[type, Callable[[Any], Standing]]] = [
        (random.Random, _python_state),
        (np.random.RandomState, _numpy_state),
        (np.random.Generator, _bit_generator_state),
        (torch.Generator, _torch_state),
    ]
    found: dict[str, Callable[[], Standing]] = {}
    for each in attributes(dataset):
        read = next((read for cls, read in kinds if type(each.value) is cls), None)
        if read is not None and len(found) < GENERATORS_MAX:
            found[each.path] = _reading(read, each.value)
    return found


def _reading(read: Callable[[Any], Standing], generator: Any) -> Callable[[], Standing]:
    return lambda: read(generator)
