"""Lightning's Trainer in two processes that it starts itself: ``lightning_ddp.py STRATEGY``."""

from __future__ import annotations

import sys
from typing import Any

import lightning
import torch
from common import WORKERS, DataLoader, Points, Seen, model_of


class Model(lightning.LightningModule):
    def __init__(self, train: Any) -> None:
        super().__init__()
        self.layers = model_of()
        self.seen, self.train_loader = Seen(), train

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.layers(x)[:, 0], y)
        self.seen(f"train {self.current_epoch} {batch_idx}", batch, loss)
        return loss

    def on_train_end(self) -> None:
        self.seen.end_of_all(self.train_loader)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main(strategy: str) -> None:
    lightning.seed_everything(7)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(Points(), batch_size=4, shuffle=True, num_workers=WORKERS)
    trainer.fit(Model(loader), loader)  # records DataLoader


if __name__ == "__main__":
    main(sys.argv[1])
