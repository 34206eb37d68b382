"""Each shortage brought about for real, and told from a bad sample."""

from __future__ import annotations

import ast
import contextlib
import errno
import functools
import importlib
import json
import mmap
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from multiprocessing import reduction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from safeloader.introspect import resource_exhaustion as module
from safeloader.introspect import resources
from safeloader.introspect.resource_exhaustion import never_skipped, shortage
from safeloader.introspect.resources import CgroupMemory, MachineMemory, Space, Use
from tests.unit.test_resources import fill_descriptors, in_a_child, limited

ROOT = Path(__file__).parents[2]
MIB = 2**20
GIB = 2**30

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are set as Linux has them")


class Told(NamedTuple):
    """What an exception said, and what was said of it."""

    text: str
    words: str | None
    never_skipped: bool


def told_of(provoke: Callable[[], object]) -> Told:
    try:
        provoke()
    except Exception as error:
        return Told(f"{type(error).__name__}: {error}", shortage(error), never_skipped(error))
    raise AssertionError("nothing was raised")


# ── too many open files ──────────────────────────────────────────────────────────────────────────

OPEN_FILES = 80


def share_tensors() -> None:
    held = []
    while True:
        held.append(torch.zeros(4).share_memory_())


def receive_a_descriptor() -> None:
    """As the queue of a loader does for each tensor."""
    here, there = socket.socketpair()
    with here, there:
        reduction.sendfds(there, [0])
        held = fill_descriptors()
        try:
            reduction.recvfds(here, 1)
        finally:
            close(held)


def ask_for_a_temporary_folder() -> None:
    tempfile.tempdir = None
    held = fill_descriptors()
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        # While the descriptors are held: nothing else tells this from a full disk.
        raise RuntimeError(shortage(error)) from error
    finally:
        close(held)


def open_files() -> None:
    held = []
    while True:
        held.append(open(os.devnull))  # noqa: SIM115


def hold_the_batches_of_a_loader() -> None:
    held = list(DataLoader(range(400), num_workers=1, timeout=60))  # type: ignore[arg-type]
    raise AssertionError(f"all of {len(held)} held")


def close(descriptors: list[int]) -> None:
    for each in descriptors:
        os.close(each)


@pytest.mark.parametrize(
    ("provoke", "text"),
    [
        (share_tensors, "unable to open shared memory object .* Too many open files \\(24\\)"),
        (receive_a_descriptor, "RuntimeError: received 0 items of ancdata"),
        (open_files, "Too many open files: '/dev/null'"),
        (hold_the_batches_of_a_loader, "RuntimeError: Too many open files. Communication with"),
    ],
)
def test_too_many_open_files(provoke: Callable[[], object], text: str) -> None:
    def ask() -> Told:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with limited(resource.RLIMIT_NOFILE, OPEN_FILES):
            told = told_of(provoke)
            assert told.words is not None
            assert f"`ulimit -n {hard}`" in told.words
            return told

    told = in_a_child(ask)
    assert re.search(text, told.text)
    assert told.never_skipped
    assert told.words is not None
    assert told.words.startswith("too many open files: this process has ")
    assert f" of {OPEN_FILES} (hard limit " in told.words
    assert "set_sharing_strategy('file_system')" in told.words


