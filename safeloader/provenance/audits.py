"""One audit for each epoch of the newest, without making each. Runs in: main.

An audit takes some hundred µs, which would double an epoch of a few batches. So the accounts of a
small epoch are kept as they are until somebody reads its audit; those of a large one, which hold
more, become an audit when the next epoch begins. What is kept of an earlier epoch lists the first
thousand indices of a class; its counts are exact.
"""

from __future__ import annotations

from typing import Any, Protocol

from safeloader.delivery.audit import EpochAudit
from safeloader.delivery.audit_part import RankAccounts

AUDITS_MAX = 256  # epochs
_SMALL = 1 << 15  # samples drawn, of which the ledger holds the indices: 8 bytes each
_HELD_MAX = 1 << 20  # of all small epochs together
_LISTED = 1000


class Accounts(Protocol):
    """The accounts of an epoch."""

    @property
    def closed(self) -> bool:
        """Whether nothing more comes."""

    def put_away(self) -> int | None:
        """Let go of what an audit does not need. How many samples were drawn; None if an audit is
        to be made at once."""

    def audit(self, number: int) -> EpochAudit:
        """What they come to."""

    def to_other_ranks(self, number: int, dataset: Any, sampler: Any) -> RankAccounts:
        """What other ranks are told of them."""


class AuditHistory:
    """The audits of the newest epochs of a recorder."""

    def __init__(self) -> None:
        self._open: dict[int, Accounts] = {}
        self._small: dict[int, tuple[Accounts, int]] = {}
        self._made: dict[int, EpochAudit] = {}
        self._held = 0

    def begins(self, epoch: int, accounts: Accounts) -> None:
        """An epoch begins; those that are closed are put away."""
        for number, earlier in list(self._open.items()):
            if earlier.closed:
                self._put_away(number, self._open.pop(number))
        self._open[epoch] = accounts
        self._open.pop(epoch - AUDITS_MAX, None)
        self._made.pop(epoch - AUDITS_MAX, None)
        _, drawn = self._small.pop(epoch - AUDITS_MAX, (None, 0))
        self._held -= drawn

    def _put_away(self, epoch: int, accounts: Accounts) -> None:
        drawn = accounts.put_away()
        if drawn is None or drawn >= _SMALL:
            self._made[epoch] = accounts.audit(epoch).cut(_LISTED)
            return
        self._small[epoch] = accounts, drawn
        self._held += drawn
        while self._held > _HELD_MAX:
            self._make(next(iter(self._small)))

    def _make(self, epoch: int) -> None:
        kept = self._small.pop(epoch, None)
        if kept is not None:  # another thread may have asked as well
            self._held -= kept[1]
            self._made[epoch] = kept[0].audit(epoch).cut(_LISTED)

    def newest(self, epoch: int) -> Accounts | None:
        """The accounts of the epoch begun last, which is number ``epoch``."""
        return self._open.get(epoch)

    def audits(self) -> list[EpochAudit]:
        """The audits, oldest first; of the epoch that runs as it stands."""
        for epoch in list(self._small):
            self._make(epoch)
        known = self._made | {number: each.audit(number) for number, each in self._open.items()}
        return [known[number] for number in sorted(known)]
