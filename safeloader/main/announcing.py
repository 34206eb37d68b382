"""How many batches a loader says it has, asked where asking changes nothing. Runs in: main.

``len(loader)`` is the ``__len__`` of its sampler, which may be the user's code: torch asks for it
only where somebody wants to know. It is asked here once as an epoch begins, with the global
generators put back, and not of a sampler that holds a generator or an iterator of its own, which
asking might move: the batches would be others than under the stock loader. One that takes its time
is not asked again. In distributed training nobody is asked twice: should an answer take a word from
each rank, all have to ask as often.
"""

from __future__ import annotations

import random
import types
from time import perf_counter_ns as clock
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader

from safeloader import _torch
from safeloader.failures.loader_log import length_of
from safeloader.introspect.ranks import Place
from safeloader.introspect.values import definitions, fields, inherits, own_length
from safeloader.main.drawing import is_torchs_own
from safeloader.main.epoch import NOT_ANNOUNCED, Announced
from safeloader.provenance.recorder import Recorder

_TOO_LONG_NS = 5_000_000
_DEPTH = 4
_FIELDS_MAX = 64  # of what has more nobody knows
_MOVE = (  # when somebody asks
    random.Random,
    np.random.Generator,
    np.random.RandomState,
    torch.Generator,
    types.GeneratorType,
    map,
    filter,
    zip,
)
_TORCHS_LEN = definitions(DataLoader, "__len__")[0]


def announced(
    loader: DataLoader[Any], stream: bool, length: int | None, recorder: Recorder, at: Place
) -> Announced:
    """What ``len(loader)`` says.

    Args:
        loader: any loader.
        stream: whether its dataset is iterable-style.
        length: of the dataset, where that is known.
        recorder: which remembers that the sampler is not to be asked again.
        at: where this process stands among the ranks.
    """
    if definitions(type(loader), "__len__")[0] is not _TORCHS_LEN:
        return NOT_ANNOUNCED
    if stream:
        return Announced(_of_stream(loader, length))
    sampler = _torch.index_sampler(loader)
    if is_torchs_own(sampler.sampler if type(sampler) is BatchSampler else sampler):
        return Announced(proven=True)
    if (known := own_length(sampler)) is not None:
        return Announced(known)
    if not recorder.asks_lengths or _moves(sampler):
        return NOT_ANNOUNCED
    began = clock()
    said = length_of(sampler)
    recorder.asks_lengths = clock() - began < _TOO_LONG_NS and not str(at)
    return Announced(said)


def _of_stream(loader: DataLoader[Any], length: int | None) -> int | None:
    size = loader.batch_size
    if length is None or size is None:
        return length
    return length // size if loader.drop_last else -(-length // size)


def _moves(sampler: Any, depth: int = _DEPTH) -> bool:
    """Whether a sampler has no length to ask for, or holds what asking might move."""
    held = [value for _, value in fields(sampler)]
    if len(held) > _FIELDS_MAX or any(inherits(type(value), *_MOVE) for value in held):
        return True
    samplers = [value for value in held if definitions(type(value), "__iter__") and depth]
    return any(_moves(value, depth - 1) for value in samplers if own_length(value) is None)
