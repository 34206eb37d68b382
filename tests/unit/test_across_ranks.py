"""Parts of ranks put together: any damage is found, nothing is found that is not there."""

from __future__ import annotations

import itertools
import pickle
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed
from torch.distributed import HashStore

import safeloader
from safeloader import AuditPart, RunAudit, SafeDataLoader, audit_across_ranks, merge_audits
from safeloader.delivery.across_ranks import audit_of
from safeloader.delivery.audit_part import Digests
from safeloader.delivery.bisecting import resolve
from safeloader.delivery.ladder import Delivered, Ladder, sum_of
from safeloader.delivery.merging import Merging
from safeloader.delivery.rank_stores import VALUE_BYTES
from safeloader.introspect.shard import Shard

NONE = np.empty(0, np.int64)
Given = dict[int, list[int]]  # by rank, the indices that it handed over


def delivered(indices: list[int]) -> Delivered:
    return Delivered([], np.array(indices, np.int64), NONE)


def part(rank: int, world: int, indices: list[int], length: int | None, **known: Any) -> AuditPart:
    repeated = sum(number > 1 for number in Counter(indices).values())
    facts: dict[str, Any] = {
        "counts": {"repeated": repeated} if repeated else {},
        "complete": True,
        "ok": True,
        "drawn": len(indices),
        "delivered": len(indices),
        "length": length,
        "ladder": delivered(indices).ladder(length or 0),
    }
    return AuditPart(rank, world, 0, **facts | known)


def parts_of(given: Given, length: int, **known: Any) -> list[AuditPart]:
    return [part(rank, len(given), each, length, **known) for rank, each in given.items()]


class Together:
    """All ranks in one process; what each says in a round is bounded."""

    def __init__(self, given: Given) -> None:
        self._given = {rank: delivered(indices) for rank, indices in given.items()}
        self.rounds = 0

    def exchange(self, say: Callable[[Delivered], bytes], size: int) -> dict[int, bytes]:
        self.rounds += 1
        told = {rank: say(each) for rank, each in self._given.items()}
        assert {len(each) for each in told.values()} == {size}
        assert size + 8 <= VALUE_BYTES
        return told


def asked(given: Given, length: int) -> RunAudit:
    merging = Merging(parts_of(given, length), given, can_ask=True)
    resolve(Together(given), merging)
    return audit_of(merging)


def truth(given: Given, length: int) -> tuple[list[int], list[int], int]:
    times = Counter(itertools.chain(*given.values()))
    twice = sorted(index for index, number in times.items() if number > 1)
    never = [index for index in range(length) if index not in times]
    return twice, never, sum(times.values()) - len(times)


@st.composite
def shared_out(draw: st.DrawFn, most: int) -> tuple[Given, int]:
    """Each index of a dataset once, on some rank."""
    length, world = draw(st.integers(1, most)), draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**32 - 1))
    order = np.random.default_rng(seed).permutation(length)
    return {rank: order[rank::world].tolist() for rank in range(world)}, length


@st.composite
def damaged(draw: st.DrawFn, most: int) -> tuple[Given, int]:
    """The same, and some indices are lost, come again, or come in the place of others."""
    given, length = draw(shared_out(most))
    for _ in range(draw(st.integers(1, 6))):
        rank = draw(st.sampled_from([*given]))
        what = draw(st.sampled_from(["lost", "again", "other", "rank"]))
        if what == "rank":  # it hands over the samples of another one
            given[rank] = given[draw(st.sampled_from([*given]))][:]
        elif what == "again" or not given[rank]:
            given[rank].append(draw(st.integers(0, length - 1)))
        else:
            at = draw(st.integers(0, len(given[rank]) - 1))
            given[rank][at : at + 1] = [draw(st.integers(0, length - 1))] * (what == "other")
    return given, length


# ── nothing is found that is not there ───────────────────────────────────────────────────────────


