"""Tuples of tensors are collated as ``default_collate`` does it, or left to it."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from safeloader import CollateError, SafeDataLoader
from safeloader.worker import stacking
from safeloader.worker.stacking import collation_by, stacked
from tests.oracle import plain

Pair = namedtuple("Pair", "x y")


class Sub(torch.Tensor):
    pass


def same_as_default(samples: Any) -> None:
    came = stacked(samples)
    assert came is not None
    assert plain(came) == plain(default_collate(samples))


def test_what_it_collates_is_as_default_collate_has_it() -> None:
    rows = TensorDataset(torch.arange(6.0).view(3, 2), torch.arange(3))
    same_as_default([rows[k] for k in range(3)])
    same_as_default([(torch.tensor(1.0),), (torch.tensor(2),)])
    same_as_default([(), ()])
    same_as_default([(torch.ones(2), torch.zeros(0))] * 2)
    same_as_default([(torch.ones(2, requires_grad=True),)] * 2)
    last = torch.ones(1, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    same_as_default([(last[0],)] * 3)


@pytest.mark.parametrize(
    "samples",
    [
        [],
        torch.ones(3, 2),
        [torch.ones(2)],
        [[torch.ones(2)]],
        [Pair(torch.ones(2), torch.ones(2))],
        [(torch.ones(2), 1)],
        [(torch.ones(2).as_subclass(Sub),)],
        [(torch.eye(2).to_sparse(),)],
        [(torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),)],
        [(torch.ones(2),), (torch.ones(2), torch.ones(2))],
        [(torch.ones(2),), (torch.ones(3),)],
        [(torch.ones(2),), (None,)],
    ],
)
def test_what_it_leaves_alone(samples: Any) -> None:
    assert stacked(samples) is None


def test_the_functions_that_a_user_registers_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [(torch.ones(2),)] * 2
    for kind in (torch.Tensor, tuple):
        with monkeypatch.context() as patch:
            patch.setitem(default_collate_fn_map, kind, lambda batch, **_: "mine")
            assert stacked(samples) is None
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
    monkeypatch.setattr(stacking, "stacked", tried.append)
    samples = [(torch.ones(2),)] * 2
    collation_by(Stock(default_collate))(samples)
    assert tried == [samples]
    collation_by(Stock(lambda batch: default_collate(batch)))(samples)
    assert tried == [samples]
