"""Failures of the user's code, raised for real in workers and in main: what the user gets."""

from __future__ import annotations

import json
import os
import pickle
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from safeloader import (
    CollateError,
    Failure,
    SafeDataLoader,
    SafeLoaderError,
    SampleError,
    SamplerError,
    TransportError,
    WorkerInitError,
)
from safeloader.delivery.manifest import BatchManifest
from safeloader.transport.messages import DeliveredBatch
from tests import datasets, faults

WORKERS = [0, 2]


def caught(loader: Any) -> Any:
    """The error that iterating raises, without its traceback.

    A caller that kept it, as ``pytest.raises(...) as info`` does, would be held by its frames: the
    iterator would be left to the garbage collector, which closes queues under their threads.
    """
    try:
        for _ in loader:
            pass
    except SafeLoaderError as error:
        return error.with_traceback(None)
    pytest.fail("nothing was raised")


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("how", faults.raisers())
def test_every_exception_arrives_with_index_type_and_message(how: str, workers: int) -> None:
    original: BaseException
    try:
        faults.raisers()[how]()
    except BaseException as exc:
        original = exc
    error = caught(SafeDataLoader(faults.Raises(how), batch_size=4, num_workers=workers))
    assert isinstance(error, SampleError)
    failure = error.failure
    assert failure is not None
    assert (failure.phase, failure.index, failure.position) == ("sample", 13, 1)
    assert failure.indices == (12, 13, 14, 15)
    assert (failure.batch, failure.epoch, failure.rank) == (3, 0, None)
    assert failure.worker_id == (1 if workers else None)
    assert (failure.pid == os.getpid()) == (workers == 0)
    assert failure.exception_type.endswith(type(original).__name__)
    assert "faults.py" in failure.traceback
    assert "fetching.py" not in failure.traceback
    assert "dataset index 13" in str(error)
    if how != "cannot be shown":
        assert str(original)[:50] in failure.message
    if workers:
        name = type(original).__name__
        assert str(error).startswith(f"Caught {name} in DataLoader worker process 1.\n")
    json.dumps(failure.to_dict(), allow_nan=False)
    again = pickle.loads(pickle.dumps(error))
    if how != "local class":  # its base crosses instead
        assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.index == 13


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(
    ("how", "also"),
    [
        ("KeyError", KeyError),
        ("needs arguments", faults.NeedsArguments),
        ("holds a lock", faults.HoldsALock),
        ("cannot be shown", faults.CannotBeShown),
        ("slotted", faults.Slotted),
        ("local class", LookupError),
        ("chained", ValueError),
        ("undecodable", UnicodeDecodeError),
        ("no such file", FileNotFoundError),
        ("group", ExceptionGroup),
    ],
)
def test_error_is_caught_as_its_original_type_too(
    how: str, also: type[Exception], workers: int
) -> None:
    error = caught(SafeDataLoader(faults.Raises(how), batch_size=4, num_workers=workers))
    assert isinstance(error, also)
    assert isinstance(error, SampleError)


@pytest.mark.parametrize("workers", WORKERS)
def test_what_cannot_be_combined_is_a_plain_sample_error(workers: int) -> None:
    error = caught(SafeDataLoader(faults.Raises("unmixable"), batch_size=4, num_workers=workers))
    assert type(error) is SampleError
    assert error.failure is not None
    assert error.failure.exception_type == "tests.faults.Unmixable"


@pytest.mark.parametrize("workers", WORKERS)
def test_attributes_of_the_original_survive(workers: int) -> None:
    def error(how: str) -> Any:
        return caught(SafeDataLoader(faults.Raises(how), batch_size=4, num_workers=workers))

    needs = error("needs arguments")
    assert (needs.path, needs.line) == ("data.csv", 3)
    assert error("holds a lock").code == 17
    assert error("slotted").args == ("deep",)
    missing = error("no such file")
    assert (missing.errno, missing.filename) == (2, "/no/such/file")
    assert error("undecodable").encoding == "utf-8"
    assert error("KeyError").args == ("feature",)


def test_without_workers_the_traceback_leads_into_the_dataset() -> None:
    with pytest.raises(SampleError, match=r"^'feature'") as info:
        list(SafeDataLoader(faults.Raises(), batch_size=4))
    assert "__getitem__" in [entry.name for entry in info.traceback]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("how", ["KeyError", "StopIteration"])
def test_the_user_may_go_on_after_an_error(how: str, workers: int) -> None:
    loader = SafeDataLoader(faults.Raises(how), batch_size=4, num_workers=workers)
    iterator = iter(loader)
    got: list[int] = []
    errors = 0
    while True:
        try:
            got += next(iterator).tolist()
        except SampleError:
            errors += 1
        except StopIteration:
            break
    assert errors == 1
    assert got == [index for index in range(40) if index not in (12, 13, 14, 15)]
    audit = loader.audit
    assert audit is not None
    assert audit.complete
    assert not audit.ok
    assert audit.failed.tolist() == [12, 13, 14, 15]
    assert audit.counts["missing"] == 0
    assert (audit.drawn, audit.delivered) == (40, 36)


