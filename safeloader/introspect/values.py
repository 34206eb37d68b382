"""Looks at a value of the user's without running the user's code. Runs in: both.

Attributes are read where the interpreter keeps them (instance dict and slots), past any property,
``__getattr__`` or proxy. A type is ``type(value)``, because ``isinstance`` asks a lazy object for
its ``__class__`` and wakes it. Containers are read by the methods of their built-in base class, a
few elements each. :mod:`~safeloader.introspect.texts` puts into words what is found here.
"""

from __future__ import annotations

import abc
import collections
import types
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from safeloader._torch import without_overrides

_T = TypeVar("_T")
_CLASSES_MAX = 512  # of which one look is remembered
TEXT_MAX = 120  # characters of one text, and of one name

# By id: a metaclass may define ``__hash__`` and ``__eq__``. No class derives from two of them.
_CONTAINERS = frozenset(map(id, (dict, list, tuple, set, frozenset, collections.deque)))
_SIZED = _CONTAINERS.union(map(id, (str, bytes, bytearray, range)))

# Read through ``type`` itself: a metaclass may define properties of these names.
mro_of: Any = type.__dict__["__mro__"].__get__
_module_of: Any = type.__dict__["__module__"].__get__
_qualname_of: Any = type.__dict__["__qualname__"].__get__
namespace_of: Any = type.__dict__["__dict__"].__get__
_DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType)  # the interpreter's own


class Opaque(str):
    """Stands for an object that is not to be had: its type's name, or why; told without quotes."""

    __slots__ = ()


def type_name(cls: type) -> str:
    """Name a class in full, without running code of its metaclass.

    >>> type_name(collections.OrderedDict), type_name(int)
    ('collections.OrderedDict', 'int')
    """
    module = module_of(cls)
    name = str.__str__(_qualname_of(cls))
    if module in ("", "builtins"):
        return name
    # A script's classes live in __main__, which a spawned worker knows as __mp_main__.
    return f"{'__main__' if module == '__mp_main__' else module}.{name}"


def module_of(cls: type) -> str:
    """Name the module that a class says it is from; "" of one that says none.

    >>> module_of(collections.OrderedDict)
    'collections'
    """
    try:
        module: object = _module_of(cls)
    except AttributeError:
        return ""
    return module if type(module) is str else ""


def inherits(cls: type, *bases: type) -> bool:
    """Say whether one of ``bases`` is among the ancestors of ``cls``, without asking any metaclass.

    >>> inherits(bool, str, int)
    True
    """
    # By identity: ``in`` would ask the metaclass for ``==``. In loops: any() takes longer.
    for each in mro_of(cls):
        for base in bases:
            if each is base:
                return True
    return False


def is_one_of(cls: type, *classes: type) -> bool:
    """Say whether a class is one of ``classes`` itself, without asking any metaclass for ``==``.

    >>> is_one_of(bool, str, int)
    False
    """
    for each in classes:  # noqa: SIM110  # any() takes longer, and each worker asks often
        if cls is each:
            return True
    return False


def definitions(cls: type, name: str) -> list[Any]:
    """Return what a class and its ancestors define under a name, the nearest first.

    >>> definitions(bool, "__len__")
    []
    """
    return [space[name] for space in map(namespace_of, mro_of(cls)) if name in space]


def is_written_in_python(cls: type) -> bool:
    """Say whether a class is written in Python, so that its objects are their attributes.

    That of an extension has a type of its own, or objects with room for more than attributes.

    >>> is_written_in_python(Opaque), is_written_in_python(collections.deque)
    (False, False)
    >>> class Plain: ...
    >>> is_written_in_python(Plain)
    True
    """
    flags, size = (type.__dict__[name].__get__(cls) for name in ("__flags__", "__basicsize__"))
    slots = sum(
        type(each) is types.MemberDescriptorType
        for base in mro_of(cls)
        for each in list(namespace_of(base).values())
    )
    usual = any(type(cls) is each for each in (type, abc.ABCMeta))
    return usual and bool(flags & _HEAP_TYPE) and size <= _PLAIN_SIZE + 8 * slots


_HEAP_TYPE = 1 << 9  # of ``__flags__``: made while the program ran
_PLAIN_SIZE = 32  # bytes of an object with a dict and weak references, at most


