"""Pickled in the worker, opened in main; what cannot be opened still says what it was."""

from __future__ import annotations

import gc
import os
import pickle
import threading
import weakref
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from safeloader.delivery.indices import pack
from safeloader.delivery.manifest import BatchManifest, SampleIncident
from safeloader.errors import TransportError, error_from
from safeloader.transport.channel import MOST_FDS, close_all
from safeloader.transport.messages import BatchMessage, DeliveredBatch, FailedBatch
from safeloader.transport.packing import Packer
from safeloader.transport.slot_reader import WORKER_GONE, Unpacker
from tests import wired
from tests.oracle import plain

seal = Packer().seal
opened_from = partial(wired.opened_from, Unpacker())


def manifest(indices: list[int]) -> BatchManifest:
    incidents = (SampleIncident("late", 0, "came at try 2"),)
    return BatchManifest(
        9, 1, 4321, pack(indices), len(indices), None, b"\1" * 8, False, ("k",), incidents
    )


@pytest.mark.parametrize(
    "payload",
    [
        None,
        0,
        {"x": torch.arange(6).view(2, 3), "y": ["a", b"b", (1.5, None)]},
        torch.zeros(0),
        np.arange(4.0)[::-1],
        torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)]),
    ],
)
def test_what_is_sealed_is_opened_as_it_was(payload: Any) -> None:
    opened = opened_from(seal(manifest([5, 6]), payload))
    assert type(opened) is DeliveredBatch
    assert opened.manifest == manifest([5, 6])
    assert plain(opened.payload) == plain(payload)


def test_arrays_that_arrive_can_be_written_to() -> None:
    opened = opened_from(seal(manifest([5]), np.arange(3)))
    opened.payload[0] = 7  # type: ignore[union-attr]


def test_tensors_cross_by_shared_memory() -> None:
    sealed = seal(manifest([5]), torch.zeros(100_000))
    assert len(sealed.payload) < 2000
    assert opened_from(sealed).payload.numel() == 100_000  # type: ignore[union-attr]


@pytest.mark.parametrize("count", [1, 200, 201, 300])
def test_no_descriptor_is_left(count: int) -> None:
    opened_from(seal(manifest([5]), [torch.ones(2)] * 2))  # what is started once, is
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    batch = [torch.full((2,), float(k)) for k in range(count)]
    opened = opened_from(seal(manifest([5]), batch))
    assert [float(each[0]) for each in opened.payload] == list(range(count))  # type: ignore[union-attr]
    del opened, batch
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + (6 if count > 200 else 0)


def test_what_goes_beyond_a_messages_descriptors_is_left_to_torch() -> None:
    ends = wired.Wired()
    batch = [wired.filled(10 * wired.KB, k).share_memory_() for k in range(203)]
    ends.begin()
    sealed = ends.seal([*batch, wired.filled(20 * wired.KB, 7), bytes(200_000)])
    assert 200 < len(sealed.fds) <= MOST_FDS  # the last are those of slots
    came = ends.open(sealed)
    assert all(torch.equal(one, other) for one, other in zip(batch, came[:-2], strict=True))
    assert came[-2].eq(7).all()
    assert came[-1] == bytes(200_000)


def test_what_cannot_be_pickled_raises_at_once() -> None:
    with pytest.raises(TypeError, match="lock"):
        seal(manifest([5]), {"lock": threading.Lock()})


class Unloadable:
    def __init__(self, exc: type[Exception]) -> None:
        self.exc = exc

    def __reduce__(self) -> Any:
        return _raise, (self.exc,)


def _raise(exc: type[Exception]) -> None:
    raise exc("cannot be loaded")


@pytest.mark.parametrize("exc", [ValueError, ConnectionResetError, FileNotFoundError, EOFError])
def test_what_cannot_be_opened(exc: type[Exception]) -> None:
    opened = opened_from(seal(manifest([5, 6]), Unloadable(exc)))
    assert type(opened) is FailedBatch
    assert opened.manifest == manifest([5, 6])
    failure = opened.failure
    assert failure is not None
    assert (failure.phase, failure.indices, failure.index) == ("transport", (5, 6), None)
    assert (failure.worker_id, failure.pid) == (1, 4321)
    assert failure.raised_any_of(WORKER_GONE) == (exc is not ValueError)
    assert "pickle.loads(pickle.dumps(batch))" in failure.hint
    error = error_from(failure)
    assert isinstance(error, TransportError)
    assert isinstance(error, exc)


def test_a_batch_of_one_names_its_sample() -> None:
    failure = opened_from(seal(manifest([5]), Unloadable(ValueError))).failure  # type: ignore[union-attr]
    assert failure is not None
    assert (failure.index, failure.position) == (5, 0)


def test_too_many_open_files_are_told_as_such() -> None:
    sealed = seal(manifest([5]), 1)._replace(payload=pickle.dumps(Unloadable24()))
    failure = opened_from(sealed).failure  # type: ignore[union-attr]
    assert failure is not None
    assert "open files" in failure.hint


class Unloadable24:
    def __reduce__(self) -> Any:
        return _no_descriptors, ()


def _no_descriptors() -> None:
    raise OSError(24, "Too many open files")


def test_it_is_made_of_bytes() -> None:
    sealed = seal(manifest([5]), 1)
    assert pickle.loads(pickle.dumps(sealed)) == sealed
    assert type(sealed) is BatchMessage
    as_read = BatchMessage(bytearray(sealed.manifest), bytearray(sealed.payload))  # type: ignore[arg-type]
    assert opened_from(as_read) == opened_from(sealed)


def test_what_was_sealed_is_not_kept_for_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        batch = torch.zeros(1000)
        gone = weakref.ref(batch)
        close_all(list(seal(manifest([1]), {"x": batch}).fds))
        del batch
        assert gone() is None
    finally:
        gc.enable()
