"""What happens in an epoch, and who is told. Runs in: main.

A *sink* is any object with methods named like events; the recorder, a trace, the dumps and the log
lines are sinks. Each is called directly. One that raises is told once in the log and taken off, and
training goes on.

========================================================  ==========================================
``begun(epoch, audit)``                                   an epoch begins; ``audit()`` sums it up
``resumed(epoch, batches, left_out, origin)``             it goes on where an earlier run was
``drawn(epoch, seq, indices)``                            the sampler drew a batch
``delivered(epoch, batch, wait_ns, manifest, began_ns)``  a batch is handed over; hot path
``skipped(epoch, batch, incidents, failures)``            samples were left out, replaced or late
``failed(failure)``                                       an error is about to be raised
``restarted(failure, said)``                              new workers take over from dead ones
``closed(epoch, notes)``                                  nothing more comes in this epoch
``audited(audit)``                                        the audit of the epoch closed
========================================================  ==========================================
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from safeloader.delivery.manifest import SampleIncident
from safeloader.failures import dump
from safeloader.failures.failure import Failure
from safeloader.failures.loader_log import LoaderLog
from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.texts import index_text

DUMPS_MAX = 100  # of an epoch's failures that end no batch

listeners: list[Callable[[Any, LoaderLog], object]] = []
"""Each makes of a loader that begins an epoch, and its log, a further sink; None if it has none."""

Sinks = tuple[Callable[..., None], ...]
Incidents = Sequence[tuple[Any, SampleIncident]]  # each with the index


class Events:
    """One epoch's stream of events: for each the methods to call, and none where nobody listens."""

    begun: Sinks
    resumed: Sinks
    drawn: Sinks
    delivered: Sinks
    skipped: Sinks
    failed: Sinks
    restarted: Sinks
    closed: Sinks
    audited: Sinks

    def __init__(self, log: LoaderLog | None, sinks: Iterable[object]) -> None:
        self._log = log
        self._listen(list(sinks))

    def _listen(self, sinks: list[object]) -> None:
        self._sinks = sinks
        told = _HEARD_BY_NOBODY.copy()
        for sink in sinks:
            kind: Any = type(sink)
            for event in _heard_by(kind):
                told[event] += (getattr(sink, event),)
        vars(self).update(told)

    def tell(self, event: str, *about: Any) -> None:
        """Tell every sink of an event; the hot path does so itself."""
        for told in getattr(self, event):
            try:
                told(*about)
            except Exception as exc:
                self.take_off(told, exc)

    def take_off(self, told: Callable[..., None], exc: Exception) -> None:
        """Tell a sink nothing more, whose method raised."""
        if raised_by_signal(exc):
            raise exc
        sink = getattr(told, "__self__", told)
        self._listen([each for each in self._sinks if each is not sink])
        if self._log is not None:
            self._log.own_fault(type(sink).__name__, exc)


TOLD_MAX = 256  # notes of one recorder that are remembered
_HEARD_BY_NOBODY: dict[str, Sinks] = dict.fromkeys(Events.__annotations__, ())


@functools.lru_cache(maxsize=64)
def _heard_by(cls: type) -> tuple[str, ...]:
    """The events that sinks of a class have methods for."""
    return tuple(event for event in _HEARD_BY_NOBODY if getattr(cls, event, None) is not None)


UNHEARD = Events(None, ())
"""The events of which nobody is told any more."""


class LogLines:
    """The sink that warns in the log.

    Args:
        log: where the lines go.
        beneath: what to say of the index of the dataset under a Subset.
        told: the notes of earlier epochs, which are told once; each epoch's audit has its own.
    """

    def __init__(
        self,
        log: LoaderLog,
        beneath: Callable[[Any], str] = lambda index: "",
        told: set[str] | None = None,
    ) -> None:
        self._log, self._beneath = log, beneath
        self._told = set() if told is None else told

    def skipped(
        self, epoch: int, batch: int, incidents: Incidents, failures: Sequence[Failure]
    ) -> None:
        """A line for each sample."""
        for index, incident in incidents:
            which = f"{index_text(index)}{self._beneath(index)}"
            said = f"index {which} {incident.what}: {incident.reason}"
            self._log.warning("epoch %d, batch %d: %s", epoch, batch, said)

    def restarted(self, failure: Failure, said: Sequence[str]) -> None:
        """What happened, and what is done about it."""
        for line in said:
            self._log.warning("%s", line)

    def closed(self, epoch: int, notes: Sequence[str]) -> None:
        """What is worth knowing beyond the audit's classes."""
        for note in notes:
            if note not in self._told:
                if len(self._told) < TOLD_MAX:
                    self._told.add(note)
                self._log.warning("epoch %d: %s", epoch, note)


class Dumps:
    """The sink that writes failures as files; of those that end no batch a bounded number."""

    def __init__(self, folder: str | os.PathLike[str], log: LoaderLog) -> None:
        self._folder = folder
        self._log = log
        self._survived = 0

    def failed(self, failure: Failure) -> None:
        """A failure that is raised is always written."""
        dump.write(failure, self._folder, self._log)

    def skipped(
        self, epoch: int, batch: int, incidents: Incidents, failures: Sequence[Failure]
    ) -> None:
        """The failures of samples left out or replaced."""
        for failure in failures:
            self._survived_by_batch(failure)

    def restarted(self, failure: Failure, said: Sequence[str]) -> None:
        """The death of workers that are replaced."""
        self._survived_by_batch(failure)

    def _survived_by_batch(self, failure: Failure) -> None:
        self._survived += 1
        if self._survived <= DUMPS_MAX:
            self.failed(failure)
        elif self._survived == DUMPS_MAX + 1:
            self._log.warning(
                "epoch %s: %d failures of samples left out or replaced are written; no more of "
                "them in this epoch",
                failure.epoch,
                DUMPS_MAX,
            )
