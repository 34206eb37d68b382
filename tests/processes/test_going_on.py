"""Going on in spite of samples that fail and workers that die, with real workers.

The oracle is the same loader over the same data without the fault: every batch without a bad sample
has to be the same bit for bit, and every other is known from it.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    get_worker_info,
)
from torch.utils.data.datapipes.iter import IterableWrapper

from safeloader import (
    SKIP,
    CollateError,
    Failure,
    SafeDataLoader,
    SampleError,
    WorkerCrashError,
)
from tests.oracle import plain, rng_state, seed_all
from tests.processes.test_failures import caught

LENGTH = 42
SIZE = 5
BAD = (13, 14, 27)
WORKERS = [0, 2]
spawn = pytest.param("spawn", marks=pytest.mark.slow)


class Sound:
    """Gives what follows from the index alone; the index is its first number."""

    def __init__(self, length: int = LENGTH) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, list):
            return torch.stack([self[each] for each in index])
        return torch.tensor([index, index**2])


class Faulty(Sound):
    """Does something else at the indices ``bad``."""

    def __init__(
        self, how: str, bad: tuple[int, ...] = BAD, length: int = LENGTH, flag: Path | None = None
    ) -> None:
        super().__init__(length)
        self.how, self.bad, self.flag = how, bad, flag

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, list) and index in self.bad and self._still():
            if self.how == "None":
                return None
            if self.how == "shape":
                return torch.zeros(7, dtype=torch.int64)
            fault = FAULTS[self.how](index)
            if fault is not None:
                raise fault
        return super().__getitem__(index)

    def _still(self) -> bool:
        """With a ``flag``, the fault comes once: the file is the sign that it has."""
        if self.flag is None:
            return True
        try:
            self.flag.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class FaultyTogether(Faulty):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


FAULTS: dict[str, Callable[[int], Exception | None]] = {
    "raise": lambda index: ValueError(f"no sample {index}"),
    "StopIteration": lambda index: StopIteration(),
    "MemoryError": lambda index: MemoryError(),
    "ImportError": lambda index: ImportError("no codec"),
    "NameError": lambda index: NameError("imread"),
    "too many files": lambda index: OSError(24, "Too many open files"),
    "no space": lambda index: OSError(28, "No space left on device"),
    "kill": lambda index: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda index: os._exit(3),
    "sys.exit": lambda index: sys.exit(1),
}


def sound_batches(**more: Any) -> list[Any]:
    """What the stock loader gives of the sound dataset."""
    return list(DataLoader(Sound(), **({"batch_size": SIZE} | more)))


def indices_of(batch: torch.Tensor) -> list[int]:
    return batch.reshape(-1, 2)[:, 0].tolist()


def without(batch: torch.Tensor, bad: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([row for row in batch if int(row[0]) not in bad])


def replaced(batch: torch.Tensor, bad: tuple[int, ...]) -> torch.Tensor:
    """As ``on_error="replace"`` has it: the next good one, or the batch's first."""
    good = [k for k, row in enumerate(batch) if int(row[0]) not in bad]
    return torch.stack(
        [batch[next((g for g in good if g >= k), good[0])] for k in range(len(batch))]
    )


def stood_in_for(batches: list[Any], bad: tuple[int, ...]) -> list[Any]:
    """``on_error="replace"``: where all of a batch fails, the last index before it that comes."""
    expected: list[Any] = []
    drawn: list[Any] = []
    for batch in batches:
        rows = batch.reshape(-1, 2)
        if all(int(row[0]) in bad for row in rows):
            donor = next(row for row in reversed(drawn) if int(row[0]) not in bad)
            expected.append(donor.expand(batch.shape).clone())
        else:
            expected.append(batch if batch.ndim == 1 else replaced(batch, bad))
        drawn += rows
    return expected


def as_seen(batches: list[Any]) -> list[Any]:
    return [plain(batch) for batch in batches]


