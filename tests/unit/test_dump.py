"""Failures as JSON files: whole or not at all, and never in the way of training."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from safeloader import Failure, SafeDataLoader, SafeLoaderError, SampleError
from safeloader.failures import dump
from safeloader.introspect.files import process_name
from safeloader.provenance.trace import FileTrace
from tests import faults
from tests.processes.test_failures import caught

PHASES = ["init", "sampler", "sample", "collate", "transport", "crash", "timeout", "delivery"]


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_is_json(phase: str, tmp_path: Path) -> None:
    failure = Failure(
        phase=phase,
        exception_type="KeyError",
        message="caf\N{LATIN SMALL LETTER E WITH ACUTE} \udc80 \x00",
        index=(1, "a", float("nan")),
        indices=(1, float("inf"), b"raw", ("nested", 2)),
        dataset_state={"class": "Scans", "length": 3, 5: object()},
        hint="look there",
    )
    path = dump.write(failure, tmp_path)
    assert path is not None
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content["failure"]["phase"] == phase
    assert content["failure"]["index"] == [1, "a", "nan"]
    assert content["failure"]["message"] == failure.message
    assert content["report"] == str(failure)
    assert set(content["versions"]) == {"safeloader", "torch", "numpy"}
    assert content["machine"]
    assert os.listdir(tmp_path) == [path.name]


def test_each_failure_has_a_file_of_its_own(tmp_path: Path) -> None:
    failure = Failure(phase="sample", exception_type="KeyError", message="x")
    paths = {dump.write(failure, tmp_path / "made" / "on demand") for _ in range(5)}
    assert len(paths) == 5
    assert len(os.listdir(tmp_path / "made" / "on demand")) == 5


def failures_in(folder: Path) -> list[dict[str, Any]]:
    assert not list(folder.glob("*.part"))
    return [json.loads(path.read_text())["failure"] for path in sorted(folder.glob("*.json"))]


class Dies(faults.Raises):
    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(index)


class Hangs(faults.Raises):
    def __getitem__(self, index: int) -> torch.Tensor:
        while index == self.at:
            signal.pause()
        return torch.tensor(index)


@pytest.mark.parametrize(
    ("phase", "dataset", "more"),
    [
        ("sample", faults.Raises(), {"num_workers": 0}),
        ("sample", faults.Raises(), {"num_workers": 2}),
        ("collate", faults.Ragged("shape"), {"num_workers": 2}),
        ("init", faults.Raises(at=-1), {"num_workers": 2, "worker_init_fn": faults.init_raises}),
        ("sampler", faults.Raises(at=-1), {"sampler": faults.RaisingSampler()}),
        ("transport", faults.Raises("holds a lock"), {"num_workers": 2}),
        ("crash", Dies(), {"num_workers": 2}),
        ("timeout", Hangs(), {"num_workers": 2, "timeout": 1}),
        ("delivery", faults.Miscounts(-1), {"num_workers": 2}),
    ],
)
def test_what_is_raised_is_written(
    phase: str, dataset: Any, more: dict[str, Any], tmp_path: Path
) -> None:
    if phase == "transport":
        dataset = [torch.tensor(k) if k != 13 else faults.HoldsALock("x") for k in range(40)]
        more = more | {"collate_fn": list}
    error = caught(SafeDataLoader(dataset, 4, on_failure_dump=tmp_path, **more))
    (written,) = failures_in(tmp_path)
    assert written == json.loads(json.dumps(error.failure.to_dict()))
    assert written["phase"] == phase


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_cannot_begin_is_written(workers: int, tmp_path: Path) -> None:
    class Closed(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Any:
            raise ConnectionError("closed")

    with pytest.raises(SampleError, match="closed"):
        list(SafeDataLoader(Closed(), num_workers=workers, on_failure_dump=tmp_path))
    (written,) = tmp_path.iterdir()
    assert json.loads(written.read_text())["failure"]["exception_type"] == "ConnectionError"


def test_what_is_left_out_is_written_and_so_is_too_much_of_it(tmp_path: Path) -> None:
    def loader(bound: int) -> SafeDataLoader[Any]:
        return SafeDataLoader(
            faults.Raises(), 4, on_error="skip", max_skipped=bound, on_failure_dump=tmp_path
        )

    def indices() -> list[int]:
        return [failure["index"] for failure in failures_in(tmp_path)]

    list(loader(1))
    assert indices() == [13]
    assert type(caught(loader(0))) is SampleError
    assert indices() == [13, 13, 13]  # skipped, and then one too many


def test_a_folder_that_went_away_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "failures"
    folder.mkdir()
    loader = SafeDataLoader(faults.Raises(), 4, on_failure_dump=folder)
    folder.rmdir()
    caught(loader)
    assert len(failures_in(folder)) == 1


def went_on(loader: SafeDataLoader[Any]) -> tuple[SafeLoaderError | None, int]:
    error, came = None, 0
    iterator = iter(loader)
    while True:
        try:
            next(iterator)
            came += 1
        except StopIteration:
            return error, came
        except SafeLoaderError as exc:
            error = exc.with_traceback(None)


def test_where_nothing_can_be_written_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "failures"
    loader = SafeDataLoader(faults.Raises(), 4, on_failure_dump=folder)
    folder.write_text("a file took its name")
    with caplog.at_level(logging.WARNING, "safeloader"):
        error, came = went_on(loader)
    assert isinstance(error, KeyError)
    assert came == 9
    assert "could not be written to" in caplog.text


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The limit of the shell on file sizes (``ulimit -f``) is a disk that is full after 1 kB."""
    failure = Failure(phase="sample", exception_type="KeyError", message="x" * 5000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        written = dump.write(failure, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert written is None
    assert os.listdir(tmp_path) == []
    assert "could not be written to" in caplog.text


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="on_failure_dump"):
        SafeDataLoader([1], on_failure_dump=tmp_path)


def test_what_is_no_folder_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file"):
        SafeDataLoader([1], on_failure_dump=file)
    with pytest.raises(TypeError, match="folder"):
        SafeDataLoader([1], on_failure_dump=3)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["file"]


def test_a_line_in_the_log_names_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    went_on(SafeDataLoader(faults.Raises(), 4, on_failure_dump=tmp_path))
    (name,) = os.listdir(tmp_path)
    (line,) = caplog.messages
    assert line.startswith("SafeDataLoader over Raises (")
    assert line.endswith(f": the failure is written to {tmp_path / name}")


FAILURE = Failure(phase="sample", exception_type="KeyError", message="x")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_and_folders_are_for_their_owner_alone(tmp_path: Path) -> None:
    """Whatever the umask; a folder that was there keeps its mode."""
    there = tmp_path / "there"
    there.mkdir(mode=0o755)
    there.chmod(0o755)
    before = os.umask(0)
    try:
        made = dump.write(FAILURE, there / "made" / "deep")
        trace = FileTrace(there / "traces")
    finally:
        os.umask(before)
    assert made is not None
    assert mode_of(made) == mode_of(trace.path) == 0o600
    folders = [there / "made", there / "made" / "deep", there / "traces"]
    assert [mode_of(folder) for folder in folders] == [0o700] * 3
    assert mode_of(there) == 0o755


def test_links_under_a_name_that_can_be_guessed_are_not_followed(tmp_path: Path) -> None:
    """In a folder where others may write they wait under every name that comes next."""
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    folder = tmp_path / "open to all"
    folder.mkdir()
    first = dump.write(FAILURE, folder)
    assert first is not None
    number = int(first.stem.rpartition("-")[2])
    now = time.time()
    for second in range(60):
        stamp = time.strftime("%Y%m%dT%H%M%S", time.localtime(now + second))
        for k in range(number + 1, number + 4):
            stem = f"failure-{stamp}-{process_name()}-{k}"
            (folder / f"{stem}.json").symlink_to(victim)
            (folder / f"{stem}.part").symlink_to(victim)
    for k in range(number + 1, number + 9):
        (folder / f"safeloader-{process_name()}-{k}.json").symlink_to(victim)
    written = dump.write(FAILURE, folder)
    trace = FileTrace(folder)
    trace._file.flush()
    assert written is not None
    assert not written.is_symlink()
    assert not trace.path.is_symlink()
    assert victim.read_text() == "untouched"


def test_two_processes_of_one_name_share_a_folder(tmp_path: Path) -> None:
    """In two containers the pid is the same, and often the host's name as well."""
    program = """
import os, sys
from safeloader.introspect import files as folders
folders.process_name = lambda: "host-rank0-7"
for _ in range(3):
    fd, path = folders.create(__import__("pathlib").Path(sys.argv[1]), "safeloader", ".json")
    os.write(fd, b"whole")
"""
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"] * 6


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SAFELOADER_TRACE", "~/by environment")
    for trace in (None, "~/by argument"):
        caught(SafeDataLoader(faults.Raises(), 4, on_failure_dump="~/failures", trace=trace))
    assert {path.name for path in tmp_path.iterdir()} == {
        "failures",
        "by environment",
        "by argument",
    }


def test_names_have_host_rank_pid_and_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "5")
    path = dump.write(FAILURE, tmp_path)
    assert path is not None
    host = re.escape(re.sub(r"[^\w.-]", "_", platform.node())[:64])
    pattern = rf"failure-\d{{8}}T\d{{6}}-{host}-rank5-{os.getpid()}-\d+\.json"
    assert re.fullmatch(pattern, path.name)


def test_that_nothing_can_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "failures"
    folder.write_text("a file took its name")
    assert [dump.write(FAILURE, folder) for _ in range(3)] == [None] * 3
    assert len(caplog.messages) == 1


def test_a_secret_within_an_index_is_not_written(tmp_path: Path) -> None:
    drawn = [{"url": "s3://b/1", "password": "hunter2hunter2"}]
    loader: Any = SafeDataLoader(
        faults.Raises(at=0), batch_size=None, sampler=drawn, on_failure_dump=tmp_path
    )
    caught(loader)
    [path] = tmp_path.iterdir()
    assert "s3://b/1" in path.read_text()
    assert "hunter2" not in path.read_text()


def test_an_index_is_not_the_name_of_the_next() -> None:
    failure = Failure(
        phase="sample", exception_type="KeyError", message="", indices=("password", "passage")
    )
    assert failure.to_dict()["indices"] == ["password", "passage"]
