"""Digests of what a person keeps in a dataset, by kinds of leaf that are known. Runs in: both.

Two samples are compared between processes, and an element of a dataset before and after it was
fetched. Nothing of the user's is run: a leaf of a kind that is not known has no digest, and what
holds one is passed over. Digests are CRC-32 (``zlib``), of the first 64 KiB of a leaf.
"""

from __future__ import annotations

import ctypes
import pathlib
from collections.abc import Iterator
from itertools import islice
from typing import Any
from zlib import crc32

import numpy as np
import torch

from safeloader._torch import without_overrides
from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.texts import bounded_text
from safeloader.introspect.values import (
    container_base,
    fields,
    held_by,
    inherits,
    is_one_of,
    is_written_in_python,
    mro_of,
    own_length,
    type_name,
)

LEAF_BYTES = 1 << 16
LEAVES_MAX = 64
DEPTH_MAX = 4
LONG = 16  # a list of more numbers or words than these is one leaf
LONG_MAX = 512  # of which so many are read
PIXEL_ROWS = 32  # of an image
SPREAD_MAX = (
    1 << 12
)  # numbers read of a tensor that lies spread out: each may be on a page of its own

_SCALARS = (bool, int, float, complex, str, bytes)


# Tensors of these keep their numbers where torch does.
_TENSORS = ("torch.", "torchvision.tv_tensors.", "monai.data.")


class Unknown(Exception):
    """A leaf of a kind that is not known, or too many of them."""


def leaves(value: Any, path: str = "", depth: int = DEPTH_MAX) -> Iterator[tuple[str, Any]]:
    """The leaves of nested containers, each with its path; an object is one leaf.

    >>> list(leaves({"a": [1, None]}))
    [("['a'][0]", 1), ("['a'][1]", None)]
    """
    base = container_base(type(value))
    if base is None or depth == 0:
        yield path, value
        return
    if base in (set, frozenset):  # in no order that two processes share
        raise Unknown
    if base in (list, tuple) and base.__len__(value) > LONG and _is_plain(value):
        yield path, value
        return
    for key, each in held_by(value, LEAVES_MAX + 1):
        at = f"{path}[{key!r}]" if is_one_of(type(key), str, int) else path
        yield from leaves(each, at, depth - 1)


def _is_plain(values: Any) -> bool:
    return all(
        any(type(each) is kind for kind in (*_SCALARS, type(None)))
        for _, each in held_by(values, LONG_MAX)
    )


def _of_object(value: Any, depth: int) -> list[tuple[str, Any]]:
    """The attributes of an object of a plain class: nothing of it lies elsewhere."""
    own = (
        fields(value) if depth and all(map(is_written_in_python, mro_of(type(value))[:-1])) else []
    )
    if not own or len(own) > LEAVES_MAX:
        raise Unknown
    return own


