"""The numbers that are made from a seed: the same anywhere, others for each purpose."""

from __future__ import annotations

import dataclasses
import enum
import os
import pickle
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safeloader import sample_rng
from safeloader.introspect import random_state
from safeloader.introspect.random_state import Apart
from safeloader.introspect.seeds import (
    EpochSeed,
    Seeder,
    bytes_of,
    sample_is,
    sample_now,
)
from tests.oracle import numbers, rng_state


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Place:
    file: str
    line: int


class Plain:
    """Has no equality of its own, and its address in its text."""

    def __init__(self, number: int) -> None:
        self.number = number


@pytest.fixture(autouse=True)
def _generators_as_they_were() -> Any:
    with random_state.preserved():
        yield
    sample_is(None)


# ── what stands for an index ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (3, np.int64(3)),
        (3, torch.tensor(3)),
        ([1, 2], torch.tensor([1, 2])),
        ((1, "a"), [np.int32(1), "a"]),
        (Place("a.jpg", 3), Place("a.jpg", 3)),
        (Plain(2), Plain(2)),
        (Colour.RED, Colour.RED),
    ],
)
def test_equal_indices_have_equal_bytes_also_behind_a_pickle(one: Any, other: Any) -> None:
    assert bytes_of(one) == bytes_of(other) == bytes_of(pickle.loads(pickle.dumps(one)))


def test_different_indices_have_different_bytes() -> None:
    different = [3, -3, "3", b"3", 3.5, None, (3,), (3, 3), ("3",), {"a": 1}, {"a": 2}]
    different += [slice(1, 2), slice(1, 3), Colour.RED, Place("a", 1), Place("a", 2), Plain(1)]
    assert len(set(map(bytes_of, different))) == len(different)


def test_bytes_are_the_same_in_another_process() -> None:
    """Where texts are hashed to other numbers, and a script's classes are in ``__mp_main__``."""
    program = (
        "class Plain:\n  def __init__(self): self.number = 2\n"
        "Plain.__module__ = __name__ = {!r}\n"
        "import sys; sys.modules[__name__] = sys.modules['__main__']\n"
        "from safeloader.introspect.seeds import bytes_of\n"
        "print(bytes_of((frozenset('abcdef'), Plain())))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program.format(name)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for name, seed in (("__main__", "1"), ("__mp_main__", "2"))
    }
    assert len(said) == 1


def test_an_index_that_cannot_be_pickled_stands_for_its_class() -> None:
    assert bytes_of(lambda: None) == b"function"


# ── the numbers ──────────────────────────────────────────────────────────────────────────────────


def under(per: Any, seed: int, epoch: int, batch: bytes, index: Any) -> list[float]:
    seeder = Seeder(per)
    seeder.begin(seed, epoch)
    seeder.batch(batch)
    seeder.sample(index)
    return [*numbers(), float(sample_rng().random())]


def test_each_sample_has_numbers_of_its_own_by_seed_epoch_and_index() -> None:
    assert under("sample", 1, 0, b"0", 5) == under("sample", 1, 0, b"7", np.int64(5))
    ways = [(1, 0, b"0", 5), (2, 0, b"0", 5), (1, 1, b"0", 5), (1, 0, b"0", 6), (1, 0, b"0", "5")]
    columns = zip(*(under("sample", *way) for way in ways), strict=True)
    assert all(len(set(column)) == len(ways) for column in columns)


def test_each_batch_has_numbers_of_its_own_by_seed_epoch_and_batch() -> None:
    one = under("batch", 1, 0, b"0", 5)
    assert one[:-1] == under("batch", 1, 0, b"0", 6)[:-1]
    assert one[-1] != under("batch", 1, 0, b"0", 6)[-1]  # of the sample, whatever is seeded
    assert one[-1] == under("sample", 1, 0, b"3", 5)[-1]
    for other in ((2, 0, b"0"), (1, 1, b"0"), (1, 0, b"1")):
        assert not {*one[:-1]} & {*under("batch", *other, 5)[:-1]}


def test_a_sample_its_collation_and_a_stream_of_one_number_differ() -> None:
    seeder = Seeder("sample")
    seeder.begin(1, 0)
    seeder.batch(b"3")
    came = []
    for begins in (lambda: seeder.sample(3), seeder.collation, lambda: seeder.stream(3)):
        begins()
        came.append(tuple(numbers()))
    assert len({*came}) == len({each[0] for each in came}) == 3
    seeder.before_collation(lambda samples: came.append(tuple(numbers())))([])
    assert came[-1] == came[1]


def test_batches_of_two_ranks_differ_and_those_of_rank_0_are_as_without() -> None:
    of = [EpochSeed(1, 0, rank=rank).of_batch(5).bytes for rank in (0, 1, 2)]
    assert len({*of}) == 3
    assert of[0] == b"5"


