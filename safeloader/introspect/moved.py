"""Whether what a value holds is the same in another order. Runs in: both.

A list that is shuffled in its place has the same members, and an array the same rows. That is told
from what they were before, in one process, without holding any of it.
"""

from __future__ import annotations

import ctypes
from collections import deque
from typing import Any
from zlib import crc32

import numpy as np
import torch

from safeloader._torch import without_overrides
from safeloader.introspect.digests import (
    DEPTH_MAX,
    LEAVES_MAX,
    in_no_order,
    is_backed,
    leaf_digest,
    raw_bytes,
    roots_of,
)
from safeloader.introspect.values import container_base, held_by, is_one_of

MEMBERS_MAX = 1 << 12  # of all lists of a value
ARRAY_BYTES = 1 << 18  # of one array of a value
_A_NUMBER = 16  # bytes that may be read one after the other, for one that stands alone


def orders_of(value: Any) -> dict[str, tuple[int, int] | None]:
    """By the path of each list and array in a value: digests in its order and in none.

    None of a list that is too long to be looked at; what else is too large is left out.

    >>> sorted(orders_of({"a": [3, 1], "b": np.arange(3), "c": 5}))
    ["['a']", "['b']"]
    """
    found: dict[str, tuple[int, int] | None] = {}
    left = MEMBERS_MAX
    queue = deque((path, each, DEPTH_MAX) for path, each in roots_of(value))
    while queue and len(found) < LEAVES_MAX:
        path, each, depth = queue.popleft()
        base = container_base(type(each))
        if base is list and list.__len__(each) > 1:
            members = list.__len__(each)
            found[path] = _of_members(each) if members <= left else None
            left -= min(left, members)
        elif base is None and (order := order_of_rows(each, ARRAY_BYTES)) is not None:
            found[path] = order
        if base is not None and base not in (set, frozenset) and depth:
            for key, part in held_by(each, LEAVES_MAX):
                at = f"{path}[{key!r}]" if is_one_of(type(key), str, int) else path
                if container_base(type(part)) or is_one_of(type(part), np.ndarray, torch.Tensor):
                    queue.append((at, part, depth - 1))
    return found


def _of_members(members: Any) -> tuple[int, int]:
    ids = np.fromiter(map(id, list.__iter__(members)), np.int64, list.__len__(members))
    return crc32(ids.tobytes()), in_no_order(ids)


def order_of_rows(array: Any, most: int) -> tuple[int, int] | None:
    """Digests of an array or tensor in its order and in none; None where that takes too long.

    Of one with more bytes than ``most``, some numbers of each row stand for the row.
    """
    if type(array) is np.ndarray:
        spread = not array.flags.c_contiguous
        if not array.ndim or array.dtype.kind not in "iufcSUMm":
            return None
        if array.nbytes <= most >> 4 * spread:
            return leaf_digest(array), in_no_order(array)
        return None if spread else _of_some(array.reshape(len(array), -1), most)
    if type(array) is not torch.Tensor:
        return None
    with without_overrides():
        if not array.is_cpu or array.layout is not torch.strided or array.is_nested:
            return None
        spread = not array.is_contiguous()
        nbytes = array.numel() * array.element_size()
        if array.is_quantized or not array.dim() or not nbytes or not is_backed(array):
            return None
        if nbytes > most >> 4 * spread:
            if spread or array.is_conj() or array.is_neg():
                return None
            # A view that NumPy knows nothing of: what it has seen cannot be resized any more.
            raw: Any = (ctypes.c_char * nbytes).from_address(array.data_ptr())
            numbers = np.frombuffer(raw, np.dtype(f"V{array.element_size()}"))
            return _of_some(numbers.reshape(len(array), -1), most)
        return leaf_digest(array), in_no_order(raw_bytes(array).reshape(len(array), -1))


def _of_some(rows: np.ndarray[Any, Any], most: int) -> tuple[int, int] | None:
    """Digests of numbers that are spread over each row."""
    each = (most // _A_NUMBER) // len(rows)
    if not each:
        return None
    some = np.ascontiguousarray(rows[:, :: max(1, rows.shape[1] // each)])
    return crc32(some.tobytes()), in_no_order(some)


def moved(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The paths below which things lie in other places than before, or may do so.

    >>> before = orders_of([[3, 1], np.arange(3)])
    >>> moved(before, orders_of([[1, 3], np.arange(3)]))
    ['[0]']
    """
    found = []
    for path, order in before.items():
        after = now.get(path, order)
        if order is None or after is None or (order[0] != after[0] and order[1] == after[1]):
            found.append(path)
    return found
