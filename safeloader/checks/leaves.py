"""The leaves of a sample, each with its path: ``sample['image'][0]``. Runs in: both.

Containers, named tuples, dataclasses and objects with attributes are walked through, and so are
sets and arrays of objects. Anything else is a leaf.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from safeloader.introspect.fingerprint import held_under_names

# "item" and a key or number, "attribute" and a name, or "element" of what has no order
Step = tuple[str, Any]
Path = tuple[Step, ...]

DEPTH_MAX = 32
_LEAVES = (torch.Tensor, np.ndarray, np.generic, str, bytes, int, float, complex, type(None))


def parts_of(whole: Any) -> list[tuple[Step, Any]] | None:
    """What a container holds; None of a leaf."""
    if isinstance(whole, _LEAVES):
        return None
    if isinstance(whole, Mapping):
        return [(("item", key), whole[key]) for key in whole]
    if isinstance(whole, tuple) and hasattr(whole, "_fields"):
        return [(("attribute", name), getattr(whole, name)) for name in whole._fields]
    if isinstance(whole, list | tuple):
        return [(("item", k), each) for k, each in enumerate(whole)]
    if isinstance(whole, type):
        return None
    return [(("attribute", name), each) for name, each in held_under_names(whole).items()] or None


def _unnamed_parts(whole: Any) -> list[tuple[Step, Any]] | None:
    """What holds parts that a structure does not name, as their number is free."""
    if isinstance(whole, set | frozenset):
        return [(("element", None), each) for each in whole]
    if isinstance(whole, deque):
        return [(("item", k), each) for k, each in enumerate(whole)]
    if isinstance(whole, np.ndarray) and whole.dtype.kind == "O":
        places = np.ndindex(whole.shape)
        return [(("item", at[0] if len(at) == 1 else at), whole[at]) for at in places]
    return None


def leaves_of(sample: Any) -> Iterator[tuple[Path, Any]]:
    """Every leaf, in order. What is held by several parts comes once, and so a circle ends."""
    seen: set[int] = set()

    def walk(whole: Any, path: Path) -> Iterator[tuple[Path, Any]]:
        parts = parts_of(whole) or _unnamed_parts(whole)
        if parts is None:
            yield path, whole
        elif id(whole) not in seen and len(path) < DEPTH_MAX:
            seen.add(id(whole))
            for step, each in parts:
                yield from walk(each, (*path, step))

    return walk(sample, ())


def path_text(path: Path) -> str:
    """A path as one would write it.

    >>> path_text((("item", "image"), ("attribute", "boxes"), ("item", 0)))
    "sample['image'].boxes[0]"
    """
    forms = {"attribute": ".{}", "item": "[{!r}]", "element": " (an element)"}
    return "sample" + "".join(forms[kind].format(at) for kind, at in path)
