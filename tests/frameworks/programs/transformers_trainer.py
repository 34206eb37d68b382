"""The Trainer of transformers with a small GPT-2: ``transformers_trainer.py LOADER``.

``LOADER`` is ``default`` (made by the Trainer, by Accelerate) or ``own`` (a plain one, from an
overridden method). With ``resumed`` as a second word it goes on in mid-epoch afterwards.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from common import WORKERS, DataLoader, Seen, prepared
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments

SEEN = Seen()


class Sentences(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.words = torch.randint(0, 32, (length, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[index], "labels": self.words[index]}


class Told(Trainer):
    """Says what it is trained on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)  # says how long it took
        self.loaders: list[Any] = []

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        SEEN(f"train {self.state.global_step}", inputs, loss)
        return loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        SEEN("eval", inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        self.loaders.append(prepared(super().get_train_dataloader()))
        return self.loaders[-1]

    def get_eval_dataloader(self, *args: Any) -> Any:
        self.loaders.append(prepared(super().get_eval_dataloader(*args)))
        return self.loaders[-1]


class WithItsOwn(Told):
    """Reads from plain loaders."""

    def _plain(self, dataset: Any, **more: Any) -> Any:
        collate, workers = self.data_collator, self.args.dataloader_num_workers
        loader = DataLoader(dataset, 4, collate_fn=collate, num_workers=workers, **more)
        self.loaders.append(prepared(loader))
        return self.loaders[-1]

    def get_train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(5)
        return self._plain(self.train_dataset, shuffle=True, generator=generator)

    def get_eval_dataloader(self, *args: Any) -> Any:
        return self._plain(self.eval_dataset)


def trainer_of(kind: Any) -> Any:
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    torch.manual_seed(7)
    arguments = TrainingArguments(
        "out",
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_train_epochs=2,
        dataloader_num_workers=WORKERS,
        save_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        seed=7,
    )
    return kind(
        GPT2LMHeadModel(config), arguments, train_dataset=Sentences(22), eval_dataset=Sentences(9)
    )


def say(trainer: Any) -> None:
    SEEN.rows += [
        f"{row['step']} {row['loss']!r}" for row in trainer.state.log_history if "loss" in row
    ]


def default() -> None:
    trainer = trainer_of(Told)
    trainer.train()  # records DataLoader
    trainer.evaluate()  # records DataLoader
    say(trainer)
    if "resumed" in sys.argv:
        again = trainer_of(Told)
        again.train(resume_from_checkpoint="out/checkpoint-8")  # records DataLoader
        say(again)
    SEEN.end(*trainer.loaders)


def own() -> None:
    trainer = trainer_of(WithItsOwn)
    trainer.train()  # records DataLoader
    trainer.evaluate()  # records DataLoader
    say(trainer)
    if "resumed" in sys.argv:
        again = trainer_of(WithItsOwn)
        again.train(resume_from_checkpoint="out/checkpoint-8")  # records DataLoader
        say(again)
    SEEN.end(*trainer.loaders)


if __name__ == "__main__":
    {"default": default, "own": own}[sys.argv[1]]()
