"""``python -m safeloader show RUN``: what a run tells, in the terminal. Runs in: main."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from safeloader.commands import FINE, terminal
from safeloader.commands.terminal import AttemptOption, JsonOption, RunArgument
from safeloader.report.cost import WAYS, Cost, cost_of
from safeloader.report.exactly_once import RunVerdict, exactly_once
from safeloader.report.figures import LoaderFigures, SlowSample, slowest
from safeloader.report.folder import LoaderRecords
from safeloader.report.outcomes import failures_of
from safeloader.report.run import RunFolder

EXAMPLE = "python -m safeloader show runs/exp1"
_EPOCHS, _INCIDENTS, _FAILURES, _LOADERS = 12, 10, 5, 32  # shown
_OF_WORKERS = ("crash", "timeout")
_MUCH = 0.1  # of the time spent waiting is worth a word


def show(
    run: RunArgument,
    attempt: AttemptOption = None,
    slow: Annotated[
        int, typer.Option("--slowest", metavar="N", min=0, help="How many of the slowest samples.")
    ] = 5,
    as_json: JsonOption = False,
) -> int:
    """Epochs, audits over ranks, skips, failures, waiting, slowest samples and cost of a run."""
    folder = terminal.opened(run, convert=True)
    terminal.check_attempt(folder, attempt)
    seen = _Seen(folder, attempt, slow)
    if as_json:
        terminal.print_json(seen.to_dict())
    else:
        _Told(seen).tell()
    return FINE


class _Seen:
    """What was read."""

    def __init__(self, run: RunFolder, attempt: int | None, slow: int) -> None:
        its = [each for each in run.loaders if attempt in (None, each.attempt)]
        self.run = run
        self.figures = [_figures_of(each) for each in its]
        self.slowest = slowest(its, slow) if slow else []
        self.incidents = _of(run.incidents(), attempt)
        failures = [
            found | {"attempt": each.attempt, "rank": each.rank, "loader": each.name}
            for each in its
            for found in failures_of(each)
        ]
        self.failures = [each for each in failures if not each["survived"]]
        self.survived = [each for each in failures if each["survived"]]
        self.dropped = _of(run.dropped(), attempt)
        self.noticed = list(
            dict.fromkeys(
                str(said)
                for epoch in run.epochs(attempt)
                for name in ("noticed", "notes")
                for said in (epoch.audit or {}).get(name, ())
            )
        )
        self.cost: Cost = cost_of(run, attempt)
        self.verdict: RunVerdict = exactly_once(run, attempt)

    @property
    def cured_in(self) -> int:
        """The newest attempt, where all that is wrong is of those before; else 0."""
        newest = max(self.run.attempts, default=0)
        bad = [max(each.attempts) for each in self.verdict.epochs if each.ok is False]
        bad += [each["attempt"] for each in self.failures]
        return newest if bad and max(bad) < newest else 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": {"path": str(self.run.path)} | self.run.info,
            "attempts": self.run.attempts,
            "ranks": self.run.ranks,
            "loaders": [each.to_dict() for each in self.figures],
            "audit": self.verdict.to_dict(),
            "incidents": self.incidents,
            "failures": self.failures,
            "survived": self.survived,
            "slowest": [each.to_dict() for each in self.slowest],
            "noticed": self.noticed,
            "dropped": self.dropped,
            "cost": self.cost.to_dict(),
        }


def _figures_of(loader: LoaderRecords) -> LoaderFigures:
    """Of its epochs alone: between two of them the loop asks it for nothing, but maybe another."""
    epochs = loader.totals().values()
    return LoaderFigures(
        *(loader.attempt, loader.rank, loader.name, loader.state),
        batches=sum(each.batches for each in epochs),
        samples=sum(each.samples for each in epochs),
        span_s=sum(each.ended_ns - each.began_ns for each in epochs) / 1e9,
        wait_s=sum(each.wait_ns for each in epochs) / 1e9,
        epoch=max((each.epoch for each in epochs), default=None),
    )


def _of(found: list[dict[str, Any]], attempt: int | None) -> list[dict[str, Any]]:
    return [each for each in found if attempt in (None, each["attempt"])]


class _Told:
    """The same, in words: is the data right, is it the bottleneck, which samples."""

    def __init__(self, seen: _Seen) -> None:
        self._seen = seen
        self._out = terminal.console()

    def tell(self) -> None:
        seen, out = self._seen, self._out
        terminal.answer(out, seen.verdict.ok if not seen.failures else False, self._headline())
        self._head()
        self._right()
        self._bottleneck()
        self._samples()
        self._cost()
        terminal.lines(out, [f"note: {note}" for note in dict.fromkeys(seen.run.notes)], "")
        terminal.next_step(out, self._next())

    def _headline(self) -> str:
        seen = self._seen
        left_out = Counter(each.get("what") for each in seen.incidents)
        said = [seen.verdict.answer]
        said += [f"{count:,} {what}" for what, count in left_out.items()]
        said += [terminal.some(len(seen.failures), "failure")] if seen.failures else []
        restarts = sum(each["failure"].get("phase") in _OF_WORKERS for each in seen.survived)
        said += [f"{terminal.some(restarts, 'failure')} of workers survived"] if restarts else []
        share = _wait_share(seen.figures)
        said += [f"{terminal.share(share)} of the time waiting for data"] if share else []
        return "; ".join(said)

    def _head(self) -> None:
        run = self._seen.run
        states = Counter(each.state for each in self._seen.figures)
        told = ", ".join(f"{count} {state}" for state, count in states.items())
        command = " ".join(map(str, run.info.get("command", ())))
        terminal.lines(
            self._out,
            [
                f"{run.path}: run {run.id}, begun {run.info.get('started', '')}",
                f"{terminal.some(len(run.attempts), 'attempt')}, "
                f"{terminal.some(len(run.ranks), 'rank')}; loaders: {told or 'none'}",
                *([f"command: {command[:200]}"] if command else []),
            ],
        )

    def _right(self) -> None:
        seen, out = self._seen, self._out
        self._title("Is the data right?")
        epochs = seen.verdict.epochs
        wrong = [each for each in epochs if each.ok is not True]
        newest = [each for each in epochs if each.ok is True][-_EPOCHS:]
        left = len(epochs) - len(wrong) - len(newest)
        if left:
            terminal.lines(out, [f"{terminal.some(left, 'earlier epoch')}: exactly once"])
        names = {each.loader for each in epochs}
        for each in epochs:
            if each in wrong or each in newest:
                which = f"{terminal.short(each.loader)}, " if len(names) > 1 else ""
                terminal.lines(out, [f"{which}{each.answer}"])
            if each in wrong[:_EPOCHS]:
                terminal.lines(out, each.evidence, "      ")
        self._left_out()
        for failure in seen.failures[-_FAILURES:]:
            its = failure["failure"]
            terminal.lines(
                out,
                [
                    f"failed: {its.get('exception_type')}: {_line(its.get('message'))} "
                    f"({_which(its)}, attempt {failure['attempt']}, rank {failure['rank']}, epoch "
                    f"{its.get('epoch')}, batch {its.get('batch')})",
                    f"  {failure['path']}",
                ],
            )
            if failure is seen.failures[-1]:
                terminal.lines(out, _hints(its), "    ")
        terminal.lines(out, [f"noticed: {_line(said, 400)}" for said in seen.noticed])

    def _left_out(self) -> None:
        incidents = self._seen.incidents
        if not incidents:
            return
        shown = incidents[:_INCIDENTS]
        sources = self._seen.run.sources_by_loader({each.get("index") for each in shown})
        rows = []
        for each in shown:
            source = sources[each["loader"]].get(each.get("index"), "-")
            place = (each["attempt"], each["rank"], each.get("epoch"), each.get("batch"))
            why = terminal.without_source(_line(each.get("reason"), 400), source)
            rows.append((each.get("what"), each.get("index"), *place, source, _line(why)))
        heads = ("what", ">index", ">attempt", ">rank", ">epoch", ">batch", "source", "why")
        terminal.table(self._out, heads, rows)
        if len(incidents) > len(rows):
            more = len(incidents) - len(rows)
            terminal.lines(self._out, [f"and {more:,} more: --json has them"])

    def _bottleneck(self) -> None:
        self._title("Is data the bottleneck?")
        figures = [each for each in self._seen.figures if each.batches]
        if not figures:
            terminal.lines(self._out, ["no batch was written"])
            return
        rows = [
            (
                *(each.attempt, each.rank, terminal.short(each.loader), each.state),
                *(f"{each.batches:,}", f"{each.samples:,}", terminal.rate(each.samples_per_s)),
                *(terminal.share(each.wait_share),),
            )
            for each in figures[:_LOADERS]
        ]
        heads = (">attempt", ">rank", "loader", "state", ">batches", ">samples", ">samples/s")
        terminal.table(self._out, (*heads, ">waiting"), rows)
        if len(figures) > len(rows):
            terminal.lines(self._out, [f"and {len(figures) - len(rows)} more: --json has them"])

    def _samples(self) -> None:
        slow: list[SlowSample] = self._seen.slowest
        if not slow:
            return
        self._title("Slowest samples, by the median of their fetches")
        rows = [
            (each.index, terminal.took(each.median_ns), each.fetches, each.source or "-")
            for each in slow
        ]
        terminal.table(self._out, (">index", ">median", ">fetches", "source"), rows)

    def _cost(self) -> None:
        cost = self._seen.cost
        if not (cost.batches or cost.workers or cost.main_rss >= 0):
            return
        self._title("What does it cost?")
        known = (
            ("a worker's own memory (USS)", cost.worker_uss),
            ("a worker's share (PSS)", cost.worker_pss),
            ("the main process (RSS)", cost.main_rss),
        )
        told = [f"{name} {terminal.size(value)}" for name, value in known if value >= 0]
        lines = [f"at most: {', '.join(told)}"] if told else []
        lines += [f"{n:,} batches came {WAYS.get(way, way)}" for way, n in cost.batches.items()]
        if cost.batches:
            size = terminal.size(cost.slot_bytes)
            lines.append(f"slots of one loader, at most: {cost.slots}, {size} in all")
        if cost.shm_used >= 0:
            size, whole = terminal.size(cost.shm_used), terminal.size(cost.shm_bytes)
            lines.append(f"in use of /dev/shm by all processes, at most: {size} of {whole}")
        lines += [
            f"not in a slot, {terminal.some(n, 'batch')}: {_line(why, 300)}"
            for why, n in cost.fallbacks.items()
        ]
        terminal.lines(self._out, lines)

    def _title(self, said: str) -> None:
        self._out.print()
        terminal.lines(self._out, [said], "")

    def _next(self) -> str:
        seen, path = self._seen, self._seen.run.path
        if cured := seen.cured_in:
            return (
                f"python -m safeloader show {path} --attempt {cured} looks at the newest attempt "
                "alone: nothing of this is in it"
            )
        if seen.failures:
            newest = seen.failures[-1]
            its = newest["failure"]
            if _can_be_asked_for(its):
                return terminal.replaying(seen.run, newest["path"])
            return (_hints(its) or [f"the whole error is in {newest['path']}"])[-1]
        if seen.verdict.next_step:
            return seen.verdict.next_step
        if seen.survived:
            return terminal.replaying(seen.run, seen.survived[-1]["path"])
        share = _wait_share(seen.figures)
        if share is not None and share > _MUCH:
            return "python -m safeloader doctor train.py:make_loader tries other numbers of workers"
        if any(each.state == "running" for each in seen.figures):
            return f"python -m safeloader watch {path}"
        return ""


def _wait_share(figures: list[LoaderFigures]) -> float | None:
    """Of all loaders together."""
    span = sum(each.span_s for each in figures)
    return min(1.0, sum(each.wait_s for each in figures) / span) if span else None


def _which(failure: dict[str, Any]) -> str:
    index = failure.get("index")
    if index is not None:
        return f"index {index}"
    return f"{terminal.some(len(failure.get('indices') or ()), 'sample')} of a batch"


def _can_be_asked_for(failure: dict[str, Any]) -> bool:
    """Whether it is of one sample, and not of a stream, which has no length."""
    length = (failure.get("dataset_state") or {}).get("length")
    return failure.get("index") is not None and length is not None


def _hints(failure: dict[str, Any]) -> list[str]:
    """What is known of a failure, without what is for the process that it was in."""
    lines = str(failure.get("hint") or "").splitlines()
    return [_line(each, 600) for each in lines if not each.startswith("safeloader.replay(")]


def _line(text: Any, most: int = 160) -> str:
    """A text on one line."""
    words = " ".join(str(text).split())
    return words if len(words) <= most else words[: most - 3] + "..."
