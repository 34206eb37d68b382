"""The table of faults: how each is injected, and what the user must be told.

A fault is a *deed*, done by one of the places where users' code runs: at the bad index, the deed's
answer is the sample. Deeds and places stand at module level, so that every start method can send
them. The table at the end joins them with the words that ``str(error)`` must have.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import mmap
import os
import queue
import resource
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import IterableDataset, Sampler, get_worker_info

from safeloader import (
    CollateError,
    DeliveryError,
    SafeLoaderError,
    SampleError,
    SamplerError,
    TransportError,
    WorkerCrashError,
    WorkerInitError,
    WorkerTimeoutError,
)

BAD = 13  # with four to a batch: batch 3, position 1, worker 1 of two
LENGTH = 40
PATIENCE_S = 30.0  # for a condition that must come; nothing is asserted of how long it took


def wait_until(condition: Callable[[], Any], bound_s: float = PATIENCE_S) -> bool:
    """Whether ``condition`` came true within ``bound_s`` seconds."""
    give_up = time.monotonic() + bound_s
    while not (true := condition()) and time.monotonic() < give_up:
        time.sleep(0.002)
    return bool(true)


class Scene:
    """A folder that all processes of one test write notes into: who did what, and when.

    The clock is one for all processes, so a dying worker's last note tells when it died.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def note(self, what: str, text: object = "") -> None:
        unfinished = self.folder / f".{what}.{os.getpid()}"
        unfinished.write_text(str(text))
        unfinished.rename(self.folder / what)  # nobody reads half a note

    def has(self, what: str) -> bool:
        return (self.folder / what).exists()

    def read(self, what: str) -> str:
        return (self.folder / what).read_text()

    def last_words(self) -> None:
        self.note("death", time.monotonic())

    @property
    def died_at(self) -> float:
        return float(self.read("death"))


Deed = Callable[[Scene], Any]

to_undo: list[Callable[[], Any]] = []  # in the main process, once the error is there


# ── deeds: exceptions ────────────────────────────────────────────────────────────────────────────


class NeedsTwo(Exception):
    def __init__(self, path: str, line: int) -> None:
        super().__init__(f"{path}:{line}")
        self.line = line


class HoldsALock(ValueError):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


def key_error(scene: Scene) -> Any:
    return {}["feature"]


def value_error(scene: Scene) -> Any:
    return int("twelve")


def demanding_error(scene: Scene) -> Any:
    raise NeedsTwo("data.csv", 3)


def unpicklable_error(scene: Scene) -> Any:
    raise HoldsALock("shard is locked")


def stop_iteration(scene: Scene) -> Any:
    return next(iter(()))


def index_error(scene: Scene) -> Any:
    return [][BAD]


def no_such_file(scene: Scene) -> Any:
    return open("/no/such/image.png", "rb")


def a_group(scene: Scene) -> Any:
    raise ExceptionGroup("two reads failed", [KeyError(1), OSError("no")])


def out_of_memory(scene: Scene) -> Any:
    taken = psutil.Process().memory_info().vms
    with limited(resource.RLIMIT_AS, taken + 2**26):
        return np.zeros(2**40, np.uint8)


def name_error(scene: Scene) -> Any:
    return cv2.imread("x")  # type: ignore[name-defined]  # noqa: F821


def import_error(scene: Scene) -> Any:
    import safeloader_has_no_such_module  # type: ignore[import-not-found]

    return safeloader_has_no_such_module


def too_many_files(scene: Scene) -> Any:
    """They stay open, so that it is as bad while the error is made, until the process ends."""
    few_descriptors(8, {})
    held: list[int] = []

    def let_go() -> None:
        while held:
            os.close(held.pop())

    to_undo.append(let_go)
    Finalize(None, let_go, exitpriority=1)  # a worker whose coverage is measured writes a file then
    while True:
        held.append(os.open(os.devnull, os.O_RDONLY))


def interrupt(scene: Scene) -> Any:
    scene.last_words()
    raise KeyboardInterrupt


@contextlib.contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    before, hard = resource.getrlimit(what)
    resource.setrlimit(what, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (before, hard))


# ── deeds: deaths ────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Signalled:
    """The worker is ended by a signal that it sends to itself."""

    number: int

    def __call__(self, scene: Scene) -> Any:
        scene.last_words()
        if signal.getsignal(self.number) is signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(self.number, signal.SIG_DFL)
        os.kill(os.getpid(), self.number)
        time.sleep(PATIENCE_S)


@dataclasses.dataclass(frozen=True)
class Exits:
    """``os._exit(code)``."""

    code: int

    def __call__(self, scene: Scene) -> Any:
        scene.last_words()
        os._exit(self.code)


@dataclasses.dataclass(frozen=True)
class SysExits:
    """``sys.exit(code)``."""

    code: int | str | None

    def __call__(self, scene: Scene) -> Any:
        scene.last_words()
        sys.exit(self.code)


def null_pointer(scene: Scene) -> Any:
    scene.last_words()
    return ctypes.string_at(0)


def abort(scene: Scene) -> Any:
    scene.last_words()
    os.abort()


def truncated_map(scene: Scene) -> Any:
    with (scene.folder / f"mapped-{os.getpid()}").open("wb+") as file:
        file.truncate(2 * mmap.PAGESIZE)
        mapped = mmap.mmap(file.fileno(), 2 * mmap.PAGESIZE)
        file.truncate(0)
        scene.last_words()
        return mapped[mmap.PAGESIZE]


def wait_to_be_killed(scene: Scene) -> Any:
    """Tell who is to be killed, and stay."""
    info = get_worker_info()
    scene.note(f"waiting-{info.id if info else 'main'}", os.getpid())
    time.sleep(PATIENCE_S)


