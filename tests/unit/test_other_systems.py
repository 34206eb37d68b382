"""Systems and Pythons that lack names: without workers any will do, with them torch's own way."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from safeloader import _python
from tests.lacking import START_METHODS

ROOT = Path(__file__).parents[2]
# What Windows lacks, macOS lacks, and this Python could. A test below asks mypy whether anything is
# used that stands in neither.
WINDOWS = {
    "os": "fork register_at_fork memfd_create pidfd_open set_blocking sysconf getuid geteuid "
    "O_CLOEXEC statvfs sched_getaffinity fchmod O_NOFOLLOW O_DIRECTORY MFD_CLOEXEC "
    "eventfd mkfifo waitid posix_fallocate pread pwrite writev sendfile killpg getpgid setsid "
    "uname getloadavg tcgetpgrp getpgrp getsid WNOHANG WNOWAIT WEXITED P_PID CLD_EXITED",
    "signal": "SIGKILL SIGBUS SIGCHLD SIGRTMIN SIGRTMAX SIGHUP SIGQUIT SIGSYS SIGTRAP SIGXCPU "
    "SIGXFSZ SIGUSR1 SIGUSR2 SIGALRM pidfd_send_signal pthread_kill pthread_sigmask sigwait",
    "select": "poll epoll POLLIN POLLOUT",
    "socket": "SCM_RIGHTS AF_UNIX CMSG_SPACE CMSG_LEN MSG_CMSG_CLOEXEC",
    "mmap": "MAP_PRIVATE MAP_ANONYMOUS MAP_SHARED",
    "faulthandler": "register",
    "multiprocessing.reduction": "DupFd",
    START_METHODS: "fork forkserver",
}
WINDOWS_MODULES = (
    "resource fcntl pwd grp termios multiprocessing.popen_fork multiprocessing.forkserver"
)
MACOS = {
    "os": "memfd_create MFD_CLOEXEC pidfd_open eventfd sched_getaffinity posix_fallocate waitid",
    "signal": "SIGRTMIN SIGRTMAX pidfd_send_signal",
    "select": "epoll",
    "socket": "MSG_CMSG_CLOEXEC",
}
SAMPLES = """
import torch, warnings
class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 10
    def __getitem__(self, i):
        return torch.tensor(float(i))
"""


def program(lacks: dict[str, str], modules: str, rest: str) -> str:
    """``rest`` on a system without these names; torch itself was imported on this one."""
    lines = [
        "import importlib, sys",
        "import numpy.random, psutil, torch, torch.multiprocessing.reductions",
        "import multiprocessing.connection, multiprocessing.reduction, logging, tempfile",
    ]
    for module, names in lacks.items():
        lines += [f"owner = importlib.import_module({module!r})"]
        lines += [f"if hasattr(owner, {name!r}): del owner.{name}" for name in names.split()]
    lines += [f"sys.modules[{name!r}] = None" for name in modules.split()]
    return "\n".join([*lines, SAMPLES, rest])


def printed(text: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", text],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


Case = tuple[dict[str, list[str]], list[str]]  # names to take away by module, and modules


def whole(lacks: dict[str, str], modules: str) -> Case:
    return {module: names.split() for module, names in lacks.items()}, modules.split()


SYSTEMS = {"none": ({}, []), "windows": whole(WINDOWS, WINDOWS_MODULES), "macos": whole(MACOS, "")}
SINGLE: dict[str, Case] = {
    f"{module}.{name}": ({module: [name]}, [])
    for module, names in WINDOWS.items()
    if module != START_METHODS
    for name in names.split()
}
SINGLE |= {START_METHODS: ({START_METHODS: WINDOWS[START_METHODS].split()}, [])}
SINGLE |= {module: ({}, [module]) for module in WINDOWS_MODULES.split()}


def told(cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.lacking"],
        input=json.dumps(list(cases.values())),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=True))


COMPLETE = "epoch 0: complete, ok; 10 drawn, 10 delivered"


def works(said: dict[str, Any]) -> bool:
    """Whether all ways in do as they should: loader, error, dump, ``instrument`` and launcher."""
    statuses, became, launchers = said.pop("launcher", ([], False, ""))
    return (
        said
        == {
            "batches": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]],
            "audit": COMPLETE,
            "error": [5, 2.0],
            "dumps": 1,
            "instrument": [True, 3, COMPLETE],
        }
        and (statuses, became) == ([2, 2, 3], True)
        and "no program was given" in launchers
        and "0 of 1 ranks were recorded" in launchers
    )


def test_without_workers_any_system_will_do() -> None:
    assert {name: said for name, said in told(SYSTEMS).items() if not works(said)} == {}


@pytest.mark.thorough
@pytest.mark.uncovered
@pytest.mark.slow
def test_no_single_name_is_needed_without_workers() -> None:
    assert {name: said for name, said in told(SINGLE).items() if not works(said)} == {}


@pytest.mark.uncovered
@pytest.mark.slow
@pytest.mark.parametrize(("platform", "lacks"), [("win32", WINDOWS), ("darwin", MACOS)])
def test_every_name_used_that_another_system_lacks_is_tried(
    platform: str, lacks: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("mypy")
    done = subprocess.run(
        # What torch and NumPy are made of is not asked about, and takes three quarters of the time.
        [
            *(sys.executable, "-m", "mypy", "--platform", platform),
            *("--no-site-packages", "--cache-dir", str(tmp_path)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    used = set(re.findall(r'Module has no attribute "(\w+)"', done.stdout))
    modules = WINDOWS_MODULES.split() if platform == "win32" else []
    of_modules = {name for module in modules for name in vars(importlib.import_module(module))}
    assert used, done.stdout + done.stderr
    assert used - {name for names in lacks.values() for name in names.split()} - of_modules == set()


# On this system torch's own way of starting a worker needs the others.
NEEDED = {
    "os": "register_at_fork",
    "select": "poll",
}


def test_with_workers_torchs_own_loader_serves_where_names_are_missing() -> None:
    said = printed(
        program(
            NEEDED,
            "multiprocessing.forkserver",
            """
