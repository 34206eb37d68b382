"""Whether the numbers of a sample are what they can be. Runs in: both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import torch

from safeloader.checks.leaves import Path, leaves_of, path_text
from safeloader.errors import ValidationError

_Numbers = np.ndarray[Any, Any] | torch.Tensor
_SHOWN = 3  # places of a leaf that are named
_REDUCED = (  # dtypes that torch adds up; others are looked at in a wider one
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float16,
    torch.bfloat16,
)
_ORDERED = (  # dtypes of which torch has the least and the greatest
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)


class Finite:
    """A check: no number of the sample is NaN or infinite.

    Tensors, arrays and numbers are looked at, in containers and objects at any depth: also what
    nested, sparse, structured and object arrays hold, and the elements of sets. Of a sparse tensor
    these are the values that it stores, of a masked array those that it shows. Not looked at is
    what cannot be NaN (integers, texts, dates, quantized tensors) or cannot be read here (tensors
    on "meta", packed dtypes of less than a byte a number, the insides of objects of C extensions
    and of tables).

    Raises:
        ValidationError: when called on a sample with another number; it names the path, and where
            the first ones are.

    Example:
        >>> import torch
        >>> from safeloader import SafeDataLoader, ValidationError, checks
        >>> samples = [{"x": torch.tensor([1.0, 2.0]) / (2 - k)} for k in range(4)]
        >>> try:
        ...     list(SafeDataLoader(samples, batch_size=2, validate=[checks.finite()]))
        ... except ValidationError as error:
        ...     print(error.index, error.failure.message)
        2 sample['x']: 2 of 2 values are not finite: inf at [0], inf at [1]
    """

    def __call__(self, sample: Any, index: Any) -> None:
        """Look at one sample."""
        if type(sample) is torch.Tensor and _is_plain(sample):  # the commonest, and no walk
            if not _tensor_finite(sample):
                _refuse_infinite((), sample)
            return
        for path, part in _numbers_in(sample):
            if not _all_finite(part):
                _refuse_infinite(path, part)

    def __repr__(self) -> str:
        return "finite()"


def _numbers_in(sample: Any) -> Iterator[tuple[Path, Any]]:
    """The tensors and arrays of a sample, made dense and without fields, and its other leaves."""
    for path, leaf in leaves_of(sample):
        if isinstance(leaf, torch.Tensor):
            for part in (leaf,) if _is_plain(leaf) else _readable_parts(leaf):
                yield path, part
        elif isinstance(leaf, np.ndarray | np.void) and leaf.dtype.names:
            whole: Any = leaf
            for name in leaf.dtype.names:
                for inner, part in _numbers_in(whole[name]):
                    yield (*path, ("item", name), *inner), part
        elif isinstance(leaf, np.ma.MaskedArray):
            yield path, leaf.compressed()
        else:
            yield path, leaf


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not (
        tensor.is_nested or tensor.is_meta or tensor.is_quantized
    )


def _readable_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What holds the numbers of a tensor that is not plain; nothing where there are none here."""
    if tensor.is_meta:
        return []
    if tensor.is_quantized:
        return [tensor.detach().dequantize()]
    if tensor.is_nested:
        return [
            part
            for each in tensor.detach().unbind()
            for part in ([each] if _is_plain(each) else _readable_parts(each))
        ]
    if tensor.layout is torch.sparse_coo:
        return [tensor.detach().coalesce().values()]
    return [tensor.detach().values()]


def _all_finite(part: Any) -> bool:
    if isinstance(part, torch.Tensor):
        return _tensor_finite(part)
    if isinstance(part, float | complex):
        return math.isfinite(part.real) and math.isfinite(part.imag)
    if isinstance(part, np.ndarray | np.generic):
        return part.dtype.kind not in "fc" or bool(np.isfinite(part).all())
    return not isinstance(part, Decimal) or part.is_finite()


def _tensor_finite(tensor: torch.Tensor) -> bool:
    """Whether all is finite: a sum that is finite proves it, at the speed of reading."""
    dtype = tensor.dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        return True
    tensor = tensor.detach()
    if dtype not in _REDUCED:
        wide = _widened(tensor)
        return wide is None or bool(torch.isfinite(wide).all())
    narrow = dtype.itemsize < 4  # whose sums would not be finite
    total = complex(tensor.sum(dtype=torch.float32 if narrow else None).item())
    if math.isfinite(total.real) and math.isfinite(total.imag):
        return True
    return bool(torch.isfinite(tensor.to(torch.float32) if narrow else tensor).all())


def _widened(tensor: torch.Tensor) -> torch.Tensor | None:
    """A tensor in a dtype for which torch and NumPy can do all; None if its numbers are packed."""
    dtype = tensor.dtype
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if dtype.is_complex:
        return tensor if dtype.itemsize > 4 else tensor.to(torch.complex64)
    if dtype is torch.float64 or dtype is torch.float32:
        return tensor
    try:
        if dtype.is_floating_point:
            return tensor.to(torch.float32)
        if dtype is torch.uint64:  # no integer of torch's is wider, and NumPy has it
            return tensor
        if dtype.itemsize == 1:
            return tensor.to(torch.uint8)
        return tensor.to(torch.int32 if dtype.itemsize == 2 else torch.int64)
    except (RuntimeError, TypeError):  # several numbers in a byte, or bits that are none
        return None


