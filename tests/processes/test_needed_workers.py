"""Workers that no batch would reach are not started, and nothing else shows that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from safeloader import SafeDataLoader, SafeStatefulDataLoader
from tests.datasets import GreedySampler, Noisy, Stream, TellsWhere
from tests.oracle import observe


def started(loader: Any) -> int:
    batches: Any = iter(loader)
    number = len(batches._workers)
    assert len(list(batches)) == len(loader)
    return number


@pytest.mark.parametrize(
    ("batch_size", "workers", "prefetch", "expected"),
    [
        (3, 8, 2, 3),
        (9, 3, 2, 1),
        (9, 3, 1, 2),  # by one alone, torch would not see at once that there are no more
        (3, 8, 1, 4),
        (1, 4, 2, 4),
        (3, 3, 4, 3),
        (2, 2, 2, 2),
    ],
)
def test_as_many_start_as_there_are_batches(
    batch_size: int, workers: int, prefetch: int, expected: int
) -> None:
    given: dict[str, Any] = {"num_workers": workers, "prefetch_factor": prefetch}
    tells: Any = TellsWhere()
    loader = SafeDataLoader(tells, batch_size, **given)
    assert started(loader) == expected
    assert loader.audit.complete
    for dataset in (tells, Noisy(9)):

        def make(cls: Any, dataset: Any = dataset) -> Any:
            return cls(dataset, batch_size, shuffle=True, **given)

        assert observe(SafeDataLoader, make) == observe(DataLoader, make)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_worker_is_told_of_all_by_every_start_method(method: str) -> None:
    tells: Any = TellsWhere()
    loader = SafeDataLoader(tells, 5, num_workers=4, multiprocessing_context=method)
    batches = list(loader)
    assert [each[2].tolist() for each in batches] == [[4] * 5, [4] * 4]
    assert [each[1].tolist() for each in batches] == [[0] * 5, [1] * 4]
    assert started(loader) == 2


def test_an_empty_epoch_has_one_worker() -> None:
    assert started(SafeDataLoader(Noisy(0), num_workers=3)) == 1


class Nothing:
    def __call__(self, worker: int) -> None:
        pass


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"worker_init_fn": Nothing()}, id="their code would run there"),
        pytest.param({"persistent_workers": True}, id="another epoch may have more"),
        pytest.param({"sampler": GreedySampler(23)}, id="nobody knows how many"),
        pytest.param({"batch_sampler": [[0, 1], [2]], "batch_size": 1}, id="nor of a list"),
    ],
)
def test_all_start_where_one_may_be_wanted(given: dict[str, Any]) -> None:
    loader: Any = SafeDataLoader(Noisy(), **{"batch_size": 12, "num_workers": 3} | given)
    assert started(loader) == 3


def test_all_start_of_a_stream() -> None:
    batches: Any = iter(SafeDataLoader(Stream(), 12, num_workers=3))
    assert len(batches._workers) == 3


class KeepsState(Noisy):
    def state_dict(self) -> dict[str, int]:
        return {"at": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def test_all_start_where_each_keeps_a_state() -> None:
    loader = SafeStatefulDataLoader(KeepsState(), 12, num_workers=3)
    assert started(loader) == 3
    assert started(SafeStatefulDataLoader(Noisy(), 12, num_workers=3)) == 2


@pytest.mark.parametrize("prefetch", [1, 2, 3])
@pytest.mark.parametrize("in_order", [True, False])
def test_the_sampler_draws_all_at_the_same_moment(prefetch: int, in_order: bool) -> None:
    def states(cls: Any) -> list[Any]:
        generator = torch.Generator().manual_seed(3)
        # It draws once more after the last whole pass over the dataset.
        sampler = RandomSampler(range(6), num_samples=12, generator=generator)
        loader = cls(
            Noisy(6),
            batch_size=6,
            sampler=sampler,
            num_workers=4,
            prefetch_factor=prefetch,
            in_order=in_order,
        )
        batches = iter(loader)
        found = [generator.get_state().tolist()]
        for _ in batches:
            found.append(generator.get_state().tolist())
        return found

    assert states(SafeDataLoader) == states(DataLoader)
