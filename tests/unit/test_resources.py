"""What is left of memory, files and space: asked of the kernel itself, and of made-up cgroups."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import resource
import sys
import tempfile
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeloader.introspect import resources
from safeloader.introspect.resources import (
    CgroupMemory,
    Space,
    Use,
    cgroup_memory,
    cgroup_tasks,
    descriptors,
    human_bytes,
    human_share,
    machine_lines,
    machine_memory,
    oom_kills,
    process_memory,
    shared_memory,
    soft_limit,
    space_of,
    temporary_folder,
)

MIB = 2**20
GIB = 2**30
V1_NO_LIMIT = 9223372036854771712

T = TypeVar("T")

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def in_a_child(ask: Callable[[], T]) -> T:
    """Ask in a forked process, which may lower its own limits."""
    context: Any = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(ask()))
    child.start()
    sender.close()
    try:
        assert receiver.poll(100), "the child has not answered"
        answer: T = receiver.recv()
        return answer
    finally:
        child.join(10)
        child.kill()
        receiver.close()


@contextlib.contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


# ── memory of a process ──────────────────────────────────────────────────────────────────────────


@on_linux
def test_memory_is_what_psutil_says() -> None:
    found, expected = process_memory(), psutil.Process().memory_full_info()
    assert found is not None
    assert found.rss == pytest.approx(expected.rss, rel=0.1)
    assert found.pss == pytest.approx(expected.pss, rel=0.1)
    assert found.uss == pytest.approx(expected.uss, rel=0.1)


@on_linux
def test_what_a_forked_process_shares_is_not_its_own() -> None:
    held = mmap.mmap(-1, 64 * MIB, mmap.MAP_PRIVATE)
    held.write(b"\1" * len(held))
    child = in_a_child(process_memory)
    held.close()
    assert child is not None
    assert child.pss is not None
    assert child.uss is not None
    assert child.uss <= child.pss <= child.rss
    assert child.uss < child.rss - 60 * MIB


def test_psutil_answers_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_file(path: Path) -> dict[str, int]:
        raise FileNotFoundError(path)

    expected = psutil.Process().memory_full_info()
    of_all = psutil.virtual_memory()  # other programs take and free memory meanwhile
    monkeypatch.setattr(psutil, "virtual_memory", lambda: of_all)
    monkeypatch.setattr(resources, "_fields", no_such_file)
    found = process_memory()
    assert found is not None
    assert found.rss == pytest.approx(expected.rss, rel=0.1)
    assert found.uss == pytest.approx(expected.uss, rel=0.1)
    machine = machine_memory()
    assert machine is not None
    assert (machine.total, machine.available) == (of_all.total, of_all.available)


# ── memory of the machine and of the cgroup ──────────────────────────────────────────────────────


def test_least_memory_is_told_by_a_system_without_sysconf(monkeypatch: pytest.MonkeyPatch) -> None:
    known = resources.least_memory()
    monkeypatch.delattr(os, "sysconf")
    assert known is not None
    assert resources.least_memory() == known


def test_memory_of_the_machine() -> None:
    found = machine_memory()
    assert found is not None
    assert found.total == psutil.virtual_memory().total
    assert 0 < found.available <= found.total


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def group_v2(
    folder: str, limit: int | str, used: int, cache: int = 0, kills: int | None = 0
) -> dict[str, str]:
    at = f"sys/fs/cgroup{folder}"
    events = "low 0\nhigh 0\nmax 9\noom 5\n" + ("" if kills is None else f"oom_kill {kills}\n")
    return {
        f"{at}/memory.max": f"{limit}\n",
        f"{at}/memory.current": f"{used}\n",
        f"{at}/memory.stat": f"anon 1\ninactive_anon 3\ninactive_file {cache}\nactive_file 7\n",
        f"{at}/memory.events": f"{events}oom_group_kill 0\n",
    }


def group_v1(folder: str, limit: int, used: int, cache: int = 0, kills: int = 0) -> dict[str, str]:
    at = f"sys/fs/cgroup/memory{folder}"
    return {
        f"{at}/memory.limit_in_bytes": f"{limit}\n",
        f"{at}/memory.usage_in_bytes": f"{used}\n",
        f"{at}/memory.stat": f"inactive_file 1\ntotal_inactive_file {cache}\n",
        f"{at}/memory.oom_control": f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n",
    }


def test_v2_in_a_container_with_a_namespace_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/\n", **group_v2("", 8 * GIB, 7 * GIB, GIB, kills=2)})
    found = cgroup_memory(tmp_path)
    assert found == CgroupMemory(8 * GIB, 6 * GIB, 2)
    assert str(found) == "cgroup limit 8 GiB, 6 GiB used, 2 process(es) killed for memory"
    assert oom_kills(tmp_path) == 2


def test_v2_in_a_container_that_sees_the_path_of_the_host(tmp_path: Path) -> None:
    path = "/kubepods.slice/pod1/cri-containerd-9f.scope"
    write(tmp_path, {"proc/self/cgroup": f"0::{path}\n", **group_v2("", GIB, MIB, kills=1)})
    assert cgroup_memory(tmp_path) == CgroupMemory(GIB, MIB, 1)


@pytest.mark.parametrize("path", ["/..", "/../other", "/../../init.scope"])
def test_v2_of_a_process_outside_the_namespace_does_not_leave_the_mount(
    tmp_path: Path, path: str
) -> None:
    write(tmp_path, {"proc/self/cgroup": f"0::{path}\n", **group_v2("", GIB, MIB)})
    write(tmp_path, {"sys/fs/other/memory.max": "1", "sys/fs/memory.max": "1"})
    assert cgroup_memory(tmp_path) == CgroupMemory(GIB, MIB, 0)


def test_v2_the_limit_above_counts_where_it_is_tighter(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/job.scope\n",
            **group_v2("/user.slice/job.scope", "max", 2 * GIB, kills=1),
            **group_v2("/user.slice", 4 * GIB, 3 * GIB, kills=7),
        },
    )
    # The kills are those among the processes of the own cgroup.
    assert cgroup_memory(tmp_path) == CgroupMemory(4 * GIB, 3 * GIB, 1)
    write(tmp_path, group_v2("/user.slice/job.scope", 2 * GIB, GIB))
    assert cgroup_memory(tmp_path) == CgroupMemory(2 * GIB, GIB, 0)


def test_v2_a_wider_limit_with_less_room_is_the_one_that_matters(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/container\n",
            **group_v2("/pod/container", 8 * GIB, 2 * GIB),
            **group_v2("/pod", 16 * GIB, 15 * GIB),  # its other container holds 13
        },
    )
    assert cgroup_memory(tmp_path) == CgroupMemory(16 * GIB, 15 * GIB, 0)


def test_v2_without_a_limit_tells_what_the_cgroup_uses(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/a\n", **group_v2("/a", "max", GIB, kills=1)})
    found = cgroup_memory(tmp_path)
    assert found == CgroupMemory(None, GIB, 1)
    assert str(found) == "1 process(es) killed for memory"


def test_v2_on_a_machine_without_cgroups_in_use(tmp_path: Path) -> None:
    """The root has no memory.max; the machine's own count is what there is."""
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.stat": "inactive_file 7\n",
            "proc/vmstat": "pgfault 12\noom_kill 3\nswap_ra 0\n",
        },
    )
    assert cgroup_memory(tmp_path) is None
    assert oom_kills(tmp_path) == 3


