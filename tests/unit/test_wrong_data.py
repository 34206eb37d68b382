"""What reports say of wrong data, rule by rule, and the looks that they are made of."""

from __future__ import annotations

import dataclasses
import gc
import mmap
import random
import signal
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from safeloader import SafeDataLoader
from safeloader.introspect import copy_state as copy_state_module
from safeloader.introspect import digests as digests_module
from safeloader.introspect.byte_code import loads, stores_elements
from safeloader.introspect.copy_state import (
    CopyState,
    attributes,
    copy_state,
)
from safeloader.introspect.digests import by_leaf, digest, known_leaves
from safeloader.introspect.generator_kinds import (
    Standing,
    kind_of,
    put_back,
    standing,
    state_of,
)
from safeloader.introspect.generators import own_generators
from safeloader.introspect.stored_elements import Element, looked_at, stores_of
from safeloader.introspect.two_ways import passed_by
from safeloader.introspect.values import fields
from safeloader.supervision.flight_recorder import REPORT_BYTES, FlightRecorder
from safeloader.supervision.growth import growth, slow_start
from safeloader.supervision.kept_batches import KeptBatches
from safeloader.supervision.self_report import FirstDraws, Opening, SelfReport, SharedFile
from safeloader.supervision.wrong_data import Seen, findings
from safeloader.worker.observing import ELEMENTS_MAX, Observer

EMPTY = CopyState({}, {}, {})


def report(
    start: Any = None, now: Any = None, length: int | None = None, **more: Any
) -> SelfReport:
    """Of a worker whose dataset had these attributes at its start, and has these now."""
    before = EMPTY if start is None else copy_state(Held(start), length)
    after = before if now is None else copy_state(Held(now), length)
    return SelfReport(**({"pid": 1, "epochs": 1, "batches": 10} | more), start=before, now=after)


class Held:
    def __init__(self, attributes: dict[str, Any]) -> None:
        vars(self).update(attributes)


def told(*reports: SelfReport, main: dict[str, Any] | None = None, **more: Any) -> list[str]:
    known = {"length": None, "stream": False, "persistent": False, "epochs": 1}
    seen = Seen(
        dict(enumerate(reports)),
        copy_state(Held(main or {})),
        workers=len(reports),
        **(known | more),
    )
    return [each.text for each in findings(seen)]


# ── copies ───────────────────────────────────────────────────────────────────────────────────────

ORDER = {"order": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("start", "one", "other", "drifted"),
    [
        (ORDER, {"order": [3, 1, 2, 0]}, {"order": [2, 1, 3, 0]}, True),
        (ORDER, {"order": [3, 1, 2, 0]}, {"order": [3, 1, 2, 0]}, False),
        (ORDER, {"order": [0, 5, 2, 3]}, {"order": [0, 1, 9, 3]}, True),  # lists of their own
        ({"seen": [0] * 4}, None, None, False),
        ({"order": None}, {"order": [3, 1, 2, 0]}, {"order": [2, 1, 3, 0]}, True),
        ({"order": torch.arange(4)}, {"order": torch.tensor([1, 0, 2, 3])}, None, True),
        ({"few": [1, 2]}, {"few": [2, 1]}, {"few": [1, 2]}, False),  # no element for each sample
        ({"cache": [None] * 4}, {"cache": [None, 1, None, None]}, None, False),
    ],
)
def test_orders_that_drift_apart(start: Any, one: Any, other: Any, drifted: bool) -> None:
    said = told(report(start, one or start, 4), report(start, other or start, 4), length=4)
    assert len(said) == drifted
    assert all("in worker 0 than in worker 1" in each for each in said)


def test_marks_that_each_worker_sets_in_its_own_list_are_no_order() -> None:
    reports = []
    for mine in (0, 1):
        seen = [0] * 4
        before = copy_state(Held({"seen": seen}), 4)
        for k in range(mine, 4, 2):
            seen[k] = 1
        reports.append(SelfReport(1, 1, 10, before, copy_state(Held({"seen": seen}), 4)))
    assert told(*reports) == []


def test_a_stream_may_shuffle_its_shards_in_each_worker() -> None:
    one, other = report(ORDER, {"order": [3, 1, 2, 0]}, 4), report(ORDER, ORDER, 4)
    assert told(one, other, stream=True) == []


@pytest.mark.parametrize(
    ("main", "start", "now", "behind"),
    [
        ({"epoch": 3}, {"epoch": 0}, {"epoch": 0}, True),
        ({"epoch": 3}, {"epoch": 0}, {"epoch": 3}, False),
        ({"epoch": 3}, {"epoch": 3}, {"epoch": 3}, False),
        ({"calls": 1}, {"calls": 0}, {"calls": 7}, False),
        ({"size": 5}, {"size": None}, {"size": None}, False),  # made at first use
        ({"training": False}, {"training": True}, {"training": True}, True),
        ({"api_key": "a"}, {"api_key": "b"}, {"api_key": "b"}, False),
        ({"size": {"px": 5}}, {"size": {"px": 4}}, {"size": {"px": 4}}, True),
        ({"size": np.int64(5)}, {"size": np.int64(4)}, {"size": np.int64(4)}, True),
        ({"size": torch.tensor(5)}, {"size": torch.tensor(4)}, {"size": torch.tensor(4)}, True),
        (  # what is shared has reached them
            {"size": torch.tensor(5).share_memory_()},
            {"size": torch.tensor(4).share_memory_()},
            {"size": torch.tensor(4).share_memory_()},
            False,
        ),
    ],
)
def test_a_copy_that_is_behind(main: Any, start: Any, now: Any, behind: bool) -> None:
    assert len(told(report(start, now), report(start, now), main=main)) == behind


class HeldByClass:
    """Has an epoch by its class, until it is set."""

    epoch, step, name = 0, None, "a"
    items: tuple[int, ...] = ()
    calls = property(lambda self: 1 / 0)


@pytest.mark.parametrize(
    ("main", "start", "now", "behind"),
    [
        ({"epoch": 3}, {}, {}, True),
        ({"epoch": 0}, {}, {}, False),
        ({"name": "b"}, {}, {}, True),
        ({"step": 3}, {}, {}, False),  # None: made at first use
        ({"epoch": 3}, {}, {"epoch": 3}, False),  # it has reached them
        ({"epoch": 3}, {}, {"epoch": 1}, False),  # each counts for itself
        ({"other": 3}, {}, {}, False),  # the class has nothing of that name
    ],
)
def test_a_copy_that_has_what_its_class_has(main: Any, start: Any, now: Any, behind: bool) -> None:
    before, after, here = (copy_state(with_default(each)) for each in (start, now, main))
    of_worker = SelfReport(1, 1, 10, before, after)
    seen = Seen({0: of_worker, 1: of_worker}, here, None, False, True, 2, 1)
    assert len(findings(seen)) == behind
    cut = of_worker._replace(left_out=1)  # it may have had more than there was room for
    assert findings(seen._replace(reports={0: cut, 1: cut})) == []


