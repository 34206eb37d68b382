"""Median, quartiles and an interval for the median, whatever the distribution of the values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST_FOR_INTERVAL = 6
"""With fewer values not even their whole range holds the median with 95 % confidence."""


@dataclass(frozen=True)
class Spread:
    median: float
    quartiles: tuple[float, float]
    interval: tuple[float, float] | None
    """95 % confidence interval of the median; None with too few values."""


def median_interval(
    values: Sequence[float], confidence: float = 0.95
) -> tuple[float, float] | None:
    """The interval between the k-th smallest and the k-th largest value, as narrow as allowed.

    The true median lies below the k-th smallest of n values exactly when fewer than k of them fell
    below it, and each does so with chance 1/2: a binomial tail. No normal distribution is assumed,
    which matters here, because a busy machine gives ratios with long tails.
    """
    count = len(values)
    outside, rank = 0.0, 0
    while rank < count // 2:
        outside += 2 * math.comb(count, rank) / 2**count
        if outside > 1 - confidence:
            break
        rank += 1
    if rank == 0:
        return None
    ordered = sorted(values)
    return ordered[rank - 1], ordered[count - rank]


def spread(values: Sequence[float]) -> Spread:
    low, middle, high = (float(each) for each in np.percentile(values, (25, 50, 75)))
    return Spread(middle, (low, high), median_interval(values))
