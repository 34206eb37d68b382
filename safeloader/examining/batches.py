"""Whether the loader has a batch at all, or drop_last leaves none. Runs in: main."""

from __future__ import annotations

import itertools

from safeloader.examining.subject import Subject
from safeloader.examining.talk import Talk
from safeloader.global_batches import GlobalBatchSampler

_COUNTED = 1_000_000  # indices of a sampler
_NONE = object()


def look(subject: Subject, talk: Talk) -> None:
    """Draw the first batch."""
    drawn = subject.batch_sampler
    if type(drawn) is GlobalBatchSampler:
        if drawn.length and not drawn.global_batches:
            facts = {"samples": drawn.length, "batch_size": drawn.global_batch}
            talk.tell("no_batch", over_ranks=True, **facts)
        return
    if subject.is_stream or not subject.batched or getattr(drawn, "drop_last", False) is not True:
        return
    talk.at("drawing a batch")
    batches = iter(drawn)
    if batches is drawn or next(batches, _NONE) is not _NONE:
        return  # what can be iterated once is left alone
    within = getattr(drawn, "sampler", ())
    samples = sum(1 for _ in itertools.islice(iter(within), _COUNTED))
    if samples:
        size = getattr(drawn, "batch_size", subject.batch_size)
        talk.tell("no_batch", samples=samples, batch_size=size)
