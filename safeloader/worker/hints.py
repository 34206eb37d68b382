"""What is told of a failure of the user's code, and what to do next. Runs in: worker."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from time import monotonic
from typing import Any

from torch.utils.data import IterableDataset

from safeloader.failures.exception_parts import exception_parts_of
from safeloader.failures.failure import Failure, failure_of
from safeloader.introspect.advice import next_step
from safeloader.introspect.dataset_state import changes, describe
from safeloader.introspect.frames import subscripted, user_frames
from safeloader.introspect.pickling import find_unpicklable
from safeloader.introspect.resource_exhaustion import shortage
from safeloader.introspect.suspects import Inherited, suspect_of
from safeloader.introspect.tables import table_rows
from safeloader.introspect.texts import index_text
from safeloader.introspect.values import fields, plain_length
from safeloader.worker.context import FetchContext
from safeloader.worker.repair import GIVEN_FAULT, ON_ERROR_FAULT, STRUCK, Unrepairable
from safeloader.worker.sources import inner_dataset, source_of
from safeloader.worker.validating import CheckFault, refused_by

KEY_FAULT = "raised by key= (or that of checks.unique), not by the dataset"
ITER_RAISED = "iter(dataset) raised, before any sample\niter(loader.dataset) repeats it"
LOOK_AT_SAMPLER = ": look at the sampler"  # main knows better where the dataset grew meanwhile
_PICKLED_AGAIN_S = 5.0  # for finding what cannot be pickled
_ATTRIBUTES_MAX = 64  # of the dataset, looked through for what an index went past
_OF_STREAM = ", of a stream"  # which is not asked by index
_NEXT_STEPS = {  # by phase, and by what was found in it
    KEY_FAULT: "call it on loader.dataset[index] to repeat it; a key is an int, str or tuple of "
    "them",
    KEY_FAULT + _OF_STREAM: "call it on a sample of the stream to repeat it; a key is an int, str "
    "or tuple of them",
    "refused": "sample = safeloader.replay(error, loader.dataset) makes the sample again, with the "
    "same random numbers",
    "fault of a check": "leave this check out of validate=, and report it to safeloader with the "
    "cause above",
    "refused" + _OF_STREAM: "mend the data, or leave such samples out: on_error='skip'",
    ON_ERROR_FAULT: "mend the callable given as on_error=: it takes a Failure, and gives a sample "
    "or safeloader.SKIP",
    GIVEN_FAULT: "have the callable given as on_error= give a sample that passes, or "
    "safeloader.SKIP",
    STRUCK: "no sample is to blame; next() goes on with the next batch",
    "sample": "safeloader.replay(error, loader.dataset) repeats the call here with the same random "
    "numbers, loader.dataset[{index}] with others",
    "sample of a stream": "sample {ordinal} (from 0) of worker {worker}'s stream: iterate the "
    "dataset up to it to repeat the call. In the main process get_worker_info() is None: a dataset "
    "that shares itself out by it has to be given worker {worker}'s share by hand",
    "collate": "the samples are alike in structure; loader.collate_fn([loader.dataset[i] for i in "
    "error.failure.indices]) repeats the call here",
    "collate" + _OF_STREAM: "the samples are alike in structure; loader.collate_fn(samples) of as "
    "many, one after the other, of the stream repeats the call here",
    "collate, found": "mend the sample, or have collate_fn= take it",
    "collate, found, by the user's": "look at {at}, which raised on these samples: what differs "
    "between them may be as it should be",
    "transport": "pickle.dumps(loader.collate_fn([loader.dataset[i] for i in "
    "error.failure.indices])) may repeat it here",
    "transport" + _OF_STREAM: "pickle.dumps(loader.collate_fn(samples)) of as many samples of the "
    "stream may repeat it here",
    "init": "no sample was fetched yet: call worker_init_fn by itself to repeat it",
}


def failure_in(
    context: FetchContext, exc: Exception, phase: str, dataset: Any, found: str, **known: Any
) -> Failure:
    """The failure that ``exc`` is, in this process, with the dataset as it is now.

    ``found`` is what was found out beyond the exception; ``known`` are further fields.
    """
    worker = context.worker_id
    known |= {"phase": phase, "worker_id": worker}
    where = "" if worker is None else f"in DataLoader worker process {worker}"
    try:
        state = describe(dataset, length=context.length)
        if context.start_state is not None:
            state["changed_since_worker_start"] = changes(context.start_state, state)
        index, suspect = known.get("index"), None
        if context.inherited:
            suspect = suspect_of(exc, context.inherited, dataset)
        known["_inherited"] = "" if suspect is None else suspect.says
        hint = hint_for(exc, phase, index, found, dataset, context.length, suspect)
        return failure_of(
            exc, where=where, dataset=dataset, dataset_state=state, hint=hint, **known
        )
    except Exception:  # a fault of ours must not take the place of the user's error
        with suppress(Exception):
            known["_exception_parts"] = exception_parts_of(exc)
        return Failure(
            exception_type=type(exc).__name__,
            message="",
            hint="safeloader could not describe this failure, by a fault of its own: report it",
            _where=where,
            **known,
        )


def why_not_sent(exc: Exception, batch: Any, samples: Iterable[Any]) -> Unrepairable:
    """What of ``batch`` cannot be pickled, looked for in its samples first.

    Args:
        exc: what pickling raised.
        batch: what the collate function made.
        samples: what it was made of, where that is known one by one.
    """
    if shortage(exc) is not None:  # which the hint tells
        return Unrepairable(None, exc)
    give_up = monotonic() + _PICKLED_AGAIN_S
    parts: list[tuple[int | None, str, Any]] = [(k, "sample", s) for k, s in enumerate(samples)]
    for position, name, part in [*parts, (None, "batch", batch)]:
        left = give_up - monotonic()
        if position is not None and left <= 0:
            continue  # to the batch, which is always looked at
        found = find_unpicklable(part, name, spawning=False, bound_s=max(left, 1.0))
        if found is not None:
            text = f"it cannot be pickled: {found}\n{next_step(found.advice)}"
            return Unrepairable(position, exc, text)
    return Unrepairable(None, exc)


def hint_for(
    exc: BaseException,
    phase: str,
    index: Any,
    found: str,
    dataset: Any = None,
    length: int | None = None,
    suspect: Inherited | None = None,
) -> str:
    """Lines: what was found out beyond the exception, and last the next step.

    ``found`` may end with a line that says what to do.
    ``length`` is the dataset's, where that is known; the dataset is not asked for it here.
    ``suspect`` is the inherited object that the exception came out of.
    """
    short = shortage(exc)
    if short is not None:
        return "\n".join(part[:1000] for part in (found, short) if part)
    parts = [found] if found else []
    refused = bool(refused_by(exc)[0])
    if index is not None and dataset is not None:
        parts += _about_index(index, dataset, exc, length, phase)
    if isinstance(exc, StopIteration) and phase == "sample" and not refused:
        parts.append(
            "a StopIteration left the dataset (a bare next() in it?); torch's own loader would "
            "have ended the epoch here without a word"
        )
    step, worker, ordinal, at = phase, None, None, ""
    stream = isinstance(dataset, IterableDataset)
    if suspect is not None:
        parts.append(suspect.says)
        step = suspect.next_step(stream=stream)
    elif found in _NEXT_STEPS:
        step = found
    elif isinstance(exc, CheckFault):
        step = "fault of a check"
    elif refused:
        step = "refused"
    elif phase != "sample":
        step = f"{phase}, found" if found else phase
        at = _users_line(exc) if step == "collate, found" else ""
        step += ", by the user's" if at else ""
    elif type(index) is tuple and (dataset is None or stream):
        step, (worker, ordinal) = "sample of a stream", index
    elif index is None:
        step = ""
    if stream and step + _OF_STREAM in _NEXT_STEPS:
        step += _OF_STREAM
    if suspect is not None:
        parts.append(step)
    elif step in _NEXT_STEPS:
        words = {"index": index_text(index), "worker": worker, "ordinal": ordinal, "at": at}
        parts.append(_NEXT_STEPS[step].format(**words))
    elif "\n" in found:  # it ends with what to do
        parts[0], _, step = found.rpartition("\n")
        parts.append(step)
    return "\n".join(part[:1000] for part in parts)


def _users_line(exc: BaseException) -> str:
    """The innermost function of the user's that an exception came out of, with its line."""
    with suppress(Exception):  # a hint must not hide the error
        if frames := user_frames(exc):
            code = frames[0].frame.f_code
            return f"{code.co_name} ({os.path.basename(code.co_filename)}:{frames[0].line})"
    return ""


