"""How a dataset's code comes from an index to an element of its lists. Runs in: both.

``self.files[i]`` asks ``files`` for the index, ``self.files[self.order[i]]`` for an element of
``order``, and ``self.files[i // 2]`` for something else. Told from the byte code, none of which is
run. What the code does not show is not known: nothing is said of that.
"""

from __future__ import annotations

import dis
import re
import types
from functools import lru_cache
from typing import Any

from safeloader.introspect.values import definitions, mro_of, namespace_of, once_for_class

Way = tuple[str, ...]
INDEX: Way = ()  # ``self.files[i]``; of ``self.files[self.order[i]]`` it is ("order",)
OTHER: Way = ("?",)
"""It is asked for something else, or for what is not known, as in ``self.files[i // 2]``."""

_ITEM, _ITEMS = "__getitem__", "__getitems__"
_METHODS_MAX = 60  # that are looked through, of one class
_SAME = ("int", "operator.index")  # of an index they are the index
_SAME_METHODS = ("item", "tolist", "__index__")
_ROWS = ("iloc", "loc", "values", "array")  # of a table: its rows


class _What:
    """What stands on the interpreter's stack: its kind, and what is known of it."""

    __slots__ = ("kind", "known")

    def __init__(self, kind: str, known: Any = None) -> None:
        self.kind, self.known = kind, known


_UNKNOWN, _SELF, _INDICES = _What("?"), _What("self"), _What("indices")
_OF_INDEX = _What("index", INDEX)


class _Shown:
    """What a function's code shows: what asks which attribute, and which methods it calls."""

    def __init__(self) -> None:
        self.ways: set[tuple[str, Way]] = set()
        self.calls: set[tuple[str, tuple[Way, ...]]] = set()
        self.read: set[types.CodeType] = set()  # of functions defined in it


def ways_of(cls: type, name: str) -> frozenset[Way]:
    """By what the code that makes samples asks an attribute; empty where it does not show that.

    Args:
        cls: the dataset's, or that of what it asks: a reader, all methods of which are looked at.
        name: of the attribute; ``settings.files`` of one of an attribute.

    >>> class Scans:
    ...     def __getitem__(self, i):
    ...         return self.files[self.order[i]], self.labels[int(i)], self._at(i - 1)
    ...     def _at(self, k):
    ...         return self.rows[k]
    >>> [sorted(ways_of(Scans, name)) for name in ("files", "order", "labels", "rows", "other")]
    [[('order',)], [()], [()], [('?',)], []]
    """
    return frozenset(way for attribute, way in _shown_by(cls) if attribute == name)


@once_for_class
def _shown_by(cls: type) -> set[tuple[str, Way]]:
    """From the methods by which samples are asked for, and those that they call."""
    todo: list[tuple[str, int, tuple[Way, ...]]] = [(_ITEM, 0, (INDEX,)), (_ITEMS, 0, ())]
    if not definitions(cls, _ITEM) and not definitions(cls, _ITEMS):  # no dataset: a reader
        spaces = [namespace_of(each) for each in mro_of(cls)[:-1]]
        todo = [(name, 0, (INDEX,)) for space in spaces for name in space if name != "__init__"]
    found: set[tuple[str, Way]] = set()
    seen: set[tuple[str, int, tuple[Way, ...]]] = set()
    while todo and len(seen) < _METHODS_MAX:
        asked = todo.pop()
        name, level, arguments = asked
        functions = definitions(cls, name)[level:]
        if asked in seen or not functions or type(functions[0]) is not types.FunctionType:
            continue
        seen.add(asked)
        shown = _read(functions[0].__code__, arguments, name == _ITEMS)
        found |= shown.ways
        # A method that calls one of its own name calls its parent's, as a rule.
        todo += [(m, level + 1 if m == name else 0, given) for m, given in shown.calls]
    return found


@lru_cache(1024)  # code is read at 2 us an instruction
def _read(code: types.CodeType, arguments: tuple[Way, ...], many: bool) -> _Shown:
    """Read a method whose first arguments are known; with ``many`` its first holds indices."""
    names = code.co_varnames[: code.co_argcount]
    held = dict(zip(names, [_SELF, *(_What("index", way) for way in arguments)], strict=False))
    if many and len(names) > 1:
        held[names[1]] = _INDICES
    shown = _Shown()
    _follow(code, held, shown)
    return shown


