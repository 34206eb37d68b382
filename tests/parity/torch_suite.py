"""PyTorch's own DataLoader tests, with the class swapped.

The file is PyTorch's and not kept here. Get ``test/test_dataloader.py`` of a PyTorch checkout (or
``test/stateful_dataloader/test_dataloader.py`` of meta-pytorch/data, which tests the same) and run
``python -m tests.parity.torch_suite PATH``: it runs the file twice, with the stock loader and with
ours, and compares what passed. It takes some twelve minutes on two cores.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STOCK = "from torch.utils.data import DataLoader  # the class under test"
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


def outcomes(source: str, folder: Path) -> dict[str, int]:
    """How many tests passed, failed and were skipped."""
    path = folder / "test_dataloader.py"
    path.write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder]
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


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__)
        return 2
    source = Path(arguments[0]).read_text()
    found = {}
    for name, line in (("stock", STOCK), ("safeloader", OURS)):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = outcomes(with_class(source, line), Path(folder))
        print(name, found[name], flush=True)
    return 0 if found["stock"] == found["safeloader"] else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
