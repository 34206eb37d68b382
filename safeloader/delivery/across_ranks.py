"""What all ranks together handed over: each index once, or which not. Runs in: main.

Pure: parts in, an audit out. The sums are compared in ``merging.py``, and put in words in
``rank_verdict.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from safeloader.delivery.audit_part import AuditPart
from safeloader.delivery.ladder import Numbers
from safeloader.delivery.merging import IndexRange, Merging
from safeloader.delivery.rank_stores import collect
from safeloader.delivery.rank_verdict import Verdict


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RunAudit:
    """What all ranks together handed over of an epoch, against each index once.

    :func:`safeloader.merge_audits`, :meth:`from_store` and :func:`safeloader.audit_across_ranks`
    make it. It says first what holds, then by what that is known, and what to do.

    Attributes:
        ok: True, where each index came once, or on purpose otherwise (padding, ``drop_last``,
            samples skipped as was asked for); False, where something else is so; None where that
            cannot be told, which ``answer`` says why.
        complete: whether all ranks are there, and each came to the end of its epoch.
        world: how many ranks there should be.
        absent: the ranks of which there is no part.
        delivered: number of samples handed over by all ranks.
        length: of the dataset; None where that is not known.
        twice: the indices that came more than once, the first 100,000 as far as they are known.
        never: the indices that came on no rank, in the same way.
        by_rank: for each of ``twice`` whose ranks are known, these; one that gave it twice is there
            twice.
        padding: those of ``twice`` that are padding, so that each rank has as many as the others.
        left_out: the indices of ``never`` that a rank says it left out, by class of its audit
            (``"dropped"``, ``"skipped"``, ...), and for each the rank.
        counts: how many indices came ``"twice"`` and ``"never"``, how many are ``"padding"``, and
            how many deliveries were of indices that had come already (``"again"``).
        exact: whether ``counts`` are exact. Else there are at least as many.
        ranges: where indices came twice or never that are not known one by one.
        answer: what holds, in a sentence.
        evidence: by what that is known, in a line each.
        next_step: what to do; empty where nothing is to be done.
        parts: of each rank that is there.

    Example:
        >>> from torch.utils.data import DistributedSampler
        >>> from safeloader import SafeDataLoader, merge_audits
        >>> data, parts = list(range(10)), []
        >>> for rank in range(4):  # in a training each of them is a process of its own
        ...     sampler = DistributedSampler(data, num_replicas=4, rank=rank, shuffle=False)
        ...     loader = SafeDataLoader(data, batch_size=2, sampler=sampler)
        ...     batches = list(loader)
        ...     parts.append(loader.audit_part())
        >>> run = merge_audits(parts)
        >>> print(run)
        epoch 0 of 4 ranks: ok, each of 10 indices came, and 2 came twice as padding
          12 samples delivered: 3 by each rank
          twice: 2: 0 (ranks 0 and 2), 1 (ranks 1 and 3)
          padding: these are, so that each rank has as many; an evaluation counts them twice
        >>> run.ok, run.padding.tolist(), run.never.tolist(), merge_audits(parts[:3]).absent
        (True, [0, 1], [], (3,))
    """

    ok: bool | None
    complete: bool
    world: int
    absent: tuple[int, ...]
    delivered: int
    length: int | None
    twice: Numbers
    never: Numbers
    by_rank: dict[int, tuple[int, ...]]
    padding: Numbers
    left_out: dict[str, dict[int, int]]
    counts: dict[str, int]
    exact: bool
    ranges: tuple[IndexRange, ...]
    answer: str
    evidence: tuple[str, ...]
    next_step: str
    parts: tuple[AuditPart, ...]

    @classmethod
    def from_store(cls, store: Any, key: str, world: int, timeout_s: float = 60.0) -> RunAudit:
        """The audit of the parts that the ranks :meth:`~safeloader.AuditPart.put` into a store.

        It waits until all are there, and for so many seconds at most; the ranks that have not put
        theirs by then are ``absent``. One rank may ask, or each: nobody has to.

        Args:
            store: of ``torch.distributed``.
            key: that the parts were put under.
            world: how many ranks there are.
            timeout_s: the seconds to wait at most.

        Raises:
            TypeError: if ``key`` is no text, or this is no store.
            ValueError: if ``world`` is below 1 or ``timeout_s`` below 0.

        Example:
            >>> from torch.distributed import HashStore
            >>> run = RunAudit.from_store(HashStore(), "audit/0", world=2, timeout_s=0)
            >>> run.ok is None, run.absent
            (True, (0, 1))
        """
        if type(world) is not int or world < 1:
            raise ValueError(f"world must be the number of ranks, 1 or more; got {world!r}")
        found = collect(store, key, range(world), timeout_s)
        parts, notes = [], [found.trouble] if found.trouble else []
        for rank, value in sorted(found.values.items()):
            try:
                parts.append(AuditPart.from_bytes(value))
            except Exception as exc:
                notes.append(f"the part of rank {rank} cannot be read: {exc}")
        return merged(parts, range(world), notes)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists that ``json.dumps`` takes; without the parts."""
        out = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        del out["parts"]
        for name in ("twice", "never", "padding"):
            out[name] = out[name].tolist()
        return out | {
            "absent": list(self.absent),
            "by_rank": {str(index): list(ranks) for index, ranks in self.by_rank.items()},
            "left_out": {
                name: {str(index): rank for index, rank in each.items()}
                for name, each in self.left_out.items()
            },
            "ranges": [each._asdict() | {"ranks": list(each.ranks)} for each in self.ranges],
            "evidence": list(self.evidence),
        }

    def __repr__(self) -> str:
        few = "" if self.exact else "at least "
        counts = "".join(f", {name}={few}{n}" for name, n in self.counts.items() if n)
        absent = f", absent={self.absent}" if self.absent else ""
        who = f"ok={self.ok}, world={self.world}{absent}"
        return f"RunAudit({who}, delivered={self.delivered}{counts})"

    def __str__(self) -> str:
        lines = [self.answer, *(f"  {line}" for line in self.evidence)]
        return "\n".join([*lines, f"  next: {self.next_step}"] if self.next_step else lines)