def leaf_digest(leaf: Any, depth: int = DEPTH_MAX, most: int = LEAF_BYTES) -> int:
    """The digest of one leaf, of its first ``most`` bytes.

    Raises:
        Unknown: for a kind that is not known.
    """
    cls = type(leaf)
    if is_one_of(cls, str, bytes):
        leaf = leaf[:most]
    if leaf is None or is_one_of(cls, *_SCALARS):
        return crc32(repr(leaf).encode("utf-8", "replace"))
    if cls is bytearray:
        return crc32(leaf[:most])
    if inherits(cls, np.generic) and cls.__module__ == "numpy":
        return crc32(np.generic.tobytes(leaf))
    if cls is np.ndarray and leaf.dtype.kind in "biufcSUmM" and leaf.dtype.char not in "gG":
        part = leaf.flat[: most // max(1, leaf.itemsize)]  # a copy of no more than that
        return crc32(f"{leaf.dtype}{leaf.shape}".encode() + part.tobytes())
    if inherits(cls, torch.Tensor) and type_name(cls).startswith(_TENSORS):
        return _of_tensor(leaf, most)
    if inherits(cls, pathlib.PurePath) and cls.__module__.startswith("pathlib"):
        return crc32(str(leaf).encode("utf-8", "replace"))
    if cls is np.ndarray and leaf.dtype.kind == "O" and leaf.ndim == 1:
        leaf = leaf[:LONG_MAX].tolist()
    if is_one_of(container_base(type(leaf)), list, tuple) and _is_plain(leaf):
        length = own_length(leaf)
        some = [each for _, each in held_by(leaf, LONG_MAX)]
        return crc32(f"{length}{some!r}"[:LEAF_BYTES].encode("utf-8", "replace"))
    if type_name(cls).startswith("PIL."):
        return _of_image(leaf)
    if container_base(cls) is not None or inherits(cls, torch.Tensor, np.ndarray):
        raise Unknown
    parts = [
        (name, at, leaf_digest(each, depth - 1))
        for name, value in _of_object(leaf, depth)
        for at, each in leaves(value, "", depth - 1)
    ]
    return crc32(repr(parts).encode("utf-8", "replace"))


def _of_image(image: Any) -> int:
    """The digest of the first rows of an image of PIL; one that is not read yet is left alone."""
    held: Any = next((each for name, each in fields(image) if name in ("_im", "im")), None)
    if held is None:
        raise Unknown
    width, height = image.size
    rows = image.crop((0, 0, width, min(height, PIXEL_ROWS))).tobytes()[:LEAF_BYTES]
    return crc32(f"{image.mode}{width}x{height}".encode() + rows)


def _of_tensor(tensor: torch.Tensor, most: int) -> int:
    with without_overrides():
        if not (tensor.is_cpu and tensor.layout is torch.strided) or tensor.is_quantized:
            raise Unknown
        if tensor.is_nested or not is_backed(tensor):
            raise Unknown
        tensor = tensor.detach()
        head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
        if not tensor.numel():
            return crc32(head)
        first = max(1, most // tensor.element_size())
        part = (
            tensor.reshape(-1)[:first]
            if tensor.is_contiguous()
            else _some(tensor, min(first, SPREAD_MAX))
        )
        part = part.resolve_conj().resolve_neg().contiguous().view(torch.uint8)
        # Of a copy: what NumPy has seen once cannot be resized any more.
        return crc32(head + part.clone().numpy().tobytes())


def _some(tensor: torch.Tensor, most: int) -> torch.Tensor:
    """The first part of a tensor that is no contiguous memory, flat; not all of it is copied."""
    row = tensor.numel()
    for dim, size in enumerate(tensor.shape):
        row //= size
        tensor = tensor.narrow(dim, 0, max(1, min(size, most // max(1, row))))
    return tensor.reshape(-1)[:most]


def in_no_order(rows: np.ndarray[Any, Any]) -> int:
    """A digest of the rows of an array, in whatever order they lie; of a flat one its numbers.

    >>> rows = np.array([[1, 2], [3, 4]])
    >>> in_no_order(rows) == in_no_order(rows[::-1]) != in_no_order(rows.T)
    True
    """
    if not rows.size:
        return 0
    raw = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
    word = next(size for size in (8, 4, 2, 1) if raw.shape[1] % size == 0)
    words = raw.view(f"u{word}")
    if words.shape[1] > 1:
        places = _mixed(np.arange(1, words.shape[1] + 1, dtype=np.uint64))
        return int(_mixed(words.astype(np.uint64) @ places).sum(dtype=np.uint64))
    return int(_mixed(words[:, 0]).sum(dtype=np.uint64))


def raw_bytes(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The bytes of a dense tensor, of a copy of it: what NumPy has seen cannot be resized any more.

    The tensor is to be backed.

    >>> raw_bytes(torch.tensor([1, 2], dtype=torch.int16)).tolist()
    [1, 0, 2, 0]
    >>> raw_bytes(torch.arange(6, dtype=torch.uint8)[::2]).tolist()
    [0, 2, 4]
    """
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    # Not by clone(), which wakes torch's threads for a large one.
    raw = ctypes.string_at(flat.data_ptr(), flat.numel() * flat.element_size())
    return np.frombuffer(raw, np.uint8)


def is_backed(tensor: torch.Tensor) -> bool:
    """Whether all elements of a strided tensor lie in memory: its storage may have been given back.

    >>> rows = torch.zeros(2, 3)
    >>> before = is_backed(rows)
    >>> _ = rows.untyped_storage().resize_(0)
    >>> before, is_backed(rows)
    (True, False)
    """
    if not tensor.numel():
        return True
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    end = (int(tensor.storage_offset()) + last + 1) * tensor.element_size()
    return tensor.data_ptr() != 0 and end <= tensor.untyped_storage().nbytes()


def starts_of_rows(tensor: torch.Tensor, step: int, most: int) -> list[bytes] | None:
    """The first bytes, ``most`` of them, of every ``step``-th row of a tensor on the CPU.

    The tensor is to be backed. None where its rows do not lie one behind the other as they are
    read. Read without operators of torch: each that is new to a forked process costs it some page
    faults.

    >>> starts_of_rows(torch.tensor([[65, 66], [67, 68], [69, 70]], dtype=torch.uint8), 2, 1)
    [b'A', b'E']
    >>> starts_of_rows(torch.zeros(2, 3).T, 1, 1) is None
    True
    """
    if tensor.is_conj() or tensor.is_neg() or not tensor.is_contiguous():
        return None
    rows, at = tensor.shape[0], tensor.data_ptr()
    row = tensor.nbytes // rows
    few = min(row, most)
    return [ctypes.string_at(at + row * k, few) for k in range(0, rows, step)]


def _mixed(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Numbers of 64 bits, each made of one word: all of its bits count in all of theirs."""
    words = words.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (words ^ (words >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)


def digest(value: Any) -> int | None:
    """One digest of a sample; None where a leaf is of a kind that is not known.

    >>> digest({"x": torch.zeros(2), "y": 3}) == digest({"x": torch.zeros(2), "y": 3})
    True
    >>> digest(object()) is None
    True
    """
    found = by_leaf(value)
    if found is None:
        return None
    return crc32(repr(list(found.items())).encode("utf-8", "replace"))


def by_leaf(value: Any) -> dict[str, int] | None:
    """The digest of each leaf by its path; None where one is of a kind that is not known.

    >>> sorted(by_leaf({"a": 1, "b": [2]}))
    ["['a']", "['b'][0]"]
    """
    found: dict[str, int] = {}
    try:
        for path, leaf in leaves(value):
            found[path] = leaf_digest(leaf)
            if len(found) > LEAVES_MAX:
                return None
    except Exception as exc:
        _unknown(exc)
        return None
    return found


def _unknown(exc: Exception) -> None:
    """What cannot be looked at is of a kind that is not known; a signal's error is the user's."""
    if raised_by_signal(exc):
        raise exc


def known_leaves(value: Any) -> dict[str, tuple[int, str]]:
    """As :func:`by_leaf`, but leaves of other kinds are left out; an object is its attributes.

    Returns:
        By path the digest, and a word for a person: a number, or the first of an array.

    >>> class Item:
    ...     def __init__(self):
    ...         self.x, self.handle = np.array([3, 4]), object()
    >>> {path: word for path, (_, word) in known_leaves(Item()).items()}
    {'.x': '[3, ...]'}
    """
    found: dict[str, tuple[int, str]] = {}
    for path, leaf in parts_of(value):
        try:
            found[path] = leaf_digest(leaf), _word(leaf)
        except Exception as exc:
            _unknown(exc)
    return found


def parts_of(value: Any) -> list[tuple[str, Any]]:
    """The first leaves of a value by their paths, known or not; an object is its attributes."""
    found: list[tuple[str, Any]] = []
    for root, each in roots_of(value):
        try:
            found += list(islice(leaves(each, root), LEAVES_MAX - len(found)))
        except Unknown:
            continue
    return found


def roots_of(value: Any) -> list[tuple[str, Any]]:
    """A value, or the attributes of an object, each with its path in it."""
    if container_base(type(value)) is None and fields(value, 1):
        return [(f".{name}", each) for name, each in fields(value, LEAVES_MAX)]
    return [("", value)]


def _word(leaf: Any) -> str:
    if inherits(type(leaf), torch.Tensor, np.ndarray):
        with without_overrides():
            part = leaf.flat[:2] if inherits(type(leaf), np.ndarray) else _some(leaf, 2)
            some = part.tolist()
        first = bounded_text(some[0]) if some else ""
        return f"[{first}, ...]" if len(some) > 1 else f"[{first}]"
    return bounded_text(leaf)
