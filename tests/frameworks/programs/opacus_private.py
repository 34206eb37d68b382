"""Opacus: it makes the loader again as a class of its own, with batches of chance sizes."""

from __future__ import annotations

import torch
from common import WORKERS, DataLoader, Points, Seen, model_of, prepared
from opacus import PrivacyEngine


def main() -> None:
    seen = Seen()
    torch.manual_seed(7)
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(Points(), batch_size=4, num_workers=WORKERS)
    model, optimizer, private = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    train = prepared(private)
    for epoch in range(2):
        for batch in train:  # records DPDataLoader
            x, y = batch
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x)[:, 0], y)
            loss.backward()
            optimizer.step()
            seen(f"train {epoch}", batch, loss)
    seen.end(train)


if __name__ == "__main__":
    main()
