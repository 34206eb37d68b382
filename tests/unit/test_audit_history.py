"""One audit an epoch is kept: small epochs as their accounts, large ones cut, both bounded."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from safeloader import EpochAudit, Recorder, SafeDataLoader, instrument
from safeloader.handles import LoaderHandle
from safeloader.main.iterator import iterate
from safeloader.provenance import audits as module
from safeloader.provenance.audits import AuditHistory
from tests import datasets, faults


def run(loader: Any, epochs: int) -> None:
    for _ in range(epochs):
        for _ in loader:
            pass


def told(audits: list[EpochAudit]) -> list[tuple[int, int, bool]]:
    return [(audit.epoch, audit.delivered, audit.complete) for audit in audits]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("dataset", [list(range(7)), datasets.UnsharedStream(7)])
def test_each_epoch_has_its_audit(dataset: Any, workers: int, persistent: bool) -> None:
    if persistent and not workers:
        persistent = False
    loader = SafeDataLoader(dataset, 2, num_workers=workers, persistent_workers=persistent)
    assert loader.audits == []
    run(loader, 3)
    number = 7 * (workers if workers and not isinstance(dataset, list) else 1)
    assert told(loader.audits) == [(epoch, number, True) for epoch in range(3)]
    assert [str(audit) for audit in loader.audits][-1] == str(loader.audit)


def test_they_are_what_they_were_when_their_epoch_ended() -> None:
    loader = SafeDataLoader(faults.Raises(at=5, length=12), 4, on_error="skip", drop_last=True)
    said = []
    for length in (12, 11, 12):
        loader.dataset.length = length
        run(loader, 1)
        said.append(loader.audit.to_dict())
    assert [audit.to_dict() for audit in loader.audits] == said
    assert [audit["skipped"] for audit in said] == [[5]] * 3
    assert [audit["counts"]["dropped"] for audit in said] == [0, 3, 0]


def test_an_epoch_left_early_and_one_that_runs_are_among_them() -> None:
    loader = SafeDataLoader(list(range(6)), 2)
    for _ in loader:
        break
    running = iter(loader)
    next(running)
    assert told(loader.audits) == [(0, 2, False), (1, 2, False)]
    list(running)
    assert told(loader.audits) == [(0, 2, False), (1, 6, True)]


def test_a_loop_that_never_asks_for_the_end_is_complete_all_the_same() -> None:
    loader = SafeDataLoader(list(range(6)), 2)
    for _ in range(2):
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        del batches
    assert told(loader.audits) == [(0, 6, True), (1, 6, True)]


def test_every_way_in_has_them() -> None:
    plain = DataLoader(list(range(4)), 2)
    handle = LoaderHandle(plain, {}, "train.py:1", Recorder())
    for _ in range(2):
        list(iterate(plain, handle))
    assert told(handle.audits) == [(0, 4, True), (1, 4, True)]
    ours = instrument(DataLoader(list(range(4)), 2))
    run(ours, 2)
    assert told(ours.audits) == [(0, 4, True), (1, 4, True)]  # type: ignore[attr-defined]


def test_two_loaders_on_one_recorder_are_numbered_together() -> None:
    recorder = Recorder()
    one, other = (SafeDataLoader(list(range(n)), recorder=recorder) for n in (3, 5))
    run(zip(one, other, strict=False), 1)
    assert [audit.delivered for audit in one.audits] == [3, 3]
    assert [audit.complete for audit in other.audits] == [True, False]


def test_the_dataset_can_go() -> None:
    dataset = datasets.Bulk(9)
    loader = SafeDataLoader(dataset, 4, shuffle=True)
    for batches in (3, 1):
        iterator = iter(loader)
        for _ in range(batches):
            next(iterator)
        del iterator
    run(loader, 1)
    recorder, gone = loader.recorder, weakref.ref(dataset)
    del loader, dataset
    gc.collect()
    assert gone() is None
    assert told(recorder.audits()) == [(0, 9, True), (1, 4, False), (2, 9, True)]


# ── bounds ───────────────────────────────────────────────────────────────────────────────────────


class Accounts:
    """Those of an epoch that drew ``drawn`` samples."""

    closed = True

    def __init__(self, drawn: int | None) -> None:
        self.drawn = drawn
        self.audits = self.times_put_away = 0

    def put_away(self) -> int | None:
        self.times_put_away += 1
        return self.drawn

    def audit(self, number: int) -> EpochAudit:
        self.audits += 1
        return EpochAudit(number, dropped=np.arange(5000), counts={"dropped": 5000})


def test_small_epochs_make_no_audit_before_one_is_read() -> None:
    history = AuditHistory()
    accounts = [Accounts(drawn) for drawn in (100, 1 << 15, None, 100)]
    for number, each in enumerate(accounts):
        history.begins(number, each)
    assert [each.audits for each in accounts] == [0, 1, 1, 0]
    found = history.audits()
    assert [audit.dropped.size for audit in found] == [1000, 1000, 1000, 5000]
    assert [audit.counts["dropped"] for audit in found] == [5000] * 4
    assert history.audits()[:3] == found[:3]
    assert [each.audits for each in accounts] == [1, 1, 1, 2]
    assert [each.times_put_away for each in accounts] == [1, 1, 1, 0]


def test_what_small_epochs_hold_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HELD_MAX", 250)
    history = AuditHistory()
    accounts = [Accounts(100) for _ in range(5)]
    for number, each in enumerate(accounts):
        history.begins(number, each)
    assert [each.audits for each in accounts] == [1, 1, 0, 0, 0]
    assert [audit.epoch for audit in history.audits()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("drawn", [1, 1 << 15])
def test_the_newest_are_kept(drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AUDITS_MAX", 3)
    history = AuditHistory()
    for number in range(6):
        history.begins(number, Accounts(drawn))
    assert [audit.epoch for audit in history.audits()] == [3, 4, 5]
    assert history._held == 0


def test_an_epoch_that_is_not_closed_is_left_as_it_is() -> None:
    history, first = AuditHistory(), Accounts(5)
    first.closed = False
    for number, each in enumerate((first, Accounts(5), Accounts(5))):
        history.begins(number, each)
    assert first.times_put_away == 0
    assert [audit.dropped.size for audit in history.audits()] == [5000, 1000, 5000]


def test_keys_are_let_go_of_with_their_epoch() -> None:
    loader = SafeDataLoader(list(range(8)), 2, key=faults.key_value)
    run(loader, 2)
    ledgers = [each.ledger for each, _ in loader.recorder.history._small.values()]
    assert [ledger._keyed for ledger in ledgers] == [None]
    assert loader.audits[0].ok


@pytest.mark.slow
def test_what_is_held_of_small_batches_is_small() -> None:
    loader = SafeDataLoader(range(3000), batch_size=1, recorder=Recorder(max_bytes=10_000))
    run(loader, 2)
    gc.collect()
    tracemalloc.start()
    try:
        run(loader, 1)
        before = tracemalloc.get_traced_memory()[0]
        run(loader, 4)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert held < 4 * 50_000  # and not 50 bytes a batch
    assert told(loader.audits) == [(epoch, 3000, True) for epoch in range(7)]


def test_an_audit_that_was_read_leaves_no_map_behind() -> None:
    loader = SafeDataLoader(range(300), batch_size=100)
    for _ in range(4):
        run(loader, 1)
        assert loader.audit.complete
    assert len(loader.recorder.history._small) == 0
    assert told(loader.audits) == [(epoch, 300, True) for epoch in range(4)]


def test_indices_that_are_names_make_an_audit_at_once() -> None:
    names = {"a": 1, "b": 2}
    loader = SafeDataLoader(names, sampler=["a", "b", "a"], batch_size=2)  # type: ignore[arg-type]
    run(loader, 3)
    assert [audit.repeated.tolist() for audit in loader.audits] == [["a"]] * 3
