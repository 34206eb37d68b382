"""The kinds of random generators: how each is read, put back, digested and seeded. Runs in: both.

One table, for all who look at generators. Nothing is drawn: a state is read, in some 10 µs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch

from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.values import (
    definitions,
    fields,
    inherits,
    module_of,
    mro_of,
    once_for_class,
)

PROCESS_WIDE = ("random", "numpy.random", "torch")  # those that torch seeds in each worker


class Standing(NamedTuple):
    """Where a generator stands, as digests.

    Attributes:
        seed: of what seeding sets and a few draws leave as it is. Equal in two processes that began
            at one place, it says that neither was seeded on the way, or both by one number.
        at: of all of its state.
    """

    seed: int
    at: int


class Kind(NamedTuple):
    """A kind of generator.

    Attributes:
        cls: what generators of this kind are, or derive from.
        state: gives the state of one, as its own class has it: code of the user's may run.
        put_back: gives a generator such a state.
        standing: gives the digests of where one stands; runs no code of the user's.
        seeded: a line that seeds the one at ``{path}`` by ``{seed}``; ``{cls}`` is its class.
    """

    cls: type
    state: Callable[[Any], Any]
    put_back: Callable[[Any, Any], None]
    standing: Callable[[Any], Standing]
    seeded: str


# ── digests, by what the kind's own class has: a class of the user's may define another


def _of_python(generator: Any) -> Standing:
    numbers = super(random.Random, generator).getstate()
    gauss = dict(fields(generator, 8)).get("gauss_next")
    # Not of None: up to Python 3.11 its hash is its address.
    return Standing(hash(numbers[:-1]), hash((numbers, gauss or 0.0)))


def _of_random_state(generator: Any) -> Standing:
    return _of_bits(np.random.RandomState.get_state(generator, legacy=False))


def _of_generator(generator: Any) -> Standing:
    bits: Any = np.random.Generator.bit_generator
    return _of_bit_generator(bits.__get__(generator))


def _of_bit_generator(generator: Any) -> Standing:
    own = next(each for each in mro_of(type(generator)) if module_of(each).startswith("numpy."))
    return _of_bits(definitions(own, "state")[0].__get__(generator))


def _of_bits(state: Any) -> Standing:
    inner = state["state"]
    seed = inner.get("key", inner.get("inc"))  # SFC64 has nothing that stays
    return Standing(_crc(inner if seed is None else seed), _crc(state))


def _crc(value: Any, last: int = 0) -> int:
    if type(value) is dict:
        for each in value.values():  # in the order in which NumPy makes it
            last = _crc(each, last)
        return last
    return crc32(value.tobytes() if type(value) is np.ndarray else repr(value).encode(), last)


def _of_torch(generator: Any) -> Standing:
    state = torch.Generator.get_state(generator).numpy().tobytes()
    return Standing(crc32(state[:8]), crc32(state))  # it begins with the seed


def _put_bits(generator: Any, state: Any) -> None:
    getattr(generator, "bit_generator", generator).state = state


_SEED = "{path}.seed({seed} % 2**32)"


@cache
def kinds() -> tuple[Kind, ...]:
    """The table; made at first use, as NumPy imports its generators at first use."""
    return (
        Kind(
            random.Random,
            lambda generator: generator.getstate(),
            lambda generator, state: generator.setstate(state),
            _of_python,
            _SEED,
        ),
        Kind(
            np.random.RandomState,
            lambda generator: generator.get_state(legacy=False),
            lambda generator, state: generator.set_state(state),
            _of_random_state,
            _SEED,
        ),
        Kind(
            np.random.Generator,
            lambda generator: generator.bit_generator.state,
            _put_bits,
            _of_generator,
            "{path} = np.random.default_rng({seed})",
        ),
        Kind(
            np.random.BitGenerator,
            lambda generator: generator.state,
            _put_bits,
            _of_bit_generator,
            "{path} = np.random.{cls}({seed})",
        ),
        Kind(
            torch.Generator,
            lambda generator: generator.get_state(),
            lambda generator, state: generator.set_state(state),
            _of_torch,
            "{path}.manual_seed({seed} % 2**32)",
        ),
    )


def process_generators() -> dict[str, Any]:
    """The process-wide generators by the names of people, as in ``PROCESS_WIDE``.

    >>> list(process_generators())
    ['random', 'numpy.random', 'torch']
    """
    python = getattr(random.random, "__self__", None)
    of_numpy = getattr(np.random.rand, "__self__", None)
    found = zip(PROCESS_WIDE, (python, of_numpy, torch.default_generator), strict=True)
    return {name: each for name, each in found if is_generator(each)}


def is_generator(value: object) -> bool:
    """Whether a value is a random generator, or another whose state nobody can read.

    >>> is_generator(np.random.default_rng(0)), is_generator(np.random)
    (True, False)
    """
    return kind_of(value) is not None or inherits(type(value), random.SystemRandom)


def standing(generator: Any) -> Standing:
    """Where a generator stands, as digests; of one that :func:`kind_of` knows.

    >>> noisy = random.Random(0)
    >>> _ = noisy.random()  # the first one after seeding changes all of its state
    >>> before, _ = standing(noisy), noisy.random()
    >>> before == standing(noisy), before.seed == standing(noisy).seed
    (False, True)
    """
    kind = kind_of(generator)
    assert kind is not None
    return kind.standing(generator)


def state_of(generator: Any) -> Any:
    """The state of a generator, for :func:`put_back`; None where it cannot be had."""
    kind = kind_of(generator)
    try:
        return kind and kind.state(generator)
    except Exception as exc:
        if raised_by_signal(exc):  # a time limit of the program's
            raise
        return None


def put_back(generator: Any, state: Any) -> None:
    """Put a generator back to where it stood."""
    kind = kind_of(generator)
    if kind is not None and state is not None:
        kind.put_back(generator, state)


def kind_of(value: object) -> Kind | None:
    """The kind of a random generator; None of what is none, or has no state.

    >>> kind_of(random.Random(0)).cls, kind_of(random.SystemRandom()), kind_of("text")
    (<class 'random.Random'>, None, None)
    """
    return _kind_of(type(value))


@once_for_class
def _kind_of(cls: type) -> Kind | None:
    if inherits(cls, random.SystemRandom):
        return None
    return next((kind for kind in kinds() if inherits(cls, kind.cls)), None)


def how_to_seed(cls: type, path: str, seed: str) -> str:
    """The line that seeds the generator of a class at ``path`` by ``seed``; "" of no such class.

    >>> how_to_seed(random.Random, "dataset.rng", "info.seed")
    'dataset.rng.seed(info.seed % 2**32)'
    """
    kind = next((kind for kind in kinds() if inherits(cls, kind.cls)), None)
    return kind.seeded.format(path=path, seed=seed, cls=cls.__name__) if kind else ""
