"""Every private name of torch that safeloader touches. Runs in: both.

None is relied on before :func:`moved` is asked, at the first ``iter`` of a loader: with
``SAFELOADER=off`` never. When a release of torch moves one of them, torch's own loader serves, and
this is the only module to mend. Nothing here changes torch in the user's process:
:func:`install_fetcher` refuses to run outside a worker.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import importlib
import inspect
import multiprocessing
import operator
import os
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import CodeType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset, get_worker_info

from safeloader import _python

_LOADING = "torch.utils.data.dataloader"
_UTILS = "torch.utils.data._utils"
_WITH_WORKERS = "_MultiProcessingDataLoaderIter"
_NEEDED = {
    "torch": "UntypedStorage._cdata UntypedStorage._expired UntypedStorage._free_weak_ref "
    "UntypedStorage._weak_ref",
    "torch._C": "DisableTorchFunction _len_torch_dispatch_stack _len_torch_function_stack",
    "torch.autograd": "_profiler_enabled",
    _LOADING: "_DatasetKind.create_fetcher _DatasetKind.Iterable "
    "_SingleProcessDataLoaderIter._next_data DataLoader._get_iterator DataLoader._index_sampler "
    f"DataLoader._auto_collation {_WITH_WORKERS}._next_data {_WITH_WORKERS}._reset "
    f"{_WITH_WORKERS}._shutdown_workers {_WITH_WORKERS}._try_get_data _BaseDataLoaderIter",
    f"{_UTILS}.collate": "default_collate_fn_map collate_tensor_fn collate_float_fn "
    "collate_int_fn collate_str_fn collate_numpy_array_fn collate_numpy_scalar_fn",
    f"{_UTILS}.fetch": "_IterableDatasetFetcher.__init__",
    f"{_UTILS}.pin_memory": "pin_memory",
    f"{_UTILS}.signal_handling": "_remove_worker_pids _set_SIGCHLD_handler",
    f"{_UTILS}.worker": "_worker_loop.__code__",
}
# By class: names in its code. What an object will have cannot be seen before there is one.
_IN_CODE = {
    (_LOADING, "DataLoader"): "_iterator num_workers",
    (_LOADING, "_SingleProcessDataLoaderIter"): "_dataset_fetcher _num_yielded _sampler_iter "
    "create_fetcher _index_sampler",
    (_LOADING, _WITH_WORKERS): "_data_queue _index_queues _index_sampler _num_yielded "
    "_pin_memory_thread _sampler_iter _shutdown _task_info _tasks_outstanding _try_put_index "
    "_worker_loop _worker_pids_set _workers _workers_status multiprocessing_context worker_init_fn",
    (f"{_UTILS}.fetch", "_MapDatasetFetcher"): "auto_collation collate_fn dataset drop_last",
    (f"{_UTILS}.fetch", "_IterableDatasetFetcher"): "auto_collation collate_fn dataset_iter",
}
# By function: names that follow each other in its code. Our queues stand where it asks first.
_IN_ORDER = {
    (_LOADING, f"{_WITH_WORKERS}.__init__"): "Queue _worker_result_queue Event _workers_done_event",
    (_LOADING, f"{_WITH_WORKERS}._try_get_data"): "_data_queue get",
    (_LOADING, "DataLoader._get_iterator"): f"_SingleProcessDataLoaderIter {_WITH_WORKERS}",
    (f"{_UTILS}.worker", "_worker_loop"): "init_fn init_fn create_fetcher",
}
_WORKER_TAKES = {"index_queue", "data_queue", "done_event", "init_fn", "worker_id", "num_workers"}


@functools.cache
def moved() -> tuple[str, ...]:
    """What we rely on and this torch does not have, or does in another order; looked at once."""
    missing: list[str] = []
    for module, paths in _NEEDED.items():
        for path in paths.split():
            _python.find(module, path, missing)
    for (module, path), relied_on in _IN_CODE.items():
        cls = _python.find(module, path, missing)
        members = [each for base in inspect.getmro(cls or int) for each in vars(base).values()]
        used = {name for each in members for code in _codes(each) for name in code.co_names}
        missing += [f"{module}.{path}.{name}" for name in relied_on.split() if name not in used]
    for (module, path), first in _IN_ORDER.items():
        order = first.split()
        codes = _codes(_python.find(module, path, []))
        steps = (step.argval for code in codes for step in dis.get_instructions(code))
        # One instruction may name two variables.
        names = (name for step in steps for name in (step if type(step) is tuple else (step,)))
        found = [name for name in names if name in order]
        if found[: len(order)] != order:
            missing.append(f"{module}.{path} (first {', then '.join(order)})")
    loop = _python.find(f"{_UTILS}.worker", "_worker_loop", [])
    if loop is not None and (lost := _WORKER_TAKES - set(inspect.signature(loop).parameters)):
        missing.append(f"{_UTILS}.worker._worker_loop({', '.join(sorted(lost))})")
    return tuple(dict.fromkeys(missing))


def _codes(function: Any, outer: tuple[Any, ...] = ()) -> Iterator[CodeType]:
    """The code of a function, and of those that it wraps: somebody may have put it around."""
    function = getattr(function, "__func__", function)
    if inspect.isfunction(function) and function not in outer:
        yield function.__code__
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty one
                yield from _codes(cell.cell_contents, (*outer, function))


_autograd: Any = torch.autograd
_loading: Any = torch.utils.data.dataloader
_utils: Any = getattr(torch.utils.data, "_utils", None)


def index_sampler(loader: DataLoader[Any]) -> Any:
    """What torch draws from: the batch sampler, or the sampler where batching is off."""
    return loader._index_sampler


def ask_for_iterator(loader: DataLoader[Any]) -> Any:
    """What the loader's class makes of an iterator: torch's hook for subclasses."""
    return loader._get_iterator()


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
        self, loader: DataLoader[Any], sampler: Any, worker_init_fn: Any, channels: Channels | None
    ) -> None:
        if _tells_by_its_dict(loader):
            vars(self).update(vars(loader))  # by `__getattr__` each takes half a microsecond
        self._loader = loader
        self._index_sampler = sampler
        self.worker_init_fn = worker_init_fn
        if channels is not None:
            base, told = loader.multiprocessing_context, loader.num_workers
            self.multiprocessing_context = _Context(base, channels, told)
            if channels.workers is not None:
                self.num_workers = channels.workers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _tells_by_its_dict(loader: Any) -> bool:
    """Whether whoever asks for what its dict has is given that, and nothing in its place."""
    kind: Any = type(loader)
    in_front = _in_front_of_dict(kind)
    return in_front is not None and not vars(loader).keys() & in_front


@functools.lru_cache(64)
def _in_front_of_dict(cls: Any) -> frozenset[str] | None:
    """The names of a class that go before those in the dict of an object; None: any may."""
    if cls.__getattribute__ is not object.__getattribute__:
        return None
    spaces = [vars(each) for each in inspect.getmro(cls)]
    return frozenset(
        name for space in spaces for name, it in space.items() if hasattr(type(it), "__set__")
    )


class Channels(NamedTuple):
    """What stands between torch's iterator and its workers instead of torch's own."""

    results: Any  # in the place of the queue that all workers put their results in
    tasks: Callable[[], Any]  # makes what stands for the queue by which a worker gets its tasks
    ending: Any  # in the place of the event that tells them to end; None: torch's
    # What a worker is given for the arguments that torch has for it; None: those.
    arguments: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None
    workers: int | None = None  # how many to start; None: as many as the loader says


class _Context:
    """A multiprocessing context whose queues, first event and processes are ours.

    Each process is told that it is one of ``told``, of which some may not be started.
    """

    def __init__(self, base: Any, channels: Channels, told: int) -> None:
        self._base = torch.multiprocessing if base is None else base
        self._left = channels  # but for what torch has taken
        self._told = told

    def Queue(self, *args: Any) -> Any:
        ours, self._left = self._left.results, self._left._replace(results=None)
        return self._left.tasks() if ours is None else ours  # torch makes that of results first

    def Event(self) -> Any:
        ours, self._left = self._left.ending, self._left._replace(ending=None)
        return self._base.Event() if ours is None else ours

    def Process(self, *args: Any, **kwargs: Any) -> Any:
        make: Any = self._base.Process
        if self._base.get_start_method() == "fork" and isinstance(make, type):
            make = _of_workers(make)
        if self._left.workers is not None:
            given = list(kwargs["args"])
            given[_place_of("num_workers")] = self._told
            kwargs["args"] = tuple(given)
        arguments = self._left.arguments
        if arguments is not None and "args" in kwargs:
            kwargs["args"] = arguments(kwargs["args"])
        return make(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def _place_of(argument: str) -> int:
    """Where a worker is given it, of its arguments."""
    return list(inspect.signature(_utils.worker._worker_loop).parameters).index(argument)


@functools.cache
def _of_workers(process: Any) -> Any:
    """The class of a process that lists no stacks until :func:`lists_stacks` is called there.

    Before it calls ``worker_init_fn``, torch seeds the devices too, and notes a whole stack beside
    each seed that it keeps for one not in use: an eighth of all that a short-lived worker does.
    """

    def run(self: Any) -> None:
        _limits.append(getattr(sys, "tracebacklimit", None))
        sys.tracebacklimit = 0
        try:
            process.run(self)
        finally:
            lists_stacks()

    its = {"__module__": process.__module__, "__qualname__": process.__qualname__}
    return type(process.__name__, (process,), its | {"run": run})


_limits: list[int | None] = []  # in a worker that is not set up yet, what the program had set


def lists_stacks() -> None:
    """In a worker: list stacks again, as long as the program has them."""
    while _limits:
        limit = _limits.pop()
        if limit is None:
            del sys.tracebacklimit
        else:
            sys.tracebacklimit = limit


def start_method(loader: DataLoader[Any]) -> str:
    """How the loader's workers are started: ``"fork"``, ``"spawn"`` or ``"forkserver"``."""
    return str(_context_of(loader).get_start_method())


