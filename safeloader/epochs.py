"""What ``seed=`` needs of a loader: its count of epochs, and what goes with it. Runs in: main."""

from __future__ import annotations

import operator
from typing import Any

from torch.utils.data import DataLoader

from safeloader import _torch
from safeloader.introspect.seeds import EpochSeed, SeedPer
from safeloader.introspect.texts import bounded_text
from safeloader.introspect.values import short_type_name, type_name
from safeloader.main.drawing import shuffling
from safeloader.settings import Settings


class CountedEpochs:
    """The count of epochs that ``seed=`` goes by: one for each ``iter(loader)``."""

    _next_epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next ``iter()`` begins, as ``seed=`` counts them.

        By itself each ``iter(loader)`` begins the next epoch, from 0 on. After a look at some
        batches, or in a run that goes on from epoch 3, say so here; to say what is so already
        changes nothing. The number is handed on to the batch sampler or sampler, if it has a
        ``set_epoch`` too, as ``DistributedSampler`` has. Records count epochs for themselves.

        Args:
            epoch: from 0.

        Raises:
            TypeError: if it is no whole number.
            ValueError: if it is below 0.

        Example:
            >>> from safeloader import SafeDataLoader
            >>> loader = SafeDataLoader(list(range(8)), batch_size=8, shuffle=True, seed=11)
            >>> first, second = list(loader)[0].tolist(), list(loader)[0].tolist()
            >>> loader.set_epoch(0)
            >>> list(loader)[0].tolist() == first != second
            True
        """
        self._count_from(epoch)
        loader = self._seeded_loader()
        of_batches = getattr(loader, "batch_sampler", None)
        beneath = getattr(of_batches, "sampler", None)
        for each in (of_batches, beneath, getattr(loader, "sampler", None)):
            told = getattr(each, "set_epoch", None)
            if callable(told):
                told(self._next_epoch)
                return

    def _count_from(self, epoch: Any) -> None:
        self._next_epoch = _counted(epoch)

    def _seeded_loader(self) -> Any:
        """The loader that this counts for."""
        return self

    def _seed_of_next(self, settings: Settings) -> EpochSeed | None:
        """What the numbers of the epoch that begins are made from; counts it."""
        if settings.seed is None:
            return None
        epoch = self._next_epoch
        self._next_epoch = epoch + 1
        return EpochSeed(settings.seed, epoch, settings.seed_per)

    def _not_begun(self, seed: EpochSeed | None) -> None:
        """The epoch of this seed could not begin: the next ``iter()`` tries again."""
        if seed is not None:
            self._next_epoch = seed.epoch


def _counted(epoch: Any) -> int:
    try:
        number = operator.index(epoch)
    except TypeError:
        raise TypeError(f"an epoch is a whole number; got {bounded_text(epoch)}") from None
    if number < 0:
        raise ValueError(f"epochs count from 0; got {number}")
    return number


def why_not_seedable(loader: DataLoader[Any], per: SeedPer, *, made_by_user: bool = True) -> str:
    """Why ``seed=`` cannot keep what it promises for a loader, in a sentence; empty if it can.

    Args:
        loader: of any class.
        per: as ``seed_per`` has it.
        made_by_user: whether the sampler is as the user gave it; a framework may have given it a
            generator, in whose place the seed's stands.
    """
    if loader.generator is not None:
        return (
            "seed= and generator= both say what random numbers are made from: leave one of them out"
        )
    sampler = shuffling(_torch.index_sampler(loader)) if made_by_user else None
    if sampler is not None and sampler.generator is not None:
        return (
            f"the {type(sampler).__name__} has a generator of its own, and under seed= its order "
            "is made from the seed: leave generator= out of it, or seed= out of the loader"
        )
    at_once = _torch.makes_batches(loader.dataset) if _torch.batches_itself(loader) else None
    if per == "sample" and at_once is not None:
        return (
            f"{short_type_name(type_name(type(at_once)))} makes a whole batch in one call "
            "(__getitems__), so its samples cannot be seeded one by one: give seed_per='batch'"
        )
    return ""
