"""The marks are what the generators' own functions say, whatever was drawn in between."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from safeloader.introspect import random_state
from safeloader.introspect.generator_kinds import state_of
from safeloader.introspect.random_state import Apart, Marks, RandomState, preserved

DRAWS: dict[str, Callable[[], Any]] = {
    "random": random.random,
    "gauss": lambda: random.gauss(0, 1),
    "getrandbits": lambda: random.getrandbits(1),
    "many": lambda: [random.getrandbits(32) for _ in range(624)],
    "shuffle": lambda: random.shuffle(list(range(9))),
    "seed": lambda: random.seed(random.getrandbits(20)),
    "numpy": np.random.rand,
    "numpy normal": np.random.randn,
    "numpy legacy normal": lambda: np.random.standard_normal(1),
    "numpy many": lambda: np.random.randint(0, 2**32, 624, dtype=np.uint32),
    "numpy permutation": lambda: np.random.permutation(5),
    "numpy seed": lambda: np.random.seed(np.random.randint(0, 99)),
    "torch": lambda: torch.rand(1),
    "torch normal": lambda: torch.randn(3),
    "torch seed": lambda: torch.manual_seed(random.getrandbits(8)),
    "none": lambda: None,
}
sequences = st.lists(st.sampled_from(sorted(DRAWS)) | st.just("mark"), max_size=30)


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    with preserved():
        yield


def marked(marks: Marks) -> RandomState:
    return RandomState(*marks.mark())


def plain(state: RandomState) -> Any:
    numpy = dict(state.numpy)
    inner = {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in numpy.pop("state").items()
    }
    return state.python, inner, numpy, state.torch.tolist()


def follow(sequence: list[str]) -> None:
    marks = Marks()
    with preserved():
        for step in [*sequence, "mark"]:
            if step == "mark":
                assert plain(marked(marks)) == plain(RandomState.now())
            else:
                DRAWS[step]()


@settings(deadline=None)
@given(sequences)
def test_marks_are_the_state(sequence: list[str]) -> None:
    follow(sequence)


def test_a_mark_after_every_draw_there_is() -> None:
    for first in DRAWS:
        for second in DRAWS:
            follow(["mark", first, "mark", second, "mark"])


@pytest.mark.parametrize("which", ["python", "numpy"])
def test_a_state_put_back_with_a_kept_gaussian(which: str) -> None:
    marks = Marks()
    gauss = DRAWS["gauss" if which == "python" else "numpy normal"]
    gauss()
    kept = RandomState.now()
    gauss()
    marks.mark()
    kept.set()
    assert plain(marked(marks)) == plain(RandomState.now())


def test_a_gaussian_that_the_program_puts_back_is_preserved() -> None:
    """Its state differs from the one that was read in nothing else."""
    random.seed(0)
    random.gauss(0, 1)
    kept = random.getstate()
    wanted = random.gauss(0, 1)
    with preserved():
        pass
    random.setstate(kept)
    with preserved():
        assert random.gauss(0, 1) == wanted
    assert random.gauss(0, 1) == wanted


def test_apart_puts_back_a_kept_gaussian_that_was_used_meanwhile() -> None:
    apart, marks = Apart(), Marks()
    random.gauss(0, 1)
    before = plain(RandomState.now())
    kept = apart.keep()
    random.gauss(0, 1)
    marks.mark()
    apart.put_back(kept)
    assert plain(marked(marks)) == plain(RandomState.now()) == before


class Calls(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{function} was called")


def test_a_mode_that_watches_calls_sees_none_of_ours() -> None:
    before = plain(RandomState.now())
    with Calls(), preserved():
        random.random()
    assert plain(RandomState.now()) == before


def test_the_fast_path_is_on_here() -> None:
    marks = Marks()
    marks.mark()
    assert marks._python.words is not None
    assert marks._numpy.words is not None


def test_nothing_moved_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = Marks()
    random.seed(3)
    np.random.seed(3)
    first = marked(marks)
    monkeypatch.setattr(np.random, "get_state", None)
    again = marked(marks)
    assert again.python is first.python
    assert again.numpy is first.numpy


@pytest.mark.parametrize("sequence", [["mark", "random", "mark", "gauss", "mark", "many"]])
def test_without_the_fast_path(sequence: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_state, "_python_address", lambda getstate: 0)
    assert Marks()._python.words is None
    follow(sequence)


def test_another_memory_layout_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "getstate", lambda: (3, tuple(range(625)), None))
    assert random_state._python_address(random.getstate) == 0
    monkeypatch.setattr(random, "getstate", random.Random(5).getstate)
    # It is looked for in the object that is asked.
    assert random_state._python_address(random.getstate) != 0


@pytest.mark.parametrize("make", [np.random.PCG64, np.random.Philox, np.random.MT19937])
def test_another_generator_under_numpys_functions(make: Any) -> None:
    before = np.random.get_bit_generator()
    marks = Marks()
    marks.mark()
    try:
        np.random.set_bit_generator(make(5))
        for _ in range(3):
            state = marked(marks)
            first = np.random.rand(), np.random.randn()
            state.set()
            assert (np.random.rand(), np.random.randn()) == first
    finally:
        np.random.set_bit_generator(before)
    assert plain(marked(marks)) == plain(RandomState.now())


@given(sequences)
@settings(deadline=None, max_examples=30)
def test_a_mark_brings_the_numbers_back(sequence: list[str]) -> None:
    with preserved():
        for step in sequence:
            DRAWS.get(step, DRAWS["none"])()
        state = marked(Marks())
        drawn = [(random.gauss(0, 1), np.random.randn(), float(torch.rand(()))) for _ in range(3)]
        state.set()
        again = [(random.gauss(0, 1), np.random.randn(), float(torch.rand(()))) for _ in range(3)]
        assert again == drawn


def test_preserved_also_when_it_raises() -> None:
    def fails() -> None:
        with preserved():
            for draw in DRAWS.values():
                draw()
            raise KeyError

    before = plain(RandomState.now())
    with pytest.raises(KeyError):
        fails()
    assert plain(RandomState.now()) == before


def test_marks_survive_an_interrupt_in_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = Marks()

    def struck(self: Any, *arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(random_state._Watched, "__init__", struck)
        with pytest.raises(KeyboardInterrupt):
            marks.mark()
    before = RandomState(*marks.mark())
    first = np.random.rand()
    before.set()
    assert np.random.rand() == first


def test_a_time_limit_that_strikes_while_a_state_is_read_is_raised() -> None:
    class Struck(random.Random):
        def getstate(self) -> Any:
            signal.raise_signal(signal.SIGUSR1)
            return super().getstate()

    def too_long(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGUSR1, too_long)
    try:
        with pytest.raises(TimeoutError):
            state_of(Struck())
    finally:
        signal.signal(signal.SIGUSR1, before)