def load_for_workers() -> None:
    """Load NumPy's random numbers here, once: each worker would as torch seeds it.

    NumPy loads them on demand, which is most of the start of a forked worker. Nothing is drawn.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("numpy.random")


def worker_class(loader: DataLoader[Any]) -> Any:
    """The class of the loader's worker processes."""
    return _context_of(loader).Process


def _context_of(loader: DataLoader[Any]) -> Any:
    return loader.multiprocessing_context or torch.multiprocessing


# Torch's own, whatever the program puts there later; where there is none, `moved` says so.
_get_iterator: Any = getattr(DataLoader, "_get_iterator", None)
_with_workers: weakref.WeakSet[Any] = weakref.WeakSet()


def build_iterator(view: LoaderView) -> Any:
    """Torch's own iterator over ``view``; starts the workers.

    Torch's own watch over the workers is called off: it raises, on SIGCHLD, in whatever line the
    main thread is at. Whoever waits for a batch notices a worker's death as soon, and can say more.
    """
    if not view.num_workers:
        return _get_iterator(view)
    with _sigchld_deferred():
        try:
            iterator: Any = _get_iterator(view)
        except BaseException as exc:
            _take_down(exc)
            raise
        if not hasattr(iterator, "_workers"):
            return iterator
        if iterator._worker_pids_set:
            _utils.signal_handling._remove_worker_pids(id(iterator))
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
        if isinstance(half, _loading._MultiProcessingDataLoaderIter):
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
    handler: Any = None
    if threading.current_thread() is threading.main_thread() and not _deferred:
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


