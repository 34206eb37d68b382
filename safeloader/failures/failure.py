"""A failure, as data: made where it happened, raised in main. Runs in: both.

::

    failure_of(exc, ...)  ──►  Failure (pickles, JSON)  ──►  error_from(failure)
    worker, or main            result queue, log, dump       main: SampleError(KeyError)

The exception object itself does not cross. Its parts do (:mod:`exception_parts`), and the error is
put together from them without running a constructor.
"""

from __future__ import annotations

import dataclasses
import os
import traceback as traceback_module
import types
from collections.abc import Iterator
from typing import Any

from safeloader.failures.exception_parts import (
    ExceptionParts,
    exception_parts_of,
    first_importable,
    own_state,
)
from safeloader.introspect.frames import OURS, is_users, user_frame
from safeloader.introspect.random_state import RandomState
from safeloader.introspect.redaction import scrub
from safeloader.introspect.seeds import SeededAs
from safeloader.introspect.texts import (
    bounded_text,
    index_text,
    indices_text,
    plain,
)
from safeloader.introspect.values import bounded, exception_text, short_type_name, type_name

_MESSAGE_CHARS = 10_000
_TRACEBACK_CHARS = 40_000
_PART_CHARS = 1000  # one text among the indices


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Failure:
    """What went wrong, where, and in what state; frozen, picklable, JSON through :meth:`to_dict`.

    Attributes:
        phase: what was being done: ``"init"`` (worker_init_fn), ``"sampler"``, ``"sample"``,
            ``"collate"``, ``"transport"`` (pickling, loading, pinning), ``"crash"`` and
            ``"timeout"`` (of a worker) or ``"delivery"`` (the ledger's check).
        index: dataset index of the sample at fault, ``(worker, ordinal)`` in a stream; None where
            no single sample is known to be.
        position: position of that sample in its batch, from 0; None without an index.
        indices: indices of the whole batch, as far as they were known where it failed.
        batch: number of the batch in its epoch, in the order handed over, from 0; None where no
            batch is at fault, and for an ``on_error`` callable: it is asked in the worker, and
            batches are numbered as they are handed over.
        epoch: number of the epoch, as ``loader.recorder`` counts them, from 0; None for an
            ``on_error`` callable, as ``rank`` is.
        rank: rank of this process in distributed training; None outside of it.
        worker_id: number of the worker; None in the main process.
        pid: process id of the process where it happened.
        exception_type: qualified name of what was raised, ``"KeyError"``.
        message: ``str()`` of what was raised, without what looks like a secret; see SECURITY.md.
        traceback: the traceback in the process where it happened, as text, without secrets too.
        dataset_state: the dataset in that process: ``class``, ``length``, ``attributes``,
            ``changed_since_worker_start``, ``differs_from_main``.
        user_frame: the innermost frame of the user's own code in which the exception was raised:
            ``file``, ``line``, ``function`` and ``locals``, described as attributes are, those that
            tell most first; None where no such frame is known.
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
    user_frame: dict[str, Any] | None = None
    hint: str = ""
    _where: str = ""
    _inherited: str = ""  # the first suspect, of what was warned of when the workers were forked
    _refused_by: str = ""  # the check of ``validate=`` that raised, on a sample that came
    _exception_parts: ExceptionParts | None = dataclasses.field(default=None, compare=False)
    _random: RandomState | None = dataclasses.field(default=None, compare=False)
    # What its numbers were made from, with ``seed=``.
    _seeded: SeededAs | None = dataclasses.field(default=None, compare=False)
    # Of a worker that died or hangs: the number of the draw that it was at.
    _seq: int | None = dataclasses.field(default=None, compare=False)
    # The batch's indices up to this one as they were drawn, pickled, where they are no plain ints.
    _drawn: bytes | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("message", "traceback", "hint"):  # whoever made them: they leave from here on
            try:
                text = scrub(getattr(self, name))
            except Exception:  # a fault of ours; the text may hold a secret
                text = "[not shown: safeloader could not look for secrets in it]"
            object.__setattr__(self, name, text)

    def __repr__(self) -> str:
        known = ("phase", "exception_type", "index", "batch", "epoch", "worker_id", "message")
        return f"Failure({', '.join(f'{k}={bounded_text(getattr(self, k))}' for k in known)})"

    def to_dict(self) -> dict[str, Any]:
        """The failure as plain dicts, lists, strings and numbers that ``json.dumps`` takes."""
        told: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name == "indices":  # each for itself: one index is not the name of the next
                told[name] = [in_json(index) for index in value]
            elif not name.startswith("_"):
                is_bounded = type(value) is str and name != "index"
                told[name] = value if is_bounded else in_json(value)
        return told

    def raised_any_of(self, types: tuple[type[BaseException], ...]) -> bool:
        """Whether what was raised is of one of these types, as far as it can be imported here."""
        raised = first_importable(self._exception_parts)
        return raised is not None and issubclass(raised, types)

    def __str__(self) -> str:
        try:
            return "\n".join(report(self))
        except Exception:  # a fault of ours must not take the place of the user's error
            return f"{self.exception_type}: {self.message}"


def failure_of(
    exc: BaseException, *, phase: str, where: str, dataset: object = None, **known: Any
) -> Failure:
    """The failure that ``exc`` is; call it in the process where it was raised.

    Args:
        exc: what was raised, with its traceback.
        phase: see :class:`Failure`.
        where: as torch words it, ``"in DataLoader worker process 3"``; empty in the main process.
        dataset: what ``dataset_state`` describes: not told again among the locals.
        known: further fields of :class:`Failure`.
    """
    known.setdefault("user_frame", _frame_of(exc, dataset, phase))
    # In the error of a loader within the dataset: what the user's code raised.
    inner = own_state(exc).get("failure")
    parts = inner._exception_parts if isinstance(inner, Failure) else None
    return Failure(
        phase=phase,
        exception_type=type_name(type(exc)),
        message=bounded(exception_text(exc), _MESSAGE_CHARS),
        traceback=bounded(_traceback_of(exc), _TRACEBACK_CHARS),
        _where=where,
        _exception_parts=parts or exception_parts_of(exc),
        **known,
    )


def is_ours(frame: types.FrameType) -> bool:
    """Whether code of this package runs in it."""
    return frame.f_code.co_filename.startswith(OURS)


def without_ours(frames: types.TracebackType | None) -> types.TracebackType | None:
    """A traceback without our frames above the user's."""
    while frames is not None and frames.tb_next is not None and is_ours(frames.tb_frame):
        frames = frames.tb_next
    return frames


