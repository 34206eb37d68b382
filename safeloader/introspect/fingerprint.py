"""Fingerprints of a batch's leaves, compared in main. Runs in: both.

A leaf is a tensor, an array, a string, bytes, a number, None; containers, named tuples and objects
with attributes are walked through, but for objects that pickle in a way of their own. Where a leaf
has a row for each sample, each row has a print of its own, so that what changed is known by its
dataset index.

Prints are CRC-32 (``zlib``, which takes some 5 GB/s): made to find accidents, not attacks.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch

from safeloader import _torch

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
    fingerprints: tuple[int, ...]


class Difference(NamedTuple):
    """A leaf that is not what it was.

    ``rows`` are the positions of the samples that changed; None where that cannot be said.
    """

    path: str
    rows: tuple[int, ...] | None


def fingerprint(batch: Any, samples: int | None) -> tuple[Leaf, ...]:
    """The prints of all leaves of ``batch``, which was made of so many ``samples``."""
    walk = _Walk(samples or 0)
    with _torch.without_overrides():  # tensors are read as what they are in memory
        walk.into(batch, "batch", 0)
    return tuple(walk.leaves)


def difference(sent: tuple[Leaf, ...], batch: Any, samples: int | None) -> Difference | None:
    """What of ``batch`` is not as it was sent; None if all of it is.

    Leaves that are there on one side only are passed over: pinning takes some objects for lists,
    and what happens to a batch by accident changes leaves and removes none.
    """
    came = fingerprint(batch, samples)
    if came == sent:
        return None
    known = {leaf.path: leaf for leaf in sent}
    for now in came:
        before = known.get(now.path, now)
        if before == now:
            continue
        if before.kind != now.kind or len(before.fingerprints) < 2:
            return Difference(now.path, None)
        pairs = zip(before.fingerprints, now.fingerprints, strict=True)
        return Difference(now.path, tuple(k for k, (a, b) in enumerate(pairs) if a != b))
    return None


class _Walk:
    """Through a batch, to its leaves; through what several parts of it hold, once."""

    def __init__(self, samples: int) -> None:
        self.leaves: list[Leaf] = []
        self._samples = samples
        self._seen: dict[int, Any] = {}  # by id, which is not given again while it is held here

    def into(self, part: Any, path: str, depth: int) -> None:
        if part is None or isinstance(part, str | int | float | complex | np.generic):
            self._leaf(path, type(part).__name__, (crc32(repr(part).encode("utf-8", "replace")),))
            return
        if depth > _DEPTH_MAX or id(part) in self._seen:
            return
        self._seen[id(part)] = part
        if isinstance(part, torch.Tensor):
            # One of a kind whose memory cannot be read is passed over.
            with contextlib.suppress(RuntimeError, NotImplementedError, TypeError):
                self._tensor(part, path, depth)
        elif isinstance(part, np.ndarray):
            self._array(part, path, depth)
        elif isinstance(part, bytes | bytearray):
            self._leaf(path, "bytes", (crc32(part),))
        elif isinstance(part, Mapping):
            for key in part:
                self.into(part[key], f"{path}[{key!r}]", depth + 1)
        elif isinstance(part, tuple) and hasattr(part, "_fields"):
            for name in part._fields:
                self.into(getattr(part, name), f"{path}.{name}", depth + 1)
        elif isinstance(part, list | tuple):
            for k, each in enumerate(part):
                self.into(each, f"{path}[{k}]", depth + 1)
        elif not _pickles_its_own_way(type(part)):
            for name, each in held_under_names(part).items():
                self.into(each, f"{path}.{name}", depth + 1)

    def _leaf(self, path: str, kind: str, fingerprints: tuple[int, ...]) -> None:
        self.leaves.append(Leaf(path, kind, fingerprints))

    def _array(self, array: np.ndarray[Any, Any], path: str, depth: int) -> None:
        if array.dtype.names:  # field by field: what is between them need not cross
            for name in array.dtype.names:
                self.into(array[name], f"{path}[{name!r}]", depth + 1)
        elif array.dtype.kind in "OT":
            self.into(array.tolist(), path, depth + 1)
        elif array.dtype.char in "gG":  # some of their bytes mean nothing, and differ in a copy
            for name, each in (("real", array.real), ("imag", array.imag)):
                with np.errstate(all="ignore"):
                    high = each.astype(np.float64)
                    low = (each - high).astype(np.float64)
                self.into([high, low], f"{path}.{name}", depth + 1)
        else:
            native = array.dtype.newbyteorder("=")  # as which any other arrives
            whole = np.ascontiguousarray(array, native)
            fingerprints = _rows(whole.ctypes.data, whole.nbytes, array.shape, self._samples)
            self._leaf(path, f"array {native} {array.shape}", fingerprints)

    def _tensor(self, tensor: torch.Tensor, path: str, depth: int) -> None:
        tensor = tensor.detach()
        parts = list(tensor.unbind()) if tensor.is_nested else _torch.parts_of_sparse(tensor)
        if parts:
            self.into(parts, path, depth + 1)
        # Torch loses the quantizer of a quantized tensor on the way; to read what came would crash.
        elif tensor.layout is torch.strided and tensor.is_cpu and not tensor.is_quantized:
            whole = tensor.resolve_conj().resolve_neg().contiguous()
            kind = f"tensor {tensor.dtype} {tuple(tensor.shape)}"
            rows = _rows(whole.data_ptr(), whole.nbytes, tuple(tensor.shape), self._samples)
            self._leaf(path, kind, rows)


def _pickles_its_own_way(cls: type) -> bool:
    """Whether what arrives of an object may be other than what was sent."""
    if cls is SimpleNamespace:  # whose own way is to send its attributes
        return False
    for name in ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__"):
        way = getattr(cls, name, None)
        plain = way is getattr(object, name, None)
        if not plain and getattr(way, "__module__", "") != "dataclasses":  # as with slots=True
            return True
    return False


def held_under_names(part: Any) -> dict[str, Any]:
    """What an object holds: the fields of a dataclass, also one with slots, and its own dict."""
    slots = [name for name in getattr(part, "__dataclass_fields__", ()) if hasattr(part, name)]
    return {name: getattr(part, name) for name in slots} | getattr(part, "__dict__", {})


def _rows(address: int, size: int, shape: tuple[int, ...], samples: int) -> tuple[int, ...]:
    """A print for each of the samples, or one."""
    if not size:
        return ()
    memory = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
    if samples < 2 or not shape or shape[0] != samples:
        return (crc32(memory),)
    row = size // samples
    return tuple(crc32(memory[k * row : (k + 1) * row]) for k in range(samples))
