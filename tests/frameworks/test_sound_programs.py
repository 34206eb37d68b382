"""Sound programs, of which not a word is said, and which get the stock loader's batches."""

from __future__ import annotations

import functools
import gc
import importlib.util
import logging
import random
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from safeloader import SafeDataLoader
from safeloader.introspect.values import fields
from safeloader.supervision import growth
from tests.frameworks.sound_datasets import (
    SOUND,
    Cached,
    Case,
    Counted,
    Images,
    _augmented,
    seed_worker,
)
from tests.frameworks.sound_libraries import WITH_LIBRARIES

EPOCHS = 3
OUR_OWN = ("before_epoch", "after_batch", "at_end", "steps", "compared")


class Told(logging.Handler):
    """What the log was told, from warnings on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def told() -> Iterator[Told]:
    handler = Told()
    log = logging.getLogger("safeloader")
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)


@functools.cache
def missing(needs: tuple[str, ...]) -> str:
    return ", ".join(each for each in needs if importlib.util.find_spec(each) is None)


def seed() -> None:
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)


def plain(value: Any) -> Any:
    """A batch as what can be compared by ``==``."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.tolist())
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tolist())
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, str | bytes | int | float | bool | type(None)):
        return value
    return {str(name): plain(each) for name, each in fields(value)} or repr(value)


def batches(
    loader_class: Any, case: Case, folder: Path, mode: str, method: str
) -> tuple[list[Any], bool]:
    """What a program gets in its epochs, and whether that is the same each time it is run."""
    folder.mkdir()
    seed()
    made = case.make(folder)
    own = {name: made.pop(name, None) for name in OUR_OWN}
    how: dict[str, Any] = {"num_workers": 0}
    if mode != "main":
        how = {
            "num_workers": 2,
            "persistent_workers": mode == "persistent",
            "multiprocessing_context": method,
        }
    loader = loader_class(**how | made)
    got = []
    for epoch in range(EPOCHS):
        if own["before_epoch"]:
            own["before_epoch"](epoch)
        for batch in islice(loader, own["steps"]):
            got.append(plain(batch))
            if own["after_batch"]:
                own["after_batch"](batch)
    if own["at_end"]:
        own["at_end"]()
    del loader
    gc.collect()
    return got, own["compared"] is not False


def texts(noticed: list[warnings.WarningMessage]) -> set[str]:
    """The warnings' texts, but Python's own: of files that it closes, of a fork beside a thread."""
    pythons = (ResourceWarning, DeprecationWarning)
    return {str(each.message) for each in noticed if each.category not in pythons}


def runs() -> Iterator[Any]:
    for name, case in {**SOUND, **WITH_LIBRARIES}.items():
        marks = [pytest.mark.frameworks, pytest.mark.slow] if case.needs else []
        for mode in case.modes:
            for method in ("main",) if mode == "main" else ("fork", "spawn"):
                if (method == "spawn" and not case.spawn) or (method == "fork" and not case.fork):
                    continue
                if method == "spawn" and mode == "fresh" and "persistent" in case.modes:
                    continue
                slow = [pytest.mark.slow, pytest.mark.thorough]
                slow = slow if method == "spawn" and not marks else []
                ident = "-".join(dict.fromkeys((name, mode, method)))
                yield pytest.param(case, mode, method, id=ident, marks=[*marks, *slow])


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("case", "mode", "method"), list(runs()))
def test_nothing_is_said_of_a_sound_program(
    case: Case,
    mode: str,
    method: str,
    tmp_path: Path,
    told: Told,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if absent := missing(case.needs):
        if request.config.getoption("--need-frameworks"):
            pytest.fail(f"{absent} is not installed")
        pytest.skip(f"{absent} is not installed")
    monkeypatch.setattr(growth, "SLOW_START_S", 600.0)  # how long workers take is the machine's
    with warnings.catch_warnings(record=True) as by_stock:
        warnings.simplefilter("always")
        wanted, compared = batches(DataLoader, case, tmp_path / "stock", mode, method)
    with warnings.catch_warnings(record=True) as by_us:
        warnings.simplefilter("always")
        got, _ = batches(SafeDataLoader, case, tmp_path / "safe", mode, method)
    assert told.lines == []
    assert texts(by_us) - texts(by_stock) == set()
    assert "safeloader" not in capfd.readouterr().err.lower()
    assert len(got) == len(wanted) > 0
    if compared:
        assert got == wanted


ONE_DATASET = {"augmented": _augmented, "counted": Counted, "cached": Cached}
WORKERS = {
    "fresh": {"num_workers": 2},
    "persistent": {"num_workers": 2, "persistent_workers": True},
    "main": {"num_workers": 0},
}


def two_loaders(
    loader_class: Any, datasets: tuple[Images, Images], train: str, validation: str
) -> list[Any]:
    """The batches of a training with a validation after each epoch; both are seeded."""
    seed()
    loaders = [
        loader_class(
            dataset,
            batch_size=4,
            shuffle=shuffle,
            worker_init_fn=seed_worker,
            generator=torch.Generator().manual_seed(0),
            **WORKERS[way],
        )
        for dataset, shuffle, way in zip(datasets, (True, False), (train, validation), strict=True)
    ]
    got = [plain(batch) for _ in range(EPOCHS) for each in loaders for batch in each]
    del loaders
    gc.collect()
    return got


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("made", [*ONE_DATASET, "two parts of one"])
@pytest.mark.parametrize(
    ("train", "validation"),
    [("persistent", "persistent"), ("persistent", "main"), ("main", "main"), ("fresh", "fresh")],
)
def test_nothing_is_said_of_a_validation_beside_a_training(
    made: str, train: str, validation: str, told: Told
) -> None:
    if made == "cached" and train == "fresh":
        pytest.skip("a cache that is lost is told")

    def datasets() -> tuple[Any, Any]:
        seed()
        one = ONE_DATASET.get(made, _augmented)()
        if made in ONE_DATASET:
            return one, one
        return Subset(one, range(0, 24, 2)), Subset(one, range(1, 24, 2))

    with warnings.catch_warnings(record=True) as noticed:
        warnings.simplefilter("always")
        got = two_loaders(SafeDataLoader, datasets(), train, validation)
    assert told.lines == []
    assert texts(noticed) == set()
    if made != "counted":  # its samples are counts of all fetches of a copy
        assert got == two_loaders(DataLoader, datasets(), train, validation)
