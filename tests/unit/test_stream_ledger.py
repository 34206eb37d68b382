"""Each worker notes in shared memory how far its stream is; main reads it, nothing is left over."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeloader import SafeDataLoader
from safeloader.transport.stream_progress import StreamProgress
from tests import datasets


def write_from_a_worker(progress: StreamProgress, worker: int) -> None:
    progress.write(worker, 10 + worker, worker, True)


@pytest.mark.parametrize("shared", [False, True])
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(0, 2**63 - 1), st.integers(0, 2**62), st.booleans()
        )
    )
)
def test_the_board_holds_what_each_worker_wrote_last(
    shared: bool, writes: list[tuple[int, int, int, bool]]
) -> None:
    progress = StreamProgress(4, shared=shared)
    expected = dict.fromkeys(range(4), (0, 0, False))
    for worker, read, dropped, ended in writes:
        progress.write(worker, read, dropped, ended)
        expected[worker] = read, dropped, ended
    assert {worker: progress.read(worker) for worker in range(4)} == expected


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_row_for_every_worker(shared: bool, workers: int) -> None:
    progress = StreamProgress(workers, shared=shared)
    assert progress.read(workers - 1) == (0, 0, False)
    assert type(progress.read(0)[2]) is bool


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_main_reads_what_workers_wrote_under_every_start_method(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    progress = StreamProgress(2, shared=True)
    workers = [context.Process(target=write_from_a_worker, args=(progress, n)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert [progress.read(n) for n in range(2)] == [(10, 0, True), (11, 1, True)]


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs /dev/shm")
def test_no_file_stands_in_shared_memory_meanwhile_or_afterwards() -> None:
    mine = f"pym-{os.getpid()}-"
    progress = StreamProgress(64, shared=True)
    progress.write(63, 1, 0, True)
    assert [path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(mine)] == []


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_ends_where_the_board_says(workers: int, drop_last: bool) -> None:
    loader = SafeDataLoader(
        datasets.Stream(11), batch_size=4, num_workers=workers, drop_last=drop_last
    )
    for _ in range(2):
        delivered = sum(len(numbers) for numbers, _ in loader)
        audit = loader.audit
        assert audit is not None
        assert (audit.drawn, audit.delivered) == (11, delivered)
        assert audit.complete
        assert audit.ok
        assert len(audit.dropped) == 11 - delivered
        assert (delivered == 8) == drop_last


def test_without_shared_memory_streams_run_unchecked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_left(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safeloader.transport.stream_progress.RawArray", none_left)
    loader = SafeDataLoader(datasets.Stream(11), batch_size=4, num_workers=1)
    assert sum(len(numbers) for numbers, _ in loader) == 11
    (said,) = caplog.messages
    assert said.startswith(
        "SafeDataLoader over Stream: the ends of the streams cannot be checked: no shared memory"
    )
    assert loader.audit is not None
    assert (loader.audit.delivered, loader.audit.ok) == (11, True)
