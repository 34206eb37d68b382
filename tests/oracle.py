"""The oracle for drop-in behaviour: the stock loader with the same seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tolist(), rest), torch.get_rng_state().tolist()


def numbers() -> list[float]:
    """What each of the three default generators gives next, of a uniform kind and a normal."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
        *torch.randn(2).tolist(),
    ]


def plain(value: Any) -> Any:
    """A batch as plain values with every type, dtype, stride and bit in it."""
    if isinstance(value, torch.Tensor):
        kind = type(value).__name__, str(value.dtype), tuple(value.shape), value.stride()
        return *kind, value.requires_grad, value.detach().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return "ndarray", str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return type(value).__name__, [(key, plain(item)) for key, item in value.items()]
    if isinstance(value, tuple | list):
        return type(value).__name__, [plain(item) for item in value]
    return type(value).__name__, repr(value)


def observe(loader_class: type, make: Callable[[type], Any], epochs: int = 2) -> Any:
    """Everything a user can see of ``epochs`` epochs: batches and generators, in their order."""
    seed_all(7)
    loader = make(loader_class)
    seen: list[Any] = []
    for _ in range(epochs):
        epoch = []
        for batch in loader:
            epoch.append(plain(batch))
            random.random()  # a training loop draws numbers too
            torch.rand(1)
        seen.append((epoch, rng_state()))
    return seen
