"""Batches of a TensorDataset that are gathered at once, against the stock loader's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from safeloader import SafeDataLoader
from safeloader.delivery.indices import pack
from safeloader.worker import mapping, tensor_columns
from safeloader.worker.tensor_columns import columns_of

MANY = 2000  # samples: the first of an epoch are looked at one by one
DTYPES = [torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.complex64, torch.uint8]


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each batch that could be was gathered at once."""
    told: list[bool] = []
    real = tensor_columns.columns_of

    def watched(dataset: Any, collate_fn: Any) -> Any:
        gather = real(dataset, collate_fn)
        if gather is None:
            return None

        def telling(*about: Any) -> Any:
            batch = gather(*about)
            told.append(batch is not None)
            return batch

        return telling

    monkeypatch.setattr(mapping, "columns_of", watched)
    return told


def facts(batch: list[torch.Tensor]) -> Any:
    """All that can be told of a batch: bits, strides, flags."""
    assert type(batch) is list
    return [
        (
            type(each),
            each.dtype,
            each.shape,
            each.stride(),
            each.storage_offset(),
            each.requires_grad,
            each.is_conj(),
            each.is_neg(),
            each.resolve_conj().resolve_neg().contiguous().view(torch.uint8).numpy().tobytes()
            if each.dim()
            else each.item(),
        )
        for each in batch
    ]


def both(dataset: Any, **kwargs: Any) -> tuple[list[Any], list[Any]]:
    """What each loader gives, and the state of the generators after it."""
    found = []
    for cls in (DataLoader, SafeDataLoader):
        torch.manual_seed(3)
        batches: list[Any] = [facts(batch) for batch in cls(dataset, **kwargs)]
        found.append([*batches, torch.get_rng_state().tolist()])
    return found[0], found[1]


