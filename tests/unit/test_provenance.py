"""The table of what was delivered: decoded from the manifest, looked up, written to files."""

from __future__ import annotations

import builtins
import csv
import json
import locale
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safeloader import Recorder, SafeDataLoader
from safeloader.delivery.indices import pack
from safeloader.delivery.manifest import BatchManifest, SampleIncident
from safeloader.provenance.recorder import UNIX_OFFSET_NS, Delivery
from safeloader.provenance.table import Provenance, record_of
from tests import datasets

COLUMNS = ("epoch", "batch", "position", "index", "worker_id", "pid", "start_ns", "fetch_ns")
WORKERS = [0, 2]


def loaded(dataset: Any, epochs: int = 1, **arguments: Any) -> SafeDataLoader[Any]:
    loader = SafeDataLoader(dataset, **arguments)
    for _ in range(epochs):
        for _ in loader:
            pass
    return loader


class TakesAnyIndex:
    def __init__(self, length: int = 10) -> None:
        self.length = length

    def __getitem__(self, index: Any) -> str:
        return str(index)

    def __len__(self) -> int:
        return self.length


class Sleeps:
    """Waits for the clock, so that its samples have a duration to be seen."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        until = time.perf_counter_ns() + 2_000_000
        while time.perf_counter_ns() < until:
            pass
        return index


class SleepsTogether(Sleeps):
    def __getitems__(self, indices: list[int]) -> list[int]:
        return [self[index] for index in indices]


# ── the record of a batch ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", WORKERS)
def test_the_last_batch_is_the_one_in_the_loops_hands(workers: int) -> None:
    loader = SafeDataLoader(
        datasets.Noisy(11), batch_size=4, shuffle=True, num_workers=workers, drop_last=False
    )
    assert loader.last_batch is None
    for epoch in range(2):
        for number, batch in enumerate(loader):
            record = loader.last_batch
            assert record is not None
            assert record.indices == tuple(batch["index"].tolist())
            assert (record.epoch, record.batch) == (epoch, number)
            assert record.worker_id == (number % workers if workers else None)
            assert (record.pid == os.getpid()) == (workers == 0)
            assert len(record.fetch_ns) == len(record.indices)
            assert all(took > 0 for took in record.fetch_ns)
            assert record.collate_ns > 0
            assert record.wait_ns > 0
            assert loader.provenance.batch(number) == record
    assert record is not None
    with pytest.raises(AttributeError):
        record.epoch = 9  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(record)) == record


@pytest.mark.parametrize("workers", WORKERS)
def test_start_is_the_time_of_day(workers: int) -> None:
    before = time.time_ns()
    loader = loaded(list(range(6)), batch_size=2, num_workers=workers)
    after = time.time_ns()
    margin = 1_000_000_000  # clocks are set now and then
    table = loader.provenance.to_numpy()
    assert (table["start_ns"] > before - margin).all()
    assert (table["start_ns"] + table["fetch_ns"] < after + margin).all()
    record = loader.provenance.batch(1)
    assert record.start_ns == table["start_ns"][2]


@pytest.mark.parametrize("dataset", [Sleeps(), SleepsTogether()])
def test_fetch_times_are_those_of_the_samples(dataset: Any) -> None:
    loader = loaded(dataset, batch_size=2)
    record = loader.last_batch
    assert record is not None
    assert min(record.fetch_ns) >= 2_000_000
    assert record.wait_ns >= sum(record.fetch_ns) + record.collate_ns
    if isinstance(dataset, SleepsTogether):
        assert record.fetch_ns[0] == record.fetch_ns[1]
    else:
        first, second = loader.provenance.to_numpy()
        assert second["start_ns"] == first["start_ns"] + first["fetch_ns"]


def test_collation_is_timed_apart_from_fetching() -> None:
    dataset = Sleeps()
    loader = loaded(list(range(2)), batch_size=2, collate_fn=lambda samples: dataset[0])
    assert loader.last_batch is not None
    record = loader.last_batch
    assert record.collate_ns >= 2_000_000
    assert record.wait_ns >= sum(record.fetch_ns) + record.collate_ns


# ── the table ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", WORKERS)
def test_a_row_for_every_sample(workers: int) -> None:
    loader = loaded(list(range(7)), epochs=2, batch_size=3, num_workers=workers)
    table = loader.provenance.to_numpy()
    assert table.dtype.names == COLUMNS
    assert all(table.dtype[name] == np.int64 for name in COLUMNS)
    assert table.shape == (14,)
    assert len(loader.provenance) == 14
    assert table["epoch"].tolist() == [0] * 7 + [1] * 7
    assert table["batch"].tolist() == [0, 0, 0, 1, 1, 1, 2] * 2
    assert table["position"].tolist() == [0, 1, 2, 0, 1, 2, 0] * 2
    assert table["index"].tolist() == [*range(7)] * 2
    wanted = [0, 0, 0, 1, 1, 1, 0] if workers else [-1] * 7
    assert table["worker_id"].tolist() == wanted * 2
    assert len(set(table["pid"].tolist())) == (4 if workers else 1)


def test_an_empty_table_has_its_columns_too() -> None:
    table = SafeDataLoader([1]).provenance.to_numpy()
    assert (table.shape, table.dtype.names) == ((0,), COLUMNS)
    assert len(SafeDataLoader([1]).provenance) == 0


def test_repr_says_how_much_there_is() -> None:
    assert repr(loaded(list(range(5))).provenance).startswith("Provenance(5 samples, Recorder(")


@pytest.mark.parametrize(
    "indices",
    [
        ["a", "b", "a"],
        [(0, 1), (2, 3)],
        [1, "x", None],
        [2**70],
        [("crop", (1, 2)), ("flip", None)],
    ],
)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_indices_that_are_not_ints_are_objects(indices: list[Any], batch_size: int | None) -> None:
    loader = loaded(TakesAnyIndex(), sampler=indices, batch_size=batch_size)
    table = loader.provenance.to_numpy()
    assert table.dtype["index"].hasobject
    assert table["index"].tolist() == indices
    assert table["epoch"].dtype == np.int64
    assert loader.last_batch is not None
    assert loader.last_batch.indices[-1] == indices[-1]


def test_ints_and_names_in_one_table() -> None:
    recorder = Recorder()
    loaded(TakesAnyIndex(), sampler=[3, 4], recorder=recorder)
    loader = loaded(TakesAnyIndex(), sampler=["a"], recorder=recorder)
    assert loader.provenance.to_numpy()["index"].tolist() == [3, 4, "a"]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("batch_size", [None, 3])
def test_samples_of_a_stream_are_numbered_within_it(workers: int, batch_size: int | None) -> None:
    loader = loaded(datasets.Stream(11), batch_size=batch_size, num_workers=workers)
    table = loader.provenance.to_numpy()
    assert table.dtype["index"] == np.int64
    streams = {0: [*range(6)], 1: [*range(5)]} if workers else {-1: [*range(11)]}
    for worker, ordinals in streams.items():
        assert sorted(table["index"][table["worker_id"] == worker].tolist()) == ordinals
    assert loader.last_batch is not None
    assert all(type(pair) is tuple and len(pair) == 2 for pair in loader.last_batch.indices)
    (row,) = loader.provenance.lookup((0, 4))
    assert row["index"] == 4
    assert loader.provenance.lookup((0, 40)).size == 0


def test_a_list_of_indices_without_batching_is_a_row_each() -> None:
    loader = loaded(datasets.Bulk(9), batch_size=None, sampler=[[3, 4], [5]])
    assert loader.provenance.to_numpy()["index"].tolist() == [3, 4, 5]
    assert loader.provenance.to_numpy()["position"].tolist() == [0, 1, 0]


# ── looking up ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("spelled", [3, np.int64(3), torch.tensor(3), np.array(3)])
def test_lookup_finds_every_delivery_of_an_index(spelled: Any) -> None:
    loader = loaded(list(range(5)), epochs=2, batch_size=3, sampler=[3, 0, 3, 4, 3])
    rows = loader.provenance.lookup(spelled)
    found = list(zip(rows["epoch"], rows["batch"], rows["position"], strict=True))
    assert found == [(0, 0, 0), (0, 0, 2), (0, 1, 1), (1, 0, 0), (1, 0, 2), (1, 1, 1)]
    assert set(rows["index"].tolist()) == {3}


@pytest.mark.parametrize("absent", [17, -1, "a", None, (0, 1), [1], 2.5])
def test_lookup_of_what_was_not_delivered_is_empty(absent: Any) -> None:
    rows = loaded(list(range(5))).provenance.lookup(absent)
    assert (rows.shape, rows.dtype.names) == ((0,), COLUMNS)


def test_lookup_of_names_and_pairs() -> None:
    loader = loaded(TakesAnyIndex(), sampler=["a", ("b", 1), "c"])
    assert loader.provenance.lookup("c")["batch"].tolist() == [2]
    assert loader.provenance.lookup(("b", 1))["batch"].tolist() == [1]
    assert loader.provenance.lookup(["b", 1])["index"].tolist() == [("b", 1)]


def test_batch_by_its_number() -> None:
    loader = loaded(list(range(10)), epochs=3, batch_size=4)
    provenance = loader.provenance
    assert provenance.batch(1).indices == (4, 5, 6, 7)
    assert (provenance.batch(1).epoch, provenance.batch(1, epoch=1).epoch) == (2, 1)
    assert provenance.batch(2, epoch=0).indices == (8, 9)


@pytest.mark.parametrize(
    ("number", "epoch", "at"),
    [
        (3, None, "batch 3 of the newest epoch"),
        (0, 7, "batch 0 of epoch 7"),
        (-1, None, "batch -1 of the newest epoch"),
        (0, -1, "batch 0 of epoch -1"),
    ],
)
def test_a_batch_that_is_not_there(number: int, epoch: int | None, at: str) -> None:
    loader = loaded(list(range(10)), epochs=2, batch_size=4)
    with pytest.raises(LookupError) as info:
        loader.provenance.batch(number, epoch)
    said = str(info.value)
    assert f"there is no record of {at}" in said
    assert "holds Recorder(6 batches of 2 epochs" in said
    assert "count from 0" in said
    assert "Recorder(max_bytes=...)" in said


def test_a_batch_before_the_first_epoch_and_one_forgotten() -> None:
    with pytest.raises(LookupError):
        SafeDataLoader([1]).provenance.batch(0)
    loader = loaded(list(range(100)), recorder=Recorder(max_bytes=5_000))
    assert loader.provenance.batch(99).indices == (99,)
    with pytest.raises(LookupError, match="no record of batch 0"):
        loader.provenance.batch(0)


# ── files ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=["ints", "names"])
def provenance(request: pytest.FixtureRequest) -> Any:
    if request.param == "ints":
        return loaded(list(range(5)), epochs=2, batch_size=2).provenance
    indices = ["a", 'with "quotes", and a comma', ("b", 1), "ünïcode ∆", 7]
    return loaded(TakesAnyIndex(), sampler=indices, batch_size=2).provenance


def as_text(index: Any) -> str:
    return index if isinstance(index, str) else repr(index)


@pytest.mark.parametrize("name", ["table.npy", "TABLE.NPY"])
def test_npy_needs_no_unpickling(provenance: Any, tmp_path: Path, name: str) -> None:
    provenance.save(tmp_path / name)
    table = np.load(tmp_path / name, allow_pickle=False)
    expected = provenance.to_numpy()
    assert table.dtype.names == COLUMNS
    for column in COLUMNS:
        wanted = expected[column].tolist()
        if column == "index" and expected.dtype["index"].hasobject:
            wanted = [as_text(index) for index in wanted]
        assert table[column].tolist() == wanted


def test_csv(provenance: Any, tmp_path: Path) -> None:
    provenance.save(str(tmp_path / "table.csv"))
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS
    expected = [[str(value) for value in row] for row in provenance.to_numpy().tolist()]
    assert rows == expected


@pytest.fixture
def ascii_locale() -> Iterator[None]:
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    yield
    locale.setlocale(locale.LC_CTYPE, before)


@pytest.mark.usefixtures("ascii_locale")
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_files_are_utf8_whatever_the_locale(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"table{suffix}"
    loaded(TakesAnyIndex(), sampler=["ünïcode ∆"]).provenance.save(path)
    text = path.read_bytes().decode("utf-8")
    assert ("ünïcode ∆" if suffix == ".csv" else json.dumps("ünïcode ∆")) in text


def test_jsonl(provenance: Any, tmp_path: Path) -> None:
    provenance.save(tmp_path / "table.jsonl")
    lines = (tmp_path / "table.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [tuple(row) for row in rows] == [COLUMNS] * len(provenance)
    expected = provenance.to_numpy().tolist()
    wanted = [[list(v) if isinstance(v, tuple) else v for v in row] for row in expected]
    assert [list(row.values()) for row in rows] == wanted


def test_parquet(provenance: Any, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    provenance.save(tmp_path / "table.parquet")
    columns = parquet.read_table(tmp_path / "table.parquet").to_pydict()
    assert tuple(columns) == COLUMNS
    expected = provenance.to_numpy()
    named = expected.dtype["index"].hasobject
    for column in COLUMNS:
        wanted = expected[column].tolist()
        text = named and column == "index"
        assert columns[column] == ([as_text(index) for index in wanted] if text else wanted)


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".jsonl"])
@pytest.mark.parametrize("empty", [True, False])
def test_streams_and_empty_tables_can_be_saved(suffix: str, empty: bool, tmp_path: Path) -> None:
    loader = SafeDataLoader(datasets.Stream(5)) if empty else loaded(datasets.Stream(5))
    path = tmp_path / f"table{suffix}"
    loader.provenance.save(path)
    rows = 0 if empty else 5
    if suffix == ".npy":
        assert np.load(path, allow_pickle=False).size == rows
    else:
        assert len(path.read_text().splitlines()) == rows + (suffix == ".csv")


def test_an_empty_table_is_saved_as_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    SafeDataLoader([1]).provenance.save(tmp_path / "table.parquet")
    assert parquet.read_table(tmp_path / "table.parquet").num_rows == 0


class Odd:
    """An index with a text, an equality and a hash of its own that no file format knows."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Odd)

    def __hash__(self) -> int:
        return 1

    def __repr__(self) -> str:
        return "Odd()"


