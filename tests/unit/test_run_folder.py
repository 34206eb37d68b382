"""What a loader writes into the folder of a run, and what is read of it at any moment."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import resource
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from safeloader import Recorder, SafeDataLoader
from safeloader.provenance import batch_log, run_folders, run_format
from safeloader.provenance.open_folder import OpenFolder
from safeloader.provenance.run_folder import LoaderFolder
from safeloader.report.run import NotARunFolder, RunFolder


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has written no run; what it wrote is closed as at its end."""
    for name in ("SAFELOADER_ATTEMPT", "SAFELOADER_RUN", "SAFELOADER_RUN_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(run_folders, "_process", run_folders._Process())
    monkeypatch.setattr(run_folders.atexit, "register", lambda function: None)
    yield
    run_folders._close()


class Named:
    """Samples that have a file each; some fail."""

    def __init__(self, size: int = 20, bad: tuple[int, ...] = ()) -> None:
        self.files = [f"{k}.png" for k in range(size)]
        self.bad = bad

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> int:
        if index in self.bad:
            raise ValueError(f"bad file {self.files[index]}")
        return 1


class AtOnce(Named):
    def __getitems__(self, indices: list[int]) -> list[int]:
        return [1] * len(indices)


class Any_(Named):
    def __getitem__(self, index: Any) -> int:
        return 1


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


def loader_of(dataset: Any, run: Path | None, size: int = 4, **more: Any) -> Any:
    return SafeDataLoader(dataset, size, run_dir=run, **more)


LOADERS: dict[str, Callable[[Path], Any]] = {
    "ints": lambda run: loader_of(Named(), run, shuffle=True),
    "one by one": lambda run: loader_of(Named(), run, 1),
    "at once": lambda run: loader_of(AtOnce(), run),
    "texts": lambda run: loader_of(Any_(), run, sampler=["a", "b", "çé", "d", "e" * 50]),
    "some texts": lambda run: loader_of(Any_(), run, 2, sampler=["a", 7, 2, 3, ("p", 1), 1 << 70]),
    "a stream": lambda run: loader_of(Stream(), run),
    "skips": lambda run: loader_of(Named(bad=(3, 8)), run, on_error="skip", shuffle=True),
    "replaced": lambda run: loader_of(Named(bad=(3, 8)), run, on_error="replace"),
    "batches of any size": lambda run: loader_of(
        Named(), run, 1, batch_sampler=[[1], [2, 3, 4], [], [5, 6], [7, 8]], collate_fn=len
    ),
    "larger than the tail": lambda run: loader_of(Named(80_000), run, 40_000),
}


def rows_read(run: Path) -> list[tuple[Any, ...]]:
    """As ``Provenance.to_numpy`` has them, but for the time of a fetch."""
    rows = []
    for row in RunFolder(run).batches().to_pylist():
        indices = row["indices"] if row["index_text"] is None else row["index_text"]
        for position, index in enumerate(indices):
            place = row["epoch"], row["batch"], position, index, row["worker"], row["pid"]
            rows.append((*place, row["fetch_ns"][position]))
    return rows


def assert_the_same(run: Path, loader: Any) -> None:
    table = loader.provenance.to_numpy()
    found = rows_read(run)
    assert len(found) == len(table)
    for mine, row in zip(found, table.tolist(), strict=True):
        *place, index, worker, pid, _, fetch_ns = row
        expected = index if type(index) is type(mine[3]) else repr(index)
        assert mine[:6] == (*place, expected, worker, pid)
        assert abs(mine[6] - fetch_ns) <= fetch_ns / 250


@pytest.mark.parametrize("kind", LOADERS)
def test_at_any_moment_the_reader_has_what_the_notebook_has(kind: str, tmp_path: Path) -> None:
    loader = LOADERS[kind](tmp_path)
    for _ in loader:
        pass
    assert_the_same(tmp_path, loader)  # in the tail
    (folder,) = run_folders._process.folders
    assert folder.batches is not None
    folder.batches.flush(0)
    for _ in loader:
        pass
    assert_the_same(tmp_path, loader)  # in the stream, and in the tail
    assert RunFolder(tmp_path).loaders[0].state == "running"
    run_folders._close()
    (its,) = RunFolder(tmp_path).loaders
    assert its.state == "ended"
    assert list(tmp_path.rglob("batches-*.parquet"))
    assert not list(tmp_path.rglob("batches-*.arrows"))
    assert_the_same(tmp_path, loader)  # in Parquet
    assert RunFolder(tmp_path).notes == []


# ── what is torn ─────────────────────────────────────────────────────────────────────────────────


def tail_of(run: Path) -> Path:
    (path,) = run.glob("attempt=0/rank=0/*/tail")
    return path


@pytest.fixture(scope="module")
def whole_tail(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A tail of many kinds of records."""
    run = tmp_path_factory.mktemp("whole")
    recorder = Recorder()
    before, run_folders._process = run_folders._process, run_folders._Process()
    for kind in ("ints", "at once", "some texts", "a stream", "skips"):
        loader = LOADERS[kind](run)
        loader.recorder = recorder
        list(loader)
    whole = tail_of(run).read_bytes()
    run_folders._process = before
    os.environ.pop("SAFELOADER_ATTEMPT", None)
    return whole


@given(st.data())
def test_of_a_tail_that_is_cut_anywhere_the_first_rows_are_read(
    whole_tail: bytes, data: st.DataObject
) -> None:
    used = run_format.CELL.unpack_from(whole_tail, run_format.USED_AT)[0]
    whole = run_format.parse_tail(whole_tail).batches
    cut = data.draw(st.integers(run_format.FIRST, used - 1))
    found = run_format.parse_tail(whole_tail[:cut])
    assert "cut short" in found.torn or "torn" in found.torn
    rows = len(found.batches.sizes)
    assert rows < len(whole.sizes)
    assert (found.batches.fixed == whole.fixed[:rows]).all()
    assert (found.batches.indices == whole.indices[: found.batches.sizes.sum()]).all()


@given(st.data())
def test_a_tail_that_something_wrote_over_raises_nothing(
    whole_tail: bytes, data: st.DataObject
) -> None:
    used = run_format.CELL.unpack_from(whole_tail, run_format.USED_AT)[0]
    raw = bytearray(whole_tail)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(run_format.OFFSET_AT, used - 8))
        raw[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    run_format.parse_tail(bytes(raw))


def test_of_a_stream_that_is_cut_anywhere_the_first_pieces_are_read(tmp_path: Path) -> None:
    loader = loader_of(Named(400), tmp_path)
    list(loader)
    (folder,) = run_folders._process.folders
    assert folder.batches is not None
    folder.batches.flush(0)
    list(loader)
    folder.batches.flush(0)
    path = folder.path / "batches-000.arrows"
    whole = path.read_bytes()
    steps = None
    for cut in range(0, len(whole), 97):
        path.write_bytes(whole[:cut])
        (its,) = RunFolder(tmp_path).loaders
        found = [step for table in its.pieces(["step"]) for step in table["step"].to_pylist()]
        assert found in ([], [*range(100)])
        assert len(found) or not steps  # it only gets more
        steps = found
        assert all("torn" in note for note in its.notes)
    path.write_bytes(whole)
    (its,) = RunFolder(tmp_path).loaders
    assert [table.num_rows for table in its.pieces()] == [200]
    assert its.notes == []


def test_a_batch_that_is_in_tail_and_stream_is_read_once(tmp_path: Path) -> None:
    loader = loader_of(Named(), tmp_path)
    list(loader)
    tail = tail_of(tmp_path)
    before = tail.read_bytes()  # as a kill between writing the stream and the tail leaves it
    (folder,) = run_folders._process.folders
    assert folder.batches is not None
    folder.batches.flush(0)
    tail.write_bytes(before)
    assert_the_same(tmp_path, loader)


def test_lines_that_are_torn_are_left_out(tmp_path: Path) -> None:
    loader = loader_of(Named(bad=(3,)), tmp_path, on_error="skip")
    for batch in loader:
        loader.mark(batch.sum().item())
    for name in ("epochs.jsonl", "incidents.jsonl", "sources.jsonl", "marks.jsonl"):
        (path,) = tmp_path.rglob(name)
        with path.open("a") as file:
            file.write('{"epoch": 7, "step":')
    (path,) = tmp_path.rglob("failures/*.json")
    path.write_text(path.read_text()[:100])
    run = RunFolder(tmp_path)
    assert [epoch.epoch for epoch in run.epochs()] == [0]
    assert len(run.incidents()) == 1
    assert run.loaders[0].marks().num_rows == 5
    assert run.failures() == []
    assert "cannot be read" in run.notes[0]


# ── epochs, marks, failures, sources ─────────────────────────────────────────────────────────────


def test_an_epoch_that_runs_still_has_no_audit(tmp_path: Path) -> None:
    loader = loader_of(Named(), tmp_path)
    list(loader)
    iterator = iter(loader)
    next(iterator)
    first, second = RunFolder(tmp_path).epochs()
    assert (first.ok, first.audit["delivered"], first.epoch) == (True, 20, 0)  # type: ignore[index]
    assert (second.audit, second.ended, second.epoch) == (None, None, 1)
    run_folders._close()  # at the end of the process it is booked as it stands
    _, second = RunFolder(tmp_path).epochs()
    assert second.audit is not None
    assert (second.audit["delivered"], second.audit["complete"]) == (4, False)
    list(iterator)
    assert RunFolder(tmp_path).epochs()[1].audit == second.audit  # nothing is written after that


def test_what_an_epoch_handed_over_so_far_is_summed_up(tmp_path: Path) -> None:
    loader = loader_of(Named(), tmp_path)
    list(loader)
    (folder,) = run_folders._process.folders
    assert folder.batches is not None
    folder.batches.flush(0)
    iterator = iter(loader)
    next(iterator), next(iterator)
    (its,) = RunFolder(tmp_path).loaders
    first, second = its.totals().values()
    assert (first.epoch, first.batches, first.samples) == (0, 5, 20)
    assert (second.epoch, second.batches, second.samples) == (1, 2, 8)
    assert first.began_ns < first.began_ns + first.wait_ns <= first.ended_ns < second.began_ns
    assert its.recent(3)["batch"].to_pylist() == [4, 0, 1]
    assert its.recent(1, ["epoch"]).to_pylist() == [{"epoch": 1}]


def test_a_folder_that_is_only_being_made_has_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    append, tail_in = OpenFolder.append, batch_log._tail_in
    runs: list[RunFolder] = []

    def look() -> None:
        runs[:] = runs or [RunFolder(tmp_path)]
        runs[0].refresh()
        (loader,) = runs[0].loaders
        seen.append((loader.state, loader.info))

    def looked_at_before(self: OpenFolder, name: str, *pieces: Any) -> int:
        if name in ("loader.json", "epochs.jsonl"):
            look()
        return append(self, name, *pieces)

    def tail(*about: Any) -> Any:
        look()
        return tail_in(*about)

    monkeypatch.setattr(OpenFolder, "append", looked_at_before)
    monkeypatch.setattr(batch_log, "_tail_in", tail)
    iterator = iter(loader_of(Named(), tmp_path))
    assert [state for state, _ in seen] == ["running"] * 3
    assert [bool(info) for _, info in seen] == [False, True, True]
    list(iterator)
    assert runs[0].loaders[0].state == "running"
    run_folders._close()
    assert runs[0].loaders[0].state == "ended"


def test_before_the_first_batch_there_is_nothing_to_sum_up(tmp_path: Path) -> None:
    iterator = iter(loader_of(Named(), tmp_path))
    run = RunFolder(tmp_path)
    (its,) = run.loaders
    assert (its.totals(), its.recent().num_rows, run.batches().num_rows) == ({}, 0, 0)
    assert (run.step(0), run.index(0), run.workers().num_rows, run.notes) == ([], [], 0, [])
    del iterator


def test_steps_are_what_was_marked(tmp_path: Path) -> None:
    loader = loader_of(Named(), tmp_path)
    for number, _ in enumerate(loader):
        loader.mark(np.int64(100 + number // 2))
    loader.mark(500, loader.provenance.batch(1))
    loader.mark(501, 3)
    run = RunFolder(tmp_path)
    assert [each.indices for each in run.step(100)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [each.batch for each in run.step(500) + run.step(501)] == [1, 3]
    assert run.step(0) == run.step(10) == []
    assert run.step(101)[0].sources[8] == "dataset.files[8] = '8.png'"
    json.dumps(run.step(100)[0].to_dict())


def test_without_marks_a_step_is_a_batch(tmp_path: Path) -> None:
    loader = loader_of(Named(), tmp_path)
    list(loader)
    list(loader)
    (batch,) = RunFolder(tmp_path).step(6)
    assert (batch.epoch, batch.batch, batch.indices) == (1, 1, (4, 5, 6, 7))


@pytest.mark.parametrize(
    ("about", "error", "said"),
    [
        (("1",), TypeError, "step must be an int, 0 or more"),
        ((True,), TypeError, "step must be"),
        ((-1,), ValueError, "step must be"),
        ((1, 2.5), TypeError, "batch must be a BatchRecord, an int"),
        ((1, -2), ValueError, "batch must be"),
    ],
)
def test_what_cannot_be_marked(about: Any, error: Any, said: str) -> None:
    loader = loader_of(Named(), None)
    list(loader)
    with pytest.raises(error, match=said):
        loader.mark(*about)


def test_before_the_first_batch_nothing_can_be_marked(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="none was handed over yet"):
        loader_of(Named(), tmp_path).mark(1)


def test_without_a_folder_a_mark_is_nothing() -> None:
    loader = loader_of(Named(), None)
    list(loader)
    assert loader.mark(3) is None


def test_what_became_of_an_index(tmp_path: Path) -> None:
    loader = loader_of(Named(bad=(3,)), tmp_path, on_error="skip")
    list(loader)
    loader.on_error = "raise"
    with pytest.raises(ValueError, match="bad file"):
        list(loader)
    run = RunFolder(tmp_path)
    skipped, failed = run.index(3)
    assert (skipped.what, skipped.epoch, skipped.batch, skipped.position) == ("skipped", 0, 0, 3)
    assert "bad file 3.png" in skipped.reason
    assert (failed.what, failed.epoch, failed.batch) == ("failed", 1, 0)
    assert failed.path.endswith(".json")
    (delivered,) = run.index(4)
    assert (delivered.what, delivered.batch, delivered.position, delivered.step) == (
        *("delivered", 1, 0),
        1,
    )
    assert run.index(99) == []
    assert run.sources()[3] == "dataset.files[3] = '3.png'"
    survived, raised = run.failures()
    assert survived["failure"]["index"] == raised["failure"]["index"] == 3
    assert [each["what"] for each in run.incidents()] == ["skipped"]
    json.dumps([each.to_dict() for each in run.index(3)])


def test_an_index_that_is_a_text_is_found(tmp_path: Path) -> None:
    loader = loader_of(Any_(), tmp_path, 2, sampler=["a", "b", "c", "b"])
    list(loader)
    run_folders._close()
    found = RunFolder(tmp_path).index("b")
    assert [(each.batch, each.position) for each in found] == [(0, 1), (1, 1)]


def test_a_program_that_changes_its_directory_goes_on_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loader = loader_of(Named(), Path("of-this-test/run"))
    list(loader)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    list(loader)
    assert len(RunFolder(tmp_path / "of-this-test" / "run").epochs()) == 2
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_slowest_samples_have_their_sources(tmp_path: Path) -> None:
    list(loader_of(Named(5000), tmp_path, 100))
    run = RunFolder(tmp_path)
    table = run.batches(["indices", "fetch_ns"])
    times = table["fetch_ns"].combine_chunks().flatten().to_numpy()
    indices = table["indices"].combine_chunks().flatten().to_numpy()
    slowest = indices[times > np.sort(times)[-5]].tolist()
    assert set(slowest) <= set(run.sources())
    assert len(run.sources()) <= 100


def test_however_many_were_slow_what_fails_later_has_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safeloader.provenance.source_log._SLOWEST_MOST", 150)
    monkeypatch.setattr("safeloader.provenance.source_log._WORTH_NS", 0)
    monkeypatch.setattr("safeloader.provenance.source_log._OF_TIME", 10**6)
    flushed_each_time(monkeypatch)
    list(loader_of(Named(1000, bad=(990,)), tmp_path, 100, on_error="skip"))
    run = RunFolder(tmp_path)
    assert 100 < len(run.sources()) <= 201
    assert run.sources([990]) == {990: "dataset.files[990] = '990.png'"}


def test_with_run_sources_every_sample_has_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("_SHARE", "_SLICE_NS"):  # as a long epoch has them
        monkeypatch.setattr(f"safeloader.provenance.source_log.{bound}", 10**12)
    for _ in range(2):
        loader = loader_of(Named(3000), tmp_path, 100, run_sources=True)
        list(loader)
        assert len(RunFolder(tmp_path).sources()) == 3000
        assert RunFolder(tmp_path).sources([7]) == {7: "dataset.files[7] = '7.png'"}
        run_folders._close()
        monkeypatch.setattr(run_folders, "_process", run_folders._Process())
    assert len(list(tmp_path.rglob("sources.parquet"))) == 1  # once a run
    (batch, _) = RunFolder(tmp_path).step(12)
    assert batch.sources == {k: f"dataset.files[{k}] = '{k}.png'" for k in range(1200, 1300)}


def test_sources_are_looked_for_in_small_slices_of_time(tmp_path: Path) -> None:
    loader = loader_of(Named(100_000), tmp_path, 100, run_sources=True)
    for _ in loader:
        pass
    (folder,) = run_folders._process.folders
    some = len(RunFolder(tmp_path).sources())
    assert 0 < some < 100_000
    assert folder.batches is not None
    folder.batches.flush(0)
    assert len(RunFolder(tmp_path).sources()) >= some


# ── folders ──────────────────────────────────────────────────────────────────────────────────────


def test_a_loader_that_takes_the_place_of_another_goes_on_in_its_folder(tmp_path: Path) -> None:
    for _ in range(3):
        loader = loader_of(Named(), tmp_path)
        list(loader)
        list(loader)
        del loader
        gc.collect()
    (its,) = RunFolder(tmp_path).loaders
    assert [epoch.epoch for epoch in RunFolder(tmp_path).epochs()] == [*range(6)]
    assert its.indices(4).tolist() == [*range(20)]
    assert RunFolder(tmp_path).batches(["step"])["step"].to_pylist() == [*range(30)]


def test_two_loaders_at_once_have_folders_of_their_own(tmp_path: Path) -> None:
    loaders = [loader_of(Named(), tmp_path) for _ in range(2)]
    for loader in loaders:
        list(loader)
    assert [each.number for each in RunFolder(tmp_path).loaders] == [0, 1]


def test_loaders_beyond_a_bound_are_not_written_and_that_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(run_folders, "FOLDERS_MAX", 2)
    loaders = [loader_of(Named(), tmp_path) for _ in range(4)]
    for loader in loaders:
        list(loader)
    assert len(RunFolder(tmp_path).loaders) == 2
    assert caplog.text.count("this process has 2 loaders there already") == 1


def test_what_is_written_is_its_owners_alone(tmp_path: Path) -> None:
    loader = loader_of(Named(bad=(3,)), tmp_path / "a" / "run", on_error="skip")
    list(loader)
    loader.mark(1)
    for path in [tmp_path / "a", *(tmp_path / "a").rglob("*")]:
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_false_writes_nothing_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFELOADER_RUN", str(tmp_path / "run"))
    list(SafeDataLoader(Named(), run_dir=False))
    assert not (tmp_path / "run").exists()
    list(SafeDataLoader(Named()))
    assert len(RunFolder(tmp_path / "run").epochs()) == 1


def test_without_pyarrow_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def lacks(name: str, *more: Any) -> Any:
        return None

    monkeypatch.setattr("importlib.util.find_spec", lacks)
    with pytest.raises(ImportError, match=r"pip install 'safeloader\[run\]'"):
        loader_of(Named(), tmp_path)
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setenv("SAFELOADER_RUN", str(tmp_path / "run"))  # of the launcher, say
    list(SafeDataLoader(Named()))
    assert "keeping the batches of a run needs pyarrow" in caplog.text
    assert list((tmp_path / "run").rglob("epochs.jsonl"))
    with pytest.raises(ImportError, match=r"pip install 'safeloader\[run\]'"):
        RunFolder(tmp_path / "run")


@pytest.mark.parametrize(
    ("keywords", "error", "said"),
    [
        ({"run_dir": 5}, TypeError, "run_dir must be a folder"),
        ({"run_dir": True}, TypeError, "run_dir must be a folder"),
        ({"run_dir": "/proc/none/here"}, ValueError, "the run cannot be written to"),
        ({"run_max_bytes": 1000}, ValueError, "from 1048576"),
        ({"run_sources": 1}, ValueError, "run_sources must be True"),
    ],
)
def test_bad_values_are_refused_at_once(keywords: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        SafeDataLoader(Named(), **keywords)


@pytest.mark.parametrize("content", [None, "[]", '{"id": 5', "{}"])
def test_what_is_no_run_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(NotARunFolder, match=str(tmp_path)):
        RunFolder(tmp_path)


def test_of_what_is_too_much_the_oldest_goes(tmp_path: Path) -> None:
    loader = loader_of(Named(200_000), tmp_path, 1000, run_max_bytes=1 << 20)
    for _ in loader:
        pass
    run_folders._close()
    run = RunFolder(tmp_path)
    dropped = run.dropped()
    assert [each["segment"] for each in dropped] == [*range(len(dropped))]
    last = dropped[-1]["steps"][1]
    assert run.batches(["step"])["step"].to_pylist() == [*range(last + 1, 200)]
    assert sum(each["bytes"] for each in dropped) > 1 << 20
    kept = sum(path.stat().st_size for path in tmp_path.rglob("batches-*"))
    assert 0 < kept < 1 << 20
    assert run.step(0) == []
    assert run.notes == []


@pytest.mark.parametrize("begun", ["", "schema"])
def test_a_segment_that_was_only_begun_is_no_hindrance(begun: str, tmp_path: Path) -> None:
    list(loader_of(Named(), tmp_path))
    run_folders._close()
    (loader,) = RunFolder(tmp_path).loaders
    schema = run_format.schema()
    name = run_format.segment_name(1, "arrows")
    (loader.path / name).write_bytes(schema.serialize().to_pybytes() if begun else b"")
    pq.write_table(schema.empty_table(), loader.path / run_format.segment_name(2, "parquet"))
    assert loader.convert() == 0
    assert loader.indices(0).tolist() == [*range(20)]
    assert (loader.path / name).exists()


def test_what_went_while_a_reader_converts_it_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folders, "_LEAST_SEGMENT", 1 << 12)
    monkeypatch.setattr(run_folders, "SEGMENT_BYTES", 1 << 12)
    flushed_each_time(monkeypatch)
    loader = loader_of(Named(4000), tmp_path, 200)
    list(loader)
    (folder,) = run_folders._process.folders
    assert folder.batches is not None
    first, second, *_ = folder.batches.segments
    write_table = pq.write_table

    def meanwhile(*about: Any, **more: Any) -> None:
        write_table(*about, **more)
        folder.tell_dropped()

    with monkeypatch.context() as patched:
        patched.setattr(pq, "write_table", meanwhile)
        assert run_format.to_parquet(folder.path, first.number) is None
    parquet = folder.path / run_format.segment_name(first.number, "parquet")
    assert not list(folder.path.glob(f"*{first.number:03}*"))
    parquet.write_bytes(b"")  # in the moment between the look and the move
    folder.tell_dropped()
    assert not parquet.exists()
    assert [each["segment"] for each in RunFolder(tmp_path).dropped()] == [
        first.number,
        second.number,
    ]


def test_a_loader_without_a_bound_lifts_no_other_ones(tmp_path: Path) -> None:
    bounded = loader_of(Named(), tmp_path, run_max_bytes=1 << 21)
    list(bounded)
    list(loader_of(Named(), tmp_path))
    assert run_folders._process.max_bytes == 1 << 21
    less = loader_of(Named(), tmp_path, run_max_bytes=1 << 20)
    list(less)
    assert run_folders._process.max_bytes == 1 << 20
    less.run_max_bytes = None
    list(less)
    assert run_folders._process.max_bytes == 1 << 21


def test_the_end_waits_for_a_thread_that_flushes_and_that_not_for_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = loader_of(Named(), tmp_path, run_max_bytes=1 << 20)
    list(loader)
    process = run_folders._process
    (folder,) = process.folders
    flushes, closes = threading.Event(), threading.Event()

    def flush() -> None:
        with folder.batches.lock:  # type: ignore[union-attr]
            flushes.set()
            closes.wait(30)
            process.bound()

    @contextlib.contextmanager
    def guarded(*about: Any) -> Iterator[None]:
        closes.set()
        yield

    monkeypatch.setattr(run_folders, "guarded", guarded)
    threads = [threading.Thread(target=each, daemon=True) for each in (flush, run_folders._close)]
    threads[0].start()
    assert flushes.wait(30)
    threads[1].start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert RunFolder(tmp_path).loaders[0].state == "ended"


# ── faults ───────────────────────────────────────────────────────────────────────────────────────


def flushed_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safeloader.provenance.batch_log.FLUSH_NS", 0)
    monkeypatch.setattr("safeloader.provenance.batch_log.FIRST_NS", 0)


def test_a_disk_that_is_full_ends_the_folder_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    flushed_each_time(monkeypatch)
    loader = loader_of(Named(400), tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    came = 0
    try:
        for _ in loader:
            came += 1
            if came == 10:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert came == 100
    assert loader.audit.ok
    assert caplog.text.count("nothing more is written for this run") == 1
    assert "File too large" in caplog.text
    run = RunFolder(tmp_path)
    assert run.batches(["step"])["step"].to_pylist() == [*range(10)]
    assert run.notes == []
    assert run.loaders[0].state == "cut off"
    assert run.notes[0].endswith("could not be written further: File too large")


def test_a_disk_that_is_full_from_the_beginning(tmp_path: Path, caplog: Any) -> None:
    loaders = [loader_of(Named(), tmp_path) for _ in range(3)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # no tail
        for loader in loaders:
            assert len(list(loader)) == 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caplog.text.count("is written for this run") == 1


def test_a_folder_that_vanishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    flushed_each_time(monkeypatch)
    loader = loader_of(Named(), tmp_path / "run")
    came = 0
    for _ in loader:
        came += 1
        if came == 2:
            shutil.rmtree(tmp_path / "run")
    assert came == 5
    list(loader)
    assert caplog.text.count("nothing more is written for this run") == 1


def test_a_folder_that_was_removed_before_the_end_is_not_told(tmp_path: Path, caplog: Any) -> None:
    loader = loader_of(Named(), tmp_path / "run")
    list(loader)
    iterator = iter(loader)
    next(iterator)
    shutil.rmtree(tmp_path / "run")
    run_folders._close()
    assert caplog.text == ""


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAFELOADER_RUN", str(tmp_path / "file" / "run"))
    for _ in range(2):
        assert len(list(SafeDataLoader(Named()))) == 20
    assert caplog.text.count("nothing of this run is written") == 1


def test_a_link_in_the_place_of_a_folder_is_not_followed(tmp_path: Path, caplog: Any) -> None:
    list(loader_of(Named(), tmp_path / "run"))
    victim = tmp_path / "victim"
    victim.mkdir()
    rank = tmp_path / "run" / "attempt=0" / "rank=5"
    rank.symlink_to(victim)
    os.environ["RANK"] = "5"
    try:
        assert len(list(loader_of(Named(), tmp_path / "run"))) == 5
    finally:
        del os.environ["RANK"]
    assert not list(victim.iterdir())
    assert caplog.text.count("is written for this run") == 1


def test_a_fault_of_ours_ends_the_record_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    flushed_each_time(monkeypatch)
    monkeypatch.setattr(LoaderFolder, "_flushed", lambda *about: 1 / 0)
    loader = loader_of(Named(), tmp_path)
    assert len(list(loader)) == 5
    assert caplog.text.count("please report it") == 2  # at the first batch, at the epoch's end
    assert loader.audit.ok


def test_a_time_limit_that_strikes_while_we_write_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_long(*args: Any) -> Any:
        raise TimeoutError("of the program's own")

    flushed_each_time(monkeypatch)
    strikes = [signal.SIGUSR1]
    monkeypatch.setattr(
        LoaderFolder, "_flushed", lambda *about: [signal.raise_signal(each) for each in strikes]
    )
    before = signal.signal(signal.SIGUSR1, too_long)
    loader = loader_of(Named(), tmp_path)
    try:
        with pytest.raises(TimeoutError, match="the program's own"):
            list(loader)
        strikes.clear()
        list(loader)
        assert RunFolder(tmp_path).loaders[0].indices(1).tolist() == [*range(20)]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_child_that_iterates_writes_a_folder_of_its_own(tmp_path: Path) -> None:
    loader = loader_of(Named(), tmp_path)
    iterator = iter(loader)
    next(iterator)
    held = threading.Event()
    release = threading.Event()
    (folder,) = run_folders._process.folders
    assert folder.batches is not None

    def holds() -> None:
        with folder.batches.lock:  # type: ignore[union-attr]
            held.set()
            release.wait(60)

    thread = threading.Thread(target=holds)
    thread.start()
    held.wait(60)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            next(iterator)  # the parent's: noted nowhere
            list(loader)
            run_folders._close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    release.set()
    thread.join()
    list(iterator)
    mine, childs = RunFolder(tmp_path).loaders
    assert mine.indices(0).tolist() == childs.indices(1).tolist() == [*range(20)]
    assert childs.info["process"]["pid"] == pid
    assert [epoch.epoch for epoch in RunFolder(tmp_path).epochs()] == [0, 1]


def test_what_a_reader_turns_into_parquet_is_read_by_others_meanwhile(tmp_path: Path) -> None:
    loader = loader_of(Named(200_000), tmp_path, 100, run_max_bytes=1 << 22)
    list(loader)
    first = RunFolder(tmp_path).loaders[0]
    pieces = first.pieces(["step"])
    found = next(pieces)["step"].to_pylist()
    assert RunFolder(tmp_path).loaders[0].convert() >= 1
    found += [step for table in pieces for step in table["step"].to_pylist()]
    assert found == [*range(2000)]
    assert_the_same(tmp_path, loader)


def test_the_log_tells_of_nothing_else(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        list(loader_of(Named(), tmp_path))
        run_folders._close()
    assert caplog.text == ""
