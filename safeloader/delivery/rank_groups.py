"""An audit over all ranks of a group, which they make together. Runs in: main.

The only collective there is, and only where a program calls it. The ranks meet at a barrier that
names who does not come; then each gives its part; then they ask each other for the ranges that
differ, in pieces, until the indices are known. Every wait has a bound, and all ranks decide alike:
by what all of them have received.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from safeloader._torch import store_of_group
from safeloader.delivery.across_ranks import RunAudit, audit_of
from safeloader.delivery.audit_part import AuditPart, RankAccounts
from safeloader.delivery.bisecting import HEAD_BYTES, resolve
from safeloader.delivery.ladder import Delivered
from safeloader.delivery.likely_causes import named
from safeloader.delivery.merging import Merging
from safeloader.delivery.rank_stores import (
    VALUE_BYTES,
    collect,
    put_value,
    said_by,
    see_seconds,
)
from safeloader.failures.loader_log import LoaderLog, guarded
from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.texts import bounded_text

_GO_ON, _STOP, _FAULT = range(3)  # the first byte of what a rank sends
_STORE_S = 5.0

_calls: Counter[str] = Counter()


def audit_across_ranks(loader: Any, group: Any, timeout_s: float = 60.0) -> RunAudit:
    """What all ranks together handed over of their last epoch, with the indices by name.

    **A collective:** every rank of the group has to call it, each after the same epoch. It begins
    with a monitored barrier; where a rank does not come, the others are told after ``timeout_s``
    which, and get the audit of those that came (over the store of the group). The group cannot be
    used after that: that is how gloo takes a rank that does not come. Nothing of safeloader's calls
    it by itself.

    Then each rank gives its part (4 kB), and ranges that differ are asked for in parts, in
    rounds of at most 64 kB a rank, up to 400 and for ``timeout_s`` at most: some 25 million indices
    one by one. Where more are not as they should be, the first 100,000 are named, and the others
    stay in ``ranges``.

    Args:
        loader: as :class:`~safeloader.SafeDataLoader`, with an epoch behind it.
        group: a group of the backend gloo, as ``torch.distributed.new_group(backend="gloo")``
            gives on all ranks.
        timeout_s: the seconds to wait for the others at the barrier, and for each of their answers.

    Raises:
        TypeError: if the loader has no records, or this is no group.
        ValueError: if the group is of another backend, or ``timeout_s`` is below 0.
        RuntimeError: if ``torch.distributed`` is not initialised.

    Example:
        >>> import tempfile, torch.distributed
        >>> from safeloader import SafeDataLoader, audit_across_ranks
        >>> file = "file://" + tempfile.mktemp()
        >>> torch.distributed.init_process_group("gloo", file, rank=0, world_size=1)
        >>> loader = SafeDataLoader(list(range(10)), batch_size=4)
        >>> batches = list(loader)
        >>> print(audit_across_ranks(loader, torch.distributed.group.WORLD))
        epoch 0 of 1 rank: ok, each of 10 indices came once
          10 samples delivered
        >>> torch.distributed.destroy_process_group()
    """
    ask = getattr(loader, "_for_other_ranks", None)
    if not callable(ask):
        raise TypeError(
            f"loader must be a SafeDataLoader, or one that safeloader.instrument was given; got a "
            f"{type(loader).__name__}"
        )
    see_seconds(timeout_s)
    _see_group(group)
    accounts: RankAccounts = ask()
    talk = _Talk(group, timeout_s)
    if not talk.met():
        return talk.by_store(accounts.part, talk.came())
    try:
        parts = talk.parts(accounts.part)
    except Exception as exc:
        if raised_by_signal(exc):
            raise
        return talk.by_store(accounts.part, talk.ranks)
    merging = talk.merging(parts)
    if merging.todo:
        resolve(_Asks(talk, accounts, merging, lambda: LoaderLog(loader.dataset)), merging)
    return audit_of(merging)


def _see_group(group: Any) -> None:
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            "there is no process group: call torch.distributed.init_process_group first, or put "
            "parts together by safeloader.merge_audits"
        )
    try:
        backend = str(distributed.get_backend(group))
    except Exception as exc:
        raise TypeError(
            f"group must be a process group that this rank belongs to; got {bounded_text(group)}"
        ) from exc
    if backend != "gloo":
        raise ValueError(
            f"group is of the backend {backend}, and a barrier that names who does not come needs "
            'gloo: make one on all ranks by torch.distributed.new_group(backend="gloo")'
        )


class _Talk:
    """What the ranks of a group tell each other, each within a bound."""

    def __init__(self, group: Any, timeout_s: float) -> None:
        self._group, self.timeout_s = group, timeout_s
        self.ranks: list[int] = distributed.get_process_group_ranks(group)
        self.rank = distributed.get_rank()
        self._store = store_of_group(group)
        name = str(getattr(group, "group_name", ""))
        _calls[name] += 1
        self._call = f"audit/{_calls[name]}"
        self._notes: list[str] = []
        self._barrier = ""

    @property
    def _bound(self) -> datetime.timedelta:
        return datetime.timedelta(seconds=max(self.timeout_s, 0.01))

    def met(self) -> bool:
        """Whether all ranks came to the barrier."""
        here = f"{self._call}/here"
        if self._store is not None:
            put_value(self._store, here, self.rank, b"1")
        try:
            distributed.monitored_barrier(self._group, self._bound, wait_all_ranks=True)
        except Exception as exc:
            if raised_by_signal(exc):
                raise
            self._barrier = said_by(exc)
            return False
        if self._store is not None:
            with contextlib.suppress(Exception):  # a store that keeps what it was given
                self._store.delete_key(f"safeloader/{here}/{self.rank}")
        return True

    def came(self) -> list[int]:
        """The ranks that came to the barrier."""
        if self._store is None:
            self._notes.append(f"not all ranks came to the barrier ({self._barrier})")
            return [self.rank]
        came = sorted(collect(self._store, f"{self._call}/here", self.ranks, 0).values)
        if came == sorted(self.ranks):
            self._notes.append("not all ranks came in time, and all of them have come by now")
        return came

    def by_store(self, mine: AuditPart, ranks: list[int]) -> RunAudit:
        """The audit of what is left of these ranks, where the group is of no use any more."""
        parts = [mine]
        if self._store is not None:
            put_value(self._store, self._call, self.rank, mine.to_bytes())
            others = [rank for rank in ranks if rank != self.rank]
            for value in collect(self._store, self._call, others, _STORE_S).values.values():
                with contextlib.suppress(ValueError):
                    parts.append(AuditPart.from_bytes(value))
        return audit_of(self.merging(parts))

    def parts(self, mine: AuditPart) -> list[AuditPart]:
        """The part of each rank."""
        raw = mine.to_bytes()
        if len(raw) > VALUE_BYTES:
            why = f"its part has {len(raw)} bytes, and {VALUE_BYTES} are the most"
            raw = AuditPart.nothing(mine.rank, mine.world_size, why).to_bytes()
        sizes = [
            int.from_bytes(each, "little")
            for each in self.all_gathered(len(raw).to_bytes(8, "little"), 8)
        ]
        told = self.all_gathered(raw, max(sizes))
        parts = [AuditPart.from_bytes(each[:size]) for each, size in zip(told, sizes, strict=True)]
        return [
            each if each.rank == rank else dataclasses.replace(each, rank=rank)
            for each, rank in zip(parts, self.ranks, strict=True)
        ]

    def merging(self, parts: list[AuditPart]) -> Merging:
        """These parts, put together."""
        return Merging(parts, self.ranks, self._notes, can_ask=True)

    def all_gathered(self, mine: bytes, size: int) -> list[bytes]:
        """What each rank sends, of so many bytes at most; in the order of the group."""
        sent = torch.zeros(size, dtype=torch.uint8)
        sent[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        came = [torch.empty(size, dtype=torch.uint8) for _ in self.ranks]
        work = distributed.all_gather(came, sent, self._group, async_op=True)
        if not work.wait(self._bound):
            raise RuntimeError("no answer in time")
        return [each.numpy().tobytes() for each in came]


class _Asks:
    """Rounds in which each rank says of the same ranges what it handed over."""

    def __init__(
        self,
        talk: _Talk,
        accounts: RankAccounts,
        merging: Merging,
        log: Callable[[], LoaderLog],
    ) -> None:
        self._talk, self._merging, self._log = talk, merging, log
        self._end = time.monotonic() + talk.timeout_s
        self._mine: Delivered | None = None
        with guarded("the indices for other ranks", log):
            mine = accounts.delivered(merging.beneath)
            self._mine = mine if mine is not None and mine.can_be_asked else None

    def exchange(self, say: Callable[[Delivered], bytes], size: int) -> dict[int, bytes] | None:
        """What each rank says; None where one of them cannot go on, or wants no more."""
        flag, raw = _GO_ON, b""
        if time.monotonic() > self._end:
            flag = _STOP
        elif self._mine is None:
            flag = _FAULT
        else:
            flag = _FAULT
            with guarded("the indices for other ranks", self._log):
                raw, flag = say(self._mine), _GO_ON
        try:
            told = self._talk.all_gathered(bytes([flag]) * HEAD_BYTES + raw, HEAD_BYTES + size)
        except Exception as exc:
            if raised_by_signal(exc):
                raise
            self._ends("a rank went away before all indices were named")
            return None
        by_rank = dict(zip(self._talk.ranks, told, strict=True))
        unable = [rank for rank, each in by_rank.items() if each[0] == _FAULT]
        if unable:
            self._ends(f"{named(unable)} cannot say which indices these were: too many of them")
        elif any(each[0] == _STOP for each in told):
            self._ends("the time was over before all indices were named")
        else:
            return {rank: each[HEAD_BYTES:] for rank, each in by_rank.items()}
        return None

    def _ends(self, why: str) -> None:
        self._merging.remarks.append(why)
