"""The global random-number generators of python, numpy and torch. Runs in: both.

:func:`preserved` keeps code that torch would not run from moving them, and :class:`Apart` the
batches that are made here under numbers of their own. :class:`Marks` notes where they stand before
each batch, so that a failing sample can be run again under the numbers it had.

Reading numpy's or python's state through their own functions takes 10 to 25 µs, more than all other
records of a batch. Most datasets use neither, so a few words of their memory are compared with what
they were at the mark before, and the state is read only where it moved.
"""

from __future__ import annotations

import ctypes
import functools
import random
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch

from safeloader._torch import calls_are_watched

_WORDS = 624  # of the Mersenne Twister, which numpy's and python's global generators both are
_BYTES = 4 * (_WORDS + 1)  # the words and the place among them


class RandomState(NamedTuple):
    """Where the three generators stand; picklable."""

    python: Any
    numpy: Any
    torch: Any

    @classmethod
    def now(cls) -> RandomState:
        """As they stand."""
        return cls(random.getstate(), _numpy_state(), torch.get_rng_state())

    def set(self) -> None:
        """Put the generators there."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        _puts[0] += 1


_puts = [0]  # a state put back may differ in a kept Gaussian alone, which marks do not see


class _Preserved:
    # No generator under @contextmanager, which takes as long as all the rest.
    __slots__ = "_marks", "_were"

    def __enter__(self) -> None:
        self._marks = _here.marks
        self._were = self._marks.mark()

    def __exit__(self, *raised: object) -> None:
        python, numpy, torchs = self._were
        now = self._marks.mark()
        moved = now[0] is not python or now[1] is not numpy
        if moved or calls_are_watched() or not torch.equal(now[2], torchs):
            RandomState(python, numpy, torchs).set()


def preserved() -> AbstractContextManager[None, None]:
    """Put the global generators of python, numpy and torch (CPU) back afterwards; 5 µs.

    They are read where their memory moved, and set where something was drawn.
    """
    return _Preserved()


class _Here(threading.local):
    """Of each thread its own: two that read at once would mix what they saw."""

    @functools.cached_property
    def marks(self) -> Marks:
        return Marks()


_here = _Here()


def mark_here() -> tuple[Any, Any, Any]:
    """As :meth:`Marks.mark`; what was read for one epoch serves the next, if nothing moved."""
    return _here.marks.mark()


class Marks:
    """Notes of where the generators stand, made before each batch; hot path, 2 µs.

    Example:
        >>> marks = Marks()
        >>> before = RandomState(*marks.mark())
        >>> first = random.random(), np.random.rand(), torch.rand(())
        >>> before.set()
        >>> (random.random(), np.random.rand(), torch.rand(())) == first
        True
    """

    def __init__(self) -> None:
        address = _python_address(random.getstate)
        shared = getattr(random.getstate, "__self__", None)
        self._python = _Watched(address, random.getstate, lambda state: None, shared)
        self._numpy_generator: Any = None  # the user may put another in its place

    def mark(self) -> tuple[Any, Any, Any]:
        """The fields of a :class:`RandomState`, where they stand."""
        return self._python.now(), self.watch_numpy().now(), torch.default_generator.get_state()

    def watch_numpy(self) -> _Watched:
        """Numpy's, as it is now."""
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if generator is not self._numpy_generator:
            address = generator.ctypes.state_address if type(generator) is np.random.MT19937 else 0
            self._numpy = _Watched(address, _numpy_state, lambda state: state["has_gauss"] or None)
            self._numpy_generator = generator  # last: an interrupt may come before it
        return self._numpy


