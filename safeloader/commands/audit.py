"""``python -m safeloader audit RUN``: exactly once, over all ranks and resumes. Runs in: main."""

from __future__ import annotations

from collections import Counter

from safeloader.commands import FINE, NO, terminal
from safeloader.commands.terminal import AttemptOption, JsonOption, RunArgument
from safeloader.report.exactly_once import RunVerdict, exactly_once

_FINE_SHOWN = 3  # epochs of a loader that are fine, of which more than the answer is told

EXAMPLE = "python -m safeloader audit runs/exp1 || echo not exactly once"


def audit(run: RunArgument, attempt: AttemptOption = None, as_json: JsonOption = False) -> int:
    """Was each index delivered exactly once, over all ranks, attempts and resumes?

    Exit status 0 if so, 1 if not or if it cannot be told. Of a run that goes on it is what holds so
    far.
    """
    folder = terminal.opened(run, convert=True)
    terminal.check_attempt(folder, attempt)
    verdict = exactly_once(folder, attempt)
    if as_json:
        terminal.print_json(verdict.to_dict())
    else:
        _tell(verdict)
    return FINE if verdict.ok else NO


def _tell(verdict: RunVerdict) -> None:
    out = terminal.console()
    terminal.answer(out, verdict.ok, verdict.answer)
    loader = None
    shown = _with_evidence(verdict)
    for each in verdict.epochs:
        if each.loader != loader:
            loader = each.loader
            terminal.lines(out, [terminal.short(loader)], "")
        terminal.lines(out, [each.answer])
        if id(each) in shown:
            terminal.lines(out, each.evidence, "      ")
    terminal.lines(out, [f"note: {note}" for note in verdict.notes])
    terminal.next_step(out, verdict.next_step)


def _with_evidence(verdict: RunVerdict) -> set[int]:
    """The epochs of which the evidence is told: all that are not fine, and the newest of others."""
    shown, fine = set(), Counter[str]()
    for each in reversed(verdict.epochs):
        if each.ok is True:
            fine[each.loader] += len(each.evidence) > 1
        if each.ok is not True or (len(each.evidence) > 1 and fine[each.loader] <= _FINE_SHOWN):
            shown.add(id(each))
    return shown