def _follow(code: types.CodeType, held: dict[str, _What], shown: _Shown) -> None:
    """Follow the stack from line to line, as far as that goes without running anything."""
    stack: list[_What] = []
    jumped = False  # what is assigned from here on may not have been
    inlined: set[str] = set()  # names of a comprehension, from Python 3.12 on

    def pop(count: int = 1) -> list[_What]:
        taken = stack[max(0, len(stack) - count) :]
        del stack[max(0, len(stack) - count) :]
        return [_UNKNOWN] * (count - len(taken)) + taken

    def keep(name: str) -> None:
        [value] = pop()
        before = held.get(name)
        same = before is None or (before.kind, before.known) == (value.kind, value.known)
        held[name] = value if same or not jumped or name in inlined else _UNKNOWN

    for step in dis.get_instructions(code):
        op, value = step.opname, step.argval
        jumped = jumped or "JUMP" in op or op == "FOR_ITER"
        if op == "LOAD_FAST_AND_CLEAR":
            inlined.add(value)
            stack.append(_UNKNOWN)
        elif op.startswith(("LOAD_FAST", "STORE_FAST")):
            several = value if type(value) is tuple else (value,)  # one instruction for two
            for verb, name in zip(re.findall("LOAD|STORE", op), several, strict=False):
                if verb == "STORE":
                    keep(name)
                else:
                    stack.append(held.get(name, _UNKNOWN))
        elif op in ("LOAD_DEREF", "LOAD_CLASSDEREF"):
            stack.append(held.get(value, _UNKNOWN))
        elif op == "STORE_DEREF":
            keep(value)
        elif op in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD"):
            taken = 3 if "SUPER" in op else 1
            owner = pop(taken)[-1]
            left = dis.stack_effect(step.opcode, step.arg, jump=False) + taken - 1
            stack.append(_attribute(_SELF if taken == 3 else owner, value, "METHOD" in op or left))
            stack.extend([_What("null")] * left)
        elif op == "BINARY_SUBSCR" or (op == "BINARY_OP" and step.argrepr == "[]"):
            whole, key = pop(2)
            stack.append(_element(whole, key, shown))
        elif op in ("CALL", "CALL_FUNCTION", "CALL_METHOD"):
            given = pop(step.arg or 0)
            stack.append(_result(pop(1 if op == "CALL_FUNCTION" else 2), given, held, shown))
        elif op in ("LOAD_CONST", "LOAD_GLOBAL"):
            effect = dis.stack_effect(step.opcode, step.arg, jump=False)
            kind = "constant" if op == "LOAD_CONST" else "global"
            nulls = [_What("null")] * (effect - 1)
            stack.extend([*nulls, _What(kind, value)])
        elif op == "PUSH_NULL":
            stack.append(_What("null"))
        elif op == "MAKE_FUNCTION":
            inner = [each for each in stack[-3:] if type(each.known) is types.CodeType]
            pop(1 - dis.stack_effect(step.opcode, step.arg, jump=False))
            stack.append(inner[-1] if inner else _UNKNOWN)
        elif op == "SET_FUNCTION_ATTRIBUTE":
            function = pop(2)[-1]
            stack.append(function)
        elif op == "FOR_ITER":
            stack.append(_OF_INDEX if stack and stack[-1] is _INDICES else _UNKNOWN)
        elif op in ("GET_ITER", "PRECALL", "KW_NAMES", "CACHE", "NOP", "RESUME", "EXTENDED_ARG"):
            continue
        elif op == "POP_TOP":
            pop()
        elif op == "COPY":
            stack.append(stack[-step.arg] if step.arg and step.arg <= len(stack) else _UNKNOWN)
        elif op == "SWAP":
            if step.arg and step.arg <= len(stack):
                stack[-1], stack[-step.arg] = stack[-step.arg], stack[-1]
        else:
            effect = dis.stack_effect(step.opcode, step.arg, jump=False)
            if effect > 0:
                stack.extend([_UNKNOWN] * effect)
            else:
                pop(1 - effect)
                stack.append(_UNKNOWN)
    for inner in code.co_consts:
        if type(inner) is types.CodeType and inner not in shown.read:
            _follow(inner, {n: held.get(n, _UNKNOWN) for n in inner.co_freevars}, shown)


def _attribute(owner: _What, name: str, called: Any) -> _What:
    if owner is _SELF:
        return _What("method", name) if called else _What("attribute", name)
    if owner.kind == "attribute":
        return owner if name in _ROWS else _What("asked", f"{owner.known}.{name}")
    if owner.kind == "index" and name in _SAME_METHODS:
        return _What("same", owner.known)
    if owner.kind == "global":
        return _What("global", f"{owner.known}.{name}")
    return _UNKNOWN


def _element(whole: _What, key: _What, shown: _Shown) -> _What:
    """Note ``whole[key]``, and tell what it is."""
    way = _way(key)
    if whole is _SELF:
        shown.calls.add((_ITEM, (way,)))
    elif whole.kind in ("attribute", "asked"):
        if key.kind == "constant" and type(key.known) is str:
            return whole  # a column of a table
        shown.ways.add((whole.known, way))
        return _UNKNOWN if OTHER[0] in way else _What("index", (whole.known, *way))
    return _UNKNOWN


def _result(
    callee: list[_What], given: list[_What], held: dict[str, _What], shown: _Shown
) -> _What:
    """Note a call, and tell what it gives."""
    called = next((each for each in callee if each.kind != "null"), _UNKNOWN)
    ways = tuple(map(_way, given))
    if called.kind == "same":
        return _What("index", called.known)
    if called.kind == "global":
        if called.known == "super":
            return _SELF
        if called.known in _SAME and len(given) == 1:
            return given[0]
    elif called.kind in ("method", "attribute"):
        shown.calls.add((called.known, ways))
    elif called.kind == "asked":
        asked = called.known.rpartition(".")[0]
        shown.ways.add((asked, ways[0] if len(ways) == 1 else OTHER))
    elif type(called.known) is types.CodeType:  # a comprehension, over what stands beside it
        code, over = called.known, [*callee, *given][-1]
        names = {name: held.get(name, _UNKNOWN) for name in code.co_freevars}
        shown.read.add(code)
        _follow(code, names | {".0": over}, shown)
    return _UNKNOWN


def _way(what: _What) -> Way:
    return what.known if what.kind == "index" else OTHER
