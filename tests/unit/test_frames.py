"""The user's failing frame: which one, and what is told of its locals."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, default_collate

from safeloader import CollateError, SafeDataLoader, SampleError
from safeloader.failures import dump
from safeloader.introspect.frames import is_users, is_users_class, subscripted, user_frame

BAD = 13


def raised(call: Any, *args: Any) -> Exception:
    try:
        call(*args)
    except Exception as exc:
        return exc
    pytest.fail("nothing was raised")


def frame_of(call: Any, *args: Any) -> dict[str, Any]:
    found = user_frame(raised(call, *args))
    assert found is not None
    return found


def texts(found: dict[str, Any]) -> dict[str, str]:
    return {name: about["repr"] for name, about in found["locals"].items()}


def reads(path: str) -> Any:
    image, rate = None, 0.5
    return image.size * rate  # type: ignore[attr-defined]


def calls_a_library() -> Any:
    kept = torch.zeros(2, 3)
    return default_collate([kept, "text"])


def makes_a_list(paths: list[str]) -> Any:
    size = 3
    return [int(each) + size for each in paths]


def holds_secrets() -> Any:
    password, url = "sesame", "https://bob:sesame@host/x.png"
    name, value = "password", "sesame"
    raise ValueError(len(password + url + name + value))


class Hostile:
    def __getattribute__(self, name: str) -> Any:
        pytest.fail("the user's code was called")

    __repr__ = __len__ = __eq__ = __getattr__ = __getattribute__  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


def holds_hostile_things(thing: Any) -> Any:
    raise ValueError("no")


# ── which frame, and what of it ──────────────────────────────────────────────────────────────────


def test_the_locals_come_with_what_tells_most_first() -> None:
    found = frame_of(reads, "/data/scans/0137.png")
    assert found["function"] == "reads"
    assert found["file"].endswith("test_frames.py")
    assert [*texts(found).items()] == [
        ("path", "'/data/scans/0137.png'"),
        ("image", "None"),
        ("rate", "0.5"),
    ]


def test_it_is_the_innermost_of_the_users_own_code() -> None:
    found = frame_of(calls_a_library)
    assert found["function"] == "calls_a_library"
    assert found["locals"]["kept"]["shape"] == [2, 3]


def test_a_comprehension_is_part_of_the_function_around_it() -> None:
    found = frame_of(makes_a_list, ["7", "x"])
    assert found["function"] == "makes_a_list"
    told = {"size": "3"} | ({"each": "'x'"} if sys.version_info < (3, 12) else {})
    assert told.items() <= texts(found).items()


def test_secrets_are_not_told() -> None:
    found = frame_of(holds_secrets)
    assert "sesame" not in json.dumps(found)
    assert texts(found)["password"] == "[redacted]"


def test_no_code_of_the_users_runs() -> None:
    assert "thing" in frame_of(holds_hostile_things, Hostile())["locals"]


def test_much_is_bounded() -> None:
    code = "def many():\n" + "".join(f"    v{n} = 'x' * 500\n" for n in range(99)) + "    1 / 0\n"
    space: dict[str, Any] = {}
    exec(code, space)
    found = frame_of(space["many"])
    assert 0 < len(found["locals"]) <= 30
    assert len(json.dumps(found)) < 5000


def test_code_of_libraries_is_not_the_users() -> None:
    assert is_users(__file__)
    assert not any(map(is_users, (logging.__file__, np.__file__, torch.__file__, dump.__file__)))
    assert is_users_class(Hostile)
    assert not any(map(is_users_class, (torch.Tensor, np.ndarray, logging.Logger, list, dict)))


# ── the expression ───────────────────────────────────────────────────────────────────────────────


class Holds:
    def __init__(self) -> None:
        self.rows = [1, 2]

    @property
    def computed(self) -> list[int]:
        return [*self.rows]


def test_what_was_asked_for_what_is_read_from_the_expression() -> None:
    holds, index, other = Holds(), 7, [0]
    for call, sequence, asked in (
        (lambda: holds.rows[index], holds.rows, 7),
        (lambda: other[-2], other, -2),
    ):
        assert subscripted(raised(call)) == (sequence, asked)
    for call in (
        lambda: holds.computed[index],  # to know it would run code
        lambda: other[index + 1],
        lambda: other.index(index),
    ):
        assert subscripted(raised(call)) is None


# ── in what is told ──────────────────────────────────────────────────────────────────────────────


class Scans(Dataset[Any]):
    def __init__(self, bad: int = BAD) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        path, image = f"/data/{index}.png", None if index == self.bad else torch.zeros(2)
        return len(path) + image.sum()  # type: ignore[union-attr]


def collates(samples: list[Any]) -> Any:
    longest = len(samples)
    raise ValueError(f"cannot pad to {longest}")


@pytest.mark.parametrize("workers", [0, 2])
def test_they_are_in_the_failure_in_the_message_and_in_the_dump(
    workers: int, tmp_path: Any
) -> None:
    loader = SafeDataLoader(Scans(), batch_size=4, num_workers=workers, on_failure_dump=tmp_path)
    error = raised(list, loader)
    assert isinstance(error, SampleError)
    assert "\n  in __getitem__ (test_frames.py:" in str(error)
    assert "\n    path = '/data/13.png'\n    image = None\n" in str(error)
    (file,) = tmp_path.glob("*.json")
    told = json.loads(file.read_text())["failure"]["user_frame"]
    assert told == error.failure.to_dict()["user_frame"]  # type: ignore[union-attr]
    assert told["locals"]["path"] == {"type": "str", "length": 12, "repr": "'/data/13.png'"}
    assert "self" not in told["locals"]  # the dataset is described by itself


def test_of_a_collate_function_too_and_none_of_torchs_own() -> None:
    sound = Scans(bad=-1)
    error = raised(list, SafeDataLoader(sound, batch_size=4, collate_fn=collates))
    assert isinstance(error, CollateError)
    assert "in collates (test_frames.py:" in str(error)
    error = raised(list, SafeDataLoader([1, "a"], batch_size=2))
    assert isinstance(error, CollateError)
    assert error.failure.user_frame is None  # type: ignore[union-attr]
