"""Runs in both main and worker: describes the dataset in this process; a small JSON dict crosses.

A failure is often explained by what a worker's copy of the dataset has become: a handle lost in
pickling, a cache that grew, an epoch number that stayed behind. `repr(dataset)` would tell, but it
runs foreign code at the worst of times and may print gigabytes. So nothing foreign is run here but
`__len__` and `__safeloader_state__`, and those are waited for half a second at most. Attributes are
read where the interpreter keeps them (instance dict and slots), past any property, `__getattr__` or
proxy; types are told by `type(value)`, because `isinstance` asks a lazy object for its `__class__`
and wakes it; containers are read by the methods of their built-in base class, a few elements each.
"""

from __future__ import annotations

import collections
import datetime
import json
import math
import pathlib
import re
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from itertools import islice, takewhile
from typing import Any

import numpy as np
import torch

ATTRIBUTES_MAX = 50
ANSWER_SECONDS = 0.5
TEXT_MAX = 120  # characters of one description, and of one name
LEAF_MAX = 48  # characters of one string inside a longer description
ITEMS_MAX = 5  # elements shown of one container
VALUES_MAX = 8  # a tensor or array of at most this many elements shows them
DEPTH = 2
JSON_MAX_BYTES = 12_000  # all attributes together; the rest of a description stays below 4 KB
REDACTED = "[redacted]"

# Read through `type` itself: a metaclass may define properties of these names.
_mro_of: Any = type.__dict__["__mro__"].__get__
_module_of: Any = type.__dict__["__module__"].__get__
_qualname_of: Any = type.__dict__["__qualname__"].__get__
_namespace_of: Any = type.__dict__["__dict__"].__get__
# From torch's notes on extending it: keeps `__torch_function__` of tensor subclasses from running.
_past_overrides: Any = getattr(torch._C, "DisableTorchFunction", nullcontext)

# "authkey" is what the proxies of multiprocessing's managers carry.
_SECRETS = re.compile("password|passwd|secret|credential|apikey|privatekey|accesskey|authkey")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def describe(dataset: object) -> dict[str, Any]:
    """Describe a dataset as it is in this process: bounded in size and time, never raising.

    Args:
        dataset: any object. Only its `__len__` and `__safeloader_state__` are run, each in a thread
            of its own that is waited for 0.5 s.

    Returns:
        A dict that is JSON, of 16 KB at most: `class`, `length` (None where unknown) and
        `attributes`, by name a dict of `type` and `repr` and, where they apply, `shape`, `dtype`,
        `device`, `size_bytes`, `length`. Only when there is something to say: `omitted_attributes`
        (a count), `told_by_dataset` (what `__safeloader_state__()` returned, in place of the
        attributes) and `notes` (what went wrong). Values under names like `api_key` are redacted.

    >>> class Squares:
    ...     def __init__(self):
    ...         self.cache, self.password = {3: 9}, "sesame"
    ...
    ...     def __len__(self):
    ...         return 10
    >>> state = describe(Squares())
    >>> state["length"], state["attributes"]["cache"]
    (10, {'type': 'dict', 'length': 1, 'repr': '{3: 9}'})
    >>> state["attributes"]["password"]
    {'type': 'str', 'repr': '[redacted]'}
    """
    notes: list[str] = []
    state: dict[str, Any] = {"class": "", "length": None, "attributes": {}}
    foreign: Any = dataset
    try:
        state["class"] = type_name(type(dataset))
        for length in _ask(dataset, "__len__", lambda: len(foreign), notes):
            state["length"] = length
        told = _ask(dataset, "__safeloader_state__", lambda: foreign.__safeloader_state__(), notes)
        if told:
            entries, omitted = _told(told[0])
            state["told_by_dataset"] = entries
        else:
            state["attributes"], omitted = _attributes(dataset)
        if omitted:
            state["omitted_attributes"] = omitted
    except Exception as error:
        notes.append(f"the description stopped at {type_name(type(error))}")
    if notes:
        state["notes"] = notes
    return state


