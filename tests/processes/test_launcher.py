"""``python -m safeloader run``: the program stays what it was, and its loaders are recorded."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import coverage
import pytest

import safeloader

ROOT = Path(safeloader.__file__).parents[1]
PATIENCE_S = 300

IMPORTS = """\
import multiprocessing, os, pickle, signal, sys
import torch
from torch.utils.data import DataLoader
from tests.frameworks.library_loaders import *
"""


def surroundings(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if "SAFELOADER" not in name}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    measured = {}
    if coverage.Coverage.current() is not None:
        measured = {
            "COVERAGE_PROCESS_START": str(ROOT / "pyproject.toml"),
            "COVERAGE_FILE": str(ROOT / ".coverage"),
        }
    return clean | {"PYTHONPATH": path} | measured | more


def ran(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=surroundings(**more),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def program(folder: Path, body: str) -> Path:
    path = folder / "train.py"
    path.write_text(IMPORTS + 'if __name__ == "__main__":\n' + indented(body))
    return path


def indented(body: str) -> str:
    return "".join(f"    {line}\n" for line in body.strip().splitlines())


def launched(folder: Path, body: str, *options: str, **more: str) -> Any:
    program(folder, body)
    return ran(folder, "-m", "safeloader", "run", *options, "train.py", **more)


def both(folder: Path, body: str, *options: str) -> tuple[Any, Any]:
    program(folder, body)
    return ran(folder, "train.py"), launched(folder, body, *options)


def written(run: Path) -> list[dict[str, Any]]:
    """The audits of a run's folder, in the order of their processes."""
    lines = []
    for path in sorted(run.glob("attempt=*/rank=*/*/epochs.jsonl")):
        lines += [json.loads(line) for line in path.read_text().splitlines()]
    return lines


def delivered(run: Path) -> list[int]:
    return [line["audit"]["delivered"] for line in written(run) if line["audit"]]


# ── what the program sees ────────────────────────────────────────────────────────────────────────

SAME = {
    "kinds": """
for more in ({}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}):
    torch.manual_seed(1)
    loader = DataLoader(Numbers(), batch_size=4, shuffle=True, **more)
    before = set(vars(loader))
    for _ in range(2):
        print([batch.tolist() for batch in loader])
    print(type(loader) is DataLoader, set(vars(loader)) == before, torch.rand(()).item())
""",
    "library classes": """
for cls in (Transforms, Endless, MakesItsOwn, NeverAsks):
    torch.manual_seed(1)
    loader = cls(Numbers(), batch_size=4)
    for _ in range(2):
        print([batch.tolist() for batch in loader])
    print(type(loader) is cls)
""",
    "workers that are threads": """
print([batch[:, 0].tolist() for batch in with_thread_workers()])
""",
    "spawn": """
loader = DataLoader(Numbers(), batch_size=4, num_workers=1, multiprocessing_context="spawn")
print([batch[:, 0].tolist() for batch in loader])
""",
    "pickles": """
loader = DataLoader(Numbers(), batch_size=4)
list(loader)
print(len(pickle.dumps(loader)), type(pickle.loads(pickle.dumps(loader))).__name__)
""",
    "argv and exit status": "print(sys.argv, __name__); sys.exit(7)",
    "methods look like torch's": """
for name in ("__iter__", "_get_iterator"):
    method = getattr(DataLoader, name)
    print(method.__name__, method.__qualname__, method.__module__, method.__doc__)
import inspect
print(inspect.signature(torch.utils.data.dataloader._BaseDataLoaderIter))
""",
}


@pytest.mark.parametrize("name", SAME)
def test_the_program_does_as_without_it(name: str, tmp_path: Path) -> None:
    alone, ours = both(tmp_path, SAME[name])
    assert (ours.stdout, ours.returncode) == (alone.stdout, alone.returncode)
    assert "Traceback" not in ours.stderr


