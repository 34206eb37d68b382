"""``on_error="replace"``: as many batches as without a fault, each of the stock loader's shape.

Where no sample of a batch comes, one drawn earlier in the epoch stands in for all of it. Which one
follows from the draws alone, so every number of workers gives the same.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from safeloader import CollateError, SafeDataLoader, SampleError
from safeloader.provenance import events
from tests.oracle import plain, rng_state, seed_all
from tests.processes.test_failures import caught
from tests.processes.test_going_on import (
    LENGTH,
    WORKERS,
    Faulty,
    FaultyBulk,
    FaultyTogether,
    Numbers,
    Sound,
    as_seen,
    first_number,
    indices_of,
    sound_batches,
    stood_in_for,
)

WHOLE = (13, *range(15, 20), 27)  # all of the fourth batch of five, and one in each of two others


def replacing(dataset: Any, size: int | None = 5, **more: Any) -> SafeDataLoader[Any]:
    return SafeDataLoader(dataset, size, **({"on_error": "replace", "max_skipped": 1.0} | more))


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", [Faulty, FaultyTogether])
@pytest.mark.parametrize(("size", "bad"), [(5, WHOLE), (1, (13, 14, 27)), (None, (13, 14, 27))])
def test_a_batch_that_fails_whole_is_stood_in_for(
    size: int | None, bad: tuple[int, ...], kind: type[Faulty], workers: int
) -> None:
    loader = replacing(kind("raise", bad), size, num_workers=workers, key=first_number)
    expected = stood_in_for(sound_batches(batch_size=size), bad)
    came = []
    for number, batch in enumerate(loader):
        came.append(batch)
        record = loader.last_batch
        assert record is not None
        assert list(record.indices) == indices_of(batch)
        assert len(record.fetch_ns) == len(record.indices)
        assert record.batch == number
    assert as_seen(came) == as_seen(expected)
    assert loader.provenance.to_numpy()["index"].tolist() == [
        index for batch in expected for index in indices_of(batch)
    ]
    audit = loader.audit
    assert audit is not None
    assert (audit.ok, audit.complete) == (True, True)
    assert (audit.drawn, audit.delivered) == (LENGTH, LENGTH - len(bad))
    assert audit.replaced.tolist() == list(bad)
    assert audit.counts["skipped"] == 0
    donors = {13: 14, **dict.fromkeys(range(15, 20), 14), 27: 28}
    assert audit.donors == (donors if size == 5 else {13: 12, 14: 12, 27: 26})
    assert f"delivered, {len(bad)} replaced\n" in str(audit)
    assert f"13 (by {audit.donors[13]})" in str(audit)
    assert json.loads(json.dumps(audit.to_dict()))["donors"]["27"] == audit.donors[27]


@pytest.mark.parametrize("how", ["None", "shape"])
@pytest.mark.parametrize("workers", WORKERS)
def test_a_batch_that_collation_gives_up_whole(how: str, workers: int) -> None:
    bad = (10, 11, 12, 13, 14) if how == "None" else (8, 9)
    loader = replacing(Faulty(how, bad), num_workers=workers)
    expected = stood_in_for(sound_batches(), bad)
    assert as_seen(list(loader)) == as_seen(expected)
    assert loader.audit is not None
    assert loader.audit.replaced.tolist() == list(bad)


def refuses_none(samples: list[Any]) -> Any:
    return torch.stack(samples)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_donor_that_does_not_collate_is_passed_over(workers: int) -> None:
    loader = replacing(Faulty("None", (6, 7, 8)), 1, num_workers=workers, collate_fn=refuses_none)
    assert as_seen(list(loader)) == as_seen(stood_in_for(sound_batches(batch_size=1), (6, 7, 8)))
    assert loader.audit is not None
    assert loader.audit.donors == {6: 5, 7: 5, 8: 5}


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("size", [5, 1, None])
def test_without_anything_drawn_before_the_error_is_raised(size: int | None, workers: int) -> None:
    bad = tuple(range(size or 1))
    loader = replacing(Faulty("raise", bad), size, num_workers=workers)
    iterator = iter(loader)
    with pytest.raises(SampleError, match="nothing drawn earlier in this epoch") as info:
        next(iterator)
    assert isinstance(info.value, ValueError)
    assert (info.value.index, info.value.failure.position, info.value.failure.batch) == (0, 0, 0)
    assert as_seen(list(iterator)) == as_seen(sound_batches(batch_size=size)[1:])
    audit = loader.audit
    assert audit is not None
    assert (audit.failed.tolist(), audit.counts["replaced"]) == (list(bad), 0)
    assert (audit.ok, audit.complete) == (False, True)


def test_what_was_drawn_in_an_earlier_epoch_stands_in_for_nothing() -> None:
    loader = replacing(Faulty("raise", (0,)), 1, num_workers=2, persistent_workers=True)
    for _ in range(2):
        assert caught(loader).index == 0


@pytest.mark.parametrize("workers", WORKERS)
def test_a_batch_that_the_dataset_makes_itself_is_stood_in_for(workers: int) -> None:
    """``batch_size=None`` with lists of indices, one list refilled; the last is shorter."""
    loader = replacing(
        FaultyBulk("raise", (13, 40)),
        None,
        sampler=Refilling(BatchSampler(SequentialSampler(Sound()), 5, False)),
        num_workers=workers,
    )
    came = list(loader)
    assert [indices_of(batch) for batch in came] == [
        *([[k, k + 1, k + 2, k + 3, k + 4] for k in (0, 5, 5, 15, 20, 25, 30, 35)]),
        [35, 36],
    ]
    audit = loader.audit
    assert audit is not None
    assert audit.replaced.tolist() == [10, 11, 12, 13, 14, 40, 41]
    assert audit.donors == {10: 5, 11: 6, 12: 7, 13: 8, 14: 9, 40: 35, 41: 36}
    table = loader.provenance.to_numpy()
    assert table["index"].tolist() == [index for batch in came for index in indices_of(batch)]


class Refilling:
    """Gives one list again and again."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        row: list[int] = []
        for each in self.sampler:
            row[:] = each
            yield row

    def __len__(self) -> int:
        return len(self.sampler)


