"""``python -m safeloader audit RUN``: exactly once, over all ranks and resumes. Runs in: main."""

from __future__ import annotations

from collections import Counter

from safeloader.commands import FINE, NO, terminal
from safeloader.commands.terminal import AttemptOption, JsonOption, RunArgument
from safeloader.report.exactly_once import EpochVerdict, RunVerdict, exactly_once

_FINE_SHOWN = 3  # epochs of a loader that are fine, of which more than the answer is told
_MANY = 3  # epochs with the same answer that are told in one line

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
    shown = _with_evidence(verdict)
    of_loader: dict[str, list[EpochVerdict]] = {}
    for each in verdict.epochs:
        of_loader.setdefault(each.loader, []).append(each)
    for loader, epochs in of_loader.items():
        terminal.lines(out, [terminal.short(loader)], "")
        for alike in _alike(epochs, shown):
            terminal.lines(out, _answers(alike))
            if id(alike[0]) in shown:
                terminal.lines(out, alike[0].evidence, "      ")
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


def _alike(epochs: list[EpochVerdict], shown: set[int]) -> list[list[EpochVerdict]]:
    """Epochs that follow each other and have the same answer, and no evidence that is told."""
    found: list[list[EpochVerdict]] = []
    for each in epochs:
        last = found[-1][-1] if found else None
        follows = last is not None and (each.epoch, _rest(each)) == (last.epoch + 1, _rest(last))
        if not follows or not {id(each), id(last)}.isdisjoint(shown):
            found.append([])
        found[-1].append(each)
    return found


def _rest(verdict: EpochVerdict) -> str:
    """Its answer, but for which epoch it is of."""
    return verdict.answer.removeprefix(f"epoch {verdict.epoch}")


def _answers(alike: list[EpochVerdict]) -> list[str]:
    if len(alike) < _MANY:
        return [each.answer for each in alike]
    who, _, said = _rest(alike[0]).partition(":")
    return [f"epochs {alike[0].epoch} to {alike[-1].epoch}{who}, each:{said}"]
