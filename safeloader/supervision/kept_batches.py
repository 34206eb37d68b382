"""How much memory the batches hold that the training loop keeps. Runs in: main.

A loop may keep each batch without meaning to: ``itertools.cycle(loader)``, a list of outputs. Some
batches are watched, by a weak reference, and stand for those between: the larger, the more.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from safeloader.introspect.resources import cgroup_memory, human_bytes, machine_memory
from safeloader.introspect.values import (
    array_facts,
    container_base,
    held_by,
    inherits,
    is_one_of,
)
from safeloader.supervision.wrong_data import Finding

EVERY_MAX = 256  # batches, of which one is watched
PARTS = 250  # of the memory: a batch that is watched stands for one of these at most
FEW = 4  # that are watched and held: the loop may well hold one or two
SHARE = 0.1  # of the machine's memory
WATCHED_MAX = 4096
_PARTS_MAX = 64


class KeptBatches:
    """Of the batches handed over, those that somebody still holds.

    Attributes:
        due: number of the next batch that :meth:`note` wants to see.
    """

    def __init__(self) -> None:
        self._watched: list[tuple[int, int, weakref.ref[torch.Tensor], int, int]] = []
        self.due = 0

    def note(self, epoch: int, number: int, batch: Any) -> None:
        """A batch is about to be handed over."""
        if number < self.due:
            return
        every = EVERY_MAX
        tensors = list(islice(_tensors(batch, 4), _PARTS_MAX))
        if tensors:
            sizes = [(array_facts(each) or {}).get("size_bytes", 0) for each in tensors]
            size, largest = sum(sizes), tensors[sizes.index(max(sizes))]
            part = (_memory_bytes() or 0) // PARTS
            every = min(EVERY_MAX, max(1, part // max(1, size)))
            self._watched.append((epoch, number, weakref.ref(largest), size, every))
            if len(self._watched) > WATCHED_MAX:
                self._forget()
        self.due = number + every

    def _forget(self) -> None:
        self._watched = [each for each in self._watched if each[2]() is not None][-WATCHED_MAX:]

    def finding(self) -> Iterator[Finding]:
        """What is to be told, once the batches that are kept hold a tenth of the memory."""
        self._forget()
        held = sum(size * every for *_, size, every in self._watched)
        batches = sum(every for *_, every in self._watched)
        total = _memory_bytes()
        if total is None or len(self._watched) < FEW or held <= SHARE * total:
            return
        epoch, number, *_ = self._watched[0]
        yield Finding(
            ("kept batches",),
            f"about {batches:,} batches that were handed over are still held, "
            f"with {human_bytes(held)} of the machine's {human_bytes(total)}; the oldest is batch "
            f"{number} of epoch {epoch}. Something in the program keeps each batch: a list, or "
            "itertools.cycle(loader), which keeps a copy of all it gave (write two loops instead). "
            "Keep of a batch what is needed of it: .item(), or a clone of a part",
        )


def _tensors(value: Any, depth: int) -> Iterator[torch.Tensor]:
    if inherits(type(value), torch.Tensor):
        yield value
    elif depth and is_one_of(container_base(type(value)), dict, list, tuple):
        for _, each in held_by(value, _PARTS_MAX):
            yield from _tensors(each, depth - 1)


@functools.cache
def _memory_bytes() -> int | None:
    """Of the machine or of the container, whichever is smaller."""
    machine, group = machine_memory(), cgroup_memory()
    limits = [None if machine is None else machine.total, None if group is None else group.limit]
    return min((each for each in limits if each is not None), default=None)
