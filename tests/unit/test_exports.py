"""``loader.provenance`` as other libraries take it, each with the real library."""

from __future__ import annotations

import builtins
import itertools
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import ConcatDataset, Subset

from safeloader import Recorder, SafeDataLoader
from safeloader.delivery.audit import EpochAudit
from safeloader.delivery.indices import pack
from safeloader.delivery.manifest import BatchManifest, SampleIncident
from safeloader.provenance import columns
from safeloader.provenance.slowest import SlowSample
from safeloader.provenance.table import Provenance
from tests import datasets

NAMES = ["epoch", "batch", "position", "index", "worker_id", "pid", "start_ns", "fetch_ns"]


class AnyIndex:
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: Any) -> int:
        return 0


class SomeFail(AnyIndex):
    def __getitem__(self, index: Any) -> int:
        if index in (2, 7):
            raise ValueError(f"no sample {index}")
        return 0


def provenance_of(dataset: Any, epochs: int = 2, **arguments: Any) -> Provenance:
    loader = SafeDataLoader(dataset, **arguments)
    for _ in range(epochs):
        for _ in loader:
            pass
    return loader.provenance


def tables() -> dict[str, Provenance]:
    """Of every kind that is decoded in a way of its own."""
    mixed = Recorder()
    for dataset, how in (
        (range(7), {"batch_size": 3}),
        (datasets.Together(7), {"batch_size": 3}),
        (AnyIndex(), {"sampler": ["a", ("b", 1), 5]}),
        (SomeFail(), {"batch_size": 4, "on_error": "replace", "max_skipped": 9}),
        (SomeFail(), {"batch_size": 4, "on_error": "skip", "max_skipped": 9}),
        (datasets.Stream(5), {"batch_size": 2}),
    ):
        list(SafeDataLoader(dataset, recorder=mixed, **how))  # type: ignore[arg-type]  # no Dataset
    return {
        "ints": provenance_of(range(23), batch_size=4, shuffle=True),
        "objects": provenance_of(AnyIndex(), sampler=["a", ("b", 1), 5], batch_size=2),
        "stream": provenance_of(datasets.Stream(5), batch_size=2),
        "subset": provenance_of(Subset(range(20), [7, 3, 9]), batch_size=2),  # type: ignore[arg-type]  # no Dataset
        "mixed": Provenance(mixed),
        "empty": SafeDataLoader([1]).provenance,
    }


TABLES = tables()


@pytest.fixture(params=TABLES)
def provenance(request: pytest.FixtureRequest) -> Provenance:
    return TABLES[request.param]


def by_hand(provenance: Provenance) -> list[list[Any]]:
    """The rows by their batches' records, one batch at a time."""
    rows: list[list[Any]] = []
    for delivery in provenance._recorder.deliveries():
        record = provenance.batch(delivery.batch, delivery.epoch)
        assert len(record.indices) == len(record.fetch_ns)
        at_ns = record.start_ns
        for position, (index, fetch_ns) in enumerate(
            zip(record.indices, record.fetch_ns, strict=True)
        ):
            worker = -1 if record.worker_id is None else record.worker_id
            shown = index[1] if delivery.manifest.ordinal is not None else index
            rows.append(
                [record.epoch, record.batch, position, shown, worker, record.pid, at_ns, fetch_ns]
            )
            together = columns.fetched_together(delivery.manifest, len(record.indices))
            at_ns += 0 if together else fetch_ns
    return rows


def plain(provenance: Provenance) -> list[list[Any]]:
    return [list(row) for row in provenance.to_numpy()[NAMES].tolist()]


def test_many_batches_at_once_are_what_each_is_by_itself(provenance: Provenance) -> None:
    left_out = [d.manifest.incidents for d in provenance._recorder.deliveries()]
    rows, wanted = plain(provenance), by_hand(provenance)
    if any(left_out):  # of these the start is not where the one before ended
        rows, wanted = ([row[:6] + row[7:] for row in each] for each in (rows, wanted))
    assert rows == wanted


def test_fetch_times_alone_are_those_of_the_table(provenance: Provenance) -> None:
    found = columns.fetches_of(provenance._recorder.deliveries())
    assert found.tolist() == provenance.to_numpy()["fetch_ns"].tolist()


