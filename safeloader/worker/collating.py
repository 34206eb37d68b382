"""Runs in a worker (in main with `num_workers=0`): names the sample that a collate function fell over.

In come the samples of a batch and their dataset indices, out goes a sentence for the failure's
report. "stack expects each tensor to be equal size" leaves the search to the reader; but one sample
that is not built like the others can be found by comparing them. The samples are walked in step,
level by level, and at each place those in the minority are the odd ones. Of all differences only the
gravest are told, in the order of `_Rank`. No code of the samples is run, except that a mapping which
is no dict is asked for its keys and values; the walk ends after a fixed number of values looked at.
"""

from __future__ import annotations

import enum
import re
import types
from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from safeloader.wire.dataset_state import array_facts, bounded_text, inherits, type_name

SAMPLES_MAX = 100_000
VISITS_MAX = 200_000  # values looked at in all: about a second at worst
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

    >>> explain([{"x": 1}, {"x": 2}, {"y": 3}], [10, 11, 12])
    Explanation(position=2, text="dataset index 12 (position 2) has no key 'x' and the extra key 'y'; \
the other 2 have keys as each other")
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
    DTYPE = 5
    LEAF = 6  # a number among strings
    TYPE = 7  # an int among floats, which default_collate takes


@dataclass(frozen=True)
class _Wording:
    name: str
    one: str
    many: str
    rest: str


_WORDINGS = {
    _Rank.NONE: _Wording("type", "is {}", "are {}", "; {} are {}"),
    _Rank.CONTAINER: _Wording("type", "is {}", "are {}", "; {} are {}"),
    _Rank.KEYS: _Wording("keys", "has {}", "have {}", "; {} have {}"),
    _Rank.LENGTH: _Wording("length", "has {} elements", "have {} elements", ", {} have {}"),
    _Rank.SHAPE: _Wording("shape", "has shape {}", "have shape {}", ", {} have {}"),
    _Rank.DTYPE: _Wording("dtype", "has dtype {}", "have dtype {}", ", {} have {}"),
    _Rank.LEAF: _Wording("type", "is {}", "are {}", ", {} are {}"),
    _Rank.TYPE: _Wording("type", "is {}", "are {}", ", {} are {}"),
}
