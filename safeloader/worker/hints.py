"""What to do next about a failure of the user's code. Runs in: worker."""

from __future__ import annotations

import bisect
import os
import pathlib
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from safeloader.introspect.resource_exhaustion import shortage
from safeloader.introspect.texts import bounded_text, index_text, is_secret
from safeloader.introspect.values import exception_text, fields, plain_length
from safeloader.worker.repair import ON_ERROR_FAULT, STRUCK

KEY_FAULT = "raised by key=, not by the dataset"
_ATTRIBUTES_MAX = 64  # of the dataset, looked through for the file of an index
_SEQUENCES = (list, tuple, range, np.ndarray, torch.Tensor)
_PATHS = (str, np.str_, type(pathlib.Path()), type(pathlib.PurePath()))
_NEXT_STEPS = {  # by phase, and by what was found in it
    KEY_FAULT: "loader.key(loader.dataset[index]) repeats it; a key is an int, str or tuple of "
    "them",
    ON_ERROR_FAULT: "mend the callable given as on_error=: it takes a Failure, and gives a sample "
    "or safeloader.SKIP",
    STRUCK: "no sample is to blame; next() goes on with the next batch",
    "sample": "loader.replay(error) repeats the call here with the same random numbers, "
    "loader.dataset[{index}] with others",
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
    if type(index) is int:
        parts += _about_index(index, dataset, exc, length)
    if isinstance(exc, StopIteration) and phase == "sample":
        parts.append(
            "a StopIteration left the dataset (a bare next() in it?); torch's own loader would "
            "have ended the epoch here without a word"
        )
    step, worker, ordinal = phase, None, None
    if found in _NEXT_STEPS:
        step = found
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
        if isinstance(exc, IndexError) and length is not None:
            said.append(
                f"index {index} is below the length that the dataset gives, {length}: see whether "
                "__len__ says more than there is"
                if -length <= index < length
                else f"index {index} is outside the dataset (length {length}): look at the sampler"
            )
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
        said += _file(at, inner, path, exc, length if inner is dataset else plain_length(inner))
    return said


def _file(at: int, dataset: Any, path: str, exc: BaseException, length: int | None) -> list[str]:
    """The attribute that holds the file of this index: ``dataset.files[37] = 'x.jpg'``.

    That is one whose file the error speaks of. Failing that, where the error is one of the system's
    or of a reader of files, one with as many files as the dataset has samples.
    """
    named, likely = [], []
    held: Any
    spoken = f"{exc.filename if isinstance(exc, OSError) else None} {exception_text(exc)}"
    for name, held in fields(dataset)[:_ATTRIBUTES_MAX]:
        rows = type(held) in (list, tuple) or (type(held) is np.ndarray and held.ndim == 1)
        if not rows or not 0 <= at < len(held) or is_secret(str(name), held):
            continue
        entry = held[at]  # (file, label) in an ImageFolder
        file = entry[0] if type(entry) in (list, tuple) and entry else entry
        if type(file) not in _PATHS or not (os.path.dirname(file) or os.path.splitext(file)[1]):
            continue
        line = f"{path}.{name}[{at}] = {bounded_text(entry)}"
        if str(file) in spoken:
            named.append(line)
        elif isinstance(exc, OSError) and len(held) == length:
            likely.append(line)
    return (named or likely)[:1]