def with_default(attributes: dict[str, Any]) -> HeldByClass:
    held = HeldByClass()
    vars(held).update(attributes)
    return held


# ── random numbers ───────────────────────────────────────────────────────────────────────────────


def opening(*states: float, index: str = "0", epoch: int = 0) -> tuple[Opening, ...]:
    """One in which the generator stood there: ``1.2`` is place 2 after it was seeded by 1."""
    stood = [Standing(int(at), round(at * 10)) for at in states]
    return (Opening(epoch, (index,), {"random": FirstDraws(*stood)}),)


@pytest.mark.parametrize(
    ("one", "other", "repeats"),
    [
        (opening(1.1, 1.2), opening(1.1, 1.2, index="9"), True),
        (opening(1.1, 1.2), opening(1.1, 1.3, index="9"), True),  # they draw different amounts
        (opening(1.1, 1.1), opening(1.1, 1.1, index="9"), False),  # nothing is drawn
        (opening(1.1, 1.2), opening(3.1, 3.2, index="9"), False),
        (opening(1.1, 2.1), opening(3.1, 2.1, index="9"), True),  # seeded where samples are made
        (opening(1.1, 2.1), opening(3.1, 2.1), False),  # by the index
        (opening(1.1, 2.1), opening(1.1, 3.1, index="9"), False),  # the same, from one place
    ],
)
def test_numbers_that_two_workers_share(one: Any, other: Any, repeats: bool) -> None:
    assert len(told(report(openings=one), report(openings=other))) == repeats


@pytest.mark.parametrize(
    ("second", "who"), [(2, "each sample draws"), (2.2, "workers 0 and 1 draw")]
)
def test_who_draws_the_same_after_a_fixed_seed(second: int, who: str) -> None:
    one, other = opening(1, 2, 2, second), opening(3, 2, 2, second, index="9")
    [said] = told(report(openings=one), report(openings=other))
    assert said.startswith(f"{who} the same random numbers from random")


def test_a_seed_for_each_group_of_indices_is_no_fixed_one() -> None:
    one, other = opening(1, 2, 2, 2), opening(3, 2, 2, 2, index="9")
    later = {"random": (2, 8)}  # another group left it there
    assert told(report(openings=one, seeds=later), report(openings=other)) == []
    assert told(report(openings=one), report(openings=other), ended=False) == []
    next_group = opening(3, 2, 2, 5, index="9")
    assert told(report(openings=one), report(openings=next_group)) == []


def made(seed: float, second: float, after_second: float, index: str) -> tuple[Opening, ...]:
    """An opening in which the first sample made the generator."""
    ((epoch, indices, draws),) = opening(0, seed, second, after_second, index=index)
    return (Opening(epoch, indices, {"dataset.rng": draws["random"]._replace(before=None)}),)


@pytest.mark.parametrize(
    ("other", "repeats"),
    [
        (made(1.1, 1.1, 1.2, "9"), True),
        (made(1.2, 1.2, 1.4, "9"), True),  # it draws another amount
        (made(2.1, 2.1, 2.2, "9"), False),  # by the worker's seed
        (made(1.1, 1.1, 1.1, "9"), False),  # nothing is drawn any more
        (made(1.1, 1.1, 1.2, "0"), False),
        (made(1.1, 1.1, 2.2, "9"), False),  # seeded by the index
    ],
)
def test_a_generator_that_the_first_sample_makes(other: Any, repeats: bool) -> None:
    one = made(1.1, 1.1, 1.2, "0")
    said = told(report(openings=one), report(openings=other))
    assert len(said) == repeats
    assert all("began by the same seed" in each for each in said)


def test_numbers_that_come_again_are_told_once_for_each_object_that_holds_generators() -> None:
    names = ("dataset.t.rng", "dataset.t.parts[0].rng", "dataset.t.parts[1].rng", "dataset.rng")
    ((_, _, draws),) = opening(1.1, 1.2)
    all_of_them = dict.fromkeys(names, draws["random"])
    reports = [
        report(openings=tuple(Opening(each, (f"{k}{each}",), all_of_them) for each in range(3)))
        for k in range(3)
    ]
    said = told(*reports, persistent=True, cure=lambda path: f"seed {path}")
    assert [each.partition(":")[0] for each in said] == [
        "workers 0 and 1 draw the same random numbers from dataset.t (3 generators)",
        "workers 0 and 1 draw the same random numbers from dataset.rng",
    ]
    assert [each.rpartition(". ")[2] for each in said] == ["Seed dataset.t", "Seed dataset.rng"]


def test_of_a_stream_only_what_its_second_samples_draw_counts() -> None:
    drawn = [report(openings=opening(1, 2, 2.1, 2.3)), report(openings=opening(1, 2, 2.1, 2.4))]
    assert len(told(*drawn, stream=True)) == 1
    shuffled = [report(openings=opening(1, 2, 2, 2)), report(openings=opening(1, 2, 2, 2))]
    assert told(*shuffled, stream=True) == []
    by_shard = [report(openings=opening(1, 2, 2, 3)), report(openings=opening(1, 2, 2, 4))]
    assert told(*by_shard, stream=True) == []


@pytest.mark.parametrize("second", [(1, 2), (7, 2), (1, 2.1)])
def test_numbers_that_come_again_in_each_epoch(second: Any) -> None:
    both = opening(1, 2) + opening(*second, index="5", epoch=1)
    assert len(told(report(openings=both), persistent=True)) == 1
    same_order = opening(1, 2) + opening(*second, epoch=1)
    assert told(report(openings=same_order), persistent=True) == []


# ── streams, files ───────────────────────────────────────────────────────────────────────────────


