"""Every private name of torch that safeloader touches, checked at import; runs in both processes.

When a release of torch moves one of them, the import fails here with the names that are missing,
and this is the only module to mend. Nothing here changes torch in the user's process:
:func:`install_fetcher` refuses to run outside a worker.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import os
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

_NEEDED = {
    "torch": ("UntypedStorage._cdata", "UntypedStorage._expired"),
    "torch._C": ("DisableTorchFunction",),
    "torch.autograd": ("_profiler_enabled",),
    "torch.utils.data.dataloader": (
        "_DatasetKind.create_fetcher",
        "_DatasetKind.Iterable",
        "_SingleProcessDataLoaderIter._next_data",
        "_MultiProcessingDataLoaderIter._next_data",
        "_MultiProcessingDataLoaderIter._reset",
        "_MultiProcessingDataLoaderIter._shutdown_workers",
        "_MultiProcessingDataLoaderIter._try_get_data",
        "DataLoader._get_iterator",
        "DataLoader._index_sampler",
        "DataLoader._auto_collation",
    ),
    "torch.utils.data._utils.collate": ("default_collate_fn_map", "collate_tensor_fn"),
    "torch.utils.data._utils.fetch": ("_IterableDatasetFetcher.__init__",),
    "torch.utils.data._utils.pin_memory": ("pin_memory",),
    "torch.utils.data._utils.signal_handling": ("_remove_worker_pids", "_set_SIGCHLD_handler"),
    "torch.utils.data._utils.worker": ("_worker_loop.__code__",),
}


def _check() -> None:
    missing = []
    for module_name, paths in _NEEDED.items():
        for path in paths:
            try:
                found: Any = importlib.import_module(module_name)
                for part in path.split("."):
                    found = getattr(found, part)
            except (ImportError, AttributeError):
                missing.append(f"{module_name}.{path}")
    if missing:
        raise ImportError(
            f"safeloader does not know torch {torch.__version__}: it has no {', '.join(missing)}. "
            "Use a torch that this release of safeloader supports (see its CHANGELOG), upgrade "
            "safeloader, or go back to torch.utils.data.DataLoader for now."
        )


_check()

from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]  # noqa: E402
from torch.utils.data import _utils  # noqa: E402  (after the check, which explains a failure)
from torch.utils.data.dataloader import (  # noqa: E402
    _DatasetKind,
    _MultiProcessingDataLoaderIter,
)


def is_stream(loader: DataLoader[Any]) -> bool:
    """Whether the loader's dataset is iterable-style."""
    return isinstance(loader.dataset, IterableDataset)


def index_sampler(loader: DataLoader[Any]) -> Any:
    """What torch draws from: the batch sampler, or the sampler where batching is off."""
    return loader._index_sampler


def batches_itself(loader: DataLoader[Any]) -> bool:
    """Whether the loader collates samples into batches (``batch_size`` is not None)."""
    return bool(loader._auto_collation)


class LoaderView:
    """What torch's iterator is built on: the loader, but for the few things of ours.

    It exists while an iterator is built or reset and no longer, so that the iterator never holds
    the loader: with persistent workers the loader holds the iterator, and a cycle would keep the
    workers alive until the garbage collector comes by.
    """

    def __init__(
        self, loader: DataLoader[Any], sampler: Any, worker_init_fn: Any, wiring: Wiring | None
    ) -> None:
        self._loader = loader
        self._index_sampler = sampler
        self.worker_init_fn = worker_init_fn
        if wiring is not None:
            self.multiprocessing_context = _Context(loader.multiprocessing_context, wiring)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class Wiring(NamedTuple):
    """What stands between torch's iterator and its workers instead of torch's own."""

    results: Any  # in the place of the queue that all workers put their results in
    tasks: Callable[[], Any]  # makes what stands for the queue by which a worker gets its tasks
    ending: Any  # in the place of the event that tells them to end; None: torch's


class _Context:
    """A multiprocessing context whose queues and first event are ours."""

    def __init__(self, base: Any, wiring: Wiring) -> None:
        self._base = torch.multiprocessing if base is None else base
        self._results: Any = wiring.results
        self._tasks = wiring.tasks
        self._ending: Any = wiring.ending

    def Queue(self, *args: Any) -> Any:
        ours, self._results = self._results, None  # torch makes it first
        return self._tasks() if ours is None else ours

    def Event(self) -> Any:
        ours, self._ending = self._ending, None
        return self._base.Event() if ours is None else ours

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def start_method(loader: DataLoader[Any]) -> str:
    """How the loader's workers are started: ``"fork"``, ``"spawn"`` or ``"forkserver"``."""
    context: Any = loader.multiprocessing_context or torch.multiprocessing
    return str(context.get_start_method())


