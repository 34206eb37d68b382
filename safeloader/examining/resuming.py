"""Whether training can go on where it was: what is known of it today. Runs in: main."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SequentialSampler

from safeloader.examining.subject import Subject
from safeloader.examining.talk import Talk
from safeloader.global_batches import GlobalBatchSampler


def look(subject: Subject, talk: Talk) -> None:
    """Ask for states, and for what decides the order."""
    drawn = subject.batch_sampler if subject.batched else subject.sampler
    # Of a batch sampler of the user's own, the sampler in it does not say the order.
    sampler = drawn.sampler if type(drawn) is BatchSampler else drawn
    talk.tell(
        "resume",
        loader=subject.saves_state,
        sampler=_saves(sampler),
        dataset=_saves(subject.dataset),
        order=_order(subject, sampler),
        sampler_name=type(sampler).__name__,
    )


def _saves(thing: Any) -> bool:
    names = ("state_dict", "load_state_dict")
    return all(callable(getattr(type(thing), name, None)) for name in names)


def _order(subject: Subject, sampler: Any) -> str:
    """What the order of an epoch is made from."""
    if subject.is_stream:
        return "stream"
    if type(sampler) is SequentialSampler:
        return "sequential"
    if isinstance(sampler, DistributedSampler) or type(sampler) is GlobalBatchSampler:
        return "seed and epoch"
    if type(sampler) is RandomSampler:
        return "generator" if sampler.generator is not None else "global"
    if callable(getattr(type(sampler), "set_epoch", None)):
        return "epoch"
    return "unknown"
