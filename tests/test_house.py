"""The house: modules say where they run, arrows go one way, pages name what is there."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import safeloader

PACKAGE = Path(safeloader.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the roof down: a module imports from its own floor and those below it.
FLOORS = (
    "__main__",
    "commands",
    "report",
    "examining",
    "hook",
    "integrations",
    "beside",
    "instrumenting",
    "stateful",
    "loader",
    "handles",
    "epochs",
    "main",
    "records",
    "showing",
    "worker",
    "provenance",
    "supervision",
    "transport",
    "delivery",
    "failures",
    "checks",
    "global_batches",
    "introspect",
    "_torch",
)
LEAVES = ("settings", "errors", "_python", "_version")  # anybody may use these
PLACES = ("main", "worker", "both")


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in MODULES}


def imports_of(source: str) -> Iterator[str]:
    """Our modules that a module imports, wherever that stands, for typing too."""
    for node in ast.walk(ast.parse(source)):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in found:
            while name not in NAMES and "." in name:
                name = name.rpartition(".")[0]
            if name in NAMES and name != "safeloader":
                yield name


GRAPH = {name: set(imports_of(path.read_text("utf-8"))) - {name} for name, path in NAMES.items()}


def floor_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def place_in(docstring: str) -> str | None:
    """Where a module runs, as the first line of its docstring ends with it."""
    found = re.search(r"\. Runs in: (\w+)\.$", docstring.split("\n")[0])
    return found.group(1) if found else None


@functools.cache
def place_of(name: str) -> str | None:
    return place_in(ast.get_docstring(ast.parse(NAMES[name].read_text("utf-8"))) or "")


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or not."""
    reach: dict[str, set[str]] = {}
    for name in graph:
        seen: set[str] = set()
        todo = list(graph[name])
        while todo:
            at = todo.pop()
            if at not in seen:
                seen.add(at)
                todo += graph.get(at, ())
        reach[name] = seen
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    return [list(group) for group in sorted(groups)]


# ── where a module runs ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", NAMES)
def test_the_first_line_says_what_a_module_is_and_where_it_runs(name: str) -> None:
    assert place_of(name) in PLACES, 'the first docstring line ends with "Runs in: <place>."'


def test_what_runs_in_a_worker_imports_nothing_that_runs_in_main() -> None:
    broken = [
        (name, other)
        for name in NAMES
        if place_of(name) != "main" and name != "safeloader"
        for other in GRAPH[name]
        if place_of(other) == "main"
    ]
    assert broken == []


def test_a_first_line_without_a_place_is_seen() -> None:
    assert place_in("Batches of a dataset. Runs in: worker.\n\nMore.") == "worker"
    assert place_in("Batches of a dataset; runs in a worker.") is None
    assert place_in("Batches.\nRuns in: worker.") is None


# ── arrows ───────────────────────────────────────────────────────────────────────────────────────


def test_every_module_stands_on_a_floor() -> None:
    known = {*FLOORS, *LEAVES, ""}
    assert {name for name in NAMES if floor_of(name) not in known} == set()


def test_arrows_go_down() -> None:
    height = {floor: -k for k, floor in enumerate(FLOORS)}
    broken = [
        (name, other)
        for name in NAMES
        if floor_of(name) in height
        for other in GRAPH[name]
        if floor_of(other) not in LEAVES and height[floor_of(other)] > height[floor_of(name)]
    ]
    assert broken == []


def test_no_circle_of_imports_typing_included() -> None:
    assert circles(GRAPH) == []


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"f"}, "f": {"e"}}
    assert circles(graph) == [["a", "b", "c"], ["e", "f"]]


def test_imports_are_seen_wherever_they_stand() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from safeloader.main.epoch import Epoch\n"
        "def f():\n    from safeloader import errors\n    import safeloader.loader\n"
    )
    assert set(imports_of(source)) == {
        "safeloader.main.epoch",
        "safeloader.errors",
        "safeloader.loader",
    }


# ── what a worker imports ────────────────────────────────────────────────────────────────────────


# What a worker must not pay for: heavy packages, and those that belong to main or to other tools.
TOO_HEAVY = {
    "IPython",
    "PIL",
    "hypothesis",
    "lightning",
    "matplotlib",
    "pandas",
    "psutil",
    "pyarrow",
    "pytest",
    "scipy",
    "sklearn",
    "tqdm",
}


def modules_after(program: str) -> set[str]:
    program += "\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return set(json.loads(done.stdout))


def test_a_worker_imports_nothing_heavy_beyond_torch_and_numpy() -> None:
    stock = modules_after("import torch, torch.utils.data, numpy")
    ours = modules_after("import safeloader.worker.startup")
    added = {name for name in ours - stock if not name.startswith(("safeloader", "torch", "numpy"))}
    assert {name.split(".")[0] for name in ours - stock} & TOO_HEAVY == set()
    assert "logging.handlers" not in added
    outside = {name.split(".")[0] for name in added} - sys.stdlib_module_names
    assert outside == set()


# ── names that have to be there ──────────────────────────────────────────────────────────────────

ROOT = PACKAGE.parent
PAGES = ("ARCHITECTURE.md", "CONTRIBUTING.md", "README.md", "SECURITY.md", "docs/details.rst")


def paths_named(page: str) -> set[str]:
    """Files that a page names: of the repository, or of the package by their room."""
    return set(re.findall(r"(?<![\w/.<-])((?:[\w.-]+/)*\w+\.(?:py|md|rst))\b", page))


def is_there(path: str) -> bool:
    return (ROOT / path).exists() or (PACKAGE / path).exists()


@pytest.mark.parametrize("page", PAGES)
def test_every_module_that_a_page_names_is_there(page: str) -> None:
    named = paths_named((ROOT / page).read_text("utf-8"))
    assert {path for path in named if not is_there(path)} == set()


def test_paths_are_found_in_a_page() -> None:
    page = "`main/epoch.py`, safeloader/_torch.py ─► (tests/unit/test_run.py) [x](docs/details.rst)"
    assert paths_named(page) == {
        "main/epoch.py",
        "safeloader/_torch.py",
        "tests/unit/test_run.py",
        "docs/details.rst",
    }


def test_every_room_is_explained() -> None:
    rooms = {path.parent.name for path in MODULES} - {"safeloader"}
    told = set(re.findall(r"`(\w+)/`", (ROOT / "ARCHITECTURE.md").read_text("utf-8")))
    assert rooms <= told


def test_public_names_are_loaded_from_where_they_live() -> None:
    for name in set(safeloader.__all__) - {"__version__"}:
        home = importlib.import_module(f"safeloader.{safeloader._HOMES.get(name, 'errors')}")
        assert getattr(safeloader, name) is vars(home)[name]
