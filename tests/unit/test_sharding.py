"""What one rank's own sampler says of all ranks; and that what is not drawn here is no fault."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from safeloader import GlobalBatchSampler, Recorder, SafeDataLoader, instrument
from safeloader.introspect.ranks import Place, place
from safeloader.introspect.shard import Shard
from safeloader.introspect.sharding import shard_of

SEVEN = list(range(7))


class BatchSamplerShard(BatchSampler):
    """With the attributes of Accelerate's."""

    def __init__(
        self,
        batch_sampler: Any,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
        even_batches: bool = True,
    ) -> None:
        self.batch_sampler: Any = batch_sampler
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        self.even_batches = even_batches
        self.batch_size = getattr(batch_sampler, "batch_size", None)  # type: ignore[assignment]
        self.drop_last = getattr(batch_sampler, "drop_last", False)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(list(self.batch_sampler)[self.process_index :: self.num_processes])


class Foreign:
    """A sampler of somebody's, whose properties must not be asked."""

    def __init__(self) -> None:
        self.num_replicas = 3
        self.rank = 2

    @property
    def epoch(self) -> int:
        raise AssertionError("a property was asked")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for")

    def __len__(self) -> int:
        raise AssertionError("the length was asked")

    def __iter__(self) -> Iterator[int]:
        return iter([2, 5])


class CountsOnly:
    def __init__(self) -> None:
        self.asked = 0

    def __len__(self) -> int:
        self.asked += 1
        return 7

    def __getitem__(self, index: int) -> int:
        return index


def shares(sampler: Any) -> tuple[Any, ...] | None:
    shard = shard_of(sampler)
    return shard and (shard.rank, shard.replicas, shard.padding, shard.left_out, shard.epoch)


# ── reading a sampler ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (1, 3, 2, 0, 0)),
        ({"shuffle": False}, (1, 3, 2, 0, None)),
        ({"drop_last": True}, (1, 3, 0, 1, 0)),
        ({"num_replicas": 7}, (1, 7, 0, 0, 0)),
    ],
)
def test_a_distributed_sampler_tells_its_share(options: Any, expected: Any) -> None:
    sampler = DistributedSampler(SEVEN, **{"num_replicas": 3, "rank": 1} | options)
    assert shares(sampler) == expected
    assert shares(BatchSampler(sampler, 2, drop_last=False)) == expected
    sampler.set_epoch(4)
    assert shares(sampler) == (*expected[:-1], None if expected[-1] is None else 4)


def test_a_foreign_sampler_is_read_and_not_asked() -> None:
    assert shares(Foreign()) == (2, 3, 0, 0, None)


@pytest.mark.lightning
def test_samplers_of_lightning_look_alike() -> None:
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
    from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler

    three: dict[str, Any] = {"num_replicas": 3, "rank": 1}
    wrapped = DistributedSamplerWrapper(RandomSampler(SEVEN), **three)
    assert shares(wrapped) == (1, 3, 2, 0, 0)
    assert shares(UnrepeatedDistributedSampler(SEVEN, **three)) == (1, 3, 0, 0, 0)
    wrapped = DistributedSamplerWrapper(SubsetRandomSampler([4, 5]), **three)
    assert shares(wrapped) == (1, 3, 1, 0, 0)


@pytest.mark.parametrize(
    ("options", "padding"),
    [
        ({}, 5),  # 7 in batches of 2 on 3 ranks: two rounds of 6
        ({"split_batches": True}, 1),
        ({"even_batches": False}, 0),
        ({"drop_last": True}, 0),
    ],
)
def test_batches_dealt_out_as_accelerate_does(options: Any, padding: int) -> None:
    inner = BatchSampler(SequentialSampler(SEVEN), 2, drop_last=options.pop("drop_last", False))
    sampler = BatchSamplerShard(inner, 3, 1, **options)
    assert shares(sampler) == (1, 3, padding, 0, None)


@pytest.mark.parametrize(
    "sampler",
    [
        RandomSampler(SEVEN),
        BatchSampler(RandomSampler(SEVEN), 2, drop_last=True),
        [1, 2],
        None,
    ],
)
def test_other_samplers_say_nothing_of_shares(sampler: Any) -> None:
    assert shard_of(sampler) is None


@pytest.mark.parametrize("rank", [3, -1, True, "1", None])
def test_what_is_no_rank_is_none(rank: Any) -> None:
    sampler = Foreign()
    sampler.rank = rank
    assert shard_of(sampler) is None


