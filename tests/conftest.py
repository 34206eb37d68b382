"""What holds for every test."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """Free what a test leaves in cycles before the next one forks.

    The stock loader's errors keep its iterator alive in a cycle; workers forked while it is there
    inherit it and hang while they free it.
    """
    yield
    gc.collect()


@pytest.fixture(autouse=True, scope="module")
def what_stays_is_no_garbage() -> None:
    """Spare each of those collections the walk through everything imported and reported so far.

    Not after each test: what a test leaves in a cycle may be found only with the next one.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch believe in one, so that its pinning thread runs."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
