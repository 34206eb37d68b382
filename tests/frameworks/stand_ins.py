"""What frameworks do to a loader, each in a few lines on torch alone; and means to look at it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import psutil
from torch.utils.data import DataLoader, IterableDataset

from safeloader import EpochAudit, Recorder, SafeDataLoader

PATIENCE_S = 30.0  # a bound on waiting for what is already under way, not a time to wait


def accepted_keywords(loader: Any) -> dict[str, inspect.Parameter]:
    """What the constructor takes, by signature; ``**kwargs`` is taken to lead to torch's own."""
    parameters = dict(inspect.signature(loader.__init__).parameters)
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        parameters |= inspect.signature(DataLoader.__init__).parameters
    return parameters


def constructor_arguments(loader: Any, **replaced: Any) -> dict[str, Any]:
    """Keywords that make the loader again: its public instance attributes that ``__init__`` takes.

    Lightning reads them so for a loader made outside of its hooks.
    """
    public = {name: value for name, value in vars(loader).items() if not name.startswith("_")}
    public["multiprocessing_context"] = loader.multiprocessing_context
    accepted = accepted_keywords(loader)
    arguments = {
        name: value
        for name, value in public.items()
        if name == "dataset" or (name in accepted and value is not accepted[name].default)
    }
    if isinstance(loader.dataset, IterableDataset):
        return arguments | {"sampler": None, "batch_sampler": None}
    given = {"sampler": loader.sampler, "batch_sampler": None, "shuffle": False}
    return arguments | given | replaced


def recreated(loader: Any, **replaced: Any) -> Any:
    """The loader made again by its own class, as Lightning and ignite do."""
    return type(loader)(**constructor_arguments(loader, **replaced))


def with_the_state_of(loader: Any, cls: type) -> Any:
    """An object of ``cls`` whose ``__init__`` never ran, with the attributes of ``loader``."""
    made = object.__new__(cls)
    made.__dict__.update(vars(loader))
    return made


def exactly_as_many_as_it_has(loader: Any) -> list[Any]:
    """The batches of a training loop that counts and never asks for the end; the iterator goes."""
    iterator = iter(loader)
    return [next(iterator) for _ in range(len(loader))]


def one_ahead(loader: Any) -> Iterator[tuple[int, Any, Any]]:
    """``(n, batch, the one after it or None)``: the next is fetched before this one is used."""
    iterator = iter(loader)
    coming = next(iterator, None)
    n = 0
    while coming is not None:
        batch, coming = coming, next(iterator, None)
        yield n, batch, coming
        n += 1


class KeepsAudits(Recorder):
    """A notebook that keeps the way to every epoch's audit, not to the newest alone."""

    def __init__(self) -> None:
        super().__init__()
        self._ways: list[Callable[[], EpochAudit]] = []

    def begin_epoch(self, audit: Callable[[int], EpochAudit]) -> int:
        epoch = super().begin_epoch(audit)
        self._ways.append(lambda: audit(epoch))
        return epoch

    def audits(self) -> list[EpochAudit]:
        return [way() for way in self._ways]


class RemembersWrites(SafeDataLoader):  # type: ignore[type-arg]
    """Notes every attribute written, as Fabric's wrapper around ``__setattr__`` does."""

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__.setdefault("_writes", []).append(name)
        super().__setattr__(name, value)


class Pids:
    """Every sample is the process that fetched it."""

    def __init__(self, length: int = 12) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return os.getpid()


def workers_of(iterator: Any) -> list[psutil.Process]:
    return [psutil.Process(worker.pid) for worker in iterator._workers]


def still_alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended within a bound."""
    return psutil.wait_procs(processes, timeout=PATIENCE_S)[1]
