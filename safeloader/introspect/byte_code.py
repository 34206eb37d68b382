"""What the byte code of the user's classes shows, none of which is run. Runs in: both.

Which methods make samples, which attributes they read, and of which they assign elements. What the
code does not show is not known: nothing is said of that.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any, NamedTuple

from safeloader.introspect.values import (
    definitions,
    is_one_of,
    mro_of,
    namespace_of,
    once_for_class,
    type_name,
)

ENTRIES = ("__getitem__", "__getitems__", "__iter__", "__next__", "__call__")
"""The methods by which samples are asked for."""
LEFT_ALONE = ("torch.", "numpy.", "builtins.", "multiprocessing.", "threading.", "logging.")
"""How the names of classes begin whose code and attributes are not the user's."""
METHODS_MAX = 200  # of one class
CODE_MAX = 1 << 15  # bytes of one function that is read, at 2 us an instruction


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function, and of those defined in it.

    >>> def outer():
    ...     def inner(): ...
    >>> [each.co_name for each in codes(outer.__code__)]
    ['outer', 'inner']
    """
    yield code
    for inner in code.co_consts:
        if type(inner) is types.CodeType:
            yield from codes(inner)


def function_in(method: Any) -> Any:
    """What a method, a property, or what a class defines otherwise, is made of: its function.

    >>> function_in(property(len)), function_in(staticmethod(len)), function_in(3)
    (<built-in function len>, <built-in function len>, 3)
    """
    if is_one_of(type(method), classmethod, staticmethod):
        return method.__func__
    return method.fget if type(method) is property else method


@lru_cache(4096)
def globals_of(code: types.CodeType) -> tuple[str, ...]:
    """The names of the globals that a function uses, and those defined in it; in order.

    >>> globals_of((lambda: print(len)).__code__)
    ('print', 'len')
    """
    steps = (step for each in codes(code) for step in dis.get_instructions(each))
    return tuple(dict.fromkeys(step.argval for step in steps if step.opname == "LOAD_GLOBAL"))


class Uses(NamedTuple):
    """What a function uses and sets, with those defined in it.

    Attributes:
        chains: a global and the attributes that are asked of it one after another, as
            ``("helpers", "RNG", "random")``; those of the first argument begin with "".
        sets: the names of globals and of attributes that are set.
    """

    chains: tuple[tuple[str, ...], ...]
    sets: frozenset[str]


@lru_cache(4096)
def uses(code: types.CodeType) -> Uses:
    """What a function uses and sets, in order, as far as that is read.

    >>> def draw(self):
    ...     self.last = scans.RNG.random(self.names[0].split("/"))
    >>> uses(draw.__code__)
    Uses(chains=(('scans', 'RNG', 'random'), ('', 'names'), ('',)), sets=frozenset({'last'}))
    """
    own = code.co_varnames[0] if code.co_argcount else None
    chains: dict[tuple[str, ...], None] = {}
    sets: set[str] = set()
    now: tuple[str, ...] = ()
    read = [each for each in codes(code) if len(each.co_code) <= CODE_MAX]
    for step in chain.from_iterable(map(dis.get_instructions, read)):
        name = step.opname
        if name in ("CACHE", "PRECALL", "EXTENDED_ARG", "NOP"):
            continue
        if name in ("LOAD_ATTR", "LOAD_METHOD") and now:
            now = *now, str(step.argval)
            continue
        after, now = now, ()
        if after:
            chains[after] = None
        if name == "LOAD_GLOBAL":
            now = (str(step.argval),)
        elif name == "LOAD_SUPER_ATTR":
            now = ("", str(step.argval))
        elif name.startswith("LOAD_FAST") or name == "LOAD_DEREF":
            last = step.argval[-1] if type(step.argval) is tuple else step.argval
            now = ("",) if last == own else ()
        elif name == "CALL" and after in (("super",), ("",)):  # of type(self) and super(), itself
            now = ("",)
        elif name in ("STORE_GLOBAL", "STORE_ATTR"):
            sets.add(str(step.argval))
    return Uses((*chains,), frozenset(sets))


def asks_where_it_runs(code: types.CodeType) -> bool:
    """Whether a function goes by the process that it runs in, other than for its share.

    >>> def connect():
    ...     if get_worker_info() is None:
    ...         return CONNECTION
    >>> asks_where_it_runs(connect.__code__)
    True
    """
    names = {name for each in codes(code) for name in each.co_names}
    if not names.isdisjoint({"getpid", "parent_process", "current_process"}):
        return True
    return "get_worker_info" in names and "num_workers" not in names


def loads(owner: Any, name: str, *, whole: bool = False) -> bool:
    """Whether the code that makes samples reads an attribute; told from names in its byte code.

    Args:
        owner: the object that has the attribute.
        name: of the attribute.
        whole: True to look at all methods but the constructor, for what is no dataset itself.

    >>> class Seeded:
    ...     def __getitem__(self, i):
    ...         return self._at() + i
    ...     def _at(self):
    ...         return self.epoch
    ...     def set_epoch(self, epoch):
    ...         self.epoch = self.asked = epoch
    >>> loads(Seeded(), "epoch"), loads(Seeded(), "asked")
    (True, False)
    """
    return any(
        name in code.co_names and name in attributes_of(code)
        for code in _code_of(type(owner), whole)
    )


def is_read(dataset: Any, owner: Any, name: str) -> bool:
    """Whether samples are made by an attribute of the dataset, or of an object in it.

    ``self.settings.size`` is read by the dataset's own code, whoever has it.
    """
    if loads(dataset, name):
        return True
    # Of a dataset under it other methods are asked by whoever draws the indices.
    asked = any(definitions(type(owner), entry) for entry in ("__getitem__", "__iter__"))
    return owner is not dataset and loads(owner, name, whole=not asked)


def is_unread(owner: Any, name: str) -> bool:
    """Whether the code that makes samples reads an attribute surely not, as far as it can be seen.

    Of what is no dataset, and no callable, all methods but the constructor count. Code that reads
    attributes by a name that it makes, or hands its object on, may read any.

    >>> class Holding:
    ...     def __getitem__(self, i):
    ...         return self.items[i]
    ...     def close(self):
    ...         self.file.close()
    >>> class Handing(Holding):
    ...     def __getitem__(self, i):
    ...         return helper(self, i)
    >>> [is_unread(owner, "file") for owner in (Holding(), Handing())]
    [True, False]
    """
    cls = type(owner)
    makes_samples = any(definitions(cls, entry) for entry in ENTRIES)
    seen = _code_of(cls, not makes_samples)
    return bool(seen) and not any(
        name in attributes_of(code) or not _INDIRECT.isdisjoint(code.co_names) or _hands_on(code)
        for code in seen
    )


_INDIRECT = frozenset({"getattr", "vars", "__dict__", "attrgetter", "methodcaller", "eval"})
_OF_SELF = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR", "LOAD_SUPER_ATTR")


@lru_cache(4096)
def _hands_on(code: types.CodeType) -> bool:
    """Whether a method uses its object, the first of its arguments, but for an attribute."""
    if not code.co_argcount or code.co_varnames[0] == ".0":  # of a comprehension
        return False
    own = code.co_varnames[0]
    steps = [step for step in dis.get_instructions(code) if step.opname != "CACHE"]
    for step, following in pairwise(steps):
        # Newer Pythons load two at once.
        loaded = step.argval if type(step.argval) is tuple else (step.argval,)
        if not step.opname.startswith("LOAD_FAST") or own not in loaded:
            continue
        if loaded.index(own) < len(loaded) - 1 or following.opname not in _OF_SELF:
            return True
    return False


@lru_cache(4096)  # code is read at 2 us an instruction
def attributes_of(code: types.CodeType) -> frozenset[str]:
    """The attributes that a function reads."""
    return frozenset(
        str(step.argval)
        for step in dis.get_instructions(code)
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD")
    )


def names_key(owner: Any, key: str) -> bool:
    """Whether a method of an object has a text in its code: the key of a dict, perhaps.

    >>> class Sized:
    ...     def __getitem__(self, i):
    ...         return self.settings["size"] * i
    >>> names_key(Sized(), "size"), names_key(Sized(), "other")
    (True, False)
    """
    return any(key in code.co_consts for code in _code_of(type(owner), True))


def changes_as_it_is_read(owner: Any, name: str) -> bool:
    """Whether the code that makes samples sets an attribute, or assigns elements of it.

    >>> class Ordered:
    ...     def __getitem__(self, i):
    ...         self.newest = self.order[i]
    ...         return self.newest
    ...     def reshuffle(self):
    ...         self.order = self.order[::-1]
    >>> changes_as_it_is_read(Ordered(), "newest"), changes_as_it_is_read(Ordered(), "order")
    (True, False)
    """
    return any(
        name in code.co_names and (name in _set_by(code) or name in _written(code))
        for code in _code_of(type(owner), False)
    )


@lru_cache(4096)
def _set_by(code: types.CodeType) -> frozenset[str]:
    return frozenset(
        str(step.argval)
        for step in dis.get_instructions(code)
        if step.opname in ("STORE_ATTR", "DELETE_ATTR")
    )


def stores_elements(owner: Any, name: str) -> bool:
    """Whether a method assigns elements of an attribute (``self.seen[i] += 1``), by its byte code.

    >>> class Counts:
    ...     def __getitem__(self, i):
    ...         self.seen[i] += 1
    >>> stores_elements(Counts(), "seen"), stores_elements(Counts(), "other")
    (True, False)
    """
    return any(
        name in code.co_names and name in _written(code) for code in _code_of(type(owner), True)
    )


@lru_cache(4096)
def _written(code: types.CodeType) -> set[str]:
    """The attributes of which a function assigns elements.

    The stack is followed from line to line, as far as that goes without running anything: what an
    instruction leaves there is unknown, unless it is an attribute or a copy of one.
    """
    found: set[str] = set()
    stack: list[str] = []
    for step in dis.get_instructions(code):
        if step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            found.update(stack[-2:-1])
        effect = dis.stack_effect(step.opcode, step.arg, jump=False)
        if step.opname == "COPY" and step.arg is not None:
            stack.append(stack[-step.arg] if step.arg <= len(stack) else "")
        elif step.opname == "SWAP" and step.arg is not None:
            if step.arg <= len(stack):
                stack[-1], stack[-step.arg] = stack[-step.arg], stack[-1]
        elif step.opname == "LOAD_ATTR":
            stack[-1:] = [str(step.argval), *[""] * effect]
        elif effect > 0:
            stack += [""] * effect
        elif step.opname not in ("CACHE", "NOP", "RESUME", "PRECALL", "EXTENDED_ARG"):
            del stack[max(0, len(stack) + effect - 1) :]
            stack.append("")
    return found - {""}


def overwrites(owner: Any, name: str) -> bool:
    """Whether samples write an attribute's elements before they read any: scratch.

    What was there before goes into no sample then. False where the byte code does not show it: of
    an element a part is written, not each time, or by another method than the one that reads it.

    >>> class Scratch:
    ...     def __getitem__(self, i):
    ...         self.buffer[i] = self.data[i] * 2
    ...         self.data[i] = self.data[i] / 2
    ...         return self.buffer[i] + 1
    >>> overwrites(Scratch(), "buffer"), overwrites(Scratch(), "data")
    (True, False)
    """
    first = [
        _first_uses(code).get(name)
        for code in _code_of(type(owner), False)
        if name in code.co_names and name in attributes_of(code)
    ]
    return bool(first) and all(first)


class _Held(NamedTuple):
    """On the stack: an attribute, or (``part``) an element of it."""

    name: str
    part: bool = False


_SLICE, _TUPLE = _Held("<slice>"), _Held("<tuple>")
_FILLING = ("copy_", "fill_", "zero_", "fill")  # methods that write all of a tensor or an array
_LEFT = ("CACHE", "NOP", "RESUME", "PRECALL", "EXTENDED_ARG", "KW_NAMES", "MAKE_CELL")


@lru_cache(1024)
def _first_uses(code: types.CodeType) -> dict[str, bool]:
    """By attribute, whether the first thing that a function does with it is to write elements.

    Each time, that is: no jump leads past it. The stack is followed as by :func:`_written`.
    """
    first: dict[str, bool] = {}
    stack: list[_Held | None] = []
    local: dict[str, _Held | None] = {}
    furthest = -1  # where a jump may have led by now

    def used(held: _Held | None, *, at: int = 0, written: bool = False) -> None:
        if held is not None:
            first.setdefault(held.name, written and furthest <= at)

    for step in dis.get_instructions(code):
        name, effect = step.opname, dis.stack_effect(step.opcode, step.arg, jump=False)
        if name in _LEFT or name.startswith("JUMP_NO_INTERRUPT"):
            continue
        if step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
            furthest = max(furthest, int(step.argval))
            if effect == 0:
                continue
        if name.startswith("LOAD_FAST") and type(step.argval) is str:
            stack.append(local.get(step.argval))
        elif name == "STORE_FAST":
            local[str(step.argval)] = stack.pop() if stack else None
        elif name == "COPY" and step.arg is not None:
            stack.append(stack[-step.arg] if step.arg <= len(stack) else None)
        elif name == "SWAP" and step.arg is not None:
            if step.arg <= len(stack):
                stack[-1], stack[-step.arg] = stack[-step.arg], stack[-1]
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            held = stack.pop() if stack else None
            used(held, at=step.offset, written=step.argval in _FILLING)
            of_self = held is None
            stack += [_Held(str(step.argval)) if of_self else None, *[None] * effect]
        elif name == "BUILD_SLICE":
            del stack[max(0, len(stack) + effect - 1) :]
            stack.append(_SLICE)
        elif name == "BUILD_TUPLE":
            for held in stack[max(0, len(stack) + effect - 1) :]:
                used(held)
            del stack[max(0, len(stack) + effect - 1) :]
            stack.append(_TUPLE)
        elif name == "BINARY_SUBSCR" or (name == "BINARY_OP" and step.argrepr == "[]"):
            held, index = (stack[-2], stack[-1]) if len(stack) > 1 else (None, None)
            del stack[-2:]
            if held is None or held.part or index is not None:
                used(held)
                used(index)
                held = None
            stack.append(held and held._replace(part=True))
        elif name == "STORE_SUBSCR":
            value, held, index = stack[-3:] if len(stack) > 2 else (None, None, None)
            del stack[-3:]
            used(value)
            whole = held is not None and not held.part and index in (None, _SLICE)
            used(held, at=step.offset, written=whole)
        elif name == "STORE_SLICE":
            value, held = (stack[-4], stack[-3]) if len(stack) > 3 else (None, None)
            del stack[-4:]
            used(value)
            used(held, at=step.offset, written=held is not None and not held.part)
        elif effect > 0:
            stack += [None] * effect
        else:
            pure = name.startswith(("POP_", "STORE_", "DELETE_", "RETURN_", "RAISE_", "END_"))
            taken = stack[max(0, len(stack) + effect - (not pure)) :]
            del stack[len(stack) - len(taken) :]
            for held in taken:
                used(held)
            stack += [None] * (not pure)
    return first


@once_for_class  # it takes milliseconds for a large class
def _code_of(cls: type, whole: bool) -> tuple[types.CodeType, ...]:
    """The code of the methods that make samples, and of those that they name."""
    return tuple(_reached(cls, whole))


def _reached(cls: type, whole: bool) -> Iterator[types.CodeType]:
    if whole:
        todo = [
            name
            for each in mro_of(cls)
            if "." in type_name(each) and not type_name(each).startswith(LEFT_ALONE)
            for name in namespace_of(each)
            if name != "__init__"
        ]
    else:
        todo = list(ENTRIES)
    seen: set[str] = set()
    known = set(todo)
    while todo and len(seen) < METHODS_MAX:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for found in definitions(cls, name):
            function = function_in(found)
            if type(function) is not types.FunctionType:
                continue
            for code in codes(function.__code__):
                yield code
                if not whole:
                    todo += [each for each in code.co_names if each not in known]
                    known.update(code.co_names)
