"""Run all tests: ``python -m tests.run``, or with pytest's arguments a part of them.

Coverage takes some 20 ms of each process that ends. What starts hundreds of workers, to compare
them with the stock loader's or to kill them and ask how soon that is told, is marked ``uncovered``:
it runs without it. The rest runs under coverage: worker processes measure themselves
(coverage's ``concurrency = multiprocessing``), their data is combined with that of the main
process, and the run fails below the bars for lines and for branches.

Two halves run beside each other, each about as long as the other: what starts processes under
coverage and the tests of the documentation, and all else. What that prints comes when it has ended.

``pytest --examples=20 -m hypothesis`` tries twenty times as many examples of every property.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ABOUT = "all tests, with coverage: about 45 minutes on two cores that have nothing else to do"
# Programs with real frameworks have an environment of their own: `make test-frameworks`.
_USUAL = "not frameworks and not thorough"
_RUN = ("coverage", "run", "--source=safeloader", "-m", "pytest")
_COVERED = (*_RUN, "-m", f"not uncovered and {_USUAL}")
UNCOVERED = ("pytest", "-m", f"uncovered and {_USUAL}", "tests")
COVERED_PROCESSES = (*_COVERED, "tests/processes")
COVERED_UNITS = (*_COVERED, "tests/unit")
COVERED_REST = (*_COVERED, "tests", "--ignore=tests/processes", "--ignore=tests/unit")
BARS = {"lines": 95.0, "branches": 90.0}  # percent, of all modules of safeloader together


def shares(totals: dict[str, Any]) -> dict[str, float]:
    """Percent of lines and of branches that ran, by the totals of ``coverage json``."""
    return {
        "lines": 100 * totals["covered_lines"] / totals["num_statements"],
        "branches": 100 * totals["covered_branches"] / totals["num_branches"],
    }


def below(found: dict[str, float]) -> list[str]:
    """A line for each bar that is not reached."""
    return [
        f"coverage: {found[what]:.2f} % of {what}, and {bar:g} % is the least"
        for what, bar in BARS.items()
        if found[what] < bar
    ]


def main(arguments: list[str]) -> int:
    def run(*command: str, output: Any = None) -> int:
        words = [sys.executable, "-m", *command]
        where = os.environ | {"MEASURED_IN": str(ROOT)}  # also by processes that run elsewhere
        return subprocess.run(words, cwd=ROOT, env=where, stdout=output, stderr=output).returncode

    if arguments:
        return run("pytest", *arguments)
    print(ABOUT, flush=True)
    began = time.monotonic()
    run("coverage", "erase")
    with tempfile.TemporaryFile() as said, ThreadPoolExecutor(1) as pool:

        def beside() -> list[int]:
            return [run(*words, output=said) for words in (UNCOVERED, COVERED_UNITS)]

        other = pool.submit(beside)
        failed = [run(*words) for words in (COVERED_PROCESSES, COVERED_REST)]
        failed += other.result()
        said.seek(0)
        sys.stdout.buffer.write(said.read())
        sys.stdout.flush()
    run("coverage", "combine", "--quiet")
    run("coverage", "report", "--skip-covered")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coverage.json"
        missing = run("coverage", "json", "--quiet", "-o", str(path))
        found = (
            dict.fromkeys(BARS, 0.0) if missing else shares(json.loads(path.read_text())["totals"])
        )
    print(", ".join(f"{share:.2f} % of {what}" for what, share in found.items()))
    short = below(found)
    print(*short, f"{(time.monotonic() - began) / 60:.1f} minutes", sep="\n")
    return int(any(failed)) or len(short)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
