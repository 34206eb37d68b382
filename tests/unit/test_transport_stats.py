"""What is said of how batches crossed."""

from __future__ import annotations

from safeloader.transport.stats import TransportStats


def test_the_size_is_that_of_all_slots() -> None:
    said = str(TransportStats(5, 190 << 20, {"slots": 12, "message": 1}))
    assert said == "batches: 12 by slots, 1 by message; slots now: 5, 190 MiB in all"


def test_slots_that_went_with_their_workers_are_no_contradiction() -> None:
    assert str(TransportStats(batches={"slots": 12})) == "batches: 12 by slots; slots now: none"


def test_no_batch_came() -> None:  # num_workers=0, before the first batch, or SAFELOADER=off
    assert str(TransportStats()) == "no batch came from a worker"


def test_what_was_not_in_a_slot_is_on_a_line_of_its_own() -> None:
    said = str(TransportStats(batches={"torch": 2}, fallbacks={"too large": 2}))
    assert said.splitlines()[1] == "not in a slot, 2: too large"
