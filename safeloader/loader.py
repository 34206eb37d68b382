"""``SafeDataLoader``: what the user holds. Runs in: main.

The class adds a few keywords, each a public attribute of the same name, and overrides ``__iter__``
and torch's hook below it, ``_get_iterator``. Everything else is torch's. Frameworks re-create
loaders from their attributes and signatures, copy their ``__dict__`` and look at ``_iterator``;
the rules that make ours survive it are in ``tests/frameworks/``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from multiprocessing.context import BaseContext
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from safeloader import _python, _torch
from safeloader.epochs import CountedEpochs, why_not_seedable
from safeloader.errors import SafeLoaderError
from safeloader.failures.failure import Failure
from safeloader.failures.loader_log import LoaderLog, guarded
from safeloader.introspect.callers import calling_line
from safeloader.introspect.seeds import SeedPer
from safeloader.introspect.texts import bounded_text
from safeloader.provenance.recorder import Recorder, failure_was_told, watch_for_use
from safeloader.records import Records
from safeloader.settings import (
    KEPT,
    SAID,
    Check,
    Keywords,
    OnCrash,
    OnError,
    Settings,
    Transport,
    Unasked,
    Verify,
    is_off,
)

_public_names_moved: list[str] = []
try:
    from safeloader.main.iterator import iterate
except (ImportError, AttributeError) as exc:  # nothing that SAFELOADER=off needs
    _public_names_moved.append(str(exc))

if TYPE_CHECKING:
    from safeloader.main.worker_pool import WorkerPool

T_co = TypeVar("T_co", covariant=True)


class SafeDataLoader(DataLoader[T_co], Records, CountedEpochs, Keywords):
    """A ``torch.utils.data.DataLoader`` that knows which sample, where, when and by whom.

    Takes every argument of ``DataLoader``, positional or by keyword, and gives the same batches in
    the same order with the same use of random numbers.

    Args:
        dataset: as for ``DataLoader``.
        args: further arguments of ``DataLoader``.
        verify: what happens when what was delivered is not what was drawn: ``"raise"`` a
            :class:`~safeloader.DeliveryError`, ``"warn"``, or ``"off"``.
        trace: None asks the environment variable ``SAFELOADER_TRACE``; False; True logs a line per
            event; a folder gets a Chrome trace file that Perfetto opens.
        recorder: the notebook to write in; made on demand. Two loaders may share one.
        key: called with each sample, before collation and in the worker; gives a hashable identity.
            Two indices that yield one sample, or two workers that read one stream, are then seen.
            The first two million keys of an epoch are kept and compared.
        validate: a check, or a list of them, that each sample is to pass before collation: called
            with ``(sample, index)`` where it was fetched. What it raises is that sample's failure,
            a :class:`~safeloader.ValidationError`. See :mod:`safeloader.checks`.
        on_error: what a sample that fails does: ``"raise"``; ``"skip"`` leaves it out of its batch
            (an empty batch is left out whole); ``"replace"`` puts another sample of the batch in
            its place, or for a batch that fails whole an index drawn shortly before it in the
            epoch, so that shapes, counts and distributed ranks stay in step (where none comes, or
            in a stream, which cannot be asked again, the error is raised); or a callable,
            asked in the worker with the :class:`~safeloader.Failure` (which has no batch and epoch
            yet), that gives a sample or :data:`~safeloader.SKIP`. Errors of a broken program or
            machine are always raised.
        retries: how often a failing sample is asked for again first, with growing pauses (0.05 s,
            doubled each time up to 5 s).
        max_skipped: bound on skipped and replaced samples in an epoch: a count, or a fraction of
            the samples so far. By default one in a hundred; ten are allowed under any fraction.
            Twenty in a row are too many in any case, unless ``on_error`` is a callable.
        on_crash: what a worker's death does: ``"raise"``, or ``"restart"``: a new pool of workers
            goes on with the batches still open, in their order. A sample that kills its worker
            twice in a row is left out; after ten restarts in an epoch the error is raised.
        stall_after: seconds without a batch after which it is logged where each worker is, with
            the stacks of those that are stuck, and again at doubling intervals; 0: never.
        on_failure_dump: a folder in which each failure is written as a JSON file; of those that end
            no batch, skipped and replaced samples, the first hundred of an epoch.
        transport: how batches cross from the workers: ``"auto"``, by shared memory that is written
            again and again on systems that have it (Linux), and torch's own way elsewhere;
            ``"torch"``, always torch's own way.
        checksum: whether workers fingerprint every leaf of a batch, to be compared with what is
            handed over. What differs is a :class:`~safeloader.TransportError`. With
            ``num_workers=0`` there is nothing to compare.
        seed: an int, 0 or more, that all random numbers of an epoch are made from, with the count
            of epochs (see ``set_epoch``): the order of torch's own samplers, and what is drawn
            from the default generators of Python, NumPy and torch (CPU) where samples and batches
            are made. Batches are then bit for bit the same on any number of workers, none
            included, and after a worker's restart, if the dataset draws from these generators or
            :func:`~safeloader.sample_rng` alone; those of the main process stay where they are.
            None: as torch has it.
        seed_per: ``"sample"`` seeds them for each sample, from seed, epoch and index (a sample is
            then the same at any batch size and on any rank; an index drawn twice in an epoch is the
            same sample twice), and once more for collation; ``"batch"`` for each batch, from seed,
            epoch, rank and the number of the batch: less than a tenth of the cost.
        run_dir: the folder of a run, into which every epoch is written while it runs: which samples
            each batch had, when and by whom, audits, failures, what the workers used. Ranks,
            further loaders and later attempts of one run share it, and it can be read at any time,
            also after ``kill -9``. None asks the environment variable ``SAFELOADER_RUN``; False:
            nothing is written. Needs pyarrow (``pip install 'safeloader[run]'``).
        run_max_bytes: bound on what this process keeps of its batches in the run's folder, in
            bytes, from 1 MiB on; the oldest go first. None: no bound. (A batch of 64 takes 850
            bytes while it is new, and some 300 later.)
        run_sources: whether it is stored where every sample comes from, once a run, and not only of
            those that failed, were left out or are the slowest.
        kwargs: further keywords of ``DataLoader``.

    Attributes:
        recorder: the :class:`~safeloader.Recorder` that the three properties below read from.

    Raises:
        ValueError: for a value that is not among those above, a folder that cannot be written to,
            ``on_crash="restart"`` with an iterable dataset, ``seed`` together with ``generator``
            (of the loader or of its sampler), or, for each sample, with a dataset whose
            ``__getitems__`` makes batches in one call.
        TypeError: for a ``key`` that cannot be called, a ``trace`` or ``recorder`` of another kind.
        ImportError: for ``run_dir`` where pyarrow is missing.

    Iterating raises the subclasses of :class:`~safeloader.SafeLoaderError`.

    Example:
        >>> import torch
        >>> from safeloader import SafeDataLoader
        >>> loader = SafeDataLoader(torch.arange(6), batch_size=4)
        >>> for batch in loader:
        ...     print(batch.tolist(), loader.last_batch.indices)
        [0, 1, 2, 3] (0, 1, 2, 3)
        [4, 5] (4, 5)
        >>> print(loader.audit)
        epoch 0: complete, ok; 6 drawn, 6 delivered
    """

    # Defaults at class level: some frameworks make loaders on which __init__ never runs.
    _pool: WorkerPool | None = None  # that of persistent workers, beside torch's iterator

    if TYPE_CHECKING:  # all that is taken, for type checkers and editors

        def __init__(
            self,
            dataset: Dataset[T_co],
            batch_size: int | None = 1,
            shuffle: bool | None = None,
            sampler: Sampler[Any] | Iterable[Any] | None = None,
            batch_sampler: Sampler[Sequence[Any]] | Iterable[Sequence[Any]] | None = None,
            num_workers: int = 0,
            collate_fn: Callable[[list[Any]], Any] | None = None,
            pin_memory: bool = False,
            drop_last: bool = False,
            timeout: float = 0,
            worker_init_fn: Callable[[int], None] | None = None,
            multiprocessing_context: str | BaseContext | None = None,
            generator: torch.Generator | None = None,
            *,
            prefetch_factor: int | None = None,
            persistent_workers: bool = False,
            pin_memory_device: str = "",
            in_order: bool = True,
            verify: Verify = ...,
            trace: bool | str | os.PathLike[str] | None = None,
            recorder: Recorder | None = None,
            key: Callable[[Any], Hashable] | None = None,
            validate: Check | Sequence[Check] | None = None,
            on_error: OnError | Callable[[Failure], Any] = "raise",
            retries: int = 0,
            max_skipped: int | float | None = None,
            on_crash: OnCrash = "raise",
            stall_after: float = 60.0,
            on_failure_dump: str | os.PathLike[str] | None = None,
            transport: Transport = "auto",
            checksum: bool = False,
            seed: int | None = None,
            seed_per: SeedPer = "sample",
            run_dir: bool | str | os.PathLike[str] | None = None,
            run_max_bytes: int | None = None,
            run_sources: bool = False,
        ) -> None: ...

    else:  # its signature is spelled out below, as frameworks need it that read and hand on

        def __init__(self, dataset: Dataset[T_co], *args: Any, **kwargs: Any) -> None:
            before = vars(self)  # by a class that `instrument` made
            given = {name: before[name] for name in KEYWORDS if name in before}
            given |= {name: kwargs.pop(name) for name in KEYWORDS if name in kwargs}
            settings = checked(given, dataset)
            super().__init__(dataset, *args, **kwargs)
            refuse_unseedable(self, settings)
            for name in KEYWORDS:
                setattr(self, name, getattr(settings, name))
            if self.recorder is None:
                self._recorder_on_demand()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show our keywords in the signature of a subclass that hands ``**kwargs`` on.

        Lightning reads signatures to re-create a loader and would lose them.
        """
        super().__init_subclass__(**kwargs)
        init = cls.__dict__.get("__init__")
        if init is not None and not hasattr(init, "__signature__"):
            _spell_out_keywords(init)

    def _recorder_on_demand(self) -> Recorder:
        if self.recorder is None:
            self.recorder = Recorder()
            log = functools.partial(LoaderLog, self.dataset)
            with guarded("the watch for loaders that are never used", log):
                watch_for_use(self.recorder, calling_line())
            # Lightning re-creates a loader made in one of its hooks from the arguments that it saw
            # the user give. With the recorder among them, the user's own loader still answers.
            typed = self.__dict__.get("__pl_saved_kwargs")
            takes = inspect.signature(type(self).__init__).parameters
            if isinstance(typed, dict) and "recorder" in takes:
                typed.setdefault("recorder", self.recorder)
        return self.recorder

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # an iterator of ours
        """The next epoch: an iterator that checks every batch it hands over."""
        if _unrecorded(self):
            if self._pool is not None:  # its workers speak in messages of ours
                self._pool = self._iterator = None
            return super().__iter__()
        return cast(Iterator[Any], self._get_iterator())

    def __len__(self) -> int:
        """The number of batches, as torch has it; noted, to be compared with what comes."""
        said = self.__dict__[SAID] = super().__len__()
        return said

    def _get_iterator(self) -> Any:
        # Torch's hook for subclasses; some code asks for a fresh iterator this way.
        if _unrecorded(self):
            return super()._get_iterator()
        self._recorder_on_demand()
        return iterate(self, self)

    def __getstate__(self) -> dict[str, Any]:
        """The state without worker processes: a copy starts its own."""
        state = self.__dict__ | {"_pool": None, "_iterator": None}
        for name in (SAID, KEPT):
            state.pop(name, None)
        return state


