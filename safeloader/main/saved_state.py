"""The state of a loader as it is saved, and which loader may go on from it. Runs in: main.

Plain values that JSON takes, so that it fits into any checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

from safeloader.delivery.position import Place, Rung
from safeloader.errors import ResumeError
from safeloader.introspect.texts import bounded_text

FORMAT = 1
NOWHERE = Place(0, 0, b"")
_NAME = "safeloader"  # under which the format stands
_CHECK = "check"  # under which a digest of all the rest stands
_OF_USER = ("dataset_state", "dataset_iter_state")  # which may be anything
OF_DATASET = ("_snapshot", "dataset_state", "fetcher_state", "read", "keys")
_OF_PLACE = ("batches", "samples", "digest", "ladder", "beyond")
_BY_JSON = ("left_out", *OF_DATASET)
_THEIRS = ("_snapshot", "fetcher_state", "_sampler_iter_state", "_index_sampler_state")


@dataclasses.dataclass(frozen=True)
class SavedState:
    """Where a loader was.

    Attributes:
        epoch: the number of the epoch, by the loader's own count.
        place: how far it was; the beginning for one that was not begun.
        ladder: digests of earlier places.
        begun: whether its draws had begun.
        generators: by moment, the states of the generators that its draws began from; of an epoch
            that was not begun, where they stood as the state was taken.
        left_out: of the indices before ``place``, how many in each class did not come, and the
            first of them.
        length: of the dataset; None where it has none.
        batch_size: the loader's, None with a batch sampler of the user's or without batching.
        seed: the loader's.
        seed_per: what it seeds.
        world_size: the number of ranks; None outside of distributed training.
        rank: of the process; None outside of distributed training.
        order: of a :class:`~safeloader.GlobalBatchSampler`, what its order is made from.
        stream: whether the dataset is iterable-style.
        workers: how many read it.
        dataset: the states of the dataset itself, as
            :class:`~safeloader.main.dataset_places.DatasetPlaces` saves them.
        origin: which epoch of which run it is of, where that is written into a folder.
    """

    epoch: int = 0
    place: Place = NOWHERE
    ladder: tuple[Rung, ...] = ()
    begun: bool = False
    generators: dict[str, Any] = dataclasses.field(default_factory=dict)
    left_out: dict[str, Any] = dataclasses.field(default_factory=dict)
    length: int | None = None
    batch_size: int | None = None
    seed: int | None = None
    seed_per: str | None = None
    world_size: int | None = None
    rank: int | None = None
    dataset: dict[str, Any] = dataclasses.field(default_factory=dict)
    order: dict[str, Any] = dataclasses.field(default_factory=dict)
    stream: bool = False
    workers: int = 0
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what says nothing is left out."""
        return EpochStates(self).at(self.place, self.ladder, self.left_out, self.dataset)

    def _lasting(self) -> dict[str, Any]:
        """What all states of an epoch have in common, as plain values."""
        found: dict[str, Any] = {_NAME: FORMAT, "epoch": self.epoch}
        for name in ("generators", "order", "origin"):
            if given := getattr(self, name):
                found[name] = given
        for name in ("length", "batch_size", "seed", "seed_per", "world_size", "rank"):
            if (value := getattr(self, name)) is not None:
                found[name] = value
        if self.stream:
            found |= {"stream": True, "workers": self.workers}
        return found

    @classmethod
    def of(cls, state: Any) -> SavedState:
        """A state that was saved.

        Raises:
            ResumeError: for what is none, or none that is understood here.
        """
        if not isinstance(state, dict):
            raise ResumeError(
                f"a state is a dict, as state_dict() gives it; got {bounded_text(state)}"
            )
        if not state:
            return cls()
        if _NAME not in state:
            raise ResumeError(_foreign(state))
        if state[_NAME] != FORMAT:
            raise ResumeError(
                f"this state has format {bounded_text(state[_NAME])}, and this release of "
                f"safeloader reads format {FORMAT}: upgrade safeloader to the release that saved it"
            )
        try:
            if state.get(_CHECK, "") not in ("", _check(state)):
                raise ValueError("a part of it is missing or another")
            place = Place(
                state.get("batches", 0),
                state.get("samples", 0),
                bytes.fromhex(state.get("digest", "")),
                tuple(state.get("beyond", ())),
            )
            ladder = tuple(Rung(b, s, bytes.fromhex(d)) for b, s, d in state.get("ladder", ()))
            apart = {"place", "ladder", "begun", "dataset"}
            known = {each.name for each in dataclasses.fields(cls)} - apart
            more = {name: state[name] for name in known if name in state}
            more["dataset"] = {name: state[name] for name in OF_DATASET if name in state}
            saved = cls(place=place, ladder=ladder, begun="batches" in state, **more)
            saved._see_whole()
        except (TypeError, ValueError, AttributeError) as exc:
            raise ResumeError(
                f"this state is damaged ({exc}): it is not as state_dict() gave it. Take an "
                "earlier checkpoint"
            ) from exc
        return saved

    def _see_whole(self) -> None:
        numbers = [self.epoch, self.place.batches, self.place.samples, *self.place.beyond]
        numbers += [each for each in (self.length, self.batch_size, self.seed) if each is not None]
        if not all(type(each) is int and each >= 0 for each in numbers):
            raise ValueError("a count is no count")
        if self.begun and not (self.place.digest or self.dataset):
            raise ValueError("no digest")
        for name in ("generators", "left_out", "order", "origin"):
            if not isinstance(getattr(self, name), dict):
                raise TypeError(f"{name} is no dict")

    def refuse_unlike(self, loader: SavedState) -> None:
        """That a loader, as its own state describes it, may go on from here.

        Raises:
            ResumeError: if it may not, with what to do.
        """
        if (self.seed, self.seed_per) != (loader.seed, loader.seed_per) and self != SavedState():
            raise ResumeError(
                f"the state was saved with {_seeds(self)}, and this loader has {_seeds(loader)}: "
                f"the order and the random numbers would be others. Give it {_seeds(self)}"
            )
        if not self.begun:
            return
        if self.length != loader.length:
            raise ResumeError(
                f"the dataset has {_samples(loader.length)} now and had {_samples(self.length)} "
                "when the state was saved: the epoch would draw other indices. Resume with the "
                "dataset as it was, or begin a new epoch: load_state_dict({}), then set_epoch"
                f"({self.epoch + 1})"
            )
        if bool(self.order) != bool(loader.order):
            one, other = ("a", "none") if self.order else ("no", "one")
            cure = "with that sampler" if self.order else "without one"
            raise ResumeError(
                f"the state was saved with {one} GlobalBatchSampler, and this loader has {other}: "
                f"the order would be another. Resume {cure}, or begin anew: load_state_dict({{}})"
            )
        if self.batch_size != loader.batch_size and not self._may_change_batches(loader):
            allows = ", or train with seed= and seed_per='sample', which allows another size"
            if self.seed_per == "sample" or None in (self.batch_size, loader.batch_size):
                allows = ""
            raise ResumeError(
                f"the state was saved with {_batches(self.batch_size)}, and this loader has "
                f"{_batches(loader.batch_size)}: the batches begin elsewhere. Resume with "
                f"{_batches(self.batch_size)}{allows}"
            )
        if self.workers != loader.workers and self.stream:
            raise ResumeError(
                f"the stream was read by {_by(self.workers)} when the state was saved, and this "
                f"loader has num_workers={loader.workers}: each worker's share is another. Resume "
                f"with num_workers={self.workers}"
            )
        if self.order:
            self._refuse_other_order(loader)
            return
        if (self.world_size or 1) != (loader.world_size or 1):
            raise ResumeError(
                f"the state was saved by one of {self.world_size or 1} ranks, and there are "
                f"{loader.world_size or 1} now: each rank's share is another. Resume on "
                f"{self.world_size or 1}, or draw with GlobalBatchSampler, which allows another "
                "number"
            )
        if self.stream and None not in (self.rank, loader.rank) and self.rank != loader.rank:
            raise ResumeError(
                f"this is the state of rank {self.rank}, and this is rank {loader.rank}: it would "
                "read the other's share of the stream. Save a state in each rank, and load it there"
            )

    def _refuse_other_order(self, loader: SavedState) -> None:
        """Any rank's state will do, on any number of ranks, if the order of all is the same."""
        apart = ("epoch", "digest")
        names = [each for each in self.order if each not in apart]
        unlike = [
            f"{name}={then!r}, now {now!r}"
            for name in names
            if (then := self.order.get(name)) != (now := loader.order.get(name))
        ]
        if unlike:
            raise ResumeError(
                "the GlobalBatchSampler was another when the state was saved: "
                f"{'; '.join(unlike)}. The order of all ranks would be another: make it as it was"
            )

    def _may_change_batches(self, loader: SavedState) -> bool:
        both = self.batch_size is not None and loader.batch_size is not None
        return both and self.seed_per == "sample" and not self.place.beyond


