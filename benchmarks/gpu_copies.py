"""Copies to the card: how fast from which memory, and what registering a slot would be worth.

A part of `benchmarks.gpu`. The limit is a plain copy from page-locked memory of the same size. A
slot is a mapping like those that the transport makes; registered with CUDA it needs no pinning
thread, but then a copy may still read it after the batch is let go.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from benchmarks.gpu_budget import Budget, Row, Turns, each, size_of
from benchmarks.gpu_card import Card
from benchmarks.intervals import spread

SIZES = (3_145_728, 38_535_168, 300_000_000, 1_200_000_000)
TINY = (65_536, 262_144)
MOST_TURNS = 12
AT_ONCE = 256_000_000
"""Small copies are timed several at once, until they come to as many bytes."""

LIMIT = "page-locked memory: the limit"
PINNING = "what the pinning thread makes of a slot"
PAGEABLE = "pageable memory"
SLOT = "a slot"
REGISTERED = "a registered slot"


def slot(size: int) -> Tensor:
    """Bytes of a mapping like those that batches cross in, as a worker leaves it: written to."""
    from safeloader.transport.shared_memory import anonymous_file, mapped

    fd = anonymous_file(size)
    try:
        found = torch.frombuffer(mapped(fd, size), dtype=torch.uint8)
    finally:
        os.close(fd)
    return _filled(found)


def _filled(memory: Tensor) -> Tensor:
    """Numbers that count up, so that no page is like another."""
    numbers = torch.arange(-(-memory.nbytes // 4), dtype=torch.int32)
    memory.copy_(numbers.view(torch.uint8)[: memory.nbytes])
    return memory


@dataclass
class Source:
    """Memory that is copied from."""

    name: str
    prepared: Callable[[], Tensor]
    """Gives the memory, and does what each batch would need first."""
    prepare_ms: list[float] = field(default_factory=list)
    bytes_per_s: list[float] = field(default_factory=list)
    right: bool = True


def rows(card: Card, budget: Budget) -> Iterator[Row]:
    sizes = TINY if card.rehearsal else SIZES

    def measure(cell: str, left: int) -> Iterator[Row]:
        if cell == "hazard":
            yield from hazard(card, sizes[1])
        else:
            yield from _of_size(card, by_name[cell], budget.turns(left, MOST_TURNS))

    by_name = {f"copies of {size_of(size)}": size for size in sizes}
    yield from each(["hazard", *by_name], measure)


# ---------------------------------------------------------------------------------- bandwidth


def _of_size(card: Card, size: int, turns: Turns) -> Iterator[Row]:
    target, locked, plain = card.empty(size), _filled(card.pinned(size)), slot(size)
    pageable = _filled(torch.empty(size, dtype=torch.uint8))
    registered = slot(size)
    register_ms = _milliseconds(lambda: card.register(registered))
    try:
        sources = [
            Source(LIMIT, lambda: locked),
            Source(PINNING, lambda: card.pin(plain)),
            Source(PAGEABLE, lambda: pageable),
            Source(SLOT, lambda: plain),
            Source(REGISTERED, lambda: registered),
        ]
        first_pin_ms = _milliseconds(lambda: card.pin(plain))
        for source in sources:
            _copied(card, source, target)  # warms up, and is looked at
            source.right = torch.equal(target.cpu(), locked)
            source.prepare_ms, source.bytes_per_s = [], []
            target.zero_()
        for turn in turns:
            for source in sources if turn % 2 == 0 else reversed(sources):
                _copied(card, source, target)
        is_pinned = registered.is_pinned()
    finally:
        card.synchronize()
        unregister_ms = _milliseconds(lambda: card.unregister(registered))
    yield from _told(size, sources)
    yield {
        "table": "Registering a slot",
        "size": size_of(size),
        "to register, ms": register_ms,
        "to take it back, ms": unregister_ms,
        "the first pinned copy, ms": first_pin_ms,
        "a later one, ms": statistics.median(sources[1].prepare_ms),
        "torch takes it for pinned": is_pinned,
    }


def _copied(card: Card, source: Source, target: Tensor) -> None:
    """One turn of a source: what each batch needs first, then copies that the card times."""
    began_ns = time.perf_counter_ns()
    memory = source.prepared()
    source.prepare_ms.append((time.perf_counter_ns() - began_ns) / 1e6)
    times = max(1, AT_ONCE // target.nbytes) if not card.rehearsal else 1
    start, end = card.event(), card.event()
    start.record()
    for _ in range(times):
        card.copy(target, memory)
    end.record()
    end.synchronize()
    source.bytes_per_s.append(times * target.nbytes / max(1e-6, start.elapsed_time(end)) * 1e3)


def _told(size: int, sources: list[Source]) -> Iterator[Row]:
    limit = sources[0].bytes_per_s
    for source in sources:
        of_limit = [ours / best for ours, best in zip(source.bytes_per_s, limit, strict=True)]
        prepare_ms = statistics.median(source.prepare_ms)
        copy_ms = size / statistics.median(source.bytes_per_s) * 1e3
        yield {
            "table": "Copies to the device",
            "size": size_of(size),
            "from": source.name,
            "first, ms": prepare_ms,
            "copy, ms": copy_ms,
            "GB/s": statistics.median(source.bytes_per_s) / 1e9,
            "of the limit": asdict(spread(of_limit)),
            "both, GB/s": size / (prepare_ms + copy_ms) / 1e6,
            "right": source.right,
            "turns": len(of_limit),
            "bytes_per_s": source.bytes_per_s,
            "prepare_ms": source.prepare_ms,
        }
        if not source.right:
            yield {"error": f"{size_of(size)} from {source.name}: other bytes came to the device"}


def _milliseconds(function: Callable[[], object]) -> float:
    began_ns = time.perf_counter_ns()
    function()
    return (time.perf_counter_ns() - began_ns) / 1e6


# ------------------------------------------------------------------------------------- hazard


def hazard(card: Card, size: int) -> Iterator[Row]:
    """A registered slot that is written to while a copy from it waits behind other work.

    Once without a guard, which shows the hazard; once after an event behind the copy was waited
    for, which is what would have to be done before a registered slot goes back to its worker. And
    once by way of torch's pinned cache, which has that guard: there the slot may go back at once.
    """
    memory = slot(size)
    expected = memory.clone()
    card.register(memory)
    try:
        unguarded, waited = _overwritten(card, memory, expected, "nothing")
        guarded, _ = _overwritten(card, memory, expected, "event")
        by_cache, _ = _overwritten(card, memory, expected, "pinned")
    finally:
        card.synchronize()
        card.unregister(memory)
    yield {
        "table": "A slot that is written to while a copy is under way",
        "size": size_of(size),
        "copy was still under way": waited,
        "without a guard": "the bytes sent" if unguarded else "OTHER BYTES: the hazard",
        "after an event behind the copy": "the bytes sent" if guarded else "OTHER BYTES",
        "copied from torch's pinned cache": "the bytes sent" if by_cache else "OTHER BYTES",
    }
    if unguarded:
        yield {"note": "the hazard did not show: the copy was over before the slot was written to"}
    if not guarded or not by_cache:
        yield {"error": "a guarded copy brought other bytes to the device"}


def _overwritten(card: Card, memory: Tensor, expected: Tensor, guard: str) -> tuple[bool, bool]:
    """Whether the device has the bytes sent, and whether the copy was under way by then."""
    memory.copy_(expected)
    source = card.pin(memory.clone()) if guard == "pinned" else memory
    target = card.empty(memory.nbytes)
    card.synchronize()
    card.keep_busy()
    card.copy(target, source)
    copied = card.event()
    copied.record()
    under_way = not copied.query()
    if guard == "event":
        copied.synchronize()
    memory.fill_(0xEE)
    if guard == "pinned":
        del source  # its memory goes back to the cache, which must not give it out yet
        card.pin(memory.clone()).fill_(0xEE)
    card.synchronize()
    return torch.equal(target.cpu(), expected), under_way
