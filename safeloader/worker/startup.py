"""The injected ``worker_init_fn``; runs in a worker before torch makes its fetcher.

Takes the worker's number, calls the user's own function and puts our fetcher in the place of
torch's, in this process alone. All of it dies with the worker.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch.utils.data import get_worker_info

from safeloader import torch_private
from safeloader.wire.dataset_state import describe
from safeloader.wire.failure import Failure, failure_of
from safeloader.wire.streams import StreamBoard
from safeloader.worker.fetching import Post, RefusingFetcher, fetcher_for
from safeloader.worker.hints import hint_for


class WorkerStartup:
    """A callable that pickles with the process arguments under every start method."""

    def __init__(
        self,
        user_init_fn: Callable[[int], None] | None,
        board: StreamBoard | None,
        key: Callable[[Any], Any] | None,
    ) -> None:
        self._user_init_fn = user_init_fn
        self._board = board
        self._key = key

    def __call__(self, worker_id: int) -> None:
        """Set this worker up; what the user's function raises is told with the first batch."""
        torch_private.disown_inherited_iterators()
        refused: Failure | None = None
        info = get_worker_info()
        dataset = None if info is None else info.dataset
        if self._user_init_fn is not None:
            try:
                self._user_init_fn(worker_id)
            except Exception as exc:
                refused = _startup_failure(exc, "init", worker_id, dataset)
        # Taken after the user's function: what it opened is the state that the work starts from.
        # The dataset is not asked for its length: a slow `__len__` would delay every worker.
        post = Post(worker_id, self._board, self._key, describe(dataset, ask=False))

        def make(create: Callable[[], Any]) -> Any:
            if refused is not None:
                return RefusingFetcher(refused, post)
            try:
                return fetcher_for(create(), post)
            except Exception as exc:  # iter(dataset) raised
                return RefusingFetcher(_startup_failure(exc, "sample", worker_id, dataset), post)

        torch_private.install_fetcher(make)


def _startup_failure(exc: Exception, phase: str, worker_id: int, dataset: Any) -> Failure:
    found = "iter(dataset) raised, before any sample" if phase == "sample" else ""
    return failure_of(
        exc,
        phase=phase,
        where=f"in DataLoader worker process {worker_id}",
        worker_id=worker_id,
        pid=os.getpid(),
        dataset_state=describe(dataset),
        hint=hint_for(exc, phase, None, found),
    )
