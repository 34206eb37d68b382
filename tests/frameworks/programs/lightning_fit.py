"""Lightning's Trainer: fit with validation (a metric of torchmetrics), test and predict."""

from __future__ import annotations

from typing import Any

import lightning
import torch
import torchmetrics
from common import WORKERS, DataLoader, Points, Seen, model_of, prepared

SEEN = Seen()


class Model(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = model_of()
        self.metric = torchmetrics.MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.layers(x)[:, 0], y)
        SEEN(f"train {self.current_epoch} {batch_idx}", batch, loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.metric.update(self.layers(x)[:, 0], y)
        SEEN(f"val {batch_idx}", batch)

    def on_validation_epoch_end(self) -> None:
        SEEN.rows.append(f"metric {self.metric.compute().item()!r}")
        self.metric.reset()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        SEEN(f"test {batch_idx}", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        SEEN(f"predict {batch_idx}", batch)
        return self.layers(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main() -> None:
    lightning.seed_everything(7)
    kept = {"num_workers": WORKERS, "persistent_workers": WORKERS > 0}
    train = prepared(DataLoader(Points(), batch_size=4, shuffle=True, **kept))
    val = prepared(DataLoader(Points(9), batch_size=4, num_workers=WORKERS))
    test = prepared(DataLoader(Points(7), batch_size=4, num_workers=WORKERS))
    predict = prepared(DataLoader(Points(10), batch_size=4, num_workers=WORKERS))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Model()
    trainer.fit(model, train, val)  # records DataLoader
    trainer.test(model, test, verbose=False)  # records DataLoader
    trainer.predict(model, predict)  # records DataLoader
    SEEN.end(train, val, test, predict)


if __name__ == "__main__":
    main()
