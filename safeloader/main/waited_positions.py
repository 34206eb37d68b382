"""Which read positions move while main waits for a batch: workers move those. Runs in: main.

A forked worker shares the read position of each file that was open. That one moved says nothing of
who moved it: main may read a file of its own between two batches. While it waits it reads nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from safeloader.introspect.file_positions import Position, offset_of

WATCHED_MAX = 64  # batches of the first epoch


class WaitedPositions:
    """Those of the files that the workers inherited.

    Attributes:
        moved: the descriptors whose position moved in the meantime.
    """

    def __init__(self, inherited: dict[int, Position]) -> None:
        self.inherited = inherited
        self.moved: set[int] = set()

    @property
    def paths(self) -> set[str]:
        """The files whose position moved."""
        return {self.inherited[fd].path for fd in self.moved}

    def around(self, advance: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """``advance``, which waits for a batch, with a look before and after, for some batches."""
        watched = list(self.inherited)
        if not watched:
            return advance
        left = WATCHED_MAX

        def watching(stock: Any) -> Any:
            nonlocal left
            if not left:
                return advance(stock)
            left -= 1
            before = [offset_of(fd) for fd in watched]
            try:
                return advance(stock)
            finally:
                after = [offset_of(fd) for fd in watched]
                self.moved.update(
                    fd for fd, was, now in zip(watched, before, after, strict=True) if was != now
                )

        return watching
