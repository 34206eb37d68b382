"""The benchmark of how workers start: real figures of both loaders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import starting

pytest.importorskip("psutil")


def test_both_loaders_are_started_and_weighed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    few = ["--methods=fork", "--workers=1", "--strings=128", "--repeats=1", f"--out={tmp_path}"]
    assert starting.main(few) == 0
    assert "| fork" in capsys.readouterr().out
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-starting.json"))
    (row,) = result["results"]
    for loader in ("stock", "safe"):
        (start,) = row[loader]
        assert 0 < start["iter_s"] <= start["first_s"]
        assert start["peak_bytes"] >= start["held_bytes"] > 1 << 20


@pytest.mark.parametrize("wrong", ["--methods=thread", "--workers=two", "--repeats=0"])
def test_what_cannot_be_measured_is_refused(wrong: str) -> None:
    with pytest.raises(SystemExit):
        starting.main([wrong])
