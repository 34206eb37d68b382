"""Runs in both main and worker: tells a value as a short text, running no code of the user's.

A text is bounded in length, depth and work, and says the same in every process that holds the same
value. What stands under the name of a secret (`api_key`) is not shown, at any depth.
"""

from __future__ import annotations

import collections
import datetime
import math
import pathlib
import re
import types
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from safeloader.torch_private import without_overrides
from safeloader.wire.values import (
    TEXT_MAX,
    array_facts,
    container_base,
    cut,
    definitions,
    fields,
    inherits,
    type_name,
)

LEAF_MAX = 48  # characters of one string inside a longer text
ITEMS_MAX = 5  # elements of one container shown in a text
ENTRIES_MAX = 20  # elements of one container that is told as a container (`told_by_dataset`)
VALUES_MAX = 8  # a tensor or array of at most this many elements shows them
DEPTH = 2
REDACTED = "[redacted]"

# "authkey" is what the proxies of multiprocessing's managers carry.
_SECRETS = re.compile(
    "password|passwd|passphrase|secret|credential|apikey|privatekey|accesskey|authkey|accountkey"
    "|encryptionkey|signingkey|authorization|bearer|cookie"
)
_SECRET_WORDS = frozenset({"pwd", "creds", "cred", "auth", "dsn"})
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_NUMBERS = (int, float, complex, np.number, np.bool_, range, torch.Tensor)


def bounded_text(value: object) -> str:
    """Return a text of at most 120 characters for any object, `repr`-like, running no foreign code.

    >>> bounded_text([1.5, "a", {"token": "hf_123"}, None, True, 6, 7])
    "[1.5, 'a', {'token': [redacted]}, None, True, ... 2 more]"
    """
    return cut(_text(value, DEPTH))


def name_of(key: Any) -> str:
    """Return the text of a name: a text itself, nearly always, but any object can be a key.

    >>> name_of("rate"), name_of(3)
    ('rate', '[3]')
    """
    if inherits(type(key), str):
        return cut(str.__getitem__(key, slice(0, TEXT_MAX + 1)))
    return cut(f"[{_text(key, 0)}]")


def is_secret(name: str, value: object) -> bool:
    """Say whether a value is not to be shown, going by its name.

    Tokens are two things: a text of that name may open a door, numbers are what language models
    read. All other secrets are kept whatever the value.

    >>> is_secret("hf_token", "hf_123"), is_secret("pad_token_id", 0), is_secret("password", 0)
    (True, False, True)
    """
    if _SECRETS.search(re.sub("[^a-z]", "", name.lower())):
        return True
    words = [word.lower() for word in _WORDS.findall(name)]
    if not _SECRET_WORDS.isdisjoint(words):
        return True
    return any(word in ("token", "tokens") for word in words) and not _is_numeric(value, DEPTH)


def _is_numeric(value: Any, depth: int) -> bool:
    """Say whether all that could be shown of a value is numbers; where in doubt it is not."""
    cls = type(value)
    if cls is int or cls is float or value is None or inherits(cls, *_NUMBERS):  # most first
        return True
    if inherits(cls, np.ndarray):
        kind: str = np.ndarray.dtype.__get__(value).kind
        return kind in "biufc"
    base = container_base(cls)
    if base is None or (depth == 0 and base.__len__(value)):
        return False
    parts = islice((dict.items if base is dict else base.__iter__)(value), ENTRIES_MAX)
    return all(
        _is_numeric(each, depth - 1)
        for each in (chain.from_iterable(parts) if base is dict else parts)
    )


def _text(value: Any, depth: int) -> str:
    cls = type(value)
    if exact := _EXACT.get(id(cls)):
        return exact(value)
    for base, text in _SCALARS.items():
        if inherits(cls, base):
            return text(value) if cls is base else f"{type_name(cls)}({text(value)})"
    facts = array_facts(value)
    if facts is not None:
        told = [str(facts[fact]) for fact in ("dtype", "shape", "device") if fact in facts]
        return " ".join([type_name(cls), *told, *_elements(value, facts)])
    if base := container_base(cls):
        return _container_text(value, base, depth)
    if inherits(cls, type):
        return f"<class {type_name(value)}>"
    if depth < DEPTH:
        return f"<{type_name(cls)}>"
    pairs, count = fields(value, ITEMS_MAX)
    named = [(name_of(key), each) for key, each in pairs]
    told = [f"{name}={_unless_secret(name, each, depth - 1)}" for name, each in named]
    return f"<{' '.join([type_name(cls), *told, *_more(count, pairs)])}>"


