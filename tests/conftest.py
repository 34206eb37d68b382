"""What holds for every test."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """Free what a test leaves in cycles before the next one forks.

    The stock loader's errors keep its iterator alive in a cycle; workers forked while it is there
    inherit it and hang while they free it. What is alive now outlives many tests (reports, module
    fixtures): frozen, it is not walked through again and again, which took half of the whole time.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def imports_are_no_garbage() -> None:
    """Spare each of those collections the walk through everything that was imported."""
    gc.collect()
    gc.freeze()
