"""The benchmarks measure what they say: equal batches, right statistics, honest exits."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pickle
import platform
import re
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import (
    across_ranks,
    checks,
    conditions,
    copies,
    cuda_pinned,
    environment,
    least,
    many_ranks,
    memory,
    peers,
    report,
    report_page,
    run,
    run_folder,
    seeding,
    stateful,
    timing,
)
from benchmarks.apart import Apart
from benchmarks.bare import BareProcesses, LeanLoader
from benchmarks.cases import CASES, Case, Unavailable
from benchmarks.contenders import CONTENDERS
from benchmarks.intervals import FEWEST_FOR_INTERVAL, Spread, median_interval, spread
from benchmarks.least import Epochs
from benchmarks.peers import PEERS, maker
from benchmarks.timing import DifferentBatches, EpochTime, digest, first_epoch, seeded, time_epoch
from safeloader import SafeStatefulDataLoader, beside
from safeloader.introspect import warned

BATCHES = 3


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launched process knows, the contender `launcher` knows for one test."""
    monkeypatch.setattr(beside, "_state", beside._State())
    monkeypatch.setattr(beside.atexit, "register", lambda function: None)
    monkeypatch.setattr(warned, "instead", None)


class Here:
    """In the place of :class:`benchmarks.apart.Apart`: what is put in for a test is not there."""

    def __init__(self, make: Any, *arguments: Any) -> None:
        self._make = lambda: make(*arguments)
        self._made: Any = None

    def ask(self, method: str, *arguments: Any) -> Any:
        self._made = self._made or self._make()
        return getattr(self._made, method)(*arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._made = None


@pytest.fixture
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "Apart", Here)


def build(case: Case) -> tuple[Any, dict[str, Any]]:
    try:
        return case.build(BATCHES)
    except Unavailable as reason:
        pytest.skip(str(reason))


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for each, its_like in zip(one, other, strict=True):
            assert_same(each, its_like)
    else:
        assert one == other


def leaves(batch: Any) -> int:
    if isinstance(batch, dict):
        return sum(map(leaves, batch.values()))
    return sum(map(leaves, batch)) if isinstance(batch, list | tuple) else 1


# -------------------------------------------------------------------------------------- cases


@pytest.mark.uncovered
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_contender_yields_the_same_batches(case: Case, tmp_path: Path) -> None:
    """The ratio of two speeds means something only if both sides did the same work."""
    dataset, kwargs = build(case)
    epochs = []
    for make in CONTENDERS.values():
        torch.manual_seed(7)  # augmentation in the main process draws from the global generator
        epochs.append(list(make(dataset, seeded(kwargs), tmp_path)))
    assert len(epochs[0]) >= BATCHES
    for other in epochs[1:]:
        assert_same(epochs[0], other)


@pytest.mark.filterwarnings("default")  # of other projects' making
@pytest.mark.parametrize("name", ["small-1w", "tiny-2w", "folder-2w", "strings-2w-fresh"])
@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_yields_the_same_batches(peer: str, name: str, tmp_path: Path) -> None:
    """Epoch after epoch: some go on as the stock loader does, some have the first order again."""
    try:
        dataset, kwargs = CASES[name].build(4)
        loader = maker(peer)(dataset, seeded(kwargs), tmp_path)
    except Unavailable as reason:
        pytest.skip(str(reason))
    stock: Any = DataLoader(dataset, **seeded(kwargs))
    expected = [first_epoch(stock) for _ in range(3)]
    assert [first_epoch(loader) for _ in range(3)] in (expected, expected[:1] * 3)


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_says_why_it_is_left_out(peer: str, tmp_path: Path) -> None:
    dataset, kwargs = build(CASES["tensor-main"])
    with pytest.raises(Unavailable, match=r"is not installed|with workers only"):
        maker(peer)(dataset, seeded(kwargs), tmp_path)


def test_a_digest_tells_batches_apart_and_not_what_holds_them() -> None:
    batch = {"x": torch.arange(6.0).reshape(2, 3), "y": [torch.ones(2), "text"]}
    as_arrays = {"x": batch["x"].numpy(), "y": (np.ones(2, np.float32), "text")}
    assert digest(batch) == digest(as_arrays)
    assert digest(batch["x"]) != digest(batch["x"].T.contiguous().T.reshape(3, 2))
    assert digest(batch["x"]) != digest(batch["x"].double())
    assert digest(batch["x"]) != digest(batch["x"] + 1)


