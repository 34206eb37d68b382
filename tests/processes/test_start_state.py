"""What changed in a worker's copy since it started, where something changes it as it starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import BatchSampler, Dataset, IterDataPipe, SequentialSampler

from safeloader import SafeDataLoader
from safeloader.errors import SampleError


class Fails(Dataset[int]):
    """The third sample fails; each that is made is counted."""

    def __init__(self) -> None:
        self.epoch = self.made = 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if index == 2:
            raise KeyError("lost")
        self.made += 1
        return index


class Epochs:
    """A batch sampler that tells the dataset which epoch begins, in main and before the fork."""

    def __init__(self, dataset: Fails) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[list[int]]:
        self.dataset.epoch += 1
        return iter([[0], [1], [2], [3]])

    def __len__(self) -> int:
        return 4


def changed(loader: Any) -> dict[str, str]:
    with pytest.raises(SampleError) as raised:
        list(loader)
    changes: dict[str, str] = raised.value.failure.dataset_state["changed_since_worker_start"]
    return changes


def nothing(worker: int) -> None:
    pass


@pytest.mark.parametrize("init", [None, nothing])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_sampler_that_writes_to_the_dataset_as_it_begins(init: Any, method: str) -> None:
    dataset = Fails()
    loader = SafeDataLoader(
        dataset,
        batch_sampler=Epochs(dataset),
        num_workers=1,
        multiprocessing_context=method,
        worker_init_fn=init,
    )
    assert changed(loader) == {"made": "was 0, now 2"}


@pytest.mark.parametrize("init", [None, nothing])
def test_what_was_made_since_the_start_is_told_by_torchs_samplers_too(init: Any) -> None:
    dataset = Fails()
    batches = BatchSampler(SequentialSampler(dataset), 1, drop_last=False)
    loader = SafeDataLoader(dataset, batch_sampler=batches, num_workers=1, worker_init_fn=init)
    for _ in range(2):
        dataset.epoch += 1
        assert changed(loader) == {"made": "was 0, now 2"}


class Seeded(IterDataPipe[int]):
    """Torch seeds it in the worker."""

    def __init__(self) -> None:
        self.seed = 0

    def set_seed(self, seed: int) -> Any:
        self.seed = seed
        return self

    def __iter__(self) -> Iterator[int]:
        yield 1
        raise KeyError("lost")


@pytest.mark.filterwarnings("default")  # torch's own, of pipes
@pytest.mark.parametrize("init", [None, nothing])
def test_a_pipe_that_torch_seeds_in_the_worker(init: Any) -> None:
    changes = changed(SafeDataLoader(Seeded(), num_workers=1, worker_init_fn=init))
    assert "seed=" in changes["_datapipe"]  # torch wraps it
    assert "seed=0" not in str(changes)
