"""A batch into slots and a message: one copy for each byte. Runs in: worker.

::

    default_collate ──► stacks straight into a slot ─┐
    any other batch ──► BatchPickler ──► one copy ───┴──► BatchMessage: some hundred bytes
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

import torch

from safeloader import _torch
from safeloader.delivery.manifest import BatchManifest
from safeloader.transport.batch_pickler import IN_MESSAGE, INLINE, BatchPickler, Overlap, Parts
from safeloader.transport.channel import close_all
from safeloader.transport.leaves import CODES
from safeloader.transport.messages import BatchMessage
from safeloader.transport.slot_batch import SlotBatch
from safeloader.transport.slot_table import SlotLayout
from safeloader.transport.slot_writer import SlotPool

_LARGE_PICKLE = 1 << 16
_LARGE_BATCH = 1 << 20
_TRIES = 3  # the first finds what overlaps; a pickle that is another each time may take more


class Packer:
    """Makes a message of each batch; one for the life of a worker.

    Args:
        slots: where batches are put; None for torch's own way.
        why: why batches take torch's own way, if nobody asked for it.
        large: is called for each batch whose slots have 1 MiB or more.
    """

    def __init__(
        self,
        slots: SlotPool | None = None,
        why: str = "",
        large: Callable[[], None] | None = None,
    ) -> None:
        self._slots = None if slots is None else SlotBatch(slots)
        self._why = why
        self._large = large
        self._collating: int | None = None  # the thread that does

    # while a batch is made ──────────────────────────────────────────────────────────────────────

    def begin(self) -> None:
        """A batch begins; hot path."""
        self._collating = None
        if self._slots is not None:
            self._slots.begin()

    def collates(self) -> None:
        """The batch is collated from now on: what is stacked goes into a slot."""
        self._collating = threading.get_ident()

    def install(self) -> None:
        """Have ``default_collate`` stack into slots, in this process."""
        if self._slots is not None:
            _torch.stack_tensors_with(self._stack)

    def _stack(self, stock: Callable[..., Any], batch: Any, **kwargs: Any) -> Any:
        """What torch's ``collate_tensor_fn`` does, in the memory that the batch is sent in."""
        first = batch[0]
        slots = self._slots
        if (
            slots is None
            or self._collating != threading.get_ident()
            or type(first) is not torch.Tensor
            or first.layout is not torch.strided
            or not first.is_cpu
            or first.is_nested
            or first.dtype not in CODES
        ):
            return stock(batch, **kwargs)
        shape = (len(batch), *first.shape)
        size = first.nbytes * len(batch)
        whole = None
        if size > INLINE:
            whole = slots.tensor(first.dtype, size // first.itemsize, size)
        if whole is not None:
            return torch.stack(batch, 0, out=whole.resize_(shape))
        if size >= IN_MESSAGE:
            return stock(batch, **kwargs)
        own = torch.empty(shape, dtype=first.dtype, device="cpu")  # whatever the default is
        return torch.stack(batch, 0, out=own)

    # when it is made ────────────────────────────────────────────────────────────────────────────

    def seal(self, manifest: BatchManifest, payload: Any) -> BatchMessage:
        """Pickle a batch.

        Raises:
            Exception: whatever pickling raises.
        """
        self._collating = None
        if self._slots is not None:
            self._slots.seal()
        parts: Parts = {}
        for _ in range(_TRIES):
            try:
                return self._message(manifest, payload, BatchPickler(self._slots, parts))
            except Overlap as found:
                (parts,) = found.args
        why = "its tensors overlap, differently each time it is pickled"
        return self._message(manifest, payload, BatchPickler(None, {}, why))

    def _message(self, manifest: BatchManifest, payload: Any, run: BatchPickler) -> BatchMessage:
        slots = self._slots
        try:
            packed = run.pickled(payload)
            stream = None
            if slots is not None and len(packed) > _LARGE_PICKLE:
                stream = slots.copy(packed, len(packed))
            sent = () if slots is None else slots.sent
            given_up = () if slots is None else tuple(slots.pool.given_up)
            fresh = tuple(place for place, slot in enumerate(sent) if slot.fd >= 0)
            # Where there was no room torch stacked into its own shared memory: room is the cause.
            why = (slots is not None and slots.why) or run.why or self._why
            about = None
            if sent or given_up or why or run.torchs:
                known = tuple((slot.number, slot.size) for slot in sent)
                if self._large and sum(size for _, size in known) >= _LARGE_BATCH:
                    self._large()
                count = len(run.fds) + len(fresh)
                about = tuple(SlotLayout(known, fresh, count, given_up, stream, run.torchs, why))
            head = pickle.dumps((tuple(manifest), about), pickle.HIGHEST_PROTOCOL)
        except BaseException:
            close_all(run.fds)
            if slots is not None:
                slots.abort()
            raise
        # From here on nothing can fail.
        fds = run.fds if slots is None else run.fds + slots.commit()
        return BatchMessage(head, packed if stream is None else b"", tuple(fds))
