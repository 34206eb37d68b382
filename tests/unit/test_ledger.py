"""Whatever happens to batches between draw and delivery, the ledger says exactly what."""

from __future__ import annotations

import pickle
import random
import re
import tracemalloc
from collections import Counter
from itertools import chain
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safeloader.delivery import ledger as ledger_module
from safeloader.delivery.audit import EpochAudit
from safeloader.delivery.indices import pack
from safeloader.delivery.ledger import Discrepancy, MapLedger
from safeloader.delivery.manifest import BatchManifest, SampleIncident
from safeloader.delivery.stream_ledger import StreamLedger
from safeloader.introspect.values import weight
from safeloader.transport.stream_progress import StreamProgress

CLASSES = ("missing", "duplicated", "unexpected", "failed", "dropped", "repeated")


def manifest(
    seq: int,
    indices: list[Any],
    *,
    samples: int | None = -1,
    worker_id: int | None = 0,
    keys: list[Any] | None = None,
) -> BatchManifest:
    """What a worker that was asked for ``indices`` writes."""
    number = len(indices) if samples == -1 else samples
    noted = None if keys is None else tuple(keys)
    return BatchManifest(seq, worker_id, 1, pack(indices), number, None, b"", False, noted)


def stream_manifest(
    worker: int, first: int, samples: int, keys: list[Any] | None = None, seq: int = 0
) -> BatchManifest:
    noted = None if keys is None else tuple(keys)
    return BatchManifest(seq, worker, 1, b"", samples, first, b"", False, noted)


def skipping(came: BatchManifest, *incidents: SampleIncident) -> BatchManifest:
    return came._replace(incidents=incidents)


def hand_over(ledger: Any, came: BatchManifest, *, raised: bool = False) -> Discrepancy | None:
    """What the training process does with a batch; ``raised`` as under ``verify="raise"``."""
    discrepancy: Discrepancy | None = ledger.check(came)
    if discrepancy is not None:
        ledger.settle(discrepancy, handed_over=not raised)
    return discrepancy


def drawn_ledger(batches: list[list[Any]], *, first_seq: int = 0, ended: bool = True) -> MapLedger:
    ledger = MapLedger(expected_batches=None)
    for seq, batch in enumerate(batches, first_seq):
        ledger.drawn(seq, pack(batch))
    if ended:
        ledger.draws_ended(b"")
    return ledger


def found(audit: EpochAudit) -> dict[str, Counter[Any]]:
    """The classes that are not empty; counts agree with the arrays."""
    out = {}
    for name in CLASSES:
        items = getattr(audit, name).tolist()
        counted = Counter(tuple(item) if isinstance(item, list) else item for item in items)
        assert audit.counts.get(name, 0) == len(items)
        if counted:
            out[name] = counted
    return out


# ── map-style datasets ───────────────────────────────────────────────────────────────────────────

NUMBER = st.integers(-2, 30)
NAME = st.sampled_from(["a", "b", "c", ("d", 1)])
BATCHES = st.one_of(
    st.lists(st.lists(kind, min_size=1, max_size=5), max_size=6) for kind in (NUMBER, NAME)
)
HARMS = (
    "none",
    "lost",
    "sent twice",
    "never drawn",
    "replaced",
    "order changed",
    "too few",
    "too many",
    "failed",
)


class Model:
    """What the user should be told, in plain counters."""

    def __init__(self) -> None:
        self.classes: dict[str, Counter[Any]] = {name: Counter() for name in CLASSES}
        self.delivered = 0

    def note(self, name: str, indices: Any) -> None:
        self.classes[name].update(indices)

    def arrived(self, drawn: list[Any], came: list[Any], *, raised: bool) -> None:
        missing = Counter(drawn) - Counter(came)
        unexpected = Counter(came) - Counter(drawn)
        sound = Counter(drawn) & Counter(came)
        self.settled(missing, Counter(), unexpected, sound, raised=raised)

    def settled(
        self,
        missing: Counter[Any],
        duplicated: Counter[Any],
        unexpected: Counter[Any],
        sound: Counter[Any],
        *,
        raised: bool,
    ) -> None:
        self.note("missing", missing)
        self.note("duplicated", duplicated)
        self.note("unexpected", unexpected)
        if raised:
            self.note("failed", sound)
        else:
            self.delivered += sound.total() + unexpected.total() + duplicated.total()


