"""Tells a value as a short text, and runs no code of the user's. Runs in: both.

A text is bounded in length, depth and work, and says the same in every process that holds the same
value. What stands under the name of a secret (``api_key``) is not shown, at any depth.
"""

from __future__ import annotations

import collections
import datetime
import enum
import math
import pathlib
import re
import types
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np
import torch

from safeloader._torch import without_overrides
from safeloader.introspect.redaction import (
    REDACTED,
    SPECIAL_TOKEN,
    looks_random,
    scrub,
    secrecy,
)
from safeloader.introspect.tables import table_facts, table_name
from safeloader.introspect.values import (
    TEXT_MAX,
    Opaque,
    array_facts,
    bounded,
    container_base,
    cut,
    definitions,
    fields,
    held_by,
    inherits,
    type_name,
)

LEAF_MAX = 48  # characters of one string inside a longer text
INDEX_MAX = 200  # characters of an index
KEY_MAX = 40  # characters of a key in a path
ITEMS_MAX = 5  # elements of one container shown in a text
_REST_MAX = 4  # further ones looked at: they may take no more room than saying how many
ENTRIES_MAX = 20  # elements of one container that is told as a container (``told_by_dataset``)
COLUMNS_SHOWN = 12  # of a table
TABLE_MAX = 300  # characters of a table's columns and index
VALUES_MAX = 8  # a tensor or array of at most this many elements shows them
DEPTH = 2
_HIDDEN = Opaque(REDACTED)  # in the place of a secret
_LABELS = ("name", "key", "header", "field", "var", "variable", "option", "type")
_LABELLED = ("value", "values", "val", "data", "content")
_BETWEEN = ("=", ":", "==", "=>", ":=")
_NUMBERS = (int, float, complex, np.number, np.bool_, range, torch.Tensor)


def bounded_text(value: object) -> str:
    """Return a text like ``repr`` of 120 characters at most for any object; run no foreign code.

    >>> bounded_text([1.5, "a", {"token": "hf_123"}, None, True, 600, 700000])
    "[1.5, 'a', {'token': [redacted]}, None, True, ... 2 more]"
    """
    most = TABLE_MAX if table_name(value) else TEXT_MAX
    return cut(_text(value, DEPTH), most)


def index_text(index: object, most: int = INDEX_MAX) -> str:
    """Return the text of a dataset index or key, as :func:`bounded_text` does, at more length.

    >>> index_text(7), index_text("a/b.png"), index_text((0, 68))
    ('7', "'a/b.png'", '(0, 68)')
    """
    cls = type(index)
    told = _string(cls, most - 20)(index) if cls is str or cls is bytes else _text(index, DEPTH)
    return cut(told, most)


def is_path(value: object) -> bool:
    """Say whether a value is a path or a text that looks like the path or URL of a file.

    >>> [is_path(each) for each in ("a/b.png", "s3://bucket/7", "x.tar.gz", pathlib.Path("a"))]
    [True, True, True, True]
    >>> [is_path(each) for each in ("a cat and/or a dog", "3.14", "image/png", "", 7, "Hi. You")]
    [False, False, False, False, False, False]
    """
    cls: Any = type(value)
    if any(cls is each for each in _PATHS):  # a metaclass may define ``__eq__``
        return True
    if cls is not str and cls is not np.str_:
        return False
    text = str.__str__(value)
    return len(text) <= PATH_MAX and _PATH.fullmatch(text) is not None


def path_text(value: object) -> str:
    """Return the text of what :func:`is_path`, whole but for secrets, or without its middle.

    >>> path_text(pathlib.PurePosixPath("a/b.png")), path_text("https://me:x123@host/a.png")
    ("PurePosixPath('a/b.png')", "'https://me:[redacted]@host/a.png'")
    """
    if type(value) is str or type(value) is np.str_:
        text = repr(scrub(str.__str__(value)))
        text = text if type(value) is str else f"str_({text})"
    else:
        text = scrub(repr(value))
    return cut(bounded(text, PATH_MAX), PATH_MAX + 60)


def indices_text(indices: Sequence[Any], most: int = 8, *, counted: bool = False) -> str:
    """Return the text of some indices, the first ones in full.

    >>> indices_text(range(20), most=3), indices_text(range(20), most=3, counted=True)
    ('[0, 1, 2, ...]', '[0, 1, 2, ... 20 in all]')
    """
    shown = [*map(index_text, indices[: most + _REST_MAX])]
    more = f"... {len(indices)} in all" if counted else "..."
    if len(shown) < len(indices) or len(", ".join(shown[most:])) > len(more):
        shown = [*shown[:most], more]
    return f"[{', '.join(shown)}]"


