"""Whether the numbers of a sample are what they can be. Runs in: both."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from safeloader.checks.leaves import Path, leaves_of, path_text
from safeloader.errors import ValidationError

_Numbers = np.ndarray[Any, Any] | torch.Tensor
_SHOWN = 3  # places of a leaf that are named


class Finite:
    """A check: no number of the sample is NaN or infinite.

    Tensors, arrays and numbers are looked at, in containers and objects at any depth.

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
        if type(sample) is torch.Tensor:  # the commonest, and no walk
            if not _all_finite(sample):
                _refuse((), sample)
            return
        for path, leaf in leaves_of(sample):
            if not _all_finite(leaf):
                _refuse(path, leaf)

    def __repr__(self) -> str:
        return "finite()"


def _all_finite(leaf: Any) -> bool:
    array: Any = leaf
    if isinstance(leaf, torch.Tensor):
        return all(map(_tensor_finite, _strided_parts(leaf)))
    if isinstance(leaf, float | complex):
        return math.isfinite(leaf.real) and math.isfinite(leaf.imag)
    if isinstance(leaf, np.ndarray | np.generic):
        if leaf.dtype.names:
            return all(_all_finite(array[name]) for name in leaf.dtype.names)
        return leaf.dtype.kind not in "fc" or bool(np.isfinite(leaf).all())
    return True


def _strided_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What holds the numbers of a tensor; nothing of one whose numbers cannot be read here."""
    if tensor.is_meta or tensor.is_quantized:
        return []
    if tensor.is_nested:
        return list(tensor.detach().unbind())
    if tensor.layout is torch.sparse_coo:
        return [tensor.detach().coalesce().values()]
    if tensor.layout is not torch.strided:
        return [tensor.detach().values()]
    return [tensor.detach()]


def _tensor_finite(tensor: torch.Tensor) -> bool:
    """Whether all is finite: a sum that is finite proves it, at the speed of reading."""
    dtype = tensor.dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        return True
    narrow = dtype.itemsize < 4 and not dtype.is_complex  # whose sums would not be finite
    total = complex(tensor.sum(dtype=torch.float32 if narrow else None).item())
    if math.isfinite(total.real) and math.isfinite(total.imag):
        return True
    wide = tensor.to(torch.float32) if narrow else tensor
    return bool(torch.isfinite(wide).all())


def _refuse(path: Path, leaf: Any) -> None:
    whole: Any = leaf
    if isinstance(leaf, torch.Tensor):
        whole = next(part for part in _strided_parts(leaf) if not _tensor_finite(part))
    if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.names:
        name = next(name for name in leaf.dtype.names if not _all_finite(whole[name]))
        return _refuse((*path, ("item", name)), whole[name])
    wrong = ~np.isfinite(_as_array(whole))
    raise ValidationError(f"{path_text(path)}: {_places(whole, 'not finite', wrong)}")


def _as_array(whole: Any) -> np.ndarray[Any, Any]:
    if not isinstance(whole, torch.Tensor):
        return np.asarray(whole)
    wide = whole.detach().resolve_conj().resolve_neg().cpu()
    if wide.dtype.is_floating_point and wide.dtype.itemsize < 4:
        wide = wide.to(torch.float32)
    return wide.numpy()


def _places(whole: Any, what: str, wrong: np.ndarray[Any, Any]) -> str:
    """``3 of 48 values are not finite: nan at [0, 4], ...``; of one number, what it is."""
    array = _as_array(whole)
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
        start, part = part_at(sample, self.at)
        for path, leaf in leaves_of(part):
            if not self._within(leaf):
                array = _as_array(leaf)
                wrong = ~((array >= self.low) & (array <= self.high))
                said = _places(leaf, f"outside {self.low} to {self.high}", wrong)
                raise ValidationError(f"{path_text((*start, *path))}: {said}")

    def _within(self, leaf: Any) -> bool:
        if isinstance(leaf, torch.Tensor):
            if leaf.layout is not torch.strided or leaf.is_nested or leaf.is_meta:
                return True
            if leaf.dtype.is_complex or leaf.is_quantized or not leaf.numel():
                return True
            if leaf.dtype is torch.bool:
                leaf = leaf.to(torch.uint8)
            least, most = torch.aminmax(leaf.detach())
            return bool(least >= self.low) and bool(most <= self.high)
        if isinstance(leaf, np.ndarray | np.generic):
            if leaf.dtype.kind not in "biuf" or not leaf.size:
                return True
            return bool(leaf.min() >= self.low) and bool(leaf.max() <= self.high)
        return not isinstance(leaf, int | float) or self.low <= leaf <= self.high

    def __repr__(self) -> str:
        at = "" if self.at is None else f", at={self.at!r}"
        return f"in_range({self.low}, {self.high}{at})"


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
