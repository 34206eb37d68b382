"""A torch that safeloader does not know: off is off, else one warning and torch's own loader."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from safeloader import SafeDataLoader, _torch
from tests.unknown_torch import ORDERS

ROOT = Path(__file__).parents[2]
LOADING = "torch.utils.data.dataloader"
UTILS = "torch.utils.data._utils"
# Names that torch's loader can do without for what is run here.
TAKEN: list[tuple[str, str]] = [
    ("torch._C", "DisableTorchFunction"),
    ("torch.autograd", "_profiler_enabled"),
    (f"{UTILS}.pin_memory", "pin_memory"),
]
RENAMED = [
    *("_DatasetKind", "create_fetcher", "_get_iterator", "_index_sampler", "_auto_collation"),
    *("_next_data", "_reset", "_shutdown_workers", "_try_get_data", "_try_put_index"),
    *("_iterator", "_dataset_fetcher", "_num_yielded", "_sampler_iter", "_data_queue"),
    *("_index_queues", "_pin_memory_thread", "_shutdown", "_task_info", "_worker_pids_set"),
    *("_workers", "_workers_status", "_worker_loop", "_worker_result_queue"),
    *("_MultiProcessingDataLoaderIter", "_IterableDatasetFetcher", "dataset_iter"),
]
# Those of the iterator with workers are tried with workers, too; it takes a while.
WITH_WORKERS = ["_task_info", "_workers_status", "_data_queue", "_worker_loop", "_try_get_data"]
CASES = [
    *(("takes away", module, path) for module, path in TAKEN),
    *(("renames", "", name) for name in RENAMED),
    *(("reorders", "", order) for order in ORDERS),
]


@functools.cache
def told(workers: int) -> dict[tuple[str, str, str], dict[str, Any]]:
    chosen = [case for case in CASES if not workers or case[2] in [*WITH_WORKERS, *ORDERS]]
    cases = json.dumps([[*case, workers] for case in chosen])
    done = subprocess.run(
        [sys.executable, "-m", "tests.unknown_torch"],
        input=cases,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answers = map(json.loads, done.stdout.splitlines())
    return dict(zip(chosen, answers, strict=True))


def checked(said: dict[str, Any], kind: str, name: str) -> None:
    assert "fault" not in said, said["fault"]
    stock = said["stock"]
    assert isinstance(stock[0], list), stock
    off, asked, default, again = (said[way] for way in ("off", "asked", "default", "again"))
    assert off["got"] == default["got"] == again["got"] == stock
    for way in (off, default, again):
        assert way["records"][:2] == ["None", "None"]
    assert (off["warnings"], off["looked"]) == ([], 0)
    assert asked["got"].startswith("SafeLoaderError: verify='raise' was asked for")
    assert asked["warnings"] == again["warnings"] == []
    (warning,) = default["warnings"]
    assert default["here"] == [True]
    assert torch.__version__ in warning
    for text in (warning, asked["got"]):
        named = {"takes away": name.split(".")[-1], "renames": name}.get(kind, "torch.utils.data")
        assert named in text
        assert str(torch.__version__) in text
    assert said["log"] == ""


@pytest.mark.uncovered
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_torch_in_which_a_name_has_moved(case: tuple[str, str, str]) -> None:
    checked(told(0)[case], case[0], case[2])


@pytest.mark.slow
def test_a_torch_in_which_a_name_has_moved_with_workers() -> None:
    assert len(told(1)) == len(WITH_WORKERS) + len(ORDERS)
    for case, said in told(1).items():
        checked(said, case[0], case[2])


def test_this_torch_is_known() -> None:
    assert _torch.moved() == ()


def test_a_function_that_somebody_put_around_torchs_own_is_no_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = _MultiProcessingDataLoaderIter.__init__

    def around(self: Any, loader: Any) -> None:
        own(self, loader)

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "__init__", around)
    assert _torch.moved.__wrapped__() == ()


def asks_first(self: Any, loader: Any) -> None:
    self.spare = loader.multiprocessing_context.Queue()


def test_one_that_asks_for_a_queue_first_is_a_move(monkeypatch: pytest.MonkeyPatch) -> None:
    own = _MultiProcessingDataLoaderIter.__init__

    @functools.wraps(own)
    def around(self: Any, loader: Any) -> None:
        self.spare = loader.multiprocessing_context.Queue()
        own(self, loader)

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "__init__", around)
    (what,) = _torch.moved.__wrapped__()
    assert "_MultiProcessingDataLoaderIter.__init__ (first Queue" in what


# ── what counts as asked for ─────────────────────────────────────────────────────────────────────


class Handing(SafeDataLoader[Any]):
    """A subclass of the user's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def recreated(loader: SafeDataLoader[Any]) -> SafeDataLoader[Any]:
    return type(loader)(loader.dataset, verify=vars(loader)["verify"])