def test_the_numbers_are_those_of_any_process() -> None:
    program = (
        "import random, numpy, torch\n"
        "from safeloader.introspect.seeds import EpochSeed, Seeder, sample_rng\n"
        "seeder = Seeder('sample'); seeder.begin(11, 2); seeder.sample(('a', 3))\n"
        "print(random.getrandbits(64), numpy.random.randint(2**31))\n"
        "print(torch.randint(2**31, ()).item(), sample_rng().bit_generator.random_raw())\n"
        "print(EpochSeed(11, 2).order())"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    told = "8987389897714229363 486274683 1975091937 "
    told += "16675053482200750520 4897753673445601324"
    assert out.stdout.split() == told.split(), out.stderr


@given(st.lists(st.integers(0, 1 << 70), min_size=2, max_size=2, unique=True))
def test_any_two_seeds_differ(seeds: list[int]) -> None:
    one, other = (EpochSeed(seed, 3) for seed in seeds)
    assert one.key != other.key
    assert one.order() != other.order()


def test_a_seeder_goes_to_a_worker_by_pickle() -> None:
    seeder = Seeder("batch")
    seeder.begin(1, 2)
    assert pickle.loads(pickle.dumps(seeder)).per == "batch"


class Odd(np.random.PCG64):
    """Cannot be made from a seed."""

    def __init__(self) -> None:
        super().__init__(1)


@pytest.mark.parametrize(("kind", "is_seeded"), [(np.random.PCG64, True), (Odd, False)])
def test_another_generator_in_the_place_of_numpys(kind: type, is_seeded: bool) -> None:
    before = np.random.get_bit_generator()  # type: ignore[attr-defined]
    np.random.set_bit_generator(kind())  # type: ignore[attr-defined]
    try:
        apart = Apart()
        held = apart.keep()
        first = under("sample", 1, 0, b"0", 5)
        again = under("sample", 1, 0, b"0", 5)
        assert first[:2] == again[:2]
        assert (first[2] == again[2]) == is_seeded
        after = np.random.get_state(legacy=False)["state"]
        apart.put_back(held)
        assert np.random.get_state(legacy=False)["state"] != after
    finally:
        np.random.set_bit_generator(before)  # type: ignore[attr-defined]


# ── a sample's own generator ─────────────────────────────────────────────────────────────────────


def test_a_generator_belongs_to_a_sample() -> None:
    seeder = Seeder("sample")
    seeder.begin(1, 0)
    seeder.batch(b"0")
    for begins in (lambda: None, seeder.collation, lambda: seeder.stream(0)):
        begins()
        with pytest.raises(RuntimeError, match="belongs to a sample"):
            sample_rng()
    seeder.sample(4)
    assert sample_rng().integers(1 << 62) == sample_rng().integers(1 << 62)
    held = sample_now()
    seeder.sample(5)
    other = sample_rng().integers(1 << 62)
    sample_is(held)
    assert sample_rng().integers(1 << 62) != other


# ── generators that stand apart ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("known", [True, False], ids=["by memory", "by functions"])
@pytest.mark.parametrize("kept", ["", "python", "numpy", "both"])
def test_generators_are_put_back_with_their_kept_gaussians(
    known: bool, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        monkeypatch.setattr(random_state, "_python_address", lambda getstate: 0)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    apart, seeder = Apart(), Seeder("sample")
    seeder.begin(1, 0)
    for draws in (0, 1, 2):  # odd numbers of Gaussians leave one for the next call
        if kept in ("python", "both"):
            random.gauss(0, 1)
        if kept in ("numpy", "both"):
            np.random.randn()
        torch.randn(1)
        before = rng_state()
        held = apart.keep()
        seeder.sample(draws)
        for _ in range(draws):
            random.gauss(0, 1), np.random.randn(), torch.randn(1)
        assert rng_state() != before
        apart.put_back(held)
        assert rng_state() == before


def test_an_interrupt_while_they_are_put_back_is_raised_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    np.random.seed(0)  # without a kept Gaussian, which an earlier test may have left
    apart = Apart()
    before = rng_state()
    held = apart.keep()
    numbers()
    struck = [KeyboardInterrupt()]
    seed = np.random.seed

    def strikes(number: int) -> None:
        seed(number)
        if struck:
            raise struck.pop()

    monkeypatch.setattr(np.random, "seed", strikes)
    with pytest.raises(KeyboardInterrupt):
        apart.put_back(held)
    assert rng_state() == before


def test_a_generator_that_took_numpys_place_meanwhile_stays() -> None:
    before = np.random.get_bit_generator()  # type: ignore[attr-defined]
    apart = Apart()
    held = apart.keep()
    new = np.random.PCG64(1)
    np.random.set_bit_generator(new)  # type: ignore[attr-defined]
    try:
        apart.put_back(held)
        assert np.random.get_bit_generator() is new  # type: ignore[attr-defined]
    finally:
        np.random.set_bit_generator(before)  # type: ignore[attr-defined]
