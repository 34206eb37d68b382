"""Wrong data behind right indices is noticed unasked, and of sound data nothing is said."""

from __future__ import annotations

import functools
import logging
import os
import random
import re
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, Sampler, Subset, TensorDataset, get_worker_info

from safeloader import DeliveryError, SafeDataLoader, SafeLoaderError, SafeStatefulDataLoader
from safeloader.introspect import fork_hazards
from safeloader.main import looks, reporting_workers
from safeloader.supervision import growth, kept_batches
from safeloader.worker.observing import Observer

N = 24
FRESH: dict[str, dict[str, Any]] = {
    way: {"num_workers": 2, "multiprocessing_context": way}
    for way in ("fork", "spawn", "forkserver")
}
LASTING = {f"{way}, persistent": more | {"persistent_workers": True} for way, more in FRESH.items()}
MAIN: dict[str, dict[str, Any]] = {"main": {}}
ALL = MAIN | FRESH | LASTING


def ways(among: dict[str, dict[str, Any]]) -> Any:
    """Each of these ways; what fork shows is run by the other start methods in ``.ci/full``."""
    thorough = [way for way in among if "spawn" in way or "forkserver" in way]
    marks = {way: [pytest.mark.thorough] if way in thorough else [] for way in among}
    return pytest.mark.parametrize("way", [pytest.param(way, marks=marks[way]) for way in among])


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers answer at once unless the machine is busy: then they are waited for."""
    monkeypatch.setattr(reporting_workers, "ANSWER_S", 30.0)
    monkeypatch.setattr(growth, "SLOW_START_S", 600.0)  # how long they take is the machine's


def said(
    caplog: pytest.LogCaptureFixture, loader: Any, epochs: int = 3, keep: list[Any] | None = None
) -> list[str]:
    """What the log says of some epochs of a loader."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "safeloader"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(epochs):
            for batch in loader:
                if keep is not None:
                    keep.append(batch)
    return [record.getMessage().partition(": ")[2] for record in caplog.records]


def loader_of(dataset: Any, way: str, **more: Any) -> SafeDataLoader[Any]:
    return SafeDataLoader(dataset, **({"batch_size": 4} | ALL[way] | more))


class Indexed:
    def __len__(self) -> int:
        return N


# ── copies that drift apart ──────────────────────────────────────────────────────────────────────


class Reshuffles(Indexed):
    """Shuffles its order in each worker, or with a shared seed in the same way in each."""

    def __init__(self, seed: int | None = None, words: bool = False) -> None:
        self.order: Any = [f"{k}.jpg" for k in range(N)] if words else list(range(N))
        self.seed = seed
        self.shuffled = False

    def __getitem__(self, index: int) -> Any:
        if not self.shuffled:
            self.shuffled = True
            random.Random(self.seed or torch.initial_seed()).shuffle(self.order)
        return self.order[index]


class DrawsAtFirstUse(Indexed):
    """Each worker draws a list of its own."""

    def __init__(self) -> None:
        self.chosen: Any = None

    def __getitem__(self, index: int) -> Any:
        if self.chosen is None:
            self.chosen = np.random.default_rng(torch.initial_seed()).permutation(N)
        return self.chosen[index]


class Drops(Indexed):
    """Each worker leaves out what it had, so the copies have different lengths."""

    def __init__(self) -> None:
        self.items = list(range(N))

    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        if info is not None and info.id == 0 and len(self.items) == N:
            self.items.pop()
        return self.items[index % len(self.items)]


class CountsAndCaches(Indexed):
    """What a dataset may well keep for itself in each worker."""

    def __init__(self) -> None:
        self.seen = [0] * N
        self.last = torch.zeros(N)
        self.cache: list[Any] = [None] * N
        self.steps = list(range(5))
        self.calls = 0
        self.worker: Any = None
        self.log: list[str] = []

    def __getitem__(self, index: int) -> Any:
        self.seen[index] += 1
        self.last[index] = random.random()
        if self.cache[index] is None:
            self.cache[index] = torch.full((2,), float(index))
        random.shuffle(self.steps)
        self.calls += 1
        self.worker = getattr(get_worker_info(), "id", None)
        self.log = [*self.log[-3:], str(index)]
        return self.cache[index].clone()


class ReshufflesData(Indexed):
    """Shuffles what it holds in each worker: rows, fractions, a column."""

    def __init__(self, kind: str) -> None:
        self.shuffled = False
        self.data: Any = {
            "pairs": np.stack([np.arange(N), np.arange(N)], 1),
            "rows": torch.rand(N, 3),
            "fractions": torch.rand(N),
            "half": torch.rand(N, 2).to(torch.bfloat16),
            "column": {"x": list(range(N)), "name": "a"},
            "column of rows": {"x": np.random.rand(N, 3)},
        }[kind]

    def __getitem__(self, index: int) -> Any:
        if not self.shuffled:
            self.shuffled = True
            order = np.random.default_rng(torch.initial_seed()).permutation(N)
            if isinstance(self.data, dict):
                column = self.data["x"]
                self.data["x"] = [column[k] for k in order]
                if isinstance(column, np.ndarray):
                    self.data["x"] = column[order]
            elif isinstance(self.data, np.ndarray):
                self.data[:] = self.data[order]
            else:
                self.data = self.data[torch.from_numpy(order)]
        return 0


@ways({"fork": {}, "fork, persistent": {}, "spawn": {}})
@pytest.mark.parametrize("kind", ["pairs", "rows", "fractions", "half", "column", "column of rows"])
def test_data_that_each_worker_put_in_an_order_of_its_own(kind: str, way: str, caplog: Any) -> None:
    [told] = said(caplog, loader_of(ReshufflesData(kind), way))
    name = "dataset.data['x']" if "column" in kind else "dataset.data"
    assert told.startswith(f"{name} is in another order in worker 0 than in worker 1: one index")


class DrawsFromAPool(Indexed):
    """Shuffles for each sample, or for the first, what it draws from."""

    def __init__(self, always: bool) -> None:
        self.pool = list(range(N))
        self.rows = np.random.rand(N, 2)
        self.always, self.shuffled = always, False

    def __getitem__(self, index: int) -> Any:
        if self.always or not self.shuffled:
            self.shuffled = True
            draw = np.random.default_rng(torch.initial_seed() + index)
            draw.shuffle(self.pool)
            draw.shuffle(self.rows)
        return self.pool[0] + self.rows[0, 0]


@ways({"fork": {}, "fork, persistent": {}})
@pytest.mark.parametrize("always", [True, False])
def test_what_each_sample_shuffles_is_no_order(always: bool, way: str, caplog: Any) -> None:
    told = said(caplog, loader_of(DrawsFromAPool(always), way))
    assert bool(told) is not always


@ways(FRESH | LASTING)
@pytest.mark.parametrize("dataset", [Reshuffles(), Reshuffles(words=True), DrawsAtFirstUse()])
def test_an_order_that_each_worker_made_for_itself(dataset: Any, way: str, caplog: Any) -> None:
    [told] = said(caplog, loader_of(dataset, way))
    name = "dataset.chosen" if isinstance(dataset, DrawsAtFirstUse) else "dataset.order"
    assert told.startswith(f"{name} is in another order in worker 0 than in worker 1: one index")
    assert "in the main process" in told


@ways({"fork": {}, "fork, persistent": {}})
def test_a_list_that_each_worker_cut_for_itself(way: str, caplog: Any) -> None:
    [told] = said(caplog, loader_of(Drops(), way))
    assert told.startswith(f"dataset.items has {N - 1} entries in worker 0 and {N} in worker 1")


@ways(ALL)
def test_what_a_copy_keeps_for_itself_is_not_told(way: str, caplog: Any) -> None:
    told = said(caplog, loader_of(CountsAndCaches(), way))
    assert [each for each in told if "is lost with them" not in each] == []


