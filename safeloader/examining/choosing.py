"""Which setting to use, of those that were measured. Runs in: main."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from typing import Any, NamedTuple

_AS_GOOD = 0.95  # of the best: then the one with fewer workers, fewer batches ahead


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


def chosen(rows: Collection[Row], ruled_out: Collection[str]) -> Row | None:
    """The setting to use; None if none was measured.

    Batches per second decide on workers and ``prefetch_factor``, then fewer of both, but one
    worker at least; the time to the first batch decides on the start method, among those that are
    not ruled out.

    >>> rows = [Row(0, None, None, (10.0,), 0.1), Row(1, 2, "fork", (20.0,), 0.2),
    ...         Row(2, 2, "fork", (39.0,), 0.2), Row(2, 4, "fork", (40.0,), 0.2),
    ...         Row(2, 2, "spawn", (38.0,), 3.0)]
    >>> best = chosen(rows, ())
    >>> best.workers, best.prefetch, best.method
    (2, 2, 'fork')
    >>> chosen(rows, {"fork"}).method
    'spawn'
    """
    measured = [row for row in rows if row.rates]
    if not measured:
        return None
    enough = _AS_GOOD * max(row.rate for row in measured)
    good = [row for row in measured if row.rate >= enough]
    # Workers load while the training step runs, of which nothing is measured: as good is better.
    best = min(good, key=lambda row: (not row.workers, row.workers, row.prefetch or 0))
    if not best.workers:
        return best
    # How it is started changes nothing once it runs: so of each, the row that was measured best.
    methods = {row.method for row in measured if row.method} - set(ruled_out)
    first: dict[str | None, float] = {}
    for row in measured:
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
