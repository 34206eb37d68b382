"""Loaders beside a card that is in use: how many workers, and how large a batch.

Two parts of `benchmarks.gpu`. The consumer does nothing with a batch; with `pin_memory=True` the
loader puts it into page-locked memory first.
"""

from __future__ import annotations

import gc
import itertools
import shutil
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.cases import PoolDataset
from benchmarks.contenders import CONTENDERS, REFERENCE
from benchmarks.gpu_budget import Budget, Row, each, size_of
from benchmarks.gpu_card import Card
from benchmarks.intervals import spread
from benchmarks.timing import DifferentBatches, EpochTime, digest, seeded, time_epoch

NAMES = (REFERENCE, "safe")
SHM = Path("/dev/shm")  # noqa: S108  (asked for its space)
DELIVERIES = {"to the CPU": False, "pinned": True}

WORKERS = (1, 2, 4, 8, 16)
BATCHES, BATCH_SIZE, SHAPE = 24, 64, (3, 224, 224)
MOST_TURNS = 8

SIZES = (38_535_168, 300_000_000, 1_200_000_000, 5_000_000_000)
TINY = (65_536, 262_144)
SAMPLES = 16
"""Of a large batch."""
SIZE_WORKERS = 2
FEWEST_BATCHES, MOST_BATCHES, EPOCH_BYTES = 4, 24, 2_000_000_000


# ------------------------------------------------------------------------------------ workers


@dataclass(frozen=True)
class WorkersCell:
    workers: int
    persistent: bool
    delivery: str

    def __str__(self) -> str:
        kind = "persistent" if self.persistent else "fresh"
        return f"{self.workers} {kind} workers, {self.delivery}"


def worker_rows(card: Card, budget: Budget) -> Iterator[Row]:
    """Stock against safe with 1 to 16 workers, persistent and fresh, delivered in both ways."""
    counts, batches, shape = WORKERS, BATCHES, SHAPE
    if card.rehearsal:
        counts, batches, shape = (1, 2), 4, (3, 16, 16)
    dataset = PoolDataset(BATCH_SIZE * batches, shape, pool=17)
    cells = [
        WorkersCell(count, persistent, delivery)
        for count, persistent, delivery in itertools.product(counts, (True, False), DELIVERIES)
    ]

    def measure(cell: WorkersCell, left: int) -> Iterator[Row]:
        turns = budget.turns(left, 1 if card.rehearsal else MOST_TURNS)
        kwargs = {
            "batch_size": BATCH_SIZE,
            "shuffle": True,
            "num_workers": cell.workers,
            "persistent_workers": cell.persistent,
            "pin_memory": DELIVERIES[cell.delivery],
        }
        with tempfile.TemporaryDirectory(prefix="safeloader-benchmark-") as folder:
            loaders = {
                name: CONTENDERS[name](dataset, seeded(kwargs), Path(folder)) for name in NAMES
            }
            firsts = [warmed_up(loader) for loader in loaders.values()]
            if firsts[0] != firsts[1]:
                raise DifferentBatches("the first batches of the two loaders are not the same")
            times: dict[str, list[EpochTime]] = {name: [] for name in NAMES}
            for turn in turns:
                for name in NAMES if turn % 2 == 0 else reversed(NAMES):
                    times[name].append(time_epoch(loaders[name], whole=not cell.persistent))
            loaders.clear()
            gc.collect()
        row: Row = {
            "table": "Workers: batches of " + size_of(4 * BATCH_SIZE * dataset.pool[0].numel()),
            "workers": cell.workers,
            "kind": "persistent" if cell.persistent else "fresh",
            "delivered": cell.delivery,
        }
        yield row | figures(times)

    yield from each(cells, measure)


def warmed_up(loader: Iterable[Any]) -> Any:
    """Run through an epoch; gives the digest of its first batch."""
    batches = iter(loader)
    first = digest(next(batches))
    for _ in batches:
        pass
    return first


def figures(times: dict[str, list[EpochTime]]) -> Row:
    """Columns of what was measured in turn."""
    pairs = zip(times[REFERENCE], times["safe"], strict=True)
    ratios = [stock.per_batch_ns / ours.per_batch_ns for stock, ours in pairs]
    found: Row = {"speed ratio": asdict(spread(ratios))}
    for title, name in (
        ("ms/batch", "per_batch_ns"),
        ("main CPU ms/batch", "main_cpu_per_batch_ns"),
        ("first batch ms", "first_batch_ns"),
    ):
        for who in NAMES:
            found[f"{who} {title}"] = (
                statistics.median(getattr(one, name) for one in times[who]) / 1e6
            )
    return found | {"turns": len(ratios), "ratios": ratios}


