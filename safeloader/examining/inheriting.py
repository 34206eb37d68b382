"""What workers had better not inherit: handles over a fork, generators in any way. Runs in: main.

No code of the user's is run here, so that it can be looked at where the loader was made: threads
and locks are not the same in a child.
"""

from __future__ import annotations

from typing import Any

from safeloader.examining.subject import Subject
from safeloader.introspect.fork_hazards import survey
from safeloader.introspect.generators import generators_of
from safeloader.introspect.suspects import Inherited


def hazards(subject: Subject) -> list[dict[str, Any]]:
    """What does not survive a fork; generators are another matter."""
    beside = {"collate_fn": subject.collate_fn, "worker_init_fn": subject.worker_init_fn}
    workers = max(2, subject.num_workers)
    generators = {each.path for each in _survey(subject, "spawn", workers, beside)} | generators_of(
        subject.dataset
    ).keys()
    return [
        {"path": each.path, "what": each.kind, "why": each.why, "advice": each.advice}
        for each in _survey(subject, "fork", workers, beside)
        if each.path not in generators
    ]


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
