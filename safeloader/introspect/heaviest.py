"""Which attributes of an object hold most memory, without pickling anything. Runs in: both.

Containers of one kind of thing are estimated by some of their elements.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

from safeloader.introspect.values import (
    array_facts,
    container_base,
    fields,
    held_by,
    inherits,
    type_name,
)

SAMPLED = 40  # elements of a container that stand for all
DEPTH_MAX = 6


def heaviest(thing: Any, name: str = "dataset", most: int = 3, bound_s: float = 0.5) -> list[str]:
    """The attributes that hold most, the heaviest first, each with its size in words.

    Args:
        thing: any object; nothing of it is run.
        name: what it is called in the paths.
        most: how many are told.
        bound_s: seconds after which what is not looked at yet counts nothing.

    >>> class Table:
    ...     def __init__(self):
    ...         self.rows = [{"file": f"{i:08d}.jpg"} for i in range(10_000)]
    >>> heaviest(Table())
    ['dataset.rows (list of 10,000, about 3.7 MB)']
    """
    end = monotonic() + bound_s
    found = []
    for key, value in fields(thing):
        size = estimated_bytes(value, end)
        if size >= 1_000_000:
            found.append((size, f"{name}.{key} ({_kind(value)}about {_megabytes(size)})"))
    return [text for _, text in sorted(found, reverse=True)[:most]]


def estimated_bytes(value: Any, end: float = float("inf"), depth: int = DEPTH_MAX) -> int:
    """The bytes that a value takes with all it holds, about.

    >>> estimated_bytes(b"a" * 1000) >= 1000, estimated_bytes(["a" * 1000] * 10) > 9000
    (True, True)
    """
    facts = array_facts(value)
    if facts is not None:
        return int(facts.get("size_bytes", 0)) + 100
    cls = type(value)
    if inherits(cls, str):
        return 50 + str.__len__(value)
    if inherits(cls, bytes, bytearray):
        return 40 + len(value)
    if inherits(cls, int, float, type(None)):
        return 28
    if depth == 0 or monotonic() > end:
        return 56
    base: Any = container_base(cls)
    if base is None:
        return 56 + sum(estimated_bytes(each, end, depth - 1) for _, each in fields(value, 64))
    length = int(base.__len__(value))
    if base is list or base is tuple:
        step = max(1, length // SAMPLED)
        some = [base.__getitem__(value, k) for k in range(0, length, step)]
    else:
        pairs = held_by(value, SAMPLED)
        some = [(key, each) if base is dict else each for key, each in pairs]
    if not some:
        return 64
    slot = 100 if base is dict else 8
    inner: int = sum(estimated_bytes(each, end, depth - 1) for each in some)
    return 64 + slot * length + inner * length // len(some)


def _kind(value: Any) -> str:
    base: Any = container_base(type(value))
    name = type_name(type(value)).rpartition(".")[2]
    return f"{name}, " if base is None else f"{name} of {base.__len__(value):,}, "


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"
