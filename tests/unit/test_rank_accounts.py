"""What real epochs tell other ranks: with every kind of sampler and dataset a true answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from safeloader import (
    GlobalBatchSampler,
    RunAudit,
    SafeDataLoader,
    SafeStatefulDataLoader,
    instrument,
    merge_audits,
)
from safeloader.delivery.ledger import MapLedger
from safeloader.introspect.sharding import purpose_of

DATA = list(range(50))


@pytest.fixture
def on_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunAudit]:
    """The audit of loaders that are read one after the other, each as a rank of its own."""

    def merged(
        make: Callable[[int], Any], world: int = 3, most: int | None = None, of_rank: int = 0
    ) -> RunAudit:
        parts = []
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world))
            loader = make(rank)
            for _ in itertools.islice(loader, most if rank == of_rank else None):
                pass
            parts.append(loader.audit_part())
        return merge_audits(parts)

    return merged


def share(rank: int, data: Any = DATA, **options: Any) -> DistributedSampler[Any]:
    return DistributedSampler(data, num_replicas=3, rank=rank, **options)


# ── samplers ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("length", [1, 2, 3, 7, 50, 51])
def test_the_padding_of_a_distributed_sampler_is_named(on_ranks: Any, length: int) -> None:
    data = list(range(length))
    run = on_ranks(lambda rank: SafeDataLoader(data, 4, sampler=share(rank, data)))
    assert (run.ok, run.never.size) == (True, 0)
    assert run.counts["again"] == -length % 3
    assert run.padding.tolist() == run.twice.tolist()


@pytest.mark.parametrize("tail", ["drop", "pad", "uneven"])
@pytest.mark.parametrize("length", [3, 50, 54])
def test_a_global_batch_sampler(on_ranks: Any, tail: Any, length: int) -> None:
    data = list(range(length))

    def make(rank: int) -> Any:
        sampler = GlobalBatchSampler(length, 9, rank, 3, seed=2, tail=tail)
        return SafeDataLoader(data, batch_sampler=sampler)

    run = on_ranks(make)
    assert run.ok is True
    assert run.counts["again"] == (-length % 9 if tail == "pad" else 0)
    assert run.padding.tolist() == run.twice.tolist()
    dropped = length % 9 if tail == "drop" else 0
    assert run.never.size == dropped == sum(len(each) for each in run.left_out.values())


def test_drop_last_of_the_loader_is_named_by_rank(on_ranks: Any) -> None:
    run = on_ranks(lambda rank: SafeDataLoader(DATA, 4, sampler=share(rank), drop_last=True))
    assert run.ok is True
    assert set(run.left_out) == {"dropped"}
    assert sorted(run.left_out["dropped"]) == run.never.tolist() != []
    # That of rank 2 is padding, which another rank has handed over.
    assert set(run.left_out["dropped"].values()) == {0, 1}
    assert "never: 2 dropped by ranks 0 and 1" in str(run)


class Backwards:
    """A batch sampler of the user's."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self.rank, 50, 3):
            yield [first - 50]


def test_a_batch_sampler_of_the_users_and_negative_indices(on_ranks: Any) -> None:
    run = on_ranks(lambda rank: SafeDataLoader(DATA, batch_sampler=Backwards(rank)))
    assert (run.ok, run.delivered) == (True, 50)
    less = on_ranks(lambda rank: SafeDataLoader(DATA, batch_sampler=Backwards(max(rank, 1))))
    assert less.ok is False
    assert "the sampler is your own (Backwards)" in str(less)


def test_samplers_that_repeat_on_purpose(on_ranks: Any) -> None:
    def weighted(rank: int) -> Any:
        generator = torch.Generator().manual_seed(rank)
        sampler = WeightedRandomSampler([1.0] * 50, 60, generator=generator)
        return SafeDataLoader(DATA, 4, sampler=sampler)

    run = on_ranks(weighted)
    assert run.ok is None
    assert "draws with replacement" in run.answer

    def alike(rank: int) -> Any:
        generator = torch.Generator().manual_seed(5)
        sampler = RandomSampler(DATA, replacement=True, num_samples=60, generator=generator)
        return SafeDataLoader(DATA, 4, sampler=sampler)

    same = on_ranks(alike)
    assert same.ok is False
    assert "ranks 0 to 2 handed over the very same samples" in same.answer


def test_what_a_sampler_draws_on_purpose() -> None:
    data = DATA
    known: list[tuple[Any, str]] = [
        (SequentialSampler(data), ""),
        (BatchSampler(RandomSampler(data), 4, False), ""),
        (RandomSampler(data, num_samples=60), "replacement"),
        (RandomSampler(data, num_samples=20), "replacement"),
        (SubsetRandomSampler([1, 2]), "subset"),
        (WeightedRandomSampler([1.0, 2.0], 2, replacement=False), "subset"),
        (share(1), ""),
        (GlobalBatchSampler(9, 3, 0, 1), ""),
        (BatchSampler([1, 2, 3], 2, False), "list"),
        (Backwards(1), "Backwards"),
    ]
    assert [purpose_of(sampler) for sampler, _ in known] == [purpose for _, purpose in known]


