"""What a program printed, without what differs from run to run, and what was told of its loaders.

Pure: text in, text out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LEFT_OUT = "…"
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+\.?\d*(?:e[-+]?\d+)?(?![\w])")
_OURS = "safeloader: "
_FIGURES = "waited for data", "slowest"  # how the line after a loader's begins
_RECORDED = re.compile(r": (\d+) epochs?, (\d+) of (\d+) delivered(?:; (.*))?$")


def comparable(printed: str, varies: str) -> list[str]:
    """The lines of what was printed, each figure that `varies` matches left out.

    A line that is nothing else is left out as a whole: how often a progress bar is drawn depends
    on time too. So is an empty one, and blanks at the ends.

    Args:
        printed: the text; a bar that was drawn over itself is several lines.
        varies: a regular expression of what differs between two runs of one program.
    """
    pattern = re.compile(varies)
    lines = (_COLOURS.sub("", line).strip() for line in printed.splitlines())
    left = (pattern.sub(LEFT_OUT, line).strip() for line in lines)
    return [line for line in left if line and line != LEFT_OUT]


def numbers(lines: Iterable[str]) -> int:
    """How many numbers are in lines: where there is none, nothing was compared."""
    return sum(len(_NUMBER.findall(line)) for line in lines)


def first_difference(expected: Sequence[str], got: Sequence[str]) -> str | None:
    """The first line that is not the same, of both; None if all are."""
    for number, (one, other) in enumerate(zip(expected, got, strict=False), 1):
        if one != other:
            return f"line {number}: {one!r}, then {other!r}"
    if len(expected) == len(got):
        return None
    more, what = (expected, "is missing") if len(expected) > len(got) else (got, "is new")
    number = min(len(expected), len(got))
    return f"line {number + 1} {what}: {more[number]!r}"


def parted(stderr: str) -> tuple[str, list[str]]:
    """What the program wrote, and the lines that the launcher added."""
    theirs, ours = [], []
    under_ours = False
    for line in stderr.splitlines(keepends=True):
        under_ours = line.startswith(_OURS) or (under_ours and line.startswith("  "))
        (ours if under_ours else theirs).append(line)
    return "".join(theirs), [line.strip() for line in ours]


def shortened(line: str, roots: Mapping[str, str]) -> str:
    """The line with the start of each path in a short form: no path of a machine is published."""
    for root in sorted(roots, key=len, reverse=True):
        line = line.replace(root, roots[root])
    return line


@dataclass(frozen=True)
class Recorded:
    """What the launcher's lines come to."""

    loaders: int
    """Lines of loaders that were recorded; several loaders of one line of a program are one."""
    epochs: int
    delivered: int
    drawn: int
    troubles: list[str]
    """What was not recorded, or not as it has to be, in the launcher's words."""


def recorded(report: Sequence[str]) -> Recorded:
    """Sum up what the launcher said at the end of a program's processes."""
    found = [(line, _RECORDED.search(line)) for line in report]
    epochs = [match for _, match in found if match]
    troubles = [line for line, match in found if match and match[4]]
    heading = f"{_OURS}loaders of process "
    usual = heading, *_FIGURES
    troubles += [line for line, match in found if not match and not line.startswith(usual)]
    return Recorded(
        loaders=len(epochs),
        epochs=sum(int(match[1]) for match in epochs),
        delivered=sum(int(match[2]) for match in epochs),
        drawn=sum(int(match[3]) for match in epochs),
        troubles=troubles,
    )
