"""What each rank handed over of an epoch, by the folder of its run. Runs in: main.

Of an epoch that ended each rank wrote its :class:`~safeloader.AuditPart`. Its sums are made anew
from the rows, which go back to what attempts before handed over, and which no account of the rank's
own has touched. Where rows are gone, the sums that the ranks wrote stand, if all of them are there.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from safeloader.delivery.audit_part import LEFT_OUT, NOT_KNOWN, AuditPart
from safeloader.introspect.shard import Shard
from safeloader.report.chains import Cohort, Part
from safeloader.report.counting import RankSums, Rows


class Parts(NamedTuple):
    """The parts of an epoch.

    Attributes:
        parts: of each rank.
        by_rows: whether their sums are those of the rows.
        beyond: whether an index is not below the length of the dataset.
    """

    parts: list[AuditPart]
    by_rows: bool
    beyond: bool = False


def parts_of(cohort: Cohort, rows: Rows) -> Parts:
    """What the ranks of an epoch, and of those that it went on with, say."""
    known = {rank: _known(cohort, rank, part) for rank, part in cohort.parts.items()}
    if cohort.stream:
        return Parts([_stream(each) for each in known.values()], by_rows=False)
    if rows.gone:
        return Parts([_by_its_word(each, rows.gone) for each in known.values()], by_rows=False)
    gone = {rank for rank in rows.ranks if rank >= cohort.world}  # of an attempt on more ranks
    sums = {rank: rows.sums(rank) for rank in {*known, *gone}}
    if any(each.digests for each in sums.values()):  # names: the ladders of the others say little
        sums = {rank: each._replace(ladder=None) for rank, each in sums.items()}
    for rank in gone:
        known[rank] = AuditPart(rank, cohort.world, cohort.epoch, complete=True, ok=True)
        known[rank] = dataclasses.replace(known[rank], length=cohort.length)
    found = [_by_rows(known[rank], sums[rank], cohort) for rank in sorted(known)]
    return Parts(found, by_rows=True, beyond=any(each.beyond for each in sums.values()))


def _by_rows(part: AuditPart, sums: RankSums, cohort: Cohort) -> AuditPart:
    left_out: dict[str, list[int]] = {}
    for index, (what, rank) in cohort.left_out.items():
        if rank == part.rank and isinstance(index, int):
            left_out.setdefault(what, []).append(index)
    for what, indices in part.left_out.items():
        some = left_out.setdefault(what, [])
        some += [index for index in indices if index not in set(some)]
    counts = part.counts | {
        what: max(len(its), part.counts.get(what, 0)) for what, its in left_out.items()
    }
    return dataclasses.replace(
        part,
        ladder=sums.ladder,
        digests=sums.digests,
        delivered=sums.delivered,
        left_out={what: tuple(its) for what, its in left_out.items()},
        counts=counts,
        left_out_before=0 if cohort.before is not None else part.left_out_before,
        unknown="" if sums.ladder is not None or sums.digests is not None else part.unknown,
    )


def _by_its_word(part: AuditPart, gone: str) -> AuditPart:
    """A part whose rows are gone: its own sums, which are of all that came, stand for them."""
    if part.unknown or part.ladder is not None or part.digests is not None:
        return part
    return dataclasses.replace(part, unknown=f"{gone}, and no sums of them were written")


def _stream(part: AuditPart) -> AuditPart:
    if part.digests is not None or part.unknown:
        return part
    said = "samples of a stream have no index, and what their key= was is not in the folder"
    return dataclasses.replace(part, unknown=said)


def _known(cohort: Cohort, rank: int, part: Part) -> AuditPart:
    """What a rank wrote of an epoch, or what can be told from its audit."""
    told = part.epoch.part
    if told is not None:
        return dataclasses.replace(told, rank=rank, epoch=cohort.epoch)
    audit = part.audit or {}
    counts = {name: int(n) for name, n in dict(audit.get("counts", {})).items() if n}
    shard = part.epoch.shard or _shard(audit, cohort)
    purpose = part.epoch.purpose
    if purpose is None:
        alone = cohort.world == 1 and part.audit is not None
        purpose = "" if shard is not None or alone else NOT_KNOWN
        purpose = "replacement" if shard is None and counts.get("repeated") else purpose
    resumed = part.epoch.resumed or {}
    return AuditPart(
        rank,
        part.loader.info.get("world_size"),
        cohort.epoch,
        bool(audit.get("complete")),
        audit.get("ok"),
        int(audit.get("drawn", 0)),
        int(audit.get("delivered", 0)) + int(audit.get("delivered_before", 0)),
        int(audit.get("delivered_before", 0)),
        counts,
        cohort.length,
        shard=shard,
        left_out={
            name: tuple(each for each in audit.get(name, ()) if isinstance(each, int))
            for name in LEFT_OUT
            if audit.get(name)
        },
        left_out_before=int(resumed.get("left_out", 0)),
        purpose=purpose,
    )


def _shard(audit: dict[str, Any], cohort: Cohort) -> Shard | None:
    """The share of a sampler, as an audit tells it."""
    told = audit.get("shard")
    if not isinstance(told, list) or len(told) != 2 or cohort.length is None:
        return None
    rank, replicas = map(int, told)
    total = cohort.length + int(audit.get("padding") or 0)
    each = cohort.length // replicas
    if all(other.get("drawn") == each for other in cohort.audits) and total == cohort.length:
        total = each * replicas  # its drop_last
    by = str(audit.get("dropped_by") or "drop_last")
    return Shard(rank, replicas, cohort.length, total, kind="its sampler", drops_by=by)