@pytest.mark.parametrize("workers", WORKERS)
def test_getitems_is_searched_for_the_single_index(workers: int) -> None:
    error = caught(SafeDataLoader(faults.RaisesTogether(), batch_size=4, num_workers=workers))
    assert isinstance(error, KeyError)
    assert (error.index, error.failure.position) == (13, 1)  # type: ignore[union-attr]
    assert "asking for the 4 samples one at a time" in str(error)
    error = caught(SafeDataLoader(faults.RaisesTogetherOnly(), batch_size=4, num_workers=workers))
    assert error.index is None
    assert "none of the 4 indices" in str(error)


@pytest.mark.parametrize("workers", WORKERS)
def test_the_search_leaves_the_random_numbers_alone(workers: int) -> None:
    def rest(loader_class: Any) -> list[float]:
        torch.manual_seed(0)
        loader = loader_class(
            faults.RaisesTogether(), batch_size=4, num_workers=workers, collate_fn=with_random
        )
        iterator = iter(loader)
        got = []
        while True:
            try:
                got.append(next(iterator))
            except KeyError:
                continue
            except StopIteration:
                return got

    assert rest(SafeDataLoader) == rest(DataLoader)


def with_random(samples: list[Any]) -> float:
    return float(torch.rand(1))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("goes_on", [True, False])
def test_stream_failure_names_its_ordinal(goes_on: bool, workers: int) -> None:
    stream = faults.RaisingStream(goes_on=goes_on)
    loader = SafeDataLoader(stream, batch_size=4, num_workers=min(workers, 1))
    iterator = iter(loader)
    assert next(iterator).tolist() == [0, 1, 2, 3]
    error = caught(iterator)
    assert isinstance(error, SampleError)
    assert isinstance(error, KeyError)
    assert error.index == (0, 5)
    assert error.failure.indices == ((0, 4), (0, 5))
    rest = [value for batch in iterator for value in batch.tolist()]
    assert rest == (list(range(6, 20)) if goes_on else [])
    assert loader.audit is not None
    assert loader.audit.complete
    assert loader.audit.failed.tolist() == [[0, 4], [0, 5]]
    assert loader.audit.counts["missing"] == 0


@pytest.mark.parametrize("workers", WORKERS)
def test_stream_that_cannot_start(workers: int) -> None:
    loader = SafeDataLoader(faults.UnstartableStream(), batch_size=4, num_workers=workers)
    error = caught(loader)
    assert isinstance(error, SampleError)
    assert isinstance(error, FileNotFoundError)
    assert error.filename == "shards.tar"


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_worker_init_failure(start: str) -> None:
    loader = SafeDataLoader(
        faults.Raises(at=-1),
        batch_size=4,
        num_workers=2,
        worker_init_fn=faults.init_raises,
        multiprocessing_context=start,
    )
    iterator = iter(loader)
    assert next(iterator).tolist() == [0, 1, 2, 3]
    error = caught(iterator)
    assert isinstance(error, WorkerInitError)
    assert isinstance(error, FileNotFoundError)
    assert error.filename == "lexicon.txt"
    assert error.failure is not None
    assert (error.failure.phase, error.failure.worker_id) == ("init", 1)
    assert "init_raises" in error.failure.traceback
    assert next(iterator).tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize("workers", WORKERS)
def test_sampler_failure_loses_no_batch_before_it(workers: int) -> None:
    loader = SafeDataLoader(
        faults.Raises(at=-1), batch_size=2, sampler=faults.RaisingSampler(), num_workers=workers
    )
    iterator = iter(loader)
    got: list[int] = []
    error = caught(got.extend(batch.tolist()) for batch in iterator)
    assert isinstance(error, SamplerError)
    assert isinstance(error, KeyError)
    assert got == [0, 1, 2, 3, 4, 5]
    assert error.failure.batch == 3
    assert "no such stratum" in str(error)
    assert "faults.py" in error.failure.traceback
    assert list(iterator) == []
    assert loader.audit is not None
    assert not loader.audit.complete


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("batch_size", [1, None])
def test_sampler_that_cannot_start(batch_size: int | None, workers: int) -> None:
    loader = SafeDataLoader(
        faults.Raises(), batch_size, sampler=faults.UnstartableSampler(), num_workers=workers
    )
    error = caught(loader)
    assert isinstance(error, SamplerError)
    assert isinstance(error, KeyError)
    assert "no strata" in str(error)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("None", "dataset index 13 (position 1) is None"),
        ("key", "dataset index 13 (position 1) has no key 'feature'; the other 3 have it"),
        ("shape", "dataset index 13 (position 1) has shape [4]"),
    ],
)
def test_collate_failure_names_the_odd_sample_out(how: str, says: str, workers: int) -> None:
    error = caught(SafeDataLoader(faults.Ragged(how), batch_size=4, num_workers=workers))
    assert isinstance(error, CollateError)
    assert says in str(error)
    assert (error.index, error.failure.position) == (13, 1)  # type: ignore[union-attr]
    assert error.failure.phase == "collate"  # type: ignore[union-attr]


