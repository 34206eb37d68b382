"""How far each worker has read its stream, in shared memory. Runs in: both.

An iterable dataset ends when it says so, and torch's message for that carries no numbers. Each
worker notes here how many samples it has read, how many of the last it dropped (an incomplete
batch under ``drop_last``) and that it came to its end; the main process compares that with what it
was handed, which is what makes "no gap in any worker's stream" more than a belief.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from multiprocessing.sharedctypes import RawArray

_FIELDS = 3  # read, dropped, ended


class StreamProgress:
    """One row of numbers a worker. Each row has one writer; main reads once the worker is done.

    The array is anonymous shared memory that goes to workers as an argument of the process, under
    every start method; nothing is left behind in the file system. ``shared=False`` is for
    ``num_workers=0``.
    """

    def __init__(self, workers: int, *, shared: bool) -> None:
        self._cells: MutableSequence[int] = (
            RawArray("q", _FIELDS * workers) if shared else [0] * (_FIELDS * workers)
        )

    def write(self, worker: int, read: int, dropped: int, ended: bool) -> None:
        """Note how far ``worker`` is; called by that worker only."""
        at = _FIELDS * worker
        self._cells[at : at + _FIELDS] = read, dropped, ended

    def read(self, worker: int) -> tuple[int, int, bool]:
        """Samples that ``worker`` has read, of these dropped at its end, whether it has ended."""
        at = _FIELDS * worker
        read, dropped, ended = self._cells[at : at + _FIELDS]
        return read, dropped, bool(ended)
