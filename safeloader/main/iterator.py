"""Torch's iterator, with every batch checked. Runs in: main.

Takes what comes out of torch's iterator (:class:`DeliveredBatch`, :class:`FailedBatch`,
:class:`EmptyBatch`), gives batches to the training loop and raises what went wrong. It must not
hold the loader: with persistent workers the loader holds torch's iterator, and a cycle would keep
workers alive until the garbage collector comes by.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from threading import get_ident
from time import perf_counter_ns as clock
from typing import TYPE_CHECKING, Any, NoReturn

from torch.utils.data import DataLoader

from safeloader import _torch
from safeloader.delivery.manifest import BatchManifest
from safeloader.errors import DeliveryError, SafeLoaderError, error_from
from safeloader.failures.loader_log import LoaderLog, guarded, length_of
from safeloader.introspect.ranks import place
from safeloader.introspect.seeds import EpochSeed
from safeloader.introspect.values import short_type_name, type_name
from safeloader.main.announcing import announced
from safeloader.main.epoch import NOT_ANNOUNCED, Epoch
from safeloader.main.looks import looks_for
from safeloader.main.worker_pool import WorkerPool
from safeloader.main.worker_restarts import WorkerRestarts
from safeloader.provenance.events import listeners
from safeloader.settings import KEEPS_PLACE, KEPT, SAID, Settings
from safeloader.supervision.receiver import TimedOut, WorkersDied
from safeloader.transport.messages import DeliveredBatch, EmptyBatch, FailedBatch, StateMessage
from safeloader.transport.slot_reader import WORKER_GONE, changed

if TYPE_CHECKING:  # few programs keep their place, and the code would be in the memory of all
    from safeloader.main.continuity import Continuity


class SafeIterator(Iterator[Any]):
    """What ``iter(loader)`` returns: torch's iterator, with a ledger.

    Attributes of torch's iterator (``_workers``, ``_index_queues``, ...) answer here too.

    Attributes:
        pool: its workers.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        settings: Settings,
        pool: WorkerPool | None = None,
        said: int | None = None,
        seed: EpochSeed | None = None,
        continuity: Continuity | None = None,
    ) -> None:
        self._continuity = continuity
        self._turn = threading.Lock()  # held in next(); nobody waits for it
        self._whose = 0
        self._loader = weakref.ref(loader)
        self._begin(loader, settings, pool, said, seed)
        self.pool.live = weakref.ref(self)

    def _begin(
        self,
        loader: DataLoader[Any],
        settings: Settings,
        pool: WorkerPool | None,
        said_length: int | None,
        seed: EpochSeed | None,
    ) -> None:
        """Begin an epoch: on new workers, or on those of ``pool`` (or their successors)."""
        length, at = length_of(loader.dataset), place()
        log = None if pool is None else pool.log_again(loader, length, at)
        if log is None:
            kind = short_type_name(type_name(type(loader)))
            log = LoaderLog(loader.dataset, length, kind, at)
        also: list[object] = []
        said = NOT_ANNOUNCED
        if listeners:
            with guarded("who listens to its events", lambda: log):
                also = [listens(loader, log) for listens in listeners]
        self.pool = pool or WorkerPool(loader, settings, log)
        ledger, drawn_from = self.pool.new_ledger(), self.pool.sampler.drawn_from
        try:
            said = announced(loader, drawn_from, self.pool.stream, log.length, said_length)
        except Exception as exc:
            log.caught("the look at the loader's length", exc)
        before = 0 if self._continuity is None else self._continuity.batches_before
        self._epoch = epoch = Epoch(
            loader.dataset,
            settings,
            log,
            ledger,
            also,
            announced=said,
            sampler=loader.dataset if self.pool.stream else drawn_from,
            seed=seed,
            seq_of_first=self.pool.sampler.next_seq - before,
        )
        # A stream cannot be asked again for what a dead worker had read.
        again = self.pool.workers and not self.pool.stream
        restarts = settings.on_crash == "restart" and again
        self._restarts = WorkerRestarts(loader, epoch) if restarts else None
        # A stream's __next__ also warns about its length: that stays torch's.
        self._advance: Callable[[Any], Any] = next if self.pool.stream else _torch.next_of
        new = self.pool.workers > 0 and self.pool.stock is None
        self._looks = self.pool.looks = looks_for(settings.recorder, loader.dataset, log.length)
        told = epoch.noticed, epoch.unchecked
        self._looks.begin(log, self.pool.workers, self.pool.stream, *told, seed, resumed=before > 0)
        self.pool.sampler.begin(epoch, epoch.seed, epoch.seq_of_first)
        if self._continuity is not None:
            self._continuity.begin(self, loader, self.pool, epoch)
        try:
            self._stock = self.pool.begin(loader, settings, epoch)
            if new:
                self._advance = self._looks.while_waiting(self._advance)
        except WorkersDied as sign:
            self._go_on_after(sign)
        if self._continuity is not None:
            self._continuity.built()
            self._await_states(self.pool.sampler.requests)

    def restart(
        self,
        loader: DataLoader[Any],
        settings: Settings,
        said: int | None = None,
        seed: EpochSeed | None = None,
    ) -> None:
        """Begin the next epoch on the same workers."""
        if self._turn.locked():
            raise self._out_of_turn()
        with self._turn:
            self._whose = get_ident()
            self._epoch.release()
            self._looks.release()
            self._begin(loader, settings, self.pool, said, seed)

    def __iter__(self) -> SafeIterator:
        return self

    def __next__(self) -> Any:
        """The next batch; hot path.

        Raises:
            SafeLoaderError: for what went wrong with this batch; ``next()`` may be called again.
            StopIteration: at the end of the epoch.
        """
        if self._turn.locked():
            raise self._out_of_turn()
        with self._turn:  # no interrupt comes between: it is C
            self._whose = get_ident()
            came: Any = None
            try:
                began = clock()
                while True:
                    try:
                        came = self._advance(self._stock)
                    except StopIteration:
                        self._looks.at_end()
                        self._epoch.ended(broken=self.pool.broken is not None)
                        self.pool.rests()
                        if self._continuity is not None:
                            self._continuity.ended(self)
                        raise
                    except (WorkersDied, TimedOut) as sign:
                        self._go_on_after(sign)
                        continue
                    if type(came) is not DeliveredBatch:
                        self._other_than_batch(came)
                        continue
                    epoch = self._epoch
                    manifest, payload = came
                    if manifest.fingerprints is not None:
                        failure = changed(manifest, payload)
                        if failure is not None:
                            came = FailedBatch(manifest, failure)
                            self._other_than_batch(came)
                    if self._restarts is not None:
                        self.pool.sampler.answered(manifest.seq)
                    wait_ns = clock() - began
                    if manifest.incidents is not None:
                        epoch.count_incidents(manifest)
                    discrepancy = None
                    try:
                        with epoch.lock:
                            discrepancy = epoch.check(manifest)
                            if discrepancy is not None:
                                handed_over = epoch.verify != "raise"
                                worker = manifest.worker_id
                                epoch.ledger.settle(
                                    discrepancy, handed_over=handed_over, worker=worker
                                )
                    except Exception as exc:
                        epoch.at_fault("the ledger", exc)
                    if discrepancy is not None:
                        beside = self._looks.before_failure()
                        epoch.tell_discrepancy(discrepancy, manifest, beside)
                    number = epoch.batches
                    epoch.batches = number + 1
                    if number >= self._looks.due:
                        self._looks.at_batch(epoch.number, number, payload)
                    for told in epoch.events.delivered:
                        try:
                            told(epoch.number, number, wait_ns, manifest, began)
                        except Exception as exc:
                            epoch.sink_failed(told, exc)
                    if epoch.ledger.settled:  # not every loop asks again after the last batch
                        epoch.close()
                    if self._continuity is not None:
                        self._continuity.passed(manifest, number)
                    return payload
            except (StopIteration, SafeLoaderError):
                if self._continuity is not None and type(came) is DeliveredBatch:
                    self._continuity.passed(came.manifest, self._epoch.batches - 1)
                raise
            except BaseException:
                self._epoch.interrupted(came.manifest if type(came) is DeliveredBatch else None)
                raise

    def _out_of_turn(self) -> RuntimeError:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        mine, other = (names.get(ident, str(ident)) for ident in (get_ident(), self._whose))
        if mine == other:
            said = f"thread {mine!r} is in it already (a dataset, or a signal handler, that asks?)"
        else:
            said = f"thread {mine!r} asks while thread {other!r} waits for a batch"
        return RuntimeError(
            f"one thread at a time may be in next() or iter() of this iterator: {said}. Nothing "
            "was lost: go on in one thread, or share it with a lock of your own"
        )

    def _other_than_batch(self, came: Any) -> None:
        """What torch's iterator gave is no batch: raise its error, or leave it out."""
        if type(came) is StateMessage:
            if self._continuity is not None:
                self._continuity.told(came)
        elif type(came) is EmptyBatch:
            self._answered(came.manifest)
            self._epoch.came_empty(came.manifest)
        elif type(came) is FailedBatch:
            if not self._lost_with_worker(came):
                self._answered(came.manifest)
                beside = self._looks.before_failure()
                raise self._epoch.came_failed(came, self.pool.raised, beside)
        elif self.pool.broken is not None:
            raise error_from(self.pool.broken)
        else:
            raise DeliveryError(
                f"a batch came without a manifest ({type(came).__name__}): something replaced "
                "safeloader's fetcher in the workers. Set SAFELOADER=off to run without records."
            )

    def _answered(self, manifest: BatchManifest) -> None:
        """What became of a draw is no batch, and is told."""
        self.pool.sampler.answered(manifest.seq)
        if self._continuity is not None:
            self._continuity.passed(manifest, self._epoch.batches, booked=False)

    def _await_states(self, requests: int) -> None:
        """Wait for the states that the workers' datasets begin with; what else comes is kept."""
        kept: deque[Any] = deque()
        advance = self._advance
        while requests:
            try:
                came = advance(self._stock)
            except (Exception, WorkersDied, TimedOut) as sign:  # told in its turn, by next()
                kept.append(sign)
                break
            if type(came) is StateMessage and not came.at_end:
                self._other_than_batch(came)
                requests -= 1
            else:
                kept.append(came)
                requests -= type(came) is FailedBatch  # it could not begin
        if not kept:
            return

        def first(stock: Any) -> Any:  # which does not hold self: a cycle would keep the workers
            if not kept:
                return advance(stock)
            came = kept.popleft()
            if isinstance(came, BaseException):
                raise came
            return came

        self._advance = first

    def superseded(self, exc: Callable[[], Exception]) -> None:
        """This iterator is at its end: what ``exc`` makes is raised from now on."""

        def refuse(_: object) -> NoReturn:
            raise exc()

        self._advance = refuse

    def left_alone(self) -> None:
        """The loader keeps the place of a newer iterator; this one tells it nothing more."""
        from safeloader.main.continuity import Continuity

        self._continuity = Continuity()  # not None: another thread may be in next()

    def _lost_with_worker(self, came: FailedBatch) -> bool:
        """Whether a batch could not be loaded because its worker died after sending it.

        Its memory went with the worker. Then the worker's death is what is told.
        """
        failure, worker = came.failure, came.manifest.worker_id
        if failure is None or failure.phase != "transport" or worker is None:
            return False
        if not failure.raised_any_of(WORKER_GONE):
            return False
        process = _torch.workers_of(self._stock)[worker]
        process.join(1.0)  # its socket closes before it can be waited for
        if process.is_alive() or _torch.expects_end_of(weakref.ref(self._stock))(worker):
            return False
        self._go_on_after(WorkersDied((worker,)))
        return True

    def _go_on_after(self, sign: WorkersDied | TimedOut) -> None:
        """Start a new pool, or raise what happened to the workers."""
        pool, epoch, restarts = self.pool, self._epoch, self._restarts
        if isinstance(sign, TimedOut):
            pool.hangs = not pool.persistent  # those that stay may yet come to
            raise epoch.broke(pool.diagnosis.silence(pool.timeout_s, timeout=True)) from None
        failure = pool.diagnosis.crash(sign.workers)
        at = [pool.diagnosis.location(worker) for worker in sign.workers]
        if restarts is not None and restarts.should_restart(failure, at, pool.sampler):
            before = pool.stock
            if self._continuity is not None:
                self._continuity.restarting(pool)
            self._stock = pool.replace_workers(restarts.blueprint)
            loader = self._loader()
            if loader is not None and _torch.kept_iterator(loader) is before:
                _torch.keep_iterator(loader, self._stock)
            return
        pool.broken = failure
        pool.end()
        # Not by way of a variable: the error's frames would hold the error, and both this iterator.
        raise epoch.broke(failure, at) from None

    def __len__(self) -> int:
        return len(self._stock)

    def __getattr__(self, name: str) -> Any:
        if name == "_stock":  # not built: the constructor raised
            raise AttributeError(name)
        return getattr(self._stock, name)

    def __getstate__(self) -> NoReturn:
        raise NotImplementedError(f"a {type(self).__name__} cannot be pickled; its loader can")

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Bound above: at interpreter exit this module's names may be gone already.
        epoch = self.__dict__.get("_epoch")
        if epoch is not None and not is_finalizing():
            try:
                epoch.release()
                if "_looks" in self.__dict__:
                    self._looks.release()
                if "pool" in self.__dict__:
                    self.pool.rests()
                    if self.pool.hangs:
                        self.pool.end()  # torch would give each worker five seconds
            except Exception:  # at interpreter exit anything may be gone already
                return


