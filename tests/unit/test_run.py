"""The bars of coverage, which ``tests.run`` holds."""

from __future__ import annotations

from tests.run import below, shares

TOTALS = {
    "covered_lines": 950,
    "num_statements": 1000,
    "covered_branches": 180,
    "num_branches": 200,
}


def test_lines_and_branches_have_bars_of_their_own() -> None:
    assert below(shares(TOTALS)) == []
    (lines,) = below(shares(TOTALS | {"covered_lines": 949, "covered_branches": 200}))
    assert lines == "coverage: 94.90 % of lines, and 95 % is the least"
    (branches,) = below(shares(TOTALS | {"covered_lines": 1000, "covered_branches": 179}))
    assert branches == "coverage: 89.50 % of branches, and 90 % is the least"


def test_without_a_report_both_bars_are_missed() -> None:
    assert len(below({"lines": 0.0, "branches": 0.0})) == 2
