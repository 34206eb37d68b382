"""Loaders as libraries make them, each in a few lines on torch alone."""

from __future__ import annotations

import multiprocessing.context
import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _SingleProcessDataLoaderIter


class Numbers:
    """Sample ``i`` is ``i``, and a random number."""

    def __init__(self, length: int = 10) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), torch.rand(()).item()])


class Transforms(DataLoader[Any]):
    """PyG's NodeLoader: torch's iterator gives what its own then makes a batch of."""

    def __init__(self, dataset: Any, scale: float = 3.0, **kwargs: Any) -> None:
        self.scale = scale
        super().__init__(dataset, **kwargs)

    def _get_iterator(self) -> Any:
        return Scaled(super()._get_iterator(), self.scale)


class Scaled:
    def __init__(self, inner: Any, scale: float) -> None:
        self.inner, self.scale = inner, scale

    def __iter__(self) -> Scaled:
        return self

    def __next__(self) -> Any:
        return next(self.inner) * self.scale

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        self.inner._reset(loader, first_iter)


class Repeats:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from iter(self.inner)


class Endless(DataLoader[Any]):
    """timm's MultiEpochsDataLoader, ultralytics' InfiniteDataLoader: one iterator for good."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        object.__setattr__(self, "batch_sampler", Repeats(self.batch_sampler))
        self.iterator = super().__iter__()

    def __len__(self) -> int:
        return len(self.batch_sampler.inner)  # type: ignore[union-attr]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for _ in range(len(self)):
            yield next(self.iterator)


class MakesItsOwn(DataLoader[Any]):
    """torchdata's StatefulDataLoader: iterators of its own."""

    def _get_iterator(self) -> Any:
        return _SingleProcessDataLoaderIter(self)


class NeverAsks(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return map(torch.tensor, range(3))


class ThreadWorker(threading.Thread):
    pid = 0


class ThreadQueue(queue.Queue[Any]):
    def close(self) -> None:
        pass

    def cancel_join_thread(self) -> None:
        pass


class ThreadContext(multiprocessing.context.SpawnContext):
    """MONAI's ThreadDataLoader: what stands for a process is a thread."""

    Process = ThreadWorker  # type: ignore[assignment]
    Queue = ThreadQueue  # type: ignore[assignment]


def with_thread_workers() -> DataLoader[Any]:
    threads = {"num_workers": 1, "multiprocessing_context": ThreadContext()}
    return DataLoader(Numbers(), batch_size=4, **threads)  # type: ignore[arg-type]


class Wraps:
    """Accelerate, Fabric, Ray and timm's prefetcher hold the loader by one of these names."""

    def __init__(self, loader: Any, name: str) -> None:
        setattr(self, name, loader)
        self.name = name

    def __iter__(self) -> Iterator[Any]:
        return iter(getattr(self, self.name))


class CopiesAttributes(DataLoader[Any]):
    """Ray's wrapper: a loader by its attributes, whose batches come from the one within."""

    def __init__(self, loader: Any) -> None:
        vars(self).update(vars(loader))
        vars(self)["dataloader"] = loader

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter(vars(self)["dataloader"])
