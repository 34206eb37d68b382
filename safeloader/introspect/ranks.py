"""Which process of a distributed training this is. Runs in: main.

Everybody who names a rank asks here: the audit, failures, log lines, traces, the table and folders.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed

from safeloader._python import environment
from safeloader.introspect.shard import Shard

_HAS_GROUPS = torch.distributed.is_available()  # this torch was built with them


class Place(NamedTuple):
    """The rank of a process and the number of processes; None where that is not known."""

    rank: int | None = None
    world_size: int | None = None

    def __str__(self) -> str:
        """As texts have it: empty where there is one process alone."""
        of = "" if self.world_size is None else f" of {self.world_size}"
        return "" if self.rank is None or self.world_size == 1 else f"rank {self.rank}{of}"


def place(shard: Shard | None = None) -> Place:
    """Where this process stands: by its group, else by what its launcher set, else by ``shard``.

    Example:
        >>> str(place(Shard(rank=1, replicas=4)))
        'rank 1 of 4'
        >>> place()
        Place(rank=None, world_size=None)
    """
    if _HAS_GROUPS and torch.distributed.is_initialized():
        return Place(torch.distributed.get_rank(), torch.distributed.get_world_size())
    rank = _told("RANK")
    if rank is not None:
        return Place(rank, _told("WORLD_SIZE"))
    return Place() if shard is None else Place(shard.rank, shard.replicas)


def _told(name: str) -> int | None:
    told = environment(name)
    return int(told) if told.isdecimal() else None


def rank() -> int | None:
    """The rank of this process by its group, else by what its launcher set; None outside."""
    return place().rank
