"""From how a worker ended, or where it hangs, to what a person is told: a table."""

from __future__ import annotations

import queue
import re
import signal
import sys
import types
from pathlib import Path
from traceback import FrameSummary as Frame
from typing import Any

import numpy as np
import pytest

from safeloader.introspect import resources
from safeloader.introspect.advice import FILE, NATIVE, THREAD
from safeloader.introspect.suspects import Inherited
from safeloader.supervision import causes
from safeloader.supervision.causes import Forked, Pace, WorkerEnd, ended, of_death, of_silence
from safeloader.supervision.stacks import Stack

NO_STACK = Stack((), "")
AT_DECODE = Stack((Frame("/data/faces.py", 41, "decode"),), "")
GIB = 1 << 30


def end(**known: Any) -> WorkerEnd:
    defaults: dict[str, Any] = {
        "exit_code": 1,
        "phase": "fetch",
        "index": 137,
        "stack": NO_STACK,
        "oom_killed": 0,
        "grown_bytes": 0,
    }
    return WorkerEnd(**(defaults | known))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, "ended"),
        (0, "exited with code 0"),
        (3, "exited with code 3"),
        (-9, "was killed by SIGKILL (signal 9)"),
        (-11, "was killed by SIGSEGV (signal 11)"),
        (-63, "was killed by signal 63"),
        (-99, "was killed by signal 99"),
    ],
)
def test_how_it_ended(code: int | None, words: str) -> None:
    assert ended(code) == words