@pytest.mark.parametrize("rows", [1, 3, 10**6])
def test_parts_are_the_whole(
    provenance: Provenance, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = provenance.to_numpy()
    monkeypatch.setattr(columns, "CHUNK_ROWS", rows)
    assert [row.tolist() for row in provenance] == whole.tolist()
    assert len(provenance) == whole.size


def test_a_row_is_read_by_name() -> None:
    first = next(iter(TABLES["subset"]))
    assert (first["index"], first["under_index"], first["position"]) == (0, 7, 0)


def test_numpy_takes_it_as_it_is(provenance: Provenance) -> None:
    table = provenance.to_numpy()
    assert np.asarray(provenance).dtype == table.dtype
    assert np.array(provenance).tolist() == table.tolist()
    numbers = np.asarray(provenance, dtype=object)
    assert numbers.dtype == object
    with pytest.raises(ValueError, match="uncopied"):
        provenance.__array__(copy=False)


def as_text(rows: list[list[Any]]) -> list[list[Any]]:
    """With indices as Arrow has them, where one is no int."""
    if all(type(row[3]) is int for row in rows):
        return rows
    return [[*row[:3], columns.text_of_index(row[3]), *row[4:]] for row in rows]


def test_pyarrow_takes_it_as_it_is(provenance: Provenance) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table(provenance)
    assert table.column_names == list(provenance.to_numpy().dtype.names or ())
    rows = [[row[name] for name in NAMES] for row in table.to_pylist()]
    assert rows == as_text(plain(provenance))
    reader = pyarrow.RecordBatchReader.from_stream(provenance)
    assert reader.read_all() == table


def test_polars_takes_it_as_it_is(provenance: Provenance) -> None:
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(provenance)
    assert [list(row) for row in frame.select(NAMES).rows()] == as_text(plain(provenance))


def test_duckdb_takes_it_as_it_is(provenance: Provenance) -> None:
    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect() as connection:
        columns_ = ", ".join(NAMES)
        rows = connection.sql(f"select {columns_} from provenance").fetchall()
        count = connection.sql("select count(*), max(batch) from provenance").fetchall()
    assert [list(row) for row in rows] == as_text(plain(provenance))
    batches = [row[1] for row in rows]
    assert count == [(len(provenance), max(batches, default=None))]


def test_pandas_takes_it_as_it_is(provenance: Provenance) -> None:
    pandas = pytest.importorskip("pandas")
    rows = plain(provenance)
    frame = provenance.to_pandas()
    assert frame[NAMES].values.tolist() == rows
    assert list(frame.columns) == list(provenance.to_numpy().dtype.names or ())
    assert (frame["fetch_ns"].dtype, frame["epoch"].dtype) == (np.int64, np.int64)
    if hasattr(pandas.DataFrame, "from_arrow"):  # from 3.0 on
        pytest.importorskip("pyarrow")
        assert pandas.DataFrame.from_arrow(provenance)[NAMES].values.tolist() == as_text(rows)


def test_arrow_is_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    monkeypatch.setattr(columns, "CHUNK_ROWS", 5)
    reader = pyarrow.RecordBatchReader.from_stream(TABLES["mixed"])
    sizes = [batch.num_rows for batch in reader]
    assert len(sizes) > 3
    assert sum(sizes) == len(TABLES["mixed"])


@pytest.mark.parametrize(
    ("library", "ask"),
    [
        ("pyarrow", lambda provenance: provenance.__arrow_c_stream__()),
        ("pandas", lambda provenance: provenance.to_pandas()),
    ],
)
def test_without_the_library_one_sentence_says_what_to_install(
    library: str, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == library:
            raise ImportError(name)
        return stock(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install") as info:
        ask(TABLES["ints"])
    assert library in str(info.value)
    assert "\n" not in str(info.value)


# ── the slowest ──────────────────────────────────────────────────────────────────────────────────


def written(epochs: list[dict[Any, int]], **fields: Any) -> Provenance:
    """A notebook in which each epoch is one batch; of each index the time in ns."""
    recorder = Recorder()
    for times in epochs:
        epoch = recorder.begin_epoch(EpochAudit)
        stamps = np.cumsum([0, *times.values(), 0]).astype(np.int64)
        manifest = BatchManifest(
            epoch, None, 1, pack(list(times)), len(times), stamps=stamps.tobytes()
        )
        recorder.delivered(epoch, 0, 0, manifest._replace(**fields))
    return Provenance(recorder)


@pytest.mark.parametrize("name", [int, str, lambda k: (k, "b")])
def test_the_median_over_the_epochs_decides(name: Any) -> None:
    a, b, c = name(1), name(2), name(3)
    found = written(
        [{a: 10, b: 900, c: 500}, {c: 501, a: 20, b: 2}, {b: 3, c: 400, a: 30}]
    ).slowest(2)
    assert found == [SlowSample(c, 500, 501, 3), SlowSample(a, 20, 30, 3)]


def test_of_two_epochs_it_is_the_mean_of_both_and_of_one_the_time_itself() -> None:
    found = written([{1: 10, 2: 7}, {1: 20}]).slowest()
    assert found == [SlowSample(1, 15, 20, 2), SlowSample(2, 7, 7, 1)]


def test_samples_of_a_stream_are_told_by_worker_and_ordinal() -> None:
    recorder = Recorder()
    recorder.begin_epoch(EpochAudit)
    for batch, (worker, times) in enumerate([(0, [10, 20]), (1, [90, 30])]):
        stamps = np.cumsum([0, *times, 0]).astype(np.int64).tobytes()
        manifest = BatchManifest(batch, worker, 1, b"", 2, ordinal=0, stamps=stamps)
        recorder.delivered(0, batch, 0, manifest)
    assert [each.index for each in Provenance(recorder).slowest(3)] == [(1, 0), (1, 1), (0, 1)]


def test_a_donor_is_told_under_its_own_index() -> None:
    late = (SampleIncident("replaced", 0, "why", donor=1),)
    found = written([{5: 100, 6: 40}], incidents=late).slowest()
    assert found == [SlowSample(6, 40, 40, 2)]


def test_under_a_subset_both_indices_are_told() -> None:
    inner: Any = range(20)
    found = provenance_of(Subset(inner, [7, 3])).slowest()
    assert {(each.index, each.under_index) for each in found} == {(0, 7), (1, 3)}
    parts: Any = ConcatDataset([inner, inner])  # type: ignore[list-item]  # no Dataset
    found = provenance_of(Subset(parts, [7, 23])).slowest()
    assert {(each.index, each.under_index, each.under_part) for each in found} == {
        (0, 7, 0),
        (1, 3, 1),
    }
    assert any("(3 of part 1)" in str(each) for each in found)


def test_an_index_of_two_subsets_is_two_samples() -> None:
    inner: Any = range(20)
    recorder = Recorder()
    for chosen in ([7, 3], [9, 3]):
        list(SafeDataLoader(Subset(inner, chosen), recorder=recorder))
    times = {each.under_index: each.times for each in Provenance(recorder).slowest()}
    assert times == {7: 1, 9: 1, 3: 2}


class SlowAt(AnyIndex):
    def __getitem__(self, index: Any) -> int:
        until_ns = time.perf_counter_ns() + 20_000_000 * (index == 4)
        while time.perf_counter_ns() < until_ns:
            pass
        return 0


def test_the_slow_sample_of_a_loader_is_first() -> None:
    first, *rest = provenance_of(SlowAt(), epochs=5, batch_size=4, shuffle=True).slowest(3)
    assert (first.index, first.times, len(rest)) == (4, 5, 2)
    assert first.longest_ns >= first.median_ns >= 20_000_000
    assert str(first).startswith(f"index 4: {first.median_ns / 1e6:.3f} ms (median of 5, longest ")


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "3"])
def test_a_number_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="n must be a positive int"):
        TABLES["ints"].slowest(bad)