def _unrecorded(loader: SafeDataLoader[Any]) -> bool:
    """Whether torch's own iterator serves ``loader``: it is to, or nothing else can.

    Raises:
        SafeLoaderError: if ``verify="raise"`` or ``seed=`` was asked for, which cannot be had here.
    """
    if is_off():
        return True
    why = why_unrecorded(loader.num_workers > 0)
    if not why:
        return False
    if loader.seed is not None:
        raise SafeLoaderError(
            f"seed= was asked for, and random numbers cannot be made from it here: {why}. Leave "
            "seed out, or set SAFELOADER=off, to have torch's own loader and its random numbers"
        )
    if loader.verify == "raise" and not isinstance(loader.verify, Unasked):
        raise SafeLoaderError(
            f"verify='raise' was asked for, and nothing can be verified: {why}. Leave verify out, "
            "or set SAFELOADER=off, to have torch's own loader and no records"
        )
    failure_was_told()  # the notebook stays blank, and it is known why
    _warn_once(why)
    return True


@functools.cache
def why_unrecorded(workers: bool) -> str:
    """What stands in the way of records; nothing if nothing does."""
    moved = _torch.moved() + tuple(_public_names_moved)
    if moved:
        return (
            f"safeloader does not know torch {torch.__version__}, which lacks {', '.join(moved)}. "
            "Upgrade safeloader, or use a torch that this release supports (see its CHANGELOG)"
        )
    if _python.runs_threads_at_once():
        return (
            f"safeloader is not tested with a Python that runs without its global lock (this is "
            f"{sys.version.split()[0]}, a free-threaded build). Start it with PYTHON_GIL=1 in the "
            "environment to have records"
        )
    if workers and (missing := _python.missing()):
        return (
            f"safeloader cannot follow worker processes with Python {sys.version.split()[0]} on "
            f"{sys.platform}, which lacks {', '.join(missing)}. num_workers=0 is recorded"
        )
    return ""


