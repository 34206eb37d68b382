"""The integrations, on stand-ins for what they use of each framework.

The frameworks themselves, with TensorBoard, are in ``tests/frameworks/test_integrations.py``.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

import safeloader
from safeloader import SafeDataLoader, integrations, loaders_of
from safeloader.integrations.logged import LoggedLoaders, metrics_of_all
from safeloader.integrations.steps import MarkedSteps

FRAMEWORKS = ("accelerate", "lightning", "transformers")
PER_BATCH = {"data/batches", "data/samples", "data/wait_share", "data/samples_per_s"}


@pytest.fixture(autouse=True)
def frameworks_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test imports the integrations with what it put in the framework's place."""
    before = dict(vars(integrations))
    for name in FRAMEWORKS:
        monkeypatch.delitem(sys.modules, f"safeloader.integrations.{name}", raising=False)
    for name in integrations.__all__:
        vars(integrations).pop(name, None)
    yield
    vars(integrations).clear()
    vars(integrations).update(before)


def in_place_of(monkeypatch: pytest.MonkeyPatch, framework: str, **names: Any) -> None:
    module = types.ModuleType(framework)
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, framework, module)


def loader_of(count: int = 12, **more: Any) -> SafeDataLoader[int]:
    return SafeDataLoader(list(range(count)), batch_size=2, **more)


# ── what is logged ───────────────────────────────────────────────────────────────────────────────


def test_what_was_logged_is_not_logged_again() -> None:
    loader, logged = loader_of(), LoggedLoaders("data")
    assert logged.since_last(loader) == {}  # before the first batch
    found = []
    for number, _ in enumerate(loader):
        if number in (0, 3, 5):
            found.append(logged.since_last(loader)["data/batches"])
    assert found == [1, 3, 2]
    assert logged.since_last(loader) == {}
    next(iter(loader))
    assert logged.since_last(loader)["data/batches"] == 1  # of the epoch that runs
    assert logged.of_epoch(loader)["data_epoch/batches"] == 1


def test_several_loaders_are_told_apart_by_their_numbers() -> None:
    loaders = {"a": loader_of(12), "b": loader_of(6)}
    for loader in loaders.values():
        list(loader)
    found = metrics_of_all(loaders, "data")
    assert (found["data/0/samples"], found["data/1/samples"]) == (12, 6)
    assert "data/samples" not in found
    logged = LoggedLoaders("data")
    assert logged.since_last(loaders)["data/1/batches"] == 3
    list(loaders["b"])
    assert logged.since_last(loaders)["data/batches"] == 3


def test_what_is_not_recorded_is_said_once() -> None:
    logged = LoggedLoaders("data")
    with pytest.warns(UserWarning, match=r"this DataLoader is not recorded"):
        assert logged.since_last(DataLoader([1])) == {}
    assert logged.since_last(DataLoader([1])) == {}


def test_a_loader_that_a_framework_left_aside_is_not_called_unrecorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_place_of(monkeypatch, "accelerate", Accelerator=Accelerator)
    with pytest.warns(UserWarning, match=r"this SafeDataLoader has handed no batch over"):
        integrations.log_with_accelerate(Accelerator(), safeloader.instrument(DataLoader([1])))


def test_a_name_that_is_none_of_them() -> None:
    assert {*integrations.__all__} <= {*dir(integrations)}
    with pytest.raises(AttributeError, match="has no attribute 'KerasCallback'"):
        integrations.KerasCallback  # type: ignore[attr-defined]


def test_a_framework_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers: pip install transformers"):
        integrations.TransformersCallback


# ── Accelerate ───────────────────────────────────────────────────────────────────────────────────


class Accelerator:
    def __init__(self) -> None:
        self.told: list[tuple[dict[str, float], int | None]] = []

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.told.append((values, step))


def test_accelerate_logs_the_newest_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of(monkeypatch, "accelerate", Accelerator=Accelerator)
    accelerator, loader = Accelerator(), safeloader.instrument(DataLoader(list(range(12))))
    for step, _ in enumerate(loader):
        if step % 4 == 3:
            integrations.log_with_accelerate(accelerator, loader, step, last=4)
    assert [step for _, step in accelerator.told] == [3, 7, 11]
    for metrics, _ in accelerator.told:
        assert metrics["data/batches"] == 4
        assert "data/epoch" not in metrics
        assert set(metrics) >= PER_BATCH


def test_accelerate_says_that_its_loader_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of(monkeypatch, "accelerate", Accelerator=Accelerator)
    accelerator = Accelerator()
    with pytest.warns(UserWarning, match="safeloader.instrument"):
        integrations.log_with_accelerate(accelerator, DataLoader([1]))
    assert accelerator.told == []


# ── Transformers ─────────────────────────────────────────────────────────────────────────────────


