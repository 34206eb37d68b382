"""How many batches a loader says it has, asked where asking changes nothing. Runs in: main.

``len(loader)`` is the ``__len__`` of its sampler, which may be the user's code: torch asks for it
only where somebody wants to know. It is asked here as an epoch begins where its byte code shows
that nothing changes by that. Of any other sampler the program's own ``len(loader)`` is taken, if it
asked before this epoch.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch.utils.data import DataLoader

from safeloader.failures.loader_log import length_of
from safeloader.introspect.asking import asking_changes_nothing
from safeloader.introspect.values import definitions, mro_of, namespace_of
from safeloader.main.drawing import length_is_true
from safeloader.main.epoch import NOT_ANNOUNCED, Announced

_PROVEN = Announced(proven=True)
_TORCHS_LEN = definitions(DataLoader, "__len__")[0]


def announced(
    loader: DataLoader[Any], sampler: Any, stream: bool, length: int | None, said: int | None
) -> Announced:
    """What ``len(loader)`` says.

    Args:
        loader: any loader.
        sampler: what it draws from.
        stream: whether its dataset is iterable-style.
        length: of the dataset, where that is known.
        said: what it said when the program asked, since the last epoch began; None if it did not.
    """
    kind: Any = type(loader)
    if not _is_torchs_length(kind, kind.__len__, DataLoader.__len__):
        return NOT_ANNOUNCED
    if stream:
        return Announced(_of_stream(loader, length))
    if length_is_true(sampler):
        return _PROVEN
    return Announced(length_of(sampler) if asking_changes_nothing(sampler) else said)


@functools.lru_cache(64)
def _is_torchs_length(cls: Any, *methods: Any) -> bool:
    """Whether ``len()`` of such a loader is the number that torch computes.

    ``methods`` are those of the class and of torch's: a program may put in others.
    """
    for space in map(namespace_of, mro_of(cls)):
        if "__len__" in space and not is_noting(space["__len__"]):
            return space["__len__"] is _TORCHS_LEN
    return False


def is_noting(method: Any) -> bool:
    """Whether it is ``SafeDataLoader.__len__``, which notes what torch's says."""
    return type(method) is types.FunctionType and method.__module__ == "safeloader.loader"


def _of_stream(loader: DataLoader[Any], length: int | None) -> int | None:
    size = loader.batch_size
    if length is None or size is None:
        return length
    return length // size if loader.drop_last else -(-length // size)
