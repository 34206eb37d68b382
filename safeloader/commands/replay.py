"""``python -m safeloader replay FAILURE.json PLACE``: the failing sample once more. Runs in: main.

The file holds what the sample's random numbers were made from, and no object: so the dataset is
made anew, and asked for the sample under these numbers. What it raises is shown from the user's own
code on.
"""

from __future__ import annotations

import contextlib
import logging
import pdb
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safeloader.commands import FINE, NO, BadInput, terminal
from safeloader.commands.target import Place, needed
from safeloader.commands.terminal import JsonOption

if TYPE_CHECKING:
    from safeloader.failures.failure import Failure

EXAMPLE = "python -m safeloader replay runs/exp1/.../failure-1.json train.py:make_dataset"


def replay(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FAILURE.json",
            show_default=False,
            help="A failure: of the run's failures/, or of on_failure_dump=.",
        ),
    ],
    place: Annotated[
        str,
        typer.Argument(
            metavar="PLACE",
            show_default=False,
            help="What gives the dataset: train.py:make_dataset or package.module:make_dataset.",
        ),
    ],
    debug: Annotated[
        bool, typer.Option("--pdb", help="Where it fails again, open the debugger there.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Fetch the failing sample once more, in this process.

    Exit status 0 if the sample comes, 1 if it fails again.
    """
    failure = _read(path)
    dataset = _made(place)
    again = _Again(failure, dataset)
    if as_json:
        terminal.print_json(again.to_dict())
    else:
        again.tell()
    if debug and again.error is not None:
        pdb.post_mortem(again.frames)
    return FINE if again.error is None else NO


# ── what failed ──────────────────────────────────────────────────────────────────────────────────


def _read(path: Path) -> Failure:
    """The failure of a sample.

    Raises:
        BadInput: if there is none in the file.
    """
    from safeloader.failures import dump

    try:
        failure = dump.read(path)
    except OSError as exc:
        raise BadInput(f"{path} cannot be read: {exc.strerror or exc}") from None
    except ValueError as exc:
        raise BadInput(str(exc)) from None
    if failure.index is None or failure.position is None:
        batch = ", ".join(map(str, failure.indices)) or "not known"
        raise BadInput(
            f"the failure in {path} ({failure.phase}) names no single sample; the indices of "
            f"its batch: {batch}"
        )
    return failure


# ── the dataset ──────────────────────────────────────────────────────────────────────────────────


def _made(text: str) -> Any:
    """The dataset that a place in a program gives.

    Raises:
        BadInput: if it gives none.
    """
    from torch.utils.data import IterableDataset

    try:
        place = Place(text, "the dataset", "make_dataset")
    except ValueError as exc:
        raise BadInput(str(exc)) from None
    try:
        found: Any = place.imported()
    except (Exception, SystemExit) as exc:
        raise BadInput(f"{place.where} cannot be imported: {_named(exc)}") from None
    for part in place.name.split("."):
        if not hasattr(found, part):
            raise BadInput(f"{place.where} has no {place.name!r}")
        found = getattr(found, part)
    if callable(found) and (isinstance(found, type) or not hasattr(found, "__getitem__")):
        if missing := needed(found):
            raise BadInput(f"{text} needs arguments ({', '.join(missing)}), and gets none")
        try:
            found = found()
        except (Exception, SystemExit) as exc:
            raise BadInput(f"{text} gives no dataset: {_named(exc)}") from None
    found = getattr(found, "dataset", found) if hasattr(found, "batch_sampler") else found
    if isinstance(found, IterableDataset) or not hasattr(found, "__getitem__"):
        kind = type(found).__qualname__
        raise BadInput(
            f"{text} gives a value of type {kind}, which has no index that could be asked for"
        )
    return found


def _named(exc: BaseException) -> str:
    return " ".join(f"{type(exc).__name__}: {exc}".split())[:300]


# ── once more ────────────────────────────────────────────────────────────────────────────────────


class _Again:
    """The sample fetched, or what was raised.

    Attributes:
        error: what the dataset raised; None where the sample came.
        frames: its traceback, from the user's code on.
    """

    def __init__(self, failure: Failure, dataset: Any) -> None:
        from safeloader.failures import random_numbers
        from safeloader.failures.failure import without_ours
        from safeloader.failures.replay import replay
        from safeloader.introspect.texts import bounded_text, index_text

        self._failure, self._asked = failure, index_text(failure.index)
        self._made_from = random_numbers.of_sample(failure)
        self._own = random_numbers.of_its_own(dataset)
        self._why_not = "" if self._made_from else random_numbers.why_not_known(failure)
        self.error: Exception | None = None
        self.frames: Any = None
        self._sample = ""
        if failure.phase in ("crash", "timeout"):
            did = "killed" if failure.phase == "crash" else "hung"
            print(
                f"index {self._asked} {did} its worker: it may do the same to this process",
                file=sys.stderr,
                flush=True,
            )
        with _warnings() as self._said:
            try:
                self._sample = bounded_text(replay(failure, dataset))
            except Exception as exc:
                self.error, self.frames = exc, without_ours(exc.__traceback__)

    @property
    def _same(self) -> bool:
        """Whether it is what was raised there."""
        cls = type(self.error)
        names = (cls.__qualname__, f"{cls.__module__}.{cls.__qualname__}")
        return self._failure.exception_type in names

    @property
    def _numbers(self) -> str:
        """Whether its random numbers are those that it had, and what would make them so."""
        if self._why_not:
            return f"random numbers: others than it had there: {self._why_not}"
        said = f"random numbers: those it had there ({self._made_from})"
        if not self._own:
            return said
        return (
            f"{said}, but for those of {', '.join(self._own)}, which nobody keeps: of a loader "
            "with seed= those of safeloader.sample_rng() are made again"
        )

    def to_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = {"index": self._asked, "came": self.error is None}
        told |= {"sample": self._sample, "warnings": self._said}
        told["random_numbers"] = {
            "same": not self._why_not and not self._own,
            "made_from": self._made_from or None,
            "own_generators": self._own,
            "said": self._numbers,
        }
        told["then"] = {
            name: getattr(self._failure, name) for name in ("phase", "exception_type", "message")
        }
        told["now"] = None
        if self.error is not None:
            told["now"] = {
                "exception_type": type(self.error).__qualname__,
                "message": str(self.error),
                "same_type": self._same,
                "traceback": self._lines(),
            }
        return told

    def _lines(self) -> list[str]:
        if self.error is None:
            return []
        said = traceback.format_exception(type(self.error), self.error, self.frames)
        return "".join(said).rstrip().splitlines()

    def tell(self) -> None:
        out, failure = terminal.console(), self._failure
        then = f"there ({failure.phase}): {failure.exception_type}: {_line(failure.message)}"
        if self.error is None:
            terminal.answer(out, True, f"index {self._asked} comes here: {self._sample}")
            terminal.lines(out, [then, self._numbers, *self._said])
            terminal.next_step(
                out, "iterate the loader with num_workers=0: what fails there can be debugged"
            )
            return
        how = "fails again" if self._same else "fails here in another way"
        now = f"{type(self.error).__qualname__}: {_line(self.error)}"
        terminal.answer(out, False, f"index {self._asked} {how}: {now}")
        terminal.lines(out, [] if self._same else [then])
        terminal.lines(out, [self._numbers, *self._lines(), *self._said])
        terminal.next_step(out, "the same command with --pdb opens the debugger where it fails")


def _line(text: Any, most: int = 300) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= most else words[: most - 3] + "..."


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the loader's log says meanwhile, instead of on stderr."""
    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log, handler = logging.getLogger("safeloader"), Kept()
    before = log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield said
    finally:
        log.removeHandler(handler)
        log.propagate = before
