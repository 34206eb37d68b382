"""``python -m safeloader replay FAILURE.json PLACE``: the failing sample once more. Runs in: main.

The file holds no random numbers, and no object: so the dataset is made anew, and asked for the
index alone. What it raises is shown from the user's own code on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pdb
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from safeloader.commands import FINE, NO, BadInput, terminal
from safeloader.commands.target import Place, needed
from safeloader.commands.terminal import JsonOption

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
    asked = _index_in(failure, path)
    dataset = _made(place)
    again = _Again(failure, asked, dataset)
    if as_json:
        terminal.print_json(again.to_dict())
    else:
        again.tell()
    if debug and again.error is not None:
        pdb.post_mortem(again.frames)
    return FINE if again.error is None else NO


# ── what failed ──────────────────────────────────────────────────────────────────────────────────


def _read(path: Path) -> dict[str, Any]:
    try:
        failure = json.loads(path.read_text("utf-8"))["failure"]
        failure["phase"], failure["exception_type"]
    except OSError as exc:
        raise BadInput(f"{path} cannot be read: {exc.strerror or exc}") from None
    except (ValueError, KeyError, TypeError):
        raise BadInput(
            f"{path} holds no failure: give a file of the run's failures/, or of on_failure_dump="
        ) from None
    return dict(failure)


def _index_in(failure: dict[str, Any], path: Path) -> Any:
    index = failure.get("index")
    if index is None:
        batch = ", ".join(map(str, failure.get("indices") or [])) or "not known"
        raise BadInput(
            f"the failure in {path} ({failure['phase']}) names no single sample; the indices of "
            f"its batch: {batch}"
        )
    return tuple(index) if isinstance(index, list) else index


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

    def __init__(self, failure: dict[str, Any], asked: Any, dataset: Any) -> None:
        from safeloader.failures.failure import without_ours
        from safeloader.failures.replay import replay_index
        from safeloader.introspect.texts import bounded_text, index_text

        self._failure, self._asked = failure, index_text(asked)
        self.error: Exception | None = None
        self.frames: Any = None
        self._sample = ""
        if failure["phase"] in ("crash", "timeout"):
            did = "killed" if failure["phase"] == "crash" else "hung"
            print(
                f"index {self._asked} {did} its worker: it may do the same to this process",
                file=sys.stderr,
                flush=True,
            )
        with _warnings() as self._said:
            try:
                self._sample = bounded_text(replay_index(asked, dataset))
            except Exception as exc:
                self.error, self.frames = exc, without_ours(exc.__traceback__)

    @property
    def _same(self) -> bool:
        """Whether it is what was raised there."""
        cls = type(self.error)
        names = (cls.__qualname__, f"{cls.__module__}.{cls.__qualname__}")
        return self._failure["exception_type"] in names

    def to_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = {"index": self._asked, "came": self.error is None}
        told |= {"sample": self._sample, "warnings": self._said}
        told["then"] = {
            name: self._failure.get(name) for name in ("phase", "exception_type", "message")
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
        was = f"{failure['exception_type']}: {_line(failure.get('message'))}"
        if self.error is None:
            terminal.answer(out, True, f"index {self._asked} comes here: {self._sample}")
            terminal.lines(out, [f"there ({failure['phase']}): {was}", *self._said])
            terminal.next_step(
                out,
                "what differs: random numbers, what the worker did before, files or services that "
                "are others by now; run it again with the loader's num_workers=0 to see",
            )
            return
        how = "fails again" if self._same else "fails here in another way"
        now = f"{type(self.error).__qualname__}: {_line(self.error)}"
        terminal.answer(out, False, f"index {self._asked} {how}: {now}")
        terminal.lines(out, [] if self._same else [f"there ({failure['phase']}): {was}"])
        terminal.lines(out, [*self._lines(), *self._said])
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
