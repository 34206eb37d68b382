"""Tells a value as a short text, and runs no code of the user's. Runs in: both.

A text is bounded in length, depth and work, and says the same in every process that holds the same
value. What stands under the name of a secret (``api_key``) is not shown, at any depth.
"""

from __future__ import annotations

import collections
import datetime
import math
import pathlib
import types
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np
import torch

from safeloader._torch import without_overrides
from safeloader.introspect.redaction import REDACTED, looks_random, scrub, secrecy
from safeloader.introspect.values import (
    TEXT_MAX,
    Opaque,
    array_facts,
    container_base,
    cut,
    definitions,
    elements,
    fields,
    inherits,
    type_name,
)

LEAF_MAX = 48  # characters of one string inside a longer text
INDEX_MAX = 200  # characters of an index
ITEMS_MAX = 5  # elements of one container shown in a text
ENTRIES_MAX = 20  # elements of one container that is told as a container (``told_by_dataset``)
VALUES_MAX = 8  # a tensor or array of at most this many elements shows them
DEPTH = 2
_LABELS = ("name", "key", "header", "field", "var", "variable", "option")
_LABELLED = ("value", "values", "val", "data", "content")
_NUMBERS = (int, float, complex, np.number, np.bool_, range, torch.Tensor)


def bounded_text(value: object) -> str:
    """Return a text like ``repr`` of 120 characters at most for any object; run no foreign code.

    >>> bounded_text([1.5, "a", {"token": "hf_123"}, None, True, 6, 7])
    "[1.5, 'a', {'token': [redacted]}, None, True, ... 2 more]"
    """
    return cut(_text(value, DEPTH))


def index_text(index: object, most: int = INDEX_MAX) -> str:
    """Return the text of a dataset index or key, as :func:`bounded_text` does, at more length.

    >>> index_text(7), index_text("a/b.png"), index_text((0, 68))
    ('7', "'a/b.png'", '(0, 68)')
    """
    cls = type(index)
    if cls is Opaque:
        return cut(str.__str__(index), most)
    told = _string(cls, most - 20)(index) if cls is str or cls is bytes else _text(index, DEPTH)
    return cut(told, most)


def indices_text(indices: Sequence[Any], most: int = 8, *, counted: bool = False) -> str:
    """Return the text of some indices, the first ones in full.

    >>> indices_text(range(20), most=3), indices_text(range(20), most=3, counted=True)
    ('[0, 1, 2, ...]', '[0, 1, 2, ... 20 in all]')
    """
    shown = [*map(index_text, indices[:most])]
    if len(indices) > most:
        shown.append(f"... {len(indices)} in all" if counted else "...")
    return f"[{', '.join(shown)}]"


def plain_text(text: str) -> str:
    """Return a text of any origin as one that may leave: bounded, writable, without secrets."""
    return cut(scrub(str.__getitem__(text, slice(0, LOOKED_AT))))


def name_of(key: Any) -> str:
    """Return the text of a name: a text itself, nearly always, but any object can be a key.

    >>> name_of("rate"), name_of(3)
    ('rate', '[3]')
    """
    return plain_text(key) if inherits(type(key), str) else cut(f"[{_text(key, 0)}]")


def is_secret(name: str, value: object) -> bool:
    """Say whether a value is not to be shown, going by its name; see ``redaction.secrecy``.

    >>> is_secret("hf_token", "hf_123"), is_secret("pad_token_id", 0), is_secret("password", 0)
    (True, False, True)
    """
    how = secrecy(name)
    if how == "texts":
        return not _is_numeric(value, DEPTH)
    return bool(how) or (type(value) is str and looks_random(name, value))


def concealed(names: Sequence[object], values: Sequence[object]) -> list[bool]:
    """Say of each value whether its name, or a label beside it, makes it a secret.

    >>> concealed(["name", "value"], ["password", "sesame"])
    [False, True]
    """
    spoken = [_spoken(name) for name in names]
    labelled = any(
        name.lower() in _LABELS and secrecy(_spoken(value))
        for name, value in zip(spoken, values, strict=True)
    )
    return [
        is_secret(name, value) or (labelled and name.lower() in _LABELLED)
        for name, value in zip(spoken, values, strict=True)
    ]


def in_pairs(values: Sequence[object]) -> list[bool]:
    """Say of each element whether the one before it is the name of a secret.

    >>> in_pairs(["--password", "sesame"]), in_pairs((b"authorization", b"Bearer x"))
    ([False, True], [False, True])
    """
    return concealed(["", *values][: len(values)], values)


def _spoken(name: Any) -> str:
    """Return what a name says: texts, raw bytes as headers have them, or a tuple of such."""
    cls = type(name)
    if inherits(cls, str):
        return str.__getitem__(name, slice(0, TEXT_MAX))
    if inherits(cls, bytes):
        return bytes.__getitem__(name, slice(0, TEXT_MAX)).decode("latin-1")
    return " ".join(map(_spoken, name[:ITEMS_MAX])) if cls is tuple else ""


def _is_numeric(value: Any, depth: int) -> bool:
    """Say whether all that could be shown of a value is numbers; where in doubt it is not."""
    cls = type(value)
    if cls is int or cls is float or value is None or inherits(cls, *_NUMBERS):  # the usual first
        return True
    if inherits(cls, np.ndarray):
        kind: str = np.ndarray.dtype.__get__(value).kind
        return kind in "biufc"
    base = container_base(cls)
    if base is None or (depth == 0 and base.__len__(value)):
        return False
    parts = elements(value, base, ENTRIES_MAX)
    flat = chain.from_iterable(parts) if base is dict else parts
    return all(_is_numeric(each, depth - 1) for each in flat)


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
    told = _named(pairs, depth - 1)
    return f"<{' '.join([type_name(cls), *told, *_more(count, pairs)])}>"