@given(BATCHES, st.data(), st.booleans(), st.integers(0, 100))
def test_every_corruption_is_classified_exactly(
    batches: list[list[Any]], data: st.DataObject, raised: bool, first_seq: int
) -> None:
    ledger = drawn_ledger(batches, first_seq=first_seq)
    model = Model()
    model.note("repeated", (i for i, n in Counter(chain(*batches)).items() if n > 1))
    unasked = len(batches)
    order = data.draw(st.permutations(range(len(batches))))
    for at in order:
        seq, batch = first_seq + at, batches[at]
        harm = data.draw(st.sampled_from(HARMS))
        if harm == "lost":
            model.note("missing", batch)
            continue
        if harm == "failed":
            ledger.failed(manifest(seq, batch))
            model.note("failed", batch)
            continue
        if harm == "replaced":
            came = data.draw(st.lists(NUMBER | NAME, min_size=1, max_size=5))
            discrepancy = hand_over(ledger, manifest(seq, came), raised=raised)
            assert (discrepancy is None) == (came == batch)
            model.arrived(batch, came, raised=raised and discrepancy is not None)
            continue
        if harm == "order changed":
            came = data.draw(st.permutations(batch))
            discrepancy = hand_over(ledger, manifest(seq, came), raised=raised)
            assert (discrepancy is None) == (came == batch)
            told = f"answered for {came}: the same indices in another order"
            assert discrepancy is None or discrepancy.reason.endswith(told)
            model.arrived(batch, came, raised=raised and discrepancy is not None)
            continue
        if harm in ("too few", "too many"):
            more = data.draw(st.integers(1, 3)) * (-1 if harm == "too few" else 1)
            samples = max(len(batch) + more, 0)
            discrepancy = hand_over(ledger, manifest(seq, batch, samples=samples), raised=raised)
            assert discrepancy is not None
            assert f"gave {samples}" in discrepancy.reason
            model.settled(
                Counter(batch[samples:]),
                Counter(),
                Counter({-1: samples - len(batch)}) if samples > len(batch) else Counter(),
                Counter(batch[:samples]),
                raised=raised,
            )
            continue
        assert hand_over(ledger, manifest(seq, batch), raised=raised) is None
        model.arrived(batch, batch, raised=False)
        if harm == "sent twice":
            discrepancy = hand_over(ledger, manifest(seq, batch), raised=raised)
            assert discrepancy is not None
            assert f"batch {at} a second time" in discrepancy.reason
            model.settled(Counter(), Counter(batch), Counter(), Counter(), raised=raised)
        if harm == "never drawn":
            discrepancy = hand_over(ledger, manifest(first_seq + unasked, batch), raised=raised)
            unasked += 1
            assert discrepancy is not None
            assert "never drew" in discrepancy.reason
            model.settled(Counter(), Counter(), Counter(batch), Counter(), raised=raised)
    lost = model.classes["missing"].copy()
    discrepancy = ledger.finish()
    assert discrepancy is None or set(discrepancy.missing) <= set(lost)
    audit = ledger.audit(3, None)
    assert found(audit) == {name: count for name, count in model.classes.items() if count}
    assert audit.drawn == sum(map(len, batches))
    assert audit.delivered == model.delivered
    assert audit.epoch == 3
    assert audit.ok == (not any(model.classes[name] for name in CLASSES[:4]))
    assert audit.complete
    assert ledger.settled


@given(BATCHES, st.integers(0, 100))
def test_what_came_as_drawn_is_complete_and_ok(batches: list[list[Any]], first_seq: int) -> None:
    ledger = drawn_ledger(batches, first_seq=first_seq)
    for number, batch in enumerate(batches):
        assert ledger.settled is False
        assert ledger.audit(0, None).complete is False
        assert ledger.check(manifest(first_seq + number, batch)) is None
        assert ledger.audit(0, None).delivered == sum(map(len, batches[: number + 1]))
    assert ledger.settled
    assert ledger.audit(0, None).complete
    assert ledger.finish() is None
    audit = ledger.audit(0, None)
    assert audit.ok
    assert audit.drawn == audit.delivered == sum(map(len, batches))


def test_numbers_and_names_in_one_batch_are_counted_once_each() -> None:
    audit = drawn_ledger([[0], [0, "a"], ["a", 2, 2]]).audit(0, 4)
    assert Counter(audit.repeated.tolist()) == Counter([0, 2, "a"])
    assert audit.counts["repeated"] == 3
    assert audit.unvisited.tolist() == [1, 3]


def test_memory_grows_with_the_batches_in_flight_only() -> None:
    def held(ledger: MapLedger) -> int:
        return sum(
            len(value)
            for value in vars(ledger).values()
            if isinstance(value, dict | list | set) and value is not ledger.by_class
        )

    ledger = MapLedger(expected_batches=None)
    for seq in range(1_000):
        ledger.drawn(seq, pack([seq]))
        assert 1 <= held(ledger) <= 4
        if seq >= 3:
            assert ledger.check(manifest(seq - 3, [seq - 3])) is None
    for seq in range(997, 1_000):
        assert ledger.check(manifest(seq, [seq])) is None
    assert held(ledger) == 0


def test_draws_take_no_memory_beyond_those_in_flight_and_the_map() -> None:
    ledger = MapLedger(expected_batches=None)
    tracemalloc.start()
    try:
        for seq in range(4_000):
            batch = list(range(64 * seq, 64 * seq + 64))
            ledger.drawn(seq, pack(batch))
            assert ledger.check(manifest(seq, batch)) is None
        assert tracemalloc.get_traced_memory()[0] < 2**20  # of 2 MB drawn
    finally:
        tracemalloc.stop()
    assert ledger.audit(0, 64 * 4_000).counts["unvisited"] == 0


@pytest.mark.parametrize("ended", [True, False])
def test_an_epoch_is_settled_once_the_sampler_ended_and_the_last_batch_is_known(
    ended: bool,
) -> None:
    ledger = drawn_ledger([[0], [1]], ended=ended)
    ledger.lost(0)
    assert ledger.settled is False
    ledger.lost(1)
    assert ledger.settled is ended


@pytest.mark.parametrize("first_seq", [0, 10])
def test_a_batch_that_has_not_come_is_known_by_its_number_in_the_epoch(first_seq: int) -> None:
    ledger = drawn_ledger([[5, 6], ["a"]], first_seq=first_seq)
    assert ledger.opened(first_seq) == (0, (5, 6))
    assert ledger.opened(first_seq + 1) == (1, ("a",))
    assert ledger.opened(first_seq + 2) is None
    assert ledger.check(manifest(first_seq, [5, 6])) is None
    assert ledger.opened(first_seq) is None


def test_of_a_batch_of_a_stream_that_has_not_come_nothing_is_known() -> None:
    assert stream_ledger()[0].opened(3) == (None, ())


def test_an_epoch_left_early_is_not_complete_and_no_error() -> None:
    ledger = drawn_ledger([[0, 1], [2, 3]], ended=False)
    assert ledger.check(manifest(0, [0, 1])) is None
    audit = ledger.audit(0, 8)
    assert audit.ok
    assert not audit.complete
    assert (audit.drawn, audit.delivered, audit.unvisited.tolist()) == (4, 2, [4, 5, 6, 7])


