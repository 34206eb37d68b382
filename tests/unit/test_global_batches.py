"""The ranks' shares are one global order, whatever the number of ranks."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import pickle
import random
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from safeloader import GlobalBatchSampler, SafeDataLoader, SamplerError
from safeloader.global_batches import _indivisible
from safeloader.introspect.shard import Shard
from safeloader.introspect.sharding import shard_of
from safeloader.main.drawing import length_is_true, proven_length

TAILS = ("drop", "pad", "uneven")
every_tail = pytest.mark.parametrize("tail", TAILS)


def divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def order_of(length: int, **named: Any) -> list[int]:
    """The order of all indices: a batch of one index each, on one rank."""
    return [index for (index,) in GlobalBatchSampler(length, 1, 0, 1, **named)]


def expected(order: list[int], size: int, tail: str) -> list[list[int]]:
    """The global batches of an order, as the docstring of the class says."""
    rest = len(order) % size
    if tail == "drop":
        order = order[: len(order) - rest]
    elif tail == "pad" and rest:
        order = list(itertools.islice(itertools.cycle(order), len(order) + size - rest))
    return [order[k : k + size] for k in range(0, len(order), size)]


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "length": draw(st.integers(0, 150)),
        "global_batch": draw(st.integers(1, 60)),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "tail": draw(st.sampled_from(TAILS)),
        "shuffle": draw(st.booleans()),
    }


@pytest.fixture(autouse=True)
def of_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


# ── which indices come ───────────────────────────────────────────────────────────────────────────


@given(plans(), st.integers(0, 2**40))
def test_every_number_of_ranks_has_the_same_global_batches(plan: Any, epoch: int) -> None:
    length, size, tail = plan["length"], plan["global_batch"], plan["tail"]
    one = GlobalBatchSampler(**plan, rank=0, world=1)
    one.set_epoch(epoch)
    order = [index for batch in expected([*range(length)], 1, "drop") for index in batch]
    if plan["shuffle"]:
        whole = GlobalBatchSampler(length, 1, 0, 1, plan["seed"])
        whole.set_epoch(epoch)
        order = [index for (index,) in whole]
    assert sorted(order) == list(range(length))
    batches = expected(order, size, tail)
    assert list(one) == batches
    assert one.global_batches == len(batches)
    assert [one.global_indices(k) for k in range(len(batches))] == batches
    for world in divisors(size):
        ranks = [GlobalBatchSampler(**plan, rank=k, world=world) for k in range(world)]
        for each in ranks:
            each.set_epoch(epoch)
        shares = [list(each) for each in ranks]
        assert [len(each) for each in ranks] == [len(share) for share in shares]
        assert all(batch for share in shares for batch in share)  # none is empty
        split = list(itertools.zip_longest(*shares, fillvalue=[]))
        assert [[*itertools.chain(*parts)] for parts in split] == batches
        for parts in split:
            sizes = [len(part) for part in parts]
            assert max(sizes) - min(sizes) <= (tail == "uneven")
            assert sizes == sorted(sizes, reverse=True)
        assert max(map(len, shares)) - min(map(len, shares)) <= (tail == "uneven")
        left_out = [index for each in ranks for index in each.dropped()]
        assert left_out == (order[length - length % size :] if tail == "drop" else [])
        assert [each.global_indices(k) for each in ranks for k in range(len(batches))] == (
            batches * world
        )


@given(plans(), st.data())
def test_an_epoch_can_be_begun_at_any_batch(plan: Any, data: st.DataObject) -> None:
    world = data.draw(st.sampled_from(divisors(plan["global_batch"])))
    sampler = GlobalBatchSampler(**plan, rank=data.draw(st.integers(0, world - 1)), world=world)
    epoch = data.draw(st.integers(0, 3))
    whole = list(sampler.batches(epoch))
    for start in range(len(whole) + 2):
        assert list(sampler.batches(epoch, start)) == whole[start:]
    assert sampler.epoch == 0
    sampler.set_epoch(epoch)
    assert list(sampler) == whole


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("drop", ([[0, 1], [4, 5]], [[2, 3], [6, 7]])),
        ("pad", ([[0, 1], [4, 5], [8, 0]], [[2, 3], [6, 7], [1, 2]])),
        ("uneven", ([[0, 1], [4, 5], [8]], [[2, 3], [6, 7]])),
    ],
)
def test_the_last_batch_by_example(tail: Any, expected: Any) -> None:
    ranks = [GlobalBatchSampler(9, 4, k, 2, tail=tail, shuffle=False) for k in range(2)]
    assert tuple(list(each) for each in ranks) == expected


@pytest.mark.parametrize(
    ("tail", "expected"),
    [("drop", []), ("pad", [[0, 1, 2, 0, 1, 2, 0, 1]]), ("uneven", [[0, 1, 2]])],
)
def test_fewer_indices_than_a_global_batch(tail: Any, expected: Any) -> None:
    assert list(GlobalBatchSampler(3, 8, tail=tail, shuffle=False)) == expected
    assert list(GlobalBatchSampler(0, 8, tail=tail)) == []


# ── the order ────────────────────────────────────────────────────────────────────────────────────


def test_the_order_is_part_of_what_a_state_relies_on() -> None:
    """Of any torch and NumPy: an epoch that was begun with one goes on with another."""
    sampler = GlobalBatchSampler(1000, 5, 0, 1, seed=11)
    assert next(sampler.batches(epoch=0)) == GOLDEN[0]
    assert next(sampler.batches(epoch=3)) == GOLDEN[1]
    assert next(sampler.batches(epoch=3, start=199)) == GOLDEN[2]
    assert GlobalBatchSampler(10**6, 5, 0, 1, seed=2**64 - 1).global_indices(150_000) == GOLDEN[3]


GOLDEN = [
    [586, 843, 559, 208, 136],
    [182, 459, 951, 975, 372],
    [123, 572, 70, 309, 225],
    [901756, 483251, 457746, 270768, 66839],
]


def test_each_seed_and_epoch_has_an_order_of_its_own() -> None:
    pairs = [(seed, epoch) for seed in range(12) for epoch in range(12)]
    pairs += [(7 + (1 << 32), 0), (7, 1 << 32), (1 << 32, 0), (0, 1 << 32)]
    orders = {
        tuple(itertools.chain(*GlobalBatchSampler(50, 50, 0, 1, seed).batches(epoch)))
        for seed, epoch in pairs
    }
    assert len(orders) == len(pairs)


def test_every_order_is_as_likely() -> None:
    seen = Counter(tuple(order_of(4, seed=seed)) for seed in range(4800))
    assert len(seen) == 24
    chi_square = sum((number - 200) ** 2 / 200 for number in seen.values())
    assert 8 < chi_square < 45  # 23 degrees of freedom: 99.8 % lie between


def test_no_generator_is_moved_and_no_device_is_asked() -> None:
    def states() -> Any:
        return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()

    before = states()
    with torch.device("meta"):
        drawn = list(GlobalBatchSampler(100, 10))
    assert states() == before
    torch.manual_seed(before[2][0] + 1)
    random.seed(1)
    assert list(GlobalBatchSampler(100, 10)) == drawn


def test_an_iterator_goes_on_in_the_order_that_it_began() -> None:
    sampler = GlobalBatchSampler(40, 4)
    first, second = list(sampler.batches(0)), list(sampler.batches(1))
    assert first != second
    running = iter(sampler)
    drawn = [next(running)]
    sampler.set_epoch(1)
    assert (sampler.epoch, [*drawn, *running], list(sampler)) == (1, first, second)


@pytest.mark.parametrize(
    "how", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))]
)
def test_a_copy_draws_the_same_and_takes_no_order_along(how: Any) -> None:
    sampler = GlobalBatchSampler(10**5, 50, 1, 2, seed=3, tail="pad")
    sampler.set_epoch(2)
    drawn = list(sampler)
    copied = how(sampler)
    assert list(copied) == drawn
    copied.set_epoch(3)
    assert (sampler.epoch, list(copied) == drawn) == (2, False)
    assert len(pickle.dumps(sampler)) < 500


# ── which rank this is ───────────────────────────────────────────────────────────────────────────


def test_ranks_are_asked_for_as_an_epoch_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = GlobalBatchSampler(8, 4, shuffle=False)
    assert (len(sampler), list(sampler)) == (2, [[0, 1, 2, 3], [4, 5, 6, 7]])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert list(sampler) == [[2, 3], [6, 7]]
    assert shard_of(sampler) == sampler.shard()
    assert (sampler.rank, sampler.world) == (None, None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert list(sampler) == [[3], [7]]  # the group before the environment
    given = GlobalBatchSampler(8, 4, rank=0, world=2, shuffle=False)
    assert list(given) == [[0, 1], [4, 5]]


def test_a_rank_that_nobody_knows_is_refused_as_an_epoch_begins() -> None:
    sampler = GlobalBatchSampler(8, 4, world=2)
    for asks in (iter, len, GlobalBatchSampler.dropped):
        if asks is GlobalBatchSampler.dropped:
            sampler = GlobalBatchSampler(9, 4, world=2)
        with pytest.raises(
            ValueError, match="nobody says which of the 2 ranks this is: give rank="
        ):
            asks(sampler)  # type: ignore[operator]
    assert sampler.global_indices(1) == GlobalBatchSampler(9, 4).global_indices(1)
    assert shard_of(sampler) is None
    with pytest.raises(ValueError, match=r"rank=2 .* there is one rank, 0; give world="):
        iter(GlobalBatchSampler(8, 4, rank=2))


def test_a_loader_tells_it_with_the_first_batch(caplog: pytest.LogCaptureFixture) -> None:
    loader = SafeDataLoader(range(8), batch_sampler=GlobalBatchSampler(8, 4, world=2))
    with pytest.raises(SamplerError, match="nobody says which of the 2 ranks this is"):
        next(iter(loader))
    assert not [each for each in caplog.records if "fault" in each.getMessage()]


def test_an_environment_that_cannot_be_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="global_batch=8 cannot be shared evenly by 3 ranks"):
        GlobalBatchSampler(8, 8)
    with pytest.raises(ValueError, match=r"^2 is the rank of no process: there are 2 ranks"):
        GlobalBatchSampler(8, 8, world=2)
    GlobalBatchSampler(8, 9)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        *(
            ({"length": each}, "length must be an int, 0 or more: len(dataset)")
            for each in (-1, True, 1.0, "8", None, [1], np.bool_(True))
        ),
        *(
            ({"global_batch": each}, "global_batch must be an int, 1 or more")
            for each in (0, -4, True, 4.0, None)
        ),
        *(
            ({"rank": each}, "rank must be an int, 0 or more, or None")
            for each in (-1, False, "0", 0.5)
        ),
        *(
            ({"world": each}, "world must be an int, 1 or more, or None")
            for each in (0, -2, True, "2")
        ),
        *(
            ({"seed": each}, "seed must be an int from 0 to 2**64 - 1")
            for each in (-1, 2**64, True, None, 1.5)
        ),
        *(
            ({"tail": each}, "tail must be 'drop', 'pad' or 'uneven'")
            for each in ("keep", None, True, ["drop"], "")
        ),
        *(({"shuffle": each}, "shuffle must be True or False") for each in (None, 1, "yes")),
        (
            {"rank": 2, "world": 2},
            "rank=2 is the rank of no process: there are 2 ranks, 0 to 1",
        ),
        ({"rank": 1, "world": 1}, "rank=1 is the rank of no process: there is one rank, 0"),
        (
            {"world": 3},
            "global_batch=8 cannot be shared evenly by 3 ranks: take 6 or 9, or 2 or 4 ranks",
        ),
    ],
)
def test_what_is_out_of_range_is_refused_at_once(bad: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        GlobalBatchSampler(**{"length": 20, "global_batch": 8} | bad)


@pytest.mark.parametrize(
    ("global_batch", "world", "said"),
    [
        (7, 16, "take 16, or 7 ranks"),
        (7, 2, "take 6 or 8, or 1 or 7 ranks"),
        (1, 2, "take 2, or 1 rank"),
        (10**9 + 7, 2, "take 1000000006 or 1000000008, or 1 rank"),
    ],
)
def test_what_is_near_that_can_be_shared_is_named(global_batch: int, world: int, said: str) -> None:
    assert _indivisible(global_batch, world).endswith(said)


def test_an_epoch_or_a_batch_that_cannot_be() -> None:
    sampler = GlobalBatchSampler(9, 4)
    for bad in (-1, True, 1.0, None, 2**64):
        with pytest.raises(ValueError, match="epoch must be an int from 0"):
            sampler.set_epoch(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epoch must be an int from 0"):
        sampler.batches(-1)
    with pytest.raises(ValueError, match="start must be the number of a global batch"):
        sampler.batches(0, -1)
    with pytest.raises(IndexError, match="there is no global batch 2: the epoch has 2"):
        sampler.global_indices(2)
    with pytest.raises(ValueError, match="batch must be the number of a global batch"):
        sampler.global_indices(-1)
    assert sampler.epoch == 0


def test_numbers_of_other_libraries_are_taken() -> None:
    sampler = GlobalBatchSampler(
        np.int64(9), np.uint8(4), np.int32(1), torch.tensor(2), np.uint64(5)
    )  # type: ignore[arg-type]
    sampler.set_epoch(np.int16(3))  # type: ignore[arg-type]
    assert list(sampler) == list(GlobalBatchSampler(9, 4, 1, 2, 5).batches(3))
    held = (sampler.length, sampler.global_batch, sampler.rank, sampler.world, sampler.seed)
    assert {type(each) for each in (*held, sampler.epoch)} == {int}


# ── in a loader ──────────────────────────────────────────────────────────────────────────────────


def told(loader: Any, sampler: GlobalBatchSampler, epochs: int) -> list[list[list[int]]]:
    drawn = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        drawn.append([batch.tolist() for batch in loader])
    return drawn


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.workers)])
@every_tail
def test_loaders_hand_over_this_ranks_share(workers: int, tail: Any) -> None:
    sampler = GlobalBatchSampler(27, 8, 1, 2, seed=1, tail=tail)
    wanted = [list(sampler.batches(epoch)) for epoch in range(3)]
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    ours = SafeDataLoader(range(27), batch_sampler=sampler, **options)
    assert told(ours, sampler, 3) == wanted
    audit = ours.audit
    assert (audit.complete, audit.ok, audit.notes) == (True, True, ())
    assert (audit.batches, audit.announced) == (len(sampler), len(sampler))
    assert audit.dropped.tolist() == sampler.dropped()
    if not workers:
        assert told(DataLoader(range(27), batch_sampler=sampler), sampler, 3) == wanted


@pytest.mark.parametrize(
    ("tail", "lines"),
    [
        (
            "drop",
            [
                "epoch 0, rank 1 of 2: complete, ok; 13 drawn, 12 delivered",
                "  dropped: 1, left out by tail='drop': 26",
                "  for other ranks: 14 indices, which cannot be checked from here",
            ],
        ),
        (
            "pad",
            [
                "epoch 0, rank 1 of 2: complete, ok; 16 drawn, 16 delivered",
                "  repeated: 1, drawn more than once by the sampler: 4",
                "  for other ranks: 12 indices, which cannot be checked from here",
                "  padding: 5 indices are drawn twice over all ranks, so that each has as many; an "
                "evaluation counts them twice",
            ],
        ),
        (
            "uneven",
            [
                "epoch 0, rank 1 of 2: complete, ok; 13 drawn, 13 delivered",
                "  for other ranks: 14 indices, which cannot be checked from here",
            ],
        ),
    ],
)
def test_what_the_audit_of_a_share_says(tail: Any, lines: list[str]) -> None:
    sampler = GlobalBatchSampler(27, 8, 1, 2, tail=tail, shuffle=False)
    loader = SafeDataLoader(range(27), batch_sampler=sampler)
    list(loader)
    assert str(loader.audit).split("\n") == lines
    assert loader.audit.shard == (1, 2)


def test_one_rank_alone_hears_of_each_index_that_is_dropped() -> None:
    loader = SafeDataLoader(range(27), batch_sampler=GlobalBatchSampler(27, 8, shuffle=False))
    list(loader)
    assert str(loader.audit).split("\n")[1:] == [
        "  dropped: 3, left out by tail='drop': 24, 25, 26"
    ]
    assert loader.audit.to_dict()["dropped_by"] == "tail='drop'"


@every_tail
def test_the_share_is_found_through_what_holds_the_sampler(tail: Any) -> None:
    sampler = GlobalBatchSampler(27, 8, 1, 2, tail=tail)
    total = {"drop": 24, "pad": 32, "uneven": 27}[tail]
    shard = Shard(1, 2, 27, total, 0, "GlobalBatchSampler", "tail='drop'")

    class Skips:
        def __init__(self) -> None:
            self.batch_sampler = sampler

    assert (shard_of(sampler), shard_of(Skips())) == (shard, shard)
    assert shard_of(GlobalBatchSampler(27, 8, 1, 2, shuffle=False)).epoch is None  # type: ignore[union-attr]


def test_its_length_is_true_and_that_of_a_subclass_proves_nothing() -> None:
    class Shorter(GlobalBatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            return itertools.islice(super().__iter__(), 1)

    assert proven_length(GlobalBatchSampler(27, 8)) == 3
    assert length_is_true(BatchSampler(range(3), 2, False)) is False
    assert proven_length(Shorter(27, 8)) is None
    loader = SafeDataLoader(range(27), batch_sampler=GlobalBatchSampler(27, 8, tail="pad"))
    for _ in zip(range(len(loader)), loader, strict=False):  # as whoever counts batches does
        pass
    assert loader.audit.complete


def test_an_interrupt_leaves_the_rest_of_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = GlobalBatchSampler(16, 4, shuffle=False)
    drawn: list[Any] = []
    share = GlobalBatchSampler._share

    def struck(self: Any, order: Any, rank: int, world: int, batch: int) -> list[int]:
        if batch == 1 and not drawn.count("struck"):
            drawn.append("struck")
            raise KeyboardInterrupt
        return share(self, order, rank, world, batch)

    monkeypatch.setattr(GlobalBatchSampler, "_share", struck)
    running = iter(sampler)
    drawn.append(next(running))
    with pytest.raises(KeyboardInterrupt):
        next(running)
    assert [*drawn, *running] == [[0, 1, 2, 3], "struck", [8, 9, 10, 11], [12, 13, 14, 15]]


def epochs(sampler: GlobalBatchSampler, tell: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
    loader = SafeDataLoader(range(27), batch_sampler=sampler)
    for epoch in range(3):
        tell(epoch)
        list(loader)
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def test_an_epoch_that_is_never_told_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = epochs(GlobalBatchSampler(27, 8, 0, 2), lambda epoch: None, caplog)
    assert "the epoch of GlobalBatchSampler(shuffle=True) is 0 still" in line


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_sampler_that_is_used_well_is_not_spoken_of(
    shuffle: bool, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = GlobalBatchSampler(27, 8, 0, 2, shuffle=shuffle)
    assert epochs(sampler, sampler.set_epoch if shuffle else lambda epoch: None, caplog) == []


def test_switched_off_the_batches_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "SAFELOADER", "off")
    sampler = GlobalBatchSampler(27, 8, 1, 2)
    loader = SafeDataLoader(range(27), batch_sampler=sampler)
    assert [batch.tolist() for batch in loader] == list(sampler)
