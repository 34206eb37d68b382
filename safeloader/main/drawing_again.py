"""Draws again what an earlier run handed over, and proves that it is the same. Runs in: main.

The sampler begins from where its generators stood then, and nothing is fetched. The indices are
chained into a digest, which is compared on the way with those that were saved: a difference is an
error that says where it begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

from torch.utils.data import BatchSampler

from safeloader.delivery.indices import (
    Packed,
    copied,
    count,
    pack,
    pack_unbatched,
    snapshots,
)
from safeloader.delivery.position import Chain, Rung
from safeloader.delivery.skip_budget import LONGEST_RUN
from safeloader.errors import ResumeError
from safeloader.introspect.signals import raised_by_signal
from safeloader.main.beginning import BatchesOf, Generators, States, moved
from safeloader.main.saved_state import SavedState

_FAILED_MAX = 1000  # draws in a row
_PIECE = 8192  # indices that are drawn at once where batches do not matter


class DrawnAgain(NamedTuple):
    """What the draws left.

    Attributes:
        rest: what comes next, of which the first is drawn already.
        chain: of the indices drawn again.
        beyond: the identities of each batch handed over behind the first gap.
        now: where the generators stand.
        stays: of those that the sampler and the loader hold, and that went on to move after the
            first draw, where they stand: there they are to go on.
        samples: how many indices were drawn again.
        newest: the last of them, as :func:`~safeloader.delivery.indices.snapshots` has them.
    """

    rest: Iterator[Any]
    chain: Chain
    beyond: dict[int, Packed]
    now: States
    stays: States
    samples: int
    newest: list[int | bytes]


class DrawsAgain:
    """Draws what was handed over before a state was saved.

    Args:
        saved: the state.
        generators: that the sampler may draw from; left where the draws move them.
        batched: whether the sampler gives batches.
        before: is told the identities of what is drawn again, piece by piece.
    """

    def __init__(
        self,
        saved: SavedState,
        generators: Generators,
        *,
        batched: bool,
        before: Callable[[Packed], None],
    ) -> None:
        self._saved = saved
        self._generators = generators
        self._pack = pack if batched else pack_unbatched
        self._batched = batched
        self._before = before
        self._chain = Chain()
        self._samples = self._agreed = 0
        self._newest: deque[int | bytes] = deque(maxlen=LONGEST_RUN)
        place = saved.place
        last = Rung(place.batches, place.samples, place.digest)
        # A rank's share of a global order is proved by that order, and may be another one now.
        self._proves = not saved.order
        self._rungs = [*sorted(saved.ladder, key=lambda rung: rung.samples), last]
        self._after_first: States | None = None

    def draw(self, source: Any, tail: list[Any], begin: dict[str, States]) -> DrawnAgain:
        """Draw as far as the earlier run came, and one batch further.

        Args:
            source: the sampler.
            tail: in which it notes what it drew since its last batch.
            begin: where the generators stood at the beginning, by moment.

        Raises:
            ResumeError: if other indices are drawn, or too few.
        """
        self._generators.put(begin.get("iter", {}))
        place = self._saved.place
        if self._batched and not place.beyond and type(source).__iter__ is BatchSampler.__iter__:
            inner = self._by_samples(source, begin)
        else:
            inner = iter(source)
            self._generators.put(begin.get("draw", {}))
            for number in range(place.batches):
                try:
                    self._take(self._next(inner, number))
                except ResumeError:
                    if self._proves:
                        raise
                    break  # of an uneven tail this rank has no share
        # Batches of other sizes never are as long as the rungs.
        if self._proves and self._agreed != place.batches:
            raise self._others(place.batches)
        tail.clear()
        beyond: dict[int, Packed] = {}
        gaps: list[Any] = []
        for number in range(place.batches, max(place.beyond, default=-1) + 1):
            index = self._next(inner, number)
            if number in place.beyond:
                beyond[number] = self._pack(index)
                self._before(beyond[number])
            else:
                # A copy: the sampler may fill one list again and again.
                one_shot = self._batched and isinstance(index, Iterator)
                gaps.append(list(index) if one_shot else copied(index))
            tail.clear()
        rest = chain(gaps, _Ahead(inner, tail))  # its tail of a batch that never came stays
        now = self._generators.states()
        lazy = moved(self._after_first, now) if self._after_first is not None else {}
        stays = {name: now[name] for name in [*self._generators.held, *lazy]}
        return DrawnAgain(rest, self._chain, beyond, now, stays, self._samples, [*self._newest])

    def _by_samples(self, source: Any, begin: dict[str, States]) -> Iterator[Any]:
        """How indices lie in batches is of no interest: they may have another size now."""
        self._generators.put(begin.get("draw", {}))
        indices = iter(source.sampler)
        number = 0
        while self._samples < self._saved.place.samples:
            ends = [rung.samples for rung in self._rungs if rung.samples > self._samples]
            wanted = min(_PIECE, min(ends) - self._samples) if number else 1
            piece = list(islice(indices, wanted))
            if len(piece) < wanted:
                raise self._too_few(
                    f"{self._samples + len(piece)} samples", self._saved.place.samples
                )
            self._take(piece)
            number += 1
        return iter(BatchesOf(indices, source))

    def _next(self, inner: Iterator[Any], number: int) -> Any:
        """The next draw; one that fails now failed then too, and is passed over as it was."""
        failed: Exception | None = None
        for _ in range(_FAILED_MAX):
            try:
                return next(inner)
            except StopIteration:
                raise self._too_few(f"{number} batches", self._saved.place.batches) from failed
            except Exception as exc:
                if raised_by_signal(exc):
                    raise
                failed = exc
        assert failed is not None
        raise failed

    def _too_few(self, gave: str, wanted: int) -> ResumeError:
        return ResumeError(
            f"the sampler gave {gave} and ended, and {wanted} were handed over when the state was "
            f"saved. {self._causes()}"
        )

    def _take(self, index: Any) -> None:
        """A piece was drawn again: it has to be as it was."""
        if self._batched and isinstance(index, Iterator):
            index = list(index)
        packed = self._pack(index)
        self._newest.extend(snapshots(index if self._batched else [index], LONGEST_RUN))
        self._chain.add(packed)
        self._samples += count(packed)
        self._before(packed)
        if self._after_first is None:
            self._after_first = self._generators.states()
        for rung in self._rungs if self._proves else ():
            if rung.samples == self._samples:
                if self._chain.digest()[: len(rung.digest)] != rung.digest:
                    raise self._others(rung.batches)
                self._agreed = rung.batches

    def _causes(self) -> str:
        return _CAUSES + ("" if self._saved.seed is not None else _OR_SEED)

    def _others(self, by: int) -> ResumeError:
        agree = (
            f"they agree up to batch {self._agreed} and differ" if self._agreed else "they differ"
        )
        return ResumeError(
            f"the sampler draws other indices than when the state was saved: {agree} by batch {by} "
            f"of the {self._saved.place.batches} that were handed over. {self._causes()}"
        )


_CAUSES = (
    "Usual causes: shuffle= or sampler= is another; set_epoch() was not called, or with another "
    "number; it is the state of another rank; the sampler was made with another seed or other "
    "weights; it draws from random, numpy.random or torch while the training loop draws from them "
    "too. Make the sampler as it was"
)
_OR_SEED = (
    ", or train with seed=, which makes the order of torch's samplers a function of the seed and "
    "the epoch"
)


class _Ahead(Iterator[Any]):
    """An iterator of which the first is drawn already: its end, or its error, comes in its turn."""

    def __init__(self, inner: Iterator[Any], tail: list[Any]) -> None:
        self._inner = inner
        self._first: list[Any] = []
        self._raised: BaseException | None = None
        try:
            self._first.append(next(inner))
            tail.clear()
        except Exception as exc:
            self._raised = exc.with_traceback(None)

    def __next__(self) -> Any:
        if self._first:
            return self._first.pop()
        if self._raised is not None:
            exc, self._raised = self._raised, None
            raise exc
        return next(self._inner)
