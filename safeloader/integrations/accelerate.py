"""A loader in Accelerate: metrics in trackers, steps, place in checkpoints. Runs in: main."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from accelerate import Accelerator

from safeloader.instrumenting import loaders_of
from safeloader.integrations.logged import metrics_of_all, unrecorded
from safeloader.stateful import SafeStatefulDataLoader

T_co = TypeVar("T_co", covariant=True)


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


def mark_with_accelerate(loader: Any, step: int) -> None:
    """Note in the run's folder which batch of a prepared loader an optimizer's step is made of.

    As ``loader.mark(step)``, but of the batch that the loop is at: what ``accelerator.prepare``
    makes has fetched the next one already. Call it once for each batch; a step may be made of
    several.

    Args:
        loader: what ``accelerator.prepare`` returned, recorded: see :func:`log_with_accelerate`.
        step: the optimizer's count, 0 or more.

    Raises:
        TypeError: for a step of another kind.
        ValueError: for a negative one; and where the main process dispatches batches to several
            processes, so that a batch of the loop is made of several of the loader.
        LookupError: if no batch was handed over yet.

    Example:
        ::

            step = 0
            for batch in loader:  # safeloader.instrument(accelerator.prepare(loader))
                mark_with_accelerate(loader, step)
                with accelerator.accumulate(model):
                    ...
                step += accelerator.sync_gradients
    """
    from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard  # not for metrics

    found = loaders_of(loader)
    if len(found) != 1:
        warnings.warn(unrecorded(loader), stacklevel=2)
        return
    if isinstance(loader, DataLoaderDispatcher) and loader.state.num_processes > 1:
        raise ValueError(
            "this loader is dispatched by the main process to others, and what they get is made "
            "of several of its batches: with dispatch_batches=False each process reads its own"
        )
    (ours,) = found
    newest = None if ours.recorder is None else ours.recorder.last_delivery()
    is_ahead = isinstance(loader, DataLoaderShard | DataLoaderDispatcher)
    if newest is None or not is_ahead or loader.end_of_dataloader:
        ours.mark(step)
    else:
        ours.mark(step, newest.batch - 1)


def prepare(
    accelerator: Accelerator, loader: SafeStatefulDataLoader[T_co]
) -> SafeStatefulDataLoader[T_co]:
    """Prepare a loader for an ``Accelerator``, with its place in the checkpoints.

    Instead of ``accelerator.prepare(loader)``, which gives torch's class back. The loader is dealt
    out to the processes by a :class:`~safeloader.GlobalBatchSampler` if it has a ``seed`` and a
    sampler of torch's, and registered: ``accelerator.save_state()`` saves where it is, and the
    first epoch after ``accelerator.load_state()`` goes on from there, on another number of workers
    too; and on another number of processes, where the global batches stay what they were: with
    ``DataLoaderConfiguration(split_batches=True)``, and to or from one process, which pads no
    batch, with ``drop_last=True`` or ``even_batches=False``.

    Args:
        accelerator: what the training runs by.
        loader: its batches are those of one process, as for ``accelerator.prepare``: global batches
            are ``num_processes`` times as large, unless ``split_batches`` is set. It is left as it
            is, and no longer needed: a state that was loaded into it, or an epoch that was set,
            goes with what is returned. One that is prepared already is given back.

    Returns:
        A :class:`~safeloader.integrations.prepared.PreparedDataLoader`, whose batches come on the
        accelerator's device.

    Raises:
        TypeError: for a loader of another class.
        ValueError: if it cannot be dealt out to several processes: it has no ``seed``, a sampler of
            its own, or is a stream.

    Example:
        ::

            loader = SafeStatefulDataLoader(dataset, batch_size=32, shuffle=True, seed=11)
            loader = safeloader.integrations.accelerate.prepare(accelerator, loader)
            model, optimizer = accelerator.prepare(model, optimizer)
            accelerator.load_state(folder)  # and the first epoch goes on
    """
    from safeloader.integrations.prepared import prepared  # not for metrics alone

    return prepared(accelerator, loader)
