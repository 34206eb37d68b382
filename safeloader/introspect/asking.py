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
from functools import lru_cache
from typing import Any

from safeloader.introspect.values import definitions, fields, own_length

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
_NEVER = ("LOAD_BUILD_CLASS", "LOAD_NAME", "CALL_INTRINSIC_1")
_FUNCTIONS = ("len", "int", "float", "bool", "min", "max", "abs", "round")
_OF_MATH = ("ceil", "floor", "trunc")
_NUMBERS = (int, float, bool, str, type(None))


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


def _is_harmless(method: Any, thing: Any, held: dict[Any, Any], depth: int) -> bool:
    names = _names(method.__code__)
    if names is None or depth == 0:
        return False
    of_globals, of_attributes = names
    for name in of_globals:
        value = method.__globals__.get(name, vars(builtins).get(name))
        known = value is math or any(value is getattr(builtins, each) for each in _FUNCTIONS)
        known = known or any(value is getattr(math, each) for each in _OF_MATH)
        if not known and not any(type(value) is kind for kind in _NUMBERS):
            return False
    for name in of_attributes:
        if name in _OF_MATH and math in map(method.__globals__.get, of_globals):
            continue
        if name in held:
            if not _may_be_used(held[name], of_attributes, depth):
                return False
            continue
        found = next(iter(definitions(type(thing), name)), None)
        function = found.fget if type(found) is property else found
        if type(function) is types.FunctionType:
            if not _is_harmless(function, thing, held, depth - 1):
                return False
        elif not any(type(found) is kind for kind in _NUMBERS[:4]) and not _is_of_held(
            name, held, of_attributes
        ):
            return False
    return True


def _may_be_used(value: Any, names: frozenset[str], depth: int) -> bool:
    """Whether an attribute may be computed with, and asked for its length."""
    if any(type(value) is kind for kind in _NUMBERS) or own_length(value) is not None:
        return True
    return asking_changes_nothing(value, depth - 1)


def _is_of_held(name: str, held: dict[Any, Any], names: frozenset[str]) -> bool:
    """Whether a name is a plain number that what is held holds: ``self.sampler.total``."""
    inner = [dict(fields(held[each], _FIELDS_MAX)) for each in names if each in held]
    found = [each[name] for each in inner if name in each]
    return bool(found) and all(
        any(type(each) is kind for kind in _NUMBERS) or own_length(each) is not None
        for each in found
    )


@lru_cache(1024)
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]] | None:
    """The globals and the attributes that a function names; None if it may change something."""
    of_globals, of_attributes = set(), set()
    for step in dis.get_instructions(code):
        name = step.opname
        if not name.startswith(_HARMLESS) or name in _NEVER:
            return None
        if name == "LOAD_GLOBAL":
            of_globals.add(str(step.argval))
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            of_attributes.add(str(step.argval))
        elif name.startswith(("LOAD_SUPER", "LOAD_DEREF", "LOAD_CLOSURE", "LOAD_CLASSDEREF")):
            return None
    return frozenset(of_globals), frozenset(of_attributes)
