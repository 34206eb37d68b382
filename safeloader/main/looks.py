"""When main looks at what its workers report, and tells what it finds. Runs in: main.

::

    workers: SelfReport ──► flight recorder ──► Looks ──► wrong_data, growth ──► a line in the log

It looks after the first batches, then each time twice as many were handed over, at the end of an
epoch and before a failure is told. Each thing is told once for a loader. Looking takes two
thousandths of the time at most, but for the ends of the first epochs. A fault of this part ends it,
and not the epoch.
"""

from __future__ import annotations

import pickle
import sys
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from time import monotonic, perf_counter, sleep
from typing import Any

from safeloader import _torch
from safeloader.failures.loader_log import LoaderLog
from safeloader.introspect.byte_code import is_read, names_key, stores_elements
from safeloader.introspect.copy_state import CopyState, attributes, copy_state
from safeloader.introspect.file_positions import read_positions
from safeloader.introspect.fork_hazards import cure_of, was_told
from safeloader.introspect.heaviest import heaviest
from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.values import container_base, weakly
from safeloader.main.waited_positions import WaitedPositions
from safeloader.provenance.recorder import Recorder
from safeloader.supervision.flight_recorder import FlightRecorder
from safeloader.supervision.growth import growth, slow_start
from safeloader.supervision.kept_batches import KeptBatches
from safeloader.supervision.report_room import NO_ROOM
from safeloader.supervision.self_report import Opening, SelfReport
from safeloader.supervision.wrong_data import Finding, Seen, findings
from safeloader.transport.channel import PAUSE
from safeloader.worker.observing import ALWAYS, Observer

SHARE = 0.002  # of the time, at most, that looking may take, but for the ends of those
ANSWER_S = 0.2  # workers that have nothing to do answer within a millisecond
FAILURES_MAX = 3  # of a loader, before which it looks
LOADERS_MAX = 8  # of one recorder
CAUSES = ("diverged", "same stream", "shared file", "stale")  # of a failure, perhaps
OF_DATA = (*CAUSES, "same numbers", "in place")  # what an audit tells of, in each epoch
EARLIER_MAX = 3  # epochs of workers that are gone, of which the beginnings are kept


class Looks:
    """What main sees of one loader's workers, from epoch to epoch.

    Attributes:
        due: number of the next batch that :meth:`at_batch` wants to see.
    """

    def __init__(self, dataset: Any, length: int | None) -> None:
        self._let_go_of = 0  # the id of a dataset that is held while an epoch runs
        me = weakref.ref(self)

        def gone(_: object) -> None:
            looks = me()
            if looks is not None:
                looks.let_go()

        self._dataset: Callable[[], Any] = weakly(dataset, gone)
        self._length = length
        self._stream = False
        self._told: set[tuple[str, ...]] = set()
        self._earlier: dict[int, tuple[Opening, ...]] = {}
        self._kept = KeptBatches()
        self._epochs = 0
        self._began = monotonic()
        self._spent = 0.0
        self._on = True
        self.due = sys.maxsize
        self._look_at = 0
        self._failures = 0
        self._workers: _Workers | None = None
        self._as_drawn = CopyState({}, {}, {})
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
        held = self._dataset()
        return held is dataset or (held is None and self._let_go_of == id(dataset))

    def hold(self, dataset: Any) -> None:
        """An epoch over the dataset begins: one that bears no weak reference is held again."""
        if not isinstance(self._dataset, weakref.ref):
            self._dataset = lambda: dataset

    def let_go(self) -> None:
        """The dataset is gone: so is what was noted of it."""
        self._observer = None
        self._own.clear()

    def release(self) -> None:
        """An epoch's iterator is let go of: no dataset is held by this from now on."""
        if not isinstance(self._dataset, weakref.ref):
            self._let_go_of = id(self._dataset())
            self._dataset = lambda: None
            self.let_go()

    # an epoch ───────────────────────────────────────────────────────────────────────────────────

    def begin(
        self,
        log: LoaderLog,
        num_workers: int,
        stream: bool,
        noticed: list[str],
        unchecked: list[str],
    ) -> None:
        """An epoch begins; what is seen of wrong data goes into ``noticed``, in short, and what
        could not be looked at into ``unchecked``."""
        self._log = log
        self._noticed, self._unchecked = noticed, unchecked
        self._noted = set()
        self._stream = stream
        self._epochs += 1
        if not num_workers:
            self._workers = None  # those of an earlier epoch, or of another loader
        self._look_at = 4 * max(1, num_workers)
        self._kept.begin()
        self.due = 0 if self._on else sys.maxsize

    def on(self, *about: Any, **more: Any) -> None:
        """From now on it is these workers; as :class:`_Workers` takes them."""
        with self._guarded():
            self._workers = _Workers(*about, **more)
            self._as_drawn = copy_state(self._dataset())  # their first batches are drawn

    def while_waiting(self, advance: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """What waits for a batch, with what is looked at meanwhile on new workers."""
        return advance if self._workers is None else self._workers.waited.around(advance)

    def over(self, fetcher: Any) -> Any:
        """In main, without workers: begin an epoch on ``fetcher``, which is given back."""
        with self._guarded():
            self._fetcher = weakref.ref(fetcher)
            if self._has_time():
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
        with self._guarded():
            if self._has_time():
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
                said += self._workers.moved_positions(said, reports)
        return said

    def _has_time(self) -> bool:
        # Where data was wrong each epoch is looked at: its audit says so, or that it ended.
        wrong = any(about[0] in OF_DATA for about in self._told)
        return self._on and (self._epochs <= ALWAYS or wrong or self._took_little())

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
            ended=ended,
            cure=self._cure,
        )
        for finding in findings(seen, self._earlier):
            if self._counts(finding, dataset):
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
            yield from self._workers.slow_start(self._dataset(), self._stream)
        yield from self._kept.finding((self._dataset(), self._fetcher()))

    def _counts(self, finding: Finding, dataset: Any) -> bool:
        """Whether a finding is worth a word: of what samples are made by, and not told already."""
        kind, *about = finding.about
        if kind == "stale":
            path, _, key = about[0].partition("['")
            return any(
                is_read(dataset, each.owner, each.name)
                and (not key or any(names_key(o, key[:-2]) for o in (dataset, each.owner)))
                for each in attributes(dataset)
                if each.path == path
            )
        if kind == "lost":
            return any(
                _may_be_cache(each.value) for each in attributes(dataset) if each.path == about[0]
            )
        if kind == "diverged" and about[1:]:
            # Notes for each sample, that a worker began itself, are no order.
            path, _, name = about[0].rpartition(".")
            owners = [each.owner for each in attributes(dataset) if each.path == about[0]]
            owners += [dataset] if path == "dataset" else []
            return not any(stores_elements(owner, name) for owner in owners)
        return True

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


