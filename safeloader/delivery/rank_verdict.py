"""What the sums of all ranks come to, in words. Runs in: main.

Pure. The answer comes first, then the evidence, then the next step. What came twice or never is
held against what ranks say themselves (padding, what was left out, what the sampler draws on
purpose), and what nobody can tell is said to be that.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from safeloader.delivery.audit_part import NOT_KNOWN, AuditPart
from safeloader.delivery.likely_causes import Cause, Facts, causes_of, named, number_of
from safeloader.delivery.merging import SHOWN, Course, Merging

_RANGES_SHOWN = 4
_TROUBLES = ("missing", "duplicated", "unexpected", "failed")


class Verdict:
    """What the numbers say, in words: the answer, the evidence, the next step."""

    def __init__(self, of: Merging) -> None:
        self._of = of
        of.twice.sort()  # in whatever order the ranks were asked
        of.never.sort()
        of.todo.sort()
        self._course = of.course or Course()
        self._wrong: list[str] = []
        self._unsure: list[str] = []
        self._evidence: list[str] = []
        self._steps: list[str] = []
        self._early = [each.rank for each in of.parts if each.left_early]
        self._alone = len(of.parts) == of.world == 1 and self._has_no_share(of.parts[0])
        self._explain()

    @staticmethod
    def _has_no_share(part: AuditPart) -> bool:
        return part.shard is None or part.shard.replicas == 1

    @property
    def _in_part(self) -> bool:
        """Whether more of the epoch may come, or may have come: then nothing is missing yet."""
        course = self._course
        return bool(self._of.absent or self._early or course.open or course.lost)

    def _explain(self) -> None:
        """Which of what came twice or never is as it was asked for."""
        of = self._of
        never, again = of.totals()
        self.left_out: dict[str, dict[int, int]] = {}
        for index in of.never:
            if index in of.missing:
                name, rank = of.missing[index]
                self.left_out.setdefault(name, {})[index] = rank
        told = sum(map(len, self.left_out.values()))
        shards = [each.shard for each in of.counted if each.shard is not None]
        not_drawn = max((each.left_out for each in shards), default=0)
        if self._alone:  # what it did not draw, no other rank did
            not_drawn += of.parts[0].counts.get("unvisited", 0)
        self.by_sampler = min(never - told, not_drawn)
        unlisted = sum(each.unlisted for each in of.counted)
        if of.todo:  # in which those that are named may lie too
            unlisted += sum(map(len, (x for e in of.counted for x in e.left_out.values()))) - told
        self.unlisted = max(0, min(never - told - self.by_sampler, unlisted))
        self.never_left = max(0, never - told - self.by_sampler - self.unlisted)
        padding = [index for index in of.twice if index in of.padded]
        known = sum(of.padded[index] for index in padding)
        may_be = max((each.padding for each in shards), default=0)
        if known < again <= may_be and not self.never_left:  # which are padding only numbers tell
            padding, known = of.twice, again
        self.padding = np.array(padding, np.int64)
        self.padded_times = known
        self.again_left = max(0, again - known)
        # Of one rank its own audit says whether what came again was drawn again.
        own = self._alone and of.parts[0].purpose
        self.drawn_again = bool(own and of.parts[0].counts.get("repeated"))
        if self.drawn_again:
            self.again_left = 0

    def fields(self) -> dict[str, Any]:
        """Those of a :class:`~safeloader.RunAudit`."""
        of = self._of
        never, again = of.totals()
        alike = self._alike()
        self._judge(alike)
        self._tell()
        for cause in self._causes(alike):
            self._evidence.append(cause.seen)
            self._steps.append(cause.step)
        ok = False if self._wrong else None if self._unsure else True
        if ok is not True and not self._steps:
            self._steps += self._course.steps or self._general_steps()
        twice = of.numbers_twice()
        return {
            "ok": ok,
            "complete": not of.absent and all(each.complete for each in of.parts),
            "world": of.world,
            "absent": of.absent,
            "delivered": sum(each.delivered for each in of.parts),
            "length": of.length,
            "twice": np.array(of.twice, np.int64),
            "never": np.array(of.never, np.int64),
            "by_rank": dict(of.by),
            "padding": self.padding,
            "left_out": self.left_out,
            "counts": {
                "twice": twice,
                "never": never,
                "padding": len(self.padding) or self.padded_times,
                "again": again,
            },
            "exact": not of.todo and not of.unknown and not of.absent,
            "ranges": tuple(of.todo),
            "answer": self._answer(ok),
            "evidence": tuple(self._evidence),
            "next_step": ". ".join(dict.fromkeys(self._steps)),
            "parts": tuple(of.parts),
        }

    # the answer ─────────────────────────────────────────────────────────────────────────────────

    def _alike(self) -> list[list[int]]:
        """Groups of ranks with the very same samples."""
        groups: dict[Any, list[tuple[AuditPart, list[int]]]] = {}
        for part in self._of.parts:  # of a thousand ranks, few may be the same as another
            its = groups.setdefault(self._total(part), [])
            for first, ranks in its:
                if self._same(first, part):
                    ranks.append(part.rank)
                    break
            else:
                its.append((part, [part.rank]))
        return sorted(ranks for its in groups.values() for _, ranks in its if len(ranks) > 1)

    def _total(self, part: AuditPart) -> Any:
        """What parts of the same samples have in common."""
        ladder = self._of.ladders.get(part.rank)
        if ladder is not None:
            return ladder.count, int(ladder.sums.sum(dtype=np.uint64))
        return None if part.digests is None else part.digests.total

    def _same(self, one: AuditPart, other: AuditPart) -> bool:
        ladders = self._of.ladders
        if one.rank in ladders and other.rank in ladders:
            return ladders[one.rank].count > 0 and ladders[one.rank].same(ladders[other.rank])
        if one.digests is None or other.digests is None or not one.digests.total:
            return False
        same = np.array_equal(one.digests.smallest, other.digests.smallest)
        return one.digests.total == other.digests.total and same

    def _judge(self, alike: list[list[int]]) -> None:
        of = self._of
        bad = [each for each in of.parts if each.ok is False]
        if bad:
            whose = "its own audit is" if len(bad) == 1 else "their own audits are"
            sums = {name: sum(each.counts.get(name, 0) for each in bad) for name in _TROUBLES}
            told = ", ".join(f"{n} {name}" for name, n in sums.items() if n)
            said = f"{named(each.rank for each in bad)}: {whose} not ok"
            self._wrong.append(f"{said} ({told})" if told else said)
        open_ = self._course.open
        unchecked = [
            each.rank
            for each in of.parts
            if each.ok is None and not each.unknown and each.rank not in open_
        ]
        if unchecked:
            self._unsure.append(f"{named(unchecked)} did not check all of the epoch")
        if of.absent:
            self._unsure.append(f"{named(of.absent)} did not come")
        self._judge_end()
        own_word = self._alone and of.parts[0].ok is True
        if of.unknown and not own_word:
            self._unsure.append(of.unknown)
        self._unsure += of.notes
        if not of.parts:
            return
        if own_word and not of.ladders:  # whatever its samples are called
            return
        again = any(each.purpose == "replacement" for each in of.parts) and not own_word
        if again and alike:
            self._wrong.append(f"{named(alike[0])} handed over the very same samples")
        elif again:
            self._unsure.append("the sampler draws with replacement, so each index once is not due")
        if of.by_digests is not None:
            self._judge_digests(alike)
        self._judge_indices(again, alike)

    def _judge_end(self) -> None:
        """Whether all ranks came to the end of the epoch, as far as that is to be."""
        of, course = self._of, self._course
        if course.lost:
            self._unsure.append(course.lost)
        if course.open and not course.cut_off:
            return
        if course.cut_off:
            batches = number_of(course.batches, "batch", "batches")
            self._unsure.append(f"it was cut off after {batches}, and nothing went on with it")
        elif self._early and len(self._early) < len(of.parts):
            self._wrong.append(f"{named(self._early)} stopped early")
        elif self._early and not course.closed:
            self._unsure.append("no rank came to the end of its epoch")

    def _judge_digests(self, alike: list[list[int]]) -> None:
        common, compared, kind = self._of.by_digests or (0, 0, "")
        self._evidence.append(
            f"{number_of(compared, kind, 'indices' if kind == 'index' else 'keys')} compared, "
            f"{common} of them on more than one rank"
        )
        if alike:
            self._wrong.append(f"{named(alike[0])} handed over the very same samples")
        elif common:
            self._wrong.append(
                f"{common} of {compared} samples compared came on more than one rank"
            )
        else:
            self._unsure.append(
                "what never came is not known where samples have no number; none of those compared "
                "came on two ranks"
            )

    def _judge_indices(self, on_purpose: bool, alike: list[list[int]]) -> None:
        of = self._of
        doubtful = "" if of.unknown else of.differing
        if doubtful:
            self._unsure.append(doubtful)
        if of.once > 1:
            self._unsure.append(
                f"each share was on {of.once} ranks, as under tensor or pipeline parallelism, and "
                "counts once"
            )
            self._steps.append(
                "if these ranks train on samples of their own, give the sampler the number of all "
                "ranks; else give merge_audits one rank of each share"
            )
        if on_purpose or doubtful or of.unknown:
            return
        few = "" if not of.todo else "at least "
        guessed = any(each.purpose == NOT_KNOWN for each in of.parts) and not alike
        if self.again_left:
            twice = max(1, of.numbers_twice() - len(self.padding))
            said = f"{few}{twice} of {of.length} indices came more than once"
            self._doubt(said, "may draw them again" if guessed else "")
        if of.todo and not (self.again_left or self.never_left or self._in_part):
            self._unsure.append(
                f"in {number_of(len(of.todo), 'range')} of indices some came twice or never, and "
                "which of them is not known"
            )
        if not self.never_left or self._in_part:
            return
        never = f"{few}{self.never_left} of {of.length} indices came on no rank"
        if all(each.purpose == "subset" for each in of.parts) and not self.again_left:
            self._unsure.append(f"{never}, and the samplers draw from some indices only")
        else:
            self._doubt(never, "may leave them out" if guessed else "")

    def _doubt(self, said: str, what_samplers_may: str) -> None:
        """What is wrong, unless the samplers, of which nothing is known, do so on purpose."""
        if what_samplers_may:
            why = "the samplers, of which this folder says nothing"
            self._unsure.append(f"{said}; {why}, {what_samplers_may} on purpose")
        else:
            self._wrong.append(said)

    def _answer(self, ok: bool | None) -> str:
        of = self._of
        epochs = {each.epoch for each in of.parts if each.epoch >= 0}
        which = f"epoch {epochs.pop()}" if len(epochs) == 1 else "the epoch"
        begin = f"{self._course.which or f'{which} of ' + number_of(of.world, 'rank')}:"
        if ok is False:
            return f"{begin} NOT OK: {'; '.join(self._wrong)}"
        if ok is None:
            return f"{begin} cannot be told: {'; '.join(self._unsure)}"
        never, _ = of.totals()
        if self._in_part:
            said, never = self._so_far(begin), 0
        elif not of.ladders:
            drawn = number_of(of.parts[0].drawn, "sample")
            said = f"{begin} ok, what it drew came, by its own audit: {drawn}"
        else:
            said = f"{begin} ok, each of {of.length} indices came"
            said += f" but {never}, left out as was asked for" if never else ""
        more = ""
        if len(self.padding):
            more = f", and {len(self.padding)} came twice as padding"
        elif self.padded_times:
            more = f", and {self.padded_times} came again as padding"
        elif self.drawn_again:
            more = ", and some again, as its sampler drew them"
        elif of.ladders and not (never or self._in_part):
            more = " once"
        before = sum(each.left_out_before for each in of.parts)
        more += f"; of these {before} were left out before it went on" if before else ""
        return said + more

    def _so_far(self, begin: str) -> str:
        """That nothing is wrong with what came of an epoch that is not at its end."""
        of, course = self._of, self._course
        came = number_of(sum(each.delivered for each in of.parts), "sample")
        if course.open:
            return f"{begin} ok so far, {came} delivered"
        batches = number_of(course.batches, "batch", "batches")
        return f"{begin} ok, left early by the program after {batches}, {came} delivered"

    # the evidence ───────────────────────────────────────────────────────────────────────────────

    def _tell(self) -> None:
        of, lines = self._of, self._evidence
        if not of.parts:
            return
        lines.insert(0, self._delivered())
        for part in of.parts[:SHOWN]:
            if part.ok is False:
                bad = {name: n for name, n in part.counts.items() if name in _TROUBLES}
                lines.append(f"rank {part.rank}: {', '.join(f'{n} {k}' for k, n in bad.items())}")
            if part.unknown and (self._alone or part.unknown not in of.unknown):
                lines.append(f"rank {part.rank}: {part.unknown}")
        before = {each.rank: each.left_out_before for each in of.parts if each.left_out_before}
        if before:
            told = ", ".join(f"{n} by rank {rank}" for rank, n in [*before.items()][:SHOWN])
            lines.append(
                f"left out before the epoch went on: {told}, by the state that was loaded; they "
                "count as delivered here, and the audit of that run names them"
            )
        lines += self._course.evidence
        epochs = {each.epoch for each in of.parts}
        if len(epochs) > 1:
            told = ", ".join(f"rank {each.rank}: {each.epoch}" for each in of.parts[:SHOWN])
            lines.append(f"the ranks are in other epochs, as each counts its own: {told}")
        if of.beneath:
            lines.append("indices are those of the dataset under the ranks' Subsets")
        if of.purposes:
            own = ", ".join(sorted(of.purposes))
            if self.never_left or self.again_left:
                lines.append(
                    f"the sampler is your own ({own}): what it leaves out or repeats on purpose "
                    "is among these"
                )
        if of.unknown or (of.absent and not self.again_left):
            return
        self._tell_twice()
        if of.course is None or not self._in_part:
            self._tell_never()
        for each in of.todo[:_RANGES_SHOWN]:
            lines.append(f"among indices {each}")
        lines += of.remarks
        if len(of.todo) > _RANGES_SHOWN:
            lines.append(f"and {len(of.todo) - _RANGES_SHOWN} more in audit.ranges")

    def _delivered(self) -> str:
        of = self._of
        numbers = {each.rank: each.delivered for each in of.parts}
        said = f"{number_of(sum(numbers.values()), 'sample')} delivered"
        if len(numbers) == 1:
            return said
        if len({*numbers.values()}) == 1:
            each = "each rank" if len(numbers) == of.world else f"each of {len(numbers)} ranks"
            return f"{said}: {of.parts[0].delivered} by {each}"
        shown = [f"{n} by rank {rank}" for rank, n in itertools.islice(numbers.items(), SHOWN)]
        return f"{said}: {', '.join(shown)}{', ...' * (len(numbers) > SHOWN)}"

    def _tell_twice(self) -> None:
        of = self._of
        if not of.numbers_twice():
            return
        padding = set(self.padding.tolist())
        number = of.numbers_twice()
        if of.twice:
            times = {len(of.by.get(index, ())) for index in of.twice}
            often = f", each {times.pop()} times" if len(times) == 1 and max(times) > 2 else ""
            self._evidence.append(f"twice: {self._shown(of.twice, number)}{often}")
        else:
            self._evidence.append(f"twice: {number} at least")
        if self.padded_times:
            some = f"{self.padded_times} of these {'is' if self.padded_times == 1 else 'are'}"
            which = "these are" if number == len(padding) else some
            self._evidence.append(
                f"padding: {which}, so that each rank has as many; an evaluation counts them twice"
            )

    def _tell_never(self) -> None:
        of = self._of
        for name, indices in self.left_out.items():
            told = f"{len(indices)} {name} by {named(indices.values())}"
            self._evidence.append(f"never: {told}: {self._shown([*indices], len(indices), '')}")
        if self.unlisted:
            self._evidence.append(f"never: {self.unlisted} that ranks left out and do not name")
        rest = [index for index in of.never if index not in of.missing]
        number = self.never_left + self.by_sampler
        if not number:
            return
        why = ""
        if self.by_sampler:
            shards = (each.shard for each in of.parts if each.shard and each.shard.left_out)
            shard = next(shards, None)
            why = f"; {self.by_sampler} not drawn by the sampler"
            if shard is not None:
                why = f"; {self.by_sampler} left out by {shard.drops_by} of {shard.kind}"
        self._evidence.append(f"never: {self._shown(rest, number)}{why}")

    def _shown(self, indices: Sequence[int], number: int, head: str = "n") -> str:
        of = self._of
        shown = [
            f"{index} ({named(of.by[index])})"
            if index in of.by and len(indices) <= SHOWN
            else str(index)
            for index in indices[:SHOWN]
        ]
        if not shown:
            return f"at least {number}"
        more = ", ..." if number > len(shown) else ""
        few = "at least " if of.todo and number > len(indices) else ""
        return (f"{few}{number}: " if head else "") + ", ".join(shown) + more

    # the next step ──────────────────────────────────────────────────────────────────────────────

    def _causes(self, alike: list[list[int]]) -> list[Cause]:
        of = self._of
        facts = Facts(
            of.parts, of.world, of.absent, alike, of.length, self.never_left, self.again_left
        )
        return causes_of(facts) if self._wrong else []

    def _general_steps(self) -> list[str]:
        of = self._of
        if of.absent:
            where = "where it is" if len(of.absent) == 1 else "where they are"
            step = f"see in the log of {named(of.absent)} {where}; a longer timeout_s waits longer"
            return [step]
        if any("without key=" in each.unknown for each in of.parts):
            return ["give the loaders key=, a function that names a sample"]
        if any(each.ok is False for each in of.parts):
            bad = [each.rank for each in of.parts if each.ok is False]
            return [f"print(loader.audit) on {named(bad)}"]
        if of.differing or "datasets" in of.unknown:
            return [
                "make the dataset of each rank from one list in one order (sorted(files)), and let "
                "the sampler share it out; or give safeloader.merge_audits the ranks of one dataset"
            ]
        if any(each.purpose == "replacement" for each in of.parts):
            return ["none, unless each index is to come once: then draw without replacement"]
        if of.todo:
            return ["safeloader.audit_across_ranks(loader, group) names the indices"]
        return []
