"""The notebook of what was handed over, and of the epochs; runs in main.

Written per batch, decoded only when somebody asks. It belongs to no loader: a framework may rebuild
the loader, the notebook goes along and the user's own loader still answers.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from safeloader.main.audit import EpochAudit
from safeloader.wire.records import Papers

DEFAULT_MAX_BYTES = 64 * 1024 * 1024
_RECORD_BYTES = 600  # a record without its samples, measured with sys.getsizeof; rounded up
_OBJECT_BYTES = 100  # an index that is not an int

logger = logging.getLogger("safeloader")

# Stamps are readings of a clock that counts from no date; this turns them into time since 1970.
UNIX_OFFSET_NS = time.time_ns() - time.perf_counter_ns()


class Delivery(NamedTuple):
    """A batch as it was handed over; ``worker_row`` numbers the stream (0 in the main process)."""

    epoch: int
    batch: int
    papers: Papers
    wait_ns: int

    @property
    def nbytes(self) -> int:
        """Memory that the record holds, in bytes, about."""
        indices = self.papers.indices
        of_indices = len(indices) if type(indices) is bytes else _OBJECT_BYTES * len(indices)
        return _RECORD_BYTES + of_indices + len(self.papers.stamps)


class Recorder:
    """What was delivered, newest kept: the notebook behind ``loader.provenance`` and ``.audit``.

    At 64 MiB, the default, it holds the newest 2.5 million samples in batches of 64 (25 bytes a
    sample), or the newest 100,000 in batches of one. Past the bound the oldest batches are
    forgotten, never an error and never a slow-down; the audit does not need them. Pickles and deep
    copies are blank notebooks of the same bound.

    Args:
        max_bytes: bound on the memory of the records, in bytes.

    Raises:
        ValueError: if ``max_bytes`` is not a positive number.

    Example:
        >>> from safeloader import Recorder, SafeDataLoader
        >>> recorder = Recorder(max_bytes=2**20)
        >>> loader = SafeDataLoader([5, 6, 7], batch_size=2, recorder=recorder)
        >>> for batch in loader:
        ...     print(batch, loader.last_batch.indices)
        tensor([5, 6]) (0, 1)
        tensor([7]) (2,)
    """

    def __init__(self, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes <= 0:
            raise ValueError(
                f"max_bytes must be a positive int, the bytes to keep records in; got {max_bytes!r}"
            )
        self.max_bytes = max_bytes
        self._deliveries: OrderedDict[tuple[int, int], Delivery] = OrderedDict()
        self._held_bytes = 0
        self._epochs = 0
        self._audit: Callable[[], EpochAudit] | None = None
        self._forgotten = 0
        self._in_use: list[bool] = []  # not empty once an epoch began; outlives the recorder

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.max_bytes,)

    def __repr__(self) -> str:
        return (
            f"Recorder({len(self._deliveries)} batches of {self._epochs} epochs, "
            f"{self._held_bytes} of {self.max_bytes} bytes)"
        )

    @property
    def epochs(self) -> int:
        """How many epochs were begun; each ``iter(loader)`` begins one."""
        return self._epochs

    @property
    def forgotten(self) -> int:
        """How many batches were forgotten to stay within ``max_bytes``."""
        return self._forgotten

    def begin_epoch(self, audit: Callable[[int], EpochAudit]) -> int:
        """Number the next epoch and take the way to its audit."""
        epoch = self._epochs
        self._epochs += 1
        if not self._in_use:
            self._in_use.append(True)
        self._audit = lambda: audit(epoch)
        return epoch

    def delivered(self, delivery: Delivery) -> None:
        """Note a batch as it is handed over; hot path."""
        self._deliveries[delivery.epoch, delivery.batch] = delivery
        self._held_bytes += delivery.nbytes
        while self._held_bytes > self.max_bytes and len(self._deliveries) > 1:
            _, oldest = self._deliveries.popitem(last=False)
            self._held_bytes -= oldest.nbytes
            self._forgotten += 1

    def deliveries(self) -> Iterator[Delivery]:
        """The batches still held, oldest first."""
        return iter(list(self._deliveries.values()))

    def last_delivery(self) -> Delivery | None:
        """The batch handed over last."""
        return next(reversed(self._deliveries.values()), None)

    def find(self, batch: int, epoch: int | None) -> Delivery | None:
        """Batch number ``batch`` of ``epoch``, by default of the newest epoch."""
        at = self._epochs - 1 if epoch is None else epoch
        return self._deliveries.get((at, batch))

    def audit(self) -> EpochAudit | None:
        """The audit of the epoch begun last, as it stands; None before the first."""
        return None if self._audit is None else self._audit()


# ── a notebook that nobody wrote in ──────────────────────────────────────────────────────────────

_blank: list[str] = []


def watch_for_use(recorder: Recorder, made_for: str) -> None:
    """At the end of the program, say once that a loader never began an epoch.

    Frameworks that rebuild a loader as torch's own class do so in silence; the user would take the
    empty notebook for a clean run.
    """
    if not _blank:
        atexit.register(_say_blank)
        _blank.append("")  # registered; the notes follow
    pid = os.getpid()
    in_use = recorder._in_use  # not the recorder itself: it has to be able to go

    def note_if_blank() -> None:
        if not in_use and os.getpid() == pid and os.environ.get("SAFELOADER") != "off":
            _blank.append(made_for)

    weakref.finalize(recorder, note_if_blank)


def _say_blank() -> None:
    loaders = [made_for for made_for in _blank if made_for]
    if loaders:
        logger.warning(
            "%d SafeDataLoader(s) never delivered a batch, so nothing was recorded or checked for "
            "them: %s. Rebuilt by a framework as torch's own DataLoader? Iterate the "
            "SafeDataLoader itself, or check type(loader) where the framework hands it back.",
            len(loaders),
            "; ".join(loaders[:3]),
        )
