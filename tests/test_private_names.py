"""Private names of torch stand in ``_torch.py``, the standard library's in ``_python.py``."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import safeloader

PACKAGE = Path(safeloader.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def all_but(*names: str) -> pytest.MarkDecorator:
    paths = [path for path in MODULES if path not in {PACKAGE / name for name in names}]
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(PACKAGE)))


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Dotted names of everything imported, wherever it stands, and what each is called here."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, alias.asname or alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module}.{alias.name}", alias.asname or alias.name


def is_private(part: str) -> bool:
    return part.startswith("_") and not (part.startswith("__") and part.endswith("__"))


def chain(node: ast.expr) -> list[str]:
    """``a.b.c`` as its parts; empty where it does not begin with a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [*reversed([*parts, node.id])] if isinstance(node, ast.Name) else []


def is_own(node: ast.Attribute) -> bool:
    """``self.name``, an attribute of a class of ours, or ``super().name`` in an override."""
    value = node.value
    if isinstance(value, ast.Call):
        value = value.func
        return isinstance(value, ast.Name) and value.id == "super"
    return isinstance(value, ast.Name) and value.id == "self"


def bound_to(packages: frozenset[str], tree: ast.AST) -> set[str]:
    """The names that stand for these packages here, for their modules or for what they hold."""
    return {called for name, called in imports(tree) if name.split(".")[0] in packages}


def private_uses(packages: frozenset[str], tree: ast.AST) -> set[str]:
    found = {
        name
        for name, _ in imports(tree)
        if name.split(".")[0] in packages and any(map(is_private, name.split(".")))
    }
    bound = bound_to(packages, tree)
    for node in ast.walk(tree):
        parts = chain(node) if isinstance(node, ast.Attribute) else []
        if parts and parts[0] in bound and is_private(parts[-1]):
            found.add(".".join(parts))
    return found


# ── torch ────────────────────────────────────────────────────────────────────────────────────────

TORCH = frozenset({"torch"})

# Attributes of torch's loaders and iterators that are private; an object gives no import to see.
PRIVATE_ATTRIBUTES = {
    "_DataLoader__initialized",
    "_DataLoader__multiprocessing_context",
    "_IterableDataset_len_called",
    "_auto_collation",
    "_base_seed",
    "_dataset_fetcher",
    "_dataset_kind",
    "_get_iterator",
    "_index_queues",
    "_index_sampler",
    "_iterator",
    "_mark_worker_as_unavailable",
    "_next_data",
    "_next_index",
    "_persistent_workers",
    "_pin_memory",
    "_reset",
    "_sampler_iter",
    "_shutdown",
    "_shutdown_workers",
    "_task_info",
    "_try_get_data",
    "_try_put_index",
    "_worker_result_queue",
    "_workers",
}


def private_uses_of_torch(tree: ast.AST) -> set[str]:
    return private_uses(TORCH, tree) | {
        ".".join(chain(node)) or node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        if node.attr in PRIVATE_ATTRIBUTES and not is_own(node)
    }


# The hook of a launched program runs while torch is being imported, and cannot import that module.
@all_but("_torch.py", "hook/sitecustomize.py")
def test_private_names_of_torch_stand_in_one_module(path: Path) -> None:
    assert private_uses_of_torch(parsed(path)) == set()


def test_that_module_is_where_they_are() -> None:
    assert private_uses_of_torch(parsed(PACKAGE / "_torch.py"))


@pytest.mark.parametrize(
    "line",
    [
        "import torch.utils.data._utils",
        "from torch.utils.data import _utils",
        "from torch.utils.data._utils.collate import default_collate",
        "import torch; torch._C.something()",
        "import torch as t; t.utils.data._utils",
        "import torch.utils.data; torch.utils.data._utils.worker",
        "from torch.utils.data import DataLoader; DataLoader._get_iterator(view)",
        "def f():\n    from torch import _dynamo",
        "loader._index_sampler",
        "pool.loader._iterator",
        "self.loader._iterator",
        "loader_of(self)._get_iterator()",
    ],
)
def test_private_names_are_recognised(line: str) -> None:
    assert private_uses_of_torch(ast.parse(line))


@pytest.mark.parametrize(
    "line", ["self._workers", "super()._get_iterator()", "torch.__version__", "loader._pool"]
)
def test_names_of_ours_and_public_ones_are_left_alone(line: str) -> None:
    assert private_uses_of_torch(ast.parse("import torch\n" + line)) == set()


# ── the standard library ─────────────────────────────────────────────────────────────────────────

STANDARD = frozenset(sys.stdlib_module_names - {"__future__"})

# Private by their underscore, and documented; and undocumented without one.
DOCUMENTED = {"sys._getframe", "os._exit", "ctypes._SimpleCData", "ctypes._Pointer"}
UNDOCUMENTED = (
    "multiprocessing.context.assert_spawning",
    "multiprocessing.context.get_spawning_popen",
    "multiprocessing.context.set_spawning_popen",
    "multiprocessing.forkserver",
    "multiprocessing.popen_",
    "multiprocessing.process",
    "multiprocessing.reduction",
    "multiprocessing.resource_",
    "multiprocessing.spawn",
    "multiprocessing.synchronize",
    "multiprocessing.util",
)


def private_uses_of_the_library(tree: ast.AST) -> set[str]:
    named = {name for name, _ in imports(tree)}
    bound = bound_to(STANDARD, tree)
    chains = (chain(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    named |= {".".join(parts) for parts in chains if parts and parts[0] in bound}
    undocumented = {name for name in named if name.startswith(UNDOCUMENTED)}
    return (private_uses(STANDARD, tree) - DOCUMENTED) | undocumented


@all_but("_python.py")
def test_private_names_of_the_library_stand_in_one_module(path: Path) -> None:
    if path.name != "_torch.py":  # which may touch torch's copies of them
        assert private_uses_of_the_library(parsed(path)) == set()


def test_that_module_is_where_those_are() -> None:
    assert private_uses_of_the_library(parsed(PACKAGE / "_python.py"))


@pytest.mark.parametrize(
    "line",
    [
        "import _thread",
        "import threading; threading._active",
        "from threading import _shutdown",
        "import multiprocessing as m; m.process._children",
        "from multiprocessing import util",
        "from multiprocessing.reduction import ForkingPickler",
        "import multiprocessing.resource_tracker",
        "import multiprocessing; multiprocessing.spawn.get_executable()",
        "def f():\n    from concurrent.futures import _base",
    ],
)
def test_private_names_of_the_library_are_recognised(line: str) -> None:
    assert private_uses_of_the_library(ast.parse(line))


@pytest.mark.parametrize(
    "line",
    [
        "from __future__ import annotations",
        "import sys; sys._getframe(1)",
        "import threading; threading.__name__",
        "from multiprocessing.connection import Connection",
        "import torch; torch._C",
    ],
)
def test_public_names_of_the_library_are_left_alone(line: str) -> None:
    assert private_uses_of_the_library(ast.parse(line)) == set()