def plain_text(text: str, most: int = TEXT_MAX) -> str:
    """Return a text of any origin as one that may leave: bounded, writable, without secrets."""
    return cut(scrub(str.__getitem__(text, slice(0, LOOKED_AT))), most)


def plain(value: Any, *, depth: int, items: int | None, chars: int) -> Any:
    """Return a value as JSON has it, without its secrets: what JSON has no form for as a text.

    Args:
        value: anything; none of its code runs.
        depth: levels of containers that are told as such; what is deeper is a text.
        items: of one container, the rest is counted; None for all.
        chars: of one text.

    >>> plain({"a": (1, 2, 3, 4), "password": "x"}, depth=2, items=2, chars=80)
    {'a': [1, 2, '... 2 more'], 'password': '[redacted]'}
    """
    cls, base = type(value), container_base(type(value))
    finite = cls is float and math.isfinite(value)
    if value is None or cls is bool or finite or (cls is int and value.bit_length() < 64):
        return value
    if inherits(cls, str):
        return plain_text(value, chars)
    if depth == 0 or base not in (dict, list, tuple):
        return index_text(value, min(chars, INDEX_MAX))
    if items is not None and base.__len__(value) == items + 1:
        items += 1  # as much as to say that there is 1 more
    names, shown = shown_parts(value, base, items)
    told = [plain(part, depth=depth - 1, items=items, chars=chars) for part in shown]
    left = base.__len__(value) - len(shown)
    if names or base is dict:
        table = dict(zip(map(name_of, names), told, strict=True))
        return table | {"...": f"{left} more"} if left else table
    return [*told, *_more(left)]


def name_of(key: Any) -> str:
    """Return the text of a name: a text itself, nearly always, but any object can be a key.

    >>> name_of("rate"), name_of(3)
    ('rate', '[3]')
    """
    return plain_text(key) if inherits(type(key), str) else cut(f"[{_text(key, 0)}]")


def key_text(key: object) -> str:
    """Return the text of a key in a path: of an object its type, not what it holds.

    >>> key_text("rate"), key_text((1, 2)), key_text(Exception())
    ("'rate'", '(1, 2)', '<Exception>')
    """
    return cut(_text(key, DEPTH - 1), KEY_MAX)


def is_secret(name: str, value: object) -> bool:
    """Say whether a value is not to be shown, going by its name; see ``redaction.secrecy``.

    >>> is_secret("hf_token", "hf_123"), is_secret("pad_token_id", 0), is_secret("password", 0)
    (True, False, True)
    """
    how = secrecy(name)
    if how == "texts":
        return not _is_harmless(value, DEPTH)
    if how or _is_secret_member(value):
        return True
    if name.lower().endswith("keys"):  # each under the name of what it opens
        return any(secrecy(f"{_spoken(key)} {name}") for key, _ in held_by(value, ENTRIES_MAX))
    return type(value) is str and looks_random(name, value)


def without_secrets(names: Sequence[object], values: Sequence[object]) -> list[Any]:
    """Return the values, but for those that their name, or a label beside them, makes a secret.

    >>> without_secrets(["name", "value"], ["password", "sesame"])
    ['password', '[redacted]']
    """
    pairs = [*zip(map(_spoken, names), values, strict=True)]
    labelled = any(name.lower() in _LABELS and secrecy(_spoken(value)) for name, value in pairs)
    return [
        _HIDDEN if is_secret(name, value) or (labelled and name.lower() in _LABELLED) else value
        for name, value in pairs
    ]


def shown_parts(value: Any, base: Any, most: int | None) -> tuple[list[Any], list[Any]]:
    """Return what the first parts of a value are called, if anything, and they, less secrets.

    ``base`` is that of a container; None for an object, whose parts are its attributes. In a
    sequence the part before one may be its name.

    >>> shown_parts(["--password", "sesame"], list, 5), shown_parts({"pwd": "sesame"}, dict, 5)
    (([], ['--password', '[redacted]']), (['pwd'], ['[redacted]']))
    """
    held = held_by(value, most)
    names, within = [name for name, _ in held], [part for _, part in held]
    if base is set or base is frozenset:  # without an order, so nothing stands beside anything
        return [], within
    if base is not dict and base is not None:
        named = definitions(type(value), "_fields")[:1] if base is tuple else []
        names = [name for own in named if type(own) is tuple for name in own[:most]]
        names = names if len(names) == len(within) else []
    return names, without_secrets(names or _before(within), within)


