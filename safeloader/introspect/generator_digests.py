"""Digests of where random generators stand. Runs in: both.

Two processes that draw the same numbers are told by the states that their generators were in before
and after. Nothing is drawn here: a state is read, which takes some 10 µs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any
from zlib import crc32

import numpy as np
import torch

from safeloader.introspect.copy_state import attributes

GENERATORS_MAX = 8  # of a dataset's own


def _python_state(generator: Any) -> int:
    _, numbers, gauss = generator.getstate()
    return hash((numbers, gauss or 0.0))  # not of None: up to Python 3.11 that is its address


def _numpy_state(generator: Any) -> int:
    state = generator.get_state(legacy=False)
    inner = state["state"]
    key = inner.get("key")
    rest = (inner.get("pos"), state.get("has_gauss"), state.get("gauss"))
    return crc32(repr(rest).encode(), crc32(b"" if key is None else key.tobytes()))


def _torch_state(generator: Any) -> int:
    return crc32(generator.get_state().numpy().tobytes())


def _bit_generator_state(generator: Any) -> int:
    return crc32(repr(generator.bit_generator.state).encode())


def global_generators() -> dict[str, Callable[[], int]]:
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


def own_generators(dataset: Any) -> dict[str, Callable[[], int]]:
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
    kinds: list[tuple[type, Callable[[Any], int]]] = [
        (random.Random, _python_state),
        (np.random.RandomState, _numpy_state),
        (np.random.Generator, _bit_generator_state),
        (torch.Generator, _torch_state),
    ]
    found: dict[str, Callable[[], int]] = {}
    for each in attributes(dataset):
        read = next((read for cls, read in kinds if type(each.value) is cls), None)
        if read is not None and len(found) < GENERATORS_MAX:
            found[each.path] = _reading(read, each.value)
    return found


def _reading(read: Callable[[Any], int], generator: Any) -> Callable[[], int]:
    return lambda: read(generator)
