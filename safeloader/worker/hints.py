"""What is told of a failure of the user's code, and what to do next. Runs in: worker."""

from __future__ import annotations

import bisect
import os
import pathlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from safeloader.failures.exception_parts import exception_parts_of
from safeloader.failures.failure import Failure, failure_of
from safeloader.introspect.dataset_state import changes, describe
from safeloader.introspect.pickling import find_unpicklable
from safeloader.introspect.resource_exhaustion import shortage
from safeloader.introspect.texts import bounded_text, index_text, is_secret
from safeloader.introspect.values import definitions, exception_text, fields, plain_length
from safeloader.worker.context import FetchContext
from safeloader.worker.repair import ON_ERROR_FAULT, STRUCK, Unrepairable
from safeloader.worker.validating import refused_by

KEY_FAULT = "raised by key= (or that of checks.unique), not by the dataset"
LOOK_AT_SAMPLER = ": look at the sampler"  # main knows better where the dataset grew meanwhile
_PICKLED_AGAIN_S = 5.0  # for finding what cannot be pickled
_ATTRIBUTES_MAX = 64  # of the dataset, looked through for the file of an index
_SEQUENCES = (list, tuple, range, np.ndarray, torch.Tensor)
_SHOWN = (str, np.str_, int)  # entries that tell a person which sample it is
_PATHS = (str, np.str_, type(pathlib.Path()), type(pathlib.PurePath()))
_NEXT_STEPS = {  # by phase, and by what was found in it
    KEY_FAULT: "call it on loader.dataset[index] to repeat it; a key is an int, str or tuple of "
    "them",
    "refused": "sample = safeloader.replay(error, loader.dataset) makes the sample again, with the "
    "same random numbers",
    "refused, of a stream": "mend the data, or leave such samples out: on_error='skip'",
    ON_ERROR_FAULT: "mend the callable given as on_error=: it takes a Failure, and gives a sample "
    "or safeloader.SKIP",
    STRUCK: "no sample is to blame; next() goes on with the next batch",
    "sample": "safeloader.replay(error, loader.dataset) repeats the call here with the same random "
    "numbers, loader.dataset[{index}] with others",
    "sample of a stream": "sample {ordinal} (from 0) of worker {worker}'s stream: iterate the "
    "dataset up to it to repeat the call. In the main process get_worker_info() is None: a dataset "
    "that shares itself out by it has to be given worker {worker}'s share by hand",
    "collate": "the samples are alike in structure; loader.collate_fn([loader.dataset[i] for i in "
    "error.failure.indices]) repeats the call here",
    "collate, found": "mend the sample, or have collate_fn= take it",
    "transport": "pickle.dumps(loader.collate_fn([loader.dataset[i] for i in "
    "error.failure.indices])) may repeat it here",
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
        hint = hint_for(exc, phase, known.get("index"), found, dataset, context.length)
        return failure_of(exc, where=where, dataset_state=state, hint=hint, **known)
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
            text = f"it cannot be pickled: {found}\n{found.advice}"
            return Unrepairable(position, exc, text)
    return Unrepairable(None, exc)


def hint_for(
    exc: BaseException,
    phase: str,
    index: Any,
    found: str,
    dataset: Any = None,
    length: int | None = None,
) -> str:
    """Lines: what was found out beyond the exception, and last the next step.

    ``length`` is the dataset's, where that is known; the dataset is not asked for it here.
    """
    short = shortage(exc)
    if short is not None:
        return "\n".join(part[:1000] for part in (found, short) if part)
    parts = [found] if found else []
    refused = bool(refused_by(exc)[0])
    if type(index) is int:
        parts += _about_index(index, dataset, exc, length)
    if isinstance(exc, StopIteration) and phase == "sample" and not refused:
        parts.append(
            "a StopIteration left the dataset (a bare next() in it?); torch's own loader would "
            "have ended the epoch here without a word"
        )
    step, worker, ordinal = phase, None, None
    if found in _NEXT_STEPS:
        step = found
    elif refused:
        step = "refused, of a stream" if isinstance(dataset, IterableDataset) else "refused"
    elif phase != "sample":
        step = f"{phase}, found" if found else phase
    elif type(index) is tuple and (dataset is None or isinstance(dataset, IterableDataset)):
        step, (worker, ordinal) = "sample of a stream", index
    elif index is None:
        step = ""
    if step in _NEXT_STEPS:
        words = {"index": index_text(index), "worker": worker, "ordinal": ordinal}
        parts.append(_NEXT_STEPS[step].format(**words))
    return "\n".join(part[:1000] for part in parts)


def _about_index(index: int, dataset: Any, exc: BaseException, known: int | None) -> list[str]:
    """What the index means to the dataset: its range, its file, its number in what is under it."""
    said: list[str] = []
    with suppress(Exception):  # a hint must not hide the error
        length = plain_length(dataset)
        length = known if length is None else length
        of_index = isinstance(exc, IndexError) and not refused_by(exc)[0]
        if of_index and length is not None and not -length <= index < length:
            outside = f"index {index} is outside the dataset (length {length})"
            said.append(f"{outside}{LOOK_AT_SAMPLER}")
        inner: Any = dataset
        at, path = index, "dataset"
        while type(inner) in (Subset, ConcatDataset):
            if type(inner) is Subset:
                if type(inner.indices) not in _SEQUENCES:
                    break
                inner, at, path = inner.dataset, int(inner.indices[at]), f"{path}.dataset"
            else:
                at = range(inner.cumulative_sizes[-1])[at]  # a negative one counts from the end
                part = bisect.bisect_right(inner.cumulative_sizes, at)
                at -= inner.cumulative_sizes[part - 1] if part else 0
                inner, path = inner.datasets[part], f"{path}.datasets[{part}]"
        if inner is not dataset:
            outer = type(dataset).__name__
            said.append(
                f"index {index} of the {outer} is index {at} of the dataset under it, {path}"
            )
        length = length if inner is dataset else plain_length(inner)
        if of_index and length is not None and 0 <= at < length:
            said += _too_short(at, inner, path, length)
        said += _source(at, inner, path, exc, length)
    return said


def _rows(dataset: Any) -> Iterator[tuple[str, Any]]:
    """What the dataset holds that may have an entry for each sample."""
    for name, held in fields(dataset)[:_ATTRIBUTES_MAX]:
        rows: Any = held
        if type(held) in (list, tuple) or (type(held) is np.ndarray and rows.ndim == 1):
            yield str(name), rows


def _too_short(at: int, dataset: Any, path: str, length: int) -> list[str]:
    """What the index went past, though the dataset's length admits it."""
    for name, held in _rows(dataset):
        if 0 < len(held) <= at:
            return [
                f"{path}.{name} has {len(held)} entries, and the dataset's length is {length}: "
                "__len__ says more than there is"
            ]
    return []


def _source(at: int, dataset: Any, path: str, exc: BaseException, length: int | None) -> list[str]:
    """Where the sample of this index comes from, in a line; none where nothing tells.

    The dataset's own ``__safeloader_source__(index)`` says so. Else it is the entry of an
    attribute, ``dataset.files[37] = 'x.jpg'``: one whose file the error speaks of; failing that,
    of those with as many entries as the dataset has samples one with files, then any.
    """
    if definitions(type(dataset), "__safeloader_source__"):
        return [f"source of the sample: {bounded_text(dataset.__safeloader_source__(at))}"]
    named, files, others = [], [], []
    spoken = f"{exc.filename if isinstance(exc, OSError) else None} {exception_text(exc)}"
    for name, held in _rows(dataset):
        if not 0 <= at < len(held) or is_secret(name, held):
            continue
        entry = held[at]  # (file, label) in an ImageFolder
        file = entry[0] if type(entry) in (list, tuple) and entry else entry
        line = f"{path}.{name}[{at}] = {bounded_text(entry)}"
        if type(file) not in _PATHS or not (os.path.dirname(file) or os.path.splitext(file)[1]):
            if len(held) == length and type(file) in _SHOWN:
                others.append(line)
        elif str(file) in spoken:
            named.append(line)
        elif len(held) == length:
            files.append(line)
    return (named or files or others)[:1]
