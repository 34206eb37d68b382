"""What a sampler says of its share among the ranks, read without asking it. Runs in: main.

Of a ``DistributedSampler``, and of what looks like one: wrappers of Lightning's and Accelerate's,
samplers of timm's and others'. Attributes are read where the interpreter keeps them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from safeloader.introspect.shard import Shard
from safeloader.introspect.values import definitions, fields, inherits, plain_length

_DEPTH = 5
_WHOLE = frozenset({SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler})
WITHIN = ("batch_sampler", "sampler", "_batch_sampler", "_sampler")
_NAMES = (  # of the number of shares, and of this one
    ("num_replicas", "rank"),
    ("num_processes", "process_index"),
    ("world_size", "rank"),
    ("_world_size", "_rank"),
)


class SaysItsShare:
    """A sampler of ours, which is asked for its share: looking at it runs no code of the user's."""

    def shard(self) -> Shard | None:
        """Which share of the indices it draws; None where that is not known."""
        raise NotImplementedError


def shard_of(sampler: Any, dataset: Any = None, length: int | None = None) -> Shard | None:
    """The share that a sampler or batch sampler draws; None where it says nothing of shares.

    Args:
        sampler: what the loader draws from.
        dataset: what the loader reads.
        length: its length, where that is known.
    """
    if shares_out_nothing(sampler):
        return None
    in_order = True  # what is drawn is drawn in the order of the share
    for inner, held in _levels(sampler):
        if inherits(type(inner), SaysItsShare):
            shard: Shard | None = inner.shard()
            return shard
        for of, which in _NAMES:
            replicas, rank = held.get(of), held.get(which)
            if type(replicas) is int and type(rank) is int and 0 <= rank < replicas:
                shard = _shard(inner, held, rank, replicas, dataset, length)
                return shard if in_order else dataclasses.replace(shard, pads_last=None)
        in_order &= type(inner) is BatchSampler
    return None


def shared_out_twice(sampler: Any) -> str:
    """A sentence, where Accelerate shares out what is one rank's share already.

    Only of samplers that are known to share out: others may have such attributes and do without.
    """
    if shares_out_nothing(sampler):
        return ""
    dealing = ""
    for inner, held in _levels(sampler):
        replicas = held.get("num_processes")
        if _is_accelerates(held) and type(replicas) is int and replicas > 1:
            dealing = f"{type(inner).__name__} deals out to {replicas} ranks"
        elif dealing and inherits(type(inner), DistributedSampler, SaysItsShare):
            shard = shard_of(inner)
            if shard is None or shard.replicas == 1:
                return ""
            return (
                f"the indices are shared out twice: {dealing} what is the share of one rank of "
                f"{shard.replicas} already, by {shard.kind}, so that about one index in "
                f"{shard.replicas} is drawn at all. Give the loader to accelerator.prepare with "
                "a sampler of all indices, or leave it out of prepare"
            )
    return ""


def shares_out_nothing(sampler: Any) -> bool:
    """Whether it is torch's own and draws all by itself, as most samplers are: told at once."""
    return type(sampler.sampler if type(sampler) is BatchSampler else sampler) in _WHOLE


def _levels(sampler: Any) -> Iterator[tuple[Any, dict[Any, Any]]]:
    """A sampler and what it holds, and the same of the one that it draws from, and so on."""
    for _ in range(_DEPTH):
        held: dict[Any, Any] = dict(fields(sampler))
        yield sampler, held
        within = (held.get(name) for name in WITHIN)
        sampler = next((each for each in within if each is not None), None)
        if sampler is None:
            return


def _is_accelerates(held: dict[Any, Any]) -> bool:
    return "split_batches" in held and "even_batches" in held