@ways(ALL)
def test_one_order_for_all_is_not_told(way: str, caplog: Any) -> None:
    assert said(caplog, loader_of(Reshuffles(seed=3), way)) == []


# ── copies that differ before the first sample ───────────────────────────────────────────────────


class Ordered(Indexed):
    """Has an order that a ``worker_init_fn`` may change; as it is sent, it may change it itself."""

    def __init__(self, kind: str = "words", as_sent: bool = False) -> None:
        self.items: Any = {
            "words": [f"{k}.jpg" for k in range(N)],
            "pairs": [(f"{k}.jpg", k % 3) for k in range(N)],
            "numbers": list(range(N)),
            "array": np.arange(N),
            "tensor": torch.arange(N),
        }[kind]
        self.unused = list(range(N))
        self.as_sent = as_sent

    def __getitem__(self, index: int) -> Any:
        return self.items[index % len(self.items)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.as_sent:
            random.Random(os.getpid()).shuffle(self.items)


def shuffle(items: Any, seed: int | None = None) -> None:
    if isinstance(items, torch.Tensor):
        items[:] = items[torch.from_numpy(np.random.default_rng(seed).permutation(N))]
    elif seed is None:
        np.random.shuffle(items) if isinstance(items, np.ndarray) else random.shuffle(items)
    else:
        np.random.default_rng(seed).shuffle(items)


def shuffles(worker_id: int) -> None:
    shuffle(get_worker_info().dataset.items)  # type: ignore[union-attr]


def makes_an_order(worker_id: int) -> None:
    random.seed(worker_id)
    get_worker_info().dataset.items = random.sample(range(N), N)  # type: ignore[union-attr]


def shuffles_alike(worker_id: int) -> None:
    shuffle(get_worker_info().dataset.items, 3)  # type: ignore[union-attr]


def shuffles_what_nobody_reads(worker_id: int) -> None:
    shuffle(get_worker_info().dataset.unused)  # type: ignore[union-attr]


def sets_up_what_is_its_own(worker_id: int) -> None:
    dataset: Any = get_worker_info().dataset  # type: ignore[union-attr]
    dataset.seeds = np.random.default_rng(worker_id).random(N)
    dataset.worker_id = worker_id
    dataset.table = {k: str(k) for k in range(100)}


def takes_its_part(worker_id: int) -> None:
    info: Any = get_worker_info()
    info.dataset.items = info.dataset.items[info.id :: info.num_workers]


@ways(FRESH | LASTING)
@pytest.mark.parametrize("kind", ["words", "pairs", "numbers", "array", "tensor"])
def test_an_order_that_worker_init_fn_shuffles(kind: str, way: str, caplog: Any) -> None:
    if kind == "tensor" and way not in ("fork", "fork, persistent"):
        pytest.skip("a tensor that is sent is shared by all workers")
    loader = loader_of(Ordered(kind), way, worker_init_fn=shuffles, collate_fn=list)
    [told] = said(caplog, loader)
    assert told.startswith("dataset.items is in another order in worker 0 than in worker 1: one")
    assert "worker_init_fn changed it there" in told


@ways(FRESH | LASTING)
def test_an_order_that_worker_init_fn_makes(way: str, caplog: Any) -> None:
    loader = loader_of(Ordered("numbers"), way, worker_init_fn=makes_an_order)
    [told] = said(caplog, loader)
    assert told.startswith("dataset.items is in another order in worker 0 than in worker 1: one")


@ways({"fork": {}, "fork, persistent": {}})
def test_a_part_of_what_is_asked_by_index_is_no_share(way: str, caplog: Any) -> None:
    dataset = Ordered()
    dataset.items.append("one more")
    loader = loader_of(dataset, way, worker_init_fn=takes_its_part)
    assert said(caplog, loader) == []  # the order has not an element for each sample
    dataset.__class__ = OneMore
    [told] = said(caplog, loader_of(dataset, way, worker_init_fn=takes_its_part))
    assert told.startswith(f"dataset.items has {N // 2 + 1} entries in worker 0 and {N // 2} in")
    assert "worker_init_fn changed its copy" in told


class OneMore(Ordered):
    def __len__(self) -> int:
        return N + 1


@ways({"spawn": {}, "spawn, persistent": {}})
def test_an_order_that_is_made_as_a_copy_comes(way: str, caplog: Any) -> None:
    [told] = said(caplog, loader_of(Ordered(as_sent=True), way))
    assert told.startswith("dataset.items is in another order in worker 0 than in worker 1: one")
    assert "__setstate__" in told


@ways(FRESH | LASTING)
@pytest.mark.parametrize(
    "initialise", [shuffles_alike, shuffles_what_nobody_reads, sets_up_what_is_its_own]
)
@pytest.mark.parametrize("kind", ["words", "pairs"])
def test_what_worker_init_fn_may_well_set_up_is_not_told(
    kind: str, initialise: Any, way: str, caplog: Any
) -> None:
    loader = loader_of(Ordered(kind), way, worker_init_fn=initialise, collate_fn=list)
    assert said(caplog, loader) == []


@ways({"fork": {}, "fork, persistent": {}})
def test_one_worker_may_shuffle_its_copy(way: str, caplog: Any) -> None:
    loader = loader_of(Ordered(), way, num_workers=1, worker_init_fn=shuffles)
    assert said(caplog, loader) == []


class Files(IterableDataset):  # type: ignore[type-arg]
    def __init__(self) -> None:
        self.items = [f"{k}.tar" for k in range(N)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items)


def takes_and_shuffles_its_part(worker_id: int) -> None:
    takes_its_part(worker_id)
    shuffle(get_worker_info().dataset.items)  # type: ignore[union-attr]


@ways(FRESH | LASTING)
@pytest.mark.parametrize("initialise", [takes_its_part, takes_and_shuffles_its_part])
def test_a_stream_that_worker_init_fn_shares_out_is_not_told(
    initialise: Any, way: str, caplog: Any
) -> None:
    assert said(caplog, loader_of(Files(), way, worker_init_fn=initialise)) == []


def test_the_audit_says_of_each_epoch_what_was_noticed() -> None:
    loader = loader_of(Reshuffles(), "fork, persistent")
    for _ in range(2):
        list(loader)
        [noticed] = loader.audit.noticed
        assert noticed.startswith("dataset.order is in another order in worker 0")
        assert "complete, indices ok (but see what was noticed); 24 drawn" in str(loader.audit)
        assert f"noticed: {noticed}" in str(loader.audit)
        assert (loader.audit.ok, loader.audit.to_dict()["noticed"]) == (True, [noticed])
    sound = loader_of(Reshuffles(seed=3), "fork")
    list(sound)
    assert (sound.audit.noticed, "complete, ok;" in str(sound.audit)) == ((), True)


def test_what_is_noticed_over_a_plain_list_is_told_once(
    caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_batches, "_memory_bytes", lambda: 50_000)
    loader = loader_of([torch.zeros(1000) for _ in range(300)], "main")
    assert len(said(caplog, loader, epochs=3, keep=[])) == 1


class Keyed(Reshuffles):
    def __getitem__(self, index: int) -> Any:
        return torch.tensor(super().__getitem__(index))


def test_where_it_is_warned_of_the_cause_is_told_once() -> None:
    loader = loader_of(Keyed(), "fork", key=int, verify="warn")
    with pytest.warns(RuntimeWarning, match="are one sample") as caught:
        list(loader)
    told = [str(each.message) for each in caught]
    assert len(told) > 1
    assert sum("is in another order in worker 0" in each for each in told) == 1


def test_with_a_key_the_cause_is_told_with_the_error() -> None:
    loader = loader_of(Keyed(), "fork", key=int)
    with pytest.raises(DeliveryError, match=r"dataset\.order is in another order in worker 0"):
        list(loader)


# ── a copy that is behind ────────────────────────────────────────────────────────────────────────


class Seeded(Indexed):
    """Its samples depend on the epoch."""

    def __init__(self) -> None:
        self.epoch = 0
        self.unused = 0
        self.transform = Strength()

    def __getitem__(self, index: int) -> int:
        return 1000 * self.epoch + index + self.transform()


class Strength:
    def __init__(self) -> None:
        self.strength = 0

    def __call__(self) -> int:
        return self.strength


class Behind(Sampler[int]):
    """Sets the epoch of the dataset when it is iterated: workers that fork have their copy."""

    def __init__(self, dataset: Seeded) -> None:
        self.dataset = dataset
        self.epoch = 0

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        self.dataset.epoch = self.epoch
        yield from range(N)


@ways(FRESH | LASTING)
def test_an_epoch_number_that_does_not_reach_the_workers(way: str, caplog: Any) -> None:
    dataset = Seeded()
    [told] = said(caplog, loader_of(dataset, way, sampler=Behind(dataset)))
    assert told.startswith("dataset.epoch is 1 here and 0 in the workers")
    assert ("persistent_workers=False" in told) == ("persistent" in way)


@ways(LASTING)
def test_what_is_set_between_epochs_does_not_reach_workers_that_stay(way: str, caplog: Any) -> None:
    dataset = Seeded()
    loader = loader_of(dataset, way)
    assert said(caplog, loader, epochs=1) == []
    dataset.transform.strength = 5
    [told] = said(caplog, loader, epochs=1)
    assert told.startswith("dataset.transform.strength is 5 here and 0 in the workers")


class SeededByClass(Indexed):
    """Has an epoch of its own once it is set."""

    epoch = 0

    def __getitem__(self, index: int) -> int:
        return index + self.epoch


class CountsByClass(SeededByClass):
    def __getitem__(self, index: int) -> int:
        self.epoch += 1  # in each process for itself
        return self.epoch


@ways(LASTING)
def test_an_attribute_that_was_the_class_s_is_set_too_late(way: str, caplog: Any) -> None:
    for dataset, late in ((SeededByClass(), True), (CountsByClass(), False)):
        loader = loader_of(dataset, way)
        assert said(caplog, loader, epochs=1) == []
        dataset.epoch = 3
        told = said(caplog, loader, epochs=1)
        assert [each[:45] for each in told] == [
            "dataset.epoch is 3 here and 0 in the workers:"
        ] * late


@ways(FRESH | LASTING)
def test_an_attribute_that_was_the_class_s_is_set_in_time(way: str, caplog: Any) -> None:
    dataset = SeededByClass()
    loader = loader_of(dataset, way)
    dataset.epoch = 3
    assert said(caplog, loader) == []
    if "persistent" not in way:
        dataset.epoch = 4
        assert said(caplog, loader) == []


class Holds(Indexed):
    """Reads what main may set anew, or change in its place, between epochs."""

    def __init__(self) -> None:
        self.samples: Any = [f"{k}.jpg" for k in range(N)]
        self.pairs = [(f"{k}.jpg", k) for k in range(N)]
        self.files = [Path(f"{k}.jpg") for k in range(N)]
        self.order: Any = np.arange(N)
        self.words = np.array([f"{k}" for k in range(N)], dtype=object)
        self.weights = torch.arange(5.0)
        self.size = (224, 224)
        self.table = {"x": list(range(N)), "y": 3}
        self.names = {k: f"{k}" for k in range(20)}
        self.buffer = np.zeros(N)
        self.cache: list[Any] = [None] * N
        self.spare = list(range(N))

    def __getitem__(self, index: int) -> Any:
        at = int(self.order[index])
        self.buffer[at] += 1
        if self.cache[at] is None:
            self.cache[at] = self.samples[at % len(self.samples)]
        read = (
            self.words[at],
            self.pairs[at],
            self.files[at],
            self.weights,
            self.size,
            self.table["x"][at],
        )
        return len(read) + len(self.names)

    def reversed(self, name: str) -> None:
        held = getattr(self, name)
        setattr(self, name, held[::-1] if not isinstance(held, torch.Tensor) else held.flip(0))


CHANGES: dict[str, tuple[str, Any]] = {
    "a new list": ("samples", lambda it: it.reversed("samples")),
    "a shorter list": ("samples", lambda it: setattr(it, "samples", it.samples[:10])),
    "a list, shuffled": ("samples", lambda it: random.Random(3).shuffle(it.samples)),
    "pairs, shuffled": ("pairs", lambda it: random.Random(3).shuffle(it.pairs)),
    "paths, shuffled": ("files", lambda it: random.Random(3).shuffle(it.files)),
    "a list, cut": ("samples", lambda it: it.samples.pop()),
    "a new array": ("order", lambda it: it.reversed("order")),
    "an array, shuffled": ("order", lambda it: np.random.default_rng(3).shuffle(it.order)),
    "a new tensor": ("weights", lambda it: it.reversed("weights")),
    "a pair": ("size", lambda it: setattr(it, "size", (320, 320))),
    "a column": ("table['x']", lambda it: it.table.update(x=list(range(1, N + 1)))),
    "an array of words": ("words", lambda it: it.reversed("words")),
    "a new dict": ("names", lambda it: setattr(it, "names", {k: f"_{k}" for k in range(20)})),
}


FEW = ("a new list", "an array, shuffled", "a new tensor")


@ways(LASTING)
@pytest.mark.parametrize("change", CHANGES)
def test_what_main_holds_anew_does_not_reach_workers_that_stay(
    change: str, way: str, caplog: Any
) -> None:
    if way != "fork, persistent" and change not in FEW:
        pytest.skip("how it is held matters no more than under fork")
    name, make = CHANGES[change]
    dataset = Holds()
    loader = loader_of(dataset, way)
    assert said(caplog, loader, epochs=2) == []
    make(dataset)
    [told] = said(caplog, loader, epochs=2)
    became = "changed" if "shuffled" in change or "cut" in change else "set anew"
    assert told.startswith(f"dataset.{name} was {became} here after the workers began")
    assert "make the loader anew" in told
    assert ("(10 entries here, 24 there)" in told) is (change == "a shorter list")


class FilesOf(IterableDataset):  # type: ignore[type-arg]
    def __init__(self) -> None:
        self.files = [f"{k}.tar" for k in range(N)]

    def __iter__(self) -> Iterator[str]:
        info: Any = get_worker_info()
        yield from self.files[info.id :: info.num_workers]


def numbers() -> TensorDataset:
    return TensorDataset(torch.arange(N))


WITHIN: dict[str, tuple[Any, str, Any]] = {
    "under a subset": (
        lambda: Subset(Holds(), range(N)),
        "dataset.dataset.samples was changed",
        lambda it: it.dataset.samples.reverse(),
    ),
    "the subset's own": (
        lambda: Subset(Holds(), list(range(N))),
        "dataset.indices was set anew",
        lambda it: setattr(it, "indices", it.indices[::-1]),
    ),
    "a tensor, in its place": (
        numbers,
        "dataset.tensors[0] was changed",
        lambda it: it.tensors[0].copy_(it.tensors[0].flip(0)),
    ),
    "a new tensor": (
        numbers,
        "dataset.tensors was set anew",
        lambda it: setattr(it, "tensors", (it.tensors[0].flip(0),)),
    ),
    "of a stream": (FilesOf, "dataset.files was changed", lambda it: it.files.reverse()),
}


@ways({"fork, persistent": {}})
@pytest.mark.parametrize("which", WITHIN)
def test_whatever_holds_it_a_copy_that_is_behind_is_told(which: str, way: str, caplog: Any) -> None:
    make, told, change = WITHIN[which]
    dataset = make()
    loader = loader_of(dataset, way)
    assert said(caplog, loader, epochs=2) == []
    change(dataset)
    [line] = said(caplog, loader, epochs=2)
    assert line.startswith(f"{told} here after the workers began: they still have what it was")


class Visit:
    def __init__(self, number: int) -> None:
        self.number, self.visits = number, 0


class Visited(Indexed):
    def __init__(self) -> None:
        self.items = [Visit(k) for k in range(N)]

    def __getitem__(self, index: int) -> int:
        self.items[index].visits += 1
        return self.items[index].number


@ways({"fork, persistent": {}})
def test_marks_on_elements_are_each_process_s_own(way: str, caplog: Any) -> None:
    dataset = Visited()
    loader = loader_of(dataset, way, sampler=range(20, N))
    assert said(caplog, loader, epochs=1) == []
    for index in range(N):
        assert dataset[index] == index
    assert said(caplog, loader, epochs=2) == []


class Anew(Sampler[int]):
    """Sets the order as it is iterated: workers that fork have their copy."""

    def __init__(self, dataset: Holds) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[int]:
        self.dataset.reversed("order")
        yield from range(N)


@ways(FRESH)
def test_what_the_sampler_holds_anew_does_not_reach_the_workers(way: str, caplog: Any) -> None:
    dataset = Holds()
    loader = loader_of(dataset, way, sampler=Anew(dataset))
    [told] = [each for each in said(caplog, loader) if "is lost with them" not in each]
    assert told.startswith("dataset.order was set anew here after the workers began")
    assert "Set it before iter(loader)" in told


def in_shared_memory(dataset: Holds) -> None:
    dataset.weights.copy_(dataset.weights.flip(0))


def with_equal_contents(dataset: Holds) -> None:
    dataset.samples, dataset.order = list(dataset.samples), dataset.order.copy()
    dataset.names = dict(dataset.names)


def what_nobody_reads(dataset: Holds) -> None:
    dataset.spare = dataset.spare[::-1]


def by_asking_it_here(dataset: Holds) -> None:
    for index in range(N):
        assert dataset[index]


def what_is_kept(dataset: Holds) -> None:
    dataset.cache[:] = [f"{k}" for k in range(N)]
    dataset.names.pop(0)
    dataset.names["more"] = "x"


@ways(LASTING)
@pytest.mark.parametrize(
    "change",
    [
        in_shared_memory,
        with_equal_contents,
        what_nobody_reads,
        by_asking_it_here,
        what_is_kept,
    ],
)
def test_what_main_may_well_do_to_its_copy_is_not_told(change: Any, way: str, caplog: Any) -> None:
    dataset = Holds()
    dataset.weights.share_memory_()
    loader = loader_of(dataset, way, num_workers=1)
    assert said(caplog, loader, epochs=1) == []
    change(dataset)
    assert said(caplog, loader, epochs=2) == []


@ways(FRESH | LASTING)
@pytest.mark.parametrize("change", FEW)
def test_what_is_held_anew_before_new_workers_is_theirs_too(
    change: str, way: str, caplog: Any
) -> None:
    _, make = CHANGES[change]
    dataset = Holds()
    make(dataset)
    assert said(caplog, loader_of(dataset, way), epochs=1) == []
    make(dataset)
    assert said(caplog, loader_of(dataset, way), epochs=1) == []


class OrderedByEpoch(Indexed):
    """Each process makes the order anew as it sees the next epoch."""

    def __init__(self) -> None:
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self.made_for = 0
        self.order = list(range(N))

    def __getitem__(self, index: int) -> int:
        if self.made_for != int(self.epoch):
            self.make()
        return self.order[index]

    def make(self) -> None:
        self.made_for = int(self.epoch)
        self.order = np.random.default_rng(self.made_for).permutation(N).tolist()


@ways(LASTING)
def test_an_order_that_each_process_makes_by_a_shared_number_is_not_told(
    way: str, caplog: Any
) -> None:
    dataset = OrderedByEpoch()
    loader = loader_of(dataset, way)
    for epoch in range(3):
        dataset.epoch.fill_(epoch)
        dataset.make()
        assert said(caplog, loader, epochs=1) == []


@ways({"fork": {}, "fork, persistent": {}})
def test_what_the_loop_sets_reaches_the_workers_of_the_next_epoch(way: str, caplog: Any) -> None:
    dataset = Seeded()
    loader = loader_of(dataset, way)
    with caplog.at_level(logging.WARNING, "safeloader"):
        for _ in range(3):
            for number, _ in enumerate(loader):
                if number == 3:
                    dataset.transform.strength += 1
    stays = "persistent" in way
    told = [each for each in caplog.messages if "dataset.transform.strength is" in each]
    assert len(told) == stays


@ways(ALL)
def test_what_is_set_before_an_epoch_reaches_new_workers(way: str, caplog: Any) -> None:
    dataset = Seeded()
    loader = loader_of(dataset, way)
    told: list[str] = []
    for epoch in range(3):
        if "persistent" not in way:
            dataset.epoch = epoch
        dataset.unused = epoch  # no sample is made by it
        told += said(caplog, loader, epochs=1)
    assert told == []


# ── random numbers ───────────────────────────────────────────────────────────────────────────────


class Draws(Indexed):
    def __init__(self, name: str = "random", seed: Any = None) -> None:
        self.name, self.seed = name, seed

    def __getitem__(self, index: int) -> float:
        if self.seed is not None:
            set_seed(self.name, index if self.seed == "index" else self.seed)
        if self.name == "random":
            return random.random()
        return float(np.random.rand()) if self.name == "numpy.random" else float(torch.rand(()))


def set_seed(name: str, seed: int) -> None:
    {"random": random.seed, "numpy.random": np.random.seed, "torch": torch.manual_seed}[name](seed)


class SeedAlike:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, worker: int) -> None:
        set_seed(self.name, 7)


