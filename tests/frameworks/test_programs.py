"""Programs with the real frameworks: recorded, and none of them notices.

Each file of ``programs/`` is a script as a user of that framework writes it. It is run as it is,
under ``python -m safeloader run``, with the class swapped, and with what the framework made of the
loader instrumented. A comment behind a line says what the launcher is to say of that line::

    for batch in loader:  # records DataLoader
    for batch in loader:  # NOT recorded: StatefulDataLoader
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
# timm wants torchvision, and whatever sees that tries to import it. `make test-frameworks` puts the
# two into a folder of their own, which only timm's program has on its path.
ASIDE = Path(sysconfig.get_path("purelib")) / "aside"
PATIENCE_S = 240

pytestmark = [pytest.mark.frameworks, pytest.mark.slow]


class Case(NamedTuple):
    """A program and how it is started.

    Attributes:
        needs: the modules that it imports.
        words: what stands behind ``python``; its first ``*.py`` is of ``programs/``.
        ways: what its user may do to a loader besides, so that it is recorded whole.
        workers: the numbers of workers that it is run with.
        has_line: whether a line of the program iterates the loader, and not the library's alone;
            the launcher names the program's file then.
        has_report: whether what its processes say at their end is seen; Ray kills its workers.
    """

    needs: tuple[str, ...]
    words: str
    ways: tuple[str, ...] = ()
    workers: tuple[int, ...] = (0, 2)
    has_line: bool = True
    has_report: bool = True


BOTH = ("swap", "instrument")
CASES = {
    "lightning": Case(("lightning", "torchmetrics"), "lightning_fit.py", BOTH),
    "lightning-fabric": Case(("lightning",), "lightning_fabric.py", BOTH),
    "lightning-ddp": Case(("lightning",), "lightning_ddp.py ddp", ("swap",), (0, 1)),
    "lightning-ddp-spawn": Case(
        ("lightning",), "lightning_ddp.py ddp_spawn", ("swap",), (0,), has_line=False
    ),
    # Accelerate makes the loader again as torch's class, in a wrapper: a swapped one is not kept.
    "accelerate": Case(("accelerate",), "accelerate_prepare.py", ("instrument",)),
    "accelerate-launch": Case(
        ("accelerate",),
        "-m accelerate.commands.launch --cpu --num_processes 2 accelerate_prepare.py",
        ("instrument",),
        (0, 1),
    ),
    "transformers": Case(("transformers",), "transformers_trainer.py default", ("instrument",)),
    "transformers-own": Case(("transformers",), "transformers_trainer.py own", BOTH),
    # To go on in mid-epoch, the Trainer has Accelerate make the loader once more: only the launcher
    # sees that one.
    "transformers-resumed": Case(("transformers",), "transformers_trainer.py default resumed"),
    "transformers-own-resumed": Case(("transformers",), "transformers_trainer.py own resumed"),
    "ignite": Case(("ignite",), "ignite_engine.py", BOTH),
    "pyg": Case(("torch_geometric",), "pyg_loaders.py", ("instrument",)),
    "timm": Case(("timm",), "timm_loader.py", ("instrument",)),
    "opacus": Case(("opacus",), "opacus_private.py", ("instrument",)),
    "monai": Case(("monai",), "monai_loaders.py", ("instrument",)),
    "torchio": Case(("torchio",), "torchio_loader.py", ("instrument",)),
    # Ray makes the loader again as torch's class.
    "ray": Case(("ray",), "ray_workers.py", ("instrument",), (0, 1), has_report=False),
    "torchrun": Case(
        (),
        "-m torch.distributed.run --standalone --nproc-per-node 2 torchrun_ddp.py",
        ("swap",),
        (0, 1),
    ),
    "torchdata": Case(("torchdata",), "torchdata_stateful.py"),
}


def each_that(way: str) -> pytest.MarkDecorator:
    """Parameters: the cases to which that may be done, with each number of workers."""
    pairs = [
        pytest.param(name, workers, id=f"{name}-{workers}")
        for name, case in CASES.items()
        for workers in case.workers
        if way in ("stock", *case.ways)
    ]
    return pytest.mark.parametrize(("name", "workers"), pairs)


@pytest.fixture
def case(name: str, request: pytest.FixtureRequest) -> Case:
    case = CASES[name]
    missing = [each for each in case.needs if not found(each)]
    if missing:
        told = f"not installed: {', '.join(missing)}"
        if request.config.getoption("--need-frameworks"):
            pytest.fail(told)
        pytest.skip(told)
    return case


def found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None or (ASIDE / module).is_dir()


def ran(
    case: Case, folder: Path, way: str, workers: int, *launcher: str
) -> subprocess.CompletedProcess[str]:
    words = [str(PROGRAMS / word) if word.endswith(".py") else word for word in case.words.split()]
    clean = {name: value for name, value in os.environ.items() if "SAFELOADER" not in name}
    path = [str(ROOT), clean.get("PYTHONPATH", ""), str(ASIDE) if "timm" in case.needs else ""]
    return subprocess.run(
        [sys.executable, *launcher, *words],
        cwd=folder,
        env=clean
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "PROGRAM_WAY": way,
            "PROGRAM_WORKERS": str(workers),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # sums of floats are those of one thread, each time
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


@functools.cache
def stock(case: Case, workers: int) -> str:
    """What the program says without us."""
    with tempfile.TemporaryDirectory() as folder:
        done = ran(case, Path(folder), "stock", workers)
    assert done.returncode == 0, done.stderr
    return done.stdout


def counted(case: Case, workers: int) -> int:
    numbers = [int(each) for each in re.findall(r"^counted (\d+)$", stock(case, workers), re.M)]
    assert numbers
    assert sum(numbers) > 0
    return sum(numbers)


# ── what the launcher says ───────────────────────────────────────────────────────────────────────


def announced(case: Case) -> set[str]:
    """The lines of the program that a comment marks, as the launcher is to name them."""
    (program,) = (PROGRAMS / word for word in case.words.split() if word.endswith(".py"))
    functions = {"default", "own"} & set(case.words.split())  # of the Trainer's program
    lines, within = set(), ""
    for number, line in enumerate(program.read_text().splitlines(), 1):
        if begins := re.match(r"(?:def|class) (\w+)", line):
            within = begins[1]
        marked = re.search(r"# (records|NOT recorded:) (\w+)$", line)
        optional = "again.train" in line and "resumed" not in case.words
        if marked and not optional and (not functions or within in functions):
            line = f":{number}" if case.has_line else ""
            lines.add(f"{marked[1]} {marked[2]} at {program}{line}")
    return lines


RECORDED = re.compile(
    r"  (\w+) over .+ at (\S+): \d+ epochs?, (\d+) of (\d+) delivered"
    r"(?:; (\d+) dropped)?(?:[;,] (\d+) drawn ahead and not handed over)?"
)


def told(stderr: str) -> set[str]:
    """The loaders of the reports of all processes, as ``announced`` has them; else the line."""
    lines = set()
    for line in stderr.splitlines():
        if recorded := RECORDED.fullmatch(line):
            lines.add(f"records {recorded[1]} at {recorded[2]}")
            delivered, drawn, dropped, ahead = (int(each or 0) for each in recorded.groups()[2:])
            assert delivered + dropped + ahead == drawn, line
        elif left_out := re.match(r"  NOT recorded: (\w+) at (\S+?:\d+)", line):
            lines.add(f"NOT recorded: {left_out[1]} at {left_out[2]}")
        elif " delivered" in line or "NOT recorded" in line:
            lines.add(line)
    return lines


def written(run: Path) -> list[dict[str, Any]]:
    """The epochs of all processes that came to an end; each that began did."""
    lines = [
        json.loads(line)
        for path in sorted(run.glob("attempt=*/rank=*/*/epochs.jsonl"))
        for line in path.read_text().splitlines()
    ]
    ended = [line for line in lines if line["audit"]]
    assert 2 * len(ended) == len(lines)
    return ended


@each_that("stock")
def test_launched_it_does_the_same_and_every_sample_is_recorded(
    name: str, workers: int, case: Case, tmp_path: Path
) -> None:
    launcher = ["-m", "safeloader", "run", "--run", str(tmp_path / "run")]
    ours = ran(case, tmp_path, "stock", workers, *launcher)
    assert (ours.returncode, ours.stdout) == (0, stock(case, workers)), ours.stderr
    epochs = written(tmp_path / "run")
    assert sum(each["audit"]["delivered"] for each in epochs) == counted(case, workers)
    assert {each["audit"]["ok"] for each in epochs} == {True}
    recorded = {line for line in announced(case) if line.startswith("records ")}
    without_dataset = {re.sub(r" over .+ at ", " at ", each["loader"]) for each in epochs}
    assert {f"records {each}" for each in without_dataset} == recorded
    if case.has_report:
        assert told(ours.stderr) == announced(case)


# ── what the user may do instead ─────────────────────────────────────────────────────────────────


def recorded_of(stderr: str) -> int:
    return sum(int(each) for each in re.findall(r"^recorded (\d+)$", stderr, re.M))


@each_that("swap")
def test_with_the_class_swapped(name: str, workers: int, case: Case, tmp_path: Path) -> None:
    ours = ran(case, tmp_path, "swap", workers)
    assert (ours.returncode, ours.stdout) == (0, stock(case, workers)), ours.stderr
    assert recorded_of(ours.stderr) == counted(case, workers)


@each_that("instrument")
def test_instrumented(name: str, workers: int, case: Case, tmp_path: Path) -> None:
    ours = ran(case, tmp_path, "instrument", workers)
    assert (ours.returncode, ours.stdout) == (0, stock(case, workers)), ours.stderr
    assert recorded_of(ours.stderr) == counted(case, workers)
