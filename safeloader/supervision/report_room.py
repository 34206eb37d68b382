"""What becomes of a report that is too large for its room. Runs in: both.

A dataset of many columns and settings takes more than there is. What is small is kept then, such as
an epoch's number; the largest orders go first, and the report says how much is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from safeloader.introspect.copy_state import CopyState, Held, Order
from safeloader.supervision.self_report import SelfReport

NO_ROOM = (
    "whether the workers' copies of the dataset agree in {:,} attributes, which are too many for a "
    "worker's report"
)
_PARTS = ("orders", "scalars", "lengths", "held")
_STEPS = 8


def smaller_and_smaller(report: SelfReport) -> Iterator[SelfReport]:
    """Yield a report, and then the same with ever less about the copy of the dataset; at last none.

    Which orders are left out is the same in workers whose copies are alike: by the number of
    elements, and of equal ones the last.
    """
    yield report
    report = report._replace(now=_sharing(report.start, report.now))
    yield report
    sizes: dict[tuple[str, str], int] = {}
    for state in (report.start, report.now):
        for part in _PARTS:
            for path, value in getattr(state, part).items():
                sizes[part, path] = sizes.get((part, path), 0) + _size(path, value)
    left = total = sum(sizes.values())
    ranked = sorted(sizes, key=lambda each: sizes[each])
    out: set[tuple[str, str]] = set()
    for step in range(1, _STEPS):
        while ranked and left > total * (1 - step / _STEPS):
            each = ranked.pop()
            left -= sizes[each]
            out.add(each)
        start, now = _without(report.start, out), _without(report.now, out)
        yield report._replace(start=start, now=now, left_out=len({path for _, path in out}))
    bare = CopyState({}, {}, {})
    yield report._replace(start=bare, now=bare, left_out=len({path for _, path in sizes}))


def _sharing(start: CopyState, now: CopyState) -> CopyState:
    """The same, of the objects of ``start`` where these are equal: they are pickled once."""
    names = {path: path for part in _PARTS for path in getattr(start, part)}
    shared: dict[str, Any] = {
        part: {names.get(path, path): value for path, value in getattr(now, part).items()}
        for part in _PARTS
    }
    for part in ("orders", "scalars", "held"):
        for path, value in getattr(start, part).items():
            if type(value) in (Order, Held, str) and shared[part].get(path) == value:
                shared[part][path] = value
    return now._replace(**shared)


def _size(path: str, value: Any) -> int:
    if type(value) in (Order, Held):
        return 8 * (len(value.sampled) + len(value.which)) + len(path)
    return len(path) + (len(value) if type(value) is str else 8)


def _without(state: CopyState, out: set[tuple[str, str]]) -> CopyState:
    kept: dict[str, Any] = {
        part: {p: value for p, value in getattr(state, part).items() if (part, p) not in out}
        for part in _PARTS
    }
    return state._replace(**kept)
