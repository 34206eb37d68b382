"""Lines in the log say which loader they are about."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from safeloader.main.naming import LoaderLog


class Images:
    def __init__(self, length: Any) -> None:
        self.length = length
        self.asked = 0

    def __len__(self) -> int:
        self.asked += 1
        return self.length()  # type: ignore[no-any-return]


def test_lines_name_class_and_length(caplog: pytest.LogCaptureFixture) -> None:
    dataset = Images(lambda: 1000)
    log = LoaderLog(dataset)
    log.debug("not shown")
    assert dataset.asked == 0
    log.warning("epoch %d", 3)
    log.warning("again")
    assert caplog.messages == [
        "SafeDataLoader over Images (1000): epoch 3",
        "SafeDataLoader over Images (1000): again",
    ]
    assert dataset.asked == 1


def test_a_length_that_raises_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    dataset = Images(lambda: 1 / 0)
    LoaderLog(dataset).warning("so")
    assert caplog.messages == ["SafeDataLoader over Images: so"]


def test_a_name_may_hold_a_percent_sign(caplog: pytest.LogCaptureFixture) -> None:
    odd = type("Half%s", (), {})()
    LoaderLog(odd).warning("%d", 1)
    assert caplog.messages == ["SafeDataLoader over Half%s: 1"]


def test_the_dataset_is_not_kept() -> None:
    dataset = Images(lambda: 1)
    log = LoaderLog(dataset)
    gone = weakref.ref(dataset)
    del dataset
    gc.collect()
    assert gone() is None
    assert log.loader_name == "SafeDataLoader over Images"
