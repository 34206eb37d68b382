"""Sphinx: the reference of the public names, from their docstrings (``make docs``)."""

from __future__ import annotations

from safeloader import __version__

project = "safeloader"
release = version = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
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