def listen_through(iterator: Any, make: Callable[..., Any]) -> None:
    """Have an iterator with workers wait for its batches through ``make()``.

    With a pinning thread, ``make`` is given the queue that it fills, and the thread.
    """
    thread = getattr(iterator, "_pin_memory_thread", None)
    iterator._data_queue = make(iterator._data_queue, thread) if thread else make()


def workers_of(iterator: Any) -> list[Any]:
    """The worker processes of an iterator, in order."""
    return list(iterator._workers)


def expects_end_of(iterator: weakref.ref[Any]) -> Callable[[int], bool]:
    """Whether torch told worker ``w`` to end (its stream is at its end), or is gone itself."""

    def expected(worker: int) -> bool:
        alive = iterator()
        return alive is None or alive._shutdown or not alive._workers_status[worker]

    return expected


def task_queues(iterator: Any) -> list[Any]:
    """What an iterator puts its workers' tasks into, in order."""
    return list(iterator._index_queues)


def shut_down(iterator: Any) -> None:
    """End an iterator's workers now, whatever they are at; those of another process never."""
    for worker in iterator._workers:
        worker.kill()
    iterator._shutdown_workers()


def abandon(loader: DataLoader[Any], iterator: Any = None) -> None:
    """Kill the workers of an iterator, or of the one that the loader keeps, and wait for none.

    Processes that a worker forked hold its end of a pipe, for which torch waits five seconds.
    """
    held: Any = kept_iterator(loader) if iterator is None else iterator
    if not hasattr(held, "_workers"):
        return
    if held._worker_pids_set:
        _utils.signal_handling._remove_worker_pids(id(held))
        held._worker_pids_set = False
    held._shutdown = True
    for worker in held._workers:
        worker.kill()


