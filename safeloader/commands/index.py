"""``python -m safeloader index RUN I``: what became of an index. Runs in: main."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import typer

from safeloader.commands import FINE, NO, BadInput, terminal
from safeloader.commands.terminal import JsonOption, RunArgument
from safeloader.provenance.index_texts import asked_for
from safeloader.report.records import Sighting, is_of
from safeloader.report.run import RunFolder

EXAMPLE = "python -m safeloader index runs/exp1 123"
_SHOWN, _FILES = 50, 5


def index(
    run: RunArgument,
    which: Annotated[
        str, typer.Argument(metavar="INDEX", show_default=False, help="A number, or a text.")
    ],
    is_text: Annotated[
        bool, typer.Option("--text", help="The dataset's indices are texts, this one of digits.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Every time, however many.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Where and when an index was delivered, skipped, replaced or failed."""
    if which.startswith("--") and not is_text:  # what is no option may be a number below 0
        raise BadInput(f"No such option: {which}. With --text it is an index")
    folder = terminal.opened(run)
    forms = [each for each in asked_for(which) if not (is_text and isinstance(each, int))]
    found = [seen for each in forms for seen in folder.index(each)]
    found = list(dict.fromkeys(found))
    found.sort(key=lambda each: (each.attempt, each.epoch or 0, each.batch or 0))
    source = next(iter(folder.sources(forms).values()), "")
    wanted = forms[0]
    if as_json:
        seen = [each.to_dict() for each in found]
        terminal.print_json({"index": wanted, "source": source, "seen": seen})
    else:
        _tell(folder, forms, source, found, every)
    return FINE if found else NO


def _tell(
    run: RunFolder, forms: list[int | str], source: str, found: Sequence[Sighting], every: bool
) -> None:
    out = terminal.console()
    times = Counter(each.what for each in found)
    told = ", ".join(
        f"{what} {'once' if count == 1 else f'{count} times'}" for what, count in times.items()
    )
    bad = any(what != "delivered" for what in times)
    ok = None if bad else bool(found)
    terminal.answer(out, ok, f"index {forms[0]}: {told or f'nowhere in {run.path}'}")
    if source:
        terminal.lines(out, [f"source: {source}"])
    rows = [
        (
            *(each.what, each.attempt, each.rank, _known(each.epoch), _known(each.batch)),
            *(_known(each.position), terminal.moment(each.asked_ns), terminal.took(each.fetch_ns)),
            " ".join((each.reason or terminal.short(each.loader)).split()),
        )
        for each in (found if every else found[:_SHOWN])
    ]
    heads = ("what", ">attempt", ">rank", ">epoch", ">batch", ">position", "when", ">fetch", "why")
    if rows:
        terminal.table(out, (*heads[:-1], "why, or loader"), rows)
    if len(found) > len(rows):
        terminal.lines(out, [f"and {len(found) - len(rows)} more: --all shows them"])
    failures = run.failures()
    paths = [each["path"] for each in failures if any(is_of(each["failure"], k) for k in forms)]
    terminal.lines(out, [f"failure: {path}" for path in paths[:_FILES]])
    streams = {each.loader.name for each in run.epochs() if (each.audit or {}).get("stream")}
    if any(each.loader in streams for each in found):
        said = (
            "of a stream an index is the number of a sample in its worker's part, and no identity"
        )
        terminal.lines(out, [said])
    if gone := run.dropped():
        terminal.lines(
            out, [f"{terminal.some(len(gone), 'segment')} went for run_max_bytes=: not seen there"]
        )
    terminal.lines(out, [f"note: {note}" for note in run.notes])
    if paths:
        terminal.next_step(
            out, f"python -m safeloader replay {paths[0]} module:make_dataset fetches it once more"
        )
    elif not found:
        terminal.next_step(
            out,
            "indices are those of the loader's own dataset (of a Subset, not of what is under it); "
            f"python -m safeloader audit {run.path} says which never came",
        )


def _known(value: int | None) -> str:
    return "-" if value is None else str(value)
