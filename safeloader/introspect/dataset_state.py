"""Describes the dataset as it is in this process, as a small dict. Runs in: both.

A failure is often explained by what a worker's copy of the dataset has become: a handle lost in
pickling, a cache that grew, an epoch number that stayed behind. ``repr(dataset)`` would tell, but
it runs foreign code at the worst of times and may print gigabytes. The only foreign code that runs
here is ``__safeloader_state__``, which is written for this, in the thread that asks. Attributes are
read by :mod:`values` and put into words by :mod:`texts`, which run nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from safeloader.introspect.redaction import REDACTED
from safeloader.introspect.tables import table_facts
from safeloader.introspect.texts import (
    DEPTH,
    ENTRIES_MAX,
    bounded_text,
    is_path,
    is_secret,
    name_of,
    path_text,
    plain,
    plain_text,
)
from safeloader.introspect.values import (
    TEXT_MAX,
    array_facts,
    cut,
    definitions,
    exception_text,
    fields,
    held_by,
    inherits,
    own_length,
    plain_length,
    type_name,
)

ATTRIBUTES_MAX = 50
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
        account = _account(dataset, notes) if ask else None
        if account is None:
            pairs = fields(dataset)
            if inherits(type(dataset), torch.nn.Module):  # two dozen tables, nearly always empty
                pairs = [(n, v) for n, v in pairs if str(n)[:1] != "_" or own_length(v) != 0]
            told = state["attributes"] = _fitting(pairs, _attribute)
        else:
            pairs = held_by(account)
            told = state["told_by_dataset"] = _fitting(pairs, _told)
        if omitted := len(pairs) - len(told):
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
    changed = "here {1}, in the main process {0}"
    lost = "lost on the way from the main process (there: {})"
    return dict(_compare(main, here, changed, lost, "only here: {}"))


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


def _views(entry: Any) -> tuple[str, str, str]:
    """Tell a described value ever more fully, so that two that differ can be told apart."""
    short = text = whole = json.dumps(entry, ensure_ascii=False)
    if type(entry) is dict and {"type", "repr"} <= entry.keys():
        short = text = entry["repr"]
        if "length" in entry and entry["type"] not in ("str", "bytes", "bytearray"):
            short = f"{entry['type']} of {entry['length']}"
    return cut(short), cut(text), whole


# ---- the dataset's own account


def _account(dataset: Any, notes: list[str]) -> dict[Any, object] | None:
    """Return what the dataset says of itself; None if it says nothing or failed, which is noted."""
    if not definitions(type(dataset), "__safeloader_state__"):
        return None
    try:
        answer = dataset.__safeloader_state__()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit: it must not end more than this account
        said = f"{type_name(type(error))}: {plain_text(exception_text(error))}"
        notes.append(cut(f"__safeloader_state__ raised {said}", 2 * TEXT_MAX))
        return None
    return answer if inherits(type(answer), dict) else {"answer": answer}


def _told(name: str, value: object) -> object:
    if is_secret(name, value):
        return REDACTED
    told = plain(value, depth=DEPTH, items=ENTRIES_MAX, chars=TEXT_MAX)
    return told if len(json.dumps(told)) <= JSON_MAX_BYTES // 4 else bounded_text(value)


# ---- attributes


def _attribute(name: str, value: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": cut(type_name(type(value))), **(array_facts(value) or {})}
    table = table_facts(value) or {}
    entry |= {fact: table[fact] for fact in ("shape", "dtype") if fact in table}
    if is_secret(name, value):
        return entry | {"repr": REDACTED}
    if (length := own_length(value)) is not None:
        entry["length"] = length
    return entry | {"repr": path_text(value) if is_path(value) else bounded_text(value)}


def described(pairs: list[tuple[Any, object]], most_bytes: int) -> dict[str, Any]:
    """Describe values by name as attributes are, as many as fit into so many bytes of JSON.

    >>> described([("rate", 0.5), ("api_key", "x")], 1000)["api_key"]
    {'type': 'str', 'repr': '[redacted]'}
    """
    return _fitting(pairs, _attribute, most_bytes)


def _fitting(
    pairs: list[tuple[Any, object]],
    describe_one: Callable[[str, Any], object],
    room: int = JSON_MAX_BYTES,
) -> dict[str, Any]:
    """Describe as many pairs as fit into the bounds."""
    kept: dict[str, Any] = {}
    for key, value in pairs[:ATTRIBUTES_MAX]:
        name = name_of(key)
        try:
            described = describe_one(name, value)
        except Exception as error:  # one bad value must not hide the others
            described = {"type": "", "repr": cut(f"<not described: {type_name(type(error))}>")}
        size = len(json.dumps({name: described}))
        if size <= room and name not in kept:
            kept[name] = described
            room -= size
    return kept
