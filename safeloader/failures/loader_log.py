"""The log lines of one loader, which begin with its name. Runs in: main."""

from __future__ import annotations

import logging
import traceback
from collections.abc import MutableMapping
from typing import Any

from safeloader.introspect.random_state import preserved
from safeloader.introspect.redaction import scrub
from safeloader.introspect.values import bounded, plain_length, short_type_name, type_name

_TRACEBACK_CHARS = 40_000


class LoaderLog(logging.LoggerAdapter[logging.Logger]):
    """The package's logger; each line begins with ``SafeDataLoader over ImageFolder (50000): ``.

    A program has several loaders, for training and validation at least.

    Attributes:
        length: of the dataset, as far as known.
        loader_name: the words before the colon.
    """

    def __init__(self, dataset: Any, length: int | None = None) -> None:
        super().__init__(logging.getLogger("safeloader"), {})
        self.length = plain_length(dataset) if length is None else length
        kind = short_type_name(type_name(type(dataset)))
        size = "" if self.length is None else f" ({self.length})"
        self.loader_name = f"SafeDataLoader over {kind}{size}"

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """As :class:`logging.LoggerAdapter` has it."""
        return f"{self.loader_name.replace('%', '%%')}: {msg}", kwargs

    def exception(self, msg: object, *args: object, **_: Any) -> None:
        """A fault of ours, its traceback below it, without what looks like a secret."""
        self.error(f"{msg}\n%s", *args, bounded(scrub(traceback.format_exc()), _TRACEBACK_CHARS))


def length_of(sized: Any) -> int | None:
    """``len()`` of a dataset or sampler, the generators left as they were; None without one.

    It is asked where torch's sampler asks the same: in the thread that begins the epoch. When
    something has failed, the user's ``__len__`` may wait for a lock that was left behind.
    """
    try:
        with preserved():
            return len(sized)
    except Exception:  # no __len__, or one that raises: what is said does without
        return None
