"""Which of what was found is worth a word: what samples are made by. Runs in: main."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

from safeloader.introspect.byte_code import (
    changes_as_it_is_read,
    is_read,
    is_unread,
    names_key,
    stores_elements,
)
from safeloader.introspect.copy_state import Attribute, attributes
from safeloader.introspect.frames import is_third_party
from safeloader.introspect.values import container_base
from safeloader.supervision.wrong_data import Finding

_COLUMN = re.compile(r"\[[^\]]*\]$")  # or an element, at the end of a path


def matters(finding: Finding, dataset: Any) -> bool:
    """Whether a finding is of what the samples of ``dataset`` are made by.

    >>> class Doubled:
    ...     def __getitem__(self, index):
    ...         return 2 * index
    >>> matters(Finding(("stale", "dataset.title"), "dataset.title is 'b' here"), Doubled())
    False
    """
    kind, *about = finding.about
    if kind == "stale":
        return _is_read(dataset, about[0], of_container=bool(about[1:]))
    if kind == "lost":
        return any(_may_be_cache(each.value) for each in _at(dataset, about[0]))
    if kind == "diverged":
        return not _is_no_order(dataset, about[0], lengths_too=bool(about[1:]))
    return True


def _at(dataset: Any, path: str) -> list[Attribute]:
    return [each for each in attributes(dataset) if each.path == path]


def _is_read(dataset: Any, path: str, *, of_container: bool) -> bool:
    """Whether what makes samples reads an attribute, or a key of one.

    Of a container, or of an element of one, only where that code does not change it as well.
    """
    path, _, key = path.partition("['")
    path = _COLUMN.sub("", path)
    return any(
        is_read(dataset, each.owner, each.name)
        and (not key or any(names_key(o, key[:-2]) for o in (dataset, each.owner)))
        and not ((of_container or "[" in path) and _changes_by_itself(dataset, each))
        for each in _at(dataset, path)
    )


def _changes_by_itself(dataset: Any, found: Attribute) -> bool:
    """Whether the code that makes samples writes to it, or a library keeps it for itself."""
    own = found.name.startswith("_") and is_third_party(type(found.owner))
    return own or any(changes_as_it_is_read(o, found.name) for o in (dataset, found.owner))


def _is_no_order(dataset: Any, path: str, *, lengths_too: bool) -> bool:
    """Whether a container that differs makes no samples: nobody reads it, or it holds notes.

    Notes for each sample, that a worker began itself, are no order.
    """
    whole = _COLUMN.sub("", path)
    holder, _, name = whole.rpartition(".")
    owners = [each.owner for each in _at(dataset, whole)]
    owners += [dataset] if holder == "dataset" else []
    if lengths_too and any(stores_elements(owner, name) for owner in owners):
        return True
    return bool(owners) and all(is_unread(each, name) for each in (dataset, *owners))


def _may_be_cache(value: Any) -> bool:
    """Whether a container may save work: a history and counts are not read to save any."""
    base = container_base(type(value))
    if base is not dict:
        # A list has places for what is made: the first is there already.
        return base is list and bool(list.__len__(value))
    counts = (int, float, list, set)
    factory = getattr(value, "default_factory", None) if type(value) is defaultdict else None
    return type(value) is not Counter and not any(factory is each for each in counts)