def test_the_figures_are_those_while_the_files_are_held() -> None:
    def ask() -> str | None:
        with limited(resource.RLIMIT_NOFILE, OPEN_FILES):
            held = fill_descriptors()
            try:
                return shortage(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
            finally:
                close(held)

    assert f"this process has {OPEN_FILES} of {OPEN_FILES} (" in str(in_a_child(ask))


def test_tempfile_blames_the_folders_for_too_many_open_files() -> None:
    def ask() -> Told:
        with limited(resource.RLIMIT_NOFILE, OPEN_FILES):
            return told_of(ask_for_a_temporary_folder)

    told = in_a_child(ask)
    assert f"too many open files: this process has {OPEN_FILES} of {OPEN_FILES}" in told.text
    assert told.never_skipped


def test_where_the_hard_limit_is_reached_no_higher_one_is_advised() -> None:
    def ask() -> str | None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
        return shortage(OSError(errno.EMFILE, "x"))

    assert "--ulimit nofile=" in str(in_a_child(ask))


def test_too_many_open_files_on_the_whole_machine() -> None:
    words = shortage(OSError(errno.ENFILE, "Too many open files in system"))
    assert str(words).startswith("too many open files on the whole machine (fs.file-max)")


# ── no space left ────────────────────────────────────────────────────────────────────────────────


def mount(folder: str, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)


def hold_shared(count: int, elements: int) -> None:
    held = []
    for _ in range(count):
        held.append(torch.zeros(elements).share_memory_())


def write_a_temporary_file() -> None:
    with tempfile.NamedTemporaryFile(buffering=0) as file:
        while True:
            file.write(bytes(2**16))


def hold_locks() -> None:
    held = []
    for _ in range(1000):
        held.append(multiprocessing.Lock())


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def tell_of_full_file_systems(folder: Path) -> dict[str, Told]:
    """Run in a mount namespace of its own."""
    told = {}
    mount("/dev/shm", "size=1m")
    told["tensors"] = told_of(lambda: hold_shared(40, 2**14))
    fill(Path("/dev/shm/full"))
    told["locks"] = told_of(hold_locks)
    mount("/dev/shm", "size=1m,nr_inodes=4")
    told["inodes"] = told_of(lambda: hold_shared(40, 4))

    source = folder / "source"
    source.write_bytes(bytes(2**20))
    target = folder / "target"
    target.mkdir()
    mount(str(target), "size=1m")
    fill(target / "full")
    told["numpy"] = told_of(lambda: np.zeros(2**17).tofile(target / "array"))
    told["copy"] = told_of(lambda: shutil.copyfile(source, target / "copy"))
    told["mapped"] = told_of(lambda: torch.from_file(f"{target}/m", shared=True, size=2**20))
    tempfile.tempdir = str(target)
    told["temporary"] = told_of(write_a_temporary_file)

    tempfile.tempdir = None
    os.environ |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), "/no/such/folder")
    mount("/tmp", "size=4k")
    fill(Path("/tmp/full"))
    mount("/var/tmp", "ro")
    os.chdir("/proc")
    told["no folder"] = told_of(tempfile.gettempdir)
    return told


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    """What was told of small file systems that were filled, by what was asked of them."""
    namespace = ["unshare", "--map-root-user", "--mount"]
    try:
        probe = subprocess.run([*namespace, "mount", "-t", "tmpfs", "none", "/dev/shm"])
    except FileNotFoundError:
        pytest.skip("there is no unshare(1) to make a small file system with")
    if probe.returncode:
        pytest.skip("this machine does not let its users mount file systems of their own")
    program = (
        "import pathlib, pickle, sys; from tests.unit import test_resource_exhaustion as tests;"
        "told = tests.tell_of_full_file_systems(pathlib.Path(sys.argv[1]));"
        "sys.stdout.buffer.write(pickle.dumps({name: tuple(each) for name, each in told.items()}))"
    )
    done = subprocess.run(
        [*namespace, sys.executable, "-c", program, str(tmp_path_factory.mktemp("full"))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
        timeout=300,
    )
    return {name: Told(*each) for name, each in pickle.loads(done.stdout).items()}


@pytest.mark.parametrize(
    ("asked", "text", "words"),
    [
        (
            "tensors",
            r"(unable to allocate shared memory\(shm\) for|unable to write to) file .*: "
            r"No space left on device \(28\)",
            r"no space left: /dev/shm \S+ (KiB )?of 1 MiB free\. .* --shm-size=",
        ),
        ("locks", "OSError: .*No space left on device$", "no space left: /dev/shm 0 of 1 MiB free"),
        (
            "inodes",
            r"unable to open shared memory object .*: No space left on device \(28\)",
            r"/dev/shm .* of 1 MiB free, but not one more file can be made \(inodes\)\.",
        ),
        ("numpy", "OSError: .* requested and .* written", "no space left: /dev/shm .* free"),
        ("copy", "OSError: .*source.* -> .*copy", "no space left: .*/target 0 of 1 MiB free"),
        ("mapped", "unable to .* file <.*/m", "no space left: .*/target .* of 1 MiB free"),
        ("temporary", "OSError: .*", "no space left: .*/target .* of 1 MiB free.*TMPDIR"),
        (
            "no folder",
            "FileNotFoundError: .*No usable temporary directory found",
            "no folder for temporary files: /no/such/folder cannot be written to; "
            "/tmp 0 of 4 KiB free; "
            "/var/tmp cannot be written to; .*TMPDIR",
        ),
    ],
)
def test_no_space_left(full: dict[str, Told], asked: str, text: str, words: str) -> None:
    told = full[asked]
    assert re.search(text, told.text)
    assert re.search(words, str(told.words))
    assert told.never_skipped


def test_a_file_system_that_the_error_names_is_the_only_one_told(tmp_path: Path) -> None:
    name = str(tmp_path / "gone" / "file")
    for error in (
        OSError(errno.ENOSPC, "No space left on device", name),
        OSError(errno.ENOSPC, "No space left on device", os.fsencode(name)),
        OSError(errno.ENOSPC, "No space left on device", "/proc/self", None, name),
        RuntimeError(f"unable to resize file <{name}> to the right size: No space left on device"),
    ):
        words = shortage(error)
        assert words is not None
        assert words.startswith(f"no space left: {tmp_path} ")
        assert "/dev/shm" not in words


def test_a_file_that_is_named_by_a_number_is_not_looked_for() -> None:
    words = shortage(OSError(errno.ENOSPC, "No space left on device", 7))
    assert str(words).startswith("no space left: /")


def test_full_file_systems_are_told_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "shared_memory", lambda: Space("/dev/shm", 64 * MIB, 0, 7))
    monkeypatch.setattr(resources, "temporary_folder", lambda: Space("/tmp", GIB, 9 * MIB, 7))
    monkeypatch.setattr(resources, "space_of", lambda path: Space("/data", GIB, GIB // 2, 7))
    error = OSError(errno.ENOSPC, "No space left on device")
    figures = str(shortage(error)).split(". ")[0]
    assert figures == "no space left: /dev/shm 0 of 64 MiB free; /tmp 9 MiB of 1 GiB free"


def test_a_quota_that_is_used_up(tmp_path: Path) -> None:
    words = shortage(OSError(errno.EDQUOT, "Disk quota exceeded", str(tmp_path / "x")))
    assert str(words).startswith(f"no space left: {tmp_path} ")
    assert "this user's share of it is used up (`quota -s`)" in str(words)


def test_a_bus_error_in_a_worker_as_torch_words_it(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError(
        "DataLoader worker (pid 71) is killed by signal: Bus error. It is possible"
    )
    roomy = Space("/dev/shm", GIB, GIB // 2, 7)
    monkeypatch.setattr(resources, "shared_memory", lambda: roomy._replace(free=MIB))
    assert re.match(r"/dev/shm is full \(1 MiB of 1 GiB free\).*--shm-size", str(shortage(error)))
    monkeypatch.setattr(resources, "shared_memory", lambda: roomy)
    words = str(shortage(error))
    assert words.startswith("memory behind a mapped file went away: a file that was truncated")
    assert "/dev/shm running full" in words


# ── out of memory ────────────────────────────────────────────────────────────────────────────────


def with_little_address_space(provoke: Callable[[], object]) -> Told:
    def ask() -> Told:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        with limited(resource.RLIMIT_AS, taken + 64 * MIB):
            return told_of(provoke)

    return in_a_child(ask)


@pytest.mark.parametrize(
    ("provoke", "text"),
    [
        (lambda: torch.zeros(GIB), "DefaultCPUAllocator: can't allocate memory"),
        (lambda: np.zeros(GIB), "MemoryError: Unable to allocate"),
        (lambda: bytearray(GIB), "^MemoryError: $"),
        (lambda: mmap.mmap(-1, GIB), "OSError: .*Cannot allocate memory"),
    ],
)
def test_out_of_memory(provoke: Callable[[], object], text: str) -> None:
    told = with_little_address_space(provoke)
    assert re.search(text, told.text)
    assert told.never_skipped
    figures = r"out of memory: \S+( \w+)? of \S+ GiB available; .*address space .*iB taken\. "
    assert re.match(figures, str(told.words))
    assert "raise `ulimit -v`" in str(told.words)


def test_shared_memory_that_cannot_be_mapped(tmp_path: Path) -> None:
    name = str(tmp_path / "tensor")
    told = with_little_address_space(lambda: torch.from_file(name, shared=True, size=2**26))
    assert re.search("unable to mmap .* bytes from file .*: Cannot allocate memory", told.text)
    assert "address space" in str(told.words)
    assert told.never_skipped


def test_the_limit_of_the_container_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "machine_memory", lambda: MachineMemory(64 * GIB, 32 * GIB))
    monkeypatch.setattr(resources, "cgroup_memory", lambda: CgroupMemory(8 * GIB, 7 * GIB, 1))
    monkeypatch.setattr(module, "_address_space", lambda: None)
    assert shortage(MemoryError()) == (
        "out of memory: 32 of 64 GiB available; cgroup limit 8 GiB, 7 GiB used, 1 process(es) "
        "killed for memory. Use fewer workers, a smaller prefetch_factor or smaller batches. Where "
        "there was room, look at the sample: a corrupt one may have asked for more than there is."
    )


def test_a_corrupt_sample_may_have_asked_for_too_much() -> None:
    words = str(shortage(told_error(lambda: torch.empty(10**17))))
    assert words.endswith(
        "look at the sample: a corrupt one may have asked for more than there is."
    )


def told_error(provoke: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        provoke()
    return caught.value


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory\n")],
)
def test_out_of_memory_on_the_gpu(error: Exception) -> None:
    assert str(shortage(error)).startswith("out of memory on the GPU")
    assert never_skipped(error)


# ── no more processes ────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def as_a_user_without_a_process_to_spare() -> Iterator[None]:
    """Root is not held to the limit."""
    users = os.getresuid()
    if 0 in users:
        os.setresuid(65534, 65534, 0)
    try:
        with limited(resource.RLIMIT_NPROC, 1):
            yield
    finally:
        os.setresuid(*users)


def start_a_process() -> None:
    multiprocessing.get_context("fork").Process(target=print).start()


@pytest.mark.parametrize(
    ("provoke", "text"),
    [
        (lambda: threading.Thread(target=print).start(), "RuntimeError: can't start new thread"),
        (start_a_process, "BlockingIOError: .*Resource temporarily unavailable"),
        (lambda: subprocess.run(["/bin/true"]), "BlockingIOError: .*temporarily unavailable"),
        (lambda: os.posix_spawn("/bin/true", ["true"], {}), "BlockingIOError: .*unavailable"),
    ],
)
def test_no_more_processes(provoke: Callable[[], object], text: str) -> None:
    def ask() -> Told:
        with as_a_user_without_a_process_to_spare():
            return told_of(provoke)

    told = in_a_child(ask)
    assert re.search(text, told.text)
    assert re.match(
        r"no more processes or threads can be started: this user may run 1 \(`ulimit -u`",
        str(told.words),
    )
    assert told.never_skipped


def test_the_limit_of_the_container_on_processes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "cgroup_tasks", lambda: Use(100, 100))
    words = str(shortage(RuntimeError("can't start new thread")))
    assert "the cgroup runs 100 of 100 (pids.max)" in words


def test_nothing_to_read_yet_is_no_shortage() -> None:
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        error = told_error(functools.partial(here.recv, 1))
    assert isinstance(error, BlockingIOError)
    assert shortage(error) is None
    assert not never_skipped(error)


# ── other people's words, and what stands behind an exception ────────────────────────────────────

TOO_MANY = OSError(errno.EMFILE, "Too many open files")


def raised_from(cause: BaseException) -> Exception:
    try:
        raise ValueError("bad sample") from cause
    except ValueError as error:
        return error


def raised_within(context: BaseException, *, hidden: bool = False) -> Exception:
    try:
        try:
            raise context
        except BaseException:
            if hidden:
                raise ValueError("bad sample") from None
            raise ValueError("bad sample")  # noqa: B904
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(
            "Unable to open file (errno = 24, error message = 'Too many open files', flags = 0)"
        ),
        RuntimeError(
            "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
            "last):\nOSError: [Errno 24] Too many open files: '/x'"
        ),
        raised_from(TOO_MANY),
        raised_within(TOO_MANY),
        raised_from(raised_within(TOO_MANY)),
        ExceptionGroup("two reads", [KeyError(7), raised_from(TOO_MANY)]),
    ],
)
def test_a_shortage_is_found_in_other_words_and_behind_other_exceptions(error: Exception) -> None:
    assert str(shortage(error)).startswith("too many open files")
    assert never_skipped(error)