class Apart:
    """Keeps the generators of a process where they stand while others draw from them; hot path.

    As :func:`preserved`, which reads and sets their states, but by their memory where it is known:
    5 us, and the reading of numpy's state where that moved since the last time.

    Example:
        >>> apart = Apart()
        >>> kept = apart.keep()
        >>> first = random.gauss(0, 1), np.random.randn(), torch.rand(())
        >>> apart.put_back(kept)
        >>> (random.gauss(0, 1), np.random.randn(), torch.rand(())) == first
        True
        >>> apart.put_back(kept)
    """

    def __init__(self) -> None:
        self._marks = Marks()
        self._shared: Any = getattr(random.getstate, "__self__", None)

    def keep(self) -> _Kept:
        """Where they stand."""
        words = None if self._shared is None else self._marks._python.raw
        return _Kept(
            random.getstate() if words is None else self._shared.gauss_next,
            None if words is None else bytes(words),
            *self._keep_numpy(),
            torch.default_generator.get_state(),
        )

    def _keep_numpy(self) -> tuple[Any, Any, bytes | None]:
        watched = self._marks.watch_numpy()
        state = watched.now()  # which knows of a kept Gaussian
        by_words = watched.raw is not None and not state["has_gauss"]
        return watched, state, bytes(watched.raw) if by_words and watched.raw else None

    def put_back(self, kept: _Kept) -> None:
        """They stand there again; an interrupt that strikes meanwhile is raised afterwards."""
        try:
            self._put_back(kept)
        except BaseException:
            self._put_back(kept)
            raise

    def _put_back(self, kept: _Kept) -> None:
        words = self._marks._python.raw
        if kept.words is None or words is None:
            random.setstate(kept.python)
        else:
            words[:] = kept.words
            self._shared.gauss_next = kept.python
        _puts[0] += 1
        watched = self._marks.watch_numpy()
        if watched is kept.watched:  # else another was put in its place meanwhile, to stay
            if kept.numpy_words is None or watched.raw is None:
                np.random.set_state(kept.numpy)
            else:
                np.random.seed(0)  # lets go of a kept Gaussian
                watched.raw[:] = kept.numpy_words
        torch.default_generator.set_state(kept.torch)


class _Kept(NamedTuple):
    """Where generators stood; of the two Mersenne Twisters their words, where these are known."""

    python: Any  # its state, or with words the Gaussian kept for the next call
    words: bytes | None
    watched: _Watched
    numpy: Any
    numpy_words: bytes | None
    torch: Any


class _Watched:
    """A generator whose state is read only where its memory moved; each time at address 0.

    Its memory is 624 words, and the place among them, which python has before them and numpy behind
    them. The place moves with each number drawn; all words change when the last one was used. Only
    a Gaussian kept for the next call is used up without a trace there: python's is an attribute of
    ``shared``, numpy's is found in a state by ``kept``.
    """

    raw: memoryview | None  # all of its memory
    words: memoryview | None

    def __init__(
        self,
        address: int,
        read: Callable[[], Any],
        kept: Callable[[Any], float | None],
        shared: Any = None,
    ) -> None:
        self.words = self.raw = None
        if address:
            held = (ctypes.c_uint32 * (_WORDS + 1)).from_address(address)
            self.raw = memoryview(held).cast("B")
            self.words = self.raw.cast("I")
        self._read, self._kept, self._shared = read, kept, shared
        self._seen: tuple[object, ...] | None = None
        self._state: Any = None

    def now(self) -> Any:
        words = self.words
        if words is None:
            return self._read()
        shared = self._shared
        gaussian = getattr(shared, "gauss_next", None)
        seen = words[0], words[1], words[_WORDS], _puts[0], gaussian
        if seen != self._seen:
            self._state = state = self._read()
            self._seen = seen if self._kept(state) is None else None
        return self._state


def _numpy_state() -> Any:
    return np.random.get_state(legacy=False)


@functools.lru_cache(maxsize=1)
def _python_address(getstate: Callable[[], Any]) -> int:
    """Where CPython keeps the words of ``random``'s generator; 0 if they are not found there.

    The object is its header, the place (an int), and the words. Looked at, not trusted: unless the
    memory holds exactly what ``getstate()`` says, the function is used.
    """
    try:
        _, state, _ = getstate()
        shared: Any = getstate.__self__  # type: ignore[attr-defined]
        if random.Random.__basicsize__ < object.__basicsize__ + _BYTES:
            return 0
        address = id(shared) + object.__basicsize__
        raw = ctypes.string_at(address, _BYTES)
        found = memoryview(raw).cast("I").tolist()
        return address if (*found[1:], found[0]) == state else 0
    except Exception:  # another interpreter: whatever its objects answer, ask the function
        return 0
