"""The README and the documentation show what a user will really see."""

from __future__ import annotations

import dataclasses
import json
import pdb
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safeloader import EpochAudit, SafeDataLoader, SafeLoaderError

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *DOCS.glob("*.md"), *DOCS.glob("guides/*.md")]
QUESTIONS = (DOCS / "guides/three_questions.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of one language; "" for those that name none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [body for name, body in fenced if name == language]


def test_outputs_of_the_three_questions_are_real() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "three_questions.py")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr

    def without_pids(text: str) -> list[str]:
        return re.sub(r"pid \d+", "pid N", text).splitlines()

    real = without_pids(done.stdout)
    shown = blocks("", QUESTIONS)
    assert len(shown) == 3
    [short] = blocks("", README.split("## Three things")[1].split("\n## ")[0])
    for block in [*shown, short]:
        lines = [line for line in without_pids(block) if line.strip() != "..."]
        assert [line for line in lines if line not in real] == []


def test_the_words_of_an_audit_are_explained() -> None:
    explained = set(re.findall(r"`(\w+)`", QUESTIONS.split("| word |")[1].split("\n\n")[0]))
    classes = {field.name for field in dataclasses.fields(EpochAudit) if field.type == "IndexArray"}
    assert len(classes) == 10
    assert classes | {"complete", "ok"} <= explained


FAULTS = ("key", "killed", "segfault", "hangs", "unsendable", "lambda")


def said_of_faults() -> dict[str, tuple[str, str]]:
    """The words of torch's loader and of ours, of each fault."""
    section = (DOCS / "guides/faults.md").read_text().split("And what it lets pass")[0]
    rows = [line.strip("| \n").split(" | ") for line in section.splitlines() if " | " in line][1:]
    return {fault: (row[1], row[2]) for fault, row in zip(FAULTS, rows, strict=True)}


def quoted(words: str) -> list[str]:
    return re.findall(r"`([^`]*)`", re.sub(r"pid(\(s\))? \d+", "pid N", words))


def printed(fault: str, whose: str) -> str:
    """What the example prints; numbers of processes left out, and tenths of seconds."""
    done = subprocess.run(
        [sys.executable, "examples/six_faults.py", fault, "--with", whose],
        capture_output=True,
        text=True,
        errors="replace",
        cwd=ROOT,
        timeout=300,
    )
    text = re.sub(r"for 3\.\d s", "for 3.0 s", done.stdout)
    text = text.replace("Can't get local object", "Can't pickle local object")  # Python 3.13
    return re.sub(r"pid(\(s\))? \d+", "pid N", text)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_said_of_six_faults_is_real(fault: str) -> None:
    real, said = printed(fault, "safeloader"), quoted(said_of_faults()[fault][1])
    assert said, fault
    assert [words for words in said if words not in real] == [], real


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "unsendable"])
def test_torch_says_one_of_the_things_that_are_quoted(fault: str) -> None:
    """Chance decides which, where a worker dies, and the second death may strike while the first is
    told; of what cannot be sent it says nothing, ever."""
    said = quoted(said_of_faults()[fault][0])
    tries = [printed(fault, "torch")]
    while not any(words in tries[-1] for words in said):
        assert len(tries) < 5, tries
        tries.append(printed(fault, "torch"))


class Labelled(torch.utils.data.Dataset[Any]):
    """What the examples of the pages are run on."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 1024

    def __getitem__(self, index: int) -> Any:
        if index == self.broken:
            raise KeyError(index)
        return {"x": torch.ones(3), "label": index % 10}


def names_of_a_training() -> dict[str, Any]:
    """What the examples take for granted, after an epoch."""

    def train(loader: Any) -> None:
        for _ in loader:
            pass

    loader = SafeDataLoader(Labelled(), batch_size=64, shuffle=True)
    train(loader)
    with pytest.raises(SafeLoaderError) as caught:
        train(broken := SafeDataLoader(Labelled(broken=137), batch_size=64))
    return {
        "dataset": Labelled(),
        "loader": loader,
        "train": lambda _: train(broken),
        "error": caught.value,
        "SafeDataLoader": SafeDataLoader,
        "SafeLoaderError": SafeLoaderError,
        "loss": torch.tensor(torch.nan),
        "epochs": 1,
        "checkpoint": None,
        "mine": lambda sample, index: None,
        "accelerator": SimpleNamespace(prepare=lambda loader: loader),
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run(
    page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pdb, "post_mortem", lambda: None)
    monkeypatch.chdir(tmp_path)  # some write files
    examples = blocks("python", page.read_text())
    names = names_of_a_training() if examples else {}
    for number, example in enumerate(examples):
        if "LightningCallback" in example:
            continue  # tests/frameworks runs these
        code = compile(
            example.replace("num_workers=8", "num_workers=2"), f"{page}#{number}", "exec"
        )
        exec(code, names)


def test_the_import_to_change_works() -> None:
    namespace: dict[str, object] = {}
    exec(blocks("python")[0], namespace)
    assert namespace["DataLoader"].__name__ == "SafeDataLoader"  # type: ignore[attr-defined]


def test_every_option_and_file_named_is_there() -> None:
    loader = SafeDataLoader([1])
    named = re.findall(r"^\| `([a-z_]+)=", (DOCS / "options.md").read_text(), flags=re.MULTILINE)
    assert len(named) > 12
    for name in named:
        assert hasattr(loader, name)
    for page in PAGES:
        text = page.read_text()
        for path in re.findall(r"\]\(([\w./]+)\)", text) + re.findall(r"`(examples/[\w.]+)`", text):
            where = ROOT if path.startswith("examples/") else page.parent
            assert (where / path).exists(), (page.name, path)


def test_the_readme_is_short() -> None:
    assert len(README.split()) < 1200


# ── what it costs ────────────────────────────────────────────────────────────────────────────────


def test_its_figures_are_those_of_the_committed_results() -> None:
    measured = set()
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        for row in json.loads(path.read_text()).get("rows", []):
            spread = row.get("speed") if isinstance(row, dict) else None  # of a table, a list
            if spread is not None and spread["interval"] is not None:
                low, high = spread["interval"]
                measured.add(f"{spread['median']:.2f} ({low:.2f} to {high:.2f})")
    for page, least in ((DOCS / "costs.md", 31), (ROOT / "README.md", 4)):
        told = re.findall(r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", page.read_text())
        assert len(told) >= least
        assert set(told) <= measured