TRACEBACK = Stack((), "Traceback (most recent call last):\n  ...\nSystemExit: 1")
INTERRUPT = Stack((), "Traceback (most recent call last):\n  ...\nKeyboardInterrupt")


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"stack": TRACEBACK}, [r"sys\.exit\(\)", "at index 137", "Raise an exception there"]),
        ({"stack": TRACEBACK, "exit_code": 0, "index": None}, [r"sys\.exit\(\)"]),
        ({"stack": INTERRUPT}, ["interrupted", "Ctrl-C"]),
        (
            {"exit_code": 3},
            [r"os\._exit\(\)", "at index 137", r"dataset\[137\] in a fresh process rep"],
        ),
        (
            {"exit_code": 3, "index": (1, 5), "of_stream": True},
            ["worker 1's part .* up to sample 5 .* repeats"],
        ),
        ({"exit_code": 3, "index": (1, 5)}, [r"dataset\[\(1, 5\)\] in a fresh process repeats"]),
        ({"exit_code": 0, "index": None}, [r"os\._exit\(\)", "num_workers=0"]),
        (
            {"exit_code": 1, "phase": "starting", "index": None},
            ["before it could report", "__main__", "cannot import"],
        ),
        ({"exit_code": -9, "oom_killed": 2}, ["out of memory", "killed 2 process", "fewer"]),
        ({"exit_code": -9, "grown_bytes": 2 * GIB}, ["probably out of memory", "dmesg"]),
        ({"exit_code": -9}, ["killed from outside", "dmesg"]),
        (
            {"exit_code": -11, "stack": AT_DECODE},
            ["native library is at fault at index 137", r"/data/faces\.py:41 in decode"],
        ),
        ({"exit_code": -11}, ["native library", r"loader\.dataset\[137\]", "faulthandler"]),
        ({"exit_code": -11, "index": None}, ["native library", "num_workers=0"]),
        ({"exit_code": -11, "index": "a.jpg"}, [r"loader\.dataset\['a\.jpg'\]"]),
        ({"exit_code": -8}, ["native library is at fault at index 137"]),
        ({"exit_code": -6}, [r"gave up at index 137 \(abort", "corrupted memory"]),
        ({"exit_code": -4}, ["processor lacks", "build"]),
        ({"exit_code": -15}, ["asked it to end"]),
        ({"exit_code": -1}, ["asked it to end"]),
        ({"exit_code": -2}, ["asked it to end"]),
        ({"exit_code": -signal.SIGXCPU}, ["ulimit"]),
        ({"exit_code": -signal.SIGXFSZ}, ["ulimit"]),
    ],
)
def test_what_is_made_of_a_death(
    known: dict[str, Any], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty = resources.machine_memory()
    if plenty is not None:
        plenty = plenty._replace(available=plenty.total)
    monkeypatch.setattr(causes, "machine_memory", lambda: plenty)
    said = of_death(end(**known))
    for word in words:
        assert re.search(word, said), said


def test_a_bus_error_with_and_without_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = resources.shared_memory()
    assert shared is not None
    for free, word in ((1 << 20, "--shm-size"), (shared.total, "np.memmap")):
        found = shared._replace(free=free, total=max(shared.total, 64 << 20))
        monkeypatch.setattr(resources, "shared_memory", lambda found=found: found)
        said = of_death(end(exit_code=-signal.SIGBUS))
        assert word in said
    assert "at index 137" in said
    monkeypatch.setattr(resources, "shared_memory", lambda: None)
    said = of_death(end(exit_code=-signal.SIGBUS))
    assert "np.memmap" in said
    assert "rename them when they are whole" in said
    assert "loader.dataset[137] in a fresh process repeats it" in said


def test_little_memory_left_is_said_though_the_kernel_counted_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = resources.machine_memory()
    assert memory is not None
    low = memory._replace(available=memory.total // 100)
    monkeypatch.setattr(causes, "machine_memory", lambda: low)
    assert "probably out of memory" in of_death(end(exit_code=-9))
    monkeypatch.setattr(causes, "machine_memory", lambda: None)
    assert "killed from outside" in of_death(end(exit_code=-9))


@pytest.mark.parametrize("number", sorted(set(signal.Signals)))
def test_every_signal_has_something_said_of_it(number: int) -> None:
    assert len(of_death(end(exit_code=-number))) > 40


def at(name: str, file: str = "/data.py") -> Stack:
    return Stack((Frame(file, 7, name),), "")


@pytest.mark.parametrize(
    ("stack", "status", "phase", "method", "words"),
    [
        (None, None, "unknown", "fork", ["no worker is at work", "worker_init_fn"]),
        (at("acquire"), "stopped", "fetch", "fork", ["SIGSTOP", "kill -CONT"]),
        (None, "disk-sleep", "fetch", "fork", ["disk or network share"]),
        (None, "sleeping", "starting", "spawn", ["unpickling the dataset"]),
        (None, "sleeping", "fetch", "fork", ["timeout="]),
        (NO_STACK, None, "fetch", "spawn", ["timeout="]),
        (at("acquire"), None, "fetch", "fork", ["lock", "inherited through fork", "forkserver"]),
        (at("acquire"), None, "fetch", "spawn", ["lock", "who is to release it"]),
        (at("resize"), None, "fetch", "fork", ["stuck", "index 137", r"/data\.py:7 in resize"]),
        (at("resize"), None, "fetch", "forkserver", ["stuck", r"/data\.py:7 in resize"]),
    ],
)
def test_what_is_made_of_a_silence(
    stack: Stack | None, status: str | None, phase: str, method: str, words: list[str]
) -> None:
    said = of_silence(stack, status, phase, 137, method)
    for word in words:
        assert re.search(word, said), said
    if method != "fork":
        assert "inherited" not in said
        assert "fork:" not in said


def test_a_wait_names_the_line_that_is_the_users() -> None:
    waits = [
        number
        for number, line in enumerate(Path(queue.__file__).read_text().splitlines(), 1)
        if "self.not_empty.wait()" in line
    ]
    waiting = Frame(queue.__file__, waits[0], "get")
    users = Frame("/data/faces.py", 7, "read")
    said = of_silence(Stack((waiting, users), ""), None, "fetch", 137, "spawn")
    assert f"thread at /data/faces.py:7 in read, in queue.py:{waits[0]} get: see" in said
    alone = of_silence(Stack((waiting,), ""), None, "fetch", 137, "spawn")
    assert f"thread at {queue.__file__}:{waits[0]} in get: see" in alone


# ── what the training process had when the worker was forked ─────────────────────────────────────

POLARS = Forked(threads={"polars": ("polars-0", "polars-1"), "Python": ("zarr_io",)})
USERS = Frame("/data/table.py", 7, "read")


def library(package: str) -> Stack:
    """Stuck in a library's Python code, called from the user's."""
    inside = Frame(f"/venv/lib/python3.11/site-packages/{package}/frame.py", 90, "collect")
    return Stack((inside, USERS), "")


def line(text: str) -> Stack:
    """Stuck in native code that the user's line calls: no frame tells which."""
    return Stack((Frame("/data/table.py", 7, "read", line=text),), "")


@pytest.mark.parametrize("stack", [library("polars"), line("row = pl.scan(path).collect()")])
def test_the_threads_of_the_library_that_hangs_are_named(stack: Stack) -> None:
    said = of_silence(stack, None, "fetch", 137, "fork", forked=POLARS)
    assert "at /data/table.py:7 in read" in said
    assert "in polars. Its threads (polars-0, polars-1) ran in the training process" in said
    assert "Use polars in the workers alone" in said
    assert "cv2" not in said
    assert "zarr" not in said


def test_a_library_is_known_by_whatever_name_the_program_has_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, native, plain = (types.ModuleType(name) for name in ("program", "decoding", "plain"))
    program.__file__, native.__file__ = "/data/table.py", "/venv/decoding.so"
    vars(program).update(dec=native, pl=plain, np=np)
    for module in (program, native, plain):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    said = of_silence(line("frame = dec.read(path)"), None, "fetch", 137, "fork")
    assert "in decoding; if that ran in the training process" in said
    for text in ("pl.scan(path)", "np.sort(rows)", "self.rows.sort()"):
        assert of_silence(line(text), None, "fetch", 137, "fork").endswith("for index 137")


def test_a_library_without_known_threads_is_named_by_the_stack() -> None:
    said = of_silence(library("cv2"), None, "fetch", 137, "fork")
    assert "in OpenCV; if that ran in the training process" in said
    assert "cv2.setNumThreads(0)" in said
    said = of_silence(line("cv2.resize(image, size)"), None, "fetch", 137, "fork")
    assert "cv2.setNumThreads(0)" in said


@pytest.mark.parametrize("stack", [library("requests_of_no_kind"), line("total = sum(rows)")])
def test_no_library_is_guessed(stack: Stack) -> None:
    said = of_silence(stack, None, "fetch", 137, "fork")
    assert said.endswith("for index 137")
    said = of_silence(stack, None, "fetch", 137, "fork", forked=POLARS)
    assert "had threads of polars (polars-0, polars-1), Python (zarr_io)" in said


def test_nothing_is_said_of_forks_where_there_was_none() -> None:
    for stack in (library("polars"), line("cv2.resize(image, size)")):
        assert "fork" not in of_silence(stack, None, "fetch", 137, "spawn", forked=POLARS)


POOL = Inherited("dataset.pool", "concurrent.futures.ThreadPoolExecutor", *THREAD)
ARCHIVE = Inherited("dataset.archive", "zipfile.ZipFile", *FILE)


def test_what_was_warned_of_at_the_start_is_the_first_suspect() -> None:
    waiting = Frame("/usr/lib/python3.11/threading.py", 320, "wait")
    stack = Stack((waiting, Frame("/data/table.py", 7, "read", line="self.submit()")), "")
    said = of_silence(stack, None, "fetch", 137, "fork", forked=Forked((ARCHIVE, POOL)))
    assert "first suspect: dataset.pool (concurrent.futures.ThreadPoolExecutor)" in said
    assert "on first use" in said
    named = line("self.archive.read(name)")
    said = of_silence(named, None, "fetch", 137, "fork", forked=Forked((ARCHIVE, POOL)))
    assert "first suspect: dataset.archive" in said
    other = line("time.sleep(3)")
    assert "suspect" not in of_silence(
        other, None, "fetch", 137, "fork", forked=Forked((ARCHIVE, POOL))
    )


CAPTURE = Inherited("dataset.cap", "video.Capture", *NATIVE)


def test_a_librarys_object_in_the_line_that_hangs_is_suspected() -> None:
    hangs = line("self.cap.set(cv2.CAP_PROP_POS_FRAMES, index)")
    said = of_silence(hangs, None, "fetch", 137, "fork", forked=Forked(natives=lambda: (CAPTURE,)))
    assert "first suspect: dataset.cap (video.Capture), which the training process made" in said
    assert "Open or make it in the worker" in said
    assert "setNumThreads" not in said
    had = Forked(natives=lambda: (CAPTURE,), threads={"PyAV (FFmpeg)": ("av:h264:df0",)})
    assert "it had threads of PyAV (FFmpeg) (av:h264:df0). Open" in of_silence(
        hangs, None, "fetch", 137, "fork", forked=had
    )
    for text, method in (("cv2.resize(image)", "fork"), ("self.cap.read()", "spawn")):
        other = of_silence(line(text), None, "fetch", 137, method, forked=had)
        assert "suspect" not in other


@pytest.mark.parametrize(
    ("pace", "slow"),
    [
        (Pace(2, 8, 0.8, 0.3), True),
        (Pace(2, 8, 0.8, 5.0), False),  # the sample it is at takes much longer
        (None, False),
    ],
)
def test_a_batch_whose_samples_come_one_by_one_is_slow(pace: Any, slow: bool) -> None:
    for timeout in (True, False):
        said = of_silence(
            line("time.sleep(0.4)"), None, "fetch", 137, "fork", timeout=timeout, pace=pace
        )
        assert said.startswith("it is slow, and not stuck: 2 of the 8 samples") == slow
        assert ("in 0.4 s each, so the batch takes about 3.2 s" in said) == slow


def test_an_unknown_index_is_not_named() -> None:
    assert "None" not in of_silence(at("resize"), None, "collate", None, "fork")
    assert "None" not in of_death(end(exit_code=-11, index=None))