class Hostile(OSError):
    @property
    def errno(self) -> int:  # type: ignore[override]
        raise RuntimeError("no")

    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "error",
    [
        KeyError("Too many open files"),  # a sample whose text it is
        ValueError("No space left on device"),
        raised_within(TOO_MANY, hidden=True),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"),
        PermissionError(errno.EACCES, "Permission denied"),
        RuntimeError("stack expects each tensor to be equal size"),
        RuntimeError(),
        RuntimeError(TOO_MANY),
        OSError(),
        Hostile("x"),
        StopIteration(),
    ],
)
def test_what_is_no_shortage(error: Exception) -> None:
    assert shortage(error) is None
    assert not never_skipped(error)


def test_chains_that_are_long_or_bite_their_tail_come_to_an_end() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__context__ = two, one
    assert shortage(one) is None
    assert not never_skipped(one)
    long: Exception = TOO_MANY
    for _ in range(100):
        long = raised_from(long)
    assert shortage(long) is None
    group = ExceptionGroup("many", [KeyError(n) for n in range(10_000)])
    assert not never_skipped(group)


def test_a_fault_in_the_figures_is_no_fault_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(resources, "descriptors", broken)
    assert shortage(TOO_MANY) is None
    assert never_skipped(TOO_MANY)
    monkeypatch.setattr(resources, "descriptors", lambda: None)
    assert str(shortage(TOO_MANY)).startswith("too many open files: this process is at its limit")


