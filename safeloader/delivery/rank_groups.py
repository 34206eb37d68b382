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

import numpy as np
import torch
from torch import distributed

from safeloader._torch import store_of_group
from safeloader.delivery.across_ranks import RunAudit, audit_of
from safeloader.delivery.audit_part import AuditPart, RankAccounts
from safeloader.delivery.ladder import Delivered, cut
from safeloader.delivery.merging import IndexRange, Merging
from safeloader.delivery.rank_stores import (
    VALUE_BYTES,
    collect,
    put_value,
    said_by,
    see_seconds,
)
from safeloader.introspect.signals import raised_by_signal
from safeloader.introspect.texts import bounded_text

_GO_ON, _STOP, _FAULT = range(3)  # the first byte of what a rank sends
_HEAD = 8  # bytes, of which the first says that
_PARTS = (VALUE_BYTES - _HEAD) // 16  # ranges of which a round tells count and sum
_SINGLE = VALUE_BYTES - _HEAD  # indices of which a round tells how often each came
_ROUNDS_MAX = 400
_STORE_S = 5.0

_calls: Counter[str] = Counter()


def audit_across_ranks(loader: Any, group: Any, timeout_s: float = 60.0) -> RunAudit:
    """What all ranks together handed over of their last epoch, with the indices by name.

    **A collective:** every rank of the group has to call it, each after the same epoch. It begins
    with a monitored barrier; where a rank does not come, the others are told after ``timeout_s``
    which, and get the audit of those that came (over the store of the group). The group cannot be
    used after that: that is how gloo takes a rank that does not come. Nothing of safeloader's calls
    it by itself.

    Then each rank gives its part (4 kB), and ranges that differ are halved and asked for again, in
    rounds of at most 64 kB a rank, up to 400: some 25 million indices one by one. What is beyond
    stays in ``ranges``.

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
        return talk.without_the_absent(accounts.part)
    try:
        return _together(talk, accounts)
    except Exception as exc:
        if raised_by_signal(exc):
            raise
        why = f"a rank went away while the audit was made ({said_by(exc)})"
        return audit_of(talk.merging([accounts.part], [why]))


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
        self._group, self._timeout_s = group, timeout_s
        self.ranks: list[int] = distributed.get_process_group_ranks(group)
        self.rank = distributed.get_rank()
        self._store = store_of_group(group)
        name = str(getattr(group, "group_name", ""))
        _calls[name] += 1
        self._call = f"audit/{_calls[name]}"
        self._notes: list[str] = []

    @property
    def _bound(self) -> datetime.timedelta:
        return datetime.timedelta(seconds=max(self._timeout_s, 0.01))

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
            self._notes.append(f"the barrier said: {said_by(exc)}")
            return False
        if self._store is not None:
            with contextlib.suppress(Exception):  # a store that keeps what it was given
                self._store.delete_key(f"safeloader/{here}/{self.rank}")
        return True

    def without_the_absent(self, mine: AuditPart) -> RunAudit:
        """The audit of those that came, by way of the store."""
        parts = {self.rank: mine}
        if self._store is not None:
            came = collect(self._store, f"{self._call}/here", self.ranks, 0).values
            put_value(self._store, self._call, self.rank, mine.to_bytes())
            found = collect(self._store, self._call, [r for r in came if r != self.rank], _STORE_S)
            for rank, value in found.values.items():
                with contextlib.suppress(ValueError):
                    parts[rank] = AuditPart.from_bytes(value)
            if len(came) == len(self.ranks):
                self._notes.append("all ranks have come by now, some of them too late")
        return audit_of(self.merging(list(parts.values()), self._notes))

    def merging(self, parts: list[AuditPart], notes: list[str]) -> Merging:
        """These parts, put together."""
        return Merging(parts, self.ranks, notes, can_ask=True)

    def all_gathered(self, mine: bytes, size: int) -> list[bytes]:
        """What each rank sends, of so many bytes at most; in the order of the group."""
        sent = torch.zeros(size, dtype=torch.uint8)
        sent[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        came = [torch.empty(size, dtype=torch.uint8) for _ in self.ranks]
        work = distributed.all_gather(came, sent, self._group, async_op=True)
        if not work.wait(self._bound):
            raise RuntimeError("no answer in time")
        return [each.numpy().tobytes() for each in came]


def _together(talk: _Talk, accounts: RankAccounts) -> RunAudit:
    """All ranks are there: merge their parts, and ask for what is not known."""
    mine = _part_bytes(accounts.part)
    sizes = talk.all_gathered(len(mine).to_bytes(8, "little"), 8)
    size = max(int.from_bytes(each, "little") for each in sizes)
    told = talk.all_gathered(mine, size)
    parts = [
        AuditPart.from_bytes(each[: int.from_bytes(length, "little")])
        for each, length in zip(told, sizes, strict=True)
    ]
    merging = talk.merging(_numbered(parts, talk.ranks), [])
    if merging.todo:
        _resolve(talk, merging, accounts.delivered)
    return audit_of(merging)


def _part_bytes(part: AuditPart) -> bytes:
    raw = part.to_bytes()
    if len(raw) > VALUE_BYTES:
        why = f"its part has {len(raw)} bytes, and {VALUE_BYTES} are the most"
        raw = AuditPart.nothing(part.rank, part.world_size, why).to_bytes()
    return raw


def _numbered(parts: list[AuditPart], ranks: list[int]) -> list[AuditPart]:
    """Each under the rank that sent it."""
    return [
        each if each.rank == rank else dataclasses.replace(each, rank=rank)
        for each, rank in zip(parts, ranks, strict=True)
    ]


def _resolve(talk: _Talk, merging: Merging, delivered: Callable[[bool], Delivered | None]) -> None:
    """Ask each other for the ranges that differ, until the indices are known."""
    mine: Delivered | None = None
    fault = ""
    try:
        mine = delivered(merging.beneath)
    except Exception as exc:
        if raised_by_signal(exc):
            raise
        fault = said_by(exc)
    can = mine is not None and mine.can_be_asked
    end = time.monotonic() + talk._timeout_s
    left = sorted(merging.todo)
    merging.todo = []
    answers = _Answers(talk, mine if can else None)
    for _ in range(_ROUNDS_MAX):
        if not left:
            break
        some, left = _next(left)
        stops = time.monotonic() > end
        if sum(each.stop - each.start for each in some) <= _SINGLE:
            said = answers.single(some, stops)
        else:
            said = answers.parts(some, stops)
        if said is None:
            left = sorted(some + left)
            break
        for start, stop, times, sums in said:
            if times is not None:
                merging.add_times(start, times)
            elif sums is not None and merging.differs(start, stop, sums):
                merging.add_range(start, stop, sums)
        left = sorted(left + merging.todo)
        merging.todo = []
    merging.todo = left
    merging.notes += answers.notes + ([fault] if fault else [])


def _next(left: list[IndexRange]) -> tuple[list[IndexRange], list[IndexRange]]:
    """The ranges to ask for now: as many as one round names index by index, or a wide one."""
    wide, number = 0, 0
    for each in left:
        wide += each.stop - each.start
        if wide > _SINGLE:
            break
        number += 1
    number = max(1, number)
    return left[:number], left[number:]


class _Answers:
    """One round after the other: each rank says of the same ranges what it handed over."""

    def __init__(self, talk: _Talk, mine: Delivered | None) -> None:
        self._talk, self._mine = talk, mine
        self.notes: list[str] = []

    def single(self, ranges: list[IndexRange], stops: bool) -> list[Any] | None:
        """How often each index came, up to 255 times."""

        def tell(mine: Delivered) -> bytes:
            each = [mine.multiplicities(part.start, part.stop) for part in ranges]
            return np.concatenate(each).clip(0, 255).astype(np.uint8).tobytes()

        told = self._exchange(tell, sum(each.stop - each.start for each in ranges), stops)
        if told is None:
            return None
        out, at = [], 0
        for part in ranges:
            size = part.stop - part.start
            times = {
                rank: np.frombuffer(raw, np.uint8, size, at).astype(np.int64)
                for rank, raw in told.items()
            }
            out.append((part.start, part.stop, times, None))
            at += size
        return out

    def parts(self, ranges: list[IndexRange], stops: bool) -> list[Any] | None:
        """Counts and sums of the parts of a wide range."""
        start, stop = ranges[0].start, ranges[-1].stop
        number = min(_PARTS, stop - start)

        def tell(mine: Delivered) -> bytes:
            counts, sums = mine.sums(start, stop, number)
            return counts.tobytes() + sums.tobytes()

        told = self._exchange(tell, 16 * number, stops)
        if told is None:
            return None
        edges = cut(start, stop, number).tolist()
        of_rank = {
            rank: (
                np.frombuffer(raw, np.int64, number).tolist(),
                np.frombuffer(raw, np.uint64, number, 8 * number).tolist(),
            )
            for rank, raw in told.items()
        }
        return [
            (
                edges[k],
                edges[k + 1],
                None,
                {rank: (counts[k], sums[k]) for rank, (counts, sums) in of_rank.items()},
            )
            for k in range(number)
        ]

    def _exchange(
        self, tell: Callable[[Delivered], bytes], size: int, stops: bool
    ) -> dict[int, bytes] | None:
        """What each rank says; None where one of them cannot go on."""
        flag, raw = (_STOP if stops else _GO_ON), b""
        if self._mine is None:
            flag = _FAULT
        else:
            try:
                raw = tell(self._mine)
            except Exception as exc:
                if raised_by_signal(exc):
                    raise
                flag = _FAULT
        told = self._talk.all_gathered(bytes([flag]) * _HEAD + raw, _HEAD + size)
        flags = {rank: each[0] for rank, each in zip(self._talk.ranks, told, strict=True)}
        unable = [rank for rank, each in flags.items() if each == _FAULT]
        if unable:
            self.notes.append(f"rank {unable[0]} cannot say which indices it handed over")
        elif _STOP in flags.values():
            self.notes.append("the time was over before all indices were named")
        if any(each != _GO_ON for each in flags.values()):
            return None
        return {rank: each[_HEAD:] for rank, each in zip(self._talk.ranks, told, strict=True)}
