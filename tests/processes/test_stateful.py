"""A loader that was interrupted goes on exactly: against the same run without an interruption."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import json
import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from safeloader import (
    Failure,
    GlobalBatchSampler,
    ResumeError,
    SafeDataLoader,
    SafeLoaderError,
    SafeStatefulDataLoader,
    SampleError,
    SamplerError,
    TransportError,
    WorkerCrashError,
)
from safeloader.main.saved_state import SavedState

N = 43
NUMBERS = torch.arange(N)
Make = Callable[..., SafeStatefulDataLoader[Any]]


def through_json(state: dict[str, Any]) -> Any:
    return json.loads(json.dumps(state))


def through_torch(state: dict[str, Any]) -> Any:
    saved = io.BytesIO()
    torch.save(state, saved)
    saved.seek(0)
    return torch.load(saved, weights_only=True)


def lists(batches: Any) -> list[Any]:
    return [batch.tolist() for batch in batches]


# ── samplers, as people write them ───────────────────────────────────────────────────────────────


class AtIter(Sampler[int]):
    """Draws as it is asked for its iterator, from one of the global generators."""

    def __init__(self, by: str) -> None:
        self.by = by

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        if self.by == "numpy":
            return iter(np.random.permutation(N).tolist())
        order = list(range(N))
        random.shuffle(order)
        return iter(order)


class OfItsOwn(Sampler[int]):
    """Has a generator of its own, and draws from it as it goes along."""

    def __init__(self, kind: str) -> None:
        self.rng: Any = {
            "numpy": lambda: np.random.default_rng(5),
            "legacy": lambda: np.random.RandomState(5),
            "python": lambda: random.Random(5),
        }[kind]()
        self.draw = {"numpy": "integers", "legacy": "randint", "python": "randrange"}[kind]

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        for _ in range(N):
            yield int(getattr(self.rng, self.draw)(N))


class Batches(Sampler[list[int]]):
    """Batches of unlike sizes, shuffled."""

    def __len__(self) -> int:
        return 9

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(N).tolist()
        for k in range(9):
            yield order[k * (k + 1) // 2 : (k + 1) * (k + 2) // 2]


SAMPLERS: dict[str, Callable[[], dict[str, Any]]] = {
    "in order": lambda: {"batch_size": 4},
    "shuffled": lambda: {"batch_size": 4, "shuffle": True},
    "the last dropped": lambda: {"batch_size": 4, "shuffle": True, "drop_last": True},
    "with a generator": lambda: {
        "batch_size": 4,
        "shuffle": True,
        "generator": torch.Generator().manual_seed(3),
    },
    "with replacement": lambda: {
        "batch_size": 4,
        "sampler": RandomSampler(NUMBERS, replacement=True, num_samples=70),
    },
    "with replacement, and the loader's generator": lambda: _with_one_generator(),
    "weighted": lambda: {"batch_size": 4, "sampler": WeightedRandomSampler([1.0] * N, N)},
    "of a subset": lambda: {"batch_size": 3, "sampler": SubsetRandomSampler(range(5, 30))},
    "distributed": lambda: {
        "batch_size": 3,
        "sampler": DistributedSampler(NUMBERS, num_replicas=2, rank=1),
    },
    "numpy, at iter": lambda: {"batch_size": 4, "sampler": AtIter("numpy")},
    "python, at iter": lambda: {"batch_size": 4, "sampler": AtIter("python")},
    "numpy's, its own": lambda: {"batch_size": 4, "sampler": OfItsOwn("numpy")},
    "legacy numpy's, its own": lambda: {"batch_size": 4, "sampler": OfItsOwn("legacy")},
    "python's, its own": lambda: {"batch_size": 4, "sampler": OfItsOwn("python")},
    "batches": lambda: {"batch_sampler": Batches()},
    "a BatchSampler": lambda: {"batch_sampler": BatchSampler(RandomSampler(NUMBERS), 5, True)},
    "a batch sampler as sampler": lambda: {
        "batch_size": None,
        "sampler": BatchSampler(RandomSampler(NUMBERS), 5, False),
    },
    "without batches": lambda: {"batch_size": None, "shuffle": True},
}


def _with_one_generator() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    sampler = RandomSampler(NUMBERS, replacement=True, num_samples=70, generator=generator)
    return {"batch_size": 4, "sampler": sampler, "generator": generator}


class Rows:
    """A batch of indices is a batch of samples."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: Any) -> Any:
        return NUMBERS[index]


def uncovered(*values: Any) -> list[Any]:
    """Parameters that start so many workers that coverage would take minutes of them."""
    return [pytest.param(each, marks=pytest.mark.uncovered) for each in values]


def make(sampler: str, workers: int, **more: Any) -> SafeStatefulDataLoader[Any]:
    return SafeStatefulDataLoader(Rows(), num_workers=workers, **SAMPLERS[sampler](), **more)


def cut_short(
    loader: SafeStatefulDataLoader[Any], after: int
) -> tuple[list[Any], dict[str, Any], list[Any]]:
    """What came before a state was taken, the state, and what comes after."""
    batches = iter(loader)
    before = lists(itertools.islice(batches, after))
    state = loader.state_dict()
    return before, state, lists(batches)


@pytest.mark.parametrize("workers", [(0, 0), *uncovered((2, 2), (0, 2), (2, 0), (3, 1))])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_rest_comes_and_nothing_twice(sampler: str, workers: tuple[int, int]) -> None:
    for after in (0, 1, 3):
        before, state, rest = cut_short(make(sampler, workers[0]), after)
        resumed = make(sampler, workers[1])
        resumed.load_state_dict(through_json(state))
        assert resumed.state_dict() == state
        stood = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())
        assert lists(resumed) == rest
        audit = resumed.audit
        assert audit.complete
        assert audit.ok
        assert audit.delivered == sum(np.size(each) for each in rest)
        if after:
            assert audit.delivered_before == sum(np.size(each) for each in before)
            assert audit.resumed_at == len(before)
        now = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())
        if after and "at iter" not in sampler:
            assert torch.equal(now[0], stood[0])
            assert now[1:] == stood[1:]


@pytest.mark.parametrize("save", [through_json, through_torch, copy.deepcopy, OrderedDict])
def test_a_state_survives_what_checkpoints_do_to_it(save: Callable[[Any], Any]) -> None:
    _, state, rest = cut_short(make("with a generator", 0), 3)
    resumed = make("with a generator", 0)
    resumed.load_state_dict(save(state))
    assert lists(resumed) == rest


def test_the_check_of_a_state_does_not_mind_its_order_or_tuples() -> None:
    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: tuples(value[name]) for name in sorted(value, reverse=True)}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    for each in (state_with_all_parts(), state_of_stream()):
        state = tuples(each)
        assert state != each
        assert SavedState.of(state).begun


def test_a_part_of_a_state_that_is_missing_or_another_is_seen() -> None:
    for state in (state_with_all_parts(), state_of_stream()):  # dataset_state is the user's
        for name in state.keys() - {"safeloader", "check", "dataset_state"}:
            less = {each: value for each, value in state.items() if each != name}
            for other in (less, state | {name: 7}, state | {name: None}):
                with pytest.raises(ResumeError, match="damaged"):
                    SavedState.of(other)
        for more in ({"new": 1}, {"beyond": [state["batches"] + 1]}):
            with pytest.raises(ResumeError, match="damaged"):
                SavedState.of(state | more)


