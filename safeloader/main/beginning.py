"""Where random generators stood as an epoch's draws began. Runs in: main.

A sampler draws at two moments: as it is asked for its iterator, and as that is asked for the first
index. In between torch draws the base seed of the workers, from the same generator as a rule. So
both moments are noted, and of the generators only those that moved in one: the process's own three,
and those that the sampler and the loader hold.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils import data
from torch.utils.data import BatchSampler, Sampler

from safeloader.introspect.generator_kinds import (
    kind_of,
    process_generators,
    put_back,
    state_of,
)
from safeloader.introspect.sharding import WITHIN
from safeloader.introspect.values import fields, inherits

States = dict[str, Any]
TORCH = "torch"
GLOBAL = ("random", "numpy.random", TORCH)
_DEPTH = 4
# They raise at their first index or never, their lengths are true, and they draw from torch alone.
TORCHS_OWN = {data.DistributedSampler, data.RandomSampler, data.SequentialSampler}
TORCHS_OWN |= {data.SubsetRandomSampler, data.WeightedRandomSampler}


def beneath_batches(sampler: Any) -> Any:
    """The sampler that torch's own batch sampler draws from; of any other itself."""
    return sampler.sampler if type(sampler) is BatchSampler else sampler


class BatchesOf(BatchSampler):
    """Torch's batch sampler, drawing from ``sampler`` in the place of its own.

    All else is read from ``batches`` where it stands: a loop may change their size as it runs.
    """

    def __init__(self, sampler: Iterable[Any], batches: Any) -> None:
        self.sampler, self._batches = sampler, batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


class Generators:
    """The generators that a sampler may draw from, by name.

    Args:
        sampler: what the indices come from.
        generator: the loader's own, if it has one.

    Attributes:
        are_torchs: whether the sampler is torch's own, and draws from torch's generators alone.
        held: the names of those that the sampler and the loader hold.
    """

    def __init__(self, sampler: Any, generator: torch.Generator | None) -> None:
        self.are_torchs = type(beneath_batches(sampler)) in TORCHS_OWN
        held = dict(_held_by(sampler, "sampler", 0))
        if generator is not None and all(each is not generator for each in held.values()):
            held["generator"] = generator
        self.held = [*held]
        self._all = process_generators() | held

    def states(self) -> States:
        """Where each stands, the process's own three among them."""
        return self._states_of([*self._all])

    def likely_states(self) -> States:
        """The same without those that torch's own samplers do not draw from; then 2 us each."""
        return self._states_of([TORCH, *self.held]) if self.are_torchs else self.states()

    def _states_of(self, names: list[str]) -> States:
        return {name: state_of(self._all[name]) for name in names if name in self._all}

    def put(self, states: States) -> None:
        """Put those that ``states`` names there."""
        for name, state in states.items():
            if name in self._all:
                put_back(self._all[name], state)


def _held_by(sampler: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """The generators among the attributes of a sampler, and of the samplers in it."""
    for name, value in fields(sampler):
        cls = type(value)
        if kind_of(value) is not None:
            yield f"{path}.{name}", value
        elif depth < _DEPTH and (inherits(cls, Sampler) or name in WITHIN):
            yield from _held_by(value, f"{path}.{name}", depth + 1)


def moved(before: States, after: States) -> States:
    """Of the states before, those of generators that stand elsewhere after."""
    return {name: state for name, state in before.items() if not _same(state, after[name])}


class Watch:
    """Notes which generators a sampler moves as it begins.

    Attributes:
        seen: by moment, the states before it of those that moved.
        done: whether the first index was drawn.
        lent: states that the first draw is to begin from; the process's own are put back then.
    """

    def __init__(self, generators: Generators) -> None:
        self.generators = generators
        self.seen: dict[str, States] = {}
        self.done = False
        self.lent: States = {}

    def iterating(self, source: Iterable[Any]) -> Iterator[Any]:
        """``iter(source)``, watched, as is its first draw."""
        before = self.generators.states()
        inner = iter(source)
        self._note("iter", before)
        return FirstDraw(inner, self._first)

    def _first(self, inner: Iterator[Any]) -> Any:
        lent, self.lent = self.lent, {}
        here = self.generators.states() if lent else {}
        self.generators.put(lent)
        before = self.generators.states()
        try:
            return next(inner)
        finally:
            self._note("draw", before)
            self.done = True
            self.generators.put({name: here[name] for name in GLOBAL if name in here})

    def _note(self, moment: str, before: States) -> None:
        if found := moved(before, self.generators.states()):
            self.seen[moment] = found


class FirstDraw(Iterator[Any]):
    """An iterator whose first draw ``first`` makes; no generator: an interrupt would end it."""

    def __init__(self, inner: Iterator[Any], first: Callable[[Iterator[Any]], Any]) -> None:
        self._inner = inner
        self._first: Callable[[Iterator[Any]], Any] | None = first

    def __next__(self) -> Any:
        if self._first is None:
            return next(self._inner)
        first, self._first = self._first, None
        return first(self._inner)


def _same(one: Any, other: Any) -> bool:
    if type(one) is torch.Tensor:
        return torch.equal(one, other)
    if type(one) is dict:
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if type(one) is np.ndarray:
        return np.array_equal(one, other)
    return bool(one == other)


# ── as JSON has it ───────────────────────────────────────────────────────────────────────────────


def to_json(value: Any) -> Any:
    """A state as plain values: arrays in base64.

    >>> of_json(to_json({"key": np.arange(3, dtype=np.uint32), "pos": 2}))
    {'key': array([0, 1, 2], dtype=uint32), 'pos': 2}
    """
    if type(value) is torch.Tensor:
        return {"torch": _base64(value.numpy().tobytes())}
    if type(value) is np.ndarray:
        return {"numpy": value.dtype.str, "is": _base64(value.tobytes())}
    if type(value) is dict:
        return {"dict": {name: to_json(each) for name, each in value.items()}}
    if type(value) is tuple:
        if len(value) > 8 and all(type(each) is int and 0 <= each < 1 << 32 for each in value):
            return {"words": _base64(np.array(value, dtype="<u4").tobytes())}
        return {"tuple": [to_json(each) for each in value]}
    if isinstance(value, np.generic):
        return value.item()
    return value


def of_json(value: Any) -> Any:
    """The state again; what is given may have gone through JSON."""
    if type(value) is not dict:
        return value
    if "torch" in value:
        return torch.frombuffer(bytearray(base64.b64decode(value["torch"])), dtype=torch.uint8)
    if "numpy" in value:
        return np.frombuffer(base64.b64decode(value["is"]), dtype=value["numpy"]).copy()
    if "words" in value:
        return tuple(np.frombuffer(base64.b64decode(value["words"]), dtype="<u4").tolist())
    if "tuple" in value:
        return tuple(of_json(each) for each in value["tuple"])
    return {name: of_json(each) for name, each in value["dict"].items()}


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
