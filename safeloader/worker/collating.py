"""Runs in a worker (in main with `num_workers=0`): names the sample a collate function fell over.

In come the samples of a batch and their dataset indices, out goes a sentence for the failure's
report. "stack expects each tensor to be equal size" leaves the search to the reader; but a sample
that is not built like the others can be found by comparing them. The samples are walked in step,
level by level, and at each place those in the minority are the odd ones. Of all differences only
the gravest are told, in the order of `_Rank`. No code of the samples is run, except that a mapping
which is no dict is asked for its keys and values; the walk ends after a fixed number of values.
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

from safeloader.wire.dataset_state import array_facts, bounded_text, inherits, type_name

SAMPLES_MAX = 100_000
VISITS_MAX = 300_000  # values looked at in all: about a second at worst
KEYS_MAX = 5_000  # of one mapping
ELEMENTS_MAX = 64  # of one sequence
DEPTH_MAX = 12
SHOWN_MAX = 5  # groups, and indices of one group, in a sentence

_TAKES = "default_collate takes tensors, numpy arrays, numbers, strings, dicts and lists"
# What torch.as_tensor takes of numpy; other byte orders print as ">f4" and are refused.
_NUMERIC = re.compile("bool|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)")
# Sequences to default_collate that derive from no list or tuple: taken, but not walked into.
_FLAT = (range, bytearray, memoryview, deque, array)


@dataclass(frozen=True)
class Explanation:
    """Which sample is not built like the others of its batch.

    Attributes:
        position: position in the batch of the odd sample; None unless there is exactly one.
        text: one or a few sentences for a person.
    """

    position: int | None
    text: str


def explain(samples: Sequence[object], indices: Sequence[object]) -> Explanation | None:
    """Find what keeps the samples of a batch from being collated, and which sample is to blame.

    Args:
        samples: what the dataset returned, in the order of the batch.
        indices: the dataset index of each; where it is None or missing, the position is named.

    Returns:
        None where the samples are built alike and `default_collate` can take what they hold.
        Never raises.

    >>> explain([{"x": 1}, {"x": 2}, {}], [10, 11, 12]).text
    "dataset index 12 (position 2) has no key 'x'; the other 2 have it"
    """
    try:
        survey = _Survey(len(samples))
        survey.walk(dict(enumerate(islice(samples, SAMPLES_MAX))))
        return _verdict(survey, indices)
    except Exception:
        return None  # an explanation that fails must not hide the error it is to explain


class _Rank(enum.IntEnum):
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


# By rank: what differs, how one odd sample is told, and how the majority is.
_WORDS = {
    _Rank.NONE: ("type", "is {}", "; {} are {}"),
    _Rank.CONTAINER: ("type", "is {}", "; {} are {}"),
    _Rank.KEYS: ("keys", "has {}", "; {} {}"),
    _Rank.LENGTH: ("length", "has {} elements", ", {} have {}"),
    _Rank.SHAPE: ("shape", "has shape {}", ", {} have {}"),
    _Rank.DEVICE: ("device", "is on {}", ", {} are on {}"),
    _Rank.DTYPE: ("dtype", "has dtype {}", ", {} have {}"),
    _Rank.LEAF: ("type", "is {}", "; {} are {}"),
    _Rank.TYPE: ("type", "is {}", "; {} are {}"),
}

_Values = dict[int, Any]  # by position in the batch
_Groups = dict[str, list[int]]  # positions, by what they have in common


@dataclass(frozen=True)
class _Finding:
    rank: _Rank
    path: str
    odd: _Groups
    usual: tuple[str, int] | None  # what the majority is, and its count; None: there is no majority


class _Survey:
    """Walks samples in step and collects where they differ, and what cannot be collated."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.findings: list[_Finding] = []
        self.refused: list[str] = []  # what every sample holds that default_collate does not take
        self._queue: deque[tuple[str, _Values, int]] = deque()
        self._visits = 0
        self._kinds: dict[int, str] = {}  # by id of the class, which lives as long as the samples

    def walk(self, samples: _Values) -> None:
        # Breadth first, so that a limit reached leaves out the deepest and not the last.
        self._queue.append(("", samples, 0))
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
            rank = _Rank.LEAF if kinds.keys() <= {"number", "text", "other"} else _Rank.CONTAINER
            groups: _Groups = {}
            for positions in kinds.values():
                groups.setdefault(_type(values[positions[0]]), []).extend(positions)
            self._found(_Rank.NONE if "none" in kinds else rank, path, groups)
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
            self._found(_Rank.TYPE, path, types_found)
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
            self._found(_Rank.LENGTH, path, _by(dicts, lambda value: str(dict.__len__(value))))
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
            self.findings.append(_Finding(_Rank.KEYS, path, odd, usual))

    def _compare_halves(
        self, path: str, everyone: list[int], holders: dict[Any, list[int]], having: list[int]
    ) -> None:
        """Half of the samples have keys that the other half has not: no side is the odd one."""
        others = sorted({*everyone} - {*having})
        ours = [_key(key) for key, positions in holders.items() if positions == having]
        theirs = [_key(key) for key, positions in holders.items() if positions == others]
        instead = _keys(theirs) if theirs else f"no {_keys(ours)}"
        self.findings.append(
            _Finding(_Rank.KEYS, path, {_keys(ours): having, instead: others}, None)
        )

    def _compare_sequences(self, path: str, values: _Values, depth: int) -> None:
        bases = {p: list if inherits(type(value), list) else tuple for p, value in values.items()}
        lengths = {p: bases[p].__len__(value) for p, value in values.items()}
        self._found(_Rank.LENGTH, path, _by(lengths, str))
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
            ranks = _by(
                facts, lambda fact: str(["*"] * len(fact.get("shape", ()))).replace("'", "")
            )
            shapes = ranks if len(ranks) > 1 and _majority(ranks) else shapes
        self._found(_Rank.SHAPE, path, shapes)
        dtypes = _by(facts, lambda fact: str(fact.get("dtype", "unknown")))
        self._found(_Rank.DTYPE, path, dtypes)
        self._found(_Rank.DEVICE, path, _by(facts, lambda fact: str(fact.get("device"))))
        first = next(iter(values.values()))
        if self._kind(first) == "array" and not any(map(_NUMERIC.fullmatch, dtypes)):
            self._refuse(path, values, [f"{_type(first)} of dtype {dtype}" for dtype in dtypes])
        elif not any({"shape", "size_bytes"} <= fact.keys() for fact in facts.values()):
            self._refuse(path, values, [f"{_type(first)} that is sparse, nested or wraps another"])

    def _found(self, rank: _Rank, path: str, groups: _Groups) -> None:
        if len(groups) < 2:
            return
        usual = _majority(groups)
        odd = {label: positions for label, positions in groups.items() if label != usual}
        count = (usual, len(groups[usual])) if usual is not None else None
        self.findings.append(_Finding(rank, path, odd, count))

    def _refuse(self, path: str, values: _Values, labels: Iterable[str]) -> None:
        if len(values) != self.total:
            return  # some samples hold something else here, which is told as a difference
        who = "every sample" if self.total > 1 else "the sample"
        kinds = " or ".join(islice((_a(label) for label in labels), 3))
        holds = f"holds {kinds} at {path}" if path else f"is {kinds}"
        self.refused.append(f"{who} {holds}: {_TAKES}")


