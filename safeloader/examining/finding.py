"""Which sample it was: batches that failed are fetched again, one by one. Runs in: main.

A batch that hangs, kills its process or raises says nothing of the index in it that did. So its
samples are fetched again without workers, each announced before; what hangs or dies then is known
by its place, and what raises is told here.
"""

from __future__ import annotations

from typing import Any

from safeloader.examining.samples import raised
from safeloader.examining.subject import Subject
from safeloader.examining.talk import Suspects, Talk
from safeloader.introspect.texts import index_text


def search(subject: Subject, talk: Talk, suspects: Suspects) -> bool:
    """Fetch what is suspected, without workers; whether something raised, which is told then."""
    if subject.is_stream:
        return _in_stream(subject, talk, suspects.samples)
    for batch in suspects.batches:
        if talk.left() < 0:
            return False
        indices = list(batch) if subject.batched else [batch]
        if _fails(subject, talk, indices, suspects.collated):
            return True
    return False


def _in_stream(subject: Subject, talk: Talk, count: int) -> bool:
    number = 0
    try:
        talk.at("iterating the dataset")
        for _ in subject.dataset:
            number += 1
            talk.fetched()
            if number >= count or talk.left() < 0:
                return False
            talk.at("iterating the dataset", number)
    except Exception as exc:
        talk.tell("raises", index=f"{number} of the stream", **raised(exc))
        return True
    return False


def _fails(subject: Subject, talk: Talk, indices: list[Any], collated: bool) -> bool:
    samples = []
    for index in indices:
        talk.at("fetching", index)
        talk.fetched()
        try:
            samples.append(subject.dataset[index])
        except Exception as exc:
            _exclude(subject, index)
            talk.tell("raises", index=index_text(index), **raised(exc))
            return True
    if not collated:
        return False
    together = getattr(subject.dataset, "__getitems__", None)
    if callable(together) and subject.batched:
        talk.at("asking __getitems__", indices)
        talk.fetched(len(indices))
        try:
            samples = together(indices)
        except Exception as exc:
            talk.tell("getitems_raises", indices=index_text(indices), **raised(exc))
            return True
    talk.at("collating", indices)
    try:
        subject.collate_fn(samples if subject.batched else samples[0])
    except Exception as exc:
        _tell_uncollated(subject, talk, indices, samples, exc)
        return True
    return False


def _tell_uncollated(
    subject: Subject, talk: Talk, indices: list[Any], samples: Any, exc: Exception
) -> None:
    """Which sample the batch fails with: the last of the shortest beginning of it that fails."""
    found = None
    if subject.batched and type(samples) in (list, tuple):
        for most in range(1, len(samples)):
            if talk.left() < 0 or not _collates(subject, samples[:most]):
                found = most - 1
                break
        else:
            found = len(samples) - 1
    elif not subject.batched:
        found = 0
    known = found is not None and talk.left() >= 0 and found < len(indices)
    if known:
        _exclude(subject, indices[found or 0])
    talk.tell(
        "batch_raises",
        index=index_text(indices[found or 0]) if known else None,
        before=index_text(indices[:found]) if known and found else None,
        indices=index_text(indices),
        **raised(exc),
    )


def _collates(subject: Subject, samples: Any) -> bool:
    try:
        subject.collate_fn(samples)
    except Exception:
        return False
    return True


def _exclude(subject: Subject, index: Any) -> None:
    subject.excluded.add(index_text(index))
