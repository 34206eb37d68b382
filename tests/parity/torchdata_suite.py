"""torchdata's own tests of its stateful loader, with the class swapped.

The files are torchdata's and not kept here. Get the folder ``test/stateful_dataloader`` of a
checkout of meta-pytorch/data, install torchdata, parameterized and expecttest, and run
``python -m tests.parity.torchdata_suite FOLDER``: each file runs with their class and with ours. It
fails if a test fails with ours that passes with theirs, but for :data:`DEVIATIONS`. It takes some
ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = ("test_state_dict.py", "test_sampler.py")
DEVIATIONS = {
    "TestInitialState_shard0::test_initial_state": "looks into their private _snapshot",
    "TestInitialState_shard0::test_load_state_after_initial_state_dict": (
        "looks into their private _snapshot"
    ),
    "TestNumWorkersMismatch_shard3::test_num_workers_mismatch": (
        "wants another number of workers to fail; ours goes on"
    ),
    "TestInitialState_shard0::test_init_error": (
        "wants the error of worker_init_fn from iter(); ours comes in the place of a batch"
    ),
}
_THEIRS = re.compile(
    r"^from torchdata\.stateful_dataloader import (Stateful, )?StatefulDataLoader$", re.MULTILINE
)


def with_ours(source: str) -> str:
    """The test file with ``StatefulDataLoader`` imported from safeloader.

    Raises:
        ValueError: if the file does not import it in a way that is known.
    """

    def swapped(found: re.Match[str]) -> str:
        rest = "from torchdata.stateful_dataloader import Stateful\n" if found[1] else ""
        return f"{rest}from safeloader import SafeStatefulDataLoader as StatefulDataLoader"

    source, number = _THEIRS.subn(swapped, source)
    if number != 1:
        raise ValueError("this file imports no StatefulDataLoader that could be swapped")
    return source


def failed(source: str, name: str, folder: Path) -> tuple[set[str], int]:
    """The tests that failed, in whole or in a part, and how many passed."""
    path = folder / name
    path.write_text(source)
    command = ["-W", "ignore", "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, *command, "--rootdir", str(folder), str(path)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    said = re.findall(r"^(?:SUB)?FAILED(?:\([^)]*\))? \S*?\.py::(\S+)", done.stdout, re.MULTILINE)
    passed = re.findall(r"^PASSED \S*?\.py::(\S+)", done.stdout, re.MULTILINE)
    if not passed:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return set(said), len(set(passed) - set(said))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.parity.torchdata_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tests", type=Path, help="the folder test/stateful_dataloader")
    folder = parser.parse_args(arguments).tests
    worse: set[str] = set()
    for name in FILES:
        source = (folder / name).read_text("utf-8")
        with tempfile.TemporaryDirectory() as here:
            theirs, of_them = failed(source, name, Path(here))
        with tempfile.TemporaryDirectory() as here:
            ours, of_us = failed(with_ours(source), name, Path(here))
        print(f"{name}: {of_them} pass with torchdata's class, {of_us} with ours")
        for each in sorted(ours - theirs):
            print(f"  {each}: {DEVIATIONS.get(each, 'FAILS')}")
        worse |= ours - theirs - DEVIATIONS.keys()
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
