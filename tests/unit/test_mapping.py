"""Plain samples are collated as ``default_collate`` does it, all others left to it."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from safeloader import CollateError, SafeDataLoader, SampleError
from safeloader.worker import first_samples, mapping, recording, stacking
from safeloader.worker.stacking import collated_here, collation_by
from tests.oracle import plain

Pair = namedtuple("Pair", "x y")


class Sub(torch.Tensor):
    pass


def same_as_default(samples: Any) -> None:
    came = collated_here(samples)
    assert came is not None
    assert plain(came) == plain(default_collate(samples))


def test_what_it_collates_is_as_default_collate_has_it() -> None:
    rows = TensorDataset(torch.arange(6.0).view(3, 2), torch.arange(3))
    same_as_default([rows[k] for k in range(3)])
    same_as_default([(torch.tensor(1.0),), (torch.tensor(2),)])
    same_as_default([(), ()])
    same_as_default([torch.ones(2), torch.zeros(2)])
    same_as_default([torch.ones(2, requires_grad=True), torch.zeros(2)])
    same_as_default([(torch.ones(2), torch.zeros(0))] * 2)
    same_as_default([(torch.ones(2, requires_grad=True),)] * 2)
    same_as_default([(torch.ones(2), 1)] * 2)
    same_as_default([0.1, float("nan"), -0.0, float("inf"), 5e-324])
    same_as_default([-(1 << 63), (1 << 63) - 1])
    same_as_default([{"a": 1, 2: ("x", b"y")}, {2: ("z", b""), "a": -1, "more": 0}])
    same_as_default([{}, {"a": 1}])
    last = torch.ones(1, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    same_as_default([(last[0],)] * 3)


leaves = st.sampled_from(
    [
        st.integers(-(1 << 70), 1 << 70),
        st.floats(),
        st.booleans(),
        st.text(max_size=2),
        st.builds(lambda n: torch.full((2,), n), st.integers(0, 9)),
        st.builds(np.float32, st.integers(0, 9)),
    ]
)


def samples_of(depth: int) -> st.SearchStrategy[st.SearchStrategy[Any]]:
    """What makes samples of one structure, whatever it is."""
    if not depth:
        return leaves
    inner = samples_of(depth - 1)
    return st.one_of(
        leaves,
        st.lists(inner, max_size=3).map(lambda parts: st.tuples(*parts)),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(st.fixed_dictionaries),
        st.lists(inner, max_size=2).map(lambda parts: st.tuples(*parts).map(list)),
    )


@given(st.data())
@pytest.mark.hypothesis
def test_a_batch_is_that_of_default_collate_bit_for_bit(data: Any) -> None:
    sample = data.draw(samples_of(2))
    samples = data.draw(st.lists(sample, min_size=1, max_size=4))
    came = collated_here(samples)
    if came is not None:
        assert plain(came) == plain(default_collate(samples))


def test_its_tensors_can_be_resized() -> None:
    for samples in ([1, 2], [1.0, 2.0]):
        assert collated_here(samples).untyped_storage().resizable()


def test_a_default_device_is_heeded() -> None:
    batches = iter(SafeDataLoader([1, 2], batch_size=2))
    with torch.device("meta"):
        assert next(batches).device.type == "meta"


@pytest.mark.parametrize(
    "samples",
    [
        [],
        torch.ones(3, 2),
        [torch.ones(2).as_subclass(Sub)],
        [torch.eye(2).to_sparse()],
        [torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)],
        [torch.ones(2), torch.ones(3)],
        [torch.ones(2), None],
        [[torch.ones(2)]],
        [Pair(torch.ones(2), torch.ones(2))],
        [(torch.ones(2), True)],
        [(torch.ones(2), 1), (torch.ones(2), 2.0)],
        [1, True],
        [1.5, 2],
        [1 << 63],
        [None],
        ["text"],
        [np.int64(3)],
        [{"a": 1}, {"b": 1}],
        [{"a": 1}, OrderedDict(a=1)],
        [OrderedDict(a=1)],
        [{"a": None}],
        [{"a": [1]}],
        [(torch.ones(2).as_subclass(Sub),)],
        [(torch.eye(2).to_sparse(),)],
        [(torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),)],
        [(torch.ones(2),), (torch.ones(2), torch.ones(2))],
        [(torch.ones(2),), (torch.ones(3),)],
        [(torch.ones(2),), (None,)],
        [(1, 2), iter((3, 4))],
    ],
)
def test_what_it_leaves_alone(samples: Any) -> None:
    assert collated_here(samples) is None


def test_the_functions_that_a_user_registers_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [(torch.ones(2),)] * 2
    for kind in (torch.Tensor, tuple):
        with monkeypatch.context() as patch:
            patch.setitem(default_collate_fn_map, kind, lambda batch, **_: "mine")
            assert collated_here(samples) is None
            (batch,) = SafeDataLoader(samples, batch_size=2)
            assert "mine" in batch


def test_errors_are_those_of_default_collate() -> None:
    loader = SafeDataLoader([(torch.ones(2),), (torch.ones(3),)], batch_size=2)
    with pytest.raises(CollateError) as caught:
        next(iter(loader))
    assert caught.value.failure is not None
    assert "in default_collate" in caught.value.failure.traceback
    with pytest.raises(RuntimeError) as theirs:
        default_collate(loader.dataset)
    assert str(theirs.value) in str(caught.value)


class Stock:
    """What our fetcher takes over from torch's."""

    auto_collation = True

    def __init__(self, collate_fn: Any) -> None:
        self.collate_fn = collate_fn


