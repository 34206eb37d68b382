"""A run's folder with damaged files: each command says so in a sentence, and reads the rest."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safeloader.__main__ import main
from safeloader.provenance.run_format import ERRNO_AT, damage, read_stream
from safeloader.report.exactly_once import exactly_once
from safeloader.report.run import RunFolder
from safeloader.report.stored import parsed
from tests.run_folders import Numbers, by_ranks, killed, loader_of, of_job, share

WRONG = (
    *("null", "[]", "{}", '"x"', "1e999", "NaN", "-1", "9" * 30, "true", "[1, [2]]", '"\\ud800"'),
    *("3.5", '{"a": 1}', '"<script>\\u0000"'),
)


class Texts(Numbers):
    def __getitem__(self, index: Any) -> int:
        return 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks with skips, marks, sources and a failure; then an attempt that was killed."""
    run = tmp_path_factory.mktemp("whole") / "run"

    def train(rank: int) -> None:
        data = Numbers(80, bad=(7, 30))
        loader = loader_of(
            data, run, sampler=share(data, rank, 2), on_error="skip", run_sources=True
        )
        for step, _ in enumerate(loader):
            loader.mark(step)
        with contextlib.suppress(ValueError):
            list(loader_of(Numbers(8, bad=(3,)), run))

    def goes_on() -> None:
        loader = loader_of(Numbers(80), run)
        list(loader)
        next(iter(loader))
        next(iter(loader_of(Texts(9), run, 2, sampler=[*"abcdefgh"])))

    with pytest.MonkeyPatch.context() as patched:
        by_ranks(patched, 2, train)
        killed(patched, goes_on, **of_job(1))
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def commands(run: Path) -> Iterator[list[str]]:
    yield from (["show", str(run), *more] for more in ([], ["--json"]))
    yield ["audit", str(run)]
    yield ["watch", str(run), "--once", "--json"]
    yield ["step", str(run), "3", "--json"]
    yield ["index", str(run), "7", "--json"]
    yield ["trace", str(run), "-o", str(run.parent / "trace.json"), "--force"]


