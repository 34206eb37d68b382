"""How long a child is waited for without a word of it, before that is called a hang. Runs in: main.

Against the time that there is, and against what came to an answer: where the first sample took two
seconds, as something is set up at first use, two seconds without another are no hang.
"""

from __future__ import annotations

import re

from safeloader.introspect.resources import cores

_LEAST_S = 2.0
_SHARE = 1 / 3  # of the time there is
_COLD_SHARE = 0.6  # where no sample came yet: something may be set up at first use
_TIMES = 4.0  # the longest that came to an answer
_TIMES_AT_THE_END = 2.0
_WORKERS = re.compile(r"(\d+) workers")
_FETCHING = ("fetching", "iterating the dataset", "asking __getitems__")


class Patience:
    """How long may be waited; it learns from each answer.

    Attributes:
        nothing_came: whether no sample has come to any child.

    Args:
        whole_s: the time there is for all.
        least_s: what is the least to wait, if that is known better.

    >>> patience = Patience(6.0)
    >>> patience.of("fetching", cold=False), round(patience.of("fetching", cold=True), 1)
    (2.0, 3.6)
    >>> patience.answered("fetching", 1.5)
    >>> patience.of("fetching", cold=False)
    6.0
    """

    def __init__(self, whole_s: float, least_s: float | None = None) -> None:
        self._whole_s = whole_s
        self._least_s = max(_LEAST_S, whole_s * _SHARE) if least_s is None else least_s
        self._longest_s = 0.0
        self.nothing_came = True

    def of(self, what: str, *, cold: bool) -> float:
        """Seconds without a word, after which it hangs; ``cold`` until a sample has come."""
        least = self._least_s
        if cold and is_fetching(what):
            least = max(least, _COLD_SHARE * self._whole_s)
        if _is_loading(what):  # what imports anew may be slow
            least *= 2
        return max(least, _TIMES * self._expected(what))

    def at_the_end(self, what: str) -> float:
        """The same where all time is up."""
        if _is_loading(what):
            return self._least_s * 2
        return max(self._least_s, _TIMES_AT_THE_END * self._expected(what))

    def answered(self, what: str, seconds: float) -> None:
        """What was done, and how long it took to a word."""
        self.nothing_came &= not is_fetching(what)
        if not _is_loading(what):
            self._longest_s = max(self._longest_s, seconds / self._share_of_core(what))

    def shortened(self, least_s: float) -> Patience:
        """The same, for what is known to hang."""
        other = Patience(self._whole_s, least_s)
        other._longest_s = self._longest_s
        other.nothing_came = self.nothing_came
        return other

    def _expected(self, what: str) -> float:
        return self._longest_s * self._share_of_core(what)

    @staticmethod
    def _share_of_core(what: str) -> float:
        """By how much more it may take since several work on a core."""
        found = _WORKERS.search(what)
        return 1.0 if found is None else max(1.0, int(found[1]) / cores())


def is_fetching(what: str) -> bool:
    """Whether samples are fetched in the child itself, one by one."""
    return what.startswith(_FETCHING)


def _is_loading(what: str) -> bool:
    return what in ("starting", "loading") or what.endswith(("by spawn", "by forkserver"))
