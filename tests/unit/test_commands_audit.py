"""``python -m safeloader audit``: what is exactly once, what is not, and what cannot be told."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, SubsetRandomSampler, WeightedRandomSampler

pytest.importorskip("typer")
pytest.importorskip("rich")

from safeloader import __main__
from tests.run_folders import Numbers, by_ranks, loader_of, new_process, of_job, share, stateful

Said = Callable[..., tuple[int, str]]


pytestmark = pytest.mark.usefixtures("of_new_processes")


@pytest.fixture
def audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    def said(*more: str) -> tuple[int, str]:
        capsys.readouterr()
        status = __main__.main(["audit", str(tmp_path), *more])
        printed = capsys.readouterr()
        assert printed.err == ""
        return status, printed.out

    return said


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


class Anything(Numbers):
    def __getitem__(self, index: Any) -> int:
        return 1


FINE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shuffled": (
        lambda run: loader_of(Numbers(), run, shuffle=True),
        "each of 20 indices came once",
    ),
    "drop_last": (
        lambda run: loader_of(Numbers(18), run, drop_last=True),
        "never: 2 dropped by rank 0: 1",
    ),
    "skips": (
        lambda run: loader_of(Numbers(bad=(3, 8)), run, on_error="skip"),
        "never: 2 skipped by rank 0: 3, 8",
    ),
    "replaced": (
        lambda run: loader_of(Numbers(bad=(3, 8)), run, on_error="replace"),
        "never: 2 replaced by rank 0: 3, 8",
    ),
    "some drawn": (
        lambda run: loader_of(Numbers(), run, sampler=SubsetRandomSampler(range(5))),
        "; 15 not drawn by the sampler",
    ),
    "drawn again": (
        lambda run: loader_of(
            Numbers(), run, sampler=WeightedRandomSampler(torch.tensor([1.0, 0.0] * 10), 20)
        ),
        "and some again, as its sampler drew them",
    ),
    "texts": (
        lambda run: loader_of(Anything(3), run, sampler=["a", "b", "c"]),
        "it drew came, by its own",
    ),
    "a stream": (lambda run: loader_of(Stream(), run), "what it drew came, by its own audit"),
}


@pytest.mark.parametrize("kind", FINE)
def test_what_is_exactly_once(kind: str, tmp_path: Path, audit: Said) -> None:
    make, words = FINE[kind]
    list(make(tmp_path))
    status, said = audit()
    assert said.startswith("exactly once: yes, so far") or "yes, in the 1 epoch" in said
    assert words in said
    assert status == 0


def test_epochs_that_follow_each_other_and_are_alike_are_told_in_a_line(
    tmp_path: Path, audit: Said
) -> None:
    numbers = Numbers()
    training, validation = loader_of(numbers, tmp_path), loader_of(Anything(3), tmp_path)
    for epoch in range(9):
        numbers.bad = (9,) if epoch == 4 else ()
        with contextlib.suppress(ValueError):
            list(training)
        if epoch < 2:
            list(validation)
    status, said = audit()
    lines = said.splitlines()
    assert [line.strip() for line in lines if line.lstrip().startswith("epoch")] == [
        "epochs 0 to 3 of 1 rank, each: ok, each of 20 indices came once",
        lines[3].strip(),
        "epochs 5 to 8 of 1 rank, each: ok, each of 20 indices came once",
        "epoch 0 of 1 rank: ok, each of 3 indices came once",
        "epoch 1 of 1 rank: ok, each of 3 indices came once",
    ]
    assert "epoch 4 of 1 rank: NOT OK" in lines[3]
    assert status == 1


def test_the_epoch_that_still_runs_is_told_so_far(tmp_path: Path, audit: Said) -> None:
    loader = loader_of(Numbers(), tmp_path)
    list(loader)
    iterator = iter(loader)
    next(iterator)
    status, said = audit()
    assert said.startswith("exactly once: yes, in the 1 epoch that is over; 1 epoch still running")
    assert "epoch 1 of 1 rank: ok so far, 4 samples delivered" in said
    assert status == 0


def test_an_epoch_that_the_program_left_is_told_as_that(
    tmp_path: Path, audit: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, _ in enumerate(loader_of(Numbers(), tmp_path)):
        if number == 2:
            break
    new_process(monkeypatch)
    status, said = audit()
    assert "left early by the program after 3 batches, 12 samples delivered" in said
    assert status == 0


def test_a_batch_lost_with_its_error_is_not_exactly_once(tmp_path: Path, audit: Said) -> None:
    with pytest.raises(ValueError, match="bad file"):
        list(loader_of(Numbers(bad=(9,)), tmp_path))
    status, said = audit()
    assert said.startswith("exactly once: NO")
    assert "4 failed" in said
    assert said.rstrip().endswith("`index RUN N` tells of one index")
    assert status == 1


# ── ranks ────────────────────────────────────────────────────────────────────────────────────────

WORLD = 3


def on_ranks(
    monkeypatch: pytest.MonkeyPatch, run: Path, sampler: Callable[[Any, int], Any], size: int = 10
) -> None:
    def train(rank: int) -> None:
        data = Numbers(size)
        list(loader_of(data, run, 2, sampler=sampler(data, rank)))

    by_ranks(monkeypatch, WORLD, train)


def double(data: Any, rank: int) -> Any:
    once = list(share(data, rank, WORLD, shuffle=False))
    return [once[k] for k in share(once, rank, WORLD, shuffle=False)]


def other_epoch(data: Any, rank: int) -> Any:
    sampler = share(data, rank, WORLD)
    sampler.set_epoch(rank)
    return sampler


RANKS: dict[str, tuple[Callable[[Any, int], Any], int, str, str]] = {
    "padding": (lambda d, r: share(d, r, WORLD), 0, "2 came twice as padding", ""),
    "drop_last": (
        lambda d, r: share(d, r, WORLD, drop_last=True),
        *(0, "left out by drop_last of DistributedSampler", ""),
    ),
    "no sampler": (
        lambda d, r: None,
        *(1, "10 of 10 indices came more than once", "sampler=DistributedSampler("),
    ),
    "set_epoch differs": (other_epoch, 1, "came more than once", "call sampler.set_epoch(epoch)"),
    "double sharding": (double, 1, "came on no rank", ""),
}


@pytest.mark.parametrize("kind", RANKS)
def test_ranks(kind: str, tmp_path: Path, audit: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, expected, words, step = RANKS[kind]
    on_ranks(monkeypatch, tmp_path, sampler)
    status, said = audit()
    assert words in said
    assert step in said.splitlines()[-1]
    assert "3 ranks" in said
    assert status == expected


def test_which_ranks_gave_an_index_twice(
    tmp_path: Path, audit: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_ranks(monkeypatch, tmp_path, lambda data, rank: None, size=4)
    _, said = audit()
    assert "twice: 4: 0 (ranks 0 to 2), 1 (ranks 0 to 2)" in said
    status, printed = audit("--json")
    (epoch,) = json.loads(printed)["epochs"]
    assert (status, epoch["ok"], epoch["twice"], epoch["ranks"]) == (
        1,
        False,
        [*range(4)],
        [0, 1, 2],
    )


def test_a_rank_that_did_not_come(
    tmp_path: Path, audit: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(rank: int) -> None:
        data = Numbers(12)
        if rank != 1:
            list(loader_of(data, tmp_path, 2, sampler=share(data, rank, WORLD)))

    by_ranks(monkeypatch, WORLD, train)
    status, said = audit()
    assert said.startswith("exactly once: cannot be told of 1 of 1 epoch")
    assert "epoch 0 of 3 ranks: cannot be told: rank 1 did not come" in said
    assert status == 1


def test_rank_0_alone_may_validate(
    tmp_path: Path, audit: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_process(monkeypatch, **of_job(0, 0, WORLD))
    list(loader_of(Numbers(12), tmp_path))
    new_process(monkeypatch)
    status, said = audit()
    assert "epoch 0 of rank 0: ok, each of 12 indices came once" in said
    assert status == 0


def test_a_rank_that_stops_early(
    tmp_path: Path, audit: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(rank: int) -> None:
        data = Numbers(12)
        for _ in loader_of(data, tmp_path, 2, sampler=share(data, rank, WORLD)):
            if rank == 2:
                break

    by_ranks(monkeypatch, WORLD, train)
    status, said = audit()
    assert "rank 2 stopped early" in said
    assert status == 1


# ── resumes ──────────────────────────────────────────────────────────────────────────────────────


def test_an_epoch_that_a_later_attempt_went_on_with(
    tmp_path: Path, audit: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = tmp_path, Numbers(40)
    new_process(monkeypatch, **of_job(0))
    loader = stateful(data, run)
    for number, _ in enumerate(loader):
        if number == 3:
            state = loader.state_dict()
        if number == 5:
            break
    del loader
    new_process(monkeypatch, **of_job(1))
    loader = stateful(data, run)
    loader.load_state_dict(state)
    list(loader)
    new_process(monkeypatch)
    status, said = audit()
    assert "epoch 0 (attempts 0 and 1) of 1 rank: ok, each of 40 indices came once" in said
    assert "2 batches handed over after the state was saved came again" in said
    assert status == 0
    status, said = audit("--attempt", "1")
    assert "it went on at batch 4 with an epoch that is not of attempt 1" in said
    assert status == 1


# ── the folder ───────────────────────────────────────────────────────────────────────────────────


def test_without_the_indices_the_audit_of_one_rank_stands(
    tmp_path: Path, audit: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(loader_of(Numbers(), tmp_path))
    new_process(monkeypatch)
    (path,) = tmp_path.rglob("batches-*.parquet")
    path.unlink()
    status, printed = audit("--json")
    (epoch,) = json.loads(printed)["epochs"]
    assert status == 0
    assert epoch["ok"] is True
    assert epoch["evidence"][1] == (
        "rank 0 handed over 5 batches, and 0 are in the folder: what is told is by the sums that "
        "the ranks wrote themselves"
    )


def test_an_empty_run_is_no_yes(tmp_path: Path, audit: Said) -> None:
    iter(loader_of(Numbers(), tmp_path))
    status, said = audit()
    assert said.startswith("exactly once: nothing was handed over yet")
    assert status == 1


class OfAnyInt(Anything):
    """Its indices are ints that its length does not bound."""


def test_indices_beyond_the_length_of_the_dataset_are_counted_too(
    tmp_path: Path, audit: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [[5, 1 << 20, 1 << 40], [6, 1 << 20, 1 << 41, 1 << 40]]

    def train(rank: int) -> None:
        list(loader_of(OfAnyInt(3), tmp_path, 2, sampler=drawn[rank]))

    by_ranks(monkeypatch, 2, train)
    status, printed = audit("--json")
    (epoch,) = json.loads(printed)["epochs"]
    assert (status, epoch["twice"]) == (1, [1 << 20, 1 << 40])
    assert epoch["by_rank"] == {str(1 << 20): [0, 1], str(1 << 40): [0, 1]}
