"""Draws ``picture.svg``: what torch's loader says of a killed worker, and what ours says.

``python docs/picture.py`` runs ``examples/six_faults.py`` with both and keeps the lines that tell.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

HERE = Path(__file__).parent
WIDTH = 118  # columns
_LEFT_OUT = ("  shared memory", "  temporary files", "  open files", "    .lock", "    .scale")


def said(whose: str) -> list[str]:
    """What the example prints, of the machine it ran on only the memory."""
    done = subprocess.run(
        [sys.executable, "examples/six_faults.py", "killed", "--with", whose],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        check=True,
    )
    text = re.sub(r"(pid(?:\(s\))?) \d+", r"\1 4711", done.stdout)
    return [line for line in text.splitlines() if not line.startswith(_LEFT_OUT)]


def main() -> None:
    """Write the picture."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    for whose, colour in (("torch", "red"), ("safeloader", "green")):
        title = {"torch": "from torch.utils.data import DataLoader"}.get(
            whose, "from safeloader import SafeDataLoader as DataLoader"
        )
        console.print(Text(f">>> {title}", style="bold"))
        for line in said(whose):
            ours = line.startswith(("safeloader:", "  next:"))
            console.print(Text(line, style=f"bold {colour}" if ours else "", no_wrap=not ours))
        console.print()
    svg = console.export_svg(title="a worker is killed", theme=MONOKAI)
    svg = re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL)  # nothing from the network
    (HERE / "_static" / "picture.svg").write_text(svg)


if __name__ == "__main__":
    main()
