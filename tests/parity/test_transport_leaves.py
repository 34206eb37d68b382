"""Every kind of leaf as the stock loader delivers it: every bit and stride, and what is shared."""

from __future__ import annotations

import functools
import gc
import warnings
from typing import Any

import pytest
from torch.utils.data import DataLoader

from safeloader import SafeDataLoader
from tests.leaf_kinds import KINDS
from tests.oracle import seed_all
from tests.telling import after_changes, told

SMALL, LARGE = 4, 3000


class Zoo:
    """A kind of leaf an index."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return len(KINDS)

    def __getitem__(self, index: int) -> Any:
        return list(KINDS.values())[index](self.n)


def as_it_is(sample: Any) -> Any:
    return sample


def observed(loader: Any) -> dict[str, Any]:
    """What came of each kind: all there is to tell about it, or the error."""
    seed_all(3)
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = iter(loader)
        for name in KINDS:
            try:
                batch = next(batches)
            except Exception as exc:
                found[name] = error_of(exc)
                continue
            found[name] = told(batch), after_changes(batch)
    return found


def error_of(exc: Exception) -> Any:
    kinds = {each.__name__ for each in type(exc).__mro__ if each.__module__ == "builtins"}
    return kinds - {"object"}


@functools.cache
def stock(n: int) -> dict[str, Any]:
    found = observed(DataLoader(Zoo(n), batch_size=None, collate_fn=as_it_is, num_workers=1))
    gc.collect()
    return found


WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "checked": {"checksum": True},
    "torch": {"transport": "torch", "checksum": True},
}


# Torch's own way drops the mark of these views, so other numbers arrive; a checksum says so.
WRONG_IN_TORCH = {"conjugate", "negative"}


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("way", WAYS)
def test_every_kind_of_leaf_arrives_as_with_the_stock_loader(way: str, n: int) -> None:
    common: dict[str, Any] = {"batch_size": None, "collate_fn": as_it_is, "num_workers": 1}
    ours = observed(SafeDataLoader(Zoo(n), **common, **WAYS[way]))
    expected = stock(n)
    different = {name for name in KINDS if ours[name] != expected[name]}
    assert different == (WRONG_IN_TORCH if "checksum" in WAYS[way] else set())
    for name in different:
        assert ours[name] == {"Exception", "BaseException"}, "a TransportError, and no other"
