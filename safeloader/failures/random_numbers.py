"""What a failed sample's random numbers were made from, as JSON and back. Runs in: main.

::

    with seed=         seed, epoch, batch, rank      some 80 bytes
    without            where the generators stood    10 kB, as the batch was begun

Nothing here is pickled: a file of this kind may come from somebody else.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import numpy as np
import torch

from safeloader.failures.failure import Failure
from safeloader.introspect.generators import own_generators
from safeloader.introspect.random_state import RandomState, preserved
from safeloader.introspect.seeds import BatchSeed, SeededAs
from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.texts import index_text

_BYTES_MAX = 1 << 16  # of JSON; the generators of Python, NumPy and torch take 10 kB
_ARRAY_MAX = 1 << 16  # of one array, unpacked
_PERS = ("sample", "batch")


def to_json(failure: Failure) -> dict[str, Any] | None:
    """What stands in a dump; None where nothing is known, or it takes too much."""
    if failure._seeded is not None:
        batch, per = failure._seeded
        return {**batch._asdict(), "per": per}
    if failure._random is None:
        return None
    try:
        told = {"generators": _state_to_json(failure._random)}
        return told if len(json.dumps(told)) <= _BYTES_MAX else None
    except Exception as exc:  # a generator of another kind, with a state of its own
        if raised_by_signal(exc):
            raise
        return None


def from_json(told: Any) -> dict[str, Any]:
    """The fields of a :class:`Failure` that hold them; none where nothing can be made of it here.

    >>> from_json({"seed": 11, "epoch": 2, "batch": 0, "rank": 0, "per": "sample"})
    {'_seeded': SeededAs(batch=BatchSeed(seed=11, epoch=2, batch=0, rank=0), per='sample')}
    >>> from_json(None)
    {}
    """
    if not isinstance(told, dict):
        return {}
    if "generators" in told:
        try:
            state = _state_from_json(told["generators"])
            with preserved():
                state.set()  # else it would be the replay that fails
        except Exception as exc:  # of a release whose generators are others
            if raised_by_signal(exc):
                raise
            return {}
        return {"_random": state}
    numbers = [told.get(name) for name in BatchSeed._fields]
    if told.get("per") not in _PERS or not all(type(each) is int for each in numbers):
        return {}
    return {"_seeded": SeededAs(BatchSeed(*numbers), told["per"])}  # type: ignore[arg-type]


def of_sample(failure: Failure) -> str:
    """What the numbers of the failing sample are made from, in words; empty if nobody knows."""
    seeded = failure._seeded
    if seeded is not None:
        seed = seeded.batch
        if seeded.per == "sample":
            return f"seed={seed.seed}, epoch {seed.epoch}, index {index_text(failure.index)}"
        rank = f", rank {seed.rank}" if seed.rank else ""
        return f"seed={seed.seed}, epoch {seed.epoch}, batch {seed.batch}{rank}"
    if failure._random is not None:
        return "where the generators stood as its batch was begun"
    return ""


def of_its_own(dataset: Any) -> list[str]:
    """The generators that a dataset has for itself, by path: where these stood nobody knows.

    >>> import random
    >>> class Noisy:
    ...     def __init__(self):
    ...         self.rng = random.Random(0)
    >>> of_its_own(Noisy())
    ['dataset.rng']
    """
    try:
        return [*own_generators(dataset)]
    except Exception as exc:  # of ours: the sample comes all the same
        if raised_by_signal(exc):
            raise
        return []


def why_not_known(failure: Failure) -> str:
    """Why the numbers of the failing sample are not known, and what would have them known."""
    if failure.phase in ("crash", "timeout"):
        lost = "a worker that died or hangs does not tell them"
    else:
        lost = "nothing in this failure tells them"
    return f"{lost}; with seed= they are made again, from seed, epoch and index"


# ── the generators ───────────────────────────────────────────────────────────────────────────────


def _state_to_json(state: RandomState) -> dict[str, Any]:
    version, words, gauss = state.python
    return {
        "python": [version, _packed(np.array(words, np.uint32)), gauss],
        "numpy": _plain(state.numpy),
        "torch": _packed(state.torch.numpy()),
    }


def _state_from_json(told: Any) -> RandomState:
    version, words, gauss = told["python"]
    return RandomState(
        (version, tuple(_array(words).tolist()), gauss),
        _rebuilt(told["numpy"]),
        torch.from_numpy(_array(told["torch"]).copy()),
    )


def _plain(value: Any) -> Any:
    """A state of NumPy's, whichever generator it is of: a dict of numbers, texts and arrays."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, np.ndarray):
        return _packed(value)
    if isinstance(value, np.integer):
        return int(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a state with a {type(value).__qualname__}")


def _rebuilt(told: Any) -> Any:
    if isinstance(told, dict):
        return {name: _rebuilt(each) for name, each in told.items()}
    return _array(told) if isinstance(told, list) else told


def _packed(array: Any) -> list[str]:
    """An array as its kind and its bytes."""
    whole = np.ascontiguousarray(array).tobytes()
    return [array.dtype.str, base64.b85encode(zlib.compress(whole)).decode()]


def _array(told: Any) -> Any:
    kind, packed = told
    opened = zlib.decompressobj()
    whole = opened.decompress(base64.b85decode(packed), _ARRAY_MAX)
    if not opened.eof:
        raise ValueError("an array that is too large, or torn")
    return np.frombuffer(whole, np.dtype(kind))
