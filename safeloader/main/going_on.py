"""Begins an epoch, at its beginning or where a state has it. Runs in: main.

::

    load_state_dict() ──► SavedState ──► DrawsAgain ──► what is left of the sampler
                              └────────► DatasetPlaces ──► workers, which put the dataset there

To go on, what was handed over is drawn again without being fetched, and has to have the digest that
the state has. The generators of the process stand afterwards where the program had put them, but
for those that the sampler goes on to draw from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch.utils.data import IterableDataset

from safeloader.delivery.position import Position, StreamPosition
from safeloader.errors import ResumeError
from safeloader.failures.loader_log import LoaderLog
from safeloader.global_batches import GlobalBatchSampler
from safeloader.main.beginning import GLOBAL, FirstDraw, Generators, States, Watch, moved, of_json
from safeloader.main.dataset_places import DatasetPlaces, putting_back, workers_of
from safeloader.main.drawing import RecordingSampler
from safeloader.main.drawing_again import DrawsAgain
from safeloader.main.epoch import Epoch
from safeloader.main.loader_facts import facts_of, order_of
from safeloader.main.running_epoch import BEFORE_FIRST, RunningEpoch
from safeloader.main.saved_state import SavedState
from safeloader.main.worker_pool import WorkerPool
from safeloader.transport.messages import Again
from safeloader.worker.dataset_states import has_state

# The moments of a state that was taken before its epoch began: whether torch draws a base seed yet.
BEFORE_ITER, BEFORE_DRAWS = "fresh", "iter"


class EpochStart:
    """Begins an epoch, and puts the generators of the process back once it has begun.

    Args:
        number: of the epoch, by the loader's own count.
        loader: whose epoch it is.
        pool: its workers, which are told what to do with the dataset.
        accounts: of the epoch.
        saved: the state to go on from.
        twice: what comes again because that is an older one, in a sentence.

    Attributes:
        run: the epoch.

    Raises:
        ResumeError: if the sampler draws others than it drew then.
    """

    def __init__(
        self,
        number: int,
        loader: Any,
        pool: WorkerPool,
        accounts: Epoch,
        saved: SavedState,
        twice: str,
    ) -> None:
        facts = facts_of(loader, accounts.log.length)
        saved.refuse_unlike(facts)
        self._saved, self._twice = saved, twice
        self._put_back: States = {}
        places = _places_of(loader, saved, accounts.log)
        pool.plan = plan = None if places is None else places.plan
        pool.states = here = None
        if plan is not None and not pool.workers:
            pool.states = here = plan.of_worker(None)
            with putting_back(here):
                here.before_iter(loader.dataset)  # it may put generators somewhere
        sampler = pool.sampler
        self._generators = Generators(sampler.drawn_from, loader.generator)
        position, watch = Position(), None
        if pool.stream:
            position = StreamPosition(saved.place.batches, saved.place.samples)
        else:
            watch = Watch(self._generators)
        self.run = run = RunningEpoch(number, facts, accounts, position, watch, places, here)
        sampler.keep_place(position, watch, 0 if places is None else places.requests)
        if not pool.stream and (saved.begun or BEFORE_DRAWS in saved.generators):
            self._go_on(sampler)
        elif saved.begun:
            assert places is not None
            accounts.ledger.read_before([samples for _, samples in places.now.counts])
            self._resumed(saved.place.batches)
        else:
            self._borrow(_of_json(saved.generators.get(BEFORE_ITER, {})))
        run.facts = dataclasses.replace(facts, order=order_of(sampler.drawn_from))
        run.begins()

    def built(self) -> None:
        """Torch's iterator over it was made; with workers, the first draws were made too."""
        run = self.run
        if run.here is not None:
            tell_again(run.accounts.log, "the main process", run.here.take_again())
        watch = run.watch
        if self._put_back and watch is not None and not watch.done and run.begin is None:
            watch.lent = self._generators.states()
        self.put_back()

    def put_back(self) -> None:
        """The generators of the process stand where the program had put them."""
        states, self._put_back = self._put_back, {}
        self._generators.put({name: states[name] for name in GLOBAL if name in states})

    def _resumed(self, batches: int) -> None:
        self.run.earlier = self._saved
        saved = self._saved
        self.run.accounts.resumed(batches, _gone(saved), self._twice, saved.origin)

    def _borrow(self, begin: States) -> None:
        """Begin from where the generators stood then; the process's own are put back by built()."""
        generators = self._generators
        here = generators.states() if begin else {}
        unlike = {name: state for name, state in begin.items() if name in here}
        if moved(unlike, here):  # else the program has put them there itself
            self._put_back = here
            generators.put(unlike)

    def _go_on(self, sampler: RecordingSampler) -> None:
        saved, generators, run = self._saved, self._generators, self.run
        here = generators.states()
        begin = {moment: _of_json(states) for moment, states in saved.generators.items()}
        if saved.order and saved.begun:
            _see_order(sampler.drawn_from, saved.order)
        undrawn = begin.pop(BEFORE_FIRST, {})
        if undrawn:
            begin["draw"] = undrawn
        before = run.accounts.ledger.drawn_before
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
        run.begin = dict(saved.generators)
        if undrawn:
            run.begin["draw"] = run.begin.pop(BEFORE_FIRST)
        if not saved.begun:
            return
        at, ladder = saved.place, saved.ladder
        if saved.order:  # the share of this rank may be another
            at = at._replace(samples=drawn.samples, digest=drawn.chain.digest())
            ladder = ()
        run.position.go_on(drawn.chain, at, ladder, drawn.beyond)
        self._resumed(saved.place.batches + len(drawn.beyond))


def tell_again(log: LoaderLog, who: str, again: Again | None) -> None:
    """Tell of a stream that was read again up to its place."""
    if again is None:
        return
    samples, seconds, proved = again
    log.warning(
        "%s read %d samples again, which took %.1f s, to come to its place in the stream, and "
        "dropped them; %s. An iterator or a dataset with state_dict() and load_state_dict() is "
        "put there at once",
        *(who, samples, seconds, _PROVED if proved else _NOT_PROVED),
    )


_PROVED = "they are those of then, by key="
_NOT_PROVED = "key= would prove that they are those of then"


def _gone(saved: SavedState) -> int:
    """How many samples were skipped or replaced before the state was saved."""
    return sum(saved.left_out.get(name, [0])[0] for name in ("skipped", "replaced"))


def _putting(generators: Generators, states: States) -> Callable[[Any], Any]:
    """Put generators where the draws before left them: torch draws a seed from one in between."""

    def first(inner: Any) -> Any:
        generators.put(states)
        return next(inner)

    return first


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
    given, now = saved.dataset, int(loader.num_workers)
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


def _of_json(states: dict[str, Any]) -> States:
    """The states of generators again."""
    return {name: of_json(state) for name, state in states.items()}
