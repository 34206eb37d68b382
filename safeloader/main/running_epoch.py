"""The epoch that a loader is in: how far it is, and its states. Runs in: main.

::

    state_dict() ◄── EpochStates ◄── Moment ◄── Position, DatasetPlaces ◄── batches handed over
                         └── where the draws began ◄── Watch

What a state says of the place is put there at once, when a batch was handed over: a signal handler,
or another thread, may ask for one in the middle of that.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any, NamedTuple

from safeloader.delivery.manifest import BatchManifest
from safeloader.delivery.position import Place, Position
from safeloader.errors import ResumeError
from safeloader.introspect.texts import index_text
from safeloader.main.beginning import Watch, to_json
from safeloader.main.dataset_places import DatasetPlaces, Places
from safeloader.main.epoch import Epoch
from safeloader.main.saved_state import EpochStates, SavedState
from safeloader.transport.messages import StateMessage
from safeloader.worker.dataset_states import DatasetStates

BEFORE_FIRST = "next"  # the moment of generators' states after iter(), before the first draw
_LEFT_OUT = ("skipped", "replaced", "failed")
_FIRST = 16  # indices of those left out that a state names
_KEPT = 1024  # batches, of which the moment after each is known


class Moment(NamedTuple):
    """Where an epoch was as a batch was handed over.

    Attributes:
        number: of the batch, as the records count; -1 before the first.
        place: in the draws.
        places: of the dataset's states, where these are kept.
        left_out: how many did not come by then, of each class; None: it was not booked yet.
    """

    number: int
    place: Place
    places: Places | None
    left_out: tuple[int, ...] | None = None


class RunningEpoch:
    """One epoch of a loader that keeps its place.

    Args:
        number: of the epoch, by the loader's own count.
        facts: what the loader is, as the epoch begins.
        accounts: of the epoch.
        position: in its draws.
        watch: of the generators that its first draws move; None for a stream.
        places: keeps the states of the dataset, where it has one or is a stream.
        here: takes them, in the main process.

    Attributes:
        now: where it is.
        begin: where its draws began, as JSON has it; None until that is known.
        earlier: the state that it went on from.
    """

    def __init__(
        self,
        number: int,
        facts: SavedState,
        accounts: Epoch,
        position: Position,
        watch: Watch | None,
        places: DatasetPlaces | None,
        here: DatasetStates | None,
    ) -> None:
        self.number = number
        self.facts = facts
        self.accounts = accounts
        self.position = position
        self.watch = watch
        self.places = places
        self.here = here
        self.begin: dict[str, Any] | None = None
        self.earlier = SavedState()
        self._states: EpochStates | None = None
        self._moments: deque[Moment] = deque(maxlen=_KEPT)
        self.begins()

    def begins(self) -> None:
        """It begins where its position is."""
        places = None if self.places is None else self.places.now
        self.now = Moment(-1, self.position.at, places)

    def passed(self, manifest: BatchManifest, number: int, *, booked: bool) -> None:
        """What became of a draw is handed over, or raised, as batch ``number``; hot path.

        ``booked``: the ledger knows what did not come of it.
        """
        position, places = self.position, None
        position.passed(manifest.seq, manifest.samples)
        if self.places is not None:
            self.places.passed(manifest)
            places = self.places.now
        left_out = self._left_out_so_far() if booked else None
        self.now = now = Moment(number, position.at, places, left_out)
        self._moments.append(now)

    def told(self, message: StateMessage) -> None:
        """A worker told the state of its dataset."""
        if self.places is not None:
            self.places.told(message)
            self.now = self.now._replace(places=self.places.now)

    def state(self, after: Any = None) -> dict[str, Any]:
        """The state now, or as it was when the batch of the record ``after`` was handed over.

        Raises:
            ResumeError: if that is not among the newest batches of the epoch.
        """
        now = self.now
        if after is not None:
            same = getattr(after, "epoch", None) == self.accounts.number
            newest = reversed(self._moments.copy()) if same else ()
            known = next((each for each in newest if each.number == after.batch), None)
            if known is None:
                raise ResumeError(NOT_KNOWN)
            if self.here is not None and known.places is not now.places:
                raise ResumeError(_ONLY_NOW)
            now = known
        ladder = [rung for rung in self.position.ladder if rung.batches <= now.place.batches]
        left_out = self._left_out(now.left_out)
        return self._epoch_states().at(now.place, ladder, left_out, self.of_dataset(now.places))

    def of_dataset(self, places: Places | None) -> dict[str, Any]:
        """The states of the dataset, if it is a stream or has one."""
        if self.places is None or places is None:
            return {}
        state = self.places.save(places, self.here)
        if self.here is not None and (lost := state["read"][1] - places.counts[0][1]):
            self.accounts.log.warning(
                "the dataset was asked for its state in the middle of a batch, or after an "
                "interrupt there: %d samples that it had read were not handed over, and do not "
                "come again. With num_workers=1 its state is taken between batches",
                lost,
            )
        return state

    def _epoch_states(self) -> EpochStates:
        """What makes the states, with where the draws began; kept once that is known."""
        states = self._states
        if states is None:
            # Asked before what was seen: the first draw may be made meanwhile.
            known = self.begin is not None or self.watch is None or self.watch.done
            saved = dataclasses.replace(
                self.facts,
                epoch=self.number,
                begun=True,
                generators=self._beginning(),
                origin=self.accounts.origin,
            )
            states = EpochStates(saved)
            if known:
                self._states = states
        return states

    def _beginning(self) -> dict[str, Any]:
        if self.begin is not None:
            return self.begin
        watch = self.watch
        if watch is None:
            return {}
        done, seen = watch.done, dict(watch.seen)
        by_seed = self.accounts.seed is not None and watch.generators.are_torchs
        if not (done or by_seed):  # the first draw begins from here, or from what is lent
            seen[BEFORE_FIRST] = watch.generators.likely_states() | watch.lent
        return {m: {n: to_json(s) for n, s in states.items()} for m, states in seen.items()}

    def _left_out_so_far(self) -> tuple[int, ...]:
        found = self.accounts.ledger.by_class
        return found["skipped"].count, found["replaced"].count, found["failed"].count

    def _left_out(self, counts: tuple[int, ...] | None) -> dict[str, Any]:
        """How many did not come, in each class, and the first of them."""
        found: dict[str, Any] = {}
        before, by_class = self.earlier.left_out, self.accounts.ledger.by_class
        for name, count in zip(_LEFT_OUT, counts or self._left_out_so_far(), strict=True):
            earlier, texts = before.get(name, (0, ()))
            if number := count + earlier:
                here = by_class[name].first(min(count, _FIRST))
                found[name] = [number, [*texts, *map(index_text, here)][:_FIRST]]
        return found


NOT_KNOWN = (
    "the state after this batch is not known: it is kept for the newest 1024 batches of the "
    "running epoch. Take the state as the batch comes: state_dict(after=loader.last_batch)"
)
_ONLY_NOW = (
    "without workers the dataset is asked for its state as it is now, and the state after an "
    "earlier batch is not known. Take it as the batch comes, or use num_workers=1"
)