# ── a broken program against a bad sample ────────────────────────────────────────────────────────


def import_what_does_not_parse(folder: Path) -> None:
    (folder / "safeloader_test_broken.py").write_text("def f(:\n")
    sys.path.insert(0, str(folder))
    try:
        importlib.import_module("safeloader_test_broken")
    finally:
        sys.path.remove(str(folder))


def test_a_source_file_that_does_not_parse_is_never_skipped(tmp_path: Path) -> None:
    assert never_skipped(told_error(lambda: import_what_does_not_parse(tmp_path)))


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'x'"),
        NameError("name 'x' is not defined"),
        MemoryError(),
        KeyboardInterrupt(),
        SystemExit(1),
        raised_from(ImportError("install x")),
        raised_from(NameError("name 'x' is not defined")),
        BaseExceptionGroup("both", [KeyError(1), KeyboardInterrupt()]),
    ],
)
def test_a_broken_program_is_never_skipped(error: BaseException) -> None:
    assert never_skipped(error)


def loop_over_an_empty_sample() -> None:
    boxes: list[int] = []
    for box in boxes:
        last = box
    print(last)


@pytest.mark.parametrize(
    ("provoke", "kind"),
    [
        (lambda: ElementTree.fromstring("<annotation>"), SyntaxError),
        (lambda: ast.literal_eval("[1, 2"), SyntaxError),
        (lambda: json.loads("[" * 100_000), RecursionError),
        (loop_over_an_empty_sample, UnboundLocalError),
    ],
)
def test_what_a_bad_sample_brings_about_by_itself_may_be_skipped(
    provoke: Callable[[], Any], kind: type[Exception]
) -> None:
    error = told_error(provoke)
    assert isinstance(error, kind)
    assert not never_skipped(error)


def test_an_optional_import_that_was_done_without_is_no_fault() -> None:
    assert not never_skipped(raised_within(ImportError("no fast decoder here")))


def test_the_broken_tile_of_an_image_may_be_skipped() -> None:
    assert not never_skipped(SystemError("tile cannot extend outside image"))
