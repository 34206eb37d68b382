"""Lines in the log say which loader they are about."""

from __future__ import annotations

import gc
import os
import platform
import weakref

import pytest

from safeloader.failures.loader_log import LoaderLog, length_of
from safeloader.introspect.files import process_name


class Images:
    def __len__(self) -> int:
        pytest.fail("the user's code was called")


def test_lines_name_class_and_length(caplog: pytest.LogCaptureFixture) -> None:
    several = LoaderLog(Images(), 1000), LoaderLog(Images()), LoaderLog([1, 2, 3], kind="Mine")
    for log in several:
        log.warning("epoch %d", 3)
    assert caplog.messages == [
        "SafeDataLoader over Images (1000): epoch 3",
        "SafeDataLoader over Images: epoch 3",
        "Mine over list (3): epoch 3",
    ]


def test_a_length_that_raises_is_left_out() -> None:
    class Unsized:
        def __len__(self) -> int:
            raise NotImplementedError

    assert length_of(Unsized()) is None
    assert length_of([1, 2]) == 2


def test_a_name_may_hold_a_percent_sign(caplog: pytest.LogCaptureFixture) -> None:
    odd = type("Half%s", (), {})()
    LoaderLog(odd).warning("%d", 1)
    assert caplog.messages == ["SafeDataLoader over Half%s: 1"]


def test_the_dataset_is_not_kept() -> None:
    dataset = Images()
    log = LoaderLog(dataset)
    gone = weakref.ref(dataset)
    del dataset
    gc.collect()
    assert gone() is None
    assert log.loader_name == "SafeDataLoader over Images"


@pytest.mark.parametrize(("told", "number"), [("3", 3), ("", 0), ("a/../b", 0)])
def test_the_name_of_a_process_has_host_rank_and_pid(
    told: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", told)
    monkeypatch.setattr(platform, "node", lambda: "node/7 a")
    assert process_name() == f"node_7_a-rank{number}-{os.getpid()}"