def array_facts(value: object) -> dict[str, Any] | None:
    """Return shape, dtype, device and size of a tensor or array; None for anything else.

    It reads nothing but the header, and leaves out what has no answer (a nested tensor's shape).

    >>> array_facts(torch.zeros(2, 3))
    {'shape': [2, 3], 'dtype': 'float32', 'device': 'cpu', 'size_bytes': 24}
    """
    cls = type(value)
    facts: dict[str, Any] = {}
    array: Any = np.ndarray
    tensor: Any = torch.Tensor
    if inherits(cls, np.ndarray):
        dtype = array.dtype.__get__(value)
        return {
            "shape": list(array.shape.__get__(value)),
            "dtype": f"record of {len(dtype.names)}" if dtype.names else cut(str(dtype)),
            "size_bytes": int(array.nbytes.__get__(value)),
        }
    if not inherits(cls, torch.Tensor):
        return None
    dispatch = "__torch_dispatch__"
    if len(definitions(cls, dispatch)) > len(definitions(torch.Tensor, dispatch)):
        return facts  # even its shape may be an answer of foreign code
    with suppress(AttributeError), without_overrides():  # an unknown torch may have no such thing
        with suppress(Exception):  # a nested tensor has none
            facts["shape"] = [int(size) for size in tensor.shape.__get__(value)]
        facts["dtype"] = str(tensor.dtype.__get__(value)).removeprefix("torch.")
        facts["device"] = str(tensor.device.__get__(value))
        with suppress(Exception):  # nor have others a size
            if tensor.layout.__get__(value) is torch.strided:
                facts["size_bytes"] = tensor.numel(value) * tensor.element_size(value)
    return facts


def container_base(cls: type) -> Any:
    """Return the built-in container that a class is or derives from; None where it is no container.

    >>> container_base(collections.Counter)
    <class 'dict'>
    """
    for each in mro_of(cls):
        if id(each) in _CONTAINERS:
            return each
    return None


def weakly(thing: Any) -> Callable[[], Any]:
    """Return what gives ``thing`` without holding it, or holds it where it bears no weak reference.

    >>> weakly(3)()
    3
    """
    try:
        return weakref.ref(thing)
    except TypeError:
        return lambda: thing


def own_length(value: Any) -> int | None:
    """Return the length of a container or text as its built-in base class has it; None of others.

    >>> own_length("abc"), own_length(3)
    (3, None)
    """
    base: Any = next((each for each in mro_of(type(value)) if id(each) in _SIZED), None)
    return None if base is None else base.__len__(value)


def held_by(value: Any, most: int | None = None) -> list[tuple[Any, Any]]:
    """Return the first parts of a value, each after what it stands under: a key, a place, a name.

    >>> held_by({"a": 1, "b": 2}, most=1), held_by(["c"]), held_by(Exception())
    ([('a', 1)], [(0, 'c')], [])
    """
    base = container_base(type(value))
    if base is None:
        return fields(value, most)
    pairs: Any = dict.items(value) if base is dict else enumerate(base.__iter__(value))
    return list(islice(pairs, most))


def once_for_class(look: Callable[..., _T]) -> Callable[..., _T]:
    """Have a look at a class taken once for each class, and each set of further arguments.

    By the id of the class, since a metaclass may define ``__hash__``; it is not held.

    >>> looks = []
    >>> look = once_for_class(lambda cls: looks.append(cls) or len(looks))
    >>> look(int), look(str), look(int)
    (1, 2, 1)
    """
    known: dict[tuple[Any, ...], tuple[weakref.ref[type], _T]] = {}

    @wraps(look)
    def looked(cls: type, *more: Any) -> _T:
        key = id(cls), *more
        found = known.get(key)
        if found is None or found[0]() is not cls:
            if len(known) >= _CLASSES_MAX:
                known.clear()
            found = known[key] = weakref.ref(cls), look(cls, *more)
        return found[1]

    return looked


@once_for_class
def _slots_of(cls: type) -> tuple[tuple[str, Any], ...]:
    """The slots of a class and its ancestors; a tensor's names are 700."""
    return tuple(
        (name, slot)
        for each in mro_of(cls)
        for name, slot in list(namespace_of(each).items())
        if type(slot) is types.MemberDescriptorType and not name.startswith("__")
    )


