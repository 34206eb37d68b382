"""Training on CUDA from pinned memory, loader against loader: `python -m benchmarks.cuda_pinned`.

Each batch is pinned by the loader (`pin_memory=True`), copied to the device with
`non_blocking=True` on the stream of the computation or on one beside it, and trained on with a
small model. Without CUDA nothing is measured, and that is said.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import environment
from benchmarks.contenders import CONTENDERS, REFERENCE
from benchmarks.intervals import Spread, spread
from benchmarks.timing import seeded

Batch = tuple[Tensor, Tensor]


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Images from a small pool, with a class each."""

    def __init__(self, length: int, size: int) -> None:
        self.length = length
        self.pool = torch.randn(37, 3, size, size, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pool[index % len(self.pool)], index % 10


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 7, stride=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


class Clock:
    """Adds up the time that `next(loader)` took.

    It wraps the loader's own iterator. Round anything later in the pipeline it would count the
    copying, and the generator's pauses, as waiting for data.
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self.waited_ns = 0
        self.count = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started_ns = time.perf_counter_ns()
        try:
            batch = next(self.batches)
        finally:
            self.waited_ns += time.perf_counter_ns() - started_ns
        self.count += 1
        return batch


def on_device(
    batches: Iterator[Batch], device: torch.device, side: torch.cuda.Stream | None
) -> Iterator[Batch]:
    """Copy to the device, one batch ahead of the one that is trained on.

    On the side stream a copy can run beside the computation. The computation then waits for it by
    an event, and the tensors are marked as used there: their memory must not be given out again
    while the computation still reads it.
    """

    def copy(batch: Batch) -> Batch:
        images, labels = batch
        with nullcontext() if side is None else torch.cuda.stream(side):
            return (
                images.to(device, non_blocking=True),
                labels.to(device, non_blocking=True),
            )

    def ready(batch: Batch) -> Batch:
        if side is not None:
            computation = torch.cuda.current_stream(device)
            computation.wait_stream(side)
            for tensor in batch:
                tensor.record_stream(computation)
        return batch

    ahead: Batch | None = None
    for batch in batches:
        # Wait before the next copy is queued, or this batch would wait for that copy too.
        now = None if ahead is None else ready(ahead)
        ahead = copy(batch)
        if now is not None:
            yield now
    if ahead is not None:
        yield ready(ahead)


@dataclass(frozen=True)
class EpochFigures:
    batches_per_s: float
    wait_share: float
    """Of the wall time, what the training loop spent waiting for the loader."""
    host_cpu_per_batch_us: float
    """CPU time of the main process, the pinning thread included."""


def train_epoch(
    loader: DataLoader[Any],
    network: nn.Module,
    device: torch.device,
    side: torch.cuda.Stream | None = None,
) -> EpochFigures:
    """Train from the first batch to the end of the epoch, which comes when the device is done."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    gc.collect()
    batches = iter(loader)
    next(batches)  # starts the workers, or sends them into the new epoch
    clock = Clock(batches)
    started_ns, started_cpu_ns = time.perf_counter_ns(), time.process_time_ns()
    for step, (images, labels) in enumerate(on_device(clock, device, side)):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        optimizer.step()
        if step % 10 == 0:
            loss.item()  # what a log line costs: the host waits for the device now and then
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall_ns = time.perf_counter_ns() - started_ns
    cpu_ns = time.process_time_ns() - started_cpu_ns
    return EpochFigures(
        batches_per_s=clock.count / wall_ns * 1e9,
        wait_share=clock.waited_ns / wall_ns,
        host_cpu_per_batch_us=cpu_ns / clock.count / 1e3,
    )


@dataclass(frozen=True)
class Row:
    size: int
    stream: str
    contender: str
    speed: Spread
    """Throughput of the contender over the stock loader's, in pairs of neighbouring epochs."""
    ratios: list[float]
    medians: EpochFigures
    reference: EpochFigures


def compare(
    size: int,
    stream: str,
    device: torch.device,
    options: argparse.Namespace,
    folder: Path,
    turns: Iterable[int] | None = None,
) -> list[Row]:
    """Epochs of all contenders in turn; `turns` in place of so many repeats can end early."""
    dataset = LabelledImages(options.batches * options.batch_size, size)
    kwargs = {
        "batch_size": options.batch_size,
        "shuffle": True,
        "drop_last": True,
        "num_workers": options.workers,
        "persistent_workers": options.workers > 0,
        "pin_memory": True,
    }
    side = None
    if stream == "side" and device.type == "cuda":
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call, unused-ignore]
    network = model().to(device)
    loaders: dict[str, DataLoader[Any]] = {}
    for name in options.contenders:
        scratch = folder / f"{size}-{stream}-{name}"
        scratch.mkdir(parents=True)
        loaders[name] = CONTENDERS[name](dataset, seeded(kwargs), scratch)
        train_epoch(loaders[name], network, device, side)  # warm-up
    figures: dict[str, list[EpochFigures]] = {name: [] for name in loaders}
    for turn in range(options.repeats) if turns is None else turns:
        for name in loaders if turn % 2 == 0 else reversed(loaders):
            figures[name].append(train_epoch(loaders[name], network, device, side))

    rows = []
    for name in list(loaders)[1:]:
        pairs = zip(figures[name], figures[REFERENCE], strict=True)
        ratios = [ours.batches_per_s / stock.batches_per_s for ours, stock in pairs]
        middle, reference = _medians(figures[name]), _medians(figures[REFERENCE])
        rows.append(Row(size, stream, name, spread(ratios), ratios, middle, reference))
    return rows


