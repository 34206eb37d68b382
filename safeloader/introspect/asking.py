"""Whether asking an object how long it is changes nothing, told from its byte code. Runs in: main.

``__len__`` of a sampler is the user's code. Most read an attribute and divide; some draw the order
to count it, so that the next epoch is another. So it is read first, and nothing of it is run: it
may take attributes apart, compare and compute, and ask what the object holds for its length, if
that is as harmless. What assigns, loops, or calls anything else is left alone.
"""

from __future__ import annotations

import builtins
import dis
import math
import types
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from safeloader.introspect.byte_code import attributes_of, globals_of
from safeloader.introspect.values import (
    definitions,
    fields,
    is_one_of,
    mro_of,
    namespace_of,
    own_length,
)

_DEPTH = 4
_FIELDS_MAX = 64  # of what has more nobody knows
# How the names of instructions begin that change nothing by themselves.
_HARMLESS = (
    "LOAD_",
    "BINARY_",
    "UNARY_",
    "COMPARE_OP",
    "IS_OP",
    "CONTAINS_OP",
    "TO_BOOL",
    "STORE_FAST",
    "POP_",
    "JUMP_FORWARD",
    "CALL",
    "PRECALL",
    "PUSH_NULL",
    "KW_NAMES",
    "COPY",
    "SWAP",
    "RETURN_",
    "RESUME",
    "NOP",
    "NOT_TAKEN",
    "CACHE",
    "EXTENDED_ARG",
    "RAISE_VARARGS",
    "BUILD_TUPLE",
    "MAKE_CELL",
)
_NEVER = (
    "LOAD_BUILD_CLASS",
    "LOAD_NAME",
    "LOAD_SUPER",
    "LOAD_DEREF",
    "LOAD_CLOSURE",
    "LOAD_CLASSDEREF",
    "CALL_INTRINSIC_1",
)
_OF_MATH = ("ceil", "floor", "trunc")
_CALLED = (
    *(len, int, float, bool, min, max, abs, round),
    *(math, *(getattr(math, name) for name in _OF_MATH)),
)


def asking_changes_nothing(thing: Any, depth: int = _DEPTH) -> bool:
    """Whether ``len(thing)`` can be asked, and all is as it was.

    >>> class Halves:
    ...     def __init__(self, rows):
    ...         self.rows = rows
    ...     def __len__(self):
    ...         return math.ceil(len(self.rows) / 2)
    >>> class Drawing(Halves):
    ...     def __len__(self):
    ...         return sum(1 for _ in self)
    >>> asking_changes_nothing(Halves([1, 2, 3])), asking_changes_nothing(Drawing([1, 2, 3]))
    (True, False)
    """
    cls = type(thing)
    if own_length(thing) is not None:
        return True
    method = next(iter(definitions(cls, "__len__")), None)
    if type(method) is not types.FunctionType or depth == 0:
        return False
    if definitions(cls, "__getattr__") or definitions(cls, "__getattribute__")[:-1]:
        return False
    held = dict(fields(thing, _FIELDS_MAX + 1))
    return len(held) <= _FIELDS_MAX and _is_harmless(method, thing, held, depth)


def only_reads(thing: Any) -> bool:
    """Whether ``len(thing)`` only reads an attribute, or its length: most do; seen in 3 µs.

    >>> class Rows:
    ...     def __init__(self, rows):
    ...         self.rows = rows
    ...     def __len__(self):
    ...         return len(self.rows)
    >>> only_reads(Rows([1, 2])), only_reads(Rows(Rows([1, 2])))
    (True, False)
    """
    lineage = mro_of(type(thing))
    method = _nearest(lineage, "__len__")
    reads = _read_by(method.__code__) if type(method) is types.FunctionType else None
    if reads is None or method.__globals__.get("len", builtins.len) is not _LEN:
        return False
    if not reads:
        return True
    own = _nearest(lineage, "__dict__")
    held = own.__get__(thing) if type(own) is types.GetSetDescriptorType else None
    if type(held) is not dict or _nearest(lineage, "__getattribute__") is not _GETATTRIBUTE:
        return False
    for name in reads:
        known = id(type(held.get(name))) in _PLAINLY_SIZED
        if not known or _nearest(lineage, name) is not None:
            return False
    return True


def _nearest(lineage: Sequence[type], name: str) -> Any:
    for cls in lineage:
        space = namespace_of(cls)
        if name in space:
            return space[name]
    return None


@lru_cache(256)
def _read_by(code: types.CodeType) -> frozenset[str] | None:
    """The attributes that a function reads, if it does nothing but that, and asks for lengths."""
    names = [step.opname for step in dis.get_instructions(code)]
    plain = all(name.startswith(_READING) and not name.startswith(_NEVER) for name in names)
    only_len = not {*globals_of(code)} - {"len"} and not code.co_freevars
    return frozenset(attributes_of(code)) if plain and only_len else None


_LEN = len
_GETATTRIBUTE = object.__dict__["__getattribute__"]
_READING = ("LOAD_", "CALL", "PRECALL", "PUSH_NULL", "RETURN_", "RESUME", "CACHE")
_PLAINLY_SIZED = frozenset(map(id, (int, list, tuple, dict, range, str, np.ndarray)))


def _is_harmless(method: Any, thing: Any, held: dict[Any, Any], depth: int) -> bool:
    code = method.__code__
    if depth == 0 or not _only_computes(code):
        return False
    used = {
        name: method.__globals__.get(name, vars(builtins).get(name)) for name in globals_of(code)
    }
    if not all(
        any(value is each for each in _CALLED) or _is_plain(value) for value in used.values()
    ):
        return False
    of_math = _OF_MATH if any(value is math for value in used.values()) else ()
    return all(
        name in of_math or _is_harmless_attribute(name, thing, held, attributes_of(code), depth)
        for name in attributes_of(code)
    )


def _is_harmless_attribute(
    name: str, thing: Any, held: dict[Any, Any], names: frozenset[str], depth: int
) -> bool:
    """Whether reading what stands under a name, and computing with it, changes nothing."""
    if name in held:  # and may be asked for its length
        return _is_plain(held[name]) or asking_changes_nothing(held[name], depth - 1)
    found = next(iter(definitions(type(thing), name)), None)
    function = found.fget if type(found) is property else found
    if type(function) is types.FunctionType:
        return _is_harmless(function, thing, held, depth - 1)
    return (found is not None and _is_plain(found)) or _is_of_held(name, held, names)


def _is_of_held(name: str, held: dict[Any, Any], names: frozenset[str]) -> bool:
    """Whether a name is a plain value that what is held holds: ``self.sampler.total``."""
    inner = [dict(fields(held[each], _FIELDS_MAX)) for each in names if each in held]
    found = [each[name] for each in inner if name in each]
    return bool(found) and all(_is_plain(each) or own_length(each) is not None for each in found)


def _is_plain(value: Any) -> bool:
    return is_one_of(type(value), int, float, bool, str, type(None))


@lru_cache(1024)
def _only_computes(code: types.CodeType) -> bool:
    """Whether a function has no instruction that may change something by itself."""
    names = [step.opname for step in dis.get_instructions(code)]
    return all(name.startswith(_HARMLESS) and not name.startswith(_NEVER) for name in names)
