"""Whether a run handed over each index exactly once: all ranks, attempts, resumes. Runs in: main.

An epoch of a run is an epoch of the same loader on all ranks of an attempt. One that goes on with
another has that one's batches before its own: what the other handed over behind them is trained
again, and counts once. What each rank handed over is held against each index once, and put in
words, as :class:`~safeloader.RunAudit` does it for ranks that live (``delivery/merging.py``,
``delivery/rank_verdict.py``); here the rows of the folder name the indices.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from safeloader.delivery.across_ranks import RunAudit, audit_of
from safeloader.delivery.likely_causes import named, number_of
from safeloader.delivery.merging import Course, Merging
from safeloader.report.chains import Cohort, cohorts_of
from safeloader.report.counting import Rows
from safeloader.report.rank_parts import parts_of
from safeloader.report.run import RunFolder

_LISTED = 1000


@dataclasses.dataclass(frozen=True)
class EpochVerdict:
    """What holds for one epoch of one loader, over all ranks.

    Attributes:
        loader: its name and line.
        epoch: its number in the attempt that had it last.
        attempts: those that handed over its batches.
        ranks: those that did.
        absent: the ranks that should have, and did not.
        state: ``"whole"``; ``"left early"``, by the program; ``"running"``; ``"cut off"``, and
            nothing went on with it.
        ok: True where each index that was due came once; False where one did not; None where that
            cannot be told. Of an epoch that runs: what holds so far.
        delivered: how many samples were handed over.
        length: of the dataset; None where that is not known.
        counts: how many indices came ``twice``, ``never``, how many of these were ``left_out`` as
            was asked for, how many are ``padding``, how many batches came ``again`` after a resume.
        twice: the first 1000 indices that came more than once, and are not explained.
        never: the same of those that never came.
        answer: what holds, in a sentence.
        evidence: by what that is known, in a line each.
        next_step: what to do; empty where nothing is to be done.
        exact: whether ``counts`` are exact; else there are at least as many, in ``ranges``.
        ranges: where indices came twice or never that are not known one by one.
        by_rank: of the first of ``twice`` the ranks that gave them.
    """

    loader: str
    epoch: int
    attempts: tuple[int, ...]
    ranks: tuple[int, ...]
    absent: tuple[int, ...]
    state: str
    ok: bool | None
    delivered: int
    length: int | None
    counts: dict[str, int]
    twice: tuple[Any, ...]
    never: tuple[Any, ...]
    answer: str
    evidence: tuple[str, ...]
    next_step: str
    exact: bool = True
    ranges: tuple[str, ...] = ()
    by_rank: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, that ``json.dumps`` takes."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class RunVerdict:
    """What holds for the run.

    Attributes:
        ok: True where that holds for each epoch that is over; False where one is not; None where
            one cannot be told, or nothing was handed over.
        answer: what holds, in a sentence.
        next_step: what to do; empty where nothing is to be done.
        epochs: a verdict for each.
        notes: what of the folder is torn, dropped or lost.
    """

    ok: bool | None
    answer: str
    next_step: str
    epochs: tuple[EpochVerdict, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, that ``json.dumps`` takes."""
        return dataclasses.asdict(self)


def exactly_once(run: RunFolder, attempt: int | None = None) -> RunVerdict:
    """Audit a run over all ranks, attempts and resumes.

    Args:
        run: read as it is now.
        attempt: audit this one alone, for itself.

    Example:
        >>> import tempfile
        >>> from safeloader import SafeDataLoader
        >>> run_dir = tempfile.TemporaryDirectory()
        >>> loader = SafeDataLoader(list(range(6)), batch_size=2, run_dir=run_dir.name)
        >>> batches = list(loader)
        >>> exactly_once(RunFolder(run_dir.name)).answer
        'exactly once: yes, in the 1 epoch that is over'
        >>> run_dir.cleanup()
    """
    verdicts = tuple(_verdict(each) for each in cohorts_of(run, attempt))
    over = [each for each in verdicts if each.state != "running"]
    bad = [each for each in verdicts if each.ok is False]
    unsure = [each for each in over if each.ok is None]
    runs = len(verdicts) - len(over)
    still = f"; {number_of(runs, 'epoch')} still running" if runs else ""
    if bad:
        ok, said = False, f"NO, not in {len(bad)} of {number_of(len(verdicts), 'epoch')}"
    elif unsure:
        ok, said = None, f"cannot be told of {len(unsure)} of {number_of(len(over), 'epoch')}"
    elif not over:
        ok, said = (True, "yes, so far") if runs else (None, "nothing was handed over yet")
    else:
        which = "the 1 epoch that is" if len(over) == 1 else f"all {len(over)} epochs that are"
        ok, said = True, f"yes, in {which} over"
    if ok and (left := sum(each.counts["left_out"] for each in verdicts)):
        said += f"; {left:,} left out as was asked for"
    step = next((each.next_step for each in (*bad, *unsure) if each.next_step), "")
    notes = tuple(dict.fromkeys(run.notes))
    return RunVerdict(ok, f"exactly once: {said}{still}", step, verdicts, notes)


