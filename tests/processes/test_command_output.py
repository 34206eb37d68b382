"""What commands print, where it is cut off, has no place to go, or holds what a terminal obeys."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import Dataset

import safeloader
from safeloader import SafeDataLoader
from tests.run_folders import OF_A_RUN, new_process

ROOT = Path(safeloader.__file__).parents[1]
EVIL = "\x1b[31m\x9b2J\u202e\u2028"


class Evil(Dataset[int]):
    """Its file names are orders to a terminal; one sample fails."""

    def __init__(self) -> None:
        self.files = [f"{EVIL}{k}.png" for k in range(400)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> int:
        if index % 100 == 3:
            raise ValueError(self.files[index])
        return index


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patched:
        new_process(patched)
        list(SafeDataLoader(Evil(), 4, on_error="skip", run_dir=path))
        new_process(patched)
    return path


def shell(line: str, run: Path) -> subprocess.CompletedProcess[str]:
    """A line of bash, in which $SL is the program."""
    clean = {name: value for name, value in os.environ.items() if name not in OF_A_RUN}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    more = {"PYTHONPATH": path, "SL": f"{sys.executable} -m safeloader", "RUN": str(run)}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        env=clean | more,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("$SL show $RUN | head -1", 0),
        ("$SL show $RUN --json | head -1", 0),
        ("$SL audit $RUN | true", 0),
        ("$SL step $RUN 1 --all >&-", 0),
        ("$SL index $RUN 9999 | true", 1),
        ("$SL show $RUN --json > /dev/full", 2),
        ("PYTHONIOENCODING=ascii $SL show $RUN | cat > /dev/null", 0),
    ],
)
def test_output_that_is_cut_off_changes_no_status_and_shows_no_traceback(
    line: str, status: int, run: Path
) -> None:
    done = shell(line, run)
    assert done.returncode == status, done.stderr
    assert len(done.stderr.splitlines()) == (status == 2), done.stderr


def test_nothing_that_a_terminal_obeys_comes_out_of_a_run(run: Path) -> None:
    done = shell("$SL show $RUN; $SL index $RUN 3; $SL watch $RUN --once", run)
    assert "31m" in done.stdout
    for char in {*EVIL} - {*"[31m2J"}:
        assert char not in done.stdout


def test_a_page_or_trace_takes_the_place_of_no_device(run: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.symlink("pipe", tmp_path / "link")
    for name in ("pipe", "link", "."):
        for line in ("$SL report $RUN -o", "$SL trace $RUN --force -o"):
            done = shell(f"{line} {tmp_path}/{name}", run)
            assert done.returncode == 2
            assert len(done.stderr.splitlines()) == 1
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    "words",
    [
        "watch $RUN --once --window inf",
        "watch $RUN --once --every nan",
        "step $RUN 99999999999999999999",
        "trace $RUN -o x.json --epoch 99999999999999999999",
        "show $RUN/run.json",
        "show $'no\\nsuch'",
    ],
)
def test_numbers_and_folders_that_make_no_sense_are_refused_in_a_sentence(
    words: str, run: Path
) -> None:
    done = shell(f"$SL {words}", run)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