@pytest.mark.parametrize("cls", [SafeDataLoader, Handing])
@pytest.mark.parametrize("way", [recreated, copy.copy, copy.deepcopy, "pickle", "signature"])
@pytest.mark.parametrize("asked", [False, True])
def test_the_default_stays_the_default(
    cls: Any, way: Any, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = cls([1, 2, 3], **({"verify": "raise"} if asked else {}))
    if way == "pickle":
        loader = pickle.loads(pickle.dumps(loader))
    elif way == "signature":
        if asked:
            return  # a signature knows the default alone
        import inspect

        default = inspect.signature(cls.__init__).parameters["verify"].default
        loader = cls([1, 2, 3], verify=default)
    else:
        loader = way(loader)
    assert (loader.verify, repr(loader.verify), str(loader.verify)) == ("raise", "'raise'", "raise")
    monkeypatch.setattr("safeloader.loader.why_unrecorded", lambda workers: f"for {way} {cls}")
    if asked:
        with pytest.raises(Exception, match="verify='raise' was asked for"):
            iter(loader)
    else:
        with pytest.warns(UserWarning, match="torch's own loader serves"):
            assert type(iter(loader)).__module__ == LOADING


def test_a_loader_that_never_ran_our_init_asked_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loader = SafeDataLoader.__new__(SafeDataLoader)
    torch.utils.data.DataLoader.__init__(loader, [1, 2])
    monkeypatch.setattr("safeloader.loader.why_unrecorded", lambda workers: "for a bare loader")
    with pytest.warns(UserWarning, match="for a bare loader"):
        assert [batch.tolist() for batch in loader] == [[1], [2]]


class Lazy(SafeDataLoader[Any]):
    """Answers for itself what its dict has too."""

    @property
    def collate_fn(self) -> Any:
        return lambda samples: ["mine", *samples]

    @collate_fn.setter
    def collate_fn(self, given: Any) -> None:
        vars(self)["collate_fn"] = given


class Interposed(SafeDataLoader[Any]):
    def __getattribute__(self, name: str) -> Any:
        if name == "collate_fn":
            return lambda samples: ["mine", *samples]
        return super().__getattribute__(name)


@pytest.mark.parametrize("cls", [Lazy, Interposed])
def test_a_class_that_answers_for_itself_is_asked(cls: Any) -> None:
    loader = cls([1, 2, 3, 4], batch_size=2)
    for _ in range(2):
        assert list(loader) == [["mine", 1, 2], ["mine", 3, 4]]


def test_a_view_has_what_its_loader_has() -> None:
    loader = SafeDataLoader([1, 2], batch_size=2)
    view = _torch.LoaderView(loader, sampler := object(), None, None)
    names = [name for name in vars(loader) if name not in ("worker_init_fn",)]
    assert all(getattr(view, name) is getattr(loader, name) for name in names)
    assert view._index_sampler is sampler
    assert view._auto_collation is True  # a property
