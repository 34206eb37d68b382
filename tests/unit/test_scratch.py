"""What of a dataset is scratch, by its byte code: written before it is read, each time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from safeloader.introspect.byte_code import overwrites
from safeloader.introspect.stored_elements import stores_of

N = 4


def plain(self: Any, i: int) -> Any:
    self.buffer[i] = self.data[i] * 2
    return self.buffer[i]


def behind_a_guard(self: Any, i: int) -> Any:
    if i >= N:
        raise IndexError(i)
    self.buffer[i] = self.data[i]
    return torch.from_numpy(self.buffer[i].copy())


def a_slice(self: Any, i: int) -> Any:
    self.buffer[:2] = self.data[i]
    return self.buffer[:2].sum()


def of_zeros_then_counted(self: Any, i: int) -> Any:
    self.buffer[...] = 0
    self.buffer[i] += 1
    return self.buffer


def by_a_method(self: Any, i: int) -> Any:
    self.buffer[i].copy_(self.data[i])
    return self.buffer[i]


def under_another_name(self: Any, i: int) -> Any:
    buffer = self.buffer
    buffer[:] = 0
    return buffer[i]


def of_what_was_tried(self: Any, i: int) -> Any:
    try:
        value = self.data[i]
    except KeyError:
        value = 0
    self.buffer[i] = value if i else None
    return self.buffer[i]


def under_a_lock(self: Any, i: int) -> Any:
    with self.lock:
        self.buffer[i] = self.data[i]
        return self.buffer[i]


def counted_up(self: Any, i: int) -> Any:
    self.buffer[i] += 1
    return self.buffer[i]


def of_itself(self: Any, i: int) -> Any:
    self.buffer[i] = self.buffer[i] * 2
    return self.buffer[i]


def masked(self: Any, i: int) -> Any:
    self.buffer[i, 2:4] = 0
    return self.buffer[i]


def masked_row(self: Any, i: int) -> Any:
    self.buffer[i][2:4] = 0
    return self.buffer[i]


def masked_where(self: Any, i: int) -> Any:
    row = self.buffer[i]
    row[row > 1] = 0
    return row


def at_random(self: Any, i: int) -> Any:
    if random.random() < 0.5:
        self.buffer[i] = 0
    return self.buffer[i]


def multiplied(self: Any, i: int) -> Any:
    return self.buffer[i].mul_(2)


def a_part_by_a_method(self: Any, i: int) -> Any:
    self.buffer[i, 2:4].zero_()
    return self.buffer[i]


def a_cache(self: Any, i: int) -> Any:
    if self.buffer[i] is None:
        self.buffer[i] = self.data[i]
    return self.buffer[i]


def given_away_first(self: Any, i: int) -> Any:
    self.buffer[i] = sum(self.buffer, i)
    return self.buffer[i]


SCRATCH = [
    plain,
    behind_a_guard,
    a_slice,
    of_zeros_then_counted,
    by_a_method,
    under_another_name,
    of_what_was_tried,
    under_a_lock,
]
DATA = [
    counted_up,
    of_itself,
    masked,
    masked_row,
    masked_where,
    at_random,
    multiplied,
    a_part_by_a_method,
    a_cache,
    given_away_first,
]


def dataset_of(getitem: Callable[[Any, int], Any], **more: Any) -> Any:
    made: Any = type("Made", (), {"__module__": __name__, "__getitem__": getitem, **more})()
    made.buffer, made.data = np.ones((N, 4)), np.ones((N, 4))
    return made


@pytest.mark.parametrize("getitem", SCRATCH)
def test_what_is_written_before_it_is_read_is_scratch(getitem: Any) -> None:
    dataset = dataset_of(getitem)
    assert overwrites(dataset, "buffer")
    assert "dataset.buffer" not in [store.path for store in stores_of(dataset, N)]


@pytest.mark.parametrize("getitem", DATA)
def test_what_is_read_first_or_written_in_part_is_data(getitem: Any) -> None:
    dataset = dataset_of(getitem)
    assert not overwrites(dataset, "buffer")
    assert "dataset.buffer" in [store.path for store in stores_of(dataset, N)]


def test_what_another_method_reads_is_data() -> None:
    def load(self: Any, i: int) -> Any:
        return self.buffer[i]

    def loaded(self: Any, i: int) -> Any:
        self.buffer[i] = self.load(i) * 2
        return self.load(i)

    assert not overwrites(dataset_of(loaded, load=load), "buffer")
    assert not overwrites(dataset_of(plain), "nothing")
