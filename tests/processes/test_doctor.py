"""The doctor: each fault for real, and beside it a sound program of which nothing is said."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import coverage
import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    get_worker_info,
)

import safeloader
from safeloader import SafeDataLoader, doctor
from safeloader.commands.doctor import main as command
from safeloader.examining import child, looks, patience, samples, speed
from safeloader.examining import doctor as examining
from safeloader.examining.report import Examination
from tests import family
from tests.processes.test_launcher import ran

N = 12
SHORT_S = 12.0


@pytest.fixture(autouse=True)
def measured_as_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor's child ends by `os._exit`, and what it did is among the lines that ran.

    Of this file alone, and not by coverage's own `patch = ["_exit"]`: workers end in the same way,
    and each would write once more what this process did so far, which takes longer than its work.
    """
    mine, end = coverage.Coverage.current(), os._exit
    if mine is None:
        return

    def ends(status: int) -> NoReturn:
        try:
            its_own = coverage.Coverage.current()
            if its_own is not mine and its_own is not None:  # a worker has stopped its own
                its_own.save()
        finally:
            end(status)

    monkeypatch.setattr(os, "_exit", ends)


@pytest.fixture
def no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All looks but the one that takes all the time there is."""
    monkeypatch.setattr(looks, "LOOKS", looks.LOOKS[:-1])


def only_workers(patch: pytest.MonkeyPatch, *workers: int) -> None:
    """Of the settings, only these numbers of workers, each a few times."""
    patch.setattr(speed, "counts", lambda cores, own: sorted({*workers, own}))
    patch.setattr(speed, "_MOST", 0)
    patch.setattr(speed, "_PREFETCH", ())
    patch.setattr(speed, "_ROUNDS", 2)


@pytest.fixture
def few_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measuring that is over in a second: what fails in it fails with the first setting."""
    only_workers(monkeypatch, 0, 1)
    monkeypatch.setattr(speed, "_TURN_S", 0.1)
    monkeypatch.setattr(speed, "_SPAWN_S", float("inf"))  # no time for a fresh Python


@pytest.fixture
def soon_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 s, 2 are waited for what hangs: a busy machine has time for all that comes before."""
    monkeypatch.setattr(patience, "_SHARE", 1 / 6)
    monkeypatch.setattr(patience, "_COLD_SHARE", 1 / 6)
    monkeypatch.setattr(examining, "_SEARCHED_SHARE", 1 / 10)


class Sound(Dataset[Any]):
    """Nothing is wrong with it; the faults are its children."""

    def __init__(self) -> None:
        self.data = torch.arange(N, dtype=torch.float32)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < N:
            raise IndexError(index)
        return self.data[index] * 2


def kinds(report: Examination) -> list[str]:
    """The findings; that a local class cannot be pickled is true, and left out."""
    assert json.loads(json.dumps(report.to_dict()))["findings"] is not None
    assert str(report)
    return [each.kind for each in report.findings if "defined inside" not in each.answer]


def examine(dataset: Any, seconds: float = SHORT_S, **options: Any) -> Examination:
    return doctor(DataLoader(dataset, **({"batch_size": 2} | options)), seconds=seconds)


def said(report: Examination, kind: str) -> Any:
    [found] = [each for each in report.findings if each.kind == kind]
    return found


@pytest.mark.usefixtures("no_speed")
class TestSound:
    def test_nothing_is_said_of_a_sound_dataset(self) -> None:
        report = examine(Sound(), shuffle=True)
        assert report.findings == ()
        assert report.ok
        assert report.samples["count"] == N
        assert 0 < report.sent["bytes"] < 10_000
        assert "nothing bad found" in str(report)

    def test_random_transforms_are_sound(self) -> None:
        class Augmented(Sound):
            def __init__(self) -> None:
                super().__init__()
                self.own = np.random.default_rng(3)
                self.old = np.random.RandomState(3)
                self.pure = random.Random(3)

            def __getitem__(self, index: int) -> Any:
                mine = self.own.random() + self.old.rand() + self.pure.random()
                drawn = torch.rand(()).item() + np.random.rand() + random.random()
                return super().__getitem__(index) + drawn + mine

        report = examine(Augmented())
        assert [kind for kind in kinds(report) if kind != "generators"] == []

    def test_a_cache_is_sound(self) -> None:
        class Cached(Sound):
            def __init__(self) -> None:
                super().__init__()
                self.cache: dict[int, Any] = {}
                self.kept = [None] * N
                self.scratch = np.zeros(4)

            def __getitem__(self, index: int) -> Any:
                self.scratch[:] = index
                if index not in self.cache:
                    self.cache[index] = super().__getitem__(index)
                    self.kept[index] = self.cache[index]
                return self.cache[index]

        assert kinds(examine(Cached())) == []

    def test_nothing_changes_in_this_process(self) -> None:
        class Counting(Sound):
            fetched = 0

            def __getitem__(self, index: int) -> Any:
                self.fetched += 1
                return super().__getitem__(index)

        dataset = Counting()
        generator = torch.Generator()
        loader = DataLoader(dataset, shuffle=True, generator=generator, num_workers=1)
        before = set(vars(loader)), generator.get_state().tolist()
        states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
        doctor(loader, seconds=SHORT_S)
        assert dataset.fetched == 0
        assert not dataset.data.is_shared()
        assert (set(vars(loader)), generator.get_state().tolist()) == before
        now = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
        assert now[:2] == states[:2]
        assert torch.equal(now[2], states[2])
        assert loader._iterator is None

    @pytest.mark.parametrize(
        "make",
        [
            lambda: SafeDataLoader(Sound(), batch_size=4, validate=[len_is_zero]),
            lambda: DataLoader(Sound(), batch_size=None),
            lambda: DataLoader(Sound(), batch_sampler=[[0, 3], [5, 1]]),
            lambda: DataLoader(Sound(), collate_fn=len),
            lambda: DataLoader({"a": 1, "b": 2}, sampler=["b", "a"]),  # type: ignore[arg-type]
            lambda: DataLoader(Divided(), batch_size=3),
            lambda: DataLoader(Divided(), batch_size=None),
            lambda: wrapped(DataLoader(Sound(), batch_size=4)),
        ],
    )
    def test_every_kind_of_loader_is_taken(self, make: Any) -> None:
        report = doctor(make(), seconds=SHORT_S)
        assert kinds(report) == []
        assert report.not_looked_at == ()
        assert report.samples["count"] > 1


def len_is_zero(sample: Any, index: Any) -> None:
    assert sample.dim() == 0


def wrapped(loader: Any) -> Any:
    class Wrapper:
        def __init__(self) -> None:
            self.loader = loader

    return Wrapper()


class Divided(IterableDataset[Any]):
    """A stream that its workers divide."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        yield from range(40) if info is None else range(info.id, 40, info.num_workers)


