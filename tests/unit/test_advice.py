"""One table of advice: under every start method the same cure, which cures under each."""

from __future__ import annotations

import random
import sqlite3
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from safeloader import SafeDataLoader, TransportError
from safeloader.examining.wording import findings_of
from safeloader.introspect.advice import FORK_DOES_WITHOUT, HAZARDS, LAZILY, without_threads
from safeloader.introspect.copy_state import CopyState
from safeloader.introspect.fork_hazards import cure_of, survey, warn_once, was_told
from safeloader.introspect.pickling import find_unpicklable
from safeloader.introspect.suspects import Inherited
from safeloader.supervision.self_report import SelfReport, SharedFile
from safeloader.supervision.wrong_data import Seen, findings
from safeloader.worker.hints import KEY_FAULT, hint_for


class Holding(Dataset[Any]):
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return index


def found_in(dataset: object, workers: int = 2) -> list[Inherited]:
    return survey(dataset, "dataset", start_method="fork", num_workers=workers, bound_s=60)


# ── pickling and forking ─────────────────────────────────────────────────────────────────────────


class HLObject:
    """As h5py's: it says itself that it cannot be pickled."""

    def __init__(self) -> None:
        self._id = types.SimpleNamespace(id=3)

    def __getnewargs__(self) -> Any:
        raise TypeError("h5py objects cannot be pickled")


HLObject.__module__ = "h5py._hl.base"

HANDLES: dict[str, Callable[[Path], Any]] = {
    "h5py": lambda path: HLObject(),
    "a file": lambda path: path.open("rb"),
    "a connection": lambda path: sqlite3.connect(":memory:"),
    "a lock": lambda path: held_lock(),
}


def held_lock() -> Any:
    lock = threading.Lock()
    assert lock.acquire()
    return lock


@pytest.mark.parametrize("name", HANDLES)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_handle_has_one_cure_and_no_start_method_to_go_to(name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    handle = HANDLES[name](tmp_path / "x")
    dataset = Holding(handle=handle)
    forked, pickled = found_in(dataset), find_unpicklable(dataset, "dataset")
    assert pickled is not None
    assert LAZILY in forked[0].advice
    assert LAZILY[1:] in pickled.advice
    assert not pickled.forks
    dataset.handle = None  # as it says
    assert found_in(dataset) == []
    assert find_unpicklable(dataset, "dataset") is None
    if hasattr(handle, "close"):
        handle.close()


@pytest.mark.parametrize(
    ("held", "forks"),
    [({"scale": lambda x: x}, True), ({"lock": threading.Lock()}, False)],
    ids=["a lambda", "a lock"],
)
@pytest.mark.slow
def test_forking_is_advised_of_what_bears_it_alone(held: dict[str, Any], forks: bool) -> None:
    loader = SafeDataLoader(Holding(**held), num_workers=1, multiprocessing_context="spawn")
    with pytest.raises(TransportError) as caught:
        list(loader)
    assert (FORK_DOES_WITHOUT in str(caught.value)) is forks
    if forks:
        again = SafeDataLoader(Holding(**held), num_workers=1, multiprocessing_context="fork")
        assert len(list(again)) == 4


# ── an index or a stream ─────────────────────────────────────────────────────────────────────────


class Streaming(IterableDataset[Any]):
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.handle)


def advice_on(dataset: Any, workers: int) -> dict[str, str]:
    """What is said of the handle that a dataset holds, by where it is said."""
    (forked,) = found_in(dataset, workers)
    pickled = find_unpicklable(dataset, "dataset")
    assert pickled is not None
    stream = isinstance(dataset, IterableDataset)
    suspected = forked.next_step(stream=stream)
    return {"at the start": forked.advice, "spawn": pickled.advice, "with an error": suspected}


