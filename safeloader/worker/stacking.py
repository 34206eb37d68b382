"""How samples become a batch: as torch does it, and faster for tuples of tensors. Runs in: worker.

Those are the commonest samples of a loader without workers, a ``TensorDataset``'s for one. The walk
of ``default_collate`` through their types takes 4 of 30 µs for a batch of 64, about what all
records of the batch take. The first sample decides here too, and ``torch.stack`` is called alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import default_collate, get_worker_info

from safeloader import _torch
from safeloader.introspect.signals import raised_by_signal


def collation_by(stock: Any) -> Callable[[Any], Any]:
    """What makes a batch of its samples, as torch's fetcher ``stock`` would; hot path."""
    collate_fn = stock.collate_fn
    if not stock.auto_collation:
        return lambda samples: collate_fn(samples[0])

    def collated(samples: Any) -> Any:
        # A copy of the list: the function may take it apart.
        return collate_fn(list(samples) if type(samples) is list else samples)

    if collate_fn is default_collate and get_worker_info() is None:
        return lambda samples: stacked(samples) or collated(samples)
    return collated


def stacked(samples: Any) -> list[torch.Tensor] | None:
    """What ``default_collate`` makes of tuples of tensors; None of anything else. Hot path.

    None also where it would raise, so that its own error is the one that is told.
    """
    if type(samples) is not list or not samples or type(samples[0]) is not tuple:
        return None
    if not _torch.collates_tuples_of_tensors_itself():
        return None
    first = samples[0]
    for each in first:
        if type(each) is not torch.Tensor or each.layout is not torch.strided or each.is_nested:
            return None
    try:
        return [torch.stack(column, 0) for column in zip(*samples, strict=True)]
    except Exception as exc:
        if raised_by_signal(exc):
            raise
        return None
