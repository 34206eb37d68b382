"""What a loader is, as far as another has to be alike to go on from its states. Runs in: main."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler, IterableDataset

from safeloader import _torch
from safeloader.failures.loader_log import length_of
from safeloader.global_batches import GlobalBatchSampler
from safeloader.introspect.ranks import place
from safeloader.main.saved_state import SavedState


def facts_of(loader: Any, length: int | None = None) -> SavedState:
    """A state that says what the loader is, and not where; ``length``: of its dataset, if known."""
    sampler = _torch.index_sampler(loader)
    own, at = type(sampler) is BatchSampler, place()
    return SavedState(
        length=length_of(loader.dataset) if length is None else length,
        batch_size=loader.batch_size if own else None,
        seed=loader.seed,
        seed_per=None if loader.seed is None else loader.seed_per,
        world_size=at.world_size,
        rank=at.rank,
        order=sampler.made_from() if type(sampler) is GlobalBatchSampler else {},
        stream=isinstance(loader.dataset, IterableDataset),
        workers=int(loader.num_workers),
    )


def order_of(sampler: Any) -> dict[str, Any]:
    """What the order of the epoch that begins is made from, and its digest; {} if not ours."""
    if type(sampler) is not GlobalBatchSampler:
        return {}
    return sampler.made_from() | {"digest": sampler.order_digest()}
