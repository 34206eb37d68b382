"""A training run with Lightning: what ``test_lightning.py`` trains, and a program for DDP.

As a program it trains on two processes; each writes what it saw into a file of the given folder::

    python -m tests.frameworks.lightning_training STRATEGY WHERE FOLDER

``WHERE`` is ``given`` (the loader is handed to ``fit``) or ``hook`` (the module makes it).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning
import torch

from safeloader import SafeDataLoader

LENGTH = 23


class Numbered:
    """Samples that carry their index."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "x": torch.full((2,), float(index))}


class Model(lightning.LightningModule):
    """Notes which samples it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.trained: list[list[int]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.trained.append(batch["index"].tolist())
        loss: torch.Tensor = self.layer(batch["x"]).square().mean() * 1e-6
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += batch["index"].tolist()

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        indices: torch.Tensor = batch["index"]
        return indices

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class WritesReport(Model):
    """One rank of a distributed run."""

    def __init__(self, folder: str, loader: SafeDataLoader[Any] | None) -> None:
        super().__init__()
        self.folder = folder
        self.given = loader

    def train_dataloader(self) -> SafeDataLoader[Any]:  # where none was given
        self.made = made_loader()
        return self.made

    def on_train_end(self) -> None:
        used = self.trainer.train_dataloader
        asked = self.made if self.given is None else self.given
        report = {
            "type": type(used).__name__,
            "recreated": used is not asked,
            "sampler": type(used.sampler).__name__,
            "verify": used.verify,
            "trained": self.trained,
            "of_the_used": answers(used),
            "of_the_users": answers(asked),
        }
        path = Path(self.folder) / f"rank{self.global_rank}.json"
        path.write_text(json.dumps(report))


def answers(loader: SafeDataLoader[Any]) -> dict[str, Any]:
    audit, last = loader.audit, loader.last_batch
    return {
        "audit": None if audit is None else audit.to_dict(),
        "last": None if last is None else list(last.indices),
        "indices": loader.provenance.to_numpy()["index"].tolist(),
    }


def made_loader() -> SafeDataLoader[Any]:
    return SafeDataLoader(
        Numbered(),  # type: ignore[arg-type]
        batch_size=4,
        shuffle=True,
        num_workers=1,
        verify="warn",
    )


def trainer(root: Any, **more: Any) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=root,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"devices": 1, "max_epochs": 2} | more),
    )


def main(strategy: str, where: str, folder: str) -> None:
    loader = made_loader() if where == "given" else None
    model = WritesReport(folder, loader)
    trainer(folder, strategy=strategy, devices=2, max_epochs=1).fit(model, loader)


if __name__ == "__main__":
    main(*sys.argv[1:])