@pytest.mark.usefixtures("in_one_process")
def test_contenders_that_do_different_work_are_not_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    short = CONTENDERS["null"]
    monkeypatch.setitem(CONTENDERS, "null", lambda d, k, f: list(short(d, k, f))[:-1])
    with pytest.raises(DifferentBatches, match="null gives other batches than stock"):
        timing.time_case(CASES["tensor-main"], ["stock", "null"], BATCHES, 1, tmp_path)


@pytest.mark.usefixtures("in_one_process")
def test_a_contender_that_does_not_apply_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> Any:
        raise Unavailable("not today")

    monkeypatch.setitem(PEERS, "grain", refuse)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    arguments = ["--cases=tensor-main", "--contenders=stock,grain", "--quick", "--repeats=1"]
    assert run.main([*arguments, f"--out={tmp_path}"]) == 0
    assert "tensor-main, grain: left out: not today" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_peers_are_held_to_no_bar() -> None:
    times = {name: [EpochTime(1, per, 1.0)] * 6 for name, per in (("stock", 1.0), ("grain", 9.0))}
    (made,) = report.make_rows(CASES["small-2w"], times, {})
    assert made.verdict == "peer"
    assert "| –   | peer " in report.table([made])  # noqa: RUF001


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_case_can_be_sent_to_a_spawned_worker(case: Case) -> None:
    dataset, kwargs = build(case)
    pickle.dumps((dataset, kwargs.get("collate_fn")))


def test_peers_are_compared_on_fresh_workers_and_on_persistent_ones() -> None:
    cases = [CASES[name] for name in run.PEER_CASES]
    assert all(case.workers for case in cases)
    for kind in ("medium", "large", "jpeg", "tiny", "folder", "strings"):
        found = {case.fresh for case in cases if case.name.startswith(f"{kind}-2w")}
        assert found == {True, False}


def test_a_peer_says_how_its_workers_start() -> None:
    assert peers.start_method("forkserver", CASES["tiny-2w-fresh"]) == "forkserver"
    assert peers.start_method("safe", CASES["tiny-2w-fresh"]) == "fork"
    assert peers.start_method("grain", CASES["ints-main"]) == "-"
    assert peers.workers("grain", CASES["tiny-8w-fresh"]) == "8 fresh"
    assert peers.workers("spdl", CASES["large-1w"]) == "1 persistent"
    assert peers.workers("spdl", CASES["large-2w"]) == "1 persistent"
    assert peers.workers("spdl", CASES["folder-2w-fresh"]) == "1 fresh, 2 threads"


def test_bars() -> None:
    usual = [case for case in CASES.values() if case.goal is None]
    assert {case.bar for case in usual if case.real_work} == {0.99}
    assert {case.bar for case in usual if not case.real_work} == {0.95}
    real_work = {name for name, case in CASES.items() if case.real_work}
    assert real_work == {
        *("jpeg-main", "jpeg-2w", "jpeg-2w-fresh"),
        *("folder-2w", "folder-2w-fresh"),
    }
    assert {case.name: case.bar for case in CASES.values() if case.goal is not None} == {
        "large-2w-fresh": 6,
        "medium-2w-fresh": 5,
        "jpeg-2w-fresh": 1.45,
        "tiny-2w-fresh": 1.3,
        "tiny-8w-fresh": 1.2,
        "columns-main": 5,
        "dicts-main": 1.0,
        "ints-main": 0.9,
        "stored-main": 0.7,
        "split-main": 0.7,
        "epochs-main": 0.8,
    }


def test_only_the_safe_loader_as_it_comes_is_held_to_a_higher_bar() -> None:
    names = ("stock", "safe", "safe+trace", "null")
    times = {name: [EpochTime(1, 1.0, 1.0)] * 6 for name in names}
    for name, bars in {"large-2w-fresh": (6, 0.95, 0.95), "epochs-main": (0.8, 0.8, 0.8)}.items():
        made = report.make_rows(CASES[name], times, {})
        assert [(each.contender, each.bar) for each in made] == [*zip(names[1:], bars, strict=True)]
    assert [each.verdict for each in report.make_rows(CASES["large-2w-fresh"], times, {})] == [
        *("BELOW", "ok", "ok")
    ]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_case_tells_its_workers_and_how_they_start(case: Case) -> None:
    _, kwargs = build(case)
    assert case.workers == kwargs.get("num_workers", 0)
    if case.workers:
        assert case.start_method == kwargs["multiprocessing_context"]
        assert case.fresh is not kwargs["persistent_workers"]
        assert case.lives.startswith(f"{case.workers} {'fresh' if case.fresh else 'persistent'}")
    else:
        assert (case.start_method, case.lives) == ("-", "main")


