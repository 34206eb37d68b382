"""The README shows what a user will really see."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


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
        timeout=100,
    )
    assert done.returncode == 0, done.stderr

    def without_pids(text: str) -> list[str]:
        return re.sub(r"pid \d+", "pid N", text).splitlines()

    real = without_pids(done.stdout)
    section = README.split("## Three things")[1].split("\n## ")[0]
    shown = blocks("", section)
    assert len(shown) == 3
    for block in shown:
        lines = [line for line in without_pids(block) if line.strip() != "..."]
        assert [line for line in lines if line not in real] == []


def test_the_import_to_change_works() -> None:
    namespace: dict[str, object] = {}
    exec(blocks("python")[0], namespace)
    assert namespace["DataLoader"].__name__ == "SafeDataLoader"  # type: ignore[attr-defined]


def test_every_option_and_file_named_is_there() -> None:
    from safeloader import SafeDataLoader

    loader = SafeDataLoader([1])
    for name in re.findall(r"^\| `([a-z_]+)=", README, flags=re.MULTILINE):
        assert hasattr(loader, name)
    for path in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / path).exists(), path