@given(shared_out(5000))
def test_each_index_once_is_ok(case: tuple[Given, int]) -> None:
    given, length = case
    run = merge_audits(parts_of(given, length))
    assert (run.ok, run.complete, run.exact) == (True, True, True)
    assert run.counts == {"twice": 0, "never": 0, "padding": 0, "again": 0}
    assert f"ok, each of {length} indices came once" in run.answer
    assert run.next_step == ""


# ── any damage is found ──────────────────────────────────────────────────────────────────────────


def check(run: RunAudit, given: Given, length: int) -> None:
    twice, never, again = truth(given, length)
    assert (run.ok is True) == (not twice and not never)
    if run.exact:
        assert (run.twice.tolist(), run.never.tolist()) == (twice, never)
        assert run.counts["again"] == again
        for index, ranks in run.by_rank.items():
            assert [*ranks] == sorted(r for r, each in given.items() for x in each if x == index)
    assert set(run.twice.tolist()) <= set(twice)
    assert set(run.never.tolist()) <= set(never)
    for name, found in (("twice", twice), ("never", never)):
        assert run.counts[name] <= len(found)
    assert run.counts["again"] <= again
    for each in run.ranges:
        inside = range(each.start, each.stop)
        assert each.never <= sum(index in inside for index in never)
        assert any(index in inside for index in (*never, *twice))
    bound = [index for each in run.ranges for index in range(each.start, each.stop)]
    assert {*never, *twice} <= {*run.never.tolist(), *run.twice.tolist(), *bound}


@given(damaged(1024))
@settings(max_examples=50)
def test_of_few_indices_each_is_named(case: tuple[Given, int]) -> None:
    given, length = case
    run = merge_audits(parts_of(given, length))
    check(run, given, length)


@given(damaged(30_000))
@settings(max_examples=60)
def test_of_many_indices_the_ranges_are(case: tuple[Given, int]) -> None:
    given, length = case
    check(merge_audits(parts_of(given, length)), given, length)


@given(damaged(30_000))
@settings(max_examples=40)
def test_ranks_that_can_be_asked_name_each_index(case: tuple[Given, int]) -> None:
    given, length = case
    run = asked(given, length)
    check(run, given, length)
    assert run.exact
    assert set(run.by_rank) == set(run.twice.tolist())


def test_one_index_among_millions_is_found_by_its_sum_alone() -> None:
    length = 3_000_000
    whole = np.arange(length)
    given = {0: whole[::2].tolist(), 1: [*whole[1::2].tolist(), 77_777]}
    given[0].remove(2_000_000)
    run = merge_audits(parts_of(given, length))
    assert (run.twice.tolist(), run.never.tolist()) == ([77_777], [2_000_000])
    assert run.exact


def test_few_rounds_find_few_indices_among_millions() -> None:
    length = 3_000_000
    given = {0: list(range(0, length, 2)), 1: list(range(1, length, 2))}
    del given[0][700_000:700_003]
    given[1] += [12, 14, 16]
    together = Together(given)
    merging = Merging(parts_of(given, length), given, can_ask=True)
    resolve(together, merging)
    run = audit_of(merging)
    assert run.twice.tolist() == [12, 14, 16]
    assert run.never.tolist() == [1_400_000, 1_400_002, 1_400_004]
    assert {*run.by_rank.values()} == {(0, 1)}
    assert together.rounds < 6


def test_one_index_in_the_place_of_another_in_a_wide_range_is_damage() -> None:
    length = 1_000_000
    given = {0: list(range(0, length, 2)), 1: list(range(1, length, 2))}
    given[0][1000] = 2004  # where 2000 is due
    run = merge_audits(parts_of(given, length))
    check(run, given, length)
    assert run.ok is False
    assert "audit_across_ranks" in run.next_step
    check(run := asked(given, length), given, length)
    assert (run.twice.tolist(), run.never.tolist(), run.by_rank) == ([2004], [2000], {2004: (0, 0)})


