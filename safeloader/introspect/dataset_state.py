"""Describes the dataset as it is in this process, as a small dict. Runs in: both.

A failure is often explained by what a worker's copy of the dataset has become: a handle lost in
pickling, a cache that grew, an epoch number that stayed behind. ``repr(dataset)`` would tell, but
it runs foreign code at the worst of times and may print gigabytes. The only foreign code that runs
here is ``__safeloader_state__``, which is written for this, in the thread that asks. Attributes are
read by :mod:`values` and put into words by :mod:`texts`, which run nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch

from safeloader.introspect.redaction import REDACTED
from safeloader.introspect.texts import (
    DEPTH,
    ENTRIES_MAX,
    bounded_text,
    concealed,
    in_pairs,
    is_secret,
    name_of,
    plain_text,
)
from safeloader.introspect.values import (
    TEXT_MAX,
    array_facts,
    container_base,
    cut,
    definitions,
    exception_text,
    fields,
    inherits,
    plain_length,
    type_name,
)

ATTRIBUTES_MAX = 50
DESCRIBE_SECONDS = 1.0  # then what is left is counted and not described
JSON_MAX_BYTES = 12_000  # all attributes together; the rest of a description stays below 4 KB


def describe(dataset: object, *, ask: bool = True, length: int | None = None) -> dict[str, Any]:
    """Describe a dataset as it is in this process: bounded in size and time, never raising.

    Args:
        dataset: any object. Nothing of it is run but its ``__safeloader_state__``.
        ask: False not to run that either; the attributes are read all the same.
        length: the length that main knows, for a dataset whose own cannot be read without asking.

    Returns:
        A dict that is JSON, of 16 KB at most: ``class``, ``length`` (None where unknown) and
        ``attributes``, by name a dict of ``type`` and ``repr`` and, where they apply, ``shape``,
        ``dtype``, ``device``, ``size_bytes``, ``length``. Only when there is something to say:
        ``omitted_attributes`` (a count), ``told_by_dataset`` (what ``__safeloader_state__()``
        returned, in place of the attributes) and ``notes`` (what went wrong). Values under names
        like ``api_key`` are redacted.

    >>> class Squares:
    ...     def __init__(self):
    ...         self.cache, self.password = {3: 9}, "sesame"
    >>> state = describe(Squares(), length=10)
    >>> state["length"], state["attributes"]["cache"]
    (10, {'type': 'dict', 'length': 1, 'repr': '{3: 9}'})
    >>> state["attributes"]["password"]
    {'type': 'str', 'repr': '[redacted]'}
    """
    notes: list[str] = []
    state: dict[str, Any] = {"class": "", "length": length, "attributes": {}}
    try:
        state["class"] = cut(type_name(type(dataset)))
        if (own := plain_length(dataset)) is not None:
            state["length"] = own
        told = _account(dataset, notes) if ask else ()
        if told:
            entries, omitted = _told(told[0])
            state["told_by_dataset"] = entries
        else:
            state["attributes"], omitted = _attributes(dataset)
        if omitted:
            state["omitted_attributes"] = omitted
    except Exception as error:
        notes.append(cut(f"the description stopped at {type_name(type(error))}"))
    if notes:
        state["notes"] = notes
    return state


def changes(start: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Say what changed in a dataset between two descriptions made in the same process.

    What one side did not ask of the dataset (``describe(dataset, ask=False)``) is not compared.

    >>> changes(describe([7, 8, 9]), describe([7, 8, 9, 10]))
    {'len()': 'was 3, now 4'}
    """
    return dict(_compare(start, now, "was {}, now {}", "removed (was {})", "added: {}"))


def differences(here: dict[str, Any], main: dict[str, Any]) -> dict[str, str]:
    """Say in what a worker's copy of the dataset (``here``) differs from the main process's.

    >>> differences(describe([7, 8, 9]), describe([7, 8, 9, 10]))
    {'len()': 'here 3, in the main process 4'}
    """
    lost = "lost on the way from the main process (there: {})"
    there_and_here = _compare(
        main, here, "here {1}, in the main process {0}", lost, "only here: {}"
    )
    return dict(there_and_here)


# ---- two descriptions side by side


def _compare(
    before: dict[str, Any], after: dict[str, Any], changed: str, gone: str, new: str
) -> Iterator[tuple[str, str]]:
    for name, key in (("type()", "class"), ("len()", "length")):
        was, now = before.get(key), after.get(key)
        if was != now and None not in (was, now):
            yield name, changed.format(was, now)
    told = "told_by_dataset"
    if (told in before) != (told in after):
        return  # only one side is the dataset's own account: the other failed, or was not asked
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
        return cut(whole), whole
    text = entry["repr"]
    if "length" in entry and entry["type"] not in ("str", "bytes", "bytearray"):
        return f"{entry['type']} of {entry['length']}", text, whole
    return text, text, whole


