"""How long a part of `benchmarks.gpu` may take, and how its cells share that time."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Cell = TypeVar("Cell")
Row = dict[str, Any]
"""A line of a table: `table` is the table's name, the other keys are its columns. In its stead a
`note` (what was cut or left out) or an `error`. Lists are kept in the file and not shown."""


class NoTime(Exception):
    """The time of the part was up before a cell began."""


class Budget:
    """The time of one part.

    Args:
        until_s: when it ends, by `time.time`, which processes have in common.
    """

    def __init__(self, until_s: float) -> None:
        self.until_s = until_s

    def left_s(self) -> float:
        return self.until_s - time.time()

    def turns(self, cells_left: int, most: int) -> Turns:
        """The repeats of a cell, which shares what is left with those that come after it.

        Raises:
            NoTime: where nothing is left.
        """
        if self.left_s() <= 0:
            raise NoTime
        return Turns(self.left_s() / max(1, cells_left), most)


class Turns:
    """Numbers of turns, as many as the time allows: always the first, never more than `most`.

    The time counts from here, so that what a cell prepares before its first turn is in it.
    """

    def __init__(self, seconds: float, most: int) -> None:
        self.most = most
        self.until = time.perf_counter() + seconds

    def __iter__(self) -> Iterator[int]:
        longest = 0.0
        for number in range(self.most):
            began = time.perf_counter()
            if number and began + longest > self.until:
                return
            yield number
            longest = max(longest, time.perf_counter() - began)


def each(cells: Sequence[Cell], measure: Callable[[Cell, int], Iterator[Row]]) -> Iterator[Row]:
    """The rows of all cells. One that fails is told, and the others go on.

    Args:
        cells: what is measured; told by `str`.
        measure: is called with a cell and with how many are left, it included.
    """
    for number, cell in enumerate(cells):
        try:
            yield from measure(cell, len(cells) - number)
        except NoTime:
            yield {"note": f"{cell}: left out, no time is left"}
        except Exception as exc:
            yield {"error": f"{cell}: {told(exc)}", "traceback": traceback.format_exc()}


def told(exc: BaseException) -> str:
    """An exception in one line; of what came from a worker, the last line says what it was."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()] or [""]
    shown = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
    return f"{type(exc).__name__}: {shown}"


def size_of(size: int) -> str:
    """Bytes in words: `38 MB`, `1.2 GB`."""
    if size >= 1e9:
        return f"{size / 1e9:.2g} GB"
    return f"{size / 1e6:.3g} MB"
