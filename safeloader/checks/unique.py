"""Whether no two indices are one sample. Runs in: both."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any


class Unique:
    """A check: no two samples of an epoch have the same key.

    The keys go along with their batches, and the main process compares them, also those of
    different workers: what ``key=`` of :class:`~safeloader.SafeDataLoader` does, and a loader takes
    one of the two. An index that is asked for again is no second sample.

    Args:
        key: gives a sample's identity: an int, a str or a tuple of them.

    Raises:
        TypeError: if ``key`` cannot be called.

    Example:
        >>> from safeloader import DeliveryError, SafeDataLoader, checks
        >>> samples = [{"id": number} for number in (7, 8, 9, 7)]
        >>> unique = checks.unique(lambda sample: sample["id"])
        >>> try:
        ...     list(SafeDataLoader(samples, batch_size=2, validate=[unique]))
        ... except DeliveryError as error:
        ...     print(error.failure.message)
        index 3 and index 0 are one sample (key 7)
    """

    def __init__(self, key: Callable[[Any], Hashable]) -> None:
        if not callable(key):
            raise TypeError(f"unique takes a callable that gives a sample's key; got {key!r}")
        self.key = key

    def __call__(self, sample: Any, index: Any) -> None:
        """Nothing is known of one sample alone."""

    def __repr__(self) -> str:
        return f"unique({getattr(self.key, '__name__', self.key)})"