def merge_audits(parts: Iterable[AuditPart | RunAudit]) -> RunAudit:
    """What all ranks together handed over of an epoch, from the part of each.

    Parts come by any way: ``gather_object``, a file, :meth:`AuditPart.put`. In whatever order they
    are put together, and in however many steps (an audit may stand for its parts), the outcome is
    the same. With up to 1,024 indices it names each; of more, ranges of a 256th or less and how
    many at least, and an index where it is alone in its range.

    Args:
        parts: one of each rank, of the same epoch.

    Raises:
        TypeError: for what is no part.
        ValueError: if there is none, or two that differ are of one rank.

    Example:
        >>> from safeloader import SafeDataLoader, merge_audits
        >>> loader = SafeDataLoader(list(range(10)), batch_size=4)
        >>> batches = list(loader)
        >>> print(merge_audits([loader.audit_part()]))
        epoch 0 of 1 rank: ok, each of 10 indices came once
          10 samples delivered
    """
    by_rank: dict[int, AuditPart] = {}
    for each in parts:
        for part in each.parts if isinstance(each, RunAudit) else (each,):
            if not isinstance(part, AuditPart):
                raise TypeError(
                    "merge_audits takes what loader.audit_part() gives; got a "
                    f"{type(part).__name__}"
                )
            known = by_rank.setdefault(part.rank, part)
            if known is not part and known.to_bytes() != part.to_bytes():
                raise ValueError(
                    f"two parts are of rank {part.rank}, of epochs {known.epoch} and {part.epoch}: "
                    "give one of each rank, of one epoch"
                )
    if not by_rank:
        raise ValueError("there is no part: give those of all ranks, as loader.audit_part() has it")
    world = max([*(each.world_size or 1 for each in by_rank.values()), *(r + 1 for r in by_rank)])
    return merged(by_rank.values(), range(world))


def merged(parts: Iterable[AuditPart], ranks: Iterable[int], notes: Sequence[str] = ()) -> RunAudit:
    """The audit of these parts, where these ranks should be there."""
    return audit_of(Merging(parts, ranks, notes))


def audit_of(merging: Merging) -> RunAudit:
    """The audit of what is known by now."""
    return RunAudit(**Verdict(merging).fields())
