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

from safeloader.introspect.frames import causes_of, paths_handled, paths_in, paths_said
from safeloader.introspect.index_ways import INDEX, Way, ways_of
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
_LOCALS_MAX = 8  # paths in the locals of the failing frames
_PARTS_MAX = 16  # of one entry, searched for a path
_SEQUENCES = (list, tuple, range, np.ndarray, torch.Tensor)
# How the code of the dataset comes to an entry: by the sample's index; by another list that maps
# it; by a way that it does not show; by something else than the index, so that it may be another.
READ, MAPPED, UNSEEN, PERHAPS = range(4)


class Entry(NamedTuple):
    """What the dataset holds for a sample.

    Attributes:
        path: where it stands.
        value: itself.
        for_samples: whether its list is one for samples; None where their number is not known.
        way: what the code says of it: ``READ``, ``MAPPED``, ``UNSEEN`` or ``PERHAPS``.
    """

    path: str
    value: Any
    for_samples: bool | None
    way: int

    def __str__(self) -> str:
        perhaps = "perhaps " if self.way == PERHAPS else ""
        return f"{perhaps}{self.path} = {_text(self.value)}"


def source_of(
    dataset: Any, index: Any, exc: BaseException | None, length: int | None = None
) -> str:
    """Where the sample of ``index`` comes from, in a line; "" where nothing tells.

    In this order: what the dataset's own ``__safeloader_source__(index)`` says; the entry of a list
    or table of the dataset that the error, or a local of the user's failing frames, speaks of;
    another path that the error carries; one in these locals; an entry that is a path, of a list
    with as many entries as the dataset has samples; any other entry of such a list. Which entry is
    the sample's is read from the code (``files[i]``, ``files[order[i]]``); "perhaps" is said of one
    where the code asks for something else than the index.

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
    if inner is dataset:
        length = plain_length(inner) if length is None else length
    else:
        length = plain_length(inner)
    files, others = [], []
    for entry in () if streams else _entries(inner, path, at, length):
        file, said = _path_in(entry)
        if file is not None:
            files.append((file, said))
        elif entry.for_samples and not _dull(entry.value):
            others.append(said)
    files.sort(key=lambda each: each[1].way)
    others.sort(key=lambda each: (each.way == PERHAPS, _numbers_last(each)))
    if exc is not None and (named := _named(exc, files)):
        return named
    for _, entry in files:
        if entry.for_samples is not False:
            return str(entry)
    return str(others[0]) if others else ""


def _named(exc: BaseException, files: list[tuple[str, Entry]]) -> str:
    """The path that an error, or the user's frames that it went through, speak of; "" if none.

    Args:
        exc: what was raised.
        files: the entries of the dataset that are paths.
    """
    local = list(paths_in(exc))[:_LOCALS_MAX]
    carried, in_texts = paths_said(exc)
    spoken = " ".join([*map(exception_text, causes_of(exc)), *carried])
    for file, entry in files:
        if (
            _in_text(file, spoken)
            or any(_ends_with(file, each) for each in [*carried, *in_texts])
            or (entry.way != MAPPED and any(_ends_with(str(each[1]), file) for each in local))
        ):
            return str(entry._replace(way=READ))
    likely = [file for file, entry in files if entry.for_samples is not False]
    kin = [each for each in in_texts if any(_are_kin(each, file) for file in likely)]
    for said in [*carried, *kin]:
        for name, value, where in local:
            if name != "self" and (_ends_with(str(value), said) or _ends_with(said, str(value))):
                return _of_local(name, value, where, files)
        if likely or said not in exception_text(exc):  # which is told anyway
            return f"the error names {path_text(said)}"
    close = [each for each in local if any(_are_kin(str(each[1]), file) for file in likely)]
    known = any(entry.way == READ for file, entry in files if file in likely)
    named = [each for each in local if _has_suffix(each[1])]
    for found in close or (() if known else named) or (() if likely else local):
        return _of_local(*found, files)
    for before in () if known else [each for paths in paths_handled(exc) for each in paths]:
        if not likely or any(_are_kin(before, file) for file in likely):
            return f"the error before it names {path_text(before)}"
    return ""


def _of_local(name: str, value: Any, where: str, files: list[tuple[str, Entry]]) -> str:
    entries = [entry.path for file, entry in files if _ends_with(str(value), file)]
    which = f"; it is {entries[0]}" if entries else ""
    return f"{name} = {path_text(value)} in {where}{which}"


def _in_text(file: str, text: str) -> bool:
    """Whether a text has this path, and not one that it is a part of: ``1.png`` in ``11.png``."""
    at = text.find(file)
    while at >= 0:
        before, after = text[at - 1 : at], text[at + len(file) : at + len(file) + 2]
        if not _inside(before) and not _inside(after[:1]) and not _goes_on(after):
            return True
        at = text.find(file, at + 1)
    return False


def _inside(character: str) -> bool:
    return character.isalnum() or character in ("_", "-")


def _goes_on(after: str) -> bool:
    return after[:1] in ("/", "\\") or (after[:1] == "." and _inside(after[1:]))


def _ends_with(path: str, file: str) -> bool:
    """Whether a path is this one, or this one below a folder."""
    return path == file or (path.endswith(file) and path[-len(file) - 1] in "/\\")


def _are_kin(one: str, other: str) -> bool:
    """Whether two paths are of one kind: with the same suffix, or, without one, in one folder."""
    (folder, name), (of_other, its_name) = _split(one), _split(other)
    suffix, its_suffix = name.rpartition(".")[1:], its_name.rpartition(".")[1:]
    if suffix[0] and its_suffix[0]:
        return suffix[1].lower() == its_suffix[1].lower()
    return not suffix[0] and not its_suffix[0] and folder == of_other


def _split(path: str) -> tuple[str, str]:
    folder, _, name = path.replace("\\", "/").rpartition("/")
    return folder, name


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
            return str(part), entry._replace(path=f"{entry.path}{step}", value=part)
    return None, entry


def _entries(dataset: Any, path: str, at: Any, length: int | None) -> Iterator[Entry]:
    """The entries at ``at`` of the lists and tables that the dataset holds, the nearest first."""
    todo = deque([(path, dataset, at, length, UNSEEN, "")])
    seen = {id(dataset)}
    for _ in range(_OBJECTS_MAX):
        if not todo:
            return
        where, thing, at, length, way, below = todo.popleft()
        held_here = fields(thing, _ATTRIBUTES_MAX)
        if dict(held_here).get("_indices") is not None:  # datasets': rows in another order
            held_here = [(name, held) for name, held in held_here if name != "_data"]
        for name, held in held_here:
            step = f"{where}.{name}"
            if id(held) in seen or is_secret(str(name), held):
                continue
            ways = ways_of(type(thing), name)
            if below:  # ``self.settings.files[i]``
                ways |= ways_of(type(dataset), f"{below}.{name}")
            place, how = _place(thing, ways, at)
            shown = how in (READ, MAPPED)
            if way in (MAPPED, PERHAPS):
                how = PERHAPS if PERHAPS in (how, way) else MAPPED
            found = [each._replace(way=how) for each in _entries_in(held, step, place, length)]
            if how == MAPPED:  # a list that is mapped may be of any length
                found = [each._replace(for_samples=True if shown else None) for each in found]
            yield from found
            depth = step.count(".") - path.count(".")
            if not found and depth <= _DEPTH and _is_object(held):
                seen.add(id(held))
                inner, of_inner, known = held, place, length
                with suppress(Exception):  # an index that the one below does not have
                    if type(place) is int and type(held) in (Subset, ConcatDataset):
                        inner, of_inner, under = inner_dataset(held, place)
                        step += under.removeprefix("dataset")
                        known = plain_length(inner)
                name = str(name) if thing is dataset else ""
                todo.append((step, inner, of_inner, known, how, name))


def _place(owner: Any, ways: frozenset[Way], at: Any) -> tuple[Any, int]:
    """Which entry the code reads for ``at``, going by what it asks for, and how that is known."""
    if not ways:
        return at, UNSEEN
    if ways == {INDEX}:
        return at, READ
    if len(ways) == 1 and type(at) is int:
        with suppress(Exception):  # a mapping that is not to be read here, or lacks it
            held, place = dict(fields(owner, _ATTRIBUTES_MAX)), at
            for name in reversed(next(iter(ways))):
                if type(held[name]) not in (*_SEQUENCES, dict):
                    raise LookupError(name)
                found = held[name][place]
                if not isinstance(found, int | np.integer) and type(found) is not torch.Tensor:
                    raise LookupError(name)
                place = int(found)
            return place, MAPPED
    return at, PERHAPS


def _entries_in(held: Any, path: str, at: Any, length: int | None) -> Iterator[Entry]:
    def entry(path: str, value: Any, rows: int) -> Entry:
        return Entry(path, value, None if length is None else rows == length, UNSEEN)

    if (rows := table_rows(held)) is not None:
        if type(at) is int and 0 <= at < rows:
            for step, value in cells(held, at):
                if not is_secret(step, value):
                    yield entry(f"{path}{step}", value, rows)
    elif type(held) is dict:
        if type(at) in (int, str) and all(type(key) is type(at) for key in islice(held, 100)):
            with suppress(KeyError):
                yield entry(f"{path}[{at!r}]", held[at], len(held))
        elif type(at) is int:
            for name, column in list(held.items())[:_PARTS_MAX]:
                if type(name) is str and _is_list(column) and not is_secret(name, column):
                    yield from _entries_in(column, f"{path}[{key_text(name)}]", at, length)
    elif type(at) is int and _is_list(held) and 0 <= at < len(held):
        yield entry(f"{path}[{at}]", held[at], len(held))


def _is_list(held: Any) -> bool:
    return type(held) in (list, tuple) or (type(held) is np.ndarray and held.ndim == 1)


def _is_object(held: Any) -> bool:
    """Whether it is worth a look inside: an object with attributes, no container and no array."""
    if own_length(held) is not None or array_facts(held) is not None:
        return False
    return not inherits(type(held), type, types.ModuleType) and bool(fields(held))
