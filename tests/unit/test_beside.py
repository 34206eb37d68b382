"""Loaders recorded from beside, where something of ours fails or the folder cannot be written."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from safeloader import SKIP, Recorder, SafeDataLoader, beside
from safeloader.handles import handle_of
from safeloader.introspect import warned
from safeloader.provenance import events, run_folders


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What a launched process begins with; nothing is said at this process's end."""
    monkeypatch.setenv("SAFELOADER_LAUNCHED", json.dumps({"options": {"verify": "warn"}}))
    monkeypatch.setenv("SAFELOADER_RUN", str(tmp_path / "runs"))
    monkeypatch.setattr(run_folders, "_process", run_folders._Process())
    monkeypatch.setattr(run_folders.atexit, "register", lambda function: None)
    monkeypatch.setattr(beside, "_state", beside._State())
    monkeypatch.setattr(beside.atexit, "register", lambda function: None)
    monkeypatch.setattr(warned, "instead", None)
    events.listeners.append(beside.listens)  # as the hook does
    yield beside._state
    events.listeners.remove(beside.listens)


def plain() -> Any:
    return DataLoader(torch.arange(6), batch_size=4)  # type: ignore[arg-type]


def recorded(loader: Any) -> Any:
    return beside.get_iterator(loader, DataLoader._get_iterator)


def lines_at_end(capsys: Any) -> list[str]:
    """What the process says at its end, without what the loading cost."""
    beside._say()
    said = capsys.readouterr().err.splitlines()
    return [line for line in said if not line.startswith("    ")]


def audits(folder: Path) -> list[Any]:
    paths = sorted(folder.glob("runs/attempt=0/rank=0/*/epochs.jsonl"))
    lines = [line for path in paths for line in path.read_text().splitlines()]
    return [json.loads(line)["audit"] for line in lines]