def test_a_folder_has_a_folder_for_each_class_and_no_random_numbers() -> None:
    dataset, _ = build(CASES["folder-2w"])
    assert {path.parent.name for path in dataset.paths} == {"china", "flower"}
    torch.manual_seed(1)
    image, label = dataset[37]
    torch.manual_seed(2)
    assert_same((image, label), dataset[37])
    assert image.shape == (3, 224, 224)
    assert label == (dataset.paths[37].parent.name == "flower")


def test_strings_become_padded_token_numbers() -> None:
    dataset, kwargs = build(CASES["strings-2w"])
    batch = kwargs["collate_fn"]([dataset[index] for index in range(5)])
    for index, (ids, mask) in enumerate(zip(*batch.values(), strict=True)):
        words = dataset.sentences[index].split()
        assert ids[mask].tolist() == [dataset.vocabulary[word] for word in words]
        assert not ids[~mask].any()


def test_the_detection_batch_has_49_tensors() -> None:
    dataset, kwargs = build(CASES["detection-2w"])
    batch = next(iter(DataLoader(dataset, kwargs["batch_size"], collate_fn=kwargs["collate_fn"])))
    assert leaves(batch) == 49


def test_every_worker_reads_its_own_share_of_the_stream() -> None:
    dataset, kwargs = build(CASES["stream-2w"])
    indices = torch.cat([indices for _, indices in DataLoader(dataset, **kwargs)])
    assert sorted(indices.tolist()) == list(range(32 * BATCHES))


# --------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("count", "rank"),
    # Ranks of the 95 % sign-test interval as tables of order statistics give them.
    [(6, 1), (8, 1), (9, 2), (10, 2), (12, 3), (15, 4), (20, 6), (30, 10), (50, 18)],
)
def test_the_interval_has_the_ranks_of_the_tables(count: int, rank: int) -> None:
    assert median_interval(range(count, 0, -1)) == (rank, count + 1 - rank)


def test_too_few_values_have_no_interval() -> None:
    assert median_interval(range(FEWEST_FOR_INTERVAL - 1)) is None
    assert median_interval(range(FEWEST_FOR_INTERVAL)) is not None


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    draw = np.random.default_rng(1)
    # Skewed and long-tailed, as times are; the true median is 1.
    intervals = [median_interval(draw.lognormal(0, 1, 20).tolist()) for _ in range(2000)]
    covered = sum(ends is not None and ends[0] <= 1 <= ends[1] for ends in intervals)
    assert 0.94 <= covered / 2000 <= 0.98  # 95.9 % by theory


@settings(deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60))
def test_a_spread_is_in_order(values: list[int]) -> None:
    found = spread(values)
    assert found.quartiles[0] <= found.median <= found.quartiles[1]
    if found.interval is not None:
        assert found.interval[0] in values
        assert found.interval[1] in values
        assert found.interval[0] <= found.median <= found.interval[1]


# ------------------------------------------------------------------------------------- report


def row(*ratios: float, case: str = "small-2w") -> report.Row:
    times = {
        "stock": [EpochTime(1_000_000, 1000.0, 500.0)] * len(ratios),
        "safe": [EpochTime(2_000_000, 1000.0 / ratio, 250.0) for ratio in ratios],
    }
    (made,) = report.make_rows(CASES[case], times, {})
    return made


def test_a_ratio_above_one_is_faster() -> None:
    made = row(2.0, 2.0, 4.0)
    assert made.speed.median == pytest.approx(2)
    assert made.figures.per_batch_us == pytest.approx(0.5)
    assert made.reference.per_batch_us == pytest.approx(1)
    assert made.figures.first_batch_ms == pytest.approx(2)


def test_with_peers_each_contender_has_its_figures_side_by_side() -> None:
    times = {
        "stock": [EpochTime(4_000_000, 1000.0, 500_000.0)] * 6,
        "safe": [EpochTime(3_000_000, 500.0, 250_000.0)] * 6,
        "grain": [EpochTime(2_000_000, 250.0, 100_000.0)] * 6,
    }
    sizes = {name: memory.Memory("pss", 7_000_000, 1, 1) for name in ("stock", "safe")}
    case = CASES["small-2w"]
    made = report.make_rows(case, times, sizes)
    del times["safe"]
    made += report.make_rows(CASES["tiny-2w"], times, {})
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.side_by_side(made).splitlines()
    ]
    none = "–"  # noqa: RUF001
    assert lines[0] == ["case", "figure", "stock", "safe", "grain"]
    assert lines[2:7] == [
        ["small-2w", "times as fast", "1", "2.00", "4.00"],
        ["small-2w", "first batch, ms", "4.0", "3.0", "2.0"],
        ["small-2w", "peak memory, MB", "7", "7", none],
        ["small-2w", "main CPU, s per 1000 batches", "0.500", "0.250", "0.100"],
        ["tiny-2w", "times as fast", "1", none, "4.00"],
    ]
    assert report.side_by_side(made) in report.text(made)
    assert report.text(made[:1]) == report.table(made[:1])