class SeedApart(SeedAlike):
    def __call__(self, worker: int) -> None:
        set_seed(self.name, torch.initial_seed() % 2**31)


@ways(FRESH | LASTING)
@pytest.mark.parametrize("name", ["random", "numpy.random", "torch"])
def test_workers_that_are_seeded_alike(name: str, way: str, caplog: Any) -> None:
    loader = loader_of(Draws(name), way, shuffle=True, worker_init_fn=SeedAlike(name))
    [told] = said(caplog, loader)
    assert told.startswith(f"workers 0 and 1 draw the same random numbers from {name}")


def test_one_worker_that_begins_each_epoch_alike(caplog: Any) -> None:
    torch.manual_seed(0)
    init = SeedAlike("numpy.random")
    loader = loader_of(
        Draws("numpy.random"), "fork", num_workers=1, shuffle=True, worker_init_fn=init
    )
    [told] = said(caplog, loader)
    assert told.startswith("worker 0 draws the same random numbers from numpy.random in each epoch")


@pytest.mark.parametrize("draws", [False, True])
def test_an_epoch_that_was_resumed_and_the_next_draw_alike(draws: bool, caplog: Any) -> None:
    def loader(**more: Any) -> SafeStatefulDataLoader[Any]:
        return SafeStatefulDataLoader(Draws(), batch_size=4, shuffle=True, num_workers=1, **more)

    torch.manual_seed(0)
    next(iter(one := loader()))
    (other := loader()).load_state_dict(one.state_dict())
    told = said(caplog, other, epochs=1)
    torch.rand(int(draws))  # as dropout does
    told += said(caplog, other)
    if draws:
        assert not told
    else:
        [text] = told
        assert text.startswith("worker 0 draws the same random numbers from random in two epochs")
        assert "Without seed=, the workers of an epoch that is resumed begin where" in text
    next(iter(one := loader(seed=1)))
    (other := loader(seed=1)).load_state_dict(one.state_dict())
    assert not said(caplog, other)  # the cure