class _Workers:
    """The workers of one pool, as far as their reports go.

    Attributes:
        number: how many.
        stay: whether they stay for the next epoch.
        forked: whether they began as copies of main.
    """

    def __init__(
        self,
        flight: FlightRecorder,
        stock: Any,
        *,
        stay: bool,
        start_method: str,
        began: float,
        started: float,
    ) -> None:
        # Weakly: what it looks at goes with the workers.
        self._flight: Callable[[], FlightRecorder | None] = weakref.ref(flight)
        self._stock: weakref.ref[Any] = weakref.ref(stock)
        self.number = len(_torch.workers_of(stock))
        self.stay = stay
        self.forked = start_method == "fork"
        self._start_method = start_method
        self._began, self._started = began, started
        self._start_told = False
        several = self.forked and self.number > 1
        self.waited = WaitedPositions(read_positions() if several else {})

    def ask(self) -> None:
        """Have the workers report, and wait for those that do so at once."""
        stock, flight = self._stock(), self._flight()
        if stock is None or flight is None:
            return
        ended, queues = _torch.expects_end_of(self._stock), _torch.task_queues(stock)
        asked = {w: flight.reported(w) for w in range(self.number) if not ended(w)}
        for worker in asked:
            queues[worker].put(PAUSE)
        give_up = monotonic() + ANSWER_S
        while asked and monotonic() < give_up:
            now = {worker: flight.reported(worker) for worker in asked}
            asked = {w: was for w, was in asked.items() if now[w] == was or now[w] % 2}
            sleep(0.0002)

    def reports(self) -> dict[int, SelfReport]:
        """The newest report of each worker that has made one."""
        flight = self._flight()
        if flight is None:
            return {}
        raw = {worker: flight.report(worker) for worker in range(self.number)}
        told = {worker: pickle.loads(each) for worker, each in raw.items() if each}
        return {worker: self._of_workers(each) for worker, each in told.items()}

    def _of_workers(self, report: SelfReport) -> SelfReport:
        """The report without files that main may have read itself."""
        if not report.files:
            return report
        paths = self.waited.paths
        return report._replace(files=tuple(each for each in report.files if each.path in paths))

    def moved_positions(self, said: list[str], reports: Mapping[int, SelfReport]) -> list[str]:
        """Read positions that a worker moves since the workers were forked, unless told already."""
        now, then = read_positions(), self.waited.inherited
        by_workers = {each.path for report in reports.values() for each in report.files}
        return [
            f"the read position of {before.path} moved from {before.offset} to {now[fd].offset} "
            f"since the workers were forked: the {self.number} workers share it, and what one "
            "reads, the others skip. Open it in the worker, at first use"
            for fd, before in then.items()
            if fd in now
            and before.path in by_workers
            and now[fd].path == before.path
            and now[fd].offset != before.offset
            and not any(before.path in each for each in said)
        ]

    def slow_start(self, dataset: Any, stream: bool) -> Iterator[Finding]:
        """What took long as the workers began, once they have."""
        flight = self._flight()
        if flight is None or self._start_told:
            return
        ready = [flight.ready_ns(worker) / 1e9 for worker in range(self.number)]
        if not all(ready):
            return
        self._start_told = True
        seconds = max(ready) - self._began
        heavy = list if self.forked else partial(heaviest, dataset)
        took = self._started - self._began
        yield from slow_start(seconds, took, self._start_method, stream, heavy)


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


def _may_be_cache(value: Any) -> bool:
    """Whether a container may save work: a history and counts are not read to save any."""
    base = container_base(type(value))
    if base is not dict:
        # A list has places for what is made: the first is there already.
        return base is list and bool(list.__len__(value))
    counts = (int, float, list, set)
    factory = getattr(value, "default_factory", None) if type(value) is defaultdict else None
    return type(value) is not Counter and not any(factory is each for each in counts)
