"""Lightning itself: it iterates the loader, re-creates it, copies it and stops its workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from safeloader import GlobalBatchSampler, Recorder, SafeDataLoader, SampleError
from tests import datasets, faults
from tests.frameworks.stand_ins import still_alive, workers_of

lightning = pytest.importorskip("lightning")

from lightning.pytorch.utilities import CombinedLoader  # noqa: E402

from tests.frameworks.lightning_training import LENGTH, Model, Numbered, trainer  # noqa: E402

ROOT = Path(__file__).parents[2]
ALL = list(range(LENGTH))

pytestmark = [
    pytest.mark.lightning,
    # Lightning's advice on speed, and its use of what torch has deprecated since.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:Consider setting `persistent_workers=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
]

KINDS: dict[str, dict[str, Any]] = {
    "main": {},
    "workers": {"num_workers": 2},
    "persistent": {"num_workers": 2, "persistent_workers": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def loader_of(cls: Any = SafeDataLoader, **arguments: Any) -> Any:
    return cls(Numbered(), **({"batch_size": 4} | arguments))


def indices(loader: Any, epoch: int) -> list[int]:
    table = loader.provenance.to_numpy()
    return table["index"][table["epoch"] == epoch].tolist()


def verdict(loader: Any) -> tuple[int, bool, bool, int]:
    audit = loader.audit
    assert audit is not None
    return audit.epoch, audit.complete, audit.ok, audit.delivered


class AsksInTheStep(Model):
    """Asks, in the middle of training, which samples it is trained on."""

    def __init__(self, loader: Any) -> None:
        super().__init__()
        self.loader = loader

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        record = self.loader.provenance.batch(batch_idx)
        assert list(record.indices) == batch["index"].tolist()
        assert (record.batch, record.epoch) == (batch_idx, self.current_epoch)
        loss: torch.Tensor = super().training_step(batch, batch_idx)
        return loss


# ── fit ──────────────────────────────────────────────────────────────────────────────────────────


@every_kind
def test_fit_with_train_and_validation(kind: str, tmp_path: Path) -> None:
    train = loader_of(shuffle=True, **KINDS[kind])
    val = loader_of(batch_size=5, **KINDS[kind])
    model = AsksInTheStep(train)
    run = trainer(tmp_path, num_sanity_val_steps=2)
    run.fit(model, train, val)
    assert run.train_dataloader is train
    assert verdict(train) == (1, True, True, LENGTH)
    for epoch in range(2):
        trained = model.trained[6 * epoch : 6 * epoch + 6]
        assert [i for batch in trained for i in batch] == indices(train, epoch)
        assert sorted(indices(train, epoch)) == ALL
    # The sanity check is an epoch left after two batches, then come the two of the run.
    assert verdict(val) == (2, True, True, LENGTH)
    assert [indices(val, epoch) for epoch in range(3)] == [ALL[:10], ALL, ALL]
    assert model.validated == ALL[:10] + ALL + ALL


@every_kind
def test_fit_tells_our_batch_sampler_the_epoch(kind: str, tmp_path: Path) -> None:
    sampler = GlobalBatchSampler(LENGTH, 4, tail="uneven")
    train = SafeDataLoader(Numbered(), batch_sampler=sampler, **KINDS[kind])  # type: ignore[arg-type]
    model = AsksInTheStep(train)
    trainer(tmp_path).fit(model, train)
    orders = [list(sampler.batches(epoch)) for epoch in range(2)]
    assert model.trained == orders[0] + orders[1]
    assert orders[0] != orders[1]
    assert verdict(train) == (1, True, True, LENGTH)
    assert train.audit is not None
    assert train.audit.notes == ()


def test_fit_stops_the_persistent_workers_and_starts_them_again(tmp_path: Path) -> None:
    train = loader_of(num_workers=2, persistent_workers=True)
    seen = []

    class Watches(Model):
        def on_train_epoch_end(self) -> None:
            assert type(train._iterator) is _MultiProcessingDataLoaderIter
            seen.append(workers_of(train._iterator))

    for _ in range(2):
        trainer(tmp_path).fit(Watches(), train)
        assert train._iterator is None
        assert seen[-1] == seen[-2]
        assert len(seen[-1]) == 2
        assert still_alive(seen[-1]) == []
    assert seen[0] != seen[2]
    assert verdict(train) == (3, True, True, LENGTH)


@every_kind
def test_fit_of_a_part_of_the_epoch(kind: str, tmp_path: Path) -> None:
    train = loader_of(**KINDS[kind])
    model = AsksInTheStep(train)
    trainer(tmp_path, limit_train_batches=3).fit(model, train)
    assert model.trained == [ALL[:4], ALL[4:8], ALL[8:12]] * 2
    assert verdict(train) == (1, False, True, 12)


@every_kind
def test_fit_of_a_stream(kind: str, tmp_path: Path) -> None:
    """Without a length Lightning fetches a batch ahead."""
    stream = datasets.Stream(LENGTH)
    train: Any = SafeDataLoader(stream, 4, collate_fn=as_lightning_batch, **KINDS[kind])
    model = Model()
    trainer(tmp_path).fit(model, train)
    assert verdict(train) == (1, True, True, LENGTH)
    assert sorted(i for batch in model.trained for i in batch) == sorted(ALL + ALL)


def as_lightning_batch(samples: list[tuple[int, torch.Tensor]]) -> dict[str, torch.Tensor]:
    numbers, noise = zip(*samples, strict=True)
    return {"index": torch.tensor(numbers), "x": torch.stack(noise)}


def test_fit_of_several_loaders_at_once(tmp_path: Path) -> None:
    """The shorter one is started again while the other goes on."""
    short, long = loader_of(batch_size=8), loader_of(batch_size=4)

    class Both(Model):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            for name in ("short", "long"):
                assert loaders[name].last_batch.indices == tuple(batch[name]["index"].tolist())
            loss: torch.Tensor = super().training_step(batch["long"], batch_idx)
            return loss

    loaders = {"short": short, "long": long}
    combined = CombinedLoader(loaders, mode="max_size_cycle")
    trainer(tmp_path, max_epochs=1).fit(Both(), combined)
    assert verdict(long) == (0, True, True, LENGTH)
    assert indices(short, 0) == indices(short, 1) == ALL


@pytest.mark.parametrize("workers", [0, 2])
def test_failure_in_fit_names_its_index(workers: int, tmp_path: Path) -> None:
    train: Any = SafeDataLoader(faults.Raises(at=5), batch_size=4, num_workers=workers)
    failed = None
    try:
        trainer(tmp_path).fit(Raising(), train)
    except KeyError as error:
        failed = error.with_traceback(None)  # its frames hold the iterator
    assert isinstance(failed, SampleError)
    assert failed.failure is not None
    assert (failed.index, failed.failure.batch, failed.failure.epoch) == (5, 1, 0)
    assert train.audit is not None
    assert train.audit.failed.tolist() == [4, 5, 6, 7]


class Raising(Model):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(torch.zeros(1, 2)).sum()  # type: ignore[no-any-return]


# ── predict re-creates the loader ────────────────────────────────────────────────────────────────
#
# With a batch sampler of Lightning's, whose length it goes by. Without workers nothing is asked
# beyond that length, so whether more would have come is not known: the epoch is not `complete`.


@every_kind
@pytest.mark.parametrize("cls", [SafeDataLoader, datasets.Extra])
def test_predict_with_a_loader_given(cls: Any, kind: str, tmp_path: Path) -> None:
    loader = loader_of(cls, drop_last=True, verify="warn", key=index_of, **KINDS[kind])
    run = trainer(tmp_path)
    predicted = run.predict(Model(), loader)
    used = run.predict_dataloaders
    assert used is not loader
    assert type(used) is cls
    assert (used.verify, used.key, used.recorder) == ("warn", index_of, loader.recorder)
    assert torch.cat(predicted).tolist() == ALL  # Lightning drops nothing here
    assert verdict(loader) == verdict(used) == (0, kind != "main", True, LENGTH)
    assert indices(loader, 0) == ALL
    assert loader.last_batch.indices == (20, 21, 22)
    assert loader.provenance.batch(1).indices == (4, 5, 6, 7)


def index_of(sample: Any) -> Any:
    return sample["index"]


def test_predict_with_a_loader_made_in_a_hook(tmp_path: Path) -> None:
    """Lightning notes the arguments that the user gave and makes the loader again from those."""

    class WithHook(Model):
        def predict_dataloader(self) -> Any:
            self.loader = loader_of(verify="warn")
            return self.loader

    model, run = WithHook(), trainer(tmp_path)
    predicted = run.predict(model)
    used = run.predict_dataloaders
    assert torch.cat(predicted).tolist() == ALL
    assert type(used) is SafeDataLoader
    assert used.verify == "warn"
    assert verdict(used) == (0, False, True, LENGTH)
    assert used is not model.loader
    assert verdict(model.loader) == (0, False, True, LENGTH)
    assert indices(model.loader, 0) == ALL


def test_predict_with_a_loader_and_its_recorder_made_in_a_hook(tmp_path: Path) -> None:
    recorder = Recorder()

    class WithHook(Model):
        def predict_dataloader(self) -> Any:
            self.loader = loader_of(recorder=recorder)
            return self.loader

    model, run = WithHook(), trainer(tmp_path)
    run.predict(model)
    assert run.predict_dataloaders is not model.loader
    assert run.predict_dataloaders.recorder is recorder
    assert verdict(model.loader) == (0, False, True, LENGTH)


def test_predict_twice_with_one_loader(tmp_path: Path) -> None:
    loader, run = loader_of(num_workers=2), trainer(tmp_path)
    for epoch in range(2):
        assert torch.cat(run.predict(Model(), loader)).tolist() == ALL
        assert verdict(loader) == (epoch, True, True, LENGTH)


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ours_first", [True, False])
def test_checkpoints_go_from_our_loader_to_the_stock_one_and_back(
    ours_first: bool, tmp_path: Path
) -> None:
    first, then = (SafeDataLoader, DataLoader) if ours_first else (DataLoader, SafeDataLoader)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Model(), loader_of(first))
    run.save_checkpoint(tmp_path / "half.ckpt")
    model, loader = Model(), loader_of(then)
    trainer(tmp_path, max_epochs=2).fit(model, loader, ckpt_path=tmp_path / "half.ckpt")
    assert [i for batch in model.trained for i in batch] == ALL
    if not ours_first:
        assert verdict(loader) == (0, True, True, LENGTH)


# ── Fabric ───────────────────────────────────────────────────────────────────────────────────────


@every_kind
def test_fabric_wraps_the_loader(kind: str) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    loader = loader_of(shuffle=True, **KINDS[kind])
    wrapped = fabric.setup_dataloaders(loader)
    assert wrapped.recorder is loader.recorder
    for epoch in range(2):
        seen = []
        for batch in wrapped:
            seen += batch["index"].tolist()
            assert list(loader.last_batch.indices) == seen[-len(batch["index"]) :]
        assert sorted(seen) == ALL
        assert seen == indices(loader, epoch)
        assert verdict(loader) == (epoch, True, True, LENGTH)


# ── distributed: two processes, each with a re-created loader ────────────────────────────────────


def train_on_two_processes(strategy: str, where: str, tmp_path: Path) -> tuple[list[Any], str]:
    """What each rank saw, and what the program said on stderr."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-m", "tests.frameworks.lightning_training", strategy, where, tmp_path],
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)], ran.stderr