def next_of(iterator: Any) -> Any:
    """``next(iterator)``, without the mark for the profiler while none is running.

    Torch wraps each batch in a ``record_function``: 5 µs a batch, more than all of our records
    take. With a profiler running torch's own ``__next__`` is called and the mark is there.
    """
    if _autograd._profiler_enabled() or iterator._sampler_iter is None:
        return next(iterator)
    data = iterator._next_data()
    iterator._num_yielded += 1
    return data


def _undo_inherited() -> None:
    """In a forked process: see that iterators inherited from the parent are not shut down here.

    The iterator may be in a variable, or kept alive by an exception. Freed here, it would set out
    to stop the workers of the parent, wait for them and end in "can only test a child process".
    """
    for iterator in list(_with_workers):
        iterator._shutdown = True
        iterator._workers = []
    _with_workers.clear()
    if _deferred:  # forked while an iterator was built
        signal.signal(signal.SIGCHLD, _deferred.pop())


_python.at_fork(after_in_child=_undo_inherited)


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


def why_not_asked(cls: type[DataLoader[Any]]) -> str:
    """Why iterating an instance of ``cls`` never comes to torch's ``DataLoader``; empty if it does.

    Told from the names in its code, so nothing of it is run.
    """
    theirs = [each for each in inspect.getmro(cls) if each not in inspect.getmro(DataLoader)]
    for name in ("_get_iterator", "__iter__"):
        owner = next((each for each in inspect.getmro(cls) if name in vars(each)), DataLoader)
        if owner not in theirs:
            continue
        # An endless loader asks in its constructor, and hands out what it got there.
        asking = vars(owner) if name == "__iter__" else {name: vars(owner)[name]}
        used = {word for each in asking.values() for code in _codes(each) for word in _words(code)}
        if not used & ({name} if name == "_get_iterator" else {"__iter__", "_get_iterator"}):
            return f"{owner.__qualname__}.{name} makes its batches itself"
    return ""


def _words(code: CodeType) -> Iterator[str]:
    """The names in a code object and in those nested in it."""
    yield from code.co_names
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _words(each)


def has_thread_workers(loader: DataLoader[Any]) -> bool:
    """Whether what stands for processes there may be threads of this one."""
    context: Any = loader.multiprocessing_context
    if context is None:
        return False
    # MONAI's is a context for `spawn` in all but the class of its workers.
    worker: Any = getattr(context, "Process", None)
    processes = isinstance(worker, type) and issubclass(worker, multiprocessing.process.BaseProcess)
    return not (processes and isinstance(context, multiprocessing.context.BaseContext))


def iterators_in(loader: DataLoader[Any]) -> dict[str, Any]:
    """Iterators of torch's that a loader of another class keeps for itself, by attribute."""
    iterator: Any = _loading._BaseDataLoaderIter
    held = {name: each for name, each in vars(loader).items() if isinstance(each, iterator)}
    held.pop("_iterator", None)
    return held


def handed_over(iterator: Any) -> int:
    """How many batches an iterator of torch's has given."""
    return int(iterator._num_yielded)


def is_under_way(iterator: Any) -> bool:
    """Whether an iterator of persistent workers is in the middle of an epoch."""
    return bool(iterator._task_info) or bool(iterator._tasks_outstanding)


def replace_fetcher(iterator: Any, make: Callable[[Any], Any]) -> None:
    """Put our fetcher around that of an iterator with ``num_workers=0``."""
    iterator._dataset_fetcher = make(iterator._dataset_fetcher)


def raised_by_dataset_iter(exc: BaseException) -> bool:
    """Whether ``exc`` came out of ``iter(dataset)`` while torch made its fetcher."""
    code = _utils.fetch._IterableDatasetFetcher.__init__.__code__
    return any(frame.f_code is code for frame, _ in traceback.walk_tb(exc.__traceback__))


def without_overrides() -> AbstractContextManager[object]:
    """While entered, no ``__torch_function__`` runs in this thread, so tensor subclasses of the
    user's are read as plain tensors."""
    return torch._C.DisableTorchFunction()


def pin_memory(data: Any) -> Any:
    """``data`` with every tensor in pinned memory, as torch's loader does it."""
    return _utils.pin_memory.pin_memory(data)


_SPARSE_PARTS = {
    torch.sparse_coo: "_indices _values",
    torch.sparse_csr: "crow_indices col_indices values",
    torch.sparse_bsr: "crow_indices col_indices values",
    torch.sparse_csc: "ccol_indices row_indices values",
    torch.sparse_bsc: "ccol_indices row_indices values",
}


