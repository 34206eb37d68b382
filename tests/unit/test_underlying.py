"""Under a Subset or ConcatDataset, both indices are told: in the table, audits and failures."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import os
import signal
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DistributedSampler, Subset, random_split

from safeloader import Recorder, SafeDataLoader, SampleError, WorkerCrashError
from safeloader.introspect.underlying import Beneath, underlying
from tests import faults


class Tagged:
    """Each sample says which dataset and which index it is."""

    def __init__(self, tag: int, length: int) -> None:
        self.tag, self.length = tag, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.tag, index


def trees() -> st.SearchStrategy[Any]:
    """Nested datasets, without their tags."""
    lengths = st.integers(1, 5)

    def over(inner: Any) -> Any:
        picked = st.tuples(st.just("subset"), inner, st.lists(st.integers(0, 99), min_size=1))
        return picked | st.tuples(st.just("concat"), st.lists(inner, min_size=1, max_size=3))

    return st.recursive(lengths, over, max_leaves=6)


def built(tree: Any, tags: Any) -> Any:
    if isinstance(tree, int):
        return Tagged(next(tags), tree)
    if tree[0] == "concat":
        return ConcatDataset([built(each, tags) for each in tree[1]])
    inner = built(tree[1], tags)
    return Subset(inner, [k % len(inner) for k in tree[2]])


@given(trees())
def test_it_is_the_sample_that_the_dataset_gives(tree: Any) -> None:
    dataset = built(tree, iter(range(100)))
    under = underlying(dataset)
    if under is None:
        assert isinstance(tree, int)
        return
    wanted = [dataset[k] for k in range(len(dataset))]
    found = [under.of(k) for k in range(len(dataset))]
    assert [(each.part, each.at) for each in found if each is not None] == wanted
    index, part = under.of_all(np.arange(len(dataset)))
    assert list(zip(part.tolist(), index.tolist(), strict=True)) == wanted
    assert under.of(len(dataset)) is None
    index, part = under.of_all(np.array([0, len(dataset)]))
    assert (part[1], index[1]) == (-1, -1)
    assert (part[0], index[0]) == wanted[0]


@pytest.mark.parametrize("table", [list, tuple, np.array, torch.tensor])
def test_any_plain_table_of_indices_is_read(table: Any) -> None:
    under = underlying(Subset(Tagged(0, 9), table([4, 8, 1])))
    assert under is not None
    assert (under.of(1), under.of(-1), under.of("x")) == (Beneath(8, 0), Beneath(1, 0), None)
    assert under.of_all(np.array([2, 0]))[0].tolist() == [1, 4]


class Mine(Subset):  # type: ignore[type-arg]
    """Its indices may mean anything."""


class Table(list):  # type: ignore[type-arg]
    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("code of the user's ran")


@pytest.mark.parametrize(
    "dataset", [[1], Tagged(0, 3), Mine(Tagged(0, 3), [1]), Subset(Tagged(0, 3), Table([1])), None]
)
def test_only_torchs_own_over_plain_tables_are_read(dataset: Any) -> None:
    assert underlying(dataset) is None


@pytest.mark.parametrize(
    "table",
    [
        [slice(0, 3), slice(2, 5)],
        ["0", "1"],
        [1.0, 2.0],
        [[0, 1], [1]],
        [(0, 1), (1, 2)],
        [None],
        torch.tensor([0.0, 1.0]),
        torch.tensor([[0, 1], [1, 2]]),
        np.array([[0, 1], [1, 2]]),
        np.array(["a", "b"]),
    ],
    ids=repr,
)
def test_what_is_no_table_of_numbers_is_left_alone(
    table: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A dataset may be asked for keys, slices or lists of numbers."""

    class Anything:
        def __getitem__(self, index: Any) -> int:
            return 1

    data: Subset[int] = Subset(Anything(), table)
    assert underlying(data) is None
    loader = SafeDataLoader(data, batch_size=2)
    assert [each.tolist() for each in loader] == [[1] * len(table)]
    assert loader.audit.ok
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_a_table_that_was_changed_is_not_believed() -> None:
    subset = Subset(Tagged(0, 99), list(range(50, 90)))
    under = underlying(subset)
    assert under is not None
    subset.indices[:] = range(40)  # type: ignore[index]  # a list
    assert (under.of(1), under.text(1)) == (None, "")
    assert under.of_all(np.array([1]))[0].tolist() == [-1]
    subset.indices = [3]
    again = underlying(subset)
    assert again is not None
    assert again.of(0) == Beneath(3, 0)


