"""Stands for the dataset while the first samples of an epoch are made. Runs in: worker."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from time import perf_counter_ns as clock
from typing import TYPE_CHECKING, Any, Protocol

from safeloader.introspect.digests import digest
from safeloader.introspect.generator_kinds import standing
from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.texts import index_text
from safeloader.supervision.self_report import STREAM_SAMPLES, FirstDraws

if TYPE_CHECKING:
    from safeloader.introspect.copy_state import Order
    from safeloader.introspect.generator_kinds import Standing
    from safeloader.introspect.stored_elements import Store

WATCHED_MAX = 64  # samples of an epoch
_NONE = object()


class Notes(Protocol):
    """Who wants to know about them."""

    @property
    def wants_elements(self) -> bool:
        """Whether further elements of the dataset are to be noted."""

    def stores(self) -> list[Store]:
        """Lists and arrays of the dataset that have an element for each sample."""

    def generators(self, anew: bool = False) -> dict[str, Any]:
        """The generators by name; ``anew``: the dataset's own are looked for again."""

    def note_element(self, store: Store, index: Any, at: int) -> bool:
        """Note an element before it is fetched for the first time; False once there are enough."""

    def fetched(self) -> None:
        """The elements that were noted last have been fetched."""

    def orders(self) -> dict[str, Order]:
        """By their paths, the orders that this copy of the dataset has."""

    def note_orders(self, before: dict[str, Order]) -> None:
        """The second sample was made, before which it had these."""

    def note_stream(self, digests: tuple[int | None, ...], *, ended: bool = False) -> None:
        """The first samples of the stream; ``ended``: there are no more."""

    def opened(self, indices: Sequence[str], draws: dict[str, FirstDraws]) -> None:
        """The first samples of an epoch were made."""

    def took(self, seconds: float) -> None:
        """So long the first samples were held up."""


class FirstSamples:
    """Stands for the dataset, or for its iterator, until the first samples are made.

    What it takes itself is in no time that is told of a sample: :meth:`leave_out` sees to that.
    """

    def __init__(self, observer: Notes, fetcher: Any) -> None:
        self._observer = observer
        self._fetcher = weakref.ref(fetcher)  # which holds this: no cycle
        self._inner: Any = None
        self._indices: list[str] = []
        self._states: list[tuple[dict[str, Standing], dict[str, Standing]]] = []
        self._generators: dict[str, Any] = {}
        self._digests: list[int | None] = []
        self._orders: dict[str, Order] = {}
        self._made = 0
        self._done = False
        self._held: list[tuple[int, int]] = []  # in the running batch: until when, and how long

    def around(self, inner: Any) -> FirstSamples:
        """Take the place of ``inner``."""
        self._inner = inner
        return self

    # the times of a batch

    def begin(self) -> None:
        """A batch is about to be fetched."""
        self._held = []

    @property
    def took_ns(self) -> int:
        """What was added to the time of the running batch."""
        return sum(took for _, took in self._held)

    def leave_out(self, stamps: Any, end: int) -> None:
        """Take that from the times of a batch, which stand in their order up to ``end``.

        A stamp is earlier by what was taken between the first one and it.
        """
        held = [each for each in self._held if each[0] > stamps[0]]
        taken = 0
        for k in range(1, end + 1):
            while held and held[0][0] <= stamps[k]:
                taken += held.pop(0)[1]
            stamps[k] -= taken

    def _hold(self, began: int) -> None:
        """The program was held up since then."""
        ended = clock()
        self._held.append((ended, ended - began))
        self._observer.took((ended - began) / 1e9)

    # map-style

    def __getitem__(self, index: Any) -> Any:
        if self._done:
            return self._inner[index]
        before = self._before((index,))
        sample = self._inner[index]
        self._after((index,), before)
        return sample

    def __getitems__(self, indices: Any) -> Any:
        if self._done:
            return self._inner.__getitems__(indices)
        asked = list(indices)
        before = self._before(asked)
        samples = self._inner.__getitems__(indices)
        self._after(asked, before)
        return samples

    # a stream

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._done:
            return next(self._inner)
        before = self._before(())
        try:
            sample = next(self._inner)
        except StopIteration:
            self._observer.note_stream(tuple(self._digests), ended=True)
            raise
        self._after((), before, sample)
        return sample

    def _before(self, indices: Sequence[Any]) -> dict[str, Standing] | None:
        began = clock()
        try:
            for store in self._observer.stores():
                for index in indices:
                    at = store.place_of(index)
                    if at is not None and not self._observer.note_element(store, index, at):
                        break
            if len(self._states) == 1:
                self._orders = self._observer.orders()
            if len(self._states) < 2:
                if not self._states:
                    self._generators = self._observer.generators()
                return _standings(self._generators)
        except Exception as exc:
            self._fails(exc)
        finally:
            self._hold(began)
        return None

    def _after(
        self, indices: Sequence[Any], before: dict[str, Standing] | None, streamed: Any = _NONE
    ) -> None:
        if self._done:
            return
        began = clock()
        try:
            if streamed is not _NONE and len(self._digests) < STREAM_SAMPLES:
                self._digests.append(digest(streamed))
            self._observer.fetched()
            if before is not None:
                if not self._states:
                    before = self._with_those_made(before)
                self._states.append((before, _standings(self._generators)))
                self._indices += map(index_text, list(indices)[:2])
                if len(self._states) <= 2:
                    self._observer.opened(self._indices[:2], self._draws())
                if len(self._states) == 2:
                    self._observer.note_orders(self._orders)
            self._observer.note_stream(tuple(self._digests))
            self._made += max(1, len(indices))
            more = len(self._digests) if self._digests else STREAM_SAMPLES
            wants = more < STREAM_SAMPLES or self._observer.wants_elements
            if (len(self._states) >= 2 and not wants) or self._made >= WATCHED_MAX:
                self._end()
        except Exception as exc:
            self._fails(exc)
        finally:
            self._hold(began)

    def _fails(self, exc: Exception) -> None:
        """A fault of this part ends it; what a signal handler raises is the user's."""
        if raised_by_signal(exc):
            raise exc
        self._end()

    def _with_those_made(self, before: dict[str, Standing]) -> dict[str, Standing]:
        """Look for generators that the first sample made; they stood nowhere ``before`` it."""
        were, self._generators = self._generators, self._observer.generators(anew=True)
        same = {name for name, each in self._generators.items() if were.get(name) is each}
        return {name: each for name, each in before.items() if name in same}

    def _draws(self) -> dict[str, FirstDraws]:
        before, after = self._states[0]
        second, after_second = self._states[1] if len(self._states) > 1 else ({}, {})
        return {
            name: FirstDraws(before.get(name), each, second.get(name), after_second.get(name))
            for name, each in after.items()
        }

    def _end(self) -> None:
        """The fetcher has its own way from now on."""
        self._done = True
        fetcher = self._fetcher()
        if fetcher is not None:
            fetcher.by_way_of(None)


def _standings(generators: dict[str, Any]) -> dict[str, Standing]:
    return {name: standing(each) for name, each in generators.items()}
