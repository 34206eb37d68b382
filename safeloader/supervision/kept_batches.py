"""How much memory the batches hold that the training loop keeps. Runs in: main.

A loop may keep each batch without meaning to: ``itertools.cycle(loader)``, a list of outputs. Some
batches are watched, by weak references to their memory, and stand for those between: the larger,
the more. Which batch of a stride is watched moves from stride to stride, or a loop that keeps each
hundredth would have just those.

What the dataset holds itself (a list of tensors, a buffer that is filled again and again) is not
kept by the loop: memory that comes a second time while it is alive, and what is found in the
dataset.
"""

from __future__ import annotations

import functools
import weakref
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from safeloader.introspect.memories import memories
from safeloader.introspect.outside import kept_outside
from safeloader.introspect.resources import human_bytes, least_memory
from safeloader.introspect.values import inherits
from safeloader.supervision.wrong_data import Finding

EVERY_MAX = 256  # batches, of which one is watched
PARTS = 250  # of the memory: a batch that is watched stands for one of these at most
FEW = 4  # that are watched and held: the loop may well hold one or two
SHARE = 0.1  # of the machine's memory
WATCHED_MAX = 4096
_STEP = (5**0.5 - 1) / 2  # its multiples are spread evenly: no period of a loop's meets them
_LOOKS_MAX = 64  # at parts of a batch
_DATASET_LOOKS_MAX = 2048  # at parts of the dataset


class _Watched(NamedTuple):
    """Memory that a batch came with; ``size`` is 0 of what is the dataset's."""

    epoch: int
    number: int
    owner: weakref.ref[Any]
    size: int
    every: int


class KeptBatches:
    """Of the batches handed over, those that somebody still holds.

    Attributes:
        due: number of the next batch that :meth:`note` wants to see.
    """

    def __init__(self) -> None:
        self._watched: dict[int, _Watched] = {}  # by address
        self._found = 0  # of these, in the dataset
        self._in_doubt = False  # whether there may be more of them there
        self._every, self._phase = 1, 0.0
        self.due = self._end = 0
        self.begin()

    def begin(self) -> None:
        """An epoch begins."""
        self._stride(0)

    def _stride(self, first: int) -> None:
        """Choose which batch to watch, of the next ones from ``first`` on."""
        self._phase = (self._phase + _STEP) % 1
        self.due, self._end = first + int(self._phase * self._every), first + self._every

    def note(self, epoch: int, number: int, batch: Any) -> None:
        """A batch is about to be handed over."""
        if number < self.due:
            return
        sizes: dict[int, int] = {}
        for owner, address, whole, used in memories(batch, _LOOKS_MAX)[0]:
            if not used or inherits(type(owner), np.memmap):  # of which the kernel keeps none
                continue
            if address not in sizes:
                known = self._watched.pop(address, None)
                again = known is not None and known.owner() is not None
                size = 0
            else:
                size, again = sizes[address], not self._watched[address].size
            sizes[address] = size = min(whole, size + used)
            self._watched[address] = _Watched(
                epoch, number, weakref.ref(owner), 0 if again else size, self._every
            )
        if len(self._watched) > WATCHED_MAX:
            alive = self._alive()
            self._watched = dict(alive[-WATCHED_MAX // 2 :])
        part = (_memory_bytes() or 0) // PARTS
        wanted = max(1, part // max(1, sum(sizes.values())))
        self._every = min(EVERY_MAX, wanted, 2 * self._every)  # a small batch may be the only one
        self._stride(max(self._end, number + 1))

    def _alive(self) -> list[tuple[int, _Watched]]:
        return [each for each in self._watched.items() if each[1].owner() is not None]

    def finding(self, makers: tuple[Any, ...]) -> Iterator[Finding]:
        """What is to be told, once the batches that are kept hold a tenth of the memory.

        Args:
            makers: the dataset, and whatever else in this process may hold batches of its own.
                So may modules and classes that their code names (a global cache).
        """
        self._watched = dict(self._alive())
        total = _memory_bytes()
        if total is None or self._in_doubt or not self._is_much(total):
            return
        self._leave_out(makers)
        if self._in_doubt or not self._is_much(total):
            return
        for maker in makers:
            self._leave_out(tuple(kept_outside(maker)))
        if self._in_doubt or not self._is_much(total):
            return
        kept = self._kept()
        held = sum(each.size * each.every for each in kept)
        batches = sum({(each.epoch, each.number): each.every for each in kept}.values())
        oldest = min(kept, key=lambda each: (each.epoch, each.number))
        yield Finding(
            ("kept batches",),
            f"about {batches:,} batches that were handed over are still held, "
            f"with {human_bytes(held)} of the machine's {human_bytes(total)}; the oldest is batch "
            f"{oldest.number} of epoch {oldest.epoch}. Something in the program keeps each batch: "
            "a list, or itertools.cycle(loader), which keeps a copy of all it gave (write two "
            "loops instead). Keep of a batch what is needed of it: .item(), or a clone of a part",
        )

    def _kept(self) -> list[_Watched]:
        return [each for each in self._watched.values() if each.size]

    def _is_much(self, total: int) -> bool:
        kept = self._kept()
        held = sum(each.size * each.every for each in kept)
        return held > SHARE * total and len({(each.epoch, each.number) for each in kept}) >= FEW

    def _leave_out(self, makers: tuple[Any, ...]) -> None:
        """Take what the dataset holds for its own.

        Of a large dataset only the first elements are looked at: if some are among the batches,
        then so may be the others. A generator may still have its last one at hand.
        """
        watched = sorted(address for address, each in self._watched.items() if each.size)
        newest = max((each.epoch, each.number) for each in self._watched.values())
        its_own, all_of_it = memories(makers, _DATASET_LOOKS_MAX)
        for memory in its_own:
            first = bisect_left(watched, memory.address)
            behind = bisect_left(watched, memory.address + memory.size_bytes)
            for address in watched[first:behind]:
                each = self._watched[address]
                self._watched[address] = each._replace(size=0)
                self._found += (each.epoch, each.number) != newest
        self._in_doubt = not all_of_it and self._found > 0


@functools.cache
def _memory_bytes() -> int | None:
    """Of the machine or of the container, whichever is smaller."""
    return least_memory()
