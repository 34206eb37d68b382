"""One rank's share of the indices, as a value. Runs in: main."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shard:
    """One rank's share of the indices, as its sampler has it.

    Attributes:
        rank: the number of the share, from 0.
        replicas: how many shares there are.
        length: how many indices are shared out; None where that is not known.
        total: how many all ranks draw together; None where that is not known.
        epoch: the number that the order is drawn from, with ``shuffle=True`` and a ``set_epoch``;
            None where there is no such number, or the order is always the same.
        kind: the name of the sampler's class.
        drops_by: the argument that has the last indices left out.
        seed: that the order is drawn from; None where there is none, or the order is always the
            same.
        pads_last: how many of the last indices that this rank draws are padding; None where that is
            not known.

    Example:
        >>> from torch.utils.data import DistributedSampler
        >>> from safeloader.introspect.sharding import shard_of
        >>> shard = shard_of(DistributedSampler(range(10), num_replicas=4, rank=1))
        >>> shard.total, shard.padding, shard.left_out, shard.epoch
        (12, 2, 0, 0)
    """

    rank: int
    replicas: int
    length: int | None = None
    total: int | None = None
    epoch: int | None = None
    kind: str = ""
    drops_by: str = "drop_last"
    seed: int | None = dataclasses.field(default=None, compare=False)
    pads_last: int | None = dataclasses.field(default=None, compare=False)

    @property
    def padding(self) -> int:
        """How many indices are drawn a second time, so that each rank has as many as the others."""
        known = self.length is not None and self.total is not None
        return max(self.total - self.length, 0) if known else 0  # type: ignore[operator]  # known

    @property
    def left_out(self) -> int:
        """How many indices no rank draws, so that each has as many as the others."""
        known = self.length is not None and self.total is not None
        return max(self.length - self.total, 0) if known else 0  # type: ignore[operator]  # known