class Whole(IterableDataset[Any]):
    """A stream that each worker reads whole."""

    def __iter__(self) -> Iterator[int]:
        yield from range(40)


# ── what harms the process that fetches


@pytest.mark.usefixtures("no_speed")
class TestHarm:
    def test_a_hang_is_told_with_its_index_and_its_line(self) -> None:
        class Hanging(Sound):
            def __getitem__(self, index: int) -> Any:
                if index == 5:
                    threading.Event().wait()
                return super().__getitem__(index)

        report = examine(Hanging(), seconds=9.0)
        found = said(report, "hangs")
        assert "index 5" in found.answer
        assert "in __getitem__" in found.evidence
        assert found.level == "error"
        assert report.seconds < 15

    def test_what_comes_late_is_no_hang(self) -> None:
        class SlowStart(Sound):
            ready = False

            def __getitem__(self, index: int) -> Any:
                if not self.ready:
                    time.sleep(3.9)  # more than 0.6 of the time there is
                    self.ready = True
                return super().__getitem__(index)

        report = examine(SlowStart(), seconds=6.0)
        assert kinds(report) == ["slow_first"]
        assert report.ok

    @pytest.mark.parametrize("works", [True, False])
    def test_a_set_up_that_takes_all_the_time_is_slow(self, works: bool) -> None:
        class SetsUp(Sound):
            def __getitem__(self, index: int) -> Any:
                busy(60) if works else time.sleep(60)

        report = examine(SetsUp(), seconds=4.0)
        assert kinds(report) == ["slow_start"]
        found = said(report, "slow_start")
        assert re.fullmatch(
            r"slow: no sample in \d s; give it longer: doctor\(loader, seconds=16\)", found.answer
        )
        assert found.level == "warning"
        assert "at index 0, the first that was fetched; it " in found.evidence
        assert ("of a processor was used" in found.evidence) == works
        assert "test_doctor.py" in found.evidence  # where it stands
        assert any("the 4 s were up" in each for each in report.not_looked_at)
        assert report.ok

    def test_a_hang_at_the_first_sample_is_told(self) -> None:
        class Hanging(Sound):
            def __getitem__(self, index: int) -> Any:
                threading.Event().wait()

        report = examine(Hanging(), seconds=4.0)
        found = [each for each in report.findings if each.kind == "hangs"]
        assert "index 0" in found[0].answer
        assert "the first that was fetched, and all of its threads" in found[0].evidence
        assert not report.ok
        assert report.seconds < 12

    @pytest.mark.parametrize(
        ("end", "how"),
        [
            (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL (signal 9)"),
            (lambda: os._exit(3), "ended itself with exit status 3"),
            (lambda: os.kill(os.getpid(), signal.SIGSEGV), "was killed by SIGSEGV (signal 11)"),
        ],
        ids=["kill", "exit", "segfault"],
    )
    def test_a_death_is_told_with_its_index(self, end: Any, how: str) -> None:
        class Deadly(Sound):
            def __getitem__(self, index: int) -> Any:
                if index == 5:
                    end()
                return super().__getitem__(index)

        report = examine(Deadly())
        found = said(report, "dies")
        assert how in found.answer
        assert "index 5" in found.answer
        assert report.samples["count"] == N - 1  # the other looks were made without it
        assert not report.ok

    def test_where_every_sample_kills_what_can_be_looked_at_is(self) -> None:
        class Deadly(Sound):
            def __init__(self) -> None:
                super().__init__()
                self.scale = lambda x: x

            def __getitem__(self, index: int) -> Any:
                os._exit(4)

        report = examine(Deadly())
        assert "dies" in kinds(report)
        # Its class, which is local, and the lambda.
        assert [each.kind for each in report.findings] == ["dies", *["unpicklable"] * 2]
        assert any("fetching does not come back" in each for each in report.not_looked_at)

    def test_what_is_printed_is_captured(self, capfd: pytest.CaptureFixture[str]) -> None:
        class Loud(Sound):
            def __getitem__(self, index: int) -> Any:
                print("x" * 100_000)
                os.write(2, b"straight to the descriptor\n")
                return super().__getitem__(index)

        report = examine(Loud())
        assert report.output_bytes > 20 * 100_000
        assert len(report.output) <= 4096
        assert "straight to the descriptor" in str(report)
        assert kinds(report) == []
        assert "xxx" not in "".join(capfd.readouterr())

    def test_what_it_starts_is_ended_with_it(self, tmp_path: Path) -> None:
        pids = tmp_path / "pids"

        class Forking(Sound):
            def __getitem__(self, index: int) -> Any:
                if (child := os.fork()) == 0:
                    time.sleep(1000)
                    os._exit(0)
                with pids.open("a") as file:
                    file.write(f"{child}\n")
                return super().__getitem__(index)

        report = examine(Forking())
        assert report.ok
        started = [int(line) for line in pids.read_text().split()]
        assert len(started) >= N
        end = time.monotonic() + 20
        while any(map(alive, started)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(map(alive, started))

    def test_an_error_is_told_with_its_index_and_its_line(self) -> None:
        class Broken(Sound):
            def __getitem__(self, index: int) -> Any:
                if index == 5:
                    raise KeyError("image")
                return super().__getitem__(index)

        found = said(examine(Broken()), "raises")
        assert found.answer == "index 5 raises KeyError"
        assert "test_doctor.py:" in found.evidence


class Flaky(Sound):
    """The fetch with a certain number fails, whichever its index."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.fetched = at, 0

    def __getitem__(self, index: int) -> Any:
        self.fetched += 1
        if self.fetched == self.at:
            raise OSError("network")
        return super().__getitem__(index)


class Together(Flaky):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [Sound.__getitem__(self, index) for index in indices]


class FailsInTheSecondPass(IterableDataset[Any]):
    passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        for number in range(12):
            if self.passes == 2 and number == 3:
                raise OSError("network")
            yield number


@pytest.mark.usefixtures("no_speed")
class TestOnce:
    """An error that comes once is told as such, wherever a look meets it."""

    @pytest.mark.parametrize("at", [1, 2, 2 * N, 2 * N + 1, 2 * N + 2])
    @pytest.mark.parametrize("kind", [Flaky, Together])
    def test_an_error_that_comes_once(self, at: int, kind: Any) -> None:
        report = examine(kind(at))
        finding = said(report, "raises")
        assert finding.answer.endswith("raised OSError, and came at another time")
        assert "OSError: network" in finding.evidence
        assert "test_doctor.py" in finding.evidence
        assert not {"dies", "look_failed", "workers_raise"} & set(kinds(report))

    def test_an_error_of_the_second_pass_of_a_stream(self) -> None:
        finding = said(examine(FailsInTheSecondPass()), "raises")
        assert finding.answer == ("index 3 of the stream raised OSError, and came at another time")

    def test_what_never_fails_is_sound(self) -> None:
        assert kinds(examine(Flaky(0))) == kinds(examine(Together(0))) == []


class RaisingSampler(Sampler[int]):
    def __iter__(self) -> Any:
        raise ZeroDivisionError("no weights")


class Unreadable:
    """A sample that cannot be looked at."""

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise ZeroDivisionError("not open")


class OfUnreadable(Sound):
    def __getitem__(self, index: int) -> Any:
        return Unreadable()


class Longer(Sound):
    def __len__(self) -> int:
        return N + 2


class Leaving(Sound):
    def __getitem__(self, index: int) -> Any:
        if index == 3:
            sys.exit(4)
        return super().__getitem__(index)


@pytest.mark.usefixtures("no_speed")
class TestFailedLooks:
    def test_what_the_users_code_raises_in_a_look_is_no_death(self) -> None:
        report = examine(Sound(), sampler=RaisingSampler())
        finding = said(report, "look_failed")
        assert (finding.level, finding.answer) == (
            "error",
            "drawing indices raises ZeroDivisionError",
        )
        assert "dies" not in kinds(report)
        report = examine(OfUnreadable(), collate_fn=len)
        assert "looking at the sample of 0 raises" in said(report, "look_failed").answer

    def test_a_fault_of_a_look_is_told_as_ours_and_the_others_are_made(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(samples, "size_of", torch.stack)  # which takes no tensor
        report = examine(Longer())
        finding = said(report, "look_failed")
        assert (finding.level, finding.answer.split(":")[0]) == ("warning", "this look failed")
        assert "safeloader's own" in finding.advice
        assert said(report, "length")
        assert "dies" not in kinds(report)

    def test_an_exit_is_told_with_its_status(self) -> None:
        finding = said(examine(Leaving()), "dies")
        assert finding.answer == "the process ended itself with exit status 4 at index 3"
        assert finding.advice.startswith("look for sys.exit, os._exit")


class Large(Sound):
    """So many that most are not fetched one by one; ``at`` an index it does what is asked."""

    def __init__(self, at: int = -1, do: Any = None) -> None:
        super().__init__()
        self.at, self.do = at, do

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < 1000:
            raise IndexError(index)
        if index == self.at:
            self.do()
        return torch.tensor(index)


def wait_for_ever() -> None:
    threading.Event().wait()


def leave() -> None:
    os._exit(3)


def waits_in_a_worker(worker: int) -> None:
    wait_for_ever()


def waits_at_five(samples: list[Any]) -> Any:
    if 5 in [int(sample) for sample in samples]:
        wait_for_ever()
    return samples


@pytest.mark.slow
@pytest.mark.usefixtures("few_settings")
class TestHarmInABatch:
    """What was not looked at one by one, and is met while batches are measured."""

    @pytest.mark.usefixtures("soon_a_hang")
    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_hang_is_told_with_its_index(self, workers: int) -> None:
        report = examine(Large(5, wait_for_ever), 12.0, batch_size=8, num_workers=workers)
        found = said(report, "hangs")
        assert found.answer.startswith("it hangs at index 5: nothing came for")
        assert "in wait_for_ever" in found.evidence
        assert found.level == "error"
        assert report.seconds < 12

    def test_the_index_is_searched_for_past_the_end_of_the_time(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Of 4 s, one and a third are gone when it is called a hang, and then 3 s are waited.
        monkeypatch.setattr(looks, "LOOKS", (looks.LOOKS[0], looks.SPEED))
        monkeypatch.setattr(patience, "_LEAST_S", 1.0)
        monkeypatch.setattr(examining, "_SEARCHED_S", 3.0)
        monkeypatch.setattr(examining, "_SEARCH_S", 20.0)
        found = said(examine(Large(5, wait_for_ever), 4.0, batch_size=8), "hangs")
        assert found.answer.startswith("it hangs at index 5: nothing came for")

    @pytest.mark.usefixtures("soon_a_hang")
    def test_a_hang_in_the_collate_function_is_told_with_its_batch(self) -> None:
        report = examine(Large(), 12.0, batch_size=4, collate_fn=waits_at_five)
        found = said(report, "hangs")
        assert "in collate_fn, with the samples of [4, 5, 6, 7]" in found.answer
        assert "in waits_at_five" in found.evidence
        assert found.level == "error"

    def test_a_death_is_told_with_its_index(self) -> None:
        report = examine(Large(9, leave), 8.0, batch_size=8)
        assert (
            said(report, "dies").answer == "the process ended itself with exit status 3 at index 9"
        )
        assert report.recommended is not None  # the rest was measured

    def test_a_slow_sample_is_no_hang(self) -> None:
        report = examine(Large(5, lambda: time.sleep(1.2)), 8.0, batch_size=8)
        assert report.ok
        assert "hangs" not in kinds(report)

    def test_an_error_is_told_with_its_index(self) -> None:
        report = examine(Large(137, missing), 8.0, batch_size=8)
        assert kinds(report) == ["raises"]
        assert said(report, "raises").answer == "index 137 raises KeyError"

    def test_what_cannot_be_collated_is_told_with_its_index(self) -> None:
        report = examine(Mixed(), 8.0, batch_size=8)
        found = said(report, "batch_raises")
        assert found.answer == "a batch fails in collate_fn, at index 9: KeyError"
        assert "dataset index 9 (position 1) has the extra key 'other'" in found.evidence
        assert found.advice.startswith("mend dataset[9], or")
        assert kinds(examine(Mixed(-1), 8.0, batch_size=8)) == []

    @pytest.mark.parametrize("workers", [0, 2])
    def test_one_cause_is_one_finding(self, workers: int) -> None:
        report = examine(Gone(), 8.0, num_workers=workers)
        assert kinds(report) == ["raises"]
        found = said(report, "raises")
        assert found.answer.startswith("indices 0, 1, 2, 3, ")
        assert "no index that was tried gives a sample" in found.evidence
        assert "time was left" not in str(report)
        assert "start method spawn: not tried: it failed without workers already" in str(report)

    @pytest.mark.parametrize("kind", [DataLoader, SafeDataLoader])
    def test_what_cannot_be_sent_is_told_with_its_index(self, kind: Any) -> None:
        loader = kind(Locked(), batch_size=4, collate_fn=list, num_workers=2)
        report = doctor(loader, seconds=9.0)
        assert {"unsendable"} <= {*kinds(report)} <= {"unsendable", "slow_setting"}
        found = said(report, "unsendable")
        assert found.answer == (
            "what index 5 gives cannot be sent by a worker: sample['lock'] (_thread.lock)"
        )
        assert found.level == "error"
        assert report.recommended is not None  # the rest was measured

    def test_what_fails_in_workers_alone_is_told_so(self) -> None:
        report = examine(Large(), 8.0, num_workers=2, worker_init_fn=fails)
        assert said(report, "workers_raise").evidence.startswith("ValueError: no such worker")
        assert [each for each in kinds(report) if each != "workers_raise"] == []

    def test_a_bad_index_in_the_only_batch(self) -> None:
        class Broken(Sound):
            def __getitem__(self, index: int) -> Any:
                if index == 5:
                    raise KeyError("image")
                return super().__getitem__(index)

        report = examine(Broken(), 8.0, batch_size=N)
        assert kinds(report) == ["raises"]
        assert report.recommended is not None  # measured without that index

    @pytest.mark.parametrize(("size", "expected"), [(N + 1, ["no_batch"]), (N, [])])
    def test_drop_last_that_leaves_no_batch(self, size: int, expected: list[str]) -> None:
        report = examine(Sound(), 6.0, batch_size=size, drop_last=True)
        assert kinds(report) == expected
        assert report.samples["count"] == N
        if expected:
            found = said(report, "no_batch")
            assert found.answer == f"drop_last leaves no batch: {N} samples, batch_size {size}"
            assert "speed: drop_last leaves no batch" in report.not_looked_at

    @pytest.mark.parametrize(("size", "expected"), [(N + 1, ["no_batch"]), (N, [])])
    def test_a_tail_that_leaves_no_batch(self, size: int, expected: list[str]) -> None:
        sampler = safeloader.GlobalBatchSampler(N, size)
        report = examine(Sound(), 6.0, batch_size=1, batch_sampler=sampler)
        assert kinds(report) == expected
        assert report.samples["count"] == N
        assert report.resume.startswith("yes, at the beginning of an epoch: the order is made")
        if expected:
            found = said(report, "no_batch")
            assert found.answer == f"tail='drop' leaves no batch: {N} samples, global_batch {size}"
            assert found.advice == "tail='pad' or tail='uneven', or a smaller global_batch"
            assert "speed: tail='drop' leaves no batch" in report.not_looked_at


def missing() -> None:
    raise KeyError("label")


class Gone(Sound):
    def __getitem__(self, index: int) -> Any:
        raise FileNotFoundError(f"/nowhere/{index}.jpg")


def fails(worker: int) -> None:
    raise ValueError("no such worker")


class Locked(Sound):
    def __getitem__(self, index: int) -> Any:
        return {"lock": threading.Lock()} if index == 5 else {"at": index}


class Mixed(Sound):
    def __init__(self, at: int = 9) -> None:
        super().__init__()
        self.at = at

    def __getitem__(self, index: int) -> Any:
        sample = super().__getitem__(index)
        return {"label": sample} if index != self.at else {"other": sample}


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ── what is wrong with samples


@pytest.mark.usefixtures("no_speed")
class TestSamples:
    def test_a_change_in_place(self) -> None:
        class Doubling(Sound):
            def __getitem__(self, index: int) -> Any:
                super().__getitem__(index)
                return self.data[index : index + 1].mul_(2)

        report = examine(Doubling())
        assert "dataset.data[" in said(report, "in_place").answer
        assert not report.ok

    def test_a_change_in_place_of_an_element(self) -> None:
        class Appending(Sound):
            def __init__(self) -> None:
                super().__init__()
                self.items = [{"boxes": np.zeros(2)} for _ in range(N)]

            def __getitem__(self, index: int) -> Any:
                item = self.items[index]
                item["boxes"] += 1
                return item["boxes"].copy()

        found = said(examine(Appending()), "in_place")
        assert "dataset.items[" in found.answer

    def test_a_sample_that_depends_on_the_time(self) -> None:
        class Timed(Sound):
            def __getitem__(self, index: int) -> Any:
                return super().__getitem__(index), time.time_ns()

        found = said(examine(Timed()), "differs")
        assert "sample[1]" in found.evidence
        assert found.level == "warning"

    def test_scratch_is_not_what_a_sample_depends_on(self) -> None:
        class Timed(Sound):
            def __init__(self) -> None:
                super().__init__()
                self.buffer = np.zeros((N, 2))

            def __getitem__(self, index: int) -> Any:
                self.buffer[index] = time.time_ns() % 10**9, index
                return self.buffer[index].copy()

        found = said(examine(Timed()), "differs")
        assert found.answer == "index 0 is another each time, also with the same random numbers"
        assert "nothing that the dataset holds had changed" in found.evidence

    def test_a_sample_that_depends_on_a_counter(self) -> None:
        class Counting(Sound):
            calls = 0

            def __getitem__(self, index: int) -> Any:
                self.__dict__.setdefault("count", 0)
                self.count += 1
                return super().__getitem__(index) + self.count

        class Stepping(Counting):
            def __init__(self) -> None:
                super().__init__()
                self.count = 0

        assert "dataset.count" in said(examine(Stepping()), "differs").answer

    def test_a_fixed_seed_in_getitem(self) -> None:
        class Seeding(Sound):
            def __getitem__(self, index: int) -> Any:
                torch.manual_seed(0)
                return super().__getitem__(index) + torch.rand(())

        class ByIndex(Sound):
            def __getitem__(self, index: int) -> Any:
                torch.manual_seed(index)
                return super().__getitem__(index) + torch.rand(())

        assert "torch" in said(examine(Seeding()), "seeds").answer
        assert kinds(examine(ByIndex(), num_workers=2)) == []

    @pytest.mark.parametrize("way", ["other", "fewer", "raises", "untransformed"])
    def test_getitems_that_disagrees(self, way: str) -> None:
        class Disagreeing(Sound):
            def __getitems__(self, indices: list[int]) -> Any:
                if way == "raises":
                    raise ValueError("at once?")
                if way == "untransformed":
                    return [[self.data[index]] for index in indices]
                samples = [self[index] for index in indices]
                return samples[1:] if way == "fewer" else [each + 1 for each in samples]

        report = examine(Disagreeing())
        assert "__getitems__" in said(report, "getitems").answer
        assert not report.ok

    def test_getitems_that_agrees(self) -> None:
        class Agreeing(Sound):
            def __getitems__(self, indices: list[int]) -> Any:
                return [self[index] for index in indices]

        class OtherOrder(Agreeing):
            """Whose random numbers are drawn all at once."""

            def __getitem__(self, index: int) -> Any:
                return super().__getitem__(index) + torch.rand(2)

            def __getitems__(self, indices: list[int]) -> Any:
                drawn = torch.rand(2, len(indices))
                return [self.data[k] * 2 + drawn[:, at] for at, k in enumerate(indices)]

        assert kinds(examine(Agreeing())) == []
        assert kinds(examine(OtherOrder())) == []

    def test_a_slow_first_sample_and_a_slow_index(self) -> None:
        class SlowStart(Sound):
            ready = False

            def __getitem__(self, index: int) -> Any:
                if not self.ready:
                    time.sleep(1.2)
                    self.ready = True
                return super().__getitem__(index)

        class SlowIndex(Sound):
            def __getitem__(self, index: int) -> Any:
                if index == 7:
                    time.sleep(0.6)
                return super().__getitem__(index)

        assert (
            "set up at first use" in said(examine(SlowStart(), seconds=20.0), "slow_first").answer
        )
        report = examine(SlowIndex(), seconds=20.0)
        assert "index 7" in said(report, "slow_sample").answer
        assert report.samples["worst_index"] == "7"


# ── lengths


@pytest.mark.usefixtures("no_speed")
class TestLengths:
    @pytest.mark.parametrize(("told", "kind"), [(15, "too long"), (9, "too short")])
    def test_a_length_that_lies(self, told: int, kind: str) -> None:
        class Lying(Sound):
            def __len__(self) -> int:
                return told

        report = examine(Lying())
        found = said(report, "length")
        assert kind in found.answer
        assert f"it says {told}" in found.answer
        assert "12" in found.answer
        assert report.ok == (kind == "too short")  # no training breaks of samples that never come

    def test_a_last_sample_that_is_bad_is_no_length_that_lies(self) -> None:
        class Empty(Sound):
            def __getitem__(self, index: int) -> Any:
                if index == N - 1:
                    return self.data[:0][0]
                return super().__getitem__(index)

        report = examine(Empty())
        assert kinds(report) == ["raises"]
        assert said(report, "raises").answer == f"index {N - 1} raises IndexError"

    def test_the_index_that_raised_is_the_one_that_is_named(self) -> None:
        class Longer(Sound):
            def __len__(self) -> int:
                return N + 3

        evidence = said(examine(Longer()), "length").evidence
        assert evidence.startswith(f"dataset[{N + 2}] raises IndexError: {N + 2}")
        assert f"dataset[{N}] does too, and dataset[{N - 1}] gives a sample" in evidence

    def test_what_has_a_sample_for_every_index_is_as_long_as_it_says(self) -> None:
        class Made(Sound):
            def __getitem__(self, index: int) -> Any:
                return torch.tensor(index)

        assert kinds(examine(Made())) == []

    def test_a_stream(self) -> None:
        class Told(Divided):
            length = 40

            def __len__(self) -> int:
                return self.length

        class Lying(Told):
            length = 30

        assert kinds(examine(Told())) == []
        assert "40" in said(examine(Lying()), "length").answer

    def test_a_stream_that_can_be_read_once(self) -> None:
        class Once(IterableDataset[Any]):
            def __init__(self) -> None:
                self.source = iter(range(40))

            def __iter__(self) -> Iterator[int]:
                return iter([*self.source])

        assert "stream_spent" in kinds(examine(Once()))


# ── workers


@pytest.mark.usefixtures("no_speed")
class TestCopies:
    @pytest.mark.parametrize("works", [True, False])
    def test_workers_that_take_long_to_begin_are_slow(self, works: bool) -> None:
        def begin(worker: int) -> None:
            busy(60) if works else time.sleep(60)

        report = examine(Sound(), seconds=6.0, num_workers=2, worker_init_fn=begin)
        assert [each for each in kinds(report) if each != "unpicklable"] == ["slow_start"]
        found = said(report, "slow_start")
        assert found.answer.startswith("slow: no batch in ")
        assert "while starting 2 workers by fork; it " in found.evidence
        assert "give it longer: doctor(loader, seconds=24)" in found.answer

    def test_workers_that_hang_as_they_begin_hang(self) -> None:
        report = examine(Sound(), seconds=6.0, num_workers=2, worker_init_fn=waits_in_a_worker)
        assert [each for each in kinds(report) if each != "unpicklable"] == ["hangs"]
        assert "while starting 2 workers by fork" in said(report, "hangs").answer

    def test_parts_that_cannot_be_pickled(self) -> None:
        found = said(examine(Lambda()), "unpicklable")
        assert found.answer == "dataset.scale cannot be pickled (a lambda)"
        assert found.level == "warning"
        own = examine(Lambda(), num_workers=1, multiprocessing_context="spawn")
        assert said(own, "unpicklable").level == "error"
        assert examine(Sound(), num_workers=1, multiprocessing_context="spawn").findings == ()

    def test_a_handle(self) -> None:
        class Open(Sound):
            def __init__(self) -> None:
                super().__init__()
                self.file = tempfile.TemporaryFile()  # noqa: SIM115

            def __getitem__(self, index: int) -> Any:
                self.file.seek(0)
                return super().__getitem__(index)

        with (dataset := Open()).file:
            found = said(examine(dataset, num_workers=2), "hazard")
            below = said(examine(Subset(dataset, range(4)), num_workers=2), "hazard")
        assert found.answer.startswith("dataset.file")
        assert found.level == below.level == "error"

    def test_a_handle_that_no_sample_is_made_by(self) -> None:
        class Open(Sound):
            def __init__(self) -> None:
                super().__init__()
                self.file = tempfile.TemporaryFile()  # noqa: SIM115

            def close(self) -> None:
                self.file.close()

        with (dataset := Open()).file:
            report = examine(dataset, num_workers=2)
            below = examine(Subset(dataset, range(4)), num_workers=2)
        assert report.ok
        assert below.ok
        found = said(report, "hazard")
        assert found.level == "warning"
        assert "does not read it" in found.evidence

    def test_all_parts_that_cannot_be_pickled_are_told(self) -> None:
        class Parts(Sound):
            def __init__(self) -> None:
                super().__init__()
                self.scale = lambda x: x
                self.lock = threading.Lock()
                self.names = (name for name in "abc")

        found = [each for each in examine(Parts()).findings if each.kind == "unpicklable"]
        told = [each.answer.split(" ")[0] for each in found]
        assert told[1:] == ["dataset.scale", "dataset.lock", "dataset.names"]  # first the class

    def test_a_thread_of_this_process(self) -> None:
        class Reading(Sound):
            def __init__(self) -> None:
                super().__init__()
                self.end = threading.Event()
                self.thread = threading.Thread(target=self.end.wait)
                self.thread.start()

        dataset = Reading()
        try:
            report = examine(dataset, num_workers=2)
        finally:
            dataset.end.set()
            dataset.thread.join()
        assert said(report, "hazard").answer.startswith("dataset.thread")

    def test_a_generator_that_workers_share(self) -> None:
        class Shared(Sound):
            def __init__(self) -> None:
                super().__init__()
                self.rng = np.random.default_rng(0)

            def __getitem__(self, index: int) -> Any:
                return super().__getitem__(index) + self.rng.random()

        def seeded(worker: int) -> None:
            info: Any = get_worker_info()
            info.dataset.rng = np.random.default_rng(info.seed)

        assert "dataset.rng" in said(examine(Shared(), num_workers=2), "generators").answer
        assert kinds(examine(Shared(), num_workers=2, worker_init_fn=seeded)) == ["unpicklable"]

    def test_workers_seeded_alike(self) -> None:
        assert (
            "worker_init_fn"
            in said(
                examine(Drawing(), num_workers=2, worker_init_fn=seed_alike), "generators"
            ).answer
        )
        assert kinds(examine(Drawing(), num_workers=2)) == []
        # Nothing is drawn: the same place is no fault.
        assert kinds(examine(Sound(), num_workers=2, worker_init_fn=seed_alike)) == []

    @pytest.mark.parametrize("persistent", [True, False])
    def test_set_epoch(self, persistent: bool) -> None:
        options = {"num_workers": 2, "persistent_workers": persistent}
        report = examine(OfEpoch(), **options)
        assert kinds(report) == (["stale"] if persistent else [])
        assert kinds(examine(OfSharedEpoch(), **options)) == []

    def test_an_epoch_that_the_sampler_sets_after_the_fork(self) -> None:
        dataset = OfEpoch()
        report = examine(dataset, num_workers=2, sampler=Setting(dataset))
        assert "dataset.epoch" in said(report, "stale").answer

    def test_one_stream(self) -> None:
        assert "one_stream" in kinds(examine(Whole(), num_workers=2))
        assert kinds(examine(Divided(), num_workers=2)) == []


class Drawing(Sound):
    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index) + torch.rand(())


def seed_alike(worker: int) -> None:
    torch.manual_seed(0)


class OfEpoch(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class OfSharedEpoch(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)


class Setting(Sampler[int]):
    """Sets the epoch of the dataset when it is iterated: by then the workers have been forked."""

    def __init__(self, dataset: OfEpoch) -> None:
        self.dataset, self.number = dataset, 0

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        self.number += 1
        self.dataset.set_epoch(self.number)
        yield from range(N)


# ── speed


def busy(seconds: float) -> None:
    """Take so much time of a core: of the clock it is more where several share one."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


_LOCK = threading.Lock()


class Deadlocked(Sound):
    """As a library does it: what was locked before the fork is locked for ever behind it."""

    def __getitem__(self, index: int) -> Any:
        if get_worker_info() is None:
            _LOCK.acquire(blocking=False)
        else:
            _LOCK.acquire()
            _LOCK.release()
        return super().__getitem__(index)


class Slow(Sound):
    """Waits for something that is not this machine: speed grows with every worker."""

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.01)
        return super().__getitem__(index)


class SlowToBegin(Slow):
    """Sets something up at first use, too."""

    ready = False

    def __getitem__(self, index: int) -> Any:
        if not self.ready:
            time.sleep(0.8)
            self.ready = True
        return super().__getitem__(index)


class Remembering(Sound):
    """Writes down how each process begins: whether its copy has fetched anything before."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file, self.cache, self.pid = file, dict[int, Any](), 0

    def __getitem__(self, index: int) -> Any:
        if self.pid != os.getpid():
            kind = type(multiprocessing.current_process()).__name__
            with self.file.open("a") as file:
                file.write(f"{kind if get_worker_info() else 'alone'} {len(self.cache)}\n")
            self.pid = os.getpid()
        if index not in self.cache:
            self.cache[index] = super().__getitem__(index)
        return self.cache[index]


def semaphores() -> set[str]:
    return {name for name in family.shared_memory() if name.startswith("sem.mp-")}


@pytest.fixture(scope="class")
def measured() -> Examination:
    return examine(SlowToBegin(), seconds=16.0, num_workers=1)


@pytest.mark.slow
class TestSpeed:
    def test_settings_are_measured_and_one_is_recommended(self, measured: Examination) -> None:
        report = measured
        assert report.ok
        tried = {row.workers: row for row in report.settings if row.method in (None, "fork")}
        assert {0, 1, 2} <= tried.keys()
        assert all(row.rates and row.first_s for row in tried.values())
        assert 10 < tried[0].rate < 60
        best = report.recommended
        assert best is not None
        assert best.workers >= 2
        assert best.rate > 1.3 * tried[0].rate
        assert "slow_setting" in kinds(report)
        told = report.to_dict()["recommended"]
        assert {"num_workers", "prefetch_factor", "start_method"} <= told.keys()
        assert "first batch" in str(report)

    def test_the_first_batch_is_that_of_copies_which_have_fetched_nothing(
        self, measured: Examination
    ) -> None:
        tried = [row for row in measured.settings if row.rates]
        assert {0, 1} <= {row.workers for row in tried}
        assert all(row.first_s is not None and row.first_s >= 0.8 for row in tried)
        assert not [each for each in measured.not_looked_at if "cold caches" in each]

    @pytest.mark.parametrize("copied_bytes", [1 << 28, 0])
    def test_workers_are_sent_what_has_fetched_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied_bytes: int
    ) -> None:
        only_workers(monkeypatch, 0, 1)
        monkeypatch.setattr(looks, "LOOKS", (looks.INHERITING, looks.LOOKS[-1]))
        monkeypatch.setattr(speed, "_COPIED_BYTES", copied_bytes)
        begins = tmp_path / "begins"
        before = semaphores()
        report = examine(Remembering(begins), 25.0)
        assert semaphores() == before  # those that spawn names
        told = [line.split() for line in begins.read_text().splitlines()]
        held = {kind: int(length) for kind, length in told}
        assert held.pop("alone") == held.pop("ForkProcess") == 0
        assert held.keys() == {"SpawnProcess", "ForkServerProcess"}
        assert all(bool(each) != bool(copied_bytes) for each in held.values())
        warm = [each for each in report.not_looked_at if "spawn and forkserver with cold" in each]
        assert bool(warm) != bool(copied_bytes)

    def test_where_forked_workers_hang_others_are_measured(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        only_workers(monkeypatch, 0, 2)
        monkeypatch.setattr(patience, "_SHARE", 0.1)  # 6 s, and twice that for a fresh Python
        report = examine(Deadlocked(), seconds=60.0, num_workers=2)
        found = [each for each in report.findings if each.kind == "hangs"]
        assert found
        assert all("by fork" in each.answer for each in found)
        assert found[0].level == "error"
        assert "_LOCK.acquire()" in found[0].evidence
        best = report.recommended
        assert best is not None
        assert best.method != "fork"
        assert any(row.method in ("spawn", "forkserver") and row.rates for row in report.settings)

    @pytest.mark.usefixtures("few_settings")
    def test_what_fails_is_left_out_and_the_rest_measured(self) -> None:
        class Broken(Sound):
            def __len__(self) -> int:
                return 20

            def __getitem__(self, index: int) -> Any:
                if index == 5:
                    raise KeyError("image")
                return super().__getitem__(index)

        report = examine(Broken(), seconds=8.0)
        assert sorted(kinds(report)) == ["length", "raises"]
        assert report.recommended is not None

    def test_a_batch_that_cannot_be_collated(self) -> None:
        class Uneven(Sound):
            def __getitem__(self, index: int) -> Any:
                return torch.zeros(index)

        found = said(examine(Uneven(), seconds=8.0), "batch_raises")
        assert "stack expects each tensor to be equal size" in found.evidence

    def test_more_workers_than_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Contended(Sound):
            """Half as fast with four workers as with one, whatever else keeps the machine busy."""

            def __getitem__(self, index: int) -> Any:
                info = torch.utils.data.get_worker_info()
                time.sleep(0.02 * (1 if info is None else info.num_workers) ** 1.5)
                return super().__getitem__(index)

        monkeypatch.setattr(looks, "LOOKS", (looks.INHERITING, looks.LOOKS[-1]))
        only_workers(monkeypatch, 1, 4)
        monkeypatch.setattr(speed, "_SPAWN_S", float("inf"))
        # One core, for the child too.
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        try:
            report = doctor(DataLoader(Contended(), batch_size=2, num_workers=4), seconds=40.0)
        finally:
            os.sched_setaffinity(0, cores)
        assert "too_many_workers" in kinds(report), report.settings


# ── the way without a fork, the command, and refusals


class Lambda(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.scale = lambda x: x


class Killing(Sound):
    def __getitem__(self, index: int) -> Any:
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class TestWithoutFork:
    @pytest.fixture(autouse=True)
    def spawned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(child, "can_fork", lambda: False)

    @pytest.mark.slow
    def test_the_parts_go_by_pickle(self, capfd: pytest.CaptureFixture[str]) -> None:
        dataset = Killing()
        report = doctor(DataLoader(dataset, batch_size=2), seconds=60.0, samples=100)
        assert "index 5" in said(report, "dies").answer
        assert report.samples["count"] == N - 1
        assert not dataset.data.is_shared()
        assert "".join(capfd.readouterr()) == ""

    def test_what_cannot_be_pickled_is_the_first_finding(self) -> None:
        report = doctor(DataLoader(Lambda(), batch_size=2), seconds=10.0)
        assert report.findings[0].kind == "unpicklable"
        assert report.findings[0].level == "error"
        assert any("length" in each for each in report.not_looked_at)


PROGRAM = """
import sys, torch
from torch.utils.data import DataLoader, Dataset
class Words(Dataset):
    def __len__(self): return LENGTH
    def __getitem__(self, index): return torch.arange(10)[index]
def make_loader():
    return DataLoader(Words(), batch_size=2)
def needs(size, more=1): pass
loader = make_loader()
REST
"""


@pytest.fixture
def program(tmp_path: Path) -> Any:
    def write(length: int = 10, rest: str = "", name: str = "train.py") -> Path:
        path = tmp_path / name
        path.write_text(PROGRAM.replace("LENGTH", str(length)).replace("REST", rest))
        return path

    return write


@pytest.fixture
def said_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """The command in this process, which has imported torch: its status, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        return command([*words]), *capsys.readouterr()

    return run


class TestCommand:
    @pytest.mark.usefixtures("few_settings")
    @pytest.mark.parametrize("target", ["train.py:make_loader", "train:make_loader"])
    def test_both_forms(self, program: Any, said_by: Any, target: str) -> None:
        program()
        status, printed, _ = said_by(target, "--seconds", "9", "--json")
        assert status == 0
        told = json.loads(printed)
        assert told["ok"]
        assert told["loader"] == "DataLoader over Words"
        assert told["settings"]

    def test_findings_that_break_training(self, tmp_path: Path, program: Any) -> None:
        program(length=12)
        done = ran(tmp_path, "-m", "safeloader", "doctor", "train.py:loader", "--seconds", "6")
        assert done.returncode == 1
        assert "__len__ is too long: it says 12, and the samples end at 10" in done.stdout

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["train.py"], "does not say what gives the loader"),
            (["gone.py:loader"], "there is no file"),
            (["train.py:nothing"], "train.py has no 'nothing'"),
            (["train.py:nothing"], "it offers loader, make_loader()"),
            (["train.py:loader.nothing"], "train.py has no 'loader.nothing'"),
            (["train:nothing"], "train has no 'nothing'"),
            (["train.py:needs"], "needs arguments (size), and gets none"),
            (["train.py:Words"], "no DataLoader"),
            (["nowhere.at.all:loader"], "ModuleNotFoundError"),
            (["ends.py:loader"], "SystemExit"),
            (["train.py:loader", "--seconds", "0"], "seconds must be a number above 0"),
            ([], "the following arguments are required"),
        ],
    )
    def test_bad_usage(self, program: Any, said_by: Any, words: list[str], told: str) -> None:
        program()
        program(rest="print('usage: ...'); sys.exit(2)", name="ends.py")
        status, printed, error = said_by(*words)
        assert status == 2
        assert not printed
        assert told in error
        assert "Traceback" not in error
        assert "safeloader/commands" not in error

    @pytest.mark.slow
    def test_a_program_that_works_when_it_is_imported(self, program: Any, said_by: Any) -> None:
        program(rest="import threading; threading.Event().wait()")
        status, printed, _ = said_by("train.py:loader", "--seconds", "5")
        assert status == 1
        assert 'under `if __name__ == "__main__":`' in printed


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (([1, 2],), TypeError),
        ((None,), TypeError),
        ((DataLoader([1]), "30"), TypeError),
        ((DataLoader([1]), 0), ValueError),
        ((DataLoader([1]), float("nan")), ValueError),
    ],
)
def test_bad_input_is_refused_at_once(words: Any, error: Any) -> None:
    begin = time.monotonic()
    with pytest.raises(error, match=r"doctor takes|seconds must be"):
        doctor(*words)
    assert time.monotonic() - begin < 2


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_so_in_a_few_words(tmp_path: Path, program: Any) -> None:
    # The fork's part is made short, also where the program is imported once more.
    program(
        rest="import safeloader\n"
        "from safeloader.examining import speed\n"
        "speed.counts, speed._MOST = (lambda cores, own: [0, 1]), 0\n"
        "speed._PREFETCH, speed._ROUNDS = (), 1\n"
        "print(safeloader.doctor(loader, seconds=20))"
    )
    done = ran(tmp_path, "train.py")
    assert done.returncode == 0, done.stderr
    assert "1. the program does its work when it is imported, and spawn imports it" in done.stdout
    printed = done.stdout[done.stdout.index("printed: ") :].splitlines()
    shown = [line for line in printed if line.startswith("  | ")]
    assert set(shown) == {f"  | {child.CALLED_AGAIN}"}
    assert 'which has no `if __name__ == "__main__":`' in done.stdout
    assert "look for what takes long" not in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_it_is_a_function_and_the_start_method_of_the_program_stays_to_be_set() -> None:
    program = """
import safeloader.examining.doctor, multiprocessing, torch, safeloader
from safeloader.examining import looks
from torch.utils.data import DataLoader
if __name__ == "__main__":
    looks.LOOKS = looks.LOOKS[:-1]
    safeloader.doctor(DataLoader([1, 2], num_workers=1), seconds=5)
    multiprocessing.set_start_method("spawn")
    print("set", callable(safeloader.doctor), callable(__import__('safeloader').doctor))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set True True\n", done.stderr
    assert safeloader.doctor is doctor
