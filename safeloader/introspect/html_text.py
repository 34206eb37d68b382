"""Small tables in HTML, for what a notebook shows. Runs in: both.

They load nothing, and set no colour of a text or of its ground: they can be read wherever the
notebook's own text can, light or dark. Every text is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Tone = Literal["good", "bad", "unknown", "plain"]

# A bar beside the table, which is seen on a light ground and on a dark one.
_BARS = {"good": "#2da44e", "bad": "#e5534b", "unknown": "#bf8700", "plain": "#8c959f"}
_CELL = "padding:1px 12px 1px 0;vertical-align:top;text-align:left;"
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;"


def escaped(text: str) -> str:
    """A text as HTML shows it, whatever is in it.

    >>> escaped('<b>&"')
    '&lt;b&gt;&amp;&quot;'
    """
    import html  # here: a list of 2,000 entities, in the memory of every program

    return html.escape(text.encode("utf-8", "backslashreplace").decode())


def table(title: str, rows: Iterable[tuple[str, str]], tone: Tone = "plain") -> str:
    """A table of two columns under a title, and how good what it says is.

    A row of an empty name goes on with the row above.

    >>> table("a", [("b", "<c>")]).count("&lt;c&gt;")
    1
    """
    bar = f"border-left:4px solid {_BARS[tone]};padding-left:10px;overflow-x:auto;"
    lines = [
        f'<tr><th scope="row" style="{_CELL}font-weight:600;white-space:nowrap;background:none">'
        f'{escaped(name)}</th><td style="{_CELL}{_TEXT}background:none">{escaped(text)}</td></tr>'
        for name, text in rows
    ]
    body = f'<table style="border-collapse:collapse">{"".join(lines)}</table>' if lines else ""
    heading = f'<div style="{_TEXT}font-weight:600">{escaped(title)}</div>'
    return f'<div style="{bar}">{heading}{body}</div>'


def rows_of(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Rows of indented lines, of which those that begin with ``name: `` have a name.

    >>> rows_of(["  dropped: 2, left out: 8, 9", "    index 8: why", "  resumed at batch 1"])
    [('dropped', '2, left out: 8, 9'), ('', 'index 8: why'), ('', 'resumed at batch 1')]
    """
    rows = []
    for line in lines:
        name, found, text = line.strip().partition(": ")
        named = bool(found) and line[:3].strip() != "" and name.replace(" ", "").isalpha()
        rows.append((name, text) if named else ("", line.strip()))
    return rows
