"""Which of what was found is worth a word: what samples are made by. Runs in: main."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from safeloader.introspect.byte_code import is_read, names_key, stores_elements
from safeloader.introspect.copy_state import Attribute, attributes
from safeloader.introspect.values import container_base
from safeloader.supervision.wrong_data import Finding


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
        return _is_read(dataset, about[0])
    if kind == "lost":
        return any(_may_be_cache(each.value) for each in _at(dataset, about[0]))
    if kind == "diverged" and about[1:]:
        return not _are_notes(dataset, about[0])
    return True


def _at(dataset: Any, path: str) -> list[Attribute]:
    return [each for each in attributes(dataset) if each.path == path]


def _is_read(dataset: Any, path: str) -> bool:
    """Whether what makes samples reads an attribute, or a key of one."""
    path, _, key = path.partition("['")
    return any(
        is_read(dataset, each.owner, each.name)
        and (not key or any(names_key(o, key[:-2]) for o in (dataset, each.owner)))
        for each in _at(dataset, path)
    )


def _are_notes(dataset: Any, path: str) -> bool:
    """Whether a container holds notes for each sample, that a worker began itself: no order."""
    holder, _, name = path.rpartition(".")
    owners = [each.owner for each in _at(dataset, path)]
    owners += [dataset] if holder == "dataset" else []
    return any(stores_elements(owner, name) for owner in owners)


def _may_be_cache(value: Any) -> bool:
    """Whether a container may save work: a history and counts are not read to save any."""
    base = container_base(type(value))
    if base is not dict:
        # A list has places for what is made: the first is there already.
        return base is list and bool(list.__len__(value))
    counts = (int, float, list, set)
    factory = getattr(value, "default_factory", None) if type(value) is defaultdict else None
    return type(value) is not Counter and not any(factory is each for each in counts)
