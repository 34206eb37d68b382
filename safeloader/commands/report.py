"""``python -m safeloader report``: one HTML page of a run. Runs in: main."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from safeloader.commands import BAD_INPUT, FINE, fault_of_ours
from safeloader.introspect.private_files import see_replaceable, written_whole
from safeloader.report.run import NotARunFolder, RunFolder

_EXAMPLES = """\
RUN is the folder that run_dir=, SAFELOADER_RUN or --run was given; the run may still go on:

  python -m safeloader report runs/exp1
  python -m safeloader report runs/exp1 -o exp1.html

The page needs no network. The exit status is 0, or 2 where there is no run in RUN, the page cannot
be written, or a library is missing.
"""


def main(words: list[str]) -> int:
    """Write the page of the run that the words of the command line name; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m safeloader report",
        description="Write one HTML page of a run: is the data right, is it the bottleneck, which "
        "samples, what does it cost.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "-o",
        "--output",
        default="report.html",
        metavar="FILE",
        help="where the page goes (default: report.html)",
    )
    try:
        told = parser.parse_args(words)
    except SystemExit as exc:
        return int(exc.code or 0)
    try:
        nbytes = write_page(told.run, Path(told.output))
    except (NotARunFolder, ImportError, OSError) as exc:
        return _refused(str(exc))
    except Exception as exc:  # noqa: BLE001  a traceback tells nothing that a user can mend
        return _refused(fault_of_ours(exc))
    with contextlib.suppress(OSError):  # nobody listens: the page is written
        print(f"wrote {told.output} ({nbytes / 1e6:.1f} MB)")
        more = f"python -m safeloader show {told.run} tells most of it here"
        print(f"next: open it in a browser; {more}", flush=True)
    return FINE


def _refused(said: str) -> int:
    print(f"python -m safeloader report: {' '.join(said.split())}", file=sys.stderr)
    return BAD_INPUT


def write_page(run: str | os.PathLike[str], output: Path) -> int:
    """Write the page of a run, whole or not at all; how many bytes it has.

    Raises:
        NotARunFolder: if there is no run in the folder.
        ImportError: if a library is missing.
        OSError: if the page cannot be written.
    """
    from safeloader.report.page import page_of, why_no_page

    missing = why_no_page()
    if missing:
        raise ImportError(missing)
    see_replaceable(output)
    whole = page_of(RunFolder(run)).encode("utf-8", "replace")
    with written_whole(output) as file:
        file.write(whole)
    return len(whole)
