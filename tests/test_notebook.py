"""The notebook in examples/, executed: what it shows is what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "digits.ipynb"

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

pytestmark = [
    pytest.mark.workers,
    # Of the libraries that run it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cells() -> list[Any]:
    """The cells with code, by a kernel of this Python."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cells: list[Any], source: str, kind: str = "text/plain") -> list[str]:
    """What the cells show whose source has these words."""
    outputs = [output for cell in cells if source in cell.source for output in cell.outputs]
    texts = (each.get("text") or each.get("data", {}).get(kind, "") for each in outputs)
    return [text for text in texts if text]


def test_it_trains(cells: list[Any]) -> None:
    told = "".join(shown(cells, "for epoch in range(3)"))
    right = [float(each) for each in re.findall(r"epoch \d: ([\d.]+)% right", told)]
    assert len(right) == 3
    assert right[2] > 85


def test_the_loader_and_its_audit_are_shown_as_tables(cells: list[Any]) -> None:
    fresh, trained = shown(
        [cell for cell in cells if cell.source.endswith("loader")], "", "text/html"
    )
    assert "waiting" not in fresh
    assert "epoch 2: complete, ok; 1797 drawn, 1797 delivered" in trained
    assert "% of the time" in trained
    (audit, failed) = shown(
        [cell for cell in cells if cell.source == "loader.audit"], "", "text/html"
    )
    assert "epoch 2: complete, ok; 1797 drawn, 1797 delivered" in audit
    assert "NOT OK" in failed
    assert "lost with a batch whose error was raised" in failed


def test_the_slow_samples_are_found(cells: list[Any]) -> None:
    (told,) = shown(cells, "slowest(5)")
    first = re.findall(r"index (\d+): ([\d.]+) ms \(median of 3", told)[:3]
    assert {int(index) for index, _ in first} == {17, 400, 1234}
    assert all(float(took) >= 20 for _, took in first)
    (rows,) = shown(cells, "lookup(1234)")
    assert len(re.findall(r"epoch \d, batch \d+, position \d+: worker [01] took", rows)) == 3
    (summary,) = shown(cells, "summary()")
    assert summary.startswith("3 epochs, 5,391 samples in 87 batches")


def test_the_broken_sample_is_named(cells: list[Any]) -> None:
    texts = shown(cells, "except SafeLoaderError")
    # On a busy machine it is told as well that the workers were slow to start.
    (told,) = [each for each in texts if "until they were ready" not in each]
    assert re.search(r"^index 137, position \d+ of batch \d+$", told, re.MULTILINE)
    assert "has shape [1, 8, 7] at [0], the other 63 have [1, 8, 8]" in told
    pages = shown(cells, "careful", "text/html")
    assert "1796 delivered" in pages[-1]
    assert "1, left out because of an error: 137" in pages[-1]


def test_what_is_stored_was_shown_by_it() -> None:
    stored = nbformat.read(NOTEBOOK, as_version=4)
    for cell in stored.cells:
        if cell.cell_type == "code":
            assert cell.execution_count is not None
            assert all(output.output_type != "error" for output in cell.outputs)
    assert any("1797 delivered" in str(cell.get("outputs")) for cell in stored.cells)