@dataclasses.dataclass(frozen=True)
class SecondTime:
    """Only when it is done for the second time in a process: in a later epoch, say."""

    deed: Deed

    def __call__(self, scene: Scene) -> Any:
        name = f"was-here-{os.getpid()}"
        if scene.has(name):
            return self.deed(scene)
        scene.note(name)
        return torch.tensor([BAD, BAD * BAD])


@dataclasses.dataclass(frozen=True)
class Times:
    """Only the first few times in all processes together: flaky storage."""

    deed: Deed
    times: int

    def __call__(self, scene: Scene) -> Any:
        done = len(list(scene.folder.glob("try-*")))
        if done < self.times:
            scene.note(f"try-{done}")
            return self.deed(scene)
        return torch.tensor([BAD, BAD * BAD])


# ── deeds: hangs ─────────────────────────────────────────────────────────────────────────────────


def sleep_on(scene: Scene) -> Any:
    time.sleep(1000)


def pause_in_c(scene: Scene) -> Any:
    """With the GIL released, as every foreign function of ctypes."""
    ctypes.CDLL(None).pause()


def pause_with_the_gil(scene: Scene) -> Any:
    """No Python code of this process can run meanwhile."""
    scene.note("stuck")
    ctypes.PyDLL(None).pause()


def wait_for_a_queue(scene: Scene) -> Any:
    return queue.Queue().get()


def stop_itself(scene: Scene) -> Any:
    scene.note("stuck")
    os.kill(os.getpid(), signal.SIGSTOP)


the_lock = threading.Lock()


def take_the_lock(scene: Scene) -> Any:
    with the_lock:
        return None


def wait_for_release(scene: Scene) -> Any:
    """Slow, until somebody in the main process lets it go on."""
    assert wait_until(lambda: scene.has("release"))
    return torch.tensor([BAD, BAD * BAD])


def read_a_pipe(scene: Scene) -> Any:
    """The same in a system call: nobody writes into the pipe until ``release``."""
    with (scene.folder / "pipe").open() as file:
        file.read()
    return torch.tensor([BAD, BAD * BAD])


# ── deeds: samples that do not go through ────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Gives:
    """The sample is made by calling ``make``."""

    make: Callable[[], Any]

    def __call__(self, scene: Scene) -> Any:
        return self.make()


def nothing() -> Any:
    return None


def longer() -> Any:
    return torch.zeros(5)


def without_key() -> Any:
    return {"label": BAD}


def with_text() -> Any:
    return {"feature": torch.zeros(3), "label": "thirteen"}


def deep_lock() -> Any:
    return {"meta": [0, {"payload": threading.Lock()}]}


def open_file() -> Any:
    return {"image": open(os.devnull)}


def a_lambda() -> Any:
    return {"resize": lambda image: image}


def a_generator() -> Any:
    return [(frame for frame in range(3))]


def a_local_instance() -> Any:
    class Local:
        pass

    return (Local(),)


def a_connection() -> Any:
    return {"db": sqlite3.connect(":memory:")}


def grown() -> Any:
    return {"x": torch.ones(2, requires_grad=True) * 2}


def a_socket() -> Any:
    here, there = socket.socketpair()
    there.close()
    return here


class OnlyHere:
    """Pickles, and loads in the process that pickled it alone."""

    def __reduce__(self) -> Any:
        return _load_in, (os.getpid(),)


def _load_in(pid: int) -> OnlyHere:
    if os.getpid() != pid:
        raise KeyError("no registry in this process")
    return OnlyHere()


class Unpinnable:
    def pin_memory(self) -> Any:
        raise BufferError("no page-locked memory left")


# ── places ───────────────────────────────────────────────────────────────────────────────────────


def square(index: int) -> Any:
    return torch.tensor([index, index * index])


def record(index: int) -> Any:
    return {"feature": torch.zeros(3), "label": index}


class Faulty(torch.utils.data.Dataset[Any]):
    """Does its deed at the bad index."""

    def __init__(
        self,
        scene: Scene,
        deed: Deed,
        good: Callable[[int], Any] = square,
        bad: tuple[int, ...] = (BAD,),
    ) -> None:
        self.scene, self.deed, self.good, self.bad = scene, deed, good, bad

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Any:
        return self.deed(self.scene) if index in self.bad else self.good(index)


class Together(Faulty):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class Miscounts(Faulty):
    """Gives one sample less, or one more, of the batch with the bad index."""

    def __init__(self, scene: Scene, more: bool) -> None:
        super().__init__(scene, nothing)
        self.more = more

    def __getitems__(self, indices: list[int]) -> list[Any]:
        samples = [square(index) for index in indices]
        if BAD not in indices:
            return samples
        return samples + samples[:1] if self.more else samples[:-1]


