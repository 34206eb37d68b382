"""When main looks at what its workers report, and tells what it finds. Runs in: main.

::

    workers: SelfReport ──► flight recorder ──► Looks ──► wrong_data, growth ──► a line in the log

It looks after the first batches, then each time twice as many were handed over, at the end of an
epoch and before a failure is told. Each thing is told once for a loader. Looking takes two
thousandths of the time at most, but for the ends of the first epochs. A fault of this part ends it,
and not the epoch.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from time import monotonic, perf_counter
from typing import Any

from safeloader.failures.loader_log import LoaderLog
from safeloader.introspect.copy_state import CopyState, copy_state
from safeloader.introspect.fork_hazards import cure_of, was_told
from safeloader.introspect.generators import generators_of
from safeloader.introspect.seeds import EpochSeed, SeedPer
from safeloader.introspect.signals import raised_by_signal
from safeloader.main.held_for_epochs import HeldForEpochs
from safeloader.main.reporting_workers import ReportingWorkers
from safeloader.provenance.recorder import Recorder
from safeloader.supervision.growth import growth
from safeloader.supervision.kept_batches import KeptBatches
from safeloader.supervision.report_room import NO_ROOM
from safeloader.supervision.self_report import Opening, SelfReport
from safeloader.supervision.worth_telling import matters
from safeloader.supervision.wrong_data import Finding, Seen, findings
from safeloader.worker.observing import ALWAYS, Observer

SHARE = 0.002  # of the time, at most, that looking may take, but for the ends of those
LONG_S = 1.0  # an epoch of which each worker's look at itself takes less than a hundredth
FAILURES_MAX = 3  # of a loader, before which it looks
LOADERS_MAX = 8  # of one recorder
CAUSES = ("diverged", "same stream", "shared file", "stale")  # of a failure, perhaps
OF_DATA = (*CAUSES, "same numbers", "in place")  # what an audit tells of, in each epoch
_NOT_SEEDED = ("generators not seeded",)
EARLIER_MAX = 3  # epochs of workers that are gone, of which the beginnings are kept


class Looks:
    """What main sees of one loader's workers, from epoch to epoch.

    Attributes:
        due: number of the next batch that :meth:`at_batch` wants to see.
    """

    def __init__(self, dataset: Any, length: int | None) -> None:
        self._dataset = HeldForEpochs(dataset, gone=self._let_go)
        self._length = length
        self._stream = False
        self._seeds_per: SeedPer | None = None
        self._resumed = False
        self._told: set[tuple[str, ...]] = set()
        self._earlier: dict[int, tuple[Opening, ...]] = {}
        self._kept = KeptBatches()
        self._epochs = 0
        self._began = self._epoch_began = monotonic()
        self._lasted = 0.0  # the epoch before this one, in seconds
        self._spent = 0.0
        self._on = True
        self.due = sys.maxsize
        self._look_at = 0
        self._failures = 0
        self._workers: ReportingWorkers | None = None
        self._as_drawn = CopyState({}, {}, {})
        self._drawn_before: tuple[CopyState, ...] = ()  # as the epoch before on these workers
        self._before: CopyState | None = None  # main's copy, until new workers have it
        self._observer: Observer | None = None
        self._fetcher: Callable[[], Any] = lambda: None  # of main, without workers
        self._own: deque[SelfReport] = deque(maxlen=1)  # of main, without workers
        self._log: LoaderLog | None = None
        self._noticed: list[str] = []
        self._noted: set[tuple[str, ...]] = set()  # in this epoch
        self._cures: dict[str, str] = {}
        self._unchecked: list[str] = []

    def over_dataset(self, dataset: Any) -> bool:
        """Whether these are the looks at loaders over ``dataset``."""
        return self._dataset.was(dataset)

    def hold(self, dataset: Any) -> None:
        """An epoch over the dataset begins."""
        self._dataset.hold(dataset)

    def release(self) -> None:
        """An epoch's iterator is let go of: no dataset is held by this from now on."""
        self._dataset.release()

    def _let_go(self) -> None:
        """The dataset is gone, and so is what was noted of it."""
        self._observer = None
        self._own.clear()

    # an epoch ───────────────────────────────────────────────────────────────────────────────────

    def begin(
        self,
        log: LoaderLog,
        num_workers: int,
        stream: bool,
        noticed: list[str],
        unchecked: list[str],
        seed: EpochSeed | None = None,
        *,
        resumed: bool = False,
    ) -> None:
        """An epoch begins; what is seen of wrong data goes into ``noticed``, in short, and what
        could not be looked at into ``unchecked``."""
        self._log = log
        self._noticed, self._unchecked = noticed, unchecked
        self._noted = set()
        self._stream = stream
        self._seeds_per = None if seed is None else seed.per
        self._resumed = self._resumed or (resumed and seed is None)
        if seed is not None:
            with self._guarded():
                self._tell_of_own_generators()
        self._epochs += 1
        now = monotonic()
        self._lasted, self._epoch_began = now - self._epoch_began, now
        if not num_workers:
            self._workers = None  # those of an earlier epoch, or of another loader
        elif self._on:
            with self._guarded():
                there = self._workers is not None and self._workers.stay
                self._drawn_before = (self._as_drawn,) if there else ()
                self._as_drawn = copy_state(self._dataset())
                self._before = None if there else self._as_drawn
        self._look_at = 4 * max(1, num_workers)
        self._kept.begin()
        self.due = min(self._kept.due, self._look_at) if self._on else sys.maxsize

    def _tell_of_own_generators(self) -> None:
        """Once: that ``seed=`` does not reach the generators that a dataset holds."""
        if _NOT_SEEDED in self._told or not self._on or self._log is None:
            return
        self._told.add(_NOT_SEEDED)
        found = generators_of(self._dataset())
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            self._log.warning(
                "seed= does not reach %s%s: what is drawn from there depends "
                "on the worker, and on what it drew before. Draw from safeloader.sample_rng() in "
                "__getitem__ instead, which gives each sample a generator of its own",
                ", ".join([*found][:3]),
                more,
            )

    def on(self, *about: Any, **more: Any) -> None:
        """From now on it is these workers; as :class:`ReportingWorkers` takes them."""
        with self._guarded():
            self._as_drawn = copy_state(self._dataset())  # their first batches are drawn
            self._drawn_before = ()
            # Where others have died, these have the copy of now.
            more["began_with"], self._before = self._before or self._as_drawn, None
            self._workers = ReportingWorkers(*about, **more, since=self._epochs - 1)

    def while_waiting(self, advance: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """What waits for a batch, with what is looked at meanwhile on new workers."""
        return advance if self._workers is None else self._workers.waited.around(advance)

    def over(self, fetcher: Any) -> Any:
        """In main, without workers: begin an epoch on ``fetcher``, which is given back."""
        if self._fetcher() is not fetcher:
            self._fetcher = weakref.ref(fetcher)
        if not self._has_time():
            return fetcher
        with self._guarded():
            if self._observer is None:
                self._observer = Observer(
                    self._dataset(),
                    length=self._length,
                    stream=self._stream,
                    files=None,
                    publish=self._own.append,  # no way back to this: no cycle
                    alone=False,
                )
            began = perf_counter()
            self._observer.over(fetcher)
            self._spent += perf_counter() - began
        return fetcher

    def at_batch(self, epoch: int, number: int, batch: Any) -> None:
        """Batch ``number`` is about to be handed over; called where it is ``due``."""
        with self._guarded():
            self._kept.note(epoch, number, batch)
            if number >= self._look_at and self._took_little():
                self._look_at = 2 * number
                self._look(asking=False)
            soon = self._look_at if self._look_at > number else sys.maxsize
            self.due = min(self._kept.due, soon)

    def at_end(self) -> None:
        """The epoch is at its end."""
        if not self._has_time():
            return
        with self._guarded():
            stay = self._workers is not None and self._workers.stay
            self._remember(self._look(asking=stay, ended=True))

    def before_failure(self) -> list[str]:
        """What is known that may be the cause of a failure, in sentences; told with it."""
        said: list[str] = []
        self._failures += 1
        if not self._on or self._failures > FAILURES_MAX:
            return said
        with self._guarded():
            reports = self._reports(asking=self._failures == 1)
            for each in self._of_data(reports):
                if each.about[0] in CAUSES:  # each error is read alone: told again
                    self._note(each)
                    self._told.add(each.about)
                    said.append(each.text)
            if self._workers is not None:
                said += self._workers.moved_positions(said, reports, self._stream)
        return said

    @property
    def worth_it(self) -> bool:
        """Whether workers of one epoch, which begin now, are to look at themselves.

        It takes each some milliseconds, whatever the epoch takes.
        """
        return self._on and (self._always or self._lasted >= LONG_S)

    @property
    def _always(self) -> bool:
        # Where data was wrong each epoch is looked at: its audit says so, or that it ended.
        return self._epochs <= ALWAYS or any(about[0] in OF_DATA for about in self._told)

    def _has_time(self) -> bool:
        return self._on and (self._took_little() or self._always)

    def _took_little(self) -> bool:
        return self._spent <= SHARE * (monotonic() - self._began)

    # looking ────────────────────────────────────────────────────────────────────────────────────

    def _look(self, *, asking: bool, ended: bool = False) -> Mapping[int, SelfReport]:
        """Tell what is new; the reports by which it is known."""
        began = perf_counter()
        reports = self._reports(asking=asking)
        if left_out := max((each.left_out for each in reports.values()), default=0):
            self._unchecked[:] = [NO_ROOM.format(left_out)]
        for finding in chain(self._of_data(reports, ended), self._of_memory(reports)):
            self._note(finding)
            if self._is_new(finding) and self._log is not None and not self._was_told(finding):
                self._log.warning("%s", finding.text)
        self._spent += perf_counter() - began
        return reports

    def _note(self, finding: Finding) -> None:
        said = finding.short or finding.text.partition(". ")[0]  # what to do stands in the log
        if finding.about[0] in OF_DATA and finding.about not in self._noted:
            self._noted.add(finding.about)
            self._noticed.append(said)

    def _was_told(self, finding: Finding) -> bool:
        """Whether a warning at the start has told of it: the audit is then enough."""
        kind, *about = finding.about
        return kind == "same numbers" and was_told(self._dataset(), about[0])

    def _is_new(self, finding: Finding) -> bool:
        new = finding.about not in self._told
        self._told.add(finding.about)
        return new

    def _reports(self, *, asking: bool) -> Mapping[int, SelfReport]:
        """The newest report of each process that makes samples."""
        if self._workers is None:
            if self._observer is not None:
                self._observer.report()
            return dict(enumerate(self._own))
        if asking:
            self._workers.ask()
        return self._workers.reports()

    def _of_data(self, reports: Mapping[int, SelfReport], ended: bool = False) -> Iterator[Finding]:
        """What is wrong with the data; any of it may be the cause of a failure."""
        workers, dataset = self._workers, self._dataset()
        stay = workers is not None and workers.stay
        seen = Seen(
            reports,
            copy_state(dataset) if stay else self._as_drawn,
            self._length,
            stream=self._stream,
            persistent=stay,
            workers=workers.number if workers else 0,
            epochs=self._epochs,
            began=CopyState({}, {}, {}) if workers is None else workers.began,
            drawn=(*self._drawn_before, self._as_drawn),
            their_epoch=self._epochs - workers.since if workers else 0,
            seeds_per=self._seeds_per,
            ended=ended,
            resumed=self._resumed,
            cure=self._cure,
        )
        for finding in findings(seen, self._earlier):
            if matters(finding, dataset):
                yield finding

    def _cure(self, path: str) -> str:
        """What the warning at the start says, or would say, of generators at a path."""
        if path not in self._cures:
            self._cures[path] = cure_of(self._dataset(), path)
        return self._cures[path]

    def _of_memory(self, reports: Mapping[int, SelfReport]) -> Iterator[Finding]:
        """What the memory and the start of the workers say, and the batches that are kept."""
        if self._workers is not None:
            yield from growth(reports, self._workers.forked)
            yield from self._workers.slow_start(self._dataset())
        yield from self._kept.finding((self._dataset(), self._fetcher()))

    def _remember(self, reports: Mapping[int, SelfReport]) -> None:
        """Workers that go take their beginnings with them."""
        if self._workers is None or self._workers.stay:
            return
        for worker, report in reports.items():
            earlier = self._earlier.get(worker, ())
            self._earlier[worker] = (*earlier, *report.openings)[-EARLIER_MAX:]

    def _guarded(self) -> _Guard:
        return _Guard(self)

    def failed(self, exc: Exception) -> None:
        """This part is at fault: it is off for good, and the log says so once."""
        self._on = False
        self.due = sys.maxsize
        if self._log is not None:
            self._log.own_fault("the look at what workers report", exc, "off from here on")


class _Guard:
    def __init__(self, looks: Looks) -> None:
        self._looks = looks

    def __enter__(self) -> None:
        """A fault within is ours."""

    def __exit__(self, kind: object, exc: BaseException | None, frames: object) -> bool:
        if not isinstance(exc, Exception) or raised_by_signal(exc):
            return False
        self._looks.failed(exc)
        return True


def looks_for(recorder: Recorder, dataset: Any, length: int | None) -> Looks:
    """The looks at a loader over ``dataset`` that writes into ``recorder``, from epoch to epoch."""
    known: list[Looks] = recorder.looks
    for looks in known:
        if looks.over_dataset(dataset):
            looks.hold(dataset)
            return looks
    looks = Looks(dataset, length)
    recorder.looks = [*known[-LOADERS_MAX + 1 :], looks]
    return looks
