"""Makes batches and their manifest. Runs in: worker.

Takes a :class:`Task`, gives a batch in one of these forms:

========================  ==================================================================
:class:`DeliveredBatch`           the batch, in the main process
:class:`BatchMessage`           the batch, in a worker: pickled, ready to be sent
:class:`EmptyBatch`       every sample of it was left out
:class:`FailedBatch`      it could not be made
========================  ==================================================================

No exception of the user's code leaves here, so the stock iterator carries failures like data and
each arrives where its batch would have. Only the end of a stream is a ``StopIteration``.

The kinds of dataset have a module each (:mod:`mapping`, :mod:`streaming`) over what they share
(:mod:`recording`); samples that fail and are not to end their batch go to :mod:`repair`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from safeloader.transport.stream_progress import StreamProgress
from safeloader.worker.context import FetchContext
from safeloader.worker.mapping import MapFetcher, UnbatchedMapFetcher
from safeloader.worker.policy import Policy
from safeloader.worker.recording import RecordingFetcher
from safeloader.worker.streaming import StreamFetcher


def fetcher_for(stock: Any, context: FetchContext) -> RecordingFetcher:
    """Our fetcher around torch's ``stock``."""
    if hasattr(stock, "dataset_iter"):
        return StreamFetcher(stock, context)
    return (MapFetcher if stock.auto_collation else UnbatchedMapFetcher)(stock, context)


def fetcher_in_main(
    stock: Any,
    *,
    progress: StreamProgress | None,
    key: Callable[[Any], Any] | None,
    policy: Policy,
    raised: list[BaseException],
    length: int | None = None,
) -> RecordingFetcher:
    """The fetcher of a loader without workers; for the arguments see :class:`FetchContext`."""
    context = FetchContext(
        None, progress=progress, key=key, policy=policy, raised=raised, length=length
    )
    return fetcher_for(stock, context)
