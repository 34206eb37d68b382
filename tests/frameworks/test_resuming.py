"""Trainings in the real frameworks that are interrupted in mid-epoch, twice, and go on.

What they trained on, and where their weights end, is compared with a run that was not interrupted.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
PATIENCE_S = 240
STOPS = 4, 9, 0  # of 14 steps; 0 runs to the end

pytestmark = [pytest.mark.frameworks, pytest.mark.slow, pytest.mark.timeout(4 * PATIENCE_S)]


@pytest.fixture(autouse=True)
def there(library: str, request: pytest.FixtureRequest) -> None:
    if importlib.util.find_spec(library) is None:
        if request.config.getoption("--need-frameworks"):
            pytest.fail(f"{library} is not installed")
        pytest.skip(f"{library} is not installed")


def said(
    library: str, folder: Path, stop: int, workers: int, *words: str, ranks: int = 1
) -> list[str]:
    """What a run says of its steps, and of its weights at the end."""
    folder.mkdir(exist_ok=True)
    program = [str(PROGRAMS / f"resuming_{library}.py"), str(folder), str(stop), str(workers)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), *program, *words]
    env = {k: v for k, v in os.environ.items() if k != "SAFELOADER"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(PROGRAMS)])
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert "ResumeError" not in done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith(("step", "weights"))]


@pytest.mark.parametrize("library", ["accelerate", "lightning", "transformers"])
def test_the_samples_and_the_weights_are_those_of_an_uninterrupted_run(
    library: str, tmp_path: Path
) -> None:
    whole = said(library, tmp_path / "whole", 0, 0)
    assert len(whole) == 15
    parts = [
        said(library, tmp_path / "parts", stop, workers)
        for stop, workers in zip(STOPS, (2, 0, 1), strict=True)
    ]
    assert [len(each) for each in parts] == [4, 5, 6]
    assert [*chain(*parts)] == whole


@pytest.mark.parametrize("library", ["accelerate"])
def test_accelerate_goes_on_with_another_number_of_processes(library: str, tmp_path: Path) -> None:
    whole = said(library, tmp_path / "whole", 0, 0)
    parts = [
        said(library, tmp_path / "parts", stop, 1, ranks=ranks)
        for stop, ranks in zip(STOPS, (2, 1, 2), strict=True)
    ]
    steps = [line for line in chain(*parts) if line.startswith("step")]
    assert steps == whole[:-1]  # the weights are summed in another order


@pytest.mark.parametrize("library", ["transformers"])
def test_the_trainer_alone_skips_to_the_same_samples_and_other_random_numbers(
    library: str, tmp_path: Path
) -> None:
    """As the guide says of it."""
    whole = said(library, tmp_path / "whole", 0, 2, "skips")
    parts = [said(library, tmp_path / "parts", stop, 2, "skips") for stop in STOPS]
    together = [*chain(*parts)]

    def indices(lines: list[str]) -> list[str]:
        return [line.partition("]")[0] for line in lines if line.startswith("step")]

    assert indices(together) == indices(whole)
    assert together != whole
