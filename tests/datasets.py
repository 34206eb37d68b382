"""Datasets, samplers and functions at module level, so that every start method can send them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, Sampler, get_worker_info
from torch.utils.data.datapipes.iter import IterableWrapper

import safeloader


class Noisy:
    """Samples that depend on every global generator, and on how often they were used before."""

    def __init__(self, length: int = 23) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "torch": torch.rand(3),
            "numpy": np.random.rand(2),
            "python": random.random(),
            "pair": (torch.tensor(int(index)), f"name-{index}"),
        }


class Together(Noisy):
    """Fetches a batch in one call."""

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


class Named:
    """Indexed by strings."""

    names = tuple("abcdefghijk")

    def __getitem__(self, name: str) -> tuple[str, torch.Tensor]:
        return name, torch.rand(1)

    def __len__(self) -> int:
        return len(self.names)


class Bulk(Noisy):
    """Answers a list of indices with a whole batch."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.as_tensor(index) + torch.rand(1)


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Shared among the workers; with random numbers in it."""

    def __init__(self, length: int = 23, uneven: bool = False) -> None:
        self.length = length
        self.uneven = uneven

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for number in range(worker, self.length, workers):
            if self.uneven and worker == 1 and number > 4:
                return
            yield number, torch.rand(2)


class RotatedStream(IterableDataset):  # type: ignore[type-arg]
    """Every worker begins elsewhere, as one that samples with replacement may."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        first = 4 if info and info.id else 0
        return iter([(first + k) % 10 for k in range(10)])


class UnsharedStream(IterableDataset):  # type: ignore[type-arg]
    """Every worker reads all of it: the classic mistake."""

    def __init__(self, length: int = 10) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))

    def __len__(self) -> int:
        return self.length


class Resampled(IterableDataset):  # type: ignore[type-arg]
    """Every worker draws from a share of its own, with replacement."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        share = 100 * (info.id if info else 0)
        return iter([share + 4, share + 1, share + 4])


class OneShotStream(IterableDataset):  # type: ignore[type-arg]
    """Not a generator: iter() itself draws random numbers."""

    def __iter__(self) -> Iterator[float]:
        return iter(torch.rand(11).tolist())


class TellsWhere:
    """What get_worker_info says in the dataset."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> tuple[int, int, int, bool]:
        info = get_worker_info()
        if info is None:
            return index, -1, -1, False
        return index, info.id, info.num_workers, info.dataset is self


class HoldsALoader:
    """A dataset that uses a loader of its own, over another dataset or over itself."""

    def __init__(self, loader_class: type, over_itself: bool = False) -> None:
        self.loader_class = loader_class
        self.over_itself = over_itself

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        if isinstance(index, tuple):
            return torch.tensor(index[0])
        if self.over_itself:
            inner = self.loader_class(self, batch_size=2, sampler=[(index,), (7,), (8,)])
        else:
            inner = self.loader_class(Noisy(4), batch_size=3, shuffle=True)
        return torch.cat(
            [batch if self.over_itself else batch["torch"].flatten() for batch in inner]
        )


class GreedySampler(Sampler[int]):
    """Draws from the global generators while it is iterated, and in __iter__ itself."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        shift = int(torch.randint(0, 3, ()))
        return (
            (number + shift + random.randrange(2) + int(torch.randint(0, 2, ()))) % self.length
            for number in range(self.length)
        )

    def __len__(self) -> int:
        return self.length


class LengthlessSampler:
    """A plain iterable."""

    def __iter__(self) -> Iterator[int]:
        yield from (3, 1, 4, 1, 5, 9, 2, 6)


class OwnBatchSampler:
    """Batches of growing size, as a list, tuple, tensor or array."""

    def __iter__(self) -> Iterator[Any]:
        yield [0, 1]
        yield (2, 3, 4)
        yield torch.tensor([5, 6])
        yield np.array([7, 8, 9])
        yield range(10, 12)

    def __len__(self) -> int:
        return 5


def datapipe() -> Any:
    return IterableWrapper(range(23)).shuffle().sharding_filter().map(_with_noise)


def _with_noise(number: int) -> tuple[int, torch.Tensor]:
    return number, torch.rand(1)


def worker_init(worker_id: int) -> None:
    info = get_worker_info()
    assert info is not None
    assert info.id == worker_id
    torch.manual_seed(1000 + worker_id)  # the user's seeding must hold
    random.seed(worker_id)
    np.random.seed(worker_id)


def collate_with_info(samples: list[Any]) -> Any:
    info = get_worker_info()
    return (None if info is None else info.id, torch.rand(1), samples)


def first(sample: Any) -> Any:
    return sample[0]


class Extra(safeloader.SafeDataLoader):  # type: ignore[type-arg]
    """A user's subclass with an argument of its own."""

    def __init__(self, *args: Any, extra: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.extra = extra
