"""Which batches an optimizer's step was made of, noted as a framework trains. Runs in: main.

A framework has fetched more than it trains on: the batch handed over last is a later one. So they
are counted as it trains on them, from the first one of the epoch on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from safeloader.failures.loader_log import LoaderLog, guarded
from safeloader.instrumenting import loaders_of


class MarkedSteps:
    """The steps of one training, marked in the run's folder of its loader.

    Of several loaders none is marked, since frameworks begin some of them anew within an epoch; nor
    where there is no run's folder. A fault of ours is told once, and no more is marked.
    """

    _loader: Callable[[], Any] = staticmethod(lambda: None)
    _epoch = -1  # of the loader's own count; unknown before its first mark
    _first = 0  # the number of the first batch that was handed over in it
    _least = 0
    _broken = False

    def epoch_begins(self, obj: Any, *, asked: bool) -> None:
        """An epoch of the training begins.

        Args:
            obj: its loader, or what holds it.
            asked: whether the loader was asked for this epoch's iterator already; if not, what it
                handed over until now is of another epoch.
        """
        self._loader, self._epoch, self._least = (lambda: None), -1, 0
        if not asked:
            self._least = max((_epochs(loader) for loader in loaders_of(obj)), default=0)

    def trains_on(self, obj: Any, step: int, number: int) -> None:
        """The training trains on a batch; nothing is noted if that is not known to have come.

        Args:
            obj: its loader, or what holds it.
            step: the optimizer's count.
            number: of the batch, in this epoch of the training, from 0.
        """
        if self._broken:
            return
        loader = self._loader()
        if loader is None:
            found = loaders_of(obj)
            if len(found) != 1:
                return
            (loader,) = found
            self._loader = weakref.ref(loader)
        recorder = loader.recorder
        if recorder is None or recorder.run is None:
            return
        self._broken = True
        with guarded("the marks of the optimizer's steps", lambda: LoaderLog(loader.dataset)):
            self._mark(loader, recorder, step, number)
            self._broken = False

    def _mark(self, loader: Any, recorder: Any, step: int, number: int) -> None:
        newest, epoch = recorder.last_delivery(), recorder.epochs - 1
        if newest is None or newest.epoch != epoch or epoch < self._least:
            return
        if self._epoch < 0:
            self._epoch, self._first = epoch, recorder.newest()[0].batch
        batch = self._first + number
        if epoch == self._epoch and batch <= newest.batch:
            loader.mark(step, batch)


def _epochs(loader: Any) -> int:
    return 0 if loader.recorder is None else int(loader.recorder.epochs)
