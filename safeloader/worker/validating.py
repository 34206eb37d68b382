"""A dataset whose samples are checked as they come. Runs in: worker.

A check that raises is like a dataset that raises, so ``retries`` and ``on_error`` apply. The
exception remembers which check it was, for the report. Where one of our own checks breaks, no
sample is at fault: that is raised at once, whatever ``on_error`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from safeloader.checks.schema import FirstSample, Schema
from safeloader.errors import ValidationError
from safeloader.introspect.frames import frames_of, is_foreign
from safeloader.introspect.resource_exhaustion import never_skipped
from safeloader.introspect.texts import bounded_text
from safeloader.introspect.values import cut, exception_text, type_name

Check = Callable[[Any, Any], object]
MARK = "_refused_by"  # on the exception


class CheckFault(RuntimeError):
    """One of our own checks could not look at a sample, of which nothing is known for that."""

    def __init__(self, check: Check, exc: Exception) -> None:
        super().__init__(
            f"checks.{name_of(check)} could not look at the sample, by a fault of safeloader's "
            f"own: {type_name(type(exc))}: {cut(exception_text(exc), 300)}. No sample was refused"
        )


class Validation:
    """The checks of one worker, in their order."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self._checks = [each.for_one_worker() if type(each) is Schema else each for each in checks]
        self._firsts = [each for each in self._checks if type(each) is FirstSample]

    def __call__(self, sample: Any, index: Any, position: int | None = None) -> None:
        """Raise what the first check raises that refuses the sample."""
        for check in self._checks:
            try:
                if is_no(check(sample, index)):
                    raise ValidationError(f"it returned False for {bounded_text(sample)}")
            except Exception as exc:
                if _is_fault_of_ours(check, exc):
                    raise CheckFault(check, exc) from exc
                with suppress(Exception):  # a class that takes no attributes
                    setattr(exc, MARK, (name_of(check), position))
                raise

    def news(self) -> tuple[tuple[Any, int, str], ...] | None:
        """What this worker's first sample looks like, once; None as a rule."""
        untold = [each.untold for each in self._firsts if each.untold is not None]
        for each in self._firsts:
            each.untold = None
        return tuple(untold) or None


def is_no(answer: Any) -> bool:
    """Whether a check answered False, instead of raising: in plain Python, NumPy or torch."""
    if answer is None or answer is True:
        return False
    if answer is False:
        return True
    if type(answer) is np.bool_:
        return not answer
    whole = type(answer) is torch.Tensor and answer.dtype is torch.bool and answer.ndim == 0
    return whole and not bool(answer)


class ValidatedItems:
    """``dataset[index]`` and ``__getitems__`` of a map-style dataset, checked."""

    def __init__(self, dataset: Any, validation: Validation) -> None:
        self._dataset = dataset
        self._validation = validation

    def __getitem__(self, index: Any) -> Any:
        sample = self._dataset[index]
        self._validation(sample, index)
        return sample

    def __getitems__(self, indices: Any) -> Any:
        asked = list(indices)
        samples = self._dataset.__getitems__(indices)
        if isinstance(samples, list | tuple):
            for position, (sample, index) in enumerate(zip(samples, asked, strict=False)):
                self._validation(sample, index, position)
        return samples


class ValidatedStream(Iterator[Any]):
    """A worker's stream, checked; ``index`` tells that of the sample which is asked for."""

    def __init__(
        self, stream: Iterator[Any], validation: Validation, index: Callable[[], Any]
    ) -> None:
        self._stream = stream
        self._validation = validation
        self._index = index

    def __next__(self) -> Any:
        sample = next(self._stream)
        self._validation(sample, self._index())
        return sample


def _is_fault_of_ours(check: Any, exc: Exception) -> bool:
    """Whether a check of ours raised what is no refusal, and no code but ours and torch's did."""
    if isinstance(exc, ValidationError) or not _is_ours(check) or never_skipped(exc):
        return False
    return not any(is_foreign(each.frame.f_code.co_filename) for each in frames_of(exc))


def _is_ours(check: Any) -> bool:
    return type(check).__module__.startswith("safeloader.")


def name_of(check: Any) -> str:
    """A check as the user would name it."""
    if _is_ours(check):
        return repr(check)
    name = getattr(check, "__qualname__", None)
    return name if isinstance(name, str) else bounded_text(check)


def refused_by(exc: BaseException) -> tuple[str, int | None]:
    """Which check raised this, and on which position of a batch fetched at once; ``("", None)``."""
    found = getattr(exc, MARK, None)
    return found if type(found) is tuple else ("", None)
