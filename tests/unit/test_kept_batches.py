"""Which batches count as kept by the loop, and how many; and what they lie in."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from safeloader import SafeDataLoader
from safeloader.introspect.memories import memories, memory_of
from safeloader.supervision import kept_batches
from safeloader.supervision.kept_batches import EVERY_MAX, KeptBatches

MEMORY = 1_000_000  # bytes of the machine: a batch of 4,000 is watched each time
LARGE = 1000  # numbers of such a batch
SMALL = 16  # of one of which each 62nd is


@pytest.fixture(autouse=True)
def a_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_batches, "_memory_bytes", lambda: MEMORY)


def told(
    batches: Iterable[Any],
    keep: Callable[[int, Any], Any] = lambda number, batch: batch,
    *,
    dataset: Any = None,
    an_epoch: int = 10**9,
) -> int | None:
    """How many batches are said to be kept by a loop that keeps what ``keep`` gives; or None."""
    watch, held = KeptBatches(), []
    for number, batch in enumerate(batches):
        epoch, within = divmod(number, an_epoch)
        if not within:
            watch.begin()
        if within >= watch.due:
            watch.note(epoch, within, batch)
        held.append(keep(number, batch))
        del batch
    found = [each.text for each in watch.finding((dataset,))]
    if not found:
        return None
    number_of = re.match(r"about ([\d,]+) batches", found[0])
    assert number_of is not None
    return int(number_of[1].replace(",", ""))


def fresh(count: int, numbers: int) -> Iterable[torch.Tensor]:
    return (torch.zeros(numbers) for _ in range(count))


def let_go(number: int, batch: Any) -> None:
    """A loop that keeps nothing."""


# ── how many ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("numbers", [LARGE, 100, SMALL])
def test_all_that_are_kept_are_counted(numbers: int) -> None:
    count = 800_000 // numbers
    assert told(fresh(count, numbers)) == pytest.approx(count, rel=0.02)
    assert told(fresh(count, numbers), let_go) is None


@pytest.mark.parametrize("period", [2, 3, 5, 8, 31, 62, 64, 100, 124, 250, EVERY_MAX])
def test_of_a_loop_that_keeps_each_nth_no_more_are_counted(period: int) -> None:
    def each_nth(number: int, batch: Any) -> Any:
        return None if number % period else batch

    count = 10_000
    kept = count // period
    said = told(fresh(count, SMALL), each_nth)
    if kept * 4 * SMALL < 0.08 * MEMORY:
        assert said is None
    elif kept * 4 * SMALL > 0.12 * MEMORY:
        assert said == pytest.approx(kept, rel=0.2)
    said = told(fresh(count, SMALL), each_nth, an_epoch=period)  # always the first of an epoch
    assert said is None or said == pytest.approx(kept, rel=0.5)


def test_batches_of_short_epochs_are_counted_too() -> None:
    said = told(fresh(12_000, SMALL), an_epoch=7)
    assert said == pytest.approx(12_000, rel=0.2)


def test_a_small_batch_before_large_ones_does_not_hide_them() -> None:
    def mixed() -> Iterable[torch.Tensor]:
        yield torch.zeros(1)
        yield from fresh(100, LARGE)

    assert told(mixed()) == pytest.approx(101, rel=0.2)


def test_only_the_part_that_is_kept_counts() -> None:
    def pairs() -> Iterable[Any]:
        return ({"x": torch.zeros(LARGE), "y": torch.zeros(2)} for _ in range(200))

    assert told(pairs(), lambda _, batch: batch["y"]) is None
    assert told(pairs(), lambda _, batch: batch["x"]) == pytest.approx(200, rel=0.05)
    one_of_many = ({k: torch.zeros(LARGE // 50) for k in range(50)} for _ in range(200))
    assert told(one_of_many, lambda _, batch: batch[0]) is None


def test_a_tensor_seen_twice_in_a_batch_or_expanded_takes_its_memory_once() -> None:
    def seen_often() -> Iterable[Any]:
        for each in fresh(40, 500):  # 80 kB
            yield {"x": each, "view": each.view(5, 100), "mask": each[:, None].expand(500, 500)}

    def really() -> Iterable[Any]:
        return ({"x": each, "view": each.view(5, 200)} for each in fresh(40, LARGE))

    assert told(seen_often()) is None
    assert told(really()) == 40


def test_a_view_that_is_kept_keeps_the_batch() -> None:
    assert told(fresh(100, LARGE), lambda _, batch: batch[:1]) == 100
    assert told(fresh(100, LARGE), lambda _, batch: batch[:1].detach().numpy()) == 100
    assert told(fresh(100, LARGE), lambda _, batch: batch[:1].clone()) is None


# ── what the dataset holds ───────────────────────────────────────────────────────────────────────


def own_tensor() -> tuple[Any, Iterable[Any]]:
    graph = torch.zeros(LARGE)
    return None, (graph for _ in range(200))  # where is not known: it comes again


def own_list() -> tuple[Any, Iterable[Any]]:
    held = list(fresh(200, LARGE))
    return held, held


def own_list_of_pairs() -> tuple[Any, Iterable[Any]]:
    held = [(each, 1) for each in fresh(200, LARGE)]
    return SimpleNamespace(names=["a"] * 10_000, samples=held, counts=[1] * 10_000), held


def own_shuffled() -> tuple[Any, Iterable[Any]]:
    held = list(fresh(3000, LARGE))
    order = np.random.default_rng(0).permutation(3000)
    return SimpleNamespace(inner=SimpleNamespace(samples=held)), (held[k] for k in order)


def own_rows_of_an_array() -> tuple[Any, Iterable[Any]]:
    rows = np.zeros((200, LARGE), np.float32)
    return SimpleNamespace(rows=rows), (torch.from_numpy(rows[k]) for k in range(200))


def own_rows_of_a_tensor() -> tuple[Any, Iterable[Any]]:
    rows = torch.zeros(200, LARGE)
    return None, (rows[k] for k in range(200))


def own_arrays() -> tuple[Any, Iterable[Any]]:
    held = {k: np.zeros(LARGE, np.float32) for k in range(200)}
    return SimpleNamespace(cache=held), ({"x": each} for each in held.values())


def own_variable() -> tuple[Any, Iterable[Any]]:
    def shards() -> Iterable[Any]:
        shard = list(fresh(200, LARGE))
        yield from shard

    made = shards()
    return made, made


def own_closure() -> tuple[Any, Iterable[Any]]:
    buffers = list(fresh(200, LARGE))

    def collate(number: int) -> Any:
        return buffers[number]

    return SimpleNamespace(collate_fn=collate), map(collate, range(200))


def own_buffers() -> tuple[Any, Iterable[Any]]:
    ring = [torch.zeros(LARGE) for _ in range(60)]  # of the collate function: out of sight
    return None, (ring[k % 60] for k in range(200))


OWN = [
    own_tensor,
    own_list,
    own_list_of_pairs,
    own_shuffled,
    own_rows_of_an_array,
    own_rows_of_a_tensor,
    own_arrays,
    own_variable,
    own_closure,
    own_buffers,
]


@pytest.mark.parametrize("make", OWN)
def test_what_the_dataset_holds_is_not_kept_by_the_loop(
    make: Callable[[], tuple[Any, Iterable[Any]]],
) -> None:
    dataset, batches = make()
    assert told(batches, let_go, dataset=dataset) is None
    dataset, batches = make()
    copies = (torch.cat([torch.as_tensor(leaf) for leaf in leaves_of(each)]) for each in batches)
    assert told(copies, dataset=dataset) is not None


def leaves_of(batch: Any) -> list[Any]:
    if isinstance(batch, dict):
        return list(batch.values())
    return [batch[0]] if isinstance(batch, tuple) else [batch]


def test_beside_what_the_dataset_holds_what_the_loop_keeps_is_told() -> None:
    graph = torch.zeros(4 * LARGE)

    def batches() -> Iterable[Any]:
        return ({"graph": graph, "x": each} for each in fresh(200, LARGE))

    assert told(batches()) == pytest.approx(200, rel=0.05)
    assert told(batches(), let_go) is None


def test_memory_that_was_let_go_and_came_again_counts() -> None:
    watch, held = KeptBatches(), []
    for number in range(200):
        batch = torch.zeros(LARGE)
        watch.note(0, number, batch)
        if number >= 100:  # the first hundred are gone, and their addresses are given again
            held.append(batch)
    assert len(list(watch.finding(()))) == 1


# ── kinds of batches ─────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass
class Record:
    x: Any


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: Any) -> None:
        self.x = x


Pair = collections.namedtuple("Pair", "x y")


def graph(x: Any) -> Any:
    """Of the kind of PyTorch Geometric's HeteroData: stores by type, in objects over a dict."""
    return SimpleNamespace(_stores={"user": SimpleNamespace(_mapping={"x": x}, _parent=None)})


