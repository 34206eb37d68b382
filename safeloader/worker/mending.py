"""Going on in spite of samples that fail; runs where samples are fetched.

Takes what failed, by position, and gives the samples that the batch is made of, with a list of what
happened to the others. Used only by batches in which something failed, or with ``retries``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from safeloader.wire.failure import Failure
from safeloader.wire.policy import SKIP, Policy
from safeloader.wire.random_state import Marks, RandomState
from safeloader.wire.records import Mishap
from safeloader.wire.redaction import scrub
from safeloader.wire.shortage import never_skipped
from safeloader.wire.values import exception_text, type_name
from safeloader.wire.wording import bounded, short_type_name

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 5.0
_GAP = object()
ON_ERROR_FAULT = "raised by on_error=, not by the dataset"


class Unmendable(Exception):
    """A sample failed and must not be left out."""

    def __init__(self, position: int, cause: Exception, text: str = "") -> None:
        super().__init__(position)
        self.position = position
        self.cause = cause
        self.text = text


class Mending:
    """One batch in the making.

    Args:
        policy: what the loader was told to do.
        explain: makes the failure that an ``on_error`` callable is asked about.
    """

    def __init__(self, policy: Policy, explain: Callable[[Exception, int], Failure]) -> None:
        self._policy = policy
        self._explain = explain
        self._samples: list[Any] = []
        self._mishaps: dict[int, Mishap] = {}
        self._places: list[int] = []
        self._marks = Marks()
        self.last_failure: Exception | None = None  # of the newest sample, unless it came

    def have(self, samples: Sequence[Any]) -> None:
        """Samples that came without trouble, the next in order."""
        self._samples += samples

    def fetch(
        self, get: Callable[[], Any], failed: Exception | None = None, *, may_end: bool = False
    ) -> None:
        """The next sample by ``get()``, asked for again if it fails.

        ``failed`` is what a first try, made elsewhere, raised. With ``may_end`` a ``StopIteration``
        is the end of a stream and no failure. Before each further try the random
        numbers are put back, so that a sample that comes late is the one that would have come.

        Raises:
            Unmendable: if it fails for good, and is not to be left out.
            StopIteration: as ``get()`` raises it.
        """
        position = len(self._samples)
        self.last_failure = None
        tries = 1 if failed is not None else 0
        while True:
            state = self._marks.mark()
            if failed is None:
                tries += 1
                try:
                    sample = get()
                except Exception as exc:
                    if may_end and isinstance(exc, StopIteration):
                        raise
                    failed = exc
                else:
                    self._samples.append(sample)
                    self.last_failure = None
                    if tries > 1:
                        reason = f"came at try {tries}"
                        self._mishaps[position] = Mishap("late", position, reason)
                    return
            if never_skipped(failed):
                raise Unmendable(position, failed) from None
            if tries > self._policy.retries:
                break
            time.sleep(min(_FIRST_PAUSE_S * 2 ** (tries - 1), _LONGEST_PAUSE_S))
            RandomState(*state).set()
            self.last_failure, failed = failed, None
        self._samples.append(_GAP)
        self.last_failure = failed
        self.give_up(position, failed)

    def leave_out(self, reason: str) -> None:
        """The next sample is not to be asked for at all."""
        self._mishaps[len(self._samples)] = Mishap("skipped", len(self._samples), reason)
        self._samples.append(_GAP)

    def give_up(self, position: int, failed: Exception, found: str = "") -> None:
        """Do without the sample at ``position``; ``found`` says more than ``failed``."""
        on_error = self._policy.on_error
        if on_error == "raise" or never_skipped(failed):
            raise Unmendable(position, failed, self._tried())
        reason = scrub(bounded(found, 300)) or self._reason(failed)
        self._samples[position] = _GAP
        self._mishaps[position] = Mishap("skipped", position, reason)
        if callable(on_error):
            try:
                answer = on_error(self._explain(failed, position))
            except Exception as exc:
                raise Unmendable(position, exc, ON_ERROR_FAULT) from failed
            if answer is not SKIP:
                self._samples[position] = answer
                self._mishaps[position] = Mishap("replaced", position, reason)

    def _tried(self) -> str:
        retries = self._policy.retries
        if not retries:
            return ""
        return f"it failed in each of {retries + 1} tries, all under the same random numbers"

    def _reason(self, failed: Exception) -> str:
        tries = f", {self._policy.retries + 1} tries" if self._policy.retries else ""
        said = scrub(bounded(exception_text(failed), 1000))
        name = short_type_name(type_name(type(failed)))
        return bounded(f"{name}: {said}" if said else name, 300) + tries

    def batch(self) -> list[Any]:
        """The samples that are there, with others of the batch in the gaps where so wished."""
        there = [k for k, sample in enumerate(self._samples) if sample is not _GAP]
        self._places = there
        if self._policy.on_error == "replace" and there:
            self._places = []
            for k, sample in enumerate(self._samples):
                if sample is not _GAP:
                    self._places.append(k)
                    continue
                donor = next((other for other in there if other > k), there[0])
                self._places.append(donor)
                reason = self._mishaps[k].reason
                self._mishaps[k] = Mishap("replaced", k, reason, donor)
        return [self._samples[k] for k in self._places]

    def positions_of(self, places: Sequence[int]) -> list[int]:
        """Where in the batch asked for the samples at ``places`` of :meth:`batch` came from."""
        return sorted({self._places[place] for place in places})

    @property
    def asked(self) -> int:
        """How many samples were asked for so far."""
        return len(self._samples)

    @property
    def mishaps(self) -> tuple[Mishap, ...] | None:
        """What happened, by position; None for nothing."""
        return tuple(self._mishaps[k] for k in sorted(self._mishaps)) or None