def test_an_end_that_the_sampler_did_not_announce_is_a_trouble() -> None:
    ledger = drawn_ledger([[0, 1]], ended=False)
    assert ledger.check(manifest(0, [0, 1])) is None
    discrepancy = ledger.finish()
    assert discrepancy is not None
    assert "although the sampler has more to draw" in discrepancy.reason
    assert discrepancy.culprits == ()


def test_lost_batches_are_told_at_the_end_and_once() -> None:
    ledger = drawn_ledger([[0, 1], ["x", 3]])
    discrepancy = ledger.finish()
    assert discrepancy is not None
    assert discrepancy.missing == discrepancy.culprits == (0, 1, "x", 3)
    assert "4 samples drawn and never handed over: [0, 1, 'x', 3]" in discrepancy.reason
    assert ledger.finish() is None
    assert ledger.audit(0, None).counts["missing"] == 4


def test_reasons_show_eight_indices_at_most() -> None:
    discrepancy = drawn_ledger([list(range(30))]).finish()
    assert discrepancy is not None
    assert discrepancy.reason.endswith("[0, 1, 2, 3, 4, 5, 6, 7, ...]")


@pytest.mark.parametrize(("worker_id", "who"), [(None, "the main process"), (3, "worker 3")])
def test_reasons_name_the_one_who_sent_it(worker_id: int | None, who: str) -> None:
    ledger = drawn_ledger([[0, 1]])
    discrepancy = ledger.check(manifest(0, [0, 7], worker_id=worker_id))
    assert discrepancy is not None
    assert discrepancy.reason == f"{who} was asked for [0, 1] and answered for [0, 7]"
    assert (discrepancy.missing, discrepancy.unexpected, discrepancy.sound) == ((1,), (7,), (0,))


def test_a_batch_that_is_one_short_is_not_told_as_another_order() -> None:
    for came in ([0], [0, 1, 7]):
        discrepancy = drawn_ledger([[0, 1]]).check(manifest(0, came))
        assert discrepancy is not None
        assert discrepancy.reason == f"worker 0 was asked for [0, 1] and answered for {came}"


def test_a_negative_index_beside_the_one_it_stands_for_is_repeated() -> None:
    audit = drawn_ledger([[3, -1]]).audit(0, 4)
    assert audit.repeated.tolist() == [-1]
    assert drawn_ledger([[3, -1]]).audit(0, None).repeated.tolist() == []


def test_batches_of_an_earlier_epoch_are_unexpected_not_duplicated() -> None:
    ledger = drawn_ledger([[5]], first_seq=10)
    discrepancy = ledger.check(manifest(9, [4]))
    assert discrepancy is not None
    assert (discrepancy.unexpected, discrepancy.duplicated) == ((4,), ())


def test_a_sampler_that_raised_leaves_the_epoch_incomplete_without_further_trouble() -> None:
    ledger = drawn_ledger([[0]], ended=False)
    ledger.draw_failed()
    assert ledger.check(manifest(0, [0])) is None
    assert ledger.finish() is None
    assert not ledger.audit(0, None).complete


@pytest.mark.parametrize(("batches", "first_seq"), [(2, 0), (2, 10), (1, 0)])
def test_without_workers_the_number_of_batches_tells_the_end(batches: int, first_seq: int) -> None:
    ledger = MapLedger(expected_batches=lambda: batches)
    for seq in range(first_seq, first_seq + batches):
        assert not ledger.audit(0, None).complete
        ledger.drawn(seq, pack([seq]))
        assert not ledger.audit(0, None).complete
        assert ledger.check(manifest(seq, [seq])) is None
    assert ledger.audit(0, None).complete
    assert not ledger.settled


def test_what_drop_last_dropped_is_drawn_and_listed_once() -> None:
    ledger = drawn_ledger([[0, 1]], ended=False)
    assert ledger.check(manifest(0, [0, 1])) is None
    ledger.draws_ended(pack([2, 1]))
    ledger.draws_ended(pack([2, 1]))
    assert ledger.finish() is None
    audit = ledger.audit(0, 4)
    assert found(audit) == {"dropped": Counter([2, 1]), "repeated": Counter([1])}
    assert (audit.drawn, audit.delivered, audit.unvisited.tolist()) == (4, 2, [3])


def test_samples_that_cannot_be_counted_are_taken_on_trust() -> None:
    ledger = drawn_ledger([[0, 1]])
    assert ledger.check(manifest(0, [0, 1], samples=None)) is None
    assert ledger.audit(0, None).delivered == 2


class Crop(NamedTuple):
    index: int
    corner: Any


def test_indices_that_cannot_be_compared_are_told_apart_by_their_places() -> None:
    batch = [Crop(1, torch.tensor([2, 3])), Crop(4, torch.tensor([5, 6]))]
    ledger = drawn_ledger([batch])
    assert ledger.check(manifest(0, pickle.loads(pickle.dumps(batch)))) is None
    assert ledger.audit(0, None).ok


def test_what_cannot_be_compared_and_is_one_too_few_is_a_trouble() -> None:
    batch = [Crop(1, torch.tensor([2, 3])), Crop(4, torch.tensor([5, 6]))]
    ledger = drawn_ledger([batch])
    discrepancy = hand_over(ledger, manifest(0, pickle.loads(pickle.dumps(batch[:1]))))
    assert discrepancy is not None
    assert len(discrepancy.missing) - len(discrepancy.unexpected) == 1


def test_failure_of_an_unknown_batch_is_not_booked() -> None:
    ledger = drawn_ledger([[0, 1]])
    ledger.failed(manifest(7, [8, 9]))
    assert ledger.audit(0, None).counts["failed"] == 0


def test_indices_too_large_for_the_map_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safeloader.delivery.coverage.TALLY_LIMIT", 2)
    audit = drawn_ledger([["a", "b", "c", "d"]]).audit(0, None)
    assert audit.notes[0].startswith("2 indices were too many or too far apart to be mapped")


