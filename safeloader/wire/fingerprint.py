"""Fingerprints of a batch's leaves, taken in the worker and compared in main; both processes.

A leaf is a tensor, an array, a string, bytes, a number, None; containers, named tuples and objects
with attributes are walked through. Where a leaf has a row for each sample, each row has a print of
its own, so that what changed is known by its dataset index.

Prints are CRC-32 (``zlib``, which takes some 5 GB/s): made to find accidents, not attacks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch

_DEPTH_MAX = 32


class Leaf(NamedTuple):
    """The print of a leaf.

    Attributes:
        path: where in the batch it is, as one would write it: ``batch['image'][0]``.
        kind: type, dtype and shape.
        prints: one, or one for each sample.
    """

    path: str
    kind: str
    prints: tuple[int, ...]


class Difference(NamedTuple):
    """A leaf that is not what it was.

    ``rows`` are the positions of the samples that changed; None where that cannot be said.
    """

    path: str
    rows: tuple[int, ...] | None


def fingerprint(batch: Any, samples: int | None) -> tuple[Leaf, ...]:
    """The prints of all leaves of ``batch``, which was made of so many ``samples``."""
    return tuple(
        Leaf(path, kind, prints) for path, kind, prints in _leaves(batch, "batch", samples or 0, 0)
    )


def difference(sent: tuple[Leaf, ...], batch: Any, samples: int | None) -> Difference | None:
    """What of ``batch`` is not as it was sent; None if all of it is."""
    came = fingerprint(batch, samples)
    if came == sent:
        return None
    for before, now in zip(sent, came, strict=False):
        if before == now:
            continue
        if (before.path, before.kind) != (now.path, now.kind) or len(before.prints) < 2:
            return Difference(before.path, None)
        pairs = zip(before.prints, now.prints, strict=True)
        return Difference(before.path, tuple(k for k, (a, b) in enumerate(pairs) if a != b))
    return Difference("batch", None)


def _leaves(
    part: Any, path: str, samples: int, depth: int
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    if depth > _DEPTH_MAX:
        return
    depth += 1
    if isinstance(part, torch.Tensor):
        yield from _of_tensor(part, path, samples, depth)
    elif isinstance(part, np.ndarray):
        if part.dtype.hasobject:
            yield from _leaves(part.tolist(), path, samples, depth)
        else:
            whole = np.ascontiguousarray(part)
            kind = f"array {part.dtype} {part.shape}"
            yield path, kind, _rows(whole.ctypes.data, whole.nbytes, part.shape, samples)
    elif isinstance(part, bytes | bytearray):
        yield path, "bytes", (crc32(bytes(part)),)
    elif part is None or isinstance(part, str | int | float | complex | np.generic):
        yield path, type(part).__name__, (crc32(repr(part).encode("utf-8", "replace")),)
    elif isinstance(part, Mapping):
        for key in part:
            yield from _leaves(part[key], f"{path}[{key!r}]", samples, depth)
    elif isinstance(part, tuple) and hasattr(part, "_fields"):
        for name in part._fields:
            yield from _leaves(getattr(part, name), f"{path}.{name}", samples, depth)
    elif isinstance(part, list | tuple):
        for k, each in enumerate(part):
            yield from _leaves(each, f"{path}[{k}]", samples, depth)
    else:
        for name, each in getattr(part, "__dict__", {}).items():
            yield from _leaves(each, f"{path}.{name}", samples, depth)


def _of_tensor(
    tensor: torch.Tensor, path: str, samples: int, depth: int
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    if tensor.is_nested:
        yield from _leaves(list(tensor.unbind()), path, samples, depth)
    elif tensor.layout is torch.sparse_coo:
        whole = tensor.detach().coalesce()
        yield from _leaves([whole.indices(), whole.values()], path, samples, depth)
    elif tensor.layout is not torch.strided:
        other: Any = tensor.detach()
        yield from _leaves(other.to_sparse_coo(), path, samples, depth)
    elif tensor.is_quantized:
        yield from _leaves(tensor.int_repr(), path, samples, depth)
    elif tensor.device.type == "cpu":
        whole = tensor.detach().resolve_conj().resolve_neg().contiguous()
        kind = f"tensor {tensor.dtype} {tuple(tensor.shape)}"
        yield path, kind, _rows(whole.data_ptr(), whole.nbytes, tuple(tensor.shape), samples)


def _rows(address: int, size: int, shape: tuple[int, ...], samples: int) -> tuple[int, ...]:
    """A print for each of the samples, or one."""
    if not size:
        return ()
    memory = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
    if samples < 2 or not shape or shape[0] != samples:
        return (crc32(memory),)
    row = size // samples
    return tuple(crc32(memory[k * row : (k + 1) * row]) for k in range(samples))
