"""A failing sample once more out of the file of its failure, with the random numbers it had."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from safeloader import Failure, SafeDataLoader, SafeLoaderError, replay
from safeloader.failures import dump, random_numbers
from safeloader.introspect.random_state import RandomState, preserved
from tests.oracle import numbers, rng_state, seed_all
from tests.unit.test_replay import BAD, Bad, Draws, DrawsTogether, seed_worker

BYTES_MAX = 40_000  # of a file


@pytest.fixture(autouse=True)
def where_they_stood() -> Iterator[None]:
    with preserved():
        yield


def written(folder: Path, dataset: Any, **options: Any) -> list[Path]:
    """What a loader over ``dataset`` writes of failures, oldest first."""
    seed_all(3)
    options = {"batch_size": 6, "shuffle": True, "worker_init_fn": seed_worker} | options
    loader: Any = SafeDataLoader(dataset, on_failure_dump=folder, **options)
    try:
        for _ in range(2):  # it is not the first epoch that fails
            dataset.fails = loader.recorder is not None and loader.recorder.epochs > 0
            list(loader)
    except SafeLoaderError:
        pass
    return sorted(folder.glob("*.json"), key=lambda path: int(path.stem.rpartition("-")[2]))


class FailsLater(Draws):
    fails = False

    def __getitem__(self, index: int) -> torch.Tensor:
        return super().__getitem__(index) if self.fails else torch.tensor(numbers())


class FailsLaterTogether(DrawsTogether, FailsLater):
    pass


def drawn_again(path: Path, dataset: Any) -> str:
    seed_all(99)  # wherever the generators stand here
    before = rng_state()
    with pytest.raises(Bad) as info:
        replay(path, dataset)
    assert rng_state() == before
    return str(info.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"seed": 11}, {"seed": 11, "seed_per": "batch"}, {"retries": 1}],
    ids=["no seed", "a sample", "a batch", "retries"],
)
def test_what_was_raised_draws_the_same_numbers(
    workers: int, options: dict[str, Any], tmp_path: Path
) -> None:
    dataset = FailsLater()
    (path,) = written(tmp_path, dataset, num_workers=workers, **options)
    failure = json.loads(path.read_text())["failure"]
    assert (failure["index"], failure["epoch"]) == (BAD, 1)
    assert drawn_again(path, dataset) == failure["message"]
    assert path.stat().st_size < BYTES_MAX


@pytest.mark.parametrize("options", [{}, {"seed": 11, "seed_per": "batch"}])
def test_of_a_batch_made_in_one_call(options: dict[str, Any], tmp_path: Path) -> None:
    dataset = FailsLaterTogether()
    (path,) = written(tmp_path, dataset, num_workers=1, **options)
    assert drawn_again(path, dataset) == json.loads(path.read_text())["failure"]["message"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("on_error", ["skip", "replace"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (FailsLater, {}),
        (FailsLater, {"retries": 1}),
        (FailsLater, {"seed": 11}),
        (FailsLater, {"seed": 11, "seed_per": "batch"}),
        (FailsLaterTogether, {}),
        (FailsLaterTogether, {"seed": 11, "seed_per": "batch"}),
    ],
)
def test_what_was_left_out_does_too(
    kind: Any, options: dict[str, Any], on_error: str, workers: int, tmp_path: Path
) -> None:
    dataset = kind(also=True)
    paths = written(tmp_path, dataset, num_workers=workers, on_error=on_error, **options)
    assert len(paths) == 2
    for path in paths:
        assert drawn_again(path, dataset) == json.loads(path.read_text())["failure"]["message"]


class Killed(Draws):
    """Sample 13 kills its worker, and tells here what it draws."""

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == BAD and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(numbers())


@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("on_crash", ["raise", "restart"])
def test_what_killed_its_worker_has_its_numbers_under_a_seed(
    on_crash: str, per: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: Any = {"batch_size": 6, "seed": 11, "seed_per": per, "shuffle": True}
    loader: Any = SafeDataLoader(
        Killed(), num_workers=2, on_crash=on_crash, on_failure_dump=tmp_path, **options
    )
    in_main: Any = SafeDataLoader(Killed(), **options)
    for each in (loader, in_main):
        each.set_epoch(3)
    with suppress(SafeLoaderError):
        list(loader)
    list(in_main)
    path = min(tmp_path.iterdir(), key=lambda path: int(path.stem.rpartition("-")[2]))
    assert random_numbers.of_sample(dump.read(path)).startswith("seed=11, epoch 3, ")
    assert replay(path, Killed()).equal(in_main.replay(BAD, epoch=0))
    assert "The random numbers are the same" in caplog.messages[-1]


def test_without_a_seed_nobody_knows_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = written(tmp_path, Killed(), num_workers=2)
    assert json.loads(path.read_text())["random"] is None
    replay(path, Killed())
    assert "the random numbers, which are not known: a worker that died" in caplog.messages[-1]
    assert "with seed= they are made again" in caplog.messages[-1]


def test_the_seed_of_an_epoch_that_was_set(tmp_path: Path) -> None:
    loader: Any = SafeDataLoader(Draws(), 6, seed=11, on_failure_dump=tmp_path)
    loader.set_epoch(41)
    with pytest.raises(Bad):
        list(loader)
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert content["failure"]["epoch"] == 0  # as this process counts them
    told = {"seed": 11, "epoch": 41, "batch": 2, "rank": 0, "per": "sample"}
    assert content["random"] == told
    assert drawn_again(path, Draws()) == content["failure"]["message"]


def test_a_generator_of_its_own_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Noisy(FailsLater):
        def __init__(self) -> None:
            super().__init__()
            self.rng = np.random.default_rng(3)

    (path,) = written(tmp_path, Noisy(), num_workers=0)
    sound = Noisy()
    replay(path, sound)
    assert "are the same, but for those of dataset.rng, which nobody keeps" in caplog.messages[-1]


# ── what stands in the file ──────────────────────────────────────────────────────────────────────


def of_index(index: Any, folder: Path, before: tuple[Any, ...] = ()) -> Path:
    failure = Failure(
        phase="sample",
        exception_type="KeyError",
        message="x",
        index=index,
        position=len(before),
        indices=(*before, index),
    )
    path = dump.write(failure, folder)
    assert path is not None
    return path


@pytest.mark.parametrize("index", [7, -1, "photos/7.png", (1, "a", (2, 3)), True, 0.5])
def test_an_index_comes_back_as_it_was(index: Any, tmp_path: Path) -> None:
    assert dump.read(of_index(index, tmp_path)).index == index
    assert replay(of_index(index, tmp_path), {index: "there"}) == "there"


@pytest.mark.parametrize("index", [1 << 70, b"raw", frozenset({1}), "x" * 5000])
def test_one_that_json_cannot_hold_is_refused(index: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"as a text only.*pickle\.dump\(error, file\)"):
        replay(of_index(index, tmp_path), {index: 1})
    with pytest.raises(ValueError, match="as a text only"):  # one before it, whose numbers count
        replay(of_index(3, tmp_path, (index,)), {3: 1})


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.Philox, np.random.SFC64])
def test_a_state_of_any_generator_of_numpys(bits: Any) -> None:
    state = RandomState(random.getstate(), bits(5).state, torch.get_rng_state())
    told = json.loads(json.dumps(random_numbers._state_to_json(state)))
    again = random_numbers._state_from_json(told)
    assert again.python == state.python
    assert again.torch.equal(state.torch)
    one, two = bits(1), bits(2)
    one.state, two.state = state.numpy, again.numpy
    assert one.random_raw(9).tolist() == two.random_raw(9).tolist()


def test_a_number_kept_for_the_next_call_is_in_it() -> None:
    random.gauss(0, 1), np.random.randn(), torch.randn(3)
    state = RandomState.now()
    expected = numbers()
    told = json.loads(json.dumps(random_numbers._state_to_json(state)))
    random_numbers._state_from_json(told).set()
    assert numbers() == expected


def bomb() -> list[str]:
    return ["<u4", base64.b85encode(zlib.compress(b"\0" * 10_000_000)).decode()]


@pytest.mark.parametrize(
    "found",
    [
        7,
        {"seed": 11},
        {"seed": "11", "epoch": 0, "batch": 0, "rank": 0, "per": "sample"},
        {"seed": 11, "epoch": 0, "batch": 0, "rank": 0, "per": "epoch"},
        {"generators": None},
        {"generators": {"python": [3, bomb(), None], "numpy": {}, "torch": bomb()}},
        {"generators": {"python": [3, ["|O", ""], None], "numpy": {}, "torch": ["|u1", "x"]}},
    ],
)
def test_numbers_that_are_none_are_not_known(
    found: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = of_index(3, tmp_path)
    content = json.loads(path.read_text()) | {"random": found}
    path.write_text(json.dumps(content))
    before = rng_state()
    assert replay(path, {3: 4}) == 4
    assert rng_state() == before
    assert "the random numbers, which are not known: nothing in this failure" in caplog.text


def test_a_file_of_an_earlier_release(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = of_index(3, tmp_path)
    content = json.loads(path.read_text())
    del content["random"], content["indices_whole"]
    path.write_text(json.dumps(content))
    assert replay(path, {3: 4}) == 4
    assert "which are not known" in caplog.text


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"failure": {"phase": 3}}', '{"failure": 1}'])
def test_a_file_without_a_failure(text: str, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"some\.json holds no failure: give a file of"):
        replay(path, [1])
    with pytest.raises(FileNotFoundError):
        replay(tmp_path / "none.json", [1])