def _container_text(value: Any, base: Any, depth: int) -> str:
    cls, count = type(value), base.__len__(value)
    if depth == 0 and count:
        return f"{type_name(cls)} of {count}"
    shown = list(islice((dict.items if base is dict else base.__iter__)(value), ITEMS_MAX))
    if base is dict:
        parts = [f"{_text(k, 0)}: {_unless_secret(name_of(k), v, depth - 1)}" for k, v in shown]
    elif names := _namedtuple_fields(cls):
        pairs = zip(names, shown, strict=False)
        parts = [f"{name}={_unless_secret(name, each, depth - 1)}" for name, each in pairs]
    else:
        parts = [_text(each, depth - 1) for each in shown]
    if base in (set, frozenset):
        # The order of a set differs between processes: shown in part it would seem to have changed.
        parts = sorted(parts) if count <= ITEMS_MAX else []
    left, right = _BRACKETS[base]
    text = f"{left}{', '.join([*parts, *_more(count, parts)])}{right}"
    if cls is base and base in (dict, list, tuple, set):
        return text
    return f"{type_name(cls)}{text}" if base is tuple else f"{type_name(cls)}({text})"


def _unless_secret(name: str, value: object, depth: int) -> str:
    return REDACTED if is_secret(name, value) else _text(value, depth)


def _more(count: int, shown: list[Any]) -> list[str]:
    return [f"... {count - len(shown)} more"] if count > len(shown) else []


def _namedtuple_fields(cls: type) -> list[str]:
    found = (names for names in definitions(cls, "_fields") if type(names) is tuple)
    return [name_of(name) for name in next(found, ())[:ITEMS_MAX]]


def _elements(value: Any, facts: dict[str, Any]) -> list[str]:
    """Return the elements of a small array or tensor in this process's memory, else nothing."""
    if math.prod(facts.get("shape", [0])) not in range(1, VALUES_MAX + 1):
        return []
    flat: list[Any] = []
    with suppress(Exception), without_overrides():
        if type(value) is np.ndarray:  # a subclass may be a file (memmap), or mask its elements
            if value.dtype.kind in "biufcSUmM" and value.nbytes <= 1024:
                flat = value.reshape(-1).tolist()
        elif facts.get("device") == "cpu" and "size_bytes" in facts:
            tensor: Any = torch.Tensor
            flat = tensor.tolist(tensor.reshape(tensor.detach(value), (-1,)))
    texts = [f"{each:.8g}" if type(each) is float else _text(each, 0) for each in flat]
    return [f"({', '.join(texts)})"] if texts else []


def _integer(value: Any) -> str:
    bits = int.bit_length(value)  # beyond some thousand digits, str() is slow and then refuses
    return int.__repr__(value) if bits <= 128 else f"<{bits} bits>"


def _string(base: Any) -> Callable[[Any], str]:
    def text(value: Any) -> str:
        count = base.__len__(value)
        shown = repr(base.__getitem__(value, slice(0, LEAF_MAX)))
        return shown if count <= LEAF_MAX else f"{shown}... of {count}"

    return text


_BRACKETS: dict[Any, tuple[str, str]] = {
    dict: ("{", "}"),
    list: ("[", "]"),
    tuple: ("(", ")"),
    set: ("{", "}"),
    frozenset: ("{", "}"),
    collections.deque: ("[", "]"),
}
_SCALARS: dict[Any, Callable[[Any], str]] = {
    int: _integer,
    float: float.__repr__,
    complex: complex.__repr__,
    str: _string(str),
    bytes: _string(bytes),
    bytearray: _string(bytearray),
}
# By id, because a metaclass may define `__hash__` and `__eq__`. None of these is ever freed.
_EXACT: dict[int, Callable[[Any], str]] = {
    **{
        id(cls): repr
        for cls in (type(None), bool, type(...), datetime.date, datetime.timedelta, torch.dtype)
    },
    **{id(cls): repr for cls in (torch.device, type(pathlib.Path()), type(pathlib.PurePath()))},
    id(datetime.datetime): lambda value: repr(value.replace(tzinfo=None)),  # a tzinfo is foreign
    id(torch.Generator): lambda value: "<torch.Generator>",  # its one field is an address
    id(range): lambda value: (
        f"range({', '.join(map(_integer, (value.start, value.stop, value.step)))})"
    ),
    id(types.FunctionType): lambda value: f"<function {value.__qualname__}>",
    id(types.BuiltinFunctionType): lambda value: f"<function {value.__name__}>",
    id(types.ModuleType): lambda value: f"<module {_text(vars(value).get('__name__'), 0)}>",
    **{
        id(cls): lambda value: f"{type_name(type(value))}({value.item()!r})"
        for cls in set(np.sctypeDict.values())
        if issubclass(cls, np.number | np.bool_)
    },
}