@pytest.mark.parametrize("name", HANDLES)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_method_that_is_named_is_one_that_the_dataset_has(name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    handle = HANDLES[name](tmp_path / "x")
    for where, said in advice_on(Holding(handle=handle), 2).items():
        assert "__getitem__" in said, where
        assert "__iter__" not in said, where
        assert "its share" not in said, where
    for where, said in advice_on(Streaming(handle=handle), 2).items():
        assert "__iter__" in said, where
        assert "__getitem__" not in said, where
        assert ("give each worker its share by get_worker_info()" in said) is (name != "a lock")
        assert "replay()" not in said, where
    assert "its share" not in advice_on(Streaming(handle=handle), 1)["at the start"]
    if hasattr(handle, "close"):
        handle.close()


def shared_file(stream: bool) -> str:
    files = (SharedFile("/data/frames.bin", "dataset.file", 3, 2),)
    bare = CopyState({}, {}, {})
    reports = {worker: SelfReport(1, 1, 4, bare, bare, files=files) for worker in range(2)}
    seen = Seen(reports, bare, None, stream=stream, persistent=False, workers=2, epochs=1)
    (found,) = findings(seen)
    return found.text


def sent(stream: bool) -> str:
    facts = ("weight", {"bytes": 1 << 30, "heaviest": [["dataset.frames", 1 << 30]]})
    own = {"workers": 2, "method": "spawn", "stream": stream}
    return " ".join(
        each.advice for each in findings_of([facts], own, forked=True, lacks_guard=False)
    )


def a_key_that_fails(stream: bool) -> str:
    return hint_for(KeyError("x"), "sample", 3, KEY_FAULT, Streaming() if stream else Holding())


def collating_that_fails(stream: bool) -> str:
    return hint_for(KeyError("x"), "collate", 3, "", Streaming() if stream else Holding())


def sending_that_fails(stream: bool) -> str:
    return hint_for(KeyError("x"), "transport", 3, "", Streaming() if stream else Holding())


@pytest.mark.parametrize(
    ("said", "by_index"),
    [
        (shared_file, "__getitem__"),
        (sent, "__getitem__"),
        (a_key_that_fails, "dataset["),
        (collating_that_fails, "dataset["),
        (sending_that_fails, "dataset["),
    ],
)
def test_no_stream_is_asked_by_index(said: Callable[[bool], str], by_index: str) -> None:
    assert by_index in said(False)
    assert by_index not in said(True)
    assert said(True)
    if by_index == "__getitem__":
        assert "__iter__" in said(True)
        assert "__iter__" not in said(False)


def test_every_hazard_has_a_cure() -> None:
    assert all(hazard.why and hazard.cure for hazard in HAZARDS.values())
    assert "cv2" in without_threads("OpenCV")
    assert "cv2" not in without_threads("polars")


# ── generators of libraries ──────────────────────────────────────────────────────────────────────


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An installed library, as far as its file tells."""
    module: Any = types.ModuleType("augmenting")
    module.__file__ = "/venv/lib/python3.11/site-packages/augmenting/__init__.py"
    monkeypatch.setitem(sys.modules, "augmenting", module)

    def of_library(cls: Any) -> Any:
        cls.__module__ = "augmenting"
        return cls

    @of_library
    class Flip:
        def __init__(self) -> None:
            self.rng, self.py_random = np.random.default_rng(3), random.Random(3)

        def set_random_seed(self, seed: int) -> None:
            self.rng, self.py_random = np.random.default_rng(seed), random.Random(seed)

    @of_library
    class Compose(Flip):
        def __init__(self) -> None:
            super().__init__()
            self.transforms = [Flip() for _ in range(5)]

        def set_random_seed(self, seed: int) -> None:
            super().set_random_seed(seed)
            for each in self.transforms:
                each.set_random_seed(seed)

    @of_library
    class Stream:
        def __init__(self) -> None:
            self._shuffling = types.SimpleNamespace(generator=np.random.default_rng(3))

    @of_library
    class Public:
        def __init__(self) -> None:
            self.generator = np.random.default_rng(3)

    @of_library
    class Base:
        def __init__(self) -> None:
            self._rng = np.random.default_rng(3)

    @of_library
    class Wrapping(Dataset[Any]):
        """A dataset of the library's, which seeds nothing itself."""

        def __init__(self, transform: Any) -> None:
            self.transform = transform

        def __getitem__(self, index: int) -> float:
            return float(self.transform.rng.random())

    module.Compose, module.Stream, module.Base, module.Public = Compose, Stream, Base, Public
    module.Wrapping = Wrapping
    return module


def test_many_generators_of_one_object_are_one_warning_with_one_cure(library: Any) -> None:
    (found,) = found_in(Holding(transform=library.Compose()))
    assert found.path == "dataset.transform"
    assert found.kind.startswith("augmenting.")
    assert (
        "each of the 2 workers gets a copy in the same state: unless something seeds" in found.why
    )
    line = found.advice.partition("in worker_init_fn, ")[2]
    assert line.count("get_worker_info()") == 2


def test_of_several_around_generators_the_one_is_told_that_seeds_them(library: Any) -> None:
    dataset = library.Wrapping(library.Compose())
    [found] = found_in(dataset)
    assert found.path == "dataset.transform"
    assert "dataset.transform.set_random_seed(" in found.advice
    assert cure_of(dataset, "dataset.transform.transforms") == found.advice
    assert not was_told(dataset, found.path)
    with pytest.warns(RuntimeWarning, match="safeloader: dataset.transform "):
        warn_once([found], dataset)
    assert was_told(dataset, "dataset.transform.transforms[0].rng")
    assert was_told(dataset, "dataset")
    assert not was_told(dataset, "dataset.transformed")


class Drawing(Holding):
    def __getitem__(self, index: int) -> float:
        draws = [each.rng.random() for each in [self.transform, *self.transform.transforms]]
        return float(sum(draws))


def test_the_cure_of_it_cures(library: Any) -> None:
    dataset = Drawing(transform=library.Compose())
    (found,) = found_in(dataset)
    line = found.advice.partition("in worker_init_fn, ")[2]
    names: dict[str, Any] = {"get_worker_info": get_worker_info}
    exec(f"def initialise(worker_id): {line}", names)
    for initialise, distinct in ((None, 2), (names["initialise"], 4)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            loader = SafeDataLoader(
                dataset,
                batch_size=None,
                num_workers=2,
                worker_init_fn=initialise,
                multiprocessing_context="fork",
            )
            assert len(set(loader)) == distinct


def test_private_state_of_a_library_is_its_own_business(library: Any) -> None:
    assert found_in(library.Stream()) == []
    assert found_in(Holding(stream=library.Stream())) == []
    (public,) = found_in(Holding(stream=library.Public()))
    assert public.path == "dataset.stream.generator"


def test_private_state_of_the_users_own_class_is_told(library: Any) -> None:
    class Own(Holding):
        pass

    class Child(library.Base):  # type: ignore[misc]
        pass

    class Uses(library.Base):  # type: ignore[misc]
        def __getitem__(self, index: int) -> float:
            return float(self._rng.random())

    assert [each.path for each in found_in(Own(_rng=random.Random(3)))] == ["dataset._rng"]
    assert found_in(Child()) == []
    assert [each.path for each in found_in(Uses())] == ["dataset._rng"]


def test_other_private_things_of_a_library_are_told_all_the_same(library: Any) -> None:
    stream = library.Stream()
    with sqlite3.connect(":memory:") as connection:
        stream._shuffling.database = connection
        (found,) = found_in(stream)
        assert found.path == "dataset._shuffling.database"
    connection.close()
