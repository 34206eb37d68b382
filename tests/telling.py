"""Everything there is to tell about a batch, so that two of them can be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch


def told(part: Any, seen: tuple[int, ...] = ()) -> Any:
    if id(part) in seen:
        return "seen", seen.index(id(part))
    seen = (*seen, id(part))
    name = type(part).__qualname__
    if isinstance(part, torch.Tensor):
        return name, *of_tensor(part)
    if isinstance(part, torch.UntypedStorage):
        return name, bytes(part.tolist())
    if isinstance(part, np.ndarray) and not part.dtype.hasobject:
        flags = part.flags
        what = str(part.dtype), part.shape, part.strides, flags.writeable, flags.aligned
        # Text of a length of its own, and bytes that mean nothing: to be compared by value.
        by_value = part.dtype.kind == "T" or part.dtype.names or part.dtype.char == "g"
        return name, *what, repr(part.tolist() if by_value else part.tobytes())
    if isinstance(part, np.ndarray):
        return name, part.shape, told(part.tolist(), seen)
    if isinstance(part, np.generic):
        return name, str(part.dtype), repr(part)
    if isinstance(part, Mapping):
        return name, [(key, told(each, seen)) for key, each in part.items()]
    if isinstance(part, str | bytes | bytearray | range | int | float | complex):
        return name, repr(part)
    if isinstance(part, Sequence):
        return name, [told(each, seen) for each in part]
    if dataclasses.is_dataclass(part):
        fields = [field.name for field in dataclasses.fields(part)]
        return name, [(field, told(getattr(part, field), seen)) for field in fields]
    if hasattr(part, "__dict__"):
        return name, [(key, told(each, seen)) for key, each in vars(part).items()]
    return name, repr(part)


def of_tensor(tensor: torch.Tensor) -> Any:
    kind = str(tensor.dtype), str(tensor.layout), str(tensor.device), tensor.requires_grad
    flags = tensor.is_leaf, tensor.is_conj(), tensor.is_neg(), tensor._is_view()
    if tensor.is_nested:
        return *kind, *flags, [told(each) for each in tensor.detach().unbind()]
    shape = *kind, *flags, tuple(tensor.shape)
    if tensor.is_meta:
        return shape
    plain: Any = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        return *shape, tensor.is_coalesced(), told(plain._indices()), told(plain._values())
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return *shape, *map(told, (plain.crow_indices(), plain.col_indices(), plain.values()))
    if tensor.layout is torch.sparse_csc:
        return *shape, *map(told, (plain.ccol_indices(), plain.row_indices(), plain.values()))
    if tensor.is_quantized:
        return shape  # torch loses the rest, and crashes where it is asked for
    note = getattr(tensor, "note", None)
    data = plain.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    return *shape, tensor.stride(), note, data.numpy().tobytes()


def writable(part: Any, depth: int = 0) -> Iterator[Any]:
    """The tensors and arrays of a batch."""
    if isinstance(part, torch.Tensor | np.ndarray):
        if not getattr(part, "is_quantized", False):
            yield part
    elif depth < 4 and isinstance(part, Mapping):
        for each in part.values():
            yield from writable(each, depth + 1)
    elif depth < 4 and isinstance(part, list | tuple):
        for each in part:
            yield from writable(each, depth + 1)
    elif isinstance(part, torch.UntypedStorage):
        pass  # which holds its memory in a slot
    elif depth < 4 and hasattr(part, "__dict__"):
        yield from writable(vars(part), depth + 1)


def after_changes(batch: Any) -> Any:
    """What each change in place does to the batch: by whom memory is shared, and what may be."""
    seen = []
    for part in writable(batch):
        try:
            with torch.no_grad():
                if isinstance(part, torch.Tensor):
                    part[...] = part[...] * 0 + 1
                    part.detach_()
                    part.untyped_storage().resize_(1 << 20)
                else:
                    part[...] = part[::-1].copy()
            what: Any = None
        except Exception as exc:
            what = type(exc).__name__, str(exc)[:40]
        seen.append((what, told(batch)))
    return seen
