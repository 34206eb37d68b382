"""Every example in the documentation runs."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import safeloader

README = Path(safeloader.__file__).parents[1] / "README.md"
MODULES = [
    "safeloader",
    *(found.name for found in pkgutil.walk_packages(safeloader.__path__, "safeloader.")),
]
# Each of these imports the framework of its name.
MODULES = [
    name
    for name in MODULES
    if not name.startswith("safeloader.integrations.")
    or name.endswith("logged")
    or importlib.util.find_spec(name.rpartition(".")[2])
]
# These are built on the extra `cli`.
if not (importlib.util.find_spec("typer") and importlib.util.find_spec("rich")):
    PLAIN = ("run", "doctor", "target")
    MODULES = [
        name
        for name in MODULES
        if not name.startswith("safeloader.commands.") or name.rpartition(".")[2] in PLAIN
    ]

# An error below the base class is shown by the base class's example.
SHOWN_ELSEWHERE = {
    name
    for name in safeloader.__all__
    if inspect.isclass(value := getattr(safeloader, name))
    and issubclass(value, safeloader.SafeLoaderError)
    and value is not safeloader.SafeLoaderError
}
USER_FACING = sorted(
    name for name in set(safeloader.__all__) - SHOWN_ELSEWHERE if not name.startswith("__")
)


def _doctests(names: list[str]) -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder()
    return [found for name in names for found in finder.find(importlib.import_module(name))]


def _with_workers(name: str) -> bool:
    sources = (example.source for found in _doctests([name]) for example in found.examples)
    return any("num_workers" in source or "doctor(" in source for source in sources)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.workers] * _with_workers(name)) for name in MODULES],
)
def test_the_examples_of_each_module_run(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, raise_on_error=False)
    assert result.failed == 0


def test_there_are_examples_to_run() -> None:
    attempted = sum(len(found.examples) for found in _doctests(MODULES))
    assert attempted > 40


@pytest.mark.parametrize("name", USER_FACING)
def test_each_public_class_and_function_has_an_example(name: str) -> None:
    docstring = inspect.getdoc(getattr(safeloader, name)) or ""
    assert "Example:" in docstring
    assert ">>>" in docstring.split("Example:")[1]


def test_the_public_methods_and_properties_are_explained() -> None:
    for name in USER_FACING:
        cls = getattr(safeloader, name)
        for attribute, value in vars(cls).items():
            is_code = callable(value) or isinstance(value, property | classmethod | staticmethod)
            if is_code and not attribute.startswith("_"):
                assert inspect.getdoc(value), f"{name}.{attribute}"


def blocks_with_prompts(markdown: str) -> list[str]:
    blocks = re.findall(r"^```py(?:thon|con)?\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE)
    return [block for block in blocks if ">>>" in block]


@pytest.mark.skipif(not README.exists(), reason="there is no README.md")
def test_the_examples_of_the_readme_run() -> None:
    """The blocks build on each other, from the first to the last."""
    runner = doctest.DocTestRunner()
    parser = doctest.DocTestParser()
    names: dict[str, object] = {}
    for number, block in enumerate(blocks_with_prompts(README.read_text(encoding="utf-8"))):
        test = parser.get_doctest(block, names, f"README block {number}", str(README), 0)
        runner.run(test, clear_globs=False)
        names.update(test.globs)
    assert runner.summarize(verbose=False).failed == 0


def test_blocks_with_prompts_are_found() -> None:
    text = "text\n```python\n>>> 1\n1\n```\n```python\nx = 1\n```\n```pycon\n>>> 2\n2\n```\n"
    assert blocks_with_prompts(text) == [">>> 1\n1\n", ">>> 2\n2\n"]
