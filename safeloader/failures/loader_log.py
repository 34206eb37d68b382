"""The log lines of one loader, which begin with its name. Runs in: main."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager
from typing import Any

from safeloader.introspect.asking import only_reads
from safeloader.introspect.random_state import preserved
from safeloader.introspect.ranks import Place, place
from safeloader.introspect.redaction import scrub
from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.values import bounded, plain_length, short_type_name, type_name

_TRACEBACK_CHARS = 40_000
_logger = logging.getLogger("safeloader")


class LoaderLog(logging.LoggerAdapter[logging.Logger]):
    """The package's logger; each line begins with ``SafeDataLoader over ImageFolder (50000): ``.

    In distributed training the rank stands before the colon: ``..., rank 1: ``.

    A program has several loaders, for training and validation at least. A handler of the user's
    that raises ends these lines, and not the training.

    Args:
        dataset: what the loader reads.
        length: of the dataset; by default as it tells without any code of the user's.
        kind: the name of the loader's class.
        at: where this process stands among the ranks.

    Attributes:
        kind: the name of the loader's class.
        length: of the dataset, as far as known.
        loader_name: the words before the colon, without the rank.
        at: where this process stands among the ranks.
    """

    def __init__(
        self,
        dataset: Any,
        length: int | None = None,
        kind: str = "SafeDataLoader",
        at: Place | None = None,
    ) -> None:
        super().__init__(_logger, {})
        self.length = plain_length(dataset) if length is None else length
        self.kind = kind
        over = short_type_name(type_name(type(dataset)))
        size = "" if self.length is None else f" ({self.length})"
        self.loader_name = f"{kind} over {over}{size}"
        self.at = place() if at is None else at
        self.begin()

    def begin(self) -> None:
        """An epoch begins: a handler that raised in the one before may be mended."""
        self._broken = False

    def log(self, level: int, msg: Any, *args: Any, **kwargs: Any) -> None:
        """As :class:`logging.LoggerAdapter` has it, but that nothing is raised."""
        if self._broken:
            return
        try:
            super().log(level, msg, *args, **{"stacklevel": 2} | kwargs)
        except Exception as exc:
            if raised_by_signal(exc):
                raise
            self._broken = True
            say(  # as logging itself tells of a handler that raises
                f"{self.loader_name}: a logging handler raised, and this epoch has no more "
                f"lines in the log\n{text_of(exc)}"
            )

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """As :class:`logging.LoggerAdapter` has it."""
        return f"{self.full_name.replace('%', '%%')}: {msg}", kwargs

    @property
    def full_name(self) -> str:
        """The words before the colon."""
        rank = f", rank {self.at.rank}" if str(self.at) else ""
        return f"{self.loader_name}{rank}"

    def own_fault(
        self, part: str, exc: BaseException, off: str = "off for the rest of this epoch"
    ) -> None:
        """A part of ours failed, and is ``off``."""
        self.error(
            "%s failed and is %s; training goes on. This is a fault of safeloader's own, please "
            "report it:\n%s",
            part,
            off,
            text_of(exc),
        )

    def caught(self, part: str, exc: Exception) -> None:
        """As :func:`guarded`, where its calls would take longer than what is done within."""
        if raised_by_signal(exc):
            raise exc
        self.own_fault(part, exc)


class _Guard:
    # No generator under @contextmanager: an epoch begins and ends within a dozen of these.
    __slots__ = "_log", "_part"

    def __init__(self, part: str, log: Callable[[], LoaderLog]) -> None:
        self._part, self._log = part, log

    def __enter__(self) -> None:
        pass

    def __exit__(self, cls: Any, exc: BaseException | None, tb: Any) -> bool | None:
        if not isinstance(exc, Exception) or raised_by_signal(exc):
            return None  # or it is the user's, which only struck here
        self._log().own_fault(self._part, exc)
        return True


guarded: Callable[[str, Callable[[], LoaderLog]], AbstractContextManager[None, bool | None]]
guarded = _Guard
"""What is done within is ours: a fault of it ends ``part``, and is told and not raised.

``log`` gives the log to tell it in; made where it is wanted, as it takes 30 µs or more.
"""


def say(said: str) -> None:
    """A line on stderr; nothing where the program has closed it, or put there what fails."""
    try:
        if sys.stderr is not None:
            sys.stderr.write(f"{said}\n")  # at once: other processes write there too
            sys.stderr.flush()
    except Exception as exc:
        if raised_by_signal(exc):
            raise


def text_of(exc: BaseException) -> str:
    """The traceback as text, without what looks like a secret.

    A handler that keeps records would keep the exception's frames, and the data in them.
    """
    return bounded(scrub("".join(traceback.format_exception(exc)).rstrip()), _TRACEBACK_CHARS)


_DRAW_NOTHING = (list, tuple, dict, range)


def length_of(sized: Any) -> int | None:
    """``len()`` of a dataset or sampler, the generators left as they were; None without one.

    It is asked where torch's sampler asks the same: in the thread that begins the epoch. When
    something has failed, the user's ``__len__`` may wait for a lock that was left behind.
    """
    try:
        if type(sized) in _DRAW_NOTHING or only_reads(sized):
            return len(sized)
        with preserved():
            return len(sized)
    except Exception as exc:  # no __len__, or one that raises: what is said does without
        if raised_by_signal(exc):
            raise
        return None