# ---- one value


def _kind_of(cls: type) -> str:
    """Return what `default_collate` would treat values of a class as."""
    if cls is type(None):
        return "none"
    if inherits(cls, dict) or inherits(cls, Mapping) or cls is types.MappingProxyType:
        return "mapping"
    if inherits(cls, list) or inherits(cls, tuple):
        return "sequence"
    if inherits(cls, np.ndarray):
        return "array"
    if inherits(cls, torch.Tensor):
        return "tensor"
    if any(inherits(cls, base) for base in (int, float, np.number, np.bool_)):
        return "number"
    if inherits(cls, str) or inherits(cls, bytes):
        return "text"
    return "flat" if any(inherits(cls, base) for base in (*_FLAT, Sequence)) else "other"


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
    return "None" if value is None else type_name(type(value))


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


# ---- the words


def _verdict(survey: _Survey, indices: Sequence[object]) -> Explanation | None:
    # Where there is a majority comes first within a rank; the sort keeps the order of the walk.
    found = sorted(survey.findings, key=lambda finding: (finding.rank, finding.usual is None))
    grave = [finding for finding in found if finding.rank < _Rank.TYPE]
    if not grave and survey.refused:
        return Explanation(None, survey.refused[0])
    if not found:
        return None
    top = found[0].rank
    told = [finding for finding in found if finding.rank == top]
    if top == _Rank.DTYPE:  # torch.stack may convert; a number among strings breaks for certain
        told += [finding for finding in found if finding.rank == _Rank.LEAF]
    sentences: list[str] = []
    blamed: list[list[int]] = []
    for finding in told:
        positions = sorted(position for each in finding.odd.values() for position in each)
        if positions not in blamed:  # one sample wrong in ten places is told once
            blamed.append(positions)
            sentences.append(_sentence(finding, indices, survey.total))
    sentences = sentences[:3]
    if top >= _Rank.DTYPE:
        sentences += survey.refused[:1]
    if top == _Rank.TYPE:
        sentences[0] = f"the only difference found, which default_collate takes: {sentences[0]}"
    clear = all(finding.usual is not None for finding in told)
    single = clear and len(blamed) == 1 and len(blamed[0]) == 1
    return Explanation(blamed[0][0] if single else None, ". ".join(sentences))