def _verdict(of: Cohort) -> EpochVerdict:
    """What the audit of all ranks says of an epoch, with what the folder knows besides."""
    absent = tuple(rank for rank in range(of.world) if rank not in of.parts)
    by_itself = bool(absent) and [*of.parts] == [0] and not of.shared_out
    absent = () if by_itself else absent
    rows = Rows(of)
    found = parts_of(of, rows)
    course = _course(of, rows, absent, alone=by_itself)
    ranks = {*absent, *(each.rank for each in found.parts)}
    audit = audit_of(Merging(found.parts, ranks, course=course))
    if found.by_rows and not (audit.ok and audit.exact and not found.beyond):
        merging = Merging(found.parts, ranks, can_ask=True, course=course)
        rows.resolve(merging, beyond=found.beyond)
        audit = audit_of(merging)
    left_out = {index for each in audit.left_out.values() for index in each}
    twice = () if audit.ok else _listed(audit.twice, {*audit.padding.tolist()})
    whole = of.state == "whole" and not (absent or of.lost)
    never = () if audit.ok or not whole else _listed(audit.never, left_out)
    by_rank = {str(index): its for index, its in [*audit.by_rank.items()][:_LISTED]}
    return EpochVerdict(
        of.name,
        of.epoch,
        of.attempts,
        tuple(sorted(of.parts)),
        absent,
        of.state,
        audit.ok,
        audit.delivered,
        of.length,
        _counts(of, audit),
        twice,
        never,
        audit.answer,
        audit.evidence,
        audit.next_step,
        audit.exact,
        tuple(map(str, audit.ranges)),
        by_rank,
    )


def _listed(indices: Any, but: set[int]) -> tuple[int, ...]:
    """The first that are not explained."""
    first = indices[: _LISTED + len(but)].tolist()
    return tuple(each for each in first if each not in but)[:_LISTED]


def _counts(of: Cohort, audit: RunAudit) -> dict[str, int]:
    return {
        "twice": audit.counts["twice"],
        "never": audit.counts["never"],
        "left_out": audit.counts["never"] if audit.ok and of.state == "whole" else _told(audit),
        "padding": audit.counts["padding"],
        "again": of.again,
    }


def _told(audit: RunAudit) -> int:
    return sum(map(len, audit.left_out.values()))


def _course(of: Cohort, rows: Rows, absent: tuple[int, ...], *, alone: bool) -> Course:
    """How the epoch went, as the folder tells it."""
    evidence = []
    if alone:
        evidence.append(f"rank 0 alone iterated it, of {of.world} ranks")
    if of.again:
        evidence.append(
            f"{number_of(of.again, 'batch', 'batches')} handed over after the state was saved came "
            "again: counted once, as the weights were those of that state"
        )
    if rows.gone and not of.stream:
        evidence.append(f"{rows.gone}: what is told is by the sums that the ranks wrote themselves")
    attempts = "" if of.attempts == (0,) else f" (attempt{'s' * (len(of.attempts) > 1)} "
    attempts += f"{named(of.attempts).split(' ', 1)[1]})" if attempts else ""
    who = "rank 0" if alone else number_of(of.world, "rank")
    open_ = tuple(rank for rank, part in of.parts.items() if part.audit is None)
    return Course(
        f"epoch {of.epoch}{attempts} of {who}",
        of.batches,
        open_,
        closed=not open_,
        cut_off=of.state == "cut off",
        lost=of.lost,
        evidence=tuple(evidence),
        steps=_steps(of, rows, absent),
    )


def _steps(of: Cohort, rows: Rows, absent: tuple[int, ...]) -> tuple[str, ...]:
    """What to do where it cannot be told."""
    if absent:
        return (
            f"see why {named(absent)} wrote nothing: `show` names the processes there are, and the "
            "log of a rank says why it wrote none",
        )
    if of.lost:
        return (
            "`audit RUN` without --attempt has what came before, if this run does; let attempts of "
            "one training write into one folder",
        )
    if of.state == "cut off":
        return (
            "to go on in the middle of an epoch, save SafeStatefulDataLoader.state_dict() with "
            "the weights; `audit RUN --attempt N` looks at one attempt alone",
        )
    if any((audit.get("ok") is False) for audit in of.audits):
        return ("`show` lists the failures; `index RUN N` tells of one index",)
    if rows.gone and not of.stream:
        return ("give a larger run_max_bytes=, or none",)
    return ()