def read_by_all(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command ends with a status that is documented, and --json is JSON."""
    for words in commands(run):
        status = main(words)
        said = capsys.readouterr()
        assert status in (0, 1, 2), words
        assert "fault of safeloader" not in said.err, (words, said.err)
        assert len(said.err.splitlines()) == (status == 2), (words, said.err)
        if "--json" in words and status != 2:
            parsed(said.out)


def files_of(run: Path) -> list[Path]:
    return sorted(each for each in run.rglob("*") if each.is_file())


def test_a_file_that_is_cut_short_empty_or_of_noise(
    run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = random.Random(0)
    for path in {path.name.split("-")[0]: path for path in files_of(run)}.values():
        raw = path.read_bytes()
        kinds = [b"", raw[: len(raw) // 2], noise.randbytes(len(raw)), b"[" * 100_000 + b"\n"]
        path.write_bytes(noise.choice(kinds))
        read_by_all(run, capsys)
        shutil.rmtree(run)
        shutil.copytree(whole, run)


@pytest.mark.parametrize("seed", range(6))
def test_numbers_and_offsets_that_are_damaged_in_tables_and_tails(
    seed: int, run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(seed)
    for path in files_of(run):
        if path.suffix in (".json", ".jsonl"):
            continue
        raw = bytearray(path.read_bytes())
        for _ in range(3):
            at = 8 * chance.randrange(min(len(raw), 8192) // 8)
            raw[at : at + 8] = chance.choice([b"\xff" * 8, bytes(8), chance.randbytes(8)])
        path.write_bytes(raw)
    read_by_all(run, capsys)


def places_in(found: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    pairs: Any = found.items() if isinstance(found, dict) else enumerate(found[:2])
    for key, value in pairs:
        yield (*before, key)
        if isinstance(value, dict | list):
            yield from places_in(value, (*before, key))


@pytest.mark.parametrize("seed", range(6))
def test_values_of_another_kind_in_each_json_file(
    seed: int, run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(seed)
    for path in files_of(run):
        if path.suffix not in (".json", ".jsonl") or path.name == "run.json":
            continue
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        for k, line in enumerate(lines[:3]):
            found = json.loads(line)
            *above, last = chance.choice([*places_in(found)])
            functools.reduce(lambda it, key: it[key], above, found)[last] = "@"
            lines[k] = json.dumps(found).replace('"@"', chance.choice(WRONG))
        path.write_text("".join(line + "\n" for line in lines))
    read_by_all(run, capsys)


def test_a_run_json_of_another_kind_is_refused_in_a_sentence(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in (*WRONG, '{"id": 3}', "[" * 100_000, '{"id": "a", "command": 5}'):
        (run / "run.json").write_text(text)
        assert main(["show", str(run)]) in (0, 2)
        said = capsys.readouterr()
        assert said.out or len(said.err.splitlines()) == 1
        assert "fault of safeloader" not in said.err


def test_rows_that_cannot_be_read_are_named_and_the_ranks_own_sums_stand(run: Path) -> None:
    (path, *_) = run.glob("attempt=0/rank=0/*/batches-000.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    verdict = exactly_once(RunFolder(run))
    assert any("damaged" in note for note in verdict.notes)
    (train,) = [each for each in verdict.epochs if each.ranks == (0, 1) and each.length == 80]
    assert train.ok
    assert any("ranks wrote themselves" in line for line in train.evidence)
    assert train.never == ()
    epochs = next(path.parent.glob("epochs.jsonl"))
    lines = [json.loads(line) for line in epochs.read_text().splitlines()]
    epochs.write_text("".join(json.dumps(each | {"part": None}) + "\n" for each in lines))
    verdict = exactly_once(RunFolder(run))
    (train,) = [each for each in verdict.epochs if each.ranks == (0, 1) and each.length == 80]
    assert train.ok is None
    assert train.never == ()


def test_a_bit_that_turned_in_parquet_is_noticed(run: Path) -> None:
    (path,) = run.glob("attempt=0/rank=1/*/batches-000.parquet")
    raw, seen = path.read_bytes(), 0
    before = RunFolder(run).batches(rank=1).to_pylist()
    for at in range(8, len(raw) - 3000, 97):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        its = RunFolder(run)
        if its.batches(rank=1).to_pylist() != before:
            assert any(each.damaged for each in its.loaders)
            seen += 1
    assert seen


def test_what_stands_behind_a_damage_is_not_thrown_away(run: Path) -> None:
    path = min(run.glob("attempt=1/rank=0/*/batches-000.arrows"))
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) - 100])
    size = path.stat().st_size
    assert main(["show", str(run)]) == 0
    assert path.stat().st_size == size
    assert any("torn" in note for note in exactly_once(RunFolder(run)).notes)


def test_a_stream_of_other_columns_is_no_stream_of_batches(tmp_path: Path) -> None:
    import pyarrow as pa

    columns = pa.schema([("step", pa.string())])
    with pa.OSFile(str(tmp_path / "it"), "wb") as file, pa.ipc.new_stream(file, columns) as out:
        out.write_table(pa.table({"step": ["a"]}))
    found = read_stream(tmp_path / "it")
    assert found.batches == []
    assert "other columns" in found.torn
    assert issubclass(pa.ArrowInvalid, damage())


def test_a_file_that_may_not_be_read_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("epochs.jsonl", "incidents.jsonl", "marks.jsonl", "loader.json", "workers.arrows"):
        for path in run.rglob(name):
            path.unlink()
            os.mkdir(path)
    read_by_all(run, capsys)


def test_a_tail_that_names_no_error_of_the_system(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in run.rglob("tail"):
        raw = bytearray(path.read_bytes())
        raw[ERRNO_AT : ERRNO_AT + 8] = (1 << 62).to_bytes(8, sys.byteorder)
        path.write_bytes(raw)
    read_by_all(run, capsys)
    assert {each.state for each in RunFolder(run).loaders if each.attempt == 1} == {"cut off"}
