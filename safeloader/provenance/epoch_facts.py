"""What holds for all batches of an epoch: its rank, and what lies under its dataset. Runs in: main.

An epoch's table of indices stays for whoever asks later which sample that was. Where a program
makes a new split for each epoch, nobody but this would hold the earlier ones: equal ones are kept
once, and of all the others the newest, in a bounded number of bytes. What was let go of is not
known from then on.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import NamedTuple

from safeloader.introspect.seeds import EpochSeed
from safeloader.introspect.underlying import Underlying

_EPOCHS_MAX = 1024
_COMPARED = 4  # newest ways down, with which that of a new epoch is compared


class EpochFacts(NamedTuple):
    """What holds for all batches of an epoch.

    ``rank`` is that of the process, in distributed training; ``under`` the way to the dataset under
    a Subset; ``seed`` what its random numbers are made from, with ``seed=``, and ``seq_of_first``
    the number of its first draw.
    """

    rank: int | None
    under: Underlying | None
    seed: EpochSeed | None = None
    seq_of_first: int = 0


class FactsOfEpochs:
    """The facts of the newest epochs of a recorder.

    Args:
        max_bytes: of tables of indices that nobody else holds any more.

    Attributes:
        ranked: whether any epoch had a rank.
        parts: how many datasets an epoch had under its own, at most; 0 where none had any.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._facts: dict[int, EpochFacts] = {}
        self._ways: list[weakref.ref[Underlying]] = []  # oldest first; audits hold them too
        self.ranked = False
        self.parts = 0

    def of(self, epoch: int) -> EpochFacts | None:
        """What holds for an epoch; None where that was let go of."""
        return self._facts.get(epoch)

    def note(self, epoch: int, facts: EpochFacts) -> EpochFacts:
        """Keep what holds for all of an epoch that begins; what is given back is what is kept."""
        rank, under = facts.rank, facts.under
        self.ranked |= rank is not None
        if under is not None or self._ways:
            facts = facts._replace(under=self._one_of_few(under))
        self._facts[epoch] = facts
        self._facts.pop(epoch - _EPOCHS_MAX, None)
        return facts

    def _one_of_few(self, under: Underlying | None) -> Underlying | None:
        """The way of an epoch that begins: that of an earlier one, where they are equal."""
        ways = [way for each in self._ways if (way := each()) is not None]
        if under is not None:
            self.parts = max(self.parts, under.parts)
            for known in ways[-_COMPARED:]:
                if known.takes_over(under):
                    ways.remove(known)
                    under = known
                    break
        self._bound(ways)
        self._ways = [weakref.ref(way) for way in (*ways, under) if way is not None]
        return under

    def _bound(self, ways: list[Underlying]) -> None:
        """Have the oldest let go of what is too much."""
        left, counted = self._max_bytes, set[int]()
        for way in reversed(ways):
            sizes = dict(way.held_here())
            size = sum(size for key, size in sizes.items() if key not in counted)
            if size > left:
                way.let_go()
            else:
                left -= size
                counted.update(sizes)

    def forget(self, epochs: Iterable[int]) -> None:
        """No batch of these is known any more."""
        for epoch in epochs:
            self._facts.pop(epoch, None)
