"""Something that is measured, in a process of its own.

In one process loaders would run in what the others left there. What one of them loads once for all
its workers (NumPy's random numbers, most of the start of a forked worker) the stock loader beside
it would have as well; and what it has imported the stock loader's workers would inherit.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import torch


class Apart:
    """What ``make(*arguments)`` gives, made and used in a process of its own.

    Both have to be found by their names there. What the process started ends with it.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self._process = ProcessPoolExecutor(
            1,
            # Not forked: it would begin with all that is here.
            multiprocessing.get_context("spawn"),
            torch.set_num_threads,
            (torch.get_num_threads(),),
        )
        self._made = self._process.submit(_make, make, arguments)

    def ask(self, method: str, *arguments: Any) -> Any:
        """What that method of it gives.

        Raises:
            Exception: what the method raised, or ``make``.
        """
        self._made.result()
        answer: Future[Any] = self._process.submit(_ask, method, arguments)
        return answer.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(BrokenProcessPool):  # the process has ended
            self._process.submit(_forget)  # its workers end with it
        self._process.shutdown()


_there: list[Any] = []  # in the process of its own: what was made


def _make(make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    _there.append(make(*arguments))


def _forget() -> None:
    _there.clear()


def _ask(method: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(_there[0], method)(*arguments)