EIGHT = (1, 2, 3, 4, 5, 6, 7, 8)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (EIGHT, EIGHT, True),
        (EIGHT, (*EIGHT[:7], 9), False),
        (EIGHT[:7], EIGHT[:7], False),  # more may come
        (EIGHT, EIGHT[:7], False),
        ((1, 2) * 4, (1, 2) * 4, False),  # two that draw bits may well be equal
        ((1, 2, 3, 4) * 2, (1, 2, 3, 4) * 2, True),
        ((1,) * 8, (1,) * 8, False),
        ((*EIGHT[:7], None), (*EIGHT[:7], None), False),
        ((), (), False),
    ],
)
def test_first_samples_of_two_workers(one: Any, other: Any, same: bool) -> None:
    assert len(told(report(stream=one), report(stream=other), stream=True)) == same
    assert told(report(stream=one), report(stream=other), stream=True, length=9) == []


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (EIGHT[:5], EIGHT[:5], True),
        (EIGHT[:5], EIGHT[:6], False),
        (EIGHT[:3], EIGHT[:3], False),
    ],
)
def test_samples_of_two_short_streams(one: Any, other: Any, same: bool) -> None:
    mine, theirs = report(stream=one, stream_ended=True), report(stream=other, stream_ended=True)
    assert len(told(mine, theirs, stream=True)) == same
    assert told(mine, theirs._replace(stream_ended=False), stream=True) == []


def test_read_positions() -> None:
    crossed = SharedFile("/v.mp4", "dataset.file", 3, 2)
    both = SharedFile("/v.mp4", "", 3, 0)
    [said] = told(report(files=(crossed,)), report(files=(crossed,)))
    assert "each moved it between the other's batches" in said
    [said] = told(report(files=(both,)), report(files=(both,)))
    assert "/v.mp4: it was open before they were forked, and both moved it" in said
    assert told(report(files=(both,)), report()) == []


# ── growth ───────────────────────────────────────────────────────────────────────────────────────

MIB = 1 << 20


@pytest.mark.parametrize(
    ("series", "grows"),
    [
        ([(1, 100), (2, 102), (4, 106), (8, 114), (64, 226), (128, 354)], True),
        ([(1, 100), (2, 300), (4, 300), (8, 300), (64, 301), (128, 301)], False),
        ([(1, 100), (2, 150), (4, 220), (8, 230), (64, 250), (128, 255)], False),  # it levels off
        ([(1, 100), (2, 101), (4, 102), (8, 103)], False),  # too little to tell
        ([(1, 100), (2, 900)], False),
    ],
)
def test_a_steady_growth(series: Any, grows: bool) -> None:
    memory = tuple((n, mib * MIB, None) for n, mib in series)
    assert len(list(growth({0: report(memory=memory)}, forked=True))) == grows


def test_pages_that_are_copied() -> None:
    memory = tuple((n, 100 * MIB, (50 + n) * MIB) for n in (1, 2, 4, 8, 16, 64, 128))
    start = {"names": [str(k) for k in range(200_000)]}
    found = list(growth({0: report(start, memory=memory)}, forked=True))
    assert "dataset.names (200,000 Python objects)" in found[0].text
    assert list(growth({0: report(start, memory=memory)}, forked=False)) == []


def test_a_start_that_is_quick_is_not_told() -> None:
    assert list(slow_start(4.0, 1.0, "spawn", False, list)) == []
    [said] = slow_start(22.0, 14.0, "spawn", False, lambda: ["dataset.rows (list of 9)"])
    assert "took 22.0 s until they were ready, 14.0 s of it to pickle" in said.text
    assert "Most is dataset.rows (list of 9). One array" in said.text
    [said] = slow_start(22.0, 0.1, "spawn", False, list)
    assert "libraries anew. persistent_workers=True" in said.text  # there is nothing to shrink
    [said] = slow_start(22.0, 0.1, "spawn", True, lambda: ["dataset.rows (list of 9)"])
    assert "libraries anew, runs worker_init_fn, and gets its own copy of" in said.text
    for sets_up, told in ((True, "worker_init_fn takes"), (False, "no code of the program runs")):
        [said] = slow_start(22.0, 0.1, "fork", sets_up, list)
        assert told in said.text
    [said] = slow_start(22.0, 21.0, "fork", True, list)
    assert "copies the tables of main's memory" in said.text
    assert "worker_init_fn" not in said.text


# ── looks at a dataset ───────────────────────────────────────────────────────────────────────────


class Writes:
    def __init__(self) -> None:
        self.read, self.seen, self.set = [1], [0], [0]

    def __getitem__(self, index: int) -> Any:
        self.seen[index] += 1
        self.set[index] = self.read[index] = 3
        del self.gone[index]  # type: ignore[attr-defined]
        mine = {}
        mine[index] = self.only_read[index] + self.last_read  # type: ignore[attr-defined]
        return mine

    def __init_subclass__(cls) -> None:
        cls.never = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["seen", "set", "read", "gone"])
def test_elements_that_a_method_assigns(name: str) -> None:
    assert stores_elements(Writes(), name)


@pytest.mark.parametrize("name", ["only_read", "last_read", "elsewhere"])
def test_elements_that_no_method_assigns(name: str) -> None:
    assert not stores_elements(Writes(), name)


def test_what_is_only_set_is_not_read() -> None:
    class Dataset:
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch
            self.logged = self.other  # type: ignore[attr-defined]

        @property
        def seed(self) -> int:
            return self.base + self.epoch  # type: ignore[attr-defined,no-any-return]

        def __getitem__(self, index: int) -> int:
            return sum(self.seed for _ in range(2))

    dataset = Dataset()
    assert [loads(dataset, name) for name in ("epoch", "base", "logged", "other")] == [
        True,
        True,
        False,
        False,
    ]


def test_a_walk_is_bounded_and_goes_once_over_a_circle() -> None:
    one, other = Held({}), Held({})
    vars(one).update(other=other, number=1, net=torch.nn.Linear(2, 2), many=list(range(10_000)))
    vars(other).update(one=one, number=2)
    assert [each.path for each in attributes(one)] == [
        "dataset.other",
        "dataset.number",
        "dataset.net",
        "dataset.many",
        "dataset.other.one",
        "dataset.other.number",
    ]


