"""The notebook keeps the newest batches within its bound, and takes about the bytes it says."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import safeloader
from safeloader import Recorder, SafeDataLoader
from safeloader.delivery.indices import pack
from safeloader.delivery.manifest import BatchManifest, SampleIncident
from safeloader.introspect.values import weight

REPOSITORY = Path(safeloader.__file__).parents[1]


def manifest_from_a_worker(indices: list[Any]) -> BatchManifest:
    """The manifest of one batch, as they come out of the queue."""
    loader = SafeDataLoader(_AnyIndex(), sampler=indices, batch_size=len(indices))
    for _ in loader:
        pass
    assert loader.recorder is not None
    (delivery,) = loader.recorder.deliveries()
    return pickle.loads(pickle.dumps(delivery.manifest))  # type: ignore[no-any-return]


class _AnyIndex:
    def __getitem__(self, index: Any) -> int:
        return 0

    def __len__(self) -> int:
        return 10**9


def fill(recorder: Recorder, manifest: BatchManifest, batches: int) -> None:
    pickled = pickle.dumps(manifest)
    epoch = recorder.begin_epoch(None)  # type: ignore[arg-type]
    for batch in range(batches):
        recorder.delivered(epoch, batch, 10_000 + batch, pickle.loads(pickled))


def read(loader: SafeDataLoader[Any], epochs: int = 1) -> None:
    for _ in range(epochs):
        for _ in loader:
            pass


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 64])
@pytest.mark.parametrize("named", [False, True])
def test_the_bound_is_within_a_factor_two_of_the_truth(size: int, named: bool) -> None:
    first = 10**8
    indices: list[Any] = [
        f"a name as long as names are, {first + k}" if named else first + k for k in range(size)
    ]
    manifest = manifest_from_a_worker(indices)
    bound = 2 * 2**20
    gc.collect()
    tracemalloc.start()
    try:
        recorder = Recorder(max_bytes=bound)
        fill(recorder, manifest, 6_000 if size == 1 else 3_000)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert recorder.forgotten
    assert bound / 2 < held < bound * 2


def test_the_newest_are_kept_and_the_oldest_forgotten() -> None:
    loader = SafeDataLoader(range(3_000), batch_size=1, recorder=Recorder(max_bytes=100_000))
    read(loader)
    recorder = loader.recorder
    assert recorder is not None
    kept = [delivery.batch for delivery in recorder.deliveries()]
    assert 50 < len(kept) < 1_000
    assert kept == list(range(3_000 - len(kept), 3_000))
    assert recorder.forgotten == 3_000 - len(kept)
    last = recorder.last_delivery()
    assert last is not None
    assert last.batch == 2_999
    assert recorder.find(2_999, 0) is not None
    assert recorder.find(kept[0], None) is not None
    assert recorder.find(kept[0] - 1, None) is None
    assert loader.audit is not None
    assert loader.audit.delivered == 3_000


def test_whole_epochs_are_forgotten_too() -> None:
    recorder = Recorder(max_bytes=20_000)
    read(SafeDataLoader(range(20), recorder=recorder), epochs=5)
    kept = [(delivery.epoch, delivery.batch) for delivery in recorder.deliveries()]
    assert kept == sorted(kept)
    assert kept[-1] == (4, 19)
    assert recorder.epochs == 5
    assert recorder.forgotten == 100 - len(kept) > 0
    assert recorder.find(0, 0) is None


def test_the_last_batch_is_kept_however_small_the_bound() -> None:
    loader = SafeDataLoader(range(9), batch_size=3, recorder=Recorder(max_bytes=1))
    read(loader)
    assert loader.last_batch is not None
    assert loader.last_batch.indices == (6, 7, 8)
    assert loader.recorder is not None
    assert loader.recorder.forgotten == 2
    assert len(loader.provenance) == 3


def test_nothing_is_forgotten_within_the_bound() -> None:
    loader = SafeDataLoader(range(50), batch_size=5)
    read(loader, epochs=2)
    assert loader.recorder is not None
    assert loader.recorder.forgotten == 0
    assert len(list(loader.recorder.deliveries())) == 20


def test_keys_are_not_kept() -> None:
    loader = SafeDataLoader(range(9), batch_size=3, key=_large_key)
    read(loader)
    assert loader.recorder is not None
    assert len(pickle.dumps(list(loader.recorder.deliveries()))) < 10_000


@pytest.mark.parametrize("field", ["keys", "fingerprints", "failures"])
def test_what_was_used_already_is_not_kept(field: str) -> None:
    plain = BatchManifest(3, 1, 77, pack([5, 6]), 2, None, b"\0" * 24)
    recorder = Recorder()
    recorder.delivered(0, 0, 5, plain._replace(**{field: ("of any size",)}))
    (delivery,) = recorder.deliveries()
    assert delivery == (0, 0, 5, 0, plain)


def held_bytes(recorder: Recorder) -> int:
    found = re.search(r"(\d+) of \d+ bytes", repr(recorder))
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize(("index", "reason"), [("i" * 5000, "why"), ("i", "why" * 1700)])
def test_skipped_samples_count_with_their_indices_and_reasons(index: str, reason: str) -> None:
    skipped = SampleIncident("skipped", 0, reason)
    manifest = BatchManifest(0, 0, 1, (index,), 1, stamps=b"\0" * 24, incidents=(skipped,))
    recorder = Recorder(max_bytes=50_000)
    for batch in range(30):
        recorder.delivered(0, batch, 5, manifest)
        held = [delivery.manifest[3:] for delivery in recorder.deliveries()]
        assert sum(len(pickle.dumps(each)) for each in held) <= held_bytes(recorder) <= 50_000
    assert recorder.forgotten
    assert len(held) > 4


def test_one_large_batch_makes_many_small_ones_go() -> None:
    recorder = Recorder(max_bytes=100_000)
    small = BatchManifest(0, 0, 1, pack([7]), 1, stamps=b"\0" * 24)
    for batch in range(140):
        recorder.delivered(0, batch, 5, small)
    assert recorder.forgotten == 0
    recorder.delivered(0, 140, 5, small._replace(indices=("i" * 50_000,)))
    assert held_bytes(recorder) <= 100_000
    kept = [delivery.batch for delivery in recorder.deliveries()]
    assert kept == list(range(recorder.forgotten, 141))
    assert len(kept) > 50


def _large_key(sample: int) -> bytes:
    return b"%d" % sample * 50_000


def test_a_blank_recorder() -> None:
    recorder = Recorder()
    assert (recorder.epochs, recorder.forgotten, recorder.max_bytes) == (0, 0, 64 * 2**20)
    assert recorder.last_delivery() is None
    assert recorder.audit() is None
    assert recorder.find(0, None) is None
    assert recorder.find(0, 0) is None
    assert list(recorder.deliveries()) == []
    assert repr(recorder) == f"Recorder(0 batches of 0 epochs, 0 of {64 * 2**20} bytes)"


def test_repr_says_how_full_it_is() -> None:
    loader = SafeDataLoader(range(9), batch_size=3)
    read(loader, epochs=2)
    assert repr(loader.recorder).startswith("Recorder(6 batches of 2 epochs, ")


def test_negative_numbers_are_no_python_indices() -> None:
    loader = SafeDataLoader(range(4))
    read(loader)
    assert loader.recorder is not None
    assert loader.recorder.find(-1, None) is None
    assert loader.recorder.find(0, -1) is None


@pytest.mark.parametrize(
    "cloned", [lambda it: pickle.loads(pickle.dumps(it)), copy.deepcopy, copy.copy]
)
def test_pickles_and_copies_are_blank_with_the_same_bound(cloned: Any) -> None:
    recorder = Recorder(max_bytes=12_345)
    read(SafeDataLoader(range(9), recorder=recorder))
    clone = cloned(recorder)
    assert type(clone) is Recorder
    assert clone is not recorder
    assert (clone.max_bytes, clone.epochs, clone.forgotten) == (12_345, 0, 0)
    assert list(clone.deliveries()) == []
    assert clone.audit() is None
    assert recorder.epochs == 1


@pytest.mark.parametrize("bad", [0, -1, 1.5, "64 MB", None, True, float("inf")])
def test_a_bad_bound_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="max_bytes must be a positive int") as info:
        Recorder(max_bytes=bad)
    assert repr(bad) in str(info.value)


def test_two_loaders_share_one_notebook() -> None:
    recorder = Recorder()
    one = SafeDataLoader(range(4), batch_size=2, recorder=recorder)
    other = SafeDataLoader("abc", batch_size=3, recorder=recorder)
    read(one)
    read(other)
    assert one.recorder is other.recorder is recorder
    assert recorder.epochs == 2
    assert one.last_batch == other.last_batch
    assert one.last_batch is not None
    assert (one.last_batch.epoch, one.last_batch.indices) == (1, (0, 1, 2))
    assert one.provenance.batch(0, epoch=0).indices == (0, 1)


def test_interleaved_epochs_keep_their_numbers() -> None:
    loader = SafeDataLoader(range(4), batch_size=2)
    first = iter(loader)
    next(first)
    second = iter(loader)
    next(second)
    next(first)
    assert loader.recorder is not None
    noted = [(delivery.epoch, delivery.batch) for delivery in loader.recorder.deliveries()]
    assert noted == [(0, 0), (1, 0), (0, 1)]
    assert loader.last_batch is not None
    assert (loader.last_batch.epoch, loader.last_batch.indices) == (0, (2, 3))


# ── a notebook that nobody wrote in ──────────────────────────────────────────────────────────────


def said_at_exit(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from safeloader import SafeDataLoader\n" + program],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stderr


@pytest.mark.parametrize(
    "failing",
    [
        "SafeDataLoader([1, None], batch_size=2)",
        "SafeDataLoader([lambda: 1], num_workers=1, multiprocessing_context='spawn')",
        "SafeDataLoader(NoStream())",
    ],
    ids=["a batch", "the start of the workers", "the start of the stream"],
)
def test_after_an_error_nothing_is_said_of_the_loaders_it_kept_from_running(failing: str) -> None:
    program = f"""
