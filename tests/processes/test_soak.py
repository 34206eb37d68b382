"""Short epochs with faults at random: nothing leaks, nothing is lost (``python -m tests.soak``)."""

from __future__ import annotations

import pytest

from tests.soak import soak


@pytest.mark.slow
@pytest.mark.uncovered
def test_a_short_soak() -> None:
    before, after = soak(40, seed=7)
    assert after == before
