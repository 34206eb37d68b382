"""Whether samples are alike: keys, types, dtypes and shapes. Runs in: both.

The structure of a sample is a dict from path to what is there, in words::

    sample           dict of 2
    sample['image']  tensor float32 (3, 32, 32)
    sample['label']  int
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_origin
from zlib import crc32

import numpy as np
import torch

from safeloader.checks.leaves import DEPTH_MAX, Path, parts_of, path_text
from safeloader.errors import ValidationError

Structure = dict[str, str]


class Wanted(NamedTuple):
    """What is wanted at a path: in words, and what a leaf has to match; an example by its words."""

    words: str
    pattern: Any = None


_ANY = "anything"
_TEXT_MAX = 4000
_DIFFERENCES_SHOWN = 3


class Schema:
    """A check: every sample has the same keys, types, dtypes and shapes.

    Args:
        like: what samples look like: one of them, or a structure of the same kind. The keys of a
            dict and the number of elements of a list or tuple are compared, too. In the place of a
            part may stand

            - a type, or a union of types (``int``, ``str | None``, ``torch.Tensor``,
              ``np.ndarray``, ``dict``, ``list``): any instance of it, as ``isinstance`` says,
              whatever it holds. A bool is an ``int`` to Python, and ``np.float64`` a ``float``;
            - a dtype (``torch.float32``, ``np.uint8``, ``np.dtype("f4")``, ``np.floating``): a
              tensor or array of it, of any shape; of NumPy's also a single number;
            - a pair of dtype and shape (``(torch.float32, (3, None, None))``), with None for a size
              that may be any;
            - an example (``torch.zeros(3)``, ``1``): of the same type, dtype and shape;
            - ``...``: anything.

            By default each worker's first sample; the main process then compares the workers', and
            a difference is a :class:`~safeloader.DeliveryError` that names both.

    Raises:
        TypeError: if ``like`` holds what nothing can be an instance of, as ``list[int]``.
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
        self._wanted = None if like is None else _wanted(like)

    def __call__(self, sample: Any, index: Any) -> None:
        """Compare one sample with the structure that was given; without one nothing is known."""
        if self._wanted is not None:
            _compare(sample, self._wanted, "as asked for")

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
                first = {path: Wanted(words) for path, words in self._wanted.items()}
                _compare(sample, first, f"as in {self._of}")
            return
        self._wanted, self._of = found, f"index {index}"
        text = "; ".join(f"{path} {what}" for path, what in found.items())
        self.untold = index, crc32(text.encode("utf-8", "replace")), text[:_TEXT_MAX]

    def __repr__(self) -> str:
        return "schema()"


def structure_of(sample: Any) -> Structure:
    """What is at each path, in words."""
    return {path_text(path): _words(whole, parts) for path, whole, parts in _walk(sample)}


def _wanted(like: Any) -> dict[str, Wanted]:
    """What is wanted at each path.

    Raises:
        TypeError: if a part is what nothing can be an instance of.
    """
    found = {}
    for path, whole, parts in _walk(like, patterns=True):
        text = path_text(path)
        if get_origin(whole) is not None and not isinstance(whole, types.UnionType):
            raise TypeError(
                f"schema cannot tell whether {text} is {whole}: give {get_origin(whole)} instead, "
                "or the elements one by one"
            )
        if _is_pattern(whole):
            found[text] = Wanted(_wanted_in_words(whole), whole)
        else:
            found[text] = Wanted(_words(whole, parts))
    return found


def _walk(sample: Any, *, patterns: bool = False) -> Iterator[tuple[Path, Any, Any]]:
    """Each container and each leaf, with its path and its parts; a pattern, if asked, is a leaf."""

    def walk(whole: Any, path: Path) -> Iterator[tuple[Path, Any, Any]]:
        parts = None if patterns and _is_pattern(whole) else parts_of(whole)
        if len(path) >= DEPTH_MAX:
            parts = None
        yield path, whole, parts
        for step, each in parts or ():
            yield from walk(each, (*path, step))

    return walk(sample, ())


def _words(whole: Any, parts: Any) -> str:
    return _in_words(whole) if parts is None else f"{_kind(whole)} of {len(parts)}"


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


def _is_pattern(value: Any) -> bool:
    whole = isinstance(value, type | types.UnionType | types.GenericAlias)
    return value is ... or whole or _is_dtype(value) or _is_pair(value)


def _is_pair(value: Any) -> bool:
    return (
        type(value) is tuple
        and len(value) == 2
        and _is_dtype(value[0])
        and isinstance(value[1], tuple | list)
        and all(size is None or isinstance(size, int) for size in value[1])
    )


def _wanted_in_words(pattern: Any) -> str:
    if pattern is ...:
        return _ANY
    if _is_pair(pattern):
        dtype, shape = pattern
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        return f"{_of_dtype(dtype)} ({sizes}{',' * (len(shape) == 1)})"
    if _is_dtype(pattern):
        return f"{_of_dtype(pattern)} {_ANY}"
    return pattern.__name__ if isinstance(pattern, type) else str(pattern)


def _of_dtype(dtype: Any) -> str:
    if isinstance(dtype, torch.dtype):
        return f"tensor {_dtype_name(dtype)}"
    return f"array {dtype.__name__ if isinstance(dtype, type) else dtype}"


def _fits(found: Any, pattern: Any) -> bool:
    """Whether a part is what a pattern says."""
    if pattern is ...:
        return True
    if _is_pair(pattern):
        dtype, shape = pattern
        if not _is_of(found, dtype) or getattr(found, "is_nested", False):
            return False
        sizes = tuple(found.shape)
        return len(sizes) == len(shape) and all(
            asked in (None, size) for size, asked in zip(sizes, shape, strict=True)
        )
    return _is_of(found, pattern) if _is_dtype(pattern) else isinstance(found, pattern)


def _is_of(found: Any, dtype: Any) -> bool:
    """Whether a tensor, array or number of NumPy's is of a dtype, or of a kind of them."""
    if isinstance(dtype, torch.dtype):
        return isinstance(found, torch.Tensor) and found.dtype == dtype
    if not isinstance(found, np.ndarray | np.generic):
        return False
    if isinstance(dtype, type):
        return issubclass(found.dtype.type, dtype)
    return bool(found.dtype == dtype)


def _is_below(path: str, free: tuple[str, ...]) -> bool:
    return any(path.startswith((f"{each}[", f"{each}.")) for each in free)


def _compare(sample: Any, wanted: dict[str, Wanted], told: str) -> None:
    walked = {path_text(path): (whole, parts) for path, whole, parts in _walk(sample)}
    free = tuple(path for path, each in wanted.items() if each.pattern is not None)
    differences = []
    for path, (words, pattern) in wanted.items():
        if path not in walked:
            differences.append(f"{path} is not there, {words} {told}")
            continue
        found = _words(*walked[path])
        if not (found == words if pattern is None else _fits(walked[path][0], pattern)):
            differences.append(f"{path} is {found}, not {words} {told}")
    for path, (whole, parts) in walked.items():
        if path not in wanted and not _is_below(path, free):
            found = _words(whole, parts)
            differences.append(f"{path}, {found}, is too many: it is not there {told}")
    if differences:
        more = len(differences) - _DIFFERENCES_SHOWN
        shown = differences[:_DIFFERENCES_SHOWN] + [f"and {more} more"] * (more > 0)
        raise ValidationError("; ".join(shown))
