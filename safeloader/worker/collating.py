"""Names the sample that a collate function fell over. Runs in: worker.

In come the samples of a batch and their dataset indices, out goes a sentence for the failure's
report. "stack expects each tensor to be equal size" leaves the search to the reader. A sample that
is not built like the others is found by comparing them (:mod:`sample_differences`). Only the
gravest differences are told, in the order of :class:`Rank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from safeloader.introspect.sample_differences import Finding, Rank, Survey
from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.texts import bounded_text

SHOWN_MAX = 5  # groups, and indices of one group, in a sentence

_TAKES = "default_collate takes tensors, numpy arrays, numbers, strings, dicts and lists"
# By rank: what differs, how one odd sample is told, and how the majority is.
_WORDS = {
    Rank.KEYS: ("keys", "has {}", "; {} {}"),
    Rank.LENGTH: ("length", "has {} elements", ", {} have {}"),
    Rank.SHAPE: ("shape", "has shape {}", ", {} have {}"),
    Rank.DEVICE: ("device", "is on {}", ", {} are on {}"),
    Rank.DTYPE: ("dtype", "has dtype {}", ", {} have {}"),
}
_OF_TYPE = ("type", "is {}", "; {} are {}")  # for all others


class FaultySample(NamedTuple):
    """The sample that is at fault in its batch, and what was found out about it.

    Attributes:
        position: its position in the batch; None unless there is exactly one.
        text: one or a few sentences for a person.
        odd: positions of the samples that differ from a clear majority; empty where there is none.
    """

    position: int | None = None
    text: str = ""
    odd: tuple[int, ...] = ()


def explain(samples: Sequence[object], indices: Sequence[object]) -> FaultySample | None:
    """Find what keeps the samples of a batch from being collated, and which sample is to blame.

    Args:
        samples: what the dataset returned, in the order of the batch.
        indices: the dataset index of each.

    Returns:
        None where the samples are built alike and ``default_collate`` can take what they hold.
        Raises nothing of its own.

    >>> explain([{"x": 1}, {"x": 2}, {}], [10, 11, 12]).text
    "dataset index 12 (position 2) has no key 'x'; the other 2 have it"
    """
    try:
        survey = Survey(samples)
        survey.walk()
        return _verdict(survey, indices)
    except Exception as exc:
        if raised_by_signal(exc):
            raise
        return None  # an explanation that fails must not hide the error it is to explain


def _verdict(survey: Survey, indices: Sequence[object]) -> FaultySample | None:
    # Within a rank, findings with a majority come first; the sort keeps the order of the walk.
    found = sorted(survey.findings, key=lambda finding: (finding.rank, finding.usual is None))
    grave = [finding for finding in found if finding.rank < Rank.TYPE]
    refused = [_refusal(*each, survey.total) for each in survey.refusals[:1]]
    if not grave and refused:
        return FaultySample(None, refused[0])
    if not found:
        return None
    # Samples that all differ, as sentences of any length do, are what a collate function that pads
    # is there for: then one that is odd in another way says more, and is told first.
    all_differ = [each for each in found if each.rank == found[0].rank]
    clearer = [finding for finding in grave if finding.usual is not None]
    if clearer and all(finding.usual is None for finding in all_differ):
        found = clearer
    else:
        all_differ = []
    top = found[0].rank
    told = [finding for finding in found if finding.rank == top]
    if top == Rank.DTYPE:  # torch.stack may convert; a number among strings breaks for certain
        told += [finding for finding in found if finding.rank == Rank.LEAF]
    blamed: dict[tuple[int, ...], Finding] = {}  # one sample wrong in ten places is told once
    for finding in told:
        blamed.setdefault(tuple(sorted(chain(*finding.odd.values()))), finding)
    sentences = [_sentence(each, indices, survey.total) for each in [*blamed.values()][:3]]
    if top >= Rank.DTYPE:
        sentences += refused
    if top == Rank.TYPE:
        sentences[0] = f"the only difference found, which default_collate takes: {sentences[0]}"
    clear = all(finding.usual is not None for finding in told)
    odd = sorted({*chain(*blamed)}) if clear else []
    # Which of the two it fell over is not known: no single sample is blamed then.
    single = len(blamed) == 1 and len(odd) == 1 and not all_differ
    sentences += [_sentence(finding, indices, survey.total) for finding in all_differ[:1]]
    few = odd if top < Rank.TYPE and 2 * len(odd) < survey.total else []
    return FaultySample(odd[0] if single else None, ". ".join(sentences), tuple(few))


def _sentence(finding: Finding, indices: Sequence[object], total: int) -> str:
    name, odd, rest = _WORDS.get(finding.rank, _OF_TYPE)
    place = f" at {finding.path}" if finding.path else ""
    groups = sorted(finding.odd.items(), key=lambda item: -len(item[1]))
    clauses = []
    for label, positions in groups[:SHOWN_MAX]:
        words = odd if len(positions) == 1 else odd.replace("is", "are").replace("has", "have")
        told = words.format(label).replace(" 1 elements", " 1 element")
        clauses.append(f"{_who(positions, indices)} {told}")
    if len(groups) > SHOWN_MAX:
        clauses.append(f"{len(groups) - SHOWN_MAX} more differ again")
    if finding.usual is None:
        head = f"the samples differ in {name}{place}: " if total > 2 else ""
        return head + ", ".join(clauses) + (place if total <= 2 else "")
    label, count = finding.usual
    everyone = count + sum(map(len, finding.odd.values())) == total
    others = "the other" if everyone else "of the others"
    return ", ".join(clauses) + place + rest.format(f"{others} {count}", label)


def _who(positions: list[int], indices: Sequence[object]) -> str:
    shown = ", ".join(bounded_text(indices[position]) for position in positions[:SHOWN_MAX])
    if len(positions) == 1:
        return f"dataset index {shown} (position {positions[0]})"
    left = len(positions) - SHOWN_MAX
    return f"dataset indices {shown}{f' and {left} more' if left > 0 else ''}"


def _refusal(path: str, kinds: Sequence[str], total: int) -> str:
    who = "every sample" if total > 1 else "the sample"
    held = " or ".join(
        kind if kind == "None" else f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"
        for kind in kinds
    )
    holds = f"holds {held} at {path}" if path else f"is {held}"
    return f"{who} {holds}: {_TAKES}"
