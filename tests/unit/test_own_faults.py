"""A fault of our own ends the part that has it, and never the training."""

from __future__ import annotations

import functools
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import safeloader.loader
from safeloader import (
    SKIP,
    CollateError,
    DeliveryError,
    EpochAudit,
    Recorder,
    SafeDataLoader,
    SampleError,
    TransportError,
)
from safeloader.delivery import coverage, ledger, skip_budget, stream_ledger
from safeloader.delivery.indices import pack
from safeloader.failures import dump
from safeloader.main import drawing, epoch
from safeloader.provenance import trace
from safeloader.provenance.events import Events
from tests import faults


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return iter(torch.arange(22.0)[first::step])


DATA: dict[str, Any] = {"map": torch.arange(22.0), "stream": Stream()}
EVERY_WAY = [(kind, workers) for kind in DATA for workers in (0, 2)]
every_way = pytest.mark.parametrize(("kind", "workers"), EVERY_WAY)


def faulty(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("a fault of ours")


def from_the(number: int, method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` that works at first and raises from its ``number``-th call on."""
    calls: list[int] = []

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return faulty() if len(calls) > number else method(*args, **kwargs)

    return sometimes


ACCOUNTS = {
    "recorder": (Recorder, "delivered"),
    "map ledger, check": (ledger.MapLedger, "check"),
    "map ledger, drawn": (ledger.MapLedger, "drawn"),
    "map ledger, end of the draws": (ledger.MapLedger, "draws_ended"),
    "map ledger, end": (ledger.MapLedger, "finish"),
    "map ledger, audit": (ledger.MapLedger, "audit"),
    "map ledger, notes": (ledger.MapLedger, "notes"),
    "stream ledger, check": (stream_ledger.StreamLedger, "check"),
    "stream ledger, end": (stream_ledger.StreamLedger, "finish"),
    "stream ledger, audit": (stream_ledger.StreamLedger, "audit"),
    "coverage": (coverage.Coverage, "add"),
    "drawing": (drawing, "pack"),
}


def batches(loader: DataLoader[Any]) -> list[list[float]]:
    torch.manual_seed(3)
    return [batch.tolist() for batch in loader]


def by_stock(kind: str, workers: int, **more: Any) -> tuple[dict[str, Any], list[list[float]]]:
    """A loader's arguments, and what the stock loader makes of them."""
    how = {"batch_size": 4, "num_workers": workers, "shuffle": kind == "map" or None} | more
    return how, batches(DataLoader(DATA[kind], **how))


@every_way
@pytest.mark.parametrize("good", [0, 2])
@pytest.mark.parametrize("part", ACCOUNTS)
def test_a_fault_in_the_accounts_ends_them_and_not_the_training(
    part: str,
    good: int,
    kind: str,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    how, stock = by_stock(kind, workers)
    owner, name = ACCOUNTS[part]
    broken = from_the(good, getattr(owner, name))
    struck: list[bool] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        try:
            return broken(*args, **kwargs)
        except ZeroDivisionError:
            struck.append(True)
            raise

    monkeypatch.setattr(owner, name, noting)
    loader = SafeDataLoader(DATA[kind], **how)
    assert batches(loader) == stock
    audits = [loader.audit for _ in range(4)]
    if not struck:  # this part is not asked here, or not so often
        assert (audits[0].ok, audits[0].unchecked_since) == (True, None)
        return
    audit: EpochAudit = audits[-1]
    assert audit.ok is None
    assert audit.complete is False
    assert audit.unchecked_since is not None
    assert 0 <= audit.unchecked_since <= len(stock)
    assert f"not complete, not checked since batch {audit.unchecked_since}; " in str(audit)
    assert json.loads(json.dumps(audit.to_dict()))["unchecked_since"] == audit.unchecked_since
    assert audit.to_dict()["ok"] is None
    told = [text for text in caplog.messages if "a fault of ours" in text]
    assert len(told) == 1
    assert "is off for the rest of this epoch; training goes on" in told[0]
    assert batches(loader) == stock  # the next epoch goes the same way


@pytest.mark.parametrize("good", [0, 1, 3])
def test_the_audit_says_since_when(good: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger.MapLedger, "check", from_the(good, ledger.MapLedger.check))
    loader = SafeDataLoader(torch.arange(22.0), 4)
    assert len(list(loader)) == 6
    assert loader.audit.unchecked_since == good
    assert len(loader.provenance) == 22  # the recorder is another part


def test_the_records_end_where_the_recorder_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "delivered", from_the(2, Recorder.delivered))
    loader = SafeDataLoader(torch.arange(22.0), 4)
    assert len(list(loader)) == 6
    assert loader.audit.unchecked_since == 2
    assert loader.audit.delivered == 22
    assert len(loader.provenance) == 8


@every_way
@pytest.mark.parametrize("good", [0, 1])
@pytest.mark.parametrize("name", ["begin_epoch", "audit"])
def test_an_audit_that_cannot_be_had_says_why(
    name: str,
    good: int,
    kind: str,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    how, stock = by_stock(kind, workers)
    monkeypatch.setattr(Recorder, name, from_the(good, getattr(Recorder, name)))
    loader = SafeDataLoader(DATA[kind], **how)
    for number in range(good + 1):
        assert batches(loader) == stock
        audit = loader.audit
        assert audit.epoch == number
        if number < good:
            assert audit.ok
    assert (audit.ok, audit.complete, audit.unchecked_since) == (None, False, 0)
    assert "failed: a fault of safeloader's own" in audit.notes[-1]
    assert len([text for text in caplog.messages if "a fault of ours" in text]) == 1


def test_records_of_an_epoch_that_was_not_begun_replace_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Recorder, "begin_epoch", from_the(1, Recorder.begin_epoch))
    loader = SafeDataLoader(torch.arange(8.0), 4, shuffle=True)
    list(loader)
    before = loader.provenance.to_numpy().tolist()
    list(loader)
    assert loader.provenance.to_numpy().tolist() == before


PARTS = {
    "events": (Events, "tell"),
    "end of the draws": (ledger.MapLedger, "draws_ended"),
    "what is dropped": (drawing, "_noting"),
    "use": (safeloader.loader, "watch_for_use"),
    "line": (safeloader.loader, "calling_line"),
}


@every_way
@pytest.mark.parametrize("part", PARTS)
def test_a_fault_beside_the_accounts_ends_no_training(
    part: str,
    kind: str,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    how, stock = by_stock(kind, workers, drop_last=True)
    owner, name = PARTS[part]
    monkeypatch.setattr(owner, name, faulty)
    loader = SafeDataLoader(DATA[kind], **how)
    assert batches(loader) == stock
    told = [text for text in caplog.messages if "a fault of ours" in text]
    struck = part != "end of the draws" or kind == "map"  # a stream's sampler has no end
    assert len(told) == struck
    in_accounts = part in ("end of the draws", "what is dropped") and struck
    assert loader.audit.ok is (None if in_accounts else True)


def test_a_ledger_that_failed_grows_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger.MapLedger, "check", faulty)
    loader = SafeDataLoader(torch.arange(4000.0), 4)
    iterator: Any = iter(loader)
    for _ in iterator:
        assert len(iterator._epoch.ledger._pending) <= 1


@every_way
@pytest.mark.parametrize("what", ["the log", "files"])
def test_a_fault_in_the_trace_ends_the_trace_alone(
    what: str,
    kind: str,
    workers: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    how, stock = by_stock(kind, workers)
    for cls in (trace.LogTrace, trace.FileTrace):
        for name in ("drawn", "delivered", "failed", "audited"):
            monkeypatch.setattr(cls, name, faulty)
    loader = SafeDataLoader(DATA[kind], **how, trace=True if what == "the log" else tmp_path)
    assert batches(loader) == stock
    assert loader.audit.ok
    (told,) = [text for text in caplog.messages if "a fault of ours" in text]
    assert "Trace failed and is off" in told


@every_way
def test_a_handler_of_the_log_that_raises_ends_the_lines_alone(
    kind: str, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    class Raises(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            faulty()

    how, stock = by_stock(kind, workers)
    logger, handler = logging.getLogger("safeloader"), Raises()
    before = logger.level
    logger.addHandler(handler)
    try:
        loader = SafeDataLoader(DATA[kind], **how, trace=True)
        assert batches(loader) == stock
        skipping = SafeDataLoader(faults.Raises(), 4, num_workers=workers, on_error="skip")
        assert sum(map(len, skipping)) == 39
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    assert loader.audit.ok
    assert skipping.audit.ok
    assert capsys.readouterr().err.count("a logging handler raised") == 2  # once for each loader


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dump_that_fails_hides_no_error(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dump, "write", faulty)
    for on_error in ("raise", "skip"):
        loader = SafeDataLoader(
            faults.Raises(), 4, num_workers=workers, on_failure_dump=tmp_path, on_error=on_error
        )
        if on_error == "raise":
            with pytest.raises(KeyError):
                list(loader)
        else:
            assert sum(map(len, loader)) == 39
            assert loader.audit.ok
    assert len([text for text in caplog.messages if "Dumps failed and is off" in text]) == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["describe", "differences"])
def test_an_error_is_told_without_the_dataset_where_that_cannot_be_described(
    name: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epoch, name, faulty)
    with pytest.raises(KeyError, match="feature"):
        list(SafeDataLoader(faults.Raises(), 4, num_workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_in_counting_skipped_samples_skips_on(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skip_budget.SkipBudget, "exceeded", faulty)
    loader = SafeDataLoader(faults.Raises(), 4, num_workers=workers, on_error="skip", max_skipped=0)
    assert sum(map(len, loader)) == 39
    assert loader.audit.ok is None
    assert loader.audit.skipped.tolist() == [13]


# ── what the user asked for is enforced all the same ─────────────────────────────────────────────


def test_max_skipped_holds_without_a_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger.MapLedger, "check", faulty)
    with pytest.raises(SampleError, match="too many samples failed"):
        list(SafeDataLoader(faults.Raises(), 4, on_error="skip", max_skipped=0))
    # A share of the samples is one of those that came, counted or not.
    loader = SafeDataLoader(torch.arange(4000.0), 4, on_error="skip", max_skipped=0.01)
    iterator: Any = iter(loader)
    assert len(list(iterator)) == 1000
    assert iterator._epoch._uncounted == 3996


def test_verify_holds_without_a_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "delivered", faulty)

    class Few(list[int]):
        def __getitems__(self, indices: list[int]) -> list[int]:
            return indices[:-1]

    with pytest.raises(DeliveryError):
        list(SafeDataLoader(Few(range(8)), 4))


@pytest.mark.parametrize("workers", [1])
def test_a_checksum_holds_without_accounts(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "delivered", faulty)
    monkeypatch.setattr(ledger.MapLedger, "check", faulty)
    loader = SafeDataLoader(torch.arange(8.0), 4, num_workers=workers, checksum=True)
    iterator: Any = iter(loader)
    advance = iterator._advance

    def damaged(stock: Any) -> Any:
        came = advance(stock)
        came.payload.add_(1)
        return came

    iterator._advance = damaged
    monkeypatch.undo()
    with pytest.raises(TransportError):
        list(iterator)


class TooLong(Exception):
    """A time limit of the user's."""


@pytest.fixture
def limit() -> Iterator[None]:
    """Have SIGALRM raise it."""

    def over(number: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, over)
    yield
    signal.signal(signal.SIGALRM, before)


def strike(*_: Any) -> None:
    signal.raise_signal(signal.SIGALRM)


needs_alarms = pytest.mark.skipif(sys.platform == "win32", reason="needs alarms")


@needs_alarms
@pytest.mark.usefixtures("limit")
def test_a_signal_handler_that_raises_is_no_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "delivered", strike)
    loader = SafeDataLoader(torch.arange(8.0), 4)
    with pytest.raises(TooLong):
        next(iter(loader))
    assert loader.audit.unchecked_since is None
    assert loader.audit.failed.tolist() == [0, 1, 2, 3]


class Limits(dict[int, int]):
    """The limit strikes in whatever asks for the key that is its number: no code runs here."""

    __missing__ = signal.raise_signal


class Numbers(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(12))


class Limited(IterableDataset[int]):
    def __iter__(self) -> Iterator[Any]:
        return chain(range(3), map(signal.raise_signal, [signal.SIGALRM]), range(4, 12))


class LimitsItself:
    """As a dataset does that allows each sample a time."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        if index == 3:
            strike()
        return index


def limited_collate(samples: list[int]) -> list[int]:
    if 3 in samples:
        strike()
    return samples


WENT_ON: list[dict[str, Any]] = [
    {"on_error": "skip"},
    {"on_error": "replace"},
    {"on_error": lambda failure: SKIP},
    {"on_error": "skip", "retries": 1},
]


@needs_alarms
@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize("more", WENT_ON, ids=repr)
@pytest.mark.parametrize("where", ["our code", "our code, stream", "collate", "collate, stream"])
def test_a_time_limit_of_the_users_is_no_fault_of_a_sample(
    where: str, more: dict[str, Any]
) -> None:
    at = int(signal.SIGALRM)
    how: dict[str, Any] = {
        "our code": {"dataset": Limits({k: k for k in range(12)}), "collate_fn": list},
        "our code, stream": {"dataset": Limited(), "collate_fn": list},
        "collate": {"dataset": list(range(12)), "collate_fn": limited_collate},
        "collate, stream": {"dataset": Numbers(), "collate_fn": limited_collate},
    }[where]
    if where == "our code":
        how["sampler"] = [0, 1, 2, at, *range(4, 12)]
    loader = SafeDataLoader(batch_size=4, **how, **more)
    batches = iter(loader)
    with pytest.raises(TooLong, match="raised by a signal handler") as raised:
        next(batches)
    assert isinstance(raised.value, CollateError if "collate" in where else SampleError)
    assert raised.value.index is None
    rest = [4, 5, 6, 7, 8, 9, 10, 11]
    assert [each for batch in batches for each in batch] == rest
    audit = loader.audit
    assert (audit.counts["skipped"], audit.counts["replaced"]) == (0, 0)
    assert audit.counts["failed"] == (3 if where == "our code, stream" else 4)


@needs_alarms
@pytest.mark.usefixtures("limit")
def test_a_time_limit_that_the_dataset_sets_for_a_sample_is_one_of_the_sample() -> None:
    loader = SafeDataLoader(LimitsItself(), 4, collate_fn=list, on_error="skip")
    assert list(loader) == [[0, 1, 2], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert loader.audit.skipped.tolist() == [3]


@needs_alarms
@pytest.mark.usefixtures("limit")
def test_a_time_limit_of_the_users_is_not_swallowed() -> None:
    class Index:
        __index__ = staticmethod(functools.partial(signal.raise_signal, signal.SIGALRM))

    with pytest.raises(TooLong):
        pack([Index()])


# ── an error of the user's that cannot be described ──────────────────────────────────────────────


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "part",
    [
        "failures.failure.report",
        "failures.failure.scrub",
        "failures.failure.exception_text",
        "worker.hints.describe",
        "worker.hints.failure_of",
        "worker.hints.hint_for",
    ],
)
def test_a_description_that_fails_hides_no_error(
    part: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"safeloader.{part}", faulty)
    batches = iter(SafeDataLoader(faults.Raises(), 4, num_workers=workers))
    came = [next(batches) for _ in range(3)]
    assert len(came) == 3
    with pytest.raises(KeyError) as raised:
        next(batches)
    assert isinstance(raised.value, SampleError)
    assert len(list(batches)) == 6


def test_what_strikes_behind_the_last_sample_is_told_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from safeloader.worker import mapping

    clock, calls = mapping.clock, iter(range(1000))

    def struck() -> int:
        if next(calls) == 4:  # the start, and then a stamp for each sample
            raise TimeoutError("time limit")
        return clock()

    monkeypatch.setattr(mapping, "clock", struck)
    batches = iter(SafeDataLoader(torch.arange(8), 4))
    with pytest.raises(TimeoutError, match="time limit"):
        next(batches)
    assert next(batches).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("part", ["safeloader.provenance.trace.trace_for"])
def test_a_trace_that_cannot_begin_ends_no_training(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, faulty)
    loader = SafeDataLoader(torch.arange(8), 4)
    assert len(list(loader)) == 2
    assert loader.audit.ok


def test_a_figure_that_cannot_be_had_kills_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safeloader.supervision.monitor.WorkerMonitor._sample_memory", faulty)
    assert len(list(SafeDataLoader(torch.arange(8), 4, num_workers=1))) == 2
