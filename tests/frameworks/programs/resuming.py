"""What the programs share that are interrupted and go on: ``NAME.py FOLDER STOP WORKERS``.

After step ``STOP`` they save and end at once, as if killed; 0: they run to their end. Each step is
said in a line, by the indices and the random numbers it was trained on, and at the end the weights.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

SAMPLES, BATCH, EPOCHS, SEED = 50, 8, 2, 7


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """An index, and a number that is drawn as the sample is made."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.tensor([float(index)]), torch.rand(1)


class Run:
    """One run of a program: where it saves, when it stops, what it says."""

    def __init__(self) -> None:
        folder, stop, workers = sys.argv[1:4]
        self.folder, self.stop, self.workers = Path(folder), int(stop), int(workers)
        self.rank = int(os.environ.get("RANK", 0))

    def trained(self, indices: Tensor, numbers: Tensor) -> None:
        self._say("step", indices.flatten().int().tolist(), numbers.flatten().tolist())

    def ended(self, model: torch.nn.Module) -> None:
        self._say("weights", *[each.tolist() for each in model.parameters()])

    def _say(self, *words: object) -> None:
        if self.rank == 0:
            print(*words, flush=True)

    def die(self) -> None:
        """End without a word, as a job does whose time is over."""
        os._exit(0)


def model_of() -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(1, 1)
