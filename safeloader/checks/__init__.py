"""Checks of samples, for ``validate=``. Runs in: both.

::

    from safeloader import SafeDataLoader, checks

    SafeDataLoader(dataset, validate=[checks.finite(), checks.schema(), my_check])

A check is any callable that takes ``(sample, index)`` and raises if the sample is not as it should
be. It runs where the sample was fetched, before collation. To be used under ``spawn`` it has to be
picklable, as those here are.
"""

from safeloader.checks.schema import Schema as schema
from safeloader.checks.unique import Unique as unique
from safeloader.checks.values import Finite as finite
from safeloader.checks.values import InRange as in_range

__all__ = ["finite", "in_range", "schema", "unique"]
