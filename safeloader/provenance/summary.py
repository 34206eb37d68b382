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
from typing import Any, NamedTuple

from torch.utils.data import get_worker_info

from safeloader import _python
from safeloader.delivery.audit import EpochAudit
from safeloader.delivery.manifest import expected_indices
from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.texts import index_text
from safeloader.provenance.columns import fetched_together
from safeloader.provenance.epoch_facts import FactsOfEpochs
from safeloader.provenance.recorder import (
    BEGAN_NS,
    EPOCH,
    WAIT_NS,
    Delivery,
    Record,
    Recorder,
    Totals,
    as_delivery,
    samples_in,
)
from safeloader.provenance.slowest import SlowSample, slowest_of

_SLOWEST = 3
_LOOKED_AT = 1 << 20  # samples, the newest, for the slowest: half a second
_BATCHES = 1024  # that may be looked at, however few the samples
_TOLD_MAX = 20  # loaders at the end of a program
_MIB = 1 << 20

logger = logging.getLogger("safeloader")


class Figures(NamedTuple):
    """How loading went, in the words of a summary.

    Attributes:
        wait_ns: how long was waited for batches.
        span_ns: within how long.
        slowest: samples, longest first.
        looked_at: how many of the newest samples were looked at for these.
        whole: whether that is all.
        memory_bytes: what the workers held when they last said so.
        shared: whether some of the slowest have an equal share of the time of a whole batch.
    """

    wait_ns: int
    span_ns: int
    slowest: tuple[SlowSample, ...]
    looked_at: int
    whole: bool
    memory_bytes: int | None
    shared: bool = False

    @property
    def waiting(self) -> str:
        """How much of the time was waited."""
        return f"waited for data {min(1.0, self.wait_ns / self.span_ns):.0%} of the time"

    @property
    def costs(self) -> list[str]:
        """The slowest samples, and the memory where it is known."""
        of = "" if self.whole else f" of the newest {_several(self.looked_at, 'sample')}"
        of += " (those timed together have equal shares)" if self.shared else ""
        each = (f"index {index_text(it.index, 60)} ({_ms(it.median_ns)})" for it in self.slowest)
        said = [f"slowest{of}: {', '.join(each)}"]
        if self.memory_bytes is not None:
            said.append(f"workers held {self.memory_bytes / _MIB:,.0f} MiB")
        return said

    def and_of(self, other: Figures | None) -> Figures:
        """With those of another loader, which began before."""
        if other is None:
            return self
        slowest = {it.index: it for it in (*other.slowest, *self.slowest)}
        for it in other.slowest:
            if it.median_ns > slowest[it.index].median_ns:
                slowest[it.index] = it
        newest = self.memory_bytes
        return Figures(
            self.wait_ns + other.wait_ns,
            self.span_ns + other.span_ns,
            tuple(sorted(slowest.values(), key=lambda it: -it.median_ns)[:_SLOWEST]),
            self.looked_at + other.looked_at,
            self.whole and other.whole,
            other.memory_bytes if newest is None else newest,
            self.shared or other.shared,
        )


def figures_of(
    held: Sequence[Record], totals: Totals, facts: FactsOfEpochs, most: int = 0
) -> Figures:
    """How the loading of some batches went.

    Args:
        held: the batches as a recorder keeps them, oldest first, at least one.
        totals: what is counted of all.
        facts: what holds for their epochs.
        most: samples, the newest, that are looked at for the slowest, in a quarter as many batches
            at most; by default a million.
    """
    first, left = len(held), most or _LOOKED_AT
    oldest = max(0, first - max(left // 4, _BATCHES))
    samples = 0
    while first > oldest and left >= (size := samples_in(held[first - 1])):
        first -= 1
        left -= size
        samples += size
    looked_at = [*map(as_delivery, held[first:])]
    slowest = tuple(slowest_of(looked_at, facts, _SLOWEST))
    told = {each.index for each in slowest}
    shared = any(
        _shares(record, each) and not told.isdisjoint(expected_indices(each.manifest))
        for record, each in zip(held[first:], looked_at, strict=True)
    )
    return Figures(*_waited(held), slowest, samples, not first, totals.memory_bytes, shared)


def _shares(record: Record, delivery: Delivery) -> bool:
    """Whether the samples of a batch have equal shares of its time."""
    size = samples_in(record)
    return size > 1 and fetched_together(delivery.manifest, size)


def summary_of(
    held: Sequence[Record],
    totals: Totals,
    facts: FactsOfEpochs,
    audits: Sequence[EpochAudit] = (),
) -> str:
    """A run in one line: samples, waiting, skips, the slowest, memory.

    Args:
        held: the batches as the recorder keeps them, oldest first.
        totals: what is counted of all.
        facts: what holds for their epochs.
        audits: those that are known.
    """
    epochs = _several(totals.epochs, "epoch")
    if not held:
        return f"{epochs}, no batch handed over"
    here = sum(map(samples_in, held))
    samples = _several(totals.samples + here, "sample")
    batches = _several(totals.forgotten + len(held), "batch", "batches")
    figures = figures_of(held, totals, facts)
    rate = f"{here / figures.span_ns * 1e9:,.0f} a second"
    parts = [f"{epochs}, {samples} in {batches} ({rate})"]
    if not_ok := [str(audit.epoch) for audit in audits if audit.ok is False]:
        more = ", ..." if len(not_ok) > _SLOWEST else ""
        parts.append(f"NOT OK: epoch {', '.join(not_ok[:_SLOWEST])}{more}, see loader.audits")
    parts.append(figures.waiting)
    left_out = [(totals.incidents[what], what) for what in ("skipped", "replaced", "late")]
    parts.append(", ".join(f"{n:,} {what}" for n, what in left_out if n) or "none skipped")
    return "; ".join([*parts, *figures.costs])


def _waited(held: Sequence[Record]) -> tuple[int, int]:
    """How long was waited, within how long, in ns: in each epoch, as far as it is held."""
    wait_ns = span_ns = 0
    for _, batches in itertools.groupby(held, lambda record: record[EPOCH]):
        of_epoch = list(batches)
        wait_ns += sum(record[WAIT_NS] for record in of_epoch)
        first, last = of_epoch[0], of_epoch[-1]
        span_ns += last[BEGAN_NS] + last[WAIT_NS] - first[BEGAN_NS]
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
            told = summary_of([*held.values()], totals, FactsOfEpochs(1))
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
