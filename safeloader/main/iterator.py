"""Torch's iterator, with every batch checked. Runs in: main.

Takes what comes out of torch's iterator (:class:`DeliveredBatch`, :class:`FailedBatch`,
:class:`EmptyBatch`), gives batches to the training loop and raises what went wrong. It must not
hold the loader: with persistent workers the loader holds torch's iterator, and a cycle would keep
workers alive until the garbage collector comes by.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from threading import get_ident
from time import perf_counter_ns as clock
from typing import TYPE_CHECKING, Any, NoReturn

from safeloader import _torch
from safeloader.delivery.skip_budget import SkipBudget
from safeloader.errors import DeliveryError, SafeLoaderError, error_from
from safeloader.failures import dump
from safeloader.failures.failure import Failure
from safeloader.failures.loader_log import LoaderLog, length_of
from safeloader.main.epoch import Epoch
from safeloader.main.worker_pool import WorkerPool
from safeloader.main.worker_restarts import WorkerRestarts
from safeloader.provenance.trace import trace_for
from safeloader.supervision.diagnosis import WorkerLocation
from safeloader.supervision.receiver import TimedOut, WorkersDied
from safeloader.transport.checksum import changed
from safeloader.transport.messages import DeliveredBatch, EmptyBatch, FailedBatch
from safeloader.transport.slot_reader import WORKER_GONE

if TYPE_CHECKING:
    from safeloader.loader import SafeDataLoader


class SafeIterator(Iterator[Any]):
    """What ``iter(loader)`` returns: torch's iterator, with a ledger.

    Attributes of torch's iterator (``_workers``, ``_index_queues``, ...) answer here too.
    """

    def __init__(self, loader: SafeDataLoader[Any], session: WorkerPool | None = None) -> None:
        self._turn = threading.Lock()  # held in next(); nobody waits for it
        self._whose = 0
        self._recorder = loader._recorder_on_demand()
        self._restarts = WorkerRestarts.for_loader(loader)
        self._epoch = self._begin(loader)
        # A stream's __next__ also warns about its length: that stays torch's.
        stream = _torch.is_stream(loader)
        self._advance: Callable[[Any], Any] = next if stream else _torch.next_of
        self._pool = WorkerPool(loader, self._epoch) if session is None else session
        self._stock = self._pool.stock
        if session is not None:
            self._begin_on_pool(loader)
        self._pool.live = weakref.ref(self)

    def _begin(self, loader: SafeDataLoader[Any]) -> Epoch:
        log = LoaderLog(loader.dataset, length_of(loader.dataset))
        epoch = Epoch(
            trace_for(self._recorder, loader.trace, log),
            loader.verify,
            loader.dataset,
            SkipBudget(loader.max_skipped, runs=not callable(loader.on_error)),
            None
            if loader.on_failure_dump is None
            else functools.partial(dump.write, folder=loader.on_failure_dump, log=log),
            log,
        )
        epoch.number = self._recorder.begin_epoch(epoch.audit)
        return epoch

    def _begin_on_pool(self, loader: SafeDataLoader[Any]) -> None:
        """Begin an epoch on workers that are there already, or should be."""
        try:
            self._pool.restart(loader, self._epoch)
        except WorkersDied as sign:
            self._go_on_after(sign)
        self._stock = self._pool.stock

    def _restart(self, loader: SafeDataLoader[Any]) -> None:
        if self._turn.locked():
            raise self._out_of_turn()
        with self._turn:
            self._whose = get_ident()
            self._epoch.close()
            self._epoch.release()
            self._recorder = loader._recorder_on_demand()
            self._restarts = WorkerRestarts.for_loader(loader)
            self._epoch = self._begin(loader)
            self._begin_on_pool(loader)

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
                        self._epoch.ended(broken=self._pool.broken is not None)
                        raise
                    except (WorkersDied, TimedOut) as sign:
                        self._go_on_after(sign)
                        continue
                    epoch = self._epoch
                    if type(came) is DeliveredBatch:
                        manifest, payload = came
                        if manifest.fingerprints is not None:
                            failure = changed(manifest, payload)
                            if failure is not None:
                                self._other_than_batch(FailedBatch(manifest, failure))
                        if self._restarts is not None:
                            self._pool.sampler.answered(manifest.seq)
                        wait_ns = clock() - began
                        number = epoch.arrived(manifest, began, wait_ns)
                        self._recorder.delivered(epoch.number, number, wait_ns, manifest)
                        return payload
                    self._other_than_batch(came)
            except (StopIteration, SafeLoaderError):
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
        """What torch's iterator gave is no batch: an error is raised, or it is left out."""
        if type(came) is FailedBatch:
            failure = came.failure
            gone = failure is not None and failure.phase == "transport"
            if gone and self._lost_with_worker(came):
                return
            self._pool.sampler.answered(came.manifest.seq)
            raise self._epoch.came_failed(came, self._pool.raised)
        if type(came) is EmptyBatch:
            self._pool.sampler.answered(came.manifest.seq)
            self._epoch.came_empty(came.manifest)
            return
        if self._pool.broken is not None:
            raise error_from(self._pool.broken)
        raise DeliveryError(
            f"a batch came without a manifest ({type(came).__name__}): something replaced "
            "safeloader's fetcher in the workers. Set SAFELOADER=off to run without records."
        )

    def _lost_with_worker(self, came: FailedBatch) -> bool:
        """Whether a batch could not be loaded because its worker died after sending it.

        Its memory went with the worker. Then the worker's death is what is told.
        """
        failure, worker = came.failure, came.manifest.worker_id
        if failure is None or worker is None or not failure.raised_any_of(WORKER_GONE):
            return False
        process = _torch.workers_of(self._stock)[worker]
        process.join(1.0)  # its socket closes before it can be waited for
        if process.is_alive() or _torch.expects_end_of(weakref.ref(self._stock))(worker):
            return False
        self._go_on_after(WorkersDied((worker,)))
        return True

    def _go_on_after(self, sign: WorkersDied | TimedOut) -> None:
        """Start a new pool, or raise what happened to the workers."""
        if isinstance(sign, TimedOut):
            diagnosis, waited_s = self._pool.diagnosis, self._pool.timeout_s
            self._pool.timed_out = True
            raise self._epoch.broke(diagnosis.silence(waited_s, timeout=True)) from None
        session = self._pool
        failure = session.diagnosis.crash(sign.workers)
        culprits = [session.diagnosis.location(worker) for worker in sign.workers]
        if self._restarts is not None and self._restarts.should_restart(
            failure, culprits, session.sampler
        ):
            self._epoch.survived(failure)
            self._restarts.revive(session)
            self._stock = session.stock
            return
        session.broken = failure
        session.end()
        # Not by way of a variable: the error's frames would hold the error, and both this iterator.
        raise self._ended_by(failure, culprits) from None

    def _ended_by(self, failure: Failure, at: list[WorkerLocation | None]) -> SafeLoaderError:
        lost = [where.position.seq for where in at if where is not None]
        error = self._epoch.broke(failure, tuple(seq for seq in lost if seq is not None))
        self._epoch.close()
        return error

    def __len__(self) -> int:
        return len(self._stock)

    def __getattr__(self, name: str) -> Any:
        if name == "_stock":  # not built: the constructor raised
            raise AttributeError(name)
        return getattr(self._stock, name)

    def __getstate__(self) -> NoReturn:
        raise NotImplementedError(
            f"a {type(self).__name__} cannot be pickled: it holds worker processes. Pickle the "
            "loader and call iter() on it where it is needed"
        )

    def __del__(self) -> None:
        epoch = self.__dict__.get("_epoch")
        if epoch is not None and not sys.is_finalizing():
            try:
                epoch.close()
                epoch.release()
                if "_pool" in self.__dict__:
                    self._pool.let_go()
            except Exception:  # at interpreter exit anything may be gone already
                return


def iterate(loader: SafeDataLoader[Any]) -> SafeIterator:
    """The iterator for the loader's next epoch, as torch's ``DataLoader.__iter__`` chooses it.

    With persistent workers there is one torch iterator in the loader's life. While the checked
    iterator of an earlier epoch is alive, it is that one again, as it would be under torch.
    """
    if not (loader.persistent_workers and loader.num_workers > 0):
        return SafeIterator(loader)
    session = loader._pool
    held = _torch.kept_iterator(loader)
    # Not there yet, let go of by a framework, or its workers died.
    if session is None or session.kept is not held or session.broken is not None:
        made = SafeIterator(loader)
        loader._pool = made._pool
        _torch.keep_iterator(loader, made._stock)
        return made
    live = None if session.live is None else session.live()
    if live is None:
        live = SafeIterator(loader, session)
    else:
        live._restart(loader)
    if session.stock is not held:  # the workers were restarted
        session.kept = session.stock
        _torch.keep_iterator(loader, session.stock)
    return live
