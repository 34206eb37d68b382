"""The tests that need a card, run by pytest in a process of its own.

A part of `benchmarks.gpu`. Of the tests' own set-up only what pytest itself has is used: a machine
with a card may have no other of the libraries.
"""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu_budget import Budget, NoTime, Row

ROOT = Path(__file__).parents[1]
TESTS = {
    "tests/processes/test_cuda.py": (),
    "tests/unit/test_fork_hazards.py::test_tensors_on_cuda_are_told": ("PIL",),
}
"""Each with the libraries that its file imports besides torch, NumPy and pytest."""
GRACE_S = 10
OUTCOMES = {"skipped": "skipped", "failure": "failed", "error": "error"}
INI = """[pytest]
addopts = -p no:cacheprovider
faulthandler_timeout = 60
"""
"""The project's own settings ask for plugins that may not be there."""


def rows(budget: Budget, tests: dict[str, tuple[str, ...]] | None = None) -> Iterator[Row]:
    """A row for each test, and an error for each that failed.

    Args:
        budget: pytest is interrupted a little before its end, and tells what it has.
        tests: those of the project, or others.
    """
    chosen = []
    for name, libraries in (TESTS if tests is None else tests).items():
        missing = [each for each in libraries if importlib.util.find_spec(each) is None]
        if missing:
            yield {"note": f"{name}: left out, {', '.join(missing)} is not installed"}
        else:
            chosen.append(name)
    limit_s = budget.left_s() - GRACE_S
    if limit_s <= 0:
        raise NoTime
    with tempfile.TemporaryDirectory(prefix="safeloader-benchmark-") as folder:
        report = Path(folder, "report.xml")
        said = run(chosen, Path(folder), report, limit_s)
        if not report.is_file():
            yield {"error": "pytest left no report", "output": said[-4000:]}
            return
        yield from read(report)
    if "KeyboardInterrupt" in said:
        yield {"error": f"the tests were interrupted after {limit_s:.0f} s: {_last(said)}"}


def run(names: list[str], folder: Path, report: Path, limit_s: float) -> str:
    """What pytest printed."""
    (folder / "pytest.ini").write_text(INI, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-c", str(folder / "pytest.ini")]
    command += [f"--rootdir={ROOT}", "--noconftest", "-v", "--tb=short", f"--junitxml={report}"]
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *names], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # then it still writes its report
            try:
                process.wait(timeout=GRACE_S / 2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return log.read_text(encoding="utf-8", errors="replace")


def read(report: Path) -> Iterator[Row]:
    """The rows of a report in junit's form."""
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314  (pytest wrote it)
        name, outcome, message, text = case.get("name", "?"), "passed", "", ""
        for kind, so in OUTCOMES.items():
            found = case.find(kind)
            if found is not None:
                outcome, text = so, "".join(found.itertext())
                message = " ".join((found.get("message") or "").split())[:300]
        yield {
            "table": "Tests that need a card",
            "test": name,
            "outcome": outcome,
            "s": float(case.get("time", 0)),
            "why": message or None,
        }
        if outcome in ("failed", "error"):
            yield {"error": f"{name}: {message}", "output": text[-4000:]}


def _last(said: str) -> str:
    lines = [line for line in said.splitlines() if "::" in line]
    return lines[-1] if lines else "no test had begun"
