"""Over the space of modes: equal to the stock loader, and every index accounted for."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from safeloader import SafeDataLoader
from tests.oracle import plain, rng_state, seed_all
from tests.strategies import make_loader, modes

LENIENT = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


def observe(loader: Any, leave_after: int | None) -> list[Any]:
    seen: list[Any] = []
    for _ in range(2):
        iterator = iter(loader)
        seen.append([plain(batch) for batch in itertools.islice(iterator, leave_after)])
        del iterator
        seen.append(rng_state())
    return seen


def check_parity(mode: dict[str, Any]) -> None:
    seed_all(5)
    expected = observe(make_loader(DataLoader, mode), mode["leave_after"])
    seed_all(5)
    assert observe(make_loader(SafeDataLoader, mode), mode["leave_after"]) == expected


@settings(max_examples=150, **LENIENT)
@given(modes(workers=st.just(0)))
def test_main_process_equals_stock(mode: dict[str, Any]) -> None:
    check_parity(mode)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=40, **LENIENT)
@given(modes(workers=st.integers(1, 3)))
def test_workers_equal_stock(mode: dict[str, Any]) -> None:
    check_parity(mode)


def check_accounts(mode: dict[str, Any]) -> None:
    """What the table says was delivered is what was drawn and not dropped, and nothing else."""
    seed_all(5)
    loader = make_loader(SafeDataLoader, mode)
    batches = sum(1 for _ in loader)
    audit = loader.audit
    assert audit.ok, str(audit)
    assert audit.complete
    table = loader.provenance.to_numpy()
    assert audit.delivered == len(table)
    assert audit.drawn == audit.delivered + audit.counts["dropped"]
    assert len({(row["epoch"], row["batch"]) for row in table}) == batches
    if table.size and mode["kind"] not in ("stream", "uneven", "pipe"):
        delivered = Counter(table["index"].tolist())
        dropped = Counter(audit.dropped.tolist())
        drawn = delivered + dropped
        assert {index for index, times in drawn.items() if times > 1} == set(
            audit.repeated.tolist()
        )
        assert set(range(mode["length"])) - set(drawn) == set(audit.unvisited.tolist())


@settings(max_examples=150, **LENIENT)
@given(modes(workers=st.just(0)))
def test_main_process_accounts_for_every_index(mode: dict[str, Any]) -> None:
    check_accounts(mode)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=40, **LENIENT)
@given(modes(workers=st.integers(1, 3)))
def test_workers_account_for_every_index(mode: dict[str, Any]) -> None:
    check_accounts(mode)
