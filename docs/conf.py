"""Sphinx: the reference of the public names, from their docstrings (``make docs``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safeloader import __version__

project = "safeloader"
release = version = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
source_suffix = {".rst": "restructuredtext", ".md": "markdown"}
html_static_path = ["_static"]
myst_heading_anchors = 3
html_theme = "furo"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
# Imported where they are used; their absence is no reason to leave ours out.
autodoc_mock_imports = ["accelerate", "lightning", "pytorch_lightning", "transformers"]
# What a docstring points at has to be there. Not so the types of other projects, whose references
# are not fetched, those of our own modules below `safeloader`, which have no page, and the names of
# keywords' values, which each keyword's text lists.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(accelerate|lightning|numpy|torch|transformers|os|collections)\..+"),
    ("py:.*", r"Dataset|(.+\.)?T_co"),
    ("py:class", r"Verify|OnError|OnCrash|Transport|Check|SeedPer|Tail"),
    ("py:.*", r"safeloader\.[a-z_]+\..+"),
]
# Pages that stand at the top of the tree, and are read there.
OF_THE_TREE = ("architecture", "changelog", "contributing", "security")


def of_the_tree(_: Any, page: str, source: list[str]) -> None:
    """Put the text of a page of the tree in the place of the file here; its links lead here too."""
    if page not in OF_THE_TREE:
        return
    text = (Path(__file__).parents[1] / f"{page.upper()}.md").read_text("utf-8")
    text = text.replace("](docs/", "](")
    source[0] = re.sub(r"\]\((\w+)\.md\)", lambda link: f"]({link[1].lower()}.md)", text)


def setup(app: Any) -> None:
    """Sphinx calls it."""
    app.connect("source-read", of_the_tree)
