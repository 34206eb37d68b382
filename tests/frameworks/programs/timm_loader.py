"""timm: ``create_loader`` plain, behind its prefetcher, and with one iterator for all epochs."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from common import WORKERS, Seen, prepared

try:
    import torchvision  # noqa: F401  # timm does
except RuntimeError:
    # Its wheels are built for CUDA, and their operators cannot be loaded by a torch without.
    # torchvision registers more for these two, which therefore have to be there; none is called.
    LIBRARY = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm.data
from PIL import Image
from torch.utils.data import Dataset


class Images(Dataset[Any]):
    transform: Any = None  # `create_loader` gives it one

    def __init__(self) -> None:
        self.pixels = np.random.default_rng(3).integers(0, 256, (22, 12, 12, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.fromarray(self.pixels[index])), index % 3


def created(**more: Any) -> Any:
    return prepared(
        timm.data.create_loader(
            Images(),
            input_size=(3, 8, 8),
            batch_size=4,
            is_training=True,
            num_workers=WORKERS,
            device=torch.device("cpu"),
            **more,
        )
    )


def main() -> None:
    seen = Seen()
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def step(what: str, batch: Any) -> None:
        x, y = batch
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        seen(what, batch, loss)

    plain = created(use_prefetcher=False)
    for epoch in range(2):
        for batch in plain:  # records DataLoader
            step(f"plain {epoch}", batch)
    prefetched = created(re_prob=0.5)
    for epoch in range(2):
        for batch in prefetched:  # records DataLoader
            step(f"prefetched {epoch}", batch)
    endless = created(use_multi_epochs_loader=True, use_prefetcher=False)
    for epoch in range(2):
        for batch in endless:  # records MultiEpochsDataLoader
            step(f"endless {epoch}", batch)
    seen.end(plain, prefetched, endless)


if __name__ == "__main__":
    main()
