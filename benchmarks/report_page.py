"""Size and times of the report page of a long run: `python -m benchmarks.report_page`.

A run of ten million samples is made as `benchmarks.run_folder` makes them, its page written, and
opened in Chromium where that and selenium are there: told is when it could be read (the document
was there) and when its last picture was drawn.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import RESULTS, keep, markdown
from benchmarks.run_folder import fed, folder_in, manifests
from safeloader.commands.report import write_page
from safeloader.delivery.audit import EpochAudit
from safeloader.provenance import run_format

RANKS, EPOCHS, OF_RANK, QUICK_OF_RANK = 2, 2, 2_500_000, 64_000
BAR_MB, BAR_BUILT_S, BAR_READ_S = 10.0, 60.0, 2.0


def made_run(run: Path, samples: int) -> None:
    """A run of two ranks, so many samples an epoch on each."""
    for rank in range(RANKS):
        folder = folder_in(run, rank)
        for epoch in range(EPOCHS):
            if epoch:
                folder.begun(epoch, lambda: EpochAudit(0))
            fed(folder, manifests(samples, 64, rank * EPOCHS + epoch), epoch)
            folder.audited(EpochAudit(epoch, complete=True, drawn=samples, delivered=samples))
        for number in folder.close():
            run_format.to_parquet(folder.path, number)


def opened_s(page: Path) -> tuple[float, float] | None:
    """Seconds until it can be read, and until all is drawn; None where there is no browser."""
    if importlib.util.find_spec("selenium") is None:
        return None
    from tests.browser import CHROMIUM, DRIVER, browser

    if not CHROMIUM or not DRIVER:
        return None
    with browser() as window:
        window.shows(1600, dark=False)
        window.open(page)
        drawn = window.script("return performance.now()")
        read = window.script("return performance.getEntriesByType('navigation')[0].domInteractive")
        return read / 1e3, drawn / 1e3


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; with `--check`, the status is 1 if one is above its bar."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report_page", description="What the page of a long run takes."
    )
    parser.add_argument("--quick", action="store_true", help="few samples, no files")
    where = f"folder for results (default: {RESULTS.name}/ beside this file)"
    parser.add_argument("--out", type=Path, help=where)
    parser.add_argument("--check", action="store_true", help="exit 1 if one is above its bar")
    options = parser.parse_args(arguments)
    samples = QUICK_OF_RANK if options.quick else OF_RANK
    with tempfile.TemporaryDirectory() as temporary:
        run, page = Path(temporary) / "run", Path(temporary) / "page.html"
        made_run(run, samples)
        began, cpu = time.perf_counter(), time.process_time()
        megabytes = write_page(run, page) / 1e6
        built, cpu = time.perf_counter() - began, time.process_time() - cpu
        times = opened_s(page)
    told = ("no Chromium", "") if times is None else tuple(f"{each:.2f}" for each in times)
    heads = (
        "samples",
        f"MB (bar {BAR_MB:g})",
        f"built, s (bar {BAR_BUILT_S:g})",
        "of CPU",
        f"to be read, s (bar {BAR_READ_S:g})",
        "all drawn",
    )
    count = f"{RANKS * EPOCHS * samples:,}"
    text = markdown(heads, [(count, f"{megabytes:.1f}", f"{built:.1f}", f"{cpu:.1f}", *told)])
    print(text)
    keep(
        "report-page",
        options,
        {
            "samples": RANKS * EPOCHS * samples,
            "megabytes": megabytes,
            "built_s": built,
            "built_cpu_s": cpu,
            "read_and_drawn_s": times,
        },
        text,
    )
    above = megabytes > BAR_MB or built > BAR_BUILT_S
    above |= times is not None and times[0] > BAR_READ_S
    return int(options.check and above)


if __name__ == "__main__":
    sys.exit(main())