def state_with_all_parts() -> Any:
    """But for those of a stream."""
    loader = SafeStatefulDataLoader(Broken(), 1, shuffle=True, on_error="skip")
    _, state, _ = cut_short(loader, 40)
    assert {"ladder", "generators", "left_out"} <= state.keys()
    return state


def state_of_stream() -> Any:
    return cut_short(SafeStatefulDataLoader(Stream("iterator"), 4, key=abs), 5)[1]


def test_a_state_is_the_callers_own() -> None:
    """Whatever is done to it, the loader's others are as they were."""
    batches = iter(loader := make("shuffled", 0))
    next(batches)
    state = loader.state_dict()
    before = copy.deepcopy(state)
    state["generators"].clear()
    assert loader.state_dict() == before
    resumed = make("shuffled", 0)
    resumed.load_state_dict(state := copy.deepcopy(before))
    state["generators"].clear()
    assert lists(resumed) == lists(batches)


@pytest.mark.parametrize("kept", ["dataset", "iterator"])
def test_a_state_does_not_change_as_the_dataset_goes_on(kept: str) -> None:
    """Where the dataset gives, or is given, the very dict that it counts in."""

    class OneDict(IterableDataset[int]):
        def __init__(self) -> None:
            self.state = {"at": 0}

        def __iter__(self) -> Any:
            return self if kept == "dataset" else OneDict()

        def __next__(self) -> int:
            if self.state["at"] == N:
                raise StopIteration
            self.state["at"] += 1
            return self.state["at"]

        def state_dict(self) -> dict[str, int]:
            return self.state

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.state = state

    _, state, rest = cut_short(SafeStatefulDataLoader(OneDict(), 4), 3)
    for _ in range(2):
        resumed = SafeStatefulDataLoader(OneDict(), 4)
        resumed.load_state_dict(state)
        assert lists(resumed) == rest


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_again_and_again(workers: int) -> None:
    begin = torch.Generator().manual_seed(8).get_state()
    torch.set_rng_state(begin)
    whole = lists(make("shuffled", workers))
    torch.set_rng_state(begin)
    loader, came = make("shuffled", workers), []
    while len(came) < len(whole):
        batches = iter(loader)
        came += lists(itertools.islice(batches, min(3, len(whole) - len(came))))
        state = loader.state_dict()
        loader = make("shuffled", workers)
        loader.load_state_dict(state)
    assert came == whole
    assert lists(loader) == []  # nothing is left
    assert loader.state_dict()["epoch"] == 1


