"""What was warned of at the start is told again at the error that came out of it."""

from __future__ import annotations

import sqlite3
import threading
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

from safeloader import SafeDataLoader, SafeLoaderError, WorkerTimeoutError
from safeloader.introspect.advice import CONNECTION, FILE, LAZILY, library_of_thread
from safeloader.introspect.suspects import Inherited, suspect_of
from safeloader.introspect.threads import threads_here

BAD = 13


class Archive(Dataset[int]):
    """One of its files is damaged: that is an error of ``zipfile``, whoever opened it."""

    def __init__(self, path: Path, *, lazily: bool) -> None:
        self.path, self.lazily = path, lazily
        self.names = [f"{number}.png" for number in range(20)]
        self.archive = None if lazily else zipfile.ZipFile(path)

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        if self.archive is None:
            self.archive = zipfile.ZipFile(self.path)
        return len(self.archive.read(self.names[index]))


class Elsewhere(Archive):
    """Its error has nothing to do with the archive."""

    def __getitem__(self, index: int) -> int:
        return 1 // (index - BAD)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(20):
            archive.writestr(f"{number}.png", b"%04d" % number * 50)
        at = archive.getinfo(f"{BAD}.png").header_offset
    damaged = bytearray(path.read_bytes())
    damaged[at : at + 4] = b"????"
    path.write_bytes(damaged)
    return path


def error_of(dataset: Dataset[int], workers: int, batch_size: int = 4) -> SafeLoaderError:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the warning of the start
        with pytest.raises(SafeLoaderError) as caught:
            list(
                SafeDataLoader(
                    dataset,
                    batch_size=batch_size,
                    num_workers=workers,
                    multiprocessing_context="fork" if workers else None,
                )
            )
    return caught.value


def test_an_error_in_an_inherited_object_names_it(path: Path) -> None:
    dataset = Archive(path, lazily=False)
    # One batch: one worker reads, and nobody moves the position it shares.
    error = error_of(dataset, 2, batch_size=len(dataset))
    assert isinstance(error, zipfile.BadZipFile)
    assert error.index == BAD
    told = str(error)
    assert "first suspect: dataset.archive (zipfile.ZipFile), inherited over the fork" in told
    assert "share one read position" in told
    assert told.endswith("it is no way to see this")
    assert LAZILY in told.splitlines()[-1]
    dataset.archive.close()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "lazily", "workers"),
    [(Archive, True, 2), (Archive, False, 0), (Elsewhere, False, 2)],
    ids=["opened in the worker", "no worker", "another error"],
)
def test_elsewhere_nobody_is_suspected(
    kind: type[Archive], lazily: bool, workers: int, path: Path
) -> None:
    dataset = kind(path, lazily=lazily)
    told = str(error_of(dataset, workers))
    assert "first suspect" not in told
    assert "replay(error, loader.dataset) repeats the call" in told
    if dataset.archive is not None:
        dataset.archive.close()


# ── which it is ──────────────────────────────────────────────────────────────────────────────────


class Holding:
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    def reads(self) -> Any:
        return self.database.execute("no sql")

    def reads_another(self) -> Any:
        return self.other.read()


def raised(call: Any) -> Exception:
    try:
        call()
    except Exception as exc:
        return exc
    pytest.fail("nothing was raised")


def test_it_goes_by_the_attribute_or_by_the_library() -> None:
    first, second = sqlite3.connect(":memory:"), sqlite3.connect(":memory:")
    dataset = Holding(database=first, other=None)
    known = Inherited("dataset.database", "sqlite3.Connection", *CONNECTION, id(first))
    by_library = Inherited("dataset.__getitem__.__closure__['db']", "sqlite3.Connection", *FILE)
    failed, other = raised(dataset.reads), raised(dataset.reads_another)
    assert suspect_of(failed, [known], dataset) is known
    assert known.says.startswith("first suspect: dataset.database (")
    assert suspect_of(failed, [by_library], dataset) is by_library
    assert suspect_of(other, [known, by_library], dataset) is None
    dataset.database = second  # made anew in the worker
    assert suspect_of(raised(dataset.reads), [known], dataset) is None
    first.close()
    second.close()


# ── hangs ────────────────────────────────────────────────────────────────────────────────────────


class Pooled(Dataset[int]):
    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(2)
        assert list(self.pool.map(abs, range(4)))  # its threads are there

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return sum(self.pool.map(abs, [index]))


@pytest.mark.slow
def test_an_inherited_pool_is_the_first_suspect_at_the_hang() -> None:
    dataset = Pooled()
    loader = SafeDataLoader(
        dataset, batch_size=4, num_workers=1, timeout=2, multiprocessing_context="fork"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(WorkerTimeoutError) as caught:
            list(loader)
    dataset.pool.shutdown()
    hint = caught.value.failure.hint  # type: ignore[union-attr]
    assert "first suspect: dataset.pool (concurrent.futures.thread.ThreadPoolExecutor)" in hint
    assert LAZILY[1:] in hint


def test_threads_are_known_by_their_names() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="polars-77")
    other = threading.Thread(target=done.wait, name="mine")
    before = threads_here().get("Python", ())
    thread.start()
    other.start()
    try:
        found = threads_here()
    finally:
        done.set()
        thread.join()
        other.join()
    assert "polars-77" in found["polars"]
    assert len(found["Python"]) > len(before) or "mine" in found["Python"]
    assert "polars-77" not in threads_here().get("polars", ())


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("polars-12", "polars"),
        ("av:mpeg4:df0", "PyAV (FFmpeg)"),
        ("tokio-rt-worker", "tokio (the runtime of libraries written in Rust)"),
        ("jemalloc_bg_thd", ""),  # it forks as it should, and our own run's folder has it
        ("tf_Compute", "TensorFlow"),
        ("grpc_global_tim", "gRPC"),
        ("python", ""),
        ("pt_main_thread", ""),
        ("pt_autograd_0", ""),
    ],
)
def test_whose_a_thread_is(name: str, library: str) -> None:
    assert library_of_thread(name) == library