KINDS: list[Callable[[Any], Any]] = [
    lambda x: x,
    lambda x: collections.UserDict(x=x),
    lambda x: {"inputs": collections.UserDict(x=x), "paths": ["a"] * 500},
    Record,
    lambda x: [Record(x)],
    Slotted,
    lambda x: Pair(x, 1),
    graph,
    torch.nn.Parameter,
    lambda x: x.numpy(),
    lambda x: {"x": x.numpy().copy()},
]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_each_kind_are_seen(kind: Callable[[Any], Any]) -> None:
    assert told(map(kind, fresh(100, LARGE))) == 100
    assert told(map(kind, fresh(100, LARGE)), let_go) is None


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of kinds that are seldom
def test_what_takes_no_memory_of_this_machine_does_not_count(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "rows", np.float32, "w+", shape=(100, LARGE))
    odd = [
        torch.zeros(LARGE, device="meta"),
        torch.sparse_coo_tensor(torch.zeros((1, 1), dtype=torch.long), torch.ones(1), (LARGE,)),
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        torch.zeros(0),
        np.zeros(0),
        np.array("text"),
        torch,
        torch.Tensor,
    ]
    assert told([odd, *odd] * 20) is None
    assert told(mapped[k] for k in range(100)) is None


def test_a_value_that_holds_itself_is_looked_at_to_a_bound() -> None:
    endless: dict[str, Any] = {"x": torch.zeros(2)}
    endless["again"] = [endless] * 1000
    found, all_of_it = memories(endless, 100)
    assert (0 < len(found) < 100, all_of_it) == (True, False)


