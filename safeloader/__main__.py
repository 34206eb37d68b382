"""``python -m safeloader COMMAND``. Runs in: main."""

from __future__ import annotations

import sys

_USAGE = """\
usage: python -m safeloader run [--run DIR] [options] CMD...
       python -m safeloader doctor [--seconds S] [--json] TARGET
       python -m safeloader report [-o FILE] RUN

run     a training program, with every DataLoader of it recorded; `run --help` says more
doctor  examines a loader before training: `doctor train.py:make_loader`; `doctor --help` says more
report  one HTML page of the run in a folder: `report runs/exp1`; `report --help` says more
"""


def main(words: list[str]) -> int:
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
    asked = words[:1] in (["-h"], ["--help"])
    if words and not asked:
        print(f"python -m safeloader: there is no command {words[0]!r}", file=sys.stderr)
    print(_USAGE, end="", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
