"""What is claimed is what was run: setup.cfg, the table of runs, and the jobs of CI."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path

import pytest

from tests import versions

ROOT = Path(__file__).parents[2]
REPORT = """<testsuites><testsuite name="pytest" tests="5">
<testcase classname="tests.unit.test_x" name="test_a[b - c]" file="tests/unit/test_x.py"/>
<testcase classname="tests.unit.test_x.TestY" name="test_d" file="tests/unit/test_x.py"><failure/>
</testcase>
<testcase classname="tests.unit.test_x" name="test_e[f::g]" file="tests/unit/test_x.py"><error/>
</testcase>
<testcase classname="tests.unit.test_x" name="test_e[f::g]" file="tests/unit/test_x.py"><failure/>
</testcase>
<testcase classname="tests.unit.test_x" name="test_h" file="tests/unit/test_x.py"><skipped/>
</testcase></testsuite></testsuites>"""


@pytest.fixture
def config() -> configparser.ConfigParser:
    read = configparser.ConfigParser()
    read.read(ROOT / "setup.cfg")
    return read


def test_the_pythons_that_are_claimed_are_those_that_are_run(
    config: configparser.ConfigParser,
) -> None:
    claimed = re.findall(r"Python :: (\d\.\d+)", config["metadata"]["classifiers"])
    assert tuple(claimed) == versions.PYTHONS
    assert config["options"]["python_requires"] == f">={versions.PYTHONS[0]}"
    (torch,) = re.findall(r"torch>=(\S+)", config["options"]["install_requires"])
    assert versions.TORCHES[0].startswith(f"{torch}.")


def test_each_pair_was_run_and_nothing_failed() -> None:
    rows = versions.rows()
    assert [row for row in rows if row["failed"] != "0"] == []
    ran = {
        (row["python"].rpartition(".")[0], row["torch"].partition("+")[0])
        for row in rows
        if row["tests"] == "quick"
    }
    assert set(versions.PAIRS) - ran == set()


def test_outcomes_and_names(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    counts, failed = versions.counted(report)
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert failed == [
        "tests/unit/test_x.py::TestY::test_d",
        "tests/unit/test_x.py::test_e[f::g]",
    ]


def test_a_newer_line_takes_the_place_of_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "TABLE", tmp_path / "table.csv")
    line = dict.fromkeys(versions.COLUMNS, "0")
    for python, torch, passed in (
        ("3.13.0", "2.10.0+cpu", "1"),
        ("3.11.7", "2.9.1", "2"),
        ("3.13.4", "2.10.0+cu126", "3"),
    ):
        versions.note(line | {"python": python, "torch": torch, "passed": passed, "tests": "quick"})
    assert [row["passed"] for row in versions.rows()] == ["2", "3"]


def test_ci_is_given_the_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    assert versions.main(["--list", "all"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(versions.PAIRS)
    assert versions.main(["--list", "ends"]) == 0
    ends = json.loads(capsys.readouterr().out)
    assert ends[0] == {"python": "3.11", "torch": "2.6.0"}
    assert len(ends) == 2 * len(versions.PYTHONS)