def test_only_a_whole_interval_below_the_bar_fails() -> None:
    assert row(*[0.9] * 6).verdict == "BELOW"
    assert row(*[0.9] * 5, 1.0).verdict == "unclear"
    assert row(*[0.9] * 5).verdict == "unclear"  # too few for an interval
    assert row(*[0.96] * 6).verdict == "ok"
    assert row(*[0.96] * 6, case="jpeg-2w").verdict == "BELOW"


def test_an_epoch_counts_the_batches_after_the_first() -> None:
    timed = time_epoch(DataLoader(TensorDataset(torch.arange(3))))
    assert timed.first_batch_ns > 0
    assert timed.per_batch_ns > 0


def test_a_whole_epoch_counts_the_first_batch_too() -> None:
    class Slow:
        """Late with its first batch alone."""

        def __iter__(self) -> Any:
            time.sleep(0.2)
            return iter(range(10))

    after_the_first, whole = time_epoch(Slow()), time_epoch(Slow(), whole=True)
    assert after_the_first.per_batch_ns < 0.02e9 <= whole.per_batch_ns
    assert whole.first_batch_ns >= 0.2e9


@pytest.mark.usefixtures("in_one_process")
def test_fresh_workers_are_torchs_default_and_timed_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh = [case for case in CASES.values() if case.fresh]
    assert len(fresh) >= 3
    for case in fresh:
        _, kwargs = build(case)
        assert kwargs["num_workers"] >= 2
        assert not kwargs["persistent_workers"]
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(timing, "first_epoch", lambda loader: [])
    monkeypatch.setattr(timing, "time_epoch", lambda loader, **how: asked.append(how))
    for name in ("small-2w-fresh", "small-2w", "epochs-main"):
        timing.time_case(CASES[name], ["stock", "null"], BATCHES, 1, tmp_path / name)
    assert asked == [
        *[{"whole": True, "epochs": 1}] * 4,
        *[{"whole": False, "epochs": 1}] * 4,
        *[{"whole": True, "epochs": 200}] * 4,
    ]


def test_many_epochs_are_timed_as_one() -> None:
    class Late:
        """Late with the first batch of each epoch."""

        begun = 0

        def __iter__(self) -> Any:
            self.begun += 1
            time.sleep(0.02)
            return iter(range(2))

    loader = Late()
    timed = time_epoch(loader, whole=True, epochs=5)
    assert loader.begun == 5
    assert timed.per_batch_ns >= 0.01e9  # 0.1 s of lateness over ten batches