@pytest.mark.uncovered
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sampler=st.sampled_from([*SAMPLERS]),
    cuts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=4),
    persistent=st.booleans(),
    seed=st.integers(0, 2**32),
)
@pytest.mark.hypothesis
def test_any_chain_of_interruptions(
    sampler: str, cuts: list[tuple[int, int]], persistent: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    stood = torch.get_rng_state(), random.getstate(), np.random.get_state()
    whole = lists(DataLoader(Rows(), **SAMPLERS[sampler]()))
    torch.set_rng_state(stood[0])
    random.setstate(stood[1])
    np.random.set_state(stood[2])
    came: list[Any] = []
    state: dict[str, Any] = {}
    for k, (length, workers) in enumerate([*cuts, (1000, 0)]):
        stays = persistent and workers > 0
        loader = make(sampler, workers, persistent_workers=stays)
        if k:
            loader.load_state_dict(through_json(state))
        piece = lists(itertools.islice(iter(loader), length))
        came += piece
        state = loader.state_dict()
        if len(piece) < length:  # it came to its end
            break
    assert came == whole


# ── seed= ────────────────────────────────────────────────────────────────────────────────────────


class Noisy(Rows):
    """Draws from all three generators."""

    def __getitem__(self, index: Any) -> Any:
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return torch.tensor([index, *drawn], dtype=torch.float64)


def seeded(workers: int, per: str = "sample", **more: Any) -> SafeStatefulDataLoader[Any]:
    more = {"batch_size": 4, "shuffle": True, "seed": 11, **more}
    return SafeStatefulDataLoader(Noisy(), num_workers=workers, seed_per=per, **more)


@pytest.mark.parametrize("workers", [(0, 2), (2, 0), (2, 3), (1, 1)])
@pytest.mark.parametrize("per", ["sample", "batch"])
def test_with_a_seed_batches_are_bit_identical(per: str, workers: tuple[int, int]) -> None:
    torch.manual_seed(len(per))  # which is of no interest
    one = seeded(workers[0], per)
    epochs = [lists(one), lists(one)]
    for after in (0, 1, 5):
        batches = iter(one := seeded(workers[0], per))
        lists(itertools.islice(batches, after))
        state = through_json(one.state_dict())
        assert len(json.dumps(state)) < 1000
        torch.manual_seed(after)
        resumed = seeded(workers[1], per)
        resumed.load_state_dict(state)
        assert lists(resumed) == epochs[0][after:]
        assert lists(resumed) == epochs[1]
    assert len(json.dumps(one.state_dict())) < 1000


def test_with_a_seed_per_sample_batches_may_have_another_size() -> None:
    whole = list(itertools.chain(*lists(seeded(0))))
    batches = iter(one := seeded(2))
    came = list(itertools.chain(*lists(itertools.islice(batches, 3))))
    for size in (5, 3, 7):
        resumed = seeded(0, batch_size=size)
        resumed.load_state_dict(through_json(one.state_dict()))
        batches = iter(one := resumed)
        came += itertools.chain(*lists(itertools.islice(batches, 2)))
    resumed = seeded(2)
    resumed.load_state_dict(through_json(one.state_dict()))
    came += itertools.chain(*lists(resumed))
    assert came == whole
    assert resumed.audit.complete
    state = seeded(0, "batch").state_dict() | {"batches": 1, "samples": 4, "digest": "00" * 16}
    del state["check"]
    assert "batches of 4" in refused(state, seeded(0, "batch", batch_size=5))


def test_without_batches_a_state_of_batches_is_refused() -> None:
    _, state, _ = cut_short(seeded(0), 1)
    unbatched = SafeStatefulDataLoader(Noisy(), None, shuffle=True, seed=11)
    assert refused(state, unbatched).endswith("Resume with batches of 4")  # not: give it seed=


def test_another_seed_is_refused() -> None:
    state = seeded(0).state_dict()
    assert "Give it seed=11" in refused(state, seeded(0, seed=12))
    assert "Give it no seed=" in refused(make("shuffled", 0).state_dict(), seeded(0))
    assert "seed_per='batch'" in refused(seeded(0, "batch").state_dict(), seeded(0))


def test_set_epoch_says_which_epoch_comes(caplog: pytest.LogCaptureFixture) -> None:
    one = seeded(0)
    epochs = [lists(one), lists(one)]
    one.set_epoch(0)
    assert one.state_dict()["epoch"] == 0
    next(iter(one))  # a peek
    one.set_epoch(0)
    assert lists(one) == epochs[0]
    batches = iter(other := seeded(0))
    next(batches)
    state = other.state_dict()
    other = seeded(0)
    other.load_state_dict(state)
    other.set_epoch(0)  # it is so
    assert lists(other) == epochs[0][1:]
    other.load_state_dict(state)
    assert not caplog.records
    other.set_epoch(1)
    assert "leaves the state that was loaded, of batch 1 of epoch 0" in caplog.text
    assert caplog.messages[0].startswith("SafeStatefulDataLoader over Noisy: ")
    assert lists(other) == epochs[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_after_another_loaders_batch_is_refused(workers: int) -> None:
    train, validation = seeded(workers), seeded(workers)
    of_train, of_validation = iter(train), iter(validation)
    next(of_train), next(of_validation)
    with pytest.raises(ResumeError, match=r"another loader's.* give last_batch of the loader"):
        train.state_dict(after=validation.last_batch)
    assert train.state_dict(after=train.last_batch) == train.state_dict()


def test_once_an_epoch_was_asked_for_states_are_of_its_beginning() -> None:
    """As a loop has it that leaves an epoch early, and saves as the next one begins."""
    whole = seeded(0)
    epochs = [lists(whole), lists(whole)]
    batches = iter(one := seeded(0))
    next(batches)
    record = one.last_batch
    one.set_epoch(1)
    resumed = seeded(0)
    resumed.load_state_dict(one.state_dict())
    assert lists(resumed) == epochs[1]
    assert one.state_dict(after=record)["batches"] == 1
    next(batches)  # it goes on with the old one after all
    resumed.load_state_dict(one.state_dict())
    assert lists(resumed) == epochs[0][2:]


# ── ranks ────────────────────────────────────────────────────────────────────────────────────────


def of_rank(rank: int, world: int, tail: str = "drop", **more: Any) -> Any:
    sampler = GlobalBatchSampler(N, 12, rank, world, seed=5, tail=tail)  # type: ignore[arg-type]
    return SafeStatefulDataLoader(Noisy(), batch_sampler=sampler, seed=11, **more)


def global_batches(loaders: list[Any]) -> list[Any]:
    """The batches of all ranks, put together."""
    shares = zip(*(lists(loader) for loader in loaders), strict=True)
    return [list(itertools.chain(*each)) for each in shares]


@pytest.mark.parametrize("tail", ["drop", "pad"])
@pytest.mark.parametrize("worlds", [(3, 2), (2, 4), (4, 1), (1, 6), (2, 2)])
def test_any_ranks_state_restores_all_on_any_number_of_ranks(
    worlds: tuple[int, int], tail: str
) -> None:
    before, after = worlds
    whole = global_batches([of_rank(0, 1, tail)])
    for rank in range(before):
        batches = iter(one := of_rank(rank, before, tail))
        next(batches)
        state = through_json(one.state_dict())
        assert len(json.dumps(state)) < 1000
        loaders = [of_rank(r, after, tail) for r in range(after)]
        for each in loaders:
            each.load_state_dict(state)
        assert global_batches(loaders) == whole[1:]
        assert all(each.audit.complete and each.audit.ok for each in loaders)
        assert {each.audit.delivered_before for each in loaders} == {12 // after}
        again = through_json(loaders[0].state_dict())
        assert again["epoch"] == 1


def test_of_an_uneven_tail_a_rank_may_have_none_left() -> None:
    batches = iter(one := of_rank(0, 1, "uneven"))
    assert [len(next(batches)) for _ in range(4)] == [12, 12, 12, 7]
    loaders = [of_rank(r, 12, "uneven") for r in range(12)]
    for each in loaders:
        each.load_state_dict(one.state_dict())
        assert lists(each) == []
        assert each.audit.ok


def test_the_sampler_may_be_told_of_the_next_epoch_before_the_state_is_taken() -> None:
    batches = iter(one := of_rank(0, 1))
    next(batches)
    one.batch_sampler.set_epoch(1)
    resumed = of_rank(0, 1)
    resumed.load_state_dict(one.state_dict())
    assert lists(resumed) == lists(batches)


def test_another_global_order_is_refused() -> None:
    batches = iter(one := of_rank(0, 2))
    next(batches)
    state = through_json(one.state_dict())
    other = SafeStatefulDataLoader(
        Noisy(), batch_sampler=GlobalBatchSampler(N, 6, 0, 2, seed=5), seed=11
    )
    assert "global_batch=12, now 6" in refused(state, other)
    state["order"]["digest"] = "00" * 8
    del state["check"]
    assert "another release" in refused(state, of_rank(0, 2))


def test_a_loader_with_and_one_without_a_global_order() -> None:
    _, with_one, _ = cut_short(of_rank(0, 2), 1)
    _, without, _ = cut_short(seeded(0), 1)
    for loader in (seeded(0), SafeStatefulDataLoader(Noisy(), batch_sampler=Batches(), seed=11)):
        said = refused(with_one, loader)
        assert "with a GlobalBatchSampler, and this loader has none" in said
        assert "seed=" not in said  # which it has
    assert "with no GlobalBatchSampler, and this loader has one" in refused(without, of_rank(0, 2))
    _, state, _ = cut_short(make("batches", 0), 1)
    said = refused(state, make("shuffled", 0))
    assert said.endswith("Resume with batches of a sampler's own, or none")  # no seed= allows that


# ── the end of an epoch, and the next ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_left_and_next_epoch_are_two_states(workers: int) -> None:
    loader = make("in order", workers)
    for _ in loader:
        last = loader.state_dict()
    over = loader.state_dict()
    assert (last["epoch"], last["batches"]) == (0, 11)
    assert over["epoch"] == 1
    assert "batches" not in over
    resumed = make("in order", workers)
    resumed.load_state_dict(last)
    assert lists(resumed) == []
    assert resumed.audit.complete
    assert len(lists(resumed)) == 11
    resumed.load_state_dict(over)
    assert len(lists(resumed)) == 11


@pytest.mark.parametrize("persistent", [False, True])
def test_the_next_epochs_follow(persistent: bool) -> None:
    def loader() -> SafeStatefulDataLoader[Any]:
        return make("shuffled", 2, persistent_workers=persistent)

    torch.manual_seed(4)
    one = loader()
    epochs = [lists(one), lists(one)]
    state = one.state_dict()
    epochs += [lists(one)]
    other = loader()
    other.load_state_dict(state)
    assert lists(other) == epochs[2]


def test_persistent_workers_begin_the_epoch_that_their_sampler_was_told() -> None:
    def loader() -> Any:
        return of_rank(0, 1, num_workers=1, persistent_workers=True)

    whole = loader()
    epochs = []
    for epoch in range(2):
        whole.batch_sampler.set_epoch(epoch)
        epochs.append(lists(whole))
    lists(one := loader())
    resumed = loader()
    resumed.load_state_dict(through_json(one.state_dict()))
    resumed.batch_sampler.set_epoch(1)
    assert lists(resumed) == epochs[1]


def test_an_iterator_made_before_is_at_its_end() -> None:
    loader = make("in order", 0)
    batches = iter(loader)
    next(batches)
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(ResumeError, match="Load the state before iter"):
        next(batches)
    assert len(lists(loader)) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_of_two_iterators_the_newer_has_the_place(workers: int) -> None:
    loader = make("in order", workers)
    older, newer = iter(loader), iter(loader)
    next(newer)
    state = loader.state_dict()
    lists(itertools.islice(older, 5))
    assert loader.state_dict() == state
    resumed = make("in order", 0)
    resumed.load_state_dict(state)
    assert lists(resumed) == lists(newer)


@pytest.mark.parametrize("more", [4, 11])
def test_what_comes_twice_is_told(more: int) -> None:
    loader = make("in order", 0)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    lists(itertools.islice(batches, more))
    loader.load_state_dict(state)
    lists(loader)
    last = min(more, 10)
    assert f"batches 1 to {last} of this epoch had been handed over" in str(loader.audit)
    loader.load_state_dict({})
    assert len(lists(loader)) == 11
    assert loader.audit.resumed_at is None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_of_an_earlier_batch(workers: int) -> None:
    loader = make("shuffled", workers)
    batches = iter(loader)
    states, records = [], []
    for _ in range(5):
        next(batches)
        states.append(loader.state_dict())
        records.append(loader.last_batch)
    for state, record in zip(states, records, strict=True):
        assert loader.state_dict(after=record) == state
    lists(batches)
    assert loader.state_dict(after=records[0]) == states[0]
    lists(loader)
    with pytest.raises(ResumeError, match="newest 1024 batches"):
        loader.state_dict(after=records[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_of_an_earlier_batch_knows_nothing_of_what_was_left_out_later(workers: int) -> None:
    loader = SafeStatefulDataLoader(Broken(), 4, num_workers=workers, on_error="skip")
    came = [(loader.state_dict(), loader.last_batch) for _ in loader]
    assert came[0][0] != came[-1][0]
    assert [loader.state_dict(after=record) for _, record in came] == [state for state, _ in came]


@pytest.mark.parametrize("dataset", ["rows", "stream"])
def test_a_state_may_be_asked_for_while_a_batch_is_handed_over(dataset: str) -> None:
    """By a signal handler, or another thread: at any line it is that of one of the two batches."""
    loader: Any = (
        make("shuffled", 0) if dataset == "rows" else SafeStatefulDataLoader(Counted(20), 4)
    )
    states: list[Any] = []

    def asks(frame: Any, event: str, _: Any) -> Any:
        if "safeloader/main/" in frame.f_code.co_filename and frame.f_code.co_name != "state":
            sys.settrace(None)
            states.append(loader.state_dict())
            sys.settrace(asks)
            return asks
        return None

    batches = iter(loader)
    next(batches)
    before, traced_by = loader.state_dict(), sys.gettrace()  # coverage, which goes on behind it
    sys.settrace(asks)
    try:
        next(batches)
    finally:
        sys.settrace(traced_by)
    known = [before, loader.state_dict()]
    assert len(states) > 20
    assert all(state in known for state in states)


def test_out_of_order_what_came_behind_a_gap_does_not_come_again() -> None:
    loader = make("in order", 2, in_order=False)
    batches = iter(loader)
    came = lists(itertools.islice(batches, 5))
    state = through_json(loader.state_dict())
    state_of_gap = dict(state)
    del batches
    resumed = make("in order", 2, in_order=False)
    resumed.load_state_dict(state_of_gap)
    came += lists(resumed)
    assert sorted(itertools.chain(*came)) == list(range(N))
    assert resumed.audit.complete


def test_a_gap_is_filled() -> None:
    """The state of a loader that handed over batches 0, 1, 3 and 5."""
    whole = make("in order", 0)
    _, state, _ = cut_short(whole, 2)
    state["beyond"] = [3, 5]
    del state["check"]
    resumed = make("in order", 0)
    resumed.load_state_dict(state)
    assert [each[0] for each in lists(resumed)] == [8, 16, 24, 28, 32, 36, 40]
    assert resumed.audit.complete
    assert resumed.audit.delivered_before == 16


@pytest.mark.parametrize("more", [1, 2, 3, 5])
def test_interrupted_again_behind_a_gap(more: int) -> None:
    """Without workers nothing is drawn ahead: gaps are behind it as the next batch is drawn."""
    whole = lists(seeded(0, "batch"))
    _, state, _ = cut_short(seeded(0, "batch"), 2)
    state["beyond"] = [3, 5]
    del state["check"]
    resumed = seeded(0, "batch")
    resumed.load_state_dict(state)
    came = lists(itertools.islice(iter(resumed), more))
    again = seeded(0, "batch")
    again.load_state_dict(through_json(resumed.state_dict()))
    earlier = [*whole[:2], whole[3], whole[5]]
    assert sorted([*earlier, *came, *lists(again)]) == sorted(whole)
    assert again.audit.ok


class OneList(Sampler[list[int]]):
    """Fills one list again and again."""

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for k in range(10):
            batch[:] = range(4 * k, 4 * k + 4)
            yield batch


def test_gaps_are_filled_from_a_list_that_is_filled_again() -> None:
    def loader() -> SafeStatefulDataLoader[Any]:
        return SafeStatefulDataLoader(Rows(), batch_sampler=OneList())

    _, state, _ = cut_short(loader(), 1)
    state["beyond"] = [3, 5]
    del state["check"]
    resumed = loader()
    resumed.load_state_dict(state)
    assert [each[0] for each in lists(resumed)] == [4, 8, 16, 24, 28, 32, 36]


class GoesOn(Sampler[list[int]], Iterator[list[int]]):
    """Raises in the place of its third batch, and goes on."""

    def __init__(self) -> None:
        self.at = -1

    def __len__(self) -> int:
        return 9

    def __iter__(self) -> Iterator[list[int]]:
        return GoesOn()

    def __next__(self) -> list[int]:
        self.at += 1
        if self.at == 2:
            raise KeyError("a draw")
        if self.at == 10:
            raise StopIteration
        return [4 * self.at, 4 * self.at + 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_draw_that_failed_fails_again_and_is_passed_over(workers: int) -> None:
    def loader() -> SafeStatefulDataLoader[Any]:
        return SafeStatefulDataLoader(Rows(), batch_sampler=GoesOn(), num_workers=workers)

    batches = iter(one := loader())
    lists(itertools.islice(batches, 2))
    early = one.state_dict()
    with pytest.raises(SamplerError):
        next(batches)
    next(batches)
    state, rest = one.state_dict(), lists(batches)
    resumed = loader()
    resumed.load_state_dict(through_json(state))
    assert lists(resumed) == rest
    resumed.load_state_dict(early)
    batches = iter(resumed)
    with pytest.raises(SamplerError):  # not yet told of
        next(batches)
    assert lists(batches)[1:] == rest


class Name:
    """An index with an equality of its own, and its address in its text."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Name) and self.number == other.number

    def __hash__(self) -> int:
        return hash(self.number)


class Named:
    def __getitem__(self, index: Any) -> int:
        return index.number if isinstance(index, Name) else len(index)


def test_indices_that_are_objects_are_known_again() -> None:
    def loader(*numbers: int) -> SafeStatefulDataLoader[Any]:
        order = [Name(number) for number in numbers]
        return SafeStatefulDataLoader(Named(), 2, sampler=order)  # type: ignore[arg-type]

    _, state, rest = cut_short(loader(3, 1, 2, 0), 1)
    resumed = loader(3, 1, 2, 0)
    resumed.load_state_dict(through_json(state))
    assert lists(resumed) == rest
    assert "draws other indices" in refused(state, loader(1, 3, 2, 0))


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────


def refused(state: Any, loader: SafeStatefulDataLoader[Any]) -> str:
    def go_on() -> None:
        loader.load_state_dict(state)
        iter(loader)

    with pytest.raises(ResumeError) as caught:
        go_on()
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def test_what_is_no_state_of_this_loader_is_refused() -> None:
    _, state, _ = cut_short(make("shuffled", 0), 3)
    loader = make("shuffled", 0)
    assert "a state is a dict" in refused([1], loader)
    assert "no state of a loader: it has epoch" in refused({"epoch": 3}, loader)
    assert "load_state_dict(checkpoint['loader'])" in refused({"epoch": 3, "loader": state}, loader)
    assert "torchdata" in refused({"_snapshot": {}}, loader)
    assert "upgrade safeloader" in refused(state | {"safeloader": 2}, loader)
    assert "a part of it is missing" in refused(state | {"generators": {"draw": {}}}, loader)
    del state["check"]  # to come to what it stands before
    for broken in ({"samples": "x"}, {"digest": "zz"}, {"batches": -1}, {"left_out": 3}):
        assert "damaged" in refused(state | broken, loader)
    longer = SafeStatefulDataLoader(torch.arange(50), batch_size=4, shuffle=True)
    assert "has 50 samples now and had 43" in refused(state, longer)
    other = SafeStatefulDataLoader(NUMBERS, batch_size=5, shuffle=True)
    assert "batches of 4, and this loader has batches of 5" in refused(state, other)
    assert len(lists(loader)) == 11  # it was left alone


def test_another_order_is_refused_and_it_is_told_from_where() -> None:
    def loader(order: list[int]) -> SafeStatefulDataLoader[Any]:
        return SafeStatefulDataLoader(torch.arange(4000), batch_size=2, sampler=order)

    order = list(range(4000))
    batches = iter(one := loader(order))
    for _ in range(1500):
        next(batches)
    state = through_json(one.state_dict())
    assert len(json.dumps(state)) < 1000
    order[2400], order[2401] = order[2401], order[2400]
    said = refused(state, loader(order))
    assert "they agree up to batch 1024 and differ by batch 1280 of the 1500" in said
    assert "seed=" in said
    assert "ended" in refused(state, loader(order[:2000] * 1))
    stood = torch.get_rng_state()
    refused(state, loader(order))
    assert torch.equal(torch.get_rng_state(), stood)


def test_a_sampler_that_shares_its_generator_with_the_loop_is_refused() -> None:
    class Lazy(Sampler[int]):
        def __len__(self) -> int:
            return N

        def __iter__(self) -> Iterator[int]:
            for _ in range(N):
                yield int(torch.randint(N, ()))

    def loader() -> SafeStatefulDataLoader[Any]:
        return SafeStatefulDataLoader(NUMBERS, batch_size=4, sampler=Lazy())

    batches = iter(one := loader())
    for _ in range(4):
        next(batches)
        torch.rand(3)  # as dropout does
    assert "draws other indices" in refused(one.state_dict(), loader())


@pytest.mark.parametrize("seed", [None, 3])
def test_a_loader_that_does_not_shuffle_any_more_is_told_what_it_can_do(seed: int | None) -> None:
    _, state, _ = cut_short(make("shuffled", 0, seed=seed), 3)
    said = refused(state, SafeStatefulDataLoader(NUMBERS, batch_size=4, seed=seed))
    assert "Usual causes: shuffle= or sampler= is another" in said
    assert ("train with seed=" in said) == (seed is None)  # it has one


# ── what a state is, and what it costs ───────────────────────────────────────────────────────────


def test_a_state_moves_nothing_and_starts_nothing() -> None:
    loader = make("shuffled", 2)
    stood = torch.get_rng_state(), random.getstate()
    state = loader.state_dict()
    assert vars(loader)["_iterator"] is None
    assert len(json.dumps(state)) < 20_000
    loader.load_state_dict(state)
    loader.state_dict()
    assert torch.equal(stood[0], torch.get_rng_state())
    assert stood[1] == random.getstate()


def test_copies_and_pickles_are_at_their_beginning() -> None:
    loader = make("in order", 0)
    next(iter(loader))
    for other in (copy.copy(loader), pickle.loads(pickle.dumps(loader))):
        assert other.state_dict()["epoch"] == 0
        assert len(lists(other)) == 11


class Once(Rows):
    """Comes to no worker at first."""

    refuses = True

    def __reduce__(self) -> Any:
        if self.refuses:
            raise TypeError("not yet")
        return Rows, ()


@pytest.mark.parametrize("cls", [SafeDataLoader, SafeStatefulDataLoader])
@pytest.mark.parametrize("seed", [None, 11])
def test_an_epoch_that_could_not_begin_is_the_next_one_still(cls: Any, seed: int | None) -> None:
    if seed is None and cls is SafeDataLoader:
        return  # counts none
    shuffled = {"batch_size": 4, "shuffle": True, "seed": seed}
    whole = lists(SafeStatefulDataLoader(Rows(), **shuffled))
    dataset = Once()
    loader = cls(dataset, num_workers=1, multiprocessing_context="spawn", **shuffled)
    with pytest.raises(TransportError):
        iter(loader)
    if cls is SafeStatefulDataLoader:
        assert loader.state_dict()["epoch"] == 0
    dataset.refuses = False
    came = lists(loader)
    if seed is not None:
        assert came == whole
    if cls is SafeStatefulDataLoader:
        assert loader.state_dict()["epoch"] == 1


def test_generators_stand_where_they_stood_if_no_worker_can_start() -> None:
    torch.manual_seed(1)
    state = make("shuffled", 0).state_dict()
    torch.manual_seed(2)
    stood = torch.get_rng_state()
    loader = SafeStatefulDataLoader(
        Once(), batch_size=4, shuffle=True, num_workers=1, multiprocessing_context="spawn"
    )
    loader.load_state_dict(state)
    with pytest.raises(TransportError):
        iter(loader)
    assert torch.equal(torch.get_rng_state(), stood)


def test_what_was_loaded_is_kept_where_no_worker_can_start() -> None:
    _, state, rest = cut_short(make("in order", 0), 4)
    loader = SafeStatefulDataLoader(
        dataset := Once(), batch_size=4, num_workers=1, multiprocessing_context="spawn"
    )
    loader.load_state_dict(state)
    with pytest.raises(TransportError):
        iter(loader)
    assert loader.state_dict() == state
    dataset.refuses = False
    assert lists(loader) == rest


def test_without_records_there_is_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make("in order", 0)
    state = loader.state_dict()
    monkeypatch.setenv("SAFELOADER", "off")
    assert len(lists(loader)) == 11
    with pytest.raises(ResumeError, match="SAFELOADER=off"):
        loader.state_dict()
    with pytest.raises(ResumeError, match="SAFELOADER=off"):
        loader.load_state_dict(state)


class Broken(Rows):
    def __getitem__(self, index: Any) -> Any:
        if index in (6, 30):
            raise KeyError(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_left_out_samples_stay_left_out(workers: int) -> None:
    def loader(**more: Any) -> SafeStatefulDataLoader[Any]:
        return SafeStatefulDataLoader(Broken(), batch_size=4, num_workers=workers, **more)

    _, state, rest = cut_short(loader(on_error="skip"), 3)
    assert state["left_out"] == {"skipped": [1, ["6"]]}
    resumed = loader(on_error="skip")
    resumed.load_state_dict(through_json(state))
    assert lists(resumed) == rest
    batches = iter(raising := loader())
    next(batches)
    with pytest.raises(SampleError):
        next(batches)
    state = raising.state_dict()
    assert state["batches"] == 2  # the batch of the error is behind it
    resumed = loader(on_error="skip")
    resumed.load_state_dict(state)
    assert lists(resumed)[0] == [8, 9, 10, 11]


def test_what_was_left_out_before_counts_too() -> None:
    """The bound is one of the epoch."""

    def loader() -> SafeStatefulDataLoader[Any]:
        return SafeStatefulDataLoader(Broken(), 4, on_error="skip", max_skipped=1)

    batches = iter(one := loader())
    lists(itertools.islice(batches, 3))
    resumed = loader()
    resumed.load_state_dict(through_json(one.state_dict()))
    for rest in (batches, resumed):
        with pytest.raises(SampleError, match="2 of the 32 samples so far"):
            lists(rest)


def test_workers_that_were_restarted(tmp_path: Any) -> None:
    class Dies(Rows):
        def __getitem__(self, index: Any) -> Any:
            if index == 9 and get_worker_info() and not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    def loader() -> SafeStatefulDataLoader[Any]:
        return SafeStatefulDataLoader(Dies(), batch_size=4, num_workers=2, on_crash="restart")

    before, state, rest = cut_short(loader(), 4)
    assert before[2] == [8, 9, 10, 11]
    resumed = loader()
    resumed.load_state_dict(state)
    assert lists(resumed) == rest


class FailsLate(Rows):
    def __getitem__(self, index: Any) -> Any:
        if index in (8, 9, 10, 11):
            raise KeyError(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_what_stands_in_was_drawn_before_the_state_was_taken(batch_size: int | None) -> None:
    """Of a batch that fails whole: an index drawn shortly before it, by the run before too."""

    def loader() -> SafeStatefulDataLoader[Any]:
        return SafeStatefulDataLoader(FailsLate(), batch_size, on_error="replace", seed=11)

    for after in (2, 9):
        _, state, rest = cut_short(loader(), after)
        resumed = loader()
        resumed.load_state_dict(through_json(state))
        assert lists(resumed) == rest


# ── streams, and datasets that keep their own place ──────────────────────────────────────────────


class Stream(IterableDataset[int]):
    """Each worker its share; ``kept``: what has a state."""

    def __init__(self, kept: str = "", n: int = N) -> None:
        self.n, self.kept = n, kept

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        worker, of = (0, 1) if info is None else (info.id, info.num_workers)
        numbers = range(worker, self.n, of)
        return Counter(numbers) if self.kept else iter(list(numbers))


class Counter(Iterator[int]):
    def __init__(self, numbers: range) -> None:
        self.numbers, self.at, self.read = numbers, 0, 0

    def __next__(self) -> int:
        if self.at == len(self.numbers):
            raise StopIteration
        self.at += 1
        self.read += 1
        return self.numbers[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("kept", ["", "iterator"])
@pytest.mark.parametrize("workers", [0, 2, *uncovered(1, 3)])
def test_a_stream_goes_on(workers: int, kept: str, every: int) -> None:
    def loader(**more: Any) -> SafeStatefulDataLoader[Any]:
        return SafeStatefulDataLoader(
            Stream(kept), 4, num_workers=workers, snapshot_every_n_steps=every, **more
        )

    for after in (0, 1, 2, 5, 8):
        before, state, rest = cut_short(loader(), after)
        resumed = loader()
        resumed.load_state_dict(through_json(state))
        assert lists(resumed) == rest
        audit = resumed.audit
        assert audit.complete
        assert audit.ok
        assert audit.drawn == N
        if after:
            assert audit.delivered_before == sum(map(len, before))


class Counted(IterableDataset[int]):
    """As many as were asked for."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))


class BeginsAgain(Stream):
    """Counts for itself, and stands at its beginning again once it is at its end."""

    at = 0

    def __iter__(self) -> Iterator[int]:
        while self.at < self.n:
            self.at += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_begins_again_at_its_end_does_not_come_twice(workers: int) -> None:
    """Its last batch is a short one: with it came the end."""

    def loader() -> SafeStatefulDataLoader[Any]:
        return SafeStatefulDataLoader(BeginsAgain(n=5), 2, num_workers=workers)

    before, state, rest = cut_short(loader(), 3)
    assert (before, rest) == ([[0, 1], [2, 3], [4]], [])
    resumed = loader()
    resumed.load_state_dict(through_json(state))
    assert lists(resumed) == []
    assert resumed.audit.ok
    assert lists(resumed) == before


def test_a_stream_that_is_read_again_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "safeloader")
    _, state, _ = cut_short(SafeStatefulDataLoader(Stream(), 4, num_workers=2), 4)
    resumed = SafeStatefulDataLoader(Stream(), 4, num_workers=2)
    resumed.load_state_dict(state)
    lists(resumed)
    assert "worker 0 read 8 samples again" in caplog.text
    caplog.clear()
    _, state, _ = cut_short(SafeStatefulDataLoader(Stream("iterator"), 4, num_workers=2), 4)
    resumed = SafeStatefulDataLoader(Stream("iterator"), 4, num_workers=2)
    resumed.load_state_dict(state)
    lists(resumed)
    assert "again" not in caplog.text


class Shuffled(Stream):
    """In another order in each process that makes it, or in each with this seed."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        numbers = list(super().__iter__())
        random.Random(self.seed).shuffle(numbers)
        return iter(numbers)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_with_keys_a_stream_that_is_read_again_is_proved(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    def loader(seed: int | None, key: Any = abs) -> SafeStatefulDataLoader[Any]:
        return SafeStatefulDataLoader(Shuffled(seed), 4, num_workers=workers, key=key)

    caplog.set_level(logging.WARNING, "safeloader")
    before, state, rest = cut_short(loader(3), 5)
    resumed = loader(3)
    resumed.load_state_dict(through_json(state))
    batches = iter(resumed)
    more = lists(itertools.islice(batches, 2))
    assert caplog.text.count("they are those of then, by key=") == max(workers, 1)
    again = loader(3)  # a chain of resumes
    again.load_state_dict(through_json(resumed.state_dict()))
    assert [*before, *more, *lists(again)] == [*before, *rest]

    resumed = loader(None)
    resumed.load_state_dict(state)
    is_another = r"the stream.* is another than it was: its first \d+ sa"
    with pytest.raises(ResumeError, match=is_another) as caught:
        lists(resumed)
    assert "and the epoch of then" in str(caught.value)
    assert "iter(loader.dataset) repeats it" not in str(caught.value)  # it raises nothing
    caplog.clear()
    resumed = loader(None, key=None)  # nothing tells
    resumed.load_state_dict(state)
    lists(resumed)
    assert caplog.text.count("key= would prove that they are those of then") == max(workers, 1)


class ShufflesAndDraws(Stream):
    """A generator: what it draws, it draws as samples are asked for, from torch's and Python's."""

    def __iter__(self) -> Iterator[Any]:
        numbers = list(super().__iter__())
        random.shuffle(numbers)
        for each in numbers:
            drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
            yield torch.tensor([each, *drawn], dtype=torch.float64)


@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("workers", [0, 2])
def test_with_a_seed_what_is_read_again_is_drawn_as_then(workers: int, per: str) -> None:
    def loader() -> SafeStatefulDataLoader[Any]:
        return SafeStatefulDataLoader(
            ShufflesAndDraws(), 4, num_workers=workers, seed=11, seed_per=per
        )

    for after in (1, 4, 9):
        _, state, rest = cut_short(loader(), after)
        resumed = loader()
        resumed.load_state_dict(through_json(state))
        stood = random.getstate(), np.random.get_state()[2]
        assert lists(resumed) == rest
        assert (random.getstate(), np.random.get_state()[2]) == stood


def test_of_samples_left_out_no_keys_are_kept() -> None:
    """Then the stream goes on without a proof."""

    def loader() -> SafeStatefulDataLoader[Any]:
        dataset = FailsAt(7)
        return SafeStatefulDataLoader(dataset, 4, num_workers=1, key=abs, on_error="skip")

    _, state, rest = cut_short(loader(), 5)
    assert "keys" not in state["_snapshot"]["_worker_snapshots"]["worker_0"]
    resumed = loader()
    resumed.load_state_dict(state)
    assert lists(resumed) == rest


@pytest.mark.parametrize("workers", [0, 2])
def test_what_failed_as_the_stream_was_read_fails_as_it_is_read_again(workers: int) -> None:
    def loader() -> SafeStatefulDataLoader[Any]:
        return SafeStatefulDataLoader(
            FailsAt(7, "counter alone"), 4, num_workers=workers, on_error="skip"
        )

    _, state, rest = cut_short(loader(), 6)
    resumed = loader()
    resumed.load_state_dict(through_json(state))
    assert lists(resumed) == rest


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_ends_before_its_place_is_refused(workers: int) -> None:
    def loader(n: int) -> SafeStatefulDataLoader[Any]:
        return SafeStatefulDataLoader(Stream(n=n), 4, num_workers=workers)

    _, state, _ = cut_short(loader(N), 6)
    resumed = loader(10)
    resumed.load_state_dict(state)
    with pytest.raises(ResumeError, match="it ended after 10 samples, and 24 were read when"):
        lists(resumed)


class Interrupted(Iterator[int]):
    """Ctrl-C strikes as its seventh number is asked for."""

    def __init__(self) -> None:
        self.at = -1

    def __next__(self) -> int:
        if self.at == 5 and Interrupted.strikes:
            Interrupted.strikes = False
            raise KeyboardInterrupt
        self.at += 1
        if self.at == N:
            raise StopIteration
        return self.at

    strikes = True


class InterruptedCounting(Interrupted):
    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("kept", [False, True])
def test_what_an_interrupt_lost_of_a_stream_was_read_all_the_same(
    kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Dataset(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return InterruptedCounting() if kept else Interrupted()

    Interrupted.strikes = True
    batches = iter(one := SafeStatefulDataLoader(Dataset(), 4))
    next(batches)
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    before = one.state_dict()
    told = "2 samples that it had read were not handed over, and do not come again"
    assert (told in caplog.text) == kept  # nobody can say where the dataset stood before them
    caplog.clear()
    next(batches)
    state = one.state_dict()
    rest = lists(batches)
    lists(one)
    one.state_dict()
    assert "handed over" not in caplog.text
    resumed = SafeStatefulDataLoader(Dataset(), 4)
    resumed.load_state_dict(state)
    assert lists(resumed) == rest
    assert resumed.audit.ok
    resumed.load_state_dict(before)  # nothing came since: what was lost comes, if it can
    assert lists(resumed)[0] == ([6, 7, 8, 9] if kept else [4, 5, 6, 7])
    assert resumed.audit.ok


class FailsAt(Stream):
    def __init__(self, at: int, kept: str = "iterator") -> None:
        super().__init__(kept)
        self.at = at

    def __iter__(self) -> Iterator[int]:
        counter = Failing(range(self.n), self.at)
        return counter if self.kept == "iterator" else WithoutState(counter)


class WithoutState(Iterator[int]):
    def __init__(self, counter: Counter) -> None:
        self.counter = counter

    def __next__(self) -> int:
        return next(self.counter)


class Failing(Counter):
    def __init__(self, numbers: range, fails_at: int) -> None:
        super().__init__(numbers)
        self.fails_at = fails_at

    def __next__(self) -> int:
        found = super().__next__()
        if found == self.fails_at:
            raise ValueError(found)
        return found


def test_a_batch_that_came_damaged_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def loader() -> SafeStatefulDataLoader[Any]:
        return SafeStatefulDataLoader(Stream(), 4, num_workers=1, checksum=True)

    batches = iter(one := loader())
    next(batches)
    damaged = Failure(phase="transport", exception_type="TransportError", message="damaged")
    with monkeypatch.context() as patched:
        patched.setattr("safeloader.main.iterator.changed", lambda manifest, payload: damaged)
        with pytest.raises(TransportError):
            next(batches)
    state = one.state_dict()
    assert (state["batches"], state["samples"]) == (2, 8)
    rest = lists(batches)
    resumed = loader()
    resumed.load_state_dict(state)
    assert lists(resumed) == rest


def test_the_number_of_workers_may_be_numpys() -> None:
    _, state, rest = cut_short(SafeStatefulDataLoader(Stream(), 4, num_workers=np.int64(1)), 4)
    resumed = SafeStatefulDataLoader(Stream(), 4, num_workers=1)
    resumed.load_state_dict(through_json(state))
    assert lists(resumed) == rest


def test_a_stream_on_other_workers_is_refused() -> None:
    _, state, _ = cut_short(SafeStatefulDataLoader(Stream(), 4, num_workers=2), 4)
    said = refused(state, SafeStatefulDataLoader(Stream(), 4, num_workers=3))
    assert "2 workers" in said
    assert "num_workers=2" in said


def test_a_stream_of_another_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning saves the state of rank 0 alone."""

    def of(rank: int) -> SafeStatefulDataLoader[Any]:
        monkeypatch.setenv("RANK", str(rank))
        return SafeStatefulDataLoader(Stream("iterator"), 4)

    monkeypatch.setenv("WORLD_SIZE", "2")
    _, state, rest = cut_short(of(0), 4)
    assert "this is the state of rank 0, and this is rank 1" in refused(state, of(1))
    resumed = of(0)
    resumed.load_state_dict(state)
    assert lists(resumed) == rest


class Refusing(Counter):
    """Does not take the states that it gave."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise KeyError("count")


class StreamRefusing(Stream):
    def __iter__(self) -> Iterator[int]:
        return Refusing(range(self.n))


class RowsRefusing(Rows):
    def state_dict(self) -> dict[str, int]:
        return {"at": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise KeyError("count")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("make_dataset", "call"),
    [
        (RowsRefusing, "dataset.load_state_dict()"),
        (StreamRefusing, "iter(dataset).load_state_dict()"),
    ],
    ids=["map-style", "stream"],
)
def test_a_dataset_that_does_not_take_its_state(make_dataset: Any, call: str, workers: int) -> None:
    _, state, _ = cut_short(SafeStatefulDataLoader(make_dataset(), 4, num_workers=workers), 2)
    resumed = SafeStatefulDataLoader(make_dataset(), 4, num_workers=workers)
    resumed.load_state_dict(state)
    with pytest.raises(SafeLoaderError) as caught:
        lists(resumed)
    said = str(caught.value)
    assert f"{call} raised: it does not take the state that was saved of it" in said
    assert "KeyError: 'count'" in said
    assert said.endswith("next: mend it, or begin anew by loader.load_state_dict({})")
    assert isinstance(caught.value, KeyError if workers else ResumeError)
    resumed.load_state_dict({})
    assert len(lists(resumed)) == 11


class Stateless(Rows):
    """Its state can be had so many times."""

    def __init__(self, how: str, times: int) -> None:
        self.how, self.times = how, times

    def state_dict(self) -> dict[str, Any]:
        self.times -= 1
        if self.times >= 0:
            return {}
        if self.how == "raises":
            raise KeyError("count")
        return {"function": lambda: 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("seed", [None, 11])
@pytest.mark.parametrize("times", [2, 0])
@pytest.mark.parametrize("how", ["raises", "gives a lambda"])
def test_a_state_that_cannot_be_had_is_told_with_its_cause(
    how: str, times: int, seed: int | None
) -> None:
    """At the first batch, and as the epoch begins."""
    dataset = Stateless(how, times)
    batches = iter(loader := SafeStatefulDataLoader(dataset, 4, num_workers=1, seed=seed))
    if times:
        assert next(batches).tolist() == [0, 1, 2, 3]
    for _ in range(2 if times else 3):  # the first of 3 is of no batch
        with pytest.raises(SampleError) as caught:
            next(batches)
        said = str(caught.value)
        assert "raised as the state of the dataset was asked for, by state_dict()" in said
        assert said.endswith("next: mend state_dict(), or take it away")
    assert loader.state_dict()["left_out"]["failed"][0] == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_keeps_its_place_no_more(workers: int) -> None:
    _, state, _ = cut_short(SafeStatefulDataLoader(Stream("iterator"), 4, num_workers=workers), 2)
    resumed = SafeStatefulDataLoader(Stream(), 4, num_workers=workers)
    resumed.load_state_dict(state)
    with pytest.raises(ResumeError, match=r"the place of iter\(dataset\), which had state_dict"):
        lists(resumed)


def test_rows_that_keep_their_place_no_more(caplog: pytest.LogCaptureFixture) -> None:
    _, state, rest = cut_short(SafeStatefulDataLoader(Counting(), 4), 2)
    resumed = SafeStatefulDataLoader(Rows(), 4)
    resumed.load_state_dict(state)
    assert lists(resumed) == rest
    assert "the state of the dataset is left aside" in caplog.text


class Counting(Rows):
    """A map-style dataset that counts what was asked of it, in each worker."""

    asked = 0

    def __getitem__(self, index: Any) -> Any:
        self.asked += 1
        return super().__getitem__(index)

    def state_dict(self) -> dict[str, int]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.asked = state["asked"]


def test_states_of_other_workers_are_left_aside_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, state, rest = cut_short(SafeStatefulDataLoader(Counting(), 4, num_workers=2), 4)
    for workers in (2, 3, 0):
        caplog.clear()
        resumed = SafeStatefulDataLoader(Counting(), 4, num_workers=workers)
        resumed.load_state_dict(state)
        with caplog.at_level(logging.WARNING, "safeloader"):
            assert lists(resumed) == rest
        told = [each for each in caplog.messages if "the state of the dataset" in each]
        assert len(told) == (workers != 2)
        if workers:
            assert all(
                "saved of the 2 copies in the workers, and now it is the 3" in x for x in told
            )
        else:
            assert "now it is the one in the main process" in told[0]
            assert told[0].endswith("go on with num_workers=2")


def test_workers_end_with_an_iterator_that_waited_for_their_states() -> None:
    """And not with the garbage collector: batches that came before the states are kept."""

    class Slow(Counting):
        def state_dict(self) -> dict[str, int]:
            info = get_worker_info()
            time.sleep(0.5 if info is not None and info.id == 1 else 0)
            return super().state_dict()

    loader = SafeStatefulDataLoader(Slow(), 4, num_workers=2, in_order=False)
    gc.disable()
    try:
        batches: Any = iter(loader)
        stock = weakref.ref(batches._stock)
        del batches
        assert stock() is None
    finally:
        gc.enable()
    assert sorted(itertools.chain(*lists(loader))) == list(range(N))


@pytest.mark.parametrize("on_crash", ["raise", "restart"])
def test_a_worker_that_dies_before_it_told_its_state(on_crash: Any, tmp_path: Any) -> None:
    class Dies(Counting):
        def state_dict(self) -> dict[str, int]:
            if get_worker_info() and not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().state_dict()

    loader = SafeStatefulDataLoader(Dies(), 4, num_workers=1, on_crash=on_crash)
    if on_crash == "raise":
        with pytest.raises(WorkerCrashError):
            lists(loader)
    else:
        assert lists(loader) == lists(make("in order", 0))


def test_the_state_of_a_dataset_goes_on_in_a_worker_that_is_restarted(tmp_path: Any) -> None:
    class Dies(Counting):
        def __getitem__(self, index: Any) -> Any:
            if index == 21 and not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    loader = SafeStatefulDataLoader(Dies(), 4, num_workers=1, on_crash="restart", prefetch_factor=1)
    _, state, _ = cut_short(loader, 8)
    told = state["_snapshot"]["_worker_snapshots"]["worker_0"]["dataset_state"]
    assert (tmp_path / "died").exists()
    assert told == {"asked": 32}


# ── kill -9 ──────────────────────────────────────────────────────────────────────────────────────

KILLED = """
import json, os, signal, sys, torch
from safeloader import SafeStatefulDataLoader

path, workers, until = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(1)
loader = SafeStatefulDataLoader(
    torch.arange(43), 4, shuffle=True, num_workers=workers, generator=torch.Generator()
)
if os.path.exists(path + ".state"):
    loader.load_state_dict(json.load(open(path + ".state")))
for number, batch in enumerate(loader):
    if number == until:
        os.kill(os.getpid(), signal.SIGKILL)
    with open(path, "a") as out:
        out.write(json.dumps(batch.tolist()) + chr(10))
    state = loader.state_dict()
    with open(path + ".new", "w") as out:
        json.dump(state, out)
    os.replace(path + ".new", path + ".state")
"""


@pytest.mark.uncovered
def test_killed_in_between(tmp_path: Any) -> None:
    path = tmp_path / "came"
    for workers, until in ((2, 3), (0, 2), (1, 100)):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", KILLED, path, str(workers), str(until)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == (0 if until == 100 else -signal.SIGKILL), done.stderr
    came = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(itertools.chain(*came)) == list(range(N))
