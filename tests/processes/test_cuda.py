"""Pinned memory and copies to a card, with real workers; skipped where there is no CUDA.

`python -m benchmarks.gpu --parts tests` runs this file on a machine that may have no more than
torch, NumPy, psutil and pytest: it uses nothing of conftest.py.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from safeloader import SafeDataLoader, SafeLoaderError, SampleError, TransportError
from safeloader import WorkerCrashError as Crashed
from tests import datasets
from tests.oracle import observe, plain

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("default"),
]

CARD = "cuda"
WIDE = 200_000
"""Numbers in a row: a batch of four has 3.2 MB, so that copying it takes a while."""
BOTH = pytest.mark.parametrize("loader_class", [DataLoader, SafeDataLoader])


class Rows(Dataset[Tensor]):
    """Row ``i`` is full of ``i``."""

    def __init__(self, length: int, wide: int = WIDE) -> None:
        self.length = length
        self.wide = wide

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((self.wide,), float(index))


class Doing(Rows):
    """Does something at row 9."""

    def __init__(self, deed: Callable[[], Any], wide: int = 8) -> None:
        super().__init__(16, wide)
        self.deed = deed

    def __getitem__(self, index: int) -> Any:
        return self.deed() if index == 9 else super().__getitem__(index)


class OnTheCard(Rows):
    """Computes there, and gives back what lies here."""

    def __getitem__(self, index: int) -> Tensor:
        return (torch.arange(self.wide, device=CARD) * index).cpu()


class StaysOnTheCard(Rows):
    def __getitem__(self, index: int) -> Tensor:
        return torch.full((self.wide,), float(index), device=CARD)


class Pair(NamedTuple):
    one: Tensor
    other: Any


class Boxed:
    """A batch that pins itself."""

    def __init__(self, rows: Tensor, how: str = "as it came") -> None:
        self.rows = rows
        self.how = how

    def pin_memory(self) -> Boxed:
        return Boxed(self.rows.pin_memory(), "by its own method")


class Unpinnable(Boxed):
    def pin_memory(self) -> Boxed:
        raise BufferError("no page-locked memory left")


def boxed(samples: list[Tensor]) -> Boxed:
    return Boxed(torch.stack(samples))


def unpinnable(samples: list[Tensor]) -> Boxed:
    return Unpinnable(torch.stack(samples))


def nested(samples: list[Tensor]) -> Any:
    rows = torch.stack(samples)
    return {
        "pair": Pair(rows, [rows[:, 0].clone(), "text", None]),
        "deep": {"tuple": (rows[0].long(), b"bytes", 3)},
        "boxed": Boxed(rows[1]),
        "empty": torch.zeros(0, 3),
    }


def leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from leaves(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from leaves(each)
    elif isinstance(value, Boxed):
        yield value.rows


def unboxed(value: Any) -> Any:
    """The same in plain values, for comparing."""
    if isinstance(value, Boxed):
        return "Boxed", value.how, plain(value.rows)
    if isinstance(value, dict):
        return {key: unboxed(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value).__name__, [unboxed(each) for each in value]
    return plain(value)


def raises_key_error() -> Any:
    raise KeyError("no such row")


def uses_the_card() -> Any:
    return torch.ones(8, device=CARD).cpu()


def kills_itself() -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def loader_of(loader_class: type, dataset: Any, **more: Any) -> Any:
    kwargs = {"batch_size": 4, "num_workers": 2, "pin_memory": True} | more
    return loader_class(dataset, **kwargs)


def rows_of(number: int, wide: int = WIDE) -> Tensor:
    """Batch ``number`` of `Rows`."""
    first = 4.0 * number
    return torch.arange(first, first + 4)[:, None].expand(4, wide)


def right(batches: list[Tensor]) -> bool:
    return all(
        torch.equal(batch.cpu(), rows_of(number, batch.shape[1]))
        for number, batch in enumerate(batches)
    )


def keep_busy() -> None:
    """Give the current stream something to do for a while."""
    one = torch.ones(4096, 4096, device=CARD)
    for _ in range(20):
        one = one @ one / 4096


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """As in conftest.py, which is not read on a machine with a card."""
    yield
    gc.collect()


@pytest.fixture
def initialised() -> None:
    """As in a program that has used the card before it makes a loader."""
    torch.ones(1, device=CARD)
    assert torch.cuda.is_initialized()  # type: ignore[no-untyped-call, unused-ignore]


# ── the same batches ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("dataset", "more"),
    [
        (datasets.Noisy, {"num_workers": 0, "shuffle": True}),
        (datasets.Noisy, {"shuffle": True}),
        (datasets.Noisy, {"shuffle": True, "persistent_workers": True}),
        (datasets.Noisy, {"shuffle": True, "batch_size": None}),
        (datasets.Together, {"drop_last": True}),
        (datasets.Stream, {}),
        (datasets.Noisy, {"collate_fn": datasets.collate_with_info}),
    ],
)
def test_pinned_batches_and_generators_are_the_stock_loaders(
    dataset: type, more: dict[str, Any], initialised: None
) -> None:
    def make(loader_class: type) -> Any:
        return loader_of(loader_class, dataset(), **more)

    assert observe(SafeDataLoader, make) == observe(DataLoader, make)


@BOTH
@pytest.mark.parametrize("workers", [0, 2])
def test_every_tensor_is_pinned(loader_class: type, workers: int) -> None:
    batches = list(loader_of(loader_class, Rows(8, 40), num_workers=workers, collate_fn=nested))
    found = list(leaves(batches))
    assert len(found) == 10
    assert all(leaf.is_pinned() for leaf in found if leaf.numel())


@pytest.mark.parametrize("collate", [boxed, nested])
@pytest.mark.parametrize("workers", [0, 2])
def test_pin_memory_of_a_batchs_own_is_called_as_by_the_stock_loader(
    collate: Callable[..., Any], workers: int
) -> None:
    stock, ours = (
        [
            unboxed(batch)
            for batch in loader_of(kind, Rows(12), num_workers=workers, collate_fn=collate)
        ]
        for kind in (DataLoader, SafeDataLoader)
    )
    assert ours == stock
    assert "by its own method" in str(ours)


def test_the_cards_generator_is_left_alone(initialised: None) -> None:
    before = torch.cuda.get_rng_state()
    list(loader_of(SafeDataLoader, Rows(16), shuffle=True, seed=3))
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_samples_that_lie_on_the_card_are_stacked_there() -> None:
    stock, ours = (
        list(kind(StaysOnTheCard(8, 16), batch_size=4)) for kind in (DataLoader, SafeDataLoader)
    )
    assert all(batch.is_cuda for batch in ours)
    assert torch.equal(torch.stack(ours), torch.stack(stock))


# ── slots that go back ───────────────────────────────────────────────────────────────────────────


def test_batches_that_are_kept_are_not_overwritten() -> None:
    """A pinned batch is a copy: its slot goes back at once, and serves many more."""
    loader = loader_of(SafeDataLoader, Rows(400, 20_000), persistent_workers=True, checksum=True)
    kept = [list(loader), list(loader)]
    assert all(map(right, kept))
    assert all(batch.is_pinned() for batch in kept[1])
    assert loader.transport_stats.batches == {"slots": 200}
    assert loader.transport_stats.slots < 50


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("stream", ["current", "side"])
def test_copies_that_nobody_waits_for_bring_the_bytes_that_were_sent(
    pinned: bool, stream: str
) -> None:
    """The card is busy, so that a pinned copy starts long after its batch was let go."""
    side = torch.cuda.Stream() if stream == "side" else torch.cuda.current_stream()
    computation = torch.cuda.current_stream()
    arrived = []
    for batch in loader_of(SafeDataLoader, Rows(160), pin_memory=pinned, persistent_workers=True):
        with torch.cuda.stream(side):
            keep_busy()
            on_card = batch.to(CARD, non_blocking=True)
        del batch
        computation.wait_stream(side)
        on_card.record_stream(computation)
        arrived.append(on_card * 1)
        del on_card
    torch.cuda.synchronize()
    assert len(arrived) == 40
    assert right(arrived)


def test_slots_outlive_fresh_workers_and_kept_batches_stay() -> None:
    loader = loader_of(SafeDataLoader, Rows(40, 20_000))
    unpinned = loader_of(SafeDataLoader, Rows(40, 20_000), pin_memory=False)
    kept = []
    for _ in range(4):
        kept += [list(loader), list(unpinned)]
        on_card = [batch.to(CARD, non_blocking=True) for batch in unpinned]
        torch.cuda.synchronize()
        assert right(on_card)
    assert all(map(right, kept))


def test_an_epoch_that_is_left_early() -> None:
    def pinning() -> int:
        return sum("pin_memory" in each.name for each in threading.enumerate())

    before = pinning()
    loader = loader_of(SafeDataLoader, Rows(80, 20_000))
    for _ in range(3):
        for batch in loader:
            on_card = batch.to(CARD, non_blocking=True)
            break
        assert torch.equal(on_card.cpu(), rows_of(0, 20_000))
    del batch
    assert right(list(loader))
    assert loader.audit.ok
    give_up = time.monotonic() + 20
    while pinning() > before and time.monotonic() < give_up:
        time.sleep(0.01)
    assert pinning() == before


# ── failures ─────────────────────────────────────────────────────────────────────────────────────


def failure_of(loader: Any, kind: type[BaseException]) -> BaseException:
    with pytest.raises(kind) as caught:
        list(loader)
    error = caught.value.with_traceback(None)
    del caught, loader
    gc.collect()  # the stock loader's iterator: workers that inherit it may hang as they free it
    return error


def test_a_failing_sample_is_told_with_its_index() -> None:
    stock = failure_of(loader_of(DataLoader, Doing(raises_key_error)), KeyError)
    ours = failure_of(loader_of(SafeDataLoader, Doing(raises_key_error)), KeyError)
    assert isinstance(ours, SampleError)
    assert ours.index == 9
    assert str(ours).lstrip("'\"").startswith("Caught KeyError in DataLoader worker process 0")
    assert "Caught KeyError in DataLoader worker process 0" in str(stock)


def test_a_batch_that_cannot_be_pinned_is_told_with_its_indices() -> None:
    loader = loader_of(SafeDataLoader, Rows(8, 8), collate_fn=unpinnable)
    ours = failure_of(loader, BufferError)
    assert isinstance(ours, TransportError)
    assert ours.failure is not None
    assert list(ours.failure.indices) == [0, 1, 2, 3]
    assert "no page-locked memory left" in str(ours)


def test_a_worker_that_is_killed_is_told_with_the_index_that_it_was_at() -> None:
    ours = failure_of(loader_of(SafeDataLoader, Doing(kills_itself)), RuntimeError)
    assert isinstance(ours, Crashed)
    assert ours.index == 9


# ── start methods ────────────────────────────────────────────────────────────────────────────────


def test_a_forked_worker_that_uses_the_card_fails_as_under_the_stock_loader(
    initialised: None,
) -> None:
    more = {"multiprocessing_context": "fork"}
    stock = failure_of(loader_of(DataLoader, Doing(uses_the_card), **more), RuntimeError)
    ours = failure_of(loader_of(SafeDataLoader, Doing(uses_the_card), **more), RuntimeError)
    for each in (stock, ours):
        assert "Cannot re-initialize CUDA in forked subprocess" in str(each)
    assert isinstance(ours, SafeLoaderError)
    assert ours.index == 9
    torch.ones(1, device=CARD)  # nothing is broken here


def test_spawned_workers_may_use_the_card(initialised: None) -> None:
    more = {"multiprocessing_context": "spawn", "num_workers": 1}
    stock, ours = (
        list(loader_of(kind, OnTheCard(12, 20_000), **more))
        for kind in (DataLoader, SafeDataLoader)
    )
    assert torch.equal(torch.stack(ours), torch.stack(stock))
    assert all(batch.is_pinned() for batch in ours)
