"""Training steps on the card: what loaders make of them, and when the card has nothing to do.

Two parts of `benchmarks.gpu`. The first is the comparison of `benchmarks.cuda_pinned`. The second
gives a step a length, and has the card note when it has done what there was, when the next batch
had come, and when it could begin to compute.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import environment
from benchmarks.contenders import CONTENDERS, REFERENCE
from benchmarks.cuda_pinned import Batch, LabelledImages, compare, model, on_device
from benchmarks.gpu_budget import Budget, Row, Turns, each
from benchmarks.gpu_card import Card, Event
from benchmarks.intervals import spread
from benchmarks.timing import seeded

NAMES = (REFERENCE, "safe")
STREAMS = ("current", "side")
SIZES = (64, 224)
STEPS_MS = (2.0, 10.0)
BATCHES, BATCH_SIZE, MOST_TURNS = 60, 64, 12


def workers() -> int:
    return max(1, min(8, environment.core_count()))


# --------------------------------------------------------------------------------- comparison


def pinned_rows(card: Card, budget: Budget) -> Iterator[Row]:
    """Stock against safe, batches copied on the stream of the computation and on one beside it."""
    sizes = (32,) if card.rehearsal else SIZES
    options = argparse.Namespace(
        contenders=list(NAMES),
        batches=4 if card.rehearsal else BATCHES,
        batch_size=4 if card.rehearsal else BATCH_SIZE,
        workers=1 if card.rehearsal else workers(),
    )

    def measure(cell: tuple[int, str], left: int) -> Iterator[Row]:
        size, stream = cell
        turns = budget.turns(left, 1 if card.rehearsal else MOST_TURNS)
        with tempfile.TemporaryDirectory(prefix="safeloader-benchmark-") as folder:
            (row,) = compare(size, stream, card.device, options, Path(folder), turns)
        gc.collect()
        yield {
            "table": f"Training from pinned memory, {options.workers} persistent workers",
            "images": f"{options.batch_size} x 3x{size}x{size}",
            "stream": stream,
            "speed ratio": asdict(row.speed),
            "stock batches/s": row.reference.batches_per_s,
            "safe batches/s": row.medians.batches_per_s,
            "stock waits, %": 100 * row.reference.wait_share,
            "safe waits, %": 100 * row.medians.wait_share,
            "stock main CPU ms/batch": row.reference.host_cpu_per_batch_us / 1e3,
            "safe main CPU ms/batch": row.medians.host_cpu_per_batch_us / 1e3,
            "turns": len(row.ratios),
            "ratios": row.ratios,
        }

    yield from each(list(itertools.product(sizes, STREAMS)), measure)


# --------------------------------------------------------------------------------------- idle


class Marked:
    """The loader's iterator; the card notes when it came to each batch's arrival.

    The point lies behind all that was given to the card before, and before the batch's copy.
    """

    def __init__(self, batches: Iterator[Batch], card: Card) -> None:
        self.batches = batches
        self.card = card
        self.arrived: list[Event] = []

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            return next(self.batches)
        finally:
            self.arrived.append(recorded(self.card))


def recorded(card: Card) -> Event:
    event = card.event()
    event.record()
    return event


@dataclass(frozen=True)
class StepFigures:
    """One epoch of training steps, from its second batch to its end."""

    batches_per_s: float
    step_ms: float
    """How long the card computed on a batch."""
    idle_share: float
    """Of the card's time, what it had nothing at all to do in."""
    not_computing_share: float
    """Of its time, what it did not compute in: idle, or copying, or waiting for a copy."""
    main_cpu_ms: float
    """CPU time of a batch in the main thread: loader, copies and launches."""
    pinning_cpu_ms: float | None
    """CPU time of a batch in the pinning thread; None where there is none."""


def pinning_thread(before: set[threading.Thread]) -> threading.Thread | None:
    """The thread of torch that pins, of a loader whose workers were started since then."""
    new = (thread for thread in threading.enumerate() if thread not in before)
    return next((thread for thread in new if "pin_memory" in thread.name), None)


def cpu_clock(thread: threading.Thread | None) -> Callable[[], int] | None:
    """Reads the CPU time of a thread that lives, in nanoseconds."""
    if thread is None or thread.ident is None or not hasattr(time, "pthread_getcpuclockid"):
        return None
    clock = time.pthread_getcpuclockid(thread.ident)
    return lambda: time.clock_gettime_ns(clock)


Compute = Callable[[Tensor, Tensor], Tensor]


