"""What is in a batch, by its manifest: what was asked for, what came, and in whose place."""

from __future__ import annotations

from typing import Any

import pytest

from safeloader.delivery.indices import pack
from safeloader.delivery.manifest import (
    BatchContents,
    BatchManifest,
    SampleIncident,
    expected_indices,
)


def contents(
    indices: list[Any], *incidents: SampleIncident, ordinal: int | None = None
) -> BatchContents:
    packed = b"" if ordinal is not None else pack(indices)
    manifest = BatchManifest(
        0, 2, 1, packed, len(indices), ordinal, b"", False, None, incidents or None
    )
    found = BatchContents.of(manifest)
    assert found.expected == expected_indices(manifest)
    return found


def test_a_batch_as_it_was_drawn() -> None:
    found = contents([7, 5])
    assert tuple(found) == ((7, 5), (7, 5), (0, 1), {})
    assert (found.indices, found.kept) == ((7, 5), [7, 5])


def test_samples_left_out_are_gone() -> None:
    gone = SampleIncident("skipped", 1, "why")
    found = contents(["a", "b", "c"], gone)
    assert (found.positions, found.gone) == ((0, 2), {1: gone})
    assert (found.indices, found.kept) == (("a", "c"), ["a", "c"])


def test_a_donor_stands_in_under_its_own_index() -> None:
    found = contents([7, 5, 6], SampleIncident("replaced", 0, "why", 2))
    assert (found.positions, found.indices, found.kept) == ((2, 1, 2), (6, 5, 6), [5, 6])


def test_a_donor_at_the_first_position() -> None:
    assert contents([7, 5], SampleIncident("replaced", 1, "why", 0)).indices == (7, 7)


def test_a_sample_that_the_user_gave_stands_under_the_index_it_replaces() -> None:
    found = contents([7, 5], SampleIncident("replaced", 0, "why"))
    assert (found.positions, found.indices, found.kept) == ((0, 1), (7, 5), [5])


def test_a_sample_that_came_late_is_there() -> None:
    found = contents([7, 5], SampleIncident("late", 0, "why"))
    assert (found.positions, found.gone) == ((0, 1), {})
    assert (found.indices, found.kept) == ((7, 5), [7, 5])


def test_what_was_drawn_earlier_follows_the_batchs_own() -> None:
    gone = [SampleIncident("replaced", k, "why", 2, (3,)) for k in range(2)]
    found = contents([7, 5], *gone)
    assert (found.expected, found.sources, found.positions) == ((7, 5), (7, 5, 3), (2, 2))
    assert (found.indices, found.kept) == ((3, 3), [])


@pytest.mark.parametrize(("worker_id", "row"), [(2, 2), (None, 0)])
def test_samples_of_a_stream_are_numbers_of_a_worker(worker_id: int | None, row: int) -> None:
    manifest = BatchManifest(0, worker_id, 1, b"", 3, 4, b"", False, None)
    assert expected_indices(manifest) == ((row, 4), (row, 5), (row, 6))
    assert expected_indices(manifest._replace(samples=None)) == ()
    found = BatchContents.of(manifest._replace(incidents=(SampleIncident("skipped", 0, "why"),)))
    assert found.indices == ((row, 5), (row, 6))
