"""Whether samples are alike: keys, types, dtypes and shapes. Runs in: both.

The structure of a sample is a dict from path to what is there, in words::

    sample           dict of 2
    sample['image']  tensor float32 (3, 32, 32)
    sample['label']  int
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from zlib import crc32

import numpy as np
import torch

from safeloader.checks.leaves import DEPTH_MAX, Path, parts_of, path_text
from safeloader.errors import ValidationError

Structure = dict[str, str]
_ANY = "anything"
_TEXT_MAX = 4000
_DIFFERENCES_SHOWN = 3


class Schema:
    """A check: every sample has the same keys, types, dtypes and shapes.

    Args:
        like: what samples look like: one of them, or a structure of the same kind in which a leaf
            is a type (``int``), a dtype (``torch.float32``, of any shape), a pair of dtype and
            shape with None for a size that may be any (``(torch.float32, (3, None, None))``), an
            example, or ``...`` for anything. By default each worker's first sample; the main
            process then compares the workers', and a difference is a
            :class:`~safeloader.DeliveryError` that names both.

    Raises:
        ValidationError: when called on a sample that is different; it names the paths.

    Example:
        >>> import torch
        >>> from safeloader import SafeDataLoader, ValidationError, checks
        >>> samples = [{"image": torch.zeros(3, 8, size), "label": 1} for size in (8, 9, 8)]
        >>> sized = {"image": (torch.float32, (3, None, None)), "label": int}
        >>> loader = SafeDataLoader(samples, batch_size=None, validate=[checks.schema(like=sized)])
        >>> len(list(loader))
        3
        >>> try:
        ...     list(SafeDataLoader(samples, validate=[checks.schema()]))
        ... except ValidationError as error:
        ...     print(error.index, error.failure.message)
        1 sample['image'] is tensor float32 (3, 8, 9), not tensor float32 (3, 8, 8) as in index 0
    """

    def __init__(self, like: Any = None) -> None:
        self._wanted = None if like is None else structure_of(like, pattern=True)

    def __call__(self, sample: Any, index: Any) -> None:
        """Compare one sample with the structure that was given; without one nothing is known."""
        if self._wanted is not None:
            _compare(structure_of(sample), self._wanted, "as asked for")

    def for_one_worker(self) -> Schema | FirstSample:
        """The check as one worker makes it, from its first sample on."""
        return self if self._wanted is not None else FirstSample()

    def __repr__(self) -> str:
        return "schema()" if self._wanted is None else "schema(like=...)"


class FirstSample:
    """The check against the first sample that a worker saw.

    Attributes:
        untold: that sample's index and structure, for main to compare, until somebody took it.
    """

    def __init__(self) -> None:
        self._wanted: Structure | None = None
        self._of = ""
        self.untold: tuple[Any, int, str] | None = None

    def __call__(self, sample: Any, index: Any) -> None:
        """Compare one sample with the first."""
        found = structure_of(sample)
        if self._wanted is not None:
            if found != self._wanted:
                _compare(found, self._wanted, f"as in {self._of}")
            return
        self._wanted, self._of = found, f"index {index}"
        text = "; ".join(f"{path} {what}" for path, what in found.items())
        self.untold = index, crc32(text.encode("utf-8", "replace")), text[:_TEXT_MAX]

    def __repr__(self) -> str:
        return "schema()"


def structure_of(sample: Any, *, pattern: bool = False) -> Structure:
    """What is at each path; with ``pattern``, leaves may say what is wanted."""
    found: Structure = {}

    def walk(whole: Any, path: Path) -> None:
        text = path_text(path)
        parts = None if pattern and _is_leaf_pattern(whole) else parts_of(whole)
        if parts is None or len(path) >= DEPTH_MAX:
            found[text] = _wanted_in_words(whole) if pattern else _in_words(whole)
            return
        found[text] = f"{_kind(whole)} of {len(parts)}"
        for step, each in parts:
            walk(each, (*path, step))

    walk(sample, ())
    return found


def _kind(whole: Any) -> str:
    return "dict" if isinstance(whole, Mapping) else type(whole).__name__


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _in_words(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        shape = "nested" if leaf.is_nested else str(tuple(leaf.shape))
        return f"tensor {_dtype_name(leaf.dtype)} {shape}"
    if isinstance(leaf, np.ndarray):
        return f"array {leaf.dtype} {leaf.shape}"
    return type(leaf).__name__


def _is_dtype(value: Any) -> bool:
    return isinstance(value, torch.dtype | np.dtype) or (
        isinstance(value, type) and issubclass(value, np.generic)
    )


def _is_leaf_pattern(value: Any) -> bool:
    return value is ... or isinstance(value, type) or _is_dtype(value) or _is_pair(value)


def _is_pair(value: Any) -> bool:
    return (
        type(value) is tuple
        and len(value) == 2
        and _is_dtype(value[0])
        and isinstance(value[1], tuple | list)
        and all(size is None or isinstance(size, int) for size in value[1])
    )


def _wanted_in_words(leaf: Any) -> str:
    if leaf is ...:
        return _ANY
    if _is_pair(leaf):
        dtype, shape = leaf
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        return f"{_of_dtype(dtype)} ({sizes}{',' * (len(shape) == 1)})"
    if _is_dtype(leaf):
        return f"{_of_dtype(leaf)} {_ANY}"
    return leaf.__name__ if isinstance(leaf, type) else _in_words(leaf)


def _of_dtype(dtype: Any) -> str:
    if isinstance(dtype, torch.dtype):
        return f"tensor {_dtype_name(dtype)}"
    return f"array {np.dtype(dtype)}"


def _fits(found: str, wanted: str) -> bool:
    if found == wanted or wanted == _ANY:
        return True
    head, _, shape = wanted.partition(" (")
    if wanted.endswith(f" {_ANY}"):
        return found.startswith(wanted.removesuffix(_ANY))
    if "any" not in shape or not found.startswith(f"{head} ("):
        return False
    sizes = found[len(head) + 2 : -1].split(", "), shape[:-1].split(", ")
    return len(sizes[0]) == len(sizes[1]) and all(
        b.rstrip(",") in ("any", a.rstrip(",")) for a, b in zip(*sizes, strict=True)
    )


def _compare(found: Structure, wanted: Structure, told: str) -> None:
    anywhere = tuple(path for path, what in wanted.items() if what == _ANY)
    differences = []
    for path, what in wanted.items():
        if path not in found:
            differences.append(f"{path} is not there, {what} {told}")
        elif not _fits(found[path], what):
            differences.append(f"{path} is {found[path]}, not {what} {told}")
    for path, what in found.items():
        if path not in wanted and not path.startswith(anywhere or ("\0",)):
            differences.append(f"{path}, {what}, is too many: it is not there {told}")
    if differences:
        more = len(differences) - _DIFFERENCES_SHOWN
        shown = differences[:_DIFFERENCES_SHOWN] + [f"and {more} more"] * (more > 0)
        raise ValidationError("; ".join(shown))
