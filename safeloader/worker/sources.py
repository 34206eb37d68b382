"""Which file, URL or entry a sample comes from, as far as it can be told. Runs in: worker.

Said of every sample that fails, whatever was raised: in the error, in the ``Failure`` that an
``on_error`` callable gets, and in the reason that the audit and the log give for a sample that was
left out. It is looked at, and nothing of the user's runs but ``__safeloader_source__``, which is
written for this.
"""

from __future__ import annotations

import bisect
import types
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from safeloader.introspect.frames import paths_in
from safeloader.introspect.tables import cells, table_rows
from safeloader.introspect.texts import bounded_text, is_path, is_secret, key_text, path_text
from safeloader.introspect.values import (
    array_facts,
    container_base,
    cut,
    definitions,
    exception_text,
    fields,
    held_by,
    inherits,
    own_length,
    plain_length,
)

SOURCE_CHARS = 600
_ATTRIBUTES_MAX = 64  # of one object
_OBJECTS_MAX = 64  # below the dataset, that are looked into
_DEPTH = 2  # levels below the dataset: what a wrapper wraps, and what that holds
_PARTS_MAX = 16  # of one entry, searched for a path
_SEQUENCES = (list, tuple, range, np.ndarray, torch.Tensor)


class Entry(NamedTuple):
    """What the dataset holds for a sample: where it stands, itself, and whether its list is one for
    samples (None: not known, as the number of samples is not)."""

    path: str
    value: Any
    for_samples: bool | None

    def __str__(self) -> str:
        return f"{self.path} = {_text(self.value)}"


def source_of(
    dataset: Any, index: Any, exc: BaseException | None, length: int | None = None
) -> str:
    """Where the sample of ``index`` comes from, in a line; "" where nothing tells.

    In this order: what the dataset's own ``__safeloader_source__(index)`` says; the entry of a list
    or table of the dataset that the error, or a local of the user's failing frames, speaks of; a
    path in these locals; an entry that is a path, of a list with as many entries as the dataset has
    samples; any other entry of such a list.

    Args:
        dataset: the loader's; under a Subset or ConcatDataset the entry is that of the one below.
        index: the sample's.
        exc: what was raised, with its traceback; None where nothing is known of it.
        length: the dataset's, where that is known; the dataset is not asked for it here.

    >>> class Scans:
    ...     def __init__(self):
    ...         self.files = ["a/0.png", "a/1.png"]
    >>> source_of(Scans(), 1, ValueError("bad header"), 2)
    "dataset.files[1] = 'a/1.png'"
    """
    try:
        return cut(_told(dataset, index, exc, length), SOURCE_CHARS)
    except Exception:  # it must not hide the error
        return ""


def inner_dataset(dataset: Any, index: int) -> tuple[Any, int, str]:
    """The dataset under Subset and ConcatDataset, its index of the sample, and its path.

    >>> inner_dataset(Subset([7, 8, 9], [2, 0]), 0)
    ([7, 8, 9], 2, 'dataset.dataset')
    """
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
    return inner, at, path


def rows_of(dataset: Any, path: str = "dataset") -> Iterator[tuple[str, Any]]:
    """The lists that the dataset itself holds, which may have an entry for each sample."""
    for name, held in fields(dataset, _ATTRIBUTES_MAX):
        if _is_list(held):
            yield f"{path}.{name}", held


def _told(dataset: Any, index: Any, exc: BaseException | None, length: int | None) -> str:
    inner, at, path = dataset, index, "dataset"
    if isinstance(index, int | np.integer) and not isinstance(index, bool):
        at = int(index)
        with suppress(Exception):  # an index outside
            inner, at, path = inner_dataset(dataset, at)
    streams = isinstance(dataset, IterableDataset)
    if definitions(type(inner), "__safeloader_source__") and not streams:
        with suppress(Exception):
            source = inner.__safeloader_source__(at)
            return f"source of the sample: {_text(source)}"
        return ""
    local = [] if exc is None else list(paths_in(exc))[:8]
    spoken = "" if exc is None else exception_text(exc)
    if isinstance(exc, OSError):
        spoken += f" {exc.filename}"
    if inner is dataset:
        length = plain_length(inner) if length is None else length
    else:
        length = plain_length(inner)
    named, files, others = [], [], []
    for entry in () if streams else _entries(inner, path, at, length):
        file, said = _path_in(entry)
        if file is not None and _speaks_of(file, spoken, local):
            named.append(said)
        elif file is not None and entry.for_samples is not False:
            files.append(said)
        elif file is None and entry.for_samples and not _dull(entry.value):
            others.append(said)
    if named:
        return str(named[0])
    certain = [each for each in local if _has_suffix(each[1])]
    for name, value, where in certain or (() if files else local):
        return f"{name} = {path_text(value)} in {where}"
    for entry in [*files, *sorted(others, key=_numbers_last)]:
        return str(entry)
    return ""