def _frame_of(exc: BaseException, dataset: object, phase: str) -> dict[str, Any] | None:
    try:
        found = user_frame(exc, dataset)
        # What a library raises as it is pickled says nothing by its locals.
        return found if phase != "transport" or found is None or is_users(found["file"]) else None
    except Exception:  # a fault of ours must not take the place of the user's error
        return None


def _traceback_of(exc: BaseException) -> str:
    try:
        said = traceback_module.TracebackException.from_exception(exc, compact=True)
        _leave_out_ours(said)
        return "".join(said.format())
    except Exception:  # a __str__, __notes__ or source line that cannot be shown
        shown = "".join(traceback_module.format_tb(exc.__traceback__))
        return f"Traceback (most recent call last):\n{shown}{type_name(type(exc))}\n"


def _leave_out_ours(said: traceback_module.TracebackException) -> None:
    """Drop our frames above the user's, and what a second try raised exactly as the first did."""
    while len(said.stack) > 1 and said.stack[0].filename.startswith(OURS):
        del said.stack[0]
    behind = said.__cause__ or said.__context__
    if behind is None:
        return
    _leave_out_ours(behind)
    first = said.__context__
    if behind is first and [*first.format(chain=False)] == [*said.format(chain=False)]:
        said.__context__ = first.__context__


def in_json(value: Any) -> Any:
    """A field of a failure, as JSON has it."""
    return plain(value, depth=5, items=None, chars=_PART_CHARS)


# ── the text, for a person ───────────────────────────────────────────────────────────────────────
# Torch's words come first, for logs and tests that look for them; what to know and what to do comes
# last, where a terminal shows it.


def report(failure: Failure) -> Iterator[str]:
    """The lines of ``str(failure)``."""
    if failure._where:
        yield f"Caught {short_type_name(failure.exception_type)} {failure._where}."
    else:
        yield failure.message
    # A sampler raised while torch drew ahead: the live traceback is gone.
    if failure.traceback and (failure._where or failure.phase == "sampler"):
        yield f"Original {failure.traceback.rstrip()}"
    yield ""
    yield _headline(failure)
    *found, next_step = failure.hint.split("\n")
    yield from (f"  {line}" for line in found)
    if failure.phase in ("crash", "timeout") and failure.traceback:
        yield "  Python stack, most recent call last:" if failure.phase == "crash" else "  stacks:"
        yield from (f"  {line}" for line in failure.traceback.splitlines())
    if failure.user_frame and failure.user_frame["locals"]:
        yield from _frame_lines(failure.user_frame)
    if failure.dataset_state:
        yield from _state_lines(failure.dataset_state)
    if next_step:
        yield f"  next: {next_step}"


