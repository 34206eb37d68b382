"""Runs the programs of the gallery, each in a process of its own, and writes the page."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
import selectors
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import numpy
import torch  # so that each program's process has it from here

from tests.gallery.programs import PROGRAMS, Program

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "gallery.rst"
BOUND_S = 180.0  # of one program
_HEAD = """\
What it says
============

Every kind of text that a user can get, under the program that brings it about. ``python -m
tests.gallery`` runs these programs (``tests/gallery/programs.py``) and writes this page. Numbers of
processes and lines, times, sizes and addresses are put in one form (``4711``, ``N``), so that the
page changes only where a text does.
"""
_END = b"\0end\0"  # torch's handler of a crash writes a zero byte of its own
_UNITS = r"ns|us|µs|ms|s|seconds|minutes|B|bytes|KiB|MiB|GiB|TiB|KB|MB|GB|batches/s|samples/s"
_SAME = [  # what is another each time, and what stands for it
    (re.compile(pattern), by)
    for pattern, by in (
        (r"tests\.gallery\.programs\.", ""),
        (r"(?:\S*/)?tests/gallery/programs\.py|programs\.py(?=:)", "train.py"),
        (r"__main__\.py(?=:)", "train.py"),
        (r"(train\.py):\d+", r"\1:N"),
        (r"\bline \d+", "line N"),
        (r"(\.py):\d+", r"\1:N"),
        (r"(pid(?:\(s\))?|process id) \d+", r"\1 4711"),
        (r"'pid': \d+", "'pid': 4711"),
        (r"-\d+(?=\.jsonl?\b)", "-N"),
        (r"\b0x[0-9a-f]+", "0x…"),
        (r"safeloader-run-\w+", "safeloader-run-N"),
        (rf"\b\d[\d,.]*\d*(?:e[+-]?\d+)?(?= ?(?:{_UNITS})\b)", "N"),
        (r"\b\d+\.\d+(?= times)", "N"),
        (r"\b\d[\d.]* of N (?=[GM]iB)", "N of N "),
        (r"\d+ of \d+ \(hard limit (\d+|unlimited)\)", "N of N (hard limit N)"),
        (r"(?<=\babout )[\d,]+(?= batches that were handed over)", "N"),
        (r"(?<=still held, with )N KiB", "N MiB"),
        (r"(?<=after batch )\d+|(?<=their first )\d+(?= samples are)", "N"),
        (r"(?<=from 0 to )\d+(?= entries)|(?<=workers by )\d+(?= entries)", "N"),
        (r"(?<=agree in )\d+(?= attributes)", "N"),
        (r"(?<=moved from )\d+ to \d+", "N to N"),
        (r"(?<=, at )(worst|most) (\S+ \w+) \(index \d+\)", r"\1 \2 (index N)"),
        (r"loaders of process \d+", "loaders of process 4711"),
        (r"failure-\d\S+(?=-N\.json)", "failure-WHEN-HOST-4711"),
        (r"^( +\d+ +[\d-]+ +(?:fork|spawn|forkserver|-) +)[\d.,e+]+( +)\d+", r"\1N\2N"),
        (r"(?<=\S) +N +N +N s", "  N  N  N s"),
        (r"\bN (?:ms|s)(?= each \(median| \(index N|; N \w+ each)", "N us"),
        (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d", "WHEN"),
        (r"(/rank=\d+/)[\w.-]+-\d+-\w+-\d+\b", r"\1HOST-4711-BOOT-N"),
        (r"(?<=SAFELOADER_RUN_ID=)\w+", "ID"),
        (r"\d+%(?= of the time)", "N%"),
        (
            r"(?<=slowest)[\w ()]*: index \d+ \(N ms\)(?:, index \d+ \(N ms\))*",
            ": index N (N ms), ...",
        ),
        (r"(?<=waited )N (?:us|s)|(?<=   )N (?:us|ms|s)(?=   )", "N ms"),
        (r"[ \t]+$", ""),
    )
]


def normal(text: str, folder: str) -> str:
    """``text`` without what is another each time."""
    text = text.replace(folder, "/data")
    for name in ("purelib", "platlib", "stdlib"):
        text = text.replace(sysconfig.get_path(name), "lib")  # a .venv may lie in the root
    text = text.replace(f"{ROOT}/", "")
    lines = []
    for line in text.splitlines():
        for pattern, by in _SAME:
            line = pattern.sub(by, line)
        lines.append(line)
    return "\n".join(lines).strip("\n")


def said_by(program: Program) -> str:
    """What a program says: its output, warnings, log and the error that ends it."""
    folder = os.path.realpath(tempfile.mkdtemp(prefix="gallery-"))
    end, beginning = os.pipe()
    pid = os.fork()
    if not pid:
        _run(program, folder, beginning)
    os.close(beginning)
    try:
        return normal(b"".join(_read(end)).decode("utf-8", "replace"), folder)
    finally:
        os.close(end)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # its workers, should it have left some
        os.waitpid(pid, 0)
        shutil.rmtree(folder, ignore_errors=True)


def _read(end: int) -> Iterator[bytes]:
    """Until the program, not its last worker, has ended."""
    give_up = time.monotonic() + BOUND_S
    with selectors.DefaultSelector() as ready:
        ready.register(end, selectors.EVENT_READ)
        while ready.select(max(0.0, give_up - time.monotonic())):
            part = os.read(end, 65536)
            yield part.removesuffix(_END).replace(b"\0", b"")
            if not part or part.endswith(_END):
                return
    yield b"\n[it did not come to an end]\n"


def _run(program: Program, folder: str, out: int) -> NoReturn:
    os.setsid()
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(ROOT)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logging.getLogger("safeloader").addHandler(handler)
    logging.getLogger("safeloader").setLevel(logging.INFO)
    warnings.showwarning = _warned
    warnings.simplefilter("always")
    warnings.simplefilter("ignore", ResourceWarning)
    numpy.random.seed(1)
    torch.manual_seed(1)
    try:
        program.run()
    except Exception as exc:
        _raised(exc)
    finally:
        sys.stdout.flush()
        os.write(1, _END)
        os._exit(0)


def _warned(message: Warning | str, category: type[Warning], *_: object) -> None:
    print(f"{category.__name__}: {message}")


def _raised(exc: BaseException) -> None:
    if type(exc).__module__.startswith("tests.gallery"):
        traceback.print_exception(exc)
    else:
        print(f"{type(exc).__name__}: {exc}")


def page_of(texts: dict[str, str]) -> str:
    """The page, from what each program said, by its name."""
    parts, section = [_HEAD], ""
    for program in PROGRAMS:
        if program.section != section:
            section = program.section
            parts.append(f"{section}\n{'-' * len(section)}\n")
        parts.append(f"{program.title}\n{'~' * len(program.title)}\n")
        lines = [f"   {line}".rstrip() for line in texts[program.name].splitlines()]
        parts.append("\n".join(["::", "", *lines]) + "\n" if lines else "Nothing is said.\n")
    return "\n".join(parts)


def entries(page: str) -> list[tuple[str, str]]:
    """Sections and titles, as they stand in a page."""
    found, section = [], ""
    lines = page.splitlines()
    for line, under in pairwise(lines):
        if line and not line.startswith(" ") and under == "-" * len(line):
            section = line
        elif line and not line.startswith(" ") and under == "~" * len(line):
            found.append((section, line))
    return found


def main(words: list[str]) -> int:
    """Write the page, compare with it, or print what some programs say."""
    check = "--check" in words
    words = [word for word in words if word != "--check"]
    if words:
        for program in PROGRAMS:
            about = f"{program.section} {program.name} {program.title}"
            if any(word in about for word in words):
                print(f"── {program.title} ({program.name})\n{said_by(program)}\n", flush=True)
        return 0
    page = page_of({program.name: said_by(program) for program in PROGRAMS})
    if not check:
        PAGE.write_text(page)
        return 0
    was = PAGE.read_text() if PAGE.exists() else ""
    sys.stdout.writelines(difflib.unified_diff(*(t.splitlines(True) for t in (was, page))))
    return int(was != page)