REPLACED = {
    "a subclass": "torch.utils.data.DataLoader = type('Mine', (DataLoader,), {})",
    "a function": "torch.utils.data.DataLoader = lambda *words: DataLoader(*words)",
    "nothing": "del torch.utils.data.DataLoader, torch.utils.data.dataloader.DataLoader",
    "methods": """
def patched(name, theirs):
    def ours(self):
        print(name)
        return globals()["theirs " + name](self)
    globals()["theirs " + name] = theirs
    setattr(DataLoader, name, ours)
for name in ("__iter__", "_get_iterator"):
    patched(name, getattr(DataLoader, name))
""",
}


@pytest.mark.parametrize("by", REPLACED)
def test_a_program_that_puts_something_in_the_place_of_torchs(by: str, tmp_path: Path) -> None:
    body = f"""
{REPLACED[by]}
places = torch.utils.data, torch.utils.data.dataloader
before = [vars(place).get("DataLoader") for place in places]
print(len(list(DataLoader(Numbers(6)))))
print(before == [vars(place).get("DataLoader") for place in places])
"""
    alone, ours = both(tmp_path, body)
    assert ours.stdout == alone.stdout
    assert "1 epoch, 6 of 6 delivered" in ours.stderr


def test_a_warning_of_torchs_points_to_the_line_that_it_does_without_us(tmp_path: Path) -> None:
    body = """
import warnings
warnings.simplefilter("always")
for workers in (0, 1):
    list(DataLoader(Numbers(6), pin_memory=True, num_workers=workers))
"""
    alone, ours = both(tmp_path, body)
    if "pin_memory" not in alone.stderr:
        pytest.skip("this torch warns of nothing here")
    assert ours.stderr.startswith(alone.stderr)


@pytest.mark.parametrize("kind", ["DataLoader", "SafeDataLoader"])
def test_a_warning_of_ours_points_to_the_line_that_asks_for_batches(
    kind: str, tmp_path: Path
) -> None:
    body = f"""
from safeloader import SafeDataLoader
class Draws(Numbers):
    def __init__(self): super().__init__(6); self.mine = torch.Generator()
for _ in {kind}(Draws(), num_workers=2): pass  # here
"""
    here = program(tmp_path, body).read_text().split("# here")[0].count("\n") + 1
    for words in (["train.py"], ["-m", "safeloader", "run", "train.py"]):
        ours = ran(tmp_path, *words)
        if kind == "SafeDataLoader" or len(words) > 1:
            said = f"train.py:{here}: RuntimeWarning: safeloader: dataset.mine (torch.Generator)"
            assert said in ours.stderr


def test_where_warnings_are_errors_ours_are_none(tmp_path: Path) -> None:
    body = """
import warnings
warnings.simplefilter("error")
class Draws(Numbers):
    def __init__(self): super().__init__(6); self.mine = torch.Generator()
print(len(list(DataLoader(Draws(), num_workers=2))))
class Fewer(Numbers):
    def __getitems__(self, indices): return [self[index] for index in indices[1:]]
print(len(list(DataLoader(Fewer(8), batch_size=4))))
"""
    ours = launched(tmp_path, body)
    assert (ours.returncode, ours.stdout) == (0, "6\n2\n"), ours.stderr
    assert "safeloader: __getitems__ was asked for 4 samples and gave 3" in ours.stderr
    assert "safeloader: dataset.mine (torch.Generator) goes to the workers" in ours.stderr
    assert "1 epoch, 6 of 6 delivered" in ours.stderr
    assert "please report" not in ours.stderr


@pytest.mark.parametrize("closes", ["sys.stderr.close()", "os.close(2)", "sys.stderr = None"])
def test_a_program_that_closes_stderr_goes_on(closes: str, tmp_path: Path) -> None:
    body = f"""
{closes}
list(DataLoader(Numbers(6), batch_size=4))
list(MakesItsOwn(Numbers(6), batch_size=4))
loader = with_thread_workers()
loader.num_workers = 0
print(len(list(loader)), flush=True)
"""
    ours = launched(tmp_path, body, "--run", "runs")
    assert (ours.returncode, ours.stdout) == (0, "3\n")
    assert delivered(tmp_path / "runs") == [6]