_with_workers: weakref.WeakSet[Any] = weakref.WeakSet()


def build_iterator(view: LoaderView) -> Any:
    """Torch's own iterator over ``view``; starts the workers.

    Torch's own watch over the workers is called off: it raises, on SIGCHLD, in whatever line the
    main thread is at. Whoever waits for a batch notices a worker's death as soon, and can say more.
    """
    with _sigchld_deferred():
        try:
            iterator: Any = DataLoader._get_iterator(view)  # type: ignore[arg-type]
        except BaseException as exc:
            _take_down(exc)
            raise
        if not hasattr(iterator, "_workers"):
            return iterator
        if iterator._worker_pids_set:
            forget: Any = _utils.signal_handling._remove_worker_pids  # type: ignore[attr-defined]
            forget(id(iterator))
            iterator._worker_pids_set = False
    _with_workers.add(iterator)
    stop = weakref.finalize(iterator, _stop_unreachable, iterator._workers, os.getpid())
    stop.atexit = False  # at exit, daemonic workers end as torch has it
    return iterator


def _take_down(raised: BaseException) -> None:
    """End what torch's constructor had started before it raised.

    Its own ``__del__`` falls over what a half made iterator has not got yet, and says so.
    """
    for frame, _ in traceback.walk_tb(raised.__traceback__):
        half = frame.f_locals.get("self")
        if isinstance(half, _MultiProcessingDataLoaderIter):
            if hasattr(half, "_workers"):
                half.__dict__.setdefault("_workers_status", [True] * len(half._workers))
                shut_down(half)
            half._shutdown = True
            return


_deferred: list[Any] = []  # the handler of SIGCHLD while an iterator is built


@contextlib.contextmanager
def _sigchld_deferred() -> Iterator[None]:
    """Have the handler of SIGCHLD run after this block instead of within.

    A worker that dies at once would have torch's handler raise in the middle of its constructor,
    which leaves nothing to find out by whom and at which sample.
    """
    if threading.current_thread() is not threading.main_thread() or _deferred:
        yield
        return
    _utils.signal_handling._set_SIGCHLD_handler()  # as the constructor does; once in a process
    handler = signal.getsignal(signal.SIGCHLD)
    if not callable(handler):
        yield
        return
    came: list[tuple[int, Any]] = []
    signal.signal(signal.SIGCHLD, lambda number, frame: came.append((number, None)))
    _deferred.append(handler)
    try:
        yield
    finally:
        _deferred.clear()
        signal.signal(signal.SIGCHLD, handler)
        if came:
            handler(*came[-1])


def listen_through(iterator: Any, make: Callable[[Any, Any], Any]) -> None:
    """Have an iterator with workers wait for its batches through ``make(queue, thread)``.

    ``queue`` and ``thread`` are those of the pinning thread, or None.
    """
    pinning = getattr(iterator, "_pin_memory_thread", None)
    iterator._data_queue = make(iterator._data_queue if pinning else None, pinning)


def workers_of(iterator: Any) -> list[Any]:
    """The worker processes of an iterator, in order."""
    return iterator._workers  # type: ignore[no-any-return]


def expects_end_of(iterator: weakref.ref[Any]) -> Callable[[int], bool]:
    """Whether torch told worker ``w`` to end (its stream is at its end), or is gone itself."""

    def expected(worker: int) -> bool:
        alive = iterator()
        return alive is None or alive._shutdown or not alive._workers_status[worker]

    return expected


def shut_down(iterator: Any) -> None:
    """End an iterator's workers now, whatever they are at."""
    for worker in iterator._workers:
        worker.kill()
    iterator._shutdown_workers()


def next_of(iterator: Any) -> Any:
    """``next(iterator)``, without the mark for the profiler while none is running.

    Torch wraps each batch in a ``record_function``: 5 µs a batch, more than all of our records
    take. With a profiler running torch's own ``__next__`` is called and the mark is there.
    """
    if _profiler_enabled() or iterator._sampler_iter is None:
        return next(iterator)
    data = iterator._next_data()
    iterator._num_yielded += 1
    return data


def undo_inherited() -> None:
    """In a worker: see that iterators inherited by ``fork`` are not shut down from here.

    An iterator that an exception keeps alive in the training process is copied into the workers
    started after it. Freed there, it would set out to stop the workers of the training process,
    wait for them and end in "can only test a child process".
    """
    for iterator in list(_with_workers):
        iterator._shutdown = True
    if _deferred:  # forked while an iterator was built
        signal.signal(signal.SIGCHLD, _deferred.pop())


