"""What to do about a sample that fails. Runs in: both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Skip:
    """What an ``on_error`` callable gives to leave the sample out; there is one in every process.

    Example:
        >>> from safeloader import SKIP, SafeDataLoader
        >>> def only_known_bad(failure):  # runs where the sample failed, with the Failure
        ...     return SKIP if failure.exception_type == "ZeroDivisionError" else 0.0
        >>> class Inverses:
        ...     def __len__(self):
        ...         return 4
        ...     def __getitem__(self, index):
        ...         return 1 / index
        >>> loader = SafeDataLoader(Inverses(), batch_size=4, on_error=only_known_bad)
        >>> [len(batch) for batch in loader], loader.audit.skipped.tolist()
        ([3], [0])
    """

    def __repr__(self) -> str:
        return "safeloader.SKIP"

    def __reduce__(self) -> str:
        return "SKIP"


SKIP = Skip()


class Policy(NamedTuple):
    """The loader's ``on_error`` and ``retries``; ``tells``: with ``on_failure_dump``, the failures
    of samples left out or replaced travel with their batch."""

    on_error: str | Callable[[Any], Any] = "raise"
    retries: int = 0
    tells: bool = False
