"""Whether ``len(dataset)`` is where it ends: first, last, one past. Runs in: main."""

from __future__ import annotations

from typing import Any

from safeloader.examining.samples import raised
from safeloader.examining.subject import Subject
from safeloader.examining.talk import Talk

_PROBES = 24  # fetches that are spent on finding the true end
_PAST = (IndexError, KeyError)


def look(subject: Subject, talk: Talk) -> None:
    """Fetch the first and the last sample, and one past."""
    if subject.is_stream or not subject.draws_all():
        return
    talk.at("asking for its length")
    length = subject.length()
    if length is None:
        return
    if length == 0:
        talk.tell("empty")
        return
    if _comes(subject, talk, 0) is not True:
        return  # whatever is wrong there, it is not the length
    last = _comes(subject, talk, length - 1) if length > 1 else True
    if isinstance(last, _PAST):
        if not _are_alike(last, _comes(subject, talk, length)):
            return  # a fault of the last sample, which is told as that
        end = _end(subject, talk, 0, length - 1, last)
        subject.end = end
        talk.tell("too_long", length=length, end=end, error=raised(last))
    elif last is True and _comes(subject, talk, length) is True:
        _look_past(subject, talk, length)


def _look_past(subject: Subject, talk: Talk, length: int) -> None:
    """Whether it ends later than it says. What never ends makes samples of any number."""
    step, good = 1, length
    while step <= 4 * length + 64 and talk.left() > 0:
        found = _comes(subject, talk, length + step)
        if isinstance(found, _PAST):
            end = _end(subject, talk, good, length + step, found)
            talk.tell("too_short", length=length, end=end)
            return
        if found is not True:
            return
        good, step = length + step, 2 * step


def _are_alike(one: Exception, other: Any) -> bool:
    """Whether two indices are past the end in one way: the same line raised the same."""
    if type(one) is not type(other):
        return False
    return raised(one)["at"] == raised(other)["at"]


def _end(subject: Subject, talk: Talk, good: int, bad: int, past: Exception) -> int:
    """The first index past the end, between one that is there and one that raised ``past``."""
    for _ in range(_PROBES):
        if bad - good <= 1 or talk.left() < 0:
            break
        middle = (good + bad) // 2
        if not _are_alike(past, _comes(subject, talk, middle)):
            good = middle  # it is there, though it may fail for a reason of its own
        else:
            bad = middle
    return bad


def _comes(subject: Subject, talk: Talk, index: int) -> Any:
    """True if a sample came, else what was raised."""
    talk.at("fetching", index)
    talk.fetched()
    try:
        subject.sample(index)
    except Exception as exc:
        return exc
    return True
