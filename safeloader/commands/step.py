"""``python -m safeloader step RUN N``: the samples of a step, on all ranks. Runs in: main."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from safeloader.commands import FINE, NO, terminal
from safeloader.commands.terminal import AttemptOption, JsonOption, RunArgument
from safeloader.provenance.run_format import SOURCES_STREAM
from safeloader.report.records import RunBatch
from safeloader.report.run import RunFolder

EXAMPLE = "python -m safeloader step runs/exp1 41337"
_SHOWN = 16  # samples of a batch, without --all


def step(
    run: RunArgument,
    number: Annotated[
        int,
        typer.Argument(
            metavar="N", min=0, max=(1 << 63) - 1, show_default=False, help="The step, from 0."
        ),
    ],
    attempt: AttemptOption = None,
    every: Annotated[bool, typer.Option("--all", help="Every sample, however many.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Which samples were in a step, on all ranks: rank, batch, index, source.

    A step is what loader.mark(step) said it is; without marks the N-th batch of each loader.
    """
    folder = terminal.opened(run)
    terminal.check_attempt(folder, attempt)
    batches = folder.step(number, attempt)
    if as_json:
        terminal.print_json([each.to_dict() for each in batches])
    elif batches:
        _tell(folder, number, batches, every)
    else:
        _tell_none(folder, number, attempt)
    return FINE if batches else NO


def _tell(run: RunFolder, number: int, batches: Sequence[RunBatch], every: bool) -> None:
    out = terminal.console()
    samples = sum(len(each.indices) for each in batches)
    attempts = sorted({each.attempt for each in batches})
    ranks = len({each.rank for each in batches})
    said = (
        f"step {number}: {terminal.some(samples, 'sample')} in "
        f"{terminal.some(len(batches), 'batch')} on {terminal.some(ranks, 'rank')}"
    )
    if len(attempts) > 1:
        said += f", in attempts {', '.join(map(str, attempts))}"
    terminal.answer(out, True, said)
    for each in batches:
        who = "main" if each.worker is None else f"worker {each.worker}"
        said = (
            f"attempt {each.attempt}, rank {each.rank}, epoch {each.epoch}, batch {each.batch}, by "
            f"{who} (pid {each.pid}); asked for at {terminal.moment(each.asked_ns)}, waited "
            f"{terminal.took(each.wait_ns)}: {terminal.short(each.loader)}"
        )
        terminal.lines(out, [said], "")
        _tell_samples(out, each, every)
    unknown = any(index not in each.sources for each in batches for index in each.indices)
    if unknown and any(True for loader in run.loaders for _ in loader.sources()):
        terminal.lines(out, [_why_unknown(run)], "")
    if len(attempts) > 1:
        said = f"--attempt {attempts[-1]} shows the newest attempt alone"
        terminal.lines(out, [said], "")
    marking = {loader.name for loader in run.loaders if loader.has_marks}
    its = [k for k in run.loaders if k.name in marking and k.attempt in attempts]
    silent = sorted({k.rank for k in its} - {k.rank for k in its if k.has_marks})
    if silent:
        others = f"{'rank' if len(silent) == 1 else 'ranks'} {', '.join(map(str, silent))}"
        without = (
            f"without {others}, where no step was marked: call loader.mark(step) on every rank"
        )
        terminal.lines(out, [without], "")
    if not marking:
        terminal.lines(
            out,
            ["no steps were marked: a step here is the batch of that number of each loader"],
            "",
        )
        terminal.next_step(out, "loader.mark(step) in the training loop says what a step is")


def _why_unknown(run: RunFolder) -> str:
    """Why where a sample comes from is not known."""
    if any((each.path / SOURCES_STREAM).exists() for each in run.loaders):
        return (
            "where all samples come from is written in a twentieth of the training's time: it has "
            "not come to some of these"
        )
    return (
        "sources are kept of samples that failed, were left out or are the slowest; "
        "run_sources=True (--run-sources) keeps all"
    )


def _tell_samples(out: Any, batch: RunBatch, every: bool) -> None:
    most = len(batch.indices) if every else _SHOWN
    known = {index: source for index, source in batch.sources.items() if source}
    if known:
        rows = [
            (position, index, terminal.took(took), known.get(index, "-"))
            for position, (index, took) in enumerate(
                zip(batch.indices, batch.fetch_ns, strict=True)
            )
        ]
        terminal.table(out, (">position", ">index", ">fetch", "source"), rows[:most])
    else:
        shown = ", ".join(map(str, batch.indices[:most]))
        terminal.lines(out, [f"indices {shown}"])
    if len(batch.indices) > most:
        terminal.lines(out, [f"and {len(batch.indices) - most} more: --all shows them"])


def _tell_none(run: RunFolder, number: int, attempt: int | None) -> None:
    out = terminal.console()
    terminal.answer(out, False, f"step {number}: no batch of it is in {run.path}")
    for loader in run.loaders:
        if attempt not in (None, loader.attempt):
            continue
        who = f"attempt {loader.attempt}, rank {loader.rank}: {terminal.short(loader.name)}"
        terminal.lines(out, [f"{who}: {_span(loader)}"])
    gone = run.dropped()
    if gone:
        terminal.lines(out, [f"{terminal.some(len(gone), 'segment')} went for run_max_bytes="])
    terminal.lines(out, [f"note: {note}" for note in run.notes])


def _span(loader: Any) -> str:
    import pyarrow.compute as pc

    if loader.has_marks:
        steps = loader.marks()["step"]
        ends = pc.min_max(steps).as_py() if len(steps) else {"min": None, "max": None}
        return f"marked steps {ends['min']} to {ends['max']}"
    last = -1
    for table in loader.pieces(["step"], newest=True):
        last = int(table["step"][-1].as_py())
    return f"batches 0 to {last}" if last >= 0 else "no batch"
