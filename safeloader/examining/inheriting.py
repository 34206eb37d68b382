"""What workers had better not inherit: handles over a fork, generators in any way. Runs in: main.

No code of the user's is run here, so that it can be looked at where the loader was made: threads
and locks are not the same in a child.
"""

from __future__ import annotations

import re
from typing import Any

from safeloader.examining.subject import Subject
from safeloader.introspect.byte_code import is_unread
from safeloader.introspect.fork_hazards import survey
from safeloader.introspect.generators import generators_of
from safeloader.introspect.suspects import Inherited
from safeloader.introspect.values import fields, held_by

_STEP = re.compile(r"\.(\w+)|\[(\d+|'[^']*')\]")
_HELD_MAX = 1000  # elements of a container


def hazards(subject: Subject) -> list[dict[str, Any]]:
    """What does not survive a fork; generators are another matter.

    ``read`` says of each whether the code that makes samples may read it.
    """
    beside = {"collate_fn": subject.collate_fn, "worker_init_fn": subject.worker_init_fn}
    workers = max(2, subject.num_workers)
    generators = {each.path for each in _survey(subject, "spawn", workers, beside)} | generators_of(
        subject.dataset
    ).keys()
    return [
        {
            "path": each.path,
            "what": each.kind,
            "why": each.why,
            "advice": each.advice,
            "read": _is_read(subject.dataset, each.path),
        }
        for each in _survey(subject, "fork", workers, beside)
        if each.path not in generators
    ]


def fork_breaks(subject: Subject) -> bool:
    """Whether samples are made by something that does not survive a fork."""
    return any(each["read"] for each in hazards(subject))


def _is_read(dataset: Any, path: str) -> bool:
    """Whether samples may be made by what is at a path; False only where the code shows it."""
    name, _, rest = path.partition("dataset")
    if name or "".join(step.group() for step in _STEP.finditer(rest)) != rest:
        return True
    owner: Any = dataset
    for attribute, key in _STEP.findall(rest):
        held = dict(held_by(owner, _HELD_MAX)) if key else dict(fields(owner))
        if attribute and not attribute.startswith("__") and is_unread(owner, attribute):
            return False
        found = [each for name, each in held.items() if (key or repr(attribute)) == repr(name)]
        if not found:
            return True
        owner = found[0]
    return True


def _survey(subject: Subject, method: str, workers: int, beside: Any) -> list[Inherited]:
    return survey(
        subject.dataset,
        "dataset",
        start_method=method,
        num_workers=workers,
        beside=beside,
        bound_s=0.5,
        bound_items=20_000,
    )