def tensor(number: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    numbers = np.random.default_rng(number).integers(0, 200, (number, *shape))
    return torch.from_numpy(numbers).to(dtype)


@given(
    number=st.integers(1, 12),
    columns=st.lists(
        st.tuples(st.lists(st.integers(0, 3), max_size=4).map(tuple), st.sampled_from(DTYPES)),
        min_size=1,
        max_size=3,
    ),
    turned=st.booleans(),
    subset=st.booleans(),
    data=st.data(),
)
@pytest.mark.hypothesis
def test_a_batch_is_the_stock_loaders_bit_for_bit(
    number: int, columns: Any, turned: bool, subset: bool, data: Any
) -> None:
    tensors = [tensor(number, shape, dtype) for shape, dtype in columns]
    if turned:  # the strides of its rows are others
        tensors = [each.transpose(0, -1).contiguous().transpose(0, -1) for each in tensors]
    dataset: Any = TensorDataset(*tensors)
    if subset:
        dataset = Subset(dataset, [k % number for k in range(3, number + 5)])
    drawn = data.draw(st.lists(st.integers(0, len(dataset) - 1), min_size=1, max_size=8))
    gather = columns_of(dataset, default_collate)
    assert gather is not None
    batch = gather(drawn, pack(drawn))
    assert (batch is None) == any(not each.is_contiguous() for each in tensors)
    if batch is not None:
        assert facts(batch) == facts(default_collate([dataset[k] for k in drawn]))


def test_it_is_gathered_at_once_and_said_so(gathered: list[bool]) -> None:
    dataset = TensorDataset(torch.arange(MANY), torch.rand(MANY, 3))
    loader = SafeDataLoader(dataset, 4, shuffle=True)
    assert len(list(loader)) == MANY // 4
    assert gathered[-10:] == [True] * 10  # the first batches are looked at sample by sample
    assert loader.audit.ok
    record = loader.last_batch
    assert record is not None
    assert max(record.fetch_ns) - min(record.fetch_ns) <= 1  # equal shares
    list(SafeDataLoader(Subset(dataset, [*range(MANY)]), 4))
    assert gathered[-10:] == [True] * 10


def negative(dataset: TensorDataset) -> dict[str, Any]:
    return {"sampler": [-1, 2, -3, 4]}


def numpy_ints(dataset: TensorDataset) -> dict[str, Any]:
    return {"sampler": [np.int64(1), np.int64(2)]}


def booleans(dataset: TensorDataset) -> dict[str, Any]:
    return {"sampler": [True, True]}


def custom(dataset: TensorDataset) -> dict[str, Any]:
    return {"collate_fn": lambda samples: default_collate(samples)}


@pytest.mark.parametrize("how", [negative, numpy_ints, booleans, custom])
def test_what_is_drawn_or_collated_otherwise_is_made_as_torch_does(
    how: Callable[[TensorDataset], dict[str, Any]], gathered: list[bool]
) -> None:
    dataset = TensorDataset(torch.arange(6.0), torch.eye(6))
    stock, ours = both(dataset, batch_size=2, **how(dataset))
    assert stock == ours
    assert not any(gathered)


class Named(torch.Tensor):
    pass


class Watched(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        return tuple(each + 1 for each in super().__getitem__(index))


ODD = {
    "gradients": lambda: TensorDataset(torch.ones(6, 2, requires_grad=True)),
    "a subclass of Tensor": lambda: TensorDataset(torch.ones(6, 2).as_subclass(Named)),
    "conjugated": lambda: TensorDataset(torch.ones(6, 2, dtype=torch.complex64).conj()),
    "transposed": lambda: TensorDataset(torch.arange(12.0).reshape(2, 6).t()),
    "a subclass of TensorDataset": lambda: Watched(torch.ones(6, 2)),
    "a Subset by an array": lambda: Subset(TensorDataset(torch.ones(6)), np.arange(4)),  # type: ignore[arg-type]
    "a Subset of negative ones": lambda: Subset(TensorDataset(torch.arange(6)), [-1, -2, 0, -3]),
}


def answering_itself() -> Any:
    subset = Subset(TensorDataset(torch.arange(6.0)), [5, 4, 3, 2])
    subset.__getitems__ = lambda asked: [(torch.tensor(-k),) for k in asked]  # type: ignore[method-assign]
    return subset


ODD["a Subset with a method of its own"] = answering_itself


@pytest.mark.parametrize("name", ODD)
def test_what_is_not_plain_is_made_as_torch_does(name: str, gathered: list[bool]) -> None:
    stock, ours = both(ODD[name](), batch_size=2)
    assert stock == ours
    assert not any(gathered)


class Negated(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        return tuple(-each for each in super().__getitem__(index))


CHANGES: dict[str, Callable[[Any], object]] = {
    "of another": lambda subset: setattr(
        subset, "dataset", TensorDataset(torch.arange(MANY, 2 * MANY))
    ),
    "of no tensors": lambda subset: setattr(subset, "dataset", [(k + 7,) for k in range(MANY)]),
    "another class": lambda subset: setattr(subset.dataset, "__class__", Negated),
    "in one call": lambda subset: setattr(
        subset.dataset, "__getitems__", lambda asked: [(-k,) for k in asked]
    ),
    "a call of its own": lambda subset: setattr(
        subset, "__getitems__", lambda asked: [(-k,) for k in asked]
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_dataset_that_becomes_another_is_seen_at_once(name: str, gathered: list[bool]) -> None:
    def epoch(cls: Any) -> list[Any]:
        subset, made = Subset(TensorDataset(torch.arange(MANY)), [*range(MANY)]), []
        for number, (batch,) in enumerate(cls(subset, 50)):
            made.append(batch.tolist())
            if number == MANY // 50 - 3:
                CHANGES[name](subset)
        return made

    assert epoch(SafeDataLoader) == epoch(DataLoader)
    assert gathered[0] or gathered[-3]


def test_what_changes_in_the_midst_of_an_epoch_is_seen(gathered: list[bool]) -> None:
    dataset = TensorDataset(torch.arange(float(MANY)))
    told = []
    for number, (batch,) in enumerate(SafeDataLoader(dataset, MANY // 100)):
        told.append(batch.requires_grad)
        if number == 97:
            dataset.tensors = (torch.arange(float(MANY), requires_grad=True),)
    assert told[-4:] == [False, False, True, True]
    assert gathered[-4:] == [True, True, False, False]


class CountsFunctions(TorchFunctionMode):
    calls = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        CountsFunctions.calls += function is torch.stack
        return function(*args, **(kwargs or {}))


class CountsCalls(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        CountsCalls.calls += "stack" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [CountsFunctions, CountsCalls])
def test_a_mode_that_watches_calls_sees_those_of_torch(mode: Any) -> None:
    loader = SafeDataLoader(TensorDataset(torch.arange(MANY)), 4)
    mode.calls = 0
    with mode():
        list(loader)
    assert mode.calls == MANY // 4


def test_a_method_that_somebody_put_in_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    real = TensorDataset.__getitem__
    monkeypatch.setattr(
        TensorDataset, "__getitem__", lambda self, k: tuple(-x for x in real(self, k))
    )
    (batch,) = next(iter(SafeDataLoader(TensorDataset(torch.arange(3.0)), 3)))
    assert batch.tolist() == [0, -1, -2]


def test_what_is_registered_for_tensors_collates_them(monkeypatch: pytest.MonkeyPatch) -> None:
    collate: Any = torch.utils.data._utils.collate  # type: ignore[attr-defined]
    monkeypatch.setitem(
        collate.default_collate_fn_map, torch.Tensor, lambda batch, **more: sum(batch)
    )
    loader = SafeDataLoader(TensorDataset(torch.arange(3.0)), 3)
    list(loader)
    assert [float(batch[0]) for batch in loader] == [3.0]


def test_an_index_outside_fails_as_it_does_sample_by_sample(gathered: list[bool]) -> None:
    drawn = [*range(MANY), MANY + 9]
    loader = SafeDataLoader(TensorDataset(torch.arange(MANY)), 2, sampler=drawn)
    with pytest.raises(IndexError, match=f"index {MANY + 9}"):
        list(loader)
    assert gathered[-2:] == [True, False]


@pytest.mark.parametrize(
    "extra", [{"key": lambda sample: float(sample[0])}, {"trace": True}, {"seed": 3}]
)
def test_who_asks_for_each_sample_gets_each(extra: dict[str, Any], gathered: list[bool]) -> None:
    list(SafeDataLoader(TensorDataset(torch.arange(MANY)), 4, **extra))
    assert not gathered