def changes(start: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Say what changed in a dataset between two descriptions made in the same process.

    >>> changes(describe([7, 8, 9]), describe([7, 8, 9, 10]))
    {'len()': 'was 3, now 4'}
    """
    return dict(_compare(start, now, "was {}, now {}", "removed (was {})", "added: {}"))


def differences(here: dict[str, Any], main: dict[str, Any]) -> dict[str, str]:
    """Say in what a worker's copy of the dataset (`here`) differs from the main process's.

    >>> differences(describe([7, 8, 9]), describe([7, 8, 9, 10]))
    {'len()': 'here 3, in the main process 4'}
    """
    lost = "lost on the way from the main process (there: {})"
    there_and_here = _compare(
        main, here, "here {1}, in the main process {0}", lost, "only here: {}"
    )
    return dict(there_and_here)


def type_name(cls: type) -> str:
    """Name a class in full, without running code of its metaclass.

    >>> type_name(collections.OrderedDict), type_name(int)
    ('collections.OrderedDict', 'int')
    """
    module: object = None
    with suppress(AttributeError):
        module = _module_of(cls)
    name = str.__str__(_qualname_of(cls))
    # A script's classes live in __main__, which a spawned worker knows as __mp_main__.
    if type(module) is str and module != "builtins":
        name = f"{'__main__' if module == '__mp_main__' else module}.{name}"
    return _cut(name)


def inherits(cls: type, base: type) -> bool:
    """Say whether `base` is among the ancestors of `cls`, without asking any metaclass.

    >>> inherits(bool, int)
    True
    """
    return any(each is base for each in _mro_of(cls))  # `in` would ask the metaclass for `==`


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
        facts["dtype"] = (
            _cut(str(dtype)) if dtype.names is None else f"record of {len(dtype.names)}"
        )
        facts["size_bytes"] = int(array.nbytes.__get__(value))
        return facts
    if not inherits(cls, torch.Tensor):
        return None
    derived = takewhile(lambda each: each is not torch.Tensor, _mro_of(cls))
    if any("__torch_dispatch__" in _namespace_of(each) for each in derived):
        return facts  # even its shape may be an answer of foreign code
    with _past_overrides():
        with suppress(Exception):
            facts["shape"] = [int(size) for size in tensor.shape.__get__(value)]
        facts["dtype"] = str(tensor.dtype.__get__(value)).removeprefix("torch.")
        facts["device"] = str(tensor.device.__get__(value))
        with suppress(Exception):
            if tensor.layout.__get__(value) is torch.strided:
                facts["size_bytes"] = tensor.numel(value) * tensor.element_size(value)
    return facts


def bounded_text(value: object, depth: int = DEPTH) -> str:
    """Return a text of at most 120 characters for any object, `repr`-like, running no foreign code.

    >>> bounded_text([1.5, "a", {"token": "hf_123"}, None, True, 6, 7])
    "[1.5, 'a', {'token': [redacted]}, None, True, ... 2 more]"
    """
    return _cut(_text(value, depth))


# ---- two descriptions side by side


def _compare(
    before: dict[str, Any], after: dict[str, Any], changed: str, gone: str, new: str
) -> Iterator[tuple[str, str]]:
    for name, key in (("type()", "class"), ("len()", "length")):
        was, now = before.get(key), after.get(key)
        if was != now:
            unknown = "unknown"
            yield name, changed.format(*(unknown if x is None else x for x in (was, now)))
    told = "told_by_dataset"
    if (told in before) != (told in after):
        return  # the dataset's own account failed on one side, as its notes say
    source = told if told in before else "attributes"
    old, young = before.get(source, {}), after.get(source, {})
    for name in old | young:
        if name not in young:
            if "omitted_attributes" not in after:  # else it may only have been crowded out
                yield name, gone.format(_views(old[name])[0])
        elif name not in old:
            if "omitted_attributes" not in before:
                yield name, new.format(_views(young[name])[0])
        elif old[name] != young[name]:
            views = zip(_views(old[name]), _views(young[name]), strict=True)
            yield name, changed.format(*next((pair for pair in views if pair[0] != pair[1]), "??"))


def _views(entry: Any) -> tuple[str, ...]:
    """Tell a described value ever more fully, so that two that differ can be told apart."""
    whole = json.dumps(entry, ensure_ascii=False)
    if type(entry) is not dict or not {"type", "repr"} <= entry.keys():
        return _cut(whole), whole
    text = entry["repr"]
    if "length" in entry and entry["type"] not in ("str", "bytes", "bytearray"):
        return f"{entry['type']} of {entry['length']}", text, whole
    return text, text, whole


# ---- asking the dataset, with a time limit


def _ask(
    dataset: object, method: str, ask: Callable[[], object], notes: list[str]
) -> tuple[object, ...]:
    """Return `(answer,)`, or `()` where the class has no such method or it failed, with a note."""
    if not any(method in _namespace_of(cls) for cls in _mro_of(type(dataset))):
        return ()
    outcome: list[tuple[object, ...] | str] = []

    def run() -> None:
        try:
            outcome.append((ask(),))
        except BaseException as error:  # also SystemExit: it must not end more than this thread
            kind, message = type_name(type(error)), ""
            with suppress(BaseException):
                message = str(error)
            outcome.append(_cut(f"{method} raised {kind}: {message}", 2 * TEXT_MAX))

    try:
        thread = threading.Thread(target=run, name="safeloader-describe", daemon=True)
        thread.start()
        thread.join(ANSWER_SECONDS)
    except RuntimeError as error:  # no further thread can be started
        outcome.append(f"{method} was not asked: {error}")
    answer = outcome[0] if outcome else f"{method} did not answer within {ANSWER_SECONDS} s"
    if isinstance(answer, str):
        notes.append(answer)
        return ()
    return answer


def _told(answer: Any) -> tuple[dict[str, Any], int]:
    """Make JSON of what `__safeloader_state__()` returned; also the count of what was left out."""
    if not inherits(type(answer), dict):
        answer = {"answer": answer}
    pairs = [(_name(key), value) for key, value in islice(dict.items(answer), ATTRIBUTES_MAX)]

    def entry(name: str, value: object) -> object:
        plain = REDACTED if _is_secret(name) else _plain(value, DEPTH)
        fits = len(json.dumps(plain)) <= JSON_MAX_BYTES // 4
        return plain if fits else bounded_text(value)

    return _fitting(pairs, dict.__len__(answer), entry)


def _plain(value: Any, depth: int) -> object:
    cls, base = type(value), _container_base(type(value))
    if value is None or cls is bool:
        return value
    if (cls is int and value.bit_length() < 64) or (cls is float and math.isfinite(value)):
        return value
    if inherits(cls, str):
        return _cut(str.__getitem__(value, slice(0, TEXT_MAX + 1)))
    if depth == 0 or base not in (dict, list, tuple):
        return bounded_text(value)
    shown, count = 4 * ITEMS_MAX, base.__len__(value)
    more = f"{count - shown} more"
    if base is dict:
        pairs = [(_name(key), each) for key, each in islice(dict.items(value), shown)]
        plain = {k: REDACTED if _is_secret(k) else _plain(v, depth - 1) for k, v in pairs}
        return plain | {"...": more} if count > shown else plain
    items = [_plain(each, depth - 1) for each in islice(base.__iter__(value), shown)]
    return [*items, f"... {more}"] if count > shown else items


# ---- attributes


def _attributes(dataset: object) -> tuple[dict[str, Any], int]:
    pairs, count = _fields(dataset, 2 * ATTRIBUTES_MAX)
    if inherits(type(dataset), torch.nn.Module):
        # Two dozen tables of hooks, nearly always empty, would crowd out what is worth reading.
        idle = [name for name, value in pairs if name.startswith("_") and _is_empty(value)]
        pairs = [(name, value) for name, value in pairs if name not in idle]
        count -= len(idle)
    return _fitting(pairs, count, _entry)


def _fields(value: object, most: int) -> tuple[list[tuple[str, object]], int]:
    """Return what an object's own dict and slots hold, `most` of it, and the count of it all."""
    pairs: list[tuple[str, object]] = []
    count = 0
    for cls in _mro_of(type(value)):
        own = _namespace_of(cls).get("__dict__")
        if type(own) is types.GetSetDescriptorType:  # the interpreter's, not a property
            held: Any = own.__get__(value)
            if inherits(type(held), dict):
                count = dict.__len__(held)
                pairs = [(_name(key), each) for key, each in islice(dict.items(held), most)]
                break
    for cls in _mro_of(type(value)):
        for name, slot in list(_namespace_of(cls).items()):
            if type(slot) is types.MemberDescriptorType and not name.startswith("__"):
                with suppress(Exception):  # an unset slot raises AttributeError
                    held = slot.__get__(value)
                    count += 1
                    if len(pairs) < most:
                        pairs.append((_name(name), held))
    return pairs, count


def _fitting(
    pairs: list[tuple[str, object]], count: int, entry: Callable[[str, Any], object]
) -> tuple[dict[str, Any], int]:
    """Describe as many pairs as fit into the bounds; also return how many of `count` do not."""
    kept: dict[str, Any] = {}
    room = JSON_MAX_BYTES
    for name, value in pairs:
        if len(kept) == ATTRIBUTES_MAX:
            break
        try:
            described = entry(name, value)
        except Exception as error:  # one bad value must not hide the others
            described = {"type": "", "repr": f"<not described: {type_name(type(error))}>"}
        size = len(json.dumps({name: described}))
        if size <= room and name not in kept:
            kept[name] = described
            room -= size
    return kept, count - len(kept)


def _entry(name: str, value: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": type_name(type(value)), **(array_facts(value) or {})}
    if _is_secret(name):
        return entry | {"repr": REDACTED}
    base = _container_base(type(value)) or next(
        (each for each in (str, bytes, bytearray) if inherits(type(value), each)), None
    )
    if base is not None:
        entry["length"] = base.__len__(value)
    return entry | {"repr": bounded_text(value)}


def _is_secret(name: str) -> bool:
    glued = re.sub("[^a-z]", "", name.lower())
    words = (word.lower() for word in _WORDS.findall(name))
    return bool(_SECRETS.search(glued)) or any(word in ("token", "tokens") for word in words)


def _name(key: Any) -> str:
    if inherits(type(key), str):
        return _cut(str.__getitem__(key, slice(0, TEXT_MAX + 1)))
    return _cut(f"[{_text(key, 0)}]")


def _is_empty(value: Any) -> bool:
    base = _container_base(type(value))
    return value is None or (base is not None and base.__len__(value) == 0)


# ---- values as text


def _container_base(cls: type) -> Any:
    return next((base for base in _BRACKETS if inherits(cls, base)), None)


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
        return " ".join([type_name(cls), *told, *_values(value, facts)])
    if base := _container_base(cls):
        return _container_text(value, base, depth)
    if inherits(cls, type):
        return f"<class {type_name(value)}>"
    if depth < DEPTH:
        return f"<{type_name(cls)}>"
    pairs, count = _fields(value, ITEMS_MAX)
    told = [f"{name}={_unless_secret(name, each, depth - 1)}" for name, each in pairs]
    return f"<{' '.join([type_name(cls), *told, *_more(count, pairs)])}>"


def _container_text(value: Any, base: Any, depth: int) -> str:
    cls, count = type(value), base.__len__(value)
    if depth == 0 and count:
        return f"{type_name(cls)} of {count}"
    shown = list(islice((dict.items if base is dict else base.__iter__)(value), ITEMS_MAX))
    if base is dict:
        parts = [f"{_text(k, 0)}: {_unless_secret(_name(k), v, depth - 1)}" for k, v in shown]
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
    return REDACTED if _is_secret(name) else _text(value, depth)


def _more(count: int, shown: list[Any]) -> list[str]:
    return [f"... {count - len(shown)} more"] if count > len(shown) else []


def _namedtuple_fields(cls: type) -> list[str]:
    for each in _mro_of(cls):
        names = _namespace_of(each).get("_fields")
        if type(names) is tuple:
            return [_name(name) for name in names[:ITEMS_MAX]]
    return []


def _values(value: Any, facts: dict[str, Any]) -> list[str]:
    """Return the elements of a small array or tensor in this process's memory, else nothing."""
    if math.prod(facts.get("shape", [0])) not in range(1, VALUES_MAX + 1):
        return []
    flat: list[Any] = []
    with suppress(Exception), _past_overrides():
        if type(value) is np.ndarray:  # a subclass may be a file (memmap), or mask its elements
            if value.dtype.kind in "biufcSUmM" and value.nbytes <= 1024:
                flat = value.reshape(-1).tolist()
        elif facts.get("device") == "cpu" and "size_bytes" in facts:
            tensor: Any = torch.Tensor
            flat = tensor.tolist(tensor.reshape(tensor.detach(value), (-1,)))
    texts = [f"{each:.8g}" if type(each) is float else _text(each, 0) for each in flat]
    return [f"({', '.join(texts)})"] if texts else []


def _cut(text: str, most: int = TEXT_MAX) -> str:
    if len(text) > most:
        text = text[: most - 3] + "..."
    # A lone surrogate, as in undecodable file names, would fail where the JSON is written as UTF-8.
    return text.encode("utf-8", "backslashreplace").decode()[:most]


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
