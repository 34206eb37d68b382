"""Finds where the samples of a batch differ. Runs in: worker.

The samples are walked in step, level by level, and at each place those in the minority are odd. No
code of the samples runs, except that a mapping which is no dict is asked for its keys and values.
The walk ends after a fixed number of values. The worker puts what is found into words.
"""

from __future__ import annotations

import enum
import re
import types
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from safeloader.introspect.texts import key_text
from safeloader.introspect.values import (
    array_facts,
    container_base,
    cut,
    held_by,
    inherits,
    own_length,
    type_name,
)

VISITS_MAX = 300_000  # values looked at in all: about a second at worst
KEYS_MAX = 5_000  # of one mapping
ELEMENTS_MAX = 64  # of one sequence
DEPTH_MAX = 12
KEYS_SHOWN_MAX = 5

# What torch.as_tensor takes of numpy; other byte orders print as ">f4" and are refused.
_NUMERIC = re.compile("bool|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)")
# What default_collate treats values as, by their class; what is in none is "other". It takes flat
# sequences, which derive from no list or tuple; they are not walked into here.
_KINDS: dict[str, tuple[Any, ...]] = {
    "none": (type(None),),
    "mapping": (dict, Mapping, types.MappingProxyType),
    "sequence": (list, tuple),
    "array": (np.ndarray,),
    "tensor": (torch.Tensor,),
    "number": (int, float, np.number, np.bool_),
    "text": (str, bytes),
    "flat": (range, bytearray, memoryview, deque, array, Sequence),
}
_PLAIN_KEYS = (str, int, float, bool, bytes, type(None))


class Rank(enum.IntEnum):
    """Differences by how surely they break a collate function, gravest first."""

    NONE = 0
    CONTAINER = 1
    KEYS = 2
    LENGTH = 3
    SHAPE = 4
    DEVICE = 5
    DTYPE = 6
    LEAF = 7  # a number among strings
    TYPE = 8  # an int among floats, which default_collate takes


_Values = dict[int, Any]  # by position in the batch
_Groups = dict[Any, list[int]]  # positions, by what they have in common


class Finding(NamedTuple):
    """A place where the samples differ: which are odd there, and what the majority is.

    Attributes:
        path: the place, ``['image'][0]``; empty for the samples themselves.
        odd: positions in the batch, by what they are or have.
        usual: what the majority is or has, and its count; None where there is no majority.
    """

    rank: Rank
    path: str
    odd: _Groups
    usual: tuple[str, int] | None


