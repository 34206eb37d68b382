"""No text of ours runs the user's code: not that of indices, nor of keys, nor of exceptions."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from safeloader import DeliveryError, SafeDataLoader, SafeLoaderError

called: list[str] = []
HUGE = 1_000_000


class Hostile:
    """An index or sample that can be told apart, and does harm where it is asked for a text."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hostile) and other.number == self.number

    def __hash__(self) -> int:
        return self.number

    def _harm(self, *args: Any) -> Any:
        called.append("text")
        raise ZeroDivisionError("no text today")

    __repr__ = __str__ = __format__ = _harm


class Huge(Hostile):
    def __repr__(self) -> str:
        called.append("text")
        return "x" * HUGE

    __str__ = __repr__


class Fails:
    def __init__(self, exc: BaseException | None = None) -> None:
        self.exc = exc or KeyError("gone")

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: Any) -> Any:
        raise self.exc


def error_of(loader: SafeDataLoader[Any]) -> SafeLoaderError:
    called.clear()
    with pytest.raises(SafeLoaderError) as caught:
        list(loader)
    assert len(str(caught.value)) < 60_000
    assert len(json.dumps(caught.value.failure.to_dict())) < 120_000  # type: ignore[union-attr]
    repr(caught.value.failure)
    return caught.value


INDICES = [Hostile(1), Huge(1), "x" * HUGE, (Hostile(1), 2), 10**5000, b"x" * HUGE]


@pytest.mark.parametrize("index", INDICES, ids=lambda index: type(index).__name__)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_index_of_any_kind_does_not_hide_the_error(
    index: Any, workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dump, traces = tmp_path / "dumps", tmp_path / "traces"
    with caplog.at_level(logging.INFO, "safeloader"):
        for trace in (True, traces):
            error = error_of(
                SafeDataLoader(
                    Fails(),  # type: ignore[arg-type]
                    sampler=[index],
                    num_workers=workers,
                    trace=trace,
                    on_failure_dump=dump,
                )
            )
            assert isinstance(error, KeyError)
    assert not called
    assert len(list(dump.iterdir())) == 2
    assert all(path.stat().st_size < 200_000 for path in tmp_path.rglob("*.json"))
    assert all(len(line) < 60_000 for line in caplog.messages)


@pytest.mark.parametrize("index", INDICES, ids=lambda index: type(index).__name__)
def test_an_index_of_any_kind_can_be_skipped_audited_and_saved(
    index: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    called.clear()
    loader = SafeDataLoader(Fails(), sampler=[index], on_error="skip", recorder=None)  # type: ignore[arg-type]
    list(loader)
    audit = loader.audit
    assert audit is not None
    assert len(f"{audit}{audit!r}{json.dumps(audit.to_dict())}") < 5_000
    for suffix in (".npy", ".csv", ".jsonl"):
        loader.provenance.save(tmp_path / f"table{suffix}")
    assert not called


def test_keys_and_drawn_indices_are_told_without_asking_them() -> None:
    error = error_of(
        SafeDataLoader([1, 2], key=lambda sample: Hostile(7), sampler=[0, 1], batch_size=2)
    )
    assert isinstance(error, DeliveryError)
    assert not called


class Unprintable(Exception):
    def __init__(self, said: Any) -> None:
        super().__init__()
        self.said = said

    def __str__(self) -> str:
        if isinstance(self.said, BaseException):
            raise self.said
        return self.said  # type: ignore[no-any-return]

    def __getattribute__(self, name: str) -> Any:
        if name in ("__dict__", "filename"):
            raise OSError("not to be asked")
        return super().__getattribute__(name)


@pytest.mark.parametrize("said", [ValueError("x"), SystemExit(3), "x" * HUGE, None])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_without_a_text_is_raised_all_the_same(
    said: Any, on_error: str, workers: int
) -> None:
    dataset: Any = Fails(Unprintable(said))
    loader = SafeDataLoader(dataset, num_workers=workers, on_error=on_error, max_skipped=4)
    if on_error == "raise":
        assert isinstance(error_of(loader), Unprintable)
    else:
        list(loader)
        assert loader.audit is not None
        assert loader.audit.counts["skipped"] == 4
