"""``transport.jsonl``: what crossed, and by which way, as long as a run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from safeloader.provenance.open_folder import OpenFolder
from safeloader.provenance.transport_log import TransportLog
from safeloader.transport.stats import TransportStats
from tests.run_folders import new_process

SLOTS = {"slots": 4}


def lines_in(folder: OpenFolder) -> list[dict[str, Any]]:
    path = folder.path / "transport.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def folder(tmp_path: Path) -> OpenFolder:
    return OpenFolder(tmp_path, [], "loader")


def test_counts_of_a_recorder_that_comes_later_are_added(folder: OpenFolder) -> None:
    log = TransportLog(folder)
    log.goes_on("first", lambda: TransportStats(2, 4096, {"slots": 3}, {"sparse": 1}))
    log.note()
    log.goes_on("first", lambda: TransportStats(3, 8192, {"slots": 5}, {"sparse": 1}))
    log.note()
    log.goes_on("second", lambda: TransportStats(1, 4096, {"torch": 2, "slots": 1}, {"sparse": 2}))
    log.note()
    told = [(each["slots"], each["batches"], each["fallbacks"]) for each in lines_in(folder)]
    assert told == [
        (2, {"slots": 3}, {"sparse": 1}),
        (3, {"slots": 5}, {"sparse": 1}),
        (1, {"slots": 6, "torch": 2}, {"sparse": 3}),
    ]


def test_nothing_is_written_where_nothing_crossed_or_changed(folder: OpenFolder) -> None:
    log = TransportLog(folder)
    log.note()
    log.goes_on("it", lambda: None)
    log.note()
    log.goes_on("it", TransportStats)
    log.note()
    assert lines_in(folder) == []
    log.goes_on("it", lambda: TransportStats(1, 1, SLOTS))
    log.note()
    log.note()
    assert len(lines_in(folder)) == 1


def test_counts_that_change_as_they_are_read_are_read_the_next_time(folder: OpenFolder) -> None:
    log, broken = TransportLog(folder), [True]

    def stats() -> TransportStats:
        if broken.pop():
            raise RuntimeError("dictionary changed size during iteration")
        return TransportStats(1, 1, SLOTS)

    broken.insert(0, False)
    log.goes_on("it", stats)
    log.note()
    assert lines_in(folder) == []
    log.note()
    assert lines_in(folder)[0]["batches"] == SLOTS


class Rows(torch.utils.data.Dataset[Any]):
    """Of each second batch some does not go into a slot."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(5000), index


def together(samples: list[Any]) -> Any:
    rows = torch.stack([row for row, _ in samples])
    return rows.share_memory_() if samples[0][1] % 8 else rows


def test_a_run_with_workers_tells_of_its_slots_and_what_was_in_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow", reason="the run's batches are kept with pyarrow")
    from safeloader import SafeDataLoader
    from safeloader.report.cost import cost_of
    from safeloader.report.run import RunFolder

    loader = SafeDataLoader(Rows(), 4, num_workers=1, collate_fn=together, run_dir=tmp_path)
    for _ in range(2):
        list(loader)
    stats = loader.transport_stats
    new_process(monkeypatch)
    run = RunFolder(tmp_path)
    lines = run.transport()
    assert lines[-1]["batches"] == stats.batches
    assert lines[-1]["fallbacks"] == stats.fallbacks
    assert (lines[-1]["attempt"], lines[-1]["rank"], lines[-1]["loader"]) == (0, 0, 0)
    cost = cost_of(run)
    assert cost.batches == stats.batches
    assert cost.fallbacks == stats.fallbacks
    assert sum(cost.batches.values()) == 8
    assert cost.slot_bytes > 4 * 5000 * 4
    assert cost_of(run, attempt=1).batches == {}
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    from safeloader import __main__

    assert __main__.main(["show", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.partition("What does it cost?")[2]
    assert "4 batches came by slots" in shown
    assert "not in a slot, 4 batches: a tensor is in torch's shared memory already" in shown
    assert __main__.main(["show", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cost"]["fallbacks"] == stats.fallbacks
    list(SafeDataLoader(Rows(), 4, run_dir=tmp_path / "main"))
    new_process(monkeypatch)
    assert RunFolder(tmp_path / "main").transport() == []
