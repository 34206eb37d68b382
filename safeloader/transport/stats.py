"""How batches crossed from the workers, counted. Runs in: main."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from typing import Any

from safeloader.introspect.resources import human_bytes

_REASONS_MAX = 20


@dataclasses.dataclass(frozen=True)
class TransportStats:
    """How the batches of a loader crossed from its workers to the training process.

    Attributes:
        slots: how many slots are mapped now: shared memory that batches are written into in turn.
            Those of an epoch's workers go with them, but for the batches that are kept, and for
            large ones that wait for the next workers, half a minute at most.
        bytes: their size together. What a slot never held takes no memory.
        batches: how many batches came by each way: ``"slots"``; ``"message"``, all of the batch
            within the worker's message, as it is small; ``"torch"``, in full or in part by torch's
            own shared memory, a file for each tensor.
        fallbacks: why some or all of a batch was not put into a slot under ``transport="auto"``,
            with how many batches.

    Example:
        >>> import torch
        >>> from safeloader import SafeDataLoader
        >>> loader = SafeDataLoader(torch.zeros(8, 5000), batch_size=4, num_workers=1)
        >>> for batch in loader:
        ...     pass
        >>> loader.transport_stats.batches
        {'slots': 2}
    """

    slots: int = 0
    bytes: int = 0
    batches: dict[str, int] = dataclasses.field(default_factory=dict)
    fallbacks: dict[str, int] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if not self.batches:
            return "no batch came from a worker"
        ways = ", ".join(f"{count} by {way}" for way, count in self.batches.items())
        now = f"{self.slots}, {human_bytes(self.bytes)} in all" if self.slots else "none"
        lines = [f"batches: {ways}; slots now: {now}"]
        lines += [f"not in a slot, {count}: {why}" for why, count in self.fallbacks.items()]
        return "\n".join(lines)


class TransportCounts:
    """The running counts; written by the thread that opens batches.

    Attributes:
        batches: how many came by each way.
    """

    def __init__(self) -> None:
        self.batches: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._mapped: dict[_Mapped, int] = {}  # the size of each

    def fell_back(self, why: str) -> None:
        """Some or all of a batch was not in a slot."""
        known = why in self._fallbacks or len(self._fallbacks) < _REASONS_MAX
        self._fallbacks[why if known else "other reasons"] += 1

    def slot_made(self, memory: Any) -> None:
        """A slot was mapped; it is counted until its memory is freed."""
        forget = self._mapped.pop  # in C: `slot_reader` says why
        self._mapped[_Mapped(memory, forget)] = len(memory)

    def slot_left(self, memory: Any) -> None:
        """A slot is no longer of these."""
        for each in list(self._mapped):
            if each() is memory:
                self._mapped.pop(each, None)

    def stats(self) -> TransportStats:
        """The counts as they stand."""
        sizes = list(self._mapped.values())
        return TransportStats(len(sizes), sum(sizes), dict(self.batches), dict(self._fallbacks))


class _Mapped(weakref.ref[Any]):
    """The memory of a slot, referred to weakly; ctypes arrays have no hash of their own."""

    __slots__ = ()
    __eq__ = object.__eq__
    __hash__ = object.__hash__
