"""What collate functions and datasets do with memory: the same batches as with the stock loader."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate
from torch.utils.data._utils.collate import collate as collate_with
from torch.utils.data._utils.collate import default_collate_fn_map

from safeloader import SafeDataLoader
from tests.oracle import seed_all
from tests.telling import after_changes, told

N = 3000  # a sample of so many numbers is too large to cross within a message


class Rows:
    """Sample ``i`` is made of ``i``."""

    def __init__(self, make: Callable[[int], Any], length: int = 12) -> None:
        self.make = make
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def row(index: int) -> torch.Tensor:
    return torch.arange(N, dtype=torch.float32) + index


def mixed(index: int) -> Any:
    array = np.arange(float(N)) * index
    return {"t": row(index), "a": array, "l": index, "s": [str(index), (row(index)[:2], 0.5)]}


class Cached:
    """Gives its first result for ever."""

    result: Any = None

    def __call__(self, samples: list[Any]) -> Any:
        if self.result is None:
            self.result = default_collate(samples)
        return self.result


class Keeps:
    """Gives each result again, with the next one; and keeps all of them."""

    def __init__(self) -> None:
        self.kept: list[Any] = [torch.zeros(1)]

    def __call__(self, samples: list[Any]) -> Any:
        self.kept.append(default_collate(samples))
        return self.kept[-1], self.kept[-2][0], self.kept[len(self.kept) // 2].clone()


def in_threads(samples: list[Any]) -> Any:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(default_collate, [samples, samples[:2]])), default_collate(samples)


def given_up_half_way(samples: list[Any]) -> Any:
    default_collate(samples)  # and not given
    return default_collate(samples)[:, ::3], default_collate([samples[0]])


def views(samples: list[Any]) -> Any:
    batch = default_collate(samples)
    return [*batch, batch, batch.t(), batch[:, ::2], batch.numpy(), batch.view(torch.int32)]


def changed(samples: list[Any]) -> Any:
    batch = default_collate(samples)
    batch += 1
    batch.detach_()
    return batch.requires_grad_()


def moved_to_shared_memory(samples: list[Any]) -> Any:
    return default_collate(samples).share_memory_()


def by_a_map_of_its_own(samples: list[Any]) -> Any:
    def reversed_stack(batch: Any, *, collate_fn_map: Any = None) -> Any:
        return torch.stack(batch[::-1])

    own = {**default_collate_fn_map, torch.Tensor: reversed_stack}
    return collate_with(samples, collate_fn_map=own), default_collate(samples)


class Point:
    def __init__(self, at: torch.Tensor) -> None:
        self.at = at


def register_point(worker: int) -> None:
    def stacked(batch: Any, *, collate_fn_map: Any = None) -> Any:
        return {"at": collate_with([point.at for point in batch], collate_fn_map=collate_fn_map)}

    default_collate_fn_map[Point] = stacked


def register_own_stack(worker: int) -> None:
    default_collate_fn_map[torch.Tensor] = lambda batch, collate_fn_map=None: torch.stack(batch) * 2


def other_default_device(worker: int) -> None:
    torch.set_default_device("meta")


def deterministic(worker: int) -> None:
    torch.use_deterministic_algorithms(True)


class InnerLoader:
    def __init__(self, inner: type) -> None:
        self.inner = inner

    def __call__(self, index: int) -> Any:
        return list(self.inner(Rows(row, 4), batch_size=2, shuffle=True))


def list_of(samples: list[Any]) -> Any:
    return samples


huge = torch.arange(400.0 * N).view(-1, N)
once = row(5)
as_array = np.arange(2.0 * N)


CASES: dict[str, dict[str, Any]] = {
    "default": {"make": row},
    "mixed": {"make": mixed},
    "arrays": {"make": lambda i: np.arange(float(N)) * i},
    "of other types": {"make": lambda i: row(i).to(torch.float64 if i % 2 else torch.float32)},
    "transposed": {"make": lambda i: row(i).view(2, -1).t()},
    "requires grad": {"make": lambda i: row(i).requires_grad_()},
    "caches its result": {"make": row, "collate_fn": Cached},
    "keeps its results": {"make": row, "collate_fn": Keeps},
    "threads": {"make": row, "collate_fn": lambda: in_threads},
    "collates what it does not give": {"make": row, "collate_fn": lambda: given_up_half_way},
    "views": {"make": row, "collate_fn": lambda: views},
    "changes its result": {"make": row, "collate_fn": lambda: changed},
    "shares": {"make": row, "collate_fn": lambda: moved_to_shared_memory},
    "map of its own": {"make": row, "collate_fn": lambda: by_a_map_of_its_own},
    "registered class": {"make": lambda i: Point(row(i)), "worker_init_fn": register_point},
    "registered stack": {"make": row, "worker_init_fn": register_own_stack},
    "collates samples": {"make": lambda i: default_collate([mixed(i), mixed(i + 1)])},
    "collates samples, listed": {
        "make": lambda i: default_collate([row(i), row(i + 1)]),
        "collate_fn": lambda: list_of,
    },
    "view of a huge one": {"make": lambda i: huge[i * 7], "collate_fn": lambda: list_of},
    "neighbours in a huge one": {"make": lambda i: huge[i], "collate_fn": lambda: list_of},
    "windows of a huge one": {
        "make": lambda i: huge.view(-1)[i * 2000 : i * 2000 + N],
        "collate_fn": lambda: list_of,
    },
    "the same one always": {"make": lambda i: once, "collate_fn": lambda: list_of},
    "over one array": {
        "make": lambda i: torch.from_numpy(as_array),
        "collate_fn": lambda: list_of,
    },
    "other default device": {
        "make": lambda i: torch.from_numpy(np.arange(float(N)) * i),
        "worker_init_fn": other_default_device,
    },
    "other default device, small": {
        "make": lambda i: torch.from_numpy(np.arange(3.0) * i),
        "worker_init_fn": other_default_device,
    },
    "deterministic": {"make": row, "worker_init_fn": deterministic},
}


def loader_of(loader_class: type, name: str, **extra: Any) -> Any:
    case = dict(CASES[name])
    if "collate_fn" in case:
        case["collate_fn"] = case["collate_fn"]()
    return loader_class(Rows(case.pop("make")), batch_size=4, num_workers=1, **case, **extra)


def observed(loader_class: type, name: str, **extra: Any) -> Any:
    seed_all(3)
    try:
        kept = list(loader_of(loader_class, name, **extra))
    except Exception as exc:
        lines = [line for line in str(exc).splitlines() if "Error: " in line]
        return lines[0]
    return [told(batch) for batch in kept], after_changes(kept[0])


@pytest.fixture(scope="module")
def stock() -> dict[str, Any]:
    found = {name: observed(DataLoader, name) for name in CASES}
    gc.collect()
    return found


@pytest.mark.parametrize("name", CASES)
def test_what_is_done_with_memory_is_as_with_the_stock_loader(
    name: str, stock: dict[str, Any]
) -> None:
    assert observed(SafeDataLoader, name) == stock[name]


def test_conjugates_are_collated_as_without_workers() -> None:
    """With workers torch raises: the memory it makes for them is conjugate as well."""
    dataset = Rows(lambda i: torch.complex(row(i), row(i)).conj())
    ours = SafeDataLoader(dataset, batch_size=4, num_workers=1)
    expected = DataLoader(dataset, batch_size=4)
    assert [told(batch) for batch in ours] == [told(batch) for batch in expected]


@pytest.mark.parametrize("inner", [DataLoader, SafeDataLoader])
def test_loaders_within_the_dataset(inner: type) -> None:
    def all_of(loader_class: type) -> Any:
        seed_all(3)
        dataset = Rows(InnerLoader(inner))
        return [told(batch) for batch in loader_class(dataset, batch_size=4, num_workers=1)]

    assert all_of(SafeDataLoader) == all_of(DataLoader)


def test_a_view_of_a_huge_tensor_does_not_bring_all_of_it() -> None:
    loader = loader_of(SafeDataLoader, "view of a huge one")
    for batch in loader:
        assert all(each.untyped_storage().nbytes() < 2 * each.nbytes for each in batch)
    assert loader.transport_stats.batches == {"slots": 3}
    assert loader.transport_stats.bytes < huge.nbytes / 4


@pytest.mark.parametrize("name", ["neighbours in a huge one", "windows of a huge one", "views"])
def test_views_that_overlap_cross_in_slots_too(name: str) -> None:
    loader = loader_of(SafeDataLoader, name)
    assert len(list(loader)) == 3
    assert loader.transport_stats.batches == {"slots": 3}


@pytest.mark.parametrize("loader_class", [DataLoader, SafeDataLoader])
def test_the_datasets_own_shared_tensor_stays_shared(loader_class: type) -> None:
    shared = torch.zeros(4, N).share_memory_()
    batches = list(loader_class(Rows(lambda i: shared[i], 4), batch_size=None, num_workers=1))
    batches[2].fill_(7)
    assert shared[2].eq(7).all()
    assert shared[1].eq(0).all()


@pytest.mark.parametrize("loader_class", [DataLoader, SafeDataLoader])
@pytest.mark.parametrize("name", ["mixed", "views", "windows of a huge one"])
def test_the_default_device_of_the_training_loop_changes_nothing(
    loader_class: type, name: str
) -> None:
    batches = iter(loader_of(loader_class, name))
    with torch.device("meta"):
        batch = next(batches)
    assert told(batch) == told(next(iter(loader_of(SafeDataLoader, name))))


@pytest.mark.parametrize("name", ["default", "views", "windows of a huge one"])
def test_loops_in_inference_mode_get_inference_tensors(name: str) -> None:
    def first(loader_class: type) -> Any:
        with torch.inference_mode():
            batch = next(iter(loader_of(loader_class, name)))
            return [each.is_inference() for each in batch if isinstance(each, torch.Tensor)]

    assert first(SafeDataLoader) == first(DataLoader)
