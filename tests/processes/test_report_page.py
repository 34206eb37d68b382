"""The report page of three real runs, in a real Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safeloader.commands import report
from safeloader.report.run import RunFolder
from tests.browser import Browser, browser
from tests.report_runs import BAD_INDEX, MADE, SLOW_INDEX

pytest.importorskip("pyarrow", reason="the run's batches are kept with pyarrow")
pytest.importorskip("plotly", reason="the page needs the extra `report`")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(window: Browser, tmp_path_factory: Any) -> dict[str, Path]:
    """The pages of the runs, by their names."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for name, made in MADE.items():
        found[name] = folder / f"{name}.html"
        assert report.main([str(made(folder)), "-o", str(found[name])]) == 0
    return found


CHARTS = """
return Object.fromEntries([...document.querySelectorAll(".chart")].map((place) => [
    place.id.replace("chart-", ""),
    [place.data.map((trace) => trace.x.length), place.querySelectorAll(
        ".scatterlayer .trace, .barlayer .trace").length, place.clientWidth],
]))
"""


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(("width", "dark"), [(400, False), (400, True), (1600, False)])
def test_each_chart_has_its_data_and_nothing_is_wrong(
    window: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    window.shows(width, dark)
    window.open(pages[name])
    charts = window.script(CHARTS)
    assert {"waiting", "workers", "fetches"} <= set(charts)
    for points, drawn, its_width in charts.values():
        assert points
        assert all(points)
        assert drawn
        assert 300 < its_width <= width
    assert window.script("return document.documentElement.scrollWidth <= innerWidth")
    ground = window.script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") is not dark
    assert window.console() == []
    assert window.script("return performance.getEntriesByType('resource').length") == 0


def test_the_charts_follow_the_width_of_the_window(window: Browser, pages: dict[str, Path]) -> None:
    window.shows(1600, dark=False)
    window.open(pages["digits"])
    window.shows(400, dark=True)
    fits = "return [...document.querySelectorAll('.main-svg')].every((e) => e.clientWidth <= 400)"
    window.waits_for(fits)
    assert window.script("return document.documentElement.scrollWidth <= innerWidth")
    assert window.console() == []


def test_the_button_changes_from_light_to_dark(window: Browser, pages: dict[str, Path]) -> None:
    window.shows(1600, dark=False)
    window.open(pages["digits"])
    window.script("document.getElementById('theme').click()")
    ground = window.script("return getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(20, 23, 26)"
    assert window.console() == []


def cards(window: Browser) -> list[str]:
    return list(
        window.script("return [...document.querySelectorAll('.card')].map((c) => c.innerText)")
    )


def test_the_cards_say_what_is_wrong_and_which_sample_is_to_blame(
    window: Browser, pages: dict[str, Path]
) -> None:
    window.shows(1600, dark=False)
    window.open(pages["faults"])
    right, bottleneck, samples, cost = cards(window)
    assert "NOT OK" in right
    assert f"Most often: index {BAD_INDEX}" in right
    assert "waiting" in bottleneck
    assert f"sample {SLOW_INDEX}\n" in samples
    assert "scans/<b>patient 41</b>/T1.nii" in samples
    assert "What does it cost?" in cost
    window.open(pages["digits"])
    assert "Yes\n" in cards(window)[0]


def test_the_failures_are_told_with_where_they_were_raised(
    window: Browser, pages: dict[str, Path]
) -> None:
    window.open(pages["faults"])
    window.script("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    told = window.script("return document.getElementById('right').innerText")
    for phase in ("sample", "collate", "transport", "crash", "timeout"):
        assert phase in told
    for kind in ("KeyError", "ValidationError", "WorkerCrashError", "WorkerTimeoutError"):
        assert kind in told
    assert "in __getitem__" in told
    assert "<script>alert(13)</script>" in told  # as text
    assert (
        window.script("return document.querySelectorAll('#right b b, #right script').length") == 0
    )


def test_the_search_finds_what_failed_what_is_slow_and_what_neither(
    window: Browser, pages: dict[str, Path]
) -> None:
    window.open(pages["faults"])
    found = window.searched(str(BAD_INDEX))
    assert any(line.startswith(f"failed {BAD_INDEX} KeyError") for line in found)
    assert any(line.startswith(f"skipped {BAD_INDEX} ") for line in found)
    assert any(line.startswith(f"replaced {BAD_INDEX} ") for line in found)
    slow = window.searched(str(SLOW_INDEX))
    assert slow[0].startswith(f"slow {SLOW_INDEX} median 3")
    assert "patient 41" in slow[0]
    nothing = window.searched("123456")
    assert nothing[0].startswith("It did not fail")
    assert "safeloader index " in nothing[-1]
    assert nothing[-1].endswith("faults 123456copy")
    assert any("patient 50" in line for line in window.searched("patient 50"))
    assert any("WorkerTimeoutError" in line for line in window.searched("timed out"))
    assert window.searched("<img src=x onerror=alert(1)>")[0].startswith("It did not fail")
    assert window.console() == []


def test_steps_are_found_by_number_and_by_time(window: Browser, pages: dict[str, Path]) -> None:
    window.open(pages["ranks"])
    found = window.searched("step 7")
    steps = [line for line in found if line.startswith("step 7 ")]
    assert len(steps) == 8  # four ranks, two attempts
    assert "safeloader step " in found[-1]
    day, clock = steps[0].split()[2:4]
    at = window.searched(f"{day} {clock}")
    assert any(line.startswith("step ") and f"{day} {clock[:5]}" in line for line in at)
    assert window.searched(clock)[0].startswith("step ")
    assert window.searched("1999-01-01 10:00") == ["No step ran then."]


def test_an_interruption_is_told_and_what_came_before_it_is_there(
    window: Browser, pages: dict[str, Path]
) -> None:
    window.open(pages["ranks"])
    told = window.script("return document.body.innerText")
    assert "In attempt 0 a process ended without closing its books" in told
    assert "1,664 samples" in told  # 20 batches of 8 before, 128 samples in 2 epochs after, on each
    assert window.script("return document.getElementById('state').innerText") == "ended"


def test_a_torn_tail_is_told(window: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "torn"
    shutil.copytree(pages["ranks"].with_suffix(""), run)
    killed = next(each for each in RunFolder(run).loaders if each.state == "killed")
    streams = list(killed.path.glob("*.arrows"))
    for path in (*streams, killed.path / "tail"):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) - 5] if path.suffix else whole[:300])
    page = tmp_path / "torn.html"
    assert report.main([str(run), "-o", str(page)]) == 0
    window.open(page)
    notes = window.script("return document.querySelector('.notes').innerText")
    assert "tail is torn at step" in notes
    assert window.console() == []


def test_a_run_that_goes_on_has_a_page(window: Browser, tmp_path: Path) -> None:
    from safeloader import SafeDataLoader

    loader = SafeDataLoader(list(range(64)), batch_size=4, run_dir=tmp_path / "on")
    iterator = iter(loader)
    for handed_over in range(4):
        next(iterator)
        page = tmp_path / f"{handed_over}.html"
        assert report.main([str(tmp_path / "on"), "-o", str(page)]) == 0
    window.open(page)
    assert window.script("return document.getElementById('state').innerText") == "running"
    assert "16 samples in 4 batches" in window.script("return document.body.innerText")
    assert window.console() == []
    assert len(list(iterator)) == 12
