"""A batch is sealed in the worker and opened in main: pickled and loaded where errors can be told.

::

    Parcel ── seal ──► Sealed(papers, payload: bytes) ── the queue ──► opened ──► Parcel

Torch leaves the pickling to a thread of its queue. What cannot be pickled is printed there and
dropped, and main waits for ever (pytorch#142884). Papers and payload are pickled apart, so a batch
that cannot be loaded still says which one it was.
"""

from __future__ import annotations

import io
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

from safeloader.wire.failure import Failure, failure_of
from safeloader.wire.records import FailedBatch, Papers, Parcel, asked_for
from safeloader.wire.shortage import shortage


class Sealed(NamedTuple):
    """A batch, pickled."""

    papers: bytes
    payload: bytes

    def opened(self) -> Parcel | FailedBatch:
        """The batch; a failure in its place if it cannot be loaded here."""
        papers = Papers(*pickle.loads(self.papers))
        try:
            payload = pickle.loads(self.payload)
        except Exception as exc:
            return FailedBatch(papers, _not_opened(exc, papers))
        return Parcel(papers, payload)


def seal(papers: Papers, payload: Any) -> Sealed:
    """Pickle a batch as torch's queue would: tensors move into shared memory.

    Raises:
        Exception: whatever pickling raises.
    """
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(payload)  # the queue's protocol: 5 would hand on read-only arrays
    return Sealed(pickle.dumps(tuple(papers), pickle.HIGHEST_PROTOCOL), buffer.getvalue())


WORKER_GONE = (ConnectionError, EOFError, FileNotFoundError)  # the tensors' memory went with it


def _not_opened(exc: Exception, papers: Papers) -> Failure:
    known = asked_for(papers)
    found = shortage(exc)
    if found is None:
        found = (
            "the batch was pickled in the worker and could not be loaded in the main process\n"
            "pickle.loads(pickle.dumps(batch)) repeats it: make what the dataset or collate_fn "
            "gives picklable both ways, or plain tensors, numbers, strings and containers of them"
        )
    return failure_of(
        exc,
        phase="transport",
        where="while loading a batch in the main process",
        index=known[0] if len(known) == 1 else None,
        position=0 if len(known) == 1 else None,
        indices=known,
        worker_id=papers.worker_id,
        pid=papers.pid,
        hint=found,
    )
