"""What holds for every test."""

from __future__ import annotations

import gc
import inspect
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests import family

HERE = Path(__file__).parent
OF_WORKERS = ("catalogue", "frameworks", "parity", "processes")  # folders
UNCOVERED = ("catalogue", "frameworks", "parity")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-process",
        action="store_true",
        help="leave out what is marked `workers`; other tests that start a process are skipped",
    )
    parser.addoption(
        "--examples",
        type=int,
        default=1,
        metavar="N",
        help="hypothesis tries N times as many examples of each property",
    )
    parser.addoption(
        "--need-frameworks",
        action="store_true",
        help="what is marked `frameworks` fails, and is not skipped, where its library is missing",
    )


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # How long an example takes says how busy the machine is.
    settings.register_profile("whatever the load", deadline=None)
    settings.load_profile("whatever the load")
    family.watch()
    if config.getoption("--one-process"):
        family.start_none()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    times = config.getoption("--examples")
    for item in items:
        if isinstance(item, pytest.Function) and times > 1:
            _try_more(item, times)
        folder = item.path.relative_to(HERE).parts[0]
        if folder in OF_WORKERS:
            item.add_marker("workers")
        if folder in UNCOVERED:
            item.add_marker("uncovered")
    if config.getoption("--one-process"):
        config.hook.pytest_deselected(items=[each for each in items if _with_workers(each)])
        items[:] = [each for each in items if not _with_workers(each)]


def _try_more(item: pytest.Function, times: int) -> None:
    """Also of what names a number itself, which a profile of hypothesis leaves alone."""
    if item.cls is not None and hasattr(item.cls, "settings"):  # of a state machine
        owner, name = item.cls, "settings"
    else:
        owner, name = item.function, "_hypothesis_internal_use_settings"
    given = getattr(owner, name, None)
    if given is not None:
        setattr(owner, name, settings(given, max_examples=given.max_examples * times))


def _with_workers(item: pytest.Item) -> bool:
    return item.get_closest_marker("workers") is not None


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """Free what a test leaves in cycles before the next one forks.

    The stock loader's errors keep its iterator alive in a cycle; workers forked while it is there
    inherit it and hang while they free it.
    """
    yield
    gc.collect()


@pytest.fixture(autouse=True, scope="module")
def what_stays_is_no_garbage() -> None:
    """Spare each of those collections the walk through everything imported and reported so far.

    Not after each test: what a test leaves in a cycle may be found only with the next one.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def of_new_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs begin as in a process that has written none, and so do those of the next test."""
    from tests.run_folders import new_process

    new_process(monkeypatch)
    yield
    new_process(monkeypatch)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch believe in one, so that its pinning thread runs."""
    if "torch.accelerator.is_available" not in inspect.getsource(torch.utils.data.dataloader):
        pytest.skip("this torch pins memory for CUDA alone, and asks CUDA itself")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