@pytest.mark.usefixtures("in_one_process")
def test_contenders_take_turns_in_an_order_that_turns_round(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    turns: list[str] = []
    for name in ("safe", "safe+trace"):  # a loader that is no more than its name
        monkeypatch.setitem(CONTENDERS, name, lambda dataset, kwargs, folder: folder.name)
    monkeypatch.setattr(timing, "first_epoch", lambda loader: [])
    monkeypatch.setattr(timing, "time_epoch", lambda loader, **how: turns.append(loader))
    monkeypatch.setattr(timing, "ROUNDS", 2)
    timing.time_case(CASES["tensor-main"], ["safe", "safe+trace"], BATCHES, 5, tmp_path)
    forth = ["safe", "safe+trace"]
    first = forth + forth + forth[::-1] + forth  # the first of a round is the warm-up
    assert turns == first + forth + forth + forth[::-1]


@pytest.mark.slow
def test_a_run_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    arguments = ["--cases=tensor-main", "--contenders=stock,null", "--quick", "--repeats=2"]
    try:
        for _ in range(2):  # the second time must not overwrite the first
            assert run.main([*arguments, f"--out={tmp_path}"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "| tensor-main | null " in capsys.readouterr().out
    first, second = sorted(tmp_path.glob("*.json"))
    assert first != second
    result = json.loads(first.read_text())
    assert result["environment"]["torch"] == torch.__version__
    assert [len(each["ratios"]) for each in result["rows"]] == [2]
    assert len(list(tmp_path.glob("*.md"))) == 2
    plots = 2 if importlib.util.find_spec("matplotlib") else 0
    assert len(list(tmp_path.glob("*.png"))) == plots


@pytest.mark.parametrize(("ratio", "status"), [(0.9, 1), (1.1, 0)])
def test_check_fails_a_run_with_a_row_below_its_bar(
    monkeypatch: pytest.MonkeyPatch, ratio: float, status: int
) -> None:
    monkeypatch.setattr(run, "_run_case", lambda *_: [row(*[ratio] * 6)])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert run.main(["--contenders=null", "--quick", "--check", "--cases=small-2w"]) == status


@pytest.mark.parametrize(("name", "bar"), [("large-2w-fresh", 0.95), ("ints-main", 0.9)])
def test_a_shorter_epoch_of_fresh_workers_has_the_usual_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, bar: float
) -> None:
    """The higher one is that of an epoch of some length, which a quick run does not have."""
    times = {each: [EpochTime(1, 1.0, 1.0)] * 6 for each in ("stock", "safe")}
    monkeypatch.setattr(run, "time_case", lambda *_: (times, {}))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    arguments = [f"--cases={name}", "--contenders=stock,safe", "--quick", "--check"]
    assert run.main(arguments) == 0
    assert f"| {bar:.2f} | ok " in capsys.readouterr().out
    assert CASES[name].bar == {"large-2w-fresh": 6, "ints-main": 0.9}[name]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cases=nonsense"],
        ["--contenders=stock"],
        ["--contenders=null", "--check", "--repeats=5"],
    ],
)
def test_wrong_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        run.main(arguments)
    assert refused.value.code == 2


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    if not memory.available():
        pytest.skip("psutil is not installed")
    measured = memory.measure("small-1w", "stock", 5)
    assert 0 < measured.steady_bytes <= measured.peak_bytes


def test_the_environment_does_not_name_the_host() -> None:
    assert platform.node() not in environment.describe().values()


# --------------------------------------------------------------------------------- conditions


SMALL = conditions.Condition("small", "some small batches", (8,), batches=5, keep=2)


def test_a_condition_in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    outcome = conditions.endure(SMALL, "safe", tmp_path)
    assert outcome.error == ""
    assert outcome.first_us > 0
    assert outcome.later_us > 0
    assert sum(outcome.transport["batches"].values()) == 5 * conditions.EPOCHS


def test_a_batch_that_was_written_over_is_seen() -> None:
    dataset = conditions.PoolDataset(64 * 5, (8,), pool=17)
    kept = deque(DataLoader(dataset, 64), maxlen=2)
    assert conditions._wrong(dataset, SMALL, kept) == []
    kept[1][3, 3] += 1
    assert conditions._wrong(dataset, SMALL, kept) == [4]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["few-files", "small-shm"])
def test_the_safe_loader_finishes_where_the_stock_loader_fails(name: str) -> None:
    condition = conditions.CONDITIONS[name]
    if reason := conditions.cannot(condition):
        pytest.skip(reason)
    assert conditions.run(condition, "safe").error == ""
    assert conditions.run(condition, "stock", subprocess.DEVNULL).error


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("kill -KILL $$", "the process ended with signal SIGKILL"),
        ("exit 3", "the process ended with exit code 3"),
        ("sleep 600", "no end within 0.5 s"),
    ],
)
def test_whatever_becomes_of_a_process_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, does: str, told: str
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(conditions, "LIMIT_S", 0.5 if "sleep" in does else 60)
    assert conditions.run(SMALL, "stock").error == told


def test_an_error_is_told_in_one_line() -> None:
    from_worker = RuntimeError("Caught RuntimeError in DataLoader worker\nTrace\nKeyError: 'x'\n")
    assert conditions._told(from_worker) == "in a worker: KeyError: 'x'"
    assert conditions._told(OSError("first\nsecond")) == "OSError: first"
    assert conditions._told(ValueError()) == "ValueError: "


def test_speeds_are_compared_where_all_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    takes = {"stock": conditions.Outcome("", 6.0, 8.0), "safe": conditions.Outcome("", 3.0, 2.0)}
    monkeypatch.setattr(conditions, "run", lambda condition, name, log: takes[name])
    few = conditions.CONDITIONS["few-files"]
    stock, safe = conditions.compare(few, ["stock", "safe"], 6, None)
    assert stock.ratios == []
    assert (safe.ratios, safe.first_ratios) == ([4.0] * 6, [2.0] * 6)
    assert "| finished | 2        | 4.00 " in conditions.table([stock, safe])

    takes["stock"] = conditions.Outcome("RuntimeError: one | two")
    stock, safe = conditions.compare(few, ["stock", "safe"], 6, None)
    assert len(stock.outcomes) == len(safe.outcomes) == 1
    assert safe.ratios == []
    assert "one / two" in conditions.table([stock, safe])


