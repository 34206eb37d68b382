"""Run all tests: ``python -m tests.run``, or with pytest's arguments a part of them.

Line coverage slows the start and end of every process by half. What starts hundreds of workers,
to compare them with the stock loader's or to kill them and ask how soon that is told, runs first
and without it. The rest runs under coverage: worker processes measure themselves (coverage's
``concurrency = multiprocessing``), their data is combined with that of the main process, and the
run fails below the bar in ``pyproject.toml``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_COVERAGE = (
    "tests/catalogue",
    "tests/frameworks",
    "tests/parity",
    "tests/processes/test_soak.py",
)


def main(arguments: list[str]) -> int:
    def run(*command: str) -> int:
        return subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode

    if arguments:
        return run("pytest", *arguments)
    plain = run("pytest", *WITHOUT_COVERAGE)
    run("coverage", "erase")
    status = run(
        "coverage", "run", "-m", "pytest", *(f"--ignore={part}" for part in WITHOUT_COVERAGE)
    )
    run("coverage", "combine", "--quiet")
    report = run("coverage", "report", "--skip-covered")
    return plain or status or report


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