def _before(values: list[Any]) -> list[Any]:
    """Return what stands before each value; ``("password", "=", "sesame")`` is of two."""
    names: list[Any] = [""]
    for value in values[:-1]:
        names.append(names[-1] if type(value) is str and value in _BETWEEN else value)
    return names[: len(values)]


def _spoken(name: Any) -> str:
    """Return what a name says: texts, raw bytes as headers have them, or a tuple of such."""
    cls = type(name)
    if inherits(cls, str):
        return str.__getitem__(name, slice(0, TEXT_MAX)).strip("_")
    if inherits(cls, bytes):
        return bytes.__getitem__(name, slice(0, TEXT_MAX)).decode("latin-1")
    return " ".join(map(_spoken, name[:ITEMS_MAX])) if cls is tuple or cls is list else ""


def _is_harmless(value: Any, depth: int) -> bool:
    """Say whether all that could be shown of a value is numbers, or what tokenizers call tokens."""
    cls = type(value)
    if cls is int or cls is float or value is None or inherits(cls, *_NUMBERS):  # the usual first
        return True
    if cls is str:
        return SPECIAL_TOKEN.fullmatch(value) is not None
    if inherits(cls, np.ndarray):
        kind: str = np.ndarray.dtype.__get__(value).kind
        return kind in "biufc"
    base = container_base(cls)
    if base is None or (depth == 0 and base.__len__(value)):  # where in doubt it is not
        return False
    flat = chain.from_iterable(held_by(value, ENTRIES_MAX))
    return all(_is_harmless(each, depth - 1) for each in flat)


def _is_secret_member(value: object) -> bool:
    """Say whether a value is a member of an enumeration, under the name of a secret."""
    return inherits(type(value), enum.Enum) and any(
        name == "_name_" and secrecy(_spoken(own)) for name, own in fields(value)
    )


def _text(value: Any, depth: int) -> str:
    cls = type(value)
    if exact := _EXACT.get(id(cls)):
        return exact(value)
    for base, text in _SCALARS.items():
        if inherits(cls, base):
            if cls is base:
                return text(value)
            return REDACTED if _is_secret_member(value) else f"{type_name(cls)}({text(value)})"
    if (facts := array_facts(value)) is not None:
        told = [str(facts[fact]) for fact in ("dtype", "shape", "device") if fact in facts]
        return " ".join([type_name(cls), *told, *_elements(value, facts)])
    if inherits(cls, type):
        return f"<class {type_name(value)}>"
    if (table := table_facts(value)) is not None:
        return _table_text(table_name(value), table)
    return _parts_text(value, container_base(cls), depth)


def _table_text(name: str, facts: dict[str, Any]) -> str:
    told = [" ".join([name, *(str(facts[fact]) for fact in ("dtype", "shape") if fact in facts)])]
    if "columns" in facts:
        shown = [_text(each, 0) for each in facts["columns"][:COLUMNS_SHOWN]]
        left = facts["shape"][1] - len(shown)
        told.append("columns " + ", ".join([*shown, *_more(left)]))
    if "index" in facts:
        told.append(index_of_table_text(facts["index"]))
    return "; ".join(told)


def index_of_table_text(index: tuple[Any, ...]) -> str:
    """Return the text of the ``index`` of :func:`~safeloader.introspect.tables.table_facts`.

    >>> index_of_table_text(("RangeIndex", None, 0, 9)), index_of_table_text(("Index", "id"))
    ('RangeIndex from 0 to 9', "Index 'id', empty")
    """
    kind, name, *ends = index
    named = kind if name is None else f"{kind} {_text(name, 0)}"
    if not ends:
        return f"{named}, empty"
    return f"{named} from {_text(ends[0], 0)} to {_text(ends[1], 0)}"


def _parts_text(value: Any, base: Any, depth: int) -> str:
    cls, count = type(value), base.__len__(value) if base else len(fields(value))
    if base is None and depth < DEPTH:
        return f"<{type_name(cls)}>"
    if depth == 0 and count:
        return f"{type_name(cls)} of {count}{_field_names(value, base)}"
    names, shown = shown_parts(value, base, ITEMS_MAX + _REST_MAX)
    told = [_text(part, depth - 1) for part in shown]
    if base is dict:
        told = [f"{_text(key, 0)}: {part}" for key, part in zip(names, told, strict=True)]
    elif names:
        told = [f"{name_of(name)}={part}" for name, part in zip(names, told, strict=True)]
    if base in (set, frozenset):
        told = sorted(told) if count <= len(told) else []
    told = _worth_showing(told, count, ITEMS_MAX)
    if base is None:
        return f"<{' '.join([type_name(cls), *told, *_more(count - len(told))])}>"
    if base in (set, frozenset) and len(told) < count:
        told = []  # its order differs between processes: a part would seem to have changed
    brackets = _BRACKETS[base]
    comma = "," if base is tuple and count == 1 and cls is base else ""
    text = f"{brackets[0]}{', '.join([*told, *_more(count - len(told))])}{comma}{brackets[1]}"
    if cls is base and base in (dict, list, tuple, set):
        return text
    return f"{type_name(cls)}{text}" if base is tuple else f"{type_name(cls)}({text})"