def in_turn(batches: list[Any], in_order: bool) -> list[Any]:
    return as_seen(batches) if in_order else sorted(as_seen(batches))


MODES: dict[str, dict[str, Any]] = {
    "main": {"num_workers": 0},
    "one worker": {"num_workers": 1},
    "two": {"num_workers": 2},
    "pinned": {"num_workers": 2, "pin_memory": True},
    "any order": {"num_workers": 2, "in_order": False},
    "persistent": {"num_workers": 2, "persistent_workers": True},
}


FAILING = [
    (mode, how)
    for mode in MODES
    for how in ("raise", "None", "shape", "StopIteration")
    if mode in ("main", "two") or how in ("raise", "None")
]


@pytest.mark.parametrize(("mode", "how"), FAILING)
@pytest.mark.parametrize("kind", [Faulty, FaultyTogether])
@pytest.mark.parametrize("on_error", ["skip", "replace"])
def test_samples_that_fail(mode: str, kind: type[Faulty], how: str, on_error: str) -> None:
    more = MODES[mode]
    loader = SafeDataLoader(kind(how), SIZE, on_error=on_error, **more)
    mended = without if on_error == "skip" else replaced
    expected = [mended(batch, BAD) for batch in sound_batches()]
    in_order = more.get("in_order", True)
    for epoch in range(2):
        assert in_turn(list(loader), in_order) == in_turn(expected, in_order)
        audit = loader.audit
        assert audit is not None
        assert audit.ok
        assert audit.complete
        assert (audit.epoch, audit.drawn, audit.delivered) == (epoch, LENGTH, LENGTH - len(BAD))
        gone, other = audit.skipped.tolist(), audit.replaced.tolist()
        assert sorted(gone or other) == list(BAD)
        assert bool(gone) == (on_error == "skip")
        assert sorted(audit.reasons) == list(BAD)
        assert audit.donors == ({} if gone else {13: 10, 14: 10, 27: 28})
        assert audit.counts["late"] == 0
        if how == "raise":
            assert audit.reasons[13] == "ValueError: no sample 13"
    assert str(audit).count("\n    index ") == 3


@pytest.mark.parametrize("workers", WORKERS)
def test_a_batch_of_bad_samples_is_skipped_whole(workers: int) -> None:
    bad = tuple(range(10, 15))
    loader = SafeDataLoader(Faulty("raise", bad), SIZE, num_workers=workers, on_error="skip")
    expected = sound_batches()
    del expected[2]
    assert as_seen(list(loader)) == as_seen(expected)
    audit = loader.audit
    assert audit is not None
    assert (audit.ok, audit.complete, audit.delivered) == (True, True, LENGTH - 5)
    assert audit.skipped.tolist() == list(bad)
    record = loader.provenance.batch(2)
    assert record is not None
    assert record.indices == (15, 16, 17, 18, 19)


def lookup(failure: Failure) -> Any:
    return SKIP if failure.index == 14 else torch.tensor([failure.index, -failure.position])


@pytest.mark.parametrize("method", [None, "fork", spawn])
def test_a_callable_is_asked_where_the_sample_failed(method: str | None) -> None:
    loader = SafeDataLoader(
        Faulty("raise"),
        SIZE,
        on_error=lookup,
        num_workers=2 if method else 0,
        multiprocessing_context=method,
    )
    batches = list(loader)
    assert batches[2].tolist() == [[10, 100], [11, 121], [12, 144], [13, -3]]
    assert batches[5].tolist()[2] == [27, -2]
    audit = loader.audit
    assert audit is not None
    assert (audit.skipped.tolist(), audit.replaced.tolist()) == ([14], [13, 27])
    assert audit.donors == {}
    assert "replaced: 2, another sample came in its place because of an error: 13, 27" in str(audit)
    assert audit.ok