def _medians(epochs: Sequence[EpochFigures]) -> EpochFigures:
    return EpochFigures(
        statistics.median(each.batches_per_s for each in epochs),
        statistics.median(each.wait_share for each in epochs),
        statistics.median(each.host_cpu_per_batch_us for each in epochs),
    )


def line(row: Row) -> str:
    interval = "no interval"
    if row.speed.interval is not None:
        interval = "{:.2f} to {:.2f}".format(*row.speed.interval)
    ours, stock = row.medians, row.reference
    return (
        f"3x{row.size}x{row.size}, {row.stream} stream, {row.contender}: "
        f"throughput ratio {row.speed.median:.2f} ({interval}); "
        f"wait share {ours.wait_share:.0%} (stock {stock.wait_share:.0%}); "
        f"host CPU {ours.host_cpu_per_batch_us:.0f} µs a batch "
        f"(stock {stock.host_cpu_per_batch_us:.0f})"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if not torch.cuda.is_available():
        print("CUDA is not available here: nothing was measured, nothing was written.")
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="safeloader-benchmark-") as folder:
        for size in options.sizes:
            for stream in ("current", "side"):
                found = compare(size, stream, device, options, Path(folder))
                print(*map(line, found), sep="\n", flush=True)
                rows += found
    if options.out is not None:
        facts = environment.describe() | {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
        }
        settings = {
            name: getattr(options, name) for name in ("batches", "batch_size", "workers", "repeats")
        }
        whole = {
            "environment": facts,
            "settings": settings,
            "rows": [asdict(row) for row in rows],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {options.out}", file=sys.stderr)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_pinned", description=__doc__)
    parser.add_argument("--contenders", default="stock,safe", help="as in benchmarks.run")
    parser.add_argument("--sizes", default="64,224", help="edge of the images (default: 64,224)")
    parser.add_argument("--batches", type=int, default=100, help="of an epoch (default: 100)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=min(8, environment.core_count()))
    parser.add_argument("--repeats", type=int, default=12, help="epochs each (default: 12)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    options.sizes = [int(size) for size in options.sizes.split(",")]
    chosen = [name for name in options.contenders.split(",") if name != REFERENCE]
    for name in chosen:
        if name not in CONTENDERS:
            parser.error(f"no contender {name!r}; there are {', '.join(CONTENDERS)}")
    options.contenders = [REFERENCE, *dict.fromkeys(chosen)]
    return options


if __name__ == "__main__":
    sys.exit(main())
