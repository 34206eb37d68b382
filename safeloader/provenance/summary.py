"""A run in one line: on demand, and at the program's end. Runs in: main.

The line at the end is one of the log, at level INFO: a program that logs at that level has it, and
any other neither has it nor pays for it. A loader often goes before the program ends, and its
notebook with it: what is to be said of it is put into words then.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import multiprocessing
import os
import weakref
from collections.abc import Sequence
from typing import Any

from torch.utils.data import get_worker_info

from safeloader import _python
from safeloader.delivery.audit import EpochAudit
from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.texts import index_text
from safeloader.provenance.columns import places_of
from safeloader.provenance.epoch_facts import FactsOfEpochs
from safeloader.provenance.recorder import Delivery, Recorder, Totals, as_delivery
from safeloader.provenance.slowest import slowest_of

_SLOWEST = 3
_LOOKED_AT = 1 << 20  # samples, the newest, for the slowest: half a second
_TOLD_MAX = 20  # loaders at the end of a program
_MIB = 1 << 20

logger = logging.getLogger("safeloader")


def summary_of(
    held: Sequence[Delivery],
    totals: Totals,
    facts: FactsOfEpochs,
    audits: Sequence[EpochAudit] = (),
) -> str:
    """A run in one line: samples, waiting, skips, the slowest, memory.

    Args:
        held: the batches that the recorder holds, oldest first.
        totals: what is counted of all.
        facts: what holds for their epochs.
        audits: those that are known.
    """
    epochs = _several(totals.epochs, "epoch")
    if not held:
        return f"{epochs}, no batch handed over"
    sizes = [len(places_of(each.manifest)) for each in held]
    samples = _several(totals.samples + sum(sizes), "sample")
    batches = _several(totals.forgotten + len(held), "batch", "batches")
    wait_ns, span_ns = _waited(held)
    rate = f"{sum(sizes) / span_ns * 1e9:,.0f} a second"
    parts = [f"{epochs}, {samples} in {batches} ({rate})"]
    if not_ok := [str(audit.epoch) for audit in audits if audit.ok is False]:
        more = ", ..." if len(not_ok) > _SLOWEST else ""
        parts.append(f"NOT OK: epoch {', '.join(not_ok[:_SLOWEST])}{more}, see loader.audits")
    parts.append(f"waited for data {min(1.0, wait_ns / span_ns):.0%} of the time")
    left_out = [(totals.incidents[what], what) for what in ("skipped", "replaced", "late")]
    parts.append(", ".join(f"{n:,} {what}" for n, what in left_out if n) or "none skipped")
    parts.append(_slowest(held, sizes, facts))
    if totals.memory_bytes is not None:
        parts.append(f"workers held {totals.memory_bytes / _MIB:,.0f} MiB")
    return "; ".join(parts)


def _slowest(held: Sequence[Delivery], sizes: Sequence[int], facts: FactsOfEpochs) -> str:
    first, left = len(held), _LOOKED_AT
    while first and left >= sizes[first - 1]:
        first -= 1
        left -= sizes[first]
    of = f" of the newest {_several(_LOOKED_AT - left, 'sample')}" if first else ""
    slow = slowest_of(held[first:], facts, _SLOWEST)
    told = (f"index {index_text(each.index, 60)} ({_ms(each.median_ns)})" for each in slow)
    return f"slowest{of}: {', '.join(told)}"


def _waited(held: Sequence[Delivery]) -> tuple[int, int]:
    """How long was waited, within how long, in ns: in each epoch, as far as it is held."""
    wait_ns = span_ns = 0
    for _, batches in itertools.groupby(held, lambda each: each.epoch):
        of_epoch = list(batches)
        wait_ns += sum(each.wait_ns for each in of_epoch)
        first, last = of_epoch[0], of_epoch[-1]
        span_ns += last.began_ns + last.wait_ns - first.began_ns
    return wait_ns, max(1, span_ns)


def _several(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _ms(took_ns: int) -> str:
    return f"{took_ns / 1e6:.1f} ms" if took_ns >= 10**5 else f"{took_ns / 1e6:.3f} ms"


# ── at the end of the program ────────────────────────────────────────────────────────────────────


class _End:
    """What a process says at its end; a forked child has one of its own."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._watched: list[weakref.finalize[[str, dict[int, Any], Totals], Recorder]] = []
        self._said: dict[str, tuple[str, int]] = {}  # by name: of the last loader, and how many
        self._more = 0
        if multiprocessing.parent_process() is not None:  # these skip `atexit`
            _python.Finalize(None, self.say, exitpriority=-100)
        else:
            atexit.register(self.say)

    def watch(self, recorder: Recorder, name: str) -> None:
        """Have it said what a recorder comes to, of the loader of this name."""
        # It must hold neither the recorder nor anything that leads back to it.
        gone = weakref.finalize(recorder, self._gone, name, recorder.held, recorder.totals)
        gone.atexit = False
        self._watched = [each for each in self._watched if each.alive]
        self._watched.append(gone)

    def _gone(self, name: str, held: dict[int, Any], totals: Totals) -> None:
        if os.getpid() != self.pid or not held or not logger.isEnabledFor(logging.INFO):
            return
        if name not in self._said and len(self._said) == _TOLD_MAX:
            self._more += 1
            return
        try:
            told = summary_of([*map(as_delivery, held.values())], totals, FactsOfEpochs(1))
        except Exception as exc:
            if raised_by_signal(exc):
                raise
            told = f"its summary failed, a fault of safeloader's own, please report it: {exc!r}"
        _, before = self._said.get(name, ("", 0))
        self._said[name] = told, before + 1

    def say(self) -> None:
        """Say it: of the loaders that are gone, then of those that live still."""
        if os.getpid() != self.pid:
            return
        for watched in self._watched:
            watched()
        for name, (told, times) in self._said.items():
            last = f", the last of {times} loaders" if times > 1 else ""
            logger.info("%s%s: %s", name, last, told)
        if self._more:
            logger.info("and %d more loaders", self._more)
        self._said.clear()


_end: list[_End] = []


def tell_at_end(recorder: Recorder, name: str) -> None:
    """Have a line say at the end what a recorder came to, of a loader of this name."""
    if recorder.loader_name or get_worker_info() is not None:  # known; or a loader in a worker
        return
    recorder.loader_name = name
    if not _end or _end[-1].pid != os.getpid():
        _end[:] = [_End()]
    _end[-1].watch(recorder, name)
