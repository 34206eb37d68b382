"""A loader in Accelerate: its metrics in the trackers, its place in the checkpoints. Runs in: main.

``accelerator.prepare`` makes every loader again as torch's class, or as torchdata's. ``prepare``
here does what it does to a loader, and the class stays ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from accelerate.utils import send_to_device
from torch.utils.data import (
    BatchSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from safeloader.global_batches import GlobalBatchSampler, Tail
from safeloader.integrations.logged import metrics_of_all, unrecorded
from safeloader.loader import KEYWORDS
from safeloader.stateful import SafeStatefulDataLoader

T_co = TypeVar("T_co", covariant=True)
_KEPT = (
    *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator"),
    *("multiprocessing_context", "prefetch_factor", "persistent_workers", "pin_memory_device"),
    *("in_order", "snapshot_every_n_steps", *KEYWORDS),
)


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


class PreparedDataLoader(SafeStatefulDataLoader[T_co], DataLoaderStateMixin):
    """What :func:`prepare` makes: a loader that tells an ``Accelerator`` where it is.

    Its batches are on the accelerator's device. ``end_of_dataloader`` is True from the last batch
    on, so that gradients that are accumulated are applied then, and ``remainder`` is the number of
    samples in the last global batch that are not padding, for ``gather_for_metrics``.
    """

    _accelerator: Any = None
    _drop_last = True

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # an iterator of ours
        """The next epoch, which a :class:`~safeloader.GlobalBatchSampler` is told."""
        self.set_epoch(self._place().next_epoch)
        batches = super().__iter__()
        return self._followed(batches)

    def _followed(self, batches: Iterator[Any]) -> Iterator[Any]:
        accelerator, self.gradient_state = self._accelerator, GradientState()
        length = None if isinstance(self.dataset, IterableDataset) else len(self)
        self.begin()
        try:
            for batch in batches:
                newest = self.last_batch
                self.end_of_dataloader = newest is not None and newest.batch + 1 == length
                if accelerator is not None and accelerator.device_placement:
                    device, late = accelerator.device, accelerator.non_blocking
                    batch = send_to_device(batch, device, non_blocking=late)
                yield batch
        finally:
            self.end()

    @property
    def total_batch_size(self) -> int:
        """How many samples all processes together have in a batch."""
        sampler = self.batch_sampler
        if type(sampler) is GlobalBatchSampler:
            return sampler.global_batch
        return int(self.batch_size or 1)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the accelerator, which is of this process."""
        return super().__getstate__() | {"_accelerator": None}


def prepare(
    accelerator: Accelerator, loader: SafeStatefulDataLoader[T_co]
) -> PreparedDataLoader[T_co]:
    """Prepare a loader for an ``Accelerator``, with its place in the checkpoints.

    Instead of ``accelerator.prepare(loader)``, which gives torch's class back. The loader is dealt
    out to the processes by a :class:`~safeloader.GlobalBatchSampler` if it has a ``seed`` and a sampler of
    torch's, and registered: ``accelerator.save_state()`` saves where it is, and the first epoch
    after ``accelerator.load_state()`` goes on from there. The batches of the epoch before do not
    come again, on another number of workers too; and on another number of processes, where the
    global batches stay what they were: with ``DataLoaderConfiguration(split_batches=True)``, and to
    or from one process, which pads no batch, with ``drop_last=True`` or ``even_batches=False``.

    Args:
        accelerator: what the training runs by.
        loader: its batches are those of one process, as for ``accelerator.prepare``: global batches
            are ``num_processes`` times as large, unless ``split_batches`` is set. It is left as it
            is, and no longer needed.

    Returns:
        A loader of a class derived from ours, whose batches come on the accelerator's device.

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
    if type(loader) is not SafeStatefulDataLoader:
        raise TypeError(
            f"prepare() takes a SafeStatefulDataLoader, and this is a {type(loader).__qualname__}: "
            "make it one, or give it to accelerator.prepare"
        )
    prepared = PreparedDataLoader(
        loader.dataset,
        **_draws(accelerator, loader),
        **{name: getattr(loader, name) for name in _KEPT},
    )
    prepared._accelerator = accelerator
    prepared._drop_last = _leaves_out(prepared)
    accelerator.register_for_checkpointing(prepared)
    return prepared


def _draws(accelerator: Any, loader: SafeStatefulDataLoader[Any]) -> dict[str, Any]:
    """The arguments by which the indices of this process are drawn."""
    sampler: Any = loader.sampler
    batches: Any = loader.batch_sampler
    several = accelerator.num_processes > 1
    if type(batches) is GlobalBatchSampler:
        return {"batch_sampler": batches}
    if isinstance(loader.dataset, IterableDataset):
        if several:
            raise ValueError(
                "a stream cannot be dealt out to several processes and saved with them: have the "
                "dataset give each process its share, and save loader.state_dict() in each"
            )
        return {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    if loader.seed is not None and type(batches) is BatchSampler and _is_torchs(sampler):
        by = 1 if accelerator.split_batches else accelerator.num_processes
        even: Tail = "pad" if several and accelerator.even_batches else "uneven"
        return {
            "batch_sampler": GlobalBatchSampler(
                len(sampler),
                batches.batch_size * by,
                accelerator.process_index,
                accelerator.num_processes,
                loader.seed,
                "drop" if loader.drop_last else even,
                shuffle=isinstance(sampler, RandomSampler),
            )
        }
    if several:
        raise ValueError(
            "this loader cannot be dealt out to several processes: give it seed= and no sampler of "
            "its own (shuffle=True or False), or batch_sampler=GlobalBatchSampler(...)"
        )
    if batches is None or type(batches) is BatchSampler:
        size = loader.batch_size
        return {"batch_size": size, "sampler": sampler} | (
            {"drop_last": loader.drop_last} if size is not None else {}
        )
    return {"batch_sampler": batches}


def _is_torchs(sampler: Any) -> bool:
    """Whether a sampler gives each index of its dataset once, in order or shuffled."""
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return type(sampler) is SequentialSampler


def _leaves_out(loader: PreparedDataLoader[Any]) -> bool:
    """Whether no global batch is shorter than the others, or filled up."""
    sampler = loader.batch_sampler
    return sampler.tail == "drop" if type(sampler) is GlobalBatchSampler else loader.drop_last
