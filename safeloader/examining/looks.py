"""The looks, in the order in which they are made, and what each needs. Runs in: main."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from safeloader.examining import batches, copies, lengths, resuming, samples, sending, speed
from safeloader.examining.finding import search
from safeloader.examining.inheriting import hazards
from safeloader.examining.samples import raised
from safeloader.examining.subject import Subject
from safeloader.examining.talk import Order, Source, Talk, Unusable
from safeloader.introspect.frames import frames_of, is_foreign


class Look(NamedTuple):
    """One look: its name, what it does, whether it fetches samples, its share of the time."""

    name: str
    make: Callable[[Subject, Talk], None]
    fetches: bool
    share: float


def _inheriting(subject: Subject, talk: Talk) -> None:
    for each in hazards(subject):
        talk.tell("hazard", **each)


def _speed(subject: Subject, talk: Talk) -> None:
    """What is measured begins as in training: with copies of what has fetched nothing."""
    if not talk.is_cold:
        if talk.loading_s < _LOADING_SHARE * talk.left():
            talk.leave_rest(subject)
            return
        talk.tell("warm")
    speed.look(subject, talk)


_LOADING_SHARE = 0.1  # of the time that is left, for which another child is worth it
INHERITING = Look("what a fork inherits", _inheriting, False, 0.05)
SPEED = Look("speed", _speed, True, 1.0)
LOOKS = (
    INHERITING,
    Look("pickling", sending.look, False, 0.15),
    Look("resuming", resuming.look, False, 0.05),
    Look("batches", batches.look, False, 0.05),
    Look("samples", samples.look, True, 0.2),
    Look("length", lengths.look, True, 0.1),
    Look("the workers' copies", copies.look, True, 0.2),
    SPEED,
)


def look_all(source: Source, talk: Talk, first: int, excluded: frozenset[str]) -> None:
    """Make the looks from number ``first`` on, in the child."""
    talk.at("loading")
    try:
        subject = source()
    except Unusable as exc:
        talk.tell("unusable", what=exc.what, **(raised(exc.cause) if exc.cause else {}))
        return
    subject.excluded |= excluded
    talk.tell("subject", **told_of(subject))
    whole = talk.left()
    for number, look in enumerate(LOOKS):
        if number >= first:
            talk.begin(number, look.share * whole)
            if talk.left() <= 0:
                continue
            try:
                look.make(subject, talk)
            except Exception as exc:  # the other looks are made all the same
                files = [each.frame.f_code.co_filename for each in frames_of(exc)]
                yours = any(map(is_foreign, files))
                talk.tell("look_failed", look=look.name, what=talk.what, yours=yours, **raised(exc))


def search_again(source: Source, talk: Talk, order: Order) -> None:
    """Fetch what another child hung or died by, one by one."""
    talk.begin(order.first, talk.left())
    talk.at("loading")
    subject = source()
    subject.excluded |= order.excluded
    search(subject, talk, order.suspected())
    talk.pass_on(subject)


def told_of(subject: Subject) -> dict[str, object]:
    """What the words need to know of a loader."""
    return {
        "name": subject.name,
        "workers": subject.num_workers,
        "prefetch": subject.prefetch_factor,
        "method": subject.method,
        "persistent": subject.persistent_workers,
        "stream": subject.is_stream,
    }
