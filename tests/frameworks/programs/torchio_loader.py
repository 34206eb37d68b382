"""TorchIO: its loader of subjects."""

from __future__ import annotations

from typing import Any

import torch
import torchio
from common import WORKERS, Seen, prepared


def subject(number: int) -> Any:
    generator = torch.Generator().manual_seed(number)
    image = torchio.ScalarImage(tensor=torch.rand(1, 6, 6, 6, generator=generator))
    return torchio.Subject(image=image, number=torch.tensor(number))


def main() -> None:
    seen = Seen()
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(216, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    dataset = torchio.SubjectsDataset(list(map(subject, range(11))), torchio.RandomNoise(std=0.1))
    loader = prepared(
        torchio.SubjectsLoader(dataset, batch_size=4, shuffle=True, num_workers=WORKERS)
    )
    for epoch in range(2):
        for batch in loader:  # records SubjectsLoader
            optimizer.zero_grad()
            loss = model(batch["image"][torchio.DATA]).square().mean()
            loss.backward()
            optimizer.step()
            seen(f"train {epoch}", [batch["number"], batch["image"][torchio.DATA]], loss)
    seen.end(loader)


if __name__ == "__main__":
    main()
