"""A batch into slots and a message: one copy for each byte; runs in a worker.

::

    default_collate ──► stacks straight into a slot ──┐
    any other batch ──► Reduction ──► one copy ───────┴──► Sealed: some hundred bytes
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

import torch

from safeloader import torch_private
from safeloader.wire.leaves import CODES
from safeloader.wire.records import Papers
from safeloader.wire.sealing import Sealed
from safeloader.wire.slots import Cargo
from safeloader.worker.reducing import (
    IN_MESSAGE,
    INLINE,
    Overlap,
    Parts,
    Reduction,
    Stacked,
    TooManyFds,
)
from safeloader.worker.slots import NoRoom, SlotPool

_LARGE_PICKLE = 1 << 16
_TRIES = 3  # the first finds what overlaps; a pickle that is another each time may take more


class Packer:
    """Seals batches; one for the life of a worker.

    Args:
        slots: where batches are put; None for torch's own way.
        why: why it is torch's own way, if it was not asked for.
    """

    def __init__(self, slots: SlotPool | None = None, why: str = "") -> None:
        self._slots = slots
        self._why = why
        self._collating = False
        self._thread = 0
        self._no_room = ""  # why a part of the batch could not be stacked in a slot
        self._stacked: Stacked = {}

    # while a batch is made ──────────────────────────────────────────────────────────────────────

    def begin(self) -> None:
        """A batch begins; hot path."""
        self._collating = False
        if self._slots is not None:
            self._slots.begin()
            self._no_room = ""
            if self._stacked:
                self._stacked = {}

    def collates(self) -> None:
        """The batch is collated from now on: what is stacked goes into a slot."""
        self._collating = True
        self._thread = threading.get_ident()

    def install(self) -> None:
        """Have ``default_collate`` stack into slots, in this process."""
        if self._slots is not None:
            torch_private.stack_tensors_with(self._stack)

    def _stack(self, stock: Callable[..., Any], batch: Any, **kwargs: Any) -> Any:
        """What torch's ``collate_tensor_fn`` does, in the memory that the batch is sent in."""
        first = batch[0]
        slots = self._slots
        if (
            slots is None
            or not self._collating
            or type(first) is not torch.Tensor
            or first.layout is not torch.strided
            or not first.is_cpu
            or first.is_nested
            or first.dtype not in CODES
            or threading.get_ident() != self._thread
        ):
            return stock(batch, **kwargs)
        shape = (len(batch), *first.shape)
        size = first.nbytes * len(batch)
        place, at = (None, 0) if size <= INLINE else self._room(slots, size)
        if place is None:
            if size >= IN_MESSAGE:
                return stock(batch, **kwargs)
            own = torch.empty(shape, dtype=first.dtype, device="cpu")  # whatever the default is
            return torch.stack(batch, 0, out=own)
        count = size // first.itemsize
        whole = torch.frombuffer(slots.lease(place), dtype=first.dtype, count=count, offset=at)
        # Held until the batch is sealed: its storage is known again by its address.
        self._stacked[torch_private.identity_of(whole.untyped_storage())] = place, at, whole
        return torch.stack(batch, 0, out=whole.resize_(shape))

    def _room(self, slots: SlotPool, size: int) -> tuple[int | None, int]:
        try:
            return slots.room(size)
        except NoRoom as exc:
            self._no_room = str(exc)
            return None, 0

    # when it is made ────────────────────────────────────────────────────────────────────────────

    def seal(self, papers: Papers, payload: Any) -> Sealed:
        """Pickle a batch.

        Raises:
            Exception: whatever pickling raises.
        """
        self._collating = False
        parts: Parts = {}
        why = "its tensors overlap, differently each time it is pickled"
        try:
            for _ in range(_TRIES):
                run = Reduction(self._slots, self._stacked, parts, self._no_room)
                try:
                    return self._sealed(papers, payload, run)
                except Overlap as found:
                    parts = found.parts
                except TooManyFds:
                    why = "more tensors than a message may have descriptors"
                    break
            return self._sealed(papers, payload, Reduction(None, {}, {}, why, fetched=True))
        finally:
            self._stacked = {}

    def _sealed(self, papers: Papers, payload: Any, run: Reduction) -> Sealed:
        try:
            packed = run.pickled(payload)
            stream = None
            if len(packed) > _LARGE_PICKLE and (place := run.put(packed)) is not None:
                stream, packed = place, b""
            return self._with_papers(papers, packed, stream, run)
        except BaseException:
            run.undo()
            raise

    def _with_papers(
        self, papers: Papers, packed: bytes, stream: tuple[int, int, int] | None, run: Reduction
    ) -> Sealed:
        fds = run.fds
        why = run.why or self._why
        slots = self._slots
        if slots is None:
            cargo = Cargo(fds=len(fds), torchs=run.torchs, why=why)
        else:
            used = slots.batch
            fresh = tuple(place for place, slot in enumerate(used) if slot.fd >= 0)
            cargo = Cargo(
                tuple((slot.number, slot.size) for slot in used),
                fresh,
                len(fds) + len(fresh),
                slots.given_up,
                stream,
                run.torchs,
                why,
            )
        head = pickle.dumps((tuple(papers), tuple(cargo)), pickle.HIGHEST_PROTOCOL)
        if slots is not None:  # from here on nothing can fail
            for place in cargo.fresh:
                fds.append(slots.batch[place].fd)
                slots.batch[place].fd = -1
            slots.lent()
        return Sealed(head, packed, tuple(fds))