# which samples are in a batch ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("on_error", ["skip", "replace"])
def test_the_records_name_the_samples_really_in_each_batch(on_error: str, workers: int) -> None:
    loader = SafeDataLoader(Faulty("raise"), SIZE, num_workers=workers, on_error=on_error)
    for number, batch in enumerate(loader):
        record = loader.last_batch
        assert record is not None
        assert list(record.indices) == indices_of(batch)
        assert len(record.fetch_ns) == len(batch)
        table = loader.provenance.to_numpy()
        mine = table[table["batch"] == number]
        assert mine["index"].tolist() == indices_of(batch)
        assert mine["position"].tolist() == list(range(len(batch)))
    assert not loader.provenance.lookup(13).size


def test_the_records_of_batches_without_a_fault() -> None:
    loader = SafeDataLoader(Faulty("raise"), SIZE, num_workers=2, on_error="skip", shuffle=True)
    for batch in loader:
        record = loader.last_batch
        assert record is not None
        if not set(record.indices) & set(BAD):
            assert list(record.indices) == indices_of(batch)


# retries ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kind", [Faulty, FaultyTogether])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_what_comes_late_comes_in_its_place(
    tmp_path: Path, workers: int, kind: type[Faulty], on_error: str
) -> None:
    dataset = kind("raise", (13,), flag=tmp_path / "failed once")
    loader = SafeDataLoader(dataset, SIZE, num_workers=workers, retries=2, on_error=on_error)
    assert as_seen(list(loader)) == as_seen(sound_batches())
    audit = loader.audit
    assert audit is not None
    assert audit.late.tolist() == [13]
    assert audit.counts["skipped"] == 0
    assert audit.reasons == {13: "came at try 2"}
    assert (audit.ok, audit.delivered) == (True, LENGTH)
    assert loader.provenance.to_numpy()["index"].tolist() == list(range(LENGTH))


@pytest.mark.parametrize("workers", WORKERS)
def test_what_never_comes_is_raised(workers: int) -> None:
    error = caught(SafeDataLoader(Faulty("raise"), SIZE, num_workers=workers, retries=1))
    assert type(error) is not SampleError
    assert isinstance(error, SampleError)
    assert isinstance(error, ValueError)
    assert (error.index, error.failure.position) == (13, 3)


@pytest.mark.parametrize("workers", WORKERS)
def test_without_batches(tmp_path: Path, workers: int) -> None:
    once = tmp_path / "failed once"
    for how, more in (("skip", {}), ("replace", {}), ("raise", {"retries": 1})):
        dataset = Faulty("raise", (13,), flag=once) if more else Faulty("raise")
        loader = SafeDataLoader(dataset, batch_size=None, num_workers=workers, on_error=how, **more)
        expected = sound_batches(batch_size=None)
        if how == "skip":
            expected = [sample for sample in expected if int(sample[0]) not in BAD]
        elif how == "replace":  # by what was drawn before
            expected = stood_in_for(expected, BAD)
        assert as_seen(list(loader)) == as_seen(expected)
        audit = loader.audit
        assert audit is not None
        good = LENGTH if more else LENGTH - len(BAD)
        assert (audit.ok, audit.complete, audit.delivered) == (True, True, good)
        assert audit.skipped.tolist() == (list(BAD) if how == "skip" else [])
        assert audit.replaced.tolist() == (list(BAD) if how == "replace" else [])
        assert audit.late.tolist() == ([13] if more else [])


@pytest.mark.parametrize("workers", WORKERS)
def test_a_batch_that_the_dataset_makes_itself(workers: int) -> None:
    """``batch_size=None`` with lists of indices, as torch's manual has it for databases."""
    loader = SafeDataLoader(
        Faulty("raise"),
        batch_size=None,
        sampler=BatchSampler(SequentialSampler(Sound()), SIZE, False),
        num_workers=workers,
        on_error="skip",
    )
    loader.dataset.__class__ = FaultyBulk
    came = [index for batch in loader for index in indices_of(batch)]
    audit = loader.audit
    assert audit is not None
    assert len(came) == LENGTH - 10
    assert audit.delivered == len(came)
    assert sorted(audit.skipped.tolist()) == sorted(set(range(LENGTH)) - set(came))


