"""One stock iterator, every batch checked; runs in main.

Takes :class:`Parcel` and :class:`FailedBatch` from torch's iterator, gives batches to the training
loop and raises what went wrong. It must not hold the loader: with persistent workers the loader
holds torch's iterator, and a cycle would keep workers alive until the garbage collector comes by.
"""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from time import perf_counter_ns as clock
from typing import TYPE_CHECKING, Any, NoReturn

from safeloader import torch_private
from safeloader.errors import DeliveryError
from safeloader.main.drawing import RecordingSampler
from safeloader.main.epoch import Epoch
from safeloader.main.ledger import MapLedger
from safeloader.main.stream_ledger import StreamLedger
from safeloader.tracing import trace_for
from safeloader.wire.failure import error_from, failure_of
from safeloader.wire.random_state import preserved
from safeloader.wire.records import FailedBatch, Parcel
from safeloader.wire.streams import StreamBoard
from safeloader.worker.fetching import Post, fetcher_for
from safeloader.worker.startup import WorkerStartup

logger = logging.getLogger("safeloader")

if TYPE_CHECKING:
    from safeloader.loader import SafeDataLoader


class Session:
    """One torch iterator in its life, with the parts of ours that are built into it.

    With persistent workers it serves one epoch after the other, and the loader holds it beside
    torch's iterator; otherwise it belongs to its :class:`SafeIterator`.
    """

    def __init__(self, loader: SafeDataLoader[Any], epoch: Epoch) -> None:
        self.board = _board_for(loader)
        self.raised: list[BaseException] = []
        self.sampler = RecordingSampler(
            torch_private.index_sampler(loader),
            batched=torch_private.batches_itself(loader),
            stream=torch_private.is_stream(loader),
        )
        self._startup = WorkerStartup(loader.worker_init_fn, self.board, loader.key)
        self.live: weakref.ref[SafeIterator] | None = None
        self.open_ledger(loader, epoch)
        self.stock = self._build(loader, epoch)

    def _view(self, loader: SafeDataLoader[Any]) -> torch_private.LoaderView:
        return torch_private.LoaderView(loader, self.sampler, self._startup)

    def _build(self, loader: SafeDataLoader[Any], epoch: Epoch) -> Any:
        view = self._view(loader)
        if loader.num_workers:
            return torch_private.build_iterator(view)
        try:
            stock = torch_private.build_iterator(view)
        except Exception as exc:
            if not torch_private.raised_by_dataset_iter(exc):
                raise
            failure = failure_of(exc, phase="sample", where="", epoch=epoch.number)
            raise error_from(failure, exc) from None
        post = Post(None, self.board, loader.key, None, self.raised)
        torch_private.replace_fetcher(stock, lambda fetcher: fetcher_for(fetcher, post))
        return stock

    def open_ledger(self, loader: SafeDataLoader[Any], epoch: Epoch) -> None:
        """Have the draws reported to ``epoch``, in a ledger of the dataset's kind."""
        with_keys = loader.key is not None
        if torch_private.is_stream(loader):
            workers = max(loader.num_workers, 1)
            epoch.open(StreamLedger(with_keys=with_keys, board=self.board, workers=workers))
        else:
            # Workers draw ahead, so the sampler's end is known when the last batch comes. Without
            # workers only its length tells: asking the sampler would move its generator.
            drawn_from = torch_private.index_sampler(loader)
            length = None if loader.num_workers else functools.partial(_length_of, drawn_from)
            epoch.open(MapLedger(with_keys=with_keys, expected_batches=length))
        self.sampler.log = epoch

    def restart(self, loader: SafeDataLoader[Any], epoch: Epoch) -> None:
        """The next epoch on the same workers."""
        self.open_ledger(loader, epoch)
        torch_private.reset_iterator(self.stock, self._view(loader))


class SafeIterator(Iterator[Any]):
    """What ``iter(loader)`` returns: torch's iterator, with a ledger.

    Attributes of torch's iterator (``_workers``, ``_index_queues``, ...) answer here too.
    """

    def __init__(self, loader: SafeDataLoader[Any], session: Session | None = None) -> None:
        self._recorder = loader._recorder_on_demand()
        self._epoch = self._begin(loader)
        if session is None:
            session = Session(loader, self._epoch)
        else:
            session.restart(loader, self._epoch)
        self._session = session
        self._stock = session.stock
        # A stream's __next__ also warns about its length: that stays torch's.
        stream = torch_private.is_stream(loader)
        self._advance: Callable[[Any], Any] = next if stream else torch_private.next_of
        session.live = weakref.ref(self)

    def _begin(self, loader: SafeDataLoader[Any]) -> Epoch:
        trace = trace_for(self._recorder, loader.trace)
        epoch = Epoch(trace, loader.verify, loader.dataset)
        epoch.number = self._recorder.begin_epoch(epoch.audit)
        return epoch

    def _restart(self, loader: SafeDataLoader[Any]) -> None:
        self._epoch.close()
        self._epoch.release()
        self._recorder = loader._recorder_on_demand()
        self._epoch = self._begin(loader)
        self._session.restart(loader, self._epoch)

    def __iter__(self) -> SafeIterator:
        return self

    def __next__(self) -> Any:
        """The next batch; hot path.

        Raises:
            SafeLoaderError: for what went wrong with this batch; ``next()`` may be called again.
            StopIteration: at the end of the epoch.
        """
        began = clock()
        try:
            came = self._advance(self._stock)
        except StopIteration:
            self._epoch.ended()
            raise
        if type(came) is Parcel:
            papers, payload = came
            wait_ns = clock() - began
            epoch = self._epoch
            number = epoch.arrived(papers, began, wait_ns)
            self._recorder.delivered(epoch.number, number, wait_ns, papers)
            return payload
        if type(came) is FailedBatch:
            raise self._epoch.came_failed(came, self._session.raised)
        raise DeliveryError(
            f"a batch came without papers ({type(came).__name__}): something replaced safeloader's "
            "fetcher in the workers. Set SAFELOADER=off to run without records."
        )

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
            except Exception:  # at interpreter exit anything may be gone already
                return


def iterate(loader: SafeDataLoader[Any]) -> SafeIterator:
    """The iterator for the loader's next epoch, as torch's ``DataLoader.__iter__`` chooses it.

    With persistent workers there is one torch iterator in the loader's life. While the checked
    iterator of an earlier epoch is alive, it is that one again, as it would be under torch.
    """
    if not (loader.persistent_workers and loader.num_workers > 0):
        return SafeIterator(loader)
    session = loader._session
    stock = torch_private.kept_iterator(loader)
    if session is None or session.stock is not stock:  # the first, or a framework let go of it
        made = SafeIterator(loader)
        loader._session = made._session
        torch_private.keep_iterator(loader, made._stock)
        return made
    live = None if session.live is None else session.live()
    if live is None:
        return SafeIterator(loader, session)
    live._restart(loader)
    return live


def _board_for(loader: SafeDataLoader[Any]) -> StreamBoard | None:
    """Shared memory for the streams' lengths; without it (none to be had) they go unchecked."""
    if not torch_private.is_stream(loader):
        return None
    try:
        return StreamBoard(max(loader.num_workers, 1), shared=loader.num_workers > 0)
    except OSError as exc:
        logger.warning("the ends of the streams cannot be checked: no shared memory (%s)", exc)
        return None


def _length_of(sampler: Any) -> int | None:
    try:
        with preserved():
            return len(sampler)
    except Exception:  # a sampler without a length, or one that raises
        return None