class Random(Sound):
    """Draws for each sample; gives what follows from the index alone."""

    def __init__(self, bad: tuple[int, ...]) -> None:
        super().__init__()
        self.bad = bad

    def __getitem__(self, index: int) -> torch.Tensor:
        torch.rand(2), random.gauss(0, 1), np.random.randn()
        if index in self.bad:
            raise ValueError(f"no sample {index}")
        return super().__getitem__(index)


def test_the_generators_end_where_they_would_have() -> None:
    ends = []
    for on_error in ("skip", "replace"):
        seed_all(3)
        list(replacing(Random(WHOLE), on_error=on_error))
        ends.append(rng_state())
    assert ends[0] == ends[1]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("size", [1, None])
def test_a_sample_that_kills_its_worker_twice_is_stood_in_for(
    size: int | None, workers: int
) -> None:
    loader = replacing(Faulty("kill", (13,)), size, num_workers=workers, on_crash="restart")
    assert as_seen(list(loader)) == as_seen(stood_in_for(sound_batches(batch_size=size), (13,)))
    audit = loader.audit
    assert audit is not None
    assert (audit.replaced.tolist(), audit.donors, audit.ok) == ([13], {13: 12}, True)
    assert "died at it twice" in audit.reasons[13]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_made_by_the_dataset_that_kills_its_worker_is_stood_in_for(workers: int) -> None:
    sampler = BatchSampler(SequentialSampler(Sound()), 6, False)
    dataset = FaultyBulk("kill", (13,))
    loader = replacing(dataset, None, sampler=sampler, num_workers=workers, on_crash="restart")
    starts = [indices_of(batch)[0] for batch in loader]
    assert starts == [0, 6, 6, 18, 24, 30, 36]
    assert loader.audit is not None
    assert loader.audit.replaced.tolist() == list(range(12, 18))


class Mixed(Faulty):
    """13 kills, 14 and 15 raise."""

    def __getitem__(self, index: Any) -> Any:
        if index in (14, 15):
            raise ValueError("no sample")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_sample_that_kills_its_worker_is_no_donor(workers: int) -> None:
    loader = replacing(Mixed("kill", (13,)), 1, num_workers=workers, on_crash="restart")
    expected = stood_in_for(sound_batches(batch_size=1), (13, 14, 15))
    assert as_seen(list(loader)) == as_seen(expected)
    assert loader.audit is not None
    assert loader.audit.donors == {13: 12, 14: 12, 15: 12}