def test_v1_with_its_limit_and_what_the_kernel_could_drop(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "9:name=systemd:/x\n4:memory:/docker/ab\n0::/y\n",
            **group_v1("/docker/ab", 4 * GIB, 3 * GIB, GIB, kills=4),
            **group_v1("/docker", V1_NO_LIMIT, 9 * GIB, kills=9),
            **group_v1("", V1_NO_LIMIT, 9 * GIB, kills=11),
            **group_v2("", 1, 1),  # the unified hierarchy has no memory controller then
        },
    )
    assert cgroup_memory(tmp_path) == CgroupMemory(4 * GIB, 2 * GIB, 4)
    assert oom_kills(tmp_path) == 4


def test_v1_in_a_container_that_sees_the_path_of_the_host(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"proc/self/cgroup": "4:memory:/docker/ab\n", **group_v1("", 2 * GIB, GIB, kills=1)},
    )
    assert cgroup_memory(tmp_path) == CgroupMemory(2 * GIB, GIB, 1)


def test_v1_without_a_limit(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "4:memory:/\n", **group_v1("", V1_NO_LIMIT, GIB)})
    assert cgroup_memory(tmp_path) == CgroupMemory(None, GIB, 0)


def test_v1_of_a_kernel_that_does_not_count_kills(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "4:memory:/\n", **group_v1("", GIB, MIB)})
    write(tmp_path, {"sys/fs/cgroup/memory/memory.oom_control": "oom_kill_disable 0\n"})
    assert cgroup_memory(tmp_path) == CgroupMemory(GIB, MIB, None)
    assert oom_kills(tmp_path) is None
    write(tmp_path, {"proc/vmstat": "oom_kill 3\n"})
    assert oom_kills(tmp_path) == 3