def test_left_out_indices_that_are_too_many_to_be_named_are_proved_by_their_sum() -> None:
    length = 1_000_000
    gone = list(range(0, 40_000, 100))

    def parts(total: int, *lost: int) -> list[AuditPart]:
        named = {"dropped": tuple(gone[:100])}
        kept = sorted({*range(0, length, 2)} - {*gone, *lost})
        first = part(
            0, 2, kept, length, left_out=named, left_out_sum=total, counts={"dropped": len(gone)}
        )
        return [first, part(1, 2, list(range(1, length, 2)), length)]

    right = sum_of(np.array(gone))
    run = merge_audits(parts(right))
    assert (run.ok, run.counts["never"], run.exact, run.ranges) == (True, 400, True, ())
    assert run.left_out["dropped"] == dict.fromkeys(gone[:100], 0)
    assert "never: 300 that ranks left out and do not name" in run.evidence
    assert merge_audits(parts(right ^ 1)).ok is None  # it may be others that never came
    assert merge_audits(parts(right, 500_000)).ok is False


# ── in whatever order ────────────────────────────────────────────────────────────────────────────


@given(damaged(3000), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_the_order_and_the_steps_of_merging_change_nothing(
    case: tuple[Given, int], random: Any
) -> None:
    given, length = case
    parts = parts_of(given, length)
    whole = merge_audits(parts).to_dict()
    random.shuffle(parts)
    cut = random.randint(0, len(parts))
    steps = [merge_audits(some) for some in (parts[:cut], parts[cut:]) if some]
    assert merge_audits(parts).to_dict() == whole
    assert merge_audits(steps).to_dict() == whole
    assert merge_audits([*steps, *parts]).to_dict() == whole


# ── a part on its way ────────────────────────────────────────────────────────────────────────────


def test_a_part_is_small_and_the_same_after_its_way() -> None:
    shard = Shard(1, 3, 10**9, 10**9 + 2, 4, "DistributedSampler", seed=7, pads_last=1)
    given = part(
        1,
        3,
        list(range(0, 10**6, 3)),
        10**9,
        shard=shard,
        padded=(5,),
        left_out={"dropped": tuple(range(10**9 - 100, 10**9))},
        counts={"dropped": 100},
        contents={"dataset.files": 2**32 - 1},
        purpose="MySampler",
    )
    raw = given.to_bytes()
    assert len(raw) < 5200
    for back in (AuditPart.from_bytes(raw), pickle.loads(pickle.dumps(given))):
        assert back.to_bytes() == raw
        assert (back.shard, back.padded, back.left_out) == (shard, (5,), given.left_out)
        assert back.ladder is not None
        assert back.ladder.same(given.ladder or Ladder())
    again = part(0, 1, [], None, ladder=None, digests=Digests.of("key", "abc"))
    back = AuditPart.from_bytes(again.to_bytes())
    assert back.digests is not None
    assert (back.digests.total, back.digests.whole) == (3, True)


def test_what_is_no_part_is_refused() -> None:
    with pytest.raises(ValueError, match="this is no AuditPart"):
        AuditPart.from_bytes(b"hello")
    with pytest.raises(ValueError, match="of another release"):
        AuditPart.from_bytes(b'{"version": 99}\n')
    with pytest.raises(TypeError, match=r"takes what loader\.audit_part\(\) gives; got a dict"):
        merge_audits([{}])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="there is no part"):
        merge_audits([])
    two = [part(0, 2, [0], 2), part(0, 2, [1], 2)]
    with pytest.raises(ValueError, match="two parts are of rank 0, of epochs 0 and 0"):
        merge_audits(two)


