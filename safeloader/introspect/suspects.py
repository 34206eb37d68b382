"""What was warned of at the start, and whether it is behind what went wrong. Runs in: both.

An object that a worker had better not inherit is told of once, at the start. When something then
fails or hangs over it, it is the first suspect, and is told again: the warning may be hours up in
the log, and the error itself leads elsewhere.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from safeloader.introspect.advice import GENERATOR, WAITED_FOR
from safeloader.introspect.frames import frames_of, is_users
from safeloader.introspect.values import fields, held_by, module_of

_STEP = re.compile(r"\.(\w+)|\[(\d+|'[^']*')\]")
# Errors pass through these for any reason.
_EVERYWHERE = {"torch", "numpy", "io", "builtins", "threading", "queue", "concurrent", "socket"}


_NO_WAY_TO_SEE = (
    "{} runs in the main process, to which it belongs, and mostly succeeds: it is no way to see "
    "this"
)


class Inherited(NamedTuple):
    """Something that a worker had better not inherit.

    Attributes:
        path: where it is, an expression: ``"dataset.archive"``.
        kind: its type, as people know it.
        why: why it is better not inherited.
        advice: what to do about it.
        token: which object it was, for :func:`is_still_there`; 0 where none is.
    """

    path: str
    kind: str
    why: str
    advice: str
    token: int = 0

    @property
    def by_fork(self) -> bool:
        """Whether only a fork does it harm; copies of a generator are alike under each method."""
        return GENERATOR.why not in self.why

    @property
    def says(self) -> str:
        """That it is the first suspect, and why."""
        return (
            f"first suspect: {self.path} ({self.kind}), inherited over the fork, as was warned of "
            f"at the start: {self.why}"
        )

    def next_step(self, *, stream: bool) -> str:
        """What to do, and what would show nothing."""
        again = "to iterate the dataset again here" if stream else "replay()"
        return f"{self.advice}. {_NO_WAY_TO_SEE.format(again)}"

    @property
    def is_waited_for(self) -> bool:
        """Whether whoever uses it may wait for ever: a lock, or threads that do not exist."""
        return self.why in WAITED_FOR

    def is_named_in(self, lines: Iterable[str]) -> bool:
        """Whether a line of source mentions the attribute that it is."""
        names = re.findall(r"[A-Za-z_]\w*", self.path)
        name = names[-1] if len(names) > 1 else ""
        return bool(name) and any(re.search(rf"\b{name}\b", line) for line in lines)


def suspect_of(
    exc: BaseException, inherited: Iterable[Inherited], dataset: Any
) -> Inherited | None:
    """The inherited object that ``exc`` came out of; None if none is known.

    It did if a failing line of the user's names its attribute, or if the exception, or a frame that
    it went through, is of the library of the object's class.

    Args:
        exc: what was raised, in a forked worker.
        inherited: what was warned of at the start.
        dataset: the worker's: what the worker has made anew is no suspect.
    """
    frames = frames_of(exc)
    lines = [
        linecache.getline(each.frame.f_code.co_filename, each.line)
        for each in frames
        if is_users(each.frame.f_code.co_filename)
    ]
    passed = {str(each.frame.f_globals.get("__name__", "")).partition(".")[0] for each in frames}
    passed.add(module_of(type(exc)).partition(".")[0])
    passed -= _EVERYWHERE
    for each in inherited:
        package = each.kind.partition(".")[0]
        blamed = each.by_fork and (each.is_named_in(lines) or package in passed)
        if blamed and is_still_there(each, dataset):
            return each
    return None


def is_still_there(each: Inherited, dataset: Any) -> bool:
    """Whether the worker's copy of the dataset still holds the inherited object itself.

    A fork leaves objects where they are; one made anew in the worker is another. Where the path
    cannot be followed, it counts as still there.
    """
    begins, _, steps = each.path.partition(".")
    if not each.token or begins != "dataset" or "__" in steps:
        return True
    thing = dataset
    for name, key in _STEP.findall(f".{steps}"):
        pairs = fields(thing) if name else held_by(thing)
        wanted: Any = name or (key[1:-1] if key.startswith("'") else int(key))
        found = [held for at, held in pairs if type(at) is type(wanted) and at == wanted]
        if not found:
            return False
        thing = found[0]
    return id(thing) == each.token
