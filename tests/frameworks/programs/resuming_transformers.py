"""The Trainer, which is given the rest of the epoch in the place of its own skipping.

``skips``: as the Trainer does it by itself, with its own loader.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from resuming import BATCH, EPOCHS, SEED, Noisy, Run, model_of
from transformers.trainer_utils import get_last_checkpoint

from safeloader import SafeStatefulDataLoader

RUN = Run()
SKIPS = "skips" in sys.argv


class Named(Noisy):
    """The columns have names."""

    def __getitem__(self, index: int) -> Any:
        x, noise = super().__getitem__(index)
        return {"x": x, "noise": noise}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = model_of()

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> Any:
        RUN.trained(x, noise)
        return {"loss": (self.layer(x + noise) ** 2).mean()}


class Trainer(transformers.Trainer):
    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.loader = SafeStatefulDataLoader(
            self.train_dataset, batch_size=BATCH, shuffle=True, num_workers=RUN.workers, seed=SEED
        )

    def get_train_dataloader(self) -> Any:
        return super().get_train_dataloader() if SKIPS else self.loader


class KeepsPlace(transformers.TrainerCallback):
    def __init__(self, loader: Any, checkpoint: str | None) -> None:
        self.loader, self.checkpoint = loader, checkpoint

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        torch.save(self.loader.state_dict(), folder / "loader.pt")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.checkpoint is not None:
            self.loader.load_state_dict(torch.load(Path(self.checkpoint, "loader.pt")))


class Stops(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == RUN.stop:
            control.should_save = control.should_training_stop = True


def main() -> None:
    folder = str(RUN.folder)
    arguments = transformers.TrainingArguments(
        folder,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        dataloader_num_workers=RUN.workers,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        ignore_data_skip=not SKIPS,  # the loader itself goes on
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    checkpoint = get_last_checkpoint(folder)
    trainer = Trainer(Model(), arguments, train_dataset=Named())
    if not SKIPS:
        trainer.add_callback(KeepsPlace(trainer.loader, checkpoint))
    trainer.add_callback(Stops())
    trainer.train(resume_from_checkpoint=checkpoint)
    if not RUN.stop:
        RUN.ended(trainer.model.layer)


if __name__ == "__main__":
    main()
