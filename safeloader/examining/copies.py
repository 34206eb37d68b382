"""Workers' copies of the dataset: their random numbers, their epoch, their share. Runs in: main.

Two workers are started as the user's loader would start them, but for their collate function, which
tells what their copies are like (:mod:`safeloader.examining.probe`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from multiprocessing import get_all_start_methods, get_context
from typing import Any

from torch.utils.data import DataLoader

from safeloader import _torch
from safeloader.examining.finding import search
from safeloader.examining.inheriting import fork_breaks
from safeloader.examining.probe import GLOBAL, Initialized, Probe, Told, scalars_of
from safeloader.examining.samples import raised
from safeloader.examining.subject import Subject
from safeloader.examining.talk import Suspects, Talk

_WORKERS = 2
_SAMPLES = 8  # of a stream, of each worker
_EPOCHS = 3
_TRIES = 3
_BATCHES = 2  # of an epoch, for each worker


def look(subject: Subject, talk: Talk) -> None:
    """Look at streams, generators and epochs, in this order."""
    methods = get_all_start_methods()
    # A forked copy is like a spawned one, and there at once; but not where a fork breaks it.
    forks = "fork" in methods and (subject.method == "fork" or not fork_breaks(subject))
    method = "fork" if forks or subject.unpicklable() else subject.method
    for _ in range(_TRIES):
        try:
            _look(subject, talk, method)
            return
        except Exception as exc:
            if not search(subject, talk, talk.suspects):
                talk.tell("workers_raise", method=method, **raised(exc))
                return
            # It fails without workers too, which was told: once more without that index.


def _look(subject: Subject, talk: Talk, method: str) -> None:
    if subject.is_stream:
        _look_at_streams(subject, talk, method)
    else:
        _look_at_generators(subject, talk, method)
    if talk.left() > 0:
        _look_at_epochs(subject, talk, method)


def _loader(subject: Subject, method: str, persistent: bool, **draws: Any) -> Any:
    init = subject.worker_init_fn
    return DataLoader(
        subject.dataset,
        num_workers=_WORKERS,
        multiprocessing_context=get_context(method),
        worker_init_fn=init if subject.seed is None else Initialized(init, subject.seed),
        collate_fn=Probe(),
        persistent_workers=persistent,
        **draws,
    )


def _first(loader: Any, most: int, *, end: bool = True) -> list[Told]:
    """What the workers tell first; no more is asked for, and persistent ones stay till the end."""
    iterator = iter(loader)
    try:
        told = [*itertools.islice(iterator, most)]
    except BaseException:
        _torch.abandon(loader, iterator)  # or torch waits for its workers, which others hold up
        raise
    if end or not loader.persistent_workers:
        _torch.abandon(loader, iterator)
    return told


def _by_worker(told: list[Told]) -> tuple[list[Told], list[Told]]:
    first, second = ([each for each in told if each.worker == k] for k in range(_WORKERS))
    return first, second


# ── generators


def _look_at_generators(subject: Subject, talk: Talk, method: str) -> None:
    talk.at(f"starting {_WORKERS} workers by {method}")
    found = subject.indices(4)
    if len(found) < 4:
        return
    a, b, c, d = found
    # The same index for both workers, then others: a generator seeded by the index is no finding.
    batches = [[a], [a], [b], [b], [c], [d], [d], [c]]
    alone = [[each] for each in found] if subject.batched else found
    talk.suspect(Suspects(alone, collated=False))
    loader = _loader(subject, method, False, batch_sampler=batches)
    first, second = _by_worker(_first(loader, len(batches)))
    talk.fetched(len(batches))
    if len(first) < 4 or len(second) < 4:
        return
    paths = [path for path in first[0].generators if path in second[0].generators]
    same = [path for path in paths if _draw_the_same(path, first, second)]
    talk.tell(
        "generators",
        same=[path for path in same if path not in GLOBAL],
        same_global=[GLOBAL[path] for path in same if path in GLOBAL],
        method=method,
        init=subject.worker_init_fn is not None,
    )


def _draw_the_same(path: str, first: list[Told], second: list[Told]) -> bool:
    """Whether a generator moved in both workers, and stood at the same places."""
    states = [[each.generators.get(path) for each in told] for told in (first, second)]
    moved = all(len(set(each)) > 1 for each in states)
    return moved and states[0] == states[1]


# ── streams


def _look_at_streams(subject: Subject, talk: Talk, method: str) -> None:
    talk.at(f"starting {_WORKERS} workers by {method}")
    talk.suspect(Suspects([], samples=_WORKERS * _SAMPLES))
    told = _first(_loader(subject, method, False, batch_size=1), _WORKERS * _SAMPLES)
    talk.fetched(len(told))
    first, second = ([each.sample for each in worker] for worker in _by_worker(told))
    count = min(len(first), len(second))
    if count > 1 and first[:count] == second[:count] and len({*first}) > 1 and 0 not in first:
        talk.tell("one_stream", samples=count, length=subject.length() is not None)


# ── epochs


class _Few:
    """The first batches of each epoch of a sampler, which is asked when torch would ask it."""

    def __init__(self, drawn: Any, subject: Subject, talk: Talk, count: int) -> None:
        self._drawn, self._subject, self._talk, self._count = drawn, subject, talk, count

    def __iter__(self) -> Iterator[list[Any]]:
        firsts: list[list[Any]] = []
        for batch in itertools.islice(iter(self._drawn), self._count):
            indices = list(batch) if self._subject.batched else [batch]
            firsts.append([index for index in indices if not self._subject.is_bad(index)][:1])
        alone = firsts if self._subject.batched else [each for first in firsts for each in first]
        self._talk.suspect(Suspects(alone, collated=False))
        yield from firsts


def _look_at_epochs(subject: Subject, talk: Talk, method: str) -> None:
    """Call ``set_epoch`` as a training loop does, and compare scalars here and there."""
    drawn = subject.batch_sampler if subject.batched else subject.sampler
    holders = {"dataset": subject.dataset, "sampler": drawn}
    holders["sampler"] = getattr(drawn, "sampler", drawn) if not _settable(drawn) else drawn
    settable = {name: each for name, each in holders.items() if _settable(each)}
    of_epoch = [path for path in scalars_of(subject.dataset) if "epoch" in path.lower()]
    if not settable and not of_epoch:
        return
    draws: dict[str, Any] = {"batch_size": 1}
    if not subject.is_stream:
        draws = {"batch_sampler": _Few(drawn, subject, talk, _BATCHES * _WORKERS)}
    persistent = subject.persistent_workers
    loader = _loader(subject, method, persistent, **draws)
    moments = [scalars_of(subject.dataset)]
    stale: dict[str, tuple[Any, Any, int]] = {}
    for epoch in range(1, _EPOCHS + 1):
        for name, each in settable.items():
            talk.at(f"{name}.set_epoch({epoch})")
            each.set_epoch(epoch)
        talk.at(f"epoch {epoch} in {_WORKERS} workers")
        told = _first(loader, _BATCHES * _WORKERS, end=epoch == _EPOCHS)
        talk.fetched(len(told))
        moments.append(scalars_of(subject.dataset))
        changed = {path for path in moments[-1] if moments[-1][path] != moments[0].get(path)}
        for one in told:
            for path in changed & one.scalars.keys():
                if one.scalars[path] != moments[-1][path]:
                    stale[path] = moments[-1][path], one.scalars[path], epoch
        if talk.left() < 0:
            break
    for path, (here, there, epoch) in list(stale.items())[:3]:
        talk.tell(
            "stale",
            path=path,
            here=here,
            there=there,
            epoch=epoch,
            persistent=persistent,
            set_by=sorted(settable),
        )


def _settable(thing: Any) -> bool:
    return callable(getattr(thing, "set_epoch", None))
