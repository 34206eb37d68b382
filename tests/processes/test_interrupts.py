"""Interrupts that the loop catches, threads that meet in one iterator, what follows a crash.

The stock loader under the same interrupts is the oracle: the same batches, the same random numbers.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from safeloader import SafeDataLoader, WorkerCrashError
from safeloader.main.iterator import SafeIterator
from tests.oracle import plain, rng_state, seed_all

LENGTH = 12
AT = 5
FATAL = [KeyboardInterrupt, CancelledError, GeneratorExit, SystemExit]
every_fatal = pytest.mark.parametrize("fatal", FATAL)


class Once:
    """Raises what it is told to, once."""

    def __init__(self, fatal: type[BaseException]) -> None:
        self.fatal = fatal
        self.left = 1

    def __call__(self) -> None:
        if self.left:
            self.left -= 1
            raise self.fatal


class Noise:
    """Draws a random number for each index, so that a number too many or too few shows."""

    def __init__(self, fault: Callable[[], None] | None = None, at: int = AT) -> None:
        self.fault = fault
        self.at = at

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, list):
            return torch.stack([self[each] for each in index])
        if index == self.at and self.fault is not None:
            self.fault()
        return torch.tensor([index, random.random()])


class NoiseAtOnce(Noise):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class Stream(IterableDataset[Any]):
    """Goes on after an interrupt: a class with ``__next__``, and no generator."""

    def __init__(self, fault: Callable[[], None] | None = None) -> None:
        self.fault = fault

    def __iter__(self) -> Iterator[Any]:
        self.at = -1
        return self

    def __next__(self) -> Any:
        self.at += 1
        if self.at == AT and self.fault is not None:
            self.fault()
        if self.at >= LENGTH:
            raise StopIteration
        return torch.tensor([self.at, random.random()])


class Ends(IterableDataset[Any]):
    """A generator: at its end after an interrupt."""

    def __init__(self, fault: Callable[[], None]) -> None:
        self.fault = fault

    def __iter__(self) -> Iterator[Any]:
        for index in range(LENGTH):
            if index == AT:
                self.fault()
            yield torch.tensor([index, random.random()])


class Indices:
    """A sampler that raises at one of its draws, and goes on with the next."""

    def __init__(self, fault: Callable[[], None] | None, at: int = AT, size: int = 1) -> None:
        self.fault = fault
        self.at = at
        self.size = size
        self.next = 0

    def __iter__(self) -> Indices:
        return self

    def __next__(self) -> Any:
        at, self.next = self.next, self.next + self.size
        if at <= self.at < at + self.size and self.fault is not None:
            self.fault()
        if at >= LENGTH:
            self.next = 0
            raise StopIteration
        return at if self.size == 1 else list(range(at, at + self.size))


def collate_with(fault: Callable[[], None]) -> Callable[[Any], Any]:
    def collate(samples: Any) -> Any:
        firsts = [int(sample[0]) for sample in samples] if isinstance(samples, list) else []
        if AT in firsts:
            fault()
        return torch.stack(samples) if isinstance(samples, list) else samples

    return collate


MAPS: dict[str, Callable[[Any, Any], Any]] = {
    "getitem": lambda c, f: c(Noise(f), 3),
    "getitem, shuffled": lambda c, f: c(Noise(f), 3, shuffle=True),
    "getitem, drop_last": lambda c, f: c(Noise(f, 11), 5, drop_last=False),
    "getitem, unbatched": lambda c, f: c(Noise(f), None),
    "getitems": lambda c, f: c(NoiseAtOnce(f), 3),
    "lists, unbatched": lambda c, f: c(Noise(f), None, sampler=Indices(None, size=3)),
    "collate": lambda c, f: c(Noise(), 3, collate_fn=collate_with(f)),
    "batch sampler": lambda c, f: c(Noise(), batch_sampler=Indices(f, size=3)),
    "sampler, unbatched": lambda c, f: c(Noise(), None, sampler=Indices(f)),
}
STREAMS: dict[str, Callable[[Any, Any], Any]] = {
    "stream": lambda c, f: c(Stream(f), 3),
    "stream, unbatched": lambda c, f: c(Stream(f), None),
    "stream, collate": lambda c, f: c(Stream(), 3, collate_fn=collate_with(f)),
    "generator": lambda c, f: c(Ends(f), 3),
    "sampler": lambda c, f: c(Noise(), 3, sampler=Indices(f)),
}


def in_spite_of_interrupts(loader: Any, fatal: type[BaseException]) -> tuple[list[Any], int, Any]:
    """The batches, how often it was interrupted, and where the generators are."""
    seed_all(1)
    iterator = iter(loader)
    got, interrupts = [], 0
    while True:
        try:
            got.append(plain(next(iterator)))
        except StopIteration:
            return got, interrupts, rng_state()
        except fatal:
            interrupts += 1


@every_fatal
@pytest.mark.parametrize("mode", [*MAPS, *STREAMS])
def test_the_loop_goes_on_as_with_the_stock_loader(mode: str, fatal: type[BaseException]) -> None:
    make = (MAPS | STREAMS)[mode]
    loader = make(SafeDataLoader, Once(fatal))
    got = in_spite_of_interrupts(loader, fatal)
    assert got[1] == 1
    assert repr(got) == repr(in_spite_of_interrupts(make(DataLoader, Once(fatal)), fatal))


@pytest.mark.parametrize("mode", MAPS)
def test_what_an_interrupt_took_has_failed(mode: str) -> None:
    loader = MAPS[mode](SafeDataLoader, Once(KeyboardInterrupt))
    in_spite_of_interrupts(loader, KeyboardInterrupt)
    audit = loader.audit
    handed_over = audit.delivered
    assert audit.missing.size == audit.duplicated.size == audit.unexpected.size == 0
    drew = "sampler" not in mode  # else the index was never drawn, for all that is known
    assert audit.counts["failed"] == (LENGTH - handed_over if drew else 0)
    assert audit.complete == drew
    assert audit.drawn == handed_over + audit.counts["failed"]
    assert (AT in audit.failed.tolist() or mode == "getitem, drop_last") == drew


@pytest.mark.parametrize("mode", ["stream", "stream, unbatched", "stream, collate", "generator"])
def test_what_an_interrupt_took_of_a_stream_has_failed(mode: str) -> None:
    loader = STREAMS[mode](SafeDataLoader, Once(KeyboardInterrupt))
    in_spite_of_interrupts(loader, KeyboardInterrupt)
    audit = loader.audit
    lost = {"stream": [3, 4], "generator": [3, 4], "stream, collate": [3, 4, 5]}.get(mode, [])
    assert audit.failed.reshape(-1, 2)[:, 1].tolist() == lost
    assert audit.missing.size == 0
    assert audit.drawn == audit.delivered + len(lost)
    assert audit.complete


def test_what_was_drawn_for_the_interrupted_batch_has_failed() -> None:
    loader = STREAMS["sampler"](SafeDataLoader, Once(KeyboardInterrupt))
    in_spite_of_interrupts(loader, KeyboardInterrupt)
    audit = loader.audit
    assert audit.failed.tolist() == [3, 4]  # of torch's batch sampler, whose third raised
    assert (audit.drawn, audit.delivered, audit.complete) == (5, 3, False)


def raises_at(index: int, fault: Callable[[], None]) -> Callable[[Any], Any]:
    def key(sample: Any) -> int:
        if int(sample[0]) == index:
            fault()
        return int(sample[0])

    return key


class Fails(Noise):
    def __getitem__(self, index: Any) -> Any:
        if index == AT:
            raise ValueError("torn")
        return super().__getitem__(index)


class FailsInStream(Stream):
    def __next__(self) -> Any:
        sample = super().__next__()
        if self.at == AT:
            raise ValueError("torn")
        return sample


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("at", ["key", "on_error", "retries"])
def test_interrupts_in_what_is_ours_to_call(kind: str, at: str) -> None:
    fault = Once(KeyboardInterrupt)
    extra: dict[str, Any] = {}
    dataset: Any = Noise() if kind == "map" else Stream()
    if at == "key":
        extra["key"] = raises_at(AT, fault)
    elif at == "on_error":
        dataset = Fails() if kind == "map" else FailsInStream()

        def asked(failure: Any) -> Any:
            fault()
            return torch.tensor([failure.index if kind == "map" else AT, 0.0])

        extra["on_error"] = asked
    else:
        dataset = Noise(fault) if kind == "map" else Stream(fault)
        extra["retries"] = 2
    loader = SafeDataLoader(dataset, 3, **extra)
    _, interrupts, _ = in_spite_of_interrupts(loader, KeyboardInterrupt)
    assert interrupts == 1
    audit = loader.audit
    assert audit is not None
    assert audit.missing.size == 0
    assert audit.drawn == audit.delivered + audit.counts["failed"]
    if kind == "map":
        assert audit.failed.tolist() == [3, 4, 5]
    else:
        lost = audit.failed[:, 1].tolist()
        assert lost == ([3, 4] if at == "retries" else [3, 4, 5])
    assert audit.complete


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_in_a_draw_beside_workers_is_told_once(workers: int) -> None:
    """Torch draws ahead while it hands a batch over, which goes with the interrupt."""
    fault = Once(KeyboardInterrupt)
    sampler: Any = Indices(fault, at=9, size=3)
    loader = SafeDataLoader(Noise(), batch_sampler=sampler, num_workers=workers, prefetch_factor=1)
    got, interrupts, _ = in_spite_of_interrupts(loader, KeyboardInterrupt)
    assert interrupts == 1
    audit = loader.audit
    assert audit is not None
    assert audit.missing.size == 0
    assert audit.counts["failed"] == 3
    assert audit.drawn == audit.delivered + 3 == 3 * len(got) + 3


# ── samplers that raise, and those that say more or less than they have ──────────────────────────


class SevenThenFault:
    def __iter__(self) -> Iterator[int]:
        yield from range(6)
        raise ValueError("bad stratum")

    def __len__(self) -> int:
        return LENGTH


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("drop_last", [True, False])
def test_what_a_batch_sampler_had_drawn_when_it_raised_has_failed(
    workers: int, drop_last: bool
) -> None:
    batches = BatchSampler(SevenThenFault(), 4, drop_last)  # type: ignore[arg-type]
    loader = SafeDataLoader(Noise(), batch_sampler=batches, num_workers=workers)
    iterator = iter(loader)
    assert next(iterator)[:, 0].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="bad stratum"):
        next(iterator)
    assert list(iterator) == []
    audit = loader.audit
    assert audit is not None
    assert audit.failed.tolist() == [4, 5]
    assert (audit.drawn, audit.delivered) == (6, 4)
    assert audit.dropped.size == 0
    assert not audit.complete


@pytest.mark.parametrize("workers", [0, 1])
def test_negative_indices_visit_what_they_stand_for(workers: int) -> None:
    dataset = torch.arange(4)
    loader = SafeDataLoader(dataset, 2, sampler=[0, 1, 2, -1], num_workers=workers)
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]
    audit = loader.audit
    assert audit is not None
    assert str(audit) == "epoch 0: complete, ok; 4 drawn, 4 delivered"
    list(again := SafeDataLoader(dataset, 2, sampler=[0, 3, -1], num_workers=workers))
    assert again.audit is not None
    assert again.audit.repeated.tolist() == [-1]
    assert again.audit.unvisited.tolist() == [1, 2]


class Announces(BatchSampler):
    def __len__(self) -> int:
        return 4


class AnnouncedStream(Stream):
    def __len__(self) -> int:
        return 4


def test_what_a_sampler_announces_proves_nothing() -> None:
    batches = Announces(range(100), 5, drop_last=False)
    loader = SafeDataLoader(torch.arange(100), batch_sampler=batches)
    iterator = iter(loader)
    for _ in range(len(loader)):
        next(iterator)
    audit = loader.audit
    assert audit is not None
    assert not audit.complete
    assert audit.notes == ("the sampler was not asked whether it has more",)
    assert len(list(iterator)) == 16
    assert loader.audit.complete
    assert loader.audit.notes == ()


def test_nor_does_the_length_of_a_stream() -> None:
    loader = SafeDataLoader(AnnouncedStream(), 2)
    iterator = iter(loader)
    for _ in range(len(loader)):
        next(iterator)
    audit = loader.audit
    assert audit is not None
    assert (audit.complete, audit.delivered) == (False, 4)
    assert audit.notes == ("the stream was not asked whether it has more",)


@pytest.mark.parametrize("arguments", [{}, {"shuffle": True}, {"drop_last": True}])
def test_torchs_own_samplers_are_taken_at_their_word(arguments: dict[str, Any]) -> None:
    loader = SafeDataLoader(torch.arange(20), 5, **arguments)
    iterator = iter(loader)
    for _ in range(len(loader)):
        assert loader.audit is not None
        assert not loader.audit.complete
        next(iterator)
    assert loader.audit is not None
    assert loader.audit.complete
    sampler = RandomSampler(range(20), num_samples=7, replacement=True)
    loader = SafeDataLoader(torch.arange(20), 5, sampler=sampler)
    iterator = iter(loader)
    next(iterator), next(iterator)
    assert loader.audit is not None
    assert loader.audit.complete


# ── after a crash ────────────────────────────────────────────────────────────────────────────────


class Dies(Noise):
    def __getitem__(self, index: Any) -> Any:
        if index == AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class DiesInStream(Stream):
    def __next__(self) -> Any:
        sample = super().__next__()
        if self.at == AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return sample


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("dataset", [Dies(), DiesInStream()], ids=["map", "stream"])
def test_a_crash_is_told_once(dataset: Any, persistent: bool) -> None:
    loader = SafeDataLoader(dataset, 2, num_workers=1, persistent_workers=persistent)
    iterator = iter(loader)
    got: list[Any] = []
    with pytest.raises(WorkerCrashError):
        got.extend(iterator)
    for _ in range(2):
        got.extend(iterator)  # the end; what was sent before the crash may come first
    audit = loader.audit
    assert audit is not None
    assert audit.missing.size == 0
    assert not audit.complete
    assert audit.delivered == 2 * len(got) <= 4
    if isinstance(dataset, Dies):
        assert {4, 5} <= set(audit.failed.tolist())
        assert audit.counts["failed"] == audit.drawn - audit.delivered


# ── one list that is filled again and again ──────────────────────────────────────────────────────


class Refills:
    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for start in range(0, 24, 3):
            batch[:] = range(start, start + 3)
            yield batch

    def __len__(self) -> int:
        return 8


class DiesOnce:
    def __init__(self, told: Any) -> None:
        self.told = told

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> int:
        if index == 7 and not self.told.exists():
            self.told.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return index


@pytest.mark.parametrize("workers", [1, 2])
def test_restarted_workers_get_what_was_drawn(workers: int, tmp_path: Any) -> None:
    loader = SafeDataLoader(
        DiesOnce(tmp_path / "told"),
        batch_sampler=Refills(),
        num_workers=workers,
        on_crash="restart",
    )
    got = [batch.tolist() for batch in loader]
    assert got == [[start, start + 1, start + 2] for start in range(0, 24, 3)]
    assert loader.audit is not None
    assert (loader.audit.complete, loader.audit.ok) == (True, True)
    assert (tmp_path / "told").exists()


# ── two threads ──────────────────────────────────────────────────────────────────────────────────


class Gated:
    """Its samples wait until they are let through."""

    def __init__(self, inside: Any, gate: Any) -> None:
        self.inside = inside
        self.gate = gate

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        self.inside.set()
        self.gate.wait()
        return index


@pytest.mark.parametrize("workers", [0, 1])
def test_a_second_thread_is_refused_by_name_and_nothing_is_lost(workers: int) -> None:
    context = torch.multiprocessing.get_context("fork")
    inside, gate = (context.Event(), context.Event())
    loader = SafeDataLoader(
        Gated(inside, gate),
        2,
        num_workers=workers,
        multiprocessing_context=context if workers else None,
        persistent_workers=workers > 0,
    )
    iterator = iter(loader)
    got: list[Any] = []
    began = threading.Event()

    def first() -> None:
        began.set()
        got.append(next(iterator).tolist())

    thread = threading.Thread(target=first, name="the first")
    thread.start()
    began.wait()
    inside.wait()
    while not iterator._turn.locked():  # type: ignore[attr-defined]
        pass
    for _ in range(3):
        with pytest.raises(RuntimeError, match="'the first' waits") as caught:
            next(iterator)
        assert threading.current_thread().name in str(caught.value)
    if workers:
        with pytest.raises(RuntimeError, match="one thread at a time"):
            iter(loader)
    assert loader.audit is not None
    assert loader.audit.delivered == 0
    gate.set()
    thread.join()
    got += [batch.tolist() for batch in iterator]
    assert got == [[0, 1], [2, 3], [4, 5]]
    assert str(loader.audit) == "epoch 0: complete, ok; 6 drawn, 6 delivered"


def test_a_dataset_that_asks_its_own_loader_is_refused() -> None:
    class Asks:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            if index == 1:
                with pytest.raises(RuntimeError, match="is in it already"):
                    next(iterator)
            return index

    loader = SafeDataLoader(Asks(), 2)
    iterator = iter(loader)
    assert [batch.tolist() for batch in iterator] == [[0, 1], [2, 3]]


@pytest.mark.uncovered
@pytest.mark.parametrize("names", [False, True])
def test_an_audit_from_another_thread_is_of_one_moment(names: bool) -> None:
    class Sampler:
        def __len__(self) -> int:
            return 12_000

        def __iter__(self) -> Iterator[Any]:
            return iter([f"n{k}" for k in range(12_000)] if names else range(12_000))

    class Any_:
        def __len__(self) -> int:
            return 12_000

        def __getitem__(self, index: Any) -> int:
            if str(index).endswith("7"):
                raise ValueError("torn")
            return 1

    loader = SafeDataLoader(
        Any_(), 3, sampler=Sampler(), on_error=lambda failure: 0, max_skipped=12_000
    )
    iterator = iter(loader)
    torn: list[Any] = []
    looks = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal looks
        while not done.is_set():
            try:
                audit = loader.audit
                assert audit is not None
                str(audit), audit.to_dict()
                ahead = sum(int(n.split()[3].strip(",")) for n in audit.notes if "handed" in n)
                if audit.drawn != audit.delivered + ahead + audit.counts["replaced"]:
                    torn.append(repr(audit))
                looks += 1
            except Exception as exc:
                torn.append(exc)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=watch)
    try:
        thread.start()
        batches = sum(1 for _ in iterator)
        while not looks:
            pass
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert batches == 4000
    assert torn == []


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_a_storm_of_interrupts_keeps_no_turn_and_loses_no_account(kind: str) -> None:
    class Interrupt(BaseException):
        pass

    def interrupt(number: int, frame: Any) -> None:
        while frame is not None:
            if frame.f_code is SafeIterator.__next__.__code__:
                raise Interrupt
            frame = frame.f_back

    class Numbers(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3000))

    data: Any = torch.arange(3000) if kind == "map" else Numbers()
    loader = SafeDataLoader(data, 1)
    list(loader)  # what is imported on first use is there
    iterator: Any = iter(loader)
    interrupts = 0
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        while True:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 4e-4))
            try:
                while True:
                    next(iterator)
            except Interrupt:
                interrupts += 1
            except StopIteration:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not iterator._turn.locked()
    assert interrupts
    audit = loader.audit
    assert audit is not None
    assert audit.missing.size == audit.duplicated.size == audit.unexpected.size == 0
    # One may be in no class: an interrupt may strike in the booking of an earlier one.
    assert audit.drawn - audit.delivered - audit.counts["failed"] in (0, 1)


class RefillsOneTensor:
    """A batch sampler that fills one tensor again and again."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        drawn = torch.zeros(2, dtype=torch.long)
        for number in range(5):
            drawn[0], drawn[1] = 2 * number, 2 * number + 1
            yield drawn

    def __len__(self) -> int:
        return 5


@pytest.mark.parametrize("options", [{}, {"on_crash": "restart"}])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_tensor_that_is_refilled_was_sent_as_it_was(workers: int, options: Any) -> None:
    loader: Any = SafeDataLoader(
        torch.arange(10), batch_sampler=RefillsOneTensor(), num_workers=workers, **options
    )
    assert torch.cat(list(loader)).tolist() == list(range(10))
    assert loader.audit.ok
