"""Run tests with every Python and torch that is claimed: ``python -m tests.versions``.

Each pair has a virtual environment of its own, and what came of it is a line of
``docs/versions.csv``, which ``docs/versions.rst`` shows::

    python -m tests.versions                                   # every pair, the quick tests
    python -m tests.versions --tests full 3.11:2.6.0           # one pair, all tests

A Python that is not on the path is looked for among those of pyenv. pip takes torch from where it
is told to: where ``PIP_EXTRA_INDEX_URL`` names https://download.pytorch.org/whl/cpu, the CPU build.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "versions.csv"
COLUMNS = (
    "python",
    "torch",
    "tests",
    "date",
    "passed",
    "failed",
    "second try",
    "skipped",
    "minutes",
)

PYTHONS = ("3.11", "3.12", "3.13")
TORCHES = ("2.6.0", "2.7.1", "2.8.0", "2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1")
"""The oldest release that is claimed, the last of each line, and the newest that was tried."""
PAIRS = tuple((python, torch) for torch in TORCHES for python in PYTHONS)
ENDS = tuple(pair for pair in PAIRS if pair[1] in (TORCHES[0], TORCHES[-1]))

# What rests on private names of torch or on the Python. Without the start methods that import torch
# in each worker, but where a test is of them.
_FORK = ("-m", "not slow and not lightning", "-k", "not forkserver and not spawn")
_FAULTS = (
    "KeyError",
    "SIGKILL from inside",
    "SIGSEGV by a null pointer",
    "sample of another shape",
    "sampler raises in the middle",
)
QUICK = (
    *_FORK,
    *(f"tests/unit/test_{each}.py" for each in ("causes", "drawing", "free_threading")),
    *(f"tests/unit/test_{each}.py" for each in ("interrupts", "result_queue", "task_queue")),
    "tests/unit/test_torch.py::test_this_torch_is_known",
    "tests/unit/test_other_systems.py::test_this_python_has_all_names",
    "tests/parity/test_modes.py::test_same_as_stock_with_workers",
    "tests/parity/test_modes.py::test_out_of_order_delivers_the_same_multiset",
    "tests/parity/test_modes.py::test_off_is_the_stock_loader",
    *(f"tests/catalogue/test_catalogue.py::test_fault_is_told[{each}, fork]" for each in _FAULTS),
    "tests/processes/test_launcher.py::test_the_program_does_as_without_it[kinds]",
)
WIDE = (
    *_FORK,
    *(f"tests/unit/test_{each}.py" for each in ("beside", "fork_notice", "other_systems")),
    *(f"tests/unit/test_{each}.py" for each in ("random_state", "run_command", "stacks", "torch")),
    *("tests/parity/test_modes.py", "tests/parity/test_transport_leaves.py"),
    *("tests/processes/test_failures.py", "tests/processes/test_instrument.py"),
    "tests/processes/test_launcher.py::test_the_program_does_as_without_it",
    "tests/processes/test_launcher.py::test_children_are_recorded_too",
)
TESTS = {
    "quick": QUICK,
    "wide": WIDE,
    "one process": ("--one-process", "-m", "not slow and not lightning"),
    "full": (),
}


def python_of(version: str) -> str:
    """The interpreter of a minor version.

    Raises:
        FileNotFoundError: if there is none.
    """
    found = shutil.which(f"python{version}")
    works = found and subprocess.run([found, "--version"], capture_output=True).returncode == 0
    if found and works:  # pyenv's stand-ins may have nothing behind them
        return found
    for path in sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")):
        return str(path)
    raise FileNotFoundError(f"there is no Python {version}")


def made(folder: Path, python: str, torch: str) -> str:
    """The interpreter of an environment for this pair, made unless it is there."""
    inside = str(folder / "bin" / "python")
    if not (folder / "ready").exists():
        subprocess.run([python_of(python), "-m", "venv", "--clear", folder], check=True)
        pip = (inside, "-m", "pip", "install", "--quiet")
        subprocess.run([*pip, "--upgrade", "pip"], check=True)
        # torch comes first and alone, so that no other package chooses its build.
        subprocess.run([*pip, f"torch=={torch}"], check=True)
        extras = ".[test,lightning,parquet]"
        subprocess.run([*pip, f"torch=={torch}", "-e", extras], check=True, cwd=ROOT)
        (folder / "ready").touch()
    return inside


def run(python: str, words: tuple[str, ...], report: Path) -> tuple[dict[str, int], list[str]]:
    """Run pytest; how many tests had which outcome, and the names of those that failed.

    Raises:
        RuntimeError: if it ended before it had a report.
    """
    report.unlink(missing_ok=True)
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-o", "junit_family=xunit1", f"--junitxml={report}", *words],
        cwd=ROOT,
    )
    if not report.exists():
        raise RuntimeError(f"pytest ended with status {done.returncode} and no report")
    return counted(report)


def counted(report: Path) -> tuple[dict[str, int], list[str]]:
    """Outcomes of a report in JUnit's form, and the node ids of the tests that failed."""
    failed = dict.fromkeys(_failed(report))
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")  # pytest's own
    cases = {(each.get("classname"), each.get("name")): each for each in suite.iter("testcase")}
    skipped = sum(each.find("skipped") is not None for each in cases.values())
    passed = len(cases) - len(failed) - skipped
    return {"passed": passed, "failed": len(failed), "skipped": skipped}, list(failed)


