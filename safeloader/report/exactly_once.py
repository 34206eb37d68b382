"""Whether a run handed over each index exactly once: all ranks, attempts, resumes. Runs in: main.

An epoch of a run is an epoch of the same loader on all ranks of an attempt. One that goes on with
another (its batches do not begin at 0) has that one's batches before its own: what the other handed
over behind them is trained again, and counts once. What is due is every index of the dataset; what
came twice or never is held against what the ranks' own audits say of it: padding, ``drop_last``,
samples that were skipped or replaced, a sampler that draws twice or leaves out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from safeloader.report.chains import Cohort, cohorts_of
from safeloader.report.counting import Counted, counted
from safeloader.report.run import RunFolder

_SHOWN = 8
_LISTED = 1000
_TROUBLES = ("missing", "duplicated", "unexpected", "failed")


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
    verdicts = tuple(_Judge(each, counted(each)).verdict() for each in cohorts_of(run, attempt))
    over = [each for each in verdicts if each.state != "running"]
    bad = [each for each in verdicts if each.ok is False]
    unsure = [each for each in over if each.ok is None]
    runs = len(verdicts) - len(over)
    still = f"; {_some(runs, 'epoch')} still running" if runs else ""
    if bad:
        ok, said = False, f"NO, not in {len(bad)} of {_some(len(verdicts), 'epoch')}"
    elif unsure:
        ok, said = None, f"cannot be told of {len(unsure)} of {_some(len(over), 'epoch')}"
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


class _Judge:
    """One epoch: what was counted against what is due."""

    def __init__(self, cohort: Cohort, found: Counted) -> None:
        self._of, self._found = cohort, found
        self._audits = cohort.audits
        self._wrong: list[str] = []
        self._unsure: list[str] = []
        self._fine: list[str] = []
        self._evidence: list[str] = []
        self._steps: list[str] = []
        self.twice: tuple[Any, ...] = ()
        self.never: tuple[Any, ...] = ()
        self.left_out = 0
        self._absent = self._absent_ranks()

    def verdict(self) -> EpochVerdict:
        of, found = self._of, self._found
        self._judge_state()
        self._judge_audits()
        if self._by_index():
            self._judge_repeats()
            if of.state == "whole" and not self._absent and not of.lost:
                self._judge_never()
        ok = False if self._wrong else None if self._unsure else True
        if of.again:
            self._evidence.append(
                f"{_some(of.again, 'batch')} handed over after the state was saved came again: "
                "counted once, as the weights were those of that state"
            )
        counts = {
            "twice": found.repeats,
            "never": found.never_count,
            "left_out": self.left_out,
            "padding": self._padding(),
            "again": of.again,
        }
        return EpochVerdict(
            of.name,
            of.epoch,
            of.attempts,
            tuple(sorted(of.parts)),
            self._absent,
            of.state,
            ok,
            found.total,
            of.length,
            counts,
            self.twice,
            self.never,
            self._answer(ok),
            tuple(self._evidence),
            self._steps[0] if self._steps and ok is not True else "",
        )

    def _answer(self, ok: bool | None) -> str:
        of = self._of
        if ok is False:
            said = "NOT exactly once: " + "; ".join(self._wrong)
        elif ok is None:
            said = "cannot be told: " + "; ".join(self._unsure)
        elif self._fine:
            said = "; ".join(["exactly once", *self._fine])
        else:
            said = "exactly once"
        who = f"{_some(len(of.parts), 'rank')}, " if len(of.parts) > 1 else ""
        samples = f"{self._found.total:,} samples"
        return f"epoch {of.epoch}{_of_attempts(of.attempts)}: {said} ({who}{samples})"

    # what each rank says ─────────────────────────────────────────────────────────────────────────

    def _absent_ranks(self) -> tuple[int, ...]:
        of = self._of
        absent = tuple(rank for rank in range(of.world) if rank not in of.parts)
        if absent and [*of.parts] == [0] and all(a.get("shard") is None for a in self._audits):
            self._fine.append("rank 0 alone iterated it")
            return ()
        return absent

    def _judge_state(self) -> None:
        of = self._of
        if self._absent:
            whose = f"{_ranks(self._absent)} did not iterate it"
            self._unsure.append(whose if of.state != "running" else f"{whose} yet")
            self._steps.append(
                f"see why {_ranks(self._absent)} wrote nothing: `show` names the processes there "
                "are, and the log of a rank says why it wrote none"
            )
        if of.lost:
            self._unsure.append(of.lost)
        if of.state == "running":
            self._fine.append("so far")
        elif of.state == "cut off":
            self._unsure.append(
                f"it was cut off after {_some(of.batches, 'batch')}, and nothing went on with it"
            )
            self._steps.append(
                "to go on in the middle of an epoch, save SafeStatefulDataLoader.state_dict() with "
                "the weights; `audit RUN --attempt N` looks at one attempt alone"
            )
        elif of.state == "left early":
            early = [rank for rank, part in of.parts.items() if part.left_early]
            if len(early) < len(of.parts):
                self._wrong.append(f"{_ranks(early)} stopped before the end")
                self._steps.append("see what ended the loop there: `show` lists the failures")
            else:
                self._fine.append(f"left early by the program after {_some(of.batches, 'batch')}")

    def _judge_audits(self) -> None:
        bad_ranks = 0
        for rank, part in sorted(self._of.parts.items()):
            audit = part.audit or {}
            if audit.get("ok") is False:
                bad_ranks += 1
                if bad_ranks > _SHOWN:
                    continue
                counts = audit.get("counts", {})
                bad = [f"{counts[name]} {name}" for name in _TROUBLES if counts.get(name)]
                whose = f"rank {rank}: " if len(self._of.parts) > 1 else ""
                self._wrong.append(f"{whose}{', '.join(bad) or 'its own audit is not ok'}")
                for name in _TROUBLES:
                    if audit.get(name):
                        self._evidence.append(f"rank {rank} {name}: {_listed(audit[name])}")
                self._steps.append("`show` lists the failures; `index RUN N` tells of one index")
            elif part.audit is not None and audit.get("ok") is None:
                self._unsure.append(
                    f"rank {rank} did not check from batch {audit.get('unchecked_since')} on"
                )
        if bad_ranks > _SHOWN:
            self._wrong.append(f"and {_some(bad_ranks - _SHOWN, 'rank')} more")

    # index by index ─────────────────────────────────────────────────────────────────────────────

    def _by_index(self) -> bool:
        """Whether the indices themselves can be counted."""
        of, found = self._of, self._found
        if of.stream:
            said = "a stream: by the audit of each rank, as its samples have no index of their own"
            self._evidence.append(said)
            if len(of.parts) > 1:
                self._unsure.append("samples of a stream have no index that ranks could compare")
                self._steps.append("give each sample an identity: key= of the loader")
            return False
        if found.incomplete:
            self._evidence.append(found.incomplete)
            whole = all(part.audit for part in of.parts.values())
            if of.world > 1 or of.resumed or not whole:
                self._unsure.append("the folder does not hold all of its indices any more")
                self._steps.append("give a larger run_max_bytes=, or none")
            return False
        known = f" of {of.length:,}" if of.length is not None else ""
        self._evidence.append(f"{found.distinct:,}{known} indices in {found.total:,} samples")
        return True

    def _padding(self) -> int:
        return max((int(each.get("padding") or 0) for each in self._audits), default=0)

    def _judge_repeats(self) -> None:
        found, audits = self._found, self._audits
        drawn_twice = any(each.get("counts", {}).get("repeated") for each in audits)
        replaced = sum(1 for what, _ in self._of.left_out.values() if what == "replaced")
        within = max(0, found.within - replaced)
        if within and drawn_twice:
            self._fine.append("the sampler draws some indices more than once, and they came so")
        elif within and not all(part.audit for part in self._of.parts.values()):
            self._unsure.append(f"{within:,} came again; whether they were drawn so is not known")
        elif within:
            self._wrong.append(f"{_some(within, 'delivery')} of what had come on the same rank")
        self._judge_across(drawn_twice)
        if self._wrong and found.repeats:
            self.twice = tuple(found.twice[:_LISTED])
            for index in self.twice[:_SHOWN]:
                ranks = found.ranks_of.get(index)
                where = f" ({_ranks(ranks)})" if ranks else ""
                self._evidence.append(f"came more than once: index {index}{where}")
            if self.twice:
                self._steps.append(f"`index RUN {self.twice[0]}` tells where and when it came")

    def _judge_across(self, drawn_twice: bool) -> None:
        found, padding = self._found, self._padding()
        across = found.across
        if not across:
            return
        if across <= padding:
            self._fine.append(f"{across:,} came twice as padding, so that ranks have equal shares")
            return
        shards = [each.get("shard") for each in self._audits]
        if drawn_twice and any(shard is None for shard in shards):
            self._unsure.append(f"{across:,} came on several ranks, by a sampler with replacement")
            return
        few = min(found.repeats, across - padding)
        self._wrong.append(f"{few:,} indices came on more than one rank")
        if all(shard is None for shard in shards):
            self._steps.append(
                "no sampler shares the indices out among the ranks: give each a DistributedSampler"
            )
        else:
            self._steps.append(
                "the ranks' samplers overlap: call set_epoch(n) alike on each, and share out once"
            )

    def _judge_never(self) -> None:
        found, of = self._found, self._of
        if not found.never_count:
            return
        left = found.never_count
        by_class: dict[str, int] = {}
        for index, (what, _) in of.left_out.items():
            if found.is_never(index):
                by_class[what] = by_class.get(what, 0) + 1
        for what, count in of.unlisted.items():
            by_class[what] = by_class.get(what, 0) + min(count, left)
        left -= sum(by_class.values())
        if left > 0 and (own := self._never_drawn()):
            name, most = own
            by_class[name] = min(left, most)
            left -= by_class[name]
        for what, count in by_class.items():
            self._fine.append(f"{count:,} left out: {_MEANING.get(what, what)}")
        self.left_out = sum(by_class.values())
        if left <= 0:
            return
        said = f"{left:,} indices came on no rank" if of.world > 1 else f"{left:,} never came"
        if of.world > 1 and all(each.get("shard") is None for each in self._audits):
            self._unsure.append(f"{said}; the samplers are your own, and may leave out on purpose")
        else:
            self._wrong.append(said)
        self.never = tuple(
            index for index in found.never(_LISTED + len(of.left_out)) if index not in of.left_out
        )[:_LISTED]
        self._evidence.append(f"never came: {_listed(self.never)}")
        if self.never:
            self._steps.append(
                "the ranks' shares leave these out: is a sampler or a split applied twice?"
            )

    def _never_drawn(self) -> tuple[str, int] | None:
        """What no sampler drew: of one rank as it is, of several what equal shares leave over."""
        of, audits = self._of, self._audits
        if of.world <= 1:
            return "not drawn", sum(a.get("counts", {}).get("unvisited", 0) for a in audits)
        shards = [shard for each in audits if (shard := each.get("shard"))]
        if len(shards) < len(audits) or of.length is None:
            return None
        replicas = shards[0][1]
        each = of.length // replicas
        drawn = {a.get("drawn") for a in audits}
        return ("equal shares", of.length % replicas) if drawn == {each} else None


_MEANING = {
    "skipped": "skipped because of an error",
    "replaced": "replaced because of an error",
    "dropped": "by drop_last",
    "not drawn": "the sampler did not draw them",
    "equal shares": "so that ranks have equal shares (drop_last of the sampler)",
}


def _some(count: int, noun: str) -> str:
    many = {"batch": "batches", "delivery": "deliveries"}.get(noun, f"{noun}s")
    return f"{count:,} {noun if count == 1 else many}"


def _ranks(ranks: Iterable[int]) -> str:
    numbers = sorted(set(ranks))
    shown = ", ".join(map(str, numbers[:_SHOWN])) + ", ..." * (len(numbers) > _SHOWN)
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"


def _listed(indices: Iterable[Any]) -> str:
    def first() -> Iterator[str]:
        for number, index in enumerate(indices):
            if number == _SHOWN:
                yield "..."
                return
            yield str(index)

    return ", ".join(first())


def _of_attempts(attempts: tuple[int, ...]) -> str:
    if attempts == (0,):
        return ""
    word = "attempt" if len(attempts) == 1 else "attempts"
    return f" ({word} {', '.join(map(str, attempts))})"
