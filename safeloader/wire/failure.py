"""A failure: made where it happened, raised in the main process. Both ends stand in this module.

::

    failure_of(exc, ...)  ──►  Failure (pickles, JSON)  ──►  error_from(failure)
    worker, or main            result queue, log, dump       main: SampleError(KeyError)

The exception object itself does not cross: constructors that want arguments, locks among the
attributes or classes that cannot be imported would break it on the way. What crosses is the first
class of its lineage that can be imported and each attribute that can be pickled; the error is put
together from these without running a constructor.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import traceback as traceback_module
import types
from collections.abc import Iterator
from typing import Any, cast

from safeloader.errors import (
    CollateError,
    DeliveryError,
    SafeLoaderError,
    SampleError,
    SamplerError,
    TransportError,
    WorkerInitError,
    blank,
    dual_type,
)

_ERROR_OF_PHASE: dict[str, type[SafeLoaderError]] = {
    "init": WorkerInitError,
    "sampler": SamplerError,
    "sample": SampleError,
    "collate": CollateError,
    "transport": TransportError,
    "delivery": DeliveryError,
}

_ATTRIBUTE_BYTES = 64 * 1024  # a larger attribute (a batch held by the exception) stays behind
_MESSAGE_CHARS = 10_000
_TRACEBACK_CHARS = 40_000


@dataclasses.dataclass(frozen=True)
class Remains:
    """What is left of an exception after the crossing: its class and attributes, each pickled."""

    lineage: tuple[bytes, ...]
    attributes: tuple[tuple[str, bytes], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """What went wrong, where, and in what state; frozen, picklable, JSON through :meth:`to_dict`.

    Attributes:
        phase: what was being done: ``"init"`` (worker_init_fn), ``"sampler"``, ``"sample"``,
            ``"collate"``, ``"transport"`` (pinning) or ``"delivery"`` (the ledger's check).
        index: dataset index of the sample at fault, ``(worker, ordinal)`` in a stream; None where
            no single sample is known to be.
        position: position of that sample in its batch, from 0; None without an index.
        indices: indices of the whole batch, as far as they were known where it failed.
        batch: number of the batch in its epoch, in the order handed over, from 0.
        epoch: number of the epoch, as ``loader.recorder`` counts them, from 0.
        rank: rank of this process in distributed training; None outside of it.
        worker_id: number of the worker; None in the main process.
        pid: process id of the process where it happened.
        exception_type: qualified name of what was raised, ``"KeyError"``.
        message: ``str()`` of what was raised.
        traceback: the traceback in the process where it happened, as text.
        dataset_state: the dataset in that process: ``class``, ``length``, ``attributes``,
            ``changed_since_worker_start``, ``differs_from_main``.
        hint: what to do next.

    Example:
        >>> from safeloader import SafeDataLoader, SampleError
        >>> class Dataset:
        ...     def __len__(self):
        ...         return 8
        ...     def __getitem__(self, index):
        ...         return {0: "a", 1: "b"}[index]
        >>> try:
        ...     list(SafeDataLoader(Dataset(), batch_size=4))
        ... except SampleError as error:
        ...     failure = error.failure
        >>> failure.exception_type, failure.index, failure.position, failure.indices
        ('KeyError', 2, 2, (0, 1, 2, 3))
        >>> failure.to_dict()["phase"]
        'sample'
    """

    phase: str
    exception_type: str
    message: str
    traceback: str = ""
    index: Any = None
    position: int | None = None
    indices: tuple[Any, ...] = ()
    batch: int | None = None
    epoch: int | None = None
    rank: int | None = None
    worker_id: int | None = None
    pid: int = dataclasses.field(default_factory=os.getpid)
    dataset_state: dict[str, Any] | None = None
    hint: str = ""
    _where: str = dataclasses.field(default="", repr=False)
    _remains: Remains | None = dataclasses.field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The failure as plain dicts, lists, strings and numbers that ``json.dumps`` takes."""
        return {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if not field.name.startswith("_")
        }

    def __str__(self) -> str:
        return "\n".join(_report(self))


def failure_of(
    exc: BaseException, *, phase: str, where: str, skip_frames: int = 1, **known: Any
) -> Failure:
    """The failure that ``exc`` is; call it in the process where it was raised.

    Args:
        exc: what was raised, with its traceback.
        phase: see :class:`Failure`.
        where: as torch words it, ``"in DataLoader worker process 3"``; empty in the main process.
        skip_frames: frames of ours at the head of the traceback, left out.
        known: further fields of :class:`Failure`.
    """
    return Failure(
        phase=phase,
        exception_type=type_name(type(exc)),
        message=_bounded(_text_of(exc), _MESSAGE_CHARS),
        traceback=_bounded(_traceback_of(exc, skip_frames), _TRACEBACK_CHARS),
        _where=where,
        _remains=_remains_of(exc),
        **known,
    )


def error_from(failure: Failure, exception: BaseException | None = None) -> SafeLoaderError:
    """The error to raise for ``failure``, of our type and of the original one.

    ``exception`` is the original where it is at hand (it happened in this process); its traceback
    then leads into the user's frames, as it would without us.
    """
    ours = _ERROR_OF_PHASE[failure.phase]
    theirs = type(exception) if exception is not None else _first_importable(failure._remains)
    error: SafeLoaderError
    if theirs is None:
        error = ours(failure.message)
    else:
        attributes = dict(
            _crossed(failure._remains) if exception is None else _attributes_of(exception)
        )
        try:
            error = cast(
                SafeLoaderError, blank(dual_type(ours, theirs), attributes.get("args", ()))
            )
        except TypeError:  # a group whose members could not cross
            error = ours(failure.message)
        for name, value in attributes.items():
            try:
                setattr(error, name, value)
            except Exception:  # a read-only field, or a setter of the user's that objects
                continue
    error.failure = failure
    error._text = str(failure)
    return error if exception is None else error.with_traceback(exception.__traceback__)


def type_name(cls: type) -> str:
    """``KeyError`` for a builtin, ``package.module.Class`` otherwise."""
    module = getattr(cls, "__module__", None)
    name = getattr(cls, "__qualname__", cls.__name__)
    return name if module in (None, "builtins") else f"{module}.{name}"


def short_type_name(exception_type: str) -> str:
    """The last part of a qualified type name, as torch puts it in its messages."""
    return exception_type.rsplit(".", 1)[-1]


# ── the report a person reads ────────────────────────────────────────────────────────────────────


def _report(failure: Failure) -> Iterator[str]:
    """Torch's words first, for logs and tests that look for them; what to know last, where a
    terminal shows it."""
    if failure._where:
        yield f"Caught {short_type_name(failure.exception_type)} {failure._where}."
        if failure.traceback:
            yield f"Original {failure.traceback.rstrip()}"
    else:
        yield failure.message
    yield ""
    if headline := _headline(failure):
        yield headline
    if failure.dataset_state:
        yield from _state_lines(failure.dataset_state)
    if failure.hint:
        yield f"  next: {failure.hint}"


_DOING = {
    "init": "worker_init_fn",
    "sampler": "drawing from the sampler",
    "sample": "fetching the sample",
    "collate": "collating the batch",
    "transport": "handing over the batch",
    "delivery": "checking the batch against what was drawn",
}


def _headline(failure: Failure) -> str:
    parts = []
    if failure.index is not None:
        parts.append(f"dataset index {failure.index!r}")
    elif failure.phase in ("sample", "collate", "transport", "delivery") and failure.indices:
        shown = ", ".join(repr(index) for index in failure.indices[:16])
        more = f", ... {len(failure.indices)} in all" if len(failure.indices) > 16 else ""
        parts.append(f"dataset indices [{shown}{more}]")
    place = [f"position {failure.position}"] if failure.position is not None else []
    if failure.batch is not None:
        place.append(f"batch {failure.batch}")
    if failure.epoch is not None:
        place.append(f"epoch {failure.epoch}")
    if place:
        parts.append(f"({', '.join(place)})")
    who = "the main process" if failure.worker_id is None else f"worker {failure.worker_id}"
    rank = "" if failure.rank is None else f", rank {failure.rank}"
    parts.append(f"{_DOING[failure.phase]}, in {who} (pid {failure.pid}{rank}):")
    head, _, rest = failure.message.partition("\n")
    parts.append(f"{short_type_name(failure.exception_type)}: {head}{' ...' if rest else ''}")
    return "safeloader: " + " ".join(parts)


def _state_lines(state: dict[str, Any]) -> Iterator[str]:
    length = "" if state.get("length") is None else f", length {state['length']}"
    yield f"  dataset: {state.get('class')}{length}"
    told = state.get("told_by_dataset")
    if told:
        yield f"    says of itself: {_bounded(str(told), 400)}"
    attributes = state.get("attributes") or {}
    for name, about in list(attributes.items())[:8]:
        facts = [str(about.get("type", "?"))]
        facts += [f"{key} {about[key]}" for key in ("shape", "dtype", "length") if key in about]
        text = f" = {about['repr']}" if "repr" in about else ""
        yield f"    .{name}: {', '.join(facts)}{_bounded(text, 100)}"
    unshown = len(attributes) - 8 + int(state.get("omitted_attributes", 0))
    if unshown > 0 and len(attributes) >= 8:
        yield f"    and {unshown} more attributes (exc.failure.dataset_state)"
    for key, words in (
        ("changed_since_worker_start", "changed since the worker started"),
        ("differs_from_main", "differs from the main process's copy"),
    ):
        for name, what in list((state.get(key) or {}).items())[:6]:
            yield f"    {words}: {name} {_bounded(str(what), 160)}"
    for note in (state.get("notes") or [])[:3]:
        yield f"    note: {_bounded(str(note), 160)}"


# ── taking an exception apart ────────────────────────────────────────────────────────────────────


def _text_of(exc: BaseException) -> str:
    try:
        return str(exc)
    except Exception as fault:  # a __str__ of the user's that raises
        return f"<str() of the {type(exc).__name__} raised {type(fault).__name__}>"


def _traceback_of(exc: BaseException, skip_frames: int) -> str:
    traceback = exc.__traceback__
    for _ in range(skip_frames):
        if traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
    try:
        return "".join(traceback_module.format_exception(type(exc), exc, traceback))
    except Exception:  # a __str__, __notes__ or source line that cannot be shown
        shown = "".join(traceback_module.format_tb(traceback))
        return f"Traceback (most recent call last):\n{shown}{type_name(type(exc))}\n"


def _bounded(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ... {len(text) - 2 * half} characters left out ... {text[-half:]}"


def _is_copied(name: str) -> bool:
    """Not the machinery (``__class__``, ``__cause__``), nor what an error of ours carries."""
    return not name.startswith("__") and name not in ("failure", "_text")


def _attributes_of(exc: BaseException) -> Iterator[tuple[str, Any]]:
    """What the exception carries: args, fields of builtin types (errno), its own attributes."""
    for cls in type(exc).__mro__:
        if cls.__module__ != "builtins":
            continue
        for name, slot in vars(cls).items():
            is_field = isinstance(slot, types.MemberDescriptorType | types.GetSetDescriptorType)
            if is_field and _is_copied(name):
                try:
                    yield name, getattr(exc, name)
                except Exception:  # a field of an exception that was never initialised
                    continue
    own = getattr(exc, "__dict__", None) or {}
    for name in list(own):
        if _is_copied(name):
            yield name, own[name]


def _remains_of(exc: BaseException) -> Remains:
    lineage = []
    for cls in type(exc).__mro__:
        try:
            pickled = pickle.dumps(cls)
        except Exception:  # a class made inside a function
            continue
        lineage.append(pickled)
        if cls.__module__ == "builtins":
            break
    attributes = []
    for name, value in _attributes_of(exc):
        try:
            pickled = pickle.dumps(value)
            pickle.loads(pickled)  # what dumps may still not load: found here, not in main
        except Exception:  # a lock, a socket, an exception with a demanding constructor
            continue
        if len(pickled) <= _ATTRIBUTE_BYTES:
            attributes.append((name, pickled))
    return Remains(tuple(lineage), tuple(attributes))


def _first_importable(remains: Remains | None) -> type[BaseException] | None:
    for pickled in remains.lineage if remains else ():
        try:
            found = pickle.loads(pickled)
        except Exception:  # not importable in this process: try what it derives from
            continue
        if isinstance(found, type) and issubclass(found, BaseException):
            return found
    return None


def _crossed(remains: Remains | None) -> Iterator[tuple[str, Any]]:
    for name, pickled in remains.attributes if remains else ():
        try:
            yield name, pickle.loads(pickled)
        except Exception:  # its class is not importable here
            continue


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else repr(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return _bounded(repr(value), 200)
