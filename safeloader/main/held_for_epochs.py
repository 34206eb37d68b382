"""An object that is held while an epoch runs over it, and not between epochs. Runs in: main."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


class HeldForEpochs:
    """What gives the object while it lives; most are held weakly all the time.

    One that bears no weak reference, as a list, is held from :meth:`hold` to :meth:`release`.

    Args:
        gone: a bound method, held weakly, that is called when the object is gone or let go of.
    """

    def __init__(self, thing: Any, gone: Callable[[], None]) -> None:
        self._gone = weakref.WeakMethod(gone)
        self._let_go_of = 0  # the id of the one that was held
        tell = self._gone
        try:
            self._get: Callable[[], Any] = weakref.ref(thing, lambda _: _call(tell))
        except TypeError:
            self._get = lambda: thing

    def __call__(self) -> Any:
        """The object; None if it is gone or let go of."""
        return self._get()

    def was(self, thing: Any) -> bool:
        """Whether ``thing`` is the object, or was it when it was let go of."""
        held = self._get()
        return held is thing or (held is None and self._let_go_of == id(thing))

    def hold(self, thing: Any) -> None:
        """An epoch begins: one that bears no weak reference is held again."""
        if not isinstance(self._get, weakref.ref):
            self._get = lambda: thing

    def release(self) -> None:
        """An epoch is over: one that bears no weak reference is let go of."""
        if not isinstance(self._get, weakref.ref):
            self._let_go_of = id(self._get())
            self._get = lambda: None
            _call(self._gone)


def _call(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    bound = method()
    if bound is not None:
        bound()
