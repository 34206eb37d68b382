"""Each fault of the table, in each mode where it applies: what is told, when, and what is left."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import pickle
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from safeloader import SKIP, Failure, SafeDataLoader, SafeLoaderError
from tests import family
from tests.catalogue import faults
from tests.catalogue.faults import (
    BAD,
    FAULTS,
    LENGTH,
    UNKNOWN,
    Deed,
    Fault,
    Faulty,
    Scene,
    Stream,
    Times,
    wait_until,
)

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(),
    reason="signals and descriptors are counted as Linux has them",
)

TOLD_OF_DEATH_S = 2.0
FRESH_START_S = 40  # two fresh interpreters import torch, on a machine that may be busy
NOISE = re.compile("can only test a child process|Exception ignored|Traceback|Error in sys", re.I)


# ── what is held, before and after ───────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Held:
    """What this process holds of the machine."""

    children: frozenset[int]
    threads: frozenset[threading.Thread]
    descriptors: int
    shared: frozenset[str]

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        me = psutil.Process()
        return cls(
            frozenset(child.pid for child in me.children(recursive=True)),
            frozenset(threading.enumerate()),
            me.num_fds(),
            family.shared_memory(),
        )

    def beyond(self, before: Held) -> dict[str, Any]:
        """What is held now and was not before."""
        more = {
            "children": self.children - before.children,
            "threads": self.threads - before.threads,
            "descriptors": max(0, self.descriptors - before.descriptors),
            "shared memory": self.shared - before.shared,
        }
        return {name: what for name, what in more.items() if what}


@pytest.fixture(scope="module", autouse=True)
def servants_run() -> None:
    """What multiprocessing starts once and keeps is there before anything is counted."""
    multiprocessing.resource_tracker.ensure_running()
    multiprocessing.forkserver.set_forkserver_preload(["tests.catalogue.faults"])
    multiprocessing.forkserver.ensure_running()
    list(
        SafeDataLoader(
            Stream(Scene(Path()), faults.nothing), collate_fn=faults.as_list, num_workers=1
        )
    )


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    yield made
    clean_up()


def clean_up() -> None:
    while faults.to_undo:
        faults.to_undo.pop(0)()


# ── faults that are told as errors ───────────────────────────────────────────────────────────────


def loader_for(args: dict[str, Any], mode: str) -> SafeDataLoader[Any]:
    start, _, pinned = mode.partition(" ")
    args = {"batch_size": 4, "pin_memory": bool(pinned)} | args
    if start == "main":
        args.pop("timeout", None)
        args.pop("persistent_workers", None)
        return SafeDataLoader(**args)
    return SafeDataLoader(num_workers=2, multiprocessing_context=start, **args)


def provoked(loader: SafeDataLoader[Any], fault: Fault, scene: Scene) -> tuple[Any, float]:
    """The error and when it was caught; without its frames, which hold the iterator."""
    kept = []
    try:
        for _ in range(fault.epochs):
            iterator = iter(loader)
            came = 0
            while True:
                if fault.meddle is not None:
                    fault.meddle(scene, iterator, came)
                try:
                    batch = next(iterator)
                except StopIteration:
                    break
                came += 1
                if fault.keeps:
                    kept.append(batch)
    except SafeLoaderError as error:
        return error.with_traceback(None), time.monotonic()
    pytest.fail(f"nothing was told: {loader.audit}")


@contextlib.contextmanager
def ended_by_force(after_s: float) -> Iterator[list[int]]:
    """Kill every child of this process after a while: a hang fails one test and not the run."""
    killed: list[int] = []
    spared = {child.pid for child in psutil.Process().children(recursive=True)}

    def work() -> None:
        for child in psutil.Process().children(recursive=True):
            if child.pid not in spared:
                child.kill()
                killed.append(child.pid)

    timer = threading.Timer(after_s, work)
    timer.start()
    try:
        yield killed
    finally:
        timer.cancel()
        timer.join()


def cases() -> Iterator[Any]:
    for fault in FAULTS:
        for mode in fault.modes:
            anew = mode.startswith(("spawn", "forkserver"))
            # What fork shows is run by the other start methods in ``.ci/full``.
            shown = anew and faults.FORK in fault.modes
            marks = [pytest.mark.slow] * anew + [pytest.mark.thorough] * shown
            yield pytest.param(fault, mode, marks=marks, id=f"{fault.name}, {mode}")


@pytest.mark.parametrize(("fault", "mode"), [*cases()])
def test_fault_is_told(
    fault: Fault,
    mode: str,
    scene: Scene,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if "pinned" in mode:
        request.getfixturevalue("accelerator")
    before = Held.now()
    loader = loader_for(fault.args(scene), mode)
    began = time.monotonic()
    fresh = 0 if mode in (faults.MAIN, faults.FORK, faults.FORK_PINNED) else FRESH_START_S
    with ended_by_force(fault.bound_s + fresh + 2) as forced, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of what the workers inherit: below
        warnings.filterwarnings("ignore", "Got pickle error")  # torch says so before it raises
        error, told_at = provoked(loader, fault, scene)
    assert not forced, f"it hung, until its workers were killed: {error}"
    clean_up()
    assert_told(error, fault)
    assert told_at - began < fault.bound_s + fresh
    if fault.dies:
        assert told_at - scene.died_at < TOLD_OF_DEATH_S
    if fault.phase != "delivery":
        audit = loader.audit
        assert audit is None or not (audit.counts["duplicated"] or audit.counts["unexpected"])
        del audit
    del loader, error
    assert_nothing_left(before)
    # The fork server was started before stderr was captured.
    assert_quiet(capfd, None if mode == faults.FORKSERVER else fault.fingerprints)


def assert_told(error: SafeLoaderError, fault: Fault) -> None:
    text = str(error)
    assert isinstance(error, fault.told), text
    assert isinstance(error, fault.also), text
    assert error.failure is not None
    assert error.failure.phase == fault.phase, text
    if isinstance(fault.index, set):
        assert error.index in fault.index, text
    elif fault.index is not UNKNOWN:
        assert error.index == fault.index, text
    for words in fault.says:
        assert re.search(words, text), f"no {words!r} in\n{text}"
    json.dumps(error.failure.to_dict(), allow_nan=False)
    assert str(pickle.loads(pickle.dumps(error))) == text


def assert_nothing_left(before: Held) -> None:
    more: dict[str, Any] = {}

    def back() -> bool:
        more.clear()
        more.update(Held.now().beyond(before))
        return not more

    wait_until(back, bound_s=10)
    assert not more


def assert_quiet(capfd: pytest.CaptureFixture[str], fingerprints: str | None) -> None:
    printed = capfd.readouterr().err
    if fingerprints is None:
        assert not NOISE.search(printed), printed
    else:
        assert re.search(fingerprints, printed), printed
        assert not re.search("can only test a child|Exception ignored", printed), printed


def test_the_catalogue_is_large() -> None:
    assert len(FAULTS) >= 45
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


# ── faults in spite of which the loader goes on ──────────────────────────────────────────────────


class Mended(NamedTuple):
    """A fault, and what is delivered all the same.

    Attributes:
        name: what it is, for a person.
        args: makes the loader's arguments.
        gives: of the bad sample's batch: "without" it, "another" in its place, or "all" of it.
        reason: by ``audit.reasons``, why it was left out or came late.
        modes: where it applies.
    """

    name: str
    args: Callable[[Scene], dict[str, Any]]
    gives: str
    reason: str
    modes: tuple[str, ...] = (faults.MAIN, faults.FORK, faults.FORK_PINNED)


def skipping(name: str, deed: Deed, reason: str, **more: Any) -> Mended:
    place = more.pop("place", Faulty)
    modes = more.pop("modes", Mended._field_defaults["modes"])
    gives = {"replace": "another"}.get(more.get("on_error", "skip"), "without")
    args = {"on_error": "skip"} | more
    return Mended(name, lambda scene: {"dataset": place(scene, deed)} | args, gives, reason, modes)


def restarting(name: str, deed: Deed, gives: str, reason: str, **more: Any) -> Mended:
    modes = (faults.FORK, faults.FORK_PINNED, *more.pop("modes", ()))
    return Mended(
        name,
        lambda scene: {"dataset": Faulty(scene, deed, **more), "on_crash": "restart"},
        gives,
        reason,
        modes,
    )


def demand_samples(samples: list[Any]) -> Any:
    if None in samples:
        raise faults.NeedsTwo("a sample is None", 1)
    return torch.stack(samples)


def leave_out(failure: Failure) -> Any:
    return SKIP if failure.index == BAD and failure.exception_type == "KeyError" else None


def stand_in(failure: Failure) -> Any:
    return torch.tensor([-1, failure.index])


ALSO_SPAWNED = (*Mended._field_defaults["modes"], faults.SPAWN)
KILL = faults.Signalled(signal.SIGKILL)
NOTHING, LONGER = faults.Gives(faults.nothing), faults.Gives(faults.longer)

MENDED: list[Mended] = [
    skipping("skip: KeyError", faults.key_error, "KeyError: 'feature'", modes=ALSO_SPAWNED),
    skipping("skip: demanding exception", faults.demanding_error, "NeedsTwo: data.csv:3"),
    skipping("skip: exception that cannot be pickled", faults.unpicklable_error, "HoldsALock"),
    skipping("skip: StopIteration", faults.stop_iteration, "StopIteration"),
    skipping("skip: StopIteration, retried", faults.stop_iteration, "StopIteration", retries=1),
    skipping("skip: __getitems__", faults.key_error, "KeyError", place=faults.Together),
    skipping("skip: None", NOTHING, "None"),
    skipping("skip: another shape", LONGER, r"shape \[5\]"),
    skipping("skip: retried in vain", faults.key_error, "KeyError: 'feature', 3 tries", retries=2),
    skipping("skip: a batch of its own", faults.key_error, "KeyError", batch_size=1),
    skipping("replace: KeyError", faults.key_error, "KeyError", on_error="replace"),
    skipping("replace: None", NOTHING, "None", on_error="replace", modes=ALSO_SPAWNED),
    skipping("replace: another shape", LONGER, "shape", on_error="replace"),
    skipping("on_error answers SKIP", faults.key_error, "KeyError: 'feature'", on_error=leave_out),
    Mended(
        "on_error answers with a sample",
        lambda scene: {"dataset": Faulty(scene, faults.key_error), "on_error": stand_in},
        "another",
        "KeyError",
        ALSO_SPAWNED,
    ),
    Mended(
        "skip: a collate_fn that objects with a demanding exception",
        lambda scene: {
            "dataset": Faulty(scene, NOTHING),
            "collate_fn": demand_samples,
            "on_error": "skip",
        },
        "without",
        "None",
    ),
    Mended(
        "retries: flaky storage",
        lambda scene: {"dataset": Faulty(scene, Times(faults.no_such_file, 2)), "retries": 2},
        "all",
        "came at try 3",
        ALSO_SPAWNED,
    ),
    Mended(
        "retries: flaky __getitems__",
        lambda scene: {
            "dataset": faults.Together(scene, Times(faults.no_such_file, 1)),
            "retries": 1,
        },
        "all",
        "came at try 2",
    ),
    restarting("restart: killed once", Times(KILL, 1), "all", "", modes=(faults.SPAWN,)),
    restarting("restart: killed each time", KILL, "without", "its worker died at it twice"),
    restarting(
        "restart: null pointer", faults.null_pointer, "without", "its worker died at it twice"
    ),
    restarting(
        "restart: sys.exit()", faults.SysExits(None), "without", "its worker died at it twice"
    ),
    restarting("restart: os._exit(0)", faults.Exits(0), "without", "its worker died at it twice"),
]


@pytest.mark.parametrize(
    ("mended", "mode"),
    [
        pytest.param(
            mended,
            mode,
            id=f"{mended.name}, {mode}",
            marks=pytest.mark.slow if mode == faults.SPAWN else (),
        )
        for mended in MENDED
        for mode in mended.modes
    ],
)
def test_loader_goes_on(
    mended: Mended,
    mode: str,
    scene: Scene,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if "pinned" in mode:
        request.getfixturevalue("accelerator")
    before = Held.now()
    args = mended.args(scene)
    shuffled: dict[str, Any] = {"batch_size": args.pop("batch_size", 4), "shuffle": True}
    asked = list(
        DataLoader(faults.Holding(), generator=torch.Generator().manual_seed(7), **shuffled)
    )
    loader = loader_for(args | shuffled | {"generator": torch.Generator().manual_seed(7)}, mode)
    with ended_by_force(30) as forced:
        came = list(loader)
    assert not forced
    assert_mended(came, asked, mended.gives)
    audit = loader.audit
    assert audit is not None
    assert audit.complete
    assert audit.ok
    assert audit.skipped.tolist() == ([BAD] if mended.gives == "without" else [])
    assert audit.replaced.tolist() == ([BAD] if mended.gives == "another" else [])
    assert audit.late.tolist() == ([BAD] if mended.reason.startswith("came") else [])
    assert set(audit.reasons) == ({BAD} if mended.reason else set())
    assert re.search(mended.reason, audit.reasons.get(BAD, ""))
    del loader, audit, came
    assert_nothing_left(before)
    assert_quiet(capfd, None)


def assert_mended(came: list[torch.Tensor], asked: list[torch.Tensor], gives: str) -> None:
    """Every batch is what was asked for, bit for bit, but for the bad sample."""
    expected = []
    for batch in asked:
        good = batch[:, 0] != BAD
        if gives == "without" and not good.all():
            batch = batch[good]
        if len(batch):
            expected.append(batch)
    assert [batch.shape for batch in came] == [batch.shape for batch in expected]
    for got, wanted in zip(came, expected, strict=True):
        good = (wanted[:, 0] != BAD) | (gives == "all")
        assert torch.equal(got[good], wanted[good])
        assert not (got[:, 0] == BAD).any() or gives == "all"


# ── what is told while the loader waits, or before it starts ─────────────────────────────────────


class Releases(logging.Handler):
    """Lets the slow sample go on once the warning is there."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.scene = scene
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        self.scene.note("release")
        with contextlib.suppress(OSError):  # nobody reads it
            os.close(os.open(self.scene.folder / "pipe", os.O_WRONLY | os.O_NONBLOCK))


