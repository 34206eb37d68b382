"""Where a loader is, from epoch to epoch: which comes next, and from what state. Runs in: main.

::

    state_dict() ◄── RunningEpoch ◄── EpochStart ◄── iter() ◄── what load_state_dict() was given

A state is a place in a sequence that can be drawn again: where the generators stood as its draws
began, how much was handed over, and a digest of it. To go on, the part before is drawn again
without being fetched, and has to have that digest.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader

from safeloader import _torch
from safeloader.delivery.manifest import BatchManifest
from safeloader.errors import ResumeError
from safeloader.failures.loader_log import LoaderLog
from safeloader.main.beginning import Generators, to_json
from safeloader.main.epoch import Epoch
from safeloader.main.going_on import BEFORE_DRAWS, BEFORE_ITER, EpochStart, tell_again
from safeloader.main.loader_facts import facts_of
from safeloader.main.running_epoch import NOT_KNOWN, Moment, RunningEpoch
from safeloader.main.saved_state import SavedState
from safeloader.main.worker_pool import WorkerPool
from safeloader.transport.messages import StateMessage

_EPOCHS_MAX = 64  # of which the furthest place is known


class Continuity:
    """Where one loader is."""

    def __init__(self) -> None:
        self._run: RunningEpoch | None = None  # the epoch that runs, or ran last
        self._over = False
        self._start: EpochStart | None = None  # of an epoch that is about to begin
        self._iterator: Callable[[], Any] = lambda: None
        self._asked_for: int | None = None
        self._asked_at: Moment | None = None  # where the loader was as that epoch was asked for
        self._loaded: tuple[SavedState, dict[str, Any]] | None = None
        self._furthest: dict[int, int] = {}

    @property
    def next_epoch(self) -> int:
        """The number of the epoch that ``iter()`` would begin."""
        if self._loaded is not None:
            return self._loaded[0].epoch
        if self._asked_for is not None:
            return self._asked_for
        if self._start is not None:  # which failed: no worker could be started, for one
            return self._start.run.number
        return 0 if self._run is None else self._run.number + 1

    @property
    def given(self) -> tuple[dict[str, Any] | None, int | None]:
        """The state that the next ``iter()`` goes on from, and the epoch that was asked for."""
        return None if self._loaded is None else self._loaded[1], self._asked_for

    @property
    def handed_over(self) -> int:
        """How many batches of the running epoch were handed over or left out, in all runs."""
        if self._run is None:
            return 0
        at = self._run.now.place
        return at.batches + len(at.beyond)

    @property
    def batches_before(self) -> int:
        """How many batches of the epoch that begins an earlier run had, without a gap."""
        return 0 if self._loaded is None else self._loaded[0].place.batches

    @property
    def wants_new_workers(self) -> bool:
        """Whether workers have to start: from states of datasets, or from a base seed."""
        if self._loaded is None:
            return False
        saved = self._loaded[0]
        return bool(saved.dataset) or BEFORE_ITER in saved.generators

    # which epoch ────────────────────────────────────────────────────────────────────────────────

    def set_epoch(self, epoch: int, log: LoaderLog) -> None:
        """The next ``iter()`` is to begin this epoch; nothing changes where it would."""
        if epoch == self.next_epoch:
            if self._loaded is None:  # states are of that epoch's beginning from now on
                self._ask_for(epoch)
            return
        if self._loaded is not None and self._loaded[0].begun:
            saved = self._loaded[0]
            log.warning(
                "set_epoch(%d) leaves the state that was loaded, of batch %d of epoch %d: the next "
                "iter() begins epoch %d from its first batch. To go on from the state, call "
                "set_epoch(%d), or not at all",
                *(epoch, saved.place.batches, saved.epoch, epoch, saved.epoch),
            )
        self._ask_for(epoch)
        self._loaded = None

    def _ask_for(self, epoch: int) -> None:
        self._asked_for, self._asked_at = epoch, None if self._run is None else self._run.now

    def load(self, loader: DataLoader[Any], state: Any) -> None:
        """Go on from ``state`` with the next ``iter()``; an iterator made before is at its end.

        Raises:
            ResumeError: if the loader cannot go on from it; then nothing is changed.
        """
        saved = SavedState.of(state)
        saved.refuse_unlike(facts_of(loader))
        self._note_furthest()
        iterator, self._iterator = self._iterator(), lambda: None
        if iterator is not None:
            iterator.superseded(_superseded)
        kept = copy.deepcopy(state) if state else saved.to_dict()
        self._loaded = SavedState.of(kept), kept  # whatever becomes of the caller's

    # an epoch ───────────────────────────────────────────────────────────────────────────────────

    def begin(self, iterator: Any, loader: DataLoader[Any], pool: WorkerPool, epoch: Epoch) -> None:
        """An epoch begins, at its beginning or where the state that was loaded has it.

        Raises:
            ResumeError: if the sampler draws others than it drew then.
        """
        self._note_furthest()
        before = self._iterator()
        if before is not None and before is not iterator:
            before.left_alone()
        saved = SavedState() if self._loaded is None else self._loaded[0]
        start = EpochStart(self.next_epoch, loader, pool, epoch, saved, self._twice(saved))
        self._start, self._run, self._over = start, start.run, False
        self._iterator = weakref.ref(iterator)

    def built(self) -> None:
        """Torch's iterator over it was made; with workers, the first draws were made too.

        Until then what was loaded is kept: if no worker can be started, the next ``iter()`` tries.
        """
        self._loaded = self._asked_for = None
        if self._start is not None:
            self._start.built()
            self._start = None

    def not_begun(self) -> None:
        """Torch's iterator was not made: the generators stand where they stood."""
        if self._start is not None:
            self._start.put_back()

    def passed(self, manifest: BatchManifest, number: int, *, booked: bool = True) -> None:
        """As :meth:`RunningEpoch.passed` has it."""
        if self._run is not None:
            self._run.passed(manifest, number, booked=booked)

    def told(self, message: StateMessage) -> None:
        """A worker told the state of its dataset."""
        if self._run is not None:
            self._run.told(message)
            tell_again(self._run.accounts.log, f"worker {message.worker_id}", message.again)

    def restarting(self, pool: WorkerPool) -> None:
        """New workers are about to go on with what is open: their datasets where these were."""
        if self._run is not None and self._run.places is not None:
            pool.plan = self._run.places.newest

    def ended(self, iterator: Any) -> None:
        """The epoch of ``iterator`` came to its end."""
        if self._iterator() is iterator and self._run is not None:
            self._over = True
            if self._run.here is not None:
                self._run.here.end()

    def _note_furthest(self) -> None:
        if self._run is not None:
            known, number = self._furthest, self._run.number
            known[number] = max(known.get(number, 0), self._run.now.place.batches)
            for old in list(known)[:-_EPOCHS_MAX]:
                del known[old]

    def _twice(self, saved: SavedState) -> str:
        """What comes twice because the state is an older one, in a sentence."""
        came, at = self._furthest.get(saved.epoch, 0), saved.place.batches
        if came <= at:
            return ""
        which = f"batch {at}" if came == at + 1 else f"batches {at} to {came - 1}"
        return (
            f"{which} of this epoch had been handed over in this process before the state of batch "
            f"{at} was loaded, and come again"
        )

    # states ─────────────────────────────────────────────────────────────────────────────────────

    def state(self, loader: DataLoader[Any], after: Any = None) -> dict[str, Any]:
        """The state of the loader now, or as it was when a batch was handed over.

        Raises:
            ResumeError: if ``after`` is not among the newest batches of the running epoch.
        """
        run = self._run
        if after is None:
            if self._loaded is not None:
                return copy.deepcopy(self._loaded[1])
            # Another epoch was asked for, and the one that runs was not gone on with since.
            asked = self._asked_for is not None and run is not None and run.now is self._asked_at
            if run is None or self._over or asked:
                return self._before_epoch(loader).to_dict()
        elif run is None:
            raise ResumeError(NOT_KNOWN)
        return run.state(after)

    def _before_epoch(self, loader: DataLoader[Any]) -> SavedState:
        facts = dataclasses.replace(facts_of(loader), epoch=self.next_epoch)
        run = self._run
        if run is not None and self._over and (loader.persistent_workers or not loader.num_workers):
            facts = dataclasses.replace(facts, dataset=run.of_dataset(run.now.places))
        generators = Generators(_torch.index_sampler(loader), loader.generator)
        if facts.seed is not None and generators.are_torchs:
            return facts
        states = generators.likely_states()
        known = {name: to_json(state) for name, state in states.items()}
        stay = loader.persistent_workers and _torch.kept_iterator(loader) is not None
        return dataclasses.replace(facts, generators={BEFORE_DRAWS if stay else BEFORE_ITER: known})


def _superseded() -> ResumeError:
    return ResumeError(
        "load_state_dict() was called after this iterator was made: it would go on from elsewhere. "
        "Load the state before iter(loader), and ask the new iterator"
    )
