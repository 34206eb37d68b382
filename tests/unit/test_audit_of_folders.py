"""The audit of a run's folder: the judgement and the words are those of ranks that live."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DistributedSampler, IterableDataset, WeightedRandomSampler

pytest.importorskip("pyarrow", reason="the run's batches are kept with pyarrow")
pytest.importorskip("typer")
pytest.importorskip("rich")

from safeloader import GlobalBatchSampler, SafeStatefulDataLoader, __main__, merge_audits
from safeloader.report.exactly_once import EpochVerdict, exactly_once
from safeloader.report.run import RunFolder
from tests.run_folders import (
    Numbers,
    by_ranks,
    killed,
    loader_of,
    new_process,
    of_job,
    share,
    stateful,
)

Audited = Callable[..., tuple[int, dict[str, Any]]]
WORLD = 3


pytestmark = pytest.mark.usefixtures("of_new_processes")


@pytest.fixture
def audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Audited:
    """``audit RUN --json``: the exit status, and what it says of the last epoch."""

    def said(*more: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        status = __main__.main(["audit", str(tmp_path), "--json", *more])
        return status, json.loads(capsys.readouterr().out)["epochs"][-1]

    return said


def epoch_of(run: Path) -> EpochVerdict:
    (found,) = exactly_once(RunFolder(run)).epochs
    return found


class Twice(DistributedSampler[int]):
    """Draws its first index once more, where its second is due."""

    def __iter__(self) -> Iterator[int]:
        first, _, *rest = super().__iter__()
        return iter([first, first, *rest])


class Keyed(IterableDataset[int]):
    def __init__(self, numbers: range) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)


# ── one truth ────────────────────────────────────────────────────────────────────────────────────

KINDS: dict[str, Callable[[Any, int], Any]] = {
    "padding": lambda data, rank: {"sampler": share(data, rank, WORLD)},
    "drop_last": lambda data, rank: {
        "sampler": share(data, rank, WORLD, drop_last=True),
        "drop_last": True,
    },
    "no sampler": lambda data, rank: {"shuffle": False},
    "real repeats beside padding": lambda data, rank: {
        "sampler": Twice(data, num_replicas=WORLD, rank=rank, shuffle=False)
    },
    "with replacement": lambda data, rank: {
        "sampler": WeightedRandomSampler(
            torch.ones(20), 8, generator=torch.Generator().manual_seed(rank)
        )
    },
    "skips": lambda data, rank: {"sampler": share(data, rank, WORLD), "on_error": "skip"},
    "a sampler of one's own": lambda data, rank: {"sampler": range(rank, 18, WORLD)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_says_what_the_ranks_said_while_they_lived(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = []

    def train(rank: int) -> None:
        data = Numbers(20, bad=(7, 11) if kind == "skips" else ())
        loader = loader_of(data, tmp_path, **KINDS[kind](data, rank))
        list(loader)
        parts.append(loader.audit_part())

    by_ranks(monkeypatch, WORLD, train)
    live, found = merge_audits(parts), epoch_of(tmp_path)
    assert found.answer == live.answer
    assert (found.ok, found.evidence, found.next_step) == (live.ok, live.evidence, live.next_step)
    assert (found.counts["padding"], found.counts["twice"], found.counts["never"]) == (
        *(live.counts[name] for name in ("padding", "twice", "never")),
    )


def test_padding_is_told_apart_from_real_repeats(
    tmp_path: Path, audit: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(rank: int) -> None:
        data = Numbers(20)
        sampler = Twice(data, num_replicas=WORLD, rank=rank, shuffle=False)
        list(loader_of(data, tmp_path, sampler=sampler))

    by_ranks(monkeypatch, WORLD, train)
    status, epoch = audit()
    assert (status, epoch["ok"], epoch["exact"]) == (1, False, True)
    assert "3 of 20 indices came more than once" in epoch["answer"]
    assert epoch["never"] == [3, 4, 5]  # in the place of which those came again
    assert epoch["by_rank"] == {"0": [0, 0, 2], "1": [1, 1], "2": [2, 2]}


def test_streams_with_keys_are_compared_by_these(
    tmp_path: Path, audit: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_ranks(monkeypatch, WORLD, lambda rank: list(loader_of(Keyed(range(30)), tmp_path, key=int)))
    status, epoch = audit()
    assert (status, epoch["ok"]) == (1, False)
    assert "ranks 0 to 2 handed over the very same samples" in epoch["answer"]


# ── resumes ──────────────────────────────────────────────────────────────────────────────────────


def global_loader(run: Path, size: int = 96) -> SafeStatefulDataLoader[Any]:
    sampler = GlobalBatchSampler(size, 8, seed=3)
    return SafeStatefulDataLoader(Numbers(size), batch_sampler=sampler, run_dir=run)


def state_after(loader: Any, batch: int, then: int) -> dict[str, Any]:
    """The state after a batch; the loop goes on until another, and is left."""
    state: dict[str, Any] = {}
    for number, _ in enumerate(loader):
        if number == batch:
            state = loader.state_dict()
        if number == then:
            break
    return state


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (1, 4), (4, 1)])
def test_an_epoch_that_went_on_on_another_number_of_ranks(
    before: int, after: int, tmp_path: Path, audit: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    by_ranks(
        monkeypatch, before, lambda rank: states.append(state_after(global_loader(tmp_path), 4, 6))
    )

    def go_on(rank: int) -> None:
        loader = global_loader(tmp_path)
        loader.load_state_dict(states[0])
        list(loader)

    by_ranks(monkeypatch, after, go_on, attempt=1)
    status, epoch = audit()
    assert (status, epoch["ok"], epoch["exact"]) == (0, True, True)
    assert "(attempts 0 and 1)" in epoch["answer"]
    assert "each of 96 indices came once" in epoch["answer"]
    assert (epoch["delivered"], epoch["counts"]["again"]) == (96, 2 * before)
    assert epoch["ranks"] == [*range(after)]


def test_a_rank_that_is_missing_after_the_resume_is_not_known_and_nothing_is_lost(
    tmp_path: Path, audit: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    by_ranks(monkeypatch, 4, lambda rank: states.append(state_after(global_loader(tmp_path), 4, 4)))

    def go_on(rank: int) -> None:
        loader = global_loader(tmp_path)
        loader.load_state_dict(states[0])
        if rank == 0:
            list(loader)

    by_ranks(monkeypatch, 2, go_on, attempt=1)
    status, epoch = audit()
    assert (status, epoch["ok"], epoch["never"]) == (1, None, [])
    assert "cannot be told: rank 1 did not come" in epoch["answer"]
    assert "came on no rank" not in epoch["answer"]


def test_two_attempts_from_one_state_are_one_epoch(
    tmp_path: Path, audit: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_process(monkeypatch, **of_job(0))
    data, states = Numbers(40), list[dict[str, Any]]()
    loader = stateful(data, tmp_path)
    for number, _ in enumerate(loader):
        if number in (2, 4):
            states.append(loader.state_dict())
        if number == 6:
            break
    del loader
    for attempt, (state, batches) in enumerate([(states[1], 2), (states[0], 100)], start=1):
        new_process(monkeypatch, **of_job(attempt))
        loader = stateful(data, tmp_path)
        loader.load_state_dict(state)
        for number, _ in enumerate(loader):
            if number == batches:
                break
        del loader
    new_process(monkeypatch)
    status, epoch = audit()
    assert (status, epoch["attempts"], epoch["delivered"]) == (0, [0, 1, 2], 40)
    assert "each of 40 indices came once" in epoch["answer"]


def test_a_state_of_another_run_says_which(
    tmp_path: Path, audit: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_process(monkeypatch, SAFELOADER_RUN_ID="first")
    state = state_after(stateful(Numbers(40), tmp_path / "other"), 3, 3)
    assert state["origin"]["run"] == "first"
    new_process(monkeypatch, SAFELOADER_RUN_ID="second")
    loader = stateful(Numbers(40), tmp_path)
    loader.load_state_dict(json.loads(json.dumps(state)))
    list(loader)
    new_process(monkeypatch)
    status, epoch = audit()
    assert (status, epoch["ok"], epoch["never"]) == (1, None, [])
    assert "at batch 4 with an epoch that is not in this run, but in run first" in epoch["answer"]


def test_a_state_that_was_saved_where_no_run_was_written(
    tmp_path: Path, audit: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_after(SafeStatefulDataLoader(Numbers(40), 4, shuffle=True), 3, 3)
    assert "origin" not in state
    loader = stateful(Numbers(40), tmp_path)
    loader.load_state_dict(state)
    list(loader)
    new_process(monkeypatch)
    status, epoch = audit()
    assert (status, epoch["ok"]) == (1, None)
    assert "the state was saved where no run was written" in epoch["answer"]


def test_what_was_left_out_before_a_resume_is_told() -> None:
    data = Numbers(40, bad=(3, 8))
    state = state_after(SafeStatefulDataLoader(data, 4, on_error="skip"), 3, 3)
    loader = SafeStatefulDataLoader(data, 4, on_error="skip")
    loader.load_state_dict(state)
    list(loader)
    audit = merge_audits([loader.audit_part()])
    assert audit.ok
    assert audit.answer.endswith("came once; of these 2 were left out before it went on")
    assert "left out before the epoch went on: 2 by rank 0, by the state" in str(audit)


def test_in_a_folder_the_attempt_before_says_which_these_were(
    tmp_path: Path, audit: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_process(monkeypatch, **of_job(0))
    data = Numbers(40, bad=(3, 8))

    def loader() -> Any:
        return SafeStatefulDataLoader(data, 4, on_error="skip", run_dir=tmp_path)

    state = state_after(loader(), 3, 3)
    new_process(monkeypatch, **of_job(1))
    again = loader()
    again.load_state_dict(state)
    list(again)
    del again
    new_process(monkeypatch)
    status, epoch = audit()
    assert status == 0
    assert "each of 40 indices came but 2, left out as was asked for" in epoch["answer"]
    assert "never: 2 skipped by rank 0: 3, 8" in epoch["evidence"]


# ── what the folder does not hold any more ───────────────────────────────────────────────────────

MANY = 300_000  # of which a bound of 1 MiB keeps less than half


class Many:
    """Batches at once."""

    def __len__(self) -> int:
        return MANY

    def __getitem__(self, index: int) -> int:
        return index

    def __getitems__(self, indices: list[int]) -> list[int]:
        return indices


def bounded(run: Path, rank: int = 0, world: int = 2, **more: Any) -> Any:
    more = {"sampler": share(Many(), rank, world)} | more
    return loader_of(Many(), run, 1000, run_max_bytes=1 << 20, collate_fn=len, **more)


def test_rows_that_were_dropped_are_stood_for_by_the_sums_of_each_rank(
    tmp_path: Path, audit: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_ranks(monkeypatch, 2, lambda rank: list(bounded(tmp_path, rank)))
    assert RunFolder(tmp_path).dropped()
    status, epoch = audit()
    assert (status, epoch["ok"], epoch["exact"]) == (0, True, True)
    assert "epoch 0 of 2 ranks: ok, each of 300000 indices came once" in epoch["answer"]
    assert any("went for run_max_bytes=: what is told is by" in each for each in epoch["evidence"])


def test_by_sums_a_real_repeat_is_seen_and_the_rest_is_told_in_ranges(
    tmp_path: Path, audit: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = [range(0, MANY, 2), [*range(1, MANY - 4000, 2), *range(0, 4000, 2)]]
    by_ranks(monkeypatch, 2, lambda rank: list(bounded(tmp_path, rank, sampler=shares[rank])))
    status, epoch = audit()
    assert (status, epoch["ok"], epoch["exact"]) == (1, False, False)
    assert "at least" in epoch["answer"]
    assert all("at least" in each for each in epoch["ranges"])
    assert set(epoch["by_rank"]) == set()


def test_of_an_epoch_that_was_killed_what_was_dropped_is_not_known_and_not_lost(
    tmp_path: Path, audit: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    def train() -> None:
        held.append(iter(bounded(tmp_path, world=1, sampler=None)))
        for _ in range(290):
            next(held[0])

    killed(monkeypatch, train, **of_job(0))
    assert RunFolder(tmp_path).dropped()
    status, epoch = audit()
    assert (status, epoch["ok"], epoch["never"], epoch["state"]) == (1, None, [], "cut off")
    assert "went for run_max_bytes=, and no sums of them were written" in epoch["answer"]
    assert "came on no rank" not in epoch["answer"]


def test_a_resume_whose_first_part_was_dropped(
    tmp_path: Path, audit: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loader() -> Any:
        sampler = GlobalBatchSampler(MANY, 1000, seed=1)
        return SafeStatefulDataLoader(
            *(Many(),),
            batch_sampler=sampler,
            collate_fn=len,
            run_dir=tmp_path,
            run_max_bytes=1 << 20,
        )

    states = []
    by_ranks(monkeypatch, 1, lambda rank: states.append(state_after(loader(), 280, 280)))
    assert RunFolder(tmp_path).dropped()

    def go_on(rank: int) -> None:
        later = loader()
        later.load_state_dict(states[0])
        list(later)

    by_ranks(monkeypatch, 2, go_on, attempt=1)
    status, epoch = audit()
    assert (status, epoch["ok"]) == (0, True)
    assert "each of 300000 indices came once" in epoch["answer"]
    assert "of rank 0 batches of this epoch went for run_max_bytes=" in epoch["evidence"][1]


def four_go_on_as_two(run: Path, monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """An epoch of four ranks, of which two go on after so many batches."""
    states: list[Any] = []
    by_ranks(monkeypatch, 4, lambda _: states.append(state_after(global_loader(run), 4, batches)))

    def go_on(_: int) -> None:
        loader = global_loader(run)
        loader.load_state_dict(states[0])
        list(loader)

    by_ranks(monkeypatch, 2, go_on, attempt=1)


@pytest.mark.parametrize("what", ["torn", "without a rank"])
def test_what_is_torn_or_not_there_of_the_attempt_before_is_not_lost(
    what: str, tmp_path: Path, audit: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    four_go_on_as_two(tmp_path, monkeypatch, 4)
    if what == "torn":
        (path,) = tmp_path.glob("attempt=0/rank=3/*/batches-000.parquet")
        path.unlink()
        said = "rank 3 handed over 5 batches, and 0 are in the folder"
    else:
        shutil.rmtree(tmp_path / "attempt=0" / "rank=3")
        said = "of attempt 0 1 of 4 ranks are not in the folder"
    status, epoch = audit()
    assert (status, epoch["ok"], epoch["never"]) == (0, True, [])  # by the sums of attempt 1
    assert said in epoch["evidence"][1]
    as_before(tmp_path)  # and without these
    status, epoch = audit()
    assert (status, epoch["ok"], epoch["never"]) == (1, None, [])
    assert said in epoch["answer"]


# ── folders of before ────────────────────────────────────────────────────────────────────────────


def as_before(run: Path) -> None:
    """The folder as it was written before samplers, states and sums stood in it."""
    for path in run.rglob("epochs.jsonl"):
        lines = []
        for line in map(json.loads, path.read_text().splitlines()):
            if "resumed" in line:
                continue
            lines.append({k: v for k, v in line.items() if k not in ("sampler", "part")})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("kind", "ok", "said"),
    [
        ("padding", True, "and 1 came twice as padding"),
        ("drop_last", True, "left out as was asked for"),
        ("no sampler", False, "20 of 20 indices came more than once"),
        ("real repeats beside padding", False, "3 of 20 indices came more than once"),
        ("with replacement", None, "draws with replacement"),
        ("skips", True, "left out as was asked for"),
        ("a sampler of one's own", None, "of which this folder says nothing, may leave them out"),
    ],
)
def test_a_folder_of_before_is_told_by_the_audits_in_it(
    kind: str, ok: bool | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(rank: int) -> None:
        data = Numbers(20, bad=(7, 11) if kind == "skips" else ())
        list(loader_of(data, tmp_path, **KINDS[kind](data, rank)))

    by_ranks(monkeypatch, WORLD, train)
    as_before(tmp_path)
    found = epoch_of(tmp_path)
    assert found.ok is ok
    assert said in found.answer


def test_in_a_folder_of_before_what_went_on_with_what_is_inferred(
    tmp_path: Path, audit: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    four_go_on_as_two(tmp_path, monkeypatch, 6)
    as_before(tmp_path)
    status, epoch = audit()
    assert (status, epoch["delivered"], epoch["attempts"]) == (0, 96, [0, 1])


def test_a_part_that_cannot_be_read_is_as_none(
    tmp_path: Path, audit: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(loader_of(Numbers(), tmp_path))
    new_process(monkeypatch)
    (path,) = tmp_path.rglob("epochs.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for damaged in ("no base64!", "AAAA", 7):
        lines[-1]["part"] = damaged
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        status, epoch = audit()
        assert (status, epoch["ok"]) == (0, True)
