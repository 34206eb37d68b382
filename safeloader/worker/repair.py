"""Goes on in spite of samples that fail. Runs in: worker.

Takes what failed, by position, and gives the samples that the batch is made of, or the batch of
those that can be collated, with a list of what happened to the others. Used only by batches in
which something failed, or with ``retries``.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from safeloader.delivery.manifest import SampleIncident
from safeloader.failures.failure import Failure, is_ours
from safeloader.introspect.random_state import Marks, RandomState
from safeloader.introspect.redaction import scrub
from safeloader.introspect.resource_exhaustion import never_skipped
from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.values import bounded, exception_text, short_type_name, type_name
from safeloader.worker.collating import FaultySample, explain
from safeloader.worker.policy import SKIP, Policy
from safeloader.worker.validating import CheckFault, refused_by

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 5.0
_GAP = object()
_FAILURES_MAX = 20  # of a batch, that travel with it
ON_ERROR_FAULT = "raised by on_error=, not by the dataset"
GIVEN_FAULT = "raised on what on_error= gave in the sample's place"
STRUCK = "raised by a signal handler, not by the dataset"
NO_DONOR = (
    "no sample of this batch came, and nothing drawn earlier in this epoch could stand in for it: "
    "on_error='replace' raises rather than hand over a batch less"
)
Donors = Iterable[tuple[tuple[Any, ...], Any]]


def struck(exc: Exception, phase: str) -> bool:
    """Whether a signal handler raised it, a time limit of the user's perhaps, and not in a sample.

    What strikes in the dataset's own code is a fault of the sample: it may be the limit that the
    dataset sets for each. Anywhere else it is none, and goes to the training loop.
    """
    frame = raised_by_signal(exc)
    return frame is not None and (phase != "sample" or is_ours(frame))


def no_fault_of_a_sample(exc: BaseException) -> bool:
    """Whether leaving the sample out would help nobody: of a broken program, machine or check."""
    return isinstance(exc, CheckFault) or never_skipped(exc)


class Unrepairable(Exception):
    """A sample failed and must not be left out; ``position`` is None where none is known to be."""

    def __init__(self, position: int | None, cause: Exception, text: str = "") -> None:
        super().__init__(position)
        self.position = position
        self.cause = cause
        self.text = text


class BatchRepair:
    """One batch in the making.

    Args:
        policy: what the loader was told to do.
        explain: makes the failure that an ``on_error`` callable is asked about.
        donors: identities and sample of what was drawn earlier and comes, the nearest first; read
            only where no sample of the batch came.
        spread: how many indices the one sample stands for, which the dataset makes together.
        source: tells the file or entry of the sample at a position, for what is said of it.
        accept: raises where what ``on_error`` gave for a position is refused by ``validate=``.

    Attributes:
        places: the position of each sample of :meth:`batch`.
        lent: the identities of the donor in use.
        last_failure: of the newest sample, unless it came.
    """

    def __init__(
        self,
        policy: Policy,
        explain: Callable[[Exception, int], Failure],
        donors: Donors = (),
        spread: int = 1,
        source: Callable[[Exception | None, int], str] = lambda exc, position: "",
        accept: Callable[[Any, int], object] = lambda sample, position: None,
    ) -> None:
        self._policy = policy
        self._explain = explain
        self._source = source
        self._accept = accept
        self._donors = iter(donors)
        self.spread = spread
        self._samples: list[Any] = []
        self._stand_in: list[Any] = []  # one sample, or none
        self._incidents: dict[int, SampleIncident] = {}
        self._failures: dict[int, Failure] = {}
        self._first: Unrepairable | None = None
        self._marks = Marks()
        self.places: list[int] = []
        self.lent: tuple[Any, ...] = ()
        self.last_failure: Exception | None = None

    def have(self, samples: Sequence[Any]) -> None:
        """Samples that came without trouble, the next in order."""
        self._samples += samples

    def fetch(
        self, get: Callable[[], Any], failed: Exception | None = None, *, may_end: bool = False
    ) -> None:
        """The next sample by ``get()``, asked for again if it fails.

        ``failed`` is what a first try, made elsewhere, raised. With ``may_end`` a ``StopIteration``
        is the end of a stream and no failure, and a sample that a check refused is not asked for
        again: the next one would come. Before each further try the random numbers are put
        back, so that a sample that comes late is the one that would have come.

        Raises:
            Unrepairable: if it fails for good, and is not to be left out.
            StopIteration: as ``get()`` raises it.
        """
        position, state = self.asked, self._marks.mark()
        tries, self.last_failure = 0 if failed is None else 1, failed
        while failed is None or (
            tries <= self._policy.retries and not no_fault_of_a_sample(failed)
        ):
            if may_end and failed is not None and refused_by(failed)[0]:
                break
            if failed is not None:
                time.sleep(min(_FIRST_PAUSE_S * 2 ** (tries - 1), _LONGEST_PAUSE_S))
                RandomState(*state).set()
            tries += 1
            try:
                self._samples.append(get())
            except Exception as exc:
                if (may_end and isinstance(exc, StopIteration)) or struck(exc, "sample"):
                    raise
                self.last_failure = failed = exc
                continue
            self.last_failure = None
            if tries > 1:
                self._incidents[position] = SampleIncident("late", position, f"came at try {tries}")
            return
        self._samples.append(_GAP)
        self.give_up(position, failed)

    def leave_out(self, reason: str) -> None:
        """The next sample is not to be asked for at all."""
        self._samples.append(_GAP)
        cause, position = RuntimeError(reason), self.asked - 1
        self._skip(position, cause, self._with_source(reason, cause, position))

    def give_up(self, position: int, failed: Exception, found: str = "") -> None:
        """Do without the sample at ``position``; ``found`` says more than ``failed``."""
        on_error, tries = self._policy.on_error, self._policy.retries + 1
        if no_fault_of_a_sample(failed):
            raise Unrepairable(position, failed)
        if on_error == "raise":
            text = f"it failed in each of {tries} tries, all under the same random numbers"
            raise Unrepairable(position, failed, text if tries > 1 else "")
        reason = bounded(scrub(found), 300) or self._reason(failed)
        # The locals of a collate function are those of any sample.
        reason = self._with_source(reason, None if found else failed, position)
        self._skip(position, failed, reason)
        tells = self._policy.tells and len(self._failures) < _FAILURES_MAX
        failure = self._explain(failed, position) if tells or callable(on_error) else None
        if tells and failure is not None:  # what only a raised error needs stays here
            self._failures[position] = dataclasses.replace(failure, _exception_parts=None)
        if callable(on_error):
            try:
                answer = on_error(failure)
            except Exception as exc:
                raise Unrepairable(position, exc, ON_ERROR_FAULT) from failed
            if answer is not SKIP:
                try:
                    self._accept(answer, position)
                except Exception as exc:
                    raise Unrepairable(position, exc, GIVEN_FAULT) from failed
                self._samples[position] = answer
                self._incidents[position] = SampleIncident("replaced", position, reason)

    def _skip(self, position: int, cause: Exception, reason: str) -> None:
        self._samples[position] = _GAP
        self._incidents[position] = SampleIncident("skipped", position, reason)
        self._first = self._first or Unrepairable(position, cause, NO_DONOR)

    def _with_source(self, reason: str, cause: Exception | None, position: int) -> str:
        source = self._source(cause, position)
        return f"{reason}; {source}" if source else reason

    def _reason(self, failed: Exception) -> str:
        tries = f", {self._policy.retries + 1} tries" if self._policy.retries else ""
        said = scrub(bounded(exception_text(failed), 1000))
        name = short_type_name(type_name(type(failed)))
        return bounded(f"{name}: {said}" if said else name, 300) + tries

    def batch(self) -> list[Any]:
        """The samples that came; with ``on_error="replace"`` others fill the gaps.

        The next good sample of the batch is put into a gap. If no sample of the batch is good, one
        that was drawn earlier is put into all gaps.

        Raises:
            Unrepairable: if nothing that was drawn earlier comes either.
        """
        asked = range(self.asked)
        self.places = there = [k for k in asked if self._samples[k] is not _GAP]
        if self._policy.on_error == "replace" and len(there) < len(asked):
            if not there and not self._stand_in:
                self._lend()
            there = there or [len(asked) * self.spread]
            self.places = list(asked)
            for k in asked:
                if self._samples[k] is _GAP:
                    self.places[k] = donor = next((each for each in there if each > k), there[0])
                    told = self._incidents[k]
                    self._incidents[k] = told._replace(what="replaced", donor=donor, lent=self.lent)
        return self._stand_in * len(asked) or [self._samples[k] for k in self.places]

    def _lend(self) -> None:
        """Take the next donor.

        Raises:
            Unrepairable: if there is none; then the first failure of the batch is told.
        """
        try:
            self.lent, sample = next(self._donors)
        except StopIteration:
            assert self._first is not None
            raise self._first from None
        self._stand_in = [sample]

    def collated(
        self,
        collate: Callable[[list[Any]], Any],
        indices: Sequence[Any],
        failed: Exception | None,
    ) -> tuple[Any, list[Any]]:
        """The batch and its samples, without those that are clearly not like the others.

        Args:
            collate: makes a batch of samples.
            indices: the identities of the samples; none where there are no samples to compare.
            failed: what it raised of the samples as they came.

        Raises:
            Unrepairable: with what ``collate`` raised, where no sample is clearly to blame.
        """
        blamed: set[int] = set()
        while samples := self.batch():
            if failed is None:
                try:
                    return collate(samples), samples
                except Exception as exc:
                    if struck(exc, "collate"):
                        raise
                    failed = exc
            if self.lent and not no_fault_of_a_sample(failed):
                self._lend()
            else:
                places = self.places if indices and not self.lent else []
                known = [indices[k] for k in places]
                found = (explain(samples, known) if known else None) or FaultySample()
                odd = [k for k in range(len(places)) if samples[k] is None] or found.odd
                positions = {places[k] for k in odd}
                # A replacement that is no better is given up once.
                if self._policy.on_error == "raise" or not positions or positions & blamed:
                    at = 0 if self.asked == 1 and not self.lent else None
                    at = at if found.position is None else places[found.position]
                    raise Unrepairable(at, failed, found.text) from None
                blamed |= positions
                for position in sorted(positions):
                    self.give_up(position, failed, found.text or "it is None")
            failed = None
        return None, []

    @property
    def asked(self) -> int:
        """How many samples were asked for so far."""
        return len(self._samples)

    @property
    def incidents(self) -> tuple[SampleIncident, ...] | None:
        """What happened, by position; None for nothing."""
        told = []
        for position, each in sorted(self._incidents.items()):
            for k in range(self.spread):  # what is made together is gone together
                donor = None if each.donor is None else each.donor + k
                told.append(each._replace(position=position + k, donor=donor))
        return tuple(told) or None

    @property
    def failures(self) -> tuple[Failure, ...] | None:
        """The failures of samples left out or replaced, by position, with ``on_failure_dump``."""
        return tuple(self._failures[k] for k in sorted(self._failures)) or None
