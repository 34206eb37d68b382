"""Which setting to use, of those that were measured. Runs in: main."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from typing import Any, NamedTuple

_AS_GOOD = 0.95  # of the best: then the one with fewer workers, fewer batches ahead
_GAIN = 1.05  # over another, to be called faster
TURNS = 3  # of both, to be told apart by so little
_GAIN_AT_ONCE = 1.5  # in each turn, where there were fewer


class Row(NamedTuple):
    """A setting and what was measured of it.

    Attributes:
        workers, prefetch, method: ``num_workers``, ``prefetch_factor`` and how workers are started;
            the last two are None without workers.
        rates: batches per second, of each turn.
        first_s: seconds to the first batch, the start of the workers included.
        error: why it could not be measured; empty if it could.
    """

    workers: int
    prefetch: int | None
    method: str | None
    rates: tuple[float, ...]
    first_s: float | None
    error: str = ""

    @property
    def rate(self) -> float:
        """The median of its turns, in batches per second."""
        return statistics.median(self.rates) if self.rates else 0.0

    @property
    def rate_text(self) -> str:
        """The rate for a person.

        >>> [Row(1, 2, "fork", (rate,), 0.1).rate_text for rate in (7.0412, 39170.4)]
        ['7.04', '39,170']
        """
        return f"{self.rate:.3g}" if self.rate < 100 else f"{self.rate:,.0f}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "num_workers": self.workers,
            "prefetch_factor": self.prefetch,
            "start_method": self.method,
            "batches_per_s": self.rate or None,
            "each_turn": list(self.rates),
            "first_batch_s": self.first_s,
            "error": self.error or None,
        }


class Own(NamedTuple):
    """The loader's own setting; ``prefetch`` and ``method`` are None without workers."""

    workers: int
    prefetch: int | None
    method: str | None


def gains(row: Row, other: Row) -> bool:
    """Whether a setting is measurably faster than another: not by one turn, if not by far.

    >>> own = Row(2, 2, "fork", (46.0, 46.5, 45.8), 0.1)
    >>> [gains(Row(4, 2, "fork", rates, 0.1), own)
    ...  for rates in ((49.0, 50.0, 48.9), (49.0, 50.0), (47.0, 46.0, 47.5), (80.0,))]
    [True, False, False, True]
    """
    turns = min(len(row.rates), len(other.rates))
    if turns >= TURNS:
        return row.rate >= _GAIN * other.rate
    # Turn by turn, as caches fill from one to the next.
    pairs = [*zip(row.rates, other.rates, strict=False)]
    return bool(pairs) and all(mine >= _GAIN_AT_ONCE * theirs for mine, theirs in pairs)


def own_row(rows: Collection[Row], own: Own) -> Row | None:
    """The loader's own setting, or the one that is it but for the start method."""
    same = [row for row in rows if row.workers == own.workers and row.rates]
    exact = [row for row in same if not own.workers or row.prefetch == own.prefetch]
    by_method = [row for row in exact if row.method == own.method]
    return next(iter(by_method or exact), None)


def chosen(
    rows: Collection[Row], ruled_out: Collection[str], own: Own | None = None, cores: int = 0
) -> Row | None:
    """The setting to use; None if none was measured.

    Batches per second decide on workers, then fewer of them, but one at least; another
    ``prefetch_factor`` than the loader's own (else 2) has to be measurably faster, and so has
    whatever is not the loader's own setting, but for one with more workers than cores. The time to
    the first batch decides on the start method, among those that are not ruled out.

    >>> rows = [Row(0, None, None, (10.0,), 0.1), Row(1, 2, "fork", (20.0,), 0.2),
    ...         Row(2, 2, "fork", (39.0,), 0.2), Row(2, 4, "fork", (40.0,), 0.2),
    ...         Row(2, 2, "spawn", (38.0,), 3.0)]
    >>> best = chosen(rows, ())
    >>> best.workers, best.prefetch, best.method
    (2, 2, 'fork')
    >>> chosen(rows, {"fork"}).method
    'spawn'
    """
    every = measured = [row for row in rows if row.rates]
    if not measured:
        return None
    usual = 2 if own is None or own.prefetch is None else own.prefetch
    measured = [row for row in measured if _is_worth_its_prefetch(row, measured, usual)]
    yours = None if own is None else own_row(measured, own)
    enough = _AS_GOOD * max(row.rate for row in measured)
    good = [row for row in measured if row.rate >= enough]
    if yours is not None:
        most = yours.workers if cores and yours.workers > cores else 0  # fewer are a gain then
        better = [row for row in good if row.workers < most or gains(row, yours)]
        good = better or _faster(measured, yours) or [yours]
    # Workers load while the training step runs, of which nothing is measured: as good is better.
    best = min(good, key=lambda row: (not row.workers, row.workers, row.prefetch or 0))
    if not best.workers:
        return best
    if best is yours and best.method not in ruled_out:
        return best
    # How it is started changes nothing once it runs: so of each, the row that was measured best.
    methods = {row.method for row in every if row.method} - set(ruled_out)
    first: dict[str | None, float] = {}
    for row in every:
        if row.method in methods and row.first_s is not None:
            near = row.workers == best.workers or row.method not in first
            if near:
                first[row.method] = min(row.first_s, first.get(row.method, row.first_s))
    unmeasured = [each for each in ("spawn", "forkserver") if each not in ruled_out]
    other = unmeasured[0] if best.method in ruled_out and unmeasured else best.method
    method = min(first, key=lambda each: first[each], default=other)
    same = [
        row
        for row in measured
        if (row.workers, row.prefetch, row.method) == (best.workers, best.prefetch, method)
    ]
    return same[0] if same else best._replace(method=method, first_s=first.get(method))


def _is_worth_its_prefetch(row: Row, rows: list[Row], usual: int) -> bool:
    if not row.workers or row.prefetch == usual:
        return True
    others = [each for each in rows if (each.workers, each.prefetch) == (row.workers, usual)]
    return all(
        len(row.rates) >= TURNS and len(other.rates) >= TURNS and gains(row, other)
        for other in others
    )


def _faster(rows: list[Row], yours: Row) -> list[Row]:
    """The fastest of those that are surely faster, where the fastest of all is not surely so."""
    found = [row for row in rows if gains(row, yours)]
    if not found:
        return []
    enough = _AS_GOOD * max(row.rate for row in found)
    return [row for row in found if row.rate >= enough]