def test_a_fault_of_ours_is_said_once_and_torchs_own_iterator_serves(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fails(*args: Any) -> Any:
        raise OSError("out of luck")

    monkeypatch.setattr(beside, "iterate_recorded", fails)
    loader = plain()
    for _ in range(2):
        assert len(list(recorded(loader))) == 2
    assert len(list(recorded(plain()))) == 2
    said = capsys.readouterr().err
    assert said.count("safeloader failed (OSError: out of luck)") == 1
    beside._say()
    said = capsys.readouterr().err
    assert "NOT recorded: DataLoader" in said
    assert "1 epoch" not in said


@pytest.mark.parametrize("what", ["why_not_recordable", "calling_line"])
def test_a_fault_before_the_loader_is_known_ends_no_program(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fails(*args: Any) -> Any:
        raise LookupError("out of luck")

    monkeypatch.setattr(beside, what, fails)
    loader = plain()
    for _ in range(2):
        assert len(list(recorded(loader))) == 2
        assert len(list(beside.iterate(loader, DataLoader.__iter__))) == 2
    beside.made(object, loader)
    assert capsys.readouterr().err.count("safeloader failed (LookupError: out of luck)") == 1


def test_a_time_limit_that_strikes_meanwhile_is_the_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def too_long(*args: Any) -> Any:
        raise TimeoutError("of the program's own")

    before = signal.signal(signal.SIGUSR1, too_long)
    monkeypatch.setattr(
        beside, "iterate_recorded", lambda *args: os.kill(os.getpid(), signal.SIGUSR1)
    )
    try:
        with pytest.raises(TimeoutError, match="the program's own"):
            recorded(plain())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert capsys.readouterr().err == ""


def test_a_second_thread_waits_until_it_is_known_where_to_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    second = threading.Thread(target=lambda: list(recorded(plain())))

    open_run = run_folders.open_run

    def made_slowly(*args: Any, **more: Any) -> Any:
        second.start()
        second.join(0.2)  # it ends only where it does not wait
        return open_run(*args, **more)

    monkeypatch.setattr(run_folders, "open_run", made_slowly)
    list(recorded(plain()))
    second.join()
    assert [told["delivered"] for told in audits(tmp_path) if told] == [6, 6]


def test_an_error_of_torchs_own_is_raised_as_it_is_and_no_fault_of_ours(capsys: Any) -> None:
    loader = plain()
    loader.timeout = 5  # without workers, which torch's constructor does not take
    with pytest.raises(AssertionError) as ours:
        recorded(loader)
    with pytest.raises(AssertionError) as theirs:
        DataLoader._get_iterator(loader)
    assert (str(ours.value), ours.value.__context__) == (str(theirs.value), None)
    assert capsys.readouterr().err == ""


def test_an_epoch_that_runs_still_is_told_as_it_stands(tmp_path: Path, capsys: Any) -> None:
    loader = plain()
    next(recorded(loader))
    beside._say()
    assert "1 epoch, 4 of 4 delivered" in capsys.readouterr().err
    began, stands = audits(tmp_path)
    assert began is None
    assert (stands["delivered"], stands["complete"]) == (4, False)
    beside._say()
    assert capsys.readouterr().err == ""


def test_what_was_drawn_and_not_delivered_is_told_apart(capsys: Any) -> None:
    dropping: Any = DataLoader(torch.arange(6), batch_size=4, drop_last=True)  # type: ignore[arg-type]
    list(recorded(dropping))
    loader: Any = DataLoader(torch.arange(60), batch_size=4, num_workers=1)  # type: ignore[arg-type]
    next(recorded(loader))
    beside._say()
    said = capsys.readouterr().err
    assert "4 of 6 delivered; 2 dropped\n" in said
    assert "4 of 12 delivered; 8 drawn ahead and not handed over\n" in said


def test_loaders_that_one_line_iterates_are_told_apart_by_what_they_read(
    tmp_path: Path, capsys: Any
) -> None:
    for length in (6, 2, 6):
        list(recorded(DataLoader(torch.arange(length), batch_size=4)))  # type: ignore[arg-type]
    _, *said = lines_at_end(capsys)
    at = said[0].partition(" at ")[2].partition(": ")[0]
    assert said == [
        f"  DataLoader over Tensor (6) at {at}: 2 epochs, 12 of 12 delivered",
        f"  DataLoader over Tensor (2) at {at}: 1 epoch, 2 of 2 delivered",
    ]
    folders = sorted(tmp_path.glob("runs/attempt=0/rank=0/*"))
    lines = [(path / "epochs.jsonl").read_text().splitlines() for path in folders]
    named = [[json.loads(line)["loader"] for line in each] for each in lines]
    six, two = (f"DataLoader over Tensor ({length}) at {at}" for length in (6, 2))
    assert named == [[six] * 4, [two] * 2]


def test_a_process_that_has_a_rank_says_it(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("RANK", "3")
    list(recorded(plain()))
    beside._say()
    heading, *_ = capsys.readouterr().err.splitlines()
    assert heading == f"safeloader: loaders of process {os.getpid()}, rank 3"


def test_errors_of_the_users_own_are_raised_and_counted(
    tmp_path: Path, capsys: Any, caplog: Any
) -> None:
    class Bad:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> int:
            raise KeyError(index)

    loader: Any = DataLoader(Bad())  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        list(recorded(loader))
    beside._say()
    assert "1 error raised" in capsys.readouterr().err
    (path,) = tmp_path.glob("runs/attempt=0/rank=0/*/failures/*.json")
    assert caplog.messages == [f"DataLoader over Bad (3): the failure is written to {path}"]


def test_many_lines_are_not_all_told(state: Any, capsys: Any) -> None:
    for number in range(60):
        line = state.line("DataLoader", f"train.py:{number}")
        line.unrecorded, line.why_not = 2, ["it could not be"]
    beside._say()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 52
    assert said[1].endswith("DataLoader at train.py:0, 2 times: it could not be")
    assert said[-1].endswith("and 10 more")


@pytest.mark.slow
def test_of_many_indices_the_first_are_written(tmp_path: Path, state: Any) -> None:
    class Fails:
        def __len__(self) -> int:
            return 1100

        def __getitem__(self, index: int) -> int:
            raise KeyError(index)

    state.options |= {"on_error": lambda failure: SKIP, "max_skipped": 10_000}
    loader: Any = DataLoader(Fails(), batch_size=500)  # type: ignore[arg-type]
    assert list(recorded(loader)) == []
    told = audits(tmp_path)[-1]
    assert (len(told["skipped"]), told["counts"]["skipped"]) == (1000, 1100)
    assert told["skipped"] == list(range(1000))


def test_without_a_folder_no_list_is_made_of_what_may_be_a_million(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("SAFELOADER_RUN")
    monkeypatch.setattr(beside.EpochAudit, "to_dict", lambda self: pytest.fail("nobody reads it"))
    list(recorded(plain()))
    beside._say()
    assert "1 epoch, 6 of 6 delivered" in capsys.readouterr().err


def test_a_handle_goes_with_its_loader() -> None:
    loader = plain()
    list(recorded(loader))
    handle = handle_of(loader)
    assert handle is not None
    assert handle.audit.delivered == 6
    assert repr(handle).startswith("LoaderHandle(DataLoader, first iterated at")
    other = plain()
    assert handle_of(other) is None
    del loader
    with pytest.raises(LookupError, match="is gone"):
        handle.dataset


def test_loaders_of_ours_are_told_of_too_and_their_records_stay_their_own(capsys: Any) -> None:
    recorder = Recorder()
    loaders = [SafeDataLoader(range(3), recorder=recorder) for _ in range(2)]  # type: ignore[arg-type]
    for loader in loaders:
        list(loader)
    assert loaders[0].audit.drawn == 3  # they share a notebook
    assert loaders[0].verify == "raise"
    _, *said = lines_at_end(capsys)
    assert [line.partition(": ")[2] for line in said] == ["2 epochs, 6 of 6 delivered"]
    assert f"SafeDataLoader over range (3) at {__file__}:" in said[0]


def test_a_loader_of_ours_that_torch_serves_is_told_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(beside, "why_unrecorded", lambda workers: "it knows no such torch")
    beside.made(object, SafeDataLoader(range(3)))  # type: ignore[arg-type]
    beside._say()
    said = capsys.readouterr().err
    assert "NOT recorded: SafeDataLoader at" in said
    assert said.rstrip().endswith("it knows no such torch")


def test_two_loaders_of_one_line_are_told_together_and_not_mixed_up(capsys: Any) -> None:
    loaders = [plain() for _ in range(2)]
    first, second = (recorded(loader) for loader in loaders)  # both of the line that asks here
    next(first)
    list(second)
    said = lines_at_end(capsys)
    assert len(said) == 2
    assert "2 epochs, 10 of 10 delivered" in said[1]


# ── what it cost ─────────────────────────────────────────────────────────────────────────────────


class Slow:
    """One sample takes longer than all others."""

    def __init__(self, at: int, size: int = 20) -> None:
        self.at, self.size = at, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        time.sleep(0.05 if index == self.at else 0)
        return index


def costs(capsys: Any) -> list[str]:
    beside._say()
    said = capsys.readouterr().err.splitlines()
    return [line.removeprefix("    ") for line in said if line.startswith("    ")]


def test_each_loader_has_a_line_on_waiting_and_the_slowest(capsys: Any) -> None:
    loader: Any = DataLoader(Slow(7), batch_size=4)  # type: ignore[arg-type]
    list(recorded(loader))
    ours: Any = SafeDataLoader(Slow(3), batch_size=4)  # type: ignore[arg-type]
    list(ours)
    first, second = costs(capsys)
    pattern = r"waited for data \d+% of the time; slowest: index {} \(5\d\.\d ms\), index \d+ .*"
    assert re.fullmatch(pattern.format(7), first)
    assert re.fullmatch(pattern.format(3), second)
    figures = ours.summary()  # the same words
    waiting, slowest = second.split("; ")
    assert f"; {waiting}; none skipped; {slowest}" in figures


def test_of_loaders_that_are_gone_it_is_told_too_and_they_are_not_kept(capsys: Any) -> None:
    gone = []
    for at in (7, 3):
        loader: Any = DataLoader(Slow(at), batch_size=4)  # type: ignore[arg-type]
        list(recorded(loader))
        gone.append(weakref.ref(handle_of(loader).recorder))  # type: ignore[union-attr]
        del loader
        gc.collect()
    assert [each() for each in gone] == [None, None]
    (said,) = costs(capsys)
    assert re.search(r"slowest: index [37] \(5\d\.\d ms\), index [37] \(5\d\.\d ms\), ", said)


def test_what_workers_hold_is_told(capsys: Any) -> None:
    loader: Any = DataLoader(Slow(7), batch_size=4, num_workers=1)  # type: ignore[arg-type]
    list(recorded(loader))
    handle = handle_of(loader)
    assert handle is not None
    handle.recorder.totals.memory_bytes = 120 << 20
    assert costs(capsys)[0].endswith("; workers held 120 MiB")


def test_where_nothing_came_nothing_is_told(capsys: Any) -> None:
    list(recorded(DataLoader([], batch_size=4)))  # type: ignore[arg-type]
    beside._say()
    assert capsys.readouterr().err.splitlines()[1].endswith("1 epoch, 0 of 0 delivered")


def test_a_notebook_that_two_loaders_share_is_told_once(capsys: Any) -> None:
    recorder = Recorder()
    for size in (4, 6):
        list(SafeDataLoader(range(size), recorder=recorder))  # type: ignore[arg-type]
    assert len(costs(capsys)) == 1


def test_a_fault_of_ours_leaves_it_out(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fails(*_: Any) -> None:
        raise OSError("out of luck")

    monkeypatch.setattr(beside, "figures_of", fails)
    loader = plain()
    list(recorded(loader))
    beside._say()
    said = capsys.readouterr().err
    assert said.count("safeloader failed (OSError: out of luck)") == 1
    assert said.endswith("1 epoch, 6 of 6 delivered\n")
