"""The integrations in the frameworks themselves: what TensorBoard's files and the run's say."""

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
from safeloader.report.run import RunFolder
from tests.run_folders import new_process

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


# ── steps ────────────────────────────────────────────────────────────────────────────────────────
# What a model was trained on, noted by itself, against what the run's folder says of each step.

GATHERED = 3  # batches whose gradients are accumulated
Trained = dict[int, list[list[int]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("pyarrow")
    new_process(monkeypatch)
    return tmp_path / "run"


def of_steps(run: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """The indices of each batch of each step, as the run's folder has them."""
    new_process(monkeypatch)
    folder = RunFolder(run)
    (loader,) = folder.loaders
    steps = sorted(set(loader.marks()["step"].to_pylist()))
    return {step: [[*each.indices] for each in folder.step(step)] for step in steps}


class Numbered:
    """Samples that carry their index."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "x": torch.full((4,), 0.01 * index)}


def numbered(run: Path, workers: int) -> SafeDataLoader[Any]:
    data: Any = Numbered()
    return SafeDataLoader(
        data, BATCH, shuffle=True, num_workers=workers, run_dir=run, drop_last=False
    )


@only(argvalues=["lightning"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("optimizers", [1, 2])
def test_steps_of_lightning(
    library: str, optimizers: int, workers: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lightning

    trained: Trained = {}

    class Model(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)
            self.automatic_optimization = optimizers == 1

        def training_step(self, batch: Any, number: int) -> Any:
            first = self.global_step
            for step in range(first, first + optimizers):
                trained.setdefault(step, []).append(batch["index"].tolist())
            if optimizers == 1:
                return self.layer(batch["x"]).square().mean()
            for each in self.optimizers():
                each.zero_grad()
                self.manual_backward(self.layer(batch["x"]).square().mean())
                each.step()
            return None

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), 0.001) for _ in range(optimizers)]

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=GATHERED if optimizers == 1 else 1,
        callbacks=[integrations.LightningCallback()],
    )
    trainer.fit(Model(), numbered(run, workers))
    assert len(trained) == (14 if optimizers == 1 else 80)
    assert of_steps(run, monkeypatch) == trained


@only(argvalues=["lightning"])
def test_steps_of_a_training_that_goes_on_in_mid_epoch(
    library: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lightning

    trained: Trained = {}

    class Model(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, number: int) -> Any:
            trained.setdefault(self.global_step, []).append(batch["index"].tolist())
            return self.layer(batch["x"]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.001)

    def fit(steps: int, **more: Any) -> None:
        data: Any = Numbered()
        loader = safeloader.SafeStatefulDataLoader(data, BATCH, shuffle=True, run_dir=run, seed=3)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=steps,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[integrations.LightningCallback()],
        )
        trainer.fit(Model(), loader, **more)
        trainer.save_checkpoint(tmp_path / "at.ckpt")

    new_process(monkeypatch, SAFELOADER_RUN_ID="one")
    fit(7)
    new_process(monkeypatch, SAFELOADER_RUN_ID="one")
    fit(15, ckpt_path=tmp_path / "at.ckpt", weights_only=False)
    assert len(trained) == 15
    new_process(monkeypatch)
    folder = RunFolder(run)
    assert {step: [[*each.indices] for each in folder.step(step)] for step in trained} == trained


@only(argvalues=["transformers"])
@pytest.mark.parametrize("workers", [0, 2])
def test_steps_of_transformers(
    library: str, workers: int, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    trained: Trained = {}

    class Trainer(transformers.Trainer):  # type: ignore[misc,name-defined]
        def training_step(self, model: Any, inputs: Any, *more: Any) -> Any:
            indices = inputs["input_ids"][:, 0].tolist()
            trained.setdefault(self.state.global_step + 1, []).append(indices)
            return super().training_step(model, inputs, *more)

    config = transformers.GPT2Config(
        vocab_size=SAMPLES, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0
    )
    tokens = [torch.full((8,), index) for index in range(SAMPLES)]
    trainer = Trainer(
        transformers.GPT2LMHeadModel(config),
        transformers.TrainingArguments(
            str(tmp_path),
            num_train_epochs=2,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=GATHERED,
            dataloader_num_workers=workers,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": each, "labels": each} for each in tokens],
    )
    trainer.add_callback(integrations.TransformersCallback(trainer, run_dir=run))
    trainer.train()
    assert [len(each) for each in trained.values()] == [3, 3, 3, 3, 3, 3, 2] * 2
    assert of_steps(run, monkeypatch) == trained


@only(argvalues=["accelerate"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dispatch", [False, True])
def test_steps_of_accelerate(
    library: str, dispatch: bool, workers: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import accelerate

    accelerator = accelerate.Accelerator(
        cpu=True,
        gradient_accumulation_steps=GATHERED,
        dataloader_config=accelerate.DataLoaderConfiguration(dispatch_batches=dispatch),
    )
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.001)
    data: Any = DataLoader(Numbered(), BATCH, shuffle=True, num_workers=workers)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, data)
    safeloader.instrument(loader, run_dir=run)
    trained: Trained = {}
    step = 0
    for _ in range(2):
        for batch in loader:
            integrations.mark_with_accelerate(loader, step)
            trained.setdefault(step, []).append(batch["index"].tolist())
            with accelerator.accumulate(model):
                accelerator.backward(model(batch["x"]).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            step += accelerator.sync_gradients
    assert step == 14
    assert of_steps(run, monkeypatch) == trained


@only(argvalues=["accelerate"])
def test_steps_of_a_loader_that_is_ours(
    library: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not a batch ahead."""
    import accelerate

    from safeloader.integrations.accelerate import prepare

    data: Any = Numbered()
    ours = safeloader.SafeStatefulDataLoader(data, BATCH, shuffle=True, seed=3, run_dir=run)
    loader = prepare(accelerate.Accelerator(cpu=True), ours)
    trained: Trained = {}
    for step, batch in enumerate(loader):
        integrations.mark_with_accelerate(loader, step)
        trained[step] = [batch["index"].tolist()]
    assert of_steps(run, monkeypatch) == trained
