"""Which sample keeps a batch from being sent, and what in it. Runs in: worker."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from time import monotonic
from typing import Any, NamedTuple

from safeloader.introspect.pickling import find_unpicklable
from safeloader.introspect.resource_exhaustion import shortage

_BOUND_S = 5.0


class FaultySample(NamedTuple):
    """The position in its batch of the sample at fault, and what was found out about it."""

    position: int | None
    text: str = ""


def why_not_sent(
    exc: Exception, batch: Any, samples: Sequence[Any], indices: Sequence[Any]
) -> FaultySample:
    """What of ``batch`` cannot be pickled, looked for in its samples first.

    Args:
        exc: what pickling raised.
        batch: what the collate function made.
        samples: what it was made of, where that is known one by one.
        indices: the dataset index of each.
    """
    short = shortage(exc)
    if short is not None:
        return FaultySample(None, short)
    folder = tempfile.tempdir
    if isinstance(exc, FileNotFoundError) and folder and not os.path.isdir(folder):
        return FaultySample(
            None,
            f"the temporary folder {folder} is gone, and torch needs it to hand tensors over\n"
            "make it again, or set TMPDIR to a folder that stays",
        )
    give_up = monotonic() + _BOUND_S
    if isinstance(samples, list | tuple) and len(samples) == len(indices):
        for position, sample in enumerate(samples):
            left = give_up - monotonic()
            if left <= 0:
                break
            found = find_unpicklable(sample, "sample", spawning=False, bound_s=left)
            if found is not None:
                return FaultySample(position, f"it cannot be pickled: {found}\n{found.advice}")
    left = max(give_up - monotonic(), 1.0)
    found = find_unpicklable(batch, "batch", spawning=False, bound_s=left)
    if found is None:
        return FaultySample(None, "")
    return FaultySample(None, f"it cannot be pickled: {found}\n{found.advice}")