class FaultyBulk(Faulty):
    def __getitem__(self, index: Any) -> Any:
        return torch.stack([Faulty.__getitem__(self, each) for each in index])


# bounds ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", WORKERS)
def test_too_many_are_an_error_with_the_list(workers: int) -> None:
    loader = SafeDataLoader(
        Faulty("raise"), SIZE, num_workers=workers, on_error="skip", max_skipped=2
    )
    error = caught(loader)
    assert type(error) is SampleError
    assert error.index == 27
    said = str(error)
    assert "3 of the 30 samples so far were skipped; max_skipped allows 2" in said
    for index in BAD:
        assert f"index {index}: ValueError: no sample {index}" in said


@pytest.mark.parametrize("workers", WORKERS)
def test_one_may_go_on_after_too_many(workers: int) -> None:
    loader = SafeDataLoader(
        Faulty("raise"), SIZE, num_workers=workers, on_error="skip", max_skipped=2
    )
    iterator = iter(loader)
    error = caught(iterator)
    assert error.index == 27
    assert as_seen(list(iterator)) == as_seen(sound_batches()[6:])


@pytest.mark.parametrize("workers", WORKERS)
def test_what_was_lost_with_that_error_was_not_delivered(workers: int) -> None:
    loader = SafeDataLoader(
        Faulty("raise"), SIZE, num_workers=workers, on_error="skip", max_skipped=2
    )
    iterator = iter(loader)
    came = 0
    try:
        for batch in iterator:
            came += len(batch)
    except SampleError:
        came += sum(map(len, iterator))
    audit = loader.audit
    assert audit is not None
    assert audit.delivered == came
    assert set(audit.failed.tolist()) >= {25, 26, 28, 29}


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("size", [30, 8])
def test_a_run_of_failures_ends_it(workers: int, size: int) -> None:
    dataset = Faulty("raise", tuple(k for k in range(103, 180) if k != 111), length=400)
    loader = SafeDataLoader(
        dataset, size, num_workers=workers, on_error="skip", max_skipped=0.9, in_order=True
    )
    if size == 8:  # a run that leaves no batch out whole
        dataset.bad = tuple(k for k in range(101, 180) if k % 8)
        assert sum(map(len, loader)) == 400 - len(dataset.bad)
        return
    error = caught(loader)
    assert type(error) is SampleError
    assert "samples in a row failed" in str(error)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_run_that_leaves_batches_out_whole_ends_it_too(workers: int) -> None:
    """A disk that broke: nothing comes any more, but the share of it is small so far."""
    dataset = Faulty("raise", tuple(range(300, 500)), length=500)
    loader = SafeDataLoader(dataset, 4, num_workers=workers, on_error="skip", max_skipped=0.5)
    assert "samples in a row failed" in str(caught(loader))


NEVER_SKIPPED = [
    (how, workers)
    for how in ("MemoryError", "ImportError", "NameError", "too many files", "no space")
    for workers in WORKERS
    if not workers or how in ("MemoryError", "too many files")
]


@pytest.mark.parametrize(("how", "workers"), NEVER_SKIPPED)
@pytest.mark.parametrize("on_error", ["skip", "replace", lookup], ids=["skip", "replace", "asked"])
def test_a_broken_program_or_machine_is_never_skipped(
    how: str, on_error: Any, workers: int
) -> None:
    loader = SafeDataLoader(
        Faulty(how), SIZE, num_workers=workers, on_error=on_error, retries=1, max_skipped=1.0
    )
    error = caught(loader)
    assert isinstance(error, SampleError)
    assert isinstance(error, type(FAULTS[how](0)))
    assert error.index == 13
    assert loader.audit is not None
    assert loader.audit.counts["skipped"] == 0


# with key= ──────────────────────────────────────────────────────────────────────────────────────


