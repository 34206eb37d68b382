"""A sample once more, under the random numbers it had. Runs in: main."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch.utils.data import IterableDataset

from safeloader.errors import SafeLoaderError
from safeloader.failures import dump, random_numbers
from safeloader.failures.failure import Failure
from safeloader.failures.loader_log import LoaderLog
from safeloader.introspect.dataset_state import changes, describe
from safeloader.introspect.random_state import RandomState, preserved
from safeloader.introspect.seeds import SeededAs, Seeder, sample_is, sample_now
from safeloader.introspect.texts import index_text, indices_text

_NOT_BY_US = (
    "No SafeDataLoader raised this error (under SAFELOADER=off none does), and it names no sample: "
    "except SafeLoaderError keeps others away"
)
_NO_JSON = "Of what on_failure_dump= wrote give the file: replay(pathlib.Path(...), dataset)"


def replay(what: SafeLoaderError | Failure | Any, dataset: Any) -> Any:
    """``dataset[index]``, called here as it was called where it failed.

    For an error or its failure, the generators of python, numpy and torch are first put where they
    stood when the batch was begun, and the samples before it are fetched, so that the sample draws
    the numbers it drew there; of a loader with ``seed=`` they are seeded as they were there, for
    the sample alone with ``seed_per="sample"``. Afterwards they are put back. What the dataset
    raises is raised as it is: run it under a debugger (``python -m pdb``, or a ``breakpoint()``
    there).

    Where the sample comes although it failed there, a warning in the log says so, and what differs
    here; where it cannot have the random numbers that it had, as for a bare index, one says that.

    Args:
        what: an error of this package, its ``failure``, the path (a ``pathlib.Path``) of a file
            that ``on_failure_dump=`` or a run's folder has of it, or an index.
        dataset: the dataset; ``loader.replay(error)`` knows it.

    Returns:
        The sample, if it comes this time.

    Raises:
        TypeError: for an iterable dataset, which has no index to be asked for.
        ValueError: for a failure that names no index, and a file that holds none.
        OSError: for a file that cannot be read.

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
    if isinstance(what, os.PathLike):
        what = dump.read(what)
    if isinstance(what, BaseException | dict):
        raise TypeError(
            "replay() takes an error of safeloader, its failure, the file of one, or an index, not "
            f"{type(what).__name__}. {_NOT_BY_US if isinstance(what, BaseException) else _NO_JSON}"
        )
    if not isinstance(what, Failure):
        if "collate_ns" in getattr(type(what), "__dataclass_fields__", ()):
            raise TypeError(_BY_LOADER)
        return replay_index(what, dataset)
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
    *before, asked = _as_drawn(what)
    if what._seeded is not None:
        sample = seeded_again(dataset, before, asked, what._seeded)
    else:
        with preserved():
            if what._random is not None:
                what._random.set()
                for index in before:
                    with suppress(Exception):  # skipped there too, with the numbers it drew
                        dataset[index]
            sample = dataset[asked]
    # Of what failed in collation or on the way the sample came there too.
    if what.phase in _OF_SAMPLE and not what._refused_by:
        LoaderLog(dataset).warning("%s", _passes(what, dataset))
    return sample


def _as_drawn(failure: Failure) -> list[Any]:
    """The indices of the batch up to the failing one, as the dataset was given them."""
    with suppress(Exception):  # a class that cannot be imported here
        if failure._drawn is not None:
            return list(pickle.loads(failure._drawn))
    return [*failure.indices[: failure.position], failure.index]


def seeded_again(dataset: Any, before: Sequence[Any], asked: Any, seeded: SeededAs) -> Any:
    """``dataset[asked]`` under the numbers that ``seed=`` gave it; generators stay where they are.

    ``before`` is what was fetched before it in its batch: where that was seeded, and not each of
    its samples, it is fetched here too.
    """
    with _under(seeded) as seeder:
        for index in before if seeded.per == "batch" else ():
            with suppress(Exception):  # skipped there too, with the numbers it drew until then
                seeder.sample(index)
                dataset[index]
        seeder.sample(asked)
        return dataset[asked]


def seeded_at_once(dataset: Any, indices: Sequence[Any], position: int, seeded: SeededAs) -> Any:
    """As :func:`seeded_again`, of a batch that the dataset made in one call."""
    with _under(seeded):
        return dataset.__getitems__(list(indices))[position]


@contextmanager
def _under(seeded: SeededAs) -> Iterator[Seeder]:
    """Within, the generators begin a batch as they began it there."""
    seed, now = seeded.batch, sample_now()
    seeder = Seeder(seeded.per)
    try:
        with preserved():
            seeder.begin(seed.seed, seed.epoch)
            seeder.batch(seed.bytes)
            yield seeder
    finally:
        sample_is(now)


def replay_index(index: Any, dataset: Any, told: str = "") -> Any:
    """``dataset[index]``, and a word on the random numbers: it draws what comes next here.

    ``told`` is what is known of its delivery.
    """
    before = _generators()
    sample = dataset[index]
    LoaderLog(dataset).warning(
        "index %s%s: called without the random numbers that it had, as only those of a failure "
        "are kept; %s",
        index_text(index),
        f", {told}" if told else "",
        "it draws others here" if _generators() != before else _DRAWS_NONE,
    )
    return sample


def _generators() -> bytes:
    state = RandomState.now()
    return pickle.dumps((state.python, state.numpy, state.torch.numpy()))


def _passes(failure: Failure, dataset: Any) -> str:
    """That a sample comes here which failed there, and what differs."""
    here = f"here the main process (pid {os.getpid()})"
    there = f"it was worker {failure.worker_id} (pid {failure.pid})"
    if failure.worker_id is None:
        there = f"it was the main process (pid {failure.pid})"
    differs = [] if failure.pid == os.getpid() else [f"the process: {there}, {here}"]
    with suppress(Exception):  # it came, and that is said all the same
        was = failure.dataset_state or {}
        now = describe(dataset, length=was.get("length"))
        differs += [f"dataset: {name} {how}" for name, how in changes(was, now).items()][:_SHOWN]
    known = random_numbers.of_sample(failure)
    if not known:
        why = random_numbers.why_not_known(failure)
        differs.append(f"the random numbers, which are not known: {why}")
    said = f"index {index_text(failure.index)} passes here: {_DID[failure.phase]} there. "
    said += f"What differs is {'; '.join(differs)}. " if differs else ""
    if known:
        own = random_numbers.of_its_own(dataset)
        but = f", but for those of {', '.join(own)}, which nobody keeps" if own else ""
        said += f"The random numbers are the same{but}. "
    if failure._inherited:
        inherited = failure._inherited.removeprefix("first suspect: ")
        return f"{said}That it passes says nothing: {inherited}; {_NOT_SEEN_HERE}"
    return said + _MORE


_OF_SAMPLE = ("sample", "crash", "timeout")
_DID = {"sample": "it raised", "crash": "it killed its worker", "timeout": "it hung"}
_SHOWN = 5  # attributes that differ
_DRAWS_NONE = "here it draws none from Python's, NumPy's and torch's own generators"
_NOT_SEEN_HERE = "in the main process, to which it belongs, it does not show"
_MORE = (
    "Not seen from here: what it reads (a file, a share, a service) may be another by now, and "
    "what the worker did before it"
)
_BY_LOADER = (
    "the record of a batch is replayed by its loader, which knows the epoch and the worker: "
    "loader.replay(loader.last_batch, position=0)"
)
