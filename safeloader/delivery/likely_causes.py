"""Why ranks together did not hand over each index once, by what their parts say. Runs in: main.

Pure rules, the most telling first: each is a sentence on what is seen, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from safeloader.delivery.audit_part import AuditPart

_SHOWN = 8
_SHARE = (
    "give each loader sampler=DistributedSampler(dataset), or "
    "batch_sampler=safeloader.GlobalBatchSampler(len(dataset), ...)"
)
_SHARE_STREAM = "have the stream's __iter__ leave out what is for other ranks, by rank and world"


class Cause(NamedTuple):
    """What is seen, and what to do about it."""

    seen: str
    step: str


class Facts(NamedTuple):
    """What the rules go by.

    Attributes:
        parts: of each rank that is there.
        world: how many ranks there should be.
        absent: the ranks of which there is no part.
        alike: groups of ranks that handed over the very same samples.
        length: of the dataset, if known.
        never: how many indices came on no rank without a reason, as far as known.
        again: how many deliveries were of indices that had come, without a reason.
    """

    parts: Sequence[AuditPart]
    world: int
    absent: tuple[int, ...]
    alike: list[list[int]]
    length: int | None
    never: int
    again: int


def causes_of(facts: Facts) -> list[Cause]:
    """What may be the cause, the most telling first; none where nothing is wrong."""
    rules = (_stopped, _no_share, _one_share_twice, _other_epochs, _other_seeds, _other_world)
    found = [cause for rule in rules for cause in rule(facts)]
    if not found and (facts.never or facts.again):
        found += _shared_out_twice(facts)
    return found


def _stopped(facts: Facts) -> Iterator[Cause]:
    early = [each for each in facts.parts if each.left_early]
    if not early or len(early) == len(facts.parts):
        return
    for each in early[:_SHOWN]:
        due = facts.parts[0].drawn if each.shard is None else _share_of(each)
        due = max(due, *(part.drawn for part in facts.parts if part.complete))
        yield Cause(
            f"{named([each.rank])} stopped early: {each.delivered} of {due} samples delivered, "
            f"while {named(part.rank for part in facts.parts if part.complete)} came to the end",
            "see in the log and the program of that rank what ended its loop: a break, an error "
            "that was caught, another number of steps. Ranks that wait for it hang",
        )


def _share_of(part: AuditPart) -> int:
    shard = part.shard
    if shard is None or shard.total is None:
        return 0
    return shard.total // shard.replicas


def _no_share(facts: Facts) -> Iterator[Cause]:
    for ranks in facts.alike:
        if len(ranks) > 1 and all(_of(facts, rank).shard is None for rank in ranks):
            yield Cause(
                f"{named(ranks)} handed over the very same samples: nothing shares them out "
                "among the ranks",
                _SHARE_STREAM if _of(facts, ranks[0]).length is None else _SHARE,
            )


def _one_share_twice(facts: Facts) -> Iterator[Cause]:
    owners: dict[tuple[int, int], list[int]] = {}
    for each in facts.parts:
        if each.shard is not None:
            owners.setdefault((each.shard.rank, each.shard.replicas), []).append(each.rank)
    for (share, of), ranks in owners.items():
        if len(ranks) > 1:
            yield Cause(
                f"{named(ranks)} have the same share, number {share} of {of}",
                "have the sampler find its rank itself: make it after init_process_group and leave "
                "rank= and num_replicas= out, or pass rank=torch.distributed.get_rank()",
            )
            return


def _other_epochs(facts: Facts) -> Iterator[Cause]:
    told = _differing(facts, lambda shard: shard.epoch)
    if told:
        yield Cause(
            f"the samplers had other epochs, and so other orders: {told}",
            "call sampler.set_epoch(epoch) with the same number on all ranks, before each epoch",
        )


def _other_seeds(facts: Facts) -> Iterator[Cause]:
    told = _differing(facts, lambda shard: shard.seed)
    if told:
        yield Cause(
            f"the samplers have other seeds, and so other orders: {told}",
            "give the samplers of all ranks one seed",
        )


def _other_world(facts: Facts) -> Iterator[Cause]:
    for each in facts.parts:
        shard = each.shard
        if shard is not None and shard.replicas != facts.world:
            yield Cause(
                f"the sampler of {named([each.rank])} shares out to {shard.replicas}, and there "
                f"{'is' if facts.world == 1 else 'are'} {number_of(facts.world, 'rank')}",
                "make the sampler after init_process_group and leave num_replicas= out, or give it "
                "the number of ranks that train on samples of their own",
            )
            return


def _shared_out_twice(facts: Facts) -> Iterator[Cause]:
    delivered = sum(each.delivered for each in facts.parts)
    if not facts.length or facts.world < 2 or facts.absent or facts.again > facts.world:
        return
    if not all(each.complete for each in facts.parts) or 2 * delivered > facts.length + 1:
        return
    share = -(-facts.length // facts.world)
    yield Cause(
        f"the ranks drew {delivered} of {facts.length} indices between them, about one in "
        f"{round(facts.length / delivered) if delivered else facts.length}, as where one rank's "
        f"share (about {share} of {facts.length}) is shared out once more",
        "share out once: a dataset or Subset of each rank's own needs no DistributedSampler; a "
        "loader with one is not to be given to what shares out as well (accelerator.prepare, "
        "use_distributed_sampler=True)",
    )


def _of(facts: Facts, rank: int) -> AuditPart:
    return next(each for each in facts.parts if each.rank == rank)


def _differing(facts: Facts, read: Callable[[Any], int | None]) -> str:
    """``rank 0: 3; ranks 1 and 2: 4``; empty where all have one number."""
    by_number: dict[int, list[int]] = {}
    for each in facts.parts:
        number = None if each.shard is None else read(each.shard)
        if number is not None:
            by_number.setdefault(number, []).append(each.rank)
    if len(by_number) < 2:
        return ""
    said = [f"{named(ranks)}: {number}" for number, ranks in by_number.items()]
    return "; ".join(said[:_SHOWN]) + "; ..." * (len(said) > _SHOWN)


def named(ranks: Iterable[int]) -> str:
    """Ranks in words.

    >>> named([2]), named([0, 2]), named(range(9)), named([0, *range(2, 40, 2)])
    ('rank 2', 'ranks 0 and 2', 'ranks 0 to 8', 'ranks 0, 2, 4, 6, 8, 10, 12, 14 and 12 more')
    """
    known = sorted(set(ranks))
    if len(known) == 1:
        return f"rank {known[0]}"
    if len(known) > 2 and known == [*range(known[0], known[-1] + 1)]:
        return f"ranks {known[0]} to {known[-1]}"
    *first, last = [*map(str, known[:_SHOWN])]
    if len(known) > _SHOWN:
        return f"ranks {', '.join([*first, last])} and {len(known) - _SHOWN} more"
    return f"ranks {', '.join(first)} and {last}"


def number_of(number: int, one: str, many: str = "") -> str:
    """A number with its noun.

    >>> number_of(1, "rank"), number_of(3, "index", "indices")
    ('1 rank', '3 indices')
    """
    return f"{number} {one if number == 1 else many or one + 's'}"
