"""``python -m safeloader COMMAND``. Runs in: main."""

from __future__ import annotations

import difflib
import os
import sys

_USAGE = """\
usage: python -m safeloader run [--run DIR] [options] CMD...
       python -m safeloader COMMAND [options] ...

run     a training program, with every DataLoader of it recorded; `run --help` says more
doctor  examines a loader before training: `doctor train.py:make_loader`; `doctor --help` says more

of the folder of a run, while it goes on or after a kill:

show    RUN               epochs, audits over ranks, skips, failures, waiting, slowest samples
watch   RUN               the same live, a line a rank
step    RUN N             which samples were in a step, on all ranks
index   RUN I             where and when an index was delivered, skipped, failed
audit   RUN               exactly once over all ranks and resumes? exit status 1 if not
report  RUN -o FILE       one HTML page of it, which needs no network
trace   RUN -o FILE       a Chrome trace for Perfetto
replay  FAILURE.json train.py:make_dataset     the failing sample once more
"""
_COMMANDS = (
    "run",
    "doctor",
    "show",
    "watch",
    "step",
    "index",
    "audit",
    "report",
    "trace",
    "replay",
)
_COMPLETES = "_SAFELOADER_COMPLETE"
_INSTALL = "pip install 'safeloader[cli]'"


def main(words: list[str], name: str = "python -m safeloader") -> int:
    """Do what the words of the command line say; the exit status."""
    if words[:1] == ["run"]:
        from safeloader.commands import run

        return run.main(words[1:])
    if words[:1] == ["doctor"]:
        from safeloader.commands import doctor

        return doctor.main(words[1:])
    if words[:1] == ["report"]:
        from safeloader.commands import report

        return report.main(words[1:])
    if words[:1] in (["-h"], ["--help"]):
        print(_USAGE, end="")
        return 0
    is_option = bool(words) and words[0].startswith("--") and "completion" in words[0]
    known = is_option or words[:1] in [[each] for each in _COMMANDS]
    if not known and not os.environ.get(_COMPLETES):
        return _unknown(words, name)
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as exc:
        print(f"{' '.join([name, *words[:1]])} needs {exc.name}: {_INSTALL}", file=sys.stderr)
        return 2
    from safeloader.commands import app

    return app.main(words, name)


def _unknown(words: list[str], name: str) -> int:
    if words:
        meant = difflib.get_close_matches(words[0], _COMMANDS, 1)
        hint = f" (did you mean {meant[0]}?)" if meant else ""
        print(f"{name}: there is no command {words[0]!r}{hint}", file=sys.stderr)
    print(_USAGE, end="", file=sys.stderr)
    return 2


def script() -> int:
    """The same as the program ``safeloader``, whose words a shell can complete."""
    return main(sys.argv[1:], "safeloader")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
