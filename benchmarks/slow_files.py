"""A command of safeloader whose file system answers late: `python -m benchmarks.slow_files`.

It prints, as JSON, the CPU time and how often a file was opened or looked up, or a folder listed.
It imports no torch, as the commands do.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from safeloader.__main__ import main as safeloader


def answer(wait_s: float, command: Sequence[str]) -> None:
    """Run a command here, each call to the file system ``wait_s`` later; print what it took."""
    run, calls = os.path.abspath(command[1]), 0

    def waits(path: Any) -> None:
        nonlocal calls
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(run):
            calls += 1
            time.sleep(wait_s)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir"):
            waits(arguments[0])

    def slower(function: Any) -> Any:
        def later(path: Any, *more: Any, **named: Any) -> Any:
            waits(path)
            return function(path, *more, **named)

        return later

    sys.addaudithook(hook)
    for owner, name in ((os, "stat"), (os, "lstat"), (pa, "memory_map"), (pq, "ParquetFile")):
        setattr(owner, name, slower(getattr(owner, name)))
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            status = safeloader([*command])
    except SystemExit as ended:
        status = int(ended.code or 0)
    cpu = time.process_time()
    print(
        json.dumps({"cpu_s": cpu, "calls": calls, "status": status, "chars": len(said.getvalue())})
    )
    return 0


if __name__ == "__main__":
    answer(float(sys.argv[1]), sys.argv[2:])