class EpochStates:
    """Makes the states of one epoch; hot path: what they have in common is digested once.

    Args:
        saved: one of them.
    """

    def __init__(self, saved: SavedState) -> None:
        self._begun = saved.begun
        self._lasting = _copied(saved._lasting())
        self._digest = _digest(self._lasting)

    def at(
        self,
        place: Place,
        ladder: Iterable[Rung],
        left_out: dict[str, Any],
        dataset: dict[str, Any],
    ) -> dict[str, Any]:
        """The state at a place: a dict of its own, whatever is done to it."""
        state: dict[str, Any] = _copied(self._lasting)
        if self._begun:
            state["batches"], state["samples"] = place.batches, place.samples
            if place.digest:
                state["digest"] = place.digest.hex()
        if rungs := [[each.batches, each.samples, each.digest.hex()] for each in ladder]:
            state["ladder"] = rungs
        if place.beyond:
            state["beyond"] = list(place.beyond)
        if left_out:
            state["left_out"] = left_out
        if dataset:
            state |= dataset
        state[_CHECK] = _check_of(self._digest, [*map(state.get, _OF_PLACE)], state)
        return state


def _copied(value: Any) -> Any:
    """Plain values again; three times as fast as ``copy.deepcopy``."""
    if type(value) is dict:
        return {name: _copied(each) for name, each in value.items()}
    return [*map(_copied, value)] if type(value) is list else value