def test_a_store_has_the_parts_of_those_that_came() -> None:
    store = HashStore()
    for each in parts_of({0: [0, 3], 1: [1, 4], 2: [2]}, 5)[:2]:
        assert each.put(store, "a")
    run = RunAudit.from_store(store, "a", world=3, timeout_s=0)
    assert (run.ok, run.absent, run.delivered) == (None, (2,), 4)
    assert run.answer == "epoch 0 of 3 ranks: cannot be told: rank 2 did not come"
    store.set("safeloader/a/2", "nonsense")
    run = RunAudit.from_store(store, "a", world=3, timeout_s=5)
    assert run.absent == (2,)
    assert "the part of rank 2 cannot be read: this is no AuditPart" in run.answer


def test_bad_arguments_are_refused_at_once() -> None:
    store, one = HashStore(), part(0, 1, [0], 1)
    with pytest.raises(TypeError, match="key must be a text"):
        one.put(store, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="store must be one of torch"):
        one.put({}, "a")
    with pytest.raises(ValueError, match="world must be the number of ranks"):
        RunAudit.from_store(store, "a", world=0)
    with pytest.raises(ValueError, match="timeout_s must be seconds"):
        RunAudit.from_store(store, "a", world=1, timeout_s=-1)


class Broken:
    def set(self, key: str, value: bytes) -> None:
        raise RuntimeError("Broken pipe\n#0 and a stack")

    def wait(self, *args: Any) -> None:
        raise AssertionError

    def check(self, keys: list[str]) -> bool:
        raise RuntimeError("Connection reset by peer")


def test_a_store_that_fails_is_told_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert part(1, 2, [0], 2).put(Broken(), "a") is False
    (record,) = caplog.records
    assert record.getMessage() == (
        "the part of rank 1 was not put into the store, and training goes on: "
        "RuntimeError: Broken pipe"
    )
    run = RunAudit.from_store(Broken(), "a", world=1, timeout_s=1)
    assert "the store failed: RuntimeError: Connection reset by peer" in run.answer


# ── what is as it was asked for, and what nobody can tell ────────────────────────────────────────


def shard(rank: int, replicas: int, length: int, total: int, **more: Any) -> Shard:
    return Shard(rank, replicas, length, total, 0, "DistributedSampler", **more)


def test_padding_that_only_numbers_tell() -> None:
    given = {0: [0, 1, 2], 1: [3, 4, 0]}
    parts = [part(r, 2, x, 5, shard=shard(r, 2, 5, 6)) for r, x in given.items()]
    run = merge_audits(parts)
    assert (run.ok, run.twice.tolist(), run.padding.tolist()) == (True, [0], [0])
    given[1] = [3, 1, 0]  # and now one is missing
    parts = [part(r, 2, x, 5, shard=shard(r, 2, 5, 6)) for r, x in given.items()]
    run = merge_audits(parts)
    assert (run.ok, run.padding.tolist(), run.never.tolist()) == (False, [], [4])


def test_real_repeats_beside_padding_are_told_apart() -> None:
    given = {0: [0, 1, 2], 1: [3, 3, 0]}
    parts = [
        part(r, 2, x, 5, shard=shard(r, 2, 5, 6), padded=(0,) if r else ())
        for r, x in given.items()
    ]
    run = merge_audits(parts)
    assert (run.ok, run.twice.tolist(), run.padding.tolist()) == (False, [0, 3], [0])
    assert "1 of 5 indices came more than once" in run.answer


def test_what_ranks_left_out_is_named() -> None:
    parts = [
        part(0, 2, [0, 1], 6, left_out={"dropped": (2,)}, counts={"dropped": 1}),
        part(1, 2, [3], 6, left_out={"skipped": (4, 5)}, counts={"skipped": 2}),
    ]
    run = merge_audits(parts)
    assert (run.ok, run.never.tolist()) == (True, [2, 4, 5])
    assert run.left_out == {"dropped": {2: 0}, "skipped": {4: 1, 5: 1}}
    assert "each of 6 indices came but 3, left out as was asked for" in run.answer
    assert "never: 2 skipped by rank 1: 4, 5" in run.evidence
    more = merge_audits([parts[0], part(1, 2, [3], 6)])
    assert (more.ok, more.left_out) == (False, {"dropped": {2: 0}})
    assert "2 of 6 indices came on no rank" in more.answer


