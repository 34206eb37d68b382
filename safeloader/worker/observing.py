"""What a worker notices about itself, at its first samples and in between. Runs in: worker.

::

    fetcher ── by way of ──► FirstSamples ──► Observer ── SelfReport ──► flight recorder

Each check of the indices can be right, and the data wrong: copies of the dataset drift apart, two
workers draw the same random numbers, a transform writes into its dataset. What tells is looked at
where it costs nothing: at the first samples of an epoch, and when there is nothing to do. After
that the fetcher has its own way back, and a count of batches is all that is left.

Nothing of the user's is run here, and no random number is drawn. A fault of this part ends it, and
the worker goes on.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from functools import cache
from time import perf_counter
from typing import Any

from safeloader.introspect.copy_state import CopyState, Order, copy_state
from safeloader.introspect.generator_kinds import process_generators, standing
from safeloader.introspect.generators import own_generators
from safeloader.introspect.resources import anonymous_bytes
from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.stored_elements import Element, Store, is_empty, stores_of, whole_number
from safeloader.introspect.texts import index_text
from safeloader.introspect.values import weakly
from safeloader.supervision.report_room import smaller_and_smaller
from safeloader.supervision.self_report import FirstDraws, InPlace, Opening, SelfReport
from safeloader.worker.first_samples import FirstSamples
from safeloader.worker.shared_files import InheritedFiles

ELEMENTS_MAX = 32  # of the dataset, that are looked at again after they were fetched
LEAVES_MAX = 64  # of these elements together, as long as there is one
OPENINGS_MAX = 2  # kept, and the newest
SEEDS_MAX = 2  # that a generator was met with: more than one is all that counts
ALWAYS = 16  # epochs whose first samples it sees, at whose ends it reports, and main looks
SHARE = 0.005  # of the time, at most, that this may take otherwise


class Observer:
    """Notices what one process's copy of the dataset becomes; one a worker.

    Args:
        dataset: as it is in this process.
        length: how many samples it has, as far as main knows; None for a stream.
        stream: whether it is iterable-style.
        files: those that were open as the process began; None where it did not inherit any.
        publish: is given each report.
        private: gives the private memory of this process in bytes, as last sampled, or None.
        kept: gives the bytes of this process that are only kept free, which count as given back.
        alone: whether no code but that which makes samples writes to this copy of the dataset.
        stays: whether this process makes samples of more than one epoch. One that does not cannot
            tell what fetching changes, but whether what it filled is lost with it.
        came: the copy as it came, where ``worker_init_fn`` has run since.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        length: int | None,
        stream: bool,
        files: InheritedFiles | None,
        publish: Callable[[SelfReport], object],
        private: Callable[[], int | None] = lambda: None,
        kept: Callable[[], int] = lambda: 0,
        alone: bool = True,
        stays: bool = True,
        came: CopyState | None = None,
    ) -> None:
        self._dataset = weakly(dataset)  # whoever keeps the records need not keep it
        self._length = None if stream else length
        self._stream = stream
        self._publish = publish
        self._private, self._kept = private, kept
        self._alone, self._stays = alone, stays
        self._epochs = self._batches = self._reported = 0
        self._due = 1
        self._began = perf_counter()
        self._spent = 0.0
        self._on = True
        self._openings: list[Opening] = []
        self._first: tuple[int | None, ...] = ()
        self._stream_ended = False
        self._elements: dict[tuple[str, Any], Element] = {}
        self._leaves = 0  # of all of them
        self._passed_over = 0  # elements that were not empty, where only those are noted
        self._fetching: list[Element] = []
        self._stores: list[Store] | None = None
        self._generators: dict[str, Any] | None = None
        self._seeds: dict[str, tuple[int, ...]] = {}
        self._files = files
        self._memory: list[tuple[int, int, int | None]] = []
        self._unsteady: tuple[str, ...] = ()
        self._compared = self._length if alone else None  # of main no order is compared
        self._now = copy_state(dataset, self._compared, last=came)
        self._start = self._now if came is None else came
        self._set_up_lengths = {
            path: length
            for path, length in self._now.lengths.items()
            if self._start.lengths.get(path) != length
        }
        self._set_up_orders = tuple(
            path
            for path, order in self._now.orders.items()
            if path not in self._start.orders or self._start.orders[path].places != order.places
        )

    def goes_on(
        self,
        files: InheritedFiles | None,
        publish: Callable[[SelfReport], object],
        private: Callable[[], int | None],
        kept: Callable[[], int],
    ) -> Observer:
        """In a forked worker, where it was made just before the fork."""
        self._files, self._publish = files, publish
        self._private, self._kept = private, kept
        return self

    def look_ahead(self) -> None:
        """Look now for what is looked for at the first samples: where it is to go on in workers."""
        self.generators()
        self.stores()

    def _state(self) -> CopyState:
        self._now = copy_state(self._dataset(), self._compared, last=self._now)
        return self._now

    # an epoch begins ────────────────────────────────────────────────────────────────────────────

    def over(self, fetcher: Any) -> Any:
        """Begin an epoch on ``fetcher``, which is given back."""
        if not self._on:
            return fetcher
        self._epochs += 1
        if self._epochs > ALWAYS and not self._took_little():
            return fetcher
        try:
            self._let_go()
            fetcher.by_way_of(FirstSamples(self, fetcher))
            if self._files is not None and self._files.open:
                self._files.watch(fetcher)
        except Exception as exc:
            self._fails(exc)
        return fetcher

    def _fails(self, exc: Exception) -> None:
        """A fault of this part ends it; what a signal handler raises is the user's."""
        if raised_by_signal(exc):
            raise exc
        self._on = False

    def generators(self, anew: bool = False) -> dict[str, Any]:
        """The generators by name; ``anew``: the dataset's own are looked for again."""
        if self._generators is None or anew:
            self._generators = process_generators()
            if not self._stream:
                self._generators |= own_generators(self._dataset())
        return self._generators

    def stores(self) -> list[Store]:
        """Lists and arrays of the dataset that have an element for each sample."""
        if self._stores is None:
            known = self._length is not None
            self._stores = list(stores_of(self._dataset(), self._length)) if known else []
        return self._stores

    def _let_go(self) -> None:
        """What the dataset has replaced by something else is looked for anew."""
        if self._stores is not None and any(each.gone for each in self._stores):
            self._stores = None
            self._elements = {k: e for k, e in self._elements.items() if not e.store.gone}
            self._leaves = sum(len(each.before or ()) for each in self._elements.values())

    def opened(self, indices: Sequence[str], draws: dict[str, FirstDraws]) -> None:
        """The first samples of an epoch were made."""
        epoch = self._epochs - 1
        kept = [each for each in self._openings if each.epoch != epoch][:OPENINGS_MAX]
        self._openings = [*kept, Opening(epoch, tuple(indices), draws)]

    def note_element(self, store: Store, index: Any, at: Any) -> bool:
        """Note an element before it is fetched for the first time; False once there are enough."""
        if not self.wants_elements:
            return False
        key = store.path, at
        if key not in self._elements:
            if not self._stays and not is_empty(store.get(at)):
                self._passed_over += 1
                return True
            number = whole_number(index)
            asked_as = index_text(index if number is None else number)
            self._elements[key] = each = Element(store, asked_as, at, self._epochs)
            self._fetching.append(each)
            self._leaves += len(each.before or ())
        return True

    def fetched(self) -> None:
        """The elements that were noted last have been fetched."""
        for each in self._fetching:
            each.look(self._epochs, fetched=True)
        self._fetching = []

    @property
    def wants_elements(self) -> bool:
        """Whether further elements are to be noted."""
        looked_at = len(self._elements) + self._passed_over
        few = looked_at < ELEMENTS_MAX and self._leaves < LEAVES_MAX
        return few and bool(self.stores())

    def orders(self) -> dict[str, Order]:
        """By their paths, the orders that this copy of the dataset has; none without workers."""
        return self._state().orders if self._compared and self._epochs <= 1 else {}

    def note_orders(self, before: dict[str, Order]) -> None:
        """The second sample was made: an order that samples are made by is now as it was before."""
        if before:
            now = self.orders()
            self._unsteady = tuple(
                path for path, each in now.items() if before.get(path, each).places != each.places
            )

    def note_stream(self, digests: tuple[int | None, ...], *, ended: bool = False) -> None:
        """The first samples of the stream, in the first epoch; ``ended``: there are no more."""
        if self._epochs <= 1:
            self._first, self._stream_ended = digests, ended
            if ended:
                self._reported = -1  # nothing that was reported says so

    # in between ─────────────────────────────────────────────────────────────────────────────────

    def sent(self) -> None:
        """A batch was made; hot path."""
        self._batches += 1
        if self._batches >= self._due:
            self._due = 2 * self._batches
            self._remember_memory()
            if self._batches == 2 or self._took_little():
                self.report()

    def took(self, seconds: float) -> None:
        """So long the first samples were held up."""
        self._spent += seconds

    def _took_little(self) -> bool:
        return self._spent < SHARE * (perf_counter() - self._began)

    def paused(self, asked: bool) -> None:
        """There is nothing to do for now: an epoch is at its end, or main has ``asked``."""
        new = self._batches > self._reported
        if asked or (new and (self._epochs <= ALWAYS or self._took_little())):
            self.report()

    def report(self) -> None:
        """Say what was noticed so far; a fault of this ends it."""
        if not self._on:
            return
        began = perf_counter()
        try:
            self._publish(self._report())
            self._reported = self._batches
        except Exception as exc:
            self._fails(exc)
        self._spent += perf_counter() - began

    def _report(self) -> SelfReport:
        in_place: list[tuple[Store, InPlace]] = []
        only_moved = cache(Store.only_moved)  # of each once
        filled: dict[str, tuple[int, int]] = {}
        for each in self._elements.values():
            now = each.look(self._epochs)
            if each.was_empty:
                empty, full = filled.get(each.store.path, (0, 0))
                filled[each.store.path] = empty + 1, full + (not is_empty(now))
            elif (found := each.change(not self._alone)) and not only_moved(each.store):
                in_place.append((each.store, InPlace(each.asked_as, *found)))
        # A shuffle while one sample is made changes that one too; a transform, many of them.
        alone = [store for store, _ in in_place if store.may_have_moved]
        told = [each for store, each in in_place if alone.count(store) != 1]
        if self._memory[-1:] and self._memory[-1][0] != self._batches:
            self._remember_memory()
        return SelfReport(
            os.getpid(),
            self._epochs,
            self._batches,
            self._start,
            self._state(),
            tuple(self._openings),
            self._first,
            tuple(told),
            tuple((path, *counts) for path, counts in filled.items()),
            () if self._files is None else self._files.moved(),
            tuple(self._memory),
            stream_ended=self._stream_ended,
            unsteady=self._unsteady,
            set_up_lengths=self._set_up_lengths,
            set_up_orders=self._set_up_orders,
            seeds=self._seeds_met(),
        )

    def _seeds_met(self) -> dict[str, tuple[int, ...]]:
        """By generator, a few seeds by which it stood as this reported."""
        for name, each in (self._generators or {}).items() if self._batches else ():
            met, now = self._seeds.get(name, ()), standing(each).seed
            if now not in met and len(met) < SEEDS_MAX:
                self._seeds[name] = (*met, now)
        return dict(self._seeds)

    def _remember_memory(self) -> None:
        own = anonymous_bytes()
        if own is not None:
            own -= self._kept()
            self._memory = [*self._memory[-15:], (self._batches, own, self._private())]


def into_flight_recorder(write: Callable[[bytes], bool]) -> Callable[[SelfReport], None]:
    """What publishes a report by ``write``, without the largest orders where there is no room."""

    def publish(report: SelfReport) -> None:
        any(write(pickle.dumps(each)) for each in smaller_and_smaller(report))

    return publish