# ── the table ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", [0, 2])
def test_the_table_has_the_index_of_the_dataset_under_it(workers: int) -> None:
    generator = torch.Generator().manual_seed(4)
    one, _ = random_split(Tagged(0, 20), [9, 11], generator)  # type: ignore[arg-type]
    inner = Subset(one, [8, 0, 3])
    loader = SafeDataLoader(inner, batch_size=2, shuffle=True, num_workers=workers)
    for _ in range(2):
        seen = [index for _, batch in loader for index in batch.tolist()]
    table = loader.provenance.to_numpy()
    assert table.dtype.names[-1] == "under_index"
    assert len(table.dtype.names) == 9
    assert table["under_index"][3:].tolist() == seen
    rows = loader.provenance.lookup(one.indices[8], under=True)
    assert rows["index"].tolist() == [0, 0]
    assert loader.provenance.lookup(0)["under_index"].tolist() == [one.indices[8]] * 2
    assert loader.provenance.lookup(19999, under=True).size == 0


def test_a_concatenation_tells_the_part_as_well(tmp_path: Path) -> None:
    loader = SafeDataLoader(ConcatDataset([Tagged(0, 3), Subset(Tagged(1, 9), [7, 2])]))
    list(loader)
    table = loader.provenance.to_numpy()
    columns = ["under_index", "under_part"]
    assert table[columns].tolist() == [(0, 0), (1, 0), (2, 0), (7, 1), (2, 1)]
    assert loader.provenance.lookup(2, under=True)["index"].tolist() == [2, 4]
    assert loader.provenance.lookup(2, under=True, part=1)["index"].tolist() == [4]
    loader.provenance.save(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head[-2:] == columns
    assert [row[-2:] for row in rows][3] == ["7", "1"]
    loader.provenance.save(tmp_path / "table.jsonl")
    lines = (tmp_path / "table.jsonl").read_text().splitlines()
    assert json.loads(lines[4])["under_index"] == 2
    loader.provenance.save(tmp_path / "table.npy")
    assert np.load(tmp_path / "table.npy")["under_part"].tolist() == [0, 0, 0, 1, 1]


def test_a_dataset_at_the_bottom_has_the_columns_it_had() -> None:
    loader = SafeDataLoader(Tagged(0, 4))
    list(loader)
    assert len(loader.provenance.to_numpy().dtype.names or ()) == 8
    assert loader.provenance.lookup(3, under=True)["index"].tolist() == [3]


def test_loaders_on_one_recorder_have_one_table() -> None:
    recorder = Recorder()
    list(SafeDataLoader(Subset(Tagged(0, 9), [5, 6]), recorder=recorder))
    plain = SafeDataLoader(Tagged(0, 2), recorder=recorder)
    list(plain)
    table = plain.provenance.to_numpy()
    assert table[["index", "under_index"]].tolist() == [(0, 5), (1, 6), (0, 0), (1, 1)]


def test_the_rank_is_a_column_in_distributed_training() -> None:
    data = list(range(7))
    loader = SafeDataLoader(data, sampler=DistributedSampler(data, num_replicas=3, rank=2))
    list(loader)
    table = loader.provenance.to_numpy()
    assert table.dtype.names[-1] == "rank"
    assert set(table["rank"].tolist()) == {2}


def test_a_trace_file_has_the_rank(tmp_path: Path) -> None:
    data = list(range(7))
    sampler = DistributedSampler(data, num_replicas=3, rank=2)
    loader = SafeDataLoader(data, sampler=sampler, trace=tmp_path)
    list(loader)
    del loader
    (path,) = tmp_path.glob("*.json.gz")
    said = gzip.decompress(path.read_bytes()).decode()
    assert '"name":"rank 2 of 3, safeloader' in said
    assert "epoch 0, rank 2 of 3: complete, ok" in said


# ── tables of datasets that are gone ─────────────────────────────────────────────────────────────

BOUND = 200_000  # bytes of records; half as many of tables


def split(length: int, seed: int, kind: Any = np.array) -> Any:
    order = np.random.default_rng(seed).permutation(length)
    return kind(order if kind is np.array or kind is torch.tensor else order.tolist())


def epochs_of(recorder: Recorder, tables: list[Any]) -> Any:
    """One epoch over the first three samples of a Subset for each table."""
    loader = None
    for table in tables:
        subset = Subset(range(10**6), table)  # type: ignore[arg-type]
        loader = SafeDataLoader(subset, sampler=[0, 1, 2], recorder=recorder)
        list(loader)
    return loader


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_tables_of_splits_that_are_gone_are_bounded(kind: Any) -> None:
    recorder, refs, wanted = Recorder(max_bytes=BOUND), [], []
    for seed in range(30):
        table = split(2000, seed, kind)  # 16,000 bytes
        refs.append(weakref.ref(table))
        wanted += [int(table[k]) for k in range(3)]
        loader = epochs_of(recorder, [table])
    del table
    alive = sum(each() is not None for each in refs)
    assert 6 <= alive <= BOUND // 2 // 16_000 + 2  # the newest two were loaders' till now
    found = loader.provenance.to_numpy()["under_index"].tolist()
    assert found[-3 * alive :] == wanted[-3 * alive :]
    assert set(found[: -3 * alive]) == {-1}
    assert len(loader.audits) == 30


def test_what_was_let_go_of_is_not_known_and_no_other_index() -> None:
    recorder = Recorder(max_bytes=BOUND)
    epochs_of(recorder, [split(20_000, 1)])  # more than is kept
    plain = SafeDataLoader(Tagged(0, 2), recorder=recorder)
    list(plain)
    table = plain.provenance.to_numpy()
    assert table["under_index"].tolist() == [-1, -1, -1, 0, 1]
    assert plain.provenance.lookup(0, under=True)["epoch"].tolist() == [1]


def test_tables_of_datasets_that_are_there_cost_nothing() -> None:
    recorder = Recorder(max_bytes=BOUND)
    data = list(range(60_000))
    parts = random_split(data, [20_000, 20_000, 20_000])  # type: ignore[arg-type]
    seen = []
    for part in parts:
        loader = SafeDataLoader(part, sampler=[5, 6], recorder=recorder)
        seen += [index for batch in loader for index in batch.tolist()]
    assert loader.provenance.to_numpy()["under_index"].tolist() == seen


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_equal_tables_are_kept_once(kind: Any) -> None:
    recorder = Recorder(max_bytes=BOUND)
    tables = [split(500, k % 2, kind) for k in range(40)]  # two loaders, made anew each epoch
    loader = epochs_of(recorder, tables)
    wanted = [int(table[k]) for table in tables for k in range(3)]
    assert loader.provenance.to_numpy()["under_index"].tolist() == wanted
    ways = {id(known.under) for k in range(40) if (known := recorder.facts.of(k)) is not None}
    assert len(ways) == 2


def test_a_table_that_differs_where_nobody_looked_is_no_equal_one() -> None:
    recorder = Recorder()
    first, second = list(range(500)), list(range(500))
    second[1], second[2] = 2, 1
    loader = epochs_of(recorder, [first, second])
    assert loader.provenance.to_numpy()["under_index"].tolist() == [0, 1, 2, 0, 2, 1]


def test_of_epochs_whose_batches_were_forgotten_nothing_is_held() -> None:
    recorder = Recorder(max_bytes=5000)
    loader = epochs_of(recorder, [split(9, seed) for seed in range(30)])
    epochs = set(loader.provenance.to_numpy()["epoch"].tolist())
    assert recorder.forgotten > 0
    assert {k for k in range(30) if recorder.facts.of(k) is not None} == epochs


# ── audits and failures ──────────────────────────────────────────────────────────────────────────


def test_audits_and_log_lines_name_both(caplog: pytest.LogCaptureFixture) -> None:
    subset = Subset(faults.Raises(at=12, length=20), [3, 4, 12, 5, 6])
    loader = SafeDataLoader(subset, batch_size=2, on_error="skip", drop_last=True)
    with caplog.at_level(logging.WARNING, logger="safeloader"):
        list(loader)
    both = "index 2 (index 12 of the dataset under the Subset)"
    assert any(f": {both} skipped: " in each.getMessage() for each in caplog.records)
    said = str(loader.audit)
    assert ": 4 (index 6 of the dataset under the Subset)" in said
    assert f"\n    {both}: " in said
    assert loader.audit.under_indices == {2: 12, 4: 6}
    told = json.loads(json.dumps(loader.audit.to_dict()))
    assert (told["under"], told["under_indices"]) == ("Subset", {"2": 12, "4": 6})


def test_audits_of_a_concatenation_name_the_part() -> None:
    parts = ConcatDataset([Tagged(0, 2), faults.Raises(at=1, length=3)])
    loader = SafeDataLoader(parts, collate_fn=list, on_error="skip")
    list(loader)
    assert ": 3 (index 1 of part 1 under the ConcatDataset)" in str(loader.audit)
    assert loader.audit.to_dict()["under_indices"] == {"3": [1, 1]}


@pytest.mark.parametrize("workers", [0, 1])
def test_failures_name_both_once(workers: int) -> None:
    subset = Subset(faults.Raises(at=12, length=20), [3, 12])
    with pytest.raises(SampleError) as caught:
        list(SafeDataLoader(subset, num_workers=workers))
    assert str(caught.value).count("index 1 of the Subset is index 12 of the dataset under") == 1


class Kills(Tagged):
    """The process that reads sample 7 dies of it."""

    def __getitem__(self, index: int) -> tuple[int, int]:
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class KillsAtOnce(Kills):
    def __getitems__(self, indices: list[int]) -> list[tuple[int, int]]:
        return [self[index] for index in indices]


def test_a_death_under_a_subset_names_the_index_in_both() -> None:
    kills: Any = Kills(0, 9)
    loader = SafeDataLoader(Subset(kills, [8, 3, 1, 7]), batch_size=2, num_workers=1)
    with pytest.raises(WorkerCrashError) as caught:
        list(loader)
    assert caught.value.failure.index == 3
    assert "index 3 of the Subset is index 7 of the dataset under the Subset" in str(caught.value)


def test_a_death_in_a_call_for_a_batch_names_the_indices_of_both() -> None:
    kills: Any = KillsAtOnce(0, 9)
    loader = SafeDataLoader(Subset(kills, [8, 3, 7, 1]), batch_size=2, num_workers=1)
    with pytest.raises(WorkerCrashError) as caught:
        list(loader)
    assert caught.value.failure.indices == (2, 3)
    assert "these are indices [7, 1] of the dataset under the Subset" in str(caught.value)


def test_several_indices_are_told_where_each_is_known() -> None:
    below = underlying(Subset(Tagged(0, 9), [8, 3, 7]))
    assert below is not None
    assert below.text_of_all([2, 0]) == "indices [7, 8] of the dataset under the Subset"
    assert below.text_of_all([2, 3]) == below.text_of_all(["a"]) == below.text_of_all([]) == ""
    two: Any = [Tagged(0, 2), Tagged(1, 2)]
    parts = underlying(ConcatDataset(two))
    assert parts is not None
    assert parts.text_of_all([1, 2]) == ""  # of two parts


def test_a_failure_of_delivery_names_both() -> None:
    loader = SafeDataLoader(Subset(range(20), [3, 12, 5]), key=faults.key_constant)
    with pytest.raises(Exception, match="are one sample") as caught:
        list(loader)
    assert "index 1 of the Subset is index 12 of the dataset under the Subset" in str(caught.value)


# ── a dataset that grew behind its workers ───────────────────────────────────────────────────────


class Grows:
    def __init__(self, length: int) -> None:
        self.items = list(range(length))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> int:
        return self.items[index]


def test_persistent_workers_keep_a_copy_that_has_not_grown() -> None:
    dataset = Grows(40)
    loader = SafeDataLoader(dataset, batch_size=8, num_workers=2, persistent_workers=True)
    list(loader)
    dataset.items += range(24)
    with pytest.raises(IndexError) as caught:
        list(loader)
    said = str(caught.value)
    assert "index 40 is beyond the worker's copy of the dataset" in said
    assert "the workers' copy has 40 samples, yours 64" in said
    assert "look at the sampler" not in said
    assert "next: make the loader anew once the dataset has grown" in said


def test_an_index_beyond_a_dataset_that_is_what_it_was_is_the_samplers() -> None:
    loader = SafeDataLoader(Grows(4), sampler=[3, 7], num_workers=1, persistent_workers=True)
    with pytest.raises(IndexError) as caught:
        list(loader)
    assert "index 7 is outside the dataset (length 4): look at the sampler" in str(caught.value)
    assert "copy" not in str(caught.value)


def test_fresh_workers_have_what_grew() -> None:
    dataset = Grows(4)
    loader = SafeDataLoader(dataset, num_workers=1)
    list(loader)
    dataset.items += [4, 5]
    assert sorted(int(batch) for batch in loader) == [0, 1, 2, 3, 4, 5]


def test_indices_that_are_no_ints_have_nothing_under_them() -> None:
    class Pairs:
        def __getitem__(self, index: tuple[int, int]) -> int:
            return sum(index)

    subset = Subset(Pairs(), [0])  # type: ignore[arg-type]
    subset.indices = [(1, 2)]  # type: ignore[list-item]
    pairs = [(0, 0), (0, 0)]
    loader = SafeDataLoader(subset, sampler=pairs, on_error="skip")
    list(loader)
    assert loader.audit.ok
    assert loader.audit.skipped.tolist() == [[0, 0], [0, 0]]
    assert "under" not in str(loader.audit)