def test_an_audit_that_is_not_ok_is_that_of_all() -> None:
    bad = part(1, 2, [1], 2, ok=False, counts={"duplicated": 1})
    run = merge_audits([part(0, 2, [0], 2), bad])
    assert run.ok is False
    assert "rank 1: its own audit is not ok" in run.answer
    assert "rank 1: 1 duplicated" in run.evidence
    assert run.next_step == "print(loader.audit) on rank 1"


def test_one_order_for_all_ranks_is_told_by_its_cause() -> None:
    run = merge_audits(parts_of({0: [2, 0, 1], 1: [0, 1, 2]}, 3))
    assert run.ok is False
    assert "ranks 0 and 1 handed over the very same samples" in str(run)
    assert "next: give each loader sampler=DistributedSampler(dataset)" in str(run)
    same = [part(r, 2, [0, 2], 4, shard=shard(0, 2, 4, 4)) for r in range(2)]
    assert "ranks 0 and 1 have the same share, number 0 of 2" in str(merge_audits(same))
    fewer = [part(r, 3, [r, r + 2], 4, shard=shard(r % 2, 2, 4, 4)) for r in range(3)]
    assert "shares out to 2, and there are 3 ranks" in str(merge_audits(fewer))
    seeds = [part(r, 2, [0, r + 1], 4, shard=shard(r, 2, 4, 4, seed=r)) for r in range(2)]
    assert "other seeds, and so other orders: rank 0: 0; rank 1: 1" in str(merge_audits(seeds))


