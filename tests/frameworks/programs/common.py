"""What the programs here share: data that they make, and what they say of the batches they got.

A program says on stdout the losses and a digest of every batch that it was trained on, and at its
end how many samples it counted. ``PROGRAM_WORKERS`` is the number of workers of its loaders, and
``PROGRAM_WAY`` what its user did to them:

    stock        nothing
    swap         one import: ``DataLoader`` is safeloader's
    instrument   ``safeloader.instrument`` on what the framework made of the loader

With the last two it says on stderr how many samples safeloader recorded.
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Any

import torch
from torch.utils.data import Dataset

WORKERS = int(os.environ.get("PROGRAM_WORKERS", "0"))
WAY = os.environ.get("PROGRAM_WAY", "stock")

if WAY == "swap":
    from safeloader import SafeDataLoader as DataLoader
else:
    from torch.utils.data import DataLoader  # type: ignore[assignment]

__all__ = ["WORKERS", "DataLoader", "Points", "Seen", "model_of", "prepared"]


class Points(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Points with noise that is drawn when they are read."""

    def __init__(self, length: int = 23) -> None:
        self.length = length
        self.x = torch.randn(length, 4, generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.x[index]
        return x + 0.1 * torch.rand(4), x.sum()


def model_of(inputs: int = 4) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(inputs, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def prepared(loader: Any) -> Any:
    """What a framework made of a loader, instrumented where that is the way."""
    if WAY != "instrument":
        return loader
    import safeloader

    return safeloader.instrument(loader)


class Seen:
    """What the program got from its loaders."""

    def __init__(self) -> None:
        self.counted = 0
        self.rows: list[str] = []

    def __call__(self, what: str, batch: Any, loss: torch.Tensor | None = None) -> None:
        """Note a batch; its samples are counted by its first tensor."""
        tensors = _tensors(batch)
        digest = hashlib.sha256()
        for each in tensors:
            digest.update(f"{each.dtype} {tuple(each.shape)}".encode())
            digest.update(each.detach().contiguous().numpy().tobytes())
        self.counted += len(tensors[0])
        told = "" if loss is None else f" {loss.item()!r}"
        self.rows.append(f"{what} {digest.hexdigest()[:16]}{told}")

    def end(self, *holders: Any) -> None:
        """Say it all; ``holders`` are the loaders, or the wrappers of them, that the user has."""
        self.say_recorded(*holders)
        print(*self.rows, f"counted {self.counted}", sep="\n", flush=True)

    def end_of_all(self, *holders: Any) -> None:
        """The same of several processes: the first says what each of them got."""
        from torch import distributed

        self.say_recorded(*holders)
        gathered: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, (self.rows, self.counted))
        if distributed.get_rank() == 0:
            for rank, (rows, counted) in enumerate(gathered):
                print(*(f"{rank}: {row}" for row in rows), f"counted {counted}", sep="\n")
            sys.stdout.flush()

    def say_recorded(self, *holders: Any) -> None:
        if WAY != "stock":
            # In one piece: several processes write here.
            os.write(2, f"recorded {recorded(*holders)}\n".encode())


def recorded(*holders: Any) -> int:
    """How many samples safeloader recorded of these loaders, or of what holds them."""
    from safeloader import loaders_of

    return sum(len(loader.provenance) for loader in loaders_of(list(holders)))


def _tensors(batch: Any) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    if hasattr(batch, "items"):
        batch = [value for _, value in sorted(batch.items())]
    elif hasattr(batch, "to_dict"):
        return _tensors(batch.to_dict())
    if isinstance(batch, list | tuple):
        return [tensor for each in batch for tensor in _tensors(each)]
    return []