def _stop_unreachable(workers: list[Any], pid: int) -> None:
    """Stop the workers of an iterator that the garbage collector is about to free.

    In a cycle (an exception that somebody kept) its queues are closed before torch's ``__del__``
    runs, whose "stop" then reaches no worker: it waits five seconds for each and ends them this
    way. Freed otherwise, the iterator has ended its workers before this is called.
    """
    if os.getpid() == pid:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()


def reset_iterator(iterator: Any, view: LoaderView) -> None:
    """Start the next epoch on an iterator with persistent workers."""
    iterator._reset(view)


def kept_iterator(loader: DataLoader[Any]) -> Any:
    """The iterator that a loader with persistent workers holds, or None."""
    return loader.__dict__.get("_iterator")


def keep_iterator(loader: DataLoader[Any], iterator: Any) -> None:
    """Have the loader hold ``iterator``, where torch and the frameworks look for it."""
    loader._iterator = iterator


def replace_fetcher(iterator: Any, make: Callable[[Any], Any]) -> None:
    """Put our fetcher around that of an iterator with ``num_workers=0``."""
    iterator._dataset_fetcher = make(iterator._dataset_fetcher)


def raised_by_dataset_iter(exc: BaseException) -> bool:
    """Whether ``exc`` came out of ``iter(dataset)`` while torch made its fetcher."""
    code = _utils.fetch._IterableDatasetFetcher.__init__.__code__
    traceback = exc.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code is code:
            return True
        traceback = traceback.tb_next
    return False


def without_overrides() -> AbstractContextManager[object]:
    """While entered, no ``__torch_function__`` runs in this thread, so tensor subclasses of the
    user's are read as plain tensors."""
    return torch._C.DisableTorchFunction()


def pin_memory(data: Any) -> Any:
    """``data`` with every tensor in pinned memory, as torch's loader does it."""
    pin: Any = _utils.pin_memory.pin_memory
    return pin(data)


identity_of: Callable[[torch.UntypedStorage], int] = operator.attrgetter("_cdata")
"""The same number for the storages of two tensors that share memory; while one is referred to."""

_untyped: Any = torch.UntypedStorage
is_gone: Callable[[int], bool] = _untyped._expired
"""Whether nothing refers to a storage any more, by the ``cdata`` of a weak reference to it."""


_collated_by: dict[Any, Any] = _utils.collate.default_collate_fn_map
_stack_tensors: Any = _utils.collate.collate_tensor_fn


def collates_tuples_of_tensors_itself() -> bool:
    """Whether ``default_collate`` does with tuples and tensors what torch has it do; hot path."""
    return _collated_by.get(torch.Tensor) is _stack_tensors and tuple not in _collated_by


def stack_tensors_with(stack: Callable[..., Any]) -> None:
    """In a worker process: have ``default_collate`` stack tensors by ``stack(torchs_own, batch)``.

    A function that the user registered for tensors stays.
    """
    if get_worker_info() is None:
        raise RuntimeError("default_collate belongs to the training process here")
    if _collated_by.get(torch.Tensor) is _stack_tensors:
        _collated_by[torch.Tensor] = functools.partial(stack, _stack_tensors)


def install_fetcher(make: Callable[[Callable[[], Any]], Any]) -> None:
    """In a worker process: have torch use ``make(create)`` as fetcher of the loader's dataset.

    ``create()`` makes torch's own. Torch's worker loop asks for a fetcher at its start and, with
    persistent workers, at the start of each later epoch. Loaders that the dataset may use in this
    process ask too, perhaps over the same dataset: they keep torch's fetcher.

    Raises:
        RuntimeError: outside a worker process. Workers that are threads share torch with the
            training loop and are not supported.
    """
    info = get_worker_info()
    if info is None or getattr(info, "worker_method", "multiprocessing") != "multiprocessing":
        raise RuntimeError(
            "safeloader records in worker processes only, and this torch runs the workers of this "
            "loader as threads. Use process workers, or set SAFELOADER=off to run without records."
        )
    stock_create: Any = _DatasetKind.create_fetcher
    worker_loop = _utils.worker._worker_loop.__code__

    def create_fetcher(*args: Any, **kwargs: Any) -> Any:
        create = functools.partial(stock_create, *args, **kwargs)
        return make(create) if sys._getframe(1).f_code is worker_loop else create()

    _DatasetKind.create_fetcher = staticmethod(create_fetcher)  # type: ignore[method-assign]