def _refuse_infinite(path: Path, part: Any) -> None:
    array = _as_array(part)
    if array.dtype.kind == "O":  # a decimal
        raise ValidationError(f"{path_text(path)}: {part!r} is not finite")
    raise ValidationError(f"{path_text(path)}: {_places(array, 'not finite', ~np.isfinite(array))}")


def _as_array(part: Any) -> np.ndarray[Any, Any]:
    if not isinstance(part, torch.Tensor):
        return np.asarray(part)
    wide = _widened(part)
    assert wide is not None, "it was read before"
    return wide.cpu().numpy()


def _places(array: np.ndarray[Any, Any], what: str, wrong: np.ndarray[Any, Any]) -> str:
    """``3 of 48 values are not finite: nan at [0, 4], ...``; of one number, what it is."""
    if array.ndim == 0:
        return f"{array.item()!r} is {what}"
    at = np.argwhere(wrong)
    shown = [f"{array[tuple(each)]} at {each.tolist()}" for each in at[:_SHOWN]]
    more = ", ..." if len(at) > _SHOWN else ""
    are = "is" if len(at) == 1 else "are"
    return f"{len(at)} of {array.size} values {are} {what}: {', '.join(shown)}{more}"


class InRange:
    """A check: the numbers of the sample, or of a part of it, lie between two bounds.

    Args:
        low: the least that a number may be.
        high: the most that a number may be.
        at: the part that is looked at: the key, number or attribute that leads to it, or a tuple of
            them, ``("target", "boxes")``; by default all numbers of the sample. NaN is in no range.

    What is looked at is as with ``finite``, and integers, too; of a complex number both its
    parts, the real and the imaginary one, have to lie between the bounds. A bool counts as 0 or 1.

    Raises:
        TypeError: if a bound is no number.
        ValueError: if ``low`` is above ``high``.
        ValidationError: when called on a sample with a number outside, or without that part.

    Example:
        >>> from safeloader import SafeDataLoader, ValidationError, checks
        >>> samples = [([0.5, 0.25], label) for label in (0, 3, 12)]
        >>> try:
        ...     list(SafeDataLoader(samples, validate=[checks.in_range(0, 9, at=1)]))
        ... except ValidationError as error:
        ...     print(error.index, error.failure.message)
        2 sample[1]: 12 is outside 0 to 9
    """

    def __init__(self, low: float, high: float, at: Any = None) -> None:
        for bound in (low, high):
            if not isinstance(bound, int | float):
                raise TypeError(f"the bounds of in_range must be numbers; got {bound!r}")
        if not low <= high:
            raise ValueError(f"in_range takes the lower bound first; got {low}, {high}")
        self.low, self.high, self.at = low, high, at

    def __call__(self, sample: Any, index: Any) -> None:
        """Look at one sample."""
        start, whole = part_at(sample, self.at)
        for path, part in _numbers_in(whole):
            if not self._within(part):
                array = _as_array(part)
                wrong = ~self._inside(array)
                said = _places(array, f"outside {self.low} to {self.high}", wrong)
                raise ValidationError(f"{path_text((*start, *path))}: {said}")

    def _within(self, part: Any) -> bool:
        if isinstance(part, torch.Tensor):
            if not part.numel():
                return True
            if part.dtype in _ORDERED:
                least, most = torch.aminmax(part.detach())
                if not part.dtype.is_floating_point:
                    return bool(least.item() >= self.low and most.item() <= self.high)
                return bool(least >= _float(self.low)) and bool(most <= _float(self.high))
            return _widened(part) is None or bool(self._inside(_as_array(part)).all())
        if isinstance(part, np.ndarray | np.generic):
            return part.dtype.kind not in "biufc" or bool(self._inside(np.asarray(part)).all())
        if isinstance(part, complex):
            return self.low <= part.real <= self.high and self.low <= part.imag <= self.high
        if isinstance(part, Decimal) and part.is_nan():  # which compares with nothing
            return False
        return not isinstance(part, int | float | Decimal) or self.low <= part <= self.high

    def _inside(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if array.dtype.kind == "c":
            inside: np.ndarray[Any, Any] = self._inside(array.real) & self._inside(array.imag)
            return inside
        low, high = self.low, self.high
        if array.dtype.kind == "b":
            array = array.astype(np.uint8)
        elif array.dtype.kind == "f":
            low, high = _float(low), _float(high)
        with np.errstate(over="ignore"):  # of a bound that the dtype does not reach
            return np.asarray((array >= low) & (array <= high))

    def __repr__(self) -> str:
        at = "" if self.at is None else f", at={self.at!r}"
        return f"in_range({self.low}, {self.high}{at})"


def _float(bound: float) -> float:
    """A bound for floats: an int may be beyond them all."""
    try:
        return float(bound)
    except OverflowError:
        return math.inf if bound > 0 else -math.inf


def part_at(sample: Any, at: Any) -> tuple[Path, Any]:
    """The part of a sample that ``at`` leads to, and the path there.

    Raises:
        ValidationError: if the sample has no such part.
    """
    path: Path = ()
    if at is None:
        return path, sample
    for step in at if type(at) is tuple else (at,):
        try:
            kind, sample = "item", sample[step]
        except (LookupError, TypeError, AttributeError, ValueError):
            if not (isinstance(step, str) and hasattr(sample, step)):
                raise ValidationError(f"{path_text(path)} has no part {step!r}") from None
            kind, sample = "attribute", getattr(sample, step)
        path = (*path, (kind, step))
    return path, sample
