"""``python -m safeloader trace RUN -o FILE``: a trace for Perfetto. Runs in: main."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
from pathlib import Path
from typing import Annotated, Any

import typer

from safeloader.commands import FINE, NO, BadInput, terminal
from safeloader.commands.terminal import AttemptOption, RunArgument
from safeloader.introspect.private_files import see_replaceable, written_whole
from safeloader.report.chrome_trace import Choice, trace_events, written
from safeloader.report.run import RunFolder

EXAMPLE = "python -m safeloader trace runs/exp1 --last 1000 -o trace.json.gz"

_MOST = (1 << 31) - 1


def trace(
    run: RunArgument,
    target: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Where to; .gz is compressed, Perfetto reads it."
        ),
    ] = Path("trace.json.gz"),
    attempt: AttemptOption = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="N", min=0, max=_MOST, help="Of this rank alone."),
    ] = None,
    epoch: Annotated[
        int | None,
        typer.Option("--epoch", metavar="N", min=0, max=_MOST, help="Of this epoch alone."),
    ] = None,
    last: Annotated[
        int,
        typer.Option(
            "--last", metavar="N", min=1, max=_MOST, help="Newest batches of each loader."
        ),
    ] = 10_000,
    samples: Annotated[
        bool, typer.Option("--samples/--no-samples", help="A slice for each sample.")
    ] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that is there.")
    ] = False,
) -> int:
    """Write a Chrome trace of the run: open it in https://ui.perfetto.dev."""
    folder = terminal.opened(run)
    terminal.check_attempt(folder, attempt)
    choice = Choice(attempt, rank, epoch, samples, last)
    count = _write(target, trace_events(folder, choice), force)
    out = terminal.console()
    if not count:
        terminal.answer(out, False, f"no batch of that is in {folder.path}: nothing was written")
        return NO
    told = f"{count:,} events in {target} ({terminal.size(target.stat().st_size)})"
    terminal.answer(out, True, told)
    terminal.lines(out, [f"note: {note}" for note in folder.notes])
    more = f"; --last {10 * last} shows more" if _has_more(folder, choice) else ""
    terminal.next_step(out, f"open it in https://ui.perfetto.dev{more}")
    return FINE


def _has_more(run: RunFolder, choice: Choice) -> bool:
    """Whether older batches of the same choice were left away for ``--last``."""
    for loader in run.loaders:
        if choice.attempt in (None, loader.attempt) and choice.rank in (None, loader.rank):
            of_epoch = [
                each.batches
                for each in loader.totals().values()
                if choice.epoch in (None, each.epoch)
            ]
            if sum(of_epoch) > (choice.most or 0):
                return True
    return False


def _write(target: Path, events: Any, force: bool) -> int:
    """Write it whole, or not where there is no event; how many there were."""
    see_replaceable(target)
    if target.exists() and not force:
        raise BadInput(f"{target} is there already: give another -o, or --force")
    try:
        first = next(events, None)
        if first is None:
            return 0
        with written_whole(target) as raw:
            packed = target.suffix == ".gz"
            with _packed(raw) if packed else contextlib.nullcontext(raw) as its:
                text = io.TextIOWrapper(its, "utf-8", write_through=True)
                count = written(itertools.chain([first], events), text)
                text.detach()
    except OSError as exc:
        raise BadInput(f"{target} cannot be written: {exc.strerror or exc}") from None
    return count


def _packed(raw: Any) -> gzip.GzipFile:
    """What compresses into a file; no name and no time stand in it."""
    return gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=6, filename="", mtime=0)