def _shard(
    sampler: Any, held: dict[Any, Any], rank: int, replicas: int, dataset: Any, length: int | None
) -> Shard:
    known = _Known(dataset, length)
    length, total = (
        known.length_of(held.get("dataset", held.get("data_source"))),
        held.get("total_size"),
    )
    epoch = held.get("epoch")
    orders = held.get("shuffle") is True and definitions(type(sampler), "set_epoch")
    if _is_accelerates(held):
        length, total = _of_batches(held, replicas, known)
    seed = held.get("seed")
    return Shard(
        rank,
        replicas,
        length=length,
        total=total if type(total) is int else None,
        epoch=epoch if type(epoch) is int and orders else None,
        kind=type(sampler).__name__,
        seed=seed if type(seed) is int and orders else None,
        pads_last=_pads_last(type(sampler), rank, replicas, length, total),
    )


def _pads_last(cls: type, rank: int, replicas: int, length: int | None, total: Any) -> int | None:
    """How many of the last draws of a rank are padding, where torch's own code deals them out."""
    if length is None or type(total) is not int or total <= length:
        return None if length is None else 0
    if definitions(cls, "__iter__")[:1] != definitions(DistributedSampler, "__iter__")[:1]:
        return None
    return int(rank + total - replicas >= length)  # the place of its last draw among all


def purpose_of(sampler: Any) -> str:
    """What a sampler draws on purpose, other than each index once.

    Returns:
        ``"replacement"``, where indices may come again; ``"subset"``, where others may never come;
        the name of the class of a sampler that is not known; empty where each comes once.

    Example:
        >>> purpose_of(RandomSampler(range(9), replacement=True)), purpose_of(DistributedSampler)
        ('replacement', 'type')
        >>> purpose_of(BatchSampler(SequentialSampler(range(9)), 2, False))
        ''
    """
    for inner, held in _levels(sampler):
        cls = type(inner)
        if cls is RandomSampler:
            more = held.get("_num_samples")
            whole = plain_length(held.get("data_source"))
            again = held.get("replacement") is True or (more is not None and more != whole)
            return "replacement" if again else ""
        if cls is WeightedRandomSampler:
            return "replacement" if held.get("replacement") is True else "subset"
        if cls is SubsetRandomSampler:
            return "subset"
        if cls is SequentialSampler or inherits(cls, DistributedSampler, SaysItsShare):
            return ""
        if not any(held.get(name) is not None for name in WITHIN):
            return cls.__name__
    return type(sampler).__name__


def _of_batches(
    held: dict[Any, Any], replicas: int, known: _Known
) -> tuple[int | None, int | None]:
    """How many indices are shared out batch by batch, and how many all ranks draw."""
    inner: Any = held.get("batch_sampler")
    size = held.get("batch_size")
    if type(inner) is not BatchSampler or type(size) is not int or size < 1:
        return None, None
    length = known.length_of(inner.sampler)
    if length is None or held.get("drop_last") is True or held["even_batches"] is not True:
        return length, length
    round_of = size if held["split_batches"] is True else size * replicas
    return length, -(-length // round_of) * round_of


class _Known(NamedTuple):
    """The loader's dataset, and its length as far as that is known."""

    dataset: Any
    length: int | None

    def length_of(self, shared_out: Any) -> int | None:
        """The length of what is shared out, if no code of the user's has to tell it."""
        for _ in range(_DEPTH):
            if shared_out is self.dataset and self.length is not None:
                return self.length
            if (length := plain_length(shared_out)) is not None:
                return length
            held: dict[Any, Any] = dict(fields(shared_out))
            number = held.get("_num_samples")
            if type(number) is int:
                return number
            cls = type(shared_out)
            if cls is SubsetRandomSampler:
                shared_out = held.get("indices")
            elif definitions(cls, "__len__")[:1] in _AS_LONG_AS_THEIR_SOURCE:
                shared_out = held.get("data_source")
            else:  # Lightning's dataset of a sampler has that; others have None
                shared_out = held.get("_sampler")
        return None


_AS_LONG_AS_THEIR_SOURCE = [
    definitions(cls, "__len__")[:1] for cls in (RandomSampler, SequentialSampler)
]
