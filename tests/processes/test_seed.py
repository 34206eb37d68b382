"""``seed=``: batches are a function of seed, epoch and index, whoever makes them, wherever."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

import safeloader
from safeloader import (
    GlobalBatchSampler,
    SafeDataLoader,
    SampleError,
    WorkerCrashError,
    sample_rng,
)
from safeloader.main import reporting_workers
from safeloader.supervision import growth
from tests.frameworks.library_loaders import Endless
from tests.oracle import numbers, observe, plain, rng_state, seed_all
from tests.processes.test_launcher import ROOT, surroundings

N = 23
WAYS: dict[str, dict[str, Any]] = {
    "one": {"num_workers": 1},
    "two": {"num_workers": 2},
    "three, persistent": {"num_workers": 3, "persistent_workers": True},
    "spawn": {"num_workers": 2, "multiprocessing_context": "spawn"},
    "any order": {"num_workers": 2, "in_order": False},
    "torch's transport": {"num_workers": 2, "transport": "torch"},
}
per_each = pytest.mark.parametrize("per", ["sample", "batch"])
with_workers = pytest.mark.parametrize("workers", [0, 2])


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast the machine is does not matter here."""
    monkeypatch.setattr(reporting_workers, "ANSWER_S", 30.0)
    monkeypatch.setattr(growth, "SLOW_START_S", 600.0)


class Draws:
    """Each sample is its index and what it drew."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> torch.Tensor:
        drawn = [*numbers(), float(sample_rng().random())]
        return torch.tensor([float(index), *drawn], dtype=torch.float64)


class AtOnce(Draws):
    """The same, a batch at once."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), *numbers()], dtype=torch.float64)

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices]


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Each worker's part draws, as it is begun and for each sample."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        worker, begun = 0 if info is None else info.id, numbers()
        for number in range(7 - worker):
            drawn = [*begun, *numbers(), float(sample_rng().random())]
            yield torch.tensor([float(worker), float(number), *drawn], dtype=torch.float64)


def collated(samples: Any) -> torch.Tensor:
    """Draws too, as a mixup does."""
    row = torch.zeros_like(samples[0])
    row[:8] = torch.tensor([-1.0, *numbers()])
    return torch.stack([*samples, row])


def loader_of(dataset: Any = None, **keywords: Any) -> Any:
    given = {"batch_size": 4, "seed": 11, "collate_fn": collated} | keywords
    if not {"shuffle", "sampler", "batch_sampler"} & set(given):
        given["shuffle"] = not isinstance(dataset, IterableDataset)
    return SafeDataLoader(Draws() if dataset is None else dataset, **given)


def epochs(loader: Any, number: int = 2) -> list[list[Any]]:
    return [[plain(batch) for batch in loader] for _ in range(number)]


def by_index(loader: Any) -> dict[int, Any]:
    """Each sample of an epoch, without what collation drew."""
    return {int(row[0]): plain(row) for batch in loader for row in batch if row[0] >= 0}


# ── the same on any workers ──────────────────────────────────────────────────────────────────────


@per_each
@pytest.mark.parametrize("way", WAYS)
def test_batches_are_those_of_the_main_process_bit_for_bit(way: str, per: str) -> None:
    expected = epochs(loader_of(seed_per=per))
    seed_all(5)  # what stands in main does not matter
    found = epochs(loader_of(seed_per=per, **WAYS[way]))
    if way == "any order":
        expected, found = ([sorted(epoch) for epoch in each] for each in (expected, found))
    assert found == expected
    assert expected[0] != expected[1]


@with_workers
def test_a_batch_that_is_made_in_one_call_is_seeded_as_a_batch(workers: int) -> None:
    expected = epochs(loader_of(AtOnce(), seed_per="batch"))
    found = loader_of(AtOnce(), seed_per="batch", num_workers=workers)
    assert epochs(found) == expected
    assert found.audit.ok


