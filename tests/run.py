"""Run the tests with line coverage, workers included: ``python -m tests.run [pytest arguments]``.

Worker processes measure themselves (coverage's ``concurrency = multiprocessing``); their data is
combined with that of the main process, and the run fails below the bar in ``pyproject.toml``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> int:
    def coverage(*command: str) -> int:
        return subprocess.run([sys.executable, "-m", "coverage", *command], cwd=ROOT).returncode

    coverage("erase")
    status = coverage("run", "-m", "pytest", *arguments)
    coverage("combine", "--quiet")
    report = coverage("report", "--skip-covered")
    return status or report


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