def _sentence(finding: _Finding, indices: Sequence[object], total: int) -> str:
    name, odd, rest = _WORDS[finding.rank]
    place = f" at {finding.path}" if finding.path else ""
    groups = sorted(finding.odd.items(), key=lambda item: -len(item[1]))
    clauses = []
    for label, positions in groups[:SHOWN_MAX]:
        words = odd if len(positions) == 1 else odd.replace("is", "are").replace("has", "have")
        told = words.format(label).replace(" 1 elements", " 1 element")
        clauses.append(f"{_who(positions, indices)} {told}")
    if len(groups) > SHOWN_MAX:
        clauses.append(f"{len(groups) - SHOWN_MAX} more differ again")
    if finding.usual is None:
        head = f"the samples differ in {name}{place}: " if total > 2 else ""
        return head + ", ".join(clauses) + (place if total <= 2 else "")
    label, count = finding.usual
    others = (
        "the other" if count + sum(map(len, finding.odd.values())) == total else "of the others"
    )
    return ", ".join(clauses) + place + rest.format(f"{others} {count}", label)


def _who(positions: list[int], indices: Sequence[object]) -> str:
    shown = positions[:SHOWN_MAX]
    known = [indices[position] if position < len(indices) else None for position in shown]
    more = f" and {len(positions) - len(shown)} more" if len(positions) > len(shown) else ""
    if any(index is None for index in known):
        plural = "s" * (len(positions) > 1)
        places = ", ".join(map(str, shown))
        return f"the sample{plural} at position{plural} {places}{more}"
    if len(positions) == 1:
        return f"dataset index {bounded_text(known[0])} (position {positions[0]})"
    return f"dataset indices {', '.join(map(bounded_text, known))}{more}"


def _key(key: object) -> str:
    text = bounded_text(key)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN_MAX} more" if len(keys) > SHOWN_MAX else ""
    return f"key{'s' * (len(keys) > 1)} {', '.join(keys[:SHOWN_MAX])}{more}"


def _a(label: str) -> str:
    if label == "None":
        return label
    return f"{'an' if label[:1].lower() in 'aeiou' else 'a'} {label}"