@pytest.mark.parametrize(("fails", "status"), [("stock", 0), ("safe", 1)])
def test_only_a_loader_that_should_not_fail_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    fails: str,
    status: int,
) -> None:
    broken = conditions.Outcome("OSError: no")
    finished = conditions.Outcome("", 1.0, 1.0)
    monkeypatch.setattr(
        conditions, "run", lambda condition, name, log: broken if name == fails else finished
    )
    monkeypatch.setattr(conditions, "cannot", lambda c: "not here" if c.shm_megabytes else "")
    arguments = ["--conditions=few-files,small-shm", f"--out={tmp_path}"]
    assert conditions.main(arguments) == status
    printed = capsys.readouterr()
    assert "OSError: no" in printed.out
    assert "small-shm: left out: not here" in printed.err
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-conditions.json"))
    assert result["skipped"] == {"small-shm": "not here"}


# ------------------------------------------------------------------------------------- copies


def test_the_steps_of_a_batch() -> None:
    found = copies.steps("small-1w", 8)
    assert min(dataclasses.astuple(found)) > 0
    assert found.megabytes == pytest.approx(32 * 8 * 4 / 1e6)


def test_loaders_are_told_in_copies() -> None:
    found = copies.Steps(38.5, 2000.0, 200.0, 1900.0, 100.0, 90.0)
    cells = copies.line("large-1w", found, {"stock": 30_000, "torch-way": 28_000, "safe": 2500})
    assert cells[2:7] == ["2000", "200", "1900", "100", "90"]
    assert cells[7:] == ["30000 (15.0)", "28000 (14.0)", "2500 (1.2)"]


# ------------------------------------------------------------------------------------- checks


def test_checks_are_timed_by_sample_and_by_byte(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(checks, "SHAPES", {"large": (3, 8, 8)})
    assert checks.gigabytes_per_s((3, 224, 224), 64 * 3 * 224 * 224 * 4 / 5e9) == pytest.approx(5)
    told = checks.lines("large", {"finite()": [64e-6] * 8, "schema()": [32e-6] * 8})
    assert [line[2] for line in told] == ["1.00", "0.50"]
    assert [line[4] for line in told] == ["0.8", "-"]
    assert checks.main(["--repeats=2", f"--out={tmp_path}"]) == 0
    assert "finite() on a batch of 38 MB" in capsys.readouterr().out
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-checks.json"))
    assert set(result["seconds_per_batch"]["large"]) == set(checks.the_checks())
    monkeypatch.setattr(checks, "BAR_GB_S", 1e9)
    assert checks.main(["--quick", "--check"]) == 1
    assert "BELOW" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- least


def test_bare_processes_make_every_batch_once() -> None:
    asked = torch.zeros(10, dtype=torch.int64).share_memory_()

    class Counted:
        def __len__(self) -> int:
            return len(asked)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            asked[index] += 1
            return torch.zeros(3), index

    made = BareProcesses(Counted(), {"num_workers": 8, "batch_size": 4, "shuffle": True})
    assert made.processes == 3
    made.run()
    assert asked.tolist() == [1] * 10


def test_a_bare_process_that_fails_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    BareProcesses([torch.zeros(2)] * 3, {"num_workers": 2}).run()
    assert capfd.readouterr().err == ""
    failing: dict[str, Any] = {"num_workers": 2}
    with pytest.raises(RuntimeError, match="failed"):
        BareProcesses([torch.zeros(2), None, None], failing).run()
    assert "NoneType" in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="failed"):
        list(LeanLoader([torch.zeros(2), None, None], failing))
    assert "NoneType" in capfd.readouterr().err


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.fresh])
def test_the_lean_loader_hands_over_what_the_stock_loader_does(name: str) -> None:
    dataset, kwargs = build(CASES[name])
    stock: Any = DataLoader(dataset, **seeded(kwargs))
    lean = LeanLoader(dataset, seeded(kwargs))
    expected = first_epoch(stock)
    for _ in range(2):  # its order stays
        assert first_epoch(lean) == expected


OTHERS = "safeloader", "numpy.random"