@pytest.mark.parametrize(
    "index",
    [Odd(), b"\xff\x00", 2j, frozenset([1]), None, ""],
    ids=lambda index: type(index).__name__,
)
def test_odd_indices_are_written_as_text(index: Any, tmp_path: Path) -> None:
    provenance = loaded(TakesAnyIndex(), sampler=[index], batch_size=1).provenance
    provenance.save(tmp_path / "table.npy")
    wanted = f"<{__name__}.Odd>" if type(index) is Odd else as_text(index)
    assert np.load(tmp_path / "table.npy", allow_pickle=False)["index"].tolist() == [wanted]
    provenance.save(tmp_path / "table.csv")
    provenance.save(tmp_path / "table.jsonl")
    assert len((tmp_path / "table.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("name", ["table.txt", "table", "table.json", "table.npy.gz", ""])
def test_another_suffix_is_refused_with_those_that_work(name: str, tmp_path: Path) -> None:
    provenance = loaded([1]).provenance
    path = tmp_path / name
    with pytest.raises(ValueError, match=r"\.npy, \.csv, \.jsonl or \.parquet") as info:
        provenance.save(path)
    assert repr(str(path)) in str(info.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".jsonl"])
def test_a_file_that_cannot_be_written_is_an_os_error(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        loaded([1]).provenance.save(tmp_path / "no such folder" / f"table{suffix}")


def test_parquet_without_pyarrow_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real_import = builtins.__import__

    def without_pyarrow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    provenance = loaded([1]).provenance
    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(ImportError, match=r"pip install 'safeloader\[parquet\]'"):
        provenance.save(tmp_path / "table.parquet")


class SleepsLonger:
    """Sample k takes k + 1 times 2 ms; those in ``bad`` fail after it."""

    def __init__(self, bad: tuple[int, ...]) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        until = time.perf_counter_ns() + (index + 1) * 2_000_000
        while time.perf_counter_ns() < until:
            pass
        if index in self.bad:
            raise ValueError(f"no sample {index}")
        return index


def stamped(*incidents: SampleIncident, lent: int = 0) -> Delivery:
    """A batch of indices 10 to 13 whose fetches took 1, 2, 3, 4 (and 5) ns; collation 100."""
    ends = [1000, 1001, 1003, 1006, 1010, 1015][: 5 + lent]
    stamps = np.array([*ends, ends[-1] + 100], dtype=np.int64).tobytes()
    manifest = BatchManifest(
        0, 0, 1, pack([10, 11, 12, 13]), None, None, stamps, False, None, incidents
    )
    return Delivery(0, 0, 5, 0, manifest)


def as_it_was_drawn(*stamps: int, at_once: bool = False, size: int = 4) -> Delivery:
    manifest = stamped().manifest._replace(
        indices=pack(list(range(size))),
        worker_id=3,
        stamps=np.array(stamps, dtype=np.int64).tobytes(),
        fetched_at_once=at_once,
        incidents=None,
    )
    return Delivery(0, 0, 5, 0, manifest)


@pytest.mark.parametrize("at_once", [True, False])  # not told, as with batch_size=None
def test_samples_fetched_in_one_call_have_equal_shares(at_once: bool) -> None:
    record = record_of(as_it_was_drawn(1000, 1009, 1109, at_once=at_once))
    assert (record.worker_id, record.fetch_ns, record.collate_ns) == (3, (2,) * 4, 100)
    assert record.start_ns == 1000 + UNIX_OFFSET_NS
    one = record_of(as_it_was_drawn(1000, 1009, 1109, at_once=True, size=1))
    assert one.fetch_ns == (9,)


def test_a_batch_of_a_stream_without_samples_has_no_rows() -> None:
    delivery = as_it_was_drawn(1000, 1000, 1100, size=0)
    manifest = delivery.manifest._replace(ordinal=4, samples=0)
    record = record_of(delivery._replace(manifest=manifest))
    assert (record.indices, record.fetch_ns, record.start_ns) == ((), (), 0)
    recorder = Recorder()
    recorder.delivered(0, 0, 5, manifest)
    table = Provenance(recorder).to_numpy()
    assert (len(Provenance(recorder)), table.size, table.dtype["index"]) == (0, 0, np.int64)


def test_a_batch_of_which_every_sample_was_skipped_has_no_rows() -> None:
    delivery = stamped(*(SampleIncident("skipped", k, "why") for k in range(4)))
    record = record_of(delivery)
    assert (record.indices, record.fetch_ns, record.collate_ns) == ((), (), 100)


def test_ints_beside_skipped_samples_stay_ints_in_the_table() -> None:
    recorder = Recorder()
    recorder.delivered(0, 0, 5, stamped(SampleIncident("skipped", 1, "why")).manifest)
    table = Provenance(recorder).to_numpy()
    assert table.dtype["index"] == np.int64
    assert table["index"].tolist() == [10, 12, 13]


def test_an_empty_batch_has_no_start() -> None:
    record = record_of(as_it_was_drawn(1000, 1009, 1109, at_once=True, size=0))
    assert (record.indices, record.fetch_ns, record.start_ns) == ((), (), 0)


def test_the_table_names_the_worker() -> None:
    recorder = Recorder()
    *_, manifest = as_it_was_drawn(1000, 1001, 1003, 1006, 1010, 1100)
    recorder.delivered(0, 0, 5, manifest)
    recorder.delivered(0, 1, 5, manifest._replace(worker_id=None))
    table = Provenance(recorder).to_numpy()
    assert table["worker_id"].tolist() == [3] * 4 + [-1] * 4
    assert table["fetch_ns"].tolist() == [1, 2, 3, 4] * 2
    assert (table["start_ns"] - UNIX_OFFSET_NS).tolist() == [1000, 1001, 1003, 1006] * 2
    assert len(Provenance(recorder)) == 8


def test_long_names_are_saved_whole(tmp_path: Path) -> None:
    name = "a" * 300
    loader = loaded(TakesAnyIndex(), sampler=[name, ("b", name)])
    loader.provenance.save(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        saved = [row["index"] for row in csv.DictReader(file)]
    assert saved == [name, repr(("b", name))]


def test_times_of_a_batch_with_skipped_samples_are_those_of_the_samples_in_it() -> None:
    record = record_of(
        stamped(SampleIncident("skipped", 0, "why"), SampleIncident("skipped", 2, "why"))
    )
    assert (record.indices, record.fetch_ns, record.collate_ns) == ((11, 13), (2, 4), 100)
    assert record.start_ns == 1001 + UNIX_OFFSET_NS


def test_times_of_a_replaced_sample_are_its_donors() -> None:
    record = record_of(
        stamped(SampleIncident("replaced", 1, "why", 2), SampleIncident("late", 3, "why"))
    )
    assert (record.indices, record.fetch_ns) == ((10, 12, 12, 13), (1, 3, 3, 4))


def test_times_where_one_drawn_earlier_stands_in() -> None:
    gone = [SampleIncident("replaced", k, "why", 4, (7,)) for k in range(4)]
    record = record_of(stamped(*gone, lent=1))
    assert (record.indices, record.fetch_ns, record.collate_ns) == ((7,) * 4, (5,) * 4, 100)
    assert record.start_ns == 1010 + UNIX_OFFSET_NS


@pytest.mark.parametrize("workers", WORKERS)
def test_fetch_times_beside_skipped_samples_go_with_their_indices(workers: int) -> None:
    loader = loaded(SleepsLonger((0, 2)), batch_size=4, num_workers=workers, on_error="skip")
    first, second = loader.provenance.to_numpy()
    assert (first["index"], second["index"]) == (1, 3)
    assert first["fetch_ns"] >= 4_000_000
    assert second["fetch_ns"] >= 8_000_000
    assert second["start_ns"] >= first["start_ns"] + first["fetch_ns"] + 6_000_000


def test_samples_before_a_failing_one_keep_their_times_in_a_batch_of_thousands() -> None:
    """Too large for the stamps in shared memory."""
    size = 4200
    loader = loaded(FailsAt(size - 1, size), batch_size=size, num_workers=1, on_error="skip")
    table = loader.provenance.to_numpy()
    assert table["index"].tolist() == list(range(size - 1))
    assert (np.diff(table["start_ns"]) > 0).all()
    assert (table["fetch_ns"] > 0).all()


class FailsAt(TakesAnyIndex):
    def __init__(self, bad: int, length: int) -> None:
        super().__init__(length)
        self.bad = bad

    def __getitem__(self, index: int) -> str:
        if index == self.bad:
            raise ValueError
        return super().__getitem__(index)