def test_shares_by_subset_samplers(on_ranks: Any) -> None:
    def make(rank: int) -> Any:
        return SafeDataLoader(DATA, 4, sampler=SubsetRandomSampler(range(rank, 50, 3)))

    assert on_ranks(make).ok is True


# ── samples that did not come ────────────────────────────────────────────────────────────────────


class Holes(Dataset[int]):
    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> int:
        if index in (7, 20):
            raise ValueError("a broken file")
        return index


@pytest.mark.parametrize("on_error", ["skip", "replace"])
def test_samples_left_out_are_named_and_their_donors_count_for_nothing(
    on_ranks: Any, on_error: Any
) -> None:
    def make(rank: int) -> Any:
        return SafeDataLoader(Holes(), 5, sampler=share(rank, shuffle=False), on_error=on_error)

    run = on_ranks(make)
    assert (run.ok, run.never.tolist()) == (True, [7, 20])
    assert run.left_out == {f"{on_error}ped" if on_error == "skip" else "replaced": {7: 1, 20: 2}}
    assert run.counts["twice"] == run.counts["padding"] == 1


def test_a_batch_that_failed_is_not_delivered(on_ranks: Any) -> None:
    def make(rank: int) -> Any:
        loader = SafeDataLoader(Holes(), 5, sampler=share(rank, shuffle=False))
        batches = iter(loader)
        while True:
            try:
                next(batches)
            except ValueError:
                continue
            except StopIteration:
                break

        class Read:
            audit_part = loader.audit_part

            def __iter__(self) -> Iterator[Any]:
                return iter(())

        return Read()

    run = on_ranks(make)
    assert run.ok is False
    assert "ranks 1 and 2: their own audits are not ok" in run.answer
    assert set(run.left_out) == {"failed"}
    assert {7, 20} <= set(run.never.tolist()) == set(run.left_out["failed"])


def test_one_sample_under_two_keys_does_not_upset_the_indices(on_ranks: Any) -> None:
    def make(rank: int) -> Any:
        sampler = share(rank, shuffle=False)
        # On rank 0 the samples of 0 and 3 have one key, and the warning is about that.
        return SafeDataLoader(
            DATA, 5, sampler=sampler, key=lambda x: 3 if x == 0 else x, verify="off"
        )

    run = on_ranks(make)
    assert run.never.size == 0
    assert run.ok is False
    assert "rank 0: 1 duplicated" in run.evidence


def test_what_came_beside_the_draws_counts() -> None:
    from safeloader.delivery.indices import pack
    from safeloader.delivery.manifest import BatchManifest

    ledger = MapLedger(expected_batches=None)
    for seq, indices in enumerate([[0, 1], [2, 3], [4]]):
        ledger.drawn(seq, pack(indices))
    for seq, indices in ((0, [0, 1]), (0, [0, 1]), (1, [2, 9])):
        found = ledger.check(BatchManifest(seq, 0, 1, pack(indices), len(indices)))
        if found is not None:
            ledger.settle(found, handed_over=True, worker=0)
    delivered = ledger.handed_over(10)
    assert delivered is not None
    assert delivered.multiplicities(0, 10).tolist() == [2, 2, 1, 0, 0, 0, 0, 0, 0, 1]
    assert delivered.ladder(10).count == ledger.delivered_count


def test_a_rank_that_leaves_early(on_ranks: Any) -> None:
    run = on_ranks(lambda rank: SafeDataLoader(DATA, 4, sampler=share(rank)), most=2, of_rank=1)
    assert (run.ok, run.complete) == (False, False)
    assert run.answer == "epoch 0 of 3 ranks: NOT OK: rank 1 stopped early"
    assert "rank 1 stopped early: 8 of 17 samples delivered" in str(run)


# ── datasets ─────────────────────────────────────────────────────────────────────────────────────


def test_one_split_on_all_ranks(on_ranks: Any) -> None:
    split = Subset(list(range(100)), range(0, 100, 2))
    run = on_ranks(lambda rank: SafeDataLoader(split, 4, sampler=share(rank, split)))
    assert (run.ok, run.length) == (True, 50)


def test_a_part_of_the_dataset_on_each_rank(on_ranks: Any) -> None:
    def make(rank: int) -> Any:
        return SafeDataLoader(Subset(DATA, range(rank, 50, 3)), 4, shuffle=True)

    run = on_ranks(make)
    assert (run.ok, run.length, run.delivered) == (True, 50, 50)

    def over(rank: int) -> Any:
        return SafeDataLoader(Subset(DATA, range(10 * rank, 10 * rank + 20)), 4)

    twice = on_ranks(over)
    assert (twice.ok, twice.twice.tolist()) == (False, [*range(10, 30)])
    assert twice.never.tolist() == [*range(40, 50)]
    assert "indices are those of the dataset under the ranks' Subsets" in twice.evidence


class Files(Dataset[str]):
    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> str:
        return self.files[index]


