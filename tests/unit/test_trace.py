"""Tracing says everything as it happens, in lines or in a file that viewers open, at no risk."""

from __future__ import annotations

import gc
import gzip
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Subset

import safeloader
from safeloader import Recorder, SafeDataLoader
from safeloader.delivery.indices import pack
from safeloader.delivery.manifest import BatchManifest
from safeloader.failures.failure import Failure
from safeloader.provenance.trace import FileTrace
from tests import datasets, faults

REPOSITORY = Path(safeloader.__file__).parents[1]
WORKERS = [0, 2]


@pytest.fixture(autouse=True)
def own_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the package's logger, and the switch, as they were."""
    monkeypatch.delenv("SAFELOADER_TRACE", raising=False)
    logger = logging.getLogger("safeloader")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged, without the name of the loader at the head of each line."""
    named = [message.partition(": ") for message in caplog.messages]
    assert all(name.startswith("SafeDataLoader over ") for name, _, _ in named)
    return [line for _, _, line in named]


def read(loader: Any, epochs: int = 1) -> int:
    return sum(1 for _ in range(epochs) for _ in loader)


def run(program: str, *arguments: object, **environment: str) -> Any:
    """The program in a process of its own."""
    before = "import sys, os, logging\nfrom safeloader import SafeDataLoader, Recorder\n"
    kept = {name: value for name, value in os.environ.items() if name != "SAFELOADER_TRACE"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", before + program, *map(str, arguments)],
        cwd=REPOSITORY,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# ── which trace ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("environment", "trace", "logs"),
    [
        (None, None, False),
        ("", None, False),
        ("0", None, False),
        ("1", None, True),
        ("1", False, False),
        (None, True, True),
        ("0", True, True),
        (None, False, False),
    ],
)
def test_who_decides_whether_lines_are_logged(
    environment: str | None,
    trace: bool | None,
    logs: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    if environment is not None:
        monkeypatch.setenv("SAFELOADER_TRACE", environment)
    with caplog.at_level(logging.INFO, "safeloader"):
        assert read(SafeDataLoader([1, 2], trace=trace)) == 2
    assert bool(caplog.records) == logs
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("by", ["environment", "string", "path", "both"])
def test_a_folder_is_made_and_gets_a_file(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "deep" / "traces"
    trace = {"string": str(folder), "path": folder, "both": folder}.get(by)
    if by in ("environment", "both"):
        monkeypatch.setenv("SAFELOADER_TRACE", str(folder if by == "environment" else tmp_path))
    with caplog.at_level(logging.INFO, "safeloader"):
        loader = SafeDataLoader([1, 2], trace=trace)
        assert list(tmp_path.iterdir()) == []
        read(loader)
    assert len(list(folder.glob("*.json.gz"))) == 1
    assert caplog.records == []


@pytest.mark.parametrize("folder", ["/proc/traces", "/proc/self/status", "/proc/self/status/x"])
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder nobody can write to")
def test_a_folder_that_cannot_be_written_is_refused_at_construction(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="cannot be written") as info:
        SafeDataLoader([1], trace=folder)
    assert repr(folder) in str(info.value)
    monkeypatch.setenv("SAFELOADER_TRACE", folder)
    with pytest.raises(ValueError, match="SAFELOADER_TRACE"):
        SafeDataLoader([1])


@pytest.mark.parametrize("bad", [3.5, 1, [], b"x"])
def test_a_trace_of_another_kind_is_a_type_error(bad: Any) -> None:
    with pytest.raises(TypeError, match="trace must be None"):
        SafeDataLoader([1], trace=bad)


def test_the_attribute_may_be_changed_between_epochs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = SafeDataLoader([1, 2])
    with caplog.at_level(logging.INFO, "safeloader"):
        read(loader)
        assert caplog.records == []
        loader.trace = True
        read(loader)
        lines = len(caplog.records)
        assert lines
        loader.trace = tmp_path
        read(loader)
        loader.trace = False
        read(loader)
    assert len(caplog.records) == lines
    assert len(list(tmp_path.iterdir())) == 1


# ── log lines ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", WORKERS)
def test_lines_tell_of_draws_fetches_hand_overs_and_the_audit(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "safeloader"):
        loader = SafeDataLoader("abcdef", batch_size=2, num_workers=workers, trace=True)
        read(loader)
    assert {record.levelno for record in caplog.records} == {logging.INFO}
    assert {record.name for record in caplog.records} == {"safeloader"}
    lines = lines_of(caplog)
    draws = [line for line in lines if "drew batch" in line]
    assert draws == [f"epoch 0: drew batch {n}: {[2 * n, 2 * n + 1]}" for n in range(3)]
    fetches = [line for line in lines if " fetched index " in line]
    for number, line in enumerate(fetches):
        who = f"worker {number // 2 % workers}" if workers else "main process"
        wanted = (
            rf"epoch 0: {who} \(pid \d+\) fetched index {number} for batch {number // 2}, "
            rf"position {number % 2}, in \d+\.\d+ ms"
        )
        assert re.fullmatch(wanted, line)
    assert len(fetches) == 6
    handed = [line for line in lines if "handed over" in line]
    assert len(handed) == 3
    for number, line in enumerate(handed):
        who = f"worker {number % workers}" if workers else "main process"
        assert re.fullmatch(
            rf"epoch 0: handed over batch {number} from {who}: 2 samples, "
            r"collated in \d+\.\d+ ms, the loop waited \d+\.\d+ ms",
            line,
        )
    assert [line for line in lines if "delivered" in line] == [str(loader.audit)]
    assert lines[0] == draws[0]
    assert len(lines) == 3 + 6 + 3 + 1


def test_lines_say_that_samples_of_one_call_have_shares_of_its_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    together: Any = datasets.Together()
    with caplog.at_level(logging.INFO, "safeloader"):
        read(SafeDataLoader(Subset(together, [4, 2, 0, 1]), batch_size=3, trace=True))
    fetches = [line for line in lines_of(caplog) if " fetched index " in line]
    shares = [line.partition(" ms")[2] for line in fetches]
    assert shares == [", an equal share of 3 timed together"] * 3 + [""]


def test_lines_tell_of_failures(caplog: pytest.LogCaptureFixture) -> None:
    loader = SafeDataLoader(faults.Raises(at=5), batch_size=4, trace=True)
    with caplog.at_level(logging.INFO, "safeloader"), pytest.raises(KeyError):
        read(loader)
    assert "epoch 0: KeyError at index 5, batch 1 (sample)" in lines_of(caplog)


def test_lines_of_a_stream_name_worker_and_ordinal(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "safeloader"):
        read(SafeDataLoader(datasets.Stream(5), batch_size=2, num_workers=2, trace=True))
    assert any(
        "worker 1 (pid " in line and "fetched index (1, 0)" in line for line in caplog.messages
    )


@pytest.mark.parametrize("value", ["1", "0"])
def test_lines_go_to_stderr_where_logging_is_not_configured(value: str) -> None:
    done = run("print(len(list(SafeDataLoader([1, 2], batch_size=2))))", SAFELOADER_TRACE=value)
    assert (done.returncode, done.stdout) == (0, "1\n")
    lines = done.stderr.splitlines()
    if value == "0":
        assert lines == []
        return
    assert len(lines) == 6
    assert all(
        re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} safeloader ", line) for line in lines
    )
    assert "drew batch 0: [0, 1]" in lines[0]
    assert lines[-2].endswith("epoch 0: complete, ok; 2 drawn, 2 delivered")
    assert "SafeDataLoader over list (2): 1 epoch, 2 samples in 1 batch (" in lines[-1]


def test_two_loaders_log_each_line_once_and_under_their_names() -> None:
    done = run(
        "for loader in [SafeDataLoader([1]), SafeDataLoader((2, 3))]: list(loader)",
        SAFELOADER_TRACE="1",
    )
    assert done.stderr.count("handed over batch 0") == 2
    for name in ("list (1)", "tuple (2)"):
        assert f"SafeDataLoader over {name}: epoch 0: handed over batch 0" in done.stderr


CONFIGURED = """
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="mine %(message)s")
list(SafeDataLoader([1, 2], batch_size=2))
"""

OWN_HANDLER = """
logger = logging.getLogger("safeloader")
logger.propagate = False
logger.addHandler(logging.StreamHandler(sys.stdout))
list(SafeDataLoader([1, 2], batch_size=2))
assert len(logger.handlers) == 1
"""

STRICT_HANDLER = """
handler = logging.StreamHandler(sys.stdout)
handler.setLevel(logging.WARNING)
logging.getLogger().addHandler(handler)
list(SafeDataLoader([1, 2], batch_size=2))
"""

DISABLED = """
logging.disable(logging.CRITICAL)
list(SafeDataLoader([1, 2], batch_size=2))
"""


@pytest.mark.parametrize(
    ("program", "lines"),
    [(CONFIGURED, 6), (OWN_HANDLER, 6), (STRICT_HANDLER, 0), (DISABLED, 0)],
    ids=["root configured", "handler of its own", "handler above INFO", "disabled"],
)
def test_the_users_own_logging_is_respected(program: str, lines: int) -> None:
    done = run(program, SAFELOADER_TRACE="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == lines
    if program is CONFIGURED:
        assert all(
            line.startswith("mine SafeDataLoader over list (2): ")
            for line in done.stdout.splitlines()
        )


def test_an_index_that_cannot_be_shown_does_no_harm_to_the_lines(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "safeloader"):
        loader = SafeDataLoader(AnyIndex(), sampler=[Unshowable(1)], trace=True)
        assert read(loader) == 1
    assert any(f"fetched index <{__name__}.Unshowable" in line for line in lines_of(caplog))


# ── the trace file ───────────────────────────────────────────────────────────────────────────────


class AnyIndex:
    def __init__(self, length: int = 10) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> int:
        return 0


class Unshowable:
    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unshowable) and other.number == self.number

    def __hash__(self) -> int:
        return self.number

    def __repr__(self) -> str:
        pytest.fail("the user's code was called")


def trace_file(folder: Path) -> Path:
    (path,) = folder.glob("safeloader-*.json.gz")
    return path


def text_in(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode()


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a file, each by the rules of the Trace Event Format."""
    events = json.loads(text, parse_constant=pytest.fail)
    assert isinstance(events, list)
    for event in events:
        assert set(event) <= ALLOWED[event["ph"]] | EVERY, event
        assert set(event) >= (NEEDED[event["ph"]] | EVERY) - {"args"}, event
        assert type(event["pid"]) is type(event["tid"]) is int
        assert type(event["name"]) is str
        for time_us in (event.get("ts", 0), event.get("dur", 0)):
            assert type(time_us) is int
            assert time_us >= 0
        if event["ph"] == "C":
            assert all(type(value) is float for value in event["args"].values())
    return events