def test_an_interrupt_in_the_map_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = drawn_ledger([[0, 1], [1]])

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("safeloader.delivery.coverage._Pages.add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.audit(0, 4)
    (note,) = (each for each in ledger.audit(0, 4).notes if "mapped" in each)
    assert note.startswith("3 indices were not mapped, because of an interrupt")
    assert "too far apart" not in note


# ── samples skipped, replaced or late ────────────────────────────────────────────────────────────


def test_samples_that_did_not_come_as_asked_are_told_with_their_reasons() -> None:
    ledger = drawn_ledger([["a", "b", "c", "d", "e"]])
    came = skipping(
        manifest(0, ["a", "b", "c", "d", "e"]),
        SampleIncident("skipped", 0, "why a"),
        SampleIncident("replaced", 1, "why b", donor=4),
        SampleIncident("replaced", 2, "why c"),  # by a sample that the user gave
        SampleIncident("late", 3, "why d"),
    )
    assert ledger.check(came) is None
    assert ledger.finish() is None
    audit = ledger.audit(0, None)
    assert audit.skipped.tolist() == ["a"]
    assert audit.replaced.tolist() == ["b", "c"]
    assert audit.late.tolist() == ["d"]
    assert audit.reasons == {name: f"why {name}" for name in "abcd"}
    assert audit.donors == {"b": "e"}
    assert (audit.drawn, audit.delivered, audit.ok, audit.complete) == (5, 2, True, True)


def test_one_drawn_earlier_is_the_donor_of_a_batch_that_failed_whole() -> None:
    ledger = drawn_ledger([[7], [0, 1]])
    assert ledger.check(manifest(0, [7])) is None
    lent = [SampleIncident("replaced", k, "why", donor=2, lent=(7,)) for k in range(2)]
    assert ledger.check(skipping(manifest(1, [0, 1]), *lent)) is None
    audit = ledger.audit(0, None)
    assert audit.donors == {0: 7, 1: 7}
    assert (audit.replaced.tolist(), audit.delivered) == ([0, 1], 1)


def test_an_audit_keeps_the_reasons_of_its_time() -> None:
    ledger = drawn_ledger([[0], [1]])
    replaced = SampleIncident("replaced", 0, "why", donor=1, lent=(7,))
    assert ledger.check(skipping(manifest(0, [0]), replaced)) is None
    audit = ledger.audit(0, None)
    assert ledger.check(skipping(manifest(1, [1]), replaced)) is None
    assert (audit.reasons, audit.donors) == ({0: "why"}, {0: 7})


def test_the_first_reasons_and_donors_are_kept_and_all_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledger_module, "REASONS_LIMIT", 2)
    ledger = drawn_ledger([[0, 1], [2, 3]])
    for seq, batch in enumerate([[0, 1], [2, 3]]):
        gone = [SampleIncident("replaced", k, "why", donor=2, lent=(9,)) for k in range(2)]
        assert ledger.check(skipping(manifest(seq, batch), *gone)) is None
    audit = ledger.audit(0, None)
    assert (audit.reasons, audit.donors) == ({0: "why", 1: "why"}, {0: 9, 1: 9})
    assert audit.counts["replaced"] == 4


@pytest.mark.parametrize(("room", "kept"), [(0, 2), (-1, 1)])
def test_reasons_are_kept_up_to_their_bound_in_bytes(
    room: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, why = [letter * 300 for letter in "abc"], "why" * 50
    bound = 2 * (weight(names[0]) + weight(why))
    monkeypatch.setattr(ledger_module, "REASONS_BYTES", bound + room)
    ledger = drawn_ledger([names])
    gone = [SampleIncident("skipped", k, why) for k in range(3)]
    assert ledger.check(skipping(manifest(0, names), *gone)) is None
    audit = ledger.audit(0, None)
    assert audit.reasons == dict.fromkeys(names[:kept], why)
    assert audit.counts["skipped"] == 3


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────


def test_two_indices_with_one_key_are_one_sample() -> None:
    ledger = drawn_ledger([[0, 1], [2, 3]])
    assert hand_over(ledger, manifest(0, [0, 1], keys=["a", "b"])) is None
    discrepancy = hand_over(ledger, manifest(1, [2, 3], keys=["a", "c"]))
    assert discrepancy is not None
    assert discrepancy.reason == "index 2 and index 0 are one sample (key 'a')"
    assert (discrepancy.duplicated, discrepancy.sound) == ((2,), (3,))
    audit = ledger.audit(0, None)
    assert (audit.duplicated.tolist(), audit.delivered, audit.ok) == ([2], 4, False)


def test_one_index_twice_is_no_duplicate_key() -> None:
    ledger = drawn_ledger([[0, 1], [1, 0]])
    assert ledger.check(manifest(0, [0, 1], keys=["a", "b"])) is None
    assert ledger.check(manifest(1, [1, 0], keys=["b", "a"])) is None
    audit = ledger.audit(0, None)
    assert audit.ok
    assert audit.repeated.tolist() == [0, 1]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=6), st.integers(1, 4))
def test_keys_against_a_plain_dict(batches: list[list[int]], samples_per_key: int) -> None:
    ledger = drawn_ledger(batches)
    first: dict[int, int] = {}
    duplicated: list[int] = []
    for seq, batch in enumerate(batches):
        keys = [index // samples_per_key for index in batch]
        again = [i for i, key in zip(batch, keys, strict=True) if first.setdefault(key, i) != i]
        discrepancy = hand_over(ledger, manifest(seq, batch, keys=keys))
        assert (discrepancy.duplicated if discrepancy else ()) == tuple(again)
        duplicated += again
    assert ledger.finish() is None
    audit = ledger.audit(0, None)
    assert audit.duplicated.tolist() == duplicated
    assert audit.delivered == audit.drawn
    assert audit.ok == (not duplicated)


def test_a_batch_of_duplicates_names_three_and_counts_the_rest() -> None:
    ledger = drawn_ledger([list(range(6))])
    discrepancy = ledger.check(manifest(0, list(range(6)), keys=["same"] * 6))
    assert discrepancy is not None
    assert discrepancy.reason.count("are one sample") == 3
    assert discrepancy.reason.endswith("; and 2 more")


def test_keys_past_the_limit_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "KEYS_LIMIT", 2)
    ledger = drawn_ledger([[0, 1, 2, 3]])
    discrepancy = hand_over(ledger, manifest(0, [0, 1, 2, 3], keys=["a", "b", "c", "a"]))
    assert discrepancy is not None
    assert discrepancy.duplicated == (3,)
    (note,) = ledger.audit(0, None).notes
    assert note.startswith("the keys of the first 2 samples were compared; 1 later")


