"""Finds where the samples of a batch differ. Runs in: worker.

The samples are walked in step, level by level, and at each place those in the minority are the odd
ones. No code of the samples is run, except that a mapping which is no dict is asked for its keys
and values; the walk ends after a fixed number of values. `collating` puts what is found into words.
"""

from __future__ import annotations

import enum
import re
import types
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from safeloader.introspect.texts import bounded_text
from safeloader.introspect.values import array_facts, cut, inherits, type_name

SAMPLES_MAX = 100_000
VISITS_MAX = 300_000  # values looked at in all: about a second at worst
KEYS_MAX = 5_000  # of one mapping
ELEMENTS_MAX = 64  # of one sequence
DEPTH_MAX = 12
KEYS_SHOWN_MAX = 5

# What torch.as_tensor takes of numpy; other byte orders print as ">f4" and are refused.
_NUMERIC = re.compile("bool|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)")
# Sequences to default_collate that derive from no list or tuple: taken, but not walked into.
_FLAT = (range, bytearray, memoryview, deque, array)


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
_Groups = dict[str, list[int]]  # positions, by what they have in common


@dataclass(frozen=True)
class Finding:
    """A place where the samples differ: which are odd there, and what the majority is.

    Attributes:
        path: the place, `['image'][0]`; empty for the samples themselves.
        odd: positions in the batch, by what they are or have.
        usual: what the majority is or has, and its count; None where there is no majority.
    """

    rank: Rank
    path: str
    odd: _Groups
    usual: tuple[str, int] | None


@dataclass(frozen=True)
class Refusal:
    """A place where every sample holds what `default_collate` does not take, of these kinds."""

    path: str
    kinds: tuple[str, ...]


