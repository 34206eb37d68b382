"""A run in one line: each part against what was done, and who is told at the program's end."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Subset

import safeloader
from safeloader import Recorder, SafeDataLoader
from safeloader.delivery.audit import EpochAudit
from safeloader.delivery.indices import pack
from safeloader.delivery.manifest import BatchManifest, SampleIncident
from safeloader.provenance import summary
from safeloader.provenance.summary import figures_of, summary_of
from tests import datasets

REPOSITORY = Path(safeloader.__file__).parents[1]
MS = 1_000_000


def written(*epochs: list[tuple[int, int, dict[int, float]]], **bound: int) -> Recorder:
    """A notebook of epochs; of a batch when it was asked for, how long waited for, each fetch."""
    recorder = Recorder(**bound)
    for batches in epochs:
        epoch = recorder.begin_epoch(EpochAudit)
        for number, (began, wait, fetches) in enumerate(batches):
            stamps = (np.cumsum([0, *fetches.values(), 0]) * MS).astype(np.int64)
            manifest = BatchManifest(
                number, None, 1, pack(list(fetches)), len(fetches), stamps=stamps.tobytes()
            )
            recorder.delivered(epoch, number, wait * MS, manifest, began * MS)
    return recorder


def told(recorder: Recorder, *audits: EpochAudit) -> list[str]:
    held = list(recorder.held.values())
    return summary_of(held, recorder.totals, recorder.facts, audits).split("; ")


def test_each_part_is_that_of_the_batches() -> None:
    recorder = written(
        [(0, 30, {1: 10, 2: 0.02}), (50, 50, {3: 4})], [(900, 20, {1: 30}), (970, 130, {2: 1})]
    )
    assert told(recorder) == [
        "2 epochs, 5 samples in 4 batches (17 a second)",  # in 100 and 200 ms
        "waited for data 77% of the time",  # 80 of 100, 150 of 200
        "none skipped",
        "slowest: index 1 (20.0 ms), index 3 (4.0 ms), index 2 (0.5 ms)",
    ]


def test_skips_memory_and_a_failed_audit_have_their_parts() -> None:
    recorder = written([(0, 1, {7: 0.001})])
    what = ["skipped", "skipped", "late"]
    recorder.skipped(0, 0, [(1, SampleIncident(each, 0, "why")) for each in what], ())
    recorder.begin_epoch(EpochAudit)
    recorder.skipped(1, 0, [(1, SampleIncident("skipped", 0, "why"))], ())
    recorder.totals.memory_bytes = 1500 << 20
    bad = [EpochAudit(number, counts={"missing": 1}) for number in (1, 2, 3, 5)]
    assert told(recorder, EpochAudit(0), *bad) == [
        "2 epochs, 1 sample in 1 batch (1,000 a second)",
        "NOT OK: epoch 1, 2, 3, ..., see loader.audits",
        "waited for data 100% of the time",
        "3 skipped, 1 late",
        "slowest: index 7 (0.001 ms)",
        "workers held 1,500 MiB",
    ]


def test_what_is_forgotten_is_counted_still() -> None:
    loader = SafeDataLoader(
        range(1000), batch_size=3, drop_last=True, recorder=Recorder(max_bytes=20_000)
    )
    for _ in range(2):
        list(loader)
    assert loader.recorder.forgotten > 500
    assert loader.summary().startswith("2 epochs, 1,998 samples in 666 batches")


class SomeFail(datasets.Noisy):
    def __getitem__(self, index: int) -> Any:
        if index % 10 == 3:
            raise ValueError(f"no sample {index}")
        return super().__getitem__(index)


@pytest.mark.parametrize(("kind", "came"), [("skip", 270), ("replace", 300), ("stream", 300)])
def test_of_every_kind_as_many_are_counted_as_came(kind: str, came: int) -> None:
    def loader(**more: Any) -> SafeDataLoader[Any]:
        if kind == "stream":
            return SafeDataLoader(datasets.Stream(300), batch_size=4, **more)
        return SafeDataLoader(SomeFail(300), batch_size=4, on_error=kind, max_skipped=300, **more)

    whole, small = loader(), loader(recorder=Recorder(max_bytes=10_000))
    list(whole)
    list(small)
    assert len(whole.provenance) == came
    assert small.recorder.forgotten > 10
    for each in (whole, small):
        assert f"1 epoch, {came} samples in " in each.summary()


def test_of_very_many_samples_the_newest_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "_LOOKED_AT", 3)
    recorder = written([(0, 1, {1: 9, 2: 9}), (2, 1, {3: 1}), (4, 1, {4: 2})])
    assert (
        told(recorder)[-1] == "slowest of the newest 2 samples: index 4 (2.0 ms), index 3 (1.0 ms)"
    )


def test_figures_of_two_loaders_come_together() -> None:
    first = written([(0, 30, {1: 10, 2: 1}), (50, 50, {3: 4})])
    second = written([(0, 10, {1: 8, 4: 6}), (90, 10, {5: 0.2})])
    second.totals.memory_bytes = 7 << 20
    one, two = (
        figures_of([*it.held.values()], it.totals, it.facts, most)
        for it, most in ((first, 0), (second, 2))
    )
    both = two.and_of(one)
    assert both.waiting == "waited for data 50% of the time"  # 80 of 100, 20 of 100
    of_two = "slowest of the newest 1 sample: index 5 (0.2 ms)"
    assert two.costs == [of_two, "workers held 7 MiB"]
    assert both.costs == [
        "slowest of the newest 4 samples: index 1 (10.0 ms), index 3 (4.0 ms), index 2 (1.0 ms)",
        "workers held 7 MiB",
    ]
    assert one.and_of(two).costs == both.costs
    assert one.and_of(None) is one


def test_samples_fetched_in_one_call_are_said_to_have_shares() -> None:
    each, together = [1, 2], Subset[Any](datasets.Together(), [1, 0])
    plain, split, one = (
        SafeDataLoader[Any](dataset, batch_size=size)
        for dataset, size in ((each, 2), (together, 2), (together, 1))
    )
    for loader in (plain, split, one):
        list(loader)
    words = "slowest (those timed together have equal shares): index "
    assert words in split.summary()
    for alone in (plain, one):
        assert "slowest: index " in alone.summary()
    both, other = (
        figures_of([*it.recorder.held.values()], it.recorder.totals, it.recorder.facts)
        for it in (plain, split)
    )
    assert both.and_of(other).costs[0].startswith(words)


def test_of_very_many_batches_the_newest_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "_BATCHES", 2)
    recorder = written([(0, 1, {1: 9}), (2, 1, {3: 1}), (4, 1, {4: 2})])
    figures = figures_of([*recorder.held.values()], recorder.totals, recorder.facts, 8)
    said = "slowest of the newest 2 samples: index 4 (2.0 ms), index 3 (1.0 ms)"
    assert figures.costs == [said]


def test_nothing_came() -> None:
    assert SafeDataLoader([1]).summary() == "0 epochs, no batch handed over"


def test_a_loader_tells_of_itself() -> None:
    loader = SafeDataLoader(SomeFail(20), batch_size=5, on_error="skip")
    list(loader)
    said = loader.summary()
    assert said.startswith("1 epoch, 18 samples in 4 batches (")
    assert "; 2 skipped; slowest: index " in said
    assert "\n" not in said


# ── at the program's end ─────────────────────────────────────────────────────────────────────────

MAIN = """
import json, logging, os, sys
from safeloader import SafeDataLoader
def main():
    loader = SafeDataLoader(list(range(10)), batch_size=4)
    for _ in range(2):
        list(loader)
    print(json.dumps(loader.audit.to_dict()))
