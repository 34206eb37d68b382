"""Small values of all ranks by way of a store of ``torch.distributed``. Runs in: main.

Nobody waits for another to put a value there. Whoever collects them waits within a bound, which
holds where the store itself hangs too: what may wait is asked in a thread that is left alone then.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from safeloader.introspect.signals import raised_by_signal

VALUE_BYTES = 1 << 16  # torch's TCPStore closes itself at values of some MB
_AT_ONCE_S = 1.0  # others use the same store: it is not held for longer
_GRACE_S = 2.0

T = TypeVar("T")
logger = logging.getLogger("safeloader")


def put_value(store: Any, key: str, rank: int, value: bytes) -> bool:
    """Put the value of a rank; False, and a line in the log, if the store does not take it.

    Raises:
        TypeError: if ``key`` is no text, or this is no store.
    """
    _see(store, key, "set")
    if len(value) > VALUE_BYTES:
        logger.warning(
            "the part of rank %d was not put into the store: it has %d bytes, and %d are the most",
            *(rank, len(value), VALUE_BYTES),
        )
        return False
    try:
        store.set(_name(key, rank), value)
    except Exception as exc:
        if raised_by_signal(exc):
            raise
        logger.warning(
            "the part of rank %d was not put into the store, and training goes on: %s",
            *(rank, said_by(exc)),
        )
        return False
    return True


class Collected:
    """What was in a store, by rank.

    Attributes:
        values: of the ranks that have put theirs.
        trouble: what the store said in the place of an answer; empty as a rule.
    """

    def __init__(self) -> None:
        self.values: dict[int, bytes] = {}
        self.trouble = ""


def collect(store: Any, key: str, ranks: Iterable[int], timeout_s: float) -> Collected:
    """Wait until all of these ranks have put their values, or for so many seconds.

    Raises:
        TypeError: if ``key`` is no text, or this is no store.
        ValueError: if ``timeout_s`` is below 0.
    """
    _see(store, key, "wait")
    see_seconds(timeout_s)
    found, end = Collected(), time.monotonic() + timeout_s
    wanted = list(ranks)

    def ask() -> None:
        left = wanted
        while True:
            for rank in left:
                if store.check([_name(key, rank)]):
                    found.values[rank] = bytes(store.get(_name(key, rank)))
            left = [rank for rank in left if rank not in found.values]
            seconds = end - time.monotonic()
            if not left or seconds <= 0:
                return
            with contextlib.suppress(RuntimeError):  # the time is over: asked once more
                bound = datetime.timedelta(seconds=min(seconds, _AT_ONCE_S))
                store.wait([_name(key, rank) for rank in left], bound)

    try:
        if within(timeout_s + _GRACE_S, ask) is None:
            found.trouble = f"the store gave no answer in {timeout_s + _GRACE_S:.0f} s"
    except Exception as exc:
        if raised_by_signal(exc):
            raise
        found.trouble = f"the store failed: {said_by(exc)}"
    return found


def within(seconds: float, ask: Callable[[], T]) -> tuple[T] | None:
    """What ``ask`` gives, in a tuple; None if it takes longer. What it raises is raised here."""
    out: list[tuple[T]] = []
    raised: list[Exception] = []

    def run() -> None:
        try:
            out.append((ask(),))
        except Exception as exc:
            raised.append(exc)

    thread = threading.Thread(target=run, daemon=True, name="safeloader-store")
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    return out[0] if out else None


def see_seconds(timeout_s: Any) -> None:
    """Refuse what is no number of seconds.

    Raises:
        ValueError: if it is below 0, or no number.
    """
    number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if not number or not timeout_s >= 0:
        raise ValueError(f"timeout_s must be seconds, 0 or more; got {_text(timeout_s)}")


def said_by(exc: BaseException) -> str:
    """What an error of torch's says, in a line: it may have a C++ stack in it."""
    return f"{type(exc).__name__}: {str(exc).strip().partition(chr(10))[0][:200]}"


def _name(key: str, rank: int) -> str:
    return f"safeloader/{key}/{rank}"


def _see(store: Any, key: Any, needs: str) -> None:
    if not isinstance(key, str) or not key:
        raise TypeError(f"key must be a text, as 'audit/0'; got {_text(key)}")
    if not callable(getattr(store, needs, None)):
        raise TypeError(f"store must be one of torch.distributed, as TCPStore; got {_text(store)}")


def _text(value: Any) -> str:
    from safeloader.introspect.texts import bounded_text  # which loads torch

    return bounded_text(value)
