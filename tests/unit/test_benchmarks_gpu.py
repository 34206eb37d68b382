"""The command for a machine with a card, as far as it goes without one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks import gpu, gpu_copies, gpu_loading, gpu_tests, gpu_training
from benchmarks.gpu_budget import Budget, NoTime, Row, Turns, each, size_of
from benchmarks.gpu_card import Rehearsal, slug
from benchmarks.timing import EpochTime

HOUR_S = 3600.0


def in_time() -> Budget:
    return Budget(time.time() + HOUR_S)


def test_without_cuda_nothing_is_measured_or_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([f"--out={tmp_path}"]) == 0
    assert "CUDA is not available" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--parts=copies,sleep"], "no part 'sleep'"),
        (["--minutes=0"], "--minutes must be above 0"),
        (["--rehearse", f"--out={gpu.RESULTS}"], "a rehearsal is no result"),
    ],
)
def test_wrong_arguments_are_told(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert word in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- time


def test_a_cell_has_one_turn_however_little_time_there_is() -> None:
    assert list(Turns(0.0, 9)) == [0]
    assert list(Turns(HOUR_S, 9)) == list(range(9))


def test_cells_that_fail_or_come_too_late_are_told_and_the_others_go_on() -> None:
    def measure(cell: str, left: int) -> Iterator[Row]:
        if cell == "late":
            raise NoTime
        yield {"cell": cell, "left": left}
        if cell == "bad":
            raise ValueError("first\n\n  last")

    rows = list(each(["bad", "late", "good"], measure))
    assert [row.get("left") for row in rows] == [3, None, None, 1]
    assert rows[1]["error"] == "bad: ValueError: first ... last"
    assert rows[2] == {"note": "late: left out, no time is left"}
    with pytest.raises(NoTime):
        Budget(time.time() - 1).turns(1, 1)


# ---------------------------------------------------------------------------- parts, rehearsed


def test_copies_are_timed_and_the_hazard_is_shown() -> None:
    rows = list(gpu_copies.rows(Rehearsal(), in_time()))
    assert [row for row in rows if "error" in row] == []
    hazard = rows[0]
    assert hazard["copy was still under way"]
    assert hazard["without a guard"] == "OTHER BYTES: the hazard"
    assert hazard["after an event behind the copy"] == "the bytes sent"
    assert hazard["copied from torch's pinned cache"] == "the bytes sent"
    copies = [row for row in rows if row["table"] == "Copies to the device"]
    assert len(copies) == 5 * len(gpu_copies.TINY)
    assert all(row["right"] and row["GB/s"] > 0 for row in copies)
    assert copies[0]["of the limit"]["median"] == 1


def test_a_copy_of_other_bytes_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rehearsal, "pin", lambda self, tensor: torch.zeros_like(tensor))
    errors = [row["error"] for row in gpu_copies.rows(Rehearsal(), in_time()) if "error" in row]
    assert errors[0] == "a guarded copy brought other bytes to the device"
    assert sum("what the pinning thread makes" in each for each in errors) == len(gpu_copies.TINY)


@pytest.mark.workers
def test_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_training, "STEPS_MS", (2.0,))
    card = Rehearsal()
    rows = list(gpu_training.idle_rows(card, in_time()))
    assert [row for row in rows if "error" in row] == []
    assert len(rows) == 2 * len(gpu_training.STEPS_MS) * len(gpu_training.STREAMS)
    assert all(0 <= row["idle, %"] <= row["not computing, %"] < 100 for row in rows)


def test_waiting_for_the_loader_is_idle_time_and_computing_is_not() -> None:
    def slow(step_s: float) -> Any:
        def compute(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            time.sleep(step_s)
            return images.sum()

        return compute

    class Slow(gpu_training.LabelledImages):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            time.sleep(0.02)
            return super().__getitem__(index)

    loader = DataLoader(Slow(6, 8), batch_size=1)
    waits = gpu_training.step_epoch(Rehearsal(), loader, slow(0), None, None)
    assert waits.idle_share > 0.8
    loader = DataLoader(gpu_training.LabelledImages(6, 8), batch_size=1)
    works = gpu_training.step_epoch(Rehearsal(), loader, slow(0.05), None, time.thread_time_ns)
    assert works.idle_share < 0.4
    assert works.step_ms >= 50
    assert works.pinning_cpu_ms is not None


@pytest.mark.workers
@pytest.mark.parametrize("name", gpu_training.NAMES)
def test_the_pinning_thread_is_found(accelerator: None, name: str, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    make = gpu_loading.CONTENDERS[name]
    kwargs = {"num_workers": 1, "pin_memory": True, "persistent_workers": True}
    loader = make(gpu_training.LabelledImages(3, 8), kwargs, tmp_path)
    list(loader)
    clock = gpu_training.cpu_clock(gpu_training.pinning_thread(before))
    assert clock is not None
    assert clock() > 0
    assert gpu_training.cpu_clock(gpu_training.pinning_thread(set(threading.enumerate()))) is None


@pytest.mark.workers
def test_large_batches_are_loaded_and_what_there_is_no_room_for_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_loading, "TINY", gpu_loading.TINY[:1])
    monkeypatch.setattr(gpu_loading, "DELIVERIES", {"to the CPU": False})
    lacks = gpu_loading.lacks
    for needs in ("", "it needs more"):
        monkeypatch.setattr(
            gpu_loading,
            "lacks",
            lambda cell, name, needs=needs: needs if name == "stock" else lacks(cell, name),
        )
        *notes, row = gpu_loading.size_rows(Rehearsal(), in_time())
        assert [each["note"] for each in notes] == [
            f"batches of 0.0655 MB, to the CPU: stock is left out: {needs}"
        ] * bool(needs)
        assert row["safe GB/s"] > 0
        assert ("speed ratio" in row) == (not needs)
    huge = gpu_loading.SizeCell(1 << 50, "to the CPU")
    assert "which has" in lacks(huge, "stock")
    assert "are free" in lacks(huge, "safe")


def test_what_came_is_compared_with_the_dataset() -> None:
    dataset = gpu_loading.PoolDataset(64, (4,), pool=3)
    batch = torch.stack([dataset[index] for index in range(16, 32)])
    gpu_loading.looked_at(batch, dataset, 1)
    batch[-1] += 1
    with pytest.raises(gpu_loading.DifferentBatches):
        gpu_loading.looked_at(batch, dataset, 1)


def test_ratios_are_of_pairs() -> None:
    times = {
        "stock": [EpochTime(1, 4e6, 2e6), EpochTime(1, 6e6, 2e6)],
        "safe": [EpochTime(1, 2e6, 1e6), EpochTime(1, 2e6, 1e6)],
    }
    found = gpu_loading.figures(times)
    assert found["ratios"] == [2, 3]
    assert found["stock ms/batch"] == 5
    assert found["safe main CPU ms/batch"] == 1


# --------------------------------------------------------------------------------------- tests


@pytest.mark.workers
def test_tests_are_run_by_pytest_alone_and_told_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip(reason='not here')\n"
        "def test_left(): pass\n"
    )
    tests = {str(file): (), "tests/other.py": ("no_such_library",)}
    note, *rows = gpu_tests.rows(in_time(), tests)
    assert note["note"] == "tests/other.py: left out, no_such_library is not installed"
    outcomes = {row["test"]: row["outcome"] for row in rows if "test" in row}
    assert outcomes == {"test_good": "passed", "test_bad": "failed", "test_left": "skipped"}
    (error,) = (row for row in rows if "error" in row)
    assert "one is not two" in error["error"]
    assert "assert 1 == 2" in error["output"]


# ----------------------------------------------------------------------------- the whole of it


@pytest.mark.workers
def test_a_part_that_does_not_end_is_ended_and_the_next_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began: list[str] = []

    def run(name: str, seconds: float, rehearse: bool, folder: Path) -> list[Row]:
        began.append(name)
        return real(name, 0.01 if name == "tests" else 90.0, rehearse, folder)

    real = gpu.run
    monkeypatch.setattr(gpu, "LEAST_S", 0)
    monkeypatch.setattr(gpu, "run", run)
    assert gpu.main(["--rehearse", "--parts=tests,copies", f"--out={tmp_path}"]) == 1
    assert began == ["tests", "copies"]
    said = capsys.readouterr().out
    assert "REHEARSAL" in said
    assert "- FAILED: ended at its limit of 0 s" in said
    (file,) = tmp_path.glob("*-gpu-rehearsal.json")
    whole = json.loads(file.read_text("utf-8"))
    assert whole["rehearsal"]
    assert any(row.get("right") for row in whole["parts"]["copies"])
    assert file.with_suffix(".md").read_text("utf-8").count("## ") == 2


def test_how_a_part_ended_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Traceback\n  ...\nValueError: no\n\n")
    assert gpu._ended(0, 9, log) == []
    assert gpu._ended(1, 9, log)[0]["error"] == "ended with exit code 1: ValueError: no"
    assert "SIGKILL" in gpu._ended(-9, 9, log)[0]["error"]
    assert list(gpu._whole(['{"a": 1}', '{"b": '])) == [{"a": 1}]
    assert gpu.run("copies", 1.0, True, tmp_path) == [{"error": "not run: 1 s were left"}]


def test_cells_in_words() -> None:
    spread = {"median": 2.0, "quartiles": [1.5, 3.0], "interval": None}
    values = [None, True, False, 3.14159, 1234.5, "a|b", spread, spread | {"interval": [1, 4]}]
    assert [gpu.shown(value) for value in values] == [
        "–",  # noqa: RUF001
        "yes",
        "NO",
        "3.14",
        "1234",
        "a/b",
        "2.00 (q 1.50 to 3.00)",
        "2.00 (1.00 to 4.00)",
    ]
    assert [size_of(size) for size in (38_535_168, 1_200_000_000)] == ["38.5 MB", "1.2 GB"]
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    text = gpu.text_of("copies", [{"table": "T", "x": 1, "raw": [1]}, {"note": "so"}])
    assert "raw" not in text
    assert text.endswith("- so")
