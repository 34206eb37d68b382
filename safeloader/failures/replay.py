"""A sample once more, under the random numbers it had. Runs in: main."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from torch.utils.data import IterableDataset

from safeloader.errors import SafeLoaderError
from safeloader.failures.failure import Failure
from safeloader.failures.loader_log import LoaderLog
from safeloader.introspect.random_state import preserved
from safeloader.introspect.texts import index_text, indices_text

_NOT_BY_US = (
    "No SafeDataLoader raised this error (under SAFELOADER=off none does), and it names no sample: "
    "except SafeLoaderError keeps others away"
)
_NO_JSON = (
    "A JSON file of on_failure_dump= holds no random state: give the index it names, or keep the "
    "error itself by pickle"
)


def replay(what: SafeLoaderError | Failure | Any, dataset: Any) -> Any:
    """``dataset[index]``, called here as it was called where it failed.

    For an error or its failure, the generators of python, numpy and torch are first put where they
    stood when the batch was begun, and the samples before it are fetched, so that the sample draws
    the numbers it drew there. Afterwards the generators are put back. What the dataset raises is
    raised as it is: run it under a debugger (``python -m pdb``, or a ``breakpoint()`` there).

    Args:
        what: an error of this package, its ``failure``, or an index.
        dataset: the dataset; ``loader.replay(error)`` knows it.

    Returns:
        The sample, if it comes this time.

    Raises:
        TypeError: for an iterable dataset, which has no index to be asked for.
        ValueError: for a failure that names no index.

    Example:
        >>> import random
        >>> from safeloader import SafeDataLoader, SampleError, replay
        >>> class Dataset:
        ...     def __len__(self):
        ...         return 8
        ...     def __getitem__(self, index):
        ...         self.drawn = random.random()
        ...         return 1 / (index - 5)
        >>> dataset = Dataset()
        >>> try:
        ...     list(SafeDataLoader(dataset, batch_size=4))
        ... except SampleError as error:
        ...     failure, drawn = error.failure, dataset.drawn
        >>> try:
        ...     replay(failure, dataset)
        ... except ZeroDivisionError:
        ...     print(failure.index, dataset.drawn == drawn)
        5 True
    """
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            "replay() asks the dataset for an index, and an iterable dataset has none: iterate it "
            "here up to the sample. get_worker_info() is None here: a dataset that shares itself "
            "out by it has to be given the worker's share by hand"
        )
    if isinstance(what, SafeLoaderError):
        if what.failure is None:
            raise ValueError(f"{what!r} carries no failure to replay")
        what = what.failure
    if isinstance(what, BaseException | os.PathLike | dict):
        raise TypeError(
            "replay() takes an error of safeloader, its failure, or an index, not "
            f"{type(what).__name__}. {_NOT_BY_US if isinstance(what, BaseException) else _NO_JSON}"
        )
    if not isinstance(what, Failure):
        return dataset[what]
    if what.index is None or what.position is None:
        at = f"the indices of its batch are {indices_text(what.indices, most=16)}: replay one"
        raise ValueError(
            f"this failure ({what.phase}) names no single sample; "
            f"{at if what.indices else 'there is nothing to replay'}"
        )
    if what.phase in ("crash", "timeout"):
        LoaderLog(dataset).warning(
            "index %s %s its worker: replaying it here may do the same to this process",
            index_text(what.index),
            "killed" if what.phase == "crash" else "hung",
        )
    with preserved():
        if what._random is not None:
            what._random.set()
            for index in what.indices[: what.position]:
                with suppress(Exception):  # skipped there too, with the numbers it drew until then
                    dataset[index]
        return dataset[what.index]
