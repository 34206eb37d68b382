"""Runs in both main and worker: looks at a value of the user's without running the user's code.

Attributes are read where the interpreter keeps them (instance dict and slots), past any property,
`__getattr__` or proxy; types are told by `type(value)`, because `isinstance` asks a lazy object for
its `__class__` and wakes it; containers are for the caller to read by the methods of their built-in
base class, a few elements each. What is found here, `texts` puts into words.
"""

from __future__ import annotations

import collections
import types
from contextlib import suppress
from itertools import islice, takewhile
from typing import Any

import numpy as np
import torch

from safeloader.torch_private import without_overrides

TEXT_MAX = 120  # characters of one text, and of one name

_CONTAINERS = (dict, list, tuple, set, frozenset, collections.deque)

# Read through `type` itself: a metaclass may define properties of these names.
_mro_of: Any = type.__dict__["__mro__"].__get__
_module_of: Any = type.__dict__["__module__"].__get__
_qualname_of: Any = type.__dict__["__qualname__"].__get__
_namespace_of: Any = type.__dict__["__dict__"].__get__


def type_name(cls: type) -> str:
    """Name a class in full, without running code of its metaclass.

    >>> type_name(collections.OrderedDict), type_name(int)
    ('collections.OrderedDict', 'int')
    """
    module: object = None
    with suppress(AttributeError):
        module = _module_of(cls)
    name = str.__str__(_qualname_of(cls))
    if type(module) is not str or module == "builtins":
        return name
    # A script's classes live in __main__, which a spawned worker knows as __mp_main__.
    return f"{'__main__' if module == '__mp_main__' else module}.{name}"


def inherits(cls: type, *bases: type) -> bool:
    """Say whether one of `bases` is among the ancestors of `cls`, without asking any metaclass.

    >>> inherits(bool, str, int)
    True
    """
    # By identity: `in` would ask the metaclass for `==`.
    return any(each is base for each in _mro_of(cls) for base in bases)


def definitions(cls: type, name: str) -> list[Any]:
    """Return what a class and its ancestors define under a name, the nearest first.

    >>> definitions(bool, "__len__")
    []
    """
    return [space[name] for space in map(_namespace_of, _mro_of(cls)) if name in space]


def array_facts(value: object) -> dict[str, Any] | None:
    """Return shape, dtype, device and size of a tensor or array; None for anything else.

    Nothing is read but the header, and a fact that cannot be told (the shape of a nested tensor)
    is left out.

    >>> array_facts(torch.zeros(2, 3))
    {'shape': [2, 3], 'dtype': 'float32', 'device': 'cpu', 'size_bytes': 24}
    """
    cls = type(value)
    facts: dict[str, Any] = {}
    array: Any = np.ndarray
    tensor: Any = torch.Tensor
    if inherits(cls, np.ndarray):
        dtype = array.dtype.__get__(value)
        facts["shape"] = list(array.shape.__get__(value))
        facts["dtype"] = cut(str(dtype)) if dtype.names is None else f"record of {len(dtype.names)}"
        facts["size_bytes"] = int(array.nbytes.__get__(value))
        return facts
    if not inherits(cls, torch.Tensor):
        return None
    derived = takewhile(lambda each: each is not torch.Tensor, _mro_of(cls))
    if any("__torch_dispatch__" in _namespace_of(each) for each in derived):
        return facts  # even its shape may be an answer of foreign code
    with without_overrides():
        with suppress(Exception):
            facts["shape"] = [int(size) for size in tensor.shape.__get__(value)]
        facts["dtype"] = str(tensor.dtype.__get__(value)).removeprefix("torch.")
        facts["device"] = str(tensor.device.__get__(value))
        with suppress(Exception):
            if tensor.layout.__get__(value) is torch.strided:
                facts["size_bytes"] = tensor.numel(value) * tensor.element_size(value)
    return facts


def container_base(cls: type) -> Any:
    """Return the built-in container that a class is or derives from; None where it is no container.

    >>> container_base(collections.Counter)
    <class 'dict'>
    """
    return next((base for base in _CONTAINERS if inherits(cls, base)), None)


def fields(value: object, most: int) -> tuple[list[tuple[Any, object]], int]:
    """Return what an object's own dict and slots hold, `most` of it, and the count of it all.

    >>> fields(Exception("not its args, which are kept elsewhere"), most=5)
    ([], 0)
    """
    pairs: list[tuple[Any, object]] = []
    count = 0
    for own in definitions(type(value), "__dict__"):
        if type(own) is types.GetSetDescriptorType:  # the interpreter's, not a property
            held: Any = own.__get__(value)
            if inherits(type(held), dict):
                count = dict.__len__(held)
                pairs = list(islice(dict.items(held), most))
                break
    for cls in _mro_of(type(value)):
        for name, slot in list(_namespace_of(cls).items()):
            if type(slot) is types.MemberDescriptorType and not name.startswith("__"):
                with suppress(Exception):  # an unset slot raises AttributeError
                    held = slot.__get__(value)
                    count += 1
                    if len(pairs) < most:
                        pairs.append((name, held))
    return pairs, count


def cut(text: str, most: int = TEXT_MAX) -> str:
    """Bound a text, and make it one that can be written as UTF-8.

    >>> cut("abcdefgh", 6)
    'abc...'
    """
    if len(text) > most:
        text = text[: most - 3] + "..."
    # A lone surrogate, as in undecodable file names, would fail where the JSON is written as UTF-8.
    return text.encode("utf-8", "backslashreplace").decode()[:most]
