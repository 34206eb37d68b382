"""Which failures of a run the training went on over. Runs in: main.

A failure is written where a sample is skipped, replaced or fetched again, and where workers that
died are followed by new ones, as it is where an error is raised. Only that last one ends an epoch.
"""

from __future__ import annotations

from typing import Any

from safeloader.provenance.index_texts import of_json, without_hash
from safeloader.report.folder import LoaderRecords
from safeloader.report.records import epochs_of

_OF_WORKERS = ("crash", "timeout")


def failures_of(loader: LoaderRecords) -> list[dict[str, Any]]:
    """What :meth:`LoaderRecords.failures` has, each with ``survived``: whether nothing was raised.

    While an epoch runs, new workers are taken to have followed those that died: else it would not.
    """
    found = loader.failures()
    if not found:
        return []
    handled = {(line.get("epoch"), _text(line)) for line in loader.lines("incidents.jsonl")}
    audits = {each.epoch: each.audit for each in epochs_of(loader)}
    runs = loader.state == "running"
    told = []
    for each in found:
        its = each["failure"]
        audit = audits.get(its.get("epoch"))
        if audit is not None:
            whole = audit.get("ok") is True and not audit.get("counts", {}).get("failed")
            whole = whole and its.get("phase") != "timeout"  # which always ends an epoch
        else:
            whole = runs and its.get("phase") in _OF_WORKERS
        left_out = (its.get("epoch"), _text(its)) in handled
        told.append(each | {"survived": left_out or whole})
    return told


def _text(what: dict[str, Any]) -> str | None:
    index = what.get("index")
    return None if index is None else without_hash(str(of_json(index)))
