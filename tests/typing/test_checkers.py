"""The signature that type checkers and editors see, held by mypy and pyright."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

import safeloader.loader

HERE = Path(__file__).parent
BAD = {
    number
    for number, line in enumerate((HERE / "bad.py").read_text().splitlines(), 1)
    if line.endswith("# refused")
}


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def mypy() -> dict[str, set[int]]:
    paths = [str(HERE / name) for name in ("good.py", "bad.py")]
    said = run("mypy", "--no-error-summary", "--follow-imports=silent", *paths)
    found: dict[str, set[int]] = {"good.py": set(), "bad.py": set()}
    for name, line in re.findall(r"(\w+\.py):(\d+): error", said):
        found[name].add(int(line))
    return found


def pyright() -> dict[str, set[int]]:
    paths = [str(HERE / name) for name in ("good.py", "bad.py")]
    said = json.loads(run("pyright", "--pythonpath", sys.executable, "--outputjson", *paths))
    found: dict[str, set[int]] = {"good.py": set(), "bad.py": set()}
    for each in said["generalDiagnostics"]:
        if each["severity"] == "error":
            found[Path(each["file"]).name].add(each["range"]["start"]["line"] + 1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("checker", [mypy, pyright])
def test_good_programs_pass_and_bad_lines_are_refused(checker: object) -> None:
    assert callable(checker)
    pytest.importorskip(checker.__name__)
    assert checker() == {"good.py": set(), "bad.py": BAD}


def test_what_checkers_see_is_torchs_signature_and_ours() -> None:
    tree = ast.parse(inspect.getsource(safeloader.loader))
    seen, *_ = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "__init__" and node.args.kwonlyargs
    )
    torchs = inspect.signature(DataLoader.__init__).parameters.values()
    ours = inspect.signature(safeloader.SafeDataLoader.__init__).parameters.values()
    by_name = {each.name for each in (*torchs, *ours) if each.kind is each.KEYWORD_ONLY}
    assert {each.arg for each in seen.args.kwonlyargs} == by_name
    positional = [each.name for each in torchs if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert [each.arg for each in seen.args.args] == positional