class Survey:
    """Walks the samples of a batch in step; `findings` and `refusals` are what `walk` came upon.

    >>> survey = Survey([{"x": 1}, {"x": 2}, {}])
    >>> survey.walk()
    >>> survey.findings
    [Finding(rank=<Rank.KEYS: 2>, path='', odd={"no key 'x'": [2]}, usual=('have it', 2))]
    """

    def __init__(self, samples: Sequence[object]) -> None:
        self.total = len(samples)
        self.findings: list[Finding] = []
        self.refusals: list[Refusal] = []
        first = dict(enumerate(islice(samples, SAMPLES_MAX)))
        self._queue: deque[tuple[str, _Values, int]] = deque([("", first, 0)])
        self._visits = 0
        self._kinds: dict[int, str] = {}  # by id of the class, which lives as long as the samples

    def walk(self) -> None:
        """Visit place after place, until all are seen or a limit is reached."""
        # Breadth first, so that a limit reached leaves out the deepest and not the last.
        while self._queue and self._visits <= VISITS_MAX:
            path, values, depth = self._queue.popleft()
            self._visits += len(values)
            alike = self._compare_kinds(path, values)
            if alike and depth < DEPTH_MAX:
                self._compare_content(path, alike, depth)

    def _compare_kinds(self, path: str, values: _Values) -> _Values:
        """Return the values of the kind that most are of."""
        kinds: _Groups = {}
        for position, value in values.items():
            kinds.setdefault(self._kind(value), []).append(position)
        if len(kinds) > 1:
            rank = Rank.LEAF if kinds.keys() <= {"number", "text", "other"} else Rank.CONTAINER
            groups: _Groups = {}
            for positions in kinds.values():
                groups.setdefault(_type(values[positions[0]]), []).extend(positions)
            self._found(Rank.NONE if "none" in kinds else rank, path, groups)
        return {position: values[position] for position in max(kinds.values(), key=len)}

    def _kind(self, value: object) -> str:
        cls = type(value)
        if id(cls) not in self._kinds:
            self._kinds[id(cls)] = _kind_of(cls)
        return self._kinds[id(cls)]

    def _compare_content(self, path: str, values: _Values, depth: int) -> None:
        kind = self._kind(next(iter(values.values())))
        if kind == "mapping":
            self._compare_mappings(path, values, depth)
        elif kind == "sequence":
            self._compare_sequences(path, values, depth)
        elif kind in ("tensor", "array"):
            self._compare_arrays(path, values)
        else:
            types_found = _by_type(values)
            self._found(Rank.TYPE, path, types_found)
            if kind in ("none", "other"):
                self._refuse(path, values, types_found)

    def _compare_mappings(self, path: str, values: _Values, depth: int) -> None:
        most = max(ELEMENTS_MAX, min(KEYS_MAX, VISITS_MAX // len(values)))
        read = {position: _items(value, most) for position, value in values.items()}
        items = {position: pairs for position, pairs in read.items() if pairs is not None}
        holders: dict[Any, list[int]] = {}
        for position, pairs in items.items():
            for key in pairs:
                holders.setdefault(key, []).append(position)
        self._visits += sum(map(len, items.values()))
        if all(len(pairs) < most for pairs in items.values()):
            self._compare_keys(path, list(items), holders)
        else:  # too many to compare one by one
            dicts = {p: value for p, value in values.items() if inherits(type(value), dict)}
            self._found(Rank.LENGTH, path, _by(dicts, lambda value: str(dict.__len__(value))))
        for key, having in holders.items():
            if 2 * len(having) > len(items):
                children = {position: items[position][key] for position in having}
                self._queue.append((f"{path}[{_key(key)}]", children, depth + 1))

    def _compare_keys(self, path: str, everyone: list[int], holders: dict[Any, list[int]]) -> None:
        missing: dict[tuple[int, ...], list[str]] = {}
        extra: dict[tuple[int, ...], list[str]] = {}
        for key, having in holders.items():
            if 2 * len(having) > len(everyone) > len(having):
                lacking = tuple(sorted({*everyone} - {*having}))
                missing.setdefault(lacking, []).append(_key(key))
            elif 2 * len(having) == len(everyone):
                self._compare_halves(path, everyone, holders, having)
                return
            elif len(having) < len(everyone):
                extra.setdefault(tuple(having), []).append(_key(key))
        odd: _Groups = {}
        for positions in missing or extra:  # a key too many harms less than one too few
            texts = []
            if positions in extra:
                texts.append(f"the extra {_keys(extra[positions])}")
            if positions in missing:
                texts.append(f"no {_keys(missing[positions])}")
            odd.setdefault(" and ".join(texts), []).extend(positions)
        if odd:
            count = sum(map(len, missing.values()))
            rest = ("do not" if count == 0 else "have it") if count < 2 else "have them"
            usual = (rest, len(everyone) - len({p for each in odd.values() for p in each}))
            self.findings.append(Finding(Rank.KEYS, path, odd, usual))

    def _compare_halves(
        self, path: str, everyone: list[int], holders: dict[Any, list[int]], having: list[int]
    ) -> None:
        """Half of the samples have keys that the other half has not: no side is the odd one."""
        others = sorted({*everyone} - {*having})
        ours = [_key(key) for key, positions in holders.items() if positions == having]
        theirs = [_key(key) for key, positions in holders.items() if positions == others]
        instead = _keys(theirs) if theirs else f"no {_keys(ours)}"
        self.findings.append(Finding(Rank.KEYS, path, {_keys(ours): having, instead: others}, None))

    def _compare_sequences(self, path: str, values: _Values, depth: int) -> None:
        bases = {p: list if inherits(type(value), list) else tuple for p, value in values.items()}
        lengths = {p: bases[p].__len__(value) for p, value in values.items()}
        self._found(Rank.LENGTH, path, _by(lengths, str))
        heads: dict[int, list[Any]] = {}
        for position, value in values.items():
            base: Any = bases[position]  # its own methods: a subclass may have overridden them
            heads[position] = list(islice(base.__iter__(value), ELEMENTS_MAX))
        self._visits += sum(map(len, heads.values()))
        for place in range(max(map(len, heads.values()))):
            children = {p: head[place] for p, head in heads.items() if place < len(head)}
            if 2 * len(children) > len(values):
                self._queue.append((f"{path}[{place}]", children, depth + 1))

    def _compare_arrays(self, path: str, values: _Values) -> None:
        facts = {position: array_facts(value) or {} for position, value in values.items()}
        shapes = _by(facts, lambda fact: str(fact.get("shape", "unknown")))
        if _majority(shapes) is None:
            # Lengths that vary are what a padding collate function is for; then see the dimensions.
            ranks = _by(facts, lambda fact: f"[{', '.join('*' for _ in fact.get('shape', ()))}]")
            shapes = ranks if len(ranks) > 1 and _majority(ranks) else shapes
        self._found(Rank.SHAPE, path, shapes)
        dtypes = _by(facts, lambda fact: str(fact.get("dtype", "unknown")))
        self._found(Rank.DTYPE, path, dtypes)
        self._found(Rank.DEVICE, path, _by(facts, lambda fact: str(fact.get("device"))))
        first = next(iter(values.values()))
        if self._kind(first) == "array" and not any(map(_NUMERIC.fullmatch, dtypes)):
            self._refuse(path, values, [f"{_type(first)} of dtype {dtype}" for dtype in dtypes])
        elif not any({"shape", "size_bytes"} <= fact.keys() for fact in facts.values()):
            self._refuse(path, values, [f"{_type(first)} that is sparse, nested or wraps another"])

    def _found(self, rank: Rank, path: str, groups: _Groups) -> None:
        if len(groups) < 2:
            return
        usual = _majority(groups)
        odd = {label: positions for label, positions in groups.items() if label != usual}
        count = (usual, len(groups[usual])) if usual is not None else None
        self.findings.append(Finding(rank, path, odd, count))

    def _refuse(self, path: str, values: _Values, labels: Iterable[str]) -> None:
        if len(values) != self.total:
            return  # some samples hold something else here, which is told as a difference
        self.refusals.append(Refusal(path, tuple(islice(labels, 3))))


# ---- one value


def _kind_of(cls: type) -> str:
    """Return what `default_collate` would treat values of a class as."""
    if cls is type(None):
        return "none"
    if inherits(cls, dict, Mapping) or cls is types.MappingProxyType:
        return "mapping"
    if inherits(cls, list, tuple):
        return "sequence"
    if inherits(cls, np.ndarray):
        return "array"
    if inherits(cls, torch.Tensor):
        return "tensor"
    if inherits(cls, int, float, np.number, np.bool_):
        return "number"
    if inherits(cls, str, bytes):
        return "text"
    return "flat" if inherits(cls, *_FLAT, Sequence) else "other"


def _items(mapping: Any, most: int) -> dict[Any, Any] | None:
    """Return what stands under keys of built-in type; keys of others may run code when compared."""
    try:
        if inherits(type(mapping), dict):
            pairs = list(islice(dict.items(mapping), most))
        else:
            pairs = [(key, mapping[key]) for key in islice(mapping, most)]
    except Exception:
        return None
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if any(type(key) is cls for cls in (str, int, float, bool, bytes, type(None))):
            found[key] = value
        elif inherits(type(key), str):
            found[str.__str__(key)] = value
    return found


def _type(value: object) -> str:
    return "None" if value is None else cut(type_name(type(value)))


def _by(values: Mapping[int, Any], label: Callable[[Any], str]) -> _Groups:
    groups: _Groups = {}
    for position, value in values.items():
        groups.setdefault(label(value), []).append(position)
    return groups


def _by_type(values: _Values) -> _Groups:
    alike: dict[int, list[int]] = {}  # a name is made once a class, not once a value
    for position, value in values.items():
        alike.setdefault(id(type(value)), []).append(position)
    groups: _Groups = {}
    for positions in alike.values():
        groups.setdefault(_type(values[positions[0]]), []).extend(positions)
    return groups


def _majority(groups: _Groups) -> str | None:
    total = sum(map(len, groups.values()))
    return next((label for label, each in groups.items() if 2 * len(each) > total), None)


def _key(key: object) -> str:
    text = bounded_text(key)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys(keys: list[str]) -> str:
    more = f" and {len(keys) - KEYS_SHOWN_MAX} more" if len(keys) > KEYS_SHOWN_MAX else ""
    return f"key{'s' * (len(keys) > 1)} {', '.join(keys[:KEYS_SHOWN_MAX])}{more}"