def test_each_loader_is_told_of_at_the_end_and_what_was_not_recorded_too(tmp_path: Path) -> None:
    body = """
list(DataLoader(Numbers(), batch_size=4))
list(Endless(Numbers(), batch_size=4))
list(MakesItsOwn(Numbers(), batch_size=4))
list(with_thread_workers())
"""
    said = launched(tmp_path, body).stderr.splitlines()
    at = f"at {tmp_path / 'train.py'}"
    (begins,) = (k for k, line in enumerate(said) if "loaders of process" in line)
    told = "\n".join(said[begins + 1 :])
    assert f"DataLoader over Numbers (10) {at}:6: 1 epoch, 10 of 10 delivered" in told
    assert f"NOT recorded: MakesItsOwn {at}:8" in told
    assert f"NOT recorded: DataLoader {at}:9" in told
    assert "its workers are threads" in told
    assert sum("Endless" in line for line in told.splitlines()) == 1


def test_the_programs_own_safe_loaders_are_told_of_and_counted(tmp_path: Path) -> None:
    body = """
from safeloader import SafeDataLoader
loader = SafeDataLoader(Numbers(6), batch_size=4, num_workers=1)
list(loader); list(loader)
print(loader.audit.epoch, loader.verify)
"""
    ours = launched(tmp_path, body, "--run", "runs", "--expect-ranks", "1")
    assert (ours.returncode, ours.stdout) == (0, "1 raise\n"), ours.stderr
    at = f"SafeDataLoader over Numbers (6) at {tmp_path / 'train.py'}:8"
    assert f"{at}: 2 epochs, 12 of 12 delivered" in ours.stderr
    assert delivered(tmp_path / "runs") == [6, 6]


def test_lines_in_the_log_name_the_programs_class(tmp_path: Path) -> None:
    body = """
from torch.utils.data import IterableDataset
class Stream(IterableDataset):
    def __len__(self): return 3
    def __iter__(self): return iter(range(3))
class Mine(DataLoader): pass
list(Mine(Stream(), num_workers=2))
"""
    said = launched(tmp_path, body).stderr
    assert "Mine over Stream (3): epoch 0: len(dataset) says 3" in said
    assert "SafeDataLoader" not in said


def test_a_sample_that_fails_is_told_with_its_index(tmp_path: Path) -> None:
    body = """
class Bad(Numbers):
    def __getitem__(self, index):
        if index == 6: raise KeyError("six")
        return super().__getitem__(index)
try:
    list(DataLoader(Bad(), batch_size=4))
except KeyError as error:
    print(type(error).__name__, error.index)
"""
    ours = launched(tmp_path, body, "--run", "runs")
    assert ours.stdout == "SampleError(KeyError) 6\n"
    assert "1 error raised" in ours.stderr
    assert len(list(tmp_path.glob("runs/attempt=0/rank=0/*/failures/*.json"))) == 1


def test_handles_answer_for_loaders_that_have_nothing_of_ours(tmp_path: Path) -> None:
    body = """
import safeloader
loader = DataLoader(Numbers(), batch_size=4)
print(safeloader.loaders_of(loader))
for batch in loader:
    (handle,) = safeloader.loaders_of(loader)
    print(handle.last_batch.indices)
print(handle.audit, handle.verify, len(handle.provenance), handle.replay(3)[0].item())
copied = pickle.loads(pickle.dumps(loader))
print(safeloader.loaders_of(copied))
del loader
try:
    handle.dataset
except LookupError as error:
    print(error)
"""
    said = launched(tmp_path, body).stdout
    assert "(8, 9)\nepoch 0: complete, ok; 10 drawn, 10 delivered warn 10 3.0\n[]" in said
    assert "is gone, and its dataset with it" in said


def test_options_are_those_of_every_loader(tmp_path: Path) -> None:
    body = """
class Bad(Numbers):
    def __getitem__(self, index):
        if index == 6: raise KeyError("six")
        return super().__getitem__(index)
print([len(batch) for batch in DataLoader(Bad(), batch_size=4)])
"""
    ours = launched(tmp_path, body, "--on-error", "skip", "--max-skipped", "0.5")
    assert ours.stdout == "[4, 3, 2]\n"
    assert "9 of 10 delivered; 1 skipped" in ours.stderr


