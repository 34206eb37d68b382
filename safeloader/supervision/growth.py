"""What the memory and the start of workers say that a person should know. Runs in: main.

Pure, as :mod:`~safeloader.supervision.wrong_data`: reports in, findings out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from operator import itemgetter

from safeloader.introspect.resources import human_bytes
from safeloader.supervision.self_report import SelfReport
from safeloader.supervision.wrong_data import Finding

GREW_MIN = 96 << 20  # bytes that the private memory of one worker has to grow by
LOOKS = 4  # in a row between which it has to grow: allocators settle within ten batches
MANY = 100_000  # objects in one container whose reference counts are worth a word
SLOW_START_S = 5.0


def growth(reports: Mapping[int, SelfReport], forked: bool) -> Iterator[Finding]:
    """Workers whose memory grows steadily: twice the batches, twice the growth.

    Args:
        reports: by worker.
        forked: whether the workers began as copies of main.
    """
    for worker, report in sorted(reports.items()):
        own = [(n, anonymous) for n, anonymous, _ in report.memory]
        known = _samples([(n, private) for n, _, private in report.memory if private])
        copied = forked and not _steady(own) and _steady(known)
        if not copied and not _steady(own):
            continue
        series = known if copied else own
        (began, first), (ended, last) = series[0], series[-1]
        yield Finding(
            ("growth",),
            f"the memory of worker {worker} grows with every batch: {human_bytes(first)} of its "
            f"own after batch {began}, {human_bytes(last)} after batch {ended}. "
            f"{_copied(report) if copied else _cause(report)}",
        )
        return


def _samples(series: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first point of each that is the same: it is looked at more often than sampled."""
    return [next(points) for _, points in groupby(series, key=itemgetter(1))]


def _steady(series: Sequence[tuple[int, int]]) -> bool:
    """Whether it grew between each of the last looks, by no less a batch than before.

    What is set up at first use grows once; a steady growth goes on at its pace.
    """
    points = list(series)[-LOOKS - 1 :]
    if len(points) <= LOOKS or points[-1][1] - points[0][1] < GREW_MIN:
        return False
    steps = list(pairwise(points))
    paces = [(after - before) / max(1, n - m) for (m, before), (n, after) in steps]
    return all(pace > 0 for pace in paces) and paces[-1] >= 0.5 * max(paces)


def _cause(report: SelfReport) -> str:
    began = report.lengths_at_work
    gains = {
        path: length - began[path] for path, length in report.now.lengths.items() if path in began
    }
    path = max(gains, key=lambda each: gains[each], default="")
    if path and gains[path] >= max(16, report.batches // 2):
        before, after = began[path], report.now.lengths[path]
        return (
            f"{path} grew meanwhile from {before:,} to {after:,} entries: bound it (an LRU cache), "
            "or keep it on disk or in one shared array"
        )
    return (
        "Nothing that the dataset holds under a name grew with it: look for caches of its "
        "libraries, open files and lists at module level (tracemalloc in the worker tells)"
    )


def _copied(report: SelfReport) -> str:
    large = {path: n for path, n in report.start.lengths.items() if n >= MANY}
    path = max(large, key=lambda each: large[each], default="")
    what = f"{path} ({large[path]:,} Python objects)" if path else "Python objects"
    return (
        "It allocated nothing: pages that it inherited become its own copies. It inherited "
        f"{what}, and reading an object writes its reference count into its page. One array "
        "(NumPy, Arrow, torch) in the place of many objects stays shared"
    )


def slow_start(
    seconds: float,
    in_main_s: float,
    start_method: str,
    sets_up: bool,
    heavy: Callable[[], Sequence[str]],
) -> Iterator[Finding]:
    """Workers that took long until they could begin.

    Args:
        seconds: until the last of them was ready.
        in_main_s: seconds of these in which main pickled and started them.
        start_method: of the workers.
        sets_up: whether there is a ``worker_init_fn``.
        heavy: gives the heaviest attributes of the dataset, in words.
    """
    if seconds <= SLOW_START_S:
        return
    spent = f"{in_main_s:.1f} s of it to start them"
    if start_method == "fork" and in_main_s > seconds / 2:
        cure = "a fork copies the tables of main's memory, so start workers before main holds much"
    elif start_method == "fork" and sets_up:
        cure = "worker_init_fn takes the time"
    elif start_method == "fork":
        cure = "no code of the program runs there yet, so the machine was busy, or short of memory"
    else:
        spent = f"{in_main_s:.1f} s of it to pickle the dataset for each and start them"
        most = ", ".join(heavy())
        cure = f"under {start_method} each worker imports the program and its libraries anew"
        cure += ", runs worker_init_fn" if sets_up else ""
        if most:
            cure += (
                f", and gets its own copy of the dataset. Most is {most}. One array (NumPy, Arrow, "
                "torch) or a file that is opened in the worker takes the place of many objects"
            )
    yield Finding(
        ("slow start",),
        f"the workers took {seconds:.1f} s until they were ready, {spent}: {cure}. "
        "persistent_workers=True pays for it once, and not in each epoch",
    )