def _failed(report: Path) -> Iterator[str]:
    for case in ElementTree.parse(report).getroot().iter("testcase"):  # pytest's own
        if case.find("failure") is None and case.find("error") is None:
            continue
        file, classname = case.get("file") or "", case.get("classname") or ""
        module = file.removesuffix(".py").replace("/", ".")
        classes = classname.removeprefix(module).strip(".").split(".")
        yield "::".join([file, *filter(None, classes), case.get("name") or ""])


def tried(python: str, torch: str, tests: str, folder: Path) -> dict[str, Any]:
    """The line of the table for a pair; a test that fails is run once more to be believed."""
    inside = made(folder, python, torch)
    began = time.monotonic()
    counts, failed = run(inside, TESTS[tests], folder / "report.xml")
    again = 0
    if failed:
        _, still = run(inside, tuple(failed), folder / "again.xml")
        again = len(failed) - len(still)
    asks = "import platform, torch; print(platform.python_version(), torch.__version__)"
    versions = subprocess.run([inside, "-W", "ignore", "-c", asks], capture_output=True, text=True)
    exact = versions.stdout.split()
    return {
        "python": exact[0],
        "torch": exact[1],
        "tests": tests,
        "date": datetime.date.today().isoformat(),
        "passed": counts["passed"] + again,
        "failed": counts["failed"] - again,
        "second try": again,
        "skipped": counts["skipped"],
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def rows() -> list[dict[str, str]]:
    """The lines of the table."""
    if not TABLE.exists():
        return []
    with open(TABLE, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    release = row["torch"].partition("+")[0]
    python = row["python"].rpartition(".")[0]
    return [int(each) for each in release.split(".")], python, list(TESTS).index(row["tests"])


def note(row: dict[str, Any]) -> None:
    """Put a line into the table, in the place of an older one of the same pair and tests."""
    kept = [each for each in rows() if _key(each) != _key(row)]
    with open(TABLE, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*kept, row], key=_key))


def main(words: list[str]) -> int:
    """Run the pairs asked for; 1 if a test failed twice."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions")
    parser.add_argument("pairs", nargs="*", metavar="PYTHON:TORCH", help="default: all claimed")
    parser.add_argument("--tests", choices=TESTS, default="quick")
    parser.add_argument("--venvs", default=".venv-versions", help="a folder for the environments")
    parser.add_argument("--remove", action="store_true", help="each environment after its run")
    parser.add_argument(
        "--list", choices=("ends", "all"), help="print pairs as JSON, as CI's jobs want them"
    )
    asked = parser.parse_args(words)
    if asked.list:
        pairs = ENDS if asked.list == "ends" else PAIRS
        print(json.dumps([{"python": python, "torch": torch} for python, torch in pairs]))
        return 0
    failed = 0
    for pair in asked.pairs or [":".join(pair) for pair in PAIRS]:
        python, _, torch = pair.partition(":")
        folder = Path(os.path.abspath(asked.venvs)) / f"py{python}-torch{torch}"
        row = tried(python, torch, asked.tests, folder)
        note(row)
        print(*(f"{name} {value}" for name, value in row.items()), sep=", ", flush=True)
        failed += row["failed"]
        if asked.remove:
            shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