def iterate(loader: DataLoader[Any], ours: Any) -> SafeIterator:
    """The iterator for the loader's next epoch, as torch's ``DataLoader.__iter__`` chooses it.

    With persistent workers there is one torch iterator in the loader's life. While the checked
    iterator of an earlier epoch is alive, it is that one again, as it would be under torch.

    Args:
        loader: a loader of any class.
        ours: what has our keywords as attributes, counts epochs for ``seed=``, and keeps the pool
            of persistent workers for the next one in ``_pool``: the loader itself, or what stands
            beside it.
    """
    settings = Settings.of(ours)
    continuity: Continuity | None = vars(ours).get(KEEPS_PLACE)
    seed = ours._seed_of_next(settings)
    try:
        return _begun(loader, ours, settings, seed, continuity)
    except BaseException:  # no worker can be started, for one
        ours._not_begun(seed)
        if continuity is not None:
            continuity.not_begun()
        raise


def _begun(
    loader: DataLoader[Any],
    ours: Any,
    settings: Settings,
    seed: EpochSeed | None,
    continuity: Continuity | None,
) -> SafeIterator:
    said = vars(ours).pop(SAID, None)
    if not loader.num_workers:
        # Not of what stands beside a loader: there nothing may hold the dataset.
        keeps = vars(loader) if ours is loader and continuity is None else {}
        return _begun_in_main(loader, settings, keeps, said, seed, continuity)
    if not loader.persistent_workers:
        return SafeIterator(loader, settings, said=said, seed=seed, continuity=continuity)
    held = _torch.kept_iterator(loader)
    pool = ours._pool
    if pool is not None and continuity is not None and continuity.wants_new_workers:
        if pool.stock is not None:
            pool.end()
        held = None
    if pool is not None and (held is None or held is not pool.stock or pool.broken is not None):
        pool = None  # let go of by a framework, or its workers died
    if pool is not None and pool.seeds_per != (seed and seed.per):
        pool = None  # its workers seed in another way, or not at all
    live = None if pool is None else pool.live()
    if live is None:
        live = SafeIterator(loader, settings, pool, said, seed, continuity)
    else:
        live.restart(loader, settings, said, seed)
    stock = live.pool.stock
    if stock is not held:  # new, or the workers were replaced
        _torch.keep_iterator(loader, stock)
    if ours._pool is not live.pool:
        ours._pool = live.pool
    return live


def _begun_in_main(
    loader: DataLoader[Any],
    settings: Settings,
    keeps: dict[str, Any],
    said: int | None,
    seed: EpochSeed | None,
    continuity: Continuity | None,
) -> SafeIterator:
    """Begin an epoch without workers, on the pool that ``keeps`` has of the one before.

    It is taken out first: another thread may begin an epoch too.
    """
    pool = keeps.pop(KEPT, None)
    if pool is not None and not pool.serves(loader, settings):
        pool = None
    iterator = SafeIterator(loader, settings, pool, said, seed, continuity)
    if iterator.pool.may_serve_again:
        keeps[KEPT] = iterator.pool
    return iterator