@functools.cache
def _warn_once(why: str) -> None:
    warnings.warn(
        f"{why}. Meanwhile torch's own loader serves, and nothing is recorded or checked: "
        "last_batch and audit are None",
        stacklevel=4,
    )


def recorder_of(loader: SafeDataLoader[Any]) -> Recorder:
    """The notebook of a loader, made on demand."""
    return loader._recorder_on_demand()


def checked(given: dict[str, Any], dataset: object) -> Settings:
    """Settings of the keywords given, the others by default.

    Raises:
        TypeError: for a value of another kind than is taken.
        ValueError: for a value out of range, or a folder that cannot be written to.
    """
    settings = Settings(**given)
    settings.refuse_bad(dataset)
    if not isinstance(settings.recorder, Recorder | None):
        raise TypeError(
            "recorder must be a safeloader.Recorder, or None to have one made; got "
            f"{bounded_text(settings.recorder)}"
        )
    return settings


def refuse_unseedable(
    loader: DataLoader[Any], settings: Settings, *, made_by_user: bool = True
) -> None:
    """See that what ``seed=`` promises can be kept; ``made_by_user``: whether its sampler is.

    Raises:
        ValueError: if it cannot.
    """
    if settings.seed is None or is_off():
        return
    if why := why_not_seedable(loader, settings.seed_per, made_by_user=made_by_user):
        raise ValueError(why)


def with_our_keywords(signature: inspect.Signature) -> inspect.Signature:
    """A signature that has each of our keywords too."""
    parameters = list(signature.parameters.values())
    rest = [each for each in parameters if each.kind is inspect.Parameter.VAR_KEYWORD]
    first = [each for each in parameters if each not in rest]
    missing = [each for name, each in KEYWORDS.items() if name not in signature.parameters]
    return signature.replace(parameters=[*first, *missing, *rest])


def _spell_out_keywords(init: Any) -> None:
    # Some constructors are no Python functions, and some take no attributes.
    with contextlib.suppress(TypeError, ValueError, AttributeError):
        signature = inspect.signature(init)
        kinds = [each.kind for each in signature.parameters.values()]
        if inspect.Parameter.VAR_KEYWORD in kinds:
            init.__signature__ = with_our_keywords(signature)


KEYWORDS = {
    name: each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    for name, each in inspect.signature(Settings).parameters.items()
}
"""Ours, as parameters."""
_spell_out_keywords(SafeDataLoader.__init__)
