"""The way of one batch: how many functions of ours ``next()`` calls, in how many modules."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

import safeloader
from safeloader import SafeDataLoader

CALLS_MAX = 25
MODULES_MAX = 10
PACKAGE = str(Path(safeloader.__file__).parent)


def test_one_batch_takes_a_short_way() -> None:
    """Looked at with one worker and batches of four samples that lie ready."""
    loader = SafeDataLoader(list(torch.arange(400.0).view(100, 4)), batch_size=4, num_workers=1)
    iterator = iter(loader)
    for _ in range(10):
        batch = next(iterator)
    ways: list[list[tuple[str, str]]] = []

    def note(frame: Any, event: str, arg: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            ways[-1].append((code.co_filename.removeprefix(PACKAGE), code.co_qualname))

    for _ in range(8):
        time.sleep(0.05)
        ways.append([])
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            batch = next(iterator)
        finally:
            sys.setprofile(before)
    del batch
    way = min(ways, key=len)
    assert len(way) <= CALLS_MAX, way
    assert len({module for module, _ in way}) <= MODULES_MAX, way
