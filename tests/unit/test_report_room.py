"""A report that is too large for its room keeps what is small, and says what is missing."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from safeloader.introspect.copy_state import CopyState, copy_state
from safeloader.supervision.flight_recorder import REPORT_BYTES
from safeloader.supervision.report_room import smaller_and_smaller
from safeloader.supervision.self_report import SelfReport
from safeloader.supervision.wrong_data import Seen, findings
from safeloader.worker.observing import into_flight_recorder

N = 200


class Settings:
    def __init__(self, words: int) -> None:
        for k in range(words):
            setattr(self, f"name_{k}", f"{k:04d}" * 20)


class Table:
    """Columns of words, each a list with an entry for each sample, and many settings."""

    def __init__(self, columns: int, settings: int) -> None:
        self.epoch = 0
        for k in range(columns):
            setattr(self, f"column_{k}", [f"{k}, {row}" for row in range(N)])
        for k in range(settings):
            setattr(self, f"settings_{k}", Settings(100))


def published(dataset: Any, change: Any, columns: int) -> SelfReport:
    """The report of a worker whose copy changed, as main reads it."""
    written: list[bytes] = []

    def write(raw: bytes) -> bool:
        fits = len(raw) <= REPORT_BYTES - 8
        if fits:
            written.append(raw)
        return fits

    start = copy_state(dataset, N)
    for k in range(columns):
        change(getattr(dataset, f"column_{k}"))
    into_flight_recorder(write)(SelfReport(1, 1, 10, start, copy_state(dataset, N)))
    (raw,) = written
    report = pickle.loads(raw)
    assert isinstance(report, SelfReport)
    return report


def told(main: Any, *reports: SelfReport) -> list[str]:
    seen = Seen(dict(enumerate(reports)), copy_state(main, N), N, False, False, len(reports), 1)
    return [each.about[1] for each in findings(seen)]


def shuffler(seed: int) -> Any:
    return np.random.default_rng(seed).shuffle


@pytest.mark.parametrize(("columns", "settings"), [(30, 2), (30, 7), (3, 8)])
def test_what_is_small_is_compared_however_much_there_is(columns: int, settings: int) -> None:
    reports = [published(Table(columns, settings), shuffler(seed), columns) for seed in (1, 2)]
    main = Table(columns, settings)
    main.epoch = 3
    found = told(main, *reports)
    assert "dataset.epoch" in found
    state = reports[0].now
    assert reports[0].left_out > 0
    assert list(reports[0].start.orders) == list(state.orders) == list(reports[1].now.orders)
    assert {f"dataset.{each}" for each in vars(main) if f"dataset.{each}" in state.orders} == set(
        found
    ) - {"dataset.epoch"}


def test_of_orders_as_many_are_compared_as_there_is_room_for() -> None:
    reports = [published(Table(30, 2), shuffler(seed), 30) for seed in (1, 2)]
    assert len(reports[0].now.orders) >= 10
    assert len(told(Table(30, 2), *reports)) == len(reports[0].now.orders)


def test_what_did_not_change_is_sent_once() -> None:
    def leave(column: list[str]) -> None:
        """Nothing is changed."""

    report = published(Table(32, 2), leave, 32)
    assert (report.left_out, len(report.now.orders)) == (0, 32)
    assert report.now == report.start


def test_a_small_report_goes_as_it_is() -> None:
    report = published(Table(3, 0), shuffler(1), 3)
    assert (report.left_out, len(report.now.orders), len(report.now.scalars)) == (0, 3, 1)


def test_at_last_nothing_of_the_copy_is_left() -> None:
    state = copy_state(Table(3, 0), N)
    *_, last = smaller_and_smaller(SelfReport(1, 1, 10, state, state))
    assert (last.start, last.now, last.left_out) == (CopyState({}, {}, {}), last.start, 4)