class Lying(Faulty):
    """Says that it is longer than it is."""

    def __init__(self) -> None:
        self.items = list(range(BAD))

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Slow(Faulty):
    """Notes what it is asked for; each sample is 10 MB."""

    def __getitem__(self, index: int) -> Any:
        self.scene.note(f"asked-{index}", os.getpid())
        return np.full(10_000_000, index % 250, np.uint8)


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Each worker reads twenty; the deed is done at the sixth, by worker 1 where there is one."""

    def __init__(self, scene: Scene, deed: Deed, how: str = "next") -> None:
        self.scene, self.deed, self.how = scene, deed, how

    def __iter__(self) -> Iterator[Any]:
        if self.how == "iter":
            return self.deed(self.scene)  # type: ignore[no-any-return]
        return self._generate() if self.how == "generator" else _Steps(self._generate, self)

    def _answer(self, number: int) -> Any:
        info = get_worker_info()
        mine = info is None or info.id == 1
        return self.deed(self.scene) if mine and number == 5 else torch.tensor(number)

    def _generate(self) -> Iterator[Any]:
        for number in range(20):
            yield self._answer(number)


class _Steps:
    def __init__(self, generate: Any, stream: Stream) -> None:
        self.number, self.stream = -1, stream

    def __iter__(self) -> _Steps:
        return self

    def __next__(self) -> Any:
        self.number += 1
        if self.number == 20:
            raise StopIteration
        return self.stream._answer(self.number)


@dataclasses.dataclass(frozen=True)
class Collating:
    """A collate function that does its deed on the bad batch."""

    scene: Scene
    deed: Deed

    def __call__(self, samples: list[Any]) -> Any:
        if any(int(sample[0]) == BAD for sample in samples):
            return self.deed(self.scene)
        return torch.stack(samples)


@dataclasses.dataclass(frozen=True)
class Starting:
    """A ``worker_init_fn`` that does its deed in worker 1."""

    scene: Scene
    deed: Deed

    def __call__(self, worker: int) -> None:
        if worker == 1:
            self.deed(self.scene)


@dataclasses.dataclass(frozen=True)
class Announcing:
    """A ``worker_init_fn`` that notes that the worker is up."""

    scene: Scene

    def __call__(self, worker: int) -> None:
        self.scene.note(f"up-{worker}")


@dataclasses.dataclass(frozen=True)
class Identifying:
    """A ``key`` that does its deed on the bad sample."""

    scene: Scene
    deed: Deed

    def __call__(self, sample: Any) -> Any:
        return self.deed(self.scene) if int(sample[0]) == BAD else int(sample[0])


class Sampling(Sampler[Any]):
    """Does its deed when it is asked for the ``at``-th time, or for an iterator."""

    def __init__(self, scene: Scene, deed: Deed, at: int | None, batches: bool = False) -> None:
        self.scene, self.deed, self.at, self.batches = scene, deed, at, batches

    def __len__(self) -> int:
        return LENGTH

    def __iter__(self) -> Iterator[Any]:
        if self.at is None:
            self.deed(self.scene)
        return self._generate()

    def _generate(self) -> Iterator[Any]:
        for number in range(LENGTH):
            if number == self.at:
                self.deed(self.scene)
            yield [number] if self.batches else number


class Unpickling(Faulty):
    """Does its deed when a worker unpickles it."""

    def __init__(self, scene: Scene, deed: Deed) -> None:
        super().__init__(scene, deed, bad=())
        self.made_in = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if os.getpid() != self.made_in:
            self.deed(self.scene)


class Holding(Faulty):
    """A dataset with something in it."""

    def __init__(self, **held: Any) -> None:
        self.__dict__.update(held)

    def __getitem__(self, index: int) -> Any:
        return square(index)


class Composed:
    """As torchvision's ``Compose``."""

    def __init__(self, *transforms: Any) -> None:
        self.transforms = list(transforms)


class Lambda:
    def __init__(self, lambd: Any) -> None:
        self.lambd = lambd


def divide(failure: Any) -> Any:
    return 1 / 0


def as_list(samples: list[Any]) -> list[Any]:
    return samples


# ── meddling from the main process ───────────────────────────────────────────────────────────────


def kill(scene: Scene, *pids: int) -> None:
    scene.last_words()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def in_the_background(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    to_undo.append(thread.join)


@dataclasses.dataclass(frozen=True)
class KillsThoseThatWait:
    """Once these workers wait to be killed, all of them at once.

    Several are killed before the main process looks: what dies a while later died by itself.
    """

    workers: tuple[int, ...]

    def __call__(self, scene: Scene, iterator: Any, came: int) -> None:
        names = [f"waiting-{worker}" for worker in self.workers]

        def work() -> None:
            if wait_until(lambda: all(map(scene.has, names))):
                kill(scene, *(int(scene.read(name)) for name in names))

        if came == 0 and len(self.workers) > 1:
            work()
        elif came == 0:
            in_the_background(work)


def wait_for_the_start(scene: Scene, iterator: Any, came: int) -> None:
    """A ``timeout`` counts from the first batch that is asked for; spawned workers take seconds."""
    assert came or wait_until(lambda: scene.has("up-0") and scene.has("up-1"))


def wait_until_it_is_stuck(scene: Scene, iterator: Any, came: int) -> None:
    """The batch that its worker sent before is still to be opened: for that, it is asked again."""
    wait_for_the_start(scene, iterator, came)
    assert came != 1 or wait_until(lambda: scene.has("stuck"))


def wait_until_it_is_dead(scene: Scene, iterator: Any, came: int) -> None:
    """The batch that its worker sent before cannot be opened any more."""
    if came == 1:
        iterator._workers[1].join(PATIENCE_S)
        assert scene.has("death")


def kill_between_epochs(scene: Scene, iterator: Any, came: int) -> None:
    if came == LENGTH // 4 and not scene.has("death"):
        worker = iterator._workers[1]
        kill(scene, worker.pid)
        worker.join(PATIENCE_S)


def kill_while_it_sends(scene: Scene, iterator: Any, came: int) -> None:
    """Worker 0 is at its third batch, so the second, too large for a pipe, is being sent.

    (A pinning thread reads all the time; there it is killed somewhere near.)
    """
    if came == 1:
        assert wait_until(lambda: scene.has("asked-16"))
        kill(scene, int(scene.read("asked-16")))


def held_by_a_thread(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a loader whose workers are forked while a thread holds the lock."""
    held, done = threading.Event(), threading.Event()

    def work() -> None:
        with the_lock:
            held.set()
            done.wait(PATIENCE_S)

    to_undo.append(done.set)
    in_the_background(work)
    assert held.wait(PATIENCE_S)
    return args


def open_until_told() -> Any:
    file = open(os.devnull)  # noqa: SIM115
    to_undo.append(file.close)
    return file


def connected_until_told() -> Any:
    connection = sqlite3.connect(":memory:")
    to_undo.append(connection.close)
    return connection


def few_descriptors(spare: int, args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a loader in a process that may open few files more."""
    gc.collect()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    to_undo.append(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)))
    resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + spare, hard))
    return args


