"""Whether files can be written into a folder, found out without leaving any; runs in main."""

from __future__ import annotations

import tempfile
from pathlib import Path


def see_writable(folder: Path) -> None:
    """See that files can be written into ``folder``, which need not exist yet.

    Raises:
        OSError: if they cannot.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file")
    with tempfile.TemporaryFile(dir=existing):
        pass
