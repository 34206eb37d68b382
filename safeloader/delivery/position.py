"""How far an epoch is: what was handed over of its draws, and a digest of it. Runs in: main.

::

    draws     0  1  2  3  4  5  6  7  8        handed over: 0 to 3, and 6 with in_order=False
              └─ prefix ─┘        │            position: 4 batches, beyond them {6}
              chained digest      beyond       digest: of the indices of 0 to 3

Draws are handed over in their order, but for ``in_order=False``. The indices of the first gapless
ones are chained into one digest, so a run that goes on elsewhere can prove that it draws the same;
digests of earlier places, a *ladder*, tell where it begins to draw others. What was drawn ahead for
the workers never enters.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple

from safeloader.delivery.indices import Packed, count
from safeloader.introspect.seeds import bytes_of

_STEP = 16  # batches between two rungs
_DIGEST_BYTES = 16
_RUNG_BYTES = 6  # two other orders agree in one by chance once in 2.8e14
_INT64 = range(-(1 << 63), 1 << 63)


class Place(NamedTuple):
    """A place in the draws of an epoch.

    Attributes:
        batches: how many were handed over, or raised, without a gap.
        samples: how many indices were drawn for them.
        digest: of these indices, in their order.
        beyond: the numbers of the batches handed over behind the first gap.
    """

    batches: int
    samples: int
    digest: bytes
    beyond: tuple[int, ...] = ()


class Rung(NamedTuple):
    """The digest of an earlier place, in short."""

    batches: int
    samples: int
    digest: bytes


class Chain:
    """A running digest of indices; how they lie in batches does not enter.

    Example:
        >>> one, two = Chain(), Chain()
        >>> one.add((1, 2)), one.add((3,)), two.add((1, 2, 3))
        (None, None, None)
        >>> one.digest() == two.digest()
        True
    """

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=_DIGEST_BYTES)

    def add(self, packed: Packed) -> None:
        """Take in the identities of a batch."""
        if type(packed) is bytes:
            self._hash.update(packed)
            return
        for each in packed:
            if type(each) is int and each in _INT64:  # as in a batch of ints
                self._hash.update(each.to_bytes(8, "little", signed=True))
            else:
                self._hash.update(bytes_of(each) + b"\0")  # no repr: an object's has its address

    def digest(self) -> bytes:
        """Of all so far: 16 bytes."""
        return self._hash.digest()


class Position:
    """The place in the running epoch.

    Attributes:
        at: the place now; replaced as a whole, so another thread may read it.

    Example:
        >>> position = Position()
        >>> for seq, indices in enumerate([(1, 2), (3, 4), (5,)]):
        ...     position.drawn(seq, indices)
        >>> position.passed(0, 2), position.at.batches, position.at.samples
        (None, 1, 2)
    """

    def __init__(self) -> None:
        self._chain = Chain()
        self._next = 0  # the number of the next batch that is drawn
        self._batch_of: dict[int, int] = {}  # of the sampler's draws that are not handed over
        self._open: dict[int, Packed] = {}  # by batch: not handed over, or behind a gap
        self._beyond: set[int] = set()
        self._ladder: list[Rung] = []
        self.at = Place(0, 0, self._chain.digest())

    @property
    def ladder(self) -> tuple[Rung, ...]:
        """Digests of earlier places, each about twice as far back as the one behind it."""
        return tuple(self._ladder)

    def go_on(
        self, chain: Chain, place: Place, ladder: tuple[Rung, ...], beyond: dict[int, Packed]
    ) -> None:
        """An earlier run was at ``place``; what it handed over was drawn again into ``chain``."""
        self._chain, self.at, self._next = chain, place, place.batches
        self._ladder = list(ladder)
        self._open |= beyond
        self._beyond |= beyond.keys()

    def drawn(self, seq: int, packed: Packed) -> None:
        """The sampler's draw ``seq`` was made."""
        batch = max(self._next, self.at.batches)  # what an earlier run handed over lies between
        while batch in self._beyond:
            batch += 1
        self._batch_of[seq] = batch
        self._open[batch] = packed
        self._next = batch + 1

    def batch_of(self, seq: int) -> int | None:
        """The number in the epoch of a draw that was not handed over; None where it goes by seq."""
        return self._batch_of.get(seq)

    def passed(self, seq: int, samples: int | None) -> None:
        """What became of draw ``seq`` is handed over, or raised; 2 us."""
        batch = self._batch_of.pop(seq, None)
        if batch is None:
            return
        if batch != self.at.batches:
            self._beyond.add(batch)
        else:
            self._advance(self._open.pop(batch))
            while self._beyond and (batch := self.at.batches) in self._beyond:
                self._beyond.discard(batch)
                self._advance(self._open.pop(batch))
        if self._beyond or self.at.beyond:
            self._see_beyond()

    def _see_beyond(self) -> None:
        self.at = self.at._replace(beyond=tuple(sorted(self._beyond)))

    def _advance(self, packed: Packed) -> None:
        at, chain = self.at, self._chain
        chain.add(packed)
        batches = at.batches + 1
        digest = chain.digest()
        self.at = Place(batches, at.samples + count(packed), digest, at.beyond)
        if batches % _STEP == 0:
            ladder = self._ladder
            while ladder and not _leads_to(ladder[-1].batches, batches):
                ladder.pop()
            ladder.append(Rung(batches, self.at.samples, digest[:_RUNG_BYTES]))


class StreamPosition(Position):
    """The place in an epoch of a stream, whose samples have no index: only counts are known."""

    def __init__(self, batches: int = 0, samples: int = 0) -> None:
        super().__init__()
        self.at = Place(batches, samples, b"")

    def drawn(self, seq: int, packed: Packed) -> None:
        """A draw only says how many samples are wanted."""

    def passed(self, seq: int, samples: int | None) -> None:
        """A batch of so many samples is handed over, or its error raised."""
        at = self.at
        self.at = Place(at.batches + 1, at.samples + (samples or 0), b"")


def _leads_to(rung: int, batches: int) -> bool:
    """Whether a number is another with its last bits cleared: then the rungs double in distance."""
    return batches & -(rung & -rung) == rung