@per_each
@pytest.mark.parametrize("persistent", [False, True])
def test_a_worker_has_the_stream_that_the_seed_says(per: str, persistent: bool) -> None:
    in_main = epochs(loader_of(Stream(), seed_per=per))
    more = {"persistent_workers": persistent, "seed_per": per}
    assert epochs(loader_of(Stream(), num_workers=1, **more)) == in_main
    two, again = (epochs(loader_of(Stream(), num_workers=2, **more)) for _ in range(2))
    assert two == again
    assert not {repr(batch) for batch in two[0]} & {repr(batch) for batch in two[1]}


def test_without_batching_each_draw_is_seeded() -> None:
    expected = epochs(loader_of(batch_size=None, collate_fn=None))
    assert epochs(loader_of(batch_size=None, collate_fn=None, num_workers=2)) == expected


def test_a_sample_is_the_same_at_any_batch_size_and_on_any_rank() -> None:
    one = by_index(loader_of())
    assert by_index(loader_of(batch_size=7, shuffle=False, num_workers=2)) == one
    shares: dict[int, Any] = {}
    for rank in range(2):
        sampler: Any = DistributedSampler(Draws(), num_replicas=2, rank=rank, shuffle=True)
        shares |= by_index(loader_of(sampler=sampler))
    assert shares == one


def test_two_ranks_have_batches_of_different_numbers() -> None:
    firsts = []
    for rank in range(2):
        sampler: Any = DistributedSampler(Draws(), num_replicas=2, rank=rank, shuffle=False)
        batch = next(iter(loader_of(sampler=sampler, seed_per="batch")))
        firsts.append({*batch[:, 1:-1].flatten().tolist()})
    assert not firsts[0] & firsts[1]