def test_a_slow_machine_sees_no_less(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Held({f"o{k}": Held({"x": k}) for k in "abc"})
    whole = [each.path for each in attributes(wide)]

    def slowly(*about: Any) -> Iterator[Any]:
        time.sleep(0.06)
        yield from fields(*about)

    monkeypatch.setattr(copy_state_module, "fields", slowly)
    assert [each.path for each in attributes(wide)] == whole
    assert whole[-1] == "dataset.oc.x"


@pytest.mark.parametrize(
    "value",
    [
        3,
        "a",
        b"a",
        None,
        [1, 2],
        {"a": torch.ones(2)},
        np.ones(3),
        np.float32(2),
        (True, 2.0),
        list(range(5000)),
        np.array(["a", None], dtype=object),
        Path("a"),
        Image.new("RGB", (3, 4), (1, 2, 3)),
    ],
)
def test_a_digest_tells_values_apart_and_not_objects(value: Any) -> None:
    import copy

    assert digest(value) == digest(copy.deepcopy(value)) is not None
    assert digest(value) != digest([value])


@pytest.mark.parametrize("value", [object(), {1, 2}, [object()], torch.ones(2).to_sparse()])
def test_what_is_not_known_has_no_digest(value: Any) -> None:
    assert digest(value) is None


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    name: str


def test_an_object_of_a_plain_class_is_what_it_holds() -> None:
    assert digest(Sample(torch.ones(2), "a")) == digest(Sample(torch.ones(2), "a")) is not None
    assert digest(Sample(torch.ones(2), "a")) != digest(Sample(torch.ones(2), "b"))
    assert digest(Held({"a": random.Random(1)})) is None  # what it holds lies elsewhere
    assert digest(list(range(99))) != digest([*range(98), 0])


def test_an_image_that_is_not_read_yet_is_left_alone(tmp_path: Path) -> None:
    Image.new("RGB", (3, 4)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert digest(image) is None
        image.load()
        assert digest(image) is not None


def test_views_have_the_digest_of_what_they_show() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    assert digest(base.t()) == digest(base.t().contiguous())
    assert digest(base[:, 1]) != digest(base[:, 2])
    assert by_leaf(OrderedDict(a=[1]))


def test_elements_under_a_subset_and_none_of_what_has_no_list() -> None:
    class Rows:
        def __init__(self) -> None:
            self.rows = [{"x": 1.0} for _ in range(5)]

        def __getitem__(self, index: int) -> Any:
            return self.rows[index]

    subset = Subset(Rows(), [4, 2])  # type: ignore[type-var]
    [store] = stores_of(subset, 2)
    assert (store.path, store.place_of(0), store.place_of(7)) == ("dataset.dataset.rows", 4, None)
    assert list(stores_of(ConcatDataset([[1, 2], [3]]), 3)) == []  # type: ignore[list-item]
    assert list(stores_of(object(), 3)) == []


def test_an_element_counts_as_changed_where_it_was_written_into() -> None:
    rows = [{"x": torch.ones(2), "name": "a"}]

    class Rows:
        def __init__(self) -> None:
            self.rows = rows

        def __getitem__(self, index: int) -> Any:
            return self.rows[index]

    dataset = Rows()
    [store] = stores_of(dataset, 1)
    element = Element(store, "0", 0, epoch=1)

    def now(epoch: int, only_fetching: bool = False) -> Any:
        element.look(epoch)
        return element.change(only_fetching)

    assert now(1) is None
    rows[0]["more"] = 3
    assert now(1) is None
    rows[0]["x"] *= 2  # type: ignore[operator]
    assert now(1) is None  # it may be made ready, once
    assert now(2) is None
    rows[0]["x"] *= 2  # type: ignore[operator]
    assert now(3) == ("dataset.rows[0]['x']", "[1.0, ...]", "[4.0, ...]")
    assert now(3, only_fetching=True) is None  # the training loop may have written there
    rows[0] = {"x": torch.zeros(2)}  # another object was put there
    assert now(4) is not None
    assert looked_at(torch.zeros(3)) is None
    assert list(known_leaves(Held({"x": 1, "y": object()}))) == [".x"]


class Items:
    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def changes(item: Any, write: Any) -> Any:
    """What is told of an element that is fetched once in each of three epochs."""
    dataset = Items([item])
    [store] = stores_of(dataset, 1)
    element = Element(store, "0", 0, epoch=1)
    for epoch in (1, 2, 3):
        write(item)
        element.look(epoch, fetched=epoch == 1)
    return element.change(only_fetching=True)


def halve(item: Any) -> None:
    item["x"] /= 2


def test_what_each_fetch_writes_into_an_element_is_told() -> None:
    for value in (np.ones(2), torch.ones(2), 1.0):
        assert changes({"x": value, "n": 1}, halve).path == "dataset.items[0]['x']"


@pytest.mark.parametrize(
    ("item", "write"),
    [
        ({"visits": 0}, lambda item: item.update(visits=item["visits"] + 1)),
        ({"done": False}, lambda item: item.update(done=not item["done"])),
        ({"image": None}, lambda item: item.update(image=torch.rand(2))),
        ({"x": np.array([2.0])}, lambda item: np.clip(item["x"], 0, 1, out=item["x"])),
        ({"words": ["b", "c", "a"]}, lambda item: item["words"].append(item["words"].pop(0))),
        ({"losses": []}, lambda item: item["losses"].append(random.random())),
    ],
)
def test_what_an_element_keeps_of_its_fetches_is_not_told(item: Any, write: Any) -> None:
    assert changes(item, write) is None


def shuffles(item: Any) -> None:
    if isinstance(item, torch.Tensor):
        item[:] = item[torch.randperm(len(item))]
    else:
        np.random.shuffle(item)


ELEMENTS: list[Any] = [
    lambda: [f"caption {k}" for k in range(20)],
    lambda: [f"caption {k}" for k in range(3000)],
    lambda: [{"x": k, "y": 2 * k, "z": [k]} for k in range(40)],
    lambda: [torch.rand(2) for _ in range(100)],
    lambda: np.random.rand(100, 3),
    lambda: torch.rand(100, 3),
    lambda: np.random.rand(3, 100).T,
    lambda: np.random.rand(9),
    lambda: np.arange(30).astype("U8"),
]


@pytest.mark.parametrize("make", ELEMENTS)
@pytest.mark.parametrize("within", [lambda x: x, lambda x: {"a": x, "b": 0}, lambda x: [x, 1, 2]])
def test_another_order_in_its_place_is_no_harm(make: Any, within: Any) -> None:
    kept = make()
    assert changes(within(kept), lambda _: shuffles(kept)) is None


@pytest.mark.parametrize("make", [ELEMENTS[k] for k in (3, 4, 5, 6, 7)])
def test_what_is_shuffled_and_written_into_as_well_is_told(make: Any) -> None:
    kept = make()

    def write(item: Any) -> None:
        for each in item["a"] if isinstance(kept, list) else [kept]:
            each *= 2
        if not isinstance(kept, list):
            shuffles(kept)

    assert changes({"a": kept}, write).path.startswith("dataset.items[0]['a']")


def test_a_list_of_numbers_that_is_written_into_is_told_whatever_their_sum() -> None:
    item = [3, 1, *([0.5] * 20)]

    def write(item: Any) -> None:
        item[0], item[1] = (2, 2) if item[0] == 3 else (3, 1)
        item[2] += 0.25

    assert changes(item, write).path == "dataset.items[0]"


class Columns:
    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self.data["x"][index]


class OwnTensors(TensorDataset):
    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        return self.tensors[0][index]


@pytest.mark.parametrize(
    ("dataset", "paths"),
    [
        (Columns({"x": torch.ones(4, 2), "y": [1, 2]}), ["dataset.data['x']"]),
        (Columns({"x": [[1.0]] * 4, "n": np.ones(4)}), ["dataset.data['x']"]),
        (Columns({k: torch.ones(2) for k in range(4)}), ["dataset.data"]),
        (Columns({k: torch.ones(4, 2) for k in range(9)}), []),  # too many to be columns
        (Columns({f"{k}": torch.ones(2) for k in range(4)}), []),  # not by the index
        (OwnTensors(torch.ones(4, 2), torch.ones(4)), ["dataset.tensors[0]"]),
    ],
)
def test_where_elements_lie_in_columns(dataset: Any, paths: list[str]) -> None:
    assert [each.path for each in stores_of(dataset, 4)] == paths


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, torch.tensor])
def test_an_index_of_any_kind_has_a_place(kind: Any) -> None:
    dataset = Items([[1.0], [2.0], [3.0]])
    [store] = stores_of(dataset, 3)
    assert (store.place_of(kind(2)), store.place_of(kind(3))) == (2, None)
    assert store.get(2) == [3.0]


