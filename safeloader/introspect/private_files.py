"""Files and folders that are their owner's alone. Runs in: main.

No library is imported here: the launcher does not wait for torch.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing, for their owner alone.

    Raises:
        OSError: if one cannot be made.
    """
    for missing in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
        with contextlib.suppress(FileExistsError):  # another rank made it just now
            missing.mkdir(mode=0o700)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[BinaryIO]:
    """A file for bytes, for its owner alone, that takes the place of ``target`` when it is whole.

    It is written beside it, and goes if it does not come to that.

    Raises:
        OSError: if it cannot be written.
    """
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with open(fd, "wb") as file:
            yield file
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_new(path: Path, text: str) -> None:
    """Write a file that was not there, for its owner alone.

    Raises:
        FileExistsError: if there is one, or a link.
        OSError: if it cannot be written.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(fd, "wb", buffering=0) as file:
            whole = text.encode()
            if file.write(whole) != len(whole):
                raise OSError(f"{path} was written in part only")
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def see_replaceable(path: Path) -> None:
    """See that a file may take the place of what is at a path: of nothing, or of another file.

    A file that is moved onto ``/dev/null`` is no device any more.

    Raises:
        OSError: if it may not.
    """
    if path.name in ("", "..") or (path.exists() and not path.is_file()):
        raise OSError(f"{path} is no file, and is left as it is: give the name of a file")
