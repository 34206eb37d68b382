"""The benchmark of what workers have in memory: real figures, honest bars."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import worker_memory

pytest.importorskip("psutil")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
MIB = 1 << 20


def test_workers_are_weighed_when_they_rest() -> None:
    for contender in ("stock", "safe"):
        found = worker_memory.in_a_process("array", contender, 1, 1000)
        assert set(found) == {"after a batch", "after an epoch"}
        for sizes in found.values():
            assert sizes["pss"] >= sizes["uss"] > MIB
            assert (sizes["slots"] > 0) == (contender == "safe")


def test_a_collection_in_a_worker_is_timed_with_and_without_what_it_inherits() -> None:
    frozen = worker_memory.in_a_process("collect", "safe", 300_000)
    walked = worker_memory.in_a_process(
        "collect", "safe", 300_000, environ={"SAFELOADER_GC_FREEZE": "0"}
    )
    assert frozen["grown"] < walked["grown"] / 4


def test_what_is_parked_in_main_is_told() -> None:
    stock = worker_memory.in_a_process("parked", "stock", 128)
    safe = worker_memory.in_a_process("parked", "safe", 128)
    assert stock["parked"] == 0
    assert safe["parked"] >= 1 << 24


@pytest.mark.parametrize(
    ("ours", "stock", "ok"),
    [
        (100.0, 100.0, True),
        (100.9, 100.0, True),
        (101.1, 100.0, True),
        (102.1, 100.0, False),
        (10.9, 10.0, True),
        (11.1, 10.0, False),
    ],
)
def test_two_per_cent_or_a_mebibyte_more_is_allowed(ours: float, stock: float, ok: bool) -> None:
    assert worker_memory.within(ours * MIB, stock * MIB) is ok


def test_a_bar_that_is_missed_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    more = {"safe": 40.0}
    collection = {"s": 0.001, "grown": 0}

    def told(kind: str, name: str, *numbers: object, environ: Any = None) -> Any:
        if kind == "collect":
            return collection if name == "safe" and not environ else {"s": 0.1, "grown": 9 * MIB}
        if kind == "parked":
            return {"uss": 9.0 * MIB, "parked": 0.0}
        sizes = {"pss": MIB * more.get(name, 40.0), "uss": 10.0 * MIB, "slots": 0.0}
        return {"after a batch": sizes, "after an epoch": sizes}

    monkeypatch.setattr(worker_memory, "in_a_process", told)
    assert worker_memory.main(["--quick", "--check", f"--out={tmp_path}"]) == 0
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-worker-memory.json"))
    assert set(result["found"]["collections"]) >= {"stock", "safe"}
    for figure, walks in (("s", 0.09), ("grown", 8 * MIB)):
        monkeypatch.setitem(collection, figure, walks)
        assert worker_memory.main(["--quick", "--check"]) == 1
        monkeypatch.undo()
        monkeypatch.setattr(worker_memory, "in_a_process", told)
    more["safe"] = 42.0
    assert worker_memory.main(["--quick", "--check"]) == 1
    assert "MORE" in capsys.readouterr().out
