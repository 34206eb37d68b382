"""Sums of multisets of indices: exact against plain counters, however they were put together."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeloader.delivery import coverage as coverage_module
from safeloader.delivery.coverage import Coverage
from safeloader.delivery.indices import pack
from safeloader.delivery.ladder import (
    RUNGS,
    Delivered,
    Ladder,
    cut,
    numbers_of,
    sum_of,
    sum_of_range,
    width_for,
)

INDICES = st.one_of(
    st.integers(0, 40), st.integers(4090, 4100), st.integers(0, 2**20), st.integers(0, 2**40)
)
MULTISETS = st.lists(INDICES, max_size=40)
NONE = np.empty(0, np.int64)


def array(indices: Any) -> Any:
    return np.array(indices, np.int64)


def ladder_of(indices: list[int]) -> Ladder:
    ladder = Ladder()
    ladder.add(array(indices))
    return ladder


def facts(ladder: Ladder) -> tuple[int, list[int], list[int]]:
    return ladder.width, ladder.counts.tolist(), ladder.sums.tolist()


def drawn(indices: list[int]) -> Coverage:
    coverage = Coverage()
    for first in range(0, len(indices), 7):
        coverage.add(pack(indices[first : first + 7]))
        if first % 3 == 0:
            coverage.flush()
    return coverage


def test_the_sums_are_the_same_in_every_release() -> None:
    assert sum_of(array([0, 1, 4095, 4096, 2**40])) == 2963119053314838752
    assert sum_of_range(3, 1_000_003) == 6968448083221374726


@given(st.integers(0, 20_000), st.integers(0, 20_000))
def test_the_sum_of_a_range_is_that_of_its_indices(start: int, size: int) -> None:
    assert sum_of_range(start, start + size) == sum_of(np.arange(start, start + size))


@given(MULTISETS, MULTISETS)
def test_other_multisets_have_other_sums(one: list[int], two: list[int]) -> None:
    same = Counter(one) == Counter(two)
    assert (sum_of(array(one)) == sum_of(array(two))) == same
    assert ladder_of(one).same(ladder_of(two)) == same


def test_patterns_that_fool_plain_sums_are_told_apart() -> None:
    # Equal numbers, sums and squares (Prouhet, Tarry and Escott); and pages that change places.
    assert sum_of(array([0, 3, 5, 6])) != sum_of(array([1, 2, 4, 7]))
    assert sum_of(array([0, 4097])) != sum_of(array([1, 4096]))
    assert len(set(numbers_of(np.arange(1 << 18)).tolist())) == 1 << 18


@given(MULTISETS, MULTISETS, MULTISETS)
def test_merging_is_associative_and_commutative(a: list[int], b: list[int], c: list[int]) -> None:
    left, right, all_at_once = ladder_of(a), ladder_of(c), ladder_of(b + c + a)
    left.merge(ladder_of(b))
    left.merge(ladder_of(c))
    within = ladder_of(b)
    within.merge(ladder_of(a))
    right.merge(within)
    assert facts(left) == facts(right) == facts(all_at_once)


@given(MULTISETS, MULTISETS)
def test_what_is_taken_out_leaves_no_trace(kept: list[int], gone: list[int]) -> None:
    ladder = ladder_of(kept + gone)
    ladder.add(array(gone), -1)
    assert ladder.same(ladder_of(kept))


@given(st.integers(0, 3000), st.sampled_from([1, 2, 4, 64, 4096, 1 << 30]))
def test_each_index_once_by_ranges(length: int, width: int) -> None:
    once = Ladder.of_range(length, width)
    plain = Ladder(width)
    plain.add(np.arange(min(length, RUNGS * width)))
    assert facts(once) == facts(plain)


@given(st.integers(1, 2**45))
def test_the_last_range_ends_at_the_length_or_beyond(length: int) -> None:
    width = width_for(length)
    assert width & (width - 1) == 0
    assert RUNGS * width >= length
    assert width == 1 or RUNGS * width // 2 < length


# ── what a ledger's map of draws comes to ────────────────────────────────────────────────────────


@given(MULTISETS, st.lists(INDICES, max_size=5), st.data())
def test_a_map_of_draws_is_the_multiset_that_was_drawn(
    indices: list[int], more: list[int], data: st.DataObject
) -> None:
    less = data.draw(st.lists(st.sampled_from(indices), max_size=4, unique=True)) if indices else []
    delivered = drawn(indices).multiset(None, array(less), array(more))
    assert delivered is not None
    times = Counter(indices + more)
    times.subtract(less)
    assert delivered.ladder().same(ladder_of(list(times.elements())))
    for start in (0, 4090, *indices[:2]):
        found = delivered.multiplicities(start, start + 30)
        assert found.tolist() == [times[index] for index in range(start, start + 30)]


@given(st.lists(st.integers(-30, 29), max_size=60))
def test_a_negative_index_is_the_one_that_it_stands_for(indices: list[int]) -> None:
    delivered = drawn(indices).multiset(30, NONE, array(indices[:1]))
    assert delivered is not None
    times = Counter(index % 30 for index in [*indices, *indices[:1]])
    assert delivered.multiplicities(0, 30).tolist() == [times[index] for index in range(30)]


@given(st.lists(st.integers(0, 40_000), max_size=80), st.integers(1, 50), st.data())
def test_a_range_is_summed_up_in_parts(indices: list[int], parts: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 40_000))
    stop = start + data.draw(st.integers(parts, 30_000))
    delivered = drawn(indices).multiset(None, NONE, NONE)
    assert delivered is not None
    counts, sums = delivered.sums(start, stop, parts)
    edges = cut(start, stop, parts).tolist()
    for k in range(parts):
        inside = [index for index in indices if edges[k] <= index < edges[k + 1]]
        assert (counts[k], sums[k]) == (len(inside), sum_of(array(inside)))


def test_wide_ranges_are_summed_up_page_by_page() -> None:
    length = 3_000_000  # ranges of more than a page
    indices = np.random.default_rng(3).permutation(length)
    coverage = Coverage()
    for first in range(0, length, 10_000):
        coverage.add(indices[first : first + 10_000].tobytes())
    delivered = coverage.multiset(length, array([5, 9_000]), array([2_999_999] * 2))
    assert delivered is not None
    due = Ladder.of_range(length, width_for(length))
    due.add(array([2_999_999] * 2))
    due.add(array([5, 9_000]), -1)
    assert facts(delivered.ladder(length)) == facts(due)


def test_draws_beyond_the_bitmap_are_counted_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_module, "_PAGES_LIMIT", 2)
    monkeypatch.setattr(coverage_module, "TALLY_LIMIT", 10)
    indices = [*range(0, 200_000, 1000), *range(50), *range(50), *range(50)]
    delivered = drawn(indices).multiset(200_000, NONE, NONE)
    assert delivered is not None
    assert not delivered.can_be_asked
    assert delivered.ladder().same(ladder_of(indices))


def test_what_an_interrupt_struck_is_not_known() -> None:
    coverage = drawn([1, 2, 3])
    coverage.interrupted = True
    assert coverage.multiset(3, NONE, NONE) is None


def test_a_negative_index_without_a_length_is_not_known() -> None:
    assert drawn([1, -1]).multiset(None, NONE, NONE) is None


def test_indices_are_mapped_to_those_of_another_dataset() -> None:
    delivered = drawn([0, 1, 2, 2, 5000]).multiset(None, array([1]), array([7]))
    assert delivered is not None
    mapped = delivered.mapped(lambda indices: indices * 2)
    assert mapped.ladder().same(ladder_of([0, 4, 4, 10_000, 14]))
    assert Delivered([], array([3]), NONE).ladder(4).count == 1