class Survey:
    """Walks the samples of a batch in step; ``walk`` fills ``findings`` and ``refusals``.

    Attributes:
        total: how many samples there are.
        findings: where they differ, in the order of the walk.
        refusals: the places where every sample holds what ``default_collate`` does not take, and of
            which kinds.

    >>> survey = Survey([{"x": 1}, {"x": 2}, {}])
    >>> survey.walk()
    >>> survey.findings
    [Finding(rank=<Rank.KEYS: 2>, path='', odd={"no key 'x'": [2]}, usual=('have it', 2))]
    """

    def __init__(self, samples: Sequence[object]) -> None:
        self.total = len(samples)
        self.findings: list[Finding] = []
        self.refusals: list[tuple[str, list[str]]] = []
        first = dict(enumerate(samples))
        self._queue: deque[tuple[str, _Values, int]] = deque([("", first, 0)])
        self._visits = 0
        # Kind and name, by id of the class, which lives as long as the samples.
        self._classes: dict[int, tuple[str, str]] = {}

    def walk(self) -> None:
        """Visit place after place, until all are seen or a limit is reached."""
        # Breadth first, so that a limit reached leaves out the deepest and not the last.
        while self._queue and self._visits <= VISITS_MAX:
            path, values, depth = self._queue.popleft()
            self._visits += len(values)
            kind, alike = self._compare_kinds(path, values)
            if depth == DEPTH_MAX:
                continue
            if kind in ("mapping", "sequence"):
                self._compare_parts(path, alike, depth, mapping=kind == "mapping")
            elif kind in ("tensor", "array"):
                self._compare_arrays(path, alike, kind)
            else:
                names = _by(alike, lambda value: self._class_of(value)[1])
                self._found(Rank.TYPE, path, names)
                if kind in ("none", "other"):
                    self._refuse(path, alike, names)

    def _compare_kinds(self, path: str, values: _Values) -> tuple[str, _Values]:
        """Return the kind that most values are of, and those values."""
        kinds = _by(values, lambda value: self._class_of(value)[0])
        if len(kinds) > 1:
            rank = Rank.LEAF if kinds.keys() <= {"number", "text", "other"} else Rank.CONTAINER
            names = {self._class_of(values[each[0]])[1]: each for each in kinds.values()}
            self._found(Rank.NONE if "none" in kinds else rank, path, names)
        usual = max(kinds, key=lambda kind: len(kinds[kind]))
        return usual, {position: values[position] for position in kinds[usual]}

    def _class_of(self, value: object) -> tuple[str, str]:
        """Return the kind of a value, and the name of its class."""
        cls = type(value)
        if id(cls) not in self._classes:
            kinds = (kind for kind, bases in _KINDS.items() if inherits(cls, *bases))
            name = "None" if value is None else cut(type_name(cls))
            self._classes[id(cls)] = next(kinds, "other"), name
        return self._classes[id(cls)]

    def _compare_parts(self, path: str, values: _Values, depth: int, *, mapping: bool) -> None:
        """Compare keys or lengths, and queue the places that more than half of the values have."""
        most = max(ELEMENTS_MAX, min(KEYS_MAX, VISITS_MAX // len(values)) if mapping else 0)
        parts = {position: _parts(value, most) for position, value in values.items()}
        holders: _Groups = {}
        for position, found in parts.items():
            for key in found:
                holders.setdefault(key, []).append(position)
        self._visits += sum(map(len, parts.values()))
        if mapping and all(len(found) < most for found in parts.values()):
            self._compare_keys(path, parts, holders)
        else:  # keys too many to compare one by one, or none
            self._found(Rank.LENGTH, path, _by(values, lambda value: str(own_length(value))))
        for key, having in holders.items():
            if 2 * len(having) > len(parts):
                children = {position: parts[position][key] for position in having}
                self._queue.append((f"{path}[{key_text(key)}]", children, depth + 1))

    def _compare_keys(self, path: str, parts: dict[int, dict[Any, Any]], holders: _Groups) -> None:
        twice = {key: 2 * len(having) for key, having in holders.items()}
        total = len(parts)
        if total in twice.values():  # held by half of them: no side is the odd one
            sides = _by(parts, lambda found: _keys([key for key in found if twice[key] == total]))
            if rest := sides.pop("", []):
                sides[f"no {', '.join(sides)}"] = rest
            return self._found(Rank.KEYS, path, sides)
        lacked = [key for key in holders if total < twice[key] < 2 * total]

        def oddity(found: dict[Any, Any]) -> str:
            extra = _keys([key for key in found if twice[key] < total])
            lacks = _keys([key for key in lacked if key not in found])
            if lacked and not lacks:  # a key too many harms less
                return ""
            told = [f"the extra {extra}"] if extra else []
            told += [f"no {lacks}"] if lacks else []
            return " and ".join(told)

        odd = _by(parts, oddity)
        usual = len(odd.pop("", []))
        if odd:
            words = "have them" if len(lacked) > 1 else "have it" if lacked else "do not"
            self.findings.append(Finding(Rank.KEYS, path, odd, (words, usual)))

    def _compare_arrays(self, path: str, values: _Values, kind: str) -> None:
        facts = {position: array_facts(value) or {} for position, value in values.items()}

        def by(name: str) -> _Groups:
            return _by(facts, lambda fact: str(fact.get(name, "unknown")))

        shapes, dtypes = by("shape"), by("dtype")
        if _majority(shapes) is None:
            # Lengths that vary are what a padding collate function is for; then see the dimensions.
            ranks = _by(facts, lambda fact: f"[{', '.join('*' for _ in fact.get('shape', ()))}]")
            shapes = ranks if len(ranks) > 1 and _majority(ranks) else shapes
        self._found(Rank.SHAPE, path, shapes)
        self._found(Rank.DTYPE, path, dtypes)
        self._found(Rank.DEVICE, path, by("device"))
        name = self._class_of(next(iter(values.values())))[1]
        if kind == "array" and not any(map(_NUMERIC.fullmatch, dtypes)):
            self._refuse(path, values, [f"{name} of dtype {dtype}" for dtype in dtypes])
        elif not any({"shape", "size_bytes"} <= fact.keys() for fact in facts.values()):
            self._refuse(path, values, [f"{name} that is sparse, nested or wraps another"])

    def _found(self, rank: Rank, path: str, groups: _Groups) -> None:
        if len(groups) < 2:
            return
        usual = _majority(groups)
        odd = {label: each for label, each in groups.items() if (label, len(each)) != usual}
        self.findings.append(Finding(rank, path, odd, usual))

    def _refuse(self, path: str, values: _Values, labels: Iterable[str]) -> None:
        if len(values) == self.total:  # else some hold another thing here: that is a difference
            self.refusals.append((path, [*islice(labels, 3)]))


# ---- one value


def _parts(value: Any, most: int) -> dict[Any, Any]:
    """Return what stands under keys of built-in type; keys of others may run code when compared."""
    found: dict[Any, Any] = {}
    with suppress(Exception):  # as a mapping that is no dict may: it counts as one without keys
        if container_base(type(value)) is None:
            pairs = [(key, value[key]) for key in islice(value, most)]
        else:
            pairs = held_by(value, most)
        for key, part in pairs:
            name = str.__str__(key) if inherits(type(key), str) else key
            if any(type(name) is cls for cls in _PLAIN_KEYS):
                found[name] = part
    return found


def _by(values: Mapping[int, Any], label: Callable[[Any], Any]) -> _Groups:
    groups: _Groups = {}
    for position, value in values.items():
        groups.setdefault(label(value), []).append(position)
    return groups


def _majority(groups: _Groups) -> tuple[str, int] | None:
    label = max(groups, key=lambda label: len(groups[label]))
    count = len(groups[label])
    return (label, count) if 2 * count > sum(map(len, groups.values())) else None


def _keys(keys: list[Any]) -> str:
    more = f" and {len(keys) - KEYS_SHOWN_MAX} more" if len(keys) > KEYS_SHOWN_MAX else ""
    shown = ", ".join(map(key_text, keys[:KEYS_SHOWN_MAX]))
    return f"key{'s' * (len(keys) > 1)} {shown}{more}" if keys else ""