@pytest.mark.parametrize("index", [True, 1.0, "1", (1, 2), torch.ones(2), torch.tensor(1.0), None])
def test_what_is_no_number_has_none(index: Any) -> None:
    dataset = Items([[1.0], [2.0], [3.0]])
    [store] = stores_of(dataset, 3)
    assert store.place_of(index) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: [torch.ones(3) for _ in range(4)],
        lambda: torch.ones(4, 3),
        lambda: {k: torch.ones(3) for k in range(4)},
    ],
)
def test_a_look_holds_nothing_of_the_dataset(make: Any) -> None:
    dataset = Items(make())
    held = dataset.items if isinstance(dataset.items, torch.Tensor) else dataset.items[0]
    gone = weakref.ref(held)
    [store] = stores_of(dataset, 4)
    element = Element(store, "0", 0, epoch=1)
    held *= 2
    element.look(1, fetched=True)
    del held
    dataset.items = make()
    gc.collect()
    assert gone() is None
    assert (store.gone, element.look(2), element.change(only_fetching=False)) == (True, None, None)


def test_a_list_that_is_put_in_the_place_of_another_is_looked_at_anew() -> None:
    reports: list[SelfReport] = []
    dataset = Items([torch.ones(3) for _ in range(4)])
    observer = Observer(dataset, length=4, stream=False, files=None, publish=reports.append)
    for epoch in range(4):
        if epoch == 1:
            dataset.items = [torch.ones(3) for _ in range(4)]
        observer.over(Passes())
        for store in observer.stores():
            observer.note_element(store, 2, 2)
        dataset.items[2] *= 2
        observer.fetched()
        observer.report()
    assert [each.path for each in reports[-1].in_place] == ["dataset.items[2]"]
    assert reports[-1].in_place[0].was == "[1.0, ...]"


def test_a_process_of_one_epoch_looks_at_elements_that_are_empty_alone() -> None:
    reports: list[SelfReport] = []
    dataset = Items([torch.ones(3), None, torch.zeros(3), torch.ones(3)])
    observer = Observer(
        dataset, length=4, stream=False, files=None, publish=reports.append, stays=False
    )
    observer.over(Passes())
    for index in range(4):
        assert all(observer.note_element(store, index, index) for store in observer.stores())
        dataset.items[index] = torch.full((3,), 7.0)
        observer.fetched()
    observer.report()
    assert (reports[-1].in_place, reports[-1].filled) == ((), (("dataset.items", 2, 2),))


def test_a_process_of_one_epoch_looks_at_no_more_elements_than_others() -> None:
    dataset = Items([torch.ones(3)] * 99)
    observer = Observer(
        dataset, length=99, stream=False, files=None, publish=lambda _: None, stays=False
    )
    observer.over(Passes())
    [store] = observer.stores()
    looked_at = sum(observer.note_element(store, index, index) for index in range(99))
    assert looked_at == ELEMENTS_MAX


class Passes:
    """A fetcher, as far as an observer asks."""

    def by_way_of(self, _: Any) -> None:
        """It takes no other way."""


def shuffled(rows: Any) -> None:
    rows[:] = rows[[*range(1, len(rows)), 0]]


def doubled(rows: Any) -> None:
    rows *= 2


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("shape", [(9, 2), (9, 100_000), (20_000, 8), (40_000, 8)])
def test_rows_of_an_array_that_are_shuffled_are_not_written_into(shape: Any, kind: Any) -> None:
    def told_of(write: Any) -> Any:
        reports: list[SelfReport] = []
        dataset = Items(kind(np.random.rand(*shape)))
        observer = Observer(
            dataset, length=shape[0], stream=False, files=None, publish=reports.append
        )
        for _ in range(3):
            observer.over(Passes())
            for index in (2, 5):
                for store in observer.stores():
                    observer.note_element(store, index, index)
                if index == 2 or write is doubled:
                    write(dataset.items)
                observer.fetched()
            observer.report()
        return reports[-1].in_place

    assert told_of(shuffled) == ()
    assert told_of(doubled) != ()


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("numbers", [100, 1_000_000])
def test_a_pair_that_changes_places_is_not_written_into(numbers: int, kind: Any) -> None:
    def told_of(write: Any) -> bool:
        dataset = Items([kind(np.random.rand(2, numbers).astype(np.float32))])
        [store] = stores_of(dataset, 1)
        element = Element(store, "0", 0, epoch=1)
        for epoch in range(1, 4):
            write(dataset.items[0])
            element.look(epoch, fetched=epoch == 1)
        return element.change(only_fetching=False) is not None

    assert not told_of(shuffled)
    assert told_of(doubled)


class Around:
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


class Table:
    def __init__(self, rows: Any) -> None:
        self.rows = rows


class OfTable:
    def __init__(self, rows: Any) -> None:
        self.table = Table(rows)

    def __getitem__(self, index: int) -> Any:
        return self.table.rows[index]