class OwnGenerator(Indexed):
    def __init__(self) -> None:
        self.rng = np.random.RandomState(0)

    def __getitem__(self, index: int) -> float:
        return float(self.rng.rand())


class SeededByIndex(Indexed):
    """Has a generator of its own, which each sample puts to a place of its own."""

    def __init__(self, kind: str) -> None:
        made: Any = {"python": random.Random, "torch": torch.Generator}
        self.rng: Any = made.get(kind, np.random.RandomState)()
        self.epoch = 0

    def __getitem__(self, index: int) -> float:
        seed = 1000 * self.epoch + index
        if isinstance(self.rng, torch.Generator):
            self.rng.manual_seed(seed)
            return float(torch.rand((), generator=self.rng))
        self.rng.seed(seed)
        return float(self.rng.random())


def seeds_its_generator(worker_id: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.rng.seed(info.seed % 2**32)


def seeds_nothing(worker_id: int) -> None:
    """As a function has it that sets threads, or names the process."""


@ways({"fork": {}, "fork, persistent": {}})
def test_a_generator_that_worker_init_fn_may_seed_is_told_if_it_repeats(
    way: str, caplog: Any
) -> None:
    loader = loader_of(OwnGenerator(), way, worker_init_fn=seeds_its_generator)
    assert said(caplog, loader) == []
    told = said(caplog, loader_of(OwnGenerator(), way, worker_init_fn=seeds_nothing))
    assert any("draw the same random numbers from dataset.rng" in each for each in told)


@ways({"main": {}, "fork": {}, "fork, persistent": {}})
@pytest.mark.parametrize("kind", ["python", "numpy", "torch"])
def test_a_generator_that_is_seeded_by_the_index_is_not_told(
    kind: str, way: str, caplog: Any
) -> None:
    init = seeds_nothing if ALL[way] else None
    loader = loader_of(SeededByIndex(kind), way, shuffle=True, worker_init_fn=init)
    assert said(caplog, loader) == []


class MakesItsGenerator(Indexed):
    """Has a generator of its own from its first sample on."""

    def __init__(self, seed: Any, kind: str = "numpy") -> None:
        self.seed, self.kind, self.rng = seed, kind, None

    def __getitem__(self, index: int) -> float:
        if self.rng is None:
            seed = torch.initial_seed() if self.seed == "worker" else self.seed
            made: Any = {"python": random.Random, "numpy": np.random.default_rng}
            self.rng = made[self.kind](seed)
        return float(self.rng.random())


@ways(FRESH | LASTING)
@pytest.mark.parametrize("kind", ["python", "numpy"])
def test_a_generator_that_each_worker_makes_from_one_seed(kind: str, way: str, caplog: Any) -> None:
    [told] = said(caplog, loader_of(MakesItsGenerator(0, kind), way, shuffle=True))
    assert told.startswith("workers 0 and 1 draw the same random numbers from dataset.rng: it was")
    assert said(caplog, loader_of(MakesItsGenerator("worker", kind), way, shuffle=True)) == []


OF_THE_MODULE = np.random.RandomState(0)


def from_the_module() -> float:
    return float(OF_THE_MODULE.rand())


class DrawsFromTheModule(Indexed):
    """Its own code calls a function, which has the generator."""

    def __getitem__(self, index: int) -> float:
        return self.noise() + index

    def noise(self) -> float:
        return from_the_module()


def seeds_that_of_the_module(worker_id: int) -> None:
    info = get_worker_info()
    assert info is not None
    OF_THE_MODULE.seed(info.seed % 2**32)


@ways(FRESH | LASTING)
def test_a_generator_of_a_module_that_repeats(way: str, caplog: Any) -> None:
    path = f"{__name__}.OF_THE_MODULE"
    loader = loader_of(DrawsFromTheModule(), way, shuffle=True, worker_init_fn=seeds_nothing)
    [told] = said(caplog, loader)
    assert told.startswith(f"workers 0 and 1 draw the same random numbers from global {path}: it")
    cure = f"Seed it per worker: in worker_init_fn, {path}.seed(get_worker_info().seed % 2**32)"
    assert told.endswith(cure)
    init = seeds_that_of_the_module
    loader = loader_of(DrawsFromTheModule(), way, shuffle=True, worker_init_fn=init)
    assert said(caplog, loader) == []


class DrawsIfAsked(Indexed):
    def __init__(self, augment: bool) -> None:
        self.augment = augment

    def __getitem__(self, index: int) -> float:
        return from_the_module() if self.augment else float(index)


@ways(FRESH | LASTING)
def test_a_generator_of_a_module_is_told_once_it_repeats(way: str, caplog: Any) -> None:
    assert said(caplog, loader_of(DrawsIfAsked(False), way)) == []
    [told] = said(caplog, loader_of(DrawsIfAsked(True), way))
    assert "draw the same random numbers from global" in told


class DrawsByPartial(Indexed):
    def __init__(self) -> None:
        self.draw = functools.partial(np.random.RandomState.rand, OF_THE_MODULE)

    def __getitem__(self, index: int) -> float:
        return float(self.draw())


class DrawsStream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return (from_the_module() for _ in range(4))


class SeedsThatOfTheModule:
    def __call__(self, worker_id: int) -> None:
        self.at_last(worker_id)

    def at_last(self, worker_id: int) -> None:
        seeds_that_of_the_module(worker_id)


@ways({"fork": {}, "fork, persistent": {}})
@pytest.mark.parametrize(
    "init",
    [
        seeds_that_of_the_module,
        functools.partial(seeds_that_of_the_module),
        SeedsThatOfTheModule(),
        lambda worker_id: seeds_that_of_the_module(worker_id),
    ],
    ids=["function", "partial", "object", "lambda"],
)
def test_whatever_worker_init_fn_reaches_is_seeded(
    init: Any, way: str, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_hazards, "_said", set())
    assert said(caplog, loader_of(DrawsByPartial(), way, worker_init_fn=init)) == []
    assert said(caplog, loader_of(DrawsStream(), way, worker_init_fn=init)) == []
    for dataset in (DrawsByPartial(), DrawsStream()):
        with pytest.warns(RuntimeWarning, match="same state: unless something seeds it there"):
            list(loader_of(dataset, way))


CONNECTION = sqlite3.connect(":memory:")


class Asks(Indexed):
    def __init__(self) -> None:
        self.own = sqlite3.connect(":memory:")

    def __getitem__(self, index: int) -> float:
        return index + float(asked_of(CONNECTION) + asked_of(self.own))


def asked_of(connection: sqlite3.Connection) -> int:
    return int(connection.execute("select 1").fetchone()[0])


def connects_anew(worker_id: int) -> None:
    global CONNECTION
    CONNECTION = sqlite3.connect(":memory:")
    info = get_worker_info()
    assert info is not None
    info.dataset.own = sqlite3.connect(":memory:")


@ways({"fork": {}, "fork, persistent": {}})
def test_what_worker_init_fn_opens_anew_is_not_told(
    way: str, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_hazards, "_said", set())
    assert said(caplog, loader_of(Asks(), way, worker_init_fn=connects_anew)) == []
    with pytest.warns(RuntimeWarning, match="this one connection") as told:
        list(loader_of(Asks(), way))
    assert len(told) == 2


class SeededByGroup(Indexed):
    """Eight samples in a row, the frames of a clip, are cropped alike."""

    def __getitem__(self, index: int) -> float:
        random.seed(index // 8)
        return random.random()


@ways(ALL)
@pytest.mark.parametrize("shuffle", [False, True])
def test_one_seed_for_each_group_of_indices_is_not_told(
    shuffle: bool, way: str, caplog: Any
) -> None:
    torch.manual_seed(0)
    assert said(caplog, loader_of(SeededByGroup(), way, shuffle=shuffle)) == []


class Pipeline:
    """As a library has it: each of its steps draws from a generator of its own."""

    def __init__(self) -> None:
        self.steps = [OwnGenerator() for _ in range(3)]


class ByPipeline(Indexed):
    def __init__(self) -> None:
        self.pipeline = Pipeline()

    def __getitem__(self, index: int) -> float:
        return sum(each[index] for each in self.pipeline.steps)


@ways({"fork": {}, "fork, persistent": {}})
def test_what_repeats_is_told_once_and_shortly_in_each_audit(way: str, caplog: Any) -> None:
    loader = loader_of(ByPipeline(), way, shuffle=True, worker_init_fn=seeds_nothing)
    with caplog.at_level(logging.WARNING, "safeloader"):
        for _ in range(3):
            list(loader)
            assert loader.audit.noticed == (
                "workers 0 and 1 draw the same random numbers from dataset.pipeline.steps "
                "(3 generators)",
            )
    assert sum("draw" in record.getMessage() for record in caplog.records) == 1


class DrawsUnlike(OwnGenerator):
    """Draws more for one sample than for another."""

    def __getitem__(self, index: int) -> float:
        return float(self.rng.rand(1 + index % 7).sum())


@ways({"fork": {}, "fork, persistent": {}})
def test_a_generator_that_repeats_is_told_whatever_each_sample_draws(way: str, caplog: Any) -> None:
    told = said(caplog, loader_of(DrawsUnlike(), way, worker_init_fn=seeds_nothing))
    assert any("draw the same random numbers from dataset.rng" in each for each in told)


@ways(ALL)
def test_seeding_where_samples_are_made(way: str, caplog: Any) -> None:
    torch.manual_seed(0)
    # Without workers nothing but the dataset moves the other generators: then it cannot be seen.
    name = "torch" if way == "main" else "random"
    [told] = said(caplog, loader_of(Draws(name, seed=5), way, shuffle=True))
    assert told.startswith(f"each sample draws the same random numbers from {name}")


@ways(ALL)
@pytest.mark.parametrize("seed", [None, "index"])
def test_numbers_that_do_not_repeat_are_not_told(seed: Any, way: str, caplog: Any) -> None:
    init = SeedApart("random") if ALL[way] else None
    assert said(caplog, loader_of(Draws(seed=seed), way, shuffle=True, worker_init_fn=init)) == []


def test_a_dataset_that_draws_nothing_may_be_seeded_alike(caplog: Any) -> None:
    loader = loader_of(Seeded(), "fork", worker_init_fn=SeedAlike("torch"))
    assert said(caplog, loader) == []


def test_a_validation_that_is_the_same_each_time_is_not_told(caplog: Any) -> None:
    loader = loader_of(Draws(), "fork", num_workers=1, worker_init_fn=SeedAlike("random"))
    assert said(caplog, loader) == []


# ── streams ──────────────────────────────────────────────────────────────────────────────────────


class Words(IterableDataset):  # type: ignore[type-arg]
    """A stream of dicts, whole in each worker or shared out."""

    def __init__(self, shared: bool, constant: bool = False) -> None:
        self.shared, self.constant = shared, constant

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info and self.shared else (0, 1)
        for k in range(first, 40, step):
            yield {"text": "x" if self.constant else f"word {k}", "x": torch.zeros(2)}


@ways(FRESH | LASTING)
def test_a_stream_that_each_worker_reads_whole(way: str, caplog: Any) -> None:
    [told] = said(caplog, loader_of(Words(shared=False), way))
    assert told.startswith("workers 0 and 1 read the same stream")
    assert "get_worker_info()" in told


@ways(ALL)
def test_a_stream_that_is_shared_out_is_not_told(way: str, caplog: Any) -> None:
    assert said(caplog, loader_of(Words(shared=True), way)) == []


def test_equal_samples_say_nothing_of_a_stream(caplog: Any) -> None:
    assert said(caplog, loader_of(Words(shared=False, constant=True), "fork")) == []


class Bits(IterableDataset):  # type: ignore[type-arg]
    """Each worker draws from a generator of its own, and few numbers there are to draw."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        draw = random.Random(info.id if info else 0)
        yield from [0, 1, 0, 1, *(draw.randint(0, 1) for _ in range(40))]


@ways({"fork": {}, "fork, persistent": {}})
def test_few_different_samples_say_nothing_of_a_stream(way: str, caplog: Any) -> None:
    assert said(caplog, loader_of(Bits(), way, batch_size=1)) == []


class Short(IterableDataset):  # type: ignore[type-arg]
    """A stream of fewer samples than are compared."""

    def __iter__(self) -> Iterator[int]:
        yield from range(5)


@ways({"fork": {}, "fork, persistent": {}})
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_short_stream_that_each_worker_reads_whole(
    batch_size: int, way: str, caplog: Any
) -> None:
    [told] = said(caplog, loader_of(Short(), way, batch_size=batch_size))
    assert told.startswith("workers 0 and 1 read the same stream: all 5 samples of each are equal")


class ShuffledAlike(IterableDataset):  # type: ignore[type-arg]
    """Each worker shuffles by the same seed and takes its own part, as it should."""

    def __iter__(self) -> Iterator[int]:
        random.seed(11)
        order = list(range(40))
        random.shuffle(order)
        info = get_worker_info()
        yield from order[info.id :: info.num_workers] if info else order


@ways({"fork": {}, "fork, persistent": {}})
def test_a_shuffle_that_workers_share_is_not_told(way: str, caplog: Any) -> None:
    assert said(caplog, loader_of(ShuffledAlike(), way)) == []


# ── what is written to ───────────────────────────────────────────────────────────────────────────


class InPlace(Indexed):
    """A transform that works in place on what the dataset holds."""

    def __init__(self, kind: str, copies: bool = False) -> None:
        self.copies = copies
        self.data: Any = {
            "tensor": torch.ones(N, 3),
            "flat tensor": torch.arange(1.0, N + 1),
            "array": np.ones((N, 3)),
            "dicts": [{"x": torch.ones(3), "label": k} for k in range(N)],
            "lists": [[1.0, 2.0] for _ in range(N)],
            "by index": {k: torch.ones(3) for k in range(N)},
        }[kind]

    def __getitem__(self, index: int) -> Any:
        sample = self.data[index]
        if isinstance(sample, dict):
            sample["seen"] = True  # a key that is added harms nobody
            x = sample["x"].clone() if self.copies else sample["x"]
            x *= 2
            return x
        if self.copies:
            return sample * 2 if not isinstance(sample, list) else [2 * each for each in sample]
        if isinstance(sample, list):
            sample[0] *= 2
            return torch.tensor(sample)
        sample *= 2
        return sample


KINDS = ["tensor", "flat tensor", "array", "dicts", "lists", "by index"]


@ways(MAIN | LASTING)
@pytest.mark.parametrize("kind", KINDS)
def test_a_transform_that_writes_into_its_dataset(kind: str, way: str, caplog: Any) -> None:
    [told] = said(caplog, loader_of(InPlace(kind), way))
    assert told.startswith("index 0 was changed in place")
    assert "dataset.data[0]" in told


@ways(MAIN | LASTING)
@pytest.mark.parametrize("kind", KINDS)
def test_a_transform_that_works_on_a_copy_is_not_told(kind: str, way: str, caplog: Any) -> None:
    assert said(caplog, loader_of(InPlace(kind, copies=True), way)) == []


class WithScratch(Indexed):
    """Works in an array of as many rows as it has samples."""

    def __init__(self, empty: bool) -> None:
        self.data = torch.arange(8.0 * N).reshape(N, 8)
        self.buffer = torch.zeros(N, 8) if empty else torch.ones(N, 8)

    def __getitem__(self, index: int) -> Any:
        self.buffer[index] = self.data[index] + torch.rand(8)
        return self.buffer[index].clone()


@ways(MAIN | LASTING | FRESH)
@pytest.mark.parametrize("empty", [True, False])
def test_scratch_is_neither_data_nor_a_cache(empty: bool, way: str, caplog: Any) -> None:
    assert said(caplog, loader_of(WithScratch(empty), way)) == []


class NumPyIndices(Sampler[Any]):
    """Yields what NumPy or torch makes."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[Any]:
        return iter(self.make(N))


@pytest.mark.parametrize("make", [np.arange, torch.arange])
def test_a_transform_that_writes_is_told_of_indices_of_any_kind(make: Any, caplog: Any) -> None:
    [told] = said(caplog, loader_of(InPlace("tensor"), "main", sampler=NumPyIndices(make)))
    assert told.startswith("index 0 was changed in place: dataset.data[0]")


def test_under_a_subset_the_element_is_that_of_the_dataset(caplog: Any) -> None:
    [told] = said(caplog, loader_of(Subset(InPlace("tensor"), [7, 3, 9]), "main"))
    assert told.startswith("index 0 was changed in place: dataset.dataset.data[7]")


# ── a read position that is shared ───────────────────────────────────────────────────────────────


class Lines(Indexed):
    """Reads a file by position; opened before the fork, or in the worker."""

    def __init__(self, path: Path, lazy: bool, buffering: int = 0) -> None:
        self.path, self.buffering = path, buffering
        self.file: Any = None if lazy else open(path, "rb", buffering=buffering)  # noqa: SIM115

    def __getitem__(self, index: int) -> int:
        if self.file is None:
            self.file = open(self.path, "rb", buffering=self.buffering)  # noqa: SIM115
        self.file.seek(1000 * index)
        return len(self.file.read(1000))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "frames.bin"
    path.write_bytes(bytes(1000 * N))
    return path


@ways({"fork": {}, "fork, persistent": {}})
@pytest.mark.filterwarnings("ignore:safeloader:RuntimeWarning")  # told at the start as well
def test_a_read_position_that_workers_share(way: str, file: Path, caplog: Any) -> None:
    dataset = Lines(file, lazy=False)
    caplog.clear()
    with dataset.file:
        list(loader_of(dataset, way, batch_size=2))
    [told] = [each.getMessage() for each in caplog.records]
    assert f"share one read position of {file} (dataset.file)" in told


@ways({"fork": {}, "fork, persistent": {}})
def test_a_file_that_is_opened_in_the_worker_is_not_told(way: str, file: Path, caplog: Any) -> None:
    assert said(caplog, loader_of(Lines(file, lazy=True), way)) == []


def test_workers_that_have_nothing_new_to_say_answer_all_the_same(
    caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting_workers, "ANSWER_S", 600.0)  # the test would end before
    loader = loader_of(torch.zeros(16, 3), "fork, persistent", batch_size=8)  # one batch a worker
    assert said(caplog, loader) == []


def test_wrong_data_is_noticed_after_an_epoch_on_workers_and_in_each_epoch(caplog: Any) -> None:
    loader = loader_of(InPlace("array"), "fork")
    list(loader)
    loader.num_workers, loader.multiprocessing_context = 0, None
    said(caplog, loader, epochs=6)
    noticed = [bool(audit.noticed) for audit in loader.audits]
    assert noticed[2:] == [True] * 5, noticed


def test_a_file_that_nobody_reads_is_not_told(file: Path, caplog: Any) -> None:
    with open(file, "rb", buffering=0):
        assert said(caplog, loader_of(Seeded(), "fork")) == []


class Fails(Lines):
    """Reads past the end of the file sooner or later, as decoders do."""

    def __getitem__(self, index: int) -> int:
        if len(self.file.read(3000)) < 3000:
            raise ValueError("invalid data")
        return index


@pytest.mark.filterwarnings("ignore:safeloader:RuntimeWarning")
def test_a_failure_tells_of_the_position_that_moved(file: Path) -> None:
    dataset = Fails(file, lazy=False)
    told = re.escape(f"read position of {file}")
    with dataset.file, pytest.raises(SafeLoaderError, match=told) as caught:
        list(loader_of(dataset, "fork", batch_size=2))
    *_, step = str(caught.value).splitlines()
    assert step.startswith("  next: open the file in the worker")


class Reopens(Lines):
    """Opens its file again where it finds itself in another process."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, lazy=False, buffering=-1)
        self.pid = os.getpid()

    def __getitem__(self, index: int) -> int:
        if self.pid != os.getpid():
            self.file.close()  # which moves the position that was inherited, once
            self.file = open(self.path, "rb")  # noqa: SIM115  # most likely as the same number
            self.pid = os.getpid()
        return super().__getitem__(index)


@pytest.mark.filterwarnings("ignore:safeloader:RuntimeWarning")
def test_a_file_that_each_process_opens_again_is_not_told(file: Path, caplog: Any) -> None:
    dataset = Reopens(file)
    with dataset.file:
        assert dataset[5] == 1000
        list(loader_of(dataset, "fork", batch_size=1))
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


class ReadsItsOwn(Lines):
    """Opens its file for each sample, and fails at one."""

    def __init__(self, path: Path, fails_at: int | None = None) -> None:
        super().__init__(path, lazy=True)
        self.fails_at = fails_at

    def __getitem__(self, index: int) -> int:
        with open(self.path, "rb") as file:
            file.seek(1000 * index)
            read = len(file.read(1000))
        if index == self.fails_at:
            raise ValueError("a bad sample")
        return read


@pytest.mark.parametrize("fails_at", [None, 15])
def test_a_file_that_the_training_loop_reads_is_its_own(
    fails_at: int | None, file: Path, tmp_path: Path, caplog: Any
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(bytes(1 << 20))
    told = ""
    with open(prompts, "rb") as mine:
        try:
            for _ in loader_of(ReadsItsOwn(file, fails_at), "fork", batch_size=2):
                mine.read(9000)  # more than what is read ahead
        except SafeLoaderError as error:
            told = str(error)
    assert bool(told) == (fails_at is not None)
    assert "read position" not in told
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


# ── caches, memory, batches that are kept, slow starts ───────────────────────────────────────────


class Cached(Indexed):
    def __init__(self) -> None:
        self.cache: dict[int, Any] = {}

    def __getitem__(self, index: int) -> Any:
        return self.cache.setdefault(index, float(index))


@ways(FRESH)
def test_a_cache_that_is_lost_with_the_workers(way: str, caplog: Any) -> None:
    [told] = said(caplog, loader_of(Cached(), way))
    assert told.startswith(f"dataset.cache grew in the workers by {N} entries and is lost")


class CountsInADict(Indexed):
    def __init__(self, value: Any) -> None:
        self.hits: dict[int, Any] = {}
        self.value = value

    def __getitem__(self, index: int) -> int:
        self.hits[index] = self.value
        return index


@ways({"fork": {}})
@pytest.mark.parametrize(("value", "saves"), [(3, 0), (True, 0), (np.int64(3), 0), ("text", 1)])
def test_counts_that_go_with_the_workers_are_no_loss(
    value: Any, saves: bool, way: str, caplog: Any
) -> None:
    assert len(said(caplog, loader_of(CountsInADict(value), way))) == saves


@ways(MAIN | LASTING)
def test_a_cache_that_stays_is_not_told(way: str, caplog: Any) -> None:
    assert said(caplog, loader_of(Cached(), way)) == []


def does_nothing(worker_id: int) -> None:
    """A worker_init_fn."""


@pytest.mark.parametrize(
    ("more", "looks_ahead"),
    [({}, True), ({"worker_init_fn": does_nothing}, False), ({"sampler": list(range(N))}, False)],
    ids=["plain", "worker_init_fn", "sampler"],
)
def test_forked_workers_go_on_with_what_main_looked_at_where_nothing_comes_between(
    more: dict[str, Any], looks_ahead: bool, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    main, own = os.getpid(), Observer.__init__

    def in_main_alone(*about: Any, **more: Any) -> None:
        if os.getpid() != main:
            raise RuntimeError  # the worker does without
        own(*about, **more)

    monkeypatch.setattr(Observer, "__init__", in_main_alone)
    told = said(caplog, loader_of(Reshuffles(), "fork", **more), epochs=1)
    assert ["dataset.order is in another order" in each for each in told] == [True] * looks_ahead


def test_where_that_look_is_at_fault_workers_look_for_themselves(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(Observer, "look_ahead", lambda self: 1 / 0)
    fault, told = said(caplog, loader_of(Reshuffles(), "fork"), epochs=1)
    assert fault.startswith("the look at what workers begin with failed")
    assert "dataset.order is in another order" in told


class Leaks(Indexed):
    def __init__(self, entry_bytes: int, first_bytes: int = 0) -> None:
        self.kept: list[bytearray] = []
        self.entry_bytes, self.first_bytes = entry_bytes, first_bytes

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> int:
        if self.entry_bytes:
            self.kept.append(bytearray(self.entry_bytes))
        if not self.kept and self.first_bytes:
            self.kept.append(bytearray(self.first_bytes))
        return index


@ways({"fork": {}, "spawn": {}})
def test_a_worker_whose_memory_grows(
    way: str, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "GREW_MIN", 24 << 20)
    # Workers that stay are asked at the end; others report as they have time.
    loader = loader_of(Leaks(1 << 20), way, num_workers=1, persistent_workers=True)
    [told] = said(caplog, loader, epochs=1)
    assert told.startswith("the memory of worker 0 grows with every batch")
    assert "dataset.kept grew meanwhile from 0 to" in told


class Settings:
    def __init__(self) -> None:
        for k in range(90):
            setattr(self, f"setting_{k}", f"{k:04d}" * 20)


class Wide(Indexed):
    """May have so many settings that they are too much for a report."""

    def __init__(self, settings: int) -> None:
        self.epoch = 0
        for k in range(settings):
            setattr(self, f"settings_{k}", Settings())

    def __getitem__(self, index: int) -> Any:
        return index + self.epoch


@pytest.mark.parametrize("settings", [1, 10])
def test_what_there_was_no_room_for_is_said_to_be_unchecked(settings: int, caplog: Any) -> None:
    dataset = Wide(settings)
    loader = loader_of(dataset, "fork", persistent_workers=True)
    list(loader)
    dataset.epoch = 3
    texts = said(caplog, loader, epochs=1)
    assert any(each.startswith("dataset.epoch is 3 here and 0 in") for each in texts)
    unchecked = [each for each in loader.audit.unchecked if "too many for a worker's" in each]
    assert len(unchecked) == (settings > 1)
    assert ("(not checked: whether the workers' copies" in str(loader.audit)) == (settings > 1)


@pytest.mark.parametrize("first", [0, 64 << 20])
def test_memory_that_is_taken_once_is_not_told(
    first: int, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "GREW_MIN", 24 << 20)
    assert said(caplog, loader_of(Leaks(0, first), "fork", num_workers=1), epochs=1) == []


@ways({"main": {}, "fork": {}})
def test_batches_that_the_loop_keeps(
    way: str, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_batches, "_memory_bytes", lambda: 200_000)
    loader = loader_of([torch.zeros(1000) for _ in range(300)], way)
    [told] = said(caplog, loader, epochs=1, keep=[])
    assert told.startswith("about ")
    assert "the oldest is batch 0 of epoch 0" in told


def as_arrays(samples: list[Any]) -> Any:
    return {"x": np.stack([each.numpy() for each in samples])}


@pytest.mark.parametrize(
    "more",
    [{"collate_fn": as_arrays}, {"transport": "torch"}, {"batch_size": None}],
    ids=["arrays", "torch's transport", "not collated"],
)
def test_batches_are_seen_whatever_way_they_come(
    more: dict[str, Any], caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_batches, "_memory_bytes", lambda: 200_000)
    dataset = [torch.zeros(1000) for _ in range(300)]
    assert len(said(caplog, loader_of(dataset, "fork", **more), epochs=1, keep=[])) == 1
    assert said(caplog, loader_of(dataset, "fork", **more), epochs=1) == []


@ways({"main": {}, "fork": {}})
def test_batches_that_the_loop_lets_go_are_not_told(
    way: str, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_batches, "_memory_bytes", lambda: 2_000_000)
    loader = loader_of([torch.zeros(1000) for _ in range(300)], way)
    assert said(caplog, loader, epochs=1) == []


class Rows(Indexed):
    def __init__(self) -> None:
        self.rows = [{"file": f"{k:08d}.jpg"} for k in range(20_000)]

    def __getitem__(self, index: int) -> str:
        return self.rows[index]["file"]


@ways({"spawn": {}, "fork": {}})
def test_workers_that_take_long_to_start(
    way: str, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "SLOW_START_S", 0.0)
    [told] = said(caplog, loader_of(Rows(), way, persistent_workers=True))
    assert told.startswith("the workers took ")
    assert ("dataset.rows (list of 20,000, about" in told) == (way == "spawn")


class FailsAtFirst(Rows):
    def __getitem__(self, index: int) -> str:
        if index == 0:
            raise ValueError("at first")
        return super().__getitem__(index)


def test_a_failure_does_not_hide_that_the_start_took_long(
    caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "SLOW_START_S", 0.0)
    loader = loader_of(FailsAtFirst(), "fork")
    caplog.clear()
    batches = iter(loader)
    with pytest.raises(ValueError, match="at first"):
        next(batches)
    for _ in batches:
        pass
    assert [each for each in caplog.messages if "the workers took" in each] != []


# ── what it may not do ───────────────────────────────────────────────────────────────────────────


class Guarded(Indexed):
    """Raises if anything of it is run but what torch runs."""

    def __init__(self) -> None:
        self.items = [Touchy() for _ in range(N)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AssertionError(f"{name} was asked for")

    @property
    def epoch(self) -> int:
        raise AssertionError("a property was read")

    def __getitem__(self, index: int) -> int:
        self.items[index].read = index
        return index


class Touchy:
    read: int = 0

    def __eq__(self, other: object) -> bool:
        raise AssertionError("was compared")

    def __hash__(self) -> int:
        raise AssertionError("was hashed")

    def __len__(self) -> int:
        raise AssertionError("was measured")

    def __repr__(self) -> str:
        raise AssertionError("was described")


@ways({"main": {}, "fork": {}, "fork, persistent": {}})
def test_nothing_of_the_dataset_is_run(way: str, caplog: Any) -> None:
    assert said(caplog, loader_of(Guarded(), way)) == []


@ways({"main": {}, "fork": {}})
def test_a_fault_of_this_part_ends_it_and_not_the_epoch(
    way: str, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(looks, "findings", fails)
    told = said(caplog, loader_of(Seeded(), way))
    assert len(told) == 1
    assert told[0].startswith("the look at what workers report failed and is off")


@pytest.mark.parametrize(("long_s", "of_epochs"), [(float("inf"), 2), (0.0, 4)])
def test_workers_of_short_epochs_look_at_themselves_in_the_first_ones(
    long_s: float, of_epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[dict[int, Any]] = []
    reports = reporting_workers.ReportingWorkers.reports

    def noting(self: Any) -> dict[int, Any]:
        found = reports(self)
        reported.append(found)
        return found

    monkeypatch.setattr(reporting_workers.ReportingWorkers, "reports", noting)
    monkeypatch.setattr(looks, "ALWAYS", 2)
    monkeypatch.setattr(looks, "SHARE", 1.0)  # main looks whenever there is something
    monkeypatch.setattr(looks, "LONG_S", long_s)
    loader = loader_of(Seeded(), "fork")
    for _ in range(4):
        reported.append({})  # of each epoch the last look counts
        for _ in loader:
            pass
        assert bool(reported[-1]) == (loader.audit.epoch < of_epochs)
