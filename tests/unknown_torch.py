"""Runs loaders over a torch in which a name has moved; a program that prints JSON, run by tests.

``python -m tests.unknown_torch`` reads a list of cases from stdin, each ``[kind, where, name]``.
Torch is imported once and safeloader never before the fork: each case has a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy.random  # noqa: F401  (what safeloader imports, once for all cases)
import psutil  # noqa: F401  (the same)
import torch
import torch.utils.data
import torch.utils.data.dataloader
import torch.utils.data.graph_settings

ROOT = Path(torch.utils.data.__file__).parent
AGAIN = ["_utils.fetch", "_utils.worker", "dataloader"]  # read once more, from changed source


def takes_away(module: str, path: str) -> None:
    """The name is gone; nothing of torch's that the test runs uses it."""
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    delattr(owner, name)


def rewrites(change: Callable[[str, str], str]) -> None:
    """Torch's loader as if its source had been changed."""
    for short in AGAIN:
        module = importlib.import_module(f"torch.utils.data.{short}")
        path = ROOT / f"{short.replace('.', '/')}.py"
        source = change(short, path.read_text())
        exec(compile(source, str(path), "exec"), module.__dict__)  # the same module, defined anew
    for name, value in vars(torch.utils.data.dataloader).items():
        if name.startswith(("DataLoader", "_DatasetKind")):
            setattr(torch.utils.data, name, value)


def renames(_: str, name: str) -> None:
    """Everywhere in torch's loader the name is another one; torch itself works as ever."""
    for short in AGAIN:
        vars(importlib.import_module(f"torch.utils.data.{short}")).pop(name, None)
    rewrites(lambda _, source: re.sub(rf"(?<!\w){name}(?!\w)", f"{name}_moved", source))


ORDERS = {
    "a queue before that of the results": (
        "dataloader",
        "        self._worker_result_queue = multiprocessing_context.Queue()",
        "        self._spare = multiprocessing_context.Queue()\n"
        "        self._worker_result_queue = multiprocessing_context.Queue()",
    ),
    "the fetcher before worker_init_fn": (
        "_utils.worker",
        "            if init_fn is not None:\n                init_fn(worker_id)\n",
        "            _DatasetKind.create_fetcher(\n"
        "                dataset_kind, dataset, auto_collation, collate_fn, drop_last\n"
        "            )\n"
        "            if init_fn is not None:\n                init_fn(worker_id)\n",
    ),
    "workers that take no data_queue": ("_utils.worker", "data_queue", "results"),
}


def reorders(_: str, order: str) -> None:
    """Torch's loader does the same in another order."""
    module, old, new = ORDERS[order]

    def change(short: str, source: str) -> str:
        assert short != module or old in source
        return source.replace(old, new) if short == module else source

    rewrites(change)


MOVES = {"takes away": takes_away, "renames": renames, "reorders": reorders}


def outcome(made: Callable[[], Any]) -> Any:
    """What a loader gives in two epochs, and leaves of the random numbers; or the error."""
    torch.manual_seed(7)
    try:
        loader = made()
        batches = [[batch.tolist() for batch in loader] for _ in range(2)]
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}", None
    return [batches, torch.rand(1).item()], loader


def case(kind: str, where: str, name: str, workers: int) -> dict[str, Any]:
    """What stock does, and ours in each way; in a process of its own."""
    MOVES[kind](where, name)
    data: Any = torch.arange(10)
    arguments: dict[str, Any] = {"batch_size": 4, "shuffle": True, "num_workers": workers}
    stock, _ = outcome(lambda: torch.utils.data.DataLoader(data, **arguments))

    import safeloader
    from safeloader import _torch

    log = io.StringIO()
    logging.getLogger("safeloader").addHandler(logging.StreamHandler(log))
    told: dict[str, Any] = {"stock": stock}
    looked: list[bool] = []
    look = _torch.moved

    def counted() -> tuple[str, ...]:
        looked.append(True)
        return look()

    _torch.moved = counted  # type: ignore[assignment]  # a wrapper that counts
    for way, environment, given in (
        ("off", "off", {}),
        ("asked", "on", {"verify": "raise"}),
        ("default", "on", {}),
        ("again", "on", {"verify": "warn"}),
    ):
        os.environ["SAFELOADER"] = environment
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got, loader = outcome(lambda: safeloader.SafeDataLoader(data, **arguments, **given))  # noqa: B023  (called at once)
        told[way] = {
            "got": got,
            "warnings": [str(each.message) for each in caught],
            "here": [each.filename == __file__ for each in caught],
            "records": loader is not None
            and [str(loader.last_batch), str(loader.audit), loader.verify],
            "looked": len(looked),
        }
    told["log"] = log.getvalue()
    return told


def main() -> None:
    """Answer every case, in order."""
    for kind, where, name, workers in json.load(sys.stdin):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                text = json.dumps(case(kind, where, name, workers))
            except BaseException:
                text = json.dumps({"fault": traceback.format_exc()})
            with contextlib.suppress(OSError), os.fdopen(writer, "w") as file:
                file.write(text)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as file:
            print(file.read(), flush=True)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