def test_keys_past_the_bound_in_bytes_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "KEYS_BYTES", 1000)
    ledger = drawn_ledger([[0, 1, 2, 3, 4]])
    keys = [letter * 400 for letter in "abcda"]
    discrepancy = hand_over(ledger, manifest(0, list(range(5)), keys=keys))
    assert discrepancy is not None
    assert discrepancy.duplicated == (4,)
    (note,) = ledger.audit(0, None).notes
    assert note.startswith("the keys of the first 2 samples were compared; 2 later")


@pytest.mark.parametrize(("room", "kept"), [(0, 2), (1, 3)])
def test_keys_are_kept_until_their_bound_in_bytes_is_reached(
    room: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [letter * 300 for letter in "abcd"]
    monkeypatch.setattr(ledger_module, "KEYS_BYTES", 2 * (weight("k") + weight(names[0])) + room)
    ledger = drawn_ledger([names])
    assert hand_over(ledger, manifest(0, names, keys=list("klmn"))) is None
    (note,) = ledger.audit(0, None).notes
    assert note.startswith(f"the keys of the first {kept} samples were compared; {4 - kept} later")


def test_a_long_key_is_told_in_part() -> None:
    ledger = drawn_ledger([[0, 1]])
    discrepancy = ledger.check(manifest(0, [0, 1], keys=["k" * 1000] * 2))
    assert discrepancy is not None
    shown = re.search(r"\(key '(k+)", discrepancy.reason)
    assert shown is not None
    assert 30 < len(shown[1]) < 60


def test_where_fewer_keys_came_than_indices_those_are_compared() -> None:
    ledger = drawn_ledger([[0, 1], [2, 3]])
    assert hand_over(ledger, manifest(0, [0, 1], keys=["a"])) is None
    discrepancy = hand_over(ledger, manifest(1, [2, 3], keys=["a"]))
    assert discrepancy is not None
    assert discrepancy.duplicated == (2,)


@pytest.mark.parametrize(("number", "more"), [(3, ""), (4, "; and 1 more")])
def test_three_duplicates_are_told_in_full(number: int, more: str) -> None:
    ledger = drawn_ledger([list(range(number + 1))])
    came = manifest(0, list(range(number + 1)), keys=["same"] * (number + 1))
    discrepancy = ledger.check(came)
    assert discrepancy is not None
    assert discrepancy.reason.endswith(f"index 3 and index 0 are one sample (key 'same'){more}")


def test_too_few_samples_say_how_many_of_the_last_count_as_missing() -> None:
    discrepancy = drawn_ledger([[5, 6, 7]]).check(manifest(0, [5, 6, 7], samples=1))
    assert discrepancy is not None
    assert "gave 1; the last 2 of [5, 6, 7] count as missing" in discrepancy.reason
    assert discrepancy.hint.startswith("have __getitems__ give one sample for each index")


# ── streams ──────────────────────────────────────────────────────────────────────────────────────


def stream_ledger(workers: int = 1) -> tuple[StreamLedger, StreamProgress]:
    progress = StreamProgress(workers, shared=False)
    return StreamLedger(progress=progress, workers=workers), progress


@given(
    st.lists(st.lists(st.integers(1, 4), max_size=5), min_size=1, max_size=3),
    st.lists(st.integers(0, 3), min_size=3, max_size=3),
    st.integers(0, 2**32 - 1),
)
def test_streams_without_a_gap_are_ok(
    sizes: list[list[int]], dropped: list[int], seed: int
) -> None:
    ledger, progress = stream_ledger(len(sizes))
    waiting = []
    for worker, own in enumerate(sizes):
        read = sum(own) + dropped[worker]
        progress.write(worker, read, dropped[worker], True)
        waiting += [worker] * len(own)
    random.Random(seed).shuffle(waiting)
    at = [0] * len(sizes)
    batch = [0] * len(sizes)
    for worker in waiting:
        samples = sizes[worker][batch[worker]]
        assert ledger.check(stream_manifest(worker, at[worker], samples)) is None
        batch[worker] += 1
        at[worker] += samples
    assert ledger.audit(0, None).complete == (
        not any(dropped[: len(sizes)])
    )  # what was dropped is told at the end
    assert ledger.finish() is None
    assert ledger.audit(0, None).complete
    audit = ledger.audit(0, None)
    expected = Counter(
        (worker, k)
        for worker, own in enumerate(sizes)
        for k in range(sum(own), sum(own) + dropped[worker])
    )
    assert found(audit) == ({"dropped": expected} if expected else {})
    assert audit.ok
    assert audit.delivered == sum(map(sum, sizes))
    assert audit.drawn == audit.delivered + expected.total()


@given(st.data(), st.lists(st.tuples(st.integers(0, 8), st.integers(1, 4)), max_size=6))
def test_gaps_and_repeats_against_plain_sets(
    data: st.DataObject, spans: list[tuple[int, int]]
) -> None:
    """Batches of one worker at any place of its stream: what was passed over is missing."""
    ledger, progress = stream_ledger()
    delivered: Counter[tuple[int, int]] = Counter()
    missing: Counter[tuple[int, int]] = Counter()
    duplicated: Counter[tuple[int, int]] = Counter()
    due = 0
    for first, samples in spans:
        discrepancy = hand_over(ledger, stream_manifest(0, first, samples))
        assert (discrepancy is None) == (first == due)
        came = [(0, k) for k in range(first, first + samples)]
        missing.update((0, k) for k in range(due, first))
        duplicated.update(pair for pair in came if pair[1] < due)
        delivered.update(came)
        due = max(due, first + samples)
    left = data.draw(st.integers(0, 3))
    progress.write(0, due + left, 0, True)
    discrepancy = ledger.finish()
    assert (discrepancy is None) == (left == 0)
    missing.update((0, k) for k in range(due, due + left))
    audit = ledger.audit(0, None)
    expected = {"missing": missing, "duplicated": duplicated}
    assert found(audit) == {name: count for name, count in expected.items() if count}
    assert audit.delivered == delivered.total()
    assert audit.drawn == due + left


def test_counts_name_every_class_of_a_stream_too() -> None:
    ledger, _ = stream_ledger()
    assert set(ledger.audit(0, None).counts) >= {*CLASSES, "skipped", "unvisited"}


def test_a_stream_in_trouble_says_what_was_due() -> None:
    ledger, _ = stream_ledger(2)
    assert ledger.check(stream_manifest(1, 0, 3)) is None
    discrepancy = ledger.check(stream_manifest(1, 5, 2))
    assert discrepancy is not None
    assert discrepancy.reason == "worker 1 sent samples 5 to 6 of its stream where number 3 was due"
    assert discrepancy.missing == ((1, 3), (1, 4))
    assert discrepancy.sound == ((1, 5), (1, 6))


def test_a_worker_that_never_came_to_its_end_is_a_trouble() -> None:
    ledger, progress = stream_ledger(2)
    progress.write(0, 3, 0, True)
    progress.write(1, 4, 0, False)
    assert ledger.check(stream_manifest(0, 0, 3)) is None
    assert ledger.check(stream_manifest(1, 0, 2)) is None
    discrepancy = ledger.finish()
    assert discrepancy is not None
    assert discrepancy.reason == "worker 1 never came to the end of its stream"
    assert ledger.finish() is None


def test_a_stream_whose_last_samples_never_came() -> None:
    ledger, progress = stream_ledger()
    progress.write(0, 7, 1, True)
    assert ledger.check(stream_manifest(0, 0, 4)) is None
    discrepancy = ledger.finish()
    assert discrepancy is not None
    assert discrepancy.reason == "worker 0 read 6 samples and the last 2 never came"
    assert discrepancy.missing == ((0, 4), (0, 5))
    audit = ledger.audit(0, None)
    assert audit.missing.tolist() == [[0, 4], [0, 5]]
    assert audit.dropped.tolist() == [[0, 6]]
    assert audit.drawn == 7


def test_failed_samples_of_a_stream_are_no_gap() -> None:
    ledger, progress = stream_ledger()
    assert ledger.check(stream_manifest(0, 0, 2)) is None
    ledger.failed(stream_manifest(0, 2, 2))
    assert ledger.check(stream_manifest(0, 4, 2)) is None
    progress.write(0, 6, 0, True)
    assert ledger.finish() is None
    audit = ledger.audit(0, None)
    assert found(audit) == {"failed": Counter([(0, 2), (0, 3)])}
    assert (audit.drawn, audit.delivered) == (6, 4)


def test_a_failed_batch_moves_its_own_worker_on() -> None:
    ledger, _ = stream_ledger(2)
    ledger.failed(stream_manifest(1, 0, 2))
    assert ledger.check(stream_manifest(1, 2, 1)) is None
    assert ledger.check(stream_manifest(0, 0, 1)) is None


def test_keys_find_two_workers_that_read_one_stream() -> None:
    ledger, progress = stream_ledger(2)
    assert hand_over(ledger, stream_manifest(0, 0, 2, ["a", "b"])) is None
    discrepancy = hand_over(ledger, stream_manifest(1, 0, 2, ["a", "b"]))
    assert discrepancy is not None
    assert discrepancy.duplicated == ((1, 0), (1, 1))
    assert "index (1, 0) and index (0, 0) are one sample" in discrepancy.reason
    assert "get_worker_info()" in discrepancy.hint
    progress.write(0, 2, 0, True)
    progress.write(1, 2, 0, True)
    assert ledger.finish() is None
    assert ledger.audit(0, None).delivered == 4


def test_one_worker_that_reads_twice_is_not_told_to_share_out() -> None:
    ledger, _ = stream_ledger(2)
    discrepancy = hand_over(ledger, stream_manifest(0, 0, 3, ["b", "a", "a"]))
    assert discrepancy is not None
    assert discrepancy.duplicated == ((0, 2),)
    assert discrepancy.hint == ""


def test_two_workers_that_read_one_stream_are_told_past_the_limit_of_keys_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledger_module, "KEYS_LIMIT", 1)
    ledger, _ = stream_ledger(2)
    assert hand_over(ledger, stream_manifest(0, 0, 1, ["a"])) is None
    discrepancy = hand_over(ledger, stream_manifest(1, 0, 2, ["b", "a"]))
    assert discrepancy is not None
    assert (discrepancy.duplicated, discrepancy.sound) == (((1, 1),), ((1, 0),))
    assert "get_worker_info()" in discrepancy.hint