def test_what_is_measured_apart_finds_nothing_of_another_loader() -> None:
    """What the stock loader's workers would inherit, and what each would load for itself."""
    with Apart(Epochs, "tiny-2w-fresh", "stock", 4) as stock:
        stock.ask("seconds")
        loaded = {name: stock.ask("has_loaded", name) for name in ("torch", *OTHERS)}
    assert loaded == {"torch": True} | dict.fromkeys(OTHERS, False)


def test_what_is_raised_apart_is_raised_here() -> None:
    with Apart(Epochs, "tiny-2w-fresh", "nobody", 4) as nobody:
        for _ in range(2):
            with pytest.raises(KeyError, match="nobody"):
                nobody.ask("seconds")


def test_the_least_bounds_what_can_be_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def of(low: float, median: float, high: float) -> Spread:
        return Spread(median, (low, high), (low, high))

    bare, lean, safe = of(4.9, 5.2, 5.4), of(4.5, 4.8, 5.1), of(3, 3.5, 4)
    assert least.verdict(3.4, safe, bare, lean) == "reached"
    assert least.verdict(6, safe, bare, lean) == "out of reach here"
    assert least.verdict(5.2, safe, bare, lean) == "above the lean loader"
    assert least.verdict(5, safe, bare, lean) == "not excluded"
    assert least.verdict(5.3, safe, bare, of(5, 5.2, 5.5)) == "unclear"
    assert least.main(["--quick", "--cases", "tiny-2w-fresh", f"--out={tmp_path}"]) == 0
    assert "tiny-2w-fresh" in capsys.readouterr().out
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-least.json"))
    times = result["seconds_per_epoch"]["tiny-2w-fresh"]
    assert set(times) == {"stock", "safe", "bare", "lean"}
    assert all(len(each) == 1 and each[0] > 0 for each in times.values())


# ------------------------------------------------------------------------------------ seeding


def test_seeding_is_timed_against_a_loader_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(seeding, "SAMPLES", 2 * seeding.BATCH)
    times = {"none": [1.0, 2.0], "batch": [1.5, 2.5], "sample": [3.0, 4.0]}
    assert seeding.added_us(times, "batch") == pytest.approx([0.5e6 / 128] * 2)
    monkeypatch.setattr(seeding, "BARS_US", {"batch": 1e9, "sample": 1e9})
    assert seeding.main(["--repeats=2", "--check", f"--out={tmp_path}"]) == 0
    assert 'seed_per="sample"' in capsys.readouterr().out
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-seeding.json"))
    assert {name: len(each) for name, each in result["cpu_seconds_per_epoch"].items()} == {
        "none": 2,
        "batch": 2,
        "sample": 2,
    }
    monkeypatch.setattr(seeding, "BARS_US", {"batch": -1e9, "sample": -1e9})
    assert seeding.main(["--quick", "--check"]) == 1
    assert "ABOVE" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- CUDA


def test_without_cuda_nothing_is_measured_or_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_pinned.main(["--out", str(tmp_path / "cuda.json")]) == 0
    assert "CUDA is not available" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_training_loop_sees_every_batch_once_and_in_order() -> None:
    """On the CPU, which stands in for the device: the loop is the same but for the streams."""
    expected = [(torch.full((1,), float(n)), torch.tensor([n])) for n in range(4)]
    clock = cuda_pinned.Clock(iter(expected))
    arrived = list(cuda_pinned.on_device(clock, torch.device("cpu"), None))
    assert_same(arrived, expected)
    assert clock.count == 4

    loader = DataLoader(cuda_pinned.LabelledImages(12, 32), batch_size=4)
    figures = cuda_pinned.train_epoch(loader, cuda_pinned.model(), torch.device("cpu"))
    assert 0 < figures.wait_share < 1
    assert figures.batches_per_s > 0


def test_a_line_of_the_cuda_report() -> None:
    ours = cuda_pinned.EpochFigures(200, 0.1, 50)
    stock = dataclasses.replace(ours, wait_share=0.4, host_cpu_per_batch_us=90)
    made = cuda_pinned.Row(64, "side", "safe", Spread(2, (1, 3), (1.5, 2.5)), [2], ours, stock)
    assert "ratio 2.00 (1.50 to 2.50); wait share 10% (stock 40%)" in cuda_pinned.line(made)


# ----------------------------------------------------------------------------------- stateful


