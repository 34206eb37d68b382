"""Where a loader is, from epoch to epoch, and how it goes on from where another was. Runs in: main.

::

    state_dict() ◄── SavedState ◄── Position, Watch ◄── RecordingSampler ◄── draws
    load_state_dict() ──► SavedState ──► DrawsAgain ──► what is left of the sampler

A state is a place in a sequence that can be drawn again: where the generators stood as its draws
began, how much was handed over, and a digest of it. To go on, the part before is drawn again
without being fetched, and has to have that digest.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from safeloader import _torch
from safeloader.delivery.manifest import BatchManifest
from safeloader.delivery.position import KEPT, Place, Position, StreamPosition
from safeloader.errors import ResumeError
from safeloader.failures.loader_log import LoaderLog, length_of
from safeloader.global_batches import GlobalBatchSampler
from safeloader.introspect.ranks import place
from safeloader.introspect.texts import index_text
from safeloader.main.beginning import (
    GLOBAL,
    FirstDraw,
    Generators,
    States,
    Watch,
    moved,
    of_json,
    to_json,
)
from safeloader.main.dataset_places import DatasetPlaces, Places, putting_back, workers_of
from safeloader.main.drawing import RecordingSampler
from safeloader.main.drawing_again import DrawsAgain
from safeloader.main.epoch import Epoch
from safeloader.main.saved_state import SavedState
from safeloader.main.worker_pool import WorkerPool
from safeloader.transport.messages import Again, StateMessage
from safeloader.worker.dataset_states import DatasetStates, has_state

KEEPS_PLACE = "_continuity"  # the attribute of a loader that keeps its place
_LEFT_OUT = ("skipped", "replaced", "failed")
_FIRST = 16  # indices of those left out that a state names
_EPOCHS_MAX = 64  # of which the furthest place is known
# The moments of a state that was taken before its epoch began: whether torch draws a base seed yet.
_BEFORE_ITER, _BEFORE_DRAWS = "fresh", "iter"
_BEFORE_FIRST = "next"  # of one that was taken after iter(), before the first draw


class Continuity:
    """Where one loader is.

    Attributes:
        epoch: the number of the epoch that runs, or ran last, by the loader's own count.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self._asked_for: int | None = None
        self._asked_at: Place | None = None  # the place as that epoch was asked for
        self._begun = self._over = False
        self._loaded: tuple[SavedState, dict[str, Any]] | None = None
        self._running: Callable[[], Any] = lambda: None
        self._position = Position()
        self._places: DatasetPlaces | None = None
        self._here: DatasetStates | None = None  # of the main process
        self._earlier_places: deque[tuple[int, Places]] = deque(maxlen=KEPT)
        self._watch: Watch | None = None
        self._generators: Generators | None = None
        self._begin: dict[str, Any] | None = None  # as JSON has it, once it is known
        # Of what runs: a GlobalBatchSampler may be told of the next epoch already.
        self._order: dict[str, Any] = {}
        self._earlier: SavedState = SavedState()  # that this epoch went on from
        self._accounts: Epoch | None = None
        self._put_back: States = {}
        self._furthest: dict[int, int] = {}

    @property
    def next_epoch(self) -> int:
        """The number of the epoch that ``iter()`` would begin."""
        if self._loaded is not None:
            return self._loaded[0].epoch
        if self._asked_for is not None:
            return self._asked_for
        return self.epoch + 1 if self._begun else self.epoch

    @property
    def given(self) -> tuple[dict[str, Any] | None, int | None]:
        """The state that the next ``iter()`` goes on from, and the epoch that was asked for."""
        return None if self._loaded is None else self._loaded[1], self._asked_for

    @property
    def handed_over(self) -> int:
        """How many batches of the running epoch were handed over or left out, in all runs."""
        return self._position.at.batches + len(self._position.at.beyond)

    @property
    def batches_before(self) -> int:
        """How many batches of the epoch that begins an earlier run had, without a gap."""
        return 0 if self._loaded is None else self._loaded[0].place.batches

    def set_epoch(self, epoch: int, log: LoaderLog) -> None:
        """The next ``iter()`` is to begin this epoch; nothing changes where it would."""
        if epoch == self.next_epoch:
            if self._loaded is None:  # states are of that epoch's beginning from now on
                self._asked_for, self._asked_at = epoch, self._position.at
            return
        if self._loaded is not None and self._loaded[0].begun:
            saved = self._loaded[0]
            log.warning(
                "set_epoch(%d) leaves the state that was loaded, of batch %d of epoch %d: the next "
                "iter() begins epoch %d from its first batch. To go on from the state, call "
                "set_epoch(%d), or not at all",
                *(epoch, saved.place.batches, saved.epoch, epoch, saved.epoch),
            )
        self._loaded, self._asked_for, self._asked_at = None, epoch, self._position.at

    # an epoch ───────────────────────────────────────────────────────────────────────────────────

    def begin(self, iterator: Any, loader: DataLoader[Any], pool: WorkerPool, epoch: Epoch) -> None:
        """An epoch begins, at its beginning or where the state that was loaded has it.

        Raises:
            ResumeError: if the sampler draws others than it drew then.
        """
        self._note_furthest()
        before = self._running()
        if before is not None and before is not iterator:
            before.left_alone()
        number, loaded = self.next_epoch, self._loaded
        saved = SavedState() if loaded is None else loaded[0]
        if loaded is not None:
            saved.refuse_unlike(facts_of(loader))
        self._put_back = {}
        self._begin, self._earlier = None, SavedState()
        self._places = _places_of(loader, saved, epoch.log)
        pool.plan = plan = None if self._places is None else self._places.plan
        pool.states = self._here = None
        if plan is not None and not pool.workers:
            pool.states = self._here = plan.of_worker(None)
            with putting_back(self._here):
                self._here.before_iter(loader.dataset)  # it may put generators somewhere
        self._generators = Generators(pool.sampler.drawn_from, loader.generator)
        if pool.stream:
            self._begin_stream(pool, saved, epoch)
        else:
            self._begin_draws(pool.sampler, saved, epoch)
        self._order = _order_of(pool.sampler.drawn_from)
        self.epoch, self._begun, self._over = number, True, False
        self._running = weakref.ref(iterator)
        self._accounts = epoch

    def _begin_stream(self, pool: WorkerPool, saved: SavedState, epoch: Epoch) -> None:
        self._watch = None
        place, places = saved.place, self._places
        assert places is not None
        self._position = StreamPosition(place.batches, place.samples)
        pool.sampler.keep_place(self._position, None, places.requests)
        if saved.begun:
            epoch.ledger.read_before([samples for _, samples in places.now.counts])
            epoch.resumed(place.batches, _gone(saved), self._again(saved))
            self._earlier = saved
        else:
            self._borrow(of_json_states(saved.generators.get(_BEFORE_ITER, {})))

    def _begin_draws(self, sampler: RecordingSampler, saved: SavedState, epoch: Epoch) -> None:
        assert self._generators is not None
        position, self._watch = Position(), Watch(self._generators)
        self._position = position
        requests = 0 if self._places is None else self._places.requests
        sampler.keep_place(position, self._watch, requests)
        if saved.begun or _BEFORE_DRAWS in saved.generators:
            self._go_on(saved, sampler, position, epoch)
        else:
            self._borrow(of_json_states(saved.generators.get(_BEFORE_ITER, {})))

    def passed(self, manifest: BatchManifest, number: int) -> None:
        """What became of a draw is handed over, or raised, as batch ``number``."""
        self._position.passed(manifest.seq, number, manifest.samples)
        if self._places is not None:
            self._places.passed(manifest)
            self._earlier_places.append((number, self._places.now))

    def told(self, message: StateMessage) -> None:
        """A worker told the state of its dataset."""
        if self._places is not None:
            self._places.told(message)
        self._tell_again(f"worker {message.worker_id}", message.again)

    def _tell_again(self, who: str, again: Again | None) -> None:
        if again is None or self._accounts is None:
            return
        samples, seconds, proved = again
        self._accounts.log.warning(
            "%s read %d samples again, which took %.1f s, to come to its place in the stream, and "
            "dropped them; %s. An iterator or a dataset with state_dict() and load_state_dict() is "
            "put there at once",
            *(who, samples, seconds, _PROVED if proved else _NOT_PROVED),
        )

    @property
    def wants_new_workers(self) -> bool:
        """Whether workers have to start: from states of datasets, or from a base seed."""
        if self._loaded is None:
            return False
        saved = self._loaded[0]
        return bool(saved.dataset) or _BEFORE_ITER in saved.generators

    def built(self) -> None:
        """Torch's iterator over it was made; with workers, the first draws were made too.

        Until then what was loaded is kept: if no worker can be started, the next ``iter()`` tries.
        """
        self._loaded = self._asked_for = None
        if self._here is not None:
            self._tell_again("the main process", self._here.take_again())
        put_back, self._put_back = self._put_back, {}
        watch, generators = self._watch, self._generators
        if put_back and generators is not None:
            if watch is not None and not watch.done and self._begin is None:
                watch.lent = generators.states()
            generators.put({name: put_back[name] for name in GLOBAL if name in put_back})

    def restarting(self, pool: WorkerPool) -> None:
        """New workers are about to go on with what is open: their datasets where these were."""
        if self._places is not None:
            pool.plan = self._places.newest

    def ended(self, iterator: Any) -> None:
        """The epoch of ``iterator`` came to its end."""
        if self._running() is iterator:
            self._over = True
            if self._here is not None:
                self._here.end()

    def _borrow(self, begin: States) -> None:
        """Begin an epoch from where the generators stood, and put the process's own back then."""
        generators = self._generators
        if generators is None or not begin:
            return
        here = generators.states()
        unlike = {name: state for name, state in begin.items() if name in here}
        if not moved(unlike, here):
            return  # the program has put them there itself
        self._put_back = here
        generators.put(unlike)

    def _go_on(
        self,
        saved: SavedState,
        sampler: RecordingSampler,
        position: Position,
        epoch: Epoch,
    ) -> None:
        generators = self._generators
        assert generators is not None
        here = generators.states()
        begin = {moment: of_json_states(states) for moment, states in saved.generators.items()}
        if saved.order and saved.begun:
            _see_order(sampler.drawn_from, saved.order)
        undrawn = begin.pop(_BEFORE_FIRST, {})
        if undrawn:
            begin["draw"] = undrawn
        before = epoch.ledger.drawn_before
        draws = DrawsAgain(saved, generators, batched=sampler.batched, before=before)
        try:
            drawn = sampler.draw_again(draws, begin)
        except BaseException:
            generators.put(here)
            raise
        # What the program has put where it stood before the first draw is moved by that, as then.
        as_then = undrawn.keys() - moved(undrawn, here).keys()
        stays = drawn.stays | {name: drawn.now[name] for name in as_then}
        generators.put({name: state for name, state in here.items() if name not in stays})
        sampler.begin_with(FirstDraw(drawn.rest, _putting(generators, stays)))
        self._put_back = {n: s for n, s in (here | stays).items() if n in GLOBAL}
        self._begin = dict(saved.generators)
        if undrawn:
            self._begin["draw"] = self._begin.pop(_BEFORE_FIRST)
        if not saved.begun:
            return
        at, ladder = saved.place, saved.ladder
        if saved.order:  # the share of this rank may be another
            at = at._replace(samples=drawn.samples, digest=drawn.chain.digest())
            ladder = ()
        position.go_on(drawn.chain, at, ladder, drawn.beyond)
        self._earlier = saved
        came = saved.place.batches + len(drawn.beyond)
        epoch.resumed(came, _gone(saved), self._again(saved))

    def _note_furthest(self) -> None:
        if self._begun and not self._over:
            known = self._furthest
            known[self.epoch] = max(known.get(self.epoch, 0), self._position.at.batches)
            for old in list(known)[:-_EPOCHS_MAX]:
                del known[old]

    def _again(self, saved: SavedState) -> str:
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
        if self._loaded is not None and after is None:
            return copy.deepcopy(self._loaded[1])
        accounts = self._accounts
        # Another epoch was asked for, and the one that runs was not gone on with since.
        asked = self._asked_for is not None and self._position.at is self._asked_at
        if accounts is None or not self._begun or ((self._over or asked) and after is None):
            if after is not None:
                raise ResumeError(_NOT_KNOWN)
            return self._before_epoch(loader).to_dict()
        at = self._position.at
        if after is not None:
            same = getattr(after, "epoch", None) == accounts.number
            known = self._position.after(after.batch) if same else None
            if known is None:
                raise ResumeError(_NOT_KNOWN)
            at = known
        ladder = tuple(rung for rung in self._position.ladder if rung.batches <= at.batches)
        facts = facts_of(loader, accounts.log.length)
        facts = dataclasses.replace(facts, dataset=self._of_dataset(after))
        return dataclasses.replace(
            facts,
            order=self._order,
            epoch=self.epoch,
            place=at,
            ladder=ladder,
            begun=True,
            generators=self._beginning(),
            left_out=self._left_out(accounts),
        ).to_dict()

    def _before_epoch(self, loader: DataLoader[Any]) -> SavedState:
        facts = dataclasses.replace(facts_of(loader), epoch=self.next_epoch)
        if self._over and (loader.persistent_workers or not loader.num_workers):
            facts = dataclasses.replace(facts, dataset=self._of_dataset(None))
        generators = Generators(_torch.index_sampler(loader), loader.generator)
        if facts.seed is not None and generators.are_torchs:
            return facts
        states = generators.likely_states()
        known = {name: to_json(state) for name, state in states.items()}
        stay = loader.persistent_workers and _torch.kept_iterator(loader) is not None
        return dataclasses.replace(
            facts, generators={_BEFORE_DRAWS if stay else _BEFORE_ITER: known}
        )

    def _of_dataset(self, after: Any) -> dict[str, Any]:
        """The states of the dataset, if it is a stream or has one."""
        places = self._places
        if places is None:
            return {}
        here, at = self._here, places.now
        if after is not None:
            at = next(p for n, p in reversed(self._earlier_places) if n == after.batch)
            if here is not None and at is not places.now:
                raise ResumeError(_ONLY_NOW)
        return places.save(at, here)

    def _beginning(self) -> dict[str, Any]:
        """Where the draws of the running epoch began, as JSON has it."""
        if self._begin is not None:
            return self._begin
        watch, accounts = self._watch, self._accounts
        if watch is None or accounts is None:
            return {}
        seen = {moment: dict(states) for moment, states in watch.seen.items()}
        by_seed = accounts.seed is not None and watch.generators.are_torchs
        if not (watch.done or by_seed):  # the first draw begins from here, or from what is lent
            seen[_BEFORE_FIRST] = watch.generators.likely_states() | watch.lent
        found = {m: {n: to_json(s) for n, s in states.items()} for m, states in seen.items()}
        if watch.done:
            self._begin = found
        return found

    def _left_out(self, accounts: Epoch) -> dict[str, Any]:
        """How many did not come, in each class, and the first of them."""
        found: dict[str, Any] = {}
        before = self._earlier.left_out
        for name in _LEFT_OUT:
            here = accounts.ledger.by_class[name]
            earlier = before.get(name, [0, []])
            if number := here.count + earlier[0]:
                first = [*earlier[1], *map(index_text, here.first(_FIRST))][:_FIRST]
                found[name] = [number, first]
        return found

    def load(self, loader: DataLoader[Any], state: Any) -> None:
        """Go on from ``state`` with the next ``iter()``; an iterator made before is at its end.

        Raises:
            ResumeError: if the loader cannot go on from it; then nothing is changed.
        """
        saved = SavedState.of(state)
        saved.refuse_unlike(facts_of(loader))
        self._note_furthest()
        iterator, self._running = self._running(), lambda: None
        if iterator is not None:
            iterator.superseded(_superseded)
        self._loaded = saved, copy.deepcopy(state) if state else saved.to_dict()


