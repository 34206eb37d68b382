"""What the audit of an epoch says to a person, and to a program."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from safeloader import DeliveryError, EpochAudit, SafeDataLoader
from safeloader.delivery import coverage
from safeloader.delivery import ledger as ledger_module
from safeloader.delivery.indices import as_array
from tests import datasets, faults

TROUBLES = ("missing", "duplicated", "unexpected", "failed")
CLASSES = (*TROUBLES, "dropped", "skipped", "replaced", "late", "repeated", "unvisited")


def audit_with(complete: bool = True, notes: tuple[str, ...] = (), **classes: Any) -> EpochAudit:
    arrays = {name: as_array(indices) for name, indices in classes.items()}
    counts = dict.fromkeys(CLASSES, 0) | {name: len(array) for name, array in arrays.items()}
    return EpochAudit(
        epoch=2, complete=complete, drawn=40, delivered=30, counts=counts, notes=notes, **arrays
    )


def audit_of(dataset: Any, **arguments: Any) -> EpochAudit:
    loader = SafeDataLoader(dataset, **arguments)
    for _ in loader:
        pass
    assert loader.audit is not None
    return loader.audit


def test_a_clean_epoch_is_one_line() -> None:
    assert str(audit_with()) == "epoch 2: complete, ok; 40 drawn, 30 delivered"
    assert str(audit_with(complete=False)).startswith("epoch 2: not complete, ok;")


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_has_a_line_with_its_count_and_indices(name: str) -> None:
    audit = audit_with(**{name: [7, 3]})
    head, line = str(audit).split("\n")
    assert line.startswith(f"  {name}: 2, ")
    assert line.endswith(": 7, 3")
    assert audit.ok == (name not in TROUBLES)
    assert (", NOT OK; " in head) == (name in TROUBLES)


@pytest.mark.parametrize(("number", "shown"), [(8, "0, 1, 2, 3, 4, 5, 6, 7"), (9, "6, 7, ...")])
def test_eight_indices_are_shown(number: int, shown: str) -> None:
    assert str(audit_with(missing=list(range(number)))).endswith(shown)


def test_pairs_of_a_stream_are_shown_as_pairs() -> None:
    audit = audit_with(missing=[(0, 5), (1, 12)])
    assert str(audit).endswith(": (0, 5), (1, 12)")
    assert audit.to_dict()["missing"] == [[0, 5], [1, 12]]


def test_names_are_shown_as_python_writes_them() -> None:
    audit = audit_with(missing=["a", 'qu"ote', ("b", 2)])
    assert str(audit).endswith(""": 'a', 'qu"ote', ('b', 2)""")
    assert audit.to_dict()["missing"] == ["'a'", "'qu\"ote'", "('b', 2)"]


def test_replaced_indices_are_shown_with_their_donors_and_reasons() -> None:
    audit = dataclasses.replace(
        audit_with(replaced=[3, 5]), reasons={3: "ValueError: three", 5: "late"}, donors={3: 7}
    )
    assert str(audit).split("\n") == [
        "epoch 2: complete, ok; 40 drawn, 30 delivered, 2 replaced",
        "  replaced: 2, another sample came in its place because of an error: 3 (by 7), 5",
        "    index 3: ValueError: three",
        "    index 5: late",
    ]
    told = audit.to_dict()
    assert (told["reasons"], told["donors"]) == ({"3": "ValueError: three", "5": "late"}, {"3": 7})


def test_donors_are_shown_only_where_they_stand_in() -> None:
    audit = dataclasses.replace(audit_with(replaced=[3], repeated=[3]), donors={3: 7})
    _, replaced, repeated = str(audit).split("\n")
    assert replaced.endswith(": 3 (by 7)")
    assert repeated == "  repeated: 1, drawn more than once by the sampler: 3"


@pytest.mark.parametrize(
    ("index", "donor", "shown", "saved"),
    [
        ((0, 5), (1, 2), "(0, 5) (by (1, 2))", {"(0, 5)": [1, 2]}),
        ("a", "b", "'a' (by 'b')", {"'a'": "'b'"}),
    ],
)
def test_donors_of_streams_and_of_names(
    index: Any, donor: Any, shown: str, saved: dict[str, Any]
) -> None:
    audit = dataclasses.replace(audit_with(replaced=[index]), donors={index: donor})
    assert str(audit).endswith(f": {shown}")
    assert json.loads(json.dumps(audit.to_dict()["donors"])) == saved


@pytest.mark.parametrize(
    ("number", "last"), [(5, "    index 4: why"), (7, "    and 2 more in audit.reasons")]
)
def test_five_reasons_are_shown(number: int, last: str) -> None:
    audit = dataclasses.replace(audit_with(), reasons=dict.fromkeys(range(number), "why"))
    _, *lines = str(audit).split("\n")
    assert len(lines) == min(number, 6)
    assert lines[-1] == last


def test_notes_come_last() -> None:
    audit = audit_with(notes=("one", "two"), dropped=[1])
    assert str(audit).split("\n")[-2:] == ["  note: one", "  note: two"]
    assert audit.to_dict()["notes"] == ["one", "two"]


@pytest.mark.parametrize(
    "audit",
    [
        audit_with(),
        audit_with(missing=[1, 2], repeated=["x", None], notes=("a note",)),
        audit_with(failed=[(0, 1)], dropped=[2**70, (1, "b")]),
        audit_with(duplicated=[b"raw", frozenset([1])]),
    ],
)
def test_to_dict_is_what_json_takes(audit: EpochAudit) -> None:
    told = audit.to_dict()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert set(told) == {field.name for field in dataclasses.fields(audit)} | {"ok"}
    assert told["ok"] is audit.ok
    assert told["counts"] == audit.counts


def test_an_audit_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        audit_with().epoch = 3  # type: ignore[misc]


def test_ok_goes_by_the_exact_counts() -> None:
    assert not EpochAudit(0, True, 5, 4, counts={"missing": 1}).ok
    assert EpochAudit(0, True, 5, 5).ok


def test_every_array_is_there_and_empty_by_default() -> None:
    audit = EpochAudit(epoch=0, complete=True, drawn=0, delivered=0)
    for name in CLASSES:
        array = getattr(audit, name)
        assert (array.size, array.dtype) == (0, np.int64)


# ── audits of real epochs ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", [0, 2])
def test_drop_last_is_listed_by_index(workers: int) -> None:
    audit = audit_of(list(range(11)), batch_size=4, drop_last=True, num_workers=workers)
    assert audit.dropped.tolist() == [8, 9, 10]
    assert (audit.drawn, audit.delivered, audit.ok, audit.complete) == (11, 8, True, True)
    assert "dropped: 3, left out by drop_last: 8, 9, 10" in str(audit)


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_are_accounted_in_pairs(workers: int) -> None:
    stream = datasets.Stream(11)
    audit = audit_of(stream, batch_size=4, drop_last=True, num_workers=workers)
    expected = [[0, 4], [0, 5], [1, 4]] if workers else [[0, 8], [0, 9], [0, 10]]
    assert audit.dropped.tolist() == expected
    assert audit.dropped.shape == (3, 2)
    assert (audit.drawn, audit.delivered, audit.complete) == (11, 8, True)
    json.dumps(audit.to_dict())


def test_repeated_and_unvisited_are_no_fault() -> None:
    audit = audit_of(list(range(6)), batch_size=2, sampler=[1, 1, 4, 5])
    assert (audit.repeated.tolist(), audit.unvisited.tolist()) == ([1], [0, 2, 3])
    assert audit.ok
    assert audit.drawn == audit.delivered == 4


def test_what_was_lost_with_an_error_counts_as_failed() -> None:
    loader = SafeDataLoader(faults.Raises(at=5, length=12), batch_size=4)
    batches = iter(loader)
    next(batches)
    with pytest.raises(KeyError):
        next(batches)
    next(batches)
    assert next(batches, None) is None
    audit = loader.audit
    assert audit is not None
    assert audit.failed.tolist() == [4, 5, 6, 7]
    assert (audit.drawn, audit.delivered, audit.ok, audit.complete) == (12, 8, False, True)


def test_an_epoch_under_way_can_be_audited() -> None:
    loader = SafeDataLoader(list(range(6)), batch_size=2)
    assert loader.audit is None
    batches = iter(loader)
    assert loader.audit is not None
    assert (loader.audit.drawn, loader.audit.complete) == (0, False)
    next(batches)
    audit = loader.audit
    assert (audit.drawn, audit.delivered, audit.complete, audit.ok) == (2, 2, False, True)
    assert audit.unvisited.tolist() == [2, 3, 4, 5]
    for _ in batches:
        pass
    assert audit.delivered == 2
    assert loader.audit.delivered == 6


def test_the_audit_is_that_of_the_newest_epoch() -> None:
    loader = SafeDataLoader(list(range(4)))
    for epoch in range(3):
        assert [int(sample) for sample in loader] == [0, 1, 2, 3]
        assert loader.audit is not None
        assert (loader.audit.epoch, loader.audit.delivered) == (epoch, 4)


def test_counts_are_exact_where_arrays_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "TALLY_LIMIT", 5)
    sampler = [*range(20), *range(10), *range(100, 119)]
    audit = audit_of(range(200), sampler=sampler, batch_size=20, drop_last=True)
    assert {name: len(getattr(audit, name)) for name in ("dropped", "repeated", "unvisited")} == {
        "dropped": 5,
        "repeated": 5,
        "unvisited": 5,
    }
    assert audit.counts["dropped"] == 9
    assert audit.counts["repeated"] == 10
    assert audit.counts["unvisited"] == 200 - 39
    assert "dropped: 9, left out by drop_last: 110, 111, 112, 113, 114, ..." in str(audit)
    assert audit.to_dict()["counts"]["unvisited"] == 161


def test_counts_name_every_class() -> None:
    assert set(audit_of(list(range(3))).counts) == set(CLASSES)
    assert set(audit_of(datasets.Stream(3)).counts) == set(CLASSES)


def test_its_repr_is_one_short_line() -> None:
    audit = audit_of(range(200), sampler=[3, *range(100)], batch_size=20, drop_last=True)
    assert repr(audit) == (
        "EpochAudit(epoch=0, complete=True, ok=True, drawn=101, delivered=100, "
        "dropped=1, repeated=1, unvisited=100)"
    )


def test_what_was_drawn_ahead_is_told_in_words_that_stay_true() -> None:
    loader = SafeDataLoader(list(range(40)), batch_size=4, num_workers=1, prefetch_factor=2)
    for _ in loader:
        break
    assert loader.audit is not None
    assert loader.audit.notes == ("not handed over: 8, in batches drawn ahead for the workers",)


@pytest.mark.parametrize("troubles", [{}, {"missing": [3]}])
def test_what_was_not_checked_is_neither_ok_nor_not(troubles: dict[str, list[int]]) -> None:
    audit = dataclasses.replace(audit_with(complete=False, **troubles), unchecked_since=7)
    assert audit.ok is None
    head = "epoch 2: not complete, not checked since batch 7; 40 drawn, 30 delivered"
    assert str(audit).split("\n")[0] == head
    assert "ok=None" in repr(audit)
    told = json.loads(json.dumps(audit.to_dict()))
    assert (told["ok"], told["unchecked_since"]) == (None, 7)
    assert audit_with().to_dict()["unchecked_since"] is None


def test_an_epoch_with_a_fault_of_our_own_says_since_when_and_which_parts() -> None:
    checked = audit_with(notes=("a note",), dropped=[5])
    audit = checked.not_checked(7, "the ledger", "the recorder")
    assert (audit.complete, audit.ok, audit.unchecked_since) == (False, None, 7)
    said = "the ledger, the recorder failed: a fault of safeloader's own, which the log tells"
    assert audit.notes == ("a note", said)
    assert (audit.epoch, audit.drawn, audit.delivered) == (2, 40, 30)
    assert audit.dropped.tolist() == [5]
    assert (checked.complete, checked.ok, checked.notes) == (True, True, ("a note",))


# ── what it says of workers, keys and what nobody looked at ──────────────────────────────────────


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_without_a_key_says_what_was_not_checked(workers: int) -> None:
    audit = audit_of(datasets.Stream(11), batch_size=4, num_workers=workers)
    assert audit.ok
    assert audit.unchecked == ("samples have no identity; key= gives them one",)
    head = str(audit).split("\n")[0]
    assert head == (
        "epoch 0: complete, ok (not checked: samples have no identity; key= gives them one); "
        "11 drawn, 11 delivered"
    )
    assert audit.to_dict()["unchecked"] == list(audit.unchecked)


def test_what_has_an_identity_is_checked() -> None:
    for audit in (
        audit_of(datasets.UnsharedStream(11), batch_size=4, key=faults.key_value),
        audit_of(list(range(11)), batch_size=4),
    ):
        assert audit.unchecked == ()
        assert "not checked" not in str(audit)


def test_a_stream_tells_the_samples_of_each_worker() -> None:
    audit = audit_of(datasets.Stream(11), batch_size=4, num_workers=2)
    assert audit.delivered_by == {0: 6, 1: 5}
    assert "\n  samples by worker 0: 6, worker 1: 5" in str(audit)
    assert audit.to_dict()["delivered_by"] == {"0": 6, "1": 5}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_even_shares_of_an_index_are_known_and_not_told(workers: int) -> None:
    audit = audit_of(list(range(20)), batch_size=4, num_workers=workers)
    assert audit.delivered_by == [{}, {0: 20}, {0: 12, 1: 8}][workers]
    assert str(audit) == "epoch 0: complete, ok; 20 drawn, 20 delivered"


def test_uneven_shares_are_told_once_there_are_batches_enough() -> None:
    uneven = dataclasses.replace(audit_with(), delivered_by={0: 30, 1: 10}, batches=16)
    assert str(uneven).endswith("\n  samples by worker 0: 30, worker 1: 10")
    for harmless in ({"batches": 15}, {"delivered_by": {0: 20, 1: 10}}):
        assert "samples by" not in str(dataclasses.replace(uneven, **harmless))


def test_samples_of_workers_add_up_to_what_was_delivered() -> None:
    dataset = faults.Raises(at=5, length=12)
    audit = audit_of(dataset, batch_size=4, num_workers=2, on_error="replace")
    assert (audit.delivered, audit.counts["replaced"]) == (11, 1)
    assert audit.delivered_by == {0: 8, 1: 3}
    assert "12 drawn, 11 delivered, 1 replaced" in str(audit)


def test_a_duplicate_is_told_with_its_key_both_indices_and_their_workers() -> None:
    loader = SafeDataLoader(
        list(range(8)), batch_size=2, num_workers=2, key=faults.key_thirds, verify="warn"
    )
    with pytest.warns(RuntimeWarning, match="are one sample"):
        list(loader)
    audit = loader.audit
    pairs = [(pair.key, pair.first, pair.again) for pair in audit.same_keys]
    assert pairs == [("0", 0, 1), ("0", 0, 2), ("1", 3, 4), ("1", 3, 5), ("2", 6, 7)]
    assert [(pair.first_worker, pair.worker) for pair in audit.same_keys][:2] == [(0, 0), (0, 1)]
    lines = str(audit).split("\n")
    at = next(k for k, line in enumerate(lines) if line.startswith("  duplicated: 5"))
    assert lines[at + 1 : at + 5] == [
        "    index 1 and index 0 are one sample (key 0)",
        "    index 2 and index 0 are one sample (key 0): worker 0 gave one and worker 1 the other",
        "    index 4 and index 3 are one sample (key 1): worker 1 gave one and worker 0 the other",
        "    and more in audit.same_keys",
    ]
    told = json.loads(json.dumps(audit.to_dict()))["same_keys"][1]
    assert told == {"key": "0", "first": 0, "again": 2, "first_worker": 0, "worker": 1}


def test_pairs_of_one_sample_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "SAME_KEYS_LIMIT", 3)
    loader = SafeDataLoader(range(8), batch_size=4, key=faults.key_constant, verify="warn")
    with pytest.warns(RuntimeWarning, match="are one sample"):
        list(loader)
    assert [pair.again for pair in loader.audit.same_keys] == [1, 2, 3]
    assert loader.audit.counts["duplicated"] == 7


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_that_resamples_is_told_so_and_no_sharing_out_is_advised(workers: int) -> None:
    loader = SafeDataLoader(
        datasets.Resampled(), batch_size=3, num_workers=workers, key=faults.key_value
    )
    with pytest.raises(DeliveryError) as caught:
        list(loader)
    said = str(caught.value)
    assert "one worker gave both: its stream samples with replacement" in said
    assert "read the same part" not in said
    assert "one worker gave both" in str(loader.audit)


def test_what_two_workers_give_at_different_places_may_be_sampled_with_replacement() -> None:
    stream = datasets.RotatedStream()
    loader = SafeDataLoader(stream, batch_size=3, num_workers=2, key=faults.key_value)
    with pytest.raises(DeliveryError, match="repeats on purpose, and key= does not go with it"):
        list(loader)


def test_two_workers_with_one_stream_are_told_to_share_it_out() -> None:
    stream = datasets.UnsharedStream()
    loader = SafeDataLoader(stream, batch_size=3, num_workers=2, key=faults.key_value)
    with pytest.raises(DeliveryError) as caught:
        list(loader)
    said = str(caught.value)
    assert "(key 0): worker 0 gave one and worker 1 the other" in said
    assert "two workers read the same part of the stream" in said
    assert "replacement" not in said + str(loader.audit)