# ── the table ────────────────────────────────────────────────────────────────────────────────────

UNKNOWN = object()  # no single index can be known

MAIN, MAIN_PINNED = "main", "main pinned"
FORK, FORK_PINNED = "fork", "fork pinned"
SPAWN, SPAWN_PINNED = "spawn", "spawn pinned"
FORKSERVER = "forkserver"

WORKERS = (FORK, FORK_PINNED, SPAWN)
EVERYWHERE = (MAIN, *WORKERS)
LIGHT = (FORK, FORK_PINNED, FORKSERVER)  # where spawn, which takes seconds, would tell no more
PICKLED = (SPAWN, FORKSERVER)


@dataclasses.dataclass(frozen=True)
class Fault:
    """One way to fail, and what must be told.

    Attributes:
        name: what it is, for a person.
        args: makes the loader's arguments; batches of four unless they say otherwise.
        told: the error's class; ``also`` is the type that the user's code raised.
        phase: of ``error.failure``.
        index: of the sample at fault; a set where several would be right.
        says: regular expressions that the error's text has, cause and next step.
        modes: where it applies.
        bound_s: from ``iter(loader)`` to the error.
        dies: whether workers die: it is told within two seconds of the death.
        meddle: called in the main process before the first batch and after each.
        epochs: how many are run.
        keeps: whether the training loop keeps its batches.
        prints: what the fault itself has on stderr.
    """

    name: str
    args: Callable[[Scene], dict[str, Any]]
    told: type[SafeLoaderError]
    phase: str
    says: tuple[str, ...]
    index: Any = BAD
    also: type[BaseException] = Exception
    modes: tuple[str, ...] = EVERYWHERE
    bound_s: float = 10.0
    dies: bool = False
    meddle: Callable[[Scene, Any, int], None] | None = None
    epochs: int = 1
    keeps: bool = False
    fingerprints: str | None = None


def in_sample(name: str, deed: Deed, also: type[Exception], *says: str, **more: Any) -> Fault:
    place = more.pop("place", Faulty)
    next_step = more.pop(
        "next_step", r"next: .*safeloader\.replay\(error, loader\.dataset\) repeats"
    )
    return Fault(
        name,
        lambda scene: {"dataset": place(scene, deed)},
        SampleError,
        "sample",
        (*says, next_step),
        also=also,
        **more,
    )


def in_stream(
    name: str, deed: Deed, how: str, also: type[Exception], *says: str, **more: Any
) -> Fault:
    return Fault(
        name,
        lambda scene: {"dataset": Stream(scene, deed, how)},
        SampleError,
        "sample",
        says,
        also=also,
        index=UNKNOWN if how == "iter" else {(0, 5), (1, 5)},
        **more,
    )


def odd(
    name: str, make: Callable[[], Any], also: type[Exception], *says: str, **more: Any
) -> Fault:
    return Fault(
        name,
        lambda scene: {"dataset": Faulty(scene, Gives(make), record)},
        CollateError,
        "collate",
        (*says, r"next: mend the sample, or have collate_fn= take it"),
        also=also,
        **more,
    )


def death(name: str, deed: Deed, *says: str, **more: Any) -> Fault:
    place = more.pop("place", Faulty)
    return Fault(
        name,
        more.pop("args", lambda scene: {"dataset": place(scene, deed)}),
        WorkerCrashError,
        "crash",
        says,
        also=RuntimeError,
        **({"modes": WORKERS, "dies": True} | more),
    )


def hang(name: str, deed: Deed, *says: str, **more: Any) -> Fault:
    place = more.pop("place", Faulty)
    made = more.pop("args", lambda scene: {"dataset": place(scene, deed)})
    return Fault(
        name,
        lambda scene: {"timeout": 1, "worker_init_fn": Announcing(scene)} | made(scene),
        WorkerTimeoutError,
        "timeout",
        (r"DataLoader timed out after 1 seconds", *says, r"next: \w+"),
        **(
            {"also": TimeoutError, "modes": WORKERS, "meddle": wait_for_the_start, "bound_s": 8.0}
            | more
        ),
    )


def unsendable(name: str, make: Callable[[], Any], *says: str, **more: Any) -> Fault:
    return Fault(
        name,
        lambda scene: {"dataset": Faulty(scene, Gives(make)), "collate_fn": as_list},
        TransportError,
        "transport",
        (r"it cannot be pickled: sample", *says, r"next: \w+"),
        **({"modes": (*WORKERS, FORKSERVER)} | more),
    )


def unstartable(
    name: str, args: Callable[[], dict[str, Any]], path: str, cure: str = "context='fork'"
) -> Fault:
    return Fault(
        name,
        lambda scene: {"dataset": Faulty(scene, value_error)} | args(),
        TransportError,
        "transport",
        (
            "while starting the workers",
            path,
            r"cannot be pickled, and (spawn|forkserver) sends it to every worker",
            f"next: .*{cure}",
        ),
        index=None,
        modes=(SPAWN, FORKSERVER, SPAWN_PINNED),
        bound_s=2.0,
    )


AT_13 = r"dataset index 13 \(position 1, batch 3, epoch 0\)"
KILLED_AT_13 = r"worker 1 \(pid \d+\) died at " + AT_13
NATIVE = r"next: .*native library .*index 13.*loader\.dataset\[13\] in a fresh process"
FROM_OUTSIDE = r"next: .*killed from outside: kill -9.*dmesg"

