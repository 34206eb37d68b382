"""Checks of samples, for ``validate=``. Runs in: both.

::

    from safeloader import SafeDataLoader, checks

    SafeDataLoader(dataset, validate=[checks.finite(), checks.schema(), my_check])

A check is any callable that takes ``(sample, index)`` and raises if the sample is not as it should
be. It runs where the sample was fetched, before collation. To be used under ``spawn`` it has to be
picklable, as those here are.
"""

import typing

from safeloader.checks.schema import Schema as schema
from safeloader.checks.unique import Unique as unique

if typing.TYPE_CHECKING:
    from safeloader.checks.values import Finite as finite
    from safeloader.checks.values import InRange as in_range

__all__ = ["finite", "in_range", "schema", "unique"]


def __getattr__(name: str) -> object:
    # When it is asked for: what few programs use is not to be in the memory of all.
    if name in ("finite", "in_range"):
        from safeloader.checks.values import Finite, InRange

        globals().update(finite=Finite, in_range=InRange)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