_NOT_KNOWN = (
    "the state after this batch is not known: it is kept for the newest 1024 batches of the "
    "running epoch. Take the state as the batch comes: state_dict(after=loader.last_batch)"
)


_PROVED = "they are those of then, by key="
_NOT_PROVED = "key= would prove that they are those of then"
_ONLY_NOW = (
    "without workers the dataset is asked for its state as it is now, and the state after an "
    "earlier batch is not known. Take it as the batch comes, or use num_workers=1"
)


def _gone(saved: SavedState) -> int:
    """How many samples were skipped or replaced before the state was saved."""
    return sum(saved.left_out.get(name, [0])[0] for name in ("skipped", "replaced"))


def _superseded() -> ResumeError:
    return ResumeError(
        "load_state_dict() was called after this iterator was made: it would go on from elsewhere. "
        "Load the state before iter(loader), and ask the new iterator"
    )


def _putting(generators: Generators, states: States) -> Callable[[Any], Any]:
    """Put generators where the draws before left them: torch draws a seed from one in between."""

    def first(inner: Any) -> Any:
        generators.put(states)
        return next(inner)

    return first


def _order_of(sampler: Any) -> dict[str, Any]:
    """What the order of the epoch that begins is made from, and its digest; {} if not ours."""
    if type(sampler) is not GlobalBatchSampler:
        return {}
    return sampler.made_from() | {"digest": sampler.order_digest()}