def _check(state: dict[str, Any]) -> str:
    """A digest of what is ours in a state, the same before and after JSON; each state has one."""
    apart = {_CHECK, *_OF_PLACE, *_BY_JSON}
    lasting = {name: each for name, each in state.items() if name not in apart}
    return _check_of(_digest(lasting), _lists(map(state.get, _OF_PLACE)), state)


def _check_of(lasting: str, of_place: list[Any], state: dict[str, Any]) -> str:
    """The same; of the place by its text, which takes half as long as JSON."""
    rest = {name: state[name] for name in _BY_JSON if name in state}
    return _of_text(f"{lasting}{of_place}{_encoded(_ours(rest)) if rest else ''}")


def _ours(value: Any) -> Any:
    if not isinstance(value, dict):
        return [*map(_ours, value)] if isinstance(value, list | tuple) else value
    return {name: name in _OF_USER or _ours(each) for name, each in value.items()}


def _lists(values: Iterable[Any]) -> list[Any]:
    """As JSON would give them: some who keep states make tuples of lists."""
    return [_lists(each) if isinstance(each, list | tuple) else each for each in values]


def _digest(value: dict[str, Any]) -> str:
    return _of_text(_encoded(value))


def _of_text(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()


_encoded = json.JSONEncoder(sort_keys=True).encode


def _foreign(state: dict[Any, Any]) -> str:
    if any(name in state for name in _THEIRS):
        return (
            "this is a state of torchdata's StatefulDataLoader, which does not say what was "
            "delivered: it cannot be gone on from here. Finish the epoch with torchdata's class, "
            "and save the next state with this one"
        )
    for name, value in state.items():
        if isinstance(value, dict) and _NAME in value:
            return (
                f"this is no state of a loader, but it has one under {name!r}, as a checkpoint "
                f"does: load_state_dict(checkpoint[{name!r}])"
            )
    names = ", ".join(map(str, list(state)[:5]))
    return (
        f"this is no state of a loader: it has {names}. Give what state_dict() of a "
        "SafeStatefulDataLoader gave, or {} to begin anew"
    )


def _seeds(state: SavedState) -> str:
    if state.seed is None:
        return "no seed="
    per = "" if state.seed_per == "sample" else f", seed_per={state.seed_per!r}"
    return f"seed={state.seed}{per}"


def _by(workers: int) -> str:
    return f"{workers} workers" if workers else "the main process"


def _samples(length: int | None) -> str:
    return "no known length" if length is None else f"{length} samples"


def _batches(size: int | None) -> str:
    return "batches of a sampler's own, or none" if size is None else f"batches of {size}"
