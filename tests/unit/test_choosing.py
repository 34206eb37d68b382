"""Which of the measured settings is recommended, and what a report shows of them."""

from __future__ import annotations

import json

import pytest

from benchmarks.doctor import grid, judged
from safeloader.examining.choosing import Own, Row, chosen
from safeloader.examining.report import Examination, Finding
from safeloader.examining.wording import findings_of, recommended, rows_of, untried

FORK = Row(2, 2, "fork", (40.0, 41.0), 0.2)


def test_nothing_measured_nothing_recommended() -> None:
    assert chosen([], ()) is None
    assert chosen([Row(1, 2, "fork", (), None, "OSError: no")], ()) is None


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([Row(0, None, None, (40.0,), 0.1), FORK], 2),  # as good: workers load during a step
        ([Row(0, None, None, (60.0,), 0.1), FORK], 0),
        ([Row(0, None, None, (30.0,), 0.1), FORK], 2),
        ([FORK, Row(4, 2, "fork", (41.0,), 0.3)], 2),
        ([FORK, Row(4, 2, "fork", (50.0,), 0.3)], 4),
    ],
)
def test_fewer_workers_where_they_are_as_fast(rows: list[Row], expected: int) -> None:
    best = chosen(rows, ())
    assert best is not None
    assert best.workers == expected


def test_the_start_method_is_the_one_with_the_first_batch_first() -> None:
    slow = Row(2, 2, "spawn", (47.0,), 4.0)
    best = chosen([FORK, slow], ())
    assert best is not None
    assert best.method == "fork"  # how it is started changes nothing once it runs
    best = chosen([FORK, slow, Row(2, 2, "forkserver", (39.0,), 3.0)], {"fork"})
    assert best is not None
    assert (best.method, best.first_s) == ("forkserver", 3.0)
    best = chosen([FORK], {"fork"})  # what was not measured is better than what fails
    assert best is not None
    assert (best.workers, best.method, best.first_s) == (2, "spawn", None)
    best = chosen([FORK], {"fork", "spawn", "forkserver"})
    assert best is not None
    assert best.method == "fork"


OWN_2 = Own(2, 2, "fork")
YOURS = Row(2, 2, "fork", (46.0, 46.2, 45.9), 0.2)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (Row(2, 1, "fork", (47.0,), 0.2), YOURS),  # one turn, and hardly faster
        (Row(2, 1, "fork", (441.0,), 0.2), YOURS),  # caches that were warm, it may be
        (Row(2, 1, "fork", (47.0, 47.1, 47.2), 0.2), YOURS),
        (Row(2, 1, "fork", (60.0, 60.1, 60.2), 0.2), Row(2, 1, "fork", (60.0, 60.1, 60.2), 0.2)),
        (Row(1, 2, "fork", (46.0, 46.2, 45.9), 0.2), YOURS),
        (Row(4, 2, "fork", (52.0, 50.0), 0.2), YOURS),
        (Row(4, 2, "fork", (52.0, 50.0, 51.0), 0.2), Row(4, 2, "fork", (52.0, 50.0, 51.0), 0.2)),
        (Row(4, 2, "fork", (90.0,), 0.2), Row(4, 2, "fork", (90.0,), 0.2)),
        (Row(0, None, None, (47.0, 46.0, 46.5), 0.2), YOURS),
        (Row(2, 2, "spawn", (46.0,), 0.1), YOURS),
    ],
)
def test_the_loaders_own_setting_stays_unless_another_gains(other: Row, expected: Row) -> None:
    assert chosen([YOURS, other], (), OWN_2, 2) == expected


def test_where_the_fastest_is_not_surely_faster_the_fastest_that_is() -> None:
    sure = Row(3, 2, "fork", (60.0, 61.0, 62.0), 0.2)
    once = Row(4, 2, "fork", (66.0,), 0.2)
    assert chosen([YOURS, sure, once], (), OWN_2, 4) == sure


def test_more_workers_than_cores_are_no_setting_to_stay_with() -> None:
    many, few = Row(6, 2, "fork", (40.0, 41.0, 40.5), 0.5), Row(2, 2, "fork", (40.2,), 0.2)
    assert chosen([many, few], (), Own(6, 2, "fork"), 2) == few
    assert chosen([many, few], (), Own(6, 2, "fork"), 6) == many