@pytest.mark.parametrize("workers", WORKERS)
def test_own_collate_function_that_raises_or_stops(workers: int) -> None:
    for collate, also in ((faults.collate_raises, ValueError), (faults.collate_stops, Exception)):
        loader = SafeDataLoader(
            faults.Raises(at=-1), batch_size=4, num_workers=workers, collate_fn=collate
        )
        error = caught(loader)
        assert isinstance(error, CollateError)
        assert isinstance(error, also)
        assert error.failure.indices == (12, 13, 14, 15)


@pytest.mark.parametrize("workers", WORKERS)
def test_key_that_raises_is_told_as_such(workers: int) -> None:
    for key, at in ((faults.key_raises, 13), (faults.key_unhashable, 0)):
        loader = SafeDataLoader(faults.Raises(at=-1), batch_size=4, num_workers=workers, key=key)
        error = caught(loader)
        assert isinstance(error, SampleError)
        assert error.index == at
        assert "raised by key=" in str(error)


@pytest.mark.parametrize("workers", WORKERS)
def test_batch_whose_pinning_raises(workers: int) -> None:
    """Without an accelerator torch pins nothing, so the parcel's own method is called here."""
    manifest = BatchManifest(0, None, os.getpid(), b"", 0, None, b"", False, None)
    failed = DeliveredBatch(manifest, faults.PinningFails(1)).pin_memory()
    assert failed.failure is not None  # type: ignore[union-attr]
    assert failed.failure.phase == "transport"  # type: ignore[union-attr]
    assert failed.failure.exception_type == "BufferError"  # type: ignore[union-attr]
    from safeloader.errors import error_from

    error = error_from(failed.failure)  # type: ignore[union-attr,arg-type]
    assert isinstance(error, TransportError)
    assert isinstance(error, BufferError)
    assert str(error).startswith("Caught BufferError in pin memory thread.")


def test_dataset_state_tells_what_changed_and_what_was_lost() -> None:
    loader = SafeDataLoader(
        faults.LosesAttribute(), batch_size=4, num_workers=1, multiprocessing_context="spawn"
    )
    loader.dataset.epoch = 3  # type: ignore[attr-defined]
    error = caught(loader)
    assert isinstance(error, AttributeError)
    assert error.failure is not None
    state = error.failure.dataset_state
    assert state is not None
    assert state["class"] == "tests.faults.LosesAttribute"
    assert state["length"] == 8
    assert "lost on the way" in state["differs_from_main"]["handle"]
    assert "handle" in str(error)

    error = caught(SafeDataLoader(faults.Raises(), batch_size=4, num_workers=2))
    assert error.failure is not None
    state = error.failure.dataset_state
    assert state is not None
    assert state["changed_since_worker_start"]["fetched"] == "was 0, now 6"
    assert "hf_verysecret" not in str(error)
    assert "hf_verysecret" not in json.dumps(error.failure.to_dict())


def test_failure_is_frozen_and_compares() -> None:
    failure = Failure(phase="sample", exception_type="KeyError", message="x", index=3)
    with pytest.raises(AttributeError):
        failure.index = 4  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(failure)) == failure


def test_nothing_in_torch_is_changed_in_this_process() -> None:
    from torch.utils.data import _utils
    from torch.utils.data.dataloader import _DatasetKind

    before = {
        "create": _DatasetKind.create_fetcher,
        "pin": _utils.pin_memory.pin_memory,
        "loop": _utils.worker._worker_loop,
        "iter": DataLoader.__iter__,
        "collate": dict(_utils.collate.default_collate_fn_map),
    }
    for workers in WORKERS:
        list(SafeDataLoader(datasets.Noisy(), 4, num_workers=workers))
        caught(SafeDataLoader(faults.Raises(), 4, num_workers=workers))
    assert before == {
        "create": _DatasetKind.create_fetcher,
        "pin": _utils.pin_memory.pin_memory,
        "loop": _utils.worker._worker_loop,
        "iter": DataLoader.__iter__,
        "collate": dict(_utils.collate.default_collate_fn_map),
    }
