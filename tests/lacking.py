"""Uses safeloader on systems that lack names; a program that prints JSON, run by tests.

``python -m tests.lacking`` reads a list of cases from stdin: names to take away, by module, and
modules. Torch is imported once, on this system, and safeloader never before the fork: each case has
a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.popen_fork
import multiprocessing.reduction
import os
import sys
import tempfile
import traceback
import types
import warnings
from typing import Any

import numpy.random  # noqa: F401  (what safeloader imports, once for all cases)
import psutil  # noqa: F401  (the same)
import torch
import torch.multiprocessing.reductions
import torch.utils.data
import torch.utils.data.graph_settings

START_METHODS = "start methods"  # stands for what `multiprocessing` has besides spawn


def take_away(names: dict[str, list[str]], modules: list[str]) -> None:
    """This system has them no more, for whoever asks from now on."""
    for module in modules:
        sys.modules[module] = None  # type: ignore[assignment]  # importing it then fails
    for module, gone in names.items():
        if module == START_METHODS:
            for method in gone:
                vars(multiprocessing.context)["_concrete_contexts"].pop(method)
            multiprocessing.set_start_method("spawn")
            continue
        owner = importlib.import_module(module)
        for name in gone:
            if hasattr(owner, name):  # some are of other systems, or of later Pythons
                delattr(owner, name)


class Samples(torch.utils.data.Dataset[Any]):
    """Ten samples, one of which may raise."""

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self.bad:
            raise ZeroDivisionError("a bad sample")
        return torch.tensor(float(index))


def used() -> dict[str, Any]:
    """What a program without workers sees of each way in."""
    import safeloader

    logging.getLogger("safeloader").addHandler(logging.NullHandler())
    told: dict[str, Any] = {}
    loader: Any = safeloader.SafeDataLoader(Samples(), batch_size=4, num_workers=0, checksum=True)
    told["batches"] = [batch.tolist() for batch in loader]
    told["audit"] = str(loader.audit)
    with tempfile.TemporaryDirectory() as folder:
        loader = safeloader.SafeDataLoader(Samples(5), on_failure_dump=folder)
        try:
            list(loader)
        except ZeroDivisionError as error:
            told["error"] = [getattr(error, "index", None), loader.replay(2).item()]
        told["dumps"] = len(os.listdir(folder))
    theirs: Any = torch.utils.data.DataLoader(Samples(), batch_size=4)
    told["instrument"] = [
        safeloader.instrument(theirs) is theirs,
        len(list(theirs)),
        str(theirs.audit),
    ]
    told["launcher"] = launched()
    return told


class Became(BaseException):
    """What this process would have become."""


def becomes(path: str, words: list[str], environment: dict[str, str]) -> None:
    raise Became(path)


def launched() -> list[Any]:
    """The launcher's exit status and words: with nothing, with no such program, and beside a child;
    and the program that it becomes."""
    from safeloader import __main__
    from safeloader.commands import run

    child = types.SimpleNamespace(wait=lambda: 0, send_signal=lambda number: None)
    run.subprocess = types.SimpleNamespace(Popen=lambda *_, **__: child)  # type: ignore[assignment]
    os.execve = becomes  # type: ignore[assignment]
    python = [sys.executable, "-c", "pass"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), tempfile.TemporaryDirectory() as folder:
        beside = ["--run", folder, "--expect-ranks", "1", *python]
        statuses = [__main__.main(["run", *words]) for words in ([], ["no-such-program"], beside)]
        try:
            __main__.main(["run", *python])
        except Became as became:
            return [statuses, str(became) == sys.executable, said.getvalue()]
    return []


def main() -> None:
    """Answer every case, in order."""
    fork, waitpid, end = os.fork, os.waitpid, os._exit  # a case has its own `os` without them
    for names, modules in json.load(sys.stdin):
        reader, writer = os.pipe()
        pid = fork()
        if pid == 0:
            try:
                take_away(names, modules)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    text = json.dumps(used())
            except BaseException:
                text = json.dumps({"fault": traceback.format_exc()})
            with contextlib.suppress(OSError), os.fdopen(writer, "w") as file:
                file.write(text)
            end(0)
        os.close(writer)
        with os.fdopen(reader) as file:
            print(file.read(), flush=True)
        waitpid(pid, 0)


if __name__ == "__main__":
    main()
