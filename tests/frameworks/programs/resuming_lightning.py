"""Lightning, whose checkpoints carry the state of a loader that has one."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from resuming import BATCH, EPOCHS, SEED, Noisy, Run, model_of

from safeloader import SafeStatefulDataLoader

RUN = Run()
CHECKPOINT = RUN.folder / "training.ckpt"


class Model(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = model_of()

    def training_step(self, batch: Any, number: int) -> Any:
        x, noise = batch
        RUN.trained(x, noise)
        return (self.layer(x + noise) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Stops(lightning.Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == RUN.stop:
            trainer.save_checkpoint(CHECKPOINT)
            RUN.die()


def main() -> None:
    loader = SafeStatefulDataLoader(
        Noisy(), batch_size=BATCH, shuffle=True, num_workers=RUN.workers, seed=SEED
    )
    model = Model()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Stops()],
    )
    trainer.fit(model, loader, ckpt_path=CHECKPOINT if CHECKPOINT.exists() else None)
    RUN.ended(model.layer)


if __name__ == "__main__":
    main()
