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
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safeloader import SafeStatefulDataLoader

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
PATIENCE_S = 240
STOPS = 4, 9, 0  # of 14 steps; 0 runs to the end

pytestmark = [pytest.mark.frameworks, pytest.mark.slow]


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


def prepared(loader: SafeStatefulDataLoader[Any]) -> tuple[Any, Any]:
    """The accelerator of one process, and the loader as it is prepared for it."""
    from accelerate import Accelerator

    from safeloader.integrations.accelerate import prepare

    accelerator = Accelerator(cpu=True)
    return accelerator, prepare(accelerator, loader)


@pytest.mark.parametrize("library", ["accelerate"])
def test_what_was_loaded_or_set_before_goes_with_what_accelerate_is_given(library: str) -> None:
    def loader() -> SafeStatefulDataLoader[Any]:
        return SafeStatefulDataLoader(torch.arange(12), batch_size=4, shuffle=True)

    batches = iter(one := loader())
    next(batches)
    other = loader()
    other.load_state_dict(one.state_dict())
    _, made = prepared(other)
    assert [each.tolist() for each in made] == [each.tolist() for each in batches]
    (other := loader()).set_epoch(3)
    assert prepared(other)[1].state_dict()["epoch"] == 3


@pytest.mark.parametrize("library", ["accelerate"])
def test_what_is_prepared_is_left_as_it_is(library: str) -> None:
    from safeloader.integrations.accelerate import prepare

    accelerator, made = prepared(SafeStatefulDataLoader(torch.arange(12), batch_size=4, seed=1))
    assert accelerator.prepare(made) is made
    assert prepare(accelerator, made) is made


class FailsInTheMiddle:
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        if 4 <= index < 8:
            raise ValueError(index)
        return index


@pytest.mark.parametrize("library", ["accelerate"])
@pytest.mark.parametrize(
    ("dataset", "keywords", "samples", "ends"),
    [
        (torch.arange(42), {"sampler": [0] * 43}, 43, True),  # not the length of the dataset
        (torch.arange(42), {"sampler": iter(range(10))}, 10, False),  # of no length
        (FailsInTheMiddle(), {"on_error": "skip"}, 8, True),  # a batch that is left out whole
    ],
    ids=["longer", "no length", "left out"],
)
def test_the_last_batch_is_told_and_comes_whole(
    library: str, dataset: Any, keywords: dict[str, Any], samples: int, ends: bool
) -> None:
    accelerator, made = prepared(SafeStatefulDataLoader(dataset, batch_size=4, **keywords))
    gathered, end = 0, False
    for batch in made:
        end = accelerator.gradient_state.end_of_dataloader
        gathered += len(accelerator.gather_for_metrics(batch))
    assert (gathered, end) == (samples, ends)


class KeepsItsPlace(FailsInTheMiddle):
    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


@pytest.mark.parametrize("library", ["accelerate"])
def test_on_several_processes_it_is_told_what_is_lacking(
    library: str, caplog: pytest.LogCaptureFixture
) -> None:
    from safeloader.integrations.accelerate import prepare

    two: Any = SimpleNamespace(num_processes=2, process_index=0, split_batches=False)
    two.even_batches, two.register_for_checkpointing = True, lambda loader: None
    for keywords, lacks in (
        ({}, "give it seed=, or"),
        ({"seed": 1, "batch_size": None}, "give it a batch_size, or"),
        ({"seed": 1, "sampler": [1, 2]}, "give it no sampler of its own"),
    ):
        with pytest.raises(ValueError, match=lacks):
            prepare(two, SafeStatefulDataLoader(torch.arange(12), **keywords))  # type: ignore[arg-type]
    prepare(two, SafeStatefulDataLoader(torch.arange(12), seed=1))
    assert not caplog.records
    prepare(two, SafeStatefulDataLoader(KeepsItsPlace(), seed=1))  # type: ignore[arg-type]
    assert "saves that of the main process alone" in caplog.text


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