def test_the_length_of_the_loaders_dataset_is_not_asked_again() -> None:
    dataset = CountsOnly()
    sampler = DistributedSampler(dataset, num_replicas=3, rank=0)  # type: ignore[arg-type]
    asked = dataset.asked
    assert shard_of(sampler) == Shard(0, 3, None, 9, 0, "DistributedSampler")
    assert shard_of(sampler, dataset, 7) == Shard(0, 3, 7, 9, 0, "DistributedSampler")
    assert dataset.asked == asked


# ── where a process stands ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("rank", "world", "expected", "shown"),
    [
        (None, None, Place(1, 4), "rank 1 of 4"),
        ("2", "8", Place(2, 8), "rank 2 of 8"),
        ("2", None, Place(2, None), "rank 2"),
        ("0", "1", Place(0, 1), ""),
        ("two", "8", Place(1, 4), "rank 1 of 4"),
    ],
)
def test_the_launcher_is_asked_before_the_sampler(
    rank: Any, world: Any, expected: Place, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    found = place(Shard(1, 4))
    assert (found, str(found)) == (expected, shown)


# ── what the audit makes of it ───────────────────────────────────────────────────────────────────


def epochs(loader: Any, number: int, tell: Any = None) -> Any:
    for epoch in range(number):
        if tell is not None:
            tell(epoch)
        for _ in loader:
            pass
    return loader.audit


@pytest.mark.parametrize("workers", [0, 2])
def test_indices_of_other_ranks_are_not_called_never_drawn(workers: int) -> None:
    sampler = DistributedSampler(SEVEN, num_replicas=3, rank=1, shuffle=False)
    loader = SafeDataLoader(SEVEN, batch_size=2, sampler=sampler, num_workers=workers)
    audit = epochs(loader, 1)
    assert str(audit).split("\n") == [
        "epoch 0, rank 1 of 3: complete, ok; 3 drawn, 3 delivered",
        "  for other ranks: 4 indices, which cannot be checked from here",
        "  padding: 2 indices are drawn twice over all ranks, so that each has as many; an "
        "evaluation counts them twice",
    ]
    assert (audit.unvisited.size, audit.counts["unvisited"], audit.elsewhere) == (0, 0, 4)
    told = json.loads(json.dumps(audit.to_dict()))
    names = ("rank", "world_size", "shard", "padding", "elsewhere")
    assert [told[name] for name in names] == [1, 3, [1, 3], 2, 4]


def test_one_process_alone_still_hears_of_what_it_never_drew() -> None:
    audit = epochs(SafeDataLoader(SEVEN, sampler=[0, 1, 2]), 1)
    assert (audit.rank, audit.shard, audit.elsewhere) == (None, None, 0)
    assert "unvisited: 4, never drawn: 3, 4, 5, 6" in str(audit)


def test_a_share_that_is_not_numbered_as_the_ranks_is_told_beside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    sampler = DistributedSampler(SEVEN, num_replicas=2, rank=1)
    audit = epochs(SafeDataLoader(SEVEN, sampler=sampler), 1)
    assert (audit.rank, audit.world_size, audit.shard) == (5, 8, (1, 2))
    assert "checked from here (this is share 1 of 2)" in str(audit)


def test_failures_and_log_lines_have_the_rank(caplog: pytest.LogCaptureFixture) -> None:
    sampler = DistributedSampler(SEVEN, num_replicas=3, rank=1, shuffle=False)
    loader = SafeDataLoader([*range(4), "x", 5, 6], sampler=sampler, collate_fn=lambda s: s[0] + 1)
    with pytest.raises(TypeError) as caught:
        list(loader)
    assert caught.value.failure.rank == 1  # type: ignore[attr-defined]
    assert "rank 1)" in str(caught.value)
    SafeDataLoader.__iter__(loader)
    with caplog.at_level(logging.INFO, logger="safeloader"):
        loader.trace, loader.collate_fn = True, list
        list(loader)
    lines = [each.getMessage() for each in caplog.records]
    assert lines
    assert all(line.startswith("SafeDataLoader over list (7), rank 1: ") for line in lines)


# ── shared out twice ─────────────────────────────────────────────────────────────────────────────


class SkipBatchSampler(BatchSampler):
    """With the attributes of Accelerate's."""

    def __init__(self, batch_sampler: Any, skip_batches: int = 0) -> None:
        self.batch_sampler = batch_sampler
        self.skip_batches = skip_batches

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self.batch_sampler, self.skip_batches, None)


def distributed(world: int) -> Any:
    sampler = DistributedSampler(SEVEN, num_replicas=world, rank=0)
    return BatchSampler(sampler, 1, drop_last=False)


