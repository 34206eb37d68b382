"""How samples become a batch: as torch does it, and faster for common kinds. Runs in: worker.

In a loader without workers the walk of ``default_collate`` through the types of the samples, and
``torch.tensor`` on a list of numbers, take longer than all records of the batch. Tensors, numbers,
and tuples and dicts of tensors, numbers and texts are collated here: the first sample decides, as
it does there; numbers go by way of their bytes. Whatever is not as plain as that, and whatever
raises, is left to torch.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate, get_worker_info

from safeloader import _torch
from safeloader.introspect.signals import raised_by_signal

_KINDS = frozenset({torch.Tensor, tuple, dict, int, float})
_NUMBERS = {int: ("q", torch.int64), float: ("d", torch.float64)}


def collation_by(stock: Any) -> Callable[[Any], Any]:
    """What makes a batch of its samples, as torch's fetcher ``stock`` would; hot path."""
    collate_fn = stock.collate_fn
    if not stock.auto_collation:
        return lambda samples: collate_fn(samples[0])

    def collated(samples: Any) -> Any:
        # A copy of the list: the function may take it apart.
        return collate_fn(list(samples) if type(samples) is list else samples)

    def by_default(samples: Any) -> Any:
        if type(samples) is list and samples and type(samples[0]) not in _KINDS:
            return collate_fn(samples[:])
        batch = collated_here(samples)
        return collated(samples) if batch is None else batch

    here = collate_fn is default_collate and get_worker_info() is None
    return by_default if here else collated


def collated_here(samples: Any) -> Any:
    """What ``default_collate`` makes of plain samples; None of anything else. Hot path.

    None also where it would raise, so that its own error is the one that is told.

    >>> collated_here([(torch.ones(2), 1, "a"), (torch.zeros(2), 2, "b")])
    [tensor([[1., 1.],
            [0., 0.]]), tensor([1, 2]), ('a', 'b')]
    """
    if type(samples) is not list or not samples or type(samples[0]) not in _KINDS:
        return None
    if not _torch.collates_as_torch_does():
        return None
    try:
        return _column(samples)
    except Exception as exc:
        if raised_by_signal(exc):
            raise
        return None


class _NotPlain(Exception):
    """Torch is to collate it."""


def _column(values: Sequence[Any]) -> Any:
    first = values[0]
    kind = type(first)
    if kind is torch.Tensor:
        if first.layout is not torch.strided or first.is_nested:
            raise _NotPlain
        return torch.stack(values, 0)  # type: ignore[arg-type]  # a tuple, as a rule
    if kind is str or kind is bytes:
        return values
    if [*map(type, values)].count(kind) != len(values):
        raise _NotPlain
    if kind is tuple:
        return [_column(column) for column in zip(*values, strict=True)]
    if kind is dict:
        return {key: _column([each[key] for each in values]) for key in first}
    if kind not in _NUMBERS or _torch.calls_are_watched():
        raise _NotPlain
    letter, dtype = _NUMBERS[kind]
    raw = bytearray(_packer(len(values), letter)(*values))
    return torch.frombuffer(raw, dtype=dtype).clone()  # its storage can be resized


@functools.lru_cache(maxsize=64)
def _packer(number: int, letter: str) -> Callable[..., bytes]:
    """Makes bytes of so many numbers."""
    return struct.Struct(f"{number}{letter}").pack
