"""The errors a training script can catch, and how one is built. Runs in: both.

::

    SafeLoaderError             something went wrong while loading; ``.failure`` says what and where
    ├── WorkerInitError         the user's worker_init_fn raised
    ├── SamplerError            the sampler or batch sampler raised
    ├── SampleError             dataset[index], __getitems__ or the stream's next() raised
    │   └── ValidationError     a check of validate= refused the sample
    ├── CollateError            collate_fn raised
    ├── TransportError          something could not be carried over between the processes
    ├── WorkerCrashError        a worker process died; also a RuntimeError
    ├── WorkerTimeoutError      no batch came in time; also a RuntimeError and a TimeoutError
    ├── DeliveryError           what arrived is not what the sampler drew
    └── ResumeError             a state cannot be gone on from; also a ValueError

An error that the user's own code caused is raised as a class that is *both* one of these and the
type that was raised (``SampleError(KeyError)``), so ``except KeyError`` goes on working. Ray does
the same for the errors of its tasks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from safeloader.failures.exception_parts import attributes_of, crossed, first_importable

if TYPE_CHECKING:
    from safeloader.failures.failure import Failure


class SafeLoaderError(Exception):
    """Base of all errors of this package.

    Attributes:
        failure: the :class:`~safeloader.Failure` with everything known about it, or None.

    Example:
        >>> from safeloader import SafeDataLoader, SafeLoaderError
        >>> try:
        ...     list(SafeDataLoader([1, 2, None, 4], batch_size=4))
        ... except SafeLoaderError as error:
        ...     print(error.index, error.failure.phase)
        2 collate
    """

    # Class-level defaults: a combined class is made without running __init__ (see dual_type).
    failure: Failure | None = None
    _text: str | None = None

    @property
    def index(self) -> Any:
        """Dataset index of the sample at fault; None where no single sample is."""
        return None if self.failure is None else self.failure.index

    def __str__(self) -> str:
        # KeyError would show the repr of its argument here, and user types may raise.
        return super().__str__() if self._text is None else self._text

    def __reduce__(self) -> tuple[Any, ...]:
        if self.failure is None:
            return type(self), self.args
        return error_from, (self.failure,)


class WorkerInitError(SafeLoaderError):
    """The user's ``worker_init_fn`` raised in a worker."""


class SamplerError(SafeLoaderError):
    """The sampler or batch sampler raised while an index was drawn."""


class SampleError(SafeLoaderError):
    """The dataset raised while a sample was fetched."""


class ValidationError(SampleError):
    """A check given as ``validate=`` refused a sample; checks of your own may raise it, or any."""


class CollateError(SafeLoaderError):
    """The collate function raised on the samples of a batch."""


class TransportError(SafeLoaderError):
    """Something could not be carried over between the processes.

    A batch that cannot be pickled, loaded or pinned; a dataset that cannot be pickled for a worker
    under ``spawn`` or ``forkserver``; no file descriptor or shared memory left for it.
    """


class WorkerCrashError(SafeLoaderError, RuntimeError):
    """A worker process ended that should not have: by a signal, or by an exit."""


class WorkerTimeoutError(SafeLoaderError, RuntimeError, TimeoutError):
    """No batch came within the loader's ``timeout``; ``next()`` may be called again."""


class DeliveryError(SafeLoaderError):
    """What was handed over is not what the sampler drew: missing, twice, or unasked for."""


class ResumeError(SafeLoaderError, ValueError):
    """A state that was saved cannot be gone on from here; its text says what to do."""


_END_A_LOOP = (StopIteration, StopAsyncIteration, GeneratorExit)


@functools.lru_cache(maxsize=1000)  # some classes are made on the fly, each time anew
def dual_type(ours: type[SafeLoaderError], theirs: type[BaseException]) -> type[SafeLoaderError]:
    """The class that is both ``ours`` and ``theirs``; ``ours`` alone where that cannot be.

    A ``StopIteration`` is never combined: raised out of ``__next__`` it would end the loop in
    silence. Types whose layouts or metaclasses exclude each other fall back to ``ours``.
    """
    if issubclass(theirs, _END_A_LOOP) or issubclass(ours, theirs):
        return ours
    if issubclass(theirs, ours) and "_is_both" in vars(theirs):
        return theirs  # a loader in the dataset raised it
    bases: tuple[type, ...] = (theirs,) if issubclass(theirs, ours) else (ours, theirs)
    name = f"{ours.__name__}({theirs.__qualname__})"
    namespace: dict[str, Any] = {
        "__module__": ours.__module__,
        "__doc__": ours.__doc__,
        "__str__": SafeLoaderError.__str__,
        "__reduce__": SafeLoaderError.__reduce__,
        "_is_both": True,
    }
    make: Callable[..., Any] = type(theirs)
    try:
        made = make(name, bases, namespace)
        blank(made, ("", [ValueError()]))
    except Exception:  # whatever a metaclass or __init_subclass__ of the user's objects to
        return ours
    return made  # type: ignore[no-any-return]


def blank(cls: type[BaseException], group: tuple[Any, ...] = ()) -> BaseException:
    """An instance of ``cls`` made without its constructor, which may want arguments.

    Exception groups alone are made with theirs, ``group``: they cannot be filled in afterwards.
    """
    for base in cls.__mro__:
        if base.__module__ == "builtins":  # the base that decides the memory layout
            new: Any = base.__new__
            arguments = group if issubclass(cls, BaseExceptionGroup) else ()
            try:
                return cast(BaseException, new(cls, *arguments))
            except TypeError:  # MemoryError's own is for classes derived from it first
                continue
    raise TypeError(f"{cls!r} is no exception type")


_ERROR_OF_PHASE: dict[str, type[SafeLoaderError]] = {
    "init": WorkerInitError,
    "sampler": SamplerError,
    "sample": SampleError,
    "collate": CollateError,
    "transport": TransportError,
    "crash": WorkerCrashError,
    "timeout": WorkerTimeoutError,
    "delivery": DeliveryError,
}


def error_from(failure: Failure, exception: BaseException | None = None) -> SafeLoaderError:
    """The error to raise for ``failure``, of our type and of the original one.

    ``exception`` is the original where it is at hand (it happened in this process); its traceback
    then leads into the user's frames, as it would without us.
    """
    ours = ValidationError if failure._refused_by else _ERROR_OF_PHASE[failure.phase]
    error = ours(failure.message)
    parts = failure._exception_parts
    theirs = first_importable(parts) if exception is None else type(exception)
    if theirs is not None:
        attributes: dict[str, Any] = {}
        with suppress(Exception):  # what they hold is the user's, and the error is told without
            attributes = dict(crossed(parts) if exception is None else attributes_of(exception))
        made = dual_type(ours, theirs)  # type: ignore[arg-type]  # mypy: classes have no hash
        with suppress(TypeError):  # a group whose members could not cross
            error = cast(SafeLoaderError, blank(made, attributes.get("args", ())))
        for name, value in attributes.items():
            with suppress(Exception):  # a read-only field, or a setter of the user's that objects
                setattr(error, name, value)
    error.failure = failure
    error._text = str(failure)
    if exception is None:
        return error
    error.__cause__, error.__context__ = exception.__cause__, exception.__context__
    error.__suppress_context__ = exception.__suppress_context__
    return error.with_traceback(exception.__traceback__)
