"""The house: each module says where it runs, arrows go one way, and there is no circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import safeloader

PACKAGE = Path(safeloader.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the roof down: a module imports from its own floor and those below it.
FLOORS = (
    "loader",
    "main",
    "worker",
    "provenance",
    "supervision",
    "transport",
    "delivery",
    "failures",
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
