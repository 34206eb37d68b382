"""How many may be skipped: bounds, their edges, and a naive model of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeloader.delivery.indices import pack
from safeloader.delivery.manifest import BatchManifest, SampleIncident
from safeloader.delivery.skip_budget import ALWAYS_ALLOWED, LONGEST_RUN, SkipBudget


def manifest(size: int, gone: dict[int, str]) -> BatchManifest:
    incidents = tuple(SampleIncident(what, position, "why") for position, what in gone.items())
    packed = pack(list(range(size)))
    return BatchManifest(0, 0, 1, packed, None, None, b"", False, None, incidents or None)


def skipped(size: int, *positions: int) -> BatchManifest:
    return manifest(size, dict.fromkeys(positions, "skipped"))


def exceeded(
    skip_budget: SkipBudget, batch: BatchManifest, number: int, samples: int
) -> str | None:
    return skip_budget.exceeded(batch._replace(seq=number), samples)


def test_a_count() -> None:
    skip_budget = SkipBudget(2, runs=True)
    assert exceeded(skip_budget, skipped(4, 0, 1), 0, 4) is None
    assert exceeded(skip_budget, skipped(4), 1, 8) is None
    said = exceeded(skip_budget, skipped(4, 3), 2, 12)
    assert said == "3 of the 12 samples so far were skipped; max_skipped allows 2"


def test_none_at_all() -> None:
    assert exceeded(SkipBudget(0, runs=True), skipped(4), 0, 4) is None
    assert "allows 0" in str(exceeded(SkipBudget(0, runs=True), skipped(4, 1), 0, 4))


@pytest.mark.parametrize(("share", "samples", "bound"), [(0.1, 500, 50), (0.01, 500, 10)])
def test_a_fraction_and_those_always_allowed(share: float, samples: int, bound: int) -> None:
    skip_budget = SkipBudget(share, runs=False)
    assert exceeded(skip_budget, skipped(500, *range(bound)), 0, samples) is None
    assert f"allows {bound}" in str(exceeded(skip_budget, skipped(1, 0), 1, samples))


def test_all_of_them_may_be_allowed() -> None:
    assert exceeded(SkipBudget(1.0, runs=False), skipped(100, *range(100)), 0, 100) is None


def test_the_default_is_one_in_a_hundred_and_ten() -> None:
    skip_budget = SkipBudget(None, runs=True)
    for batch in range(10):
        assert exceeded(skip_budget, skipped(4, 0), batch, 4 * batch + 4) is None
    assert "the default of max_skipped allows 10" in str(
        exceeded(skip_budget, skipped(4, 0), 10, 44)
    )
    skip_budget = SkipBudget(None, runs=False)
    for batch in range(20):
        assert exceeded(skip_budget, skipped(1, 0), batch, 2000) is None
    assert "allows 20" in str(exceeded(skip_budget, skipped(1, 0), 20, 2099))


def test_those_that_came_late_do_not_count() -> None:
    late = manifest(30, dict.fromkeys(range(30), "late"))
    assert exceeded(SkipBudget(0, runs=True), late, 0, 30) is None


def test_a_run_within_a_batch() -> None:
    skip_budget = SkipBudget(1.0, runs=True)
    assert exceeded(skip_budget, skipped(40, *range(5, 4 + LONGEST_RUN)), 0, 40) is None
    said = exceeded(skip_budget, skipped(40, *range(5, 5 + LONGEST_RUN)), 1, 80)
    assert said == "20 samples in a row failed (39 of 80 so far)"


def test_a_run_begins_with_the_first_failure() -> None:
    for number in (0, 5):
        run = skipped(30, *range(LONGEST_RUN - 1))
        assert exceeded(SkipBudget(1.0, runs=True), run, number, 80) is None


def test_a_run_over_batches() -> None:
    skip_budget = SkipBudget(1.0, runs=True)
    assert exceeded(skip_budget, skipped(10, *range(1, 10)), 7, 80) is None
    assert exceeded(skip_budget, skipped(10, *range(10)), 8, 90) is None
    assert "20 samples in a row" in str(exceeded(skip_budget, skipped(10, 0), 9, 100))


def test_a_good_batch_between_ends_a_run() -> None:
    skip_budget = SkipBudget(1.0, runs=True)
    for batch in (0, 2, 4, 6):
        assert exceeded(skip_budget, skipped(15, *range(15)), batch, 100) is None
        assert exceeded(skip_budget, skipped(15), batch + 1, 100) is None


def test_a_good_sample_between_ends_a_run() -> None:
    skip_budget = SkipBudget(1.0, runs=True)
    for batch in range(4):
        assert exceeded(skip_budget, skipped(16, *range(15)), batch, 100) is None


def test_with_a_callable_runs_are_the_users_affair() -> None:
    assert exceeded(SkipBudget(1.0, runs=False), skipped(40, *range(40)), 0, 40) is None


def test_replaced_counts_as_skipped() -> None:
    skip_budget = SkipBudget(1, runs=True)
    assert exceeded(skip_budget, manifest(4, {2: "replaced"}), 0, 4) is None
    said = exceeded(skip_budget, manifest(4, {2: "replaced"}), 1, 8)
    assert said == "2 of the 8 samples so far were replaced; max_skipped allows 1"
    said = exceeded(skip_budget, manifest(4, {2: "skipped"}), 2, 12)
    assert said == "3 of the 12 samples so far were skipped or replaced; max_skipped allows 1"


batches = st.lists(
    st.lists(st.sampled_from(["", "", "", "skipped", "replaced", "late"]), min_size=1, max_size=12),
    max_size=40,
)
bounds = st.none() | st.integers(0, 30) | st.floats(0.001, 1.0)


@given(batches, bounds, st.booleans())
def test_against_a_naive_model(
    epoch: list[list[str]], max_skipped: int | float | None, runs: bool
) -> None:
    skip_budget = SkipBudget(max_skipped, runs=runs)
    so_far: list[bool] = []
    for number, batch in enumerate(epoch):
        so_far += [what in ("skipped", "replaced") for what in batch]
        gone = sum(so_far)
        if isinstance(max_skipped, int):
            bound = max_skipped
        else:
            bound = max(ALWAYS_ALLOWED, int((max_skipped or 0.01) * len(so_far)))
        longest = max(map(len, "".join("x" if bad else " " for bad in so_far).split()), default=0)
        too_many = gone > bound or (runs and longest >= LONGEST_RUN)
        happened = {k: what for k, what in enumerate(batch) if what}
        said = exceeded(skip_budget, manifest(len(batch), happened), number, len(so_far))
        if set(happened.values()) - {"late"}:
            assert (said is not None) == too_many
        else:
            assert said is None
        assert skip_budget.skipped == gone
        if said is not None:
            return