@pytest.mark.parametrize(
    ("dataset", "index", "path", "at"),
    [
        (ConcatDataset([Items([1, 2]), Items([3, 4])]), 3, "dataset.datasets[1].items", 1),
        (
            Subset(ConcatDataset([Items([1, 2]), Items([3, 4])]), [1, 3, 0, 2]),
            1,
            "dataset.dataset.datasets[1].items",
            1,
        ),
        (Around(Subset(Items([5, 6, 7]), [2, 0, 1])), 0, "dataset.dataset.dataset.items", 2),
        (Around(Items([5, 6])), 1, "dataset.dataset.items", 1),
        (OfTable([5, 6]), 1, "dataset.table.rows", 1),
    ],
)
def test_where_the_elements_of_nested_datasets_lie(
    dataset: Any, index: int, path: str, at: int
) -> None:
    length = len(dataset) if hasattr(dataset, "__len__") else None
    if length is None:
        length = {Around: lambda: len(dataset.dataset), OfTable: lambda: 2}[type(dataset)]()
    places = {store.path: store.place_of(index) for store in stores_of(dataset, length)}
    assert places.get(path) == at
    assert [each for each in places if each != path and places[each] is not None] == []


class Shuffled:
    """Two workers' copies, each shuffled by a seed of its own."""

    def __init__(self, make: Any, length: int, seeds: tuple[int, int] = (1, 2)) -> None:
        shared = make()
        self.reports = []
        for seed in seeds:
            mine = shared.copy()
            start = copy_state(Held({"items": mine}), length)
            random.Random(seed).shuffle(mine)
            self.reports.append(
                SelfReport(1, 1, 9, start, copy_state(Held({"items": mine}), length))
            )


@pytest.mark.parametrize(
    "make",
    [
        lambda: [{"x": torch.zeros(2)} for _ in range(9)],
        lambda: [object() for _ in range(9)],
        lambda: [Held({"name": str(k)}) for k in range(9)],
        lambda: [k / 7 for k in range(9)],
        lambda: np.array([{"x": k} for k in range(9)], dtype=object),
        lambda: np.arange(9),
        lambda: list(range(50_000)),
    ],
)
def test_elements_of_any_kind_that_workers_shuffle(make: Any) -> None:
    length = len(make())
    [said] = told(*Shuffled(make, length).reports, length=length)
    assert "dataset.items is in another order in worker 0 than in worker 1" in said
    assert told(*Shuffled(make, length, (3, 3)).reports, length=length) == []


def test_an_order_that_each_sample_changes_is_none() -> None:
    one, other = Shuffled(lambda: list(range(9)), 9).reports
    assert told(one._replace(unsteady=("dataset.items",)), other, length=9) == []
    assert told(one, other._replace(unsteady=("dataset.items",)), length=9) == []
    assert len(told(one._replace(unsteady=("dataset.other",)), other, length=9)) == 1


def test_an_order_stands_still_though_samples_write_into_its_members() -> None:
    dataset = Items([{"x": k, "visits": 0} for k in range(9)])
    reports: list[SelfReport] = []
    observer = Observer(dataset, length=9, stream=False, files=None, publish=reports.append)
    observer.over(Passes())
    for shuffle in (False, True):
        before = observer.orders()
        dataset.items[3]["visits"] += 1
        if shuffle:
            dataset.items.reverse()
        observer.note_orders(before)
        observer.report()
    assert [each.unsteady for each in reports] == [(), ("dataset.items",)]


@pytest.mark.parametrize(
    "data", [np.arange(18.0).reshape(9, 2), torch.rand(9), {"a": list(range(9))}]
)
def test_of_rows_and_columns_only_that_they_were_moved_is_told(data: Any) -> None:
    import copy

    def after(change: Any) -> SelfReport:
        mine = copy.deepcopy(data)
        start = copy_state(Held({"x": mine}), 9)
        column = mine["a"] if isinstance(mine, dict) else mine
        change(column)
        return SelfReport(1, 1, 9, start, copy_state(Held({"x": mine}), 9, last=start))

    def swap(column: Any, one: int, other: int) -> None:
        kept = column[one] if isinstance(column, list) else copy.deepcopy(column[one])
        column[one] = column[other]
        column[other] = kept

    def note(column: Any, at: int) -> None:
        column[at] = column[at] + 0.5

    moved = after(lambda column: swap(column, 1, 5)), after(lambda column: swap(column, 2, 3))
    assert len(told(*moved, length=9)) == 1
    noted = after(lambda column: note(column, 1)), after(lambda column: note(column, 5))
    assert told(*noted, length=9) == []


def test_a_second_look_reads_no_list_to_its_end_that_is_as_it_was() -> None:
    held = Held({"a": list(range(9)), "b": np.arange(9), "c": torch.rand(9, 2)})
    first = copy_state(held, 9)
    known = {path: each._replace(contents=1) for path, each in first.orders.items()}
    again = copy_state(held, 9, last=first._replace(orders=known))
    assert again.orders == known
    held.a.reverse()
    assert copy_state(held, 9, last=first._replace(orders=known)).orders["dataset.a"].contents != 1


def test_workers_in_different_epochs_are_not_compared() -> None:
    one, other = Shuffled(lambda: list(range(9)), 9).reports
    assert told(one, other._replace(epochs=2), length=9) == []


def test_notes_and_histories_that_differ_are_no_orders() -> None:
    items = [{"x": k, "seen": 0} for k in range(4)]
    before = copy_state(Held({"items": items, "last": []}), 4)
    reports = []
    for mine in (0, 1):
        for k in range(mine, 4, 2):
            items[k] |= {"x": k + 10, "seen": mine, "loaded": True}
        now = copy_state(Held({"items": items, "last": [mine, 5, 6, 7]}), 4)
        reports.append(SelfReport(1, 1, 10, before, now))
    assert told(*reports, length=4) == []


def test_of_a_long_tensor_the_elements_of_all_of_it_are_compared() -> None:
    start, swapped = {"order": torch.arange(100)}, torch.arange(100)
    swapped[[60, 80]] = swapped[[80, 60]]
    one, other = (report(start, now, 100) for now in (start, {"order": swapped}))
    [said] = told(one, other, length=100)
    assert "dataset.order is in another order" in said


def negative_of_its_negative(rows: torch.Tensor) -> torch.Tensor:
    """With torch's bit that says so, and other bytes."""
    return torch.complex(torch.zeros_like(rows), -rows).conj().imag


@pytest.mark.parametrize(
    "apart", [lambda rows: torch.stack([rows, -rows], 1)[:, 0], negative_of_its_negative]
)
def test_a_tensor_is_read_as_it_is_whatever_lies_in_memory(apart: Any) -> None:
    rows = torch.arange(1, 101, dtype=torch.float32)
    assert torch.equal(apart(rows), rows)
    own, seen = (copy_state(Held({"order": each}), 100) for each in (rows, apart(rows)))
    assert own.orders["dataset.order"][:3] == seen.orders["dataset.order"][:3]
    assert own.held["dataset.order"].sampled == seen.held["dataset.order"].sampled


