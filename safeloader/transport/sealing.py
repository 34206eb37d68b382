"""A batch as it crosses, pickled in the worker and loaded in main. Runs in: both.

::

    DeliveredBatch ── Packer.seal ──► Sealed ── the queue ──► Unpacker.opened ──► DeliveredBatch

Torch leaves the pickling to a thread of its queue. What cannot be pickled is printed there and
dropped, and main waits for ever (pytorch#142884). Manifest and payload are pickled apart, so a batch
that cannot be loaded still says which one it was.
"""

from __future__ import annotations

from typing import NamedTuple


class BatchMessage(NamedTuple):
    """A batch, pickled.

    Attributes:
        manifest: the fields of its manifest, and those of its :class:`SlotLayout`.
        payload: the batch; empty where it lies in a slot.
        fds: descriptors of shared memory, which cross beside it.
    """

    manifest: bytes
    payload: bytes
    fds: tuple[int, ...] = ()