def test_samples_of_a_stream_that_did_not_come_as_asked_are_told_in_pairs() -> None:
    ledger, _ = stream_ledger(2)
    assert ledger.check(stream_manifest(1, 0, 4)) is None
    came = skipping(
        stream_manifest(1, 4, 5),
        SampleIncident("skipped", 0, "why"),
        SampleIncident("replaced", 2, "why not", donor=3),
    )
    assert ledger.check(came) is None
    audit = ledger.audit(0, None)
    assert (audit.skipped.tolist(), audit.replaced.tolist()) == ([[1, 4]], [[1, 6]])
    assert audit.reasons == {(1, 4): "why", (1, 6): "why not"}
    assert audit.donors == {(1, 6): (1, 7)}
    assert (audit.drawn, audit.delivered, audit.ok) == (9, 7, True)


@pytest.mark.parametrize("samples", [0, None])
def test_a_batch_of_a_stream_without_samples_moves_nothing_on(samples: Any) -> None:
    ledger, _ = stream_ledger()
    ledger.failed(stream_manifest(0, 0, samples))
    assert ledger.check(stream_manifest(0, 0, samples)) is None
    assert ledger.audit(0, None).delivered == 0
    assert ledger.check(stream_manifest(0, 0, 2)) is None
    assert found(ledger.audit(0, None)) == {}
    assert ledger.audit(0, None).delivered == 2