def _speaks_of(file: str, spoken: str, local: list[tuple[str, Any, str]]) -> bool:
    """Whether the error, or a local of the failing frames, has this path, or ends with it."""
    return file in spoken or any(str(value).endswith(file) for _, value, _ in local)


def _has_suffix(value: Any) -> bool:
    """Whether a path names a file rather than a folder, by its look."""
    text = str(value)
    return "://" in text or "." in text.replace("\\", "/").rpartition("/")[2].lstrip(".")


def _text(value: Any) -> str:
    return path_text(value) if is_path(value) else bounded_text(value)


def _dull(value: Any) -> bool:
    """Whether it tells nobody which sample it is."""
    return value is None or inherits(type(value), float, bool, np.floating, np.bool_)


def _numbers_last(entry: Entry) -> int:
    cls = type(entry.value)
    if cls is str or cls is np.str_:
        return 0
    return 1 if container_base(cls) is not None or fields(entry.value) else 2


def _path_in(entry: Entry) -> tuple[str | None, Entry]:
    """The path that an entry is, or holds, and how to tell it: ``(file, label)`` as a whole."""
    value = entry.value
    if is_path(value):
        return str(value), entry
    base = container_base(type(value))
    for name, part in held_by(value, _PARTS_MAX):
        if is_path(part) and not is_secret(str(name), part):
            if base in (list, tuple) and repr(str(part)) in bounded_text(value):
                return str(part), entry
            step = f".{name}" if base is None else f"[{key_text(name)}]"
            return str(part), Entry(f"{entry.path}{step}", part, entry.for_samples)
    return None, entry


def _entries(dataset: Any, path: str, at: Any, length: int | None) -> Iterator[Entry]:
    """The entries at ``at`` of the lists and tables that the dataset holds, the nearest first."""
    todo = deque([(path, dataset, at, length, 0)])
    seen = {id(dataset)}
    for _ in range(_OBJECTS_MAX):
        if not todo:
            return
        where, thing, at, length, depth = todo.popleft()
        held_here = fields(thing, _ATTRIBUTES_MAX)
        if dict(held_here).get("_indices") is not None:  # datasets': rows in another order
            held_here = [(name, held) for name, held in held_here if name != "_data"]
        for name, held in held_here:
            step = f"{where}.{name}"
            if id(held) in seen or is_secret(str(name), held):
                continue
            found = list(_entries_in(held, step, at, length))
            yield from found
            if not found and depth < _DEPTH and _is_object(held):
                seen.add(id(held))
                inner, of_inner, known = held, at, length
                with suppress(Exception):  # an index that the one below does not have
                    if type(at) is int and type(held) in (Subset, ConcatDataset):
                        inner, of_inner, below = inner_dataset(held, at)
                        step += below.removeprefix("dataset")
                        known = plain_length(inner)
                todo.append((step, inner, of_inner, known, depth + 1))


def _entries_in(held: Any, path: str, at: Any, length: int | None) -> Iterator[Entry]:
    def right(rows: int) -> bool | None:
        return None if length is None else rows == length

    if (rows := table_rows(held)) is not None:
        if type(at) is int and 0 <= at < rows:
            for step, value in cells(held, at):
                if not is_secret(step, value):
                    yield Entry(f"{path}{step}", value, right(rows))
    elif type(held) is dict:
        if type(at) in (int, str) and all(type(key) is type(at) for key in islice(held, 100)):
            with suppress(KeyError):
                yield Entry(f"{path}[{at!r}]", held[at], right(len(held)))
        elif type(at) is int:
            for name, column in list(held.items())[:_PARTS_MAX]:
                if type(name) is str and _is_list(column) and not is_secret(name, column):
                    yield from _entries_in(column, f"{path}[{key_text(name)}]", at, length)
    elif type(at) is int and _is_list(held) and 0 <= at < len(held):
        yield Entry(f"{path}[{at}]", held[at], right(len(held)))


def _is_list(held: Any) -> bool:
    return type(held) in (list, tuple) or (type(held) is np.ndarray and held.ndim == 1)


def _is_object(held: Any) -> bool:
    """Whether it is worth a look inside: an object with attributes, no container and no array."""
    if own_length(held) is not None or array_facts(held) is not None:
        return False
    return not inherits(type(held), type, types.ModuleType) and bool(fields(held))
