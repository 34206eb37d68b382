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
from collections.abc import Iterator, Mapping
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
    with _torch.without_overrides():  # tensors are read as what they are in memory
        return tuple(_leaves(batch, "batch", samples or 0, {}))


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


def _leaves(
    part: Any, path: str, samples: int, seen: dict[int, Any], depth: int = 0
) -> Iterator[Leaf]:
    """The prints of what ``part`` holds; what several parts hold has its print once.

    ``seen`` is by id, which is not given again while it is held there.
    """
    if part is None or isinstance(part, str | int | float | complex | np.generic):
        text = repr(part).encode("utf-8", "replace")
        yield Leaf(path, type(part).__name__, (crc32(text),))
        return
    if depth > _DEPTH_MAX or id(part) in seen:
        return
    seen[id(part)] = part
    if isinstance(part, bytes | bytearray):
        yield Leaf(path, "bytes", (crc32(part),))
        return
    # A tensor whose memory cannot be read is passed over.
    unreadable = (RuntimeError, NotImplementedError, TypeError)
    with contextlib.suppress(*unreadable if isinstance(part, torch.Tensor) else ()):
        if isinstance(part, torch.Tensor | np.ndarray) and (leaf := _dense(part, path, samples)):
            yield leaf
            return
        for step, each in _parts(part):
            yield from _leaves(each, path + step, samples, seen, depth + 1)


def _dense(part: Any, path: str, samples: int) -> Leaf | None:
    """The print of a tensor or array whose values lie in memory as they are; None of others."""
    if isinstance(part, np.ndarray):
        if part.dtype.names or part.dtype.kind in "OT" or part.dtype.char in "gG":
            return None
        # In the native order of bytes, as which any other arrives.
        whole: Any = np.asarray(part, part.dtype.newbyteorder("="), order="C")
        name, address = "array", whole.ctypes.data
    # Torch loses the quantizer of a quantized tensor on the way; to read what came would crash.
    elif part.layout is torch.strided and part.is_cpu and not (part.is_nested or part.is_quantized):
        whole = part.detach().resolve_conj().resolve_neg().contiguous()
        name, address = "tensor", whole.data_ptr()
    else:
        return None
    shape = tuple(whole.shape)
    rows = _rows(address, whole.nbytes, shape, samples)
    return Leaf(path, f"{name} {whole.dtype} {shape}", rows)


def _parts(part: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, each with the step to it."""
    if isinstance(part, torch.Tensor):
        part = part.detach()
        part = list(part.unbind()) if part.is_nested else _torch.parts_of_sparse(part)
    if isinstance(part, np.ndarray):
        if part.dtype.names:  # field by field: what is between them need not cross
            yield from ((f"[{name!r}]", part[name]) for name in part.dtype.names)
        elif part.dtype.kind in "OT":
            yield "", part.tolist()
        else:  # some bytes of a long double mean nothing, and differ in a copy
            for name, each in ((".real", part.real), (".imag", part.imag)):
                with np.errstate(all="ignore"):
                    high = each.astype(np.float64)
                    low = (each - high).astype(np.float64)
                yield name, [high, low]
    elif isinstance(part, Mapping):
        yield from ((f"[{key!r}]", part[key]) for key in part)
    elif isinstance(part, tuple) and hasattr(part, "_fields"):
        yield from ((f".{name}", getattr(part, name)) for name in part._fields)
    elif isinstance(part, list | tuple):
        yield from ((f"[{k}]", each) for k, each in enumerate(part))
    elif not _pickles_its_own_way(type(part)):
        # Those of a dataclass may be slots.
        slots = [name for name in getattr(part, "__dataclass_fields__", ()) if hasattr(part, name)]
        attributes = {name: getattr(part, name) for name in slots} | getattr(part, "__dict__", {})
        yield from ((f".{name}", each) for name, each in attributes.items())


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


def _rows(address: int, size: int, shape: tuple[int, ...], samples: int) -> tuple[int, ...]:
    """A print for each of the samples, or one."""
    if not size:
        return ()
    memory = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
    if samples < 2 or not shape or shape[0] != samples:
        return (crc32(memory),)
    row = size // samples
    return tuple(crc32(memory[k * row : (k + 1) * row]) for k in range(samples))