def test_an_array_over_a_tensor_lies_in_its_storage() -> None:
    tensor = torch.zeros(4, 5)
    array = memory_of(tensor.numpy()[1:])
    assert array is not None
    assert array.owner is tensor.untyped_storage()
    assert (array.size_bytes, array.used_bytes) == (80, 60)


# ── with a loader ────────────────────────────────────────────────────────────────────────────────


def warnings_of(loader: Any, caplog: pytest.LogCaptureFixture, epochs: int, keep: bool) -> Any:
    caplog.clear()
    kept = []
    for _ in range(epochs):
        for batch in loader:
            if keep:
                kept.append(batch)
    return [each for each in caplog.messages if "still held" in each]


def test_a_loader_over_batches_that_are_held_anyway(caplog: pytest.LogCaptureFixture) -> None:
    held = list(fresh(200, LARGE))
    loader = SafeDataLoader(held, batch_size=None)  # type: ignore[arg-type]
    assert warnings_of(loader, caplog, epochs=3, keep=False) == []
    loader = SafeDataLoader(held, batch_size=1)  # type: ignore[arg-type]
    assert len(warnings_of(loader, caplog, epochs=1, keep=True)) == 1


class Shards(IterableDataset[Any]):
    """Gives the elements of a list that nothing but its generator holds."""

    def __init__(self, copies: bool) -> None:
        self.copies = copies

    def __iter__(self) -> Any:
        shard = list(fresh(200, LARGE))
        for each in shard:
            yield each.clone() if self.copies else each


def test_a_stream_that_holds_its_shard(caplog: pytest.LogCaptureFixture) -> None:
    loader = SafeDataLoader(Shards(copies=False), batch_size=None)
    assert warnings_of(loader, caplog, epochs=2, keep=False) == []
    loader = SafeDataLoader(Shards(copies=True), batch_size=None)
    assert len(warnings_of(loader, caplog, epochs=1, keep=True)) == 1


# ── what the dataset's code keeps outside of the dataset


KEPT: dict[int, torch.Tensor] = {}


def made(index: int) -> torch.Tensor:
    return torch.full((LARGE,), float(index))


@functools.lru_cache(None)
def loaded(index: int) -> torch.Tensor:
    return made(index)


@functools.lru_cache(60)
def bounded(index: int) -> torch.Tensor:
    return made(index)


def remembered(index: int) -> torch.Tensor:
    if index not in KEPT:
        KEPT[index] = made(index)
    return KEPT[index]


class Remembering:
    held: ClassVar[dict[int, torch.Tensor]] = {}

    def __init__(self, way: str) -> None:
        self.way = way

    @functools.lru_cache(None)  # noqa: B019
    def by_method(self, index: int) -> torch.Tensor:
        return made(index)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.way == "module":
            return KEPT.setdefault(index, made(index))
        if self.way == "class":
            return self.held.setdefault(index, made(index))
        if self.way == "method":
            return self.by_method(index)
        return {"function": loaded, "bounded": bounded, "another function": remembered}[self.way](
            index
        )


WAYS = ["module", "class", "method", "function", "bounded", "another function"]


@pytest.mark.parametrize("way", WAYS)
def test_what_a_dataset_keeps_outside_of_it_is_not_kept_by_the_loop(way: str) -> None:
    for cache in (KEPT, Remembering.held):
        cache.clear()
    for cached in (loaded, bounded, Remembering.by_method):
        cached.cache_clear()
    dataset = Remembering(way)
    assert told((dataset[k] for k in range(50)), lambda k, batch: None, dataset=dataset) is None


def test_a_list_at_module_level_that_the_loop_alone_fills_is_the_loops() -> None:
    class Plain:
        def __getitem__(self, index: int) -> torch.Tensor:
            return made(index)

    dataset = Plain()
    assert told((dataset[k] for k in range(50)), dataset=dataset) == 50
    KEPT.clear()
    assert told((dataset[k] for k in range(50)), KEPT.__setitem__, dataset=dataset) == 50
    KEPT.clear()
