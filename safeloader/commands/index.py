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
    its = folder.sources_by_loader({*forms})
    sources = {
        name: next(known[each] for each in forms if known.get(each))
        for name, known in its.items()
        if any(known.get(each) for each in forms)
    }
    wanted = forms[0]
    if as_json:
        seen = [each.to_dict() for each in found]
        source = next(iter(sources.values()), "")
        terminal.print_json({"index": wanted, "source": source, "sources": sources, "seen": seen})
    else:
        _tell(folder, forms, sources, found, every)
    return FINE if found else NO


def _tell(
    run: RunFolder,
    forms: list[int | str],
    sources: dict[str, str],
    found: Sequence[Sighting],
    every: bool,
) -> None:
    out = terminal.console()
    times = Counter(each.what for each in found)
    told = ", ".join(
        f"{what} {'once' if count == 1 else f'{count} times'}" for what, count in times.items()
    )
    bad = any(what != "delivered" for what in times)
    ok = None if bad else bool(found)
    terminal.answer(out, ok, f"index {forms[0]}: {told or f'nowhere in {run.path}'}")
    several = len({each.loader for each in found}) > 1
    for name, source in sources.items():
        of = f" in {terminal.short(name)}" if several else ""
        terminal.lines(out, [f"source{of}: {source}"])
    rows = [
        (
            *(each.what, each.attempt, each.rank, _known(each.epoch), _known(each.batch)),
            *(_known(each.position), "main" if _in_main(each) else _known(each.worker)),
            *(terminal.moment(each.asked_ns), terminal.took(each.fetch_ns)),
            _why(each, sources.get(each.loader, ""), several),
        )
        for each in (found if every else found[:_SHOWN])
    ]
    heads = ("what", ">attempt", ">rank", ">epoch", ">batch", ">position", ">worker", "when")
    if rows:
        terminal.table(out, (*heads, ">fetch", "why, or loader"), rows)
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
        terminal.next_step(out, terminal.replaying(run, paths[-1]))
    elif not found:
        names = dict.fromkeys(terminal.short(each.name) for each in run.loaders)
        terminal.lines(
            out, [f"looked for in what {name} handed over" for name in [*names][:_FILES]]
        )
        terminal.next_step(
            out,
            "indices are those of the loader's own dataset, from 0 (of a Subset, not of what is "
            "under it); of a batch that is still waited for the training's log names them, after "
            f"stall_after= seconds; python -m safeloader audit {run.path} says which never came",
        )


def _in_main(seen: Sighting) -> bool:
    """Whether the main process fetched it; of what was not delivered that is not known."""
    return seen.worker is None and seen.asked_ns is not None


def _why(seen: Sighting, source: str, several: bool) -> str:
    reason = terminal.without_source(" ".join(seen.reason.split()), source)
    name = terminal.short(seen.loader)
    return f"{reason} ({name})" if reason and several else reason or name


def _known(value: int | None) -> str:
    return "-" if value is None else str(value)