def test_it_is_for_default_collate_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(stacking, "collated_here", tried.append)
    samples = [(torch.ones(2),)] * 2
    collation_by(Stock(default_collate))(samples)
    assert tried == [samples]
    collation_by(Stock(lambda batch: default_collate(batch)))(samples)
    assert tried == [samples]


class Costly:
    """Samples that take as long, by the clock of the fetcher, as they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000
        self.costs: dict[int, int] = {}
        self.failing: dict[int, Exception] = {}
        for module in (first_samples, mapping, recording):
            monkeypatch.setattr(module, "clock", lambda: self.now)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        self.now += self.costs.get(index, 100)
        if index in self.failing:
            raise self.failing[index]
        return index


def test_cheap_samples_are_timed_together_until_a_batch_is_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = Costly(monkeypatch)
    dataset.costs = {0: 300, 4: 300, 7: 9_000, 9: 300}
    loader = SafeDataLoader(dataset, batch_size=3)
    times = []
    for _ in loader:
        assert loader.last_batch is not None
        times.append(list(loader.last_batch.fetch_ns))
    apart, together, slow, apart_again = times
    assert apart == [300, 100, 100]  # how cheap they are is not known yet
    assert together == [sum(together) / 3] * 3
    assert slow == [sum(slow) / 3] * 3
    assert sum(slow) > 9_000
    assert apart_again == [300, 100, 100]


def test_a_sample_that_cheap_ones_hid_is_found_when_it_comes_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = Costly(monkeypatch)
    dataset.costs = {7: 20_000_000}
    loader = SafeDataLoader(dataset, batch_size=3)
    for _ in range(3):
        list(loader)
    slowest = loader.provenance.slowest(1)[0]
    assert (slowest.index, slowest.median_ns, slowest.times) == (7, 20_000_000, 3)


@pytest.mark.parametrize("error", [ValueError("x"), StopIteration("x")])
def test_which_of_the_cheap_samples_fails_is_told(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    dataset = Costly(monkeypatch)
    dataset.failing[7] = error
    with pytest.raises(SampleError) as caught:
        list(SafeDataLoader(dataset, batch_size=3))
    failure = caught.value.failure
    assert (failure.index, failure.position, failure.batch) == (7, 1, 2)
    assert failure.exception_type.endswith(type(error).__name__)


def test_a_stop_iteration_is_told_of_samples_timed_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stops(list[int]):
        def __getitem__(self, index: Any) -> Any:
            if index == 9:
                raise StopIteration("no more")
            return super().__getitem__(index)

    monkeypatch.setattr(mapping, "_CHEAP_NS", 1 << 40)
    with pytest.raises(SampleError, match="no more") as raised:
        list(SafeDataLoader(Stops(range(16)), 4, trace=False))
    assert raised.value.index == 9
