"""A Python that runs without its global lock: untested, so torch's own loader serves, and why."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import safeloader
from safeloader import SafeDataLoader, SafeLoaderError, _python, beside, loader

WHY = "not tested with a Python that runs without its global lock"


def forget() -> None:
    """What was found, and said, of this Python."""
    loader.why_unrecorded.cache_clear()
    loader._warn_once.cache_clear()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A free-threaded build, whose lock is on."""
    real = sysconfig.get_config_var
    built = {"Py_GIL_DISABLED": 1}
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: built.get(name) or real(name))
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: True, raising=False)
    forget()
    yield monkeypatch
    forget()


@pytest.fixture
def unlocked(built: pytest.MonkeyPatch) -> None:
    """The same, and off."""
    built.setattr(sys, "_is_gil_enabled", lambda: False)


def batches(loader: Any) -> Any:
    return [batch.tolist() for batch in loader]


def plain() -> Any:
    return DataLoader(torch.arange(6), batch_size=4)  # type: ignore[arg-type]


EXPECTED = [[0, 1, 2, 3], [4, 5]]


@pytest.mark.usefixtures("unlocked")
def test_one_warning_and_torchs_own_loader_serves() -> None:
    ours: Any = SafeDataLoader(torch.arange(6), batch_size=4)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=f"{WHY}.*PYTHON_GIL=1.*torch's own loader") as caught:
        assert batches(ours) == EXPECTED
    assert [str(each.message) for each in caught][1:] == []
    assert batches(ours) == EXPECTED  # a second warning would be an error here
    assert (ours.last_batch, ours.audit) == (None, None)


@pytest.mark.usefixtures("unlocked")
def test_an_instrumented_loader_too() -> None:
    ours: Any = safeloader.instrument(plain())
    with pytest.warns(UserWarning, match=WHY):
        assert batches(ours) == EXPECTED
    assert ours.audit is None


@pytest.mark.usefixtures("unlocked")
def test_who_asked_for_checks_gets_an_error() -> None:
    with pytest.raises(SafeLoaderError, match=WHY):
        iter(SafeDataLoader([1], verify="raise"))


@pytest.mark.usefixtures("unlocked")
def test_under_the_launcher_it_is_said_once_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(beside, "_state", beside._State())
    monkeypatch.setattr(beside.atexit, "register", lambda function: None)
    theirs = plain()
    for _ in range(2):
        assert batches(beside.iterate(theirs, DataLoader.__iter__)) == EXPECTED
    assert capsys.readouterr().err.count(WHY) == 1
    beside._say()
    assert f"NOT recorded: DataLoader at {__file__}" in capsys.readouterr().err


@pytest.mark.usefixtures("built")
def test_such_a_build_whose_lock_is_on_is_recorded() -> None:
    ours: Any = SafeDataLoader([1, 2])
    assert len(list(ours)) == 2
    assert ours.audit.ok


def test_this_python_has_its_lock() -> None:
    assert not _python.runs_threads_at_once()