@pytest.mark.parametrize(
    ("inner", "kind"),
    [
        (distributed(2), "DistributedSampler"),
        (GlobalBatchSampler(7, 2, 0, 2), "GlobalBatchSampler"),
    ],
)
@pytest.mark.parametrize("skips", [False, True])
def test_a_share_that_accelerate_shares_out_is_told_once(
    inner: Any, kind: str, skips: bool, caplog: pytest.LogCaptureFixture
) -> None:
    sampler: Any = BatchSamplerShard(inner, 2, 0)
    sampler = SkipBatchSampler(sampler) if skips else sampler
    loader = instrument(DataLoader(SEVEN, batch_sampler=sampler))
    audit = epochs(loader, 2, inner.sampler.set_epoch)
    (note,) = audit.notes
    assert note.startswith(
        "the indices are shared out twice: BatchSamplerShard deals out to 2 ranks what is the "
        f"share of one rank of 2 already, by {kind}, so that about one index in 2 is drawn"
    )
    lines = [each.getMessage() for each in caplog.records if "twice" in each.getMessage()]
    assert [line.partition("epoch ")[2] for line in lines] == [f"0: {note}"]


@pytest.mark.parametrize(
    "sampler",
    [
        BatchSamplerShard(distributed(1), 2, 0),
        BatchSamplerShard(distributed(2), 1, 0),
        BatchSamplerShard(GlobalBatchSampler(7, 2, 0, 1), 2, 0),
        BatchSamplerShard(BatchSampler(RandomSampler(SEVEN), 2, drop_last=False), 2, 0),
        SkipBatchSampler(distributed(2)),
        SkipBatchSampler(GlobalBatchSampler(7, 2, 0, 2)),
        GlobalBatchSampler(7, 2, 0, 2),
        distributed(2),
    ],
)
def test_what_is_shared_out_once_is_not_spoken_of(sampler: Any) -> None:
    loader = SafeDataLoader(SEVEN, batch_sampler=sampler)
    assert epochs(loader, 1).notes == ()


def test_attributes_of_a_foreign_sampler_are_no_proof_of_sharing_out() -> None:
    """It may hold them for its length, and leave the sharing to the sampler in it."""
    foreign = Foreign()
    foreign.sampler = distributed(3)  # type: ignore[attr-defined]
    assert epochs(SafeDataLoader(SEVEN, sampler=foreign), 1).notes == ()


# ── set_epoch ────────────────────────────────────────────────────────────────────────────────────


def told_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if "set_epoch" in each.getMessage()]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sampler_whose_set_epoch_is_never_called_is_told_once(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = DistributedSampler(SEVEN, num_replicas=2, rank=1)
    loader = SafeDataLoader(SEVEN, batch_size=2, sampler=sampler, num_workers=workers)
    assert not epochs(loader, 1).notes
    assert told_of(caplog) == []
    (note,) = epochs(loader, 1).notes
    assert "the epoch of DistributedSampler(shuffle=True) is 0 still" in note
    epochs(loader, 2)
    (line,) = told_of(caplog)
    assert line == f"SafeDataLoader over list (7), rank 1: epoch 1: {note}"
    assert loader.audit.notes == ()


def test_it_is_told_of_loaders_that_a_framework_makes_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder, sampler = Recorder(), DistributedSampler(SEVEN, num_replicas=2, rank=1)
    for _ in range(3):
        loader = instrument(DataLoader(SEVEN, 2, sampler=sampler), recorder=recorder)
        list(loader)
    assert len(told_of(caplog)) == 1


class OrdersItself(DistributedSampler):  # type: ignore[type-arg]
    """Draws from somewhere else than its epoch."""

    times = 0

    def __iter__(self) -> Iterator[int]:
        self.times += 1
        return iter([(k + self.times) % 7 for k in range(3)])


def test_nothing_is_told_where_the_order_changes_or_should_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    two: dict[str, Any] = {"num_replicas": 2, "rank": 1}
    called = DistributedSampler(SEVEN, **two)
    epochs(SafeDataLoader(SEVEN, 2, sampler=called), 3, called.set_epoch)
    epochs(SafeDataLoader(SEVEN, 2, sampler=DistributedSampler(SEVEN, shuffle=False, **two)), 3)
    epochs(SafeDataLoader(SEVEN, 2, sampler=OrdersItself(SEVEN, **two)), 3)
    epochs(SafeDataLoader(SEVEN, 2, shuffle=True), 3)
    peeked = DistributedSampler(SEVEN, **two)
    loader = SafeDataLoader(SEVEN, 2, sampler=peeked)
    next(iter(loader))  # a look at a first batch is no epoch
    epochs(loader, 2, peeked.set_epoch)
    assert told_of(caplog) == []