class TrainerCallback:
    pass


class Trainer:
    """Calls back as Transformers' does, and logs every second step."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.callbacks: list[Any] = []
        self.history: list[dict[str, float]] = []

    def log(self, logs: dict[str, float]) -> None:
        self.history.append(dict(logs))
        self._tell("on_log", logs=logs)

    def _tell(self, event: str, **more: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(None, None, None, train_dataloader=self.loader, **more)

    def train(self) -> None:
        self._tell("on_train_begin")
        for _ in range(2):
            for step, _ in enumerate(self.loader):
                if step % 2:
                    self.log({"loss": 1.0})
            self._tell("on_epoch_end")


@pytest.mark.parametrize("kind", [DataLoader, SafeDataLoader])
def test_transformers_logs_after_each_log_and_epoch(
    monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    in_place_of(monkeypatch, "transformers", TrainerCallback=TrainerCallback)
    trainer = Trainer(kind(list(range(12)), batch_size=3))
    trainer.callbacks.append(integrations.TransformersCallback(trainer, on_error="skip"))
    trainer.train()
    epoch = ["loss", "data/batches", "loss", "data/batches", "data_epoch/batches"]
    assert [next(iter(each)) for each in trainer.history] == epoch * 2
    counts = [each.get("data/batches", each.get("data_epoch/batches")) for each in trainer.history]
    assert counts == [None, 2, None, 2, 4] * 2
    (recorded,) = loaders_of(trainer.loader)
    assert recorded.on_error == ("skip" if kind is DataLoader else "raise")


def test_a_launched_trainers_loader_keeps_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of(monkeypatch, "transformers", TrainerCallback=TrainerCallback)
    monkeypatch.setenv("SAFELOADER_LAUNCHED", "{}")
    loader = DataLoader(list(range(12)))
    callback = integrations.TransformersCallback(Trainer(loader))
    callback.on_train_begin(None, None, None, train_dataloader=loader)
    assert type(loader) is DataLoader


def test_transformers_holds_no_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of(monkeypatch, "transformers", TrainerCallback=TrainerCallback)
    callback = integrations.TransformersCallback(Trainer(None))
    loader = loader_of()
    list(loader)
    callback.on_log(None, None, None, train_dataloader=loader)  # the trainer is gone: no error
    callback.on_log(None, None, None)
    callback.on_epoch_end(None, None, None)
    callback.on_train_begin(None, None, None)


# ── Lightning ────────────────────────────────────────────────────────────────────────────────────


class LightningTrainer:
    """What the callback asks of Lightning's."""

    log_every_n_steps = 2

    def __init__(self, loader: Any, callback: Any) -> None:
        self.train_dataloader, self.callback = loader, callback
        self.loggers = [self]
        self.global_step = 0
        self.told: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.told.append((step, metrics))

    def fit(self) -> None:
        for number, batch in enumerate(self.train_dataloader):
            self.global_step += 1
            self.callback.on_train_batch_end(self, None, None, batch, number)
        self.callback.on_train_epoch_end(self, None)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_logs_where_lightning_does(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if package == "lightning.pytorch":
        in_place_of(monkeypatch, "lightning")

    class Callback:
        pass

    in_place_of(monkeypatch, package, Callback=Callback)
    callback = integrations.LightningCallback()
    assert isinstance(callback, Callback)
    trainer = LightningTrainer(loader_of(10), callback)
    trainer.fit()
    assert [step for step, _ in trainer.told] == [1, 3, 4]
    assert [metrics.get("data/batches") for _, metrics in trainer.told] == [2, 2, None]
    assert trainer.told[-1][1]["data_epoch/samples"] == 10
    trainer.log_every_n_steps = 0  # Lightning's word for never
    trainer.fit()
    assert [step for step, _ in trainer.told[3:]] == [9]


def test_lightnings_steps_are_those_of_the_training_and_not_of_an_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_place_of(monkeypatch, "lightning")
    in_place_of(monkeypatch, "lightning.pytorch", Callback=object)
    trainer = LightningTrainer(loader_of(6), integrations.LightningCallback())
    trainer.log_every_n_steps = 4
    for _ in range(3):  # of three steps each
        trainer.fit()
    logged = [(step, each) for step, each in trainer.told if "data/batches" in each]
    assert [(step, each["data/batches"]) for step, each in logged] == [(3, 1), (7, 2)]


def test_batches_of_one_step_are_logged_with_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of(monkeypatch, "lightning")
    in_place_of(monkeypatch, "lightning.pytorch", Callback=object)
    callback = integrations.LightningCallback()
    trainer = LightningTrainer(loader_of(12), callback)
    for number, batch in enumerate(trainer.train_dataloader):
        trainer.global_step = (number + 1) // 2  # gradients of two batches are a step
        callback.on_train_batch_end(trainer, None, None, batch, number)
    assert [(step, each["data/batches"]) for step, each in trainer.told] == [(1, 4)]


# ── steps ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run(tmp_path: Path, of_new_processes: None) -> Path:
    pytest.importorskip("pyarrow")
    return tmp_path / "run"


def marked(run: Path) -> list[tuple[int, int, int]]:
    """Step, epoch and batch of each mark, in the order they were made."""
    lines = [line for path in run.rglob("marks.jsonl") for line in path.read_text().splitlines()]
    return [(it["step"], it["epoch"], it["batch"]) for it in map(json.loads, lines)]


def ahead(loader: Any) -> Iterator[Any]:
    """A batch ahead, as frameworks read."""
    batches = iter(loader)
    held = next(batches)
    for batch in batches:
        yield held
        held = batch
    yield held


def test_the_batch_that_is_trained_on_is_marked(run: Path) -> None:
    loader, steps = loader_of(8, run_dir=run), MarkedSteps()
    step = 0
    for _ in range(2):
        steps.epoch_begins(loader, asked=False)
        for number, _ in enumerate(ahead(loader)):
            steps.trains_on(loader, step // 2, number)
            step += 1
    assert marked(run) == [(k // 2, k // 4, k % 4) for k in range(8)]


def test_what_has_not_come_is_not_marked(run: Path) -> None:
    loader, steps = loader_of(8, run_dir=run), MarkedSteps()
    steps.epoch_begins(loader, asked=False)
    steps.trains_on(loader, 1, 0)
    batches = iter(loader)
    steps.trains_on(loader, 1, 0)
    next(batches)
    steps.trains_on(loader, 1, 1)
    assert marked(run) == []
    steps.trains_on(loader, 1, 0)
    assert marked(run) == [(1, 0, 0)]


def test_an_epoch_that_is_read_from_elsewhere_is_not_marked(run: Path) -> None:
    """As the Trainer does where a checkpoint goes on."""
    loader, steps = loader_of(8, run_dir=run), MarkedSteps()
    list(loader)
    steps.epoch_begins(loader, asked=False)
    steps.trains_on(loader, 5, 0)
    assert marked(run) == []
    steps.epoch_begins(loader, asked=True)
    steps.trains_on(loader, 5, 0)
    assert marked(run) == [(5, 0, 0)]


def test_of_several_loaders_none_is_marked(run: Path) -> None:
    loaders = [loader_of(8, run_dir=run), loader_of(6, run_dir=run)]
    steps = MarkedSteps()
    steps.epoch_begins(loaders, asked=False)
    for _ in zip(*loaders, strict=False):
        steps.trains_on(loaders, 1, 0)
    assert marked(run) == []


def test_without_a_run_nothing_is_noted() -> None:
    loader, steps = loader_of(8), MarkedSteps()
    steps.epoch_begins(loader, asked=False)
    for number, _ in enumerate(loader):
        steps.trains_on(loader, number, number)
    steps.trains_on(None, 0, 0)
    steps.trains_on(DataLoader([1]), 0, 0)


def test_a_fault_of_ours_is_told_once_and_ends_no_training(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loader, steps = loader_of(8, run_dir=run), MarkedSteps()

    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(loader, "mark", fails)
    for number, _ in enumerate(loader):
        steps.trains_on(loader, number, number)
    assert [each.levelname for each in caplog.records] == ["ERROR"]
    assert "the marks of the optimizer's steps failed" in caplog.text


def test_what_is_dispatched_to_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dispatcher:
        def __init__(self, loader: Any, processes: int) -> None:
            self.base_dataloader = loader
            self.state = types.SimpleNamespace(num_processes=processes)
            self.end_of_dataloader = False

    in_place_of(monkeypatch, "accelerate", Accelerator=Accelerator)
    in_place_of(
        monkeypatch,
        "accelerate.data_loader",
        DataLoaderDispatcher=Dispatcher,
        DataLoaderShard=type("Shard", (), {}),
    )
    loader = loader_of(8)
    mark = integrations.mark_with_accelerate
    with pytest.raises(LookupError, match="none was handed over yet"):
        mark(Dispatcher(loader, 1), 0)
    list(loader)
    mark(Dispatcher(loader, 1), 0)
    with pytest.raises(ValueError, match="dispatch_batches=False"):
        mark(Dispatcher(loader, 2), 0)
    with pytest.warns(UserWarning, match="is not recorded"):
        mark(DataLoader([1]), 0)
    with pytest.raises(TypeError, match="step"):
        mark(loader, "x")  # type: ignore[arg-type]


def test_each_is_imported_when_it_is_asked_for() -> None:
    importlib.import_module("safeloader.integrations")
    assert not [name for name in FRAMEWORKS if f"safeloader.integrations.{name}" in sys.modules]