EVERY = {"ph", "pid", "tid", "name", "args"}
NEEDED = {
    "M": {"args"},
    "X": {"ts", "dur", "cat"},
    "i": {"ts", "s", "cat"},
    "C": {"ts", "args"},
    "s": {"ts", "id", "cat"},
    "f": {"ts", "id", "cat", "bp"},
}
ALLOWED = NEEDED


def events_in(folder: Path) -> list[dict[str, Any]]:
    return events_of(text_in(trace_file(folder)))


def traced(folder: Path, dataset: Any, *, epochs: int = 1, **arguments: Any) -> list[Any]:
    """The events of a loader that is gone."""
    loader = SafeDataLoader(dataset, trace=folder, **arguments)
    read(loader, epochs)
    del loader
    return events_in(folder)


def having(events: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    return [event for event in events if fields.items() <= event.items()]


@pytest.mark.parametrize("workers", WORKERS)
def test_the_file_is_valid_json_once_the_loader_is_gone(workers: int, tmp_path: Path) -> None:
    events = traced(tmp_path, list(range(7)), batch_size=3, num_workers=workers, epochs=2)
    assert {event["ph"] for event in events} == {"M", "i", "X", "s", "f", "C"}
    assert {event["pid"] for event in events} == {os.getpid()}


def test_the_file_is_named_after_process_and_loader(tmp_path: Path) -> None:
    loaders = [SafeDataLoader([1, 2], trace=tmp_path) for _ in range(3)]
    for loader in loaders:
        read(loader, epochs=2)
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 3
    assert all(
        re.fullmatch(rf"safeloader-.+-rank0-{os.getpid()}-\d+\.json\.gz", name) for name in names
    )


@pytest.mark.parametrize("workers", WORKERS)
def test_main_and_every_worker_have_a_lane(workers: int, tmp_path: Path) -> None:
    events = traced(tmp_path, list(range(8)), batch_size=2, num_workers=workers, epochs=2)
    lanes = {e["tid"]: e["args"]["name"] for e in having(events, ph="M", name="thread_name")}
    assert lanes[0] == "main process"
    assert sorted(lanes) == list(range(workers + 1))
    for worker in range(workers):
        assert lanes[worker + 1] == f"worker {worker}"
    order = {e["tid"]: e["args"] for e in having(events, ph="M", name="thread_sort_index")}
    assert order == {tid: {"sort_index": tid} for tid in lanes}
    (process,) = having(events, ph="M", name="process_name")
    assert str(os.getpid()) in process["args"]["name"]
    assert len(having(events, ph="M", name="thread_name")) == len(lanes)


@pytest.mark.parametrize("workers", WORKERS)
def test_slices_for_every_sample_collation_and_wait(workers: int, tmp_path: Path) -> None:
    events = traced(tmp_path, list(range(8)), batch_size=3, num_workers=workers, epochs=2)
    samples = having(events, ph="X", cat="sample")
    assert [event["name"] for event in samples] == [f"sample {n}" for n in range(8)] * 2
    batches = [(epoch, batch) for epoch in range(2) for batch in range(3)]
    lane = [batch % workers + 1 if workers else 0 for _, batch in batches]
    assert [event["tid"] for event in samples] == [
        lane[3 * epoch + number // 3] for epoch in range(2) for number in range(8)
    ]
    collations = having(events, ph="X", cat="collate")
    assert [event["tid"] for event in collations] == lane
    waits = having(events, ph="X", cat="wait")
    assert [event["name"] for event in waits] == [f"wait for batch {n}" for _, n in batches]
    assert {event["tid"] for event in waits} == {0}
    assert [event["args"]["samples"] for event in waits] == [3, 3, 2] * 2
    for found in (collations, waits):
        assert [(e["args"]["epoch"], e["args"]["batch"]) for e in found] == batches
    draws = having(events, ph="i", cat="draw")
    assert [event["args"]["indices"] for event in draws][:3] == [
        "[0, 1, 2]",
        "[3, 4, 5]",
        "[6, 7]",
    ]
    audits = having(events, ph="i", cat="audit")
    assert [event["name"] for event in audits] == ["audit of epoch 0", "audit of epoch 1"]
    assert "8 drawn, 8 delivered" in audits[1]["args"]["audit"]


@pytest.mark.parametrize("workers", WORKERS)
def test_an_arrow_leads_from_each_collation_to_its_hand_over(workers: int, tmp_path: Path) -> None:
    events = traced(tmp_path, list(range(8)), batch_size=3, num_workers=workers, epochs=2)
    starts, finishes = having(events, ph="s"), having(events, ph="f")
    identities = [(event["cat"], event["name"], event["id"]) for event in starts]
    assert len(set(identities)) == 6
    assert identities == [(event["cat"], event["name"], event["id"]) for event in finishes]
    assert {event["bp"] for event in finishes} == {"e"}
    collations = having(events, ph="X", cat="collate")
    waits = having(events, ph="X", cat="wait")
    for ends, slices in ((starts, collations), (finishes, waits)):
        for end, inside in zip(ends, slices, strict=True):
            assert end["tid"] == inside["tid"]
            assert inside["ts"] <= end["ts"] <= inside["ts"] + inside["dur"]
    for start, finish in zip(starts, finishes, strict=True):
        assert start["ts"] <= finish["ts"] + 1


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("dataset", [datasets.Noisy(24), datasets.Together(24)])
def test_the_slices_of_a_lane_lie_apart_or_within_each_other(
    dataset: Any, workers: int, tmp_path: Path
) -> None:
    events = traced(tmp_path, dataset, batch_size=4, num_workers=workers)
    slices = sorted(having(events, ph="X"), key=lambda e: (e["tid"], e["ts"], -e["dur"]))
    for tid, lane in itertools.groupby(slices, key=lambda event: event["tid"]):
        open_until: list[float] = []
        for event in lane:
            begin, end = event["ts"], event["ts"] + event["dur"]
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            assert not open_until or end <= open_until[-1], (tid, event)
            open_until.append(end)


@pytest.mark.parametrize("workers", WORKERS)
def test_each_sample_says_where_it_was(workers: int, tmp_path: Path) -> None:
    loader = SafeDataLoader(
        range(8), batch_size=3, shuffle=True, num_workers=workers, trace=tmp_path
    )
    read(loader, epochs=2)
    names = ["epoch", "batch", "position", "index"]
    wanted = loader.provenance.to_numpy()[names].tolist()
    del loader
    samples = having(events_in(tmp_path), ph="X", cat="sample")
    assert [tuple(event["args"][name] for name in names) for event in samples] == wanted
    assert [event["name"] for event in samples] == [f"sample {row[3]}" for row in wanted]


@pytest.mark.parametrize("at_once", [False, True])
def test_what_the_loop_did_stands_between_the_waits_of_an_epoch(
    at_once: bool, tmp_path: Path
) -> None:
    loader = SafeDataLoader(range(9), batch_size=3, trace=tmp_path)
    if at_once:  # two epochs in each other: whose step it was cannot be told
        for _ in zip(loader, loader, strict=True):
            pass
    else:
        read(loader, epochs=2)
    del loader
    events = events_in(tmp_path)
    steps = having(events, ph="X", cat="train")
    places = [(event["args"]["epoch"], event["args"]["after_batch"]) for event in steps]
    assert places == ([] if at_once else [(0, 0), (0, 1), (1, 0), (1, 1)])
    waits = {
        (event["args"]["epoch"], event["args"]["batch"]): event
        for event in having(events, ph="X", cat="wait")
    }
    for (epoch, batch), step in zip(places, steps, strict=True):
        before, after = waits[epoch, batch], waits[epoch, batch + 1]
        assert step["ts"] == before["ts"] + before["dur"]
        assert step["ts"] + step["dur"] == after["ts"]


def test_a_counter_has_the_share_of_each_step_that_was_waited(tmp_path: Path) -> None:
    events = traced(tmp_path, range(9), batch_size=3)
    counts = having(events, ph="C", name="waiting for data, % of the step")
    steps = having(events, ph="X", cat="train")
    waits = having(events, ph="X", cat="wait")
    assert [event["ts"] for event in counts] == [
        waits[0]["ts"],
        *(event["ts"] for event in steps),
    ]
    shares = [
        100 * wait["dur"] / max(1, wait["dur"] + step["dur"])
        for wait, step in zip(waits[1:], steps, strict=True)
    ]
    told = [event["args"]["value"] for event in counts]
    assert told == pytest.approx([100, *shares], abs=0.06)


def test_a_counter_has_the_memory_of_the_workers_each_second(tmp_path: Path) -> None:
    told = iter([None, 3 << 20, 5 << 20])
    trace = FileTrace(tmp_path, memory=lambda: next(told))
    stamps = np.array([0, 5, 9], dtype=np.int64).tobytes()
    manifest = BatchManifest(0, 0, 1, pack([7]), 1, stamps=stamps)
    for batch, began_s in enumerate((1, 1.5, 2.5, 3, 4)):
        trace.delivered(0, batch, 0, manifest, int(began_s * 1e9))
    trace._finish()
    counts = having(events_in(tmp_path), ph="C", name="memory of the workers, MiB")
    assert [event["args"]["value"] for event in counts] == [3.0, 5.0]


def test_the_memory_is_that_of_the_recorder(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.worker_memory = lambda: 7 << 20  # type: ignore[method-assign]  # as workers tell it
    read(SafeDataLoader([1, 2], trace=tmp_path, recorder=recorder))
    del recorder
    gc.collect()
    counts = having(events_in(tmp_path), ph="C", name="memory of the workers, MiB")
    assert [event["args"]["value"] for event in counts] == [7.0]


class SomeFail(datasets.Noisy):
    def __getitem__(self, index: int) -> Any:
        if index in (2, 5):
            raise ValueError(f"no sample {index}")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("way", ["skip", "replace"])
def test_samples_left_out_or_replaced_are_marked(way: Any, workers: int, tmp_path: Path) -> None:
    events = traced(
        tmp_path, SomeFail(8), batch_size=4, on_error=way, max_skipped=9, num_workers=workers
    )
    marks = having(events, ph="i", cat="incident")
    said = "skipped" if way == "skip" else "replaced"
    assert [event["name"] for event in marks] == [f"{said} 2", f"{said} 5"]
    places = [[event["args"][name] for name in ("batch", "position", "index")] for event in marks]
    assert places == [[0, 2, 2], [1, 1, 5]]
    assert "no sample 2" in marks[0]["args"]["reason"]
    assert [type(event["args"].get("donor_position")) for event in marks] == (
        [type(None)] * 2 if way == "skip" else [int] * 2
    )
    samples = [event["args"]["index"] for event in having(events, ph="X", cat="sample")]
    left = [0, 1, 3, 4, 6, 7]
    assert samples == left if way == "skip" else sorted({*samples}) == left


def test_new_workers_are_marked(tmp_path: Path) -> None:
    trace = FileTrace(tmp_path)
    failure = Failure(
        phase="crash", exception_type="WorkerCrashError", message="killed", epoch=2, worker_id=1
    )
    trace.restarted(failure, ["worker 1 was killed", "new workers go on"])
    events = events_of(text_in(trace_file(tmp_path)) + "]")  # it is on disk at once
    (mark,) = having(events, ph="i", cat="failure", name="workers restarted")
    assert mark["args"] == {"epoch": 2, "said": "worker 1 was killed\nnew workers go on"}
    trace._finish()


def test_the_rank_stands_first_in_the_name_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    events = traced(tmp_path, [1, 2])
    (process,) = having(events, ph="M", name="process_name")
    assert process["args"]["name"].startswith("rank 3 of 8, safeloader, training process ")
    (order,) = having(events, ph="M", name="process_sort_index")
    assert order["args"] == {"sort_index": 3}
    assert "-rank3-" in trace_file(tmp_path).name


def test_a_hundred_thousand_samples_take_less_than_eight_megabytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    trace, size = FileTrace(tmp_path), 64
    for batch in range(100_000 // size + 1):
        indices = rng.integers(0, 1_281_167, size)
        stamps = np.cumsum([batch * 10**9, *rng.integers(20_000, 3_000_000, size + 1)])
        manifest = BatchManifest(batch, 0, 1, indices.tobytes(), size, stamps=stamps.tobytes())
        trace.drawn(0, batch, indices.tobytes())
        trace.delivered(0, batch, 50_000, manifest, int(stamps[-1]))
    trace._finish()
    assert len(having(events_in(tmp_path), cat="sample")) >= 100_000
    assert trace_file(tmp_path).stat().st_size < 4_000_000


def test_slices_agree_with_the_table(tmp_path: Path) -> None:
    loader = SafeDataLoader(datasets.Noisy(8), batch_size=4, num_workers=2, trace=tmp_path)
    read(loader)
    table = loader.provenance.to_numpy()
    del loader
    samples = having(events_in(tmp_path), ph="X", cat="sample")
    for row, event in zip(table, samples, strict=True):
        assert event["ts"] == pytest.approx(row["start_ns"] / 1000, rel=0, abs=1)
        assert event["dur"] == pytest.approx(row["fetch_ns"] / 1000, rel=0, abs=1)
        assert event["tid"] == row["worker_id"] + 1


@pytest.mark.parametrize(
    "index",
    [
        'with "quotes"',
        "back\\slash",
        "ünïcode ∆ 🙂",
        "line\nbreak\t\x00",
        "\ud800",
        ("a", '"'),
        2**70,
    ],
)
def test_any_index_gives_valid_json(index: Any, tmp_path: Path) -> None:
    events = traced(tmp_path, AnyIndex(), sampler=[index, 3], batch_size=2)
    names = [event["name"] for event in having(events, ph="X", cat="sample")]
    assert names == [f"sample {index}", "sample 3"]


def test_an_index_that_cannot_be_shown_does_no_harm(tmp_path: Path) -> None:
    loader = SafeDataLoader(AnyIndex(), sampler=[Unshowable(1), 3], trace=tmp_path)
    assert read(loader) == 2


def test_samples_of_a_stream_are_named_by_worker_and_ordinal(tmp_path: Path) -> None:
    events = traced(tmp_path, datasets.Stream(5), batch_size=2, num_workers=2)
    names = {event["name"] for event in having(events, ph="X", cat="sample")}
    assert names == {f"sample {pair}" for pair in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]}


@pytest.mark.parametrize("workers", WORKERS)
def test_a_failure_is_in_the_file_when_it_is_raised(workers: int, tmp_path: Path) -> None:
    dataset = faults.Raises(at=5, length=12)
    loader = SafeDataLoader(dataset, batch_size=4, num_workers=workers, trace=tmp_path)
    batches = iter(loader)
    next(batches)
    assert next_raises(batches)
    assert '"name":"KeyError at 5"' in text_in(trace_file(tmp_path))
    next(batches)
    del loader, batches
    gc.collect()
    (failure,) = having(events_in(tmp_path), ph="i", cat="failure")
    where = {name: failure["args"][name] for name in ("epoch", "batch", "position", "index")}
    assert where == {"epoch": 0, "batch": 1, "position": 1, "index": 5}
    assert failure["args"]["phase"] == "sample"
    assert failure["tid"] == (2 if workers else 0)


def next_raises(batches: Iterator[Any]) -> bool:
    try:
        next(batches)
    except KeyError:
        return True
    return False


def test_a_loader_made_anew_on_the_same_recorder_writes_to_the_same_file(tmp_path: Path) -> None:
    loader = SafeDataLoader([1, 2, 3], trace=tmp_path)
    read(loader)
    again = SafeDataLoader([1, 2, 3], trace=tmp_path, recorder=loader.recorder)
    read(again)
    del loader
    read(again)
    del again
    events = events_in(tmp_path)
    assert [event["args"]["epoch"] for event in having(events, cat="wait")] == [0] * 3 + [1] * 3 + [
        2
    ] * 3


@pytest.mark.slow
def test_memory_does_not_grow_with_the_events(tmp_path: Path) -> None:
    loader = SafeDataLoader(
        range(400), batch_size=4, trace=tmp_path, recorder=Recorder(max_bytes=10_000)
    )
    read(loader)
    gc.collect()
    tracemalloc.start()
    try:
        read(loader)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        written = len(text_in(trace_file(tmp_path)))
        read(loader, epochs=20)
        gc.collect()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(text_in(trace_file(tmp_path))) - written > 2_000_000
    assert after - before < 100_000
    assert peak - before < 1_500_000


# ── the end of the process, forks and full disks ─────────────────────────────────────────────────


def test_the_file_is_closed_at_the_end_of_the_program(tmp_path: Path) -> None:
    done = run("loader = SafeDataLoader([1, 2], trace=sys.argv[1]); list(loader)", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(having(events_in(tmp_path), cat="wait")) == 2


@pytest.mark.parametrize("trace", ["file", "lines", "off"])
def test_a_program_may_end_within_an_epoch(trace: str, tmp_path: Path) -> None:
    program = """
logging.basicConfig(level=logging.WARNING)
logging.getLogger("safeloader").setLevel(logging.INFO)
loader = SafeDataLoader(range(8), batch_size=4, trace=eval(sys.argv[1]))
list(loader)
batches = iter(loader)
next(batches)
sys.exit(0)
"""
    wanted = {"file": repr(str(tmp_path)), "lines": "True", "off": "False"}[trace]
    done = run(program, wanted)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "failed" not in done.stderr
    if trace == "file":
        assert len(having(events_in(tmp_path), cat="wait")) == 3


def test_a_killed_program_leaves_what_was_written_readable(tmp_path: Path) -> None:
    program = """
loader = SafeDataLoader(range(600), batch_size=4, trace=sys.argv[1])
list(loader)
for number, batch in enumerate(loader):
    if number == 100:
        os._exit(7)
"""
    assert run(program, tmp_path).returncode == 7
    # Viewers mend the missing bracket; so does this.
    events = events_of(text_in(trace_file(tmp_path)) + "]")
    waits = Counter(event["args"]["epoch"] for event in having(events, cat="wait"))
    assert waits[0] == 150
    assert len(having(events, cat="audit")) == 1


FORKING = """
import gc
loader = SafeDataLoader(range(20), batch_size=4, trace=sys.argv[1])
list(loader)
batches = iter(loader)
next(batches)
child = os.fork()
if child == 0:
    if sys.argv[2] == "goes on":
        list(batches)
    if sys.argv[2] == "ends":
        del loader, batches
        gc.collect()
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
list(batches)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("child", ["goes on", "ends", "exits"])
def test_a_forked_child_writes_nothing_into_the_file(child: str, tmp_path: Path) -> None:
    done = run(FORKING, tmp_path, child)
    assert (done.returncode, done.stderr) == (0, "")
    events = events_in(tmp_path)
    waits = [
        (event["args"]["epoch"], event["args"]["batch"]) for event in having(events, cat="wait")
    ]
    assert waits == [(epoch, batch) for epoch in range(2) for batch in range(5)]
    assert len(having(events, ph="M", name="process_name")) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_that_begins_an_epoch_has_a_file_of_its_own(tmp_path: Path) -> None:
    program = """
loader = SafeDataLoader(range(8), batch_size=4, trace=sys.argv[1])
list(loader)
child = os.fork()
list(loader)
if child: assert os.waitpid(child, 0)[1] == 0
"""
    done = run(program, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    files = [events_of(text_in(path)) for path in tmp_path.iterdir()]
    assert sorted(len(having(events, cat="wait")) for events in files) == [2, 4]
    assert len({events[0]["pid"] for events in files}) == 2


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
loader = SafeDataLoader(range(2000), batch_size=4, trace=sys.argv[1])
for _ in range(2): print(sum(len(batch) for batch in loader))
"""


def test_a_full_disk_is_told_once_and_training_goes_on(tmp_path: Path) -> None:
    """The limit of the shell on file sizes (``ulimit -f``) is a disk that is full after 50 kB."""
    done = run(LIMITED, tmp_path)
    assert (done.returncode, done.stdout) == (0, "2000\n2000\n")
    (line,) = done.stderr.splitlines()
    assert "could not be written" in line
    assert line.endswith("and ends here; training goes on")
    # What was written before ends with a whole event.
    assert len(having(events_of(text_in(trace_file(tmp_path)) + "]"), cat="wait")) > 50


def test_nothing_is_gathered_once_the_disk_was_full(tmp_path: Path) -> None:
    program = """
import tracemalloc
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
loader = SafeDataLoader(
    range(400), batch_size=4, trace=sys.argv[1], recorder=Recorder(max_bytes=10_000)
)
list(loader)
tracemalloc.start()
for _ in range(5):
    for batch in loader: pass
before = tracemalloc.get_traced_memory()[0]
for _ in range(20):
    for batch in loader: pass
print(tracemalloc.get_traced_memory()[0] - before)
"""
    done = run(program, tmp_path)
    assert done.returncode == 0
    assert int(done.stdout) < 300_000


def test_a_folder_that_went_away_is_told_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = SafeDataLoader([1, 2], trace=tmp_path / "traces")
    (tmp_path / "traces").write_text("now a file")
    with caplog.at_level(logging.WARNING, "safeloader"):
        assert read(loader, epochs=2) == 4
    (said,) = lines_of(caplog)
    assert said.startswith("no trace is written: ")