def training_step(card: Card, wanted_ms: float) -> Compute:
    """A step that keeps the card busy for about so long: a small model, then products of matrices.

    They are few and large, so that the host has little to do for them.
    """
    network = model().to(card.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    side = 16 if card.rehearsal else 4096
    one = torch.ones(side, side, dtype=torch.bfloat16, device=card.device)
    product = torch.empty_like(one)

    def products(count: int) -> None:
        for _ in range(count):
            torch.mm(one, one, out=product)

    products(5)  # loads what it needs
    card.synchronize()
    start = recorded(card)
    products(20)
    end = recorded(card)
    end.synchronize()
    count = 2 if card.rehearsal else max(1, round(20 * wanted_ms / start.elapsed_time(end)))

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        optimizer.step()
        products(count)
        return loss

    return step


def step_epoch(
    card: Card,
    loader: DataLoader[Any],
    compute: Compute,
    side: torch.cuda.Stream | None,
    pinning_ns: Callable[[], int] | None,
) -> StepFigures:
    gc.collect()
    batches = iter(loader)
    next(batches)
    marked = Marked(batches, card)
    starts, ends = [], []
    from_ns, from_cpu_ns = time.perf_counter_ns(), time.thread_time_ns()
    from_pinning_ns = pinning_ns() if pinning_ns else 0
    for step, (images, labels) in enumerate(on_device(marked, card.device, side)):
        starts.append(recorded(card))
        loss = compute(images, labels)
        ends.append(recorded(card))
        if step % 10 == 0:
            loss.item()  # as a log line: the host does not run ahead without bound
    card.synchronize()
    count = len(ends)
    wall_ns, cpu_ns = time.perf_counter_ns() - from_ns, time.thread_time_ns() - from_cpu_ns
    pinning_cpu_ns = pinning_ns() - from_pinning_ns if pinning_ns else None
    # `on_device` asks for batch k + 1 before it hands over batch k.
    turns = list(zip(ends, marked.arrived[2:], starts[1:], strict=False))
    whole_ms = max(1e-6, starts[0].elapsed_time(ends[-1]))
    return StepFigures(
        batches_per_s=count / wall_ns * 1e9,
        step_ms=statistics.median(
            one.elapsed_time(other) for one, other in zip(starts, ends, strict=True)
        ),
        idle_share=sum(end.elapsed_time(arrived) for end, arrived, _ in turns) / whole_ms,
        not_computing_share=sum(end.elapsed_time(start) for end, _, start in turns) / whole_ms,
        main_cpu_ms=cpu_ns / count / 1e6,
        pinning_cpu_ms=None if pinning_cpu_ns is None else pinning_cpu_ns / count / 1e6,
    )


def idle_rows(card: Card, budget: Budget) -> Iterator[Row]:
    """The card's idle time in steps of a given length, and the CPU time of main and pinning."""
    size = 32 if card.rehearsal else 224
    count, batch_size = (5, 4) if card.rehearsal else (BATCHES, BATCH_SIZE)
    dataset = LabelledImages(count * batch_size, size)
    kwargs = {
        "batch_size": batch_size,
        "shuffle": True,
        "num_workers": 1 if card.rehearsal else workers(),
        "persistent_workers": True,
        "pin_memory": True,
    }

    def measure(cell: tuple[float, str], left: int) -> Iterator[Row]:
        wanted_ms, stream = cell
        turns = budget.turns(left, 2 if card.rehearsal else MOST_TURNS)
        side = card.side_stream() if stream == "side" else None
        compute = training_step(card, wanted_ms)
        epochs = _in_turn(card, dataset, kwargs, compute, side, turns)
        ratios = [
            ours.batches_per_s / stock.batches_per_s
            for ours, stock in zip(epochs["safe"], epochs[REFERENCE], strict=True)
        ]
        for name in NAMES:
            middle = medians(epochs[name])
            yield {
                "table": f"The card in training steps, {batch_size} x 3x{size}x{size}, "
                f"{kwargs['num_workers']} persistent workers",
                "step, ms": middle.step_ms,
                "stream": stream,
                "loader": name,
                "speed ratio": None if name == REFERENCE else asdict(spread(ratios)),
                "batches/s": middle.batches_per_s,
                "idle, %": 100 * middle.idle_share,
                "not computing, %": 100 * middle.not_computing_share,
                "main thread CPU ms/batch": middle.main_cpu_ms,
                "pinning thread CPU ms/batch": middle.pinning_cpu_ms,
                "turns": len(ratios),
                "epochs": [asdict(epoch) for epoch in epochs[name]],
            }

    yield from each(list(itertools.product(STEPS_MS, STREAMS)), measure)


def _in_turn(
    card: Card,
    dataset: LabelledImages,
    kwargs: dict[str, Any],
    compute: Compute,
    side: torch.cuda.Stream | None,
    turns: Turns,
) -> dict[str, list[StepFigures]]:
    epochs: dict[str, list[StepFigures]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory(prefix="safeloader-benchmark-") as folder:
        loaders: dict[str, Any] = {}
        clocks = {}
        for name in NAMES:
            before = set(threading.enumerate())
            loaders[name] = CONTENDERS[name](dataset, seeded(kwargs), Path(folder))
            step_epoch(card, loaders[name], compute, side, None)  # warm-up
            clocks[name] = cpu_clock(pinning_thread(before))
        for turn in turns:
            for name in NAMES if turn % 2 == 0 else reversed(NAMES):
                epochs[name].append(step_epoch(card, loaders[name], compute, side, clocks[name]))
        loaders.clear()
        gc.collect()
    return epochs


def medians(epochs: list[StepFigures]) -> StepFigures:
    """The median of each figure."""
    found = {}
    for each_of in fields(StepFigures):
        values = [getattr(epoch, each_of.name) for epoch in epochs]
        found[each_of.name] = None if None in values else statistics.median(values)
    return StepFigures(**found)
