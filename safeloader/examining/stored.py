"""What a dataset holds, in prints: to see whether fetching changes it. Runs in: main."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch

from safeloader.introspect.fingerprint import fingerprint
from safeloader.introspect.texts import key_text
from safeloader.introspect.values import container_base, fields, held_by, inherits, type_name

_WHOLE_BYTES = 1 << 24  # of an array that is read as a whole; of a larger one, some rows
_DEPTH = 4
_OBJECTS = 3000
_FIRST = 64  # elements of a container, besides those asked for
_S = 1.0


class Held(NamedTuple):
    """One thing that is held: its kind, a print of its value, and its length if it has one.

    ``element`` says that it stands for an index: a row of an array, an element of a container.
    """

    kind: str
    value: int
    element: bool


def stored(dataset: Any, indices: list[Any]) -> dict[str, Held]:
    """What a dataset holds, by path; of what is long, the elements of these indices."""
    found: dict[str, Held] = {}
    end = time.monotonic() + _S
    seen: dict[int, Any] = {}
    queue: deque[tuple[Any, str, int, bool]] = deque([(dataset, "dataset", 0, False)])
    while queue and len(seen) < _OBJECTS and time.monotonic() < end:
        value, path, depth, element = queue.popleft()
        cls = type(value)
        if value is None or cls in (int, float, bool, complex, str, bytes):
            found[path] = Held(cls.__name__, crc32(repr(value).encode("utf-8", "replace")), element)
            continue
        if id(value) in seen or depth > _DEPTH:
            continue
        seen[id(value)] = value
        if inherits(cls, torch.Tensor, np.ndarray):
            _array(found, value, path, indices, element)
            continue
        if inherits(cls, type, torch.Generator, np.random.Generator, np.random.RandomState):
            continue
        base = container_base(cls)
        if base in (set, frozenset):
            continue
        if base is not None:
            wanted = [index for index in indices if _is_in(value, base, index)]
            pairs = held_by(value, _FIRST)
            pairs += [(index, base.__getitem__(value, index)) for index in wanted]
            for key, each in pairs:
                # An element of a dict is one of the dataset's if it stands under an index.
                of_index = element or base is not dict or key in wanted
                queue.append((each, f"{path}[{key_text(key)}]", depth + 1, of_index))
        for name, each in fields(value, 256) if cls is not base else ():
            queue.append((each, f"{path}.{name}", depth + 1, element))
    return found


def _is_in(value: Any, base: Any, index: Any) -> bool:
    if base is dict:
        return type(index) in (int, str, tuple) and dict.__contains__(value, index)
    return type(index) is int and 0 <= index < base.__len__(value)


def _array(
    found: dict[str, Held], value: Any, path: str, indices: list[Any], element: bool
) -> None:
    try:
        size, shape = value.nbytes, tuple(value.shape)
        kind = f"{type_name(type(value))} {value.dtype} {shape}"
        if size <= _WHOLE_BYTES:
            found[path] = Held(kind, _print(value), element)
        if shape and shape[0] > 1:
            for row in indices:
                if type(row) is int and 0 <= row < shape[0]:
                    found[f"{path}[{row}]"] = Held("row", _print(value[row]), True)
    except Exception:  # of a kind that cannot be read
        return


def _print(value: Any) -> int:
    return crc32(repr(fingerprint(value, None)).encode("utf-8", "replace"))


class Change(NamedTuple):
    """What of a dataset is not as it was."""

    path: str
    element: bool


def changes(before: dict[str, Held], after: dict[str, Held]) -> list[Change]:
    """What was there before and is another value of the same kind now; elements first.

    What was None (a cache, a handle that is opened at first use) and what was added are no change.
    """
    found = [
        Change(path, was.element)
        for path, was in before.items()
        if path in after and after[path].kind == was.kind and after[path].value != was.value
    ]
    return sorted(found, key=lambda change: not change.element)