# ---- the dataset's own account


def _account(dataset: Any, notes: list[str]) -> tuple[object, ...]:
    """Return ``(answer,)``, or ``()`` if there is no such method or it failed, which is noted."""
    if not definitions(type(dataset), "__safeloader_state__"):
        return ()
    try:
        return (dataset.__safeloader_state__(),)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit: it must not end more than this account
        said = f"{type_name(type(error))}: {plain_text(exception_text(error))}"
        notes.append(cut(f"__safeloader_state__ raised {said}", 2 * TEXT_MAX))
        return ()


def _told(answer: Any) -> tuple[dict[str, Any], int]:
    """Make JSON of what ``__safeloader_state__()`` returned; also count what was left out."""
    if not inherits(type(answer), dict):
        answer = {"answer": answer}
    pairs = [(name_of(key), value) for key, value in islice(dict.items(answer), ATTRIBUTES_MAX)]

    def entry(name: str, value: object) -> object:
        plain = REDACTED if is_secret(name, value) else _plain(value, DEPTH)
        fits = len(json.dumps(plain)) <= JSON_MAX_BYTES // 4
        return plain if fits else bounded_text(value)

    return _fitting(pairs, dict.__len__(answer), entry)


def _plain(value: Any, depth: int) -> object:
    cls, base = type(value), container_base(type(value))
    if value is None or cls is bool:
        return value
    if (cls is int and value.bit_length() < 64) or (cls is float and math.isfinite(value)):
        return value
    if inherits(cls, str):
        return plain_text(value)
    if depth == 0 or base not in (dict, list, tuple):
        return bounded_text(value)
    count = base.__len__(value)
    more = f"{count - ENTRIES_MAX} more"
    shown = list(islice((dict.items if base is dict else base.__iter__)(value), ENTRIES_MAX))
    keys, parts = zip(*shown, strict=True) if base is dict and shown else ((), shown)
    hidden = concealed(keys, parts) if base is dict else in_pairs(parts)
    items: list[Any] = [
        REDACTED if secret else _plain(part, depth - 1)
        for part, secret in zip(parts, hidden, strict=True)
    ]
    if base is dict:
        plain = dict(zip(map(name_of, keys), items, strict=True))
        return plain | {"...": more} if count > ENTRIES_MAX else plain
    return [*items, f"... {more}"] if count > ENTRIES_MAX else items


# ---- attributes


def _attributes(dataset: object) -> tuple[dict[str, Any], int]:
    found, count = fields(dataset, 2 * ATTRIBUTES_MAX)
    pairs = [(name_of(key), value) for key, value in found]
    if inherits(type(dataset), torch.nn.Module):
        # Two dozen tables of hooks, nearly always empty, would crowd out what is worth reading.
        told = [(name, value) for name, value in pairs if name[:1] != "_" or not _is_empty(value)]
        pairs, count = told, count - len(pairs) + len(told)
    return _fitting(pairs, count, _entry)


def _fitting(
    pairs: list[tuple[str, object]], count: int, entry: Callable[[str, Any], object]
) -> tuple[dict[str, Any], int]:
    """Describe as many pairs as fit into the bounds; also return how many of ``count`` do not."""
    kept: dict[str, Any] = {}
    room = JSON_MAX_BYTES
    give_up = time.monotonic() + DESCRIBE_SECONDS
    for name, value in pairs:
        if len(kept) == ATTRIBUTES_MAX or time.monotonic() > give_up:
            break
        try:
            described = entry(name, value)
        except Exception as error:  # one bad value must not hide the others
            kind = type_name(type(error))
            described = {"type": "", "repr": cut(f"<not described: {kind}>")}
        size = len(json.dumps({name: described}))
        if size <= room and name not in kept:
            kept[name] = described
            room -= size
    return kept, count - len(kept)


def _entry(name: str, value: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": cut(type_name(type(value))), **(array_facts(value) or {})}
    if is_secret(name, value):
        return entry | {"repr": REDACTED}
    base = container_base(type(value)) or next(
        (each for each in (str, bytes, bytearray) if inherits(type(value), each)), None
    )
    if base is not None:
        entry["length"] = base.__len__(value)
    return entry | {"repr": bounded_text(value)}


def _is_empty(value: Any) -> bool:
    base = container_base(type(value))
    return value is None or (base is not None and base.__len__(value) == 0)
