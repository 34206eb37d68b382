"""Whether what workers need can be sent to them, and what is heavy in it. Runs in: main."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import torch

from safeloader._python import ForkingPickler, as_if_spawning
from safeloader.examining.subject import TO_WORKERS, Subject
from safeloader.examining.talk import Talk
from safeloader.introspect.pickling import UnpicklablePart
from safeloader.introspect.values import cut, fields

_HEAVIEST = 3
_HANDLE_BYTES = 300  # about
_POPEN: Any = type("_Popen", (), {"duplicate_for_child": int, "DupFd": int})


def look(subject: Subject, talk: Talk) -> None:
    """Pickle what goes to a worker under spawn, into nothing, and weigh it."""
    talk.at("pickling")
    found = subject.unpicklable()
    tell_unpicklable(found, talk)
    if found:
        return
    talk.at("weighing")
    total = sum(weighed(getattr(subject, name)) for name in TO_WORKERS)
    parts = [
        (f"dataset.{name}", weighed(value))
        for name, value in fields(subject.dataset)[:200]
        if type(name) is str
    ]
    heaviest = sorted(parts, key=lambda part: -part[1])[:_HEAVIEST]
    told = [[cut(path), size] for path, size in heaviest if size * 10 > total]
    talk.tell("weight", bytes=total, heaviest=told)


def tell_unpicklable(found: list[UnpicklablePart], talk: Any) -> None:
    """Each part that cannot be sent."""
    for part in found:
        talk.tell(
            "unpicklable", path=part.path, what=part.kind, reason=part.reason, advice=part.advice
        )


class _Scales(ForkingPickler):
    """Pickles into nothing and counts; arrays by their size, uncopied.

    A tensor is shared with a worker, and not sent: of it a handle goes, if it is not ``copied``.
    """

    def __init__(self, copied: bool) -> None:
        super().__init__(self, pickle.DEFAULT_PROTOCOL)
        self.bytes = 0
        self._copied = copied
        self._seen: dict[int, Any] = {}

    def write(self, data: Any) -> int:
        self.bytes += len(data)
        return len(data)

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, np.ndarray | torch.Tensor) or (
            isinstance(value, np.ndarray) and value.dtype.hasobject
        ):
            return None
        if id(value) not in self._seen:
            self._seen[id(value)] = value
            sent = self._copied or isinstance(value, np.ndarray)
            self.bytes += int(value.nbytes) if sent else _HANDLE_BYTES
        return id(value)


def weighed(value: Any, *, copied: bool = False) -> int:
    """Bytes that a value takes when it is sent; 0 where it cannot be.

    Args:
        value: any object.
        copied: whether tensors are to be copied, and not shared.
    """
    scales = _Scales(copied)
    try:
        with as_if_spawning(_POPEN):
            scales.dump(value)
    except Exception:
        return 0
    return scales.bytes
