"""A pool of workers, and torch's iterator over it. Runs in: main.

::

    WorkerPool ── builds ──► torch's iterator ◄── waits through ── ResultReceiver ◄── ResultQueue
       │                                                             │                    ▲
       └── Diagnosis ◄── FlightRecorder                              └── WorkersDied    workers

With persistent workers it serves one epoch after the other, and so does the pool of no workers that
the loader keeps between its epochs; otherwise it belongs to its
:class:`~safeloader.main.iterator.SafeIterator`. It must not hold the loader: see there.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    IterDataPipe,
    MapDataPipe,
    StackDataset,
    Subset,
)

from safeloader import _python, _torch
from safeloader.delivery.ledger import Ledger, MapLedger
from safeloader.delivery.stream_ledger import StreamLedger
from safeloader.failures.failure import Failure, failure_of
from safeloader.failures.loader_log import LoaderLog, guarded
from safeloader.introspect.advice import FORK_DOES_WITHOUT, next_step
from safeloader.introspect.byte_code import codes, uses
from safeloader.introspect.dataset_state import describe
from safeloader.introspect.file_positions import read_positions
from safeloader.introspect.fork_hazards import natives, survey, warn_once
from safeloader.introspect.generators import generators_of, own_generators
from safeloader.introspect.parts import GLOBAL, functions_of
from safeloader.introspect.pickling import find_unpicklable
from safeloader.introspect.random_state import mark_here, preserved
from safeloader.introspect.ranks import Place
from safeloader.introspect.resource_exhaustion import shortage
from safeloader.introspect.seeds import EpochSeed, Seeder
from safeloader.introspect.suspects import Inherited
from safeloader.introspect.threads import threads_here
from safeloader.introspect.two_ways import passed_by
from safeloader.introspect.values import weakly
from safeloader.main.dataset_places import putting_back
from safeloader.main.drawing import RecordingSampler, length_is_true, proven_length
from safeloader.main.epoch import Epoch
from safeloader.main.looks import Looks
from safeloader.provenance.recorder import failure_was_told
from safeloader.settings import Settings, freezes_garbage, keeps_heap, keeps_slots, pickles_once
from safeloader.supervision.causes import Forked
from safeloader.supervision.diagnosis import Diagnosis, Stalls
from safeloader.supervision.flight_recorder import FlightRecorder
from safeloader.supervision.processes import remove_files_of
from safeloader.supervision.receiver import PinnedResultReceiver, ResultReceiver
from safeloader.transport.channel import ResultQueue, TaskQueue
from safeloader.transport.parking import forking
from safeloader.transport.slot_budget import PoolCounts, budget
from safeloader.transport.slot_reader import Unpacker
from safeloader.transport.slot_table import Parked, SlotTable
from safeloader.transport.stream_progress import StreamProgress
from safeloader.worker.arguments import Arguments, are_pickled
from safeloader.worker.context import FetchContext
from safeloader.worker.dataset_states import DatasetStates, StatesPlan
from safeloader.worker.hints import ITER_RAISED
from safeloader.worker.observing import Observer
from safeloader.worker.policy import Policy
from safeloader.worker.recording import RecordingFetcher, key_of
from safeloader.worker.seeding import seeded_in_main
from safeloader.worker.startup import LookedAhead, WorkerStartup, fetcher_for

_T = TypeVar("_T")
_AS_IT_IS = nullcontext()
_ASK_OTHERS = (Subset, StackDataset)  # whose own class tells nothing of the datasets in them
# Classes of datasets; weakly, as some are made anew each time.
_looked_at: weakref.WeakSet[type] = weakref.WeakSet()
_passed_by: weakref.WeakSet[type] = weakref.WeakSet()


class WorkerPool:
    """Torch's iterator, with the parts of ours that are built into it.

    Attributes:
        workers: how many; 0: torch's iterator fetches in this process.
        stream: whether the dataset is iterable-style.
        persistent: whether they stay from epoch to epoch.
        looks: at what its workers report.
        plan: of a loader that keeps its place, how the states of its dataset are kept.
        states: the same without workers, of the epoch that begins.
        live: gives the checked iterator over it, as long as there is one.
        broken: what ended the workers, once something did.
        timeout_s: the loader's ``timeout``.
        seeds_per: how its samples are seeded, with ``seed=``.
        hangs: whether it ran out, and the workers are not waited for when nobody wants a batch.
        raised: exceptions of failed batches, without workers.
    """

    live: weakref.ref[Any]
    looks: Looks
    plan: StatesPlan | None = None
    states: DatasetStates | None = None

    def __init__(self, loader: DataLoader[Any], settings: Settings, log: LoaderLog) -> None:
        self.workers = int(loader.num_workers)  # of NumPy too
        self.stream = isinstance(loader.dataset, IterableDataset)
        self.raised: list[BaseException] = []
        self.broken: Failure | None = None
        self.timeout_s = float(loader.timeout)
        self.hangs = False
        self._stock: Callable[[], Any] = lambda: None
        self._in_main: tuple[FetchContext, RecordingFetcher] | None = None  # of the epoch before
        self._unpacker: Unpacker | None = None  # whose slots may outlive its workers
        self.persistent = loader.persistent_workers
        self.seeds_per = None if settings.seed is None else settings.seed_per
        self._log = log
        self._named_by = type(loader), type(loader.dataset)
        self.sampler = RecordingSampler(
            _torch.index_sampler(loader),
            batched=_torch.batches_itself(loader),
            stream=self.stream,
            keep_open=settings.on_crash == "restart" and self.workers > 0,
            in_main=self.workers == 0,
            lends=settings.on_error == "replace",
        )
        progress = functools.partial(StreamProgress, max(self.workers, 1), shared=self.workers > 0)
        lacking = "the ends of the streams cannot be checked: no shared memory"
        self._progress = self._if_room(progress, lacking) if self.stream else None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of a loader's attributes has none

    @property
    def stock(self) -> Any:
        """Torch's iterator; None before the first epoch, and without workers.

        With persistent workers the loader holds it, and whoever lets go of it there ends them.
        """
        return self._stock()

    @stock.setter
    def stock(self, stock: Any) -> None:
        held = self.persistent and stock is not None
        self._stock = weakref.ref(stock) if held else lambda: stock

    @property
    def may_serve_again(self) -> bool:
        """Whether it has no workers, and nothing in it is of this epoch alone."""
        seeded = self._settings.seed is not None
        return not (self.workers or self.stream or seeded)

    def serves(self, loader: DataLoader[Any], settings: Settings) -> bool:
        """Whether one that :attr:`may_serve_again` would be made anew as it is, and is not in use.

        What else may have changed is looked at as the epoch begins.
        """
        sampler = self.sampler
        return (
            self.workers == loader.num_workers
            and sampler.drawn_from is _torch.index_sampler(loader)
            and sampler.batched == _torch.batches_itself(loader)
            and settings.same_as(self._settings)
            and self.live() is None
        )

    def log_again(self, loader: DataLoader[Any], length: int | None, at: Place) -> LoaderLog | None:
        """The log of the epoch before, if a new one would be the same."""
        log, (kind, of_dataset) = self._log, self._named_by
        if type(loader) is not kind or type(loader.dataset) is not of_dataset:
            return None
        if (log.length, log.at) != (length, at):
            return None
        log.begin()
        return log

    def new_ledger(self) -> Ledger:
        """The accounts of an epoch that is to begin, by the dataset's kind."""
        if self.stream:
            return StreamLedger(progress=self._progress, workers=self.workers)
        # Workers draw ahead, so the sampler's end is known when the last batch comes. Without
        # workers only its length tells: asking the sampler would move its generator.
        if self.workers:
            return MapLedger(expected_batches=None)
        length = functools.partial(proven_length, self.sampler.drawn_from)
        return MapLedger(expected_batches=length)

    def begin(self, loader: DataLoader[Any], settings: Settings, epoch: Epoch) -> Any:
        """Begin an epoch: the first one with new workers, the next ones on the same.

        Returns:
            Torch's iterator, to be held for as long as batches are wanted.

        Raises:
            SafeLoaderError: if ``iter(dataset)`` raises, or no worker can be started.
        """
        self._settings, self._log = settings, epoch.log
        self.raised.clear()
        kind = type(loader.dataset)
        # Seen as an epoch before began; those that ask others may have others now.
        seen = self._in_main is not None and kind is self._named_by[1] and kind not in _ASK_OTHERS
        self._named_by = type(loader), kind
        if not (seen or self.stream) and _torch.batches_itself(loader):
            with guarded("the look at __getitems__", lambda: self._log):
                self._tell_of_passed_by(loader.dataset)
        if not self.workers:
            return self._build_in_main(loader)
        stock = self.stock
        if stock is None:
            return self._start(loader)
        budget.divide()
        _torch.reset_iterator(stock, self._view(loader, self.sampler))
        return stock

    # building ───────────────────────────────────────────────────────────────────────────────────

    def _build_in_main(self, loader: DataLoader[Any]) -> Any:
        view = _torch.LoaderView(loader, self.sampler, loader.worker_init_fn, None)
        states = self.states
        context, seed = self._context_in_main(), self.sampler.log.seed
        beginning: AbstractContextManager[object] = _AS_IT_IS
        if seed is not None and context.seeder is not None and self.stream:
            beginning = _beginning_stream(view, context.seeder, seed)
        try:
            with beginning:
                stock = _torch.build_iterator(view)
        except Exception as exc:
            failure_was_told()
            if not _torch.raised_by_dataset_iter(exc):
                raise
            failure = failure_of(exc, phase="sample", where="", hint=ITER_RAISED)
            raise self.sampler.log.error(failure, exc) from None
        looks = self.looks

        def ours(fetcher: Any) -> Any:
            if states is not None:
                with putting_back(states), nullcontext() if seed is None else preserved():
                    states.after_iter(fetcher, key_of(context.key), context.seeder)
            recording = looks.over(self._fetcher_in_main(fetcher, context))
            if states is not None:
                states.over(recording, None)
            return recording if seed is None else seeded_in_main(recording, context)

        _torch.replace_fetcher(stock, ours)
        return stock

    def _context_in_main(self) -> FetchContext:
        """That of the epoch before, if nothing has changed."""
        settings = self._settings
        if self._in_main is not None:
            context, _ = self._in_main
            apart = settings.trace_target is not False
            known = context.length, context.policy.tells, context.apart
            if known == (self._log.length, settings.tells, apart):
                return context
        return self._context()

    def _fetcher_in_main(self, stock: Any, context: FetchContext) -> RecordingFetcher:
        """That of the epoch before, if it would be made anew as it is."""
        if self._in_main is not None:
            _, fetcher = self._in_main
            if fetcher.serves(stock, context):
                fetcher.by_way_of(None)  # an epoch may have ended with its first samples
                return fetcher
        fetcher = fetcher_for(stock, context)
        self._in_main = context, fetcher
        return fetcher

    def _context(
        self, inherited: Sequence[Inherited] = (), start_state: dict[str, Any] | None = None
    ) -> FetchContext:
        settings = self._settings
        return FetchContext(
            progress=self._progress,
            key=settings.identity,
            checks=settings.checks,
            policy=Policy(settings.on_error, settings.retries, tells=settings.tells),
            checksum=settings.checksum,
            seeder=None if settings.seed is None else Seeder(settings.seed_per),
            start_state=start_state,
            raised=None if self.workers else self.raised,
            length=self.sampler.log.log.length,  # as this epoch has it
            inherited=tuple(inherited),
            states=self.plan,
            apart=settings.trace_target is not False,
        )

    def _stays_as_it_is(self, loader: DataLoader[Any]) -> bool:
        """Whether no code of the user's comes between now and a forked worker's first task.

        But for what runs at each fork, which is to leave things as they were.
        """
        return not (
            loader.worker_init_fn is not None
            or self.plan is not None  # it may be given its state there
            or isinstance(loader.dataset, IterDataPipe | MapDataPipe)  # torch seeds it there
            or not length_is_true(self.sampler.drawn_from)  # a sampler of the user's begins first
        )

    def _look_ahead(self, loader: DataLoader[Any], length: int | None) -> list[LookedAhead]:
        """What forked workers need not look at, each for itself; nothing where this is at fault.

        What another thread sets before they are forked counts as set by them.
        """
        with guarded("the look at what workers begin with", lambda: self._log):
            observer = Observer(
                loader.dataset,
                length=length,
                stream=False,
                files=None,
                publish=lambda report: None,
                stays=self.persistent,
            )
            observer.look_ahead()
            return [LookedAhead(observer, read_positions())]
        return []

    def _start(self, loader: DataLoader[Any]) -> Any:
        """Start the workers, with torch's iterator over them.

        Raises:
            TransportError: if something cannot be pickled for them, or the machine has no room.
        """
        settings, workers = self._settings, self._needed(loader)
        method = _torch.start_method(loader)
        forks = method == "fork"
        inherited = self._warn_of_hazards(loader, method, workers)
        threads = {}
        if forks:
            threads = threads_here()
            _torch.load_for_workers()
            mark_here()  # what it finds out, the workers inherit
        results: ResultQueue | None = None
        try:
            table, no_slots = self._slot_table(workers)
            loaders = settings.recorder.transport
            counts = loaders if table is None else PoolCounts(loaders, table)
            unpacker = Unpacker(table, counts)
            parked: Parked = {}
            parks = table is not None and forks and keeps_slots()
            if table is not None and parks:
                parked = settings.recorder.parked.take(table)
                unpacker.adopt(parked)
                budget.divide()  # counted with the workers before, these could hold no more
            results = ResultQueue(workers, unpacker.opened, unpacker.settle)
            lacking = "no flight recorder, so a crash will name no index"
            flight = self._if_room(functools.partial(FlightRecorder, workers), lacking)
            observed = self.persistent or self.looks.worth_it
            start_state: dict[str, Any] | None = None
            ahead: list[LookedAhead] = []
            if forks and self._stays_as_it_is(loader):
                length = self.sampler.log.log.length
                start_state = describe(loader.dataset, ask=False, length=length)
                if observed and flight is not None:
                    ahead = self._look_ahead(loader, length)
            startup = WorkerStartup(
                loader.worker_init_fn,
                context=self._context(inherited if forks else (), start_state),
                results=results,
                flight=flight,
                slots=table,
                no_slots=no_slots,
                forks=forks,
                stays=self.persistent,
                observed=observed,
                ahead=ahead,
                freezes=freezes_garbage(),
                keeps_heap=keeps_heap(),
                parked=parked,
                not_mine=unpacker.forget if forks else None,
            )
            tasks = functools.partial(TaskQueue, self.sampler.refused)
            ours = type(results), TaskQueue, FlightRecorder, SlotTable, StreamProgress
            arguments = Arguments(ours) if self._pickles_once(loader, method, workers) else None
            some = None if workers == self.workers else workers
            channels = _torch.Channels(results, tasks, flight, arguments, some)
            view = functools.partial(_torch.LoaderView, worker_init_fn=startup)
            began = perf_counter()
            starting: AbstractContextManager[object] = nullcontext()
            if forks:
                starting = forking()
            elif arguments is not None:
                starting = closing(arguments)
            with starting:
                self.stock = stock = _torch.build_iterator(
                    view(loader, self.sampler, channels=channels)
                )
            # For the next epochs, which start no worker.
            self._view = functools.partial(view, channels=channels._replace(arguments=None))
        except Exception as exc:
            failure_was_told()
            failure = self._why_not_started(loader, exc)
            _python.close_pipes(exc)
            if results is not None:  # whoever keeps the error may keep the frames as well
                results.close()
            if failure is None:
                raise
            # Without its frames, which lead into torch's half made iterator.
            raise self.sampler.log.error(failure, exc.with_traceback(None)) from None
        results.all_started()
        parked.clear()  # they are the unpacker's now
        ahead.clear()  # the workers have it
        if flight is not None:
            self.looks.on(
                flight,
                stock,
                stay=self.persistent,
                start_method=method,
                sets_up=loader.worker_init_fn is not None,
                began=began,
                started=perf_counter(),
            )
            settings.recorder.memory_of_workers = weakref.WeakMethod(flight.memory)
            settings.recorder.flight = weakref.ref(flight)
        processes = _torch.workers_of(stock)
        if isinstance(counts, PoolCounts):
            counts.workers = weakref.WeakSet(processes)
            if parks and not self.persistent:
                settings.recorder.parked.started(unpacker, processes)
                self._unpacker = unpacker
        draws = self.sampler
        forked = None
        if forks:
            dataset = weakly(loader.dataset)  # which is looked at if a worker hangs
            forked = Forked(tuple(inherited), lambda: natives(dataset()), threads)
        # Not by way of the pool, which holds it: a cycle.
        self.diagnosis = Diagnosis(
            flight, processes, method, lambda seq: draws.log.opened(seq), forked
        )
        ends, stalls = _torch.expects_end_of(weakref.ref(stock)), Stalls(self.diagnosis, self._log)
        waiting: Any = results, processes, ends, self.timeout_s, settings.stall_after, stalls

        def receiver(*pinning: Any) -> ResultReceiver:
            return (PinnedResultReceiver if pinning else ResultReceiver)(*pinning, *waiting)

        _torch.listen_through(stock, receiver)
        return stock

    def _needed(self, loader: DataLoader[Any]) -> int:
        """How many workers to start: none that no batch would reach, and no code of the user's.

        Batch ``i`` of an epoch goes to worker ``i`` first. So many are started that torch draws
        all batches, and sees that there are no more, before it waits for the first, as it would
        with all of them.
        """
        ends = not (self.persistent or self.stream)
        if not ends or loader.worker_init_fn is not None or self.plan is not None:
            return self.workers
        with guarded("the look at how many batches there are", lambda: self._log):
            batches = proven_length(self.sampler.drawn_from)
            if batches is not None:
                drawn_at_once: int = loader.prefetch_factor or 1
                return max(1, min(self.workers, max(batches, batches // drawn_at_once + 1)))
        return self.workers

    def _pickles_once(self, loader: DataLoader[Any], method: str, workers: int) -> bool:
        """Whether the workers may read one pickle all at once, after torch's iterator is there.

        With a timeout they may not: it counts from then on, and must not count their reading.
        """
        if method == "fork" or workers < 2 or self.timeout_s or not pickles_once():
            return False
        return are_pickled(_torch.worker_class(loader))

    def _slot_table(self, workers: int) -> tuple[SlotTable | None, str]:
        """The states of the workers' slots; None, and why, for torch's own transport."""
        if self._settings.transport == "torch":
            return None, ""
        if not hasattr(os, "memfd_create"):
            return None, f"{sys.platform} has no anonymous shared memory (memfd)"
        try:
            return SlotTable(workers), ""
        except OSError as exc:
            return None, f"no shared memory for slots: {exc}"

    def _if_room(self, make: Callable[[], _T], lacking: str) -> _T | None:
        """What ``make`` makes in shared memory; None where there is none, and then it is told."""
        try:
            return make()
        except OSError as exc:
            # Its text: a handler that keeps records would keep its frames too, and what they hold.
            self._log.warning("%s (%s)", lacking, str(exc))
            return None

    def _warn_of_hazards(
        self, loader: DataLoader[Any], method: str, workers: int
    ) -> list[Inherited]:
        """Warn of what the workers inherit from this process and had better not."""
        found: list[Inherited] = []
        with guarded("the look at what workers inherit", lambda: self._log):
            found = survey(
                loader.dataset,
                "dataset",
                start_method=method,
                num_workers=workers,
                beside={"collate_fn": loader.collate_fn, "worker_init_fn": loader.worker_init_fn},
            )
            found = _still_to_tell(found, loader)
        warn_once(found, loader.dataset)
        return found

    def _tell_of_passed_by(self, dataset: Any) -> None:
        """Warn, once a process for each class, of a ``__getitem__`` that never runs."""
        if type(dataset) in _looked_at and type(dataset) not in _ASK_OTHERS:
            return
        _looked_at.add(type(dataset))
        for found in passed_by(dataset):
            if found.cls not in _passed_by:
                _passed_by.add(found.cls)
                self._log.warning("%s", found.says)

    def _why_not_started(self, loader: DataLoader[Any], exc: Exception) -> Failure | None:
        """The failure that kept the workers from starting; None if it is not ours to explain."""
        if short := shortage(exc):
            hint = f"no worker could be started\n{short}"
            return failure_of(exc, phase="transport", where="", hint=hint)
        method = _torch.start_method(loader)
        if method == "fork":
            return None
        sent = {
            "dataset": loader.dataset,
            "collate_fn": loader.collate_fn,
            "worker_init_fn": loader.worker_init_fn,
            "key": self._settings.key,
            "validate": self._settings.validate,
            "on_error": self._settings.on_error,
        }
        for name, thing in sent.items():
            if culprit := find_unpicklable(thing, name):
                why = "" if str(exc) in culprit.reason else f" ({culprit.reason})"
                hint = (
                    f"{culprit} cannot be pickled, and {method} sends it to every worker{why}\n"
                    f"{next_step(culprit.advice)}"
                )
                if culprit.forks:  # never of what does not survive a fork either
                    hint += f"; {FORK_DOES_WITHOUT}"
                return failure_of(exc, phase="transport", where="", hint=hint)
        return None

    # workers that died ──────────────────────────────────────────────────────────────────────────

    def rests(self) -> None:
        """Nobody asks for more batches, and workers that do not stay end."""
        if self.workers and not self.persistent and "_settings" in self.__dict__:
            unpacker = self._unpacker
            if unpacker is not None:
                with guarded("keeping slots for the next workers", lambda: self._log):
                    self._settings.recorder.parked.rest(unpacker)

    def end(self) -> None:
        """End the workers that are left, whatever they are at."""
        self.hangs = False
        stock = self.stock
        _torch.shut_down(stock)
        remove_files_of(worker.pid for worker in _torch.workers_of(stock))

    def replace_workers(self, blueprint: DataLoader[Any]) -> Any:
        """Start new workers on the batches still open; ``blueprint`` is a copy of the loader.

        The generators of the main process stay where they are, as if nothing had happened.
        """
        self.end()
        self.stock = None  # if no worker starts, or an interrupt comes, the next epoch has new ones
        generator = blueprint.generator
        blueprint.generator = generator and generator.clone_state()
        with self.sampler.beginning_with_open(), preserved():
            stock = self._start(blueprint)
        blueprint.generator = generator
        return stock


@contextmanager
def _beginning_stream(view: Any, seeder: Seeder, seed: EpochSeed) -> Iterator[None]:
    """While torch makes its iterator here: its base seed is drawn as ever, the stream is seeded.

    Torch draws first and asks the dataset then, in one call. So it draws from a copy of the default
    generator, which is put where the copy is left.
    """
    drawn = torch.default_generator.clone_state()
    if view.generator is None:
        view.generator = drawn
    try:
        with preserved():
            seeder.begin(seed.seed, seed.epoch)
            seeder.stream(0)
            yield
    finally:
        torch.default_generator.set_state(drawn.get_state())


def _still_to_tell(found: list[Inherited], loader: DataLoader[Any]) -> list[Inherited]:
    """Leave out what ``worker_init_fn`` makes anew, and generators of which workers tell.

    They do so, if the numbers repeat, of those that ``worker_init_fn`` may seed, and of a module's,
    which samples need not draw from.
    """
    if not found:
        return found
    stream = isinstance(loader.dataset, IterableDataset)
    watched = () if stream else tuple(own_generators(loader.dataset))
    init = loader.worker_init_fn
    functions = [] if init is None else functions_of(init)
    named = {name for f in functions for code in codes(f.__code__) for name in code.co_names}
    made = {name for f in functions for name in uses(f.__code__).sets}
    held = {id(each) for each in generators_of(init, "").values()}

    def is_seen_to(each: Inherited) -> bool:
        name = set(_NAMES.findall(each.path)[-1:])
        if each.by_fork:
            return bool(made & name)
        within = (f"{each.path}.", f"{each.path}[")  # of a library's object with several
        seen = each.path in watched or any(path.startswith(within) for path in watched)
        if seen and (init is not None or each.path.startswith(GLOBAL)):
            return True
        return bool(named & name) or each.token in held

    return [each for each in found if not is_seen_to(each)]


_NAMES = re.compile(r"[A-Za-z_]\w*")