def _container_text(value: Any, base: Any, depth: int) -> str:
    cls, count = type(value), base.__len__(value)
    if depth == 0 and count:
        return f"{type_name(cls)} of {count}"
    shown = elements(value, base, ITEMS_MAX)
    if base is dict:
        keys, values = [key for key, _ in shown], [each for _, each in shown]
        told = _told(values, concealed(keys, values), depth - 1)
        parts = [f"{_text(key, 0)}: {each}" for key, each in zip(keys, told, strict=True)]
    elif names := _namedtuple_fields(cls):
        parts = _named(list(zip(names, shown, strict=False)), depth - 1)
    else:
        # A set has no order, so nothing in it stands beside anything.
        hidden = [False] * len(shown) if base in (set, frozenset) else in_pairs(shown)
        parts = _told(shown, hidden, depth - 1)
    if base in (set, frozenset):
        # The order of a set differs between processes: shown in part it would seem to have changed.
        parts = sorted(parts) if count <= ITEMS_MAX else []
    brackets = _BRACKETS[base]
    comma = "," if base is tuple and count == 1 and cls is base else ""
    text = f"{brackets[0]}{', '.join([*parts, *_more(count, parts)])}{comma}{brackets[1]}"
    if cls is base and base in (dict, list, tuple, set):
        return text
    return f"{type_name(cls)}{text}" if base is tuple else f"{type_name(cls)}({text})"


def _named(pairs: list[tuple[Any, object]], depth: int) -> list[str]:
    names, values = [name_of(key) for key, _ in pairs], [value for _, value in pairs]
    told = _told(values, concealed(names, values), depth)
    return [f"{name}={each}" for name, each in zip(names, told, strict=True)]


def _told(values: list[Any], hidden: list[bool], depth: int) -> list[str]:
    pairs = zip(values, hidden, strict=True)
    return [REDACTED if secret else _text(value, depth) for value, secret in pairs]


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
    with suppress(Exception), without_overrides():  # not every tensor can be read
        if type(value) is np.ndarray:  # a subclass may be a file (memmap), or mask its elements
            if value.dtype.kind in "biufcSUmM" and value.nbytes <= 1024:
                flat = value.reshape(-1).tolist()
        elif facts.get("device") == "cpu" and "size_bytes" in facts:
            tensor: Any = torch.Tensor
            flat = tensor.tolist(tensor.reshape(tensor.detach(value), (-1,)))
    texts = _told(flat, in_pairs(flat), 0)
    texts = [f"{x:.8g}" if type(x) is float else t for x, t in zip(flat, texts, strict=True)]
    return [f"({', '.join(texts)})"] if texts else []


def _integer(value: Any) -> str:
    bits = int.bit_length(value)  # beyond some thousand digits, str() is slow and then refuses
    return int.__repr__(value) if bits <= 128 else f"<{bits} bits>"


def _string(base: Any, most: int = LEAF_MAX) -> Callable[[Any], str]:
    def text(value: Any) -> str:
        count = base.__len__(value)
        shown = base.__getitem__(value, slice(0, LOOKED_AT))
        said = shown if base is str else shown.decode("latin-1")
        clean = scrub(said)  # before it is cut: half a secret is not known for one
        if clean != said:
            shown, count = clean if base is str else base(clean, "latin-1"), len(clean)
        shown = repr(base.__getitem__(shown, slice(0, most)))
        return shown if count <= most else f"{shown}... of {count}"

    return text


LOOKED_AT = 1024  # characters of a text that are looked through for secrets
_BRACKETS: dict[Any, str] = {dict: "{}", list: "[]", tuple: "()", set: "{}", frozenset: "{}"}
_BRACKETS[collections.deque] = "[]"
_SCALARS: dict[Any, Callable[[Any], str]] = {
    int: _integer,
    float: float.__repr__,
    complex: complex.__repr__,
    **{cls: _string(cls) for cls in (str, bytes, bytearray)},
}


def _each(text: Callable[[Any], str], *classes: type) -> dict[int, Callable[[Any], str]]:
    """By id, because a metaclass may define ``__hash__`` and ``__eq__``; none is ever freed."""
    return dict.fromkeys(map(id, classes), text)


_NUMPY_SCALARS = [c for c in set(np.sctypeDict.values()) if issubclass(c, np.number | np.bool_)]
_EXACT: dict[int, Callable[[Any], str]] = {
    **_each(repr, type(None), bool, type(...), datetime.date, datetime.timedelta, torch.dtype),
    **_each(
        lambda value: scrub(repr(value)),
        *(torch.device, type(pathlib.Path()), type(pathlib.PurePath())),
    ),
    # A tzinfo is foreign; a generator's one field is an address.
    **_each(lambda value: repr(value.replace(tzinfo=None)), datetime.datetime),
    **_each(lambda value: "<torch.Generator>", torch.Generator),
    **_each(
        lambda value: (
            f"range({_integer(value.start)}, {_integer(value.stop)}, {_integer(value.step)})"
        ),
        range,
    ),
    **_each(lambda value: f"<function {value.__qualname__}>", types.FunctionType),
    **_each(lambda value: f"<function {value.__name__}>", types.BuiltinFunctionType),
    **_each(
        lambda value: f"<module {_text(vars(value).get('__name__'), 0)}>",
        types.ModuleType,
    ),
    **_each(lambda value: f"{type_name(type(value))}({value.item()!r})", *_NUMPY_SCALARS),
}
