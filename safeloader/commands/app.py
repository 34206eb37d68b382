"""The commands that want Typer and Rich, put together. Runs in: main."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from safeloader.commands import (
    BAD_INPUT,
    FINE,
    BadInput,
    audit,
    fault_of_ours,
    index,
    replay,
    show,
    step,
    terminal,
    trace,
    watch,
)

_INTERRUPTED = 130
_STATUS = (
    "Exit status: 0 it is so, or was done; 1 the answer is no, or cannot be told; 2 bad input. "
    "RUN may go on, or have been killed."
)
_COMMANDS: dict[Callable[..., int], str] = {
    show.show: show.EXAMPLE,
    watch.watch: watch.EXAMPLE,
    step.step: step.EXAMPLE,
    index.index: index.EXAMPLE,
    audit.audit: audit.EXAMPLE,
    replay.replay: replay.EXAMPLE,
    trace.trace: trace.EXAMPLE,
}
_PASSED_ON = {
    "run": "A training program, with every DataLoader of it recorded.",
    "doctor": "A loader, examined before training.",
    "report": "One HTML page of a run, which needs no network.",
}


def _app(is_script: bool) -> typer.Typer:
    app = typer.Typer(
        help="Look at a run, at a loader, at a failure.",
        epilog=_STATUS,
        add_completion=is_script,  # a shell completes the name of a program, not `python -m`
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",  # whose lines are filled
    )
    for name, said in _PASSED_ON.items():
        app.command(name, help=said, add_help_option=False, context_settings=_ANYTHING)(_no_words)
    for command, example in _COMMANDS.items():
        how: dict[str, Any] = {"ignore_unknown_options": True} if command is index.index else {}
        app.command(command.__name__, epilog=f"Example: {example}", context_settings=how)(command)
    return app


_ANYTHING = {"allow_extra_args": True, "ignore_unknown_options": True}


def _no_words() -> None:
    """Their words are parsed by themselves, before any of this is imported."""


def main(words: list[str], name: str) -> int:
    """Do what the words say; the exit status.

    Args:
        words: of the command line.
        name: what was called: ``python -m safeloader``, or the script ``safeloader``.
    """
    whole = " ".join([name, *words[:1]])
    if sys.stdout is None:  # closed before it began
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  as long as the program
    try:
        told = _app(" " not in name)(words, prog_name=name, standalone_mode=False)
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            terminal.no_more_output()
        return told if isinstance(told, int) else FINE
    except BadInput as exc:
        return _refused(f"{whole}: {exc}")
    except BrokenPipeError:  # `| head` has seen enough, of what was flushed last
        terminal.no_more_output()
        return FINE
    except OSError as exc:
        return _refused(f"{whole}: {exc}")
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as exc:  # noqa: BLE001  Typer's, and what a user cannot mend
        if type(exc).__name__ == "Abort":
            return _INTERRUPTED
        if not hasattr(exc, "format_message"):  # none of Typer's
            return _refused(f"{whole}: {fault_of_ours(exc)}")
        said = " ".join(str(exc.format_message()).split()).rstrip(".")
        return _refused(f"{whole}: {said}. See {whole} --help")


def _refused(said: str) -> int:
    print(terminal.printable(said), file=sys.stderr)
    return BAD_INPUT