def first_number(sample: torch.Tensor) -> int:
    return int(sample[0])


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(
    ("on_error", "how"),
    [
        ("skip", "raise"),
        ("skip", "shape"),
        ("replace", "raise"),
        ("replace", "shape"),
    ],
)
def test_keys_are_those_of_what_is_in_the_batch(on_error: str, how: str, workers: int) -> None:
    loader = SafeDataLoader(
        Faulty(how, (13, 14)), SIZE, num_workers=workers, on_error=on_error, key=first_number
    )
    mended = without if on_error == "skip" else replaced
    expected = [mended(batch, (13, 14)) for batch in sound_batches()]
    assert as_seen(list(loader)) == as_seen(expected)
    assert loader.audit is not None
    assert loader.audit.ok


# streams ────────────────────────────────────────────────────────────────────────────────────────


class Numbers(IterableDataset):  # type: ignore[type-arg]
    """Shared among the workers; fails at numbers ``bad``, by a class that goes on afterwards."""

    def __init__(self, bad: tuple[int, ...] = BAD, how: str = "class", once: bool = False) -> None:
        self.bad, self.how, self.once = bad, how, once

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        if self.how == "class":
            return _Numbers(self.bad, first, step, self.once)
        if self.how == "sliced":  # the usual way to share a generator among workers
            return itertools.islice(self._generate(0, 1), first, None, step)
        return self._generate(first, step)

    def _generate(self, first: int, step: int) -> Iterator[int]:
        for number in range(first, LENGTH, step):
            if number in self.bad:
                raise ValueError(f"no number {number}")
            yield number