class KillsAsDonor(Faulty):
    """12 comes once, and kills whoever asks for it again."""

    def __init__(self, flag: Path) -> None:
        super().__init__("kill", (12,), flag=flag)

    def _still(self) -> bool:
        return not super()._still()

    def __getitem__(self, index: Any) -> Any:
        if index == 13:
            raise ValueError("no sample 13")
        return super().__getitem__(index)


def test_a_donor_that_kills_its_worker_is_passed_over(tmp_path: Path) -> None:
    loader = replacing(KillsAsDonor(tmp_path / "asked for"), 1, num_workers=1, on_crash="restart")
    expected = sound_batches(batch_size=1)
    expected[13] = expected[11]
    assert as_seen(list(loader)) == as_seen(expected)
    assert loader.audit is not None
    assert loader.audit.donors == {13: 11}


def test_nothing_left_of_a_first_batch_but_a_sample_that_kills() -> None:
    loader = replacing(Faulty("kill", (0,)), 1, num_workers=1, on_crash="restart")
    iterator = iter(loader)
    with pytest.raises(SampleError, match="nothing drawn earlier"):
        next(iterator)
    assert as_seen(list(iterator)) == as_seen(sound_batches(batch_size=1)[1:])


@pytest.mark.parametrize("workers", WORKERS)
def test_a_broken_program_is_told_though_it_shows_at_a_donor(workers: int) -> None:
    class Broken(Sound):
        asked_for_13 = False  # of this process's copy: sample 12 is asked for again, as a donor

        def __getitem__(self, index: Any) -> Any:
            if index == 13:
                self.asked_for_13 = True
                raise ValueError("no sample 13")
            if index == 12 and self.asked_for_13:
                raise MemoryError
            return super().__getitem__(index)

    error = caught(replacing(Broken(), 1, num_workers=workers))
    assert isinstance(error, MemoryError)
    assert (error.index, error.failure.indices) == (None, (13,))
    assert "at index 12, to stand in" in str(error)


@pytest.mark.parametrize("workers", WORKERS)
def test_replaced_ones_count_for_max_skipped_and_are_failed_with_its_error(workers: int) -> None:
    loader = replacing(Faulty("raise", (13, 14, 27)), 1, num_workers=workers, max_skipped=2)
    iterator = iter(loader)
    came: list[Any] = []
    with pytest.raises(SampleError, match="3 of the 28 samples so far were replaced"):
        came.extend(iterator)
    assert len(came) == 27
    assert len(list(iterator)) == LENGTH - 28
    audit = loader.audit
    assert audit is not None
    assert (audit.replaced.tolist(), audit.failed.tolist()) == ([13, 14], [27])
    assert audit.delivered + audit.counts["replaced"] == LENGTH - 1
    assert audit.reasons[27] == "ValueError: no sample 27"


@pytest.mark.parametrize("workers", WORKERS)
def test_checksums_know_the_donor(workers: int) -> None:
    loader = replacing(Faulty("raise", WHOLE), num_workers=workers, checksum=True)
    assert as_seen(list(loader)) == as_seen(stood_in_for(sound_batches(), WHOLE))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("workers", WORKERS)
def test_the_last_batch(drop_last: bool, workers: int) -> None:
    loader = replacing(Faulty("raise", (40, 41)), num_workers=workers, drop_last=drop_last)
    stock = sound_batches(drop_last=drop_last)
    assert as_seen(list(loader)) == as_seen(stood_in_for(stock, (40, 41)))
    assert loader.audit is not None
    assert loader.audit.replaced.tolist() == ([] if drop_last else [40, 41])
    assert loader.audit.ok


# what cannot be sent, and indices of any kind ───────────────────────────────────────────────────


class Named(Sound):
    def __getitem__(self, index: Any) -> int:
        if index in ("c", ("f", 1)):
            raise ValueError(f"no sample {index}")
        return len(str(index))


@pytest.mark.parametrize("workers", WORKERS)
def test_names_stand_in_for_names(workers: int) -> None:
    names = ["a", "bb", "c", ("e", 1), ("f", 1), "ggg"]
    loader = replacing(Named(), 1, sampler=names, num_workers=workers)
    assert [batch.tolist() for batch in loader] == [[1], [2], [2], [8], [8], [3]]
    assert loader.audit is not None
    assert loader.audit.donors == {"c": "bb", ("f", 1): ("e", 1)}
    assert json.loads(json.dumps(loader.audit.to_dict()))["donors"]["'c'"] == "'bb'"