# -------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class SizeCell:
    size: int
    delivery: str

    def __str__(self) -> str:
        return f"batches of {size_of(self.size)}, {self.delivery}"

    @property
    def batches(self) -> int:
        return max(FEWEST_BATCHES, min(MOST_BATCHES, EPOCH_BYTES // self.size))

    @property
    def under_way(self) -> int:
        """Batches that are there at once: of each worker one, one on its way, one looked at."""
        return SIZE_WORKERS + 2


def size_rows(card: Card, budget: Budget) -> Iterator[Row]:
    """Stock against safe on batches of 38 MB to 5 GB, from two persistent workers.

    The loaders are not there at the same time, as elsewhere: their memory would have to be.
    """
    sizes = TINY if card.rehearsal else SIZES
    cells = [SizeCell(size, delivery) for size, delivery in itertools.product(sizes, DELIVERIES)]

    def measure(cell: SizeCell, left: int) -> Iterator[Row]:
        turns = budget.turns(left, 1 if card.rehearsal else MOST_TURNS)
        lacking = {name: lacks(cell, name) for name in NAMES}
        for name, reason in lacking.items():
            if reason:
                yield {"note": f"{cell}: {name} is left out: {reason}"}
        if lacking["safe"]:
            return
        dataset = PoolDataset(SAMPLES * cell.batches, (cell.size // SAMPLES // 4,), pool=3)
        times: dict[str, list[EpochTime]] = {name: [] for name in NAMES if not lacking[name]}
        ways: dict[str, int] = {}
        for turn in turns:
            for name in list(times)[:: 1 if turn % 2 == 0 else -1]:
                time, found = one_loader(name, dataset, cell)
                times[name].append(time)
                ways.update(found)
        yield size_row(cell, times, ways)

    yield from each(cells, measure)


def one_loader(name: str, dataset: PoolDataset, cell: SizeCell) -> tuple[EpochTime, dict[str, int]]:
    """An epoch of a loader that is made for it, after one that fills what it keeps.

    Returns:
        the time of a batch, of the whole epoch; and by which ways batches crossed, if it tells.

    Raises:
        DifferentBatches: where a batch is not what the dataset gives.
    """
    kwargs = {
        "batch_size": SAMPLES,
        "num_workers": SIZE_WORKERS,
        "prefetch_factor": 1,
        "persistent_workers": True,
        "pin_memory": DELIVERIES[cell.delivery],
    }
    with tempfile.TemporaryDirectory(prefix="safeloader-benchmark-") as folder:
        loader: Any = CONTENDERS[name](dataset, kwargs, Path(folder))
        for number, batch in enumerate(loader):
            looked_at(batch, dataset, number)
        del batch  # what is referred to would keep its slot
        time = time_epoch(loader, whole=True)
        stats = getattr(loader, "transport_stats", None)
        ways = {} if stats is None else dict(stats.batches)
        del loader
        gc.collect()
    return time, ways


def looked_at(batch: Tensor, dataset: PoolDataset, number: int) -> None:
    """Compare the first and the last sample; all of 5 GB would take longer than to load them."""
    for place in (0, SAMPLES - 1):
        if not torch.equal(batch[place], dataset[number * SAMPLES + place]):
            raise DifferentBatches(f"batch {number} is not what the dataset gives")


def lacks(cell: SizeCell, name: str) -> str:
    """Why a loader cannot be measured here; empty if it can.

    Args:
        cell: what would be measured.
        name: stock's batches lie in `/dev/shm`, ours in memory that it does not count.
    """
    need = cell.under_way * cell.size
    if name == REFERENCE and SHM.is_dir() and shutil.disk_usage(SHM).free < need:
        free = shutil.disk_usage(SHM).free
        return f"it needs {size_of(need)} of {SHM}, which has {size_of(free)} free"
    if DELIVERIES[cell.delivery]:
        need += cell.under_way * (1 << (cell.size - 1).bit_length())  # torch pins powers of two
    free = psutil.virtual_memory().available
    return "" if need < 0.9 * free else f"it needs {size_of(need)}, {size_of(free)} are free"


def size_row(cell: SizeCell, times: dict[str, list[EpochTime]], ways: dict[str, int]) -> Row:
    row: Row = {
        "table": "Large batches",
        "size": size_of(cell.size),
        "delivered": cell.delivery,
        "crossed by": ", ".join(f"{way} {count}" for way, count in ways.items()) or None,
    }
    for name in NAMES:
        rates = [cell.size / one.per_batch_ns for one in times.get(name, [])]
        row[f"{name} GB/s"] = statistics.median(rates) if rates else None
    if len(times) == len(NAMES):
        return row | figures(times)
    return row | {"turns": len(times["safe"])}