def test_switched_off_nothing_is_recorded(tmp_path: Path) -> None:
    ours = launched(
        tmp_path, "print(len(list(DataLoader(Numbers()))))", "--run", "runs", SAFELOADER="off"
    )
    assert (ours.stdout, ours.stderr) == ("10\n", "")
    assert written(tmp_path / "runs") == []


# ── children ─────────────────────────────────────────────────────────────────────────────────────

CHILDREN = {
    "fork": """
pid = os.fork()
list(DataLoader(Numbers(6), batch_size=4))
if pid: os.waitpid(pid, 0)
""",
    "multiprocessing fork": """
child = multiprocessing.get_context("fork").Process(target=list, args=(DataLoader(Numbers(6)),))
child.start(); child.join()
list(DataLoader(Numbers(6), batch_size=4))
""",
    "spawn": """
child = multiprocessing.get_context("spawn").Process(target=list, args=(DataLoader(Numbers(6)),))
child.start(); child.join()
list(DataLoader(Numbers(6), batch_size=4))
""",
    "a program of its own": """
import subprocess
child = "from train import *; list(DataLoader(Numbers(6)))"
subprocess.run([sys.executable, "-c", child], check=True)
list(DataLoader(Numbers(6), batch_size=4))
""",
}


@pytest.mark.parametrize("how", CHILDREN)
def test_children_are_recorded_too(how: str, tmp_path: Path) -> None:
    ours = launched(tmp_path, CHILDREN[how], "--run", "runs")
    assert ours.returncode == 0, ours.stderr
    assert delivered(tmp_path / "runs") == [6, 6]
    assert ours.stderr.count("6 of 6 delivered") == 2
    assert len(list(tmp_path.glob("runs/attempt=0/rank=0/*/"))) == 2


def test_a_loader_that_no_line_of_the_users_iterates_is_told_by_the_programs_file(
    tmp_path: Path,
) -> None:
    body = """
child = multiprocessing.get_context("spawn").Process(target=list, args=(DataLoader(Numbers(6)),))
child.start(); child.join()
"""
    ours = launched(tmp_path, body)
    assert f"DataLoader over Numbers (6) at {tmp_path / 'train.py'}: 1 epoch" in ours.stderr


def test_torchrun_with_two_ranks(tmp_path: Path) -> None:
    program(tmp_path, "list(DataLoader(Numbers(6), batch_size=4, num_workers=1))")
    ranks = ["--nproc-per-node=2", "--master-port=0"]
    torchrun = ["-m", "torch.distributed.run", *ranks, "train.py"]
    options = ["--run", "runs", "--expect-ranks", "2"]
    ours = ran(tmp_path, "-m", "safeloader", "run", *options, *torchrun)
    assert ours.returncode == 0, ours.stderr
    assert delivered(tmp_path / "runs") == [6, 6]
    folders = {path.name for path in tmp_path.glob("runs/attempt=0/rank=*")}
    assert folders == {"rank=0", "rank=1"}


# ── ends ─────────────────────────────────────────────────────────────────────────────────────────

BEGUN = """
list(DataLoader(Numbers(6), batch_size=4))
iterator = iter(DataLoader(Numbers(8), batch_size=4))
next(iterator)
"""
ENDS = {"os._exit": ("os._exit(5)", 5), "killed": ("os.kill(os.getpid(), signal.SIGKILL)", -9)}


@pytest.mark.parametrize("how", ENDS)
def test_what_was_seen_until_then_lies_in_the_folder(how: str, tmp_path: Path) -> None:
    end, status = ENDS[how]
    ours = launched(tmp_path, BEGUN + end, "--run", "runs")
    assert ours.returncode == status
    assert delivered(tmp_path / "runs") == [6]
    begun = [line["loader"] for line in written(tmp_path / "runs") if line["audit"] is None]
    assert len(begun) == 2