class Ticked(Sound):
    """Asked with tensors."""

    def __getitem__(self, index: torch.Tensor) -> int:
        if index.item() in (7, 8):
            raise ValueError(f"no sample {index}")
        return int(index.item())


class Ticks:
    """Batches of indices in one tensor that is written again and again."""

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[torch.Tensor]:
        ticks = torch.zeros(2, dtype=torch.int64)
        for first in range(1, 13, 2):
            ticks[:] = torch.tensor([first, first + 1])
            yield ticks


def test_indices_written_again_stand_in_as_they_were_drawn() -> None:
    loader = SafeDataLoader(Ticked(), batch_sampler=Ticks(), on_error="replace")
    assert [batch.tolist() for batch in loader][:4] == [[1, 2], [3, 4], [5, 6], [6, 6]]


def test_an_index_that_cannot_be_sent_fails_its_own_batch_alone() -> None:
    indices: list[Any] = [0, 1, lambda: None, 3, 4, 5]
    loader = replacing(Faulty("raise", (40,)), 1, sampler=indices, num_workers=1)
    iterator = iter(loader)
    came = []
    while len(came) < 6:
        try:
            came.append(indices_of(next(iterator)))
        except Exception as exc:
            came.append([type(exc).__mro__[1].__name__])
    assert [each for k, each in enumerate(came) if k != 2] == [[0], [1], [3], [4], [5]]


# streams ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, None])
@pytest.mark.parametrize("workers", WORKERS)
def test_a_batch_of_a_stream_that_fails_whole_is_an_error(workers: int, size: int | None) -> None:
    """Nothing can be asked for again there, and a batch less is what was to be avoided."""
    loader = replacing(Numbers((13,)), size, num_workers=workers)
    iterator = iter(loader)
    came, told = [], []
    while True:
        try:
            came.append(int(torch.as_tensor(next(iterator)).reshape(-1)[0]))
        except StopIteration:
            break
        except SampleError as error:
            told.append(str(error))
    assert sorted(came) == sorted(set(range(LENGTH)) - {13})
    assert len(told) == 1
    assert "could stand in for it" in told[0]
    audit = loader.audit
    assert audit is not None
    assert (audit.counts["failed"], audit.complete) == (1, True)


class LeakyCollate:
    def __call__(self, samples: list[Any]) -> Any:
        if 12 in samples:
            raise StopIteration
        return torch.tensor(samples)


def test_a_collate_function_that_leaks_a_stop_iteration_does_not_end_a_stream() -> None:
    """Where samples of the batch were left out, as where none were."""
    loader = SafeDataLoader(Numbers((13,)), 5, on_error="skip", collate_fn=LeakyCollate())
    iterator = iter(loader)
    came: list[int] = []
    told = 0
    while True:
        try:
            came += next(iterator).tolist()
        except CollateError:
            told += 1
        except StopIteration:
            break
    assert (told, came) == (1, [*range(10), *range(15, LENGTH)])


# which sample is named, beside ones that were left out ─────────────────────────────────────────


class OddAfterBad(Sound):
    def __getitem__(self, index: Any) -> Any:
        if index == 1:
            raise ValueError("no sample 1")
        return torch.zeros(7) if index == 3 else torch.zeros(2)


@pytest.mark.parametrize("workers", WORKERS)
def test_an_odd_sample_behind_one_left_out_is_named_by_its_own_index(workers: int) -> None:
    loader = SafeDataLoader(OddAfterBad(), 5, num_workers=workers, on_error="skip")
    assert [len(batch) for batch in loader][:2] == [3, 5]
    assert loader.audit is not None
    assert sorted(loader.audit.skipped.tolist()) == [1, 3]
    assert "dataset index 3 " in loader.audit.reasons[3]


# failures that end no batch, as files ───────────────────────────────────────────────────────────


def dumped(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text())["failure"] for path in folder.glob("*.json")]
    return sorted(found, key=lambda failure: str(failure["index"]))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("on_error", ["skip", "replace", lambda failure: torch.zeros(2)])
