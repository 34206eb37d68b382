"""Warnings, which raise nothing in a program that did not ask for us. Runs in: main."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable

instead: Callable[[str], object] | None = None
"""In a launched program, who is told where warnings are errors there. None: the warning raises."""

_BETWEEN = re.compile(r"safeloader(\.|$)|sitecustomize$|torch\.utils\.data\.dataloader$")


def warn(text: str) -> None:
    """A ``RuntimeWarning`` that points to the line that asked for an epoch or a batch.

    Frames of ours and of torch's are passed over; they differ between the ways in.

    Raises:
        RuntimeWarning: where warnings are errors, and nobody is told ``instead``.
    """
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _BETWEEN.match(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=level)
    except RuntimeWarning:
        if instead is None:
            raise
        instead(text)
