"""Files that we write: private, never over another, named by their process. Runs in: main."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from pathlib import Path

from safeloader.introspect.identity import host_name
from safeloader.introspect.private_files import make_folder
from safeloader.introspect.ranks import rank

_numbers = itertools.count()


def folder_of(folder: object) -> Path:
    """The path that the user gave, ``~`` expanded (as it stands where there is no home)."""
    return Path(os.path.expanduser(os.fspath(folder)))  # type: ignore[call-overload]  # checked


def see_writable(folder: Path) -> None:
    """See that files can be written into ``folder``, which need not exist yet.

    Raises:
        OSError: if they cannot.
    """
    existing = next((each for each in (folder, *folder.parents) if each.exists()), folder)
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file")
    with tempfile.TemporaryFile(dir=existing):
        pass


def create(folder: Path, stem: str, suffix: str, also: str = "") -> tuple[int, Path]:
    """Make a file that was not there; its descriptor for writing, and its path.

    It can be read by its owner alone, as can folders that are made for it. Names are predictable
    and the folder may be ``/tmp``: a link that somebody put there is not followed.

    Args:
        folder: made where it is missing.
        stem: what the name begins with; host, rank, process id and a number follow.
        suffix: what it ends with.
        also: a suffix under which there must be no file of this name either.

    Raises:
        OSError: if it cannot be made.
    """
    make_folder(folder)
    while True:
        path = folder / f"{stem}-{process_name()}-{next(_numbers)}{suffix}"
        if also and os.path.lexists(path.with_suffix(also)):
            continue
        with contextlib.suppress(FileExistsError):  # a link is there too, wherever it leads
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), path


def process_name() -> str:
    """``host-rank0-4711``, which tells processes apart in a folder that machines share."""
    return f"{host_name()}-rank{rank() or 0}-{os.getpid()}"