def _about_index(
    index: Any, dataset: Any, exc: BaseException, known: int | None, phase: str
) -> list[str]:
    """What the index means to the dataset: its range, its number in what is under it, its file."""
    said: list[str] = []
    with suppress(Exception):  # a hint must not hide the error
        if type(index) is int:
            said += _about_number(index, dataset, exc, known)
    # The locals of a collate function are those of any sample.
    if source := source_of(dataset, index, exc if phase == "sample" else None, known):
        said.append(source)
    return said


def _about_number(index: int, dataset: Any, exc: BaseException, known: int | None) -> Iterator[str]:
    length = plain_length(dataset)
    length = known if length is None else length
    of_index = isinstance(exc, IndexError) and not refused_by(exc)[0]
    if of_index and length is not None and not -length <= index < length:
        yield f"index {index} is outside the dataset (length {length}){LOOK_AT_SAMPLER}"
    inner, at, path = inner_dataset(dataset, index)
    if inner is not dataset:
        outer = type(dataset).__name__
        yield f"index {index} of the {outer} is index {at} of the dataset under it, {path}"
    length = length if inner is dataset else plain_length(inner)
    if of_index and length is not None and 0 <= at < length:
        yield from _too_short(at, inner, path, exc, length)


def _too_short(at: int, dataset: Any, path: str, exc: BaseException, length: int) -> Iterator[str]:
    """What the index went past, though the dataset's length admits it.

    Only where the error came from asking that for this index: ``a[0]`` of an empty tensor is
    another matter.
    """
    found = subscripted(exc)
    if found is None or (found[1] is not None and (type(found[1]) is not int or found[1] != at)):
        return
    sequence = found[0]
    for name, held in fields(dataset, _ATTRIBUTES_MAX):
        size = plain_length(held)
        size = table_rows(held) if size is None else size
        if held is sequence and size is not None and size <= at < length:
            yield (
                f"{path}.{name} has {size} entries, and the dataset's length is {length}: "
                "__len__ says more than there is"
            )
            return
