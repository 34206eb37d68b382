"""Which sample it was: batches that failed are fetched again, one by one. Runs in: main.

A batch that hangs, kills its process or raises says nothing of the index in it that did. So its
samples are fetched again without workers, each announced before; what hangs or dies then is known
by its place, and what raises is told here, or cannot be sent, for which torch's loader waits for
ever.
"""

from __future__ import annotations

from typing import Any

from safeloader.examining.samples import raised
from safeloader.examining.subject import Subject, pickled_alone
from safeloader.examining.talk import Suspects, Talk
from safeloader.introspect.pickling import all_unpicklable
from safeloader.introspect.texts import index_text
from safeloader.worker.collating import explain


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
        for _ in subject.stream():
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
            samples.append(subject.sample(index))
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
        batch = subject.collate_fn(samples if subject.batched else samples[0])
    except Exception as exc:
        _tell_uncollated(subject, talk, indices, samples, exc)
        return True
    talk.at("pickling what was collated of", indices)
    try:
        pickled_alone(batch)
    except Exception:
        return _tell_unsendable(subject, talk, indices, samples)
    return False


def _tell_unsendable(subject: Subject, talk: Talk, indices: list[Any], samples: Any) -> bool:
    """Of which index a batch cannot be sent; whether that was found."""
    if type(samples) not in (list, tuple) or len(samples) != len(indices):
        return False
    for index, sample in zip(indices, samples, strict=True):
        for part in all_unpicklable(sample, "sample", spawning=False, most=1):
            _exclude(subject, index)
            talk.tell(
                "unsendable",
                index=index_text(index),
                path=part.path,
                what=part.kind,
                reason=part.reason,
            )
            return True
    return False


def _tell_uncollated(
    subject: Subject, talk: Talk, indices: list[Any], samples: Any, exc: Exception
) -> None:
    """Which sample the batch fails with: the one that is not like the others.

    Else it is the last of the shortest beginning of the batch that fails.
    """
    found = explained = None
    if subject.batched and type(samples) in (list, tuple) and len(samples) == len(indices):
        explained = explain(samples, indices)
    odd = None if explained is None else explained.position
    if odd is not None:
        found = odd
    elif subject.batched and type(samples) in (list, tuple):
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
        before=index_text(indices[:found]) if known and found and odd is None else None,
        explained=None if explained is None else explained.text,
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
