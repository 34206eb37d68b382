"""The sample that failed, once more in main, with the random numbers it had in the worker."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

import safeloader
from safeloader import SKIP, Failure, SafeDataLoader, SampleError, replay
from safeloader.introspect.random_state import preserved
from tests.datasets import Stream
from tests.oracle import numbers, rng_state, seed_all
from tests.processes.test_failures import caught

BAD = 13


class Bad(Exception):
    """Carries the numbers that were drawn when it was raised."""


class Draws:
    """Each sample draws; index 13 then fails, index 12 too where ``also`` is set."""

    def __init__(self, also: bool = False) -> None:
        self.also = also

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        drawn = numbers()
        if index == BAD or (self.also and index == BAD - 1):
            raise Bad(drawn)
        return torch.tensor(drawn)


class DrawsTogether(Draws):
    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices]


def seed_worker(worker_id: int) -> None:
    """Numpy's generator is the same in all workers unless somebody seeds it."""
    np.random.seed(worker_id + 5)


def replayed(what: Any, dataset: Any) -> list[float]:
    before = rng_state()
    with pytest.raises(Bad) as info:
        replay(what, dataset)
    assert rng_state() == before
    assert "__getitem__" in [frame.name for frame in info.traceback]
    return info.value.args[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("workers", "method", "shuffle"),
    [
        (0, None, False),
        (0, None, True),
        (1, "fork", False),
        (1, "fork", True),
        (2, "fork", False),
        (2, "fork", True),
        pytest.param(2, "spawn", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dataset", [Draws(), DrawsTogether()], ids=["one by one", "together"])
def test_the_same_numbers(dataset: Any, workers: int, method: str | None, shuffle: bool) -> None:
    seed_all(3)
    error = caught(
        SafeDataLoader(
            dataset,
            batch_size=6,
            shuffle=shuffle,
            num_workers=workers,
            multiprocessing_context=method,
            worker_init_fn=seed_worker,
        )
    )
    assert (error.index, error.failure.indices.index(BAD)) == (BAD, error.failure.position)
    drawn = error.args[0]
    assert drawn == replayed(error, dataset)
    assert drawn == replayed(error.failure, dataset)
    seed_all(99)  # wherever the generators stand here
    assert drawn == replayed(pickle.loads(pickle.dumps(error)), dataset)
    assert drawn == replayed(pickle.loads(pickle.dumps(error.failure)), dataset)


class OfTensors(Draws):
    """What it holds is found under ints alone, and its sampler gives tensors, or the reverse."""

    def __init__(self, keys: list[Any]) -> None:
        super().__init__()
        self.table = {key: at for at, key in enumerate(keys)}

    def __getitem__(self, index: Any) -> torch.Tensor:
        drawn = numbers()
        if index not in self.table:
            raise Bad(drawn)
        return torch.tensor(drawn)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("indices", [torch.arange(40), np.arange(40, dtype=np.int16)])
def test_the_index_is_given_as_it_was_drawn(workers: int, indices: Any) -> None:
    dataset = OfTensors([] if isinstance(indices, torch.Tensor) else [*range(13)])
    error = caught(SafeDataLoader(dataset, batch_size=6, sampler=indices, num_workers=workers))
    drawn = error.args[0]
    assert drawn == replayed(error, dataset)
    assert drawn == replayed(pickle.loads(pickle.dumps(error.failure)), dataset)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_later_epoch(workers: int) -> None:
    dataset = Draws()
    loader = SafeDataLoader(
        dataset, 6, num_workers=workers, persistent_workers=workers > 0, shuffle=True
    )
    first, second = caught(loader), caught(loader)
    assert first.args[0] != second.args[0]
    assert replayed(second, dataset) == second.args[0]
    assert replayed(first, dataset) == first.args[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_without_batches(workers: int) -> None:
    dataset = Draws()
    error = caught(SafeDataLoader(dataset, batch_size=None, num_workers=workers))
    assert replayed(error, dataset) == error.args[0]


def test_after_one_that_was_left_out_before() -> None:
    dataset = Draws(also=True)
    asked: list[Failure] = []

    def on_error(failure: Failure) -> Any:
        asked.append(failure)
        return SKIP

    loader = SafeDataLoader(dataset, batch_size=6, on_error=on_error)
    assert sum(map(len, loader)) == 38
    assert [failure.index for failure in asked] == [12, 13]
    for failure in asked:
        drawn = replayed(failure, dataset)
        assert failure.message == str(drawn)


def test_after_retries() -> None:
    dataset = Draws()
    error = caught(SafeDataLoader(dataset, batch_size=6, retries=1))
    assert replayed(error, dataset) == error.args[0]


class Heals(Draws):
    bad = True

    def __getitem__(self, index: int) -> torch.Tensor:
        if not self.bad:
            return torch.tensor(numbers())
        return super().__getitem__(index)


def test_a_sample_that_comes_this_time_is_given() -> None:
    dataset = Heals()
    loader = SafeDataLoader(dataset, batch_size=6)
    error = caught(loader)
    dataset.bad = False
    assert loader.replay(error).tolist() == torch.tensor(error.args[0]).tolist()
    assert safeloader.replay is replay


def test_a_plain_index_is_asked_for_here_and_now() -> None:
    dataset = Heals()
    with preserved():
        expected = torch.tensor(numbers())
    assert SafeDataLoader(dataset).replay(3).equal(expected)
    assert replay("b", {"b": 5}) == 5


def test_a_failure_without_an_index() -> None:
    failure = Failure(
        phase="collate", exception_type="TypeError", message="x", indices=tuple(range(30))
    )
    with pytest.raises(ValueError, match=r"collate.*\[0, 1, 2"):
        replay(failure, Draws())
    with pytest.raises(ValueError, match="carries no failure"):
        replay(SampleError("made by hand"), Draws())


def test_a_stream_has_no_index_to_ask_for() -> None:
    stream: IterableDataset[Any] = Stream()
    for what in (3, Failure(phase="sample", exception_type="KeyError", message="x", index=(0, 3))):
        with pytest.raises(TypeError, match=r"iterate it.*get_worker_info\(\) is None here"):
            replay(what, stream)


def test_what_cannot_be_replayed_is_told_for_what_it_is() -> None:
    with pytest.raises(TypeError, match=r"not KeyError.*No SafeDataLoader raised this error"):
        replay(KeyError(3), Draws())
    with pytest.raises(TypeError, match=r"not dict.*give the file: replay\(pathlib"):
        replay({"index": 3}, Draws())


def test_the_warning_names_the_loader(caplog: pytest.LogCaptureFixture) -> None:
    failure = Failure(
        phase="crash", exception_type="WorkerCrashError", message="x", index=1, position=0
    )
    replay(failure, [5, 6])
    assert caplog.messages[0] == (
        "SafeDataLoader over list (2): index 1 killed its worker: replaying it here may do the "
        "same to this process"
    )


# ── what is told of it ───────────────────────────────────────────────────────────────────────────


class Flaky(Dataset[float]):
    """Sample 13 fails in a worker, and where it is not mended."""

    def __init__(self, draws: bool = True) -> None:
        self.mended, self.draws = False, draws

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> float:
        drawn = random.random() if self.draws else 0.0
        if index == BAD and not self.mended:
            raise Bad(drawn)
        return drawn


def failed(dataset: Any, **options: Any) -> tuple[SafeDataLoader[Any], SampleError]:
    loader: SafeDataLoader[Any] = SafeDataLoader(dataset, batch_size=4, **options)
    with pytest.raises(SampleError) as info:
        list(loader)
    return loader, info.value


@pytest.mark.parametrize("workers", [0, 2])
def test_that_it_passes_is_told_and_what_differs(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = Flaky()
    loader, error = failed(dataset, num_workers=workers)
    dataset.mended = True
    assert loader.replay(error) > 0
    (said,) = caplog.messages
    assert "index 13 passes here: it raised there. What differs is " in said
    assert "dataset: mended was False, now True" in said
    assert "The random numbers are the same" in said
    assert ("it was worker 1 (pid" in said) is (workers == 2)


def test_one_that_fails_again_is_told_by_its_error_alone(caplog: pytest.LogCaptureFixture) -> None:
    loader, error = failed(Flaky())
    with pytest.raises(Bad):
        loader.replay(error)
    assert caplog.messages == []


def test_that_a_sample_refused_or_not_collated_comes_is_nothing_to_tell(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuses(sample: Any, index: int) -> None:
        if index == BAD:
            raise ValueError("no")

    sound = list(range(40))
    loader, error = failed(sound, validate=refuses)
    assert loader.replay(error) == BAD
    assert caplog.messages == []


def test_of_what_was_inherited_it_is_no_way_to_see_it(caplog: pytest.LogCaptureFixture) -> None:
    failure = Failure(
        phase="sample",
        exception_type="BadZipFile",
        message="x",
        index=1,
        position=0,
        worker_id=0,
        pid=1,
        _inherited="first suspect: dataset.archive (zipfile.ZipFile), inherited over the fork",
    )
    replay(failure, [5, 6])
    said = caplog.messages[-1]
    assert "That it passes says nothing: dataset.archive (zipfile.ZipFile), inherited" in said


@pytest.mark.parametrize("draws", [True, False])
def test_a_bare_index_has_other_random_numbers(
    draws: bool, caplog: pytest.LogCaptureFixture
) -> None:
    loader: SafeDataLoader[Any] = SafeDataLoader(Flaky(draws))
    loader.replay(5)
    (said,) = caplog.messages
    assert "index 5: called without the random numbers that it had" in said
    assert ("it draws others here" in said) is draws


# ── what was delivered ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def delivered() -> SafeDataLoader[Any]:
    numbered = [number * 10 for number in range(40)]
    loader: SafeDataLoader[Any] = SafeDataLoader(
        numbered, batch_size=4, shuffle=True, num_workers=2
    )
    for _ in range(2):
        list(loader)
    return loader


def test_a_sample_of_a_batch(
    delivered: SafeDataLoader[Any], caplog: pytest.LogCaptureFixture
) -> None:
    record = delivered.last_batch
    assert delivered.replay(record, position=2) == record.indices[2] * 10
    (said,) = caplog.messages
    by = f"delivered in epoch 1, batch 9, position 2 by worker {record.worker_id} (pid {record.pid}"
    assert f"index {record.indices[2]}, {by}" in said
    assert "as only those of a failure are kept" in said


def test_an_index_of_an_epoch(
    delivered: SafeDataLoader[Any], caplog: pytest.LogCaptureFixture
) -> None:
    first = delivered.provenance.batch(3, epoch=0)
    assert delivered.replay(first.indices[1], epoch=0) == first.indices[1] * 10
    assert "epoch 0, batch 3, position 1 by worker 1" in caplog.messages[0]


def test_what_is_not_known_is_a_clear_error(delivered: SafeDataLoader[Any]) -> None:
    record = delivered.last_batch
    for call, words in (
        (
            lambda: delivered.replay(3, epoch=2),
            "not known to have been delivered in epoch 2: it wa",
        ),
        (lambda: delivered.replay(99, epoch=1), "index 99 is not known"),
        (lambda: delivered.replay(record, position=4), "has the positions 0 to 3, and no 4"),
    ):
        with pytest.raises(LookupError, match=words):
            call()
    for call, words in (
        (lambda: delivered.replay(record), "say which sample"),
        (lambda: delivered.replay(3, position=1), "goes with the record of a batch"),
        (lambda: replay(record, delivered.dataset), "replayed by its loader"),
    ):
        with pytest.raises(TypeError, match=words):
            call()
