"""A variable of the environment is read as ``os.environ.get`` reads it, only faster."""

from __future__ import annotations

import os

import pytest

from safeloader._python import environment

NAME = "SAFELOADER_OF_THIS_TEST"


def test_a_variable_is_read_as_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment(NAME) == ""
    for value in ("1", "", "größer"):
        monkeypatch.setenv(NAME, value)
        assert environment(NAME) == value
    monkeypatch.delenv(NAME)
    assert environment(NAME) == ""


def test_an_environment_that_somebody_put_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment(NAME) == ""
    monkeypatch.setattr(os, "environ", {NAME: "theirs"})
    assert environment(NAME) == "theirs"