def test_an_interrupt_ends_the_program_as_it_would(tmp_path: Path) -> None:
    body = """
try:
    print("begun", flush=True)
    while True:
        list(DataLoader(Numbers(8), batch_size=4))
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(4)
"""
    program(tmp_path, body)
    process = subprocess.Popen(
        [sys.executable, "-m", "safeloader", "run", "train.py"],
        cwd=tmp_path,
        env=surroundings(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=PATIENCE_S)[0] == "interrupted\n"
    assert process.returncode == 4


def test_an_interrupt_from_the_terminal_comes_once_beside_the_program_too(tmp_path: Path) -> None:
    # The terminal gives it to the launcher and to the program. The launcher is stopped until the
    # program has had it, and then gets a SIGTERM as well, which it passes on.
    body = """
came = []
def interrupted(number, frame):
    came.append(number)
    os.kill(os.getppid(), signal.SIGTERM)
    os.kill(os.getppid(), signal.SIGCONT)
def ended(number, frame):
    os.write(1, f"interrupts: {len(came)}\\n".encode())
    os._exit(0)
signal.signal(signal.SIGINT, interrupted)
signal.signal(signal.SIGTERM, ended)
os.kill(os.getppid(), signal.SIGSTOP)
print("begun", flush=True)
while True:
    signal.pause()
"""
    program(tmp_path, body)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        words = ["-m", "safeloader", "run", "--expect-ranks", "1", "train.py"]
        os.execve(sys.executable, [sys.executable, *words], surroundings())
    try:
        said = b""
        while b"begun" not in said:  # the test's time limit ends it
            said += os.read(terminal, 1000)
        os.write(terminal, b"\x03")
        while b"interrupts:" not in said or not said.endswith(b"\n"):
            said += os.read(terminal, 1000)
        assert b"interrupts: 1" in said
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


@pytest.mark.parametrize("how", ["exits", "is killed"])
def test_beside_the_program_its_end_is_the_launchers(how: str, tmp_path: Path) -> None:
    end = "sys.exit(6)" if how == "exits" else "os.kill(os.getpid(), signal.SIGTERM)"
    ours = launched(tmp_path, end, "--expect-ranks", "1")
    assert ours.returncode == (6 if how == "exits" else -signal.SIGTERM)


def test_a_rank_that_was_not_recorded(tmp_path: Path) -> None:
    ours = launched(tmp_path, "list(DataLoader(Numbers(6)))", "--expect-ranks", "2")
    assert ours.returncode == 3
    assert "1 of 2 ranks were recorded: rank=0. A rank is" in ours.stderr
    assert launched(tmp_path, "list(DataLoader(Numbers(6)))", "--expect-ranks", "1").returncode == 0


# ── the run ──────────────────────────────────────────────────────────────────────────────────────


def test_the_same_run_goes_on_as_its_next_attempt_and_another_is_refused(tmp_path: Path) -> None:
    body = "list(DataLoader(Numbers(6)))"
    runs = tmp_path / "runs"
    assert launched(tmp_path, body, "--run", "runs", SAFELOADER_RUN_ID="one").returncode == 0
    assert launched(tmp_path, body, "--run", "runs", SAFELOADER_RUN_ID="one").returncode == 0
    assert [path.name for path in sorted(runs.glob("attempt=*"))] == ["attempt=0", "attempt=1"]
    assert delivered(runs) == [6, 6]
    other = launched(tmp_path, body, "--run", "runs", SAFELOADER_RUN_ID="two")
    assert other.returncode == 2
    assert "another run may still write into" in other.stderr
    long_ago = time.time() - 3600
    for path in [runs, *runs.rglob("*")]:
        os.utime(path, (long_ago, long_ago))
    assert launched(tmp_path, body, "--run", "runs", SAFELOADER_RUN_ID="two").returncode == 0
    assert json.loads((runs / "run.json").read_text())["id"] == "one"


def test_what_is_written_is_the_owners_alone(tmp_path: Path) -> None:
    launched(tmp_path, "list(DataLoader(Numbers(6)))", "--run", "runs")
    for path in [tmp_path / "runs", *(tmp_path / "runs").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


REFUSED = {
    "nothing": ([], "no program was given"),
    "no such program": (["no-such-program-here"], "there is no program"),
    "isolated": (["python", "-I", "train.py"], "-I keeps Python from reading"),
    "without site": (["python", "-uS", "train.py"], "-uS keeps Python from reading"),
    "folder": (["--run", "/proc/none/here", "train.py"], "cannot be written to"),
    "not a run": (["--run", "other", "train.py"], "was not written by safeloader"),
    "option": (["--verify", "loudly", "train.py"], "invalid choice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_it_cannot_work_it_says_so_and_begins_nothing(name: str, tmp_path: Path) -> None:
    words, why = REFUSED[name]
    program(tmp_path, "print('begun')")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("[]")
    ours = ran(tmp_path, "-m", "safeloader", "run", *words)
    assert ours.returncode == 2
    assert why in ours.stderr
    assert ours.stdout == ""
    assert "Traceback" not in ours.stderr


# ── the hook ─────────────────────────────────────────────────────────────────────────────────────


def test_until_the_first_iter_nothing_of_ours_is_loaded_but_the_hook(tmp_path: Path) -> None:
    body = """
loader = DataLoader(Numbers())
print(sorted(name for name in sys.modules if name.startswith("safeloader")))
print(any("hook" in path for path in sys.path))
"""
    assert launched(tmp_path, body).stdout == "[]\nFalse\n"


def test_threads_that_begin_at_once_are_all_recorded(tmp_path: Path) -> None:
    body = """
import importlib.abc, threading
threads = [threading.Thread(target=lambda: list(DataLoader(Numbers(6)))) for _ in range(2)]
class Second(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "safeloader.beside":
            sys.meta_path.remove(self)
            threads[1].start()
            threads[1].join(0.5)  # it ends only where it does not wait
sys.meta_path.insert(0, Second())
threads[0].start()
threads[0].join()
threads[1].join()
"""
    assert launched(tmp_path, body, "--run", "runs").returncode == 0
    assert delivered(tmp_path / "runs") == [6, 6]


def test_finders_of_the_programs_that_are_of_an_older_kind_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass Old:\n    def find_module(self, name, path=None): return None\n"
        "sys.meta_path.insert(0, Old())\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    ours = launched(tmp_path, "print(len(list(DataLoader(Numbers()))))", PYTHONPATH=path)
    assert ours.stdout == "10\n", ours.stderr
    assert "10 of 10 delivered" in ours.stderr


def test_the_sitecustomize_that_it_hides_is_run(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('the own one')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    ours = launched(tmp_path, "print(len(list(DataLoader(Numbers()))))", PYTHONPATH=path)
    assert ours.stdout == 2 * "the own one\n" + "10\n"  # the launcher's Python has it as well
    assert "10 of 10 delivered" in ours.stderr


def test_a_python_without_safeloader_is_left_alone(tmp_path: Path) -> None:
    hook = ROOT / "safeloader" / "hook"
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text((hook / "sitecustomize.py").read_text())
    stub = tmp_path / "torch" / "utils" / "data"
    stub.mkdir(parents=True)
    for folder in (stub, stub.parent, stub.parent.parent):
        (folder / "__init__.py").write_text("")
    (stub / "dataloader.py").write_text(
        "class DataLoader:\n"
        "    def __iter__(self): return iter('ab')\n"
        "    def _get_iterator(self): return iter('ab')\n"
        "class _BaseDataLoaderIter:\n"
        "    def __init__(self): pass\n"
    )
    code = "from torch.utils.data.dataloader import DataLoader; print(*DataLoader())"
    path = os.pathsep.join([str(tmp_path / "hook"), str(tmp_path)])
    environment = {"PYTHONPATH": path, "SAFELOADER_LAUNCHED": "{}"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import sitecustomize\n" + code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (done.stdout, done.stderr) == ("a b\n", "")