"""
LINE = "SafeDataLoader over list (10): 2 epochs, 20 samples in 6 batches ("


def run(program: str, **environment: str) -> tuple[str, list[str]]:
    """What a program prints on stdout, and its lines on stderr."""
    kept = {name: value for name, value in os.environ.items() if "SAFELOADER" not in name}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MAIN + program],
        cwd=REPOSITORY,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr.splitlines()


def test_a_program_that_does_not_log_hears_nothing() -> None:
    out, lines = run("main()")
    assert json.loads(out)["ok"] is True
    assert lines == []


@pytest.mark.parametrize("alive", ["", "loader = SafeDataLoader(range(3)); list(loader)"])
def test_a_program_that_logs_at_level_info_has_a_line_of_each_loader(alive: str) -> None:
    program = f"logging.basicConfig(level=logging.INFO, format='%(message)s'); main(); {alive}"
    out, lines = run(program)
    assert json.loads(out)["ok"] is True  # stdout is the program's
    assert lines[0].startswith(LINE)
    rest = [line.partition(":")[0] for line in lines[1:]]
    assert rest == ["SafeDataLoader over range (3)"] * bool(alive)


def test_who_asked_for_lines_by_the_environment_has_it_too() -> None:
    _, lines = run("main()", SAFELOADER_TRACE="1")
    assert [line for line in lines if LINE in line] == lines[-1:]


def test_off_says_nothing() -> None:
    program = "logging.basicConfig(level=logging.INFO)\nlist(SafeDataLoader([1, 2]))"
    assert run(program, SAFELOADER="off") == ("", [])


def test_many_loaders_of_one_name_have_one_line_and_of_many_names_some_are_counted() -> None:
    program = """
logging.basicConfig(level=logging.INFO, format='%(message)s')
for _ in range(5): list(SafeDataLoader([1]))
for size in range(30): list(SafeDataLoader(range(size + 2)))
"""
    _, lines = run(program)
    assert lines[0].startswith("SafeDataLoader over list (1), the last of 5 loaders: 1 epoch, 1 s")
    assert len(lines) == 21
    assert lines[-1] == "and 11 more loaders"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_tells_of_its_own_loaders_alone() -> None:
    program = """
logging.basicConfig(level=logging.INFO, format='%(process)d %(message)s')
loader = SafeDataLoader([1, 2]); list(loader)
child = os.fork()
if child == 0:
    list(SafeDataLoader([1, 2, 3]))
    del loader
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
print(os.getpid())
"""
    out, lines = run(program)
    told = sorted(line.split()[0] == out.strip() and "(2)" in line for line in lines)
    assert told == [False, True]
    assert sum("(3)" in line for line in lines) == 1


def test_a_process_of_multiprocessing_tells_too() -> None:
    program = """
import multiprocessing
logging.basicConfig(level=logging.INFO, format='%(message)s')
child = multiprocessing.get_context("fork").Process(target=main)
child.start(); child.join()
assert child.exitcode == 0
"""
    _, lines = run(program)
    assert [line.startswith(LINE) for line in lines] == [True]


def test_a_recorder_is_not_kept_for_the_line_at_the_end() -> None:
    loader = SafeDataLoader([1, 2])
    list(loader)
    gone = weakref.ref(loader.recorder)
    del loader
    gc.collect()
    assert gone() is None


def test_a_fault_of_ours_is_told_in_the_place_of_the_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> str:
        raise OSError("no such thing")

    monkeypatch.setattr(summary, "_end", [])
    monkeypatch.setattr(summary, "summary_of", fails)
    with caplog.at_level(logging.INFO, "safeloader"):
        list(SafeDataLoader([1, 2]))
        gc.collect()
        summary._end[0].say()
    (line,) = caplog.messages
    assert "its summary failed, a fault of safeloader's own" in line
    assert "no such thing" in line
