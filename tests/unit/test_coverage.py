"""Which indices and how many: exact against plain sets, and small over a hundred million."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from safeloader.delivery import coverage as coverage_module
from safeloader.delivery.coverage import Coverage, IndexSet
from safeloader.delivery.indices import pack

LENGTHS = st.integers(0, 70)
NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([2**33, 2**40, 2**63 - 1, -1, -(2**63)]),
)
NAMES = st.one_of(st.text(max_size=2), st.tuples(st.integers(0, 2), st.integers(0, 2)))


def batches_of(indices: st.SearchStrategy[Any]) -> st.SearchStrategy[list[list[Any]]]:
    return st.lists(st.lists(indices, max_size=9), max_size=8)


def covered(batches: list[list[Any]]) -> Coverage:
    coverage = Coverage()
    for batch in batches:
        coverage.add(pack(batch))
    return coverage


def check_against_sets(coverage: Coverage, batches: list[list[Any]], length: int) -> None:
    times = Counter(index for batch in batches for index in batch)
    repeated = {index for index, number in times.items() if number > 1}
    found = [index if type(index) is not list else tuple(index) for index in _listed(coverage)]
    assert len(found) == len(repeated)
    assert set(found) == repeated
    assert coverage.repeated(None)[1] == len(repeated)
    unvisited = [index for index in range(length) if index not in times]
    assert coverage.unvisited(length)[0].tolist() == unvisited
    assert coverage.unvisited(length)[1] == len(unvisited)


def _listed(coverage: Coverage) -> list[Any]:
    listed: list[Any] = coverage.repeated(None)[0].tolist()
    return listed


@given(batches_of(st.integers(0, 69)), LENGTHS)
@example([[0, 1, 2, 3, 4, 5, 6, 7], [8]], 9)
@example([], 13)
def test_coverage_knows_what_was_drawn_twice_and_what_never(
    batches: list[list[int]], length: int
) -> None:
    check_against_sets(covered(batches), batches, length)


@settings(max_examples=40)
@given(batches_of(st.integers(0, 2**22)), st.integers(0, 3000))
def test_far_apart_indices(batches: list[list[int]], length: int) -> None:
    check_against_sets(covered(batches), batches, length)


@given(batches_of(st.integers(0, 69)), batches_of(st.integers(0, 69)), LENGTHS)
def test_asking_in_between_changes_nothing(
    before: list[list[int]], after: list[list[int]], length: int
) -> None:
    coverage = covered(before)
    check_against_sets(coverage, before, length)
    for batch in after:
        coverage.add(pack(batch))
    check_against_sets(coverage, before + after, length)
    check_against_sets(coverage, before + after, length)


@settings(max_examples=60)
@given(batches_of(NUMBERS), LENGTHS)
@example([[3, -1]], 4)
@example([[-4]], 4)
@example([[-1], [-1, -5]], 4)
@example([[-4096, -4097], [4095, 0]], 4096)
def test_a_negative_index_visits_what_it_stands_for(batches: list[list[int]], length: int) -> None:
    coverage = covered(batches)
    times = Counter(index for batch in batches for index in batch)

    def stands_for(index: int) -> int:
        return index + length if -length <= index < 0 else index

    visited = Counter(map(stands_for, times.elements()))
    again = {
        n
        for n in times
        if times[n] > 1 or (n < 0 and stands_for(n) >= 0 and stands_for(n) in times)
    }
    numbers, number = coverage.repeated(length)
    assert numbers.tolist() == sorted(again)
    assert number == len(again)
    never = [n for n in range(length) if n not in visited]
    assert coverage.unvisited(length)[0].tolist() == never
    assert coverage.unvisited(length)[1] == len(never)
    plain, _ = coverage.repeated(None)  # of what they stand for nothing is known
    assert plain.tolist() == sorted(n for n in times if times[n] > 1)
    assert coverage.unmapped == 0


def test_unvisited_indices_of_a_long_dataset_are_listed_up_to_its_length() -> None:
    length = 10_000
    drawn = {*range(4000), 4095, 4096, 5000, *range(8000, 9995), 9999}
    coverage = covered([[*drawn, length, length + 1]])
    never = [index for index in range(length) if index not in drawn]
    listed, number = coverage.unvisited(length)
    assert listed.tolist() == never
    assert number == len(never)


def test_asking_for_what_was_not_drawn_yet_does_not_hide_it_later() -> None:
    coverage = covered([[-1]])
    assert coverage.repeated(10_000)[1] == 0  # 9999 is looked up
    coverage.add(pack([9999]))
    assert coverage.repeated(10_000)[0].tolist() == [-1]
    assert coverage.unmapped == 0
    assert coverage.unvisited(10_000)[1] == 9999


def test_asking_takes_none_of_the_room_for_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_module, "_PAGES_LIMIT", 2)
    coverage = covered([[-1]])
    assert coverage.repeated(10_000)[1] == 0
    coverage.add(pack([5]))
    assert coverage.unmapped == 0


def test_one_huge_index_allocates_nothing() -> None:
    tracemalloc.start()
    try:
        coverage = covered([[2**63 - 1, -(2**63), 5]])
        coverage.repeated(None)[0]
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@given(batches_of(NAMES), LENGTHS)
def test_named_indices_have_no_range_to_be_unvisited_in(
    batches: list[list[Any]], length: int
) -> None:
    coverage = covered(batches)
    times = Counter(index for batch in batches for index in batch)
    repeated = coverage.repeated(None)[0]
    found = {tuple(item) if isinstance(item, list) else item for item in repeated.tolist()}
    assert found == {index for index, number in times.items() if number > 1}
    assert coverage.repeated(None)[1] == len(found)
    if times:
        assert coverage.unvisited(length)[0].size == 0
        assert coverage.unvisited(length)[1] == 0


def test_without_a_length_nothing_is_unvisited() -> None:
    coverage = covered([[5, 5]])
    assert coverage.unvisited(None)[0].size == 0
    assert coverage.unvisited(None)[0].dtype == np.int64
    assert coverage.unvisited(None)[1] == 0
    assert coverage.repeated(None)[0].tolist() == [5]


def test_an_index_beyond_the_length_is_no_visit() -> None:
    coverage = covered([[9, 10, 11, 500]])
    assert coverage.unvisited(11)[0].tolist() == list(range(9))
    assert coverage.unvisited(11)[1] == 9


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 63, 64, 65])
def test_lengths_around_whole_bytes(length: int) -> None:
    assert covered([list(range(length))]).unvisited(length)[1] == 0
    assert covered([list(range(200))]).unvisited(length)[0].size == 0
    assert covered([[0]] if length else []).unvisited(length)[1] == max(length - 1, 0)
    assert covered([]).unvisited(length)[0].tolist() == list(range(length))


def test_arrays_are_cut_at_the_limit_and_counts_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_module, "TALLY_LIMIT", 5)
    coverage = covered([list(range(0, 40, 2))] * 2)
    assert coverage.repeated(None)[0].tolist() == [0, 2, 4, 6, 8]
    assert coverage.repeated(None)[1] == 20
    assert coverage.unvisited(40)[0].tolist() == [1, 3, 5, 7, 9]
    assert coverage.unvisited(40)[1] == 20


class Plain:
    """No equality of its own: known by its type alone."""


def test_two_objects_of_one_type_need_not_be_one_index() -> None:
    coverage = covered([[Plain(), "a", Plain(), "a"], [Plain()]])
    assert coverage.repeated(None)[0].tolist() == ["a"]
    assert coverage.repeated(None)[1] == 1
    assert coverage.unmapped == 0


def test_indices_that_refuse_to_be_compared_are_told_of_as_unmapped() -> None:
    class RefusesToCompare:
        def __eq__(self, other: object) -> bool:
            raise OSError("not today")

        def __hash__(self) -> int:
            return 1

    coverage = covered([[RefusesToCompare() for _ in range(4)], ["a"]])
    assert coverage.repeated(None)[1] == 0
    assert coverage.unmapped == 3  # all but the first, which met no other


def test_named_indices_past_the_limit_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_module, "TALLY_LIMIT", 5)
    coverage = covered([[f"name-{number}" for number in range(12)]])
    coverage.repeated(None)[0]
    assert coverage.unmapped == 7


def test_a_batch_larger_than_the_gathering_bound() -> None:
    count = 300_000
    coverage = covered([list(range(count)), list(range(0, count, 3))])
    assert coverage.repeated(None)[1] == count // 3
    assert coverage.repeated(None)[0][:4].tolist() == [0, 3, 6, 9]
    assert coverage.unvisited(count + 5)[1] == 5


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200_000))
def test_many_indices_in_one_piece(seed: int, spread: int) -> None:
    indices = np.random.default_rng(seed).integers(0, spread, 40_000)
    coverage = Coverage()
    for part in np.array_split(indices, 7):
        coverage.add(part.astype(np.int64).tobytes())
    values, times = np.unique(indices, return_counts=True)
    assert coverage.repeated(None)[0].tolist() == values[times > 1].tolist()
    assert coverage.unvisited(spread)[1] == spread - values.size


def test_a_hundred_million_indices_need_less_than_64_megabytes() -> None:
    length, step = 100_000_000, 1_000
    tracemalloc.start()
    try:
        coverage = Coverage()
        for start in range(0, length, length // 4):
            coverage.add(np.arange(start, start + length // 4, step, dtype=np.int64).tobytes())
        coverage.add(np.array([length - 1, 0], dtype=np.int64).tobytes())
        assert coverage.repeated(None)[0].tolist() == [0]
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 64 * 2**20
    assert peak < 64 * 2**20
    assert coverage.unvisited(length)[1] == length - length // step - 1


def traced() -> int:
    """The most that was held at once.

    From 2.5 on numpy counts memory that it resizes in place twice meanwhile: then what is held now.
    """
    now, peak = tracemalloc.get_traced_memory()
    return now if np.lib.NumpyVersion(np.__version__) >= "2.5.0" else peak


def test_sixty_thousand_indices_far_apart_need_less_than_64_megabytes() -> None:
    indices = np.random.default_rng(0).integers(0, 2**31, 60_000)
    tracemalloc.start()
    try:
        coverage = Coverage()
        for part in np.array_split(indices, 30):
            coverage.add(part.tobytes())
        coverage.add(indices[:100].tobytes())
        values, times = np.unique([*indices, *indices[:100]], return_counts=True)
        assert coverage.repeated(2**31)[0].tolist() == values[times > 1].tolist()
        assert coverage.unvisited(2**31)[1] == 2**31 - values.size
        peak = traced()
    finally:
        tracemalloc.stop()
    assert coverage.unmapped == 0
    assert peak < 64 * 2**20


@pytest.mark.slow
def test_whatever_is_drawn_the_map_stays_within_64_megabytes() -> None:
    tracemalloc.start()
    try:
        coverage = Coverage()
        for start in range(0, 100_000, 10_000):
            numbers = np.arange(start, start + 10_000, dtype=np.int64) << 40 >> 20
            coverage.add(numbers.tobytes() * 2)
        unmapped = coverage.unmapped
        peak = traced()
    finally:
        tracemalloc.stop()
    assert unmapped == 2 * (100_000 - 2**16) + 2**15  # each drawn twice; the second is a map less
    assert peak < 64 * 2**20


def test_pages_past_the_bound_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_module, "_PAGES_LIMIT", 3)
    coverage = covered([[0, 5000, 10_000, 10_000], [20_000, 20_000, 30_000], [10_000]])
    assert coverage.unmapped == 3
    assert coverage.repeated(40_000)[0].tolist() == [10_000]
    # Three are not known, so neither is what was never drawn.
    assert coverage.unvisited(40_000)[1] == 0
    assert coverage.unvisited(40_000)[0].size == 0


def test_a_flush_that_is_interrupted_leaves_nothing_said_that_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coverage = covered([[0, 1, 1]])

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(coverage_module._Pages, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            coverage.repeated(None)
    coverage.add(pack([2, 2]))
    assert coverage.repeated(4)[0].tolist() == [2]
    assert coverage.unvisited(4)[1] == 0
    assert coverage.unmapped == 3
    coverage.add(pack([0, 3]))
    with monkeypatch.context() as patched:
        patched.setattr(coverage_module._Pages, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            coverage.repeated(None)
    assert coverage.unmapped == 5


def test_a_length_without_end_is_not_walked_through() -> None:
    coverage = covered([[2, 2**40]])
    numbers, number = coverage.unvisited(2**62)
    assert number == 2**62 - 2
    assert numbers.size == coverage_module.TALLY_LIMIT
    assert numbers[:3].tolist() == [0, 1, 3]


def test_a_set_counts_all_and_lists_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_module, "TALLY_LIMIT", 3)
    noted = IndexSet()
    assert (noted.count, noted.array().tolist()) == (0, [])
    noted.add(range(2))
    noted.add(iter([7, 8, 9]))
    assert (noted.count, noted.array().tolist()) == (5, [0, 1, 7])


@given(st.lists(st.lists(st.integers(-9, 9))))
def test_a_set_keeps_order_and_repetition(pieces: list[list[int]]) -> None:
    noted = IndexSet()
    for piece in pieces:
        noted.add(piece)
    everything = [number for piece in pieces for number in piece]
    assert noted.array().tolist() == everything
    assert noted.count == len(everything)


def test_a_long_dataset_has_room_in_the_map() -> None:
    length = 300_000_000
    far = [0, length - 1, *range(0, length, length // 66_000)]
    short, long = Coverage(), Coverage()
    long.expect(length)
    for coverage in (short, long):
        coverage.add(pack(far))
        coverage.flush()
    assert short.unmapped == len({index >> 12 for index in far}) - (1 << 16)
    assert (long.unmapped, long.repeated(None)[0].tolist()) == (0, [0])
    long.expect(10**18)
    assert long._seen.limit == 1 << 18
    long.expect(5)
    assert long._seen.limit == 1 << 16


def test_what_cannot_be_compared_is_told_once_it_was_taken_in() -> None:
    class Odd:
        def __hash__(self) -> int:
            return 1

        def __eq__(self, other: object) -> bool:
            raise TypeError("not to be compared")

    coverage = Coverage()
    coverage.waiting += [(Odd(),), (Odd(),)]
    assert coverage.unmapped == 1
    coverage.add(pack([1, 2]))
    assert coverage.unmapped == 1
    assert not coverage.compact()


def test_names_alone_are_held_by_more_than_what_waits() -> None:
    coverage = covered([["a", "b"], ["a"]])
    assert coverage.unmapped == 0
    assert not coverage.compact()
    assert coverage.repeated(None)[0].tolist() == ["a"]
