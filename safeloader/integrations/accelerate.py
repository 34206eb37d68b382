"""The metrics of a loader in Accelerate's trackers. Runs in: main."""

from __future__ import annotations

import warnings
from typing import Any

from accelerate import Accelerator

from safeloader.integrations.logged import metrics_of_all, unrecorded


def log_with_accelerate(
    accelerator: Accelerator,
    loader: Any,
    step: int | None = None,
    *,
    last: int | None = None,
    prefix: str = "data",
) -> None:
    """Log the metrics of a prepared loader in the trackers of an ``Accelerator``.

    ``accelerator.prepare`` makes every loader again as torch's own class: give what it returns to
    :func:`safeloader.instrument`, or start the program with ``python -m safeloader run``.

    Args:
        accelerator: whose ``log`` is called; it logs in the main process only.
        loader: what ``accelerator.prepare`` returned.
        step: the number of the training step.
        last: look at this many of the newest batches only; by default at all of the epoch.
        prefix: the word before the name of each metric.

    Raises:
        ValueError: if ``last`` is not a positive number.

    Example:
        ::

            loader = safeloader.instrument(accelerator.prepare(loader))
            for step, batch in enumerate(loader):
                ...
                if step % 50 == 49:
                    log_with_accelerate(accelerator, loader, step, last=50)
    """
    metrics = metrics_of_all(loader, prefix, last)
    if metrics:
        accelerator.log(metrics, step=step)
    else:
        warnings.warn(unrecorded(loader), stacklevel=2)