def test_a_kernel_without_cgroups_counts_kills_all_the_same(tmp_path: Path) -> None:
    write(tmp_path, {"proc/vmstat": "oom_kill 3\n"})
    assert oom_kills(tmp_path) == 3
    assert cgroup_memory(tmp_path) is None


@pytest.mark.parametrize("text", ["", "garbage", "4:memory\n", "\0\n"])
def test_a_cgroup_file_that_makes_no_sense_is_no_fact(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"proc/self/cgroup": text})
    assert cgroup_memory(tmp_path) is None
    assert oom_kills(tmp_path) is None


@pytest.mark.parametrize(
    ("lines", "folder"),
    [("0::/a/b\n", "sys/fs/cgroup"), ("8:pids:/a/b\n4:memory:/\n", "sys/fs/cgroup/pids")],
)
def test_tasks_of_the_cgroup(tmp_path: Path, lines: str, folder: str) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": lines,
            f"{folder}/a/b/pids.max": "max\n",
            f"{folder}/a/b/pids.current": "90\n",
            f"{folder}/a/pids.max": "100\n",
            f"{folder}/a/pids.current": "95\n",
        },
    )
    assert cgroup_tasks(tmp_path) == Use(95, 100)
    assert str(cgroup_tasks(tmp_path)) == "95 of 100"
    write(tmp_path, {f"{folder}/a/pids.max": "max\n"})
    assert cgroup_tasks(tmp_path) == Use(90, None)


@on_linux
def test_the_kills_of_this_machine_are_counted_in_well_under_a_millisecond() -> None:
    assert type(oom_kills()) is int
    fastest = min(timeit.repeat(oom_kills, number=1, repeat=100))
    assert fastest < 1e-3


# ── space ────────────────────────────────────────────────────────────────────────────────────────


def test_space_is_what_the_file_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = os.statvfs(tmp_path)  # other programs write and remove files meanwhile
    monkeypatch.setattr(os, "statvfs", lambda path: now)
    found = space_of(str(tmp_path))
    usage = psutil.disk_usage(str(tmp_path))
    assert found is not None
    assert found.path == str(tmp_path)
    assert found.total == usage.total
    assert found.free == usage.free


def test_space_of_a_file_that_is_not_there_is_that_of_where_it_would_be(tmp_path: Path) -> None:
    found = space_of(str(tmp_path / "no" / "such" / "file"))
    assert found is not None
    assert found.path == str(tmp_path)


@on_linux
def test_a_folder_without_space_of_its_own_is_not_known() -> None:
    assert space_of("/proc/self/fd") is None


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no /dev/shm here")
def test_shared_memory_is_that_of_the_file_system() -> None:
    found = shared_memory()
    assert found is not None
    assert found.path == "/dev/shm"
    assert found.total == psutil.disk_usage("/dev/shm").total


def test_without_shared_memory_it_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    assert shared_memory() is None


def test_as_text_space_tells_what_is_free() -> None:
    assert str(Space("/dev/shm", 64 * MIB, 12 * MIB, 800)) == "/dev/shm 12 of 64 MiB free"
    assert str(Space("/x", GIB, 12 * MIB)) == "/x 12 MiB of 1 GiB free"
    assert "inodes" in str(Space("/x", 64 * MIB, 12 * MIB, 0))


@pytest.mark.parametrize("as_given", [str, os.fsencode])
def test_the_temporary_folder_is_the_one_that_tempfile_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_given: Callable[[Path], Any]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", as_given(tmp_path))
    found = temporary_folder()
    assert found is not None
    assert found.path == str(tmp_path)


def test_where_no_file_can_be_made_the_temporary_folder_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "missing")])
    assert temporary_folder() is None


