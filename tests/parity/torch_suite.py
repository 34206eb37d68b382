"""PyTorch's own DataLoader tests, with the class swapped or under the launcher.

The file is PyTorch's and not kept here. Get ``test/test_dataloader.py`` of a PyTorch checkout (or
``test/stateful_dataloader/test_dataloader.py`` of meta-pytorch/data, which tests the same) and run
``python -m tests.parity.torch_suite PATH``: it runs the file twice, with the stock loader and with
ours, and compares what passed. It takes some twelve minutes on two cores. With ``--launcher`` the
second run is that of the stock loader under ``python -m safeloader run``, and what that recorded is
counted too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STOCK = "from torch.utils.data import DataLoader  # the class under test"
FEWEST_EPOCHS = 100  # that the launcher records; some 330 are
OURS = "from safeloader import SafeDataLoader as DataLoader  # the class under test"


def with_class(source: str, line: str) -> str:
    """The test file with ``DataLoader`` imported by ``line``.

    Raises:
        ValueError: if the file does not import a DataLoader in a way that is known.
    """
    stateful = r"^from torchdata\.stateful_dataloader import StatefulDataLoader as DataLoader$"
    swapped, found = re.subn(stateful, line, source, flags=re.MULTILINE)
    if not found:  # PyTorch's own file imports it among others, from torch.utils.data
        swapped, found = re.subn(r"^    DataLoader,\n", "", source, count=1, flags=re.MULTILINE)
        heads = re.split(r"^(?=class )", swapped, maxsplit=1, flags=re.MULTILINE)
        swapped = f"\n{line}\n\n\n".join(heads)
    if not found:
        raise ValueError("this file imports no DataLoader that could be swapped")
    return swapped


def outcomes(source: str, folder: Path, run: Path | None = None) -> dict[str, int]:
    """How many tests passed, failed and were skipped; ``run``: by the launcher, recorded there."""
    path = folder / "test_dataloader.py"
    path.write_text(source)
    launcher = [] if run is None else ["-m", "safeloader", "run", "--run", run]
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder]
    command = [sys.executable, *launcher, *tests]
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [*map(str, command), str(path)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
    )
    summary = next(line for line in reversed(done.stdout.splitlines()) if " passed" in line)
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith("FAILED")))
    return {
        what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped)", summary)
    }


def recorded(run: Path) -> tuple[int, int]:
    """How many lines of the tests iterate loaders that were recorded, and how many epochs."""
    told: list[dict[str, Any]] = []
    for path in run.rglob("epochs.jsonl"):
        told += map(json.loads, path.read_text("utf-8").splitlines())
    epochs = [each for each in told if each["audit"] is not None]
    return len({each["loader"] for each in epochs}), len(epochs)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.parity.torch_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, help="the test file")
    parser.add_argument("--launcher", action="store_true", help="not swapped, but recorded")
    options = parser.parse_args(arguments)
    source = options.path.read_text()
    with tempfile.TemporaryDirectory() as folder:
        stock = outcomes(with_class(source, STOCK), Path(folder))
    print("stock", stock, flush=True)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as run:
        if not options.launcher:
            ours = outcomes(with_class(source, OURS), Path(folder))
            print("safeloader", ours)
            return 0 if ours == stock else 1
        ours = outcomes(with_class(source, STOCK), Path(folder), Path(run))
        lines, epochs = recorded(Path(run))
    print(f"launcher {ours}, {epochs} epochs recorded of loaders in {lines} lines")
    return 0 if ours == stock and epochs >= FEWEST_EPOCHS else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