def test_the_end_of_every_stream_is_looked_at() -> None:
    ledger, progress = stream_ledger(3)
    progress.write(0, 3, 0, True)
    progress.write(1, 4, 0, False)
    progress.write(2, 5, 0, True)
    for worker in range(3):
        assert ledger.check(stream_manifest(worker, 0, 2)) is None
    discrepancy = ledger.finish()
    assert discrepancy is not None
    assert discrepancy.reason == (
        "worker 0 read 3 samples and the last 1 never came; "
        "worker 1 never came to the end of its stream; "
        "worker 2 read 5 samples and the last 3 never came"
    )
    assert discrepancy.missing == ((0, 2), (2, 2), (2, 3), (2, 4))
    assert found(ledger.audit(0, None)) == {"missing": Counter(discrepancy.missing)}


def test_notes_of_streams_that_do_not_add_up() -> None:
    ledger, progress = stream_ledger(3)
    for worker, samples in enumerate((5, 5, 0)):
        progress.write(worker, samples, 0, True)
        if samples:
            assert ledger.check(stream_manifest(worker, 0, samples)) is None
    assert ledger.finish() is None
    audit = ledger.audit(0, 5)
    assert audit.notes == (
        "worker 2 delivered nothing: its share of the data is empty (more shards, or fewer "
        "workers)",
        "len(dataset) says 5, the workers read 10 samples",
    )
    assert audit.ok


def test_a_stream_read_whole_by_each_worker_is_noted() -> None:
    ledger, progress = stream_ledger(2)
    for worker in range(2):
        progress.write(worker, 5, 0, True)
        assert ledger.check(stream_manifest(worker, 0, 5)) is None
    assert ledger.finish() is None
    (note,) = ledger.audit(0, 5).notes
    assert note == (
        "len(dataset) says 5, the workers read 10 samples: each worker read the whole stream "
        "(share it by get_worker_info())"
    )


EMPTY_SHARE = (
    "worker {} delivered nothing: its share of the data is empty (more shards, or fewer workers)"
)


def test_the_share_of_one_worker_among_two_may_be_empty() -> None:
    ledger, progress = stream_ledger(2)
    assert ledger.check(stream_manifest(1, 0, 3)) is None
    progress.write(0, 0, 0, True)
    progress.write(1, 3, 0, True)
    assert ledger.finish() is None
    assert ledger.audit(0, None).notes == (EMPTY_SHARE.format(0),)


def test_an_empty_stream_of_one_worker_is_no_share_of_one() -> None:
    ledger, progress = stream_ledger(1)
    progress.write(0, 0, 0, True)
    assert ledger.finish() is None
    assert ledger.audit(0, None).notes == ()


@pytest.mark.parametrize("dropped", [0, 2])
def test_a_share_that_was_read_and_did_not_come_is_not_empty(dropped: int) -> None:
    ledger, progress = stream_ledger(2)
    assert ledger.check(stream_manifest(0, 0, 3)) is None
    progress.write(0, 3, 0, True)
    progress.write(1, 2, dropped, True)
    assert (ledger.finish() is None) == (dropped == 2)
    assert ledger.audit(0, None).notes == ()


def test_notes_of_the_keys_and_of_empty_shares_stand_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledger_module, "KEYS_LIMIT", 1)
    ledger, progress = stream_ledger(2)
    assert hand_over(ledger, stream_manifest(0, 0, 2, ["a", "b"])) is None
    progress.write(0, 2, 0, True)
    progress.write(1, 0, 0, True)
    assert ledger.finish() is None
    of_keys, of_shares = ledger.audit(0, None).notes
    assert of_keys.startswith("the keys of the first 1 samples were compared")
    assert of_shares == EMPTY_SHARE.format(1)


def test_without_a_board_the_ends_go_unchecked() -> None:
    ledger = StreamLedger(progress=None, workers=2)
    assert ledger.check(stream_manifest(0, 0, 3)) is None
    assert not ledger.audit(0, None).complete
    assert ledger.finish() is None
    audit = ledger.audit(5, None)
    assert (audit.epoch, audit.drawn, audit.delivered, audit.complete) == (5, 3, 3, True)
    assert audit.notes == (EMPTY_SHARE.format(1),)


def test_a_length_proves_nothing_about_a_stream() -> None:
    progress = StreamProgress(1, shared=False)
    ledger = StreamLedger(progress=progress, workers=0)
    assert ledger.check(stream_manifest(0, 0, 4)) is None
    audit = ledger.audit(0, 4)
    assert not audit.complete
    assert audit.notes == ("the stream was not asked whether it has more",)
    progress.write(0, 4, 0, True)
    assert ledger.finish() is None
    assert (ledger.audit(0, 4).complete, ledger.audit(0, 4).notes) == (True, ())


def test_workers_at_their_ends_prove_it() -> None:
    ledger, progress = stream_ledger(2)
    assert ledger.check(stream_manifest(0, 0, 4)) is None
    assert ledger.check(stream_manifest(1, 0, 3)) is None
    progress.write(0, 4, 0, True)
    assert not ledger.audit(0, 7).complete
    progress.write(1, 4, 0, True)
    assert not ledger.audit(0, 7).complete
    progress.write(1, 3, 0, True)
    assert ledger.audit(0, None).complete
    assert not ledger.settled