def _see_order(sampler: GlobalBatchSampler, order: dict[str, Any]) -> None:
    """Put a sampler to the epoch of a state, and see that its order is the same there."""
    sampler.set_epoch(order["epoch"])
    if sampler.order_digest() != order["digest"]:
        raise ResumeError(
            "the order that this GlobalBatchSampler makes of its seed and epoch is another than "
            "when the state was saved: another release of torch or of safeloader makes it. Go on "
            "with the release that saved the state, or begin the next epoch"
        )


def _places_of(loader: Any, saved: SavedState, log: LoaderLog) -> DatasetPlaces | None:
    """What keeps the states of the dataset, if it is a stream or has a state of its own."""
    if not (isinstance(loader.dataset, IterableDataset) or has_state(loader.dataset)):
        if saved.dataset:
            log.warning(
                "the state of the dataset is left aside: it had state_dict() and load_state_dict() "
                "when it was saved, and has not now. The indices go on from where they were"
            )
        return None
    given, now = saved.dataset, loader.num_workers
    if given and (then := workers_of(given)) != now:  # not of streams: those are refused
        log.warning(
            "the state of the dataset is left aside, and it begins anew: it was saved of %s, and "
            "now it is %s. The indices go on from where they were. Where the samples depend on "
            "that state, go on with num_workers=%d",
            *(_copies(then), _copies(now), then),
        )
        given = {}
    every = loader.snapshot_every_n_steps
    return DatasetPlaces(now, every, given, over=not saved.begun)


def _copies(workers: int) -> str:
    if not workers:
        return "the one in the main process"
    return f"the {workers} copies in the workers" if workers > 1 else "the copy in the worker"


def facts_of(loader: Any, length: int | None = None) -> SavedState:
    """What a loader is, as far as another has to be alike to go on from its states."""
    sampler = _torch.index_sampler(loader)
    own, at = type(sampler) is BatchSampler, place()
    return SavedState(
        length=length_of(loader.dataset) if length is None else length,
        batch_size=loader.batch_size if own else None,
        seed=loader.seed,
        seed_per=None if loader.seed is None else loader.seed_per,
        world_size=at.world_size,
        rank=at.rank,
        order=sampler.made_from() if type(sampler) is GlobalBatchSampler else {},
        stream=isinstance(loader.dataset, IterableDataset),
        workers=loader.num_workers,
    )


def of_json_states(states: dict[str, Any]) -> States:
    """The states of generators again."""
    return {name: of_json(state) for name, state in states.items()}
