"""Torch's iterator, with every batch checked. Runs in: main.

Takes what comes out of torch's iterator (:class:`DeliveredBatch`, :class:`FailedBatch`,
:class:`EmptyBatch`), gives batches to the training loop and raises what went wrong. It must not
hold the loader: with persistent workers the loader holds torch's iterator, and a cycle would keep
workers alive until the garbage collector comes by.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from threading import get_ident
from time import perf_counter_ns as clock
from typing import Any, NoReturn

from torch.utils.data import DataLoader

from safeloader import _torch
from safeloader.errors import DeliveryError, SafeLoaderError, error_from
from safeloader.main.epoch import Epoch
from safeloader.main.worker_pool import WorkerPool
from safeloader.main.worker_restarts import WorkerRestarts
from safeloader.provenance.recorder import Recorder
from safeloader.settings import Settings
from safeloader.supervision.receiver import TimedOut, WorkersDied
from safeloader.transport.messages import DeliveredBatch, EmptyBatch, FailedBatch
from safeloader.transport.slot_reader import WORKER_GONE, changed


@dataclasses.dataclass(slots=True)
class Side:
    """What we put beside a loader of torch's; it need not live on that loader.

    Attributes:
        settings: our keywords, for the epoch that begins.
        recorder: the notebook.
        pool: the workers that stay from epoch to epoch; None before there are any.
    """

    settings: Settings
    recorder: Recorder
    pool: WorkerPool | None = None


class SafeIterator(Iterator[Any]):
    """What ``iter(loader)`` returns: torch's iterator, with a ledger.

    Attributes of torch's iterator (``_workers``, ``_index_queues``, ...) answer here too.
    """

    def __init__(self, loader: DataLoader[Any], side: Side, pool: WorkerPool | None = None) -> None:
        self._turn = threading.Lock()  # held in next(); nobody waits for it
        self._whose = 0
        self._begin(loader, side, pool)
        # A stream's __next__ also warns about its length: that stays torch's.
        self._advance: Callable[[Any], Any] = next if self._pool.stream else _torch.next_of
        self._pool.live = weakref.ref(self)

    def _begin(self, loader: DataLoader[Any], side: Side, pool: WorkerPool | None) -> None:
        """Begin an epoch: on new workers, or on those of ``pool`` (or their successors)."""
        settings = side.settings
        self._epoch = epoch = Epoch(loader.dataset, settings, side.recorder)
        new = pool is None
        if pool is None:
            pool = WorkerPool(loader, settings, epoch, side.recorder.transport)
        self._pool = pool
        restarts = settings.on_crash == "restart" and pool.workers
        self._restarts = WorkerRestarts(loader, epoch.log) if restarts else None
        try:
            if not new:
                pool.next_epoch(loader, settings, epoch)
        except WorkersDied as sign:
            self._go_on_after(sign)
        self._stock = pool.stock

    def _restart(self, loader: DataLoader[Any], side: Side) -> None:
        if self._turn.locked():
            raise self._out_of_turn()
        with self._turn:
            self._whose = get_ident()
            self._epoch.close()
            self._epoch.release()
            self._begin(loader, side, self._pool)

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
                    if type(came) is not DeliveredBatch:
                        self._other_than_batch(came)
                        continue
                    epoch = self._epoch
                    manifest, payload = came
                    if manifest.fingerprints is not None:
                        failure = changed(manifest, payload)
                        if failure is not None:
                            self._other_than_batch(FailedBatch(manifest, failure))
                    if self._restarts is not None:
                        self._pool.sampler.answered(manifest.seq)
                    wait_ns = clock() - began
                    if manifest.incidents is not None:
                        epoch.count_incidents(manifest)
                    discrepancy = None
                    try:
                        with epoch.lock:
                            discrepancy = epoch.check(manifest)
                            if discrepancy is not None:
                                epoch.settle(discrepancy, manifest)
                    except Exception as exc:
                        epoch.at_fault("the ledger", exc)
                    if discrepancy is not None:
                        epoch.tell_discrepancy(discrepancy, manifest, stacklevel=3)
                    number = epoch.batches
                    epoch.batches = number + 1
                    for told in epoch.events.delivered:
                        try:
                            told(epoch.number, number, wait_ns, manifest, began)
                        except Exception as exc:
                            epoch.sink_failed(told, exc)
                    if epoch.draws_over:
                        epoch.close_if_settled()
                    return payload
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
        """What torch's iterator gave is no batch: raise its error, or leave it out."""
        if type(came) is EmptyBatch:
            self._pool.sampler.answered(came.manifest.seq)
            self._epoch.came_empty(came.manifest)
        elif type(came) is FailedBatch:
            if not self._lost_with_worker(came):
                self._pool.sampler.answered(came.manifest.seq)
                raise self._epoch.came_failed(came, self._pool.raised)
        elif self._pool.broken is not None:
            raise error_from(self._pool.broken)
        else:
            raise DeliveryError(
                f"a batch came without a manifest ({type(came).__name__}): something replaced "
                "safeloader's fetcher in the workers. Set SAFELOADER=off to run without records."
            )

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
        pool, epoch = self._pool, self._epoch
        if isinstance(sign, TimedOut):
            pool.timed_out = True
            raise epoch.broke(pool.diagnosis.silence(pool.timeout_s, timeout=True)) from None
        failure = pool.diagnosis.crash(sign.workers)
        at = [pool.diagnosis.location(worker) for worker in sign.workers]
        restarts = self._restarts
        if restarts is not None and restarts.should_restart(
            failure, at, pool.sampler, epoch.restarted
        ):
            pool.replace_workers(restarts.blueprint)
            self._stock = pool.stock
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


def iterate(loader: DataLoader[Any], side: Side) -> SafeIterator:
    """The iterator for the loader's next epoch, as torch's ``DataLoader.__iter__`` chooses it.

    With persistent workers there is one torch iterator in the loader's life. While the checked
    iterator of an earlier epoch is alive, it is that one again, as it would be under torch.
    """
    if not (loader.persistent_workers and loader.num_workers > 0):
        return SafeIterator(loader, side)
    pool, held = side.pool, _torch.kept_iterator(loader)
    # Not there yet, let go of by a framework, or its workers died.
    if pool is None or pool.kept is not held or pool.broken is not None:
        live = SafeIterator(loader, side)
        side.pool = pool = live._pool
    else:
        alive = None if pool.live is None else pool.live()
        if alive is None:
            alive = SafeIterator(loader, side, pool)
        else:
            alive._restart(loader, side)
        live = alive
    if pool.stock is not held:  # new, or the workers were replaced
        pool.kept = pool.stock
        _torch.keep_iterator(loader, pool.stock)
    return live