# ── interrupts ───────────────────────────────────────────────────────────────────────────────────


def test_an_interrupt_without_workers_fails_the_batch_that_was_drawn() -> None:
    ledger = MapLedger(expected_batches=lambda: None)
    ledger.drawn(0, pack([0, 1]))
    ledger.interrupted(None)
    assert found(ledger.audit(0, 4)) == {"failed": Counter([0, 1])}
    ledger.drawn(1, pack([2, 3]))
    assert ledger.check(manifest(1, [2, 3])) is None
    ledger.draws_ended(b"")
    assert ledger.finish() is None
    audit = ledger.audit(0, 4)
    assert (audit.complete, audit.drawn, audit.delivered) == (True, 4, 2)


@pytest.mark.parametrize(("interrupts", "lost"), [(1, 2), (2, 4), (2, 1)])
def test_an_interrupt_beside_workers_may_take_two_batches(interrupts: int, lost: int) -> None:
    ledger = drawn_ledger([[k] for k in range(6)])
    for seq in range(lost, 6):
        assert ledger.check(manifest(seq, [seq])) is None
    for _ in range(interrupts):
        ledger.interrupted(None)
    assert ledger.finish() is None
    assert found(ledger.audit(0, None)) == {"failed": Counter(range(lost))}


def test_more_than_interrupts_can_take_is_missing() -> None:
    ledger = drawn_ledger([[0], [1], [2]])
    ledger.interrupted(None)
    discrepancy = ledger.finish()
    assert discrepancy is not None
    assert discrepancy.missing == (0, 1, 2)


@pytest.mark.parametrize("counted", [True, False])
def test_an_interrupt_in_the_hand_over_takes_that_batch(counted: bool) -> None:
    ledger = drawn_ledger([[0], [1, 2], [3]])
    assert ledger.check(manifest(0, [0])) is None
    if counted:
        assert ledger.check(manifest(1, [1, 2])) is None
    ledger.interrupted(manifest(1, [1, 2]))
    assert ledger.check(manifest(2, [3])) is None
    assert ledger.finish() is None
    audit = ledger.audit(0, None)
    assert found(audit) == {"failed": Counter([1, 2])}
    assert (audit.delivered, audit.drawn, audit.complete) == (2, 4, True)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupt_of_a_stream_fails_what_was_read(workers: int) -> None:
    progress = StreamProgress(1, shared=False)
    ledger = StreamLedger(progress=progress, workers=workers)
    assert ledger.check(stream_manifest(0, 0, 2)) is None
    progress.write(0, 5, 0, False)
    ledger.interrupted(None)
    at_once = found(ledger.audit(0, None))
    assert at_once == ({} if workers else {"failed": Counter([(0, 2), (0, 3), (0, 4)])})
    assert ledger.check(stream_manifest(0, 5, 2)) is None
    assert ledger.check(stream_manifest(0, 8, 1)) is not None  # one interrupt, one gap
    assert found(ledger.audit(0, None)) == {"failed": Counter([(0, 2), (0, 3), (0, 4)])}


@pytest.mark.parametrize("counted", [True, False])
def test_an_interrupt_in_the_hand_over_of_a_stream(counted: bool) -> None:
    ledger, progress = stream_ledger()
    came = stream_manifest(0, 0, 2, seq=7)
    if counted:
        assert ledger.check(came) is None
    ledger.interrupted(came)
    progress.write(0, 2, 0, True)
    assert ledger.finish() is None
    audit = ledger.audit(0, None)
    assert found(audit) == {"failed": Counter([(0, 0), (0, 1)])}
    assert audit.delivered == 0


@pytest.mark.parametrize("interrupts", [0, 1])
def test_a_gap_before_a_batch_that_failed_is_not_passed_over(interrupts: int) -> None:
    ledger, _ = stream_ledger()
    for _ in range(interrupts):
        ledger.interrupted(None)
    ledger.failed(stream_manifest(0, 2, 1))
    of_gap = Counter([(0, 0), (0, 1)])
    if interrupts:
        assert found(ledger.audit(0, None)) == {"failed": of_gap + Counter([(0, 2)])}
    else:
        assert found(ledger.audit(0, None)) == {"missing": of_gap, "failed": Counter([(0, 2)])}


def test_an_interrupt_at_the_end_of_a_stream_is_told_already() -> None:
    ledger, progress = stream_ledger()
    assert ledger.check(stream_manifest(0, 0, 2)) is None
    ledger.interrupted(None)
    progress.write(0, 4, 0, True)
    assert ledger.finish() is None
    assert found(ledger.audit(0, None)) == {"failed": Counter([(0, 2), (0, 3)])}


def test_what_a_sampler_had_drawn_when_it_was_interrupted_failed() -> None:
    ledger = drawn_ledger([[0]], ended=False)
    assert ledger.check(manifest(0, [0])) is None
    ledger.draw_failed(pack([1, 2]))
    ledger.draws_ended(b"")
    assert ledger.finish() is None
    audit = ledger.audit(0, 3)
    assert found(audit) == {"failed": Counter([1, 2])}
    assert (audit.complete, audit.drawn, audit.delivered) == (False, 3, 1)


@pytest.mark.parametrize("expected", [2, None])
def test_only_a_length_that_is_proven_tells_the_end(expected: int | None) -> None:
    ledger = MapLedger(expected_batches=lambda: expected)
    for seq in range(2):
        ledger.drawn(seq, pack([seq]))
        assert ledger.check(manifest(seq, [seq])) is None
    audit = ledger.audit(0, 4)
    assert audit.complete == (expected == 2)
    assert ("the sampler was not asked whether it has more" in audit.notes) == (expected is None)
    ledger.draws_ended(b"")
    assert (ledger.audit(0, None).complete, ledger.audit(0, None).notes) == (True, ())