def parts_of_sparse(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The dense tensors that a sparse one is made of, coalesced or not; none of a dense one."""
    return [getattr(tensor, name)() for name in _SPARSE_PARTS.get(tensor.layout, "").split()]


def store_of_group(group: Any) -> Any:
    """The store that the processes of a group share; None where this torch does not tell."""
    distributed = sys.modules.get("torch.distributed.distributed_c10d")
    of_group = getattr(distributed, "_get_process_group_store", None)
    with contextlib.suppress(Exception):
        return of_group(group) if callable(of_group) else None
    return None


identity_of: Callable[[torch.UntypedStorage], int] = operator.attrgetter("_cdata")
"""The same number for the storages of two tensors that share memory; while one is referred to."""

# Weak references to a storage, as numbers: ``StorageWeakRef``, an object around one, takes five
# times as long. Where torch has no such functions, `moved` says so.
refer_weakly: Any = getattr(torch.UntypedStorage, "_weak_ref", None)
"""A weak reference to a storage; to be given to :data:`forget` once."""
is_gone: Any = getattr(torch.UntypedStorage, "_expired", None)
"""Whether nothing refers to the storage of a weak reference any more."""
forget: Any = getattr(torch.UntypedStorage, "_free_weak_ref", None)
"""Free a weak reference."""


_sent: Any = getattr(torch.multiprocessing.reductions, "shared_cache", {})
_SENT_MAX = 8
_sent_enough = _SENT_MAX


def forget_what_was_sent() -> None:
    """Have torch clear its list of storages sent to processes, of those that are gone; hot path.

    It does so itself when there are more than 128. Up to 2.9 it keeps their Python objects till
    then, and with these the slots that they lie in.
    """
    global _sent_enough
    if len(_sent) > _sent_enough and _sent.lock.acquire(blocking=False):
        try:
            _sent.free_dead_references()
            _sent_enough = max(_SENT_MAX, 2 * len(_sent))  # no look at the living each time
        finally:
            _sent.lock.release()


def collates_as_torch_does() -> bool:
    """Whether ``default_collate`` knows the types that torch has it know, and no more; hot path."""
    return bool(_utils.collate.default_collate_fn_map == _collations())


@functools.cache
def _collations() -> dict[Any, Any]:
    """What torch itself has ``default_collate`` call for each type."""
    collate = _utils.collate
    tensor, text = collate.collate_tensor_fn, collate.collate_str_fn
    scalar = collate.collate_numpy_scalar_fn
    return {
        torch.Tensor: tensor,
        np.ndarray: collate.collate_numpy_array_fn,
        (np.bool_, np.number, np.object_): scalar,
        float: collate.collate_float_fn,
        int: collate.collate_int_fn,
        str: text,
        bytes: text,
    }


def has_own_methods(*datasets: type) -> bool:
    """Whether these datasets of torch's fetch samples by torch's code, and nobody's beside it."""
    for each in datasets:
        for name in ("__getitem__", "__getitems__"):
            method = getattr(each, name, None)
            code = getattr(method, "__code__", None)
            if method is not None and (code is None or code.co_filename != _DATASETS):
                return False
    return True


_DATASETS = Subset.__init__.__code__.co_filename


def makes_batches(dataset: Any) -> Any:
    """What makes a whole batch in one call (``__getitems__``), or None; hot path.

    A ``Subset`` of torch's own hands such a call on, or asks the dataset under it for each sample.
    """
    while (
        type(dataset) is Subset and "__getitems__" not in vars(dataset) and has_own_methods(Subset)
    ):
        dataset = dataset.dataset
    return dataset if getattr(dataset, "__getitems__", None) else None


def calls_are_watched() -> bool:
    """Whether a mode of the user's sees each call of torch; hot path."""
    return bool(torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack())


def stack_tensors_with(stack: Callable[..., Any]) -> None:
    """In a worker process: have ``default_collate`` stack tensors by ``stack(torchs_own, batch)``.

    A function that the user registered for tensors stays.
    """
    if get_worker_info() is None:
        raise RuntimeError("default_collate belongs to the training process here")
    collate = _utils.collate
    torchs = collate.collate_tensor_fn
    if collate.default_collate_fn_map.get(torch.Tensor) is torchs:
        collate.default_collate_fn_map[torch.Tensor] = functools.partial(stack, torchs)


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
    kind = _loading._DatasetKind
    stock_create: Any = kind.create_fetcher
    worker_loop = _utils.worker._worker_loop.__code__

    def create_fetcher(*args: Any, **kwargs: Any) -> Any:
        create = functools.partial(stock_create, *args, **kwargs)
        return make(create) if sys._getframe(1).f_code is worker_loop else create()

    kind.create_fetcher = staticmethod(create_fetcher)
