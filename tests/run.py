"""Run all tests: ``python -m tests.run``, or with pytest's arguments a part of them.

The fault catalogue runs first and by itself: it starts and kills some hundred workers, and asks
how soon that is told. The rest runs under line coverage, which slows the start and end of every
process. Worker processes measure themselves (coverage's ``concurrency = multiprocessing``); their
data is combined with that of the main process, and the run fails below the bar in
``pyproject.toml``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CATALOGUE = "tests/catalogue"


def main(arguments: list[str]) -> int:
    def run(*command: str) -> int:
        return subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode

    if arguments:
        return run("pytest", *arguments)
    told = run("pytest", CATALOGUE)
    run("coverage", "erase")
    status = run("coverage", "run", "-m", "pytest", f"--ignore={CATALOGUE}")
    run("coverage", "combine", "--quiet")
    report = run("coverage", "report", "--skip-covered")
    return told or status or report


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