@pytest.mark.parametrize(
    "mode",
    [faults.FORK, faults.FORK_PINNED, pytest.param(faults.SPAWN, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("deed", [faults.wait_for_release, faults.read_a_pipe])
def test_stall_is_logged_and_the_loader_goes_on(
    deed: Deed, mode: str, scene: Scene, request: pytest.FixtureRequest
) -> None:
    if "pinned" in mode:
        request.getfixturevalue("accelerator")
    before = Held.now()
    logger = logging.getLogger("safeloader")
    handler = Releases(scene)
    args = {"stall_after": 0.5, "worker_init_fn": faults.Announcing(scene)}
    loader = loader_for({"dataset": Faulty(scene, deed)} | args, mode)
    with ended_by_force(30) as forced:
        iterator = iter(loader)
        faults.wait_for_the_start(scene, iterator, 0)
        logger.addHandler(handler)
        try:
            came = list(iterator)
        finally:
            logger.removeHandler(handler)
    assert not forced
    assert_mended(came, list(DataLoader(faults.Holding(), 4)), "all")
    # On a busy machine it is told as well that the workers were slow to start.
    [text] = [each for each in handler.texts if "until they were ready" not in each]
    for words in (
        "no batch came for .* seconds; the loader goes on waiting",
        r"worker 1 \(pid \d+\) is fetching index 13 \(position 1 of batch 3\)",
        rf"faults\.py.* in {deed.__name__}",
        r"next: \w+",
    ):
        assert re.search(words, text), text
    del loader, iterator, came
    assert_nothing_left(before)


def held_lock() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


def own_socket() -> socket.socket:
    made = socket.create_server(("127.0.0.1", 0))
    faults.to_undo.append(made.close)
    return made


def own_file() -> Any:
    made = open(__file__)  # noqa: SIM115
    faults.to_undo.append(made.close)
    return made


def own_connection() -> sqlite3.Connection:
    made = sqlite3.connect(":memory:")
    faults.to_undo.append(made.close)
    return made


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("generator", lambda: np.random.default_rng(0), "draw the same numbers.*seed"),
        ("python_random", lambda: random.Random(0), "draw the same numbers.*seed"),
        ("torch_random", torch.Generator, "draw the same numbers.*seed"),
        ("database", own_connection, "sqlite3.Connection.*one connection.*in the worker"),
        ("channel", own_socket, "socket.*one connection.*in the worker"),
        ("shard", own_file, "one read position.*in the worker"),
        ("guard", held_lock, "held now.*never be released.*in the worker"),
    ],
)
def test_what_does_not_survive_a_fork_is_told_once(
    name: str, make: Callable[[], Any], says: str, scene: Scene
) -> None:
    for times in (1, 0):
        dataset = faults.Holding(**{name: make()})
        loader = SafeDataLoader(
            dataset, batch_size=4, num_workers=2, multiprocessing_context="fork"
        )
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert len(list(loader)) == LENGTH // 4
        texts = [str(each.message) for each in warned if each.category is RuntimeWarning]
        assert len(texts) == times
        for text in texts:
            assert re.search(rf"dataset\.{name} \(.*{says}", text, re.S | re.I), text


def test_sockets_in_samples_are_sent(scene: Scene) -> None:
    """No fault: multiprocessing knows how."""
    dataset = Faulty(scene, faults.Gives(faults.a_socket))
    loader = loader_for({"dataset": dataset, "collate_fn": faults.as_list}, faults.FORK)
    came = list(loader)[3][1]
    assert isinstance(came, socket.socket)
    came.close()


# ── faults of the training loop ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", [faults.MAIN, faults.FORK, faults.FORK_PINNED])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("ends", ["break", "raise"])
def test_loop_that_ends_early(
    ends: str,
    persistent: bool,
    mode: str,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if "pinned" in mode:
        request.getfixturevalue("accelerator")
    before = Held.now()
    loader = loader_for({"dataset": faults.Holding(), "persistent_workers": persistent}, mode)
    try:
        for batch in loader:
            assert len(batch) == 4
            del batch  # it holds a descriptor
            if ends == "break":
                break
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert loader.audit is not None
    assert not loader.audit.complete
    del loader
    assert_nothing_left(before)
    assert_quiet(capfd, None)


# ── whole programs ───────────────────────────────────────────────────────────────────────────────


class Program(NamedTuple):
    """A program with a fault, run on its own.

    Attributes:
        name: what it is, for a person.
        source: its text; as a file unless ``command``.
        says: on stderr, in this order.
        code: its exit status.
        command: whether it is run as ``python -c``.
        signals: what it is sent, once it says that it is ready; by ``killpg`` if ``group``.
        tracebacks: how many there are on stderr.
        slow: whether it takes more than a few seconds.
    """

    name: str
    source: str
    says: tuple[str, ...] = ()
    code: int = 0
    command: bool = False
    signals: int | None = None
    group: bool = False
    tracebacks: int = 0
    slow: bool = False


HEAD = """
import os, sys, time, signal
from pathlib import Path
import torch
from safeloader import SafeDataLoader
from tests import family
from tests.catalogue import faults
from tests.catalogue.faults import *
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
def ready():
    print("ready", flush=True)
"""

RUNS_ON = """
if __name__ == "__main__":
    scene = Scene(Path(sys.argv[1]))
    loader = SafeDataLoader({dataset}, 4, num_workers={workers}, {more})
    while True:
        for n, batch in enumerate(loader):
            if n == 1:
                ready()
            time.sleep(0.01)
"""


def running(dataset: str = "Holding()", workers: int = 2, more: str = "") -> str:
    return HEAD + RUNS_ON.format(dataset=dataset, workers=workers, more=more)


EXITS = """
if __name__ == "__main__":
    loader = SafeDataLoader(Holding(), 4, num_workers=2, {more})
    iterator = iter(loader)
    next(iterator)
    other = iter(SafeDataLoader(Holding(), 4, num_workers=2))
    next(other)
    {end}
"""

OWN_CLASS = """
class Own:
    def __len__(self): return 8
    def __getitem__(self, index): return index
loader = SafeDataLoader(Own(), 4, num_workers=2, multiprocessing_context="spawn")
"""

PROGRAMS: list[Program] = [
    Program(
        "Ctrl-C",
        running(),
        ("KeyboardInterrupt",),
        -signal.SIGINT,
        signals=signal.SIGINT,
        group=True,
        tracebacks=1,
    ),
    Program(
        "Ctrl-C, the main process alone",
        running(),
        ("KeyboardInterrupt",),
        -signal.SIGINT,
        signals=signal.SIGINT,
        tracebacks=1,
    ),
    Program(
        "Ctrl-C, persistent workers",
        running(more="persistent_workers=True"),
        ("KeyboardInterrupt",),
        -signal.SIGINT,
        signals=signal.SIGINT,
        group=True,
        tracebacks=1,
    ),
    Program(
        "Ctrl-C, spawned workers",
        running(more="multiprocessing_context='spawn', persistent_workers=True"),
        ("KeyboardInterrupt",),
        -signal.SIGINT,
        signals=signal.SIGINT,
        group=True,
        tracebacks=1,
        slow=True,
    ),
    Program(
        "Ctrl-C while a worker hangs",
        running("Faulty(scene, sleep_on)"),
        ("KeyboardInterrupt",),
        -signal.SIGINT,
        signals=signal.SIGINT,
        group=True,
        tracebacks=1,
    ),
    Program("SIGTERM", running(), (), -signal.SIGTERM, signals=signal.SIGTERM),
    Program("SIGKILL of the main process", running(), (), -signal.SIGKILL, signals=signal.SIGKILL),
    Program("exit with live iterators", HEAD + EXITS.format(more="", end="")),
    Program(
        "exit with live iterators and persistent workers",
        HEAD + EXITS.format(more="persistent_workers=True", end=""),
    ),
    Program(
        "sys.exit(5) with live iterators",
        HEAD + EXITS.format(more="persistent_workers=True", end="sys.exit(5)"),
        code=5,
    ),
    Program(
        "an exception of the training loop",
        HEAD + EXITS.format(more="", end="1 / 0"),
        ("ZeroDivisionError",),
        1,
        tracebacks=1,
    ),
    Program(
        "a dataset class in python -c, spawned",
        HEAD + OWN_CLASS + "list(loader)",
        ("WorkerCrashError", "next: .*defined in a notebook or in __main__"),
        1,
        command=True,
        tracebacks=3,
        slow=True,
    ),
    Program(
        "a script without if __name__ == '__main__', spawned",
        HEAD + OWN_CLASS + "list(loader)",
        ("WorkerCrashError", "next: .*if __name__ == '__main__'"),
        1,
        tracebacks=3,
        slow=True,
    ),
    Program(
        "the temporary folder is gone: nothing of it is needed",
        HEAD
        + """
import tempfile
scratch = tempfile.mkdtemp()
os.environ["TMPDIR"] = scratch
tempfile.tempdir = None
tempfile.gettempdir()
os.rmdir(scratch)
list(SafeDataLoader(Holding(), 4, num_workers=2))
""",
    ),
]


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(
            program,
            id=program.name,
            marks=pytest.mark.slow if program.slow else (),
        )
        for program in PROGRAMS
    ],
)
def test_program_ends_quietly(program: Program, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(program.source)
    how = ["-c", program.source] if program.command else [str(script)]
    with subprocess.Popen(
        [sys.executable, *how, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        try:
            if program.signals is not None:
                assert running.stdout.readline() == "ready\n"
                began = time.monotonic()
                (os.killpg if program.group else os.kill)(running.pid, program.signals)
            running.wait(30)
            if program.signals is not None:
                assert time.monotonic() - began < 5
            gone = wait_until(lambda: not _pool(running.pid), bound_s=10)
            left = _pool(running.pid)
        finally:
            for process in _pool(running.pid):
                process.kill()
        printed = running.stderr.read()
    assert running.returncode == program.code, printed
    assert gone, left
    at = 0
    for words in program.says:
        found = re.compile(words).search(printed, at)
        assert found, f"no {words!r} in\n{printed}"
        at = found.end()
    assert len(re.findall("Traceback", printed)) == program.tracebacks, printed
    assert not re.search("can only test a child|Exception ignored|leaked", printed), printed


FULL = """
import sys
sys.path.insert(0, {root!r})
import torch
from safeloader import SafeDataLoader, SafeLoaderError

class Large:
    def __len__(self): return 8
    def __getitem__(self, index): return torch.zeros(2**20)

try:
    print(len(list(SafeDataLoader(Large(), 4, num_workers=2, transport={transport!r}))), "batches")
except SafeLoaderError as error:
    print(type(error).__mro__[1].__name__, error.failure.phase, error.index)
    print(error)
"""


def with_little_shared_memory(transport: str) -> subprocess.CompletedProcess[str]:
    """A batch of 16 MB in a ``/dev/shm`` of 4 MB, as a container may have it."""
    space = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=4m none /dev/shm"
    try:
        probe = subprocess.run([*space, mount], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare(1) to make a small file system with")
    if probe.returncode:
        pytest.skip("this machine does not let its users mount file systems of their own")
    source = FULL.format(root=str(ROOT), transport=transport)
    return subprocess.run(
        [*space, f'{mount} && exec "$0" -c "$1"', sys.executable, source],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_shared_memory_that_is_small_is_enough() -> None:
    done = with_little_shared_memory("auto")
    assert done.stdout == "2 batches\n", done


@pytest.mark.slow
def test_shared_memory_that_is_full_is_told() -> None:
    done = with_little_shared_memory("torch")
    assert re.match("TransportError transport None|SafeLoaderError crash", done.stdout), done
    assert re.search(r"ind(ices \[|ex )[04]", done.stdout), done
    assert re.search("next: .*/dev/shm.*--shm-size", done.stdout), done


def _pool(of: int) -> list[psutil.Process]:
    """The living processes of a session; the resource tracker and the fork server among them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == of and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
