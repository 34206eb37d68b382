"""The folders say where code runs; nothing crosses but through ``wire/`` and ``torch_private``."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import safeloader

PACKAGE = Path(safeloader.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# With num_workers=0 the training process does the workers' work; through these two, and no others.
MAIN_MAY_USE = {
    ("safeloader.main.worker_pool", "safeloader.worker.fetching"),
    ("safeloader.main.worker_pool", "safeloader.worker.startup"),
}

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


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def crossings(folder: str, into: str) -> set[tuple[str, str]]:
    """Pairs (module of ``folder``, module of ``into`` that it imports)."""
    known = {name_of(path) for path in MODULES}
    found = set()
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        for name in imports(parsed(path)):
            while name not in known and "." in name:
                name = name.rpartition(".")[0]
            if f"{name}.".startswith(f"safeloader.{into}."):
                found.add((name_of(path), name))
    return found


# ── the folders ──────────────────────────────────────────────────────────────────────────────────


def test_worker_does_not_import_main() -> None:
    assert crossings("worker", "main") == set()


def test_main_imports_of_worker_what_it_needs_without_workers() -> None:
    assert crossings("main", "worker") == MAIN_MAY_USE


@pytest.mark.parametrize("sibling", ["main", "worker", "loader", "tracing", "report"])
def test_wire_imports_no_sibling(sibling: str) -> None:
    assert crossings("wire", sibling) == set()


def test_the_checks_above_see_what_they_should() -> None:
    assert ("safeloader.main.epoch", "safeloader.transport.messages") in crossings("main", "wire")
    tree = ast.parse("def f():\n    import safeloader.main.epoch\n    from a.b import c, d\n")
    assert list(imports(tree)) == ["safeloader.main.epoch", "a.b.c", "a.b.d"]


# ── torch's private names ────────────────────────────────────────────────────────────────────────

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


def private_uses_of_torch(tree: ast.AST) -> set[str]:
    found = set()
    bound = set()  # names bound to torch, its modules or what they hold
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    bound.add(alias.asname or "torch")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            bound |= {alias.asname or alias.name for alias in node.names}
    for name in imports(tree):
        if name.split(".")[0] == "torch" and any(map(is_private, name.split("."))):
            found.add(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts = chain(node)
            of_torch = bool(parts) and parts[0] in bound and is_private(node.attr)
            if of_torch or (node.attr in PRIVATE_ATTRIBUTES and not is_own(node)):
                found.add(".".join(parts) or node.attr)
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.name != "_torch.py"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_private_names_of_torch_stand_in_one_module(path: Path) -> None:
    assert private_uses_of_torch(parsed(path)) == set()


def test_torch_private_is_where_they_are() -> None:
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
    "line", ["self._workers", "super()._get_iterator()", "torch.__version__", "loader._side"]
)
def test_names_of_ours_and_public_ones_are_left_alone(line: str) -> None:
    assert private_uses_of_torch(ast.parse("import torch\n" + line)) == set()


# ── what a worker imports ────────────────────────────────────────────────────────────────────────


def modules_after(program: str) -> set[str]:
    program += "\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
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


# ── the modules themselves ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_module_says_on_one_line_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring is not None
    first = docstring.split("\n")[0]
    assert len(first) > 10
    assert first[-1] in ".:"