WITHOUT_MEMORY = """
import sys
import torch
from safeloader import SafeDataLoader

class Rows:
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return index

def resized(tensor, size=0):
    tensor.untyped_storage().resize_(size)
    return tensor

dataset = Rows()
dataset.given_back = resized(torch.ones(8, 4))
dataset.apart = resized(torch.ones(4, 8).T)
dataset.cut = resized(torch.ones(8, 1 << 17), 64)
dataset.in_a_list = [resized(torch.ones(4)) for _ in range(8)]
dataset.zeros_of_none = torch._efficientzerotensor((8,))
dataset.order = [*range(8)]
loader = SafeDataLoader(dataset, batch_size=2, num_workers=int(sys.argv[1]))
for _ in range(3):
    assert len(list(loader)) == 4
print(loader.audit.ok)
"""


@pytest.mark.workers
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_tensor_whose_memory_is_gone_is_not_read(num_workers: int) -> None:
    command = [sys.executable, "-c", WITHOUT_MEMORY, str(num_workers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_the_order_under_a_subset_is_compared() -> None:
    class Rows(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.rows = list(range(9))

    reports = []
    for seed in (1, 2):
        dataset = Rows()
        start = copy_state(Subset(dataset, [1, 3, 5]), 3)
        random.Random(seed).shuffle(dataset.rows)
        reports.append(SelfReport(1, 1, 9, start, copy_state(Subset(dataset, [1, 3, 5]), 3)))
    [said] = told(*reports, length=3)
    assert "dataset.dataset.rows is in another order" in said


def test_own_generators_are_found_and_not_moved() -> None:
    held = Held({"a": random.Random(1), "b": Held({"c": np.random.default_rng(2)})})
    vars(held).update(d=torch.Generator().manual_seed(3), e=np.random.RandomState(4))
    found = own_generators(held)
    reads = {name: partial(standing, each) for name, each in found.items()}
    assert set(reads) == {"dataset.a", "dataset.b.c", "dataset.d", "dataset.e"}
    before = {name: read() for name, read in reads.items()}
    assert before == {name: read() for name, read in reads.items()}
    held.a.random(), held.b.c.random(), torch.rand(1, generator=held.d), held.e.rand()
    drawn = {name: read() for name, read in reads.items()}
    assert all(drawn[name].at != before[name].at for name in reads)
    held.a.random(), held.b.c.random(), torch.rand(1, generator=held.d), held.e.rand()
    assert all(read().seed == drawn[name].seed for name, read in reads.items())
    held.a.seed(9), held.d.manual_seed(9), held.e.seed(9)
    held.b.c.bit_generator.state = np.random.PCG64(9).state
    held.a.random(), held.b.c.random(), torch.rand(1, generator=held.d), held.e.rand()
    assert all(read().seed != drawn[name].seed for name, read in reads.items())


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.MT19937, np.random.Philox])
def test_a_draw_is_no_seeding(bits: Any) -> None:
    for made in (np.random.Generator, np.random.RandomState):
        rng = made(bits(1))
        (found,) = own_generators(Held({"rng": rng})).values()
        rng.standard_normal()
        first = standing(found)
        rng.standard_normal()
        now = standing(found)
        assert (now.seed == first.seed, now.at == first.at) == (True, False)


class Counting(random.Random):
    def getstate(self) -> Any:
        raise AssertionError("code of the user's")


@pytest.mark.parametrize(
    "rng", [random.Random(1), Counting(1), np.random.PCG64(1), np.random.RandomState(1)]
)
def test_each_kind_is_read_and_put_back(rng: Any) -> None:
    assert kind_of(rng) is not None
    before, kept = standing(rng), state_of(rng)
    getattr(rng, "random_raw", getattr(rng, "random", None))()
    assert standing(rng) != before
    put_back(rng, kept)
    assert (standing(rng) == before) == (kept is not None)


def test_what_has_no_state_is_of_no_kind() -> None:
    assert own_generators(Held({"rng": random.SystemRandom(), "random": random})) == {}


def test_a_report_is_read_whole_or_not_at_all() -> None:
    flight = FlightRecorder(2)
    assert flight.report(1) is None
    assert flight.write_report(1, b"first")
    assert (flight.report(0), flight.report(1)) == (None, b"first")
    assert not flight.write_report(1, bytes(REPORT_BYTES))
    assert flight.report(1) == b"first"
    flight.row(1)[7] += 1  # it is writing, or was killed while it did
    assert flight.report(1) is None


# ── what looking costs, and what it must not run ─────────────────────────────────────────────────


def assert_bounded(look: Callable[[Any], object], some: Any, eight_times: Any) -> None:
    """Assert that a look takes of what is eight times as large what it takes of the other.

    In turn, the least of seven each, in time of this process; what grows with it takes eight times
    as long, and what does not may well seem to take twice as long on a machine that is busy.
    """
    took: list[list[float]] = [[], []]
    for _ in range(7):
        for each, times in zip((some, eight_times), took, strict=True):
            began = time.process_time()
            look(each)
            times.append(time.process_time() - began)
    assert min(took[1]) < 4 * min(took[0])


def large_class(methods: int) -> Any:
    """One with methods of 60 lines each, and 50 arrays."""
    lines = ["class Large:", "    def __getitem__(self, i): return self.m0(i)"]
    for k in range(methods):
        lines.append(f"    def m{k}(self, i):")
        lines += [f"        self.x{k}_{j} = i + {j}" for j in range(60)]
        lines.append(f"        return self.m{k + 1}(i)")
    space: dict[str, Any] = {}
    exec("\n".join(lines), space)
    made = space["Large"]()
    vars(made).update({f"a{k}": np.arange(100) for k in range(50)})
    return made


N_LARGE = 20_000
# By what grows, ``n`` times, in each.
COSTLY: dict[str, Callable[[int], dict[str, Any]]] = {
    "long lists": lambda n: {f"l{k}": [*range(N_LARGE)] for k in range(32 * n)},
    "longer lists": lambda n: {f"l{k}": [*range(N_LARGE * n)] for k in range(8)},
    "long words": lambda n: {"l": ["\u1234" * (125_000 * n)] * N_LARGE},
    "encoded images": lambda n: {"l": [b"\xff" * (62_500 * n)] * N_LARGE},
    "arrays": lambda n: {f"l{k}": [np.zeros(n << 13)] * N_LARGE for k in range(8)},
    "nested": lambda n: {"l": [[[[[k] * 16] * 16] * 16] * (16 * n) for k in range(100)] * 200},
    "rows": lambda n: {f"l{k}": np.zeros((N_LARGE, 125 * n)) for k in range(8)},
    "columns": lambda n: {"l": {f"c{k}": [*range(N_LARGE)] for k in range(8 * n)}},
    "spread": lambda n: {
        f"l{k}": torch.zeros(64, 8 * n, N_LARGE).permute(2, 0, 1) for k in range(2)
    },
    "attributes": lambda n: {f"a{k}": k for k in range(62_500 * n)},
}


@pytest.mark.parametrize("kind", COSTLY)
def test_a_look_at_a_large_dataset_is_bounded(kind: str) -> None:
    some, eight_times = (Held(COSTLY[kind](n)) for n in (1, 8))
    assert_bounded(lambda each: copy_state(each, N_LARGE), some, eight_times)


def test_a_look_at_a_large_class_is_bounded() -> None:
    some, eight_times = (large_class(200 * n) for n in (1, 8))
    assert_bounded(lambda each: list(stores_of(each, 100)), some, eight_times)


@pytest.mark.parametrize(
    "value",
    [
        lambda n: b"\xff" * (2_500_000 * n),
        lambda n: np.zeros((375 * n, 3000, 3), np.uint8).transpose(2, 0, 1),
        lambda n: torch.zeros(3, 3000, 375 * n).transpose(0, 2),
        lambda n: torch.zeros(1, 3000, 375 * n).transpose(1, 2),
        lambda n: np.full(625_000 * n, np.nan),
        lambda n: [[[[object() for _ in range(40)] for _ in range(40)] for _ in range(5 * n)]],
        lambda n: [[[[object() for _ in range(5 * n)] for _ in range(40)] for _ in range(40)]],
    ],
    ids=["bytes", "numpy", "torch", "one row", "blank", "wide", "wide at its end"],
)
def test_a_look_at_a_large_element_is_bounded(value: Any) -> None:
    assert_bounded(lambda each: (digest(each), looked_at(each)), value(1), value(8))


class Meta(type):
    ran: list[str] = []  # noqa: RUF012

    def __eq__(cls, other: object) -> bool:
        Meta.ran.append("==")
        return True

    def __hash__(cls) -> int:
        Meta.ran.append("hash")
        return 1


class Hostile(metaclass=Meta):
    """Everything that may be asked of it is noted."""

    def __getattr__(self, name: str) -> Any:
        Meta.ran.append(name)
        raise AttributeError(name)

    def __len__(self) -> int:
        Meta.ran.append("len")
        return 5

    def __iter__(self) -> Any:
        Meta.ran.append("iter")
        return iter(())

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        Meta.ran.append("class")
        return torch.Tensor


class HostileKey:
    """A key of a dict; it is noted where it is asked for."""

    def __hash__(self) -> int:
        Meta.ran.append("hash of a key")
        return 1

    def __eq__(self, other: object) -> bool:
        Meta.ran.append("== of a key")
        return True


class Overriding(torch.Tensor):
    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        Meta.ran.append("__torch_function__")
        return 1


def test_no_code_of_what_is_looked_at_runs() -> None:
    tensor = torch.zeros(3).as_subclass(Overriding)
    many = [Hostile() for _ in range(4)]
    held = {"a": Hostile(), "b": many, "c": np.array(many), "d": {"k": Hostile()}, "t": tensor}
    held |= {"hits": {HostileKey(): 1}, "columns": {HostileKey(): many, "x": [many] * 4}}
    dataset = Items(many)
    vars(dataset).update(held)
    Meta.ran.clear()
    copy_state(dataset, 4)
    for store in stores_of(dataset, 4):
        Element(store, "0", 0, epoch=1).look(1)
    for each in [*held.values(), held]:
        digest(each), known_leaves(each)
    kept = KeptBatches()
    kept.note(0, 0, held)
    assert not list(kept.finding(dataset))
    assert passed_by(dataset) == []
    assert Meta.ran == []


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of kinds that are seldom
def test_one_attribute_that_cannot_be_looked_at_hides_no_other() -> None:
    odd = [
        torch.sparse_coo_tensor(torch.zeros((0, 1), dtype=torch.long), torch.ones(1), ()),
        torch.quantize_per_tensor(torch.tensor(1.0), 0.1, 0, torch.quint8),
        torch.zeros((), device="meta"),
    ]
    for each in odd:
        assert copy_state(Held({"x": each, "epoch": 3})).scalars["dataset.epoch"] == 3


class TimeIsUp(RuntimeError):
    """What a handler of the program's raises."""


def test_what_a_signal_handler_raises_is_not_taken_for_a_fault_of_the_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def handler(*_: object) -> None:
        raise TimeIsUp

    def struck(*_: object, **__: object) -> Any:
        handler()

    before = signal.signal(signal.SIGALRM, handler)
    try:
        for module in (copy_state_module, digests_module):
            monkeypatch.setattr(module, "container_base", struck)
        for look in (lambda: copy_state(Items([1])), lambda: digest([1]), lambda: known_leaves(1)):
            with pytest.raises(TimeIsUp):
                look()
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["tensor", "list", "buffer", "memmap"])
def test_what_is_in_shared_memory_may_be_written_there_by_others(kind: str, tmp_path: Path) -> None:
    data: Any = {
        "tensor": lambda: torch.ones(3, 2).share_memory_(),
        "list": lambda: [torch.ones(2).share_memory_() for _ in range(3)],
        "buffer": lambda: np.frombuffer(mmap.mmap(-1, 48)).reshape(3, 2),
        "memmap": lambda: np.asarray(np.memmap(tmp_path / "x", np.float64, "w+", shape=(3, 2))),
    }[kind]()

    def write() -> None:
        for row in data:
            row += 0.37

    def told(*, by_fetching: bool) -> Any:
        dataset = Items(data)
        [store] = stores_of(dataset, 3)
        write()
        element = Element(store, "1", 1, epoch=1)
        for epoch in (1, 2, 3):
            if by_fetching:
                write()
            element.look(epoch, fetched=epoch == 1)
            write()
        return element.change(only_fetching=False)

    assert told(by_fetching=False) is None
    assert told(by_fetching=True) is not None


def test_a_tensor_that_was_looked_at_is_what_it_was() -> None:
    for tensor in (torch.arange(3), torch.ones(3), torch.ones(2, 3).t(), torch.tensor(3)):
        dataset = Items(tensor)
        copy_state(dataset, 3)
        digest([tensor]), known_leaves(tensor), looked_at(tensor)
        tensor.resize_(100)


def test_a_loader_in_a_dataset_is_not_looked_into() -> None:
    for cls in (SafeDataLoader, DataLoader):
        paths = [each.path for each in attributes(Held({"loader": cls([1]), "epoch": 1}))]
        assert paths == ["dataset.loader", "dataset.epoch"]
