"""What stands beside a recorded loader that has nothing of ours in it. Runs in: main.

::

    the program's DataLoader ◄── weakly ── LoaderHandle: our keywords, its notebook, its pool
             ▲                                  ▲
             └───────── a table, by id ─────────┘

The table holds no loader and no iterator. A copy of a loader, one that came by pickle and one that
a forked process inherited are not in it: they are new to us when they are first iterated.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch.utils.data import DataLoader

from safeloader import _python
from safeloader.epochs import CountedEpochs
from safeloader.provenance.recorder import Recorder
from safeloader.records import Records
from safeloader.settings import Keywords

_handles: dict[int, LoaderHandle] = {}
_python.at_fork(after_in_child=_handles.clear)


class LoaderHandle(Records, CountedEpochs, Keywords):
    """The records of a loader whose class stays torch's own.

    Args:
        loader: it is not held.
        options: our keywords, where they are not the defaults.
        line: file and line that first iterated it.
        recorder: the notebook.

    Attributes:
        kind: the name of its class.
        line: file and line that first iterated it.
        why_not: why it is not recorded; empty if it is.
    """

    _pool: Any = None  # that of persistent workers, which the loader's iterator keeps alive

    def __init__(
        self, loader: DataLoader[Any], options: dict[str, Any], line: str, recorder: Recorder
    ) -> None:
        number = id(loader)
        self._loader = weakref.ref(loader, lambda gone: _forget(number, gone))
        self.kind = type(loader).__qualname__
        self.line = line
        self.why_not = ""
        for name, value in options.items():
            setattr(self, name, value)
        self.recorder: Recorder = recorder
        _handles[number] = self

    @property
    def dataset(self) -> Any:
        """What the loader reads.

        Raises:
            LookupError: if the loader is gone.
        """
        loader = self._loader()
        if loader is None:
            raise LookupError(f"the {self.kind} of {self.line} is gone, and its dataset with it")
        return loader.dataset

    def _described(self) -> Any:
        return self._loader() or self

    def _seeded_loader(self) -> Any:
        return self._loader()

    def _drawing_loader(self) -> Any:
        return self._loader()

    def __repr__(self) -> str:
        return f"LoaderHandle({self.kind}, first iterated at {self.line})"


def _forget(number: int, gone: Any) -> None:
    handle = _handles.get(number)
    if handle is not None and handle._loader is gone:
        del _handles[number]


def handle_of(loader: Any) -> LoaderHandle | None:
    """The handle of a loader; None if there is none."""
    handle = _handles.get(id(loader))
    return handle if handle is not None and handle._loader() is loader else None