def check_ranks(ranks: list[Any], answering: str) -> None:
    drawn: list[int] = []
    for rank in ranks:
        assert (rank["type"], rank["recreated"], rank["verify"]) == ("SafeDataLoader", True, "warn")
        assert rank["sampler"] == "DistributedSampler"
        answers = rank[answering]
        audit = answers["audit"]
        assert audit is not None
        assert (audit["epoch"], audit["complete"], audit["ok"]) == (0, True, True)
        assert (audit["drawn"], audit["delivered"]) == (12, 12)  # 23 samples and one of padding
        assert answers["last"] == rank["trained"][-1]
        assert answers["indices"] == [i for batch in rank["trained"] for i in batch]
        assert (audit["unvisited"], audit["elsewhere"]) == ([], LENGTH - 12)  # the other rank's
        drawn += answers["indices"]
    assert sorted(set(drawn)) == ALL
    assert len(drawn) == LENGTH + 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_ddp_with_a_loader_given(strategy: str, tmp_path: Path) -> None:
    ranks, _ = train_on_two_processes(strategy, "given", tmp_path)
    check_ranks(ranks, "of_the_used")
    check_ranks(ranks, "of_the_users")


@pytest.mark.slow
def test_ddp_with_a_loader_made_in_a_hook(tmp_path: Path) -> None:
    ranks, said = train_on_two_processes("ddp", "hook", tmp_path)
    check_ranks(ranks, "of_the_used")
    check_ranks(ranks, "of_the_users")
    assert "never delivered a batch" not in said
