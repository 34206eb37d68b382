"""Failures as JSON files, for those who look later, and for a replay. Runs in: main."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safeloader._version import __version__
from safeloader.failures import random_numbers
from safeloader.failures.failure import Failure, in_json
from safeloader.introspect.files import create, folder_of
from safeloader.introspect.resources import machine_lines
from safeloader.introspect.texts import index_text

_LOG = logging.getLogger("safeloader")
Log = logging.Logger | logging.LoggerAdapter[logging.Logger]


def write(
    failure: Failure, folder: str | os.PathLike[str], log: Log = _LOG, *, tell: bool = True
) -> Path | None:
    """Write ``failure`` as a file of its own, which a line in the log names; None if that fails.

    ``tell``: whether the line is written.

    That nothing can be written is said once for a folder.
    """
    content: dict[str, Any] = {
        "failure": failure.to_dict(),
        "random": random_numbers.to_json(failure),
        "indices_whole": _are_whole(failure),
        "report": str(failure),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {
            "safeloader": __version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        "machine": machine_lines(),
    }
    part: Path | None = None
    target = folder_of(folder)
    try:
        stem = time.strftime("failure-%Y%m%dT%H%M%S")
        fd, part = create(target, stem, ".part", also=".json")
        with open(fd, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        path = part.replace(part.with_suffix(".json"))
    except (OSError, ValueError, TypeError) as exc:
        if target not in _told:
            _told.add(target)
            log.warning("the failure could not be written to %s: %s", target, str(exc))
        with contextlib.suppress(OSError):
            if part is not None:
                part.unlink(missing_ok=True)
        return None
    _told.discard(target)
    if tell:
        log.warning("the failure is written to %s", path)
    return path


_told: set[Path] = set()  # folders that could not be written to


# ── read again ───────────────────────────────────────────────────────────────────────────────────


def read(path: str | os.PathLike[str]) -> Failure:
    """The failure in a file that :func:`write` wrote, with what its random numbers were made from.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it holds no failure, or one of a sample whose index no JSON can hold.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        told = content["failure"]
        known = {name: told[name] for name in _READ if name in told}
        failure = Failure(
            **known,
            index=_as_index(told.get("index")),
            indices=tuple(map(_as_index, told.get("indices") or ())),
            **random_numbers.from_json(content.get("random")),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} holds no failure: {_NONE_IN_IT}") from None
    if not isinstance(failure.phase, str) or not isinstance(failure.position, int | None):
        raise ValueError(f"{path} holds no failure: {_NONE_IN_IT}")
    if failure.index is not None and content.get("indices_whole") is False:
        raise ValueError(
            f"{path} has the index {index_text(failure.index)} as a text only, as it is neither a "
            "number nor a plain text, nor a tuple of these: to replay it, keep the error itself "
            "(pickle.dump(error, file))"
        )
    return failure


_NONE_IN_IT = "give a file of on_failure_dump=, or of the failures/ of a run"
_READ = tuple(
    each.name
    for each in dataclasses.fields(Failure)
    if not each.name.startswith("_") and each.name not in ("index", "indices")
)


def _are_whole(failure: Failure) -> bool:
    """Whether the indices that a replay needs come out of the JSON as they went in."""
    needed = [failure.index, *failure.indices[: failure.position]]
    return all(map(_is_whole, needed))


def _is_whole(index: Any) -> bool:
    if type(index) is int:
        return index.bit_length() < 64
    return _is_plain(index) and bool(_as_index(in_json(index)) == index)


def _is_plain(index: Any) -> bool:
    if type(index) is tuple:
        return all(map(_is_plain, index))
    return index is None or type(index) in (int, str, bool, float)


def _as_index(told: Any) -> Any:
    """An index, which JSON has as a list where it is a tuple."""
    return tuple(map(_as_index, told)) if isinstance(told, list) else told