FAULTS: list[Fault] = [
    # ── the user's exceptions ──
    in_sample("KeyError", key_error, KeyError, AT_13, "'feature'", modes=(*EVERYWHERE, FORKSERVER)),
    in_sample("ValueError", value_error, ValueError, AT_13, "twelve"),
    in_sample("exception whose constructor wants two", demanding_error, NeedsTwo, "data.csv:3"),
    in_sample(
        "exception that cannot be pickled",
        unpicklable_error,
        HoldsALock,
        "is locked",
        modes=(MAIN, *LIGHT),
    ),
    in_sample("exception group", a_group, ExceptionGroup, "two reads failed", modes=(MAIN, FORK)),
    in_sample(
        "missing file",
        no_such_file,
        FileNotFoundError,
        "/no/such/image.png",
        modes=(MAIN, *LIGHT),
    ),
    in_sample("undefined name", name_error, NameError, "cv2", modes=(MAIN, FORK)),
    in_sample("missing module", import_error, ImportError, "no_such_module", modes=(MAIN, FORK)),
    in_sample(
        "StopIteration in __getitem__",
        stop_iteration,
        Exception,
        "a StopIteration left the dataset",
    ),
    in_sample(
        "out of memory",
        out_of_memory,
        MemoryError,
        AT_13,
        "Unable to allocate",
        next_step=r"next: out of memory: .* of .* available",
    ),
    in_sample(
        "too many open files in the dataset",
        too_many_files,
        OSError,
        AT_13,
        r"Too many open files",
        next_step=r"next: too many open files: this process has (\d+) of \1 .*ulimit -n",
    ),
    in_sample("KeyError in __getitems__", key_error, KeyError, "one at a time", place=Together),
    in_stream("KeyError in __next__", key_error, "next", KeyError, r"next: .*worker \d's stream"),
    in_stream(
        "KeyError in a generator",
        key_error,
        "generator",
        KeyError,
        r"next: .*'s stream",
        modes=(MAIN, *LIGHT),
    ),
    in_stream(
        "iter(dataset) raises",
        no_such_file,
        "iter",
        OSError,
        r"iter\(dataset\)",
        "next: ",
        modes=(MAIN, *LIGHT),
    ),
    Fault(
        "__getitems__ gives fewer samples",
        lambda scene: {"dataset": Miscounts(scene, more=False)},
        DeliveryError,
        "delivery",
        (
            r"\[12, 13, 14, 15\]",
            "asked for 4 samples and gave 3",
            "next: have __getitems__ give one",
        ),
        index=UNKNOWN,
    ),
    Fault(
        "__getitems__ gives more samples",
        lambda scene: {"dataset": Miscounts(scene, more=True)},
        DeliveryError,
        "delivery",
        (
            r"\[12, 13, 14, 15\]",
            "asked for 4 samples.* and gave 5",
            "next: have __getitems__ give one",
        ),
        index=None,
        modes=(MAIN, *LIGHT),
    ),
    Fault(
        "dataset that says it is longer than it is",
        lambda scene: {"dataset": Lying()},
        SampleError,
        "sample",
        (
            AT_13,
            "list index out of range",
            r"dataset\.items has 13 entries, and the dataset's length is 40: __len__ says more",
            r"next: \w+",
        ),
        also=IndexError,
    ),
    # ── batches ──
    odd("sample is None", nothing, TypeError, r"index 13 \(position 1\) is None"),
    odd(
        "sample misses a key",
        without_key,
        KeyError,
        r"index 13 .* has no key 'feature'",
        modes=(MAIN, *LIGHT),
    ),
    odd(
        "a text among numbers",
        with_text,
        Exception,
        r"index 13 .* is str at \['label'\]; the other 3 are int",
        modes=(MAIN, *LIGHT),
    ),
    Fault(
        "sample of another shape",
        lambda scene: {"dataset": Faulty(scene, Gives(longer))},
        CollateError,
        "collate",
        (r"index 13 \(position 1\) has (shape \[5\]|.*dtype)", "next: mend the sample"),
        also=RuntimeError,
        modes=(MAIN, *LIGHT),
    ),
    Fault(
        "collate_fn raises",
        lambda scene: {"dataset": Holding(), "collate_fn": Collating(scene, value_error)},
        CollateError,
        "collate",
        (r"indices \[12, 13, 14, 15\]", "twelve", r"next: .*loader\.collate_fn\("),
        also=ValueError,
        index=None,
    ),
    Fault(
        "key raises",
        lambda scene: {"dataset": Holding(), "key": Identifying(scene, key_error)},
        SampleError,
        "sample",
        (AT_13, "raised by key=", r"next: call it on loader\.dataset"),
        also=KeyError,
    ),
    # ── set-up and samplers ──
    Fault(
        "worker_init_fn raises",
        lambda scene: {"dataset": Holding(), "worker_init_fn": Starting(scene, no_such_file)},
        WorkerInitError,
        "init",
        (
            "safeloader: in worker_init_fn, in worker 1",
            "/no/such/image.png",
            "next: .*call worker_init_fn",
        ),
        also=FileNotFoundError,
        index=None,
        modes=(*WORKERS, FORKSERVER),
    ),
    Fault(
        "sampler raises at its start",
        lambda scene: {"dataset": Holding(), "sampler": Sampling(scene, key_error, None)},
        SamplerError,
        "sampler",
        ("while drawing from the sampler", "'feature'", r"next: \w+"),
        also=KeyError,
        index=None,
        modes=(MAIN, *LIGHT),
    ),
    Fault(
        "sampler raises in the middle",
        lambda scene: {"dataset": Holding(), "sampler": Sampling(scene, key_error, 13)},
        SamplerError,
        "sampler",
        ("batch 3, .*while drawing from the sampler", "'feature'", r"next: \w+"),
        also=KeyError,
        index=None,
    ),
    Fault(
        "batch sampler raises",
        lambda scene: {
            "dataset": Holding(),
            "batch_size": 1,
            "batch_sampler": Sampling(scene, key_error, 5, batches=True),
        },
        SamplerError,
        "sampler",
        ("batch 5, .*while drawing", "'feature'", r"next: \w+"),
        also=KeyError,
        index=None,
        modes=(MAIN, *LIGHT),
    ),
    # ── the bounds of going on ──
    Fault(
        "every sample fails, under on_error='skip'",
        lambda scene: {
            "dataset": Faulty(scene, key_error, bad=tuple(range(LENGTH))),
            "on_error": "skip",
        },
        SampleError,
        "sample",
        ("too many samples failed: 12 of", "index 0: KeyError: 'feature'", "next: .*max_skipped="),
        index={8, 9, 10, 11},
        modes=(MAIN, *LIGHT),
    ),
    Fault(
        "a missing module, under on_error='skip'",
        lambda scene: {"dataset": Faulty(scene, import_error), "on_error": "skip"},
        SampleError,
        "sample",
        (AT_13, "safeloader_has_no_such_module", r"next: \w+"),
        also=ImportError,
        modes=(MAIN, FORK, FORK_PINNED),
    ),
    Fault(
        "an on_error that raises itself",
        lambda scene: {"dataset": Faulty(scene, value_error), "on_error": divide},
        SampleError,
        "sample",
        (AT_13, "raised by on_error", "division by zero", r"next: \w+"),
        also=ZeroDivisionError,
        modes=(MAIN, FORK, FORK_PINNED),
    ),
    Fault(
        "a generator raises, under on_error='skip'",
        lambda scene: {"dataset": Stream(scene, key_error, "generator"), "on_error": "skip"},
        SampleError,
        "sample",
        ("A generator is at its end once it raised", r"next: \w+"),
        also=KeyError,
        index={(0, 5), (1, 5)},
        modes=(MAIN, FORK, FORK_PINNED),
    ),
    Fault(
        "every sample kills its worker, under on_crash='restart'",
        lambda scene: {
            "dataset": Faulty(scene, Signalled(signal.SIGKILL), bad=tuple(range(LENGTH))),
            "on_crash": "restart",
        },
        WorkerCrashError,
        "crash",
        (r"died at dataset index \d+", r"next: \w+"),
        index=set(range(LENGTH)),
        modes=(FORK, FORK_PINNED),
    ),
    # ── deaths ──
    death(
        "SIGKILL from inside",
        Signalled(signal.SIGKILL),
        KILLED_AT_13,
        r"is killed by signal: Killed",
        r"fetching index 13",
        FROM_OUTSIDE,
        modes=(*WORKERS, SPAWN_PINNED, FORKSERVER),
    ),
    death(
        "SIGKILL from outside",
        wait_to_be_killed,
        KILLED_AT_13,
        FROM_OUTSIDE,
        meddle=KillsThoseThatWait((1,)),
    ),
    death(
        "SIGKILL of both workers at once",
        wait_to_be_killed,
        r"worker \d \(pid \d+\) was killed by SIGKILL \(signal 9\) too while fetching index (8|13)",
        FROM_OUTSIDE,
        args=lambda scene: {"dataset": Faulty(scene, wait_to_be_killed, bad=(8, 13))},
        index={8, 13},
        meddle=KillsThoseThatWait((0, 1)),
    ),
    death(
        "SIGKILL of an idle persistent worker between epochs",
        nothing,
        r"worker 1 \(pid \d+\) died",
        r"worker 1 was (idle|sending)",
        FROM_OUTSIDE,
        args=lambda scene: {"dataset": Holding(), "persistent_workers": True},
        index=None,
        meddle=kill_between_epochs,
        epochs=2,
    ),
    death(
        "SIGKILL in the second epoch of persistent workers",
        nothing,
        r"index 13 \(position 1, batch 3, epoch 1\)",
        FROM_OUTSIDE,
        args=lambda scene: {
            "dataset": Faulty(scene, SecondTime(Signalled(signal.SIGKILL))),
            "persistent_workers": True,
        },
        epochs=2,
    ),
    death(
        "SIGKILL while an earlier batch waits to be opened",
        Signalled(signal.SIGKILL),
        KILLED_AT_13,
        FROM_OUTSIDE,
        meddle=wait_until_it_is_dead,
        modes=LIGHT,
    ),
    death(
        "os._exit(0)",
        Exits(0),
        KILLED_AT_13,
        "exit code 0",
        r"next: .*os\._exit\(\)",
        meddle=wait_until_it_is_dead,
    ),
    death(
        "os._exit(3)",
        Exits(3),
        KILLED_AT_13,
        "exit code 3",
        r"next: .*os\._exit\(\).*; loader\.dataset\[13\] in a fresh process repeats it",
        modes=LIGHT,
    ),
    death(
        "sys.exit()",
        SysExits(None),
        KILLED_AT_13,
        "SystemExit",
        r'most recent call last:\n.*Traceback.*\n +File ".*faults\.py"',  # no line of ours before
        r"next: sys\.exit\(\) was called in the worker at index 13",
        meddle=wait_until_it_is_dead,
        modes=(*WORKERS, FORKSERVER),
    ),
    death(
        "sys.exit('text')",
        SysExits("no more shards"),
        KILLED_AT_13,
        "SystemExit: no more shards",
        r"next: sys\.exit\(\) was called",
        fingerprints="no more shards",
        modes=LIGHT,
    ),
    death(
        "sys.exit() in __getitems__",
        SysExits(1),
        r"indices \[12, 13, 14, 15\]",
        r"next: sys\.exit\(\) was called",
        place=Together,
        index=None,
        modes=(FORK, FORK_PINNED),
    ),
    death(
        "sys.exit() in a stream",
        SysExits(1),
        r"dataset index \(1, 5\)",
        r"next: sys\.exit\(\) was called",
        place=Stream,
        index=(1, 5),
        modes=(FORK, FORK_PINNED),
    ),
    death(
        "sys.exit() in collate_fn",
        SysExits(1),
        r"indices \[12, 13, 14, 15\]",
        "collating batch 3",
        r"next: sys\.exit\(\) was called",
        args=lambda scene: {
            "dataset": Holding(),
            "collate_fn": Collating(scene, SysExits(1)),
        },
        index=None,
        modes=LIGHT,
    ),
    death(
        "os._exit(3) in collate_fn",
        Exits(3),
        r"indices \[12, 13, 14, 15\]",
        "collating batch 3",
        r"next: .*os\._exit\(\)",
        args=lambda scene: {"dataset": Holding(), "collate_fn": Collating(scene, Exits(3))},
        index=None,
        modes=(FORK, FORK_PINNED),
    ),
    death(
        "sys.exit() in worker_init_fn",
        SysExits(2),
        "in worker_init_fn",
        r"next: sys\.exit\(\) was called",
        args=lambda scene: {"dataset": Holding(), "worker_init_fn": Starting(scene, SysExits(2))},
        index=None,
    ),
    death(
        "SIGKILL in worker_init_fn",
        nothing,
        "in worker_init_fn",
        FROM_OUTSIDE,
        args=lambda scene: {
            "dataset": Holding(),
            "worker_init_fn": Starting(scene, Signalled(signal.SIGKILL)),
        },
        index=None,
        modes=(FORK, FORK_PINNED),
    ),
    death(
        "SIGSEGV by a null pointer",
        null_pointer,
        KILLED_AT_13,
        "Segmentation fault",
        r"Python stack, most recent call last:\n(.*\n)+?.*faults\.py.* in null_pointer",
        NATIVE,
        modes=(*WORKERS, FORKSERVER),
    ),
    death("SIGABRT", abort, KILLED_AT_13, "Aborted", r"faults\.py.* in abort", NATIVE),
    death(
        "SIGBUS",
        Signalled(signal.SIGBUS),
        KILLED_AT_13,
        "Bus error",
        r"faults\.py.* in __call__",
        "next: memory behind a mapped file went away at index 13",
        modes=LIGHT,
    ),
    death(
        "truncated file under np.memmap",
        truncated_map,
        KILLED_AT_13,
        "Bus error",
        r"faults\.py.* in truncated_map",
        "next: memory behind a mapped file went away at index 13",
    ),
    death(
        "SIGFPE",
        Signalled(signal.SIGFPE),
        KILLED_AT_13,
        "Floating point",
        r"faults\.py.* in __call__",
        NATIVE,
        modes=LIGHT,
    ),
    death(
        "SIGILL",
        Signalled(signal.SIGILL),
        KILLED_AT_13,
        "instruction",
        "next: .*processor",
        modes=LIGHT,
    ),
    death(
        "SIGTERM",
        Signalled(signal.SIGTERM),
        KILLED_AT_13,
        "Terminated",
        "next: .*asked it",
        modes=LIGHT,
    ),
    death("SIGHUP", Signalled(signal.SIGHUP), KILLED_AT_13, "next: .*asked it", modes=(FORK,)),
    death(
        "SIGUSR1, by which batch systems warn",
        Signalled(signal.SIGUSR1),
        KILLED_AT_13,
        "next: .*(sent|asked|batch system)",
        modes=(FORK, FORK_PINNED),
    ),
    death(
        "KeyboardInterrupt in a worker",
        interrupt,
        KILLED_AT_13,
        r"next: .*interrupted",
        meddle=wait_until_it_is_dead,
    ),
    death(
        "SIGKILL while a batch of 40 MB is sent",
        nothing,
        r"worker 0 \(pid \d+\) died",
        FROM_OUTSIDE,
        args=lambda scene: {"dataset": Slow(scene, key_error), "collate_fn": as_list},
        index=UNKNOWN,
        meddle=kill_while_it_sends,
    ),
    death(
        "os._exit while the dataset is unpickled",
        Exits(7),
        "exit code 7",
        "next: .*ended before it could report anything",
        place=Unpickling,
        index=None,
        modes=PICKLED,
    ),
    death(
        "an exception while the dataset is unpickled",
        import_error,
        "exit code 1",
        "next: .*ended before it could report anything",
        place=Unpickling,
        index=None,
        modes=PICKLED,
        dies=False,
        fingerprints="ModuleNotFoundError",
    ),
    # ── hangs ──
    hang(
        "time.sleep",
        sleep_on,
        r"worker 1 \(pid \d+\) is fetching index 13 \(position 1 of batch 3\) for \d",
        r"faults\.py.* in sleep_on",
        "in sleep_on for index 13",
        modes=(*WORKERS, FORKSERVER),
    ),
    hang(
        "a C call",
        pause_in_c,
        "fetching index 13",
        r"faults\.py.* in pause_in_c",
        modes=LIGHT,
    ),
    hang(
        "a C call that holds the GIL",
        pause_with_the_gil,
        r"faults\.py.* in pause_with_the_gil",
        meddle=wait_until_it_is_stuck,
    ),
    hang(
        "a lock inherited through fork",
        take_the_lock,
        r"faults\.py.* in take_the_lock",
        "next: it waits for a lock .*deadlock inherited through fork",
        args=lambda scene: held_by_a_thread({"dataset": Faulty(scene, take_the_lock)}),
        modes=(FORK, FORK_PINNED),
    ),
    hang(
        "queue.get()",
        wait_for_a_queue,
        r"faults\.py.* in wait_for_a_queue",
        r"next: it waits for a lock.* at .*faults\.py:\d+ in wait_for_a_queue, in queue\.py",
    ),
    hang(
        "SIGSTOP",
        stop_itself,
        "process state: stopped",
        "next: .*kill -CONT",
        meddle=wait_until_it_is_stuck,
    ),
    hang(
        "time.sleep in __getitems__",
        sleep_on,
        r"in __getitems__ of batch 3 \(indices \[12, 13, 14, 15\]\)",
        place=Together,
        index=None,
        modes=(FORK,),
    ),
    hang(
        "time.sleep in a stream",
        sleep_on,
        r"index \(1, 5\)",
        place=Stream,
        index=(1, 5),
        modes=(FORK,),
    ),
    hang(
        "time.sleep in collate_fn",
        sleep_on,
        r"collating batch 3 \(indices \[12, 13, 14, 15\]\)",
        args=lambda scene: {"dataset": Holding(), "collate_fn": Collating(scene, sleep_on)},
        index=None,
        modes=(FORK, FORK_PINNED),
    ),
    hang(
        "time.sleep in worker_init_fn",
        sleep_on,
        "worker 1 .* is in worker_init_fn",
        args=lambda scene: {"dataset": Holding(), "worker_init_fn": Starting(scene, sleep_on)},
        index=None,
        modes=(FORK,),
        meddle=None,
    ),
    hang(
        "workers that take longer to start than the timeout",
        sleep_on,
        r"worker \d .* is starting, before its set-up was done",
        "next: the worker does not get through its start",
        place=Unpickling,
        index=None,
        modes=(SPAWN, FORKSERVER),
        meddle=None,
    ),
    # ── what cannot be sent ──
    unsendable("a lock in a sample", deep_lock, AT_13, r"sample\['meta'\]\[1\]\['payload'\]: _thr"),
    unsendable(
        "an open file in a sample",
        open_file,
        AT_13,
        r"sample\['image'\]: .*TextIOWrapper",
        modes=LIGHT,
    ),
    unsendable(
        "a lambda in a sample",
        a_lambda,
        AT_13,
        r"sample\['resize'\]: a lambda",
        modes=LIGHT,
    ),
    unsendable(
        "a generator in a sample",
        a_generator,
        AT_13,
        r"sample\[0\]: .*generator",
        modes=LIGHT,
    ),
    unsendable("a local class in a sample", a_local_instance, AT_13, r"sample\[0\]: .*Local"),
    unsendable(
        "a connection in a sample",
        a_connection,
        AT_13,
        r"sample\['db'\]: sqlite3",
        modes=LIGHT,
    ),
    unsendable("a tensor that requires grad", grown, AT_13, r"sample\['x'\]", "detach"),
    Fault(
        "a batch that does not unpickle",
        lambda scene: {"dataset": Faulty(scene, Gives(OnlyHere)), "collate_fn": as_list},
        TransportError,
        "transport",
        (
            r"indices \[12, 13, 14, 15\]",
            "no registry in this process",
            "could not be loaded in the main process",
            r"next: pickle\.loads",
        ),
        also=KeyError,
        index={None, BAD},
        modes=WORKERS,
    ),
    Fault(
        "a batch that cannot be pinned",
        lambda scene: {"dataset": Faulty(scene, Gives(Unpinnable)), "collate_fn": as_list},
        TransportError,
        "transport",
        (r"indices \[12, 13, 14, 15\]", "no page-locked memory left", r"next: \w+"),
        also=BufferError,
        index={None, BAD},
        modes=(MAIN_PINNED, FORK_PINNED),
    ),
    # ── what cannot be handed to a worker ──
    unstartable(
        "dataset with a lambda",
        lambda: {"dataset": Holding(transform=lambda image: image)},
        r"dataset\.transform: a lambda",
    ),
    unstartable(
        "dataset with nested transforms",
        lambda: {"dataset": Holding(transform=Composed(1, 2, Lambda(lambda image: image)))},
        r"dataset\.transform\.transforms\[2\]\.lambd: a lambda",
    ),
    unstartable(
        "dataset with a database connection",
        lambda: {"dataset": Holding(settings={"db": connected_until_told()})},
        r"dataset\.settings\['db'\]: sqlite3\.Connection",
        "in the worker, on first use",
    ),
    unstartable(
        "dataset with a lock",
        lambda: {"dataset": Holding(lock=threading.Lock())},
        r"dataset\.lock: (_thread|threading)\.[lL]ock",
        "in the worker, on first use",
    ),
    unstartable(
        "dataset with an open file",
        lambda: {"dataset": Holding(shards=[open_until_told()])},
        r"dataset\.shards\[0\]: .*TextIOWrapper",
        "in the worker, on first use",
    ),
    unstartable(
        "dataset of a local class",
        lambda: {"dataset": a_local_dataset()},
        r"dataset: .*a_local_dataset.*Local",
    ),
    unstartable(
        "lambda as collate_fn", lambda: {"collate_fn": lambda x: x}, "collate_fn: a lambda"
    ),
    unstartable(
        "lambda as worker_init_fn",
        lambda: {"worker_init_fn": lambda worker: None},
        "worker_init_fn: a lambda",
    ),
    unstartable("lambda as key", lambda: {"key": lambda sample: 1}, "key: a lambda"),
    unstartable("lambda as on_error", lambda: {"on_error": lambda x: x}, "on_error: a lambda"),
    # ── shortages in the main process ──
    Fault(
        "too many open files while the workers start",
        lambda scene: few_descriptors(6, {"dataset": Holding()}),
        TransportError,
        "transport",
        (
            "while starting the workers",
            r"too many open files: this process has \d+ of \d+",
            r"next: .*ulimit -n",
        ),
        also=OSError,
        index=None,
        modes=(*WORKERS, FORKSERVER),
    ),
    Fault(
        "too many open files for batches that the loop keeps",
        lambda scene: few_descriptors(
            30, {"dataset": Holding(), "batch_size": 1, "transport": "torch"}
        ),
        TransportError,
        "transport",
        (r"too many open files: this process has \d+ of \d+", r"next: .*set_sharing_strategy"),
        index=set(range(LENGTH)),
        modes=(FORK, SPAWN),  # what is pinned is a copy, without a descriptor
        keeps=True,
    ),
]


def a_local_dataset() -> Any:
    class Local(Holding):
        pass

    return Local()
