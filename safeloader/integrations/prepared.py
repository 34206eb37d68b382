"""A loader of ours as an ``Accelerator`` wants one: dealt out, on its device. Runs in: main.

``accelerator.prepare`` makes every loader again as torch's class, or as torchdata's. Here the class
stays ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from accelerate.utils import send_to_device
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler, SequentialSampler

from safeloader.failures.loader_log import LoaderLog, length_of
from safeloader.global_batches import GlobalBatchSampler, Tail
from safeloader.loader import KEYWORDS
from safeloader.stateful import SafeStatefulDataLoader
from safeloader.worker.dataset_states import has_state

T_co = TypeVar("T_co", covariant=True)
_KEPT = (
    *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator"),
    *("multiprocessing_context", "prefetch_factor", "persistent_workers", "pin_memory_device"),
    *("in_order", "snapshot_every_n_steps", *KEYWORDS),
)


class PreparedDataLoader(SafeStatefulDataLoader[T_co], DataLoaderStateMixin):
    """A loader that tells an ``Accelerator`` where it is.

    What :func:`~safeloader.integrations.accelerate.prepare` makes. Its batches are on the
    accelerator's device. ``end_of_dataloader`` is True from the last batch on, so that gradients
    that are accumulated are applied then, and ``remainder`` is the number of samples in the last
    global batch that are not padding, for ``gather_for_metrics``. The end of a stream is not known
    before it comes.
    """

    _accelerator: Any = None
    _is_accelerate_prepared = True  # accelerator.prepare() leaves it as it is
    _drop_last = True
    gradient_state: Any = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # an iterator of ours
        """The next epoch, which a :class:`~safeloader.GlobalBatchSampler` is told."""
        self.set_epoch(self._place().next_epoch)
        batches = super().__iter__()
        return self._followed(batches)

    def _followed(self, batches: Iterator[Any]) -> Iterator[Any]:
        accelerator, self.gradient_state = self._accelerator, GradientState()
        length = None if isinstance(self.dataset, IterableDataset) else length_of(self)
        self.begin()
        try:
            for batch in batches:
                self.end_of_dataloader = self._place().handed_over == length
                if accelerator is not None and accelerator.device_placement:
                    device, late = accelerator.device, accelerator.non_blocking
                    batch = send_to_device(batch, device, non_blocking=late)
                yield batch
        finally:
            self.end()

    def begin(self) -> None:
        """An epoch begins. How many are drawn may be another number than the dataset has."""
        super().begin()
        if not self._drop_last:
            self.remainder = _drawn(self) % self.total_batch_size

    @property
    def total_batch_size(self) -> int:
        """How many samples all processes together have in a batch."""
        sampler = self.batch_sampler
        if type(sampler) is GlobalBatchSampler:
            return sampler.global_batch
        return int(self.batch_size or 1)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the accelerator's, which is of this process."""
        return super().__getstate__() | {"_accelerator": None, "gradient_state": None}


def prepared(
    accelerator: Accelerator, loader: SafeStatefulDataLoader[T_co]
) -> PreparedDataLoader[T_co]:
    """As ``safeloader.integrations.accelerate.prepare`` says."""
    if isinstance(loader, PreparedDataLoader):
        return loader
    if type(loader) is not SafeStatefulDataLoader:
        raise TypeError(
            f"prepare() takes a SafeStatefulDataLoader, and this is a {type(loader).__qualname__}: "
            "make it one, or give it to accelerator.prepare"
        )
    made: PreparedDataLoader[T_co] = PreparedDataLoader(
        loader.dataset,
        **_draws(accelerator, loader),
        **{name: getattr(loader, name) for name in _KEPT},
    )
    made._accelerator = accelerator
    made._drop_last = _leaves_out(made)
    if accelerator.num_processes > 1 and has_state(loader.dataset):
        LoaderLog(loader.dataset, kind=type(made).__name__).warning(
            "the dataset has a state of its own, and Accelerate saves that of the main process "
            "alone: after load_state() each process has it. Where they differ, save "
            "loader.state_dict() in each"
        )
    state, epoch = loader._place().given
    if state is not None:
        made.load_state_dict(state)
    elif epoch is not None:
        made.set_epoch(epoch)
    accelerator.register_for_checkpointing(made)
    return made


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
        lacks = [
            *(["seed="] if loader.seed is None else []),
            *([] if type(batches) is BatchSampler else ["a batch_size"]),
            *([] if _is_torchs(sampler) else ["no sampler of its own (shuffle=True or False)"]),
        ]
        raise ValueError(
            f"this loader cannot be dealt out to several processes: give it {' and '.join(lacks)}, "
            "or batch_sampler=GlobalBatchSampler(...)"
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


def _drawn(loader: PreparedDataLoader[Any]) -> int:
    """How many indices an epoch has, over all processes; 0 where no batch is known to be short."""
    batches: Any = loader.batch_sampler
    if type(batches) is GlobalBatchSampler:
        return batches.length
    return (length_of(batches.sampler) or 0) if type(batches) is BatchSampler else 0


def _leaves_out(loader: PreparedDataLoader[Any]) -> bool:
    """Whether no global batch is shorter than the others, or filled up."""
    sampler = loader.batch_sampler
    return sampler.tail == "drop" if type(sampler) is GlobalBatchSampler else loader.drop_last