def _worth_showing(told: list[str], count: int, most: int) -> list[str]:
    """The first texts; all of ``count``, where saying how many are left out takes as long."""
    rest = told[most:]
    if len(told) == count and len(", ".join(rest)) <= len(_more(len(rest) or 1)[0]):
        return told
    return told[:most]


def _field_names(value: Any, base: Any) -> str:
    """What the parts of a named tuple are called."""
    named = definitions(type(value), "_fields")[:1] if base is tuple else []
    if not named or type(named[0]) is not tuple:
        return ""
    names = [name_of(name) for name in named[0][:ENTRIES_MAX]]
    told = _worth_showing(names, len(named[0]), ITEMS_MAX)
    return f" ({', '.join([*told, *_more(len(named[0]) - len(told))])})"


def _more(left: int) -> list[str]:
    return [f"... {left} more"] if left > 0 else []


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
    _, flat = shown_parts(flat, list, VALUES_MAX)
    texts = [f"{each:.8g}" if type(each) is float else _text(each, 0) for each in flat]
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
        more = f"... of {count}"
        if count <= most + len(more):  # it would leave out less than it says
            return repr(base.__getitem__(shown, slice(0, count)))
        return repr(base.__getitem__(shown, slice(0, most))) + more

    return text


PATH_MAX = 400  # characters of a path or URL
_PATH = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]*://\S+"  # a URL
    r"|(?:~|\.{1,2}|[A-Za-z]:)?[\\/][^\n]*[^\s\\/][^\n]*"  # from a root, or from here
    r"|(?=\S*\d|(?:[^\s\\/]+[\\/]){2})(?=.*[A-Za-z])[^\s\\/]{2,}[\\/]\S{3,}"  # below a folder
    r"|[^\n]*[^\s\\/.]\.(?=\d{0,3}[A-Za-z])[A-Za-z0-9]{1,8}(?:\.(?:gz|bz2|xz|zst|zip))?"
)
LOOKED_AT = 1024  # characters of a text that are looked through for secrets
_BRACKETS: dict[Any, str] = {dict: "{}", list: "[]", tuple: "()", set: "{}", frozenset: "{}"}
_BRACKETS[collections.deque] = "[]"
_SCALARS: dict[Any, Callable[[Any], str]] = {
    int: _integer,
    float: float.__repr__,
    complex: complex.__repr__,
    **{cls: _string(cls) for cls in (str, bytes, bytearray)},
}


_EXACT: dict[int, Callable[[Any], str]] = {}  # by id: a metaclass may define __hash__ and __eq__


def _tell(text: Callable[[Any], str], *classes: type) -> None:
    _EXACT.update(dict.fromkeys(map(id, classes), text))  # none is ever freed


_PATHS = (type(pathlib.Path()), type(pathlib.PurePath()))
_NUMPY_SCALARS = [c for c in set(np.sctypeDict.values()) if issubclass(c, np.number | np.bool_)]
_tell(str.__str__, Opaque)
_tell(repr, type(None), bool, type(...), datetime.date, datetime.timedelta, torch.dtype)
_tell(lambda value: scrub(repr(value)), torch.device, *_PATHS)
_tell(lambda value: repr(value.replace(tzinfo=None)), datetime.datetime)  # a tzinfo is foreign
_tell(lambda value: "<torch.Generator>", torch.Generator)  # its one field is an address
_tell(lambda value: f"<function {value.__qualname__}>", types.FunctionType)
_tell(lambda value: f"<function {value.__name__}>", types.BuiltinFunctionType)
_tell(lambda value: f"<module {_text(vars(value).get('__name__'), 0)}>", types.ModuleType)
_tell(lambda value: f"{type_name(type(value))}({value.item()!r})", *_NUMPY_SCALARS)
_tell(lambda r: f"range({', '.join(map(_integer, (r.start, r.stop, r.step)))})", range)