class _Numbers:
    def __init__(self, bad: tuple[int, ...], first: int, step: int, once: bool) -> None:
        self.left = iter(range(first, LENGTH, step))
        self.again: int | None = None
        self.bad, self.once = set(bad), once

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        drawn = random.random()
        number, self.again = (next(self.left) if self.again is None else self.again), None
        if number in self.bad:
            if self.once:
                self.bad.discard(number)
                self.again = number
            raise ValueError(f"no number {number}")
        self.drawn = drawn
        return number


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("size", [SIZE, 1, None])
def test_a_stream_that_goes_on(workers: int, size: int | None) -> None:
    loader = SafeDataLoader(Numbers(), size, num_workers=workers, on_error="skip")
    came = [int(each) for batch in loader for each in torch.as_tensor(batch).reshape(-1)]
    assert sorted(came) == sorted(set(range(LENGTH)) - set(BAD))
    audit = loader.audit
    assert audit is not None
    step = max(workers, 1)
    assert sorted(map(tuple, audit.skipped.tolist())) == sorted((b % step, b // step) for b in BAD)
    assert (audit.ok, audit.complete) == (True, True)
    assert (audit.drawn, audit.delivered) == (LENGTH, LENGTH - len(BAD))
    assert sorted(audit.reasons.values()) == [f"ValueError: no number {bad}" for bad in BAD]


@pytest.mark.parametrize("workers", WORKERS)
def test_a_stream_with_replacements(workers: int) -> None:
    loader = SafeDataLoader(Numbers(), SIZE, num_workers=workers, on_error="replace")
    stock = list(DataLoader(Numbers(()), SIZE, num_workers=workers))
    came = list(loader)
    assert [len(batch) for batch in came] == [len(batch) for batch in stock]
    for mine, theirs in zip(came, stock, strict=True):
        for number, should in zip(mine.tolist(), theirs.tolist(), strict=True):
            assert number in theirs.tolist()
            assert (number == should) == (should not in BAD)
    assert loader.audit is not None
    assert loader.audit.ok


@pytest.mark.parametrize("workers", WORKERS)
def test_a_stream_asked_again(workers: int) -> None:
    loader = SafeDataLoader(Numbers(once=True), SIZE, num_workers=workers, retries=1)
    came = [number for batch in loader for number in batch.tolist()]
    assert sorted(came) == list(range(LENGTH))
    assert loader.audit is not None
    assert loader.audit.counts["late"] == 3
    assert loader.audit.ok


class RandomNumbers(Numbers):
    """Gives what it draws."""

    def __iter__(self) -> Iterator[Any]:
        numbers = _Numbers(self.bad, 0, 1, self.once)
        return (_next(numbers) for _ in range(LENGTH)) if not self.bad else _Drawn(numbers)


class _Drawn:
    def __init__(self, numbers: _Numbers) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[float]:
        return self

    def __next__(self) -> float:
        next(self.numbers)
        return self.numbers.drawn


def _next(numbers: _Numbers) -> float:
    next(numbers)
    return numbers.drawn


def test_a_stream_asked_again_draws_the_same_numbers() -> None:
    seed_all(1)
    expected = list(DataLoader(RandomNumbers(()), SIZE))
    seed_all(1)
    came = list(SafeDataLoader(RandomNumbers((13,), once=True), SIZE, retries=1))
    assert as_seen(came) == as_seen(expected)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("more", [{"on_error": "skip"}, {"on_error": "replace"}, {"retries": 1}])
def test_a_generator_that_raised_is_at_its_end_and_says_so(
    workers: int, more: dict[str, Any]
) -> None:
    loader = SafeDataLoader(Numbers((13,), "generator"), SIZE, num_workers=workers, **more)
    error = caught(loader)
    assert isinstance(error, SampleError)
    assert isinstance(error, ValueError)
    assert "A generator is at its end once it raised" in str(error)
    assert loader.audit is not None
    assert not loader.audit.ok


def refuses_thirteen(number: int) -> int:
    if number == 13:
        raise ValueError("no number 13")
    return number


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kind", ["islice", "data pipe"])
def test_a_generator_inside_another_iterator_is_at_its_end_too(kind: str, workers: int) -> None:
    dataset: Any = Numbers((13,), "sliced")
    if kind == "data pipe":
        dataset = IterableWrapper(range(LENGTH)).sharding_filter().map(refuses_thirteen)
    loader = SafeDataLoader(dataset, SIZE, num_workers=workers, on_error="skip")
    came = set()
    try:
        for batch in loader:
            came |= set(batch.tolist())
    except SampleError:
        return
    if came != set(range(LENGTH)) - {13}:
        pytest.fail(f"{len(came)} of {LENGTH} numbers came, no error\n{loader.audit}")


# workers that die ───────────────────────────────────────────────────────────────────────────────


def run(dataset: Any, **more: Any) -> tuple[list[Any], SafeDataLoader[Any]]:
    loader: SafeDataLoader[Any] = SafeDataLoader(
        dataset, SIZE, **({"num_workers": 2, "on_crash": "restart"} | more)
    )
    return list(loader), loader


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        ("one worker", "kill"),
        ("two", "kill"),
        ("two", "exit"),
        ("two", "sys.exit"),
        ("pinned", "kill"),
        ("any order", "kill"),
        ("persistent", "kill"),
    ],
)
@pytest.mark.parametrize("kind", [Faulty, FaultyTogether])
def test_a_worker_that_dies_once(tmp_path: Path, mode: str, kind: type[Faulty], how: str) -> None:
    dataset = kind(how, flag=tmp_path / "died")
    came, loader = run(dataset, **MODES[mode])
    in_order = mode != "any order"
    expected = in_turn(sound_batches(), in_order)
    assert in_turn(came, in_order) == expected
    audit = loader.audit
    assert audit is not None
    assert (audit.ok, audit.complete, audit.delivered) == (True, True, LENGTH)
    assert audit.counts["skipped"] == 0
    assert sorted(loader.provenance.to_numpy()["index"].tolist()) == list(range(LENGTH))
    assert in_turn(list(loader), in_order) == expected  # the next epoch


