"""The example, run as a user runs it: it learns, and its failures name the index."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "train_digits.py"

Ended = subprocess.CompletedProcess[str]

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("tqdm")


def run(*arguments: str, program: str | None = None, path: Path = ROOT) -> Ended:
    """The script with these arguments, or a program that imports it; ``path`` is looked in too."""
    environment = {name: value for name, value in os.environ.items() if "SAFELOADER" not in name}
    folders = [str(path), str(ROOT), str(SCRIPT.parent), environment.get("PYTHONPATH", "")]
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        "PYTHONIOENCODING": "utf-8",
    }
    return subprocess.run(
        [sys.executable, *([str(SCRIPT)] if program is None else ["-c", program]), *arguments],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def percent(text: str, output: str) -> float:
    found = re.search(rf"{text} ([\d.]+)%", output)
    assert found is not None, output
    return float(found[1])


@pytest.mark.slow
def test_the_demonstration_survives_its_faults(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Training has ended: at which image?" in done.stdout
    assert done.stdout.count("index 404 skipped: its worker died at it twice") == 1
    assert "1437 drawn, 1435 delivered" in done.stdout
    assert re.search(r"9\d\.\d% of the test digits are read right", done.stdout)
    (page,) = tmp_path.glob("runs/demo-*/report.html")
    assert f"wrote {page.relative_to(tmp_path)}" in done.stdout


@pytest.mark.slow
def test_it_learns_and_everything_drawn_was_delivered() -> None:
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert percent("Test accuracy", done.stdout) >= 95
    assert "epoch 14: complete, ok; 1437 drawn, 1437 delivered" in done.stdout
    assert "Recorded: 21555 samples in 345 batches." in done.stdout


@pytest.mark.slow
def test_the_same_seed_gives_the_same_training() -> None:
    first, second = (
        [line for line in run("--epochs", "2").stdout.splitlines() if "loss" in line]
        for _ in range(2)
    )
    assert len(first) == 2
    assert first == second


def test_the_slowest_samples_are_shown_with_place_and_worker() -> None:
    done = run("--epochs", "1", "--workers", "0")
    assert done.returncode == 0, done.stderr
    table = done.stdout.partition("  index  label  worker")[2].splitlines()[1:]
    rows = [line.split() for line in table]
    assert len(rows) == 5
    assert [row[2] for row in rows] == ["main"] * 5
    milliseconds = [float(row[3]) for row in rows]
    assert milliseconds == sorted(milliseconds, reverse=True)


BROKEN = {
    "raise": ("sample", "KeyError: 'pixels'"),
    "none": ("collate", "is None"),
    "ragged": ("collate", "[1, 8, 7]"),
    "stop": ("sample", "StopIteration"),
}


@pytest.mark.parametrize(("how", "workers"), [*((how, "2") for how in BROKEN), ("none", "0")])
def test_a_broken_sample_is_named(how: str, workers: str) -> None:
    done = run(*("--epochs", "1", "--workers", workers), *("--break-at", "137", "--break-how", how))
    assert (done.returncode, done.stderr) == (1, "")
    phase, cause = BROKEN[how]
    assert "dataset index 137 (position " in done.stdout
    assert cause in done.stdout
    assert re.search(rf"^phase +{phase}$", done.stdout, re.MULTILINE)
    assert re.search(r"^index +137$", done.stdout, re.MULTILINE)
    assert re.search(r"^epoch 0: .*NOT OK", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1].startswith("Try next: mend training sample 137")


@pytest.mark.slow
def test_it_works_where_workers_are_spawned(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import multiprocessing\nmultiprocessing.set_start_method('spawn')\n"
    )
    done = run("--epochs", "1", "--break-at", "137", path=tmp_path)
    # On a busy machine the workers may take long, which is told.
    said = [line for line in done.stderr.splitlines() if "until they were ready" not in line]
    assert (done.returncode, said) == (1, [])
    assert done.stdout.count("digits to train on") == 1  # the workers import the script, no more
    assert "dataset index 137 (position " in done.stdout


def test_a_loss_that_is_not_finite_names_its_samples() -> None:
    program = """
import train_digits
train_digits.augment = lambda image: image / 0
train_digits.main(["--epochs", "1", "--workers", "0", "--batch-size", "4"])
"""
    done = run(program=program)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"FloatingPointError: the loss is nan; epoch 0, batch 0: training samples (\d+, ){3}\d+",
        last,
    )


REFUSED = {
    "--break-at 1437": "there is no training sample 1437; they are numbered 0 to 1436",
    "--break-at -1": "there is no training sample -1; they are numbered 0 to 1436",
    "--break-how none": "--break-how: needs --break-at N",
    "--epochs 0": "--epochs: must be from 1 to",
    "--batch-size 0": "--batch-size: must be from 1 to",
    "--workers -1": "--workers: must be from 0 to",
    "--seed x": "--seed: invalid int value: 'x'",
}


def test_arguments_that_make_no_sense_are_refused() -> None:
    program = """
import contextlib, sys, train_digits
for arguments in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        train_digits.main(arguments.split())
        print("accepted", arguments)
"""
    done = run(*REFUSED, program=program)
    assert (done.returncode, done.stdout) == (0, "")
    complaints = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(complaints) == len(REFUSED)
    for expected, complaint in zip(REFUSED.values(), complaints, strict=True):
        assert expected in complaint


@pytest.mark.thorough
@pytest.mark.uncovered
@pytest.mark.slow
def test_a_training_that_is_killed_ends_with_the_same_weights() -> None:
    """And four ranks, and then two, have the samples of one."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "examples" / "resume.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("    killed") == 2
    assert "resumed at batch" in done.stdout
    assert done.stdout.splitlines()[-1] == (
        "14 global batches and 14: the same samples, bit for bit"
    )