def test_each_share_on_several_ranks_cannot_be_told() -> None:
    given = {0: [0, 2], 1: [0, 2], 2: [1, 3], 3: [1, 3]}
    parts = [part(r, 4, x, 4, shard=shard(r // 2, 2, 4, 4)) for r, x in given.items()]
    run = merge_audits(parts)
    assert run.ok is None
    assert "each share was on 2 ranks, as under tensor or pipeline parallelism" in run.answer
    assert "if these ranks train on samples of their own" in run.next_step
    assert merge_audits([part(0, 2, [0, 2], 4), part(1, 2, [1, 3], 4)]).ok


def test_repeats_on_purpose_are_no_alarm() -> None:
    known = {"purpose": "replacement", "counts": {"repeated": 1}}
    run = merge_audits(parts_of({0: [0, 0, 2], 1: [1, 2, 2]}, 4, **known))
    assert run.ok is None
    assert "draws with replacement, so each index once is not due" in run.answer
    same = merge_audits(parts_of({0: [0, 0, 2], 1: [2, 0, 0]}, 4, **known))
    assert same.ok is False
    assert "ranks 0 and 1 handed over the very same samples" in same.answer


def test_samplers_of_some_indices() -> None:
    run = merge_audits(parts_of({0: [0, 1], 1: [2]}, 5, purpose="subset"))
    assert run.ok is None
    assert "2 of 5 indices came on no rank, and the samplers draw from some" in run.answer
    assert merge_audits(parts_of({0: [0, 1], 1: [2, 3]}, 4, purpose="subset")).ok
    assert merge_audits(parts_of({0: [0, 1], 1: [1, 3]}, 4, purpose="subset")).ok is False
    own = merge_audits(parts_of({0: [0, 1], 1: [2]}, 5, purpose="Mine"))
    assert own.ok is False
    assert "the sampler is your own (Mine)" in str(own)


def test_datasets_that_are_not_one() -> None:
    run = merge_audits([part(0, 2, [0, 1, 2], 3), part(1, 2, [0, 1], 2)])
    assert run.ok is None
    assert "datasets have other lengths (rank 0: 3, rank 1: 2)" in run.answer
    parts = [part(r, 2, [0, 1], 2, contents={"dataset.files": r}) for r in range(2)]
    run = merge_audits(parts)
    assert run.ok is None
    assert "dataset.files is not the same on ranks 0 and 1" in run.answer


def test_samples_without_a_number_are_compared_by_their_digests() -> None:
    def streams(*keys: range) -> RunAudit:
        return merge_audits(
            part(r, len(keys), [], None, ladder=None, digests=Digests.of("key", each), delivered=9)
            for r, each in enumerate(keys)
        )

    apart = streams(range(1000), range(1000, 3000))
    assert apart.ok is None
    assert "none of those compared came on two ranks" in apart.answer
    over = streams(range(1000), range(900, 2000))
    assert over.ok is False
    assert "samples compared came on more than one rank" in over.answer
    same = streams(range(1000), range(1000))
    assert same.ok is False
    assert "ranks 0 and 1 handed over the very same samples" in same.answer
    assert Digests.of("key", [object()]) is None


def test_an_epoch_that_all_ranks_left_early() -> None:
    run = merge_audits(parts_of({0: [0], 1: [1]}, 10, complete=False))
    assert (run.ok, run.complete) == (None, False)
    assert "no rank came to the end of its epoch" in run.answer


def test_a_rank_that_knows_nothing() -> None:
    run = merge_audits([part(0, 2, [0], 2), AuditPart.nothing(1, 2, "nothing is recorded")])
    assert run.ok is None
    assert "rank 1: nothing is recorded" in run.answer


def test_json_takes_it() -> None:
    import json

    run = merge_audits(parts_of({0: [0, 1], 1: [1]}, 3))
    facts = json.loads(json.dumps(run.to_dict()))
    assert facts["twice"] == [1]
    assert facts["by_rank"] == {"1": [0, 1]}
    assert repr(run) == "RunAudit(ok=False, world=2, delivered=3, twice=1, never=1, again=1)"


# ── the collective ───────────────────────────────────────────────────────────────────────────────


def test_no_group_and_no_loader_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    loader = SafeDataLoader([1, 2])
    with pytest.raises(RuntimeError, match="there is no process group: call torch"):
        audit_across_ranks(loader, None)
    with pytest.raises(TypeError, match="loader must be a SafeDataLoader"):
        audit_across_ranks([1, 2], None)
    with pytest.raises(ValueError, match="timeout_s must be seconds"):
        audit_across_ranks(loader, None, timeout_s=-1)
    distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match="group must be a process group"):
            audit_across_ranks(loader, "gloo")
        run = audit_across_ranks(loader, distributed.group.WORLD)
        assert "rank 0: no epoch was begun" in run.answer
        list(loader)
        assert audit_across_ranks(loader, distributed.group.WORLD).ok
    finally:
        distributed.destroy_process_group()


def test_nothing_crosses_between_ranks_unasked() -> None:
    """No module that runs in an epoch knows the collective."""
    package = Path(safeloader.__file__).parent
    calls = re.compile(r"\b(all_gather|all_reduce|broadcast|barrier|gather_object|send|recv)\(")
    found = {
        path.name
        for path in package.rglob("*.py")
        if "distributed" in (text := path.read_text()) and calls.search(text)
    }
    assert found == {"rank_groups.py"}
    users = {path.name for path in package.rglob("*.py") if "rank_groups" in path.read_text()}
    assert users <= {"__init__.py", "merging.py"}  # a public name, and a docstring


@pytest.mark.parametrize("length", [1 << 39, 1 << 62])
def test_a_dataset_that_says_it_is_endless_takes_neither_time_nor_memory(length: int) -> None:
    run = merge_audits([part(0, 2, [*range(5)], length), part(1, 2, [*range(4, 9)], length)])
    if length == 1 << 62:
        assert run.ok is None
        assert f"{length} samples" in run.answer
    else:
        assert run.ok is False
        assert run.counts["never"] >= length - 10