@pytest.mark.parametrize("mode", ["one worker", "two", "pinned", "persistent"])
@pytest.mark.parametrize("kind", [Faulty, FaultyTogether])
def test_the_index_that_kills_twice_is_left_out(mode: str, kind: type[Faulty]) -> None:
    came, loader = run(kind("kill", (13,)), **MODES[mode])
    expected = [without(batch, (13,)) for batch in sound_batches()]
    assert as_seen(came) == as_seen(expected)
    audit = loader.audit
    assert audit is not None
    assert audit.skipped.tolist() == [13]
    assert "died at it twice" in audit.reasons[13]
    assert (audit.ok, audit.complete, audit.delivered) == (True, True, LENGTH - 1)
    if mode == "persistent":
        assert as_seen(list(loader)) == as_seen(expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_restarted_under_other_start_methods(method: str) -> None:
    came, loader = run(Faulty("exit", (13,)), num_workers=1, multiprocessing_context=method)
    assert as_seen(came) == as_seen([without(batch, (13,)) for batch in sound_batches()])
    assert loader.audit is not None
    assert loader.audit.skipped.tolist() == [13]


def test_two_in_one_batch_and_one_in_another() -> None:
    came, loader = run(Faulty("kill"))
    assert as_seen(came) == as_seen([without(batch, BAD) for batch in sound_batches()])
    assert loader.audit is not None
    assert sorted(loader.audit.skipped.tolist()) == list(BAD)


def test_with_another_in_its_place() -> None:
    came, _ = run(Faulty("kill", (13,)), on_error="replace")
    assert as_seen(came) == as_seen([replaced(batch, (13,)) for batch in sound_batches()])


@pytest.mark.parametrize("workers", [1, 2])
def test_restarted_without_batches(workers: int) -> None:
    loader = SafeDataLoader(
        Faulty("kill", (13,)), batch_size=None, num_workers=workers, on_crash="restart"
    )
    expected = [each for each in sound_batches(batch_size=None) if int(each[0]) != 13]
    assert as_seen(list(loader)) == as_seen(expected)
    assert loader.audit is not None
    assert loader.audit.skipped.tolist() == [13]
    assert loader.audit.ok


def test_it_gives_up_after_a_bound() -> None:
    loader = SafeDataLoader(
        Faulty("kill", tuple(range(10, 30))), SIZE, num_workers=1, on_crash="restart"
    )
    iterator = iter(loader)
    came = []
    try:
        for batch in iterator:
            came.append(batch)
    except WorkerCrashError as error:
        index = error.index
    assert as_seen(came) == as_seen(sound_batches()[:2])
    assert index == 15  # ten restarts are two for each of 10 to 14
    assert loader.audit is not None
    assert not loader.audit.complete


def collate_kills(samples: list[Any]) -> Any:
    if any(int(sample[0]) == 13 for sample in samples):
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.stack(samples)


def test_a_death_that_no_sample_is_to_blame_for_gives_up_too() -> None:
    loader = SafeDataLoader(
        Sound(), SIZE, num_workers=1, on_crash="restart", collate_fn=collate_kills
    )
    error = caught(loader)
    assert isinstance(error, WorkerCrashError)
    assert error.index is None
    assert error.failure.indices == (10, 11, 12, 13, 14)


class Drawing(Sound):
    """Dies once, or not at all where ``flag`` is there already."""

    def __init__(self, flag: Path) -> None:
        super().__init__()
        self.flag = flag

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 13 and not self.flag.exists():
            self.flag.touch()
            os._exit(3)
        return super().__getitem__(index)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("mode", ["two", "persistent"])
def test_the_generators_of_main_end_where_they_would_have(
    tmp_path: Path, mode: str, own: bool
) -> None:
    def observed(flag: Path) -> Any:
        seed_all(5)
        generator = torch.Generator().manual_seed(8) if own else None
        loader = SafeDataLoader(
            Drawing(flag),
            SIZE,
            shuffle=True,
            generator=generator,
            on_crash="restart",
            **MODES[mode],
        )
        seen = []
        for _ in range(2):
            for batch in loader:
                seen.append(plain(batch))
                random.random()
                np.random.rand()
                torch.rand(1)
            seen.append(
                (rng_state(), None if generator is None else generator.get_state().tolist())
            )
        return seen

    crashed = observed(tmp_path / "died")
    assert (tmp_path / "died").exists()
    assert observed(tmp_path / "died") == crashed


def test_killed_from_outside_between_epochs() -> None:
    came, loader = run(Sound(), persistent_workers=True)
    for worker in loader._iterator._workers[:1]:  # type: ignore[union-attr]
        worker.kill()
        worker.join(30)
    for _ in range(2):
        assert as_seen(list(loader)) == as_seen(came)
        assert loader.audit is not None
        assert loader.audit.ok
    assert loader.audit.counts["skipped"] == 0


def test_both_kinds_of_fault_at_once() -> None:
    dataset = FaultyBoth("raise", (3, 27))
    came, loader = run(dataset, on_error="skip")
    assert as_seen(came) == as_seen([without(batch, (3, 13, 27)) for batch in sound_batches()])
    assert loader.audit is not None
    assert sorted(loader.audit.skipped.tolist()) == [3, 13, 27]


class FaultyBoth(Faulty):
    def __getitem__(self, index: Any) -> Any:
        if index == 13:
            os._exit(3)
        return super().__getitem__(index)


def test_a_death_that_is_not_to_be_restarted() -> None:
    error = caught(SafeDataLoader(Faulty("kill", (13,)), SIZE, num_workers=2, on_error="skip"))
    assert isinstance(error, WorkerCrashError)
    assert error.index == 13


def test_a_stream_cannot_be_restarted() -> None:
    with pytest.raises(ValueError, match="map-style"):
        SafeDataLoader(Numbers(), SIZE, num_workers=2, on_crash="restart")


class DiesOnce(IterableDataset):  # type: ignore[type-arg]
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __iter__(self) -> Iterator[int]:
        for number in range(8):
            if number == 5 and not self.flag.exists():
                self.flag.touch()
                os._exit(9)
            yield number


def test_nor_where_restarts_are_asked_for_later(tmp_path: Path) -> None:
    # As the launcher asks for them, of every loader of a program.
    loader = SafeDataLoader(DiesOnce(tmp_path / "died"), 2, num_workers=1, verify="warn")
    loader.on_crash = "restart"
    came: list[list[int]] = []
    with pytest.raises(WorkerCrashError):
        came.extend(batch.tolist() for batch in loader)
    assert came == [[0, 1], [2, 3]]


def test_a_death_is_told_soon_though_the_other_worker_goes_on() -> None:
    loader = SafeDataLoader(Sound(2000), SIZE, num_workers=2, in_order=False)
    iterator: Any = iter(loader)
    came = after = 0
    try:
        for _ in iterator:
            came += 1
            if came == 5:
                worker = iterator._workers[1]
                worker.kill()
                worker.join(30)
                while not any(fd for fd, _ in iterator._data_queue._results.poll.poll(1000)):
                    continue
            after += came > 5
    except WorkerCrashError:
        pass
    assert after < 50  # what had arrived, and what was on its way


def test_collation_without_an_odd_one_out_still_raises() -> None:
    dataset = [torch.zeros(3 + k % 2) for k in range(10)]
    error = caught(SafeDataLoader(dataset, 4, on_error="skip"))
    assert isinstance(error, CollateError)


class KeysOfNothing:
    def __call__(self, sample: Any) -> int:
        return int(sample)


def test_a_key_that_raises_on_nothing_counts_no_sample_that_never_was() -> None:
    """In the last, short batch of a stream."""
    numbers = [0, 1, 2, 3, 4, 5, None]

    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            return iter(numbers)

    loader = SafeDataLoader(Stream(), 4, on_error="skip", key=KeysOfNothing())
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5]]
    audit = loader.audit
    assert audit is not None
    assert (audit.drawn, audit.delivered, audit.skipped.tolist()) == (7, 6, [[0, 6]])