from safeloader import SafeDataLoader
loader = SafeDataLoader(Samples(), batch_size=4, num_workers=1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        print([batch.tolist() for batch in loader], loader.last_batch, loader.audit)
for each in caught:
    print(each.message)
try:
    iter(SafeDataLoader(Samples(), num_workers=1, verify="raise"))
except Exception as exc:
    print(type(exc).__name__, exc)
loader = SafeDataLoader(Samples(), verify="raise")
print(len(list(loader)), loader.audit)
""",
        )
    )
    *batches, warning, error, without = said.splitlines()
    whole = "[[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0], [8.0, 9.0]] None None"
    assert batches == [whole, whole]
    for text in (warning, error):
        for name in ("os.register_at_fork", "select.poll", "forkserver"):
            assert name in text
    assert error.startswith("SafeLoaderError verify='raise' was asked for")
    assert without == "10 epoch 0: complete, ok; 10 drawn, 10 delivered"


def test_on_macos_workers_are_recorded() -> None:
    said = printed(
        program(
            MACOS,
            "",
            """
from safeloader import SafeDataLoader
loader = SafeDataLoader(Samples(), batch_size=4, num_workers=1)
print([batch.tolist() for batch in loader], loader.last_batch.worker_id, loader.audit)
""",
        )
    )
    assert said.splitlines()[-1].endswith("0 epoch 0: complete, ok; 10 drawn, 10 delivered")


def test_this_python_has_all_names() -> None:
    assert _python.missing() == ()


@pytest.mark.parametrize(
    ("module", "path", "named"),
    [
        ("multiprocessing.context", "assert_spawning", "multiprocessing.context.assert_spawning"),
        ("multiprocessing.context", "set_spawning_popen", "context.set_spawning_popen"),
        ("multiprocessing.reduction", "ForkingPickler._extra_reducers", "_extra_reducers"),
        ("multiprocessing.util", "Finalize", "multiprocessing.util.Finalize"),
        ("multiprocessing.popen_fork", "Popen._launch", "popen_fork.Popen._launch"),
    ],
)
def test_a_python_in_which_a_name_has_moved_is_told(module: str, path: str, named: str) -> None:
    said = printed(
        f"import importlib, operator\nowner = importlib.import_module({module!r})\n"
        + "".join(f"owner = owner.{part}\n" for part in path.split(".")[:-1])
        + f"del owner.{path.rpartition('.')[2]}\n"
        "from safeloader import _python\nprint(_python.missing())"
    )
    assert named in said


def test_a_local_variable_that_has_another_name_is_told() -> None:
    said = printed(
        "from multiprocessing import popen_fork\n"
        "popen_fork.Popen._launch = lambda self, process_obj: None\n"
        "from safeloader import _python\nprint(_python.missing())"
    )
    assert "<locals>.parent_r" in said