def test_a_faster_setting_is_named_as_a_whole() -> None:
    subject = ("subject", {**OWN, "workers": 2})
    heard = [
        subject,
        ("machine", {"cores": 2, "methods": ["fork"]}),
        setting(workers=2, rates=[10.0] * 3),
        setting(workers=2, prefetch=8, rates=[15.0] * 3),
    ]
    [found] = findings_of(heard, subject[1], forked=True, lacks_guard=False)
    assert found.kind == "slow_setting"
    assert "10 batches/s with num_workers=2, prefetch_factor=2" in found.evidence
    assert "15 with num_workers=2, prefetch_factor=8" in found.evidence
    heard[-1] = setting(workers=2, prefetch=8, rates=[15.0])
    assert findings_of(heard, subject[1], forked=True, lacks_guard=False) == []


def setting(**facts: object) -> tuple[str, dict[str, object]]:
    plain = {"workers": 1, "prefetch": 2, "method": "fork", "rates": [10.0], "first_s": 0.1}
    return "setting", {**plain, "error": None, **facts}


OWN = {"name": "loader", "workers": 1, "prefetch": 2, "method": "fork", "persistent": False}


def test_what_was_told_last_of_a_setting_counts() -> None:
    heard = [setting(), setting(rates=[10.0, 12.0])]
    [row] = rows_of(heard)
    assert row.rate == 11.0


def test_what_was_found_rules_start_methods_out() -> None:
    heard = [("subject", OWN), setting(), setting(method="spawn", first_s=3.0)]
    best, why = recommended(heard)
    assert best is not None
    assert best.method == "fork"
    best, why = recommended([*heard, ("hazard", {})])
    assert best is not None
    assert best.method == "spawn"
    assert "fork ruled out" in why


def test_start_methods_that_were_not_come_to() -> None:
    machine = ("machine", {"cores": 2, "methods": ["fork", "spawn"]})
    assert untried([machine, setting()]) == ["spawn"]
    assert untried([machine]) == []


def test_the_worst_finding_is_first_and_each_is_told_once() -> None:
    quick = dict.fromkeys(("first_again_s", "median_s", "worst_s"), 0.001)
    slow = ("samples", {"first_s": 2.0, **quick})
    empty = ("empty", {})
    found = findings_of([slow, empty, empty], OWN, forked=True, lacks_guard=False)
    assert [each.level for each in found] == ["error", "warning"]


def test_a_report_for_people_and_for_programs() -> None:
    report = Examination(
        loader="DataLoader over Images (12)",
        findings=(Finding("error", "length", "it is short", "12 of 13\nlines", "mend it"),),
        samples={},
        settings=(FORK, Row(0, None, None, (), None, "OSError: no")),
        recommended=FORK,
        own={"num_workers": 2, "prefetch_factor": 2, "start_method": "fork"},
        cores=2,
        sent={"bytes": 2048, "heaviest": [["dataset.data", 2000]]},
        resume="no",
        not_looked_at=("start method spawn: no time was left",),
        output="a line\n",
        output_bytes=7,
        seconds=1.0,
        chosen_because="40.5 batches/s",
    )
    told = json.loads(json.dumps(report.to_dict()))
    assert not told["ok"]
    assert told["recommended"]["batches_per_s"] == 40.5
    lines = str(report).splitlines()
    assert lines[0] == "DataLoader over Images (12): 1 breaks training (1.0 s)"
    assert "1. it is short [breaks training]" in lines
    assert any(line.endswith("yours, use this") and "40.5" in line for line in lines)
    assert any(line.endswith("OSError: no") for line in lines)
    assert "   what to do: mend it" in lines
    assert "spawn sends 2 KiB to each worker (dataset.data 2 KiB)" in lines


def test_the_sweep_of_the_benchmark_is_exhaustive_and_its_verdict_is_as_the_bar_has_it() -> None:
    settings = grid([0, 1, 2], [2, 4], ["fork"])
    assert len(settings) == 5
    best, other = settings[3], settings[1]
    rates = {best: [10.0, 10.5, 11.0], other: [9.5, 9.6, 9.7]}
    assert judged(rates, other).verdict == "ok"
    rates[other] = [8.0, 8.1, 8.2]
    assert judged(rates, other).verdict == "BELOW"
    rates[best] = [7.0, 10.5, 11.0]  # so wide that they cannot be told apart
    assert judged(rates, other).verdict == "ok"
    assert judged(rates, best).share == 1.0