class Kills(Draws):
    """Kills its worker once, at an index, after it drew."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __getitem__(self, index: int) -> torch.Tensor:
        sample = super().__getitem__(index)
        if index == 13 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return sample


@per_each
def test_batches_are_the_same_after_a_restart(per: str, tmp_path: Path) -> None:
    found = loader_of(Kills(tmp_path / "once"), on_crash="restart", num_workers=2, seed_per=per)
    came = epochs(found)
    assert (tmp_path / "once").exists()
    assert came == epochs(loader_of(seed_per=per))


class Fails(Draws):
    """Fails at an index after it drew: once in each process, or each time."""

    def __init__(self, once: bool) -> None:
        self.once, self.failed = once, False

    def __getitem__(self, index: int) -> torch.Tensor:
        sample = super().__getitem__(index)
        if index == 13 and not (self.once and self.failed):
            self.failed = True
            raise OSError(str(sample.tolist()))
        self.failed = self.failed and index != 14
        return sample


@per_each
@with_workers
def test_a_sample_that_is_asked_for_again_has_the_same_numbers(
    per: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = loader_of(Fails(once=True), retries=1, num_workers=workers, seed_per=per)
    assert epochs(found, 1) == epochs(loader_of(seed_per=per), 1)


@per_each
def test_what_stands_in_for_a_sample_is_the_same_on_any_workers(per: str) -> None:
    def came(**keywords: Any) -> list[Any]:
        return epochs(loader_of(Fails(once=False), on_error="replace", seed_per=per, **keywords))

    assert came() == came(num_workers=2)
    alone = {"batch_size": 1}  # then it is one of an earlier batch
    assert came(**alone) == came(num_workers=2, **alone)


SAMPLERS: dict[str, Any] = {
    "shuffle": lambda: {"shuffle": True},
    "with replacement": lambda: {"sampler": RandomSampler(Draws(), True, 30)},
    "subset": lambda: {"sampler": SubsetRandomSampler([3, 1, 4, 15, 9])},
    "weights": lambda: {"sampler": WeightedRandomSampler([1.0, 2.0, 3.0] * 5, 12)},
    "batches": lambda: {"batch_sampler": BatchSampler(RandomSampler(Draws()), 5, True)},
    "unbatched": lambda: {"batch_size": None, "sampler": RandomSampler(Draws())},
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_order_of_torchs_samplers_is_that_of_seed_and_epoch(kind: str) -> None:
    def drawn(seed: int, **keywords: Any) -> list[list[Any]]:
        given = SAMPLERS[kind]()
        if "batch_sampler" not in given:
            given = {"batch_size": 4} | given
        given |= {"collate_fn": None}
        loader = SafeDataLoader(Draws(), seed=seed, **given, **keywords)
        return [[loader.last_batch.indices for _ in loader] for _ in range(2)]

    before = rng_state()
    first = drawn(1)
    assert rng_state() != before  # torch's base seed is drawn as ever
    assert drawn(1, num_workers=2) == first
    assert first[0] != first[1]
    assert drawn(2) != first


@st.composite
def _modes(draw: st.DrawFn) -> dict[str, Any]:
    given = SAMPLERS[draw(st.sampled_from(list(SAMPLERS)))]()
    if "batch_sampler" not in given:
        given = {"batch_size": draw(st.integers(1, 9)), "drop_last": draw(st.booleans())} | given
        if given["batch_size"] is None:
            del given["drop_last"]
    given["seed_per"] = draw(st.sampled_from(["sample", "batch"]))
    given["seed"] = draw(st.integers(0, 1 << 40))
    return given


@pytest.mark.uncovered
@pytest.mark.hypothesis
@given(mode=_modes(), workers=st.integers(1, 3), persistent=st.booleans(), leave=st.booleans())
def test_any_mode_is_the_same_on_any_workers(
    mode: dict[str, Any], workers: int, persistent: bool, leave: bool
) -> None:
    def came(**keywords: Any) -> list[Any]:
        loader = SafeDataLoader(Draws(), **mode, **keywords)
        if leave:  # a peek
            next(iter(loader), None)
            loader.set_epoch(0)
        return epochs(loader)

    assert came(num_workers=workers, persistent_workers=persistent) == came()


# ── what stays torch's ───────────────────────────────────────────────────────────────────────────


@with_workers
@pytest.mark.parametrize("stream", [False, True])
def test_main_draws_what_torch_draws(workers: int, stream: bool) -> None:
    """Its base seed, and nothing else: the order of ``shuffle=False`` takes none."""

    class Still(Draws):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor([index])

    class StillStream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[int]:
            return iter(range(5))

    def make(cls: Any, **keywords: Any) -> Any:
        return cls(StillStream() if stream else Still(), 4, num_workers=workers, **keywords)

    expected = observe(DataLoader, make)
    assert observe(SafeDataLoader, lambda cls: make(cls, seed=3)) == expected


@per_each
@pytest.mark.parametrize("dataset", [Draws, Stream])
def test_the_generators_of_main_stand_where_they_stood(per: str, dataset: Any) -> None:
    seed_all(4)
    iterator = iter(loader_of(dataset(), seed_per=per))
    for odd in range(5):
        if odd % 2:  # keeps a Gaussian for the next call
            random.gauss(0, 1), np.random.randn()
        torch.randn(1)
        before = rng_state()
        next(iterator, None)
        assert rng_state() == before


class Stops(Draws):
    def __init__(self, raised: BaseException) -> None:
        self.raised = raised

    def __getitem__(self, index: int) -> torch.Tensor:
        super().__getitem__(index)
        raise self.raised


@pytest.mark.parametrize("raised", [KeyError("x"), KeyboardInterrupt(), SystemExit()])
def test_the_generators_of_main_stand_there_after_an_error_too(raised: BaseException) -> None:
    iterator = iter(loader_of(Stops(raised)))
    seed_all(4)
    np.random.randn(), random.gauss(0, 1)
    before = rng_state()
    with pytest.raises(type(raised)):
        next(iterator)
    assert rng_state() == before
    with pytest.raises(RuntimeError, match="belongs to a sample"):
        sample_rng()


def test_a_loader_within_a_sample_has_numbers_of_its_own() -> None:
    class Outer(Draws):
        def __getitem__(self, index: int) -> Any:
            before = float(sample_rng().random())
            inner = [plain(batch) for batch in loader_of(seed=5, shuffle=False)]
            assert float(sample_rng().random()) == before
            return inner, before, numbers()

    alone = [plain(batch) for batch in loader_of(seed=5, shuffle=False)]
    loader = loader_of(Outer(), batch_size=1, collate_fn=lambda samples: samples[0])
    came = [next(iter(loader)), next(iter(loader))]
    assert all(inner == alone for inner, *_ in came)
    assert came[0][2] != came[1][2]


def test_a_user_function_in_the_worker_sees_torchs_seed() -> None:
    def seen(cls: Any, **keywords: Any) -> list[Any]:
        seed_all(7)
        loader = cls(_Seeds(), num_workers=2, worker_init_fn=_notes_seed, **keywords)
        return sorted(int(each) for batch in loader for each in batch)

    assert seen(SafeDataLoader, seed=3) == seen(DataLoader)


class _Seeds:
    seen = 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        info: Any = get_worker_info()
        assert info.seed == self.seen
        return self.seen


def _notes_seed(worker: int) -> None:
    info: Any = get_worker_info()
    info.dataset.seen = torch.initial_seed()


# ── epochs ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("persistent", [False, True])
def test_an_epoch_can_be_said(persistent: bool) -> None:
    more = {"num_workers": 2, "persistent_workers": True} if persistent else {}
    expected = epochs(loader_of(), 4)
    loader = loader_of(**more)
    next(iter(loader))  # a peek
    for _ in range(2):
        loader.set_epoch(0)
    assert epochs(loader, 2) == expected[:2]
    loader.set_epoch(np.int64(3))
    assert epochs(loader, 1) == expected[3:]
    assert [audit.epoch for audit in loader.audits] == [0, 1, 2, 3]  # records count for themselves


def test_the_epoch_is_handed_to_a_sampler_that_wants_it() -> None:
    class Told(DistributedSampler[Any]):
        told = 0

        def set_epoch(self, epoch: int) -> None:
            self.told += 1
            super().set_epoch(epoch)

    class Batches(BatchSampler):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    sampler: Any = Told(Draws(), num_replicas=2, rank=0)
    batches = Batches(sampler, 2, False)
    for keywords in ({"sampler": sampler}, {"batch_sampler": BatchSampler(sampler, 2, False)}):
        SafeDataLoader(Draws(), **keywords).set_epoch(3)
    SafeDataLoader(Draws(), batch_size=None, sampler=sampler).set_epoch(4)
    assert (sampler.told, sampler.epoch) == (3, 4)
    SafeDataLoader(Draws(), batch_sampler=batches).set_epoch(5)
    assert (batches.epoch, sampler.epoch) == (5, 4)
    SafeDataLoader(Stream()).set_epoch(6)


@pytest.mark.parametrize(("epoch", "error"), [(-1, ValueError), (1.5, TypeError), ("1", TypeError)])
def test_an_epoch_is_a_whole_number_from_0(epoch: Any, error: type[Exception]) -> None:
    loader = loader_of()
    with pytest.raises(error, match="epoch"):
        loader.set_epoch(epoch)
    assert epochs(loader, 1) == epochs(loader_of(), 1)


def test_a_copy_goes_on_counting() -> None:
    loader = loader_of()
    expected = epochs(loader, 3)
    loader.set_epoch(1)
    for again in (copy.copy(loader), pickle.loads(pickle.dumps(loader))):
        assert epochs(again) == expected[1:]


def test_persistent_workers_are_new_ones_where_the_seed_comes_later() -> None:
    loader: Any = loader_of(num_workers=1, persistent_workers=True, seed=None, shuffle=False)
    with pytest.raises(SampleError, match="belongs to a sample"):
        list(loader)
    safeloader.instrument(loader, seed=11)
    assert epochs(loader) == epochs(loader_of(shuffle=False))
    safeloader.instrument(loader, seed_per="batch", seed=12)
    loader.set_epoch(0)
    assert epochs(loader, 1) == epochs(loader_of(shuffle=False, seed=12, seed_per="batch"), 1)


# ── other ways in ────────────────────────────────────────────────────────────────────────────────


def test_a_loader_that_others_made_is_seeded() -> None:
    class Theirs(DataLoader):  # type: ignore[type-arg]
        told: Any = None

        def set_epoch(self, epoch: int) -> str:
            self.told = epoch
            return "theirs"

    made: Any = Theirs(Draws(), 4, shuffle=True, collate_fn=collated, num_workers=1)
    loader = safeloader.instrument(made, seed=11)
    expected = epochs(loader_of())
    assert epochs(loader) == expected
    assert loader.set_epoch(1) == "theirs"
    assert made.told == 1
    assert epochs(loader, 1) == expected[1:]


def test_a_sampler_that_a_framework_gave_a_generator_draws_by_the_seed() -> None:
    made: Any = DataLoader(Draws(), 4, shuffle=True, collate_fn=collated)
    made.sampler.generator = torch.Generator().manual_seed(3)
    state = made.sampler.generator.get_state()
    assert epochs(safeloader.instrument(made, seed=11)) == epochs(loader_of())
    assert torch.equal(made.sampler.generator.get_state(), state)


def test_the_launcher_seeds_each_loader_that_can_be(tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text(
        "import torch\n"
        "from torch.utils.data import DataLoader\n"
        "from tests.oracle import plain\n"
        "from tests.processes.test_seed import AtOnce, Draws, collated\n"
        "if __name__ == '__main__':\n"
        "    mine = torch.Generator()\n"
        "    for more in ({'num_workers': 1}, {}):\n"
        "        loader = DataLoader(Draws(), 4, shuffle=True, collate_fn=collated, **more)\n"
        "        print([plain(batch) for _ in range(2) for batch in loader])\n"
        "    print(len(list(DataLoader(AtOnce(), 4))))\n"
    )
    command = [sys.executable, "-m", "safeloader", "run", "--seed", "11", str(program)]
    done = subprocess.run(
        command, cwd=ROOT, env=surroundings(), capture_output=True, text=True, timeout=300
    )
    expected = repr([batch for epoch in epochs(loader_of()) for batch in epoch])
    assert done.stdout.splitlines() == [expected, expected, "6"], done.stderr
    assert "AtOnce makes a whole batch in one call (__getitems__)" in done.stderr
    assert "--seed does not serve DataLoader at" in done.stderr


# ── what is refused ──────────────────────────────────────────────────────────────────────────────


class _Stacks(Draws):
    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices]


@pytest.mark.parametrize(
    ("keywords", "told"),
    [
        ({"generator": torch.Generator()}, "seed= and generator= both"),
        ({"sampler": RandomSampler(Draws(), generator=torch.Generator())}, "the RandomSampler has"),
        (
            {
                "batch_sampler": BatchSampler(
                    SubsetRandomSampler([1], generator=torch.Generator()), 2, False
                ),
                "batch_size": 1,
            },
            "the SubsetRandomSampler has",
        ),
        ({"seed": -1}, "seed must be an int, 0 or more"),
        ({"seed": True}, "seed must be an int, 0 or more"),
        ({"seed": 1.0}, "seed must be an int, 0 or more"),
        ({"seed_per": "epoch"}, "seed_per must be 'sample'"),
    ],
)
def test_what_cannot_be_kept_is_refused(keywords: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        loader_of(**({"shuffle": None} | keywords))


@pytest.mark.parametrize("wrap", [lambda dataset: dataset, lambda dataset: Subset(dataset, [1])])
def test_batches_in_one_call_cannot_be_seeded_one_by_one(wrap: Any) -> None:
    told = "^_Stacks makes a whole batch in one call"
    with pytest.raises(ValueError, match=f"{told}.*seed_per='batch'"):
        loader_of(wrap(_Stacks()))
    with pytest.raises(ValueError, match=told):
        safeloader.instrument(DataLoader(wrap(_Stacks())), seed=1)
    assert loader_of(wrap(_Stacks()), batch_size=None, collate_fn=None).seed == 11


def test_a_subset_over_plain_datasets_is_asked_one_by_one() -> None:
    def nested() -> Any:
        return Subset(Subset(Draws(), range(20)), range(0, 20, 2))

    expected = by_index(loader_of(nested()))
    assert by_index(loader_of(nested(), batch_size=3, num_workers=2)) == expected
    (batch,) = loader_of(nested(), batch_size=10)
    assert len({row[1] for row in batch.tolist()}) == 11


def test_a_loader_with_one_iterator_for_all_epochs_is_seeded_by_batches() -> None:
    made = Endless(Draws(), batch_size=4)
    kept = dict(vars(made))
    with pytest.raises(ValueError, match=r"keeps one iterator for all epochs.*seed_per='batch'"):
        safeloader.instrument(made, seed=1)
    assert vars(made) == kept
    loader: Any = safeloader.instrument(made, seed=1, seed_per="batch")
    first, second = epochs(loader)
    assert first != second


def test_a_refused_instrument_changes_nothing() -> None:
    made: Any = DataLoader(Draws(), generator=torch.Generator())
    with pytest.raises(ValueError, match="seed= and generator= both"):
        safeloader.instrument(made, seed=1)
    assert type(made) is DataLoader
    loader = safeloader.instrument(made)
    with pytest.raises(ValueError, match="seed= and generator= both"):
        safeloader.instrument(loader, seed=1)
    assert loader.seed is None


# ── what is said ─────────────────────────────────────────────────────────────────────────────────


def said(caplog: pytest.LogCaptureFixture, loader: Any, number: int = 3) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "safeloader"), warnings.catch_warnings():
        warnings.simplefilter("error")
        epochs(loader, number)
    return [record.getMessage().partition(": ")[2] for record in caplog.records]


QUIET: dict[str, dict[str, Any]] = {
    "main": {},
    "fresh": {"num_workers": 2},
    "persistent": {"num_workers": 2, "persistent_workers": True},
}


@per_each
@pytest.mark.parametrize("way", QUIET)
@pytest.mark.parametrize("dataset", [Draws, Stream])
def test_nothing_is_said_of_the_numbers_that_a_seed_gives(
    caplog: pytest.LogCaptureFixture, way: str, per: str, dataset: Any
) -> None:
    loader = loader_of(dataset(), seed_per=per, **QUIET[way])
    assert said(caplog, loader) == []
    loader.set_epoch(0)  # again
    assert said(caplog, loader) == []
    assert [audit.noticed for audit in loader.audits] == [()] * 6


@pytest.mark.parametrize("way", QUIET)
def test_nothing_is_said_where_another_order_has_an_epochs_numbers_again(
    caplog: pytest.LogCaptureFixture, way: str
) -> None:
    class Mine(RandomSampler):
        """An order of its own in each pass, whatever the epoch."""

    loader = loader_of(sampler=Mine(Draws()), seed_per="batch", **QUIET[way])
    heard = []
    for _ in range(3):
        loader.set_epoch(0)
        heard += said(caplog, loader, 1)
    assert heard == []


class Fixed(Draws):
    def __getitem__(self, index: int) -> torch.Tensor:
        random.seed(0)
        return super().__getitem__(index)


@pytest.mark.parametrize("way", QUIET)
def test_a_dataset_that_seeds_by_a_fixed_number_is_told_of(
    caplog: pytest.LogCaptureFixture, way: str
) -> None:
    (line,) = said(caplog, loader_of(Fixed(), **QUIET[way]))
    assert line.startswith("each sample draws the same random numbers from random")


class Owns(Draws):
    def __init__(self) -> None:
        self.rng = random.Random(3)

    def __getitem__(self, index: int) -> torch.Tensor:
        return super().__getitem__(index) + self.rng.random()


def test_a_generator_that_a_dataset_owns_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    loader = loader_of(Owns())
    (line,) = said(caplog, loader)
    assert line == (
        "seed= does not reach dataset.rng: what is drawn from there depends "
        "on the worker, and on what it drew before. Draw from safeloader.sample_rng() in "
        "__getitem__ instead, which gives each sample a generator of its own"
    )
    assert said(caplog, loader) == []
    assert said(caplog, loader_of(Owns(), seed=None, shuffle=False), 0) == []


# ── the same sample again ────────────────────────────────────────────────────────────────────────


@per_each
@with_workers
@pytest.mark.parametrize("dataset", [Draws, AtOnce])
def test_a_delivered_sample_is_made_again_bit_for_bit(
    per: str, workers: int, dataset: Any, caplog: pytest.LogCaptureFixture
) -> None:
    if dataset is AtOnce and per == "sample":
        with pytest.raises(ValueError, match="AtOnce makes"):
            loader_of(AtOnce())
        return
    loader = loader_of(dataset(), seed_per=per, num_workers=workers)
    loader.set_epoch(5)
    came = [(loader.last_batch, batch) for _ in range(2) for batch in loader]
    seed_all(3)
    before = rng_state()
    for record, batch in came:
        for position, index in enumerate(record.indices):
            expected = plain(batch[position])
            assert plain(loader.replay(record, position=position)) == expected
            assert plain(loader.replay(index, epoch=record.epoch)) == expected
    assert rng_state() == before
    assert caplog.records == []


@per_each
def test_a_delivered_sample_of_a_batch_with_gaps_is_made_again(
    per: str, caplog: pytest.LogCaptureFixture
) -> None:
    for on_error in ("skip", "replace"):
        loader = loader_of(Fails(once=False), on_error=on_error, seed_per=per, num_workers=2)
        came = [(loader.last_batch, batch) for batch in loader]
        caplog.clear()
        for record, batch in came:
            for position in range(len(record.indices)):
                again = loader.replay(record, position=position)
                assert plain(again) == plain(batch[position])
        assert caplog.records == []


@per_each
@with_workers
def test_a_failure_is_repeated_with_its_numbers(
    per: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    loader = loader_of(Fails(once=False), seed_per=per, num_workers=workers)
    with pytest.raises(SampleError) as caught:
        list(loader)
    failure = pickle.loads(pickle.dumps(caught.value.failure))
    with pytest.raises(OSError, match="0") as again:
        safeloader.replay(failure, loader.dataset)
    assert str(again.value) == failure.message
    assert caplog.records == []


class Counts(Fails):
    asked = 0

    def __getitem__(self, index: int) -> torch.Tensor:
        self.asked += 1
        return super().__getitem__(index)


def test_a_failure_is_repeated_without_the_samples_before_it() -> None:
    loader = loader_of(Counts(once=False), batch_size=N, shuffle=False)
    with pytest.raises(SampleError) as caught:
        list(loader)
    loader.dataset.asked = 0
    with pytest.raises(OSError, match="13"):
        loader.replay(caught.value)
    assert loader.dataset.asked == 1


class KillsLate(Draws):
    def __getitem__(self, index: int) -> torch.Tensor:
        sample = super().__getitem__(index)
        if index == 13 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return sample


def test_what_killed_its_worker_is_made_again_with_its_numbers() -> None:
    loader = loader_of(KillsLate(), num_workers=2)
    with pytest.raises(WorkerCrashError) as caught:
        list(loader)
    (expected,) = {plain(row) for batch in loader_of() for row in batch if row[0] == 13}
    assert plain(loader.replay(caught.value)) == expected


def test_threads_of_the_program_may_draw_meanwhile() -> None:
    """They see numbers of no use to them, and harm no batch of a worker."""
    stop = threading.Event()

    def draws() -> None:
        while not stop.is_set():
            torch.rand(1)

    expected = epochs(loader_of(num_workers=1))
    thread = threading.Thread(target=draws)
    thread.start()
    try:
        assert epochs(loader_of(num_workers=1)) == expected
    finally:
        stop.set()
        thread.join()


# ── edges ────────────────────────────────────────────────────────────────────────────────────────


@per_each
def test_without_batching_a_delivered_sample_is_made_again(
    per: str, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"batch_size": None, "collate_fn": None, "seed_per": per}
    for dataset in (Draws(), AtOnce()):
        loader = loader_of(dataset, **more)
        for sample in loader:
            assert plain(loader.replay(loader.last_batch, position=0)) == plain(sample)
    assert caplog.records == []


def test_what_was_drawn_as_one_list_is_called_with_a_word_on_its_numbers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Lists(Draws):
        def __getitem__(self, index: Any) -> torch.Tensor:
            each = index if isinstance(index, list) else [index]
            return torch.tensor([[at, *numbers()] for at in each])

    more = {"batch_size": None, "collate_fn": None, "sampler": BatchSampler(range(6), 3, False)}
    expected = epochs(loader_of(Lists(), **more))
    loader = loader_of(Lists(), num_workers=2, **more)
    assert epochs(loader) == expected
    loader.replay(loader.last_batch, position=1)
    assert "called without the random numbers that it had" in caplog.text


class Refuses(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[float]:
        raise OSError(f"no stream: {random.random()}")


def test_a_stream_that_cannot_be_begun_says_so_and_moves_nothing() -> None:
    told = []
    for workers in (0, 1):
        seed_all(3)
        torch.empty((), dtype=torch.int64).random_()  # the base seed
        expected = rng_state()
        seed_all(3)
        with pytest.raises(OSError, match="no stream") as caught:
            list(loader_of(Refuses(), num_workers=workers))
        told += re.findall(r"no stream: (0\.\d+)", str(caught.value))[-1:]
        assert rng_state() == expected
    assert len(told) == 2
    assert told[0] == told[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_checks_see_samples_by_their_own_index(workers: int) -> None:
    seen: list[Any] = []
    loader = loader_of(validate=lambda sample, index: seen.append((index, int(sample[0]))))
    assert epochs(loader, 1) == epochs(loader_of(num_workers=workers), 1)
    assert [one for one, _ in seen] == [other for _, other in seen]


def test_a_torch_that_is_not_known_cannot_keep_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safeloader.loader, "why_unrecorded", lambda workers: "torch has moved")
    with pytest.raises(safeloader.SafeLoaderError, match=r"seed= was asked for.*has moved"):
        iter(loader_of())


def test_switched_off_a_seed_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELOADER", "off")

    def make(cls: Any, **keywords: Any) -> Any:
        return cls(AtOnce(), 4, shuffle=True, **keywords)

    assert observe(lambda *_, **__: None, lambda _: make(DataLoader)) == observe(  # type: ignore[arg-type]
        SafeDataLoader, lambda cls: make(cls, seed=3)
    )


def test_samples_of_a_global_batch_are_the_same_on_any_number_of_ranks() -> None:
    def batches(world: int, epoch: int) -> list[list[Any]]:
        """Of each global batch the rows of all ranks, in their order."""
        came: list[list[Any]] = []
        for rank in range(world):
            sampler = GlobalBatchSampler(N, 4, rank, world, seed=5)
            loader = loader_of(batch_sampler=sampler, batch_size=1, num_workers=rank % 2)
            loader.set_epoch(epoch)
            for k, batch in enumerate(loader):
                came += [[]] * (k == len(came))
                came[k] = came[k] + [plain(row) for row in batch[:-1]]
        return came

    alone = batches(1, 2)
    assert [len(each) for each in alone] == [4] * 5
    assert batches(2, 2) == batches(4, 2) == alone != batches(1, 3)


@pytest.mark.parametrize("dataset", [Draws, Stream])
def test_the_doctor_finds_nothing_wrong_with_a_sound_dataset(dataset: Any) -> None:
    loader = loader_of(dataset(), num_workers=1, worker_init_fn=_sets_nothing)
    examined = safeloader.doctor(loader, seconds=10)
    assert [str(each) for each in examined.findings if "sample_rng" in str(each)] == []
    assert examined.ok, str(examined)


def _sets_nothing(worker: int) -> None:
    assert worker in range(32)