def fields(value: object, most: int | None = None) -> list[tuple[Any, object]]:
    """Return what an object's own dict and slots hold, or the first ``most`` of it.

    >>> fields(Exception("not its args, which are kept elsewhere"))
    []
    """
    pairs: list[tuple[Any, object]] = []
    for own in definitions(type(value), "__dict__"):
        if any(type(own) is each for each in _DESCRIPTORS):  # not a property
            held: Any = own.__get__(value)
            if inherits(type(held), dict):
                pairs = list(islice(dict.items(held), most))
                break
    for name, slot in _slots_of(type(value)):
        with suppress(AttributeError):  # an unset slot
            pairs.append((name, slot.__get__(value)))
    return pairs[:most]


def exception_text(exc: BaseException) -> str:
    """Return ``str(exc)``, which is the user's code: guarded here, and for the caller to bound.

    >>> exception_text(KeyError("a"))
    "'a'"
    """
    try:
        text = str(exc)
    except KeyboardInterrupt:
        raise
    except BaseException as fault:  # a SystemExit in it must not end the process
        return f"<str() of the {type_name(type(exc))} raised {type_name(type(fault))}>"
    return str.__getitem__(text, slice(None))  # of a subclass too, whose methods are the user's


def plain_length(value: Any) -> int | None:
    """Return the length of a container, or of a dataset of torch's over one; run no other code.

    >>> plain_length([7, 8]), plain_length(Exception())
    (2, None)
    """
    cls = type(value)
    if (length := own_length(value)) is not None:
        return length
    own: dict[str, Any] = dict(fields(value, 8))
    if cls is Subset:
        return plain_length(own.get("indices"))
    if cls is ConcatDataset and type(sizes := own.get("cumulative_sizes")) is list and sizes:
        return int(sizes[-1])
    if cls is TensorDataset and type(tensors := own.get("tensors")) is tuple and tensors:
        return plain_length(tensors[0])
    shape = (array_facts(value) or {}).get("shape")
    return shape[0] if shape else None


def weight(value: Any, depth: int = 3) -> int:
    """Return the bytes that an object takes, about, with what it holds; runs no foreign code.

    >>> weight("a" * 1000) > 1000, weight(("a" * 1000, 3)) > 1000
    (True, True)
    """
    cls = type(value)
    if inherits(cls, str):
        return 80 + str.__len__(value) * (1 if str.isascii(value) else 4)
    if inherits(cls, bytes):
        return 80 + bytes.__len__(value)
    if inherits(cls, int, float, type(None)):
        return 40
    if base := container_base(cls):
        within = dict.items(value) if base is dict else base.__iter__(value)
        inner = (weight(part, depth - 1) for part in within) if depth else (100,)
        return 80 + 8 * int(base.__len__(value)) + sum(inner)
    held = fields(value, 16) if depth else []
    return 100 + sum(weight(part, depth - 1) for _, part in held)


def cut(text: str, most: int = TEXT_MAX) -> str:
    """Bound a text, and make it one that can be written as UTF-8.

    >>> cut("abcdefgh", 6)
    'abc...'
    """
    if len(text) > most:
        text = text[: most - 3] + "..."
    # A lone surrogate, as in undecodable file names, would fail where the JSON is written as UTF-8.
    return text.encode("utf-8", "backslashreplace").decode()[:most]


def short_type_name(exception_type: str) -> str:
    """The last part of a qualified type name, as torch puts it in its messages."""
    return exception_type.rsplit(".", 1)[-1]


def bounded(text: str, limit: int) -> str:
    """``text`` in ``limit`` characters: where it is longer, its middle is left out and counted.

    What says so is never longer than what it stands for.

    >>> bounded("a" * 60 + "b" * 60, 80)
    'aaaaaaaaaaaaaaaaaaaaaaa ... 74 characters left out ... bbbbbbbbbbbbbbbbbbbbbbb'
    """
    if len(text) <= limit:
        return text
    said = f" ... {len(text)} characters left out ... "  # the number is no longer than this one
    half = (limit - len(said)) // 2
    if half < 1:
        return cut(text, limit)
    return f"{text[:half]} ... {len(text) - 2 * half} characters left out ... {text[-half:]}"