@pytest.mark.parametrize("size", [5, 1, None])
def test_failures_of_samples_left_out_are_written_too(
    tmp_path: Path, size: int | None, on_error: Any, workers: int
) -> None:
    dataset = Faulty("raise", (13, 14, 27))
    loader = replacing(
        dataset, size, on_error=on_error, num_workers=workers, on_failure_dump=tmp_path
    )
    if callable(on_error):
        loader.collate_fn = zeros
    list(loader)
    found = dumped(tmp_path)
    assert [failure["index"] for failure in found] == [13, 14, 27]
    for failure in found:
        if on_error != "skip":
            assert failure["batch"] == failure["index"] // (size or 1)
        assert (failure["epoch"], failure["phase"]) == (0, "sample")
        assert failure["exception_type"] == "ValueError"
        assert "no sample" in failure["traceback"]
        assert failure["dataset_state"]["class"].endswith("Faulty")
    assert all(delivery.manifest.failures is None for delivery in loader.recorder.deliveries())


def zeros(samples: Any) -> int:
    return 0


@pytest.mark.parametrize("workers", WORKERS)
def test_those_of_a_stream_are_written_too(tmp_path: Path, workers: int) -> None:
    list(replacing(Numbers((13, 27)), num_workers=workers, on_failure_dump=tmp_path))
    said = sorted(failure["message"] for failure in dumped(tmp_path))
    assert said == ["no number 13", "no number 27"]


def test_their_number_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events, "DUMPS_MAX", 4)
    bad = tuple(range(1, 42, 3))
    loader = replacing(Faulty("raise", bad), on_failure_dump=tmp_path)
    with caplog.at_level(logging.WARNING, logger="safeloader"):
        list(loader)
    assert len(dumped(tmp_path)) == 4
    assert caplog.text.count("no more of them in this epoch") == 1
    list(loader)
    assert len(dumped(tmp_path)) == 8  # the next epoch's


def test_the_death_of_a_worker_that_is_restarted_is_written(tmp_path: Path) -> None:
    loader = replacing(
        Faulty("kill", (13,)), num_workers=1, on_crash="restart", on_failure_dump=tmp_path
    )
    list(loader)
    found = dumped(tmp_path)
    assert [(each["phase"], each["index"]) for each in found] == [("crash", 13)] * 2


def test_without_a_folder_no_failure_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = replacing(Faulty("raise", WHOLE))
    described = []
    monkeypatch.setattr(
        "safeloader.worker.hints.describe", lambda dataset: described.append(1) or {}
    )
    list(loader)
    assert described == []


# as many as stock gives, whatever fails ─────────────────────────────────────────────────────────

indices = st.integers(0, 29)


@pytest.mark.uncovered
@settings(max_examples=25, deadline=None)
@given(
    bad=st.lists(indices, unique=True, max_size=12),
    size=st.sampled_from([1, 2, 3, 7, None]),
    how=st.sampled_from(["raise", "None", "shape"]),
    together=st.booleans(),
    drop_last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_as_many_batches_as_stock_gives_whatever_fails(
    bad: list[int], size: int | None, how: str, together: bool, drop_last: bool, seed: int
) -> None:
    if size is None and how == "None":
        how = "raise"  # default_convert takes None for a sample
    kind = FaultyTogether if together else Faulty

    def observed(workers: int) -> tuple[list[Any], list[Any]]:
        order = torch.Generator().manual_seed(seed)
        more = {"drop_last": drop_last} if size else {}
        loader = replacing(
            kind(how, tuple(bad), length=30),
            size,
            num_workers=workers,
            shuffle=True,
            generator=order,
            **more,
        )
        iterator = iter(loader)
        came: list[Any] = []
        failed = []
        while True:
            try:
                came.append(plain(next(iterator)))
            except StopIteration:
                break
            except (SampleError, CollateError) as error:
                came.append("error")
                failed += error.failure.indices
        audit = loader.audit
        assert audit is not None
        assert audit.complete
        assert sorted(audit.failed.tolist()) == sorted(failed)
        assert audit.delivered + audit.counts["replaced"] + len(failed) + len(audit.dropped) == 30
        return came, [audit.replaced.tolist(), audit.donors]

    order = torch.Generator().manual_seed(seed)
    more = {"drop_last": drop_last} if size else {}
    stock = list(DataLoader(Sound(30), size, shuffle=True, generator=order, **more))
    mine = observed(0)
    assert len(mine[0]) == len(stock)
    for came, theirs in zip(mine[0], stock, strict=True):
        # A sample of another shape is all right where it is alone.
        assert came == "error" or came[:4] == plain(theirs)[:4] or how == "shape"
    assert observed(1) == mine
    assert observed(2) == mine
