"""Which loader a line in the log is about; runs in main."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any

from safeloader.wire.random_state import preserved
from safeloader.wire.values import type_name
from safeloader.wire.wording import short_type_name


class LoaderLog(logging.LoggerAdapter[logging.Logger]):
    """The package's logger; each line begins with ``SafeDataLoader over ImageFolder (50000): ``.

    A program has several loaders, for training and validation at least. The dataset is asked for
    its length when a line is written and not before, and is not kept alive.
    """

    def __init__(self, dataset: Any) -> None:
        super().__init__(logging.getLogger("safeloader"), {})
        self._kind = short_type_name(type_name(type(dataset)))
        self._dataset: Callable[[], Any]
        try:
            self._dataset = weakref.ref(dataset)
        except TypeError:  # a list, say
            self._dataset = lambda: dataset

    @functools.cached_property
    def loader_name(self) -> str:
        """The words before the colon."""
        length = length_of(self._dataset())
        return f"SafeDataLoader over {self._kind}" + ("" if length is None else f" ({length})")

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """As :class:`logging.LoggerAdapter` has it."""
        return f"{self.loader_name.replace('%', '%%')}: {msg}", kwargs


def length_of(sized: Any) -> int | None:
    """``len()`` of a dataset or sampler, the generators left as they were; None without one."""
    try:
        with preserved():
            return len(sized)
    except Exception:  # no __len__, or one that raises: what is said does without
        return None