# ── open files ───────────────────────────────────────────────────────────────────────────────────


def test_open_files_are_counted_to_the_last_one() -> None:
    before = descriptors()
    pipes = [os.pipe() for _ in range(5)]
    after = descriptors()
    assert before is not None
    assert after is not None
    assert after.used == before.used + 10
    for end in sum(pipes, ()):
        os.close(end)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert (after.limit, after.hard_limit) == (soft, hard)


def fill_descriptors() -> list[int]:
    held = []
    with contextlib.suppress(OSError):
        while True:
            held.append(os.dup(0))
    return held


@on_linux
def test_with_all_open_files_in_use_they_are_still_counted() -> None:
    def ask() -> Use | None:
        with limited(resource.RLIMIT_NOFILE, 100):
            held = fill_descriptors()
            try:
                return descriptors()
            finally:
                for each in held:
                    os.close(each)

    found = in_a_child(ask)
    assert found is not None
    assert (found.used, found.limit) == (100, 100)
    assert str(found) == f"100 of 100 (hard limit {found.hard_limit})"


def test_a_soft_limit_by_its_name() -> None:
    assert soft_limit("RLIMIT_NOFILE") == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert soft_limit("RLIMIT_CPU") is None
    assert soft_limit("RLIMIT_NO_SUCH_THING") is None


def test_a_limit_that_is_none_reads_as_that() -> None:
    assert str(Use(3, None)) == "3 of any number"


# ── all of it ────────────────────────────────────────────────────────────────────────────────────

FACTS = (
    process_memory,
    machine_memory,
    cgroup_memory,
    oom_kills,
    shared_memory,
    temporary_folder,
    descriptors,
    cgroup_tasks,
)


def test_the_lines_for_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, object] = {
        "machine_memory": resources.MachineMemory(24 * GIB, 3 * GIB + 100 * MIB),
        "cgroup_memory": CgroupMemory(8 * GIB, 7 * GIB + 920 * MIB, 2),
        "shared_memory": Space("/dev/shm", 64 * MIB, 12 * MIB, 7),
        "temporary_folder": Space("/tmp", 200 * GIB, 20 * MIB, 7),
        "descriptors": Use(250, 256, 4096),
    }
    for name, fact in told.items():
        monkeypatch.setattr(resources, name, lambda fact=fact: fact)
    assert machine_lines() == [
        "memory: 3.1 of 24 GiB available; "
        "cgroup limit 8 GiB, 7.9 GiB used, 2 process(es) killed for memory",
        "shared memory: /dev/shm 12 of 64 MiB free",
        "temporary files: /tmp 20 MiB of 200 GiB free",
        "open files: 250 of 256 (hard limit 4096)",
    ]


def test_where_nothing_can_be_known_nothing_is_said_and_nothing_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise RuntimeError("not on this system")

    for owner, name in (
        (Path, "read_text"),
        (os, "listdir"),
        (os, "statvfs"),
        (resource, "getrlimit"),
    ):
        monkeypatch.setattr(owner, name, broken)
    monkeypatch.setitem(sys.modules, "psutil", None)
    for fact in FACTS:
        assert fact() is None, fact
    assert machine_lines() == []


# ── bytes ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1.5 * GIB, "1.5 GiB"),
        (8 * GIB, "8 GiB"),
        (GIB - 1, "1 GiB"),
        (-1536, "-1.5 KiB"),
        (2**62, "4194304 TiB"),
    ],
)
def test_bytes_for_a_person(count: float, text: str) -> None:
    assert human_bytes(count) == text


@given(st.integers(0, 2**60))
def test_bytes_for_a_person_are_near_the_number(count: int) -> None:
    number, unit = human_bytes(count).split()
    scale = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)
    assert float(number) * scale == pytest.approx(count, rel=0.051)
    assert float(number) < 1024 or unit == "TiB"


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (12 * MIB, 64 * MIB, "12 of 64 MiB"),
        (0, 64 * MIB, "0 of 64 MiB"),
        (12, 64 * MIB, "12 B of 64 MiB"),
        (3 * GIB, GIB, "3 of 1 GiB"),
    ],
)
def test_a_share_for_a_person(part: int, whole: int, text: str) -> None:
    assert human_share(part, whole) == text
