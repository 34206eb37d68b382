"""Lightning's Fabric: it wraps the loader."""

from __future__ import annotations

import lightning
import torch
from common import WORKERS, DataLoader, Points, Seen, model_of, prepared


def main() -> None:
    lightning.seed_everything(7)
    seen = Seen()
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = model_of()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05))
    loader = DataLoader(Points(), batch_size=4, shuffle=True, num_workers=WORKERS)
    train = prepared(fabric.setup_dataloaders(loader))
    for epoch in range(2):
        for x, y in train:  # records DataLoader
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x)[:, 0], y)
            fabric.backward(loss)
            optimizer.step()
            seen(f"train {epoch}", [x, y], loss)
    seen.end(train)


if __name__ == "__main__":
    main()