_DOING = {
    "init": "in worker_init_fn",
    "sampler": "while drawing from the sampler",
    "sample": "while fetching the sample",
    "collate": "while collating the batch",
    "transport": "while handing over the batch",
    "delivery": "while checking what came against what was drawn",
    "crash": "died",
    "timeout": "gave no batch",
}


_OURS = ("DeliveryError", "SampleError")  # whose message is a sentence of ours


def _headline(failure: Failure) -> str:
    parts = []
    if failure.index is not None:
        parts.append(f"dataset index {index_text(failure.index)}")
    elif failure.phase not in ("init", "sampler") and failure.indices:
        parts.append(f"dataset indices {indices_text(failure.indices, most=16, counted=True)}")
    known = {"position": failure.position, "batch": failure.batch, "epoch": failure.epoch}
    if failure.phase == "init":  # which failed before any epoch's
        del known["epoch"]
    where = ", ".join(f"{name} {at}" for name, at in known.items() if at is not None)
    if where:
        parts.append(f"({where})" if parts else where)
    if parts:
        parts[-1] += ","
    doing = _DOING[failure.phase]
    if failure._refused_by:
        doing = f"refused by validate={failure._refused_by}"
    rank = "" if failure.rank is None else f", rank {failure.rank}"
    pid = f"(pid {failure.pid}{rank})"
    if failure.phase in ("crash", "timeout"):
        who = f"no batch came, and no worker is at work{rank}"
        if failure.worker_id is not None:
            at = " in" if failure.epoch is not None else ""
            at = " at" if failure.index is not None or failure.indices else at
            who = f"worker {failure.worker_id} {pid} {doing}{at}"
        return " ".join(["safeloader:", who, *parts]).rstrip(",")
    if failure.phase == "transport" and failure.batch is None:
        doing = "while starting the workers"
    who = "the main process" if failure.worker_id is None else f"worker {failure.worker_id}"
    if failure.exception_type in _OURS and not failure._where:  # the first line is the message
        return " ".join(["safeloader:", *parts, f"{doing}, in {who} {pid}"])
    parts.append(f"{doing}, in {who} {pid}:")
    head, _, rest = failure.message.partition("\n")
    head = bounded(head, 300)
    parts.append(short_type_name(failure.exception_type) + (f": {head}" if head else ""))
    return "safeloader: " + " ".join(parts) + (" ..." if rest else "")


_LOCALS_SHOWN = 5


def _frame_lines(frame: dict[str, Any]) -> Iterator[str]:
    held = frame["locals"]
    file = os.path.basename(str(frame["file"]))
    yield f"  in {frame['function']} ({file}:{frame['line']}):"
    shown = list(held.items())
    if len(shown) > _LOCALS_SHOWN + 1:  # a line that says "1 more" could show it
        shown = shown[:_LOCALS_SHOWN]
    for name, about in shown:
        yield f"    {name} = {bounded(str(about.get('repr', '')), 200)}"
    if left := len(held) - len(shown):
        yield f"    and {left} more locals (exc.failure.user_frame)"


def _state_lines(state: dict[str, Any]) -> Iterator[str]:
    length = "" if state.get("length") is None else f", length {state['length']}"
    yield f"  dataset: {state.get('class')}{length}"
    told = state.get("told_by_dataset")
    if told:
        yield f"    says of itself: {bounded(str(told), 400)}"
    attributes = state.get("attributes") or {}
    most = 9 if len(attributes) == 9 and not state.get("omitted_attributes") else 8
    for name, about in list(attributes.items())[:most]:
        facts = [str(about.get("type", "?"))]
        facts += [f"{key} {about[key]}" for key in ("shape", "dtype", "length") if key in about]
        shown = about.get("repr", "")
        # An array's text repeats its type and shape unless it is small enough to be shown.
        text = "" if not shown or shown.startswith(facts[0]) else f" = {shown}"
        yield f"    .{name}: {', '.join(facts)}{bounded(text, 320)}"
    unshown = len(attributes) - most + int(state.get("omitted_attributes", 0))
    if unshown > 0 and len(attributes) >= 8:
        yield f"    and {unshown} more attributes (exc.failure.dataset_state)"
    for key, words in (
        ("changed_since_worker_start", "changed since the worker started"),
        ("differs_from_main", "differs from the main process's copy"),
    ):
        for name, what in list((state.get(key) or {}).items())[:6]:
            yield f"    {words}: {name} {bounded(str(what), 160)}"
    for note in (state.get("notes") or [])[:3]:
        yield f"    note: {bounded(str(note), 160)}"
