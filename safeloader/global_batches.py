"""The ranks' shares of one global order of batches. Runs in: main.

The order of an epoch is a permutation in memory, ``torch.randperm`` of a generator of its own: 4
bytes an index (8 from 2^31 indices on). In each rank, 10^7 indices take 0.22 s of CPU and 40 MB,
10^8 take 3.5 s and 400 MB (torch 2.13.0, one thread). To begin in the middle costs that, once.

A permutation that is computed index by index would need neither the memory nor the time: a Feistel
network over the next power of two, walked until it falls below the length (Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Measured in NumPy by blocks of 2^15, an epoch
of 10^7 costs 0.32 s with 6 rounds, 0.55 s with 12, and 0.96 s with 24, the number in the code of
those who tested such shuffles (Mitchell et al., "Bandwidth-Optimal Random Shuffling for GPUs", ACM
TOPC 2022). What has been tested costs four times as much, few rounds are our own to prove, and a
length of a few hundred leaves a network too few bits to be near uniform. So there is none.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Sampler

from safeloader.introspect.ranks import place
from safeloader.introspect.shard import Shard
from safeloader.introspect.sharding import SaysItsShare
from safeloader.introspect.texts import bounded_text

Tail = Literal["drop", "pad", "uneven"]
_SEEDS = 2**64
_DIGESTED = 1 << 16  # places of the order
_SEED = "an int from 0 to 2**64 - 1"
_INT32 = 2**31


class GlobalBatchSampler(Sampler[list[int]], SaysItsShare):
    """This rank's share of each global batch, of one order that is the same on any number of ranks.

    For ``batch_sampler=`` of a loader, ours or torch's. Global batch k holds the same indices in
    the same order on every number of ranks that divides ``global_batch``: rank r of W has the r-th
    of W equal parts of it, so that the shares one behind the other are the batch of one rank. A
    training that was interrupted on four ranks goes on on two with the batches that it would have
    had.

    The order is a function of ``seed`` and the epoch alone. No generator of the program's is drawn
    from or moved, and it makes no difference where an earlier epoch was left. Tell the epoch before
    each one: ``sampler.set_epoch(epoch)``, as of a ``DistributedSampler``.

    The shares are dealt out here. A framework that shards a loader must leave this one alone:
    ``use_distributed_sampler=False`` in Lightning, and not ``prepare`` in Accelerate.

    Args:
        length: how many indices there are: ``len(dataset)``.
        global_batch: samples that all ranks together have in a batch. Each rank's batches hold
            ``global_batch / world`` of them.
        rank: of this process, from 0. None asks ``torch.distributed`` where it is initialised, then
            the environment (``RANK``), then it is 0.
        world: the number of ranks. None asks in the same way (``WORLD_SIZE``), then it is 1.
        seed: an int from 0 on, the same in all ranks.
        tail: what becomes of the last indices of the order, where they fill no global batch.
            ``"drop"`` leaves them out; the audit lists each under ``dropped``, once over all ranks.
            ``"pad"`` fills the batch from the beginning of the order, again and again where
            ``length`` is below ``global_batch``. ``"uneven"`` deals them out as evenly as can be,
            one more to the first ranks; a rank for which none is left has one batch less, so a
            step in which ranks wait for each other waits for ever: it is meant for evaluation.
        shuffle: False gives the order 0, 1, 2 ... in every epoch.

    What None stands for is asked at each ``len()`` and as each epoch begins, and not kept: so a
    sampler may be made before ``init_process_group``, and pickled for another process.

    Each rank holds the order of the last epoch that was asked for: 4 bytes an index, 400 MB for
    10^8, which take 3.5 s to make. With ``shuffle=False`` nothing is held.

    Attributes:
        epoch: the number that the order is drawn from; 0 until ``set_epoch``.

    Raises:
        ValueError: for an argument out of its range; where ``global_batch`` cannot be divided by
            the number of ranks; where a rank is not one of them, or is not known.

    Example:
        >>> def epoch(rank, world):
        ...     return list(GlobalBatchSampler(10, 4, rank, world, seed=7, tail="uneven"))
        >>> epoch(0, 1)
        [[8, 7, 6, 1], [9, 2, 3, 5], [4, 0]]
        >>> epoch(0, 2), epoch(1, 2)
        ([[8, 7], [9, 2], [4]], [[6, 1], [3, 5], [0]])

        In a training, each rank with the same lines:

        >>> from safeloader import SafeDataLoader
        >>> sampler = GlobalBatchSampler(len(range(10)), global_batch=4, seed=7)
        >>> loader = SafeDataLoader(range(10), batch_sampler=sampler)
        >>> for epoch in range(2):
        ...     sampler.set_epoch(epoch)
        ...     print([batch.tolist() for batch in loader])
        [[8, 7, 6, 1], [9, 2, 3, 5]]
        [[4, 2, 9, 8], [0, 3, 7, 6]]
        >>> print(loader.audit)
        epoch 1: complete, ok; 10 drawn, 8 delivered
          dropped: 2, left out by tail='drop': 1, 5
    """

    def __init__(
        self,
        length: int,
        global_batch: int,
        rank: int | None = None,
        world: int | None = None,
        seed: int = 0,
        tail: Tail = "drop",
        *,
        shuffle: bool = True,
    ) -> None:
        _see_one_of("tail", tail, ("drop", "pad", "uneven"))
        _see_one_of("shuffle", shuffle, (True, False))
        self.length = _whole("length", length, "an int, 0 or more: len(dataset)")
        self.global_batch = _whole("global_batch", global_batch, "an int, 1 or more", least=1)
        self.rank = rank if rank is None else _whole("rank", rank, "an int, 0 or more, or None")
        wanted = "an int, 1 or more, or None"
        self.world = world if world is None else _whole("world", world, wanted, least=1)
        self.seed = _whole("seed", seed, _SEED, below=_SEEDS)
        self.tail: Tail = tail
        self.shuffle = shuffle
        self.epoch = 0
        self._order: tuple[tuple[int, int, int], Any] | None = None
        self._digest: tuple[dict[str, Any], str] | None = None
        self._see(*self._told())

    # the shares ─────────────────────────────────────────────────────────────────────────────────

    def set_epoch(self, epoch: int) -> None:
        """Set the number that the order of the next epoch is drawn from.

        An iterator made before goes on in its own order.
        """
        self.epoch = _whole("epoch", epoch, _SEED, below=_SEEDS)

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches()

    def __len__(self) -> int:
        """How many batches this rank has in an epoch."""
        return self._count(*self._stands())

    def batches(self, epoch: int | None = None, start: int = 0) -> Iterator[list[int]]:
        """This rank's batches of an epoch from global batch ``start`` on.

        What comes before is not drawn; the order is, once: 0.2 s for 10^7 indices.

        Args:
            epoch: its number; None is that of ``set_epoch``.
            start: the number of a global batch, from 0. Beyond the last one nothing comes.

        Example:
            >>> sampler = GlobalBatchSampler(10, 4, rank=1, world=2, seed=7)
            >>> list(sampler), list(sampler.batches(epoch=0, start=1))
            ([[6, 1], [3, 5]], [[3, 5]])
        """
        rank, world = self._stands()
        start = _whole("start", start, "the number of a global batch, 0 or more")
        # Not a generator: one that an interrupt goes through is at its end.
        share = functools.partial(self._share, self._order_of(epoch), rank, world)
        return map(share, range(start, self._count(rank, world)))

    @property
    def sampler(self) -> GlobalBatchSampler:
        """Itself, since Lightning and Accelerate set the epoch of ``batch_sampler.sampler``."""
        return self

    # all ranks ──────────────────────────────────────────────────────────────────────────────────

    @property
    def global_batches(self) -> int:
        """How many global batches an epoch has, over all ranks.

        Each rank has a share of each, but for the last one under ``tail="uneven"``.
        """
        whole, rest = divmod(self.length, self.global_batch)
        return whole + (rest > 0 and self.tail != "drop")

    def global_indices(self, batch: int, epoch: int | None = None) -> list[int]:
        """The indices of a global batch, of all ranks, in order.

        Args:
            batch: its number in the epoch, from 0.
            epoch: the number of the epoch; None is that of ``set_epoch``.

        Raises:
            IndexError: if the epoch has no such batch.

        Example:
            >>> GlobalBatchSampler(10, 4, rank=1, world=2, seed=7).global_indices(1)
            [9, 2, 3, 5]
        """
        batch = _whole("batch", batch, "the number of a global batch, 0 or more")
        if batch >= self.global_batches:
            raise IndexError(
                f"there is no global batch {batch}: the epoch has {self.global_batches}"
            )
        return self._share(self._order_of(epoch), 0, 1, batch)

    def dropped(self, epoch: int | None = None) -> list[int]:
        """This rank's part of the indices that ``tail="drop"`` leaves out of an epoch.

        It is the part that the rank would have under ``tail="uneven"``, so that over all ranks each
        comes once.

        Example:
            >>> GlobalBatchSampler(10, 4, rank=1, world=2, seed=7).dropped()
            [0]
        """
        rest = self.length % self.global_batch
        if self.tail != "drop" or not rest:
            return []
        first, end = _part(rest, *self._stands())
        whole = self.length - rest
        return self._at(self._order_of(epoch), whole + first, whole + end)

    def made_from(self) -> dict[str, Any]:
        """What the order of the epoch is made from: the same on each rank.

        Example:
            >>> one = GlobalBatchSampler(10, 4, rank=1, world=2, seed=7)
            >>> one.made_from() == GlobalBatchSampler(10, 4, seed=7).made_from()
            True
        """
        names = ("length", "global_batch", "seed", "tail", "shuffle", "epoch")
        return {name: getattr(self, name) for name in names}

    def order_digest(self) -> str:
        """A digest of the order of the epoch, of 65,536 places of a long one; kept for the epoch.

        Example:
            >>> one = GlobalBatchSampler(10, 4, rank=1, world=2, seed=7)
            >>> one.order_digest() == GlobalBatchSampler(10, 4, seed=7).order_digest()
            True
        """
        made_from = self.made_from()
        if self._digest is None or self._digest[0] != made_from:
            order, step = self._order_of(None), max(1, self.length // _DIGESTED)
            some = np.arange(0, self.length, step) if order is None else order[::step]
            told = blake2b(some.astype(np.int64).tobytes(), digest_size=8).hexdigest()
            self._digest = made_from, told
        return self._digest[1]

    def shard(self) -> Shard | None:
        """Which share of the indices this rank has, as the audit tells it; None if nobody knows."""
        try:
            rank, world = self._stands()
        except ValueError:  # the first draw tells of it
            return None
        total = self.length
        if self.tail != "uneven":
            total = self.global_batches * self.global_batch
        return Shard(
            rank,
            world,
            length=self.length,
            total=total,
            epoch=self.epoch if self.shuffle else None,
            kind=type(self).__name__,
            drops_by="tail='drop'",
            seed=self.seed if self.shuffle else None,
            pads_last=self._pads_last(rank, world),
        )

    def _pads_last(self, rank: int, world: int) -> int:
        """How many of this rank's last indices are those that fill up the last batch."""
        if self.tail != "pad" or not self.global_batches:
            return 0
        first, end = _part(self.global_batch, rank, world)
        begin = (self.global_batches - 1) * self.global_batch
        return max(0, begin + end - max(begin + first, self.length))

    # where this process stands ──────────────────────────────────────────────────────────────────

    def _told(self) -> tuple[int | None, int | None]:
        """The rank and the number of ranks as they are known by now."""
        at = place()
        return (
            at.rank if self.rank is None else self.rank,
            at.world_size if self.world is None else self.world,
        )

    def _stands(self) -> tuple[int, int]:
        """The rank and the number of ranks, where nobody will say more."""
        rank, world = self._told()
        if world is None:
            world = 1
        if rank is None:
            if world > 1:
                raise ValueError(
                    f"nobody says which of the {world} ranks this is: give rank=, call "
                    "init_process_group before, or set RANK"
                )
            rank = 0
        self._see(rank, world)
        return rank, world

    def _see(self, rank: int | None, world: int | None) -> None:
        if world is None:
            return
        if self.global_batch % world:
            raise ValueError(_indivisible(self.global_batch, world))
        if rank is not None and rank >= world:
            there = "is one rank, 0" if world == 1 else f"are {world} ranks, 0 to {world - 1}"
            own = "" if self.rank is None else "rank="
            told = "" if self.world is not None else "; give world=, or set WORLD_SIZE"
            raise ValueError(f"{own}{rank} is the rank of no process: there {there}{told}")

    # the order ──────────────────────────────────────────────────────────────────────────────────

    def _count(self, rank: int, world: int) -> int:
        """How many batches a rank has."""
        batches = self.global_batches
        if batches:
            first, end = _part(self._size(batches - 1), rank, world)
            batches -= first == end  # an empty share is no batch
        return batches

    def _size(self, batch: int) -> int:
        """How many indices a global batch has over all ranks."""
        if self.tail != "uneven":
            return self.global_batch
        return min(self.global_batch, self.length - batch * self.global_batch)

    def _share(self, order: Any, rank: int, world: int, batch: int) -> list[int]:
        first, end = _part(self._size(batch), rank, world)
        begin = batch * self.global_batch
        return self._at(order, begin + first, begin + end)

    def _at(self, order: Any, first: int, end: int) -> list[int]:
        """The indices at these places of the order, which begins again at its end."""
        if end <= self.length:
            return list(range(first, end)) if order is None else order[first:end].tolist()
        places = np.arange(first, end) % self.length
        return (places if order is None else order[places]).tolist()

    def _order_of(self, epoch: int | None) -> Any:
        """The permutation of an epoch, kept until another is asked for; None for 0, 1, 2 ..."""
        epoch = self.epoch if epoch is None else _whole("epoch", epoch, _SEED, below=_SEEDS)
        if not self.shuffle:
            return None
        named = self.seed, epoch, self.length
        if self._order is None or self._order[0] != named:
            self._order = None  # not two of them at once
            self._order = named, _permutation(*named)
        return self._order[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_order": None}


def _permutation(seed: int, epoch: int, length: int) -> Any:
    # The sum of both, as DistributedSampler has it, is the same for seed 0, epoch 1 and seed 1,
    # epoch 0. In words of one width, or seed 2**32 + 7, epoch 0 is seed 7, epoch 1.
    words = [each >> shift & 0xFFFFFFFF for each in (seed, epoch) for shift in (0, 32)]
    mixed = int(np.random.SeedSequence(words).generate_state(1)[0])  # torch's generator has 32 bits
    generator = torch.Generator(device="cpu").manual_seed(mixed)
    kind = torch.int32 if length < _INT32 else torch.int64
    return torch.randperm(length, generator=generator, dtype=kind, device="cpu").numpy()


def _part(size: int, rank: int, world: int) -> tuple[int, int]:
    """Where the share of a rank begins and ends: even, and one more for the first ranks.

    >>> [_part(7, rank, 3) for rank in range(3)]
    [(0, 3), (3, 5), (5, 7)]
    """
    each, more = divmod(size, world)
    first = rank * each + min(rank, more)
    return first, first + each + (rank < more)


def _indivisible(global_batch: int, world: int) -> str:
    """Why a global batch cannot be shared out, and what is near that can.

    >>> _indivisible(100, 8)
    'global_batch=100 cannot be shared evenly by 8 ranks: take 96 or 104, or 5 or 10 ranks'
    """
    below = global_batch // world * world
    batches = [each for each in (below, below + world) if each]
    fewer = next(each for each in range(world - 1, 0, -1) if global_batch % each == 0)
    most = min(global_batch, 16 * world)
    more = (each for each in range(world + 1, most + 1) if global_batch % each == 0)
    ranks = [fewer, *(() if (found := next(more, None)) is None else (found,))]
    said = f"take {_or(batches)}, or {_or(ranks)} rank{'s' * (ranks[-1] > 1)}"
    return f"global_batch={global_batch} cannot be shared evenly by {world} ranks: {said}"


def _or(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def _see_one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(type(value) is type(each) and value == each for each in choices):
        said = ", ".join(map(repr, choices[:-1]))
        raise ValueError(f"{name} must be {said} or {choices[-1]!r}; got {bounded_text(value)}")


def _whole(name: str, value: Any, wanted: str, *, least: int = 0, below: int | None = None) -> int:
    """The int that a value is; of NumPy too, and no bool.

    Raises:
        ValueError: if it is none, or out of range.
    """
    if type(value) is not bool:
        try:
            number = operator.index(value)
        except TypeError:
            pass
        else:
            if number >= least and (below is None or number < below):
                return number
    raise ValueError(f"{name} must be {wanted}; got {bounded_text(value)}")
