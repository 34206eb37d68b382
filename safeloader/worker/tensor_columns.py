"""Batches of a TensorDataset, each column gathered at once. Runs in: worker.

Without workers, and under ``default_collate``: a row of a tensor for each sample, stacked again, is
what ``index_select`` gives in one call, bit for bit. Used only where nobody could tell: torch's own
dataset, methods and collation, plain tensors, plain indices, no mode that watches the calls. In any
other case, and where something is raised, the batch is made sample by sample, as torch does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset, TensorDataset, default_collate, get_worker_info

from safeloader import _torch
from safeloader.introspect.signals import raised_by_signal

Gather = Callable[[list[Any], bytes], list[torch.Tensor] | None]
_INTS = {int}
_OF_SUBSET = {"dataset", "indices"}


def columns_of(dataset: Any, collate_fn: Any) -> Gather | None:
    """What makes a batch in one go, or gives None for one that it cannot make; hot path.

    It is given the indices, and the same as int64 bytes.

    Returns:
        None where the dataset is no plain TensorDataset, nor a Subset of one by a list.

    >>> from safeloader.delivery.indices import pack
    >>> gather = columns_of(TensorDataset(torch.arange(9), torch.eye(9)), default_collate)
    >>> [column.shape for column in gather([4, 1], pack([4, 1]))]
    [torch.Size([2]), torch.Size([2, 9])]
    >>> gather([4, -1], pack([4, -1])) is None
    True
    """
    if collate_fn is not default_collate or get_worker_info() is not None:
        return None
    if not _torch.has_own_methods(TensorDataset, Subset):
        return None
    if _columns(dataset) is None:
        return None
    subset = dataset if type(dataset) is Subset else None

    def gather(indices: list[Any], packed: bytes) -> list[torch.Tensor] | None:
        try:
            if type(indices) is not list or {*map(type, indices)} != _INTS:
                return None
            columns = _columns(dataset)  # a loop may have changed it
            if columns is None:
                return None
            if subset is None:
                numbers = np.frombuffer(packed, np.int64).copy()
            else:
                if min(indices) < 0:
                    return None
                chosen = subset.indices
                indices = [chosen[k] for k in indices]
                if {*map(type, indices)} != _INTS:
                    return None
                numbers = np.array(indices)
            tensors = columns.tensors
            for column in tensors:
                if not _is_plain(column):
                    return None
            if not _torch.collates_as_torch_does() or _torch.calls_are_watched():
                return None
            rows = torch.from_numpy(numbers)
            return [column.index_select(0, rows) for column in tensors]  # raises below 0
        except Exception as exc:
            if raised_by_signal(exc):
                raise
            return None

    return gather


def _columns(dataset: Any) -> TensorDataset | None:
    """The TensorDataset that it is, or is a Subset of by a list, as it is now; hot path."""
    columns = dataset
    if type(dataset) is Subset:
        if type(dataset.indices) is not list or not vars(dataset).keys() <= _OF_SUBSET:
            return None
        columns = dataset.dataset
    is_plain = type(columns) is TensorDataset and not hasattr(columns, "__getitems__")
    return columns if is_plain else None


def _is_plain(column: Any) -> bool:
    """Whether rows of it, stacked again, are what ``index_select`` gives, to the strides."""
    return (
        type(column) is torch.Tensor
        and column.is_cpu
        and column.layout is torch.strided
        and column.is_contiguous()
        and not column.requires_grad
        and not (column.is_quantized or column.is_nested or column.is_conj() or column.is_neg())
    )
