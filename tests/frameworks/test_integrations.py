"""The integrations in the frameworks themselves, read back from TensorBoard's files."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import safeloader
from safeloader import SafeDataLoader, integrations, loaders_of

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore"),  # of the frameworks; ours are looked for by name
]

SAMPLES, BATCH, EVERY = 80, 4, 5
A_WINDOW = {"batches": 5.0, "samples": 20.0, "skipped": 0.0}


@pytest.fixture
def library(request: pytest.FixtureRequest) -> str:
    """One that is there, and TensorBoard too."""
    name: str = request.param
    for needed in (name, "tensorboard"):
        if importlib.util.find_spec(needed) is None:
            if request.config.getoption("--need-frameworks"):
                pytest.fail(f"{needed} is not installed")
            pytest.skip(f"{needed} is not installed")
    return name


only = functools.partial(pytest.mark.parametrize, "library", indirect=True)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: of each name the value at each step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for file in folder.rglob("events.out*"):
        events = EventAccumulator(str(file))
        events.Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, {}).update({e.step: e.value for e in events.Scalars(name)})
    return found


def check(found: dict[str, dict[int, float]], steps: list[int], before: str = "") -> None:
    for name, value in A_WINDOW.items():
        assert found[f"{before}data/{name}"] == dict.fromkeys(steps, value)
    for name in ("wait_share", "samples_per_s", "fetch_p50_ms", "fetch_p95_ms"):
        assert list(found[f"{before}data/{name}"]) == steps
        assert all(value > 0 for value in found[f"{before}data/{name}"].values())


@only(argvalues=["lightning"])
def test_lightning(library: str, tmp_path: Path) -> None:
    import lightning

    class Model(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, number: int) -> Any:
            loss = self.layer(batch[0]).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=lightning.pytorch.loggers.TensorBoardLogger(str(tmp_path)),
        log_every_n_steps=EVERY,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[integrations.LightningCallback()],
    )
    trainer.fit(Model(), SafeDataLoader(TensorDataset(torch.randn(SAMPLES, 4)), batch_size=BATCH))
    found = scalars(tmp_path)
    check(found, list(found["loss"]))
    assert found["data_epoch/samples"] == {19: SAMPLES, 39: SAMPLES}


@only(argvalues=["transformers"])
def test_transformers(library: str, tmp_path: Path) -> None:
    import transformers

    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (SAMPLES, 8), generator=draws)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0
    )
    trainer = transformers.Trainer(
        transformers.GPT2LMHeadModel(config),
        transformers.TrainingArguments(
            str(tmp_path),
            num_train_epochs=2,
            per_device_train_batch_size=BATCH,
            logging_steps=EVERY,
            report_to=["tensorboard"],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": each, "labels": each} for each in tokens],
    )
    trainer.add_callback(integrations.TransformersCallback(trainer, verify="warn"))
    trainer.train()
    found = scalars(tmp_path)
    # The Trainer is a batch ahead of what it trains on, but for the last of an epoch.
    assert found["train/data/batches"] == {5: 6, 10: 5, 15: 5, 20: 4, 25: 6, 30: 5, 35: 5, 40: 4}
    assert found["train/data_epoch/samples"] == {20: SAMPLES, 40: SAMPLES}
    assert {"train/loss", "train/data/wait_share", "train/data/fetch_p95_ms"} <= set(found)
    (loader,) = loaders_of(trainer.callback_handler.train_dataloader)
    assert loader.verify == "warn"
    assert loader.audit.ok


@only(argvalues=["accelerate"])
def test_accelerate(library: str, tmp_path: Path) -> None:
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    data = TensorDataset(torch.randn(SAMPLES, 4))
    loader = safeloader.instrument(accelerator.prepare(DataLoader(data, batch_size=BATCH)))
    for step, _ in enumerate(loader):
        if step % EVERY == EVERY - 1:
            integrations.log_with_accelerate(accelerator, loader, step, last=EVERY)
    accelerator.end_training()
    check(scalars(tmp_path), [4, 9, 14, 19])