from torch.utils.data import IterableDataset
class NoStream(IterableDataset):
    def __iter__(self):
        raise OSError("no such shard")
import warnings
warnings.simplefilter("ignore")
a, b = {failing}, SafeDataLoader([1])
try:
    list(a)
except Exception:
    pass
"""
    assert "never delivered" not in said_at_exit(program)


@pytest.mark.parametrize("end", ["", "; del a, b"], ids=["alive at the end", "freed before"])
def test_loaders_that_never_delivered_are_told_of_once_at_the_end(end: str) -> None:
    said = said_at_exit("a, b = SafeDataLoader([1]), SafeDataLoader([2])" + end)
    assert said.count("2 SafeDataLoader(s) never delivered a batch") == 1
    assert "give what it hands back to safeloader.instrument, or start the program with" in said
    assert "made at <string>:2" in said
    assert "a framework made them again" in said


@pytest.mark.parametrize(
    "program",
    [
        "list(SafeDataLoader([1]))",
        "loader = SafeDataLoader([1])\nfor batch in loader: break",
        "from safeloader import Recorder\nloader = SafeDataLoader([1], recorder=Recorder())",
    ],
)
def test_nothing_is_said_where_there_is_nothing_to_say(program: str) -> None:
    assert said_at_exit(program) == ""


def test_nothing_is_said_when_switched_off() -> None:
    assert said_at_exit("loader = SafeDataLoader([1])", SAFELOADER="off") == ""


class FailsAtLength:
    """Skipped samples with long reasons, under indices that are long themselves."""

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: Any) -> int:
        raise ValueError("why it failed, at length: " + 4 * str(index)[:80])


@pytest.mark.uncovered
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["short", "long", "pairs"])
def test_skipped_samples_stay_within_the_bound_too(kind: str) -> None:
    bound = 1 << 20
    kinds: dict[str, Any] = {
        "short": range(3_000),
        "long": [f"{k}" * 2_000 for k in range(1_000, 1_500)],
        "pairs": [(f"{k}" * 1_000, k) for k in range(1_000, 1_500)],
    }
    loader = SafeDataLoader(
        FailsAtLength(),  # type: ignore[arg-type]
        batch_size=4,
        sampler=kinds[kind],
        on_error=lambda failure: 0,
        max_skipped=10**6,
        recorder=Recorder(max_bytes=bound),
    )
    read(loader)
    recorder, audit = loader.recorder, loader.audit
    assert recorder is not None
    assert recorder.forgotten
    held = [(d.manifest.indices, d.manifest.incidents) for d in recorder.deliveries()]
    assert len(pickle.dumps(held)) < bound
    assert audit is not None
    assert audit.counts["replaced"] == len(kinds[kind])
    assert len(pickle.dumps(audit.reasons)) < bound


def test_the_size_of_an_index_is_measured_and_not_asked_for() -> None:
    class Index:
        def __init__(self) -> None:
            self.path = "x" * 10_000

        def __sizeof__(self) -> int:
            pytest.fail("the user's code was called")

    assert weight(Index()) > 10_000
    assert weight(("x" * 10_000, [b"y" * 10_000])) > 20_000