def test_each_ranks_own_files_cannot_be_told(on_ranks: Any) -> None:
    def make(rank: int) -> Any:
        return SafeDataLoader(Files([f"{rank}/{k}.png" for k in range(9)]), 4)

    run = on_ranks(make)
    assert run.ok is None
    assert "dataset.files is not the same on ranks 0 and 1" in run.answer

    def listed(rank: int) -> Any:  # in the order of each machine's file system
        files = [f"{k}.png" for k in range(9)]
        return SafeDataLoader(Files(files[::-1] if rank else files), 4, sampler=share(rank, files))

    assert on_ranks(listed).ok is None
    files = [f"{k}.png" for k in range(9)]
    assert on_ranks(lambda rank: SafeDataLoader(Files(files), 4, sampler=share(rank, files))).ok


def test_a_cache_that_each_rank_fills_is_no_other_dataset(on_ranks: Any) -> None:
    class Caches(Dataset[Any]):
        def __init__(self) -> None:
            self.cache: list[Any] = [None] * 50

        def __len__(self) -> int:
            return 50

        def __getitem__(self, index: int) -> int:
            self.cache[index] = index
            return index

    assert on_ranks(lambda rank: SafeDataLoader(Caches(), 4, sampler=share(rank))).ok


@pytest.mark.parametrize(
    "data", [TensorDataset(torch.arange(50)), ConcatDataset([DATA[:20], DATA[20:]])]
)
def test_torchs_own_datasets(on_ranks: Any, data: Any) -> None:
    assert on_ranks(lambda rank: SafeDataLoader(data, 4, sampler=share(rank, data))).ok


def test_indices_that_are_names(on_ranks: Any) -> None:
    data = {f"{k}.png": k for k in range(50)}
    names = list(data)

    def make(rank: int) -> Any:
        return SafeDataLoader(data, 4, sampler=names[rank::3])  # type: ignore[arg-type]

    run = on_ranks(make)
    assert run.ok is None
    assert "none of those compared came on two ranks" in run.answer
    same = on_ranks(lambda rank: SafeDataLoader(data, 4, sampler=names))  # type: ignore[arg-type]
    assert same.ok is False


class Stream(IterableDataset[int]):
    def __init__(self, numbers: range) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)


def test_streams(on_ranks: Any) -> None:
    without = on_ranks(lambda rank: SafeDataLoader(Stream(range(50)), 4))
    assert without.ok is None
    assert "a stream without key= gives its samples no identity" in without.answer
    assert "give the loaders key=" in without.next_step
    whole = on_ranks(lambda rank: SafeDataLoader(Stream(range(50)), 4, key=int))
    assert whole.ok is False
    assert "ranks 0 to 2 handed over the very same samples" in whole.answer
    apart = on_ranks(lambda rank: SafeDataLoader(Stream(range(rank, 50, 3)), 4, key=int))
    assert apart.ok is None
    assert "what never came is not known" in apart.answer


# ── epochs ───────────────────────────────────────────────────────────────────────────────────────


def test_an_epoch_that_went_on_where_another_run_was(on_ranks: Any) -> None:
    def make(rank: int) -> Any:
        def fresh() -> SafeStatefulDataLoader[Any]:
            return SafeStatefulDataLoader(DATA, 4, sampler=share(rank))

        batches = iter(loader := fresh())
        for _ in range(2):
            next(batches)
        resumed = fresh()
        resumed.load_state_dict(loader.state_dict())
        return resumed

    run = on_ranks(make)
    assert (run.ok, run.delivered, run.padding.size) == (True, 51, 1)
    assert [each.before for each in run.parts] == [8, 8, 8]


def test_no_epoch_and_no_records(on_ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = merge_audits([SafeDataLoader(DATA).audit_part()])
    assert run.ok is None
    assert "no epoch was begun, or nothing is recorded" in run.answer
    monkeypatch.setenv("SAFELOADER", "off")
    off = on_ranks(lambda rank: SafeDataLoader(DATA, 4))
    assert off.ok is None
    assert "nothing is recorded (SAFELOADER=off)" in off.answer


def test_of_the_running_epoch_it_is_what_came_by_now() -> None:
    loader = SafeDataLoader(DATA, 4)
    list(loader)
    batches = iter(loader)
    next(batches)
    part = loader.audit_part()
    assert (part.epoch, part.complete, part.delivered) == (1, False, 4)
    assert merge_audits([part]).never.tolist() == [*range(4, 50)]


def test_loaders_that_are_instrumented(on_ranks: Any) -> None:
    def make(rank: int) -> Any:
        return instrument(DataLoader(DATA, 4, sampler=share(rank)))  # type: ignore[arg-type]

    assert on_ranks(make).ok is True


def test_a_fault_of_our_own_is_told_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loader = SafeDataLoader(DATA, 4)
    list(loader)

    def fails(*args: Any) -> Any:
        raise RuntimeError("of ours")

    monkeypatch.setattr(MapLedger, "handed_over", fails)
    part = loader.audit_part()
    assert "a fault of safeloader's own" in part.unknown
    assert "the part for other ranks" in caplog.text
    assert merge_audits([part]).ok is None
