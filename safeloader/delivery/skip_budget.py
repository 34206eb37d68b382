"""How many samples an epoch may skip before it fails. Runs in: main."""

from __future__ import annotations

from safeloader.delivery.manifest import BatchContents, BatchManifest

ALWAYS_ALLOWED = 10
DEFAULT_SHARE = 0.01
LONGEST_RUN = 20


class SkipBudget:
    """Counts the samples of one epoch that were left out or replaced.

    Args:
        max_skipped: a count; or a fraction of the samples so far, of which ``ALWAYS_ALLOWED`` are
            always allowed; None: a fraction of ``DEFAULT_SHARE``.
        runs: whether ``LONGEST_RUN`` failures in a row are too many in any case: a disk that broke
            shows that way long before its share of a large epoch is reached.
    """

    # With what an epoch begins.
    skipped = 0
    _ways: frozenset[str] = frozenset()  # "skipped", "replaced"
    _run = 0
    _next_seq = 0  # the draw that goes on with the run

    def __init__(self, max_skipped: int | float | None, *, runs: bool) -> None:
        self._max_skipped = max_skipped
        self._runs = runs

    def exceeded(self, manifest: BatchManifest, samples: int) -> str | None:
        """Count the samples gone from a batch; a sentence if they are too many.

        ``samples`` is the number of samples so far, this batch's included.
        """
        contents = BatchContents.of(manifest)
        gone, seq = contents.gone, manifest.seq
        if not gone:
            return None
        if seq != self._next_seq:
            self._run = 0
        longest = self._run
        for position in range(len(contents.expected)):
            self._run = self._run + 1 if position in gone else 0
            longest = max(longest, self._run)
        self._next_seq = seq + 1
        self.skipped += len(gone)
        self._ways |= {each.what for each in gone.values()}
        bound = self._max_skipped
        if not isinstance(bound, int):
            share = DEFAULT_SHARE if bound is None else bound
            bound = max(ALWAYS_ALLOWED, int(share * samples))
        if self.skipped > bound:
            what = "max_skipped" if self._max_skipped is not None else "the default of max_skipped"
            return (
                f"{self.skipped} of the {samples} samples so far were "
                f"{' or '.join(sorted(self._ways, reverse=True))}; {what} allows {bound}"
            )
        if self._runs and longest >= LONGEST_RUN:
            return f"{longest} samples in a row failed ({self.skipped} of {samples} so far)"
        return None