def test_nothing_is_slow_where_nothing_came() -> None:
    assert TABLES["empty"].slowest() == []


# ── the record of a batch ────────────────────────────────────────────────────────────────────────


def test_a_record_is_printed_on_one_line_however_large() -> None:
    loader = SafeDataLoader(list(range(2000)), batch_size=1000)
    list(loader)
    shown = repr(loader.last_batch)
    assert shown == str(loader.last_batch)
    assert len(shown) < 400
    assert "\n" not in shown
    assert shown.startswith("BatchRecord(epoch=0, batch=1, worker_id=None, pid=")
    assert "indices=[1000, 1001, 1002, 1003" in shown
    assert "1000 in all]" in shown
    assert pickle.loads(pickle.dumps(loader.last_batch)) == loader.last_batch


def test_a_record_names_no_sample_where_one_call_fetched_all() -> None:
    loader = SafeDataLoader(datasets.Together(4), batch_size=4)
    list(loader)
    assert "ms (index " not in repr(loader.last_batch)


def test_a_record_of_nothing_can_be_printed() -> None:
    record = TABLES["ints"].batch(0)
    blank = type(record)(0, 0, (), None, 1, (), 0, 0, 0)
    assert "indices=[]" in repr(blank)


def test_all_kinds_are_among_the_tables() -> None:
    kinds = [d.manifest for d in TABLES["mixed"]._recorder.deliveries()]
    assert {type(each.indices) for each in kinds} == {bytes, tuple}
    assert any(each.fetched_at_once for each in kinds)
    assert any(each.ordinal is not None for each in kinds)
    assert any(each.incidents for each in kinds)
    assert len(list(itertools.groupby(kinds, lambda each: each.ordinal is None))) == 2


def test_an_index_that_utf_8_cannot_hold_is_exported_all_the_same(tmp_path: Path) -> None:
    import pyarrow as pa

    class Anything(list[int]):
        def __getitem__(self, index: Any) -> int:  # type: ignore[override]
            return 1

    loader = SafeDataLoader(Anything([0, 1]), 2, sampler=["a\udcff", "b"])
    list(loader)
    assert pa.table(loader.provenance)["index"].to_pylist() == ["a\\udcff", "b"]
    loader.provenance.save(tmp_path / "it.csv")
    assert "a\\udcff" in (tmp_path / "it.csv").read_text("utf-8")