@pytest.mark.slow
def test_resuming_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stateful, "SAMPLES", 6 * stateful.BATCH)
    monkeypatch.setattr(stateful, "CUT", 2)
    monkeypatch.setattr(stateful, "LONG", 10_000)

    def makers() -> dict[str, Any]:  # without torchdata, which is no dependency of the tests
        def make(**more: Any) -> Any:
            return lambda: SafeStatefulDataLoader(
                stateful.Noisy(),  # type: ignore[arg-type]  # indexable
                stateful.BATCH,
                shuffle=True,
                **more,
            )

        return {"torchdata": make(), "ours": make(), "ours, seed=": make(seed=1)}

    monkeypatch.setattr(stateful, "makers", makers)
    assert stateful.main(["--repeats=1", f"--out={tmp_path}"]) == 0
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-stateful.json"))
    assert [row[-2:] for row in result["rows"]][1:] == [["4 of 4", "0 of 4"], ["4 of 4", "4 of 4"]]
    assert "10000 shuffled samples" in capsys.readouterr().out


# ------------------------------------------------------------------------------- across ranks


def test_audits_over_ranks_are_right_before_they_are_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    samples = 60_000
    shares = [across_ranks.order(0, 7_500, rank, samples, 8) for rank in range(8)]
    assert sorted(int(index) for share in shares for index in share) == [*range(samples)]
    arguments = [f"--samples={samples}", f"--out={tmp_path}", "--check"]
    assert across_ranks.main(arguments) == 0
    told = capsys.readouterr().out
    assert "10 of 60000 indices came on no rank" in told
    assert "7500 of 60000 indices came on no rank" in told
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-across-ranks.json"))
    assert (result["few"]["listed"], result["much"]["counts"]["never"]) == (15, 7500)
    monkeypatch.setattr(across_ranks, "BARS", dict.fromkeys(across_ranks.BARS, 0))
    assert across_ranks.main([f"--samples={samples}", "--quick", "--check"]) == 1
    assert "ABOVE" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        across_ranks.main(["--ranks=3"])


# ----------------------------------------------------------------------------- the folder of a run


@pytest.mark.timeout(300)
def test_a_runs_folder_is_timed_weighed_and_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(run_folder, "QUICK_SAMPLES", 1 << 10)
    monkeypatch.setattr(run_folder, "QUICK_RANK_SAMPLES", 640)
    monkeypatch.setattr(run_folder, "QUICK_LOADER_REPEATS", 1)  # each in a process of its own
    monkeypatch.delenv("SAFELOADER_ATTEMPT", raising=False)
    bars = ("BAR_US", "BAR_STREAM", "BAR_CLOSED", "BAR_STEP_S", "BAR_INDEX_S")
    for name in bars:
        monkeypatch.setattr(run_folder, name, 1e9)
    monkeypatch.setattr(run_folder, "BAR_RATIO_TRIVIAL", 0.0)
    assert run_folder.main(["--quick", "--check", f"--out={tmp_path}"]) == 0
    assert "bytes/sample written" in capsys.readouterr().out
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-run-folder.json"))
    assert set(result["sizes"]) == {"64", "8", "1"}
    assert result["sizes"]["64"]["stream_bytes"] > result["sizes"]["64"]["closed_bytes"] > 1
    assert set(result["loaders"]) == {"small-2w"}
    monkeypatch.setattr(run_folder, "BAR_CLOSED", 0)
    assert run_folder.main(["--quick", "--check"]) == 1


def test_reading_a_run_of_many_ranks_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("typer")
    monkeypatch.setattr(many_ranks, "QUICK_RANKS", 3)
    monkeypatch.setattr(many_ranks, "QUICK_SAMPLES", 13_000)
    monkeypatch.setattr(many_ranks, "NETWORK_S", 1e-5)
    monkeypatch.setitem(os.environ, "RANK", "0")  # which it sets, and leaves
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "1")
    assert many_ranks.main(["--quick", "--check", f"--out={tmp_path}"]) == 0
    assert "files a rank" in capsys.readouterr().out
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-many-ranks.json"))
    assert set(result["commands"]) == {"audit", "step", "index", "show"}
    assert all(each["here"]["calls"] > 3 for each in result["commands"].values())


def test_the_page_of_a_long_run_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for library in ("pyarrow", "plotly"):
        pytest.importorskip(library)
    monkeypatch.setattr(report_page, "QUICK_OF_RANK", 640)
    monkeypatch.setattr(report_page, "opened_s", lambda page: (0.25, 0.5))  # no browser here
    assert report_page.main(["--quick", "--check"]) == 0
    assert re.search(r"2,560 +\| [45]\.\d +\|.*\| 0\.25 +\| 0\.50 +\|", capsys.readouterr().out)
    monkeypatch.setattr(report_page, "BAR_READ_S", 0.1)
    assert report_page.main(["--quick", "--check"]) == 1
